//! The archive: history beyond the retention of logs.
//!
//! Entries of logs are copied to the archive after they were appended, and a page of history
//! continues there where the log ends. Nothing waits for the archive but a reader of old pages:
//! joins, resumes and deliveries use logs only.
//!
//! An archive keeps an entry once: a message that was appended again in a later epoch, after a loss
//! of the log, has its later position. Entries are ordered by number, and those of several epochs
//! with one number by the ordinal of the epoch. Numbers of a later epoch are above those of an
//! earlier one, except where a log lost its end while no node held it.

use std::time::SystemTime;

use skein_protocol::{
    ids::{RoomId, UserId},
    position::{Position, Seq},
};

use crate::{
    bus::{BoxFuture, ReadRange},
    envelope::Envelope,
};

/// The most bytes of envelopes that one page holds. A single larger entry is returned nevertheless.
pub use crate::bus::READ_BYTES_MAX as PAGE_BYTES_MAX;

/// A change of a log that the archive follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArchiveRecord {
    /// An entry was appended.
    Entry {
        /// The room, or the inbox of a user.
        room: RoomId,
        /// The position in the log.
        position: Position,
        /// The content.
        envelope: Envelope,
    },
    /// The log was deleted: entries of epochs below this ordinal are removed.
    Deleted {
        /// The room, or the inbox of a user.
        room: RoomId,
        /// The [ordinal](crate::delivery::ordinal) of the epoch that the deletion began.
        ordinal: u64,
    },
}

/// The entries of a room that a page may hold, by the time at which a node accepted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeRange {
    /// No earlier ones.
    pub since: Option<SystemTime>,
    /// Only earlier ones.
    pub until: Option<SystemTime>,
}

/// An entry of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchivedEntry {
    /// The room, or the inbox of a user.
    pub room: RoomId,
    /// The position in the log.
    pub position: Position,
    /// The content.
    pub envelope: Envelope,
}

/// A page of the archive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArchivePage {
    /// The entries, oldest first.
    pub entries: Vec<ArchivedEntry>,
    /// Whether the archive has more of them in the direction of the range.
    pub more: bool,
}

/// A search for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchQuery {
    /// The rooms to search; no inboxes.
    pub rooms: Vec<RoomId>,
    /// The words that a message has, all of them, as its user typed them.
    pub text: String,
    /// The sender of the messages; `None` for any.
    pub sender: Option<UserId>,
    /// When they were sent.
    pub time: TimeRange,
    /// Only messages below the one at this place of an earlier page.
    pub before: Option<SearchCursor>,
    /// The most messages.
    pub limit: u32,
}

/// The place of the last message of a page of a search, which is ordered by time, newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SearchCursor {
    /// When the message was accepted, in milliseconds since 1970.
    pub time_ms: i64,
    /// Its room.
    pub room: RoomId,
    /// Its number.
    pub seq: Seq,
}

/// Why the archive did not carry out a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArchiveError {
    /// The database does not answer, or cannot take more: the request may succeed later.
    #[error("the archive is unavailable: {0}")]
    Unavailable(String),
    /// The database rejects the request, which fails again.
    #[error("the archive rejected a request: {0}")]
    Rejected(String),
}

/// Keeps entries of logs in a database. All methods may be called at the same time.
pub trait Archive: Send + Sync {
    /// Applies records in their order, and resolves when they are committed. Idempotent: records
    /// that were applied before change nothing.
    ///
    /// Not cancel-safe: a dropped call may be applied or not, as a whole.
    fn apply(&self, records: Vec<ArchiveRecord>) -> BoxFuture<Result<(), ArchiveError>>;

    /// Reads a page of a room or an inbox, of at most [`PAGE_BYTES_MAX`] bytes. `limit` of the range
    /// bounds the entries.
    fn read(
        &self,
        room: RoomId,
        range: ReadRange,
        time: TimeRange,
    ) -> BoxFuture<Result<ArchivePage, ArchiveError>>;

    /// The position below which a new log of the room must not begin: the highest number, and the
    /// epoch with the highest ordinal. `None` for a room without entries.
    fn head(&self, room: RoomId) -> BoxFuture<Result<Option<Position>, ArchiveError>>;

    /// Finds messages, newest first.
    fn search(&self, query: SearchQuery) -> BoxFuture<Result<ArchivePage, ArchiveError>>;

    /// Removes entries that were accepted before `time`, and returns how many.
    fn expire(&self, before: SystemTime) -> BoxFuture<Result<u64, ArchiveError>>;
}
