//! Rate limits for log lines about events that clients or a broken Redis can cause again and again.
//!
//! A metric counts these events; log lines add the details of some of them.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::period_count::PeriodCount;

/// Minimum time between two lines of one kind, unless the kind has another rate.
pub const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// One kind of log line, written at most a number of times in a period.
#[derive(Debug)]
pub struct LogLimiter {
    period: Duration,
    lines_max: u32,
    state: Mutex<LimiterState>,
}

#[derive(Debug)]
struct LimiterState {
    lines: PeriodCount,
    /// Lines suppressed since the last one.
    suppressed: u64,
}

impl LogLimiter {
    /// Creates a limiter of one line in [`LOG_INTERVAL`].
    pub const fn new() -> Self {
        Self::with_rate(1, LOG_INTERVAL)
    }

    /// Creates a limiter of `lines_max` lines per second.
    pub const fn per_second(lines_max: u32) -> Self {
        Self::with_rate(lines_max, Duration::from_secs(1))
    }

    const fn with_rate(lines_max: u32, period: Duration) -> Self {
        let state = LimiterState { lines: PeriodCount::new(), suppressed: 0 };
        Self { period, lines_max, state: Mutex::new(state) }
    }

    /// Returns `Some` if a line may be logged now, with the number of lines suppressed since the
    /// last one.
    pub fn should_log(&self) -> Option<u64> {
        let now = Instant::now();
        let state = &mut *self.state.lock();
        if !state.lines.take(self.lines_max, self.period, now) {
            state.suppressed += 1;
            return None;
        }
        Some(std::mem::take(&mut state.suppressed))
    }
}

impl Default for LogLimiter {
    fn default() -> Self {
        Self::new()
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

    #[tokio::test(start_paused = true)]
    async fn lines_per_second_are_bounded() {
        let limiter = LogLimiter::per_second(3);
        let logged = || (0..10).filter_map(|_| limiter.should_log()).collect::<Vec<_>>();
        assert_eq!(logged(), [0, 0, 0]);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(logged(), [7, 0, 0]);
    }
}
