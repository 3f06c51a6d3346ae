//! Quotas of durable state: what a user, and an address, may have the cluster keep in a time.
//!
//! Three kinds are metered: bytes written, inboxes opened for users who were never connected, and rooms
//! that come to be. All hold per node, for the user over all its connections and for the address over all
//! its users. `docs/limits.md` lists what they stand before. Callers with an API key are not metered.

use std::{net::IpAddr, time::Duration};

use skein_protocol::ids::UserId;
use tokio::time::Instant;

use super::{Rate, RateLimiters, address_key};

/// How many users of one address may use their whole quotas: an office behind one address.
const USERS_PER_ADDRESS: u32 = 8;
/// What a kept entry takes beside its bytes, roughly: its place in the log, and its id for the dedup window.
pub const ENTRY_BYTES: usize = 256;

/// A client, as far as it is metered.
#[derive(Clone, Debug)]
pub struct Writer {
    user: UserId,
    /// As [`address_key`] makes it; `None`: no address is known.
    address: Option<IpAddr>,
}

impl Writer {
    /// A user, and the address it comes from.
    pub fn new(user: UserId, address: Option<IpAddr>) -> Self {
        Self { user, address: address.map(address_key) }
    }
}

/// The quotas of a user; an address has eight times as much.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuotaOptions {
    /// Bytes in a minute, twice as many at once; 0: no limit.
    pub bytes_per_minute: u32,
    /// Inboxes in an hour, all of them at once; 0: no limit.
    pub new_inboxes_per_hour: u32,
    /// Rooms in a minute, five times as many at once; 0: no limit.
    pub new_rooms_per_minute: u32,
}

/// One kind of quota.
#[derive(Debug)]
struct Quota {
    of_user: Rate,
    of_address: Rate,
    users: RateLimiters<UserId>,
    addresses: RateLimiters<IpAddr>,
}

impl Quota {
    fn new(count: u32, period: Duration, bursts: u32) -> Self {
        let rate = |count: u32| Rate::new(count, period, count.saturating_mul(bursts));
        Self {
            of_user: rate(count),
            of_address: rate(count.saturating_mul(USERS_PER_ADDRESS)),
            users: RateLimiters::default(),
            addresses: RateLimiters::default(),
        }
    }

    fn peek(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        let of_address =
            by.address.map(|address| self.addresses.wait(&address, self.of_address, now));
        let of_user = self.users.wait(&by.user, self.of_user, now);
        match of_user.max(of_address.unwrap_or_default()) {
            Duration::ZERO => Ok(()),
            wait => Err(wait),
        }
    }

    /// Takes `count` where one may be taken. What is above the burst has to be waited for afterwards, so that
    /// no count is too large for good.
    fn take(&self, by: &Writer, count: u32, now: Instant) -> Result<(), Duration> {
        self.peek(by, now)?;
        self.charge(by, count, now);
        Ok(())
    }

    fn charge(&self, by: &Writer, count: u32, now: Instant) {
        self.users.charge(by.user.clone(), count, self.of_user, now);
        if let Some(address) = by.address {
            self.addresses.charge(address, count, self.of_address, now);
        }
    }
}

/// How far users and addresses have used up their quotas.
#[derive(Debug)]
pub struct Quotas {
    bytes: Quota,
    inboxes: Quota,
    rooms: Quota,
}

impl Default for Quotas {
    /// None.
    fn default() -> Self {
        Self::new(QuotaOptions::default())
    }
}

impl Quotas {
    /// Nothing of them is used up yet.
    pub fn new(options: QuotaOptions) -> Self {
        let minute = Duration::from_secs(60);
        Self {
            bytes: Quota::new(options.bytes_per_minute, minute, 2),
            inboxes: Quota::new(options.new_inboxes_per_hour, 60 * minute, 1),
            rooms: Quota::new(options.new_rooms_per_minute, minute, 5),
        }
    }

    /// Takes the bytes of something that is to be kept, or says how long to wait.
    ///
    /// # Errors
    ///
    /// The time to wait. Nothing is used up then.
    pub fn take_bytes(&self, by: &Writer, bytes: usize, now: Instant) -> Result<(), Duration> {
        self.bytes.take(by, u32::try_from(bytes).unwrap_or(u32::MAX), now)
    }

    /// Whether a message may open the inbox of a user who was never connected.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn check_new_inbox(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        self.inboxes.peek(by, now)
    }

    /// A message has opened one. Whether it may was asked before: it is counted in any case.
    pub fn count_new_inbox(&self, by: &Writer, now: Instant) {
        self.inboxes.charge(by, 1, now);
    }

    /// Whether a room may come to be by being joined.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn check_new_room(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        self.rooms.peek(by, now)
    }

    /// A room has come to be.
    pub fn count_new_room(&self, by: &Writer, now: Instant) {
        self.rooms.charge(by, 1, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(user: &str, address: &str) -> Writer {
        Writer::new(user.parse().unwrap(), Some(address.parse().unwrap()))
    }

    #[test]
    fn a_user_has_twice_the_bytes_of_a_minute_at_once_and_waits_then() {
        let options = QuotaOptions { bytes_per_minute: 60_000, ..QuotaOptions::default() };
        let (quotas, start) = (Quotas::new(options), Instant::now());
        let ann = writer("ann", "192.0.2.1");
        // One item larger than what is left is taken, and has to be waited for afterwards.
        for _ in 0..2 {
            assert_eq!(quotas.take_bytes(&ann, 100_000, start), Ok(()));
        }
        let wait = quotas.take_bytes(&ann, 1, start).unwrap_err();
        assert!((79..=81).contains(&wait.as_secs()), "{wait:?}");
        assert!(quotas.take_bytes(&ann, 1, start + wait).is_ok());
        // The user is the same from elsewhere; another user is not.
        assert!(quotas.take_bytes(&writer("ann", "192.0.2.2"), 1, start).is_err());
        assert!(quotas.take_bytes(&writer("bob", "192.0.2.1"), 1, start).is_ok());
    }

    #[test]
    fn an_address_has_eight_times_the_quota_of_a_user() {
        let options = QuotaOptions { new_inboxes_per_hour: 10, ..QuotaOptions::default() };
        let (quotas, now) = (Quotas::new(options), Instant::now());
        let mut opened = 0;
        for user in 0..100 {
            let by = writer(&format!("user-{user}"), "2001:db8::1");
            while quotas.check_new_inbox(&by, now).is_ok() {
                quotas.count_new_inbox(&by, now);
                opened += 1;
            }
        }
        assert_eq!(opened, 80);
        assert!(
            quotas.check_new_inbox(&writer("zoe", "2001:db8::2"), now).is_err(),
            "the same /64"
        );
        assert!(quotas.check_new_inbox(&writer("zoe", "192.0.2.1"), now).is_ok());
    }

    #[test]
    fn quotas_of_zero_are_none() {
        let (quotas, now) = (Quotas::new(QuotaOptions::default()), Instant::now());
        let ann = writer("ann", "192.0.2.1");
        for _ in 0..1000 {
            quotas.take_bytes(&ann, usize::MAX, now).unwrap();
            quotas.count_new_room(&ann, now);
        }
        assert!(quotas.check_new_room(&ann, now).is_ok());
    }
}
