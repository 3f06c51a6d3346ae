//! Faults around the nodes, with real processes: clients miss no acknowledged message, or receive a
//! signalled discontinuity. `docs/faults.md` has the table.
//!
//! [`checker`] judges the frames that clients receive; [`proxy`] injects link faults. `make test`
//! runs short trials; `make test-full` sets `SKEIN_FAULTS=full`, for those at full length.

use std::{net::SocketAddr, time::Duration};

use skein_redis::LEASE;
use skein_testkit::{
    checker::{self, client, clients, report},
    proxy,
};

use crate::harness::{Node, Redis, SHORT_LEASE, SHORT_LEASE_OPTION, get, until};

mod delivery_checker;
mod nodes;
mod frozen;
mod redis_server;
mod gateway_and_redis;
mod links;
mod slow;
mod sends;
mod reload;
mod deleted;
mod presence;
mod one_user;
mod mixed;
mod independent_checker;

/// Options of nodes without rate limits.
const UNLIMITED: [(&str, &str); 2] =
    [("limits.messages_per_second", "0"), ("limits.frames_per_second", "0")];

/// Whether trials have their full length.
pub fn is_full() -> bool {
    std::env::var("SKEIN_FAULTS").is_ok_and(|value| value == "full")
}

/// `full` if trials have their full length, else `short`.
fn length<T>(short: T, full: T) -> T {
    if is_full() { full } else { short }
}

async fn start_nodes(redis: &Redis, count: usize) -> Vec<Node> {
    start_nodes_with(redis, count, &UNLIMITED).await
}

/// As [`start_nodes`], for a trial that waits for the end of a lease: at full length the default
/// lease, else a short one, with a publish timeout below it as by default.
async fn start_nodes_with_lease(redis: &Redis, count: usize) -> Vec<Node> {
    let times = [lease_option(), length(("publish.timeout", "2s"), ("publish.timeout", "5s"))];
    start_nodes_with(redis, count, &[&UNLIMITED[..], &times].concat()).await
}

async fn start_nodes_with(redis: &Redis, count: usize, options: &[(&str, &str)]) -> Vec<Node> {
    let mut nodes = vec![];
    for _ in 0..count {
        nodes.push(Node::start(redis, None, options).await);
    }
    nodes
}

/// The lease of a trial that waits for its end.
fn lease() -> Duration {
    length(SHORT_LEASE, LEASE)
}

fn lease_option() -> (&'static str, &'static str) {
    length(SHORT_LEASE_OPTION, ("cluster.lease", "10s"))
}

fn addresses(nodes: &[Node]) -> Vec<SocketAddr> {
    nodes.iter().map(|node| node.address).collect()
}

async fn ready(node: SocketAddr) -> bool {
    get(node, "/ready").await.status == 200
}

async fn until_ready(nodes: &[Node]) {
    for node in nodes {
        until("ready", async || ready(node.address).await).await;
    }
}

/// A metric of a node; 0 if its labels have no value yet.
async fn metric(node: &Node, name: &str) -> f64 {
    let metrics = get(node.admin, "/metrics").await.body;
    let family = name.split('{').next().unwrap();
    assert!(metrics.contains(family) || name.contains("{"), "no {name} in {metrics}");
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// Resident memory of a node, in bytes.
fn resident_bytes(node: &Node) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Upper bound for the time without a delivery of clients that a fault does not affect.
const SHORT: Duration = Duration::from_secs(2);
