//! Event streams: the frames of a connection for clients that cannot open a WebSocket (HTML Living
//! Standard, section 9.2).
//!
//! A stream is a session like any other, whose outbox is read here: each frame becomes one event.
//! The id of an event from a log holds the positions in all rooms and the inbox, so that the client
//! can resume on any node. A slow client continues from the log, like on a WebSocket: the stream is
//! built in chunks, the next one when the kernel has taken the previous one, and chunks in flight
//! count in the outbox. Rooms are joined one after the other, each when the outbox has space for
//! its history.
//!
//! A browser gives up for good on any response but 200 (`EventSource`, section 9.2.3). Temporary
//! rejections are therefore streams too, which say when to reconnect and end.

use std::{
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
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use skein_protocol::{
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId},
    position::Position,
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
        presence_store::unix_millis_now,
        room_store::{RoomConfig, RoomSummary},
    },
    connection::{
        encoding::{Encoding, JsonFrame},
        handle::ConnectionHandle,
        outbox::{Close, FRAME_OVERHEAD_BYTES, Outbox},
    },
    hub::SubscribeFailed,
    limits::Permit,
    session::{DeferredRequest, Session, auth::AuthError},
    telemetry::metrics::{GaugeGuard, HandshakeResult},
};

/// Most rooms of a stream.
const ROOMS_MAX: usize = 20;
/// Interval of comments that keep proxies from closing an idle stream.
const PING_EVERY: Duration = Duration::from_secs(25);
/// Delay before a client reconnects.
const RETRY: Duration = Duration::from_secs(3);
/// Longest event id that is decoded: 20 rooms with the longest names.
const CURSOR_BYTES_MAX: usize = 8 * 1024;
/// Bytes of queued frames per chunk of the stream.
const CHUNK_BYTES: usize = 32 * 1024;
/// Chunks that wait for the connection: one, and the last one of the stream.
const CHUNKS_MAX: usize = 2;
/// Header of a proxy that tries the next node after a 503, and tells browsers itself when to
/// reconnect if no node is left.
const FAILOVER: HeaderName = HeaderName::from_static("x-skein-failover");
/// Longest body of a rejection in bytes.
const REJECTION_BYTES_MAX: usize = 4 * 1024;

/// Positions of a client in its rooms and its inbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cursors {
    rooms: BTreeMap<RoomId, Position>,
    inbox: Option<Position>,
}

impl Cursors {
    /// Encodes the positions as an event id: base64url of `[<room>]~<epoch>:<seq>`, separated by
    /// commas.
    fn to_id(&self) -> String {
        let inbox = self.inbox.iter().map(|at| format!("~{at}"));
        let rooms = self.rooms.iter().map(|(room, at)| format!("{room}~{at}"));
        URL_SAFE_NO_PAD.encode(inbox.chain(rooms).collect::<Vec<_>>().join(","))
    }

    /// Decodes the valid parts of an event id. An invalid part counts as absent: the client then
    /// learns where the room begins.
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

    /// Advances the position in a room, or in the inbox.
    fn advance(&mut self, room: Option<RoomId>, to: Position) {
        match room {
            Some(room) => drop(self.rooms.insert(room, to)),
            None => self.inbox = Some(to),
        }
    }
}

/// Formats the `retry` field: the delay before the client reconnects after the end of the stream.
fn retry(wait: Duration) -> String {
    format!("retry: {}\n\n", wait.as_millis())
}

/// Appends an event. A line break between the tokens of its JSON begins a further line of data.
fn write_event(stream: &mut String, id: Option<&str>, json: &str) {
    stream.reserve(json.len() + 64);
    if let Some(id) = id {
        let _ = writeln!(stream, "id: {id}");
    }
    for line in json.split(['\n', '\r']) {
        let _ = writeln!(stream, "data: {line}");
    }
    stream.push('\n');
}

/// Builds the methods of `/sse`, with the headers that all of its responses share.
pub(super) fn methods(node: Arc<Node>) -> MethodRouter<Arc<Node>> {
    get(stream)
        .head(method_not_allowed)
        .options(preflight)
        .fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(node, finish_response))
}

async fn method_not_allowed() -> Response {
    let status = StatusCode::METHOD_NOT_ALLOWED;
    let mut response = error_response(status, "bad_request", "an event stream must be a GET");
    response.headers_mut().insert(header::ALLOW, METHODS);
    response
}

const METHODS: HeaderValue = HeaderValue::from_static("GET, OPTIONS");

/// Answers a CORS preflight (Fetch Standard, section 3.3.2). [`finish_response`] adds whether the
/// origin is allowed.
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

