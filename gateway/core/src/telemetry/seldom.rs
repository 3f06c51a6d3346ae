//! Keeps log lines that can be repeated from outside from filling the log.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long nothing more is logged after a line.
pub const LINE_EVERY: Duration = Duration::from_secs(60);

/// One kind of log line, written at most once in [`LINE_EVERY`].
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    last: Option<Instant>,
    /// How many were left out since.
    unsaid: u64,
}

impl Seldom {
    /// A kind of which no line was written yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Lines { last: None, unsaid: 0 }))
    }

    /// Whether a line is to be written now: `Some` with the count of those that were left out since
    /// the last one.
    pub fn is_due(&self) -> Option<u64> {
        let now = Instant::now();
        let lines = &mut *self.0.lock();
        if lines.last.is_some_and(|last| now.saturating_duration_since(last) < LINE_EVERY) {
            lines.unsaid += 1;
            return None;
        }
        lines.last = Some(now);
        Some(std::mem::take(&mut lines.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_is_due_once_a_minute_and_counts_the_others() {
        let seldom = Seldom::new();
        assert_eq!(seldom.is_due(), Some(0));
        assert_eq!((seldom.is_due(), seldom.is_due()), (None, None));
        tokio::time::advance(LINE_EVERY).await;
        assert_eq!(seldom.is_due(), Some(2));
        assert_eq!(seldom.is_due(), None);
        tokio::time::advance(LINE_EVERY).await;
        assert_eq!(seldom.is_due(), Some(1));
    }
}
