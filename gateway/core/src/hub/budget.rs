//! The memory that all rooms of a shard take together, and the ids to drop when it exceeds the
//! bound.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use skein_protocol::ids::RoomId;
use tokio::time::Instant;

use super::{commands::HubOptions, room::Room};
use crate::{
    delivery::{recent_ids, ring::RingLimits},
    telemetry::metrics::Metrics,
};

/// The memory of a shard's rooms, in bytes.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    ring_bytes: usize,
    ring_bytes_max: usize,
    ids_bytes: usize,
    dedup_ids_bytes_max: usize,
    dedup_window: Duration,
    /// Every bucket of ids, oldest first.
    buckets: VecDeque<BucketRef>,
    metrics: Arc<Metrics>,
}

/// A reference to one bucket of a room's ids.
#[derive(Clone, Debug)]
pub(super) struct BucketRef {
    pub(super) since: Instant,
    pub(super) room: RoomId,
    pub(super) subscription: u64,
}

/// The memory of one room.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RoomMemory {
    ring_bytes: usize,
    ids_bytes: usize,
    buckets_started: u64,
}

impl RoomMemory {
    pub(super) fn of(room: &Room) -> Self {
        let ids = room.replica.ids();
        Self {
            ring_bytes: room.replica.ring().bytes(),
            ids_bytes: ids.bytes(),
            buckets_started: ids.buckets_started(),
        }
    }
}

impl MemoryBudget {
    pub(super) fn new(options: &HubOptions, metrics: Arc<Metrics>) -> Self {
        Self {
            ring_bytes: 0,
            ring_bytes_max: options.ring_bytes_max,
            ids_bytes: 0,
            dedup_ids_bytes_max: options.dedup_ids_bytes_max,
            dedup_window: options.dedup_window,
            buckets: VecDeque::new(),
            metrics,
        }
    }

    /// The limits of a single ring, given the total of all rings.
    pub(super) fn ring_limits(&self) -> RingLimits {
        if self.ring_bytes > self.ring_bytes_max {
            RingLimits::UNDER_PRESSURE
        } else {
            RingLimits::DEFAULT
        }
    }

    /// Updates the totals by the difference between `before` and the room's present memory.
    pub(super) fn count(&mut self, before: RoomMemory, room: &Room, now: Instant) {
        let after = RoomMemory::of(room);
        for _ in before.buckets_started..after.buckets_started {
            let (room, subscription) = (room.name.clone(), room.subscription);
            self.buckets.push_back(BucketRef { since: now, room, subscription });
        }
        self.replace(before, after);
    }

    /// Removes a room that the node has unsubscribed from.
    pub(super) fn forget(&mut self, room: &Room) {
        self.replace(RoomMemory::of(room), RoomMemory::default());
    }

    fn replace(&mut self, before: RoomMemory, after: RoomMemory) {
        self.ring_bytes = replaced(self.ring_bytes, before.ring_bytes, after.ring_bytes);
        self.ids_bytes = replaced(self.ids_bytes, before.ids_bytes, after.ids_bytes);
        self.metrics.ring_bytes.add(after.ring_bytes as i64 - before.ring_bytes as i64);
        self.metrics.dedup_ids_bytes.add(after.ids_bytes as i64 - before.ids_bytes as i64);
    }

    /// Takes the next bucket to drop: one older than the window, or the oldest while all buckets
    /// exceed the bound.
    pub(super) fn next_to_forget(&mut self, now: Instant) -> Option<BucketRef> {
        let is_expired =
            recent_ids::is_expired(self.buckets.front()?.since, self.dedup_window, now);
        let too_much = self.ids_bytes > self.dedup_ids_bytes_max;
        if too_much && !is_expired {
            self.metrics.dedup_id_buckets_dropped.inc();
        }
        if too_much || is_expired { self.buckets.pop_front() } else { None }
    }
}

/// The bytes of all rooms after those of one room have changed.
fn replaced(all: usize, before: usize, after: usize) -> usize {
    assert!(all >= before, "the {all} bytes of all rooms do not include the {before} of one");
    all - before + after
}
