//! HTTP: the routes of both listeners, and the state that all requests share.
//!
//! The public listener serves clients; the admin listener serves metrics and must not be reachable
//! from the internet. [`listen`] accepts connections, `upgrade` turns a handshake into a WebSocket.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use axum::{Router, http::request::Parts, middleware, response::Response, routing::get};
use parking_lot::Mutex;
use skein_protocol::ids::{NodeId, UserId};
use tokio::{sync::Semaphore, time::Instant};

use self::address::client_address;
use crate::{
    cluster::ClusterNodes,
    config::Config,
    rebalance::Rebalancer,
    transport::{Heartbeat, echo::EchoMode, timer::TimerWheel},
};
use skein_core::{
    bus::{
        Bus,
        nodes::{AnnouncedNode, NodeCondition},
    },
    control::Control,
    drain::{
        Tasks,
        schedule::{DrainRate, DrainSchedule},
        targets::{DrainTarget, DrainTargets, DrainingNode},
    },
    limits::{KeyedPermits, Rate, RateLimiters, meter::AddressMeters},
    session::Services,
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{HandshakeRefusal, Metrics},
    },
};

pub mod listen;
mod buffered;
mod pending;
pub mod address;
pub mod origin;
mod error;
mod health;
mod page;
mod extensions;
mod headers;
mod permits;
mod request_rates;
mod handshake;
mod connection_log;
mod upgrade;
mod sse;
pub mod api;

/// How often the lengths of queues are measured, however many programs read the metrics.
const QUEUES_EVERY: Duration = Duration::from_secs(1);
/// How long the shards may take to list their connections.
const QUEUES_TIMEOUT: Duration = Duration::from_millis(500);
/// Missing nodes that the metrics name; more have no series.
const MISSING_NODES_MAX: usize = 32;

/// Name of the cookie by which nginx finds the node of a client.
pub const ROUTE_COOKIE: &str = "gw_node";

/// Options of the HTTP server.
#[derive(Clone)]
pub struct HttpOptions {
    /// Name of the cookie that may carry a token.
    pub auth_cookie: String,
    /// Networks of proxies whose `X-Forwarded-For` is trusted.
    pub trusted_proxies: Vec<ipnet::IpNet>,
    /// Reply of `/ws/echo`.
    pub echo: EchoMode,
    /// Whether the chat page warns that any client can impersonate any user: an anonymous cluster.
    pub warn_anonymous: bool,
    /// `dedup_window` of the `connected` frame.
    pub dedup_window: Duration,
    /// Size in bytes from which messages are compressed; `None` turns compression off.
    pub deflate_bytes_min: Option<usize>,
    /// Ping interval and timeouts of connections.
    pub heartbeat: Arc<Heartbeat>,
    /// Rate at which a draining node disconnects its clients.
    pub drain_rate: DrainRate,
    /// How long a restart of this node takes; zero if it does not come back.
    pub restart_time: Duration,
    /// Connections per second that this node moves for balance; 0: none.
    pub moves_per_second: u32,
}

/// The clients and applications that may connect and call, and how much. A reload may replace it.
#[derive(Clone)]
pub struct AccessOptions {
    /// Origins of other web pages that may connect.
    pub allowed_origins: origin::AllowedOrigins,
    /// Keys of the server API.
    pub api: api::ApiKeys,
    /// Limits of this node.
    pub limits: HttpLimits,
}

/// Limits of connections and requests on this node.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// Client connections in total.
    pub connections_max: usize,
    /// Client connections per address; 0 for no limit.
    pub connections_per_ip: usize,
    /// Client connections per user; 0 for no limit.
    pub connections_per_user: usize,
    /// Handshakes per address.
    pub handshakes_per_ip: Rate,
    /// Handshakes in total.
    pub accepts: Rate,
    /// Plain HTTP requests per address.
    pub requests_per_ip: Rate,
    /// Server API calls without a valid key per address.
    pub api_key_failures_per_ip: Rate,
    /// Bytes of a WebSocket message.
    pub message_bytes_max: usize,
    /// Bytes in the outbox of a connection.
    pub outbox_bytes_max: usize,
}

