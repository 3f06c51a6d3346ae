//! One client's state, and what each of its frames does: [`Session::handle`] is one match.
//!
//! Frames are handled in the order sent. What needs no waiting is done at once, and a publish is
//! handed on without waiting for its `ack`. What has to wait (`join`, `leave`, `history`) is a
//! [`Request`] that the connection's task performs before it takes the next frame.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;
use shared::{
    error::ErrorCode,
    ids::RoomId,
    protocol::{
        Ref,
        answer::{Ack, Answer, History, Left, Pong, Refusal},
        request::{self, Body, Message, Request as Frame},
    },
    token::Access,
};
use tokio::time::Instant;

use crate::{
    bus::{Appended, Bus, BusError, Range},
    hub::{
        Hub,
        join::{Start, history},
        member::{PlacedAck, Subscriber, text_frame},
    },
    limits::{Pace, Rate},
    publisher::{Publisher, Receipt, Sender},
    telemetry::metrics::Metrics,
};

pub mod auth;

use auth::Identity;

/// What sessions share.
pub struct Services {
    /// The way in for messages.
    pub publisher: Publisher,
    /// Who is in which room.
    pub hub: Hub,
    /// For reads of a log.
    pub bus: Arc<dyn Bus>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// How much a session may.
    pub limits: SessionLimits,
}

/// How much a session may.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    /// `message` frames.
    pub messages: Rate,
    /// All other frames.
    pub frames: Rate,
    /// Rooms at a time.
    pub rooms_max: usize,
    /// How long a frame may wait for the bus.
    pub wait_max: Duration,
}

/// A client, from `connected` to its end.
pub struct Session {
    services: Arc<Services>,
    identity: Identity,
    subscriber: Arc<Subscriber>,
    rooms: HashSet<RoomId>,
    messages: Pace,
    frames: Pace,
    /// Publishes that were handed on and not answered.
    unanswered: Arc<AtomicUsize>,
}

/// A frame that has to wait for something.
#[derive(Debug)]
pub enum Request {
    /// `join`
    Join(Option<Ref>, request::Join),
    /// `leave`
    Leave(Option<Ref>, RoomId),
    /// `history`
    History(Option<Ref>, request::History),
}

