//! One connection as the hub sees it: its outbox, and its cursor in a room.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId, RoomKind, SessionId, UserId},
    position::Position,
    protocol::{
        FrameRef,
        server_frame::{AckFrame, RecoveryFailure, ResetFrame, ServerFrame},
    },
};
use skein_websocket::Opcode;
use smallvec::SmallVec;

use crate::{
    bus::{
        node_state::NodeState,
        presence_store::{PresenceVersion, UnixMillis, unix_millis_now},
        sessions::{ConnectionInfo, UnixMicros},
    },
    delivery::{Entry, replica::RetentionContext},
    envelope::Envelope,
    outbox::{OfferResult, Outbox, deflate::DeflateOptions},
    telemetry::{metrics::Metrics, trail::MessageTrails},
};

/// A connection that can join rooms. Hub and session share it.
#[derive(Debug)]
pub struct ConnectionHandle {
    /// The id of the connection.
    pub connection: ConnectionId,
    /// The owner; `None` for diagnostic connections.
    owner: Option<Owner>,
    /// The queue of frames to the client.
    pub outbox: Outbox,
    /// The liveness of the client.
    pub health: Health,
    /// The number of publishes that the bus has not answered.
    pending_publishes: AtomicU32,
    /// The number of rejected frames that the input meter has not counted yet.
    refused: AtomicU32,
    /// Rooms from which the connection was evicted and whose presence guards the session still
    /// holds.
    evicted: Mutex<Vec<RoomId>>,
    /// Whether `evicted` is not empty.
    has_evictions: AtomicBool,
    /// Inline acks of messages sent with `echo:false`.
    inline_acks: Mutex<BTreeMap<(RoomId, MessageId), InlineAck>>,
}

/// The last sign of life of a client, and its round-trip time.
#[derive(Debug, Default)]
pub struct Health {
    last_activity: AtomicU64,
    /// The last round-trip time in milliseconds, plus one; 0: no measurement.
    rtt: AtomicU32,
}

impl Health {
    /// Records that the client sent something.
    pub fn record_activity(&self, now: UnixMillis) {
        self.last_activity.store(now, Ordering::Relaxed);
    }

    /// The time at which the client last sent something.
    pub fn last_activity(&self) -> UnixMillis {
        self.last_activity.load(Ordering::Relaxed)
    }

    /// Records the round-trip time of a ping.
    pub fn record_rtt(&self, rtt: Duration) {
        self.rtt.store((rtt.as_millis() as u32).saturating_add(1), Ordering::Relaxed);
    }

    /// The round-trip time of the last ping, in milliseconds.
    pub fn rtt_ms(&self) -> Option<u32> {
        self.rtt.load(Ordering::Relaxed).checked_sub(1)
    }
}

/// The owner of a connection.
#[derive(Debug)]
pub struct Owner {
    /// The user.
    pub user: UserId,
    /// The session.
    pub session: SessionId,
    /// The time at which the connection was opened, by the clock of the control commands.
    pub since: UnixMicros,
    /// The properties of the connection that the API reports.
    pub about: Arc<ConnectionInfo>,
}

/// An `ack` that takes the place of the sender's copy in the order of entries.
#[derive(Clone, Debug)]
pub struct InlineAck {
    /// The `ref` of the message.
    pub reference: Option<FrameRef>,
    /// The recipient of a direct.
    pub to: Option<UserId>,
    /// The time at which the message was accepted.
    pub timestamp: String,
    state: InlineAckState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum InlineAckState {
    /// The bus has not answered, and the entry has not been received.
    Open,
    /// The bus has answered with this position.
    Appended(Position),
    /// The entry is no longer expected: the connection has left, or the log was lost.
    Released,
}

impl InlineAck {
    /// An `ack` whose entry is on its way.
    pub fn new(reference: Option<FrameRef>, to: Option<UserId>, timestamp: String) -> Self {
        Self { reference, to, timestamp, state: InlineAckState::Open }
    }

    /// The `ack` frame. Out of its place it carries `duplicate`, since only then does a client
    /// leave its cursor unchanged.
    fn at(
        self,
        room: &RoomId,
        id: MessageId,
        position: Position,
        duplicate: bool,
    ) -> ServerFrame<Box<RawValue>> {
        ServerFrame::Ack(Box::new(AckFrame {
            reference: self.reference,
            id,
            room: room.client_visible(),
            to: self.to,
            epoch: position.epoch,
            seq: position.seq,
            timestamp: self.timestamp,
            duplicate,
        }))
    }
}

impl ConnectionHandle {
    /// A connection without an owner and without rooms.
    pub fn new(connection: ConnectionId, outbox: Outbox) -> Self {
        #[cfg(debug_assertions)]
        crate::fault_injection::on_connect();
        let (pending_publishes, refused, inline_acks) = (0.into(), 0.into(), Mutex::default());
        let health = Health::default();
        let (evicted, has_evictions) = (Mutex::default(), false.into());
        Self {
            connection,
            owner: None,
            outbox,
            health,
            pending_publishes,
            refused,
            evicted,
            has_evictions,
            inline_acks,
        }
    }

