//! The bus: keeps the log of each room and delivers its new entries to every subscribed node.
//!
//! A [`Bus`] keeps one log per room and publishes each new entry to the nodes that are subscribed
//! to the room. There are two implementations: [`memory`], the reference, for a single node without
//! other services; and the crate `skein-redis`, for a cluster. Both pass the same conformance suite
//! (`gateway/server/tests/it/bus.rs`).
//!
//! Guarantees of every implementation:
//! - **Append** is atomic per room: an id known within the dedup window gets the position it has,
//!   any other id the next number. Appending and publishing are one step. Appends of one caller to
//!   one room get their numbers in the order of the calls.
//! - **Publishing** is best effort: a node may miss entries or receive them twice, and detects both
//!   by their numbers. A loss at the end of a log is not silent: where entries may have been lost,
//!   the bus [requests a resync](Mailboxes::mark_all_stale) of every room.
//! - **Read** returns the log as it is at one moment.
//! - The bus never waits for a subscriber.

use std::{
    future::Future,
    hash::{BuildHasher as _, RandomState},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use skein_protocol::{
    ids::{RoomId, RoomKind},
    position::{Epoch, Position},
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};

use crate::{
    delivery::{Entry, ReplicaSnapshot, page::LogPage},
    envelope::Envelope,
    telemetry::metrics::{Metrics, StorageLimit},
};

pub mod placement;
pub mod memory;
pub mod ticket;
pub mod commands;
pub mod nodes;
pub mod presence_entries;
pub mod presence_store;
pub mod room_store;
pub mod sessions;
pub mod node_state;
pub mod unconfirmed;

use node_state::NodeState;
use presence_store::EphemeralEvent;
use ticket::PublishTicket;

pub use crate::delivery::page::ReadRange;

/// A boxed future. A trait with `async fn` could not be used as an object.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Returns the output of a future that may be in progress; never resolves if there is none.
/// Cancel-safe: the future is kept, so that it can be an arm of a `select!`.
pub async fn output_of<T>(in_progress: &mut Option<BoxFuture<T>>) -> T {
    match in_progress {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Stores logs and publishes their entries. The module documents the guarantees.
pub trait Bus: Send + Sync {
    /// Appends to a room's log. Never waits: completes `append.ticket` with the result, not later
    /// than shortly after `append.deadline`.
    fn append(&self, append: Append);

    /// Subscribes this node's mailboxes to the room's entries. An entry appended after the future
    /// has resolved arrives, or the bus requests a resync.
    fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>>;

    /// Ends a subscription. Calls for one room take effect in their order.
    fn unsubscribe(&self, room: RoomId);

    /// Reads a range of a room's log. Creates an empty log for a room without one, so that its
    /// epoch is known before its first entry.
    fn read(&self, room: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>>;

    /// The newest position of each room's log, in the order of `rooms`; `None` for a room without a
    /// log. One request covers all rooms, so that a node finds out cheaply which rooms it misses
    /// entries of. Extends the retention of the positions by another week.
    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>>;

    /// Deletes a room's log. The room continues in a later epoch, and no node restores entries of
    /// the former one, not even a node that was disconnected meanwhile.
    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>>;

    /// Compares the log with this node's replica and appends the entries that the log lacks. If two
    /// histories share numbers, the log continues in a new epoch, which a read then returns.
    fn restore(&self, held: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>>;

    /// The name, as `/ready` reports it, of the condition that keeps this node from publishing and
    /// receiving; `None` if there is none.
    fn failed_check(&self) -> Option<&'static str>;
}

/// An entry to append.
pub struct Append {
    /// The room.
    pub room: RoomId,
    /// The content of the entry.
    pub envelope: Envelope,
    /// Sent ahead of other appends: the entry was in the log before and is restored.
    pub urgent: bool,
    /// How an inbox of an unseen user takes the entry.
    pub unseen: UnseenPolicy,
    /// When the bus stops trying.
    pub deadline: Instant,
    /// Completed with the result.
    pub ticket: PublishTicket,
}

/// How an entry for the inbox of an unseen user is stored. A user is unseen if it has never
/// connected, as far as the bus remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnseenPolicy {
    /// Rejects the entry with [`BusError::UnseenQuota`] if the inbox is empty: its author has
    /// opened too many.
    Reject,
    /// Keeps the inbox small and for a short time ([`UnseenInboxLimits`]).
    Limited,
    /// Keeps the inbox like any other: the application writes, or the inbox is the author's own.
    #[default]
    Unlimited,
}

/// Where an append put the entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The entry's position.
    pub position: Position,
    /// The log had an entry with this id already.
    pub duplicate: bool,
    /// The entry is the first one in the inbox of an unseen user.
    pub opened_inbox: bool,
}

impl Appended {
    /// The result of a publish in a room without a log.
    pub fn without_log() -> Self {
        let position = Position::new(Epoch::none(), 0);
        Self { position, duplicate: false, opened_inbox: false }
    }
}

/// Why the bus did not carry out a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The bus is down. An append may or may not have happened: repeat it with the same id.
    #[error("the bus is down")]
    Unavailable,
    /// Too many requests are waiting. Nothing was done.
    #[error("the queue towards the bus is full")]
    Overloaded,
    /// The bus answered with an error, which is logged.
    #[error("the bus rejected the request")]
    Rejected,
    /// Memory is above the watermark, and this request would take more of it. Nothing was done.
    #[error("memory is above the watermark: the bus stores nothing that needs more of it")]
    MemoryFull,
    /// The author has opened the inboxes of too many unseen users. Nothing was done.
    #[error("too many messages to users that have never connected")]
    UnseenQuota,
    /// The entry is larger than the inbox of an unseen user may be. Nothing was done.
    #[error("the message is larger than the inbox of a user that has never connected")]
    UnseenBytes,
}

impl BusError {
    /// Whether a limit was reached: nothing was done, and the bus is healthy.
    pub fn is_limit(self) -> bool {
        self.storage_limit().is_some()
    }

    /// The limit of stored state that was reached; `None` if the error has another cause.
    pub fn storage_limit(self) -> Option<StorageLimit> {
        match self {
            Self::MemoryFull => Some(StorageLimit::Memory),
            Self::UnseenQuota => Some(StorageLimit::UnseenInboxes),
            Self::UnseenBytes => Some(StorageLimit::UnseenBytes),
            Self::Unavailable | Self::Overloaded | Self::Rejected => None,
        }
    }
}

/// The most bytes of entries that one read returns. A single larger entry is returned nevertheless.
pub const READ_BYTES_MAX: usize = 256 * 1024;

/// The retention of logs, in every implementation.
#[derive(Clone, Debug)]
pub struct Retention {
    /// Entries kept regardless of their age, within `ttl` and `bytes_max`.
    pub entries_min: u32,
    /// Retention of an idle log.
    pub ttl: Duration,
    /// Retention of inboxes.
    pub inboxes: LogRetention,
    /// Retention of entries beyond `entries_min`: longer than readers stall or take to reconnect.
    pub window: Duration,
    /// The most bytes of a log; the oldest entries are dropped first.
    pub bytes_max: u64,
    /// The most bytes of all logs that a node keeps in its own memory.
    pub memory_bytes_max: u64,
    /// How long the id of a message is remembered.
    pub dedup_window: Duration,
    /// Limits of other state that clients make the bus keep.
    pub limits: StorageLimits,
}

/// Limits of state that clients make the bus keep, in every implementation. `docs/limits.md` lists
/// them.
#[derive(Clone, Debug)]
pub struct StorageLimits {
    /// Inboxes of unseen users.
    pub unseen: UnseenInboxLimits,
    /// The most read marks of a room, one per user.
    pub read_marks_max: u32,
    /// The most bytes of the data of all sessions of a user.
    pub session_data_max: u64,
    /// The memory that Redis may use where it has no `maxmemory`, bytes; 0 if not known.
    pub memory_max: u64,
    /// The share of that memory, in percent, above which no new state is kept.
    pub watermark_percent: u8,
}

/// Limits of the inbox of an unseen user, which may never be read.
#[derive(Clone, Copy, Debug)]
pub struct UnseenInboxLimits {
    /// The most entries; the oldest are dropped first.
    pub entries_max: u32,
    /// The most bytes of entries.
    pub bytes_max: u64,
    /// Retention after the last entry.
    pub ttl: Duration,
}

impl Default for StorageLimits {
    /// The limits where none are configured.
    fn default() -> Self {
        let day = Duration::from_secs(24 * 60 * 60);
        Self {
            unseen: UnseenInboxLimits { entries_max: 20, bytes_max: 64 << 10, ttl: day },
            read_marks_max: 10_000,
            session_data_max: 128 << 10,
            memory_max: 0,
            watermark_percent: 80,
        }
    }
}

/// The retention of one kind of logs.
#[derive(Clone, Copy, Debug)]
pub struct LogRetention {
    /// Entries kept regardless of their age, within `ttl` and `bytes_max`.
    pub entries_min: u32,
    /// Retention of an idle log.
    pub ttl: Duration,
    /// The most bytes of a log; the oldest entries are dropped first.
    pub bytes_max: u64,
}

impl Default for LogRetention {
    /// The retention of inboxes where none is configured.
    fn default() -> Self {
        Self { entries_min: 1000, ttl: Duration::from_secs(30 * 24 * 60 * 60), bytes_max: 4 << 20 }
    }
}

impl LogRetention {
    /// How long the head of a log, its epoch and newest number, is kept after the last entry.
    pub fn head_ttl(self) -> Duration {
        HEAD_TTL.max(self.ttl)
    }
}

impl Retention {
    /// The retention of a room's log.
    pub fn of(&self, room: &RoomId) -> LogRetention {
        match room.kind() {
            RoomKind::Inbox => self.inboxes,
            RoomKind::Room | RoomKind::Status => LogRetention {
                entries_min: self.entries_min,
                ttl: self.ttl,
                bytes_max: self.bytes_max,
            },
        }
    }
}

/// How long the head of a log is kept after its entries have expired, so that no number is given
/// twice: 7 days.
pub const HEAD_TTL: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How long the epoch of an empty log is kept, which has given no number yet. Nodes that are
/// subscribed to the room renew it every few seconds.
pub const EMPTY_HEAD_TTL: Duration = Duration::from_secs(5 * 60);

/// A new random part of an epoch: 60 bits in sender and digits.
pub fn random_epoch() -> String {
    use rand::{RngExt as _, distr::Alphanumeric};
    rand::rng().sample_iter(Alphanumeric).take(10).map(char::from).collect()
}

/// The mailboxes of a node's hub: one per shard, so that the entries of a room stay in order.
///
/// Sending never waits. A full mailbox drops the entry and requests a resync, with which the shard
/// reads the entries that it missed.
#[derive(Clone, Debug)]
pub struct Mailboxes {
    shards: Arc<[Mailbox]>,
    hasher: RandomState,
    node_state: Arc<NodeState>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Mailbox {
    sender: mpsc::Sender<ShardMessage>,
    resync: Arc<ResyncRequest>,
}

/// Asks a shard to compare its rooms with their logs, because entries may have been lost on the
/// way, and records when the shard has done so.
#[derive(Debug, Default)]
pub struct ResyncRequest {
    /// How many resyncs were requested.
    requested_count: AtomicU64,
    notify: Notify,
    /// How many of those requests are complete: the shard has compared its rooms and read the
    /// entries that they missed.
    synced_count: AtomicU64,
}

impl ResyncRequest {
    /// How many resyncs were requested.
    pub fn count(&self) -> u64 {
        self.requested_count.load(Ordering::Acquire)
    }

    /// Waits for a request. Cancel-safe.
    pub async fn requested(&self) {
        self.notify.notified().await;
    }

    /// Records that all rooms were verified after the first `count` requests.
    pub fn mark_synced(&self, count: u64) {
        self.synced_count.store(count, Ordering::Release);
    }

    fn mark_stale(&self) {
        self.requested_count.fetch_add(1, Ordering::AcqRel);
        self.notify.notify_one();
    }

    fn is_synced(&self) -> bool {
        self.synced_count.load(Ordering::Acquire) >= self.count()
    }
}

/// An item of a shard's mailbox, in the order of arrival.
#[derive(Debug)]
pub enum ShardMessage {
    /// An entry of a room has arrived.
    Entry(RoomId, Entry),
    /// An ephemeral event of a room has arrived.
    Ephemeral(RoomId, EphemeralEvent),
    /// The bus asks for the replicas of this shard, including every entry that arrived before.
    Snapshots(oneshot::Sender<Vec<ReplicaSnapshot>>),
}

/// The receiving end of a shard's mailbox.
#[derive(Debug)]
pub struct ShardReceiver {
    /// Arrived items, in order per room.
    pub messages: mpsc::Receiver<ShardMessage>,
    /// Requested when entries were lost.
    pub resync: Arc<ResyncRequest>,
    /// Whether the node may deliver entries.
    pub node_state: Arc<NodeState>,
}

impl Mailboxes {
    /// `shards` mailboxes of `capacity` entries each, and their receiving ends.
    pub fn new(
        shards: usize,
        capacity: usize,
        metrics: Arc<Metrics>,
    ) -> (Self, Vec<ShardReceiver>) {
        let mut ends = Vec::with_capacity(shards);
        let node_state = Arc::new(NodeState::default());
        let mailbox = |_| {
            let (sender, messages) = mpsc::channel(capacity);
            let resync = Arc::new(ResyncRequest::default());
            let node_state = node_state.clone();
            ends.push(ShardReceiver { messages, resync: resync.clone(), node_state });
            Mailbox { sender, resync }
        };
        let shards = (0..shards).map(mailbox).collect();
        (Self { shards, hasher: RandomState::new(), node_state, metrics }, ends)
    }

    /// The node's own state, which bus and hub share.
    pub fn node_state(&self) -> &Arc<NodeState> {
        &self.node_state
    }

    /// The hub's replicas of all subscribed rooms, with every entry that was sent before this call.
    /// Waits for capacity in the mailboxes.
    pub async fn replica_snapshots(&self) -> Vec<ReplicaSnapshot> {
        let mut answers = Vec::with_capacity(self.shards.len());
        for mailbox in &*self.shards {
            let (answer, answered) = oneshot::channel();
            // A shard that has ended holds nothing.
            let _ = mailbox.sender.send(ShardMessage::Snapshots(answer)).await;
            answers.push(answered);
        }
        let mut holdings = Vec::new();
        for answered in answers {
            holdings.extend(answered.await.unwrap_or_default());
        }
        holdings
    }

    /// The metrics of the node.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The index of a room's shard.
    pub fn shard_of(&self, room: &RoomId) -> usize {
        (self.hasher.hash_one(room) % self.shards.len() as u64) as usize
    }

    /// Sends an entry to the room's shard. Drops it and requests a resync if the mailbox is full.
    pub fn send_entry(&self, room: RoomId, entry: Entry) {
        self.send(self.shard_of(&room), ShardMessage::Entry(room, entry));
    }

    /// Sends an ephemeral event to the room's shard. Drops an event that may be lost if the mailbox
    /// is nearly full, so that entries need not be read from their logs.
    pub fn send_ephemeral(&self, room: RoomId, event: EphemeralEvent) {
        let shard = self.shard_of(&room);
        let sender = &self.shards[shard].sender;
        let is_spare = matches!(
            event,
            EphemeralEvent::Typing { .. }
                | EphemeralEvent::Read { .. }
                | EphemeralEvent::Message(_)
        );
        if is_spare && sender.capacity() < sender.max_capacity() / 4 {
            self.metrics.ephemeral_events_dropped.inc();
            return;
        }
        self.send(shard, ShardMessage::Ephemeral(room, event));
    }

    fn send(&self, shard: usize, message: ShardMessage) {
        let mailbox = &self.shards[shard];
        if mailbox.sender.try_send(message).is_err() {
            self.metrics.mailbox_overflows.inc();
            mailbox.resync.mark_stale();
        }
    }

    /// The messages that wait in all mailboxes, and in the one that has most.
    pub fn waiting(&self) -> (usize, usize) {
        let waiting = self.shards.iter().map(|mailbox| {
            let Mailbox { sender, .. } = mailbox;
            sender.max_capacity() - sender.capacity()
        });
        waiting.fold((0, 0), |(all, most), count| (all + count, most.max(count)))
    }

    /// Requests a resync of every room of every shard.
    pub fn mark_all_stale(&self) {
        for mailbox in &*self.shards {
            mailbox.resync.mark_stale();
        }
    }

    /// Whether every subscribed room was verified since the last resync request: its log was
    /// compared, and missing entries were read.
    pub fn all_synced(&self) -> bool {
        self.shards.iter().all(|mailbox| mailbox.resync.is_synced())
    }
}
