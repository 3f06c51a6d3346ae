//! A TCP proxy between two processes that injects network faults.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
    time::{Duration, sleep},
};

/// The treatment of connections and bytes by a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It forwards all bytes.
    Open,
    /// It closes all connections and accepts none.
    Cut,
    /// It holds the bytes of both directions until the mode changes, as a network partition does.
    BlackHole,
    /// It holds requests, the bytes of the connecting side, and forwards responses.
    HoldRequests,
    /// It forwards requests and holds responses.
    HoldResponses,
    /// It forwards requests and drops responses; connections that lost bytes are closed when the
    /// mode changes.
    DropResponses,
    /// As `DropResponses` for connections that have sent `SUBSCRIBE`; it forwards all bytes of
    /// others.
    DropPushes,
    /// It delays bytes by this time, or by up to twice as long if more arrive meanwhile.
    Delay(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Request,
    Response,
}

/// A listening port that forwards to a server, until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Address of the listener.
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Starts a proxy in front of a server.
    ///
    /// # Errors
    ///
    /// Those of `bind(2)`.
    pub async fn to(server: SocketAddr) -> io::Result<Self> {
        Self::with_buffer(server, None).await
    }

    /// As [`Proxy::to`], with a receive buffer of `buffer_bytes` on the socket to the server.
    ///
    /// # Errors
    ///
    /// Those of `bind(2)`.
    pub async fn with_buffer(server: SocketAddr, buffer_bytes: Option<u32>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (mode, mode_rx) = watch::channel(Mode::Open);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                // Both arms are cancel-safe.
                tokio::select! {
                    accepted = listener.accept() => if let Ok((client, _)) = accepted {
                        connections.spawn(connect(client, server, buffer_bytes, mode_rx.clone()));
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { address, mode, _tasks: tasks })
    }

    /// Sets the mode of all current and future connections.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Its address as a Redis URL.
    pub fn redis_url(&self) -> String {
        format!("redis://{}", self.address)
    }
}

async fn connect(
    client: TcpStream,
    server: SocketAddr,
    buffer_bytes: Option<u32>,
    mode: watch::Receiver<Mode>,
) {
    if *mode.borrow() == Mode::Cut {
        return;
    }
    let Ok(upstream) = TcpSocket::new_v4() else { return };
    if let Some(bytes) = buffer_bytes
        && upstream.set_recv_buffer_size(bytes).is_err()
    {
        return;
    }
    if let Ok(upstream) = upstream.connect(server).await {
        relay(client, upstream, mode).await;
    }
}

async fn relay(client: TcpStream, upstream: TcpStream, mode: watch::Receiver<Mode>) {
    let ((client_in, client_out), (upstream_in, upstream_out)) =
        (client.into_split(), upstream.into_split());
    let subscribed = Arc::new(AtomicBool::new(false));
    tokio::select! {
        () = copy(client_in, upstream_out, Direction::Request, mode.clone(), &subscribed) => {}
        () = copy(upstream_in, client_out, Direction::Response, mode.clone(), &subscribed) => {}
        () = wait_for_mode(mode, |mode| mode == Mode::Cut) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    mode: watch::Receiver<Mode>,
    subscribed: &AtomicBool,
) {
    let mut buffer = vec![0; 65536];
    loop {
        // Held bytes stay in the sockets.
        wait_for_mode(mode.clone(), |mode| !holds(mode, direction)).await;
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        wait_for_mode(mode.clone(), |mode| !holds(mode, direction)).await;
        let now = *mode.borrow();
        if let Mode::Delay(delay) = now {
            sleep(delay).await;
        }
        match direction {
            Direction::Request if buffer[..count].windows(9).any(|word| word == b"SUBSCRIBE") => {
                subscribed.store(true, Ordering::Relaxed);
            }
            Direction::Request => {}
            Direction::Response => {
                let now = *mode.borrow();
                let is_push_dropped = now == Mode::DropPushes && subscribed.load(Ordering::Relaxed);
                if is_push_dropped || now == Mode::DropResponses {
                    // Bytes after dropped ones have no meaning.
                    wait_for_mode(mode, |mode| mode != now).await;
                    return;
                }
            }
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

fn holds(mode: Mode, direction: Direction) -> bool {
    match mode {
        Mode::BlackHole => true,
        Mode::HoldRequests => direction == Direction::Request,
        Mode::HoldResponses => direction == Direction::Response,
        Mode::Open | Mode::Cut | Mode::DropResponses | Mode::DropPushes | Mode::Delay(_) => false,
    }
}

async fn wait_for_mode(mut mode: watch::Receiver<Mode>, wanted: impl Fn(Mode) -> bool) {
    if mode.wait_for(|mode| wanted(*mode)).await.is_err() {
        // The proxy was dropped, and its connections with it.
        std::future::pending::<()>().await;
    }
}
