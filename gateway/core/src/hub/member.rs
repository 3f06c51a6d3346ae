//! One connection, as the hub sees it: where its frames go, and how far it is in a room.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::envelope::Envelope;
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
        registry::{PresenceVersion, UnixMillis, unix_millis_now},
        sessions::{ConnectionInfo, UnixMicros},
    },
    delivery::{Entry, replica::RetentionContext},
    outbox::{OfferResult, Outbox, deflate::DeflateOptions},
    telemetry::{metrics::Metrics, trail::MessageTrails},
};

/// A connection that can take part in rooms.
#[derive(Debug)]
pub struct ConnectionHandle {
    /// Its id.
    pub connection: ConnectionId,
    /// Whose it is, and since when. Diagnostic connections have nobody.
    owner: Option<Owner>,
    /// Where its frames go.
    pub outbox: Outbox,
    /// Whether it lives.
    pub health: Health,
    /// How many publishes were handed on and not answered.
    pending_publishes: AtomicU32,
    /// How many frames were refused for what they are, and not counted by the meter yet.
    refused: AtomicU32,
    /// Rooms that it was taken out of, and whose stays its session has to end.
    evicted: Mutex<Vec<RoomId>>,
    /// Whether there are any.
    has_evictions: AtomicBool,
    /// Messages it sent with `echo:false` whose `ack` is to stand where the copy would.
    inline_acks: Mutex<BTreeMap<(RoomId, MessageId), InlineAck>>,
}

/// Whether a connection lives, as far as its client lets itself be last_activity.
#[derive(Debug, Default)]
pub struct Health {
    last_activity: AtomicU64,
    /// The last round trip, in milliseconds and one more; 0 where there was none.
    rtt: AtomicU32,
}

impl Health {
    /// The client was last_activity.
    pub fn record_activity(&self, now: UnixMillis) {
        self.last_activity.store(now, Ordering::Relaxed);
    }

    /// When the client was last_activity last.
    pub fn last_activity(&self) -> UnixMillis {
        self.last_activity.load(Ordering::Relaxed)
    }

    /// A ping has come back.
    pub fn record_rtt(&self, rtt: Duration) {
        self.rtt.store((rtt.as_millis() as u32).saturating_add(1), Ordering::Relaxed);
    }

    /// How long the last ping took.
    pub fn rtt_ms(&self) -> Option<u32> {
        self.rtt.load(Ordering::Relaxed).checked_sub(1)
    }
}

/// Whose a connection is.
#[derive(Debug)]
pub struct Owner {
    /// The user.
    pub user: UserId,
    /// The session.
    pub session: SessionId,
    /// When it was opened, by the clock that orders are given by.
    pub since: UnixMicros,
    /// What is told of it.
    pub about: Arc<ConnectionInfo>,
}

/// An `ack` that is to stand in the place of a copy.
#[derive(Clone, Debug)]
pub struct InlineAck {
    /// The `ref` of the message.
    pub reference: Option<FrameRef>,
    /// Who a `direct` is for.
    pub to: Option<UserId>,
    /// When it was taken.
    pub timestamp: String,
    state: InlineAckState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum InlineAckState {
    /// Neither the bus has answered nor has the entry come by.
    Open,
    /// The bus has answered with this position.
    Appended(Position),
    /// The entry is not waited for any more: the connection has left, or its log was lost.
    Released,
}

impl InlineAck {
    /// An `ack` whose entry is on its way.
    pub fn new(reference: Option<FrameRef>, to: Option<UserId>, timestamp: String) -> Self {
        Self { reference, to, timestamp, state: InlineAckState::Open }
    }

    /// The `ack`. Out of its place it says `duplicate`, since only then a client leaves its cursor
    /// where it is.
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
    /// A connection without rooms.
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

    /// The same, of a user.
    pub fn with_owner(self, owner: Owner) -> Self {
        self.health.record_activity(unix_millis_now());
        Self { owner: Some(owner), ..self }
    }

    /// Whose it is.
    pub fn owner(&self) -> Option<&Owner> {
        self.owner.as_ref()
    }

