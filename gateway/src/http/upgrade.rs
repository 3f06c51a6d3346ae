//! The handshake of a WebSocket: who may open one, and the TCP stream taken back from HTTP.
//!
//! What is wrong with the handshake itself or with the node is answered in HTTP. What is wrong with
//! the client's identity is answered by a close frame after 101, since a browser shows its page
//! nothing of a refused handshake. A 503 makes nginx try the next node and counts against this one,
//! so it is kept for what is this node's own: drain, overload, bus down.

use std::{sync::Arc, time::SystemTime};

use axum::{
    body::Body,
    extract::{Path, Query, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, request::Parts},
    response::Response,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::upgrade::OnUpgrade;
use md5::{Digest as _, Md5};
use sha1::Sha1;
use shared::{
    SUBPROTOCOL,
    close::CloseCode,
    codec::extension::Deflate,
    error::ErrorCode,
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{InvalidPosition, Position},
    protocol::{
        PASSWORD_BYTES_MAX,
        answer::{Answer, Connected, Inbox, Refusal},
        request::{JOIN_HISTORY_MAX, Join, history_default},
    },
    token::ResumeToken,
};
use tokio::{net::TcpStream, time::Instant};

use super::{
    Ends, Node,
    address::client_address,
    begun::Begun,
    error::{refuse, refuse_for},
    extensions,
    listen::TcpPlace,
};
use crate::{
    bus::sessions::{self, About, Opened, SecretDigest},
    hub::{
        NotFollowed,
        join::{Admission, Start},
        member::{Owner, Subscriber},
    },
    limits::{Place, address_key},
    outbox::{Close, Outbox, deflate::Deflating},
    session::{
        Request, Services, Session,
        auth::{Auth, Credentials, Identity},
    },
    telemetry::metrics::Handshake,
    transport::{
        self, Connection, Handler,
        echo::{Echo, EchoMode},
    },
};

/// The query of a handshake, in the order sent; the first of a name counts.
type Params = Query<Vec<(String, String)>>;

/// What a connection is for.
enum Endpoint {
    Chat,
    Room(Result<Join, &'static str>),
    Echo,
}

/// What a client asks for in its query and headers, beside who it is.
struct Wishes {
    /// `?session=` or the subprotocol `session.<token>`.
    session: Option<ResumeToken>,
    /// `?inbox=`: what this device has of the inbox.
    inbox: Option<Result<Position, InvalidPosition>>,
    json_ping: bool,
}

/// What a connection holds as long as it lives, so that limits count it.
struct Places {
    _all: Place<()>,
    _address: Place<std::net::IpAddr>,
    _tcp: Option<TcpPlace>,
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
    // What is no UTF-8 is no room either.
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

/// The join that `/ws/rooms/{room}` asks for by its path and query.
fn join_of(room: &str, params: &[(String, String)]) -> Result<Join, &'static str> {
    let room: RoomId = room.parse().map_err(|_| "a room is 1 to 128 of A-Z a-z 0-9 _ . : @ -")?;
    let since = match param(params, "since") {
        Some(since) => Some(since.parse::<Position>().map_err(|_| "`since` is <epoch>:<seq>")?),
        None => None,
    };
    let history = match param(params, "history") {
        Some(text) => text
            .parse()
            .ok()
            .filter(|count| *count <= JOIN_HISTORY_MAX)
            .ok_or("`history` is 0 to 1000")?,
        None => history_default(),
    };
    let password = param(params, "password").map(str::to_owned);
    if password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
        return Err("`password` is too long");
    }
    Ok(Join { room, since, history, password })
}

fn param<'a>(params: &'a [(String, String)], name: &str) -> Option<&'a str> {
    params.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

