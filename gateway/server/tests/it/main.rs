//! Tests of the gateway from outside: through real sockets, a real redis-server, a real nginx and a
//! real browser.
//!
//! One binary, so that it links once. `harness` starts servers on free ports and stops them by pid;
//! every other module is named after its subject.

#![allow(clippy::disallowed_methods, reason = "a test's tasks end with its runtime")]
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]
#![allow(unreachable_pub, reason = "nothing of a test is reached from outside")]

mod harness;
mod servers;
mod handshake;
mod rfc;
mod chat;
mod presence;
mod managed;
mod metrics;
mod directs;
mod api;
mod api_clients;
mod sse;
mod auth;
mod command_line;
mod reload;
mod limits;
mod durable;
mod flood;
mod bus;
mod on_redis;
mod history;
mod hub;
mod cluster;
mod faults;
mod steady_traffic;
mod topology;
mod nginx;
mod proxies;
mod repair;
mod untrusted;
mod conditions;
mod agreement;
mod browser;
mod stop;
mod nodes;
mod traces;
mod logs;
mod deploy;
mod stacks;
mod operations;
#[cfg(debug_assertions)]
mod monitoring;
mod loadtest;
mod versions;
#[cfg(debug_assertions)]
mod injected;
mod hardening;
mod soak;
mod release;
mod docs;
mod tidy;
