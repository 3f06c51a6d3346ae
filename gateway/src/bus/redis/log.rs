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
