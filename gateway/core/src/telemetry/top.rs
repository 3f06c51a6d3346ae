//! The users and addresses that sent most within the last minute: they tell who floods the node.
//!
//! Connections report their input in portions ([`Portion`]), so that most frames cost an addition.
//! A connection that sends little reports late or only at its end, and is in no list anyway. The
//! tables are bounded: a full one drops the entry that sent least, so that counts are lower bounds
//! and the largest senders stay.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    net::IpAddr,
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skein_protocol::ids::UserId;
use tokio::time::Instant;

/// How long input counts.
pub const WINDOW: Duration = Duration::from_secs(60);
/// The time after which a part of the input is forgotten.
const SLICE: Duration = Duration::from_secs(10);
/// The most users, and the most addresses, of one slice.
const KEYS_MAX: usize = 512;
/// Bytes that weigh as much as a frame.
const BYTES_PER_FRAME: u64 = 1024;
/// A portion is reported when it has this weight.
const PORTION_WEIGHT: u64 = 32;

/// Input of a user or an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputCounts {
    /// Frames, control frames included.
    pub frames: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Frames that got an `error`, and handshakes above a limit.
    pub refusals: u64,
}

impl InputCounts {
    fn add(&mut self, more: Self) {
        self.frames += more.frames;
        self.bytes += more.bytes;
        self.refusals += more.refusals;
    }

    fn weight(self) -> u64 {
        self.frames + self.bytes / BYTES_PER_FRAME + self.refusals
    }

    fn by(self, order: InputOrder) -> u64 {
        match order {
            InputOrder::Frames => self.frames,
            InputOrder::Bytes => self.bytes,
            InputOrder::Refusals => self.refusals,
        }
    }
}

/// The order of a list of senders, largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputOrder {
    /// By frames.
    #[default]
    Frames,
    /// By bytes.
    Bytes,
    /// By refusals.
    Refusals,
}

/// Input of a connection that is not reported yet: 12 bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Portion {
    frames: u32,
    bytes: u32,
    refusals: u32,
}

impl Portion {
    /// Counts input.
    pub fn count(&mut self, frames: u32, bytes: usize, refusals: u32) {
        self.frames = self.frames.saturating_add(frames);
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.refusals = self.refusals.saturating_add(refusals);
    }

    /// Takes the input if it is worth a report.
    pub fn take_if_due(&mut self) -> Option<InputCounts> {
        let counts = self.counts();
        (counts.weight() >= PORTION_WEIGHT).then(|| self.take())
    }

    /// Takes the input.
    pub fn take(&mut self) -> InputCounts {
        let counts = self.counts();
        *self = Self::default();
        counts
    }

    fn counts(self) -> InputCounts {
        let Self { frames, bytes, refusals } = self;
        InputCounts { frames: frames.into(), bytes: bytes.into(), refusals: refusals.into() }
    }
}

/// Senders with their input, largest first.
pub type SenderRows<K> = Vec<(K, InputCounts)>;

/// The senders of one node.
#[derive(Debug)]
pub struct TopSenders {
    start: Instant,
    /// Oldest first.
    slices: Mutex<VecDeque<SenderSlice>>,
}

/// The input of one [`SLICE`].
#[derive(Debug, Default)]
struct SenderSlice {
    number: u64,
    users: HashMap<UserId, InputCounts>,
    addresses: HashMap<IpAddr, InputCounts>,
}

/// Adds counts to a bounded table.
fn add_to<K: Hash + Eq + Clone>(table: &mut HashMap<K, InputCounts>, key: &K, counts: InputCounts) {
    if let Some(known) = table.get_mut(key) {
        return known.add(counts);
    }
    if table.len() >= KEYS_MAX
        && let Some((least, _)) = table.iter().min_by_key(|(_, counts)| counts.weight())
    {
        let least = least.clone();
        table.remove(&least);
    }
    table.insert(key.clone(), counts);
}

impl Default for TopSenders {
    fn default() -> Self {
        Self { start: Instant::now(), slices: Mutex::default() }
    }
}

impl TopSenders {
    /// Records input of a user, an address, or both.
    pub fn record(
        &self,
        user: Option<&UserId>,
        address: Option<IpAddr>,
        counts: InputCounts,
        now: Instant,
    ) {
        let slices = &mut *self.slices.lock();
        let number = self.forget_old(slices, now);
        if slices.back().is_none_or(|slice| slice.number != number) {
            slices.push_back(SenderSlice { number, ..SenderSlice::default() });
        }
        let Some(slice) = slices.back_mut() else { return };
        if let Some(user) = user {
            add_to(&mut slice.users, user, counts);
        }
        if let Some(address) = address {
            add_to(&mut slice.addresses, &address, counts);
        }
    }

