//! One WebSocket connection after its upgrade: reads, decodes, answers pings, watches the time,
//! and ends it in order.
//!
//! One task per connection. It waits for the socket to be readable, reads into a buffer of the
//! thread and handles what came; it writes only what the outbox could not write at once. An idle
//! connection holds no buffer. Frames are handled in the order sent: one that has to wait (a join)
//! keeps those behind it in `unread`.

use std::{
    cell::RefCell,
    io::{self, Read as _},
    sync::Arc,
    time::{Duration, SystemTime},
};

use shared::{
    close::CloseCode,
    codec::{self, Decoder, Opcode, Received},
    ids::ConnectionId,
    protocol::{
        answer::{Answer, Ping},
        request::Request as Frame,
    },
};
use tokio::{io::Interest, net::TcpStream, sync::watch, time::Instant};

use crate::{
    bus::{BoxFuture, output_of, registry::millis_now, standing::Told},
    drain::departure::Batch,
    hub::member::{Subscriber, text_frame},
    outbox::Close,
    session::{Performed, Request, Session},
    telemetry::metrics::Metrics,
};

pub mod echo;
mod closing;
pub mod wheel;

use closing::{Ending, close_for};
use echo::Echo;
use wheel::{Alarm, Wheel};

/// How much one read takes. The buffer belongs to the thread, so that its size costs nothing.
const READ_BYTES: usize = 64 * 1024;

/// How much is handled at once. One read alone is less, unless it is inflated.
const TURN_BYTES: usize = 4 * READ_BYTES;

thread_local! {
    static READ: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// When a connection is asked whether it lives, and when it counts as dead.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    /// How often to ping.
    pub interval: Duration,
    /// Nothing heard for so long: 4002.
    pub silence_max: Duration,
    /// Nothing could be written for so long: 4003.
    pub stall_max: Duration,
}

/// How a connection is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most bytes of a message.
    pub message_bytes_max: usize,
    /// The heartbeat.
    pub heartbeat: Arc<Heartbeat>,
    /// Whether to ask by a `ping` frame in JSON instead of a protocol-level ping.
    pub json_ping: bool,
}

/// Who the frames are for.
pub enum Handler {
    /// `/ws`
    Chat(Box<Session>),
    /// `/ws/echo`
    Echo(Echo),
}

/// A connection.
pub struct Connection {
    subscriber: Arc<Subscriber>,
    handler: Handler,
    decoder: Decoder,
    heartbeat: Arc<Heartbeat>,
    /// Whether to ask by a `ping` frame in JSON instead of a protocol-level ping.
    json_ping: bool,
    alarm: Alarm,
    metrics: Arc<Metrics>,
    /// What was received and not handled yet.
    unread: Vec<u8>,
    /// The outbox is full, so that nothing is read and nothing can be heard.
    full: bool,
    heard: Instant,
    pinged: Instant,
    expires: Option<Instant>,
}

/// Why handling what was received stopped.
enum Step {
    /// All of it is handled.
    More,
    /// The outbox is full: the client has to take its answers first.
    Full,
    /// There is more, but others are to have their turn.
    Enough,
    /// This has to be done before the next frame.
    Perform(Request),
    /// It is over.
    End(Ending),
}

/// How serving a connection ended.
enum End {
    /// The socket is gone.
    Gone,
    /// By a close frame, which is queued.
    Close { close: Close, ending: Ending },
    /// The gateway stops.
    Leave,
}

impl Connection {
    /// A connection whose handshake is done; `early` was received with it.
    ///
    /// The subscriber's outbox has a socket.
    pub fn new(
        subscriber: Arc<Subscriber>,
        handler: Handler,
        options: Options,
        wheel: Arc<Wheel>,
        metrics: Arc<Metrics>,
        early: Vec<u8>,
    ) -> Self {
        let now = Instant::now();
        let expires = expires_of(&handler);
        let alarm = Alarm::new(wheel, subscriber.clone());
        let decoder = match subscriber.outbox.deflates() {
            Some(_) => Decoder::inflating(options.message_bytes_max),
            None => Decoder::new(options.message_bytes_max),
        };
        Self {
            subscriber,
            handler,
            decoder,
            heartbeat: options.heartbeat,
            json_ping: options.json_ping,
            alarm,
            metrics,
            unread: early,
            full: false,
            heard: now,
            pinged: now,
            expires,
        }
    }

    /// Its id.
    pub fn id(&self) -> ConnectionId {
        self.subscriber.connection
    }

