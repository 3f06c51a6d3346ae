//! The registry of a single node, in this process's memory. The reference for [`PresenceStore`].

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap},
    ops::Bound,
    time::Duration,
};

use rand::RngExt as _;
use skein_protocol::{
    ids::{ConnectionId, DisplayName, RoomId, UserId},
    position::{Epoch, Position, Seq},
    protocol::server_frame::{RoomClosedReason, UserInfo},
};
use tokio::time::Instant;

use super::MemoryBus;
use crate::{
    bus::{
        AppendCallback, Appended, BoxFuture, BusError,
        registry::{
            AdmitError, CreateOutcome, DeleteOutcome, EphemeralEvent, JoinConditions, JoinSnapshot,
            NodePresence, OnlinePage, OnlineStatus, PresenceChange, PresenceDetails, PresenceScope,
            PresenceSnapshot, PresenceStore, PresenceVersion, RoomConfig, RoomPage, RoomSummary,
            UnixMillis, UserPresence,
        },
    },
    telemetry::metrics::StorageLimit,
};

/// What the registry has. Rooms that nobody is in and nobody manages are not here.
#[derive(Default)]
pub(super) struct StoreState {
    rooms: BTreeMap<RoomId, RoomEntry>,
    read_marks: HashMap<RoomId, BTreeMap<UserId, Seq>>,
    /// When users who have left did something last.
    last_seen: HashMap<UserId, UnixMillis>,
    /// How many managed rooms each owner has.
    owned: HashMap<UserId, usize>,
}

/// Of how many users who have left it is known when they did something last.
const LAST_SEEN_MAX: usize = 10_000;

#[derive(Default)]
struct RoomEntry {
    present: ScopePresence,
    record: Option<RoomConfig>,
    /// When somebody came, where it was empty.
    since: UnixMillis,
    /// Since when nobody is there.
    empty_since: Option<Instant>,
}

/// Who is at one place.
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
    /// Takes a seat in, and tells what changed by that.
    fn apply(&mut self, seat: NodePresence) -> Option<PresenceChange> {
        let NodePresence { user, connections, since, active, admitted, .. } = seat;
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
    /// Forgets managed rooms that have been empty for longer than `ttl`.
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

    /// Whether it is known when a user who has left did something last.
    pub(super) fn has_last_seen(&self, user: &UserId) -> bool {
        self.last_seen.contains_key(user)
    }

    /// Forgets how far was read in rooms whose log is no more.
    pub(super) fn sweep_read_marks(&mut self, is_kept: impl Fn(&RoomId) -> bool) {
        self.read_marks.retain(|room, _| is_kept(room));
    }

    fn read_mark_of(&self, room: &RoomId, user: &UserId, top: Seq) -> Seq {
        let mark = self.read_marks.get(room).and_then(|marks| marks.get(user));
        mark.copied().unwrap_or(0).min(top)
    }

    /// A user has come, or left.
    fn record_last_seen(&mut self, seat: &NodePresence) {
        if seat.connections > 0 {
            self.last_seen.remove(&seat.user.id);
            return;
        }
        if self.last_seen.len() >= LAST_SEEN_MAX {
            let mut times: Vec<UnixMillis> = self.last_seen.values().copied().collect();
            times.sort_unstable();
            let half = times[times.len() / 2];
            self.last_seen.retain(|_, active| *active > half);
        }
        self.last_seen.insert(seat.user.id.clone(), seat.active);
    }

    fn apply(&mut self, seat: NodePresence, now: Instant) -> Option<(RoomId, PresenceChange)> {
        let name = match &seat.scope {
            // Its node knows who is connected.
            PresenceScope::Cluster => {
                self.record_last_seen(&seat);
                return None;
            }
            PresenceScope::Room(room) => room.clone(),
        };
        if seat.connections == 0 && !self.rooms.contains_key(&name) {
            return None;
        }
        let room = self.rooms.entry(name.clone()).or_default();
        if room.present.users.is_empty() {
            room.since = seat.since;
        }
        let change = room.present.apply(seat);
        room.empty_since = room.present.users.is_empty().then_some(now);
        if room.empty_since.is_some() && room.record.is_none() {
            self.rooms.remove(&name);
        }
        Some((name, change?))
    }

    /// `has_log`: whether something was said in the room.
    fn check_conditions(
        &self,
        name: &RoomId,
        user: &UserId,
        rules: &JoinConditions,
        has_log: bool,
    ) -> Result<(), AdmitError> {
        let Some(room) = self.rooms.get(name) else {
            return match rules.create {
                true if rules.within_quota || has_log => Ok(()),
                true => Err(AdmitError::Quota),
                false => Err(AdmitError::NotFound),
            };
        };
        let Some(record) = &room.record else { return Ok(()) };
        if record.password.is_some() && record.password != rules.password_hash {
            return Err(AdmitError::WrongPassword);
        }
        let members = room.present.users.len();
        let full = record.max_members.is_some_and(|max| members >= max as usize);
        if full && !room.present.users.contains_key(user) {
            return Err(AdmitError::Full);
        }
        Ok(())
    }
}

