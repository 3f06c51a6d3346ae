//! The Rust client.
//!
//! [`Client`] is a handle to a task that holds one connection, reconnects when it is lost, joins
//! its rooms again at their positions, and sends unacknowledged messages again with the same id. An
//! application sees every message once and in order, or an event that says which continuity was
//! lost. In reading order: reconnect delays ([`backoff`]), frames to send ([`frames`]), one bare
//! connection ([`options`], [`connection`]), positions and unacknowledged sends ([`resume`]), the
//! types of the API ([`api`]).
//!
//! `loadtest` and the gateway's tests use this client.

use std::sync::Arc;

use serde_json::Value;
use tokio::{
    sync::{Semaphore, TryAcquireError, mpsc, oneshot, watch},
    task::JoinHandle,
};

use self::{
    api::{
        ClientEvent, ClientOptions, HistoryError, HistoryRange, JoinError, JoinInfo, LeaveError,
        MessageContent, MessageDraft, RoomHistoryPage, SendError, SendReceipt, StartFrom,
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

/// Maximum number of calls in the queue of the task; further calls wait.
const CALLS_MAX: usize = 256;

/// A client of a gateway cluster. Cheap to clone; when the last clone is dropped, the client closes
/// its connection and ends.
///
/// Events and calls do not wait for each other. But when the application has not taken
/// [`ClientOptions::event_queue_max`] events, the client stops: take events in a task of their own.
#[derive(Clone, Debug)]
pub struct Client {
    calls: mpsc::Sender<ClientCall>,
    closing: Arc<watch::Sender<bool>>,
    send_permits: Arc<Semaphore>,
    byte_permits: Arc<Semaphore>,
    /// Held to see whether the task has ended; the task ends by itself.
    task: Arc<JoinHandle<()>>,
}

impl Client {
    /// Starts a client, which connects at once, and returns its events.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime, and if a limit of `options` is 0.
    pub fn start(
        connect: ConnectOptions,
        options: ClientOptions,
    ) -> (Self, mpsc::Receiver<ClientEvent>) {
        let (calls, inbox) = mpsc::channel(CALLS_MAX);
        let (events, outbox) = mpsc::channel(options.event_queue_max);
        let (closing, closed) = watch::channel(false);
        let send_permits = Arc::new(Semaphore::new(options.pending_sends_max));
        let byte_permits = Arc::new(Semaphore::new(options.pending_bytes_max as usize));
        let task = ClientTask::new(connect, options, inbox, events, closed);
        #[expect(clippy::disallowed_methods, reason = "the handle keeps it, and `close` awaits it")]
        let task = tokio::spawn(task.run());
        let closing = Arc::new(closing);
        (Self { calls, closing, send_permits, byte_permits, task: Arc::new(task) }, outbox)
    }

    /// Joins a room, now or once connected. Its entries arrive as events. The client stays in the
    /// room across reconnects until [`Client::leave`] or a [`ClientEvent::Left`].
    ///
    /// For a room that is joined already, this only asks the server and changes nothing.
    ///
    /// # Errors
    ///
    /// [`JoinError`]. Temporary errors are retried.
    pub async fn join(&self, room: &RoomId, start: StartFrom) -> Result<JoinInfo, JoinError> {
        self.join_with(room, start, None).await
    }

    /// Joins a room that has a password, as [`Client::join`].
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
        let (reply, receiver) = oneshot::channel();
        let call = ClientCall::Join { room: room.clone(), start, password, reply };
        self.send_call(call, receiver).await.unwrap_or(Err(JoinError::ClientClosed))
    }

    /// Leaves a room. The client forgets its position, so joining again from an earlier position
    /// delivers the same entries again.
    ///
    /// # Errors
    ///
    /// [`LeaveError`]
    pub async fn leave(&self, room: &RoomId) -> Result<(), LeaveError> {
        let (reply, receiver) = oneshot::channel();
        let call = ClientCall::Leave { room: room.clone(), reply };
        self.send_call(call, receiver).await.unwrap_or(Err(LeaveError::ClientClosed))
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
        self.send_message(room, MessageDraft::json(content)).await
    }

    /// Sends a message to a room and waits until it is in the log.
    ///
    /// The message is queued until the room is joined. It is sent again with the same id after a
    /// temporary error, and after a reconnect once the room's recovery has shown that it is not in
    /// the log. The messages of one client to one room are numbered in the order in which the calls
    /// were first polled. Dropping the future does not cancel the message.
    ///
    /// # Errors
    ///
    /// [`SendError`], which concerns this message only.
    pub async fn send_message(
        &self,
        room: &RoomId,
        message: MessageDraft,
    ) -> Result<SendReceipt, SendError> {
        let bytes = approximate_len(&message);
        let full = |error| match error {
            TryAcquireError::NoPermits => SendError::QueueFull,
            TryAcquireError::Closed => SendError::ClientClosed,
        };
        let one = Arc::clone(&self.send_permits).try_acquire_owned().map_err(full)?;
        let many = Arc::clone(&self.byte_permits).try_acquire_many_owned(bytes).map_err(full)?;
        let (reply, receiver) = oneshot::channel();
        let pending = PendingSend { message, bytes, reply, _permits: [one, many] };
        let call = ClientCall::Send { room: room.clone(), pending };
        self.send_call(call, receiver).await.unwrap_or(Err(SendError::ClientClosed))
    }

    /// Requests a page of a room's log: up to `limit` entries, 1 to 200.
    ///
    /// # Errors
    ///
    /// [`HistoryError`]
    pub async fn history(
        &self,
        room: &RoomId,
        page: HistoryRange,
        limit: u32,
    ) -> Result<RoomHistoryPage, HistoryError> {
        let (reply, receiver) = oneshot::channel();
        let call = ClientCall::History { room: room.clone(), page, limit, reply };
        self.send_call(call, receiver).await.unwrap_or(Err(HistoryError::ClientClosed))
    }

    /// Marks the inbox as seen by a person up to `seq`: notifications with `require_ack` up to
    /// there can be acknowledged.
    pub async fn mark_seen(&self, seq: Seq) {
        // A client that has ended acknowledges nothing.
        let _ = self.calls.send(ClientCall::MarkSeen(seq)).await;
    }

    /// Replaces the token of [`ConnectOptions`] for later connections. A client whose token has
    /// expired reconnects with it.
    pub async fn set_token(&self, token: impl Into<String>) {
        // A client that has ended needs no token.
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

    async fn send_call<T>(&self, call: ClientCall, receiver: oneshot::Receiver<T>) -> Option<T> {
        self.calls.send(call).await.ok()?;
        receiver.await.ok()
    }
}

/// Approximate size of a message in bytes. At least 1, because every message takes some memory.
fn approximate_len(message: &MessageDraft) -> u32 {
    let content = match &message.content {
        MessageContent::Json(content) => frames::encode_text(content).len(),
        MessageContent::Binary(payload) => payload.len(),
    };
    let meta = message.meta.as_ref().map_or(0, |meta| frames::encode_text(meta).len());
    u32::try_from(content + meta).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests;
