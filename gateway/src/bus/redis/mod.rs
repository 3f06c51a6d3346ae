//! The bus of a cluster: logs in Redis, entries passed on by its pub/sub.
//!
//! Three ways to Redis, each with connections of its own. `appender` sends publishes, pipelined
//! on one connection. `subscriber` hears what is published in the rooms followed. Reads go
//! through a pool (`log`). The first two reconnect by loops of ours, for ever: a library that
//! reconnects below us would hide that something was missed.
//!
//! Keys carry a partition as hash tag, so that all of a room is in one slot of Redis Cluster:
//! `gw:{p}:r:<room>:log`, `:meta`, `:ids0`, `:ids1`, and the channel `gw:{p}:r:<room>`.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, ConnectionInfo, ErrorKind, IntoConnectionInfo as _, ProtocolVersion,
    RedisError, aio::MultiplexedConnection, io::tcp::TcpSettings,
};
use shared::{ids::RoomId, position::Position};
use tokio::sync::watch;

use super::{Append, BoxFuture, Bus, BusError, HEAD_TTL, Mailboxes, Range, Retention};
use crate::{
    delivery::{Followed, Token, page::Page},
    drain::Tasks,
    telemetry::metrics::Metrics,
};

mod agreement;
mod appender;
mod heal;
mod links;
mod log;
mod probe;
mod status;
mod subscriber;
pub mod topology;

use links::Links;
use topology::{Dial, Single};

/// How long Redis may take to answer before the link counts as dead. A publish whose answer is
/// late is repeated with its id, so that a false alarm costs a reconnect and nothing else.
const RESPONSE_MAX: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// The longest pause between two attempts to connect: a cluster is whole again within a second
/// of Redis' return.
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(250);

/// How to reach Redis and how rooms lie in it.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// `redis://[user:password@]host[:port][/db]`
    pub url: String,
    /// Over how many partitions rooms are spread; the same on all nodes, for good.
    pub partitions: u16,
    /// How long logs are kept.
    pub retention: Retention,
    /// The id of this node.
    pub node: String,
}

/// Why the bus cannot be started with these options.
#[derive(Debug, thiserror::Error)]
pub enum RedisStartError {
    /// The URL does not read.
    #[error("cluster.redis_url is no Redis URL: {0}")]
    Url(RedisError),
    /// Other nodes use another number of partitions.
    #[error(
        "cluster.partitions is {configured} here, but the cluster on this Redis uses {recorded}: \
         rooms would lie in other places for this node than for the others"
    )]
    Partitions {
        /// What this node was told.
        configured: u16,
        /// What the first node recorded.
        recorded: u16,
    },
}

/// Logs in Redis.
pub struct RedisBus {
    server: Arc<Server>,
    appender: appender::Appender,
    subscriber: subscriber::Subscriber,
    log: log::Log,
    links: Arc<Links>,
}

/// What all parts need to know.
struct Server {
    dial: Arc<dyn Dial>,
    keyspace: Keyspace,
    retention: Retention,
    /// The server that the nodes have agreed on, while they have.
    agreed: watch::Sender<Option<Token>>,
}

impl RedisBus {
    /// Starts to connect, and keeps connected.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Url`].
    pub fn start(
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Result<Self, RedisStartError> {
        let info = connection_info(&options.url).map_err(RedisStartError::Url)?;
        let dial = Arc::new(Single::new(info).map_err(RedisStartError::Url)?);
        Ok(Self::start_with(dial, options, mailboxes, metrics, tasks))
    }

    /// As [`RedisBus::start`], with connections made by `dial`.
    pub fn start_with(
        dial: Arc<dyn Dial>,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        let server = Arc::new(Server {
            dial,
            keyspace: Keyspace { partitions: options.partitions },
            retention: options.retention,
            agreed: watch::Sender::default(),
        });
        let standing = mailboxes.standing().clone();
        standing.suspend();
        standing.settle(false);
        let links = Arc::new(Links::new(standing, metrics));
        let log = log::Log::new(server.clone(), links.metrics.clone());
        let appender = appender::start(server.clone(), links.clone(), tasks);
        let subscriber = subscriber::start(server.clone(), links.clone(), mailboxes.clone(), tasks);
        let node = &options.node;
        agreement::start(server.clone(), links.clone(), mailboxes.clone(), node, tasks);
        status::start(server.clone(), links.clone(), mailboxes, tasks);
        Self { server, appender, subscriber, log, links }
    }

    /// Waits until Redis has been reached and this node's view of it is the other nodes'.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Partitions`].
    pub async fn reached(&self) -> Result<(), RedisStartError> {
        self.server.agree_on_partitions().await?;
        let mut pause = RetryPause::default();
        while !self.links.are_up(&self.server) {
            pause.wait().await;
        }
        Ok(())
    }
}

impl Bus for RedisBus {
    fn append(&self, append: Append) {
        self.appender.append(append);
    }

