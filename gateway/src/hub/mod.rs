//! The hub: which local connections are in which room, and the handing out of what arrives.
//!
//! Rooms are spread over shards; each shard is one task that owns its rooms, so that a room's
//! entries stay in order and nothing is locked. A turn takes what has gathered in the mailbox,
//! places each entry in the outboxes of the room's members as shared bytes, and at its end writes
//! to every touched socket once. Nothing here waits for a client or for the bus: reads of a log
//! are tasks that put their answer into the shard's own queue.
//!
//! A room is followed while it has members here, and for [`LINGER`] after.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use shared::{
    ids::{ConnectionId, RoomId},
    position::Position,
    protocol::{
        Ref,
        answer::{Answer, Left},
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    bus::{Bus, BusError, Letter, Letters, Mailboxes, Range},
    delivery::{Entry, page::Page},
    drain::Tasks,
    telemetry::metrics::{Arrival, Metrics, Repair},
};

pub mod member;
pub mod join;
mod room;

use join::{Join, Start, Step};
use member::{Subscriber, Turn};
use room::{Fed, Need, Reading, Room};

/// How long a room without members is still followed, so that who reloads a page finds it.
pub const LINGER: Duration = Duration::from_secs(30);
/// How many calls may wait for a shard; more wait with their caller.
const QUEUE_LEN_MAX: usize = 4096;
/// How many entries a shard's mailbox holds; above it they are read from the log instead.
pub const MAILBOX_LEN: usize = 16_384;
/// How many letters and calls one turn takes, so that what was placed is written soon.
const TURN_LEN: usize = 512;
/// The most rooms a shard unfollows in a second, so that the bus keeps up.
const UNFOLLOWS_MAX: usize = 1000;
/// How often the logs of rooms in which nothing arrives are compared with what was passed on. It
/// bounds every deafness that shows in no other way: twice this at most.
pub const COMPARE_EVERY: Duration = Duration::from_secs(5);
/// How long to wait before a log that could not be read is read again.
const READ_AGAIN: Duration = Duration::from_millis(250);

/// A handle to the hub. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    shards: Arc<[mpsc::Sender<Call>]>,
    mailboxes: Mailboxes,
}

/// The room cannot be followed: the bus is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the room cannot be followed while the bus is away")]
pub struct NotFollowed;

/// What a shard is asked to do.
enum Call {
    Join(RoomId, Join),
    Leave {
        room: RoomId,
        connection: ConnectionId,
        /// Sent behind the last entry.
        answer: Option<(Arc<Subscriber>, Bytes)>,
    },
    GiveUp {
        room: RoomId,
        subscriber: Arc<Subscriber>,
    },
    CatchUp {
        room: RoomId,
        connection: ConnectionId,
    },
    Compared {
        rooms: Vec<(RoomId, u64)>,
        heads: Vec<Option<Position>>,
    },
    Answered {
        room: RoomId,
        generation: u64,
        purpose: Purpose,
        result: Result<Page, BusError>,
    },
}

/// What a log was read for.
enum Purpose {
    /// To open the room: it is subscribed to as well.
    Open,
    /// To go on from the top.
    GoOn,
    /// To answer a join.
    Join(Join),
    /// To feed a member that is behind, from where it was.
    Feed(ConnectionId, Position),
}

impl Hub {
    /// Starts a task per mailbox.
    ///
    /// `ring_bytes_max` bounds what all rings hold together.
    pub fn start(
        bus: &Arc<dyn Bus>,
        mailboxes: Mailboxes,
        letters: Vec<Letters>,
        ring_bytes_max: usize,
        metrics: &Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        let ring_bytes_max = ring_bytes_max / letters.len().max(1);
        let start = |letters: Letters| {
            let (calls, queue) = mpsc::channel(QUEUE_LEN_MAX);
            let shard = Shard {
                rooms: HashMap::new(),
                generation: 0,
                bus: bus.clone(),
                metrics: metrics.clone(),
                tasks: tasks.clone(),
                calls: calls.clone(),
                turn: Turn::default(),
                lingering: VecDeque::new(),
                comparing: Reading::No,
                compared: Instant::now(),
                ring_bytes: 0,
                ring_bytes_max,
                members: 0,
            };
            tasks.spawn_service("hub_shard", shard.run(queue, letters));
            calls
        };
        Self { shards: letters.into_iter().map(start).collect(), mailboxes }
    }

