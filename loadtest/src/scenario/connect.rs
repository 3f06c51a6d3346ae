//! `loadtest connect`: opens connections on a schedule, holds them, and reports.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{ScenarioError, ScenarioOutput, ScenarioRun, run_scenario};
use crate::{
    args::ConnectArgs, phase::ScenarioPhase, report::Report, virtual_users::RoomAssignment,
};

/// Runs `loadtest connect`.
pub(crate) async fn run(args: ConnectArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, requested) = (args.common.clone(), args.process, args.connections);
    run_scenario("connect", common, process, requested, false, move |stop| hold(&args, &stop)).await
}

fn hold(args: &ConnectArgs, stop: &Arc<AtomicBool>) -> Result<ScenarioOutput, ScenarioError> {
    let rooms = match (&args.room, args.rooms) {
        (Some(room), _) => RoomAssignment::Single(room.clone()),
        (None, Some(rooms)) => RoomAssignment::RoundRobin(rooms),
        (None, None) => RoomAssignment::None,
    };
    let mut run =
        ScenarioRun::open(&args.common, args.process.worker, rooms, args.connections, false, stop)?;
    let end = Instant::now() + args.hold;
    while Instant::now() < end && !run.users.is_stopped() && run.users.open_count() > 0 {
        run.users.step(end)?;
    }
    run.end_phase(ScenarioPhase::Held)?;
    run.end(Vec::new())
}

#[cfg(test)]
mod tests;
