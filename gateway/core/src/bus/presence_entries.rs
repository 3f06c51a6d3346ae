//! The presence entries of this node: the one place that knows which user has how many connections
//! in which scope. Sessions hold a presence guard of an entry; the store reads the entries again
//! when it writes.
//!
//! The entries are spread over shards, so that two joins wait for each other only if they concern
//! the same shard. All entries of a room are in one shard and share its name in memory; those of the
//! cluster are spread by user.

use std::{
    borrow::Borrow,
    collections::BTreeSet,
    hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher, Hash},
    ops::Bound::{Excluded, Included, Unbounded},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};

use parking_lot::{Mutex, MutexGuard};
use skein_protocol::{
    ids::{RoomId, UserId},
    protocol::server_frame::UserInfo,
};

/// Where users are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PresenceScope {
    /// A room.
    Room(RoomId),
    /// The cluster: users with any connection.
    Cluster,
}

/// Milliseconds since 1970, by the clock of the writer.
pub type UnixMillis = u64;

/// The presence of one user in one scope on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePresence {
    /// The scope.
    pub scope: PresenceScope,
    /// The user.
    pub user: UserInfo,
    /// How many connections the user has in the scope on this node; 0 when the user leaves.
    pub connections: u32,
    /// When the first of them began.
    pub since: UnixMillis,
    /// When the user was last active.
    pub active: UnixMillis,
    /// Whether the user was admitted. A report of a user that was not makes nobody present that is
    /// not present already.
    pub admitted: bool,
}

/// The number of shards.
const SHARDS: usize = 16;

/// The presence entries of a node.
#[derive(Debug, Default)]
pub struct LocalPresences {
    /// The same in each run, so that a run of the simulation can be repeated.
    hasher: BuildHasherDefault<DefaultHasher>,
    shards: [Mutex<LocalShard>; SHARDS],
}

/// The entries of some rooms, and of the cluster for some users.
#[derive(Debug, Default)]
pub(crate) struct LocalShard {
    by_scope: BTreeSet<ByScope>,
    /// The entries of rooms once more.
    by_user: BTreeSet<ByUser>,
    /// The number of entries with the scope `Cluster`.
    connected: u64,
}

/// A user in one scope of this node. There is one for each user and room, so its size counts.
/// Its fields change only while its shard is locked, except `active`, `typed` and `admitted`.
#[derive(Debug)]
pub(crate) struct LocalPresence {
    pub(crate) scope: PresenceScope,
    pub(crate) user: UserInfo,
    since: UnixMillis,
    connections: AtomicU32,
    /// The id of the present grace period; 0: none.
    grace_id: AtomicU32,
    /// The time of the user's last activity.
    pub(crate) active: AtomicU64,
    /// The last published typing state and its time: milliseconds, shifted left by one bit.
    pub(crate) typed: AtomicU64,
    /// Whether the user was admitted.
    admitted: AtomicBool,
    /// Whether the store does not know `active` yet.
    pub(crate) active_is_unreported: AtomicBool,
    /// Whether the room was closed.
    closed: AtomicBool,
}

/// Defines the item of a set of shared entries, ordered and searched by a pair that is borrowed
/// from the entry. The second part of a searched pair is `None` before all entries that have the
/// first.
macro_rules! ordered_entry {
    ($item:ident, $search:ident, $first:ty, $second:ty, $entry:ident => $pair:expr) => {
        #[derive(Debug)]
        struct $item(Arc<LocalPresence>);

        trait $search {
            fn pair(&self) -> (&$first, Option<&$second>);
        }

        impl $search for $item {
            fn pair(&self) -> (&$first, Option<&$second>) {
                let $entry = &self.0;
                $pair
            }
        }

        impl $search for (&$first, Option<&$second>) {
            fn pair(&self) -> (&$first, Option<&$second>) {
                *self
            }
        }

        impl Ord for dyn $search + '_ {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.pair().cmp(&other.pair())
            }
        }

        impl PartialOrd for dyn $search + '_ {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl PartialEq for dyn $search + '_ {
            fn eq(&self, other: &Self) -> bool {
                self.pair() == other.pair()
            }
        }

        impl Eq for dyn $search + '_ {}

        impl Ord for $item {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                self.pair().cmp(&other.pair())
            }
        }

        impl PartialOrd for $item {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl PartialEq for $item {
            fn eq(&self, other: &Self) -> bool {
                self.pair() == other.pair()
            }
        }

        impl Eq for $item {}

        impl<'a> Borrow<dyn $search + 'a> for $item {
            fn borrow(&self) -> &(dyn $search + 'a) {
                self
            }
        }
    };
}