    /// Makes a connection a member of a room. Resolves when `joined` has been sent.
    ///
    /// Who drops the future before it resolves has to [give up](Hub::give_up) or leave.
    ///
    /// # Errors
    ///
    /// [`NotFollowed`], and the connection is no member.
    pub async fn join(
        &self,
        room: RoomId,
        subscriber: Arc<Subscriber>,
        reference: Option<Ref>,
        start: Start,
    ) -> Result<(), NotFollowed> {
        let (done, joined) = oneshot::channel();
        let join = Join { subscriber, reference, start, done, refreshed: false, lost: None };
        self.call(room.clone(), Call::Join(room, join)).await;
        joined.await.map_err(|_| NotFollowed)
    }

    /// Ends a membership, if there is one. `answer` is sent in any case, behind the last entry.
    pub async fn leave(
        &self,
        room: RoomId,
        connection: ConnectionId,
        answer: Option<(Arc<Subscriber>, Bytes)>,
    ) {
        self.call(room.clone(), Call::Leave { room, connection, answer }).await;
    }

    /// Ends a membership that a join which was given up may have brought about all the same; its
    /// `joined` is then followed by `left`.
    pub async fn give_up(&self, room: RoomId, subscriber: Arc<Subscriber>) {
        self.call(room.clone(), Call::GiveUp { room, subscriber }).await;
    }

    /// Gives a member that is behind what its outbox has room for.
    pub async fn catch_up(&self, room: RoomId, connection: ConnectionId) {
        self.call(room.clone(), Call::CatchUp { room, connection }).await;
    }

    async fn call(&self, room: RoomId, call: Call) {
        // A shard is gone only when the process stops, and with it everything it would do.
        let _ = self.shards[self.mailboxes.shard_of(&room)].send(call).await;
    }
}

/// The task of some rooms.
struct Shard {
    rooms: HashMap<RoomId, Room>,
    /// Counts followings, so that an answer for an earlier one is not taken for a later one.
    generation: u64,
    bus: Arc<dyn Bus>,
    metrics: Arc<Metrics>,
    tasks: Tasks,
    calls: mpsc::Sender<Call>,
    turn: Turn,
    /// Rooms without members, in the order of their becoming so.
    lingering: VecDeque<(Instant, RoomId)>,
    /// Whether heads of logs are being asked for.
    comparing: Reading,
    /// When the rooms in which nothing arrives were compared last.
    compared: Instant,
    ring_bytes: usize,
    ring_bytes_max: usize,
    /// Memberships, as last counted.
    members: usize,
}

