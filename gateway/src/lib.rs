//! The Skein gateway: holds WebSocket connections and fans messages across servers.
//!
//! One idea: a room is a log, a connection is a cursor into it. Publishing appends; a gateway that
//! has members in a room follows its log; resuming, catching up and repairing are one operation,
//! *go on from `(epoch, seq)`*.
//!
//! One message from socket to socket, in six files: [`transport`] takes it off the sender's socket,
//! [`session`] decides what it is, [`publisher`] packs it, [`bus`] appends it to the room's log and
//! passes it to every node that follows the room, [`hub`] puts it into order and into the outboxes
//! of the room's members, and [`outbox`] writes it to their sockets.
//!
//! Modules stand in layers, lowest first; each uses only those above it in this list, and `shared`.

#[cfg(debug_assertions)]
pub mod fault_injection;
pub mod telemetry;
pub mod drain;
pub mod limits;
pub mod outbox;
pub mod delivery;
pub mod bus;
pub mod rooms;
pub mod presence;
pub mod publisher;
pub mod hub;
pub mod control;
pub mod session;
pub mod transport;
pub mod http;
pub mod config;
pub mod server;
