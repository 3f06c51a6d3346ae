//! Measurements of an attack, and the verdict whether the node withstood it.
//!
//! Pure.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

/// Highest ratio of the attacked node's p99 to the control's.
const P99_FACTOR: f64 = 2.0;
/// Bytes that the gateway and Redis may hold per byte of the attacker.
const GROWTH_FACTOR: f64 = 2.0;
/// Bytes that the gateway may hold per open connection, in addition.
const CONNECTION_BYTES: u64 = 16 * 1024;
/// `limits.outbox_bytes_max`, which the gateway may hold per unread stream.
const OUTBOX_BYTES: u64 = 1 << 20;
/// Variation of the gateway's memory without an attack: the allocator's arenas and their delayed
/// return to the system, rings of the legitimate rooms.
const GATEWAY_SPARE_BYTES: u64 = 24 << 20;
/// Variation of Redis' memory without an attack.
const REDIS_SPARE_BYTES: u64 = 2 << 20;
/// Variation of descriptors, keys and subscriptions without an attack.
const SPARE_COUNT: u64 = 16;
/// Keys that a user name keeps in Redis: inbox, position, sessions, session data.
const KEYS_PER_USER: u64 = 4;
/// Time that newcomers and probes may take whatever the control's time: some tens of samples have
/// no p99.
const PROBE_MAX_MS: f64 = 250.0;
/// Bytes that a gateway may log under an attack.
const LOG_BYTES_MAX: u64 = 256 * 1024;

/// Resource usage of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct NodeUsage {
    /// The gateway's proportional set size.
    pub(crate) gateway_bytes: u64,
    /// Redis' `used_memory`.
    pub(crate) redis_bytes: u64,
    /// Descriptors of the gateway.
    pub(crate) descriptors: u64,
    /// Keys in Redis.
    pub(crate) keys: u64,
    /// Subscribed channels and patterns in Redis.
    pub(crate) subscriptions: u64,
    /// Size of the gateway's log.
    pub(crate) log_bytes: u64,
    /// CPU time of the gateway since its start.
    pub(crate) gateway_cpu_ms: u64,
    /// CPU time of Redis since its start.
    pub(crate) redis_cpu_ms: u64,
    /// Whether all values could be read, which needs an answer of Redis.
    #[serde(skip)]
    pub(crate) is_known: bool,
}

impl NodeUsage {
    /// The larger of each value.
    pub(crate) fn peak(self, other: Self) -> Self {
        Self {
            gateway_bytes: self.gateway_bytes.max(other.gateway_bytes),
            redis_bytes: self.redis_bytes.max(other.redis_bytes),
            descriptors: self.descriptors.max(other.descriptors),
            keys: self.keys.max(other.keys),
            subscriptions: self.subscriptions.max(other.subscriptions),
            log_bytes: self.log_bytes.max(other.log_bytes),
            gateway_cpu_ms: self.gateway_cpu_ms.max(other.gateway_cpu_ms),
            redis_cpu_ms: self.redis_cpu_ms.max(other.redis_cpu_ms),
            is_known: self.is_known || other.is_known,
        }
    }

    /// The growth of each value since `before`; 0 where it has shrunk.
    pub(crate) fn since(self, before: Self) -> Self {
        let more = |get: fn(&Self) -> u64| get(&self).saturating_sub(get(&before));
        Self {
            gateway_bytes: more(|usage| usage.gateway_bytes),
            redis_bytes: more(|usage| usage.redis_bytes),
            descriptors: more(|usage| usage.descriptors),
            keys: more(|usage| usage.keys),
            subscriptions: more(|usage| usage.subscriptions),
            log_bytes: more(|usage| usage.log_bytes),
            gateway_cpu_ms: more(|usage| usage.gateway_cpu_ms),
            redis_cpu_ms: more(|usage| usage.redis_cpu_ms),
            is_known: self.is_known && before.is_known,
        }
    }
}

