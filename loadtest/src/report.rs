//! What is told at the end: counts, times, costs; for people as a table, for programs as JSON.
//!
//! Pure.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;

use crate::{connection::Outcome, process::Cost};

/// How many different texts are counted one by one; the rest goes into one line.
const TEXTS_MAX: usize = 50;
const THE_REST: &str = "others";

/// Counts what becomes of connections.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    opened: u32,
    refused: BTreeMap<String, u32>,
    failed: BTreeMap<String, u32>,
    ended: BTreeMap<String, u32>,
    connected: Vec<Duration>,
    joined: Vec<Duration>,
}

impl Tally {
    /// Counts one outcome.
    pub(crate) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Opened { connected, joined } => {
                self.opened += 1;
                self.connected.push(connected);
                self.joined.extend(joined);
            }
            Outcome::Refused { status } => count(&mut self.refused, status.to_string()),
            Outcome::Failed { why } => count(&mut self.failed, why),
            Outcome::Ended { how } => count(&mut self.ended, how),
        }
    }

    /// How many are known to have opened or not.
    pub(crate) fn settled(&self) -> u32 {
        self.opened + total(&self.refused) + total(&self.failed)
    }

    /// How many are open now.
    pub(crate) fn held(&self) -> u32 {
        self.opened - total(&self.ended).min(self.opened)
    }
}

fn count(counts: &mut BTreeMap<String, u32>, text: String) {
    let known = counts.contains_key(&text) || counts.len() < TEXTS_MAX;
    *counts.entry(if known { text } else { THE_REST.to_owned() }).or_default() += 1;
}

fn total(counts: &BTreeMap<String, u32>) -> u32 {
    counts.values().sum()
}

/// What a run came to.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) asked: u32,
    pub(crate) started: u32,
    pub(crate) opened: u32,
    /// Open from then until the end.
    pub(crate) held: u32,
    /// By HTTP status.
    pub(crate) refused: BTreeMap<String, u32>,
    /// By what went wrong.
    pub(crate) failed: BTreeMap<String, u32>,
    /// By close code and reason.
    pub(crate) closed_while_held: BTreeMap<String, u32>,
    /// From when the connection was due.
    pub(crate) connected_ms: Option<Times>,
    pub(crate) joined_ms: Option<Times>,
    pub(crate) opening_s: f64,
    pub(crate) holding_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) servers: Vec<ProcessReport>,
    /// This process.
    pub(crate) own: Option<ProcessReport>,
}

/// A distribution, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Times {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// What a process cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct ProcessReport {
    pub(crate) pid: u32,
    pub(crate) memory_before_bytes: u64,
    pub(crate) memory_held_bytes: u64,
    /// What it grew by, for each connection that is open; nothing where none is.
    pub(crate) memory_per_connection_bytes: Option<i64>,
    pub(crate) cpu_opening_ms: u64,
    /// For each connection that was started.
    pub(crate) cpu_opening_per_connection_us: u64,
    pub(crate) cpu_holding_ms: u64,
}

/// A process's cost at the three moments of a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Costs {
    pub(crate) pid: u32,
    pub(crate) before: Cost,
    pub(crate) opened: Cost,
    pub(crate) held: Cost,
}

/// How a run went, besides what the tally has.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) asked: u32,
    pub(crate) started: u32,
    pub(crate) opening: Duration,
    pub(crate) holding: Duration,
    pub(crate) interrupted: bool,
    pub(crate) servers: Vec<Costs>,
    pub(crate) own: Option<Costs>,
}

impl Report {
    /// Sums up a run.
    pub(crate) fn new(tally: Tally, run: &Run) -> Self {
        let held = tally.held();
        let cost = |costs: &Costs| costs.report(held, run.started);
        Self {
            asked: run.asked,
            started: run.started,
            opened: tally.opened,
            held,
            refused: tally.refused,
            failed: tally.failed,
            closed_while_held: tally.ended,
            connected_ms: Times::of(tally.connected),
            joined_ms: Times::of(tally.joined),
            opening_s: run.opening.as_secs_f64(),
            holding_s: run.holding.as_secs_f64(),
            interrupted: run.interrupted,
            servers: run.servers.iter().map(cost).collect(),
            own: run.own.as_ref().map(cost),
        }
    }

    /// Whether all that was asked for was opened and held.
    pub(crate) fn is_good(&self) -> bool {
        self.held == self.asked && !self.interrupted
    }
}

impl Costs {
    fn report(&self, held: u32, started: u32) -> ProcessReport {
        let grown = self.held.pss_bytes as i64 - self.before.pss_bytes as i64;
        let opening = self.opened.cpu_ms.saturating_sub(self.before.cpu_ms);
        ProcessReport {
            pid: self.pid,
            memory_before_bytes: self.before.pss_bytes,
            memory_held_bytes: self.held.pss_bytes,
            memory_per_connection_bytes: grown.checked_div(i64::from(held)),
            cpu_opening_ms: opening,
            cpu_opening_per_connection_us: opening * 1000 / u64::from(started.max(1)),
            cpu_holding_ms: self.held.cpu_ms.saturating_sub(self.opened.cpu_ms),
        }
    }
}

impl Times {
    /// The distribution of `times`; `None` where there are none.
    fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let at = |share| percentile(&times, share).map(|time| time.as_secs_f64() * 1e3);
        Some(Self { p50: at(0.5)?, p99: at(0.99)?, max: at(1.0)? })
    }
}

