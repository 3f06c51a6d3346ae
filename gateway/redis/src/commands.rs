//! Orders to the nodes of a cluster: a stream in Redis, which each node looks at every
//! [`POLL_INTERVAL`] from where it was.
//!
//! `gw:orders` (stream), `gw:orders:list` (which list it is: another one, where Redis lost it),
//! `gw:orders:nodes` (hash: of each process `<id applied> <when it was heard of, ms>`),
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

/// How often a node looks for orders.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often it lets the others know that it is there, where there is nothing to be done.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// How long one that is not heard of counts.
const NODE_TTL_MS: u64 = 60_000;
/// How many orders are kept, some 200 bytes each: questions are among them.
const COMMANDS_MAX: usize = 50_000;
/// The most orders taken at once.
const BATCH_MAX: usize = 100;
/// How long broadcasts and questions are worth anything.
const FRESH_FOR_MS: u64 = 5_000;
/// How long answers are kept.
const REPLIES_TTL_MS: u64 = 10_000;

/// A node's place in the list.
pub(super) struct RedisControlQueue {
    store: Arc<StoreWorker>,
    state: Mutex<StreamPosition>,
}

#[derive(Default)]
struct StreamPosition {
    /// Up to where orders were taken; `None` before the first look.
    cursor: Option<CommandId>,
    /// Up to where they were applied.
    applied: CommandId,
    /// Of which list.
    list: Option<String>,
    heard: Option<Instant>,
}

/// What one look finds.
struct StreamPoll {
    now_ms: u64,
    list: Option<String>,
    /// The last of the list, 0 for none.
    last: CommandId,
    entries: Vec<StreamEntry>,
}

