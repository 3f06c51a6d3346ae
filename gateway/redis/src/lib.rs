//! The bus of a cluster: logs in Redis, whose pub/sub delivers their entries to the nodes.
//!
//! A node has three kinds of connections to a server. `appender` sends publishes, pipelined on one
//! connection. `subscriber` receives what is published in the subscribed rooms. Reads use a pool
//! (`log`). The first two reconnect in loops of their own, for ever: a library that reconnects
//! below them would hide that messages were missed. `agreement` is what the nodes do before they
//! use a server.
//!
//! In a Redis Cluster there is one such set of connections per primary, and `router` knows which
//! primary serves a room.

use std::{sync::Arc, time::Duration};

use redis::{AsyncConnectionConfig, RedisError};
use serde_json::{Map, Value};
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{Epoch, Position, Seq},
};

use skein_core::bus::{
    Append, BoxFuture, Bus, BusError, Mailboxes, ReadRange, Retention,
    commands::{CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue},
    presence_store::{
        AdmitError, EphemeralEvent, JoinConditions, JoinSnapshot, NodePresence, OnlinePage,
        OnlineStatus, PresenceDetails, PresenceSnapshot, PresenceStore,
    },
    room_store::{
        CreateOutcome, DeleteOutcome, RoomConfig, RoomPage, RoomStore, RoomStoreOptions,
        RoomSummary,
    },
    sessions::{
        ConnectionInfo, OpenedSession, SecretDigest, SessionDataError, SessionHolder,
        SessionOptions, SessionRequest, SessionSelector, SessionStore, StoredSession,
    },
    ticket::PublishTicket,
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

/// How long Redis may take to answer before the connection counts as dead. A publish whose answer
/// is late is repeated with its id, so that a false alarm costs no more than a reconnect.
const RESPONSE_MAX: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// The longest pause between two attempts to connect: a cluster works again within a second of
/// Redis' return.
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(250);
/// The longest pause while Redis denies a permission or is too old.
const PERSISTENT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// The duration of a lease unless configured.
pub const LEASE: Duration = Duration::from_secs(10);

/// How to reach Redis, and how rooms are stored in it.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// The servers' URL, in the format of [`topology::url`].
    pub url: String,
    /// Files for TLS connections.
    pub tls: TlsFiles,
    /// The number of partitions that rooms are spread over; the same on all nodes, for good.
    pub partitions: u16,
    /// How long the other nodes count on this one after it has renewed its lease; the same on all
    /// nodes.
    pub lease: Duration,
    /// The retention of logs.
    pub retention: Retention,
    /// Options of the room store.
    pub rooms: RoomStoreOptions,
    /// Options of the session store.
    pub sessions: SessionOptions,
    /// The id of this node.
    pub node: String,
}

/// Why the bus cannot start with these options.
#[derive(Debug, thiserror::Error)]
pub enum RedisStartError {
    /// No connections can be made as configured.
    #[error(transparent)]
    Open(#[from] TopologyError),
    /// The server is too old.
    #[error(
        "cluster.redis_url: Redis {found} is too old: upgrade it to 7.0 or newer, or to Valkey"
    )]
    Version {
        /// The version it reports.
        found: String,
    },
    /// Another gateway has the same node id.
    #[error(
        "node.id: another running gateway on this Redis is also named {node} (its process is {other}, \
         this one {own}): presence, control commands and drains would be mixed up; give one of \
         them another id, or stop it"
    )]
    NodeId {
        /// The node id.
        node: String,
        /// The other process.
        other: String,
        /// This process.
        own: String,
    },
    /// Other nodes use another number of partitions.
    #[error(
        "cluster.partitions is {configured}, but the cluster on this Redis uses {recorded}: this node \
         would look for rooms under other keys than the other nodes; set {recorded}"
    )]
    Partitions {
        /// The number configured on this node.
        configured: u16,
        /// The number that the first node recorded.
        recorded: u16,
    },
}

/// Logs, presence, rooms, sessions and control commands in Redis.
pub struct RedisBus {
    router: Arc<Router>,
    store: Arc<StoreWorker>,
    commands: Arc<RedisControlQueue>,
}

