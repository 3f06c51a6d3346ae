//! Who is running, and how all of it ends.
//!
//! Every task of the gateway is spawned through [`Tasks`], so that none is forgotten at the end:
//! upgraded sockets in particular are no part of any HTTP server's graceful shutdown. A stop has
//! three steps. `leaving` tells connections to say goodbye while hub and bus still work, so that
//! what is queued gets out; `stopped` ends the services; `ended` ends the listeners, which answer
//! 503 until then.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::Instrument as _;

pub mod departure;

/// How long the listeners' last answers may take once everything else has ended.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(5);

/// The tasks of a gateway, in three groups that end one after the other.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    connections: TaskTracker,
    services: TaskTracker,
    listeners: TaskTracker,
    leaving: CancellationToken,
    stopped: CancellationToken,
    ended: CancellationToken,
    around: Around,
}

/// A task, as [`Tasks::within`] has it.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What stands around every task, where something does.
#[derive(Clone, Default)]
struct Around(Option<Arc<dyn Fn(Task) -> Task + Send + Sync>>);

impl fmt::Debug for Around {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Around").field(&self.0.is_some()).finish()
    }
}

impl Tasks {
    /// Tasks that each run within what `around` makes of them: a simulation freezes and kills a
    /// gateway so.
    pub fn within(around: impl Fn(Task) -> Task + Send + Sync + 'static) -> Self {
        Self { around: Around(Some(Arc::new(around))), ..Self::default() }
    }

    /// Spawns a task that serves one client and ends by itself after [`Tasks::leaving`].
    pub fn spawn_connection(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.spawn(&self.connections, future);
    }

    /// Spawns a task that others rely on; it ends after [`Tasks::stopped`].
    pub fn spawn_service(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        let span = tracing::info_span!("task", task = name);
        self.spawn(&self.services, future.instrument(span));
    }

    /// Spawns a task that answers HTTP requests; it ends after [`Tasks::ended`].
    pub fn spawn_listener(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.spawn(&self.listeners, future);
    }

    /// Counts a request as a connection until the token is dropped: the services it needs do not
    /// end before.
    pub fn hold(&self) -> TaskTrackerToken {
        self.connections.token()
    }

    fn spawn(&self, group: &TaskTracker, future: impl Future<Output = ()> + Send + 'static) {
        match &self.around.0 {
            None => group.spawn(future),
            Some(around) => group.spawn(around(Box::pin(future))),
        };
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

    /// Cancelled when all services have ended.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
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
        self.ended.cancel();
        self.listeners.close();
        let listeners = tokio::time::timeout(LAST_ANSWERS_MAX, self.listeners.wait()).await;
        connections.is_ok() && services.is_ok() && listeners.is_ok()
    }
}
