//! The requests of a shard to the bus: log reads, reads of heads, log restores. Each is a task that
//! puts its result into the shard's queue.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use skein_protocol::ids::RoomId;

use super::{
    commands::{LogReadRequest, READ_RETRY_DELAY, ReadPurpose, ShardCommand, ShardTasks},
    join::PendingJoin,
    member::ShardBatch,
    room::Room,
    rooms::Rooms,
};
use crate::{
    bus::{Append, Bus, BusError, ReadRange, UnseenPolicy, ticket::PublishTicket},
    delivery::{
        ReplicaSnapshot,
        page::{LogPage, READ_LEN},
    },
    telemetry::metrics::{LogRepairResult, Metrics},
};

/// The time for which a lost entry is tried to be appended again.
const REAPPEND_MAX: Duration = Duration::from_secs(30);
/// The most catch-up reads of a shard under way, which bounds the memory of their results.
const CATCH_UP_READS_MAX: usize = 16;

/// Starts the log reads of a shard.
pub(super) struct LogReads {
    bus: Arc<dyn Bus>,
    tasks: ShardTasks,
    metrics: Arc<Metrics>,
    /// The read era. Counts the events that void earlier reads: the node lost its lease, or sent
    /// the snapshots from which a new Redis server is restored.
    era: u64,
    /// The number of catch-up reads under way.
    catch_up_reads: usize,
    /// Rooms that wait for a catch-up read.
    waiting: VecDeque<(RoomId, u64)>,
}

impl LogReads {
    pub(super) fn new(bus: Arc<dyn Bus>, tasks: ShardTasks, metrics: Arc<Metrics>) -> Self {
        let waiting = VecDeque::new();
        Self { bus, tasks, metrics, era: 0, catch_up_reads: 0, waiting }
    }

    /// Voids all reads under way.
    pub(super) fn void(&mut self) {
        self.era += 1;
    }

    /// Whether a read began before an event that voids it.
    pub(super) fn is_void(&self, read_era: u64) -> bool {
        self.era != read_era
    }

    /// Subscribes to a room, then reads its log.
    pub(super) fn open(&self, room: &Room) {
        let range = room.replica.next_read();
        self.start(room, ReadPurpose::Open, None, range, Duration::ZERO);
    }

    /// Reads a room's log from the replica's top after a pause, or once more after the read under
    /// way.
    pub(super) fn forward(&self, room: &mut Room, pause: Duration) {
        if !room.replica.read_again() {
            room.replica.begin_read();
            self.repeat(room, pause);
        }
    }

    /// Repeats a read from the replica's top whose result was void.
    pub(super) fn repeat(&self, room: &Room, pause: Duration) {
        let range = room.replica.next_read();
        self.start(room, ReadPurpose::Continue, None, range, pause);
    }

    /// Reads a part of the log for a join.
    pub(super) fn for_join(&self, room: &Room, join: PendingJoin, range: ReadRange) {
        self.start(room, ReadPurpose::Join(join), None, range, Duration::ZERO);
    }

    /// Lets the bus restore a room's log from the replica's snapshot, then reads it.
    pub(super) fn restore(&self, room: &mut Room, batch: &ShardBatch) {
        let Some((snapshot, again)) = room.begin_restore(batch) else { return };
        tracing::error!(room = %room.name, top = %snapshot.top,
            "the log of a room diverged from its replica or lacks delivered entries: restoring");
        // Twice in a row: the server does not hold the restored log yet.
        let pause = if again { READ_RETRY_DELAY } else { Duration::ZERO };
        let range = room.replica.next_read();
        self.start(room, ReadPurpose::Continue, Some(snapshot), range, pause);
    }

    /// Starts a read of the log for members of a room that wait for one, unless one is under way,
    /// or queues it.
    pub(super) fn catch_up(&mut self, room: &mut Room) {
        if !room.catch_up.needs_read() {
            return;
        }
        if self.catch_up_reads >= CATCH_UP_READS_MAX {
            room.catch_up.queue_read();
            self.waiting.push_back((room.name.clone(), room.subscription));
            return;
        }
        self.begin_catch_up(room);
    }

