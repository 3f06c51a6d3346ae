//! `loadtest connect`: opens connections on a schedule, holds them, sums up.

use std::sync::{Arc, atomic::AtomicBool};

use tokio::time::Instant;

use super::{Played, ScenarioError, Stage, play};
use crate::{
    args::ConnectArgs,
    report::Report,
    virtual_users::{Rooms, parts::Phase},
};

/// Runs it.
pub(crate) async fn run(args: ConnectArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, many, asked) = (args.common.clone(), args.many, args.connections);
    play("connect", common, many, asked, false, move |stop| hold(&args, &stop)).await
}

fn hold(args: &ConnectArgs, stop: &Arc<AtomicBool>) -> Result<Played, ScenarioError> {
    let rooms = match (&args.room, args.rooms) {
        (Some(room), _) => Rooms::One(room.clone()),
        (None, Some(rooms)) => Rooms::Many(rooms),
        (None, None) => Rooms::None,
    };
    let mut stage =
        Stage::open(&args.common, args.many.part, rooms, args.connections, false, stop)?;
    let end = Instant::now() + args.hold;
    while Instant::now() < end && !stage.users.is_stopped() && stage.users.open_count() > 0 {
        stage.users.step(end)?;
    }
    stage.meet(Phase::Held)?;
    stage.end(Vec::new())
}

#[cfg(test)]
mod tests;
