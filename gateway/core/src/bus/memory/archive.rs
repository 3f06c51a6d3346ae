//! The archive of a single node: copies entries from the logs in memory, and continues the rooms
//! that it knows after a restart.
//!
//! A log notes up to which number it was copied, so that entries wait in the log itself and take no
//! further memory. An entry that a log drops for its size before it was copied is not archived.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use skein_protocol::{
    ids::{RoomId, RoomKind},
    position::{Position, Seq},
};
use tokio::{sync::Notify, time::Instant};

use super::{MemoryBus, MemoryLog, MemoryLogs, epoch_of};
use crate::{
    archive::{Archive, ArchiveError, ArchiveRecord, ArchiveWriter, ArchivedEntry, TimeRange},
    bus::ReadRange,
    delivery::{Entry, ServerId, ordinal, page::READ_LEN},
    drain::Tasks,
    telemetry::metrics::Metrics,
};

/// The most records of a batch.
const BATCH_LEN_MAX: usize = 500;
/// The bytes after which a batch takes no further record.
const BATCH_BYTES: usize = 4 << 20;
/// How long the last entries may take to be copied when the node stops.
const LAST_BATCHES_MAX: Duration = Duration::from_secs(10);
/// How long a room that is opened waits for the entries that the archive has of it.
const LOAD_TIMEOUT: Duration = Duration::from_secs(2);

/// The archive of a [`MemoryBus`], and the heads of the rooms that it had at the start.
pub struct MemoryArchive {
    archive: Arc<dyn Archive>,
    heads: HashMap<RoomId, Position>,
}

impl MemoryArchive {
    /// Reads the heads of all rooms.
    ///
    /// # Errors
    ///
    /// The error of the archive.
    pub async fn open(archive: Arc<dyn Archive>) -> Result<Self, ArchiveError> {
        let heads = archive.heads().await?;
        Ok(Self { archive, heads: heads.into_iter().collect() })
    }
}

/// The rooms that the archive has or will have.
pub(super) struct ArchivedRooms {
    /// The newest positions of rooms whose logs are not in memory.
    heads: HashMap<RoomId, Position>,
    /// Rooms with records to copy, each once.
    waiting: VecDeque<RoomId>,
    queued: HashSet<RoomId>,
    /// Entries to copy, and since when there are any.
    entries: u64,
    since: Option<Instant>,
}

/// The connection of a bus to its archive. Cheap to clone.
#[derive(Clone)]
pub(super) struct ArchiveLink {
    archive: Arc<dyn Archive>,
    /// Notified when there are records to copy.
    wake: Arc<Notify>,
}

/// The records of some rooms, and up to which number of each they go.
struct Batch {
    records: Vec<ArchiveRecord>,
    /// Room, number of the last entry, count of entries, ordinal of the deletion.
    rooms: Vec<(RoomId, Seq, u64, u64)>,
}

impl ArchiveLink {
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }
}

impl ArchivedRooms {
    pub(super) fn new(archive: MemoryArchive) -> (Self, ArchiveLink) {
        let MemoryArchive { archive, heads } = archive;
        let (waiting, queued) = (VecDeque::new(), HashSet::new());
        let rooms = Self { heads, waiting, queued, entries: 0, since: None };
        (rooms, ArchiveLink { archive, wake: Arc::default() })
    }

    /// Notes that a room has a record to copy; `entries` of them are entries.
    pub(super) fn note(&mut self, room: &RoomId, entries: u64, now: Instant) {
        if room.kind() != RoomKind::Room {
            return;
        }
        self.entries += entries;
        self.since.get_or_insert(now);
        if self.queued.insert(room.clone()) {
            self.waiting.push_back(room.clone());
        }
    }

    /// Remembers where a log ended that is no longer in memory.
    pub(super) fn keep_head(&mut self, room: &RoomId, log: &MemoryLog) {
        if room.kind() == RoomKind::Room && log.top > 0 {
            self.heads.insert(room.clone(), Position::new(log.epoch.clone(), log.top));
        }
    }
}

impl MemoryLogs {
    /// Begins the log of a room that the archive has, above its entries.
    pub(super) fn open_archived(&mut self, room: &RoomId, now: Instant) {
        let Some(archived) = &mut self.archived else { return };
        if self.logs.contains_key(room) {
            return;
        }
        if let Some(head) = archived.heads.remove(room) {
            let log = MemoryLog::begin(epoch_of(ordinal(&head.epoch) + 1), now);
            let log = MemoryLog { top: head.seq, archived: head.seq, ..log };
            self.bytes += log.cost();
            self.logs.insert(room.clone(), log);
        }
    }
}

