//! Counters of each second of a run.
//!
//! Pure. Latencies are kept as values and their counts, so that seconds and processes can be added
//! without loss.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::time::{Duration, Instant};

/// Upper bound of a recorded latency; longer ones count as this.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// Counters by second since the start.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    /// Completed seconds.
    past: Vec<Second>,
    now: Second,
    now_us: Histogram<u64>,
    open: u64,
}

/// Counters of one second.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Second {
    /// Delivered entries.
    pub deliveries: u64,
    /// Acknowledged messages.
    pub acks: u64,
    /// Temporarily rejected sends.
    pub rejections: u64,
    /// Opened connections.
    pub connects: u64,
    /// Open connections at the end of the second.
    pub open: u64,
    /// Time from when a message was due until a copy arrived, µs: values and their counts.
    pub latency_us: Vec<(u64, u64)>,
}

impl Second {
    /// Adds the same second of another process.
    pub fn add(&mut self, other: &Self) {
        self.deliveries += other.deliveries;
        self.acks += other.acks;
        self.rejections += other.rejections;
        self.connects += other.connects;
        self.open += other.open;
        self.latency_us.extend_from_slice(&other.latency_us);
    }

    /// Its latencies as a histogram.
    pub fn latencies(&self) -> Histogram<u64> {
        histogram([self])
    }
}

/// The latencies of several seconds, in µs, to two digits.
pub fn histogram<'a>(seconds: impl IntoIterator<Item = &'a Second>) -> Histogram<u64> {
    let mut all = empty();
    for (value, count) in seconds.into_iter().flat_map(|second| &second.latency_us) {
        all.saturating_record_n(*value, *count);
    }
    all
}

/// The values of a histogram with their counts, which can be added to those of another.
pub fn pairs(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    let recorded = histogram.iter_recorded();
    recorded.map(|one| (one.value_iterated_to(), one.count_at_value())).collect()
}

fn empty() -> Histogram<u64> {
    Histogram::new_with_max(LATENCY_MAX_US, 2).expect("2 digits are possible")
}

impl Timeline {
    /// A timeline that begins now, with so many open connections.
    pub fn new(open: u64) -> Self {
        let now = Second { open, ..Second::default() };
        Self { began: Instant::now(), past: Vec::new(), now, now_us: empty(), open }
    }

    /// Start of the timeline.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Number of open connections.
    pub fn open(&self) -> u64 {
        self.open
    }

    /// Number of deliveries.
    pub fn deliveries(&self) -> u64 {
        self.past.iter().map(|second| second.deliveries).sum::<u64>() + self.now.deliveries
    }

    /// All seconds, the current one last.
    pub fn seconds(&mut self) -> Vec<Second> {
        self.store_latencies();
        let mut seconds = self.past.clone();
        seconds.push(self.now.clone());
        seconds
    }

    /// The last completed second.
    pub fn last(&self) -> Option<&Second> {
        self.past.last()
    }

    /// Records a delivery and its latency.
    pub fn delivered(&mut self, at: Instant, latency: Option<Duration>) {
        self.advance_to(at).deliveries += 1;
        if let Some(latency) = latency {
            self.now_us.saturating_record(latency.as_micros() as u64);
        }
    }

    /// Records an acknowledged message.
    pub fn acknowledged(&mut self, at: Instant) {
        self.advance_to(at).acks += 1;
    }

    /// Records a temporary rejection.
    pub fn rejected(&mut self, at: Instant) {
        self.advance_to(at).rejections += 1;
    }

    /// Records an opened connection.
    pub fn connected(&mut self, at: Instant) {
        self.open += 1;
        let open = self.open;
        let second = self.advance_to(at);
        (second.connects, second.open) = (second.connects + 1, open);
    }

    /// Records a closed connection.
    pub fn ended(&mut self, at: Instant) {
        self.open = self.open.saturating_sub(1);
        let open = self.open;
        self.advance_to(at).open = open;
    }

    /// The second of `at`. A time before the current second counts into the current one.
    pub fn advance_to(&mut self, at: Instant) -> &mut Second {
        let number = at.saturating_duration_since(self.began).as_secs() as usize;
        while self.past.len() < number {
            self.store_latencies();
            let next = Second { open: self.now.open, ..Second::default() };
            self.past.push(std::mem::replace(&mut self.now, next));
            self.now_us.reset();
        }
        &mut self.now
    }

    fn store_latencies(&mut self) {
        self.now.latency_us = pairs(&self.now_us);
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_processes_add_up() {
        let mut timeline = Timeline::new(2);
        let began = timeline.began();
        let ms = Duration::from_millis;
        timeline.delivered(began + ms(10), Some(ms(1)));
        timeline.connected(began + ms(500));
        timeline.delivered(began + ms(3_100), Some(ms(5)));
        timeline.delivered(began + ms(3_200), Some(ms(5)));
        timeline.ended(began + ms(3_300));
        let seconds = timeline.seconds();
        let counts: Vec<_> =
            seconds.iter().map(|second| (second.deliveries, second.open)).collect();
        assert_eq!(counts, [(1, 3), (0, 3), (0, 3), (2, 2)]);
        let mut sum = seconds[0].clone();
        sum.add(&seconds[3]);
        let latencies = sum.latencies();
        assert_eq!((latencies.len(), sum.open), (3, 5));
        assert!(latencies.value_at_quantile(0.34).abs_diff(5_000) < 50);
        assert_eq!(histogram(&seconds).len(), 3);
    }
}
