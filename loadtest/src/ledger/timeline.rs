//! What happened in each second of a trial.

use hdrhistogram::Histogram;
use tokio::time::{Duration, Instant};

/// The longest latency that is told apart; longer ones count as this.
const LATENCY_MAX_US: u64 = 3_600_000_000;

/// Counts by second, from the first on.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    seconds: Vec<Second>,
}

/// What happened in one second.
#[derive(Clone, Debug)]
pub struct Second {
    /// Entries that arrived.
    pub deliveries: u64,
    /// Messages that were acknowledged.
    pub acks: u64,
    /// Sends that were refused for the time being.
    pub refusals: u64,
    /// Connections that were opened.
    pub connects: u64,
    /// From when a message was due until a copy of it arrived, in µs.
    pub latency_us: Histogram<u64>,
}

impl Second {
    fn empty() -> Self {
        let latency_us = Histogram::new_with_max(LATENCY_MAX_US, 2).expect("2 digits are possible");
        Self { deliveries: 0, acks: 0, refusals: 0, connects: 0, latency_us }
    }

    /// Adds what happened elsewhere, or in another second.
    pub fn add(&mut self, other: &Self) {
        self.deliveries += other.deliveries;
        self.acks += other.acks;
        self.refusals += other.refusals;
        self.connects += other.connects;
        self.latency_us.add(&other.latency_us).expect("of the same make");
    }
}

impl Timeline {
    /// A timeline that begins now.
    pub fn new() -> Self {
        Self { began: Instant::now(), seconds: Vec::new() }
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// All seconds until the last in which something happened.
    pub fn seconds(&self) -> &[Second] {
        &self.seconds
    }

    /// Everything together.
    pub fn total(&self) -> Second {
        let mut total = Second::empty();
        self.seconds.iter().for_each(|second| total.add(second));
        total
    }

    /// The second of a moment.
    pub fn at(&mut self, now: Instant) -> &mut Second {
        let number = now.saturating_duration_since(self.began).as_secs() as usize;
        if number >= self.seconds.len() {
            self.seconds.resize_with(number + 1, Second::empty);
        }
        &mut self.seconds[number]
    }

    /// A copy arrived, so long after its message was due.
    pub fn delivered(&mut self, now: Instant, latency: Option<Duration>) {
        let second = self.at(now);
        second.deliveries += 1;
        if let Some(latency) = latency {
            second.latency_us.saturating_record(latency.as_micros() as u64);
        }
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self::new()
    }
}
