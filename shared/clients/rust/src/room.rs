//! The client's state of one room: position, unacknowledged sends, and waiting calls.
//!
//! Pure. `client::state` uses it.

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use super::{
    api::{
        JoinError, JoinInfo, LeaveError, MessageContent, MessageDraft, SendError, SendReceipt,
        StartFrom,
    },
    frames::{self, HeaderTooLong},
    resume::{LogTracker, PendingSends},
};
use skein_protocol::{ids::RoomId, protocol::FrameRef};

/// An encoded frame to write.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum EncodedFrame {
    Text(String),
    Binary(Vec<u8>),
}

impl EncodedFrame {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }
}

/// A message to send, and the call that waits for its result.
pub(super) struct PendingSend {
    pub(super) message: MessageDraft,
    pub(super) bytes: u32,
    pub(super) reply: oneshot::Sender<Result<SendReceipt, SendError>>,
    /// Permits for the limits of unacknowledged messages and bytes, released on drop.
    pub(super) _permits: [OwnedSemaphorePermit; 2],
}

impl PendingSend {
    /// Completes the waiting call. If its future was dropped, the message has been processed all
    /// the same.
    pub(super) fn complete(self, result: Result<SendReceipt, SendError>) {
        let _ = self.reply.send(result);
    }

    /// Encodes the frame that sends the message.
    pub(super) fn encode(
        &self,
        room: &RoomId,
        reference: u64,
    ) -> Result<EncodedFrame, HeaderTooLong> {
        let header = frames::OutgoingMessage {
            reference: Some(FrameRef::number(reference)),
            id: Some(self.message.id),
            kind: self.message.kind,
            reply_to: self.message.reply_to,
            meta: self.message.meta.as_ref(),
            echo: self.message.echo,
            ..frames::OutgoingMessage::header(room)
        };
        match &self.message.content {
            MessageContent::Json(content) => {
                let frame = frames::OutgoingMessage { content: Some(content), ..header };
                Ok(EncodedFrame::Text(frames::encode_text(&frame)))
            }
            MessageContent::Binary(payload) => {
                frames::encode_binary(&header, payload).map(EncodedFrame::Binary)
            }
        }
    }
}

/// State of a room on the current connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RoomState {
    /// To be joined; no `join` was sent on this connection, if there is one.
    AwaitingConnection,
    /// `join` is in flight.
    Joining,
    /// `join` was rejected with a temporary error.
    JoinRetryAt(Instant),
    /// The room is joined.
    Joined,
    /// `leave` is in flight.
    Leaving,
    /// `leave` was rejected with a temporary error.
    LeaveRetryAt(Instant),
    /// The room is left. Only replies to messages in flight are expected.
    Left,
}

/// The client's state of one room.
pub(super) struct ClientRoom {
    pub(super) state: RoomState,
    pub(super) start: StartFrom,
    /// The password, which is sent again when the room is joined after a reconnect.
    pub(super) password: Option<String>,
    pub(super) log: LogTracker,
    pub(super) sends: PendingSends<PendingSend>,
    pub(super) join_reply: Option<oneshot::Sender<Result<JoinInfo, JoinError>>>,
    pub(super) leave_reply: Option<oneshot::Sender<Result<(), LeaveError>>>,
}

impl ClientRoom {
    pub(super) fn new(start: StartFrom, in_flight_max: usize) -> Self {
        Self {
            state: RoomState::AwaitingConnection,
            log: tracker_for(&start),
            start,
            password: None,
            sends: PendingSends::new(in_flight_max),
            join_reply: None,
            leave_reply: None,
        }
    }

    /// Joins a room again after it was left.
    pub(super) fn rejoin(&mut self, start: StartFrom) {
        self.state = RoomState::AwaitingConnection;
        self.log = tracker_for(&start);
        self.start = start;
    }

    /// Whether the application wants to be in the room.
    pub(super) fn is_wanted(&self) -> bool {
        match self.state {
            RoomState::AwaitingConnection
            | RoomState::Joining
            | RoomState::JoinRetryAt(_)
            | RoomState::Joined => true,
            RoomState::Leaving | RoomState::LeaveRetryAt(_) | RoomState::Left => false,
        }
    }

    /// When the next retry is due.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        match self.state {
            RoomState::JoinRetryAt(at) | RoomState::LeaveRetryAt(at) => Some(at),
            // Before the recovery is complete, no message is sent.
            RoomState::Joined if self.log.is_recovered() => self.sends.next_retry(),
            RoomState::AwaitingConnection
            | RoomState::Joining
            | RoomState::Joined
            | RoomState::Leaving
            | RoomState::Left => None,
        }
    }

    /// Records that the connection is no longer in the room. Position and ids are forgotten, so
    /// that joining again can deliver the same entries again.
    pub(super) fn on_left(&mut self) {
        self.state = RoomState::Left;
        self.log = LogTracker::default();
        for pending in self.sends.drain_unsent() {
            pending.complete(Err(SendError::NotJoined));
        }
    }

    /// Records the loss of the connection. Returns whether to join the room on the next one.
    pub(super) fn on_disconnected(&mut self) -> bool {
        if self.is_wanted() {
            self.state = RoomState::AwaitingConnection;
            self.sends.on_disconnected();
            return true;
        }
        self.fail_all(SendError::NotJoined, JoinError::Left, Ok(()));
        false
    }

    /// Completes all waiting calls. Messages that were sent have an uncertain result; the others
    /// fail with `unsent`.
    pub(super) fn fail_all(
        &mut self,
        unsent: SendError,
        join: JoinError,
        leave: Result<(), LeaveError>,
    ) {
        for (pending, was_sent) in self.sends.drain() {
            let error = if was_sent { SendError::Uncertain } else { unsent.clone() };
            pending.complete(Err(error));
        }
        if let Some(reply) = self.join_reply.take() {
            let _ = reply.send(Err(join));
        }
        if let Some(reply) = self.leave_reply.take() {
            let _ = reply.send(leave);
        }
    }
}

fn tracker_for(start: &StartFrom) -> LogTracker {
    match start {
        StartFrom::Since(position) => LogTracker::starting_at(position.clone()),
        StartFrom::Now | StartFrom::History(_) => LogTracker::default(),
    }
}
