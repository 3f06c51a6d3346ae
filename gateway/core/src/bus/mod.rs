//! The bus: where a room's log lives, and how its entries reach every node that follows it.
//!
//! A [`Bus`] keeps one log per room and passes each new entry to the nodes that follow the room.
//! Two implementations: [`memory`], the reference, for one node without anything else; and
//! [`redis`], for a cluster. Both pass the same conformance suite (`tests/it/bus.rs`).
//!
//! What every implementation promises:
//! - **Append** is atomic per room: an id known within the dedup window gets the position it has,
//!   any other the next number; appended and passed on in one step. Appends of one caller to one
//!   room get their numbers in the order of the calls.
//! - **Passing on** is best effort: entries may be skipped or repeated, and a follower finds that
//!   out by their numbers. Nothing is skipped silently at the end: where arrivals were lost, the
//!   mailbox is told that everything is [doubtful](Mailboxes::doubt).
//! - **Read** shows the log as it is at one moment.
//! - Nothing here waits for a follower.

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

use crate::envelope::Envelope;
use skein_protocol::{
    ids::{RoomId, RoomKind},
    position::{Position, Seq},
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    time::Instant,
};

use crate::{
    delivery::{Entry, ReplicaSnapshot, page::LogPage},
    telemetry::metrics::Metrics,
};

pub mod placement;
pub mod memory;
pub mod commands;
pub mod registry;
pub mod sessions;
pub mod node_state;
pub mod unconfirmed;

use node_state::NodeState;
use registry::EphemeralEvent;

/// A future that can be named, since a trait with `async fn` cannot be an object.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// The output of a future that may be under way; never, where none is. Cancel-safe: the future is
/// kept, so that it can be an arm of a `select!`.
pub async fn output_of<T>(under_way: &mut Option<BoxFuture<T>>) -> T {
    match under_way {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Where logs live. See the module for what is promised.
pub trait Bus: Send + Sync {
    /// Appends to a room's log. Never waits: the answer goes to `append.done`, which is called
    /// exactly once, not later than shortly after `append.deadline`.
    fn append(&self, append: Append);

    /// Has the room's entries passed to this node's mailboxes from here on. What is appended
    /// after the future has resolved arrives, or is told to be doubtful.
    fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>>;

    /// Ends what [`Bus::subscribe`] began. Calls for one room take effect in their order.
    fn unsubscribe(&self, room: RoomId);

    /// Reads part of a room's log. A room without a log gets one, empty, so that its epoch is
    /// known before its first entry.
    fn read(&self, room: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>>;

    /// The newest position of each room's log, in the order of `rooms`; `None` where there is no
    /// log. One request for all, so that a node finds out cheaply which rooms it misses entries
    /// of. Positions asked for are kept for another week.
    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>>;

    /// Deletes a room's log. The room begins anew in a later epoch, and what nodes hold of the old
    /// one is not brought back: neither by those who were cut off meanwhile.
    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>>;

    /// Has the log compared with what this node holds of it. What the log lacks is given back; where
    /// two histories share numbers the log goes on in a new epoch, which a read then shows.
    fn restore(&self, held: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>>;

    /// What keeps this node from publishing and hearing, if anything: names for `ready`.
    fn failed_check(&self) -> Option<&'static str>;
}

/// An entry to be appended.
pub struct Append {
    /// The room.
    pub room: RoomId,
    /// What is appended.
    pub envelope: Envelope,
    /// Whether it goes ahead of what waits: it was in the log once, and is brought back.
    pub urgent: bool,
    /// What is done with it where it is for the inbox of a user who was never connected.
    pub unseen: UnseenPolicy,
    /// When to stop trying.
    pub deadline: Instant,
    /// Hears what became of it.
    pub done: AppendCallback,
}

/// What is done with an entry for the inbox of a user who was never connected, as far as is remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnseenPolicy {
    /// [`BusError::UnseenQuota`], unless the inbox has entries: its author has opened too many.
    Reject,
    /// The inbox is kept small and short ([`UnseenInboxLimits`]).
    Limited,
    /// The inbox is kept as any: the application writes, or the inbox is the author's own.
    #[default]
    Unlimited,
}

/// Called once with what became of an append.
pub type AppendCallback = Box<dyn FnOnce(Result<Appended, BusError>) + Send>;

/// Where an appended entry stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its position.
    pub position: Position,
    /// Whether it was there before.
    pub duplicate: bool,
    /// Whether it has opened the inbox of a user who was never connected.
    pub opened_inbox: bool,
}

/// Why the bus did not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// It is away. An append may or may not have happened: repeat it with the same id.
    #[error("the bus is away")]
    Unavailable,
    /// More waits for it than it may. Nothing was done.
    #[error("the queue towards the bus is full")]
    Overloaded,
    /// It answered with an error; the log has more.
    #[error("the bus refused it")]
    Rejected,
    /// Memory is above the watermark, and this would take more of it. Nothing was done.
    #[error("memory is above the watermark: nothing is kept that needs more of it")]
    MemoryFull,
    /// The author has opened the inboxes of too many users who were never connected. Nothing was done.
    #[error("too many messages to users who were never connected")]
    UnseenQuota,
    /// Larger than the inbox of a user who was never connected may be. Nothing was done.
    #[error("larger than the inbox of a user who was never connected may be")]
    UnseenBytes,
}

impl BusError {
    /// Whether a bound was reached: nothing was done, and the bus is well.
    pub fn is_limit(self) -> bool {
        matches!(self, Self::MemoryFull | Self::UnseenQuota | Self::UnseenBytes)
    }
}

/// Which part of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadRange {
    /// The newest `limit` entries.
    Newest {
        /// How many at most.
        limit: u32,
    },
    /// The oldest `limit` entries above `seq`.
    After {
        /// The entry before the first.
        seq: Seq,
        /// How many at most.
        limit: u32,
    },
    /// The newest `limit` entries below `seq`.
    Before {
        /// The entry behind the last.
        seq: Seq,
        /// How many at most.
        limit: u32,
    },
}

