//! The tasks of a node, and their orderly end.
//!
//! Every task of the gateway is spawned through [`Tasks`], so that the stop waits for all of them;
//! upgraded sockets in particular are not part of any HTTP server's graceful shutdown. A stop has
//! three steps. `leaving` asks connections to close while hub and bus still work, so that queued
//! frames are sent; `stopped` ends the services; `ended` ends the listeners, which answer 503 until
//! then.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::Instrument as _;

pub mod schedule;
pub mod supervision;
pub mod targets;

use supervision::{FailureCause, Failures, TaskFailure, catch_panic};

/// The time for the last responses of the listeners after everything else has ended.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(5);

/// The tasks of a node, in three groups that end one after the other.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    connections: TaskTracker,
    services: TaskTracker,
    listeners: TaskTracker,
    leaving: CancellationToken,
    stopped: CancellationToken,
    ended: CancellationToken,
    failures: Failures,
    wrapper: TaskWrapper,
}

/// A task as [`Tasks::wrapped`] receives it.
pub type BoxedTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A function around every task, if there is one.
#[derive(Clone, Default)]
struct TaskWrapper(Option<Arc<dyn Fn(BoxedTask) -> BoxedTask + Send + Sync>>);

impl fmt::Debug for TaskWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TaskWrapper").field(&self.0.is_some()).finish()
    }
}

impl Tasks {
    /// Tasks that run inside of `wrapper`: a simulation freezes and kills a node with it.
    pub fn wrapped(wrapper: impl Fn(BoxedTask) -> BoxedTask + Send + Sync + 'static) -> Self {
        Self { wrapper: TaskWrapper(Some(Arc::new(wrapper))), ..Self::default() }
    }

    /// Spawns a task that serves one client and ends by itself after [`Tasks::leaving`]. A panic
    /// ends only that task, and its message goes to `panicked`.
    pub fn spawn_connection(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
        panicked: impl FnOnce(&str) + Send + 'static,
    ) {
        self.contain(&self.connections, future, panicked);
    }

    fn contain(
        &self,
        group: &TaskTracker,
        future: impl Future<Output = ()> + Send + 'static,
        panicked: impl FnOnce(&str) + Send + 'static,
    ) {
        // In this form the future does not grow.
        let contained = catch_panic(future).map(|ended| {
            if let Err(panic) = ended {
                panicked(&panic);
            }
        });
        self.spawn(group, contained);
    }

    /// Spawns a task that others rely on; it ends after [`Tasks::stopped`]. If it ends earlier, it
    /// has [failed](Tasks::failed).
    pub fn spawn_service(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        let (leaving, stopped) = (self.leaving.clone(), self.stopped.clone());
        self.supervise(name, future, move || leaving.is_cancelled() || stopped.is_cancelled());
    }

    /// Spawns a task that others rely on and that ends when its work is done. A panic is a
    /// [failure](Tasks::failed) of the node.
    pub fn spawn_job(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        self.supervise(name, future, || true);
    }

    fn supervise(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
        may_end: impl FnOnce() -> bool + Send + 'static,
    ) {
        let failures = self.failures.clone();
        let supervised = catch_panic(future).map(move |ended| match ended {
            Ok(()) if may_end() => {}
            Ok(()) => failures.note(name, FailureCause::Ended),
            Err(panic) => failures.note(name, FailureCause::Panicked(panic)),
        });
        let span = tracing::info_span!("task", task = name);
        self.spawn(&self.services, supervised.instrument(span));
    }

    /// Reports the failure of work that others rely on and that is not a task of this group.
    pub fn fail(&self, name: &'static str, panic: String) {
        self.failures.note(name, FailureCause::Panicked(panic));
    }

    /// Waits until a service has failed, after which the process must end. Cancel-safe.
    pub async fn failed(&self) -> TaskFailure {
        self.failures.wait().await
    }

    /// The first failure, if there was one.
    pub fn failure(&self) -> Option<TaskFailure> {
        self.failures.first()
    }

