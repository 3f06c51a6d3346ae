//! The backend: logs, presence, rooms, sessions and control commands of a cluster.

use std::{sync::Arc, time::Duration};

use redis::RedisError;
use secrecy::ExposeSecret as _;
use serde_json::{Map, Value};
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{Epoch, Position, Seq},
};

use super::{
    SCHEMA,
    commands::RedisControlQueue,
    error::is_persistent,
    log::RedisLog,
    options::{RedisOptions, RedisStartError},
    requirements::Requirements,
    retry::RetryPause,
    router::Router,
    store::StoreWorker,
    topology::{self, Dial, Topology},
};
use skein_core::{
    archive::Archive,
    bus::{
        Append, BoxFuture, Bus, BusError, Mailboxes, ReadRange,
        commands::{CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue},
        nodes::{Announcements, NodeAnnouncement, NodeRegistry},
        presence_entries::LocalPresences,
        presence_store::{
            AdmitError, EphemeralEvent, JoinConditions, JoinSnapshot, NodePresence, OnlinePage,
            OnlineStatus, PresenceDetails, PresenceSnapshot, PresenceStore,
        },
        room_store::{CreateOutcome, DeleteOutcome, RoomConfig, RoomPage, RoomStore, RoomSummary},
        sessions::{
            ConnectionInfo, OpenedSession, SecretDigest, SessionDataError, SessionHolder,
            SessionRequest, SessionSelector, SessionStore, StoredSession,
        },
        ticket::PublishTicket,
    },
    delivery::{ReplicaSnapshot, page::LogPage},
    drain::Tasks,
    telemetry::metrics::Metrics,
};

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
        archive: Option<Arc<dyn Archive>>,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Result<Self, RedisStartError> {
        let topology = topology::open(options.url.expose_secret(), &options.tls)?;
        Ok(Self::start_on(topology, options, archive, mailboxes, metrics, tasks))
    }

    /// Starts without an archive, with connections to one server that `dial` makes.
    pub fn start_with(
        dial: Arc<dyn Dial>,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        Self::start_on(Topology::Single(dial), options, None, mailboxes, metrics, tasks)
    }

    fn start_on(
        topology: Topology,
        options: RedisOptions,
        archive: Option<Arc<dyn Archive>>,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Self {
        let (rooms, sessions) = (options.rooms.clone(), options.sessions.clone());
        let router = Router::start(topology, options, archive, mailboxes, metrics, tasks);
        let store = StoreWorker::start(router.clone(), rooms, sessions, tasks);
        let commands = Arc::new(RedisControlQueue::new(store.clone()));
        Self { router, store, commands }
    }

    /// Waits until this node has reached Redis and has agreed on it with the other nodes.
    ///
    /// # Errors
    ///
    /// [`RedisStartError::Partitions`], [`RedisStartError::Schema`], [`RedisStartError::Version`],
    /// [`RedisStartError::NodeId`].
    pub async fn reached(&self) -> Result<(), RedisStartError> {
        let configured = self.router.keyspace().partitions;
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            // State of the whole cluster is in group 0, which may move meanwhile.
            let connections = self.router.connections_for(0).await;
            match connections.server.recorded_partition_count().await {
                Ok(recorded) if recorded == configured => {
                    match connections.server.recorded_schema().await {
                        Ok(recorded) if recorded <= SCHEMA => break,
                        Ok(recorded) => return Err(RedisStartError::Schema { recorded }),
                        // A full Redis takes no record; a later node writes it.
                        Err(error) if error.code() == Some("OOM") => break,
                        Err(error) => pause.failed(&error),
                    }
                }
                Ok(recorded) => return Err(RedisStartError::Partitions { configured, recorded }),
                Err(error) => {
                    if let Some(found) = too_old(&connections.server.requirements, &error) {
                        return Err(RedisStartError::Version { found });
                    }
                    pause.failed(&error);
                    if pause.should_log() {
                        let server = connections.server.dial.server_name();
                        tracing::warn!(%error, server, "waiting for Redis");
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
    fn entries(&self) -> Arc<LocalPresences> {
        self.store.entries()
    }

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

impl NodeRegistry for RedisBus {
    fn announce(&self, own: NodeAnnouncement) -> BoxFuture<Result<Announcements, BusError>> {
        Box::pin(self.store.clone().announce_node(own))
    }

    fn withdraw(&self) -> BoxFuture<Result<(), BusError>> {
        Box::pin(self.store.clone().withdraw_node())
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
    requirements.too_old().filter(|_| is_persistent(error))
}
