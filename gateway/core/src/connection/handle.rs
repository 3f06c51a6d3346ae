//! The hub's and the session's shared reference to one connection.

use std::{
    collections::{BTreeMap, btree_map},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId, SessionId, UserId},
    position::Position,
    protocol::{
        FrameRef,
        server_frame::{AckFrame, ServerFrame},
    },
};

use super::{encoding::SharedFrame, outbox::Outbox};
use crate::{
    bus::{
        presence_store::{UnixMillis, unix_millis_now},
        sessions::{ConnectionInfo, UnixMicros},
    },
    delivery::Entry,
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
    /// The node that the client shall move to, for balance: the value of `?node=`.
    moves_to: OnceLock<Box<str>>,
    /// The number of publishes that the bus has not answered.
    pending_publishes: AtomicU32,
    /// The number of rejected frames that the input meter has not counted yet.
    refused: AtomicU32,
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
        let (health, moves_to) = (Health::default(), OnceLock::new());
        Self {
            connection,
            owner: None,
            outbox,
            health,
            moves_to,
            pending_publishes,
            refused,
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

    /// Whether the connection was opened before a command was issued, so that the command applies
    /// to it.
    pub(crate) fn was_opened_before(&self, order: UnixMicros) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.since <= order)
    }

    /// Asks the connection's task to send the client to another node, with `route` as `?node=`.
    pub fn move_to(&self, route: &str) {
        if self.moves_to.set(route.into()).is_ok() {
            self.outbox.wake();
        }
    }

    /// The value of `?node=` with which the client shall move to another node.
    pub fn moves_to(&self) -> Option<&str> {
        self.moves_to.get().map(AsRef::as_ref)
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
        self.outbox.push_ahead(self.outbox.encode(frame));
    }

    /// Sends a frame after all queued ones.
    pub fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.outbox.push(self.outbox.encode(frame));
    }

    /// As [`ConnectionHandle::send`], for a frame that other connections receive as well, or that
    /// moves its reader in a log.
    pub(crate) fn send_shared(&self, frame: &mut SharedFrame<'_>) {
        self.outbox.push(self.outbox.encoded(frame).clone());
    }

    /// Reserves the place of a message's copy for its `ack`. `false`: an earlier send of the same
    /// id holds the reservation, and this send is a repeat.
    #[must_use]
    pub fn reserve_ack(&self, room: &RoomId, id: MessageId, ack: InlineAck) -> bool {
        let mut reserved = self.inline_acks.lock();
        let entry = reserved.entry((room.clone(), id));
        let vacant = matches!(entry, btree_map::Entry::Vacant(_));
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
    pub(crate) fn inline_ack(&self, room: &RoomId, entry: &Entry) -> Option<Bytes> {
        if entry.envelope.sender_without_echo() != Some(self.connection) {
            return None;
        }
        let key = (room.clone(), entry.envelope.id());
        let reserved = self.inline_acks.lock();
        let ack = reserved.get(&key)?.clone();
        Some(self.outbox.encode(&ack.at(&key.0, key.1, entry.position.clone(), false)))
    }
}
