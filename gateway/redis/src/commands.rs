//! The queue of control commands of a cluster: a stream in Redis, which each node polls every
//! [`POLL_INTERVAL`] from its own position.
//!
//! `gw:orders` (stream), `gw:orders:list` (the id of the queue: another one after Redis has lost
//! it), `gw:orders:nodes` (hash: of each process `<id applied> <time of its heartbeat, ms>`),
//! `gw:orders:answers:<id>` (list), `gw:orders:broadcast:<id>`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::{RedisResult, Value};
use tokio::time::Instant;

use super::{
    store::StoreWorker,
    untrusted::{Lossy, is_wrong_type, report, texts},
};
use skein_core::{
    bus::{
        BusError,
        commands::{CommandBatch, CommandId, CommandProgress, ControlCommand, QueuedCommand},
        random_epoch,
    },
    telemetry::metrics::InvalidValue,
};

/// How often a node polls for commands.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often a node that applies no command sends a heartbeat.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// How long a node counts after its last heartbeat.
const NODE_TTL_MS: u64 = 60_000;
/// The most commands kept, some 200 bytes each, queries included.
const COMMANDS_MAX: usize = 50_000;
/// The most commands in one batch.
const BATCH_MAX: usize = 100;
/// How long broadcasts and queries are fresh.
const FRESH_FOR_MS: u64 = 5_000;
/// Retention of replies.
const REPLIES_TTL_MS: u64 = 10_000;

/// The queue, and this node's position in it.
pub(super) struct RedisControlQueue {
    store: Arc<StoreWorker>,
    state: Mutex<StreamPosition>,
}

#[derive(Default)]
struct StreamPosition {
    /// Up to where commands were polled; `None` before the first poll.
    cursor: Option<CommandId>,
    /// Up to where commands were applied.
    applied: CommandId,
    /// The id of the queue.
    list: Option<String>,
    heartbeat_at: Option<Instant>,
}

/// The result of one poll.
struct StreamPoll {
    now_ms: u64,
    list: Option<String>,
    /// The last command of the queue, 0 for none.
    last: CommandId,
    entries: Vec<StreamEntry>,
}

/// An entry of the stream: its id and fields.
type StreamEntry = (Lossy, BTreeMap<Lossy, Lossy>);

fn text_of(CommandId(ms, number): CommandId) -> String {
    format!("{ms}-{number}")
}

fn id_of(text: &str) -> Option<CommandId> {
    let (ms, number) = text.split_once('-')?;
    Some(CommandId(ms.parse().ok()?, number.parse().ok()?))
}

impl RedisControlQueue {
    pub(super) fn new(registrar: Arc<StoreWorker>) -> Self {
        Self { store: registrar, state: Mutex::default() }
    }

    fn key(&self, name: &str) -> String {
        self.store.router.keyspace().commands(name)
    }

    pub(super) async fn enqueue(
        self: Arc<Self>,
        command: ControlCommand,
    ) -> Result<CommandId, BusError> {
        // A broadcast is large and only useful for seconds: it is stored apart from the commands,
        // which are kept longer.
        if let ControlCommand::Broadcast { id, payload, .. } = &command {
            let key = self.key(&format!(":broadcast:{id}"));
            self.store
                .query(0, async |connection| {
                    let mut set = redis::cmd("SET");
                    set.arg(key).arg(payload).arg("PX").arg(REPLIES_TTL_MS);
                    set.query_async::<()>(connection).await
                })
                .await?;
        }
        let command = match command {
            ControlCommand::Broadcast { id, timestamp, .. } => {
                ControlCommand::Broadcast { id, timestamp, payload: String::new() }
            }
            command => command,
        };
        let command = serde_json::to_string(&command).expect("a command serialises");
        let mut enqueue = self.store.scripts.enqueue_command.key(self.key(""));
        enqueue.key(self.key(":list")).arg(command).arg(COMMANDS_MAX).arg(random_epoch());
        let id: String = self.store.run_script(0, "control commands", &enqueue).await?;
        id_of(&id).ok_or(BusError::Rejected)
    }

