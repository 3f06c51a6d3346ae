//! A cluster that somebody else runs: what can be done to it without starting anything again.

use std::{io, net::SocketAddr, time::Duration};

use loadtest::proxy::{Mode, Proxy};
use tokio::{net::lookup_host, time::sleep};

use super::{
    cluster::{ClusterError, signal, tell},
    plan::{Fault, Kind},
};
use crate::args::{GivenArgs, Target};

/// Its parts, as far as they are known.
#[derive(Debug)]
pub(crate) struct Given {
    /// One before each URL.
    proxies: Vec<Proxy>,
    paths: Vec<String>,
    gateways: Vec<u32>,
    redis: Option<SocketAddr>,
}

impl Given {
    /// Puts a proxy before each URL.
    pub(crate) async fn new(args: &GivenArgs) -> Result<Self, ClusterError> {
        let (mut proxies, mut paths) = (Vec::new(), Vec::new());
        for Target { authority, path } in &args.url {
            let mut addresses = lookup_host(authority).await?;
            let address = addresses.next().ok_or(io::Error::from(io::ErrorKind::NotFound))?;
            proxies.push(Proxy::to(address).await?);
            paths.push(path.clone());
        }
        Ok(Self { proxies, paths, gateways: args.gateway_pid.clone(), redis: args.redis })
    }

    /// Where members connect.
    pub(crate) fn urls(&self) -> Vec<String> {
        let both = self.proxies.iter().zip(&self.paths);
        both.map(|(proxy, path)| format!("ws://{}{path}", proxy.address)).collect()
    }

    /// How many gateways may be picked.
    pub(crate) fn nodes(&self) -> usize {
        self.proxies.len().max(self.gateways.len())
    }

    /// What can be done to it.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        let mut kinds = vec![Kind::ClientCut, Kind::ClientBlackHole, Kind::ClientDelay];
        if !self.gateways.is_empty() {
            kinds.push(Kind::GatewayStop);
        }
        if self.redis.is_some() {
            kinds.extend([Kind::RedisClientKillPubsub, Kind::RedisClientKillNormal]);
        }
        kinds
    }

    /// Does one fault, and mends it.
    pub(crate) async fn inject(&self, fault: Fault) {
        let lasts = Duration::from_millis(fault.lasts_ms);
        let clients = async |mode| {
            let proxy = &self.proxies[fault.node % self.proxies.len()];
            proxy.set(mode);
            sleep(lasts).await;
            proxy.set(Mode::Open);
        };
        match fault.kind {
            Kind::ClientCut => clients(Mode::Cut).await,
            Kind::ClientBlackHole => clients(Mode::BlackHole).await,
            Kind::ClientDelay => clients(Mode::Delay(super::CLIENT_DELAY)).await,
            Kind::GatewayStop => {
                let pid = self.gateways[fault.node % self.gateways.len()];
                signal(pid, "STOP").await;
                sleep(lasts).await;
                signal(pid, "CONT").await;
            }
            Kind::RedisClientKillPubsub => self.tell_redis("CLIENT KILL TYPE pubsub").await,
            Kind::RedisClientKillNormal => self.tell_redis("CLIENT KILL TYPE normal").await,
            // Not among `kinds`.
            _ => {}
        }
    }

    /// Opens all ways and has all gateways go on, whatever was under way.
    pub(crate) async fn mend(&self) {
        self.proxies.iter().for_each(|proxy| proxy.set(Mode::Open));
        for pid in &self.gateways {
            signal(*pid, "CONT").await;
        }
    }

    async fn tell_redis(&self, command: &str) {
        if let Some(address) = self.redis {
            tell(address, command).await;
        }
    }
}
