//! The Skein gateway: holds WebSocket connections and delivers the messages of rooms across nodes.
//!
//! A room is a log, a connection is a cursor into it. Publishing appends an entry; a gateway that has
//! members in a room subscribes to its log. Resume, catch-up and repair are one operation: continue
//! from `(epoch, seq)`.
//!
//! The path of a message on one node: [`transport`] reads it from the sender's socket, [`session`]
//! parses and checks it, [`publisher`] packs it, [`bus`] appends it to the room's log and publishes it
//! to every subscribed node, [`hub`] restores the order and queues it for the room's members, and
//! [`outbox`] writes it to their sockets. `ARCHITECTURE.md` follows it through a cluster as well.
//!
//! Modules are listed by layer, lowest first; each uses only those before it in this list, and
//! `shared`.

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
