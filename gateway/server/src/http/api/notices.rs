//! Notifications to users, whose inboxes keep them, and broadcasts to every connection.

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
    Body, Common, Failed, Problem,
    messages::{BATCH_MAX, Sent, appending, fate, id_of, is_readable},
    user,
};
use crate::http::Node;
use skein_core::bus::commands::ControlCommand;

/// A notification.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Notification {
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
    /// Whether it waits for a person.
    #[serde(default)]
    require_ack: Option<bool>,
    /// The key under which a repeat is recognised.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
}

/// A notification to many.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ToMany {
    /// At most 1,000.
    #[schema(max_items = 1000)]
    users: Vec<String>,
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
    /// Whether it waits for a person.
    #[serde(default)]
    require_ack: Option<bool>,
    /// The key under which a repeat is recognised.
    #[schema(format = Uuid)]
    #[serde(default)]
    id: Option<String>,
}

/// Something for every connection.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ToAll {
    /// Any JSON.
    #[schema(value_type = Value)]
    payload: Box<RawValue>,
}

/// What became of it for one user.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum NotificationFate {
    Sent(Notified),
    Failed(NotNotified),
}

/// Where one user's notification stands.
#[derive(Debug, Serialize, ToSchema)]
struct Notified {
    /// The user.
    user: String,
    #[serde(flatten)]
    sent: Sent,
}

/// Why one user's notification was not sent.
#[derive(Debug, Serialize, ToSchema)]
struct NotNotified {
    /// The user.
    user: String,
    #[serde(flatten)]
    problem: Problem,
}

/// What became of it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NotificationFates {
    /// In the order of `users`.
    results: Vec<NotificationFate>,
}

/// A broadcast that is under way.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sending {
    /// Its id.
    #[schema(format = Uuid)]
    id: String,
    /// How many nodes have sent it to their connections.
    applied: usize,
    /// Of so many.
    nodes: usize,
}

fn checked(node: &Node, payload: &RawValue) -> Result<(), Failed> {
    let bytes_max = node.options.limits.message_bytes_max;
    if payload.get().len() > bytes_max {
        let text = format!("`payload` is at most {bytes_max} bytes");
        return Err(Failed::new(ErrorCode::TooLarge, text));
    }
    is_readable("payload", payload)
}

impl Notification {
    async fn send(&self, node: &Node, to: &str, id: MessageId) -> Result<Sent, Failed> {
        let to = user(to)?;
        let (done, appending) = appending();
        let require_ack = self.require_ack.unwrap_or_default();
        node.services.publisher.notify(&to, id, &self.payload, require_ack, done);
        fate(node, id, appending).await
    }

    fn id(&self) -> Result<MessageId, Failed> {
        Ok(id_of(self.id.as_deref())?.unwrap_or_else(MessageId::random))
    }
}

/// Notify a user, on all devices, now or when there is one.
#[utoipa::path(
    post, path = "/api/v1/users/{user}/notifications", tag = "notifications",
    operation_id = "notify_user",
    params(("user" = String, Path, description = "The user", pattern = "^[A-Za-z0-9.:@|+=-][A-Za-z0-9_.:@|+=-]{0,127}$")),
    request_body = Notification,
    responses(
        (status = 201, description = "It was appended to the inbox.", body = Sent),
        (status = 200, description = "It had been, under the same id.", body = Sent),
        Common,
    )
)]
pub(super) async fn notify(
    State(node): State<Arc<Node>>,
    Path(to): Path<String>,
    Body(notification): Body<Notification>,
) -> Result<(StatusCode, Json<Sent>), Failed> {
    checked(&node, &notification.payload)?;
    let sent = notification.send(&node, &to, notification.id()?).await?;
    Ok((Sent::status([&sent]), Json(sent)))
}

/// Notify many users. Each has its own fate.
#[utoipa::path(
    post, path = "/api/v1/notifications", tag = "notifications",
    operation_id = "notify_users",
    request_body = ToMany,
    responses(
        (status = 201, description = "What became of each; one at least was appended.", body = NotificationFates),
        (status = 200, description = "What became of each; none was appended.", body = NotificationFates),
        Common,
    )
)]
pub(super) async fn notify_many(
    State(node): State<Arc<Node>>,
    Body(ToMany { users, payload, require_ack, id }): Body<ToMany>,
) -> Result<(StatusCode, Json<NotificationFates>), Failed> {
    // serde cannot have raw JSON in what is flattened.
    let notification = Notification { payload, require_ack, id };
    checked(&node, &notification.payload)?;
    if users.len() > BATCH_MAX {
        return Err(Failed::bad(format!("at most {BATCH_MAX} users")));
    }
    let id = notification.id()?;
    // All are handed on before the first is waited for.
    let sends = users.iter().map(|to| notification.send(&node, to, id));
    let sends = futures_util::future::join_all(sends).await;
    let status = Sent::status(sends.iter().flatten());
    let fate = |(user, sent): (String, Result<Sent, Failed>)| match sent {
        Ok(sent) => NotificationFate::Sent(Notified { user, sent }),
        Err(failed) => NotificationFate::Failed(NotNotified { user, problem: failed.to_problem() }),
    };
    let results = users.into_iter().zip(sends).map(fate).collect();
    Ok((status, Json(NotificationFates { results })))
}

/// Send something to every connection there is, at most once.
#[utoipa::path(
    post, path = "/api/v1/broadcast", tag = "notifications",
    operation_id = "broadcast",
    request_body = ToAll,
    responses((status = 201, description = "It is on its way.", body = Sending), Common)
)]
pub(super) async fn broadcast(
    State(node): State<Arc<Node>>,
    Body(ToAll { payload }): Body<ToAll>,
) -> Result<(StatusCode, Json<Sending>), Failed> {
    checked(&node, &payload)?;
    let id = MessageId::random();
    let timestamp = skein_protocol::timestamp(SystemTime::now());
    let order = ControlCommand::Broadcast { id, payload: payload.get().to_owned(), timestamp };
    let outcome = node.control.execute(order).await?;
    let (applied, nodes) = (outcome.applied, outcome.nodes);
    Ok((StatusCode::CREATED, Json(Sending { id: id.to_string(), applied, nodes })))
}
