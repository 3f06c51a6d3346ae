//! Rooms that are without members, or were a moment ago: each is here once, however often it emptied.

use std::collections::BTreeSet;

use shared::ids::RoomId;
use tokio::time::Instant;

use super::{LINGER, room::Room};

/// In the order of their becoming empty. A room knows under which time it is here.
#[derive(Debug, Default)]
pub(super) struct Lingering(BTreeSet<(Instant, RoomId)>);

impl Lingering {
    /// The room has become empty.
    pub(super) fn enter(&mut self, room: &mut Room, now: Instant) {
        self.leave(room);
        room.lingers_since = Some(now);
        self.0.insert((now, room.name.clone()));
    }

    /// The room is not followed any more.
    pub(super) fn leave(&mut self, room: &mut Room) {
        if let Some(since) = room.lingers_since.take() {
            self.0.remove(&(since, room.name.clone()));
        }
    }

    /// Takes out a room that emptied [`LINGER`] ago, and says when. Somebody may have come since.
    pub(super) fn next_due(&mut self, now: Instant) -> Option<(Instant, RoomId)> {
        let (since, _) = self.0.first()?;
        if now.saturating_duration_since(*since) < LINGER {
            return None;
        }
        self.0.pop_first()
    }
}
