//! Server API: rooms, their history, their members.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use axum::{
    Json,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use skein_protocol::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    protocol::{META_BYTES_MAX, NAME_CHARS_MAX, PASSWORD_BYTES_MAX},
};
use utoipa::ToSchema;

use super::{
    ApiError, AppliedNodes, CommonResponses, JsonBody, PageQuery, await_bus,
    messages::check_raw_json, page_limit, parse_name, parse_query, parse_user, users::PresentUser,
};
use crate::http::Node;
use skein_core::{
    archive::TimeRange,
    bus::{
        BusError, ReadRange,
        commands::ControlCommand,
        presence_store::{UserPresence, unix_millis_now},
        room_store::{CreateOutcome, DeleteOutcome, RoomConfig, RoomSummary},
    },
    history::{self, HistoryRange},
    publisher::API_USER,
    session::{info_of, room_name},
};

/// Details of a room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RoomDetails {
    /// Id of the room.
    room: String,
    /// Display name.
    name: String,
    /// Owner; absent in a room that was created by a join.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    /// Whether clients see the room in `rooms`.
    public: bool,
    /// Whether the room has a password.
    protected: bool,
    /// Largest number of members.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_members: Option<u32>,
    /// Number of members.
    members: u64,
    /// Whether the room keeps a log.
    durable: bool,
    /// Time of its creation.
    created_at: String,
    /// Additional data.
    #[schema(value_type = Object)]
    meta: serde_json::Map<String, serde_json::Value>,
}

impl RoomDetails {
    fn of(node: &Node, found: RoomSummary) -> Self {
        let info = info_of(found, &node.services.rules);
        Self {
            room: info.room.to_string(),
            name: info.name.to_string(),
            owner: info.owner.map(|owner| owner.to_string()),
            public: info.public,
            protected: info.protected,
            max_members: info.max_members,
            members: info.members,
            durable: info.durable,
            created_at: info.created_at,
            meta: info.meta,
        }
    }
}

/// A page of rooms.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RoomDetailsPage {
    /// Ordered by id.
    rooms: Vec<RoomDetails>,
    /// Selects the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// Settings of a new managed room.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewRoom {
    /// Display name, at most 64 characters; default: the id.
    #[schema(min_length = 1, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    #[serde(default)]
    name: Option<String>,
    /// User who may delete the room, besides the application; default `_api`.
    #[schema(max_length = 128, pattern = "^[A-Za-z0-9_.:@|+=-]+$")]
    #[serde(default)]
    owner: Option<String>,
    /// Largest number of members; default: no limit.
    #[schema(minimum = 1)]
    #[serde(default)]
    max_members: Option<u32>,
    /// Whether clients see the room in `rooms`; default `true`.
    #[serde(default)]
    public: Option<bool>,
    /// Password that clients need to join, at most 1,024 bytes.
    #[schema(min_length = 1)]
    #[serde(default)]
    password: Option<String>,
    /// Additional data, a JSON object of at most 8 KiB.
    #[schema(value_type = Option<Object>)]
    #[serde(default)]
    meta: Option<Box<RawValue>>,
}

/// A deleted room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedRoom {
    /// Id of the room.
    room: String,
}

/// Selects a page of the log of a room.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryQuery {
    /// The newest entries below this sequence number.
    #[serde(default)]
    #[param(minimum = 0, maximum = 9007199254740991_u64)]
    before: Option<u64>,
    /// The oldest entries above this sequence number.
    #[serde(default)]
    #[param(minimum = 0, maximum = 9007199254740991_u64)]
    after: Option<u64>,
    /// The entries around this sequence number, half of them below it.
    #[serde(default)]
    #[param(minimum = 0, maximum = 9007199254740991_u64)]
    around: Option<u64>,
    /// Only entries accepted at this time or later, in RFC 3339.
    #[serde(default)]
    #[param(format = DateTime)]
    since: Option<String>,
    /// Only entries accepted before this time, in RFC 3339.
    #[serde(default)]
    #[param(format = DateTime)]
    until: Option<String>,
    /// Entries per page, 1 to 200.
    #[serde(default)]
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
}

/// A page of the log of a room.
#[derive(Serialize, ToSchema)]
pub(super) struct HistoryPage {
    /// Id of the room.
    room: String,
    /// Epoch of the sequence numbers.
    epoch: String,
    /// `message` frames, oldest first.
    #[schema(value_type = Vec<Object>)]
    messages: Vec<Box<RawValue>>,
    /// Whether the log or the archive has more entries in this direction; around a sequence number,
    /// below the first message.
    more: bool,
}

