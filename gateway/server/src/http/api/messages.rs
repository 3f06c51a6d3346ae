//! Server API: sending messages, and the trail of a message.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use skein_core::envelope::AuthorHash;
use skein_protocol::{
    error::ErrorCode,
    ids::{ConnectionId, DisplayName, MessageId, RoomId, UserId},
    protocol::{
        META_BYTES_MAX, MessageKind,
        client_frame::{RawContent, Recipient, SendFrame, check_json},
        server_frame::UserInfo,
    },
};
use tokio::sync::oneshot;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    ApiError, CommonResponses, JsonBody, Problem, await_bus, parse_name, parse_query,
    spans::RequestSpan,
};
use crate::http::Node;
use skein_core::{
    bus::{Appended, BusError, commands::NodeQuery},
    publisher::{API_USER, MessageSender, Receipt},
};

/// Most messages of a batch.
pub(super) const BATCH_MAX: usize = 1000;

/// A message to send to a room.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewMessage {
    /// Any JSON.
    #[schema(value_type = Value)]
    content: Box<RawValue>,
    /// Sender; default `_api`.
    #[schema(max_length = 128, pattern = "^[A-Za-z0-9_.:@|+=-]+$")]
    #[serde(default)]
    from: Option<String>,
    /// Idempotency key: a message with a known id is not appended again.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
    /// Kind of the message; default `text`.
    #[schema(value_type = Option<MessageKindSchema>)]
    #[serde(default)]
    kind: Option<MessageKind>,
    /// Additional data, a JSON object of at most 8 KiB.
    #[schema(value_type = Option<Object>)]
    #[serde(default)]
    meta: Option<Box<RawValue>>,
}

/// Kind of a message.
#[derive(ToSchema)]
#[schema(as = MessageKind, rename_all = "snake_case")]
#[expect(dead_code, reason = "documents `MessageKind` in the OpenAPI document")]
enum MessageKindSchema {
    Text,
    Image,
    File,
    Custom,
    System,
}

/// A message of a batch, with its room.
#[derive(Debug, Deserialize, ToSchema)]
struct BatchMessage {
    /// Room of the message.
    room: String,
    /// Any JSON.
    #[schema(value_type = Value)]
    content: Box<RawValue>,
    /// Sender; default `_api`.
    #[serde(default)]
    from: Option<String>,
    /// Idempotency key: a message with a known id is not appended again.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
    /// Kind of the message; default `text`.
    #[schema(value_type = Option<MessageKindSchema>)]
    #[serde(default)]
    kind: Option<MessageKind>,
    /// Additional data, a JSON object of at most 8 KiB.
    #[schema(value_type = Option<Value>)]
    #[serde(default)]
    meta: Option<Box<RawValue>>,
}

impl BatchMessage {
    // serde cannot flatten a struct with raw JSON.
    fn split(self) -> (String, NewMessage) {
        let Self { room, content, from, id, kind, meta } = self;
        (room, NewMessage { content, from, id, kind, meta })
    }
}

/// A batch of messages.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct MessageBatch {
    /// At most 1,000 messages.
    #[schema(max_items = 1000)]
    messages: Vec<BatchMessage>,
}

/// Position of a message in its log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SendResult {
    /// Id of the message.
    #[schema(format = Uuid)]
    id: String,
    /// Sequence number; absent in a room without a log.
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    /// Epoch of `seq`.
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<String>,
    /// Whether the id was known, so that the message was not appended again.
    duplicate: bool,
}

impl SendResult {
    pub(super) fn of(id: MessageId, Appended { position, duplicate, .. }: Appended) -> Self {
        let numbered = !position.epoch.is_none();
        Self {
            id: id.to_string(),
            seq: numbered.then_some(position.seq),
            epoch: numbered.then(|| position.epoch.to_string()),
            duplicate,
        }
    }

    /// Returns 201 if a message was appended, else 200.
    pub(super) fn status<'a>(sent: impl IntoIterator<Item = &'a Self>) -> StatusCode {
        let is_new = sent.into_iter().any(|sent| !sent.duplicate);
        if is_new { StatusCode::CREATED } else { StatusCode::OK }
    }
}

