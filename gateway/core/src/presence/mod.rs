//! Who is where on this node, and for how long after the last connection has gone.
//!
//! A connection in a room holds a [`PresenceGuard`]. The first one of a user takes a seat in the
//! [store](crate::bus::registry), and when the last one is dropped the seat is grace_id for a moment,
//! so that who reloads a page does not leave and come back for everybody else.

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
        registry::{
            AdmitError, JoinConditions, JoinSnapshot, NodePresence, OnlinePage, OnlineStatus,
            PresenceScope, PresenceStore, UnixMillis, UserPresence, unix_millis_now,
        },
    },
    drain::Tasks,
};

pub mod roster;

/// How often it is told when users did something last.
const REPORT_ACTIVE_INTERVAL: Duration = Duration::from_secs(5);

/// No user's id comes before it.
static LOWEST_USER: LazyLock<UserId> = LazyLock::new(|| "+".parse().expect("a user id"));

/// How presence is grace_id and told.
#[derive(Clone, Debug)]
pub struct PresenceOptions {
    /// How long a user stays present whose last connection has gone.
    pub grace: Duration,
    /// Up to how many members who comes and goes is told one by one.
    pub individual_max: usize,
    /// Up to how many members it is told by name; above it, how many there are.
    pub named_max: usize,
    /// Whether clients are told who is connected to the cluster.
    pub public: bool,
}

impl Default for PresenceOptions {
    fn default() -> Self {
        Self { grace: Duration::from_secs(3), individual_max: 100, named_max: 1000, public: true }
    }
}

/// The locals of this node.
pub struct PresenceTracker {
    store: Arc<dyn PresenceStore>,
    options: PresenceOptions,
    /// The store is told while it is locked, so that a later change of a seat is told later. Never
    /// the other way round.
    locals: Mutex<LocalPresences>,
    /// Somebody leaves.
    expiry_added: Notify,
}

#[derive(Default)]
struct LocalPresences {
    /// Ordered by scope and user.
    local: BTreeSet<ByScopeAndUser>,
    /// LocalPresences whose last connection has gone, in that order, with what they were grace_id under.
    expiring: VecDeque<(Instant, Arc<LocalPresence>, u32)>,
    /// How often a seat was grace_id.
    grace_id: u32,
    /// How many of the locals are the cluster's.
    connected: u64,
}

/// A user at one scope of this node. There is one for each connection and room, so that its size
/// counts. What may change does so while the locals are locked, but for `active` and `typed`.
#[derive(Debug)]
struct LocalPresence {
    scope: PresenceScope,
    user: UserInfo,
    since: UnixMillis,
    connections: AtomicU32,
    /// Under which number the seat is grace_id without a connection; 0: it is not.
    grace_id: AtomicU32,
    /// When the user did something last.
    active: AtomicU64,
    /// When it was passed on last that the user types, and whether: ms, shifted by one.
    typed: AtomicU64,
    /// Whether the user was let in.
    admitted: AtomicBool,
    /// Whether the store has not been told of `active` yet.
    active_is_unreported: AtomicBool,
    /// The room is no more.
    closed: AtomicBool,
}

/// One connection's part in a scope. The user leaves some time after the last is dropped.
pub struct PresenceGuard {
    /// `None`: it has left on purpose.
    presence: Option<Arc<PresenceTracker>>,
    local: Arc<LocalPresence>,
}

/// Whether a guard is one still.
#[derive(Clone, Debug)]
pub struct RoomAlive(Arc<LocalPresence>);

impl RoomAlive {
    /// Whether the room was closed.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Acquire)
    }
}

