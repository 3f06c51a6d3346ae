//! The way of publishes into Redis: one connection, pipelined, in order, repeated until answered.
//!
//! What gathers while a pipeline is being written leaves in the next one. A publish whose fate is
//! unknown, because the link died before its answer, is sent again with the same id and ahead of
//! newer ones; the script answers with the position it has if it had been appended. What cannot be
//! sent until its deadline is answered `Unavailable` and never sent later.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use futures_util::{StreamExt as _, stream::FuturesOrdered};
use redis::{
    ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{Link, Links, RetryPause, Server, config, probe::PROBE_EVERY, refused_or_away};
use crate::{
    bus::{Append, Appended, BoxFuture, BusError, HEAD_TTL, output_of, random_epoch},
    drain::Tasks,
};

/// The most that may wait to be sent or answered. Above it publishes are `Overloaded`.
const QUEUE_BYTES_MAX: usize = 64 << 20;
const QUEUE_LEN_MAX: usize = 1 << 16;
/// What an entry counts beside its own bytes, so that small ones are bounded in number.
const ENTRY_OVERHEAD_BYTES: usize = 512;
/// How often the link and the server's settings are looked at.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_secs(2);
/// The most publishes in one pipeline, and the most pipelines under way.
const PIPELINE_LEN_MAX: usize = 256;
const PIPELINES_MAX: usize = 16;

/// A handle to the appender's task.
pub(super) struct Appender {
    queue: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
}

/// A publish that waits; its share of the queue's bytes is given back when it is dropped.
struct Queued {
    append: Append,
    _room: OwnedSemaphorePermit,
}

/// A pipeline that was sent, with what was in it.
type Sent = BoxFuture<(Vec<Queued>, RedisResult<Vec<RedisResult<Value>>>)>;

pub(super) fn start(server: Arc<Server>, links: Arc<Links>, tasks: &Tasks) -> Appender {
    let (queue, receiver) = mpsc::channel(QUEUE_LEN_MAX);
    let worker = Worker {
        server,
        links,
        queue: receiver,
        waiting: VecDeque::new(),
        script: redis::Script::new(include_str!("scripts/append.lua")),
        stopped: tasks.stopped().clone(),
    };
    tasks.spawn_service("redis_appender", worker.run());
    Appender { queue, room: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)) }
}

impl Appender {
    pub(super) fn append(&self, append: Append) {
        let bytes = append.envelope.as_bytes().len() + ENTRY_OVERHEAD_BYTES;
        let Ok(room) = self.room.clone().try_acquire_many_owned(bytes as u32) else {
            return (append.done)(Err(BusError::Overloaded));
        };
        match self.queue.try_send(Queued { append, _room: room }) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(queued)) => {
                (queued.append.done)(Err(BusError::Overloaded));
            }
            Err(mpsc::error::TrySendError::Closed(queued)) => {
                (queued.append.done)(Err(BusError::Unavailable));
            }
        }
    }
}

/// The task that owns the connection.
struct Worker {
    server: Arc<Server>,
    links: Arc<Links>,
    queue: mpsc::Receiver<Queued>,
    /// What is to be sent before anything in `queue`: it came from there, or was sent already.
    waiting: VecDeque<Queued>,
    script: redis::Script,
    stopped: CancellationToken,
}

impl Worker {
    async fn run(mut self) {
        let stopped = self.stopped.clone();
        // `work` keeps what is unanswered in `self`, but for what was sent: its callers are gone by
        // now, and find it by its id.
        tokio::select! {
            () = stopped.cancelled() => {}
            () = self.work() => {}
        }
        self.queue.close();
        while let Ok(queued) = self.queue.try_recv() {
            self.waiting.push_back(queued);
        }
        for queued in self.waiting.drain(..) {
            (queued.append.done)(Err(BusError::Unavailable));
        }
    }

