//! A way between two processes that can be told to fail: TCP, byte by byte.

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

/// What a proxy does with the bytes on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It passes all on.
    Open,
    /// Connections end, and none is made.
    Cut,
    /// Nothing passes in either direction; what was sent comes when the proxy is open again, as it
    /// does through a network that was parted.
    Hole,
    /// What the dialling side says is held back; answers pass.
    NoRequests,
    /// Requests pass; answers are held back.
    NoAnswers,
    /// Requests pass; answers are lost, and the connections with them when the mode changes.
    AnswersLost,
    /// The same for connections that have subscribed; the others pass all on.
    Deaf,
    /// What passes is late by this and, where more comes meanwhile, by up to twice of it.
    Delay(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Request,
    Answer,
}

/// A port that leads to another, until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// A proxy in front of a server.
    ///
    /// # Errors
    ///
    /// Those of `bind(2)`.
    pub async fn to(server: SocketAddr) -> io::Result<Self> {
        Self::with_buffer(server, None).await
    }

    /// As [`Proxy::to`]. With `buffer_bytes` the socket towards the server takes no more than that.
    ///
    /// # Errors
    ///
    /// Those of `bind(2)`.
    pub async fn with_buffer(server: SocketAddr, buffer_bytes: Option<u32>) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (mode, seen) = watch::channel(Mode::Open);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                // Cancel-safe, both.
                tokio::select! {
                    accepted = listener.accept() => if let Ok((near, _)) = accepted {
                        connections.spawn(connect(near, server, buffer_bytes, seen.clone()));
                    },
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Ok(Self { address, mode, _tasks: tasks })
    }

    /// Has all its connections, and those to come, fail like this.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Its address as that of a Redis.
    pub fn redis_url(&self) -> String {
        format!("redis://{}", self.address)
    }
}

async fn connect(
    near: TcpStream,
    server: SocketAddr,
    buffer_bytes: Option<u32>,
    mode: watch::Receiver<Mode>,
) {
    if *mode.borrow() == Mode::Cut {
        return;
    }
    let Ok(far) = TcpSocket::new_v4() else { return };
    if let Some(bytes) = buffer_bytes
        && far.set_recv_buffer_size(bytes).is_err()
    {
        return;
    }
    if let Ok(far) = far.connect(server).await {
        relay(near, far, mode).await;
    }
}

async fn relay(near: TcpStream, far: TcpStream, mode: watch::Receiver<Mode>) {
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    let subscribed = Arc::new(AtomicBool::new(false));
    tokio::select! {
        () = pass(near_in, far_out, Direction::Request, mode.clone(), &subscribed) => {}
        () = pass(far_in, near_out, Direction::Answer, mode.clone(), &subscribed) => {}
        () = until_mode(mode, |mode| mode == Mode::Cut) => {}
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    direction: Direction,
    mode: watch::Receiver<Mode>,
    subscribed: &AtomicBool,
) {
    let mut buffer = vec![0; 65536];
    loop {
        // Held bytes stay where they are, in the sockets.
        until_mode(mode.clone(), |mode| !holds(mode, direction)).await;
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        until_mode(mode.clone(), |mode| !holds(mode, direction)).await;
        let now = *mode.borrow();
        if let Mode::Delay(delay) = now {
            sleep(delay).await;
        }
        match direction {
            Direction::Request if buffer[..count].windows(9).any(|word| word == b"SUBSCRIBE") => {
                subscribed.store(true, Ordering::Relaxed);
            }
            Direction::Request => {}
            Direction::Answer => {
                let now = *mode.borrow();
                let deaf = now == Mode::Deaf && subscribed.load(Ordering::Relaxed);
                if deaf || now == Mode::AnswersLost {
                    // What comes behind lost bytes makes no sense.
                    until_mode(mode, |mode| mode != now).await;
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
        Mode::Hole => true,
        Mode::NoRequests => direction == Direction::Request,
        Mode::NoAnswers => direction == Direction::Answer,
        Mode::Open | Mode::Cut | Mode::AnswersLost | Mode::Deaf | Mode::Delay(_) => false,
    }
}

async fn until_mode(mut mode: watch::Receiver<Mode>, wanted: impl Fn(Mode) -> bool) {
    if mode.wait_for(|mode| wanted(*mode)).await.is_err() {
        // The proxy is gone, and with it its connections.
        std::future::pending::<()>().await;
    }
}
