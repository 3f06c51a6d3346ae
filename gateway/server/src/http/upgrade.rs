//! WebSocket handshakes: checks, the upgrade of the TCP connection, and the first steps of a
//! connection.
//!
//! Errors of the handshake and of the node are HTTP responses. Errors of the client's identity are
//! a close frame after the 101, since a browser shows its page nothing of a rejected handshake.
//! nginx answers a 503 by trying the next node, and counts it against this one. A 503 is therefore
//! only for conditions of this node: drain, overload, bus down.

use std::{io, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, Query, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, request::Parts},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::upgrade::OnUpgrade;
use sha1::{Digest as _, Sha1};
use skein_protocol::{
    SUBPROTOCOL,
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId, UserId},
    position::Position,
    protocol::{
        PASSWORD_BYTES_MAX,
        client_frame::{JOIN_HISTORY_MAX, JoinFrame, history_default},
        server_frame::{ErrorFrame, ServerFrame},
    },
};
use skein_websocket::extension::DeflateParams;
use tokio::{io::Interest, net::TcpStream, time::Instant};

use super::{
    ConnectInfo, Node, ROUTE_COOKIE,
    buffered::BufferedHead,
    connection_log::OpenedConnection,
    error::error_response,
    extensions,
    handshake::{
        AdmittedClient, ClientHandshake, Params, connected_frame, join_inbox, param, subprotocols,
        verify_session,
    },
    headers::has_element,
    permits::ConnectionPermits,
};
use crate::{
    cluster::route_of,
    transport::{
        self, Handler, WebSocketConnection,
        echo::{Echo, EchoMode},
    },
};
use skein_core::{
    bus::sessions::OpenedSession,
    connection::{
        encoding::{DeflateOptions, Encoding},
        handle::ConnectionHandle,
        outbox::{Close, Outbox},
    },
    hub::SubscribeFailed,
    limits::{
        Permit,
        meter::{Meter, MeterRates},
    },
    session::{DeferredRequest, Session},
    telemetry::metrics::{GaugeGuard, HandshakeRefusal, HandshakeResult, Transport},
};

/// Purpose of a WebSocket, by its path.
enum Endpoint {
    Chat,
    Room(Result<JoinFrame, &'static str>),
    Echo,
}

pub(super) async fn chat(
    State(node): State<Arc<Node>>,
    Query(params): Params,
    request: axum::extract::Request,
) -> Response {
    upgrade(node, request, &params, Endpoint::Chat)
}

pub(super) async fn room(
    State(node): State<Arc<Node>>,
    room: Result<Path<String>, PathRejection>,
    Query(params): Params,
    request: axum::extract::Request,
) -> Response {
    // A path that is no UTF-8 is no valid room either.
    let room = room.map_or_else(|_| String::new(), |Path(room)| room);
    let join = join_of(&room, &params);
    upgrade(node, request, &params, Endpoint::Room(join))
}

pub(super) async fn echo(
    State(node): State<Arc<Node>>,
    Query(params): Params,
    request: axum::extract::Request,
) -> Response {
    if node.options.echo == EchoMode::Off {
        return super::error::not_found().await;
    }
    upgrade(node, request, &params, Endpoint::Echo)
}

/// Returns the join that path and query of `/ws/rooms/{room}` request.
fn join_of(room: &str, params: &[(String, String)]) -> Result<JoinFrame, &'static str> {
    let room: RoomId =
        room.parse().map_err(|_| "a room name has 1 to 128 characters of A-Z a-z 0-9 _ . : @ -")?;
    let since = match param(params, "since") {
        Some(since) => {
            Some(since.parse::<Position>().map_err(|_| "`since` must be <epoch>:<seq>")?)
        }
        None => None,
    };
    let history = match param(params, "history") {
        Some(text) => text
            .parse()
            .ok()
            .filter(|count| *count <= JOIN_HISTORY_MAX)
            .ok_or("`history` must be 0 to 1000")?,
        None => history_default(),
    };
    let password = param(params, "password").map(str::to_owned);
    if password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
        return Err("`password` is too long");
    }
    Ok(JoinFrame { room, since, history, password })
}

