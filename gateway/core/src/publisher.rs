//! The only way in for a message: it is given an id and a time, packed, and handed to the bus.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType, binary_payload_bytes_max};
use serde::Serialize;
use serde_json::value::RawValue;
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId, UserId},
    protocol::{
        MessageKind,
        client_frame::{RawContent, Recipient, SendFrame},
        server_frame::UserInfo,
        server_frame_bytes_max,
    },
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    bus::{
        Append, AppendCallback, Appended, Bus, BusError, UnseenPolicy,
        registry::{EphemeralEvent, PresenceStore},
    },
    limits::quotas::{ENTRY_BYTES, Quotas, Writer},
    rooms::RoomRules,
    telemetry::{
        metrics::{Metrics, PublishResult, StorageLimit},
        trail::MessageTrails,
    },
};

/// Hands messages to the bus.
pub struct Publisher {
    /// What clients may have kept.
    quotas: Arc<Quotas>,
    bus: Arc<dyn Bus>,
    store: Arc<dyn PresenceStore>,
    rules: Arc<RoomRules>,
    metrics: Arc<Metrics>,
    trails: Arc<MessageTrails>,
    /// How long a publish may wait for the bus.
    timeout: Duration,
    /// The largest message a client may send.
    message_bytes_max: usize,
}

/// Who sends.
#[derive(Clone, Copy, Debug)]
pub struct MessageSender<'a> {
    /// The connection.
    pub connection: ConnectionId,
    /// The user, as entries name it.
    pub author: AuthorHash,
    /// The user.
    pub user: &'a UserInfo,
    /// Whose quotas it uses up; nobody's, where the application sends.
    pub writer: Option<&'a Writer>,
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
    /// The sender, or its address, has had too many bytes kept; and how long to wait.
    #[error("too many bytes to be kept in too short a time; this message was not taken")]
    Quota(Duration),
}

/// The members of a `message` or `direct` frame that do not change on its way.
#[derive(Serialize)]
struct MessageFields<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    room: Option<&'a RoomId>,
    id: MessageId,
    from: &'a UserInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<&'a UserId>,
    kind: MessageKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<MessageId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meta: Option<&'a RawValue>,
    timestamp: &'a str,
}

/// The members of a `notification` frame that do not change on its way.
#[derive(Serialize)]
struct NotificationFields<'a> {
    id: MessageId,
    payload: &'a RawValue,
    require_ack: bool,
    timestamp: &'a str,
}

/// Who sends where the application does, and names nobody else.
pub const API_USER: &str = "_api";

impl Publisher {
    /// A publisher into `bus`.
    pub fn new(
        bus: Arc<dyn Bus>,
        store: Arc<dyn PresenceStore>,
        rules: Arc<RoomRules>,
        (metrics, trails): (Arc<Metrics>, Arc<MessageTrails>),
        quotas: Arc<Quotas>,
        timeout: Duration,
        message_bytes_max: usize,
    ) -> Self {
        Self { quotas, bus, store, rules, metrics, trails, timeout, message_bytes_max }
    }

    /// Takes from the sender's quota what a message takes in logs: a direct is in two of them.
    fn charge_quota(
        &self,
        writer: &Writer,
        to: &Recipient,
        envelope: &Envelope,
    ) -> Result<(), PublishError> {
        let logs = match to {
            Recipient::Room(room) => usize::from(self.rules.is_durable(room)),
            Recipient::User(_) => 2,
        };
        let bytes = logs * (envelope.as_bytes().len() + ENTRY_BYTES);
        if bytes == 0 {
            return Ok(());
        }
        self.quotas.take_bytes(writer, bytes, Instant::now()).map_err(|wait| {
            self.metrics.storage_rejections.of(StorageLimit::Bytes).inc();
            PublishError::Quota(wait)
        })
    }

