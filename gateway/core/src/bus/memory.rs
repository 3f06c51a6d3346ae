//! The bus of a single node: logs in this process's memory. The reference for [`super::Bus`].
//!
//! All state ends with the process, so that its clients find a new epoch after a restart.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use skein_protocol::{
    ids::{RoomId, UserId},
    position::{Epoch, Position, Seq},
};
use tokio::{sync::Notify, time::Instant};

mod archive;
mod commands;
mod nodes;
mod store;
mod sessions;

pub use archive::MemoryArchive;
use archive::{ArchiveLink, ArchivedRooms};
use sessions::SessionTable;
use store::StoreState;

use super::{
    Append, Appended, BoxFuture, Bus, BusError, LogRetention, Mailboxes, READ_BYTES_MAX, ReadRange,
    Retention, UnseenInboxLimits, UnseenPolicy,
    commands::{CommandId, QueuedCommand},
    presence_store::EphemeralEvent,
    random_epoch,
    room_store::RoomStoreOptions,
    sessions::SessionOptions,
};
use crate::{
    delivery::{Entry, ReplicaSnapshot, ServerId, ordinal, page::LogPage},
    drain::Tasks,
    envelope::DedupKey,
    telemetry::metrics::Metrics,
};

/// Memory of a log, and of a known id, beside the entries, roughly.
const LOG_BYTES: u64 = 512;
const ID_BYTES: u64 = 128;
/// The shortest time between two calls of `free_memory`.
const FREE_MEMORY_INTERVAL: Duration = Duration::from_millis(100);
/// How often expired logs are removed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

/// Logs, presence, sessions and commands in memory. Cheap to clone.
#[derive(Clone)]
pub struct MemoryBus {
    logs: Arc<Mutex<MemoryLogs>>,
    store: Arc<Mutex<StoreState>>,
    sessions: Arc<Mutex<SessionTable>>,
    commands: Arc<Mutex<CommandLog>>,
    /// Notified when a command was enqueued.
    command_enqueued: Arc<Notify>,
    retention: Arc<Retention>,
    empty_ttl: Duration,
    session_ttl: Duration,
    mailboxes: Mailboxes,
    archive: Option<ArchiveLink>,
}

struct MemoryLogs {
    logs: HashMap<RoomId, MemoryLog>,
    /// Subscribed rooms, with the epoch that was returned for a room without a log: its log will
    /// begin in that epoch.
    subscribed: HashMap<RoomId, Option<Epoch>>,
    /// The epoch of logs without entries, so that an inbox that never received anything costs
    /// nothing. Replaced once any log was dropped, whose numbers could be given again otherwise.
    empty_epoch: Epoch,
    /// Memory of all logs, bytes, roughly.
    bytes: u64,
    /// When memory was freed last: that visits every log.
    last_freed: Option<Instant>,
    /// The rooms of the archive, if there is one.
    archived: Option<ArchivedRooms>,
}

impl Default for MemoryLogs {
    fn default() -> Self {
        let (logs, subscribed, empty_epoch) = (HashMap::new(), HashMap::new(), epoch_of(0));
        Self { logs, subscribed, empty_epoch, bytes: 0, last_freed: None, archived: None }
    }
}

/// The control commands of this node.
#[derive(Default)]
struct CommandLog {
    last: u64,
    waiting: VecDeque<QueuedCommand>,
    applied: CommandId,
    replies: HashMap<CommandId, String>,
}

/// A room's log.
struct MemoryLog {
    epoch: Epoch,
    /// The ordinal of the epoch that the last deletion began, 0 for none.
    deleted: u64,
    top: Seq,
    /// The number up to which the archive has the log, and the deletion that it knows.
    archived: Seq,
    archived_deletion: u64,
    /// The acknowledged number of an inbox.
    acked: Seq,
    entries: VecDeque<(Instant, Entry)>,
    bytes: u64,
    ids: DedupWindow,
    used: Instant,
    /// Whether this is the inbox of an unseen user.
    unseen: bool,
}