    /// Sets the owner.
    pub fn with_owner(self, owner: Owner) -> Self {
        self.health.record_activity(unix_millis_now());
        Self { owner: Some(owner), ..self }
    }

    /// The owner, if there is one.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// Whether the connection belongs to `user`.
    pub fn belongs_to(&self, user: &UserId) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.user == *user)
    }

    /// Records an eviction, so that the session drops its presence guard.
    pub(super) fn evict_from(&self, room: &RoomId) {
        self.evicted.lock().push(room.clone());
        self.has_evictions.store(true, Ordering::Release);
        self.outbox.wake();
    }

    /// Takes the rooms from which the connection was evicted since the last call.
    pub fn take_evicted(&self) -> Vec<RoomId> {
        if !self.has_evictions.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.evicted.lock())
    }

    /// Counts a publish that was passed to the bus.
    pub fn begin_publish(&self) {
        self.pending_publishes.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts a publish that the bus has answered.
    pub fn end_publish(&self) {
        self.pending_publishes.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the bus has answered every publish.
    pub fn has_no_pending_publish(&self) -> bool {
        self.pending_publishes.load(Ordering::Acquire) == 0
    }

    /// Counts a rejected frame.
    pub fn count_rejected(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the number of frames rejected since the last call.
    pub fn take_rejected(&self) -> u32 {
        match self.refused.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.refused.swap(0, Ordering::Relaxed),
        }
    }

    /// Sends a reply that has no order relative to other frames; it overtakes frames that a slow
    /// socket has not taken.
    pub fn send_ahead(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.outbox.push_ahead(text_frame(frame));
    }

    /// Sends a frame after all queued ones.
    pub fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.outbox.push(text_frame(frame));
    }

    /// Reserves the place of a message's copy for its `ack`. `false`: an earlier send of the same
    /// id holds the reservation, and this send is a repeat.
    #[must_use]
    pub fn reserve_ack(&self, room: &RoomId, id: MessageId, ack: InlineAck) -> bool {
        let mut reserved = self.inline_acks.lock();
        let entry = reserved.entry((room.clone(), id));
        let vacant = matches!(entry, std::collections::btree_map::Entry::Vacant(_));
        entry.or_insert(ack);
        vacant
    }

    /// Cancels a reservation. `false`: the `ack` was already sent.
    pub fn cancel_ack(&self, room: &RoomId, id: MessageId) -> bool {
        self.inline_acks.lock().remove(&(room.clone(), id)).is_some()
    }

    /// Notes that the bus has appended `id` at `position`. The `ack` is sent with the received
    /// entry, or here if the entry is no longer expected.
    pub fn appended(&self, room: &RoomId, id: MessageId, position: Position) {
        let key = (room.clone(), id);
        let released = {
            let mut reserved = self.inline_acks.lock();
            let Some(ack) = reserved.get_mut(&key) else { return };
            if ack.state == InlineAckState::Released {
                reserved.remove(&key)
            } else {
                ack.state = InlineAckState::Appended(position.clone());
                None
            }
        };
        if let Some(ack) = released {
            self.send(&ack.at(&key.0, id, position, true));
        }
    }

    /// Releases all reservations in `room`, whose entries are no longer expected.
    pub fn release_reservations(&self, room: &RoomId) {
        let mut released = Vec::new();
        self.inline_acks.lock().retain(|(of, id), ack| {
            if of != room {
                return true;
            }
            match std::mem::replace(&mut ack.state, InlineAckState::Released) {
                InlineAckState::Appended(position) => {
                    released.push(ack.clone().at(room, *id, position, true));
                    false
                }
                InlineAckState::Open | InlineAckState::Released => true,
            }
        });
        for ack in released {
            self.send(&ack);
        }
    }

    /// The `ack` reserved for `entry`, if this connection sent it without echo.
    fn inline_ack(&self, room: &RoomId, entry: &Entry) -> Option<Bytes> {
        if entry.envelope.sender_without_echo() != Some(self.connection) {
            return None;
        }
        let key = (room.clone(), entry.envelope.id());
        let reserved = self.inline_acks.lock();
        let ack = reserved.get(&key)?.clone();
        Some(text_frame(&ack.at(&key.0, key.1, entry.position.clone(), false)))
    }
}