    /// What is done with a direct to somebody who was never connected, and what hears that it has opened
    /// an inbox.
    fn unseen(
        &self,
        writer: Option<&Writer>,
        done: AppendCallback,
    ) -> (UnseenPolicy, AppendCallback) {
        let Some(writer) = writer else { return (UnseenPolicy::Unlimited, done) };
        let unseen = match self.quotas.check_new_inbox(writer, Instant::now()) {
            Ok(()) => UnseenPolicy::Limited,
            Err(_) => UnseenPolicy::Reject,
        };
        let (quotas, writer) = (self.quotas.clone(), writer.clone());
        let done: AppendCallback = Box::new(move |result| {
            if matches!(result, Ok(Appended { opened_inbox: true, .. })) {
                quotas.count_new_inbox(&writer, Instant::now());
            }
            done(result);
        });
        (unseen, done)
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
        sender: MessageSender<'_>,
        message: &SendFrame<'_>,
        receipt: &Receipt,
        done: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) -> Result<(), PublishError> {
        let (content, binary) = match message.content {
            RawContent::Json(content) => (Some(content), None),
            RawContent::Binary(payload) => (None, Some(payload)),
        };
        let (frame, to) = match &message.to {
            Recipient::Room(_) => (FrameType::Message, None),
            Recipient::User(user) => (FrameType::Direct, Some(user)),
        };
        let members = MessageFields {
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
            binary_payload_bytes_max(server_frame_bytes_max(self.message_bytes_max), members.len());
        if binary.is_some_and(|payload| payload.len() > binary_max) {
            return Err(PublishError::BinaryTooLarge(binary_max));
        }
        let envelope = Envelope::pack(EnvelopeParts {
            frame,
            author: sender.author,
            id: receipt.id,
            sender: sender.connection,
            echo: message.echo,
            fields: members,
            binary_payload: binary,
        });

        if let Some(writer) = sender.writer {
            self.charge_quota(writer, &message.to, &envelope)?;
        }
        let done = self.with_metrics(Box::new(done));
        match &message.to {
            Recipient::Room(room) if self.rules.is_durable(room) => {
                self.bus.append(self.append(room.clone(), envelope, done));
            }
            Recipient::Room(room) => {
                self.store.publish_ephemeral(room.clone(), EphemeralEvent::Message(envelope), done);
            }
            Recipient::User(user) => {
                let (to, own) = (RoomId::inbox_of(user), RoomId::inbox_of(&sender.user.id));
                if own == to {
                    self.bus.append(self.append(to, envelope, done));
                    return Ok(());
                }
                // A repeat may have been appended to one of them only.
                let done = self.then_append(self.append(own, envelope.clone(), done));
                let (unseen, done) = self.unseen(sender.writer, done);
                self.bus.append(Append { unseen, ..self.append(to, envelope, done) });
            }
        }
        Ok(())
    }

    /// Counts what becomes of a publish, and how long that takes.
    fn with_metrics(&self, done: AppendCallback) -> AppendCallback {
        let (begun, metrics) = (Instant::now(), self.metrics.clone());
        Box::new(move |result| {
            metrics.publish_seconds.observe(begun.elapsed().as_secs_f64());
            metrics.publishes.of(outcome(&result)).inc();
            if let Some(bound) = result.as_ref().err().and_then(|error| storage_bound(*error)) {
                metrics.storage_rejections.of(bound).inc();
            }
            done(result);
        })
    }

    /// An append that is tried from now on, and leaves a trail.
    fn append(&self, room: RoomId, envelope: Envelope, done: AppendCallback) -> Append {
        let deadline = Instant::now() + self.timeout;
        let (trails, log, id) = (self.trails.clone(), room.clone(), envelope.id());
        let done: AppendCallback = Box::new(move |result| {
            if let Ok(appended) = &result {
                trails.appended(&log, id, &appended.position);
            }
            done(result);
        });
        Append { room, envelope, urgent: false, unseen: UnseenPolicy::Unlimited, deadline, done }
    }

    /// Appends a notification to a user's inbox.
    pub fn notify(
        &self,
        user: &UserId,
        id: MessageId,
        payload: &RawValue,
        require_ack: bool,
        done: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) {
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        let notification = NotificationFields { id, payload, require_ack, timestamp: &timestamp };
        let members = serde_json::to_string(&notification).expect("raw JSON is JSON");
        let envelope = Envelope::pack(EnvelopeParts {
            frame: FrameType::Notification,
            author: AuthorHash::of(&API_USER.parse().expect("an id")),
            id,
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: &members[1..members.len() - 1],
            binary_payload: None,
        });
        let done = self.with_metrics(Box::new(done));
        self.bus.append(self.append(RoomId::inbox_of(user), envelope, done));
    }

    /// Appends something once another append was done, unless that failed.
    fn then_append(&self, next: Append) -> AppendCallback {
        let bus = self.bus.clone();
        Box::new(move |result| match result {
            Ok(_) => bus.append(next),
            Err(error) => (next.done)(Err(error)),
        })
    }
}

impl Receipt {
    /// The receipt of a message that is taken now.
    pub fn of(message: &SendFrame<'_>) -> Self {
        Self {
            id: message.id.unwrap_or_else(MessageId::random),
            timestamp: skein_protocol::timestamp(SystemTime::now()),
        }
    }
}

fn outcome(result: &Result<Appended, BusError>) -> PublishResult {
    match result {
        Ok(Appended { duplicate: false, .. }) => PublishResult::Appended,
        Ok(Appended { duplicate: true, .. }) => PublishResult::Duplicate,
        Err(BusError::Unavailable) => PublishResult::Unavailable,
        Err(BusError::Overloaded) => PublishResult::Overloaded,
        Err(BusError::Rejected) => PublishResult::Failed,
        Err(BusError::MemoryFull | BusError::UnseenQuota | BusError::UnseenBytes) => {
            PublishResult::LimitReached
        }
    }
}

/// The bound that was reached, if one was.
pub fn storage_bound(error: BusError) -> Option<StorageLimit> {
    match error {
        BusError::MemoryFull => Some(StorageLimit::Memory),
        BusError::UnseenQuota => Some(StorageLimit::UnseenInboxes),
        BusError::UnseenBytes => Some(StorageLimit::UnseenBytes),
        BusError::Unavailable | BusError::Overloaded | BusError::Rejected => None,
    }
}
