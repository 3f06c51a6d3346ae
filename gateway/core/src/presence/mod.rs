//! The presence of this node's connections, and the grace period after a user's last connection has
//! gone.
//!
//! A connection in a room holds a [`PresenceGuard`]. The first guard of a user makes the user
//! present in the [store](crate::bus::presence_store). After the last guard is dropped the user stays
//! present for a moment, so that reloading a page is not a departure and a return for everyone
//! else.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
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
        presence_entries::{ConnectionEnd, LocalPresence, LocalPresences},
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
    /// The store is called while a shard of this is locked, so that reports keep the order of
    /// changes. The store never reads the entries under its own lock.
    entries: Arc<LocalPresences>,
    /// The grace periods, by their end.
    expiring: Mutex<VecDeque<GraceEnd>>,
    /// The last grace id given out.
    grace_id: AtomicU32,
    /// Notifies the task that a grace period was added.
    expiry_added: Notify,
}

/// The end of a grace period.
struct GraceEnd {
    at: Instant,
    entry: Arc<LocalPresence>,
    grace_id: u32,
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
        self.0.is_closed()
    }
}

type Admitting = BoxFuture<Result<JoinSnapshot, AdmitError>>;

impl PresenceTracker {
    /// Starts the task that ends grace periods.
    pub fn start(
        store: Arc<dyn PresenceStore>,
        options: PresenceOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let presence = Arc::new(Self {
            entries: store.entries(),
            store,
            options,
            expiring: Mutex::default(),
            grace_id: AtomicU32::new(0),
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
        let (guard, admitting, is_new) = self.track(scope, person, rules);
        match admitting.await {
            Ok(snapshot) => {
                guard.entry.set_admitted();
                Ok((guard, snapshot))
            }
            Err(error) => {
                if is_new {
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
        let mut entries = self.entries.lock(&scope, &person.id);
        let (entry, is_new) = entries.connect(scope, person, unix_millis_now());
        let admitting = self.store.admit(entry.report(), rules);
        drop(entries);
        (PresenceGuard { presence: Some(self.clone()), entry }, admitting, is_new)
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
        let (mut here, count) = self.entries.connected(&after, limit.saturating_add(1));
        let more = here.len() > limit;
        here.truncate(limit);
        let detail = |NodePresence { user, connections, since, active, .. }| UserPresence {
            user,
            connections: u64::from(connections),
            since,
            active,
            read: 0,
        };
        Ok(OnlinePage { users: here.into_iter().map(detail).collect(), count, more })
    }

    /// Whether users are connected to any node, and the time of each user's last activity.
    ///
    /// # Errors
    ///
    /// [`BusError`] if the store is unavailable.
    pub async fn statuses(&self, users: Vec<UserId>) -> Result<Vec<OnlineStatus>, BusError> {
        let mut statuses = self.store.statuses(users.clone()).await?;
        for (user, status) in users.iter().zip(&mut statuses) {
            if let Some(active) = self.active(&PresenceScope::Cluster, user) {
                let active = status.active.max(Some(active));
                *status = OnlineStatus { online: true, active, complete: true };
            }
        }
        Ok(statuses)
    }

    /// The time of a user's last activity at a scope of this node.
    pub fn active(&self, scope: &PresenceScope, user: &UserId) -> Option<UnixMillis> {
        Some(self.entries.lock(scope, user).get(scope, user)?.active.load(Relaxed))
    }

    /// Closes all guards of a room that was closed or deleted.
    pub fn close(&self, room: &RoomId) {
        let scope = PresenceScope::Room(room.clone());
        let mut entries = self.entries.lock_room(room);
        for entry in entries.close(&scope) {
            self.store.track(entry.report());
        }
    }

    /// The rooms in which a user is present on this node.
    pub fn rooms_of(&self, user: &UserId) -> Vec<RoomId> {
        self.entries.rooms_of(user)
    }

    /// Removes one connection. After the last one the entry stays for the grace period if `grace`
    /// is set.
    fn untrack(&self, entry: &Arc<LocalPresence>, grace: bool) {
        let mut entries = self.entries.lock(&entry.scope, &entry.user.id);
        let ends = match entries.disconnect(entry) {
            ConnectionEnd::Closed => return,
            ConnectionEnd::Fewer => false,
            ConnectionEnd::Last => true,
        };
        if ends && grace && !self.options.grace.is_zero() {
            let grace_id = self.grace_id.fetch_add(1, Relaxed).wrapping_add(1).max(1);
            entries.begin_grace(entry, grace_id);
            drop(entries);
            let at = Instant::now() + self.options.grace;
            self.expiring.lock().push_back(GraceEnd { at, entry: entry.clone(), grace_id });
            self.expiry_added.notify_one();
            return;
        }
        if ends {
            entries.remove(entry);
        }
        self.store.track(entry.report());
    }

    /// Ends grace periods, and reports the users' last activity periodically.
    async fn run(&self) {
        let mut report_active = tokio::time::interval(REPORT_ACTIVE_INTERVAL);
        loop {
            let next = self.expiring.lock().front().map(|grace| grace.at);
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
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
        let next = || self.expiring.lock().pop_front_if(|grace| grace.at <= now);
        while let Some(GraceEnd { entry, grace_id, .. }) = next() {
            let mut entries = self.entries.lock(&entry.scope, &entry.user.id);
            // A user who returned and left again has a later grace id.
            if entries.end_grace(&entry, grace_id) {
                self.store.track(entry.report());
            }
        }
    }

    fn report_active(&self) {
        for entries in self.entries.each() {
            for entry in entries.iter() {
                if entry.active_is_unreported.swap(false, Relaxed) {
                    self.store.track(entry.report());
                }
            }
        }
    }
}

impl PresenceGuard {
    /// Reads the state of the room as if the user joined now.
    pub fn rejoin_snapshot(&self) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let not_found = || Box::pin(std::future::ready(Err(AdmitError::NotFound)));
        let Some(presence) = &self.presence else { return not_found() };
        let _entries = presence.entries.lock(&self.entry.scope, &self.entry.user.id);
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
        self.entry.is_closed()
    }

    /// Tells later whether the room was closed, without keeping the user present.
    pub fn room_alive(&self) -> RoomAlive {
        RoomAlive(self.entry.clone())
    }

    /// The room; `None` for the cluster.
    pub fn room(&self) -> Option<&RoomId> {
        self.entry.room()
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
