//! Probes and metrics: `/health` (the process lives), `/ready` (clients may connect), `/metrics`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::json;

use super::Node;

pub(super) async fn health(State(node): State<Arc<Node>>) -> Response {
    Json(json!({"status": "ok", "node": node.id})).into_response()
}

pub(super) async fn ready(State(node): State<Arc<Node>>) -> Response {
    let failing = node.failed_checks();
    if failing.is_empty() {
        return Json(json!({"status": "ok"})).into_response();
    }
    let body = Json(json!({"status": "unavailable", "failing": failing}));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

pub(super) async fn metrics(State(node): State<Arc<Node>>) -> Response {
    node.update_metrics().await;
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], node.metrics.render()).into_response()
}
