//! Ids and names: a type for each, validated where it enters the process.
//!
//! All are cheap to clone. None derives `Deserialize`, because a derived implementation would
//! accept invalid ids from JSON.

use std::{borrow::Cow, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use uuid::Uuid;

use crate::protocol::NAME_CHARS_MAX;

/// Declares an id that is text: its type, text form and error. With a check, also its parser.
macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $invalid:ident, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        #[doc = concat!("The text is not a [`", stringify!($name), "`]: ", $rule, ".")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
        #[error($rule)]
        pub struct $invalid;

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        /// Equal, ordered and hashed by its text.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
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
    };
    // An id of a fixed alphabet.
    ($(#[$doc:meta])* $name:ident, $invalid:ident, $rule:literal, $check:expr) => {
        string_id! { $(#[$doc])* $name, $invalid, $rule }

        impl FromStr for $name {
            type Err = $invalid;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.into())) } else { Err($invalid) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}

string_id! {
    /// The id of a room. Inboxes and the online state of users are rooms too, with ids that no
    /// client can name: see [`RoomKind`].
    RoomId, InvalidRoomId,
    "a room id must be 1 to 128 of A-Z a-z 0-9 _ . : @ -, and neither `.` nor `..`",
    |text| is_identifier(text, 128, |b| matches!(b, b'_' | b'.' | b':' | b'@' | b'-'))
}

string_id! {
    /// The id of a user. Ids with a leading `_` belong to the server; see [`UserId::is_reserved`].
    UserId, InvalidUserId,
    "a user id must be 1 to 128 of A-Z a-z 0-9 _ . : @ | + = -, and neither `.` nor `..`",
    |text| is_identifier(text, 128, |b| {
        matches!(b, b'_' | b'.' | b':' | b'@' | b'|' | b'+' | b'=' | b'-')
    })
}

string_id! {
    /// The display name of a user or room, in Unicode's composed form (NFC).
    DisplayName, InvalidDisplayName,
    "a display name must be 1 to 64 characters, not only spaces, without controls, bidi controls and \
     zero-width characters"
}

impl FromStr for DisplayName {
    type Err = InvalidDisplayName;

    /// Composes the characters and removes nothing: a name that would need other changes is an
    /// error. See [`DisplayName::sanitized`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = to_nfc(text);
        let fits = text.chars().take(NAME_CHARS_MAX + 1).count() <= NAME_CHARS_MAX;
        let shows = !text.chars().all(is_blank);
        if fits && shows && !text.chars().any(is_unprintable) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidDisplayName)
        }
    }
}

impl DisplayName {
    /// Removes the characters that a display name must not have, and cuts it to its maximum length.
    /// `None` if nothing visible is left.
    pub fn sanitized(text: &str) -> Option<Self> {
        let kept: String = text.chars().filter(|c| !is_unprintable(*c)).collect();
        let kept: String = to_nfc(&kept).chars().take(NAME_CHARS_MAX).collect();
        kept.parse().ok()
    }
}

impl<'de> Deserialize<'de> for DisplayName {
    /// Accepts a name that a server wrote. Older versions allowed characters that are invalid
    /// today; these are removed.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let name = text.parse().ok().or_else(|| Self::sanitized(&text));
        name.ok_or_else(|| D::Error::custom(InvalidDisplayName))
    }
}

/// The text in Unicode's composed form (NFC, Unicode Standard Annex 15).
fn to_nfc(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return text.into();
    }
    icu_normalizer::ComposingNormalizerBorrowed::new_nfc().normalize(text)
}

/// Whether a character is a control or changes the display without being visible: it sets the
/// direction of the surrounding text, breaks the line, or has no width. Such characters can make
/// one name look like another.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Soft hyphen, grapheme joiner, Mongolian selectors.
            '\u{AD}' | '\u{34F}' | '\u{180B}'..='\u{180F}'
            // Zero-width space, joiners, direction marks; separators, embeddings, overrides.
            | '\u{61C}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}'
            // Word joiner, invisible operators, isolates, deprecated controls.
            | '\u{2060}'..='\u{206F}'
            // Byte order mark, annotations, tags.
            | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}')
}

/// Whether a character shows as a gap: spaces, Hangul fillers, the empty Braille pattern.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{115F}' | '\u{1160}' | '\u{3164}' | '\u{FFA0}' | '\u{2800}')
}

