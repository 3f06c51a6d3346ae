//! What bus and hub know of this node's own state, one telling the other: whether it may pass
//! entries on and answer joins, and which of its own publishes it has seen come back.

use std::{collections::BTreeSet, time::SystemTime};

use parking_lot::Mutex;
use shared::{ids::RoomId, protocol::server_frame::BusState};
use tokio::{sync::watch, time::Instant};

use super::{home::home_of, tail::Tail};
use crate::delivery::Entry;

/// The state of one node. The bus writes it, the hub asks; a bus without others to agree with
/// leaves it as it is.
#[derive(Debug, Default)]
pub struct Standing {
    state: Mutex<State>,
    tail: Tail,
    told: watch::Sender<Told>,
    regained: watch::Sender<()>,
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
    /// How many homes there are.
    homes: u16,
    /// Those for which the nodes have to agree on a server first.
    unsettled: BTreeSet<u16>,
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

    /// Whether joins of a room may be answered and messages published now.
    pub fn serves(&self, now: Instant, room: &RoomId) -> bool {
        let state = self.state.lock();
        state.holds(now) && !state.unsettled.contains(&home_of(room, state.homes))
    }

    /// Lets this node stand until `until`.
    pub fn extend(&self, until: Instant) {
        self.state.lock().until = Until::Instant(until);
    }

    /// Tells that this node stands again.
    pub fn regain(&self) {
        self.regained.send_replace(());
    }

    /// Changes whenever this node stands again.
    pub fn regained(&self) -> watch::Receiver<()> {
        self.regained.subscribe()
    }

    /// Takes this node's standing away, until it is extended.
    pub fn suspend(&self) {
        self.state.lock().until = Until::Never;
    }

    /// There are so many homes, and the nodes have to agree on a server for each.
    pub fn unsettle(&self, homes: u16) {
        let state = &mut *self.state.lock();
        state.homes = homes;
        state.unsettled = (0..homes).collect();
    }

    /// Notes whether the nodes have agreed on a server for some homes.
    pub fn settle(&self, homes: impl IntoIterator<Item = u16>, settled: bool) {
        let unsettled = &mut self.state.lock().unsettled;
        for home in homes {
            if settled {
                unsettled.remove(&home);
            } else {
                unsettled.insert(home);
            }
        }
    }

    /// An entry was passed on here.
    pub fn seen(&self, entry: &Entry) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::ConfirmedBySequence,
        ) {
            self.tail.seen_at(entry.position.seq);
        }
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
