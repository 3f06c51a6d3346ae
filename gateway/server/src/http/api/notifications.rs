//! Server API: notifications to the inboxes of users, and broadcasts to all connections.

use std::{sync::Arc, time::SystemTime};

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use skein_protocol::{error::ErrorCode, ids::MessageId};
use utoipa::ToSchema;

use super::{
    ApiError, CommonResponses, JsonBody, Problem,
    messages::{
        BATCH_MAX, SendResult, append_callback, append_result, check_raw_json, parse_message_id,
    },
    parse_user,
    spans::RequestSpan,
};
use crate::http::Node;
use skein_core::bus::commands::ControlCommand;

/// A notification to one user.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewNotification {
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
    /// Whether a person must acknowledge it.
    #[serde(default)]
    require_ack: Option<bool>,
    /// Idempotency key: a notification with a known id is not appended again.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
}

/// A notification to many users.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct BulkNotification {
    /// At most 1,000 users.
    #[schema(max_items = 1000)]
    users: Vec<String>,
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
    /// Whether a person must acknowledge it.
    #[serde(default)]
    require_ack: Option<bool>,
    /// Idempotency key: a notification with a known id is not appended again.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
}

/// A message to every connection.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewBroadcast {
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
}

/// Result for one user.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum NotificationResult {
    Sent(NotificationSent),
    ApiError(NotificationFailed),
}

/// Position of the notification in the inbox of a user.
#[derive(Debug, Serialize, ToSchema)]
struct NotificationSent {
    /// Id of the user.
    user: String,
    #[serde(flatten)]
    sent: SendResult,
}

/// Error of the notification to a user.
#[derive(Debug, Serialize, ToSchema)]
struct NotificationFailed {
    /// Id of the user.
    user: String,
    #[serde(flatten)]
    problem: Problem,
}

/// Results of a notification to many users.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NotificationResults {
    /// One result per user, in the order of `users`.
    results: Vec<NotificationResult>,
}

/// Progress of a broadcast.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct BroadcastResult {
    /// Id of the broadcast.
    #[schema(format = Uuid)]
    id: String,
    /// Number of nodes that have sent it to their connections.
    applied: usize,
    /// Number of nodes.
    nodes: usize,
}

fn check_payload(node: &Node, payload: &RawValue) -> Result<(), ApiError> {
    let bytes_max = node.access.load().limits.message_bytes_max;
    if payload.get().len() > bytes_max {
        let text = format!("`payload` must be at most {bytes_max} bytes");
        return Err(ApiError::new(ErrorCode::TooLarge, text));
    }
    check_raw_json("payload", payload)
}

impl NewNotification {
    async fn send(
        &self,
        node: &Node,
        to: &str,
        id: MessageId,
        span: RequestSpan,
    ) -> Result<SendResult, ApiError> {
        let to = parse_user(to)?;
        let (done, appending) = append_callback();
        let require_ack = self.require_ack.unwrap_or_default();
        node.services.publisher.notify(&to, id, &self.payload, require_ack, span.0, done);
        append_result(node, id, appending).await
    }

    fn id(&self) -> Result<MessageId, ApiError> {
        Ok(parse_message_id(self.id.as_deref())?.unwrap_or_else(MessageId::random))
    }
}

/// Notify a user on all devices, now or when the next one connects.
#[utoipa::path(
    post, path = "/api/v1/users/{user}/notifications", tag = "notifications",
    operation_id = "notify_user",
    params(("user" = String, Path, description = "Id of the user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    request_body = NewNotification,
    responses(
        (status = 201, description = "The notification was appended to the inbox.", body = SendResult),
        (status = 200, description = "A notification with this id was appended before.", body = SendResult),
        CommonResponses,
    )
)]
pub(super) async fn notify(
    State(node): State<Arc<Node>>,
    Path(to): Path<String>,
    span: RequestSpan,
    JsonBody(notification): JsonBody<NewNotification>,
) -> Result<(StatusCode, Json<SendResult>), ApiError> {
    check_payload(&node, &notification.payload)?;
    let sent = notification.send(&node, &to, notification.id()?, span).await?;
    Ok((SendResult::status([&sent]), Json(sent)))
}

/// Notify many users. Each user has a result.
#[utoipa::path(
    post, path = "/api/v1/notifications", tag = "notifications",
    operation_id = "notify_users",
    request_body = BulkNotification,
    responses(
        (status = 201, description = "One result per user; at least one notification was appended.", body = NotificationResults),
        (status = 200, description = "One result per user; no notification was appended.", body = NotificationResults),
        CommonResponses,
    )
)]
pub(super) async fn notify_many(
    State(node): State<Arc<Node>>,
    span: RequestSpan,
    JsonBody(BulkNotification { users, payload, require_ack, id }): JsonBody<BulkNotification>,
) -> Result<(StatusCode, Json<NotificationResults>), ApiError> {
    // serde cannot flatten a struct with raw JSON.
    let notification = NewNotification { payload, require_ack, id };
    check_payload(&node, &notification.payload)?;
    if users.len() > BATCH_MAX {
        return Err(ApiError::bad_request(format!("a notification has at most {BATCH_MAX} users")));
    }
    let id = notification.id()?;
    // All are published before the first result is awaited.
    let sends = users.iter().map(|to| notification.send(&node, to, id, span));
    let sends = futures_util::future::join_all(sends).await;
    let status = SendResult::status(sends.iter().flatten());
    let result = |(user, sent): (String, Result<SendResult, ApiError>)| match sent {
        Ok(sent) => NotificationResult::Sent(NotificationSent { user, sent }),
        Err(failed) => {
            NotificationResult::ApiError(NotificationFailed { user, problem: failed.to_problem() })
        }
    };
    let results = users.into_iter().zip(sends).map(result).collect();
    Ok((status, Json(NotificationResults { results })))
}

/// Send a message to every connection, at most once.
#[utoipa::path(
    post, path = "/api/v1/broadcast", tag = "notifications",
    operation_id = "broadcast",
    request_body = NewBroadcast,
    responses((status = 201, description = "The broadcast has started.", body = BroadcastResult), CommonResponses)
)]
pub(super) async fn broadcast(
    State(node): State<Arc<Node>>,
    JsonBody(NewBroadcast { payload }): JsonBody<NewBroadcast>,
) -> Result<(StatusCode, Json<BroadcastResult>), ApiError> {
    check_payload(&node, &payload)?;
    let id = MessageId::random();
    let timestamp = skein_protocol::timestamp(SystemTime::now());
    let order = ControlCommand::Broadcast { id, payload: payload.get().to_owned(), timestamp };
    let outcome = node.control.execute(order).await?;
    let (applied, nodes) = (outcome.applied, outcome.nodes);
    Ok((StatusCode::CREATED, Json(BroadcastResult { id: id.to_string(), applied, nodes })))
}
