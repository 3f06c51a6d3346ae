//! The log of the process: its format, its level, and the node on every line.

use std::{
    io::{self, IsTerminal as _, Write},
    sync::OnceLock,
};

use skein_protocol::ids::NodeId;
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, fmt::MakeWriter, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people at a terminal.
    Text,
    /// One JSON object per line, for a log store.
    Json,
}

/// The filter of the process, once the log has started.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Starts the log on standard error, once per process. Every line has the field `node`.
///
/// `level` is a level (`info`) or directives of `tracing_subscriber::EnvFilter`
/// (`info,skein_redis=debug`); the configuration has checked it.
pub fn start_log(format: LogFormat, level: &str, node: &NodeId) {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(level));
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(io::stderr().is_terminal())
        .with_writer(NodeLog { format, node: node.clone() });
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // A second call, as in tests, has no effect.
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        let _ = FILTER.set(handle);
    }
}

/// The level of the log was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LogLevelError {
    /// The text is neither a level nor directives.
    #[error("not a level: {0}")]
    Invalid(#[from] tracing_subscriber::filter::ParseError),
    /// The log of this process was not started by [`start_log`].
    #[error("the log has not started")]
    NotStarted,
}

/// Changes the level of the log, from the next line on. `level` as for [`start_log`].
///
/// # Errors
///
/// [`LogLevelError`]; the level is then as before.
pub fn set_log_level(level: &str) -> Result<(), LogLevelError> {
    let filter: EnvFilter = EnvFilter::builder().parse(level)?;
    let handle = FILTER.get().ok_or(LogLevelError::NotStarted)?;
    handle.reload(filter).map_err(|_| LogLevelError::NotStarted)
}

/// Writes log lines to standard error, each with the name of the node at its end.
///
/// The field is added to the finished line: a span around everything, which `tracing` has for this,
/// would have to be entered by each of the tasks, whenever it runs.
#[derive(Clone, Debug)]
struct NodeLog {
    format: LogFormat,
    node: NodeId,
}

impl NodeLog {
    /// The line with the node. The formatter passes one whole line at a time.
    fn with_node(&self, line: &[u8]) -> Vec<u8> {
        let node = &self.node;
        let (line, end) = match self.format {
            LogFormat::Text => {
                (line.strip_suffix(b"\n").unwrap_or(line), format!(" node={node}\n"))
            }
            // A node id has no characters that JSON escapes.
            LogFormat::Json => {
                (line.strip_suffix(b"}\n").unwrap_or(line), format!(",\"node\":\"{node}\"}}\n"))
            }
        };
        [line, end.as_bytes()].concat()
    }
}

impl<'a> MakeWriter<'a> for NodeLog {
    type Writer = NodeLine<'a>;

    fn make_writer(&'a self) -> NodeLine<'a> {
        NodeLine(self)
    }
}

/// The writer of one line.
struct NodeLine<'a>(&'a NodeLog);

impl Write for NodeLine<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        io::stderr().lock().write_all(&self.0.with_node(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_names_the_node() {
        let node: NodeId = "n0".parse().unwrap();
        let of = |format, line: &str| {
            let log = NodeLog { format, node: node.clone() };
            String::from_utf8(log.with_node(line.as_bytes())).unwrap()
        };
        assert_eq!(of(LogFormat::Text, "INFO ready\n"), "INFO ready node=n0\n");
        let json = of(LogFormat::Json, "{\"level\":\"INFO\",\"message\":\"a}\\n\"}\n");
        assert_eq!(json, "{\"level\":\"INFO\",\"message\":\"a}\\n\",\"node\":\"n0\"}\n");
        assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok());
    }

    #[test]
    fn an_invalid_level_is_rejected() {
        assert!(matches!(set_log_level("info,=x="), Err(LogLevelError::Invalid(_))));
    }
}
