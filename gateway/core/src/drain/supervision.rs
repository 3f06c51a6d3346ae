//! Detects tasks that end although nothing stopped them.
//!
//! A node without one of its services looks alive and does only part of its work: half of the rooms
//! without a shard, or a bus that receives nothing. Such a node is worse than none, since its
//! clients stay. The first service failure therefore ends the process, and its supervisor starts
//! another.

use std::{
    any::Any, cell::RefCell, fmt, future::Future, panic::AssertUnwindSafe, panic::PanicHookInfo,
};

use futures_util::FutureExt as _;
use tokio::sync::watch;

use crate::telemetry::log_limiter::LogLimiter;

/// The failure of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFailure {
    /// The name of the task.
    pub task: &'static str,
    /// The cause of the failure.
    pub cause: FailureCause,
}

/// The cause of a service's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailureCause {
    /// A panic, with its message and location.
    Panicked(String),
    /// It returned, although nothing stopped it.
    Ended,
}

impl fmt::Display for TaskFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { task, cause } = self;
        match cause {
            FailureCause::Panicked(panic) => write!(f, "task {task} panicked: {panic}"),
            FailureCause::Ended => write!(f, "task {task} ended although nothing stopped it"),
        }
    }
}

/// The first service failure, if there was one.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures(watch::Sender<Option<TaskFailure>>);

impl Failures {
    /// Logs a failure, and keeps the first one.
    pub(super) fn note(&self, task: &'static str, cause: FailureCause) {
        let failure = TaskFailure { task, cause };
        tracing::error!(task, %failure, "a service failed: the process must end");
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(failure);
            is_first
        });
    }

    pub(super) fn first(&self) -> Option<TaskFailure> {
        self.0.borrow().clone()
    }

    /// Waits for the first failure. Cancel-safe.
    pub(super) async fn wait(&self) -> TaskFailure {
        let mut first = self.0.subscribe();
        // The sender lives as long as `self`.
        let failed = first.wait_for(Option::is_some).await.ok().and_then(|first| first.clone());
        match failed {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

/// The output of a future, or the message of the panic that ended it.
///
/// State that the future shares with others must not be left half-changed by a panic: locks are not
/// poisoned here, and are released as they are.
pub fn catch_panic<T>(future: impl Future<Output = T>) -> impl Future<Output = Result<T, String>> {
    AssertUnwindSafe(future).catch_unwind().map(|output| output.map_err(|panic| text_of(&*panic)))
}

/// As [`catch_panic`], for a call.
///
/// # Errors
///
/// The message of the panic.
pub fn catch_panic_sync<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(call)).map_err(|panic| text_of(&*panic))
}

thread_local! {
    /// The location of this thread's last panic, from the hook to the code that catches it.
    static LOCATION: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let message = message_of(panic);
    match LOCATION.take() {
        Some(location) => format!("{message} ({location})"),
        None => message.to_owned(),
    }
}

/// Logs panics like other events, with their locations, at most once a minute, since a client that
/// can cause a panic may repeat it. The code that catches a panic logs what it ended.
pub fn log_panics() {
    static LIMITER: LogLimiter = LogLimiter::new();
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        if let Some(suppressed) = LIMITER.should_log() {
            let message = message_of(info.payload());
            tracing::error!(%location, message, suppressed, "panic");
        }
        LOCATION.set(Some(location));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_is_caught_with_its_message() {
        let never: Result<(), _> = catch_panic(async { panic!("no {}", "more") }).await;
        assert!(never.unwrap_err().starts_with("no more"));
        assert_eq!(catch_panic(async { 7 }).await, Ok(7));
        assert!(catch_panic_sync(|| panic!("no more")).map(|(): ()| ()).is_err());
    }

    #[tokio::test]
    async fn first_failure_is_kept() {
        let failures = Failures::default();
        assert_eq!(failures.first(), None);
        failures.note("a", FailureCause::Ended);
        failures.note("b", FailureCause::Panicked("no more".to_owned()));
        let first = failures.wait().await;
        assert_eq!(first, TaskFailure { task: "a", cause: FailureCause::Ended });
        assert_eq!(first.to_string(), "task a ended although nothing stopped it");
    }
}
