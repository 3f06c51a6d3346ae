//! Frames that send a message, or tell how far a user has read.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{check_json, check_meta, default_true, describe, deserialize_present};
use crate::{
    error::ErrorCode,
    ids::{MessageId, RoomId, UserId},
    position::{Epoch, Seq, seq_in_range},
    protocol::{MessageKind, json_string, server_frame::ErrorFrame},
};

/// The destination of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recipient {
    /// The members of a room: a `message`.
    Room(RoomId),
    /// A user, on all devices: a `direct`.
    User(UserId),
}

impl Recipient {
    /// The `type` of the frame.
    pub fn frame_type(&self) -> &'static str {
        match self {
            Self::Room(_) => "message",
            Self::User(_) => "direct",
        }
    }

    /// The room of a `message`, as an `error` names it.
    pub fn room(&self) -> Option<&RoomId> {
        match self {
            Self::Room(room) => Some(room),
            Self::User(_) => None,
        }
    }
}

/// `message`: an entry for a room's log. `direct`: an entry for the inboxes of recipient and
/// sender.
#[derive(Debug)]
pub struct SendFrame<'a> {
    /// The destination.
    pub to: Recipient,
    /// The client's own id of the message: the idempotency key of a repeated send.
    pub id: Option<MessageId>,
    /// The kind of message.
    pub kind: MessageKind,
    /// The content.
    pub content: RawContent<'a>,
    /// The message that this one replies to.
    pub reply_to: Option<MessageId>,
    /// Metadata of the application, a JSON object.
    pub meta: Option<&'a RawValue>,
    /// Whether the sending connection receives a copy.
    pub echo: bool,
    /// The sender's span (W3C Trace Context), as it was sent. Invalid ones are ignored.
    pub traceparent: Option<&'a RawValue>,
}

impl SendFrame<'_> {
    /// The sender's span as text.
    pub fn traceparent(&self) -> Option<Cow<'_, str>> {
        self.traceparent.and_then(json_string)
    }
}

/// The content of a message, as the client wrote it.
#[derive(Clone, Copy, Debug)]
pub enum RawContent<'a> {
    /// Any JSON, unchanged.
    Json(&'a RawValue),
    /// The payload of a binary frame.
    Binary(&'a [u8]),
}

/// `typing`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SetTypingFrame {
    /// The room.
    pub room: RoomId,
    /// Whether the user types or has stopped.
    pub is_typing: bool,
}

/// `read`: moves the user's read mark.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct MarkReadFrame {
    /// The room.
    pub room: RoomId,
    /// The newest entry that the user has read. A number above the top counts as the top.
    #[serde(deserialize_with = "seq_in_range")]
    pub seq: Seq,
}

/// `ack`: acknowledges all entries of the inbox up to one.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct InboxAckFrame {
    /// The newest acknowledged entry. A number above the top counts as the top.
    #[serde(deserialize_with = "seq_in_range")]
    pub seq: Seq,
    /// The epoch that `seq` counts in; the current one if absent.
    pub epoch: Option<Epoch>,
}

/// The fields of a `message` or `direct` in JSON.
#[derive(Deserialize)]
struct SendFields<'a> {
    room: Option<RoomId>,
    to: Option<UserId>,
    id: Option<MessageId>,
    #[serde(default)]
    kind: MessageKind,
    #[serde(borrow, default, deserialize_with = "deserialize_present")]
    content: Option<&'a RawValue>,
    reply_to: Option<MessageId>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
    #[serde(default = "default_true")]
    echo: bool,
    #[serde(borrow)]
    traceparent: Option<&'a RawValue>,
}

pub(super) fn message<'a>(
    kind: &str,
    text: &'a str,
    payload: Option<&'a [u8]>,
    error_frame: &ErrorFrame,
) -> Result<SendFrame<'a>, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let fields: SendFields<'_> =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    if fields.kind == MessageKind::System {
        return Err(bad_request("only the server sends messages of kind `system`".into()));
    }
    if let Some(meta) = fields.meta {
        check_meta(meta, error_frame)?;
    }
    let content = match (fields.content, payload) {
        (Some(content), None) => {
            check_json(content)
                .map_err(|error| bad_request(format!("`content`: {}", describe(&error))))?;
            RawContent::Json(content)
        }
        (None, Some(payload)) => RawContent::Binary(payload),
        (None, None) => return Err(bad_request("missing field `content`".into())),
        (Some(_), Some(_)) => {
            return Err(bad_request("the header of a binary frame must not have `content`".into()));
        }
    };
    let to = match (kind, fields.room, fields.to) {
        ("direct", _, Some(user)) if user.is_reserved() => {
            return Err(bad_request(
                "users whose id begins with `_` are reserved for the server and have no inbox"
                    .into(),
            ));
        }
        ("direct", _, Some(user)) => Recipient::User(user),
        ("direct", _, None) => return Err(bad_request("missing field `to`".into())),
        (_, Some(room), _) => Recipient::Room(room),
        (_, None, _) => return Err(bad_request("missing field `room`".into())),
    };
    Ok(SendFrame {
        to,
        id: fields.id,
        kind: fields.kind,
        content,
        reply_to: fields.reply_to,
        meta: fields.meta,
        echo: fields.echo,
        traceparent: fields.traceparent,
    })
}
