//! The rules of delivery, as pure code: what to do with an entry that arrives, whether what was
//! read is whole, what a node remembers.
//!
//! No I/O, no clock, no locks: the hub asks and obeys.

use shared::{envelope::Envelope, position::Position};

pub mod order;
pub mod page;
pub mod ring;

/// An entry of a log with its position. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub position: Position,
    /// What it is.
    pub envelope: Envelope,
}

impl Entry {
    /// What the entry takes in memory, roughly.
    pub fn bytes(&self) -> usize {
        self.envelope.as_bytes().len()
    }
}

#[cfg(test)]
pub(crate) mod samples {
    //! Entries for the tests of this module and those above it.

    use shared::{
        envelope::Parts,
        ids::{ConnectionId, MessageId},
        position::Seq,
    };
    use uuid::Uuid;

    use super::*;

    /// The entry `seq` of `epoch`, with an id made of the number.
    pub(crate) fn entry(epoch: &str, seq: Seq) -> Entry {
        let envelope = Envelope::pack(Parts {
            id: MessageId(Uuid::from_u128(u128::from(seq))),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            members: r#""room":"r""#,
            binary: None,
        });
        Entry { position: position(epoch, seq), envelope }
    }

    /// A position.
    pub(crate) fn position(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }
}
