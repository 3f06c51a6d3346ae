//! Reads of rooms' logs, over connections of their own: they are few, and a large one must not
//! delay publishes. Each waits until the nodes have agreed on the server.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use redis::{ErrorKind, RedisError, RedisResult, Value};
use skein_core::envelope::Envelope;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::{Epoch, Position, SEQ_MAX, Seq},
};

use super::{
    restore::LogRestorer,
    server::RedisServer,
    topology::ReadConnection,
    untrusted::{self, Lossy, or_default, read, strip_report},
};
use skein_core::{
    bus::{
        BoxFuture, BusError, EMPTY_HEAD_TTL, READ_BYTES_MAX, ReadRange, room_store::DeleteOutcome,
    },
    delivery::{Entry, ReplicaSnapshot, ServerId, ordinal, page::LogPage},
    telemetry::metrics::{InvalidValue, Metrics},
};

/// The most heads in one pipeline, so that a node with many rooms does not block Redis.
const HEADS_MAX: usize = 512;

#[derive(Clone)]
pub(super) struct RedisLog {
    server: Arc<RedisServer>,
    metrics: Arc<Metrics>,
    restorer: LogRestorer,
    read: redis::Script,
    delete: redis::Script,
}

impl RedisLog {
    pub(super) fn new(server: Arc<RedisServer>, metrics: Arc<Metrics>) -> Self {
        let restorer = LogRestorer::new(server.clone(), metrics.clone());
        let read = server.keyspace.script(include_str!("scripts/read.lua"));
        let delete = server.keyspace.script(include_str!("scripts/delete.lua"));
        Self { server, metrics, restorer, read, delete }
    }

    pub(super) fn read(
        &self,
        room: RoomId,
        range: ReadRange,
    ) -> BoxFuture<Result<LogPage, BusError>> {
        let log = self.clone();
        Box::pin(async move {
            let server_id = log.agreed(&room).await;
            log.find_floor(&room).await?;
            let mut page = log
                .server
                .query(async |connection| log.read_by(connection, &room, range, server_id).await)
                .await?;
            if range.keeps_newest() {
                page.entries.reverse();
            }
            Ok(page)
        })
    }

    /// Whether Redis has a log of the room, or at least its head.
    pub(super) fn has(&self, room: RoomId) -> BoxFuture<Result<bool, BusError>> {
        let log = self.clone();
        Box::pin(async move {
            log.agreed(&room).await;
            let meta = format!("{}:meta", log.server.keyspace.channel(&room));
            let has = async |connection: &mut ReadConnection| {
                let mut has = redis::cmd("HEXISTS");
                has.arg(&meta).arg("e").query_async(&mut **connection).await
            };
            let found = log.server.query(has).await?;
            if found {
                log.server.floors.exists(&room);
            }
            Ok(found)
        })
    }

    /// Finds out where the log of a room begins if Redis does not have it.
    async fn find_floor(&self, room: &RoomId) -> Result<(), BusError> {
        if !self.server.floors.is_known(room) && !self.has(room.clone()).await? {
            self.server.floors.ask(room).await;
        }
        Ok(())
    }

