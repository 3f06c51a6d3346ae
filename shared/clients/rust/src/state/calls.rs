//! Calls of the application, and the frames that they send.
//!
//! Each call is completed through its reply channel. A call that must wait for a connection, a room
//! or its turn is kept in the state.

use tokio::{sync::oneshot, time::Instant};

use super::{PendingRequest, ProtocolState};
use crate::{
    api::{
        HISTORY_REQUESTS_MAX, HistoryError, HistoryRange, JoinError, JoinInfo, LeaveError,
        ROOMS_MAX, RoomHistoryPage, SendError, StartFrom,
    },
    frames,
    resume::NextSend,
    room::{ClientRoom, EncodedFrame, PendingSend, RoomState},
};
use skein_protocol::{ids::RoomId, position::Seq, protocol::FrameRef};

/// A call of the application.
pub(crate) enum ClientCall {
    Join {
        room: RoomId,
        start: StartFrom,
        password: Option<String>,
        reply: oneshot::Sender<Result<JoinInfo, JoinError>>,
    },
    Leave {
        room: RoomId,
        reply: oneshot::Sender<Result<(), LeaveError>>,
    },
    Send {
        room: RoomId,
        pending: PendingSend,
    },
    History {
        room: RoomId,
        page: HistoryRange,
        limit: u32,
        reply: HistoryReply,
    },
    /// A person has seen the inbox up to this entry.
    MarkSeen(Seq),
    SetToken(String),
}

pub(super) type HistoryReply = oneshot::Sender<Result<RoomHistoryPage, HistoryError>>;

impl ProtocolState {
    /// Handles a call of the application.
    pub(crate) fn on_call(&mut self, call: ClientCall, now: Instant) {
        match call {
            ClientCall::Join { room, start, password, reply } => {
                self.join(room, start, password, reply);
            }
            ClientCall::Leave { room, reply } => self.leave(&room, reply),
            ClientCall::Send { room, pending } => self.send(&room, pending, now),
            ClientCall::History { room, page, limit, reply } => {
                self.history(&room, page, limit, reply);
            }
            ClientCall::MarkSeen(seq) => {
                self.inbox.mark_seen(seq);
                self.acknowledge();
            }
            // The task handles tokens.
            ClientCall::SetToken(_) => {}
        }
    }

    fn join(
        &mut self,
        name: RoomId,
        start: StartFrom,
        password: Option<String>,
        reply: oneshot::Sender<Result<JoinInfo, JoinError>>,
    ) {
        if !self.rooms.contains_key(&name) && self.rooms.len() >= ROOMS_MAX {
            let _ = reply.send(Err(JoinError::TooManyRooms));
            return;
        }
        let in_flight_max = self.in_flight_max;
        let room = self
            .rooms
            .entry(name.clone())
            .or_insert_with(|| ClientRoom::new(start.clone(), in_flight_max));
        let waits = room.join_reply.as_ref().is_some_and(|reply| !reply.is_closed());
        if waits || matches!(room.state, RoomState::Leaving | RoomState::LeaveRetryAt(_)) {
            let _ = reply.send(Err(JoinError::InProgress));
            return;
        }
        room.join_reply = Some(reply);
        room.password = password;
        match room.state {
            RoomState::AwaitingConnection | RoomState::Joined => {}
            RoomState::Left => room.rejoin(start),
            // A reply is pending.
            RoomState::Joining
            | RoomState::JoinRetryAt(_)
            | RoomState::Leaving
            | RoomState::LeaveRetryAt(_) => return,
        }
        if self.connected.is_some() {
            self.send_join(&name);
        }
    }

    fn leave(&mut self, name: &RoomId, reply: oneshot::Sender<Result<(), LeaveError>>) {
        let Some(room) = self.rooms.get_mut(name) else {
            let _ = reply.send(Ok(()));
            return;
        };
        match room.state {
            RoomState::Left => {
                let _ = reply.send(Ok(()));
            }
            RoomState::Leaving | RoomState::LeaveRetryAt(_) => {
                let _ = reply.send(Err(LeaveError::InProgress));
            }
            RoomState::AwaitingConnection | RoomState::JoinRetryAt(_) => {
                if let Some(mut room) = self.rooms.remove(name) {
                    room.fail_all(SendError::NotJoined, JoinError::Left, Ok(()));
                }
                let _ = reply.send(Ok(()));
            }
            RoomState::Joining | RoomState::Joined => {
                room.leave_reply = Some(reply);
                self.send_leave(name);
            }
        }
    }

