//! The number of events in the present period, for limits on log lines and requested traces.

use std::time::Duration;

use tokio::time::Instant;

/// Events of the present period, which begins with the first event after the last one has ended.
#[derive(Debug)]
pub(super) struct PeriodCount {
    since: Option<Instant>,
    count: u32,
}

impl PeriodCount {
    /// A count without events.
    pub(super) const fn new() -> Self {
        Self { since: None, count: 0 }
    }

    /// Counts an event at the time `now`, unless there were `count_max` within this `period`. Returns
    /// whether it was counted.
    pub(super) fn take(&mut self, count_max: u32, period: Duration, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= period) {
            *self = Self { since: Some(now), count: 0 };
        }
        let is_below = self.count < count_max;
        self.count += u32::from(is_below);
        is_below
    }
}
