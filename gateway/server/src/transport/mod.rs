//! One WebSocket connection after its upgrade: reads and decodes input, answers pings, keeps its
//! timeouts, and closes in order. [`sse`] serves an event stream.
//!
//! One task per connection. It waits until the socket is readable, reads into a buffer of the
//! thread and handles the input; it writes only bytes that the outbox could not write at once. An
//! idle connection holds no buffer. Frames are handled in the order sent: while one waits (a join),
//! later ones stay in `unread`.
//!
//! A [`InputBudget`] bounds how much of a connection's input is handled before the task yields, and
//! a [`Meter`] how much in all: a connection above its rates is not read until they allow it.

use std::{
    cell::RefCell,
    future::poll_fn,
    io::{self, Read as _},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt as _;
use skein_protocol::{
    close::CloseCode,
    ids::ConnectionId,
    protocol::{
        client_frame::ClientFrame as Frame,
        server_frame::{ReconnectReason, ServerFrame, ServerPingFrame},
    },
};
use skein_websocket::{Decoder, DecoderEvent, Opcode};
use tokio::{
    io::Interest,
    net::TcpStream,
    sync::{Semaphore, watch},
    time::Instant,
};

use skein_core::{
    bus::{BoxFuture, node_state::BusStatus, output_of, presence_store::unix_millis_now},
    connection::{encoding::Encoding, handle::ConnectionHandle, outbox::Close},
    drain::{
        schedule::{DrainNotice, MoveAdvice},
        supervision::catch_panic,
    },
    limits::{
        address_key,
        meter::{InputBudget, Meter, MeterDecision},
    },
    session::{DeferredRequest, RequestOutcome, Session},
    telemetry::{
        metrics::{FrameKind, Metrics},
        top::{InputCounts, Portion},
    },
};

pub mod echo;
pub mod sse;
mod closing;
pub mod timer;

pub use closing::ConnectionEnd;
use closing::{CloseInitiator, close_for};
use echo::Echo;
use timer::{TimerEntry, TimerWheel};

/// Bytes of one read. The buffer belongs to the thread, so that its size costs little.
const READ_BYTES: usize = 64 * 1024;

thread_local! {
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// Ping interval and timeouts of a connection.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// Time between pings.
    pub interval: Duration,
    /// Longest time without input; then close with 4002.
    pub idle_timeout: Duration,
    /// Longest time without progress in writing; then close with 4003.
    pub write_timeout: Duration,
}

/// Options of a connection.
#[derive(Clone, Debug)]
pub struct ConnectionOptions {
    /// Largest message in bytes.
    pub message_bytes_max: usize,
    /// Ping interval and timeouts.
    pub heartbeat: Arc<Heartbeat>,
    /// Whether to send `ping` frames in JSON instead of WebSocket pings.
    pub json_ping: bool,
}

/// Receiver of the frames of a connection.
pub enum Handler {
    /// `/ws`
    Chat(Box<Session>),
    /// `/ws/echo`
    Echo(Echo),
}

/// A WebSocket after its handshake.
pub struct WebSocketConnection {
    handle: Arc<ConnectionHandle>,
    handler: Handler,
    decoder: Decoder,
    heartbeat: Arc<Heartbeat>,
    /// Whether to send `ping` frames in JSON instead of WebSocket pings.
    json_ping: bool,
    timer: TimerEntry,
    metrics: Arc<Metrics>,
    meter: Meter,
    /// Received bytes that are not handled yet.
    unread: Vec<u8>,
    /// Whether `unread` has bytes from an earlier round.
    has_backlog: bool,
    /// Whether the last ping has no pong yet.
    awaits_pong: bool,
    /// Input that is not reported yet.
    portion: Portion,
    /// The type of the frame that arrived alone and whose handling is timed.
    timed: Option<FrameKind>,
    /// Whether the outbox is full, so that no input is read.
    outbox_full: bool,
    /// Messages received, modulo 2^32.
    received: u32,
    /// Set while the meter pauses reading.
    paused_until: Option<Instant>,
    last_received: Instant,
    last_ping: Instant,
    expires: Option<Instant>,
}

/// Reason for which handling input stopped.
enum InputStep {
    /// All input is handled, or the input budget is used up.
    More,
    /// The outbox is full: the client must read its replies first.
    Full,
    /// This request must complete before the next frame.
    Perform(DeferredRequest),
    /// The connection closes.
    Close(CloseInitiator),
}

/// End of serving a connection.
enum ServeEnd {
    /// The peer has disconnected.
    Gone,
    /// A close frame is queued.
    Close { close: Close, ending: CloseInitiator },
    /// The client moves to another node.
    Move(MoveAdvice, ReconnectReason),
}

impl WebSocketConnection {
    /// Creates a connection after its handshake; `early` is input that arrived with it.
    ///
    /// The outbox of `handle` must have a socket.
    pub fn new(
        handle: Arc<ConnectionHandle>,
        handler: Handler,
        options: ConnectionOptions,
        meter: Meter,
        wheel: Arc<TimerWheel>,
        metrics: Arc<Metrics>,
        early: Vec<u8>,
    ) -> Self {
        let now = Instant::now();
        let expires = expires_of(&handler);
        let timer = TimerEntry::new(wheel, handle.clone());
        let decoder = match handle.outbox.encoding() {
            Encoding::Deflate(_) => Decoder::with_deflate(options.message_bytes_max),
            Encoding::WebSocket | Encoding::Json => Decoder::new(options.message_bytes_max),
        };
        Self {
            handle,
            handler,
            decoder,
            heartbeat: options.heartbeat,
            json_ping: options.json_ping,
            timer,
            metrics,
            meter,
            unread: early,
            has_backlog: false,
            awaits_pong: false,
            timed: None,
            portion: Portion::default(),
            outbox_full: false,
            received: 0,
            paused_until: None,
            last_received: now,
            last_ping: now,
            expires,
        }
    }

    /// Returns the id of the connection.
    pub fn id(&self) -> ConnectionId {
        self.handle.connection
    }

    /// Returns the handle of the connection.
    pub fn connection(&self) -> &ConnectionHandle {
        &self.handle
    }

    /// Returns the number of messages received, modulo 2^32.
    pub fn received(&self) -> u32 {
        self.received
    }

    /// Returns the session of a chat connection.
    pub fn session(&mut self) -> Option<&mut Session> {
        match &mut self.handler {
            Handler::Chat(session) => Some(session),
            Handler::Echo(_) => None,
        }
    }

    /// Serves the connection until it ends. Returns how it ended.
    ///
    /// Steps that happen once per connection are boxed, so that the task, which lives as long as
    /// the connection, is no larger than serving needs. The session ends once `ending` has a
    /// permit.
    pub async fn run(&mut self, drain: &DrainNotice<'_>, ending: &Semaphore) -> ConnectionEnd {
        let served = catch_panic(self.serve(drain)).await;
        let end = match served.unwrap_or_else(|panic| self.panicked(&panic)) {
            ServeEnd::Gone => ConnectionEnd::lost(),
            ServeEnd::Close { close, ending } => Box::pin(self.close(close, ending)).await,
            ServeEnd::Move(advice, reason) => Box::pin(self.close_to_move(advice, reason)).await,
        };
        let handle = self.handle.clone();
        let _permit = ending.acquire().await;
        if let Some(session) = self.session() {
            Box::pin(session.end()).await;
        }
        let rest = self.portion.take();
        self.report_input(rest, Instant::now());
        // The hub may hold the handle for a moment longer.
        handle.outbox.discard();
        end
    }

    /// Closes the connection after a panic in its handler; the client reconnects.
    fn panicked(&self, panic: &str) -> ServeEnd {
        self.metrics.panicked(self.handle.connection, panic);
        let close =
            Close { code: CloseCode::InternalError.number(), reason: "internal".to_owned() };
        self.handle.outbox.close(close.clone());
        // A close that had begun before the panic counts.
        let close = self.handle.outbox.begin_close().unwrap_or(close);
        ServeEnd::Close { close, ending: CloseInitiator::Failed }
    }

    async fn serve(&mut self, drain: &DrainNotice<'_>) -> ServeEnd {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let Some(socket) = outbox.socket() else { return ServeEnd::Gone };
        let mut performing: Option<BoxFuture<RequestOutcome>> = None;
        let mut status_rx = self.session().map(|session| session.bus_status());
        let mut budget = InputBudget::default();
        loop {
            if let Some(close) = outbox.begin_close() {
                return ServeEnd::Close { close, ending: CloseInitiator::ByGateway };
            }
            if let Some(route) = handle.moves_to() {
                let advice = MoveAdvice { after_ms: 0, node: Some(route.to_owned()) };
                return ServeEnd::Move(advice, ReconnectReason::Rebalance);
            }
            if performing.is_none()
                && let Handler::Chat(session) = &mut self.handler
            {
                // Before the input, so that frames of these rooms are rejected.
                session.handle_evictions().await;
            }
            if performing.is_none() && !self.is_paused() {
                if self.has_backlog && is_write_closed(socket) {
                    return ServeEnd::Gone;
                }
                let step = self.handle_unread(&mut budget);
                self.outbox_full = matches!(step, InputStep::Full);
                match step {
                    InputStep::More | InputStep::Full => {}
                    // The client has disconnected, and cannot receive the replies to its remaining
                    // reads.
                    InputStep::Perform(request)
                        if request.is_read_only() && is_read_closed(socket) =>
                    {
                        continue;
                    }
                    InputStep::Perform(request) => {
                        budget.request();
                        let (kind, arrived) = (self.timed.take(), self.last_received);
                        performing = self.session().map(|session| session.execute(request));
                        if let Some(kind) = kind {
                            let metrics = self.metrics.clone();
                            performing =
                                performing.map(|request| timed(request, kind, arrived, metrics));
                        }
                        // The frame may have been a new token.
                        self.expires = expires_of(&self.handler);
                    }
                    InputStep::Close(ending) => {
                        let close = outbox.begin_close();
                        return close
                            .map_or(ServeEnd::Gone, |close| ServeEnd::Close { close, ending });
                    }
                }
            }
            if budget.is_over(Duration::ZERO) {
                // Yielding lets the other tasks of this thread run, and the runtime poll its
                // sockets, before this task continues.
                budget = InputBudget::default();
                outbox.flush();
                tokio::task::yield_now().await;
                if performing.is_none() {
                    continue;
                }
            }
            if let Handler::Chat(session) = &mut self.handler {
                // Before the flush, so that acks leave with their copies.
                session.handle_signals().await;
            }
            outbox.flush();
            let blocked = outbox.blocked_since();
            if self.outbox_full && blocked.is_none() {
                tokio::task::yield_now().await;
                continue;
            }
            self.arm_timer(blocked);
            let reads = performing.is_none() && !self.outbox_full && !self.is_paused();
            let mut has_waited = false;
            let mut readable = pin!(socket.readable());
            let readable = poll_fn(|context| {
                let polled = readable.as_mut().poll(context);
                has_waited |= polled.is_pending();
                polled
            });
            // All arms are cancel-safe: `performing` is kept. The bodies do not await.
            tokio::select! {
                biased;
                () = drain.due() => {
                    return ServeEnd::Move(drain.advice(), ReconnectReason::Draining);
                }
                () = outbox.woken() => {}
                outcome = output_of(&mut performing), if performing.is_some() => {
                    performing = None;
                    if let Some(session) = self.session() {
                        // An error frame has been sent; a client of `/ws` needs no more.
                        let _ = session.complete(outcome);
                    }
                }
                // The peer has disconnected, and needs no reply.
                _ = socket.ready(Interest::ERROR), if performing.is_some() => return ServeEnd::Gone,
                ready = socket.writable(), if blocked.is_some() => {
                    if ready.is_ok() {
                        outbox.flush_writable();
                    }
                }
                ready = readable, if reads => {
                    if has_waited {
                        // Other tasks have run meanwhile.
                        budget = InputBudget::default();
                    }
                    if ready.and_then(|()| self.read(socket)).is_err() {
                        return ServeEnd::Gone;
                    }
                }
                status = status_changed(&mut status_rx), if status_rx.is_some() => {
                    if let Some(session) = self.session() {
                        session.send_bus_status(status);
                    }
                }
            }
        }
    }

    /// Reads the available input into `unread`.
    fn read(&mut self, socket: &TcpStream) -> io::Result<()> {
        READ.with_borrow_mut(|buffer| {
            let mut count = None;
            // A read that returned less than the buffer has emptied the socket: `WouldBlock` saves
            // the next read. Later input is a new event (epoll(7), question 9).
            let read = socket.try_io(Interest::READABLE, || {
                let read = (&*socket2::SockRef::from(socket)).read(buffer)?;
                count = Some(read);
                if read < buffer.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            let Some(count) = count else {
                return match read {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                    _ => Ok(()),
                };
            };
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.last_received = Instant::now();
            self.handle.health.record_activity(unix_millis_now());
            self.metrics.bytes_received.inc_by(count as u64);
            self.unread.extend_from_slice(&buffer[..count]);
            Ok(())
        })
    }

    fn handle_unread(&mut self, budget: &mut InputBudget) -> InputStep {
        if self.unread.is_empty() {
            return InputStep::More;
        }
        let mut input = std::mem::take(&mut self.unread);
        // Without a backlog, the input has just been read.
        let started = if self.has_backlog { Instant::now() } else { self.last_received };
        let is_new = !self.has_backlog;
        let (used, mut step) = self.handle(&mut input, started, budget);
        self.decoder.release();
        self.has_backlog = used < input.len();
        if self.has_backlog {
            input.drain(..used);
            self.unread = input;
        }
        let rejected = self.handle.take_rejected();
        self.meter.rejected(rejected);
        self.portion.count(0, used, rejected);
        if let Some(counts) = self.portion.take_if_due() {
            self.report_input(counts, started);
        }
        match self.meter.settle(started) {
            MeterDecision::Continue => {}
            MeterDecision::Pause(wait, cause) => {
                self.metrics.input_throttles.of(cause).inc();
                self.paused_until = Some(started + wait);
            }
            MeterDecision::Close if !matches!(step, InputStep::Close(_)) => {
                self.metrics.input_rate_limit_closes.inc();
                let (code, reason) =
                    (CloseCode::PolicyViolation.number(), "rate_limited".to_owned());
                self.handle.outbox.close(Close { code, reason });
                step = InputStep::Close(CloseInitiator::ByGateway);
            }
            MeterDecision::Close => {}
        }
        let took = started.elapsed();
        // The first frame of a read that held no other one: its time costs no further look at the
        // clock. A request that waits is timed when it is complete.
        if !is_new || self.has_backlog {
            self.timed = None;
        }
        if !matches!(step, InputStep::Perform(_))
            && let Some(kind) = self.timed.take()
        {
            self.metrics.frame_seconds.of(kind).observe(took.as_secs_f64());
        }
        budget.time(took);
        step
    }

    /// Reports input of this connection as that of its user and address.
    fn report_input(&self, counts: InputCounts, now: Instant) {
        if let Some(owner) = self.handle.owner() {
            let address = Some(address_key(owner.about.address));
            self.metrics.senders.record(Some(&owner.user), address, counts, now);
        }
    }

    /// Whether the meter pauses reading.
    fn is_paused(&mut self) -> bool {
        if self.paused_until.is_some_and(|until| until <= Instant::now()) {
            self.paused_until = None;
        }
        self.paused_until.is_some()
    }

    /// Handles the frames in `input` until one must wait. Returns the number of bytes used.
    fn handle(
        &mut self,
        input: &mut [u8],
        now: Instant,
        budget: &mut InputBudget,
    ) -> (usize, InputStep) {
        let outbox = &self.handle.outbox;
        let (mut used, mut frames) = (0, 0_u32);
        while used < input.len() {
            if outbox.is_full() {
                return (used, InputStep::Full);
            }
            // Usually there is one frame, and the clock is not read for it.
            if used > 0 && budget.is_over(now.elapsed()) {
                return (used, InputStep::More);
            }
            let (count, received) = match self.decoder.next(&mut input[used..]) {
                Ok(next) => next,
                Err(error) => {
                    tracing::debug!(connection = %self.handle.connection, %error, "protocol error");
                    outbox.close(close_for(error));
                    return (used, InputStep::Close(CloseInitiator::Failed));
                }
            };
            used += count;
            let Some(received) = received else { continue };
            budget.frame(received.payload_len());
            self.portion.count(1, 0, 0);
            let request = match received {
                DecoderEvent::Fragment(bytes) => {
                    self.meter.fragment(bytes);
                    None
                }
                DecoderEvent::Pong(payload) => {
                    self.meter.control(payload.len());
                    let rtt = now.saturating_duration_since(self.last_ping);
                    self.handle.health.record_rtt(rtt);
                    if std::mem::take(&mut self.awaits_pong) {
                        self.metrics.ping_seconds.observe(rtt.as_secs_f64());
                    }
                    None
                }
                DecoderEvent::Ping(payload) => {
                    self.meter.control(payload.len());
                    outbox.push_pong(skein_websocket::encode(Opcode::Pong, &[payload]));
                    None
                }
                DecoderEvent::Close(close) => {
                    let (code, reason) = close.unwrap_or((1005, ""));
                    outbox.close(Close { code, reason: reason.to_owned() });
                    return (used, InputStep::Close(CloseInitiator::ByClient));
                }
                message @ (DecoderEvent::Text(_) | DecoderEvent::Binary(_)) => {
                    self.metrics.frames_received.inc();
                    self.received = self.received.wrapping_add(1);
                    self.meter.data(message.payload_len());
                    #[cfg(debug_assertions)]
                    if let DecoderEvent::Text(text) = &message {
                        skein_core::fault_injection::panic_in("a connection", text.as_bytes());
                    }
                    match &mut self.handler {
                        Handler::Chat(session) => {
                            let frame = frame(&message);
                            frames += 1;
                            let kind = match &frame {
                                Ok(frame) => FrameKind::of(&frame.body),
                                Err(_) => FrameKind::Invalid,
                            };
                            self.timed = (frames == 1).then_some(kind);
                            if kind == FrameKind::Pong && std::mem::take(&mut self.awaits_pong) {
                                let rtt = now.saturating_duration_since(self.last_ping);
                                self.handle.health.record_rtt(rtt);
                                self.metrics.ping_seconds.observe(rtt.as_secs_f64());
                            }
                            session.handle_frame(frame, &mut self.meter, now)
                        }
                        Handler::Echo(echo) => {
                            echo.handle(&message, outbox);
                            None
                        }
                    }
                }
            };
            if let Some(request) = request {
                return (used, InputStep::Perform(request));
            }
        }
        (used, InputStep::More)
    }

    /// Checks the timeouts if one is due, and sets the timer to the next deadline.
    fn arm_timer(&mut self, blocked: Option<Instant>) {
        let now = Instant::now();
        let write_deadline = blocked.map(|since| since + self.heartbeat.write_timeout);
        let next = |next: Instant| write_deadline.map_or(next, |deadline| next.min(deadline));
        if next(self.next_deadline()) <= now {
            self.check_timeouts(now);
        }
        let next = next(self.next_deadline());
        self.timer.set(self.paused_until.map_or(next, |until| next.min(until)), now);
    }

    /// Sends a due ping, and closes a connection that is idle, blocked, or whose token has expired.
    fn check_timeouts(&mut self, now: Instant) {
        let outbox = &self.handle.outbox;
        // TCP acknowledgements of the peer count as input: over a slow link the frames of the
        // client may arrive late.
        self.last_received =
            outbox.last_progress().map_or(self.last_received, |at| self.last_received.max(at));
        let close =
            |code: CloseCode| outbox.close(Close { code: code.number(), reason: String::new() });
        if self.expires.is_some_and(|expires| expires <= now) {
            close(CloseCode::TokenExpired);
        } else if outbox.stalled(now) >= self.heartbeat.write_timeout {
            close(CloseCode::WriteTimeout);
        } else if now - self.last_received >= self.heartbeat.idle_timeout {
            close(CloseCode::IdleTimeout);
        } else if now - self.last_ping >= self.heartbeat.interval {
            (self.last_ping, self.awaits_pong) = (now, true);
            outbox.push(self.ping());
            outbox.flush();
        }
    }

    fn ping(&self) -> bytes::Bytes {
        if self.json_ping {
            let timestamp = skein_protocol::timestamp(SystemTime::now());
            self.handle.outbox.encode(&ServerFrame::Ping(ServerPingFrame { timestamp }))
        } else {
            skein_websocket::encode(Opcode::Ping, &[])
        }
    }

    /// Returns the next time at which [`Self::check_timeouts`] has work.
    fn next_deadline(&self) -> Instant {
        let ping = self.last_ping + self.heartbeat.interval;
        let idle = self.last_received + self.heartbeat.idle_timeout;
        let next = ping.min(idle);
        self.expires.map_or(next, |expires| next.min(expires))
    }
}

/// Whether the connection was reset or is closed in both directions, so that no reply can be sent.
fn is_write_closed(socket: &TcpStream) -> bool {
    let ready = socket.ready(Interest::WRITABLE).now_or_never();
    matches!(ready, Some(Ok(ready)) if ready.is_write_closed())
}

/// Whether the peer has ended its direction. Received input may still be unhandled.
fn is_read_closed(socket: &TcpStream) -> bool {
    let ready = socket.ready(Interest::READABLE).now_or_never();
    matches!(ready, Some(Ok(ready)) if ready.is_read_closed())
}

/// Observes the time from the arrival of a frame until its request is complete.
fn timed(
    request: BoxFuture<RequestOutcome>,
    kind: FrameKind,
    arrived: Instant,
    metrics: Arc<Metrics>,
) -> BoxFuture<RequestOutcome> {
    Box::pin(async move {
        let outcome = request.await;
        metrics.frame_seconds.of(kind).observe(arrived.elapsed().as_secs_f64());
        outcome
    })
}

/// Returns the time at which the token of the client expires.
fn expires_of(handler: &Handler) -> Option<Instant> {
    let Handler::Chat(session) = handler else { return None };
    deadline_of(session)
}

/// Returns the time at which the token of a session expires.
fn deadline_of(session: &Session) -> Option<Instant> {
    let left = session.expires_at()?.duration_since(SystemTime::now()).unwrap_or_default();
    Instant::now().checked_add(left)
}

/// Resolves with the next bus status for clients, never without a receiver. Cancel-safe.
async fn status_changed(status_rx: &mut Option<watch::Receiver<BusStatus>>) -> BusStatus {
    if let Some(status_rx) = status_rx
        && status_rx.changed().await.is_ok()
    {
        return *status_rx.borrow_and_update();
    }
    std::future::pending().await
}

fn frame<'a>(
    message: &DecoderEvent<'a>,
) -> Result<Frame<'a>, Box<skein_protocol::protocol::server_frame::ErrorFrame>> {
    match *message {
        DecoderEvent::Text(text) => Frame::from_text(text),
        DecoderEvent::Binary(bytes) => Frame::from_binary(bytes),
        DecoderEvent::Ping(_)
        | DecoderEvent::Pong(_)
        | DecoderEvent::Close(_)
        | DecoderEvent::Fragment(_) => {
            unreachable!("only whole messages are frames of the protocol")
        }
    }
}

#[cfg(test)]
mod tests;
