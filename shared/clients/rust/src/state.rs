//! The state machine of a client: its rooms and pending requests. Frames and calls go in, frames
//! and events come out.
//!
//! No I/O, and `now` is an argument, so that every order of events can be tested. `client::task`
//! moves frames between this and a connection.
//!
//! Invariant: a message is sent to a room only when the room is joined on this connection and all
//! entries up to `joined.seq` were received. So a message whose acknowledgement was lost is not
//! sent again while it is in the log.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::Instant;

use self::calls::HistoryReply;
use super::{
    api::{
        ClientEvent, HistoryError, JoinError, JoinInfo, LeaveError, RoomHistoryPage, SendError,
        SendReceipt, StartFrom,
    },
    frames,
    inbox::InboxTracker,
    resume::EntryCheck,
    room::{ClientRoom, EncodedFrame, RoomState},
};
use skein_protocol::{
    ids::{MessageId, RoomId},
    position::Position,
    protocol::{
        FrameRef, MESSAGE_BYTES_MAX,
        server_frame::{
            AckFrame, ConnectedFrame, DirectFrame, ErrorFrame, HistoryEntry, JoinedFrame,
            MessageFrame, NotificationFrame, ReconnectFrame, ServerFrame,
        },
    },
};

pub(super) mod calls;

/// Delay of a retry if the server does not state one.
const RETRY_WAIT: Duration = Duration::from_millis(500);

/// A request that waits for its reply.
enum PendingRequest {
    Join(RoomId),
    Leave(RoomId),
    Send(RoomId, MessageId),
    History(HistoryReply),
}

/// The state of a client.
pub(super) struct ProtocolState {
    in_flight_max: usize,
    rooms: HashMap<RoomId, ClientRoom>,
    pub(super) inbox: InboxTracker,
    pending: HashMap<u64, PendingRequest>,
    next_reference: u64,
    /// How long the server recognises a message id.
    dedup_window: Duration,
    message_bytes_max: usize,
    /// The first frame of the connection; `None` without a connection.
    pub(super) connected: Option<ConnectedFrame>,
    /// The resume token of that frame.
    pub(super) session: Option<String>,
    /// The room that the URL joins without a `join` frame.
    pub(super) url_room: Option<RoomId>,
    /// The `reconnect` that the server sent before it closes.
    pub(super) reconnect: Option<ReconnectFrame>,
    /// Frames to write.
    pub(super) out: VecDeque<EncodedFrame>,
    /// Events to deliver to the application.
    pub(super) events: VecDeque<ClientEvent>,
}

/// The field that the client reads from the JSON text, to keep reasons that it does not know.
#[derive(Deserialize)]
struct ReasonField {
    reason: Option<String>,
}

