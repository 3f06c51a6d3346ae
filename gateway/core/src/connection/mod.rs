//! One connection: the handle by which hub and session know it, the queue of its frames and their
//! encoding, and the signals to its task.

pub mod encoding;
pub mod handle;
pub mod outbox;
pub mod signals;
