//! What is measured, and how rounds come together: medians, and ratios to the baseline of the same
//! round.
//!
//! Pure.

use std::{collections::BTreeMap, fmt};

use serde::{Serialize, Serializer};

use super::rows::BenchTarget;

/// Something that is measured. The order is that of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Measure {
    /// User and system time of all server processes for a delivery, µs.
    Cpu,
    /// The part of it in user space.
    UserCpu,
    /// The part of it that is Redis'.
    RedisCpu,
    /// A second.
    Deliveries,
    /// Latency from when a message was to be sent, µs.
    P50,
    P99,
    P999,
    /// Proportional set size for a connection, KiB.
    Memory,
    /// User and system time of the server for a connection, µs.
    CpuPerConnection,
    /// A second.
    Connections,
    /// For a second of Redis' CPU time.
    Publishes,
    /// Until members of a node that was killed have gone on elsewhere: 99 of 100, ms.
    Reconnected,
    /// The p99 of the others in the seconds after it: how many times that before.
    OthersP99Ratio,
}

/// What one round showed of one server.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundSample {
    pub(crate) values: BTreeMap<Measure, f64>,
    /// Why it does not count, where it does not.
    pub(crate) flaws: Vec<String>,
}

/// A value over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Measure {
    /// What the table calls it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Cpu => "server CPU per delivery, µs",
            Self::UserCpu => "… of it in user space, µs",
            Self::RedisCpu => "… of it Redis, µs",
            Self::Deliveries => "deliveries/s",
            Self::P50 => "latency p50, µs",
            Self::P99 => "latency p99, µs",
            Self::P999 => "latency p99.9, µs",
            Self::Memory => "memory per connection, KiB",
            Self::CpuPerConnection => "server CPU per connection, µs",
            Self::Connections => "connections/s",
            Self::Publishes => "publishes per second of Redis' CPU",
            Self::Reconnected => "reconnected, p99, ms",
            Self::OthersP99Ratio => "p99 of the other members × before",
        }
    }

    /// A value as it is written: three digits that count.
    pub(crate) fn write(value: f64) -> String {
        let decimals = match value.abs() {
            small if small < 10.0 => 2,
            medium if medium < 100.0 => 1,
            _ => 0,
        };
        let mut digits = format!("{value:.decimals$}");
        if value.abs() >= 10_000.0 {
            let end = digits.len();
            for place in (1..end).rev().filter(|place| (end - place) % 3 == 0) {
                digits.insert(place, ',');
            }
        }
        digits
    }
}

impl Serialize for Measure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let name = match self {
            Self::Cpu => "cpu_per_delivery_us",
            Self::UserCpu => "user_cpu_per_delivery_us",
            Self::RedisCpu => "redis_cpu_per_delivery_us",
            Self::Deliveries => "deliveries_per_second",
            Self::P50 => "latency_p50_us",
            Self::P99 => "latency_p99_us",
            Self::P999 => "latency_p999_us",
            Self::Memory => "memory_per_connection_kib",
            Self::CpuPerConnection => "cpu_per_connection_us",
            Self::Connections => "connections_per_second",
            Self::Publishes => "publishes_per_redis_cpu_second",
            Self::Reconnected => "reconnected_p99_ms",
            Self::OthersP99Ratio => "others_p99_ratio",
        };
        serializer.serialize_str(name)
    }
}

impl Spread {
    /// Of the values of all rounds; `None` where there are none.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }

    /// One measure over the rounds.
    pub(crate) fn of_measure(samples: &[RoundSample], measure: Measure) -> Option<Self> {
        let value = |sample: &RoundSample| sample.values.get(&measure).copied();
        Self::of(samples.iter().filter_map(value).collect())
    }

    /// How many times another's: each round beside the other's same round.
    pub(crate) fn times(
        samples: &[RoundSample],
        others: &[RoundSample],
        measure: Measure,
    ) -> Option<Self> {
        let ratio = |(sample, other): (&RoundSample, &RoundSample)| {
            Some(sample.values.get(&measure)? / other.values.get(&measure)?)
        };
        Self::of(samples.iter().zip(others).filter_map(ratio).collect())
    }
}

impl BenchTarget {
    /// Whether it is met, by the median of the values or of the ratios.
    pub(crate) fn is_met(self, value: Option<Spread>, times: Option<Spread>) -> Option<bool> {
        match self {
            Self::Max(limit) => value.map(|value| value.median <= limit),
            Self::Min(limit) => value.map(|value| value.median >= limit),
            Self::MaxTimesBaseline(limit) => times.map(|times| times.median <= limit),
            Self::MinTimesBaseline(limit) => times.map(|times| times.median >= limit),
        }
    }
}

impl fmt::Display for BenchTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Max(limit) => write!(f, "≤ {}", trimmed(*limit)),
            Self::Min(limit) => write!(f, "≥ {}", trimmed(*limit)),
            Self::MaxTimesBaseline(limit) => write!(f, "≤ {limit}×"),
            Self::MinTimesBaseline(limit) => write!(f, "≥ {limit}×"),
        }
    }
}

/// A limit as it was set down, without digits that say nothing.
fn trimmed(limit: f64) -> String {
    if limit >= 100.0 { Measure::write(limit) } else { limit.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Vec<RoundSample> {
        let sample = |value: &f64| RoundSample {
            values: BTreeMap::from([(Measure::Cpu, *value)]),
            flaws: Vec::new(),
        };
        values.iter().map(sample).collect()
    }

    #[test]
    fn the_median_stands_in_the_middle() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[3.0, 1.0, 9.0]), Some(Spread { median: 3.0, min: 1.0, max: 9.0 }));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]).map(|s| s.median), Some(3.0));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[f64::NAN, f64::INFINITY]), None);
    }

    #[test]
    fn ratio_is_to_the_baseline_of_the_same_round() {
        // The second round was twice as slow for both.
        let times =
            Spread::times(&samples(&[5.0, 10.0, 6.0]), &samples(&[10.0, 20.0, 10.0]), Measure::Cpu);
        assert_eq!(times, Some(Spread { median: 0.5, min: 0.5, max: 0.6 }));
        assert_eq!(Spread::times(&samples(&[1.0]), &[], Measure::Cpu), None);
    }

    #[test]
    fn a_target_looks_at_the_median() {
        let spread = Spread::of(vec![1.0, 2.0, 9.0]);
        assert_eq!(BenchTarget::Max(2.0).is_met(spread, None), Some(true));
        assert_eq!(BenchTarget::Min(2.1).is_met(spread, None), Some(false));
        assert_eq!(BenchTarget::MaxTimesBaseline(1.0).is_met(spread, None), None);
        assert_eq!(BenchTarget::MaxTimesBaseline(1.0).is_met(None, spread), Some(false));
    }

    #[test]
    fn values_have_the_digits_that_count() {
        let written: Vec<String> =
            [0.254, 7.04, 13.24, 431.7, 9999.0, 60_000.0, 1_234_567.0].map(Measure::write).into();
        assert_eq!(written, ["0.25", "7.04", "13.2", "432", "9999", "60,000", "1,234,567"]);
        assert_eq!(BenchTarget::Max(4.0).to_string(), "≤ 4");
        assert_eq!(BenchTarget::Min(60_000.0).to_string(), "≥ 60,000");
        assert_eq!(BenchTarget::MaxTimesBaseline(0.25).to_string(), "≤ 0.25×");
    }
}