fn upgrade(
    node: Arc<Node>,
    request: axum::extract::Request,
    params: &[(String, String)],
    endpoint: Endpoint,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let (handshake, permits) = match check_handshake(&node, &mut parts, params) {
        Ok(checked) => checked,
        Err((cause, response)) => {
            node.metrics.refused(cause);
            node.log_refused(cause, &parts, &response);
            return *response;
        }
    };
    let (Some(on_upgrade), Some(info)) =
        (parts.extensions.remove::<OnUpgrade>(), parts.extensions.get::<ConnectInfo>().copied())
    else {
        return error_response(
            StatusCode::BAD_REQUEST,
            "bad_request",
            "this connection cannot be upgraded",
        );
    };
    node.metrics.handshakes.of(HandshakeResult::Accepted).inc();
    node.metrics.deflate_handshakes.inc_by(handshake.deflate.iter().len() as u64);

    let route = sticky_route(&node, &parts.headers, info);
    let connection = ConnectionId::random();
    let upgrade = Box::new(PendingUpgrade {
        connection,
        client: ClientHandshake::read(&node, &parts.headers, params, info, permits.allowed),
        json_ping: param(params, "ping") == Some("json"),
        endpoint,
        deflate: handshake.deflate,
        route: route.clone(),
        permits,
    });
    let serving_node = node.clone();
    let serve = async move {
        let node = serving_node;
        let upgraded = match on_upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::debug!(%error, "a client disconnected during its handshake");
                return;
            }
        };
        let Ok(parts) = upgraded.downcast::<BufferedHead>() else { return };
        let (socket, unread) = parts.io.into_parts();
        // hyper's read buffer must not live as long as the connection.
        let early = [parts.read_buf, unread].concat();
        // The same holds for the memory that opening it needs.
        let served = {
            let _permit = node.state.lifecycle.opening.acquire().await;
            Box::pin(upgrade.open(node.clone(), socket, early)).await
        };
        let Some(served) = served else { return node.metrics.handshakes_abandoned.inc() };
        served.serve(&node).await;
    };
    let panic_node = node.clone();
    node.tasks
        .spawn_connection(serve, move |panic| forget_panicked(&panic_node, connection, panic));
    switching_protocols(&handshake, &route)
}

/// Removes a connection from the hub after a panic of its task, since its session may not have left
/// its rooms.
pub(super) fn forget_panicked(node: &Arc<Node>, connection: ConnectionId, panic: &str) {
    node.metrics.panicked(connection, panic);
    let hub = node.services.hub.clone();
    node.tasks
        .spawn_job("forget_connection", async move { hub.remove_connection(connection).await });
}

/// Result of a handshake.
struct Negotiated {
    accept: String,
    /// Whether the client offered subprotocols, so that the response must choose one.
    subprotocol: bool,
    deflate: Option<DeflateParams>,
}

/// Builds the 101 response, with the sticky cookie.
fn switching_protocols(negotiated: &Negotiated, route: &str) -> Response {
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, &negotiated.accept)
        .header(
            header::SET_COOKIE,
            format!("{ROUTE_COOKIE}={route}; Path=/; HttpOnly; SameSite=Lax"),
        )
        .body(Body::empty())
        .expect("the header values are ASCII");
    if negotiated.subprotocol {
        let value = HeaderValue::from_static(SUBPROTOCOL);
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, value);
    }
    if let Some(deflate) = negotiated.deflate {
        let value = deflate.to_string().try_into().expect("the header value is ASCII");
        response.headers_mut().insert(header::SEC_WEBSOCKET_EXTENSIONS, value);
    }
    response
}

/// Returns the route by which a client came, and records it as that of this node.
pub(super) fn sticky_route(node: &Node, headers: &HeaderMap, info: ConnectInfo) -> String {
    let route = route_of(info.local);
    node.cluster.record_route(&route, headers.contains_key("x-forwarded-for"));
    route
}

