//! The labels of metrics: closed enums, so that the code bounds the cardinality.

use skein_protocol::{error::ErrorCode, protocol::client_frame::FrameBody};

/// Result of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeResult {
    /// The connection is open: 101, or 200 for an event stream.
    Accepted,
    /// The request is no valid handshake: 4xx.
    Invalid,
    /// The origin of the page is not allowed: 403.
    OriginDenied,
    /// The address is above a limit: 429.
    RateLimited,
    /// The node is full, draining, or without its bus: 503.
    Unavailable,
}

/// Cause for which a handshake opened no connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeRefusal {
    /// The request is no valid handshake: 4xx.
    Invalid,
    /// The origin of the page is not allowed: 403.
    Origin,
    /// The address makes too many handshakes: 429.
    HandshakeRate,
    /// The address has too many connections: 429.
    ConnectionsPerIp,
    /// The node takes no more handshakes at once: 503.
    AcceptRate,
    /// The node has the maximum of connections: 503.
    Full,
    /// The node drains: 503.
    Draining,
    /// The node has no bus: 503.
    Bus,
    /// The node is not ready for another reason: 503.
    NotReady,
    /// The client has no valid token: 401, or 1008.
    Unauthenticated,
    /// The user has too many connections: 429, or 1008.
    ConnectionsPerUser,
}

impl From<HandshakeRefusal> for HandshakeResult {
    fn from(cause: HandshakeRefusal) -> Self {
        match cause {
            HandshakeRefusal::Invalid | HandshakeRefusal::Unauthenticated => Self::Invalid,
            HandshakeRefusal::Origin => Self::OriginDenied,
            HandshakeRefusal::HandshakeRate
            | HandshakeRefusal::ConnectionsPerIp
            | HandshakeRefusal::ConnectionsPerUser => Self::RateLimited,
            HandshakeRefusal::AcceptRate
            | HandshakeRefusal::Full
            | HandshakeRefusal::Draining
            | HandshakeRefusal::Bus
            | HandshakeRefusal::NotReady => Self::Unavailable,
        }
    }
}

/// Transport of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A WebSocket.
    WebSocket,
    /// An event stream.
    EventStream,
}

/// Side that ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseSide {
    /// The client sent the first close frame.
    Client,
    /// The gateway closed it.
    Gateway,
    /// It ended without a close.
    Network,
}

/// Kind of a message that logs keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// `message` of a room.
    Message,
    /// `direct` of an inbox.
    Direct,
    /// `notification` of an inbox.
    Notification,
}

/// Result of a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JoinResult {
    /// The client named no position.
    New,
    /// The client continues from its position.
    Resumed,
    /// The client cannot continue from its position.
    NotResumed,
}

/// Side whose fault an `error` frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorFault {
    /// The frame was wrong, not allowed, or above a limit.
    Client,
    /// The gateway or its bus could not execute a correct frame.
    Server,
}

impl ErrorFault {
    /// Returns the side whose fault an error is.
    pub fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::Internal => Self::Server,
            _ => Self::Client,
        }
    }
}

/// Type of a client's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrameKind {
    /// `message`
    Message,
    /// `direct`
    Direct,
    /// `join`
    Join,
    /// `leave`
    Leave,
    /// `typing`
    Typing,
    /// `read`
    Read,
    /// `ack`
    Ack,
    /// `history`
    History,
    /// `presence`
    Presence,
    /// `watch`
    Watch,
    /// `unwatch`
    Unwatch,
    /// `create_room`
    CreateRoom,
    /// `delete_room`
    DeleteRoom,
    /// `room_info`
    RoomInfo,
    /// `rooms`
    Rooms,
    /// `session_get`
    SessionGet,
    /// `session_set`
    SessionSet,
    /// `refresh`
    Refresh,
    /// `ping`
    Ping,
    /// `pong`
    Pong,
    /// A frame that is not valid.
    Invalid,
}

