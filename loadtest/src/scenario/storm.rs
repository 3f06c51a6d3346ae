//! `loadtest storm`: all connections are dropped at once and reconnect at once, repeatedly.
//!
//! It measures how long they are away, and how much memory a server retains of each.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{ScenarioError, ScenarioOutput, ScenarioRun, run_scenario};
use crate::{
    args::{ProcessArgs, StormArgs},
    phase::ScenarioPhase,
    procfs::ProcessUsage,
    report::{Report, StepResult, connections::ConnectionReport},
    virtual_users::RoomAssignment,
};

/// Granularity of the measured memory. With huge pages memory grows and shrinks by 2 MiB: one page
/// more or less has no meaning, and a run whose bound is below two pages is not conclusive.
const GRANULARITY_BYTES: u64 = 4 << 20;

/// Runs `loadtest storm`.
pub(crate) async fn run(args: StormArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, connections) = (args.common.clone(), args.connections);
    run_scenario("storm", common, ProcessArgs::SINGLE, connections, false, move |stop| {
        storm(&args, &stop)
    })
    .await
}

fn storm(args: &StormArgs, stop: &Arc<AtomicBool>) -> Result<ScenarioOutput, ScenarioError> {
    let rooms = RoomAssignment::RoundRobin(args.rooms);
    let mut run = ScenarioRun::open(&args.common, None, rooms, args.connections, false, stop)?;
    run.users.run_until(Instant::now() + args.pause)?;
    run.end_phase(ScenarioPhase::Held)?;
    let (mut steps, mut memory) = (Vec::new(), vec![memory(args)]);
    for round in 1..=args.rounds {
        run.users.drop_all();
        let took = run.users.open_all(args.back)?;
        if run.users.is_stopped() {
            break;
        }
        let open = run.users.open_count();
        let requested = run.users.plan.local_count().into();
        let back = ConnectionReport::of(run.users.connections.clone(), requested, took);
        let times = back.joined_ms.map(|times| times.to_string()).unwrap_or_default();
        let all_back = open == requested;
        steps.push(StepResult {
            name: format!("round {round}"),
            result: format!(
                "{open} of {requested} back after {:.2} s: {times}",
                took.as_secs_f64()
            ),
            passed: all_back && took <= args.back_max,
        });
        run.users.run_until(Instant::now() + args.pause)?;
        run.end_phase(ScenarioPhase::Reconnected)?;
        memory.push(self::memory(args));
    }
    for (number, pid) in args.common.monitor.pid.iter().enumerate() {
        let bytes: Vec<u64> =
            memory.iter().filter_map(|round| round.get(number)).copied().collect();
        let Some(each) = retained_per_connection(&bytes, args.connections) else { continue };
        let closed = u64::from(args.connections) * (bytes.len() / 2) as u64;
        let is_conclusive = closed * u64::from(args.leak_max) >= GRANULARITY_BYTES;
        let of = if is_conclusive {
            "closed connection"
        } else {
            "closed connection, but too few connections for a conclusion"
        };
        steps.push(StepResult {
            name: format!("server {pid} keeps"),
            result: format!("{each:.0} bytes per {of}"),
            passed: !is_conclusive || each <= f64::from(args.leak_max),
        });
    }
    run.end(steps)
}

fn memory(args: &StormArgs) -> Vec<u64> {
    // A server that died is noticed by the missing connections.
    let pss = |pid: &u32| ProcessUsage::read(Some(*pid)).map_or(0, |cost| cost.pss_bytes);
    args.common.monitor.pid.iter().map(pss).collect()
}

/// Growth of memory from round to round, per connection of a round: the median of the slopes
/// between any two rounds (Theil and Sen), which is robust against outliers. The first half is
/// ignored, because until then a server allocates memory that it keeps for reuse.
fn retained_per_connection(bytes: &[u64], connections: u32) -> Option<f64> {
    let settled = &bytes[bytes.len() / 2..];
    let mut slopes = Vec::new();
    for (from, a) in settled.iter().enumerate() {
        for (steps, b) in settled[from..].iter().enumerate().skip(1) {
            slopes.push((*b as f64 - *a as f64) / steps as f64);
        }
    }
    slopes.sort_unstable_by(f64::total_cmp);
    let middle = slopes.get(slopes.len() / 2)?;
    Some(middle / f64::from(connections))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_per_connection_is_found_despite_outliers() {
        // 100 bytes of each of 1,000 connections, with a step at the beginning and one outlier.
        let mut bytes: Vec<u64> = (0..12).map(|round| 5_000_000 + round * 100_000).collect();
        bytes[1] += 3_000_000;
        bytes[8] += 400_000;
        let each = retained_per_connection(&bytes, 1_000).unwrap();
        assert!((80.0..=120.0).contains(&each), "{each}");
        assert_eq!(retained_per_connection(&[7, 9, 7, 7, 7, 7], 10), Some(0.0));
        assert_eq!(retained_per_connection(&[], 10), None);
        assert_eq!(retained_per_connection(&[7], 10), None);
    }
}