fn upgrade(
    node: Arc<Node>,
    request: axum::extract::Request,
    params: &[(String, String)],
    endpoint: Endpoint,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let (handshake, places) = match admit(&node, &mut parts) {
        Ok(admitted) => admitted,
        Err((outcome, response)) => {
            node.metrics.handshakes.of(outcome).inc();
            return *response;
        }
    };
    let (Some(on_upgrade), Some(ends)) =
        (parts.extensions.remove::<OnUpgrade>(), parts.extensions.get::<Ends>().copied())
    else {
        return refuse(StatusCode::BAD_REQUEST, "bad_request", "this connection cannot upgrade");
    };
    node.metrics.handshakes.of(Handshake::Accepted).inc();
    node.metrics.deflate_handshakes.inc_by(handshake.deflate.iter().len() as u64);

    let offered = subprotocols(&parts.headers);
    let route = route(ends);
    let session = || offered.iter().find_map(|offer| offer.strip_prefix("session."));
    let opening = Box::new(Opening {
        credentials: credentials(&node, &parts.headers, params, &offered),
        wishes: Wishes {
            session: param(params, "session").or_else(session).and_then(|text| text.parse().ok()),
            inbox: param(params, "inbox").map(str::parse),
            json_ping: param(params, "ping") == Some("json"),
        },
        endpoint,
        deflate: handshake.deflate,
        route: route.clone(),
        address: client_address(ends.peer.ip(), &parts.headers, &node.options.trusted_proxies),
        user_agent: user_agent(&parts.headers),
        places,
    });
    node.clone().tasks.spawn_connection(async move {
        let upgraded = match on_upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::debug!(%error, "a client left during its handshake");
                return;
            }
        };
        let Ok(parts) = upgraded.downcast::<Begun>() else { return };
        let (socket, unread) = parts.io.into_parts();
        // hyper's read buffer must not live as long as the connection.
        let early = [parts.read_buf, unread].concat();
        // What opening it takes must not live as long either.
        let opening = Box::pin(opening.open(node.clone(), socket, early));
        opening.await.serve(&node).await;
    });
    switching(&handshake, &offered, &route)
}

/// What a handshake is answered.
struct Agreed {
    accept: String,
    deflate: Option<Deflate>,
}

/// 101, with the sticky cookie.
fn switching(agreed: &Agreed, offered: &[String], route: &str) -> Response {
    let mut response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::UPGRADE, "websocket")
        .header(header::CONNECTION, "Upgrade")
        .header(header::SEC_WEBSOCKET_ACCEPT, &agreed.accept)
        .header(header::SET_COOKIE, format!("gw_node={route}; Path=/; HttpOnly; SameSite=Lax"))
        .body(Body::empty())
        .expect("the values are ASCII");
    if offered.iter().any(|protocol| protocol == SUBPROTOCOL) {
        let value = HeaderValue::from_static(SUBPROTOCOL);
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, value);
    }
    if let Some(deflate) = agreed.deflate {
        let value = deflate.to_string().try_into().expect("the answer is ASCII");
        response.headers_mut().insert(header::SEC_WEBSOCKET_EXTENSIONS, value);
    }
    response
}

