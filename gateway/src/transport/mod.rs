//! One WebSocket connection after its upgrade: reads, decodes, answers pings, watches the time,
//! and ends it in order.
//!
//! One task per connection. It waits for the socket to be readable, reads into a buffer of the
//! thread and handles what came; it writes only what the outbox could not write at once. An idle
//! connection holds no buffer. Frames are handled in the order sent: one that has to wait (a join)
//! keeps those behind it in `unread`.

use std::{
    cell::RefCell,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use shared::{
    close::CloseCode,
    codec::{self, CodecError, Decoder, Opcode, Received},
    ids::ConnectionId,
    protocol::{
        answer::{Answer, Ping, Reconnect, ReconnectReason},
        request::Request as Frame,
    },
};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    bus::{BoxFuture, output_of, standing::Told},
    hub::member::{Subscriber, text_frame},
    outbox::Close,
    session::{Performed, Request, Session},
    telemetry::metrics::Metrics,
};

pub mod echo;

use echo::Echo;

/// How much one read takes. The buffer belongs to the thread, so that its size costs nothing.
const READ_BYTES: usize = 64 * 1024;
/// How long each step of the closing handshake may take: what is queued goes out, and the client
/// answers the close frame.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// How long a client is given to end the TCP connection once both close frames are out.
const LINGER_MAX: Duration = Duration::from_secs(1);

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
    /// Whether to ask by a `ping` frame in JSON instead of a protocol-level ping.
    pub json: bool,
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
    heartbeat: Heartbeat,
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
    /// This has to be done before the next frame.
    Perform(Request),
    /// It is over.
    End(Ending),
}

/// Who ends a connection, which decides what is still read of it (RFC 6455, sections 5.5.1 and
/// 7.1.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The client, whose close frame is answered.
    ByClient,
    /// The gateway, which waits for the client's close frame.
    ByGateway,
    /// The client broke the rules: nothing of it is read any more.
    Failed,
}

impl Connection {
    /// A connection whose handshake is done; `early` was received with it.
    ///
    /// The subscriber's outbox has a socket.
    pub fn new(
        subscriber: Arc<Subscriber>,
        handler: Handler,
        decoder: Decoder,
        heartbeat: Heartbeat,
        metrics: Arc<Metrics>,
        early: Vec<u8>,
    ) -> Self {
        let now = Instant::now();
        let expires_at = match &handler {
            Handler::Chat(session) => session.expires_at(),
            Handler::Echo(_) => None,
        };
        let expires = expires_at.and_then(|at| {
            now.checked_add(at.duration_since(SystemTime::now()).unwrap_or_default())
        });
        Self {
            subscriber,
            handler,
            decoder,
            heartbeat,
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
    pub async fn run(mut self, leaving: CancellationToken) -> u16 {
        let code = self.serve(&leaving).await;
        let subscriber = self.subscriber.clone();
        if let Some(session) = self.session() {
            session.end().await;
        }
        // The hub may hold the subscriber for a moment longer.
        subscriber.outbox.discard();
        code
    }

    async fn serve(&mut self, leaving: &CancellationToken) -> u16 {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        let Some(socket) = outbox.socket() else { return 1006 };
        let timer = tokio::time::sleep_until(self.next_look());
        tokio::pin!(timer);
        let mut performing: Option<BoxFuture<Performed>> = None;
        let mut told = self.session().map(|session| session.told());
        loop {
            if let Some(close) = outbox.begin_close() {
                return self.close(socket, close, Ending::ByGateway).await;
            }
            if performing.is_none() {
                let step = self.handle_unread();
                self.full = matches!(step, Step::Full);
                match step {
                    Step::More | Step::Full => {}
                    Step::Perform(request) => {
                        performing = self.session().map(|session| session.perform(request));
                    }
                    Step::End(ending) => {
                        return match outbox.begin_close() {
                            Some(close) => self.close(socket, close, ending).await,
                            None => 1006,
                        };
                    }
                }
            }
            outbox.flush();
            if let Handler::Chat(session) = &self.handler {
                session.catch_up().await;
            }
            let blocked = outbox.blocked_since();
            if self.full && blocked.is_none() {
                continue;
            }
            if blocked.is_some() {
                self.look_no_later_than(timer.as_mut(), blocked);
            }
            let reads = performing.is_none() && !self.full;
            // All arms are cancel-safe: what is performed is kept. The bodies do not await.
            tokio::select! {
                biased;
                () = leaving.cancelled() => return self.goodbye(socket).await,
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
                        return 1006;
                    }
                }
                news = changed(&mut told), if told.is_some() => {
                    if let Some(session) = self.session() {
                        session.tell(news);
                    }
                }
                () = timer.as_mut() => {
                    self.look_at_the_time(Instant::now());
                    timer.as_mut().reset(self.next_look());
                }
            }
        }
    }