    /// The session of a chat connection.
    pub fn session(&mut self) -> Option<&mut Session> {
        match &mut self.handler {
            Handler::Chat(session) => Some(session),
            Handler::Echo(_) => None,
        }
    }

    /// Serves the connection until it ends. Returns the close code, 1006 for none.
    ///
    /// What happens once in a connection's life is boxed, so that its task, which lives as long,
    /// is no larger than serving needs.
    pub async fn run(&mut self, batch: &Batch) -> u16 {
        let code = match self.serve(batch).await {
            End::Gone => 1006,
            End::Close { close, ending } => Box::pin(self.close(close, ending)).await,
            End::Leave => Box::pin(self.goodbye(batch)).await,
        };
        let subscriber = self.subscriber.clone();
        if let Some(session) = self.session() {
            Box::pin(session.end()).await;
        }
        // The hub may hold the subscriber for a moment longer.
        subscriber.outbox.discard();
        code
    }

    async fn serve(&mut self, batch: &Batch) -> End {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        let Some(socket) = outbox.socket() else { return End::Gone };
        let mut performing: Option<BoxFuture<Performed>> = None;
        let mut told = self.session().map(|session| session.told());
        loop {
            if let Some(close) = outbox.begin_close() {
                return End::Close { close, ending: Ending::ByGateway };
            }
            if performing.is_none() {
                let step = self.handle_unread();
                self.full = matches!(step, Step::Full);
                match step {
                    Step::More | Step::Full => {}
                    Step::Enough => {
                        outbox.flush();
                        tokio::task::yield_now().await;
                        continue;
                    }
                    Step::Perform(request) => {
                        performing = self.session().map(|session| session.perform(request));
                        // It may have been another token.
                        self.expires = expires_of(&self.handler);
                    }
                    Step::End(ending) => {
                        let close = outbox.begin_close();
                        return close.map_or(End::Gone, |close| End::Close { close, ending });
                    }
                }
            }
            if outbox.take_acked() {
                // The shard that has the copy waits a turn itself, to gather. After two both are queued
                // here, and leave in one write (docs/adr/0011).
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
            }
            outbox.flush();
            if let Handler::Chat(session) = &mut self.handler {
                let behind = session.take_behind();
                if !behind.is_empty() {
                    Box::pin(session.catch_up(behind)).await;
                }
            }
            let blocked = outbox.blocked_since();
            if self.full && blocked.is_none() {
                continue;
            }
            self.watch_the_time(blocked);
            let reads = performing.is_none() && !self.full;
            // All arms are cancel-safe: what is performed is kept. The bodies do not await.
            tokio::select! {
                biased;
                () = batch.left() => return End::Leave,
                () = outbox.woken() => {}
                performed = output_of(&mut performing), if performing.is_some() => {
                    performing = None;
                    if let Some(session) = self.session() {
                        // A refusal has been sent, which is all a client of `/ws` needs.
                        let _ = session.finish(performed);
                    }
                }
                ready = socket.writable(), if blocked.is_some() => {
                    if ready.is_ok() {
                        outbox.flush_writable();
                    }
                }
                ready = socket.readable(), if reads => {
                    if ready.and_then(|()| self.read(socket)).is_err() {
                        return End::Gone;
                    }
                }
                news = changed(&mut told), if told.is_some() => {
                    if let Some(session) = self.session() {
                        session.tell(news);
                    }
                }
            }
        }
    }

    /// Takes what the socket has into `unread`.
    fn read(&mut self, socket: &TcpStream) -> io::Result<()> {
        READ.with_borrow_mut(|buffer| {
            let mut count = None;
            // A socket that had less than was asked for is empty: to say so here saves the read that
            // would find nothing. What comes after this one is a new event (epoll(7), question 9).
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
            self.heard = Instant::now();
            self.subscriber.health.hear(millis_now());
            self.metrics.bytes_received.inc_by(count as u64);
            self.unread.extend_from_slice(&buffer[..count]);
            Ok(())
        })
    }

    fn handle_unread(&mut self) -> Step {
        if self.unread.is_empty() {
            return Step::More;
        }
        let mut input = std::mem::take(&mut self.unread);
        let (used, step) = self.handle(&mut input);
        self.decoder.release();
        if used < input.len() {
            input.drain(..used);
            self.unread = input;
        }
        step
    }