/// Encodes a frame as WebSocket text.
pub fn text_frame(frame: &ServerFrame<Box<RawValue>>) -> Bytes {
    let json = serde_json::to_vec(frame).expect("a frame is JSON");
    skein_websocket::encode(Opcode::Text, &[&json])
}

/// The shared state of one batch of a shard, and the work that is done at its end.
#[derive(Debug)]
pub(super) struct ShardBatch {
    pub(super) retention: RetentionContext,
    pub(super) metrics: Arc<Metrics>,
    pub(super) trails: Arc<MessageTrails>,
    pub(super) node_state: Arc<NodeState>,
    /// Messages that a log has lost, oldest first.
    pub(super) lost: Vec<(RoomId, Envelope)>,
    /// Connections with frames to write.
    touched: Vec<Arc<ConnectionHandle>>,
    /// The number of entries queued in outboxes.
    deliveries: u64,
    /// The number of members that fell behind.
    new_slow_consumers: u64,
}

impl ShardBatch {
    pub(super) fn new(
        retention: RetentionContext,
        (metrics, trails): (Arc<Metrics>, Arc<MessageTrails>),
        node_state: Arc<NodeState>,
    ) -> Self {
        let (lost, touched) = (Vec::new(), Vec::new());
        Self {
            retention,
            metrics,
            trails,
            node_state,
            lost,
            touched,
            deliveries: 0,
            new_slow_consumers: 0,
        }
    }

    /// Whether joins of `room` may be answered. Until the cluster agrees on a Redis primary, the
    /// replica may hold entries that do not survive.
    pub(super) fn serves(&self, room: &RoomId) -> bool {
        self.node_state.can_serve(self.retention.now, room)
    }

    /// Writes the outbox of `handle` at the end of the batch.
    pub(super) fn flush_later(&mut self, handle: &Arc<ConnectionHandle>) {
        self.touched.push(handle.clone());
    }

    /// Counts a subscription or its end.
    pub(super) fn count_room(&self, room: &RoomId, more: i64) {
        match room.kind() {
            RoomKind::Inbox => self.metrics.inboxes.add(more),
            RoomKind::Room | RoomKind::Status => self.metrics.rooms.add(more),
        }
    }

    /// Writes to every affected socket, once.
    pub(super) fn finish(&mut self) {
        for handle in self.touched.drain(..) {
            handle.outbox.flush();
        }
        self.metrics.deliveries.inc_by(std::mem::take(&mut self.deliveries));
        self.metrics.slow_consumers.inc_by(std::mem::take(&mut self.new_slow_consumers));
    }
}

/// One connection in one room.
#[derive(Debug)]
pub(super) struct RoomMember {
    pub(super) handle: Arc<ConnectionHandle>,
    /// The position of the last entry delivered, or of the last `reset`.
    pub(super) cursor: Position,
    pub(super) state: MemberState,
    /// The presence version with which the member joined: it includes all older changes.
    pub(super) presence_version: PresenceVersion,
}

/// Whether a member receives entries as they arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemberState {
    /// It does.
    Live,
    /// It receives older entries first, when its outbox has space.
    Behind,
    /// As `Behind`, waiting for a read of the log.
    AwaitingRead,
}

/// A frame for many receivers: encoded once, and compressed once for each requested window.
pub(super) struct SharedFrame {
    plain: Bytes,
    /// `None` if the frame is never compressed.
    deflated: Option<SmallVec<[(DeflateOptions, Bytes); 1]>>,
}

impl SharedFrame {
    pub(super) fn new(plain: Bytes) -> Self {
        Self { plain, deflated: Some(SmallVec::new()) }
    }

    /// The encoding for `outbox`.
    fn to(&mut self, outbox: &Outbox, metrics: &Metrics) -> &Bytes {
        let Self { plain, deflated } = self;
        let (Some(params), Some(all)) = (outbox.deflate_options(), deflated) else {
            return plain;
        };
        let index = all.iter().position(|(of, _)| *of == params).unwrap_or_else(|| {
            all.push((params, params.frame(plain, metrics)));
            all.len() - 1
        });
        &all[index].1
    }
}

/// The frame of one entry, encoded on first use and shared by all receivers.
pub(super) struct EntryFrames<'a> {
    room: &'a RoomId,
    entry: &'a Entry,
    replay: bool,
    compress: bool,
    shared: Option<SharedFrame>,
}

impl<'a> EntryFrames<'a> {
    pub(super) fn live(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self { room, entry, replay: false, compress: true, shared: None }
    }

    pub(super) fn replay(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self { replay: true, ..Self::live(room, entry) }
    }

    /// A replay for one member. It is not compressed, since every slow reader would otherwise cost
    /// as much as all others of the room together.
    pub(super) fn replay_uncompressed(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self { compress: false, ..Self::replay(room, entry) }
    }

