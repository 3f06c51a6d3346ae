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
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use rand::RngExt as _;
use redis::{Cmd, FromRedisValue, RedisResult, Script, Value};
use sha1::{Digest as _, Sha1};
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::{Epoch, Position, Seq},
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

mod reaper;
mod queries;

use super::{
    RETRY_PAUSE_MAX, RetryPause, ephemeral, is_slot_error,
    keyspace::{Keyspace, ScopeKeys, scope_name},
    requirements::{Detector, is_denied},
    router::Router,
    server::RedisServer,
    sessions::SessionOp,
    to_bus_error,
    untrusted::strip_report,
};
use skein_core::{
    bus::{
        AppendCallback, Appended, BoxFuture, BusError,
        registry::{
            AdmitError, EphemeralEvent, JoinConditions, JoinSnapshot, NodePresence, PresenceScope,
            PresenceVersion, RoomStoreOptions,
        },
        sessions::SessionOptions,
    },
    delivery::ServerId,
    drain::Tasks,
    telemetry::metrics::StorageLimit,
};

/// The most calls in one pipeline.
const BATCH_MAX: usize = 512;
/// The most calls that wait. Above it what may be lost is, and a message is `Overloaded`.
const QUEUE_MAX: usize = 65_536;
/// How long a message of a room without a log is tried to be passed on.
const EPHEMERAL_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often it is looked who has ended, and whether the servers are those of before.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The registry's part of the bus.
pub(super) struct StoreWorker {
    pub(super) router: Arc<Router>,
    options: RoomStoreOptions,
    sessions: SessionOptions,
    pub(super) scripts: StoreScripts,
    state: Mutex<WorkerState>,
    /// There is something to be done.
    wake: Notify,
}

pub(super) struct StoreScripts {
    pub(super) open: Script,
    pub(super) use_session: Script,
    pub(super) acknowledge: Script,
    pub(super) data: Script,
    pub(super) enqueue_command: Script,
    register: Script,
    announce: Script,
    forget: Script,
    track: Script,
    reap: Script,
    mark: Script,
    create: Script,
    owned: Script,
    unlist: Script,
}

#[derive(Default)]
struct WorkerState {
    queue: VecDeque<Op>,
    /// Seats in the queue that nobody waits for.
    queued: HashSet<(PresenceScope, UserId)>,
    /// Up to where users have acknowledged their inboxes, of those in the queue.
    acks: HashMap<UserId, (Option<Epoch>, Seq)>,
    /// The seats of this node.
    entries: BTreeMap<(PresenceScope, UserId), NodePresence>,
    /// Under which name they are written.
    incarnation: Option<String>,
    /// Names from before, to be taken away once all is written under the present one.
    old_incarnations: Vec<String>,
    /// Whether it is.
    is_rewritten: bool,
    /// The servers that the seats were written to, by group.
    servers: BTreeMap<u16, (ServerId, u64)>,
    /// Whether the others can know of the incarnation.
    is_registered: bool,
    /// From when on every node that lives has written its seats to them, whatever they say.
    settled_at: Option<Instant>,
    /// Whether the others can know that all is written under the present name.
    is_announced: bool,
    /// Whether every node that lives has said so.
    all_announced: bool,
}

pub(super) enum Op {
    Session(SessionOp),
    Presence {
        key: (PresenceScope, UserId),
        rules: Option<JoinConditions>,
        reply: Option<oneshot::Sender<Result<JoinSnapshot, AdmitError>>>,
    },
    ReadMark {
        room: RoomId,
        user: UserId,
        seq: Seq,
        by: ConnectionId,
    },
    Ephemeral {
        room: RoomId,
        payload: Vec<u8>,
        done: AppendCallback,
        deadline: Instant,
    },
    /// What is before it is what was to be written under the present name.
    Rewritten,
}

/// Calls with their numbers in the queue.
type NumberedOps = Vec<(usize, Op)>;