ordered_entry!(ByScope, ScopeAndUser, PresenceScope, str, entry => {
    (&entry.scope, Some(entry.user.id.as_str()))
});
ordered_entry!(ByUser, UserAndScope, UserId, PresenceScope, entry => {
    (&entry.user.id, Some(&entry.scope))
});

/// The change that the end of a connection makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectionEnd {
    /// The user has other connections in the scope.
    Fewer,
    /// It was the last one.
    Last,
    /// The room was closed before; the user may have joined another room of the same name since.
    Closed,
}

impl LocalPresences {
    /// Locks the entry of a user in a scope.
    pub(crate) fn lock(&self, scope: &PresenceScope, user: &UserId) -> MutexGuard<'_, LocalShard> {
        match scope {
            PresenceScope::Room(room) => self.lock_room(room),
            PresenceScope::Cluster => self.lock_hashed(user),
        }
    }

    /// Locks the entries of a room.
    pub(crate) fn lock_room(&self, room: &RoomId) -> MutexGuard<'_, LocalShard> {
        self.lock_hashed(room)
    }

    fn lock_hashed(&self, key: impl Hash) -> MutexGuard<'_, LocalShard> {
        self.shards[(self.hasher.hash_one(key) % SHARDS as u64) as usize].lock()
    }

    /// Locks one shard after another.
    pub(crate) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, LocalShard>> {
        self.shards.iter().map(Mutex::lock)
    }

    /// The presence of a user in a scope; `None`: the user is not there.
    pub fn report(&self, scope: &PresenceScope, user: &UserId) -> Option<NodePresence> {
        self.lock(scope, user).get(scope, user).map(|entry| entry.report())
    }

    /// Records that the store has admitted a user.
    pub fn set_admitted(&self, scope: &PresenceScope, user: &UserId) {
        if let Some(entry) = self.lock(scope, user).get(scope, user) {
            entry.set_admitted();
        }
    }

    /// All scopes and users, in an unspecified order.
    pub fn keys(&self) -> Vec<(PresenceScope, UserId)> {
        let mut keys = Vec::new();
        for shard in self.each() {
            keys.extend(shard.iter().map(|entry| (entry.scope.clone(), entry.user.id.clone())));
        }
        keys
    }

    /// The rooms in which a user is present, in order.
    pub(crate) fn rooms_of(&self, user: &UserId) -> Vec<RoomId> {
        let mut rooms = Vec::new();
        for shard in self.each() {
            let first: &dyn UserAndScope = &(user, None);
            let entries = shard.by_user.range::<dyn UserAndScope, _>((Included(first), Unbounded));
            let of_user = entries.map(|entry| &entry.0).take_while(|entry| entry.user.id == *user);
            rooms.extend(of_user.filter_map(|entry| entry.room().cloned()));
        }
        rooms.sort_unstable();
        rooms
    }

    /// The first `limit` users connected to this node whose ids follow `after`, in order, and the
    /// number of all connected users.
    pub(crate) fn connected(&self, after: &str, limit: usize) -> (Vec<NodePresence>, u64) {
        let (mut users, mut count) = (Vec::new(), 0);
        for shard in self.each() {
            count += shard.connected;
            let following = shard.following(&PresenceScope::Cluster, after);
            users.extend(following.take(limit).map(|entry| entry.report()));
        }
        users.sort_unstable_by(|a, b| a.user.id.cmp(&b.user.id));
        users.truncate(limit);
        (users, count)
    }
}

impl LocalShard {
    pub(crate) fn get(&self, scope: &PresenceScope, user: &UserId) -> Option<&Arc<LocalPresence>> {
        let key: &dyn ScopeAndUser = &(scope, Some(user.as_str()));
        self.by_scope.get(key).map(|entry| &entry.0)
    }