    pub(super) fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        let log = self.clone();
        Box::pin(async move {
            let server_id = log.agreed(&room).await;
            log.find_floor(&room).await?;
            log.server
                .query(async |connection| log.delete_by(connection, &room, server_id, None).await)
                .await?;
            Ok(())
        })
    }

    /// Deletes a whole room: its log, settings and presence.
    pub(super) fn delete_room(
        &self,
        room: RoomId,
        owner: Option<UserId>,
        by: Option<ConnectionId>,
    ) -> BoxFuture<Result<DeleteOutcome, BusError>> {
        let log = self.clone();
        Box::pin(async move {
            let server_id = log.agreed(&room).await;
            log.find_floor(&room).await?;
            let room_deletion = Some(RoomDeletion { owner, by });
            log.server
                .query(async |connection| {
                    log.delete_by(connection, &room, server_id, room_deletion).await
                })
                .await
        })
    }

    pub(super) fn restore(&self, replica: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>> {
        let log = self.clone();
        Box::pin(async move {
            let server_id = log.agreed(&replica.room).await;
            log.server
                .query(async |connection| {
                    log.restorer.restore(connection, server_id, vec![replica]).await
                })
                .await
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
                let mut server_id = ServerId::default();
                for room in rooms {
                    server_id = log.agreed(room).await;
                }
                let some = log
                    .server
                    .query(async |connection| log.heads_by(connection, rooms, server_id).await)
                    .await?;
                heads.extend(some);
            }
            Ok(heads)
        })
    }

    async fn agreed(&self, room: &RoomId) -> ServerId {
        self.server.agreed(self.server.keyspace.group_of(room)).await
    }

    async fn heads_by(
        &self,
        connection: &mut ReadConnection,
        rooms: &[RoomId],
        server_id: ServerId,
    ) -> Result<Vec<Option<Position>>, RedisError> {
        let keyspace = self.server.keyspace;
        let groups: BTreeSet<u16> = rooms.iter().map(|room| keyspace.group_of(room)).collect();
        let mut pipeline = redis::Pipeline::with_capacity(rooms.len() * 3 + groups.len());
        for group in &groups {
            pipeline.cmd("HMGET").arg(keyspace.barrier(*group)).arg("t").arg("open");
        }
        for room in rooms {
            let channel = keyspace.channel(room);
            pipeline.cmd("HMGET").arg(format!("{channel}:meta")).arg("e").arg("s").arg("d");
            pipeline.cmd("HMGET").arg(format!("{channel}:unheard")).arg("t");
        }
        pipeline.ignore_errors();
        let replies: Vec<RedisResult<Value>> = pipeline.query_async(&mut **connection).await?;
        // A room whose keys have other types has no head: a read detects and repairs that.
        let row = |reply: RedisResult<Value>| {
            let row: Vec<Option<Lossy>> = or_default(&self.metrics, "head of a log", reply)?;
            Ok(row.into_iter().map(|text| text.map(|Lossy(text)| text)).collect())
        };
        let rows: Vec<Vec<Option<String>>> =
            replies.into_iter().map(row).collect::<RedisResult<_>>()?;
        let server_id = Some(server_id.to_string());
        let (agreed, rows) = rows.split_at(groups.len());
        if agreed.iter().any(|row| row.first() != Some(&server_id) || row.get(1) == Some(&None)) {
            return Err(unagreed());
        }
        self.extend_head_ttls(connection, rooms, rows).await?;
        let head = |row: &[Vec<Option<String>>]| {
            let [head_row, unconfirmed] = row else { return None };
            // Unconfirmed publishes were handed in, and the process that would touch the room next
            // may have ended. A read puts them in their place.
            if unconfirmed.first() == Some(&server_id) {
                return None;
            }
            let [Some(epoch), Some(top), _] = head_row.as_slice() else { return None };
            Some(Position::new(epoch.parse().ok()?, seq_of(top)?))
        };
        Ok(rows.chunks(2).map(head).collect())
    }

    /// Extends the retention of idle rooms' heads, so that a subscribed room keeps its numbers, or
    /// the epoch of its empty log.
    async fn extend_head_ttls(
        &self,
        connection: &mut ReadConnection,
        rooms: &[RoomId],
        rows: &[Vec<Option<String>>],
    ) -> Result<(), RedisError> {
        let mut pipeline = redis::Pipeline::with_capacity(rooms.len());
        for (room, head_row) in rooms.iter().zip(rows.chunks(2)) {
            let meta = format!("{}:meta", self.server.keyspace.channel(room));
            let has_numbers = match head_row.first().map(Vec::as_slice) {
                Some([_, top, deleted]) => {
                    deleted.is_some() || top.as_deref().is_some_and(|top| top != "0")
                }
                _ => false,
            };
            let ttl = match has_numbers {
                true => self.server.meta_ttl_ms(room),
                false => (EMPTY_HEAD_TTL.as_millis() as u64).min(self.server.meta_ttl_ms(room)),
            };
            pipeline.cmd("PEXPIRE").arg(meta).arg(ttl).ignore();
        }
        pipeline.query_async(&mut **connection).await
    }

    async fn read_by(
        &self,
        connection: &mut ReadConnection,
        room: &RoomId,
        range: ReadRange,
        server_id: ServerId,
    ) -> Result<LogPage, RedisError> {
        let (kind, seq) = match range {
            ReadRange::Newest { .. } => ("newest", 0),
            ReadRange::After { seq, .. } => ("after", seq),
            ReadRange::Before { seq, .. } => ("before", seq),
        };
        let reply: Value = self
            .read
            .key(&self.server.keyspace.keys(room))
            .arg(self.server.common_args(room, server_id))
            .arg(kind)
            .arg(seq)
            .arg(range.limit())
            .arg(READ_BYTES_MAX)
            .invoke_async(&mut **connection)
            .await?;
        let reply = strip_report(&self.metrics, room, reply);
        page(reply, room, &self.metrics)
            .ok_or_else(|| (ErrorKind::Parse, "read.lua returned no page").into())
    }

    async fn delete_by(
        &self,
        connection: &mut ReadConnection,
        room: &RoomId,
        server_id: ServerId,
        room_deletion: Option<RoomDeletion>,
    ) -> Result<DeleteOutcome, RedisError> {
        let keyspace = self.server.keyspace;
        let mut delete = self.delete.key(&keyspace.keys(room));
        delete.arg(self.server.common_args(room, server_id));
        if let Some(RoomDeletion { owner, by }) = room_deletion {
            let channel = keyspace.channel(room);
            delete.key(format!("{channel}:who")).key(format!("{channel}:record"));
            delete.key(keyspace.rooms(keyspace.group_of(room))).key(format!("{channel}:marks"));
            delete.arg(room.as_str()).arg(owner.as_ref().map_or("", UserId::as_str));
            delete.arg(by.map(|by| by.to_string()).unwrap_or_default());
        }
        let reply: Value = delete.invoke_async(&mut **connection).await?;
        let reply: String = read(&self.metrics, room, reply)?;
        match reply.as_str() {
            "deleted" => Ok(DeleteOutcome::Deleted),
            "not_owner" => Ok(DeleteOutcome::NotOwner),
            "not_found" => Ok(DeleteOutcome::NotFound),
            _ => Err((ErrorKind::Parse, "delete.lua returned an unknown result").into()),
        }
    }
}

