//! How much may be read of Redis and of logs for clients: bytes per connection and per user.
//!
//! What a read brings is known afterwards, so it is charged then, and the next one waits until the rate
//! allows for it. A client that scrolls back waits for a moment; work beyond that is refused.

use std::time::Duration;

use skein_protocol::ids::{ConnectionId, UserId};
use tokio::time::Instant;

use super::{Rate, RateLimiters};

/// What is charged for, in bytes.
const UNIT_BYTES: usize = 1024;
/// What a read costs beside its bytes.
const READ_BYTES: usize = 4 * UNIT_BYTES;
/// How many seconds' worth may be read at once.
const BURST_SECONDS: u32 = 8;
/// How many times as much as a connection a user may have read.
const USER_SHARE: u32 = 2;

/// The rates, and how far connections and users have used them up.
#[derive(Debug)]
pub struct ReadLimiter {
    per_connection: Rate,
    per_user: Rate,
    connections: RateLimiters<ConnectionId>,
    users: RateLimiters<UserId>,
}

impl ReadLimiter {
    /// So many bytes a second for a connection, and twice as many for a user; 0 for no limit.
    pub fn new(bytes_per_second: usize) -> Self {
        let units = u32::try_from(bytes_per_second.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX / 16);
        let rate = |units: u32| {
            Rate::new(units, Duration::from_secs(1), units.saturating_mul(BURST_SECONDS))
        };
        Self {
            per_connection: rate(units),
            per_user: rate(units.saturating_mul(USER_SHARE)),
            connections: RateLimiters::default(),
            users: RateLimiters::default(),
        }
    }

    /// How long to wait until something may be read for a connection of a user.
    pub fn wait(&self, connection: ConnectionId, user: &UserId, now: Instant) -> Duration {
        let of_connection = self.connections.wait(&connection, self.per_connection, now);
        of_connection.max(self.users.wait(user, self.per_user, now))
    }

    /// Charges a read that begins.
    pub fn charge_start(&self, connection: ConnectionId, user: &UserId, now: Instant) {
        self.charge(connection, user, READ_BYTES, now);
    }

    /// Charges so many bytes that a read has brought.
    pub fn charge(&self, connection: ConnectionId, user: &UserId, bytes: usize, now: Instant) {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        self.connections.charge(connection, units, self.per_connection, now);
        self.users.charge(user.clone(), units, self.per_user, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_and_its_user_wait_for_what_was_read() {
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
    fn a_read_of_nothing_costs_something_and_no_rate_is_no_limit() {
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
