//! The fault plan, drawn from a seed: the same seed gives the same plan.
//!
//! Pure. A new kind is one more entry of [`FaultKind::ALL`] and its effect in [`super::inject`].

use std::{fmt, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde::Serialize;

/// Time before the first fault.
const WARM_UP: Duration = Duration::from_secs(2);
/// Time after the last fault, in which clients reconnect.
const RECOVERY: Duration = Duration::from_secs(8);
/// Pause between two faults, ms.
const PAUSE_MS: std::ops::Range<u64> = 300..1_200;
/// Duration of a fault that has one, ms. Shorter than a node's lease: longer ones have a test of
/// their own (docs/faults.md).
const DURATION_MS: std::ops::Range<u64> = 200..2_000;

/// Delay of the bytes of clients in `ClientDelay`.
pub(crate) const CLIENT_DELAY: Duration = Duration::from_millis(200);

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultKind {
    /// A gateway gets SIGKILL and is started again.
    GatewayKill,
    /// A gateway gets SIGTERM, shuts down and is started again.
    GatewayTerm,
    /// A gateway gets SIGSTOP, and later SIGCONT.
    GatewayStop,
    /// All gateways one after the other, each as `GatewayTerm`.
    RollingDeploy,
    /// Redis gets SIGKILL and is started again with its file.
    RedisKill,
    /// Redis shuts down and is started again.
    RedisRestart,
    /// Redis gets SIGKILL and is started again without its file.
    RedisEmpty,
    /// Redis gets SIGSTOP, and later SIGCONT.
    RedisStop,
    /// Redis closes its subscriber connections.
    RedisClientKillPubsub,
    /// Redis closes all other connections.
    RedisClientKillNormal,
    /// nginx reloads its configuration.
    NginxReload,
    /// The link between a gateway and Redis is cut.
    BusCut,
    /// The link between a gateway and Redis holds all bytes.
    BusBlackHole,
    /// The link between a gateway and Redis delays bytes.
    BusDelay,
    /// The link between a gateway and Redis holds requests and forwards responses.
    BusOneWay,
    /// The links between clients and a gateway are cut.
    ClientCut,
    /// The links between clients and a gateway hold all bytes.
    ClientBlackHole,
    /// The links between clients and a gateway delay bytes.
    ClientDelay,
}

/// One fault of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct PlannedFault {
    /// Earliest begin, ms from the start of the run. A fault ends before the next begins.
    pub(crate) at_ms: u64,
    /// Kind of the fault.
    pub(crate) kind: FaultKind,
    /// Index of the gateway, for kinds that concern one.
    pub(crate) node: usize,
    /// Duration, ms; 0 for kinds without one.
    pub(crate) duration_ms: u64,
}

impl FaultKind {
    /// All kinds.
    pub(crate) const ALL: [Self; 18] = [
        Self::GatewayKill,
        Self::GatewayTerm,
        Self::GatewayStop,
        Self::RollingDeploy,
        Self::RedisKill,
        Self::RedisRestart,
        Self::RedisEmpty,
        Self::RedisStop,
        Self::RedisClientKillPubsub,
        Self::RedisClientKillNormal,
        Self::NginxReload,
        Self::BusCut,
        Self::BusBlackHole,
        Self::BusDelay,
        Self::BusOneWay,
        Self::ClientCut,
        Self::ClientBlackHole,
        Self::ClientDelay,
    ];

    /// Whether it lasts until it is ended.
    fn has_duration(self) -> bool {
        !matches!(
            self,
            Self::GatewayKill
                | Self::GatewayTerm
                | Self::RollingDeploy
                | Self::RedisKill
                | Self::RedisRestart
                | Self::RedisEmpty
                | Self::RedisClientKillPubsub
                | Self::RedisClientKillNormal
                | Self::NginxReload
        )
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = serde_json::to_value(self).expect("a name");
        f.write_str(name.as_str().expect("a name"))
    }
}

/// The faults of a run of `duration` with `nodes` gateways. Every kind occurs once before any
/// occurs again.
pub(crate) fn plan(
    seed: u64,
    duration: Duration,
    nodes: usize,
    kinds: &[FaultKind],
) -> Vec<PlannedFault> {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut faults, mut bag) = (Vec::new(), Vec::<FaultKind>::new());
    let end = duration.saturating_sub(RECOVERY).as_millis() as u64;
    let mut at_ms = WARM_UP.as_millis() as u64;
    loop {
        if bag.is_empty() {
            bag.extend(kinds);
            bag.shuffle(&mut rng);
        }
        let Some(kind) = bag.pop() else { return faults };
        let duration_ms = if kind.has_duration() { rng.random_range(DURATION_MS) } else { 0 };
        let node = rng.random_range(0..nodes);
        if at_ms + duration_ms > end {
            return faults;
        }
        faults.push(PlannedFault { at_ms, kind, node, duration_ms });
        at_ms += duration_ms + rng.random_range(PAUSE_MS);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn plan_depends_on_the_seed() {
        let minute = Duration::from_secs(60);
        let plan = |seed| plan(seed, minute, 3, &FaultKind::ALL);
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
    }

    #[test]
    fn one_minute_has_all_kinds_in_order_of_time() {
        for seed in 0..100 {
            let faults = plan(seed, Duration::from_secs(60), 3, &FaultKind::ALL);
            let kinds: BTreeSet<FaultKind> = faults.iter().map(|fault| fault.kind).collect();
            assert_eq!(kinds.len(), FaultKind::ALL.len(), "seed {seed}");
            assert!(faults.is_sorted_by_key(|fault| fault.at_ms));
            assert!(faults.iter().all(|fault| fault.node < 3));
            let last = faults.last().expect("some");
            assert!(last.at_ms + last.duration_ms <= 52_000);
        }
    }

    #[test]
    fn short_run_has_no_faults() {
        assert!(plan(1, Duration::from_secs(5), 1, &FaultKind::ALL).is_empty());
        assert!(plan(1, Duration::from_secs(60), 1, &[]).is_empty());
    }
}
