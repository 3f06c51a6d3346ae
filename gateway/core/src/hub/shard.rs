//! The task that owns a share of the rooms: it fans out received entries, executes commands, and
//! does periodic work once a second.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, RoomKind, UserId},
    protocol::server_frame::{LeftFrame, ServerFrame},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    budget::{MemoryBudget, RoomMemory},
    commands::{HubOptions, READ_RETRY_DELAY, ReadPurpose, ShardCommand},
    join::{JoinOutcome, JoinProgress, PendingJoin},
    lingering::{Lingering, linger_of},
    member::ShardBatch,
    room::Room,
    status::WatchedUsers,
};
use crate::{
    bus::{Bus, ResyncRequest, ShardMessage, ShardReceiver},
    connection::handle::ConnectionHandle,
    delivery::{
        Entry, ReplicaSnapshot,
        replica::{ReadState, RetentionContext},
    },
    drain::Tasks,
    presence::PresenceTracker,
    rooms::RoomRules,
    telemetry::{
        metrics::{EntryResult, Metrics},
        trail::MessageTrails,
    },
};

/// The interval at which a shard compares the heads of idle rooms' logs with its replicas. It
/// bounds the time to detect a lost subscription that shows in no other way: at most twice this.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(5);
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
    /// Boxed, since a map allocates more slots than it uses.
    pub(super) rooms: HashMap<RoomId, Box<Room>>,
    /// Counts subscriptions, so that a late result for an earlier subscription is not applied to a
    /// later one.
    generation: u64,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) presence: Arc<PresenceTracker>,
    pub(super) rules: Arc<RoomRules>,
    pub(super) tasks: Tasks,
    pub(super) commands: mpsc::Sender<ShardCommand>,
    pub(super) batch: ShardBatch,
    pub(super) budget: MemoryBudget,
    lingering: Lingering,
    empty_rooms_max: usize,
    /// The number of rooms that are not inboxes.
    joined_rooms: usize,
    rooms_max: usize,
    /// The state of the read of log heads.
    pub(super) comparing: ReadState,
    /// The time at which the heads of idle rooms were last compared.
    heads_compared_at: Instant,
    pub(super) resync: Arc<ResyncRequest>,
    /// The number of resync requests that the shard has seen.
    pub(super) resyncs_seen: u64,
    /// The resync request that is complete once no room is unverified.
    pub(super) resync_running: u64,
    /// The number of unverified rooms.
    pub(super) unverified: usize,
    /// Whether the node has no lease: it then delivers nothing.
    pub(super) suspended: bool,
    /// Counts the events that void earlier reads: the node lost its lease, or sent the snapshots
    /// from which a new Redis server is restored.
    pub(super) read_generation: u64,
    /// The number of catch-up reads under way.
    pub(super) catch_up_reads: usize,
    /// Rooms that wait for a catch-up read.
    pub(super) waiting_for_read: VecDeque<(RoomId, u64)>,
    /// The number of memberships at the last count.
    members: usize,
    /// The times at which rooms have presence work due.
    pub(super) presence_due: BTreeSet<(Instant, RoomId)>,
    /// The time at which incomplete rosters are read again.
    pub(super) roster_retry_at: Option<Instant>,
    /// The number of incomplete reads in a row.
    pub(super) incomplete_reads: u32,
    /// The users whose status a connection here watches.
    pub(super) watched: WatchedUsers,
    pub(super) watched_users_max: usize,
    /// The number of watched users at the last count.
    pub(super) watched_counted: usize,
    /// The users whose status is to be read.
    pub(super) statuses_to_read: Vec<UserId>,
}

