//! Presence, rooms and sessions of a cluster, in Redis.
//!
//! Each run of a node writes its presence entries under a name of its own, an *incarnation*, so
//! that they can be removed in one step by whichever node first notices that its lease has expired.
//! A node begins a new incarnation whenever the nodes have agreed on a server anew, or its lease
//! had expired: the server's entries of the former one may be wrong. The node writes all its
//! entries under the new incarnation and then has the former one reaped, so that users that were
//! present all along do not leave and come back.
//!
//! Writes go through one queue, in order and pipelined; failed ones are retried.

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
    position::{Epoch, Seq},
};
use tokio::{
    sync::{Notify, oneshot},
    time::Instant,
};

mod reaper;
mod queries;

use super::{
    ephemeral,
    error::{is_denied, is_slot_error, to_bus_error},
    keyspace::{Keyspace, ScopeKeys, scope_name},
    requirements::Detector,
    retry::{RETRY_PAUSE_MAX, RetryPause},
    router::{AgreedServers, Router},
    server::RedisServer,
    sessions::SessionOp,
    untrusted::strip_report,
};
use skein_core::{
    bus::{
        Appended, BoxFuture, BusError,
        presence_entries::LocalPresences,
        presence_store::{
            AdmitError, EphemeralEvent, JoinConditions, JoinSnapshot, NodePresence, PresenceScope,
            PresenceVersion,
        },
        room_store::RoomStoreOptions,
        sessions::SessionOptions,
        ticket::PublishTicket,
    },
    drain::Tasks,
    telemetry::metrics::StorageLimit,
};

/// The most operations in one pipeline.
const BATCH_MAX: usize = 512;
/// The most operations that wait. Beyond that, those that may be lost are dropped, and messages are
/// `Overloaded`.
const QUEUE_MAX: usize = 65_536;
/// How long the publishing of an ephemeral message is retried.
const EPHEMERAL_WAIT_MAX: Duration = Duration::from_secs(5);
/// How often ended processes, and changes of the agreed servers, are looked for.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The worker that writes presence, read marks, sessions and ephemeral events.
pub(super) struct StoreWorker {
    pub(super) router: Arc<Router>,
    /// The presence entries of this node. Never read while `state` is locked.
    entries: Arc<LocalPresences>,
    options: RoomStoreOptions,
    sessions: SessionOptions,
    pub(super) scripts: StoreScripts,
    state: Mutex<WorkerState>,
    /// Notified when there is work.
    wake: Notify,
}

pub(super) struct StoreScripts {
    pub(super) open: Script,
    pub(super) use_session: Script,
    pub(super) acknowledge: Script,
    pub(super) data: Script,
    pub(super) enqueue_command: Script,
    pub(super) announce_node: Script,
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
    /// Presence operations in the queue that no caller waits for.
    queued: HashSet<(PresenceScope, UserId)>,
    /// Acknowledged positions of inboxes whose operation is in the queue.
    acks: HashMap<UserId, (Option<Epoch>, Seq)>,
    /// The incarnation that the presence entries are written under.
    incarnation: Option<String>,
    /// Former incarnations, to be reaped once all entries are written under the present one.
    old_incarnations: Vec<String>,
    /// Whether all entries are written under the present incarnation.
    is_rewritten: bool,
    /// The servers that the entries were written to, by group.
    servers: AgreedServers,
    /// Whether the incarnation is registered for the other nodes.
    is_registered: bool,
    /// When every live node has written its entries to those servers, even without an announcement.
    complete_at: Option<Instant>,
    /// Whether this node has announced that its entries are complete.
    is_announced: bool,
    /// Whether every live node has announced that.
    all_announced: bool,
}

pub(super) enum Op {
    Session(SessionOp),
    Presence {
        key: (PresenceScope, UserId),
        conditions: Option<JoinConditions>,
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
        ticket: PublishTicket,
        deadline: Instant,
    },
    /// Marks the end of the entries to be written under the present incarnation.
    Rewritten,
}

