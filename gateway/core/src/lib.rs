//! The core of the Skein gateway: logs, rooms, presence and sessions, without Redis and HTTP.
//!
//! A room is a log, a connection is a cursor into it. Publishing appends; a node that has members
//! in a room subscribes to its log; resuming, catching up and repairing are one operation,
//! *continue from `(epoch, seq)`*.
//!
//! Modules are listed lowest first.

#[cfg(debug_assertions)]
pub mod fault_injection;
pub mod telemetry;
pub mod drain;
pub mod envelope;
pub mod limits;
pub mod delivery;
pub mod archive;
pub mod bus;
pub mod history;
pub mod rooms;
pub mod presence;
pub mod publisher;
pub mod connection;
pub mod hub;
pub mod control;
pub mod session;
