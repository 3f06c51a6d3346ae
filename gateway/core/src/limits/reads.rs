//! Limits of reads from Redis and from logs for clients: bytes per connection and per user.
//!
//! The size of a read is known afterwards, so it is charged then, and the next read waits until the
//! rate allows it. A client that scrolls back waits for a moment; a longer wait is rejected.

use std::time::Duration;

use arc_swap::ArcSwap;
use skein_protocol::ids::{ConnectionId, UserId};
use tokio::time::Instant;

use super::{Rate, RateLimiters};

/// The unit of charging, in bytes.
const UNIT_BYTES: usize = 1024;
/// The cost of a read besides its bytes.
const READ_BYTES: usize = 4 * UNIT_BYTES;
/// The burst of the rates, in seconds.
const BURST_SECONDS: u32 = 8;
/// The rate of a user, in multiples of a connection's.
const USER_SHARE: u32 = 2;

/// The rates and the accounts of connections and users.
#[derive(Debug)]
pub struct ReadLimiter {
    rates: ArcSwap<ReadRates>,
    connections: RateLimiters<ConnectionId>,
    users: RateLimiters<UserId>,
}

/// The rates of a connection and of a user.
#[derive(Debug)]
struct ReadRates {
    per_connection: Rate,
    per_user: Rate,
}

impl ReadRates {
    fn new(bytes_per_second: usize) -> Self {
        let units = u32::try_from(bytes_per_second.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX / 16);
        let rate = |units: u32| {
            Rate::new(units, Duration::from_secs(1), units.saturating_mul(BURST_SECONDS))
        };
        Self { per_connection: rate(units), per_user: rate(units.saturating_mul(USER_SHARE)) }
    }
}

impl ReadLimiter {
    /// The given bytes per second for a connection, and twice as many for a user; 0: no limit.
    pub fn new(bytes_per_second: usize) -> Self {
        Self {
            rates: ArcSwap::from_pointee(ReadRates::new(bytes_per_second)),
            connections: RateLimiters::default(),
            users: RateLimiters::default(),
        }
    }

    /// Replaces the bytes per second.
    pub fn set_bytes_per_second(&self, bytes_per_second: usize) {
        self.rates.store(ReadRates::new(bytes_per_second).into());
    }

    /// The time to wait until the next read for a connection of a user.
    pub fn wait(&self, connection: ConnectionId, user: &UserId, now: Instant) -> Duration {
        let rates = self.rates.load();
        let of_connection = self.connections.wait(&connection, rates.per_connection, now);
        of_connection.max(self.users.wait(user, rates.per_user, now))
    }

    /// Charges the start of a read.
    pub fn charge_start(&self, connection: ConnectionId, user: &UserId, now: Instant) {
        self.charge(connection, user, READ_BYTES, now);
    }

    /// Charges the bytes of a read.
    pub fn charge(&self, connection: ConnectionId, user: &UserId, bytes: usize, now: Instant) {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        let rates = self.rates.load();
        self.connections.charge(connection, units, rates.per_connection, now);
        self.users.charge(user.clone(), units, rates.per_user, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_and_user_wait_for_bytes_read() {
        let reads = ReadLimiter::new(1 << 20);
        let (user, now) = ("ann".parse().unwrap(), Instant::now());
        let (one, other) = (ConnectionId::random(), ConnectionId::random());
        let mut bytes = 0;
        while reads.wait(one, &user, now).is_zero() {
            reads.charge_start(one, &user, now);
            reads.charge(one, &user, (256 << 10) - READ_BYTES, now);
            bytes += 256 << 10;
        }
        assert_eq!(bytes, 8 << 20, "eight seconds' worth");
        reads.charge(one, &user, 256 << 10, now);
        let wait = reads.wait(one, &user, now);
        assert!(
            wait > Duration::from_millis(200) && wait <= Duration::from_millis(251),
            "{wait:?}"
        );
        // Another connection of the user has its own rate, up to that of the user.
        assert!(reads.wait(other, &user, now).is_zero());
        reads.charge(other, &user, 8 << 20, now);
        assert!(reads.wait(ConnectionId::random(), &user, now) > Duration::ZERO);
        assert!(reads.wait(ConnectionId::random(), &"bob".parse().unwrap(), now).is_zero());
        assert!(reads.wait(one, &user, now + wait + Duration::from_secs(1)).is_zero());
    }

    #[test]
    fn empty_read_has_a_cost_and_zero_is_no_limit() {
        let (user, now) = ("ann".parse().unwrap(), Instant::now());
        let reads = ReadLimiter::new(4 * UNIT_BYTES);
        let connection = ConnectionId::random();
        let count = (0..100).take_while(|_| {
            reads.charge_start(connection, &user, now);
            reads.wait(connection, &user, now).is_zero()
        });
        assert_eq!(count.count(), 7);
        let reads = ReadLimiter::new(0);
        reads.charge(connection, &user, usize::MAX / 2, now);
        assert!(reads.wait(connection, &user, now).is_zero());
    }
}
