//! Tests of the archive: one suite for SQLite and for a PostgreSQL that the tests start.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod bench;
mod conformance;
mod deployment;
mod postgres;
mod samples;
mod search;
mod server;
mod sqlite;
