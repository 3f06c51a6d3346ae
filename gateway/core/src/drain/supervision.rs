//! Notices tasks that end although nothing stopped them.
//!
//! A service that is gone leaves a node that looks alive and does part of its work: half of the rooms
//! without a shard, a bus that hears nothing. Such a node is worse than none, since its clients stay.
//! So the first service that fails is a reason to end the process; who supervises it starts another.

use std::{
    any::Any, cell::RefCell, fmt, future::Future, panic::AssertUnwindSafe, panic::PanicHookInfo,
};

use futures_util::FutureExt as _;
use tokio::sync::watch;

use crate::telemetry::log_limiter::LogLimiter;

/// A service that has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskFailure {
    /// The name of its task.
    pub task: &'static str,
    /// What it ended by.
    pub cause: FailureCause,
}

/// What a service ended by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FailureCause {
    /// A panic, with its message and place.
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

/// The first service that failed, if one has.
#[derive(Clone, Debug, Default)]
pub(super) struct Failures(watch::Sender<Option<TaskFailure>>);

impl Failures {
    /// Notes that a service has failed. The first one counts, and each is logged.
    pub(super) fn note(&self, task: &'static str, cause: FailureCause) {
        let failure = TaskFailure { task, cause };
        tracing::error!(task, %failure, "a service failed: this process has to end");
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
/// What the future shares with others must not be left half-done by a panic: locks are not poisoned
/// here, and are given back as they are.
pub fn catch_panic<T>(future: impl Future<Output = T>) -> impl Future<Output = Result<T, String>> {
    AssertUnwindSafe(future).catch_unwind().map(|output| output.map_err(|panic| text_of(&*panic)))
}

/// As [`catch_panic`], of a call.
///
/// # Errors
///
/// The message of the panic.
pub fn catch_panic_sync<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(AssertUnwindSafe(call)).map_err(|panic| text_of(&*panic))
}

thread_local! {
    /// Where this thread panicked last, between the hook and whoever catches it.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let message = message_of(panic);
    match PLACE.take() {
        Some(place) => format!("{message} ({place})"),
        None => message.to_owned(),
    }
}

/// Has panics logged as everything else is, with their places, at most once a minute: a client that
/// finds a way to cause one repeats it. What they ended is logged by who catches them.
pub fn log_panics() {
    static LIMITER: LogLimiter = LogLimiter::new();
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        if let Some(suppressed) = LIMITER.should_log() {
            let message = message_of(info.payload());
            tracing::error!(%place, message, suppressed, "a panic");
        }
        PLACE.set(Some(place));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_caught_with_its_message() {
        let never: Result<(), _> = catch_panic(async { panic!("no {}", "more") }).await;
        assert!(never.unwrap_err().starts_with("no more"));
        assert_eq!(catch_panic(async { 7 }).await, Ok(7));
        assert!(catch_panic_sync(|| panic!("no more")).map(|(): ()| ()).is_err());
    }

    #[tokio::test]
    async fn the_first_failure_counts() {
        let failures = Failures::default();
        assert_eq!(failures.first(), None);
        failures.note("a", FailureCause::Ended);
        failures.note("b", FailureCause::Panicked("no more".to_owned()));
        let first = failures.wait().await;
        assert_eq!(first, TaskFailure { task: "a", cause: FailureCause::Ended });
        assert_eq!(first.to_string(), "task a ended although nothing stopped it");
    }
}