/// A room is no more: its owner has one less.
fn disown(owned: &mut HashMap<UserId, usize>, room: &RoomEntry) {
    let Some(record) = &room.record else { return };
    if let Some(count) = owned.get_mut(&record.owner) {
        *count -= 1;
        if *count == 0 {
            owned.remove(&record.owner);
        }
    }
}

impl RoomEntry {
    fn summary(&self, room: RoomId) -> RoomSummary {
        let members = self.present.users.len() as u64;
        RoomSummary { room, config: self.record.clone(), members, since: self.since }
    }
}

impl MemoryBus {
    fn top(&self, room: &RoomId) -> Seq {
        self.top_and_deletion(room).0
    }

    fn top_and_deletion(&self, room: &RoomId) -> (Seq, u64) {
        self.logs.lock().logs.get(room).map_or((0, 0), |log| (log.top, log.deleted))
    }

    /// What is passed on leaves under the lock, so that changes enter the mailbox in their order.
    fn admit_now(
        &self,
        seat: NodePresence,
        rules: Option<&JoinConditions>,
        lets_in: bool,
    ) -> Result<JoinSnapshot, AdmitError> {
        let PresenceScope::Room(room) = seat.scope.clone() else {
            let status = RoomId::status_of(&seat.user.id);
            self.store.lock().apply(seat, Instant::now());
            if self.logs.lock().subscribed.contains_key(&status) {
                self.mailboxes.send_ephemeral(status, EphemeralEvent::Status);
            }
            return Ok(JoinSnapshot::default());
        };
        let user = seat.user.id.clone();
        let (top, deleted) = self.top_and_deletion(&room);
        let registered = &mut *self.store.lock();
        let made = rules.is_some() && top == 0 && !registered.rooms.contains_key(&room);
        if let Some(rules) = rules {
            registered.check_conditions(&room, &user, rules, top > 0)?;
        }
        // Who has kept to the rules is let in.
        let seat = NodePresence { admitted: seat.admitted || lets_in, ..seat };
        if let Some((room, change)) = registered.apply(seat, Instant::now()) {
            self.mailboxes.send_ephemeral(room, EphemeralEvent::Presence(change));
        }
        let present = registered.rooms.get(&room).map(|room| &room.present);
        Ok(JoinSnapshot {
            version: present.map(|present| present.version).unwrap_or_default(),
            count: present.map_or(0, |present| present.users.len() as u64),
            read: registered.read_mark_of(&room, &user, top),
            deleted,
            created: made,
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
            let registered = &mut *self.store.lock();
            let found = registered.rooms.get(room);
            let record = found.and_then(|found| found.record.as_ref());
            match owner {
                Some(owner) if record.is_none_or(|record| record.owner != *owner) => {
                    let known = found.is_some();
                    return if known { DeleteOutcome::NotOwner } else { DeleteOutcome::NotFound };
                }
                None if found.is_none() && !has_log => return DeleteOutcome::NotFound,
                _ => {}
            }
            if let Some(room) = registered.rooms.remove(room) {
                disown(&mut registered.owned, &room);
            }
            registered.read_marks.remove(room);
            self.mailboxes.send_ephemeral(
                room.clone(),
                EphemeralEvent::Closed { reason: RoomClosedReason::Deleted, by },
            );
        }
        self.delete_log(room);
        DeleteOutcome::Deleted
    }
}

fn ready<T: Send + 'static>(value: T) -> BoxFuture<T> {
    Box::pin(std::future::ready(value))
}

