//! Giving rooms back to a server that came back without some of what it had acknowledged.

use std::{collections::HashMap, sync::Arc};

use redis::{RedisError, RedisResult, aio::MultiplexedConnection};
use shared::ids::RoomId;

use super::{as_arguments, refused_or_away, server::Server};
use crate::{
    bus::{BusError, random_epoch},
    delivery::{Entry, Followed, Token},
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
        let newest = held.entries.last().filter(|last| last.position.seq == held.top.seq);
        identify(&mut command, newest);
        let oldest = held.entries.first();
        command.arg(held.term).arg(oldest.map_or(0, |oldest| oldest.position.seq));
        identify(&mut command, oldest);
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

/// Adds the stamp and the id key of an entry, by which the script knows it again.
fn identify(command: &mut redis::Cmd, entry: Option<&Entry>) {
    match entry {
        Some(entry) => command.arg(entry.stamp.to_string()).arg(&entry.envelope.id_key()[..]),
        None => command.arg("").arg(""),
    };
}

/// Adds what was appended and reached nobody, where it stands right behind what is held: given back
/// with it, it keeps its number, which others would take as soon as the server is open.
pub(super) fn add_unheard(holdings: &mut [Followed], unheard: Vec<(RoomId, Entry)>) {
    if unheard.is_empty() {
        return;
    }
    let mut rooms: HashMap<RoomId, &mut Followed> =
        holdings.iter_mut().map(|held| (held.room.clone(), held)).collect();
    for (room, entry) in unheard {
        let Some(held) = rooms.get_mut(&room) else { continue };
        let is_next = held.top.seq + 1 == entry.position.seq;
        if is_next && held.top.epoch == entry.position.epoch {
            held.top = entry.position.clone();
            held.entries.push(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::samples::{entry, position};

    #[test]
    fn what_reached_nobody_is_added_as_far_as_it_goes_on_without_a_step() {
        let room = |name: &str| name.parse::<RoomId>().unwrap();
        let held = |name, seq| Followed {
            room: room(name),
            top: position("1-e", seq),
            former: None,
            term: 1,
            entries: vec![entry("1-e", seq)],
            ids: vec![],
        };
        let mut holdings = [held("a", 7), held("b", 7), held("c", 7)];
        let unheard = [
            ("a", "1-e", 8),
            ("a", "1-e", 9),
            ("a", "1-e", 11),
            ("b", "2-f", 8),
            ("c", "1-e", 9),
            ("elsewhere", "1-e", 8),
        ];
        let unheard = unheard.map(|(name, epoch, seq)| (room(name), entry(epoch, seq)));
        add_unheard(&mut holdings, unheard.into());
        let tops = holdings.each_ref().map(|held| (held.top.seq, held.entries.len()));
        assert_eq!(tops, [(9, 3), (7, 1), (7, 1)]);
    }
}