impl MemoryBus {
    /// Starts the task that copies entries to the archive.
    pub(super) fn start_archiver(&self, metrics: Arc<Metrics>, tasks: &Tasks) {
        let Some(link) = self.archive.clone() else { return };
        let writer = ArchiveWriter::new(link.archive.clone(), metrics.clone());
        let (bus, stopped) = (self.clone(), tasks.stopped().clone());
        tasks.spawn_service("archiver", async move {
            let copy = async {
                loop {
                    link.wake.notified().await;
                    bus.copy_waiting(&writer, &metrics).await;
                }
            };
            // A batch that was under way is taken once more.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = copy => {}
            }
            bus.note_uncopied();
            let last = bus.copy_waiting(&writer, &metrics);
            if tokio::time::timeout(LAST_BATCHES_MAX, last).await.is_err() {
                tracing::error!("the archive did not take the last entries in time");
            }
        });
    }

    /// Copies everything that waits.
    async fn copy_waiting(&self, writer: &ArchiveWriter, metrics: &Metrics) {
        loop {
            let batch = self.next_batch(metrics);
            if batch.records.is_empty() {
                return self.note_copied(&batch.rooms);
            }
            writer.apply(batch.records).await;
            self.note_copied(&batch.rooms);
        }
    }

    /// Notes every room with records that the archive has not committed.
    fn note_uncopied(&self) {
        let (logs, now) = (&mut *self.logs.lock(), Instant::now());
        let Some(archived) = &mut logs.archived else { return };
        for (room, log) in &logs.logs {
            if log.archived < log.top || log.archived_deletion < log.deleted {
                archived.note(room, 0, now);
            }
        }
    }

    fn next_batch(&self, metrics: &Metrics) -> Batch {
        let MemoryLogs { logs, archived, .. } = &mut *self.logs.lock();
        let mut batch = Batch { records: Vec::new(), rooms: Vec::new() };
        let Some(archived) = archived else { return batch };
        let mut bytes = 0;
        while batch.records.len() < BATCH_LEN_MAX && bytes < BATCH_BYTES {
            let Some(room) = archived.waiting.pop_front() else { break };
            archived.queued.remove(&room);
            let Some(log) = logs.get(&room) else { continue };
            if log.deleted > log.archived_deletion {
                let deletion = ArchiveRecord::Deleted { room: room.clone(), ordinal: log.deleted };
                batch.records.push(deletion);
            }
            let first =
                log.entries.partition_point(|(_, entry)| entry.position.seq <= log.archived);
            let (mut last, mut count, mut is_cut) = (log.archived, 0, false);
            for (_, entry) in log.entries.iter().skip(first) {
                is_cut = batch.records.len() >= BATCH_LEN_MAX || bytes >= BATCH_BYTES;
                if is_cut {
                    break;
                }
                bytes += entry.bytes();
                (last, count) = (entry.position.seq, count + 1);
                batch.records.push(ArchiveRecord::Entry {
                    room: room.clone(),
                    position: entry.position.clone(),
                    envelope: entry.envelope.clone(),
                });
            }
            if !is_cut {
                // Also past entries that the log has dropped: they will not come any more.
                last = log.top;
            } else if archived.queued.insert(room.clone()) {
                archived.waiting.push_front(room.clone());
            }
            batch.rooms.push((room, last, count, log.deleted));
        }
        if batch.records.is_empty() {
            (archived.entries, archived.since) = (0, None);
        }
        metrics.archive_lag_entries.set(archived.entries as i64);
        let age = archived.since.map(|since| since.elapsed()).unwrap_or_default();
        metrics.archive_oldest_seconds.set(age.as_secs_f64());
        batch
    }

    fn note_copied(&self, rooms: &[(RoomId, Seq, u64, u64)]) {
        let MemoryLogs { logs, archived, .. } = &mut *self.logs.lock();
        let Some(archived) = archived else { return };
        for (room, last, count, deletion) in rooms {
            archived.entries = archived.entries.saturating_sub(*count);
            let Some(log) = logs.get_mut(room) else { continue };
            log.archived_deletion = log.archived_deletion.max(*deletion);
            // A log that was deleted meanwhile has other numbers.
            if log.deleted == *deletion {
                log.archived = log.archived.max(*last);
            }
        }
        archived.since = (archived.entries > 0).then(Instant::now);
    }

    /// Loads the newest entries of a room that was continued after a restart, so that its members
    /// see them.
    pub(super) async fn load_archived(&self, room: RoomId) {
        let Some(link) = self.archive.clone() else { return };
        let Some(top) = self.top_without_entries(&room) else { return };
        let range = ReadRange::Before { seq: top + 1, limit: READ_LEN };
        let read = link.archive.read(room.clone(), range, TimeRange::default());
        match tokio::time::timeout(LOAD_TIMEOUT, read).await {
            Ok(Ok(page)) => self.put_in_front(&room, top, page.entries),
            Ok(Err(error)) => {
                tracing::warn!(%room, %error, "a room begins without the entries that the archive has");
            }
            Err(_) => {
                tracing::warn!(%room, "the archive did not return the entries of a room in time");
            }
        }
    }

    /// The top of a log that has no entries in memory.
    fn top_without_entries(&self, room: &RoomId) -> Option<Seq> {
        let logs = &mut *self.logs.lock();
        logs.open_archived(room, Instant::now());
        let log = logs.logs.get(room)?;
        (log.entries.is_empty() && log.top > 0 && log.archived == log.top).then_some(log.top)
    }

    /// Puts the last of `loaded` that have numbers up to `top` without a gap in front of the log.
    fn put_in_front(&self, room: &RoomId, top: Seq, loaded: Vec<ArchivedEntry>) {
        let MemoryLogs { logs, bytes, .. } = &mut *self.logs.lock();
        let Some(log) = logs.get_mut(room) else { return };
        let begins = log.entries.front().map_or(log.top + 1, |(_, entry)| entry.position.seq);
        if begins != top + 1 {
            return;
        }
        let (now, before) = (Instant::now(), log.cost());
        let mut next = top;
        for ArchivedEntry { position, envelope, .. } in loaded.into_iter().rev() {
            if position.seq != next || next == 0 {
                break;
            }
            next -= 1;
            let entry = Entry { position, origin: ServerId::default(), envelope };
            log.bytes += entry.bytes() as u64;
            log.entries.push_front((now, entry));
        }
        *bytes += log.cost() - before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        archive::tests::Picky,
        bus::{Bus as _, Mailboxes, Retention},
        delivery::samples::entry,
    };

    #[tokio::test]
    async fn dropped_entries_are_not_waited_for() {
        let (metrics, tasks) = (Arc::new(Metrics::new()), Tasks::default());
        let (mailboxes, _receivers) = Mailboxes::new(1, 16, metrics.clone());
        let archive = MemoryArchive::open(Arc::new(Picky::default())).await.unwrap();
        let hour = Duration::from_secs(3600);
        let retention = Retention {
            entries_min: 10,
            ttl: hour,
            inboxes: Default::default(),
            window: hour,
            bytes_max: 1 << 20,
            memory_bytes_max: 1 << 20,
            dedup_window: hour,
            limits: Default::default(),
        };
        let room: RoomId = "r".parse().unwrap();
        let (rooms, sessions) = (Default::default(), Default::default());
        let bus = MemoryBus::start_archived(
            archive,
            metrics.clone(),
            retention,
            &rooms,
            &sessions,
            mailboxes,
            &tasks,
        );
        bus.subscribe(room.clone()).await.unwrap();
        {
            // As if memory had become short before the entries 1 to 7 were copied.
            let logs: &mut MemoryLogs = &mut bus.logs.lock();
            let mut log = MemoryLog::begin(epoch_of(0), Instant::now());
            log.top = 7;
            logs.logs.insert(room.clone(), log);
            logs.archived.as_mut().unwrap().note(&room, 7, Instant::now());
        }
        let batch = bus.next_batch(&metrics);
        assert!(batch.records.is_empty());
        bus.note_copied(&batch.rooms);
        {
            let logs: &mut MemoryLogs = &mut bus.logs.lock();
            let log = logs.logs.get_mut(&room).unwrap();
            assert_eq!(log.archived, 7);
            log.top = 8;
            log.entries.push_back((Instant::now(), entry("0-e", 8)));
            logs.archived.as_mut().unwrap().note(&room, 1, Instant::now());
        }
        let batch = bus.next_batch(&metrics);
        assert_eq!((batch.records.len(), batch.rooms[0].1), (1, 8));
    }
}