/// What an `unavailable` tells to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Session {
    /// A session of `identity`, whose frames go to `subscriber`.
    pub fn new(services: Arc<Services>, identity: Identity, subscriber: Arc<Subscriber>) -> Self {
        Self {
            services,
            identity,
            subscriber,
            rooms: HashSet::new(),
            messages: Pace::default(),
            frames: Pace::default(),
            unanswered: Arc::default(),
        }
    }

    /// When the session's token ends.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.identity.expires_at
    }

    /// Whether everything that was handed on has been answered.
    pub fn is_settled(&self) -> bool {
        self.unanswered.load(Ordering::Acquire) == 0
    }

    /// Handles a frame. What it returns has to be [performed](Session::perform) before the next.
    pub fn handle(
        &mut self,
        frame: Result<Frame<'_>, Box<Refusal>>,
        now: Instant,
    ) -> Option<Request> {
        let frame = match frame {
            Ok(frame) => frame,
            Err(refusal) => {
                self.refuse_at_pace(*refusal, now);
                return None;
            }
        };
        let reference = frame.reference;
        if let Body::Message(message) = &frame.body {
            self.message(reference, message, now);
            return None;
        }
        if let Err(wait) = self.frames.take(self.services.limits.frames, now) {
            self.refuse(rate_limited(reference, kind_of(&frame.body), wait));
            return None;
        }
        match frame.body {
            Body::Join(join) => Some(Request::Join(reference, join)),
            Body::Leave(leave) => Some(Request::Leave(reference, leave.room)),
            Body::History(history) => Some(Request::History(reference, history)),
            Body::Ping(ping) => {
                self.pong(reference, ping.timestamp);
                None
            }
            Body::Message(_) | Body::Pong => None,
        }
    }

    /// Does what a frame asks for and had to wait.
    pub async fn perform(&mut self, request: Request) {
        match request {
            Request::Join(reference, join) => {
                // The refusal has been sent, which is all a client of `/ws` needs.
                let _ = self.join(reference, join).await;
            }
            Request::Leave(reference, room) => self.leave(reference, room).await,
            Request::History(reference, history) => self.history(reference, history).await,
        }
    }

    /// Joins a room.
    ///
    /// # Errors
    ///
    /// The code of the `error` that was sent.
    pub async fn join(
        &mut self,
        reference: Option<Ref>,
        join: request::Join,
    ) -> Result<(), ErrorCode> {
        let room = join.room;
        let refusal =
            |code, text: &str| refusal(reference.clone(), "join", Some(&room), code, text);
        let again = self.rooms.contains(&room);
        if self.identity.access(&room).is_none() {
            let text = "the token does not allow this room";
            return Err(self.refuse(refusal(ErrorCode::Forbidden, text)));
        }
        if !again && self.rooms.len() >= self.services.limits.rooms_max {
            let text = format!("at most {} rooms at a time", self.services.limits.rooms_max);
            return Err(self.refuse(refusal(ErrorCode::LimitReached, &text)));
        }
        let start = match join.since {
            Some(since) => Start::Since(since),
            None => Start::Newest(join.history),
        };
        let hub = self.services.hub.clone();
        let joining = hub.join(room.clone(), self.subscriber.clone(), reference.clone(), start);
        match tokio::time::timeout(self.services.limits.wait_max, joining).await {
            Ok(Ok(())) => {
                self.rooms.insert(room);
                Ok(())
            }
            failed => {
                if failed.is_err() && !again {
                    // The hub may have let it in at the very moment it was given up.
                    let connection = self.subscriber.connection;
                    self.services.hub.leave(room.clone(), connection, None).await;
                }
                let text = "the bus is away; join again later";
                Err(self.refuse(after(refusal(ErrorCode::Unavailable, text), RETRY_AFTER)))
            }
        }
    }

    /// Ends the session: it is a member nowhere any more.
    pub async fn end(&mut self) {
        let connection = self.subscriber.connection;
        for room in std::mem::take(&mut self.rooms) {
            self.services.hub.leave(room, connection, None).await;
        }
    }

    /// Has the rooms continued in which this session is behind, if its outbox has room.
    pub async fn catch_up(&self) {
        for room in self.subscriber.outbox.take_lagging() {
            self.services.hub.catch_up(room, self.subscriber.connection).await;
        }
    }

    async fn leave(&mut self, reference: Option<Ref>, room: RoomId) {
        self.rooms.remove(&room);
        let left = text_frame(&Answer::Left(Left { reference, room: room.clone() }));
        let subscriber = self.subscriber.clone();
        let connection = subscriber.connection;
        self.services.hub.leave(room, connection, Some((subscriber, left))).await;
    }

    async fn history(&mut self, reference: Option<Ref>, wanted: request::History) {
        let room = wanted.room;
        let refusal =
            |code, text: &str| refusal(reference.clone(), "history", Some(&room), code, text);
        if !self.rooms.contains(&room) {
            self.refuse(refusal(ErrorCode::NotJoined, "join the room first"));
            return;
        }
        let limit = wanted.limit;
        let range = match (wanted.before, wanted.after) {
            (_, Some(seq)) => Range::After { seq, limit },
            (Some(seq), None) => Range::Before { seq, limit },
            (None, None) => Range::Newest { limit },
        };
        let read = self.services.bus.read(room.clone(), range);
        let page = match tokio::time::timeout(self.services.limits.wait_max, read).await {
            Ok(Ok(page)) => page,
            Ok(Err(_)) | Err(_) => {
                let text = "the bus is away; ask again later";
                self.refuse(after(refusal(ErrorCode::Unavailable, text), RETRY_AFTER));
                return;
            }
        };
        let messages = if range.keeps_newest() {
            let mut messages = history(page.entries.iter().rev());
            messages.reverse();
            messages
        } else {
            history(page.entries.iter())
        };
        let more = if range.keeps_newest() {
            let first = page.entries.len() - messages.len();
            let first = page.entries.get(first).map_or(0, |entry| entry.position.seq);
            page.oldest != 0 && first > page.oldest
        } else {
            let last = messages.len().checked_sub(1).map(|last| &page.entries[last]);
            last.is_some_and(|last| last.position.seq < page.top)
        };
        self.answer(&Answer::History(Box::new(History {
            reference,
            room,
            epoch: page.epoch,
            messages,
            more,
        })));
    }

    fn pong(&self, reference: Option<Ref>, timestamp: Option<&RawValue>) {
        let original_timestamp = timestamp.and_then(|raw| serde_json::from_str(raw.get()).ok());
        let timestamp = shared::timestamp(SystemTime::now());
        self.answer(&Answer::Pong(Pong { reference, timestamp, original_timestamp }));
    }

    fn message(&mut self, reference: Option<Ref>, message: &Message<'_>, now: Instant) {
        let room = &message.room;
        let refusal = |code, text: &str| Refusal {
            id: message.id,
            ..refusal(reference.clone(), "message", Some(room), code, text)
        };
        if let Err(wait) = self.messages.take(self.services.limits.messages, now) {
            let refused = Refusal {
                room: Some(room.clone()),
                id: message.id,
                ..rate_limited(reference, "message", wait)
            };
            self.refuse(refused);
            return;
        }
        if !self.rooms.contains(room) {
            self.refuse(refusal(ErrorCode::NotJoined, "join the room first"));
            return;
        }
        if self.identity.access(room) != Some(Access::ReadWrite) {
            self.refuse(refusal(ErrorCode::Forbidden, "the token allows to read here only"));
            return;
        }
        let receipt = Receipt::of(message);
        let sender = Sender { connection: self.subscriber.connection, user: &self.identity.user };
        let outcome = Outcome {
            subscriber: self.subscriber.clone(),
            metrics: self.services.metrics.clone(),
            reference: reference.clone(),
            room: room.clone(),
            receipt: receipt.clone(),
            echo: message.echo,
            unanswered: self.unanswered.clone(),
        };
        outcome.expect();
        let published = self.services.publisher.publish(sender, message, &receipt, {
            let outcome = outcome.clone();
            move |result| outcome.tell(result)
        });
        if let Err(error) = published {
            outcome.forget();
            self.refuse(refusal(ErrorCode::TooLarge, &error.to_string()));
        }
    }

    fn answer(&self, answer: &Answer<Box<RawValue>>) {
        self.subscriber.answer(answer);
    }

    /// Refuses a frame that could not be read. Bad frames have a pace like others.
    fn refuse_at_pace(&mut self, refusal: Refusal, now: Instant) {
        match self.frames.take(self.services.limits.frames, now) {
            Ok(()) => self.refuse(refusal),
            Err(wait) => self.refuse(rate_limited(
                refusal.reference,
                refusal.answers.as_deref().unwrap_or_default(),
                wait,
            )),
        };
    }

    fn refuse(&self, refusal: Refusal) -> ErrorCode {
        let code = refusal.code;
        self.services.metrics.errors.of(code).inc();
        self.answer(&Answer::Error(Box::new(refusal)));
        code
    }
}

