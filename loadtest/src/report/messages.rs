//! Outcome of messages.
//!
//! Pure.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use skein_testkit::checker::report::{DeliveryReport, Violation};

use crate::args::Thresholds;

/// Percentiles of the latency curve, in percent; closer to each other towards 100.
const CURVE: [f64; 16] = [
    0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 97.5, 99.0, 99.5, 99.75, 99.9, 99.95, 99.99, 99.999,
    100.0,
];

/// Summary of messages.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct MessageReport {
    /// Number of receivers.
    pub(crate) members: usize,
    pub(crate) acknowledged: u64,
    pub(crate) delivered: u64,
    pub(crate) lost: u64,
    pub(crate) duplicated: u64,
    pub(crate) out_of_order: u64,
    pub(crate) gaps: u64,
    pub(crate) unsignalled_discontinuities: u64,
    pub(crate) disagreements: u64,
    /// Other violations of the protocol.
    pub(crate) other_violations: u64,
    /// Messages that were neither acknowledged nor rejected.
    pub(crate) unanswered: u64,
    /// Rooms that were incomplete at the end of the run, and why.
    pub(crate) unfinished: Vec<String>,
    /// The first violations, in words.
    pub(crate) examples: Vec<String>,
    /// Discontinuities that were signalled to members.
    pub(crate) signalled_discontinuities: u64,
    /// Acknowledged messages that a discontinuity skipped, once for each member.
    pub(crate) skipped: u64,
    /// Sends that were rejected.
    pub(crate) sends_rejected: u64,
    /// Share of deliveries later than `late_after_ms`, in percent.
    pub(crate) late_percent: f64,
    pub(crate) late_after_ms: u64,
    /// Longest time that a member was without a delivery.
    pub(crate) longest_silence_ms: u64,
    /// Duration of the traffic.
    pub(crate) traffic_s: f64,
    /// Time from when a message was due until a copy arrived.
    pub(crate) latency: Latency,
}

/// Latencies in µs.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Latency {
    pub(crate) p50_us: u64,
    pub(crate) p90_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) p999_us: u64,
    pub(crate) max_us: u64,
    /// Percentiles in percent, with their latencies.
    pub(crate) curve: Vec<(f64, u64)>,
}

impl Latency {
    /// Summarizes times in µs.
    pub(crate) fn of(times_us: &Histogram<u64>) -> Self {
        let at = |percent| times_us.value_at_percentile(percent);
        Self {
            p50_us: at(50.0),
            p90_us: at(90.0),
            p99_us: at(99.0),
            p999_us: at(99.9),
            max_us: times_us.max(),
            curve: CURVE.iter().map(|percent| (*percent, at(*percent))).collect(),
        }
    }
}

/// The share of `times_us` above `after`, in percent.
pub(crate) fn late_percent(times_us: &Histogram<u64>, after: Duration) -> f64 {
    if times_us.is_empty() {
        return 0.0;
    }
    let late = times_us.count_between(after.as_micros() as u64, u64::MAX);
    late as f64 / times_us.len() as f64 * 100.0
}

impl MessageReport {
    /// The counts of a delivery checker.
    pub(crate) fn of(delivery: DeliveryReport, unfinished: Vec<String>) -> Self {
        let wrong = |wrong| delivery.count(wrong) as u64;
        Self {
            members: delivery.clients,
            acknowledged: delivery.acknowledged as u64,
            delivered: delivery.delivered as u64,
            lost: wrong(Violation::Lost),
            duplicated: wrong(Violation::Duplicated),
            out_of_order: wrong(Violation::OutOfOrder),
            gaps: wrong(Violation::Gap),
            unsignalled_discontinuities: wrong(Violation::UnsignalledDiscontinuity),
            disagreements: wrong(Violation::Disagreement),
            other_violations: wrong(Violation::Protocol),
            signalled_discontinuities: (delivery.resets + delivery.not_recovered) as u64,
            skipped: delivery.skipped as u64,
            sends_rejected: delivery.rejected_sends as u64,
            longest_silence_ms: delivery.longest_silence().as_millis() as u64,
            examples: delivery.examples,
            unfinished,
            ..Self::default()
        }
    }

    /// Adds the latency of deliveries.
    pub(crate) fn with_latency(
        self,
        times_us: &Histogram<u64>,
        traffic_duration: Duration,
        thresholds: &Thresholds,
    ) -> Self {
        Self {
            latency: Latency::of(times_us),
            late_percent: late_percent(times_us, thresholds.late_after),
            late_after_ms: thresholds.late_after.as_millis() as u64,
            traffic_s: traffic_duration.as_secs_f64(),
            ..self
        }
    }

