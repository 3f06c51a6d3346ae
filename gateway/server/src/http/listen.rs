//! Takes TCP connections and speaks HTTP/1.1 on them.
//!
//! A loop of our own, since `axum::serve` sets no timer: without one the time-out for a request's
//! header never comes, and slow clients hold connections for ever.

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
    drain::supervision::catch_panic,
    limits::{KeyedPermits, Permit, address_key},
    outbox,
    telemetry::metrics::DropReason,
};

/// How long a client may take to send a request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of a request's header. More is answered by 431.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// How many connections are accepted before all other tasks have their turn: each brings a handshake
/// of some 50 µs with it.
const ACCEPTS_PER_TURN: u32 = 16;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;
/// How long to wait when no descriptor is free.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long the log says nothing more of that.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// How much of a request's body is read before the request is refused, and for how long: a client
/// whose body is not read may never see the answer.
const REJECTED_BODY_BYTES_MAX: usize = 1 << 20;
const REJECTED_BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// Takes an address, so that it is this process's; nobody can connect before [`listen`].
///
/// # Errors
///
/// Those of `bind(2)`.
pub fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Opens a bound socket for connections.
///
/// # Errors
///
/// Those of `listen(2)`: another process may have taken the address since.
pub fn listen(socket: TcpSocket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)
}

/// How many TCP connections there may be, WebSockets included.
#[derive(Clone, Debug)]
pub struct TcpLimits {
    /// In all; for a further one the oldest that is no WebSocket yet is dropped.
    pub connections_max: usize,
    /// From one address; further ones are closed at once. 0 for no limit.
    pub connections_per_ip: usize,
    /// Addresses that stand for many clients, so that the second limit is not theirs.
    pub proxies: Vec<ipnet::IpNet>,
}

/// Serves `router` on `listener` until the process ends. From the end of the drain on new
/// connections are answered 503, so that no client finds the port closed.
pub async fn serve(listener: TcpListener, router: Router, node: Arc<Node>, limits: TcpLimits) {
    let stopped = node.tasks.stopped().clone();
    let entrance = HttpListener {
        listener,
        router,
        permits: Arc::new(Semaphore::new(limits.connections_max)),
        limits,
        by_address: KeyedPermits::default(),
        pending: PendingConnections::default(),
        node,
    };
    tokio::select! {
        biased;
        () = stopped.cancelled() => {}
        () = entrance.accept() => {}
    }
    let (tasks, ended) = (entrance.node.tasks.clone(), entrance.node.tasks.ended().clone());
    let accept = async move {
        tokio::select! {
            biased;
            () = ended.cancelled() => {}
            () = entrance.accept() => {}
        }
    };
    // The node ends anyway.
    tasks.spawn_listener(accept, |_| {});
}

/// A listener and what its connections share.
struct HttpListener {
    listener: TcpListener,
    router: Router,
    node: Arc<Node>,
    limits: TcpLimits,
    permits: Arc<Semaphore>,
    by_address: KeyedPermits<IpAddr>,
    pending: PendingConnections,
}

impl HttpListener {
    /// Accepts connections, for ever. Cancel-safe but for a connection that waits for a place, which
    /// is closed.
    async fn accept(&self) {
        let mut said: Option<Instant> = None;
        let mut batch = 0;
        loop {
            batch += 1;
            if batch > ACCEPTS_PER_TURN {
                batch = 0;
                tokio::task::yield_now().await;
            }
            let (socket, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) if concerns_one_connection(&error) => continue,
                Err(error) => {
                    if said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL) {
                        said = Some(Instant::now());
                        tracing::error!(%error, "cannot accept; is the limit of descriptors reached?");
                    }
                    // Nobody is dismissed: `accept` fails so with nobody there to be accepted, too.
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let ip = peer.ip().to_canonical();
            let is_proxy = self.limits.proxies.iter().any(|net| net.contains(&ip));
            let max = if is_proxy { 0 } else { self.limits.connections_per_ip };
            let Some(of_address) = self.by_address.acquire(address_key(peer.ip()), max) else {
                self.node.metrics.http_connections_dropped.of(DropReason::PerIpLimit).inc();
                continue;
            };
            if self.permits.available_permits() == 0 {
                self.pending.evict_oldest();
            }
            // Where all places are WebSockets' one is waited for, and nobody else is accepted meanwhile.
            let place = self.permits.clone().acquire_owned().await.expect("never closed");
            let place = TcpPermit { _all: Arc::new(place), _address: Arc::new(of_address) };
            let guest = self.pending.register();
            let (router, node) = (self.router.clone(), self.node.clone());
            let is_late = node.tasks.leaving().is_cancelled();
            let tasks = node.tasks.clone();
            let connection = HttpConnection { peer, place, router, node, after_drain: is_late };
            let metrics = self.node.metrics.clone();
            let panicked = move |panic: &str| metrics.panicked(peer, panic);
            tasks.spawn_listener(connection.serve(socket, guest), panicked);
        }
    }
}