    /// Waits for commands, for ever.
    pub(super) async fn poll(self: Arc<Self>) -> CommandBatch {
        loop {
            match self.poll_stream().await {
                Ok(poll) => {
                    let mut batch = self.batch_of(poll);
                    self.fetch_broadcasts(&mut batch).await;
                    if !batch.commands.is_empty() || batch.missed {
                        return batch;
                    }
                    self.send_heartbeat().await;
                }
                Err(error) => tracing::debug!(%error, "cannot poll for control commands"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn fetch_broadcasts(&self, batch: &mut CommandBatch) {
        for queued in &mut batch.commands {
            let ControlCommand::Broadcast { id, payload, .. } = &mut queued.command else {
                continue;
            };
            let key = self.key(&format!(":broadcast:{id}"));
            let fetched: Result<Option<String>, _> = self
                .store
                .query(0, async |connection| {
                    redis::cmd("GET").arg(key).query_async(connection).await
                })
                .await;
            match fetched {
                Ok(Some(fetched)) => *payload = fetched,
                // It has expired.
                _ => queued.is_fresh = false,
            }
        }
    }

    async fn poll_stream(&self) -> Result<StreamPoll, BusError> {
        let cursor = self.state.lock().cursor.unwrap_or_default();
        let stream = self.key("");
        let replies: Vec<RedisResult<Value>> = self
            .store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.atomic().ignore_errors();
                pipeline.cmd("TIME").cmd("GET").arg(self.key(":list"));
                pipeline.cmd("XREVRANGE").arg(&stream).arg("+").arg("-").arg("COUNT").arg(1);
                // Includes the last polled command: if it is missing, the queue was trimmed beyond
                // it.
                pipeline.cmd("XRANGE").arg(&stream).arg(text_of(cursor)).arg("+");
                pipeline.arg("COUNT").arg(BATCH_MAX + 1);
                pipeline.query_async(connection).await
            })
            .await?;
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
        let time: (u64, u64) = self.store.or_default("control commands", next())?;
        let list: Option<Lossy> = self.store.or_default("control commands", next())?;
        // A key of another type is replaced by the next command.
        let last: Vec<StreamEntry> = self.store.or_default("control commands", next())?;
        let entries: Vec<StreamEntry> = self.store.or_default("control commands", next())?;
        let last = last.first().and_then(|(Lossy(id), _)| id_of(id)).unwrap_or_default();
        let list = list.map(|Lossy(list)| list);
        Ok(StreamPoll { now_ms: time.0 * 1000 + time.1 / 1000, list, last, entries })
    }

    fn batch_of(&self, poll: StreamPoll) -> CommandBatch {
        let state = &mut *self.state.lock();
        let Some(cursor) = state.cursor else {
            // A node that has just started has no connection that a command could concern.
            (state.cursor, state.applied, state.list) = (Some(poll.last), poll.last, poll.list);
            return CommandBatch::default();
        };
        if state.list != poll.list {
            // Redis lost the queue: all commands of the new one are later.
            (state.cursor, state.list) = (Some(CommandId::default()), poll.list);
            state.applied = CommandId::default();
            return CommandBatch::default();
        }
        if poll.last < cursor {
            // Redis lost the end of the queue.
            (state.cursor, state.applied) = (Some(poll.last), poll.last);
            return CommandBatch::default();
        }
        let first = poll.entries.first().and_then(|(Lossy(id), _)| id_of(id));
        let missed = cursor != CommandId::default() && first != Some(cursor);
        let mut batch = CommandBatch { missed, ..CommandBatch::default() };
        for (Lossy(entry), fields) in poll.entries {
            let Some(id) = id_of(&entry).filter(|id| *id > cursor) else { continue };
            state.cursor = Some(id);
            let field = |name: &str| {
                fields.iter().find(|(field, _)| field.0 == name).map(|(_, Lossy(value))| value)
            };
            let command = field("o").and_then(|command| serde_json::from_str(command).ok());
            let Some(command) = command else {
                report(self.store.router.metrics(), InvalidValue::Command, &entry);
                continue;
            };
            let micros_of_id = id.0.saturating_mul(1000);
            let at = field("at").and_then(|at| at.parse().ok()).unwrap_or(micros_of_id);
            let is_fresh = id.0.saturating_add(FRESH_FOR_MS) > poll.now_ms;
            batch.commands.push(QueuedCommand { id, at, is_fresh, command });
        }
        batch
    }

    /// Sends a heartbeat if one is due.
    async fn send_heartbeat(&self) {
        let (applied, is_due) = {
            let state = self.state.lock();
            (state.applied, state.heartbeat_at.is_none_or(|at| at.elapsed() >= HEARTBEAT_INTERVAL))
        };
        if is_due && self.write_heartbeat(applied).await.is_err() {
            tracing::debug!("cannot send a heartbeat to the other nodes");
        }
    }

    async fn write_heartbeat(&self, applied: CommandId) -> Result<(), BusError> {
        let (nodes, process) = (self.key(":nodes"), &self.store.router.process().name);
        self.store
            .query(0, async |connection| {
                let (seconds, micros): (u64, u64) =
                    redis::cmd("TIME").query_async(connection).await?;
                let row = format!("{} {}", text_of(applied), seconds * 1000 + micros / 1000);
                let mut set = redis::cmd("HSET");
                set.arg(&nodes).arg(process).arg(row);
                match set.query_async::<()>(connection).await {
                    Err(error) if is_wrong_type(&error) => {
                        report(self.store.router.metrics(), InvalidValue::KeyType, &nodes);
                        redis::cmd("DEL").arg(&nodes).query_async::<()>(connection).await?;
                        set.query_async(connection).await
                    }
                    set => set,
                }
            })
            .await?;
        self.state.lock().heartbeat_at = Some(Instant::now());
        Ok(())
    }

    pub(super) async fn mark_applied(self: Arc<Self>, id: CommandId) -> Result<(), BusError> {
        self.state.lock().applied = id;
        self.write_heartbeat(id).await
    }

    pub(super) async fn reply(
        self: Arc<Self>,
        id: CommandId,
        reply: String,
    ) -> Result<(), BusError> {
        let key = self.key(&format!(":answers:{}", text_of(id)));
        self.store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.cmd("RPUSH").arg(&key).arg(reply).ignore();
                pipeline.cmd("PEXPIRE").arg(&key).arg(REPLIES_TTL_MS).ignore();
                pipeline.query_async(connection).await
            })
            .await
    }

