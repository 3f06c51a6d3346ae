//! A gateway is frozen and continues later: it delivers only entries that it has checked against
//! the log.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use super::{
    addresses,
    client::ClientProfile,
    clients::{TestClients, default_profiles},
    is_full, lease, lease_option, length,
    proxy::{Mode, Proxy},
    start_nodes, start_nodes_with_lease, until_ready,
};
use crate::harness::{Node, Redis, connect, next_message, room, say};

/// The default clients, and one that always stays with the first node.
async fn clients_with_one_that_stays(nodes: &[Node]) -> TestClients {
    let mut profiles = default_profiles(&addresses(nodes));
    profiles.push(ClientProfile { idle_timeout: Duration::from_secs(3600), ..profiles[0].clone() });
    TestClients::with_profiles(profiles).await.unwrap()
}

async fn freeze_for(time: Duration, start: impl AsyncFn(&Redis, usize) -> Vec<Node>) {
    let redis = Redis::start().await;
    let nodes = start(&redis, 3).await;
    let clients = clients_with_one_that_stays(&nodes).await;
    clients.wait_for_acks(200).await.unwrap();
    nodes[0].process.signal("STOP");
    clients.run_for(time).await;
    nodes[0].process.signal("CONT");
    clients.wait_for_acks(200).await.unwrap();
    until_ready(&nodes).await;
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("gateway SIGSTOP {time:?}"));
    // Clients of the frozen node left; the one that stayed got everything on its one connection.
    assert!(report.connections[0] > 1 && report.connections[3] > 1, "{:?}", report.connections);
    assert_eq!(report.connections[6], 1);
    for reader in [1, 2, 4, 5] {
        assert_eq!(report.connections[reader], 1);
        // Clients that reconnect need 2 s to notice; the others send meanwhile.
        assert!(report.silences[reader] < super::SHORT, "{:?}", report.silences);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_of_a_briefly_frozen_node_continue_elsewhere() {
    freeze_for(Duration::from_secs(4), start_nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_frozen_past_its_lease_checks_before_it_delivers() {
    let time = length(lease() + Duration::from_secs(2), Duration::from_secs(30));
    freeze_for(time, start_nodes_with_lease).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_lease_delivers_nothing_until_it_renews() {
    let redis = Redis::start().await;
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let options = [("cluster.redis_url", url.as_str()), lease_option()];
    let frozen = Node::start(&redis, None, &options).await;
    let other = Node::start(&redis, None, &[lease_option()]).await;
    let lobby = room("lobby");
    let mut ann = connect(frozen.address, "ann").await;
    let mut bob = connect(other.address, "bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    say(&mut bob, &lobby, "received").await;
    assert_eq!(next_message(&mut ann).await.seq, 1);

    frozen.process.signal("STOP");
    let over = Instant::now() + lease();
    for seq in 2..=20 {
        // The entries wait in the socket of the frozen node.
        assert_eq!(say(&mut bob, &lobby, "while it is frozen").await.seq, seq);
    }
    sleep_until(over).await;
    // The node cannot check whether the others continued without it.
    proxy.set(Mode::HoldRequests);
    frozen.process.signal("CONT");
    let too_early = timeout(Duration::from_millis(1500), next_message(&mut ann)).await;
    assert!(too_early.is_err(), "delivered without a lease: {too_early:?}");
    proxy.set(Mode::Open);
    for seq in 2..=20 {
        assert_eq!(next_message(&mut ann).await.seq, seq);
    }
}

/// Redis restarts while a node is frozen: the others wait for its lease to end, then continue
/// without it in a new epoch, which `reset` signals.
async fn freeze_while_redis_restarts(
    mut redis: Redis,
    what: &str,
) -> skein_testkit::checker::report::DeliveryReport {
    let nodes = start_nodes_with_lease(&redis, 3).await;
    let clients = clients_with_one_that_stays(&nodes).await;
    clients.wait_for_acks(200).await.unwrap();
    nodes[0].process.signal("STOP");
    clients.wait_for_acks(100).await.unwrap();
    redis.kill().await;
    redis.restart().await;
    // Publishes are acknowledged again only after the frozen node's lease has ended.
    clients.wait_for_acks(200).await.unwrap();
    nodes[0].process.signal("CONT");
    until_ready(&nodes).await;
    clients.wait_for_acks(200).await.unwrap();
    let report = clients.finish().await.unwrap();
    report.check(what);
    for reader in [1, 2, 4, 5] {
        assert_eq!(report.connections[reader], 1);
        // The lease, and the time to send and reconnect.
        assert!(
            report.silences[reader] < lease() + Duration::from_secs(5),
            "{:?}",
            report.silences
        );
    }
    assert!(report.resets > 0, "no reset was sent: {report}");
    assert!(report.rejected_sends > 0, "sends were not refused meanwhile: {report}");
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_restarts_while_a_node_is_frozen() {
    let redis = Redis::start_durable().await;
    let report = freeze_while_redis_restarts(redis, "SIGSTOP, Redis restarts with its file").await;
    assert_eq!(report.skipped, 0, "something was skipped: {report}");
    assert_eq!(report.not_recovered, 0, "the log was there: {report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_comes_back_empty_while_a_node_is_frozen() {
    if is_full() {
        let redis = Redis::start().await;
        freeze_while_redis_restarts(redis, "SIGSTOP, Redis comes back empty").await;
    }
}
