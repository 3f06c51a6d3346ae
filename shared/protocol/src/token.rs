//! Tokens: the claims of a JWT (user, expiry, rooms), and the token that resumes a session.

use std::{collections::BTreeMap, fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::ids::{RoomId, SessionId, UserId};

/// The claims of a JWT that this protocol reads. Other claims are ignored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    /// The user id.
    pub sub: String,
    /// The display name; the user id if it is absent or not a string.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "string_or_none")]
    pub name: Option<String>,
    /// Expiry, in seconds since 1970, rounded down from a fraction (RFC 7519, sections 2 and
    /// 4.1.4).
    #[serde(deserialize_with = "seconds_rounded_down")]
    pub exp: u64,
    /// Start of validity, in seconds since 1970, rounded up from a fraction (RFC 7519, section
    /// 4.1.5).
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "optional_seconds_rounded_up"
    )]
    pub nbf: Option<u64>,
    /// Time of issue. It is not compared with the clock, but must be a number (RFC 7519, section
    /// 4.1.6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<f64>,
    /// The issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    /// The audience: a token is valid only for the names in it (RFC 7519, section 4.1.3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aud: Option<Audience>,
    /// Access by room; access to every room if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rooms: Option<RoomGrants>,
}

/// The claim `aud`: one name or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Audience {
    /// One name.
    One(String),
    /// A list of names.
    Many(Vec<String>),
}

impl Audience {
    /// Whether the audience contains this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::One(found) => found == name,
            Self::Many(found) => found.iter().any(|found| found == name),
        }
    }
}

/// Deserializes a NumericDate. A number outside the range of `u64` becomes its nearest bound.
fn seconds_rounded_down<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    f64::deserialize(deserializer).map(|seconds| seconds as u64)
}

/// Deserializes a string; any other value becomes `None`.
fn string_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().map(str::to_owned))
}

/// Deserializes an optional NumericDate, rounded up to a whole second.
fn optional_seconds_rounded_up<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let seconds = Option::<f64>::deserialize(deserializer)?;
    Ok(seconds.map(|seconds| seconds.ceil() as u64))
}

/// Access to a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RoomAccess {
    /// Join, receive, history, presence and read marks.
    #[serde(rename = "r")]
    Read,
    /// All of [`Self::Read`], and sending.
    #[serde(rename = "rw")]
    ReadWrite,
}

/// Access by room id, or by a prefix where the key ends in `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RoomGrants(pub BTreeMap<String, RoomAccess>);

/// Whether the text is a room id, or a prefix of one followed by `*`.
pub fn is_room_pattern(text: &str) -> bool {
    match text.strip_suffix('*') {
        // These are no room ids, but a room id can begin with them.
        Some("" | "." | "..") => true,
        Some(prefix) => prefix.parse::<RoomId>().is_ok(),
        None => text.parse::<RoomId>().is_ok(),
    }
}

impl RoomGrants {
    /// The first key that can match no room: neither an id nor a prefix of one.
    pub fn invalid_pattern(&self) -> Option<&str> {
        self.0.keys().map(String::as_str).find(|key| !is_room_pattern(key))
    }

    /// Access to `room` by the longest match; an exact id wins over a prefix of the same length.
    /// `None` if nothing matches.
    pub fn access(&self, room: &RoomId) -> Option<RoomAccess> {
        let room = room.as_str();
        let matches = |key: &str| match key.strip_suffix('*') {
            Some(prefix) => room.starts_with(prefix).then_some(prefix.len() * 2),
            None => (key == room).then_some(room.len() * 2 + 1),
        };
        self.0
            .iter()
            .filter_map(|(key, access)| Some((matches(key)?, *access)))
            .max_by_key(|(length, _)| *length)
            .map(|(_, access)| access)
    }
}

/// The token that a client presents to resume its session: a secret, the session id and the user
/// id. Its text is base64url without padding, so that it fits in a query and among subprotocols;
/// clients treat it as opaque.
#[derive(Clone, PartialEq, Eq)]
pub struct ResumeToken {
    /// 128 random bits.
    pub secret: [u8; 16],
    /// The session.
    pub session: SessionId,
    /// The user of the session.
    pub user: UserId,
}

/// The text is not a resume token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a resume token")]
pub struct InvalidResumeToken;

impl fmt::Debug for ResumeToken {
    /// Leaves the secret out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResumeToken of {} ({})", self.session, self.user)
    }
}

impl fmt::Display for ResumeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [&self.secret[..], self.session.0.as_bytes(), self.user.as_str().as_bytes()];
        f.write_str(&URL_SAFE_NO_PAD.encode(parts.concat()))
    }
}

impl FromStr for ResumeToken {
    type Err = InvalidResumeToken;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The longest user id has 128 bytes, so a valid token is shorter.
        if text.len() > 512 {
            return Err(InvalidResumeToken);
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidResumeToken)?;
        let (secret, rest) = bytes.split_first_chunk::<16>().ok_or(InvalidResumeToken)?;
        let (session, user) = rest.split_first_chunk::<16>().ok_or(InvalidResumeToken)?;
        let user = std::str::from_utf8(user).ok().and_then(|user| user.parse().ok());
        Ok(Self {
            secret: *secret,
            session: SessionId(Uuid::from_bytes(*session)),
            user: user.ok_or(InvalidResumeToken)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_token_round_trips_and_debug_hides_its_secret() {
        let user: UserId = "x".repeat(128).parse().unwrap();
        let token = ResumeToken { secret: [0xA5; 16], session: SessionId(Uuid::nil()), user };
        let text = token.to_string();
        assert!(
            text.len() <= 512
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        );
        assert_eq!(text.parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("165"));
        for bad in ["", "x", "AAAA", &text[..40], &"A".repeat(513)] {
            assert_eq!(bad.parse::<ResumeToken>(), Err(InvalidResumeToken), "{bad}");
        }
    }

    #[track_caller]
    fn check(grants: &str, room: &str, expected: Option<RoomAccess>) {
        let grants: RoomGrants = serde_json::from_str(grants).unwrap();
        assert_eq!(grants.access(&room.parse().unwrap()), expected, "{room}");
    }

    #[test]
    fn the_longest_match_wins() {
        let grants = r#"{"team:*":"r","team:dev":"rw","team:dev:*":"r","*":"rw","x":"r"}"#;
        check(grants, "team:ops", Some(RoomAccess::Read));
        check(grants, "team:dev", Some(RoomAccess::ReadWrite));
        check(grants, "team:dev:ci", Some(RoomAccess::Read));
        check(grants, "other", Some(RoomAccess::ReadWrite));
        check(grants, "x", Some(RoomAccess::Read));
        check(r#"{"a":"r"}"#, "b", None);
        check("{}", "b", None);
    }

    #[test]
    fn a_pattern_is_a_room_id_or_a_prefix() {
        for pattern in ["a", "*", "team:*", ".*", "a-b_c@d"] {
            assert!(is_room_pattern(pattern), "{pattern}");
        }
        for pattern in ["", "a*b", "**", "*a", "a b", "a/*", &"x".repeat(129)] {
            assert!(!is_room_pattern(pattern), "{pattern}");
        }
        let grants: RoomGrants = serde_json::from_str(r#"{"a":"r","a*b":"r","c*":"rw"}"#).unwrap();
        assert_eq!(grants.invalid_pattern(), Some("a*b"));
    }
}