/// Metrics of the legitimate clients of one node.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct LegitimateMetrics {
    /// Messages that were sent.
    pub(crate) sent: u64,
    /// Time from when a message was due until a copy arrived.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Messages neither acknowledged nor rejected within 5 s.
    pub(crate) unanswered: u64,
    /// Messages rejected.
    pub(crate) rejected: u64,
    /// Messages acknowledged and not delivered to a member within 5 s.
    pub(crate) lost: u64,
    /// Connections that the server ended.
    pub(crate) ended: u64,
    /// Newcomers that did not join their room within 5 s.
    pub(crate) newcomers_failed: u64,
    /// Time from when a newcomer was due until it had joined.
    pub(crate) newcomers_p99_ms: f64,
    /// Requests for `/health` or `/ready` without a 200 within 5 s.
    pub(crate) probes_failed: u64,
    pub(crate) probes_p99_ms: f64,
    /// Lateness of this tool, p99.
    pub(crate) lag_p99_us: u64,
    /// The first failures, in words.
    pub(crate) examples: Vec<String>,
}

/// All measurements of an attack.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct AttackMeasurement {
    /// The legitimate clients of the attacked node.
    pub(crate) legitimate: LegitimateMetrics,
    /// The legitimate clients of the control.
    pub(crate) control: LegitimateMetrics,
    /// Bytes that the attacker sent.
    pub(crate) sent_bytes: u64,
    /// Most connections that the attacker had open at once.
    pub(crate) connections: u64,
    /// How the server ended the attacker's connections.
    pub(crate) close_reasons: BTreeMap<String, u64>,
    /// Peak growth of the attacked node, less the growth of the control.
    pub(crate) peak_growth: NodeUsage,
    /// Growth that was left at the end of the recovery.
    pub(crate) residual: NodeUsage,
    /// How long after the attack the node had recovered; `None`: not within the time limit.
    #[serde(rename = "recovered_after_ms", serialize_with = "millis")]
    pub(crate) recovered_after: Option<Duration>,
    /// CPU time in percent of a core during the attack.
    pub(crate) gateway_cpu_percent: f64,
    pub(crate) redis_cpu_percent: f64,
    pub(crate) control_cpu_percent: f64,
    /// Whether the gateway or Redis ended.
    pub(crate) died: bool,
}

fn millis<S: serde::Serializer>(
    recovered_after: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    recovered_after.map(|recovered_after| recovered_after.as_millis() as u64).serialize(serializer)
}

/// Resources that an attack may use, in addition to those that its bytes allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Allowance {
    /// Streams that the attacker does not read.
    pub(crate) streams: u64,
    /// Different users that the attacker connects as.
    pub(crate) users: u64,
    /// Records in Redis that clients may leave, by `docs/limits.md`, in addition to those of the
    /// users.
    pub(crate) records: u64,
    /// Size of one record.
    pub(crate) record_bytes: u64,
    /// Time that legitimate newcomers may wait, if thousands of others are in the same queue.
    pub(crate) newcomers: Duration,
    /// A close code that the attacker must receive.
    pub(crate) close: Option<&'static str>,
}

/// Thresholds of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct AttackThresholds {
    /// Excess of p99 over the control's that is always allowed.
    #[serde(skip)]
    pub(crate) slack: Duration,
    /// Highest lateness of this tool for valid times.
    #[serde(skip)]
    pub(crate) lag_max: Duration,
}

/// Verdict on an attack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct AttackVerdict {
    /// Failed expectations; empty if the node withstood the attack.
    pub(crate) failures: Vec<String>,
    /// Why the times may reflect this tool more than the node.
    pub(crate) invalid: Option<String>,
}

impl Allowance {
    /// Bytes that Redis may keep, in addition to those that the attacker's bytes allow.
    fn redis_bytes(&self) -> u64 {
        REDIS_SPARE_BYTES + self.records * self.record_bytes + self.users * KEYS_PER_USER * 1024
    }

    /// Keys that may remain.
    fn keys(&self) -> u64 {
        SPARE_COUNT + self.records + self.users * KEYS_PER_USER
    }