    fn send(&mut self, name: &RoomId, pending: PendingSend, now: Instant) {
        let Some(room) = self.rooms.get_mut(name).filter(|room| room.is_wanted()) else {
            pending.complete(Err(SendError::NotJoined));
            return;
        };
        if room.sends.contains(pending.message.id) {
            pending.complete(Err(SendError::IdInUse));
            return;
        }
        room.sends.push(pending.message.id, pending);
        self.flush_sends(name, now);
    }

    fn history(&mut self, name: &RoomId, page: HistoryRange, limit: u32, reply: HistoryReply) {
        let joined = self.rooms.get(name).is_some_and(|room| room.state == RoomState::Joined);
        let questions =
            self.pending.values().filter(|request| matches!(request, PendingRequest::History(_)));
        if !joined {
            let _ = reply.send(Err(HistoryError::NotJoined));
        } else if questions.count() >= HISTORY_REQUESTS_MAX {
            let _ = reply.send(Err(HistoryError::TooManyPending));
        } else {
            let reference = self.register(PendingRequest::History(reply));
            let (before, after) = match page {
                HistoryRange::Newest => (None, None),
                HistoryRange::Before(seq) => (Some(seq), None),
                HistoryRange::After(seq) => (None, Some(seq)),
            };
            let limit = Some(limit);
            let frame = frames::OutgoingHistory { reference, room: name, before, after, limit };
            self.out.push_back(EncodedFrame::Text(frames::encode_text(&frame)));
        }
    }

    pub(super) fn send_join(&mut self, name: &RoomId) {
        let reference = self.register(PendingRequest::Join(name.clone()));
        let Some(room) = self.rooms.get_mut(name) else { return };
        // A repeated `join` of a joined room changes nothing.
        if room.state != RoomState::Joined {
            room.state = RoomState::Joining;
        }
        let since = room.log.cursor();
        let history = match (since, &room.start) {
            (Some(_), _) => None,
            (None, StartFrom::Now | StartFrom::Since(_)) => Some(0),
            (None, StartFrom::History(entries)) => Some(*entries),
        };
        let password = room.password.as_deref();
        let frame = frames::OutgoingJoin { reference, room: name, since, history, password };
        self.out.push_back(EncodedFrame::Text(frames::encode_text(&frame)));
    }

    pub(super) fn send_leave(&mut self, name: &RoomId) {
        let reference = self.register(PendingRequest::Leave(name.clone()));
        if let Some(room) = self.rooms.get_mut(name) {
            room.state = RoomState::Leaving;
        }
        let frame = frames::OutgoingLeave { reference, room: name };
        self.out.push_back(EncodedFrame::Text(frames::encode_text(&frame)));
    }

    fn register(&mut self, request: PendingRequest) -> Option<FrameRef> {
        let reference = self.next_reference;
        self.next_reference += 1;
        self.pending.insert(reference, request);
        Some(FrameRef::number(reference))
    }

    /// Sends the messages to a room that can be sent now.
    pub(super) fn flush_sends(&mut self, name: &RoomId, now: Instant) {
        self.remove_if_done(name);
        let Some(room) = self.rooms.get_mut(name) else { return };
        if room.state != RoomState::Joined || !room.log.is_recovered() {
            return;
        }
        loop {
            let (id, echo, outgoing) = match room.sends.next(now, self.dedup_window) {
                None => return,
                Some(NextSend::Uncertain(_, pending)) => {
                    pending.complete(Err(SendError::Uncertain));
                    continue;
                }
                Some(NextSend::Send(id, pending)) => {
                    (id, pending.message.echo, pending.encode(name, self.next_reference))
                }
            };
            match outgoing {
                Ok(outgoing) if outgoing.len() <= self.message_bytes_max => {
                    self.pending
                        .insert(self.next_reference, PendingRequest::Send(name.clone(), id));
                    self.next_reference += 1;
                    if !echo {
                        room.log.expect_no_echo(id);
                    }
                    self.out.push_back(outgoing);
                }
                Ok(_) | Err(frames::HeaderTooLong) => {
                    if let Some(pending) = room.sends.remove(id) {
                        pending.complete(Err(SendError::TooLarge));
                    }
                }
            }
        }
    }
}
