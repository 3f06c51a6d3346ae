//! Server API: connected users, their connections and sessions.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Query, State, rejection::QueryRejection},
};
use serde::{Deserialize, Serialize};
use skein_protocol::{
    error::ErrorCode,
    ids::{RoomId, SessionId, UserId},
};
use utoipa::ToSchema;

use super::{
    ApiError, AppliedNodes, CommonResponses, JsonBody, PageQuery, await_bus, parse_name,
    parse_query, parse_user,
};
use crate::http::Node;
use skein_core::{
    bus::{commands::NodeQuery, presence_store::UserPresence, sessions::SessionSelector},
    connection::outbox::Close,
    control::kicked,
    hub::presence::wire_time,
};

/// Longest reason of a close frame in bytes (RFC 6455, section 5.5).
const REASON_BYTES_MAX: usize = 123;

/// A user who is connected, or a member of a room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PresentUser {
    /// Id of the user.
    id: String,
    /// Display name.
    name: String,
    /// Number of connections.
    connections: u64,
    /// Start of the presence.
    since: String,
    /// Time of the last activity.
    last_active: String,
    /// In a room: the read mark of the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    read: Option<u64>,
}

impl PresentUser {
    pub(super) fn of(detail: UserPresence, in_room: bool) -> Self {
        Self {
            id: detail.user.id.to_string(),
            name: detail.user.name.to_string(),
            connections: detail.connections,
            since: wire_time(detail.since),
            last_active: wire_time(detail.active),
            read: in_room.then_some(detail.read),
        }
    }
}

/// A page of connected users.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UserPage {
    /// Ordered by id.
    users: Vec<PresentUser>,
    /// Total number of connected users, regardless of the prefix.
    count: u64,
    /// Selects the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// Details of a user.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct UserDetails {
    /// Whether the user is connected to any node.
    online: bool,
    /// Time of the last activity, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_active: Option<String>,
    /// Rooms of the user.
    rooms: Vec<String>,
    /// Connections of the user.
    connections: Vec<ConnectionDetails>,
}

/// Details of a connection.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct ConnectionDetails {
    /// Id of the connection.
    #[schema(format = Uuid)]
    connection_id: String,
    /// Id of the session.
    #[schema(format = Uuid)]
    session_id: String,
    /// Node of the connection.
    node: String,
    /// Address of the client.
    address: String,
    /// `User-Agent` of the client.
    user_agent: Option<String>,
    /// Time of the handshake.
    connected_at: String,
    /// Time of the last input from the client.
    last_seen: String,
    /// Round-trip time of the last ping in milliseconds.
    rtt_ms: Option<u32>,
    /// Bytes in the outbox.
    queued_bytes: usize,
    /// Whether the connection is catching up from the log.
    lagging: bool,
}

/// Connections and rooms of a user on one node.
#[derive(Deserialize)]
struct NodeConnections {
    connections: Vec<ConnectionDetails>,
    rooms: Vec<String>,
}

/// Details of a session.
#[derive(Debug, Serialize, ToSchema)]
struct SessionDetails {
    /// Id of the session.
    #[schema(format = Uuid)]
    session_id: String,
    /// Time of its creation.
    created_at: String,
    /// Time of its last use.
    last_used: String,
    /// Connection that holds the session.
    #[serde(skip_serializing_if = "Option::is_none")]
    connection_id: Option<String>,
    /// Node of the last connection.
    node: String,
    /// Address of the client.
    address: String,
    /// `User-Agent` of the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<String>,
}

/// Sessions of a user.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SessionList {
    /// Most recently used first.
    sessions: Vec<SessionDetails>,
}

/// Options for closing connections.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct DisconnectOptions {
    /// Close code: 1000, 1008, or 3000 to 4999; default 1008.
    #[serde(default)]
    #[schema(minimum = 3000, maximum = 4999)]
    code: Option<u16>,
    /// Reason, at most 123 bytes in UTF-8; default `kicked`.
    #[serde(default)]
    #[schema(max_length = 123)]
    reason: Option<String>,
    /// Whether the client may resume its session.
    #[serde(default)]
    keep_session: Option<bool>,
}

