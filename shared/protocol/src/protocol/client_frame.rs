//! Client frames: parsing and validation. Each frame is parsed once, here, and an invalid one
//! yields the `error` frame to reply with.

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::value::RawValue;

use super::{
    BINARY_HEADER_BYTES_MAX, FrameRef, META_BYTES_MAX, MessageKind, NAME_CHARS_MAX,
    PASSWORD_BYTES_MAX, REF_BYTES_MAX, SESSION_BYTES_MAX, json_string, server_frame::ErrorFrame,
};
use crate::{
    error::ErrorCode,
    ids::{DisplayName, MessageId, RoomId, UserId},
    position::{Epoch, Position, Seq, seq_in_range},
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

/// `watch` and `unwatch`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct WatchFrame {
    /// The users whose status to send, at most 100.
    #[serde(deserialize_with = "deserialize_users")]
    pub users: Vec<UserId>,
}

/// `session_set`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SessionSetFrame {
    /// Merged into the session's data: a field that exists is replaced, one that is `null` is
    /// removed (RFC 7386, one level deep).
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// `refresh`: a new token for this connection.
#[derive(Clone, PartialEq, Deserialize)]
pub struct RefreshFrame {
    /// The new token.
    pub token: String,
}

impl std::fmt::Debug for RefreshFrame {
    /// Leaves the token out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refresh")
    }
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
    /// Page size, 1 to 200.
    #[serde(default = "history_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `ping`
#[derive(Clone, Debug, Deserialize)]
pub struct PingFrame<'a> {
    /// The client's own time, echoed in the `pong`.
    #[serde(borrow, default)]
    pub timestamp: Option<&'a RawValue>,
}

/// Maximum nesting depth of `content` and `meta`. Common parsers stop at 128 levels, and a message
/// is nested inside `history` inside a frame.
pub const NESTING_MAX: usize = 100;
/// Maximum number of entries that a `join` can request.
pub const JOIN_HISTORY_MAX: u32 = 1000;
/// Maximum page size of `history`, `presence` and `rooms`.
pub const HISTORY_LIMIT_MAX: u32 = 200;
/// Maximum number of users in one `watch`.
pub const WATCH_USERS_MAX: usize = 100;

/// Default number of entries of `join` and `history`.
pub fn history_default() -> u32 {
    50
}

/// Default page size of `presence` and `rooms`.
pub fn list_limit_default() -> u32 {
    100
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
}

/// The fields of a `session_set` in JSON.
#[derive(Deserialize)]
struct SessionSetFields<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
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
            "message" | "direct" => FrameBody::Message(message(&kind, text, None, &error_frame)?),
            "typing" => FrameBody::Typing(serde_json::from_str(text).map_err(bad_request)?),
            "read" => FrameBody::Read(serde_json::from_str(text).map_err(bad_request)?),
            "ack" => FrameBody::Ack(serde_json::from_str(text).map_err(bad_request)?),
            "history" => FrameBody::History(history(text, &error_frame)?),
            "presence" => FrameBody::Presence(serde_json::from_str(text).map_err(bad_request)?),
            "watch" => FrameBody::Watch(serde_json::from_str(text).map_err(bad_request)?),
            "unwatch" => FrameBody::Unwatch(serde_json::from_str(text).map_err(bad_request)?),
            "create_room" => FrameBody::CreateRoom(create_room(text, &error_frame)?),
            "delete_room" => {
                FrameBody::DeleteRoom(serde_json::from_str(text).map_err(bad_request)?)
            }
            "room_info" => FrameBody::RoomInfo(serde_json::from_str(text).map_err(bad_request)?),
            "rooms" => FrameBody::Rooms(serde_json::from_str(text).map_err(bad_request)?),
            "session_get" => FrameBody::SessionGet,
            "session_set" => FrameBody::SessionSet(session_set(text, &error_frame)?),
            "refresh" => FrameBody::Refresh(serde_json::from_str(text).map_err(bad_request)?),
            "ping" => FrameBody::Ping(ping(text, &error_frame)?),
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
        let message = message(&kind, header, Some(payload), &error_frame)?;
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

fn message<'a>(
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
    })
}