    /// Adds one connection of a user at `now`. Returns the entry, and whether it is new.
    pub(crate) fn connect(
        &mut self,
        scope: PresenceScope,
        user: &UserInfo,
        now: UnixMillis,
    ) -> (Arc<LocalPresence>, bool) {
        let known = self.get(&scope, &user.id).cloned();
        let is_new = known.is_none();
        let entry = known.unwrap_or_else(|| {
            // Entries of a room share its name in memory.
            let shared = self.at(&scope).next().map(|other| other.scope.clone());
            let scope = shared.unwrap_or(scope);
            let entry = Arc::new(LocalPresence::new(scope, user.clone(), now));
            self.insert(&entry);
            entry
        });
        entry.connections.fetch_add(1, Relaxed);
        entry.grace_id.store(0, Relaxed);
        entry.active.store(now, Relaxed);
        (entry, is_new)
    }

    /// Removes one connection of a user. After the last one the entry stays; the caller begins a
    /// grace period or removes it.
    pub(crate) fn disconnect(&mut self, entry: &LocalPresence) -> ConnectionEnd {
        if entry.is_closed() {
            return ConnectionEnd::Closed;
        }
        match entry.connections.fetch_sub(1, Relaxed) {
            1 => ConnectionEnd::Last,
            _ => ConnectionEnd::Fewer,
        }
    }

    /// Begins the grace period `id`, which is not 0.
    pub(crate) fn begin_grace(&mut self, entry: &LocalPresence, id: u32) {
        entry.grace_id.store(id, Relaxed);
    }

    /// Ends the grace period `id`. `false`: the user has returned since.
    pub(crate) fn end_grace(&mut self, entry: &LocalPresence, id: u32) -> bool {
        let ends = entry.grace_id.compare_exchange(id, 0, Relaxed, Relaxed).is_ok();
        if ends {
            self.remove(entry);
        }
        ends
    }

    /// Closes all entries of a room, and returns them.
    pub(crate) fn close(&mut self, scope: &PresenceScope) -> Vec<Arc<LocalPresence>> {
        let closed: Vec<Arc<LocalPresence>> = self.at(scope).cloned().collect();
        for entry in &closed {
            entry.closed.store(true, Release);
            entry.connections.store(0, Relaxed);
            entry.grace_id.store(0, Relaxed);
            self.remove(entry);
        }
        closed
    }

    /// All entries.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<LocalPresence>> {
        self.by_scope.iter().map(|entry| &entry.0)
    }

    fn insert(&mut self, entry: &Arc<LocalPresence>) {
        self.by_scope.insert(ByScope(entry.clone()));
        match entry.room() {
            Some(_) => drop(self.by_user.insert(ByUser(entry.clone()))),
            None => self.connected += 1,
        }
    }

    pub(crate) fn remove(&mut self, entry: &LocalPresence) {
        let by_scope: &dyn ScopeAndUser = &(&entry.scope, Some(entry.user.id.as_str()));
        let by_user: &dyn UserAndScope = &(&entry.user.id, Some(&entry.scope));
        if self.by_scope.remove(by_scope) {
            match entry.room() {
                Some(_) => drop(self.by_user.remove(by_user)),
                None => self.connected -= 1,
            }
        }
    }

    /// The entries of a scope, by user.
    fn at<'a>(&'a self, scope: &'a PresenceScope) -> impl Iterator<Item = &'a Arc<LocalPresence>> {
        let first: &dyn ScopeAndUser = &(scope, None);
        let entries = self.by_scope.range::<dyn ScopeAndUser, _>((Included(first), Unbounded));
        entries.map(|entry| &entry.0).take_while(move |entry| entry.scope == *scope)
    }

    /// The entries of a scope whose users follow `after`.
    fn following<'a>(
        &'a self,
        scope: &'a PresenceScope,
        after: &str,
    ) -> impl Iterator<Item = &'a Arc<LocalPresence>> {
        let first: &dyn ScopeAndUser = &(scope, Some(after));
        let entries = self.by_scope.range::<dyn ScopeAndUser, _>((Excluded(first), Unbounded));
        entries.map(|entry| &entry.0).take_while(move |entry| entry.scope == *scope)
    }
}

