//! Event streams: what a connection would be sent, for those who cannot have a WebSocket (HTML Living
//! Standard, section 9.2).
//!
//! A stream is a session like any other, whose outbox is read here: each frame becomes one event. Those
//! of a log carry the positions in all rooms and the inbox as their id, by which the client goes on
//! elsewhere. A client that reads slowly lags, as any client does: the stream is made piece by piece,
//! the next one when the kernel has taken the one before, and what is under way counts in the outbox.
//! Rooms are joined one after the other, each when there is room for its history.
//!
//! A browser gives up for good on any answer but 200 (`EventSource`, section 9.2.3), so that refusals
//! which pass are streams as well, which say when to come back and end.

use std::{
    borrow::Cow,
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Query, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::{MethodRouter, get},
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use skein_protocol::{
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId},
    position::{Epoch, Position, Seq},
    protocol::{
        client_frame::{JoinFrame, history_default},
        server_frame::{ReconnectFrame, ReconnectReason, ServerFrame},
    },
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    ConnectInfo, Node,
    buffered::WriteTimeout,
    error::{error_response, error_response_with_retry},
    handshake::{
        AdmissionError, AdmittedClient, ClientHandshake, Params, connected_frame, join_inbox,
        param, unread_from, verify_session,
    },
    headers::utf8,
    origin::OriginAccess,
    permits::ConnectionPermits,
    upgrade::{forget_panicked, sticky_route},
};
use crate::transport::status_changed;
use skein_core::{
    bus::{
        node_state::BusStatus,
        registry::{RoomConfig, RoomSummary, unix_millis_now},
    },
    hub::{SubscribeFailed, member::ConnectionHandle},
    limits::Permit,
    outbox::{Close, FRAME_OVERHEAD_BYTES, Outbox},
    session::{DeferredRequest, Session, auth::AuthError},
    telemetry::metrics::{GaugeGuard, HandshakeResult},
};

/// The most rooms of a stream.
const ROOMS_MAX: usize = 20;
/// How often something is sent that means nothing, so that a proxy does not take the stream for dead.
const PING_EVERY: Duration = Duration::from_secs(25);
/// What a client is told to wait before it comes back.
const RETRY: Duration = Duration::from_secs(3);
/// The longest position that is looked at: 20 rooms with the longest names.
const CURSOR_BYTES_MAX: usize = 8 * 1024;
/// How much of what waits is made into one piece of the stream.
const CHUNK_BYTES: usize = 32 * 1024;
/// How many pieces wait for the connection to take them: one, and one with which the stream ends.
const CHUNKS_MAX: usize = 2;
/// Sent by a proxy that asks the next node where this one says 503, and tells browsers itself when to
/// come back where none is left.
const FAILOVER: HeaderName = HeaderName::from_static("x-skein-failover");
/// The longest body of a refusal.
const REJECTION_BYTES_MAX: usize = 4 * 1024;

/// How far a client is, in rooms and in the inbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cursors {
    rooms: BTreeMap<RoomId, Position>,
    inbox: Option<Position>,
}

impl Cursors {
    /// As an event's id: base64url of `[<room>]~<epoch>:<seq>`, with commas between.
    fn to_id(&self) -> String {
        let inbox = self.inbox.iter().map(|at| format!("~{at}"));
        let rooms = self.rooms.iter().map(|(room, at)| format!("{room}~{at}"));
        URL_SAFE_NO_PAD.encode(inbox.chain(rooms).collect::<Vec<_>>().join(","))
    }

    /// What of an id can be read. One that cannot is as none: the client is told where it begins.
    fn of_id(id: &[u8]) -> Self {
        let mut cursors = Self::default();
        let text =
            (id.len() <= CURSOR_BYTES_MAX).then(|| URL_SAFE_NO_PAD.decode(id).ok()).flatten();
        let text = text.and_then(|text| String::from_utf8(text).ok()).unwrap_or_default();
        for (name, at) in text.split(',').filter_map(|part| part.split_once('~')) {
            let Ok(at) = at.parse() else { continue };
            match name {
                "" => cursors.inbox = Some(at),
                room => drop(room.parse().map(|room| cursors.rooms.insert(room, at))),
            }
        }
        cursors
    }

