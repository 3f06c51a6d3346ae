//! What the program `loadtest` judges and disturbs with, for tests in Rust.

pub mod clock;
pub mod checker;
pub mod proxy;
