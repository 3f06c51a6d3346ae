//! The rules of delivery, as pure code: how to handle a received entry, whether a page of the log
//! is contiguous, what a node remembers of a room.
//!
//! No I/O, no clock, no locks: the hub calls and executes the results.

use std::{fmt, str::FromStr};

use crate::envelope::{DedupKey, Envelope};
use skein_protocol::{ids::RoomId, position::Position};

pub mod page;
pub mod ring;
pub mod recent_ids;
pub mod replica;
pub mod reconcile;
pub mod cursor;
pub mod join;

/// Identifies one run of a Redis server and the data set that it serves. Another server, or the
/// same server after a restart or a promotion, has another id. Written as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerId(u64);

/// The text is not a server id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server id is 16 hexadecimal digits")]
pub struct InvalidServerId;

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ServerId {
    type Err = InvalidServerId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 16 {
            return Err(InvalidServerId);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidServerId)
    }
}

/// An entry of a log with its position. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The position in the log.
    pub position: Position,
    /// The server on which the entry was first appended. Two histories may share a number, and even
    /// one id at one number; they share an entry of the same origin only if it is older than their
    /// divergence.
    pub origin: ServerId,
    /// The content.
    pub envelope: Envelope,
}

impl Entry {
    /// Whether `other` is the same entry of the same history. The epoch is not compared: an entry
    /// keeps the epoch under which it was written.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.position.seq == other.position.seq
            && self.origin == other.origin
            && self.envelope.dedup_key() == other.envelope.dedup_key()
    }

    /// The approximate memory of the entry, in bytes.
    pub fn bytes(&self) -> usize {
        self.envelope.as_bytes().len()
    }
}

/// A node's copy of a room, with which a Redis server that came back without it is restored.
#[derive(Clone, Debug)]
pub struct ReplicaSnapshot {
    /// The room.
    pub room: RoomId,
    /// The newest entry that was delivered, 0 for none.
    pub top: Position,
    /// The former epoch and its last number, if the present epoch continues it.
    pub former: Option<Position>,
    /// The agreement generation in which the room was last declared complete.
    pub generation: u64,
    /// The newest entries without gaps, the last one at `top`. Empty if the entries are past the
    /// room's retention.
    pub entries: Vec<Entry>,
    /// Ids of older messages within the dedup window, with their positions.
    pub ids: Vec<(DedupKey, Position)>,
}

/// The ordinal of an epoch. Epochs are `<ordinal>-<random>`; the higher ordinal is the later epoch.
pub fn ordinal(epoch: &skein_protocol::position::Epoch) -> u64 {
    epoch.as_str().split_once('-').and_then(|(ordinal, _)| ordinal.parse().ok()).unwrap_or(0)
}

/// Whether a test has injected a fault that breaks the invariants of delivery on purpose.
pub(crate) fn is_fault_injected() -> bool {
    #[cfg(debug_assertions)]
    return crate::fault_injection::is_any_injected();
    #[cfg(not(debug_assertions))]
    false
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) mod samples {
    //! Entries for the tests of this module and of the modules above.

    use std::{ops::RangeInclusive, time::Duration};

    use skein_protocol::{
        ids::{ConnectionId, MessageId},
        position::Seq,
        protocol::server_frame::RecoveryFailure,
    };
    use uuid::Uuid;

    use super::{
        page::LogPage,
        replica::{DeliverySink, NextAction, ReplicaEntryClass, RetentionContext, RoomReplica},
        ring::RingLimits,
        *,
    };
    use crate::envelope::{AuthorHash, EnvelopeParts};

    /// The entry `seq` of `epoch`, with an id derived from the number.
    pub(crate) fn entry(epoch: &str, seq: Seq) -> Entry {
        let envelope = with_fields(seq, r#""room":"r""#);
        Entry { position: position(epoch, seq), origin: ServerId::default(), envelope }
    }

    /// The envelope of a message, with an id derived from a number.
    pub(crate) fn with_fields(id: Seq, fields: &str) -> Envelope {
        Envelope::pack(EnvelopeParts {
            frame: Default::default(),
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(u128::from(id))),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields,
            binary_payload: None,
        })
    }

    /// Some time.
    pub(crate) fn now() -> tokio::time::Instant {
        tokio::time::Instant::now()
    }

    /// The bounds of a replica, with time to keep everything.
    pub(crate) fn retention() -> RetentionContext {
        let (ids_for, entries_for) = (Duration::from_secs(600), Duration::from_secs(3600));
        RetentionContext { ring: RingLimits::DEFAULT, ids_for, entries_for, now: now() }
    }

    /// A page with the entries `seqs` of a log whose entries end at `top`.
    pub(crate) fn page(epoch: &str, seqs: RangeInclusive<Seq>, top: Seq) -> LogPage {
        let entries = seqs.map(|seq| entry(epoch, seq)).collect();
        let epoch = epoch.parse().unwrap();
        LogPage { epoch, former: None, deleted: 0, generation: 0, top, oldest: 1, entries }
    }

    /// A replica that holds the entries `seqs`, of a log that begins with entry 1.
    pub(crate) fn replica(epoch: &str, seqs: RangeInclusive<Seq>) -> RoomReplica {
        let mut replica = RoomReplica::default();
        let page = page(epoch, seqs.clone(), *seqs.end());
        assert_eq!(replica.apply_page(page, &retention(), &mut Ignored), NextAction::Nothing);
        replica
    }

    /// A sink without members.
    pub(crate) struct Ignored;

    impl DeliverySink for Ignored {
        fn classified(&mut self, _: ReplicaEntryClass) {}
        fn entry(&mut self, _: &Entry) {}
        fn epoch_changed(&mut self, _: &Position) {}
        fn reset(&mut self, _: &Position, _: RecoveryFailure) {}
        fn lost(&mut self, _: &Entry) {}
    }

    /// A position.
    pub(crate) fn position(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }
}

#[cfg(test)]
mod entry_tests {
    use super::{samples::entry, *};

    #[test]
    fn origin_tells_entries_of_two_histories_apart() {
        let written = entry("1-e", 7);
        let again = Entry { origin: "0123456789abcdef".parse().unwrap(), ..written.clone() };
        assert!(written.is_same_as(&written) && !written.is_same_as(&again));
        let continued = Entry { position: samples::position("2-f", 7), ..written.clone() };
        assert!(written.is_same_as(&continued), "an epoch that continues it changes nothing");
        assert!(!written.is_same_as(&entry("1-e", 8)));
    }
}
