//! The link between one gateway and Redis fails in every way, while Redis stays up.

use std::time::Duration;

use super::{
    UNLIMITED, addresses,
    clients::TestClients,
    lease, lease_option, length,
    proxy::{Mode, Proxy},
    ready, until_ready,
};
use crate::harness::{Gateway, Node, Redis, get, next_message, room, say, until};

/// Makes the link of one of two nodes fail for a while.
async fn fail_link(mode: Mode, time: Duration, what: &str) {
    let redis = Redis::start().await;
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let with_lease = [&UNLIMITED[..], &[lease_option()]].concat();
    let extra = [&with_lease[..], &[("cluster.redis_url", url.as_str())]].concat();
    let nodes =
        [Node::start(&redis, None, &extra).await, Node::start(&redis, None, &with_lease).await];
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    let rounds = length(1, 3);
    for _ in 0..rounds {
        clients.wait_for_acks(200).await.unwrap();
        proxy.set(mode);
        until("the node is not ready", async || !ready(nodes[0].address).await).await;
        clients.run_for(time).await;
        proxy.set(Mode::Open);
        until_ready(&nodes).await;
        clients.wait_for_acks(200).await.unwrap();
    }
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("{rounds} x {what} for {time:?}"));
    // Connections stay open, and clients of the other node receive each other's messages all the
    // time.
    assert!(report.connections.iter().all(|count| *count == 1), "{:?}", report.connections);
    for reader in [1, 3] {
        assert!(report.silences[reader] < super::SHORT, "{:?}", report.silences);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_holed_redis_link_loses_nothing() {
    fail_link(Mode::BlackHole, Duration::from_secs(4), "black hole").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_link_black_holed_past_its_lease_loses_nothing() {
    let time = length(lease() + Duration::from_secs(1), Duration::from_secs(20));
    fail_link(Mode::BlackHole, time, "black hole").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_redis_link_loses_nothing() {
    fail_link(Mode::Cut, Duration::from_secs(3), "cut").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_redis_requests_lose_nothing() {
    fail_link(Mode::HoldRequests, Duration::from_secs(4), "one-way cut towards Redis").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn held_redis_responses_lose_nothing() {
    fail_link(Mode::HoldResponses, Duration::from_secs(4), "one-way cut from Redis").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_redis_responses_lose_nothing() {
    fail_link(Mode::DropResponses, Duration::from_secs(4), "answers of Redis lost").await;
}

#[tokio::test]
async fn messages_missed_without_pubsub_arrive_after_resubscribing() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    redis.command("ACL SETUSER default -subscribe").await;
    redis.command("CLIENT KILL TYPE pubsub").await;
    for gateway in [&one, &two] {
        until("not ready", async || get(gateway.address, "/ready").await.status == 503).await;
    }
    // Publishing works, and no later entry follows: only the resubscription can deliver this one.
    assert_eq!(say(&mut ann, &lobby, "not received").await.seq, 1);
    redis.command("ACL SETUSER default +subscribe").await;
    for connection in [&mut ann, &mut bob] {
        assert_eq!(next_message(connection).await.seq, 1);
    }
}