/// A user whose inbox was emptied.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EmptiedInbox {
    /// Id of the user.
    user: String,
}

/// Session to keep.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RevokeQuery {
    /// Id of the session to keep.
    #[serde(default)]
    #[param(format = Uuid)]
    except: Option<String>,
}

/// Numbers of connected users and connections.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OnlineCounts {
    /// Number of users.
    users: u64,
    /// Number of connections.
    connections: u64,
}

/// List the users who are connected to any node.
#[utoipa::path(
    get, path = "/api/v1/users", tag = "users",
    operation_id = "list_users", params(PageQuery),
    responses((status = 200, description = "A page.", body = UserPage), CommonResponses)
)]
pub(super) async fn list(
    State(node): State<Arc<Node>>,
    paging: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<UserPage>, ApiError> {
    let (prefix, cursor, limit) = parse_query(paging)?.checked()?;
    let after = cursor.max(cursor_before(&prefix));
    let page = await_bus(&node, node.services.presence.online(after, limit)).await?;
    let has_prefix = |detail: &UserPresence| detail.user.id.as_str().starts_with(&prefix);
    let more = page.more && page.users.last().is_some_and(has_prefix);
    let users = page.users.into_iter().take_while(has_prefix);
    let users: Vec<PresentUser> = users.map(|detail| PresentUser::of(detail, false)).collect();
    let cursor = users.last().filter(|_| more).map(|last| last.id.clone());
    Ok(Json(UserPage { users, count: page.count, cursor }))
}

/// Returns a text directly before all ids with `prefix` in their order: ids consist of ASCII
/// characters below `~`.
fn cursor_before(prefix: &str) -> String {
    let mut letters = prefix.bytes().collect::<Vec<_>>();
    match letters.pop().filter(|last| last.is_ascii_graphic()) {
        Some(last) => {
            letters.extend([last - 1, b'~']);
            String::from_utf8(letters).unwrap_or_default()
        }
        None => String::new(),
    }
}

/// Count connected users and connections.
#[utoipa::path(
    get, path = "/api/v1/online", tag = "users",
    operation_id = "count_online",
    responses((status = 200, description = "The numbers.", body = OnlineCounts), CommonResponses)
)]
pub(super) async fn online(State(node): State<Arc<Node>>) -> Result<Json<OnlineCounts>, ApiError> {
    let page = await_bus(&node, node.services.presence.online(String::new(), 0)).await?;
    let nodes = super::nodes::query_nodes(&node).await?;
    let connections = nodes.iter().map(|node| node.connections).sum();
    Ok(Json(OnlineCounts { users: page.count, connections }))
}