/// The name of this node for nginx: what its `sticky route` computes of the address it dialled
/// (the MD5 of `ip:port` in hexadecimal).
fn route(ends: Ends) -> String {
    let digest = Md5::digest(ends.local.to_string());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether the handshake is one, from a page that may, and whether there is room.
fn admit(node: &Node, parts: &mut Parts) -> Result<(Agreed, Places), (Handshake, Box<Response>)> {
    let as_bad = |response| (Handshake::Bad, response);
    let accept = accept_key(parts).map_err(as_bad)?;
    let deflates = node.options.deflate_bytes_min.is_some();
    let deflate = extensions::negotiate(&parts.headers, deflates).map_err(as_bad)?;
    if !node.options.allowed_origins.allow(&parts.headers) {
        let text = "this page's origin is not in server.allowed_origins";
        let response = refuse(StatusCode::FORBIDDEN, "forbidden", text);
        return Err((Handshake::Origin, Box::new(response)));
    }
    let unavailable = |text| {
        let (status, wait) = (StatusCode::SERVICE_UNAVAILABLE, std::time::Duration::from_secs(1));
        (Handshake::Unavailable, Box::new(refuse_for(status, "unavailable", text, wait)))
    };
    if let Some(failing) = node.failing().first() {
        return Err(unavailable(match *failing {
            "drain" => "this node is stopping",
            _ => "this node cannot reach the others",
        }));
    }

    let limits = &node.options.limits;
    let peer = parts.extensions.get::<Ends>().map_or([0, 0, 0, 0].into(), |ends| ends.peer.ip());
    let address = client_address(peer, &parts.headers, &node.options.trusted_proxies);
    let address = address_key(address);
    let now = Instant::now();
    let limited = |text, wait| {
        let status = StatusCode::TOO_MANY_REQUESTS;
        (Handshake::Limited, Box::new(refuse_for(status, "rate_limited", text, wait)))
    };
    node.state
        .handshakes
        .take(address, limits.handshakes_per_ip, now)
        .map_err(|wait| limited("too many handshakes from this address", wait))?;
    let by_address =
        node.state.by_address.enter(address, limits.connections_per_ip).ok_or_else(|| {
            let wait = std::time::Duration::from_secs(5);
            limited("too many connections from this address", wait)
        })?;
    node.state
        .accepts
        .take((), limits.accepts, now)
        .map_err(|_| unavailable("too many handshakes at once"))?;
    let all = node
        .state
        .all
        .enter((), limits.connections_max)
        .ok_or_else(|| unavailable("this node is full"))?;
    let tcp = parts.extensions.get::<TcpPlace>().cloned();
    Ok((Agreed { accept, deflate }, Places { _all: all, _address: by_address, _tcp: tcp }))
}

/// Checks a handshake (RFC 6455, section 4.2.1) and answers its key (section 4.2.2).
fn accept_key(parts: &Parts) -> Result<String, Box<Response>> {
    let bad = |text| Box::new(refuse(StatusCode::BAD_REQUEST, "bad_request", text));
    let has = |name, token: &str| {
        tokens(&parts.headers, name).any(|found| found.eq_ignore_ascii_case(token))
    };
    if parts.method != Method::GET {
        let text = "a WebSocket handshake is a GET";
        return Err(Box::new(refuse(StatusCode::METHOD_NOT_ALLOWED, "bad_request", text)));
    }
    if !has(header::UPGRADE, "websocket") {
        let text = "this path speaks WebSocket only";
        let mut response = refuse(StatusCode::UPGRADE_REQUIRED, "upgrade_required", text);
        let headers = response.headers_mut();
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        return Err(Box::new(response));
    }
    if parts.version != Version::HTTP_11 {
        return Err(bad("a WebSocket handshake is HTTP/1.1"));
    }
    if parts.headers.get_all(header::HOST).iter().count() != 1 {
        return Err(bad("a request has one Host header"));
    }
    // The new protocol begins behind the whole request (RFC 9110, section 7.8): with a body one
    // side's content would be the other's frames.
    let length = parts.headers.get(header::CONTENT_LENGTH);
    if parts.headers.contains_key(header::TRANSFER_ENCODING)
        || length.is_some_and(|length| length.as_bytes() != b"0")
    {
        return Err(bad("a WebSocket handshake has no body"));
    }
    if !has(header::CONNECTION, "upgrade") {
        return Err(bad("the Connection header has no `Upgrade`"));
    }
    if !has(header::SEC_WEBSOCKET_VERSION, "13") {
        let text = "Sec-WebSocket-Version is 13 here";
        let mut response = refuse(StatusCode::UPGRADE_REQUIRED, "upgrade_required", text);
        let version = HeaderValue::from_static("13");
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, version);
        return Err(Box::new(response));
    }
    let mut keys = parts.headers.get_all(header::SEC_WEBSOCKET_KEY).iter();
    let (Some(key), None) = (keys.next(), keys.next()) else {
        return Err(bad("a handshake has one Sec-WebSocket-Key"));
    };
    if STANDARD.decode(key.as_bytes()).is_ok_and(|nonce| nonce.len() == 16) {
        let mut digest = Sha1::new();
        digest.update(key.as_bytes());
        digest.update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
        Ok(STANDARD.encode(digest.finalize()))
    } else {
        Err(bad("Sec-WebSocket-Key is 16 bytes in base64"))
    }
}

