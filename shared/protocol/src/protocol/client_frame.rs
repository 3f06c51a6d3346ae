//! What a client says: a frame is taken apart once, here, and what is wrong with it is told.

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
    /// What the client calls this frame.
    pub reference: Option<FrameRef>,
    /// What it asks for.
    pub body: FrameBody<'a>,
}

/// What a client asks for, by `type`.
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
    /// Whether it holds the password of a room.
    pub fn has_password(&self) -> bool {
        match self {
            Self::Join(join) => join.password.is_some(),
            Self::CreateRoom(create) => create.password.is_some(),
            _ => false,
        }
    }

    /// How many users it names in a list: the work it causes grows with them.
    pub fn listed_users(&self) -> usize {
        match self {
            Self::Watch(users) | Self::Unwatch(users) => users.users.len(),
            _ => 0,
        }
    }

    /// The `type`.
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

/// `join`: take part in a room, from now or from where one was.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct JoinFrame {
    /// The room.
    pub room: RoomId,
    /// Where the client was; what follows it is sent.
    pub since: Option<Position>,
    /// How many of the newest entries to send; ignored with `since`.
    #[serde(default = "history_default", deserialize_with = "deserialize_history")]
    pub history: u32,
    /// The room's password, where it has one.
    #[serde(default, deserialize_with = "deserialize_password")]
    pub password: Option<String>,
}

/// A frame that names a room and nothing else: `leave`, `room_info`, `delete_room`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RoomFrame {
    /// The room.
    pub room: RoomId,
}

/// Where a message goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recipient {
    /// To the fields of a room: a `message`.
    Room(RoomId),
    /// To a user, on all devices: a `direct`.
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

    /// The room, as an `error` names it.
    pub fn room(&self) -> Option<&RoomId> {
        match self {
            Self::Room(room) => Some(room),
            Self::User(_) => None,
        }
    }
}

/// `message`: an entry for a room's log. `direct`: one for the inboxes of receiver and sender.
#[derive(Debug)]
pub struct SendFrame<'a> {
    /// Where it goes.
    pub to: Recipient,
    /// The client's own id for it: the key under which a repeat is recognised.
    pub id: Option<MessageId>,
    /// What it is.
    pub kind: MessageKind,
    /// The content.
    pub content: RawContent<'a>,
    /// The message it answers.
    pub reply_to: Option<MessageId>,
    /// More about it, a JSON object.
    pub meta: Option<&'a RawValue>,
    /// Whether the sending connection gets a copy.
    pub echo: bool,
}

/// What a message holds.
#[derive(Clone, Copy, Debug)]
pub enum RawContent<'a> {
    /// Any JSON, kept as it was written.
    Json(&'a RawValue),
    /// The payload of a binary frame.
    Binary(&'a [u8]),
}

/// `typing`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SetTypingFrame {
    /// The room.
    pub room: RoomId,
    /// Whether the user types, or has stopped.
    pub is_typing: bool,
}

/// `read`: how far the user has read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct MarkReadFrame {
    /// The room.
    pub room: RoomId,
    /// The newest entry that was read; above the top it counts as the top.
    #[serde(deserialize_with = "seq_in_range")]
    pub seq: Seq,
}

/// `ack`: everything up to an entry of the inbox was received.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct InboxAckFrame {
    /// The newest entry; above the top it counts as the top.
    #[serde(deserialize_with = "seq_in_range")]
    pub seq: Seq,
    /// The epoch that `seq` counts in; the present one where absent.
    pub epoch: Option<Epoch>,
}

/// `watch` and `unwatch`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct WatchFrame {
    /// Whose status to be told, 100 at most.
    #[serde(deserialize_with = "deserialize_users")]
    pub users: Vec<UserId>,
}

/// `session_set`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SessionSetFrame {
    /// Merged into what the session holds: fields that are there are replaced, those that are `null`
    /// removed (RFC 7386, one level deep).
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// `refresh`: another token for this connection.
#[derive(Clone, PartialEq, Deserialize)]
pub struct RefreshFrame {
    /// The token.
    pub token: String,
}

impl std::fmt::Debug for RefreshFrame {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refresh")
    }
}

