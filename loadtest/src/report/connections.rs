//! Outcome of connections.
//!
//! Pure.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

/// Number of different reasons that are counted separately; the rest counts as one.
const TEXTS_MAX: usize = 50;
const OTHERS: &str = "others";

/// Outcome of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConnectOutcome {
    /// It opened. Times count from when it was due, so that a server which delays others does not
    /// look fast.
    Opened {
        /// Time until `connected`.
        connected: Duration,
        /// Time until `joined`, if a room was requested.
        joined: Option<Duration>,
    },
    /// The handshake response had a status other than 101.
    Rejected {
        /// HTTP status.
        status: u16,
    },
    /// It failed to open in another way.
    Failed {
        /// Reason, with few distinct values.
        reason: String,
    },
    /// It was open and closed before the end.
    Closed {
        /// Close code, or the error.
        reason: String,
    },
}

/// Counters of connections.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct ConnectionCounters {
    opened: u64,
    rejected: BTreeMap<String, u64>,
    failed: BTreeMap<String, u64>,
    closed: BTreeMap<String, u64>,
    connected_us: Vec<u64>,
    joined_us: Vec<u64>,
    received_bytes: u64,
}

impl ConnectionCounters {
    /// Counts received bytes.
    pub(crate) fn add_received(&mut self, bytes: usize) {
        self.received_bytes += bytes as u64;
    }

    /// Counts one outcome.
    pub(crate) fn add(&mut self, outcome: ConnectOutcome) {
        match outcome {
            ConnectOutcome::Opened { connected, joined } => {
                self.opened += 1;
                self.connected_us.push(connected.as_micros() as u64);
                self.joined_us.extend(joined.map(|joined| joined.as_micros() as u64));
            }
            ConnectOutcome::Rejected { status } => {
                add_count(&mut self.rejected, status.to_string(), 1);
            }
            ConnectOutcome::Failed { reason } => add_count(&mut self.failed, reason, 1),
            ConnectOutcome::Closed { reason } => add_count(&mut self.closed, reason, 1),
        }
    }

    /// Adds the counters of another worker.
    pub(crate) fn merge(&mut self, other: Self) {
        self.opened += other.opened;
        let pairs = [
            (&mut self.rejected, other.rejected),
            (&mut self.failed, other.failed),
            (&mut self.closed, other.closed),
        ];
        for (counts, others) in pairs {
            others.into_iter().for_each(|(text, count)| add_count(counts, text, count));
        }
        self.received_bytes += other.received_bytes;
        self.connected_us.extend(other.connected_us);
        self.joined_us.extend(other.joined_us);
    }

    /// Number of connections that are open.
    pub(crate) fn held(&self) -> u64 {
        self.opened - total(&self.closed).min(self.opened)
    }

    /// Number of connections that were opened.
    pub(crate) fn opened(&self) -> u64 {
        self.opened
    }
}

fn add_count(counts: &mut BTreeMap<String, u64>, text: String, count: u64) {
    let known = counts.contains_key(&text) || counts.len() < TEXTS_MAX;
    *counts.entry(if known { text } else { OTHERS.to_owned() }).or_default() += count;
}

fn total(counts: &BTreeMap<String, u64>) -> u64 {
    counts.values().sum()
}

/// Summary of connections.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct ConnectionReport {
    pub(crate) requested: u64,
    pub(crate) opened: u64,
    /// Connections that were open until the end.
    pub(crate) held: u64,
    /// By HTTP status.
    pub(crate) rejected: BTreeMap<String, u64>,
    /// By error.
    pub(crate) failed: BTreeMap<String, u64>,
    /// By close code and reason.
    pub(crate) closed_while_held: BTreeMap<String, u64>,
    /// Time from when the connection was due.
    pub(crate) connected_ms: Option<LatencySummary>,
    pub(crate) joined_ms: Option<LatencySummary>,
    /// Bytes that servers sent, handshakes included.
    pub(crate) received_bytes: u64,
    pub(crate) opening_s: f64,
}

