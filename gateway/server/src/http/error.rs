//! Error responses in HTTP: `{"error":{"code","message"}}`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde_json::json;

/// Builds an error response with a code for programs and a message for people.
pub(super) fn error_response(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({"error": {"code": code, "message": message}}))).into_response()
}

/// Builds an error response with `Retry-After`.
pub(super) fn error_response_with_retry(
    status: StatusCode,
    code: &str,
    message: &str,
    wait: Duration,
) -> Response {
    let mut response = error_response(status, code, message);
    // Whole seconds (RFC 9110, section 10.2.3), rounded up.
    let seconds = wait.as_millis().div_ceil(1000).max(1) as u64;
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response
}

/// Returns a random delay of 1 to 3 s, so that clients rejected at the same time do not return at
/// the same time.
pub(super) fn retry_after() -> Duration {
    Duration::from_secs(rand::random_range(1..=3))
}

pub(super) async fn not_found() -> Response {
    error_response(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path")
}
