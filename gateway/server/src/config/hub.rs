//! Options of the hub.

use std::time::Duration;

use skein_core::hub::HubOptions;

use super::{
    reader::options,
    values::{Bounds, ByteSize},
};

options! {
    /// The hub.
    HubSection in "hub" {
        /// Number of tasks that the rooms of a node are distributed over. 0: one per core.
        shards: usize = "0", within 0..=256;
        /// Memory of a node for the newest entries of all rooms. Above it: fewer entries per room
        /// are held in memory.
        ring_bytes_max: ByteSize = "256MiB", within Bounds::usual_sizes();
        /// Memory of a node for message ids within `dedup.window`, which it restores to a Redis
        /// that lost them. Above it: the oldest ids are dropped.
        dedup_ids_bytes_max: ByteSize = "64MiB", within Bounds::usual_sizes();
        /// Rooms that a node is subscribed to, with members or recently left by the last one. A
        /// `join` of a further room: `limit_reached`.
        rooms_max: usize = "500000", within 1..=100_000_000;
        /// Rooms and inboxes without members that a node stays subscribed to for a while. Above it:
        /// the node unsubscribes from those that have been empty longest.
        empty_rooms_max: usize = "50000", within 0..=100_000_000;
        /// Users whose status a node observes for its connections. A `watch` of a further user:
        /// `limit_reached`.
        watched_users_max: usize = "200000", within 1..=100_000_000;
    }
}

impl HubSection {
    /// The number of tasks that rooms are distributed over.
    pub(super) fn shards(&self) -> usize {
        match self.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            shards => shards,
        }
    }

    /// Memory bounds of the hub.
    pub(super) fn hub(&self, dedup_window: Duration, log_ttl: Duration) -> HubOptions {
        HubOptions {
            ring_bytes_max: self.ring_bytes_max.0,
            dedup_ids_bytes_max: self.dedup_ids_bytes_max.0,
            dedup_window,
            log_ttl,
            rooms_max: self.rooms_max,
            empty_rooms_max: self.empty_rooms_max,
            watched_users_max: self.watched_users_max,
        }
    }
}
