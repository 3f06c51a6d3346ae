//! Admission of a client: the parameters of its handshake, its identity and its session.
//!
//! WebSockets and event streams share this part.

use std::{borrow::Cow, sync::Arc, time::SystemTime};

use axum::{
    extract::Query,
    http::{HeaderMap, header},
};
use serde_json::value::RawValue;
use skein_protocol::{
    SUBPROTOCOL,
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{InvalidPosition, Position, Seq},
    protocol::server_frame::{ConnectedFrame, ErrorFrame, InboxState, ServerFrame},
    token::ResumeToken,
};

use tokio::time::{Duration, Instant};

use super::{
    ConnectInfo, Node,
    address::client_address,
    headers::{bearer, cookie, elements, request_id, utf8},
    origin::OriginAccess,
};
use skein_core::{
    bus::sessions::{self, ConnectionInfo, OpenedSession, SecretDigest, SessionHolder},
    connection::{
        handle::{ConnectionHandle, Owner},
        outbox::Close,
    },
    delivery::join::JoinStart,
    hub::{SubscribeFailed, join::JoinGrant},
    limits::Permit,
    session::{
        Services,
        auth::{Auth, AuthError, Credentials, Identity},
    },
    telemetry::metrics::HandshakeRefusal,
};

/// Delay before an inbox that could not be joined is tried again.
const JOIN_RETRY: Duration = Duration::from_millis(100);

/// Query of a handshake in the order sent. The first parameter of a name counts.
pub(super) type Params = Query<Vec<(String, String)>>;

/// Parameters that a client sends in its handshake.
pub(super) struct ClientHandshake {
    credentials: Credentials,
    /// `?session=` or the subprotocol `session.<token>`.
    session: Option<ResumeToken>,
    /// `?inbox=`: the position up to which this device has the inbox.
    pub(super) inbox: Option<Result<Position, InvalidPosition>>,
    pub(super) address: std::net::IpAddr,
    user_agent: Option<Box<str>>,
    /// `X-Request-ID`, for the log.
    pub(super) request_id: Option<Box<str>>,
}

/// An admitted client.
pub(super) struct AdmittedClient {
    pub(super) identity: Identity,
    /// Permit for one more connection of the user.
    pub(super) user_permit: Permit<UserId>,
    pub(super) opened: OpenedSession,
    /// Secret of the session.
    secret: [u8; 16],
    pub(super) about: Arc<ConnectionInfo>,
}

/// Reason for not admitting a client.
pub(super) enum AdmissionError {
    /// The client has no valid token.
    Unauthenticated(AuthError),
    /// The user has the maximum of connections.
    TooManyConnections,
    /// The bus is unavailable.
    Unavailable,
}

impl AdmissionError {
    /// Returns the cause for the metrics.
    fn cause(&self) -> HandshakeRefusal {
        match self {
            Self::Unauthenticated(_) => HandshakeRefusal::Unauthenticated,
            Self::TooManyConnections => HandshakeRefusal::ConnectionsPerUser,
            Self::Unavailable => HandshakeRefusal::Bus,
        }
    }

    /// Returns close code and reason for a WebSocket.
    pub(super) fn close(&self) -> (CloseCode, String) {
        match self {
            Self::Unauthenticated(error) => (CloseCode::PolicyViolation, error.to_string()),
            Self::TooManyConnections => {
                (CloseCode::PolicyViolation, "too_many_connections".to_owned())
            }
            Self::Unavailable => (CloseCode::TryAgainLater, "unavailable".to_owned()),
        }
    }
}

impl ClientHandshake {
    /// Reads the parameters of a handshake.
    pub(super) fn read(
        node: &Node,
        headers: &HeaderMap,
        params: &[(String, String)],
        info: ConnectInfo,
        allowed: OriginAccess,
    ) -> Self {
        let offered = subprotocols(headers);
        let session = || offered.iter().find_map(|offer| offer.strip_prefix("session."));
        Self {
            session: param(params, "session").or_else(session).and_then(|text| text.parse().ok()),
            inbox: param(params, "inbox").map(str::parse),
            credentials: credentials(node, headers, params, &offered, allowed),
            address: client_address(info.peer.ip(), headers, &node.options.trusted_proxies),
            user_agent: user_agent(headers),
            request_id: request_id(headers).and_then(utf8).map(Box::from),
        }
    }