    pub(super) async fn progress(
        self: Arc<Self>,
        id: CommandId,
    ) -> Result<CommandProgress, BusError> {
        let nodes = self.key(":nodes");
        let replies: Vec<RedisResult<Value>> = self
            .store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.ignore_errors();
                pipeline.cmd("TIME").cmd("HGETALL").arg(&nodes).query_async(connection).await
            })
            .await?;
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
        let time: (u64, u64) = self.store.or_default("nodes of control commands", next())?;
        let rows: Vec<(Lossy, Lossy)> =
            self.store.or_default("nodes of control commands", next())?;
        let now = time.0 * 1000 + time.1 / 1000;
        let (mut heartbeats, mut expired) = (BTreeMap::new(), Vec::new());
        for (Lossy(process), Lossy(row)) in rows {
            let parts = row.split_once(' ').and_then(|(applied, heartbeat_at)| {
                Some((heartbeat_at.parse::<u64>().ok()?, id_of(applied)?))
            });
            if parts.is_none() {
                report(self.store.router.metrics(), InvalidValue::Command, &process);
            }
            match parts {
                Some((heartbeat_at, applied)) if heartbeat_at.saturating_add(NODE_TTL_MS) > now => {
                    // Of a node that was restarted, the run with the latest heartbeat counts.
                    let node = process.split('/').next().unwrap_or_default().to_owned();
                    let newest = heartbeats.entry(node).or_insert((heartbeat_at, applied));
                    *newest = (*newest).max((heartbeat_at, applied));
                }
                _ => expired.push(process),
            }
        }
        let applied = heartbeats.values().filter(|(_, applied)| *applied >= id).count();
        let progress = CommandProgress { applied, nodes: heartbeats.len() };
        if !expired.is_empty() {
            self.store
                .query(0, async |connection| {
                    let mut forget = redis::cmd("HDEL");
                    forget.arg(&nodes).arg(&expired).query_async::<()>(connection).await
                })
                .await?;
        }
        Ok(progress)
    }

    pub(super) async fn replies(self: Arc<Self>, id: CommandId) -> Result<Vec<String>, BusError> {
        let key = self.key(&format!(":answers:{}", text_of(id)));
        let replies: Vec<Lossy> = self
            .store
            .query(0, async |connection| {
                redis::cmd("LRANGE").arg(&key).arg(0).arg(-1).query_async(connection).await
            })
            .await?;
        Ok(texts(replies))
    }
}
