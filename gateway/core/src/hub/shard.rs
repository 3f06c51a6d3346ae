//! The task that owns some of the rooms: it hands out what arrives, takes commands, and looks around
//! once a second.

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
    COMPARE_INTERVAL, HubOptions, JoinOutcome, ReadPurpose, ShardCommand,
    budget::{MemoryBudget, RoomMemory},
    join::{JoinStep, PendingJoin},
    lingering::{Lingering, linger_of},
    log_reads::READ_RETRY_DELAY,
    member::{ConnectionHandle, ShardBatch},
    room::Room,
    status::WatchedUsers,
};
use crate::{
    bus::{Bus, ResyncRequest, ShardMessage, ShardReceiver},
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

/// How many messages and commands one batch takes, so that what was placed is written soon.
const BATCH_LEN: usize = 512;
/// The most rooms a shard unfollows in a second, so that a batch stays short.
const UNSUBSCRIBES_PER_TICK_MAX: usize = 5000;
/// How many rooms without members are looked at for a place for another room.
const EVICTION_SCAN_MAX: usize = 16;

/// Resolves at that time, or never. Cancel-safe.
async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The task of some rooms.
pub(super) struct Shard {
    /// Boxed, since a map has places for more than it holds.
    pub(super) rooms: HashMap<RoomId, Box<Room>>,
    /// Counts followings, so that an reply for an earlier one is not taken for a later one.
    generation: u64,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) presence: Arc<PresenceTracker>,
    pub(super) rules: Arc<RoomRules>,
    pub(super) tasks: Tasks,
    pub(super) commands: mpsc::Sender<ShardCommand>,
    pub(super) batch: ShardBatch,
    pub(super) budget: MemoryBudget,
    lingering: Lingering,
    lingering_rooms_max: usize,
    /// How many of the rooms are no inboxes.
    joined_rooms: usize,
    rooms_max: usize,
    /// Whether heads of logs are being asked for.
    pub(super) comparing: ReadState,
    /// When the rooms in which nothing arrives were compared last.
    heads_compared_at: Instant,
    pub(super) resync: Arc<ResyncRequest>,
    /// How many doubts were received of.
    pub(super) resyncs_seen: u64,
    /// The resync that is settled when no room is unverified any more.
    pub(super) resync_running: u64,
    /// How many rooms are unverified.
    pub(super) unverified: usize,
    /// Whether the node may pass nothing on.
    pub(super) suspended: bool,
    /// Counts the moments from which on earlier reads are void: the node lost its lease, or sent
    /// the snapshots from which a new Redis server is restored.
    pub(super) read_generation: u64,
    /// How many reads for members that are behind are under way.
    pub(super) catch_up_reads: usize,
    /// Rooms that wait for one.
    pub(super) waiting_for_read: VecDeque<(RoomId, u64)>,
    /// Memberships, as last counted.
    members: usize,
    /// When there is something to be looked at among the people of a room.
    pub(super) presence_due: BTreeSet<(Instant, RoomId)>,
    /// When rosters in which some may be missing are read again.
    pub(super) roster_retry_at: Option<Instant>,
    /// How often they were read so since all was whole.
    pub(super) incomplete_reads: u32,
    /// Users whose status somebody here wants to know.
    pub(super) watched: WatchedUsers,
    pub(super) watched_users_max: usize,
    /// How many they were when that was counted last.
    pub(super) watched_counted: usize,
    /// Those of whom it is to be read.
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
            lingering_rooms_max: options.lingering_rooms_max,
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
        let (mut commands, mut arrived) = (Vec::new(), Vec::new());
        loop {
            let mut ticked = false;
            // All arms are cancel-safe. None keeps another waiting: messages and resync are looked at
            // in every batch.
            tokio::select! {
                biased;
                () = stopped.cancelled() => break,
                _ = tick.tick() => ticked = true,
                _ = queue.recv_many(&mut commands, BATCH_LEN) => {}
                _ = messages.recv_many(&mut arrived, BATCH_LEN) => {}
                () = resync.requested() => {}
                () = sleep_until(self.next_presence_due()) => {}
            }
            if !arrived.is_empty() {
                // Who sent the first of them woke this task, which would run next and find one. All
                // others that are ready have their batch before, and what they send leaves in one
                // write per socket: 3 to 6 times less CPU under load (docs/adr/0011).
                tokio::task::yield_now().await;
            }
            // What arrived before a command was made is handed out before it: who sends and then leaves
            // gets its own copy.
            while arrived.len() < BATCH_LEN
                && let Ok(message) = messages.try_recv()
            {
                arrived.push(message);
            }
            let begun = Instant::now();
            self.batch.retention.now = begun;
            self.check_lease(begun);
            let worth_timing = !arrived.is_empty();
            for message in arrived.drain(..) {
                match message {
                    ShardMessage::Entry(room, entry) => self.receive(room, entry),
                    ShardMessage::Ephemeral(room, notice) => self.handle_event(&room, notice),
                    ShardMessage::Snapshots(reply) => self.send_snapshots(reply),
                }
            }
            if self.resync.count() != self.resyncs_seen {
                self.resyncs_seen = self.resync.count();
                self.resync_all();
            }
            if ticked {
                self.tick(begun);
            }
            for command in commands.drain(..) {
                self.execute(command);
            }
            self.send_due_presence(begun);
            self.read_statuses();
            self.reappend_lost();
            self.batch.finish();
            if worth_timing {
                let seconds = begun.elapsed().as_secs_f64();
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
                // Who asked may have gone.
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
            ShardCommand::Watch { mut users, handle, asks, rejected } => {
                users.retain(|user| !self.watch(user.clone(), handle.clone(), asks.clone()));
                // Who asked may have gone.
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
                self.heads_read(rooms, read_generation, &heads)
            }
            ShardCommand::LogRead { request, result } => self.log_read(request, result),
        }
    }

    /// Finds out whether the node may pass anything on. Where it may again, nobody knows what it
    /// missed, and members were not fed meanwhile.
    fn check_lease(&mut self, now: Instant) {
        let was_suspended =
            std::mem::replace(&mut self.suspended, !self.batch.node_state.holds_lease(now));
        if self.suspended && !was_suspended {
            self.read_generation += 1;
            tracing::warn!("this node passes nothing on before it has agreed with the others");
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

    /// Whether something was asked before the node lost its node_state, or cannot be used since it
    /// has none.
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
        let held = self.rooms.values().filter_map(|room| room.snapshot(&self.batch));
        let mut held: Vec<ReplicaSnapshot> = held.collect();
        held.sort_unstable_by(|a, b| a.room.cmp(&b.room));
        // A read that is under way may come from the former server, and bring entries that the new
        // one never gets.
        self.read_generation += 1;
        // Who asked may have met yet another server meanwhile.
        let _ = reply.send(held);
    }

    /// Forgets ids past the dedup window, and the oldest where all of them take too much.
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

    /// Compares the logs of rooms in which nothing has arrived for a while, as in a resync.
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
            // Its connection has left while it waited here.
            return self.note_if_idle(&name);
        }
        let Some(room) = self.rooms.get_mut(&name) else {
            return self.open(name, join);
        };
        if room.replica.read_state() != ReadState::Idle {
            room.queue_join(join);
            return;
        }
        let serves = self.batch.serves(&name);
        let step = if serves { room.join(join, &mut self.batch) } else { JoinStep::Wait(join) };
        self.run_join_step(&name, step);
    }

    pub(super) fn run_join_step(&mut self, name: &RoomId, step: JoinStep) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match step {
            JoinStep::Done => self.note_if_idle(name),
            JoinStep::Read(join, range) => {
                room.idle_since = None;
                let generation = room.generation;
                let purpose = ReadPurpose::Join(join);
                self.read(name.clone(), generation, purpose, range, Duration::ZERO);
            }
            JoinStep::Wait(join) => {
                room.queue_join(join);
                // A read may come back before the node may reply joins.
                let pause = if self.batch.serves(name) { Duration::ZERO } else { READ_RETRY_DELAY };
                self.read_forward_after(name, pause);
            }
        }
    }

    /// Follows a room: subscribes, then reads its log.
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
        let range = room.next_range();
        self.batch.count_room(&name, 1);
        self.rooms.insert(name.clone(), room);
        self.read(name, self.generation, ReadPurpose::Open, range, Duration::ZERO);
    }

    /// Whether one more room may be followed. One that lingers makes place for it.
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

    /// Ends the following of a room that was taken out of those that linger, if it is without members,
    /// for long enough where a time is given. Returns whether it was.
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

    /// Ends the following of a room.
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
            // All are fed when that is over.
            return;
        }
        if let Some(room) = self.rooms.get_mut(name) {
            room.catch_up(connection, &mut self.batch);
            self.start_catch_up_read(name);
        }
    }

    /// Gives all members that are behind what is there for them.
    pub(super) fn catch_up_all(&mut self, name: &RoomId) {
        let Some(room) = self.rooms.get_mut(name).filter(|_| !self.suspended) else { return };
        for connection in room.behind() {
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
            room.remove(connection);
            self.note_if_idle(&name);
        }
        if let Some((handle, frame)) = reply {
            handle.release_reservations(&name);
            handle.outbox.push(frame);
            self.batch.flush_later(&handle);
        }
    }

    fn remove_connection(&mut self, connection: ConnectionId) {
        let here = self.rooms.values().filter(|room| room.is_member(connection));
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
        if room.remove(handle.connection) {
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
        while self.lingering.len() > self.lingering_rooms_max
            && let Some(name) = self.lingering.pop_oldest()
        {
            self.drop_if_empty(&name, None);
        }
    }

    /// Unfollows rooms that have been without members for long enough, and forgets what nobody
    /// waits for or needs any more.
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
            room.remove_cancelled_joins();
            let before = RoomMemory::of(room);
            room.replica.forget_past_retention(&self.batch.retention);
            self.budget.count(before, room, now);
            if room.name.kind() == RoomKind::Room {
                members += room.len();
            }
        }
        self.batch.metrics.members.add(members as i64 - self.members as i64);
        self.members = members;
    }
}