/// The ids of the dedup window: two maps that take turns, so that forgetting ids costs nothing. An
/// id is known for one to two windows.
struct DedupWindow {
    newer: HashMap<DedupKey, Seq>,
    older: HashMap<DedupKey, Seq>,
    rotated: Instant,
}

impl MemoryBus {
    /// An empty bus. A task of `tasks` removes state past its retention.
    pub fn start(
        retention: Retention,
        room_options: &RoomStoreOptions,
        sessions: &SessionOptions,
        mailboxes: Mailboxes,
        tasks: &Tasks,
    ) -> Self {
        Self::start_on(
            MemoryLogs::default(),
            None,
            retention,
            room_options,
            sessions,
            mailboxes,
            tasks,
        )
    }

    /// A bus whose entries are copied to `archive`, and whose rooms continue above the entries that
    /// it has.
    pub fn start_archived(
        archive: MemoryArchive,
        metrics: Arc<Metrics>,
        retention: Retention,
        room_options: &RoomStoreOptions,
        sessions: &SessionOptions,
        mailboxes: Mailboxes,
        tasks: &Tasks,
    ) -> Self {
        let (rooms, link) = ArchivedRooms::new(archive);
        let logs = MemoryLogs { archived: Some(rooms), ..MemoryLogs::default() };
        let bus =
            Self::start_on(logs, Some(link), retention, room_options, sessions, mailboxes, tasks);
        bus.start_archiver(metrics, tasks);
        bus
    }

    fn start_on(
        logs: MemoryLogs,
        archive: Option<ArchiveLink>,
        retention: Retention,
        room_options: &RoomStoreOptions,
        sessions: &SessionOptions,
        mailboxes: Mailboxes,
        tasks: &Tasks,
    ) -> Self {
        let bus = Self {
            logs: Arc::new(Mutex::new(logs)),
            store: Arc::default(),
            sessions: Arc::default(),
            commands: Arc::default(),
            command_enqueued: Arc::default(),
            retention: Arc::new(retention),
            empty_ttl: room_options.empty_ttl,
            session_ttl: sessions.ttl,
            mailboxes,
            archive,
        };
        let (sweeper, stopped) = (bus.clone(), tasks.stopped().clone());
        // Sessions with a short retention are swept as often.
        let every = sessions.ttl.clamp(Duration::from_secs(1), SWEEP_INTERVAL);
        tasks.spawn_service("memory_bus_sweep", async move {
            let mut every = tokio::time::interval(every);
            // Both arms are cancel-safe.
            loop {
                tokio::select! {
                    () = stopped.cancelled() => break,
                    now = every.tick() => sweeper.sweep(now),
                }
            }
        });
        bus
    }

    fn sweep(&self, now: Instant) {
        self.store.lock().sweep(self.empty_ttl, now);
        self.sessions.lock().sweep(self.session_ttl);
        let dedup_window = self.retention.dedup_window;
        let unseen_ttl = self.retention.limits.unseen.ttl;
        let mut guard = self.logs.lock();
        let all = &mut *guard;
        let MemoryLogs { logs, subscribed, empty_epoch, archived, .. } = all;
        let before = logs.len();
        logs.retain(|room, log| {
            let (idle, kept) = (now - log.used, self.retention.of(room));
            log.ids.rotate(dedup_window, now);
            if idle > kept.ttl {
                log.entries = VecDeque::new();
                log.bytes = 0;
            }
            let head_ttl = if log.unseen { unseen_ttl } else { kept.head_ttl() };
            let stays = subscribed.contains_key(room) || idle <= head_ttl;
            if !stays && let Some(archived) = archived {
                archived.keep_head(room, log);
            }
            stays
        });
        if logs.len() < before {
            *empty_epoch = epoch_of(0);
        }
        Self::free_memory(all, self.retention.memory_bytes_max);
        let kept: HashSet<RoomId> = all.logs.keys().cloned().collect();
        drop(guard);
        self.store.lock().sweep_read_marks(|room| kept.contains(room));
    }

