//! What a token says: who the user is, until when, and which rooms are open to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::ids::RoomId;

/// The claims of a JWT that this protocol reads. Others are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claims {
    /// The user id.
    pub sub: String,
    /// The display name; the id where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// When the token ends, in seconds since 1970, without a fraction that it may have (RFC 7519,
    /// sections 2 and 4.1.4).
    #[serde(deserialize_with = "whole_seconds")]
    pub exp: u64,
    /// What is allowed in which room; every room where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rooms: Option<RoomGrants>,
}

/// Reads a NumericDate. What is below or above the range counts as its end.
fn whole_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    f64::deserialize(deserializer).map(|seconds| seconds as u64)
}

/// What a token allows in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Access {
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
pub struct RoomGrants(pub BTreeMap<String, Access>);

impl RoomGrants {
    /// What is allowed in `room`: the longest match wins, a full name before a prefix of its
    /// length; `None` where nothing matches.
    pub fn access(&self, room: &RoomId) -> Option<Access> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(grants: &str, room: &str, expected: Option<Access>) {
        let grants: RoomGrants = serde_json::from_str(grants).unwrap();
        assert_eq!(grants.access(&room.parse().unwrap()), expected, "{room}");
    }

    #[test]
    fn the_longest_match_wins() {
        let grants = r#"{"team:*":"r","team:dev":"rw","team:dev:*":"r","*":"rw","x":"r"}"#;
        check(grants, "team:ops", Some(Access::Read));
        check(grants, "team:dev", Some(Access::ReadWrite));
        check(grants, "team:dev:ci", Some(Access::Read));
        check(grants, "other", Some(Access::ReadWrite));
        check(grants, "x", Some(Access::Read));
        check(r#"{"a":"r"}"#, "b", None);
        check("{}", "b", None);
    }
}
