//! Who is where on this node, and for how long after the last connection has gone.
//!
//! A connection in a room holds a [`Stay`]. The first one of a user takes a seat in the
//! [registry](crate::bus::registry), and when the last one is dropped the seat is kept for a moment,
//! so that who reloads a page does not leave and come back for everybody else.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use shared::{
    ids::{DisplayName, RoomId, UserId},
    protocol::answer::Person,
};
use tokio::{sync::Notify, time::Instant};

use crate::{
    bus::{
        BoxFuture,
        registry::{EnterError, Entered, Millis, Place, Registry, Rules, Seat, millis_now},
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
    registry: Arc<dyn Registry>,
    options: PresenceOptions,
    /// The registry is told while it is locked, so that a later change of a seat is told later. Never
    /// the other way round.
    seats: Mutex<Seats>,
    /// Somebody leaves.
    leaves: Notify,
}

#[derive(Default)]
struct Seats {
    seated: BTreeMap<(Place, UserId), Seated>,
    /// Seats whose last connection has gone, in that order.
    leaving: VecDeque<(Instant, Place, UserId)>,
}

/// A user at one place of this node.
struct Seated {
    name: DisplayName,
    connections: u32,
    since: Millis,
    shared: Arc<Shared>,
    /// When the registry was told last that the user did something.
    told: Millis,
    /// Until when the seat is kept without a connection.
    kept_until: Option<Instant>,
}

/// What the stays of one user at one place share.
#[derive(Debug, Default)]
struct Shared {
    active: AtomicU64,
    closed: AtomicBool,
}

/// One connection's part in a place. The user leaves some time after the last is dropped.
pub struct Stay {
    presence: Arc<Presence>,
    place: Place,
    user: UserId,
    shared: Arc<Shared>,
    left: bool,
}

type Entering = BoxFuture<Result<Entered, EnterError>>;

impl Seated {
    fn seat(&self, place: &Place, user: &UserId) -> Seat {
        let kept = u32::from(self.kept_until.is_some());
        Seat {
            place: place.clone(),
            user: Person { id: user.clone(), name: self.name.clone() },
            connections: self.connections.max(kept),
            since: self.since,
            active: self.shared.active.load(Ordering::Relaxed),
        }
    }
}

impl Presence {
    /// Starts the task that has users leave.
    pub fn start(
        registry: Arc<dyn Registry>,
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
    pub fn registry(&self) -> &Arc<dyn Registry> {
        &self.registry
    }

    /// Has a user enter by one more connection. Dropped before it resolves, the user leaves again.
    ///
    /// # Errors
    ///
    /// [`EnterError`], and nothing has changed.
    pub async fn enter(
        self: &Arc<Self>,
        place: Place,
        person: &Person,
        rules: Option<Rules>,
    ) -> Result<(Stay, Entered), EnterError> {
        let (stay, entering, was_here) = self.sit(place, person, rules);
        match entering.await {
            Ok(entered) => Ok((stay, entered)),
            Err(error) => {
                if !was_here {
                    stay.leave();
                }
                Err(error)
            }
        }
    }

    /// Has a user be connected by one more connection, and waits until that can be seen, but not
    /// longer than `wait`: then it will be.
    pub async fn appear(self: &Arc<Self>, person: &Person, wait: Duration) -> Stay {
        let (stay, entering, _) = self.sit(Place::Cluster, person, None);
        let _ = tokio::time::timeout(wait, entering).await;
        stay
    }

    /// As [`Presence::appear`], without waiting.
    pub fn appear_soon(self: &Arc<Self>, person: &Person) -> Stay {
        self.sit(Place::Cluster, person, None).0
    }

    fn sit(
        self: &Arc<Self>,
        place: Place,
        person: &Person,
        rules: Option<Rules>,
    ) -> (Stay, Entering, bool) {
        let user = person.id.clone();
        let mut seats = self.seats.lock();
        let mut was_here = true;
        let seated = seats.seated.entry((place.clone(), user.clone())).or_insert_with(|| {
            was_here = false;
            let now = millis_now();
            let shared = Shared { active: now.into(), closed: false.into() };
            let (shared, name) = (Arc::new(shared), person.name.clone());
            Seated { name, connections: 0, since: now, shared, told: now, kept_until: None }
        });
        seated.connections += 1;
        seated.kept_until = None;
        seated.shared.active.store(millis_now(), Ordering::Relaxed);
        let (seat, shared) = (seated.seat(&place, &user), seated.shared.clone());
        let entering = self.registry.enter(seat, rules);
        drop(seats);
        let stay = Stay { presence: self.clone(), place, user, shared, left: false };
        (stay, entering, was_here)
    }

    /// When a user did something last at a place of this node.
    pub fn active(&self, place: &Place, user: &UserId) -> Option<Millis> {
        let seats = self.seats.lock();
        let seated = seats.seated.get(&(place.clone(), user.clone()))?;
        Some(seated.shared.active.load(Ordering::Relaxed))
    }

    /// Ends all stays in a room, which is no more.
    pub fn close(&self, room: &RoomId) {
        let place = Place::Room(room.clone());
        let Seats { seated, .. } = &mut *self.seats.lock();
        let first = (place.clone(), LOWEST_USER.clone());
        let here = seated.range(first..).map(|(key, _)| key).take_while(|(at, _)| *at == place);
        for key in here.cloned().collect::<Vec<_>>() {
            if let Some(mut seated) = seated.remove(&key) {
                seated.shared.closed.store(true, Ordering::Release);
                (seated.connections, seated.kept_until) = (0, None);
                self.registry.seat(seated.seat(&key.0, &key.1));
            }
        }
    }

    /// One connection less. The last one keeps the seat for a while where `grace` says so.
    fn unseat(&self, stay: &Stay, grace: bool) {
        let key = (stay.place.clone(), stay.user.clone());
        let mut guard = self.seats.lock();
        let seats = &mut *guard;
        let Some(seated) = seats.seated.get_mut(&key) else { return };
        // The room was closed, and the user has come back to another one of its name.
        if !Arc::ptr_eq(&seated.shared, &stay.shared) {
            return;
        }
        seated.connections = seated.connections.saturating_sub(1);
        if seated.connections == 0 && grace && !self.options.grace.is_zero() {
            let until = Instant::now() + self.options.grace;
            seated.kept_until = Some(until);
            seats.leaving.push_back((until, key.0, key.1));
            self.leaves.notify_one();
            return;
        }
        let seat = seated.seat(&key.0, &key.1);
        if seat.connections == 0 {
            seats.seated.remove(&key);
        }
        self.registry.seat(seat);
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
        let Seats { seated, leaving } = &mut *guard;
        while let Some((until, place, user)) = leaving.pop_front_if(|(until, ..)| *until <= now) {
            let key = (place, user);
            let Some(seat) = seated.get_mut(&key) else { continue };
            // Who came back and left once more has another time.
            if seat.kept_until == Some(until) {
                seat.kept_until = None;
                let seat = seat.seat(&key.0, &key.1);
                seated.remove(&key);
                self.registry.seat(seat);
            }
        }
    }

    fn tell_active(&self) {
        let mut guard = self.seats.lock();
        for ((place, user), seated) in &mut guard.seated {
            let active = seated.shared.active.load(Ordering::Relaxed);
            if active > seated.told {
                seated.told = active;
                self.registry.seat(seated.seat(place, user));
            }
        }
    }
}

impl Stay {
    /// Asks what the user would be told on entering now.
    pub fn look_again(&self) -> BoxFuture<Result<Entered, EnterError>> {
        let seats = self.presence.seats.lock();
        let seated = seats.seated.get(&(self.place.clone(), self.user.clone()));
        match seated.map(|seated| seated.seat(&self.place, &self.user)) {
            Some(seat) => self.presence.registry.enter(seat, None),
            None => Box::pin(std::future::ready(Err(EnterError::NotFound))),
        }
    }

    /// The user did something.
    pub fn touch(&self) {
        self.shared.active.store(millis_now(), Ordering::Relaxed);
    }

    /// Whether the room was closed since.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// The room; `None` for the cluster.
    pub fn room(&self) -> Option<&RoomId> {
        match &self.place {
            Place::Room(room) => Some(room),
            Place::Cluster => None,
        }
    }

    /// Leaves, on purpose: the user's last connection does so at once.
    pub fn leave(mut self) {
        self.left = true;
        self.presence.unseat(&self, false);
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if !self.left {
            self.presence.unseat(self, true);
        }
    }
}
