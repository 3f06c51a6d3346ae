//! Accepts TCP connections and serves HTTP/1.1 on them.
//!
//! This replaces `axum::serve`, which sets no timer: without one the header of a request has no
//! timeout, and slow clients hold connections for ever.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Request, Response, StatusCode, header},
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioTimer;
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tower_service::Service as _;

use super::{
    ConnectInfo, Node,
    buffered::BufferedHead,
    error::{error_response, error_response_with_retry, retry_after},
    pending::{PendingConnection, PendingConnections},
};
use skein_core::{
    connection::outbox,
    drain::supervision::catch_panic,
    limits::{KeyedPermits, Permit, address_key},
    telemetry::metrics::DropReason,
};

/// Timeout for the header of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest header of a request in bytes. A larger one gets 431.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Connections accepted before the task yields to all others: each brings a handshake of about 50
/// µs with it.
const ACCEPTS_PER_BATCH: u32 = 16;
/// Length of the accept queue of the kernel.
const BACKLOG: u32 = 4096;
/// Delay before the next `accept` after one failed, for example without a free file descriptor.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// Shortest time between two log lines about a failed `accept`.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Bytes of the body that are read before a request is rejected: a client whose body is not read
/// may never see the response.
const REJECTED_BODY_BYTES_MAX: usize = 1 << 20;
/// Longest time for reading that body.
const REJECTED_BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// Binds an address, so that no other process can. Clients cannot connect before [`listen`].
///
/// # Errors
///
/// The errors of `bind(2)`.
pub fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Opens a bound socket for clients.
///
/// # Errors
///
/// The errors of `listen(2)`: another process may listen on the address since.
pub fn listen(socket: TcpSocket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)
}

/// TCP connections beyond those that may become WebSockets: probes, pages, rejected handshakes.
pub const TCP_CONNECTIONS_SPARE: usize = 500;
/// The same per address, so that an address with too many WebSockets still gets HTTP 429.
const TCP_CONNECTIONS_PER_IP_SPARE: usize = 100;

/// Permits of the TCP connections of a listener, WebSockets included. A connection beyond them
/// evicts the oldest pending one.
#[derive(Debug)]
pub struct TcpPermits {
    permits: Arc<Semaphore>,
    size: Mutex<usize>,
}

impl TcpPermits {
    /// Permits for this many WebSockets and for the spare connections.
    pub fn new(connections_max: usize) -> Self {
        let size = connections_max.saturating_add(TCP_CONNECTIONS_SPARE);
        Self { permits: Arc::new(Semaphore::new(size)), size: Mutex::new(size) }
    }

    /// Adds permits for more WebSockets. Permits are never taken back: the handshake rejects
    /// WebSockets beyond a lower number.
    pub fn grow(&self, connections_max: usize) {
        let wanted = connections_max.saturating_add(TCP_CONNECTIONS_SPARE);
        let size = &mut *self.size.lock();
        self.permits.add_permits(wanted.saturating_sub(*size));
        *size = wanted.max(*size);
    }
}

/// Which connections a listener takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// Those of clients, with a limit per address, except for proxies: each stands for many clients.
    Public,
    /// Those of operators.
    Admin,
}

/// Serves `router` on `listener` until the process ends.
///
/// After the drain new connections get 503 instead of a closed port.
pub async fn serve(listener: TcpListener, router: Router, node: Arc<Node>, kind: ListenerKind) {
    let stopped = node.tasks.stopped().clone();
    let http = HttpListener {
        listener,
        router,
        permits: match kind {
            ListenerKind::Public => node.tcp_permits.permits.clone(),
            ListenerKind::Admin => Arc::new(Semaphore::new(TCP_CONNECTIONS_SPARE)),
        },
        kind,
        by_address: KeyedPermits::default(),
        pending: PendingConnections::default(),
        node,
    };
    tokio::select! {
        biased;
        () = stopped.cancelled() => {}
        () = http.accept() => {}
    }
    let (tasks, ended) = (http.node.tasks.clone(), http.node.tasks.ended().clone());
    let accept = async move {
        tokio::select! {
            biased;
            () = ended.cancelled() => {}
            () = http.accept() => {}
        }
    };
    // A panic here needs no action: the node ends anyway.
    tasks.spawn_listener(accept, |_| {});
}