impl FrameKind {
    /// Returns the type of a frame.
    pub fn of(body: &FrameBody<'_>) -> Self {
        match body {
            FrameBody::Message(message) if message.to.room().is_some() => Self::Message,
            FrameBody::Message(_) => Self::Direct,
            FrameBody::Join(_) => Self::Join,
            FrameBody::Leave(_) => Self::Leave,
            FrameBody::Typing(_) => Self::Typing,
            FrameBody::Read(_) => Self::Read,
            FrameBody::Ack(_) => Self::Ack,
            FrameBody::History(_) => Self::History,
            FrameBody::Presence(_) => Self::Presence,
            FrameBody::Watch(_) => Self::Watch,
            FrameBody::Unwatch(_) => Self::Unwatch,
            FrameBody::CreateRoom(_) => Self::CreateRoom,
            FrameBody::DeleteRoom(_) => Self::DeleteRoom,
            FrameBody::RoomInfo(_) => Self::RoomInfo,
            FrameBody::Rooms(_) => Self::Rooms,
            FrameBody::SessionGet => Self::SessionGet,
            FrameBody::SessionSet(_) => Self::SessionSet,
            FrameBody::Refresh(_) => Self::Refresh,
            FrameBody::Ping(_) => Self::Ping,
            FrameBody::Pong => Self::Pong,
        }
    }
}

/// Close codes and reasons of the gateway, besides those of rooms that a path names, which are error
/// codes.
pub(super) const CLOSES: [(u16, &str); 17] = [
    (1002, "protocol_error"),
    (1007, "bad_deflate"),
    (1007, "bad_utf8"),
    (1008, "kicked"),
    (1008, "rate_limited"),
    (1008, "token_expired"),
    (1008, "token_invalid"),
    (1008, "token_missing"),
    (1008, "too_many_connections"),
    (1008, "user_invalid"),
    (1009, "too_large"),
    (1011, "internal"),
    (1012, "draining"),
    (1012, "rebalance"),
    (1013, "overloaded"),
    (1013, "rate_limited"),
    (1013, "unavailable"),
];

/// The label of the reason of a close frame: `none` if it is empty, `other` if it is a text of the
/// application.
pub(super) fn close_reason(reason: &str) -> &'static str {
    if reason.is_empty() {
        return "none";
    }
    let codes = ErrorCode::ALL.into_iter().map(ErrorCode::as_str);
    let reasons = CLOSES.into_iter().map(|(_, reason)| reason);
    reasons.chain(codes).find(|known| *known == reason).unwrap_or("other")
}

/// Reason for dropping a TCP connection before it became a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The address has too many connections.
    PerIpLimit,
    /// The client did not read a response for too long.
    WriteTimeout,
    /// The header of a request did not arrive in time.
    HeaderTimeout,
    /// The listener was full, and this connection was the oldest pending one.
    Evicted,
}

/// Budget that a connection has used up, so that it is read more slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThrottleReason {
    /// Control frames, small fragments and rejected frames of the connection.
    Overhead,
    /// Control frames, small fragments and rejected frames of all connections of the address.
    PerIpOverhead,
    /// Bytes of the connection.
    Bytes,
}

/// Result of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PublishResult {
    /// Appended to the log.
    Appended,
    /// The log already has a message with this id.
    Duplicate,
    /// The bus was unavailable for longer than the publish may wait.
    Unavailable,
    /// The queue to the bus was full.
    Overloaded,
    /// The bus rejected the message.
    Failed,
    /// A storage limit was reached: see `gateway_storage_rejections_total`.
    LimitReached,
}

/// Outcome of a publish, as its sender sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PublishOutcome {
    /// Appended, now or before.
    Acknowledged,
    /// A limit was reached: the bus is healthy.
    Rejected,
    /// The bus was unavailable or overloaded, or answered with an error.
    Failed,
}

impl From<PublishResult> for PublishOutcome {
    fn from(result: PublishResult) -> Self {
        match result {
            PublishResult::Appended | PublishResult::Duplicate => Self::Acknowledged,
            PublishResult::LimitReached => Self::Rejected,
            PublishResult::Unavailable | PublishResult::Overloaded | PublishResult::Failed => {
                Self::Failed
            }
        }
    }
}

/// Reason for which `/ready` answers 503.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnreadyReason {
    /// The node cannot publish or receive, or does not hold its lease.
    Bus,
    /// The node drains.
    Drain,
    /// A part of the node has failed.
    Task,
    /// Redis evicts keys when its memory is full.
    MaxmemoryPolicy,
    /// Redis denies a permission.
    RedisPermission,
    /// Redis is too old.
    RedisVersion,
}

/// A way in which Redis persists its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Persistence {
    /// The append-only file.
    Aof,
    /// Snapshots.
    Rdb,
}