/// The keys behind `after` and not before `from`.
fn keys_after<'a, K: Ord + Borrow<str>, V>(
    map: &'a BTreeMap<K, V>,
    from: &str,
    after: &str,
) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V> {
    let bound = if after >= from { Bound::Excluded(after) } else { Bound::Included(from) };
    map.range::<str, _>((bound, Bound::Unbounded))
}

impl PresenceStore for MemoryBus {
    fn track(&self, seat: NodePresence) {
        // Without rules nobody is refused.
        let _ = self.admit_now(seat, None, false);
    }

    fn admit(
        &self,
        seat: NodePresence,
        rules: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        ready(self.admit_now(seat, rules.as_ref(), true))
    }

    fn snapshots(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<PresenceSnapshot>, BusError>> {
        let registered = self.store.lock();
        let snapshot = |room| match registered.rooms.get(room) {
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
        let registered = self.store.lock();
        let mut details = PresenceDetails::default();
        if let Some(RoomEntry { present, .. }) = registered.rooms.get(&room) {
            details.version = present.version;
            let detail = |user| present.detail(user, registered.read_mark_of(&room, user, top));
            details.users = users.iter().filter_map(detail).collect();
        }
        ready(Ok(details))
    }

    fn online(&self, _: String, _: usize) -> BoxFuture<Result<Option<OnlinePage>, BusError>> {
        ready(Ok(None))
    }

    fn statuses(&self, users: Vec<UserId>) -> BoxFuture<Result<Vec<OnlineStatus>, BusError>> {
        let registered = self.store.lock();
        let status = |user| {
            let active = registered.last_seen.get(user).copied();
            OnlineStatus { online: false, active, complete: true }
        };
        ready(Ok(users.iter().map(status).collect()))
    }

    fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId) {
        let top = self.top(&room);
        let registered = &mut *self.store.lock();
        let seq = seq.min(top);
        if seq > registered.read_mark_of(&room, &user, top) {
            let marks = registered.read_marks.entry(room.clone()).or_default();
            let marks_max = self.retention.limits.marks_max as usize;
            if marks.len() >= marks_max && !marks.contains_key(&user) {
                self.mailboxes.metrics().storage_rejections.of(StorageLimit::ReadMarks).inc();
                return;
            }
            marks.insert(user.clone(), seq);
            self.mailboxes.send_ephemeral(room, EphemeralEvent::Read { user, seq, by });
        }
    }

    fn publish_ephemeral(&self, room: RoomId, notice: EphemeralEvent, done: AppendCallback) {
        self.mailboxes.send_ephemeral(room, notice);
        let position = Position::new(Epoch::none(), 0);
        done(Ok(Appended { position, duplicate: false, opened_inbox: false }));
    }

    fn create(
        &self,
        room: RoomId,
        record: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>> {
        let has_log = self.top(&room) > 0;
        let StoreState { rooms, owned, .. } = &mut *self.store.lock();
        if has_log || rooms.contains_key(&room) {
            return ready(Ok(CreateOutcome::Exists));
        }
        let count = owned.get(&record.owner).copied().unwrap_or(0);
        if owned_max.is_some_and(|max| count >= max) {
            return ready(Ok(CreateOutcome::QuotaExceeded));
        }
        owned.insert(record.owner.clone(), count + 1);
        let empty_since = Some(Instant::now());
        rooms.insert(room, RoomEntry { record: Some(record), empty_since, ..RoomEntry::default() });
        ready(Ok(CreateOutcome::Created))
    }

    fn find(&self, room: RoomId) -> BoxFuture<Result<Option<RoomSummary>, BusError>> {
        let registered = self.store.lock();
        ready(Ok(registered.rooms.get(&room).map(|found| found.summary(room))))
    }

    fn list(
        &self,
        prefix: String,
        after: String,
        limit: usize,
        all: bool,
    ) -> BoxFuture<Result<RoomPage, BusError>> {
        let registered = self.store.lock();
        let is_public = |room: &RoomEntry| room.record.as_ref().is_none_or(|record| record.public);
        let mut rooms = keys_after(&registered.rooms, &prefix, &after)
            .take_while(|(name, _)| name.as_str().starts_with(&prefix))
            .filter(|(_, room)| all || is_public(room));
        let page = rooms.by_ref().take(limit);
        let page: Vec<RoomSummary> = page.map(|(name, room)| room.summary(name.clone())).collect();
        let last = page.last().map(|found| found.room.to_string());
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
