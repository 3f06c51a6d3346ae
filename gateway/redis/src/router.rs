//! Which server each room is with, and the way of every call to it.
//!
//! Each server has a *set* of connections of its own, and each [placement group](skein_core::bus::placement) a *lane* that
//! leads to one set. Behind a single address there is one of each, for good. In a Redis Cluster there
//! is a set per primary, and groups move between them: when a replica takes over, and when a slot
//! migrates. Both are the same here, a *hand-over*:
//!
//! 1. Publishes of the group wait in its lane, and the old set takes nothing of it in any more.
//! 2. What waits at the old set comes back, once its answers have come or its connection has ended.
//! 3. The new set follows the rooms, and gets what came back and behind it what waited.
//!
//! Before that one sends anything, the nodes agree on it for this group ([`agreement`](super::agreement)).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
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
    RedisOptions,
    agreement::{self, ProcessIdentity},
    append_queue::QueuedAppend,
    appender::{self, Appender},
    keyspace::Keyspace,
    lease::LeaseTimes,
    links::LinkStates,
    log::RedisLog,
    memory::{self, MemoryOfAllServers},
    requirements::Requirements,
    server::{AgreedServer, RedisServer},
    status,
    subscriber::{self, Subscriber},
    topology::{Dial, RedisCluster, Topology, url::Address},
};
use skein_core::{
    bus::{Append, BoxFuture, BusError, Mailboxes, Retention, node_state::NodeState},
    delivery::ServerId,
    drain::Tasks,
    telemetry::metrics::Metrics,
};

/// The most that may wait to be sent or answered. Above it publishes are `Overloaded`.
const QUEUE_BYTES_MAX: usize = 64 << 20;
/// What an entry counts beside its own bytes, so that small ones are bounded in number.
const ENTRY_OVERHEAD_BYTES: usize = 512;
/// How often a Redis Cluster is asked who serves what, unless something shows a change.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How often it is asked at most.
const POLL_PAUSE_MIN: Duration = Duration::from_millis(50);

/// The connections to one server, and who uses them.
pub(super) struct ServerConnections {
    pub(super) server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    appender: Appender,
    subscriber: Subscriber,
    log: RedisLog,
    tasks: Tasks,
}

/// What a group's calls go through.
#[derive(Default)]
struct Route {
    connections: Option<Arc<ServerConnections>>,
    /// Publishes that wait for a set.
    pending: VecDeque<QueuedAppend>,
    subscribed: BTreeSet<RoomId>,
}

/// What the sets are made of.
struct ConnectionContext {
    keyspace: Keyspace,
    retention: Retention,
    mailboxes: Mailboxes,
    metrics: Arc<Metrics>,
    process: Arc<ProcessIdentity>,
    topology_stale: Arc<Notify>,
    usages: Arc<MemoryOfAllServers>,
    tasks: Tasks,
}

/// The lanes of all groups.
pub(super) struct Router {
    context: ConnectionContext,
    routes: Mutex<Vec<Route>>,
    /// Changes when a lane does.
    changed: watch::Sender<()>,
    /// What the queues have room for.
    capacity: Arc<Semaphore>,
    was_up: AtomicBool,
}

