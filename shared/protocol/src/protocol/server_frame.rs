//! Server frames: the `type` and fields of every frame that a gateway sends (docs/protocol.md).
//!
//! `E` is the type of an entry of `history`. The gateway uses ready JSON text
//! ([`serde_json::value::RawValue`]); a client uses [`HistoryEntry`].

use serde::{Deserialize, Serialize};

use super::{FrameRef, MessageKind};
use crate::{
    error::ErrorCode,
    ids::{ConnectionId, DisplayName, MessageId, NodeId, RoomId, SessionId, UserId},
    position::{Epoch, Seq},
};

/// A frame from the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame<E = HistoryEntry> {
    /// The first frame of a connection.
    Connected(Box<ConnectedFrame>),
    /// The connection has joined a room.
    Joined(Box<JoinedFrame<E>>),
    /// An entry of a room's log.
    Message(Box<MessageFrame>),
    /// An entry of the inbox from another user or from another device of this user.
    Direct(Box<DirectFrame>),
    /// An entry of the inbox from the application.
    Notification(Box<NotificationFrame>),
    /// A payload of the application for every connection.
    Broadcast(Box<BroadcastFrame>),
    /// A message was appended.
    Ack(Box<AckFrame>),
    /// The connection has left a room.
    Left(LeftFrame),
    /// A user has joined the room.
    MemberJoined(Box<MemberChangeFrame>),
    /// A user has left the room.
    MemberLeft(Box<MemberChangeFrame>),
    /// Joins and leaves of a large room, coalesced.
    PresenceDiff(Box<PresenceDiffFrame>),
    /// A page of the users in a room or in the cluster.
    Presence(Box<PresencePageFrame>),
    /// Online state of one user.
    UserStatus(UserStatusFrame),
    /// Typing state of one user.
    Typing(TypingFrame),
    /// Read mark of one user.
    Read(ReadFrame),
    /// Settings and state of a room.
    RoomInfo(Box<RoomInfoFrame>),
    /// A page of the public rooms.
    Rooms(RoomsPageFrame),
    /// The room was deleted.
    RoomClosed(RoomClosedFrame),
    /// The data of the session.
    Session(SessionFrame),
    /// The new token was accepted.
    Refreshed(RefreshedFrame),
    /// A page of a room's log or of directs with a user.
    History(Box<HistoryPageFrame<E>>),
    /// A heartbeat as JSON, for clients that connected with `?ping=json`.
    Ping(ServerPingFrame),
    /// The reply to a `ping`.
    Pong(PongFrame),
    /// Continuity of a room or of the inbox was lost.
    Reset(ResetFrame),
    /// State of the bus: whether deliveries can be late.
    Status(StatusFrame),
    /// Asks the client to reconnect, possibly to another node; close 1012 follows.
    Reconnect(ReconnectFrame),
    /// A client frame was rejected.
    Error(Box<ErrorFrame>),
    /// A type unknown to this version.
    #[serde(other)]
    Unknown,
}

impl<E> ServerFrame<E> {
    /// The `ref` of the client frame that this frame replies to.
    pub fn reference(&self) -> Option<&FrameRef> {
        match self {
            Self::Joined(joined) => joined.reference.as_ref(),
            Self::Ack(ack) => ack.reference.as_ref(),
            Self::Left(left) => left.reference.as_ref(),
            Self::History(history) => history.reference.as_ref(),
            Self::Presence(presence) => presence.reference.as_ref(),
            Self::RoomInfo(info) => info.reference.as_ref(),
            Self::Rooms(rooms) => rooms.reference.as_ref(),
            Self::RoomClosed(closed) => closed.reference.as_ref(),
            Self::UserStatus(status) => status.reference.as_ref(),
            Self::Session(session) => session.reference.as_ref(),
            Self::Refreshed(refreshed) => refreshed.reference.as_ref(),
            Self::Pong(pong) => pong.reference.as_ref(),
            Self::Error(error_frame) => error_frame.reference.as_ref(),
            Self::Connected(_)
            | Self::Message(_)
            | Self::Direct(_)
            | Self::Notification(_)
            | Self::Broadcast(_)
            | Self::MemberJoined(_)
            | Self::MemberLeft(_)
            | Self::PresenceDiff(_)
            | Self::Typing(_)
            | Self::Read(_)
            | Self::Reset(_)
            | Self::Status(_)
            | Self::Reconnect(_)
            | Self::Ping(_)
            | Self::Unknown => None,
        }
    }
}

/// An entry of `history` as a client parses it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HistoryEntry {
    /// An entry of a room's log.
    Message(Box<MessageFrame>),
    /// An entry of an inbox.
    Direct(Box<DirectFrame>),
    /// A type unknown to this version.
    #[serde(other)]
    Unknown,
}

