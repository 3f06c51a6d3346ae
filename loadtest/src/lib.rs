//! Fault injection and delivery checking for tests in Rust: the parts of `loadtest` that the
//! gateway's tests use.

pub mod clock;
pub mod checker;
pub mod proxy;