/// The smallest of the sorted values that at least `share` of them do not exceed.
fn percentile<T: Copy>(sorted: &[T], share: f64) -> Option<T> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.interrupted {
            writeln!(f, "interrupted after {} of {} connections", self.started, self.asked)?;
        }
        let opening = format!("in {:.1} s", self.opening_s);
        line(f, "opened", format_args!("{} of {} {opening}", self.opened, self.asked))?;
        let holding = format!("at the end of {:.1} s", self.holding_s);
        line(f, "held", format_args!("{} {holding}", self.held))?;
        for (status, many) in &self.refused {
            line(f, "refused", format_args!("{many} with HTTP {status}"))?;
        }
        for (why, many) in &self.failed {
            line(f, "failed", format_args!("{many}: {why}"))?;
        }
        for (how, many) in &self.closed_while_held {
            line(f, "closed while held", format_args!("{many}: {how}"))?;
        }
        for (name, times) in [("connected", self.connected_ms), ("joined", self.joined_ms)] {
            if let Some(Times { p50, p99, max }) = times {
                let text = format_args!("p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms");
                line(f, &format!("time to {name}"), text)?;
            }
        }
        for server in &self.servers {
            server.write(f, &format!("server {}", server.pid))?;
        }
        if let Some(own) = &self.own {
            own.write(f, "this tool")?;
        }
        Ok(())
    }
}

impl ProcessReport {
    fn write(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let kib = |bytes: f64| bytes / 1024.0;
        let (before, held) = (self.memory_before_bytes as f64, self.memory_held_bytes as f64);
        let mib = format!("{:.1} to {:.1} MiB", kib(kib(before)), kib(kib(held)));
        let name_of_memory = format!("{name} memory");
        match self.memory_per_connection_bytes {
            Some(each) => {
                let each = kib(each as f64);
                line(f, &name_of_memory, format_args!("{each:.1} KiB per connection ({mib})"))?;
            }
            None => line(f, &name_of_memory, format_args!("{mib}"))?,
        }
        let cpu = format_args!(
            "{} µs per connection to open ({} ms), {} ms while held",
            self.cpu_opening_per_connection_us, self.cpu_opening_ms, self.cpu_holding_ms,
        );
        line(f, &format!("{name} CPU"), cpu)
    }
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, text: fmt::Arguments<'_>) -> fmt::Result {
    writeln!(f, "{name:<22} {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn run(asked: u32) -> Run {
        Run {
            asked,
            started: asked,
            opening: ms(2_000),
            holding: ms(10_000),
            interrupted: false,
            servers: vec![Costs {
                pid: 7,
                before: Cost { pss_bytes: 1 << 20, cpu_ms: 100 },
                opened: Cost { pss_bytes: 3 << 20, cpu_ms: 300 },
                held: Cost { pss_bytes: 2 << 20, cpu_ms: 350 },
            }],
            own: None,
        }
    }

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let hundred: Vec<u32> = (1..=100).collect();
        let at = |share| percentile(&hundred, share);
        assert_eq!((at(0.0), at(0.5), at(0.99), at(1.0)), (Some(1), Some(50), Some(99), Some(100)));
        assert_eq!(percentile(&[7], 0.99), Some(7));
        assert_eq!(percentile::<u32>(&[], 0.5), None);
    }

    #[test]
    fn all_opened_and_held_is_good_and_nothing_else() {
        let opened = || Outcome::Opened { connected: ms(3), joined: Some(ms(5)) };
        let report = |outcomes: &[Outcome], interrupted| {
            let mut tally = Tally::default();
            outcomes.iter().for_each(|outcome| tally.add(outcome.clone()));
            Report::new(tally, &Run { interrupted, ..run(2) })
        };
        assert!(report(&[opened(), opened()], false).is_good());
        assert!(!report(&[opened(), opened()], true).is_good());
        assert!(!report(&[opened()], false).is_good());
        assert!(!report(&[opened(), Outcome::Refused { status: 429 }], false).is_good());
        let ended = Outcome::Ended { how: "1012 draining".to_owned() };
        let report = report(&[opened(), opened(), ended], false);
        assert_eq!((report.is_good(), report.opened, report.held), (false, 2, 1));
    }

    #[test]
    fn the_table_and_the_json_tell_the_same() {
        let mut tally = Tally::default();
        tally.add(Outcome::Opened { connected: ms(3), joined: None });
        tally.add(Outcome::Refused { status: 503 });
        tally.add(Outcome::Failed { why: "timed out".to_owned() });
        assert_eq!((tally.settled(), tally.held()), (3, 1));
        let report = Report::new(tally, &run(3));
        let table = report.to_string();
        for part in ["1 of 3 in 2.0 s", "1 with HTTP 503", "1: timed out", "max 3.0 ms"] {
            assert!(table.contains(part), "{part:?} is not in\n{table}");
        }
        assert!(table.contains("1024.0 KiB per connection (1.0 to 2.0 MiB)"), "{table}");
        assert!(table.contains("66666 µs per connection to open (200 ms), 50 ms"), "{table}");
        assert!(!table.contains("joined"));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&json["refused"]["503"], &json["connected_ms"]["p99"]),
            (&1.into(), &3.0.into())
        );
        assert_eq!(json["joined_ms"], serde_json::Value::Null);
    }

    #[test]
    fn endless_kinds_of_failure_are_counted_together() {
        let mut tally = Tally::default();
        for number in 0..200 {
            tally.add(Outcome::Failed { why: number.to_string() });
        }
        assert_eq!((tally.failed.len(), tally.settled()), (TEXTS_MAX + 1, 200));
        assert_eq!(tally.failed[THE_REST], 150);
    }
}
