//! What a handshake agrees on beside the protocol: permessage-deflate, or nothing.

use axum::{
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use skein_websocket::extension::{self, DeflateParams, MalformedExtensions};

use super::{error::error_response, headers::utf8};

/// Chooses among what the client offers; nothing, where `is_on` says that this node has none of it.
pub(super) fn negotiate(
    headers: &HeaderMap,
    is_on: bool,
) -> Result<Option<DeflateParams>, Box<Response>> {
    let lines = headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter();
    // This header's own grammar is ASCII: what is not breaks it, and nothing else.
    let lines: Option<Vec<&str>> = lines.map(utf8).collect();
    let chosen = lines.ok_or(MalformedExtensions).and_then(extension::negotiate);
    match chosen {
        Ok(deflate) => Ok(deflate.filter(|_| is_on)),
        // RFC 6455, section 9.1: what breaks the grammar fails the connection.
        Err(error) => Err(Box::new(error_response(
            StatusCode::BAD_REQUEST,
            "bad_request",
            &error.to_string(),
        ))),
    }
}