/// What locals are ordered by.
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
        self.local.get(key).map(|seat| &seat.0)
    }

    fn insert(&mut self, local: &Arc<LocalPresence>) {
        self.connected += u64::from(local.scope == PresenceScope::Cluster);
        self.local.insert(ByScopeAndUser(local.clone()));
    }

    fn remove(&mut self, local: &LocalPresence) {
        let key: &dyn ScopeAndUser = &(&local.scope, &local.user.id);
        if self.local.remove(key) {
            self.connected -= u64::from(local.scope == PresenceScope::Cluster);
        }
    }

    /// The locals at a scope.
    fn at<'a>(&'a self, scope: &'a PresenceScope) -> impl Iterator<Item = &'a Arc<LocalPresence>> {
        let first = (scope, &*LOWEST_USER);
        let first: &dyn ScopeAndUser = &first;
        let here = self.local.range::<dyn ScopeAndUser, _>((Included(first), Unbounded));
        here.map(|seat| &seat.0).take_while(move |seat| seat.scope == *scope)
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
    /// Starts the task that has users leave.
    pub fn start(
        store: Arc<dyn PresenceStore>,
        options: PresenceOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let presence = Arc::new(Self {
            store,
            options,
            locals: Mutex::default(),
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

    /// What was configured.
    pub fn options(&self) -> &PresenceOptions {
        &self.options
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn PresenceStore> {
        &self.store
    }

    /// Has a user enter by one more connection. Dropped before it resolves, the user leaves again.
    ///
    /// # Errors
    ///
    /// [`AdmitError`], and nothing has changed.
    pub async fn admit(
        self: &Arc<Self>,
        scope: PresenceScope,
        person: &UserInfo,
        rules: Option<JoinConditions>,
    ) -> Result<(PresenceGuard, JoinSnapshot), AdmitError> {
        let (guard, admitting, was_here) = self.track(scope, person, rules);
        match admitting.await {
            Ok(snapshot) => {
                guard.local.admitted.store(true, Relaxed);
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

    /// Has a user be connected by one more connection, and waits until that can be seen, but not
    /// longer than `wait`: then it will be.
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
        let mut locals = self.locals.lock();
        let known = locals.get(&scope, &person.id).cloned();
        let was_here = known.is_some();
        let local = known.unwrap_or_else(|| {
            // The names of a room are one in memory.
            let one = locals.at(&scope).next().map(|other| other.scope.clone());
            let scope = one.unwrap_or(scope);
            // Who is connected keeps to no rules.
            let admitted = scope == PresenceScope::Cluster;
            let local = Arc::new(LocalPresence {
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
            locals.insert(&local);
            local
        });
        local.connections.fetch_add(1, Relaxed);
        local.grace_id.store(0, Relaxed);
        local.active.store(now, Relaxed);
        let admitting = self.store.admit(local.report(), rules);
        drop(locals);
        (PresenceGuard { presence: Some(self.clone()), local }, admitting, was_here)
    }

    /// Who is connected to any node: at most `limit` whose ids follow `after`.
    ///
    /// # Errors
    ///
    /// [`BusError`], where the other nodes cannot be asked.
    pub async fn online(&self, after: String, limit: usize) -> Result<OnlinePage, BusError> {
        if let Some(online) = self.store.online(after.clone(), limit).await? {
            return Ok(online);
        }
        let locals = self.locals.lock();
        let mut here =
            locals.at(&PresenceScope::Cluster).filter(|local| local.user.id.as_str() > &*after);
        let detail = |local: &Arc<LocalPresence>| {
            let NodePresence { user, connections, since, active, .. } = local.report();
            UserPresence { user, connections: connections.into(), since, active, read: 0 }
        };
        let users = here.by_ref().take(limit).map(detail).collect();
        Ok(OnlinePage { users, count: locals.connected, more: here.next().is_some() })
    }

    /// Whether users are connected to any node, and when each did something last.
    ///
    /// # Errors
    ///
    /// [`BusError`], where the other nodes cannot be asked.
    pub async fn statuses(&self, users: Vec<UserId>) -> Result<Vec<OnlineStatus>, BusError> {
        let mut statuses = self.store.statuses(users.clone()).await?;
        let locals = self.locals.lock();
        for (user, status) in users.iter().zip(&mut statuses) {
            if let Some(local) = locals.get(&PresenceScope::Cluster, user) {
                let active = local.active.load(Relaxed);
                let active = status.active.max(Some(active));
                *status = OnlineStatus { online: true, active, complete: true };
            }
        }
        Ok(statuses)
    }

    /// When a user did something last at a scope of this node.
    pub fn active(&self, scope: &PresenceScope, user: &UserId) -> Option<UnixMillis> {
        Some(self.locals.lock().get(scope, user)?.active.load(Relaxed))
    }

    /// Ends all stays in a room, which is no more.
    pub fn close(&self, room: &RoomId) {
        let scope = PresenceScope::Room(room.clone());
        let locals = &mut *self.locals.lock();
        for local in locals.at(&scope).cloned().collect::<Vec<_>>() {
            self.close_entry(locals, &local);
        }
    }

    fn close_entry(&self, locals: &mut LocalPresences, local: &Arc<LocalPresence>) {
        local.closed.store(true, Release);
        local.connections.store(0, Relaxed);
        local.grace_id.store(0, Relaxed);
        self.store.track(local.report());
        locals.remove(local);
    }

    /// The rooms that a user is in on this node.
    pub fn rooms_of(&self, user: &UserId) -> Vec<RoomId> {
        let locals = self.locals.lock();
        let of_user = locals.local.iter().map(|seat| &seat.0).filter(|seat| seat.user.id == *user);
        of_user
            .filter_map(|local| match &local.scope {
                PresenceScope::Room(room) => Some(room.clone()),
                PresenceScope::Cluster => None,
            })
            .collect()
    }

    /// One connection less. The last one keeps the seat for a while where `grace` says so.
    fn untrack(&self, local: &Arc<LocalPresence>, grace: bool) {
        let mut guard = self.locals.lock();
        let locals = &mut *guard;
        // Its room was closed; the user may have come back to another one of its name.
        if local.closed.load(Acquire) {
            return;
        }
        let before = local.connections.fetch_sub(1, Relaxed);
        if before == 1 && grace && !self.options.grace.is_zero() {
            locals.grace_id = locals.grace_id.wrapping_add(1).max(1);
            local.grace_id.store(locals.grace_id, Relaxed);
            let until = Instant::now() + self.options.grace;
            locals.expiring.push_back((until, local.clone(), locals.grace_id));
            self.expiry_added.notify_one();
            return;
        }
        if before == 1 {
            locals.remove(local);
        }
        self.store.track(local.report());
    }

    /// Has users leave whose time has come, and tells now and then when users did something.
    async fn run(&self) {
        let mut report_active = tokio::time::interval(REPORT_ACTIVE_INTERVAL);
        loop {
            let next = self.locals.lock().expiring.front().map(|(until, ..)| *until);
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
        let mut guard = self.locals.lock();
        let locals = &mut *guard;
        while let Some((_, local, grace_id)) =
            locals.expiring.pop_front_if(|(until, ..)| *until <= now)
        {
            // Who came back and left once more is grace_id under another number.
            if local.grace_id.compare_exchange(grace_id, 0, Relaxed, Relaxed).is_ok() {
                self.store.track(local.report());
                locals.remove(&local);
            }
        }
    }

    fn report_active(&self) {
        for ByScopeAndUser(local) in &self.locals.lock().local {
            if local.active_is_unreported.swap(false, Relaxed) {
                self.store.track(local.report());
            }
        }
    }
}

impl PresenceGuard {
    /// Asks what the user would be told on admitting now.
    pub fn rejoin_snapshot(&self) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let not_found = || Box::pin(std::future::ready(Err(AdmitError::NotFound)));
        let Some(presence) = &self.presence else { return not_found() };
        let _seats = presence.locals.lock();
        if self.is_closed() {
            return not_found();
        }
        presence.store.admit(self.local.report(), None)
    }

    /// The user did something.
    pub fn touch(&self) {
        self.local.active.store(unix_millis_now(), Relaxed);
        self.local.active_is_unreported.store(true, Relaxed);
    }

    /// Whether it is to be passed on that the user types, or has stopped: when that has changed, and
    /// again after `every`.
    pub fn should_publish_typing(&self, is_typing: bool, every: Duration) -> bool {
        let (now, typed) = (unix_millis_now(), self.local.typed.load(Relaxed));
        let same = typed & 1 == u64::from(is_typing);
        let rests = now.saturating_sub(typed >> 1) >= every.as_millis() as u64;
        if same && !rests {
            return false;
        }
        self.local.typed.store(now << 1 | u64::from(is_typing), Relaxed);
        true
    }

    /// Whether the room was closed since.
    pub fn is_closed(&self) -> bool {
        self.local.closed.load(Acquire)
    }

    /// Tells later whether the room was closed since, without keeping the user there.
    pub fn room_alive(&self) -> RoomAlive {
        RoomAlive(self.local.clone())
    }

    /// The room; `None` for the cluster.
    pub fn room(&self) -> Option<&RoomId> {
        match &self.local.scope {
            PresenceScope::Room(room) => Some(room),
            PresenceScope::Cluster => None,
        }
    }

    /// Leaves, on purpose: the user's last connection does so at once.
    pub fn leave(mut self) {
        if let Some(presence) = self.presence.take() {
            presence.untrack(&self.local, false);
        }
    }
}

impl Drop for PresenceGuard {
    fn drop(&mut self) {
        if let Some(presence) = self.presence.take() {
            presence.untrack(&self.local, true);
        }
    }
}