    fn follow(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.subscriber.follow(room)
    }

    fn unfollow(&self, room: RoomId) {
        self.subscriber.unfollow(room);
    }

    fn read(&self, room: RoomId, range: Range) -> BoxFuture<Result<Page, BusError>> {
        self.log.read(room, range)
    }

    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        self.log.heads(rooms)
    }

    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.log.delete(room)
    }

    fn heal(&self, held: Followed) -> BoxFuture<Result<(), BusError>> {
        self.log.heal(held)
    }

    fn failing(&self) -> Option<&'static str> {
        if !self.links.are_up(&self.server) {
            Some("bus")
        } else if self.links.evicts.load(Ordering::Relaxed) {
            Some("maxmemory_policy")
        } else {
            None
        }
    }
}

impl Server {
    /// The server agreed on, once it is.
    async fn agreed(&self) -> Token {
        let mut agreed = self.agreed.subscribe();
        let token = agreed.wait_for(Option::is_some).await;
        token.ok().and_then(|token| *token).unwrap_or_default()
    }

    /// How long epoch and number of a room are kept.
    fn meta_ttl_ms(&self) -> u64 {
        HEAD_TTL.max(self.retention.ttl).as_millis() as u64
    }

    /// Records the number of partitions, or compares it with the one recorded.
    async fn agree_on_partitions(&self) -> Result<(), RedisStartError> {
        let configured = self.keyspace.partitions;
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            match self.recorded_partitions().await {
                Ok(recorded) if recorded == configured => return Ok(()),
                Ok(recorded) => return Err(RedisStartError::Partitions { configured, recorded }),
                Err(error) if pause.is_worth_a_line() => {
                    tracing::warn!(%error, "waiting for Redis");
                }
                Err(_) => {}
            }
        }
    }

    async fn recorded_partitions(&self) -> Result<u16, RedisError> {
        let (mut connection, _) = self.connect(config()).await?;
        let (recorded,) = redis::pipe()
            .cmd("SET")
            .arg("gw:partitions")
            .arg(self.keyspace.partitions)
            .arg("NX")
            .ignore()
            .cmd("GET")
            .arg("gw:partitions")
            .query_async::<(u16,)>(&mut connection)
            .await?;
        Ok(recorded)
    }

    /// One connection, which does not reconnect by itself, and the server it leads to.
    async fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> Result<(MultiplexedConnection, Token), RedisError> {
        let mut connection = self.dial.connect(config).await?;
        let (run, replication): (String, String) = redis::pipe()
            .cmd("INFO")
            .arg("server")
            .cmd("INFO")
            .arg("replication")
            .query_async(&mut connection)
            .await?;
        if !replication.contains("role:master") {
            return Err((ErrorKind::Io, "the server is a replica").into());
        }
        let part = |info: &str, name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|id| id.get(..8)).map(str::to_owned)
        };
        let token = part(&run, "run_id").zip(part(&replication, "master_replid"));
        let token = token.and_then(|(run, history)| format!("{run}{history}").parse().ok());
        match token {
            Some(token) => Ok((connection, token)),
            None => Err((ErrorKind::Parse, "INFO tells no run_id and master_replid").into()),
        }
    }

    /// Whether the nodes have agreed on this server.
    fn has_agreed_on(&self, token: Token) -> bool {
        *self.agreed.borrow() == Some(token)
    }

    /// Takes the agreement back, if it is on `token`.
    fn doubt_agreement_on(&self, token: Token) {
        self.agreed.send_if_modified(|agreed| agreed.take_if(|agreed| *agreed == token).is_some());
    }
}