/// Percentiles in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct LatencySummary {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl ConnectionReport {
    /// Summarizes the counters of `requested` connections.
    pub(crate) fn of(counters: ConnectionCounters, requested: u64, opening: Duration) -> Self {
        Self {
            requested,
            opened: counters.opened,
            held: counters.held(),
            rejected: counters.rejected,
            failed: counters.failed,
            closed_while_held: counters.closed,
            connected_ms: LatencySummary::of(counters.connected_us),
            joined_ms: LatencySummary::of(counters.joined_us),
            received_bytes: counters.received_bytes,
            opening_s: opening.as_secs_f64(),
        }
    }

    /// Failed expectations: every requested connection must be opened and held.
    pub(super) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if self.held != self.requested {
            failures.push(format!("{} of {} connections were held", self.held, self.requested));
        }
        failures
    }

    pub(super) fn lines(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
        line("opened", format!("{} of {} in {:.1} s", self.opened, self.requested, self.opening_s));
        line("held", self.held.to_string());
        for (status, count) in &self.rejected {
            line("rejected", format!("{count} with HTTP {status}"));
        }
        for (reason, count) in &self.failed {
            line("failed", format!("{count}: {reason}"));
        }
        for (reason, count) in &self.closed_while_held {
            line("closed while held", format!("{count}: {reason}"));
        }
        for (name, times) in [("connected", self.connected_ms), ("joined", self.joined_ms)] {
            if let Some(times) = times {
                line(&format!("time to {name}"), times.to_string());
            }
        }
        let each = self.received_bytes as f64 / 1024.0 / self.opened.max(1) as f64;
        line("received", format!("{each:.2} KiB per connection"));
        lines
    }
}

impl LatencySummary {
    /// Summarizes times in µs; `None` if there are none.
    pub(crate) fn of(mut times_us: Vec<u64>) -> Option<Self> {
        times_us.sort_unstable();
        let at = |share| percentile(&times_us, share).map(|us| us as f64 / 1e3);
        Some(Self { p50: at(0.5)?, p99: at(0.99)?, max: at(1.0)? })
    }
}

impl std::fmt::Display for LatencySummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { p50, p99, max } = self;
        write!(f, "p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms")
    }
}

/// The smallest of the sorted values that at least `share` of the values do not exceed.
fn percentile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn opened() -> ConnectOutcome {
        let ms = Duration::from_millis;
        ConnectOutcome::Opened { connected: ms(3), joined: Some(ms(5)) }
    }

    fn connections(outcomes: &[ConnectOutcome]) -> ConnectionReport {
        let mut counters = ConnectionCounters::default();
        outcomes.iter().for_each(|outcome| counters.add(outcome.clone()));
        ConnectionReport::of(counters, 2, SECOND)
    }

    #[test]
    fn percentile_is_a_measured_value() {
        let hundred: Vec<u32> = (1..=100).collect();
        let at = |share| percentile(&hundred, share);
        assert_eq!((at(0.0), at(0.5), at(0.99), at(1.0)), (Some(1), Some(50), Some(99), Some(100)));
        assert_eq!(percentile(&[7], 0.99), Some(7));
        assert_eq!(percentile::<u32>(&[], 0.5), None);
    }

    #[test]
    fn connections_pass_if_all_are_opened_and_held() {
        let check = |outcomes: &[ConnectOutcome], expected: &[&str]| {
            assert_eq!(connections(outcomes).failures(), expected);
        };
        let one = "1 of 2 connections were held";
        check(&[opened(), opened()], &[]);
        check(&[opened()], &[one]);
        check(&[opened(), ConnectOutcome::Rejected { status: 429 }], &[one]);
        let ended = ConnectOutcome::Closed { reason: "1012 draining".to_owned() };
        check(&[opened(), opened(), ended], &[one]);
    }

    #[test]
    fn each_outcome_has_a_line() {
        let mut counters = ConnectionCounters::default();
        counters.add(opened());
        counters.add(ConnectOutcome::Rejected { status: 503 });
        counters.add(ConnectOutcome::Failed { reason: "timed out".to_owned() });
        assert_eq!((counters.opened(), counters.held()), (1, 1));
        let lines = ConnectionReport::of(counters, 3, 2 * SECOND).lines();
        let text: Vec<String> =
            lines.iter().map(|(name, value)| format!("{name} {value}")).collect();
        for part in ["opened 1 of 3 in 2.0 s", "1 with HTTP 503", "1: timed out", "max 3.0 ms"] {
            assert!(text.iter().any(|line| line.contains(part)), "{part:?} is not in {text:?}");
        }
    }

    #[test]
    fn excess_reasons_are_counted_together() {
        let mut counters = ConnectionCounters::default();
        for number in 0..200 {
            counters.add(ConnectOutcome::Failed { reason: number.to_string() });
        }
        let mut both = counters.clone();
        both.merge(counters);
        assert_eq!((both.failed.len(), total(&both.failed)), (TEXTS_MAX + 1, 400));
        assert_eq!(both.failed[OTHERS], 300);
    }
}
