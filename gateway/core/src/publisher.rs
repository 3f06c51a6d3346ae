//! Publishing: the single entry point for messages, which get an id and a timestamp, are packed,
//! and go to the bus.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

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
        Append, Appended, Bus, BusError, UnseenPolicy,
        presence_store::{EphemeralEvent, PresenceStore},
        ticket::{
            NewInboxCharge, NextAppend, PublishRecord, PublishSpan, PublishTicket, TrailRecord,
        },
    },
    envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType, binary_payload_bytes_max},
    limits::quotas::{ENTRY_BYTES, Quotas, Writer},
    rooms::RoomRules,
    telemetry::{
        metrics::{EntryKind, Metrics, StorageLimit},
        traces::{OpenSpan, SpanKind, TraceContext, Tracer},
        trail::MessageTrails,
    },
};

/// Publishes messages through the bus.
pub struct Publisher {
    /// The bus, for messages to rooms with a log and to users.
    pub bus: Arc<dyn Bus>,
    /// The presence store, for messages to rooms without a log.
    pub store: Arc<dyn PresenceStore>,
    /// Which rooms keep a log.
    pub rules: Arc<RoomRules>,
    /// The quotas of stored state.
    pub quotas: Arc<Quotas>,
    /// Counts results and durations.
    pub metrics: Arc<Metrics>,
    /// Records the positions of messages.
    pub trails: Arc<MessageTrails>,
    /// Traces some of the publishes.
    pub tracer: Tracer,
    /// The most time that a publish may wait for the bus.
    pub timeout: Duration,
    /// The largest message of a client, in bytes.
    pub message_bytes_max: usize,
}

/// The sender of a message.
#[derive(Clone, Copy, Debug)]
pub struct MessageSender<'a> {
    /// The connection.
    pub connection: ConnectionId,
    /// The hash of the user id that entries carry.
    pub author: AuthorHash,
    /// The user.
    pub user: &'a UserInfo,
    /// The client whose quotas are charged; `None` if the application sends.
    pub writer: Option<&'a Writer>,
    /// The span of the sender, which decides whether the publish is traced. `None`: the sampling
    /// ratio decides.
    pub parent: Option<TraceContext>,
}

/// The id and the time of a message, as its `ack` reports them.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// The client's id, or a new one.
    pub id: MessageId,
    /// The time at which the message was accepted, as its readers see it.
    pub timestamp: String,
}

/// The reason why a message was not passed to the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The message would exceed the frame limit in JSON, where a binary payload grows by a third.
    #[error("the binary payload exceeds {0} bytes")]
    BinaryTooLarge(usize),
    /// The sender or its address has stored too many bytes; with the time to wait.
    #[error("storage quota exceeded: message rejected")]
    Quota(Duration),
}

/// The fields of a `message` or `direct` frame that do not change on the way.
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

/// The fields of a `notification` frame that do not change on the way.
#[derive(Serialize)]
struct NotificationFields<'a> {
    id: MessageId,
    payload: &'a RawValue,
    require_ack: bool,
    timestamp: &'a str,
}

/// The sender of messages that the application publishes without naming a user.
pub const API_USER: &str = "_api";

impl Publisher {
    /// Charges the sender's quota with the bytes that a message takes in logs; a direct is in two
    /// logs.
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

    /// The treatment of a direct to a user who was never connected, and the charge for opening an
    /// inbox.
    fn unseen(&self, writer: Option<&Writer>) -> (UnseenPolicy, Option<NewInboxCharge>) {
        let Some(writer) = writer else { return (UnseenPolicy::Unlimited, None) };
        let unseen = match self.quotas.check_new_inbox(writer, Instant::now()) {
            Ok(()) => UnseenPolicy::Limited,
            Err(_) => UnseenPolicy::Reject,
        };
        let (quotas, writer) = (self.quotas.clone(), writer.clone());
        (unseen, Some(NewInboxCharge { quotas, writer }))
    }

