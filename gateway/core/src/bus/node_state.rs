//! This node's own state, which bus and hub share: its lease, the placement groups with an agreed
//! Redis server, its unconfirmed publishes, and the bus status of clients.

use std::{collections::BTreeSet, time::SystemTime};

use parking_lot::Mutex;
use skein_protocol::{ids::RoomId, protocol::server_frame::BusState};
use tokio::{sync::watch, time::Instant};

use super::{placement::partition_of, unconfirmed::UnconfirmedPublishes};
use crate::delivery::Entry;

/// The state of one node. The bus writes it and the hub reads it. The bus of a single node leaves
/// it as it is: the node always holds the lease.
#[derive(Debug, Default)]
pub struct NodeState {
    lease: Mutex<Lease>,
    unconfirmed: UnconfirmedPublishes,
    status: watch::Sender<BusStatus>,
    lease_reacquired: watch::Sender<()>,
}

/// The status of the bus, as clients are notified of it.
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
    /// The number of placement groups.
    groups: u16,
    /// The groups without an agreed server.
    unagreed: BTreeSet<u16>,
}

/// When the lease of this node expires: until then the other nodes count on it.
#[derive(Debug, Default)]
enum LeaseExpiry {
    #[default]
    Always,
    Instant(Instant),
    Never,
}

impl NodeState {
    /// Whether this node may deliver entries now. A node that was frozen finds here that its lease
    /// has expired, and that the others may have continued without it.
    pub fn holds_lease(&self, now: Instant) -> bool {
        self.lease.lock().holds(now)
    }

    /// Whether the node may answer joins of a room and publish messages to it now.
    pub fn can_serve(&self, now: Instant, room: &RoomId) -> bool {
        let lease = self.lease.lock();
        lease.holds(now) && !lease.unagreed.contains(&partition_of(room, lease.groups))
    }

    /// Extends the lease until `until`.
    pub fn extend_lease(&self, until: Instant) {
        self.lease.lock().expiry = LeaseExpiry::Instant(until);
    }

    /// Notifies the receivers of [`NodeState::lease_reacquired`].
    pub fn notify_lease_reacquired(&self) {
        self.lease_reacquired.send_replace(());
    }

    /// Changes whenever this node has reacquired its lease.
    pub fn lease_reacquired(&self) -> watch::Receiver<()> {
        self.lease_reacquired.subscribe()
    }

    /// Gives up the lease until it is extended.
    pub fn drop_lease(&self) {
        self.lease.lock().expiry = LeaseExpiry::Never;
    }

    /// Sets the number of placement groups, none of which has an agreed server yet.
    pub fn begin_agreement(&self, groups: u16) {
        let lease = &mut *self.lease.lock();
        lease.groups = groups;
        lease.unagreed = (0..groups).collect();
    }

    /// Records whether the nodes have agreed on a server for some groups.
    pub fn set_agreed(&self, groups: impl IntoIterator<Item = u16>, agreed: bool) {
        let unagreed = &mut self.lease.lock().unagreed;
        for group in groups {
            if agreed {
                unagreed.remove(&group);
            } else {
                unagreed.insert(group);
            }
        }
    }

    /// Confirms this node's publish with the id of an entry that was delivered here.
    pub fn confirm(&self, entry: &Entry) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::ConfirmedBySequence,
        ) {
            self.unconfirmed.confirm_seq(entry.position.seq);
        }
        self.unconfirmed.confirm(&entry.envelope.dedup_key());
    }

    /// Sets the bus status that clients are notified of.
    pub fn set_status(&self, status: BusStatus) {
        self.status.send_replace(status);
    }

    /// The bus status that clients are notified of.
    pub fn status(&self) -> watch::Receiver<BusStatus> {
        self.status.subscribe()
    }

    /// This node's publishes that it has not received yet.
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
