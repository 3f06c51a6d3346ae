//! The state of a node's links to a server: which are up, and which server each leads to. The links
//! are the connections of appender and subscriber.

use std::sync::Arc;

use tokio::sync::{Notify, watch};

use super::{canary::Canary, probe::Probe, server::RedisServer};
use skein_core::{bus::node_state::NodeState, delivery::ServerId, telemetry::metrics::Metrics};

/// The state of both links.
pub(super) struct LinkStates {
    /// The server that each link leads to.
    pub(super) targets: watch::Sender<LinkTargets>,
    /// Counts requests to reconnect all links.
    pub(super) reconnect_all: watch::Sender<u64>,
    /// Notified when another process asks to renew the lease at once.
    pub(super) wake_up: Notify,
    /// Checks that this node receives what it publishes.
    pub(super) probe: Probe,
    /// Measures the path between nodes.
    pub(super) canary: Canary,
    pub(super) metrics: Arc<Metrics>,
    pub(super) node_state: Arc<NodeState>,
}

/// One of the links.
#[derive(Clone, Copy, Debug)]
pub(super) enum LinkKind {
    Append,
    Subscribe,
}

/// The server that each link leads to, while it is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LinkTargets {
    append: Option<ServerId>,
    subscribe: Option<ServerId>,
}

impl LinkTargets {
    /// Whether both links lead to `server_id`.
    pub(super) fn both_lead_to(self, server_id: ServerId) -> bool {
        self.append == Some(server_id) && self.subscribe == Some(server_id)
    }

    /// Whether a link leads to another server than `server_id`.
    pub(super) fn any_leads_elsewhere(self, server_id: ServerId) -> bool {
        [self.append, self.subscribe].into_iter().flatten().any(|leads_to| leads_to != server_id)
    }

    fn are_up(self) -> bool {
        self.append.is_some() && self.subscribe.is_some()
    }
}

impl LinkStates {
    pub(super) fn new(node: &str, node_state: Arc<NodeState>, metrics: Arc<Metrics>) -> Self {
        Self {
            targets: watch::Sender::default(),
            reconnect_all: watch::Sender::default(),
            wake_up: Notify::new(),
            probe: Probe::new(),
            canary: Canary::new(node, metrics.clone()),
            metrics,
            node_state,
        }
    }

    /// Records that a link leads to `server_id`, or is down.
    pub(super) fn set(&self, server: &RedisServer, link: LinkKind, server_id: Option<ServerId>) {
        if let Some(server_id) = server_id {
            self.observed_server(server, server_id);
        }
        let mut changed = false;
        self.targets.send_if_modified(|targets| {
            let leads_to = match link {
                LinkKind::Append => &mut targets.append,
                LinkKind::Subscribe => &mut targets.subscribe,
            };
            let before = std::mem::replace(leads_to, server_id);
            changed = before.is_some() != server_id.is_some();
            before != server_id
        });
        if changed && server_id.is_some() {
            tracing::info!(?link, server = server.dial.server_name(), "Redis link is up");
        } else if changed {
            self.metrics.bus_reconnects.inc();
            let server = server.dial.server_name();
            tracing::warn!(?link, server, "Redis link is down; reconnecting");
        }
    }

    /// Records that a connection leads to `server_id`. If that is not the agreed server, nothing is
    /// read or written until the nodes have agreed on it.
    pub(super) fn observed_server(&self, server: &RedisServer, server_id: ServerId) {
        if server.revoke_agreement(|agreed| agreed != server_id) {
            self.node_state.set_agreed(server.owned.borrow().iter().copied(), false);
        }
    }

    /// Records that a script has found no agreement on the server.
    pub(super) fn found_unagreed(&self, server: &RedisServer, server_id: ServerId) {
        server.revoke_agreement(|agreed| agreed == server_id);
        self.node_state.set_agreed(server.owned.borrow().iter().copied(), false);
    }

    /// Whether both links are up.
    pub(super) fn are_up(&self) -> bool {
        self.targets.borrow().are_up()
    }
}