/// A user: id and display name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserInfo {
    /// The user id.
    pub id: UserId,
    /// The display name.
    pub name: DisplayName,
}

/// `connected`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectedFrame {
    /// The id of this connection.
    pub connection_id: ConnectionId,
    /// The user that the gateway authenticated.
    pub user: UserInfo,
    /// The resume token of the session; a secret.
    pub session: String,
    /// The public id of the session.
    pub session_id: SessionId,
    /// Whether the session existed before.
    pub resumed: bool,
    /// The id of the gateway.
    pub node: NodeId,
    /// The routing hint: sent back as `?node=`, it leads to the same gateway.
    pub route: String,
    /// `chat.v1`
    pub protocol: String,
    /// The server's clock, RFC 3339.
    pub timestamp: String,
    /// Expiry of the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// Interval of the gateway's pings, in seconds.
    pub heartbeat_interval: u64,
    /// How long a message id is recognised as a duplicate, in seconds.
    pub dedup_window: u64,
    /// The largest message that the gateway accepts, in bytes.
    pub max_message_size: usize,
    /// State of the user's inbox.
    pub inbox: InboxState,
    /// Rate limits of this connection. Gateways before November 2026 omit them.
    #[serde(default)]
    pub limits: ConnectionLimits,
}

/// Rate limits of a connection, so that a client can pace itself. 0 means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLimits {
    /// `message` and `direct` frames per second.
    pub messages_per_second: u32,
    /// Burst of `message` and `direct` frames.
    pub messages_burst: u32,
    /// Other frames per second.
    pub frames_per_second: u32,
    /// Burst of other frames.
    pub frames_burst: u32,
    /// Bytes per second; above it the gateway reads more slowly.
    pub bytes_per_second: u64,
}

/// State of a user's inbox in `connected`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboxState {
    /// The epoch of the inbox.
    pub epoch: Epoch,
    /// The newest entry, 0 for none.
    pub seq: Seq,
    /// The acknowledged position. If it is below `oldest` − 1, entries expired unread.
    pub acked: Seq,
    /// The oldest retained entry; `seq` + 1 if there is none.
    pub oldest: Seq,
    /// Number of entries above `acked` from other users.
    pub unread: u64,
}

/// `joined`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinedFrame<E> {
    /// The `ref` of the `join`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// The epoch of its log.
    pub epoch: Epoch,
    /// The newest entry; after a repeated `join` the last one sent to this connection.
    pub seq: Seq,
    /// Number of users in the room.
    #[serde(default)]
    pub members: u64,
    /// Whether the log continues from `since`.
    pub recovered: bool,
    /// The reason if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<RecoveryFailure>,
    /// Entries, oldest first.
    pub history: Vec<E>,
    /// Whether older entries exist.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// The read mark of this user.
    #[serde(default)]
    pub read: Seq,
    /// Whether the room keeps a log.
    pub durable: bool,
}

/// Why a log cannot be continued from a client's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryFailure {
    /// The entries after the position are past retention.
    LogTrimmed,
    /// The log has another epoch.
    LogLost,
    /// The position is above the newest entry.
    Ahead,
}

/// `message`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MessageFrame {
    /// The room.
    pub room: RoomId,
    /// The epoch that `seq` counts in; [`Epoch::none`] in a room without a log.
    #[serde(default = "Epoch::none", skip_serializing_if = "Epoch::is_none")]
    pub epoch: Epoch,
    /// The number of the entry, 0 in a room without a log.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq: Seq,
    /// The id of the message.
    pub id: MessageId,
    /// The sender.
    pub from: UserInfo,
    /// The kind of message.
    pub kind: MessageKind,
    /// The content; absent in the header of a binary frame.
    #[serde(default)]
    pub content: serde_json::Value,
    /// `base64` where `content` is a binary payload inside JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// The message that this one replies to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<MessageId>,
    /// Metadata of the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<serde_json::Value>,
    /// When the gateway accepted the message.
    pub timestamp: String,
    /// Whether the entry comes from the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
}

/// `direct`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DirectFrame {
    /// The epoch that `seq` counts in.
    pub epoch: Epoch,
    /// The number of the entry in the recipient's inbox.
    pub seq: Seq,
    /// The id of the message.
    pub id: MessageId,
    /// The sender.
    pub from: UserInfo,
    /// The recipient.
    pub to: UserId,
    /// The kind of message.
    pub kind: MessageKind,
    /// The content; absent in the header of a binary frame.
    #[serde(default)]
    pub content: serde_json::Value,
    /// `base64` where `content` is a binary payload inside JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// The message that this one replies to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<MessageId>,
    /// Metadata of the application.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<serde_json::Value>,
    /// When the gateway accepted the message.
    pub timestamp: String,
    /// Whether the entry comes from the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
}

