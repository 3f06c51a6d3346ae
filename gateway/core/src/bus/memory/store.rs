//! Presence and rooms of a single node, in this process's memory. The reference for
//! [`PresenceStore`].

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap},
    ops::Bound,
    time::Duration,
};

use rand::RngExt as _;
use skein_protocol::{
    ids::{ConnectionId, DisplayName, RoomId, UserId},
    position::Seq,
    protocol::server_frame::{RoomClosedReason, UserInfo},
};
use tokio::time::Instant;

use super::{MemoryBus, ready};
use crate::{
    bus::{
        Appended, BoxFuture, BusError,
        presence_store::{
            AdmitError, EphemeralEvent, JoinConditions, JoinSnapshot, NodePresence, OnlinePage,
            OnlineStatus, PresenceChange, PresenceDetails, PresenceScope, PresenceSnapshot,
            PresenceStore, PresenceVersion, UnixMillis, UserPresence,
        },
        room_store::{CreateOutcome, DeleteOutcome, RoomConfig, RoomPage, RoomStore, RoomSummary},
        ticket::PublishTicket,
    },
    telemetry::metrics::StorageLimit,
};

/// Presence, rooms and read marks. Rooms without members and settings have no entry.
#[derive(Default)]
pub(super) struct StoreState {
    rooms: BTreeMap<RoomId, RoomEntry>,
    read_marks: HashMap<RoomId, BTreeMap<UserId, Seq>>,
    /// When offline users were last active.
    last_seen: HashMap<UserId, UnixMillis>,
    /// The number of managed rooms of each owner.
    owned: HashMap<UserId, usize>,
}

/// The most offline users whose last activity is remembered.
const LAST_SEEN_MAX: usize = 10_000;

#[derive(Default)]
struct RoomEntry {
    present: ScopePresence,
    config: Option<RoomConfig>,
    /// When the first of the present members joined.
    since: UnixMillis,
    /// When the last member left.
    empty_since: Option<Instant>,
}

/// The presence in one scope.
#[derive(Default)]
struct ScopePresence {
    version: PresenceVersion,
    users: BTreeMap<UserId, PresenceRow>,
}

struct PresenceRow {
    name: DisplayName,
    connections: u32,
    since: UnixMillis,
    active: UnixMillis,
}

impl ScopePresence {
    /// Applies a node's report. Returns the change, if the presence has changed.
    fn apply(&mut self, report: NodePresence) -> Option<PresenceChange> {
        let NodePresence { user, connections, since, active, admitted, .. } = report;
        let (mut joined, mut left) = (Vec::new(), Vec::new());
        if connections == 0 {
            self.users.remove(&user.id)?;
            left.push(user.id);
        } else if let Some(row) = self.users.get_mut(&user.id) {
            row.connections = connections;
            row.active = row.active.max(active);
            return None;
        } else if !admitted {
            return None;
        } else {
            let row = PresenceRow { name: user.name.clone(), connections, since, active };
            if self.users.is_empty() {
                self.version =
                    PresenceVersion { epoch: rand::rng().random_range(1..1 << 53), number: 0 };
            }
            self.users.insert(user.id.clone(), row);
            joined.push(user);
        }
        self.version.number += 1;
        Some(PresenceChange { version: self.version, joined, left })
    }

    fn snapshot(&self) -> PresenceSnapshot {
        let person = |(id, row): (&UserId, &PresenceRow)| UserInfo {
            id: id.clone(),
            name: row.name.clone(),
        };
        let users = self.users.iter().map(person).collect();
        PresenceSnapshot { version: self.version, users, complete: true }
    }

    fn detail(&self, user: &UserId, read: Seq) -> Option<UserPresence> {
        let PresenceRow { name, connections, since, active } = self.users.get(user)?;
        let user = UserInfo { id: user.clone(), name: name.clone() };
        let (connections, since, active) = (u64::from(*connections), *since, *active);
        Some(UserPresence { user, connections, since, active, read })
    }
}

