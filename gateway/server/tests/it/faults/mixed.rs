//! Faults of every kind, one after the other and two at once, by the roll of a die whose seed is
//! printed: `SKEIN_SEED` plays it again, as far as real processes allow.

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

/// What a fault does; all are over when it has been done.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillNode(usize),
    EndNode(usize),
    Freeze(usize, u64),
    FreezeRedis(u64),
    Link(usize, Mode, u64),
    KillRedis,
    KillRedisAndNode(usize),
    KillRedisWhileFrozen(usize, u64),
    KillRedisWhileLinkFails(usize, Mode, u64),
    ThrowOut(&'static str),
}

struct Cluster {
    redis: Redis,
    proxies: Vec<Proxy>,
    nodes: Vec<Node>,
}

fn roll(die: &mut StdRng) -> Fault {
    let node = die.random_range(0..NODES);
    // Some shorter than anybody notices, some longer than a lease.
    let ms = match die.random_range(0..10) {
        0 => die.random_range(9_000..13_000),
        1..4 => die.random_range(2_000..6_000),
        _ => die.random_range(10..1_500),
    };
    let modes =
        [Mode::Cut, Mode::BlackHole, Mode::HoldRequests, Mode::HoldResponses, Mode::DropResponses];
    let mode = modes[die.random_range(0..modes.len())];
    match die.random_range(0..10) {
        0 => Fault::KillNode(node),
        1 => Fault::EndNode(node),
        2 => Fault::Freeze(node, ms),
        3 => Fault::FreezeRedis(ms),
        4 => Fault::Link(node, mode, ms),
        5 => Fault::KillRedisAndNode(node),
        6 => Fault::KillRedisWhileFrozen(node, ms),
        7 => Fault::KillRedisWhileLinkFails(node, mode, ms),
        8 => Fault::ThrowOut(if ms % 2 == 0 { "pubsub" } else { "normal" }),
        _ => Fault::KillRedis,
    }
}

async fn pause(ms: u64) {
    sleep_until(Instant::now() + Duration::from_millis(ms)).await;
}

impl Cluster {
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

    async fn suffer(&mut self, fault: Fault) {
        match fault {
            Fault::KillNode(at) => {
                self.nodes[at].process.kill().await;
                self.restart_node(at).await;
            }
            Fault::EndNode(at) => {
                self.nodes[at].process.signal("TERM");
                assert_eq!(self.nodes[at].process.end().await, Some(0));
                self.restart_node(at).await;
            }
            Fault::Freeze(at, ms) => {
                self.nodes[at].process.signal("STOP");
                pause(ms).await;
                self.nodes[at].process.signal("CONT");
            }
            Fault::FreezeRedis(ms) => {
                self.redis.signal("STOP");
                pause(ms).await;
                self.redis.signal("CONT");
            }
            Fault::Link(at, mode, ms) => {
                self.proxies[at].set(mode);
                pause(ms).await;
                self.proxies[at].set(Mode::Open);
            }
            Fault::KillRedis => self.restart_redis().await,
            Fault::KillRedisAndNode(at) => {
                self.nodes[at].process.kill().await;
                self.restart_redis().await;
                self.restart_node(at).await;
            }
            Fault::KillRedisWhileFrozen(at, ms) => {
                self.nodes[at].process.signal("STOP");
                pause(ms / 2).await;
                self.restart_redis().await;
                pause(ms / 2).await;
                self.nodes[at].process.signal("CONT");
            }
            Fault::KillRedisWhileLinkFails(at, mode, ms) => {
                self.proxies[at].set(mode);
                pause(ms / 2).await;
                self.restart_redis().await;
                pause(ms / 2).await;
                self.proxies[at].set(Mode::Open);
            }
            Fault::ThrowOut(kind) => {
                self.redis.command(&format!("CLIENT KILL TYPE {kind}")).await;
            }
        }
    }
}

async fn mix(redis: Redis, faults: usize, salt: u64, what: &str) {
    let seed = std::env::var("SKEIN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::rng().random());
    println!("{what}: SKEIN_SEED={seed}");
    let mut die = StdRng::seed_from_u64(seed ^ salt);
    let mut cluster = Cluster::start(redis).await;
    let addresses: Vec<_> = cluster.nodes.iter().map(|node| node.address).collect();
    let mut profiles = default_profiles(&addresses);
    for profile in &mut profiles {
        profile.schedule = SendSchedule::AfterAck(Duration::from_millis(10));
    }
    let clients = TestClients::with_profiles(profiles).await.unwrap();
    for number in 0..faults {
        clients.wait_for_acks(die.random_range(1..200)).await.unwrap();
        let fault = roll(&mut die);
        cluster.suffer(fault).await;
        // Every other time the next one comes before this one is mended.
        if die.random_range(0..2) == 0 {
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
    mix(Redis::start_durable().await, length(8, 60), 1, "Redis with its file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_faults_with_a_volatile_redis_lose_nothing_unsignalled() {
    mix(Redis::start().await, length(8, 60), 2, "Redis empty after a restart").await;
}
