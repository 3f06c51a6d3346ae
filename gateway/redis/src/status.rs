//! What clients are told of the bus: `down` when it has been away for a moment, `up` when every
//! room that this node follows is proven whole.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use skein_protocol::protocol::server_frame::BusState;
use tokio::time::Instant;

use super::router::Router;
use skein_core::{
    bus::{Mailboxes, node_state::BusStatus},
    drain::Tasks,
};

/// How often it is looked.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// A link that is back and made good within this is nothing that clients need to hear of.
const GRACE: Duration = Duration::from_millis(500);

pub(super) fn start(router: Arc<Router>, mailboxes: Mailboxes, tasks: &Tasks) {
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_status", async move {
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = watch(&router, &mailboxes) => {}
        }
    });
}

async fn watch(router: &Router, mailboxes: &Mailboxes) {
    let node_state = mailboxes.node_state();
    let mut look = tokio::time::interval(CHECK_INTERVAL);
    let mut since: Option<(Instant, SystemTime)> = None;
    let mut told = BusState::Up;
    loop {
        look.tick().await;
        router.update_metrics();
        if router.is_up() && mailboxes.all_synced() {
            if told == BusState::Down {
                told = BusState::Up;
                node_state.set_status(BusStatus { bus: told, since: Some(SystemTime::now()) });
            }
            since = None;
            continue;
        }
        let (began, at) = *since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
        if told == BusState::Up && began.elapsed() >= GRACE {
            told = BusState::Down;
            node_state.set_status(BusStatus { bus: told, since: Some(at) });
        }
    }
}
