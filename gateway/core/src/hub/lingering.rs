//! Rooms that are without members, or were a moment ago: each is here once, however often it emptied.

use std::collections::BTreeSet;

use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::{Duration, Instant};

use super::{INBOX_LINGER, LINGER, room::Room};

/// By when they are not followed any more. A room knows under which time it is here.
#[derive(Debug, Default)]
pub(super) struct Lingering(BTreeSet<(Instant, RoomId)>);

impl Lingering {
    /// The room has become empty.
    pub(super) fn insert(&mut self, room: &mut Room, now: Instant) {
        self.remove(room);
        let until = now + linger_of(&room.name);
        room.lingers_until = Some(until);
        self.0.insert((until, room.name.clone()));
    }

    /// The room is not followed any more.
    pub(super) fn remove(&mut self, room: &mut Room) {
        if let Some(until) = room.lingers_until.take() {
            self.0.remove(&(until, room.name.clone()));
        }
    }

    /// How many rooms are here.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes out the room that has been here for longest. Somebody may have come since.
    pub(super) fn pop_oldest(&mut self) -> Option<RoomId> {
        self.0.pop_first().map(|(_, room)| room)
    }

    /// Takes out a room whose time is over. Somebody may have come since.
    pub(super) fn next_due(&mut self, now: Instant) -> Option<RoomId> {
        let (until, _) = self.0.first()?;
        if *until > now {
            return None;
        }
        self.pop_oldest()
    }
}

/// How long a room without members is still followed.
pub(super) fn linger_of(room: &RoomId) -> Duration {
    match room.kind() {
        RoomKind::Inbox => INBOX_LINGER,
        RoomKind::Room | RoomKind::Status => LINGER,
    }
}
