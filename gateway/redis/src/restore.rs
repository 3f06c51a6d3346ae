//! Log restore: appends entries to a server that came back without some of those it had
//! acknowledged.

use std::sync::Arc;

use redis::{RedisError, RedisResult, Value, aio::MultiplexedConnection};
use skein_protocol::ids::RoomId;

use super::{
    error::to_bus_error,
    server::{RedisServer, position_args},
    untrusted,
};
use skein_core::{
    bus::{BusError, unconfirmed::UnconfirmedInRoom},
    delivery::{Entry, ReplicaSnapshot, ServerId},
    telemetry::metrics::{Metrics, RestoreResult},
};

/// The most rooms that are compared, and the most bytes that are sent, in one pipeline.
const ROOMS_MAX: usize = 256;
const BYTES_MAX: usize = 1 << 20;

/// Restores logs by `restore.lua`, and hands in unconfirmed publishes by `restore_unconfirmed.lua`.
#[derive(Clone)]
pub(super) struct LogRestorer {
    server: Arc<RedisServer>,
    script: redis::Script,
    unconfirmed_script: redis::Script,
    metrics: Arc<Metrics>,
}

impl LogRestorer {
    pub(super) fn new(server: Arc<RedisServer>, metrics: Arc<Metrics>) -> Self {
        let script = server.keyspace.script(include_str!("scripts/restore.lua"));
        let unconfirmed = server.keyspace.script(include_str!("scripts/restore_unconfirmed.lua"));
        Self { server, script, unconfirmed_script: unconfirmed, metrics }
    }

    /// Appends the entries of `replicas` that the server lacks. A complete log, as every log is
    /// after an ordinary restart, costs a single comparison.
    pub(super) async fn restore(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        replicas: Vec<ReplicaSnapshot>,
    ) -> RedisResult<()> {
        self.script.load_async(connection).await?;
        let mut incomplete = Vec::new();
        for rooms in replicas.chunks(ROOMS_MAX) {
            let replies = self.compare(connection, server_id, rooms, false).await?;
            for (room, reply) in rooms.iter().zip(replies) {
                if reply == "incomplete" { incomplete.push(room) } else { self.count(room, &reply) }
            }
        }
        let mut rooms: Vec<ReplicaSnapshot> = Vec::new();
        let mut bytes = 0;
        for room in incomplete {
            bytes += room.entries.iter().map(|entry| entry.bytes()).sum::<usize>();
            rooms.push(room.clone());
            if bytes >= BYTES_MAX {
                self.send_entries(connection, server_id, &std::mem::take(&mut rooms)).await?;
                bytes = 0;
            }
        }
        self.send_entries(connection, server_id, &rooms).await
    }

    async fn send_entries(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        rooms: &[ReplicaSnapshot],
    ) -> RedisResult<()> {
        let replies = self.compare(connection, server_id, rooms, true).await?;
        for (room, reply) in rooms.iter().zip(replies) {
            self.count(room, &reply);
        }
        Ok(())
    }

    async fn compare(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        rooms: &[ReplicaSnapshot],
        send_all: bool,
    ) -> Result<Vec<String>, RedisError> {
        let command = |replica: &ReplicaSnapshot| {
            (replica.room.clone(), self.command(server_id, replica, send_all))
        };
        self.call_all(connection, rooms.iter().map(command).collect()).await
    }

