//! Start and stop of a gateway: builds all parts in order, and ends them in reverse.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use opentelemetry_otlp::ExporterBuildError;
use tokio::net::{TcpListener, TcpSocket};

use crate::{
    cluster::{ClusterNodes, OwnNode},
    config::{ArchiveOptions, Config},
    http::{
        self, Node, NodeSetup,
        listen::{self, ListenerKind},
    },
    otlp,
    reload::{ReloadReport, Reloader},
    version,
};
use skein_archive::OpenError;
use skein_core::{
    archive::{Archive, ArchiveError},
    bus::{
        Bus, Mailboxes,
        commands::ControlQueue,
        memory::{MemoryArchive, MemoryBus},
        nodes::NodeRegistry,
        presence_store::PresenceStore,
        room_store::RoomStore,
        sessions::SessionStore,
    },
    control::Control,
    drain::{Tasks, supervision::TaskFailure},
    history::HistoryReader,
    hub::{Hub, HubServices, MAILBOX_LEN},
    limits::{quotas::Quotas, reads::ReadLimiter},
    presence::PresenceTracker,
    publisher::Publisher,
    rooms::{RoomRules, passwords::Passwords},
    session::{Services, peer_index::PeerIndex},
    telemetry::{metrics::Metrics, traces::Tracer, trail::MessageTrails},
};
use skein_redis::{RedisBus, RedisStartError};

/// Timeout of each step of a stop: closing the connections, then ending the other tasks.
const STOP_STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout of each step of a stop while the gateway starts, without clients.
const STARTING_STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often old messages are removed from the archive.
const RETENTION_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// Time for disconnecting the clients of a gateway that has failed.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(1);

/// A running gateway.
pub struct Server {
    /// Address that clients connect to, with the actual port for port 0.
    pub listen: SocketAddr,
    /// Address of the admin listener.
    pub admin_listen: SocketAddr,
    node: Arc<Node>,
    reloader: Arc<Reloader>,
    tasks: Tasks,
    drain_delay: Duration,
    /// Reserves the archive of a single node.
    _archive_lock: Option<File>,
}

/// Reason for which a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The gateway cannot listen on an address.
    #[error("cannot listen on {address} ({key}): {error}")]
    Listen {
        /// Key of the option.
        key: &'static str,
        /// Value of the option.
        address: SocketAddr,
        /// Error of the socket.
        error: io::Error,
    },
    /// Redis cannot be used as configured.
    #[error(transparent)]
    Redis(#[from] RedisStartError),
    /// The archive cannot be used as configured.
    #[error("archive.url: {0}")]
    Archive(#[from] OpenError),
    /// The archive of a single node cannot be read.
    #[error(
        "archive.url: {0}; repair the database, or set archive.url = \"\" to start without history"
    )]
    ArchiveHeads(ArchiveError),
    /// The collector of traces cannot be used as configured.
    #[error("telemetry.otlp_endpoint: {0}")]
    Traces(#[from] ExporterBuildError),
    /// A part of the gateway failed during the start.
    #[error("{0}")]
    Failed(TaskFailure),
}