/// A page of the members of a room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PresencePage {
    /// Id of the room.
    room: String,
    /// Members, ordered by id.
    users: Vec<PresentUser>,
    /// Total number of members.
    count: u64,
    /// Selects the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

fn not_found() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "the room does not exist")
}

/// List rooms: managed rooms, and rooms with members.
#[utoipa::path(
    get, path = "/api/v1/rooms", tag = "rooms",
    operation_id = "list_rooms", params(PageQuery),
    responses((status = 200, description = "A page.", body = RoomDetailsPage), CommonResponses)
)]
pub(super) async fn list(
    State(node): State<Arc<Node>>,
    paging: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<RoomDetailsPage>, ApiError> {
    let (prefix, after, limit) = parse_query(paging)?.checked()?;
    let store = &node.services.rooms;
    let listing = await_bus(&node, store.list(prefix, after, limit, true)).await?;
    let rooms = listing.rooms.into_iter().map(|found| RoomDetails::of(&node, found)).collect();
    Ok(Json(RoomDetailsPage { rooms, cursor: listing.next }))
}

/// Get the details of a room.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "get_room",
    params(("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    responses((status = 200, description = "The room.", body = RoomDetails), CommonResponses)
)]
pub(super) async fn info(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
) -> Result<Json<RoomDetails>, ApiError> {
    let store = &node.services.rooms;
    let found = await_bus(&node, store.find(parse_name(&room)?)).await?;
    found.map(|found| Json(RoomDetails::of(&node, found))).ok_or_else(not_found)
}

impl NewRoom {
    async fn into_config(self, node: &Node, room: &RoomId) -> Result<RoomConfig, ApiError> {
        let too_large = |text: String| ApiError::new(ErrorCode::TooLarge, text);
        let name: DisplayName = match self.name {
            Some(name) if name.chars().count() > NAME_CHARS_MAX => {
                return Err(too_large(format!(
                    "`name` must be at most {NAME_CHARS_MAX} characters"
                )));
            }
            Some(name) => parse_name(&name)?,
            None => room_name(room),
        };
        if self.max_members == Some(0) {
            return Err(ApiError::bad_request("`max_members` must be 1 or more"));
        }
        let meta = self.meta.as_ref().map_or("{}", |meta| meta.get());
        if meta.len() > META_BYTES_MAX {
            return Err(too_large(format!("`meta` must be at most {META_BYTES_MAX} bytes")));
        }
        if let Some(meta) = &self.meta {
            if !meta.get().starts_with('{') {
                return Err(ApiError::bad_request("`meta` must be an object"));
            }
            check_raw_json("meta", meta)?;
        }
        let owner: UserId = parse_name(self.owner.as_deref().unwrap_or(API_USER))?;
        let password = match self.password {
            Some(password) if password.is_empty() => {
                return Err(ApiError::bad_request(
                    "`password` must not be empty; omit it for a room without a password",
                ));
            }
            Some(password) if password.len() > PASSWORD_BYTES_MAX => {
                return Err(too_large(format!(
                    "`password` must be at most {PASSWORD_BYTES_MAX} bytes"
                )));
            }
            Some(password) => {
                let hash = node.services.passwords.hash(None, password).await;
                Some(hash.map_err(|_| BusError::Overloaded)?)
            }
            None => None,
        };
        Ok(RoomConfig {
            name,
            owner,
            public: self.public.unwrap_or(true),
            password,
            max_members: self.max_members,
            created: unix_millis_now(),
            meta: meta.to_owned(),
        })
    }
}

/// Create a managed room. A room with members or a log exists already.
#[utoipa::path(
    put, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "create_room",
    params(("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    request_body(content = Option<NewRoom>, description = "Optional settings."),
    responses(
        (status = 201, description = "The room was created.", body = RoomDetails),
        (status = 409, description = "The room exists already.", body = super::Problem),
        CommonResponses,
    )
)]
pub(super) async fn create(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    JsonBody(settings): JsonBody<NewRoom>,
) -> Result<(StatusCode, Json<RoomDetails>), ApiError> {
    let room: RoomId = parse_name(&room)?;
    let config = settings.into_config(&node, &room).await?;
    let store = &node.services.rooms;
    if await_bus(&node, store.create(room.clone(), config.clone(), None)).await?
        != CreateOutcome::Created
    {
        let text = "a room with this name exists: it is managed, or has members or a log";
        return Err(ApiError::new(ErrorCode::RoomExists, text));
    }
    let found = RoomSummary { room, since: config.created, config: Some(config), members: 0 };
    Ok((StatusCode::CREATED, Json(RoomDetails::of(&node, found))))
}

/// Delete a room with its log. Its members receive `room_closed`.
#[utoipa::path(
    delete, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "delete_room",
    params(("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    responses((status = 200, description = "The room was deleted.", body = DeletedRoom), CommonResponses)
)]
pub(super) async fn delete(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
) -> Result<Json<DeletedRoom>, ApiError> {
    let store = &node.services.rooms;
    match await_bus(&node, store.delete_room(parse_name(&room)?, None, None)).await? {
        DeleteOutcome::Deleted => Ok(Json(DeletedRoom { room })),
        DeleteOutcome::NotFound | DeleteOutcome::NotOwner => Err(not_found()),
    }
}

/// Get a page of the history of a room.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}/history", tag = "rooms",
    operation_id = "room_history",
    params(("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"), HistoryQuery),
    responses((status = 200, description = "A page.", body = HistoryPage), CommonResponses)
)]
pub(super) async fn history(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    which: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Json<HistoryPage>, ApiError> {
    let HistoryQuery { before, after, around, since, until, limit } = parse_query(which)?;
    let (room, limit) = (parse_name::<RoomId>(&room)?, page_limit(limit, 50)?);
    let checked = |seq: Option<u64>| match seq {
        Some(seq) if seq > skein_protocol::position::SEQ_MAX => {
            Err(ApiError::bad_request("a sequence number must be at most 2^53-1"))
        }
        seq => Ok(seq),
    };
    let range = match (checked(before)?, checked(after)?, checked(around)?) {
        (None, None, Some(seq)) => HistoryRange::Around { seq, limit },
        (Some(seq), None, None) => HistoryRange::Read(ReadRange::Before { seq, limit }),
        (None, Some(seq), None) => HistoryRange::Read(ReadRange::After { seq, limit }),
        (None, None, None) => HistoryRange::Read(ReadRange::Newest { limit }),
        _ => {
            let text = "`before`, `after` and `around` exclude each other";
            return Err(ApiError::bad_request(text));
        }
    };
    let time = TimeRange { since: parse_time(since)?, until: parse_time(until)? };
    let page = if node.services.rules.is_durable(&room) {
        let query = history::HistoryQuery { range, time };
        await_bus(&node, node.services.history.page(&room, query)).await?
    } else {
        history::HistoryPage::without_log()
    };
    let (messages, more) = page.frames();
    Ok(Json(HistoryPage { room: room.to_string(), epoch: page.epoch.to_string(), messages, more }))
}

pub(super) fn parse_time(text: Option<String>) -> Result<Option<SystemTime>, ApiError> {
    let parse = |text: String| {
        let text = text.trim();
        skein_protocol::parse_timestamp(text).ok_or_else(|| {
            ApiError::bad_request("a time must be in RFC 3339, such as 2026-01-31T12:00:00Z")
        })
    };
    text.map(parse).transpose()
}

/// Get a page of the members of a room.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}/presence", tag = "rooms",
    operation_id = "room_presence",
    params(("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"), PageQuery),
    responses((status = 200, description = "A page.", body = PresencePage), CommonResponses)
)]
pub(super) async fn presence(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    paging: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<PresencePage>, ApiError> {
    let room: RoomId = parse_name(&room)?;
    let (prefix, after, limit) = parse_query(paging)?.checked()?;
    let store = node.services.presence.store();
    let snapshots = await_bus(&node, store.snapshots(vec![room.clone()])).await?;
    let present = snapshots.into_iter().next().unwrap_or_default().users;
    let count = present.len() as u64;
    let mut ids: Vec<UserId> = present.into_iter().map(|person| person.id).collect();
    ids.retain(|id| id.as_str() > &*after && id.as_str().starts_with(&prefix));
    ids.sort_unstable();
    let more = ids.len() > limit;
    ids.truncate(limit);
    let cursor = ids.last().filter(|_| more).map(UserId::to_string);
    let details = await_bus(&node, store.details(room.clone(), ids)).await?;
    let by_id: BTreeMap<UserId, UserPresence> =
        details.users.into_iter().map(|detail| (detail.user.id.clone(), detail)).collect();
    let users = by_id.into_values().map(|detail| PresentUser::of(detail, true)).collect();
    Ok(Json(PresencePage { room: room.to_string(), users, count, cursor }))
}

/// Remove a user from a room, on all nodes and devices. The user may join again.
#[utoipa::path(
    delete, path = "/api/v1/rooms/{room}/members/{user}", tag = "rooms",
    operation_id = "remove_member",
    params(
        ("room" = String, Path, description = "Id of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"),
        ("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"),
    ),
    responses((status = 200, description = "The number of nodes that have applied the command.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path((room, member)): Path<(String, String)>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let order = ControlCommand::Remove { room: parse_name(&room)?, user: parse_user(&member)? };
    Ok(Json(node.control.execute(order).await?.into()))
}
