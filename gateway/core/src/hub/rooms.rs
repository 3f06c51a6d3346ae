//! The rooms of a shard: which ones it is subscribed to, and the memory that they take together.

use std::collections::HashMap;

use skein_protocol::ids::{RoomId, RoomKind};
use tokio::time::Instant;

use super::{
    budget::{MemoryBudget, RoomMemory},
    commands::HubOptions,
    lingering::Lingering,
    member::ShardBatch,
    room::Room,
};
use crate::rooms::RoomRules;

/// The rooms that a shard is subscribed to.
pub(super) struct Rooms {
    /// Boxed, since a map allocates more slots than it uses.
    rooms: HashMap<RoomId, Box<Room>>,
    /// Counts subscriptions, so that a late result for an earlier subscription is not applied to a
    /// later one.
    subscriptions: u64,
    /// The number of rooms that are not inboxes.
    joined: usize,
    joined_max: usize,
    lingering: Lingering,
    empty_max: usize,
    budget: MemoryBudget,
    /// The number of memberships at the last count.
    members: usize,
}

impl Rooms {
    pub(super) fn new(options: &HubOptions, budget: MemoryBudget) -> Self {
        Self {
            rooms: HashMap::new(),
            subscriptions: 0,
            joined: 0,
            joined_max: options.rooms_max,
            lingering: Lingering::default(),
            empty_max: options.empty_rooms_max,
            budget,
            members: 0,
        }
    }

    pub(super) fn get(&self, name: &RoomId) -> Option<&Room> {
        self.rooms.get(name).map(|room| &**room)
    }

    pub(super) fn get_mut(&mut self, name: &RoomId) -> Option<&mut Room> {
        self.rooms.get_mut(name).map(|room| &mut **room)
    }

