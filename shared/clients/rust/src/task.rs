//! The task that owns a client's connection: it connects, comes back, and moves frames between the
//! socket and [`ProtocolState`], which decides everything about rooms and messages.
//!
//! One loop waits for the application's calls, the socket and the clock. Events are handed over
//! with waiting: an application that does not take them slows the client down, and the gateway
//! then sees a slow reader, but nothing is dropped.

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

/// How long `connected` may take.
const CONNECTED_TIMEOUT: Duration = Duration::from_secs(10);
/// How long writing may make no headway.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the gateway may take to answer a close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that lasted this long was a success, so that the back-off starts over. Without it
/// a gateway that takes everybody and drops them at once would be called upon without pause.
const STABLE_AFTER: Duration = Duration::from_secs(1);

/// See the head of this file.
pub(super) struct ClientTask {
    connect_options: ConnectOptions,
    options: ClientOptions,
    calls: mpsc::Receiver<ClientCall>,
    events: mpsc::Sender<ClientEvent>,
    /// Turns true when the application wants the end.
    closing: watch::Receiver<bool>,
    state: ProtocolState,
    backoff: Backoff,
    /// Which of the URLs is next.
    url: usize,
    /// Whether the token was replaced since it was last presented.
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

    /// Runs until the end, and tells it as the last event.
    pub(super) async fn run(mut self) {
        let reason = match self.run_connections().await {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        self.state.fail_all();
        // Handles see the end by this, also where nobody takes events any more.
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
            let since = Instant::now();
            let closed = Box::pin(self.drive(connection)).await?;
            if since.elapsed() >= STABLE_AFTER {
                self.backoff.reset();
            }
            self.url = 0;
            self.after_close(closed).await?;
        }
    }

    /// Tries until a connection is open.
    async fn connect(&mut self) -> Result<ClientConnection, ClientEndReason> {
        loop {
            let options = self.next_options();
            self.token_is_new = false;
            let error = match self.serving_calls(ClientConnection::open(&options)).await? {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            let verdict = self.retry_delay(&error);
            let retry_in = verdict.as_ref().ok().copied();
            self.state.events.push_back(ClientEvent::ConnectFailed {
                url: options.url,
                error,
                retry_in,
            });
            self.deliver_events().await?;
            let wait = verdict?;
            self.serving_calls(sleep_until(Instant::now() + wait)).await?;
        }
    }

    /// The options of the next attempt: whose turn it is, and what the last connection taught.
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

    /// How long to wait after an attempt that failed.
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

    /// Speaks with the gateway until the connection ends.
    async fn drive(
        &mut self,
        mut connection: ClientConnection,
    ) -> Result<ConnectionClosed, ClientEndReason> {
        let mut heard = Instant::now();
        loop {
            if let Some(closed) = self.write(&mut connection).await {
                return Ok(closed);
            }
            if let Err(reason) = self.deliver_events().await {
                close_normally(&mut connection).await;
                return Err(reason);
            }
            let silent_at = heard + self.idle_timeout();
            let wake_at = self.state.next_deadline().map_or(silent_at, |due| due.min(silent_at));
            // Every arm is cancel-safe: a call stays in the channel, a frame in the socket's
            // buffer. The bodies await nothing but the end.
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
                        heard = Instant::now();
                        self.on_received(received);
                    }
                    Err(closed) => return Ok(closed),
                },
                () = sleep_until(wake_at) => {
                    let now = Instant::now();
                    if now >= silent_at {
                        let reason = "nothing heard from the gateway".to_owned();
                        return Ok(ConnectionClosed { code: None, reason });
                    }
                    self.state.on_timer(now);
                }
            }
        }
    }

    /// How long the gateway may say nothing: two of its pings may be missed.
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
                self.state.on_message(message, Some(payload), now)
            }
            ReceivedMessage::BinaryDirect(direct, payload) => {
                self.state.on_direct(direct, Some(payload));
            }
            ReceivedMessage::Text(text) => {
                self.state.events.push_back(ClientEvent::InvalidMessage(text))
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

    /// Writes what is to be written. Returns how the connection ended if it makes no headway.
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
            // What failed shows in reading, after everything that the gateway still said.
            Ok(_) => None,
            Err(_) => {
                Some(ConnectionClosed { code: None, reason: "nothing could be written".to_owned() })
            }
        }
    }

    /// Hands events to the application, waiting for room. Once nobody takes them they are dropped.
    async fn deliver_events(&mut self) -> Result<(), ClientEndReason> {
        while let Some(event) = self.state.events.pop_front() {
            // Both arms are cancel-safe: an event is only sent where there is room for it.
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

    /// Waits for `what` while the application's calls are taken.
    async fn serving_calls<T>(
        &mut self,
        what: impl Future<Output = T>,
    ) -> Result<T, ClientEndReason> {
        let mut what = pin!(what);
        loop {
            // Cancel-safe: `what` is kept over the turns, and a call stays in the channel.
            tokio::select! {
                () = close_requested(&mut self.closing) => return Err(ClientEndReason::Closed),
                call = self.calls.recv() => match call {
                    Some(call) => self.on_call(call),
                    None => return Err(ClientEndReason::Closed),
                },
                result = &mut what => return Ok(result),
            }
        }
    }

    /// Takes note of the end of a connection, and waits until it is time for the next.
    async fn after_close(&mut self, closed: ConnectionClosed) -> Result<(), ClientEndReason> {
        let ConnectionClosed { code, reason } = closed;
        let advice = reconnect_advice(code, &reason);
        if advice == ReconnectAdvice::ReconnectWithoutMessage {
            self.state.fail_largest_send();
        }
        self.keep_identity();
        let asked_to_wait = self.next_node();
        self.state.on_disconnected();
        let comes_back = match advice {
            ReconnectAdvice::Reconnect | ReconnectAdvice::ReconnectWithoutMessage => true,
            ReconnectAdvice::ReconnectWithNewToken => self.token_is_new,
            ReconnectAdvice::DoNotReconnect => false,
        };
        let retry_in = (comes_back && self.options.reconnect).then(|| match asked_to_wait {
            // The gateway has spread its clients over this already.
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

    /// Stays who one is: with the session, and as the guest that the gateway made of somebody
    /// without a name, should the session be lost.
    fn keep_identity(&mut self) {
        self.connect_options.session.clone_from(&self.state.session);
        self.connect_options.inbox = self.state.inbox.cursor().cloned();
        if let (None, None, Some(connected)) =
            (&self.connect_options.user, &self.connect_options.token, &self.state.connected)
        {
            self.connect_options.user = Some(connected.user.id.as_str().to_owned());
        }
    }

    /// Remembers where to go: where the gateway sends us, else back to it. Returns how long it
    /// asked to wait.
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

/// Waits until the application wants the end: it says so, or drops every handle. Cancel-safe.
async fn close_requested(closing: &mut watch::Receiver<bool>) {
    let _ = closing.wait_for(|closing| *closing).await;
}

/// The room that `…/ws/rooms/{room}` joins by itself.
fn url_room(url: &str) -> Option<RoomId> {
    let path = url.split(['?', '#']).next()?;
    let (_, room) = path.rsplit_once("/ws/rooms/")?;
    room.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_of_a_url_is_found() {
        let room = |url| url_room(url).map(|room| room.to_string());
        assert_eq!(room("ws://h/ws/rooms/a.b?history=3").as_deref(), Some("a.b"));
        assert_eq!(room("ws://h/ws"), None);
        assert_eq!(room("ws://h/ws/rooms/"), None);
        assert_eq!(room("ws://h/ws/rooms/a/b"), None);
    }
}
