//! The Rust client.
//!
//! [`Client`] is a handle to a task that holds one connection, comes back when it is lost, joins
//! its rooms again where they were, and sends what was not acknowledged again with the same id: an
//! application sees every message once and in order, or is told that this could not be. In reading
//! order: how long to wait ([`backoff`]), what is said ([`frames`]), one bare connection
//! ([`options`], [`connection`]), positions and unanswered sends ([`resume`]), what an application
//! asks and is told ([`api`]).
//!
//! `loadtest` and the gateway's tests speak through this.

use std::sync::Arc;

use serde_json::Value;
use tokio::{
    sync::{Semaphore, TryAcquireError, mpsc, oneshot, watch},
    task::JoinHandle,
};

use self::{
    api::{
        ClientEvent, ClientOptions, HistoryError, HistoryPage, HistoryRange, JoinError, JoinInfo,
        LeaveError, MessageContent, NewMessage, SendError, SendReceipt, StartFrom,
    },
    options::ConnectOptions,
    room::PendingSend,
    state::calls::ClientCall,
    task::ClientTask,
};
use skein_protocol::{ids::RoomId, position::Seq};

pub mod backoff;
pub mod frames;
pub mod options;
pub mod connection;
pub mod resume;
pub mod api;
mod inbox;
mod room;
mod state;
mod task;

/// How many calls wait for the task before further ones wait for their turn.
const CALLS_MAX: usize = 256;

/// A client of a gateway cluster. Cheap to clone; when the last clone is dropped the client closes
/// its connection and ends.
///
/// Events and calls do not wait for each other, but a client whose events nobody takes stands
/// still once [`ClientOptions::event_queue_max`] wait: take them in a task of their own.
#[derive(Clone, Debug)]
pub struct Client {
    calls: mpsc::Sender<ClientCall>,
    closing: Arc<watch::Sender<bool>>,
    sends: Arc<Semaphore>,
    send_bytes: Arc<Semaphore>,
    /// Kept so that the task's end can be seen; it ends by itself.
    task: Arc<JoinHandle<()>>,
}

impl Client {
    /// Starts a client, which connects at once, and gives its events.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, and where a limit of `options` is 0.
    pub fn start(
        connect: ConnectOptions,
        options: ClientOptions,
    ) -> (Self, mpsc::Receiver<ClientEvent>) {
        let (calls, inbox) = mpsc::channel(CALLS_MAX);
        let (events, outbox) = mpsc::channel(options.event_queue_max);
        let (closing, closed) = watch::channel(false);
        let sends = Arc::new(Semaphore::new(options.pending_sends_max));
        let send_bytes = Arc::new(Semaphore::new(options.pending_bytes_max as usize));
        let task = ClientTask::new(connect, options, inbox, events, closed);
        #[expect(clippy::disallowed_methods, reason = "the handle keeps it, and `close` awaits it")]
        let task = tokio::spawn(task.run());
        let closing = Arc::new(closing);
        (Self { calls, closing, sends, send_bytes, task: Arc::new(task) }, outbox)
    }

    /// Joins a room, now or when there is a connection. Its entries come as events. The client
    /// stays in the room over reconnects until [`Client::leave`] or an [`ClientEvent::Left`].
    ///
    /// For a room that is joined already this only asks the server, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`JoinError`]. What is refused for the time being is asked again.
    pub async fn join(&self, room: &RoomId, start: StartFrom) -> Result<JoinInfo, JoinError> {
        self.join_with(room, start, None).await
    }

    /// As [`Client::join`], a room that asks for a password.
    ///
    /// # Errors
    ///
    /// As [`Client::join`].
    pub async fn join_protected(
        &self,
        room: &RoomId,
        start: StartFrom,
        password: String,
    ) -> Result<JoinInfo, JoinError> {
        self.join_with(room, start, Some(password)).await
    }

    async fn join_with(
        &self,
        room: &RoomId,
        start: StartFrom,
        password: Option<String>,
    ) -> Result<JoinInfo, JoinError> {
        let (reply, answer) = oneshot::channel();
        let command = ClientCall::Join { room: room.clone(), start, password, reply };
        self.ask(command, answer).await.unwrap_or(Err(JoinError::ClientClosed))
    }

