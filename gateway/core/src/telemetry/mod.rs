//! Log lines, metrics, message trails and traces.

mod legacy;
mod log;
pub mod metrics;
pub mod log_limiter;
mod period_count;
pub mod top;
pub mod trail;
pub mod traces;

pub use log::{LogFormat, LogLevelError, set_log_level, start_log};