    /// The encoding for `outbox`.
    fn to(&mut self, outbox: &Outbox, metrics: &Metrics) -> &Bytes {
        let Self { entry, replay, compress, .. } = *self;
        let shared = self.shared.get_or_insert_with(|| {
            let plain = if replay {
                entry.envelope.replay_frame(&entry.position)
            } else {
                entry.envelope.live_frame(&entry.position)
            };
            SharedFrame { plain, deflated: compress.then(SmallVec::new) }
        });
        shared.to(outbox, metrics)
    }
}

impl RoomMember {
    /// A member that has received everything up to `cursor`.
    pub(super) fn new(handle: Arc<ConnectionHandle>, cursor: Position, state: MemberState) -> Self {
        Self { handle, cursor, state, presence_version: PresenceVersion::default() }
    }

    /// Whether a presence change is newer than what the member was told on joining.
    pub(super) fn has_not_seen(&self, version: PresenceVersion) -> bool {
        self.presence_version.epoch != version.epoch
            || self.presence_version.number < version.number
    }

    /// Sends a frame that may be lost: it is dropped if the outbox is full.
    pub(super) fn send_ephemeral(&self, frame: &mut SharedFrame, batch: &mut ShardBatch) {
        let frame = frame.to(&self.handle.outbox, &batch.metrics);
        self.offer(frame, batch);
    }

    /// As [`RoomMember::send_ephemeral`], for a message of a room without a log.
    pub(super) fn send_ephemeral_message(
        &self,
        frames: &mut EntryFrames<'_>,
        batch: &mut ShardBatch,
    ) {
        if frames.entry.envelope.sender_without_echo() != Some(self.handle.connection) {
            let frame = frames.to(&self.handle.outbox, &batch.metrics);
            self.offer(frame, batch);
        }
    }

    fn offer(&self, frame: &Bytes, batch: &mut ShardBatch) {
        match self.handle.outbox.offer(frame) {
            OfferResult::First => batch.flush_later(&self.handle),
            OfferResult::Queued => {}
            OfferResult::Full => {
                batch.metrics.ephemeral_events_dropped.inc();
                return;
            }
        }
        batch.metrics.ephemeral_events.inc();
    }

    /// Delivers the next entry. `false`: the outbox is full, and the member is behind from here on.
    pub(super) fn deliver(&mut self, frames: &mut EntryFrames<'_>, batch: &mut ShardBatch) -> bool {
        let (room, entry) = (frames.room, frames.entry);
        #[cfg(debug_assertions)]
        crate::fault_injection::panic_in("a shard", entry.envelope.fields());
        let reserved = self.handle.inline_ack(room, entry);
        let outbox = &self.handle.outbox;
        let frame = match &reserved {
            Some(ack) => ack,
            None => frames.to(outbox, &batch.metrics),
        };
        #[cfg(debug_assertions)]
        if let Some(frames) = crate::fault_injection::deliver(self.handle.connection, frame) {
            frames.into_iter().for_each(|frame| outbox.push(frame));
            batch.flush_later(&self.handle);
            self.cursor.seq = entry.position.seq;
            return true;
        }
        let mut offer = outbox.offer(frame);
        if offer == OfferResult::Full {
            // The frames gathered in this batch may be all that fills the outbox.
            outbox.flush();
            offer = outbox.offer(frame);
        }
        match offer {
            OfferResult::First => batch.flush_later(&self.handle),
            OfferResult::Queued => {}
            OfferResult::Full => {
                if self.state == MemberState::Live {
                    batch.new_slow_consumers += 1;
                }
                self.state = MemberState::Behind;
                outbox.mark_lagging(room.clone());
                return false;
            }
        }
        if reserved.is_some() {
            self.handle.cancel_ack(room, entry.envelope.id());
        }
        debug_assert_eq!(
            self.cursor.epoch, entry.position.epoch,
            "an epoch change is delivered first"
        );
        self.cursor.seq = entry.position.seq;
        batch.deliveries += 1;
        true
    }

    /// Tells the member that its log continues at `position`, with no entries before.
    pub(super) fn reset(
        &mut self,
        room: &RoomId,
        position: &Position,
        reason: RecoveryFailure,
        batch: &mut ShardBatch,
    ) {
        self.handle.release_reservations(room);
        self.handle.send(&ServerFrame::Reset(ResetFrame {
            room: room.client_visible(),
            epoch: position.epoch.clone(),
            seq: position.seq,
            reason,
        }));
        self.cursor = position.clone();
        batch.flush_later(&self.handle);
    }

    /// Tells a member that has received everything before that its log continues in another epoch.
    pub(super) fn change_epoch(&mut self, room: &RoomId, to: &Position, batch: &mut ShardBatch) {
        self.reset(room, to, RecoveryFailure::LogLost, batch);
    }
}
