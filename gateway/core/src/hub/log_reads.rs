//! The requests of a shard to the bus: log reads, comparison of heads, log restores. Each is a task
//! that puts its result into the shard's queue.

use std::time::Duration;

use skein_protocol::{ids::RoomId, position::Position, protocol::server_frame::RoomClosedReason};

use super::{
    budget::RoomMemory,
    catch_up::CatchUpOutcome,
    commands::{LogReadRequest, READ_RETRY_DELAY, ReadPurpose, ShardCommand},
    join::JoinProgress,
    shard::Shard,
};
use crate::{
    bus::{Append, BusError, ReadRange, UnseenPolicy},
    delivery::{
        ReplicaSnapshot,
        page::{LogPage, READ_LEN},
        replica::{NextAction, ReadState},
    },
    telemetry::metrics::LogRepairResult,
};

/// The time for which a lost entry is tried to be appended again.
const REAPPEND_MAX: Duration = Duration::from_secs(30);
/// The most catch-up reads of a shard under way, which bounds the memory of their results.
const CATCH_UP_READS_MAX: usize = 16;

impl Shard {
    /// Starts a resync: entries of any room may have been lost, so all logs are compared with their
    /// replicas.
    pub(super) fn resync_all(&mut self) {
        if self.comparing != ReadState::Idle {
            self.comparing = ReadState::Again;
            return;
        }
        self.resync_running = self.resyncs_seen;
        self.unverified = self.rooms.values().filter(|room| room.durable).count();
        let mut rooms = Vec::with_capacity(self.unverified);
        for (name, room) in self.rooms.iter_mut().filter(|(_, room)| room.durable) {
            room.unverified = true;
            if !room.replica.read_again() {
                rooms.push((name.clone(), room.generation));
            }
        }
        self.compare_heads(rooms);
        self.report_if_synced();
        self.read_rosters(self.rooms.keys().cloned().collect());
        self.reread_statuses();
    }

    /// Marks a room as verified since the last resync, or as dropped.
    pub(super) fn mark_verified(&mut self, name: &RoomId) {
        if let Some(room) = self.rooms.get_mut(name)
            && std::mem::take(&mut room.unverified)
        {
            self.unverified -= 1;
            self.report_if_synced();
        }
    }

    fn report_if_synced(&self) {
        if self.unverified == 0 {
            self.resync.mark_synced(self.resync_running);
        }
    }

    /// Reads the heads of `rooms` in a task, until it succeeds.
    pub(super) fn compare_heads(&mut self, mut rooms: Vec<(RoomId, u64)>) {
        if rooms.is_empty() {
            return;
        }
        rooms.sort_unstable();
        self.comparing = ReadState::InProgress;
        let (bus, commands, read_generation) =
            (self.bus.clone(), self.commands.clone(), self.read_generation);
        let metrics = self.batch.metrics.clone();
        let read_heads = async move {
            let names: Vec<RoomId> = rooms.iter().map(|(name, _)| name.clone()).collect();
            let heads = loop {
                match bus.heads(names.clone()).await {
                    Ok(heads) => break heads,
                    Err(_) => metrics.log_repairs.of(LogRepairResult::Failed).inc(),
                }
                tokio::time::sleep(READ_RETRY_DELAY).await;
            };
            let _ = commands.send(ShardCommand::HeadsRead { rooms, read_generation, heads }).await;
        };
        self.spawn("compare_heads", read_heads);
    }

    /// Reads forward in each room whose log holds entries that the replica lacks.
    pub(super) fn heads_read(
        &mut self,
        rooms: Vec<(RoomId, u64)>,
        read_generation: u64,
        heads: &[Option<Position>],
    ) {
        let again = self.comparing == ReadState::Again || self.is_stale(read_generation);
        self.comparing = ReadState::Idle;
        for ((name, generation), head) in rooms.into_iter().zip(heads) {
            let room = self.rooms.get(&name).filter(|room| room.generation == generation);
            let Some(room) = room else { continue };
            if !room.replica.has_reached(head.as_ref()) {
                self.read_forward(&name);
            } else if !again && room.replica.read_state() == ReadState::Idle {
                self.mark_verified(&name);
            }
        }
        // Without a lease, reacquiring it starts a resync.
        if again && !self.suspended {
            self.resync_all();
        }
    }

    /// Reads a room's log from the replica's top, or once more after the read under way.
    pub(super) fn read_forward(&mut self, name: &RoomId) {
        self.read_forward_after(name, Duration::ZERO);
    }