impl Shard {
    pub(super) fn new(
        (bus, presence, rules): (Arc<dyn Bus>, Arc<PresenceTracker>, Arc<RoomRules>),
        commands: mpsc::Sender<ShardCommand>,
        messages: &ShardReceiver,
        options: HubOptions,
        (metrics, trails): (Arc<Metrics>, Arc<MessageTrails>),
        tasks: &Tasks,
    ) -> Self {
        let budget = MemoryBudget::new(&options, metrics.clone());
        let now = Instant::now();
        let retention = RetentionContext {
            ring: budget.ring_limits(),
            ids_for: options.dedup_window,
            entries_for: options.log_ttl,
            now,
        };
        Self {
            rooms: HashMap::new(),
            generation: 0,
            bus,
            presence,
            rules,
            tasks: tasks.clone(),
            commands,
            batch: ShardBatch::new(retention, (metrics, trails), messages.node_state.clone()),
            budget,
            lingering: Lingering::default(),
            empty_rooms_max: options.empty_rooms_max,
            joined_rooms: 0,
            rooms_max: options.rooms_max,
            comparing: ReadState::Idle,
            heads_compared_at: now,
            resync: messages.resync.clone(),
            resyncs_seen: 0,
            resync_running: 0,
            unverified: 0,
            suspended: false,
            read_generation: 0,
            catch_up_reads: 0,
            waiting_for_read: VecDeque::new(),
            members: 0,
            presence_due: BTreeSet::new(),
            roster_retry_at: None,
            incomplete_reads: 0,
            watched: WatchedUsers::default(),
            watched_users_max: options.watched_users_max,
            watched_counted: 0,
            statuses_to_read: Vec::new(),
        }
    }

    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<ShardCommand>,
        mut messages: mpsc::Receiver<ShardMessage>,
    ) {
        let (stopped, resync) = (self.tasks.stopped().clone(), self.resync.clone());
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
                () = sleep_until(self.next_presence_due()) => {}
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
                    ShardMessage::Entry(room, entry) => self.receive(room, entry),
                    ShardMessage::Ephemeral(room, event) => self.handle_event(&room, event),
                    ShardMessage::Snapshots(reply) => self.send_snapshots(reply),
                }
            }
            if self.resync.count() != self.resyncs_seen {
                self.resyncs_seen = self.resync.count();
                self.resync_all();
            }
            if ticked {
                self.tick(started);
            }
            for command in commands.drain(..) {
                self.execute(command);
            }
            self.send_due_presence(started);
            self.read_statuses();
            self.reappend_lost();
            self.batch.finish();
            if worth_timing {
                let seconds = started.elapsed().as_secs_f64();
                self.batch.metrics.fan_out_seconds.observe(seconds);
            }
        }
    }

    fn execute(&mut self, command: ShardCommand) {
        match command {
            ShardCommand::Join(room, join) => self.join(room, join),
            ShardCommand::Leave { room, connection, reply } => self.leave(room, connection, reply),
            ShardCommand::CancelJoin { room, handle } => self.cancel_join(&room, &handle),
            ShardCommand::CatchUp { room, connection } => self.catch_up(&room, connection),
            ShardCommand::PresentAfter { room, after, limit, reply } => {
                // The caller may have gone.
                let _ = reply.send(self.present_after(&room, &after, limit));
            }
            ShardCommand::CloseConnections { room, which, before, close, done } => {
                self.close_connections(&room, which, before, &close);
                let _ = done.send(());
            }
            ShardCommand::RemoveUser { room, user, before, done } => {
                self.remove(&room, &user, before);
                let _ = done.send(());
            }
            ShardCommand::Broadcast(frame) => self.broadcast(frame),
            ShardCommand::Connections { room, reply } => {
                let _ = reply.send(self.connections(room.as_ref()));
            }
            ShardCommand::Cursors { room, user, reply } => {
                let _ = reply.send(self.cursors(&room, &user));
            }
            ShardCommand::Watch { mut users, handle, report_now, rejected } => {
                users.retain(|user| !self.watch(user.clone(), handle.clone(), report_now.clone()));
                // The caller may have gone.
                let _ = rejected.send(users);
            }
            ShardCommand::Unwatch { users, connection } => {
                users.iter().for_each(|user| self.unwatch(user, connection));
            }
            ShardCommand::RemoveConnection(connection) => self.remove_connection(connection),
            ShardCommand::StatusesRead { users, statuses } => self.apply_statuses(users, statuses),
            ShardCommand::QueryPresence { room, query } => self.query_presence(&room, query),
            ShardCommand::RostersRead { rooms, snapshots } => self.apply_rosters(rooms, snapshots),
            ShardCommand::HeadsRead { rooms, read_generation, heads } => {
                self.heads_read(rooms, read_generation, &heads);
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
            self.read_generation += 1;
            tracing::warn!(
                "lease lost: delivery suspended until the cluster agrees on the Redis primary"
            );
        }
        if was_suspended && !self.suspended {
            self.resync_all();
            let mut names: Vec<RoomId> = self.rooms.keys().cloned().collect();
            names.sort_unstable();
            for name in names {
                self.catch_up_all(&name);
            }
        }
    }

    /// Whether a read must not be used: it began before an event that voids earlier reads, or the
    /// node has no lease.
    pub(super) fn is_stale(&self, read_generation: u64) -> bool {
        self.suspended || self.read_generation != read_generation
    }

    fn receive(&mut self, name: RoomId, entry: Entry) {
        if self.suspended {
            self.batch.metrics.bus_entries_received.of(EntryResult::NoLease).inc();
            return;
        }
        let Some(room) = self.rooms.get_mut(&name) else {
            self.batch.metrics.bus_entries_received.of(EntryResult::NotSubscribed).inc();
            return;
        };
        self.batch.retention.ring = self.budget.ring_limits();
        let before = RoomMemory::of(room);
        let next = room.receive(entry, &mut self.batch);
        self.budget.count(before, room, self.batch.retention.now);
        self.act_on(&name, next);
        self.forget_ids();
    }

    fn send_snapshots(&mut self, reply: oneshot::Sender<Vec<ReplicaSnapshot>>) {
        let snapshots = self.rooms.values().filter_map(|room| room.snapshot(&self.batch));
        let mut snapshots: Vec<ReplicaSnapshot> = snapshots.collect();
        snapshots.sort_unstable_by(|a, b| a.room.cmp(&b.room));
        // A read under way may come from the former server and bring entries that the new server
        // never receives.
        self.read_generation += 1;
        // The caller may have moved on to yet another server.
        let _ = reply.send(snapshots);
    }

    /// Removes ids that are older than the dedup window, and the oldest ids while all ids exceed
    /// the memory budget.
    pub(super) fn forget_ids(&mut self) {
        let now = self.batch.retention.now;
        while let Some(bucket) = self.budget.next_to_forget(now) {
            let room = self.rooms.get_mut(&bucket.room);
            let Some(room) = room.filter(|room| room.generation == bucket.generation) else {
                continue;
            };
            if room.replica.ids().oldest() == Some(bucket.since) {
                let before = RoomMemory::of(room);
                room.replica.forget_oldest_ids();
                self.budget.count(before, room, now);
            }
        }
    }

    /// Compares the log heads of rooms that have received nothing since the last comparison.
    fn compare_idle(&mut self, now: Instant) {
        if self.suspended
            || now - self.heads_compared_at < COMPARE_INTERVAL
            || self.comparing != ReadState::Idle
        {
            return;
        }
        self.heads_compared_at = now;
        let mut rooms = Vec::new();
        for (name, room) in &mut self.rooms {
            let received = std::mem::take(&mut room.received);
            if room.durable && !received && room.replica.read_state() == ReadState::Idle {
                rooms.push((name.clone(), room.generation));
            }
        }
        self.compare_heads(rooms);
    }

    pub(super) fn join(&mut self, name: RoomId, join: PendingJoin) {
        if join.done.is_closed() {
            // The connection has left while its join waited here.
            return self.note_if_idle(&name);
        }
        let Some(room) = self.rooms.get_mut(&name) else {
            return self.open(name, join);
        };
        if room.replica.read_state() != ReadState::Idle {
            room.queue_join(join);
            return;
        }
        let progress = if self.batch.serves(&name) {
            room.join(join, &mut self.batch)
        } else {
            room.queue_join(join);
            JoinProgress::Refresh
        };
        self.continue_join(&name, progress);
    }

    /// Does what a join needs.
    pub(super) fn continue_join(&mut self, name: &RoomId, progress: JoinProgress) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match progress {
            JoinProgress::Done => self.note_if_idle(name),
            JoinProgress::Read(join, range) => {
                room.idle_since = None;
                let generation = room.generation;
                let purpose = ReadPurpose::Join(join);
                self.read(name.clone(), generation, purpose, range, Duration::ZERO);
            }
            JoinProgress::Refresh => {
                // The read may complete before the node is allowed to answer joins.
                let pause = if self.batch.serves(name) { Duration::ZERO } else { READ_RETRY_DELAY };
                self.read_forward_after(name, pause);
            }
        }
    }

    /// Opens a room: subscribes to it, then reads its log.
    fn open(&mut self, name: RoomId, join: PendingJoin) {
        let is_joined = name.kind() == RoomKind::Room;
        if is_joined && !self.make_space_for_room() {
            let _ = join.done.send(JoinOutcome::TooManyRooms);
            return;
        }
        self.joined_rooms += usize::from(is_joined);
        self.generation += 1;
        let durable = self.rules.is_durable(&name);
        let mut room = Box::new(Room::opening(name.clone(), self.generation, durable));
        room.queue_join(join);
        let range = room.replica.next_read();
        self.batch.count_room(&name, 1);
        self.rooms.insert(name.clone(), room);
        self.read(name, self.generation, ReadPurpose::Open, range, Duration::ZERO);
    }

    /// Whether the node may subscribe to one more room. A lingering room is dropped to free a
    /// place.
    fn make_space_for_room(&mut self) -> bool {
        for _ in 0..EVICTION_SCAN_MAX {
            if self.joined_rooms < self.rooms_max {
                break;
            }
            match self.lingering.pop_oldest() {
                Some(name) => self.drop_if_empty(&name, None),
                None => break,
            };
        }
        self.joined_rooms < self.rooms_max
    }

    /// Drops a room that was taken out of the lingering rooms if it has no members and, with `now`,
    /// if its time is over. Returns whether it was dropped.
    fn drop_if_empty(&mut self, name: &RoomId, now: Option<Instant>) -> bool {
        let Some(room) = self.rooms.get_mut(name) else { return false };
        room.lingers_until = None;
        let until = room.idle_since.map(|since| since + linger_of(name));
        let is_over = now.is_none_or(|now| until.is_some_and(|until| until <= now));
        let drops = room.is_empty() && is_over;
        if drops {
            self.drop_room(name);
        }
        drops
    }

    /// Drops a room and unsubscribes from it.
    pub(super) fn drop_room(&mut self, name: &RoomId) {
        self.mark_verified(name);
        if let Some(mut room) = self.rooms.remove(name) {
            self.joined_rooms -= usize::from(name.kind() == RoomKind::Room);
            self.budget.forget(&room);
            self.lingering.remove(&mut room);
            self.batch.count_room(name, -1);
            self.bus.unsubscribe(room.name);
        }
    }

    fn catch_up(&mut self, name: &RoomId, connection: ConnectionId) {
        if self.suspended {
            // All members are caught up once the node has a lease.
            return;
        }
        if let Some(room) = self.rooms.get_mut(name) {
            room.catch_up(connection, &mut self.batch);
            self.start_catch_up_read(name);
        }
    }

    /// Catches up all members of a room that are behind.
    pub(super) fn catch_up_all(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name).filter(|_| !self.suspended) else { return };
        for connection in room.members.behind() {
            room.catch_up(connection, &mut self.batch);
        }
        self.start_catch_up_read(name);
    }

    fn leave(
        &mut self,
        name: RoomId,
        connection: ConnectionId,
        reply: Option<(Arc<ConnectionHandle>, Bytes)>,
    ) {
        if let Some(room) = self.rooms.get_mut(&name) {
            room.members.remove(connection);
            self.note_if_idle(&name);
        }
        if let Some((handle, frame)) = reply {
            handle.release_reservations(&name);
            handle.outbox.push(frame);
            self.batch.flush_later(&handle);
        }
    }

    fn remove_connection(&mut self, connection: ConnectionId) {
        let here = self.rooms.values().filter(|room| room.members.get(connection).is_some());
        let rooms: Vec<RoomId> = here.map(|room| room.name.clone()).collect();
        for room in rooms {
            self.leave(room, connection, None);
        }
        for watch in self.watched.values_mut() {
            watch.remove(connection);
        }
    }

    fn cancel_join(&mut self, name: &RoomId, handle: &Arc<ConnectionHandle>) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.members.remove(handle.connection) {
            if let Some(room) = name.client_visible() {
                handle.send(&ServerFrame::Left(LeftFrame { reference: None, room, reason: None }));
                self.batch.flush_later(handle);
            }
            self.note_if_idle(name);
        }
    }

    pub(super) fn note_if_idle(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.is_empty() && room.idle_since.is_none() {
            let now = Instant::now();
            room.idle_since = Some(now);
            self.lingering.insert(room, now);
        }
        while self.lingering.len() > self.empty_rooms_max
            && let Some(name) = self.lingering.pop_oldest()
        {
            self.drop_if_empty(&name, None);
        }
    }

    /// Periodic work: drops lingering rooms whose time is over, and frees state that is no longer
    /// used.
    fn tick(&mut self, now: Instant) {
        self.compare_idle(now);
        let mut left = UNSUBSCRIBES_PER_TICK_MAX;
        while left > 0
            && let Some(name) = self.lingering.next_due(now)
        {
            left -= usize::from(self.drop_if_empty(&name, Some(now)));
        }
        self.retry_rosters(now);
        self.remove_unwatched();
        self.forget_ids();
        let mut members = 0;
        for room in self.rooms.values_mut() {
            room.joins.remove_cancelled();
            let before = RoomMemory::of(room);
            room.replica.forget_past_retention(&self.batch.retention);
            self.budget.count(before, room, now);
            if room.name.kind() == RoomKind::Room {
                members += room.members.len();
            }
        }
        self.batch.metrics.members.add(members as i64 - self.members as i64);
        self.members = members;
    }
}
