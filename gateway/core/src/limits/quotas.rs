//! Quotas of stored state: the amounts that a user and an address may have the cluster store in a
//! time.
//!
//! Three kinds are counted: bytes written, inboxes opened for users who were never connected, and
//! rooms created by joining. All apply per node, to a user over all connections and to an address
//! over all users. `docs/limits.md` lists the threats behind them. Callers with an API key have no
//! quotas.

use std::{net::IpAddr, time::Duration};

use arc_swap::ArcSwap;
use skein_protocol::ids::UserId;
use tokio::time::Instant;

use super::{Rate, RateLimiters, address_key};

/// The number of users of one address that may use their whole quotas: an office behind one
/// address.
const USERS_PER_ADDRESS: u32 = 8;
/// The approximate memory of a stored entry besides its bytes: its place in the log, and its id for
/// the dedup window.
pub const ENTRY_BYTES: usize = 256;

/// A client whose quotas are charged.
#[derive(Clone, Debug)]
pub struct Writer {
    user: UserId,
    /// As [`address_key`] returns it; `None` if unknown.
    address: Option<IpAddr>,
}

impl Writer {
    /// A user and the address of its connection.
    pub fn new(user: UserId, address: Option<IpAddr>) -> Self {
        Self { user, address: address.map(address_key) }
    }
}

/// The quotas of a user; an address has eight times as much.
#[derive(Clone, Copy, Debug, Default)]
pub struct QuotaOptions {
    /// Bytes per minute, with a burst of two minutes; 0: no limit.
    pub bytes_per_minute: u32,
    /// Inboxes per hour, with a burst of one hour; 0: no limit.
    pub new_inboxes_per_hour: u32,
    /// Rooms per minute, with a burst of five minutes; 0: no limit.
    pub new_rooms_per_minute: u32,
}

/// One kind of quota.
#[derive(Debug)]
struct Quota {
    rates: ArcSwap<QuotaRates>,
    users: RateLimiters<UserId>,
    addresses: RateLimiters<IpAddr>,
}

/// The rates of one kind of quota.
#[derive(Debug)]
struct QuotaRates {
    of_user: Rate,
    of_address: Rate,
}

impl QuotaRates {
    fn new(count: u32, period: Duration, bursts: u32) -> Self {
        let rate = |count: u32| Rate::new(count, period, count.saturating_mul(bursts));
        Self { of_user: rate(count), of_address: rate(count.saturating_mul(USERS_PER_ADDRESS)) }
    }

    /// Of bytes, inboxes and rooms.
    fn of(options: QuotaOptions) -> [Self; 3] {
        let minute = Duration::from_secs(60);
        [
            Self::new(options.bytes_per_minute, minute, 2),
            Self::new(options.new_inboxes_per_hour, 60 * minute, 1),
            Self::new(options.new_rooms_per_minute, minute, 5),
        ]
    }
}

impl Quota {
    fn new(rates: QuotaRates) -> Self {
        Self {
            rates: ArcSwap::from_pointee(rates),
            users: RateLimiters::default(),
            addresses: RateLimiters::default(),
        }
    }

    fn peek(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        let rates = self.rates.load();
        let of_address =
            by.address.map(|address| self.addresses.wait(&address, rates.of_address, now));
        let of_user = self.users.wait(&by.user, rates.of_user, now);
        match of_user.max(of_address.unwrap_or_default()) {
            Duration::ZERO => Ok(()),
            wait => Err(wait),
        }
    }

    /// Charges `count` if one may be taken. An excess over the burst is waited for afterwards, so
    /// that no count is too large forever.
    fn take(&self, by: &Writer, count: u32, now: Instant) -> Result<(), Duration> {
        self.peek(by, now)?;
        self.charge(by, count, now);
        Ok(())
    }

    fn charge(&self, by: &Writer, count: u32, now: Instant) {
        let rates = self.rates.load();
        self.users.charge(by.user.clone(), count, rates.of_user, now);
        if let Some(address) = by.address {
            self.addresses.charge(address, count, rates.of_address, now);
        }
    }
}

