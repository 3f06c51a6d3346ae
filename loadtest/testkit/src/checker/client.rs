//! One test client on raw connections.
//!
//! It follows the protocol: it reconnects to the next URL when its connection ends or is silent, when
//! and to the node that `reconnect` says, resumes from its cursor, and repeats unacknowledged messages with the same id after it has
//! received the entries that it missed.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    frames,
    options::ConnectOptions,
};
use skein_protocol::{
    ids::{MessageId, RoomId},
    position::Position,
    protocol::server_frame::{ErrorFrame, ReconnectFrame, ServerFrame},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{DeliveryChecker, report::Violation};
use crate::clock::PreciseTimer;

/// Time before a client connects again, unless the gateway has asked for another one.
const RECONNECT_AFTER: Duration = Duration::from_millis(50);

/// Behaviour of a client.
#[derive(Clone, Debug)]
pub struct ClientProfile {
    /// URLs to connect to; each connection takes the next one.
    pub urls: Vec<String>,
    /// How `wss://` connections verify the server ([`ConnectOptions::tls`]).
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// User name.
    pub user: String,
    /// The room it joins.
    pub room: RoomId,
    /// When it sends.
    pub schedule: SendSchedule,
    /// Size of a message's content.
    pub bytes: usize,
    /// Silence after which it gives up a connection.
    pub idle_timeout: Duration,
    /// Interval between pings, which keep a healthy connection from being silent.
    pub ping_every: Duration,
}

/// When a client sends. It has at most one unacknowledged message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendSchedule {
    /// This long after the last ack (closed loop).
    AfterAck(Duration),
    /// At fixed times, whatever became of earlier messages (open loop). A message that cannot be
    /// sent in time is sent as soon as possible, and its latency counts from when it was due.
    Interval {
        /// Due time of the first message, from when sending is first allowed.
        first: Duration,
        /// Time between two messages.
        interval: Duration,
    },
}

/// Instructions to a running client.
#[derive(Clone, Debug)]
pub struct ClientControl {
    /// Whether it is to be connected.
    pub connected: bool,
    /// Number of messages it may begin in all.
    pub messages_max: usize,
}

/// A message without an ack.
#[derive(Debug)]
struct UnackedMessage {
    id: MessageId,
    due: Instant,
    sent: Option<Instant>,
    retry_at: Option<Instant>,
}

/// A test client.
#[derive(Debug)]
pub struct TestClient {
    number: usize,
    profile: ClientProfile,
    checker: Arc<Mutex<DeliveryChecker>>,
    control: watch::Receiver<ClientControl>,
    /// Number of messages it has begun, and whether one is unacknowledged.
    progress: Arc<watch::Sender<(usize, bool)>>,
    unacked: Option<UnackedMessage>,
    /// When the next message is due; `None` before it may send.
    next_at: Option<Instant>,
    /// Whether it has sent before and may not at the moment.
    is_paused: bool,
    /// Wakes it when a message is due.
    timer: PreciseTimer,
    /// The advice of the last `reconnect` frame, until the connection has ended.
    reconnect: Option<ReconnectFrame>,
    /// The node that it named.
    node: Option<String>,
}

impl TestClient {
    /// Creates client `number` of the checker.
    pub fn new(
        number: usize,
        profile: ClientProfile,
        checker: &Arc<Mutex<DeliveryChecker>>,
        control: watch::Receiver<ClientControl>,
        progress: Arc<watch::Sender<(usize, bool)>>,
    ) -> Self {
        Self {
            number,
            profile,
            checker: checker.clone(),
            control,
            progress,
            unacked: None,
            next_at: None,
            is_paused: false,
            timer: PreciseTimer::new(),
            reconnect: None,
            node: None,
        }
    }

    /// Connects again and again until the control channel is closed.
    pub async fn run(mut self) {
        for at in 0.. {
            if self.control.wait_for(|control| control.connected).await.is_err() {
                return;
            }
            let url = self.profile.urls[at % self.profile.urls.len()].clone();
            let mut options = ConnectOptions::new(url).user(self.profile.user.clone());
            options.connect_timeout = Duration::from_secs(1);
            options.tls.clone_from(&self.profile.tls);
            options.node.clone_from(&self.node);
            if let Ok(mut connection) = ClientConnection::open(&options).await {
                let mut is_connected = false;
                self.run_connection(&mut connection, &mut is_connected).await;
                if is_connected {
                    self.checker.lock().on_disconnected(self.number);
                }
            }
            if let Some(unacked) = &mut self.unacked {
                (unacked.sent, unacked.retry_at) = (None, None);
            }
            let after = match self.reconnect.take() {
                Some(ReconnectFrame { after_ms, node, .. }) => {
                    self.node = node;
                    Duration::from_millis(after_ms)
                }
                None => RECONNECT_AFTER,
            };
            sleep_until(Instant::now() + after).await;
        }
    }