    fn begin_catch_up(&mut self, room: &mut Room) {
        let Some(seq) = room.catch_up.begin_read(&room.members) else { return };
        self.catch_up_reads += 1;
        let range = ReadRange::After { seq, limit: READ_LEN };
        self.start(room, ReadPurpose::CatchUp(seq), None, range, Duration::ZERO);
    }

    /// A catch-up read has ended, so that a read of another room may start.
    pub(super) fn end_catch_up(&mut self, rooms: &mut Rooms) {
        self.catch_up_reads -= 1;
        while self.catch_up_reads < CATCH_UP_READS_MAX
            && let Some((name, subscription)) = self.waiting.pop_front()
        {
            if let Some(room) = rooms.current(&name, subscription) {
                self.begin_catch_up(room);
            }
        }
    }

    /// Reads a log in a task.
    fn start(
        &self,
        room: &Room,
        purpose: ReadPurpose,
        restore: Option<ReplicaSnapshot>,
        range: ReadRange,
        pause: Duration,
    ) {
        let (bus, metrics, durable) = (self.bus.clone(), self.metrics.clone(), room.durable);
        let mut request = LogReadRequest {
            room: room.name.clone(),
            subscription: room.subscription,
            read_era: self.era,
            purpose,
        };
        self.tasks.spawn("read_log", async move {
            // A sleep of zero would last one tick of the clock.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            if let ReadPurpose::Open = request.purpose
                && let Err(error) = bus.subscribe(request.room.clone()).await
            {
                return ShardCommand::LogRead { request, result: Err(error) };
            }
            if !durable {
                return ShardCommand::LogRead { request, result: Ok(LogPage::without_log()) };
            }
            if let Some(snapshots) = restore {
                while bus.restore(snapshots.clone()).await.is_err() {
                    metrics.log_repairs.of(LogRepairResult::Failed).inc();
                    tokio::time::sleep(READ_RETRY_DELAY).await;
                }
            }
            let read = bus.read(request.room.clone(), range);
            let mut result = match &mut request.purpose {
                // Stop waiting if the connection has left meanwhile.
                ReadPurpose::Join(join) => tokio::select! {
                    biased;
                    () = join.done.closed() => Err(BusError::Unavailable),
                    result = read => result,
                },
                _ => read.await,
            };
            // Members wait for these reads, and can wait: they are caught up when the bus is back.
            while let (Err(_), ReadPurpose::Continue | ReadPurpose::CatchUp(_)) =
                (&result, &request.purpose)
            {
                metrics.log_repairs.of(LogRepairResult::Failed).inc();
                tokio::time::sleep(READ_RETRY_DELAY).await;
                result = bus.read(request.room.clone(), range).await;
            }
            ShardCommand::LogRead { request, result }
        });
    }

    /// Reads the heads of the logs of `rooms` in a task, until it succeeds.
    pub(super) fn read_heads(&self, rooms: Vec<(RoomId, u64)>) {
        let (bus, metrics, read_era) = (self.bus.clone(), self.metrics.clone(), self.era);
        self.tasks.spawn("compare_heads", async move {
            let names: Vec<RoomId> = rooms.iter().map(|(name, _)| name.clone()).collect();
            let heads = loop {
                match bus.heads(names.clone()).await {
                    Ok(heads) => break heads,
                    Err(_) => metrics.log_repairs.of(LogRepairResult::Failed).inc(),
                }
                tokio::time::sleep(READ_RETRY_DELAY).await;
            };
            ShardCommand::HeadsRead { rooms, read_era, heads }
        });
    }

    /// Appends lost messages again, oldest first.
    pub(super) fn reappend_lost(&self, batch: &mut ShardBatch) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::LostEntriesNotReappended,
        ) {
            batch.lost.clear();
        }
        let deadline = batch.retention.now + REAPPEND_MAX;
        for (room, envelope) in std::mem::take(&mut batch.lost) {
            self.metrics.reappended_messages.inc();
            let (name, id) = (room.clone(), envelope.id());
            let ticket = PublishTicket::new(move |result| {
                if let Err(error) = result {
                    // Another node may hold the entry too, and the sender may repeat it.
                    tracing::debug!(room = %name, %id, %error,
                        "a lost message was not appended again");
                }
            });
            let unseen = UnseenPolicy::Unlimited;
            self.bus.append(Append { room, envelope, urgent: true, unseen, deadline, ticket });
        }
    }
}
