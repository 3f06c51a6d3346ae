//! An external cluster: faults are injected without restarting its processes.

use std::{io, net::SocketAddr, time::Duration};

use skein_testkit::{
    proxy::{Mode, Proxy},
    servers::{self, ServerError, send_signal},
};
use tokio::{net::lookup_host, time::sleep};

use super::plan::{CLIENT_DELAY, FaultKind, PlannedFault};
use crate::args::{ExternalArgs, ServerUrl};

/// The parts of the cluster that faults can be injected into.
#[derive(Debug)]
pub(crate) struct ExternalCluster {
    /// One for each URL.
    proxies: Vec<Proxy>,
    /// Scheme and path of each URL.
    paths: Vec<(&'static str, String)>,
    gateways: Vec<u32>,
    redis: Option<SocketAddr>,
}

impl ExternalCluster {
    /// Starts a proxy in front of each URL.
    pub(crate) async fn new(args: &ExternalArgs) -> Result<Self, ServerError> {
        let (mut proxies, mut paths) = (Vec::new(), Vec::new());
        for url @ ServerUrl { authority, path, .. } in &args.url {
            let mut addresses = lookup_host(authority).await?;
            let address = addresses.next().ok_or(io::Error::from(io::ErrorKind::NotFound))?;
            proxies.push(Proxy::to(address).await?);
            paths.push((url.scheme(), path.clone()));
        }
        Ok(Self { proxies, paths, gateways: args.gateway_pid.clone(), redis: args.redis })
    }

    /// URLs for clients.
    pub(crate) fn urls(&self) -> Vec<String> {
        let both = self.proxies.iter().zip(&self.paths);
        both.map(|(proxy, (scheme, path))| format!("{scheme}://{}{path}", proxy.address)).collect()
    }

    /// Number of gateways to choose from.
    pub(crate) fn nodes(&self) -> usize {
        self.proxies.len().max(self.gateways.len())
    }

    /// Kinds of faults that can be injected.
    pub(crate) fn kinds(&self) -> Vec<FaultKind> {
        let mut kinds =
            vec![FaultKind::ClientCut, FaultKind::ClientBlackHole, FaultKind::ClientDelay];
        if !self.gateways.is_empty() {
            kinds.push(FaultKind::GatewayStop);
        }
        if self.redis.is_some() {
            kinds.extend([FaultKind::RedisClientKillPubsub, FaultKind::RedisClientKillNormal]);
        }
        kinds
    }

    /// Injects one fault and ends it.
    pub(crate) async fn inject(&self, fault: PlannedFault) {
        let duration = Duration::from_millis(fault.duration_ms);
        let clients = async |mode| {
            let proxy = &self.proxies[fault.node % self.proxies.len()];
            proxy.set(mode);
            sleep(duration).await;
            proxy.set(Mode::Open);
        };
        match fault.kind {
            FaultKind::ClientCut => clients(Mode::Cut).await,
            FaultKind::ClientBlackHole => clients(Mode::BlackHole).await,
            FaultKind::ClientDelay => clients(Mode::Delay(CLIENT_DELAY)).await,
            FaultKind::GatewayStop => {
                let pid = self.gateways[fault.node % self.gateways.len()];
                send_signal(pid, "STOP").await;
                sleep(duration).await;
                send_signal(pid, "CONT").await;
            }
            FaultKind::RedisClientKillPubsub => {
                self.send_redis_command("CLIENT KILL TYPE pubsub").await;
            }
            FaultKind::RedisClientKillNormal => {
                self.send_redis_command("CLIENT KILL TYPE normal").await;
            }
            // Not among `kinds`.
            _ => {}
        }
    }

    /// Reopens all links and continues all gateways, even if a fault was interrupted.
    pub(crate) async fn recover(&self) {
        self.proxies.iter().for_each(|proxy| proxy.set(Mode::Open));
        for pid in &self.gateways {
            send_signal(*pid, "CONT").await;
        }
    }

    async fn send_redis_command(&self, command: &str) {
        if let Some(address) = self.redis {
            servers::send_redis_command(address, command).await;
        }
    }
}