impl StoreWorker {
    pub(super) fn start(
        router: Arc<Router>,
        options: RoomStoreOptions,
        sessions: SessionOptions,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let keyspace = router.keyspace();
        let script = |text: &str| keyspace.script(text);
        let of_places = |text: &str| {
            let present = include_str!("scripts/presence.lua");
            script(&format!("#!lua flags=allow-oom\n{present}\n{text}"))
        };
        let scripts = StoreScripts {
            open: script(include_str!("scripts/open_session.lua")),
            use_session: script(include_str!("scripts/use_session.lua")),
            acknowledge: script(include_str!("scripts/acknowledge.lua")),
            data: script(include_str!("scripts/session_data.lua")),
            enqueue_command: script(include_str!("scripts/enqueue_command.lua")),
            register: script(include_str!("scripts/register.lua")),
            announce: script(include_str!("scripts/announce.lua")),
            forget: script(include_str!("scripts/forget.lua")),
            track: of_places(include_str!("scripts/track.lua")),
            reap: of_places(include_str!("scripts/reap.lua")),
            mark: script(include_str!("scripts/read_mark.lua")),
            create: script(include_str!("scripts/create_room.lua")),
            owned: script(include_str!("scripts/claim_room.lua")),
            unlist: script(include_str!("scripts/unlist.lua")),
        };
        let (state, wake) = (Mutex::default(), Notify::new());
        let registrar = Arc::new(Self { router, options, sessions, scripts, state, wake });
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

    pub(super) fn track(&self, seat: NodePresence) {
        self.enqueue_presence(seat, None, None);
    }

    pub(super) fn admit(
        &self,
        seat: NodePresence,
        rules: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let (reply, replied) = oneshot::channel();
        self.enqueue_presence(seat, rules, Some(reply));
        Box::pin(async move { replied.await.unwrap_or(Err(BusError::Unavailable.into())) })
    }

    fn enqueue_presence(
        &self,
        seat: NodePresence,
        rules: Option<JoinConditions>,
        reply: Option<oneshot::Sender<Result<JoinSnapshot, AdmitError>>>,
    ) {
        let state = &mut *self.state.lock();
        let key = (seat.scope.clone(), seat.user.id.clone());
        if seat.connections == 0 {
            // Its name is not needed any more.
            state.entries.remove(&key);
        } else {
            // Who may be let in is told so by the answer to who asked first.
            let admitted = seat.admitted || state.entries.get(&key).is_some_and(|of| of.admitted);
            state.entries.insert(key.clone(), NodePresence { admitted, ..seat });
        }
        if reply.is_some() || state.queued.insert(key.clone()) {
            state.queue.push_back(Op::Presence { key, rules, reply });
        }
        self.wake.notify_one();
    }

    pub(super) fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId) {
        let state = &mut *self.state.lock();
        if state.queue.len() < QUEUE_MAX {
            state.queue.push_back(Op::ReadMark { room, user, seq, by });
            self.wake.notify_one();
        }
    }

    /// Queues what is one each: there are as many as connections.
    pub(super) fn enqueue(&self, op: Op) {
        self.state.lock().queue.push_back(op);
        self.wake.notify_one();
    }

    /// Notes what is to be acknowledged. Returns whether nothing waits for the user yet.
    pub(super) fn record_ack(&self, user: &UserId, (epoch, seq): (Option<Epoch>, Seq)) -> bool {
        match self.state.lock().acks.entry(user.clone()) {
            Entry::Vacant(place) => {
                place.insert((epoch, seq));
                true
            }
            Entry::Occupied(mut known) => {
                let (of, up_to) = known.get_mut();
                *up_to = if *of == epoch { (*up_to).max(seq) } else { seq };
                *of = epoch;
                false
            }
        }
    }

    pub(super) fn session_ttl(&self) -> Duration {
        self.sessions.ttl
    }

