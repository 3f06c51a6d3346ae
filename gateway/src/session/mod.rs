//! One client's state, and what each of its frames does: [`Session::handle`] is one match.
//!
//! Frames are handled in the order sent. What needs no waiting is done at once, and a publish is
//! handed on without waiting for its `ack`. What has to wait (`join`, `leave`, `history`) is a
//! [`Request`] that the connection's task performs before it takes the next frame.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;
use shared::{
    envelope::Author,
    error::ErrorCode,
    ids::RoomId,
    protocol::{
        Ref,
        answer::{Ack, Answer, BusState, Pong, Refusal, Status},
        request::{self, Body, Message, Request as Frame},
    },
    token::Access,
};
use smallvec::SmallVec;
use tokio::{sync::watch, time::Instant};

use crate::{
    bus::{Appended, BoxFuture, Bus, BusError, standing::Told},
    hub::{
        Hub,
        member::{PlacedAck, Subscriber},
    },
    limits::{Pace, Rate},
    publisher::{Publisher, Receipt, Sender},
    telemetry::metrics::Metrics,
};

pub mod auth;
mod perform;

use auth::Identity;

/// What sessions share.
pub struct Services {
    /// The way in for messages.
    pub publisher: Publisher,
    /// Who is in which room.
    pub hub: Hub,
    /// For reads of a log.
    pub bus: Arc<dyn Bus>,
    /// What clients are told of the bus.
    pub told: watch::Receiver<Told>,
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
    author: Author,
    subscriber: Arc<Subscriber>,
    rooms: BTreeSet<RoomId>,
    /// The room whose join is being performed.
    joining: Option<RoomId>,
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

/// What became of a [`Request`]. Its answer has been sent.
#[derive(Debug)]
pub enum Performed {
    /// The connection is a member.
    Joined,
    /// It is not, and was told so with this code.
    NotJoined(ErrorCode),
    /// Nothing changed for the session.
    Answered,
}

/// What an `unavailable` tells to wait.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Session {
    /// A session of `identity`, whose frames go to `subscriber`.
    pub fn new(services: Arc<Services>, identity: Identity, subscriber: Arc<Subscriber>) -> Self {
        Self {
            services,
            author: Author::of(&identity.user.id),
            identity,
            subscriber,
            rooms: BTreeSet::new(),
            joining: None,
            messages: Pace::default(),
            frames: Pace::default(),
            unanswered: Arc::default(),
        }
    }

    /// What clients are told of the bus, to be [told](Session::tell) when it changes.
    pub fn told(&self) -> watch::Receiver<Told> {
        let mut told = self.services.told.clone();
        if told.borrow_and_update().bus == BusState::Down {
            told.mark_changed();
        }
        told
    }

