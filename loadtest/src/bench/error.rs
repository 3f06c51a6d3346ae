//! Errors of the bench.

use std::io;

use super::client::ClientError;
use crate::{procfs::ProcfsError, scenario::ScenarioError};

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// A server cannot be started.
    #[error("{program}: {source}")]
    Start { program: String, source: io::Error },
    /// A server does not become ready.
    #[error("{program} is not ready: {log}")]
    NotReady { program: String, log: String },
    /// No directory for logs is available.
    #[error("cannot create a directory for logs: {0}")]
    Scratch(#[source] io::Error),
    /// A connection of the load failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Redis did not answer as expected.
    #[error("Redis: {0}")]
    Redis(#[from] io::Error),
    /// The usage of a process cannot be read.
    #[error(transparent)]
    Cost(#[from] ProcfsError),
    /// Connections cannot be opened.
    #[error(transparent)]
    Connect(#[from] ScenarioError),
    /// The result cannot be written.
    #[error("{path}: {source}")]
    Json { path: String, source: io::Error },
}