    /// Reads what the socket has and handles it; the rest is left in `unread`.
    fn read(&mut self, socket: &TcpStream) -> io::Result<()> {
        READ.with_borrow_mut(|buffer| {
            let count = match socket.try_read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            self.heard = Instant::now();
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
        let mut used = 0;
        while used < input.len() {
            if outbox.is_full() {
                return (used, Step::Full);
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
                None | Some(Received::Pong(_)) => None,
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
        if self.heartbeat.json {
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

    fn look_no_later_than(&self, timer: std::pin::Pin<&mut Sleep>, blocked: Option<Instant>) {
        if let Some(stalled) = blocked.map(|since| since + self.heartbeat.stall_max)
            && stalled < timer.deadline()
        {
            timer.reset(stalled);
        }
    }

    /// Sends the client to another node: what it sent is answered, then `reconnect` and 1012.
    async fn goodbye(&mut self, socket: &TcpStream) -> u16 {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        if let Handler::Chat(session) = &self.handler {
            let settled = async {
                while !session.is_settled() {
                    outbox.woken().await;
                }
            };
            let _ = tokio::time::timeout(CLOSE_MAX, settled).await;
            subscriber.answer(&Answer::Reconnect(Reconnect {
                // Spread over a second, since all of a node's clients are told at once.
                after_ms: rand::random_range(0..1000),
                reason: ReconnectReason::Draining,
                node: None,
            }));
        }
        outbox.close(Close { code: CloseCode::Restart.number(), reason: "draining".to_owned() });
        match outbox.begin_close() {
            Some(close) => self.close(socket, close, Ending::ByGateway).await,
            None => 1006,
        }
    }

    /// Writes what is queued, the close frame last, waits for the client's, and ends the TCP
    /// connection in order: its own direction, then all of it when the client has ended the other.
    async fn close(&mut self, socket: &TcpStream, close: Close, ending: Ending) -> u16 {
        let subscriber = self.subscriber.clone();
        let outbox = &subscriber.outbox;
        let write = async {
            loop {
                outbox.flush_writable();
                if outbox.bytes() == 0 || socket.writable().await.is_err() {
                    break;
                }
            }
        };
        let written = tokio::time::timeout(CLOSE_MAX, write).await.is_ok();
        if written && ending == Ending::ByGateway {
            let _ = tokio::time::timeout(CLOSE_MAX, self.until_closed(socket)).await;
        }
        let _ = socket2::SockRef::from(socket).shutdown(std::net::Shutdown::Write);
        if written {
            // Closing with bytes unread would have the kernel drop what is on its way.
            let max = if ending == Ending::Failed { CLOSE_MAX } else { LINGER_MAX };
            let _ = tokio::time::timeout(max, drain(socket)).await;
        }
        close.code
    }

    /// Waits for the client's close frame. What comes before it is dropped.
    async fn until_closed(&mut self, socket: &TcpStream) {
        while !self.skip_to_close() {
            if socket.readable().await.and_then(|()| self.read(socket)).is_err() {
                return;
            }
        }
    }

    /// Whether what was received ends in a close frame, or in what is no frame at all.
    fn skip_to_close(&mut self) -> bool {
        let mut input = std::mem::take(&mut self.unread);
        let mut used = 0;
        while used < input.len() {
            match self.decoder.next(&mut input[used..]) {
                Ok((_, Some(Received::Close(_)))) | Err(_) => return true,
                Ok((count, _)) => used += count,
            }
        }
        self.decoder.release();
        false
    }
}

/// What clients are told of the bus, when that has changed; never, where nobody is told. Cancel-safe.
async fn changed(told: &mut Option<watch::Receiver<Told>>) -> Told {
    if let Some(told) = told
        && told.changed().await.is_ok()
    {
        return *told.borrow_and_update();
    }
    std::future::pending().await
}

/// Reads and forgets until the other side is done.
async fn drain(socket: &TcpStream) {
    loop {
        if socket.readable().await.is_err() {
            return;
        }
        let read = READ.with_borrow_mut(|buffer| socket.try_read(buffer));
        match read {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
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

/// The close of a connection whose client broke the rules; reasons are one word.
fn close_for(error: CodecError) -> Close {
    let (code, reason) = match error {
        CodecError::Protocol(_) => (CloseCode::Protocol, "protocol_error"),
        CodecError::BadUtf8 => (CloseCode::BadUtf8, "bad_utf8"),
        CodecError::BadDeflate => (CloseCode::BadUtf8, "bad_deflate"),
        CodecError::TooBig => (CloseCode::TooBig, "too_large"),
    };
    Close { code: code.number(), reason: reason.to_owned() }
}
