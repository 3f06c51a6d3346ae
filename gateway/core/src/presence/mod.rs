//! The presence of this node's connections, and the grace period after a user's last connection has
//! gone.
//!
//! A connection in a room holds a [`PresenceGuard`]. The first guard of a user makes the user
//! present in the [store](crate::bus::presence_store). After the last guard is dropped the user stays
//! present for a moment, so that reloading a page is not a departure and a return for everyone
//! else.

use std::{
    borrow::Borrow,
    collections::{BTreeSet, VecDeque},
    ops::Bound::{Included, Unbounded},
    sync::{
        Arc, LazyLock,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use parking_lot::Mutex;
use skein_protocol::{
    ids::{RoomId, UserId},
    protocol::server_frame::UserInfo,
};
use tokio::{sync::Notify, time::Instant};

use crate::{
    bus::{
        BoxFuture, BusError,
        presence_store::{
            AdmitError, JoinConditions, JoinSnapshot, NodePresence, OnlinePage, OnlineStatus,
            PresenceScope, PresenceStore, UnixMillis, UserPresence, unix_millis_now,
        },
    },
    drain::Tasks,
};

pub mod roster;

/// The interval at which the users' last activity is reported.
const REPORT_ACTIVE_INTERVAL: Duration = Duration::from_secs(5);

/// The lowest user id.
static LOWEST_USER: LazyLock<UserId> = LazyLock::new(|| "+".parse().expect("a user id"));

/// Options of presence.
#[derive(Clone, Debug)]
pub struct PresenceOptions {
    /// The time for which a user stays present after the last connection has gone.
    pub grace: Duration,
    /// The most members of a room up to which each join and leave is sent as its own frame.
    pub event_members_max: usize,
    /// The most members up to which `presence_diff` names users; above it, only the count.
    pub diff_members_max: usize,
    /// Whether clients may list the users connected to the cluster.
    pub public: bool,
}

impl Default for PresenceOptions {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(3),
            event_members_max: 100,
            diff_members_max: 1000,
            public: true,
        }
    }
}

/// The presence of this node's connections.
pub struct PresenceTracker {
    store: Arc<dyn PresenceStore>,
    options: PresenceOptions,
    /// The store is called while this is locked, so that reports keep the order of changes. The
    /// store never calls back under its own lock.
    entries: Mutex<LocalPresences>,
    /// Notifies the task that an entry was added to `expiring`.
    expiry_added: Notify,
}

#[derive(Default)]
struct LocalPresences {
    /// Ordered by scope and user.
    by_scope: BTreeSet<ByScopeAndUser>,
    /// Entries whose last connection has gone, by time, with the grace id of each.
    expiring: VecDeque<(Instant, Arc<LocalPresence>, u32)>,
    /// The last grace id given out.
    grace_id: u32,
    /// The number of entries with the scope `Cluster`.
    connected: u64,
}

/// A user at one scope of this node. There is one for each connection and room, so its size counts.
/// Its fields change only while the entries are locked, except `active` and `typed`.
#[derive(Debug)]
struct LocalPresence {
    scope: PresenceScope,
    user: UserInfo,
    since: UnixMillis,
    connections: AtomicU32,
    /// The id of the present grace period; 0: none.
    grace_id: AtomicU32,
    /// The time of the user's last activity.
    active: AtomicU64,
    /// The last published typing state and its time: milliseconds, shifted left by one bit.
    typed: AtomicU64,
    /// Whether the user was admitted.
    admitted: AtomicBool,
    /// Whether the store does not know `active` yet.
    active_is_unreported: AtomicBool,
    /// Whether the room was closed.
    closed: AtomicBool,
}

/// One connection's part in a presence scope. The user leaves the grace period after the last guard
/// is dropped.
pub struct PresenceGuard {
    /// `None` once the guard has left explicitly.
    presence: Option<Arc<PresenceTracker>>,
    entry: Arc<LocalPresence>,
}

/// Tells whether the room of a guard was closed since, without keeping the user present.
#[derive(Clone, Debug)]
pub struct RoomAlive(Arc<LocalPresence>);

impl RoomAlive {
    /// Whether the room was closed.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Acquire)
    }
}

/// The sort key of the entries.
trait ScopeAndUser {
    fn key(&self) -> (&PresenceScope, &UserId);
}

struct ByScopeAndUser(Arc<LocalPresence>);