    /// Frees memory if all logs together exceed `bytes_max`: drops inboxes of unseen users first,
    /// then the least recently used logs, and whole logs where no node is subscribed. A client that
    /// reads on finds a new epoch or a gap.
    fn free_memory(all: &mut MemoryLogs, bytes_max: u64) {
        all.bytes = all.logs.values().map(MemoryLog::cost).sum();
        if all.bytes <= bytes_max {
            return;
        }
        let mut oldest: Vec<((bool, Instant), RoomId)> =
            all.logs.iter().map(|(room, log)| ((!log.unseen, log.used), room.clone())).collect();
        oldest.sort_unstable_by_key(|(rank, _)| *rank);
        for (_, room) in oldest {
            // More than needed, so that this is not done for every message.
            if all.bytes <= bytes_max / 10 * 9 {
                break;
            }
            let Some(log) = all.logs.get_mut(&room) else { continue };
            all.bytes -= log.cost();
            if all.subscribed.contains_key(&room) {
                log.entries = VecDeque::new();
                log.bytes = 0;
                all.bytes += log.cost();
            } else {
                if let (Some(log), Some(archived)) = (all.logs.remove(&room), &mut all.archived) {
                    archived.keep_head(&room, &log);
                }
                all.empty_epoch = epoch_of(0);
            }
        }
        tracing::warn!("logs take more than history.memory_bytes_max; the oldest were dropped");
    }

    /// Appends under the lock, so that entries enter the mailbox in the order of their numbers.
    fn append_now(&self, append: &Append, now: Instant) -> Result<Appended, BusError> {
        let user = append.room.user().filter(|_| append.unseen != UnseenPolicy::Unlimited);
        let unseen = user.is_some_and(|user| !self.was_connected(&user));
        let limits = self.retention.limits.unseen;
        let all = &mut *self.logs.lock();
        let over_limit = all.bytes > self.retention.memory_bytes_max;
        if over_limit && all.last_freed.is_none_or(|freed| now - freed >= FREE_MEMORY_INTERVAL) {
            Self::free_memory(all, self.retention.memory_bytes_max);
            all.last_freed = Some(now);
        }
        all.open_archived(&append.room, now);
        let MemoryLogs { logs, subscribed, bytes, empty_epoch, archived, .. } = all;
        let had_entries = logs.get(&append.room).is_some_and(|log| !log.entries.is_empty());
        // An inbox that was kept like any other stays so.
        let unseen = unseen && logs.get(&append.room).is_none_or(|log| log.unseen || log.top == 0);
        if unseen {
            if append.envelope.as_bytes().len() as u64 > limits.bytes_max {
                return Err(BusError::UnseenBytes);
            }
            if !had_entries && append.unseen == UnseenPolicy::Reject {
                return Err(BusError::UnseenQuota);
            }
        }
        let known_epoch = || subscribed.get(&append.room).cloned().flatten();
        let log = logs.entry(append.room.clone()).or_insert_with(|| {
            MemoryLog::begin(known_epoch().unwrap_or_else(|| empty_epoch.clone()), now)
        });
        let before = log.cost();
        log.used = now;
        log.unseen = unseen;
        log.ids.rotate(self.retention.dedup_window, now);

        let key = append.envelope.dedup_key();
        if let Some(seq) = log.ids.known(&key) {
            let position = Position::new(log.epoch.clone(), seq);
            return Ok(Appended { position, duplicate: true, opened_inbox: false });
        }
        log.top += 1;
        log.ids.newer.insert(key, log.top);
        let position = Position::new(log.epoch.clone(), log.top);
        let entry = Entry {
            position: position.clone(),
            origin: ServerId::default(),
            envelope: append.envelope.clone(),
        };
        log.bytes += entry.bytes() as u64;
        log.entries.push_back((now, entry.clone()));
        if let Some(archived) = archived {
            archived.note(&append.room, 1, now);
        }
        log.trim(&self.retention, self.retention.of(&append.room), self.archive.is_some(), now);
        if unseen {
            log.trim_unseen(&limits);
        }
        *bytes = (*bytes + log.cost()).saturating_sub(before);
        if subscribed.contains_key(&append.room) {
            self.mailboxes.send_entry(append.room.clone(), entry);
        }
        if let Some(archive) = &self.archive {
            archive.wake();
        }
        Ok(Appended { position, duplicate: false, opened_inbox: unseen && !had_entries })
    }

