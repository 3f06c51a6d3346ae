//! The registry of a cluster, in Redis.
//!
//! Each run of a node writes its seats under a name of its own, an *incarnation*, so that all of them
//! can be taken away in one step: by whoever notices first that its lease is over. A node begins a
//! new one whenever the nodes have agreed on a server anew, or its lease had lapsed: what the server
//! has of the one before may be wrong. It writes all its seats under the new one and then has the old
//! one taken away, so that who was there all along does not leave and come back.
//!
//! What changes goes through one queue, in order, pipelined; what fails is tried again.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rand::RngExt as _;
use redis::{Cmd, RedisError, RedisResult, Script, Value, aio::MultiplexedConnection};
use shared::{
    ids::{ConnectionId, RoomId, UserId},
    position::{Epoch, Position, Seq},
    protocol::answer::Person,
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

use super::{
    RETRY_PAUSE_MAX, RetryPause,
    agreement::{LEASE, Process},
    is_of_the_slot,
    keyspace::Keyspace,
    notice, refused_or_away,
    router::Router,
    server::Server,
    topology::Reader,
};
use crate::{
    bus::{
        Appended, BoxFuture, BusError, Done,
        registry::{
            Detail, Details, EnterError, Entered, Found, Listing, Notice, Online, Place, Record,
            RegistryOptions, Rules, Seat, Snapshot, Version,
        },
    },
    delivery::Token,
    drain::Tasks,
};

/// The most calls in one pipeline.
const BATCH_MAX: usize = 512;
/// The most calls that wait. Above it what may be lost is, and a message is `Overloaded`.
const QUEUE_MAX: usize = 65_536;
/// How long a message of a room without a log is tried to be passed on.
const PASS_ON_MAX: Duration = Duration::from_secs(5);
/// How often it is looked who has ended, and whether the servers are those of before.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How many users leave in one step.
const REAP_MAX: usize = 500;
/// How long a node that has ended in order is waited for: its clients come back on another.
const GOODBYE_GRACE_MS: u64 = 3_000;
/// How often a page of rooms is filled up where many of them are not public.
const FILL_MAX: usize = 16;

/// The registry's part of the bus.
pub(super) struct Registrar {
    router: Arc<Router>,
    process: Arc<Process>,
    options: RegistryOptions,
    scripts: Scripts,
    state: Mutex<State>,
    /// There is something to be done.
    wake: Notify,
}

struct Scripts {
    name: Script,
    seat: Script,
    reap: Script,
    mark: Script,
    create: Script,
    unlist: Script,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Op>,
    /// Seats in the queue that nobody waits for.
    touched: HashSet<(Place, UserId)>,
    /// The seats of this node.
    seats: BTreeMap<(Place, UserId), Seat>,
    /// Under which name they are written.
    incarnation: Option<String>,
    /// Names from before, to be taken away once all is written under the present one.
    old: Vec<String>,
    /// Those of them for which that is so.
    reapable: BTreeSet<String>,
    /// The servers that the seats were written to, by home.
    servers: BTreeMap<u16, (Token, u64)>,
    /// Whether the others can know of the incarnation.
    is_registered: bool,
    /// From when on every node that lives has written its seats to them.
    settled_at: Option<Instant>,
}

enum Op {
    Seat {
        key: (Place, UserId),
        rules: Option<Rules>,
        reply: Option<oneshot::Sender<Result<Entered, EnterError>>>,
    },
    Mark {
        room: RoomId,
        user: UserId,
        seq: Seq,
        by: ConnectionId,
    },
    PassOn {
        room: RoomId,
        payload: Vec<u8>,
        done: Done,
        deadline: Instant,
    },
    /// All seats before it are written under the present name.
    Reap(Vec<String>),
}

/// Calls with their numbers in the queue.
type Numbered = Vec<(usize, Op)>;

/// What a call needs to know of where a place lies.
struct Keys {
    who: String,
    here: String,
    places: String,
    record: String,
    index: String,
    marks: String,
    meta: String,
    channel: String,
    name: String,
}

impl Keyspace {
    fn home_of_place(self, place: &Place, user: &UserId) -> u16 {
        match place {
            Place::Room(room) => self.home(room),
            Place::Cluster => self.home_of_text(user.as_str()),
        }
    }

    /// The set of places where an incarnation has somebody.
    fn places(self, home: u16, incarnation: &str) -> String {
        self.named(home, &format!("places:{incarnation}"))
    }

    /// The index of rooms.
    pub(super) fn rooms(self, home: u16) -> String {
        self.named(home, "rooms")
    }

    /// The index of users who are connected.
    fn users(self, home: u16) -> String {
        self.named(home, "users")
    }

    /// What is known of them.
    fn online(self, home: u16) -> String {
        self.named(home, "online")
    }

    /// Whose incarnations there are.
    pub(super) fn incarnations(self) -> String {
        self.named(0, "incarnations")
    }

    fn keys_of(self, home: u16, place: &str, incarnation: &str) -> Option<Keys> {
        let places = self.places(home, incarnation);
        if place == CLUSTER {
            let who = self.online(home);
            return Some(Keys {
                here: format!("{who}:on:{incarnation}"),
                record: format!("{who}:record"),
                marks: format!("{who}:marks"),
                meta: format!("{who}:meta"),
                index: self.users(home),
                channel: String::new(),
                name: CLUSTER.to_owned(),
                who,
                places,
            });
        }
        let room: RoomId = place.parse().ok()?;
        let channel = self.channel(&room);
        Some(Keys {
            who: format!("{channel}:who"),
            here: format!("{channel}:on:{incarnation}"),
            places,
            record: format!("{channel}:record"),
            index: self.rooms(home),
            marks: format!("{channel}:marks"),
            meta: format!("{channel}:meta"),
            name: place.to_owned(),
            channel,
        })
    }
}

/// The name of the cluster as a place; no room has it.
const CLUSTER: &str = "*";

fn name_of(place: &Place) -> &str {
    match place {
        Place::Room(room) => room.as_str(),
        Place::Cluster => CLUSTER,
    }
}

impl Registrar {
    pub(super) fn start(
        router: Arc<Router>,
        process: Arc<Process>,
        options: RegistryOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let keyspace = router.keyspace();
        let script = |text: &str| keyspace.script(text);
        let of_places = |text: &str| {
            let present = include_str!("scripts/present.lua");
            script(&format!("#!lua flags=allow-oom\n{present}\n{text}"))
        };
        let scripts = Scripts {
            name: script(include_str!("scripts/name.lua")),
            seat: of_places(include_str!("scripts/seat.lua")),
            reap: of_places(include_str!("scripts/reap.lua")),
            mark: script(include_str!("scripts/mark.lua")),
            create: script(include_str!("scripts/create.lua")),
            unlist: script(include_str!("scripts/unlist.lua")),
        };
        let (state, wake) = (Mutex::default(), Notify::new());
        let registrar = Arc::new(Self { router, process, options, scripts, state, wake });
        let (working, reaping) = (registrar.clone(), registrar.clone());
        let work: BoxFuture<()> = Box::pin(async move { working.work().await });
        let reap: BoxFuture<()> = Box::pin(async move { reaping.reap_all().await });
        for (name, task) in [("redis_registrar", work), ("redis_reaper", reap)] {
            let stopped = tasks.stopped().clone();
            tasks.spawn_service(name, async move {
                // Both arms are cancel-safe. At the end nobody waits, and who is left is taken for
                // gone by the others.
                tokio::select! {
                    biased;
                    () = stopped.cancelled() => {}
                    () = task => {}
                }
            });
        }
        registrar
    }

    pub(super) fn seat(&self, seat: Seat) {
        self.note(seat, None, None);
    }

    pub(super) fn enter(
        &self,
        seat: Seat,
        rules: Option<Rules>,
    ) -> BoxFuture<Result<Entered, EnterError>> {
        let (reply, replied) = oneshot::channel();
        self.note(seat, rules, Some(reply));
        Box::pin(async move { replied.await.unwrap_or(Err(BusError::Unavailable.into())) })
    }

    fn note(
        &self,
        seat: Seat,
        rules: Option<Rules>,
        reply: Option<oneshot::Sender<Result<Entered, EnterError>>>,
    ) {
        let state = &mut *self.state.lock();
        let key = (seat.place.clone(), seat.user.id.clone());
        if seat.connections == 0 {
            // Its name is not needed any more.
            state.seats.remove(&key);
        } else {
            // Who may be let in is told so by the answer to who asked first.
            let admitted = seat.admitted || state.seats.get(&key).is_some_and(|of| of.admitted);
            let admitted = admitted || seat.place == Place::Cluster;
            state.seats.insert(key.clone(), Seat { admitted, ..seat });
        }
        if reply.is_some() || state.touched.insert(key.clone()) {
            state.queue.push_back(Op::Seat { key, rules, reply });
        }
        self.wake.notify_one();
    }

    pub(super) fn mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId) {
        let state = &mut *self.state.lock();
        if state.queue.len() < QUEUE_MAX {
            state.queue.push_back(Op::Mark { room, user, seq, by });
            self.wake.notify_one();
        }
    }

    pub(super) fn pass_on(&self, room: RoomId, notice: &Notice, done: Done) {
        let deadline = Instant::now() + PASS_ON_MAX;
        let op = Op::PassOn { room, payload: notice::pack(notice), done, deadline };
        let refused = {
            let queue = &mut self.state.lock().queue;
            if queue.len() < QUEUE_MAX {
                queue.push_back(op);
                None
            } else {
                Some(op)
            }
        };
        match refused {
            Some(Op::PassOn { done, .. }) => done(Err(BusError::Overloaded)),
            _ => self.wake.notify_one(),
        }
    }

    /// Does what is queued, for ever.
    async fn work(&self) {
        let mut regained = self.router.standing().regained();
        let mut pause = RetryPause::default();
        loop {
            // Cancel-safe, all of them.
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                _ = regained.changed() => self.renew(),
                () = tokio::time::sleep(self.pause()) => {}
            }
            loop {
                self.look_at_servers();
                self.expire();
                let ops = self.take(&self.router.agreed_homes());
                if ops.is_empty() {
                    break;
                }
                let left = self.perform(ops).await;
                if left.is_empty() {
                    pause = RetryPause::default();
                } else {
                    self.put_back(left);
                    pause.wait().await;
                }
            }
        }
    }

    /// How long to wait until it is looked again whether what waits can be done.
    fn pause(&self) -> Duration {
        if self.state.lock().queue.is_empty() { LOOK_EVERY } else { RETRY_PAUSE_MAX }
    }

    /// Begins a new incarnation where the nodes have agreed on a server anew.
    fn look_at_servers(&self) {
        let Some(servers) = self.router.agreed_tokens() else { return };
        if self.state.lock().servers != servers {
            self.state.lock().servers = servers;
            self.renew();
        }
    }

    /// Has all seats written again, under a new name, and then the old one taken away.
    fn renew(&self) {
        let incarnation = self.process.begin_incarnation();
        let state = &mut *self.state.lock();
        state.old.extend(state.incarnation.replace(incarnation));
        state.reapable.clear();
        state.is_registered = false;
        state.settled_at = Some(Instant::now() + LEASE);
        let State { queue, touched, seats, old, .. } = state;
        queue.retain(|op| !matches!(op, Op::Reap(_)));
        for key in seats.keys() {
            if touched.insert(key.clone()) {
                queue.push_back(Op::Seat { key: key.clone(), rules: None, reply: None });
            }
        }
        queue.push_back(Op::Reap(old.clone()));
    }

    /// Answers messages that could not be passed on in time, and forgets who does not wait any more.
    fn expire(&self) {
        let (now, mut expired) = (Instant::now(), Vec::new());
        {
            let State { queue, touched, .. } = &mut *self.state.lock();
            queue.retain_mut(|op| match op {
                Op::Seat { key, rules, reply } if reply.as_ref().is_some_and(|r| r.is_closed()) => {
                    (*rules, *reply) = (None, None);
                    touched.insert(key.clone())
                }
                _ => true,
            });
            let is_late = |op: &Op| matches!(op, Op::PassOn { deadline, .. } if *deadline <= now);
            if queue.iter().any(is_late) {
                let (late, rest): (Vec<Op>, _) =
                    std::mem::take(queue).into_iter().partition(is_late);
                (expired, *queue) = (late, rest.into());
            }
        }
        for op in expired {
            op.fail(BusError::Unavailable);
        }
    }

    /// Takes the next calls to some homes out of the queue, so that those to others hold up nobody.
    /// Where all before it is done, the old names are given to who takes them away.
    fn take(&self, homes: &BTreeSet<u16>) -> Vec<Op> {
        let State { queue, touched, reapable, .. } = &mut *self.state.lock();
        let keyspace = self.router.keyspace();
        let (mut ops, mut kept) = (Vec::new(), VecDeque::new());
        while ops.len() < BATCH_MAX
            && let Some(op) = queue.pop_front()
        {
            if let Op::Reap(names) = op {
                if ops.is_empty() && kept.is_empty() {
                    reapable.extend(names);
                } else {
                    kept.push_back(Op::Reap(names));
                }
                continue;
            }
            if !homes.contains(&op.home(keyspace)) {
                kept.push_back(op);
                continue;
            }
            if let Op::Seat { key, reply: None, .. } = &op {
                touched.remove(key);
            }
            ops.push(op);
        }
        while let Some(op) = kept.pop_back() {
            queue.push_front(op);
        }
        ops
    }

    fn put_back(&self, ops: Vec<Op>) {
        let State { queue, touched, .. } = &mut *self.state.lock();
        for op in ops.into_iter().rev() {
            if let Op::Seat { key, reply: None, .. } = &op {
                touched.insert(key.clone());
            }
            queue.push_front(op);
        }
    }

    /// Does what can be done. Returns what is to be tried again, in its order.
    async fn perform(&self, ops: Vec<Op>) -> Vec<Op> {
        let Some(incarnation) = self.registered().await else { return ops };
        let mut groups: Vec<(Arc<Server>, Numbered)> = Vec::new();
        let mut left: Numbered = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            let home = op.home(self.router.keyspace());
            match self.router.agreed_server(home) {
                None => left.push((number, op)),
                Some(server) => {
                    match groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &server)) {
                        Some((_, group)) => group.push((number, op)),
                        None => groups.push((server, vec![(number, op)])),
                    }
                }
            }
        }
        for (server, group) in groups {
            left.extend(self.perform_on(&server, group, &incarnation).await);
        }
        left.sort_by_key(|(number, _)| *number);
        left.into_iter().map(|(_, op)| op).collect()
    }

    async fn perform_on(&self, server: &Server, ops: Numbered, incarnation: &str) -> Numbered {
        let Ok(mut reader) = server.dial.reader().await else { return ops };
        let mut pipeline = redis::Pipeline::with_capacity(ops.len());
        pipeline.ignore_errors();
        for (_, op) in &ops {
            pipeline.add_command(self.command(op, incarnation));
        }
        let answers: Vec<RedisResult<Value>> = match pipeline.query_async(&mut *reader).await {
            Ok(answers) => answers,
            Err(error) => {
                tracing::debug!(%error, "the registry could not be written to");
                reader.discard();
                // Of a message it is not known whether it was passed on.
                let is_message = |op: &(usize, Op)| matches!(op.1, Op::PassOn { .. });
                let (messages, others): (Vec<_>, _) = ops.into_iter().partition(is_message);
                messages.into_iter().for_each(|(_, op)| op.fail(BusError::Unavailable));
                return others;
            }
        };
        let (mut left, mut unknown) = (Vec::new(), false);
        for ((number, op), answer) in ops.into_iter().zip(answers) {
            match answer {
                Ok(answer) => {
                    self.note_admission(&op, &answer);
                    op.done(&answer);
                }
                Err(error) if error.code() == Some("NOSCRIPT") => {
                    unknown = true;
                    left.push((number, op));
                }
                Err(error) if is_of_the_slot(&error) => {
                    server.astray.notify_one();
                    left.push((number, op));
                }
                Err(error) => match refused_or_away(&error) {
                    BusError::Refused => {
                        tracing::error!(%error, "Redis refused a call of the registry");
                        op.fail(BusError::Refused);
                    }
                    _ => left.push((number, op)),
                },
            }
        }
        if unknown {
            for script in [&self.scripts.seat, &self.scripts.mark] {
                // Where that fails too it is tried again with the calls.
                let _ = script.load_async(&mut *reader).await;
            }
        }
        left
    }

    /// A user who has kept to the rules is let in: what is told of the seat from now on counts.
    fn note_admission(&self, op: &Op, answer: &Value) {
        if let Op::Seat { key, rules: Some(_), .. } = op
            && entered(answer).is_ok()
            && let Some(seat) = self.state.lock().seats.get_mut(key)
        {
            seat.admitted = true;
        }
    }

    fn command(&self, op: &Op, incarnation: &str) -> Cmd {
        let keyspace = self.router.keyspace();
        match op {
            Op::Seat { key: (place, user), rules, .. } => {
                let home = keyspace.home_of_place(place, user);
                let keys = keyspace.keys_of(home, name_of(place), incarnation);
                let keys = keys.expect("the name is a room's");
                let seat = self.state.lock().seats.get(&(place.clone(), user.clone())).cloned();
                let (name, connections, since, active) = match &seat {
                    Some(seat) => {
                        (seat.user.name.as_str(), seat.connections, seat.since, seat.active)
                    }
                    None => ("", 0, 0, 0),
                };
                let lets_in = rules.is_some() || seat.as_ref().is_some_and(|seat| seat.admitted);
                let mut command = evalsha(&self.scripts.seat, &keys.of_seat());
                self.common(&mut command, &keys);
                command.arg(user.as_str()).arg(name).arg(connections).arg(since).arg(active);
                // Of a length, like all that is by chance.
                command.arg(rand::rng().random_range(1_000_000_000..=u32::MAX));
                let fits = rules.as_ref().and_then(|rules| rules.fits.as_deref());
                let creates = rules.as_ref().is_some_and(|rules| rules.create);
                command.arg(flag(rules.is_some())).arg(fits.unwrap_or("")).arg(flag(creates));
                command.arg(flag(lets_in));
                command
            }
            Op::Mark { room, user, seq, by } => {
                let channel = keyspace.channel(room);
                let keys = [format!("{channel}:marks"), format!("{channel}:meta")];
                let mut command = evalsha(&self.scripts.mark, &keys);
                let ttl = self.router.marks_ttl().as_millis() as u64;
                command.arg(user.as_str()).arg(seq).arg(channel).arg(by.to_string()).arg(ttl);
                command
            }
            Op::PassOn { room, payload, .. } => {
                let mut command = redis::cmd(keyspace.publish());
                command.arg(keyspace.channel(room)).arg(payload);
                command
            }
            Op::Reap(_) => redis::cmd("PING"),
        }
    }

    /// The arguments that scripts of a place begin with.
    fn common(&self, command: &mut Cmd, keys: &Keys) {
        let empty_ttl = self.options.empty_ttl.as_millis() as u64;
        command.arg(&keys.name).arg(&keys.channel).arg(empty_ttl);
    }

    /// The present incarnation, once the others can know of it.
    async fn registered(&self) -> Option<String> {
        let (incarnation, is_registered) = {
            let state = self.state.lock();
            (state.incarnation.clone()?, state.is_registered)
        };
        if !is_registered {
            let server = self.router.agreed_server(0)?;
            let mut reader = server.dial.reader().await.ok()?;
            let incarnations = self.router.keyspace().incarnations();
            let mut name = self.scripts.name.key(incarnations);
            name.arg(&incarnation).arg(&self.process.name);
            let done: RedisResult<()> = name.invoke_async(&mut *reader).await;
            if done.is_err() {
                reader.discard();
                return None;
            }
            let state = &mut *self.state.lock();
            state.is_registered = state.incarnation.as_ref() == Some(&incarnation);
        }
        Some(incarnation)
    }

    fn is_settled(&self) -> bool {
        self.state.lock().settled_at.is_some_and(|at| at <= Instant::now())
    }

    /// Has those leave whose process has ended, for ever.
    async fn reap_all(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let old = self.state.lock().reapable.clone();
            for name in old {
                if self.reap(&name).await.is_err() {
                    break;
                }
                let state = &mut *self.state.lock();
                state.reapable.remove(&name);
                state.old.retain(|old| *old != name);
            }
            if !self.is_settled() || !self.router.standing().holds(Instant::now()) {
                continue;
            }
            match self.ended().await {
                Ok(ended) => {
                    for incarnation in ended {
                        tracing::info!(%incarnation, "a node has ended; who was there leaves");
                        if self.reap(&incarnation).await.is_err() {
                            break;
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "it is not known which nodes have ended"),
            }
        }
    }

    /// The incarnations whose process lives no more.
    async fn ended(&self) -> RedisResult<Vec<String>> {
        let Some(server) = self.router.agreed_server(0) else { return Ok(Vec::new()) };
        let keyspace = self.router.keyspace();
        let mut reader = server.dial.reader().await?;
        type Rows = Vec<(String, String)>;
        let (time, incarnations, leases): ((u64, u64), Rows, Rows) = redis::pipe()
            .cmd("TIME")
            .cmd("HGETALL")
            .arg(keyspace.incarnations())
            .cmd("HGETALL")
            .arg(keyspace.leases())
            .query_async(&mut *reader)
            .await?;
        let leases: BTreeMap<String, String> = leases.into_iter().collect();
        let now = time.0 * 1000 + time.1 / 1000;
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        let ended = incarnations.into_iter().filter(|(_, row)| {
            let (process, said_goodbye) = row.rsplit_once(' ').unwrap_or((row, "0"));
            let lease = leases.get(process).and_then(|row| row.split(' ').next());
            let lives =
                process == self.process.name || lease.is_some_and(|ends| number(ends) > now);
            let waits = match number(said_goodbye) {
                0 => false,
                at => now < at + GOODBYE_GRACE_MS,
            };
            !lives && !waits
        });
        Ok(ended.map(|(incarnation, _)| incarnation).collect())
    }

    /// Has all leave that one incarnation had. Whoever does so at the same time finds less to do.
    async fn reap(&self, incarnation: &str) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        for home in 0..keyspace.homes() {
            let Some(server) = self.router.agreed_server(home) else { return Err(away()) };
            let mut reader = server.dial.reader().await?;
            let reaped = self.reap_home(&mut reader, home, incarnation).await;
            if let Err(error) = reaped {
                reader.discard();
                return Err(error);
            }
        }
        let Some(server) = self.router.agreed_server(0) else { return Err(away()) };
        let mut reader = server.dial.reader().await?;
        let mut command = redis::cmd("HDEL");
        command.arg(keyspace.incarnations()).arg(incarnation);
        command.query_async(&mut *reader).await
    }

    async fn reap_home(
        &self,
        reader: &mut Reader,
        home: u16,
        incarnation: &str,
    ) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        let mut command = redis::cmd("HKEYS");
        command.arg(keyspace.places(home, incarnation));
        let places: Vec<String> = command.query_async(&mut **reader).await?;
        for place in places {
            let Some(keys) = keyspace.keys_of(home, &place, incarnation) else { continue };
            loop {
                let mut reap = self.scripts.reap.prepare_invoke();
                for key in &keys.of_seat()[..5] {
                    reap.key(key);
                }
                let empty_ttl = self.options.empty_ttl.as_millis() as u64;
                reap.arg(&keys.name).arg(&keys.channel).arg(empty_ttl).arg(REAP_MAX);
                let left: u64 = reap.invoke_async(&mut **reader).await?;
                if left == 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Asks something of the server that a home is with, once the nodes have agreed on it.
    async fn ask<T>(
        &self,
        home: u16,
        question: impl AsyncFnOnce(&mut MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, BusError> {
        let server = self.router.set_of(home).await.server.clone();
        server.agreed(home).await;
        let mut reader = server.dial.reader().await.map_err(|_| BusError::Unavailable)?;
        question(&mut reader).await.map_err(|error| {
            if is_of_the_slot(&error) {
                server.astray.notify_one();
                return BusError::Unavailable;
            }
            let failed = refused_or_away(&error);
            if failed == BusError::Refused {
                tracing::error!(%error, "Redis refused a question to the registry");
            } else {
                tracing::debug!(%error, "the registry could not be asked");
                reader.discard();
            }
            failed
        })
    }

    pub(super) async fn snapshots(
        self: Arc<Self>,
        rooms: Vec<RoomId>,
    ) -> Result<Vec<Snapshot>, BusError> {
        let keyspace = self.router.keyspace();
        let mut snapshots = vec![Snapshot::default(); rooms.len()];
        let mut by_home: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
        for (at, room) in rooms.iter().enumerate() {
            by_home.entry(keyspace.home(room)).or_default().push(at);
        }
        for (home, places) in by_home {
            for places in places.chunks(BATCH_MAX / 8) {
                // Before it is read, so that it is settled for what was written until then.
                let settled = self.is_settled();
                let rows: Vec<Vec<(String, String)>> = self
                    .ask(home, async |connection| {
                        let mut pipeline = redis::Pipeline::with_capacity(places.len());
                        for at in places {
                            let channel = keyspace.channel(&rooms[*at]);
                            pipeline.cmd("HGETALL").arg(format!("{channel}:who"));
                        }
                        pipeline.query_async(connection).await
                    })
                    .await?;
                for (at, rows) in places.iter().zip(rows) {
                    snapshots[*at] = snapshot(rows, settled);
                }
            }
        }
        Ok(snapshots)
    }

    pub(super) async fn details(
        self: Arc<Self>,
        room: RoomId,
        users: Vec<UserId>,
    ) -> Result<Details, BusError> {
        let keyspace = self.router.keyspace();
        let channel = keyspace.channel(&room);
        let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
        let answer: (Vec<Option<String>>, Vec<Option<Seq>>, Option<Seq>) = self
            .ask(keyspace.home(&room), async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.atomic().cmd("HMGET").arg(format!("{channel}:who")).arg("#");
                pipeline.arg(&names);
                pipeline.cmd("HMGET").arg(format!("{channel}:marks")).arg("#").arg(&names);
                pipeline.cmd("HGET").arg(format!("{channel}:meta")).arg("s");
                pipeline.query_async(connection).await
            })
            .await?;
        let (rows, marks, top) = answer;
        let version =
            rows.first().and_then(Option::as_deref).map_or(Version::default(), version_of);
        let users = users.into_iter().zip(rows.into_iter().skip(1)).zip(marks.into_iter().skip(1));
        let detail = |((user, row), mark): ((UserId, Option<String>), Option<Seq>)| {
            let read = mark.unwrap_or(0).min(top.unwrap_or(0));
            Some(Detail { read, ..detail_of(user, &row?)? })
        };
        Ok(Details { version, users: users.filter_map(detail).collect() })
    }

    /// At most `limit` members behind `from` of an index that every home has, whether more follow,
    /// and how many there are in all.
    async fn page(
        &self,
        index: impl Fn(u16) -> String,
        (from, to): (&str, &str),
        limit: usize,
    ) -> Result<(Vec<String>, bool, u64), BusError> {
        let (mut members, mut count) = (Vec::new(), 0);
        for home in 0..self.router.keyspace().homes() {
            let (some, all): (Vec<String>, u64) = self
                .ask(home, async |connection| {
                    redis::pipe()
                        .cmd("ZRANGEBYLEX")
                        .arg(index(home))
                        .arg(from)
                        .arg(to)
                        .arg("LIMIT")
                        .arg(0)
                        .arg(limit + 1)
                        .cmd("ZCARD")
                        .arg(index(home))
                        .query_async(connection)
                        .await
                })
                .await?;
            members.extend(some);
            count += all;
        }
        members.sort_unstable();
        let more = members.len() > limit;
        members.truncate(limit);
        Ok((members, more, count))
    }

    pub(super) async fn online(
        self: Arc<Self>,
        after: String,
        limit: usize,
    ) -> Result<Online, BusError> {
        let keyspace = self.router.keyspace();
        let from = if after.is_empty() { "-".to_owned() } else { format!("({after}") };
        let (members, more, count) =
            self.page(|home| keyspace.users(home), (&from, "+"), limit).await?;
        let mut users = Vec::new();
        for member in members {
            let Ok(user) = member.parse::<UserId>() else { continue };
            let home = keyspace.home_of_place(&Place::Cluster, &user);
            let row: Option<String> = self
                .ask(home, async |connection| {
                    let mut command = redis::cmd("HGET");
                    command.arg(keyspace.online(home)).arg(user.as_str());
                    command.query_async(connection).await
                })
                .await?;
            users.extend(row.and_then(|row| detail_of(user, &row)));
        }
        Ok(Online { users, count, more })
    }

    pub(super) async fn create(
        self: Arc<Self>,
        room: RoomId,
        record: Record,
    ) -> Result<bool, BusError> {
        let keyspace = self.router.keyspace();
        let (home, channel) = (keyspace.home(&room), keyspace.channel(&room));
        let mut create = self.scripts.create.prepare_invoke();
        for part in ["who", "record"] {
            create.key(format!("{channel}:{part}"));
        }
        create.key(keyspace.rooms(home)).key(format!("{channel}:log"));
        create.arg(room.as_str()).arg(self.options.empty_ttl.as_millis() as u64);
        create.arg("owner").arg(record.owner.as_str()).arg("name").arg(record.name.as_str());
        create.arg("public").arg(u8::from(record.public)).arg("created").arg(record.created);
        create.arg("meta").arg(record.meta);
        if let Some(password) = record.password {
            create.arg("password").arg(password);
        }
        if let Some(max) = record.max_members {
            create.arg("max").arg(max);
        }
        let made: u8 =
            self.ask(home, async |connection| create.invoke_async(connection).await).await?;
        Ok(made == 1)
    }

    pub(super) async fn find(self: Arc<Self>, room: RoomId) -> Result<Option<Found>, BusError> {
        let home = self.router.keyspace().home(&room);
        let found = self.find_some(home, vec![room]).await?;
        Ok(found.into_iter().next().flatten())
    }

    /// What is known of rooms of one home.
    async fn find_some(
        &self,
        home: u16,
        rooms: Vec<RoomId>,
    ) -> Result<Vec<Option<Found>>, BusError> {
        let keyspace = self.router.keyspace();
        let rows: Vec<Value> = self
            .ask(home, async |connection| {
                let mut pipeline = redis::Pipeline::with_capacity(rooms.len() * 3);
                for room in &rooms {
                    let channel = keyspace.channel(room);
                    pipeline.cmd("HGETALL").arg(format!("{channel}:record"));
                    pipeline.cmd("HLEN").arg(format!("{channel}:who"));
                    pipeline.cmd("HGET").arg(format!("{channel}:who")).arg("#");
                }
                pipeline.query_async(connection).await
            })
            .await?;
        let mut rows = rows.into_iter();
        let mut found = Vec::with_capacity(rooms.len());
        for room in rooms {
            let (Some(record), Some(members), Some(version)) =
                (rows.next(), rows.next(), rows.next())
            else {
                return Err(BusError::Refused);
            };
            let record: BTreeMap<String, String> =
                redis::from_redis_value(record).unwrap_or_default();
            let members: u64 = redis::from_redis_value(members).unwrap_or(0);
            let version: Option<String> = redis::from_redis_value(version).unwrap_or(None);
            let since = version.and_then(|row| row.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0);
            let record = record_of(&record);
            let is_there = record.is_some() || members > 0;
            let members = members.saturating_sub(1);
            found.push(is_there.then_some(Found { room, record, members, since }));
        }
        Ok(found)
    }

    /// Takes a managed room whose time is over from the index.
    async fn unlist(&self, home: u16, room: &RoomId) -> Result<(), BusError> {
        let keyspace = self.router.keyspace();
        let channel = keyspace.channel(room);
        let mut unlist = self.scripts.unlist.key(keyspace.rooms(home));
        unlist.key(format!("{channel}:who")).key(format!("{channel}:record")).arg(room.as_str());
        self.ask(home, async |connection| unlist.invoke_async(connection).await).await
    }

    pub(super) async fn list(
        self: Arc<Self>,
        prefix: String,
        mut after: String,
        limit: usize,
    ) -> Result<Listing, BusError> {
        let keyspace = self.router.keyspace();
        let mut rooms: Vec<Found> = Vec::new();
        let mut next = None;
        for _ in 0..FILL_MAX {
            let from = match (after >= prefix && !after.is_empty(), prefix.is_empty()) {
                (true, _) => format!("({after}"),
                (false, false) => format!("[{prefix}"),
                (false, true) => "-".to_owned(),
            };
            // Names are ASCII, so that this byte is behind all that begin so.
            let to = if prefix.is_empty() { "+".to_owned() } else { format!("({prefix}~") };
            let wanted = limit - rooms.len();
            let (members, more, _) =
                self.page(|home| keyspace.rooms(home), (&from, &to), wanted).await?;
            let Some(last) = members.last().cloned() else { break };
            let mut by_home: BTreeMap<u16, Vec<RoomId>> = BTreeMap::new();
            for room in members.iter().filter_map(|member| member.parse::<RoomId>().ok()) {
                by_home.entry(keyspace.home(&room)).or_default().push(room);
            }
            let mut page = Vec::new();
            for (home, names) in by_home {
                for (room, found) in names.iter().zip(self.find_some(home, names.clone()).await?) {
                    match found {
                        Some(found) => page.push(found),
                        None => self.unlist(home, room).await?,
                    }
                }
            }
            page.retain(|found| found.record.as_ref().is_none_or(|record| record.public));
            page.sort_unstable_by(|a, b| a.room.cmp(&b.room));
            rooms.extend(page);
            next = more.then(|| last.clone());
            after = last;
            if !more || rooms.len() >= limit {
                break;
            }
        }
        Ok(Listing { rooms, next })
    }
}

impl Op {
    fn home(&self, keyspace: Keyspace) -> u16 {
        match self {
            Self::Seat { key: (place, user), .. } => keyspace.home_of_place(place, user),
            Self::Mark { room, .. } | Self::PassOn { room, .. } => keyspace.home(room),
            Self::Reap(_) => 0,
        }
    }

    fn done(self, answer: &Value) {
        match self {
            Self::Seat { reply: Some(reply), .. } => {
                // Who does not wait any more has given up on it.
                let _ = reply.send(entered(answer));
            }
            Self::PassOn { done, .. } => {
                done(Ok(Appended { position: Position::new(Epoch::none(), 0), duplicate: false }));
            }
            Self::Seat { .. } | Self::Mark { .. } | Self::Reap(_) => {}
        }
    }

    fn fail(self, error: BusError) {
        match self {
            Self::Seat { reply: Some(reply), .. } => drop(reply.send(Err(error.into()))),
            Self::PassOn { done, .. } => done(Err(error)),
            Self::Seat { .. } | Self::Mark { .. } | Self::Reap(_) => {}
        }
    }
}

impl Keys {
    /// In the order of the scripts.
    fn of_seat(&self) -> [&str; 7] {
        let Self { who, here, places, record, index, marks, meta, .. } = self;
        [who, here, places, record, index, marks, meta]
    }
}

fn evalsha<K: AsRef<str>>(script: &Script, keys: &[K]) -> Cmd {
    let mut command = redis::cmd("EVALSHA");
    command.arg(script.get_hash()).arg(keys.len());
    for key in keys {
        command.arg(key.as_ref());
    }
    command
}

fn flag(is_set: bool) -> &'static str {
    if is_set { "1" } else { "" }
}

fn away() -> RedisError {
    (redis::ErrorKind::Io, "the nodes have not agreed on a server").into()
}

/// Reads what `seat.lua` answers.
fn entered(answer: &Value) -> Result<Entered, EnterError> {
    let parts: Vec<String> = redis::from_redis_value(answer.clone()).unwrap_or_default();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    match parts.first().map(String::as_str) {
        Some("ok") => Ok(Entered {
            version: Version { epoch: number(1).unwrap_or(0), number: number(2).unwrap_or(0) },
            count: number(3).unwrap_or(0),
            read: number(4).unwrap_or(0),
            deleted: number(5).unwrap_or(0),
        }),
        Some("wrong_password") => Err(EnterError::WrongPassword),
        Some("full") => Err(EnterError::Full),
        Some("not_found") => Err(EnterError::NotFound),
        _ => Err(BusError::Refused.into()),
    }
}

fn version_of(row: &str) -> Version {
    let mut parts = row.split(' ').map(|part| part.parse().unwrap_or(0));
    Version { epoch: parts.next().unwrap_or(0), number: parts.next().unwrap_or(0) }
}

/// Reads `<connections> <since> <active> <name>`.
fn detail_of(user: UserId, row: &str) -> Option<Detail> {
    let mut parts = row.splitn(4, ' ');
    let mut number = || parts.next()?.parse().ok();
    let (connections, since, active) = (number()?, number()?, number()?);
    let user = Person { id: user, name: parts.next()?.parse().ok()? };
    Some(Detail { user, connections, since, active, read: 0 })
}

fn snapshot(rows: Vec<(String, String)>, settled: bool) -> Snapshot {
    let mut snapshot = Snapshot { settled, ..Snapshot::default() };
    for (user, row) in rows {
        if user == "#" {
            snapshot.version = version_of(&row);
        } else if let Ok(user) = user.parse() {
            snapshot.users.extend(detail_of(user, &row).map(|detail| detail.user));
        }
    }
    snapshot
}

fn record_of(fields: &BTreeMap<String, String>) -> Option<Record> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    Some(Record {
        name: field("name")?.parse().ok()?,
        owner: field("owner")?.parse().ok()?,
        public: field("public") == Some("1"),
        password: field("password").map(str::to_owned),
        max_members: field("max").and_then(|max| max.parse().ok()),
        created: field("created")?.parse().ok()?,
        meta: field("meta")?.to_owned(),
    })
}