/// An entry of the stream: its id and its fields.
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
        order: ControlCommand,
    ) -> Result<CommandId, BusError> {
        // Large, and worth something for seconds: it is kept apart, and not as long as orders are.
        if let ControlCommand::Broadcast { id, payload, .. } = &order {
            let key = self.key(&format!(":broadcast:{id}"));
            self.store
                .query(0, async |connection| {
                    let mut set = redis::cmd("SET");
                    set.arg(key).arg(payload).arg("PX").arg(REPLIES_TTL_MS);
                    set.query_async::<()>(connection).await
                })
                .await?;
        }
        let order = match order {
            ControlCommand::Broadcast { id, timestamp, .. } => {
                ControlCommand::Broadcast { id, timestamp, payload: String::new() }
            }
            order => order,
        };
        let order = serde_json::to_string(&order).expect("an order is made of names");
        let mut give = self.store.scripts.enqueue_command.key(self.key(""));
        give.key(self.key(":list")).arg(order).arg(COMMANDS_MAX).arg(random_epoch());
        let id: String = self.store.run_script(0, "orders", &give).await?;
        id_of(&id).ok_or(BusError::Rejected)
    }

    /// Waits for orders, for ever.
    pub(super) async fn poll(self: Arc<Self>) -> CommandBatch {
        loop {
            match self.poll_stream().await {
                Ok(look) => {
                    let mut taken = self.batch_of(look);
                    self.fetch_broadcasts(&mut taken).await;
                    if !taken.commands.is_empty() || taken.missed {
                        return taken;
                    }
                    self.send_heartbeat().await;
                }
                Err(error) => tracing::debug!(%error, "it is not known what is ordered"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn fetch_broadcasts(&self, taken: &mut CommandBatch) {
        for given in &mut taken.commands {
            let ControlCommand::Broadcast { id, payload, .. } = &mut given.command else {
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
                // It is too late for it.
                _ => given.is_fresh = false,
            }
        }
    }

    async fn poll_stream(&self) -> Result<StreamPoll, BusError> {
        let cursor = self.state.lock().cursor.unwrap_or_default();
        let stream = self.key("");
        let answers: Vec<RedisResult<Value>> = self
            .store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.atomic().ignore_errors();
                pipeline.cmd("TIME").cmd("GET").arg(self.key(":list"));
                pipeline.cmd("XREVRANGE").arg(&stream).arg("+").arg("-").arg("COUNT").arg(1);
                // The last one taken as well: it tells whether the list has been cut behind it.
                pipeline.cmd("XRANGE").arg(&stream).arg(text_of(cursor)).arg("+");
                pipeline.arg("COUNT").arg(BATCH_MAX + 1);
                pipeline.query_async(connection).await
            })
            .await?;
        let mut answers = answers.into_iter();
        let mut next = || answers.next().unwrap_or(Ok(Value::Nil));
        let time: (u64, u64) = self.store.or_default("orders", next())?;
        let list: Option<Lossy> = self.store.or_default("orders", next())?;
        // A stream that is none is made anew by the next order.
        let last: Vec<StreamEntry> = self.store.or_default("orders", next())?;
        let entries: Vec<StreamEntry> = self.store.or_default("orders", next())?;
        let last = last.first().and_then(|(Lossy(id), _)| id_of(id)).unwrap_or_default();
        let list = list.map(|Lossy(list)| list);
        Ok(StreamPoll { now_ms: time.0 * 1000 + time.1 / 1000, list, last, entries })
    }

    fn batch_of(&self, look: StreamPoll) -> CommandBatch {
        let state = &mut *self.state.lock();
        let Some(cursor) = state.cursor else {
            // A node that begins has no connection that an order could concern.
            (state.cursor, state.applied, state.list) = (Some(look.last), look.last, look.list);
            return CommandBatch::default();
        };
        if state.list != look.list {
            // Redis lost the list: all of the new one was given since.
            (state.cursor, state.list) = (Some(CommandId::default()), look.list);
            state.applied = CommandId::default();
            return CommandBatch::default();
        }
        if look.last < cursor {
            // Redis lost the end of it.
            (state.cursor, state.applied) = (Some(look.last), look.last);
            return CommandBatch::default();
        }
        let first = look.entries.first().and_then(|(Lossy(id), _)| id_of(id));
        let missed = cursor != CommandId::default() && first != Some(cursor);
        let mut taken = CommandBatch { missed, ..CommandBatch::default() };
        for (Lossy(entry), fields) in look.entries {
            let Some(id) = id_of(&entry).filter(|id| *id > cursor) else { continue };
            state.cursor = Some(id);
            let field = |name: &str| {
                fields.iter().find(|(field, _)| field.0 == name).map(|(_, Lossy(value))| value)
            };
            let order = field("o").and_then(|order| serde_json::from_str(order).ok());
            let Some(order) = order else {
                report(self.store.router.metrics(), InvalidValue::Command, &entry);
                continue;
            };
            let given = id.0.saturating_mul(1000);
            let at = field("at").and_then(|at| at.parse().ok()).unwrap_or(given);
            let is_fresh = id.0.saturating_add(FRESH_FOR_MS) > look.now_ms;
            taken.commands.push(QueuedCommand { id, at, is_fresh, command: order });
        }
        taken
    }

    /// Lets the others know that this node is there.
    async fn send_heartbeat(&self) {
        let (applied, is_due) = {
            let state = self.state.lock();
            (state.applied, state.heard.is_none_or(|at| at.elapsed() >= HEARTBEAT_INTERVAL))
        };
        if is_due && self.write_heartbeat(applied).await.is_err() {
            tracing::debug!("the others do not hear of this node");
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
        self.state.lock().heard = Some(Instant::now());
        Ok(())
    }

    pub(super) async fn mark_applied(self: Arc<Self>, id: CommandId) -> Result<(), BusError> {
        self.state.lock().applied = id;
        self.write_heartbeat(id).await
    }

    pub(super) async fn reply(
        self: Arc<Self>,
        id: CommandId,
        answer: String,
    ) -> Result<(), BusError> {
        let key = self.key(&format!(":answers:{}", text_of(id)));
        self.store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.cmd("RPUSH").arg(&key).arg(answer).ignore();
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
        let answers: Vec<RedisResult<Value>> = self
            .store
            .query(0, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.ignore_errors();
                pipeline.cmd("TIME").cmd("HGETALL").arg(&nodes).query_async(connection).await
            })
            .await?;
        let mut answers = answers.into_iter();
        let mut next = || answers.next().unwrap_or(Ok(Value::Nil));
        let time: (u64, u64) = self.store.or_default("nodes of orders", next())?;
        let rows: Vec<(Lossy, Lossy)> = self.store.or_default("nodes of orders", next())?;
        let now = time.0 * 1000 + time.1 / 1000;
        let (mut nodes_of, mut gone) = (BTreeMap::new(), Vec::new());
        for (Lossy(process), Lossy(row)) in rows {
            let parts = row
                .split_once(' ')
                .and_then(|(applied, heard)| Some((heard.parse::<u64>().ok()?, id_of(applied)?)));
            if parts.is_none() {
                report(self.store.router.metrics(), InvalidValue::Command, &process);
            }
            match parts {
                Some((heard, applied)) if heard.saturating_add(NODE_TTL_MS) > now => {
                    // Of a node that was started anew the run that was heard of last counts.
                    let node = process.split('/').next().unwrap_or_default().to_owned();
                    let newest = nodes_of.entry(node).or_insert((heard, applied));
                    *newest = (*newest).max((heard, applied));
                }
                _ => gone.push(process),
            }
        }
        let applied = nodes_of.values().filter(|(_, applied)| *applied >= id).count();
        let outcome = CommandProgress { applied, nodes: nodes_of.len() };
        if !gone.is_empty() {
            self.store
                .query(0, async |connection| {
                    let mut forget = redis::cmd("HDEL");
                    forget.arg(&nodes).arg(&gone).query_async::<()>(connection).await
                })
                .await?;
        }
        Ok(outcome)
    }

    pub(super) async fn replies(self: Arc<Self>, id: CommandId) -> Result<Vec<String>, BusError> {
        let key = self.key(&format!(":answers:{}", text_of(id)));
        let answers: Vec<Lossy> = self
            .store
            .query(0, async |connection| {
                redis::cmd("LRANGE").arg(&key).arg(0).arg(-1).query_async(connection).await
            })
            .await?;
        Ok(texts(answers))
    }
}