/// The elements of a header that is a list (RFC 9110, section 5.6.1).
fn tokens(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

fn subprotocols(headers: &HeaderMap) -> Vec<String> {
    tokens(headers, header::SEC_WEBSOCKET_PROTOCOL).map(str::to_owned).collect()
}

/// What the client says of itself. The first source of a token decides.
fn credentials(
    node: &Node,
    headers: &HeaderMap,
    params: &[(String, String)],
    offered: &[String],
) -> Credentials {
    let bearer = || {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, token) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    };
    let cookie = || {
        let mut cookies = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok());
        cookies.find_map(|value| {
            let mut pairs = value.split(';').filter_map(|pair| pair.trim().split_once('='));
            let (_, token) = pairs.find(|(name, _)| *name == node.options.auth_cookie)?;
            Some(token.to_owned())
        })
    };
    let subprotocol = || {
        let token = offered.iter().find_map(|offer| offer.strip_prefix("bearer."))?;
        Some(token.to_owned())
    };
    let query = param(params, "token").map(str::to_owned);
    Credentials {
        token: query.or_else(bearer).or_else(cookie).or_else(subprotocol),
        user: param(params, "user").map(str::to_owned),
        name: param(params, "name").map(str::to_owned),
    }
}

/// What a client calls itself, as far as that is kept.
fn user_agent(headers: &HeaderMap) -> Option<Box<str>> {
    const CHARS_MAX: usize = 200;
    let text = headers.get(header::USER_AGENT)?.to_str().ok()?;
    Some(text.chars().take(CHARS_MAX).collect::<String>().into())
}

/// A connection between its 101 and its first frame.
struct Opening {
    credentials: Credentials,
    wishes: Wishes,
    endpoint: Endpoint,
    deflate: Option<Deflate>,
    route: String,
    address: std::net::IpAddr,
    user_agent: Option<Box<str>>,
    places: Places,
}

/// A client that is let in.
struct Entered {
    identity: Identity,
    /// Its place among the connections of its user.
    place: Place<UserId>,
    opened: Opened,
    /// The secret of its session.
    secret: [u8; 16],
    about: Arc<About>,
}

/// Why a client is not let in after its handshake: the close code and the reason.
type Refused = (CloseCode, String);

/// A connection that is to be served, and what it holds of the limits.
struct Served {
    connection: Connection,
    _places: Places,
    _user: Option<Place<UserId>>,
}