impl ScopeAndUser for ByScopeAndUser {
    fn key(&self) -> (&PresenceScope, &UserId) {
        (&self.0.scope, &self.0.user.id)
    }
}

impl ScopeAndUser for (&PresenceScope, &UserId) {
    fn key(&self) -> (&PresenceScope, &UserId) {
        *self
    }
}

impl Ord for dyn ScopeAndUser + '_ {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for dyn ScopeAndUser + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn ScopeAndUser + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for dyn ScopeAndUser + '_ {}

impl Ord for ByScopeAndUser {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for ByScopeAndUser {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByScopeAndUser {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for ByScopeAndUser {}

impl<'a> Borrow<dyn ScopeAndUser + 'a> for ByScopeAndUser {
    fn borrow(&self) -> &(dyn ScopeAndUser + 'a) {
        self
    }
}

impl LocalPresences {
    fn get(&self, scope: &PresenceScope, user: &UserId) -> Option<&Arc<LocalPresence>> {
        let key: &dyn ScopeAndUser = &(scope, user);
        self.by_scope.get(key).map(|entry| &entry.0)
    }

    fn insert(&mut self, entry: &Arc<LocalPresence>) {
        self.connected += u64::from(entry.scope == PresenceScope::Cluster);
        self.by_scope.insert(ByScopeAndUser(entry.clone()));
    }

    fn remove(&mut self, entry: &LocalPresence) {
        let key: &dyn ScopeAndUser = &(&entry.scope, &entry.user.id);
        if self.by_scope.remove(key) {
            self.connected -= u64::from(entry.scope == PresenceScope::Cluster);
        }
    }

    /// The entries of a scope.
    fn at<'a>(&'a self, scope: &'a PresenceScope) -> impl Iterator<Item = &'a Arc<LocalPresence>> {
        let first = (scope, &*LOWEST_USER);
        let first: &dyn ScopeAndUser = &first;
        let here = self.by_scope.range::<dyn ScopeAndUser, _>((Included(first), Unbounded));
        here.map(|entry| &entry.0).take_while(move |entry| entry.scope == *scope)
    }
}

type Admitting = BoxFuture<Result<JoinSnapshot, AdmitError>>;

impl LocalPresence {
    fn report(&self) -> NodePresence {
        let grace_id = u32::from(self.grace_id.load(Relaxed) != 0);
        NodePresence {
            scope: self.scope.clone(),
            user: self.user.clone(),
            connections: self.connections.load(Relaxed).max(grace_id),
            since: self.since,
            active: self.active.load(Relaxed),
            admitted: self.admitted.load(Relaxed),
        }
    }
}

impl PresenceTracker {
    /// Starts the task that ends grace periods.
    pub fn start(
        store: Arc<dyn PresenceStore>,
        options: PresenceOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let presence = Arc::new(Self {
            store,
            options,
            entries: Mutex::default(),
            expiry_added: Notify::new(),
        });
        let (tracker, stopped) = (presence.clone(), tasks.stopped().clone());
        tasks.spawn_service("presence", async move {
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = tracker.run() => {}
            }
        });
        presence
    }

    /// The configuration.
    pub fn options(&self) -> &PresenceOptions {
        &self.options
    }

    /// The presence store.
    pub fn store(&self) -> &Arc<dyn PresenceStore> {
        &self.store
    }

    /// Admits a user with one more connection. If the future is dropped before it resolves, the
    /// user leaves again.
    ///
    /// # Errors
    ///
    /// [`AdmitError`]; nothing has changed then.
    pub async fn admit(
        self: &Arc<Self>,
        scope: PresenceScope,
        person: &UserInfo,
        rules: Option<JoinConditions>,
    ) -> Result<(PresenceGuard, JoinSnapshot), AdmitError> {
        let (guard, admitting, was_here) = self.track(scope, person, rules);
        match admitting.await {
            Ok(snapshot) => {
                guard.entry.admitted.store(true, Relaxed);
                Ok((guard, snapshot))
            }
            Err(error) => {
                if !was_here {
                    guard.leave();
                }
                Err(error)
            }
        }
    }

    /// Tracks one more connection of a user to the cluster, and waits until the store shows it, at
    /// most `wait`; the store will show it in any case.
    pub async fn track_online(
        self: &Arc<Self>,
        person: &UserInfo,
        wait: Duration,
    ) -> PresenceGuard {
        let (guard, admitting, _) = self.track(PresenceScope::Cluster, person, None);
        let _ = tokio::time::timeout(wait, admitting).await;
        guard
    }