impl LocalPresence {
    fn new(scope: PresenceScope, user: UserInfo, now: UnixMillis) -> Self {
        // The cluster scope has no admission.
        let admitted = scope == PresenceScope::Cluster;
        Self {
            scope,
            user,
            since: now,
            connections: 0.into(),
            grace_id: 0.into(),
            active: now.into(),
            typed: 0.into(),
            admitted: admitted.into(),
            active_is_unreported: false.into(),
            closed: false.into(),
        }
    }

    pub(crate) fn report(&self) -> NodePresence {
        let is_in_grace = u32::from(self.grace_id.load(Relaxed) != 0);
        NodePresence {
            scope: self.scope.clone(),
            user: self.user.clone(),
            connections: self.connections.load(Relaxed).max(is_in_grace),
            since: self.since,
            active: self.active.load(Relaxed),
            admitted: self.admitted.load(Relaxed),
        }
    }

    /// The room; `None` for the cluster.
    pub(crate) fn room(&self) -> Option<&RoomId> {
        match &self.scope {
            PresenceScope::Room(room) => Some(room),
            PresenceScope::Cluster => None,
        }
    }

    pub(crate) fn set_admitted(&self) {
        self.admitted.store(true, Relaxed);
    }

    /// Whether the room was closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn person(id: &str) -> UserInfo {
        UserInfo { id: id.parse().unwrap(), name: id.parse().unwrap() }
    }

    fn room(name: &str) -> PresenceScope {
        PresenceScope::Room(name.parse().unwrap())
    }

    fn connect(all: &LocalPresences, scope: PresenceScope, id: &str) -> Arc<LocalPresence> {
        let user = person(id);
        all.lock(&scope, &user.id).connect(scope.clone(), &user, 1).0
    }

    #[test]
    fn rooms_of_a_user_and_users_of_the_cluster_are_in_order() {
        let all = LocalPresences::default();
        for number in 0..100 {
            let id = format!("u{number:02}");
            connect(&all, PresenceScope::Cluster, &id);
            connect(&all, room("lobby"), &id);
        }
        for name in ["b", "a"] {
            connect(&all, room(name), "u42");
        }
        let rooms = all.rooms_of(&person("u42").id);
        assert_eq!(rooms.iter().map(RoomId::as_str).collect::<Vec<_>>(), ["a", "b", "lobby"]);
        assert!(all.rooms_of(&person("u4").id).is_empty());
        let (users, count) = all.connected("u41", 3);
        let ids: Vec<&str> = users.iter().map(|of| of.user.id.as_str()).collect();
        assert_eq!((ids, count), (vec!["u42", "u43", "u44"], 100));
        assert_eq!(all.connected("u98", 3).0.len(), 1);
        assert_eq!(all.keys().len(), 202);
    }

    #[test]
    fn entry_counts_connections_until_the_last_one_or_the_close_of_its_room() {
        let (all, user) = (LocalPresences::default(), person("ann"));
        let entry = connect(&all, room("a"), "ann");
        assert!(Arc::ptr_eq(&entry, &connect(&all, room("a"), "ann")));
        let report = || all.report(&room("a"), &user.id).map(|of| of.connections);
        assert_eq!(report(), Some(2));
        assert_eq!(all.lock(&room("a"), &user.id).disconnect(&entry), ConnectionEnd::Fewer);
        assert_eq!(all.lock(&room("a"), &user.id).disconnect(&entry), ConnectionEnd::Last);
        all.lock(&room("a"), &user.id).begin_grace(&entry, 7);
        assert_eq!(report(), Some(1), "the user is present during the grace period");
        assert!(
            !all.lock(&room("a"), &user.id).end_grace(&entry, 6)
                && all.lock(&room("a"), &user.id).end_grace(&entry, 7)
        );
        assert_eq!(report(), None);

        let entry = connect(&all, room("a"), "ann");
        let closed = all.lock(&room("a"), &user.id).close(&room("a"));
        assert!(closed.len() == 1 && entry.is_closed() && report().is_none());
        let next = connect(&all, room("a"), "ann");
        assert_eq!(all.lock(&room("a"), &user.id).disconnect(&entry), ConnectionEnd::Closed);
        assert!(report() == Some(1) && !next.is_closed());
    }
}
