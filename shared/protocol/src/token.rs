//! What a token says: who the user is, until when, and which rooms are open to it. And the token by
//! which a session is resumed.

use std::{collections::BTreeMap, fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

use crate::ids::{RoomId, SessionId, UserId};

/// The claims of a JWT that this protocol reads. Others are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    /// The user id.
    pub sub: String,
    /// The display name; the id where absent, or where it is no text.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "string_or_none")]
    pub name: Option<String>,
    /// When the token ends, in seconds since 1970, without a fraction that it may have (RFC 7519,
    /// sections 2 and 4.1.4).
    #[serde(deserialize_with = "seconds_rounded_down")]
    pub exp: u64,
    /// When the token begins to count, in seconds since 1970, a fraction rounded up (RFC 7519,
    /// section 4.1.5).
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "optional_seconds_rounded_up"
    )]
    pub nbf: Option<u64>,
    /// When the token was made. It is not compared with the time, but has to be a number (RFC 7519,
    /// section 4.1.6).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<f64>,
    /// The issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    /// The audience: a token counts only for those that it names (RFC 7519, section 4.1.3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aud: Option<Audience>,
    /// What is allowed in which room; every room where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rooms: Option<RoomGrants>,
}

/// The claim `aud`: one name, or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Audience {
    /// One name.
    One(String),
    /// A list of names.
    Many(Vec<String>),
}

impl Audience {
    /// Whether this name is among them.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Self::One(found) => found == name,
            Self::Many(found) => found.iter().any(|found| found == name),
        }
    }
}

/// Reads a NumericDate. What is below or above the range counts as its end.
fn seconds_rounded_down<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    f64::deserialize(deserializer).map(|seconds| seconds as u64)
}

/// Reads a text, and anything else as none.
fn string_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(value.as_str().map(str::to_owned))
}

/// Reads a NumericDate that may be absent, up to the next whole second.
fn optional_seconds_rounded_up<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<u64>, D::Error> {
    let seconds = Option::<f64>::deserialize(deserializer)?;
    Ok(seconds.map(|seconds| seconds.ceil() as u64))
}

/// What a token allows in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RoomAccess {
    /// Join, receive, history, presence, read.
    #[serde(rename = "r")]
    Read,
    /// All of that, and send.
    #[serde(rename = "rw")]
    ReadWrite,
}

/// Access by room name, or by prefix where the key ends in `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RoomGrants(pub BTreeMap<String, RoomAccess>);

/// Whether the text is a room's name, or the beginning of one with `*` at its end.
pub fn is_room_pattern(text: &str) -> bool {
    match text.strip_suffix('*') {
        // A name may begin with these, and not be one of them.
        Some("" | "." | "..") => true,
        Some(prefix) => prefix.parse::<RoomId>().is_ok(),
        None => text.parse::<RoomId>().is_ok(),
    }
}

impl RoomGrants {
    /// A key that can match no room: neither a name nor the beginning of one.
    pub fn invalid_pattern(&self) -> Option<&str> {
        self.0.keys().map(String::as_str).find(|key| !is_room_pattern(key))
    }

    /// What is allowed in `room`: the longest match wins, a full name before a prefix of its
    /// length; `None` where nothing matches.
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

/// What a client presents to resume its session: a secret, the session, and its user. Written in
/// base64url without padding, so that it can stand in a query and among subprotocols; opaque to clients.
#[derive(Clone, PartialEq, Eq)]
pub struct ResumeToken {
    /// 128 random bits.
    pub secret: [u8; 16],
    /// The session.
    pub session: SessionId,
    /// Whose it is.
    pub user: UserId,
}

/// The text is no resume token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a resume token")]
pub struct InvalidResumeToken;

impl fmt::Debug for ResumeToken {
    /// Without the secret.
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
        // The longest user id has 128 bytes.
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
    fn a_resume_token_reads_back_and_hides_its_secret() {
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
    fn a_pattern_is_a_name_or_the_beginning_of_one() {
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