    /// Hands in the unconfirmed publishes of `process`, so that acknowledged messages keep their
    /// numbers.
    pub(super) async fn restore_unconfirmed(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        process: &str,
        rooms: Vec<UnconfirmedInRoom>,
    ) -> RedisResult<()> {
        self.unconfirmed_script.load_async(connection).await?;
        let mut calls = Vec::new();
        let mut bytes = 0;
        for UnconfirmedInRoom { room, acknowledged, unanswered } in rooms {
            let last = acknowledged.last().map(|entry| entry.position.to_string());
            let mut command = self.server.call(&self.unconfirmed_script, &room, server_id);
            command.arg(process).arg(last.unwrap_or_default()).arg(acknowledged.len());
            for entry in &acknowledged {
                command
                    .arg(entry.position.to_string())
                    .arg(entry.origin.to_string())
                    .arg(&entry.envelope.as_bytes()[..]);
            }
            for (number, envelope) in &unanswered {
                command.arg(number).arg(&envelope.as_bytes()[..]);
            }
            bytes += command.get_packed_command().len();
            calls.push((room, command));
            if bytes >= BYTES_MAX {
                self.call_all(connection, std::mem::take(&mut calls)).await?;
                bytes = 0;
            }
        }
        self.call_all(connection, calls).await.map(drop)
    }

    fn command(
        &self,
        server_id: ServerId,
        replica: &ReplicaSnapshot,
        send_all: bool,
    ) -> redis::Cmd {
        let mut command = self.server.call(&self.script, &replica.room, server_id);
        let (former, former_top) = position_args(replica.former.as_ref());
        command
            .arg(replica.top.epoch.as_str())
            .arg(replica.top.seq)
            .arg(former)
            .arg(former_top)
            .arg(if send_all { "restore" } else { "compare" });
        let newest = replica.entries.last().filter(|last| last.position.seq == replica.top.seq);
        add_identity(&mut command, newest);
        let oldest = replica.entries.first();
        command.arg(replica.generation).arg(oldest.map_or(0, |oldest| oldest.position.seq));
        add_identity(&mut command, oldest);
        if !send_all {
            command.arg(0);
            return command;
        }
        command.arg(replica.entries.len());
        for entry in &replica.entries {
            command
                .arg(entry.position.seq)
                .arg(entry.position.epoch.as_str())
                .arg(entry.origin.to_string())
                .arg(&entry.envelope.as_bytes()[..]);
        }
        for (id, at) in &replica.ids {
            command.arg(&id[..]).arg(at.to_string());
        }
        command
    }

    fn count(&self, room: &ReplicaSnapshot, reply: &str) {
        let result = match reply {
            "complete" => RestoreResult::Unchanged,
            "restored" => RestoreResult::Restored,
            "conflict" => RestoreResult::Conflict,
            "rejected" => RestoreResult::Failed,
            _ => RestoreResult::EpochChanged,
        };
        if result == RestoreResult::Conflict {
            tracing::error!(room = %room.room, top = %room.top,
                "two servers have numbered entries of this room at the same time; it continues in a \
                 new epoch");
        }
        self.metrics.log_restores.of(result).inc();
    }

    /// Calls scripts of rooms in one pipeline. Returns their results.
    async fn call_all(
        &self,
        connection: &mut MultiplexedConnection,
        calls: Vec<(RoomId, redis::Cmd)>,
    ) -> RedisResult<Vec<String>> {
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = redis::Pipeline::with_capacity(calls.len());
        pipeline.ignore_errors();
        let (rooms, commands): (Vec<RoomId>, Vec<redis::Cmd>) = calls.into_iter().unzip();
        for command in commands {
            pipeline.add_command(command);
        }
        let replies: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let reply = |(room, reply): (RoomId, RedisResult<Value>)| match reply {
            // It would fail with every attempt, and the other rooms do not depend on it.
            Err(error) if to_bus_error(&error) == BusError::Rejected => {
                tracing::error!(%room, %error, "Redis rejected the restore of a room");
                Ok("rejected".to_owned())
            }
            reply => untrusted::read(&self.metrics, &room, reply?),
        };
        rooms.into_iter().zip(replies).map(reply).collect()
    }
}

/// Adds the origin and the dedup key that identify an entry.
fn add_identity(command: &mut redis::Cmd, entry: Option<&Entry>) {
    match entry {
        Some(entry) => command.arg(entry.origin.to_string()).arg(&entry.envelope.dedup_key()[..]),
        None => command.arg("").arg(""),
    };
}
