//! The options of the bus, and why it cannot start with them.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use super::{
    SCHEMA,
    topology::{self, TlsFiles, TopologyError},
};
use skein_core::bus::{Retention, room_store::RoomStoreOptions, sessions::SessionOptions};

/// The duration of a lease unless configured.
pub const LEASE: Duration = Duration::from_secs(10);

/// How to reach Redis, and how rooms are stored in it.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// The servers' URL, in the format of [`url`](crate::topology::url). It may have a password.
    pub url: SecretString,
    /// Files for TLS connections.
    pub tls: TlsFiles,
    /// The number of partitions that rooms are spread over; the same on all nodes, for good.
    pub partitions: u16,
    /// How long the other nodes count on this one after it has renewed its lease; the same on all
    /// nodes.
    pub lease: Duration,
    /// The retention of logs.
    pub retention: Retention,
    /// Options of the room store.
    pub rooms: RoomStoreOptions,
    /// Options of the session store.
    pub sessions: SessionOptions,
    /// The id of this node.
    pub node: String,
    /// The most entries that wait in Redis for the archive; 0 without an archive.
    pub archive_backlog_max: u32,
}

impl RedisOptions {
    /// Checks the URL and reads the files for TLS, without a connection.
    ///
    /// # Errors
    ///
    /// [`TopologyError`].
    pub fn check(&self) -> Result<(), TopologyError> {
        topology::open(self.url.expose_secret(), &self.tls).map(drop)
    }
}

/// Why the bus cannot start with these options.
#[derive(Debug, thiserror::Error)]
pub enum RedisStartError {
    /// No connections can be made as configured.
    #[error(transparent)]
    Open(#[from] TopologyError),
    /// The server is too old.
    #[error(
        "cluster.redis_url: Redis {found} is too old: upgrade it to 7.0 or newer, or to Valkey"
    )]
    Version {
        /// The version it reports.
        found: String,
    },
    /// Another gateway has the same node id.
    #[error(
        "node.id: another running gateway on this Redis is also named {node} (its process is {other}, \
         this one {own}): presence, control commands and drains would be mixed up; give one of \
         them another id, or stop it"
    )]
    NodeId {
        /// The node id.
        node: String,
        /// The other process.
        other: String,
        /// This process.
        own: String,
    },
    /// A newer version has stored data that this one does not read.
    #[error(
        "the data in this Redis has schema {recorded}, and this version ({version}) reads schemas up \
         to {SCHEMA}: run the version that wrote it, or a newer one; to return to this version, \
         restore a backup of Redis from before the upgrade",
        version = env!("CARGO_PKG_VERSION")
    )]
    Schema {
        /// The recorded schema.
        recorded: u32,
    },
    /// Other nodes use another number of partitions.
    #[error(
        "cluster.partitions is {configured}, but the cluster on this Redis uses {recorded}: this node \
         would look for rooms under other keys than the other nodes; set {recorded}"
    )]
    Partitions {
        /// The number configured on this node.
        configured: u16,
        /// The number that the first node recorded.
        recorded: u16,
    },
}
