//! One test client on raw connections.
//!
//! It follows the protocol: it reconnects to the next URL when its connection ends or is silent,
//! resumes from its cursor, and repeats unacknowledged messages with the same id after it has
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
    protocol::server_frame::{ErrorFrame, ServerFrame},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{DeliveryChecker, report::Violation};
use crate::clock::PreciseTimer;

/// Behaviour of a client.
#[derive(Clone, Debug)]
pub struct ClientProfile {
    /// URLs to connect to; each connection takes the next one.
    pub urls: Vec<String>,
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
    begun: Instant,
    sent: Option<Instant>,
    again_at: Option<Instant>,
}

/// A test client.
#[derive(Debug)]
pub struct TestClient {
    number: usize,
    profile: ClientProfile,
    checker: Arc<Mutex<DeliveryChecker>>,
    control: watch::Receiver<ClientControl>,
    /// Number of messages it has begun, and whether one is unacknowledged.
    begun: Arc<watch::Sender<(usize, bool)>>,
    unacked: Option<UnackedMessage>,
    /// When the next message is due; `None` before it may send.
    next_at: Option<Instant>,
    /// Whether it has sent before and may not at the moment.
    is_paused: bool,
    /// Wakes it when a message is due.
    timer: PreciseTimer,
}

impl TestClient {
    /// Creates client `number` of the checker.
    pub fn new(
        number: usize,
        profile: ClientProfile,
        checker: &Arc<Mutex<DeliveryChecker>>,
        control: watch::Receiver<ClientControl>,
        begun: Arc<watch::Sender<(usize, bool)>>,
    ) -> Self {
        Self {
            number,
            profile,
            checker: checker.clone(),
            control,
            begun,
            unacked: None,
            next_at: None,
            is_paused: false,
            timer: PreciseTimer::new(),
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
            if let Ok(mut connection) = ClientConnection::open(&options).await {
                let mut is_connected = false;
                self.run_connection(&mut connection, &mut is_connected).await;
                if is_connected {
                    self.checker.lock().on_disconnected();
                }
            }
            if let Some(unacked) = &mut self.unacked {
                (unacked.sent, unacked.again_at) = (None, None);
            }
            sleep_until(Instant::now() + Duration::from_millis(50)).await;
        }
    }

    /// Serves one connection until it ends, is silent, or the client is to disconnect.
    async fn run_connection(&mut self, connection: &mut ClientConnection, is_connected: &mut bool) {
        // Where the recovery of the join ends; `None` before the room is joined.
        let mut goal: Option<Position> = None;
        let mut join_at = Some(Instant::now());
        let mut ping_at = Instant::now();
        let mut heard_by = Instant::now() + self.profile.idle_timeout;
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
            } else if self.may_send(goal.as_ref()) {
                let at = self.send_at();
                due = due.min(at);
                if now >= at && self.send(connection).await.is_err() {
                    return;
                }
            }
            // Work that was due now is done; the next is due later.
            let due = due.max(now + Duration::from_micros(50)).min(heard_by);
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                received = connection.next() => {
                    let Ok(received) = received else { return };
                    heard_by = Instant::now() + self.profile.idle_timeout;
                    *is_connected |= matches!(&received, ReceivedMessage::Frame(ServerFrame::Connected(_), _));
                    self.take(received, &mut goal, &mut join_at);
                }
                changed = self.control.changed() => if changed.is_err() { return },
                () = self.timer.sleep_until(due) => if Instant::now() >= heard_by { return },
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
    fn may_send(&mut self, goal: Option<&Position>) -> bool {
        let Some(goal) = goal else { return false };
        let checker = self.checker.clone();
        let mut checker = checker.lock();
        let reached = checker
            .cursor(self.number)
            .is_some_and(|cursor| cursor.epoch != goal.epoch || cursor.seq >= goal.seq);
        if !reached {
            return false;
        }
        if let Some(unacked) = &self.unacked {
            if unacked.sent.is_some() && unacked.again_at.is_none() {
                return false;
            }
            let place = checker.position_of(self.number, unacked.id).cloned();
            if let Some(position) = place {
                checker.on_acked(self.number, unacked.id, position);
                drop(checker);
                self.settled();
                return false;
            }
            return true;
        }
        if self.begun.borrow().0 >= self.control.borrow().messages_max {
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
            Some(unacked) => unacked.again_at.unwrap_or(unacked.begun),
            None => self.next_at.unwrap_or_else(Instant::now),
        }
    }