/// Checks the handshake, negotiates its options, and takes the permits of the connection.
fn check_handshake(
    node: &Node,
    parts: &mut Parts,
    params: &[(String, String)],
) -> Result<(Negotiated, ConnectionPermits), (HandshakeRefusal, Box<Response>)> {
    let as_invalid = |response| (HandshakeRefusal::Invalid, response);
    let accept = accept_key(parts).map_err(as_invalid)?;
    let subprotocol = choose_subprotocol(parts).map_err(as_invalid)?;
    // Some clients negotiate compression without context takeover and then violate it; they can
    // turn compression off.
    let is_wanted = param(params, "deflate") != Some("off");
    let deflate_options = is_wanted && node.options.deflate_bytes_min.is_some();
    let deflate = extensions::negotiate(&parts.headers, deflate_options).map_err(as_invalid)?;
    let permits = ConnectionPermits::take(node, parts)?;
    Ok((Negotiated { accept, subprotocol, deflate }, permits))
}

/// Whether the response chooses `chat.v1` among the offered subprotocols.
///
/// # Errors
///
/// An error response if the client offers only others: a browser would fail a handshake that
/// chooses none, without a reason for the page.
fn choose_subprotocol(parts: &Parts) -> Result<bool, Box<Response>> {
    let offered = subprotocols(&parts.headers);
    if offered.is_empty() || offered.iter().any(|offer| offer == SUBPROTOCOL) {
        return Ok(!offered.is_empty());
    }
    let text = "offer the subprotocol `chat.v1` too, as in `Sec-WebSocket-Protocol: chat.v1, \
                bearer.<token>`, or no subprotocol";
    Err(Box::new(error_response(StatusCode::BAD_REQUEST, "bad_request", text)))
}

/// Checks a handshake (RFC 6455, section 4.2.1) and returns its accept key (section 4.2.2).
fn accept_key(parts: &Parts) -> Result<String, Box<Response>> {
    let bad = |text| Box::new(error_response(StatusCode::BAD_REQUEST, "bad_request", text));
    let has = |name, element| has_element(&parts.headers, name, element);
    if parts.method != Method::GET {
        let text = "a WebSocket handshake must be a GET";
        return Err(Box::new(error_response(StatusCode::METHOD_NOT_ALLOWED, "bad_request", text)));
    }
    if !has(header::UPGRADE, "websocket") {
        let text = "this path accepts only WebSocket handshakes";
        let mut response = error_response(StatusCode::UPGRADE_REQUIRED, "upgrade_required", text);
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        return Err(Box::new(response));
    }
    if parts.version != Version::HTTP_11 {
        return Err(bad("a WebSocket handshake must be HTTP/1.1"));
    }
    if parts.headers.get_all(header::HOST).iter().count() != 1 {
        return Err(bad("a request must have exactly one Host header"));
    }
    // The new protocol begins after the whole request (RFC 9110, section 7.8): with a body, the two
    // sides could disagree on where the frames begin.
    let length = parts.headers.get(header::CONTENT_LENGTH);
    if parts.headers.contains_key(header::TRANSFER_ENCODING)
        || length.is_some_and(|length| length.as_bytes() != b"0")
    {
        return Err(bad("a WebSocket handshake must have no body"));
    }
    if !has(header::CONNECTION, "upgrade") {
        return Err(bad("the Connection header must contain `Upgrade`"));
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        let text = "Sec-WebSocket-Version must be 13";
        let mut response = error_response(StatusCode::UPGRADE_REQUIRED, "upgrade_required", text);
        let version = HeaderValue::from_static("13");
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, version);
        return Err(Box::new(response));
    }
    let mut keys = parts.headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else {
        return Err(bad("a handshake must have exactly one Sec-WebSocket-Key"));
    };
    if STANDARD.decode(key.as_bytes()).is_ok_and(|nonce| nonce.len() == 16) {
        let mut digest = Sha1::new();
        digest.update(key.as_bytes());
        digest.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        Ok(STANDARD.encode(digest.finalize()))
    } else {
        Err(bad("Sec-WebSocket-Key must be 16 bytes in base64"))
    }
}

/// A WebSocket between its 101 response and its first frame.
struct PendingUpgrade {
    connection: ConnectionId,
    client: ClientHandshake,
    json_ping: bool,
    endpoint: Endpoint,
    deflate: Option<DeflateParams>,
    route: String,
    permits: ConnectionPermits,
}

/// An open connection with its permits.
struct ActiveConnection {
    connection: WebSocketConnection,
    _permits: ConnectionPermits,
    _user: Option<Permit<UserId>>,
}