impl Server {
    /// Starts a gateway: connects to the bus, then listens for clients. The admin listener answers
    /// before that, so that a node that waits for Redis can be told from a dead one.
    ///
    /// # Errors
    ///
    /// [`StartError`]. An unavailable Redis is no error: the start waits for it.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_with(config, Tasks::default()).await
    }

    /// As [`Server::start`], unless `stop` resolves before the gateway is ready: then what has
    /// started ends in order, so that no other node waits for this one, and the result is `None`.
    ///
    /// # Errors
    ///
    /// [`StartError`].
    pub async fn start_unless(
        config: Config,
        stop: impl Future<Output = ()>,
    ) -> Result<Option<Self>, StartError> {
        let tasks = Tasks::default();
        // A dropped start leaves its tasks, which end in order.
        tokio::select! {
            biased;
            server = Self::start_with(config, tasks.clone()) => server.map(Some),
            () = stop => {
                tasks.finish(STARTING_STOP_TIMEOUT).await;
                Ok(None)
            }
        }
    }

    async fn start_with(config: Config, tasks: Tasks) -> Result<Self, StartError> {
        let metrics = Arc::new(Metrics::new().with_legacy_names(config.legacy_metric_names));
        metrics.set_info(config.node.as_str(), version::VERSION, version::COMMIT);
        let tracer = match &config.otlp {
            Some(options) => otlp::start(options, &config.node, &metrics, &tasks)?,
            None => Tracer::default(),
        };
        let (admin, admin_listen) = bind("admin.listen", config.admin_listen)?;
        let (public, listen) = bind("server.listen", config.listen)?;

        let (mailboxes, receivers) = Mailboxes::new(config.shards, MAILBOX_LEN, metrics.clone());
        let (archive, archive_lock) = match &config.archive {
            Some(options) => match open_archive(options, &tasks).await {
                Ok((archive, lock)) => (Some(archive), lock),
                Err(error) if options.is_default => {
                    tracing::warn!(
                        "messages are forgotten when this gateway stops: {error}; or set \
                         archive.url = \"\" if that is wanted"
                    );
                    (None, None)
                }
                Err(error) => return Err(error.into()),
            },
            None => (None, None),
        };
        metrics.archive_up.set(if archive.is_some() { 1 } else { -1 });
        let redis = match config.redis {
            Some(options) => {
                let (archive, mailboxes, metrics) =
                    (archive.clone(), mailboxes.clone(), metrics.clone());
                Some(Arc::new(RedisBus::start(options, archive, mailboxes, metrics, &tasks)?))
            }
            None => None,
        };
        let Stores { bus, presence, rooms, sessions, commands, nodes } = match &redis {
            Some(redis) => Stores::of(redis.clone()),
            None => {
                let (rooms, sessions) = (&config.room_store, &config.sessions);
                let (retention, mailboxes) = (config.retention, mailboxes.clone());
                let bus = match &archive {
                    Some(archive) => {
                        let opened = MemoryArchive::open(archive.clone()).await;
                        let archive = opened.map_err(StartError::ArchiveHeads)?;
                        let metrics = metrics.clone();
                        MemoryBus::start_archived(
                            archive, metrics, retention, rooms, sessions, mailboxes, &tasks,
                        )
                    }
                    None => MemoryBus::start(retention, rooms, sessions, mailboxes, &tasks),
                };
                Stores::of(Arc::new(bus))
            }
        };
        let presence_store = presence;
        let presence = PresenceTracker::start(presence_store.clone(), config.presence, &tasks);
        let rules = Arc::new(RoomRules { archived: archive.is_some(), ..config.rooms });
        metrics.bus_up.set(i64::from(redis.is_none()));
        let bus_status = mailboxes.node_state().status();
        let trails = Arc::<MessageTrails>::default();
        let services = HubServices {
            bus: bus.clone(),
            presence: presence.clone(),
            rules: rules.clone(),
            metrics: metrics.clone(),
            trails: trails.clone(),
            tracer: tracer.clone(),
        };
        let hub = Hub::start(&services, mailboxes, receivers, config.hub, &tasks);
        let reloader = Arc::new(Reloader::new(&config.node, config.sources, config.options));
        let reload = reloader.clone();
        let control = Control {
            node: config.node.clone(),
            queue: commands,
            sessions: sessions.clone(),
            hub: hub.clone(),
            presence: presence.clone(),
            metrics: metrics.clone(),
            trails: trails.clone(),
            timeout: config.session.wait_max,
            reload: Arc::new(move |by| reload.reload(by).to_json()),
            draining: Default::default(),
        };
        control.start(&tasks);
        let http_limits = &config.access.limits;
        let quotas = Arc::new(Quotas::new(config.quotas));
        let publisher = Publisher {
            bus: bus.clone(),
            store: presence_store,
            rules: rules.clone(),
            quotas: quotas.clone(),
            metrics: metrics.clone(),
            trails,
            tracer,
            timeout: config.session.wait_max,
            message_bytes_max: http_limits.message_bytes_max,
        };
        let limits = config.client_limits;
        let metrics_of_sessions = metrics.clone();
        let services = Services {
            publisher,
            hub,
            history: HistoryReader::new(bus.clone(), archive),
            bus,
            presence,
            rooms,
            sessions,
            auth: ArcSwap::from_pointee(config.auth),
            rules,
            passwords: Passwords::new(config.passwords, metrics.clone()),
            reads: ReadLimiter::new(limits.read_bytes_per_second),
            peer_index: PeerIndex::default(),
            bus_status,
            metrics: metrics_of_sessions,
            quotas,
            limits: config.session,
            client_limits: ArcSwap::from_pointee(limits),
        };
        let services = Arc::new(services);
        let own = OwnNode {
            id: config.node.clone(),
            connections_max: http_limits.connections_max,
            intake_per_second: config.http.drain_rate.per_second,
        };
        let proxies = &config.http.trusted_proxies;
        let cluster = Arc::new(ClusterNodes::new(nodes, own, listen, proxies));
        let node = Node::new(
            NodeSetup { id: config.node, http: config.http, access: config.access },
            services,
            control,
            cluster,
            metrics,
            tasks.clone(),
        );
        let node = Arc::new(node);
        reloader.bind(&node);
        tasks.spawn_job("drain", drain_on_command(node.clone(), config.drain_delay));
        let (turning, stopped) = (node.timers.clone(), tasks.stopped().clone());
        tasks.spawn_service("wheel", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = turning.run() => {}
            }
        });

        let router = http::admin(node.clone());
        let admin = listen_on("admin.listen", admin_listen, admin)?;
        let admin = listen::serve(admin, router, node.clone(), ListenerKind::Admin);
        tasks.spawn_service("admin", admin);
        if let Some(redis) = redis {
            tokio::select! {
                biased;
                failure = tasks.failed() => return Err(StartError::Failed(failure)),
                reached = redis.reached() => reached?,
            }
        }
        let (announcing, stopped) = (node.clone(), tasks.stopped().clone());
        tasks.spawn_service("announcements", async move {
            let state = || announcing.announced_state();
            announcing.cluster.announce_until(stopped, state).await;
        });
        let (balancing, stopped) = (node.clone(), tasks.stopped().clone());
        tasks.spawn_service("rebalancing", async move {
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = balancing.rebalancer.run(&balancing) => {}
            }
        });
        let router = http::public(node.clone());
        let public = listen_on("server.listen", listen, public)?;
        let public = listen::serve(public, router, node.clone(), ListenerKind::Public);
        tasks.spawn_service("public", public);
        let drain_delay = config.drain_delay;
        Ok(Self {
            listen,
            admin_listen,
            node,
            reloader,
            tasks,
            drain_delay,
            _archive_lock: archive_lock,
        })
    }

    /// Reads the configuration again, and applies what can be applied while the gateway runs. `by`
    /// names the cause, for the log.
    pub fn reload(&self, by: &str) -> ReloadReport {
        self.reloader.reload(by)
    }

    /// Resolves when a part of the gateway has failed that others depend on: the process must end.
    /// The future may outlive the server.
    pub fn failed(&self) -> impl Future<Output = TaskFailure> + use<> {
        let tasks = self.tasks.clone();
        async move { tasks.failed().await }
    }

    /// Disconnects the clients as far as possible within a second, after a part has failed. Other
    /// parts are not ended in order, since they may depend on the failed one.
    pub async fn abandon(self) {
        self.node.start_stopping();
        self.tasks.leave(ABANDON_TIMEOUT).await;
    }

    /// Stops in order: `/ready` returns 503 for `drain.delay`, then clients are disconnected in
    /// batches with their queued frames, `reconnect` and 1012, and the other tasks end, the
    /// listeners last. Returns whether everything ended in time.
    pub async fn stop(self) -> bool {
        self.node.start_stopping();
        tokio::time::sleep(self.drain_delay).await;
        self.node.drain_clients().await;
        self.node.cluster.withdraw().await;
        self.tasks.finish(STOP_STEP_TIMEOUT).await
    }
}

