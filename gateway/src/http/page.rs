//! The chat page, which is part of the binary.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{Html, IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::Node;

const CHAT: &str = include_str!("../web/chat.html");
const NOTICE_MARK: &str = "<!--skein:notice-->";
const NOTICE: &str = "<p class=\"notice\" role=\"alert\">Anonymous mode: anybody who reaches this \
     page can read every room and speak as anybody. For people you do not know, set \
     GATEWAY__AUTH__MODE=jwt.</p>";

pub(super) async fn chat(State(node): State<Arc<Node>>) -> Response {
    // A nonce per response, so that nothing but the page's own script and style runs.
    let nonce = STANDARD.encode(rand::random::<[u8; 16]>());
    let notice = if node.options.warn_anonymous { NOTICE } else { "" };
    let page = CHAT
        .replacen(
            "<script type=\"module\">",
            &format!("<script type=\"module\" nonce=\"{nonce}\">"),
            1,
        )
        .replacen("<style>", &format!("<style nonce=\"{nonce}\">"), 1)
        .replacen(NOTICE_MARK, notice, 1);
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self' ws: wss:; img-src 'self' data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, Html(page)).into_response()
}
