//! The contract of both ends of the Skein protocol `chat.v1`.
//!
//! Pure: no I/O, no clock. In reading order: ids and positions ([`ids`], [`position`]), frames,
//! codes and tokens ([`protocol`], [`error`], [`close`], [`token`]).

pub mod ids;
pub mod position;
pub mod error;
pub mod close;
pub mod token;
pub mod protocol;

/// The WebSocket subprotocol, as it stands in `Sec-WebSocket-Protocol`.
pub const SUBPROTOCOL: &str = "chat.v1";

/// Formats a time as the protocol does: RFC 3339, UTC, with milliseconds.
///
/// The time is an argument, because this crate reads no clock. Times before 1970 and after 9999
/// are written as the first and the last second of that range.
pub fn timestamp(now: std::time::SystemTime) -> String {
    use std::time::{Duration, UNIX_EPOCH};
    const LAST: Duration = Duration::from_secs(253_402_300_799);
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default().min(LAST);
    humantime::format_rfc3339_millis(UNIX_EPOCH + since).to_string()
}

/// The time that a [`timestamp`] states; `None` if `text` is not one.
pub fn parse_timestamp(text: &str) -> Option<std::time::SystemTime> {
    humantime::parse_rfc3339(text).ok()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_timestamp_has_milliseconds_and_a_range() {
        let at = |seconds| super::timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(253_402_300_800), "9999-12-31T23:59:59.000Z");
        assert_eq!(super::timestamp(UNIX_EPOCH - Duration::from_secs(1)), at(0));
        let read = super::parse_timestamp("2026-01-02T03:04:05.678Z").unwrap();
        assert_eq!(super::timestamp(read), "2026-01-02T03:04:05.678Z");
        assert_eq!(super::parse_timestamp("2026"), None);
    }
}
