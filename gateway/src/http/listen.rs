//! Takes TCP connections and speaks HTTP/1.1 on them.
//!
//! A loop of our own, since `axum::serve` sets no timer: without one the time-out for a request's
//! header never comes, and slow clients hold connections for ever.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body, http::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioTimer;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tower_service::Service as _;

use super::{
    Ends,
    begun::Begun,
    guests::{Guest, Guests},
};
use crate::{
    drain::Tasks,
    limits::{Counts, Place, address_key},
    telemetry::metrics::{Dropped, Metrics},
};

/// How long a client may take to send a request's header.
const HEADER_READ_MAX: Duration = Duration::from_secs(10);
/// The most bytes of a request's header. More is answered by 431.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;
/// How long to wait when no descriptor is free.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// How long the log says nothing more of that.
const SAY_AGAIN: Duration = Duration::from_secs(60);

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

/// Serves `router` on `listener` until the gateway leaves.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    tasks: Tasks,
    limits: TcpLimits,
    metrics: Arc<Metrics>,
) {
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let (by_address, guests) = (Counts::default(), Guests::default());
    let leaving = tasks.leaving().clone();
    let mut said: Option<Instant> = None;
    loop {
        // Cancel-safe: `accept` loses no connection.
        let accepted = tokio::select! {
            biased;
            () = leaving.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                if said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
                    said = Some(Instant::now());
                    tracing::error!(%error, "cannot accept; is the limit of descriptors reached?");
                }
                // Nobody is dismissed: `accept` fails so with nobody there to be accepted, too.
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        let ip = peer.ip().to_canonical();
        let is_proxy = limits.proxies.iter().any(|net| net.contains(&ip));
        let max = if is_proxy { 0 } else { limits.connections_per_ip };
        let Some(of_address) = by_address.enter(address_key(peer.ip()), max) else {
            metrics.http_dropped.of(Dropped::Address).inc();
            continue;
        };
        if places.available_permits() == 0 {
            guests.dismiss_oldest();
        }
        // Cancel-safe: a place that is dropped is free again. Where all are WebSockets' it is waited
        // for, and nobody else is accepted meanwhile.
        let place = tokio::select! {
            biased;
            () = leaving.cancelled() => return,
            place = places.clone().acquire_owned() => place.expect("never closed"),
        };
        let place = TcpPlace { _all: Arc::new(place), _address: Arc::new(of_address) };
        let guest = guests.enter();
        let connection = Http { peer, place, router: router.clone(), metrics: metrics.clone() };
        tasks.spawn_connection(connection.serve(socket, guest, tasks.clone()));
    }
}

/// Whether the error says something of the connection that was to be accepted, not of the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

/// A TCP connection's place, given back when the last of its uses is over.
#[derive(Clone)]
pub(super) struct TcpPlace {
    _all: Arc<OwnedSemaphorePermit>,
    _address: Arc<Place<IpAddr>>,
}

/// A connection that is no WebSocket yet.
struct Http {
    peer: SocketAddr,
    place: TcpPlace,
    router: Router,
    metrics: Arc<Metrics>,
}

impl Http {
    /// Serves it until it ends, becomes a WebSocket, or has to go.
    async fn serve(self, socket: TcpStream, mut guest: Guest, tasks: Tasks) {
        let metrics = self.metrics.clone();
        // Nothing is to be finished for who is dropped.
        tokio::select! {
            biased;
            () = guest.dismissed() => metrics.http_dropped.of(Dropped::Room).inc(),
            () = self.serve_requests(socket, tasks) => {}
        }
    }

    async fn serve_requests(self, socket: TcpStream, tasks: Tasks) {
        let Ok(local) = socket.local_addr() else { return };
        // A frame is small and is to leave at once.
        let _ = socket.set_nodelay(true);
        let ends = Ends { peer: self.peer, local };
        let first = timeout(HEADER_READ_MAX, Begun::read(socket, HEADER_BYTES_MAX));
        let first = tokio::select! {
            biased;
            first = first => first,
            () = tasks.leaving().cancelled() => return,
        };
        match first {
            // What the rest takes is not there before.
            Ok(Ok(begun)) => Box::pin(self.answer_requests(begun, ends, tasks)).await,
            Ok(Err(_)) => {}
            Err(_) => self.metrics.http_dropped.of(Dropped::Header).inc(),
        }
    }

    async fn answer_requests(self, begun: Begun, ends: Ends, tasks: Tasks) {
        let Self { peer, place, router, metrics } = self;
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(ends);
            request.extensions_mut().insert(place.clone());
            let mut router = router.clone();
            async move { Ok::<_, Infallible>(answer(&mut router, request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_READ_MAX)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(begun, service)
            .with_upgrades();
        tokio::pin!(connection);
        let leaving = tasks.leaving();
        // The future is kept over the first arm, so that a request under way is answered.
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = leaving.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            if error.is_timeout() {
                metrics.http_dropped.of(Dropped::Header).inc();
            } else if is_stalled(&error) {
                metrics.http_dropped.of(Dropped::Answer).inc();
            }
            tracing::debug!(%error, %peer, "an HTTP connection ended");
        }
    }
}

/// Whether the peer did not take its answer.
fn is_stalled(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error);
    let io_error = source.and_then(|source| source.downcast_ref::<io::Error>());
    io_error.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

async fn answer(router: &mut Router, request: Request<Incoming>) -> http::Response<Body> {
    match router.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