/// A script behind what all of them share.
fn script(text: &str) -> redis::Script {
    redis::Script::new(&format!("{}\n{text}", include_str!("scripts/prelude.lua")))
}

/// Whether a script found itself on a server that the nodes have not agreed on.
fn is_stale(error: &RedisError) -> bool {
    error.code() == Some("STALE")
}

/// Whether an error will come again with every try, or is of a time: Redis is away, out of memory,
/// has too few replicas, or a disk that is full.
fn refused_or_away(error: &RedisError) -> BusError {
    match error.code() {
        Some("ERR" | "WRONGTYPE" | "NOPERM") => BusError::Refused,
        _ => BusError::Unavailable,
    }
}

fn config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_MAX))
        .set_response_timeout(Some(RESPONSE_MAX))
}

/// RESP3, so that pushes and answers share a connection; no delay, since small packets matter.
fn connection_info(url: &str) -> Result<ConnectionInfo, RedisError> {
    let info = url.into_connection_info()?;
    let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = TcpSettings::default().set_nodelay(true);
    Ok(info.set_redis_settings(redis).set_tcp_settings(tcp))
}

/// How long to wait before the next attempt: at once, then longer, up to [`RETRY_PAUSE_MAX`].
#[derive(Default)]
struct RetryPause {
    attempts: u32,
}

impl RetryPause {
    fn next(&mut self) -> Duration {
        let pause = Duration::from_millis(25) * self.attempts;
        self.attempts += 1;
        pause.min(RETRY_PAUSE_MAX)
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// Whether a failed attempt is to be told of: the first, and one in some ten seconds. A link
    /// that was lost has been told of before.
    fn is_worth_a_line(&self) -> bool {
        self.attempts % 40 == 1
    }
}

/// Where a room lies.
#[derive(Clone, Copy, Debug)]
struct Keyspace {
    partitions: u16,
}

impl Keyspace {
    /// Where the nodes agree on a server.
    fn barrier(self) -> &'static str {
        "gw:barrier"
    }

    fn channel(self, room: &RoomId) -> String {
        let partition = crc16(room.as_str().as_bytes()) % self.partitions;
        format!("gw:{{{partition}}}:r:{room}")
    }

    /// The room of a channel, without a check: only gateways publish there.
    fn room(channel: &str) -> Option<RoomId> {
        channel.split_once(":r:")?.1.parse().ok()
    }
}

/// The CRC that Redis Cluster hashes keys with: CRC-16/XMODEM (Redis Cluster specification,
/// appendix A).
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
            if crc & 0x8000 != 0 { crc << 1 ^ 0x1021 } else { crc << 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crc_is_the_one_of_redis_cluster() {
        // The check value of CRC-16/XMODEM, also given in the Redis Cluster specification.
        assert_eq!(crc16(b"123456789"), 0x31C3);
    }

    #[test]
    fn a_channel_names_its_room() {
        let keyspace = Keyspace { partitions: 256 };
        for name in ["lobby", "a:r:b", "u:bob", ":r:"] {
            let room: RoomId = name.parse().unwrap();
            let channel = keyspace.channel(&room);
            assert_eq!(Keyspace::room(&channel), Some(room), "{channel}");
        }
    }

    #[test]
    fn pauses_between_attempts_start_at_nothing_and_have_a_cap() {
        let mut pause = RetryPause::default();
        assert_eq!(pause.next(), Duration::ZERO);
        let pauses: Vec<_> = (0..100).map(|_| pause.next()).collect();
        assert!(pauses.is_sorted() && pauses[99] == RETRY_PAUSE_MAX);
    }
}