/// The deletion of a whole room with its settings, not only of its log.
struct RoomDeletion {
    /// The user who must own the room; `None` if any may.
    owner: Option<UserId>,
    /// The connection that deletes the room.
    by: Option<ConnectionId>,
}

/// The error of a script on a server that the nodes have not agreed on.
fn unagreed() -> RedisError {
    (ErrorKind::Io, "the nodes have not agreed on this server").into()
}

/// Parses the result of `read.lua`.
fn page(reply: Value, room: &RoomId, metrics: &Metrics) -> Option<LogPage> {
    let Value::Array(parts) = reply else { return None };
    let [epoch, top, oldest, former, former_top, deleted, generation, entries]: [Value; 8] =
        parts.try_into().ok()?;
    let Value::Array(entries) = entries else { return None };
    let former = match text(&former)? {
        "" => None,
        _ => Some(Position::new(epoch_of(&former)?, number(&former_top)?)),
    };
    let epoch = epoch_of(&epoch)?;
    let entries = entries.into_iter().filter_map(|value| {
        let entry = entry(value, room).filter(|entry| may_be_before(entry, &epoch));
        if entry.is_none() {
            // It leaves a gap, which is signalled to readers.
            untrusted::report(metrics, InvalidValue::Entry, room);
        }
        entry
    });
    let entries = entries.collect();
    let page = LogPage {
        epoch,
        former,
        deleted: number(&deleted)?,
        generation: number(&generation)?,
        top: number(&top)?,
        oldest: number(&oldest)?,
        entries,
    };
    Some(page)
}

/// Whether a log in `epoch` may contain the entry: it is of this epoch or an earlier one.
fn may_be_before(entry: &Entry, epoch: &Epoch) -> bool {
    entry.position.epoch == *epoch || ordinal(&entry.position.epoch) < ordinal(epoch)
}

fn entry(entry: Value, room: &RoomId) -> Option<Entry> {
    let Value::Array(parts) = entry else { return None };
    let [seq, epoch, origin, envelope]: [Value; 4] = parts.try_into().ok()?;
    let Value::BulkString(envelope) = envelope else { return None };
    Some(Entry {
        // The first entry of a log has the number 1.
        position: Position::new(epoch_of(&epoch)?, number(&seq).filter(|seq| *seq > 0)?),
        origin: text(&origin)?.parse().ok()?,
        envelope: Envelope::parse_for_room(Bytes::from(envelope), room).ok()?,
    })
}

fn number(value: &Value) -> Option<Seq> {
    seq_of(text(value)?)
}

fn seq_of(text: &str) -> Option<Seq> {
    text.parse().ok().filter(|seq| *seq <= SEQ_MAX)
}

fn epoch_of(value: &Value) -> Option<Epoch> {
    text(value)?.parse().ok()
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use skein_core::envelope::{AuthorHash, EnvelopeParts, FrameType};
    use skein_protocol::ids::{ConnectionId, MessageId};

    use super::*;

    #[test]
    fn entries_without_a_number_from_1_on_are_unreadable() {
        let id = MessageId::random();
        let fields = format!(
            r#""room":"r","id":"{id}","from":{{"id":"ann","name":"A"}},"content":1,"timestamp":"t""#
        );
        let envelope = Envelope::pack(EnvelopeParts {
            frame: FrameType::Message,
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id,
            sender: ConnectionId::random(),
            echo: true,
            fields: &fields,
            binary_payload: None,
        });
        let origin = ServerId::default().to_string();
        let seq_of_row = |seq: &str| {
            let parts = [seq.as_bytes(), b"1-a", origin.as_bytes(), envelope.as_bytes()];
            let row = parts.map(|part| Value::BulkString(part.to_vec()));
            entry(Value::Array(row.into()), &"r".parse().unwrap()).map(|of| of.position.seq)
        };
        assert_eq!(seq_of_row("1"), Some(1));
        for seq in ["0", "-1", "", "x", "9007199254740992"] {
            assert_eq!(seq_of_row(seq), None, "{seq}");
        }
    }
}