impl ProtocolState {
    pub(super) fn new(in_flight_max: usize) -> Self {
        Self {
            in_flight_max,
            rooms: HashMap::new(),
            inbox: InboxTracker::default(),
            pending: HashMap::new(),
            next_reference: 1,
            dedup_window: Duration::ZERO,
            message_bytes_max: MESSAGE_BYTES_MAX,
            connected: None,
            session: None,
            url_room: None,
            reconnect: None,
            out: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The last received entry of a room.
    pub(super) fn cursor(&self, room: &RoomId) -> Option<&Position> {
        self.rooms.get(room)?.log.cursor()
    }

    /// Handles a text frame.
    pub(super) fn on_frame(&mut self, frame: ServerFrame, text: String, now: Instant) {
        match frame {
            ServerFrame::Connected(connected) => self.on_connected(*connected),
            ServerFrame::Joined(joined) => self.on_joined(*joined, now),
            ServerFrame::Message(message) => self.on_message(message, None, now),
            ServerFrame::Ack(ack) => self.on_ack(*ack, now),
            ServerFrame::Left(left) => {
                self.take_request(left.reference.as_ref());
                self.on_left(&left.room, reason_in(&text).and_then(|field| field.reason));
            }
            ServerFrame::History(history) => {
                let messages = history.messages.into_iter().filter_map(into_message).collect();
                let page = RoomHistoryPage { epoch: history.epoch, messages, more: history.more };
                if let Some(PendingRequest::History(reply)) =
                    self.take_request(history.reference.as_ref())
                {
                    let _ = reply.send(Ok(page));
                }
            }
            ServerFrame::Reset(reset) => {
                let name = reset.room.clone();
                let to = Position::new(reset.epoch.clone(), reset.seq);
                match &name {
                    Some(name) => {
                        if let Some(room) = self.rooms.get_mut(name) {
                            room.log.reset(to);
                        }
                    }
                    None => self.inbox.reset(to),
                }
                self.events.push_back(ClientEvent::Reset(reset));
                if let Some(name) = name {
                    self.flush_sends(&name, now);
                }
            }
            ServerFrame::Status(status) => self.events.push_back(ClientEvent::Status(status)),
            ServerFrame::Reconnect(reconnect) => self.reconnect = Some(reconnect),
            ServerFrame::Error(error_frame) => self.on_error(error_frame, now),
            ServerFrame::Pong(_) => {}
            ServerFrame::Ping(_) => self
                .out
                .push_back(EncodedFrame::Text(frames::encode_text(&frames::OutgoingPong {}))),
            ServerFrame::RoomClosed(closed) => {
                self.on_left(&closed.room, reason_in(&text).and_then(|field| field.reason));
            }
            ServerFrame::Direct(direct) => self.on_direct(direct, None),
            ServerFrame::Notification(notification) => self.on_notification(notification),
            ServerFrame::Broadcast(_)
            | ServerFrame::UserStatus(_)
            | ServerFrame::Session(_)
            | ServerFrame::Refreshed(_)
            | ServerFrame::MemberJoined(_)
            | ServerFrame::MemberLeft(_)
            | ServerFrame::PresenceDiff(_)
            | ServerFrame::Presence(_)
            | ServerFrame::Typing(_)
            | ServerFrame::Read(_)
            | ServerFrame::RoomInfo(_)
            | ServerFrame::Rooms(_)
            | ServerFrame::Unknown => self.events.push_back(ClientEvent::OtherFrame(text)),
        }
    }

    /// Handles a message of a room, with its payload if it arrived in a binary frame.
    pub(super) fn on_message(
        &mut self,
        message: Box<MessageFrame>,
        payload: Option<Bytes>,
        now: Instant,
    ) {
        let room = message.room.clone();
        self.on_entry(message, payload);
        self.flush_sends(&room, now);
    }

    /// Handles a direct, with its payload if it arrived in a binary frame.
    pub(super) fn on_direct(&mut self, direct: Box<DirectFrame>, payload: Option<Bytes>) {
        let position = Position::new(direct.epoch.clone(), direct.seq);
        if self.inbox.accept(&position, &direct.from.id, direct.id) {
            self.events.push_back(ClientEvent::Direct { direct, payload });
        }
        self.acknowledge();
    }

    fn on_notification(&mut self, notification: Box<NotificationFrame>) {
        let position = Position::new(notification.epoch.clone(), notification.seq);
        // No user has this id, because ids with a leading `_` belong to the server.
        let from = "_api".parse().expect("a valid user id");
        if self.inbox.accept(&position, &from, notification.id) {
            if notification.require_ack {
                self.inbox.await_seen(&position);
            }
            self.events.push_back(ClientEvent::Notification(notification));
        }
        self.acknowledge();
    }

    /// Acknowledges the inbox if the acknowledged position has moved.
    pub(super) fn acknowledge(&mut self) {
        if let Some(Position { epoch, seq }) = self.inbox.next_ack() {
            self.out.push_back(EncodedFrame::Text(frames::encode_text(&frames::OutgoingAck {
                seq,
                epoch,
            })));
        }
    }

    /// When [`ProtocolState::on_timer`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.rooms.values().filter_map(ClientRoom::next_retry).min()
    }

    /// Performs the retries that are due.
    pub(super) fn on_timer(&mut self, now: Instant) {
        let due = |(name, room): (&RoomId, &ClientRoom)| {
            room.next_retry().is_some_and(|at| at <= now).then(|| name.clone())
        };
        let due: Vec<RoomId> = self.rooms.iter().filter_map(due).collect();
        for name in due {
            match self.rooms.get(&name).map(|room| room.state) {
                Some(RoomState::JoinRetryAt(_)) => self.send_join(&name),
                Some(RoomState::LeaveRetryAt(_)) => self.send_leave(&name),
                _ => self.flush_sends(&name, now),
            }
        }
    }

    /// Fails the largest message in flight: the server closed the connection because a message was
    /// too big, and did not say which.
    pub(super) fn fail_largest_send(&mut self) {
        let largest = self
            .rooms
            .iter()
            .flat_map(|(name, room)| {
                room.sends.in_flight().map(move |(id, pending)| (pending.bytes, name.clone(), id))
            })
            .max_by_key(|(bytes, ..)| *bytes);
        if let Some((_, name, id)) = largest
            && let Some(room) = self.rooms.get_mut(&name)
            && let Some(pending) = room.sends.remove(id)
        {
            pending.complete(Err(SendError::TooLarge));
        }
    }

    /// Records the loss of the connection. Rooms stay wanted, sends stay queued.
    pub(super) fn on_disconnected(&mut self) {
        self.connected = None;
        self.out.clear();
        for (_, request) in self.pending.drain() {
            if let PendingRequest::History(reply) = request {
                let _ = reply.send(Err(HistoryError::NotJoined));
            }
        }
        self.rooms.retain(|_, room| room.on_disconnected());
    }

    /// Ends the client: completes all waiting calls.
    pub(super) fn fail_all(&mut self) {
        for (_, request) in self.pending.drain() {
            if let PendingRequest::History(reply) = request {
                let _ = reply.send(Err(HistoryError::ClientClosed));
            }
        }
        for (_, mut room) in self.rooms.drain() {
            room.fail_all(
                SendError::ClientClosed,
                JoinError::ClientClosed,
                Err(LeaveError::ClientClosed),
            );
        }
    }

    fn on_connected(&mut self, connected: ConnectedFrame) {
        // A little shorter than the server's window, which runs from accepting the message to
        // accepting the repeat.
        self.dedup_window = Duration::from_secs(connected.dedup_window).mul_f64(0.95);
        self.message_bytes_max = connected.max_message_size;
        self.session = Some(connected.session.clone());
        self.inbox.connected(&connected.inbox);
        self.events.push_back(ClientEvent::Connected {
            connection_id: connected.connection_id,
            node: connected.node.clone(),
            user: connected.user.clone(),
            route: connected.route.clone(),
        });
        self.connected = Some(connected);
        let to_join: Vec<RoomId> = self
            .rooms
            .iter()
            .filter(|(_, room)| room.state == RoomState::AwaitingConnection)
            .map(|(name, _)| name.clone())
            .collect();
        for name in to_join {
            if self.url_room.as_ref() == Some(&name) {
                if let Some(room) = self.rooms.get_mut(&name) {
                    room.state = RoomState::Joining;
                }
            } else {
                self.send_join(&name);
            }
        }
    }

    fn on_joined(&mut self, mut joined: JoinedFrame<HistoryEntry>, now: Instant) {
        self.take_request(joined.reference.as_ref());
        let in_flight_max = self.in_flight_max;
        let room = self
            .rooms
            .entry(joined.room.clone())
            .or_insert_with(|| ClientRoom::new(StartFrom::Now, in_flight_max));
        let info = JoinInfo {
            room: joined.room.clone(),
            top: Position::new(joined.epoch.clone(), joined.seq),
            recovered: joined.recovered,
            reason: joined.reason,
            more: joined.more,
            durable: joined.durable,
        };
        if let Some(reply) = room.join_reply.take() {
            let leaving = matches!(room.state, RoomState::Leaving | RoomState::LeaveRetryAt(_));
            let _ = reply.send(if leaving { Err(JoinError::Left) } else { Ok(info.clone()) });
        }
        match room.state {
            // A repeated `join` changes nothing.
            RoomState::Joined => return,
            RoomState::Leaving | RoomState::LeaveRetryAt(_) => {}
            RoomState::AwaitingConnection
            | RoomState::Joining
            | RoomState::JoinRetryAt(_)
            | RoomState::Left => {
                room.state = RoomState::Joined;
            }
        }
        room.log.begin_history(&joined);
        self.events.push_back(ClientEvent::Joined(info));
        if let Some(reason) = joined.reason {
            self.events.push_back(ClientEvent::NotRecovered { room: joined.room.clone(), reason });
        }
        for message in std::mem::take(&mut joined.history).into_iter().filter_map(into_message) {
            self.on_entry(Box::new(message), None);
        }
        if let Some(room) = self.rooms.get_mut(&joined.room)
            && let Some(expected) = room.log.end_history(&joined)
        {
            let got = Position::new(joined.epoch.clone(), joined.seq);
            let (room, expected) = (joined.room.clone(), Some(expected));
            self.events.push_back(ClientEvent::Gap { room, expected, got });
        }
        self.flush_sends(&joined.room, now);
    }

    fn on_entry(&mut self, message: Box<MessageFrame>, payload: Option<Bytes>) {
        let position = Position::new(message.epoch.clone(), message.seq);
        if position.epoch.is_none() {
            // A room without a log has no positions to classify.
            let payload = payload.or_else(|| base64_payload(&message));
            self.events.push_back(ClientEvent::Message { message, payload });
            return;
        }
        let own = self.connected.as_ref().is_some_and(|me| me.user.id == message.from.id);
        let verdict = match self.rooms.get_mut(&message.room) {
            // An entry before `joined` is in the history of `joined`.
            Some(room) if matches!(room.state, RoomState::Joining | RoomState::JoinRetryAt(_)) => {
                EntryCheck::Gap { expected: None, deliver: false }
            }
            Some(room) => {
                // An own entry in the log is acknowledged. It can be the only reply to come.
                if own && let Some(pending) = room.sends.remove(message.id) {
                    let position = position.clone();
                    pending.complete(Ok(SendReceipt {
                        id: message.id,
                        position,
                        duplicate: false,
                    }));
                }
                room.log.classify(&position, &message.from.id, message.id)
            }
            None => EntryCheck::Gap { expected: None, deliver: true },
        };
        let deliver = match verdict {
            EntryCheck::InOrder => true,
            EntryCheck::Duplicate { earlier } => {
                let (room, id) = (message.room.clone(), message.id);
                self.events.push_back(ClientEvent::Duplicate { room, id, position, earlier });
                false
            }
            EntryCheck::Gap { expected, deliver } => {
                let room = message.room.clone();
                self.events.push_back(ClientEvent::Gap { room, expected, got: position });
                deliver
            }
        };
        if deliver {
            let payload = payload.or_else(|| base64_payload(&message));
            self.events.push_back(ClientEvent::Message { message, payload });
        }
    }

    fn on_ack(&mut self, ack: AckFrame, now: Instant) {
        self.take_request(ack.reference.as_ref());
        let Some(name) = ack.room else { return };
        let Some(room) = self.rooms.get_mut(&name) else { return };
        let position = Position::new(ack.epoch, ack.seq);
        let me = self.connected.as_ref().map(|connected| &connected.user.id);
        let numbered = !position.epoch.is_none();
        let skipped =
            numbered.then(|| room.log.acknowledged(&position, me, ack.id, ack.duplicate)).flatten();
        if let Some(expected) = skipped {
            let (room, got) = (name.clone(), position.clone());
            self.events.push_back(ClientEvent::Gap { room, expected, got });
        }
        if let Some(pending) = room.sends.remove(ack.id) {
            pending.complete(Ok(SendReceipt { id: ack.id, position, duplicate: ack.duplicate }));
        }
        self.flush_sends(&name, now);
    }

    /// Leaves the room, requested or not. Messages in flight still get their replies.
    fn on_left(&mut self, name: &RoomId, reason: Option<String>) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match room.leave_reply.take() {
            Some(reply) => {
                let _ = reply.send(Ok(()));
            }
            None if room.state == RoomState::Left => {}
            None => self.events.push_back(ClientEvent::Left { room: name.clone(), reason }),
        }
        room.on_left();
        self.remove_if_done(name);
    }

