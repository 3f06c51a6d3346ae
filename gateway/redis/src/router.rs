//! Routes every call to the server that serves the room.
//!
//! Each server has connections of its own ([`ServerConnections`]), and each [placement
//! group](skein_core::bus::placement) has a [`Route`] that leads to the connections of one server.
//! Behind a single address there is one of each, for good. A Redis Cluster has connections per
//! primary, and groups move between primaries: when a replica takes over, and when a slot migrates.
//! Both are handled as a *hand-over*:
//!
//! 1. New publishes of the group wait in its route, and the former connections take no more of
//!    them.
//! 2. The former connections return the group's queued publishes, once those in flight are answered
//!    or the connection has ended.
//! 3. The new connections subscribe to the rooms, and get the returned publishes followed by the
//!    waiting ones.
//!
//! The nodes agree on the new server for this group before it gets any of them
//! ([`agreement`](super::agreement)).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use skein_protocol::{ids::RoomId, position::Position};
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::Instant,
};

use super::{
    agreement::{self, ProcessIdentity},
    append_queue::QueuedAppend,
    appender::{self, Appender},
    archiver::{self, ArchiveLags},
    floors::Floors,
    keyspace::Keyspace,
    lease::LeaseTimes,
    links::LinkStates,
    log::RedisLog,
    memory::{self, MemoryOfAllServers},
    options::RedisOptions,
    requirements::Requirements,
    server::{AgreedServer, RedisServer},
    status,
    subscriber::{self, Subscriber},
    topology::{Dial, RedisCluster, Topology, url::Address},
};
use skein_core::{
    archive::Archive,
    bus::{Append, BoxFuture, BusError, Mailboxes, Retention, node_state::NodeState},
    delivery::ServerId,
    drain::Tasks,
    telemetry::metrics::Metrics,
};

/// The most bytes of publishes that wait to be sent or answered. Further publishes are
/// `Overloaded`.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Bytes that count for each entry beside its own, so that the number of small ones is bounded.
const ENTRY_OVERHEAD_BYTES: usize = 512;
/// How long a publish waits for the floor of its room.
const FLOOR_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a Redis Cluster is asked for its slots, unless an answer shows a change.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time between two such requests.
const POLL_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The agreed server of each group, and the number of agreements so far.
pub(super) type AgreedServers = BTreeMap<u16, (ServerId, u64)>;

/// The connections to one server and the tasks that use them.
pub(super) struct ServerConnections {
    pub(super) server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    appender: Appender,
    subscriber: Subscriber,
    log: RedisLog,
    tasks: Tasks,
}

/// The way of a group's calls to its server.
#[derive(Default)]
struct Route {
    connections: Option<Arc<ServerConnections>>,
    /// Publishes that wait for connections.
    pending: VecDeque<QueuedAppend>,
    subscribed: BTreeSet<RoomId>,
}

/// Everything that new connections need.
struct ConnectionContext {
    keyspace: Keyspace,
    retention: Retention,
    mailboxes: Mailboxes,
    metrics: Arc<Metrics>,
    process: Arc<ProcessIdentity>,
    topology_stale: Arc<Notify>,
    memory_of_all: Arc<MemoryOfAllServers>,
    floors: Floors,
    archive: Option<Arc<dyn Archive>>,
    archive_lags: Arc<ArchiveLags>,
    tasks: Tasks,
}

/// The routes of all groups.
pub(super) struct Router {
    context: ConnectionContext,
    routes: Mutex<Vec<Route>>,
    /// Publishes to rooms of which it is not known yet where their log begins.
    opening: Mutex<HashMap<RoomId, Vec<QueuedAppend>>>,
    /// Changes when a route does.
    changed: watch::Sender<()>,
    /// The free capacity of the queues, bytes.
    capacity: Arc<Semaphore>,
    was_up: AtomicBool,
}