string_id! {
    /// The id of a gateway node, from `node.id`.
    NodeId, InvalidNodeId,
    "a node id must be 1 to 64 of A-Z a-z 0-9 _ . : -, and neither `.` nor `..`",
    |text| is_identifier(text, 64, |b| matches!(b, b'_' | b'.' | b':' | b'-'))
}

impl From<&UserId> for DisplayName {
    /// The id as a display name, cut to its maximum length; a short id shares its memory.
    fn from(id: &UserId) -> Self {
        // The characters of an id are single bytes, and none is a control.
        if id.0.len() <= NAME_CHARS_MAX {
            Self(id.0.clone())
        } else {
            Self(id.0[..NAME_CHARS_MAX].into())
        }
    }
}

/// The purpose of a room. Ids of inboxes and statuses begin with a character that no client can
/// use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoomKind {
    /// A room that users join by its id.
    Room,
    /// A user's inbox: the log of entries for this user. All connections of the user are
    /// subscribed.
    Inbox,
    /// The online state of a user, without a log. The connections that watch the user are
    /// subscribed.
    Status,
}

const INBOX_PREFIX: char = '=';
const STATUS_PREFIX: char = '+';

impl RoomId {
    /// The inbox of a user.
    pub fn inbox_of(user: &UserId) -> Self {
        Self(format!("{INBOX_PREFIX}{user}").into())
    }

    /// The room that publishes whether a user is online.
    pub fn status_of(user: &UserId) -> Self {
        Self(format!("{STATUS_PREFIX}{user}").into())
    }

    /// The purpose of the room.
    pub fn kind(&self) -> RoomKind {
        match self.0.as_bytes().first() {
            Some(b'=') => RoomKind::Inbox,
            Some(b'+') => RoomKind::Status,
            _ => RoomKind::Room,
        }
    }

    /// The room as clients name it; `None` for an inbox or status, which clients cannot name.
    pub fn client_visible(&self) -> Option<Self> {
        (self.kind() == RoomKind::Room).then(|| self.clone())
    }

    /// The id without the first character of an inbox or status: the room's id or that of the user.
    pub fn without_prefix(&self) -> &str {
        self.0.strip_prefix([INBOX_PREFIX, STATUS_PREFIX]).unwrap_or(&self.0)
    }

    /// The user of an inbox or status.
    pub fn user(&self) -> Option<UserId> {
        (self.kind() != RoomKind::Room).then(|| UserId(self.without_prefix().into()))
    }
}

impl UserId {
    /// Whether the id is reserved for the server, so that no client can have it.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with('_')
    }
}

/// Whether `text` is 1 to `len_max` letters, digits, and bytes that `also` allows. `.` and `..` are
/// path segments that a URL never keeps (RFC 3986, section 5.2.4), so nothing can have these ids.
fn is_identifier(text: &str, len_max: usize, also: fn(u8) -> bool) -> bool {
    !matches!(text, "" | "." | "..")
        && text.len() <= len_max
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || also(b))
}

/// The id of a message: a UUID of the client, else of the gateway. It is the idempotency key of a
/// repeated send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(pub Uuid);

/// The text is not a message id: it must be a UUID of 36 characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message id must be a UUID, such as 6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10")]
pub struct InvalidMessageId;

impl MessageId {
    /// A new random id (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl FromStr for MessageId {
    type Err = InvalidMessageId;

    /// Accepts the hyphenated form only, in upper or lower case; it is written in lower case.
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

/// The id of a session, which outlives its connections. It is not secret;
/// [`ResumeToken`](crate::token::ResumeToken) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub Uuid);

impl SessionId {
    /// A new random id (UUID version 4).
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl FromStr for SessionId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::try_parse(text).map(Self)
    }
}

