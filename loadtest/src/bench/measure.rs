//! Measures, and their summary over rounds: medians, and ratios to the baseline of the same round.
//!
//! Pure.

use std::{collections::BTreeMap, fmt};

use serde::{Serialize, Serializer};

/// A measured value. The order is that of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Measure {
    /// User and system time of all server processes per delivery, µs.
    Cpu,
    /// The part of [`Measure::Cpu`] in user space.
    UserCpu,
    /// The part of [`Measure::Cpu`] of Redis.
    RedisCpu,
    /// Per second.
    Deliveries,
    /// Latency from when a message was due, µs.
    P50,
    P99,
    P999,
    /// Proportional set size per connection, KiB.
    Memory,
    /// User and system time of the server per connection, µs.
    CpuPerConnection,
    /// Per second.
    Connections,
    /// Per second of Redis' CPU time.
    Publishes,
    /// Time until members of a killed node have reconnected, p99, ms.
    Reconnected,
    /// p99 of the other members in the seconds after the kill, divided by their p99 before it.
    OthersP99Ratio,
}

/// Values of one candidate in one round.
#[derive(Clone, Debug, Default)]
pub(crate) struct RoundSample {
    pub(crate) values: BTreeMap<Measure, f64>,
    /// Why the sample is invalid; empty if it is valid.
    pub(crate) flaws: Vec<String>,
}

/// A value over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// Target of a measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum BenchTarget {
    Max(f64),
    Min(f64),
    /// Ratio to the baseline of the same round.
    MaxTimesBaseline(f64),
    MinTimesBaseline(f64),
}

impl Measure {
    /// Title in the table.
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

    /// Formats a value with three significant digits.
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
    /// Summarizes the values of all rounds; `None` if there are none.
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

    /// Summarizes one measure over the rounds.
    pub(crate) fn of_measure(samples: &[RoundSample], measure: Measure) -> Option<Self> {
        let value = |sample: &RoundSample| sample.values.get(&measure).copied();
        Self::of(samples.iter().filter_map(value).collect())
    }

    /// Summarizes the ratios to another candidate, round by round.
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
    /// Whether the target is met by the median of the values or of the ratios.
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

/// Formats a limit without insignificant digits.
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
    fn median_is_the_middle_value() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[3.0, 1.0, 9.0]), Some(Spread { median: 3.0, min: 1.0, max: 9.0 }));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]).map(|s| s.median), Some(3.0));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[f64::NAN, f64::INFINITY]), None);
    }

    #[test]
    fn ratio_is_to_the_baseline_of_the_same_round() {
        // Both were twice as slow in the second round.
        let times =
            Spread::times(&samples(&[5.0, 10.0, 6.0]), &samples(&[10.0, 20.0, 10.0]), Measure::Cpu);
        assert_eq!(times, Some(Spread { median: 0.5, min: 0.5, max: 0.6 }));
        assert_eq!(Spread::times(&samples(&[1.0]), &[], Measure::Cpu), None);
    }

    #[test]
    fn target_applies_to_the_median() {
        let spread = Spread::of(vec![1.0, 2.0, 9.0]);
        assert_eq!(BenchTarget::Max(2.0).is_met(spread, None), Some(true));
        assert_eq!(BenchTarget::Min(2.1).is_met(spread, None), Some(false));
        assert_eq!(BenchTarget::MaxTimesBaseline(1.0).is_met(spread, None), None);
        assert_eq!(BenchTarget::MaxTimesBaseline(1.0).is_met(None, spread), Some(false));
    }

    #[test]
    fn values_have_significant_digits() {
        let written: Vec<String> =
            [0.254, 7.04, 13.24, 431.7, 9999.0, 60_000.0, 1_234_567.0].map(Measure::write).into();
        assert_eq!(written, ["0.25", "7.04", "13.2", "432", "9999", "60,000", "1,234,567"]);
        assert_eq!(BenchTarget::Max(4.0).to_string(), "≤ 4");
        assert_eq!(BenchTarget::Min(60_000.0).to_string(), "≥ 60,000");
        assert_eq!(BenchTarget::MaxTimesBaseline(0.25).to_string(), "≤ 0.25×");
    }
}
