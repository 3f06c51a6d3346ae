//! Who is where on this node, and for how long after the last connection has gone.
//!
//! A connection in a room holds a [`PresenceGuard`]. The first one of a user takes a seat in the
//! [registry](crate::bus::registry), and when the last one is dropped the seat is kept for a moment,
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
use shared::{
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
const ACTIVE_EVERY: Duration = Duration::from_secs(5);

/// No user's id comes before it.
static LOWEST_USER: LazyLock<UserId> = LazyLock::new(|| "+".parse().expect("a user id"));

/// How presence is kept and told.
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

/// The seats of this node.
pub struct Presence {
    registry: Arc<dyn PresenceStore>,
    options: PresenceOptions,
    /// The registry is told while it is locked, so that a later change of a seat is told later. Never
    /// the other way round.
    seats: Mutex<Seats>,
    /// Somebody leaves.
    leaves: Notify,
}

#[derive(Default)]
struct Seats {
    /// Ordered by place and user.
    seated: BTreeSet<BySeat>,
    /// Seats whose last connection has gone, in that order, with what they were kept under.
    leaving: VecDeque<(Instant, Arc<Seated>, u32)>,
    /// How often a seat was kept.
    kept: u32,
    /// How many of the seats are the cluster's.
    connected: u64,
}

/// A user at one place of this node. There is one for each connection and room, so that its size
/// counts. What may change does so while the seats are locked, but for `active` and `typed`.
#[derive(Debug)]
struct Seated {
    place: PresenceScope,
    user: UserInfo,
    since: UnixMillis,
    connections: AtomicU32,
    /// Under which number the seat is kept without a connection; 0: it is not.
    kept: AtomicU32,
    /// When the user did something last.
    active: AtomicU64,
    /// When it was passed on last that the user types, and whether: ms, shifted by one.
    typed: AtomicU64,
    /// Whether the user was let in.
    admitted: AtomicBool,
    /// Whether the registry has not been told of `active` yet.
    is_news: AtomicBool,
    /// The room is no more.
    closed: AtomicBool,
}

/// One connection's part in a place. The user leaves some time after the last is dropped.
pub struct PresenceGuard {
    /// `None`: it has left on purpose.
    presence: Option<Arc<Presence>>,
    seated: Arc<Seated>,
}

/// Whether a guard is one still.
#[derive(Clone, Debug)]
pub struct RoomAlive(Arc<Seated>);

impl RoomAlive {
    /// Whether the room was closed.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Acquire)
    }
}

/// What seats are ordered by.
trait ByPlaceAndUser {
    fn key(&self) -> (&PresenceScope, &UserId);
}

struct BySeat(Arc<Seated>);

impl ByPlaceAndUser for BySeat {
    fn key(&self) -> (&PresenceScope, &UserId) {
        (&self.0.place, &self.0.user.id)
    }
}

impl ByPlaceAndUser for (&PresenceScope, &UserId) {
    fn key(&self) -> (&PresenceScope, &UserId) {
        *self
    }
}

impl Ord for dyn ByPlaceAndUser + '_ {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for dyn ByPlaceAndUser + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for dyn ByPlaceAndUser + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for dyn ByPlaceAndUser + '_ {}

impl Ord for BySeat {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for BySeat {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for BySeat {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for BySeat {}

impl<'a> Borrow<dyn ByPlaceAndUser + 'a> for BySeat {
    fn borrow(&self) -> &(dyn ByPlaceAndUser + 'a) {
        self
    }
}

impl Seats {
    fn get(&self, place: &PresenceScope, user: &UserId) -> Option<&Arc<Seated>> {
        let key: &dyn ByPlaceAndUser = &(place, user);
        self.seated.get(key).map(|seat| &seat.0)
    }

    fn insert(&mut self, seated: &Arc<Seated>) {
        self.connected += u64::from(seated.place == PresenceScope::Cluster);
        self.seated.insert(BySeat(seated.clone()));
    }

    fn remove(&mut self, seated: &Seated) {
        let key: &dyn ByPlaceAndUser = &(&seated.place, &seated.user.id);
        if self.seated.remove(key) {
            self.connected -= u64::from(seated.place == PresenceScope::Cluster);
        }
    }

    /// The seats at a place.
    fn at<'a>(&'a self, place: &'a PresenceScope) -> impl Iterator<Item = &'a Arc<Seated>> {
        let first = (place, &*LOWEST_USER);
        let first: &dyn ByPlaceAndUser = &first;
        let here = self.seated.range::<dyn ByPlaceAndUser, _>((Included(first), Unbounded));
        here.map(|seat| &seat.0).take_while(move |seat| seat.place == *place)
    }
}

type Entering = BoxFuture<Result<JoinSnapshot, AdmitError>>;

impl Seated {
    fn seat(&self) -> NodePresence {
        let kept = u32::from(self.kept.load(Relaxed) != 0);
        NodePresence {
            scope: self.place.clone(),
            user: self.user.clone(),
            connections: self.connections.load(Relaxed).max(kept),
            since: self.since,
            active: self.active.load(Relaxed),
            admitted: self.admitted.load(Relaxed),
        }
    }
}

impl Presence {
    /// Starts the task that has users leave.
    pub fn start(
        registry: Arc<dyn PresenceStore>,
        options: PresenceOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let presence =
            Arc::new(Self { registry, options, seats: Mutex::default(), leaves: Notify::new() });
        let (looking, stopped) = (presence.clone(), tasks.stopped().clone());
        tasks.spawn_service("presence", async move {
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = looking.look() => {}
            }
        });
        presence
    }

