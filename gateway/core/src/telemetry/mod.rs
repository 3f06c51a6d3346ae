//! Log lines, metrics, message trails and traces.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

mod legacy;
pub mod metrics;
pub mod log_limiter;
pub mod top;
pub mod trail;
pub mod traces;

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people at a terminal.
    Text,
    /// One JSON object per line, for a log store.
    Json,
}

/// Starts the log on standard error, once per process.
///
/// `level` is a level (`info`) or directives of `tracing_subscriber::EnvFilter`
/// (`info,skein_redis=debug`); the configuration has checked it.
pub fn start_log(format: LogFormat, level: &str) {
    let filter = EnvFilter::new(level);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second call, as in tests, has no effect.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}