/// Checks `meta` of a message or of a room.
fn check_meta(meta: &RawValue, error_frame: &ErrorFrame) -> Result<(), Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    if !meta.get().starts_with('{') {
        return Err(bad_request("`meta` must be an object".into()));
    }
    if meta.get().len() > META_BYTES_MAX {
        let text = format!("`meta` must be at most {META_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(meta).map_err(|error| bad_request(format!("`meta`: {}", describe(&error))))
}

fn create_room<'a>(
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

fn history(text: &str, error_frame: &ErrorFrame) -> Result<HistoryFrame, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let history: HistoryFrame =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    if history.room.is_some() == history.with.is_some() {
        return Err(bad_request("`history` needs either `room` or `with`".into()));
    }
    if history.before.is_some() && history.after.is_some() {
        return Err(bad_request("`before` and `after` must not be combined".into()));
    }
    Ok(history)
}

fn session_set(text: &str, error_frame: &ErrorFrame) -> Result<SessionSetFrame, Box<ErrorFrame>> {
    let bad_request =
        |error: serde_json::Error| error_frame.with_code(ErrorCode::BadRequest, describe(&error));
    let raw: SessionSetFields<'_> = serde_json::from_str(text).map_err(bad_request)?;
    if raw.data.get().len() > SESSION_BYTES_MAX {
        let text = format!("`data` of a session must be at most {SESSION_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(raw.data).map_err(bad_request)?;
    serde_json::from_str(text).map_err(bad_request)
}

fn ping<'a>(text: &'a str, error_frame: &ErrorFrame) -> Result<PingFrame<'a>, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let ping: PingFrame<'a> =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    if let Some(timestamp) = ping.timestamp {
        let json = timestamp.get();
        // The quotes of a string do not count.
        let length = json.trim_matches('"').len();
        if !json.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit())
            || length > REF_BYTES_MAX
            || check_json(timestamp).is_err()
        {
            let text = format!(
                "`timestamp` must be a string or a number of at most {REF_BYTES_MAX} bytes"
            );
            return Err(bad_request(text));
        }
    }
    Ok(ping)
}

/// Rejects well-formed JSON that a common parser of a recipient would not accept: half a surrogate
/// pair, a number beyond a double, more than [`NESTING_MAX`] levels. JSON is forwarded as it was
/// written, so one sender could otherwise break every member of a room.
///
/// # Errors
///
/// The first of these faults.
pub fn check_json(raw: &RawValue) -> Result<(), serde_json::Error> {
    let json = raw.get();
    if nesting_depth(json) > NESTING_MAX {
        return Err(serde_json::Error::custom(format!(
            "nested more than {NESTING_MAX} levels deep"
        )));
    }
    let plain_text = json.starts_with('"') && !json.contains(r"\u");
    if plain_text {
        return Ok(());
    }
    serde_json::from_str::<serde_json::Value>(json).map(drop)
}

/// Maximum depth of nested arrays and objects.
fn nesting_depth(json: &str) -> usize {
    let (mut level, mut deepest, mut in_text, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                level += 1;
                deepest = deepest.max(level);
            }
            b']' | b'}' if !in_text => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn default_true() -> bool {
    true
}

/// A value that is present, even if it is `null`.
fn deserialize_present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn deserialize_history<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let history = u32::deserialize(deserializer)?;
    if history > JOIN_HISTORY_MAX {
        return Err(D::Error::custom(format!("`history` must be 0 to {JOIN_HISTORY_MAX}")));
    }
    Ok(history)
}

fn deserialize_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let limit = u32::deserialize(deserializer)?;
    if limit == 0 || limit > HISTORY_LIMIT_MAX {
        return Err(D::Error::custom(format!("`limit` must be 1 to {HISTORY_LIMIT_MAX}")));
    }
    Ok(limit)
}

fn deserialize_users<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<UserId>, D::Error> {
    let users = Vec::<UserId>::deserialize(deserializer)?;
    if users.len() > WATCH_USERS_MAX {
        return Err(D::Error::custom(format!("`users` must be at most {WATCH_USERS_MAX}")));
    }
    Ok(users)
}

/// A name or a prefix of one, at most 128 bytes.
fn deserialize_short_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    if text.as_ref().is_some_and(|text| text.len() > 128) {
        return Err(D::Error::custom("`cursor` and `prefix` must be at most 128 bytes"));
    }
    Ok(text)
}

fn deserialize_password<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let password = Option::<String>::deserialize(deserializer)?;
    if password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
        return Err(D::Error::custom(format!(
            "`password` must be at most {PASSWORD_BYTES_MAX} bytes"
        )));
    }
    Ok(password)
}

fn deserialize_optional_seq<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Seq>, D::Error> {
    #[derive(Deserialize)]
    struct InRange(#[serde(deserialize_with = "seq_in_range")] Seq);
    Ok(Option::<InRange>::deserialize(deserializer)?.map(|seq| seq.0))
}

/// An error of serde_json as one line of text, without the line number, which is always 1.
fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line 1 column ") {
        Some((fault, column)) => format!("{fault} (at byte {column})"),
        None => text,
    }
}

