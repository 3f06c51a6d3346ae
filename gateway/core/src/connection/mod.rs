//! One connection: the handle by which hub and session know it, the queue of its frames, and the
//! signals to its task.

pub mod handle;
pub mod outbox;
pub mod signals;