    fn on_error(&mut self, error_frame: Box<ErrorFrame>, now: Instant) {
        let wait = error_frame.retry_after_ms.map_or(RETRY_WAIT, Duration::from_millis);
        let again = error_frame.code.is_retryable().then(|| now + wait);
        match self.take_request(error_frame.reference.as_ref()) {
            Some(PendingRequest::Join(name)) => self.on_join_rejected(&name, error_frame, again),
            Some(PendingRequest::Leave(name)) => self.on_leave_rejected(&name, error_frame, again),
            Some(PendingRequest::Send(name, id)) => {
                self.on_send_rejected(&name, id, error_frame, again, now);
            }
            Some(PendingRequest::History(reply)) => {
                let _ = reply.send(Err(HistoryError::Rejected(error_frame)));
            }
            None => self.events.push_back(ClientEvent::Error(error_frame)),
        }
    }

    fn on_join_rejected(
        &mut self,
        name: &RoomId,
        error_frame: Box<ErrorFrame>,
        again: Option<Instant>,
    ) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match (room.state, again) {
            (RoomState::Joining, Some(at)) => room.state = RoomState::JoinRetryAt(at),
            (RoomState::Joining, None) => {
                let Some(mut room) = self.rooms.remove(name) else { return };
                if room.join_reply.is_none() {
                    let reason = Some(error_frame.code.as_str().to_owned());
                    self.events.push_back(ClientEvent::Left { room: name.clone(), reason });
                }
                room.fail_all(SendError::NotJoined, JoinError::Rejected(error_frame), Ok(()));
            }
            // The room is joined already, or being left.
            _ => {
                if let Some(reply) = room.join_reply.take() {
                    let _ = reply.send(Err(JoinError::Rejected(error_frame)));
                }
            }
        }
    }

    fn on_leave_rejected(
        &mut self,
        name: &RoomId,
        error_frame: Box<ErrorFrame>,
        again: Option<Instant>,
    ) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.state != RoomState::Leaving {
            return;
        }
        if let Some(at) = again {
            room.state = RoomState::LeaveRetryAt(at);
            return;
        }
        room.state = RoomState::Joined;
        if let Some(reply) = room.leave_reply.take() {
            let _ = reply.send(Err(LeaveError::Rejected(error_frame)));
        }
    }

    fn on_send_rejected(
        &mut self,
        name: &RoomId,
        id: MessageId,
        error_frame: Box<ErrorFrame>,
        again: Option<Instant>,
        now: Instant,
    ) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        match again {
            Some(at) if room.is_wanted() => room.sends.retry_at(id, at),
            _ => {
                if let Some(pending) = room.sends.remove(id) {
                    pending.complete(Err(SendError::Rejected(error_frame)));
                }
            }
        }
        self.flush_sends(name, now);
    }

    fn remove_if_done(&mut self, name: &RoomId) {
        let done = |room: &ClientRoom| room.state == RoomState::Left && room.sends.is_empty();
        if self.rooms.get(name).is_some_and(done) {
            self.rooms.remove(name);
        }
    }

    fn take_request(&mut self, reference: Option<&FrameRef>) -> Option<PendingRequest> {
        self.pending.remove(&reference?.as_json().parse().ok()?)
    }
}

fn into_message(entry: HistoryEntry) -> Option<MessageFrame> {
    match entry {
        HistoryEntry::Message(message) => Some(*message),
        HistoryEntry::Direct(_) | HistoryEntry::Unknown => None,
    }
}

fn reason_in(text: &str) -> Option<ReasonField> {
    serde_json::from_str(text).ok()
}

/// The payload of a binary message inside JSON.
fn base64_payload(message: &MessageFrame) -> Option<Bytes> {
    if message.encoding.as_deref() != Some("base64") {
        return None;
    }
    STANDARD.decode(message.content.as_str()?).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests;