    pub(super) fn publish_ephemeral(
        &self,
        room: RoomId,
        notice: &EphemeralEvent,
        done: AppendCallback,
    ) {
        let deadline = Instant::now() + EPHEMERAL_WAIT_MAX;
        let op = Op::Ephemeral { room, payload: ephemeral::encode(notice), done, deadline };
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
            Some(Op::Ephemeral { done, .. }) => done(Err(BusError::Overloaded)),
            _ => self.wake.notify_one(),
        }
    }

    /// Does what is queued, for ever.
    async fn work(&self) {
        let mut regained = self.router.node_state().lease_reacquired();
        let mut pause = RetryPause::default();
        loop {
            // Cancel-safe, all of them.
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                _ = regained.changed() => self.begin_incarnation(),
                () = tokio::time::sleep(self.pause()) => {}
            }
            loop {
                self.check_servers();
                self.expire();
                let ops = self.take_batch(&self.router.agreed_groups());
                self.announce_if_rewritten().await;
                if ops.is_empty() {
                    break;
                }
                let left = self.execute(ops).await;
                if left.is_empty() {
                    pause = RetryPause::default();
                } else {
                    self.requeue(left);
                    pause.wait().await;
                }
            }
        }
    }

    /// How long to wait until it is looked again whether what waits can be done.
    fn pause(&self) -> Duration {
        if self.state.lock().queue.is_empty() { CHECK_INTERVAL } else { RETRY_PAUSE_MAX }
    }

    /// Begins a new incarnation where the nodes have agreed on a server anew.
    fn check_servers(&self) {
        let Some(servers) = self.router.agreed_servers() else { return };
        if self.state.lock().servers != servers {
            self.state.lock().servers = servers;
            self.begin_incarnation();
        }
    }

    /// Has all seats written again, under a new name, and then the old one taken away.
    fn begin_incarnation(&self) {
        let incarnation = self.router.process().begin_incarnation();
        let state = &mut *self.state.lock();
        state.old_incarnations.extend(state.incarnation.replace(incarnation));
        state.is_rewritten = false;
        state.is_registered = false;
        (state.is_announced, state.all_announced) = (false, false);
        state.settled_at = Some(Instant::now() + self.router.process().lease.duration);
        let WorkerState { queue, queued: touched, entries: seats, .. } = state;
        queue.retain(|op| !matches!(op, Op::Rewritten));
        for key in seats.keys() {
            if touched.insert(key.clone()) {
                queue.push_back(Op::Presence { key: key.clone(), rules: None, reply: None });
            }
        }
        queue.push_back(Op::Rewritten);
    }

    /// Answers messages that could not be passed on in time, and forgets who does not wait any more.
    fn expire(&self) {
        let (now, mut expired) = (Instant::now(), Vec::new());
        {
            let WorkerState { queue, queued: touched, .. } = &mut *self.state.lock();
            for mut op in std::mem::take(queue) {
                match &mut op {
                    Op::Ephemeral { deadline, .. } if *deadline <= now => {
                        expired.push(op);
                        continue;
                    }
                    Op::Session(op) if op.is_abandoned() => continue,
                    Op::Presence { key, rules, reply: reply @ Some(_) }
                        if reply.as_ref().is_some_and(oneshot::Sender::is_closed) =>
                    {
                        (*rules, *reply) = (None, None);
                        if !touched.insert(key.clone()) {
                            continue;
                        }
                    }
                    _ => {}
                }
                queue.push_back(op);
            }
        }
        for op in expired {
            op.fail(BusError::Unavailable);
        }
    }

    /// Takes the next calls to some groups out of the queue, so that those to others hold up nobody.
    /// Where all is written under the present name, the old ones may be taken away.
    fn take_batch(&self, groups: &BTreeSet<u16>) -> Vec<Op> {
        let WorkerState { queue, queued: touched, acks, is_rewritten, .. } =
            &mut *self.state.lock();
        let keyspace = self.router.keyspace();
        let (mut ops, mut kept) = (Vec::new(), VecDeque::new());
        while ops.len() < BATCH_MAX
            && let Some(mut op) = queue.pop_front()
        {
            if let Op::Rewritten = op {
                *is_rewritten = ops.is_empty() && kept.is_empty();
                if !*is_rewritten {
                    kept.push_back(op);
                }
                continue;
            }
            if !groups.contains(&op.group_of(keyspace)) {
                kept.push_back(op);
                continue;
            }
            match &mut op {
                Op::Presence { key, reply: None, .. } => drop(touched.remove(key)),
                Op::Session(SessionOp::Acknowledge { user, up_to }) => {
                    *up_to = acks.remove(user).or(up_to.take());
                }
                _ => {}
            }
            ops.push(op);
        }
        while let Some(op) = kept.pop_back() {
            queue.push_front(op);
        }
        ops
    }

    fn requeue(&self, ops: Vec<Op>) {
        let WorkerState { queue, queued: touched, .. } = &mut *self.state.lock();
        for op in ops.into_iter().rev() {
            if let Op::Presence { key, reply: None, .. } = &op {
                touched.insert(key.clone());
            }
            queue.push_front(op);
        }
    }

    /// Does what can be done. Returns what is to be tried again, in its order.
    async fn execute(&self, ops: Vec<Op>) -> Vec<Op> {
        let Some(incarnation) = self.registered().await else { return ops };
        let mut batches: Vec<(Arc<RedisServer>, NumberedOps)> = Vec::new();
        let mut left: NumberedOps = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            let group = op.group_of(self.router.keyspace());
            match self.router.agreed_server(group) {
                None => left.push((number, op)),
                Some(server) => {
                    match batches.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &server)) {
                        Some((_, batch)) => batch.push((number, op)),
                        None => batches.push((server, vec![(number, op)])),
                    }
                }
            }
        }
        for (server, batch) in batches {
            left.extend(self.execute_on(&server, batch, &incarnation).await);
        }
        left.sort_by_key(|(number, _)| *number);
        left.into_iter().map(|(_, op)| op).collect()
    }

    async fn execute_on(
        &self,
        server: &RedisServer,
        ops: NumberedOps,
        incarnation: &str,
    ) -> NumberedOps {
        if server.requirements.is_denied() {
            return ops;
        }
        let Ok(mut reader) = server.dial.read_connection().await else { return ops };
        let mut pipeline = redis::Pipeline::with_capacity(ops.len());
        pipeline.ignore_errors();
        for (_, op) in &ops {
            pipeline.add_command(self.command(op, server, incarnation));
        }
        let answers: Vec<RedisResult<Value>> = match pipeline.query_async(&mut *reader).await {
            Ok(answers) => answers,
            Err(error) => {
                tracing::debug!(%error, "the registry could not be written to");
                reader.discard();
                // Of a message it is not known whether it was passed on.
                let is_message = |op: &(usize, Op)| matches!(op.1, Op::Ephemeral { .. });
                let (messages, others): (Vec<_>, _) = ops.into_iter().partition(is_message);
                messages.into_iter().for_each(|(_, op)| op.fail(BusError::Unavailable));
                return others;
            }
        };
        let (mut left, mut unknown) = (Vec::new(), false);
        for ((number, op), answer) in ops.into_iter().zip(answers) {
            match answer {
                Ok(answer) => {
                    let answer = strip_report(self.router.metrics(), op.subject(), answer);
                    if let (Op::ReadMark { .. }, Value::Int(0)) = (&op, &answer) {
                        self.router.metrics().storage_rejections.of(StorageLimit::ReadMarks).inc();
                    }
                    self.record_admission(&op, &answer);
                    if let Op::Session(op) = &op
                        && let Some(end) = op.close_of_abandoned(&answer)
                    {
                        self.enqueue(Op::Session(end));
                    }
                    op.succeed(&answer);
                }
                Err(error) if error.code() == Some("NOSCRIPT") => {
                    unknown = true;
                    left.push((number, op));
                }
                Err(error) if is_slot_error(&error) => {
                    server.topology_stale.notify_one();
                    left.push((number, op));
                }
                Err(error) => match to_bus_error(&error) {
                    _ if is_denied(&error) => {
                        server.requirements.record(Detector::Call, &error);
                        match op {
                            // Nobody waits for these, and they are told when it is allowed again.
                            Op::Presence { reply: None, .. } => left.push((number, op)),
                            op => op.fail(BusError::Unavailable),
                        }
                    }
                    BusError::Rejected => {
                        tracing::error!(%error, "Redis refused a call of the registry");
                        op.fail(BusError::Rejected);
                    }
                    _ => left.push((number, op)),
                },
            }
        }
        if unknown {
            let StoreScripts { open, use_session, acknowledge, track: seat, mark, .. } =
                &self.scripts;
            for script in [open, use_session, acknowledge, seat, mark] {
                // Where that fails too it is tried again with the calls.
                let _ = script.load_async(&mut *reader).await;
            }
        }
        left
    }

    /// A user who has kept to the rules is let in: what is told of the seat from now on counts.
    fn record_admission(&self, op: &Op, answer: &Value) {
        if let Op::Presence { key, rules: Some(_), .. } = op
            && parse_admission(answer).is_ok()
            && let Some(seat) = self.state.lock().entries.get_mut(key)
        {
            seat.admitted = true;
        }
    }

    fn command(&self, op: &Op, server: &RedisServer, incarnation: &str) -> Cmd {
        let keyspace = self.router.keyspace();
        match op {
            Op::Session(op) => self.session_command(op, server),
            Op::Presence { key: (place, user), rules, .. } => {
                let group = keyspace.group_of_scope(place, user);
                let keys = keyspace.keys_of(group, scope_name(place), incarnation);
                let keys = keys.expect("the name is a room's");
                let seat = self.state.lock().entries.get(&(place.clone(), user.clone())).cloned();
                let (name, connections, since, active) = match &seat {
                    Some(seat) => {
                        (seat.user.name.as_str(), seat.connections, seat.since, seat.active)
                    }
                    None => ("", 0, 0, 0),
                };
                let lets_in = rules.is_some() || seat.as_ref().is_some_and(|seat| seat.admitted);
                let mut command = evalsha(&self.scripts.track, &keys.all());
                command.arg(self.common_args(&keys));
                command.arg(user.as_str()).arg(name).arg(connections).arg(since).arg(active);
                // Of a length, like all that is by chance.
                command.arg(rand::rng().random_range(1_000_000_000..=u32::MAX));
                let fits = rules.as_ref().and_then(|rules| rules.password_hash.as_deref());
                let creates = rules.as_ref().is_some_and(|rules| rules.create);
                command.arg(flag(rules.is_some())).arg(fits.unwrap_or("")).arg(flag(creates));
                command.arg(flag(lets_in));
                let within_quota = rules.as_ref().is_some_and(|rules| rules.within_quota);
                command.arg(match server.memory.pressure().is_high() {
                    true => "high",
                    false => flag(within_quota),
                });
                command
            }
            Op::ReadMark { room, user, seq, by } => {
                let channel = keyspace.channel(room);
                let keys = [format!("{channel}:marks"), format!("{channel}:meta")];
                let mut command = evalsha(&self.scripts.mark, &keys);
                command.arg(user.as_str()).arg(seq).arg(channel).arg(by.to_string());
                // As long as the numbers that are marked.
                command.arg(server.meta_ttl_ms(room));
                // Those that have a mark move it above the watermark as well.
                command.arg(match server.memory.pressure().is_high() {
                    true => 0,
                    false => server.retention.limits.marks_max,
                });
                command
            }
            Op::Ephemeral { room, payload, .. } => {
                let mut command = redis::cmd(keyspace.publish());
                command.arg(keyspace.channel(room)).arg(payload);
                command
            }
            Op::Rewritten => unreachable!("it is never taken"),
        }
    }

    /// The arguments that scripts of a place begin with.
    fn common_args<'a>(&self, keys: &'a ScopeKeys) -> (&'a str, &'a str, u64) {
        (&keys.name, &keys.channel, self.options.empty_ttl.as_millis() as u64)
    }

    /// The present incarnation, once the others can know of it.
    async fn registered(&self) -> Option<String> {
        let (incarnation, is_registered) = {
            let state = self.state.lock();
            (state.incarnation.clone()?, state.is_registered)
        };
        if !is_registered {
            let server = self.router.agreed_server(0)?;
            let mut reader = server.dial.read_connection().await.ok()?;
            let incarnations = self.router.keyspace().incarnations();
            let mut name = self.scripts.register.key(incarnations);
            name.arg(&incarnation).arg(&self.router.process().name);
            let done: RedisResult<Value> = name.invoke_async(&mut *reader).await;
            let done =
                done.map(|answer| strip_report(self.router.metrics(), "incarnations", answer));
            if done.is_err() {
                reader.discard();
                return None;
            }
            let state = &mut *self.state.lock();
            state.is_registered = state.incarnation.as_ref() == Some(&incarnation);
        }
        Some(incarnation)
    }

    /// Tells the others once all seats are written. Where that fails it is tried again.
    async fn announce_if_rewritten(&self) {
        let agreements = {
            let state = self.state.lock();
            if !state.is_rewritten || state.is_announced || state.servers.is_empty() {
                return;
            }
            digest_of_servers(&state.servers)
        };
        // Others forget what a process has told with its incarnations, so they know of those first.
        if self.registered().await.is_none() {
            return;
        }
        let Some(server) = self.router.agreed_server(0) else { return };
        let Ok(mut reader) = server.dial.read_connection().await else { return };
        let mut tell = self.scripts.announce.key(self.router.keyspace().announced());
        tell.arg(&self.router.process().name).arg(&agreements);
        let told: RedisResult<()> = tell.invoke_async(&mut *reader).await;
        if let Err(error) = told {
            tracing::debug!(%error, "the others do not know yet that all seats are told");
            return reader.discard();
        }
        let state = &mut *self.state.lock();
        state.is_announced = state.is_rewritten && digest_of_servers(&state.servers) == agreements;
    }

    /// Whether what the servers have is whole: every node that lives has told its seats since the
    /// nodes agreed on them, or a lease's time has passed since. To be asked before they are read: a
    /// server that was flushed has forgotten that this node has told its own.
    pub(super) async fn is_complete(&self) -> bool {
        let (agreements, others) = {
            let state = self.state.lock();
            if state.servers.is_empty() {
                return false;
            }
            let others = state.all_announced || state.is_settled();
            (digest_of_servers(&state.servers), others)
        };
        if others {
            return self.has_announced(&agreements).await.unwrap_or(false);
        }
        let whole = self.have_all_announced(&agreements).await.unwrap_or(false);
        let state = &mut *self.state.lock();
        let is_still = whole && digest_of_servers(&state.servers) == agreements;
        state.all_announced |= is_still;
        is_still
    }

    async fn has_announced(&self, agreements: &str) -> RedisResult<bool> {
        let mut ask = redis::pipe();
        ask.cmd("HGET").arg(self.router.keyspace().announced()).arg(&self.router.process().name);
        let (told,): (Option<String>,) = self.query_group_0(&ask).await?;
        Ok(told.is_some_and(|told| told == agreements))
    }

    async fn have_all_announced(&self, agreements: &str) -> RedisResult<bool> {
        let keyspace = self.router.keyspace();
        let mut ask = redis::pipe();
        ask.cmd("TIME");
        ask.cmd("HGETALL").arg(keyspace.leases()).cmd("HGETALL").arg(keyspace.announced());
        type Rows = BTreeMap<String, String>;
        let ((seconds, micros), leases, told): ((u64, u64), Rows, Rows) =
            self.query_group_0(&ask).await?;
        let now = seconds * 1000 + micros / 1000;
        let lives = |row: &str| {
            let ends = row.split(' ').next().and_then(|ends| ends.parse::<u64>().ok());
            ends.is_some_and(|ends| ends > now)
        };
        let own = &self.router.process().name;
        let living = leases.iter().filter(|(name, row)| *name != "#" && lives(row));
        let mut living = living.map(|(name, _)| name).chain([own]);
        Ok(living.all(|name| told.get(name).is_some_and(|of| of == agreements)))
    }

    async fn query_group_0<T: FromRedisValue>(&self, ask: &redis::Pipeline) -> RedisResult<T> {
        let away = || (redis::ErrorKind::Io, "the nodes have not agreed on a server");
        let server = self.router.agreed_server(0).ok_or_else(away)?;
        let mut reader = server.dial.read_connection().await?;
        let asked = ask.query_async(&mut *reader).await;
        if asked.is_err() {
            reader.discard();
        }
        asked
    }

    fn is_settled(&self) -> bool {
        self.state.lock().is_settled()
    }
}

