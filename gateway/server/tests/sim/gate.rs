//! Runs all tasks of one gateway process: a frozen process does nothing until it is thawed, and
//! a killed one never runs again.
//!
//! Tasks are polled in rounds, in the order of their numbers. A runtime polls them in the order in
//! which they were woken, and some sources wake several tasks in an order that no seed decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use parking_lot::Mutex;
use skein_core::drain::BoxedTask;
use tokio::sync::oneshot;

/// One process. Cheap to clone.
#[derive(Clone)]
pub struct Gate(Arc<Mutex<GateState>>);

#[derive(Default)]
struct GateState {
    mode: RunMode,
    count: u64,
    tasks: BTreeMap<u64, GatedTask>,
    ready: BTreeSet<u64>,
    process: Option<Waker>,
}

struct GatedTask {
    task: BoxedTask,
    waker: Waker,
    _done: oneshot::Sender<()>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum RunMode {
    #[default]
    Open,
    Frozen,
    Killed,
}

impl Gate {
    /// Creates a running process.
    pub fn open() -> Self {
        let gate = Self(Arc::default());
        #[allow(clippy::disallowed_methods, reason = "it ends when it is killed")]
        tokio::spawn(TaskPoller(gate.0.clone()));
        gate
    }

    /// Runs `task` in this process. The returned task ends with it, and need not be awaited.
    pub fn hold(&self, task: BoxedTask) -> BoxedTask {
        let (done, ended) = oneshot::channel();
        let state = &mut *self.0.lock();
        state.count += 1;
        let number = state.count;
        let waker = Waker::from(Arc::new(TaskWaker { state: Arc::downgrade(&self.0), number }));
        if state.mode != RunMode::Killed {
            state.tasks.insert(number, GatedTask { task, waker, _done: done });
            state.schedule(number);
        }
        Box::pin(async {
            let _ = ended.await;
        })
    }

    pub fn freeze(&self) {
        self.set_mode(RunMode::Frozen);
    }

    pub fn thaw(&self) {
        self.set_mode(RunMode::Open);
    }

    pub fn kill(&self) {
        self.set_mode(RunMode::Killed);
    }

    /// Drops all tasks: each holds the gate that runs it, so that nothing else would end them.
    pub fn end(&self) {
        self.kill();
        // Dropped outside of the lock: their contents may wake others.
        let tasks = std::mem::take(&mut self.0.lock().tasks);
        drop(tasks);
    }

    pub fn is_frozen(&self) -> bool {
        self.0.lock().mode == RunMode::Frozen
    }

    fn set_mode(&self, way: RunMode) {
        let mut state = self.0.lock();
        if state.mode != RunMode::Killed {
            state.mode = way;
            state.wake();
        }
    }
}

impl GateState {
    fn schedule(&mut self, number: u64) {
        self.ready.insert(number);
        self.wake();
    }

    fn wake(&self) {
        if let Some(process) = &self.process {
            process.wake_by_ref();
        }
    }
}

/// Schedules a task for the next round.
struct TaskWaker {
    state: std::sync::Weak<Mutex<GateState>>,
    number: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if let Some(state) = self.state.upgrade() {
            state.lock().schedule(self.number);
        }
    }
}

/// Polls the tasks.
struct TaskPoller(Arc<Mutex<GateState>>);

impl Future for TaskPoller {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let (way, round) = {
            let mut state = self.0.lock();
            state.process = Some(context.waker().clone());
            let round = match state.mode {
                RunMode::Open => std::mem::take(&mut state.ready),
                RunMode::Frozen | RunMode::Killed => BTreeSet::new(),
            };
            (state.mode, round)
        };
        if way == RunMode::Killed {
            // Dropped outside of the lock: their contents may wake others.
            let tasks = std::mem::take(&mut self.0.lock().tasks);
            drop(tasks);
            return Poll::Ready(());
        }
        for number in round {
            let Some(mut running) = self.0.lock().tasks.remove(&number) else { continue };
            let waker = running.waker.clone();
            if running.task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.0.lock().tasks.insert(number, running);
            }
        }
        Poll::Pending
    }
}