/// Adds CORS headers for an allowed origin, and forbids caching and changes in transit. Turns a
/// temporary rejection into a stream.
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
    let is_temporary = match response.status() {
        StatusCode::TOO_MANY_REQUESTS => is_get,
        StatusCode::SERVICE_UNAVAILABLE => is_get && !fails_over,
        _ => false,
    };
    if is_temporary {
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
    let policy = HeaderValue::from_static("no-store, no-transform");
    headers.insert(header::CACHE_CONTROL, policy);
    response
}

/// Turns a temporary rejection into a stream with its error and the delay before the next attempt.
async fn retry_stream(rejection: Response) -> Response {
    let wait = rejection.headers().get(header::RETRY_AFTER).and_then(utf8);
    let wait = wait.and_then(|seconds| seconds.parse().ok()).map_or(RETRY, Duration::from_secs);
    // Clients that were rejected at the same time must not reconnect at the same time.
    let wait = wait.max(RETRY) + rand::random_range(Duration::ZERO..RETRY);
    let body = axum::body::to_bytes(rejection.into_body(), REJECTION_BYTES_MAX).await;
    let error = body.ok().and_then(|body| serde_json::from_slice::<RejectionBody>(&body).ok());
    let mut text = retry(wait);
    if let Some(RejectionBody { error: RejectionDetail { code, message } }) = error {
        let error = json!({
            "type": "error",
            "code": code,
            "message": message,
            "retry_after_ms": wait.as_millis() as u64,
        });
        write_event(&mut text, None, &error.to_string());
    }
    event_stream(Body::from(text))
}

/// Body of a rejection in HTTP.
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
    // Without this header nginx buffers events.
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
    let permits = match ConnectionPermits::take(&node, &parts) {
        Ok(permits) => permits,
        Err((result, response)) => {
            node.metrics.handshakes.of(result).inc();
            return *response;
        }
    };
    let rooms = match rooms_of(&params) {
        Ok(rooms) => rooms,
        Err(text) => return error_response(StatusCode::BAD_REQUEST, "bad_request", text),
    };
    let info = parts.extensions.get::<ConnectInfo>().copied();
    let info = info
        .unwrap_or(ConnectInfo { peer: ([0, 0, 0, 0], 0).into(), local: ([0, 0, 0, 0], 0).into() });
    let client = ClientHandshake::read(&node, &parts.headers, &params, info, permits.allowed);
    let id = parts.headers.get("last-event-id").map(HeaderValue::as_bytes);
    let id = id.or(param(&params, "last_event_id").map(str::as_bytes));
    let cursors = Cursors::of_id(id.unwrap_or_default());

    let write_timeout = parts.extensions.get::<WriteTimeout>().cloned();

    let (reply, opened) = oneshot::channel();
    let (route, connection) = (sticky_route(info), ConnectionId::random());
    let serving_node = node.clone();
    // A separate task ends the session even if the client disconnects.
    let serve = async move {
        let node = serving_node;
        match EventStream::open(&node, connection, client, rooms, (cursors, route), permits).await {
            Ok((mut stream, chunks)) => {
                if reply.send(Ok(chunks)).is_err() {
                    return stream.session.end().await;
                }
                let _counted = GaugeGuard::new(&node.metrics.connections);
                let code = stream.run(&node, write_timeout).await;
                node.metrics.disconnected(code);
            }
            Err(response) => drop(reply.send(Err(response))),
        }
    };
    let panic_node = node.clone();
    node.tasks
        .spawn_connection(serve, move |panic| forget_panicked(&panic_node, connection, panic));
    let chunks = match opened.await {
        Ok(Ok(chunks)) => chunks,
        Ok(Err(response)) => {
            node.metrics.handshakes.of(HandshakeResult::Invalid).inc();
            return *response;
        }
        // The node is stopping.
        Err(_) => return *rejected(ErrorCode::Unavailable, "this node is stopping"),
    };
    node.metrics.handshakes.of(HandshakeResult::Accepted).inc();
    let chunks = futures_util::stream::unfold(chunks, async |mut chunks| {
        let chunk: Bytes = chunks.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(chunk), chunks))
    });
    event_stream(Body::from_stream(chunks))
}

fn rooms_of(params: &[(String, String)]) -> Result<Vec<RoomId>, &'static str> {
    let names =
        param(params, "rooms").unwrap_or_default().split(',').filter(|name| !name.is_empty());
    let mut rooms = names
        .map(str::parse)
        .collect::<Result<Vec<RoomId>, _>>()
        .map_err(|_| "`rooms` must be room names separated by commas")?;
    rooms.sort_unstable();
    rooms.dedup();
    if rooms.len() > ROOMS_MAX { Err("`rooms` must be at most 20 names") } else { Ok(rooms) }
}

