//! The bus status of clients: `down` when the bus has been down for a moment, `up` when every
//! subscribed room was verified again.

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

/// How often the state of the bus is checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Clients are not notified of an outage that ends, with all rooms verified, within this time.
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
    let mut check = tokio::time::interval(CHECK_INTERVAL);
    let mut down_since: Option<(Instant, SystemTime)> = None;
    let mut status = BusState::Up;
    loop {
        check.tick().await;
        router.update_metrics();
        if router.is_up() && mailboxes.all_synced() {
            if status == BusState::Down {
                status = BusState::Up;
                node_state.set_status(BusStatus { bus: status, since: Some(SystemTime::now()) });
            }
            down_since = None;
            continue;
        }
        let (began, at) = *down_since.get_or_insert_with(|| (Instant::now(), SystemTime::now()));
        if status == BusState::Up && began.elapsed() >= GRACE {
            status = BusState::Down;
            node_state.set_status(BusStatus { bus: status, since: Some(at) });
        }
    }
}