impl Opening {
    async fn open(
        self: Box<Self>,
        node: Arc<Node>,
        socket: TcpStream,
        early: Vec<u8>,
    ) -> Box<Served> {
        let limits = &node.options.limits;
        let deflating = self.deflate.zip(node.options.deflate_bytes_min);
        let deflating =
            deflating.map(|(deflate, bytes_min)| Deflating { window: deflate.window(), bytes_min });
        let outbox = Outbox::to_socket(socket, limits.outbox_bytes_max, node.metrics.clone())
            .deflating(deflating);
        let subscriber = Subscriber::new(ConnectionId::random(), outbox);
        let options = transport::Options {
            message_bytes_max: limits.message_bytes_max,
            heartbeat: node.options.heartbeat.clone(),
            json_ping: self.wishes.json_ping,
        };
        let served = |subscriber, handler, places, user| {
            let (wheel, metrics) = (node.wheel.clone(), node.metrics.clone());
            let connection = Connection::new(subscriber, handler, options, wheel, metrics, early);
            Box::new(Served { connection, _places: places, _user: user })
        };
        if let Endpoint::Echo = self.endpoint {
            let echo = Handler::Echo(Echo { mode: node.options.echo });
            return served(Arc::new(subscriber), echo, self.places, None);
        }

        let entered = match self.enter(&node, subscriber.connection).await {
            Ok(entered) => entered,
            Err((code, reason)) => {
                subscriber.outbox.close(Close { code: code.number(), reason });
                let nobody = Handler::Echo(Echo { mode: EchoMode::Off });
                return served(Arc::new(subscriber), nobody, self.places, None);
            }
        };
        let (id, user) = (subscriber.connection, entered.identity.user.clone());
        tracing::debug!(connection = %id, user = %user.id, "connected");
        let subscriber = Arc::new(subscriber.of(Owner {
            user: user.id.clone(),
            session: entered.opened.session,
            since: entered.opened.at,
            about: entered.about.clone(),
        }));
        // When the client hears `connected` everybody can see that its user is.
        let (presence, wait) = (&node.services.presence, node.services.limits.wait_max);
        let online = presence.appear(&user, wait).await;
        subscriber.answer(&connected(&node, &entered, &subscriber, self.route));
        let Entered { identity, place, opened: Opened { session, inbox, .. }, .. } = entered;
        let follows = follow_inbox(&node, &subscriber, &user.id, inbox, self.wishes.inbox);
        if tokio::time::timeout(wait, follows).await.is_err() {
            // It comes back, to this node or one that hears.
            let (code, reason) = (CloseCode::Overload.number(), "unavailable".to_owned());
            subscriber.outbox.close(Close { code, reason });
        }
        let services = node.services.clone();
        let session = Session::new(services, identity, session, subscriber.clone(), online);
        let chat = Handler::Chat(Box::new(session));
        let mut opened = served(subscriber.clone(), chat, self.places, Some(place));
        if let Endpoint::Room(join) = self.endpoint {
            subscriber.outbox.flush();
            let joined = join_at_once(&node, &mut opened.connection, &subscriber, join).await;
            if let Err(code) = joined {
                let close = match code {
                    ErrorCode::Unavailable => CloseCode::Overload,
                    _ => CloseCode::Policy,
                };
                let reason = code.as_str().to_owned();
                subscriber.outbox.close(Close { code: close.number(), reason });
            }
        }
        opened
    }

    /// Finds out who the client is, and gives it its session. In anonymous mode a session tells the
    /// user, where the client does not.
    async fn enter(&self, node: &Node, connection: ConnectionId) -> Result<Entered, Refused> {
        let Services { auth, .. } = &*node.services;
        let token = self.wishes.session.as_ref();
        if let (Auth::Anonymous, None, Some(token)) = (auth, &self.credentials.user, token) {
            let user = Some(token.user.to_string());
            let credentials = Credentials { user, ..self.credentials.clone() };
            let mut entered = self.enter_as(node, connection, &credentials).await?;
            if let Some(before) = &entered.opened.resumed {
                if self.credentials.name.is_none() {
                    entered.identity.user.name = before.name.clone();
                }
                return Ok(entered);
            }
        }
        self.enter_as(node, connection, &self.credentials).await
    }

    async fn enter_as(
        &self,
        node: &Node,
        connection: ConnectionId,
        credentials: &Credentials,
    ) -> Result<Entered, Refused> {
        let Services { auth, sessions, limits, .. } = &*node.services;
        let policy = |reason: String| (CloseCode::Policy, reason);
        let identity = auth.identify(credentials).map_err(|error| policy(error.to_string()))?;
        let user = identity.user.id.clone();
        let place =
            node.state.by_user.enter(user.clone(), node.options.limits.connections_per_user);
        let place = place.ok_or_else(|| policy("too_many_connections".to_owned()))?;

        let about = Arc::new(About {
            name: identity.user.name.clone(),
            node: node.id.clone(),
            address: self.address,
            user_agent: self.user_agent.clone(),
        });
        let session = SessionId::random();
        let fresh = ResumeToken { secret: rand::random(), session, user: user.clone() };
        let presented = self.wishes.session.as_ref().filter(|token| token.user == user);
        let opening = sessions.open(sessions::Opening {
            user,
            connection,
            resume: presented.map(|token| (token.session, SecretDigest::of(token))),
            fresh: (session, SecretDigest::of(&fresh)),
            about: about.clone(),
        });
        match tokio::time::timeout(limits.wait_max, opening).await {
            Ok(Ok(opened)) => {
                let token = presented.filter(|_| opened.resumed.is_some()).unwrap_or(&fresh);
                let secret = token.secret;
                Ok(Entered { identity, place, opened, secret, about })
            }
            _ => Err((CloseCode::Overload, "unavailable".to_owned())),
        }
    }
}

