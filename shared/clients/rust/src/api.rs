//! What an application asks of a [`Client`](super::Client) and what it is told: settings, answers,
//! errors, events.
//!
//! Pure. Everything an application matches on stands here.

use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;

use super::{backoff, options::ConnectError};
use skein_protocol::{
    ids::{ConnectionId, MessageId, NodeId, RoomId},
    position::{Epoch, Position, Seq},
    protocol::{
        MessageKind,
        server_frame::{
            DirectFrame, ErrorFrame, MessageFrame, NotificationFrame, RecoveryFailure, ResetFrame,
            StatusFrame, UserInfo,
        },
    },
};

/// How many rooms a client may be in. The server's limit is lower.
pub const ROOMS_MAX: usize = 10_000;
/// How many questions for history may be without an answer.
pub const HISTORY_REQUESTS_MAX: usize = 256;

/// How a client behaves. The default is what the protocol says of clients.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Whether to come back after a connection has ended.
    pub reconnect: bool,
    /// The longest first delay before coming back.
    pub backoff_base: Duration,
    /// The longest delay of all.
    pub backoff_cap: Duration,
    /// Where to connect, tried in turn, the first one first each time; empty for `Options::url`.
    /// A whole round is made before the back-off grows.
    pub urls: Vec<String>,
    /// How many events may wait for the application. Beyond, the client waits, and reads no more.
    pub event_queue_max: usize,
    /// How many sends may be without an answer, all rooms together.
    pub pending_sends_max: usize,
    /// How many bytes they may hold together.
    pub pending_bytes_max: u32,
    /// How many sends to one room may be on their way at a time.
    ///
    /// With 1 the log has them in the order of the calls, whatever happens. With more they are
    /// faster where the way is long, and one that is refused for the time being may be overtaken by
    /// those behind it.
    pub in_flight_max: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            reconnect: true,
            backoff_base: backoff::BASE,
            backoff_cap: backoff::CAP,
            urls: Vec::new(),
            event_queue_max: 1024,
            pending_sends_max: 1024,
            pending_bytes_max: 16 * 1024 * 1024,
            in_flight_max: 1,
        }
    }
}

/// Where to begin in a room that is joined for the first time. Later on, the client continues by
/// itself from what it had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartFrom {
    /// With what comes from now on.
    Now,
    /// With what follows a position that the application kept.
    Since(Position),
    /// With so many of the newest entries, at most 1,000.
    History(u32),
}

/// A room that was joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinInfo {
    /// The room.
    pub room: RoomId,
    /// Its newest entry when it was joined.
    pub top: Position,
    /// Whether everything since the last entry had is there or follows.
    pub recovered: bool,
    /// Why not, where a position was given.
    pub reason: Option<RecoveryFailure>,
    /// Whether there is older history than what was given.
    pub more: bool,
    /// Whether the room keeps a log.
    pub durable: bool,
}

/// A message to send.
#[derive(Clone, Debug)]
pub struct NewMessage {
    /// The key under which a repeat is recognised. Kept by those who want to repeat what was
    /// [`SendError::Uncertain`].
    pub id: MessageId,
    /// The content.
    pub content: MessageContent,
    /// What it is.
    pub kind: MessageKind,
    /// The message it answers.
    pub reply_to: Option<MessageId>,
    /// More about it, a JSON object.
    pub meta: Option<Value>,
    /// Whether this client gets a copy, as an [`ClientEvent::MessageFrame`]. Without one, a copy may come
    /// nevertheless when the client catches up after an interruption.
    pub echo: bool,
}

/// What a message holds.
#[derive(Clone, Debug)]
pub enum MessageContent {
    /// Any JSON.
    Json(Value),
    /// Bytes.
    Binary(Bytes),
}

impl NewMessage {
    /// A text message with a new id.
    pub fn json(content: impl Into<Value>) -> Self {
        Self::of(MessageContent::Json(content.into()))
    }

    /// A binary message with a new id.
    pub fn binary(payload: impl Into<Bytes>) -> Self {
        Self::of(MessageContent::Binary(payload.into()))
    }

    fn of(content: MessageContent) -> Self {
        Self {
            id: MessageId::random(),
            content,
            kind: MessageKind::Text,
            reply_to: None,
            meta: None,
            echo: true,
        }
    }
}

/// A message that is in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendReceipt {
    /// Its id.
    pub id: MessageId,
    /// Where it stands.
    pub position: Position,
    /// Whether the server knew the id when it was asked to append: a repeat met the first try.
    pub duplicate: bool,
}

/// Why a message was not sent.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SendError {
    /// The server refused it for good.
    #[error("refused: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// It was sent, its answer was lost, and the time in which the server knows a repeat for what
    /// it is has passed, or the room was left, or the client ended. It may be in the log. Sent
    /// again, with the same id, it may be there twice.
    #[error("the answer was lost, the message may have been sent")]
    Uncertain,
    /// As many messages as there may be, or as many bytes, have no answer yet.
    #[error("too many messages have no answer yet")]
    QueueFull,
    /// The message is larger than the server takes.
    #[error("the message is larger than the server takes")]
    TooLarge,
    /// The client takes no part in the room.
    #[error("the room is not joined")]
    NotJoined,
    /// A message with this id is on its way to the room.
    #[error("a message with this id is on its way already")]
    IdInUse,
    /// The client has ended; the message was never sent.
    #[error("the client has ended")]
    ClientClosed,
}

