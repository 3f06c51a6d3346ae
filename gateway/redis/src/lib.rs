//! The bus of a cluster: logs in Redis, entries passed on by its pub/sub.
//!
//! Three ways to a server, each with connections of its own. `appender` sends publishes, pipelined
//! on one connection. `subscriber` hears what is published in the rooms followed. Reads go
//! through a pool (`log`). The first two reconnect by loops of ours, for ever: a library that
//! reconnects below us would hide that something was missed. `agreement` is what the nodes do before
//! a server is used.
//!
//! In a Redis Cluster there is such a set of connections per primary, and `router` knows which room
//! is whose.

use std::{sync::Arc, time::Duration};

use redis::{AsyncConnectionConfig, RedisError};
use serde_json::{Map, Value};
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{Epoch, Position, Seq},
};

use skein_core::bus::{
    Append, AppendCallback, BoxFuture, Bus, BusError, Mailboxes, ReadRange, Retention,
    commands::{CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue},
    registry::{
        AdmitError, CreateOutcome, DeleteOutcome, EphemeralEvent, JoinConditions, JoinSnapshot,
        NodePresence, OnlinePage, OnlineStatus, PresenceDetails, PresenceSnapshot, PresenceStore,
        RoomConfig, RoomPage, RoomStoreOptions, RoomSummary,
    },
    sessions::{
        ConnectionInfo, OpenedSession, SecretDigest, SessionDataError, SessionHolder,
        SessionOptions, SessionRequest, SessionSelector, SessionStore, StoredSession,
    },
};
use skein_core::{
    delivery::{ReplicaSnapshot, page::LogPage},
    drain::Tasks,
    telemetry::metrics::Metrics,
};

mod agreement;
mod appender;
mod requirements;
mod restore;
mod keyspace;
mod lease;
mod links;
mod log;
mod memory;
mod ephemeral;
mod commands;
mod probe;
mod store;
mod router;
mod server;
mod sessions;
mod status;
mod subscriber;
pub mod topology;
mod untrusted;
mod append_queue;

use commands::RedisControlQueue;
use log::RedisLog;
use requirements::Requirements;
use router::Router;
use store::StoreWorker;
use topology::{Dial, TlsFiles, Topology, TopologyError};

/// How long Redis may take to answer before the link counts as dead. A publish whose answer is
/// late is repeated with its id, so that a false alarm costs a reconnect and nothing else.
const RESPONSE_MAX: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// The longest pause between two attempts to connect: a cluster is whole again within a second
/// of Redis' return.
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(250);
/// The same where Redis forbids something or is too old.
const PERSISTENT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long a lease lasts unless options say otherwise.
pub const LEASE: Duration = Duration::from_secs(10);

/// How to reach Redis and how rooms lie in it.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// How to reach the servers, as [`topology::url`] says.
    pub url: String,
    /// For servers that are reached through TLS.
    pub tls: TlsFiles,
    /// Over how many partitions rooms are spread; the same on all nodes, for good.
    pub partitions: u16,
    /// How long the other nodes count on this one after it renewed its lease; the same on all nodes.
    pub lease: Duration,
    /// How long logs are kept.
    pub retention: Retention,
    /// How long what is known of rooms is kept.
    pub registry: RoomStoreOptions,
    /// How long sessions are kept.
    pub sessions: SessionOptions,
    /// The id of this node.
    pub node: String,
}

/// Why the bus cannot be started with these options.
#[derive(Debug, thiserror::Error)]
pub enum RedisStartError {
    /// No connections can be made as configured.
    #[error(transparent)]
    Open(#[from] TopologyError),
    /// The server is older than what is needed.
    #[error("Redis is {found} at cluster.redis_url, and gateways need 7.0 or newer (or Valkey)")]
    Version {
        /// What it says it is.
        found: String,
    },
    /// Another gateway has the id of this node.
    #[error(
        "node.id is {node}, and another gateway that lives has the same id on this Redis (its process is \
         {other}, this one {own}): counts, orders and drains would be mixed up; give one of them another \
         id, or stop it"
    )]
    NodeId {
        /// The id.
        node: String,
        /// The process that has it.
        other: String,
        /// This process.
        own: String,
    },
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

