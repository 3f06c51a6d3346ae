//! Giving rooms back to a server that came back without some of what it had acknowledged.

use std::sync::Arc;

use redis::{RedisError, RedisResult, aio::MultiplexedConnection};

use super::{as_arguments, refused_or_away, server::Server};
use crate::{
    bus::{BusError, random_epoch},
    delivery::{Followed, Token},
    telemetry::metrics::{Healed, Metrics},
};

/// The most rooms asked about, and the most bytes given back, in one pipeline.
const ROOMS_MAX: usize = 256;
const BYTES_MAX: usize = 1 << 20;

/// Heals rooms by `heal.lua`.
#[derive(Clone)]
pub(super) struct Healer {
    server: Arc<Server>,
    script: redis::Script,
    metrics: Arc<Metrics>,
}

impl Healer {
    pub(super) fn new(server: Arc<Server>, metrics: Arc<Metrics>) -> Self {
        Self { script: server.keyspace.script(include_str!("scripts/heal.lua")), server, metrics }
    }

    /// Gives back what `holdings` have of their rooms and the server lacks. Rooms that are whole, all
    /// of them after an ordinary restart, cost one question each.
    pub(super) async fn heal(
        &self,
        connection: &mut MultiplexedConnection,
        token: Token,
        holdings: Vec<Followed>,
    ) -> RedisResult<()> {
        self.script.load_async(connection).await?;
        let mut lacking = Vec::new();
        for rooms in holdings.chunks(ROOMS_MAX) {
            let answers = self.ask(connection, token, rooms, false).await?;
            for (room, answer) in rooms.iter().zip(answers) {
                if answer == "ask" { lacking.push(room) } else { self.count(room, &answer) }
            }
        }
        let mut rooms: Vec<Followed> = Vec::new();
        let mut bytes = 0;
        for room in lacking {
            bytes += room.entries.iter().map(|entry| entry.bytes()).sum::<usize>();
            rooms.push(room.clone());
            if bytes >= BYTES_MAX {
                self.give(connection, token, &std::mem::take(&mut rooms)).await?;
                bytes = 0;
            }
        }
        self.give(connection, token, &rooms).await
    }

    async fn give(
        &self,
        connection: &mut MultiplexedConnection,
        token: Token,
        rooms: &[Followed],
    ) -> RedisResult<()> {
        let answers = self.ask(connection, token, rooms, true).await?;
        for (room, answer) in rooms.iter().zip(answers) {
            self.count(room, &answer);
        }
        Ok(())
    }

    async fn ask(
        &self,
        connection: &mut MultiplexedConnection,
        token: Token,
        rooms: &[Followed],
        give: bool,
    ) -> Result<Vec<String>, RedisError> {
        if rooms.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = redis::Pipeline::with_capacity(rooms.len());
        for room in rooms {
            pipeline.add_command(self.command(token, room, give));
        }
        pipeline.ignore_errors();
        let answers: Vec<RedisResult<String>> = pipeline.query_async(connection).await?;
        let answer = |(room, answer): (&Followed, RedisResult<String>)| match answer {
            // It will be so with every try, and keeps the others from nothing.
            Err(error) if refused_or_away(&error) == BusError::Refused => {
                tracing::error!(room = %room.room, %error, "Redis refused to be given a room back");
                Ok("refused".to_owned())
            }
            answer => answer,
        };
        rooms.iter().zip(answers).map(answer).collect()
    }

    fn command(&self, token: Token, held: &Followed, give: bool) -> redis::Cmd {
        let retention = &self.server.retention;
        let channel = self.server.keyspace.channel(&held.room);
        let mut command = redis::cmd("EVALSHA");
        let (former, former_top) = as_arguments(held.former.as_ref());
        command
            .arg(self.script.get_hash())
            .arg(5)
            .arg(&self.server.keyspace.keys(&held.room))
            .arg(token.to_string())
            .arg(&channel)
            .arg(held.top.epoch.as_str())
            .arg(held.top.seq)
            .arg(former)
            .arg(former_top)
            .arg(random_epoch())
            .arg(retention.ttl.as_millis() as u64)
            .arg(self.server.meta_ttl_ms())
            .arg(retention.dedup_window.as_millis() as u64)
            .arg(if give { "give" } else { "ask" });
        match held.entries.last().filter(|last| last.position.seq == held.top.seq) {
            Some(top) => {
                command.arg(top.stamp.to_string()).arg(&top.envelope.id_key()[..]);
            }
            None => {
                command.arg("").arg("");
            }
        }
        command.arg(held.term);
        match held.entries.first() {
            Some(oldest) => {
                command
                    .arg(oldest.position.seq)
                    .arg(oldest.stamp.to_string())
                    .arg(&oldest.envelope.id_key()[..]);
            }
            None => {
                command.arg(0).arg("").arg("");
            }
        }
        if !give {
            command.arg(0);
            return command;
        }
        command.arg(held.entries.len());
        for entry in &held.entries {
            command
                .arg(entry.position.seq)
                .arg(entry.position.epoch.as_str())
                .arg(entry.stamp.to_string())
                .arg(&entry.envelope.as_bytes()[..]);
        }
        for (id, at) in &held.ids {
            command.arg(&id[..]).arg(at.to_string());
        }
        command
    }

    fn count(&self, room: &Followed, answer: &str) {
        let outcome = match answer {
            "whole" => Healed::Whole,
            "healed" => Healed::Healed,
            "conflict" => Healed::Conflict,
            "refused" => Healed::Refused,
            _ => Healed::Other,
        };
        if outcome == Healed::Conflict {
            tracing::error!(room = %room.room, top = %room.top,
                "two servers have taken entries for this room at the same time; it goes on in a new \
                 epoch");
        }
        self.metrics.healed.of(outcome).inc();
    }
}
