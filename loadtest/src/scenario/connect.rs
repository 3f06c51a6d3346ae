//! `loadtest connect`: opens connections on a schedule, holds them, sums up.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{Played, ScenarioError, Stage, play};
use crate::{
    args::ConnectArgs,
    report::Report,
    virtual_users::{RoomAssignment, workers::ScenarioPhase},
};

/// Runs it.
pub(crate) async fn run(args: ConnectArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, process, requested) = (args.common.clone(), args.process, args.connections);
    play("connect", common, process, requested, false, move |stop| hold(&args, &stop)).await
}

fn hold(args: &ConnectArgs, stop: &Arc<AtomicBool>) -> Result<Played, ScenarioError> {
    let rooms = match (&args.room, args.rooms) {
        (Some(room), _) => RoomAssignment::Single(room.clone()),
        (None, Some(rooms)) => RoomAssignment::RoundRobin(rooms),
        (None, None) => RoomAssignment::None,
    };
    let mut stage =
        Stage::open(&args.common, args.process.worker, rooms, args.connections, false, stop)?;
    let end = Instant::now() + args.hold;
    while Instant::now() < end && !stage.users.is_stopped() && stage.users.open_count() > 0 {
        stage.users.step(end)?;
    }
    stage.end_phase(ScenarioPhase::Held)?;
    stage.end(Vec::new())
}

#[cfg(test)]
mod tests;
