//! The way of publishes into Redis: one connection, pipelined, in order, repeated until answered.
//!
//! What gathers while a pipeline is being written leaves in the next one. A publish whose fate is
//! unknown, because the link died before its answer, is sent again with the same id and ahead of
//! newer ones; the script answers with the position it has if it had been appended. What cannot be
//! sent until its deadline is answered `Unavailable` and never sent later.
//!
//! Nothing is sent but to the server that the nodes have agreed on, and while this node stands. The
//! first thing that another server gets is this node's [tail](skein_core::bus::tail).

use std::{collections::VecDeque, sync::Arc};

use futures_util::{StreamExt as _, stream::FuturesOrdered};
use redis::{
    ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection,
};
use skein_protocol::{ids::RoomKind, position::Position};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    RetryPause,
    append_queue::{AppendQueue, QueuedAppend},
    config, is_slot_error, is_unagreed,
    links::{LinkKind, LinkStates},
    memory::Pressure,
    position_args,
    probe::PROBE_INTERVAL,
    requirements::{Detector, is_forbidden},
    server::{AgreedServer, RedisServer},
    to_bus_error,
    untrusted::strip_report,
};
use skein_core::{
    bus::{Append, Appended, BoxFuture, BusError, UnseenPolicy, output_of},
    delivery::ServerId,
    drain::Tasks,
};

const QUEUE_LEN_MAX: usize = 1 << 16;
/// How many orders may wait.
const DRAINS_MAX: usize = 16;
/// How often the link and the server's settings are looked at.
const HEALTH_CHECK_INTERVAL: std::time::Duration = std::time::Duration::from_secs(2);
/// How often it is said that Redis refuses all.
const LOG_EVERY: std::time::Duration = std::time::Duration::from_secs(10);
/// The most publishes in one pipeline, and the most pipelines under way.
const PIPELINE_LEN_MAX: usize = 256;
const PIPELINES_IN_FLIGHT_MAX: usize = 16;
/// A handle to the appender's task.
pub(super) struct Appender {
    queue: mpsc::Sender<QueuedAppend>,
    drains: mpsc::Sender<DrainRequest>,
}

/// Asks for all that waits for some groups, which another server has from now on.
struct DrainRequest {
    groups: Vec<u16>,
    answer: oneshot::Sender<Vec<QueuedAppend>>,
}

/// A pipeline that was sent, with what was in it.
type InFlight = BoxFuture<(Vec<QueuedAppend>, RedisResult<Vec<RedisResult<Value>>>)>;

pub(super) fn start(server: Arc<RedisServer>, links: Arc<LinkStates>, tasks: &Tasks) -> Appender {
    let (queue, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    let (orders, ordered) = mpsc::channel(DRAINS_MAX);
    let worker = AppendWorker {
        queue: AppendQueue::new(server.keyspace),
        script: server.keyspace.script(include_str!("scripts/append.lua")),
        script_when_full: server
            .keyspace
            .script(concat!("#!lua flags=allow-oom\n", include_str!("scripts/append.lua"))),
        permitted: server.keyspace.script(include_str!("scripts/check_permissions.lua")),
        server,
        links,
        incoming: receiver,
        drains: ordered,
        open: AgreedServer::default(),
        last_logged: None,
        stopped: tasks.stopped().clone(),
    };
    tasks.spawn_service("redis_appender", worker.run());
    Appender { queue, drains: orders }
}

impl Appender {
    /// Queues a publish, or gives it back with what is wrong.
    pub(super) fn send(&self, queued: QueuedAppend) -> Option<(QueuedAppend, BusError)> {
        match self.queue.try_send(queued) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Full(queued)) => Some((queued, BusError::Overloaded)),
            Err(mpsc::error::TrySendError::Closed(queued)) => Some((queued, BusError::Unavailable)),
        }
    }

    /// Takes back all that waits for `groups`, in order, once nothing of them is under way.
    pub(super) async fn drain_groups(&self, groups: Vec<u16>) -> Vec<QueuedAppend> {
        let (answer, answered) = oneshot::channel();
        // A worker that has ended has answered all it had.
        let _ = self.drains.send(DrainRequest { groups, answer }).await;
        answered.await.unwrap_or_default()
    }
}

/// The task that owns the connection.
struct AppendWorker {
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    incoming: mpsc::Receiver<QueuedAppend>,
    drains: mpsc::Receiver<DrainRequest>,
    /// What is to be sent before anything in `incoming`: it came from there, or was sent already.
    queue: AppendQueue,
    script: redis::Script,
    /// The same, which Redis lets run where it is full: it makes room first.
    script_when_full: redis::Script,
    permitted: redis::Script,
    /// What was agreed on when it was last looked at: the tail was repeated to it.
    open: AgreedServer,
    /// When it was last told of that Redis takes nothing for a time.
    last_logged: Option<Instant>,
    stopped: CancellationToken,
}

