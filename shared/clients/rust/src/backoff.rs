//! Reconnect delays: exponential back-off with full jitter.
//!
//! The clients of a lost gateway return spread over the whole delay, not all at its end. Pure: the
//! randomness is an argument. `client::task` uses it.

use std::time::Duration;

/// Default base: the first delay is at most this.
pub const BASE: Duration = Duration::from_millis(500);
/// Default cap: every delay is at most this.
pub const CAP: Duration = Duration::from_secs(30);

/// Counts failed attempts and computes the next delay.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    attempts: u32,
}

impl Backoff {
    /// A back-off whose delays are at most `base`, twice `base` and so on, up to `cap`.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempts: 0 }
    }

    /// The delay before the next attempt. `random` is uniform over 0 to 1.
    pub fn next(&mut self, random: f64) -> Duration {
        let ceiling = self.base.saturating_mul(2_u32.saturating_pow(self.attempts)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        ceiling.mul_f64(random.clamp(0.0, 1.0))
    }

    /// The delay before the next attempt if the server set a minimum, as in `Retry-After`.
    ///
    /// The jitter is added to the minimum, because the server may have sent the same one to many
    /// clients.
    pub fn next_after(&mut self, at_least: Duration, random: f64) -> Duration {
        at_least.saturating_add(self.next(random))
    }

    /// Starts again at `base`, after a connection that was stable.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_the_cap_until_reset() {
        let mut backoff = Backoff::new(BASE, CAP);
        let ceilings: Vec<u128> = (0..8).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(ceilings, [500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        backoff.reset();
        assert_eq!(backoff.next(0.5), Duration::from_millis(250));
    }

    #[test]
    fn the_jitter_is_added_to_the_minimum_of_the_server() {
        let mut backoff = Backoff::new(BASE, CAP);
        assert_eq!(backoff.next_after(Duration::from_secs(7), 0.0), Duration::from_secs(7));
        assert_eq!(backoff.next_after(Duration::from_secs(7), 1.0), Duration::from_secs(8));
    }

    proptest! {
        #[test]
        fn a_delay_stays_within_its_bounds(
            attempts in 0_u32..200,
            random in 0.0_f64..1.0,
            base_ms in 0_u64..10_000,
            cap_ms in 0_u64..100_000,
        ) {
            let (base, cap) = (Duration::from_millis(base_ms), Duration::from_millis(cap_ms));
            let mut backoff = Backoff::new(base, cap);
            for _ in 0..attempts {
                backoff.next(random);
            }
            let delay = backoff.next(random);
            prop_assert!(delay <= cap);
            prop_assert!(delay <= base.saturating_mul(2_u32.saturating_pow(attempts)));
        }
    }
}