impl StoreState {
    /// Removes managed rooms that have been empty for longer than `ttl`.
    pub(super) fn sweep(&mut self, ttl: Duration, now: Instant) {
        let owned = &mut self.owned;
        self.rooms.retain(|_, room| {
            let is_kept = room.empty_since.is_none_or(|since| now - since <= ttl);
            if !is_kept {
                disown(owned, room);
            }
            is_kept
        });
    }

    /// Whether the last activity of an offline user is remembered.
    pub(super) fn has_last_seen(&self, user: &UserId) -> bool {
        self.last_seen.contains_key(user)
    }

    /// Removes read marks of rooms whose log was removed.
    pub(super) fn sweep_read_marks(&mut self, is_kept: impl Fn(&RoomId) -> bool) {
        self.read_marks.retain(|room, _| is_kept(room));
    }

    fn read_mark_of(&self, room: &RoomId, user: &UserId, top: Seq) -> Seq {
        let mark = self.read_marks.get(room).and_then(|marks| marks.get(user));
        mark.copied().unwrap_or(0).min(top)
    }

    /// Records that a user has come online or gone offline.
    fn record_last_seen(&mut self, report: &NodePresence) {
        if report.connections > 0 {
            self.last_seen.remove(&report.user.id);
            return;
        }
        if self.last_seen.len() >= LAST_SEEN_MAX {
            let mut times: Vec<UnixMillis> = self.last_seen.values().copied().collect();
            times.sort_unstable();
            let half = times[times.len() / 2];
            self.last_seen.retain(|_, active| *active > half);
        }
        self.last_seen.insert(report.user.id.clone(), report.active);
    }

    fn apply(&mut self, report: NodePresence, now: Instant) -> Option<(RoomId, PresenceChange)> {
        let name = match &report.scope {
            // The node knows its own connections.
            PresenceScope::Cluster => {
                self.record_last_seen(&report);
                return None;
            }
            PresenceScope::Room(room) => room.clone(),
        };
        if report.connections == 0 && !self.rooms.contains_key(&name) {
            return None;
        }
        let room = self.rooms.entry(name.clone()).or_default();
        if room.present.users.is_empty() {
            room.since = report.since;
        }
        let change = room.present.apply(report);
        room.empty_since = room.present.users.is_empty().then_some(now);
        if room.empty_since.is_some() && room.config.is_none() {
            self.rooms.remove(&name);
        }
        Some((name, change?))
    }

    /// Checks the conditions of a join. `has_log`: the room's log has entries.
    fn check_conditions(
        &self,
        name: &RoomId,
        user: &UserId,
        conditions: &JoinConditions,
        has_log: bool,
    ) -> Result<(), AdmitError> {
        let Some(room) = self.rooms.get(name) else {
            return match conditions.create {
                true if conditions.within_quota || has_log => Ok(()),
                true => Err(AdmitError::Quota),
                false => Err(AdmitError::NotFound),
            };
        };
        let Some(config) = &room.config else { return Ok(()) };
        if config.password.is_some() && config.password != conditions.password_hash {
            return Err(AdmitError::WrongPassword);
        }
        let members = room.present.users.len();
        let full = config.max_members.is_some_and(|max| members >= max as usize);
        if full && !room.present.users.contains_key(user) {
            return Err(AdmitError::Full);
        }
        Ok(())
    }
}

/// Counts one room less for the owner of a deleted room.
fn disown(owned: &mut HashMap<UserId, usize>, room: &RoomEntry) {
    let Some(config) = &room.config else { return };
    if let Some(count) = owned.get_mut(&config.owner) {
        *count -= 1;
        if *count == 0 {
            owned.remove(&config.owner);
        }
    }
}

impl RoomEntry {
    fn summary(&self, room: RoomId) -> RoomSummary {
        let members = self.present.users.len() as u64;
        RoomSummary { room, config: self.config.clone(), members, since: self.since }
    }
}

impl MemoryBus {
    fn top(&self, room: &RoomId) -> Seq {
        self.top_and_deletion(room).0
    }

