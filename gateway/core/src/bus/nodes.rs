//! Announcements of nodes: what each node of a cluster publishes of itself beside its lease, and
//! what the others know of it.
//!
//! Nodes of other versions read and write the same announcements: every field but the name may be
//! absent, and unknown fields are ignored.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use skein_protocol::ids::NodeId;

use super::{BoxFuture, BusError, presence_store::UnixMillis};

/// The facts about a node that it publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAnnouncement {
    /// The node.
    pub node: NodeId,
    /// Whether it takes clients.
    #[serde(default)]
    pub condition: NodeCondition,
    /// The number of its connections.
    #[serde(default)]
    pub connections: u64,
    /// The most connections it takes; 0: unknown.
    #[serde(default)]
    pub connections_max: u64,
    /// The number of clients of other nodes that it takes per second; 0: unknown.
    #[serde(default)]
    pub intake_per_second: u32,
    /// The value of `?node=` with which a proxy leads clients to it, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// If it stops and is expected back: the time until its clients are back, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub returning_ms: Option<u64>,
    /// The time since its start, ms.
    #[serde(default)]
    pub uptime_ms: u64,
    /// The version of its program.
    #[serde(default)]
    pub version: String,
    /// The newest schema of stored data that it reads.
    #[serde(default)]
    pub schema: u32,
}

/// Whether a node takes clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeCondition {
    /// It takes clients.
    Accepting,
    /// It drains or stops.
    Draining,
    /// It has the maximum of connections.
    Full,
    /// It is not ready for another reason, such as a lost bus.
    Unavailable,
    /// A condition that this version does not know; counts as not accepting.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A node as the announcements show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnouncedNode {
    /// Its last announcement.
    pub announcement: NodeAnnouncement,
    /// Whether it is this node.
    pub is_own: bool,
    /// The time since its last announcement.
    pub age: Duration,
    /// Whether it announced itself within the duration of a lease, or is expected back. A node that
    /// stops in order withdraws its announcement, so that others are missing.
    pub is_alive: bool,
    /// When it started, by the clock of the store.
    pub started: UnixMillis,
}

/// All announcements, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announcements {
    /// All nodes, ordered by id. A node that ended without withdrawing is missing for a quarter of
    /// an hour.
    pub nodes: Vec<AnnouncedNode>,
    /// If this is the first announcement after a restart: the clients that the node had before and
    /// that come back to it, and the time until they have.
    pub returning: Option<(u64, Duration)>,
}

impl NodeCondition {
    /// Its name, as announcements have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepting => "accepting",
            Self::Draining => "draining",
            Self::Full => "full",
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
        }
    }
}

impl AnnouncedNode {
    /// If it is expected back: the clients it had, and the time until they are back.
    pub fn time_until_return(&self) -> Option<(u64, Duration)> {
        let returns_after = Duration::from_millis(self.announcement.returning_ms?);
        let remaining = returns_after.checked_sub(self.age)?;
        Some((self.announcement.connections, remaining))
    }

    /// Whether it was expected back and is not: it stopped in order, and is not missing.
    pub fn has_not_returned(&self) -> bool {
        self.announcement.returning_ms.is_some() && self.time_until_return().is_none()
    }

    /// Whether it is another node that takes clients.
    pub fn takes_clients(&self) -> bool {
        let accepts = self.announcement.condition == NodeCondition::Accepting;
        accepts && self.is_alive && !self.is_own
    }
}

/// The announcements of all nodes of a cluster.
pub trait NodeRegistry: Send + Sync {
    /// Publishes the announcement of this node, and returns those of all nodes.
    fn announce(&self, own: NodeAnnouncement) -> BoxFuture<Result<Announcements, BusError>>;

    /// Removes the announcement of this node, which stops.
    fn withdraw(&self) -> BoxFuture<Result<(), BusError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_of_other_versions_are_read() {
        let read = |text: &str| serde_json::from_str::<NodeAnnouncement>(text).unwrap();
        let older = read(r#"{"node":"a"}"#);
        assert_eq!((older.condition, older.schema), (NodeCondition::Unknown, 0));
        let newer = read(r#"{"node":"a","condition":"resting","connections":3,"mood":"fine"}"#);
        assert_eq!((newer.condition, newer.connections), (NodeCondition::Unknown, 3));
        let full = read(r#"{"node":"a","condition":"full"}"#);
        assert_eq!(full.condition, NodeCondition::Full);
        assert!(serde_json::from_str::<NodeAnnouncement>("{}").is_err());
    }
}