/// `presence`: who is in a room, or on any node at all.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct PresenceFrame {
    /// The room; without it, the cluster.
    pub room: Option<RoomId>,
    /// Where the page before ended.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub cursor: Option<String>,
    /// How many users, 1 to 200.
    #[serde(default = "list_limit_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `create_room`
#[derive(Clone, Debug)]
pub struct CreateRoomFrame<'a> {
    /// The room.
    pub room: RoomId,
    /// What it is called in front of people; its id where that is absent.
    pub name: Option<DisplayName>,
    /// The most users that may be in it.
    pub max_members: Option<u32>,
    /// Whether `rooms` lists it.
    pub public: bool,
    /// What who joins has to know.
    pub password: Option<String>,
    /// More about it, a JSON object.
    pub meta: Option<&'a RawValue>,
}

/// `rooms`: the public rooms, by name.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct RoomsFrame {
    /// What their ids begin with.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub prefix: Option<String>,
    /// Where the page before ended.
    #[serde(default, deserialize_with = "deserialize_short_text")]
    pub cursor: Option<String>,
    /// How many, 1 to 200.
    #[serde(default = "list_limit_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `history`: a page of a room's log, backwards or forwards; or of what was exchanged with a user.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct HistoryFrame {
    /// The room.
    pub room: Option<RoomId>,
    /// The user, in place of a room: directs to and from.
    pub with: Option<UserId>,
    /// Entries below this one, the newest of them.
    #[serde(default, deserialize_with = "deserialize_optional_seq")]
    pub before: Option<Seq>,
    /// Entries above this one, the oldest of them.
    #[serde(default, deserialize_with = "deserialize_optional_seq")]
    pub after: Option<Seq>,
    /// How many, 1 to 200.
    #[serde(default = "history_default", deserialize_with = "deserialize_limit")]
    pub limit: u32,
}

/// `ping`
#[derive(Clone, Debug, Deserialize)]
pub struct PingFrame<'a> {
    /// The client's own time, echoed.
    #[serde(borrow, default)]
    pub timestamp: Option<&'a RawValue>,
}

/// How deep `content` and `meta` may be nested. Common parsers stop at 128 levels, and a message
/// stands inside `history` inside a frame.
pub const NESTING_MAX: usize = 100;
/// The most entries a `join` may ask for.
pub const JOIN_HISTORY_MAX: u32 = 1000;
/// The most entries a `history` may ask for.
pub const HISTORY_LIMIT_MAX: u32 = 200;
/// The most users that one `watch` names.
pub const WATCH_USERS_MAX: usize = 100;

/// How many entries `join` and `history` give where nothing is asked.
pub fn history_default() -> u32 {
    50
}

/// How many users or rooms a page of `presence` and `rooms` has where nothing is asked.
pub fn list_limit_default() -> u32 {
    100
}

/// What every frame may have, and what an `error` names. Values are looked at one by one, so that
/// a bad one does not hide the others.
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

/// The fields of a `message` or `direct`, as JSON has them.
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

/// The fields of a `session_set`, as JSON has them.
#[derive(Deserialize)]
struct SessionSetFields<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
}