    fn top_and_deletion(&self, room: &RoomId) -> (Seq, u64) {
        self.logs.lock().logs.get(room).map_or((0, 0), |log| (log.top, log.deleted))
    }

    /// Events are sent under the lock, so that changes enter the mailbox in their order.
    fn admit_now(
        &self,
        report: NodePresence,
        conditions: Option<&JoinConditions>,
        admit: bool,
    ) -> Result<JoinSnapshot, AdmitError> {
        let PresenceScope::Room(room) = report.scope.clone() else {
            let status = RoomId::status_of(&report.user.id);
            self.store.lock().apply(report, Instant::now());
            if self.logs.lock().subscribed.contains_key(&status) {
                self.mailboxes.send_ephemeral(status, EphemeralEvent::Status);
            }
            return Ok(JoinSnapshot::default());
        };
        let user = report.user.id.clone();
        let (top, deleted) = self.top_and_deletion(&room);
        let store = &mut *self.store.lock();
        let created = conditions.is_some() && top == 0 && !store.rooms.contains_key(&room);
        if let Some(conditions) = conditions {
            store.check_conditions(&room, &user, conditions, top > 0)?;
        }
        // A user that has met the conditions is admitted.
        let report = NodePresence { admitted: report.admitted || admit, ..report };
        if let Some((room, change)) = store.apply(report, Instant::now()) {
            self.mailboxes.send_ephemeral(room, EphemeralEvent::Presence(change));
        }
        let present = store.rooms.get(&room).map(|room| &room.present);
        Ok(JoinSnapshot {
            version: present.map(|present| present.version).unwrap_or_default(),
            count: present.map_or(0, |present| present.users.len() as u64),
            read: store.read_mark_of(&room, &user, top),
            deleted,
            created,
        })
    }

    fn delete_now(
        &self,
        room: &RoomId,
        owner: Option<&UserId>,
        by: Option<ConnectionId>,
    ) -> DeleteOutcome {
        let has_log = self.top(room) > 0;
        {
            let store = &mut *self.store.lock();
            let entry = store.rooms.get(room);
            let config = entry.and_then(|entry| entry.config.as_ref());
            match owner {
                Some(owner) if config.is_none_or(|config| config.owner != *owner) => {
                    let exists = entry.is_some();
                    return if exists { DeleteOutcome::NotOwner } else { DeleteOutcome::NotFound };
                }
                None if entry.is_none() && !has_log => return DeleteOutcome::NotFound,
                _ => {}
            }
            if let Some(room) = store.rooms.remove(room) {
                disown(&mut store.owned, &room);
            }
            store.read_marks.remove(room);
            self.mailboxes.send_ephemeral(
                room.clone(),
                EphemeralEvent::Closed { reason: RoomClosedReason::Deleted, by },
            );
        }
        self.delete_log(room);
        DeleteOutcome::Deleted
    }
}

/// The keys that follow `after` and are not below `from`.
fn keys_after<'a, K: Ord + Borrow<str>, V>(
    map: &'a BTreeMap<K, V>,
    from: &str,
    after: &str,
) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V> {
    let bound = if after >= from { Bound::Excluded(after) } else { Bound::Included(from) };
    map.range::<str, _>((bound, Bound::Unbounded))
}

impl PresenceStore for MemoryBus {
    fn track(&self, report: NodePresence) {
        // Without conditions no user is rejected.
        let _ = self.admit_now(report, None, false);
    }

    fn admit(
        &self,
        report: NodePresence,
        conditions: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        ready(self.admit_now(report, conditions.as_ref(), true))
    }