/// Logs and registry in Redis.
pub struct RedisBus {
    router: Arc<Router>,
    store: Arc<StoreWorker>,
    commands: Arc<RedisControlQueue>,
}

impl RedisBus {
    /// Starts to connect, and keeps connected.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Open`].
    pub fn start(
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Result<Self, RedisStartError> {
        let way = topology::open(&options.url, &options.tls)?;
        Ok(Self::start_on(way, options, mailboxes, metrics, tasks))
    }

    /// As [`RedisBus::start`], with connections to one server made by `dial`.
    pub fn start_with(
        dial: Arc<dyn Dial>,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        Self::start_on(Topology::Single(dial), options, mailboxes, metrics, tasks)
    }

    fn start_on(
        way: Topology,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        let (registry, sessions) = (options.registry.clone(), options.sessions.clone());
        let router = Router::start(way, options, mailboxes, metrics, tasks);
        let registrar = StoreWorker::start(router.clone(), registry, sessions, tasks);
        let book = Arc::new(RedisControlQueue::new(registrar.clone()));
        Self { router, store: registrar, commands: book }
    }

    /// Waits until Redis has been reached and this node's view of it is the other nodes'.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Partitions`], [`RedisStartError::Version`], [`RedisStartError::NodeId`].
    pub async fn reached(&self) -> Result<(), RedisStartError> {
        let configured = self.router.keyspace().partitions;
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            // What there is once in all lies in group 0, which may move meanwhile.
            let set = self.router.connections_for(0).await;
            match set.server.recorded_partition_count().await {
                Ok(recorded) if recorded == configured => break,
                Ok(recorded) => return Err(RedisStartError::Partitions { configured, recorded }),
                Err(error) => {
                    if let Some(found) = too_old(&set.server.requirements, &error) {
                        return Err(RedisStartError::Version { found });
                    }
                    pause.failed(&error);
                    if pause.should_log() {
                        tracing::warn!(%error, "waiting for Redis");
                    }
                }
            }
        }
        let up = async {
            let mut pause = RetryPause::default();
            while !self.router.is_up() {
                pause.wait().await;
            }
        };
        let process = self.router.process();
        tokio::select! {
            biased;
            other = process.duplicate() => {
                let own = process.name.clone();
                let node = own.split('/').next().unwrap_or_default().to_owned();
                Err(RedisStartError::NodeId { node, other, own })
            }
            () = up => Ok(()),
        }
    }
}

impl Bus for RedisBus {
    fn append(&self, append: Append) {
        self.router.append(append);
    }

    fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.router.clone().subscribe(room))
    }

    fn unsubscribe(&self, room: RoomId) {
        self.router.unsubscribe(room);
    }

    fn read(&self, room: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>> {
        let group = self.router.keyspace().group_of(&room);
        let question = move |log: &RedisLog| log.read(room.clone(), range);
        Box::pin(self.router.clone().query(group, question))
    }

    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        Box::pin(self.router.clone().heads(rooms))
    }

    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        let group = self.router.keyspace().group_of(&room);
        Box::pin(self.router.clone().query(group, move |log| log.delete(room.clone())))
    }

    fn restore(&self, held: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>> {
        let group = self.router.keyspace().group_of(&held.room);
        Box::pin(self.router.clone().query(group, move |log| log.restore(held.clone())))
    }

    fn failed_check(&self) -> Option<&'static str> {
        // What an operator has to do something about goes before what passes by itself.
        let unmet = self.router.unmet_requirement();
        unmet.or(if !self.router.is_up() {
            Some("bus")
        } else if self.router.evicts_keys() {
            Some("maxmemory_policy")
        } else {
            None
        })
    }
}