    /// Handles the messages in `input`, as far as that can be done at once.
    fn handle(&mut self, input: &mut [u8]) -> (usize, Step) {
        let now = Instant::now();
        let outbox = &self.subscriber.outbox;
        let (mut used, mut messages_bytes) = (0, 0);
        while used < input.len() {
            if outbox.is_full() {
                return (used, Step::Full);
            }
            if messages_bytes > TURN_BYTES {
                return (used, Step::Enough);
            }
            let (count, received) = match self.decoder.next(&mut input[used..]) {
                Ok(next) => next,
                Err(error) => {
                    tracing::debug!(connection = %self.subscriber.connection, %error, "bad frame");
                    outbox.close(close_for(error));
                    return (used, Step::End(Ending::Failed));
                }
            };
            used += count;
            let request = match received {
                Some(Received::Pong(_)) => {
                    self.subscriber.health.measured(now.saturating_duration_since(self.pinged));
                    None
                }
                None => None,
                Some(Received::Ping(payload)) => {
                    outbox.push(codec::encode(Opcode::Pong, &[payload]));
                    None
                }
                Some(Received::Close(close)) => {
                    let (code, reason) = close.unwrap_or((1005, ""));
                    outbox.close(Close { code, reason: reason.to_owned() });
                    return (used, Step::End(Ending::ByClient));
                }
                Some(message @ (Received::Text(_) | Received::Binary(_))) => {
                    self.metrics.frames_received.inc();
                    messages_bytes += message.bytes();
                    match &mut self.handler {
                        Handler::Chat(session) => session.handle(frame(&message), now),
                        Handler::Echo(echo) => {
                            echo.handle(&message, outbox);
                            None
                        }
                    }
                }
            };
            if let Some(request) = request {
                return (used, Step::Perform(request));
            }
        }
        (used, Step::More)
    }

    /// Looks at the time if that is due, and is woken when it is next.
    fn watch_the_time(&mut self, blocked: Option<Instant>) {
        let now = Instant::now();
        let stalled = blocked.map(|since| since + self.heartbeat.stall_max);
        let next = |next: Instant| stalled.map_or(next, |stalled| next.min(stalled));
        if next(self.next_look()) <= now {
            self.look_at_the_time(now);
        }
        self.alarm.set(next(self.next_look()), now);
    }

    /// Pings, and ends a connection that is dead, stuck, or past its token.
    fn look_at_the_time(&mut self, now: Instant) {
        let outbox = &self.subscriber.outbox;
        let over =
            |code: CloseCode| outbox.close(Close { code: code.number(), reason: String::new() });
        if self.expires.is_some_and(|expires| expires <= now) {
            over(CloseCode::TokenExpired);
        } else if outbox.stalled(now) >= self.heartbeat.stall_max {
            over(CloseCode::Stalled);
        } else if now - self.heard >= self.heartbeat.silence_max {
            over(CloseCode::Silent);
        } else if now - self.pinged >= self.heartbeat.interval {
            self.pinged = now;
            outbox.push(self.ping());
            outbox.flush();
        }
    }

    fn ping(&self) -> bytes::Bytes {
        if self.json_ping {
            let timestamp = shared::timestamp(SystemTime::now());
            text_frame(&Answer::Ping(Ping { timestamp }))
        } else {
            codec::encode(Opcode::Ping, &[])
        }
    }

    /// When there is next something to be looked at.
    fn next_look(&self) -> Instant {
        let ping = self.pinged + self.heartbeat.interval;
        let dead = self.heard + self.heartbeat.silence_max;
        let next = ping.min(dead);
        self.expires.map_or(next, |expires| next.min(expires))
    }
}

/// When the client's token ends.
fn expires_of(handler: &Handler) -> Option<Instant> {
    let Handler::Chat(session) = handler else { return None };
    let left = session.expires_at()?.duration_since(SystemTime::now()).unwrap_or_default();
    Instant::now().checked_add(left)
}

/// What clients are told of the bus, when that has changed; never, where nobody is told. Cancel-safe.
pub async fn changed(told: &mut Option<watch::Receiver<Told>>) -> Told {
    if let Some(told) = told
        && told.changed().await.is_ok()
    {
        return *told.borrow_and_update();
    }
    std::future::pending().await
}

fn frame<'a>(message: &Received<'a>) -> Result<Frame<'a>, Box<shared::protocol::answer::Refusal>> {
    match *message {
        Received::Text(text) => Frame::from_text(text),
        Received::Binary(bytes) => Frame::from_binary(bytes),
        Received::Ping(_) | Received::Pong(_) | Received::Close(_) => {
            unreachable!("control frames were answered before")
        }
    }
}

#[cfg(test)]
mod tests;