/// Decision of the hub on a log entry that it received from the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryResult {
    /// Delivered to the members of this node.
    Delivered,
    /// Received before.
    Duplicate,
    /// Entries before this one are missing.
    Gap,
    /// The log has begun a new epoch.
    EpochChanged,
    /// This node is not subscribed to the log.
    NotSubscribed,
    /// The node has lost its lease: delivery is suspended until the cluster agrees again.
    NoLease,
}

/// Result of reading a log because entries had not been received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogRepairResult {
    /// The log had all missing entries.
    Complete,
    /// The log no longer had all of them: members got a `reset`.
    Reset,
    /// The log could not be read; the read is repeated.
    Failed,
    /// Two histories shared sequence numbers; the log was compared with the entries of this node.
    Reconciled,
}

/// Source of the missed entries that a resuming client received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResumeSource {
    /// The newest entries in the memory of this node.
    Ring,
    /// The log on the bus.
    Log,
}

/// Result of copying an entry to the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArchiveResult {
    /// The archive has the entry.
    Copied,
    /// The archive rejected the entry, which it will not have.
    Rejected,
    /// No gateway wrote the entry.
    Invalid,
}

/// Result of comparing a log with a Redis server that may have lost entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestoreResult {
    /// The server had all entries.
    Unchanged,
    /// The server got the entries that it lacked.
    Restored,
    /// The log on the server has moved to another epoch.
    EpochChanged,
    /// Two histories share sequence numbers: the log continues in a new epoch.
    Conflict,
    /// The server answered with a permanent error.
    Failed,
}

/// Storage limit that a request would have exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageLimit {
    /// Bytes that a user or an address may store per minute.
    Bytes,
    /// Rooms that a user or an address may create per minute.
    NewRooms,
    /// Managed rooms of one owner.
    ManagedRooms,
    /// Inboxes of users who never connected that a user may open per hour.
    UnseenInboxes,
    /// Bytes of the inbox of a user who never connected.
    UnseenBytes,
    /// Data of all sessions of a user.
    SessionData,
    /// Users whose read marks a room keeps.
    ReadMarks,
    /// The memory of a Redis server is above the watermark.
    Memory,
}

/// Result of checking the password of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PasswordResult {
    /// The password is correct.
    Correct,
    /// The password is wrong.
    Wrong,
    /// Not checked: there were too many wrong ones, or too many checks are waiting.
    RateLimited,
}

/// Reason for rejecting a server API request because of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApiRejection {
    /// The request has no key: 401.
    MissingKey,
    /// The key is unknown: 401.
    WrongKey,
    /// The gateway has no API keys: 403.
    Disabled,
    /// The address made too many such requests: 429.
    RateLimited,
}

/// Kind of a value read from Redis that no gateway wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InvalidValue {
    /// A field of the barrier at which the nodes agree on a server.
    Barrier,
    /// An entry of a log.
    Entry,
    /// The position of a message id within the dedup window.
    DedupId,
    /// A lease, or the name of an incarnation.
    Lease,
    /// The read mark of a user.
    ReadMark,
    /// A message in a pub/sub channel of the gateways.
    PubsubMessage,
    /// A field of the metadata of a log.
    LogMeta,
    /// A control command, or the commands that a node has applied.
    Command,
    /// A presence entry, or a user or room name in an index.
    Presence,
    /// The settings of a managed room.
    RoomConfig,
    /// A session, or its data.
    Session,
    /// A key whose type is not the one that the gateway gives it.
    KeyType,
    /// An unconfirmed publish that a node restored.
    Unconfirmed,
    /// The announcement of a node.
    Announcement,
}

/// Fate of a completed span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SpanResult {
    /// The collector has accepted it.
    Exported,
    /// The queue to the collector was full.
    Dropped,
    /// The collector refused it, or did not answer in time.
    Failed,
}

macro_rules! labels {
    ($enum:ident: $($variant:ident $label:literal),+) => {
        impl Label for $enum {
            const ALL: &'static [Self] = &[$(Self::$variant),+];
            fn text(self) -> &'static str {
                match self { $(Self::$variant => $label),+ }
            }
        }
    };
}