    /// As [`PresenceTracker::track_online`], without waiting.
    pub fn track_online_soon(self: &Arc<Self>, person: &UserInfo) -> PresenceGuard {
        self.track(PresenceScope::Cluster, person, None).0
    }

    fn track(
        self: &Arc<Self>,
        scope: PresenceScope,
        person: &UserInfo,
        rules: Option<JoinConditions>,
    ) -> (PresenceGuard, Admitting, bool) {
        let now = unix_millis_now();
        let mut entries = self.entries.lock();
        let known = entries.get(&scope, &person.id).cloned();
        let was_here = known.is_some();
        let entry = known.unwrap_or_else(|| {
            // Entries of a room share its name in memory.
            let one = entries.at(&scope).next().map(|other| other.scope.clone());
            let scope = one.unwrap_or(scope);
            // The cluster scope has no admission.
            let admitted = scope == PresenceScope::Cluster;
            let entry = Arc::new(LocalPresence {
                scope,
                user: person.clone(),
                since: now,
                connections: 0.into(),
                grace_id: 0.into(),
                active: now.into(),
                typed: 0.into(),
                admitted: admitted.into(),
                active_is_unreported: false.into(),
                closed: false.into(),
            });
            entries.insert(&entry);
            entry
        });
        entry.connections.fetch_add(1, Relaxed);
        entry.grace_id.store(0, Relaxed);
        entry.active.store(now, Relaxed);
        let admitting = self.store.admit(entry.report(), rules);
        drop(entries);
        (PresenceGuard { presence: Some(self.clone()), entry }, admitting, was_here)
    }

    /// A page of the users connected to any node: at most `limit` whose ids follow `after`.
    ///
    /// # Errors
    ///
    /// [`BusError`] if the store is unavailable.
    pub async fn online(&self, after: String, limit: usize) -> Result<OnlinePage, BusError> {
        if let Some(online) = self.store.online(after.clone(), limit).await? {
            return Ok(online);
        }
        let entries = self.entries.lock();
        let mut here =
            entries.at(&PresenceScope::Cluster).filter(|entry| entry.user.id.as_str() > &*after);
        let detail = |entry: &Arc<LocalPresence>| {
            let NodePresence { user, connections, since, active, .. } = entry.report();
            UserPresence { user, connections: connections.into(), since, active, read: 0 }
        };
        let users = here.by_ref().take(limit).map(detail).collect();
        Ok(OnlinePage { users, count: entries.connected, more: here.next().is_some() })
    }

    /// Whether users are connected to any node, and the time of each user's last activity.
    ///
    /// # Errors
    ///
    /// [`BusError`] if the store is unavailable.
    pub async fn statuses(&self, users: Vec<UserId>) -> Result<Vec<OnlineStatus>, BusError> {
        let mut statuses = self.store.statuses(users.clone()).await?;
        let entries = self.entries.lock();
        for (user, status) in users.iter().zip(&mut statuses) {
            if let Some(entry) = entries.get(&PresenceScope::Cluster, user) {
                let active = entry.active.load(Relaxed);
                let active = status.active.max(Some(active));
                *status = OnlineStatus { online: true, active, complete: true };
            }
        }
        Ok(statuses)
    }

    /// The time of a user's last activity at a scope of this node.
    pub fn active(&self, scope: &PresenceScope, user: &UserId) -> Option<UnixMillis> {
        Some(self.entries.lock().get(scope, user)?.active.load(Relaxed))
    }

    /// Closes all guards of a room that was closed or deleted.
    pub fn close(&self, room: &RoomId) {
        let scope = PresenceScope::Room(room.clone());
        let entries = &mut *self.entries.lock();
        for entry in entries.at(&scope).cloned().collect::<Vec<_>>() {
            self.close_entry(entries, &entry);
        }
    }

    fn close_entry(&self, entries: &mut LocalPresences, entry: &Arc<LocalPresence>) {
        entry.closed.store(true, Release);
        entry.connections.store(0, Relaxed);
        entry.grace_id.store(0, Relaxed);
        self.store.track(entry.report());
        entries.remove(entry);
    }

    /// The rooms in which a user is present on this node. Scans all entries.
    pub fn rooms_of(&self, user: &UserId) -> Vec<RoomId> {
        let entries = self.entries.lock();
        let of_user =
            entries.by_scope.iter().map(|entry| &entry.0).filter(|entry| entry.user.id == *user);
        of_user
            .filter_map(|entry| match &entry.scope {
                PresenceScope::Room(room) => Some(room.clone()),
                PresenceScope::Cluster => None,
            })
            .collect()
    }

