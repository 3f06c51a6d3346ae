//! One connection: the handle by which hub and session know it, and the queue of its frames.

pub mod handle;
pub mod outbox;
