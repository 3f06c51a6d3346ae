//! One process of a simulated Redis, from its start to its end.
//!
//! It takes and returns bytes; the simulated network decides when they arrive.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};

use super::{
    commands::{ServerData, execute},
    resp::{Reply, take_command},
    script,
};

/// Bytes for a connection.
pub struct ServerOutput {
    pub connection: u64,
    pub bytes: Bytes,
    /// Whether it is a pub/sub message, which Redis sends unrequested.
    pub is_message: bool,
}

/// One run of a server.
pub struct SimRedis {
    pub data: ServerData,
    pub alive: bool,
    connections: BTreeMap<u64, BytesMut>,
    scripts: BTreeSet<String>,
}

impl SimRedis {
    /// Starts a server with `data`, possibly left by an earlier one.
    pub fn start(data: ServerData) -> Self {
        let data = ServerData { channels: BTreeMap::new(), published: Vec::new(), ..data };
        Self { data, alive: true, connections: BTreeMap::new(), scripts: BTreeSet::new() }
    }

    pub fn connect(&mut self, connection: u64) {
        self.connections.insert(connection, BytesMut::new());
    }

    /// Removes a connection and its subscriptions.
    pub fn disconnect(&mut self, connection: u64) {
        self.connections.remove(&connection);
        self.data.channels.retain(|_, subscribers| {
            subscribers.remove(&connection);
            !subscribers.is_empty()
        });
    }

    /// Handles bytes that arrived on a connection. Returns the output, in order.
    pub fn receive(&mut self, connection: u64, bytes: &[u8]) -> Vec<ServerOutput> {
        let mut out = Vec::new();
        match self.connections.get_mut(&connection) {
            Some(input) => input.extend_from_slice(bytes),
            None => return out,
        }
        while let Some(words) = self.connections.get_mut(&connection).and_then(take_command) {
            let replies = self.execute_command(connection, &words);
            self.data.store.end_step();
            for (channel, payload) in std::mem::take(&mut self.data.published) {
                let push = vec![
                    Reply::bulk("message"),
                    Reply::Bulk(channel.clone()),
                    Reply::Bulk(payload),
                ];
                let bytes = encoded(&[Reply::Push(push)]);
                for subscriber in self.data.channels.get(&channel).into_iter().flatten() {
                    out.push(ServerOutput {
                        connection: *subscriber,
                        bytes: bytes.clone(),
                        is_message: true,
                    });
                }
            }
            out.push(ServerOutput { connection, bytes: encoded(&replies), is_message: false });
        }
        out
    }

    fn execute_command(&mut self, connection: u64, words: &[Bytes]) -> Vec<Reply> {
        let args = &words[1..];
        let reply = match &words[0].to_ascii_uppercase()[..] {
            b"HELLO" => Reply::Map(vec![
                (Reply::bulk("server"), Reply::bulk("redis")),
                (Reply::bulk("version"), Reply::bulk("7.0.15")),
                (Reply::bulk("proto"), Reply::Int(3)),
                (Reply::bulk("id"), Reply::Int(connection as i64)),
                (Reply::bulk("mode"), Reply::bulk("standalone")),
                (Reply::bulk("role"), Reply::bulk("master")),
                (Reply::bulk("modules"), Reply::Array(vec![])),
            ]),
            b"CLIENT" | b"SELECT" => Reply::Status("OK"),
            b"CONFIG" => {
                Reply::Map(vec![(Reply::Bulk(args[1].clone()), Reply::bulk("noeviction"))])
            }
            b"SUBSCRIBE" | b"UNSUBSCRIBE" => return self.subscribe(connection, words),
            b"SCRIPT" => self.load(&args[1]),
            b"EVAL" => match self.load(&args[0]) {
                Reply::Bulk(name) => self.run_script(&name, &args[1..]),
                error => error,
            },
            b"EVALSHA" => self.run_script(&args[0], &args[1..]),
            _ => execute(&mut self.data, words).unwrap_or_else(|failure| Reply::Error(failure.0)),
        };
        vec![reply]
    }

    fn subscribe(&mut self, connection: u64, words: &[Bytes]) -> Vec<Reply> {
        let on = words[0].len() == 9;
        let mut replies = Vec::new();
        for channel in &words[1..] {
            let subscribers = self.data.channels.entry(channel.clone()).or_default();
            if on {
                subscribers.insert(connection)
            } else {
                subscribers.remove(&connection)
            };
            if subscribers.is_empty() {
                self.data.channels.remove(channel);
            }
            let count = self.data.channels.values().filter(|h| h.contains(&connection)).count();
            let kind = if on { "subscribe" } else { "unsubscribe" };
            let confirmation =
                vec![Reply::bulk(kind), Reply::Bulk(channel.clone()), Reply::Int(count as i64)];
            replies.push(Reply::Push(confirmation));
        }
        replies
    }

    fn load(&mut self, text: &[u8]) -> Reply {
        match script::load(text) {
            Ok(name) => {
                self.scripts.insert(name.clone());
                Reply::bulk(name)
            }
            Err(error) => Reply::Error(format!("ERR Error compiling script: {error}")),
        }
    }

    fn run_script(&mut self, name: &[u8], args: &[Bytes]) -> Reply {
        let name = String::from_utf8_lossy(name).to_lowercase();
        if !self.scripts.contains(&name) {
            return Reply::Error("NOSCRIPT No matching script. Please use EVAL.".to_owned());
        }
        let count = std::str::from_utf8(&args[0]).ok().and_then(|count| count.parse().ok());
        let Some(keys) = count.and_then(|count: usize| args.get(1..=count)) else {
            return Reply::Error(
                "ERR Number of keys can't be greater than number of args".to_owned(),
            );
        };
        script::run(&mut self.data, &name, keys, &args[1 + keys.len()..])
    }
}

fn encoded(replies: &[Reply]) -> Bytes {
    let mut bytes = Vec::new();
    replies.iter().for_each(|reply| reply.encode(&mut bytes));
    bytes.into()
}
