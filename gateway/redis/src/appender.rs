//! Sends publishes to Redis: one connection, pipelined, in order, repeated until answered.
//!
//! Publishes that gather while a pipeline is written leave in the next one. A publish whose result
//! is unknown, because the connection died before its answer, is sent again with the same id and
//! ahead of newer ones; if it had been appended, the script answers with its position. A publish
//! that cannot be sent before its deadline is answered `Unavailable` and never sent later.
//!
//! Publishes are only sent to the server that the nodes have agreed on, and while this node holds
//! its lease. Another server gets this node's [unconfirmed publishes](skein_core::bus::unconfirmed)
//! first.

use std::{collections::VecDeque, sync::Arc, time::SystemTime};

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
    append_queue::{AppendQueue, QueuedAppend},
    error::{is_denied, is_slot_error, is_unagreed, to_bus_error},
    links::{LinkKind, LinkStates},
    memory::Pressure,
    probe::PROBE_INTERVAL,
    requirements::Detector,
    retry::RetryPause,
    server::{AgreedServer, RedisServer, position_args},
    topology::connection_config,
    untrusted::strip_report,
};
use skein_core::{
    bus::{Append, Appended, BoxFuture, BusError, UnseenPolicy, output_of},
    delivery::ServerId,
    drain::Tasks,
};

const QUEUE_LEN_MAX: usize = 1 << 16;
/// The most drain requests that wait.
const DRAINS_MAX: usize = 16;
/// How often the connection and the server's settings are checked.
const HEALTH_CHECK_INTERVAL: std::time::Duration = std::time::Duration::from_secs(2);
/// How often a rejection is logged while Redis rejects every publish.
const LOG_EVERY: std::time::Duration = std::time::Duration::from_secs(10);
/// The most publishes in one pipeline, and the most pipelines in flight.
const PIPELINE_LEN_MAX: usize = 256;
const PIPELINES_IN_FLIGHT_MAX: usize = 16;
/// A handle to the appender's task.
pub(super) struct Appender {
    queue: mpsc::Sender<QueuedAppend>,
    drains: mpsc::Sender<DrainRequest>,
}

/// Asks for all publishes of groups that another server serves from now on.
struct DrainRequest {
    groups: Vec<u16>,
    result: oneshot::Sender<Vec<QueuedAppend>>,
}

/// A pipeline in flight: resolves to its publishes and their results.
type InFlight = BoxFuture<(Vec<QueuedAppend>, RedisResult<Vec<RedisResult<Value>>>)>;

