//! The nodes of the cluster as this node knows them: it announces itself every second and when its
//! condition changes, and keeps what the others announced.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use md5::{Digest as _, Md5};
use parking_lot::Mutex;
use skein_core::bus::{
    BusError,
    nodes::{AnnouncedNode, NodeAnnouncement, NodeCondition, NodeRegistry},
};
use skein_protocol::ids::NodeId;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// How often a node announces itself.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// How long an announcement may take; another one follows.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the announcements that were read last count, if Redis does not answer.
const NODES_VALID_FOR: Duration = Duration::from_secs(10);

/// What this node is, for its announcements.
#[derive(Clone, Debug)]
pub struct OwnNode {
    /// Its id.
    pub id: NodeId,
    /// The most connections it takes.
    pub connections_max: usize,
    /// The number of clients of other nodes that it takes per second.
    pub intake_per_second: u32,
}

/// The nodes of the cluster.
pub struct ClusterNodes {
    registry: Arc<dyn NodeRegistry>,
    own: OwnNode,
    started: Instant,
    /// The own route, and whether a proxy has confirmed it.
    route: Mutex<(Option<String>, bool)>,
    /// What the nodes announced, and when that was read.
    nodes: Mutex<(Vec<AnnouncedNode>, Option<Instant>)>,
    /// Notified when the condition of this node has changed.
    changed: Notify,
    /// Cancelled when this node shall withdraw, and when it has.
    withdrawing: CancellationToken,
    withdrawn: CancellationToken,
}

/// The value of `?node=` that leads to a node: the MD5 of the address that the proxy dials, as nginx
/// computes it for `sticky route`.
pub fn route_of(dialled: SocketAddr) -> String {
    format!("{:x}", Md5::digest(dialled.to_string()))
}

/// The address that a proxy dials, as far as it is known before the first client. A listener on all
/// addresses is dialled at the one that leads to the proxy.
fn dialled_address(listen: SocketAddr, proxies: &[IpNet]) -> Option<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return Some(listen);
    }
    // Connecting a datagram socket sends nothing; it only looks up the route.
    let towards = |proxy: IpAddr| {
        let any: IpAddr = if proxy.is_ipv4() { [0, 0, 0, 0].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect((proxy, 9)).ok()?;
        Some(SocketAddr::new(socket.local_addr().ok()?.ip(), listen.port()))
    };
    proxies.iter().find_map(|network| towards(network.addr()))
}

impl ClusterNodes {
    /// The nodes of a cluster, none of which is known yet. `proxies` are the networks of the
    /// proxies in front of `listen`.
    pub fn new(
        registry: Arc<dyn NodeRegistry>,
        own: OwnNode,
        listen: SocketAddr,
        proxies: &[IpNet],
    ) -> Self {
        let route = dialled_address(listen, proxies).map(route_of);
        Self {
            registry,
            own,
            started: Instant::now(),
            route: Mutex::new((route, false)),
            nodes: Mutex::default(),
            changed: Notify::new(),
            withdrawing: CancellationToken::new(),
            withdrawn: CancellationToken::new(),
        }
    }

    /// Records the route by which a client came. A handshake that a proxy forwarded outweighs
    /// others: a client that bypasses the proxy may dial another address.
    pub fn record_route(&self, route: &str, is_forwarded: bool) {
        let known = &mut *self.route.lock();
        if is_forwarded || (known.0.is_none() && !known.1) {
            if known.0.as_deref() != Some(route) {
                known.0 = Some(route.to_owned());
            }
            known.1 |= is_forwarded;
        }
    }

    /// The value of `?node=` that leads to this node, once it is known.
    pub fn own_route(&self) -> Option<String> {
        self.route.lock().0.clone()
    }

    /// What the nodes announced last, ordered by id; empty if that is not known.
    pub fn nodes(&self) -> Vec<AnnouncedNode> {
        let nodes = self.nodes.lock();
        match nodes.1 {
            Some(read) if read.elapsed() < NODES_VALID_FOR => nodes.0.clone(),
            _ => Vec::new(),
        }
    }

    /// Announces a change of the condition at once.
    pub fn announce_now(&self) {
        self.changed.notify_one();
    }

    /// Announces this node until it [withdraws](ClusterNodes::withdraw) or `stopped` is cancelled.
    /// `state` returns its condition and the number of its connections.
    pub async fn announce_until(
        &self,
        stopped: CancellationToken,
        state: impl Fn() -> (NodeCondition, usize),
    ) {
        while !self.withdrawing.is_cancelled() {
            if let Err(error) = self.announce(state()).await {
                tracing::debug!(%error, "cannot announce this node to the others");
            }
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => return,
                () = self.withdrawing.cancelled() => {}
                () = self.changed.notified() => {}
                () = tokio::time::sleep(ANNOUNCE_INTERVAL) => {}
            }
        }
        // Behind the last announcement, which would bring it back.
        let withdrawn = timeout(ANNOUNCE_TIMEOUT, self.registry.withdraw()).await;
        if !matches!(withdrawn, Ok(Ok(()))) {
            tracing::debug!("cannot withdraw the announcement of this node");
        }
        self.withdrawn.cancel();
        stopped.cancelled().await;
    }

    async fn announce(
        &self,
        (condition, connections): (NodeCondition, usize),
    ) -> Result<(), BusError> {
        let announcement = NodeAnnouncement {
            node: self.own.id.clone(),
            condition,
            connections: connections as u64,
            connections_max: self.own.connections_max as u64,
            intake_per_second: self.own.intake_per_second,
            route: self.own_route(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            schema: skein_redis::SCHEMA,
        };
        let announced = timeout(ANNOUNCE_TIMEOUT, self.registry.announce(announcement)).await;
        let nodes = announced.unwrap_or(Err(BusError::Unavailable))?;
        *self.nodes.lock() = (nodes, Some(Instant::now()));
        Ok(())
    }

    /// Removes the announcement of this node, which stops, so that it does not count as missing.
    /// Takes at most twice [`ANNOUNCE_TIMEOUT`].
    pub async fn withdraw(&self) {
        self.withdrawing.cancel();
        let _ = timeout(2 * ANNOUNCE_TIMEOUT, self.withdrawn.cancelled()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialled_address_of_a_listener_leads_to_the_proxy() {
        let listen: SocketAddr = "10.0.0.7:8080".parse().unwrap();
        assert_eq!(dialled_address(listen, &[]), Some(listen));
        let any: SocketAddr = "0.0.0.0:8080".parse().unwrap();
        assert_eq!(dialled_address(any, &[]), None);
        let proxy = "127.0.0.9/32".parse().unwrap();
        assert_eq!(dialled_address(any, &[proxy]), Some("127.0.0.1:8080".parse().unwrap()));
        // As nginx computes it.
        let node = "127.0.0.1:8080".parse().unwrap();
        assert_eq!(route_of(node), "5958c386bf5e9109ac10d2a628645aea");
    }
}