/// Get a user: whether connected, with all connections and their state, and the rooms.
#[utoipa::path(
    get, path = "/api/v1/users/{user}", tag = "users",
    operation_id = "get_user",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    responses((status = 200, description = "The user.", body = UserDetails), CommonResponses)
)]
pub(super) async fn info(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<UserDetails>, ApiError> {
    let id: UserId = parse_user(&id)?;
    let statuses = await_bus(&node, node.services.presence.statuses(vec![id.clone()])).await?;
    let status = statuses.first().copied().unwrap_or_default();
    let mut user = UserDetails {
        online: status.online,
        last_active: status.active.map(wire_time),
        ..UserDetails::default()
    };
    if status.online {
        let (replies, _) = node.control.query_nodes(NodeQuery::User { user: id }).await?;
        for here in
            replies.iter().filter_map(|reply| serde_json::from_str::<NodeConnections>(reply).ok())
        {
            user.connections.extend(here.connections);
            user.rooms.extend(here.rooms);
        }
        user.rooms.sort_unstable();
        user.rooms.dedup();
    }
    Ok(Json(user))
}

/// Close all connections of a user on all nodes, and delete the sessions unless they are kept. The
/// user may connect again.
#[utoipa::path(
    post, path = "/api/v1/users/{user}/disconnect", tag = "users",
    operation_id = "disconnect_user",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    request_body(content = Option<DisconnectOptions>, description = "Optional."),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn disconnect(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
    JsonBody(closing): JsonBody<DisconnectOptions>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let id = parse_user(&id)?;
    let Close { code, reason } = kicked();
    let close =
        Close { code: closing.code.unwrap_or(code), reason: closing.reason.unwrap_or(reason) };
    if !matches!(close.code, 1000 | 1008 | 3000..=4999) {
        return Err(ApiError::bad_request("`code` must be 1000, 1008, or 3000 to 4999"));
    }
    if close.reason.len() > REASON_BYTES_MAX {
        return Err(ApiError::bad_request(format!(
            "`reason` must be at most {REASON_BYTES_MAX} bytes"
        )));
    }
    let keep = closing.keep_session.unwrap_or_default();
    Ok(Json(node.control.close(id, SessionSelector::All, keep, close).await?.into()))
}

/// List the sessions of a user.
#[utoipa::path(
    get, path = "/api/v1/users/{user}/sessions", tag = "users",
    operation_id = "list_sessions",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    responses((status = 200, description = "All sessions.", body = SessionList), CommonResponses)
)]
pub(super) async fn sessions(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<SessionList>, ApiError> {
    let stored = await_bus(&node, node.services.sessions.list(parse_user(&id)?)).await?;
    let session = |stored: skein_core::bus::sessions::StoredSession| SessionDetails {
        session_id: stored.session.to_string(),
        created_at: wire_time(stored.created),
        last_used: wire_time(stored.used),
        connection_id: stored.connection.map(|connection| connection.to_string()),
        node: stored.about.node.to_string(),
        address: stored.about.address.to_string(),
        user_agent: stored.about.user_agent.as_ref().map(ToString::to_string),
    };
    Ok(Json(SessionList { sessions: stored.into_iter().map(session).collect() }))
}

/// Revoke all sessions of a user, or all but one, and close their connections.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/sessions", tag = "users",
    operation_id = "revoke_sessions",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"), RevokeQuery),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn revoke(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
    except: Result<Query<RevokeQuery>, QueryRejection>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let which = match parse_query(except)?.except {
        Some(session) => SessionSelector::AllBut(parse_name(&session)?),
        None => SessionSelector::All,
    };
    Ok(Json(node.control.close(parse_user(&id)?, which, false, kicked()).await?.into()))
}

/// Revoke one session of a user, and close its connection.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/sessions/{id}", tag = "users",
    operation_id = "revoke_session",
    params(
        ("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"),
        ("id" = String, Path, description = "Id of the session", format = Uuid),
    ),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn revoke_one(
    State(node): State<Arc<Node>>,
    Path((id, session)): Path<(String, String)>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let (id, session): (UserId, SessionId) = (parse_user(&id)?, parse_name(&session)?);
    let stored = await_bus(&node, node.services.sessions.list(id.clone())).await?;
    // Also if the session does not exist: an earlier attempt may have been incomplete.
    let outcome = node.control.close(id, SessionSelector::One(session), false, kicked()).await?;
    if !stored.iter().any(|stored| stored.session == session) {
        return Err(ApiError::new(ErrorCode::NotFound, "the session does not exist"));
    }
    Ok(Json(outcome.into()))
}

/// Delete all entries of the inbox of a user, read or not. The connections of the user receive
/// `reset` and continue with new entries.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/inbox", tag = "users",
    operation_id = "empty_inbox",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    responses((status = 200, description = "The inbox is empty.", body = EmptiedInbox), CommonResponses)
)]
pub(super) async fn empty_inbox(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<EmptiedInbox>, ApiError> {
    let inbox = RoomId::inbox_of(&parse_user(&id)?);
    await_bus(&node, node.services.bus.delete(inbox)).await?;
    Ok(Json(EmptiedInbox { user: id }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_with_a_prefix_come_after_the_cursor_before_it() {
        for (prefix, id) in [("ann", "ann"), ("ann", "ann-2"), ("a", "a"), ("", "_x")] {
            assert!(*id > *cursor_before(prefix), "{prefix}");
        }
        assert!("anm|zz" < &*cursor_before("ann") && "anm~" <= &*cursor_before("ann"));
        assert_eq!(cursor_before("ä"), "");
    }
}
