//! One room as a client holds it: where it is in the log, what it sends, who waits for an answer.
//!
//! Pure. `client::state` is the user.

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use super::{
    api::{
        JoinError, JoinInfo, LeaveError, MessageContent, NewMessage, SendError, SendReceipt,
        StartFrom,
    },
    frames::{self, HeaderTooLong},
    resume::{LogTracker, PendingSends},
};
use skein_protocol::{ids::RoomId, protocol::FrameRef};

/// A frame to write.
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

/// A message without its answer, and who waits for that.
pub(super) struct PendingSend {
    pub(super) send: NewMessage,
    pub(super) bytes: u32,
    pub(super) reply: oneshot::Sender<Result<SendReceipt, SendError>>,
    /// Its share of what a client may have without an answer, given back when this is dropped.
    pub(super) _permits: [OwnedSemaphorePermit; 2],
}

impl PendingSend {
    /// Tells who waits. If nobody does any more, the message has its fate all the same.
    pub(super) fn complete(self, result: Result<SendReceipt, SendError>) {
        let _ = self.reply.send(result);
    }

    /// The frame that sends it.
    pub(super) fn encode(
        &self,
        room: &RoomId,
        reference: u64,
    ) -> Result<EncodedFrame, HeaderTooLong> {
        let header = frames::OutgoingMessage {
            reference: Some(FrameRef::number(reference)),
            id: Some(self.send.id),
            kind: self.send.kind,
            reply_to: self.send.reply_to,
            meta: self.send.meta.as_ref(),
            echo: self.send.echo,
            ..frames::OutgoingMessage::header(room)
        };
        match &self.send.content {
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

/// What a room is to the present connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RoomState {
    /// Wanted, and nothing was asked on this connection, if there is one.
    AwaitingConnection,
    /// `join` is on its way.
    Joining,
    /// `join` was refused for the time being.
    JoinRetryAt(Instant),
    /// The connection takes part.
    Joined,
    /// `leave` is on its way.
    Leaving,
    /// `leave` was refused for the time being.
    LeaveRetryAt(Instant),
    /// Over. Only answers to what was sent are awaited.
    Left,
}

/// See the head of this file.
pub(super) struct ClientRoom {
    pub(super) state: RoomState,
    pub(super) start: StartFrom,
    /// What the room asks for, also when it is joined again after a reconnect.
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

    /// Joins a room again that was left.
    pub(super) fn rejoin(&mut self, start: StartFrom) {
        self.state = RoomState::AwaitingConnection;
        self.log = tracker_for(&start);
        self.start = start;
    }

    /// Whether the application wants to take part.
    pub(super) fn is_wanted(&self) -> bool {
        match self.state {
            RoomState::AwaitingConnection
            | RoomState::Joining
            | RoomState::JoinRetryAt(_)
            | RoomState::Joined => true,
            RoomState::Leaving | RoomState::LeaveRetryAt(_) | RoomState::Left => false,
        }
    }

    /// When something has to be done that only waits for its time.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        match self.state {
            RoomState::JoinRetryAt(at) | RoomState::LeaveRetryAt(at) => Some(at),
            // Until the recovery has ended nothing is sent, whatever the time.
            RoomState::Joined if self.log.is_recovered() => self.sends.next_retry(),
            RoomState::AwaitingConnection
            | RoomState::Joining
            | RoomState::Joined
            | RoomState::Leaving
            | RoomState::Left => None,
        }
    }

    /// The server has removed the connection from the room. Positions and ids are forgotten: who
    /// joins again may want to see the same entries again.
    pub(super) fn on_left(&mut self) {
        self.state = RoomState::Left;
        self.log = LogTracker::default();
        for pending in self.sends.drain_unsent() {
            pending.complete(Err(SendError::NotJoined));
        }
    }

    /// The connection is gone. Returns whether the room is wanted on the next one.
    pub(super) fn on_disconnected(&mut self) -> bool {
        if self.is_wanted() {
            self.state = RoomState::AwaitingConnection;
            self.sends.on_disconnected();
            return true;
        }
        self.fail_all(SendError::NotJoined, JoinError::Left, Ok(()));
        false
    }

    /// Tells everybody who waits. Messages that were sent have an unknown fate; others have
    /// `unsent`.
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