impl PendingUpgrade {
    async fn open(
        self: Box<Self>,
        node: Arc<Node>,
        socket: TcpStream,
        early: Vec<u8>,
    ) -> Option<Box<ActiveConnection>> {
        let Self { connection, client, json_ping, endpoint, deflate, route, permits } = *self;
        let access = node.access.load_full();
        let limits = &access.limits;
        let deflating = deflate.zip(node.options.deflate_bytes_min);
        let deflating = deflating
            .map(|(deflate, bytes_min)| DeflateOptions { window: deflate.window(), bytes_min });
        let outbox = Outbox::to_socket(socket, limits.outbox_bytes_max, node.metrics.clone())
            .with_encoding(deflating.map_or(Encoding::WebSocket, Encoding::Deflate));
        let handle = ConnectionHandle::new(connection, outbox);
        let options = transport::ConnectionOptions {
            message_bytes_max: limits.message_bytes_max,
            heartbeat: node.options.heartbeat.clone(),
            json_ping,
        };
        let rates = match (&endpoint, node.options.echo) {
            // A conformance suite sends frames that no client needs.
            (Endpoint::Echo, EchoMode::Verbatim) => Arc::new(MeterRates::unlimited()),
            _ => node.services.client_limits.load().rates.clone(),
        };
        let meter = Meter::new(rates, Some((node.state.address_meters.clone(), permits.address)));
        let served = |handle, handler, permits, user, early| {
            let (wheel, metrics) = (node.timers.clone(), node.metrics.clone());
            let connection =
                WebSocketConnection::new(handle, handler, options, meter, wheel, metrics, early);
            Some(Box::new(ActiveConnection { connection, _permits: permits, _user: user }))
        };
        if let Endpoint::Echo = endpoint {
            let echo = Handler::Echo(Echo { mode: node.options.echo });
            return served(Arc::new(handle), echo, permits, None, early);
        }

        let mut early = early;
        let closing = || Handler::Echo(Echo { mode: EchoMode::Off });
        let admission = client.admit(&node, handle.connection);
        let admitted = match unless_disconnected(admission, &handle.outbox, Some(&mut early)).await
        {
            Some(Ok(admitted)) => admitted,
            None => return None,
            Some(Err(error)) => {
                node.state.connection_log.not_admitted(&error, client.address);
                let (code, reason) = error.close();
                handle.outbox.close(Close { code: code.number(), reason });
                return served(Arc::new(handle), closing(), permits, None, early);
            }
        };
        let (id, user) = (handle.connection, admitted.identity.user.clone());
        let handle = Arc::new(handle.with_owner(admitted.owner()));
        let resumed = admitted.opened.resumed.is_some();
        let request_id = client.request_id.as_deref();
        let opened = OpenedConnection { transport: "websocket", resumed, request_id };
        node.state.connection_log.opened(&handle, opened);
        let (presence, wait) = (&node.services.presence, node.services.limits.wait_max);
        let connected = connected_frame(&node, &admitted, &handle, route);
        let AdmittedClient {
            identity,
            user_permit,
            opened: OpenedSession { session, inbox, .. },
            ..
        } = admitted;
        let opening = async {
            // Before the client receives `connected`, all nodes see that its user is online.
            let online = presence.track_online(&user, wait).await;
            handle.send(&connected);
            match join_inbox(&node, &handle, &user.id, inbox, client.inbox).await {
                Ok(()) => verify_session(&node, &handle).await,
                Err(SubscribeFailed) => {
                    // The client reconnects, to this node or to one with a bus.
                    let (code, reason) =
                        (CloseCode::TryAgainLater.number(), "unavailable".to_owned());
                    handle.outbox.close(Close { code, reason });
                }
            }
            online
        };
        let Some(online) = unless_disconnected(opening, &handle.outbox, Some(&mut early)).await
        else {
            node.services.hub.leave(RoomId::inbox_of(&user.id), id, None).await;
            node.services.sessions.close(user.id, session, id);
            handle.outbox.discard();
            return None;
        };
        let services = node.services.clone();
        let session = Session::new(services, identity, session, handle.clone(), online);
        let chat = Handler::Chat(Box::new(session));
        let mut opened = served(handle.clone(), chat, permits, Some(user_permit), early)?;
        if let Endpoint::Room(join) = endpoint {
            handle.outbox.flush();
            let joining = join_path_room(&node, &mut opened.connection, &handle, join);
            // If the peer disconnects meanwhile, `serve` ends the session.
            if let Some(Err(code)) = unless_disconnected(joining, &handle.outbox, None).await {
                let close = match code {
                    ErrorCode::Unavailable | ErrorCode::RateLimited => CloseCode::TryAgainLater,
                    _ => CloseCode::PolicyViolation,
                };
                let reason = code.as_str().to_owned();
                handle.outbox.close(Close { code: close.number(), reason });
            }
        }
        Some(opened)
    }
}

