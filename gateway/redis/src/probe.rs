//! Probes: whether this node receives what it publishes.
//!
//! A connection that is up but transmits nothing looks healthy from either end: on a network that
//! drops packets, or when one of the two connections leads to a server that is no longer the
//! primary. So a number is sent on the appender's connection every [`PROBE_INTERVAL`], to a channel
//! of this process, and must arrive on the subscriber's connection within [`PROBE_TIMEOUT`]. If it
//! does not, both connections are made anew: at most 3 s after they have fallen silent.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::keyspace::Keyspace;
use skein_core::bus::random_epoch;

/// How often a probe is sent.
pub(super) const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// How often overdue probes are looked for.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// How long a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The probes of one process.
pub(super) struct Probe {
    /// A name that is unique to this process.
    process: String,
    state: Mutex<ProbeState>,
    lost: Notify,
}

struct ProbeState {
    /// A channel for probes and its placement group.
    channel: Option<(u16, String)>,
    /// The last number sent.
    sent: u64,
    /// The oldest number that has not arrived, and when it was sent.
    outstanding: Option<(u64, Instant)>,
    /// How many have arrived.
    received: u64,
    /// When the last one arrived; at first the start of this process.
    received_at: Instant,
}

impl Probe {
    pub(super) fn new() -> Self {
        let state = ProbeState {
            channel: None,
            sent: 0,
            outstanding: None,
            received: 0,
            received_at: Instant::now(),
        };
        Self { process: random_epoch(), state: Mutex::new(state), lost: Notify::new() }
    }

    /// Chooses the channel for probes, in a group of this server.
    pub(super) fn choose_channel(&self, keyspace: Keyspace, group: u16) -> String {
        let channel = keyspace.probe(group, &self.process);
        self.state.lock().channel = Some((group, channel.clone()));
        channel
    }

    /// The channel for probes and its group, once it is chosen.
    pub(super) fn channel(&self) -> Option<(u16, String)> {
        self.state.lock().channel.clone()
    }

    /// Whether `channel` is the channel for probes.
    pub(super) fn is_to(&self, channel: &str) -> bool {
        self.state.lock().channel.as_ref().is_some_and(|(_, own)| own == channel)
    }

    /// The next number to send.
    pub(super) fn send(&self, now: Instant) -> u64 {
        let mut state = self.state.lock();
        state.sent += 1;
        let sent = state.sent;
        state.outstanding.get_or_insert((sent, now));
        sent
    }

    /// Records that a number has arrived.
    pub(super) fn received(&self, number: u64, now: Instant) {
        let state = &mut *self.state.lock();
        state.received += 1;
        state.received_at = now;
        state.outstanding.take_if(|(oldest, _)| *oldest <= number);
    }

    /// How many have arrived so far.
    pub(super) fn received_count(&self) -> u64 {
        self.state.lock().received
    }

    /// How long ago the last one arrived.
    pub(super) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.state.lock().received_at)
    }

    /// Expects no earlier probe any more: the subscriber's connection is a new one.
    pub(super) fn reset(&self) {
        self.state.lock().outstanding = None;
    }

    /// Whether a probe is overdue.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.state.lock().outstanding.is_some_and(|(_, since)| now - since >= PROBE_TIMEOUT)
    }

    /// Makes the appender reconnect as well: it is not known which of the two connections is at
    /// fault.
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
    fn a_probe_is_overdue_until_it_or_a_later_one_arrives() {
        let (probe, now) = (Probe::new(), Instant::now());
        assert_eq!((probe.send(now), probe.send(now + PROBE_INTERVAL)), (1, 2));
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT - PROBE_INTERVAL));
        assert!(probe.is_overdue(now + PROBE_TIMEOUT));
        probe.received(2, now + PROBE_TIMEOUT);
        assert_eq!(probe.age(now + 2 * PROBE_TIMEOUT), PROBE_TIMEOUT);
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT));
        assert_eq!(probe.send(now), 3);
        // A late probe says nothing about those sent after it.
        probe.received(1, now);
        assert!(probe.is_overdue(now + PROBE_TIMEOUT));
        probe.reset();
        assert!(!probe.is_overdue(now + PROBE_TIMEOUT));
    }
}