impl WorkerState {
    fn is_settled(&self) -> bool {
        self.settled_at.is_some_and(|at| at <= Instant::now())
    }
}

impl Op {
    fn group_of(&self, keyspace: Keyspace) -> u16 {
        match self {
            Self::Session(op) => keyspace.group_of_text(op.user().as_str()),
            Self::Presence { key: (place, user), .. } => keyspace.group_of_scope(place, user),
            Self::ReadMark { room, .. } | Self::Ephemeral { room, .. } => keyspace.group_of(room),
            Self::Rewritten => unreachable!("it is never taken"),
        }
    }

    /// Whose it is, for the log.
    fn subject(&self) -> &str {
        match self {
            Self::Session(op) => op.user().as_str(),
            Self::Presence { key: (place, _), .. } => scope_name(place),
            Self::ReadMark { room, .. } | Self::Ephemeral { room, .. } => room.as_str(),
            Self::Rewritten => "-",
        }
    }

    fn succeed(self, answer: &Value) {
        match self {
            Self::Session(op) => op.succeed(answer),
            Self::Presence { reply: Some(reply), .. } => {
                // Who does not wait any more has given up on it.
                let _ = reply.send(parse_admission(answer));
            }
            Self::Ephemeral { done, .. } => {
                let position = Position::new(Epoch::none(), 0);
                done(Ok(Appended { position, duplicate: false, opened_inbox: false }));
            }
            Self::Presence { .. } | Self::ReadMark { .. } | Self::Rewritten => {}
        }
    }