    /// Publishes `message` and returns at once; `done` receives the outcome. Messages of one
    /// connection to one room are numbered in the order of the calls. In a room without a log the
    /// message is delivered and not stored, and has no position. A direct goes to the receiver's
    /// inbox and then to the sender's, whose position is reported.
    ///
    /// # Errors
    ///
    /// [`PublishError`]; `done` is then not called.
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
        let fields = MessageFields {
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
        let fields = serde_json::to_string(&fields).expect("the fields are JSON");
        // Without the braces, since `seq` and `epoch` are prepended.
        let fields = &fields[1..fields.len() - 1];
        let binary_max =
            binary_payload_bytes_max(server_frame_bytes_max(self.message_bytes_max), fields.len());
        if binary.is_some_and(|payload| payload.len() > binary_max) {
            return Err(PublishError::BinaryTooLarge(binary_max));
        }
        let mut span = self.begin_span(frame, receipt.id, sender.parent);
        if let Some(span) = &mut span {
            match &message.to {
                Recipient::Room(room) => span.set("messaging.destination.name", room.to_string()),
                Recipient::User(user) => span.set("skein.inbox_of", user.to_string()),
            }
            span.set("skein.user", sender.user.id.to_string());
            span.set("skein.connection", sender.connection.to_string());
        }
        let parts = EnvelopeParts {
            frame,
            author: sender.author,
            id: receipt.id,
            sender: sender.connection,
            echo: message.echo,
            fields,
            binary_payload: binary,
        };
        let envelope = Envelope::pack_traced(parts, span.as_ref().map(OpenSpan::context));

        if let Some(writer) = sender.writer
            && let Err(error) = self.charge_quota(writer, &message.to, &envelope)
        {
            if let Some(span) = span {
                span.end(Some(error.to_string()));
            }
            return Err(error);
        }
        self.metrics.messages_received.of(frame.entry_kind()).inc();
        tracing::debug!(
            id = %receipt.id,
            room = message.to.room().map(tracing::field::display),
            user = %sender.user.id,
            connection = %sender.connection,
            bytes = envelope.as_bytes().len(),
            "message published"
        );
        let record = self.record(span);
        match &message.to {
            Recipient::Room(room) if self.rules.is_durable(room) => {
                self.append(room.clone(), envelope, UnseenPolicy::Unlimited, record, done);
            }
            Recipient::Room(room) => {
                let event = EphemeralEvent::Message(envelope);
                let ticket = PublishTicket::recorded(record, done);
                self.store.publish_ephemeral(room.clone(), event, ticket);
            }
            Recipient::User(user) => {
                let (to, own) = (RoomId::inbox_of(user), RoomId::inbox_of(&sender.user.id));
                if own == to {
                    self.append(to, envelope, UnseenPolicy::Unlimited, record, done);
                    return Ok(());
                }
                let (unseen, new_inbox) = self.unseen(sender.writer);
                // Append to both even if the id is known: an earlier attempt may have reached
                // only one of the two logs.
                let next = Some(NextAppend {
                    bus: self.bus.clone(),
                    room: own,
                    envelope: envelope.clone(),
                    deadline: record.started + self.timeout,
                });
                let record = PublishRecord { new_inbox, next, ..record };
                self.append(to, envelope, unseen, record, done);
            }
        }
        Ok(())
    }

    /// The record of a publish that begins now.
    fn record(&self, span: Option<OpenSpan>) -> PublishRecord {
        let (started, metrics) = (Instant::now(), self.metrics.clone());
        let span = span.map(|span| Box::new(PublishSpan::new(span)));
        PublishRecord { started, metrics, trail: None, new_inbox: None, next: None, span }
    }

    /// Begins the span of a publish, if it is traced.
    fn begin_span(
        &self,
        frame: FrameType,
        id: MessageId,
        parent: Option<TraceContext>,
    ) -> Option<OpenSpan> {
        let mut span = self.tracer.begin("publish", SpanKind::Producer, parent)?;
        span.set("messaging.message.id", id.to_string());
        span.set("skein.frame", frame.as_str());
        Some(span)
    }

