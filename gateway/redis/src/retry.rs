//! The pauses between attempts to reach Redis.

use std::time::Duration;

use redis::RedisError;

use super::error::is_persistent;

/// The longest pause between two attempts to connect: a cluster works again within a second of
/// Redis' return.
pub(super) const RETRY_PAUSE_MAX: Duration = Duration::from_millis(250);
/// The longest pause while Redis denies a permission or is too old.
const PERSISTENT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// The pause before the next attempt: none at first, then longer, up to [`RETRY_PAUSE_MAX`], or up
/// to [`PERSISTENT_PAUSE_MAX`] after failures that only an operator can end.
#[derive(Default)]
pub(super) struct RetryPause {
    attempts: u32,
    /// How many attempts in a row failed for a persistent reason.
    persistent: u32,
}

impl RetryPause {
    pub(super) fn next(&mut self) -> Duration {
        self.attempts += 1;
        if self.persistent > 0 {
            let pause = Duration::from_millis(100) * 2_u32.pow(self.persistent.min(10));
            return pause.min(PERSISTENT_PAUSE_MAX);
        }
        let pause = Duration::from_millis(25) * (self.attempts - 1);
        pause.min(RETRY_PAUSE_MAX)
    }

    /// Records why the last attempt failed.
    pub(super) fn failed(&mut self, error: &RedisError) {
        self.persistent = if is_persistent(error) { self.persistent + 1 } else { 0 };
    }

    pub(super) async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// Whether a failed attempt is logged: the first, and one in some ten seconds. A lost
    /// connection was logged before.
    pub(super) fn should_log(&self) -> bool {
        // Persistent failures have a log line of their own.
        self.attempts % 40 == 1 && self.persistent == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_start_at_zero_and_have_a_cap() {
        let mut pause = RetryPause::default();
        assert_eq!(pause.next(), Duration::ZERO);
        let pauses: Vec<_> = (0..100).map(|_| pause.next()).collect();
        assert!(pauses.is_sorted() && pauses[99] == RETRY_PAUSE_MAX);
        for _ in 0..20 {
            pause.failed(&redis::make_extension_error("NOPERM".to_owned(), None));
        }
        assert_eq!(pause.next(), PERSISTENT_PAUSE_MAX);
        pause.failed(&redis::make_extension_error("LOADING".to_owned(), None));
        assert_eq!(pause.next(), RETRY_PAUSE_MAX);
    }
}
