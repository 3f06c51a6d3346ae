//! One virtual user: the state of its connection.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use mio::net::TcpStream;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Duration, Instant};

use super::stream::UserStream;
use crate::websocket::FrameReader;

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UserState {
    /// No connection.
    Disconnected,
    /// TCP is connecting.
    Connecting,
    /// The HTTP upgrade is pending.
    Upgrading,
    /// `connected` is pending.
    AwaitingConnected,
    /// `joined` is pending.
    Joining,
    /// The connection is open and, if requested, has joined its room.
    Open,
}

/// One virtual user. The struct is small, because a process may have a hundred thousand.
#[derive(Debug)]
pub(super) struct VirtualUser {
    pub(super) stream: Option<UserStream>,
    pub(super) state: UserState,
    /// Number of times it was opened, which identifies outdated deadlines.
    pub(super) attempt: u32,
    /// When it was due to open.
    pub(super) due: Instant,
    /// Time from `due` to `connected`.
    pub(super) connected: Duration,
    pub(super) reader: FrameReader,
    /// The handshake response, while it is incomplete.
    pub(super) head: Vec<u8>,
    /// Bytes that the socket did not accept yet.
    pub(super) unsent: Vec<u8>,
    /// Whether received bytes are left in the socket.
    pub(super) stalled: bool,
    /// Whether it has ever been stalled.
    pub(super) has_stalled: bool,
    /// Messages received since it joined its room.
    pub(super) received: u64,
    /// `seq` of the last message.
    pub(super) seq: u64,
}

impl VirtualUser {
    /// A disconnected user.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            stream: None,
            state: UserState::Disconnected,
            attempt: 0,
            due: now,
            connected: Duration::ZERO,
            reader: FrameReader::default(),
            head: Vec::new(),
            unsent: Vec::new(),
            stalled: false,
            has_stalled: false,
            received: 0,
            seq: 0,
        }
    }

    /// Whether the connection is being opened.
    pub(super) fn is_opening(&self) -> bool {
        !matches!(self.state, UserState::Disconnected | UserState::Open)
    }

    /// Sends as many bytes as the socket accepts, and keeps the rest.
    pub(super) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.unsent.is_empty()
            && let Some(stream) = &mut self.stream
        {
            match stream.write(bytes) {
                Ok(count) if count == bytes.len() => return Ok(()),
                Ok(count) => self.unsent.extend_from_slice(&bytes[count..]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.unsent.extend_from_slice(bytes);
                }
                Err(error) => return Err(error),
            }
            return Ok(());
        }
        self.unsent.extend_from_slice(bytes);
        self.flush()
    }

    /// Sends the bytes that were kept.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        while !self.unsent.is_empty() {
            match stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.unsent = Vec::new();
        // TLS has its own buffer, which the socket may not have accepted in full.
        match stream.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            flushed => flushed,
        }
    }
}

/// Begins to connect without waiting.
pub(super) fn dial(address: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    match socket.connect(&address.into()) {
        // The connection completes in the background.
        Err(error)
            if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) =>
        {
            return Err(error);
        }
        _ => {}
    }
    Ok(TcpStream::from_std(socket.into()))
}
