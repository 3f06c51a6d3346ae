//! Rooms: the settings of managed rooms, and listings of all rooms.
//!
//! There are two implementations, as of the [bus](super): in memory, and in Redis (`skein-redis`).

use std::time::Duration;

use skein_protocol::ids::{ConnectionId, DisplayName, RoomId, UserId};

use super::{BoxFuture, BusError, presence_store::UnixMillis};

/// The settings of a managed room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomConfig {
    /// The display name.
    pub name: DisplayName,
    /// The user that created it.
    pub owner: UserId,
    /// Whether listings show it.
    pub public: bool,
    /// The hash of its password (PHC string).
    pub password: Option<String>,
    /// Its capacity.
    pub max_members: Option<u32>,
    /// When it was created.
    pub created: UnixMillis,
    /// Metadata of the application, a JSON object.
    pub meta: String,
}

/// An existing room: it is managed, or has members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomSummary {
    /// The room.
    pub room: RoomId,
    /// Its settings, if it is managed.
    pub config: Option<RoomConfig>,
    /// How many users are present.
    pub members: u64,
    /// When the first of the present members joined.
    pub since: UnixMillis,
}

/// A page of rooms.
#[derive(Clone, Debug, Default)]
pub struct RoomPage {
    /// The rooms, by id.
    pub rooms: Vec<RoomSummary>,
    /// The id after which the next page begins, if more may follow.
    pub next: Option<String>,
}

/// The result of creating a managed room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOutcome {
    /// The room was created.
    Created,
    /// The room existed, with members or a log.
    Exists,
    /// The owner has the most rooms already.
    QuotaExceeded,
}

/// The result of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeleteOutcome {
    /// The room and its log were deleted.
    Deleted,
    /// Another user owns the room, or it has no owner.
    NotOwner,
    /// The room does not exist.
    NotFound,
}

/// Options of the room store.
#[derive(Clone, Debug)]
pub struct RoomStoreOptions {
    /// How long a managed room without members is kept.
    pub empty_ttl: Duration,
}

impl Default for RoomStoreOptions {
    fn default() -> Self {
        Self { empty_ttl: Duration::from_secs(24 * 60 * 60) }
    }
}

/// Stores the settings of managed rooms, and lists rooms.
pub trait RoomStore: Send + Sync {
    /// Creates a managed room, unless its owner has `owned_max` of them already.
    fn create(
        &self,
        room: RoomId,
        config: RoomConfig,
        owned_max: Option<usize>,
    ) -> BoxFuture<Result<CreateOutcome, BusError>>;

    /// The summary of a room; `None` if it has no members and is not managed.
    fn find(&self, room: RoomId) -> BoxFuture<Result<Option<RoomSummary>, BusError>>;

    /// At most `limit` rooms whose ids begin with `prefix` and follow `after`; private rooms only
    /// with `all`.
    fn list(
        &self,
        prefix: String,
        after: String,
        limit: usize,
        all: bool,
    ) -> BoxFuture<Result<RoomPage, BusError>>;

    /// Deletes a room with its log, removes its members, and publishes that. Only the `owner` may
    /// delete the room; `None` is the server.
    fn delete_room(
        &self,
        room: RoomId,
        owner: Option<UserId>,
        by: Option<ConnectionId>,
    ) -> BoxFuture<Result<DeleteOutcome, BusError>>;
}