/// The fields of a `create_room`, as JSON has them.
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
    /// Reads a text frame.
    ///
    /// # Errors
    ///
    /// The `error` to answer with, naming as much of the frame as could be read.
    pub fn from_text(text: &'a str) -> Result<Self, Box<ErrorFrame>> {
        let (common, mut error_frame) = CommonFields::read(text)?;
        let reference = common.reference(&mut error_frame)?;
        let kind = common.frame_type(&error_frame)?;
        let bad = |error: serde_json::Error| {
            error_frame.with_code(ErrorCode::BadRequest, describe(&error))
        };
        let body = match kind.as_ref() {
            "join" => FrameBody::Join(serde_json::from_str(text).map_err(bad)?),
            "leave" => FrameBody::Leave(serde_json::from_str(text).map_err(bad)?),
            "message" | "direct" => FrameBody::Message(message(&kind, text, None, &error_frame)?),
            "typing" => FrameBody::Typing(serde_json::from_str(text).map_err(bad)?),
            "read" => FrameBody::Read(serde_json::from_str(text).map_err(bad)?),
            "ack" => FrameBody::Ack(serde_json::from_str(text).map_err(bad)?),
            "history" => FrameBody::History(history(text, &error_frame)?),
            "presence" => FrameBody::Presence(serde_json::from_str(text).map_err(bad)?),
            "watch" => FrameBody::Watch(serde_json::from_str(text).map_err(bad)?),
            "unwatch" => FrameBody::Unwatch(serde_json::from_str(text).map_err(bad)?),
            "create_room" => FrameBody::CreateRoom(create_room(text, &error_frame)?),
            "delete_room" => FrameBody::DeleteRoom(serde_json::from_str(text).map_err(bad)?),
            "room_info" => FrameBody::RoomInfo(serde_json::from_str(text).map_err(bad)?),
            "rooms" => FrameBody::Rooms(serde_json::from_str(text).map_err(bad)?),
            "session_get" => FrameBody::SessionGet,
            "session_set" => FrameBody::SessionSet(session_set(text, &error_frame)?),
            "refresh" => FrameBody::Refresh(serde_json::from_str(text).map_err(bad)?),
            "ping" => FrameBody::Ping(ping(text, &error_frame)?),
            "pong" => FrameBody::Pong,
            _ => {
                let text = format!("there is no frame of type `{}`", truncated(&kind));
                return Err(error_frame.with_code(ErrorCode::UnknownType, text));
            }
        };
        Ok(Self { reference, body })
    }

    /// Reads a binary frame: header length (big-endian `u16`), JSON header, payload.
    ///
    /// # Errors
    ///
    /// As [`ClientFrame::from_text`].
    pub fn from_binary(frame: &'a [u8]) -> Result<Self, Box<ErrorFrame>> {
        let bad = |text: &str| ErrorFrame::new(ErrorCode::BadRequest, text);
        let (length, rest) = frame
            .split_first_chunk::<2>()
            .ok_or_else(|| bad("a binary frame starts with the length of its header"))?;
        let length = usize::from(u16::from_be_bytes(*length));
        let (header, payload) = rest
            .split_at_checked(length)
            .ok_or_else(|| bad("the binary header is longer than the frame"))?;
        if length > BINARY_HEADER_BYTES_MAX {
            let text = format!("a binary header is at most {BINARY_HEADER_BYTES_MAX} bytes");
            return Err(ErrorFrame::new(ErrorCode::TooLarge, text));
        }
        let header =
            std::str::from_utf8(header).map_err(|_| bad("the binary header is not UTF-8"))?;
        let (common, mut error_frame) = CommonFields::read(header)?;
        let reference = common.reference(&mut error_frame)?;
        let kind = common.frame_type(&error_frame)?;
        if kind != "message" && kind != "direct" {
            let text =
                format!("a binary frame is a `message` or `direct`, not `{}`", truncated(&kind));
            return Err(error_frame.with_code(ErrorCode::BadRequest, text));
        }
        let message = message(&kind, header, Some(payload), &error_frame)?;
        Ok(Self { reference, body: FrameBody::Message(message) })
    }
}

impl<'a> CommonFields<'a> {
    fn read(text: &'a str) -> Result<(Self, ErrorFrame), Box<ErrorFrame>> {
        // serde reads a list as the fields of a struct in their order.
        if !text.trim_ascii_start().starts_with('{') {
            return Err(ErrorFrame::new(ErrorCode::BadRequest, "a frame is a JSON object"));
        }
        let common: Self = serde_json::from_str(text).map_err(|error| {
            let text = format!("a frame is a JSON object: {}", describe(&error));
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
            error_frame.with_code(ErrorCode::BadRequest, "a frame has a `type`, a string".into())
        })
    }
}

