//! Users: who is connected and how, their sessions, and an end to both.

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
    bus::{commands::NodeQuery, registry::UserPresence, sessions::SessionSelector},
    control::kicked,
    hub::presence::wire_time,
    outbox::Close,
};

/// The longest reason that a close frame holds (RFC 6455, section 5.5).
const REASON_BYTES_MAX: usize = 123;

/// A user who is there.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PresentUser {
    /// The id.
    id: String,
    /// What people read.
    name: String,
    /// Over how many connections.
    connections: u64,
    /// Since when.
    since: String,
    /// When the user did something last.
    last_active: String,
    /// Of a room: how far the user has read.
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

/// A page of who is connected.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UserPage {
    /// By id.
    users: Vec<PresentUser>,
    /// How many are connected in all, whatever they are called.
    count: u64,
    /// Asks for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// A user.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct UserDetails {
    /// Whether the user is connected to any node.
    online: bool,
    /// When the user did something last, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_active: Option<String>,
    /// The rooms that the user is in.
    rooms: Vec<String>,
    /// Over which connections.
    connections: Vec<ConnectionDetails>,
}

/// A connection.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
struct ConnectionDetails {
    /// Its id.
    #[schema(format = Uuid)]
    connection_id: String,
    /// Its session.
    #[schema(format = Uuid)]
    session_id: String,
    /// The node that has it.
    node: String,
    /// The client's address.
    address: String,
    /// The client, as it says.
    user_agent: Option<String>,
    /// Since when.
    connected_at: String,
    /// When something was heard of the client last.
    last_seen: String,
    /// How long the last ping took.
    rtt_ms: Option<u32>,
    /// What waits to be written to it.
    queued_bytes: usize,
    /// Whether it is behind, and catching up from the log.
    lagging: bool,
}

/// What a node knows of a user.
#[derive(Deserialize)]
struct NodeConnections {
    connections: Vec<ConnectionDetails>,
    rooms: Vec<String>,
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
struct SessionDetails {
    /// Its id.
    #[schema(format = Uuid)]
    session_id: String,
    /// When it was made.
    created_at: String,
    /// When it was used last.
    last_used: String,
    /// The connection that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    connection_id: Option<String>,
    /// Of the last connection that had it: the node.
    node: String,
    /// The client's address.
    address: String,
    /// The client, as it says.
    #[serde(skip_serializing_if = "Option::is_none")]
    user_agent: Option<String>,
}

/// The sessions of a user.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SessionList {
    /// Those used last first.
    sessions: Vec<SessionDetails>,
}

/// How connections are closed.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct DisconnectOptions {
    /// The close code: 1000, 1008, or 3000 to 4999; 1008 where absent.
    #[serde(default)]
    #[schema(minimum = 3000, maximum = 4999)]
    code: Option<u16>,
    /// The reason, at most 123 bytes in UTF-8; `kicked` where absent.
    #[serde(default)]
    #[schema(max_length = 123)]
    reason: Option<String>,
    /// Whether the client may resume its session.
    #[serde(default)]
    keep_session: Option<bool>,
}

/// Whose inbox was emptied.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EmptiedInbox {
    /// The user.
    user: String,
}

/// Which sessions to keep.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct RevokeQuery {
    /// This one.
    #[serde(default)]
    #[param(format = Uuid)]
    except: Option<String>,
}

/// How many are connected.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OnlineCounts {
    /// Users.
    users: u64,
    /// Their connections.
    connections: u64,
}

/// List who is connected to any node.
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

/// A text behind which ids come that begin with `prefix`, and none before those: letters of ids are
/// ASCII and below `~`.
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

/// How many are connected, users and connections.
#[utoipa::path(
    get, path = "/api/v1/online", tag = "users",
    operation_id = "count_online",
    responses((status = 200, description = "How many.", body = OnlineCounts), CommonResponses)
)]
pub(super) async fn online(State(node): State<Arc<Node>>) -> Result<Json<OnlineCounts>, ApiError> {
    let page = await_bus(&node, node.services.presence.online(String::new(), 0)).await?;
    let nodes = super::nodes::query_nodes(&node).await?;
    let connections = nodes.iter().map(|node| node.connections).sum();
    Ok(Json(OnlineCounts { users: page.count, connections }))
}

