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

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use skein_protocol::{
    ids::{RoomId, UserId},
    position::{Position, Seq},
};

use tokio::time::timeout;

use crate::{
    delivery::page::ReadRange,
    envelope::Envelope,
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{ArchiveResult, Metrics},
    },
};

/// The most bytes of envelopes that one page holds: as many as one read of a log returns. A single
/// larger entry is returned nevertheless.
pub const PAGE_BYTES_MAX: usize = 256 * 1024;

/// A boxed future, as the trait returns.
type BoxFuture<T> = futures_util::future::BoxFuture<'static, T>;

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

/// A page of the archive: a part of a room, oldest first, or found messages, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArchivePage {
    /// The entries.
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

    /// The heads of all rooms, for a single node, which keeps them in memory.
    fn heads(&self) -> BoxFuture<Result<Vec<(RoomId, Position)>, ArchiveError>>;

    /// Finds messages, newest first.
    fn search(&self, query: SearchQuery) -> BoxFuture<Result<ArchivePage, ArchiveError>>;

    /// Removes entries that were accepted before `time`, and returns how many.
    fn expire(&self, before: SystemTime) -> BoxFuture<Result<u64, ArchiveError>>;
}

/// How long one batch may take to be committed, before it is tried again.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// The shortest and the longest pause between two attempts to reach the archive.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Applies batches of records, however long the archive is away.
#[derive(Clone)]
pub struct ArchiveWriter {
    archive: Arc<dyn Archive>,
    metrics: Arc<Metrics>,
}

impl ArchiveWriter {
    /// A writer to `archive`.
    pub fn new(archive: Arc<dyn Archive>, metrics: Arc<Metrics>) -> Self {
        Self { archive, metrics }
    }

    /// Applies a batch, and resolves when it is committed. Records that the archive rejects are
    /// logged, counted and left out. Cancel-safe as [`Archive::apply`]: a batch that was not
    /// committed can be applied again.
    pub async fn apply(&self, batch: Vec<ArchiveRecord>) {
        let begun = tokio::time::Instant::now();
        let mut batches = vec![batch];
        while let Some(mut batch) = batches.pop() {
            if batch.is_empty() {
                continue;
            }
            match self.apply_when_available(batch.clone()).await {
                Ok(()) => {
                    let copied = self.metrics.archive_entries.of(ArchiveResult::Copied);
                    copied.inc_by(batch.len() as u64);
                }
                Err(error) if batch.len() == 1 => {
                    self.metrics.archive_entries.of(ArchiveResult::Rejected).inc();
                    tracing::error!(record = %batch[0].name(), %error,
                        "the archive rejects an entry, which it will not have");
                }
                Err(_) => {
                    let second = batch.split_off(batch.len() / 2);
                    batches.extend([second, batch]);
                }
            }
        }
        self.metrics.archive_write_seconds.observe(begun.elapsed().as_secs_f64());
    }

    /// Applies a batch once the archive is available. Returns why the archive rejects it.
    async fn apply_when_available(&self, batch: Vec<ArchiveRecord>) -> Result<(), ArchiveError> {
        static UNAVAILABLE: LogLimiter = LogLimiter::new();
        let (mut pause, pause_max) = PAUSES;
        loop {
            let applied = timeout(APPLY_TIMEOUT, self.archive.apply(batch.clone())).await;
            let unavailable = match applied {
                Ok(Err(ArchiveError::Unavailable(error))) => error,
                Err(_) => "it does not answer in time".to_owned(),
                Ok(applied) => {
                    self.metrics.archive_up.set(1);
                    return applied;
                }
            };
            self.metrics.archive_up.set(0);
            if let Some(suppressed) = UNAVAILABLE.should_log() {
                tracing::error!(
                    error = unavailable,
                    suppressed,
                    "the archive is unavailable: new entries wait, and history older than the logs \
                     cannot be read"
                );
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(pause_max);
        }
    }
}

impl ArchiveRecord {
    /// The size of its content, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Entry { envelope, .. } => envelope.as_bytes().len(),
            Self::Deleted { .. } => 0,
        }
    }

    /// The record as a log line names it.
    fn name(&self) -> String {
        match self {
            Self::Entry { room, position, .. } => {
                format!("{room} {}:{}", position.epoch, position.seq)
            }
            Self::Deleted { room, ordinal } => format!("{room} deleted before epoch {ordinal}"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::delivery::samples::{entry, position};

    /// An archive that is away at first, and rejects the entry 3.
    #[derive(Default)]
    pub(crate) struct Picky {
        away: Mutex<u32>,
        kept: Mutex<Vec<Seq>>,
    }

    impl Archive for Picky {
        fn apply(&self, records: Vec<ArchiveRecord>) -> BoxFuture<Result<(), ArchiveError>> {
            let seqs = records.iter().map(|record| match record {
                ArchiveRecord::Entry { position, .. } => position.seq,
                ArchiveRecord::Deleted { .. } => 0,
            });
            let (seqs, away) = (seqs.collect::<Vec<_>>(), &mut *self.away.lock());
            let applied = if *away > 0 {
                *away -= 1;
                Err(ArchiveError::Unavailable("away".to_owned()))
            } else if seqs.contains(&3) {
                Err(ArchiveError::Rejected("3".to_owned()))
            } else {
                self.kept.lock().extend(seqs);
                Ok(())
            };
            Box::pin(std::future::ready(applied))
        }

        fn read(
            &self,
            _: RoomId,
            _: ReadRange,
            _: TimeRange,
        ) -> BoxFuture<Result<ArchivePage, ArchiveError>> {
            Box::pin(std::future::ready(Ok(ArchivePage::default())))
        }

        fn head(&self, _: RoomId) -> BoxFuture<Result<Option<Position>, ArchiveError>> {
            Box::pin(std::future::ready(Ok(None)))
        }

        fn heads(&self) -> BoxFuture<Result<Vec<(RoomId, Position)>, ArchiveError>> {
            Box::pin(std::future::ready(Ok(Vec::new())))
        }

        fn search(&self, _: SearchQuery) -> BoxFuture<Result<ArchivePage, ArchiveError>> {
            Box::pin(std::future::ready(Ok(ArchivePage::default())))
        }

        fn expire(&self, _: SystemTime) -> BoxFuture<Result<u64, ArchiveError>> {
            Box::pin(std::future::ready(Ok(0)))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writer_waits_for_an_archive_that_is_away_and_leaves_out_what_it_rejects() {
        let (archive, metrics) = (Arc::new(Picky::default()), Arc::new(Metrics::new()));
        *archive.away.lock() = 9;
        let writer = ArchiveWriter::new(archive.clone(), metrics.clone());
        let record = |seq| ArchiveRecord::Entry {
            room: "r".parse().unwrap(),
            position: position("1-e", seq),
            envelope: entry("1-e", seq).envelope,
        };
        writer.apply((1..=7).map(record).collect()).await;
        assert_eq!(*archive.kept.lock(), [1, 2, 4, 5, 6, 7]);
        let count = |result| metrics.archive_entries.of(result).get();
        assert_eq!((count(ArchiveResult::Copied), count(ArchiveResult::Rejected)), (6, 1));
        assert_eq!(metrics.archive_up.get(), 1);
    }
}