/// The id of a connection, chosen by its gateway.
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
    fn room_ids_have_a_fixed_alphabet_and_length() {
        check_room("lobby", true);
        check_room("A.b_c:d@e-9", true);
        check_room(&"x".repeat(128), true);
        check_room(&"x".repeat(129), false);
        for bad in ["", "a b", "a/b", "a|b", "ä", "a\n", "a{b}"] {
            check_room(bad, false);
        }
    }

    #[test]
    fn no_id_is_a_relative_path_segment() {
        for step in [".", ".."] {
            check_room(step, false);
            assert!(step.parse::<UserId>().is_err() && step.parse::<NodeId>().is_err(), "{step}");
        }
        for name in ["...", ".a", "a.", "..a"] {
            check_room(name, true);
            assert!(name.parse::<UserId>().is_ok() && name.parse::<NodeId>().is_ok(), "{name}");
        }
    }

    #[test]
    fn clients_cannot_name_inboxes_and_statuses() {
        let bob: UserId = "bob|1".parse().unwrap();
        let (inbox, status) = (RoomId::inbox_of(&bob), RoomId::status_of(&bob));
        assert_eq!((inbox.kind(), status.kind()), (RoomKind::Inbox, RoomKind::Status));
        for room in [&inbox, &status] {
            assert!(room.as_str().parse::<RoomId>().is_err() && room.client_visible().is_none());
            assert_eq!((room.without_prefix(), room.user()), ("bob|1", Some(bob.clone())));
        }
        let room: RoomId = "u:bob".parse().unwrap();
        assert_eq!(
            (room.kind(), room.without_prefix(), room.user()),
            (RoomKind::Room, "u:bob", None)
        );
    }

    #[test]
    fn user_ids_allow_more_characters_and_reserve_the_underscore() {
        assert!("auth0|a+b=c@d.e".parse::<UserId>().is_ok());
        assert!("_api".parse::<UserId>().unwrap().is_reserved());
        assert!(!"a_".parse::<UserId>().unwrap().is_reserved());
        assert!("a b".parse::<UserId>().is_err());
    }

    #[track_caller]
    fn check_name(text: &str, strict: Option<&str>, cleaned: Option<&str>) {
        let parsed = text.parse::<DisplayName>().ok();
        assert_eq!(parsed.as_ref().map(DisplayName::as_str), strict, "{text:?}");
        let clean = DisplayName::sanitized(text);
        assert_eq!(clean.as_ref().map(DisplayName::as_str), cleaned, "{text:?} cleaned");
        let read: Option<DisplayName> = serde_json::from_value(text.into()).ok();
        assert_eq!(read, parsed.or(clean), "{text:?} read");
    }

    #[test]
    fn display_names_count_characters_not_bytes() {
        let longest = "ä".repeat(64);
        check_name(&longest, Some(&longest), Some(&longest));
        check_name(&format!("{longest}x"), None, Some(&longest));
        // After composition the name is not too long.
        check_name(&"a\u{308}".repeat(64), Some(&longest), Some(&longest));
    }

    #[test]
    fn display_names_are_composed_and_have_no_hidden_characters() {
        check_name("Ann", Some("Ann"), Some("Ann"));
        check_name(" Zoë  Ω 名前 👍🏽 ", Some(" Zoë  Ω 名前 👍🏽 "), Some(" Zoë  Ω 名前 👍🏽 "));
        check_name("Zoe\u{308}", Some("Zoë"), Some("Zoë"));
        for hidden in [
            '\0',
            '\n',
            '\u{7}',
            '\u{85}',
            '\u{AD}',
            '\u{61C}',
            '\u{200B}',
            '\u{200D}',
            '\u{200E}',
            '\u{2028}',
            '\u{202E}',
            '\u{2060}',
            '\u{2066}',
            '\u{2069}',
            '\u{FEFF}',
            '\u{E0041}',
        ] {
            check_name(&format!("A{hidden}nn"), None, Some("Ann"));
        }
        // Between a letter and its combining mark it would prevent their composition.
        check_name("e\u{200B}\u{301}", None, Some("é"));
        for nothing in ["", " ", "\u{3000}\u{A0}", "\u{3164}", "\u{2800}", "\u{200B}", "\n"] {
            check_name(nothing, None, None);
        }
    }

    #[test]
    fn a_message_id_is_a_hyphenated_uuid() {
        let id: MessageId = "6F1C2A0E-93C4-4C59-A9F5-5F3F2D1B7C10".parse().unwrap();
        assert_eq!(id.to_string(), "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10");
        assert!("6f1c2a0e93c44c59a9f55f3f2d1b7c10".parse::<MessageId>().is_err());
        assert!("{6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c1}".parse::<MessageId>().is_err());
    }
}
