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

/// The subprotocol of this contract, as offered and answered in `Sec-WebSocket-Protocol`.
pub const SUBPROTOCOL: &str = "chat.v1";

/// The present time as the protocol writes it: RFC 3339, UTC, with milliseconds.
///
/// The time is an argument, since nothing in this crate asks for it. Times before 1970 and after
/// 9999, which that form does not have, are written as its first and last.
pub fn timestamp(now: std::time::SystemTime) -> String {
    use std::time::{Duration, UNIX_EPOCH};
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default().min(LAST);
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_timestamp_has_milliseconds_and_an_end() {
        let at = |seconds| super::timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(253_402_300_800), "9999-12-31T23:59:59.000Z");
        assert_eq!(super::timestamp(UNIX_EPOCH - Duration::from_secs(1)), at(0));
    }
}
