//! The chat page, embedded in the binary.

use std::{convert::Infallible, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::header,
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::stream;

use super::Node;

const CHAT: &str = include_str!("../../../web/chat.html");
const STYLE: &str = "<style>";
const NOTICE_MARK: &str = "<!--skein:notice-->";
const SCRIPT: &str = "<script type=\"module\">";
/// Placeholders of the page, in their order.
const MARKS: [&str; 3] = [STYLE, NOTICE_MARK, SCRIPT];
const NOTICE: &str = "<p class=\"notice\" role=\"alert\">Anonymous mode: any visitor of this page can \
     read every room and impersonate any user. Before you open it to others, set \
     GATEWAY__AUTH__MODE=jwt.</p>";

pub(super) async fn chat(State(node): State<Arc<Node>>) -> Response {
    // A nonce per response, so that nothing but the page's own script and style runs.
    let nonce = STANDARD.encode(rand::random::<[u8; 16]>());
    let notice = if node.options.warn_anonymous { NOTICE } else { "" };
    let mut parts: Vec<Bytes> = Vec::with_capacity(2 * MARKS.len() + 1);
    let mut rest = CHAT;
    for mark in MARKS {
        // A test checks that the page has all marks.
        let Some((before, after)) = rest.split_once(mark) else { continue };
        let filled = match mark {
            STYLE => format!("<style nonce=\"{nonce}\">"),
            SCRIPT => format!("<script type=\"module\" nonce=\"{nonce}\">"),
            _ => notice.to_owned(),
        };
        parts.extend([Bytes::from_static(before.as_bytes()), filled.into()]);
        rest = after;
    }
    parts.push(Bytes::from_static(rest.as_bytes()));
    let length: usize = parts.iter().map(Bytes::len).sum();
    // In parts, so that a client which does not read the response holds no copy of the page.
    let page = Body::from_stream(stream::iter(parts.into_iter().map(Ok::<_, Infallible>)));
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self' ws: wss:; img-src 'self' data:; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'"
    );
    let length = length.to_string();
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_LENGTH, length.as_str()),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, page).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_all_marks_in_order() {
        let positions: Vec<_> = MARKS.iter().map(|mark| CHAT.find(mark)).collect();
        assert!(positions.iter().all(Option::is_some) && positions.is_sorted(), "{positions:?}");
    }
}