/// A listener and the state that its connections share.
struct HttpListener {
    listener: TcpListener,
    router: Router,
    node: Arc<Node>,
    kind: ListenerKind,
    permits: Arc<Semaphore>,
    by_address: KeyedPermits<IpAddr>,
    pending: PendingConnections,
}

impl HttpListener {
    /// The most connections of an address; 0 for no limit.
    fn connections_per_ip(&self, ip: IpAddr) -> usize {
        let is_proxy = || self.node.options.trusted_proxies.iter().any(|net| net.contains(&ip));
        match self.node.access.load().limits.connections_per_ip {
            0 => 0,
            _ if self.kind == ListenerKind::Admin || is_proxy() => 0,
            limit => limit.saturating_add(TCP_CONNECTIONS_PER_IP_SPARE),
        }
    }

    /// Accepts connections for ever.
    ///
    /// Cancel-safe, except that a connection that waits for a permit is closed.
    async fn accept(&self) {
        let mut logged: Option<Instant> = None;
        let mut batch = 0;
        loop {
            batch += 1;
            if batch > ACCEPTS_PER_BATCH {
                batch = 0;
                tokio::task::yield_now().await;
            }
            let (socket, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if concerns_one_connection(&error) => continue,
                Err(error) => {
                    if logged.is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL) {
                        logged = Some(Instant::now());
                        tracing::error!(%error, "cannot accept connections: raise the limit of file descriptors \
                             (`ulimit -n`) if it is reached");
                    }
                    // No connection is evicted: `accept` also fails like this without a client
                    // waiting.
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let ip = peer.ip().to_canonical();
            let max = self.connections_per_ip(ip);
            let Some(address_permit) = self.by_address.acquire(address_key(peer.ip()), max) else {
                self.node.metrics.http_connections_dropped.of(DropReason::PerIpLimit).inc();
                continue;
            };
            if self.permits.available_permits() == 0 {
                self.pending.evict_oldest();
            }
            // If WebSockets hold all permits, this waits for one, and accepts no further client.
            let permit = self.permits.clone().acquire_owned().await.expect("never closed");
            let permit = TcpPermit { _all: Arc::new(permit), _address: Arc::new(address_permit) };
            let pending = self.pending.register();
            let (router, node) = (self.router.clone(), self.node.clone());
            let after_drain = node.tasks.leaving().is_cancelled();
            let tasks = node.tasks.clone();
            let connection = HttpConnection { peer, permit, router, node, after_drain };
            let metrics = self.node.metrics.clone();
            let panicked = move |panic: &str| metrics.panicked(peer, panic);
            tasks.spawn_listener(connection.serve(socket, pending), panicked);
        }
    }
}

/// Whether the error concerns the connection that was to be accepted, not the listener.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

/// Permit of a TCP connection, released when its last clone is dropped.
#[derive(Clone)]
pub(super) struct TcpPermit {
    _all: Arc<OwnedSemaphorePermit>,
    _address: Arc<Permit<IpAddr>>,
}

/// A TCP connection that serves HTTP requests.
struct HttpConnection {
    peer: SocketAddr,
    permit: TcpPermit,
    router: Router,
    node: Arc<Node>,
    /// Whether it was accepted after the drain had disconnected all clients.
    after_drain: bool,
}

impl HttpConnection {
    /// Serves requests until the connection ends, becomes a WebSocket, or is evicted.
    async fn serve(self, socket: TcpStream, mut pending: PendingConnection) {
        let node = self.node.clone();
        // An evicted connection has nothing to finish.
        tokio::select! {
            biased;
            () = pending.evicted() => node.metrics.http_connections_dropped.of(DropReason::Evicted).inc(),
            () = self.serve_requests(socket) => {}
        }
    }

