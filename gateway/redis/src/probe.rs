//! Whether what this node publishes comes back to its ear.
//!
//! A connection that stands but passes nothing on looks healthy from either end: behind a link
//! that swallows packets, or where one of the two connections leads to a server that is no longer
//! the one in charge. So a number goes out on the append connection every [`PROBE_INTERVAL`], to a
//! channel of this node's own, and has to come back on the subscriber's within [`PROBE_TIMEOUT`].
//! Where it does not, both connections are made again: 3 s at most from silence to that.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::keyspace::Keyspace;
use skein_core::bus::random_epoch;

/// How often a probe goes out.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// How often it is looked whether one is overdue.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// How long a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The probes of one node.
pub(super) struct Probe {
    /// Of this process alone.
    process: String,
    state: Mutex<ProbeState>,
    lost: Notify,
}

#[derive(Default)]
struct ProbeState {
    /// A group, and a channel there.
    channel: Option<(u16, String)>,
    /// The last one sent.
    sent: u64,
    /// The oldest one that has not come back, and since when it is out.
    outstanding: Option<(u64, Instant)>,
    /// How many have come back.
    received: u64,
}

impl Probe {
    pub(super) fn new() -> Self {
        Self { process: random_epoch(), state: Mutex::default(), lost: Notify::new() }
    }

    /// Chooses where probes go: to a channel in a group of this server.
    pub(super) fn choose_channel(&self, keyspace: Keyspace, group: u16) -> String {
        let channel = keyspace.probe(group, &self.process);
        self.state.lock().channel = Some((group, channel.clone()));
        channel
    }

    /// Where they go, and the group it is in, once that is chosen.
    pub(super) fn channel(&self) -> Option<(u16, String)> {
        self.state.lock().channel.clone()
    }

    /// Whether `channel` is the one.
    pub(super) fn is_to(&self, channel: &str) -> bool {
        self.state.lock().channel.as_ref().is_some_and(|(_, own)| own == channel)
    }

    /// The number to send now.
    pub(super) fn send(&self, now: Instant) -> u64 {
        let mut state = self.state.lock();
        state.sent += 1;
        let sent = state.sent;
        state.outstanding.get_or_insert((sent, now));
        sent
    }

    /// A number has come back.
    pub(super) fn received(&self, number: u64) {
        let state = &mut *self.state.lock();
        state.received += 1;
        state.outstanding.take_if(|(oldest, _)| *oldest <= number);
    }

    /// How many have come back so far.
    pub(super) fn received_count(&self) -> u64 {
        self.state.lock().received
    }

    /// Nothing sent so far is expected any more: the ear is a new one.
    pub(super) fn reset(&self) {
        self.state.lock().outstanding = None;
    }

    /// Whether one should have come back by now.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.state.lock().outstanding.is_some_and(|(_, since)| now - since >= PROBE_TIMEOUT)
    }

    /// Has the append connection made again as well: it is not known which of the two is at fault.
    pub(super) fn report_lost(&self) {
        self.lost.notify_one();
    }

    /// Waits for [`Probe::report_lost`]. Cancel-safe.
    pub(super) async fn lost(&self) {
        self.lost.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_is_overdue_until_it_or_a_later_one_comes_back() {
        let (probe, now) = (Probe::new(), Instant::now());
        assert_eq!((probe.send(now), probe.send(now + PROBE_INTERVAL)), (1, 2));
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT - PROBE_INTERVAL));
        assert!(probe.is_overdue(now + PROBE_TIMEOUT));
        probe.received(2);
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT));
        assert_eq!(probe.send(now), 3);
        // One that was on its way for long says nothing of what was sent later.
        probe.received(1);
        assert!(probe.is_overdue(now + PROBE_TIMEOUT));
        probe.reset();
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT));
    }
}