impl ReadRange {
    /// How many entries at most.
    pub fn limit(self) -> u32 {
        match self {
            Self::Newest { limit } | Self::After { limit, .. } | Self::Before { limit, .. } => {
                limit
            }
        }
    }

    /// Whether a cut for size keeps the newest entries instead of the oldest.
    pub fn keeps_newest(self) -> bool {
        !matches!(self, Self::After { .. })
    }
}

/// The most bytes of entries that one read answers, unless one entry alone is larger.
pub const READ_BYTES_MAX: usize = 256 * 1024;

/// How long logs are kept, in every implementation.
#[derive(Clone, Debug)]
pub struct Retention {
    /// Entries kept however old they are, within `ttl` and `bytes_max`.
    pub entries_min: u32,
    /// How long a log without new entries is kept.
    pub ttl: Duration,
    /// The same two of inboxes.
    pub inboxes: LogRetention,
    /// How long further entries are kept: a reader that stalls or reconnects comes back within.
    pub window: Duration,
    /// The most bytes of a log; the oldest entries go first.
    pub bytes_max: u64,
    /// The most that all logs take where they are in a node's own memory.
    pub memory_bytes_max: u64,
    /// How long the id of a message is known.
    pub dedup_window: Duration,
    /// Bounds of what clients have kept beside entries of rooms.
    pub limits: StorageLimits,
}

/// Bounds of what clients have kept, in every implementation. `docs/limits.md` lists them.
#[derive(Clone, Debug)]
pub struct StorageLimits {
    /// Inboxes of users who were never connected.
    pub unseen: UnseenInboxLimits,
    /// How many users' read marks a room has.
    pub marks_max: u32,
    /// The most that the data of all sessions of a user take.
    pub session_data_max: u64,
    /// How much memory Redis may take where it has no `maxmemory`; 0: not known.
    pub memory_max: u64,
    /// Above how many percent of its memory nothing new is kept.
    pub watermark_percent: u8,
}

/// What is kept of the inbox of a user who was never connected: nobody may ever read it.
#[derive(Clone, Copy, Debug)]
pub struct UnseenInboxLimits {
    /// The most entries; the oldest go first.
    pub entries_max: u32,
    /// The most bytes of them.
    pub bytes_max: u64,
    /// How long it is kept after the last entry.
    pub ttl: Duration,
}

impl Default for StorageLimits {
    /// What holds where nothing else is configured.
    fn default() -> Self {
        let day = Duration::from_secs(24 * 60 * 60);
        Self {
            unseen: UnseenInboxLimits { entries_max: 20, bytes_max: 64 << 10, ttl: day },
            marks_max: 10_000,
            session_data_max: 128 << 10,
            memory_max: 0,
            watermark_percent: 80,
        }
    }
}

/// How long logs of a kind are kept.
#[derive(Clone, Copy, Debug)]
pub struct LogRetention {
    /// Entries kept however old they are, within `ttl` and `bytes_max`.
    pub entries_min: u32,
    /// How long a log without new entries is kept.
    pub ttl: Duration,
    /// The most bytes of a log; the oldest entries go first.
    pub bytes_max: u64,
}

impl Default for LogRetention {
    /// What holds for inboxes where nothing else is configured.
    fn default() -> Self {
        Self { entries_min: 1000, ttl: Duration::from_secs(30 * 24 * 60 * 60), bytes_max: 4 << 20 }
    }
}

impl LogRetention {
    /// How long epoch and number are kept after the last entry.
    pub fn head_ttl(self) -> Duration {
        HEAD_TTL.max(self.ttl)
    }
}