    /// Sends `status`.
    pub fn tell(&self, told: Told) {
        let since = shared::timestamp(told.since.unwrap_or_else(SystemTime::now));
        self.answer(&Answer::Status(Status { bus: told.bus, since }));
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

    /// Begins what a frame asks for that has to wait. The future is on its own, so that the
    /// connection can be looked after meanwhile; its output goes to [`Session::finish`].
    pub fn perform(&mut self, request: Request) -> BoxFuture<Performed> {
        let (services, subscriber) = (self.services.clone(), self.subscriber.clone());
        match request {
            Request::Join(reference, join) => match self.may_join(reference.as_ref(), &join.room) {
                Ok(()) => {
                    let is_member = self.rooms.contains(&join.room);
                    self.joining = Some(join.room.clone());
                    Box::pin(perform::join(services, subscriber, reference, join, is_member))
                }
                Err(refusal) => {
                    let code = self.refuse(refusal);
                    Box::pin(std::future::ready(Performed::NotJoined(code)))
                }
            },
            Request::Leave(reference, room) => {
                self.rooms.remove(&room);
                Box::pin(perform::leave(services, subscriber, reference, room))
            }
            Request::History(reference, history) => {
                if !self.rooms.contains(&history.room) {
                    let (code, text) = (ErrorCode::NotJoined, "join the room first");
                    let room = Some(&history.room);
                    self.refuse(refusal(reference, "history", room, code, text));
                    return Box::pin(std::future::ready(Performed::Answered));
                }
                Box::pin(perform::history(services, subscriber, reference, history))
            }
        }
    }

    /// Takes note of what was performed.
    ///
    /// # Errors
    ///
    /// The code of the `error` that a join was refused with.
    pub fn finish(&mut self, performed: Performed) -> Result<(), ErrorCode> {
        let joining = self.joining.take();
        match performed {
            Performed::Joined => {
                self.rooms.extend(joining);
                Ok(())
            }
            Performed::NotJoined(code) => Err(code),
            Performed::Answered => Ok(()),
        }
    }

    fn may_join(&self, reference: Option<&Ref>, room: &RoomId) -> Result<(), Refusal> {
        let rooms_max = self.services.limits.rooms_max;
        let refusal =
            |code, text: &str| refusal(reference.cloned(), "join", Some(room), code, text);
        if self.identity.access(room).is_none() {
            return Err(refusal(ErrorCode::Forbidden, "the token does not allow this room"));
        }
        if !self.rooms.contains(room) && self.rooms.len() >= rooms_max {
            let text = format!("at most {rooms_max} rooms at a time");
            return Err(refusal(ErrorCode::LimitReached, &text));
        }
        Ok(())
    }

    /// Ends the session: it is a member nowhere any more.
    pub async fn end(&mut self) {
        let connection = self.subscriber.connection;
        let rooms = std::mem::take(&mut self.rooms);
        // A join that was not waited for to its end may have succeeded.
        for room in rooms.into_iter().chain(self.joining.take()) {
            self.services.hub.leave(room, connection, None).await;
        }
    }

    /// The rooms in which this session is behind, if its outbox has room: each is to be given to
    /// [`Session::catch_up`].
    pub fn take_behind(&self) -> SmallVec<[RoomId; 1]> {
        self.subscriber.outbox.take_lagging()
    }

    /// Has rooms continued.
    pub async fn catch_up(&self, rooms: SmallVec<[RoomId; 1]>) {
        for room in rooms {
            self.services.hub.catch_up(room, self.subscriber.connection).await;
        }
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
        let sender = Sender {
            connection: self.subscriber.connection,
            author: self.author,
            user: &self.identity.user,
        };
        let mut outcome = Outcome {
            subscriber: self.subscriber.clone(),
            metrics: self.services.metrics.clone(),
            reference: reference.clone(),
            room: room.clone(),
            receipt: receipt.clone(),
            echo: message.echo,
            placed: false,
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
        refuse(&self.services, &self.subscriber, refusal)
    }
}

/// Sends an `error` and counts it.
fn refuse(services: &Services, subscriber: &Subscriber, refusal: Refusal) -> ErrorCode {
    let code = refusal.code;
    services.metrics.errors.of(code).inc();
    subscriber.answer(&Answer::Error(Box::new(refusal)));
    code
}

/// What is told of a publish when its fate is known.
#[derive(Clone)]
struct Outcome {
    subscriber: Arc<Subscriber>,
    metrics: Arc<Metrics>,
    reference: Option<Ref>,
    room: RoomId,
    receipt: Receipt,
    /// Whether the sender wants a copy.
    echo: bool,
    /// Whether the `ack` stands in the place of the copy.
    placed: bool,
    unanswered: Arc<AtomicUsize>,
}

impl Outcome {
    /// Prepares for the answer: it may come before `publish` returns.
    fn expect(&mut self) {
        self.unanswered.fetch_add(1, Ordering::AcqRel);
        if !self.echo {
            let ack = PlacedAck::new(self.reference.clone(), self.receipt.timestamp.clone());
            self.placed = self.subscriber.place_ack(&self.room, self.receipt.id, ack);
        }
    }

    /// Takes [`Outcome::expect`] back.
    fn forget(&self) {
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        self.unplace();
    }

    /// Whether the `ack` is to be sent from here: it was never placed, or has not been sent from
    /// its place.
    fn unplace(&self) -> bool {
        !self.placed || self.subscriber.unplace_ack(&self.room, self.receipt.id)
    }

    fn tell(self, result: Result<Appended, BusError>) {
        match result {
            // The hub sends the `ack` in the place of the copy.
            Ok(Appended { duplicate: false, position }) if self.placed => {
                self.subscriber.appended(&self.room, self.receipt.id, position);
            }
            // A gateway's own repeat is told as a duplicate; its `ack` may have been sent. One that
            // should stand in the place of the copy and does not is one too: by any other a client
            // would move its cursor.
            Ok(Appended { position, duplicate }) => {
                if self.unplace() {
                    let duplicate = duplicate || !self.echo;
                    self.ack(Appended { position, duplicate });
                }
            }
            Err(error) => {
                if self.unplace() {
                    self.refuse(error);
                }
            }
        }
        self.unanswered.fetch_sub(1, Ordering::AcqRel);
        self.subscriber.outbox.wake_for_ack();
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