/// What is told of a publish when its fate is known.
#[derive(Clone)]
struct Outcome {
    subscriber: Arc<Subscriber>,
    metrics: Arc<Metrics>,
    reference: Option<Ref>,
    room: RoomId,
    receipt: Receipt,
    echo: bool,
    unanswered: Arc<AtomicUsize>,
}

impl Outcome {
    /// Prepares for the answer: it may come before `publish` returns.
    fn expect(&self) {
        self.unanswered.fetch_add(1, Ordering::AcqRel);
        if !self.echo {
            let (room, timestamp) = (self.room.clone(), self.receipt.timestamp.clone());
            let ack = PlacedAck::new(room, self.reference.clone(), timestamp);
            self.subscriber.place_ack(self.receipt.id, ack);
        }
    }

    /// Takes [`Outcome::expect`] back.
    fn forget(&self) {
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        if !self.echo {
            self.subscriber.unplace_ack(self.receipt.id);
        }
    }

    fn tell(self, result: Result<Appended, BusError>) {
        match result {
            // The hub sends the `ack` in the place of the copy.
            Ok(Appended { duplicate: false, position }) if !self.echo => {
                self.subscriber.appended(self.receipt.id, position);
            }
            Ok(appended) => {
                // A gateway's own repeat is told as a duplicate; its `ack` may have been placed.
                let placed = !self.echo && !self.subscriber.unplace_ack(self.receipt.id);
                if !placed {
                    self.ack(appended);
                }
            }
            Err(error) => {
                if !self.echo {
                    self.subscriber.unplace_ack(self.receipt.id);
                }
                self.refuse(error);
            }
        }
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        self.subscriber.outbox.wake();
    }

    fn ack(&self, Appended { position, duplicate }: Appended) {
        self.subscriber.answer(&Answer::Ack(Box::new(Ack {
            reference: self.reference.clone(),
            id: self.receipt.id,
            room: self.room.clone(),
            epoch: position.epoch,
            seq: position.seq,
            timestamp: self.receipt.timestamp.clone(),
            duplicate,
        })));
    }

    fn refuse(&self, error: BusError) {
        let (code, text) = match error {
            BusError::Unavailable => (
                ErrorCode::Unavailable,
                "the bus is away; whether the message was taken is not known: send it again with \
                 the same id",
            ),
            BusError::Overloaded => (
                ErrorCode::Overloaded,
                "too much waits for the bus; send it again with the same id",
            ),
            BusError::Refused => (ErrorCode::Internal, "the message could not be stored"),
        };
        let refusal = Refusal {
            id: Some(self.receipt.id),
            ..refusal(self.reference.clone(), "message", Some(&self.room), code, text)
        };
        let refusal = if code.is_retryable() { after(refusal, RETRY_AFTER) } else { refusal };
        self.metrics.errors.of(code).inc();
        self.subscriber.answer(&Answer::Error(Box::new(refusal)));
    }
}

fn refusal(
    reference: Option<Ref>,
    answers: &str,
    room: Option<&RoomId>,
    code: ErrorCode,
    message: &str,
) -> Refusal {
    Refusal {
        reference,
        answers: Some(answers.to_owned()).filter(|answers| !answers.is_empty()),
        room: room.cloned(),
        ..*Refusal::new(code, message)
    }
}

/// A refusal that says when to try again.
fn after(refusal: Refusal, wait: Duration) -> Refusal {
    // Rounded up, since a client that waits as told must not be too early.
    let retry_after_ms = Some(wait.as_millis() as u64 + 1);
    Refusal { retry_after_ms, ..refusal }
}

fn rate_limited(reference: Option<Ref>, answers: &str, wait: Duration) -> Refusal {
    let text = "too many frames in too short a time; this one was not taken";
    after(refusal(reference, answers, None, ErrorCode::RateLimited, text), wait)
}

fn kind_of(body: &Body<'_>) -> &'static str {
    match body {
        Body::Join(_) => "join",
        Body::Leave(_) => "leave",
        Body::Message(_) => "message",
        Body::History(_) => "history",
        Body::Ping(_) => "ping",
        Body::Pong => "pong",
    }
}
