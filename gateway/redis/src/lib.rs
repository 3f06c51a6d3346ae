//! The bus of a cluster: logs in Redis, whose pub/sub delivers their entries to the nodes.
//!
//! A node has four kinds of connections to a server. `appender` sends publishes, pipelined on one
//! connection. `subscriber` receives what is published in the subscribed rooms. Reads use a pool
//! (`log`). The first two reconnect in loops of their own, for ever: a library that reconnects
//! below them would hide that messages were missed. `agreement` has a connection for what the
//! nodes do before they use a server. `bus` implements the traits of the bus on all of them.
//!
//! In a Redis Cluster there is one such set of connections per primary, and `router` knows which
//! primary serves a room.

mod bus;
mod options;
mod agreement;
mod appender;
mod archiver;
mod floors;
mod canary;
mod requirements;
mod error;
mod retry;
mod restore;
mod keyspace;
mod lease;
mod links;
mod log;
mod memory;
mod nodes;
mod ephemeral;
mod commands;
mod probe;
mod store;
mod router;
mod server;
mod server_report;
mod sessions;
mod status;
mod subscriber;
pub mod topology;
mod untrusted;
mod append_queue;

/// The newest schema of stored data that this version reads. Nodes announce it.
pub const SCHEMA: u32 = 1;

pub use bus::RedisBus;
pub use options::{LEASE, RedisOptions, RedisStartError};
