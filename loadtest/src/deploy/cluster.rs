//! A local cluster whose gateways are started and stopped one by one: Redis, nginx with a slot for
//! each address, and gateways in some of the slots.

use std::{collections::VecDeque, io, net::SocketAddr, path::Path};

use skein_testkit::servers::{self, ServerError, ServerProcess, free_address};
use tempfile::TempDir;

use crate::{monitor, report::servers::gauges};

/// An address of a gateway.
#[derive(Debug)]
struct Slot {
    listen: SocketAddr,
    admin: SocketAddr,
    process: Option<ServerProcess>,
}

/// The cluster.
#[derive(Debug)]
pub(super) struct SlotCluster {
    redis: ServerProcess,
    redis_address: SocketAddr,
    nginx: ServerProcess,
    nginx_address: SocketAddr,
    slots: Vec<Slot>,
    /// The slots with a gateway, the one started first at the front.
    running: VecDeque<usize>,
    /// Further options of the gateways.
    options: Vec<String>,
    // Last, so that it outlives the processes that write into it.
    scratch: TempDir,
}

impl SlotCluster {
    /// Starts Redis, nginx for `slots` addresses, and `running` gateways with further `options`.
    pub(super) async fn start(
        gateway: &Path,
        render: &Path,
        slots: usize,
        running: usize,
        options: Vec<String>,
    ) -> Result<Self, ServerError> {
        let scratch = TempDir::new()?;
        let redis_address = free_address()?;
        let redis = servers::start_redis(redis_address, scratch.path(), &[]).await?;
        let slot = |_| -> io::Result<Slot> {
            Ok(Slot { listen: free_address()?, admin: free_address()?, process: None })
        };
        let slots: Vec<Slot> = (0..slots).map(slot).collect::<Result<_, _>>()?;
        let nginx_address = free_address()?;
        let listens = slots.iter().map(|slot| slot.listen);
        let nginx = servers::start_nginx(render, nginx_address, listens, 1, scratch.path()).await?;
        let running_slots = VecDeque::new();
        let mut cluster = Self {
            redis,
            redis_address,
            nginx,
            nginx_address,
            slots,
            running: running_slots,
            options,
            scratch,
        };
        for slot in 0..running {
            cluster.start_gateway(gateway, slot).await?;
        }
        Ok(cluster)
    }

    /// The URL of nginx.
    pub(super) fn url(&self) -> String {
        format!("ws://{}/ws", self.nginx_address)
    }

    /// A slot without a gateway.
    pub(super) fn spare(&self) -> Option<usize> {
        (0..self.slots.len()).find(|slot| !self.running.contains(slot))
    }

    /// The gateways, the one started first at the front.
    pub(super) fn running(&self) -> Vec<usize> {
        self.running.iter().copied().collect()
    }

    /// Starts a gateway in a slot, and waits until it is ready.
    pub(super) async fn start_gateway(
        &mut self,
        program: &Path,
        number: usize,
    ) -> Result<(), ServerError> {
        let slot = &mut self.slots[number];
        let options = [
            format!("node.id=slot-{number}"),
            format!("admin.listen={}", slot.admin),
            "drain.delay=200ms".to_owned(),
            // All clients have the same address.
            "limits.connections_per_ip=0".to_owned(),
            "limits.handshakes_per_minute_per_ip=0".to_owned(),
        ];
        let options = [&options[..], &self.options].concat();
        let redis = format!("redis://{}", self.redis_address);
        let (name, scratch) = (format!("gateway-{number}"), self.scratch.path());
        let process =
            servers::start_gateway(&name, program, slot.listen, &redis, &options, scratch)?;
        process.wait_until_ready(slot.listen).await?;
        slot.process = Some(process);
        self.running.push_back(number);
        Ok(())
    }

    /// Sends a gateway SIGTERM, and waits until it has ended.
    pub(super) async fn stop_gateway(&mut self, number: usize) {
        self.running.retain(|running| *running != number);
        if let Some(mut process) = self.slots[number].process.take() {
            process.stop().await;
        }
    }

    /// The number of connections of each running gateway, in the order of the slots.
    pub(super) async fn connections(&self) -> Vec<u64> {
        let mut counts = Vec::new();
        for (number, slot) in self.slots.iter().enumerate() {
            if self.running.contains(&number) {
                let url = format!("http://{}/metrics", slot.admin);
                let page = tokio::task::spawn_blocking(move || monitor::fetch(&url)).await;
                let page = page.ok().and_then(Result::ok).unwrap_or_default();
                let count = gauges(&page).remove("gateway_connections");
                counts.push(count.unwrap_or_default() as u64);
            }
        }
        counts
    }

    /// Stops all processes: gateways first, while Redis is there for their departure.
    pub(super) async fn stop(mut self) {
        for slot in &self.slots {
            if let Some(process) = &slot.process {
                process.signal("TERM").await;
            }
        }
        for slot in &mut self.slots {
            if let Some(process) = &mut slot.process {
                process.stop().await;
            }
        }
        self.nginx.stop().await;
        self.redis.stop().await;
    }
}

impl Drop for SlotCluster {
    fn drop(&mut self) {
        // SIGKILL, which the other processes get, would leave nginx' worker behind.
        self.nginx.stop_blocking();
    }
}