/// Stores of logs, presence, rooms, sessions, control commands and announcements of nodes: one
/// backend for all.
struct Stores {
    bus: Arc<dyn Bus>,
    presence: Arc<dyn PresenceStore>,
    rooms: Arc<dyn RoomStore>,
    sessions: Arc<dyn SessionStore>,
    commands: Arc<dyn ControlQueue>,
    nodes: Arc<dyn NodeRegistry>,
}

impl Stores {
    fn of<T>(store: Arc<T>) -> Self
    where
        T: Bus + PresenceStore + RoomStore + SessionStore + ControlQueue + NodeRegistry + 'static,
    {
        let (bus, presence, rooms) = (store.clone(), store.clone(), store.clone());
        let (sessions, commands) = (store.clone(), store.clone());
        Self { bus, presence, rooms, sessions, commands, nodes: store }
    }
}

/// Opens the archive, and removes what is older than its retention every hour.
async fn open_archive(
    options: &ArchiveOptions,
    tasks: &Tasks,
) -> Result<(Arc<dyn Archive>, Option<File>), OpenError> {
    let lock = skein_archive::reserve(&options.url)?;
    let archive = skein_archive::open(&options.url, Default::default()).await?;
    tracing::info!(url = options.shown_url, "messages of rooms are kept in the archive");
    let retention = options.retention;
    if !retention.is_zero() {
        let (expiring, stopped) = (archive.clone(), tasks.stopped().clone());
        tasks.spawn_service("archive_retention", async move {
            let expire = async {
                let mut every = tokio::time::interval(RETENTION_INTERVAL);
                loop {
                    every.tick().await;
                    let Some(before) = SystemTime::now().checked_sub(retention) else { continue };
                    match expiring.expire(before).await {
                        Ok(0) => {}
                        Ok(removed) => {
                            tracing::info!(removed, "removed old messages from the archive");
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot remove old messages from the archive");
                        }
                    }
                }
            };
            // Both arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = expire => {}
            }
        });
    }
    Ok((archive, lock))
}

