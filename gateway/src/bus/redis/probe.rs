//! Whether what this node publishes comes back to its ear.
//!
//! A connection that stands but passes nothing on looks healthy from either end: behind a link
//! that swallows packets, or where one of the two connections leads to a server that is no longer
//! the one in charge. So a number goes out on the append connection every [`PROBE_EVERY`], to a
//! channel of this node's own, and has to come back on the subscriber's within [`PROBE_MAX`].
//! Where it does not, both connections are made again: 3 s at most from silence to that.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::keyspace::Keyspace;
use crate::bus::random_epoch;

/// How often a probe goes out.
pub(super) const PROBE_EVERY: Duration = Duration::from_millis(500);
/// How often it is looked whether one is overdue.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a probe may take.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// The probes of one node.
pub(super) struct Probe {
    /// Of this process alone.
    process: String,
    state: Mutex<State>,
    lost: Notify,
}

#[derive(Default)]
struct State {
    /// A group, and a channel there.
    channel: Option<(u16, String)>,
    /// The last one sent.
    sent: u64,
    /// The oldest one that has not come back, and since when it is out.
    out: Option<(u64, Instant)>,
    /// How many have come back.
    heard: u64,
}

impl Probe {
    pub(super) fn new() -> Self {
        Self { process: random_epoch(), state: Mutex::default(), lost: Notify::new() }
    }

    /// Chooses where probes go: to a channel in a group of this server.
    pub(super) fn choose(&self, keyspace: Keyspace, group: u16) -> String {
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
        state.out.get_or_insert((sent, now));
        sent
    }

    /// A number has come back.
    pub(super) fn heard(&self, number: u64) {
        let state = &mut *self.state.lock();
        state.heard += 1;
        state.out.take_if(|(oldest, _)| *oldest <= number);
    }

    /// How many have come back so far.
    pub(super) fn count_heard(&self) -> u64 {
        self.state.lock().heard
    }

    /// Nothing sent so far is expected any more: the ear is a new one.
    pub(super) fn forget(&self) {
        self.state.lock().out = None;
    }

    /// Whether one should have come back by now.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.state.lock().out.is_some_and(|(_, since)| now - since >= PROBE_MAX)
    }

    /// Has the append connection made again as well: it is not known which of the two is at fault.
    pub(super) fn tell_lost(&self) {
        self.lost.notify_one();
    }

    /// Waits for [`Probe::tell_lost`]. Cancel-safe.
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
        assert_eq!((probe.send(now), probe.send(now + PROBE_EVERY)), (1, 2));
        assert!(!probe.is_overdue(now + PROBE_MAX - PROBE_EVERY));
        assert!(probe.is_overdue(now + PROBE_MAX));
        probe.heard(2);
        assert!(!probe.is_overdue(now + PROBE_MAX));
        assert_eq!(probe.send(now), 3);
        // One that was on its way for long says nothing of what was sent later.
        probe.heard(1);
        assert!(probe.is_overdue(now + PROBE_MAX));
        probe.forget();
        assert!(!probe.is_overdue(now + PROBE_MAX));
    }
}