    /// Spawns a task that answers HTTP requests; it ends after [`Tasks::ended`]. A panic ends only
    /// that task, and its message goes to `panicked`.
    pub fn spawn_listener(
        &self,
        future: impl Future<Output = ()> + Send + 'static,
        panicked: impl FnOnce(&str) + Send + 'static,
    ) {
        self.contain(&self.listeners, future, panicked);
    }

    /// Counts a request as a connection until the token is dropped, so that the services it needs
    /// stay up.
    pub fn hold(&self) -> TaskTrackerToken {
        self.connections.token()
    }

    fn spawn(&self, group: &TaskTracker, future: impl Future<Output = ()> + Send + 'static) {
        match &self.wrapper.0 {
            None => group.spawn(future),
            Some(wrapper) => group.spawn(wrapper(Box::pin(future))),
        };
    }

    /// The same groups, with services that can be ended separately by cancelling the child's
    /// [`Tasks::stopped`].
    pub fn child(&self) -> Self {
        Self { stopped: self.stopped.child_token(), ..self.clone() }
    }

    /// Cancelled when the node accepts no more clients and disconnects the present ones.
    pub fn leaving(&self) -> &CancellationToken {
        &self.leaving
    }

    /// Cancelled when the last client has disconnected.
    pub fn stopped(&self) -> &CancellationToken {
        &self.stopped
    }

    /// Cancelled when all services have ended.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Disconnects clients, within `max`, and ends nothing else.
    pub async fn leave(&self, max: Duration) {
        self.leaving.cancel();
        self.connections.close();
        let _ = tokio::time::timeout(max, self.connections.wait()).await;
    }

    /// Ends everything in order, each step within `step_max`. Returns whether all tasks ended.
    pub async fn finish(&self, step_max: Duration) -> bool {
        self.leaving.cancel();
        self.connections.close();
        let connections = tokio::time::timeout(step_max, self.connections.wait()).await;
        if connections.is_err() {
            tracing::warn!(remaining = self.connections.len(), "connections did not end in time");
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `service`, and returns the failure once everything has ended.
    async fn failure_of(service: impl FnOnce(&Tasks)) -> Option<TaskFailure> {
        let tasks = Tasks::default();
        service(&tasks);
        tokio::task::yield_now().await;
        assert!(tasks.finish(Duration::from_secs(1)).await);
        tasks.failure()
    }

    #[tokio::test]
    async fn service_that_panics_or_returns_early_has_failed() {
        let panics =
            failure_of(|tasks| tasks.spawn_service("a", async { panic!("no more") })).await;
        let failure = panics.unwrap();
        assert_eq!(failure.task, "a");
        assert!(failure.to_string().starts_with("task a panicked: no more"), "{failure}");
        let ended = failure_of(|tasks| tasks.spawn_service("b", async {})).await;
        assert_eq!(ended, Some(TaskFailure { task: "b", cause: FailureCause::Ended }));
        let job = failure_of(|tasks| tasks.spawn_job("c", async { panic!("no more") })).await;
        assert_eq!(job.unwrap().task, "c");
    }

    #[tokio::test]
    async fn stopped_services_and_finished_jobs_have_not_failed() {
        let stopped = failure_of(|tasks| {
            let stopped = tasks.stopped().clone();
            tasks.spawn_service("a", async move { stopped.cancelled().await });
            let child = tasks.child();
            let of_child = child.stopped().clone();
            child.spawn_service("b", async move { of_child.cancelled().await });
            child.stopped().cancel();
            tasks.spawn_job("c", async {});
        });
        assert_eq!(stopped.await, None);
    }

    #[tokio::test]
    async fn panicking_connection_ends_alone() {
        let (told, panics) = tokio::sync::oneshot::channel();
        let failure = failure_of(|tasks| {
            let told = |panic: &str| drop(told.send(panic.to_owned()));
            tasks.spawn_connection(async { panic!("no more") }, told);
        });
        assert_eq!(failure.await, None);
        assert!(panics.await.unwrap().starts_with("no more"));
    }
}