    /// Serves one connection until it ends, is silent, or the client is to disconnect.
    async fn run_connection(&mut self, connection: &mut ClientConnection, is_connected: &mut bool) {
        // Where the recovery of the join ends; `None` before the room is joined.
        let mut recovery_end: Option<Position> = None;
        let mut join_at = Some(Instant::now());
        let mut ping_at = Instant::now();
        let mut idle_deadline = Instant::now() + self.profile.idle_timeout;
        loop {
            if !self.control.borrow().connected {
                self.checker.lock().on_left(self.number);
                return;
            }
            let now = Instant::now();
            let mut due = ping_at;
            if now >= ping_at {
                ping_at = now + self.profile.ping_every;
                due = ping_at;
                if connection.send_json(&frames::OutgoingPing::default()).await.is_err() {
                    return;
                }
            }
            if let Some(at) = join_at {
                due = due.min(at);
                if now >= at {
                    join_at = None;
                    if self.join(connection).await.is_err() {
                        return;
                    }
                }
            } else if self.may_send(recovery_end.as_ref()) {
                let at = self.send_at();
                due = due.min(at);
                if now >= at && self.send(connection).await.is_err() {
                    return;
                }
            }
            // Work that was due now is done; the next is due later.
            let due = due.max(now + Duration::from_micros(50)).min(idle_deadline);
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                received = connection.next() => {
                    let Ok(received) = received else { return };
                    idle_deadline = Instant::now() + self.profile.idle_timeout;
                    *is_connected |= matches!(&received, ReceivedMessage::Frame(ServerFrame::Connected(_), _));
                    self.handle_frame(received, &mut recovery_end, &mut join_at);
                }
                changed = self.control.changed() => if changed.is_err() { return },
                () = self.timer.sleep_until(due) => if Instant::now() >= idle_deadline { return },
            }
        }
    }

    async fn join(&self, connection: &mut ClientConnection) -> Result<(), ()> {
        let since = self.checker.lock().cursor(self.number).cloned();
        let history = since.is_none().then_some(0);
        let join = frames::OutgoingJoin {
            since: since.as_ref(),
            history,
            ..frames::OutgoingJoin::new(&self.profile.room)
        };
        connection.send_json(&join).await.map_err(drop)
    }

    /// Whether the room is joined, the recovery is complete, and a message may be sent.
    fn may_send(&mut self, recovery_end: Option<&Position>) -> bool {
        let Some(recovery_end) = recovery_end else { return false };
        let checker = self.checker.clone();
        let mut checker = checker.lock();
        let reached = checker.cursor(self.number).is_some_and(|cursor| {
            cursor.epoch != recovery_end.epoch || cursor.seq >= recovery_end.seq
        });
        if !reached {
            return false;
        }
        if let Some(unacked) = &self.unacked {
            if unacked.sent.is_some() && unacked.retry_at.is_none() {
                return false;
            }
            let position = checker.position_of(self.number, unacked.id).cloned();
            if let Some(position) = position {
                checker.on_acked(self.number, unacked.id, position);
                drop(checker);
                self.complete_message();
                return false;
            }
            return true;
        }
        if self.progress.borrow().0 >= self.control.borrow().messages_max {
            // Messages that were due while it may not send are not sent later.
            self.is_paused = self.next_at.is_some();
            return false;
        }
        if std::mem::take(&mut self.is_paused) {
            self.next_at = Some(Instant::now());
        }
        self.next_at.get_or_insert_with(|| match self.profile.schedule {
            SendSchedule::AfterAck(_) => Instant::now(),
            SendSchedule::Interval { first, .. } => Instant::now() + first,
        });
        true
    }

    fn send_at(&self) -> Instant {
        match &self.unacked {
            Some(unacked) => unacked.retry_at.unwrap_or(unacked.due),
            None => self.next_at.unwrap_or_else(Instant::now),
        }
    }

    async fn send(&mut self, connection: &mut ClientConnection) -> Result<(), ()> {
        let now = Instant::now();
        if self.unacked.is_none() {
            self.progress
                .send_modify(|(count, is_pending)| (*count, *is_pending) = (*count + 1, true));
        }
        let unacked = self.unacked.get_or_insert_with(|| UnackedMessage {
            id: MessageId::random(),
            due: self.next_at.unwrap_or(now),
            sent: None,
            retry_at: None,
        });
        if unacked.sent.is_none() {
            self.checker.lock().on_send(unacked.id, unacked.due);
        }
        (unacked.sent, unacked.retry_at) = (Some(now), None);
        let content: Value = json!("x".repeat(self.profile.bytes));
        let message = frames::OutgoingMessage {
            id: Some(unacked.id),
            ..frames::OutgoingMessage::text(&self.profile.room, &content)
        };
        connection.send_json(&message).await.map_err(drop)
    }

    fn complete_message(&mut self) {
        self.unacked = None;
        let now = Instant::now();
        self.next_at = Some(match self.profile.schedule {
            SendSchedule::AfterAck(pause) => now + pause,
            SendSchedule::Interval { interval, .. } => self.next_at.unwrap_or(now) + interval,
        });
        self.progress.send_modify(|(_, is_pending)| *is_pending = false);
    }

    fn handle_frame(
        &mut self,
        received: ReceivedMessage,
        recovery_end: &mut Option<Position>,
        join_at: &mut Option<Instant>,
    ) {
        let (checker, number, now) = (self.checker.clone(), self.number, Instant::now());
        let mut checker = checker.lock();
        match received {
            ReceivedMessage::Frame(ServerFrame::Connected(_), _) => checker.on_connected(number),
            ReceivedMessage::Frame(ServerFrame::Joined(joined), _) => {
                checker.on_joined(number, &joined, now);
                *recovery_end = Some(Position::new(joined.epoch.clone(), joined.seq));
            }
            ReceivedMessage::Frame(ServerFrame::Message(message), _) => {
                checker.on_message(number, &message, now);
            }
            ReceivedMessage::Frame(ServerFrame::Reset(reset), _) => {
                // A reset without a room concerns the inbox, which is not checked.
                if reset.room.is_some() {
                    checker.on_reset(number, &reset);
                }
            }
            ReceivedMessage::Frame(ServerFrame::Ack(ack), _) => match &self.unacked {
                Some(UnackedMessage { id, sent: Some(sent), .. }) if *id == ack.id => {
                    checker.on_ack(number, &ack, now.duration_since(*sent));
                    drop(checker);
                    self.complete_message();
                }
                _ => checker.report_violation(
                    number,
                    Violation::Protocol,
                    format!("ack of no pending message: {ack:?}"),
                ),
            },
            ReceivedMessage::Frame(ServerFrame::Reconnect(reconnect), _) => {
                self.reconnect = Some(reconnect);
            }
            ReceivedMessage::Frame(ServerFrame::Error(error), _) => {
                self.handle_error(&mut checker, &error, recovery_end.is_some(), join_at);
            }
            ReceivedMessage::Frame(
                ServerFrame::Pong(_)
                | ServerFrame::Ping(_)
                | ServerFrame::Status(_)
                | ServerFrame::MemberJoined(_)
                | ServerFrame::MemberLeft(_)
                | ServerFrame::PresenceDiff(_)
                | ServerFrame::Unknown,
                _,
            )
            | ReceivedMessage::Ping(_)
            | ReceivedMessage::Pong(_) => {}
            other => checker.report_violation(number, Violation::Protocol, format!("{other:?}")),
        }
    }

    fn handle_error(
        &mut self,
        checker: &mut DeliveryChecker,
        error: &ErrorFrame,
        joined: bool,
        join_at: &mut Option<Instant>,
    ) {
        let now = Instant::now();
        if !matches!(error.code.as_str(), "unavailable" | "overloaded") {
            checker.report_violation(self.number, Violation::Protocol, format!("{error:?}"));
        }
        let retry_at = now + Duration::from_millis(error.retry_after_ms.unwrap_or(500));
        if !joined {
            *join_at = Some(retry_at);
        } else if let Some(unacked) = &mut self.unacked
            && error.id.is_none_or(|id| id == unacked.id)
            && let Some(sent) = unacked.sent
        {
            checker.on_rejected(self.number, error.retry_after_ms, now.duration_since(sent));
            unacked.retry_at = Some(retry_at);
        }
    }
}
