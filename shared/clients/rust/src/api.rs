//! The types of the client's API: options, results, errors and events.
//!
//! Pure. All that an application matches on is here.

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

/// Maximum number of rooms that a client can be in. The server's limit is lower.
pub const ROOMS_MAX: usize = 10_000;
/// Maximum number of `history` requests without a reply.
pub const HISTORY_REQUESTS_MAX: usize = 256;

/// Options of a client. The defaults are those of the protocol.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Whether to reconnect after a connection has ended.
    pub reconnect: bool,
    /// Upper bound of the first reconnect delay.
    pub backoff_base: Duration,
    /// Upper bound of every reconnect delay.
    pub backoff_cap: Duration,
    /// URLs to connect to, tried in order, always beginning with the first; if empty,
    /// `ConnectOptions::url`. The back-off grows after each round over all URLs.
    pub urls: Vec<String>,
    /// Maximum number of events that the application has not taken. When it is reached, the client
    /// stops reading from the connection.
    pub event_queue_max: usize,
    /// Maximum number of sends without a reply, in all rooms together.
    pub pending_sends_max: usize,
    /// Maximum number of bytes of these sends.
    pub pending_bytes_max: u32,
    /// Maximum number of sends in flight to one room.
    ///
    /// With 1 the log has the messages in the order of the calls. With more, sends are faster over
    /// a long round trip, but a message with a temporary error can be overtaken by later ones.
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

/// Where to begin in a room that is joined for the first time. After that, the client continues
/// from its own position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartFrom {
    /// With the next entry.
    Now,
    /// After a position that the application stored.
    Since(Position),
    /// With this many of the newest entries, at most 1,000.
    History(u32),
}

/// Result of a join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinInfo {
    /// The room.
    pub room: RoomId,
    /// Its newest entry at the time of the join.
    pub top: Position,
    /// Whether no entry since the client's position is lost.
    pub recovered: bool,
    /// The reason if an entry is lost.
    pub reason: Option<RecoveryFailure>,
    /// Whether older entries exist than those sent.
    pub more: bool,
    /// Whether the room keeps a log.
    pub durable: bool,
}

/// A message to send.
#[derive(Clone, Debug)]
pub struct MessageDraft {
    /// The idempotency key. Store it to send the message again after [`SendError::Uncertain`].
    pub id: MessageId,
    /// The content.
    pub content: MessageContent,
    /// The kind of message.
    pub kind: MessageKind,
    /// The message that this one replies to.
    pub reply_to: Option<MessageId>,
    /// Metadata of the application, a JSON object.
    pub meta: Option<Value>,
    /// Whether this client receives a copy, as a [`ClientEvent::Message`]. Without one, a copy can
    /// still arrive when the client catches up after an interruption.
    pub echo: bool,
}

/// The content of a message.
#[derive(Clone, Debug)]
pub enum MessageContent {
    /// Any JSON.
    Json(Value),
    /// Bytes.
    Binary(Bytes),
}

impl MessageDraft {
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

/// A sent message: its place in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendReceipt {
    /// The message id.
    pub id: MessageId,
    /// The position in the log.
    pub position: Position,
    /// Whether the server had appended the id before: an earlier attempt was successful.
    pub duplicate: bool,
}

/// Why a message was not acknowledged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SendError {
    /// The server rejected the message, and retrying does not help.
    #[error("rejected: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// The message was sent, but its acknowledgement was lost, and the deduplication window has
    /// passed, or the room was left, or the client ended. It may be in the log; sent again with the
    /// same id, it may be there twice.
    #[error("the acknowledgement was lost; the message may be in the log")]
    Uncertain,
    /// The limits of unacknowledged messages or bytes are reached.
    #[error("too many unacknowledged messages")]
    QueueFull,
    /// The message is larger than the server accepts.
    #[error("the message is larger than the server accepts")]
    TooLarge,
    /// The client has not joined the room.
    #[error("the room is not joined")]
    NotJoined,
    /// A message with this id is in flight to the room.
    #[error("a message with this id is in flight")]
    IdInUse,
    /// The client has ended; the message was not sent.
    #[error("the client has ended")]
    ClientClosed,
}

/// Why a room was not joined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum JoinError {
    /// The server rejected the `join`, and retrying does not help.
    #[error("rejected: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// Another `join` or `leave` of the room has no reply yet.
    #[error("another join or leave of the room is in progress")]
    InProgress,
    /// The application left the room before the join was complete.
    #[error("the room was left before it was joined")]
    Left,
    /// The client is in [`ROOMS_MAX`] rooms.
    #[error("the client is in the maximum number of rooms")]
    TooManyRooms,
    /// The client has ended.
    #[error("the client has ended")]
    ClientClosed,
}

/// Why a room was not left.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LeaveError {
    /// The server rejected the `leave`.
    #[error("rejected: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// Another `leave` of the room has no reply yet.
    #[error("another leave of the room is in progress")]
    InProgress,
    /// The client has ended, and has left all rooms.
    #[error("the client has ended")]
    ClientClosed,
}

