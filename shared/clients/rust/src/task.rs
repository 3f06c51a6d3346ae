//! The task that owns a client's connection. It connects, reconnects, and moves frames between the
//! socket and [`ProtocolState`], which decides all about rooms and messages.
//!
//! One loop waits for calls of the application, the socket and the clock. The task waits until the
//! application takes an event: a slow application slows the client down, and the gateway then sees
//! a slow consumer, but no event is dropped.

use std::{future::Future, pin::pin, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use super::{
    api::{ClientEndReason, ClientEvent, ClientOptions},
    backoff::Backoff,
    connection::{ClientConnection, ConnectionClosed, ReceivedMessage},
    options::{ConnectError, ConnectOptions},
    room::EncodedFrame,
    state::{ProtocolState, calls::ClientCall},
};
use skein_protocol::{
    close::{CloseCode, ReconnectAdvice, reconnect_advice},
    ids::RoomId,
};

/// Time limit for the `connected` frame.
const CONNECTED_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for a write without progress.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time limit for the gateway's answer to a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that lasts this long resets the back-off. Otherwise a gateway that accepts and
/// drops every connection would be retried without delay.
const STABLE_AFTER: Duration = Duration::from_secs(1);

/// The task of a client.
pub(super) struct ClientTask {
    connect_options: ConnectOptions,
    options: ClientOptions,
    calls: mpsc::Receiver<ClientCall>,
    events: mpsc::Sender<ClientEvent>,
    /// True once the application closes the client.
    closing: watch::Receiver<bool>,
    state: ProtocolState,
    backoff: Backoff,
    /// Index of the URL to try next.
    url: usize,
    /// Whether the token was replaced since it was last sent.
    token_is_new: bool,
}

impl ClientTask {
    pub(super) fn new(
        connect_options: ConnectOptions,
        options: ClientOptions,
        calls: mpsc::Receiver<ClientCall>,
        events: mpsc::Sender<ClientEvent>,
        closing: watch::Receiver<bool>,
    ) -> Self {
        let mut state = ProtocolState::new(options.in_flight_max);
        state.url_room = url_room(&connect_options.url);
        Self {
            backoff: Backoff::new(options.backoff_base, options.backoff_cap),
            connect_options,
            options,
            calls,
            events,
            closing,
            state,
            url: 0,
            token_is_new: true,
        }
    }

    /// Runs until the client ends, and sends the reason as the last event.
    pub(super) async fn run(mut self) {
        let reason = match self.run_connections().await {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        self.state.fail_all();
        // Handles see the end by this, even if the application takes no events.
        self.calls.close();
        while let Ok(call) = self.calls.try_recv() {
            drop(call);
        }
        drop(self.calls);
        let _ = self.events.send(ClientEvent::Ended(reason)).await;
    }

    async fn run_connections(&mut self) -> Result<std::convert::Infallible, ClientEndReason> {
        loop {
            let connection = Box::pin(self.connect()).await?;
            let opened_at = Instant::now();
            let closed = Box::pin(self.drive(connection)).await?;
            if opened_at.elapsed() >= STABLE_AFTER {
                self.backoff.reset();
            }
            self.url = 0;
            self.after_close(closed).await?;
        }
    }

    /// Retries until a connection is open.
    async fn connect(&mut self) -> Result<ClientConnection, ClientEndReason> {
        loop {
            let options = self.next_options();
            self.token_is_new = false;
            let error = match self.serving_calls(ClientConnection::open(&options)).await? {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            let delay = self.retry_delay(&error);
            let retry_in = delay.as_ref().ok().copied();
            self.state.events.push_back(ClientEvent::ConnectFailed {
                url: options.url,
                error,
                retry_in,
            });
            self.deliver_events().await?;
            let wait = delay?;
            self.serving_calls(sleep_until(Instant::now() + wait)).await?;
        }
    }

    /// The options of the next attempt: its URL, and the position in the room of the URL.
    fn next_options(&self) -> ConnectOptions {
        let mut options = self.connect_options.clone();
        if let Some(url) = self.options.urls.get(self.url) {
            options.url.clone_from(url);
        }
        if let Some(room) = url_room(&options.url)
            && let Some(cursor) = self.state.cursor(&room)
        {
            options.query.retain(|(name, _)| name != "since");
            options.query.push(("since".to_owned(), cursor.to_string()));
        }
        options
    }

    /// The delay after a failed attempt.
    fn retry_delay(&mut self, error: &ConnectError) -> Result<Duration, ClientEndReason> {
        let retry_after = match error {
            ConnectError::InvalidUrl { .. } | ConnectError::InvalidHeader { .. } => {
                return Err(ClientEndReason::InvalidOptions);
            }
            ConnectError::Http { status: 429 | 500.., retry_after, .. } => *retry_after,
            ConnectError::Http { status, .. } => {
                return Err(ClientEndReason::HandshakeRejected { status: *status });
            }
            ConnectError::NoSubprotocol
            | ConnectError::Handshake(_)
            | ConnectError::Io(_)
            | ConnectError::TimedOut(_) => None,
        };
        if !self.options.reconnect {
            return Err(ClientEndReason::ReconnectDisabled);
        }
        self.url += 1;
        if self.url < self.options.urls.len() {
            return Ok(Duration::ZERO);
        }
        self.url = 0;
        Ok(self.delay(retry_after))
    }

    fn delay(&mut self, at_least: Option<Duration>) -> Duration {
        let random = rand::random();
        match at_least {
            Some(at_least) => self.backoff.next_after(at_least, random),
            None => self.backoff.next(random),
        }
    }

    /// Moves frames until the connection ends.
    async fn drive(
        &mut self,
        mut connection: ClientConnection,
    ) -> Result<ConnectionClosed, ClientEndReason> {
        let mut last_received = Instant::now();
        loop {
            if let Some(closed) = self.write(&mut connection).await {
                return Ok(closed);
            }
            if let Err(reason) = self.deliver_events().await {
                close_normally(&mut connection).await;
                return Err(reason);
            }
            let idle_at = last_received + self.idle_timeout();
            let wake_at = self.state.next_deadline().map_or(idle_at, |due| due.min(idle_at));
            // Every arm is cancel-safe: a call stays in the channel, a frame in the socket's
            // buffer. The bodies await only the close.
            tokio::select! {
                () = close_requested(&mut self.closing) => {
                    close_normally(&mut connection).await;
                    return Err(ClientEndReason::Closed);
                }
                call = self.calls.recv() => match call {
                    Some(call) => self.on_call(call),
                    None => {
                        close_normally(&mut connection).await;
                        return Err(ClientEndReason::Closed);
                    }
                },
                received = connection.next() => match received {
                    Ok(received) => {
                        last_received = Instant::now();
                        self.on_received(received);
                    }
                    Err(closed) => return Ok(closed),
                },
                () = sleep_until(wake_at) => {
                    let now = Instant::now();
                    if now >= idle_at {
                        let reason = "received nothing from the gateway".to_owned();
                        return Ok(ConnectionClosed { code: None, reason });
                    }
                    self.state.on_timer(now);
                }
            }
        }
    }

    /// How long the gateway may send nothing: two of its pings can be lost.
    fn idle_timeout(&self) -> Duration {
        match &self.state.connected {
            Some(connected) => {
                Duration::from_secs(connected.heartbeat_interval) * 2 + WRITE_TIMEOUT
            }
            None => CONNECTED_TIMEOUT,
        }
    }

    fn on_received(&mut self, received: ReceivedMessage) {
        let now = Instant::now();
        match received {
            ReceivedMessage::Frame(frame, text) => self.state.on_frame(frame, text, now),
            ReceivedMessage::Binary(message, payload) => {
                self.state.on_message(message, Some(payload), now);
            }
            ReceivedMessage::BinaryDirect(direct, payload) => {
                self.state.on_direct(direct, Some(payload));
            }
            ReceivedMessage::Text(text) => {
                self.state.events.push_back(ClientEvent::InvalidMessage(text));
            }
            ReceivedMessage::Bytes(bytes) => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                self.state.events.push_back(ClientEvent::InvalidMessage(text));
            }
            ReceivedMessage::Ping(_) | ReceivedMessage::Pong(_) => {}
        }
    }

    fn on_call(&mut self, call: ClientCall) {
        if let ClientCall::SetToken(token) = call {
            if let Some(known) = &mut self.connect_options.token {
                known.token = token;
            }
            self.token_is_new = true;
            return;
        }
        self.state.on_call(call, Instant::now());
    }

    /// Writes all pending frames. Returns how the connection ended if a write makes no progress.
    async fn write(&mut self, connection: &mut ClientConnection) -> Option<ConnectionClosed> {
        if self.state.out.is_empty() {
            return None;
        }
        let out = std::mem::take(&mut self.state.out);
        let written = async {
            for outgoing in out {
                match outgoing {
                    EncodedFrame::Text(text) => connection.feed_text(text).await?,
                    EncodedFrame::Binary(bytes) => connection.feed_bytes(bytes).await?,
                }
            }
            connection.flush().await
        };
        match timeout(WRITE_TIMEOUT, written).await {
            // A failed write shows in reading, after all that the gateway still sent.
            Ok(_) => None,
            Err(_) => {
                Some(ConnectionClosed { code: None, reason: "a write made no progress".to_owned() })
            }
        }
    }

    /// Delivers events to the application, waiting for space in its channel. Events are dropped if
    /// the application has dropped the receiver.
    async fn deliver_events(&mut self) -> Result<(), ClientEndReason> {
        while let Some(event) = self.state.events.pop_front() {
            // Both arms are cancel-safe: an event is sent only with a permit.
            let permit = tokio::select! {
                () = close_requested(&mut self.closing) => return Err(ClientEndReason::Closed),
                permit = self.events.reserve() => permit,
            };
            if let Ok(permit) = permit {
                permit.send(event);
            }
        }
        Ok(())
    }

    /// Waits for `future` while calls are handled.
    async fn serving_calls<T>(
        &mut self,
        future: impl Future<Output = T>,
    ) -> Result<T, ClientEndReason> {
        let mut future = pin!(future);
        loop {
            // Cancel-safe: `future` is pinned outside the loop, and a call stays in the channel.
            tokio::select! {
                () = close_requested(&mut self.closing) => return Err(ClientEndReason::Closed),
                call = self.calls.recv() => match call {
                    Some(call) => self.on_call(call),
                    None => return Err(ClientEndReason::Closed),
                },
                result = &mut future => return Ok(result),
            }
        }
    }

    /// Handles the end of a connection, and waits until the next one is due.
    async fn after_close(&mut self, closed: ConnectionClosed) -> Result<(), ClientEndReason> {
        let ConnectionClosed { code, reason } = closed;
        let advice = reconnect_advice(code, &reason);
        if advice == ReconnectAdvice::ReconnectWithoutMessage {
            self.state.fail_largest_send();
        }
        self.keep_identity();
        let requested_delay = self.next_node();
        self.state.on_disconnected();
        let reconnects = match advice {
            ReconnectAdvice::Reconnect | ReconnectAdvice::ReconnectWithoutMessage => true,
            ReconnectAdvice::ReconnectWithNewToken => self.token_is_new,
            ReconnectAdvice::DoNotReconnect => false,
        };
        let retry_in = (reconnects && self.options.reconnect).then(|| match requested_delay {
            // The gateway has spread its clients over this delay.
            Some(after) => after,
            None => self.delay(None),
        });
        let event = ClientEvent::Disconnected { code, reason: reason.clone(), retry_in };
        self.state.events.push_back(event);
        self.deliver_events().await?;
        if !self.options.reconnect {
            return Err(ClientEndReason::ReconnectDisabled);
        }
        match (retry_in, advice) {
            (Some(retry_in), _) => self.serving_calls(sleep_until(Instant::now() + retry_in)).await,
            (None, ReconnectAdvice::ReconnectWithNewToken) => self.wait_for_token().await,
            (None, _) => {
                Err(ClientEndReason::ClosedByServer { code: code.unwrap_or_default(), reason })
            }
        }
    }

    async fn wait_for_token(&mut self) -> Result<(), ClientEndReason> {
        while !self.token_is_new {
            // Cancel-safe, as in `serving_calls`.
            tokio::select! {
                () = close_requested(&mut self.closing) => return Err(ClientEndReason::Closed),
                call = self.calls.recv() => match call {
                    Some(call) => self.on_call(call),
                    None => return Err(ClientEndReason::Closed),
                },
            }
        }
        Ok(())
    }

    /// Keeps the identity for the next connection: the session, and the guest id that the gateway
    /// assigned, in case the session is lost.
    fn keep_identity(&mut self) {
        self.connect_options.session.clone_from(&self.state.session);
        self.connect_options.inbox = self.state.inbox.cursor().cloned();
        if let (None, None, Some(connected)) =
            (&self.connect_options.user, &self.connect_options.token, &self.state.connected)
        {
            self.connect_options.user = Some(connected.user.id.as_str().to_owned());
        }
    }

    /// Chooses the node for the next connection: the one that `reconnect` names, else the same one.
    /// Returns the delay that `reconnect` requests.
    fn next_node(&mut self) -> Option<Duration> {
        let reconnect = self.state.reconnect.take();
        let route = self.state.connected.as_ref().map(|connected| connected.route.clone());
        let node = reconnect.as_ref().and_then(|reconnect| reconnect.node.clone());
        if let Some(node) = node.or(route) {
            self.connect_options.node = Some(node);
        }
        reconnect.map(|reconnect| Duration::from_millis(reconnect.after_ms))
    }
}

async fn close_normally(connection: &mut ClientConnection) {
    let _ = timeout(CLOSE_TIMEOUT, connection.close(CloseCode::Normal.number(), "")).await;
}

/// Waits until the application closes the client or drops every handle. Cancel-safe.
async fn close_requested(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

/// The room that `…/ws/rooms/{room}` joins without a `join` frame.
fn url_room(url: &str) -> Option<RoomId> {
    let path = url.split(['?', '#']).next()?;
    let (_, room) = path.rsplit_once("/ws/rooms/")?;
    room.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_of_a_url_is_parsed() {
        let room = |url| url_room(url).map(|room| room.to_string());
        assert_eq!(room("ws://h/ws/rooms/a.b?history=3").as_deref(), Some("a.b"));
        assert_eq!(room("ws://h/ws"), None);
        assert_eq!(room("ws://h/ws/rooms/"), None);
        assert_eq!(room("ws://h/ws/rooms/a/b"), None);
    }
}
