//! `loadtest storm`: all connections are cut at once, and all come back at once, again and again.
//!
//! It shows how long they are away, and what each of them leaves behind in the memory of a server.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{ScenarioError, ScenarioOutput, ScenarioRun, run_scenario};
use crate::{
    args::{ProcessArgs, StormArgs},
    procfs::ProcessUsage,
    report::{Report, StepResult, connections::ConnectionReport},
    virtual_users::{RoomAssignment, workers::ScenarioPhase},
};

/// Memory comes and goes in pieces of 2 MiB where the kernel has huge pages: one piece more or less
/// says nothing, and a run in which the bound is less than two cannot tell.
const STEPS_BYTES: u64 = 4 << 20;

/// Runs it.
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
        let Some(each) = left_behind(&bytes, args.connections) else { continue };
        let gone = u64::from(args.connections) * (bytes.len() / 2) as u64;
        let tells = gone * u64::from(args.leak_max) >= STEPS_BYTES;
        let of = if tells { "that is gone" } else { "that is gone, but they are too few to tell" };
        steps.push(StepResult {
            name: format!("server {pid} keeps"),
            result: format!("{each:.0} bytes of each connection {of}"),
            passed: !tells || each <= f64::from(args.leak_max),
        });
    }
    run.end(steps)
}

fn memory(args: &StormArgs) -> Vec<u64> {
    // A server that died shows by who is not back.
    let pss = |pid: &u32| ProcessUsage::read(Some(*pid)).map_or(0, |cost| cost.pss_bytes);
    args.common.monitor.pid.iter().map(pss).collect()
}

/// What memory grew by from round to round, for each connection of a round: the median of the slopes
/// between any two (Theil and Sen), which a few odd rounds do not move. The first half does not
/// count: until then a server finds the memory that it keeps for all.
fn left_behind(bytes: &[u64], connections: u32) -> Option<f64> {
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
    fn what_grows_from_round_to_round_is_found_beside_what_does_not() {
        // 100 bytes of each of 1,000 connections, with a step in the beginning and one odd round.
        let mut bytes: Vec<u64> = (0..12).map(|round| 5_000_000 + round * 100_000).collect();
        bytes[1] += 3_000_000;
        bytes[8] += 400_000;
        let each = left_behind(&bytes, 1_000).unwrap();
        assert!((80.0..=120.0).contains(&each), "{each}");
        assert_eq!(left_behind(&[7, 9, 7, 7, 7, 7], 10), Some(0.0));
        assert_eq!(left_behind(&[], 10), None);
        assert_eq!(left_behind(&[7], 10), None);
    }
}