impl AppendWorker {
    async fn run(mut self) {
        let stopped = self.stopped.clone();
        // `reconnect_forever` keeps what is unanswered in `self`, but for what was sent: its callers are gone by
        // now, and find it by its id.
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = self.reconnect_forever() => {}
        }
        self.incoming.close();
        while let Ok(queued) = self.incoming.try_recv() {
            self.queue.push(queued);
        }
        for queued in self.queue.drain_all() {
            (queued.append.done)(Err(BusError::Unavailable));
        }
    }

    async fn reconnect_forever(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            let heard = self.links.probe.received_count();
            match self.connect_while_expiring(&mut pause).await {
                Ok((connection, server_id, remake)) => {
                    self.links.set(&self.server, LinkKind::Append, Some(server_id));
                    let error = self.serve(connection, server_id, remake).await;
                    if self.links.probe.received_count() != heard {
                        // It did its work: until then the next attempts become rarer.
                        pause = RetryPause::default();
                    }
                    pause.failed(&error);
                    self.server.requirements.record(Detector::Call, &error);
                    tracing::debug!(%error, "append connection ended");
                }
                Err(error) => {
                    pause.failed(&error);
                    if pause.should_log() {
                        tracing::warn!(%error, "cannot publish to Redis");
                    }
                }
            }
            self.links.set(&self.server, LinkKind::Append, None);
        }
    }

    /// Pauses and connects. Meanwhile what is past its deadline is answered.
    async fn connect_while_expiring(
        &mut self,
        pause: &mut RetryPause,
    ) -> Result<(MultiplexedConnection, ServerId, watch::Receiver<u64>), RedisError> {
        let pause = pause.next();
        let (server, links) = (self.server.clone(), self.links.clone());
        let scripts = [self.script.clone(), self.script_when_full.clone()];
        let permitted = self.permitted.clone();
        let mut attempt = Box::pin(async move {
            tokio::time::sleep(pause).await;
            let remake = links.reconnect_all.subscribe();
            let (connection, server_id) = connect(&server, &scripts, &permitted).await?;
            Ok((connection, server_id, remake))
        });
        loop {
            self.expire();
            let deadline = self.queue.next_deadline();
            // Cancel-safe: `attempt` is kept, and `recv` loses nothing.
            tokio::select! {
                biased;
                result = &mut attempt => return result,
                Some(order) = self.drains.recv() => self.drain_groups(order),
                Some(queued) = self.incoming.recv() => self.queue.push(queued),
                () = sleep_until(deadline) => {}
            }
        }
    }

    /// Answers what is past its deadline.
    fn expire(&mut self) {
        let (tail, now) = (self.links.node_state.unconfirmed(), Instant::now());
        for queued in self.queue.take_expired(now) {
            // What was acknowledged once stays there: the next server is given it.
            tail.discard(&queued.append.envelope.dedup_key());
            (queued.append.done)(Err(BusError::Unavailable));
        }
    }

    /// What leaves next.
    fn next_batch(&mut self) -> Vec<QueuedAppend> {
        self.expire();
        self.queue.next_batch(PIPELINE_LEN_MAX, &self.open.groups, Instant::now())
    }

    /// Whether anything may be sent to the server `id`. Where that was agreed on since the last
    /// question it is first given the tail.
    fn may_send(&mut self, server_id: ServerId) -> bool {
        let now = Instant::now();
        let agreed = self.server.agreed.borrow().clone();
        let is_agreed = agreed.id == Some(server_id);
        if !is_agreed {
            // Where the same server is agreed on again, it was flushed meanwhile.
            self.open = AgreedServer::default();
        }
        if !is_agreed || !self.links.node_state.holds_lease(now) {
            #[cfg(debug_assertions)]
            return skein_core::fault_injection::is_injected(
                skein_core::fault_injection::ProtocolFault::NoFence,
            );
            #[cfg(not(debug_assertions))]
            return false;
        }
        if self.open.id != Some(server_id) || !Arc::ptr_eq(&self.open.groups, &agreed.groups) {
            let keyspace = self.server.keyspace;
            let tail = self.links.node_state.unconfirmed().to_republish(
                |room| {
                    let group = keyspace.group_of(room);
                    agreed.is_on(server_id, group) && !self.open.is_on(server_id, group)
                },
                now,
            );
            if !tail.is_empty() {
                tracing::info!(count = tail.len(), "publishes that did not come by are repeated");
            }
            self.links.metrics.republished.inc_by(tail.len() as u64);
            self.queue.push_republished(tail, now);
            self.open = agreed;
        }
        true
    }

    /// Gives back all that waits for groups that are elsewhere now.
    fn drain_groups(&mut self, order: DrainRequest) {
        while let Ok(queued) = self.incoming.try_recv() {
            self.queue.push(queued);
        }
        // Who asked waits for the answer, or nothing matters any more.
        let _ = order.answer.send(self.queue.drain_groups(&order.groups));
    }

    /// Sends and settles until the connection fails. Returns why; what has no answer is in
    /// `append_queue` again, in its order.
    async fn serve(
        &mut self,
        connection: MultiplexedConnection,
        server_id: ServerId,
        mut remake: watch::Receiver<u64>,
    ) -> RedisError {
        let mut agreed = self.server.agreed.subscribe();
        let mut regained = self.links.node_state.lease_reacquired();
        let mut sent: FuturesOrdered<InFlight> = FuturesOrdered::new();
        let mut queued = Vec::new();
        let mut tick = tokio::time::interval(HEALTH_CHECK_INTERVAL);
        let mut look: Option<BoxFuture<RedisResult<()>>> = None;
        let mut probes = tokio::time::interval(PROBE_INTERVAL);
        let mut probe: Option<BoxFuture<RedisResult<()>>> = None;
        let links = self.links.clone();
        loop {
            agreed.mark_unchanged();
            regained.mark_unchanged();
            if sent.len() < PIPELINES_IN_FLIGHT_MAX && self.may_send(server_id) {
                let batch = self.next_batch();
                if !batch.is_empty() {
                    sent.push_back(self.send(connection.clone(), server_id, batch));
                    continue;
                }
            }
            // What may not be sent is answered when its time is over.
            let deadline =
                self.queue.next_deadline().filter(|_| sent.len() < PIPELINES_IN_FLIGHT_MAX);
            // Cancel-safe: `next` keeps what is under way, and `recv_many` takes nothing unless
            // it completes.
            let (batch, result) = tokio::select! {
                biased;
                Some(answered) = sent.next() => answered,
                Some(order) = self.drains.recv() => {
                    // What is under way may come back unanswered, and goes along then.
                    let settled = self.complete_all(server_id, Ok(()), VecDeque::new(), &mut sent).await;
                    self.drain_groups(order);
                    match settled {
                        Ok(()) => continue,
                        Err(error) => return error,
                    }
                }
                _ = self.incoming.recv_many(&mut queued, PIPELINE_LEN_MAX),
                    if sent.len() < PIPELINES_IN_FLIGHT_MAX =>
                {
                    for queued in queued.drain(..) {
                        self.queue.push(queued);
                    }
                    continue;
                }
                _ = agreed.changed() => continue,
                _ = regained.changed() => continue,
                _ = remake.changed() => {
                    (Vec::new(), Err((ErrorKind::Io, "all links reconnect").into()))
                }
                () = sleep_until(deadline) => {
                    self.expire();
                    continue;
                }
                _ = tick.tick(), if look.is_none() => {
                    let (server, permitted) = (self.server.clone(), self.permitted.clone());
                    look = Some(Box::pin(check_health(connection.clone(), server, permitted)));
                    continue;
                }
                _ = probes.tick(), if probe.is_none() => {
                    probe = Some(Box::pin(send_probe(connection.clone(), self.server.clone(), links.clone())));
                    continue;
                }
                sent = output_of(&mut probe), if probe.is_some() => {
                    probe = None;
                    match sent {
                        Ok(()) => continue,
                        Err(error) => (Vec::new(), Err(error)),
                    }
                }
                () = links.probe.lost() => {
                    (Vec::new(), Err((ErrorKind::Io, "what is published is not heard").into()))
                }
                looked = output_of(&mut look), if look.is_some() => {
                    look = None;
                    match looked {
                        Ok(()) => continue,
                        // As if a pipeline had failed: those under way come to their end below.
                        Err(error) => (Vec::new(), Err(error)),
                    }
                }
            };
            let mut again = VecDeque::new();
            let mut settled = self.complete(server_id, batch, result, &mut again);
            if settled.is_err() || !again.is_empty() {
                settled = self.complete_all(server_id, settled, again, &mut sent).await;
            }
            if let Err(error) = settled {
                if is_unagreed(&error) {
                    self.links.found_unagreed(&self.server, server_id);
                }
                return error;
            }
        }
    }

    /// Settles all that is under way: behind one that failed the others do as well, or have answers
    /// that count. What has no answer goes ahead of what waits.
    async fn complete_all(
        &mut self,
        server_id: ServerId,
        mut settled: Result<(), RedisError>,
        mut again: VecDeque<QueuedAppend>,
        sent: &mut FuturesOrdered<InFlight>,
    ) -> Result<(), RedisError> {
        while let Some((batch, result)) = sent.next().await {
            settled = settled.and(self.complete(server_id, batch, result, &mut again));
        }
        self.queue.requeue(again);
        settled
    }

    fn send(
        &self,
        mut connection: MultiplexedConnection,
        server_id: ServerId,
        mut batch: Vec<QueuedAppend>,
    ) -> InFlight {
        let mut pipeline = redis::Pipeline::with_capacity(batch.len());
        pipeline.ignore_errors();
        for queued in &mut batch {
            let Append { room, envelope, .. } = &queued.append;
            queued.number =
                Some(self.links.node_state.unconfirmed().track(room, envelope, queued.number));
            pipeline.add_command(self.command(queued, server_id));
        }
        Box::pin(async move {
            let result = pipeline.query_async(&mut connection).await;
            (batch, result)
        })
    }

    fn command(&self, queued: &QueuedAppend, server_id: ServerId) -> redis::Cmd {
        let append = &queued.append;
        let retention = &self.server.retention;
        let (epoch, seq) = position_args(queued.hint.as_ref());
        let pressure = self.server.memory.pressure();
        let script = if pressure.is_high() { &self.script_when_full } else { &self.script };
        // What was acknowledged once, or was in a log, is not refused.
        let is_again = queued.hint.is_some() || append.urgent;
        let pressure = if is_again { Pressure::None } else { pressure };
        let user = append.room.user().filter(|_| append.room.kind() == RoomKind::Inbox);
        let keyspace = self.server.keyspace;
        let further = user.as_ref().map(|_| keyspace.last_seen_and_online(&append.room));
        let further = further.as_ref().map_or(&[][..], |keys| &keys[..]);
        let kept = retention.of(&append.room);
        let mut command = self.server.call_with(script, &append.room, server_id, further);
        command
            .arg(&append.envelope.dedup_key()[..])
            .arg(&append.envelope.as_bytes()[..])
            .arg(kept.entries_min)
            .arg(retention.window.as_millis() as u64)
            .arg(kept.bytes_max)
            .arg(epoch)
            .arg(seq)
            .arg(pressure.argument());
        if let Some(user) = user {
            let unseen = &retention.limits.unseen;
            command
                .arg(user.as_str())
                .arg(match append.unseen {
                    UnseenPolicy::Reject if !is_again => "refuse",
                    UnseenPolicy::Reject | UnseenPolicy::Limited => "small",
                    UnseenPolicy::Unlimited => "keep",
                })
                .arg(unseen.entries_max)
                .arg(unseen.bytes_max)
                .arg(unseen.ttl.as_millis() as u64);
        }
        command
    }

    /// Answers every publish of a pipeline that has its answer; the others go to `again`.
    ///
    /// # Errors
    ///
    /// The first error that says that this connection is of no more use.
    fn complete(
        &mut self,
        server_id: ServerId,
        batch: Vec<QueuedAppend>,
        result: RedisResult<Vec<RedisResult<Value>>>,
        again: &mut VecDeque<QueuedAppend>,
    ) -> Result<(), RedisError> {
        let values = match result {
            Ok(values) => values,
            Err(error) => {
                again.extend(batch);
                return Err(error);
            }
        };
        let links = self.links.clone();
        let (tail, now) = (links.node_state.unconfirmed(), Instant::now());
        let mut failed = Ok(());
        for (queued, value) in batch.into_iter().zip(values) {
            let id = queued.append.envelope.dedup_key();
            let room = &queued.append.room;
            let answer = value.map(|value| strip_report(&links.metrics, room, value));
            match answer.and_then(parse_appended) {
                Ok(appended) => {
                    // Before the sender hears of it: from then on it must not be lost.
                    let dropped = tail.acknowledged(&id, &appended.position, server_id, now);
                    self.links.metrics.unconfirmed_publishes_dropped.inc_by(dropped);
                    (queued.append.done)(Ok(appended));
                }
                Err(error)
                    if is_slot_error(&error)
                        || is_missing_replicas(&error)
                        || queued.hint.is_some() && is_transient(&error) =>
                {
                    let group = self.server.keyspace.group_of(&queued.append.room);
                    self.queue.back_off(group, now);
                    self.server.topology_stale.notify_one();
                    again.push_back(queued);
                }
                Err(error) if is_server_state(&error) => {
                    again.push_back(queued);
                    failed = failed.and(Err(error));
                }
                // It is sent again by the script that makes room.
                Err(error) if error.code() == Some("OOM") => {
                    self.server.memory.found_full();
                    again.push_back(queued);
                }
                Err(error) => {
                    self.server.requirements.record(Detector::Call, &error);
                    if !is_forbidden(&error) {
                        self.log_rejection(&error, &queued, now);
                    }
                    tail.discard(&id);
                    (queued.append.done)(Err(to_bus_error(&error)));
                }
            }
        }
        failed
    }

    /// Logs that Redis refused a publish: each that it will always refuse, and now and then one where
    /// it refuses all, as when it is full.
    fn log_rejection(&mut self, error: &RedisError, queued: &QueuedAppend, now: Instant) {
        if to_bus_error(error).is_limit() {
            return;
        }
        if is_transient(error) {
            if self.last_logged.is_some_and(|told| now - told < LOG_EVERY) {
                return;
            }
            self.last_logged = Some(now);
        }
        tracing::error!(%error, room = %queued.append.room, "Redis refused an append");
    }
}

