//! A local cluster: Redis, gateways, nginx and the links between them, as processes of this
//! machine.
//!
//! Each process has ports of its own, is signalled by its pid, and ends with the cluster.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use skein_testkit::{
    proxy::Proxy,
    servers::{self, ServerError, ServerProcess, free_address},
};
use tempfile::TempDir;

/// Paths of the programs.
#[derive(Clone, Debug)]
pub(crate) struct ClusterPrograms {
    /// The gateway.
    pub(crate) gateway: PathBuf,
    /// The script that renders nginx' configuration.
    pub(crate) render: PathBuf,
}

/// A gateway with proxies on its links.
#[derive(Debug)]
pub(crate) struct ClusterNode {
    process: ServerProcess,
    listen: SocketAddr,
    /// Between the gateway and Redis.
    pub(crate) bus: Proxy,
    /// Between the gateway and clients that bypass nginx.
    pub(crate) clients: Proxy,
}

/// Redis, gateways and nginx.
#[derive(Debug)]
pub(crate) struct LocalCluster {
    programs: ClusterPrograms,
    redis: ServerProcess,
    redis_address: SocketAddr,
    pub(crate) nodes: Vec<ClusterNode>,
    nginx: ServerProcess,
    nginx_address: SocketAddr,
    // Last, so that it outlives the processes that write into it.
    scratch: TempDir,
}

impl LocalCluster {
    /// Starts Redis with an append-only file, `nodes` gateways, and nginx.
    pub(crate) async fn start(
        programs: ClusterPrograms,
        nodes: usize,
    ) -> Result<Self, ServerError> {
        let scratch = TempDir::new()?;
        let redis_address = free_address()?;
        let redis = start_redis(redis_address, scratch.path()).await?;
        let mut started = Vec::new();
        for number in 0..nodes {
            let listen = free_address()?;
            let bus = Proxy::to(redis_address).await?;
            let clients = Proxy::to(listen).await?;
            let process = start_gateway(&programs, number, listen, &bus, scratch.path())?;
            started.push(ClusterNode { process, listen, bus, clients });
        }
        let nginx_address = free_address()?;
        let listens = started.iter().map(|node| node.listen);
        let (render, folder) = (&programs.render, scratch.path());
        let nginx = servers::start_nginx(render, nginx_address, listens, 1, folder).await?;
        let cluster =
            Self { programs, redis, redis_address, nodes: started, nginx, nginx_address, scratch };
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// URLs for clients, in turn: nginx, then each gateway directly.
    pub(crate) fn urls(&self) -> Vec<String> {
        let direct = self.nodes.iter().map(|node| node.clients.address);
        let all = std::iter::once(self.nginx_address).chain(direct);
        all.map(|address| format!("ws://{address}/ws")).collect()
    }

    /// Waits until every gateway is ready.
    pub(crate) async fn wait_until_ready(&self) -> Result<(), ServerError> {
        for node in &self.nodes {
            node.process.wait_until_ready(node.listen).await?;
        }
        Ok(())
    }

    /// Sends a signal to a gateway.
    pub(crate) async fn signal_gateway(&self, node: usize, signal: &str) {
        self.nodes[node].process.signal(signal).await;
    }

    /// Stops a gateway, by SIGKILL or gracefully, and starts it again.
    pub(crate) async fn restart_gateway(
        &mut self,
        number: usize,
        kill: bool,
    ) -> Result<(), ServerError> {
        let node = &mut self.nodes[number];
        if kill {
            node.process.kill().await;
        } else {
            node.process.stop().await;
        }
        let scratch = self.scratch.path();
        node.process = start_gateway(&self.programs, number, node.listen, &node.bus, scratch)?;
        Ok(())
    }

    /// Sends a signal to Redis.
    pub(crate) async fn signal_redis(&self, signal: &str) {
        self.redis.signal(signal).await;
    }

    /// Stops Redis, by SIGKILL or gracefully, and starts it again, with its file or `empty`.
    pub(crate) async fn restart_redis(
        &mut self,
        kill: bool,
        empty: bool,
    ) -> Result<(), ServerError> {
        if kill {
            self.redis.kill().await;
        } else {
            self.redis.stop().await;
        }
        if empty {
            let files = self.scratch.path().join("appendonlydir");
            match std::fs::remove_dir_all(files) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        self.redis = start_redis(self.redis_address, self.scratch.path()).await?;
        Ok(())
    }

    /// Sends an inline command to Redis, which may not answer.
    pub(crate) async fn send_redis_command(&self, command: &str) {
        servers::send_redis_command(self.redis_address, command).await;
    }

    /// Makes nginx reload its configuration.
    pub(crate) async fn reload_nginx(&self) {
        self.nginx.signal("HUP").await;
    }

    /// Stops all processes: gateways first, while Redis is there for their departure.
    pub(crate) async fn stop(mut self) {
        for node in &self.nodes {
            node.process.signal("TERM").await;
        }
        for node in &mut self.nodes {
            node.process.stop().await;
        }
        self.nginx.stop().await;
        self.redis.stop().await;
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        // SIGKILL, which the other processes get, would leave nginx' worker behind.
        self.nginx.stop_blocking();
    }
}

async fn start_redis(address: SocketAddr, scratch: &Path) -> Result<ServerProcess, ServerError> {
    // Every write is in the file before it is answered, so that acknowledged data survives a
    // SIGKILL.
    servers::start_redis(address, scratch, &["--appendonly", "yes", "--appendfsync", "always"])
        .await
}

fn start_gateway(
    programs: &ClusterPrograms,
    number: usize,
    listen: SocketAddr,
    bus: &Proxy,
    scratch: &Path,
) -> Result<ServerProcess, ServerError> {
    let options = [
        "drain.delay=200ms",
        // All clients have the same address.
        "limits.connections_per_ip=0",
        "limits.handshakes_per_minute_per_ip=0",
        "limits.connections_per_user=0",
        "limits.durable_bytes_per_minute=0",
        "limits.new_inboxes_per_hour=0",
        "limits.new_rooms_per_minute=0",
    ];
    let (name, options) = (format!("gateway-{number}"), options.map(str::to_owned));
    servers::start_gateway(&name, &programs.gateway, listen, &bus.redis_url(), &options, scratch)
}