    /// Whether the residual growth is within the allowance.
    pub(crate) fn is_recovered(&self, residual: &NodeUsage) -> bool {
        self.unrecovered(residual).is_empty()
    }

    fn unrecovered(&self, residual: &NodeUsage) -> Vec<String> {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        if !residual.is_known {
            return vec!["the gateway or Redis does not answer".to_owned()];
        }
        let mut failures = Vec::new();
        if residual.gateway_bytes > GATEWAY_SPARE_BYTES {
            failures.push(format!("the gateway keeps {:.1} MiB", mib(residual.gateway_bytes)));
        }
        // Records of users may remain as long as the limits say.
        if residual.redis_bytes > self.redis_bytes() {
            failures.push(format!("Redis keeps {:.1} MiB", mib(residual.redis_bytes)));
        }
        for (count, max, what) in [
            (residual.descriptors, SPARE_COUNT, "descriptors"),
            (residual.keys, self.keys(), "keys in Redis"),
            (residual.subscriptions, SPARE_COUNT, "subscriptions"),
        ] {
            if count > max {
                failures.push(format!("{count} {what} remain, more than {max}"));
            }
        }
        failures
    }
}

impl AttackMeasurement {
    /// Peak growth of the gateway and Redis.
    pub(crate) fn peak_growth_bytes(&self) -> u64 {
        self.peak_growth.gateway_bytes + self.peak_growth.redis_bytes
    }

    /// Peak growth per byte that the attacker sent.
    pub(crate) fn growth_per_byte(&self) -> f64 {
        self.peak_growth_bytes() as f64 / self.sent_bytes.max(1) as f64
    }

    /// Compares the measurements with the allowance and thresholds.
    pub(crate) fn evaluate(
        &self,
        allowance: &Allowance,
        thresholds: &AttackThresholds,
    ) -> AttackVerdict {
        let mut failures = Vec::new();
        if self.died {
            failures.push("the gateway or Redis ended".to_owned());
        }
        self.evaluate_legitimate(thresholds, allowance, &mut failures);
        self.evaluate_growth(allowance, &mut failures);
        match self.recovered_after {
            Some(_) => {}
            None => {
                let left = allowance.unrecovered(&self.residual).join(", ");
                failures.push(format!("not recovered in time: {left}"));
            }
        }
        if let Some(close) = allowance.close
            && !self.close_reasons.keys().any(|end| end.starts_with(close))
        {
            failures.push(format!("no connection of the attacker was closed with {close}"));
        }
        let lag = Duration::from_micros(self.legitimate.lag_p99_us.max(self.control.lag_p99_us));
        let invalid = (lag > thresholds.lag_max).then(|| {
            let (lag, max) = (lag.as_micros(), thresholds.lag_max.as_micros());
            format!("the load generator was {lag} µs late (p99), more than {max} µs")
        });
        if self.legitimate.sent == 0 || self.control.sent == 0 {
            failures.push("no legitimate client could send".to_owned());
        }
        AttackVerdict { failures, invalid }
    }

    fn evaluate_legitimate(
        &self,
        thresholds: &AttackThresholds,
        allowance: &Allowance,
        failures: &mut Vec<String>,
    ) {
        let (legitimate, control) = (&self.legitimate, &self.control);
        let slack = thresholds.slack.as_secs_f64() * 1e3;
        let max_allowed = (P99_FACTOR * control.p99_ms).max(control.p99_ms + slack);
        if legitimate.p99_ms > max_allowed {
            let times = legitimate.p99_ms / control.p99_ms.max(0.001);
            failures.push(format!("legitimate p99 is {times:.1} times the control's"));
        }
        for (count, what) in [
            (legitimate.unanswered, "legitimate messages unanswered"),
            (legitimate.rejected, "legitimate messages rejected"),
            (legitimate.lost, "legitimate deliveries missing"),
            (legitimate.ended, "legitimate connections ended"),
            (legitimate.newcomers_failed, "newcomers did not join"),
            (legitimate.probes_failed, "probes of /health and /ready failed"),
        ] {
            if count > 0 {
                failures.push(format!("{count} {what}"));
            }
        }
        let newcomers_max = PROBE_MAX_MS.max(allowance.newcomers.as_secs_f64() * 1e3);
        for (ours, theirs, max, what) in [
            (legitimate.newcomers_p99_ms, control.newcomers_p99_ms, newcomers_max, "newcomers"),
            (legitimate.probes_p99_ms, control.probes_p99_ms, PROBE_MAX_MS, "/health and /ready"),
        ] {
            if ours > (P99_FACTOR * theirs).max(max + slack) {
                failures.push(format!("{what} took {ours:.0} ms, the control's {theirs:.0}"));
            }
        }
    }