/// The page of a room's log to request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryRange {
    /// The newest entries.
    Newest,
    /// The newest entries below this number.
    Before(Seq),
    /// The oldest entries above this number.
    After(Seq),
}

/// A page of a room's log.
#[derive(Clone, Debug)]
pub struct RoomHistoryPage {
    /// The epoch of the log.
    pub epoch: Epoch,
    /// Entries, oldest first.
    pub messages: Vec<MessageFrame>,
    /// Whether more entries exist in the requested direction.
    pub more: bool,
}

/// Why a page of history was not returned. Retrying is safe.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum HistoryError {
    /// The server rejected the request.
    #[error("rejected: {} {}", .0.code.as_str(), .0.message)]
    Rejected(Box<ErrorFrame>),
    /// The room is not joined on a connection, or the connection ended before the reply.
    #[error("the room is not joined on a connection")]
    NotJoined,
    /// The maximum number of requests without a reply is reached.
    #[error("too many history requests without a reply")]
    TooManyPending,
    /// The client has ended.
    #[error("the client has ended")]
    ClientClosed,
}

/// An event of a client. Events of one room are in the order of its log.
#[derive(Debug)]
pub enum ClientEvent {
    /// A connection is open.
    Connected {
        /// The id of the connection.
        connection_id: ConnectionId,
        /// The id of the gateway.
        node: NodeId,
        /// The user that the gateway authenticated.
        user: UserInfo,
        /// The value to send as `?node=` to return to this gateway.
        route: String,
    },
    /// A room was joined, for the first time or after a reconnect. Its entries follow.
    Joined(JoinInfo),
    /// An entry of a room's log. Each is delivered once and in order.
    Message {
        /// The frame. `replay` marks an entry from the log.
        message: Box<MessageFrame>,
        /// The content of a binary message, from a binary frame or from base64 in JSON.
        payload: Option<Bytes>,
    },
    /// An entry of the inbox from another user or another device of this user. Each is delivered
    /// once and in order, and acknowledged by the client.
    Direct {
        /// The frame. `replay` marks an entry from the log.
        direct: Box<DirectFrame>,
        /// The content of a binary frame.
        payload: Option<Bytes>,
    },
    /// An entry of the inbox from the application. The client acknowledges one with `require_ack`,
    /// and the entries after it, only after [`Client::mark_seen`](super::Client::mark_seen).
    Notification(Box<NotificationFrame>),
    /// An entry was dropped because it had been delivered before.
    Duplicate {
        /// The room.
        room: RoomId,
        /// The id of the entry.
        id: MessageId,
        /// The position of the entry.
        position: Position,
        /// The position at which the same id was delivered, which happens after a reset. `None`:
        /// the position itself had been passed, which is a bug in the server.
        earlier: Option<Position>,
    },
    /// Entries are missing, which is a bug in the server.
    Gap {
        /// The room.
        room: RoomId,
        /// The next expected position; `None` if the room was not joined, so that no entry was
        /// expected.
        expected: Option<Position>,
        /// The position that was received.
        got: Position,
    },
    /// The entries since the client's position are lost; the current entries follow.
    NotRecovered {
        /// The room.
        room: RoomId,
        /// The reason.
        reason: RecoveryFailure,
    },
    /// Continuity was lost on an open connection. The room continues at `seq` + 1.
    Reset(ResetFrame),
    /// The client left a room without a call of the application: it was removed, the room was
    /// closed, or joining it again was rejected.
    Left {
        /// The room.
        room: RoomId,
        /// The reason as the server wrote it.
        reason: Option<String>,
    },
    /// An `error` that replies to no pending call.
    Error(Box<ErrorFrame>),
    /// State of the bus: whether deliveries can be late.
    Status(StatusFrame),
    /// A frame that the client forwards as JSON text: presence, `typing`, `read`, frames about
    /// rooms, and unknown types.
    OtherFrame(String),
    /// A message that is not a frame of the protocol: a bug in the client or in the server.
    InvalidMessage(String),
    /// A connection has ended.
    Disconnected {
        /// The close code; `None` without a close frame.
        code: Option<u16>,
        /// The reason of the close frame, or the error.
        reason: String,
        /// Delay until the next attempt; `None` if there is none before a new token is set.
        retry_in: Option<Duration>,
    },
    /// An attempt to connect failed.
    ConnectFailed {
        /// The URL.
        url: String,
        /// The error.
        error: ConnectError,
        /// Delay until the next attempt; `None` if there is none.
        retry_in: Option<Duration>,
    },
    /// The client has ended. No event follows.
    Ended(ClientEndReason),
}

/// Why a client ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientEndReason {
    /// The application closed it or dropped every handle.
    Closed,
    /// The server closed the connection with a code after which a client must not reconnect.
    ClosedByServer {
        /// The close code.
        code: u16,
        /// The reason of the close frame.
        reason: String,
    },
    /// The server rejected the handshake with an HTTP status after which a client must not retry.
    HandshakeRejected {
        /// The HTTP status.
        status: u16,
    },
    /// The connection ended or could not be opened, and `ClientOptions::reconnect` is off.
    ReconnectDisabled,
    /// No connection is possible with these options: the URL or a header is invalid.
    InvalidOptions,
}