impl Router {
    pub(super) fn start(
        way: Topology,
        options: RedisOptions,
        mailboxes: Mailboxes,
        metrics: Arc<Metrics>,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let sharded = matches!(way, Topology::Cluster(_));
        let keyspace = Keyspace { partitions: options.partitions, sharded };
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
                usages: Arc::default(),
                tasks: tasks.clone(),
            },
            routes: Mutex::new((0..keyspace.groups()).map(|_| Route::default()).collect()),
            changed: watch::Sender::default(),
            capacity: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            was_up: AtomicBool::new(false),
        });
        match way {
            Topology::Single(dial) => {
                router.routes.lock()[0].connections = Some(router.context.connect(dial, &[0]))
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

    /// What is known of this node's own state.
    pub(super) fn node_state(&self) -> &Arc<NodeState> {
        self.context.mailboxes.node_state()
    }

    /// This run of this node.
    pub(super) fn process(&self) -> &Arc<ProcessIdentity> {
        &self.context.process
    }

    /// The server that a group is with, if the nodes have agreed on it.
    pub(super) fn agreed_server(&self, group: u16) -> Option<Arc<RedisServer>> {
        let set = self.routes.lock()[usize::from(group)].connections.clone()?;
        let has_agreed = set.server.agreed.borrow().groups.contains(&group);
        has_agreed.then(|| set.server.clone())
    }

    /// The groups whose servers the nodes have agreed on.
    pub(super) fn agreed_groups(&self) -> BTreeSet<u16> {
        let sets = self.connections_by_groups();
        let agreed = sets.iter().flat_map(|(set, groups)| {
            let agreed = set.server.agreed.borrow().groups.clone();
            groups.iter().copied().filter(move |group| agreed.contains(group))
        });
        agreed.collect()
    }

    /// The server of each group, once the nodes have agreed on all, and how often they had by then.
    pub(super) fn agreed_servers(&self) -> Option<BTreeMap<u16, (ServerId, u64)>> {
        let mut targets = BTreeMap::new();
        for (set, groups) in self.connections_by_groups() {
            let agreed = set.server.agreed.borrow().clone();
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

    /// Whether this node can publish and hear, and the others count on it.
    pub(super) fn is_up(&self) -> bool {
        let sets = self.connections_by_groups();
        let all = sets.iter().map(|(_, groups)| groups.len()).sum::<usize>();
        all == usize::from(self.keyspace().groups())
            && sets.iter().all(|(set, groups)| set.is_up_for(groups))
            && self.context.mailboxes.node_state().holds_lease(Instant::now())
    }

    /// Shows in the metrics whether all is well.
    pub(super) fn update_metrics(&self) {
        let up = self.is_up();
        if self.was_up.swap(up, Ordering::AcqRel) != up {
            self.context.metrics.bus_up.set(i64::from(up));
        }
    }

    /// Whether a server throws keys away.
    pub(super) fn evicts_keys(&self) -> bool {
        self.connections_by_groups().iter().any(|(set, _)| set.server.requirements.evicts_keys())
    }

    /// What a server is not, or does not allow.
    pub(super) fn unmet_requirement(&self) -> Option<&'static str> {
        self.connections_by_groups().iter().find_map(|(set, _)| set.server.requirements.unmet())
    }

    /// All sets, with the groups that lead to them.
    fn connections_by_groups(&self) -> Vec<(Arc<ServerConnections>, Vec<u16>)> {
        let mut sets: Vec<(Arc<ServerConnections>, Vec<u16>)> = Vec::new();
        for (group, lane) in (0..).zip(&*self.routes.lock()) {
            let Some(set) = &lane.connections else { continue };
            match sets.iter_mut().find(|(known, _)| Arc::ptr_eq(known, set)) {
                Some((_, groups)) => groups.push(group),
                None => sets.push((set.clone(), vec![group])),
            }
        }
        sets
    }

    pub(super) fn append(&self, append: Append) {
        let bytes = append.envelope.as_bytes().len() + ENTRY_OVERHEAD_BYTES;
        let Ok(room) = self.capacity.clone().try_acquire_many_owned(bytes as u32) else {
            return (append.done)(Err(BusError::Overloaded));
        };
        let group = usize::from(self.keyspace().group_of(&append.room));
        let queued = QueuedAppend::new(append, room);
        let refused = {
            let lane = &mut self.routes.lock()[group];
            match &lane.connections {
                Some(set) => set.appender.send(queued),
                None => {
                    lane.pending.push_back(queued);
                    None
                }
            }
        };
        complete_rejected(refused);
    }

    /// The set that a group leads to, once there is one.
    pub(super) async fn connections_for(&self, group: u16) -> Arc<ServerConnections> {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(set) = self.routes.lock()[usize::from(group)].connections.clone() {
                return set;
            }
            // The sender lives as long as `self`.
            let _ = changed.changed().await;
        }
    }

    fn routes_to(&self, group: u16, set: &Arc<ServerConnections>) -> bool {
        let lanes = self.routes.lock();
        lanes[usize::from(group)].connections.as_ref().is_some_and(|other| Arc::ptr_eq(other, set))
    }

    /// Waits until a group leads elsewhere. Cancel-safe.
    async fn moved_away(&self, group: u16, set: &Arc<ServerConnections>) {
        let mut changed = self.changed.subscribe();
        while self.routes_to(group, set) {
            let _ = changed.changed().await;
        }
    }

    pub(super) async fn subscribe(self: Arc<Self>, room: RoomId) -> Result<(), BusError> {
        let group = self.keyspace().group_of(&room);
        self.routes.lock()[usize::from(group)].subscribed.insert(room.clone());
        loop {
            let set = self.connections_for(group).await;
            let followed = set.subscriber.subscribe(room.clone()).await;
            if followed.is_ok() || self.routes_to(group, &set) {
                return followed;
            }
        }
    }

    pub(super) fn unsubscribe(&self, room: RoomId) {
        let set = {
            let lane = &mut self.routes.lock()[usize::from(self.keyspace().group_of(&room))];
            lane.subscribed.remove(&room);
            lane.connections.clone()
        };
        if let Some(set) = set {
            set.subscriber.unsubscribe(room);
        }
    }

    /// Asks something of the log of a room, where it is at this moment.
    pub(super) async fn query<T>(
        self: Arc<Self>,
        group: u16,
        question: impl Fn(&RedisLog) -> BoxFuture<Result<T, BusError>>,
    ) -> Result<T, BusError> {
        loop {
            let set = self.connections_for(group).await;
            let mut answer = question(&set.log);
            // Where the group moves meanwhile nobody agrees on the old server any more.
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                () = self.moved_away(group, &set) => {}
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
            let set = self.connections_for(group).await;
            let (here, others) = left
                .into_iter()
                .partition(|at| self.routes_to(keyspace.group_of(&rooms[*at]), &set));
            let here: Vec<usize> = here;
            left = others;
            if here.is_empty() {
                return Err(BusError::Unavailable);
            }
            let asked = here.iter().map(|at| rooms[*at].clone()).collect();
            let mut answer = set.log.heads(asked);
            let answer = tokio::select! {
                biased;
                answer = &mut answer => answer?,
                () = set.lost_group() => return Err(BusError::Unavailable),
            };
            for (at, head) in here.into_iter().zip(answer) {
                heads[at] = head;
            }
        }
        Ok(heads)
    }

    /// Follows the changes of a Redis Cluster, for ever.
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
                        tracing::warn!(%error, "cannot find out who serves what in Redis Cluster");
                    }
                    failures += 1;
                }
            }
            self.expire_pending();
            tokio::time::sleep(POLL_PAUSE_MIN).await;
            // Cancel-safe, both.
            tokio::select! {
                biased;
                () = self.context.topology_stale.notified() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Leads groups to their owners. A group that nobody owns stays where it is.
    async fn update_routes(&self, cluster: &RedisCluster, owners: Vec<Option<Address>>) {
        let mut sets: BTreeMap<Address, Arc<ServerConnections>> = BTreeMap::new();
        let mut moves: BTreeMap<Address, Vec<u16>> = BTreeMap::new();
        for (set, groups) in self.connections_by_groups() {
            if let Some(address) = &set.server.address {
                sets.insert(address.clone(), set.clone());
            }
            for group in groups {
                let owner = owners[usize::from(group)].as_ref();
                if let Some(owner) =
                    owner.filter(|owner| set.server.address.as_ref() != Some(owner))
                {
                    moves.entry(owner.clone()).or_default().push(group);
                }
            }
        }
        let led: BTreeSet<u16> =
            self.connections_by_groups().into_iter().flat_map(|(_, groups)| groups).collect();
        for (group, owner) in (0..).zip(&owners) {
            if let Some(owner) = owner.as_ref().filter(|_| !led.contains(&group)) {
                moves.entry(owner.clone()).or_default().push(group);
            }
        }
        for (owner, groups) in moves {
            let set = sets.get(&owner).cloned();
            self.hand_over(cluster, &owner, set, groups).await;
        }
    }

    async fn hand_over(
        &self,
        cluster: &RedisCluster,
        owner: &Address,
        set: Option<Arc<ServerConnections>>,
        groups: Vec<u16>,
    ) {
        let set = match set {
            Some(set) => set,
            None => match cluster.dial(owner) {
                Ok(dial) => self.context.connect_at(Some(owner.clone()), dial, &[]),
                Err(error) => {
                    tracing::error!(%owner, %error, "no connections can be made to a primary");
                    return;
                }
            },
        };
        tracing::info!(%owner, groups = groups.len(), "a primary serves partitions from now on");
        let mut released = Vec::new();
        for (old, gone) in self.detach(&groups) {
            old.server.update_owned(&[], &gone);
            self.context.mailboxes.node_state().set_agreed(gone.iter().copied(), false);
            released.extend(old.appender.drain_groups(gone).await);
            if old.server.owned.borrow().is_empty() {
                old.tasks.stopped().cancel();
            }
        }
        set.server.update_owned(&groups, &[]);
        let (mut refused, mut followed) = (Vec::new(), Vec::new());
        {
            let lanes = &mut *self.routes.lock();
            let mut send = |queued| refused.extend(set.appender.send(queued));
            released.into_iter().for_each(&mut send);
            for group in groups {
                let lane = &mut lanes[usize::from(group)];
                lane.connections = Some(set.clone());
                lane.pending.drain(..).for_each(&mut send);
                followed.extend(lane.subscribed.iter().cloned());
            }
        }
        set.subscriber.resubscribe(followed);
        complete_rejected(refused);
        self.changed.send_replace(());
    }

    /// Takes groups from the sets that they lead to.
    fn detach(&self, groups: &[u16]) -> Vec<(Arc<ServerConnections>, Vec<u16>)> {
        let mut parted = self.connections_by_groups();
        for (_, theirs) in &mut parted {
            theirs.retain(|group| groups.contains(group));
        }
        parted.retain(|(_, theirs)| !theirs.is_empty());
        for group in groups {
            self.routes.lock()[usize::from(*group)].connections = None;
        }
        self.changed.send_replace(());
        parted
    }

    /// Answers what waits in lanes and is past its deadline.
    fn expire_pending(&self) {
        let (now, mut expired) = (Instant::now(), Vec::new());
        for lane in &mut *self.routes.lock() {
            while let Some(queued) =
                lane.pending.pop_front_if(|queued| queued.append.deadline <= now)
            {
                expired.push((queued, BusError::Unavailable));
            }
        }
        complete_rejected(expired);
    }

    fn reject_all_pending(&self) {
        let mut held = Vec::new();
        for lane in &mut *self.routes.lock() {
            held.extend(lane.pending.drain(..).map(|queued| (queued, BusError::Unavailable)));
        }
        complete_rejected(held);
    }
}

