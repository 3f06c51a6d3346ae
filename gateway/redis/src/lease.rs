//! The timings of leases. All follow from one option, so that no combination contradicts itself.

use std::time::Duration;

/// How long the other nodes count on a process that has renewed its lease, and what follows from
/// that. The same on all nodes: a node waits for the others' leases as long as its own lasts.
#[derive(Clone, Copy, Debug)]
pub(super) struct LeaseTimes {
    /// How long a lease lasts.
    pub(super) duration: Duration,
    /// How often a process renews its lease: two renewals may fail.
    pub(super) renew_every: Duration,
    /// How long before the end of its lease a process suspends delivery: clocks are not exact, and
    /// answers take time.
    pub(super) margin: Duration,
    /// How long a server that no node remembers waits for nodes that do.
    pub(super) fresh_wait: Duration,
}

impl LeaseTimes {
    /// Timings of leases that last `duration`.
    pub(super) fn of(duration: Duration) -> Self {
        let tenths = |tenths: u32| duration * tenths / 10;
        Self { duration, renew_every: tenths(3), margin: tenths(1), fresh_wait: tenths(3) }
    }
}