/// Has a connection given what its device lacks of the inbox, and what comes.
async fn follow_inbox(
    node: &Node,
    subscriber: &Arc<Subscriber>,
    user: &UserId,
    inbox: Inbox,
    device: Option<Result<Position, InvalidPosition>>,
) -> Result<(), NotFollowed> {
    if let Some(Err(_)) = device {
        let text = "`inbox` is <epoch>:<seq>; the acknowledged position is taken";
        node.metrics.errors.of(ErrorCode::BadRequest).inc();
        subscriber.answer(&Answer::Error(Refusal::new(ErrorCode::BadRequest, text)));
    }
    // What has expired unread was told of by `connected`.
    let unread = inbox.acked.max(inbox.oldest - 1).min(inbox.seq);
    let since = device.and_then(Result::ok).unwrap_or(Position::new(inbox.epoch, unread));
    let (room, start) = (RoomId::inbox_of(user), Start::Behind(since, unread));
    let hub = &node.services.hub;
    hub.join(room, subscriber.clone(), None, start, Admission::default()).await
}

impl Served {
    async fn serve(mut self: Box<Self>, node: &Node) {
        node.metrics.connections.inc();
        let code = self.connection.run(&node.away).await;
        node.metrics.connections.dec();
        tracing::debug!(connection = %self.connection.id(), code, "disconnected");
        node.metrics.disconnected(code);
    }
}

/// Joins the room of `/ws/rooms/{room}`.
async fn join_at_once(
    node: &Node,
    connection: &mut Connection,
    subscriber: &Subscriber,
    join: Result<Join, &'static str>,
) -> Result<(), ErrorCode> {
    match (join, connection.session()) {
        (Ok(join), Some(session)) => {
            let performed = session.perform(Request::Join(None, join)).await;
            session.finish(performed)
        }
        (Ok(_), None) => Ok(()),
        (Err(text), _) => {
            let refusal = Refusal {
                answers: Some("join".to_owned()),
                ..*Refusal::new(ErrorCode::BadRequest, text)
            };
            node.metrics.errors.of(ErrorCode::BadRequest).inc();
            subscriber.answer(&Answer::Error(Box::new(refusal)));
            Err(ErrorCode::BadRequest)
        }
    }
}

fn connected(
    node: &Node,
    entered: &Entered,
    subscriber: &Subscriber,
    route: String,
) -> Answer<Box<serde_json::value::RawValue>> {
    let Entered { identity, opened, secret, .. } = entered;
    let user = identity.user.clone();
    let token = ResumeToken { secret: *secret, session: opened.session, user: user.id.clone() };
    Answer::Connected(Box::new(Connected {
        connection_id: subscriber.connection,
        user,
        session: token.to_string(),
        session_id: opened.session,
        resumed: opened.resumed.is_some(),
        node: node.id.clone(),
        route,
        protocol: SUBPROTOCOL.to_owned(),
        timestamp: shared::timestamp(SystemTime::now()),
        expires_at: identity.expires_at.map(shared::timestamp),
        heartbeat_interval: node.options.heartbeat.interval.as_secs(),
        dedup_window: node.options.dedup_window.as_secs(),
        max_message_size: node.options.limits.message_bytes_max,
        inbox: opened.inbox.clone(),
    }))
}
