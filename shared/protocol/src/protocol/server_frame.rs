//! What the server says, as `type` and fields of section 3.2.
//!
//! `E` is what an entry of `history` is: the gateway has its JSON text ready
//! ([`serde_json::value::RawValue`]), a client reads a [`ServerFrame`].

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
    /// The connection takes part in a room.
    Joined(Box<JoinedFrame<E>>),
    /// An entry of a room's log.
    Message(Box<MessageFrame>),
    /// An entry of the inbox that another user, or another device of this one, has sent.
    Direct(Box<DirectFrame>),
    /// An entry of the inbox from the application.
    Notification(Box<NotificationFrame>),
    /// From the application to every connection there is.
    Broadcast(Box<BroadcastFrame>),
    /// A message was taken.
    Ack(Box<AckFrame>),
    /// The connection no longer takes part in a room.
    Left(LeftFrame),
    /// A user is in the room who was not.
    MemberJoined(Box<MemberChangeFrame>),
    /// A user is no longer in the room.
    MemberLeft(Box<MemberChangeFrame>),
    /// Who came and went in a large room.
    PresenceDiff(Box<PresenceDiffFrame>),
    /// Who is there.
    Presence(Box<PresencePageFrame>),
    /// Whether a user is connected.
    UserStatus(UserStatusFrame),
    /// Whether a user types.
    Typing(TypingFrame),
    /// How far a user has read.
    Read(ReadFrame),
    /// What a room is like.
    RoomInfo(Box<RoomInfoFrame>),
    /// The public rooms.
    Rooms(RoomsPageFrame),
    /// The room was deleted.
    RoomClosed(RoomClosedFrame),
    /// What the session holds.
    Session(SessionFrame),
    /// The token was taken.
    Refreshed(RefreshedFrame),
    /// A page of a room's log.
    History(Box<HistoryPageFrame<E>>),
    /// A question whether the client lives, for clients that asked for it in JSON.
    Ping(ServerPingFrame),
    /// The answer to a `ping`.
    Pong(PongFrame),
    /// Continuity could not be kept.
    Reset(ResetFrame),
    /// Whether the gateway can prove that nothing is missing.
    Status(StatusFrame),
    /// Go to another node; close 1012 follows.
    Reconnect(ReconnectFrame),
    /// A frame was refused.
    Error(Box<ErrorFrame>),
    /// A type this side does not know.
    #[serde(other)]
    Unknown,
}

impl<E> ServerFrame<E> {
    /// The `ref` of the frame that this one answers.
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

/// An entry inside `history`, as a client reads it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HistoryEntry {
    /// An entry of a room's log.
    Message(Box<MessageFrame>),
    /// An entry of an inbox.
    Direct(Box<DirectFrame>),
    /// A type this side does not know.
    #[serde(other)]
    Unknown,
}

/// Who a user is: the id, and what people read.
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
    /// This connection.
    pub connection_id: ConnectionId,
    /// Who the gateway takes the client for.
    pub user: UserInfo,
    /// By which the session is resumed; a secret.
    pub session: String,
    /// The session, for everybody.
    pub session_id: SessionId,
    /// Whether the session was there before.
    pub resumed: bool,
    /// The gateway.
    pub node: NodeId,
    /// The sticky hint: sent back as `?node=`, it leads to the same gateway.
    pub route: String,
    /// `chat.v1`
    pub protocol: String,
    /// The server's clock.
    pub timestamp: String,
    /// When the token ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    /// How often the gateway pings, in seconds.
    pub heartbeat_interval: u64,
    /// How long an `id` is recognised, in seconds.
    pub dedup_window: u64,
    /// The largest message taken, in bytes.
    pub max_message_size: usize,
    /// The user's inbox at this moment.
    pub inbox: InboxState,
    /// What this connection may send. Gateways before November 2026 do not say it.
    #[serde(default)]
    pub limits: ConnectionLimits,
}

/// What a connection may send, so that a client paces itself. 0 stands for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLimits {
    /// `message` and `direct` frames per second.
    pub messages_per_second: u32,
    /// How many of them at once.
    pub messages_burst: u32,
    /// Other frames per second.
    pub frames_per_second: u32,
    /// How many of them at once.
    pub frames_burst: u32,
    /// Bytes per second; above it the gateway reads more slowly.
    pub bytes_per_second: u64,
}

