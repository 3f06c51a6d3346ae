//! Negotiation of WebSocket extensions: permessage-deflate or none.

use axum::{
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use skein_websocket::extension::{self, DeflateParams, MalformedExtensions};

use super::{error::error_response, headers::utf8};

/// Chooses among the offers of the client; `None` if this node has compression off.
///
/// # Errors
///
/// An error response if the header breaks the grammar.
pub(super) fn negotiate(
    headers: &HeaderMap,
    is_on: bool,
) -> Result<Option<DeflateParams>, Box<Response>> {
    let lines = headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter();
    // The grammar of this header is ASCII, so that other bytes break it.
    let lines: Option<Vec<&str>> = lines.map(utf8).collect();
    let chosen = lines.ok_or(MalformedExtensions).and_then(extension::negotiate);
    match chosen {
        Ok(deflate) => Ok(deflate.filter(|_| is_on)),
        // RFC 6455, section 9.1: a header that breaks the grammar fails the connection.
        Err(error) => Err(Box::new(error_response(
            StatusCode::BAD_REQUEST,
            "bad_request",
            &error.to_string(),
        ))),
    }
}
