//! The frames of `chat.v1`: those of clients ([`client_frame`]) and those of the server
//! ([`server_frame`]).
//!
//! One WebSocket message is one frame; text frames hold one JSON object with a `type`. Both sides
//! ignore unknown fields, and clients ignore unknown types.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::value::RawValue;

pub mod client_frame;
pub mod server_frame;

/// Default of `limits.message_bytes_max`: 256 KiB.
pub const MESSAGE_BYTES_MAX: usize = 262_144;
/// Maximum size in bytes of `joined.history` and `history.messages`, unless one entry alone is
/// larger.
pub const HISTORY_BYTES_MAX: usize = 256 * 1024;
/// Maximum size in bytes of a message's or room's `meta`, as JSON text.
pub const META_BYTES_MAX: usize = 8 * 1024;
/// Maximum size in bytes of the JSON header of a binary frame.
pub const BINARY_HEADER_BYTES_MAX: usize = 16 * 1024;
/// Maximum size in bytes of a session's data, as JSON text.
pub const SESSION_BYTES_MAX: usize = 16 * 1024;
/// Maximum number of characters of a display name.
pub const NAME_CHARS_MAX: usize = 64;
/// Maximum number of bytes of a room's password.
pub const PASSWORD_BYTES_MAX: usize = 1024;
/// Maximum number of bytes of a `ref` and of a ping's `timestamp`.
pub const REF_BYTES_MAX: usize = 64;

/// Maximum size in bytes of a server frame, given the maximum size of a client's message.
pub fn server_frame_bytes_max(message_bytes_max: usize) -> usize {
    (512 * 1024).max(message_bytes_max + 16 * 1024)
}

/// The `ref` of a client frame, a string or an integer, which the reply repeats.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FrameRef(Box<str>);

impl FrameRef {
    /// A `ref` that is an integer.
    pub fn number(number: u64) -> Self {
        Self(number.to_string().into())
    }

    /// The `ref` as JSON text.
    pub fn as_json(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FrameRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for FrameRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serde_json::from_str::<&RawValue>(&self.0) {
            Ok(raw) => raw.serialize(serializer),
            Err(error) => Err(serde::ser::Error::custom(error)),
        }
    }
}

impl<'de> Deserialize<'de> for FrameRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RefVisitor)
    }
}

struct RefVisitor;

impl de::Visitor<'_> for RefVisitor {
    type Value = FrameRef;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a ref: a string or an integer of at most {REF_BYTES_MAX} bytes")
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<FrameRef, E> {
        Ok(FrameRef(number.to_string().into()))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<FrameRef, E> {
        Ok(FrameRef(number.to_string().into()))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<FrameRef, E> {
        if text.len() > REF_BYTES_MAX {
            return Err(E::invalid_length(text.len(), &self));
        }
        serde_json::to_string(text).map(|json| FrameRef(json.into())).map_err(E::custom)
    }
}

/// The kind of a message, a hint for display.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageKind {
    /// Text for people.
    #[default]
    Text,
    /// An image, or a link to one.
    Image,
    /// A file, or a link to one.
    File,
    /// A kind of the application, which names it in `meta`.
    Custom,
    /// A message of the server. Clients must not send it.
    System,
}

/// The text of a JSON string, borrowed if it has no escapes.
pub(crate) fn json_string(raw: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    serde_json::from_str::<Text<'_>>(raw.get()).ok().map(|text| text.0)
}