/// The inbox of a user, as `connected` has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboxState {
    /// The epoch of its log.
    pub epoch: Epoch,
    /// The newest entry, 0 for none.
    pub seq: Seq,
    /// Up to where it is acknowledged. Below `oldest` − 1 something has expired unread.
    pub acked: Seq,
    /// The oldest entry that is kept; `seq` + 1 where none is.
    pub oldest: Seq,
    /// How many entries above `acked` are from others.
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
    /// The newest entry; after a repeated `join` the last one given to this connection.
    pub seq: Seq,
    /// How many users are in the room.
    #[serde(default)]
    pub members: u64,
    /// Whether the log goes on from `since`.
    pub recovered: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<RecoveryFailure>,
    /// Entries, oldest first.
    pub history: Vec<E>,
    /// Whether older entries are there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// How far this user has read.
    #[serde(default)]
    pub read: Seq,
    /// Whether the room keeps a log.
    pub durable: bool,
}

/// Why a log could not be continued from a client's `since`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecoveryFailure {
    /// What follows `since` is past retention.
    LogTrimmed,
    /// The log has another epoch.
    LogLost,
    /// `since` is above the newest entry.
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
    /// Who sent it.
    pub from: UserInfo,
    /// What it is.
    pub kind: MessageKind,
    /// The content; absent in the header of a binary frame.
    #[serde(default)]
    pub content: serde_json::Value,
    /// `base64` where `content` is a binary payload inside JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// The message it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<MessageId>,
    /// More about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<serde_json::Value>,
    /// When the gateway took it.
    pub timestamp: String,
    /// Whether it comes from the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
}

/// `direct`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DirectFrame {
    /// The epoch that `seq` counts in.
    pub epoch: Epoch,
    /// The number of the entry in the inbox of who gets this.
    pub seq: Seq,
    /// The id of the message.
    pub id: MessageId,
    /// Who sent it.
    pub from: UserInfo,
    /// Who it is for.
    pub to: UserId,
    /// What it is.
    pub kind: MessageKind,
    /// The content; absent in the header of a binary frame.
    #[serde(default)]
    pub content: serde_json::Value,
    /// `base64` where `content` is a binary payload inside JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<String>,
    /// The message it answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<MessageId>,
    /// More about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<serde_json::Value>,
    /// When the gateway took it.
    pub timestamp: String,
    /// Whether it comes from the log.
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
    /// Its id.
    pub id: MessageId,
    /// What it says.
    pub payload: serde_json::Value,
    /// Whether it waits for a person: a client acknowledges the inbox by itself, but never past it.
    pub require_ack: bool,
    /// When the gateway took it.
    pub timestamp: String,
    /// Whether it comes from the log.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay: bool,
}

/// `broadcast`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BroadcastFrame {
    /// Its id.
    pub id: MessageId,
    /// What it says.
    pub payload: serde_json::Value,
    /// When the gateway took it.
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
    /// Who a `direct` is for; `seq` is that of the sender's inbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<UserId>,
    /// The epoch that `seq` counts in; [`Epoch::none`] in a room without a log.
    #[serde(default = "Epoch::none", skip_serializing_if = "Epoch::is_none")]
    pub epoch: Epoch,
    /// The number the message got, 0 in a room without a log.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq: Seq,
    /// When the gateway took it.
    pub timestamp: String,
    /// Whether the id was known, so that nothing was appended.
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
    /// Why, where the client has not asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<LeftReason>,
}

/// Why a connection was taken out of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftReason {
    /// The application removed the user.
    Kicked,
    /// The token does not allow the room any more.
    Forbidden,
}

/// `member_joined` and `member_left`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberChangeFrame {
    /// The room.
    pub room: RoomId,
    /// The user.
    pub user: UserId,
    /// What people read.
    pub name: DisplayName,
    /// How many users are in the room now.
    pub count: u64,
    /// The server's clock.
    pub timestamp: String,
}

/// `presence_diff`: what changed since the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceDiffFrame {
    /// The room.
    pub room: RoomId,
    /// Who is there and was not.
    pub joined: Vec<UserId>,
    /// Who was there and is not.
    pub left: Vec<UserId>,
    /// How many users are in the room now.
    pub count: u64,
}

/// `presence`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresencePageFrame {
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room; without it, the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// A page of who is there, by id.
    pub users: Vec<PresenceUser>,
    /// How many users are there in all.
    pub count: u64,
    /// Asks for the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// A user who is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceUser {
    /// The user.
    pub id: UserId,
    /// What people read.
    pub name: DisplayName,
    /// Over how many connections.
    pub connections: u64,
    /// Since when.
    pub since: String,
    /// When the user did something last.
    pub last_active: String,
    /// How far the user has read; of a room only.
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
    /// Whether the user is connected, to any node.
    pub status: OnlineState,
    /// When the user did something last; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active: Option<String>,
}