    async fn serve_requests(self, socket: TcpStream) {
        let Ok(local) = socket.local_addr() else { return };
        // Frames are small and must leave at once.
        let _ = socket.set_nodelay(true);
        // Unread bytes stay in the outbox, where limits count them and replies overtake them, and
        // not in the kernel.
        outbox::limit_unsent_bytes(&socket);
        let info = ConnectInfo { peer: self.peer, local };
        let first = timeout(HEADER_TIMEOUT, BufferedHead::read(socket, HEADER_BYTES_MAX));
        let first = tokio::select! {
            biased;
            first = first => first,
            () = self.node.tasks.ended().cancelled() => return,
        };
        match first {
            // Boxed, so that a connection without a header does not hold the memory for the rest.
            Ok(Ok(head)) => Box::pin(self.serve_http(head, info)).await,
            Ok(Err(_)) => {}
            Err(_) => {
                self.node.metrics.http_connections_dropped.of(DropReason::HeaderTimeout).inc();
            }
        }
    }

    async fn serve_http(self, head: BufferedHead, info: ConnectInfo) {
        let Self { peer, permit, router, node, after_drain } = self;
        let serving_node = node.clone();
        let write_timeout = head.write_timeout();
        let has_answered = AtomicBool::new(false);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(info);
            request.extensions_mut().insert(write_timeout.clone());
            request.extensions_mut().insert(permit.clone());
            let (router, node) = (router.clone(), serving_node.clone());
            let is_pipelined = has_answered.swap(true, Ordering::Relaxed);
            async move {
                if is_pipelined {
                    // A client that always has a further request ready delays other tasks by no
                    // more than one of its requests.
                    tokio::task::yield_now().await;
                }
                // A panic is reported to the client; the connection continues with its other
                // requests.
                let result = catch_panic(respond(router, request, &node, after_drain)).await;
                let response = result.unwrap_or_else(|panic| {
                    node.metrics.panicked(peer, &panic);
                    let status = StatusCode::INTERNAL_SERVER_ERROR;
                    error_response(status, "internal", "internal error: a bug in the gateway")
                });
                Ok::<_, Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(head, service)
            .with_upgrades();
        tokio::pin!(connection);
        // The second arm continues the same future, so that a running request gets its response.
        // Idle connections stay open until the end: every response of a draining node has
        // `Connection: close`, and a request that arrives after such a response is still answered.
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = node.tasks.ended().cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            if error.is_timeout() {
                node.metrics.http_connections_dropped.of(DropReason::HeaderTimeout).inc();
            } else if is_write_timeout(&error) {
                node.metrics.http_connections_dropped.of(DropReason::WriteTimeout).inc();
            }
            tracing::debug!(%error, %peer, "an HTTP connection ended");
        }
    }
}

/// Whether the peer did not read its response in time.
fn is_write_timeout(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let io_error = source.and_then(|source| source.downcast_ref::<io::Error>());
    io_error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Answers a request. Once the node drains, every response ends its connection.
async fn respond(
    mut router: Router,
    request: Request<Incoming>,
    node: &Node,
    after_drain: bool,
) -> Response<Body> {
    let is_over = after_drain || node.tasks.stopped().is_cancelled();
    let mut response = if is_over && !is_served_after_drain(request.uri().path()) {
        reject_after_drain(request).await
    } else {
        // Keeps the services alive until the response is ready.
        let _held = node.tasks.hold();
        match router.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    };
    if node.is_draining() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Whether a path needs no services: it reports the state of the node, or rejects by itself.
fn is_served_after_drain(path: &str) -> bool {
    matches!(path, "/health" | "/ready" | "/metrics" | "/sse")
        || path == "/ws"
        || path.starts_with("/ws/")
}

/// Reads the rest of the request, then returns 503 with `Retry-After`.
async fn reject_after_drain(request: Request<Incoming>) -> Response<Body> {
    let body = axum::body::to_bytes(Body::new(request.into_body()), REJECTED_BODY_BYTES_MAX);
    let _ = timeout(REJECTED_BODY_TIMEOUT, body).await;
    let (status, text) = (StatusCode::SERVICE_UNAVAILABLE, "this node is stopping");
    error_response_with_retry(status, "unavailable", text, retry_after())
}