/// A closed set of values of one label.
pub trait Label: Copy + Eq + std::hash::Hash + 'static {
    /// Every value.
    const ALL: &'static [Self];
    /// Returns the value as it is exported.
    fn text(self) -> &'static str;
}

labels!(HandshakeResult: Accepted "accepted", Invalid "invalid", OriginDenied "origin_denied",
    RateLimited "rate_limited", Unavailable "unavailable");
labels!(HandshakeRefusal: Invalid "invalid", Origin "origin", HandshakeRate "handshake_rate",
    ConnectionsPerIp "connections_per_ip", AcceptRate "accept_rate", Full "full",
    Draining "draining", Bus "bus", NotReady "not_ready", Unauthenticated "unauthenticated",
    ConnectionsPerUser "connections_per_user");
labels!(Transport: WebSocket "websocket", EventStream "sse");
labels!(CloseSide: Client "client", Gateway "gateway", Network "network");
labels!(ArchiveResult: Copied "copied", Rejected "rejected", Invalid "invalid");
labels!(EntryKind: Message "message", Direct "direct", Notification "notification");
labels!(JoinResult: New "new", Resumed "resumed", NotResumed "not_resumed");
labels!(ErrorFault: Client "client", Server "server");
labels!(FrameKind: Message "message", Direct "direct", Join "join", Leave "leave",
    Typing "typing", Read "read", Ack "ack", History "history", Presence "presence",
    Watch "watch", Unwatch "unwatch", CreateRoom "create_room", DeleteRoom "delete_room",
    RoomInfo "room_info", Rooms "rooms", SessionGet "session_get", SessionSet "session_set",
    Refresh "refresh", Ping "ping", Pong "pong", Invalid "invalid");
labels!(DropReason: PerIpLimit "per_ip_limit", WriteTimeout "write_timeout",
    HeaderTimeout "header_timeout", Evicted "evicted");
labels!(ThrottleReason: Overhead "overhead", PerIpOverhead "per_ip_overhead", Bytes "bytes");
labels!(PublishResult: Appended "appended", Duplicate "duplicate", Unavailable "unavailable",
    Overloaded "overloaded", Failed "failed", LimitReached "limit_reached");
labels!(PublishOutcome: Acknowledged "acknowledged", Rejected "rejected", Failed "failed");
labels!(UnreadyReason: Bus "bus", Drain "drain", Task "task", MaxmemoryPolicy "maxmemory_policy",
    RedisPermission "redis_permission", RedisVersion "redis_version");
labels!(Persistence: Aof "aof", Rdb "rdb");
labels!(EntryResult: Delivered "delivered", Duplicate "duplicate", Gap "gap",
    EpochChanged "epoch_changed", NotSubscribed "not_subscribed", NoLease "no_lease");
labels!(StorageLimit: Bytes "bytes", NewRooms "new_rooms", ManagedRooms "managed_rooms",
    UnseenInboxes "unseen_inboxes", UnseenBytes "unseen_bytes", SessionData "session_data",
    ReadMarks "read_marks", Memory "memory");
labels!(LogRepairResult: Complete "complete", Reset "reset", Failed "failed",
    Reconciled "reconciled");
labels!(PasswordResult: Correct "correct", Wrong "wrong", RateLimited "rate_limited");
labels!(ApiRejection: MissingKey "missing_key", WrongKey "wrong_key", Disabled "disabled",
    RateLimited "rate_limited");
labels!(ResumeSource: Ring "ring", Log "log");
labels!(RestoreResult: Unchanged "unchanged", Restored "restored", EpochChanged "epoch_changed",
    Conflict "conflict", Failed "failed");
labels!(InvalidValue: Barrier "barrier", Entry "entry", DedupId "dedup_id", Lease "lease",
    ReadMark "read_mark", PubsubMessage "pubsub_message", LogMeta "log_meta", Command "command",
    Presence "presence", RoomConfig "room_config", Session "session", KeyType "key_type",
    Unconfirmed "unconfirmed", Announcement "announcement");
labels!(SpanResult: Exported "exported", Dropped "dropped", Failed "failed");

impl Label for bool {
    const ALL: &'static [Self] = &[false, true];
    fn text(self) -> &'static str {
        if self { "true" } else { "false" }
    }
}

impl Label for ErrorCode {
    const ALL: &'static [Self] = &Self::ALL;
    fn text(self) -> &'static str {
        self.as_str()
    }
}