    /// Removes one connection. After the last one the entry stays for the grace period if `grace`
    /// is set.
    fn untrack(&self, entry: &Arc<LocalPresence>, grace: bool) {
        let mut guard = self.entries.lock();
        let entries = &mut *guard;
        // The room was closed; the user may have joined another room of the same name since.
        if entry.closed.load(Acquire) {
            return;
        }
        let before = entry.connections.fetch_sub(1, Relaxed);
        if before == 1 && grace && !self.options.grace.is_zero() {
            entries.grace_id = entries.grace_id.wrapping_add(1).max(1);
            entry.grace_id.store(entries.grace_id, Relaxed);
            let until = Instant::now() + self.options.grace;
            entries.expiring.push_back((until, entry.clone(), entries.grace_id));
            self.expiry_added.notify_one();
            return;
        }
        if before == 1 {
            entries.remove(entry);
        }
        self.store.track(entry.report());
    }

    /// Ends grace periods, and reports the users' last activity periodically.
    async fn run(&self) {
        let mut report_active = tokio::time::interval(REPORT_ACTIVE_INTERVAL);
        loop {
            let next = self.entries.lock().expiring.front().map(|(until, ..)| *until);
            let due = async {
                match next {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = due => self.remove_expired(Instant::now()),
                () = self.expiry_added.notified() => {}
                _ = report_active.tick() => self.report_active(),
            }
        }
    }

    fn remove_expired(&self, now: Instant) {
        let mut guard = self.entries.lock();
        let entries = &mut *guard;
        while let Some((_, entry, grace_id)) =
            entries.expiring.pop_front_if(|(until, ..)| *until <= now)
        {
            // A user who returned and left again has a later grace id.
            if entry.grace_id.compare_exchange(grace_id, 0, Relaxed, Relaxed).is_ok() {
                self.store.track(entry.report());
                entries.remove(&entry);
            }
        }
    }

    fn report_active(&self) {
        for ByScopeAndUser(entry) in &self.entries.lock().by_scope {
            if entry.active_is_unreported.swap(false, Relaxed) {
                self.store.track(entry.report());
            }
        }
    }
}

impl PresenceGuard {
    /// Reads the state of the room as if the user joined now.
    pub fn rejoin_snapshot(&self) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let not_found = || Box::pin(std::future::ready(Err(AdmitError::NotFound)));
        let Some(presence) = &self.presence else { return not_found() };
        let _entries = presence.entries.lock();
        if self.is_closed() {
            return not_found();
        }
        presence.store.admit(self.entry.report(), None)
    }

    /// Records an activity of the user.
    pub fn touch(&self) {
        self.entry.active.store(unix_millis_now(), Relaxed);
        self.entry.active_is_unreported.store(true, Relaxed);
    }

    /// Whether a typing event must be published: when the state has changed, and again after
    /// `every`.
    pub fn should_publish_typing(&self, is_typing: bool, every: Duration) -> bool {
        let (now, typed) = (unix_millis_now(), self.entry.typed.load(Relaxed));
        let same = typed & 1 == u64::from(is_typing);
        let rests = now.saturating_sub(typed >> 1) >= every.as_millis() as u64;
        if same && !rests {
            return false;
        }
        self.entry.typed.store(now << 1 | u64::from(is_typing), Relaxed);
        true
    }

    /// Whether the room was closed since.
    pub fn is_closed(&self) -> bool {
        self.entry.closed.load(Acquire)
    }

    /// Tells later whether the room was closed, without keeping the user present.
    pub fn room_alive(&self) -> RoomAlive {
        RoomAlive(self.entry.clone())
    }

    /// The room; `None` for the cluster.
    pub fn room(&self) -> Option<&RoomId> {
        match &self.entry.scope {
            PresenceScope::Room(room) => Some(room),
            PresenceScope::Cluster => None,
        }
    }

    /// Leaves explicitly, without a grace period.
    pub fn leave(mut self) {
        if let Some(presence) = self.presence.take() {
            presence.untrack(&self.entry, false);
        }
    }
}

impl Drop for PresenceGuard {
    fn drop(&mut self) {
        if let Some(presence) = self.presence.take() {
            presence.untrack(&self.entry, true);
        }
    }
}
