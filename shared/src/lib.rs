//! What both ends of the Skein protocol `chat.v1` agree on.
//!
//! Everything here is pure: no I/O, no clock. The one exception is `client`, the Rust client,
//! behind the feature of that name. In reading order: what things are called ([`ids`],
//! [`position`]), what is said ([`protocol`], [`error`], [`close`], [`token`]), how it is put on a
//! WebSocket ([`codec`]) and how an entry is kept in a room's log ([`envelope`]).

pub mod ids;
pub mod position;
pub mod error;
pub mod close;
pub mod token;
pub mod protocol;
pub mod codec;
pub mod envelope;
#[cfg(feature = "client")]
pub mod client;

/// The subprotocol of this contract, as offered and answered in `Sec-WebSocket-Protocol`.
pub const SUBPROTOCOL: &str = "chat.v1";

/// The present time as the protocol writes it: RFC 3339, UTC, with milliseconds.
///
/// The time is an argument, since nothing in this crate asks for it.
pub fn timestamp(now: std::time::SystemTime) -> String {
    humantime::format_rfc3339_millis(now).to_string()
}
