//! The attacker: its connections on one thread and one epoll.
//!
//! It holds as many connections as its profiles name, writes as fast as the sockets accept or at
//! the interval of the profile, and counts sent bytes and close reasons. It does not measure
//! latency: legitimate clients do, in threads of their own ([`super::legitimate`]).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use mio::{Events, Interest, Poll, Token, net::TcpStream};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::{Duration, Instant};

use super::profile::{AttackHandshake, AttackPayload, AttackProfile, OnFinished};
use crate::websocket::{self, FrameReader, HandshakeResponse, WsFrame};

/// First source address of attackers; a profile uses as many in turn as it names.
const SOURCES: Ipv4Addr = Ipv4Addr::new(127, 3, 0, 1);
/// Bytes written to one connection before the next one has its turn.
const TURN_BYTES: usize = 64 * 1024;
/// Size of one read.
const READ_BYTES: usize = 64 * 1024;
/// Delay before a rejected or closed connection is opened again.
const REOPEN_AFTER: Duration = Duration::from_millis(250);
/// Longest wait of one step, after which the stop flag is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Time limit of the preparation of an attack.
const PREPARE_MAX: Duration = Duration::from_secs(30);
/// Time for the server to handle the bytes of the preparation.
const SETTLE: Duration = Duration::from_millis(700);
/// Number of different close reasons that are counted separately.
const CLOSE_REASONS_MAX: usize = 20;

/// Traffic and connections of an attack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct AttackerStats {
    /// Bytes that the sockets accepted.
    pub(crate) sent_bytes: u64,
    /// Bytes that were read.
    pub(crate) received_bytes: u64,
    /// Connections that were opened.
    pub(crate) opened: u64,
    /// Most connections that were open at once.
    pub(crate) open_peak: u64,
    /// Close codes, HTTP statuses and errors that ended connections, with their counts.
    pub(crate) close_reasons: BTreeMap<String, u64>,
}

