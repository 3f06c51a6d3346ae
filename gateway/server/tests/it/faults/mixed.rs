//! Random faults of every kind, one after the other and two at once. The seed is printed;
//! `SKEIN_SEED` repeats a run as far as real processes allow.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{Instant, sleep_until};

use super::{
    UNLIMITED,
    client::SendSchedule,
    clients::{TestClients, default_profiles},
    length,
    proxy::{Mode, Proxy},
    until_ready,
};
use crate::harness::{Node, Redis};

const NODES: usize = 3;

/// A fault. Each has ended when its injection returns.
#[derive(Clone, Copy, Debug)]
enum MixedFault {
    KillNode(usize),
    EndNode(usize),
    Freeze(usize, u64),
    FreezeRedis(u64),
    Link(usize, Mode, u64),
    KillRedis,
    KillRedisAndNode(usize),
    KillRedisWhileFrozen(usize, u64),
    KillRedisWhileLinkFails(usize, Mode, u64),
    KillConnections(&'static str),
}

struct ProxiedCluster {
    redis: Redis,
    proxies: Vec<Proxy>,
    nodes: Vec<Node>,
}

fn random_fault(rng: &mut StdRng) -> MixedFault {
    let node = rng.random_range(0..NODES);
    // Some are too short to be noticed, some longer than a lease.
    let ms = match rng.random_range(0..10) {
        0 => rng.random_range(9_000..13_000),
        1..4 => rng.random_range(2_000..6_000),
        _ => rng.random_range(10..1_500),
    };
    let modes =
        [Mode::Cut, Mode::BlackHole, Mode::HoldRequests, Mode::HoldResponses, Mode::DropResponses];
    let mode = modes[rng.random_range(0..modes.len())];
    match rng.random_range(0..10) {
        0 => MixedFault::KillNode(node),
        1 => MixedFault::EndNode(node),
        2 => MixedFault::Freeze(node, ms),
        3 => MixedFault::FreezeRedis(ms),
        4 => MixedFault::Link(node, mode, ms),
        5 => MixedFault::KillRedisAndNode(node),
        6 => MixedFault::KillRedisWhileFrozen(node, ms),
        7 => MixedFault::KillRedisWhileLinkFails(node, mode, ms),
        8 => MixedFault::KillConnections(if ms % 2 == 0 { "pubsub" } else { "normal" }),
        _ => MixedFault::KillRedis,
    }
}

async fn pause(ms: u64) {
    sleep_until(Instant::now() + Duration::from_millis(ms)).await;
}

impl ProxiedCluster {
    async fn start(redis: Redis) -> Self {
        let mut cluster = Self { redis, proxies: vec![], nodes: vec![] };
        for at in 0..NODES {
            cluster.proxies.push(Proxy::to(cluster.redis.address()).await.unwrap());
            let node = cluster.start_node(at, None).await;
            cluster.nodes.push(node);
        }
        cluster
    }

    async fn start_node(&self, at: usize, listen: Option<std::net::SocketAddr>) -> Node {
        let url = self.proxies[at].redis_url();
        let extra = [&UNLIMITED[..], &[("cluster.redis_url", url.as_str())]].concat();
        Node::start(&self.redis, listen, &extra).await
    }

    async fn restart_node(&mut self, at: usize) {
        let address = self.nodes[at].address;
        self.nodes[at] = self.start_node(at, Some(address)).await;
    }

    async fn restart_redis(&mut self) {
        self.redis.kill().await;
        self.redis.restart().await;
    }

    async fn inject(&mut self, fault: MixedFault) {
        match fault {
            MixedFault::KillNode(at) => {
                self.nodes[at].process.kill().await;
                self.restart_node(at).await;
            }
            MixedFault::EndNode(at) => {
                self.nodes[at].process.signal("TERM");
                assert_eq!(self.nodes[at].process.end().await, Some(0));
                self.restart_node(at).await;
            }
            MixedFault::Freeze(at, ms) => {
                self.nodes[at].process.signal("STOP");
                pause(ms).await;
                self.nodes[at].process.signal("CONT");
            }
            MixedFault::FreezeRedis(ms) => {
                self.redis.signal("STOP");
                pause(ms).await;
                self.redis.signal("CONT");
            }
            MixedFault::Link(at, mode, ms) => {
                self.proxies[at].set(mode);
                pause(ms).await;
                self.proxies[at].set(Mode::Open);
            }
            MixedFault::KillRedis => self.restart_redis().await,
            MixedFault::KillRedisAndNode(at) => {
                self.nodes[at].process.kill().await;
                self.restart_redis().await;
                self.restart_node(at).await;
            }
            MixedFault::KillRedisWhileFrozen(at, ms) => {
                self.nodes[at].process.signal("STOP");
                pause(ms / 2).await;
                self.restart_redis().await;
                pause(ms / 2).await;
                self.nodes[at].process.signal("CONT");
            }
            MixedFault::KillRedisWhileLinkFails(at, mode, ms) => {
                self.proxies[at].set(mode);
                pause(ms / 2).await;
                self.restart_redis().await;
                pause(ms / 2).await;
                self.proxies[at].set(Mode::Open);
            }
            MixedFault::KillConnections(kind) => {
                self.redis.command(&format!("CLIENT KILL TYPE {kind}")).await;
            }
        }
    }
}

async fn run_mixed_faults(redis: Redis, faults: usize, salt: u64, what: &str) {
    let seed = std::env::var("SKEIN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::rng().random());
    println!("{what}: SKEIN_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed ^ salt);
    let mut cluster = ProxiedCluster::start(redis).await;
    let addresses: Vec<_> = cluster.nodes.iter().map(|node| node.address).collect();
    let mut profiles = default_profiles(&addresses);
    for profile in &mut profiles {
        profile.schedule = SendSchedule::AfterAck(Duration::from_millis(10));
    }
    let clients = TestClients::with_profiles(profiles).await.unwrap();
    for number in 0..faults {
        clients.wait_for_acks(rng.random_range(1..200)).await.unwrap();
        let fault = random_fault(&mut rng);
        cluster.inject(fault).await;
        // Every other time the next fault begins before the nodes have recovered.
        if rng.random_range(0..2) == 0 {
            until_ready(&cluster.nodes).await;
        }
        let wrong = clients.checker.lock().examples().to_vec();
        assert!(wrong.is_empty(), "fault {number} of seed {seed}, {fault:?}: {wrong:?}");
    }
    until_ready(&cluster.nodes).await;
    let report = clients.finish().await.unwrap();
    report.check(&format!("{faults} faults mixed, {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_faults_with_a_durable_redis_lose_nothing_unsignalled() {
    run_mixed_faults(Redis::start_durable().await, length(8, 60), 1, "Redis with its file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_faults_with_a_volatile_redis_lose_nothing_unsignalled() {
    run_mixed_faults(Redis::start().await, length(8, 60), 2, "Redis empty after a restart").await;
}
