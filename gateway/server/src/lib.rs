//! The Skein gateway: holds WebSocket connections and fans messages across servers.
//!
//! This package is the shell around `skein-core`: [`transport`] reads and writes sockets, [`http`]
//! serves handshakes, event streams, the server API and pages, [`cluster`] knows the other nodes,
//! [`rebalance`] moves connections to them, [`config`] checks the options, [`otlp`] exports traces,
//! and [`server`] builds and ends all parts in order.

pub mod transport;
pub mod http;
pub mod cluster;
pub mod rebalance;
pub mod config;
pub mod otlp;
pub mod reload;
pub mod server;
pub mod version;
