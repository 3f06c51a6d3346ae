//! `loadtest connect`: opens connections on a schedule, holds them, sums up.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{Played, ScenarioError, Stage, play};
use crate::{
    args::ConnectArgs,
    crowd::{Rooms, parts::Phase},
    report::Report,
};

/// Runs it.
pub(crate) async fn run(args: ConnectArgs) -> Result<Option<Report>, ScenarioError> {
    let (crowd, many, asked) = (args.crowd.clone(), args.many, args.connections);
    play("connect", crowd, many, asked, false, move |stop| hold(&args, &stop)).await
}

fn hold(args: &ConnectArgs, stop: &Arc<AtomicBool>) -> Result<Played, ScenarioError> {
    let rooms = match (&args.room, args.rooms) {
        (Some(room), _) => Rooms::One(room.clone()),
        (None, Some(rooms)) => Rooms::Many(rooms),
        (None, None) => Rooms::None,
    };
    let mut stage = Stage::open(&args.crowd, args.many.part, rooms, args.connections, false, stop)?;
    let end = Instant::now() + args.hold;
    while Instant::now() < end && !stage.crowd.is_stopped() && stage.crowd.open_count() > 0 {
        stage.crowd.step(end)?;
    }
    stage.meet(Phase::Held)?;
    stage.end(Vec::new())
}

#[cfg(test)]
mod tests;
