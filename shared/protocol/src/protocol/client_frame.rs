//! Client frames: parsing and validation. Each frame is parsed once, here, and an invalid one
//! yields the `error` frame to reply with.

use serde::Deserialize;
use serde_json::value::RawValue;

use self::json::{describe, truncated};
use super::{BINARY_HEADER_BYTES_MAX, FrameRef, json_string, server_frame::ErrorFrame};
use crate::error::ErrorCode;

mod json;
mod messages;
mod rooms;
mod connection;
#[cfg(test)]
mod tests;

pub use connection::{PingFrame, RefreshFrame, SessionSetFrame, WATCH_USERS_MAX, WatchFrame};
pub use json::{NESTING_MAX, check_json};
pub use messages::{
    InboxAckFrame, MarkReadFrame, RawContent, Recipient, SendFrame, SetTypingFrame,
};
pub use rooms::{
    CreateRoomFrame, HISTORY_LIMIT_MAX, HistoryFrame, JOIN_HISTORY_MAX, JoinFrame, PresenceFrame,
    RoomFrame, RoomsFrame, history_default, list_limit_default,
};

/// A frame from a client.
#[derive(Debug)]
pub struct ClientFrame<'a> {
    /// The `ref` of the frame, echoed in the reply.
    pub reference: Option<FrameRef>,
    /// The rest of the frame, by `type`.
    pub body: FrameBody<'a>,
}

/// The fields of a client frame, by `type`.
#[derive(Debug)]
pub enum FrameBody<'a> {
    /// `join`
    Join(JoinFrame),
    /// `leave`
    Leave(RoomFrame),
    /// `message` and `direct`
    Message(SendFrame<'a>),
    /// `typing`
    Typing(SetTypingFrame),
    /// `read`
    Read(MarkReadFrame),
    /// `ack`
    Ack(InboxAckFrame),
    /// `history`
    History(HistoryFrame),
    /// `presence`
    Presence(PresenceFrame),
    /// `watch`
    Watch(WatchFrame),
    /// `unwatch`
    Unwatch(WatchFrame),
    /// `create_room`
    CreateRoom(CreateRoomFrame<'a>),
    /// `delete_room`
    DeleteRoom(RoomFrame),
    /// `room_info`
    RoomInfo(RoomFrame),
    /// `rooms`
    Rooms(RoomsFrame),
    /// `session_get`
    SessionGet,
    /// `session_set`
    SessionSet(SessionSetFrame),
    /// `refresh`
    Refresh(RefreshFrame),
    /// `ping`
    Ping(PingFrame<'a>),
    /// `pong`
    Pong,
}

impl FrameBody<'_> {
    /// Whether the frame carries the password of a room.
    pub fn has_password(&self) -> bool {
        match self {
            Self::Join(join) => join.password.is_some(),
            Self::CreateRoom(create) => create.password.is_some(),
            _ => false,
        }
    }

    /// Number of users that the frame lists: the work it causes grows with it.
    pub fn listed_users(&self) -> usize {
        match self {
            Self::Watch(users) | Self::Unwatch(users) => users.users.len(),
            _ => 0,
        }
    }

    /// The `type` of the frame.
    pub fn frame_type(&self) -> &'static str {
        match self {
            Self::Join(_) => "join",
            Self::Leave(_) => "leave",
            Self::Message(message) => message.to.frame_type(),
            Self::Typing(_) => "typing",
            Self::Read(_) => "read",
            Self::Ack(_) => "ack",
            Self::History(_) => "history",
            Self::Presence(_) => "presence",
            Self::Watch(_) => "watch",
            Self::Unwatch(_) => "unwatch",
            Self::CreateRoom(_) => "create_room",
            Self::DeleteRoom(_) => "delete_room",
            Self::RoomInfo(_) => "room_info",
            Self::Rooms(_) => "rooms",
            Self::SessionGet => "session_get",
            Self::SessionSet(_) => "session_set",
            Self::Refresh(_) => "refresh",
            Self::Ping(_) => "ping",
            Self::Pong => "pong",
        }
    }
}

/// The fields that every frame can have and that an `error` repeats. Each value is parsed
/// separately, so that an invalid one does not hide the others.
#[derive(Deserialize)]
struct CommonFields<'a> {
    #[serde(borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(borrow, rename = "ref")]
    reference: Option<&'a RawValue>,
    #[serde(borrow)]
    room: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

