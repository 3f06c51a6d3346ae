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
    renewed: Option<Instant>,
    /// How often it was lost, and not counted yet.
    lost: u64,
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

    /// Extends the lease, renewed at `renewed`, until `until`.
    pub fn extend_lease(&self, renewed: Instant, until: Instant) {
        let lease = &mut *self.lease.lock();
        lease.note_expiry(renewed);
        (lease.expiry, lease.renewed) = (LeaseExpiry::Instant(until), Some(renewed));
    }

    /// When the lease was last renewed; `None` if it never was.
    pub fn lease_renewed(&self) -> Option<Instant> {
        self.lease.lock().renewed
    }

    /// How often the lease was lost since the last call: it expired, or was dropped while it was
    /// held.
    pub fn take_leases_lost(&self, now: Instant) -> u64 {
        let lease = &mut *self.lease.lock();
        lease.note_expiry(now);
        std::mem::take(&mut lease.lost)
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
        let lease = &mut *self.lease.lock();
        lease.lost += u64::from(matches!(lease.expiry, LeaseExpiry::Instant(_)));
        lease.expiry = LeaseExpiry::Never;
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
    /// Notes that the lease has expired by `now`, once.
    fn note_expiry(&mut self, now: Instant) {
        if let LeaseExpiry::Instant(until) = self.expiry
            && until <= now
        {
            (self.expiry, self.lost) = (LeaseExpiry::Never, self.lost + 1);
        }
    }

    fn holds(&self, now: Instant) -> bool {
        match self.expiry {
            LeaseExpiry::Always => true,
            LeaseExpiry::Instant(until) => now < until,
            LeaseExpiry::Never => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_lost_lease_is_counted_once_however_it_is_lost() {
        let (state, start) = (NodeState::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        state.drop_lease();
        assert_eq!(state.take_leases_lost(at(0)), 0, "it never had one");
        assert_eq!(state.lease_renewed(), None);
        state.extend_lease(at(0), at(10));
        state.extend_lease(at(3), at(13));
        assert_eq!((state.take_leases_lost(at(12)), state.lease_renewed()), (0, Some(at(3))));
        assert!(state.holds_lease(at(12)));
        // It expires, which is noticed before or after the next renewal.
        assert_eq!((state.take_leases_lost(at(13)), state.take_leases_lost(at(14))), (1, 0));
        state.extend_lease(at(20), at(30));
        state.extend_lease(at(31), at(41));
        assert_eq!((state.take_leases_lost(at(31)), state.holds_lease(at(31))), (1, true));
        // The node gives it up.
        state.drop_lease();
        state.drop_lease();
        assert_eq!(state.take_leases_lost(at(32)), 1);
    }
}