    /// Identifies the client and opens its session.
    ///
    /// In anonymous mode a client that names no user gets the user of the session it presents.
    ///
    /// # Errors
    ///
    /// [`AdmissionError`]; the session is then not opened.
    pub(super) async fn admit(
        &self,
        node: &Node,
        connection: ConnectionId,
    ) -> Result<AdmittedClient, AdmissionError> {
        let Services { auth, sessions, limits, .. } = &*node.services;
        let is_anonymous = matches!(**auth.load(), Auth::Anonymous);
        let credentials = match (is_anonymous, &self.credentials.user, &self.session) {
            (true, None, Some(token)) => {
                let digest = SecretDigest::of(token);
                let found = sessions.find(token.user.clone(), token.session, digest);
                match tokio::time::timeout(limits.wait_max, found).await {
                    Ok(Ok(found)) => found.map(|before| Credentials {
                        user: Some(token.user.to_string()),
                        name: self.credentials.name.clone().or(Some(before.name.to_string())),
                        ..self.credentials.clone()
                    }),
                    _ => return Err(AdmissionError::Unavailable),
                }
            }
            _ => None,
        };
        let credentials = credentials.as_ref().unwrap_or(&self.credentials);
        let admitted = self.admit_as(node, connection, credentials).await;
        match &admitted {
            Ok(admitted) if admitted.opened.resumed.is_some() => node.metrics.reconnects.inc(),
            Ok(_) => {}
            Err(error) => node.metrics.handshakes_refused.of(error.cause()).inc(),
        }
        admitted
    }

    async fn admit_as(
        &self,
        node: &Node,
        connection: ConnectionId,
        credentials: &Credentials,
    ) -> Result<AdmittedClient, AdmissionError> {
        let Services { auth, sessions, limits, .. } = &*node.services;
        let identity =
            auth.load().identify(credentials).map_err(AdmissionError::Unauthenticated)?;
        let user = identity.user.id.clone();
        let per_user = node.access.load().limits.connections_per_user;
        let permit = node.state.by_user.acquire(user.clone(), per_user);
        let user_permit = permit.ok_or(AdmissionError::TooManyConnections)?;

        let about = Arc::new(ConnectionInfo {
            name: identity.user.name.clone(),
            node: node.id.clone(),
            address: self.address,
            user_agent: self.user_agent.clone(),
        });
        let session = SessionId::random();
        let fresh = ResumeToken { secret: rand::random(), session, user: user.clone() };
        let presented = self.session.as_ref().filter(|token| token.user == user);
        let opening = sessions.open(sessions::SessionRequest {
            user,
            connection,
            resume: presented.map(|token| (token.session, SecretDigest::of(token))),
            new_session: (session, SecretDigest::of(&fresh)),
            about: about.clone(),
        });
        match tokio::time::timeout(limits.wait_max, opening).await {
            Ok(Ok(opened)) => {
                if opened.resumed.is_some() {
                    node.rebalancer.record_resumed(opened.session);
                }
                let token = presented.filter(|_| opened.resumed.is_some()).unwrap_or(&fresh);
                let secret = token.secret;
                Ok(AdmittedClient { identity, user_permit, opened, secret, about })
            }
            _ => Err(AdmissionError::Unavailable),
        }
    }
}

impl AdmittedClient {
    /// Returns the owner of the connection.
    pub(super) fn owner(&self) -> Owner {
        Owner {
            user: self.identity.user.id.clone(),
            session: self.opened.session,
            since: self.opened.at,
            about: self.about.clone(),
        }
    }
}

/// Joins the inbox of the user: the device gets the entries it lacks, then the new ones.
///
/// # Errors
///
/// [`SubscribeFailed`] if the inbox could not be joined within the timeout of the bus.
pub(super) async fn join_inbox(
    node: &Node,
    handle: &Arc<ConnectionHandle>,
    user: &UserId,
    inbox: InboxState,
    device: Option<Result<Position, InvalidPosition>>,
) -> Result<(), SubscribeFailed> {
    if let Some(Err(_)) = device {
        let text = "`inbox` must be <epoch>:<seq>; continuing from the acknowledged position";
        node.metrics.errors.of(ErrorCode::BadRequest).inc();
        handle.send(&ServerFrame::Error(ErrorFrame::new(ErrorCode::BadRequest, text)));
    }
    let unread = unread_from(&inbox);
    let device = device.and_then(Result::ok);
    let is_resume = device.is_some();
    let since = device.unwrap_or(Position::new(inbox.epoch, unread));
    let (room, start) =
        (RoomId::inbox_of(user), JoinStart::InboxSince { since, or: unread, is_resume });
    let Services { hub, limits, .. } = &*node.services;
    let until = Instant::now() + limits.wait_max;
    loop {
        let (handle, start) = (handle.clone(), start.clone());
        let joining = hub.join(room.clone(), handle, None, start, JoinGrant::default());
        match tokio::time::timeout_at(until, joining).await {
            Ok(Ok(_)) => return Ok(()),
            // One failed read, which may succeed in a moment.
            Ok(Err(SubscribeFailed)) if Instant::now() + JOIN_RETRY < until => {
                tokio::time::sleep(JOIN_RETRY).await;
            }
            _ => return Err(SubscribeFailed),
        }
    }
}

