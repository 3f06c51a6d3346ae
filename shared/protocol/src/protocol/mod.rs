//! The frames of `chat.v1`: what a client says ([`client_frame`]) and what the server says ([`server_frame`]).
//!
//! One WebSocket message is one frame; text frames hold one JSON object with a `type`. Both sides
//! ignore unknown fields, and clients ignore unknown types.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::value::RawValue;

pub mod client_frame;
pub mod server_frame;

/// The default of `limits.message_bytes_max`: 256 KiB.
pub const MESSAGE_BYTES_MAX: usize = 262_144;
/// The most that `joined.history` and `history.messages` hold, unless one entry alone is larger.
pub const HISTORY_BYTES_MAX: usize = 256 * 1024;
/// The most that `meta` of a message may take, as JSON text.
pub const META_BYTES_MAX: usize = 8 * 1024;
/// The most that the JSON header of a binary frame may take.
pub const BINARY_HEADER_BYTES_MAX: usize = 16 * 1024;
/// The most that the data of a session may take, as JSON text.
pub const SESSION_BYTES_MAX: usize = 16 * 1024;
/// The most characters of a name.
pub const NAME_CHARS_MAX: usize = 64;
/// The most bytes of a room's password.
pub const PASSWORD_BYTES_MAX: usize = 1024;
/// The most that a `ref` and a `timestamp` may take.
pub const REF_BYTES_MAX: usize = 64;

/// The largest frame a server sends, given the largest message a client may send.
pub fn server_frame_bytes_max(message_bytes_max: usize) -> usize {
    (512 * 1024).max(message_bytes_max + 16 * 1024)
}

/// What a client calls one of its frames, to find the answer: a string or an integer, echoed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FrameRef(Box<str>);

impl FrameRef {
    /// A reference that is an integer.
    pub fn number(number: u64) -> Self {
        Self(number.to_string().into())
    }

    /// The reference as JSON text.
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

/// What a message is, for those who show it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageKind {
    /// Text for people.
    #[default]
    Text,
    /// A picture, or where it is.
    Image,
    /// A file, or where it is.
    File,
    /// The application's own; its name stands in `meta`.
    Custom,
    /// From the server. Clients may not send it.
    System,
}

/// Text that is a string in JSON, borrowed where it has no escapes.
pub(crate) fn json_string(raw: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
    serde_json::from_str::<Text<'_>>(raw.get()).ok().map(|text| text.0)
}
