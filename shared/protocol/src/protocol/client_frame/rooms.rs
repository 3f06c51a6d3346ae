//! Frames about a room, and lists of rooms and users.

use std::time::SystemTime;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{
    check_meta, default_true, describe, deserialize_history, deserialize_limit,
    deserialize_optional_seq, deserialize_optional_time, deserialize_password,
    deserialize_short_text,
};
use crate::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    position::{Position, Seq},
    protocol::{NAME_CHARS_MAX, PASSWORD_BYTES_MAX, server_frame::ErrorFrame},
};

/// Maximum number of entries that a `join` can request.
pub const JOIN_HISTORY_MAX: u32 = 1000;

/// Maximum page size of `history`, `presence` and `rooms`.
pub const HISTORY_LIMIT_MAX: u32 = 200;

/// Default number of entries of `join` and `history`.
pub fn history_default() -> u32 {
    50
}

/// Default page size of `presence` and `rooms`.
pub fn list_limit_default() -> u32 {
    100
}

/// `join`: subscribe this connection to a room, from now on or from a position.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct JoinFrame {
    /// The room.
    pub room: RoomId,
    /// The position of the client; the entries after it are sent.
    pub since: Option<Position>,
    /// How many of the newest entries to send; ignored with `since`.
    #[serde(default = "history_default", deserialize_with = "deserialize_history")]
    pub history: u32,
    /// The room's password, if it has one.
    #[serde(default, deserialize_with = "deserialize_password")]
    pub password: Option<String>,
}

/// A frame whose only field is a room: `leave`, `room_info`, `delete_room`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RoomFrame {
    /// The room.
    pub room: RoomId,
}

/// `create_room`
#[derive(Clone, Debug)]
pub struct CreateRoomFrame<'a> {
    /// The room.
    pub room: RoomId,
    /// The display name; the room's id if absent.
    pub name: Option<DisplayName>,
    /// The maximum number of users in the room.
    pub max_members: Option<u32>,
    /// Whether `rooms` lists it.
    pub public: bool,
    /// The password that a `join` must carry.
    pub password: Option<String>,
    /// Metadata of the application, a JSON object.
    pub meta: Option<&'a RawValue>,
}

/// `rooms`: the public rooms, by id.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RoomsFrame {
    /// Only rooms whose id begins with this.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub prefix: Option<String>,
    /// The cursor of the previous page.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub cursor: Option<String>,
    /// Page size, 1 to 200.
    #[serde(default = "list_limit_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `presence`: the users in a room, or online on any node.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct PresenceFrame {
    /// The room; the whole cluster if absent.
    pub room: Option<RoomId>,
    /// The cursor of the previous page.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub cursor: Option<String>,
    /// Page size, 1 to 200.
    #[serde(default = "list_limit_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `history`: a page of a room's log, backwards or forwards, or of the directs exchanged with a
/// user.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct HistoryFrame {
    /// The room.
    pub room: Option<RoomId>,
    /// The other user, in place of a room.
    pub with: Option<UserId>,
    /// Only entries below this one, the newest of them.
    #[serde(default, deserialize_with = "deserialize_optional_seq")]
    pub before: Option<Seq>,
    /// Only entries above this one, the oldest of them.
    #[serde(default, deserialize_with = "deserialize_optional_seq")]
    pub after: Option<Seq>,
    /// Only entries around this one, half of them below it.
    #[serde(default, deserialize_with = "deserialize_optional_seq")]
    pub around: Option<Seq>,
    /// Only entries of a room that a node accepted at this time or later.
    #[serde(default, deserialize_with = "deserialize_optional_time")]
    pub since: Option<SystemTime>,
    /// Only entries of a room that a node accepted before this time.
    #[serde(default, deserialize_with = "deserialize_optional_time")]
    pub until: Option<SystemTime>,
    /// Page size, 1 to 200.
    #[serde(default = "history_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// The fields of a `create_room` in JSON.
#[derive(Deserialize)]
struct CreateRoomFields<'a> {
    room: RoomId,
    name: Option<String>,
    max_members: Option<u32>,
    #[serde(default = "default_true")]
    public: bool,
    password: Option<String>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
}

pub(super) fn create_room<'a>(
    text: &'a str,
    error_frame: &ErrorFrame,
) -> Result<CreateRoomFrame<'a>, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let fields: CreateRoomFields<'_> =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    let too_large = |text: String| error_frame.with_code(ErrorCode::TooLarge, text);
    let name = match fields.name {
        Some(name) if name.chars().count() > NAME_CHARS_MAX => {
            return Err(too_large(format!("`name` must be at most {NAME_CHARS_MAX} characters")));
        }
        Some(name) => Some(name.parse().map_err(|error| bad_request(format!("`name`: {error}")))?),
        None => None,
    };
    if fields.max_members == Some(0) {
        return Err(bad_request("`max_members` must be at least 1".into()));
    }
    match &fields.password {
        Some(password) if password.is_empty() => {
            return Err(bad_request(
                "`password` must not be empty; omit it for a room without a password".into(),
            ));
        }
        Some(password) if password.len() > PASSWORD_BYTES_MAX => {
            return Err(too_large(format!(
                "`password` must be at most {PASSWORD_BYTES_MAX} bytes"
            )));
        }
        _ => {}
    }
    if let Some(meta) = fields.meta {
        check_meta(meta, error_frame)?;
    }
    Ok(CreateRoomFrame {
        room: fields.room,
        name,
        max_members: fields.max_members,
        public: fields.public,
        password: fields.password,
        meta: fields.meta,
    })
}

pub(super) fn history(
    text: &str,
    error_frame: &ErrorFrame,
) -> Result<HistoryFrame, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let history: HistoryFrame =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    if history.room.is_some() == history.with.is_some() {
        return Err(bad_request("`history` needs either `room` or `with`".into()));
    }
    let HistoryFrame { before, after, around, since, until, .. } = &history;
    if [before, after, around].iter().filter(|seq| seq.is_some()).count() > 1 {
        let text = "`before`, `after` and `around` must not be combined";
        return Err(bad_request(text.into()));
    }
    if history.with.is_some() && (around.is_some() || since.is_some() || until.is_some()) {
        let text = "`around`, `since` and `until` need `room`: directs have `before` and `after`";
        return Err(bad_request(text.into()));
    }
    Ok(history)
}
