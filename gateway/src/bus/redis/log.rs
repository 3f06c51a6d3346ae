//! Reads of rooms' logs, through a pool: they are few, and a large one does not delay publishes.

use std::sync::Arc;

use bytes::Bytes;
use deadpool_redis::{Manager, Pool, Runtime, Timeouts};
use redis::{ErrorKind, RedisError, Value};
use shared::{
    envelope::Envelope,
    ids::RoomId,
    position::{Epoch, Position, Seq},
};

use super::{CONNECT_MAX, RESPONSE_MAX, Server, config, refused_or_away};
use crate::{
    bus::{BoxFuture, BusError, HEAD_TTL, READ_BYTES_MAX, Range, random_epoch},
    delivery::{Entry, page::Page},
};

/// The most heads in one pipeline, so that a node with many rooms does not hold Redis up.
const HEADS_MAX: usize = 512;
/// How many reads go on at a time; others wait.
const CONNECTIONS_MAX: usize = 8;

#[derive(Clone)]
pub(super) struct Log {
    server: Arc<Server>,
    pool: Pool,
    script: redis::Script,
}

impl Log {
    pub(super) fn new(server: Arc<Server>) -> Result<Self, RedisError> {
        let manager =
            Manager::new_with_config(server.client.get_connection_info().clone(), config())?;
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS_MAX)
            .runtime(Runtime::Tokio1)
            .timeouts(Timeouts {
                wait: Some(RESPONSE_MAX),
                create: Some(CONNECT_MAX),
                recycle: Some(CONNECT_MAX),
            })
            .build()
            .map_err(|_| RedisError::from((ErrorKind::Client, "no runtime for the pool")))?;
        let script = redis::Script::new(include_str!("scripts/read.lua"));
        Ok(Self { server, pool, script })
    }

    pub(super) fn read(&self, room: RoomId, range: Range) -> BoxFuture<Result<Page, BusError>> {
        let log = self.clone();
        Box::pin(async move {
            log.read_now(&room, range).await.inspect_err(|error| {
                tracing::debug!(%room, %error, "a log could not be read");
            })
        })
    }

    pub(super) fn heads(
        &self,
        rooms: Vec<RoomId>,
    ) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        let log = self.clone();
        Box::pin(async move {
            let mut heads = Vec::with_capacity(rooms.len());
            for rooms in rooms.chunks(HEADS_MAX) {
                heads.extend(log.heads_now(rooms).await?);
            }
            Ok(heads)
        })
    }

    async fn heads_now(&self, rooms: &[RoomId]) -> Result<Vec<Option<Position>>, BusError> {
        let mut connection = self.pool.get().await.map_err(|error| {
            tracing::debug!(%error, "no connection to compare logs by");
            BusError::Unavailable
        })?;
        let ttl = HEAD_TTL.max(self.server.retention.ttl).as_millis() as u64;
        let mut pipeline = redis::Pipeline::with_capacity(rooms.len() * 2);
        for room in rooms {
            let meta = format!("{}:meta", self.server.keyspace.channel(room));
            pipeline.cmd("HMGET").arg(&meta).arg("e").arg("s");
            // A room that is followed in silence does not lose its numbers.
            pipeline.cmd("PEXPIRE").arg(&meta).arg(ttl).ignore();
        }
        let heads: Vec<(Option<String>, Option<Seq>)> =
            pipeline.query_async(&mut connection).await.map_err(|error| {
                tracing::debug!(%error, "logs could not be compared");
                refused_or_away(&error)
            })?;
        Ok(heads.into_iter().map(head).collect())
    }

    async fn read_now(&self, room: &RoomId, range: Range) -> Result<Page, BusError> {
        let mut connection = self.pool.get().await.map_err(|error| {
            tracing::debug!(%error, "no connection to read a log by");
            BusError::Unavailable
        })?;
        let channel = self.server.keyspace.channel(room);
        let (kind, seq) = match range {
            Range::Newest { .. } => ("newest", 0),
            Range::After { seq, .. } => ("after", seq),
            Range::Before { seq, .. } => ("before", seq),
        };
        let ttl = HEAD_TTL.max(self.server.retention.ttl);
        let answer: Value = self
            .script
            .key(format!("{channel}:log"))
            .key(format!("{channel}:meta"))
            .arg(kind)
            .arg(seq)
            .arg(range.limit())
            .arg(READ_BYTES_MAX)
            .arg(format!("1-{}", random_epoch()))
            .arg(ttl.as_millis() as u64)
            .invoke_async(&mut connection)
            .await
            .map_err(|error| {
                let failed = refused_or_away(&error);
                if failed == BusError::Refused {
                    tracing::error!(%room, %error, "Redis refused a read");
                }
                failed
            })?;
        let mut page = page(answer).ok_or(BusError::Refused)?;
        if range.keeps_newest() {
            page.entries.reverse();
        }
        Ok(page)
    }
}

/// Reads `e` and `s` of a room's meta.
fn head((epoch, top): (Option<String>, Option<Seq>)) -> Option<Position> {
    Some(Position::new(epoch?.parse().ok()?, top?))
}

/// Reads what the script answers: epoch, top, oldest, entries.
fn page(answer: Value) -> Option<Page> {
    let Value::Array(parts) = answer else { return None };
    let [epoch, top, oldest, entries]: [Value; 4] = parts.try_into().ok()?;
    let Value::Array(entries) = entries else { return None };
    let page = Page {
        epoch: epoch_of(epoch)?,
        top: number(&top)?,
        oldest: number(&oldest)?,
        entries: entries.into_iter().filter_map(entry_or_step).collect(),
    };
    Some(page)
}

/// An entry that this version cannot read leaves a step, which readers are told of.
fn entry_or_step(value: Value) -> Option<Entry> {
    let entry = entry(value);
    if entry.is_none() {
        tracing::error!("a log has an entry that no gateway of this version wrote");
    }
    entry
}

fn entry(entry: Value) -> Option<Entry> {
    let Value::Array(parts) = entry else { return None };
    let [seq, epoch, envelope]: [Value; 3] = parts.try_into().ok()?;
    let Value::BulkString(envelope) = envelope else { return None };
    let position = Position::new(epoch_of(epoch)?, number(&seq)?);
    Some(Entry { position, envelope: Envelope::from_bytes(Bytes::from(envelope)).ok()? })
}

fn number(value: &Value) -> Option<Seq> {
    text(value)?.parse().ok()
}

fn epoch_of(value: Value) -> Option<Epoch> {
    text(&value)?.parse().ok()
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}