/// Whether the error says something of the connection that was to be accepted, not of the listener.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

/// A TCP connection's place, given back when the last of its uses is over.
#[derive(Clone)]
pub(super) struct TcpPermit {
    _all: Arc<OwnedSemaphorePermit>,
    _address: Arc<Permit<IpAddr>>,
}

/// A connection that is no WebSocket yet.
struct HttpConnection {
    peer: SocketAddr,
    place: TcpPermit,
    router: Router,
    node: Arc<Node>,
    /// It came when the node's own clients had been sent away.
    after_drain: bool,
}

impl HttpConnection {
    /// Serves it until it ends, becomes a WebSocket, or has to go.
    async fn serve(self, socket: TcpStream, mut guest: PendingConnection) {
        let node = self.node.clone();
        // Nothing is to be finished for who is dropped.
        tokio::select! {
            biased;
            () = guest.evicted() => node.metrics.http_connections_dropped.of(DropReason::Evicted).inc(),
            () = self.serve_requests(socket) => {}
        }
    }

    async fn serve_requests(self, socket: TcpStream) {
        let Ok(local) = socket.local_addr() else { return };
        // A frame is small and is to leave at once.
        let _ = socket.set_nodelay(true);
        // Bytes that a peer does not read wait where limits count them and answers overtake them.
        outbox::limit_unsent_bytes(&socket);
        let ends = ConnectInfo { peer: self.peer, local };
        let first = timeout(HEADER_TIMEOUT, BufferedHead::read(socket, HEADER_BYTES_MAX));
        let first = tokio::select! {
            biased;
            first = first => first,
            () = self.node.tasks.ended().cancelled() => return,
        };
        match first {
            // What the rest takes is not there before.
            Ok(Ok(begun)) => Box::pin(self.answer_requests(begun, ends)).await,
            Ok(Err(_)) => {}
            Err(_) => {
                self.node.metrics.http_connections_dropped.of(DropReason::HeaderTimeout).inc()
            }
        }
    }

    async fn answer_requests(self, begun: BufferedHead, ends: ConnectInfo) {
        let Self { peer, place, router, node, after_drain: is_late } = self;
        let answering = node.clone();
        let stall_limit = begun.write_timeout();
        let has_answered = AtomicBool::new(false);
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ends);
            request.extensions_mut().insert(stall_limit.clone());
            request.extensions_mut().insert(place.clone());
            let (router, node) = (router.clone(), answering.clone());
            let is_further = has_answered.swap(true, Ordering::Relaxed);
            async move {
                if is_further {
                    // A client whose requests are always there has the others wait no longer than for
                    // one of them.
                    tokio::task::yield_now().await;
                }
                // Of a panic the client is told; what else it asked on this connection goes on.
                let answered = catch_panic(answer(router, request, &node, is_late)).await;
                let answer = answered.unwrap_or_else(|panic| {
                    node.metrics.panicked(peer, &panic);
                    let status = StatusCode::INTERNAL_SERVER_ERROR;
                    error_response(status, "internal", "a defect of the gateway")
                });
                Ok::<_, Infallible>(answer)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(begun, service)
            .with_upgrades();
        tokio::pin!(connection);
        // The future is kept over the first arm, so that a request under way is answered. Idle
        // connections stay until the end: each answer of a draining node has `Connection: close`, and
        // a request that comes too late for one is answered all the same.
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

/// Whether the peer did not take its answer.
fn is_write_timeout(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let io_error = source.and_then(|source| source.downcast_ref::<io::Error>());
    io_error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// Answers a request. From the start of a drain on each answer ends its connection.
async fn answer(
    mut router: Router,
    request: Request<Incoming>,
    node: &Node,
    is_late: bool,
) -> Response<Body> {
    let is_over = is_late || node.tasks.stopped().is_cancelled();
    let mut response = if is_over && !is_served_after_drain(request.uri().path()) {
        reject_after_drain(request).await
    } else {
        // The services that the answer needs stay for it.
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

/// Whether a path is answered without services: it tells how the node is, or refuses in its own way.
fn is_served_after_drain(path: &str) -> bool {
    matches!(path, "/health" | "/ready" | "/metrics" | "/sse")
        || path == "/ws"
        || path.starts_with("/ws/")
}

/// 503 and when to come back, once what the client still sends has been read.
async fn reject_after_drain(request: Request<Incoming>) -> Response<Body> {
    let body = axum::body::to_bytes(Body::new(request.into_body()), REJECTED_BODY_BYTES_MAX);
    let _ = timeout(REJECTED_BODY_TIMEOUT, body).await;
    let (status, text) = (StatusCode::SERVICE_UNAVAILABLE, "this node is stopping");
    error_response_with_retry(status, "unavailable", text, retry_after())
}