    /// Leaves a room. What the application had of it is forgotten, so that to join it again from
    /// an earlier position shows the same entries again.
    ///
    /// # Errors
    ///
    /// [`LeaveError`]
    pub async fn leave(&self, room: &RoomId) -> Result<(), LeaveError> {
        let (reply, answer) = oneshot::channel();
        let command = ClientCall::Leave { room: room.clone(), reply };
        self.ask(command, answer).await.unwrap_or(Err(LeaveError::ClientClosed))
    }

    /// Sends `content` to a room and waits until it is in the log. See [`Client::send_message`].
    ///
    /// # Errors
    ///
    /// [`SendError`]
    pub async fn send(
        &self,
        room: &RoomId,
        content: impl Into<Value>,
    ) -> Result<SendReceipt, SendError> {
        self.send_message(room, NewMessage::json(content)).await
    }

    /// Sends a message to a room and waits until it is in the log.
    ///
    /// It is queued while the room is being joined, and sent again with the same id after a
    /// temporary error and after a reconnect, once the room's recovery has shown
    /// that it is not in the log. The messages of one client to one room get their numbers in the
    /// order in which the calls were first polled. Dropping the future does not take it back.
    ///
    /// # Errors
    ///
    /// [`SendError`]. An error is about this message only; others go on.
    pub async fn send_message(
        &self,
        room: &RoomId,
        send: NewMessage,
    ) -> Result<SendReceipt, SendError> {
        let bytes = approximate_len(&send);
        let full = |error| match error {
            TryAcquireError::NoPermits => SendError::QueueFull,
            TryAcquireError::Closed => SendError::ClientClosed,
        };
        let one = Arc::clone(&self.sends).try_acquire_owned().map_err(full)?;
        let many = Arc::clone(&self.send_bytes).try_acquire_many_owned(bytes).map_err(full)?;
        let (reply, answer) = oneshot::channel();
        let pending = PendingSend { send, bytes, reply, _permits: [one, many] };
        let command = ClientCall::Send { room: room.clone(), pending };
        self.ask(command, answer).await.unwrap_or(Err(SendError::ClientClosed))
    }

    /// A page of a room's log: up to `limit` entries, 1 to 200.
    ///
    /// # Errors
    ///
    /// [`HistoryError`]
    pub async fn history(
        &self,
        room: &RoomId,
        page: HistoryRange,
        limit: u32,
    ) -> Result<HistoryPage, HistoryError> {
        let (reply, answer) = oneshot::channel();
        let command = ClientCall::History { room: room.clone(), page, limit, reply };
        self.ask(command, answer).await.unwrap_or(Err(HistoryError::ClientClosed))
    }

    /// Tells that a person has seen the inbox up to `seq`: notifications with `require_ack` up to there
    /// count as received.
    pub async fn mark_seen(&self, seq: Seq) {
        // A client that has ended tells nobody.
        let _ = self.calls.send(ClientCall::MarkSeen(seq)).await;
    }

    /// Replaces the token of [`ConnectOptions`] for the connections to come. A client whose token has
    /// expired connects again with it.
    pub async fn set_token(&self, token: impl Into<String>) {
        // A client that has ended needs none.
        let _ = self.calls.send(ClientCall::SetToken(token.into())).await;
    }

    /// Closes the connection with 1000 and ends the client. Returns when it has ended; events that
    /// the application has not taken are lost.
    pub async fn close(&self) {
        self.closing.send_replace(true);
        self.calls.closed().await;
    }

    /// Whether the client has ended.
    pub fn is_ended(&self) -> bool {
        self.calls.is_closed() || self.task.is_finished()
    }

    async fn ask<T>(&self, command: ClientCall, answer: oneshot::Receiver<T>) -> Option<T> {
        self.calls.send(command).await.ok()?;
        answer.await.ok()
    }
}

/// About how many bytes a message holds. At least one, since a message takes some room in any case.
fn approximate_len(send: &NewMessage) -> u32 {
    let content = match &send.content {
        MessageContent::Json(content) => frames::encode_text(content).len(),
        MessageContent::Binary(payload) => payload.len(),
    };
    let meta = send.meta.as_ref().map_or(0, |meta| frames::encode_text(meta).len());
    u32::try_from(content + meta).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests;