    /// Appends a message, which then has a message trail.
    fn append(
        &self,
        room: RoomId,
        envelope: Envelope,
        unseen: UnseenPolicy,
        record: PublishRecord,
        done: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) {
        let deadline = record.started + self.timeout;
        let (trails, log, id) = (self.trails.clone(), room.clone(), envelope.id());
        let record = PublishRecord { trail: Some(TrailRecord { trails, log, id }), ..record };
        let ticket = PublishTicket::recorded(record, done);
        self.bus.append(Append { room, envelope, urgent: false, unseen, deadline, ticket });
    }

    /// Appends a notification to a user's inbox. `parent` as in [`MessageSender`].
    pub fn notify(
        &self,
        user: &UserId,
        id: MessageId,
        payload: &RawValue,
        require_ack: bool,
        parent: Option<TraceContext>,
        done: impl FnOnce(Result<Appended, BusError>) + Send + 'static,
    ) {
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        let notification = NotificationFields { id, payload, require_ack, timestamp: &timestamp };
        let fields = serde_json::to_string(&notification).expect("the fields are JSON");
        self.metrics.messages_received.of(EntryKind::Notification).inc();
        let mut span = self.begin_span(FrameType::Notification, id, parent);
        if let Some(span) = &mut span {
            span.set("skein.inbox_of", user.to_string());
        }
        let parts = EnvelopeParts {
            frame: FrameType::Notification,
            author: AuthorHash::of(&API_USER.parse().expect("an id")),
            id,
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: &fields[1..fields.len() - 1],
            binary_payload: None,
        };
        let envelope = Envelope::pack_traced(parts, span.as_ref().map(OpenSpan::context));
        let room = RoomId::inbox_of(user);
        self.append(room, envelope, UnseenPolicy::Unlimited, self.record(span), done);
    }
}

impl Receipt {
    /// The receipt of a message accepted now.
    pub fn of(message: &SendFrame<'_>) -> Self {
        Self {
            id: message.id.unwrap_or_else(MessageId::random),
            timestamp: skein_protocol::timestamp(SystemTime::now()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use skein_protocol::ids::DisplayName;

    use super::*;

    proptest! {
        /// Whatever the sender writes beside them, the users of a direct are found, and the bytes
        /// are an envelope of both inboxes.
        #[test]
        fn the_users_of_a_published_direct_are_found(
            sender in "[A-Za-z0-9_.:@|+=-]{3,128}",
            recipient in "[A-Za-z0-9_.:@|+=-]{3,128}",
            name in any::<String>(),
            content in any::<String>(),
            is_binary: bool,
        ) {
            let id: UserId = sender.parse().unwrap();
            let name = DisplayName::sanitized(&name).unwrap_or_else(|| DisplayName::from(&id));
            let (from, to) = (UserInfo { id, name }, recipient.parse().unwrap());
            let content = format!(r#"{{"from":{{"id":"x"}},"to":{}}}"#, serde_json::json!(content));
            let content = RawValue::from_string(content).unwrap();
            let fields = MessageFields {
                room: None,
                id: MessageId::random(),
                from: &from,
                to: Some(&to),
                kind: MessageKind::Text,
                content: Some(&*content).filter(|_| !is_binary),
                reply_to: None,
                meta: Some(&content),
                timestamp: "2026-12-01T00:00:00.000Z",
            };
            let json = serde_json::to_string(&fields).unwrap();
            let envelope = Envelope::pack(EnvelopeParts {
                frame: FrameType::Direct,
                author: AuthorHash::of(&from.id),
                id: fields.id,
                sender: ConnectionId::random(),
                echo: true,
                fields: &json[1..json.len() - 1],
                binary_payload: is_binary.then_some(b"{}"),
            });
            prop_assert_eq!(envelope.direct_users(), Some((from.id.clone(), to.clone())));
            for user in [&from.id, &to] {
                let bytes = envelope.as_bytes().clone();
                prop_assert!(Envelope::parse_for_room(bytes, &RoomId::inbox_of(user)).is_ok());
            }
        }
    }
}