pub(super) fn start(server: Arc<RedisServer>, links: Arc<LinkStates>, tasks: &Tasks) -> Appender {
    let (queue, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    let (drains, drain_requests) = mpsc::channel(DRAINS_MAX);
    let worker = AppendWorker {
        queue: AppendQueue::new(server.keyspace),
        script: server.keyspace.script(include_str!("scripts/append.lua")),
        script_when_full: server
            .keyspace
            .script(concat!("#!lua flags=allow-oom\n", include_str!("scripts/append.lua"))),
        permission_check: server.keyspace.script(include_str!("scripts/check_permissions.lua")),
        server,
        links,
        incoming: receiver,
        drains: drain_requests,
        open: AgreedServer::default(),
        last_logged: None,
        stopped: tasks.stopped().clone(),
    };
    tasks.spawn_service("redis_appender", worker.run());
    Appender { queue, drains }
}

impl Appender {
    /// Queues a publish. Returns it with the error if it cannot.
    pub(super) fn send(&self, queued: QueuedAppend) -> Option<(QueuedAppend, BusError)> {
        match self.queue.try_send(queued) {
            Ok(()) => None,
            Err(mpsc::error::TrySendError::Full(queued)) => Some((queued, BusError::Overloaded)),
            Err(mpsc::error::TrySendError::Closed(queued)) => Some((queued, BusError::Unavailable)),
        }
    }

    /// Takes back all queued publishes of `groups`, in order, once none of them is in flight.
    pub(super) async fn drain_groups(&self, groups: Vec<u16>) -> Vec<QueuedAppend> {
        let (result, drained) = oneshot::channel();
        // A worker that has ended has answered all its publishes.
        let _ = self.drains.send(DrainRequest { groups, result }).await;
        drained.await.unwrap_or_default()
    }
}

/// The task that owns the connection.
struct AppendWorker {
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    incoming: mpsc::Receiver<QueuedAppend>,
    drains: mpsc::Receiver<DrainRequest>,
    /// Publishes to be sent before any in `incoming`: they came from there, or were sent already.
    queue: AppendQueue,
    script: redis::Script,
    /// The same script, which Redis runs even when it is full: it frees memory first.
    script_when_full: redis::Script,
    permission_check: redis::Script,
    /// The agreement as of the last check: unconfirmed publishes were republished to it.
    open: AgreedServer,
    /// When a transient rejection was last logged.
    last_logged: Option<Instant>,
    stopped: CancellationToken,
}

impl AppendWorker {
    async fn run(mut self) {
        let stopped = self.stopped.clone();
        // `reconnect_forever` keeps unanswered publishes in `self`, except those in flight, whose
        // tickets answer `unavailable` when they are dropped.
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
            queued.complete(Err(BusError::Unavailable));
        }
    }

    async fn reconnect_forever(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            let received = self.links.probe.received_count();
            match self.connect_while_expiring(&mut pause).await {
                Ok((connection, server_id, reconnect_all)) => {
                    self.links.set(&self.server, LinkKind::Append, Some(server_id));
                    let error = self.serve(connection, server_id, reconnect_all).await;
                    if self.links.probe.received_count() != received {
                        // The connection worked. As long as none does, attempts become rarer.
                        pause = RetryPause::default();
                    }
                    pause.failed(&error);
                    self.server.requirements.record(Detector::Call, &error);
                    tracing::debug!(%error, "append connection ended");
                }
                Err(error) => {
                    pause.failed(&error);
                    if pause.should_log() {
                        let server = self.server.dial.server_name();
                        tracing::warn!(%error, server, "cannot publish to Redis");
                    }
                }
            }
            self.links.set(&self.server, LinkKind::Append, None);
        }
    }

    /// Pauses and connects. Meanwhile publishes past their deadline are answered.
    async fn connect_while_expiring(
        &mut self,
        pause: &mut RetryPause,
    ) -> Result<(MultiplexedConnection, ServerId, watch::Receiver<u64>), RedisError> {
        let pause = pause.next();
        let (server, links) = (self.server.clone(), self.links.clone());
        let scripts = [self.script.clone(), self.script_when_full.clone()];
        let permission_check = self.permission_check.clone();
        let mut attempt = Box::pin(async move {
            tokio::time::sleep(pause).await;
            let reconnect_all = links.reconnect_all.subscribe();
            let (connection, server_id) = connect(&server, &scripts, &permission_check).await?;
            Ok((connection, server_id, reconnect_all))
        });
        loop {
            self.expire();
            let deadline = self.queue.next_deadline();
            // Cancel-safe: `attempt` is kept, and `recv` loses nothing.
            tokio::select! {
                biased;
                result = &mut attempt => return result,
                Some(drain) = self.drains.recv() => self.drain_groups(drain),
                Some(queued) = self.incoming.recv() => self.queue.push(queued),
                () = sleep_until(deadline) => {}
            }
        }
    }

    /// Answers the publishes past their deadline.
    fn expire(&mut self) {
        let (unconfirmed, now) = (self.links.node_state.unconfirmed(), Instant::now());
        for queued in self.queue.take_expired(now) {
            // An acknowledged publish stays tracked: the next server gets it.
            unconfirmed.discard(&queued.append.envelope.dedup_key());
            queued.complete(Err(BusError::Unavailable));
        }
    }

    /// The publishes to send next.
    fn next_batch(&mut self) -> Vec<QueuedAppend> {
        self.expire();
        self.queue.next_batch(PIPELINE_LEN_MAX, &self.open.groups, Instant::now())
    }

    /// Whether publishes may be sent to the server. If the nodes have agreed on it since the last
    /// check, it gets the unconfirmed publishes first.
    fn may_send(&mut self, server_id: ServerId) -> bool {
        let now = Instant::now();
        let agreed = self.server.agreed.borrow().clone();
        let is_agreed = agreed.id == Some(server_id);
        let may_send = is_agreed && self.links.node_state.holds_lease(now);
        #[cfg(debug_assertions)]
        if !may_send
            && skein_core::fault_injection::is_injected(
                skein_core::fault_injection::ProtocolFault::NoFence,
            )
        {
            // The groups that were open on the former server stay open.
            return true;
        }
        if !is_agreed {
            // If the nodes agree on the same server again, it was flushed meanwhile.
            self.open = AgreedServer::default();
        }
        if !may_send {
            return false;
        }
        if self.open.id != Some(server_id) || !Arc::ptr_eq(&self.open.groups, &agreed.groups) {
            let keyspace = self.server.keyspace;
            let unconfirmed = self.links.node_state.unconfirmed().to_republish(
                |room| {
                    let group = keyspace.group_of(room);
                    agreed.is_on(server_id, group) && !self.open.is_on(server_id, group)
                },
                now,
            );
            if !unconfirmed.is_empty() {
                tracing::info!(count = unconfirmed.len(), "republishing unconfirmed publishes");
            }
            self.links.metrics.republished.inc_by(unconfirmed.len() as u64);
            self.queue.push_republished(unconfirmed, now);
            self.open = agreed;
        }
        true
    }

    /// Hands over all publishes of groups that have moved to another server.
    fn drain_groups(&mut self, drain: DrainRequest) {
        while let Ok(queued) = self.incoming.try_recv() {
            self.queue.push(queued);
        }
        // The requester waits for the answer, or the node is stopping.
        let _ = drain.result.send(self.queue.drain_groups(&drain.groups));
    }

    /// Sends publishes and completes them until the connection fails. Returns why; publishes
    /// without an answer are in `queue` again, in their order.
    async fn serve(
        &mut self,
        connection: MultiplexedConnection,
        server_id: ServerId,
        mut reconnect_all: watch::Receiver<u64>,
    ) -> RedisError {
        let mut agreed = self.server.agreed.subscribe();
        let mut lease_reacquired = self.links.node_state.lease_reacquired();
        let mut sent: FuturesOrdered<InFlight> = FuturesOrdered::new();
        let mut queued = Vec::new();
        let mut tick = tokio::time::interval(HEALTH_CHECK_INTERVAL);
        let mut health_check: Option<BoxFuture<RedisResult<()>>> = None;
        let mut probes = tokio::time::interval(PROBE_INTERVAL);
        let mut probe: Option<BoxFuture<RedisResult<()>>> = None;
        let links = self.links.clone();
        loop {
            agreed.mark_unchanged();
            lease_reacquired.mark_unchanged();
            if sent.len() < PIPELINES_IN_FLIGHT_MAX && self.may_send(server_id) {
                let batch = self.next_batch();
                if !batch.is_empty() {
                    sent.push_back(self.send(connection.clone(), server_id, batch));
                    continue;
                }
            }
            // Publishes that may not be sent are answered at their deadline.
            let deadline =
                self.queue.next_deadline().filter(|_| sent.len() < PIPELINES_IN_FLIGHT_MAX);
            // Cancel-safe: `next` keeps pipelines in flight, and `recv_many` takes nothing unless
            // it completes.
            let (batch, result) = tokio::select! {
                biased;
                Some(drained) = sent.next() => drained,
                Some(drain) = self.drains.recv() => {
                    // Publishes in flight may come back unanswered, and are handed over as well.
                    let completed = self.complete_all(server_id, Ok(()), VecDeque::new(), &mut sent).await;
                    self.drain_groups(drain);
                    match completed {
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
                _ = lease_reacquired.changed() => continue,
                _ = reconnect_all.changed() => {
                    (Vec::new(), Err((ErrorKind::Io, "all links reconnect").into()))
                }
                () = sleep_until(deadline) => {
                    self.expire();
                    continue;
                }
                _ = tick.tick(), if health_check.is_none() => {
                    let (server, permission_check) = (self.server.clone(), self.permission_check.clone());
                    health_check = Some(Box::pin(check_health(connection.clone(), server, permission_check)));
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
                    (Vec::new(), Err((ErrorKind::Io, "probe timeout: this node does not receive what it publishes").into()))
                }
                looked = output_of(&mut health_check), if health_check.is_some() => {
                    health_check = None;
                    match looked {
                        Ok(()) => continue,
                        // As if a pipeline had failed: those in flight are completed below.
                        Err(error) => (Vec::new(), Err(error)),
                    }
                }
            };
            let mut again = VecDeque::new();
            let mut completed = self.complete(server_id, batch, result, &mut again);
            if completed.is_err() || !again.is_empty() {
                completed = self.complete_all(server_id, completed, again, &mut sent).await;
            }
            if let Err(error) = completed {
                if is_unagreed(&error) {
                    self.links.found_unagreed(&self.server, server_id);
                }
                return error;
            }
        }
    }

    /// Completes all pipelines in flight: those behind a failed one fail too, or have answers that
    /// count. Publishes without an answer go to the front of the queue.
    async fn complete_all(
        &mut self,
        server_id: ServerId,
        mut completed: Result<(), RedisError>,
        mut again: VecDeque<QueuedAppend>,
        sent: &mut FuturesOrdered<InFlight>,
    ) -> Result<(), RedisError> {
        while let Some((batch, result)) = sent.next().await {
            completed = completed.and(self.complete(server_id, batch, result, &mut again));
        }
        self.queue.requeue(again);
        completed
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
            let Append { room, envelope, ticket, .. } = &mut queued.append;
            ticket.mark_sent("redis");
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
        // A publish that was acknowledged or in a log before is not rejected.
        let is_resent = queued.hint.is_some() || append.urgent;
        let pressure = if is_resent { Pressure::None } else { pressure };
        let user = append.room.user().filter(|_| append.room.kind() == RoomKind::Inbox);
        let keyspace = self.server.keyspace;
        let more_keys = user.as_ref().map(|_| keyspace.last_seen_and_online(&append.room));
        let more_keys = more_keys.as_ref().map_or(&[][..], |keys| &keys[..]);
        let retention_of_log = retention.of(&append.room);
        let mut command = self.server.call_with(script, &append.room, server_id, more_keys);
        command
            .arg(&append.envelope.dedup_key()[..])
            .arg(&append.envelope.as_bytes()[..])
            .arg(retention_of_log.entries_min)
            .arg(retention.window.as_millis() as u64)
            .arg(retention_of_log.bytes_max)
            .arg(epoch)
            .arg(seq)
            .arg(pressure.argument());
        if let Some(user) = user {
            let unseen = &retention.limits.unseen;
            command
                .arg(user.as_str())
                .arg(match append.unseen {
                    UnseenPolicy::Reject if !is_resent => "reject",
                    UnseenPolicy::Reject | UnseenPolicy::Limited => "limited",
                    UnseenPolicy::Unlimited => "unlimited",
                })
                .arg(unseen.entries_max)
                .arg(unseen.bytes_max)
                .arg(unseen.ttl.as_millis() as u64);
        }
        command
    }

    /// Answers every publish of a pipeline that has a result; the others go to `again`.
    ///
    /// # Errors
    ///
    /// The first error after which this connection is of no more use.
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
        let (unconfirmed, now) = (links.node_state.unconfirmed(), Instant::now());
        let mut failed = Ok(());
        for (queued, value) in batch.into_iter().zip(values) {
            let id = queued.append.envelope.dedup_key();
            let room = &queued.append.room;
            let result = value.map(|value| strip_report(&links.metrics, room, value));
            match result.and_then(parse_appended) {
                Ok(appended) => {
                    // Recorded before the sender learns of it: from then on the publish must not be
                    // lost.
                    let dropped = unconfirmed.acknowledged(&id, &appended.position, server_id, now);
                    self.links.metrics.unconfirmed_publishes_dropped.inc_by(dropped);
                    queued.complete(Ok(appended));
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
                // It is sent again, by the script that frees memory.
                Err(error) if error.code() == Some("OOM") => {
                    self.server.memory.found_full();
                    again.push_back(queued);
                }
                Err(error) => {
                    self.server.requirements.record(Detector::Call, &error);
                    if !is_denied(&error) {
                        self.log_rejection(&error, &queued, now);
                    }
                    unconfirmed.discard(&id);
                    queued.complete(Err(to_bus_error(&error)));
                }
            }
        }
        failed
    }

    /// Logs that Redis rejected a publish: every permanent rejection, and now and then a transient
    /// one, as of a full Redis.
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
        tracing::error!(%error, room = %queued.append.room, "Redis rejected a publish");
    }
}