    fn evaluate_growth(&self, allowance: &Allowance, failures: &mut Vec<String>) {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        let bytes = GROWTH_FACTOR * self.sent_bytes as f64;
        let gateway = bytes
            + (GATEWAY_SPARE_BYTES
                + self.connections * CONNECTION_BYTES
                + allowance.streams * OUTBOX_BYTES) as f64;
        let redis = bytes + allowance.redis_bytes() as f64;
        for (peak_growth, max_allowed, what) in [
            (self.peak_growth.gateway_bytes as f64, gateway, "the gateway"),
            (self.peak_growth.redis_bytes as f64, redis, "Redis"),
        ] {
            if peak_growth > max_allowed {
                let (peak_growth, max_allowed) = (mib(peak_growth), mib(max_allowed));
                failures
                    .push(format!("{what} held {peak_growth:.1} MiB, more than {max_allowed:.1}"));
            }
        }
        if self.peak_growth.log_bytes > LOG_BYTES_MAX {
            failures.push(format!(
                "the gateway logged {:.1} MiB",
                mib(self.peak_growth.log_bytes as f64)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn thresholds() -> AttackThresholds {
        AttackThresholds { slack: Duration::ZERO, lag_max: Duration::from_millis(1) }
    }

    fn withstood() -> AttackMeasurement {
        let control = LegitimateMetrics {
            sent: 800,
            p50_ms: 1.0,
            p99_ms: 2.0,
            ..LegitimateMetrics::default()
        };
        AttackMeasurement {
            legitimate: LegitimateMetrics { p99_ms: 3.9, ..control.clone() },
            control,
            sent_bytes: 10 * MIB,
            connections: 10,
            recovered_after: Some(Duration::from_secs(2)),
            residual: NodeUsage { is_known: true, ..NodeUsage::default() },
            ..AttackMeasurement::default()
        }
    }

    fn failures(change: impl FnOnce(&mut AttackMeasurement), allowance: Allowance) -> Vec<String> {
        let mut measured = withstood();
        change(&mut measured);
        measured.evaluate(&allowance, &thresholds()).failures
    }

    #[test]
    fn node_that_withstands_has_no_failures() {
        assert_eq!(failures(|_| (), Allowance::default()), [""; 0]);
    }

    #[test]
    fn every_measured_value_can_fail() {
        type Change = fn(&mut AttackMeasurement);
        let cases: [(Change, &str); 19] = [
            (|m| m.legitimate.p99_ms = 4.1, "legitimate p99 is 2.0 times the control's"),
            (|m| m.legitimate.unanswered = 1, "1 legitimate messages unanswered"),
            (|m| m.legitimate.rejected = 2, "2 legitimate messages rejected"),
            (|m| m.legitimate.lost = 3, "3 legitimate deliveries missing"),
            (|m| m.legitimate.ended = 1, "1 legitimate connections ended"),
            (|m| m.legitimate.newcomers_failed = 1, "1 newcomers did not join"),
            (|m| m.legitimate.newcomers_p99_ms = 251.0, "newcomers took 251 ms, the control's 0"),
            (|m| m.legitimate.probes_failed = 1, "1 probes of /health and /ready failed"),
            (
                |m| m.legitimate.probes_p99_ms = 900.0,
                "/health and /ready took 900 ms, the control's 0",
            ),
            (
                |m| m.peak_growth.gateway_bytes = 45 * MIB,
                "the gateway held 45.0 MiB, more than 44.2",
            ),
            (|m| m.peak_growth.redis_bytes = 23 * MIB, "Redis held 23.0 MiB, more than 22.0"),
            (|m| m.peak_growth.log_bytes = MIB, "the gateway logged 1.0 MiB"),
            (|m| m.died = true, "the gateway or Redis ended"),
            (|m| m.legitimate.sent = 0, "no legitimate client could send"),
            (
                |m| (m.recovered_after, m.residual.subscriptions) = (None, 348_576),
                "not recovered in time: 348576 subscriptions remain, more than 16",
            ),
            (
                |m| (m.recovered_after, m.residual.is_known) = (None, false),
                "not recovered in time: the gateway or Redis does not answer",
            ),
            (
                |m| (m.recovered_after, m.residual.keys) = (None, 17),
                "not recovered in time: 17 keys in Redis remain, more than 16",
            ),
            (
                |m| (m.recovered_after, m.residual.descriptors) = (None, 17),
                "not recovered in time: 17 descriptors remain, more than 16",
            ),
            (
                |m| (m.recovered_after, m.residual.gateway_bytes) = (None, 25 * MIB),
                "not recovered in time: the gateway keeps 25.0 MiB",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(failures(change, Allowance::default()), [expected]);
        }
    }

    #[test]
    fn allowance_includes_streams_users_and_records() {
        let allowance = Allowance {
            streams: 300,
            users: 10,
            records: 100,
            record_bytes: 8192,
            ..Allowance::default()
        };
        let peak_growth = |m: &mut AttackMeasurement| m.peak_growth.gateway_bytes = 340 * MIB;
        assert_eq!(failures(peak_growth, allowance), [""; 0]);
        assert_eq!(failures(peak_growth, Allowance { streams: 1, ..allowance }).len(), 1);
        let residual = |keys| NodeUsage { keys, is_known: true, ..NodeUsage::default() };
        assert!(
            allowance.is_recovered(&residual(16 + 100 + 40))
                && !allowance.is_recovered(&residual(157))
        );
        assert!(!allowance.is_recovered(&NodeUsage::default()), "unknown usage is not recovered");
    }

    #[test]
    fn required_close_code_must_occur() {
        let allowance = Allowance { close: Some("1009"), ..Allowance::default() };
        let none = ["no connection of the attacker was closed with 1009"];
        assert_eq!(failures(|_| (), allowance), none);
        let close_reasons =
            |m: &mut AttackMeasurement| m.close_reasons = [("1009 too big".to_owned(), 3)].into();
        assert_eq!(failures(close_reasons, allowance), [""; 0]);
    }

    #[test]
    fn slack_applies_to_times_and_lateness_invalidates() {
        let mut measured = withstood();
        measured.legitimate.p99_ms = 90.0;
        let lenient = AttackThresholds { slack: Duration::from_millis(100), ..thresholds() };
        assert_eq!(measured.evaluate(&Allowance::default(), &lenient), AttackVerdict::default());
        measured.control.lag_p99_us = 1_500;
        let verdict = measured.evaluate(&Allowance::default(), &lenient);
        assert!(verdict.invalid.is_some_and(|why| why.contains("1500 µs late")));
    }

    #[test]
    fn usage_grows_and_peaks_per_value() {
        let before = NodeUsage { keys: 5, descriptors: 9, ..NodeUsage::default() };
        let now = NodeUsage { keys: 7, descriptors: 3, ..NodeUsage::default() };
        assert_eq!(now.since(before), NodeUsage { keys: 2, ..NodeUsage::default() });
        assert_eq!(now.peak(before), NodeUsage { keys: 7, descriptors: 9, ..NodeUsage::default() });
    }
}
