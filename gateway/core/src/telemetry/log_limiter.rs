//! Rate limit for log lines that peers can trigger.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Time without a further line after each line.
pub const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// One kind of log line, written at most once in [`LOG_INTERVAL`].
#[derive(Debug, Default)]
pub struct LogLimiter(Mutex<LimiterState>);

#[derive(Debug, Default)]
struct LimiterState {
    last: Option<Instant>,
    /// Lines suppressed since the last one.
    suppressed: u64,
}

impl LogLimiter {
    /// Creates a limiter that has not logged yet.
    pub const fn new() -> Self {
        Self(Mutex::new(LimiterState { last: None, suppressed: 0 }))
    }

    /// Returns `Some` if a line may be logged now, with the number of lines suppressed since the
    /// last one.
    pub fn should_log(&self) -> Option<u64> {
        let now = Instant::now();
        let state = &mut *self.0.lock();
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < LOG_INTERVAL) {
            state.suppressed += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_per_minute_is_logged_with_the_suppressed_count() {
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