/// An open event stream.
struct EventStream {
    session: Session,
    handle: Arc<ConnectionHandle>,
    cursors: Cursors,
    /// Rooms to join once the outbox has space for their history.
    waiting: VecDeque<RoomId>,
    chunks: mpsc::Sender<Bytes>,
    expires: Option<Instant>,
    _permits: ConnectionPermits,
    _user_permit: Permit<skein_protocol::ids::UserId>,
}

/// A part of a stream. Counts in the outbox until the kernel has taken it or the client has
/// disconnected.
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

/// End of a stream, as the close code that a WebSocket would have.
struct StreamEnd(u16);

/// The client has disconnected.
const GONE: StreamEnd = StreamEnd(1006);

/// An error response in HTTP.
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
    /// Opens the session and joins the rooms. Frames to send wait in the outbox.
    ///
    /// # Errors
    ///
    /// The error response; the session has then ended.
    async fn open(
        node: &Node,
        connection: ConnectionId,
        client: ClientHandshake,
        rooms: Vec<RoomId>,
        (mut cursors, route): (Cursors, String),
        permits: ConnectionPermits,
    ) -> Result<(Self, mpsc::Receiver<Bytes>), RejectedResponse> {
        let admitted = client.admit(node, connection).await.map_err(|error| match error {
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
            AdmissionError::Unavailable => {
                rejected(ErrorCode::Unavailable, "the bus is unavailable")
            }
        })?;
        let outbox = Outbox::to_owner(node.options.limits.outbox_bytes_max, node.metrics.clone())
            .with_encoding(Encoding::Json);
        let handle =
            Arc::new(ConnectionHandle::new(connection, outbox).with_owner(admitted.owner()));
        let (user, wait) = (admitted.identity.user.clone(), node.services.limits.wait_max);
        let online = node.services.presence.track_online(&user, wait).await;
        handle.send(&connected_frame(node, &admitted, &handle, route));
        let AdmittedClient { identity, user_permit, opened, .. } = admitted;
        let inbox = cursors.inbox.clone().map(Ok).or(client.inbox);
        // The start of the inbox is part of every event id from now on.
        let begins = Position::new(opened.inbox.epoch.clone(), unread_from(&opened.inbox));
        cursors.inbox = Some(inbox.clone().and_then(Result::ok).unwrap_or(begins));
        let inbox_joined = join_inbox(node, &handle, &user.id, opened.inbox, inbox).await;
        let services = node.services.clone();
        let session = Session::new(services, identity, opened.session, handle.clone(), online);
        let expires = session.expires_at().and_then(|at| {
            let left = at.duration_since(std::time::SystemTime::now()).unwrap_or_default();
            Instant::now().checked_add(left)
        });
        let (chunks, receiver) = mpsc::channel(CHUNKS_MAX);
        let (_permits, _user_permit, waiting) = (permits, user_permit, rooms.into());
        let mut stream =
            Self { session, handle, cursors, waiting, chunks, expires, _permits, _user_permit };
        let joined = match inbox_joined {
            Ok(()) => stream.join_all(node).await,
            Err(SubscribeFailed) => Err(rejected(ErrorCode::Unavailable, "the bus is unavailable")),
        };
        if let Err(response) = joined {
            stream.session.end().await;
            return Err(response);
        }
        verify_session(node, &stream.handle).await;
        Ok((stream, receiver))
    }

    /// Joins rooms while the outbox has space, and checks that the others can be joined, since
    /// errors can be HTTP responses only now.
    async fn join_all(&mut self, node: &Node) -> Result<(), RejectedResponse> {
        let reject = |code| rejected(code, "a room could not be joined");
        for room in &self.waiting {
            self.session.check_join(room).map_err(reject)?;
        }
        while self.handle.outbox.has_space()
            && let Some(room) = self.waiting.pop_front()
        {
            self.join(room).await.map_err(reject)?;
        }
        let (rules, rooms) = (&node.services.rules, &node.services.rooms);
        for room in &self.waiting {
            let found = rooms.find(room.clone());
            let found = match tokio::time::timeout(node.services.limits.wait_max, found).await {
                Ok(Ok(found)) => found,
                Ok(Err(_)) | Err(_) => return Err(reject(ErrorCode::Unavailable)),
            };
            match found {
                None if !rules.create_on_join => return Err(reject(ErrorCode::NotFound)),
                Some(RoomSummary {
                    config: Some(RoomConfig { password: Some(_), .. }), ..
                }) => {
                    return Err(reject(ErrorCode::WrongPassword));
                }
                None | Some(_) => {}
            }
        }
        Ok(())
    }

    /// Joins a room. Errors are also sent as a frame.
    async fn join(&mut self, room: RoomId) -> Result<(), ErrorCode> {
        let since = self.cursors.rooms.get(&room).cloned();
        let join = JoinFrame { room, since, history: history_default(), password: None };
        let outcome = self.session.execute(DeferredRequest::Join(None, join)).await;
        self.session.complete(outcome)
    }

    /// Serves the stream until it ends. Returns the close code that a WebSocket would have.
    async fn run(mut self, node: &Node, write_timeout: Option<WriteTimeout>) -> u16 {
        if let Some(limit) = &write_timeout {
            limit.set(node.options.heartbeat.write_timeout);
        }
        let mut status_rx = Some(self.session.bus_status());
        let StreamEnd(code) = self.serve(node, &mut status_rx).await;
        self.session.end().await;
        self.handle.outbox.discard();
        match write_timeout.is_some_and(|limit| limit.has_expired()) {
            true => CloseCode::WriteTimeout.number(),
            false => code,
        }
    }

    async fn serve(
        &mut self,
        node: &Node,
        status_rx: &mut Option<tokio::sync::watch::Receiver<BusStatus>>,
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
                // Before the end all queued frames are sent.
                let bytes_max = if outbox.is_closing() { usize::MAX } else { CHUNK_BYTES };
                let text = self.events(bytes_max);
                if !text.is_empty() {
                    self.send(text);
                    has_held = true;
                }
            }
            self.session.handle_signals().await;
            if let Some(Close { code, .. }) = outbox.begin_close() {
                tracing::debug!(connection = %handle.connection, code, "an event stream ended");
                return StreamEnd(code);
            }
            if outbox.has_space()
                && let Some(room) = self.waiting.pop_front()
            {
                if let Err(code) = Box::pin(self.join(room)).await {
                    // The client reconnects, and gets an HTTP error if the cause is permanent.
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
                    // Browsers ignore `reconnect`; the `retry` field spreads them over time.
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
                status = status_changed(status_rx) => self.session.send_bus_status(status),
                // A chunk in flight keeps the stream alive as well.
                _ = ping.tick() => if !outbox.has_held() {
                    self.send(": ping\n\n".to_owned());
                    has_held = true;
                }
            }
        }
    }

    /// Resolves when the token of the client expires.
    fn expired(&self) -> impl Future<Output = ()> + use<> {
        let expires = self.expires;
        async move {
            match expires {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Passes a chunk to the connection, which sends it when it can.
    fn send(&self, text: String) {
        let chunk = StreamChunk { text, handle: self.handle.clone() };
        self.handle.outbox.count_held(chunk.bytes());
        // The channel has space for one chunk in flight and the last one. If the client has
        // disconnected, `closed` resolves.
        let _ = self.chunks.try_send(Bytes::from_owner(chunk));
    }

    /// Returns the next frames of the outbox as events, about `bytes_max` in total.
    fn events(&mut self, bytes_max: usize) -> String {
        let mut text = String::new();
        for frame in self.handle.outbox.take_up_to(bytes_max) {
            let Some(JsonFrame { position, text: json }) = JsonFrame::parse(&frame) else {
                continue;
            };
            let id = position.map(|(room, to)| {
                self.cursors.advance(room, to);
                self.cursors.to_id()
            });
            write_event(&mut text, id.as_deref(), json);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use skein_protocol::position::Seq;

    use super::*;

    fn at(epoch: &str, seq: Seq) -> Position {
        Position::new(epoch.parse().unwrap(), seq)
    }

    #[test]
    fn event_ids_decode_and_invalid_parts_are_skipped() {
        let mut cursors = Cursors { inbox: Some(at("i", 3)), ..Cursors::default() };
        cursors.advance(Some("a:b".parse().unwrap()), at("1-e_x", 6));
        cursors.advance(Some("a:b".parse().unwrap()), at("1-e_x", 7));
        cursors.advance(Some("r".parse().unwrap()), at("e", 0));
        assert_eq!(Cursors::of_id(cursors.to_id().as_bytes()), cursors);
        cursors.advance(None, at("i", 4));
        assert_eq!(Cursors::of_id(cursors.to_id().as_bytes()).inbox, Some(at("i", 4)));
        for bad in ["", "!", "AAAA", &URL_SAFE_NO_PAD.encode("a b~e:1,r~x,~"), &"A".repeat(9000)] {
            assert_eq!(Cursors::of_id(bad.as_bytes()), Cursors::default(), "{bad}");
        }
    }

    #[test]
    fn line_breaks_between_json_tokens_do_not_end_an_event() {
        let mut text = String::new();
        write_event(&mut text, Some("abc"), r#"{"a":1}"#);
        write_event(&mut text, None, "{\"a\":\r\n\n1}");
        let second = "data: {\"a\":\ndata: \ndata: \ndata: 1}\n\n";
        assert_eq!(text, format!("id: abc\ndata: {{\"a\":1}}\n\n{second}"));
    }
}