/// Returns the position after which entries are unread. `connected` reports expired ones.
pub(super) fn unread_from(inbox: &InboxState) -> Seq {
    inbox.acked.max(inbox.oldest - 1).min(inbox.seq)
}

/// Closes a connection that no longer has its session.
///
/// A command to close the session, or another connection that presented it, may have come before
/// this connection had joined its inbox, where such events reach it.
pub(super) async fn verify_session(node: &Node, handle: &ConnectionHandle) {
    let Some(owner) = handle.owner() else { return };
    let Services { sessions, limits, .. } = &*node.services;
    let holder = sessions.holder(owner.user.clone(), owner.session, handle.connection);
    let (code, reason) = match tokio::time::timeout(limits.wait_max, holder).await {
        Ok(Ok(SessionHolder::Another)) => (CloseCode::SessionReplaced, ""),
        // The client reconnects, and gets another session or is rejected.
        Ok(Ok(SessionHolder::Gone)) => (CloseCode::TryAgainLater, "unavailable"),
        // If the holder is unknown now, a later check finds out within a minute.
        Ok(Ok(SessionHolder::This) | Err(_)) | Err(_) => return,
    };
    handle.outbox.close(Close { code: code.number(), reason: reason.to_owned() });
}

/// Builds the first frame of a connection.
pub(super) fn connected_frame(
    node: &Node,
    client: &AdmittedClient,
    handle: &ConnectionHandle,
    route: String,
) -> ServerFrame<Box<RawValue>> {
    let AdmittedClient { identity, opened, secret, .. } = client;
    let user = identity.user.clone();
    let token = ResumeToken { secret: *secret, session: opened.session, user: user.id.clone() };
    ServerFrame::Connected(Box::new(ConnectedFrame {
        connection_id: handle.connection,
        user,
        session: token.to_string(),
        session_id: opened.session,
        resumed: opened.resumed.is_some(),
        node: node.id.clone(),
        route,
        protocol: SUBPROTOCOL.to_owned(),
        timestamp: skein_protocol::timestamp(SystemTime::now()),
        expires_at: identity.expires_at.map(skein_protocol::timestamp),
        heartbeat_interval: node.options.heartbeat.interval.as_secs(),
        dedup_window: node.options.dedup_window.as_secs(),
        max_message_size: node.access.load().limits.message_bytes_max,
        inbox: opened.inbox.clone(),
        limits: node.services.client_limits.load().rates.advertised(),
    }))
}

/// Returns the subprotocols that the client offers.
pub(super) fn subprotocols(headers: &HeaderMap) -> Vec<String> {
    let offered = elements(headers, header::SEC_WEBSOCKET_PROTOCOL);
    offered.map(|offer| String::from_utf8_lossy(offer).into_owned()).collect()
}

/// Returns the credentials of the client. The first source that has a token counts.
fn credentials(
    node: &Node,
    headers: &HeaderMap,
    params: &[(String, String)],
    offered: &[String],
    allowed: OriginAccess,
) -> Credentials {
    let bearer = || bearer(headers).map(Cow::into_owned);
    // A browser sends the cookies of its visitor with the request of any page. If any page may
    // connect, they prove nothing.
    let cookie = || match allowed {
        OriginAccess::WithoutCredentials => None,
        OriginAccess::NoOrigin | OriginAccess::WithCredentials => {
            cookie(headers, &node.options.auth_cookie).map(Cow::into_owned)
        }
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

/// Returns the start of `User-Agent`.
fn user_agent(headers: &HeaderMap) -> Option<Box<str>> {
    const CHARS_MAX: usize = 200;
    let text = String::from_utf8_lossy(headers.get(header::USER_AGENT)?.as_bytes());
    Some(text.chars().take(CHARS_MAX).collect::<String>().into())
}

/// Returns the first parameter with this name.
pub(super) fn param<'a>(params: &'a [(String, String)], name: &str) -> Option<&'a str> {
    params.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}