    /// As [`Shard::read_forward`], after a pause.
    pub(super) fn read_forward_after(&mut self, name: &RoomId, pause: Duration) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if !room.replica.read_again() {
            room.replica.begin_read();
            let (generation, range) = (room.generation, room.replica.next_read());
            self.read(name.clone(), generation, ReadPurpose::Continue, range, pause);
        }
    }

    /// Executes the next action of a replica.
    pub(super) fn act_on(&mut self, name: &RoomId, next: NextAction) {
        match next {
            NextAction::Nothing => {}
            NextAction::Read => self.read_forward(name),
            NextAction::Restore => self.restore(name),
        }
    }

    /// Lets the bus restore a room's log from the replica's snapshot, then reads it.
    fn restore(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let Some(snapshot) = room.snapshot(&self.batch) else { return };
        tracing::error!(room = %name, top = %snapshot.top,
            "the log of a room diverged from its replica or lacks delivered entries: restoring");
        room.replica.begin_read();
        // Twice in a row: the server does not hold the restored log yet.
        let pause = if room.restoring { READ_RETRY_DELAY } else { Duration::ZERO };
        room.restoring = true;
        let (generation, range) = (room.generation, room.replica.next_read());
        let request = self.read_request(name.clone(), generation, ReadPurpose::Continue);
        self.spawn_read(request, Some(snapshot), range, pause);
    }

    /// Reads a log in a task, which puts the result into this shard's queue.
    pub(super) fn read(
        &self,
        room: RoomId,
        generation: u64,
        purpose: ReadPurpose,
        range: ReadRange,
        pause: Duration,
    ) {
        self.spawn_read(self.read_request(room, generation, purpose), None, range, pause);
    }

    fn read_request(&self, room: RoomId, generation: u64, purpose: ReadPurpose) -> LogReadRequest {
        LogReadRequest { room, generation, read_generation: self.read_generation, purpose }
    }

    fn spawn_read(
        &self,
        request: LogReadRequest,
        restore: Option<ReplicaSnapshot>,
        range: ReadRange,
        pause: Duration,
    ) {
        let (bus, commands) = (self.bus.clone(), self.commands.clone());
        let metrics = self.batch.metrics.clone();
        let durable = self.rules.is_durable(&request.room);
        let read = async move {
            // A sleep of zero would last one tick of the clock.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            if let ReadPurpose::Open = request.purpose
                && let Err(error) = bus.subscribe(request.room.clone()).await
            {
                let _ = commands.send(ShardCommand::LogRead { request, result: Err(error) }).await;
                return;
            }
            if !durable {
                let _ = commands
                    .send(ShardCommand::LogRead { request, result: Ok(LogPage::without_log()) })
                    .await;
                return;
            }
            if let Some(snapshots) = restore {
                while bus.restore(snapshots.clone()).await.is_err() {
                    metrics.log_repairs.of(LogRepairResult::Failed).inc();
                    tokio::time::sleep(READ_RETRY_DELAY).await;
                }
            }
            let mut request = request;
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
            let _ = commands.send(ShardCommand::LogRead { request, result }).await;
        };
        self.spawn("read_log", read);
    }

    /// Handles the result of a read.
    pub(super) fn log_read(&mut self, request: LogReadRequest, result: Result<LogPage, BusError>) {
        let LogReadRequest { room: name, generation, read_generation, purpose } = request;
        if let ReadPurpose::CatchUp(_) = purpose {
            self.catch_up_read_ended();
        }
        let is_old = self.is_stale(read_generation);
        if let (ReadPurpose::Open, Ok(_)) = (&purpose, &result) {
            // The room is subscribed by now, so no presence change is missed.
            self.read_rosters(vec![name.clone()]);
        }
        let Some(room) = self.rooms.get_mut(&name).filter(|room| room.generation == generation)
        else {
            return;
        };
        match (purpose, result) {
            (ReadPurpose::Open, Err(_)) => {
                // Dropping the joins notifies their sessions.
                self.drop_room(&name);
            }
            (ReadPurpose::Open | ReadPurpose::Continue, Ok(_)) if is_old => {
                let range = room.replica.next_read();
                let pause = if self.suspended { READ_RETRY_DELAY } else { Duration::ZERO };
                self.read(name, generation, ReadPurpose::Continue, range, pause);
            }
            (ReadPurpose::Open | ReadPurpose::Continue, Ok(page)) => {
                self.apply_log_page(&name, page);
            }
            (ReadPurpose::Join(join), Ok(page)) => {
                let progress = if is_old || !self.batch.serves(&name) {
                    room.queue_join(join);
                    JoinProgress::Refresh
                } else {
                    room.join_with_page(join, page, &mut self.batch)
                };
                self.continue_join(&name, progress);
            }
            (ReadPurpose::Join(join), Err(_)) => {
                drop(join);
                self.note_if_idle(&name);
            }
            (ReadPurpose::CatchUp(_), Ok(_)) if is_old => {
                room.catch_up.abandon_read(&mut room.members);
                self.catch_up_all(&name);
            }
            (ReadPurpose::CatchUp(from), Ok(page)) => {
                match room.catch_up_with_page(from, page, &mut self.batch) {
                    CatchUpOutcome::More(members) => {
                        for member in members {
                            room.catch_up(member, &mut self.batch);
                        }
                        self.start_catch_up_read(&name);
                    }
                    CatchUpOutcome::OtherLog => self.read_forward(&name),
                }
            }
            // These reads are repeated until they succeed.
            (ReadPurpose::Continue | ReadPurpose::CatchUp(_), Err(_)) => {}
        }
    }

    fn apply_log_page(&mut self, name: &RoomId, page: LogPage) {
        self.batch.retention.ring = self.budget.ring_limits();
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.was_deleted(&page) {
            // This node was disconnected when the deletion was published.
            return self.close_room(name, RoomClosedReason::Deleted, None);
        }
        let before = RoomMemory::of(room);
        let bytes = page.bytes();
        let next = room.apply_page(page, &mut self.batch);
        self.budget.count(before, room, self.batch.retention.now);
        room.restoring &= next == NextAction::Restore;
        let waiting = room.joins.take(bytes);
        self.act_on(name, next);
        self.forget_ids();
        if next == NextAction::Nothing {
            self.mark_verified(name);
        }
        self.catch_up_all(name);
        for join in waiting {
            self.join(name.clone(), join);
        }
        self.note_if_idle(name);
    }

    /// Starts a read of the log for members of a room that wait for one, unless one is under way,
    /// or queues it.
    pub(super) fn start_catch_up_read(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name).filter(|room| room.catch_up.needs_read()) else {
            return;
        };
        if self.catch_up_reads >= CATCH_UP_READS_MAX {
            room.catch_up.queue_read();
            self.waiting_for_read.push_back((name.clone(), room.generation));
            return;
        }
        self.begin_catch_up_read(name);
    }

    fn begin_catch_up_read(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let Some(seq) = room.catch_up.begin_read(&room.members) else { return };
        self.catch_up_reads += 1;
        let (purpose, range) =
            (ReadPurpose::CatchUp(seq), ReadRange::After { seq, limit: READ_LEN });
        let generation = room.generation;
        self.read(name.clone(), generation, purpose, range, Duration::ZERO);
    }

    /// A catch-up read has ended, so that a read of another room may start.
    fn catch_up_read_ended(&mut self) {
        self.catch_up_reads -= 1;
        while self.catch_up_reads < CATCH_UP_READS_MAX
            && let Some((name, generation)) = self.waiting_for_read.pop_front()
        {
            if self.rooms.get(&name).is_some_and(|room| room.generation == generation) {
                self.begin_catch_up_read(&name);
            }
        }
    }

    /// Appends lost messages again, oldest first.
    pub(super) fn reappend_lost(&mut self) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::LostEntriesNotReappended,
        ) {
            self.batch.lost.clear();
        }
        let deadline = self.batch.retention.now + REAPPEND_MAX;
        for (room, envelope) in std::mem::take(&mut self.batch.lost) {
            self.batch.metrics.reappended_messages.inc();
            let (name, id) = (room.clone(), envelope.id());
            let done = Box::new(move |result: Result<_, BusError>| {
                if let Err(error) = result {
                    // Another node may hold the entry too, and the sender may repeat it.
                    tracing::debug!(room = %name, %id, %error,
                        "a lost message was not appended again");
                }
            });
            let unseen = UnseenPolicy::Unlimited;
            self.bus.append(Append { room, envelope, urgent: true, unseen, deadline, done });
        }
    }

    pub(super) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let stopped = self.tasks.stopped().clone();
        self.tasks.spawn_job(name, async move {
            // Both arms are cancel-safe: after the stop the result is not needed.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = task => {}
            }
        });
    }
}