/// Bytes that are read from a client before its connection is open.
const EARLY_BYTES_MAX: usize = 64 * 1024;

/// Runs a step that opens a connection. Returns `None`, and drops the step, if the peer
/// disconnects.
///
/// Input that arrives meanwhile is appended to `early`. Without `early` it stays in the kernel, and
/// hides a later disconnect.
async fn unless_disconnected<T>(
    step: impl Future<Output = T>,
    outbox: &Outbox,
    early: Option<&mut Vec<u8>>,
) -> Option<T> {
    let Some(socket) = outbox.socket() else { return Some(step.await) };
    // Both arms are cancel-safe or complete.
    tokio::select! {
        biased;
        () = disconnected(socket, early) => None,
        output = step => Some(output),
    }
}

/// Resolves when the peer has closed the connection. Cancel-safe.
async fn disconnected(socket: &TcpStream, mut early: Option<&mut Vec<u8>>) {
    loop {
        if has_closed(socket) {
            return;
        }
        match &mut early {
            Some(early) if early.len() < EARLY_BYTES_MAX => match read_early(socket, early) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            },
            _ => match socket.try_io(Interest::READABLE, || peek(socket)) {
                Ok(0) => return,
                // The input stays in the kernel, and hides everything after it.
                Ok(_) => return std::future::pending().await,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            },
        }
        if socket.readable().await.is_err() {
            return;
        }
    }
}

/// Whether the peer has closed the connection. Reads nothing.
fn has_closed(socket: &TcpStream) -> bool {
    match peek(socket) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

fn peek(socket: &TcpStream) -> io::Result<usize> {
    // Directly, since the runtime may not have the event yet.
    socket2::SockRef::from(socket).peek(&mut [std::mem::MaybeUninit::uninit(); 1])
}

fn read_early(socket: &TcpStream, early: &mut Vec<u8>) -> io::Result<()> {
    let mut chunk = [0; 4096];
    let count = socket.try_read(&mut chunk)?;
    early.extend_from_slice(&chunk[..count]);
    Ok(())
}

impl ActiveConnection {
    async fn serve(mut self: Box<Self>, node: &Node) {
        let drain = node.drain_schedule.notice(self.connection.id());
        let since = Instant::now();
        let end = {
            let metrics = &node.metrics;
            let _counted = GaugeGuard::new(&metrics.connections);
            let _by_transport =
                GaugeGuard::new(metrics.transport_connections.of(Transport::WebSocket));
            self.connection.run(&drain, &node.state.lifecycle.ending).await
        };
        node.metrics.disconnected(end.code, &end.reason, end.side);
        let (handle, received) = (self.connection.connection(), self.connection.received());
        node.state.connection_log.closed(handle, since, received, &end);
    }
}

/// Joins the room of `/ws/rooms/{room}`.
async fn join_path_room(
    node: &Node,
    connection: &mut WebSocketConnection,
    handle: &ConnectionHandle,
    join: Result<JoinFrame, &'static str>,
) -> Result<(), ErrorCode> {
    match (join, connection.session()) {
        (Ok(join), Some(session)) => {
            let outcome = session.execute(DeferredRequest::Join(None, join)).await;
            session.complete(outcome)
        }
        (Ok(_), None) => Ok(()),
        (Err(text), _) => {
            let rejection = ErrorFrame {
                frame_type: Some("join".to_owned()),
                ..*ErrorFrame::new(ErrorCode::BadRequest, text)
            };
            node.metrics.errors.of(ErrorCode::BadRequest).inc();
            handle.send(&ServerFrame::Error(Box::new(rejection)));
            Err(ErrorCode::BadRequest)
        }
    }
}