fn message<'a>(
    kind: &str,
    text: &'a str,
    payload: Option<&'a [u8]>,
    error_frame: &ErrorFrame,
) -> Result<SendFrame<'a>, Box<ErrorFrame>> {
    let bad = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let fields: SendFields<'_> =
        serde_json::from_str(text).map_err(|error| bad(describe(&error)))?;
    if fields.kind == MessageKind::System {
        return Err(bad("messages of kind `system` come from the server only".into()));
    }
    if let Some(meta) = fields.meta {
        check_meta(meta, error_frame)?;
    }
    let content = match (fields.content, payload) {
        (Some(content), None) => {
            check_json(content).map_err(|error| bad(format!("`content`: {}", describe(&error))))?;
            RawContent::Json(content)
        }
        (None, Some(payload)) => RawContent::Binary(payload),
        (None, None) => return Err(bad("missing field `content`".into())),
        (Some(_), Some(_)) => {
            return Err(bad("the header of a binary frame has no `content`".into()));
        }
    };
    let to = match (kind, fields.room, fields.to) {
        ("direct", _, Some(user)) if user.is_reserved() => {
            return Err(bad("ids with a leading `_` are the server's; nobody reads there".into()));
        }
        ("direct", _, Some(user)) => Recipient::User(user),
        ("direct", _, None) => return Err(bad("missing field `to`".into())),
        (_, Some(room), _) => Recipient::Room(room),
        (_, None, _) => return Err(bad("missing field `room`".into())),
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

/// Checks `meta`, of a message or of a room.
fn check_meta(meta: &RawValue, error_frame: &ErrorFrame) -> Result<(), Box<ErrorFrame>> {
    let bad = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    if !meta.get().starts_with('{') {
        return Err(bad("`meta` is an object".into()));
    }
    if meta.get().len() > META_BYTES_MAX {
        let text = format!("`meta` is at most {META_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(meta).map_err(|error| bad(format!("`meta`: {}", describe(&error))))
}

fn create_room<'a>(
    text: &'a str,
    error_frame: &ErrorFrame,
) -> Result<CreateRoomFrame<'a>, Box<ErrorFrame>> {
    let bad = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let fields: CreateRoomFields<'_> =
        serde_json::from_str(text).map_err(|error| bad(describe(&error)))?;
    let too_large = |text: String| error_frame.with_code(ErrorCode::TooLarge, text);
    let name = match fields.name {
        Some(name) if name.chars().count() > NAME_CHARS_MAX => {
            return Err(too_large(format!("`name` is at most {NAME_CHARS_MAX} characters")));
        }
        Some(name) => Some(name.parse().map_err(|error| bad(format!("`name`: {error}")))?),
        None => None,
    };
    if fields.max_members == Some(0) {
        return Err(bad("`max_members` is 1 or more".into()));
    }
    match &fields.password {
        Some(password) if password.is_empty() => {
            return Err(bad("`password` is not empty; leave it out for a room without".into()));
        }
        Some(password) if password.len() > PASSWORD_BYTES_MAX => {
            return Err(too_large(format!("`password` is at most {PASSWORD_BYTES_MAX} bytes")));
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
    let bad = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let history: HistoryFrame =
        serde_json::from_str(text).map_err(|error| bad(describe(&error)))?;
    if history.room.is_some() == history.with.is_some() {
        return Err(bad("`history` is of a `room`, or `with` a user".into()));
    }
    if history.before.is_some() && history.after.is_some() {
        return Err(bad("`before` and `after` exclude each other".into()));
    }
    Ok(history)
}

fn session_set(text: &str, error_frame: &ErrorFrame) -> Result<SessionSetFrame, Box<ErrorFrame>> {
    let bad =
        |error: serde_json::Error| error_frame.with_code(ErrorCode::BadRequest, describe(&error));
    let raw: SessionSetFields<'_> = serde_json::from_str(text).map_err(bad)?;
    if raw.data.get().len() > SESSION_BYTES_MAX {
        let text = format!("`data` of a session is at most {SESSION_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(raw.data).map_err(bad)?;
    serde_json::from_str(text).map_err(bad)
}

fn ping<'a>(text: &'a str, error_frame: &ErrorFrame) -> Result<PingFrame<'a>, Box<ErrorFrame>> {
    let bad = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let ping: PingFrame<'a> = serde_json::from_str(text).map_err(|error| bad(describe(&error)))?;
    if let Some(timestamp) = ping.timestamp {
        let json = timestamp.get();
        // The quotes of a string do not count.
        let length = json.trim_matches('"').len();
        if !json.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit())
            || length > REF_BYTES_MAX
            || check_json(timestamp).is_err()
        {
            let text =
                format!("`timestamp` is a string or a number of at most {REF_BYTES_MAX} bytes");
            return Err(bad(text));
        }
    }
    Ok(ping)
}

/// Refuses JSON that is well-formed but that some receiver's parser would choke on: half a
/// surrogate pair, a number beyond a double, more than [`NESTING_MAX`] levels. It is passed on as it
/// was written, so that one sender could otherwise break a whole room.
///
/// # Errors
///
/// What is wrong with it.
pub fn check_json(raw: &RawValue) -> Result<(), serde_json::Error> {
    let json = raw.get();
    if nesting_depth(json) > NESTING_MAX {
        return Err(serde_json::Error::custom(format!("more than {NESTING_MAX} levels")));
    }
    let plain_text = json.starts_with('"') && !json.contains(r"\u");
    if plain_text {
        return Ok(());
    }
    serde_json::from_str::<serde_json::Value>(json).map(drop)
}

/// How deep arrays and objects are nested.
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

/// A value that is there, be it `null`.
fn deserialize_present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

fn deserialize_history<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let history = u32::deserialize(deserializer)?;
    if history > JOIN_HISTORY_MAX {
        return Err(D::Error::custom(format!("`history` is 0 to {JOIN_HISTORY_MAX}")));
    }
    Ok(history)
}

fn deserialize_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let limit = u32::deserialize(deserializer)?;
    if limit == 0 || limit > HISTORY_LIMIT_MAX {
        return Err(D::Error::custom(format!("`limit` is 1 to {HISTORY_LIMIT_MAX}")));
    }
    Ok(limit)
}