/// Answers publishes, outside of any lock.
fn complete_rejected(refused: impl IntoIterator<Item = (QueuedAppend, BusError)>) {
    for (queued, error) in refused {
        (queued.append.done)(Err(error));
    }
}

impl ConnectionContext {
    /// The set of the only server there is.
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
            memory: Default::default(),
            owned: watch::Sender::new(groups.iter().copied().collect()),
            agreed: watch::Sender::new(AgreedServer::default()),
            topology_stale: self.topology_stale.clone(),
            requirements: Requirements::default(),
        });
        let node_state = self.mailboxes.node_state().clone();
        let links = Arc::new(LinkStates::new(node_state, self.metrics.clone()));
        let log = RedisLog::new(server.clone(), self.metrics.clone());
        let appender = appender::start(server.clone(), links.clone(), &tasks);
        let mailboxes = self.mailboxes.clone();
        let subscriber =
            subscriber::start(server.clone(), links.clone(), mailboxes.clone(), &tasks);
        let process = self.process.clone();
        agreement::start(server.clone(), links.clone(), mailboxes, process, &tasks);
        memory::start(server.clone(), self.usages.clone(), self.metrics.clone(), &tasks);
        Arc::new(ServerConnections { server, links, appender, subscriber, log, tasks })
    }
}

impl ServerConnections {
    /// Whether its links stand and the nodes have agreed on it for these groups.
    fn is_up_for(&self, groups: &[u16]) -> bool {
        let agreed = self.server.agreed.borrow().clone();
        self.links.are_up() && groups.iter().all(|group| agreed.groups.contains(group))
    }

    /// Waits until a group is taken away. Cancel-safe.
    async fn lost_group(&self) {
        let mut owned = self.server.owned.subscribe();
        let before = owned.borrow_and_update().clone();
        // The sender lives as long as `self`.
        let _ = owned.wait_for(|owned| !owned.is_superset(&before)).await;
    }
}