/// `notification`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NotificationFrame {
    /// The epoch that `seq` counts in.
    pub epoch: Epoch,
    /// The number of the entry in the inbox.
    pub seq: Seq,
    /// The id of the notification.
    pub id: MessageId,
    /// The payload of the application.
    pub payload: serde_json::Value,
    /// Whether a person has to acknowledge it: a client acknowledges the inbox by itself, but never
    /// past such an entry.
    pub require_ack: bool,
    /// When the gateway accepted it.
    pub timestamp: String,
    /// Whether the entry comes from the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
}

/// `broadcast`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BroadcastFrame {
    /// The id of the broadcast.
    pub id: MessageId,
    /// The payload of the application.
    pub payload: serde_json::Value,
    /// When the gateway accepted it.
    pub timestamp: String,
}

/// `ack`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AckFrame {
    /// The `ref` of the message.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The id of the message.
    pub id: MessageId,
    /// The room of a `message`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The recipient of a `direct`; `seq` then counts in the sender's inbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<UserId>,
    /// The epoch that `seq` counts in; [`Epoch::none`] in a room without a log.
    #[serde(default = "Epoch::none", skip_serializing_if = "Epoch::is_none")]
    pub epoch: Epoch,
    /// The number of the entry, 0 in a room without a log.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq: Seq,
    /// When the gateway accepted the message.
    pub timestamp: String,
    /// Whether the id was a duplicate, so that nothing was appended.
    pub duplicate: bool,
}

/// `left`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeftFrame {
    /// The `ref` of the `leave`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// The reason, if the client did not request to leave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<LeftReason>,
}

/// Why the server removed a connection from a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftReason {
    /// The application removed the user.
    Kicked,
    /// The token no longer allows the room.
    Forbidden,
}

/// `member_joined` and `member_left`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberChangeFrame {
    /// The room.
    pub room: RoomId,
    /// The user.
    pub user: UserId,
    /// The display name.
    pub name: DisplayName,
    /// Number of users in the room after the change.
    pub count: u64,
    /// The server's clock.
    pub timestamp: String,
}

/// `presence_diff`: joins and leaves since the previous one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceDiffFrame {
    /// The room.
    pub room: RoomId,
    /// Users who joined.
    pub joined: Vec<UserId>,
    /// Users who left.
    pub left: Vec<UserId>,
    /// Number of users in the room after the change.
    pub count: u64,
}

/// `presence`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresencePageFrame {
    /// The `ref` of the `presence` frame.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room; the whole cluster if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// A page of users, by id.
    pub users: Vec<PresenceUser>,
    /// Number of users in total.
    pub count: u64,
    /// The cursor of the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// A user in a page of `presence`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceUser {
    /// The user.
    pub id: UserId,
    /// The display name.
    pub name: DisplayName,
    /// Number of connections of the user.
    pub connections: u64,
    /// When the first of them joined or connected.
    pub since: String,
    /// When the user was last active.
    pub last_active: String,
    /// The read mark of the user; only in a room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<Seq>,
}

/// `user_status`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserStatusFrame {
    /// The `ref` of the `watch`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The user.
    pub user: UserId,
    /// Whether the user is online on any node.
    pub status: OnlineState,
    /// When the user was last active, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active: Option<String>,
}

/// Whether a user has a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnlineState {
    /// At least one connection.
    Online,
    /// No connection.
    Offline,
}

/// `session`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionFrame {
    /// The `ref` of the `session_get` or `session_set`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The data of the session.
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// `refreshed`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshedFrame {
    /// The `ref` of the `refresh`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// Expiry of the new token.
    pub expires_at: String,
}

/// `typing`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypingFrame {
    /// The room.
    pub room: RoomId,
    /// The user.
    pub user: UserId,
    /// Whether the user types.
    pub is_typing: bool,
}

/// `read`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFrame {
    /// The room.
    pub room: RoomId,
    /// The user.
    pub user: UserId,
    /// The newest entry that the user has read.
    pub seq: Seq,
}

/// `room_info`, and an entry of `rooms`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomInfoFrame {
    /// The `ref` of the `room_info` or `create_room`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// The display name.
    pub name: DisplayName,
    /// The creator; absent for a room that was created by a `join`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<UserId>,
    /// Whether `rooms` lists it.
    pub public: bool,
    /// Whether it has a password.
    pub protected: bool,
    /// The maximum number of users in the room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_members: Option<u32>,
    /// Number of users in the room.
    pub members: u64,
    /// Whether it keeps a log.
    pub durable: bool,
    /// When the room was created or first joined.
    pub created_at: String,
    /// Metadata of the application.
    pub meta: serde_json::Map<String, serde_json::Value>,
}