    /// Violations by name, with their counts.
    fn wrong(&self) -> [(&'static str, u64); 8] {
        [
            ("lost", self.lost),
            ("duplicated", self.duplicated),
            ("out of order", self.out_of_order),
            ("gaps", self.gaps),
            ("unsignalled discontinuities", self.unsignalled_discontinuities),
            ("disagreements", self.disagreements),
            ("other violations", self.other_violations),
            ("unanswered", self.unanswered),
        ]
    }

    /// Failed expectations.
    pub(super) fn failures(&self, thresholds: &Thresholds) -> Vec<String> {
        let mut failures = self.unfinished.clone();
        let wrong = self.wrong().into_iter().filter(|(_, count)| *count > 0);
        failures.extend(wrong.map(|(name, count)| format!("{count} {name}")));
        if self.acknowledged == 0 {
            failures.push("no message was acknowledged".to_owned());
        }
        if let Some(max) = thresholds.late_max_percent
            && self.late_percent > max
        {
            let Self { late_percent, late_after_ms, .. } = self;
            failures.push(format!(
                "{late_percent:.2} % of deliveries took longer than {late_after_ms} ms, at most {max} % may"
            ));
        }
        if let Some(max) = thresholds.p99_max
            && u128::from(self.latency.p99_us) > max.as_micros()
        {
            let p99 = milliseconds(self.latency.p99_us);
            failures.push(format!("p99 is {p99}, more than {}", humantime::format_duration(max)));
        }
        failures
    }

    pub(super) fn lines(&self) -> Vec<(String, String)> {
        let mut lines = vec![("members".to_owned(), self.members.to_string())];
        let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
        let rate = |count: u64| {
            let each = if self.traffic_s > 0.0 { count as f64 / self.traffic_s } else { 0.0 };
            format!("{count} ({each:.0}/s)")
        };
        line("acknowledged", rate(self.acknowledged));
        line("delivered", rate(self.delivered));
        for (name, count) in self.wrong() {
            line(name, count.to_string());
        }
        line("unfinished rooms", self.unfinished.len().to_string());
        let Self { signalled_discontinuities, skipped, .. } = self;
        line(
            "signalled discontinuities",
            format!("{signalled_discontinuities} ({skipped} deliveries skipped)"),
        );
        line("sends rejected", self.sends_rejected.to_string());
        let Latency { p50_us, p90_us, p99_us, p999_us, max_us, .. } = self.latency;
        let [p50, p90, p99, p999, max] =
            [p50_us, p90_us, p99_us, p999_us, max_us].map(milliseconds);
        line("latency", format!("p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p999}, max {max}"));
        let late = format!("{:.3} % above {} ms", self.late_percent, self.late_after_ms);
        line("late", late);
        line("longest silence", format!("{:.1} s", self.longest_silence_ms as f64 / 1e3));
        lines
    }
}

/// Formats microseconds as milliseconds.
pub(crate) fn milliseconds(us: u64) -> String {
    let ms = us as f64 / 1e3;
    if ms < 10.0 { format!("{ms:.2} ms") } else { format!("{ms:.0} ms") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thresholds() -> Thresholds {
        Thresholds {
            late_after: Duration::from_millis(100),
            late_max_percent: Some(1.0),
            p99_max: Some(Duration::from_millis(150)),
        }
    }

    fn times(slow: u64) -> Histogram<u64> {
        let mut times = Histogram::new(3).unwrap();
        times.record_n(2_000, 1_000 - slow).unwrap();
        times.record_n(200_000, slow).unwrap();
        times
    }

    fn of(slow: u64) -> MessageReport {
        let delivery = DeliveryReport { acknowledged: 1, ..DeliveryReport::default() };
        let (times, second) = (times(slow), Duration::from_secs(1));
        MessageReport::of(delivery, Vec::new()).with_latency(&times, second, &thresholds())
    }

    #[test]
    fn late_deliveries_fail() {
        assert_eq!(of(9).failures(&thresholds()), [""; 0]);
        let failures = of(20).failures(&thresholds());
        assert_eq!(failures.len(), 2, "{failures:?}");
        assert!(failures[0].starts_with("2.00 % of deliveries took longer than 100 ms"));
        assert!(failures[1].starts_with("p99 is 200 ms, more than 150ms"), "{failures:?}");
    }

    #[test]
    fn each_violation_fails() {
        let all = [
            Violation::Lost,
            Violation::Duplicated,
            Violation::OutOfOrder,
            Violation::Gap,
            Violation::UnsignalledDiscontinuity,
            Violation::Disagreement,
            Violation::Protocol,
        ];
        for wrong in all {
            let delivery = DeliveryReport {
                acknowledged: 1,
                violations: [(wrong, 3)].into(),
                ..DeliveryReport::default()
            };
            let failures = MessageReport::of(delivery, Vec::new()).failures(&thresholds());
            assert_eq!(failures.len(), 1, "{wrong:?}: {failures:?}");
            assert!(failures[0].starts_with("3 "), "{failures:?}");
        }
        let nothing = MessageReport::of(DeliveryReport::default(), vec!["room 1".to_owned()]);
        assert_eq!(nothing.failures(&thresholds()), ["room 1", "no message was acknowledged"]);
    }
}