impl AttackerStats {
    fn count_close(&mut self, reason: String) {
        let known = self.close_reasons.contains_key(&reason)
            || self.close_reasons.len() < CLOSE_REASONS_MAX;
        *self.close_reasons.entry(if known { reason } else { "others".to_owned() }).or_default() +=
            1;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum AttackState {
    Connecting,
    Upgrading(Vec<u8>),
    Open,
}

struct AttackConnection {
    stream: TcpStream,
    profile: usize,
    serial: u32,
    state: AttackState,
    /// Bytes to send, and the number of them that are sent.
    out: Vec<u8>,
    sent: usize,
    /// Number of chunks so far.
    chunks: u64,
    /// When the next chunk is due, if the profile has an interval.
    due: Instant,
    is_finished: bool,
    is_queued: bool,
    reader: FrameReader,
}

/// The attacker.
pub(crate) struct Attacker {
    target: SocketAddr,
    poll: Poll,
    events: Option<Events>,
    profiles: Vec<AttackProfile>,
    /// For each profile: connections opened since its start, and open connections.
    begun: Vec<(u64, u32)>,
    connections: Vec<Option<AttackConnection>>,
    free: Vec<usize>,
    /// Connections whose sockets may accept more.
    ready: VecDeque<usize>,
    /// Due times of the next chunks.
    scheduled: BinaryHeap<Reverse<(Instant, usize, u32)>>,
    /// Times at which profiles may open a connection again.
    reopening: VecDeque<(Instant, usize)>,
    serial: u32,
    open: u64,
    buffer: Box<[u8]>,
    pub(crate) stats: AttackerStats,
    stop: Arc<AtomicBool>,
}

impl Attacker {
    /// An attacker without connections.
    pub(crate) fn new(target: SocketAddr, stop: Arc<AtomicBool>) -> io::Result<Self> {
        Ok(Self {
            target,
            poll: Poll::new()?,
            events: Some(Events::with_capacity(1024)),
            profiles: Vec::new(),
            begun: Vec::new(),
            connections: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            scheduled: BinaryHeap::new(),
            reopening: VecDeque::new(),
            serial: 0,
            open: 0,
            buffer: vec![0; READ_BYTES].into(),
            stats: AttackerStats::default(),
            stop,
        })
    }

    /// Runs profiles until every connection is open and has sent all its bytes.
    pub(crate) fn prepare(&mut self, profiles: &[AttackProfile]) -> io::Result<()> {
        if profiles.is_empty() {
            return Ok(());
        }
        self.profiles = profiles.to_vec();
        self.begun = vec![(0, 0); profiles.len()];
        let began = Instant::now();
        while !self.is_prepared() && began.elapsed() < PREPARE_MAX && !self.is_stopped() {
            self.step(began)?;
        }
        let settled = Instant::now() + SETTLE;
        while Instant::now() < settled {
            self.step(began)?;
        }
        // Open connections stay; no more are opened for these profiles.
        self.reopening.clear();
        Ok(())
    }

    fn is_prepared(&self) -> bool {
        let all = self.profiles.iter().zip(&self.begun);
        let all_opened =
            all.into_iter().all(|(profile, begun)| begun.0 >= u64::from(profile.connections));
        let finished = |connection: &AttackConnection| {
            connection.state == AttackState::Open
                && connection.is_finished
                && connection.sent == connection.out.len()
        };
        all_opened && self.reopening.is_empty() && self.connections.iter().flatten().all(finished)
    }

    /// Runs profiles until `until`, beside the prepared connections, and closes all.
    pub(crate) fn attack(
        &mut self,
        profiles: &[AttackProfile],
        drops_prepared: bool,
        until: Instant,
    ) -> io::Result<()> {
        if drops_prepared {
            self.close_all();
        }
        let base = self.profiles.len();
        self.profiles.extend_from_slice(profiles);
        // Prepared profiles open no more connections.
        self.begun.iter_mut().for_each(|begun| begun.0 = u64::MAX);
        self.begun.resize(base + profiles.len(), (0, 0));
        let began = Instant::now();
        while Instant::now() < until && !self.is_stopped() {
            self.step(began)?;
        }
        self.close_all();
        Ok(())
    }

    /// Closes all connections without a close frame.
    fn close_all(&mut self) {
        self.connections.clear();
        self.free.clear();
        self.ready.clear();
        self.scheduled.clear();
        self.reopening.clear();
        self.begun.iter_mut().for_each(|begun| begun.1 = 0);
        self.open = 0;
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn step(&mut self, began: Instant) -> io::Result<()> {
        let now = Instant::now();
        self.open_due(began, now)?;
        while let Some(&Reverse((due, index, serial))) = self.scheduled.peek()
            && due <= now
        {
            self.scheduled.pop();
            if self.connections[index].as_ref().is_some_and(|one| one.serial == serial) {
                self.queue(index);
            }
        }
        for _ in 0..self.ready.len().min(64) {
            let Some(index) = self.ready.pop_front() else { break };
            self.write(index);
        }
        let wait = if self.ready.is_empty() {
            let due = self.scheduled.peek().map(|Reverse((due, ..))| *due);
            let wait = due.map_or(POLL_INTERVAL, |due| due.saturating_duration_since(now));
            wait.min(POLL_INTERVAL)
        } else {
            Duration::ZERO
        };
        let mut events = self.events.take().expect("put back below");
        match self.poll.poll(&mut events, Some(wait)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => events.clear(),
            other => other?,
        }
        for event in &events {
            let index = event.token().0;
            if event.is_writable() {
                self.on_writable(index);
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                self.read(index, event.is_error() || event.is_write_closed());
            }
        }
        self.events = Some(events);
        Ok(())
    }

    fn open_due(&mut self, began: Instant, now: Instant) -> io::Result<()> {
        let elapsed = now.saturating_duration_since(began).as_secs_f64();
        for number in 0..self.profiles.len() {
            let profile = &self.profiles[number];
            let due = (elapsed * f64::from(profile.opens_per_second)) as u64 + 1;
            let again = profile.on_finished == OnFinished::Reopen;
            let (connections, most) = (profile.connections, u64::from(profile.connections));
            while self.begun[number].0 < due
                && (again || self.begun[number].0 < most)
                && self.begun[number].1 < connections
            {
                self.begun[number].0 += 1;
                self.dial(number);
            }
        }
        while let Some(&(due, number)) = self.reopening.front()
            && due <= now
        {
            self.reopening.pop_front();
            self.dial(number);
        }
        Ok(())
    }

    fn dial(&mut self, number: usize) {
        let profile = &self.profiles[number];
        let serial = self.serial;
        self.serial += 1;
        let source = Ipv4Addr::from_bits(SOURCES.to_bits() + serial % profile.addresses.max(1));
        let dialled = dial(self.target, source.into(), profile.receive_buffer);
        let mut stream = match dialled {
            Ok(stream) => stream,
            Err(error) => return self.stats.count_close(format!("connect: {}", error.kind())),
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut stream, Token(index), interest) {
            self.free.push(index);
            return self.stats.count_close(error.to_string());
        }
        self.begun[number].1 += 1;
        self.open += 1;
        self.stats.opened += 1;
        self.stats.open_peak = self.stats.open_peak.max(self.open);
        self.connections[index] = Some(AttackConnection {
            stream,
            profile: number,
            serial,
            state: AttackState::Connecting,
            out: Vec::new(),
            sent: 0,
            chunks: 0,
            due: Instant::now(),
            is_finished: false,
            is_queued: false,
            reader: FrameReader::default(),
        });
    }

    fn on_writable(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        if connection.state == AttackState::Connecting {
            if let Some(error) = connection.stream.take_error().ok().flatten() {
                return self.on_closed(index, format!("connect: {}", error.kind()));
            }
            // Both calls report this while TCP is still connecting.
            if connection.stream.peer_addr().is_err() {
                return;
            }
            let profile = &self.profiles[connection.profile];
            let path = (profile.path)(connection.serial);
            let host = self.target.to_string();
            connection.out = match profile.handshake {
                AttackHandshake::Raw => Vec::new(),
                AttackHandshake::WebSocket | AttackHandshake::Unawaited => {
                    websocket::handshake_request(&host, &path)
                }
                AttackHandshake::Deflate => websocket::handshake_request_with(
                    &host,
                    &path,
                    "Sec-WebSocket-Extensions: permessage-deflate\r\n",
                ),
            };
            connection.state = AttackState::Upgrading(Vec::new());
            if matches!(profile.handshake, AttackHandshake::Raw | AttackHandshake::Unawaited) {
                self.opened(index);
            }
        }
        self.queue(index);
    }

    /// Starts to send the payload of an open connection.
    fn opened(&mut self, index: usize) {
        let Some(connection) = self.connections[index].as_mut() else { return };
        let profile = &self.profiles[connection.profile];
        connection.state = AttackState::Open;
        connection.out.extend_from_slice(&(profile.first)(connection.serial));
        connection.due = Instant::now();
        connection.reader = FrameReader::default();
        self.queue(index);
    }

    fn queue(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].as_mut()
            && !connection.is_queued
        {
            connection.is_queued = true;
            self.ready.push_back(index);
        }
    }

    /// Writes until the socket accepts no more, the next chunk is not due, or the turn is over.
    fn write(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        connection.is_queued = false;
        let profile = &self.profiles[connection.profile];
        let mut turn = 0;
        loop {
            if connection.sent < connection.out.len() {
                match connection.stream.write(&connection.out[connection.sent..]) {
                    Ok(count) => {
                        connection.sent += count;
                        turn += count;
                        self.stats.sent_bytes += count as u64;
                    }
                    // `on_writable` continues.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return self.read(index, true),
                }
                if turn > TURN_BYTES {
                    return self.queue(index);
                }
                continue;
            }
            if connection.state != AttackState::Open || connection.is_finished {
                return;
            }
            if let Some(interval) = profile.interval {
                let now = Instant::now();
                if connection.due > now {
                    self.scheduled.push(Reverse((connection.due, index, connection.serial)));
                    return;
                }
                // A delayed connection does not catch up with a burst.
                connection.due = (connection.due + interval).max(now);
            }
            let number = connection.chunks;
            connection.chunks += 1;
            connection.sent = 0;
            match &profile.payload {
                AttackPayload::Nothing => connection.is_finished = true,
                // Copied once, sent again and again.
                AttackPayload::Repeat(bytes) if number == 0 => connection.out.clone_from(bytes),
                AttackPayload::Repeat(_) => {}
                AttackPayload::Generate(each) => match each(connection.serial, number) {
                    Some(chunk) => connection.out = chunk,
                    None => connection.is_finished = true,
                },
            }
            if connection.is_finished {
                connection.out = Vec::new();
                if profile.on_finished != OnFinished::Hold {
                    self.close(index);
                }
                return;
            }
        }
    }

    fn read(&mut self, index: usize, is_broken: bool) {
        loop {
            let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else {
                return;
            };
            let profile = &self.profiles[connection.profile];
            let waits = matches!(connection.state, AttackState::Upgrading(_));
            // A connection that does not read learns of its end by a failed write.
            if !profile.reads && !waits && !is_broken {
                return;
            }
            match connection.stream.read(&mut self.buffer) {
                Ok(0) => return self.on_closed(index, "no close frame".to_owned()),
                Ok(count) => {
                    self.stats.received_bytes += count as u64;
                    if let Some(reason) = self.take(index, count) {
                        return self.on_closed(index, reason);
                    }
                    if count < self.buffer.len() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && is_broken => {
                    return self.on_closed(index, "no close frame".to_owned());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.on_closed(index, error.kind().to_string()),
            }
        }
    }

    /// Handles received bytes; `Some` with the reason if they end the connection.
    fn take(&mut self, index: usize, count: usize) -> Option<String> {
        let bytes = &self.buffer[..count];
        let connection = self.connections[index].as_mut()?;
        let handshake = self.profiles[connection.profile].handshake;
        let mut rest = None;
        if let AttackState::Upgrading(head) = &mut connection.state {
            head.extend_from_slice(bytes);
            match websocket::parse_response(head) {
                Ok(None) => return None,
                Ok(Some(HandshakeResponse::Upgraded { end })) => rest = Some(head.split_off(end)),
                Ok(Some(HandshakeResponse::Rejected { status })) => {
                    return Some(format!("HTTP {status}"));
                }
                Err(error) => return Some(error.to_string()),
            }
        } else if matches!(handshake, AttackHandshake::Raw | AttackHandshake::Unawaited) {
            for at in memchr::memmem::find_iter(bytes, b"HTTP/1.1 ") {
                let status = bytes.get(at + 9..at + 12).unwrap_or_default();
                self.stats.count_close(format!("HTTP {}", String::from_utf8_lossy(status)));
            }
            return None;
        }
        let mut closed = None;
        let is_upgraded = rest.is_some();
        let read = connection.reader.push(rest.as_deref().unwrap_or(bytes), |received| {
            if let WsFrame::Close(code, reason) = received {
                let code = code.map_or_else(|| "1005".to_owned(), |code| code.to_string());
                closed = Some(format!("{code} {reason}").trim_end().to_owned());
            }
        });
        if read.is_err() {
            // Compressed messages are not decoded; their content is not needed.
            connection.reader = FrameReader::default();
        }
        if is_upgraded {
            let reader = std::mem::take(&mut connection.reader);
            self.opened(index);
            if let Some(connection) = &mut self.connections[index] {
                connection.reader = reader;
            }
        }
        closed
    }

    /// Counts the end of a connection, and reopens it if the profile says so.
    fn on_closed(&mut self, index: usize, reason: String) {
        self.stats.count_close(reason);
        let profile = self.connections[index].as_ref().map(|connection| connection.profile);
        self.close(index);
        // A profile with `Reopen` opens the next connection anyway.
        if let Some(number) = profile
            && self.profiles[number].reopens
            && self.profiles[number].on_finished != OnFinished::Reopen
            && self.begun[number].0 != u64::MAX
        {
            self.reopening.push_back((Instant::now() + REOPEN_AFTER, number));
        }
    }

    fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections[index].take() {
            self.begun[connection.profile].1 -= 1;
            self.open -= 1;
            self.free.push(index);
        }
    }
}

/// Begins to connect without waiting.
fn dial(target: SocketAddr, source: IpAddr, buffer: Option<usize>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(bytes) = buffer {
        socket.set_recv_buffer_size(bytes)?;
    }
    socket.bind(&SocketAddr::new(source, 0).into())?;
    match socket.connect(&target.into()) {
        Err(error)
            if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) =>
        {
            Err(error)
        }
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}
