//! One connection's life: it opens, says `connected` (and `joined`) came, answers pings until it
//! is told to stop or the server closes.
//!
//! While it is held, a connection is a socket, a few dozen bytes of state and a small task: what is
//! read goes through one buffer per thread, and opening, which needs more, is boxed and gone by then.

use std::{
    cell::RefCell,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use shared::{client::frames, ids::RoomId};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

use crate::{
    args::{ConnectArgs, Target},
    wire::{self, Head, Reader, Received, WireError},
};

thread_local! {
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; 16 * 1024].into());
}

/// What all connections have in common.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What was asked for on the command line.
    pub(crate) args: ConnectArgs,
    /// The address that the URL's host has.
    pub(crate) address: SocketAddr,
}

/// What became of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is open. Times count from when it was due, so that a server which makes others wait does
    /// not look fast.
    Opened {
        /// Until `connected`.
        connected: Duration,
        /// Until `joined`, where a room was asked for.
        joined: Option<Duration>,
    },
    /// The handshake was answered with another status than 101.
    Refused {
        /// The HTTP status.
        status: u16,
    },
    /// It did not come to be otherwise.
    Failed {
        /// Why, in few different words.
        why: String,
    },
    /// It was open and ended before it was told to.
    Ended {
        /// How: a close code, or what went wrong.
        how: String,
    },
}

/// A connection that has all it was opened for.
struct Opened {
    stream: TcpStream,
    reader: Reader,
    /// How the server has closed it already, if so.
    closed: Option<String>,
    connected: Duration,
    joined: Option<Duration>,
}

/// Why a connection did not come to be.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("HTTP {status}")]
    Refused { status: u16 },
    #[error("connect: {}", .0.kind())]
    Connect(io::Error),
    #[error("before `connected`: {}", .0.kind())]
    Io(#[from] io::Error),
    #[error("handshake or frames: {0}")]
    Wire(#[from] WireError),
    #[error("closed before `connected`: {0}")]
    Closed(String),
    #[error("join refused: {0}")]
    JoinRefused(String),
}

/// What is looked at in a frame of the server.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "type")]
    kind: String,
    code: Option<String>,
}

impl Plan {
    fn path(&self, index: u32) -> String {
        let ConnectArgs { url, token, user_prefix, .. } = &self.args;
        match token {
            Some(token) => url.path_with("token", token),
            None => url.path_with("user", &format!("{user_prefix}{index}")),
        }
    }

    fn room(&self, index: u32) -> Option<RoomId> {
        match (&self.args.room, self.args.rooms) {
            (Some(room), _) => Some(room.clone()),
            (None, Some(rooms)) => format!("load-{}", index % rooms).parse().ok(),
            (None, None) => None,
        }
    }

    fn source(&self, index: u32) -> Option<IpAddr> {
        self.args.sources.as_ref().map(|sources| sources.address(index))
    }
}

/// Lives the life of connection number `index`, which was due at `due`.
pub(crate) async fn live(
    plan: Arc<Plan>,
    index: u32,
    due: Instant,
    outcomes: mpsc::Sender<Outcome>,
    stop: watch::Receiver<bool>,
) {
    let opening = Box::pin(open(&plan, index, due));
    let opened = timeout(plan.args.timeout, opening).await;
    drop(plan);
    let (outcome, held) = match opened {
        Ok(Ok(Opened { stream, reader, closed, connected, joined })) => {
            (Outcome::Opened { connected, joined }, Some((stream, reader, closed)))
        }
        Ok(Err(OpenError::Refused { status })) => (Outcome::Refused { status }, None),
        Ok(Err(error)) => (Outcome::Failed { why: error.to_string() }, None),
        Err(_) => (Outcome::Failed { why: "timed out".to_owned() }, None),
    };
    // The receiver is gone only when the whole run is over.
    let _ = outcomes.send(outcome).await;
    let Some((stream, reader, closed)) = held else { return };
    let ended = match closed {
        Some(how) => Some(how),
        None => hold(stream, reader, stop).await,
    };
    if let Some(how) = ended {
        let _ = outcomes.send(Outcome::Ended { how }).await;
    }
}

