//! What bus and hub know of this node's own state, one telling the other: whether it may pass
//! entries on and answer joins, and which of its own publishes it has seen come back.

use std::{collections::BTreeSet, time::SystemTime};

use parking_lot::Mutex;
use skein_protocol::{ids::RoomId, protocol::server_frame::BusState};
use tokio::{sync::watch, time::Instant};

use super::{placement::partition_of, unconfirmed::UnconfirmedPublishes};
use crate::delivery::Entry;

/// The state of one node. The bus writes it, the hub asks; a bus without others to agree with
/// leaves it as it is.
#[derive(Debug, Default)]
pub struct NodeState {
    lease: Mutex<Lease>,
    unconfirmed: UnconfirmedPublishes,
    status: watch::Sender<BusStatus>,
    lease_reacquired: watch::Sender<()>,
}

/// What clients are told of the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusStatus {
    /// Up or down.
    pub bus: BusState,
    /// Since when; `None` from the start.
    pub since: Option<SystemTime>,
}

#[derive(Debug, Default)]
struct Lease {
    expiry: LeaseExpiry,
    /// How many groups there are.
    groups: u16,
    /// Those for which the nodes have to agree on a server first.
    unagreed: BTreeSet<u16>,
}

/// Until when the others count on this node.
#[derive(Debug, Default)]
enum LeaseExpiry {
    #[default]
    Always,
    Instant(Instant),
    Never,
}

impl NodeState {
    /// Whether entries may be passed on now. A node that was frozen finds here that the others may
    /// have gone on without it.
    pub fn holds_lease(&self, now: Instant) -> bool {
        self.lease.lock().holds(now)
    }

    /// Whether joins of a room may be answered and messages published now.
    pub fn can_serve(&self, now: Instant, room: &RoomId) -> bool {
        let state = self.lease.lock();
        state.holds(now) && !state.unagreed.contains(&partition_of(room, state.groups))
    }

    /// Lets this node stand until `expiry`.
    pub fn extend_lease(&self, until: Instant) {
        self.lease.lock().expiry = LeaseExpiry::Instant(until);
    }

    /// Tells that this node stands again.
    pub fn notify_lease_reacquired(&self) {
        self.lease_reacquired.send_replace(());
    }

    /// Changes whenever this node stands again.
    pub fn lease_reacquired(&self) -> watch::Receiver<()> {
        self.lease_reacquired.subscribe()
    }

    /// Takes this node's standing away, until it is extended.
    pub fn drop_lease(&self) {
        self.lease.lock().expiry = LeaseExpiry::Never;
    }

    /// There are so many groups, and the nodes have to agree on a server for each.
    pub fn begin_agreement(&self, groups: u16) {
        let state = &mut *self.lease.lock();
        state.groups = groups;
        state.unagreed = (0..groups).collect();
    }

    /// Notes whether the nodes have agreed on a server for some groups.
    pub fn set_agreed(&self, groups: impl IntoIterator<Item = u16>, settled: bool) {
        let unsettled = &mut self.lease.lock().unagreed;
        for group in groups {
            if settled {
                unsettled.remove(&group);
            } else {
                unsettled.insert(group);
            }
        }
    }

    /// An entry was passed on here.
    pub fn confirm(&self, entry: &Entry) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::ConfirmedBySequence,
        ) {
            self.unconfirmed.confirm_seq(entry.position.seq);
        }
        self.unconfirmed.confirm(&entry.envelope.dedup_key());
    }

    /// Tells clients of the bus.
    pub fn set_status(&self, told: BusStatus) {
        self.status.send_replace(told);
    }

    /// What clients are told of the bus.
    pub fn status(&self) -> watch::Receiver<BusStatus> {
        self.status.subscribe()
    }

    /// This node's publishes that have not come by yet.
    pub fn unconfirmed(&self) -> &UnconfirmedPublishes {
        &self.unconfirmed
    }
}

impl Lease {
    fn holds(&self, now: Instant) -> bool {
        match self.expiry {
            LeaseExpiry::Always => true,
            LeaseExpiry::Instant(until) => now < until,
            LeaseExpiry::Never => false,
        }
    }
}
