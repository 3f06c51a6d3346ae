//! The nodes of the cluster as this node knows them: it announces itself every second and when its
//! condition changes, and keeps what the others announced.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use ipnet::IpNet;
use md5::{Digest as _, Md5};
use parking_lot::Mutex;
use skein_core::bus::{
    BusError,
    nodes::{AnnouncedNode, Announcements, NodeAnnouncement, NodeCondition, NodeRegistry},
};
use skein_protocol::ids::NodeId;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

/// How often a node announces itself.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);
/// How often it looks whether its connections have changed so much that it announces them earlier.
const CHANGE_CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// How long clients may take until they are back, beyond the time that they were told.
const RETURN_MARGIN: Duration = Duration::from_secs(1);
/// How long an announcement may take; another one follows.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a node that drains waits for what the others are, and one that stops for its withdrawal.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the announcements that were read last count, if Redis does not answer.
const NODES_VALID_FOR: Duration = Duration::from_secs(10);

/// The facts about this node that its announcements need from the configuration.
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
    /// The most connections that it takes, which a reload may change.
    connections_max: AtomicUsize,
    started: Instant,
    /// The own route, and whether a proxy has confirmed it.
    route: Mutex<(Option<String>, bool)>,
    /// The announcements of the nodes, and when they were read.
    nodes: Mutex<(Vec<AnnouncedNode>, Option<Instant>)>,
    /// Clients that are expected back: their number, and until when.
    expected: Mutex<Option<(u64, Instant)>>,
    /// If this node is expected back after it has stopped: its clients, and the time until they are
    /// back.
    returning: Mutex<Option<(u64, Duration)>>,
    /// Notified when the condition of this node has changed.
    changed: Notify,
    /// The number of announcements that were begun, and of the last one that succeeded.
    begun: AtomicU64,
    announced: watch::Sender<u64>,
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
            connections_max: AtomicUsize::new(own.connections_max),
            own,
            started: Instant::now(),
            route: Mutex::new((route, false)),
            nodes: Mutex::default(),
            expected: Mutex::default(),
            returning: Mutex::default(),
            changed: Notify::new(),
            begun: AtomicU64::new(0),
            announced: watch::Sender::new(0),
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

    /// The last announcements of the nodes, ordered by id; empty if they are not known.
    pub fn nodes(&self) -> Vec<AnnouncedNode> {
        let nodes = self.nodes.lock();
        match nodes.1 {
            Some(read) if read.elapsed() < NODES_VALID_FOR => nodes.0.clone(),
            _ => Vec::new(),
        }
    }

    /// Announces another number of connections that this node takes.
    pub fn set_connections_max(&self, connections_max: usize) {
        self.connections_max.store(connections_max, Ordering::Relaxed);
    }

    /// Announces a change of the condition at once.
    pub fn announce_now(&self) {
        self.changed.notify_one();
    }

    /// Waits until this node has announced itself after this call, and so knows the others as they
    /// are now; at most for 0.5 s. Cancel-safe.
    pub async fn refresh(&self) {
        let (before, mut announced) =
            (self.begun.load(Ordering::Acquire), self.announced.subscribe());
        self.announce_now();
        let _ = timeout(STOP_TIMEOUT, announced.wait_for(|number| *number > before)).await;
    }

    /// The time since the start of this node.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Announces this node until it [withdraws](ClusterNodes::withdraw) or `stopped` is cancelled.
    /// `state` returns its condition and the number of its connections.
    pub async fn announce_until(
        &self,
        stopped: CancellationToken,
        state: impl Fn() -> (NodeCondition, usize),
    ) {
        while !self.withdrawing.is_cancelled() {
            let (condition, connections) = state();
            if let Err(error) = self.announce(condition, connections as u64, None).await {
                tracing::debug!(%error, "cannot announce this node to the others");
            }
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => return,
                () = self.withdrawing.cancelled() => {}
                () = self.changed.notified() => {}
                () = until_changed(connections, &state) => {}
                () = tokio::time::sleep(ANNOUNCE_INTERVAL) => {}
            }
        }
        // Behind the last announcement, which would bring it back.
        let returning = *self.returning.lock();
        let withdraw = async {
            match returning {
                Some((clients, after)) => {
                    self.announce(NodeCondition::Draining, clients, Some(after)).await
                }
                None => self.registry.withdraw().await,
            }
        };
        let withdrawn = timeout(STOP_TIMEOUT, withdraw).await;
        if !matches!(withdrawn, Ok(Ok(()))) {
            tracing::debug!("cannot withdraw the announcement of this node");
        }
        self.withdrawn.cancel();
        stopped.cancelled().await;
    }

    async fn announce(
        &self,
        condition: NodeCondition,
        connections: u64,
        returning: Option<Duration>,
    ) -> Result<(), BusError> {
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let announcement = NodeAnnouncement {
            node: self.own.id.clone(),
            condition,
            connections: connections.max(self.expected_clients()),
            connections_max: self.connections_max.load(Ordering::Relaxed) as u64,
            intake_per_second: self.own.intake_per_second,
            route: self.own_route(),
            returning_ms: returning.map(|after| after.as_millis() as u64),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            version: crate::version::VERSION.to_owned(),
            schema: skein_redis::SCHEMA,
        };
        let announced = timeout(ANNOUNCE_TIMEOUT, self.registry.announce(announcement)).await;
        let Announcements { nodes, returning } = announced.unwrap_or(Err(BusError::Unavailable))?;
        if let Some((clients, after)) = returning {
            *self.expected.lock() = Some((clients, Instant::now() + after));
            self.announce_now();
        }
        *self.nodes.lock() = (nodes, Some(Instant::now()));
        self.announced.send_replace(number);
        Ok(())
    }

    /// The number of clients that are expected back, so that others do not take this node for an
    /// empty one.
    fn expected_clients(&self) -> u64 {
        let expected = &mut *self.expected.lock();
        match *expected {
            Some((clients, until)) if Instant::now() < until => clients,
            _ => {
                *expected = None;
                0
            }
        }
    }

    /// Announces, when this node withdraws, that it will be back with so many clients within
    /// `after`.
    pub fn expect_return(&self, clients: u64, after: Duration) {
        *self.returning.lock() = Some((clients, after + RETURN_MARGIN));
    }

    /// Removes the announcement of this node, which stops, so that it does not count as missing.
    /// Takes at most as long as an announcement and a withdrawal.
    pub async fn withdraw(&self) {
        self.withdrawing.cancel();
        let _ = timeout(ANNOUNCE_TIMEOUT + STOP_TIMEOUT, self.withdrawn.cancelled()).await;
    }
}

/// Resolves when the number of connections differs by a tenth, and more than a few, from the one
/// that was announced.
async fn until_changed(announced: usize, state: &impl Fn() -> (NodeCondition, usize)) {
    loop {
        tokio::time::sleep(CHANGE_CHECK_INTERVAL).await;
        if state().1.abs_diff(announced) > 10 + announced / 10 {
            return;
        }
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