/// A user: whether connected, over which connections and how they are, and in which rooms.
#[utoipa::path(
    get, path = "/api/v1/users/{user}", tag = "users",
    operation_id = "get_user",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
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
        let (answers, _) = node.control.query_nodes(NodeQuery::User { user: id }).await?;
        for here in
            answers.iter().filter_map(|answer| serde_json::from_str::<NodeConnections>(answer).ok())
        {
            user.connections.extend(here.connections);
            user.rooms.extend(here.rooms);
        }
        user.rooms.sort_unstable();
        user.rooms.dedup();
    }
    Ok(Json(user))
}

/// Close all connections of a user, on all nodes, and forget the sessions unless those are kept. This is
/// no ban.
#[utoipa::path(
    post, path = "/api/v1/users/{user}/disconnect", tag = "users",
    operation_id = "disconnect_user",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    request_body(content = Option<DisconnectOptions>, description = "May be empty."),
    responses((status = 200, description = "On how many nodes it was applied.", body = AppliedNodes), CommonResponses)
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
        return Err(ApiError::bad_request("`code` is 1000, 1008, or 3000 to 4999"));
    }
    if close.reason.len() > REASON_BYTES_MAX {
        return Err(ApiError::bad_request(format!("`reason` is at most {REASON_BYTES_MAX} bytes")));
    }
    let keep = closing.keep_session.unwrap_or_default();
    Ok(Json(node.control.close(id, SessionSelector::All, keep, close).await?.into()))
}

/// The sessions of a user.
#[utoipa::path(
    get, path = "/api/v1/users/{user}/sessions", tag = "users",
    operation_id = "list_sessions",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    responses((status = 200, description = "All of them.", body = SessionList), CommonResponses)
)]
pub(super) async fn sessions(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
) -> Result<Json<SessionList>, ApiError> {
    let kept = await_bus(&node, node.services.sessions.list(parse_user(&id)?)).await?;
    let session = |kept: skein_core::bus::sessions::StoredSession| SessionDetails {
        session_id: kept.session.to_string(),
        created_at: wire_time(kept.created),
        last_used: wire_time(kept.used),
        connection_id: kept.connection.map(|connection| connection.to_string()),
        node: kept.about.node.to_string(),
        address: kept.about.address.to_string(),
        user_agent: kept.about.user_agent.as_ref().map(ToString::to_string),
    };
    Ok(Json(SessionList { sessions: kept.into_iter().map(session).collect() }))
}

/// Revoke the sessions of a user, all or all but one, and close their connections.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/sessions", tag = "users",
    operation_id = "revoke_sessions",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"), RevokeQuery),
    responses((status = 200, description = "On how many nodes it was applied.", body = AppliedNodes), CommonResponses)
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
        ("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"),
        ("id" = String, Path, description = "The session", format = Uuid),
    ),
    responses((status = 200, description = "On how many nodes it was applied.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn revoke_one(
    State(node): State<Arc<Node>>,
    Path((id, session)): Path<(String, String)>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let (id, session): (UserId, SessionId) = (parse_user(&id)?, parse_name(&session)?);
    let kept = await_bus(&node, node.services.sessions.list(id.clone())).await?;
    // Also where it is not there: what was tried before may have been done by half.
    let outcome = node.control.close(id, SessionSelector::One(session), false, kicked()).await?;
    if !kept.iter().any(|kept| kept.session == session) {
        return Err(ApiError::new(ErrorCode::NotFound, "there is no such session"));
    }
    Ok(Json(outcome.into()))
}

/// Empty the inbox of a user: all of its entries, read or not. Connections of the user are told by
/// `reset` and go on with what comes.
#[utoipa::path(
    delete, path = "/api/v1/users/{user}/inbox", tag = "users",
    operation_id = "empty_inbox",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    responses((status = 200, description = "It is empty, also where there was none.", body = EmptiedInbox), CommonResponses)
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
    fn ids_with_a_prefix_come_behind_what_is_right_before_it() {
        for (prefix, id) in [("ann", "ann"), ("ann", "ann-2"), ("a", "a"), ("", "_x")] {
            assert!(*id > *cursor_before(prefix), "{prefix}");
        }
        assert!("anm|zz" < &*cursor_before("ann") && "anm~" <= &*cursor_before("ann"));
        assert_eq!(cursor_before("ä"), "");
    }
}
