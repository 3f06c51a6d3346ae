//! What goes wrong when: drawn from a seed, so that the same seed is the same plan.
//!
//! Pure. A further kind is one more entry of [`Kind::ALL`] and what it does in [`super::inject`].

use std::{fmt, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde::Serialize;

/// How long everything works before the first fault.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long everything works at the end, so that clients are back when the run is over.
const RECOVERY: Duration = Duration::from_secs(8);
/// The pause between two faults, ms.
const PAUSE_MS: std::ops::Range<u64> = 300..1_200;
/// How long a fault lasts that lasts, ms. Shorter than a node's lease: longer ones have a test of
/// their own (docs/faults.md).
const DURATION_MS: std::ops::Range<u64> = 200..2_000;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultKind {
    /// A gateway gets SIGKILL, and is started again.
    GatewayKill,
    /// A gateway gets SIGTERM, ends in order, and is started again.
    GatewayTerm,
    /// A gateway gets SIGSTOP, later SIGCONT.
    GatewayStop,
    /// All gateways, one after the other, as `GatewayTerm`.
    RollingDeploy,
    /// Redis gets SIGKILL, and is started again with its file.
    RedisKill,
    /// Redis ends in order, and is started again.
    RedisRestart,
    /// Redis gets SIGKILL, and is started again without its file.
    RedisEmpty,
    /// Redis gets SIGSTOP, later SIGCONT.
    RedisStop,
    /// Redis closes the connections that subscribe.
    RedisClientKillPubsub,
    /// Redis closes all others.
    RedisClientKillNormal,
    /// nginx reads its configuration again.
    NginxReload,
    /// The link between a gateway and Redis is cut.
    BusCut,
    /// Nothing passes on it.
    BusBlackHole,
    /// What passes on it is late.
    BusDelay,
    /// Only what Redis says passes on it.
    BusOneWay,
    /// The links between clients and a gateway are cut.
    ClientCut,
    /// Nothing passes on them.
    ClientBlackHole,
    /// What passes on them is late.
    ClientDelay,
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct PlannedFault {
    /// When it begins at the earliest, ms from the start of the run. One is mended before the next
    /// begins.
    pub(crate) at_ms: u64,
    /// What.
    pub(crate) kind: FaultKind,
    /// The gateway, where it is about one.
    pub(crate) node: usize,
    /// How long, where it lasts, ms.
    pub(crate) duration_ms: u64,
}

impl FaultKind {
    /// All of them.
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

    /// Whether it goes on until it is mended.
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

/// The faults of a run of this length with so many gateways. Every kind comes once before any comes
/// again.
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
    fn the_same_seed_is_the_same_plan_and_another_is_another() {
        let minute = Duration::from_secs(60);
        let plan = |seed| plan(seed, minute, 3, &FaultKind::ALL);
        assert_eq!(plan(1), plan(1));
        assert_ne!(plan(1), plan(2));
    }

    #[test]
    fn a_minute_has_all_kinds_in_order_of_time() {
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
    fn too_short_a_run_has_none() {
        assert!(plan(1, Duration::from_secs(5), 1, &FaultKind::ALL).is_empty());
        assert!(plan(1, Duration::from_secs(60), 1, &[]).is_empty());
    }
}
