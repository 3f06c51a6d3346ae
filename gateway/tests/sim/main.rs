//! The whole of a cluster in one process, under a clock that stands still: gateways, Redis, clients
//! and what goes wrong between them, all decided by a seed.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]
#![allow(unreachable_pub, reason = "nothing of a test is reached from outside")]

mod resp;
mod store;
mod commands;
mod script;
mod redis;
mod against_redis;