    /// Takes note of a frame. Returns whether a position has moved.
    fn advance(&mut self, frame: &EventFrame<'_>) -> bool {
        let at = |epoch: &Option<Epoch>, seq| Some(Position::new(epoch.clone()?, seq));
        match frame.kind {
            "message" | "direct" | "notification" | "reset" => {
                let Some(at) = at(&frame.epoch, frame.seq) else { return false };
                match &frame.room {
                    Some(room) => drop(self.rooms.insert(room.clone(), at)),
                    None => self.inbox = Some(at),
                }
                true
            }
            "joined" => {
                let (Some(room), Some(top)) = (&frame.room, at(&frame.epoch, frame.seq)) else {
                    return false;
                };
                let shown = frame.history.last().and_then(|last| at(&last.epoch, last.seq));
                // What follows a position comes behind this frame.
                let known = self.rooms.get(room).filter(|_| frame.recovered).cloned();
                self.rooms.insert(room.clone(), shown.or(known).unwrap_or(top));
                true
            }
            _ => false,
        }
    }
}

/// A frame, as far as it moves positions.
#[derive(Deserialize)]
struct EventFrame<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(default)]
    room: Option<RoomId>,
    #[serde(default)]
    epoch: Option<Epoch>,
    #[serde(default)]
    seq: Seq,
    #[serde(default)]
    recovered: bool,
    #[serde(default)]
    history: Vec<HistoryPosition>,
}

#[derive(Deserialize)]
struct HistoryPosition {
    #[serde(default)]
    epoch: Option<Epoch>,
    #[serde(default)]
    seq: Seq,
}

/// The JSON of a frame as it stands in an outbox: unmasked and whole (RFC 6455, section 5.2). A binary
/// one has its payload in base64.
fn frame_json(frame: &[u8]) -> Option<Cow<'_, str>> {
    let (head, rest) = frame.split_first_chunk::<2>()?;
    let payload = match head[1] & 0x7F {
        126 => rest.get(2..)?,
        127 => rest.get(8..)?,
        _ => rest,
    };
    match head[0] & 0x0F {
        1 => std::str::from_utf8(payload).ok().map(Cow::Borrowed),
        2 => {
            let (length, rest) = payload.split_first_chunk::<2>()?;
            let (header, content) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
            let header = std::str::from_utf8(header).ok()?.strip_suffix('}')?;
            let content = STANDARD.encode(content);
            Some(format!(r#"{header},"encoding":"base64","content":"{content}"}}"#).into())
        }
        // Pings are of this stream's own.
        _ => None,
    }
}

/// The `retry` field: when the client comes back once the stream has ended.
fn retry(wait: Duration) -> String {
    format!("retry: {}\n\n", wait.as_millis())
}

/// The methods of `/sse`, with what all of its answers have.
pub(super) fn methods(node: Arc<Node>) -> MethodRouter<Arc<Node>> {
    get(stream)
        .head(method_not_allowed)
        .options(preflight)
        .fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(node, finish_response))
}

async fn method_not_allowed() -> Response {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let mut response = error_response(status, "bad_request", "an event stream is a GET");
    response.headers_mut().insert(header::ALLOW, METHODS);
    response
}

const METHODS: HeaderValue = HeaderValue::from_static("GET, OPTIONS");

/// The question that a browser asks before it sends a header of the page's own (Fetch Standard,
/// section 3.3.2). Whether the page may is said by [`finish_response`].
async fn preflight(request: axum::extract::Request) -> Response {
    const HEADERS: HeaderValue = HeaderValue::from_static("Authorization, Last-Event-ID");
    let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS);
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, METHODS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.cloned().unwrap_or(HEADERS));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

