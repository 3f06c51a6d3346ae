//! The only way in for a message: it is given an id and a time, packed, and handed to the bus.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::Serialize;
use serde_json::value::RawValue;
use shared::{
    envelope::{Author, Envelope, FrameType, Parts, binary_bytes_max},
    ids::{ConnectionId, MessageId, RoomId, UserId},
    protocol::{
        Kind,
        answer::Person,
        request::{Content, Message, Recipient},
        server_frame_bytes_max,
    },
};
use tokio::time::Instant;

use crate::{
    bus::{
        Append, Appended, Bus, BusError, Done,
        registry::{Notice, Registry},
    },
    rooms::RoomRules,
    telemetry::metrics::{Metrics, Publish},
};

/// Hands messages to the bus.
pub struct Publisher {
    bus: Arc<dyn Bus>,
    registry: Arc<dyn Registry>,
    rules: Arc<RoomRules>,
    metrics: Arc<Metrics>,
    /// How long a publish may wait for the bus.
    wait_max: Duration,
    /// The largest message a client may send.
    message_bytes_max: usize,
}

/// Who sends.
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    /// The connection.
    pub connection: ConnectionId,
    /// The user, as entries name it.
    pub author: Author,
    /// The user.
    pub user: &'a Person,
}

/// A message on its way: what its `ack` will say of it.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// Its id, the client's or a new one.
    pub id: MessageId,
    /// When it was taken, as its readers see it.
    pub timestamp: String,
}

/// Why a message was not handed to the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Its readers could not be sent it in JSON, where a binary payload grows by a third.
    #[error("a binary payload is at most {0} bytes here")]
    BinaryTooLarge(usize),
}

/// The members of a `message` or `direct` frame that do not change on its way.
#[derive(Serialize)]
struct Members<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    room: Option<&'a RoomId>,
    id: MessageId,
    from: &'a Person,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'a UserId>,
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<MessageId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meta: Option<&'a RawValue>,
    timestamp: &'a str,
}

impl Publisher {
    /// A publisher into `bus`.
    pub fn new(
        bus: Arc<dyn Bus>,
        registry: Arc<dyn Registry>,
        rules: Arc<RoomRules>,
        metrics: Arc<Metrics>,
        wait_max: Duration,
        message_bytes_max: usize,
    ) -> Self {
        Self { bus, registry, rules, metrics, wait_max, message_bytes_max }
    }

    /// Hands `message` to the bus and returns at once. `done` hears what became of it; calls of
    /// one connection for one room are numbered in their order. In a room without a log it is passed
    /// on and not kept, and its position is none. A direct goes to the receiver's inbox, and then to the
    /// sender's, where its position is.
    ///
    /// # Errors
    ///
    /// [`PublishError`], and `done` is not called.
    pub fn publish(
        &self,
        sender: Sender<'_>,
        message: &Message<'_>,
        receipt: &Receipt,
        done: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) -> Result<(), PublishError> {
        let (content, binary) = match message.content {
            Content::Json(content) => (Some(content), None),
            Content::Binary(payload) => (None, Some(payload)),
        };
        let (frame, to) = match &message.to {
            Recipient::Room(_) => (FrameType::Message, None),
            Recipient::User(user) => (FrameType::Direct, Some(user)),
        };
        let members = Members {
            room: message.to.room(),
            id: receipt.id,
            from: sender.user,
            to,
            kind: message.kind,
            content,
            reply_to: message.reply_to,
            meta: message.meta,
            timestamp: &receipt.timestamp,
        };
        let members = serde_json::to_string(&members).expect("names and raw JSON are JSON");
        // Without the braces: the numbers come in front.
        let members = &members[1..members.len() - 1];
        let binary_max =
            binary_bytes_max(server_frame_bytes_max(self.message_bytes_max), members.len());
        if binary.is_some_and(|payload| payload.len() > binary_max) {
            return Err(PublishError::BinaryTooLarge(binary_max));
        }
        let envelope = Envelope::pack(Parts {
            frame,
            author: sender.author,
            id: receipt.id,
            sender: sender.connection,
            echo: message.echo,
            members,
            binary,
        });

        let begun = Instant::now();
        let metrics = self.metrics.clone();
        let done: Done = Box::new(move |result| {
            metrics.publish_seconds.observe(begun.elapsed().as_secs_f64());
            metrics.publishes.of(outcome(&result)).inc();
            done(result);
        });
        let deadline = begun + self.wait_max;
        let append =
            move |room, envelope, done| Append { room, envelope, urgent: false, deadline, done };
        match &message.to {
            Recipient::Room(room) if self.rules.is_durable(room) => {
                self.bus.append(append(room.clone(), envelope, done));
            }
            Recipient::Room(room) => {
                self.registry.pass_on(room.clone(), Notice::Message(envelope), done);
            }
            Recipient::User(user) => {
                let (to, own) = (RoomId::inbox_of(user), RoomId::inbox_of(&sender.user.id));
                let done = match own == to {
                    true => done,
                    // A repeat may have been appended to one of them only.
                    false => self.then_append(append(own, envelope.clone(), done)),
                };
                self.bus.append(append(to, envelope, done));
            }
        }
        Ok(())
    }

    /// Appends something once another append was done, unless that failed.
    fn then_append(&self, next: Append) -> Done {
        let bus = self.bus.clone();
        Box::new(move |result| match result {
            Ok(_) => bus.append(next),
            Err(error) => (next.done)(Err(error)),
        })
    }
}

impl Receipt {
    /// The receipt of a message that is taken now.
    pub fn of(message: &Message<'_>) -> Self {
        Self {
            id: message.id.unwrap_or_else(MessageId::random),
            timestamp: shared::timestamp(SystemTime::now()),
        }
    }
}

fn outcome(result: &Result<Appended, BusError>) -> Publish {
    match result {
        Ok(Appended { duplicate: false, .. }) => Publish::Appended,
        Ok(Appended { duplicate: true, .. }) => Publish::Duplicate,
        Err(BusError::Unavailable) => Publish::Unavailable,
        Err(BusError::Overloaded) => Publish::Overloaded,
        Err(BusError::Refused) => Publish::Failed,
    }
}
