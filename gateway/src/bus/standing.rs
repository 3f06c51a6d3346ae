//! What bus and hub know of this node's own state, one telling the other: whether it may pass
//! entries on and answer joins, and which of its own publishes it has seen come back.

use std::time::SystemTime;

use parking_lot::Mutex;
use shared::protocol::answer::BusState;
use tokio::{sync::watch, time::Instant};

use super::tail::Tail;
use crate::delivery::Entry;

/// The state of one node. The bus writes it, the hub asks; a bus without others to agree with
/// leaves it as it is.
#[derive(Debug, Default)]
pub struct Standing {
    state: Mutex<State>,
    tail: Tail,
    told: watch::Sender<Told>,
}

/// What clients are told of the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Up or down.
    pub bus: BusState,
    /// Since when; `None` from the start.
    pub since: Option<SystemTime>,
}

#[derive(Debug, Default)]
struct State {
    until: Until,
    /// The nodes have to agree on a server first.
    unsettled: bool,
}

/// Until when the others count on this node.
#[derive(Debug, Default)]
enum Until {
    #[default]
    Always,
    Instant(Instant),
    Never,
}

impl Standing {
    /// Whether entries may be passed on now. A node that was frozen finds here that the others may
    /// have gone on without it.
    pub fn holds(&self, now: Instant) -> bool {
        self.state.lock().holds(now)
    }

    /// Whether joins may be answered and messages published now.
    pub fn serves(&self, now: Instant) -> bool {
        let state = self.state.lock();
        state.holds(now) && !state.unsettled
    }

    /// Lets this node stand until `until`.
    pub fn extend(&self, until: Instant) {
        self.state.lock().until = Until::Instant(until);
    }

    /// Takes this node's standing away, until it is extended.
    pub fn suspend(&self) {
        self.state.lock().until = Until::Never;
    }

    /// Notes whether the nodes have agreed on a server.
    pub fn settle(&self, settled: bool) {
        self.state.lock().unsettled = !settled;
    }

    /// An entry was passed on here.
    pub fn seen(&self, entry: &Entry) {
        self.tail.seen(&entry.envelope.id_key());
    }

    /// Tells clients of the bus.
    pub fn tell(&self, told: Told) {
        self.told.send_replace(told);
    }

    /// What clients are told of the bus.
    pub fn told(&self) -> watch::Receiver<Told> {
        self.told.subscribe()
    }

    /// This node's publishes that have not come by yet.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }
}

impl State {
    fn holds(&self, now: Instant) -> bool {
        match self.until {
            Until::Always => true,
            Until::Instant(until) => now < until,
            Until::Never => false,
        }
    }
}
