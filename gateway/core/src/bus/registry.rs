//! The registry: who is in which room on which node, how rooms are managed, and how far each user
//! has read. What of it changes is passed to the nodes that follow the room, as a [`EphemeralEvent`].
//!
//! A [`PresenceStore`] is told by each node how many connections a user has in a room *there*, as a
//! number and not as a step, so that telling it again changes nothing. A user is present while any
//! node has one. What is passed on is best effort: changes of who is present are numbered
//! ([`PresenceVersion`]), so that a follower finds out that it missed one and reads all of it.
//!
//! Two implementations, as of the [bus](super): in memory and in Redis.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::envelope::Envelope;
use skein_protocol::{
    ids::{ConnectionId, DisplayName, RoomId, SessionId, UserId},
    position::Seq,
    protocol::server_frame::{RoomClosedReason, UserInfo},
};

use super::{AppendCallback, BoxFuture, BusError};

/// Where users are counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PresenceScope {
    /// A room.
    Room(RoomId),
    /// The cluster: whoever is connected.
    Cluster,
}

/// Milliseconds since 1970, by the clock of who wrote it.
pub type UnixMillis = u64;

/// A user as one node has it at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePresence {
    /// Where.
    pub scope: PresenceScope,
    /// Who.
    pub user: UserInfo,
    /// How many connections the user has there on this node; 0 has the user leave.
    pub connections: u32,
    /// Since when.
    pub since: UnixMillis,
    /// When the user did something last.
    pub active: UnixMillis,
    /// Whether the user was let in. Until then telling this makes nobody present who is not.
    pub admitted: bool,
}

/// What a join has to keep to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JoinConditions {
    /// The hash that the password was found to fit. The room's is compared with it, so that a room
    /// that was made anew meanwhile is not entered with the old password.
    pub password_hash: Option<String>,
    /// Whether a room that is not there is made.
    pub create: bool,
    /// Whether that is within the user's quota, and nobody is refused by it whose room is there.
    pub within_quota: bool,
}

/// Tells one state of who is present from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PresenceVersion {
    /// Begins anew, by chance, where a place was empty or its state was lost.
    pub epoch: u64,
    /// Counts changes.
    pub number: u64,
}

/// What who enters is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JoinSnapshot {
    /// The state with this user in it.
    pub version: PresenceVersion,
    /// How many users are present.
    pub count: u64,
    /// How far the user has read.
    pub read: Seq,
    /// The [`ordinal`](crate::delivery::ordinal) of the epoch that the room's last deletion began: one
    /// that is deleted after that is another room.
    pub deleted: u64,
    /// Whether the room has come to be by this.
    pub created: bool,
}

/// Why a user does not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// The room has another password, or one was given too few.
    #[error("the room has another password")]
    WrongPassword,
    /// As many users are there as may be.
    #[error("the room has as many members as it may have")]
    Full,
    /// There is no such room, and none is made by being joined.
    #[error("there is no such room")]
    NotFound,
    /// The room would come to be by this, and the user's quota of such rooms is used up.
    #[error("too many rooms have come to be in too short a time")]
    Quota,
    /// The registry did not do it.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// A user who is present, as a listing has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserPresence {
    /// Who.
    pub user: UserInfo,
    /// Over how many connections, on all nodes.
    pub connections: u64,
    /// Since when.
    pub since: UnixMillis,
    /// When the user did something last.
    pub active: UnixMillis,
    /// How far the user has read.
    pub read: Seq,
}

/// Who is present, at one moment.
#[derive(Clone, Debug, Default)]
pub struct PresenceSnapshot {
    /// Which state.
    pub version: PresenceVersion,
    /// All of them.
    pub users: Vec<UserInfo>,
    /// Whether every node has told who it has. Until then somebody may be missing who is there.
    pub complete: bool,
}

/// Some who are present.
#[derive(Clone, Debug, Default)]
pub struct PresenceDetails {
    /// Which state.
    pub version: PresenceVersion,
    /// Those asked for that are there.
    pub users: Vec<UserPresence>,
}

/// Who is connected to any node.
#[derive(Clone, Debug, Default)]
pub struct OnlinePage {
    /// A page, by id.
    pub users: Vec<UserPresence>,
    /// How many there are in all.
    pub count: u64,
    /// Whether more follow.
    pub more: bool,
}

/// A change of who is present.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresenceChange {
    /// The state after it.
    pub version: PresenceVersion,
    /// Who is present now and was not.
    pub joined: Vec<UserInfo>,
    /// Who was and is not.
    pub left: Vec<UserId>,
}

/// Whether a user is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnlineStatus {
    /// To any node.
    pub online: bool,
    /// When the user did something last, where that is known.
    pub active: Option<UnixMillis>,
    /// Whether every node has told who it has. Until then somebody may be online who seems not to be.
    pub complete: bool,
}