impl Retention {
    /// What holds for a room's log.
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

/// How long epoch and number of a log are kept after its entries have gone, so that numbers are
/// not given twice: 7 days.
pub const HEAD_TTL: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How long the epoch of a log is kept that has no entry: nothing has a number in it. Nodes that follow the
/// room renew it every few seconds.
pub const EMPTY_HEAD_TTL: Duration = Duration::from_secs(5 * 60);

/// A new random part of an epoch: 60 bits in letters and digits.
pub fn random_epoch() -> String {
    use rand::{RngExt as _, distr::Alphanumeric};
    rand::rng().sample_iter(Alphanumeric).take(10).map(char::from).collect()
}

/// The mailboxes of a node's hub: one per shard, so that the entries of a room stay in order.
///
/// Nobody waits to put something in: where a mailbox is full its entries are dropped, the shard is
/// told, and it reads what it missed.
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

/// Tells a shard that entries may have been lost on the way to it, and hears when it has made sure
/// that it has them all.
#[derive(Debug, Default)]
pub struct ResyncRequest {
    /// How often doubt was raised.
    requested_count: AtomicU64,
    notify: Notify,
    /// Up to which of those everything was compared and read since.
    synced_count: AtomicU64,
}

impl ResyncRequest {
    /// How often doubt was raised.
    pub fn count(&self) -> u64 {
        self.requested_count.load(Ordering::Acquire)
    }

    /// Waits until doubt is raised. Cancel-safe.
    pub async fn requested(&self) {
        self.notify.notified().await;
    }

    /// All rooms were proven whole since doubt was raised for the `count`th time.
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

/// What a shard finds in its mailbox, in the order it was put there.
#[derive(Debug)]
pub enum ShardMessage {
    /// An entry of a room has arrived.
    Entry(RoomId, Entry),
    /// Something else has that was said in a room.
    Ephemeral(RoomId, EphemeralEvent),
    /// The bus asks what this shard holds: everything that arrived before is part of the answer.
    Snapshots(oneshot::Sender<Vec<ReplicaSnapshot>>),
}

/// The shard's end of a mailbox.
#[derive(Debug)]
pub struct ShardReceiver {
    /// What arrived, in order per room.
    pub messages: mpsc::Receiver<ShardMessage>,
    /// Raised when entries were lost.
    pub resync: Arc<ResyncRequest>,
    /// Whether the node may pass anything on.
    pub node_state: Arc<NodeState>,
}

impl Mailboxes {
    /// `shards` mailboxes of `capacity` entries each, and the ends to read them by.
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

    /// What bus and hub know of this node's own state.
    pub fn node_state(&self) -> &Arc<NodeState> {
        &self.node_state
    }

    /// Everything that the hub holds of the rooms followed, after all that was put in before.
    /// Waits for room in the mailboxes.
    pub async fn replica_snapshots(&self) -> Vec<ReplicaSnapshot> {
        let mut answers = Vec::with_capacity(self.shards.len());
        for mailbox in &*self.shards {
            let (answer, answered) = oneshot::channel();
            // A shard that is gone holds nothing.
            let _ = mailbox.sender.send(ShardMessage::Snapshots(answer)).await;
            answers.push(answered);
        }
        let mut holdings = Vec::new();
        for answered in answers {
            holdings.extend(answered.await.unwrap_or_default());
        }
        holdings
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Which shard a room belongs to.
    pub fn shard_of(&self, room: &RoomId) -> usize {
        (self.hasher.hash_one(room) % self.shards.len() as u64) as usize
    }

    /// Passes an entry on, or drops it and raises doubt where the mailbox is full.
    pub fn send_entry(&self, room: RoomId, entry: Entry) {
        self.send(self.shard_of(&room), ShardMessage::Entry(room, entry));
    }

    /// As [`Mailboxes::send_entry`], what is no entry. Where the mailbox is nearly full what may be lost is, so
    /// that entries need not be read from their logs.
    pub fn send_ephemeral(&self, room: RoomId, notice: EphemeralEvent) {
        let shard = self.shard_of(&room);
        let letters = &self.shards[shard].sender;
        let is_spare = matches!(
            notice,
            EphemeralEvent::Typing { .. }
                | EphemeralEvent::Read { .. }
                | EphemeralEvent::Message(_)
        );
        if is_spare && letters.capacity() < letters.max_capacity() / 4 {
            self.metrics.ephemeral_events_dropped.inc();
            return;
        }
        self.send(shard, ShardMessage::Ephemeral(room, notice));
    }

    fn send(&self, shard: usize, letter: ShardMessage) {
        let mailbox = &self.shards[shard];
        if mailbox.sender.try_send(letter).is_err() {
            self.metrics.mailbox_overflows.inc();
            mailbox.resync.mark_stale();
        }
    }

    /// Tells every shard that entries of any room may have been lost.
    pub fn mark_all_stale(&self) {
        for mailbox in &*self.shards {
            mailbox.resync.mark_stale();
        }
    }

    /// Whether every room followed was proven whole since doubt was raised last: its log was
    /// compared, and what that had more was read.
    pub fn all_synced(&self) -> bool {
        self.shards.iter().all(|mailbox| mailbox.resync.is_synced())
    }
}