impl RedisBus {
    /// Starts to connect, and reconnects for ever.
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
        let topology = topology::open(&options.url, &options.tls)?;
        Ok(Self::start_on(topology, options, mailboxes, metrics, tasks))
    }

    /// Starts with connections to one server that `dial` makes.
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
        topology: Topology,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        let (rooms, sessions) = (options.rooms.clone(), options.sessions.clone());
        let router = Router::start(topology, options, mailboxes, metrics, tasks);
        let store = StoreWorker::start(router.clone(), rooms, sessions, tasks);
        let book = Arc::new(RedisControlQueue::new(store.clone()));
        Self { router, store, commands: book }
    }

    /// Waits until this node has reached Redis and has agreed on it with the other nodes.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Partitions`], [`RedisStartError::Version`], [`RedisStartError::NodeId`].
    pub async fn reached(&self) -> Result<(), RedisStartError> {
        let configured = self.router.keyspace().partitions;
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            // State of the whole cluster is in group 0, which may move meanwhile.
            let connections = self.router.connections_for(0).await;
            match connections.server.recorded_partition_count().await {
                Ok(recorded) if recorded == configured => break,
                Ok(recorded) => return Err(RedisStartError::Partitions { configured, recorded }),
                Err(error) => {
                    if let Some(found) = too_old(&connections.server.requirements, &error) {
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
        let query = move |log: &RedisLog| log.read(room.clone(), range);
        Box::pin(self.router.clone().query(group, query))
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
        // A condition that needs an operator goes before one that passes by itself.
        let requirement = self.router.unmet_requirement();
        requirement.or(if !self.router.is_up() {
            Some("bus")
        } else if self.router.evicts_keys() {
            Some("maxmemory_policy")
        } else {
            None
        })
    }
}

impl PresenceStore for RedisBus {
    fn track(&self, report: NodePresence) {
        self.store.track(report);
    }

    fn admit(
        &self,
        report: NodePresence,
        conditions: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>> {
        self.store.admit(report, conditions)
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

    fn publish_ephemeral(&self, room: RoomId, event: EphemeralEvent, ticket: PublishTicket) {
        self.store.publish_ephemeral(room, &event, ticket);
    }
}

impl RoomStore for RedisBus {
    fn create(
        &self,
        room: RoomId,
        config: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>> {
        Box::pin(self.store.clone().create(room, config, owned_max))
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
        let query = move |log: &RedisLog| log.delete_room(room.clone(), owner.clone(), by);
        Box::pin(self.router.clone().query(group, query))
    }
}

impl ControlQueue for RedisBus {
    fn enqueue(&self, command: ControlCommand) -> BoxFuture<Result<CommandId, BusError>> {
        Box::pin(self.commands.clone().enqueue(command))
    }

    fn poll(&self) -> BoxFuture<CommandBatch> {
        Box::pin(self.commands.clone().poll())
    }

    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.commands.clone().mark_applied(id))
    }

    fn reply(&self, id: CommandId, reply: String) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.commands.clone().reply(id, reply))
    }

    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>> {
        Box::pin(self.commands.clone().progress(id))
    }

    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>> {
        Box::pin(self.commands.clone().replies(id))
    }
}

impl SessionStore for RedisBus {
    fn open(&self, request: SessionRequest) -> BoxFuture<Result<OpenedSession, BusError>> {
        Box::pin(self.store.clone().open_session(request))
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

    fn revoke(
        &self,
        user: UserId,
        selector: SessionSelector,
    ) -> BoxFuture<Result<usize, BusError>> {
        Box::pin(self.store.clone().revoke(user, selector))
    }

    fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq) {
        self.store.acknowledge(user, epoch, seq);
    }
}

/// The version of a server that is too old, if `error` is due to that.
fn too_old(requirements: &Requirements, error: &RedisError) -> Option<String> {
    requirements.too_old().filter(|_| requirements::is_persistent(error))
}

/// A position as two arguments of a script, both empty for `None`.
fn position_args(position: Option<&Position>) -> (&str, String) {
    position.map_or(("", String::new()), |at| (at.epoch.as_str(), at.seq.to_string()))
}

/// Whether a script ran on a server that the nodes have not agreed on.
fn is_unagreed(error: &RedisError) -> bool {
    error.code() == Some("STALE")
}

/// Whether a room's slot is on another server, migrating, or on none.
fn is_slot_error(error: &RedisError) -> bool {
    matches!(error.code(), Some("MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN"))
}

/// Whether a request failed for good ([`BusError::Rejected`]) or for a time: Redis is down, out of
/// memory, has too few replicas or a full disk, or denies a permission.
fn to_bus_error(error: &RedisError) -> BusError {
    match error.code() {
        _ if requirements::is_denied(error) => BusError::Unavailable,
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

/// The pause before the next attempt: none at first, then longer, up to [`RETRY_PAUSE_MAX`], or up
/// to [`PERSISTENT_PAUSE_MAX`] after failures that only an operator can end.
#[derive(Default)]
struct RetryPause {
    attempts: u32,
    /// How many attempts in a row failed for a persistent reason.
    persistent: u32,
}

impl RetryPause {
    fn next(&mut self) -> Duration {
        self.attempts += 1;
        if self.persistent > 0 {
            let pause = Duration::from_millis(100) * 2_u32.pow(self.persistent.min(10));
            return pause.min(PERSISTENT_PAUSE_MAX);
        }
        let pause = Duration::from_millis(25) * (self.attempts - 1);
        pause.min(RETRY_PAUSE_MAX)
    }

    /// Records why the last attempt failed.
    fn failed(&mut self, error: &RedisError) {
        self.persistent = if requirements::is_persistent(error) { self.persistent + 1 } else { 0 };
    }

    async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    /// Whether a failed attempt is logged: the first, and one in some ten seconds. A lost
    /// connection was logged before.
    fn should_log(&self) -> bool {
        // Persistent failures have a log line of their own.
        self.attempts % 40 == 1 && self.persistent == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_attempts_start_at_zero_and_have_a_cap() {
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