/// Operations with their numbers in the queue.
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
        let scope_script = |text: &str| {
            let present = include_str!("scripts/presence.lua");
            script(&format!("#!lua flags=allow-oom\n{present}\n{text}"))
        };
        let scripts = StoreScripts {
            open: script(include_str!("scripts/open_session.lua")),
            use_session: script(include_str!("scripts/use_session.lua")),
            acknowledge: script(include_str!("scripts/acknowledge.lua")),
            data: script(include_str!("scripts/session_data.lua")),
            enqueue_command: script(include_str!("scripts/enqueue_command.lua")),
            announce_node: script(include_str!("scripts/announce_node.lua")),
            register: script(include_str!("scripts/register.lua")),
            announce: script(include_str!("scripts/announce.lua")),
            forget: script(include_str!("scripts/forget.lua")),
            track: scope_script(include_str!("scripts/track.lua")),
            reap: scope_script(include_str!("scripts/reap.lua")),
            mark: script(include_str!("scripts/read_mark.lua")),
            create: script(include_str!("scripts/create_room.lua")),
            owned: script(include_str!("scripts/claim_room.lua")),
            unlist: script(include_str!("scripts/unlist.lua")),
        };
        let (entries, state, wake) = (Arc::default(), Mutex::default(), Notify::new());
        let worker = Arc::new(Self { router, entries, options, sessions, scripts, state, wake });
        let (working, reaping) = (worker.clone(), worker.clone());
        let work: BoxFuture<()> = Box::pin(async move { working.work().await });
        let reap: BoxFuture<()> = Box::pin(async move { reaping.reap_all().await });
        for (name, task) in [("redis_store", work), ("redis_reaper", reap)] {
            let stopped = tasks.stopped().clone();
            tasks.spawn_service(name, async move {
                // Both arms are cancel-safe. At the end no caller waits, and the other nodes reap
                // the entries that are left.
                tokio::select! {
                    biased;
                    () = stopped.cancelled() => {}
                    () = task => {}
                }
            });
        }
        worker
    }

    pub(super) fn entries(&self) -> Arc<LocalPresences> {
        self.entries.clone()
    }

    pub(super) fn track(&self, report: NodePresence) {
        self.enqueue_presence((report.scope, report.user.id), None, None);
    }

    pub(super) fn admit(
        &self,
        report: NodePresence,
        conditions: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        let (reply, replied) = oneshot::channel();
        self.enqueue_presence((report.scope, report.user.id), conditions, Some(reply));
        Box::pin(async move { replied.await.unwrap_or(Err(BusError::Unavailable.into())) })
    }

    fn enqueue_presence(
        &self,
        key: (PresenceScope, UserId),
        conditions: Option<JoinConditions>,
        reply: Option<oneshot::Sender<Result<JoinSnapshot, AdmitError>>>,
    ) {
        let state = &mut *self.state.lock();
        if reply.is_some() || state.queued.insert(key.clone()) {
            state.queue.push_back(Op::Presence { key, conditions, reply });
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

    /// Queues an operation without a limit: there are no more of them than connections.
    pub(super) fn enqueue(&self, op: Op) {
        self.state.lock().queue.push_back(op);
        self.wake.notify_one();
    }

    /// Records an acknowledgement. Returns whether none of the user was queued.
    pub(super) fn record_ack(&self, user: &UserId, epoch: Option<Epoch>, seq: Seq) -> bool {
        match self.state.lock().acks.entry(user.clone()) {
            Entry::Vacant(scope) => {
                scope.insert((epoch, seq));
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
        event: &EphemeralEvent,
        ticket: PublishTicket,
    ) {
        let deadline = Instant::now() + EPHEMERAL_WAIT_MAX;
        let op = Op::Ephemeral { room, payload: ephemeral::encode(event), ticket, deadline };
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
            Some(Op::Ephemeral { ticket, .. }) => ticket.complete(Err(BusError::Overloaded)),
            _ => self.wake.notify_one(),
        }
    }

    /// Executes queued operations, for ever.
    async fn work(&self) {
        let mut lease_reacquired = self.router.node_state().lease_reacquired();
        let mut pause = RetryPause::default();
        loop {
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = self.wake.notified() => {}
                _ = lease_reacquired.changed() => self.begin_incarnation(),
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
                let retry = self.execute(ops).await;
                if retry.is_empty() {
                    pause = RetryPause::default();
                } else {
                    self.requeue(retry);
                    pause.wait().await;
                }
            }
        }
    }

    /// How long to wait until the queue is looked at again.
    fn pause(&self) -> Duration {
        if self.state.lock().queue.is_empty() { CHECK_INTERVAL } else { RETRY_PAUSE_MAX }
    }

    /// Begins a new incarnation if the nodes have agreed on a server anew.
    fn check_servers(&self) {
        let Some(servers) = self.router.agreed_servers() else { return };
        if self.state.lock().servers != servers {
            self.state.lock().servers = servers;
            self.begin_incarnation();
        }
    }

    /// Queues all entries to be written under a new incarnation, after which the former one is
    /// reaped.
    fn begin_incarnation(&self) {
        let incarnation = self.router.process().begin_incarnation();
        // An entry that is added from here on queues its own operation.
        let keys = self.entries.keys();
        let state = &mut *self.state.lock();
        state.old_incarnations.extend(state.incarnation.replace(incarnation));
        state.is_rewritten = false;
        state.is_registered = false;
        (state.is_announced, state.all_announced) = (false, false);
        state.complete_at = Some(Instant::now() + self.router.process().lease.duration);
        let WorkerState { queue, queued, .. } = state;
        queue.retain(|op| !matches!(op, Op::Rewritten));
        for key in keys {
            if queued.insert(key.clone()) {
                queue.push_back(Op::Presence { key, conditions: None, reply: None });
            }
        }
        queue.push_back(Op::Rewritten);
    }

    /// Fails messages past their deadline, and forgets operations that no caller waits for any
    /// more.
    fn expire(&self) {
        let (now, mut expired) = (Instant::now(), Vec::new());
        {
            let WorkerState { queue, queued, .. } = &mut *self.state.lock();
            for mut op in std::mem::take(queue) {
                match &mut op {
                    Op::Ephemeral { deadline, .. } if *deadline <= now => {
                        expired.push(op);
                        continue;
                    }
                    Op::Session(op) if op.is_abandoned() => continue,
                    Op::Presence { key, conditions, reply: reply @ Some(_) }
                        if reply.as_ref().is_some_and(oneshot::Sender::is_closed) =>
                    {
                        (*conditions, *reply) = (None, None);
                        if !queued.insert(key.clone()) {
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

    /// Takes the next operations for `groups` from the queue, so that others do not block them.
    /// Notes when all entries are written under the present incarnation.
    fn take_batch(&self, groups: &BTreeSet<u16>) -> Vec<Op> {
        let WorkerState { queue, queued, acks, is_rewritten, .. } = &mut *self.state.lock();
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
                Op::Presence { key, reply: None, .. } => drop(queued.remove(key)),
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
        let WorkerState { queue, queued, .. } = &mut *self.state.lock();
        for op in ops.into_iter().rev() {
            if let Op::Presence { key, reply: None, .. } = &op {
                queued.insert(key.clone());
            }
            queue.push_front(op);
        }
    }

    /// Executes operations. Returns those to retry, in their order.
    async fn execute(&self, ops: Vec<Op>) -> Vec<Op> {
        let Some(incarnation) = self.registered().await else { return ops };
        let mut batches: Vec<(Arc<RedisServer>, NumberedOps)> = Vec::new();
        let mut retry: NumberedOps = Vec::new();
        for (number, op) in ops.into_iter().enumerate() {
            let group = op.group_of(self.router.keyspace());
            match self.router.agreed_server(group) {
                None => retry.push((number, op)),
                Some(server) => {
                    match batches.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &server)) {
                        Some((_, batch)) => batch.push((number, op)),
                        None => batches.push((server, vec![(number, op)])),
                    }
                }
            }
        }
        for (server, batch) in batches {
            retry.extend(self.execute_on(&server, batch, &incarnation).await);
        }
        retry.sort_by_key(|(number, _)| *number);
        retry.into_iter().map(|(_, op)| op).collect()
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
        let Ok(mut connection) = server.dial.read_connection().await else { return ops };
        let mut pipeline = redis::Pipeline::with_capacity(ops.len());
        pipeline.ignore_errors();
        for (_, op) in &ops {
            pipeline.add_command(self.command(op, server, incarnation));
        }
        let replies: Vec<RedisResult<Value>> = match pipeline.query_async(&mut *connection).await {
            Ok(replies) => replies,
            Err(error) => {
                tracing::debug!(%error, "cannot write presence and sessions to Redis");
                connection.discard();
                // Whether a message was published is unknown.
                let is_message = |op: &(usize, Op)| matches!(op.1, Op::Ephemeral { .. });
                let (messages, others): (Vec<_>, _) = ops.into_iter().partition(is_message);
                messages.into_iter().for_each(|(_, op)| op.fail(BusError::Unavailable));
                return others;
            }
        };
        let (mut retry, mut unknown_script) = (Vec::new(), false);
        for ((number, op), reply_value) in ops.into_iter().zip(replies) {
            match reply_value {
                Ok(reply_value) => {
                    let reply_value =
                        strip_report(self.router.metrics(), op.subject(), reply_value);
                    if let (Op::ReadMark { .. }, Value::Int(0)) = (&op, &reply_value) {
                        self.router.metrics().storage_rejections.of(StorageLimit::ReadMarks).inc();
                    }
                    self.record_admission(&op, &reply_value);
                    if let Op::Session(op) = &op
                        && let Some(end) = op.close_of_abandoned(&reply_value)
                    {
                        self.enqueue(Op::Session(end));
                    }
                    op.succeed(&reply_value);
                }
                Err(error) if error.code() == Some("NOSCRIPT") => {
                    unknown_script = true;
                    retry.push((number, op));
                }
                Err(error) if is_slot_error(&error) => {
                    server.topology_stale.notify_one();
                    retry.push((number, op));
                }
                Err(error) => match to_bus_error(&error) {
                    _ if is_denied(&error) => {
                        server.requirements.record(Detector::Call, &error);
                        match op {
                            // No caller waits for these; they are executed when the permission is
                            // granted.
                            Op::Presence { reply: None, .. } => retry.push((number, op)),
                            op => op.fail(BusError::Unavailable),
                        }
                    }
                    BusError::Rejected => {
                        tracing::error!(%error, "Redis rejected a write of presence or sessions");
                        op.fail(BusError::Rejected);
                    }
                    _ => retry.push((number, op)),
                },
            }
        }
        if unknown_script {
            let StoreScripts { open, use_session, acknowledge, track: report, mark, .. } =
                &self.scripts;
            for script in [open, use_session, acknowledge, report, mark] {
                // If that fails as well, it is retried with the operations.
                let _ = script.load_async(&mut *connection).await;
            }
        }
        retry
    }

    /// Records that a user has met the conditions: later reports count as admitted.
    fn record_admission(&self, op: &Op, reply_value: &Value) {
        if let Op::Presence { key: (scope, user), conditions: Some(_), .. } = op
            && parse_admission(reply_value).is_ok()
        {
            self.entries.set_admitted(scope, user);
        }
    }

    fn command(&self, op: &Op, server: &RedisServer, incarnation: &str) -> Cmd {
        let keyspace = self.router.keyspace();
        match op {
            Op::Session(op) => self.session_command(op, server),
            Op::Presence { key: (scope, user), conditions, .. } => {
                let group = keyspace.group_of_scope(scope, user);
                let keys = keyspace.keys_of(group, scope_name(scope), incarnation);
                let keys = keys.expect("the name of a scope is valid");
                let report = self.entries.report(scope, user);
                let (name, connections, since, active) = match &report {
                    Some(report) => {
                        (report.user.name.as_str(), report.connections, report.since, report.active)
                    }
                    None => ("", 0, 0, 0),
                };
                let admitted =
                    conditions.is_some() || report.as_ref().is_some_and(|report| report.admitted);
                let mut command = evalsha(&self.scripts.track, &keys.all());
                command.arg(self.common_args(&keys));
                command.arg(user.as_str()).arg(name).arg(connections).arg(since).arg(active);
                // Of constant length, as all random parts are.
                command.arg(rand::rng().random_range(1_000_000_000..=u32::MAX));
                let password_hash =
                    conditions.as_ref().and_then(|conditions| conditions.password_hash.as_deref());
                let create = conditions.as_ref().is_some_and(|conditions| conditions.create);
                command
                    .arg(flag(conditions.is_some()))
                    .arg(password_hash.unwrap_or(""))
                    .arg(flag(create));
                command.arg(flag(admitted));
                let within_quota =
                    conditions.as_ref().is_some_and(|conditions| conditions.within_quota);
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
                // Above the watermark, only existing read marks are moved.
                command.arg(match server.memory.pressure().is_high() {
                    true => 0,
                    false => server.retention.limits.read_marks_max,
                });
                command
            }
            Op::Ephemeral { room, payload, .. } => {
                let mut command = redis::cmd(keyspace.publish());
                command.arg(keyspace.channel(room)).arg(payload);
                command
            }
            Op::Rewritten => unreachable!("the marker is never executed"),
        }
    }

    /// The arguments that scripts of a scope begin with.
    fn common_args<'a>(&self, keys: &'a ScopeKeys) -> (&'a str, &'a str, u64) {
        (&keys.name, &keys.channel, self.options.empty_ttl.as_millis() as u64)
    }

    /// The present incarnation, after registering it if necessary.
    async fn registered(&self) -> Option<String> {
        let (incarnation, is_registered) = {
            let state = self.state.lock();
            (state.incarnation.clone()?, state.is_registered)
        };
        if !is_registered {
            let server = self.router.agreed_server(0)?;
            let mut connection = server.dial.read_connection().await.ok()?;
            let incarnations = self.router.keyspace().incarnations();
            let mut name = self.scripts.register.key(incarnations);
            name.arg(&incarnation).arg(&self.router.process().name);
            let done: RedisResult<Value> = name.invoke_async(&mut *connection).await;
            let done = done.map(|reply_value| {
                strip_report(self.router.metrics(), "incarnations", reply_value)
            });
            if done.is_err() {
                connection.discard();
                return None;
            }
            let state = &mut *self.state.lock();
            state.is_registered = state.incarnation.as_ref() == Some(&incarnation);
        }
        Some(incarnation)
    }

    /// Announces to the other nodes that all entries are written. Retried after a failure.
    async fn announce_if_rewritten(&self) {
        let agreements = {
            let state = self.state.lock();
            if !state.is_rewritten || state.is_announced || state.servers.is_empty() {
                return;
            }
            digest_of_servers(&state.servers)
        };
        // The other nodes forget announcements with incarnations, so the incarnation is registered
        // first.
        if self.registered().await.is_none() {
            return;
        }
        let Some(server) = self.router.agreed_server(0) else { return };
        let Ok(mut connection) = server.dial.read_connection().await else { return };
        let mut announce = self.scripts.announce.key(self.router.keyspace().announced());
        announce.arg(&self.router.process().name).arg(&agreements);
        let announced: RedisResult<()> = announce.invoke_async(&mut *connection).await;
        if let Err(error) = announced {
            tracing::debug!(%error, "cannot announce the presence entries of this node yet");
            return connection.discard();
        }
        let state = &mut *self.state.lock();
        state.is_announced = state.is_rewritten && digest_of_servers(&state.servers) == agreements;
    }

    /// Reads presence, and tells whether what was read is complete: every live node has announced
    /// its entries since the nodes agreed on the servers, or the time of a lease has passed since.
    pub(super) async fn read_presence<T>(
        &self,
        read: impl Future<Output = Result<T, BusError>>,
    ) -> Result<(T, bool), BusError> {
        // Before the read, since a flushed server has lost the announcement of this node.
        let complete = self.complete_servers().await;
        let read = read.await?;
        // After it, since a server that has restarted from its file still has the announcements,
        // but not all of the entries.
        let is_complete = complete.is_some_and(|servers| self.are_agreed(&servers));
        Ok((read, is_complete))
    }

    /// The servers whose presence is complete.
    async fn complete_servers(&self) -> Option<AgreedServers> {
        let (servers, others) = {
            let state = self.state.lock();
            (state.servers.clone(), state.all_announced || state.waited_for_all())
        };
        // This worker may not have noticed yet that the nodes have agreed anew.
        if !self.are_agreed(&servers) {
            return None;
        }
        let agreements = digest_of_servers(&servers);
        if others {
            return self.has_announced(&agreements).await.unwrap_or(false).then_some(servers);
        }
        let whole = self.have_all_announced(&agreements).await.unwrap_or(false);
        let state = &mut *self.state.lock();
        let is_still = whole && state.servers == servers;
        state.all_announced |= is_still;
        is_still.then_some(servers)
    }

    /// Whether the nodes agree on these servers at present.
    fn are_agreed(&self, servers: &AgreedServers) -> bool {
        self.router.agreed_servers().as_ref() == Some(servers)
    }

    async fn has_announced(&self, agreements: &str) -> RedisResult<bool> {
        let mut query = redis::pipe();
        query.cmd("HGET").arg(self.router.keyspace().announced()).arg(&self.router.process().name);
        let (announced,): (Option<String>,) = self.query_group_0(&query).await?;
        Ok(announced.is_some_and(|announced| announced == agreements))
    }

    async fn have_all_announced(&self, agreements: &str) -> RedisResult<bool> {
        let keyspace = self.router.keyspace();
        let mut query = redis::pipe();
        query.cmd("TIME");
        query.cmd("HGETALL").arg(keyspace.leases()).cmd("HGETALL").arg(keyspace.announced());
        type Rows = BTreeMap<String, String>;
        let ((seconds, micros), leases, announced): ((u64, u64), Rows, Rows) =
            self.query_group_0(&query).await?;
        let now = seconds * 1000 + micros / 1000;
        let lives = |row: &str| {
            let ends = row.split(' ').next().and_then(|ends| ends.parse::<u64>().ok());
            ends.is_some_and(|ends| ends > now)
        };
        let own = &self.router.process().name;
        let living = leases.iter().filter(|(name, row)| *name != "#" && lives(row));
        let mut living = living.map(|(name, _)| name).chain([own]);
        Ok(living.all(|name| announced.get(name).is_some_and(|of| of == agreements)))
    }

    async fn query_group_0<T: FromRedisValue>(&self, query: &redis::Pipeline) -> RedisResult<T> {
        let away = || (redis::ErrorKind::Io, "the nodes have not agreed on a server");
        let server = self.router.agreed_server(0).ok_or_else(away)?;
        let mut connection = server.dial.read_connection().await?;
        let asked = query.query_async(&mut *connection).await;
        if asked.is_err() {
            connection.discard();
        }
        asked
    }

    fn waited_for_all(&self) -> bool {
        self.state.lock().waited_for_all()
    }
}

impl WorkerState {
    fn waited_for_all(&self) -> bool {
        self.complete_at.is_some_and(|at| at <= Instant::now())
    }
}

impl Op {
    fn group_of(&self, keyspace: Keyspace) -> u16 {
        match self {
            Self::Session(op) => keyspace.group_of_text(op.user().as_str()),
            Self::Presence { key: (scope, user), .. } => keyspace.group_of_scope(scope, user),
            Self::ReadMark { room, .. } | Self::Ephemeral { room, .. } => keyspace.group_of(room),
            Self::Rewritten => unreachable!("the marker is never executed"),
        }
    }

    /// The subject of the operation, for logs.
    fn subject(&self) -> &str {
        match self {
            Self::Session(op) => op.user().as_str(),
            Self::Presence { key: (scope, _), .. } => scope_name(scope),
            Self::ReadMark { room, .. } | Self::Ephemeral { room, .. } => room.as_str(),
            Self::Rewritten => "-",
        }
    }

    fn succeed(self, reply_value: &Value) {
        match self {
            Self::Session(op) => op.succeed(reply_value),
            Self::Presence { reply: Some(reply), .. } => {
                // A caller that does not wait any more has given up.
                let _ = reply.send(parse_admission(reply_value));
            }
            Self::Ephemeral { ticket, .. } => ticket.complete(Ok(Appended::without_log())),
            Self::Presence { .. } | Self::ReadMark { .. } | Self::Rewritten => {}
        }
    }

    fn fail(self, error: BusError) {
        match self {
            Self::Session(op) => op.fail(error),
            Self::Presence { reply: Some(reply), .. } => drop(reply.send(Err(error.into()))),
            Self::Ephemeral { ticket, .. } => ticket.complete(Err(error)),
            Self::Presence { .. } | Self::ReadMark { .. } | Self::Rewritten => {}
        }
    }
}

/// A digest of the agreed servers, which is the same on all nodes.
fn digest_of_servers(servers: &AgreedServers) -> String {
    let mut digest = Sha1::new();
    for (group, (server_id, _)) in servers {
        digest.update(format!("{group} {server_id}\n"));
    }
    format!("{:x}", digest.finalize())
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

/// Parses the reply of `track.lua`.
fn parse_admission(reply_value: &Value) -> Result<JoinSnapshot, AdmitError> {
    let parts: Vec<String> = redis::from_redis_value(reply_value.clone()).unwrap_or_default();
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
