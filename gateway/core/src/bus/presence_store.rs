//! Presence and rooms: which users are in which rooms, the settings of managed rooms, and read
//! marks. Changes are published to the nodes that are subscribed to the room, as
//! [`EphemeralEvent`]s.
//!
//! Each node reports to the [`PresenceStore`] how many connections a user has in a room *on that
//! node*, as a number and not as a difference, so that a repeated report changes nothing. A user is
//! present while any node reports connections. Events are delivered at most once: changes of
//! presence are numbered ([`PresenceVersion`]), so that a subscriber that misses one detects it and
//! reads the whole presence.
//!
//! There are two implementations, as of the [bus](super): in memory, and in Redis (`skein-redis`).

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::envelope::Envelope;
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::Seq,
    protocol::server_frame::{RoomClosedReason, UserInfo},
};

pub use super::presence_entries::{NodePresence, PresenceScope, UnixMillis};
use super::{BoxFuture, BusError, presence_entries::LocalPresences, ticket::PublishTicket};

/// The conditions of a join.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JoinConditions {
    /// The password hash that the given password matches. It is compared with the room's hash, so
    /// that a room that was recreated meanwhile is not joined with the old password.
    pub password_hash: Option<String>,
    /// Whether the join creates a room that does not exist.
    pub create: bool,
    /// Whether creating the room is within the user's quota. A room that exists is joined
    /// regardless.
    pub within_quota: bool,
}

/// Identifies one state of the presence in a scope.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PresenceVersion {
    /// Chosen at random when the scope was empty or its state was lost.
    pub epoch: u64,
    /// Counts changes.
    pub number: u64,
}

/// The state of a room when a user was admitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JoinSnapshot {
    /// The presence that includes this user.
    pub version: PresenceVersion,
    /// How many users are present.
    pub count: u64,
    /// The user's read mark.
    pub read: Seq,
    /// The [`ordinal`](crate::delivery::ordinal) of the epoch that the room's last deletion began.
    /// A room that is deleted after that is another room.
    pub deleted: u64,
    /// Whether this join has created the room.
    pub created: bool,
}

/// Why a user is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The room has another password, or requires one.
    #[error("wrong room password")]
    WrongPassword,
    /// The room has reached its capacity.
    #[error("the room is full")]
    Full,
    /// The room does not exist, and a join does not create it.
    #[error("the room does not exist")]
    NotFound,
    /// The join would create the room, and the user's quota of such rooms is used up.
    #[error("too many rooms were created in too short a time")]
    Quota,
    /// The store failed.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// A present user, as listings have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserPresence {
    /// The user.
    pub user: UserInfo,
    /// How many connections the user has, on all nodes.
    pub connections: u64,
    /// When the user became present.
    pub since: UnixMillis,
    /// When the user was last active.
    pub active: UnixMillis,
    /// The user's read mark.
    pub read: Seq,
}

/// The users that are present, at one moment.
#[derive(Clone, Debug, Default)]
pub struct PresenceSnapshot {
    /// The version of the presence.
    pub version: PresenceVersion,
    /// All present users.
    pub users: Vec<UserInfo>,
    /// Whether every node has reported its users. Until then present users may be missing.
    pub complete: bool,
}

/// Details of some present users.
#[derive(Clone, Debug, Default)]
pub struct PresenceDetails {
    /// The version of the presence.
    pub version: PresenceVersion,
    /// The requested users that are present.
    pub users: Vec<UserPresence>,
}

/// A page of the users that are connected to any node.
#[derive(Clone, Debug, Default)]
pub struct OnlinePage {
    /// The users, by id.
    pub users: Vec<UserPresence>,
    /// How many are connected in total.
    pub count: u64,
    /// Whether more follow.
    pub more: bool,
}

/// A change of presence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceChange {
    /// The version after the change.
    pub version: PresenceVersion,
    /// Users that have become present.
    pub joined: Vec<UserInfo>,
    /// Users that are no longer present.
    pub left: Vec<UserId>,
}

/// Whether a user is online.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnlineStatus {
    /// Whether the user is connected to any node.
    pub online: bool,
    /// When the user was last active, if known.
    pub active: Option<UnixMillis>,
    /// Whether every node has reported its users. Until then an online user may appear offline.
    pub complete: bool,
}

/// An event of a room that is not kept in a log. Delivered at most once.
#[derive(Clone, Debug)]
pub enum EphemeralEvent {
    /// Users have joined or left.
    Presence(PresenceChange),
    /// A user has started or stopped typing.
    Typing {
        /// The user.
        user: UserId,
        /// Started or stopped.
        is_typing: bool,
    },
    /// A user's read mark has advanced.
    Read {
        /// The user.
        user: UserId,
        /// The new read mark.
        seq: Seq,
        /// The connection that set it.
        by: ConnectionId,
    },
    /// Another connection has taken over a session; the former connection closes. Published to an
    /// inbox.
    Replaced {
        /// The session.
        session: SessionId,
        /// The connection that holds the session now.
        by: ConnectionId,
    },
    /// The user has come online or gone offline. Published to the user's status room.
    Status,
    /// The log was deleted and continues in a new epoch. Published to an inbox.
    LogDeleted,
    /// A message of an ephemeral room.
    Message(Envelope),
    /// The room was closed.
    Closed {
        /// The reason.
        reason: RoomClosedReason,
        /// The connection that requested it, which receives a reply instead.
        by: Option<ConnectionId>,
    },
}

/// The current time, as the store writes it.
pub fn unix_millis_now() -> UnixMillis {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970.unwrap_or_default().as_millis() as UnixMillis
}

/// Stores presence and read marks. The module documents its guarantees.
pub trait PresenceStore: Send + Sync {
    /// The place of this node's entries. A store that writes later reads an entry again then.
    fn entries(&self) -> Arc<LocalPresences> {
        Arc::default()
    }

    /// Reports how many connections a user has in a scope on this node. Does not wait.
    fn track(&self, presence: NodePresence);

    /// Reports a user that joins. The store checks `conditions` in the same step and changes
    /// nothing if one is not met; it checks nothing without conditions.
    fn admit(
        &self,
        presence: NodePresence,
        conditions: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>>;

    /// The presence of each room, in the order of `rooms`.
    fn snapshots(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<PresenceSnapshot>, BusError>>;

    /// Details of those `users` that are present in a room.
    fn details(
        &self,
        room: RoomId,
        users: Vec<UserId>,
    ) -> BoxFuture<Result<PresenceDetails, BusError>>;

    /// Users that are connected to any node: at most `limit` whose ids follow `after`. `None` if
    /// this node is the only one, since it knows its own users best.
    fn online(
        &self,
        after: String,
        limit: usize,
    ) -> BoxFuture<Result<Option<OnlinePage>, BusError>>;

    /// Whether users are online. A single node only returns when they were last active, since it
    /// knows best who is connected to it.
    fn statuses(&self, users: Vec<UserId>) -> BoxFuture<Result<Vec<OnlineStatus>, BusError>>;

    /// Sets a user's read mark, and publishes it if it has advanced.
    fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId);

    /// Publishes an event without keeping it. Completes `ticket` with the result, which has no
    /// position.
    fn publish_ephemeral(&self, room: RoomId, event: EphemeralEvent, ticket: PublishTicket);
}