/// What is passed on in a room beside entries of its log; at most once.
#[derive(Clone, Debug)]
pub enum EphemeralEvent {
    /// Somebody came or left.
    Presence(PresenceChange),
    /// Somebody types, or has stopped.
    Typing {
        /// Who.
        user: UserId,
        /// Whether.
        is_typing: bool,
    },
    /// Somebody has read on.
    Read {
        /// Who.
        user: UserId,
        /// Up to where.
        seq: Seq,
        /// The connection that said so.
        by: ConnectionId,
    },
    /// A connection has taken a session over, and the one before is to end. In an inbox.
    Replaced {
        /// The session.
        session: SessionId,
        /// The connection that has it now.
        by: ConnectionId,
    },
    /// Whether the user is connected has changed. In the user's status.
    Status,
    /// The log was emptied, and begins anew. In an inbox.
    Emptied,
    /// A message of a room without a log.
    Message(Envelope),
    /// The room is no more.
    Closed {
        /// Why.
        reason: RoomClosedReason,
        /// The connection that asked for it, which is told by an answer.
        by: Option<ConnectionId>,
    },
}

/// How a room is managed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomConfig {
    /// What people read.
    pub name: DisplayName,
    /// Who made it.
    pub owner: UserId,
    /// Whether it is listed.
    pub public: bool,
    /// The hash of its password (PHC string).
    pub password: Option<String>,
    /// The most users.
    pub max_members: Option<u32>,
    /// When it was made.
    pub created: UnixMillis,
    /// A JSON object.
    pub meta: String,
}

/// A room that is there: it is managed, or somebody is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomSummary {
    /// The room.
    pub room: RoomId,
    /// How it is managed, if it is.
    pub config: Option<RoomConfig>,
    /// How many users are present.
    pub members: u64,
    /// When somebody came, where it was empty.
    pub since: UnixMillis,
}

/// A page of rooms.
#[derive(Clone, Debug, Default)]
pub struct RoomPage {
    /// By id.
    pub rooms: Vec<RoomSummary>,
    /// Behind which name to go on, where more may follow.
    pub next: Option<String>,
}

/// What became of the making of a managed room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    /// It is there now.
    Created,
    /// It was there, with members or a log.
    Exists,
    /// Its owner has as many as may be.
    QuotaExceeded,
}

/// What became of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// The room and its log are no more.
    Deleted,
    /// Somebody else made it, or nobody.
    NotOwner,
    /// There is none.
    NotFound,
}

/// This moment, as the registry writes it.
pub fn unix_millis_now() -> UnixMillis {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    since_1970.unwrap_or_default().as_millis() as UnixMillis
}

/// How long what the registry has is kept.
#[derive(Clone, Debug)]
pub struct RoomStoreOptions {
    /// How long a managed room stays that nobody is in.
    pub empty_ttl: Duration,
}

impl Default for RoomStoreOptions {
    fn default() -> Self {
        Self { empty_ttl: Duration::from_secs(24 * 60 * 60) }
    }
}

/// Where it is known who is where. See the module.
pub trait PresenceStore: Send + Sync {
    /// Tells how many connections a user has at a place on this node, without waiting.
    fn track(&self, seat: NodePresence);

    /// As [`PresenceStore::track`], for who enters: `rules` are checked in the same step, and nothing is
    /// changed where they are not kept to. Without rules nothing is checked.
    fn admit(
        &self,
        seat: NodePresence,
        rules: Option<JoinConditions>,
    ) -> BoxFuture<Result<JoinSnapshot, AdmitError>>;

    /// Who is present in each of some rooms, in their order.
    fn snapshots(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<PresenceSnapshot>, BusError>>;

    /// What is known of some who are present in a room.
    fn details(
        &self,
        room: RoomId,
        users: Vec<UserId>,
    ) -> BoxFuture<Result<PresenceDetails, BusError>>;

    /// Who is connected to any node: at most `limit` whose ids follow `after`. `None` where this node is
    /// the only one, and knows best itself.
    fn online(
        &self,
        after: String,
        limit: usize,
    ) -> BoxFuture<Result<Option<OnlinePage>, BusError>>;

    /// Whether users are connected to any node; of a single node, when they were, since it knows best
    /// itself whether they are.
    fn statuses(&self, users: Vec<UserId>) -> BoxFuture<Result<Vec<OnlineStatus>, BusError>>;

    /// Notes how far a user has read, and passes it on where that is further than before.
    fn set_read_mark(&self, room: RoomId, user: UserId, seq: Seq, by: ConnectionId);

    /// Passes something on, without keeping it. The answer goes to `done`, with no position.
    fn publish_ephemeral(&self, room: RoomId, notice: EphemeralEvent, done: AppendCallback);

    /// Makes a room managed, unless its owner has `owned_max` managed rooms.
    fn create(
        &self,
        room: RoomId,
        record: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>>;

    /// What is known of a room; `None` where nobody is in it and nobody manages it.
    fn find(&self, room: RoomId) -> BoxFuture<Result<Option<RoomSummary>, BusError>>;

    /// At most `limit` rooms whose ids begin with `prefix` and follow `after`; private ones only where
    /// `all` says so.
    fn list(
        &self,
        prefix: String,
        after: String,
        limit: usize,
        all: bool,
    ) -> BoxFuture<Result<RoomPage, BusError>>;

    /// Deletes a room with its log, has its members leave, and passes that on; by its owner, or
    /// with `None` by the server.
    fn delete_room(
        &self,
        room: RoomId,
        owner: Option<UserId>,
        by: Option<ConnectionId>,
    ) -> BoxFuture<Result<DeleteOutcome, BusError>>;
}