    /// A room, unless `subscription` has ended since.
    pub(super) fn current(&mut self, name: &RoomId, subscription: u64) -> Option<&mut Room> {
        self.get_mut(name).filter(|room| room.subscription == subscription)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Room> {
        self.rooms.values().map(|room| &**room)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Room> {
        self.rooms.values_mut().map(|room| &mut **room)
    }

    /// The names of all rooms, sorted.
    pub(super) fn names(&self) -> Vec<RoomId> {
        let mut names: Vec<RoomId> = self.rooms.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Whether the node may subscribe to no further room.
    pub(super) fn is_full(&self) -> bool {
        self.joined >= self.joined_max
    }

    /// Adds a room that is being opened.
    pub(super) fn open(&mut self, name: &RoomId, rules: &RoomRules) -> &mut Room {
        self.joined += usize::from(name.kind() == RoomKind::Room);
        self.subscriptions += 1;
        let room = Room::opening(name.clone(), self.subscriptions, rules);
        self.rooms.entry(name.clone()).or_insert(Box::new(room))
    }

    /// Removes a room. `false`: there was none.
    pub(super) fn remove(&mut self, name: &RoomId) -> bool {
        let Some(room) = self.rooms.remove(name) else { return false };
        self.joined -= usize::from(name.kind() == RoomKind::Room);
        self.budget.forget(&room);
        self.lingering.remove(name);
        true
    }

    /// Lets a room linger once it is empty, and no longer once it is used.
    pub(super) fn note_use(&mut self, name: &RoomId, now: Instant) {
        match self.rooms.get(name) {
            Some(room) if room.is_empty() => self.lingering.insert(name, now),
            _ => self.lingering.remove(name),
        }
    }

    /// Keeps a room that is about to be used.
    pub(super) fn keep(&mut self, name: &RoomId) {
        self.lingering.remove(name);
    }

    /// Takes the empty room that has lingered longest, to be removed.
    pub(super) fn oldest_empty(&mut self) -> Option<RoomId> {
        self.lingering.pop_oldest()
    }

    /// As [`Rooms::oldest_empty`], if there are more empty rooms than the limit allows.
    pub(super) fn excess_empty(&mut self) -> Option<RoomId> {
        if self.lingering.len() > self.empty_max { self.lingering.pop_oldest() } else { None }
    }

    /// Takes an empty room that has lingered for its time, to be removed.
    pub(super) fn expired_empty(&mut self, now: Instant) -> Option<RoomId> {
        self.lingering.pop_due(now)
    }

    /// Changes the replica of a room within the memory budget.
    pub(super) fn change<T>(
        &mut self,
        name: &RoomId,
        batch: &mut ShardBatch,
        change: impl FnOnce(&mut Room, &mut ShardBatch) -> T,
    ) -> Option<T> {
        batch.retention.ring = self.budget.ring_limits();
        let room = self.rooms.get_mut(name)?;
        let before = RoomMemory::of(room);
        let result = change(room, batch);
        self.budget.count(before, room, batch.retention.now);
        Some(result)
    }

    /// Removes ids that are older than the dedup window, and the oldest ids while all ids exceed
    /// the memory budget.
    pub(super) fn forget_ids(&mut self, now: Instant) {
        while let Some(bucket) = self.budget.next_to_forget(now) {
            let room = self.rooms.get_mut(&bucket.room);
            let Some(room) = room.filter(|room| room.subscription == bucket.subscription) else {
                continue;
            };
            if room.replica.ids().oldest() == Some(bucket.since) {
                let before = RoomMemory::of(room);
                room.replica.forget_oldest_ids();
                self.budget.count(before, room, now);
            }
        }
    }

    /// Frees what is no longer needed, and counts the members.
    pub(super) fn tick(&mut self, batch: &ShardBatch) {
        self.forget_ids(batch.retention.now);
        let mut members = 0;
        for room in self.rooms.values_mut() {
            room.joins.remove_cancelled();
            let before = RoomMemory::of(room);
            room.replica.forget_past_retention(&batch.retention);
            self.budget.count(before, room, batch.retention.now);
            if room.name.kind() == RoomKind::Room {
                members += room.members.len();
            }
        }
        batch.metrics.members.add(members as i64 - self.members as i64);
        self.members = members;
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::{
        super::members::samples::{batch, member},
        *,
    };
    use crate::delivery::samples::{entry, page, position};

    fn rooms(ring_bytes_max: usize) -> Rooms {
        let options = HubOptions {
            ring_bytes_max,
            dedup_ids_bytes_max: 1 << 20,
            dedup_window: Duration::from_secs(600),
            log_ttl: Duration::from_secs(3600),
            rooms_max: 1,
            empty_rooms_max: 1,
            watched_users_max: 1,
        };
        Rooms::new(&options, MemoryBudget::new(&options, Arc::default()))
    }

    #[test]
    fn room_lingers_only_while_it_is_empty() {
        let (mut rooms, batch) = (rooms(1 << 20), batch());
        let (name, now) = ("r".parse().unwrap(), batch.retention.now);
        let room = rooms.open(&name, &RoomRules::default());
        room.members.add(member(1, position("1-e", 0)));
        let connection = room.members.iter().next().unwrap().handle.connection;
        assert!(rooms.is_full());
        rooms.note_use(&name, now);
        assert_eq!(rooms.oldest_empty(), None);
        rooms.get_mut(&name).unwrap().members.remove(connection);
        rooms.note_use(&name, now);
        assert_eq!(rooms.excess_empty(), None, "one may linger");
        rooms.keep(&name);
        assert_eq!(rooms.expired_empty(now + Duration::from_secs(60)), None);
        rooms.note_use(&name, now);
        assert_eq!(rooms.expired_empty(now + Duration::from_secs(60)), Some(name.clone()));
        assert!(rooms.remove(&name) && !rooms.remove(&name) && !rooms.is_full());
    }

    #[test]
    fn rings_shrink_while_all_exceed_the_budget() {
        let (mut rooms, mut batch) = (rooms(5_000), batch());
        let name = "r".parse().unwrap();
        let subscription = rooms.open(&name, &RoomRules::default()).subscription;
        let read = |room: &mut Room, batch: &mut ShardBatch| {
            room.apply_page(page("1-e", 1..=200, 200), batch)
        };
        assert!(rooms.change(&name, &mut batch, read).is_some());
        assert_eq!(rooms.current(&name, subscription).unwrap().replica.ring().len(), 200);
        let receive =
            |room: &mut Room, batch: &mut ShardBatch| room.receive(entry("1-e", 201), batch);
        assert!(rooms.change(&name, &mut batch, receive).is_some());
        assert!(rooms.current(&name, subscription).unwrap().replica.ring().len() <= 16);
        assert!(rooms.current(&name, subscription + 1).is_none());
        assert!(rooms.remove(&name));
        assert_eq!(rooms.budget.ring_limits().entries, 256, "the memory is free again");
    }
}
