//! The canary: each node publishes the time every [`CANARY_INTERVAL`], on the appender's connection,
//! and every node measures how long it takes to arrive on its subscriber's connection: the path of
//! entries between each pair of nodes.
//!
//! Both ends take the time of Redis, from their own clocks and the measured difference, so that
//! clocks that differ do not count. In a Redis Cluster the canary passes the server of partition 0.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use skein_protocol::ids::NodeId;
use tokio::time::Instant;

use skein_core::telemetry::metrics::Metrics;

/// How often a node publishes.
pub(super) const CANARY_INTERVAL: Duration = Duration::from_secs(5);
/// How long the last measurement of a node is exported.
const EXPIRES_AFTER: Duration = Duration::from_secs(30);
/// The most nodes that are exported; others are not.
const NODES_MAX: usize = 64;

/// The canaries that this node sends and receives.
pub(super) struct Canary {
    node: String,
    metrics: Arc<Metrics>,
    state: Mutex<CanaryState>,
}

#[derive(Default)]
struct CanaryState {
    sent: Option<Instant>,
    /// Of each node the last measurement, seconds, and when it was made.
    received: BTreeMap<NodeId, (f64, Instant)>,
}

impl Canary {
    /// The canary of a node.
    pub(super) fn new(node: &str, metrics: Arc<Metrics>) -> Self {
        Self { node: node.to_owned(), metrics, state: Mutex::default() }
    }

    /// The payload to publish, if one is due: `<node> <time, us>`.
    pub(super) fn due(&self, now: Instant, wall: SystemTime) -> Option<String> {
        {
            let state = &mut *self.state.lock();
            if state.sent.is_some_and(|sent| now - sent < CANARY_INTERVAL) {
                return None;
            }
            state.sent = Some(now);
        }
        self.export(now);
        Some(format!("{} {}", self.node, (self.time_of_redis(wall)? * 1e6) as u64))
    }

    /// Records a payload that has arrived. `false`: no node has sent it.
    pub(super) fn received(&self, payload: &[u8], now: Instant, wall: SystemTime) -> bool {
        let parse = || {
            let (node, sent) = std::str::from_utf8(payload).ok()?.split_once(' ')?;
            let (node, sent) = (node.parse::<NodeId>().ok()?, sent.parse::<u64>().ok()?);
            // The differences of the clocks are measured to a round trip at best.
            let seconds = (self.time_of_redis(wall)? - sent as f64 / 1e6).max(0.0);
            Some((node, seconds))
        };
        let Some((node, seconds)) = parse() else { return false };
        {
            let received = &mut self.state.lock().received;
            if received.contains_key(&node) || received.len() < NODES_MAX {
                received.insert(node, (seconds, now));
            }
        }
        self.export(now);
        true
    }

    /// The time of Redis in seconds since 1970.
    fn time_of_redis(&self, wall: SystemTime) -> Option<f64> {
        let since = wall.duration_since(UNIX_EPOCH).ok()?;
        Some(since.as_secs_f64() - self.metrics.clock_skew_seconds.get())
    }

    /// Sets the metric, without nodes of which nothing was received lately.
    fn export(&self, now: Instant) {
        let received = &mut self.state.lock().received;
        received.retain(|_, (_, at)| now.saturating_duration_since(*at) < EXPIRES_AFTER);
        let values = received.iter().map(|(node, (seconds, _))| (vec![node.as_str()], *seconds));
        self.metrics.canary_seconds.replace(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canary_is_timed_by_the_clock_of_redis() {
        let (ours, theirs) = (Arc::new(Metrics::new()), Arc::new(Metrics::new()));
        let (a, b) = (Canary::new("a", ours.clone()), Canary::new("b", theirs.clone()));
        let (start, redis) = (Instant::now(), UNIX_EPOCH + Duration::from_secs(1_000_000));
        // The clock of `a` is 3 s ahead of that of Redis, the clock of `b` 2 s behind.
        ours.clock_skew_seconds.set(3.0);
        theirs.clock_skew_seconds.set(-2.0);
        let payload = a.due(start, redis + Duration::from_secs(3)).unwrap();
        assert_eq!(payload, "a 1000000000000");
        assert_eq!(a.due(start + CANARY_INTERVAL / 2, redis), None);
        let arrived = redis + Duration::from_millis(40) - Duration::from_secs(2);
        assert!(b.received(payload.as_bytes(), start, arrived));
        let shown = |metrics: &Metrics| {
            let text = metrics.render();
            let line = text.lines().find(|line| line.starts_with("gateway_canary_seconds{"));
            line.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        };
        assert!((shown(&theirs).unwrap() - 0.04).abs() < 1e-3, "{:?}", shown(&theirs));
        for bad in [&b""[..], b"a", b"a x", b"/ 5", b"\xff 5"] {
            assert!(!b.received(bad, start, arrived), "{bad:?}");
        }
        // A node that sends no more is not exported for ever.
        b.due(start + EXPIRES_AFTER, arrived);
        assert_eq!(shown(&theirs), None);
    }
}