/// Result of one message of a batch.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum MessageResult {
    Sent(SendResult),
    ApiError(Problem),
}

/// Results of a batch.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MessageResults {
    /// One result per message, in the order of `messages`.
    results: Vec<MessageResult>,
}

/// Parses an id of the application.
pub(super) fn parse_message_id(id: Option<&str>) -> Result<Option<MessageId>, ApiError> {
    id.map(parse_name).transpose()
}

/// Checks JSON that is stored unchanged.
pub(super) fn check_raw_json(what: &str, raw: &RawValue) -> Result<(), ApiError> {
    check_json(raw).map_err(|error| ApiError::bad_request(format!("`{what}`: {error}")))
}

/// Receives the result of an append.
type PendingAppend = oneshot::Receiver<Result<Appended, BusError>>;

/// Returns a callback for the result of an append, and its receiver.
pub(super) fn append_callback()
-> (impl FnOnce(Result<Appended, BusError>) + Send + 'static, PendingAppend) {
    let (done, appending) = oneshot::channel();
    let done = move |result| {
        // The caller may have timed out.
        let _ = done.send(result);
    };
    (done, appending)
}

impl NewMessage {
    /// Publishes the message. Does not wait for the result.
    fn publish(
        &self,
        node: &Node,
        room: RoomId,
        span: RequestSpan,
    ) -> Result<(MessageId, PendingAppend), ApiError> {
        let from: UserId = parse_name(self.from.as_deref().unwrap_or(API_USER))?;
        check_raw_json("content", &self.content)?;
        if let Some(meta) = &self.meta {
            if !meta.get().starts_with('{') {
                return Err(ApiError::bad_request("`meta` must be an object"));
            }
            if meta.get().len() > META_BYTES_MAX {
                let text = format!("`meta` must be at most {META_BYTES_MAX} bytes");
                return Err(ApiError::new(ErrorCode::TooLarge, text));
            }
            check_raw_json("meta", meta)?;
        }
        let bytes_max = node.access.load().limits.message_bytes_max;
        if self.content.get().len() > bytes_max {
            let text = format!("`content` must be at most {bytes_max} bytes");
            return Err(ApiError::new(ErrorCode::TooLarge, text));
        }
        let message = SendFrame {
            to: Recipient::Room(room),
            id: parse_message_id(self.id.as_deref())?,
            kind: self.kind.unwrap_or_default(),
            content: RawContent::Json(&self.content),
            reply_to: None,
            meta: self.meta.as_deref(),
            echo: true,
            traceparent: None,
        };
        let receipt = Receipt::of(&message);
        let user = UserInfo { name: DisplayName::from(&from), id: from };
        let sender = MessageSender {
            connection: ConnectionId(Uuid::nil()),
            author: AuthorHash::of(&user.id),
            user: &user,
            writer: None,
            parent: span.0,
        };
        let (done, appending) = append_callback();
        let published = node.services.publisher.publish(sender, &message, &receipt, done);
        published.map_err(|error| ApiError::new(ErrorCode::TooLarge, error.to_string()))?;
        Ok((receipt.id, appending))
    }
}

/// Waits for the result of a publish.
pub(super) async fn append_result(
    node: &Node,
    id: MessageId,
    appending: PendingAppend,
) -> Result<SendResult, ApiError> {
    let appended = async { appending.await.unwrap_or(Err(BusError::Unavailable)) };
    Ok(SendResult::of(id, await_bus(node, appended).await?))
}

/// Send a message to a room.
#[utoipa::path(
    post, path = "/api/v1/rooms/{room}/messages", tag = "messages",
    operation_id = "send_message",
    params(("room" = String, Path, description = "Name of the room", pattern = "^[A-Za-z0-9_.:@-]{1,128}$")),
    request_body = NewMessage,
    responses(
        (status = 201, description = "The message was appended.", body = SendResult),
        (status = 200, description = "A message with this id was appended before.", body = SendResult),
        CommonResponses,
    )
)]
pub(super) async fn send(
    State(node): State<Arc<Node>>,
    Path(room): Path<String>,
    span: RequestSpan,
    JsonBody(message): JsonBody<NewMessage>,
) -> Result<(StatusCode, Json<SendResult>), ApiError> {
    let (id, appending) = message.publish(&node, parse_name(&room)?, span)?;
    let sent = append_result(&node, id, appending).await?;
    Ok((SendResult::status([&sent]), Json(sent)))
}

