//! Server API: search for messages in the archive.

use std::{sync::Arc, time::UNIX_EPOCH};

use axum::{
    Json,
    extract::{Query, State, rejection::QueryRejection},
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use skein_core::archive::{SearchCursor, SearchQuery, TimeRange};
use skein_protocol::{error::ErrorCode, ids::RoomId};
use utoipa::ToSchema;

use super::{
    ApiError, CommonResponses, await_bus, page_limit, parse_name, parse_query, parse_user,
    rooms::parse_time,
};
use crate::http::Node;

/// The most rooms of one search.
const ROOMS_MAX: usize = 100;
/// The longest text of a search, in characters.
const TEXT_CHARS_MAX: usize = 256;

/// Selects messages.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct MessageQuery {
    /// Ids of the rooms to search, separated by commas; at most 100.
    #[param(pattern = "^[A-Za-z0-9_.:@-]{1,128}(,[A-Za-z0-9_.:@-]{1,128}){0,99}$")]
    room: String,
    /// Words that a message has, all of them, in any case; at most 256 characters.
    #[param(min_length = 1, max_length = 256)]
    q: String,
    /// Only messages of this user.
    #[serde(default)]
    #[param(max_length = 128, pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]*$")]
    from: Option<String>,
    /// Only messages accepted at this time or later, in RFC 3339.
    #[serde(default)]
    #[param(format = DateTime)]
    since: Option<String>,
    /// Only messages accepted before this time, in RFC 3339.
    #[serde(default)]
    #[param(format = DateTime)]
    until: Option<String>,
    /// `cursor` of the previous page.
    #[serde(default)]
    #[param(max_length = 256)]
    cursor: Option<String>,
    /// Messages per page, 1 to 200.
    #[serde(default)]
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
}

/// A page of found messages.
#[derive(Serialize, ToSchema)]
pub(super) struct FoundMessages {
    /// `message` frames, newest first.
    #[schema(value_type = Vec<Object>)]
    messages: Vec<Box<RawValue>>,
    /// Selects the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// Search messages of rooms in the archive.
#[utoipa::path(
    get, path = "/api/v1/search", tag = "rooms", operation_id = "search_messages",
    params(MessageQuery),
    responses((status = 200, description = "Messages.", body = FoundMessages), CommonResponses)
)]
pub(super) async fn search(
    State(node): State<Arc<Node>>,
    which: Result<Query<MessageQuery>, QueryRejection>,
) -> Result<Json<FoundMessages>, ApiError> {
    let MessageQuery { room, q, from, since, until, cursor, limit } = parse_query(which)?;
    let rooms = room.split(',').map(parse_name).collect::<Result<Vec<RoomId>, _>>()?;
    if rooms.len() > ROOMS_MAX {
        return Err(ApiError::bad_request(format!("`room` must name at most {ROOMS_MAX} rooms")));
    }
    if q.trim().is_empty() || q.chars().count() > TEXT_CHARS_MAX {
        let text = format!("`q` must be 1 to {TEXT_CHARS_MAX} characters");
        return Err(ApiError::bad_request(text));
    }
    let query = SearchQuery {
        rooms,
        text: q,
        sender: from.as_deref().map(parse_user).transpose()?,
        time: TimeRange { since: parse_time(since)?, until: parse_time(until)? },
        before: cursor.as_deref().map(parse_cursor).transpose()?,
        limit: page_limit(limit, 50)?,
    };
    let Some(archive) = node.services.history.archive() else {
        let text = "there is no archive to search: set archive.url";
        return Err(ApiError::new(ErrorCode::NotFound, text));
    };
    let page = await_bus(&node, archive.search(query)).await?;
    let last = page.entries.last().filter(|_| page.more);
    let cursor = last.and_then(|last| {
        let time = last.envelope.accepted_at()?.duration_since(UNIX_EPOCH).ok()?;
        Some(format!("{}:{}:{}", time.as_millis(), last.position.seq, last.room))
    });
    let json = page.entries.iter().map(|entry| entry.envelope.to_json(&entry.position));
    let messages = json.map(|json| RawValue::from_string(json).expect("an envelope holds JSON"));
    Ok(Json(FoundMessages { messages: messages.collect(), cursor }))
}

fn parse_cursor(text: &str) -> Result<SearchCursor, ApiError> {
    let parse = || {
        let mut parts = text.splitn(3, ':');
        let (time_ms, seq) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(SearchCursor { time_ms, seq, room: parts.next()?.parse().ok()? })
    };
    parse().ok_or_else(|| ApiError::bad_request("`cursor` must be one of a previous page"))
}
