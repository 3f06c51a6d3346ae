//! The task that owns a share of the rooms: it fans out received entries, executes commands, and
//! does periodic work once a second.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, RoomKind},
    position::Position,
    protocol::server_frame::{LeftFrame, RoomClosedFrame, RoomClosedReason, ServerFrame},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    budget::MemoryBudget,
    catch_up::CatchUpOutcome,
    commands::{
        HubOptions, HubServices, LogReadRequest, READ_RETRY_DELAY, ReadPurpose, ShardCommand,
        ShardTasks,
    },
    control,
    join::{JoinOutcome, JoinProgress, PendingJoin},
    log_reads::LogReads,
    member::ShardBatch,
    presence::{self, PresenceQuery},
    resync::Resync,
    room::Room,
    rooms::Rooms,
    rosters::{IncompleteReads, Rosters},
    status::Statuses,
};
use crate::{
    bus::{Bus, BusError, ShardMessage, ShardReceiver, presence_store::EphemeralEvent},
    connection::handle::ConnectionHandle,
    delivery::{
        Entry, ReplicaSnapshot,
        page::LogPage,
        replica::{NextAction, ReadState, RetentionContext},
    },
    presence::PresenceTracker,
    rooms::RoomRules,
    telemetry::metrics::EntryResult,
};

/// The most messages and commands in one batch, so that queued frames are written soon.
const BATCH_LEN: usize = 512;
/// The most rooms that a shard unsubscribes from in one tick, so that a batch stays short.
const UNSUBSCRIBES_PER_TICK_MAX: usize = 5000;
/// The most lingering rooms that are examined to free a place for another room.
const EVICTION_SCAN_MAX: usize = 16;

/// Resolves at `time`, or never. Cancel-safe.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The state of one shard.
pub(super) struct Shard {
    rooms: Rooms,
    reads: LogReads,
    resync: Resync,
    rosters: Rosters,
    statuses: Statuses,
    incomplete: IncompleteReads,
    batch: ShardBatch,
    /// Whether the node has no lease: it then delivers nothing.
    suspended: bool,
    bus: Arc<dyn Bus>,
    presence: Arc<PresenceTracker>,
    rules: Arc<RoomRules>,
    tasks: ShardTasks,
}

