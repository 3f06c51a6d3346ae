//! Checks of fields in JSON, and the texts of their errors.

use std::time::SystemTime;

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, Unexpected},
};
use serde_json::value::RawValue;

use super::{HISTORY_LIMIT_MAX, JOIN_HISTORY_MAX, WATCH_USERS_MAX};
use crate::{
    error::ErrorCode,
    ids::UserId,
    position::{Seq, seq_in_range},
    protocol::{META_BYTES_MAX, PASSWORD_BYTES_MAX, server_frame::ErrorFrame},
};

/// Maximum nesting depth of `content` and `meta`. Common parsers stop at 128 levels, and a message
/// is nested inside `history` inside a frame.
pub const NESTING_MAX: usize = 100;

/// Rejects well-formed JSON that a common parser of a recipient would not accept: half a surrogate
/// pair, a number beyond a double, more than [`NESTING_MAX`] levels. JSON is forwarded as it was
/// written, so one sender could otherwise break every member of a room.
///
/// # Errors
///
/// The first of these faults.
pub fn check_json(raw: &RawValue) -> Result<(), serde_json::Error> {
    let json = raw.get();
    if nesting_depth(json) > NESTING_MAX {
        return Err(serde_json::Error::custom(format!(
            "nested more than {NESTING_MAX} levels deep"
        )));
    }
    let plain_text = json.starts_with('"') && !json.contains(r"\u");
    if plain_text {
        return Ok(());
    }
    serde_json::from_str::<serde_json::Value>(json).map(drop)
}

/// Maximum depth of nested arrays and objects.
fn nesting_depth(json: &str) -> usize {
    let (mut level, mut deepest, mut in_text, mut escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                level += 1;
                deepest = deepest.max(level);
            }
            b']' | b'}' if !in_text => level = level.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Checks `meta` of a message or of a room.
pub(super) fn check_meta(meta: &RawValue, error_frame: &ErrorFrame) -> Result<(), Box<ErrorFrame>> {
    let bad_request = |text: String| error_frame.with_code(ErrorCode::BadRequest, text);
    if !meta.get().starts_with('{') {
        return Err(bad_request("`meta` must be an object".into()));
    }
    if meta.get().len() > META_BYTES_MAX {
        let text = format!("`meta` must be at most {META_BYTES_MAX} bytes");
        return Err(error_frame.with_code(ErrorCode::TooLarge, text));
    }
    check_json(meta).map_err(|error| bad_request(format!("`meta`: {}", describe(&error))))
}

pub(super) fn default_true() -> bool {
    true
}

/// A value that is present, even if it is `null`.
pub(super) fn deserialize_present<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

pub(super) fn deserialize_history<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<u32, D::Error> {
    let history = u32::deserialize(deserializer)?;
    if history > JOIN_HISTORY_MAX {
        return Err(D::Error::custom(format!("`history` must be 0 to {JOIN_HISTORY_MAX}")));
    }
    Ok(history)
}

pub(super) fn deserialize_limit<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<u32, D::Error> {
    let limit = u32::deserialize(deserializer)?;
    if limit == 0 || limit > HISTORY_LIMIT_MAX {
        return Err(D::Error::custom(format!("`limit` must be 1 to {HISTORY_LIMIT_MAX}")));
    }
    Ok(limit)
}

pub(super) fn deserialize_users<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<UserId>, D::Error> {
    let users = Vec::<UserId>::deserialize(deserializer)?;
    if users.len() > WATCH_USERS_MAX {
        return Err(D::Error::custom(format!("`users` must be at most {WATCH_USERS_MAX}")));
    }
    Ok(users)
}

/// A name or a prefix of one, at most 128 bytes.
pub(super) fn deserialize_short_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    if text.as_ref().is_some_and(|text| text.len() > 128) {
        return Err(D::Error::custom("`cursor` and `prefix` must be at most 128 bytes"));
    }
    Ok(text)
}

pub(super) fn deserialize_password<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let password = Option::<String>::deserialize(deserializer)?;
    if password.as_ref().is_some_and(|password| password.len() > PASSWORD_BYTES_MAX) {
        return Err(D::Error::custom(format!(
            "`password` must be at most {PASSWORD_BYTES_MAX} bytes"
        )));
    }
    Ok(password)
}

pub(super) fn deserialize_optional_seq<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Seq>, D::Error> {
    #[derive(Deserialize)]
    struct InRange(#[serde(deserialize_with = "seq_in_range")] Seq);
    Ok(Option::<InRange>::deserialize(deserializer)?.map(|seq| seq.0))
}

/// A time in RFC 3339.
pub(super) fn deserialize_optional_time<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<SystemTime>, D::Error> {
    let text = Option::<std::borrow::Cow<'_, str>>::deserialize(deserializer)?;
    let parse = |text: &str| {
        let wanted = "a time in RFC 3339, such as 2026-01-31T12:00:00Z";
        let invalid = || D::Error::invalid_value(Unexpected::Str(text), &wanted);
        crate::parse_timestamp(text).ok_or_else(invalid)
    };
    text.as_deref().map(parse).transpose()
}

/// An error of serde_json as one line of text, without the line number, which is always 1.
pub(super) fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line 1 column ") {
        Some((fault, column)) => format!("{fault} (at byte {column})"),
        None => text,
    }
}

/// The part of a client's text that a reply repeats: at most 64 characters.
pub(super) fn truncated(text: &str) -> &str {
    text.char_indices().nth(64).map_or(text, |(end, _)| &text[..end])
}
