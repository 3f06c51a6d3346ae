//! Virtual users: many connections on one thread and one epoll, which open when they are due, join
//! a room, send, and count the frames they receive.
//!
//! The module does not use tokio's sockets: a task and a wake-up per read would cost more than the
//! servers under test. Everything is open loop: an operation begins when it is due, whatever became
//! of earlier ones, and times count from the due time.

use std::{
    collections::VecDeque,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use memchr::memmem;
use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use skein_client::frames;
use skein_protocol::ids::RoomId;
use skein_testkit::clock::{self, TimerFd};
use tokio::time::{Duration, Instant};

use crate::{
    args::{ArrivalRate, OpenArgs},
    progress::Progress,
    report::connections::{ConnectOutcome, ConnectionCounters},
    timestamp::SendTimestamp,
    tls::TlsConnector,
    websocket::{self, FrameReader, HandshakeResponse, WsFrame},
};

mod stream;
mod user;
pub(crate) mod share;
pub(crate) mod workers;
pub(crate) mod metrics;

use metrics::{FrameKind, TrafficMetrics};
use share::WorkerShare;
use stream::UserStream;
use user::{UserState, VirtualUser, dial};

/// Token of the timer among the sockets.
const TIMER: Token = Token(usize::MAX);
/// Longest wait of one step, after which the stop flag is checked.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// Size of one read.
const READ_BYTES: usize = 256 * 1024;

/// Where virtual users connect, and under which names.
#[derive(Clone, Debug)]
pub(crate) struct ConnectPlan {
    /// Options of the command line.
    pub(crate) open: OpenArgs,
    /// Resolved address of the URL's host.
    pub(crate) address: SocketAddr,
    /// TLS; `None` for a `ws://` URL.
    pub(crate) tls: Option<TlsConnector>,
    /// Rooms over which the connections are spread.
    pub(crate) rooms: RoomAssignment,
    /// Number of connections, those of other workers included.
    pub(crate) connections: u32,
    /// The share of the connections that this worker opens.
    pub(crate) share: WorkerShare,
}

/// The rooms that connections join.
#[derive(Clone, Debug)]
pub(crate) enum RoomAssignment {
    /// No room.
    None,
    /// The same room for all.
    Single(RoomId),
    /// So many rooms in turn: `load-0` and up.
    RoundRobin(u32),
}

impl ConnectPlan {
    /// Number of connections of this worker.
    pub(crate) fn local_count(&self) -> u32 {
        self.share.portion_of(self.connections)
    }

    /// Number of rooms; 1 if the connections join none.
    pub(crate) fn rooms(&self) -> usize {
        match self.rooms {
            RoomAssignment::None | RoomAssignment::Single(_) => 1,
            RoomAssignment::RoundRobin(rooms) => rooms as usize,
        }
    }

    /// Index of the room that connection `user` of this worker joins.
    pub(crate) fn room_of(&self, user: usize) -> usize {
        self.share.global_index(user) as usize % self.rooms()
    }

    /// Name of a room.
    fn room(&self, number: usize) -> Option<RoomId> {
        match &self.rooms {
            RoomAssignment::None => None,
            RoomAssignment::Single(room) => Some(room.clone()),
            RoomAssignment::RoundRobin(_) => format!("load-{number}").parse().ok(),
        }
    }

    fn path(&self, user: usize) -> String {
        let OpenArgs { url, token, user_prefix, .. } = &self.open;
        match token {
            Some(token) => url.path_with("token", token),
            None => {
                url.path_with("user", &format!("{user_prefix}{}", self.share.global_index(user)))
            }
        }
    }

    fn source(&self, user: usize) -> Option<IpAddr> {
        let number = self.share.global_index(user);
        self.open.sources.as_ref().map(|sources| sources.address(number))
    }
}

/// Virtual users, one connection each.
pub(crate) struct VirtualUsers {
    pub(crate) plan: ConnectPlan,
    /// Counters of opened, rejected, failed and closed connections.
    pub(crate) connections: ConnectionCounters,
    /// Metrics of messages.
    pub(crate) metrics: TrafficMetrics,
    /// Whether messages are parsed and counted, or skipped unread.
    counts_messages: bool,
    stop: Arc<AtomicBool>,
    poll: Poll,
    events: Option<Events>,
    timer: TimerFd,
    users: Vec<VirtualUser>,
    /// Deadlines of connections that are opening, with user and attempt; the earliest first.
    opening: VecDeque<(Instant, usize, u32)>,
    buffer: Box<[u8]>,
    /// The same moment by tokio's clock and by [`clock::monotonic_ns`].
    origin: (Instant, u64),
    last_delivery: Instant,
    /// Messages sent since the start, so that each has an id of its own.
    sent: usize,
    progress: Progress,
}

impl VirtualUsers {
    /// Creates virtual users that are all disconnected.
    pub(crate) fn new(
        plan: ConnectPlan,
        counts_messages: bool,
        stop: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let (poll, timer, now) = (Poll::new()?, TimerFd::new()?, Instant::now());
        poll.registry().register(&mut SourceFd(&timer.fd()), TIMER, Interest::READABLE)?;
        let users = (0..plan.local_count()).map(|_| VirtualUser::new(now)).collect();
        let alone = plan.share == WorkerShare::ALL;
        let progress = if alone { Progress::new() } else { Progress::hidden() };
        Ok(Self {
            metrics: TrafficMetrics::new(plan.rooms(), 0),
            plan,
            connections: ConnectionCounters::default(),
            counts_messages,
            stop,
            poll,
            events: Some(Events::with_capacity(1024)),
            timer,
            users,
            opening: VecDeque::new(),
            buffer: vec![0; READ_BYTES].into(),
            origin: (now, clock::monotonic_ns()),
            last_delivery: now,
            sent: 0,
            progress,
        })
    }

    /// Whether the run is to stop.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Number of open connections.
    pub(crate) fn open_count(&self) -> u64 {
        self.metrics.timeline.open()
    }

    /// Whether a connection is open.
    pub(crate) fn is_open(&self, user: usize) -> bool {
        self.users[user].state == UserState::Open
    }

    /// `seq` of the last message that a connection received.
    pub(crate) fn seq(&self, user: usize) -> u64 {
        self.users[user].seq
    }

    /// Highest `seq` that was received in each room.
    pub(crate) fn last_seqs(&self) -> Vec<u64> {
        let mut last_seqs = vec![0; self.plan.rooms()];
        for (index, user) in self.users.iter().enumerate() {
            let top = &mut last_seqs[self.plan.room_of(index)];
            *top = user.seq.max(*top);
        }
        last_seqs
    }

    /// Messages received since joining, for each connection that is open and reads.
    pub(crate) fn received(&self) -> impl Iterator<Item = (usize, u64)> {
        let open =
            |(_, user): &(usize, &VirtualUser)| user.state == UserState::Open && !user.stalled;
        let all = self.users.iter().enumerate().filter(open);
        all.map(|(index, user)| (index, user.received))
    }

    /// Resets the metrics, so that measurement begins now.
    pub(crate) fn start_measuring(&mut self) {
        self.metrics = TrafficMetrics::new(self.plan.rooms(), self.open_count());
        self.users.iter_mut().for_each(|user| user.received = 0);
        self.last_delivery = Instant::now();
    }

    /// Opens all disconnected connections and returns when each is open or has failed. With a rate
    /// each opens when it is due; without one they open one after the other as fast as possible.
    pub(crate) fn open_all(&mut self, ramp: Option<ArrivalRate>) -> io::Result<Duration> {
        let began = Instant::now();
        let away = self.users.iter().enumerate();
        let away = away.filter(|(_, user)| user.state == UserState::Disconnected);
        let away: Vec<usize> = away.map(|(index, _)| index).collect();
        let mut next = 0;
        loop {
            let mut wake = began + STOP_CHECK_INTERVAL + began.elapsed();
            while let Some(&index) = away.get(next) {
                let now = Instant::now();
                // The index over all workers, so that together they keep the rate.
                let turn = self.plan.share.global_index(next);
                let due = ramp.map_or(now, |ramp| began + ramp.due(turn.into()));
                if due > now {
                    wake = due;
                    break;
                }
                self.metrics.record_lag(due, now);
                self.dial(index, due);
                next += 1;
            }
            let is_over = next == away.len() && !self.users.iter().any(VirtualUser::is_opening);
            if is_over || self.is_stopped() {
                return Ok(began.elapsed());
            }
            self.step(wake)?;
        }
    }

    /// Handles events until `end`.
    pub(crate) fn run_until(&mut self, end: Instant) -> io::Result<()> {
        while Instant::now() < end && !self.is_stopped() {
            self.step(end)?;
        }
        Ok(())
    }

    /// Waits for events until `wake`, at most [`STOP_CHECK_INTERVAL`], and handles them.
    pub(crate) fn step(&mut self, wake: Instant) -> io::Result<()> {
        self.expire_openings();
        self.progress.show(&mut self.metrics.timeline);
        let mut wake = wake.min(Instant::now() + STOP_CHECK_INTERVAL);
        if let Some((deadline, ..)) = self.opening.front() {
            wake = wake.min(*deadline);
        }
        self.timer.set(wake.saturating_duration_since(Instant::now()))?;
        let mut events = self.events.take().expect("put back below");
        let polled = self.poll.poll(&mut events, None);
        match polled {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => events.clear(),
            other => other?,
        }
        for event in &events {
            let token = event.token();
            if token != TIMER {
                self.on_event(token.0, event.is_readable(), event.is_writable());
            }
        }
        self.events = Some(events);
        Ok(())
    }

    fn dial(&mut self, index: usize, due: Instant) {
        let source = self.plan.source(index);
        let mut stream = match dial(self.plan.address, source) {
            Ok(stream) => stream,
            Err(error) => {
                let reason = format!("connect: {}", error.kind());
                self.connections.add(ConnectOutcome::Failed { reason });
                return;
            }
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        if let Err(error) = self.poll.registry().register(&mut stream, Token(index), interest) {
            self.connections.add(ConnectOutcome::Failed { reason: error.to_string() });
            return;
        }
        let stream = match UserStream::new(stream, self.plan.tls.as_ref()) {
            Ok(stream) => stream,
            Err(error) => {
                self.connections.add(ConnectOutcome::Failed { reason: error.to_string() });
                return;
            }
        };
        let user = &mut self.users[index];
        let attempt = user.attempt + 1;
        *user = VirtualUser { stream: Some(stream), attempt, due, ..VirtualUser::new(due) };
        user.state = UserState::Connecting;
        user.reader.keeps_payload = true;
        self.opening.push_back((Instant::now() + self.plan.open.timeout, index, attempt));
    }

    /// Fails connections whose time to open is over.
    fn expire_openings(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, index, attempt)) = self.opening.front() {
            let user = &self.users[index];
            let is_over = user.attempt != attempt || !user.is_opening();
            if !is_over && deadline > now {
                return;
            }
            self.opening.pop_front();
            if !is_over {
                self.fail(index, "timed out".to_owned());
            }
        }
    }

    fn on_event(&mut self, index: usize, readable: bool, writable: bool) {
        if self.users[index].stream.is_none() {
            return;
        }
        let mut done = Ok(());
        if writable {
            done = self.on_writable(index);
        }
        if done.is_ok() && readable && !self.users[index].stalled {
            done = self.read_socket(index);
        }
        if let Err(reason) = done {
            self.fail(index, reason);
        }
    }

    fn on_writable(&mut self, index: usize) -> Result<(), String> {
        let user = &mut self.users[index];
        if user.state == UserState::Connecting {
            let Some(stream) = &user.stream else { return Ok(()) };
            let tcp = stream.tcp();
            if let Some(error) = tcp.take_error().ok().flatten() {
                return Err(format!("connect: {}", error.kind()));
            }
            // Both calls report this while TCP is still connecting.
            if tcp.peer_addr().is_err() {
                return Ok(());
            }
            user.state = UserState::Upgrading;
            let request =
                websocket::handshake_request(&self.plan.open.url.authority, &self.plan.path(index));
            return self.users[index].send(&request).map_err(|error| io_reason(&error));
        }
        user.flush().map_err(|error| io_reason(&error))
    }

    fn read_socket(&mut self, index: usize) -> Result<(), String> {
        loop {
            let mut buffer = std::mem::take(&mut self.buffer);
            let user = &mut self.users[index];
            let read = match &mut user.stream {
                Some(stream) => stream.read(&mut buffer),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
            let done = match read {
                Ok(0) => Err(io_reason(&io::ErrorKind::UnexpectedEof.into())),
                // A short read has emptied a socket, but not what TLS has decrypted.
                Ok(count) => {
                    let may_have_more = count == buffer.len() || self.plan.tls.is_some();
                    self.handle_bytes(index, &buffer[..count]).map(|()| may_have_more)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
                Err(error) => Err(io_reason(&error)),
            };
            self.buffer = buffer;
            if !done? {
                break;
            }
        }
        if self.plan.tls.is_some() {
            // Reading completes the TLS handshake, before which nothing could be sent.
            self.users[index].flush().map_err(|error| io_reason(&error))?;
        }
        Ok(())
    }

    /// Handles bytes that a connection received.
    fn handle_bytes(&mut self, index: usize, bytes: &[u8]) -> Result<(), String> {
        self.connections.add_received(bytes.len());
        let user = &mut self.users[index];
        let head;
        let mut bytes = bytes;
        if user.state == UserState::Upgrading {
            user.head.extend_from_slice(bytes);
            match websocket::parse_response(&user.head)
                .map_err(|error| format!("handshake: {error}"))?
            {
                None => return Ok(()),
                Some(HandshakeResponse::Rejected { status }) => {
                    self.close(index, ConnectOutcome::Rejected { status });
                    return Ok(());
                }
                Some(HandshakeResponse::Upgraded { end }) => {
                    head = std::mem::take(&mut user.head);
                    bytes = &head[end..];
                    user.state = UserState::AwaitingConnected;
                }
            }
        }
        let mut reader = std::mem::take(&mut self.users[index].reader);
        let (now, mut pongs, mut closed) = (Instant::now(), Vec::new(), None);
        let mut done = Ok(());
        let pushed = reader.push(bytes, |received| match received {
            WsFrame::Message(Some(message)) if done.is_ok() => {
                done = self.on_message(index, &message, now);
            }
            WsFrame::Message(_) | WsFrame::Pong(_) => {}
            WsFrame::Ping(payload) => pongs.extend(websocket::pong(&payload)),
            WsFrame::Close(code, reason) => closed = Some(close_reason(code, &reason)),
        });
        // An open connection that only holds skips messages unread.
        reader.keeps_payload = self.counts_messages || self.users[index].state != UserState::Open;
        self.users[index].reader = reader;
        pushed.map_err(|error| format!("frames: {error}"))?;
        done?;
        if !pongs.is_empty() {
            self.users[index].send(&pongs).map_err(|error| io_reason(&error))?;
        }
        match (closed, self.users[index].state) {
            (None, _) => Ok(()),
            (Some(reason), UserState::Open) => Err(reason),
            (Some(reason), _) => Err(format!("closed while opening: {reason}")),
        }
    }

    fn on_message(&mut self, index: usize, message: &[u8], now: Instant) -> Result<(), String> {
        let kind = FrameKind::of(message);
        let user = &mut self.users[index];
        match (user.state, kind) {
            (UserState::AwaitingConnected, FrameKind::Connected) => {
                user.connected = now.saturating_duration_since(user.due);
                let Some(room) = self.plan.room(self.plan.room_of(index)) else {
                    self.opened(index, now);
                    return Ok(());
                };
                let join =
                    frames::OutgoingJoin { history: Some(0), ..frames::OutgoingJoin::new(&room) };
                let user = &mut self.users[index];
                user.state = UserState::Joining;
                let join = websocket::text(&frames::encode_text(&join));
                return user.send(&join).map_err(|error| io_reason(&error));
            }
            (UserState::Joining, FrameKind::Joined) => {
                // A connection that skips messages needs no `seq`, and the other servers of the
                // bench send none.
                if self.counts_messages {
                    user.seq = metrics::parse_seq(message)?;
                }
                self.opened(index, now);
            }
            (UserState::Joining, FrameKind::Error) => {
                return Err(format!("join rejected: {}", error_code(message)));
            }
            (UserState::Open, FrameKind::Message) => self.on_room_message(index, message, now),
            (UserState::Open, FrameKind::Ack) => {
                let room = self.plan.room_of(index);
                self.metrics.counters.acknowledged[room] += 1;
                self.metrics.timeline.acknowledged(now);
            }
            (UserState::Open, FrameKind::Error) => {
                self.metrics.counters.rejected += 1;
                self.metrics.timeline.rejected(now);
                self.metrics.counters.example(|| format!("rejected: {}", error_code(message)));
            }
            // A reset without a room concerns the inbox, which this load does not use.
            (UserState::Open, FrameKind::Reset)
                if memmem::find(message, br#""room":"#).is_some() =>
            {
                user.seq = metrics::parse_seq(message)?;
                self.metrics.counters.signalled_discontinuities += 1;
            }
            _ => {}
        }
        Ok(())
    }

    fn on_room_message(&mut self, index: usize, message: &[u8], now: Instant) {
        let monotonic_ns = self.monotonic_ns(now);
        let user = &mut self.users[index];
        if let Some(seq) = metrics::find_seq(message) {
            self.metrics.counters.count_seq(index, user.seq, seq);
            user.seq = seq;
        }
        user.received += 1;
        // The latency of a message that waited for a stalled reader says nothing about the server.
        let timestamp = SendTimestamp::find(message).filter(|_| !user.has_stalled);
        let latency = timestamp
            .map(|timestamp| Duration::from_nanos(monotonic_ns.saturating_sub(timestamp.due_ns)));
        self.metrics.delivered(now, latency);
        let silence = now.saturating_duration_since(self.last_delivery).as_millis() as u64;
        self.last_delivery = now;
        let longest = &mut self.metrics.counters.longest_silence_ms;
        *longest = (*longest).max(silence);
    }

    fn opened(&mut self, index: usize, now: Instant) {
        let user = &mut self.users[index];
        let joined =
            (user.state == UserState::Joining).then(|| now.saturating_duration_since(user.due));
        user.state = UserState::Open;
        self.connections.add(ConnectOutcome::Opened { connected: user.connected, joined });
        self.metrics.timeline.connected(now);
    }

    /// A moment by the clock that all processes share.
    fn monotonic_ns(&self, at: Instant) -> u64 {
        let (origin, origin_ns) = self.origin;
        origin_ns + at.saturating_duration_since(origin).as_nanos() as u64
    }

    /// Sends a message of `bytes` content bytes that was due at `due`.
    pub(crate) fn send(&mut self, index: usize, due: Instant, bytes: usize) {
        let now = Instant::now();
        self.metrics.record_lag(due, now);
        if self.users[index].state != UserState::Open {
            self.metrics.counters.sent += 1;
            self.metrics.counters.rejected += 1;
            self.metrics.counters.example(|| "not sent: its sender is not connected".to_owned());
            return;
        }
        let number = self.plan.share.global_index(self.sent);
        self.sent += 1;
        self.metrics.counters.sent += 1;
        let timestamp = SendTimestamp {
            sender: self.plan.share.global_index(index),
            due_ns: self.monotonic_ns(due),
        };
        let Some(room) = self.plan.room(self.plan.room_of(index)) else { return };
        // As random as any id of this version, and different in each run.
        let run = self.origin.1 & 0xFFFF_FFFF;
        let content = timestamp.content(bytes);
        let frame = websocket::text(&format!(
            r#"{{"type":"message","room":"{room}","id":"{run:08x}-0000-4000-8000-{number:012x}","content":"{content}"}}"#
        ));
        if let Err(error) = self.users[index].send(&frame) {
            self.fail(index, io_reason(&error));
        }
    }

    /// Makes a connection leave received bytes in its socket (`stalled`), or read again.
    pub(crate) fn stall(&mut self, index: usize, stalled: bool) {
        let user = &mut self.users[index];
        user.stalled = stalled;
        user.has_stalled |= stalled;
        if !stalled && self.users[index].stream.is_some() {
            // epoll does not report again the bytes that arrived meanwhile.
            self.on_event(index, true, true);
        }
    }

    /// Closes all connections at once without a close frame, as a failure of the network or of all
    /// servers would.
    pub(crate) fn drop_all(&mut self) {
        let now = Instant::now();
        for user in &mut self.users {
            if user.state == UserState::Open {
                self.metrics.timeline.ended(now);
            }
            let attempt = user.attempt;
            *user = VirtualUser { attempt, ..VirtualUser::new(now) };
        }
        // The counters of these connections belong to the round before.
        self.connections = ConnectionCounters::default();
        self.opening.clear();
    }

    /// Sends a close frame on all open connections.
    pub(crate) fn close_all(&mut self) {
        for user in &mut self.users {
            if user.state == UserState::Open {
                // The server may have closed first.
                let _ = user.send(&websocket::close(1000));
            }
        }
    }

    fn fail(&mut self, index: usize, reason: String) {
        let outcome = match self.users[index].state {
            UserState::Open => ConnectOutcome::Closed { reason },
            _ => ConnectOutcome::Failed { reason },
        };
        self.close(index, outcome);
    }

    fn close(&mut self, index: usize, outcome: ConnectOutcome) {
        let user = &mut self.users[index];
        if user.state == UserState::Open {
            self.metrics.timeline.ended(Instant::now());
        }
        (user.stream, user.state) = (None, UserState::Disconnected);
        (user.unsent, user.head, user.reader) = (Vec::new(), Vec::new(), FrameReader::default());
        self.connections.add(outcome);
    }
}

fn io_reason(error: &io::Error) -> String {
    // An error of TLS, such as an unknown issuer of the certificate.
    if error.kind() == io::ErrorKind::InvalidData {
        return format!("TLS: {error}");
    }
    format!("no close frame: {}", error.kind())
}

fn close_reason(code: Option<u16>, reason: &str) -> String {
    match (code, reason) {
        (None, _) => "1005".to_owned(),
        (Some(code), "") => code.to_string(),
        (Some(code), reason) => format!("{code} {reason}"),
    }
}

/// The `code` of an `error` frame.
fn error_code(message: &[u8]) -> String {
    let frame: Option<serde_json::Value> = serde_json::from_slice(message).ok();
    let code = frame.as_ref().and_then(|frame| frame["code"].as_str());
    code.unwrap_or("error without a code").to_owned()
}
