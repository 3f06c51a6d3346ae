//! One connection in one room: its cursor, and whether it receives entries as they arrive.

use std::{sync::Arc, time::SystemTime};

use skein_protocol::{
    ids::{RoomId, RoomKind},
    position::Position,
    protocol::server_frame::{RecoveryFailure, ResetFrame, ServerFrame},
};

use crate::{
    bus::{node_state::NodeState, presence_store::PresenceVersion},
    connection::{
        encoding::SharedFrame, handle::ConnectionHandle, outbox::OfferResult, signals::Signal,
    },
    delivery::{Entry, is_fault_injected, replica::RetentionContext},
    envelope::Envelope,
    telemetry::{
        metrics::{EntryKind, Label as _, Metrics},
        traces::{OpenSpan, SpanKind, Tracer},
        trail::{FanOutCounts, MessageTrails, MissedDelivery},
    },
};

/// The shared state of one batch of a shard, and the work that is done at its end.
#[derive(Debug)]
pub(super) struct ShardBatch {
    pub(super) retention: RetentionContext,
    pub(super) metrics: Arc<Metrics>,
    pub(super) trails: Arc<MessageTrails>,
    pub(super) node_state: Arc<NodeState>,
    tracer: Tracer,
    /// The spans of traced entries that were placed in outboxes.
    pub(super) fan_out_spans: Vec<OpenSpan>,
    /// Messages that a log has lost, oldest first.
    pub(super) lost: Vec<(RoomId, Envelope)>,
    /// Connections with frames to write.
    touched: Vec<Arc<ConnectionHandle>>,
    /// The number of entries queued in outboxes.
    deliveries: u64,
    /// The number of messages of each kind queued in outboxes.
    sent: [u64; EntryKind::ALL.len()],
    /// The message of this batch whose delivery is timed.
    timed: Option<Envelope>,
    /// The number of members that fell behind.
    new_slow_consumers: u64,
}

impl ShardBatch {
    pub(super) fn new(
        retention: RetentionContext,
        metrics: Arc<Metrics>,
        trails: Arc<MessageTrails>,
        tracer: Tracer,
        node_state: Arc<NodeState>,
    ) -> Self {
        let (lost, touched, fan_out_spans) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            retention,
            metrics,
            trails,
            node_state,
            tracer,
            fan_out_spans,
            lost,
            touched,
            deliveries: 0,
            sent: [0; EntryKind::ALL.len()],
            timed: None,
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

    /// Begins the span of a fan-out, if the message is traced. It ends with the batch, when the
    /// sockets have been written to.
    pub(super) fn begin_fan_out(&self, room: &RoomId, entry: &Entry) -> Option<OpenSpan> {
        if !self.tracer.is_on() {
            return None;
        }
        let publish = entry.envelope.trace()?;
        let mut span = self.tracer.begin_linked("deliver", SpanKind::Consumer, publish)?;
        span.set("messaging.message.id", entry.envelope.id().to_string());
        let room_key = match room.kind() {
            RoomKind::Inbox => "skein.inbox_of",
            RoomKind::Room | RoomKind::Status => "messaging.destination.name",
        };
        span.set(room_key, room.without_prefix().to_owned());
        Some(span)
    }

    /// Records and counts the fan-out of an entry with a position, and its span.
    pub(super) fn end_fan_out(
        &mut self,
        room: &RoomId,
        entry: &Entry,
        counts: FanOutCounts,
        missed: Vec<MissedDelivery>,
        span: Option<OpenSpan>,
    ) {
        if let Some(mut span) = span {
            span.set_position(&entry.position);
            span.set("skein.queued", i64::from(counts.queued));
            span.set("skein.lagged", i64::from(counts.lagged));
            span.set("skein.behind", i64::from(counts.behind));
            span.set("skein.without_echo", i64::from(counts.without_echo));
            self.fan_out_spans.push(span);
        }
        if counts.queued > 0 {
            self.sent[entry.envelope.frame_type().entry_kind() as usize] +=
                u64::from(counts.queued);
            self.timed.get_or_insert_with(|| entry.envelope.clone());
        }
        tracing::debug!(
            id = %entry.envelope.id(),
            %room,
            position = %entry.position,
            queued = counts.queued,
            lagged = counts.lagged,
            behind = counts.behind,
            "entry fanned out"
        );
        self.trails.fanned_out(room, entry.envelope.id(), &entry.position, counts, missed);
    }

    /// Writes to every affected socket, once.
    pub(super) fn finish(&mut self) {
        for handle in self.touched.drain(..) {
            handle.outbox.flush();
        }
        for span in self.fan_out_spans.drain(..) {
            span.end(None);
        }
        if let Some(accepted) = self.timed.take().and_then(|envelope| envelope.accepted_at()) {
            // A clock that is behind that of the sender's node shows no negative time.
            let took = SystemTime::now().duration_since(accepted).unwrap_or_default();
            self.metrics.delivery_seconds.observe(took.as_secs_f64());
        }
        for (kind, sent) in EntryKind::ALL.iter().zip(&mut self.sent) {
            if *sent > 0 {
                self.metrics.messages_sent.of(*kind).inc_by(std::mem::take(sent));
            }
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
    pub(super) fn send_ephemeral(&self, frame: &mut SharedFrame<'_>, batch: &mut ShardBatch) {
        let outbox = &self.handle.outbox;
        match outbox.offer(outbox.encoded(frame)) {
            OfferResult::First => batch.flush_later(&self.handle),
            OfferResult::Queued => {}
            OfferResult::Full => {
                batch.metrics.ephemeral_events_dropped.inc();
                return;
            }
        }
        batch.metrics.ephemeral_events.inc();
    }

    /// Delivers the next entry, whose frame is `frame`. `false`: the outbox is full, and the member
    /// is behind from here on.
    pub(super) fn deliver(
        &mut self,
        room: &RoomId,
        entry: &Entry,
        frame: &mut SharedFrame<'_>,
        batch: &mut ShardBatch,
    ) -> bool {
        #[cfg(debug_assertions)]
        crate::fault_injection::panic_in("a shard", entry.envelope.fields());
        assert!(
            self.cursor.seq + 1 == entry.position.seq || is_fault_injected(),
            "a member receives entries in order, but {} follows {}",
            entry.position,
            self.cursor
        );
        let reserved = self.handle.inline_ack(room, entry);
        let outbox = &self.handle.outbox;
        let frame = match &reserved {
            Some(ack) => ack,
            None => outbox.encoded(frame),
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
                outbox.signal(Signal::CatchUp(room.clone()));
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
        let frame = ServerFrame::Reset(ResetFrame {
            room: room.client_visible(),
            epoch: position.epoch.clone(),
            seq: position.seq,
            reason,
        });
        self.handle.send_shared(&mut SharedFrame::of(&frame).moving_to(room, position));
        self.cursor = position.clone();
        batch.flush_later(&self.handle);
    }

    /// Tells a member that has received everything before that its log continues in another epoch.
    pub(super) fn change_epoch(&mut self, room: &RoomId, to: &Position, batch: &mut ShardBatch) {
        self.reset(room, to, RecoveryFailure::LogLost, batch);
    }
}
