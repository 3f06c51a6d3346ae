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
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tower_service::Service as _;

use super::Ends;
use crate::{
    drain::Tasks,
    limits::{Counts, Place, address_key},
};

/// How long a client may take to send a request's header.
const HEADER_READ_MAX: Duration = Duration::from_secs(10);
/// The most bytes of a request's header. More is answered by 431.
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// How many connections may wait to be accepted.
const BACKLOG: u32 = 4096;
/// How long to wait when no descriptor is free.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

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
    /// In all; further ones wait to be accepted.
    pub connections_max: usize,
    /// From one address; further ones are closed at once. 0 for no limit.
    pub connections_per_ip: usize,
    /// Addresses that stand for many clients, so that the second limit is not theirs.
    pub proxies: Vec<ipnet::IpNet>,
}

/// Serves `router` on `listener` until the gateway leaves.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks, limits: TcpLimits) {
    let places = Arc::new(Semaphore::new(limits.connections_max));
    let by_address = Counts::default();
    let leaving = tasks.leaving().clone();
    loop {
        let accept = async {
            let place = places.clone().acquire_owned().await.expect("never closed");
            (place, listener.accept().await)
        };
        // Cancel-safe: a place that is dropped is free again, and `accept` loses no connection.
        let (place, accepted) = tokio::select! {
            biased;
            () = leaving.cancelled() => return,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((socket, peer)) => {
                let ip = peer.ip().to_canonical();
                let is_proxy = limits.proxies.iter().any(|net| net.contains(&ip));
                let max = if is_proxy { 0 } else { limits.connections_per_ip };
                let Some(of_address) = by_address.enter(address_key(peer.ip()), max) else {
                    continue;
                };
                let place = TcpPlace { _all: Arc::new(place), _address: Arc::new(of_address) };
                let connection = connection(socket, peer, place, router.clone(), tasks.clone());
                tasks.spawn_connection(connection);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept; is the limit of descriptors reached?");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
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

async fn connection(
    socket: TcpStream,
    peer: SocketAddr,
    place: TcpPlace,
    router: Router,
    tasks: Tasks,
) {
    let Ok(local) = socket.local_addr() else { return };
    // A frame is small and is to leave at once.
    let _ = socket.set_nodelay(true);
    let ends = Ends { peer, local };
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
        .serve_connection(TokioIo::new(socket), service)
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
        tracing::debug!(%error, %peer, "an HTTP connection ended");
    }
}

async fn answer(router: &mut Router, request: Request<Incoming>) -> http::Response<Body> {
    match router.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