impl<'a> ClientFrame<'a> {
    /// Parses a text frame.
    ///
    /// # Errors
    ///
    /// The `error` frame to reply with. It names as many fields of the frame as could be parsed.
    pub fn from_text(text: &'a str) -> Result<Self, Box<ErrorFrame>> {
        let (common, mut error_frame) = CommonFields::read(text)?;
        let reference = common.reference(&mut error_frame)?;
        let kind = common.frame_type(&error_frame)?;
        let bad_request = |error: serde_json::Error| {
            error_frame.with_code(ErrorCode::BadRequest, describe(&error))
        };
        let body = match kind.as_ref() {
            "join" => FrameBody::Join(serde_json::from_str(text).map_err(bad_request)?),
            "leave" => FrameBody::Leave(serde_json::from_str(text).map_err(bad_request)?),
            "message" | "direct" => {
                FrameBody::Message(messages::message(&kind, text, None, &error_frame)?)
            }
            "typing" => FrameBody::Typing(serde_json::from_str(text).map_err(bad_request)?),
            "read" => FrameBody::Read(serde_json::from_str(text).map_err(bad_request)?),
            "ack" => FrameBody::Ack(serde_json::from_str(text).map_err(bad_request)?),
            "history" => FrameBody::History(rooms::history(text, &error_frame)?),
            "presence" => FrameBody::Presence(serde_json::from_str(text).map_err(bad_request)?),
            "watch" => FrameBody::Watch(serde_json::from_str(text).map_err(bad_request)?),
            "unwatch" => FrameBody::Unwatch(serde_json::from_str(text).map_err(bad_request)?),
            "create_room" => FrameBody::CreateRoom(rooms::create_room(text, &error_frame)?),
            "delete_room" => {
                FrameBody::DeleteRoom(serde_json::from_str(text).map_err(bad_request)?)
            }
            "room_info" => FrameBody::RoomInfo(serde_json::from_str(text).map_err(bad_request)?),
            "rooms" => FrameBody::Rooms(serde_json::from_str(text).map_err(bad_request)?),
            "session_get" => FrameBody::SessionGet,
            "session_set" => FrameBody::SessionSet(connection::session_set(text, &error_frame)?),
            "refresh" => FrameBody::Refresh(serde_json::from_str(text).map_err(bad_request)?),
            "ping" => FrameBody::Ping(connection::ping(text, &error_frame)?),
            "pong" => FrameBody::Pong,
            _ => {
                let text = format!("unknown frame type `{}`", truncated(&kind));
                return Err(error_frame.with_code(ErrorCode::UnknownType, text));
            }
        };
        Ok(Self { reference, body })
    }

    /// Parses a binary frame: header length (big-endian `u16`), JSON header, payload.
    ///
    /// # Errors
    ///
    /// As [`ClientFrame::from_text`].
    pub fn from_binary(frame: &'a [u8]) -> Result<Self, Box<ErrorFrame>> {
        let bad_request = |text: &str| ErrorFrame::new(ErrorCode::BadRequest, text);
        let (length, rest) = frame.split_first_chunk::<2>().ok_or_else(|| {
            bad_request("a binary frame must begin with the length of its header, 2 bytes")
        })?;
        let length = usize::from(u16::from_be_bytes(*length));
        let (header, payload) = rest.split_at_checked(length).ok_or_else(|| {
            bad_request("the header of the binary frame is longer than the frame")
        })?;
        if length > BINARY_HEADER_BYTES_MAX {
            let text = format!(
                "the header of a binary frame must be at most {BINARY_HEADER_BYTES_MAX} bytes"
            );
            return Err(ErrorFrame::new(ErrorCode::TooLarge, text));
        }
        let header = std::str::from_utf8(header)
            .map_err(|_| bad_request("the header of the binary frame is not UTF-8"))?;
        let (common, mut error_frame) = CommonFields::read(header)?;
        let reference = common.reference(&mut error_frame)?;
        let kind = common.frame_type(&error_frame)?;
        if kind != "message" && kind != "direct" {
            let text = format!(
                "a binary frame must be a `message` or `direct`, not `{}`",
                truncated(&kind)
            );
            return Err(error_frame.with_code(ErrorCode::BadRequest, text));
        }
        let message = messages::message(&kind, header, Some(payload), &error_frame)?;
        Ok(Self { reference, body: FrameBody::Message(message) })
    }
}

impl<'a> CommonFields<'a> {
    fn read(text: &'a str) -> Result<(Self, ErrorFrame), Box<ErrorFrame>> {
        // serde would accept an array as the fields of a struct in order.
        if !text.trim_ascii_start().starts_with('{') {
            return Err(ErrorFrame::new(ErrorCode::BadRequest, "a frame must be a JSON object"));
        }
        let common: Self = serde_json::from_str(text).map_err(|error| {
            let text = format!("a frame must be a JSON object: {}", describe(&error));
            ErrorFrame::new(ErrorCode::BadRequest, text)
        })?;
        let name = |raw: Option<&'a RawValue>| raw.and_then(json_string);
        let error_frame = ErrorFrame {
            frame_type: name(common.kind).map(|kind| truncated(&kind).to_owned()),
            room: name(common.room).and_then(|room| room.parse().ok()),
            id: name(common.id).and_then(|id| id.parse().ok()),
            ..*ErrorFrame::new(ErrorCode::BadRequest, "")
        };
        Ok((common, error_frame))
    }

    fn reference(&self, error_frame: &mut ErrorFrame) -> Result<Option<FrameRef>, Box<ErrorFrame>> {
        let Some(raw) = self.reference else { return Ok(None) };
        let reference: Option<FrameRef> = serde_json::from_str(raw.get())
            .map_err(|error| error_frame.with_code(ErrorCode::BadRequest, describe(&error)))?;
        error_frame.reference.clone_from(&reference);
        Ok(reference)
    }

    fn frame_type(
        &self,
        error_frame: &ErrorFrame,
    ) -> Result<std::borrow::Cow<'a, str>, Box<ErrorFrame>> {
        self.kind.and_then(json_string).ok_or_else(|| {
            error_frame
                .with_code(ErrorCode::BadRequest, "a frame must have a `type`, a string".into())
        })
    }
}