/// Send many messages, to one room or several. Each message has its own result, and messages to one
/// room keep their order.
#[utoipa::path(
    post, path = "/api/v1/publish", tag = "messages",
    operation_id = "publish_messages",
    request_body = MessageBatch,
    responses(
        (status = 201, description = "One result per message; at least one was appended.", body = MessageResults),
        (status = 200, description = "One result per message; none was appended.", body = MessageResults),
        CommonResponses,
    )
)]
pub(super) async fn publish(
    State(node): State<Arc<Node>>,
    span: RequestSpan,
    JsonBody(batch): JsonBody<MessageBatch>,
) -> Result<(StatusCode, Json<MessageResults>), ApiError> {
    if batch.messages.len() > BATCH_MAX {
        return Err(ApiError::bad_request(format!("a batch has at most {BATCH_MAX} messages")));
    }
    let publish = |addressed: BatchMessage| {
        let (room, message) = addressed.split();
        message.publish(&node, parse_name(&room)?, span)
    };
    // All are published before the first result is awaited.
    let published: Vec<_> = batch.messages.into_iter().map(publish).collect();
    let mut sends = Vec::with_capacity(published.len());
    for published in published {
        sends.push(match published {
            Ok((id, appending)) => append_result(&node, id, appending).await,
            Err(failed) => Err(failed),
        });
    }
    let status = SendResult::status(sends.iter().flatten());
    let result = |sent: Result<SendResult, ApiError>| {
        sent.map_or_else(|failed| MessageResult::ApiError(failed.to_problem()), MessageResult::Sent)
    };
    let results = sends.into_iter().map(result).collect();
    Ok((status, Json(MessageResults { results })))
}

/// Selects a user for the trail.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TrailQuery {
    /// A user who should have received the message.
    #[serde(default)]
    #[param(max_length = 128, pattern = "^[A-Za-z0-9_.:@|+=-]+$")]
    user: Option<String>,
}

/// Trail of a message: its position, and its delivery by each node.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MessageTrail {
    /// Id of the message.
    #[schema(format = Uuid)]
    id: String,
    /// Trail of each node.
    #[schema(value_type = Vec<Object>)]
    nodes: Vec<serde_json::Value>,
    /// Number of nodes that were asked.
    asked: usize,
    /// Number of nodes that have answered.
    answered: usize,
}

/// Get the trail of a message: where it was appended, to whom it was delivered, and why a user did
/// not receive it. Nodes keep trails for 10 minutes, within 16 MiB.
#[utoipa::path(
    get, path = "/api/v1/messages/{id}/trail", tag = "messages",
    operation_id = "message_trail",
    params(("id" = String, Path, description = "Id of the message", format = Uuid), TrailQuery),
    responses((status = 200, description = "The trail.", body = MessageTrail), CommonResponses)
)]
pub(super) async fn trail(
    State(node): State<Arc<Node>>,
    Path(id): Path<String>,
    selected: Result<Query<TrailQuery>, QueryRejection>,
) -> Result<Json<MessageTrail>, ApiError> {
    let id: MessageId = parse_name(&id)?;
    let user = parse_query(selected)?.user.as_deref().map(parse_name).transpose()?;
    let query = NodeQuery::Trail { id, user };
    let (replies, outcome) = node.control.query_nodes(query).await?;
    let nodes: Vec<serde_json::Value> =
        replies.iter().filter_map(|reply| serde_json::from_str(reply).ok()).collect();
    let knows = nodes
        .iter()
        .any(|node: &serde_json::Value| !node["logs"].as_array().is_none_or(Vec::is_empty));
    if !knows {
        let text = "no node has a trail of this message";
        return Err(ApiError::new(ErrorCode::NotFound, text));
    }
    let answered = nodes.len();
    Ok(Json(MessageTrail { id: id.to_string(), nodes, asked: outcome.nodes, answered }))
}