/// `rooms`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomsPageFrame {
    /// The `ref` of the `rooms` frame.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// A page of rooms, by id.
    pub rooms: Vec<RoomInfoFrame>,
    /// The cursor of the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// `room_closed`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomClosedFrame {
    /// The `ref` of the `delete_room`, for the connection that sent it.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// The reason.
    pub reason: RoomClosedReason,
}

/// Why a room no longer exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoomClosedReason {
    /// It was deleted.
    Deleted,
}

/// `history`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HistoryPageFrame<E> {
    /// The `ref` of the `history` frame.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The other user, in place of a room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with: Option<UserId>,
    /// The epoch of its log.
    pub epoch: Epoch,
    /// Entries, oldest first.
    pub messages: Vec<E>,
    /// Whether more entries exist in the requested direction.
    pub more: bool,
}

/// `ping`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerPingFrame {
    /// The server's clock.
    pub timestamp: String,
}

/// `pong`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PongFrame {
    /// The `ref` of the `ping`.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The server's clock.
    pub timestamp: String,
    /// The `timestamp` of the `ping`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_timestamp: Option<serde_json::Value>,
}

/// `reset`: the room stays joined and continues at `seq` + 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetFrame {
    /// The room; the inbox if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The new epoch.
    pub epoch: Epoch,
    /// The position just before the next entry.
    pub seq: Seq,
    /// The reason.
    pub reason: RecoveryFailure,
}

/// `status`: while the bus is down, frames can be late; `up` follows once every room that the
/// gateway subscribes to is proven complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusFrame {
    /// The state of the bus.
    pub bus: BusState,
    /// When this state began, by the gateway's clock.
    pub since: String,
}

/// Whether the gateway reaches the bus and receives everything from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BusState {
    /// It does, and no entry is missing.
    #[default]
    Up,
    /// It does not, or entries it missed are not restored yet.
    Down,
}

/// `reconnect`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReconnectFrame {
    /// Delay before reconnecting, in milliseconds.
    pub after_ms: u64,
    /// The reason.
    pub reason: ReconnectReason,
    /// The value to send as `?node=`; `any` is the least busy node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// Why a gateway asks a client to reconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReconnectReason {
    /// The gateway stops.
    Draining,
    /// The gateway has more than its share of connections.
    Rebalance,
}

/// `error`: why a client frame was rejected.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorFrame {
    /// The `ref` of the rejected frame.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The `type` of the rejected frame.
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub frame_type: Option<String>,
    /// The room of the rejected frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The message id of the rejected frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<MessageId>,
    /// The code that clients act on.
    pub code: ErrorCode,
    /// The fault and its remedy, for a person.
    pub message: String,
    /// When to retry, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl ErrorFrame {
    /// An `error` that names no field of the rejected frame.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Box<Self> {
        Box::new(Self {
            reference: None,
            frame_type: None,
            room: None,
            id: None,
            code,
            message: message.into(),
            retry_after_ms: None,
        })
    }

    /// The same `error` with another code and message.
    pub fn with_code(&self, code: ErrorCode, message: String) -> Box<Self> {
        Box::new(Self { code, message, ..self.clone() })
    }
}

/// Lets serde omit a number that is 0.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(seq: &Seq) -> bool {
    *seq == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_types_are_ignored() {
        let frame: ServerFrame = serde_json::from_str(r#"{"type":"nonsense","room":"r"}"#).unwrap();
        assert!(matches!(frame, ServerFrame::Unknown));
    }

    #[test]
    fn an_error_omits_absent_fields() {
        let error_frame = ErrorFrame::new(ErrorCode::BadRequest, "no");
        let json = serde_json::to_string(&ServerFrame::<()>::Error(error_frame)).unwrap();
        assert_eq!(json, r#"{"type":"error","code":"bad_request","message":"no"}"#);
    }

    #[test]
    fn raw_entries_are_copied_into_joined_unchanged() {
        let raw = serde_json::value::RawValue::from_string(r#"{"type":"message","x": 1}"#.into());
        let joined = ServerFrame::Joined(Box::new(JoinedFrame {
            reference: Some(FrameRef::number(3)),
            room: "r".parse().unwrap(),
            epoch: "e".parse().unwrap(),
            seq: 4,
            members: 2,
            recovered: false,
            reason: None,
            history: vec![raw.unwrap()],
            more: true,
            read: 3,
            durable: true,
        }));
        assert_eq!(
            serde_json::to_string(&joined).unwrap(),
            r#"{"type":"joined","ref":3,"room":"r","epoch":"e","seq":4,"members":2,"recovered":false,"history":[{"type":"message","x": 1}],"more":true,"read":3,"durable":true}"#
        );
    }
}