    /// Whether it is `user`'s.
    pub fn belongs_to(&self, user: &UserId) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.user == *user)
    }

    /// Has the session end its stay in a room.
    pub(super) fn evict_from(&self, room: &RoomId) {
        self.evicted.lock().push(room.clone());
        self.has_evictions.store(true, Ordering::Release);
        self.outbox.wake();
    }

    /// The rooms that it was taken out of since this was last asked.
    pub fn take_evicted(&self) -> Vec<RoomId> {
        if !self.has_evictions.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.evicted.lock())
    }

    /// A publish is handed on, and its answer is to come.
    pub fn begin_publish(&self) {
        self.pending_publishes.fetch_add(1, Ordering::AcqRel);
    }

    /// It has come.
    pub fn end_publish(&self) {
        self.pending_publishes.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether every publish was answered.
    pub fn has_no_pending_publish(&self) -> bool {
        self.pending_publishes.load(Ordering::Acquire) == 0
    }

    /// Counts a frame that was refused for what it is.
    pub fn count_rejected(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// How many frames were refused since this was last asked.
    pub fn take_rejected(&self) -> u32 {
        match self.refused.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.refused.swap(0, Ordering::Relaxed),
        }
    }

    /// Sends a frame that answers the client's own and has no order with anything else: it goes ahead
    /// of what a slow socket does not take.
    pub fn send_ahead(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.outbox.push_ahead(text_frame(frame));
    }

    /// Sends a frame that answers the client's own.
    pub fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.outbox.push(text_frame(frame));
    }

    /// Has the `ack` of a message stand in the place of its copy. `false`: that of an earlier send
    /// of the same id does, and this one is a repeat.
    #[must_use]
    pub fn reserve_ack(&self, room: &RoomId, id: MessageId, ack: InlineAck) -> bool {
        let mut reserved = self.inline_acks.lock();
        let entry = reserved.entry((room.clone(), id));
        let vacant = matches!(entry, std::collections::btree_map::Entry::Vacant(_));
        entry.or_insert(ack);
        vacant
    }

    /// Takes that back. `false`: the `ack` has been sent.
    pub fn cancel_ack(&self, room: &RoomId, id: MessageId) -> bool {
        self.inline_acks.lock().remove(&(room.clone(), id)).is_some()
    }

    /// Notes that the bus has appended `id` at `position`. Its `ack` is sent when the entry comes
    /// by, or here where it will not.
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

    /// Gives up the places of acks in `room`: its entries do not come by any more.
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

    /// The `ack` that stands in the place of `entry`, if this connection asked for that.
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

/// A frame as it stands on the socket.
pub fn text_frame(frame: &ServerFrame<Box<RawValue>>) -> Bytes {
    let json = serde_json::to_vec(frame).expect("answers are made of text and numbers");
    skein_websocket::encode(Opcode::Text, &[&json])
}

/// What a batch of the hub goes by, and what it leaves to be done at its end.
#[derive(Debug)]
pub(super) struct ShardBatch {
    pub(super) retention: RetentionContext,
    pub(super) metrics: Arc<Metrics>,
    pub(super) trails: Arc<MessageTrails>,
    pub(super) node_state: Arc<NodeState>,
    /// Messages that a log has lost, oldest first.
    pub(super) lost: Vec<(RoomId, Envelope)>,
    /// Who has something to be written.
    touched: Vec<Arc<ConnectionHandle>>,
    /// How many entries were reserved in outboxes.
    deliveries: u64,
    /// How many members fell behind.
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

    /// Whether joins of `room` may be answered: until the nodes have agreed on a server, what is
    /// held may not be what is gone on with.
    pub(super) fn serves(&self, room: &RoomId) -> bool {
        self.node_state.can_serve(self.retention.now, room)
    }

    /// Has what `handle` holds written at the end of the batch.
    pub(super) fn flush_later(&mut self, handle: &Arc<ConnectionHandle>) {
        self.touched.push(handle.clone());
    }

