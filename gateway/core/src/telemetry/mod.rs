//! What the gateway tells its operator: log lines, and [`metrics`].

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

mod legacy;
pub mod metrics;
pub mod log_limiter;
pub mod trail;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people at a terminal.
    Text,
    /// One JSON object a line, for a log store.
    Json,
}

/// Starts writing log lines to standard error, once per process.
///
/// `level` is a level (`info`) or directives as of `tracing_subscriber::EnvFilter`
/// (`info,skein_redis=debug`); the configuration has checked that it reads.
pub fn start_log(format: LogFormat, level: &str) {
    let filter = EnvFilter::new(level);
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second call, as tests make it, changes nothing.
    let _ = match format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}
