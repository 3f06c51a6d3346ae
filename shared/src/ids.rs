//! Names and ids, each a type of its own, checked once where it enters.
//!
//! All are cheap to clone. None derives `Deserialize`, because a derived one would let unchecked
//! names in through JSON.

use std::{borrow::Cow, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use uuid::Uuid;

use crate::protocol::NAME_CHARS_MAX;

/// A name made of a fixed alphabet: the type, its text form, its check, its error.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $invalid:ident, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        #[doc = concat!("The text is no [`", stringify!($name), "`]: it has to be ", $rule, ".")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
        #[error($rule)]
        pub struct $invalid;

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        /// Ordered and told apart by its text.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = $invalid;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.into())) } else { Err($invalid) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

name! {
    /// The name of a room.
    RoomId, InvalidRoomId, "a room is 1 to 128 of A-Z a-z 0-9 _ . : @ -",
    |text| made_of(text, 128, |b| matches!(b, b'_' | b'.' | b':' | b'@' | b'-'))
}

name! {
    /// The id of a user. Ids with a leading `_` are the server's; see [`UserId::is_reserved`].
    UserId, InvalidUserId, "a user id is 1 to 128 of A-Z a-z 0-9 _ . : @ | + = -",
    |text| made_of(text, 128, |b| {
        matches!(b, b'_' | b'.' | b':' | b'@' | b'|' | b'+' | b'=' | b'-')
    })
}

name! {
    /// What a user is called in front of people.
    DisplayName, InvalidDisplayName, "a display name is 1 to 64 characters without controls",
    |text| !text.is_empty() && text.chars().count() <= 64 && !text.chars().any(char::is_control)
}

name! {
    /// The id of a gateway process, as given by `node.id`.
    NodeId, InvalidNodeId, "a node id is 1 to 64 of A-Z a-z 0-9 _ . : -",
    |text| made_of(text, 64, |b| matches!(b, b'_' | b'.' | b':' | b'-'))
}

impl From<&UserId> for DisplayName {
    /// The id as a name, as far as that goes; a short one shares its memory.
    fn from(id: &UserId) -> Self {
        // Letters of an id are single bytes, and none is a control.
        if id.0.len() <= NAME_CHARS_MAX {
            Self(id.0.clone())
        } else {
            Self(id.0[..NAME_CHARS_MAX].into())
        }
    }
}

impl UserId {
    /// Whether the id belongs to the server, so that no client may have it.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with('_')
    }
}

/// Whether `text` is 1 to `len_max` letters, digits, and what `also` allows.
fn made_of(text: &str, len_max: usize, also: fn(u8) -> bool) -> bool {
    !text.is_empty()
        && text.len() <= len_max
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || also(b))
}

/// The id of a message: a UUID, made by the client or else by the gateway. It is the key under
/// which a repeated send is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(pub Uuid);

/// The text is no message id: it has to be a UUID of 36 characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id is a UUID of 36 characters, as in 6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10")]
pub struct InvalidMessageId;

impl MessageId {
    /// A new random id (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl FromStr for MessageId {
    type Err = InvalidMessageId;

    /// Takes the hyphenated form only, in either case; it is answered in lower case.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 36 {
            return Err(InvalidMessageId);
        }
        Uuid::try_parse(text).map(Self).map_err(|_| InvalidMessageId)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl Serialize for MessageId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MessageId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The id of one connection, made by the gateway that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ConnectionId(pub Uuid);

impl ConnectionId {
    /// A new random id (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_room(text: &str, valid: bool) {
        assert_eq!(text.parse::<RoomId>().is_ok(), valid, "{text:?}");
    }

    #[test]
    fn rooms_are_of_a_fixed_alphabet_and_length() {
        check_room("lobby", true);
        check_room("A.b_c:d@e-9", true);
        check_room(&"x".repeat(128), true);
        check_room(&"x".repeat(129), false);
        for bad in ["", "a b", "a/b", "a|b", "ä", "a\n", "a{b}"] {
            check_room(bad, false);
        }
    }

    #[test]
    fn users_may_hold_more_signs_than_rooms_and_the_server_keeps_the_underscore() {
        assert!("auth0|a+b=c@d.e".parse::<UserId>().is_ok());
        assert!("_api".parse::<UserId>().unwrap().is_reserved());
        assert!(!"a_".parse::<UserId>().unwrap().is_reserved());
        assert!("a b".parse::<UserId>().is_err());
    }

    #[test]
    fn display_names_count_characters_not_bytes() {
        assert!("ä".repeat(64).parse::<DisplayName>().is_ok());
        assert!("ä".repeat(65).parse::<DisplayName>().is_err());
        assert!("a\u{7}b".parse::<DisplayName>().is_err());
        assert!("".parse::<DisplayName>().is_err());
    }

    #[test]
    fn a_message_id_is_a_hyphenated_uuid() {
        let id: MessageId = "6F1C2A0E-93C4-4C59-A9F5-5F3F2D1B7C10".parse().unwrap();
        assert_eq!(id.to_string(), "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10");
        assert!("6f1c2a0e93c44c59a9f55f3f2d1b7c10".parse::<MessageId>().is_err());
        assert!("{6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c1}".parse::<MessageId>().is_err());
    }
}
