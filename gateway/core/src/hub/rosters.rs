//! The rosters of a shard's rooms: reads of them, and presence work that is due later.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::Instant;

use super::{
    commands::{READ_RETRY_DELAY, ShardCommand, ShardTasks},
    member::ShardBatch,
    room::Room,
    rooms::Rooms,
};
use crate::{bus::presence_store::PresenceSnapshot, presence::PresenceTracker};

/// The first and the last pause before incomplete rosters are read again; the pause doubles each
/// time. After the last one every live node has reported its users, and other nodes have lost their
/// leases.
const ROSTER_RETRY_MIN: Duration = Duration::from_secs(1);
const ROSTER_RETRY_MAX: Duration = Duration::from_secs(10);

/// Reads the rosters of rooms, and knows when presence work of rooms is due.
pub(super) struct Rosters {
    /// The times at which rooms have presence work due. A room may occur more than once.
    due: BTreeSet<(Instant, RoomId)>,
    presence: Arc<PresenceTracker>,
    tasks: ShardTasks,
}

/// Reads of rosters and statuses that some nodes had not reported to yet.
#[derive(Debug, Default)]
pub(super) struct IncompleteReads {
    /// The time at which they are repeated.
    repeat_at: Option<Instant>,
    /// The number of incomplete reads in a row.
    in_a_row: u32,
}

impl IncompleteReads {
    pub(super) fn note_complete(&mut self) {
        self.in_a_row = 0;
    }

    pub(super) fn note_incomplete(&mut self, now: Instant) {
        if self.repeat_at.is_none() {
            let wait = ROSTER_RETRY_MIN.saturating_mul(1 << self.in_a_row.min(10));
            self.in_a_row += 1;
            self.repeat_at = Some(now + wait.min(ROSTER_RETRY_MAX));
        }
    }

    /// Whether they must be repeated now.
    pub(super) fn take_due(&mut self, now: Instant) -> bool {
        self.repeat_at.take_if(|at| *at <= now).is_some()
    }
}

impl Rosters {
    pub(super) fn new(presence: Arc<PresenceTracker>, tasks: ShardTasks) -> Self {
        Self { due: BTreeSet::new(), presence, tasks }
    }

    /// Schedules the next due work of a room.
    pub(super) fn schedule(&mut self, room: &Room) {
        if let Some(due) = room.presence.due() {
            self.due.insert((due, room.name.clone()));
        }
    }

    /// The time of the next due work of any room.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Does the due work of all rooms.
    pub(super) fn send_due(&mut self, rooms: &mut Rooms, batch: &mut ShardBatch) {
        while let Some((due, _)) = self.due.first()
            && *due <= batch.retention.now
        {
            let Some((due, name)) = self.due.pop_first() else { return };
            // A room scheduled more than once is handled at its earliest time.
            let Some(room) = rooms.get_mut(&name).filter(|room| room.presence.due() == Some(due))
            else {
                continue;
            };
            room.send_due_presence(self.presence.options(), batch);
            self.schedule(room);
        }
    }

    /// Reads the rosters of rooms in a task, until it succeeds.
    pub(super) fn read(&self, mut names: Vec<RoomId>, rooms: &mut Rooms) {
        names.sort_unstable();
        let begin = |name: RoomId| {
            // An inbox has one known user.
            let room = rooms.get_mut(&name).filter(|_| name.kind() == RoomKind::Room)?;
            room.presence.begin_read().then_some((name, room.subscription))
        };
        let rooms: Vec<(RoomId, u64)> = names.into_iter().filter_map(begin).collect();
        if rooms.is_empty() {
            return;
        }
        let store = self.presence.store().clone();
        self.tasks.spawn("read_rosters", async move {
            let names: Vec<RoomId> = rooms.iter().map(|(name, _)| name.clone()).collect();
            let snapshots = loop {
                match store.snapshots(names.clone()).await {
                    Ok(snapshots) => break snapshots,
                    Err(_) => tokio::time::sleep(READ_RETRY_DELAY).await,
                }
            };
            ShardCommand::RostersRead { rooms, snapshots }
        });
    }

    /// Applies rosters that were read.
    pub(super) fn apply(
        &mut self,
        read: Vec<(RoomId, u64)>,
        snapshots: Vec<PresenceSnapshot>,
        reads: &mut IncompleteReads,
        rooms: &mut Rooms,
        batch: &mut ShardBatch,
    ) {
        let mut again = Vec::new();
        for ((name, subscription), snapshot) in read.into_iter().zip(snapshots) {
            let Some(room) = rooms.current(&name, subscription) else { continue };
            if snapshot.complete {
                reads.note_complete();
            } else {
                reads.note_incomplete(batch.retention.now);
            }
            if room.apply_roster(snapshot, self.presence.options(), batch) {
                again.push(name);
            }
            self.schedule(room);
        }
        self.read(again, rooms);
    }

    /// Reads the rosters that queries wait for, and if `all` is set, those that are incomplete.
    pub(super) fn retry(&self, all: bool, rooms: &mut Rooms, batch: &mut ShardBatch) {
        let mut names = Vec::new();
        for room in rooms.iter_mut() {
            let late = room.presence.has_waiting();
            if late {
                room.presence.answer_waiting(&room.name, batch);
            }
            if late || all && !room.presence.is_complete() {
                names.push(room.name.clone());
            }
        }
        self.read(names, rooms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_before_incomplete_reads_doubles_up_to_ten_seconds() {
        let (mut reads, mut now) = (IncompleteReads::default(), crate::delivery::samples::now());
        for pause in [1, 2, 4, 8, 10, 10] {
            reads.note_incomplete(now);
            reads.note_incomplete(now);
            now += Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(!reads.take_due(now));
            now += Duration::from_millis(1);
            assert!(reads.take_due(now) && !reads.take_due(now));
        }
        reads.note_complete();
        reads.note_incomplete(now);
        assert!(reads.take_due(now + Duration::from_secs(1)));
    }
}