    /// Counts a room that is followed from now on, or not any more.
    pub(super) fn count_room(&self, room: &RoomId, more: i64) {
        match room.kind() {
            RoomKind::Inbox => self.metrics.inboxes.add(more),
            RoomKind::Room | RoomKind::Status => self.metrics.rooms.add(more),
        }
    }

    /// Writes to every socket that has something, once.
    pub(super) fn finish(&mut self) {
        for handle in self.touched.drain(..) {
            handle.outbox.flush();
        }
        self.metrics.deliveries.inc_by(std::mem::take(&mut self.deliveries));
        self.metrics.slow_consumers.inc_by(std::mem::take(&mut self.new_slow_consumers));
    }
}

/// A connection's place in one room.
#[derive(Debug)]
pub(super) struct RoomMember {
    pub(super) handle: Arc<ConnectionHandle>,
    /// The last entry it was given, or where it was told to go on.
    pub(super) cursor: Position,
    pub(super) state: MemberState,
    /// What it was told of who is present when it came: older changes are part of that.
    pub(super) presence_version: PresenceVersion,
}

/// Whether a member gets entries as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MemberState {
    /// It does.
    Live,
    /// It is given older ones first, when its outbox has room.
    Behind,
    /// As `Behind`, and it waits for a read of the log.
    AwaitingRead,
}

/// A frame that many get: encoded once, and compressed once for each window that somebody asked for.
pub(super) struct SharedFrame {
    plain: Bytes,
    /// `None` where nothing is compressed.
    deflated: Option<SmallVec<[(DeflateOptions, Bytes); 1]>>,
}

impl SharedFrame {
    pub(super) fn new(plain: Bytes) -> Self {
        Self { plain, deflated: Some(SmallVec::new()) }
    }

    /// The frame that goes into `outbox`.
    fn to(&mut self, outbox: &Outbox, metrics: &Metrics) -> &Bytes {
        let Self { plain, deflated } = self;
        let (Some(params), Some(all)) = (outbox.deflate_options(), deflated) else {
            return plain;
        };
        let place = all.iter().position(|(of, _)| *of == params).unwrap_or_else(|| {
            all.push((params, params.frame(plain, metrics)));
            all.len() - 1
        });
        &all[place].1
    }
}

/// The frame of one entry, encoded when first needed, and shared by all who next it.
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

    /// A replay for one member alone. It is not compressed: every slow reader would cost the room
    /// as much as all others together.
    pub(super) fn replay_uncompressed(room: &'a RoomId, entry: &'a Entry) -> Self {
        Self { compress: false, ..Self::replay(room, entry) }
    }

    /// The frame that goes into `outbox`.
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
    /// A member that has been given everything up to `cursor`.
    pub(super) fn new(handle: Arc<ConnectionHandle>, cursor: Position, state: MemberState) -> Self {
        Self { handle, cursor, state, presence_version: PresenceVersion::default() }
    }

    /// Whether a change of who is present is news.
    pub(super) fn has_not_seen(&self, version: PresenceVersion) -> bool {
        self.presence_version.epoch != version.epoch
            || self.presence_version.number < version.number
    }

    /// Gives the member something that it may go without: where its outbox is full it is dropped.
    pub(super) fn send_ephemeral(&self, frame: &mut SharedFrame, batch: &mut ShardBatch) {
        let frame = frame.to(&self.handle.outbox, &batch.metrics);
        self.offer(frame, batch);
    }

    /// As [`RoomMember::send_ephemeral`], a message of a room without a log.
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

    /// Gives the member the next entry. `false`: its outbox is full, and it is behind from here.
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
            // What gathered in this batch may be all that is in the way.
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
        debug_assert_eq!(self.cursor.epoch, entry.position.epoch, "a bump is told of first");
        self.cursor.seq = entry.position.seq;
        batch.deliveries += 1;
        true
    }

    /// Tells the member that its log goes on at `position` and nowhere before.
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

    /// Tells the member, which was given everything before, that its log goes on in another epoch.
    pub(super) fn change_epoch(&mut self, room: &RoomId, to: &Position, batch: &mut ShardBatch) {
        self.reset(room, to, RecoveryFailure::LogLost, batch);
    }
}
