//! Sessions: the state that outlives a user's connections, and how far the inbox is acknowledged.
//!
//! A client gets a secret with its first connection. Presenting it on a later connection, on any
//! node, resumes the session: its user and data. One connection holds a session at a time: a
//! connection that presents the secret takes the session over, and the former one is
//! [notified](super::presence_store::EphemeralEvent::Replaced). Only a digest of the secret is stored.
//!
//! There are two implementations, as of the [bus](super): in memory, and in Redis (`skein-redis`).

use std::{net::IpAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha1::{Digest as _, Sha1, digest::Output};
use skein_protocol::{
    ids::{ConnectionId, DisplayName, NodeId, SessionId, UserId},
    position::{Epoch, Seq},
    protocol::server_frame::InboxState,
    token::ResumeToken,
};

use super::{BoxFuture, BusError, presence_store::UnixMillis};

/// The most sessions of a user; beyond that the least recently used one is removed. More than
/// `limits.connections_per_user` by default.
pub const SESSIONS_MAX: usize = 100;

/// Options of the session store.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Retention after the last use.
    pub ttl: Duration,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(24 * 60 * 60) }
    }
}

/// The SHA-1 of a session's secret, which is all that is stored of it. The secret has 128 random
/// bits, so that it cannot be guessed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SecretDigest(Output<Sha1>);

impl SecretDigest {
    /// The digest of a token's secret.
    pub fn of(token: &ResumeToken) -> Self {
        Self(Sha1::digest(token.secret))
    }

    /// The digest in hexadecimal.
    pub fn to_text(self) -> String {
        format!("{:x}", self.0)
    }
}

/// Describes the connection that holds a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// The user's display name.
    pub name: DisplayName,
    /// The node.
    pub node: NodeId,
    /// The client's address.
    pub address: IpAddr,
    /// The user agent that the client states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<Box<str>>,
}

/// A connection's request for a session.
#[derive(Clone)]
pub struct SessionRequest {
    /// The user.
    pub user: UserId,
    /// The connection.
    pub connection: ConnectionId,
    /// The session to resume and the digest of the presented secret.
    pub resume: Option<(SessionId, SecretDigest)>,
    /// The session to create if that one cannot be resumed.
    pub new_session: (SessionId, SecretDigest),
    /// Describes the connection.
    pub about: Arc<ConnectionInfo>,
}

/// A session that was opened for a connection.
#[derive(Clone, Debug)]
pub struct OpenedSession {
    /// The session.
    pub session: SessionId,
    /// The former connection of a resumed session.
    pub resumed: Option<Arc<ConnectionInfo>>,
    /// When it was opened, by the clock of the store. Commands enqueued before do not concern this
    /// connection.
    pub at: UnixMicros,
    /// The state of the user's inbox at this moment.
    pub inbox: InboxState,
}

/// Microseconds since 1970, by the clock of the store. Orders connections and control commands.
pub type UnixMicros = u64;

/// A session, as listings have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSession {
    /// The session.
    pub session: SessionId,
    /// When it was created.
    pub created: UnixMillis,
    /// When it was last used.
    pub used: UnixMillis,
    /// The connection that holds it.
    pub connection: Option<ConnectionId>,
    /// Describes its last connection.
    pub about: Arc<ConnectionInfo>,
}

/// Which connection holds a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionHolder {
    /// The connection that asks.
    This,
    /// Another connection, which has taken it over.
    Another,
    /// None: the session was revoked or lost.
    Gone,
}

/// Selects sessions of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionSelector {
    /// All sessions.
    All,
    /// One session.
    One(SessionId),
    /// All sessions but one.
    AllBut(SessionId),
}

impl SessionSelector {
    /// Whether `session` is selected.
    pub fn selects(self, session: SessionId) -> bool {
        match self {
            Self::All => true,
            Self::One(one) => one == session,
            Self::AllBut(but) => but != session,
        }
    }
}

/// Why a session's data was not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionDataError {
    /// The session was revoked.
    #[error("the session was revoked")]
    NoSession,
    /// The change would make the data of the session too large.
    #[error(
        "the data of a session is at most {} bytes",
        skein_protocol::protocol::SESSION_BYTES_MAX
    )]
    TooLarge,
    /// The change would make the data of all sessions of the user too large.
    #[error("the data of all sessions of a user is at most {0} bytes")]
    TooMuch(u64),
    /// The store failed.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// Stores sessions. The module documents its guarantees.
pub trait SessionStore: Send + Sync {
    /// Resumes or creates the session of a connection, and reads the state of the inbox.
    fn open(&self, request: SessionRequest) -> BoxFuture<Result<OpenedSession, BusError>>;

    /// Describes the last connection of a session, if the digest matches.
    fn find(
        &self,
        user: UserId,
        session: SessionId,
        digest: SecretDigest,
    ) -> BoxFuture<Result<Option<Arc<ConnectionInfo>>, BusError>>;

    /// Returns which connection holds a session. Extends its retention if `connection` does.
    fn holder(
        &self,
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
    ) -> BoxFuture<Result<SessionHolder, BusError>>;

    /// How long a session is kept after its last use.
    fn ttl(&self) -> Duration;

    /// Releases a session whose connection has ended, if that connection still holds it.
    fn close(&self, user: UserId, session: SessionId, connection: ConnectionId);

    /// The session's data, after merging `change` into it; members that are `null` are removed.
    fn data(
        &self,
        user: UserId,
        session: SessionId,
        change: Option<Map<String, Value>>,
    ) -> BoxFuture<Result<Map<String, Value>, SessionDataError>>;

    /// The sessions of a user, the most recently used first.
    fn list(&self, user: UserId) -> BoxFuture<Result<Vec<StoredSession>, BusError>>;

    /// Removes sessions without closing their connections. Returns how many were removed.
    fn revoke(&self, user: UserId, which: SessionSelector) -> BoxFuture<Result<usize, BusError>>;

    /// Acknowledges the inbox up to `seq`; ignored if the inbox is in another epoch than `epoch`.
    fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq);
}

/// Merges a change into session data. `None` if the result would be too large.
pub fn merge_data(
    mut data: Map<String, Value>,
    change: Map<String, Value>,
) -> Option<(Map<String, Value>, String)> {
    for (key, value) in change {
        match value {
            Value::Null => drop(data.remove(&key)),
            value => drop(data.insert(key, value)),
        }
    }
    let text = serde_json::to_string(&data).ok()?;
    (text.len() <= skein_protocol::protocol::SESSION_BYTES_MAX).then_some((data, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_replaces_adds_and_removes() {
        let of = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        let (data, text) =
            merge_data(of(r#"{"a":1,"b":2}"#), of(r#"{"a":null,"b":{"x":[]},"c":3}"#)).unwrap();
        assert_eq!(text, r#"{"b":{"x":[]},"c":3}"#);
        let large =
            format!(r#"{{"d":"{}"}}"#, "x".repeat(skein_protocol::protocol::SESSION_BYTES_MAX));
        assert!(merge_data(data, of(&large)).is_none());
    }

    #[test]
    fn a_selector_selects_all_one_or_all_but_one() {
        let (one, two) = (SessionId::random(), SessionId::random());
        assert!(
            SessionSelector::All.selects(one)
                && SessionSelector::One(one).selects(one)
                && !SessionSelector::One(one).selects(two)
        );
        assert!(
            !SessionSelector::AllBut(one).selects(one) && SessionSelector::AllBut(one).selects(two)
        );
    }
}