/// Adds what every answer of this path has: leave for the page to read it, where its origin is
/// allowed, and that nobody keeps or changes it on the way. A refusal that passes becomes a stream.
async fn finish_response(
    State(node): State<Arc<Node>>,
    request: axum::extract::Request,
    next: Next,
) -> Response {
    let allowed = node.options.allowed_origins.allow(request.headers());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let is_get = request.method() == Method::GET;
    let fails_over = request.headers().contains_key(FAILOVER);
    let mut response = next.run(request).await;
    let passes = match response.status() {
        StatusCode::TOO_MANY_REQUESTS => is_get,
        StatusCode::SERVICE_UNAVAILABLE => is_get && !fails_over,
        _ => false,
    };
    if passes {
        response = retry_stream(response).await;
    }
    let headers = response.headers_mut();
    let cors = |name: &'static str| HeaderName::from_static(name);
    match (allowed, origin) {
        (Ok(OriginAccess::WithCredentials), Some(origin)) => {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            let yes = HeaderValue::from_static("true");
            headers.insert(cors("access-control-allow-credentials"), yes);
        }
        (Ok(OriginAccess::WithoutCredentials), _) => {
            let any = HeaderValue::from_static("*");
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any);
        }
        (Ok(_) | Err(_), _) => {}
    }
    headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    let kept = HeaderValue::from_static("no-store, no-transform");
    headers.insert(header::CACHE_CONTROL, kept);
    response
}

/// A stream that says why there is none now, and when to come back, in place of a refusal that passes.
async fn retry_stream(refusal: Response) -> Response {
    let wait = refusal.headers().get(header::RETRY_AFTER).and_then(utf8);
    let wait = wait.and_then(|seconds| seconds.parse().ok()).map_or(RETRY, Duration::from_secs);
    // Not all at once, who are refused at once.
    let wait = wait.max(RETRY) + rand::random_range(Duration::ZERO..RETRY);
    let body = axum::body::to_bytes(refusal.into_body(), REJECTION_BYTES_MAX).await;
    let refused = body.ok().and_then(|body| serde_json::from_slice::<RejectionBody>(&body).ok());
    let mut text = retry(wait);
    if let Some(RejectionBody { error: RejectionDetail { code, message } }) = refused {
        let error = json!({
            "type": "error",
            "code": code,
            "message": message,
            "retry_after_ms": wait.as_millis() as u64,
        });
        let _ = write!(text, "data: {error}\n\n");
    }
    event_stream(Body::from(text))
}

/// What is read of a refusal in HTTP.
#[derive(Deserialize)]
struct RejectionBody {
    error: RejectionDetail,
}

#[derive(Deserialize)]
struct RejectionDetail {
    code: String,
    message: String,
}

fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // nginx would hold events back until it has many.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// `GET /sse`
async fn stream(
    State(node): State<Arc<Node>>,
    Query(params): Params,
    request: axum::extract::Request,
) -> Response {
    let (parts, _) = request.into_parts();
    let places = match ConnectionPermits::take(&node, &parts) {
        Ok(places) => places,
        Err((outcome, response)) => {
            node.metrics.handshakes.of(outcome).inc();
            return *response;
        }
    };
    let rooms = match rooms_of(&params) {
        Ok(rooms) => rooms,
        Err(text) => return error_response(StatusCode::BAD_REQUEST, "bad_request", text),
    };
    let ends = parts.extensions.get::<ConnectInfo>().copied();
    let ends = ends
        .unwrap_or(ConnectInfo { peer: ([0, 0, 0, 0], 0).into(), local: ([0, 0, 0, 0], 0).into() });
    let client = ClientHandshake::read(&node, &parts.headers, &params, ends, places.allowed);
    let id = parts.headers.get("last-event-id").map(HeaderValue::as_bytes);
    let id = id.or(param(&params, "last_event_id").map(str::as_bytes));
    let cursors = Cursors::of_id(id.unwrap_or_default());

    let stall_limit = parts.extensions.get::<WriteTimeout>().cloned();

    let (answer, opened) = oneshot::channel();
    let (route, connection) = (sticky_route(ends), ConnectionId::random());
    let served = node.clone();
    // A task of its own, which ends what it has begun wherever the client goes.
    let serve = async move {
        let node = served;
        match EventStream::open(&node, connection, client, rooms, (cursors, route), places).await {
            Ok((mut stream, pieces)) => {
                if answer.send(Ok(pieces)).is_err() {
                    return stream.session.end().await;
                }
                let _counted = GaugeGuard::new(&node.metrics.connections);
                let code = stream.run(&node, stall_limit).await;
                node.metrics.disconnected(code);
            }
            Err(refused) => drop(answer.send(Err(refused))),
        }
    };
    let forgetting = node.clone();
    node.tasks
        .spawn_connection(serve, move |panic| forget_panicked(&forgetting, connection, panic));
    let pieces = match opened.await {
        Ok(Ok(pieces)) => pieces,
        Ok(Err(refused)) => {
            node.metrics.handshakes.of(HandshakeResult::Invalid).inc();
            return *refused;
        }
        // The node ends.
        Err(_) => return *rejected(ErrorCode::Unavailable, "this node is stopping"),
    };
    node.metrics.handshakes.of(HandshakeResult::Accepted).inc();
    let pieces = futures_util::stream::unfold(pieces, async |mut pieces| {
        let piece: Bytes = pieces.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(piece), pieces))
    });
    event_stream(Body::from_stream(pieces))
}

fn rooms_of(params: &[(String, String)]) -> Result<Vec<RoomId>, &'static str> {
    let names =
        param(params, "rooms").unwrap_or_default().split(',').filter(|name| !name.is_empty());
    let mut rooms = names
        .map(str::parse)
        .collect::<Result<Vec<RoomId>, _>>()
        .map_err(|_| "`rooms` are names with commas between")?;
    rooms.sort_unstable();
    rooms.dedup();
    if rooms.len() > ROOMS_MAX { Err("`rooms` are at most 20") } else { Ok(rooms) }
}

/// A client that reads an event stream.
struct EventStream {
    session: Session,
    handle: Arc<ConnectionHandle>,
    cursors: Cursors,
    /// Rooms to be joined when there is room for their history.
    waiting: VecDeque<RoomId>,
    chunks: mpsc::Sender<Bytes>,
    expires: Option<Instant>,
    _places: ConnectionPermits,
    _user: Permit<skein_protocol::ids::UserId>,
}

/// A part of a stream. It counts in the outbox until the kernel has taken it, or the client has gone.
struct StreamChunk {
    text: String,
    handle: Arc<ConnectionHandle>,
}

impl StreamChunk {
    fn bytes(&self) -> usize {
        self.text.capacity() + FRAME_OVERHEAD_BYTES
    }
}

impl AsRef<[u8]> for StreamChunk {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for StreamChunk {
    fn drop(&mut self) {
        self.handle.outbox.release_held(self.bytes());
    }
}

/// How a stream ended, as a close code says it.
struct StreamEnd(u16);

/// The client has gone without a word.
const GONE: StreamEnd = StreamEnd(1006);

/// A refusal in HTTP.
type RejectedResponse = Box<Response>;

fn rejected(code: ErrorCode, text: &str) -> RejectedResponse {
    let status = match code {
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::LimitReached | ErrorCode::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::Internal => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        _ => StatusCode::FORBIDDEN,
    };
    Box::new(match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            error_response_with_retry(status, code.as_str(), text, Duration::from_secs(1))
        }
        status => error_response(status, code.as_str(), text),
    })
}