/// State that all requests of a node share.
pub struct Node {
    /// Name of this node.
    pub id: NodeId,
    /// Options of the HTTP server.
    pub options: HttpOptions,
    /// Options that a reload may replace. A request reads them once, without a lock.
    pub access: ArcSwap<AccessOptions>,
    /// Permits of the public listener.
    pub(crate) tcp_permits: listen::TcpPermits,
    /// State that all sessions share.
    pub services: Arc<Services>,
    /// Control commands of the application.
    pub control: Control,
    /// The nodes of the cluster.
    pub cluster: Arc<ClusterNodes>,
    /// Metrics of this node.
    pub metrics: Arc<Metrics>,
    /// Running tasks.
    pub tasks: Tasks,
    /// Disconnects the clients in batches, when the node stops or a command drains it.
    pub drain_schedule: DrainSchedule,
    /// Moves connections of this node to others if it has too many.
    pub rebalancer: Rebalancer,
    /// Timers of the connections.
    pub timers: Arc<TimerWheel>,
    state: HttpState,
}

/// Counters and rate limiters of the listeners.
#[derive(Default)]
struct HttpState {
    /// Whether a command drains this node.
    draining: AtomicBool,
    /// Whether this node stops.
    stopping: AtomicBool,
    /// Limits log lines about denied origins.
    denied_origins_log: LogLimiter,
    /// When the lengths of queues were last measured.
    queues_measured: Mutex<Option<Instant>>,
    all: KeyedPermits<()>,
    by_address: KeyedPermits<std::net::IpAddr>,
    by_user: KeyedPermits<UserId>,
    handshakes: RateLimiters<std::net::IpAddr>,
    /// Control frames, small fragments and rejected frames per address.
    address_meters: Arc<AddressMeters>,
    accepts: RateLimiters<()>,
    requests: RateLimiters<(std::net::IpAddr, request_rates::RequestPool)>,
    api_log: LogLimiter,
    requests_log: LogLimiter,
    connection_log: connection_log::ConnectionLog,
    lifecycle: LifecyclePermits,
}

/// Bounds how many connections are opened and ended at the same time: when thousands connect or
/// disconnect at once, deliveries wait for few of them.
struct LifecyclePermits {
    /// Held while a connection opens.
    opening: Semaphore,
    /// Held while a session ends.
    ending: Semaphore,
}

impl Default for LifecyclePermits {
    fn default() -> Self {
        Self { opening: Semaphore::new(128), ending: Semaphore::new(64) }
    }
}

/// Addresses of both ends of a TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectInfo {
    /// Address of the client or proxy.
    pub peer: SocketAddr,
    /// Address of this node, as the peer dialled it.
    pub local: SocketAddr,
}

/// The name and the options of a node.
pub struct NodeSetup {
    /// Name of the node.
    pub id: NodeId,
    /// Options that hold until the node stops.
    pub http: HttpOptions,
    /// Options that a reload may replace.
    pub access: AccessOptions,
}

impl Node {
    /// Creates the shared state.
    pub fn new(
        NodeSetup { id, http: options, access }: NodeSetup,
        services: Arc<Services>,
        control: Control,
        cluster: Arc<ClusterNodes>,
        metrics: Arc<Metrics>,
        tasks: Tasks,
    ) -> Self {
        let (wheel, state) = Default::default();
        let drain_schedule = DrainSchedule::new(tasks.leaving());
        let rebalancer = Rebalancer::new(options.moves_per_second);
        Self {
            id,
            options,
            tcp_permits: listen::TcpPermits::new(access.limits.connections_max),
            access: ArcSwap::from_pointee(access),
            services,
            control,
            cluster,
            metrics,
            tasks,
            drain_schedule,
            rebalancer,
            timers: wheel,
            state,
        }
    }

