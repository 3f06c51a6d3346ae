//! The handshake of event streams: identifies the client, joins its rooms, and starts the
//! [`EventStream`].
//!
//! A browser gives up for good on any response but 200 (`EventSource`, section 9.2.3). Temporary
//! rejections are therefore streams too, which say when to reconnect and end.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Query, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::{MethodRouter, get},
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use skein_protocol::{
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId, UserId},
    position::Position,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    ConnectInfo, Node,
    buffered::WriteTimeout,
    connection_log::OpenedConnection,
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
use crate::transport::{
    ConnectionEnd,
    sse::{Cursors, EventStream, RETRY, retry, write_event},
};
use skein_core::{
    bus::room_store::{RoomConfig, RoomSummary},
    connection::{
        encoding::Encoding,
        handle::ConnectionHandle,
        outbox::{Close, Outbox},
    },
    hub::SubscribeFailed,
    limits::Permit,
    session::{Session, auth::AuthError},
    telemetry::metrics::{GaugeGuard, HandshakeResult, Transport},
};

/// Most rooms of a stream.
const ROOMS_MAX: usize = 20;
/// Header of a proxy that tries the next node after a 503, and tells browsers itself when to
/// reconnect if no node is left.
const FAILOVER: HeaderName = HeaderName::from_static("x-skein-failover");
/// Longest body of a rejection in bytes.
const REJECTION_BYTES_MAX: usize = 4 * 1024;

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
    let allowed = node.access.load().allowed_origins.allow(request.headers());
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
        Err((cause, response)) => {
            node.metrics.refused(cause);
            node.log_refused(cause, &parts, &response);
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
    let (route, connection) = (sticky_route(&node, &parts.headers, info), ConnectionId::random());
    let serving_node = node.clone();
    // A separate task ends the session even if the client disconnects.
    let serve = async move {
        let node = serving_node;
        match open(&node, connection, client, rooms, (cursors, route), permits).await {
            Ok((stream, chunks, _permits)) => {
                if reply.send(Ok(chunks)).is_err() {
                    return stream.end().await;
                }
                let metrics = &node.metrics;
                let _counted = GaugeGuard::new(&metrics.connections);
                let _by_transport =
                    GaugeGuard::new(metrics.transport_connections.of(Transport::EventStream));
                if let Some(limit) = &write_timeout {
                    limit.set(node.options.heartbeat.write_timeout);
                }
                let (handle, since) = (stream.handle().clone(), Instant::now());
                let mut end = stream.run(&node.drain_schedule.notice(connection)).await;
                if write_timeout.is_some_and(|limit| limit.has_expired()) {
                    let code = CloseCode::WriteTimeout.number();
                    end = ConnectionEnd::by_gateway(Close { code, reason: String::new() });
                }
                metrics.disconnected(end.code, &end.reason, end.side);
                node.state.connection_log.closed(&handle, since, 0, &end);
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

/// The shares of the limits that a stream holds.
type StreamPermits = (ConnectionPermits, Permit<UserId>);

/// Opens the session and joins the rooms. Frames to send wait in the outbox. Returns the stream,
/// which is not served yet, and the receiver of its chunks.
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
) -> Result<(EventStream, mpsc::Receiver<Bytes>, StreamPermits), RejectedResponse> {
    let admitted = client.admit(node, connection).await.map_err(|error| {
        node.state.connection_log.not_admitted(&error, client.address);
        match error {
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
        }
    })?;
    let outbox = Outbox::to_owner(node.access.load().limits.outbox_bytes_max, node.metrics.clone())
        .with_encoding(Encoding::Json);
    let handle = Arc::new(ConnectionHandle::new(connection, outbox).with_owner(admitted.owner()));
    let (user, wait) = (admitted.identity.user.clone(), node.services.limits.wait_max);
    let online = node.services.presence.track_online(&user, wait).await;
    handle.send(&connected_frame(node, &admitted, &handle, route));
    let resumed = admitted.opened.resumed.is_some();
    let request_id = client.request_id.as_deref();
    let opened = OpenedConnection { transport: "sse", resumed, request_id };
    node.state.connection_log.opened(&handle, opened);
    let AdmittedClient { identity, user_permit, opened, .. } = admitted;
    let inbox = cursors.inbox.clone().map(Ok).or(client.inbox);
    // The start of the inbox is part of every event id from now on.
    let begins = Position::new(opened.inbox.epoch.clone(), unread_from(&opened.inbox));
    cursors.inbox = Some(inbox.clone().and_then(Result::ok).unwrap_or(begins));
    let inbox_joined = join_inbox(node, &handle, &user.id, opened.inbox, inbox).await;
    let services = node.services.clone();
    let session = Session::new(services, identity, opened.session, handle.clone(), online);
    let (mut stream, chunks) = EventStream::new(session, handle.clone(), cursors, rooms);
    let joined = match inbox_joined {
        Ok(()) => join_rooms(node, &mut stream).await,
        Err(SubscribeFailed) => Err(rejected(ErrorCode::Unavailable, "the bus is unavailable")),
    };
    if let Err(response) = joined {
        stream.end().await;
        return Err(response);
    }
    verify_session(node, &handle).await;
    Ok((stream, chunks, (permits, user_permit)))
}

/// Joins rooms while the outbox has space, and checks that the others can be joined, since errors
/// can be HTTP responses only now.
async fn join_rooms(node: &Node, stream: &mut EventStream) -> Result<(), RejectedResponse> {
    let reject = |code| rejected(code, "a room could not be joined");
    let (rules, rooms) = (&node.services.rules, &node.services.rooms);
    for room in stream.join_first().await.map_err(reject)? {
        let found = rooms.find(room.clone());
        let found = match tokio::time::timeout(node.services.limits.wait_max, found).await {
            Ok(Ok(found)) => found,
            Ok(Err(_)) | Err(_) => return Err(reject(ErrorCode::Unavailable)),
        };
        match found {
            None if !rules.create_on_join => return Err(reject(ErrorCode::NotFound)),
            Some(RoomSummary { config: Some(RoomConfig { password: Some(_), .. }), .. }) => {
                return Err(reject(ErrorCode::WrongPassword));
            }
            None | Some(_) => {}
        }
    }
    Ok(())
}