impl PresenceStore for RedisBus {
    fn track(&self, seat: NodePresence) {
        self.store.track(seat);
    }

    fn admit(
        &self,
        seat: NodePresence,
        rules: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        self.store.admit(seat, rules)
    }

    fn snapshots(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<PresenceSnapshot>, BusError>> {
        Box::pin(self.store.clone().snapshots(rooms))
    }

    fn details(
        &self,
        room: RoomId,
        users: Vec<UserId>,
    ) -> BoxFuture<Result<PresenceDetails, BusError>> {
        Box::pin(self.store.clone().details(room, users))
    }

    fn online(
        &self,
        after: String,
        limit: usize,
    ) -> BoxFuture<Result<Option<OnlinePage>, BusError>> {
        let online = self.store.clone().online(after, limit);
        Box::pin(async move { online.await.map(Some) })
    }

    fn statuses(&self, users: Vec<UserId>) -> BoxFuture<Result<Vec<OnlineStatus>, BusError>> {
        Box::pin(self.store.clone().statuses(users))
    }

    fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId) {
        self.store.set_read_mark(room, user, seq, by);
    }

    fn publish_ephemeral(&self, room: RoomId, notice: EphemeralEvent, done: AppendCallback) {
        self.store.publish_ephemeral(room, &notice, done);
    }

    fn create(
        &self,
        room: RoomId,
        record: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>> {
        Box::pin(self.store.clone().create(room, record, owned_max))
    }

    fn find(&self, room: RoomId) -> BoxFuture<Result<Option<RoomSummary>, BusError>> {
        Box::pin(self.store.clone().find(room))
    }

    fn list(
        &self,
        prefix: String,
        after: String,
        limit: usize,
        all: bool,
    ) -> BoxFuture<Result<RoomPage, BusError>> {
        Box::pin(self.store.clone().list(prefix, after, limit, all))
    }

    fn delete_room(
        &self,
        room: RoomId,
        owner: Option<UserId>,
        by: Option<ConnectionId>,
    ) -> BoxFuture<Result<DeleteOutcome, BusError>> {
        let group = self.router.keyspace().group_of(&room);
        let question = move |log: &RedisLog| log.delete_room(room.clone(), owner.clone(), by);
        Box::pin(self.router.clone().query(group, question))
    }
}

impl ControlQueue for RedisBus {
    fn enqueue(&self, order: ControlCommand) -> BoxFuture<Result<CommandId, BusError>> {
        Box::pin(self.commands.clone().enqueue(order))
    }

    fn poll(&self) -> BoxFuture<CommandBatch> {
        Box::pin(self.commands.clone().poll())
    }

    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.commands.clone().mark_applied(id))
    }

    fn reply(&self, id: CommandId, answer: String) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.commands.clone().reply(id, answer))
    }

    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>> {
        Box::pin(self.commands.clone().progress(id))
    }

    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>> {
        Box::pin(self.commands.clone().replies(id))
    }
}

impl SessionStore for RedisBus {
    fn open(&self, opening: SessionRequest) -> BoxFuture<Result<OpenedSession, BusError>> {
        Box::pin(self.store.clone().open_session(opening))
    }

    fn ttl(&self) -> Duration {
        self.store.session_ttl()
    }

    fn find(
        &self,
        user: UserId,
        session: SessionId,
        digest: SecretDigest,
    ) -> BoxFuture<Result<Option<Arc<ConnectionInfo>>, BusError>> {
        Box::pin(self.store.clone().find_session(user, session, digest))
    }

    fn holder(
        &self,
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
    ) -> BoxFuture<Result<SessionHolder, BusError>> {
        Box::pin(self.store.use_session(user, session, connection))
    }

    fn close(&self, user: UserId, session: SessionId, connection: ConnectionId) {
        self.store.close_session(user, session, connection);
    }

    fn data(
        &self,
        user: UserId,
        session: SessionId,
        change: Option<Map<String, Value>>,
    ) -> BoxFuture<Result<Map<String, Value>, SessionDataError>> {
        Box::pin(self.store.clone().data(user, session, change))
    }