    async fn send(&mut self, connection: &mut ClientConnection) -> Result<(), ()> {
        let now = Instant::now();
        if self.unacked.is_none() {
            self.begun.send_modify(|(count, waits)| (*count, *waits) = (*count + 1, true));
        }
        let unacked = self.unacked.get_or_insert_with(|| UnackedMessage {
            id: MessageId::random(),
            begun: self.next_at.unwrap_or(now),
            sent: None,
            again_at: None,
        });
        if unacked.sent.is_none() {
            self.checker.lock().on_send(unacked.id, unacked.begun);
        }
        (unacked.sent, unacked.again_at) = (Some(now), None);
        let content: Value = json!("x".repeat(self.profile.bytes));
        let message = frames::OutgoingMessage {
            id: Some(unacked.id),
            ..frames::OutgoingMessage::text(&self.profile.room, &content)
        };
        connection.send_json(&message).await.map_err(drop)
    }

    fn settled(&mut self) {
        self.unacked = None;
        let now = Instant::now();
        self.next_at = Some(match self.profile.schedule {
            SendSchedule::AfterAck(pause) => now + pause,
            SendSchedule::Interval { interval, .. } => self.next_at.unwrap_or(now) + interval,
        });
        self.begun.send_modify(|(_, waits)| *waits = false);
    }

    fn take(
        &mut self,
        received: ReceivedMessage,
        goal: &mut Option<Position>,
        join_at: &mut Option<Instant>,
    ) {
        let (checker, me, now) = (self.checker.clone(), self.number, Instant::now());
        let mut checker = checker.lock();
        match received {
            ReceivedMessage::Frame(ServerFrame::Connected(_), _) => checker.on_connected(me),
            ReceivedMessage::Frame(ServerFrame::Joined(joined), _) => {
                checker.on_joined(me, &joined, now);
                *goal = Some(Position::new(joined.epoch.clone(), joined.seq));
            }
            ReceivedMessage::Frame(ServerFrame::Message(message), _) => {
                checker.on_message(me, &message, now)
            }
            ReceivedMessage::Frame(ServerFrame::Reset(reset), _) => {
                // A reset without a room concerns the inbox, which is not checked.
                if reset.room.is_some() {
                    checker.on_reset(me, &reset);
                }
            }
            ReceivedMessage::Frame(ServerFrame::Ack(ack), _) => match &self.unacked {
                Some(UnackedMessage { id, sent: Some(sent), .. }) if *id == ack.id => {
                    checker.on_ack(me, &ack, now.duration_since(*sent));
                    drop(checker);
                    self.settled();
                }
                _ => checker.report_violation(
                    me,
                    Violation::Protocol,
                    format!("ack of no pending message: {ack:?}"),
                ),
            },
            ReceivedMessage::Frame(ServerFrame::Error(refusal), _) => {
                self.refused(&mut checker, &refusal, goal.is_some(), join_at);
            }
            ReceivedMessage::Frame(
                ServerFrame::Pong(_)
                | ServerFrame::Ping(_)
                | ServerFrame::Status(_)
                | ServerFrame::MemberJoined(_)
                | ServerFrame::MemberLeft(_)
                | ServerFrame::PresenceDiff(_)
                | ServerFrame::Unknown
                | ServerFrame::Reconnect(_),
                _,
            )
            | ReceivedMessage::Ping(_)
            | ReceivedMessage::Pong(_) => {}
            other => checker.report_violation(me, Violation::Protocol, format!("{other:?}")),
        }
    }

    fn refused(
        &mut self,
        checker: &mut DeliveryChecker,
        refusal: &ErrorFrame,
        joined: bool,
        join_at: &mut Option<Instant>,
    ) {
        let now = Instant::now();
        if !matches!(refusal.code.as_str(), "unavailable" | "overloaded") {
            checker.report_violation(self.number, Violation::Protocol, format!("{refusal:?}"));
        }
        let again_at = now + Duration::from_millis(refusal.retry_after_ms.unwrap_or(500));
        if !joined {
            *join_at = Some(again_at);
        } else if let Some(unacked) = &mut self.unacked
            && refusal.id.is_none_or(|id| id == unacked.id)
            && let Some(sent) = unacked.sent
        {
            checker.on_refused(self.number, refusal.retry_after_ms, now.duration_since(sent));
            unacked.again_at = Some(again_at);
        }
    }
}
