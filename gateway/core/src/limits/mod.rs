//! Limits: rates ([`Rate`], [`RateLimiter`], [`RateLimiters`]), concurrent uses ([`KeyedPermits`]),
//! and the input of one connection ([`meter`]).
//!
//! Pure except for the locks around the maps: `now` is an argument. All limits apply per node.

pub mod reads;

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

pub mod quotas;
pub mod meter;

/// A number of events per period, with a burst. Zero per period disables the limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// The time that one event takes; zero if there is no limit.
    interval: Duration,
    /// The time by which events may be ahead of the rate.
    burst: Duration,
}

impl Rate {
    /// `count` events per `period`, `burst` of them at once.
    pub fn new(count: u32, period: Duration, burst: u32) -> Self {
        if count == 0 {
            return Self { interval: Duration::ZERO, burst: Duration::ZERO };
        }
        let interval = period / count;
        Self { interval, burst: interval * burst.saturating_sub(1) }
    }
}

/// The state of one source of events: the generic cell rate algorithm (ITU-T I.371) in its
/// virtual-scheduling form, one instant of state.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateLimiter(Option<Instant>);

impl RateLimiter {
    /// Takes one event, or returns the time to wait until one may be taken.
    ///
    /// # Errors
    ///
    /// The time to wait. Nothing is charged then.
    pub fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        self.take_many(1, rate, now)
    }

    /// Takes `count` events at once, or returns the time to wait until they may be taken. A source
    /// at rest may take more than the burst, and must then rest for as long as all of them last.
    ///
    /// # Errors
    ///
    /// The time to wait. Nothing is charged then.
    pub fn take_many(&mut self, count: u32, rate: Rate, now: Instant) -> Result<(), Duration> {
        if rate.interval.is_zero() || count == 0 {
            return Ok(());
        }
        let further = rate.interval.saturating_mul(count - 1).min(rate.burst);
        let wait = (self.ahead_of_rate(now) + further).saturating_sub(rate.burst);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(count, rate, now);
        Ok(())
    }

    /// The time to wait until one event may be taken.
    pub fn wait(&self, rate: Rate, now: Instant) -> Duration {
        self.ahead_of_rate(now).saturating_sub(rate.burst)
    }

    /// Charges `count` events that have happened, even beyond the limit.
    pub fn charge(&mut self, count: u32, rate: Rate, now: Instant) {
        if !rate.interval.is_zero() {
            let due = self.0.map_or(now, |due| due.max(now));
            self.0 = Some(due + rate.interval.saturating_mul(count));
        }
    }

    /// Refunds `count` events.
    pub fn refund(&mut self, count: u32, rate: Rate) {
        self.0 = self.0.and_then(|due| due.checked_sub(rate.interval.saturating_mul(count)));
    }

    /// The time by which the source is ahead of the rate.
    fn ahead_of_rate(&self, now: Instant) -> Duration {
        self.0.map_or(Duration::ZERO, |due| due.saturating_duration_since(now))
    }

    /// Whether the source has rested for so long that its state equals that of a new one.
    fn is_idle(&self, now: Instant) -> bool {
        self.0.is_none_or(|due| due <= now)
    }
}

/// A [`RateLimiter`] per key. Idle keys are dropped, so that the map has the size of the active
/// keys.
#[derive(Debug)]
pub struct RateLimiters<K> {
    limiters: Mutex<(HashMap<K, RateLimiter>, usize)>,
}

/// A map of limiters is swept when it has doubled since the last sweep, and not below this size.
const SWEEP_FROM: usize = 1024;

impl<K: Hash + Eq> Default for RateLimiters<K> {
    fn default() -> Self {
        Self { limiters: Mutex::new((HashMap::new(), SWEEP_FROM)) }
    }
}

impl<K: Hash + Eq> RateLimiters<K> {
    /// As [`RateLimiter::take`], for `key`.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn take(&self, key: K, rate: Rate, now: Instant) -> Result<(), Duration> {
        self.take_many(key, 1, rate, now)
    }

    /// As [`RateLimiter::take_many`], for `key`.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn take_many(&self, key: K, count: u32, rate: Rate, now: Instant) -> Result<(), Duration> {
        if rate.interval.is_zero() {
            return Ok(());
        }
        self.with(key, now, |limiter| limiter.take_many(count, rate, now))
    }

    /// As [`RateLimiter::charge`], for `key`.
    pub fn charge(&self, key: K, count: u32, rate: Rate, now: Instant) {
        if !rate.interval.is_zero() {
            self.with(key, now, |limiter| limiter.charge(count, rate, now));
        }
    }

    /// As [`RateLimiter::wait`], for `key`.
    pub fn wait(&self, key: &K, rate: Rate, now: Instant) -> Duration {
        if rate.interval.is_zero() {
            return Duration::ZERO;
        }
        self.limiters.lock().0.get(key).map_or(Duration::ZERO, |limiter| limiter.wait(rate, now))
    }

    /// As [`RateLimiter::refund`], for `key`.
    pub fn refund(&self, key: &K, count: u32, rate: Rate) {
        if let Some(limiter) = self.limiters.lock().0.get_mut(key) {
            limiter.refund(count, rate);
        }
    }

    fn with<T>(&self, key: K, now: Instant, change: impl FnOnce(&mut RateLimiter) -> T) -> T {
        let (limiters, sweep_at) = &mut *self.limiters.lock();
        if limiters.len() >= *sweep_at {
            limiters.retain(|_, limiter| !limiter.is_idle(now));
            limiters.shrink_to(limiters.len() * 2);
            *sweep_at = (limiters.len() * 2).max(SWEEP_FROM);
        }
        change(limiters.entry(key).or_default())
    }
}

