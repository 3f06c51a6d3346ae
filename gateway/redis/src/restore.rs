//! Giving rooms back to a server that came back without some of what it had acknowledged.

use std::sync::Arc;

use redis::{RedisError, RedisResult, Value, aio::MultiplexedConnection};
use skein_protocol::ids::RoomId;

use super::{position_args, server::RedisServer, to_bus_error, untrusted};
use skein_core::{
    bus::{BusError, unconfirmed::UnconfirmedInRoom},
    delivery::{Entry, ReplicaSnapshot, ServerId},
    telemetry::metrics::{Metrics, RestoreResult},
};

/// The most rooms asked about, and the most bytes given back, in one pipeline.
const ROOMS_MAX: usize = 256;
const BYTES_MAX: usize = 1 << 20;

/// Heals rooms by `restore.lua`, and gives numbers back by `restore_unconfirmed.lua`.
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
        let unheard = server.keyspace.script(include_str!("scripts/restore_unconfirmed.lua"));
        Self { server, script, unconfirmed_script: unheard, metrics }
    }

    /// Gives back what `holdings` have of their rooms and the server lacks. Rooms that are whole, all
    /// of them after an ordinary restart, cost one question each.
    pub(super) async fn restore(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        holdings: Vec<ReplicaSnapshot>,
    ) -> RedisResult<()> {
        self.script.load_async(connection).await?;
        let mut lacking = Vec::new();
        for rooms in holdings.chunks(ROOMS_MAX) {
            let answers = self.compare(connection, server_id, rooms, false).await?;
            for (room, answer) in rooms.iter().zip(answers) {
                if answer == "ask" { lacking.push(room) } else { self.count(room, &answer) }
            }
        }
        let mut rooms: Vec<ReplicaSnapshot> = Vec::new();
        let mut bytes = 0;
        for room in lacking {
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
        let answers = self.compare(connection, server_id, rooms, true).await?;
        for (room, answer) in rooms.iter().zip(answers) {
            self.count(room, &answer);
        }
        Ok(())
    }

    async fn compare(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        rooms: &[ReplicaSnapshot],
        give: bool,
    ) -> Result<Vec<String>, RedisError> {
        let command =
            |held: &ReplicaSnapshot| (held.room.clone(), self.command(server_id, held, give));
        self.call_all(connection, rooms.iter().map(command).collect()).await
    }

    /// Gives back what this node has published and not heard since, by which numbers that were
    /// acknowledged are kept: `process` says whose it is.
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

    fn command(&self, server_id: ServerId, held: &ReplicaSnapshot, give: bool) -> redis::Cmd {
        let mut command = self.server.call(&self.script, &held.room, server_id);
        let (former, former_top) = position_args(held.former.as_ref());
        command
            .arg(held.top.epoch.as_str())
            .arg(held.top.seq)
            .arg(former)
            .arg(former_top)
            .arg(if give { "give" } else { "ask" });
        let newest = held.entries.last().filter(|last| last.position.seq == held.top.seq);
        add_identity(&mut command, newest);
        let oldest = held.entries.first();
        command.arg(held.generation).arg(oldest.map_or(0, |oldest| oldest.position.seq));
        add_identity(&mut command, oldest);
        if !give {
            command.arg(0);
            return command;
        }
        command.arg(held.entries.len());
        for entry in &held.entries {
            command
                .arg(entry.position.seq)
                .arg(entry.position.epoch.as_str())
                .arg(entry.origin.to_string())
                .arg(&entry.envelope.as_bytes()[..]);
        }
        for (id, at) in &held.ids {
            command.arg(&id[..]).arg(at.to_string());
        }
        command
    }

    fn count(&self, room: &ReplicaSnapshot, answer: &str) {
        let outcome = match answer {
            "whole" => RestoreResult::Unchanged,
            "healed" => RestoreResult::Restored,
            "conflict" => RestoreResult::Conflict,
            "refused" => RestoreResult::Failed,
            _ => RestoreResult::EpochChanged,
        };
        if outcome == RestoreResult::Conflict {
            tracing::error!(room = %room.room, top = %room.top,
                "two servers have taken entries for this room at the same time; it goes on in a new \
                 epoch");
        }
        self.metrics.log_restores.of(outcome).inc();
    }

    /// Calls scripts of rooms in one pipeline. Returns what each answered.
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
        let answers: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let answer = |(room, answer): (RoomId, RedisResult<Value>)| match answer {
            // It will be so with every try, and keeps the others from nothing.
            Err(error) if to_bus_error(&error) == BusError::Rejected => {
                tracing::error!(%room, %error, "Redis refused to be given a room back");
                Ok("refused".to_owned())
            }
            answer => untrusted::read(&self.metrics, &room, answer?),
        };
        rooms.into_iter().zip(answers).map(answer).collect()
    }
}

/// Adds the stamp and the id key of an entry, by which the script knows it again.
fn add_identity(command: &mut redis::Cmd, entry: Option<&Entry>) {
    match entry {
        Some(entry) => command.arg(entry.origin.to_string()).arg(&entry.envelope.dedup_key()[..]),
        None => command.arg("").arg(""),
    };
}
