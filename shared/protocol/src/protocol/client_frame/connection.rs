//! Frames about the connection itself: its session, its token, the users it watches.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{check_json, describe, deserialize_users};
use crate::{
    error::ErrorCode,
    ids::UserId,
    protocol::{REF_BYTES_MAX, SESSION_BYTES_MAX, server_frame::ErrorFrame},
};

/// Maximum number of users in one `watch`.
pub const WATCH_USERS_MAX: usize = 100;

/// `watch` and `unwatch`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct WatchFrame {
    /// The users whose status to send, at most 100.
    #[serde(deserialize_with = "deserialize_users")]
    pub users: Vec<UserId>,
}

/// `session_set`
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SessionSetFrame {
    /// Merged into the session's data: a field that exists is replaced, one that is `null` is
    /// removed (RFC 7386, one level deep).
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// `refresh`: a new token for this connection.
#[derive(Clone, PartialEq, Deserialize)]
pub struct RefreshFrame {
    /// The new token.
    pub token: String,
}

impl std::fmt::Debug for RefreshFrame {
    /// Leaves the token out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Refresh")
    }
}

/// `ping`
#[derive(Clone, Debug, Deserialize)]
pub struct PingFrame<'a> {
    /// The client's own time, echoed in the `pong`.
    #[serde(borrow, default)]
    pub timestamp: Option<&'a RawValue>,
}

/// The fields of a `session_set` in JSON.
#[derive(Deserialize)]
struct SessionSetFields<'a> {
    #[serde(borrow)]
    data: &'a RawValue,
}

pub(super) fn session_set(
    text: &str,
    error_frame: &ErrorFrame,
) -> Result<SessionSetFrame, Box<ErrorFrame>> {
    let bad_request =
        |error: serde_json::Error| error_frame.with_code(ErrorCode::BadRequest, describe(&error));
    let raw: SessionSetFields<'_> = serde_json::from_str(text).map_err(bad_request)?;
    if raw.data.get().len() > SESSION_BYTES_MAX {
        let text = format!("`data` of a session must be at most {SESSION_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(raw.data).map_err(bad_request)?;
    serde_json::from_str(text).map_err(bad_request)
}

pub(super) fn ping<'a>(
    text: &'a str,
    error_frame: &ErrorFrame,
) -> Result<PingFrame<'a>, Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    let ping: PingFrame<'a> =
        serde_json::from_str(text).map_err(|error| bad_request(describe(&error)))?;
    if let Some(timestamp) = ping.timestamp {
        let json = timestamp.get();
        // The quotes of a string do not count.
        let length = json.trim_matches('"').len();
        if !json.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit())
            || length > REF_BYTES_MAX
            || check_json(timestamp).is_err()
        {
            let text = format!(
                "`timestamp` must be a string or a number of at most {REF_BYTES_MAX} bytes"
            );
            return Err(bad_request(text));
        }
    }
    Ok(ping)
}
