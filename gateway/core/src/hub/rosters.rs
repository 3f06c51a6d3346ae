//! The rosters of a shard's rooms: reads of them, and presence work that is due later.

use std::time::Duration;

use skein_protocol::{
    ids::{ConnectionId, RoomId, RoomKind, UserId},
    protocol::server_frame::{RoomClosedFrame, RoomClosedReason, ServerFrame},
};
use tokio::time::Instant;

use super::{
    commands::{READ_RETRY_DELAY, ShardCommand},
    presence::{self, PresenceQuery},
    shard::Shard,
};
use crate::bus::presence_store::{EphemeralEvent, PresenceSnapshot};

/// The first and the last pause before incomplete rosters are read again; the pause doubles each
/// time. After the last one every live node has reported its users, and other nodes have lost their
/// leases.
const ROSTER_RETRY_MIN: Duration = Duration::from_secs(1);
const ROSTER_RETRY_MAX: Duration = Duration::from_secs(10);

impl Shard {
    pub(super) fn handle_event(&mut self, name: &RoomId, event: EphemeralEvent) {
        // Also without a lease: the receivers read nothing afterwards.
        if let EphemeralEvent::Closed { reason, by } = event {
            return self.close_room(name, reason, by);
        }
        if self.suspended {
            return;
        }
        if let EphemeralEvent::Status = event {
            return self.status_changed(name);
        }
        if let EphemeralEvent::LogDeleted = event {
            return self.read_forward(name);
        }
        let Some(room) = self.rooms.get_mut(name) else { return };
        let read = room.apply_event(event, self.presence.options(), &mut self.batch);
        self.note_presence_due(name);
        if read {
            self.read_rosters(vec![name.clone()]);
        }
    }

    /// Schedules the next due work of a room.
    fn note_presence_due(&mut self, name: &RoomId) {
        if let Some(due) = self.rooms.get(name).and_then(|room| room.presence.due()) {
            self.presence_due.insert((due, name.clone()));
        }
    }

    /// The time of the next due work of any room.
    pub(super) fn next_presence_due(&self) -> Option<Instant> {
        self.presence_due.first().map(|(due, _)| *due)
    }

    /// Does the due work of all rooms.
    pub(super) fn send_due_presence(&mut self, now: Instant) {
        while let Some((due, _)) = self.presence_due.first()
            && *due <= now
        {
            let Some((due, name)) = self.presence_due.pop_first() else { return };
            let Some(room) = self.rooms.get_mut(&name) else { continue };
            // A room scheduled more than once is handled at its earliest time.
            if room.presence.due() != Some(due) {
                continue;
            }
            room.send_due_presence(self.presence.options(), &mut self.batch);
            self.note_presence_due(&name);
        }
    }

    /// Reads the rosters of rooms in a task, until it succeeds.
    pub(super) fn read_rosters(&mut self, mut names: Vec<RoomId>) {
        names.sort_unstable();
        names.retain(|name| {
            // An inbox has one known user.
            name.kind() == RoomKind::Room
                && self.rooms.get_mut(name).is_some_and(|room| room.presence.begin_read())
        });
        if names.is_empty() {
            return;
        }
        let rooms: Vec<(RoomId, u64)> = names
            .iter()
            .filter_map(|name| Some((name.clone(), self.rooms.get(name)?.generation)))
            .collect();
        let (store, commands) = (self.presence.store().clone(), self.commands.clone());
        self.spawn("read_rosters", async move {
            let snapshots = loop {
                match store.snapshots(names.clone()).await {
                    Ok(snapshots) => break snapshots,
                    Err(_) => tokio::time::sleep(READ_RETRY_DELAY).await,
                }
            };
            let _ = commands.send(ShardCommand::RostersRead { rooms, snapshots }).await;
        });
    }

    /// Applies rosters that were read.
    pub(super) fn apply_rosters(
        &mut self,
        rooms: Vec<(RoomId, u64)>,
        snapshots: Vec<PresenceSnapshot>,
    ) {
        let mut again = Vec::new();
        for ((name, generation), snapshot) in rooms.into_iter().zip(snapshots) {
            let room = self.rooms.get_mut(&name);
            let Some(room) = room.filter(|room| room.generation == generation) else { continue };
            let is_complete = snapshot.complete;
            if room.apply_roster(snapshot, self.presence.options(), &mut self.batch) {
                again.push(name.clone());
            }
            self.note_completeness(is_complete);
            self.note_presence_due(&name);
        }
        self.read_rosters(again);
    }

    /// Records whether a read was complete; incomplete rosters are read again later.
    pub(super) fn note_completeness(&mut self, is_complete: bool) {
        if is_complete {
            self.incomplete_reads = 0;
        } else if self.roster_retry_at.is_none() {
            let wait = ROSTER_RETRY_MIN.saturating_mul(1 << self.incomplete_reads.min(10));
            self.incomplete_reads += 1;
            self.roster_retry_at = Some(self.batch.retention.now + wait.min(ROSTER_RETRY_MAX));
        }
    }

    /// Reads incomplete rosters again, and those that queries wait for.
    pub(super) fn retry_rosters(&mut self, now: Instant) {
        let all = self.roster_retry_at.take_if(|at| *at <= now).is_some();
        if all {
            self.reread_statuses();
        }
        let mut names = Vec::new();
        for (name, room) in &mut self.rooms {
            let late = room.presence.has_queries();
            if late {
                room.presence.answer_queries(name, &mut self.batch);
            }
            if late || all && !room.presence.is_complete() {
                names.push(name.clone());
            }
        }
        self.read_rosters(names);
    }

    /// The users of one page of a room's roster.
    pub(super) fn present_after(&self, name: &RoomId, after: &str, limit: usize) -> Vec<UserId> {
        let Some(room) = self.rooms.get(name) else { return Vec::new() };
        room.presence.page(after, limit)
    }

    /// Answers a presence query once the roster has reached the query's version.
    pub(super) fn query_presence(&mut self, name: &RoomId, query: PresenceQuery) {
        match self.rooms.get_mut(name) {
            Some(room) => room.presence.query(query, name, &mut self.batch),
            None => presence::reject(name, query, &mut self.batch),
        }
    }

    /// Removes all members of a room that was closed or deleted.
    pub(super) fn close_room(
        &mut self,
        name: &RoomId,
        reason: RoomClosedReason,
        by: Option<ConnectionId>,
    ) {
        // Before `room_closed` is sent, so that a frame sent in response to it is rejected.
        self.presence.close(name);
        let Some(room) = self.rooms.get_mut(name) else { return };
        let closed = RoomClosedFrame { reference: None, room: name.clone(), reason };
        let answer = ServerFrame::RoomClosed(closed);
        for member in room.members.take() {
            let handle = member.handle;
            handle.release_reservations(name);
            if Some(handle.connection) != by {
                handle.send(&answer);
            }
            self.batch.flush_later(&handle);
        }
        room.presence.reject_queries(name, &mut self.batch);
        self.drop_room(name);
    }
}