    /// Rejects new clients from now on, since this node stops; `/ready` returns 503.
    pub fn start_stopping(&self) {
        self.state.stopping.store(true, Ordering::Release);
        self.cluster.announce_now();
    }

    /// Rejects new clients while a command drains this node; `/ready` returns 503.
    pub fn set_draining(&self, draining: bool) {
        self.state.draining.store(draining, Ordering::Release);
        if !draining {
            self.drain_schedule.reset();
        }
        self.cluster.announce_now();
    }

    /// The number of client connections.
    pub fn connections(&self) -> usize {
        self.state.all.count(&())
    }

    /// The other nodes that take clients.
    pub fn drain_targets(&self) -> Vec<DrainTarget> {
        let intake_unless_known = self.options.drain_rate.per_second;
        let target = |node: AnnouncedNode| {
            let announced = node.announcement;
            DrainTarget {
                route: announced.route,
                connections: announced.connections,
                connections_max: match announced.connections_max {
                    0 => u64::MAX,
                    known => known,
                },
                intake_per_second: match announced.intake_per_second {
                    0 => intake_unless_known,
                    known => known,
                },
                uptime: Duration::from_millis(announced.uptime_ms) + node.age,
            }
        };
        self.cluster.nodes().into_iter().filter(AnnouncedNode::takes_clients).map(target).collect()
    }

    /// Whether this node takes clients, and the number of its connections, as it announces them.
    pub fn announced_state(&self) -> (NodeCondition, usize) {
        let connections = self.connections();
        let condition = match self.failed_checks().first() {
            _ if self.is_draining() => NodeCondition::Draining,
            Some(_) => NodeCondition::Unavailable,
            None if connections >= self.access.load().limits.connections_max => NodeCondition::Full,
            None => NodeCondition::Accepting,
        };
        (condition, connections)
    }

    /// Applies the options of a configuration that a reload may replace.
    pub fn apply(&self, config: Config) {
        let services = &self.services;
        services.auth.store(config.auth.into());
        services.quotas.set_options(config.quotas);
        services.passwords.set_limits(config.passwords);
        services.reads.set_bytes_per_second(config.client_limits.read_bytes_per_second);
        services.client_limits.store(config.client_limits.into());
        let connections_max = config.access.limits.connections_max;
        self.tcp_permits.grow(connections_max);
        self.cluster.set_connections_max(connections_max);
        self.access.store(config.access.into());
        self.cluster.announce_now();
    }

    /// Disconnects all clients, no faster than the nodes that they are sent to accept them.
    pub async fn drain_clients(&self) {
        self.cluster.refresh().await;
        let clients = self.connections();
        let stops = self.state.stopping.load(Ordering::Acquire);
        let returns = stops && !self.options.restart_time.is_zero();
        let own = DrainingNode {
            clients: clients as u64,
            uptime: self.cluster.uptime(),
            intake_per_second: self.options.drain_rate.per_second,
            returns: self
                .cluster
                .own_route()
                .filter(|_| returns)
                .map(|route| (route, self.options.restart_time)),
        };
        let targets = DrainTargets::choose(&own, self.drain_targets());
        match &targets {
            DrainTargets::Unknown => {
                tracing::info!(clients, "disconnecting all clients: no other node takes them");
            }
            DrainTargets::Return { after, spread, .. } => {
                self.cluster.expect_return(own.clients, *after + *spread);
                tracing::info!(
                    clients,
                    ?after,
                    ?spread,
                    "disconnecting all clients, which come back after the restart of this node"
                );
            }
            DrainTargets::Others(others) => {
                let nodes = others.len();
                tracing::info!(clients, nodes, "sending all clients to the other nodes");
            }
        }
        self.drain_schedule
            .run(self.options.drain_rate, targets, || self.state.all.count(&()))
            .await;
    }

    /// Whether the node drains or stops, and rejects new clients.
    pub fn is_draining(&self) -> bool {
        self.state.draining.load(Ordering::Acquire) || self.state.stopping.load(Ordering::Acquire)
    }