    /// Whether a user is or was connected, as far as the bus remembers.
    fn was_connected(&self, user: &UserId) -> bool {
        self.sessions.lock().has(user) || self.store.lock().has_last_seen(user)
    }

    fn read_now(&self, room: &RoomId, range: ReadRange, now: Instant) -> LogPage {
        let all = &mut *self.logs.lock();
        all.open_archived(room, now);
        match all.logs.get(room) {
            Some(log) => log.page(range),
            None => MemoryLog::begin(all.epoch_of_empty(room), now).page(range),
        }
    }
}

impl MemoryLogs {
    /// The epoch of a room without a log.
    fn epoch_of_empty(&mut self, room: &RoomId) -> Epoch {
        let empty_epoch = self.empty_epoch.clone();
        match self.subscribed.get_mut(room) {
            Some(known_epoch) => known_epoch.get_or_insert(empty_epoch).clone(),
            None => empty_epoch,
        }
    }
}

impl MemoryBus {
    fn delete_log(&self, room: &RoomId) {
        let (all, now) = (&mut *self.logs.lock(), Instant::now());
        all.open_archived(room, now);
        let MemoryLogs { logs, subscribed, bytes, archived, .. } = all;
        if subscribed.contains_key(room) && !logs.contains_key(room) {
            // Subscribers have read an epoch of the room.
            *bytes += LOG_BYTES;
            logs.insert(room.clone(), MemoryLog::begin(epoch_of(0), now));
        }
        if let Some(log) = logs.get_mut(room) {
            let before = log.cost();
            *log = MemoryLog::begin_after_deletion(ordinal(&log.epoch) + 1, now);
            *bytes = (*bytes + log.cost()).saturating_sub(before);
            if let (Some(archived), Some(archive)) = (archived, &self.archive) {
                archived.note(room, 0, now);
                archive.wake();
            }
        }
    }
}

impl Bus for MemoryBus {
    fn append(&self, append: Append) {
        let appended = self.append_now(&append, Instant::now());
        append.ticket.complete(appended);
    }

    fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.logs.lock().subscribed.entry(room.clone()).or_default();
        if self.archive.is_none() {
            return ready(Ok(()));
        }
        let bus = self.clone();
        Box::pin(async move {
            bus.load_archived(room).await;
            Ok(())
        })
    }

    fn unsubscribe(&self, room: RoomId) {
        self.logs.lock().subscribed.remove(&room);
    }

    fn read(&self, room: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>> {
        let page = self.read_now(&room, range, Instant::now());
        ready(Ok(page))
    }

    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.delete_log(&room);
        if self.logs.lock().subscribed.contains_key(&room) {
            self.mailboxes.send_ephemeral(room, EphemeralEvent::LogDeleted);
        }
        ready(Ok(()))
    }

    fn heads(&self, names: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        let (all, now) = (&mut *self.logs.lock(), Instant::now());
        names.iter().for_each(|name| all.open_archived(name, now));
        let head = |name| match all.logs.get(name) {
            Some(log) => Some(Position::new(log.epoch.clone(), log.top)),
            None => Some(Position::new(all.epoch_of_empty(name), 0)),
        };
        let heads = names.iter().map(head).collect();
        ready(Ok(heads))
    }

    fn restore(&self, _held: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>> {
        // The log is as old as the process, and has every entry that any replica ever held.
        ready(Ok(()))
    }

    fn failed_check(&self) -> Option<&'static str> {
        None
    }
}

impl MemoryLog {
    fn begin_after_deletion(ordinal: u64, now: Instant) -> Self {
        Self { deleted: ordinal, ..Self::begin(epoch_of(ordinal), now) }
    }