    fn snapshots(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<PresenceSnapshot>, BusError>> {
        let store = self.store.lock();
        let snapshot = |room| match store.rooms.get(room) {
            Some(RoomEntry { present, .. }) => present.snapshot(),
            None => ScopePresence::default().snapshot(),
        };
        ready(Ok(rooms.iter().map(snapshot).collect()))
    }

    fn details(
        &self,
        room: RoomId,
        users: Vec<UserId>,
    ) -> BoxFuture<Result<PresenceDetails, BusError>> {
        let top = self.top(&room);
        let store = self.store.lock();
        let mut details = PresenceDetails::default();
        if let Some(RoomEntry { present, .. }) = store.rooms.get(&room) {
            details.version = present.version;
            let detail = |user| present.detail(user, store.read_mark_of(&room, user, top));
            details.users = users.iter().filter_map(detail).collect();
        }
        ready(Ok(details))
    }

    fn online(&self, _: String, _: usize) -> BoxFuture<Result<Option<OnlinePage>, BusError>> {
        ready(Ok(None))
    }

    fn statuses(&self, users: Vec<UserId>) -> BoxFuture<Result<Vec<OnlineStatus>, BusError>> {
        let store = self.store.lock();
        let status = |user| {
            let active = store.last_seen.get(user).copied();
            OnlineStatus { online: false, active, complete: true }
        };
        ready(Ok(users.iter().map(status).collect()))
    }

    fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId) {
        let top = self.top(&room);
        let store = &mut *self.store.lock();
        let seq = seq.min(top);
        if seq > store.read_mark_of(&room, &user, top) {
            let marks = store.read_marks.entry(room.clone()).or_default();
            let read_marks_max = self.retention.limits.read_marks_max as usize;
            if marks.len() >= read_marks_max && !marks.contains_key(&user) {
                self.mailboxes.metrics().storage_rejections.of(StorageLimit::ReadMarks).inc();
                return;
            }
            marks.insert(user.clone(), seq);
            self.mailboxes.send_ephemeral(room, EphemeralEvent::Read { user, seq, by });
        }
    }

    fn publish_ephemeral(&self, room: RoomId, event: EphemeralEvent, ticket: PublishTicket) {
        self.mailboxes.send_ephemeral(room, event);
        ticket.complete(Ok(Appended::without_log()));
    }
}

impl RoomStore for MemoryBus {
    fn create(
        &self,
        room: RoomId,
        config: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>> {
        let has_log = self.top(&room) > 0;
        let StoreState { rooms, owned, .. } = &mut *self.store.lock();
        if has_log || rooms.contains_key(&room) {
            return ready(Ok(CreateOutcome::Exists));
        }
        let count = owned.get(&config.owner).copied().unwrap_or(0);
        if owned_max.is_some_and(|max| count >= max) {
            return ready(Ok(CreateOutcome::QuotaExceeded));
        }
        owned.insert(config.owner.clone(), count + 1);
        let empty_since = Some(Instant::now());
        rooms.insert(room, RoomEntry { config: Some(config), empty_since, ..RoomEntry::default() });
        ready(Ok(CreateOutcome::Created))
    }

    fn find(&self, room: RoomId) -> BoxFuture<Result<Option<RoomSummary>, BusError>> {
        let store = self.store.lock();
        ready(Ok(store.rooms.get(&room).map(|entry| entry.summary(room))))
    }

    fn list(
        &self,
        prefix: String,
        after: String,
        limit: usize,
        all: bool,
    ) -> BoxFuture<Result<RoomPage, BusError>> {
        let store = self.store.lock();
        let is_public = |room: &RoomEntry| room.config.as_ref().is_none_or(|config| config.public);
        let mut rooms = keys_after(&store.rooms, &prefix, &after)
            .take_while(|(name, _)| name.as_str().starts_with(&prefix))
            .filter(|(_, room)| all || is_public(room));
        let page = rooms.by_ref().take(limit);
        let page: Vec<RoomSummary> = page.map(|(name, room)| room.summary(name.clone())).collect();
        let last = page.last().map(|entry| entry.room.to_string());
        let next = rooms.next().and(last);
        ready(Ok(RoomPage { rooms: page, next }))
    }

    fn delete_room(
        &self,
        room: RoomId,
        owner: Option<UserId>,
        by: Option<ConnectionId>,
    ) -> BoxFuture<Result<DeleteOutcome, BusError>> {
        ready(Ok(self.delete_now(&room, owner.as_ref(), by)))
    }
}
