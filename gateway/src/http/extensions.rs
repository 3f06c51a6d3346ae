//! What a handshake agrees on beside the protocol: permessage-deflate, or nothing.

use axum::{
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use shared::codec::extension::{self, Deflate, MalformedExtensions};

use super::error::refuse;

/// Chooses among what the client offers; nothing, where `is_on` says that this node has none of it.
pub(super) fn negotiate(
    headers: &HeaderMap,
    is_on: bool,
) -> Result<Option<Deflate>, Box<Response>> {
    let lines = headers.get_all(header::SEC_WEBSOCKET_EXTENSIONS).iter();
    let lines: Result<Vec<&str>, _> = lines.map(|value| value.to_str()).collect();
    let chosen = lines.map_err(|_| MalformedExtensions).and_then(extension::negotiate);
    match chosen {
        Ok(deflate) => Ok(deflate.filter(|_| is_on)),
        // RFC 6455, section 9.1: what breaks the grammar fails the connection.
        Err(error) => {
            Err(Box::new(refuse(StatusCode::BAD_REQUEST, "bad_request", &error.to_string())))
        }
    }
}