    fn begin(epoch: Epoch, now: Instant) -> Self {
        Self {
            epoch,
            deleted: 0,
            top: 0,
            archived: 0,
            archived_deletion: 0,
            acked: 0,
            entries: VecDeque::new(),
            bytes: 0,
            ids: DedupWindow { newer: HashMap::new(), older: HashMap::new(), rotated: now },
            used: now,
            unseen: false,
        }
    }

    /// Memory of the log, bytes, roughly.
    fn cost(&self) -> u64 {
        let ids = self.ids.newer.len() + self.ids.older.len();
        LOG_BYTES + self.bytes + ids as u64 * ID_BYTES
    }

    /// Drops the oldest entries past retention.
    fn trim(&mut self, retention: &Retention, kept: LogRetention, is_archived: bool, now: Instant) {
        while let Some((since, oldest)) = self.entries.front() {
            let above = self.entries.len() > kept.entries_min as usize;
            let waits = is_archived && oldest.position.seq > self.archived;
            let old = now - *since > retention.window && !waits;
            let large = self.bytes > kept.bytes_max && self.entries.len() > 1;
            if !(above && old || large) {
                break;
            }
            self.bytes -= oldest.bytes() as u64;
            self.entries.pop_front();
        }
    }

    /// Drops the oldest entries, with their ids, from the inbox of an unseen user.
    fn trim_unseen(&mut self, limits: &UnseenInboxLimits) {
        while self.entries.len() > limits.entries_max as usize || self.bytes > limits.bytes_max {
            let Some((_, oldest)) = self.entries.pop_front() else { break };
            self.bytes -= oldest.bytes() as u64;
            self.ids.forget(&oldest.envelope.dedup_key());
        }
    }

    fn page(&self, range: ReadRange) -> LogPage {
        let oldest = self.entries.front().map_or(0, |(_, entry)| entry.position.seq);
        let seqs = self.entries.len() as u64;
        // Numbers have no gaps, so that a number gives an index.
        let index = |seq: Seq| (seq.saturating_sub(oldest)).min(seqs) as usize;
        let (from, to) = match range {
            ReadRange::Newest { limit } => {
                (self.entries.len().saturating_sub(limit as usize), seqs)
            }
            ReadRange::After { seq, .. } => (index(seq + 1), seqs),
            ReadRange::Before { seq, limit } => {
                let end = index(seq);
                (end.saturating_sub(limit as usize), end as u64)
            }
        };
        let wanted = self.entries.range(from..to as usize).map(|(_, entry)| entry);
        let entries = if range.keeps_newest() {
            let mut entries = cut(wanted.rev(), range.limit());
            entries.reverse();
            entries
        } else {
            cut(wanted, range.limit())
        };
        let (epoch, top) = (self.epoch.clone(), self.top);
        LogPage { epoch, former: None, deleted: self.deleted, generation: 0, top, oldest, entries }
    }
}

/// A future that is ready.
fn ready<T: Send + 'static>(value: T) -> BoxFuture<T> {
    Box::pin(std::future::ready(value))
}

/// A new epoch with this ordinal.
fn epoch_of(ordinal: u64) -> Epoch {
    format!("{ordinal}-{}", random_epoch()).parse().expect("made of the allowed letters")
}

/// As many entries as one read returns.
fn cut<'a>(entries: impl Iterator<Item = &'a Entry>, limit: u32) -> Vec<Entry> {
    let mut bytes = 0;
    entries
        .take(limit as usize)
        .take_while(|entry| {
            let first = bytes == 0;
            bytes += entry.bytes();
            first || bytes <= READ_BYTES_MAX
        })
        .cloned()
        .collect()
}

impl DedupWindow {
    fn known(&self, key: &DedupKey) -> Option<Seq> {
        self.newer.get(key).or_else(|| self.older.get(key)).copied()
    }

    fn forget(&mut self, key: &DedupKey) {
        self.newer.remove(key);
        self.older.remove(key);
    }

    fn rotate(&mut self, window: Duration, now: Instant) {
        let since = now - self.rotated;
        if since < window {
            return;
        }
        self.older = std::mem::take(&mut self.newer);
        if since >= window * 2 {
            self.older = HashMap::new();
        }
        self.rotated = now;
    }
}