/// Why a room was not joined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum JoinError {
    /// The server refused it for good.
    #[error("refused: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// Another `join` or `leave` of the room has no answer yet.
    #[error("another join or leave of the room is under way")]
    InProgress,
    /// The room was left before it was joined.
    #[error("the room was left before it was joined")]
    Left,
    /// The client is in [`ROOMS_MAX`] rooms.
    #[error("the client is in as many rooms as it may be")]
    TooManyRooms,
    /// The client has ended.
    #[error("the client has ended")]
    ClientClosed,
}

/// Why a room was not left.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LeaveError {
    /// The server refused it.
    #[error("refused: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// Another `leave` of the room has no answer yet.
    #[error("another leave of the room is under way")]
    InProgress,
    /// The client has ended, and with it is in no room.
    #[error("the client has ended")]
    ClientClosed,
}

/// Which page of a room's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryRange {
    /// The newest entries.
    Newest,
    /// The newest below this one.
    Before(Seq),
    /// The oldest above this one.
    After(Seq),
}

/// A page of a room's log.
#[derive(Clone, Debug)]
pub struct HistoryPage {
    /// The epoch of the log.
    pub epoch: Epoch,
    /// Entries, oldest first.
    pub messages: Vec<MessageFrame>,
    /// Whether more are there in the direction asked for.
    pub more: bool,
}

/// Why there is no page of history. Asking again is safe.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HistoryError {
    /// The server refused it.
    #[error("refused: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// There is no connection, or it ended before the answer, or the room is not joined on it yet.
    #[error("the room is not joined at present")]
    NotJoined,
    /// As many questions as there may be have no answer yet.
    #[error("too many questions have no answer yet")]
    TooManyPending,
    /// The client has ended.
    #[error("the client has ended")]
    ClientClosed,
}

/// What happens to a client. Per room in the order of the log.
#[derive(Debug)]
pub enum ClientEvent {
    /// A connection is there.
    Connected {
        /// The connection.
        connection_id: ConnectionId,
        /// The gateway.
        node: NodeId,
        /// Who the gateway takes the client for.
        user: UserInfo,
        /// What is sent as `?node=` to come back to this gateway.
        route: String,
    },
    /// A room was joined, for the first time or after a reconnect. Its entries follow.
    Joined(JoinInfo),
    /// An entry of a room's log, each once and in order.
    Message {
        /// The frame. `replay` tells that it comes from the log.
        message: Box<MessageFrame>,
        /// The content of a binary message, whether it came as a binary frame or inside JSON.
        payload: Option<Bytes>,
    },
    /// An entry of the inbox from another user, or from another device of this one; each once and in
    /// order. It is acknowledged by itself.
    Direct {
        /// The frame. `replay` tells that it comes from the log.
        direct: Box<DirectFrame>,
        /// The content of a binary one that came as a binary frame.
        payload: Option<Bytes>,
    },
    /// An entry of the inbox from the application. One with `require_ack` is acknowledged by
    /// [`Client::seen`](super::Client::seen), and what follows it with it.
    Notification(Box<NotificationFrame>),
    /// An entry came again and was dropped.
    Duplicate {
        /// The room.
        room: RoomId,
        /// The entry's id.
        id: MessageId,
        /// Where it came.
        position: Position,
        /// Where the same id was delivered, which happens after a reset. `None`: this number was
        /// had already, which is a fault of the server's.
        earlier: Option<Position>,
    },
    /// Entries never came: a fault of the server's.
    Gap {
        /// The room.
        room: RoomId,
        /// What should have come; `None` where nothing should have, the room not being joined.
        expected: Option<Position>,
        /// What came.
        got: Position,
    },
    /// What came since the last entry had cannot be had; what is there now follows.
    NotRecovered {
        /// The room.
        room: RoomId,
        /// Why.
        reason: RecoveryFailure,
    },
    /// Continuity was lost while connected. The room goes on at `seq` + 1.
    Reset(ResetFrame),
    /// The client takes no part in a room any more without having asked for it: it was removed, the
    /// room was closed, or joining it again was refused.
    Left {
        /// The room.
        room: RoomId,
        /// Why, in the server's word.
        reason: Option<String>,
    },
    /// An `error` that answers nothing the application waits for.
    Error(Box<ErrorFrame>),
    /// Whether the gateway can prove that nothing is missing.
    Status(StatusFrame),
    /// A frame that this client passes on as it came: presence, `typing`, `read`, what is told of
    /// rooms, and what it does not know.
    OtherFrame(String),
    /// A message that is no frame of the protocol: a fault of this client's or of the server's.
    InvalidMessage(String),
    /// A connection has ended.
    Disconnected {
        /// The close code; `None` without a close frame.
        code: Option<u16>,
        /// The reason given, or what went wrong.
        reason: String,
        /// When the next attempt is made; `None` where none is, until there is a new token.
        retry_in: Option<Duration>,
    },
    /// An attempt to connect failed.
    ConnectFailed {
        /// Where.
        url: String,
        /// Why.
        error: ConnectError,
        /// When the next attempt is made; `None` where none is.
        retry_in: Option<Duration>,
    },
    /// The client has ended. Nothing follows.
    Ended(ClientEndReason),
}

/// Why a client ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEndReason {
    /// The application closed it or dropped every handle.
    Closed,
    /// The server closed the connection with a code after which a client stays away.
    ClosedByServer {
        /// The close code.
        code: u16,
        /// The reason given.
        reason: String,
    },
    /// The server answered the handshake with an HTTP status after which a client stays away.
    HandshakeRejected {
        /// The HTTP status.
        status: u16,
    },
    /// The connection ended or could not be opened, and `ClientOptions::reconnect` is off.
    ReconnectDisabled,
    /// The options cannot lead to a connection: a bad URL or header.
    InvalidOptions,
}