    fn fail(self, error: BusError) {
        match self {
            Self::Session(op) => op.fail(error),
            Self::Presence { reply: Some(reply), .. } => drop(reply.send(Err(error.into()))),
            Self::Ephemeral { done, .. } => done(Err(error)),
            Self::Presence { .. } | Self::ReadMark { .. } | Self::Rewritten => {}
        }
    }
}

/// What stands for the servers that were agreed on, and is the same on all nodes.
fn digest_of_servers(servers: &BTreeMap<u16, (ServerId, u64)>) -> String {
    let mut digest = Sha1::new();
    for (group, (server_id, _)) in servers {
        digest.update(format!("{group} {server_id}\n"));
    }
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn evalsha<K: AsRef<str>>(script: &Script, keys: &[K]) -> Cmd {
    let mut command = redis::cmd("EVALSHA");
    command.arg(script.get_hash()).arg(keys.len());
    for key in keys {
        command.arg(key.as_ref());
    }
    command
}

pub(super) fn flag(is_set: bool) -> &'static str {
    if is_set { "1" } else { "" }
}

/// Reads what `track.lua` answers.
fn parse_admission(answer: &Value) -> Result<JoinSnapshot, AdmitError> {
    let parts: Vec<String> = redis::from_redis_value(answer.clone()).unwrap_or_default();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    match parts.first().map(String::as_str) {
        Some("ok") => Ok(JoinSnapshot {
            version: PresenceVersion {
                epoch: number(1).unwrap_or(0),
                number: number(2).unwrap_or(0),
            },
            count: number(3).unwrap_or(0),
            read: number(4).unwrap_or(0),
            deleted: number(5).unwrap_or(0),
            created: number(6) == Some(1),
        }),
        Some("wrong_password") => Err(AdmitError::WrongPassword),
        Some("full") => Err(AdmitError::Full),
        Some("not_found") => Err(AdmitError::NotFound),
        Some("quota") => Err(AdmitError::Quota),
        Some("high") => Err(BusError::MemoryFull.into()),
        _ => Err(BusError::Rejected.into()),
    }
}