    async fn work(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            match self.connect_while_expiring(&mut pause).await {
                Ok(connection) => {
                    pause = RetryPause::default();
                    self.links.set(Link::Appending, true);
                    let error = self.serve(connection).await;
                    tracing::debug!(%error, "append connection ended");
                }
                Err(error) => {
                    if pause.is_worth_a_line() {
                        tracing::warn!(%error, "cannot publish to Redis");
                    }
                }
            }
            self.links.set(Link::Appending, false);
        }
    }

    /// Pauses and connects. Meanwhile what is past its deadline is answered.
    async fn connect_while_expiring(
        &mut self,
        pause: &mut RetryPause,
    ) -> Result<MultiplexedConnection, RedisError> {
        let pause = pause.next();
        let (server, links, script) =
            (self.server.clone(), self.links.clone(), self.script.clone());
        let mut attempt = Box::pin(async move {
            tokio::time::sleep(pause).await;
            connect(&server, &links, &script).await
        });
        loop {
            self.expire();
            let deadline = self.waiting.front().map(|queued| queued.append.deadline);
            // Cancel-safe: `attempt` is kept, and `recv` loses nothing.
            tokio::select! {
                result = &mut attempt => return result,
                Some(queued) = self.queue.recv() => self.waiting.push_back(queued),
                () = sleep_until(deadline) => {}
            }
        }
    }

    /// Answers what is past its deadline. Deadlines rise along the queue, nearly: one that is
    /// behind an older one waits for it at most as long as waits differ.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(queued) = self.waiting.pop_front() {
            if queued.append.deadline > now {
                self.waiting.push_front(queued);
                break;
            }
            (queued.append.done)(Err(BusError::Unavailable));
        }
    }

    /// Sends and settles until the connection fails. Returns why; what has no answer is in
    /// `waiting` again, in its order.
    async fn serve(&mut self, connection: MultiplexedConnection) -> RedisError {
        let mut sent: FuturesOrdered<Sent> = FuturesOrdered::new();
        let mut queued = Vec::new();
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let mut look: Option<BoxFuture<RedisResult<()>>> = None;
        let mut probes = tokio::time::interval(PROBE_EVERY);
        let mut probe: Option<BoxFuture<RedisResult<()>>> = None;
        let links = self.links.clone();
        loop {
            if !self.waiting.is_empty() && sent.len() < PIPELINES_MAX {
                self.expire();
                let count = self.waiting.len().min(PIPELINE_LEN_MAX);
                let batch = self.waiting.drain(..count).collect();
                sent.push_back(self.send(connection.clone(), batch));
                continue;
            }
            // Cancel-safe: `next` keeps what is under way, and `recv_many` takes nothing unless
            // it completes.
            let (batch, result) = tokio::select! {
                biased;
                Some(answered) = sent.next() => answered,
                _ = self.queue.recv_many(&mut queued, PIPELINE_LEN_MAX),
                    if sent.len() < PIPELINES_MAX =>
                {
                    self.waiting.extend(queued.drain(..));
                    continue;
                }
                _ = tick.tick(), if look.is_none() => {
                    look = Some(Box::pin(look_at(connection.clone(), self.links.clone())));
                    continue;
                }
                _ = probes.tick(), if probe.is_none() => {
                    probe = Some(Box::pin(send_probe(connection.clone(), links.clone())));
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
            if let Err(error) = settle(batch, result, &mut again) {
                // The pipelines behind it fail as well, or have answers that count.
                while let Some((batch, result)) = sent.next().await {
                    let _ = settle(batch, result, &mut again);
                }
                again.append(&mut self.waiting);
                self.waiting = again;
                return error;
            }
        }
    }

    fn send(&self, mut connection: MultiplexedConnection, batch: Vec<Queued>) -> Sent {
        let mut pipeline = redis::Pipeline::with_capacity(batch.len());
        pipeline.ignore_errors();
        for queued in &batch {
            pipeline.add_command(self.command(&queued.append));
        }
        Box::pin(async move {
            let result = pipeline.query_async(&mut connection).await;
            (batch, result)
        })
    }

    fn command(&self, append: &Append) -> redis::Cmd {
        let retention = &self.server.retention;
        let channel = self.server.keyspace.channel(&append.room);
        let mut command = redis::cmd("EVALSHA");
        command.arg(self.script.get_hash()).arg(4);
        for part in [":log", ":meta", ":ids0", ":ids1"] {
            command.arg(format!("{channel}{part}"));
        }
        command
            .arg(&channel)
            .arg(&append.envelope.id_key()[..])
            .arg(&append.envelope.as_bytes()[..])
            .arg(random_epoch())
            .arg(retention.entries_min)
            .arg(retention.window.as_millis() as u64)
            .arg(retention.bytes_max)
            .arg(retention.ttl.as_millis() as u64)
            .arg(HEAD_TTL.max(retention.ttl).as_millis() as u64)
            .arg(retention.dedup_window.as_millis() as u64);
        command
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Connects and makes sure that this server can be appended to.
async fn connect(
    server: &Server,
    links: &Arc<Links>,
    script: &redis::Script,
) -> Result<MultiplexedConnection, RedisError> {
    let mut connection = server.connect(config()).await?;
    script.load_async(&mut connection).await?;
    let replication: String =
        redis::cmd("INFO").arg("replication").query_async(&mut connection).await?;
    if !replication.contains("role:master") {
        return Err((ErrorKind::Io, "the server is a replica").into());
    }
    look_at(connection.clone(), links.clone()).await?;
    Ok(connection)
}

/// Whether the link lives, and whether Redis may throw acknowledged messages away.
async fn look_at(mut connection: MultiplexedConnection, links: Arc<Links>) -> RedisResult<()> {
    redis::cmd("PING").query_async::<()>(&mut connection).await?;
    // A hosted Redis may forbid CONFIG; there the operator answers for it.
    let policy: RedisResult<(String, String)> =
        redis::cmd("CONFIG").arg("GET").arg("maxmemory-policy").query_async(&mut connection).await;
    let evicts = matches!(&policy, Ok((_, policy)) if policy != "noeviction");
    if evicts && !links.evicts.load(Ordering::Relaxed) {
        tracing::error!(
            "Redis has a maxmemory-policy that throws keys away, and with them acknowledged \
             messages: set it to noeviction; not ready until then"
        );
    }
    links.evicts.store(evicts, Ordering::Relaxed);
    Ok(())
}

/// Sends a number that the subscriber has to hear.
async fn send_probe(mut connection: MultiplexedConnection, links: Arc<Links>) -> RedisResult<()> {
    let number = links.probe.send(Instant::now());
    redis::cmd("PUBLISH").arg(&links.probe.channel).arg(number).query_async(&mut connection).await
}

/// Answers every publish of a pipeline that has its answer; the others go to `again`.
///
/// # Errors
///
/// The first error that says that this connection is of no more use.
fn settle(
    batch: Vec<Queued>,
    result: RedisResult<Vec<RedisResult<Value>>>,
    again: &mut VecDeque<Queued>,
) -> Result<(), RedisError> {
    let values = match result {
        Ok(values) => values,
        Err(error) => {
            again.extend(batch);
            return Err(error);
        }
    };
    let mut failed = Ok(());
    for (queued, value) in batch.into_iter().zip(values) {
        match value.and_then(appended) {
            Ok(appended) => (queued.append.done)(Ok(appended)),
            Err(error) if is_of_the_server(&error) => {
                again.push_back(queued);
                failed = failed.and(Err(error));
            }
            Err(error) => {
                tracing::error!(%error, room = %queued.append.room, "Redis refused an append");
                (queued.append.done)(Err(refused_or_away(&error)));
            }
        }
    }
    failed
}

/// Whether the error is about the server's state and not about this append: it does not know the
/// script any more, is loading, or has become a replica.
fn is_of_the_server(error: &RedisError) -> bool {
    matches!(
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
fn appended(value: Value) -> Result<Appended, RedisError> {
    let (position, duplicate): (String, bool) = redis::from_redis_value(value)?;
    let position = position
        .parse()
        .map_err(|_| RedisError::from((ErrorKind::Parse, "append.lua answered no position")))?;
    Ok(Appended { position, duplicate })
}
