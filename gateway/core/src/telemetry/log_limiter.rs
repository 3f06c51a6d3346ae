//! Keeps log lines that can be repeated from outside from filling the log.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long nothing more is logged after a line.
pub const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// One kind of log line, written at most once in [`LOG_INTERVAL`].
#[derive(Debug, Default)]
pub struct LogLimiter(Mutex<LimiterState>);

#[derive(Debug, Default)]
struct LimiterState {
    last: Option<Instant>,
    /// How many were left out since.
    suppressed: u64,
}

impl LogLimiter {
    /// A kind of which no line was written yet.
    pub const fn new() -> Self {
        Self(Mutex::new(LimiterState { last: None, suppressed: 0 }))
    }

    /// Whether a line is to be written now: `Some` with the count of those that were left out since
    /// the last one.
    pub fn should_log(&self) -> Option<u64> {
        let now = Instant::now();
        let lines = &mut *self.0.lock();
        if lines.last.is_some_and(|last| now.saturating_duration_since(last) < LOG_INTERVAL) {
            lines.suppressed += 1;
            return None;
        }
        lines.last = Some(now);
        Some(std::mem::take(&mut lines.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_is_due_once_a_minute_and_counts_the_others() {
        let limiter = LogLimiter::new();
        assert_eq!(limiter.should_log(), Some(0));
        assert_eq!((limiter.should_log(), limiter.should_log()), (None, None));
        tokio::time::advance(LOG_INTERVAL).await;
        assert_eq!(limiter.should_log(), Some(2));
        assert_eq!(limiter.should_log(), None);
        tokio::time::advance(LOG_INTERVAL).await;
        assert_eq!(limiter.should_log(), Some(1));
    }
}