/// Whether the server refused for a reason that may pass, as a full memory does. Whoever sent it may
/// try again; what was acknowledged before is tried again here.
fn is_transient(error: &RedisError) -> bool {
    !is_server_state(error) && to_bus_error(error) == BusError::Unavailable
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Connects and makes sure that this server can be appended to.
async fn connect(
    server: &Arc<RedisServer>,
    scripts: &[redis::Script],
    permitted: &redis::Script,
) -> Result<(MultiplexedConnection, ServerId), RedisError> {
    let (mut connection, server_id) = server.connect(config()).await?;
    for script in scripts {
        script.load_async(&mut connection).await?;
    }
    check_health(connection.clone(), server.clone(), permitted.clone()).await?;
    Ok((connection, server_id))
}

/// Whether the link lives, and whether the server is what it has to be.
async fn check_health(
    mut connection: MultiplexedConnection,
    server: Arc<RedisServer>,
    permitted: redis::Script,
) -> RedisResult<()> {
    redis::cmd("PING").query_async::<()>(&mut connection).await?;
    server.requirements.check(&server, &mut connection, &permitted).await
}

/// Sends a number that the subscriber has to hear.
async fn send_probe(
    mut connection: MultiplexedConnection,
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
) -> RedisResult<()> {
    // Nobody listens yet.
    let Some((_, channel)) = links.probe.channel() else { return Ok(()) };
    let number = links.probe.send(Instant::now());
    let publish = server.keyspace.publish();
    let sent = redis::cmd(publish).arg(channel).arg(number).query_async(&mut connection).await;
    match sent {
        // Another channel is chosen when it is known where this one is.
        Err(error) if is_slot_error(&error) => {
            links.probe.reset();
            server.topology_stale.notify_one();
            Ok(())
        }
        Err(error) if is_forbidden(&error) => {
            // It is not missed: another connection could do no more.
            links.probe.reset();
            server.requirements.record(Detector::Call, &error);
            Ok(())
        }
        sent => sent,
    }
}

/// Whether the server takes nothing while its replicas do not follow, as it was told: one of them may
/// be about to take its place.
fn is_missing_replicas(error: &RedisError) -> bool {
    error.code() == Some("NOREPLICAS")
}

/// Whether the error is about the server's state and not about this append: it does not know the
/// script any more, is loading, or has become a replica.
fn is_server_state(error: &RedisError) -> bool {
    is_unagreed(error)
        || matches!(
            error.kind(),
            ErrorKind::Io
                | ErrorKind::Server(
                    ServerErrorKind::NoScript
                        | ServerErrorKind::BusyLoading
                        | ServerErrorKind::ReadOnly
                        | ServerErrorKind::MasterDown
                )
        )
}

/// What the script answers: position, and whether it was known.
fn parse_appended(value: Value) -> Result<Appended, RedisError> {
    let (epoch, seq, kind): (String, u64, u8) = redis::from_redis_value(value)?;
    let epoch = epoch
        .parse()
        .map_err(|_| RedisError::from((ErrorKind::Parse, "append.lua answered no epoch")))?;
    let position = Position::new(epoch, seq);
    Ok(Appended { position, duplicate: kind == 1, opened_inbox: kind == 2 })
}
