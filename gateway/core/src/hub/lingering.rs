//! Rooms without members, for which a node stays subscribed for a while.

use std::collections::{BTreeSet, HashMap};

use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::{Duration, Instant};

/// The time for which a node stays subscribed to a room without members, so that a user who reloads
/// a page finds the replica in place.
pub const LINGER: Duration = Duration::from_secs(30);
/// As [`LINGER`], for an inbox: long enough for a reconnect, and short, since each user has an
/// inbox.
const INBOX_LINGER: Duration = Duration::from_secs(5);

/// The rooms without members, by the time until which the node stays subscribed.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    by_time: BTreeSet<(Instant, RoomId)>,
    until: HashMap<RoomId, Instant>,
}

impl Lingering {
    /// Inserts a room that has become empty, unless it is here already.
    pub(super) fn insert(&mut self, room: &RoomId, now: Instant) {
        if !self.until.contains_key(room) {
            let until = now + linger_of(room);
            self.until.insert(room.clone(), until);
            self.by_time.insert((until, room.clone()));
        }
    }

    /// Removes a room that is used again, or dropped.
    pub(super) fn remove(&mut self, room: &RoomId) {
        if let Some((room, until)) = self.until.remove_entry(room) {
            self.by_time.remove(&(until, room));
        }
    }

    /// The number of rooms.
    pub(super) fn len(&self) -> usize {
        self.until.len()
    }

    /// Takes the room whose time ends first.
    pub(super) fn pop_oldest(&mut self) -> Option<RoomId> {
        let (_, room) = self.by_time.pop_first()?;
        self.until.remove(&room);
        Some(room)
    }

    /// Takes a room whose time is over.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<RoomId> {
        let (until, _) = self.by_time.first()?;
        if *until <= now { self.pop_oldest() } else { None }
    }
}

/// The time for which the node stays subscribed to a room without members.
fn linger_of(room: &RoomId) -> Duration {
    match room.kind() {
        RoomKind::Inbox => INBOX_LINGER,
        RoomKind::Room | RoomKind::Status => LINGER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::samples::now;

    #[test]
    fn room_lingers_from_the_time_at_which_it_became_empty() {
        let (mut lingering, start) = (Lingering::default(), now());
        let (lobby, inbox) = ("lobby".parse().unwrap(), RoomId::inbox_of(&"ann".parse().unwrap()));
        lingering.insert(&lobby, start);
        lingering.insert(&lobby, start + Duration::from_secs(9));
        lingering.insert(&inbox, start);
        assert_eq!(lingering.len(), 2);
        assert_eq!(lingering.pop_due(start + INBOX_LINGER), Some(inbox));
        assert_eq!(lingering.pop_due(start + INBOX_LINGER), None);
        lingering.remove(&lobby);
        assert_eq!((lingering.pop_due(start + LINGER), lingering.len()), (None, 0));
        lingering.insert(&lobby, start + LINGER);
        assert_eq!(lingering.pop_due(start + LINGER), None);
        assert_eq!(lingering.pop_due(start + LINGER * 2), Some(lobby));
        assert_eq!(lingering.pop_oldest(), None);
    }
}