async fn open(plan: &Plan, index: u32, due: Instant) -> Result<Opened, OpenError> {
    let mut stream = connect(plan.address, plan.source(index)).await.map_err(OpenError::Connect)?;
    let Target { authority, .. } = &plan.args.url;
    stream.write_all(&wire::request(authority, &plan.path(index))).await?;
    let early = upgraded(&stream).await?;

    let mut awaited = vec!["connected"];
    if let Some(room) = plan.room(index) {
        let join = frames::Join { history: Some(0), ..frames::Join::to(&room) };
        stream.write_all(&wire::text(&frames::text(&join))).await?;
        awaited.push("joined");
    }
    let mut reader = Reader::default();
    reader.reads_messages = true;
    let mut times = Vec::with_capacity(2);
    let mut received = Vec::new();
    reader.push(&early, |one| received.push(one.into_owned()))?;
    loop {
        let mut closed = None;
        for one in received.drain(..) {
            match one {
                Received::Message(Some(message)) if times.len() < awaited.len() => {
                    if is(awaited[times.len()], &message)? {
                        times.push(due.elapsed());
                    }
                }
                Received::Message(_) => {}
                Received::Ping(payload) => stream.write_all(&wire::pong(&payload)).await?,
                Received::Close(code, reason) => closed = Some(told(code, &reason)),
            }
        }
        // What came behind the last answer in the same read was looked at too.
        if times.len() == awaited.len() {
            reader.reads_messages = false;
            let (connected, joined) = (times[0], times.get(1).copied());
            return Ok(Opened { stream, reader, closed, connected, joined });
        }
        if let Some(how) = closed {
            return Err(OpenError::Closed(how));
        }
        read(&stream, |bytes| reader.push(bytes, |one| received.push(one.into_owned()))).await??;
    }
}

async fn connect(address: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Waits for the end of the handshake, and gives what came behind it.
async fn upgraded(stream: &TcpStream) -> Result<Vec<u8>, OpenError> {
    let mut bytes = Vec::new();
    loop {
        read(stream, |more| bytes.extend_from_slice(more)).await?;
        match wire::head(&bytes)? {
            None => {}
            Some(Head::Refused { status }) => return Err(OpenError::Refused { status }),
            Some(Head::Upgraded { end }) => return Ok(bytes.split_off(end)),
        }
    }
}

/// Whether `message` is the one that is awaited.
fn is(awaited: &str, message: &[u8]) -> Result<bool, OpenError> {
    match serde_json::from_slice::<Answer>(message) {
        Ok(answer) if answer.kind == "error" => {
            Err(OpenError::JoinRefused(answer.code.unwrap_or_default()))
        }
        Ok(answer) => Ok(answer.kind == awaited),
        Err(_) => Ok(false),
    }
}

/// Holds the connection until it is told to stop. If it ends before, tells how.
async fn hold(
    mut stream: TcpStream,
    mut reader: Reader,
    mut stop: watch::Receiver<bool>,
) -> Option<String> {
    loop {
        let mut pongs = Vec::new();
        let mut closed = None;
        let push = |bytes: &[u8]| {
            reader.push(bytes, |one| match one {
                Received::Ping(payload) => pongs.extend(wire::pong(&payload)),
                Received::Close(code, reason) => closed = Some(told(code, &reason)),
                Received::Message(_) => {}
            })
        };
        // Both arms are cancel-safe: nothing is read before the last await of `read`.
        let outcome = tokio::select! {
            _ = stop.changed() => None,
            outcome = read(&stream, push) => Some(outcome),
        };
        match outcome {
            None => {
                let _ = stream.try_write(&wire::close(1000));
                return None;
            }
            Some(Ok(Ok(()))) if closed.is_some() => return closed,
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => return Some(error.to_string()),
            Some(Err(error)) => return Some(format!("no close frame: {}", error.kind())),
        }
        if let Err(error) = stream.write_all(&pongs).await {
            return Some(format!("no close frame: {}", error.kind()));
        }
    }
}

/// Reads once, through this thread's buffer. The end of the stream is an error.
async fn read<T>(stream: &TcpStream, use_it: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
    loop {
        stream.readable().await?;
        match BUFFER.with_borrow_mut(|buffer| stream.try_read(buffer)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            // No await lies between, so that no other connection has used the buffer.
            Ok(length) => return Ok(BUFFER.with_borrow(|buffer| use_it(&buffer[..length]))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

fn told(code: Option<u16>, reason: &str) -> String {
    match (code, reason) {
        (None, _) => "1005".to_owned(),
        (Some(code), "") => code.to_string(),
        (Some(code), reason) => format!("{code} {reason}"),
    }
}