    /// Drops slices that are older than [`WINDOW`]. Returns the number of the present one.
    fn forget_old(&self, slices: &mut VecDeque<SenderSlice>, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.start);
        let number = since.as_secs() / SLICE.as_secs();
        let kept = WINDOW.as_secs() / SLICE.as_secs();
        while slices.front().is_some_and(|slice| slice.number + kept <= number) {
            slices.pop_front();
        }
        number
    }

    /// Returns the users and the addresses that sent most, largest first, at most `limit` of each.
    /// Senders that have nothing of what `order` counts are left out.
    pub fn top(
        &self,
        order: InputOrder,
        limit: usize,
        now: Instant,
    ) -> (SenderRows<UserId>, SenderRows<IpAddr>) {
        let slices = &mut *self.slices.lock();
        self.forget_old(slices, now);
        let (mut users, mut addresses) = (HashMap::new(), HashMap::new());
        for slice in &*slices {
            for (user, counts) in &slice.users {
                users.entry(user.clone()).or_insert_with(InputCounts::default).add(*counts);
            }
            for (address, counts) in &slice.addresses {
                addresses.entry(*address).or_insert_with(InputCounts::default).add(*counts);
            }
        }
        (largest(users, order, limit), largest(addresses, order, limit))
    }
}

fn largest<K: Ord>(
    counts: HashMap<K, InputCounts>,
    order: InputOrder,
    limit: usize,
) -> SenderRows<K> {
    let mut rows: Vec<_> = counts.into_iter().filter(|(_, counts)| counts.by(order) > 0).collect();
    rows.sort_by(|(a, one), (b, other)| other.by(order).cmp(&one.by(order)).then(a.cmp(b)));
    rows.truncate(limit);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(frames: u64, bytes: u64, refusals: u64) -> InputCounts {
        InputCounts { frames, bytes, refusals }
    }

    fn user(name: &str) -> UserId {
        name.parse().unwrap()
    }

    #[test]
    fn the_largest_senders_of_the_last_minute_come_first() {
        let (senders, start) = (TopSenders::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let address = Some(ip);
        senders.record(Some(&user("ann")), address, counts(40, 90_000, 0), at(1));
        senders.record(Some(&user("bob")), address, counts(100, 5_000, 3), at(1));
        senders.record(Some(&user("ann")), address, counts(40, 1_000, 0), at(31));
        let top = |order, seconds| {
            let (users, addresses) = senders.top(order, 9, at(seconds));
            let users: Vec<_> =
                users.iter().map(|(user, counts)| (user.to_string(), *counts)).collect();
            (users, addresses)
        };
        let (ann, bob) =
            (("ann".to_owned(), counts(80, 91_000, 0)), ("bob".to_owned(), counts(100, 5_000, 3)));
        let (users, addresses) = top(InputOrder::Frames, 32);
        assert_eq!(users, [bob.clone(), ann.clone()]);
        assert_eq!(addresses, [(ip, counts(180, 96_000, 3))]);
        assert_eq!(top(InputOrder::Bytes, 32).0, [ann, bob.clone()]);
        assert_eq!(top(InputOrder::Refusals, 32).0, [bob], "ann was refused nothing");
        // After a minute only the later portion counts, and then nothing.
        assert_eq!(top(InputOrder::Frames, 75).0, [("ann".to_owned(), counts(40, 1_000, 0))]);
        assert!(top(InputOrder::Frames, 100).0.is_empty());
    }

    #[test]
    fn a_flood_of_names_does_not_drop_the_largest_sender() {
        let (senders, now) = (TopSenders::default(), Instant::now());
        senders.record(Some(&user("flooder")), None, counts(10_000, 0, 0), now);
        for name in 0..3 * KEYS_MAX {
            senders.record(Some(&user(&format!("u{name}"))), None, counts(32, 0, 0), now);
        }
        assert_eq!(senders.slices.lock()[0].users.len(), KEYS_MAX);
        let (users, _) = senders.top(InputOrder::Frames, 1, now);
        assert_eq!(users[0].0.as_str(), "flooder");
    }

    #[test]
    fn a_portion_is_reported_once_it_is_worth_it() {
        let mut portion = Portion::default();
        portion.count(31, 900, 0);
        assert_eq!(portion.take_if_due(), None);
        portion.count(1, 0, 1);
        assert_eq!(portion.take_if_due(), Some(counts(32, 900, 1)));
        portion.count(1, 40_000, 0);
        assert_eq!(portion.take_if_due(), Some(counts(1, 40_000, 0)));
        assert_eq!((portion.take_if_due(), portion.take()), (None, counts(0, 0, 0)));
    }
}
