//! Who is running, and how all of it ends.
//!
//! Every task of the gateway is spawned through [`Tasks`], so that none is forgotten at the end:
//! upgraded sockets in particular are no part of any HTTP server's graceful shutdown. A stop has
//! two steps. `leaving` tells connections to say goodbye while hub and bus still work, so that
//! what is queued gets out; `stopped` ends the rest.

use std::{future::Future, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// The tasks of a gateway, in two groups that end one after the other.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    connections: TaskTracker,
    services: TaskTracker,
    leaving: CancellationToken,
    stopped: CancellationToken,
}

impl Tasks {
    /// Spawns a task that serves one client and ends by itself after [`Tasks::leaving`].
    pub fn spawn_connection(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.connections.spawn(future);
    }

    /// Spawns a task that others rely on; it ends after [`Tasks::stopped`].
    pub fn spawn_service(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        self.services.spawn(future.instrument(tracing::info_span!("task", task = name)));
    }

    /// The same group of tasks, whose services can be ended apart from the others by cancelling
    /// what [`Tasks::stopped`] of it gives.
    pub fn part(&self) -> Self {
        Self { stopped: self.stopped.child_token(), ..self.clone() }
    }

    /// Cancelled when no new client is taken and the present ones are sent away.
    pub fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    /// Cancelled when the last client has gone.
    pub fn stopped(&self) -> &CancellationToken {
        &self.stopped
    }

    /// Ends everything in order, each step within `step_max`. Returns whether all tasks ended.
    pub async fn finish(&self, step_max: Duration) -> bool {
        self.leaving.cancel();
        self.connections.close();
        let connections = tokio::time::timeout(step_max, self.connections.wait()).await;
        if connections.is_err() {
            tracing::warn!(left = self.connections.len(), "connections did not end in time");
        }
        self.stopped.cancel();
        self.services.close();
        let services = tokio::time::timeout(step_max, self.services.wait()).await;
        connections.is_ok() && services.is_ok()
    }
}