impl Router {
    pub(super) fn start(
        topology: Topology,
        options: RedisOptions,
        archive: Option<Arc<dyn Archive>>,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let sharded = matches!(topology, Topology::Cluster(_));
        let archive_backlog_max = if archive.is_some() { options.archive_backlog_max } else { 0 };
        let keyspace = Keyspace { partitions: options.partitions, sharded, archive_backlog_max };
        let node_state = mailboxes.node_state();
        node_state.drop_lease();
        node_state.begin_agreement(keyspace.groups());
        let router = Arc::new(Self {
            context: ConnectionContext {
                keyspace,
                retention: options.retention,
                mailboxes: mailboxes.clone(),
                metrics,
                process: Arc::new(ProcessIdentity::new(
                    &options.node,
                    LeaseTimes::of(options.lease),
                )),
                topology_stale: Arc::default(),
                memory_of_all: Arc::default(),
                floors: Floors::new(archive.clone()),
                archive,
                archive_lags: Arc::default(),
                tasks: tasks.clone(),
            },
            opening: Mutex::default(),
            routes: Mutex::new((0..keyspace.groups()).map(|_| Route::default()).collect()),
            changed: watch::Sender::default(),
            capacity: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            was_up: AtomicBool::new(false),
        });
        match topology {
            Topology::Single(dial) => {
                router.routes.lock()[0].connections = Some(router.context.connect(dial, &[0]));
            }
            Topology::Cluster(cluster) => {
                let (router, stopped) = (router.clone(), tasks.stopped().clone());
                tasks.spawn_service("redis_cluster", async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = router.track_topology(&cluster) => {}
                    }
                    router.reject_all_pending();
                });
            }
        }
        status::start(router.clone(), mailboxes, tasks);
        router
    }

    /// This node's own state.
    pub(super) fn node_state(&self) -> &Arc<NodeState> {
        self.context.mailboxes.node_state()
    }

    /// The identity of this process.
    pub(super) fn process(&self) -> &Arc<ProcessIdentity> {
        &self.context.process
    }

    /// The server of a group, if the nodes have agreed on it.
    pub(super) fn agreed_server(&self, group: u16) -> Option<Arc<RedisServer>> {
        let connections = self.routes.lock()[usize::from(group)].connections.clone()?;
        let has_agreed = connections.server.agreed.borrow().groups.contains(&group);
        has_agreed.then(|| connections.server.clone())
    }

    /// The groups with an agreed server.
    pub(super) fn agreed_groups(&self) -> BTreeSet<u16> {
        let all_connections = self.connections_by_groups();
        let agreed = all_connections.iter().flat_map(|(connections, groups)| {
            let agreed = connections.server.agreed.borrow().groups.clone();
            groups.iter().copied().filter(move |group| agreed.contains(group))
        });
        agreed.collect()
    }

    /// The servers, once all groups have an agreed one.
    pub(super) fn agreed_servers(&self) -> Option<AgreedServers> {
        let mut targets = BTreeMap::new();
        for (connections, groups) in self.connections_by_groups() {
            let agreed = connections.server.agreed.borrow().clone();
            targets.extend(groups.iter().filter_map(|group| {
                let server_id = agreed.id.filter(|_| agreed.groups.contains(group))?;
                Some((*group, (server_id, agreed.count)))
            }));
        }
        (targets.len() == usize::from(self.keyspace().groups())).then_some(targets)
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.context.metrics
    }

    pub(super) fn keyspace(&self) -> Keyspace {
        self.context.keyspace
    }

    /// Whether this node can publish and receive, and holds its lease.
    pub(super) fn is_up(&self) -> bool {
        let all_connections = self.connections_by_groups();
        let all = all_connections.iter().map(|(_, groups)| groups.len()).sum::<usize>();
        all == usize::from(self.keyspace().groups())
            && all_connections.iter().all(|(connections, groups)| connections.is_up_for(groups))
            && self.context.mailboxes.node_state().holds_lease(Instant::now())
    }

    /// Sets the metrics of the bus, the lease and the probes.
    pub(super) fn update_metrics(&self) {
        let (up, metrics, now) = (self.is_up(), &self.context.metrics, Instant::now());
        if self.was_up.swap(up, Ordering::AcqRel) != up {
            metrics.bus_up.set(i64::from(up));
        }
        metrics.leases_lost.inc_by(self.node_state().take_leases_lost(now));
        if let Some(renewed) = self.node_state().lease_renewed() {
            metrics.lease_age_seconds.set((now - renewed).as_secs_f64());
        }
        let queued = QUEUE_BYTES_MAX.saturating_sub(self.capacity.available_permits());
        metrics.publish_queue_bytes.set(queued as i64);
        let all_connections = self.connections_by_groups();
        let ages = all_connections.iter().map(|(connections, _)| connections.links.probe.age(now));
        metrics.bus_probe_age_seconds.set(ages.max().unwrap_or_default().as_secs_f64());
    }

    /// Whether a server may evict keys.
    pub(super) fn evicts_keys(&self) -> bool {
        self.connections_by_groups()
            .iter()
            .any(|(connections, _)| connections.server.requirements.evicts_keys())
    }

    /// The first requirement that a server does not meet.
    pub(super) fn unmet_requirement(&self) -> Option<&'static str> {
        self.connections_by_groups()
            .iter()
            .find_map(|(connections, _)| connections.server.requirements.unmet())
    }

    /// All connections, each with the groups that they serve.
    fn connections_by_groups(&self) -> Vec<(Arc<ServerConnections>, Vec<u16>)> {
        let mut all_connections: Vec<(Arc<ServerConnections>, Vec<u16>)> = Vec::new();
        for (group, route) in (0..).zip(&*self.routes.lock()) {
            let Some(connections) = &route.connections else { continue };
            match all_connections.iter_mut().find(|(known, _)| Arc::ptr_eq(known, connections)) {
                Some((_, groups)) => groups.push(group),
                None => all_connections.push((connections.clone(), vec![group])),
            }
        }
        all_connections
    }

    pub(super) fn append(self: &Arc<Self>, append: Append) {
        let bytes = append.envelope.as_bytes().len() + ENTRY_OVERHEAD_BYTES;
        let Ok(permit) = self.capacity.clone().try_acquire_many_owned(bytes as u32) else {
            return append.ticket.complete(Err(BusError::Overloaded));
        };
        let room = append.room.clone();
        let queued = QueuedAppend::new(append, permit);
        if self.context.archive.is_none() {
            return self.route(queued);
        }
        let opening = &mut *self.opening.lock();
        if let Some(waiting) = opening.get_mut(&room) {
            waiting.push(queued);
        } else if self.context.floors.is_known(&room) {
            self.route(queued);
        } else {
            opening.insert(room.clone(), vec![queued]);
            let router = self.clone();
            self.context.tasks.spawn_job("redis_floor", async move {
                router.find_floor(&room).await;
                // Under the lock, so that later publishes follow.
                let opening = &mut *router.opening.lock();
                let waiting = opening.remove(&room);
                waiting.into_iter().flatten().for_each(|queued| router.route(queued));
            });
        }
    }

    /// Finds out where the log of a room begins if Redis does not have it, as far as that is
    /// possible in time.
    async fn find_floor(self: &Arc<Self>, room: &RoomId) {
        let group = self.keyspace().group_of(room);
        let find = async {
            let found =
                self.clone().query(group, |log| log.has(room.clone())).await.unwrap_or(false);
            if !found {
                self.context.floors.ask(room).await;
            }
        };
        // Afterwards the publish waits for Redis like any other.
        let _ = tokio::time::timeout(FLOOR_TIMEOUT, find).await;
    }

    fn route(&self, queued: QueuedAppend) {
        let group = usize::from(self.keyspace().group_of(&queued.append.room));
        let rejected = {
            let route = &mut self.routes.lock()[group];
            match &route.connections {
                Some(connections) => connections.appender.send(queued),
                None => {
                    route.pending.push_back(queued);
                    None
                }
            }
        };
        complete_rejected(rejected);
    }

    /// Waits for the connections of a group.
    pub(super) async fn connections_for(&self, group: u16) -> Arc<ServerConnections> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(connections) = self.routes.lock()[usize::from(group)].connections.clone() {
                return connections;
            }
            // The sender lives as long as `self`.
            let _ = changed.changed().await;
        }
    }

    fn routes_to(&self, group: u16, connections: &Arc<ServerConnections>) -> bool {
        let routes = self.routes.lock();
        routes[usize::from(group)]
            .connections
            .as_ref()
            .is_some_and(|other| Arc::ptr_eq(other, connections))
    }

    /// Waits until a group's route leads to other connections. Cancel-safe.
    async fn moved_away(&self, group: u16, connections: &Arc<ServerConnections>) {
        let mut changed = self.changed.subscribe();
        while self.routes_to(group, connections) {
            let _ = changed.changed().await;
        }
    }

    pub(super) async fn subscribe(self: Arc<Self>, room: RoomId) -> Result<(), BusError> {
        let group = self.keyspace().group_of(&room);
        self.routes.lock()[usize::from(group)].subscribed.insert(room.clone());
        loop {
            let connections = self.connections_for(group).await;
            let subscribed = connections.subscriber.subscribe(room.clone()).await;
            if subscribed.is_ok() || self.routes_to(group, &connections) {
                return subscribed;
            }
        }
    }

    pub(super) fn unsubscribe(&self, room: RoomId) {
        let connections = {
            let route = &mut self.routes.lock()[usize::from(self.keyspace().group_of(&room))];
            route.subscribed.remove(&room);
            route.connections.clone()
        };
        if let Some(connections) = connections {
            connections.subscriber.unsubscribe(room);
        }
    }

    /// Queries the log of a room on the server that serves the group at this moment.
    pub(super) async fn query<T>(
        self: Arc<Self>,
        group: u16,
        query: impl Fn(&RedisLog) -> BoxFuture<Result<T, BusError>>,
    ) -> Result<T, BusError> {
        loop {
            let connections = self.connections_for(group).await;
            let mut reply = query(&connections.log);
            // If the group moves meanwhile, the nodes never agree on the former server again.
            tokio::select! {
                biased;
                reply = &mut reply => return reply,
                () = self.moved_away(group, &connections) => {}
            }
        }
    }

    pub(super) async fn heads(
        self: Arc<Self>,
        rooms: Vec<RoomId>,
    ) -> Result<Vec<Option<Position>>, BusError> {
        let keyspace = self.keyspace();
        let mut heads = vec![None; rooms.len()];
        let mut left: Vec<usize> = (0..rooms.len()).collect();
        while let Some(first) = left.first() {
            let group = keyspace.group_of(&rooms[*first]);
            let connections = self.connections_for(group).await;
            let (here, others) = left
                .into_iter()
                .partition(|at| self.routes_to(keyspace.group_of(&rooms[*at]), &connections));
            let here: Vec<usize> = here;
            left = others;
            if here.is_empty() {
                return Err(BusError::Unavailable);
            }
            let asked = here.iter().map(|at| rooms[*at].clone()).collect();
            let mut reply = connections.log.heads(asked);
            let reply = tokio::select! {
                biased;
                reply = &mut reply => reply?,
                () = connections.lost_group() => return Err(BusError::Unavailable),
            };
            for (at, head) in here.into_iter().zip(reply) {
                heads[at] = head;
            }
        }
        Ok(heads)
    }

    /// Tracks the slots of a Redis Cluster, for ever.
    async fn track_topology(&self, cluster: &RedisCluster) {
        let mut failures = 0_u32;
        loop {
            match cluster.slot_map().await {
                Ok(map) => {
                    failures = 0;
                    let slots = (0..self.keyspace().groups()).map(Keyspace::slot_of_group);
                    let owners = slots.map(|slot| map.primary_of(slot).cloned()).collect();
                    self.update_routes(cluster, owners).await;
                }
                Err(error) => {
                    if failures.is_multiple_of(40) {
                        tracing::warn!(%error, "cannot read the slots of the Redis Cluster");
                    }
                    failures += 1;
                }
            }
            self.expire_pending();
            tokio::time::sleep(POLL_PAUSE_MIN).await;
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                () = self.context.topology_stale.notified() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Hands groups over to their owners. A group without an owner stays where it is.
    async fn update_routes(&self, cluster: &RedisCluster, owners: Vec<Option<Address>>) {
        let mut all_connections: BTreeMap<Address, Arc<ServerConnections>> = BTreeMap::new();
        let mut moves: BTreeMap<Address, Vec<u16>> = BTreeMap::new();
        for (connections, groups) in self.connections_by_groups() {
            if let Some(address) = &connections.server.address {
                all_connections.insert(address.clone(), connections.clone());
            }
            for group in groups {
                let owner = owners[usize::from(group)].as_ref();
                if let Some(owner) =
                    owner.filter(|owner| connections.server.address.as_ref() != Some(owner))
                {
                    moves.entry(owner.clone()).or_default().push(group);
                }
            }
        }
        let routed: BTreeSet<u16> =
            self.connections_by_groups().into_iter().flat_map(|(_, groups)| groups).collect();
        for (group, owner) in (0..).zip(&owners) {
            if let Some(owner) = owner.as_ref().filter(|_| !routed.contains(&group)) {
                moves.entry(owner.clone()).or_default().push(group);
            }
        }
        for (owner, groups) in moves {
            let connections = all_connections.get(&owner).cloned();
            self.hand_over(cluster, &owner, connections, groups).await;
        }
    }

    async fn hand_over(
        &self,
        cluster: &RedisCluster,
        owner: &Address,
        connections: Option<Arc<ServerConnections>>,
        groups: Vec<u16>,
    ) {
        let connections = match connections {
            Some(connections) => connections,
            None => match cluster.dial(owner) {
                Ok(dial) => self.context.connect_at(Some(owner.clone()), dial, &[]),
                Err(error) => {
                    tracing::error!(%owner, %error, "cannot make connections to a primary");
                    return;
                }
            },
        };
        tracing::info!(%owner, groups = groups.len(), "handing partitions over to a primary");
        let mut released = Vec::new();
        for (old, moved) in self.detach(&groups) {
            old.server.update_owned(&[], &moved);
            self.context.mailboxes.node_state().set_agreed(moved.iter().copied(), false);
            released.extend(old.appender.drain_groups(moved).await);
            if old.server.owned.borrow().is_empty() {
                old.tasks.stopped().cancel();
            }
        }
        connections.server.update_owned(&groups, &[]);
        let (mut rejected, mut subscribed) = (Vec::new(), Vec::new());
        {
            let routes = &mut *self.routes.lock();
            let mut send = |queued| rejected.extend(connections.appender.send(queued));
            released.into_iter().for_each(&mut send);
            for group in groups {
                let route = &mut routes[usize::from(group)];
                route.connections = Some(connections.clone());
                route.pending.drain(..).for_each(&mut send);
                subscribed.extend(route.subscribed.iter().cloned());
            }
        }
        connections.subscriber.resubscribe(subscribed);
        complete_rejected(rejected);
        self.changed.send_replace(());
    }

    /// Detaches groups from their connections. Returns those connections with the groups.
    fn detach(&self, groups: &[u16]) -> Vec<(Arc<ServerConnections>, Vec<u16>)> {
        let mut detached = self.connections_by_groups();
        for (_, theirs) in &mut detached {
            theirs.retain(|group| groups.contains(group));
        }
        detached.retain(|(_, theirs)| !theirs.is_empty());
        for group in groups {
            self.routes.lock()[usize::from(*group)].connections = None;
        }
        self.changed.send_replace(());
        detached
    }

    /// Answers publishes in routes that are past their deadline.
    fn expire_pending(&self) {
        let (now, mut expired) = (Instant::now(), Vec::new());
        for route in &mut *self.routes.lock() {
            while let Some(queued) =
                route.pending.pop_front_if(|queued| queued.append.deadline <= now)
            {
                expired.push((queued, BusError::Unavailable));
            }
        }
        complete_rejected(expired);
    }

    fn reject_all_pending(&self) {
        let mut pending = Vec::new();
        for route in &mut *self.routes.lock() {
            pending.extend(route.pending.drain(..).map(|queued| (queued, BusError::Unavailable)));
        }
        complete_rejected(pending);
    }
}

/// Completes rejected publishes, outside of any lock.
fn complete_rejected(rejected: impl IntoIterator<Item = (QueuedAppend, BusError)>) {
    for (queued, error) in rejected {
        queued.complete(Err(error));
    }
}

impl ConnectionContext {
    /// The connections to a single server.
    fn connect(&self, dial: Arc<dyn Dial>, groups: &[u16]) -> Arc<ServerConnections> {
        self.connect_at(None, dial, groups)
    }

    fn connect_at(
        &self,
        address: Option<Address>,
        dial: Arc<dyn Dial>,
        groups: &[u16],
    ) -> Arc<ServerConnections> {
        let tasks = self.tasks.child();
        let server = Arc::new(RedisServer {
            address,
            dial,
            keyspace: self.keyspace,
            retention: self.retention.clone(),
            floors: self.floors.clone(),
            memory: Default::default(),
            owned: watch::Sender::new(groups.iter().copied().collect()),
            agreed: watch::Sender::new(AgreedServer::default()),
            topology_stale: self.topology_stale.clone(),
            requirements: Requirements::default(),
        });
        let node_state = self.mailboxes.node_state().clone();
        let node = self.process.node_prefix().trim_end_matches('/');
        let links = Arc::new(LinkStates::new(node, node_state, self.metrics.clone()));
        let log = RedisLog::new(server.clone(), self.metrics.clone());
        let appender = appender::start(server.clone(), links.clone(), &tasks);
        let mailboxes = self.mailboxes.clone();
        let subscriber =
            subscriber::start(server.clone(), links.clone(), mailboxes.clone(), &tasks);
        let process = self.process.clone();
        agreement::start(server.clone(), links.clone(), mailboxes, process, &tasks);
        memory::start(server.clone(), self.memory_of_all.clone(), self.metrics.clone(), &tasks);
        if let Some(archive) = &self.archive {
            let (archive, lags) = (archive.clone(), self.archive_lags.clone());
            archiver::start(server.clone(), archive, lags, node, &self.metrics, &tasks);
        }
        Arc::new(ServerConnections { server, links, appender, subscriber, log, tasks })
    }
}

impl ServerConnections {
    /// Whether both links are up and the nodes have agreed on the server for `groups`.
    fn is_up_for(&self, groups: &[u16]) -> bool {
        let agreed = self.server.agreed.borrow().clone();
        self.links.are_up() && groups.iter().all(|group| agreed.groups.contains(group))
    }

    /// Waits until the server loses a group. Cancel-safe.
    async fn lost_group(&self) {
        let mut owned = self.server.owned.subscribe();
        let before = owned.borrow_and_update().clone();
        // The sender lives as long as `self`.
        let _ = owned.wait_for(|owned| !owned.is_superset(&before)).await;
    }
}
