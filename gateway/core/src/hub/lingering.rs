//! Rooms that have no members, or had none a moment ago. Each room occurs once, however often it
//! became empty.

use std::collections::BTreeSet;

use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::{Duration, Instant};

use super::room::Room;

/// The time for which a node stays subscribed to a room without members, so that a user who reloads
/// a page finds the replica in place.
pub const LINGER: Duration = Duration::from_secs(30);
/// As [`LINGER`], for an inbox: long enough for a reconnect, and short, since each user has an
/// inbox.
const INBOX_LINGER: Duration = Duration::from_secs(5);

/// Ordered by the time until which the node stays subscribed. A room stores the time under which it
/// occurs here.
#[derive(Debug, Default)]
pub(super) struct Lingering(BTreeSet<(Instant, RoomId)>);

impl Lingering {
    /// Inserts a room that has become empty.
    pub(super) fn insert(&mut self, room: &mut Room, now: Instant) {
        self.remove(room);
        let until = now + linger_of(&room.name);
        room.lingers_until = Some(until);
        self.0.insert((until, room.name.clone()));
    }

    /// Removes a room.
    pub(super) fn remove(&mut self, room: &mut Room) {
        if let Some(until) = room.lingers_until.take() {
            self.0.remove(&(until, room.name.clone()));
        }
    }

    /// The number of rooms.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes the room that has lingered longest. It may have members again.
    pub(super) fn pop_oldest(&mut self) -> Option<RoomId> {
        self.0.pop_first().map(|(_, room)| room)
    }

    /// Takes a room whose time is over. It may have members again.
    pub(super) fn next_due(&mut self, now: Instant) -> Option<RoomId> {
        let (until, _) = self.0.first()?;
        if *until > now {
            return None;
        }
        self.pop_oldest()
    }
}

/// The time for which the node stays subscribed to a room without members.
pub(super) fn linger_of(room: &RoomId) -> Duration {
    match room.kind() {
        RoomKind::Inbox => INBOX_LINGER,
        RoomKind::Room | RoomKind::Status => LINGER,
    }
}