impl Shard {
    async fn run(mut self, mut queue: mpsc::Receiver<Call>, mut letters: Letters) {
        let stopped = self.tasks.stopped().clone();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut calls, mut arrived) = (Vec::new(), Vec::new());
        loop {
            // All arms are cancel-safe.
            tokio::select! {
                () = stopped.cancelled() => break,
                _ = queue.recv_many(&mut calls, TURN_LEN) => {}
                _ = letters.letters.recv_many(&mut arrived, TURN_LEN) => {}
                () = letters.doubt.raised() => {}
                now = tick.tick() => self.look_around(now),
            }
            // What arrived before a call was made is handed out before it: who sends and then leaves
            // gets its own copy.
            while arrived.len() < TURN_LEN
                && let Ok(letter) = letters.letters.try_recv()
            {
                arrived.push(letter);
            }
            let begun = Instant::now();
            let worth_timing = !arrived.is_empty();
            for letter in arrived.drain(..) {
                match letter {
                    Letter::Entry(room, entry) => self.arrive(room, entry),
                    Letter::Holdings(answer) => {
                        let held = self.rooms.values().filter_map(Room::held_of_log).collect();
                        // Who asked may have met yet another server meanwhile.
                        let _ = answer.send(held);
                    }
                }
            }
            if letters.doubt.take() {
                self.doubt();
            }
            for call in calls.drain(..) {
                self.take(call);
            }
            self.turn.finish(&self.metrics);
            if worth_timing {
                self.metrics.fan_out_seconds.observe(begun.elapsed().as_secs_f64());
            }
        }
    }

    fn take(&mut self, call: Call) {
        match call {
            Call::Join(room, join) => self.join(room, join),
            Call::Leave { room, connection, answer } => self.leave(room, connection, answer),
            Call::GiveUp { room, subscriber } => self.give_up(&room, &subscriber),
            Call::CatchUp { room, connection } => self.feed(&room, connection),
            Call::Compared { rooms, heads } => self.compared(rooms, &heads),
            Call::Answered { room, generation, purpose, result } => {
                self.answered(room, generation, purpose, result);
            }
        }
    }

    fn arrive(&mut self, name: RoomId, entry: Entry) {
        let Some(room) = self.rooms.get_mut(&name) else {
            self.metrics.arrivals.of(Arrival::Unwanted).inc();
            return;
        };
        let ring_max = room::ring_max(self.ring_bytes, self.ring_bytes_max);
        let before = room.ring_bytes();
        let need = room.arrive(entry, ring_max, &mut self.turn, &self.metrics);
        let after = room.ring_bytes();
        self.count_ring_bytes(before, after);
        if need == Need::Read {
            self.read_on(&name);
        }
    }

    fn count_ring_bytes(&mut self, before: usize, after: usize) {
        self.ring_bytes = self.ring_bytes - before + after;
        self.metrics.ring_bytes.add(after as i64 - before as i64);
    }

    /// Entries of any room may have been lost: all logs are compared with what was passed on.
    fn doubt(&mut self) {
        if self.comparing != Reading::No {
            self.comparing = Reading::Again;
            return;
        }
        let mut rooms = Vec::with_capacity(self.rooms.len());
        for (name, room) in &mut self.rooms {
            if room.reading == Reading::No {
                rooms.push((name.clone(), room.generation));
            } else {
                room.reading = Reading::Again;
            }
        }
        self.compare(rooms);
    }

    /// Compares the logs of rooms in which nothing has arrived for a while, as in a doubt.
    fn compare_silent(&mut self, now: Instant) {
        if now - self.compared < COMPARE_EVERY || self.comparing != Reading::No {
            return;
        }
        self.compared = now;
        let mut rooms = Vec::new();
        for (name, room) in &mut self.rooms {
            let heard = std::mem::take(&mut room.heard);
            if !heard && room.reading == Reading::No {
                rooms.push((name.clone(), room.generation));
            }
        }
        self.compare(rooms);
    }

    /// Asks for the heads of `rooms` in a task, until they are there.
    fn compare(&mut self, rooms: Vec<(RoomId, u64)>) {
        if rooms.is_empty() {
            return;
        }
        self.comparing = Reading::Yes;
        let (bus, calls, metrics) = (self.bus.clone(), self.calls.clone(), self.metrics.clone());
        let stopped = self.tasks.stopped().clone();
        let compare = async move {
            let names: Vec<RoomId> = rooms.iter().map(|(name, _)| name.clone()).collect();
            let heads = loop {
                match bus.heads(names.clone()).await {
                    Ok(heads) => break heads,
                    Err(_) => metrics.repairs.of(Repair::Failed).inc(),
                }
                tokio::time::sleep(READ_AGAIN).await;
            };
            let _ = calls.send(Call::Compared { rooms, heads }).await;
        };
        self.tasks.spawn_service("compare_heads", async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = compare => {}
            }
        });
    }

    /// Reads on where a log has what was not passed on.
    fn compared(&mut self, rooms: Vec<(RoomId, u64)>, heads: &[Option<Position>]) {
        let again = self.comparing == Reading::Again;
        self.comparing = Reading::No;
        for ((name, generation), head) in rooms.into_iter().zip(heads) {
            let room = self.rooms.get(&name).filter(|room| room.generation == generation);
            if room.is_some_and(|room| !room.has_reached(head.as_ref())) {
                self.read_on(&name);
            }
        }
        if again {
            self.doubt();
        }
    }

    /// Reads a room's log from its top on, or again once the read under way has come back.
    fn read_on(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.reading != Reading::No {
            room.reading = Reading::Again;
            return;
        }
        room.reading = Reading::Yes;
        let (generation, range) = (room.generation, room.next_range());
        self.read(name.clone(), generation, Purpose::GoOn, range);
    }

    fn join(&mut self, name: RoomId, join: Join) {
        let Some(room) = self.rooms.get_mut(&name) else {
            return self.open(name, join);
        };
        if room.reading != Reading::No {
            room.wait(join);
            return;
        }
        let step = room.join(join, &mut self.turn, &self.metrics);
        self.go_on_with(&name, step);
    }

    fn go_on_with(&mut self, name: &RoomId, step: Step) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match step {
            Step::Done => self.note_if_idle(name),
            Step::Read(join, range) => {
                room.idle_since = None;
                let generation = room.generation;
                self.read(name.clone(), generation, Purpose::Join(join), range);
            }
            Step::Wait(join) => {
                room.wait(join);
                self.read_on(name);
            }
        }
    }

    /// Follows a room: subscribes, then reads its log.
    fn open(&mut self, name: RoomId, join: Join) {
        self.generation += 1;
        let mut room = Room::opening(name.clone(), self.generation);
        room.wait(join);
        let range = room.next_range();
        self.rooms.insert(name.clone(), room);
        self.metrics.rooms.inc();
        self.read(name, self.generation, Purpose::Open, range);
    }

    /// Reads a log in a task, which puts the answer into this shard's queue.
    fn read(&self, room: RoomId, generation: u64, purpose: Purpose, range: Range) {
        let (bus, calls, metrics) = (self.bus.clone(), self.calls.clone(), self.metrics.clone());
        let stopped = self.tasks.stopped().clone();
        let read = async move {
            if let Purpose::Open = purpose
                && let Err(error) = bus.follow(room.clone()).await
            {
                let result = Err(error);
                let _ = calls.send(Call::Answered { room, generation, purpose, result }).await;
                return;
            }
            let mut result = bus.read(room.clone(), range).await;
            // A member waits for these, and can wait: it gets what it misses when the bus is back.
            while let (Err(_), Purpose::GoOn | Purpose::Feed(..)) = (&result, &purpose) {
                metrics.repairs.of(Repair::Failed).inc();
                tokio::time::sleep(READ_AGAIN).await;
                result = bus.read(room.clone(), range).await;
            }
            let _ = calls.send(Call::Answered { room, generation, purpose, result }).await;
        };
        self.tasks.spawn_service("read_log", async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = read => {}
            }
        });
    }

    fn answered(
        &mut self,
        name: RoomId,
        generation: u64,
        purpose: Purpose,
        result: Result<Page, BusError>,
    ) {
        let Some(room) = self.rooms.get_mut(&name).filter(|room| room.generation == generation)
        else {
            return;
        };
        match (purpose, result) {
            (Purpose::Open | Purpose::GoOn, Ok(page)) => self.opened_or_gone_on(&name, page),
            (Purpose::Open, Err(_)) => {
                // Dropping the joins tells their sessions.
                self.rooms.remove(&name);
                self.metrics.rooms.dec();
                self.bus.unfollow(name);
            }
            (Purpose::Join(join), Ok(page)) => {
                let step = room.join_with_page(join, page, &mut self.turn, &self.metrics);
                self.go_on_with(&name, step);
            }
            (Purpose::Join(join), Err(_)) => {
                drop(join);
                self.note_if_idle(&name);
            }
            (Purpose::Feed(connection, from), Ok(page)) => {
                match room.feed_page(connection, &from, page, &mut self.turn) {
                    Fed::More => self.feed(&name, connection),
                    Fed::Enough => {}
                    Fed::OtherLog => self.read_on(&name),
                }
            }
            // Those reads are repeated until they succeed.
            (Purpose::GoOn | Purpose::Feed(..), Err(_)) => {}
        }
    }

    fn opened_or_gone_on(&mut self, name: &RoomId, page: Page) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let ring_max = room::ring_max(self.ring_bytes, self.ring_bytes_max);
        let before = room.ring_bytes();
        let need = room.read(page, ring_max, &mut self.turn, &self.metrics);
        let after = room.ring_bytes();
        let waiting = room.take_waiting();
        let behind = room.behind();
        self.count_ring_bytes(before, after);
        if need == Need::Read {
            self.read_on(name);
        }
        for connection in behind {
            self.feed(name, connection);
        }
        for join in waiting {
            self.join(name.clone(), join);
        }
        self.note_if_idle(name);
    }

    /// Gives a member that is behind what is there for it.
    fn feed(&mut self, name: &RoomId, connection: ConnectionId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if let Some(from) = room.feed(connection, &mut self.turn) {
            let range = Range::After { seq: from.seq, limit: room::READ_LEN };
            let generation = room.generation;
            self.read(name.clone(), generation, Purpose::Feed(connection, from), range);
        }
    }

    fn leave(
        &mut self,
        name: RoomId,
        connection: ConnectionId,
        answer: Option<(Arc<Subscriber>, Bytes)>,
    ) {
        if let Some(room) = self.rooms.get_mut(&name) {
            room.remove(connection);
            self.note_if_idle(&name);
        }
        if let Some((subscriber, frame)) = answer {
            subscriber.release_acks(&name);
            subscriber.outbox.push(frame);
            self.turn.touch(&subscriber);
        }
    }

    fn give_up(&mut self, name: &RoomId, subscriber: &Arc<Subscriber>) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.remove(subscriber.connection) {
            subscriber.answer(&Answer::Left(Left { reference: None, room: name.clone() }));
            self.turn.touch(subscriber);
            self.note_if_idle(name);
        }
    }

    fn note_if_idle(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.is_empty() && room.idle_since.is_none() {
            let now = Instant::now();
            room.idle_since = Some(now);
            self.lingering.push_back((now, name.clone()));
        }
    }

    /// Unfollows rooms that have been without members for long enough, and forgets joins that
    /// nobody waits for any more.
    fn look_around(&mut self, now: Instant) {
        self.compare_silent(now);
        let mut left = UNFOLLOWS_MAX;
        while let Some((since, _)) = self.lingering.front()
            && now.saturating_duration_since(*since) >= LINGER
            && left > 0
        {
            left -= 1;
            let Some((since, name)) = self.lingering.pop_front() else { return };
            let Some(room) = self.rooms.get(&name) else { continue };
            if room.idle_since != Some(since) || !room.is_empty() {
                continue;
            }
            let bytes = room.ring_bytes();
            self.rooms.remove(&name);
            self.count_ring_bytes(bytes, 0);
            self.metrics.rooms.dec();
            self.bus.unfollow(name);
        }
        let mut members = 0;
        for room in self.rooms.values_mut() {
            room.forget_given_up();
            members += room.len();
        }
        self.metrics.members.add(members as i64 - self.members as i64);
        self.members = members;
    }
}
