//! The HTTP side: which paths there are, on one page.
//!
//! Two listeners. The public one serves clients; the admin one has the metrics and is not for the
//! world. [`listen`] accepts connections, `upgrade` turns a handshake into a WebSocket.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, middleware, routing::get};
use skein_protocol::ids::{NodeId, UserId};
use tokio::sync::Semaphore;

use crate::transport::{Heartbeat, echo::EchoMode, timer::TimerWheel};
use skein_core::{
    bus::Bus,
    control::Control,
    drain::{
        Tasks,
        schedule::{DrainRate, DrainSchedule},
    },
    limits::{KeyedPermits, Rate, RateLimiters, meter::AddressMeters},
    session::Services,
    telemetry::{log_limiter::LogLimiter, metrics::Metrics},
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
mod upgrade;
mod sse;
pub mod api;

/// The cookie that names a client's node to nginx.
pub const ROUTE_COOKIE: &str = "gw_node";

/// What the HTTP side is told by the configuration.
#[derive(Clone)]
pub struct HttpOptions {
    /// The cookie a token may come in.
    pub auth_cookie: String,
    /// Which pages of other origins may connect.
    pub allowed_origins: origin::AllowedOrigins,
    /// Who may use the server API.
    pub api: api::ApiKeys,
    /// Whose `X-Forwarded-For` counts.
    pub trusted_proxies: Vec<ipnet::IpNet>,
    /// How `/ws/echo` answers.
    pub echo: EchoMode,
    /// Anyone can be anyone, in a cluster: the page says so.
    pub warn_anonymous: bool,
    /// Told to clients as `dedup_window`.
    pub dedup_window: Duration,
    /// Whether messages are compressed with clients that can, and from how many bytes on.
    pub deflate_bytes_min: Option<usize>,
    /// When connections are pinged and given up.
    pub heartbeat: Arc<Heartbeat>,
    /// How much there may be.
    pub limits: HttpLimits,
    /// How fast clients are sent away at the end.
    pub drain_rate: DrainRate,
}

/// How much there may be, on this node.
#[derive(Clone, Debug)]
pub struct HttpLimits {
    /// WebSocket connections in all.
    pub connections_max: usize,
    /// WebSocket connections of one address; 0 for no limit.
    pub connections_per_ip: usize,
    /// WebSocket connections of one user; 0 for no limit.
    pub connections_per_user: usize,
    /// Handshakes of one address.
    pub handshakes_per_ip: Rate,
    /// Handshakes in all.
    pub accepts: Rate,
    /// Plain HTTP requests of one address.
    pub requests_per_ip: Rate,
    /// Calls of the server API without a good key, of one address.
    pub api_key_failures_per_ip: Rate,
    /// One WebSocket message, in bytes.
    pub message_bytes_max: usize,
    /// What waits for one client, in bytes.
    pub outbox_bytes_max: usize,
}

/// What all requests share.
pub struct Node {
    /// This node's name.
    pub id: NodeId,
    /// The configuration.
    pub options: HttpOptions,
    /// What sessions share.
    pub services: Arc<Services>,
    /// What the application orders.
    pub control: Control,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Who runs.
    pub tasks: Tasks,
    /// Sends clients to other nodes: at the end, or because it was ordered.
    pub drain_schedule: DrainSchedule,
    /// What wakes connections when there is something to look at.
    pub timers: Arc<TimerWheel>,
    state: HttpState,
}

/// What the limits count.
#[derive(Default)]
struct HttpState {
    draining: AtomicBool,
    /// Log lines on pages whose origin may not connect.
    origins_refused: LogLimiter,
    all: KeyedPermits<()>,
    by_address: KeyedPermits<std::net::IpAddr>,
    by_user: KeyedPermits<UserId>,
    handshakes: RateLimiters<std::net::IpAddr>,
    /// What the connections of each address cause beside messages.
    address_meters: Arc<AddressMeters>,
    accepts: RateLimiters<()>,
    requests: RateLimiters<(std::net::IpAddr, request_rates::RequestPool)>,
    api_log: LogLimiter,
    requests_log: LogLimiter,
    lifecycle: LifecyclePermits,
}

/// Permits of connections that are being opened or ended: thousands that come or leave at once take
/// their turns, so that deliveries wait for a few of them only.
struct LifecyclePermits {
    /// Held while a connection is opened.
    opening: Semaphore,
    /// Held while its session is ended.
    ending: Semaphore,
}

impl Default for LifecyclePermits {
    fn default() -> Self {
        Self { opening: Semaphore::new(128), ending: Semaphore::new(64) }
    }
}

/// The two ends of a TCP connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectInfo {
    /// The client's, or the proxy's.
    pub peer: SocketAddr,
    /// This node's, as the other side dialled it.
    pub local: SocketAddr,
}

impl Node {
    /// What requests share, before the first one.
    pub fn new(
        id: NodeId,
        options: HttpOptions,
        services: Arc<Services>,
        control: Control,
        metrics: Arc<Metrics>,
        tasks: Tasks,
    ) -> Self {
        let (wheel, state) = Default::default();
        let drain_schedule = DrainSchedule::new(tasks.leaving());
        Self {
            id,
            options,
            services,
            control,
            metrics,
            tasks,
            drain_schedule,
            timers: wheel,
            state,
        }
    }

    /// Takes no new client from here on; `ready` says so.
    pub fn start_draining(&self) {
        self.state.draining.store(true, Ordering::Release);
    }

    /// Sends the clients that are here to other nodes, no faster than those take them.
    pub async fn send_clients_away(&self) {
        self.drain_schedule.run(self.options.drain_rate, || self.state.all.count(&())).await;
    }

    /// Whether new clients are refused because the node stops.
    pub fn is_draining(&self) -> bool {
        self.state.draining.load(Ordering::Acquire)
    }

    /// What keeps the node from serving, as `ready` names it.
    pub fn failing(&self) -> Vec<&'static str> {
        let bus: &dyn Bus = &*self.services.bus;
        let task = self.tasks.failure().map(|_| "task");
        let drain = self.is_draining().then_some("drain");
        bus.failed_check().into_iter().chain(task).chain(drain).collect()
    }
}

/// The routes of the public listener.
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

/// The routes of the admin listener.
pub fn admin(node: Arc<Node>) -> Router {
    Router::new()
        .route("/metrics", get(health::metrics))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .fallback(error::not_found)
        .with_state(node)
}