/// Drains the node while a control command requests it: rejects new clients and sends the others to
/// other nodes. The node serves again once a command cancels the drain.
async fn drain_on_command(node: Arc<Node>, delay: Duration) {
    let stopped = node.tasks.stopped().clone();
    let mut draining = node.control.draining.subscribe();
    let follow = async {
        // The sender lives as long as `node`.
        while draining.wait_for(|draining| *draining).await.is_ok() {
            node.set_draining(true);
            tracing::info!(
                clients = node.connections(),
                "draining by a command of the server API: new clients are rejected until it is \
                 cancelled or this node restarts"
            );
            let send_away = async {
                tokio::time::sleep(delay).await;
                node.drain_clients().await;
                std::future::pending::<()>().await;
            };
            // Both arms are cancel-safe: a stop disconnects the remaining clients.
            tokio::select! {
                biased;
                _ = draining.wait_for(|draining| !*draining) => {}
                () = send_away => {}
            }
            node.set_draining(false);
            tracing::info!(
                clients = node.connections(),
                "the drain was cancelled: accepting clients"
            );
        }
    };
    // Both arms are cancel-safe.
    tokio::select! {
        biased;
        () = stopped.cancelled() => {}
        () = follow => {}
    }
}

fn bind(key: &'static str, address: SocketAddr) -> Result<(TcpSocket, SocketAddr), StartError> {
    listen::bind(address)
        .and_then(|socket| Ok((socket.local_addr()?, socket)))
        .map(|(address, socket)| (socket, address))
        .map_err(|error| StartError::Listen { key, address, error })
}

fn listen_on(
    key: &'static str,
    address: SocketAddr,
    socket: TcpSocket,
) -> Result<TcpListener, StartError> {
    listen::listen(socket).map_err(|error| StartError::Listen { key, address, error })
}
