//! Many connections on one thread and one epoll: they open when they are due, join a room, send,
//! and what arrives is counted.
//!
//! It is not tokio's, since a task and a wake-up for each read would cost more than the servers it
//! measures. Everything is open-loop: what is due is begun when it is due, whatever became of what
//! was before, and times count from then.

use std::{
    collections::VecDeque,
    io::{self, Read as _},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use loadtest::clock::{self, TimerFd};
use memchr::memmem;
use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use skein_client::frames;
use skein_protocol::ids::RoomId;
use tokio::time::{Duration, Instant};

use crate::{
    args::{ArrivalRate, OpenArgs},
    progress::Progress,
    report::connections::{ConnectOutcome, ConnectionCounters},
    timestamp::SendTimestamp,
    websocket::{self, FrameReader, HandshakeResponse, WsFrame},
};

mod user;
pub(crate) mod workers;
pub(crate) mod metrics;

use metrics::{FrameKind, TrafficMetrics};
use user::{UserState, VirtualUser, dial};
use workers::WorkerShare;

/// The alarm among the sockets.
const TIMER: Token = Token(usize::MAX);
/// How long it is waited at most, so that somebody who wants to stop is heard.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(50);
/// What one read takes.
const READ_BYTES: usize = 256 * 1024;

/// Where virtual users connect, and under which names.
#[derive(Clone, Debug)]
pub(crate) struct ConnectPlan {
    /// What was asked for on the command line.
    pub(crate) open: OpenArgs,
    /// The address that the URL's host has.
    pub(crate) address: SocketAddr,
    /// How many rooms the connections are dealt out to; none where they join none.
    pub(crate) rooms: RoomAssignment,
    /// How many connections there are, those of other processes included.
    pub(crate) connections: u32,
    /// Which of them are this process'.
    pub(crate) share: WorkerShare,
}

/// What rooms the connections join.
#[derive(Clone, Debug)]
pub(crate) enum RoomAssignment {
    /// None.
    None,
    /// All the same one.
    Single(RoomId),
    /// `load-0` and on, in turn.
    RoundRobin(u32),
}

impl ConnectPlan {
    /// How many connections are this process'.
    pub(crate) fn local_count(&self) -> u32 {
        self.share.portion_of(self.connections)
    }

    /// How many rooms there are.
    pub(crate) fn rooms(&self) -> usize {
        match self.rooms {
            RoomAssignment::None | RoomAssignment::Single(_) => 1,
            RoomAssignment::RoundRobin(rooms) => rooms as usize,
        }
    }

    /// The number of a room that an own connection joins.
    pub(crate) fn room_of(&self, user: usize) -> usize {
        self.share.global_index(user) as usize % self.rooms()
    }

    /// The name of a room.
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
    /// What became of connections.
    pub(crate) connections: ConnectionCounters,
    /// What was seen of messages.
    pub(crate) metrics: TrafficMetrics,
    /// Whether messages are looked at, and not just passed over.
    counts_messages: bool,
    stop: Arc<AtomicBool>,
    poll: Poll,
    events: Option<Events>,
    timer: TimerFd,
    users: Vec<VirtualUser>,
    /// Who has to be open when, the earliest first.
    opening: VecDeque<(Instant, usize, u32)>,
    buffer: Box<[u8]>,
    /// The same moment by both clocks.
    origin: (Instant, u64),
    last_delivery: Instant,
    /// Messages that were ever sent, so that none has the id of an earlier one.
    sent: usize,
    progress: Progress,
}

impl VirtualUsers {
    /// Connections that are all away.
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

    /// Whether somebody wants it to stop.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// How many are open.
    pub(crate) fn open_count(&self) -> u64 {
        self.metrics.timeline.open()
    }

    /// Whether a connection is open.
    pub(crate) fn is_open(&self, user: usize) -> bool {
        self.users[user].state == UserState::Open
    }

    /// The number of the last message that a connection got.
    pub(crate) fn seq(&self, user: usize) -> u64 {
        self.users[user].seq
    }

    /// The highest number that was seen in each room.
    pub(crate) fn last_seqs(&self) -> Vec<u64> {
        let mut last_seqs = vec![0; self.plan.rooms()];
        for (index, user) in self.users.iter().enumerate() {
            let top = &mut last_seqs[self.plan.room_of(index)];
            *top = user.seq.max(*top);
        }
        last_seqs
    }

    /// What an open connection got since it was opened, for each that is open and reads.
    pub(crate) fn received(&self) -> impl Iterator<Item = (usize, u64)> {
        let open =
            |(_, user): &(usize, &VirtualUser)| user.state == UserState::Open && !user.stalled;
        let all = self.users.iter().enumerate().filter(open);
        all.map(|(index, user)| (index, user.received))
    }

    /// Forgets what was seen so far, to measure from here on.
    pub(crate) fn start_measuring(&mut self) {
        self.metrics = TrafficMetrics::new(self.plan.rooms(), self.open_count());
        self.users.iter_mut().for_each(|user| user.received = 0);
        self.last_delivery = Instant::now();
    }

    /// Opens all that are away until each is open or has failed: each when it is due, or, without a
    /// rate, one after the other as fast as this goes.
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
                // Dealt out over all processes, so that together they keep the rate.
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

    /// Takes what arrives until a moment.
    pub(crate) fn run_until(&mut self, end: Instant) -> io::Result<()> {
        while Instant::now() < end && !self.is_stopped() {
            self.step(end)?;
        }
        Ok(())
    }

    /// Waits for what arrives, or for a moment, and takes it. Returns at the latest after some
    /// time, to be asked again.
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
        let user = &mut self.users[index];
        let attempt = user.attempt + 1;
        *user = VirtualUser { stream: Some(stream), attempt, due, ..VirtualUser::new(due) };
        user.state = UserState::Connecting;
        user.reader.keeps_payload = true;
        self.opening.push_back((Instant::now() + self.plan.open.timeout, index, attempt));
    }

    /// Gives up what has taken too long to open.
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
            if let Some(error) = stream.take_error().ok().flatten() {
                return Err(format!("connect: {}", error.kind()));
            }
            // Both say so while TCP is not done.
            if stream.peer_addr().is_err() {
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
                // A short read has emptied the socket.
                Ok(count) => {
                    self.handle_bytes(index, &buffer[..count]).map(|()| count == buffer.len())
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
                Err(error) => Err(io_reason(&error)),
            };
            self.buffer = buffer;
            if !done? {
                return Ok(());
            }
        }
    }

    /// Takes what has arrived on a connection.
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
        // Who is open and only held passes messages over.
        reader.keeps_payload = self.counts_messages || self.users[index].state != UserState::Open;
        self.users[index].reader = reader;
        pushed.map_err(|error| format!("frames: {error}"))?;
        done?;
        if !pongs.is_empty() {
            self.users[index].send(&pongs).map_err(|error| io_reason(&error))?;
        }
        match (closed, self.users[index].state) {
            (None, _) => Ok(()),
            (Some(how), UserState::Open) => Err(how),
            (Some(how), _) => Err(format!("closed before it was open: {how}")),
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
                // Who passes messages over needs no number, and the servers of the bench give none.
                if self.counts_messages {
                    user.seq = metrics::parse_seq(message)?;
                }
                self.opened(index, now);
            }
            (UserState::Joining, FrameKind::Error) => {
                return Err(format!("join refused: {}", error_code(message)));
            }
            (UserState::Open, FrameKind::Message) => self.on_room_message(index, message, now),
            (UserState::Open, FrameKind::Ack) => {
                let room = self.plan.room_of(index);
                self.metrics.counters.acknowledged[room] += 1;
                self.metrics.timeline.acknowledged(now);
            }
            (UserState::Open, FrameKind::Error) => {
                self.metrics.counters.refused += 1;
                self.metrics.timeline.refused(now);
                self.metrics.counters.example(|| format!("refused: {}", error_code(message)));
            }
            // Without a room it is of the inbox, in which nothing is said here.
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
        // That a message waited for who did not read says nothing about a server.
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

    /// Has an own connection send a message that was due then.
    pub(crate) fn send(&mut self, index: usize, due: Instant, bytes: usize) {
        let now = Instant::now();
        self.metrics.record_lag(due, now);
        if self.users[index].state != UserState::Open {
            self.metrics.counters.sent += 1;
            self.metrics.counters.refused += 1;
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
        // Random as any id of this version, and different in each run.
        let run = self.origin.1 & 0xFFFF_FFFF;
        let content = timestamp.content(bytes);
        let frame = websocket::text(&format!(
            r#"{{"type":"message","room":"{room}","id":"{run:08x}-0000-4000-8000-{number:012x}","content":"{content}"}}"#
        ));
        if let Err(error) = self.users[index].send(&frame) {
            self.fail(index, io_reason(&error));
        }
    }

    /// Has a connection leave what arrives in its socket, or take it again.
    pub(crate) fn stall(&mut self, index: usize, stalled: bool) {
        let user = &mut self.users[index];
        user.stalled = stalled;
        user.has_stalled |= stalled;
        if !stalled && self.users[index].stream.is_some() {
            // What came meanwhile is no news to epoll.
            self.on_event(index, true, true);
        }
    }

    /// Closes all at once and without a word, as if their network were gone, or all their servers.
    pub(crate) fn drop_all(&mut self) {
        let now = Instant::now();
        for user in &mut self.users {
            if user.state == UserState::Open {
                self.metrics.timeline.ended(now);
            }
            let attempt = user.attempt;
            *user = VirtualUser { attempt, ..VirtualUser::new(now) };
        }
        // Their outcomes belong to the round before.
        self.connections = ConnectionCounters::default();
        self.opening.clear();
    }

    /// Says goodbye on all that are open.
    pub(crate) fn close_all(&mut self) {
        for user in &mut self.users {
            if user.state == UserState::Open {
                // The server may have gone first.
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
    format!("no close frame: {}", error.kind())
}

fn close_reason(code: Option<u16>, reason: &str) -> String {
    match (code, reason) {
        (None, _) => "1005".to_owned(),
        (Some(code), "") => code.to_string(),
        (Some(code), reason) => format!("{code} {reason}"),
    }
}

/// The code of an `error`.
fn error_code(message: &[u8]) -> String {
    let frame: Option<serde_json::Value> = serde_json::from_slice(message).ok();
    let code = frame.as_ref().and_then(|frame| frame["code"].as_str());
    code.unwrap_or("an error without a code").to_owned()
}
