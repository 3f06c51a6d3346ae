//! The rules of delivery, as pure code: what to do with an entry that arrives, whether what was
//! read is whole, what a node remembers.
//!
//! No I/O, no clock, no locks: the hub asks and obeys.

use std::{fmt, str::FromStr};

use crate::envelope::{DedupKey, Envelope};
use skein_protocol::{ids::RoomId, position::Position};

pub mod page;
pub mod ring;
pub mod recent_ids;
pub mod replica;
pub mod reconcile;
pub mod cursor;

/// Tells one run of a server from every other: another server, or the same one restarted or become
/// primary again, has another token. Written as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerId(u64);

/// The text is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a token is 16 hexadecimal digits")]
pub struct InvalidToken;

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for ServerId {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 16 {
            return Err(InvalidToken);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidToken)
    }
}

/// An entry of a log with its position. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub position: Position,
    /// The server it was first appended on. Two histories may have one number, and even one id at
    /// one number, in common; with the stamp they have only what both have from before they parted.
    pub origin: ServerId,
    /// What it is.
    pub envelope: Envelope,
}

impl Entry {
    /// Whether `other` is the same entry of the same history. Epochs are no part of that: an entry
    /// keeps the one it was written under.
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.position.seq == other.position.seq
            && self.origin == other.origin
            && self.envelope.dedup_key() == other.envelope.dedup_key()
    }

    /// What the entry takes in memory, roughly.
    pub fn bytes(&self) -> usize {
        self.envelope.as_bytes().len()
    }
}

/// What a node holds of a room that it follows, to be given back to a server that came back without
/// it.
#[derive(Clone, Debug)]
pub struct ReplicaSnapshot {
    /// The room.
    pub room: RoomId,
    /// The newest entry that was passed on, 0 for none.
    pub top: Position,
    /// The former epoch and its last number, where the present one continues it.
    pub former: Option<Position>,
    /// The term in which the room was declared whole last.
    pub generation: u64,
    /// The newest entries without steps, the last at `top`; older than the room's retention they
    /// are left out.
    pub entries: Vec<Entry>,
    /// RecentIds of older messages within the dedup window, and their numbers.
    pub ids: Vec<(DedupKey, Position)>,
}

/// Tells the ordinal of an epoch: epochs are `<ordinal>-<random>`, and the higher ordinal is the
/// later one.
pub fn ordinal(epoch: &skein_protocol::position::Epoch) -> u64 {
    epoch.as_str().split_once('-').and_then(|(ordinal, _)| ordinal.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) mod samples {
    //! Entries for the tests of this module and those above it.

    use crate::envelope::{AuthorHash, EnvelopeParts};
    use skein_protocol::{
        ids::{ConnectionId, MessageId},
        position::Seq,
    };
    use uuid::Uuid;

    use super::*;

    /// The entry `seq` of `epoch`, with an id made of the number.
    pub(crate) fn entry(epoch: &str, seq: Seq) -> Entry {
        let envelope = Envelope::pack(EnvelopeParts {
            frame: Default::default(),
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(u128::from(seq))),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: r#""room":"r""#,
            binary_payload: None,
        });
        Entry { position: position(epoch, seq), origin: ServerId::default(), envelope }
    }

    /// Some time.
    pub(crate) fn now() -> tokio::time::Instant {
        tokio::time::Instant::now()
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
    fn one_message_under_one_number_of_two_histories_is_two_entries() {
        let written = entry("1-e", 7);
        let again = Entry { origin: "0123456789abcdef".parse().unwrap(), ..written.clone() };
        assert!(written.is_same_as(&written) && !written.is_same_as(&again));
        let continued = Entry { position: samples::position("2-f", 7), ..written.clone() };
        assert!(written.is_same_as(&continued), "an epoch that continues it changes nothing");
        assert!(!written.is_same_as(&entry("1-e", 8)));
    }
}
