//! The gate that all tasks of a gateway pass at each step: a frozen gateway does nothing until it
//! goes on, and a killed one nothing ever again.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use gateway::drain::Task;
use parking_lot::Mutex;

/// The gate of one process. Cheap to clone.
#[derive(Clone, Default)]
pub struct Gate(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    way: Way,
    tasks: u64,
    /// Who is to be woken when the way changes: every task, by its number.
    wakers: BTreeMap<u64, Waker>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Way {
    #[default]
    Open,
    Frozen,
    Killed,
}

impl Gate {
    /// `task`, behind this gate.
    pub fn hold(&self, task: Task) -> Task {
        let mut state = self.0.lock();
        state.tasks += 1;
        Box::pin(Held { gate: self.clone(), number: state.tasks, task: Some(task) })
    }

    pub fn freeze(&self) {
        self.turn(Way::Frozen);
    }

    pub fn thaw(&self) {
        self.turn(Way::Open);
    }

    /// Drops every task at its next step, which comes at once.
    pub fn kill(&self) {
        self.turn(Way::Killed);
    }

    pub fn is_frozen(&self) -> bool {
        self.0.lock().way == Way::Frozen
    }

    fn turn(&self, way: Way) {
        let mut state = self.0.lock();
        if state.way == Way::Killed {
            return;
        }
        state.way = way;
        if way != Way::Frozen {
            state.wakers.values().for_each(Waker::wake_by_ref);
        }
    }
}

struct Held {
    gate: Gate,
    number: u64,
    task: Option<Task>,
}

impl Future for Held {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let way = {
            let number = self.number;
            let mut state = self.gate.0.lock();
            state.wakers.insert(number, context.waker().clone());
            state.way
        };
        match (way, &mut self.task) {
            (Way::Frozen, Some(_)) => return Poll::Pending,
            (Way::Open, Some(task)) => {
                if task.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
            }
            (Way::Killed, _) | (_, None) => {}
        }
        // Dropped here, outside of the lock: what it held may wake others.
        self.task = None;
        Poll::Ready(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gate.0.lock().wakers.remove(&self.number);
    }
}
