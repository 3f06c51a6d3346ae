//! Resyncs: comparison of the logs of all rooms with their replicas, after entries may have been
//! lost; and of the logs of idle rooms, in case a loss showed in no other way.

use std::{collections::HashSet, sync::Arc, time::Duration};

use skein_protocol::ids::RoomId;
use tokio::time::Instant;

use super::{log_reads::LogReads, rooms::Rooms};
use crate::{bus::ResyncRequest, delivery::replica::ReadState};

/// The interval at which a shard compares the heads of idle rooms' logs with its replicas. It
/// bounds the time to detect a lost subscription that shows in no other way: at most twice this.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(5);

/// The resyncs of a shard.
pub(super) struct Resync {
    request: Arc<ResyncRequest>,
    /// The number of requests that the shard has seen.
    seen: u64,
    /// The request that is complete once no room is unverified.
    running: u64,
    /// Rooms in which entries may have been lost that no comparison has looked for yet.
    unverified: HashSet<RoomId>,
    /// The state of the read of log heads.
    reading: ReadState,
    /// The time at which the heads of idle rooms were last compared.
    compared_at: Instant,
}

impl Resync {
    pub(super) fn new(request: Arc<ResyncRequest>, now: Instant) -> Self {
        let (reading, unverified) = (ReadState::Idle, HashSet::new());
        Self { request, seen: 0, running: 0, unverified, reading, compared_at: now }
    }

    /// Notifies of requested resyncs.
    pub(super) fn request(&self) -> &Arc<ResyncRequest> {
        &self.request
    }

    /// Whether a resync was requested since the last call.
    pub(super) fn take_request(&mut self) -> bool {
        let seen = std::mem::replace(&mut self.seen, self.request.count());
        seen != self.seen
    }

    /// Begins a resync of all rooms: reads the heads of their logs. `false`: a read of heads is
    /// under way, and will be repeated.
    pub(super) fn begin(&mut self, rooms: &mut Rooms, reads: &LogReads) -> bool {
        if self.reading != ReadState::Idle {
            self.reading = ReadState::Again;
            return false;
        }
        self.running = self.seen;
        self.unverified.clear();
        let mut to_compare = Vec::new();
        for room in rooms.iter_mut().filter(|room| room.durable) {
            self.unverified.insert(room.name.clone());
            if !room.replica.read_again() {
                to_compare.push((room.name.clone(), room.subscription));
            }
        }
        self.read_heads(to_compare, reads);
        self.report_if_synced();
        true
    }

    /// Compares the log heads of rooms that have received nothing since the last comparison.
    pub(super) fn compare_idle(&mut self, now: Instant, rooms: &mut Rooms, reads: &LogReads) {
        if now - self.compared_at < COMPARE_INTERVAL || self.reading != ReadState::Idle {
            return;
        }
        self.compared_at = now;
        let mut idle = Vec::new();
        for room in rooms.iter_mut() {
            let received = room.take_received();
            if room.durable && !received && room.replica.read_state() == ReadState::Idle {
                idle.push((room.name.clone(), room.subscription));
            }
        }
        self.read_heads(idle, reads);
    }

    fn read_heads(&mut self, mut rooms: Vec<(RoomId, u64)>, reads: &LogReads) {
        if !rooms.is_empty() {
            rooms.sort_unstable();
            self.reading = ReadState::InProgress;
            reads.read_heads(rooms);
        }
    }

    /// Ends the read of heads. `true`: it must be repeated.
    pub(super) fn end_read(&mut self) -> bool {
        std::mem::replace(&mut self.reading, ReadState::Idle) == ReadState::Again
    }

    /// Marks a room as verified since the last resync, or as dropped.
    pub(super) fn mark_verified(&mut self, room: &RoomId) {
        if self.unverified.remove(room) {
            self.report_if_synced();
        }
    }

    fn report_if_synced(&mut self) {
        if self.unverified.is_empty() {
            self.unverified = HashSet::new();
            self.request.mark_synced(self.running);
        }
    }
}