fn deserialize_users<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<UserId>, D::Error> {
    let users = Vec::<UserId>::deserialize(deserializer)?;
    if users.len() > WATCH_USERS_MAX {
        return Err(D::Error::custom(format!("`users` are at most {WATCH_USERS_MAX}")));
    }
    Ok(users)
}

/// A name, or what one begins with: 128 bytes at most.
fn deserialize_short_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    if text.as_ref().is_some_and(|text| text.len() > 128) {
        return Err(D::Error::custom("`cursor` and `prefix` are at most 128 bytes"));
    }
    Ok(text)
}

fn deserialize_password<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let password = Option::<String>::deserialize(deserializer)?;
    if password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
        return Err(D::Error::custom(format!("`password` is at most {PASSWORD_BYTES_MAX} bytes")));
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

/// An error of serde_json for its reader, who has one line and does not want to hear of it.
fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line 1 column ") {
        Some((what, column)) => format!("{what} (at byte {column})"),
        None => text,
    }
}

/// As much of a client's text as an answer repeats.
fn truncated(text: &str) -> &str {
    text.char_indices().nth(64).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, code: ErrorCode) -> ErrorFrame {
        let error_frame = *ClientFrame::from_text(text).expect_err("refused");
        assert_eq!(error_frame.code, code, "{error_frame:?}");
        error_frame
    }

    #[test]
    fn a_message_has_defaults_and_keeps_its_content_as_written() {
        let text = r#"{"type":"message","room":"r","content":{"a": 1.0},"ref":7,"more":[]}"#;
        let request = ClientFrame::from_text(text).unwrap();
        assert_eq!(request.reference, Some(FrameRef::number(7)));
        let FrameBody::Message(message) = request.body else { panic!("{:?}", request.body) };
        assert!(message.echo && message.id.is_none() && message.kind == MessageKind::Text);
        let RawContent::Json(content) = message.content else { panic!("binary") };
        assert_eq!(content.get(), r#"{"a": 1.0}"#);
    }

    #[test]
    fn null_is_a_content_too() {
        let text = r#"{"type":"message","room":"r","content":null}"#;
        let FrameBody::Message(message) = ClientFrame::from_text(text).unwrap().body else {
            panic!()
        };
        assert!(matches!(message.content, RawContent::Json(content) if content.get() == "null"));
    }

    #[test]
    fn a_refusal_names_what_could_be_read() {
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let text = format!(r#"{{"type":"message","room":"r","id":"{id}","ref":"x"}}"#);
        let error_frame = refused(&text, ErrorCode::BadRequest);
        assert_eq!(error_frame.reference.unwrap().as_json(), r#""x""#);
        assert_eq!(error_frame.frame_type.as_deref(), Some("message"));
        assert_eq!(error_frame.room.unwrap().as_str(), "r");
        assert_eq!(error_frame.id.unwrap().to_string(), id);
        assert!(error_frame.message.contains("content"), "{}", error_frame.message);
    }

    #[test]
    fn bad_frames_are_told_apart() {
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
            refused(text, ErrorCode::BadRequest);
        }
        refused(r#"{"type":"nonsense"}"#, ErrorCode::UnknownType);
        refused(r#"{"type":"join","room":"a b"}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"join","room":"r","history":1001}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"history","room":"r","limit":0}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"history","room":"r","limit":201}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"history","room":"r","before":1,"after":1}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"pong","ref":1.5}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"ping","timestamp":{}}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"message","room":"r","content":1,"meta":[]}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"message","room":"r","content":1,"kind":"x"}"#, ErrorCode::BadRequest);
        refused(
            r#"{"type":"message","room":"r","content":1,"kind":"system"}"#,
            ErrorCode::BadRequest,
        );
    }

    #[test]
    fn what_is_for_one_user_is_checked() {
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
            refused(text, ErrorCode::BadRequest);
        }
        let users = vec!["bob"; WATCH_USERS_MAX + 1];
        let watch = serde_json::json!({"type": "watch", "users": users}).to_string();
        refused(&watch, ErrorCode::BadRequest);
        let data = "y".repeat(SESSION_BYTES_MAX);
        let set = serde_json::json!({"type": "session_set", "data": {"x": data}}).to_string();
        refused(&set, ErrorCode::TooLarge);
    }

    #[test]
    fn content_that_would_break_receivers_is_refused() {
        let deep = format!("{}{}", "[".repeat(101), "]".repeat(101));
        for content in [r#""\ud800""#, "1e999", &deep] {
            let text = format!(r#"{{"type":"message","room":"r","content":{content}}}"#);
            refused(&text, ErrorCode::BadRequest);
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
        refused(&text, ErrorCode::TooLarge);
    }

    #[test]
    fn a_room_is_created_with_what_its_limits_allow() {
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
        refused(&with(r#""max_members":0"#), ErrorCode::BadRequest);
        refused(&with(r#""max_members":-1"#), ErrorCode::BadRequest);
        refused(&with(r#""password":"""#), ErrorCode::BadRequest);
        refused(&with(r#""name":"a\u0007""#), ErrorCode::BadRequest);
        refused(&with(r#""meta":[]"#), ErrorCode::BadRequest);
        refused(&with(&format!(r#""name":"{}""#, "n".repeat(65))), ErrorCode::TooLarge);
        refused(&with(&format!(r#""password":"{}""#, "p".repeat(1025))), ErrorCode::TooLarge);
        let meta = format!(r#""meta":{{"x":"{}"}}"#, "y".repeat(META_BYTES_MAX));
        refused(&with(&meta), ErrorCode::TooLarge);
    }

    #[test]
    fn what_is_said_about_people_is_checked() {
        refused(r#"{"type":"typing","room":"r"}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"read","room":"r","seq":-1}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"read","room":"r"}"#, ErrorCode::BadRequest);
        refused(r#"{"type":"presence","limit":201}"#, ErrorCode::BadRequest);
        let long = "x".repeat(129);
        refused(&format!(r#"{{"type":"presence","cursor":"{long}"}}"#), ErrorCode::BadRequest);
        refused(&format!(r#"{{"type":"rooms","prefix":"{long}"}}"#), ErrorCode::BadRequest);
        let long = "x".repeat(PASSWORD_BYTES_MAX + 1);
        let join = format!(r#"{{"type":"join","room":"r","password":"{long}"}}"#);
        refused(&join, ErrorCode::BadRequest);
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
        let request = ClientFrame::from_binary(&frame).unwrap();
        let FrameBody::Message(message) = request.body else { panic!("{:?}", request.body) };
        assert!(matches!(message.content, RawContent::Binary([0, 255])));
        for bad in [&frame[..1], &frame[..9], b"\0\0", b"\0\x02{}", b"\xFF\xFFx"] {
            assert!(ClientFrame::from_binary(bad).is_err());
        }
    }
}