    /// What was configured.
    pub fn options(&self) -> &PresenceOptions {
        &self.options
    }

    /// The registry.
    pub fn registry(&self) -> &Arc<dyn PresenceStore> {
        &self.registry
    }

    /// Has a user enter by one more connection. Dropped before it resolves, the user leaves again.
    ///
    /// # Errors
    ///
    /// [`AdmitError`], and nothing has changed.
    pub async fn enter(
        self: &Arc<Self>,
        place: PresenceScope,
        person: &UserInfo,
        rules: Option<JoinConditions>,
    ) -> Result<(PresenceGuard, JoinSnapshot), AdmitError> {
        let (guard, entering, was_here) = self.sit(place, person, rules);
        match entering.await {
            Ok(entered) => {
                guard.seated.admitted.store(true, Relaxed);
                Ok((guard, entered))
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
    pub async fn appear(self: &Arc<Self>, person: &UserInfo, wait: Duration) -> PresenceGuard {
        let (guard, entering, _) = self.sit(PresenceScope::Cluster, person, None);
        let _ = tokio::time::timeout(wait, entering).await;
        guard
    }

    /// As [`Presence::appear`], without waiting.
    pub fn appear_soon(self: &Arc<Self>, person: &UserInfo) -> PresenceGuard {
        self.sit(PresenceScope::Cluster, person, None).0
    }

    fn sit(
        self: &Arc<Self>,
        place: PresenceScope,
        person: &UserInfo,
        rules: Option<JoinConditions>,
    ) -> (PresenceGuard, Entering, bool) {
        let now = unix_millis_now();
        let mut seats = self.seats.lock();
        let known = seats.get(&place, &person.id).cloned();
        let was_here = known.is_some();
        let seated = known.unwrap_or_else(|| {
            // The names of a room are one in memory.
            let one = seats.at(&place).next().map(|other| other.place.clone());
            let place = one.unwrap_or(place);
            // Who is connected keeps to no rules.
            let admitted = place == PresenceScope::Cluster;
            let seated = Arc::new(Seated {
                place,
                user: person.clone(),
                since: now,
                connections: 0.into(),
                kept: 0.into(),
                active: now.into(),
                typed: 0.into(),
                admitted: admitted.into(),
                is_news: false.into(),
                closed: false.into(),
            });
            seats.insert(&seated);
            seated
        });
        seated.connections.fetch_add(1, Relaxed);
        seated.kept.store(0, Relaxed);
        seated.active.store(now, Relaxed);
        let entering = self.registry.admit(seated.seat(), rules);
        drop(seats);
        (PresenceGuard { presence: Some(self.clone()), seated }, entering, was_here)
    }

    /// Who is connected to any node: at most `limit` whose ids follow `after`.
    ///
    /// # Errors
    ///
    /// [`BusError`], where the other nodes cannot be asked.
    pub async fn online(&self, after: String, limit: usize) -> Result<OnlinePage, BusError> {
        if let Some(online) = self.registry.online(after.clone(), limit).await? {
            return Ok(online);
        }
        let seats = self.seats.lock();
        let mut here =
            seats.at(&PresenceScope::Cluster).filter(|seated| seated.user.id.as_str() > &*after);
        let detail = |seated: &Arc<Seated>| {
            let NodePresence { user, connections, since, active, .. } = seated.seat();
            UserPresence { user, connections: connections.into(), since, active, read: 0 }
        };
        let users = here.by_ref().take(limit).map(detail).collect();
        Ok(OnlinePage { users, count: seats.connected, more: here.next().is_some() })
    }

    /// Whether users are connected to any node, and when each did something last.
    ///
    /// # Errors
    ///
    /// [`BusError`], where the other nodes cannot be asked.
    pub async fn statuses(&self, users: Vec<UserId>) -> Result<Vec<OnlineStatus>, BusError> {
        let mut statuses = self.registry.statuses(users.clone()).await?;
        let seats = self.seats.lock();
        for (user, status) in users.iter().zip(&mut statuses) {
            if let Some(seated) = seats.get(&PresenceScope::Cluster, user) {
                let active = seated.active.load(Relaxed);
                let active = status.active.max(Some(active));
                *status = OnlineStatus { online: true, active, complete: true };
            }
        }
        Ok(statuses)
    }

    /// When a user did something last at a place of this node.
    pub fn active(&self, place: &PresenceScope, user: &UserId) -> Option<UnixMillis> {
        Some(self.seats.lock().get(place, user)?.active.load(Relaxed))
    }

    /// Ends all stays in a room, which is no more.
    pub fn close(&self, room: &RoomId) {
        let place = PresenceScope::Room(room.clone());
        let seats = &mut *self.seats.lock();
        for seated in seats.at(&place).cloned().collect::<Vec<_>>() {
            self.end(seats, &seated);
        }
    }

    fn end(&self, seats: &mut Seats, seated: &Arc<Seated>) {
        seated.closed.store(true, Release);
        seated.connections.store(0, Relaxed);
        seated.kept.store(0, Relaxed);
        self.registry.track(seated.seat());
        seats.remove(seated);
    }

    /// The rooms that a user is in on this node.
    pub fn rooms_of(&self, user: &UserId) -> Vec<RoomId> {
        let seats = self.seats.lock();
        let of_user = seats.seated.iter().map(|seat| &seat.0).filter(|seat| seat.user.id == *user);
        of_user
            .filter_map(|seated| match &seated.place {
                PresenceScope::Room(room) => Some(room.clone()),
                PresenceScope::Cluster => None,
            })
            .collect()
    }

    /// One connection less. The last one keeps the seat for a while where `grace` says so.
    fn unseat(&self, seated: &Arc<Seated>, grace: bool) {
        let mut guard = self.seats.lock();
        let seats = &mut *guard;
        // Its room was closed; the user may have come back to another one of its name.
        if seated.closed.load(Acquire) {
            return;
        }
        let before = seated.connections.fetch_sub(1, Relaxed);
        if before == 1 && grace && !self.options.grace.is_zero() {
            seats.kept = seats.kept.wrapping_add(1).max(1);
            seated.kept.store(seats.kept, Relaxed);
            let until = Instant::now() + self.options.grace;
            seats.leaving.push_back((until, seated.clone(), seats.kept));
            self.leaves.notify_one();
            return;
        }
        if before == 1 {
            seats.remove(seated);
        }
        self.registry.track(seated.seat());
    }

    /// Has users leave whose time has come, and tells now and then when users did something.
    async fn look(&self) {
        let mut tell_active = tokio::time::interval(ACTIVE_EVERY);
        loop {
            let next = self.seats.lock().leaving.front().map(|(until, ..)| *until);
            let due = async {
                match next {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = due => self.let_leave(Instant::now()),
                () = self.leaves.notified() => {}
                _ = tell_active.tick() => self.tell_active(),
            }
        }
    }

    fn let_leave(&self, now: Instant) {
        let mut guard = self.seats.lock();
        let seats = &mut *guard;
        while let Some((_, seated, kept)) = seats.leaving.pop_front_if(|(until, ..)| *until <= now)
        {
            // Who came back and left once more is kept under another number.
            if seated.kept.compare_exchange(kept, 0, Relaxed, Relaxed).is_ok() {
                self.registry.track(seated.seat());
                seats.remove(&seated);
            }
        }
    }

    fn tell_active(&self) {
        for BySeat(seated) in &self.seats.lock().seated {
            if seated.is_news.swap(false, Relaxed) {
                self.registry.track(seated.seat());
            }
        }
    }
}

impl PresenceGuard {
    /// Asks what the user would be told on entering now.
    pub fn rejoin_snapshot(&self) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let not_found = || Box::pin(std::future::ready(Err(AdmitError::NotFound)));
        let Some(presence) = &self.presence else { return not_found() };
        let _seats = presence.seats.lock();
        if self.is_closed() {
            return not_found();
        }
        presence.registry.admit(self.seated.seat(), None)
    }

    /// The user did something.
    pub fn touch(&self) {
        self.seated.active.store(unix_millis_now(), Relaxed);
        self.seated.is_news.store(true, Relaxed);
    }

    /// Whether it is to be passed on that the user types, or has stopped: when that has changed, and
    /// again after `every`.
    pub fn should_publish_typing(&self, is_typing: bool, every: Duration) -> bool {
        let (now, typed) = (unix_millis_now(), self.seated.typed.load(Relaxed));
        let same = typed & 1 == u64::from(is_typing);
        let rests = now.saturating_sub(typed >> 1) >= every.as_millis() as u64;
        if same && !rests {
            return false;
        }
        self.seated.typed.store(now << 1 | u64::from(is_typing), Relaxed);
        true
    }

    /// Whether the room was closed since.
    pub fn is_closed(&self) -> bool {
        self.seated.closed.load(Acquire)
    }

    /// Tells later whether the room was closed since, without keeping the user there.
    pub fn room_alive(&self) -> RoomAlive {
        RoomAlive(self.seated.clone())
    }

    /// The room; `None` for the cluster.
    pub fn room(&self) -> Option<&RoomId> {
        match &self.seated.place {
            PresenceScope::Room(room) => Some(room),
            PresenceScope::Cluster => None,
        }
    }

    /// Leaves, on purpose: the user's last connection does so at once.
    pub fn leave(mut self) {
        if let Some(presence) = self.presence.take() {
            presence.unseat(&self.seated, false);
        }
    }
}

impl Drop for PresenceGuard {
    fn drop(&mut self) {
        if let Some(presence) = self.presence.take() {
            presence.unseat(&self.seated, true);
        }
    }
}
