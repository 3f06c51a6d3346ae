//! Sessions: what outlives a user's connections, and how far the inbox is acknowledged.
//!
//! A client gets a secret with its first connection. Presenting it on a later one, on any node, gives
//! it back its session: its user and data. A session has one connection at a time: who presents it
//! takes it over, and the connection before is [told](super::registry::Notice::Replaced). Only a digest
//! of the secret is kept.
//!
//! Two implementations, as of the [bus](super): in memory and in Redis.

use std::{fmt::Write as _, net::IpAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha1::{Digest as _, Sha1};
use skein_protocol::{
    ids::{ConnectionId, DisplayName, NodeId, SessionId, UserId},
    position::{Epoch, Seq},
    protocol::server_frame::InboxState,
    token::ResumeToken,
};

use super::{BoxFuture, BusError, registry::UnixMillis};

/// The most sessions of a user; above it the one used longest ago goes. More than
/// `limits.connections_per_user` by default.
pub const SESSIONS_MAX: usize = 100;

/// How long sessions are kept.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// After the last use.
    pub ttl: Duration,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(24 * 60 * 60) }
    }
}

/// What is kept of a secret: its SHA-1. The secret has 128 random bits, so that nothing is to be found
/// by guessing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SecretDigest([u8; 20]);

impl SecretDigest {
    /// The digest of a token's secret.
    pub fn of(token: &ResumeToken) -> Self {
        Self(Sha1::digest(token.secret).into())
    }

    /// In hexadecimal.
    pub fn to_text(self) -> String {
        self.0.iter().fold(String::with_capacity(40), |mut text, byte| {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

/// What is told of the connection that has a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// What the user is called.
    pub name: DisplayName,
    /// The node.
    pub node: NodeId,
    /// The client's address.
    pub address: IpAddr,
    /// The client, as it says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_agent: Option<Box<str>>,
}

/// A connection that wants a session.
#[derive(Clone)]
pub struct SessionRequest {
    /// Whose.
    pub user: UserId,
    /// The connection.
    pub connection: ConnectionId,
    /// The session presented, and what its secret has to fit.
    pub resume: Option<(SessionId, SecretDigest)>,
    /// The session that is made where that is not to be had.
    pub new_session: (SessionId, SecretDigest),
    /// What is told of the connection.
    pub about: Arc<ConnectionInfo>,
}

/// A connection with its session.
#[derive(Clone, Debug)]
pub struct OpenedSession {
    /// The session.
    pub session: SessionId,
    /// What was known of the connection before, where the session was there.
    pub resumed: Option<Arc<ConnectionInfo>>,
    /// When, by the clock of the store, in microseconds: what was ordered before does not concern
    /// this connection.
    pub at: UnixMicros,
    /// The user's inbox at this moment.
    pub inbox: InboxState,
}

/// Microseconds since 1970, by the clock of the store: it orders connections and what is ordered.
pub type UnixMicros = u64;

/// A session, as a listing has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredSession {
    /// Which.
    pub session: SessionId,
    /// When it was made.
    pub created: UnixMillis,
    /// When it was used last.
    pub used: UnixMillis,
    /// The connection that has it.
    pub connection: Option<ConnectionId>,
    /// What is told of the last one that had it.
    pub about: Arc<ConnectionInfo>,
}

/// Which connection has a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionHolder {
    /// The one that asks.
    This,
    /// Another, which has presented it since.
    Another,
    /// None: it was revoked, or lost.
    Gone,
}

/// Which sessions of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionSelector {
    /// All.
    All,
    /// One.
    One(SessionId),
    /// All but one.
    AllBut(SessionId),
}

impl SessionSelector {
    /// Whether `session` is among them.
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
    #[error("the session is no more")]
    NoSession,
    /// With this it would be larger than it may be.
    #[error(
        "the data of a session is at most {} bytes",
        skein_protocol::protocol::SESSION_BYTES_MAX
    )]
    TooLarge,
    /// With this all sessions of the user would have more than they may.
    #[error("the data of all sessions of a user is at most {0} bytes")]
    TooMuch(u64),
    /// The store did not do it.
    #[error(transparent)]
    Bus(#[from] BusError),
}

/// Where sessions are kept. See the module.
pub trait SessionStore: Send + Sync {
    /// Has a connection take its session, or makes one; and looks at the inbox.
    fn open(&self, opening: SessionRequest) -> BoxFuture<Result<OpenedSession, BusError>>;

    /// What is told of the connection that a session was for last, where the secret fits.
    fn find(
        &self,
        user: UserId,
        session: SessionId,
        digest: SecretDigest,
    ) -> BoxFuture<Result<Option<Arc<ConnectionInfo>>, BusError>>;

    /// Whose a session is. Where it is this connection's it is in use.
    fn holder(
        &self,
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
    ) -> BoxFuture<Result<SessionHolder, BusError>>;

    /// How long a session is kept after its last use.
    fn ttl(&self) -> Duration;

    /// The connection has ended: its session, if it still has it, was used until now.
    fn close(&self, user: UserId, session: SessionId, connection: ConnectionId);

    /// The session's data, after `change` was merged into it: what is `null` is removed.
    fn data(
        &self,
        user: UserId,
        session: SessionId,
        change: Option<Map<String, Value>>,
    ) -> BoxFuture<Result<Map<String, Value>, SessionDataError>>;

    /// The sessions of a user, those used last first.
    fn list(&self, user: UserId) -> BoxFuture<Result<Vec<StoredSession>, BusError>>;

    /// Forgets sessions. Their connections are not closed by this. Returns how many there were.
    fn revoke(&self, user: UserId, which: SessionSelector) -> BoxFuture<Result<usize, BusError>>;

    /// Notes up to where a user has received the inbox; of another epoch than `epoch` it is not.
    fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq);
}

/// Merges a change into data. `None`: it would be too large.
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
    fn sessions_are_picked_by_what_is_asked() {
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
