//! Rooms: which there are, what they are like, what was said, who is there.

use std::{collections::BTreeMap, sync::Arc};

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
    bus::{
        BusError, ReadRange,
        commands::ControlCommand,
        registry::{
            CreateOutcome, DeleteOutcome, RoomConfig, RoomSummary, UserPresence, unix_millis_now,
        },
    },
    delivery::page::LogPage,
    publisher::API_USER,
    session::{history_of, info_of, room_name},
};

/// A room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RoomDetails {
    /// Its id.
    room: String,
    /// What people read.
    name: String,
    /// Who made it; nobody, where it came to be by being joined.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    /// Whether clients see it in `rooms`.
    public: bool,
    /// Whether it has a password.
    protected: bool,
    /// The most users that may be in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_members: Option<u32>,
    /// How many are.
    members: u64,
    /// Whether it keeps a log.
    durable: bool,
    /// When it was made, or joined first.
    created_at: String,
    /// More about it.
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
pub(super) struct RoomPage {
    /// By id.
    rooms: Vec<RoomDetails>,
    /// Asks for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// How a room is to be.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewRoom {
    /// What people read, 64 characters at most; its id where absent.
    #[schema(min_length = 1, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$")]
    #[serde(default)]
    name: Option<String>,
    /// Who may delete it beside the application; `_api` where absent.
    #[schema(max_length = 128, pattern = "^[A-Za-z0-9_.:@|+=-]+$")]
    #[serde(default)]
    owner: Option<String>,
    /// The most users that may be in it.
    #[schema(minimum = 1)]
    #[serde(default)]
    max_members: Option<u32>,
    /// Whether clients see it in `rooms`; they do where absent.
    #[serde(default)]
    public: Option<bool>,
    /// What who joins has to know: 1,024 bytes at most.
    #[schema(min_length = 1)]
    #[serde(default)]
    password: Option<String>,
    /// More about it, a JSON object of at most 8 KiB.
    #[schema(value_type = Option<Object>)]
    #[serde(default)]
    meta: Option<Box<RawValue>>,
}

/// What was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedRoom {
    /// The room.
    room: String,
}

/// Which page of a room's log.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryQuery {
    /// Entries below this number, the newest of them.
    #[serde(default)]
    #[param(minimum = 0, maximum = 9007199254740991_u64)]
    before: Option<u64>,
    /// Entries above this number, the oldest of them.
    #[serde(default)]
    #[param(minimum = 0, maximum = 9007199254740991_u64)]
    after: Option<u64>,
    /// How many, 1 to 200.
    #[serde(default)]
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
}

/// A page of a room's log.
#[derive(Serialize, ToSchema)]
pub(super) struct HistoryPage {
    /// The room.
    room: String,
    /// The epoch that numbers count in.
    epoch: String,
    /// Whole `message` frames, oldest first.
    #[schema(value_type = Vec<Object>)]
    messages: Vec<Box<RawValue>>,
    /// Whether more are there in the direction asked for.
    more: bool,
}

/// Who is in a room.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PresencePage {
    /// The room.
    room: String,
    /// A page of them, by id.
    users: Vec<PresentUser>,
    /// How many there are in all.
    count: u64,
    /// Asks for the next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

fn not_found() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no such room")
}

/// List rooms: those that are managed, and those that somebody is in.
#[utoipa::path(
    get, path = "/api/v1/rooms", tag = "rooms",
    operation_id = "list_rooms", params(PageQuery),
    responses((status = 200, description = "A page.", body = RoomPage), CommonResponses)
)]
pub(super) async fn list(
    State(node): State<Arc<Node>>,
    paging: Result<Query<PageQuery>, QueryRejection>,
) -> Result<Json<RoomPage>, ApiError> {
    let (prefix, after, limit) = parse_query(paging)?.checked()?;
    let store = node.services.presence.store();
    let listing = await_bus(&node, store.list(prefix, after, limit, true)).await?;
    let rooms = listing.rooms.into_iter().map(|found| RoomDetails::of(&node, found)).collect();
    Ok(Json(RoomPage { rooms, cursor: listing.next }))
}

/// What a room is like.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "get_room",
    params(("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    responses((status = 200, description = "The room.", body = RoomDetails), CommonResponses)
)]
pub(super) async fn info(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
) -> Result<Json<RoomDetails>, ApiError> {
    let store = node.services.presence.store();
    let found = await_bus(&node, store.find(parse_name(&room)?)).await?;
    found.map(|found| Json(RoomDetails::of(&node, found))).ok_or_else(not_found)
}

