//! What all tasks of one gateway process run in: a frozen process does nothing until it goes on, and
//! a killed one nothing ever again.
//!
//! Tasks are polled in rounds, in the order of their numbers. A runtime polls in the order of their
//! being woken, and some of what wakes several does so in an order that no seed decides.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
};

use gateway::drain::Task;
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// One process. Cheap to clone.
#[derive(Clone)]
pub struct Gate(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    way: Way,
    count: u64,
    tasks: BTreeMap<u64, Running>,
    ready: BTreeSet<u64>,
    process: Option<Waker>,
}

struct Running {
    task: Task,
    waker: Waker,
    _done: oneshot::Sender<()>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Way {
    #[default]
    Open,
    Frozen,
    Killed,
}

impl Gate {
    /// A process that runs.
    pub fn open() -> Self {
        let gate = Self(Arc::default());
        #[allow(clippy::disallowed_methods, reason = "it ends when it is killed")]
        tokio::spawn(Process(gate.0.clone()));
        gate
    }

    /// Runs `task` in this process. What is returned ends with it, and need not be waited for.
    pub fn hold(&self, task: Task) -> Task {
        let (done, ended) = oneshot::channel();
        let state = &mut *self.0.lock();
        state.count += 1;
        let number = state.count;
        let waker = Waker::from(Arc::new(Call { state: Arc::downgrade(&self.0), number }));
        if state.way != Way::Killed {
            state.tasks.insert(number, Running { task, waker, _done: done });
            state.call(number);
        }
        Box::pin(async {
            let _ = ended.await;
        })
    }

    pub fn freeze(&self) {
        self.turn(Way::Frozen);
    }

    pub fn thaw(&self) {
        self.turn(Way::Open);
    }

    pub fn kill(&self) {
        self.turn(Way::Killed);
    }

    /// Drops all tasks: each holds the gate it goes through, so that nothing else would end them.
    pub fn end(&self) {
        self.kill();
        // Outside of the lock: what they hold may wake others.
        let tasks = std::mem::take(&mut self.0.lock().tasks);
        drop(tasks);
    }

    pub fn is_frozen(&self) -> bool {
        self.0.lock().way == Way::Frozen
    }

    fn turn(&self, way: Way) {
        let mut state = self.0.lock();
        if state.way != Way::Killed {
            state.way = way;
            state.wake();
        }
    }
}

impl State {
    fn call(&mut self, number: u64) {
        self.ready.insert(number);
        self.wake();
    }

    fn wake(&self) {
        if let Some(process) = &self.process {
            process.wake_by_ref();
        }
    }
}

/// Has a task polled in the next round.
struct Call {
    state: std::sync::Weak<Mutex<State>>,
    number: u64,
}

impl Wake for Call {
    fn wake(self: Arc<Self>) {
        if let Some(state) = self.state.upgrade() {
            state.lock().call(self.number);
        }
    }
}

/// Polls the tasks.
struct Process(Arc<Mutex<State>>);

impl Future for Process {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let (way, round) = {
            let mut state = self.0.lock();
            state.process = Some(context.waker().clone());
            let round = match state.way {
                Way::Open => std::mem::take(&mut state.ready),
                Way::Frozen | Way::Killed => BTreeSet::new(),
            };
            (state.way, round)
        };
        if way == Way::Killed {
            // Dropped outside of the lock: what they hold may wake others.
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
