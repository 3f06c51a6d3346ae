//! A gateway is killed or terminated: its clients continue elsewhere, the others notice nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    SHORT, UNLIMITED, addresses, clients::TestClients, lease_option, length, metric, ready,
    start_nodes, until_ready,
};
use crate::harness::{Node, Redis, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_loses_nothing() {
    let redis = Redis::start().await;
    let mut nodes = start_nodes(&redis, 3).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    let kills = length(1, 10);
    for kill in 0..kills {
        clients.wait_for_acks(200).await.unwrap();
        let at = kill % nodes.len();
        nodes[at].process.kill().await;
        clients.wait_for_acks(300).await.unwrap();
        if kill + 1 < kills {
            let address = nodes[at].address;
            nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
        }
    }
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("{kills} x gateway SIGKILL"));
    // Clients of the other nodes received messages all the time.
    if kills == 1 {
        for reader in [1, 2, 4, 5] {
            assert_eq!(report.connections[reader], 1);
            assert!(report.silences[reader] < SHORT, "{:?}", report.silences);
        }
    }
    assert!(report.connections.iter().sum::<usize>() > report.clients);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_node_sends_its_clients_elsewhere() {
    let redis = Redis::start().await;
    let mut nodes = start_nodes(&redis, 3).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    let rounds = length(1, 6);
    for round in 0..rounds {
        clients.wait_for_acks(200).await.unwrap();
        let at = round % nodes.len();
        let address = nodes[at].address;
        nodes[at].process.signal("TERM");
        let gone = nodes.remove(at);
        let (code, said) = gone.end().await;
        assert_eq!(code, Some(0), "{said}");
        clients.wait_for_acks(200).await.unwrap();
        nodes.insert(at, Node::start(&redis, Some(address), &UNLIMITED).await);
    }
    until_ready(&nodes).await;
    clients.run_for(Duration::from_millis(200)).await;
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("{rounds} x gateway SIGTERM"));
    if rounds == 1 {
        for reader in [1, 2, 4, 5] {
            assert_eq!(report.connections[reader], 1);
            assert!(report.silences[reader] < SHORT, "{:?}", report.silences);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_restarted_after_a_kill_waits_for_no_lease_of_its_own() {
    let redis = Redis::start().await;
    let other = Node::start(&redis, None, &[("node.id", "gw-2")]).await;
    let named = [("node.id", "gw-1")];
    let mut node = Node::start(&redis, None, &named).await;
    until_ready(std::slice::from_ref(&other)).await;
    until("ready", async || ready(node.address).await).await;
    let address = node.address;
    node.process.kill().await;
    let killed = Instant::now();
    let node = Node::start(&redis, Some(address), &named).await;
    until("ready", async || ready(node.address).await).await;
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
}

/// The lease of a killed run still counts for a recovery round, although the next run does not wait
/// for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_run_makes_the_next_recovery_round_incomplete() {
    let mut redis = Redis::start().await;
    let other = Node::start(&redis, None, &[("node.id", "gw-2"), lease_option()]).await;
    let named = [("node.id", "gw-1"), lease_option()];
    let mut node = Node::start(&redis, None, &named).await;
    until_ready(std::slice::from_ref(&other)).await;
    until("ready", async || ready(node.address).await).await;
    let incomplete = "gateway_recovery_rounds_total{complete=\"false\"}";
    let before = metric(&other, incomplete).await;
    node.process.kill().await;
    let node = Node::start(&redis, None, &named).await;
    until("ready", async || ready(node.address).await).await;
    redis.kill().await;
    redis.restart().await;
    until("an incomplete recovery round", async || metric(&other, incomplete).await > before).await;
}