impl NewRoom {
    async fn checked(self, node: &Node, room: &RoomId) -> Result<RoomConfig, ApiError> {
        let too_large = |text: String| ApiError::new(ErrorCode::TooLarge, text);
        let name: DisplayName = match self.name {
            Some(name) if name.chars().count() > NAME_CHARS_MAX => {
                return Err(too_large(format!("`name` is at most {NAME_CHARS_MAX} characters")));
            }
            Some(name) => parse_name(&name)?,
            None => room_name(room),
        };
        if self.max_members == Some(0) {
            return Err(ApiError::bad_request("`max_members` is 1 or more"));
        }
        let meta = self.meta.as_ref().map_or("{}", |meta| meta.get());
        if meta.len() > META_BYTES_MAX {
            return Err(too_large(format!("`meta` is at most {META_BYTES_MAX} bytes")));
        }
        if let Some(meta) = &self.meta {
            if !meta.get().starts_with('{') {
                return Err(ApiError::bad_request("`meta` is an object"));
            }
            check_raw_json("meta", meta)?;
        }
        let owner: UserId = parse_name(self.owner.as_deref().unwrap_or(API_USER))?;
        let password = match self.password {
            Some(password) if password.is_empty() => {
                return Err(ApiError::bad_request(
                    "`password` is not empty; leave it out for a room without",
                ));
            }
            Some(password) if password.len() > PASSWORD_BYTES_MAX => {
                return Err(too_large(format!("`password` is at most {PASSWORD_BYTES_MAX} bytes")));
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

/// Make a managed room. One with members or a log is there already.
#[utoipa::path(
    put, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "create_room",
    params(("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    request_body(content = Option<NewRoom>, description = "May be empty."),
    responses(
        (status = 201, description = "It was made.", body = RoomDetails),
        (status = 409, description = "There is one.", body = super::Problem),
        CommonResponses,
    )
)]
pub(super) async fn create(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    JsonBody(made): JsonBody<NewRoom>,
) -> Result<(StatusCode, Json<RoomDetails>), ApiError> {
    let room: RoomId = parse_name(&room)?;
    let record = made.checked(&node, &room).await?;
    let store = node.services.presence.store();
    if await_bus(&node, store.create(room.clone(), record.clone(), None)).await?
        != CreateOutcome::Created
    {
        let text = "a room of that name is there, with members or a log";
        return Err(ApiError::new(ErrorCode::RoomExists, text));
    }
    let found = RoomSummary { room, since: record.created, config: Some(record), members: 0 };
    Ok((StatusCode::CREATED, Json(RoomDetails::of(&node, found))))
}

/// Delete a room with its log. Its members are told.
#[utoipa::path(
    delete, path = "/api/v1/rooms/{room}", tag = "rooms",
    operation_id = "delete_room",
    params(("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    responses((status = 200, description = "It is no more.", body = DeletedRoom), CommonResponses)
)]
pub(super) async fn delete(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
) -> Result<Json<DeletedRoom>, ApiError> {
    let store = node.services.presence.store();
    match await_bus(&node, store.delete_room(parse_name(&room)?, None, None)).await? {
        DeleteOutcome::Deleted => Ok(Json(DeletedRoom { room })),
        DeleteOutcome::NotFound | DeleteOutcome::NotOwner => Err(not_found()),
    }
}

/// What was said in a room.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}/history", tag = "rooms",
    operation_id = "room_history",
    params(("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"), HistoryQuery),
    responses((status = 200, description = "A page.", body = HistoryPage), CommonResponses)
)]
pub(super) async fn history(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    which: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Json<HistoryPage>, ApiError> {
    let HistoryQuery { before, after, limit } = parse_query(which)?;
    let (room, limit) = (parse_name::<RoomId>(&room)?, page_limit(limit, 50)?);
    let checked = |seq: Option<u64>| match seq {
        Some(seq) if seq > skein_protocol::position::SEQ_MAX => {
            Err(ApiError::bad_request("a number is at most 2^53-1"))
        }
        seq => Ok(seq),
    };
    let range = match (checked(before)?, checked(after)?) {
        (Some(_), Some(_)) => {
            return Err(ApiError::bad_request("`before` and `after` exclude each other"));
        }
        (Some(seq), None) => ReadRange::Before { seq, limit },
        (None, Some(seq)) => ReadRange::After { seq, limit },
        (None, None) => ReadRange::Newest { limit },
    };
    let page = if node.services.rules.is_durable(&room) {
        await_bus(&node, node.services.bus.read(room.clone(), range)).await?
    } else {
        LogPage::without_log()
    };
    let (messages, more) = history_of(range, &page);
    Ok(Json(HistoryPage { room: room.to_string(), epoch: page.epoch.to_string(), messages, more }))
}

/// Who is in a room.
#[utoipa::path(
    get, path = "/api/v1/rooms/{room}/presence", tag = "rooms",
    operation_id = "room_presence",
    params(("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"), PageQuery),
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

/// Take a user out of a room, on all nodes and devices. This is no ban.
#[utoipa::path(
    delete, path = "/api/v1/rooms/{room}/members/{user}", tag = "rooms",
    operation_id = "remove_member",
    params(
        ("room" = String, Path, description = "The room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$"),
        ("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$"),
    ),
    responses((status = 200, description = "On how many nodes it was applied.", body = AppliedNodes), CommonResponses)
)]
pub(super) async fn remove(
    State(node): State<Arc<Node>>,
    Path((room, member)): Path<(String, String)>,
) -> Result<Json<AppliedNodes>, ApiError> {
    let order = ControlCommand::Remove { room: parse_name(&room)?, user: parse_user(&member)? };
    Ok(Json(node.control.execute(order).await?.into()))
}