impl EventStream {
    /// Opens the session and joins the rooms. What is to be sent waits in the outbox.
    async fn open(
        node: &Node,
        connection: ConnectionId,
        client: ClientHandshake,
        rooms: Vec<RoomId>,
        (mut cursors, route): (Cursors, String),
        places: ConnectionPermits,
    ) -> Result<(Self, mpsc::Receiver<Bytes>), RejectedResponse> {
        let entered = client.admit(node, connection).await.map_err(|error| match error {
            AdmissionError::Unauthenticated(error) => rejected(
                ErrorCode::Unauthorized,
                &match error {
                    AuthError::TokenInvalid(why) => format!("token_invalid: {why}"),
                    error => format!("authentication required: {error}"),
                },
            ),
            AdmissionError::TooManyConnections => {
                rejected(ErrorCode::LimitReached, "this user has too many connections")
            }
            AdmissionError::Unavailable => rejected(ErrorCode::Unavailable, "the bus is away"),
        })?;
        let outbox = Outbox::to_owner(node.options.limits.outbox_bytes_max, node.metrics.clone());
        let handle =
            Arc::new(ConnectionHandle::new(connection, outbox).with_owner(entered.owner()));
        let (user, wait) = (entered.identity.user.clone(), node.services.limits.wait_max);
        let online = node.services.presence.track_online(&user, wait).await;
        handle.send(&connected_frame(node, &entered, &handle, route));
        let AdmittedClient { identity, place, opened, .. } = entered;
        let inbox = cursors.inbox.clone().map(Ok).or(client.inbox);
        // Where the inbox begins is part of every position from now on.
        let begins = Position::new(opened.inbox.epoch.clone(), unread_from(&opened.inbox));
        cursors.inbox = Some(inbox.clone().and_then(Result::ok).unwrap_or(begins));
        let follows = join_inbox(node, &handle, &user.id, opened.inbox, inbox).await;
        let services = node.services.clone();
        let session = Session::new(services, identity, opened.session, handle.clone(), online);
        let expires = session.expires_at().and_then(|at| {
            let left = at.duration_since(std::time::SystemTime::now()).unwrap_or_default();
            Instant::now().checked_add(left)
        });
        let (pieces, taken) = mpsc::channel(CHUNKS_MAX);
        let (_places, _user, waiting) = (places, place, rooms.into());
        let mut stream =
            Self { session, handle, cursors, waiting, chunks: pieces, expires, _places, _user };
        let joined = match follows {
            Ok(()) => stream.join_all(node).await,
            Err(SubscribeFailed) => Err(rejected(ErrorCode::Unavailable, "the bus is away")),
        };
        if let Err(refused) = joined {
            stream.session.end().await;
            return Err(refused);
        }
        verify_session(node, &stream.handle).await;
        Ok((stream, taken))
    }

    /// Joins as many rooms as the outbox has room for, and makes sure of the others that they can be
    /// joined, since a refusal can be told in HTTP now only.
    async fn join_all(&mut self, node: &Node) -> Result<(), RejectedResponse> {
        let refused = |code| rejected(code, "a room could not be joined");
        for room in &self.waiting {
            self.session.check_join(room).map_err(refused)?;
        }
        while self.handle.outbox.has_room()
            && let Some(room) = self.waiting.pop_front()
        {
            self.join(room).await.map_err(refused)?;
        }
        let (rules, registry) = (&node.services.rules, node.services.presence.store());
        for room in &self.waiting {
            let found = registry.find(room.clone());
            let found = match tokio::time::timeout(node.services.limits.wait_max, found).await {
                Ok(Ok(found)) => found,
                Ok(Err(_)) | Err(_) => return Err(refused(ErrorCode::Unavailable)),
            };
            match found {
                None if !rules.create_on_join => return Err(refused(ErrorCode::NotFound)),
                Some(RoomSummary {
                    config: Some(RoomConfig { password: Some(_), .. }), ..
                }) => {
                    return Err(refused(ErrorCode::WrongPassword));
                }
                None | Some(_) => {}
            }
        }
        Ok(())
    }

