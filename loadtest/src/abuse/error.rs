//! Errors of `loadtest abuse`.

use std::io;

use skein_testkit::servers::ServerError;
use tokio::task::JoinError;

use crate::scenario::ScenarioError;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AbuseError {
    /// An attack is not in the catalogue.
    #[error("{0}")]
    Unknown(String),
    /// The gateways or their Redis failed.
    #[error(transparent)]
    Cluster(#[from] ServerError),
    /// The legitimate clients failed.
    #[error(transparent)]
    Legitimate(#[from] ScenarioError),
    /// This machine cannot set up a slow link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The attacker's sockets failed.
    #[error("attacker: {0}")]
    Attacker(#[from] io::Error),
    /// The attacker's thread panicked.
    #[error("the attacker panicked")]
    Panic(#[from] JoinError),
}

/// Why the slow link cannot run on this machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// A command of iproute2 failed or does not exist.
    #[error(
        "a network namespace with `tbf` needs root, CAP_NET_ADMIN and iproute2: {command}: {output}"
    )]
    Command {
        /// The command.
        command: String,
        /// Its error.
        output: String,
    },
}
