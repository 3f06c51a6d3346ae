//! One virtual user, which is one connection: how far it is, and what it has seen.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use mio::net::TcpStream;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Duration, Instant};

use crate::websocket::FrameReader;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UserState {
    /// There is none.
    Disconnected,
    /// TCP is under way.
    Connecting,
    /// The handshake is.
    Upgrading,
    /// `connected` is waited for.
    AwaitingConnected,
    /// `joined` is.
    Joining,
    /// It has all it was opened for.
    Open,
}

/// One connection. It is kept small: there may be a hundred thousand.
#[derive(Debug)]
pub(super) struct VirtualUser {
    pub(super) stream: Option<TcpStream>,
    pub(super) state: UserState,
    /// How often it was opened, to tell an alarm of an earlier time.
    pub(super) attempt: u32,
    /// When it was to be opened.
    pub(super) due: Instant,
    /// From then to `connected`.
    pub(super) connected: Duration,
    pub(super) reader: FrameReader,
    /// The answer to the handshake, while it is not all there.
    pub(super) head: Vec<u8>,
    /// What the socket did not take.
    pub(super) unsent: Vec<u8>,
    /// Whether what arrives is left in the socket.
    pub(super) stalled: bool,
    /// Whether it was ever so.
    pub(super) has_stalled: bool,
    /// Messages it got since its room was joined.
    pub(super) received: u64,
    /// The number of the last one.
    pub(super) seq: u64,
}

impl VirtualUser {
    /// One that is away.
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

    /// Whether somebody waits for it to open.
    pub(super) fn is_opening(&self) -> bool {
        !matches!(self.state, UserState::Disconnected | UserState::Open)
    }

    /// Sends what the socket takes, and keeps the rest.
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

    /// Sends what was kept.
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
        Ok(())
    }
}

/// Begins a connection, without waiting for it.
pub(super) fn dial(address: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(source) = source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    match socket.connect(&address.into()) {
        // It goes on behind this.
        Err(error)
            if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) =>
        {
            return Err(error);
        }
        _ => {}
    }
    Ok(TcpStream::from_std(socket.into()))
}