impl Shard {
    pub(super) fn new(
        services: HubServices,
        messages: &ShardReceiver,
        options: &HubOptions,
        tasks: ShardTasks,
    ) -> Self {
        let HubServices { bus, presence, rules, metrics, trails, tracer } = services;
        let budget = MemoryBudget::new(options, metrics.clone());
        let now = Instant::now();
        let retention = RetentionContext {
            ring: budget.ring_limits(),
            ids_for: options.dedup_window,
            entries_for: options.log_ttl,
            now,
        };
        let watched_max = options.watched_users_max;
        Self {
            rooms: Rooms::new(options, budget),
            reads: LogReads::new(bus.clone(), tasks.clone(), metrics.clone()),
            resync: Resync::new(messages.resync.clone(), now),
            rosters: Rosters::new(presence.clone(), tasks.clone()),
            statuses: Statuses::new(watched_max, bus.clone(), presence.clone(), tasks.clone()),
            incomplete: IncompleteReads::default(),
            batch: ShardBatch::new(retention, metrics, trails, tracer, messages.node_state.clone()),
            // A node that starts has not lost a lease.
            suspended: !messages.node_state.holds_lease(now),
            bus,
            presence,
            rules,
            tasks,
        }
    }

    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<ShardCommand>,
        mut messages: mpsc::Receiver<ShardMessage>,
    ) {
        let stopped = self.tasks.stopped().clone();
        let resync = self.resync.request().clone();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut commands, mut received) = (Vec::new(), Vec::new());
        loop {
            let mut ticked = false;
            // All arms are cancel-safe. No arm starves another: messages and resync requests are
            // checked in every batch.
            tokio::select! {
                biased;
                () = stopped.cancelled() => break,
                _ = tick.tick() => ticked = true,
                _ = queue.recv_many(&mut commands, BATCH_LEN) => {}
                _ = messages.recv_many(&mut received, BATCH_LEN) => {}
                () = resync.requested() => {}
                () = sleep_until(self.rosters.next_due()) => {}
            }
            if !received.is_empty() {
                // The sender of the first message woke this task, which would otherwise run next
                // and find one message. The yield lets all other ready tasks run first, and their
                // messages leave in one write per socket: 3 to 6 times less CPU under load
                // (docs/adr/0011).
                tokio::task::yield_now().await;
            }
            // Messages received before a command was sent are fanned out before the command: a
            // client that sends and then leaves receives its own copy.
            while received.len() < BATCH_LEN
                && let Ok(message) = messages.try_recv()
            {
                received.push(message);
            }
            let started = Instant::now();
            self.batch.retention.now = started;
            self.check_lease(started);
            let worth_timing = !received.is_empty();
            for message in received.drain(..) {
                match message {
                    ShardMessage::Entry(room, entry) => self.receive(&room, entry),
                    ShardMessage::Ephemeral(room, event) => self.handle_event(&room, event),
                    ShardMessage::Snapshots(reply) => self.send_snapshots(reply),
                }
            }
            if self.resync.take_request() {
                self.resync_all();
            }
            if ticked {
                self.tick(started);
            }
            for command in commands.drain(..) {
                self.execute(command);
            }
            self.rosters.send_due(&mut self.rooms, &mut self.batch);
            self.statuses.read_requested();
            self.reads.reappend_lost(&mut self.batch);
            self.batch.finish();
            if worth_timing {
                let seconds = started.elapsed().as_secs_f64();
                self.batch.metrics.fan_out_seconds.observe(seconds);
            }
        }
    }

    fn execute(&mut self, command: ShardCommand) {
        match command {
            ShardCommand::Join(room, join) => self.join(&room, join),
            ShardCommand::Leave { room, connection, reply } => self.leave(&room, connection, reply),
            ShardCommand::CancelJoin { room, handle } => self.cancel_join(&room, &handle),
            ShardCommand::CatchUp { room, connection } => self.catch_up(&room, connection),
            ShardCommand::CloseConnections { room, which, before, close, done } => {
                if let Some(inbox) = self.rooms.get(&room) {
                    control::close_connections(&inbox.members, which, before, &close);
                }
                let _ = done.send(());
            }
            ShardCommand::RemoveUser { room, user, before, done } => {
                if let Some(room) = self.rooms.get_mut(&room) {
                    control::remove_user(room, &user, before, &mut self.batch);
                }
                self.note_use(&room);
                let _ = done.send(());
            }
            ShardCommand::Broadcast(frame) => {
                control::broadcast(&self.rooms, frame, &mut self.batch);
            }
            ShardCommand::Connections { room, reply } => {
                let _ = reply.send(control::connections(&self.rooms, room.as_ref()));
            }
            ShardCommand::Cursors { room, user, reply } => {
                let room = self.rooms.get(&room);
                let _ = reply.send(
                    room.map_or_else(Vec::new, |room| control::cursors(&room.members, &user)),
                );
            }
            ShardCommand::Watch { mut users, handle, report_now, rejected } => {
                users.retain(|user| {
                    !self.statuses.watch(user.clone(), handle.clone(), report_now.clone())
                });
                // The caller may have gone.
                let _ = rejected.send(users);
            }
            ShardCommand::Unwatch { users, connection } => {
                users.iter().for_each(|user| self.statuses.unwatch(user, connection));
            }
            ShardCommand::RemoveConnection(connection) => self.remove_connection(connection),
            ShardCommand::StatusesRead { users, statuses } => {
                self.statuses.apply(users, statuses, &mut self.incomplete, &mut self.batch);
            }
            ShardCommand::PresentAfter { room, request } => {
                if let Some(room) = self.rooms.get_mut(&room) {
                    room.presence.request_page(request, &room.name, &mut self.batch);
                }
            }
            ShardCommand::QueryPresence { room, query } => self.query_presence(&room, query),
            ShardCommand::RostersRead { rooms, snapshots } => {
                let (incomplete, batch) = (&mut self.incomplete, &mut self.batch);
                self.rosters.apply(rooms, snapshots, incomplete, &mut self.rooms, batch);
            }
            ShardCommand::HeadsRead { rooms, read_era, heads } => {
                self.heads_read(rooms, read_era, &heads);
            }
            ShardCommand::LogRead { request, result } => self.log_read(request, result),
        }
    }

    /// Checks whether the node holds its lease. After a lost lease the node may have missed
    /// entries, and members that are behind were not caught up: both are repaired here.
    fn check_lease(&mut self, now: Instant) {
        let was_suspended =
            std::mem::replace(&mut self.suspended, !self.batch.node_state.holds_lease(now));
        if self.suspended && !was_suspended {
            self.reads.void();
            tracing::warn!(
                "lease lost: delivery suspended until the cluster agrees on the Redis primary"
            );
        }
        if was_suspended && !self.suspended {
            self.resync_all();
            for name in self.rooms.names() {
                self.catch_up_all(&name);
            }
        }
    }

    /// Whether a read must not be used: it began before an event that voids earlier reads, or the
    /// node has no lease.
    fn is_stale(&self, read_era: u64) -> bool {
        self.suspended || self.reads.is_void(read_era)
    }

    fn receive(&mut self, name: &RoomId, entry: Entry) {
        if self.suspended {
            self.batch.metrics.bus_entries_received.of(EntryResult::NoLease).inc();
            return;
        }
        let receive = |room: &mut Room, batch: &mut ShardBatch| room.receive(entry, batch);
        let Some(next) = self.rooms.change(name, &mut self.batch, receive) else {
            self.batch.metrics.bus_entries_received.of(EntryResult::NotSubscribed).inc();
            return;
        };
        self.act_on(name, next);
        self.rooms.forget_ids(self.batch.retention.now);
    }

    fn handle_event(&mut self, name: &RoomId, event: EphemeralEvent) {
        match event {
            // Also without a lease: the receivers read nothing afterwards.
            EphemeralEvent::Closed { reason, by } => self.close_room(name, reason, by),
            _ if self.suspended => {}
            EphemeralEvent::Status => self.statuses.note_change(name),
            EphemeralEvent::LogDeleted => self.read_forward(name, Duration::ZERO),
            event => {
                let Some(room) = self.rooms.get_mut(name) else { return };
                let read = room.apply_event(event, self.presence.options(), &mut self.batch);
                self.rosters.schedule(room);
                if read {
                    self.rosters.read(vec![name.clone()], &mut self.rooms);
                }
            }
        }
    }

    fn send_snapshots(&mut self, reply: oneshot::Sender<Vec<ReplicaSnapshot>>) {
        let snapshots = self.rooms.iter().filter_map(|room| room.snapshot(&self.batch));
        let mut snapshots: Vec<ReplicaSnapshot> = snapshots.collect();
        snapshots.sort_unstable_by(|a, b| a.room.cmp(&b.room));
        // A read under way may come from the former server and bring entries that the new server
        // never receives.
        self.reads.void();
        // The caller may have moved on to yet another server.
        let _ = reply.send(snapshots);
    }

    fn join(&mut self, name: &RoomId, join: PendingJoin) {
        if join.done.is_closed() {
            // The connection has left while its join waited here.
            return self.note_use(name);
        }
        let serves = self.batch.serves(name);
        let Some(room) = self.rooms.get_mut(name) else { return self.open(name, join) };
        if room.replica.read_state() != ReadState::Idle {
            room.joins.wait(join);
            return self.rooms.keep(name);
        }
        let progress = if serves {
            room.join(join, &mut self.batch)
        } else {
            room.joins.wait(join);
            JoinProgress::Refresh
        };
        self.continue_join(name, progress);
    }

    /// Does what a join needs.
    fn continue_join(&mut self, name: &RoomId, progress: JoinProgress) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match progress {
            JoinProgress::Done => self.note_use(name),
            JoinProgress::Read(join, range) => {
                self.reads.for_join(room, join, range);
                self.rooms.keep(name);
            }
            JoinProgress::Refresh => {
                self.rooms.keep(name);
                // The read may complete before the node is allowed to answer joins.
                let pause = if self.batch.serves(name) { Duration::ZERO } else { READ_RETRY_DELAY };
                self.read_forward(name, pause);
            }
        }
    }

    /// Opens a room: subscribes to it, then reads its log.
    fn open(&mut self, name: &RoomId, join: PendingJoin) {
        if name.kind() == RoomKind::Room && !self.make_space_for_room() {
            let _ = join.done.send(JoinOutcome::TooManyRooms);
            return;
        }
        let room = self.rooms.open(name, &self.rules);
        room.joins.wait(join);
        self.reads.open(room);
        self.batch.count_room(name, 1);
    }

    /// Whether the node may subscribe to one more room. A lingering room is dropped to free a
    /// place.
    fn make_space_for_room(&mut self) -> bool {
        for _ in 0..EVICTION_SCAN_MAX {
            if !self.rooms.is_full() {
                break;
            }
            match self.rooms.oldest_empty() {
                Some(name) => self.drop_room(&name),
                None => break,
            }
        }
        !self.rooms.is_full()
    }

    /// Drops a room and unsubscribes from it.
    fn drop_room(&mut self, name: &RoomId) {
        self.resync.mark_verified(name);
        if self.rooms.remove(name) {
            self.batch.count_room(name, -1);
            self.bus.unsubscribe(name.clone());
        }
    }

    /// Lets a room linger if it has no members, and drops the room that has lingered longest if
    /// there are too many.
    fn note_use(&mut self, name: &RoomId) {
        self.rooms.note_use(name, Instant::now());
        while let Some(name) = self.rooms.excess_empty() {
            self.drop_room(&name);
        }
    }

    fn catch_up(&mut self, name: &RoomId, connection: ConnectionId) {
        // If the node has no lease, all members are caught up once it has one.
        if let Some(room) = self.rooms.get_mut(name).filter(|_| !self.suspended) {
            room.catch_up(connection, &mut self.batch);
            self.reads.catch_up(room);
        }
    }

    /// Catches up all members of a room that are behind.
    fn catch_up_all(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name).filter(|_| !self.suspended) else { return };
        for connection in room.members.behind() {
            room.catch_up(connection, &mut self.batch);
        }
        self.reads.catch_up(room);
    }

    fn leave(
        &mut self,
        name: &RoomId,
        connection: ConnectionId,
        reply: Option<(Arc<ConnectionHandle>, Bytes)>,
    ) {
        if let Some(room) = self.rooms.get_mut(name) {
            room.members.remove(connection);
            self.note_use(name);
        }
        if let Some((handle, frame)) = reply {
            handle.release_reservations(name);
            handle.outbox.push(frame);
            self.batch.flush_later(&handle);
        }
    }

    fn remove_connection(&mut self, connection: ConnectionId) {
        let here = self.rooms.iter().filter(|room| room.members.get(connection).is_some());
        let rooms: Vec<RoomId> = here.map(|room| room.name.clone()).collect();
        for room in rooms {
            self.leave(&room, connection, None);
        }
        self.statuses.remove_connection(connection);
    }

    fn cancel_join(&mut self, name: &RoomId, handle: &Arc<ConnectionHandle>) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.members.remove(handle.connection) {
            if let Some(room) = name.client_visible() {
                handle.send(&ServerFrame::Left(LeftFrame { reference: None, room, reason: None }));
                self.batch.flush_later(handle);
            }
            self.note_use(name);
        }
    }

    /// Removes all members of a room that was closed or deleted.
    fn close_room(&mut self, name: &RoomId, reason: RoomClosedReason, by: Option<ConnectionId>) {
        // Before `room_closed` is sent, so that a frame sent in response to it is rejected.
        self.presence.close(name);
        let Some(room) = self.rooms.get_mut(name) else { return };
        let closed = RoomClosedFrame { reference: None, room: name.clone(), reason };
        let answer = ServerFrame::RoomClosed(closed);
        for member in room.members.take() {
            let handle = member.handle;
            handle.release_reservations(name);
            if Some(handle.connection) != by {
                handle.send(&answer);
            }
            self.batch.flush_later(&handle);
        }
        room.presence.reject_waiting(name, &mut self.batch);
        self.drop_room(name);
    }

    /// Answers a presence query once the roster has reached the query's version.
    fn query_presence(&mut self, name: &RoomId, query: PresenceQuery) {
        match self.rooms.get_mut(name) {
            Some(room) => room.presence.query(query, name, &mut self.batch),
            None => presence::reject(name, query, &mut self.batch),
        }
    }

    /// Starts a resync: entries of any room may have been lost, so all logs are compared with their
    /// replicas.
    fn resync_all(&mut self) {
        if self.resync.begin(&mut self.rooms, &self.reads) {
            self.rosters.read(self.rooms.names(), &mut self.rooms);
            self.statuses.request_all();
        }
    }

    /// Reads forward in each room whose log holds entries that the replica lacks.
    fn heads_read(&mut self, rooms: Vec<(RoomId, u64)>, read_era: u64, heads: &[Option<Position>]) {
        let again = self.resync.end_read() || self.is_stale(read_era);
        for ((name, subscription), head) in rooms.into_iter().zip(heads) {
            let Some(room) = self.rooms.current(&name, subscription) else { continue };
            if !room.replica.has_reached(head.as_ref()) {
                self.reads.forward(room, Duration::ZERO);
            } else if !again && room.replica.read_state() == ReadState::Idle {
                self.resync.mark_verified(&name);
            }
        }
        // Without a lease, reacquiring it starts a resync.
        if again && !self.suspended {
            self.resync_all();
        }
    }

    /// Reads a room's log from the replica's top, or once more after the read under way.
    fn read_forward(&mut self, name: &RoomId, pause: Duration) {
        if let Some(room) = self.rooms.get_mut(name) {
            self.reads.forward(room, pause);
        }
    }

    /// Executes the next action of a replica.
    fn act_on(&mut self, name: &RoomId, next: NextAction) {
        match next {
            NextAction::Nothing => {}
            NextAction::Read => self.read_forward(name, Duration::ZERO),
            NextAction::Restore => {
                if let Some(room) = self.rooms.get_mut(name) {
                    self.reads.restore(room, &self.batch);
                }
            }
        }
    }

    /// Handles the result of a read.
    fn log_read(&mut self, request: LogReadRequest, result: Result<LogPage, BusError>) {
        let LogReadRequest { room: name, subscription, read_era, purpose } = request;
        if let ReadPurpose::CatchUp(_) = purpose {
            self.reads.end_catch_up(&mut self.rooms);
        }
        let is_old = self.is_stale(read_era);
        if let (ReadPurpose::Open, Ok(_)) = (&purpose, &result) {
            // The room is subscribed by now, so no presence change is missed.
            self.rosters.read(vec![name.clone()], &mut self.rooms);
        }
        let Some(room) = self.rooms.current(&name, subscription) else { return };
        match (purpose, result) {
            (ReadPurpose::Open, Err(_)) => {
                // Dropping the joins notifies their sessions.
                self.drop_room(&name);
            }
            (ReadPurpose::Open | ReadPurpose::Continue, Ok(_)) if is_old => {
                let pause = if self.suspended { READ_RETRY_DELAY } else { Duration::ZERO };
                self.reads.repeat(room, pause);
            }
            (ReadPurpose::Open | ReadPurpose::Continue, Ok(page)) => {
                self.apply_log_page(&name, page);
            }
            (ReadPurpose::Join(join), Ok(page)) => {
                let progress = if is_old || !self.batch.serves(&name) {
                    room.joins.wait(join);
                    JoinProgress::Refresh
                } else {
                    room.join_with_page(join, page, &mut self.batch)
                };
                self.continue_join(&name, progress);
            }
            (ReadPurpose::Join(join), Err(_)) => {
                drop(join);
                self.note_use(&name);
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
                        self.reads.catch_up(room);
                    }
                    CatchUpOutcome::OtherLog => self.reads.forward(room, Duration::ZERO),
                }
            }
            // These reads are repeated until they succeed.
            (ReadPurpose::Continue | ReadPurpose::CatchUp(_), Err(_)) => {}
        }
    }

    fn apply_log_page(&mut self, name: &RoomId, page: LogPage) {
        if self.rooms.get(name).is_some_and(|room| room.was_deleted(&page)) {
            // This node was disconnected when the deletion was published.
            return self.close_room(name, RoomClosedReason::Deleted, None);
        }
        let bytes = page.bytes();
        let apply = |room: &mut Room, batch: &mut ShardBatch| {
            (room.apply_page(page, batch), room.joins.take(bytes))
        };
        let Some((next, waiting)) = self.rooms.change(name, &mut self.batch, apply) else { return };
        self.act_on(name, next);
        self.rooms.forget_ids(self.batch.retention.now);
        if next == NextAction::Nothing {
            self.resync.mark_verified(name);
        }
        self.catch_up_all(name);
        for join in waiting {
            self.join(name, join);
        }
        self.note_use(name);
    }

    /// Periodic work: drops lingering rooms whose time is over, and frees state that is no longer
    /// used.
    fn tick(&mut self, now: Instant) {
        if !self.suspended {
            self.resync.compare_idle(now, &mut self.rooms, &self.reads);
        }
        for _ in 0..UNSUBSCRIBES_PER_TICK_MAX {
            let Some(name) = self.rooms.expired_empty(now) else { break };
            self.drop_room(&name);
        }
        let repeat = self.incomplete.take_due(now);
        if repeat {
            self.statuses.request_all();
        }
        self.rosters.retry(repeat, &mut self.rooms, &mut self.batch);
        self.statuses.remove_unwatched(&self.batch.metrics);
        self.rooms.tick(&self.batch);
    }
}