/// The quotas of all users and addresses.
#[derive(Debug)]
pub struct Quotas {
    bytes: Quota,
    inboxes: Quota,
    rooms: Quota,
}

impl Default for Quotas {
    /// No limits.
    fn default() -> Self {
        Self::new(QuotaOptions::default())
    }
}

impl Quotas {
    /// Quotas of which nothing is used.
    pub fn new(options: QuotaOptions) -> Self {
        let [bytes, inboxes, rooms] = QuotaRates::of(options).map(Quota::new);
        Self { bytes, inboxes, rooms }
    }

    /// Replaces the options. Quotas that were used stay used.
    pub fn set_options(&self, options: QuotaOptions) {
        let quotas = [&self.bytes, &self.inboxes, &self.rooms];
        for (quota, rates) in quotas.into_iter().zip(QuotaRates::of(options)) {
            quota.rates.store(rates.into());
        }
    }

    /// Charges the bytes of something to be stored.
    ///
    /// # Errors
    ///
    /// The time to wait. Nothing is charged then.
    pub fn take_bytes(&self, by: &Writer, bytes: usize, now: Instant) -> Result<(), Duration> {
        self.bytes.take(by, u32::try_from(bytes).unwrap_or(u32::MAX), now)
    }

    /// Checks whether a message may open the inbox of a user who was never connected.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn check_new_inbox(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        self.inboxes.peek(by, now)
    }

    /// Counts an inbox that a message has opened; [`Quotas::check_new_inbox`] was called before.
    pub fn count_new_inbox(&self, by: &Writer, now: Instant) {
        self.inboxes.charge(by, 1, now);
    }

    /// Checks whether a join may create a room.
    ///
    /// # Errors
    ///
    /// The time to wait.
    pub fn check_new_room(&self, by: &Writer, now: Instant) -> Result<(), Duration> {
        self.rooms.peek(by, now)
    }

    /// Counts a room that a join has created.
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
    fn user_may_write_two_minutes_of_bytes_at_once() {
        let options = QuotaOptions { bytes_per_minute: 60_000, ..QuotaOptions::default() };
        let (quotas, start) = (Quotas::new(options), Instant::now());
        let ann = writer("ann", "192.0.2.1");
        // One item larger than the rest of the quota is taken, and waited for afterwards.
        for _ in 0..2 {
            assert_eq!(quotas.take_bytes(&ann, 100_000, start), Ok(()));
        }
        let wait = quotas.take_bytes(&ann, 1, start).unwrap_err();
        assert!((79..=81).contains(&wait.as_secs()), "{wait:?}");
        assert!(quotas.take_bytes(&ann, 1, start + wait).is_ok());
        // A user has one quota from all addresses; another user has another.
        assert!(quotas.take_bytes(&writer("ann", "192.0.2.2"), 1, start).is_err());
        assert!(quotas.take_bytes(&writer("bob", "192.0.2.1"), 1, start).is_ok());
    }

    #[test]
    fn address_has_eight_times_the_quota_of_a_user() {
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
    fn new_options_apply_to_what_was_used() {
        let options = |bytes| QuotaOptions { bytes_per_minute: bytes, ..QuotaOptions::default() };
        let (quotas, now) = (Quotas::new(options(1000)), Instant::now());
        let ann = writer("ann", "192.0.2.1");
        while quotas.take_bytes(&ann, 500, now).is_ok() {}
        quotas.set_options(options(0));
        assert!(quotas.take_bytes(&ann, 1_000_000, now).is_ok());
        quotas.set_options(options(1000));
        while quotas.take_bytes(&ann, 500, now).is_ok() {}
    }

    #[test]
    fn quotas_of_zero_are_no_limits() {
        let (quotas, now) = (Quotas::new(QuotaOptions::default()), Instant::now());
        let ann = writer("ann", "192.0.2.1");
        for _ in 0..1000 {
            quotas.take_bytes(&ann, usize::MAX, now).unwrap();
            quotas.count_new_room(&ann, now);
        }
        assert!(quotas.check_new_room(&ann, now).is_ok());
    }
}