    /// Sets the metrics that are read when they are exported.
    async fn update_metrics(&self) {
        self.update_queue_lengths().await;
        self.metrics.users.set(self.state.by_user.keys() as i64);
        self.metrics.set_failing(&self.failed_checks());
        let connections_max = self.access.load().limits.connections_max;
        self.metrics.connections_max.set(i64::try_from(connections_max).unwrap_or(i64::MAX));
        let nodes = self.cluster.nodes();
        let names = |is_alive: bool| {
            let of = nodes.iter().filter(move |node| node.is_alive == is_alive);
            of.map(|node| node.announcement.node.as_str()).collect::<BTreeSet<_>>()
        };
        let (live, dead) = (names(true), names(false));
        self.metrics.nodes.set(live.len() as i64);
        let missing = dead.difference(&live).take(MISSING_NODES_MAX);
        self.metrics.node_missing.replace(missing.map(|node| (vec![*node], 1.0)));
    }

    /// Sets the metrics of outboxes and mailboxes, at most once per [`QUEUES_EVERY`]: connections
    /// keep no sum, so that delivery pays nothing for it. An overloaded hub keeps the last values.
    async fn update_queue_lengths(&self) {
        let now = Instant::now();
        {
            let measured = &mut *self.state.queues_measured.lock();
            if measured.is_some_and(|at| now - at < QUEUES_EVERY) {
                return;
            }
            *measured = Some(now);
        }
        let (all, most) = self.services.hub.waiting();
        self.metrics.mailbox_messages.set(all as i64);
        self.metrics.mailbox_largest_messages.set(most as i64);
        let connections = self.services.hub.connections(None);
        let Ok(connections) = tokio::time::timeout(QUEUES_TIMEOUT, connections).await else {
            return;
        };
        let (mut bytes, mut largest, mut frames) = (0, 0, 0);
        for connection in &connections {
            let queued = connection.outbox.bytes();
            if queued > 0 {
                frames += connection.outbox.frames();
            }
            (bytes, largest) = (bytes + queued, largest.max(queued));
        }
        self.metrics.outbox_bytes.set(bytes as i64);
        self.metrics.outbox_largest_bytes.set(largest as i64);
        self.metrics.outbox_frames.set(frames as i64);
    }

    /// Logs a handshake that is answered by the HTTP error `response`.
    fn log_refused(&self, cause: HandshakeRefusal, parts: &Parts, response: &Response) {
        let peer = parts.extensions.get::<ConnectInfo>();
        let peer = peer.map_or([0, 0, 0, 0].into(), |info| info.peer.ip());
        let address = client_address(peer, &parts.headers, &self.options.trusted_proxies);
        self.state.connection_log.refused(cause, address, response.status());
    }

    /// Names of the checks that fail, as `/ready` lists them.
    pub fn failed_checks(&self) -> Vec<&'static str> {
        let bus: &dyn Bus = &*self.services.bus;
        let task = self.tasks.failure().map(|_| "task");
        let drain = self.is_draining().then_some("drain");
        bus.failed_check().into_iter().chain(task).chain(drain).collect()
    }
}

/// Builds the routes of the public listener.
pub fn public(node: Arc<Node>) -> Router {
    Router::new()
        .route("/", get(page::chat))
        .route("/chat", get(page::chat))
        .route("/ws", get(upgrade::chat))
        .route("/ws/rooms/{room}", get(upgrade::room))
        .route("/ws/echo", get(upgrade::echo))
        .route("/sse", sse::methods(node.clone()))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .merge(api::router(node.clone()))
        .fallback(error::not_found)
        .layer(middleware::from_fn_with_state(node.clone(), request_rates::limit_requests))
        .with_state(node)
}

/// Builds the routes of the admin listener.
pub fn admin(node: Arc<Node>) -> Router {
    Router::new()
        .route("/metrics", get(health::metrics))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .fallback(error::not_found)
        .with_state(node)
}
