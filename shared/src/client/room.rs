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
    resume::{LogTracker, SendQueue},
};
use crate::{ids::RoomId, protocol::FrameRef};

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
pub(super) enum Stage {
    /// Wanted, and nothing was asked on this connection, if there is one.
    Away,
    /// `join` is on its way.
    Joining,
    /// `join` was refused for the time being.
    JoinAt(Instant),
    /// The connection takes part.
    Joined,
    /// `leave` is on its way.
    Leaving,
    /// `leave` was refused for the time being.
    LeaveAt(Instant),
    /// Over. Only answers to what was sent are awaited.
    Left,
}

/// See the head of this file.
pub(super) struct Room {
    pub(super) stage: Stage,
    pub(super) start: StartFrom,
    /// What the room asks for, also when it is joined again after a reconnect.
    pub(super) password: Option<String>,
    pub(super) log: LogTracker,
    pub(super) sends: SendQueue<PendingSend>,
    pub(super) join_reply: Option<oneshot::Sender<Result<JoinInfo, JoinError>>>,
    pub(super) leave_reply: Option<oneshot::Sender<Result<(), LeaveError>>>,
}

impl Room {
    pub(super) fn new(start: StartFrom, in_flight_max: usize) -> Self {
        Self {
            stage: Stage::Away,
            log: log_for(&start),
            start,
            password: None,
            sends: SendQueue::new(in_flight_max),
            join_reply: None,
            leave_reply: None,
        }
    }

    /// Joins a room again that was left.
    pub(super) fn begin_anew(&mut self, start: StartFrom) {
        self.stage = Stage::Away;
        self.log = log_for(&start);
        self.start = start;
    }

    /// Whether the application wants to take part.
    pub(super) fn is_wanted(&self) -> bool {
        match self.stage {
            Stage::Away | Stage::Joining | Stage::JoinAt(_) | Stage::Joined => true,
            Stage::Leaving | Stage::LeaveAt(_) | Stage::Left => false,
        }
    }

    /// When something has to be done that only waits for its time.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.stage {
            Stage::JoinAt(at) | Stage::LeaveAt(at) => Some(at),
            // Until the recovery has ended nothing is sent, whatever the time.
            Stage::Joined if self.log.is_recovered() => self.sends.next_retry(),
            Stage::Away | Stage::Joining | Stage::Joined | Stage::Leaving | Stage::Left => None,
        }
    }

    /// The server has removed the connection from the room. Positions and ids are forgotten: who
    /// joins again may want to see the same entries again.
    pub(super) fn left(&mut self) {
        self.stage = Stage::Left;
        self.log = LogTracker::default();
        for pending in self.sends.drain_unsent() {
            pending.complete(Err(SendError::NotJoined));
        }
    }

    /// The connection is gone. Returns whether the room is wanted on the next one.
    pub(super) fn disconnected(&mut self) -> bool {
        if self.is_wanted() {
            self.stage = Stage::Away;
            self.sends.disconnected();
            return true;
        }
        self.end(SendError::NotJoined, JoinError::Left, Ok(()));
        false
    }

    /// Tells everybody who waits. Messages that were sent have an unknown fate; others have
    /// `unsent`.
    pub(super) fn end(
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

fn log_for(start: &StartFrom) -> LogTracker {
    match start {
        StartFrom::Since(position) => LogTracker::starting_at(position.clone()),
        StartFrom::Now | StartFrom::History(_) => LogTracker::default(),
    }
}