/// The number of concurrent uses per key. Dropping a [`Permit`] releases its use, so that the count
/// cannot drift.
#[derive(Debug)]
pub struct KeyedPermits<K: Hash + Eq>(Arc<Mutex<HashMap<K, usize>>>);

/// One concurrent use of a key.
#[derive(Debug)]
pub struct Permit<K: Hash + Eq> {
    counts: Arc<Mutex<HashMap<K, usize>>>,
    key: Option<K>,
}

impl<K: Hash + Eq> Default for KeyedPermits<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Hash + Eq + Clone> KeyedPermits<K> {
    /// Acquires a permit for `key`, unless `max` permits are in use. A `max` of 0 is no limit.
    pub fn acquire(&self, key: K, max: usize) -> Option<Permit<K>> {
        let mut counts = self.0.lock();
        let count = counts.entry(key.clone()).or_insert(0);
        if max != 0 && *count >= max {
            return None;
        }
        *count += 1;
        Some(Permit { counts: self.0.clone(), key: Some(key) })
    }

    /// The number of keys with a permit in use.
    pub fn keys(&self) -> usize {
        self.0.lock().len()
    }

    /// The number of permits of `key` in use.
    pub fn count(&self, key: &K) -> usize {
        self.0.lock().get(key).copied().unwrap_or_default()
    }
}

impl<K: Hash + Eq> Drop for Permit<K> {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&key) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&key);
            }
        }
    }
}

/// The unit by which addresses are limited: an IPv4 address, or the /64 that an IPv6 host commonly
/// owns (RFC 6177, section 2).
pub fn address_key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn burst_passes_at_once_and_then_the_rate_applies() {
        let rate = Rate::new(2, secs(1), 3);
        let start = Instant::now();
        let mut limiter = RateLimiter::default();
        for _ in 0..3 {
            assert_eq!(limiter.take(rate, start), Ok(()));
        }
        assert_eq!(limiter.take(rate, start), Err(Duration::from_millis(500)));
        assert_eq!(limiter.take(rate, start + Duration::from_millis(500)), Ok(()));
        assert!(limiter.take(rate, start + Duration::from_millis(500)).is_err());
        for _ in 0..3 {
            assert_eq!(limiter.take(rate, start + secs(60)), Ok(()));
        }
    }

    #[test]
    fn many_events_cost_as_much_as_single_ones() {
        let rate = Rate::new(2, secs(1), 10);
        let start = Instant::now();
        let mut limiter = RateLimiter::default();
        assert_eq!(limiter.take_many(6, rate, start), Ok(()));
        assert_eq!(
            limiter.take_many(6, rate, start),
            Err(secs(1)),
            "four are left, at two per second"
        );
        assert_eq!(limiter.take_many(4, rate, start), Ok(()));
        assert_eq!(limiter.take(rate, start), Err(Duration::from_millis(500)));
        assert_eq!(limiter.take_many(0, rate, start), Ok(()));
        limiter.refund(1, rate);
        assert_eq!(limiter.take(rate, start), Ok(()));

        // More than the burst, by a source at rest; it must then rest for as long as they last.
        let rested = start + secs(60);
        assert_eq!(limiter.take_many(20, rate, rested), Ok(()));
        assert_eq!(limiter.wait(rate, rested), Duration::from_millis(5500));
        limiter.charge(2, rate, rested);
        assert_eq!(limiter.take(rate, rested), Err(Duration::from_millis(6500)));
    }

    #[test]
    fn rate_of_zero_is_no_limit() {
        let mut limiter = RateLimiter::default();
        for _ in 0..10_000 {
            assert_eq!(limiter.take(Rate::new(0, secs(1), 0), Instant::now()), Ok(()));
        }
    }

    #[test]
    fn idle_keys_are_dropped() {
        let limiters = RateLimiters::default();
        let rate = Rate::new(1, secs(1), 1);
        let start = Instant::now();
        for key in 0..10 * SWEEP_FROM {
            let now = start + secs(key as u64);
            limiters.take(key, rate, now).unwrap();
        }
        assert!(limiters.limiters.lock().0.len() <= SWEEP_FROM);
    }

    #[test]
    fn permits_are_released_on_drop() {
        let counts = KeyedPermits::default();
        let first = counts.acquire("a", 2).unwrap();
        let second = counts.acquire("a", 2).unwrap();
        assert!(counts.acquire("a", 2).is_none());
        drop(first);
        assert!(counts.acquire("a", 2).is_some());
        drop(second);
        assert!(counts.0.lock().is_empty());
    }

    #[test]
    fn address_key_is_the_ipv6_network_or_the_ipv4_address() {
        let key = |text: &str| address_key(text.parse().unwrap()).to_string();
        assert_eq!(key("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(key("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(key("192.0.2.1"), "192.0.2.1");
    }
}