/// The part of a client's text that a reply repeats: at most 64 characters.
fn truncated(text: &str) -> &str {
    text.char_indices().nth(64).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn rejected(text: &str, code: ErrorCode) -> ErrorFrame {
        let error_frame = *ClientFrame::from_text(text).expect_err("rejected");
        assert_eq!(error_frame.code, code, "{error_frame:?}");
        error_frame
    }

    #[test]
    fn a_message_has_defaults_and_keeps_content_as_written() {
        let text = r#"{"type":"message","room":"r","content":{"a": 1.0},"ref":7,"more":[]}"#;
        let frame = ClientFrame::from_text(text).unwrap();
        assert_eq!(frame.reference, Some(FrameRef::number(7)));
        let FrameBody::Message(message) = frame.body else { panic!("{:?}", frame.body) };
        assert!(message.echo && message.id.is_none() && message.kind == MessageKind::Text);
        let RawContent::Json(content) = message.content else { panic!("binary") };
        assert_eq!(content.get(), r#"{"a": 1.0}"#);
    }

    #[test]
    fn null_is_valid_content() {
        let text = r#"{"type":"message","room":"r","content":null}"#;
        let FrameBody::Message(message) = ClientFrame::from_text(text).unwrap().body else {
            panic!()
        };
        assert!(matches!(message.content, RawContent::Json(content) if content.get() == "null"));
    }

    #[test]
    fn an_error_names_the_fields_that_could_be_read() {
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let text = format!(r#"{{"type":"message","room":"r","id":"{id}","ref":"x"}}"#);
        let error_frame = rejected(&text, ErrorCode::BadRequest);
        assert_eq!(error_frame.reference.unwrap().as_json(), r#""x""#);
        assert_eq!(error_frame.frame_type.as_deref(), Some("message"));
        assert_eq!(error_frame.room.unwrap().as_str(), "r");
        assert_eq!(error_frame.id.unwrap().to_string(), id);
        assert!(error_frame.message.contains("content"), "{}", error_frame.message);
    }

    #[test]
    fn invalid_frames_are_rejected_with_their_code() {
        for text in [
            "",
            "x",
            "[]",
            "1",
            r#"["pong",1,null,null]"#,
            "{}",
            r#"{"type":1}"#,
            r#"{"type":"join"}"#,
        ] {
            rejected(text, ErrorCode::BadRequest);
        }
        rejected(r#"{"type":"nonsense"}"#, ErrorCode::UnknownType);
        rejected(r#"{"type":"join","room":"a b"}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"join","room":"r","history":1001}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"history","room":"r","limit":0}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"history","room":"r","limit":201}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"history","room":"r","before":1,"after":1}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"pong","ref":1.5}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"ping","timestamp":{}}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"message","room":"r","content":1,"meta":[]}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"message","room":"r","content":1,"kind":"x"}"#, ErrorCode::BadRequest);
        rejected(
            r#"{"type":"message","room":"r","content":1,"kind":"system"}"#,
            ErrorCode::BadRequest,
        );
    }

    #[test]
    fn frames_about_one_user_are_validated() {
        let FrameBody::Message(direct) =
            ClientFrame::from_text(r#"{"type":"direct","to":"bob","content":1}"#).unwrap().body
        else {
            panic!()
        };
        assert_eq!(direct.to, Recipient::User("bob".parse().unwrap()));
        for text in [
            r#"{"type":"direct","content":1}"#,
            r#"{"type":"direct","room":"r","content":1}"#,
            r#"{"type":"direct","to":"_api","content":1}"#,
            r#"{"type":"message","to":"bob","content":1}"#,
            r#"{"type":"ack"}"#,
            r#"{"type":"ack","seq":"1"}"#,
            r#"{"type":"watch"}"#,
            r#"{"type":"watch","users":["a b"]}"#,
            r#"{"type":"history"}"#,
            r#"{"type":"history","room":"r","with":"bob"}"#,
            r#"{"type":"session_set","data":[]}"#,
            r#"{"type":"session_set"}"#,
            r#"{"type":"refresh"}"#,
        ] {
            rejected(text, ErrorCode::BadRequest);
        }
        let users = vec!["bob"; WATCH_USERS_MAX + 1];
        let watch = serde_json::json!({"type": "watch", "users": users}).to_string();
        rejected(&watch, ErrorCode::BadRequest);
        let data = "y".repeat(SESSION_BYTES_MAX);
        let set = serde_json::json!({"type": "session_set", "data": {"x": data}}).to_string();
        rejected(&set, ErrorCode::TooLarge);
    }

    #[test]
    fn content_that_would_break_recipients_is_rejected() {
        let deep = format!("{}{}", "[".repeat(101), "]".repeat(101));
        for content in [r#""\ud800""#, "1e999", &deep] {
            let text = format!(r#"{{"type":"message","room":"r","content":{content}}}"#);
            rejected(&text, ErrorCode::BadRequest);
        }
        let brackets =
            format!(r#"{{"type":"message","room":"r","content":["{}\""]}}"#, "[".repeat(200));
        assert!(ClientFrame::from_text(&brackets).is_ok());
        let emoji = r#"{"type":"message","room":"r","content":"\ud83d\udc27"}"#;
        assert!(ClientFrame::from_text(emoji).is_ok());
    }

    #[test]
    fn a_meta_above_its_limit_is_too_large() {
        let meta = format!(r#"{{"x":"{}"}}"#, "y".repeat(META_BYTES_MAX));
        let text = format!(r#"{{"type":"message","room":"r","content":1,"meta":{meta}}}"#);
        rejected(&text, ErrorCode::TooLarge);
    }

    #[test]
    fn create_room_accepts_what_its_limits_allow() {
        let text = r#"{"type":"create_room","room":"r","password":"p","meta":{"a": 1}}"#;
        let FrameBody::CreateRoom(room) = ClientFrame::from_text(text).unwrap().body else {
            panic!()
        };
        assert!(room.public && room.name.is_none() && room.max_members.is_none());
        assert_eq!(
            (room.password.as_deref(), room.meta.unwrap().get()),
            (Some("p"), r#"{"a": 1}"#)
        );
        let with = |more: &str| format!(r#"{{"type":"create_room","room":"r",{more}}}"#);
        rejected(&with(r#""max_members":0"#), ErrorCode::BadRequest);
        rejected(&with(r#""max_members":-1"#), ErrorCode::BadRequest);
        rejected(&with(r#""password":"""#), ErrorCode::BadRequest);
        rejected(&with(r#""name":"a\u0007""#), ErrorCode::BadRequest);
        rejected(&with(r#""meta":[]"#), ErrorCode::BadRequest);
        rejected(&with(&format!(r#""name":"{}""#, "n".repeat(65))), ErrorCode::TooLarge);
        rejected(&with(&format!(r#""password":"{}""#, "p".repeat(1025))), ErrorCode::TooLarge);
        let meta = format!(r#""meta":{{"x":"{}"}}"#, "y".repeat(META_BYTES_MAX));
        rejected(&with(&meta), ErrorCode::TooLarge);
    }

    #[test]
    fn frames_about_typing_and_presence_are_validated() {
        rejected(r#"{"type":"typing","room":"r"}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"read","room":"r","seq":-1}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"read","room":"r"}"#, ErrorCode::BadRequest);
        rejected(r#"{"type":"presence","limit":201}"#, ErrorCode::BadRequest);
        let long = "x".repeat(129);
        rejected(&format!(r#"{{"type":"presence","cursor":"{long}"}}"#), ErrorCode::BadRequest);
        rejected(&format!(r#"{{"type":"rooms","prefix":"{long}"}}"#), ErrorCode::BadRequest);
        let long = "x".repeat(PASSWORD_BYTES_MAX + 1);
        let join = format!(r#"{{"type":"join","room":"r","password":"{long}"}}"#);
        rejected(&join, ErrorCode::BadRequest);
        let FrameBody::Presence(all) =
            ClientFrame::from_text(r#"{"type":"presence"}"#).unwrap().body
        else {
            panic!()
        };
        assert_eq!((all.room, all.cursor, all.limit), (None, None, 100));
    }

    #[test]
    fn a_binary_frame_is_a_header_and_a_payload() {
        let header = br#"{"type":"message","room":"r","ref":"b"}"#;
        let length = (header.len() as u16).to_be_bytes();
        let frame = [&length[..], header, &[0, 255]].concat();
        let parsed = ClientFrame::from_binary(&frame).unwrap();
        let FrameBody::Message(message) = parsed.body else { panic!("{:?}", parsed.body) };
        assert!(matches!(message.content, RawContent::Binary([0, 255])));
        for bad in [&frame[..1], &frame[..9], b"\0\0", b"\0\x02{}", b"\xFF\xFFx"] {
            assert!(ClientFrame::from_binary(bad).is_err());
        }
    }
}