    /// Joins a room; a refusal is told by a frame.
    async fn join(&mut self, room: RoomId) -> Result<(), ErrorCode> {
        let since = self.cursors.rooms.get(&room).cloned();
        let join = JoinFrame { room, since, history: history_default(), password: None };
        let outcome = self.session.execute(DeferredRequest::Join(None, join)).await;
        self.session.complete(outcome)
    }

    /// Serves the stream until it ends. Returns the close code that a WebSocket would have had.
    async fn run(mut self, node: &Node, stall_limit: Option<WriteTimeout>) -> u16 {
        if let Some(limit) = &stall_limit {
            limit.set(node.options.heartbeat.write_timeout);
        }
        let mut told = Some(self.session.bus_status());
        let StreamEnd(code) = self.serve(node, &mut told).await;
        self.session.end().await;
        self.handle.outbox.discard();
        match stall_limit.is_some_and(|limit| limit.has_expired()) {
            true => CloseCode::WriteTimeout.number(),
            false => code,
        }
    }

    async fn serve(
        &mut self,
        node: &Node,
        told: &mut Option<tokio::sync::watch::Receiver<BusStatus>>,
    ) -> StreamEnd {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let batch = node.drain_schedule.batch(handle.connection);
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.reset();
        let mut has_held = true;
        self.send(retry(RETRY));
        loop {
            if !outbox.has_held() {
                if std::mem::take(&mut has_held) {
                    handle.health.record_activity(unix_millis_now());
                }
                // What waits goes out before the end.
                let bytes_max = if outbox.is_closing() { usize::MAX } else { CHUNK_BYTES };
                let text = self.events(bytes_max);
                if !text.is_empty() {
                    self.send(text);
                    has_held = true;
                }
            }
            let behind = self.session.take_lagging();
            if !behind.is_empty() {
                Box::pin(self.session.catch_up(behind)).await;
            }
            if let Some(Close { code, .. }) = outbox.begin_close() {
                tracing::debug!(connection = %handle.connection, code, "an event stream ends");
                return StreamEnd(code);
            }
            if outbox.has_room()
                && let Some(room) = self.waiting.pop_front()
            {
                if let Err(code) = Box::pin(self.join(room)).await {
                    // It comes back, and is refused in HTTP where that does not pass.
                    let (code, reason) =
                        (CloseCode::PolicyViolation.number(), code.as_str().to_owned());
                    outbox.close(Close { code, reason });
                }
                continue;
            }
            let expires = self.expired();
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = batch.left() => {
                    let after_ms = batch.after_ms();
                    handle.send(&ServerFrame::Reconnect(ReconnectFrame {
                        after_ms,
                        reason: ReconnectReason::Draining,
                        node: None,
                    }));
                    self.session.end().await;
                    // Browsers read no `reconnect`: this is what spreads them.
                    let wait = RETRY + Duration::from_millis(after_ms);
                    let last = self.events(usize::MAX);
                    self.send(retry(wait) + &last);
                    return StreamEnd(CloseCode::ServiceRestart.number());
                }
                () = self.chunks.closed() => return GONE,
                () = expires => {
                    let code = CloseCode::TokenExpired.number();
                    outbox.close(Close { code, reason: String::new() });
                }
                () = outbox.woken() => {}
                news = status_changed(told) => self.session.send_bus_status(news),
                // Where a piece is under way it says the same.
                _ = ping.tick() => if !outbox.has_held() {
                    self.send(": ping\n\n".to_owned());
                    has_held = true;
                }
            }
        }
    }

    /// Resolves when the client's token ends.
    fn expired(&self) -> impl Future<Output = ()> + use<> {
        let expires = self.expires;
        async move {
            match expires {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Hands a piece to the connection, which takes it when it can.
    fn send(&self, text: String) {
        let piece = StreamChunk { text, handle: self.handle.clone() };
        self.handle.outbox.count_held(piece.bytes());
        // One at a time is under way, and a last one. Where the client has gone `closed` tells.
        let _ = self.chunks.try_send(Bytes::from_owner(piece));
    }

    /// The next frames of the outbox as events, of about `bytes_max`.
    fn events(&mut self, bytes_max: usize) -> String {
        let mut text = String::new();
        for frame in self.handle.outbox.take_up_to(bytes_max) {
            let Some(json) = frame_json(&frame) else { continue };
            text.reserve(json.len() + 64);
            if serde_json::from_str(&json).is_ok_and(|frame| self.cursors.advance(&frame)) {
                let _ = writeln!(text, "id: {}", self.cursors.to_id());
            }
            let _ = write!(text, "data: {json}\n\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use skein_websocket::Opcode;

    use super::*;

    fn at(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }

    #[test]
    fn positions_are_read_back_and_nonsense_is_none() {
        let mut cursors = Cursors { inbox: Some(at("i", 3)), ..Cursors::default() };
        cursors.rooms.insert("a:b".parse().unwrap(), at("1-e_x", 7));
        cursors.rooms.insert("r".parse().unwrap(), at("e", 0));
        assert_eq!(Cursors::of_id(cursors.to_id().as_bytes()), cursors);
        for bad in ["", "!", "AAAA", &URL_SAFE_NO_PAD.encode("a b~e:1,r~x,~"), &"A".repeat(9000)] {
            assert_eq!(Cursors::of_id(bad.as_bytes()), Cursors::default(), "{bad}");
        }
    }

    #[test]
    fn entries_move_positions_and_other_frames_do_not() {
        let mut cursors = Cursors::default();
        let mut note = |json: &str| cursors.advance(&serde_json::from_str(json).unwrap());
        assert!(note(
            r#"{"type":"joined","room":"r","epoch":"e","seq":9,"recovered":false,"history":[{"type":"message","epoch":"e","seq":8}]}"#
        ));
        assert!(note(r#"{"type":"message","room":"r","epoch":"e","seq":9}"#));
        assert!(note(r#"{"type":"direct","epoch":"i","seq":2}"#));
        assert!(!note(r#"{"type":"typing","room":"r","user":"ann","is_typing":true}"#));
        assert!(
            !note(r#"{"type":"message","room":"live","content":1}"#),
            "of a room without a log"
        );
        assert_eq!((&cursors.rooms["r"], &cursors.inbox), (&at("e", 9), &Some(at("i", 2))));
    }

    #[test]
    fn a_stream_that_is_resumed_is_where_it_was_until_it_gets_more() {
        let mut cursors = Cursors::default();
        cursors.rooms.insert("r".parse().unwrap(), at("e", 4));
        let joined =
            r#"{"type":"joined","room":"r","epoch":"e","seq":9,"recovered":true,"history":[]}"#;
        cursors.advance(&serde_json::from_str(joined).unwrap());
        assert_eq!(cursors.rooms["r"], at("e", 4));
    }

    #[test]
    fn frames_become_json_whatever_their_length_and_kind() {
        for length in [5, 200, 70_000] {
            let json = format!(r#"{{"a":"{}"}}"#, "x".repeat(length));
            let frame = skein_websocket::encode(Opcode::Text, &[json.as_bytes()]);
            assert_eq!(frame_json(&frame).as_deref(), Some(&*json));
        }
        let header = br#"{"type":"message"}"#;
        let length = (header.len() as u16).to_be_bytes();
        let frame = skein_websocket::encode(Opcode::Binary, &[&length, header, &[0, 255]]);
        let json = frame_json(&frame).unwrap();
        assert_eq!(json, r#"{"type":"message","encoding":"base64","content":"AP8="}"#);
        assert_eq!(frame_json(&skein_websocket::encode(Opcode::Ping, &[])), None);
    }
}