/// Whether the rejection is transient, as that of a full memory. The sender may try again; a
/// publish that was acknowledged before is retried here.
fn is_transient(error: &RedisError) -> bool {
    !is_server_state(error) && to_bus_error(error) == BusError::Unavailable
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Connects, and checks that this server can be appended to.
async fn connect(
    server: &Arc<RedisServer>,
    scripts: &[redis::Script],
    permission_check: &redis::Script,
) -> Result<(MultiplexedConnection, ServerId), RedisError> {
    let (mut connection, server_id) = server.connect(connection_config()).await?;
    for script in scripts {
        script.load_async(&mut connection).await?;
    }
    check_health(connection.clone(), server.clone(), permission_check.clone()).await?;
    Ok((connection, server_id))
}

/// Checks that the connection works and that the server meets the requirements.
async fn check_health(
    mut connection: MultiplexedConnection,
    server: Arc<RedisServer>,
    permission_check: redis::Script,
) -> RedisResult<()> {
    redis::cmd("PING").query_async::<()>(&mut connection).await?;
    server.requirements.check(&server, &mut connection, &permission_check).await
}

/// Sends a number that the subscriber has to receive.
async fn send_probe(
    mut connection: MultiplexedConnection,
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
) -> RedisResult<()> {
    // The subscriber has not subscribed to a channel yet.
    let Some((_, channel)) = links.probe.channel() else { return Ok(()) };
    let number = links.probe.send(Instant::now());
    let publish = server.keyspace.publish();
    if server.owns(0)
        && let Some(canary) = links.canary.due(Instant::now(), SystemTime::now())
    {
        // Best effort: a failure shows in the probe as well.
        let channel = server.keyspace.canary_channel();
        let mut publish = redis::cmd(publish);
        publish.arg(channel).arg(canary);
        if let Err(error) = publish.query_async::<()>(&mut connection).await {
            tracing::debug!(%error, "cannot publish a canary");
        }
    }
    let sent = redis::cmd(publish).arg(channel).arg(number).query_async(&mut connection).await;
    match sent {
        // Another channel is chosen once it is known where this one is.
        Err(error) if is_slot_error(&error) => {
            links.probe.reset();
            server.topology_stale.notify_one();
            Ok(())
        }
        Err(error) if is_denied(&error) => {
            // Not a lost probe: another connection would be denied as well.
            links.probe.reset();
            server.requirements.record(Detector::Call, &error);
            Ok(())
        }
        sent => sent,
    }
}

/// Whether the server takes no writes because its replicas do not follow (`min-replicas-to-write`):
/// one of them may be about to replace it.
fn is_missing_replicas(error: &RedisError) -> bool {
    error.code() == Some("NOREPLICAS")
}

/// Whether the error is due to the server's state and not to this append: it does not know the
/// script, is loading, or has become a replica.
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

/// Reads the result of `append.lua`: the position, and whether the entry was there before.
fn parse_appended(value: Value) -> Result<Appended, RedisError> {
    let (epoch, seq, kind): (String, u64, u8) = redis::from_redis_value(value)?;
    let epoch = epoch
        .parse()
        .map_err(|_| RedisError::from((ErrorKind::Parse, "append.lua returned no epoch")))?;
    let position = Position::new(epoch, seq);
    Ok(Appended { position, duplicate: kind == 1, opened_inbox: kind == 2 })
}