    fn list(&self, user: UserId) -> BoxFuture<Result<Vec<StoredSession>, BusError>> {
        Box::pin(self.store.clone().sessions(user))
    }

    fn revoke(&self, user: UserId, which: SessionSelector) -> BoxFuture<Result<usize, BusError>> {
        Box::pin(self.store.clone().revoke(user, which))
    }

    fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq) {
        self.store.acknowledge(user, epoch, seq);
    }
}

/// The version of a server that is older than what is needed, where that is what an error is about.
fn too_old(conditions: &Requirements, error: &RedisError) -> Option<String> {
    conditions.too_old().filter(|_| requirements::is_persistent(error))
}

/// A position as two arguments of a script, both empty where there is none.
fn position_args(position: Option<&Position>) -> (&str, String) {
    position.map_or(("", String::new()), |at| (at.epoch.as_str(), at.seq.to_string()))
}

/// Whether a script found itself on a server that the nodes have not agreed on.
fn is_unagreed(error: &RedisError) -> bool {
    error.code() == Some("STALE")
}

/// Whether an error says that a room's slot is with another server, on the way there, or with none.
fn is_slot_error(error: &RedisError) -> bool {
    matches!(error.code(), Some("MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN"))
}

/// Whether an error will come again with every try, or is of a time: Redis is away, out of memory,
/// has too few replicas, a disk that is full, or forbids what its user has to do.
fn to_bus_error(error: &RedisError) -> BusError {
    match error.code() {
        _ if requirements::is_forbidden(error) => BusError::Unavailable,
        Some("FULL") => BusError::MemoryFull,
        Some("UNSEENQUOTA") => BusError::UnseenQuota,
        Some("UNSEENBYTES") => BusError::UnseenBytes,
        Some("ERR" | "WRONGTYPE") => BusError::Rejected,
        _ => BusError::Unavailable,
    }
}

fn config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_MAX))
        .set_response_timeout(Some(RESPONSE_MAX))
}

/// How long to wait before the next attempt: at once, then longer, up to [`RETRY_PAUSE_MAX`]; up to
/// [`PERSISTENT_PAUSE_MAX`] where it takes an operator until one succeeds.
#[derive(Default)]
struct RetryPause {
    attempts: u32,
    /// How many failed for a reason that lasts, in a row.
    lasting: u32,
}

impl RetryPause {
    fn next(&mut self) -> Duration {
        self.attempts += 1;
        if self.lasting > 0 {
            let pause = Duration::from_millis(100) * 2_u32.pow(self.lasting.min(10));
            return pause.min(PERSISTENT_PAUSE_MAX);
        }
        let pause = Duration::from_millis(25) * (self.attempts - 1);
        pause.min(RETRY_PAUSE_MAX)
    }

    /// Notes why the last attempt failed.
    fn failed(&mut self, error: &RedisError) {
        self.lasting = if requirements::is_persistent(error) { self.lasting + 1 } else { 0 };
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// Whether a failed attempt is to be told of: the first, and one in some ten seconds. A link
    /// that was lost has been told of before.
    fn should_log(&self) -> bool {
        // What lasts has a line of its own.
        self.attempts % 40 == 1 && self.lasting == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_start_at_nothing_and_have_a_cap() {
        let mut pause = RetryPause::default();
        assert_eq!(pause.next(), Duration::ZERO);
        let pauses: Vec<_> = (0..100).map(|_| pause.next()).collect();
        assert!(pauses.is_sorted() && pauses[99] == RETRY_PAUSE_MAX);
        for _ in 0..20 {
            pause.failed(&redis::make_extension_error("NOPERM".to_owned(), None));
        }
        assert_eq!(pause.next(), PERSISTENT_PAUSE_MAX);
        pause.failed(&redis::make_extension_error("LOADING".to_owned(), None));
        assert_eq!(pause.next(), RETRY_PAUSE_MAX);
    }
}