/// Whether a user is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnlineState {
    /// By one connection at least.
    Online,
    /// By none.
    Offline,
}

/// `session`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionFrame {
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// What it holds.
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// `refreshed`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshedFrame {
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// When the token ends.
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
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// What people read.
    pub name: DisplayName,
    /// Who made it; nobody, where it came to be by being joined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<UserId>,
    /// Whether `rooms` lists it.
    pub public: bool,
    /// Whether it has a password.
    pub protected: bool,
    /// The most users that may be in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_members: Option<u32>,
    /// How many are.
    pub members: u64,
    /// Whether it keeps a log.
    pub durable: bool,
    /// When it was made, or joined first.
    pub created_at: String,
    /// More about it.
    pub meta: serde_json::Map<String, serde_json::Value>,
}

/// `rooms`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomsPageFrame {
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// A page of them, by id.
    pub rooms: Vec<RoomInfoFrame>,
    /// Asks for the next page, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// `room_closed`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoomClosedFrame {
    /// The `ref` of the `delete_room`, to who asked.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    pub room: RoomId,
    /// Why.
    pub reason: RoomClosedReason,
}

/// Why a room is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoomClosedReason {
    /// It was deleted.
    Deleted,
}

/// `history`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HistoryPageFrame<E> {
    /// The `ref` of the request.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The user, in place of a room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub with: Option<UserId>,
    /// The epoch of its log.
    pub epoch: Epoch,
    /// Entries, oldest first.
    pub messages: Vec<E>,
    /// Whether more are there in the direction asked for.
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

/// `reset`: the room stays joined and goes on at `seq` + 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetFrame {
    /// The room; the inbox where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The epoch from here on.
    pub epoch: Epoch,
    /// The position right before the next frame.
    pub seq: Seq,
    /// Why.
    pub reason: RecoveryFailure,
}

/// `status`: while the bus is down frames may be late; `up` follows when every room that the
/// gateway follows is proven whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusFrame {
    /// Up or down.
    pub bus: BusState,
    /// Since when, by the gateway's clock.
    pub since: String,
}

/// Whether the gateway hears and reaches the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BusState {
    /// It does, and nothing is missing.
    #[default]
    Up,
    /// It does not, or has not made good yet what it missed.
    Down,
}

/// `reconnect`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReconnectFrame {
    /// How long to wait before coming back, in milliseconds.
    pub after_ms: u64,
    /// Why.
    pub reason: ReconnectReason,
    /// What to send as `?node=`; `any` is the least busy node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// Why a client is asked to come back elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReconnectReason {
    /// The gateway stops.
    Draining,
    /// The gateway has more connections than its share.
    Rebalance,
}

/// `error`: why a frame was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorFrame {
    /// The `ref` of the frame.
    #[serde(default, rename = "ref", skip_serializing_if = "Option::is_none")]
    pub reference: Option<FrameRef>,
    /// The `type` of the frame.
    #[serde(default, rename = "for", skip_serializing_if = "Option::is_none")]
    pub frame_type: Option<String>,
    /// The room it spoke of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<RoomId>,
    /// The message it spoke of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<MessageId>,
    /// The kind of error.
    pub code: ErrorCode,
    /// What was wrong and what to do, for people.
    pub message: String,
    /// When to try again, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl ErrorFrame {
    /// An `error` that names no part of the frame it answers.
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

    /// The same frame refused because of something else.
    pub fn with_code(&self, code: ErrorCode, message: String) -> Box<Self> {
        Box::new(Self { code, message, ..self.clone() })
    }
}

/// For numbers that are left out where there is none.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes fields by reference")]
fn is_zero(seq: &Seq) -> bool {
    *seq == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_ignore_types_they_do_not_know() {
        let frame: ServerFrame = serde_json::from_str(r#"{"type":"nonsense","room":"r"}"#).unwrap();
        assert!(matches!(frame, ServerFrame::Unknown));
    }

    #[test]
    fn an_error_leaves_out_what_it_does_not_know() {
        let error_frame = ErrorFrame::new(ErrorCode::BadRequest, "no");
        let json = serde_json::to_string(&ServerFrame::<()>::Error(error_frame)).unwrap();
        assert_eq!(json, r#"{"type":"error","code":"bad_request","message":"no"}"#);
    }

    #[test]
    fn ready_made_entries_stand_in_joined_as_they_are() {
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
