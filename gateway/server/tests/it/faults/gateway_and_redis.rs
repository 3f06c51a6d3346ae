//! Redis loses its data while a gateway is gone, or before other nodes know a new one.

use std::time::Duration;

use skein_client::frames;
use tokio::time::Instant;

use super::{
    UNLIMITED, addresses,
    clients::{TestClients, default_profiles},
    lease, length,
    proxy::{Mode, Proxy},
    start_nodes_with_lease, until_ready,
};
use crate::harness::{Gateway, Node, Redis, connect, get, next_message, room, say, until, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_and_redis_data_are_lost_together() {
    let mut redis = Redis::start().await;
    let mut nodes = start_nodes_with_lease(&redis, 3).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    clients.wait_for_acks(300).await.unwrap();
    tokio::join!(nodes[0].process.kill(), redis.kill());
    redis.restart().await;
    let back = Instant::now();
    clients.wait_for_acks(1).await.unwrap();
    let acknowledged_after = back.elapsed();
    clients.wait_for_acks(200).await.unwrap();
    let report = clients.finish().await.unwrap();
    println!("gateway and Redis data lost: acknowledged again after {acknowledged_after:.2?}");
    report.check("gateway and Redis data lost within one lease");
    assert!(acknowledged_after < lease() + Duration::from_secs(3), "{acknowledged_after:?}");
    for reader in [1, 2, 4, 5] {
        assert_eq!(report.connections[reader], 1);
        assert!(
            report.silences[reader] < lease() + Duration::from_secs(5),
            "{:?}",
            report.silences
        );
        assert_eq!(report.epochs[reader], 2, "one new epoch: {:?}", report.epochs);
    }
    // Connected clients continue in the new epoch after a `reset`.
    assert!(report.resets >= 4, "{report}");
    assert!(report.rejected_sends > 0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn acked_but_undelivered_messages_survive_loss_of_redis_data() {
    let mut redis = Redis::start().await;
    let (mut proxies, mut nodes) = (vec![], vec![]);
    for _ in 0..2 {
        let proxy = Proxy::to(redis.address()).await.unwrap();
        let url = proxy.redis_url();
        nodes.push(Node::start(&redis, None, &[("cluster.redis_url", url.as_str())]).await);
        proxies.push(proxy);
    }
    let lobby = room("lobby");
    let mut ann = connect(nodes[0].address, "ann").await;
    let mut bob = connect(nodes[1].address, "bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let mut seq = 0;
    for round in 0..length(2, 10) {
        seq += 1;
        let epoch = say(&mut bob, &lobby, "received by all").await.epoch;
        for connection in [&mut ann, &mut bob] {
            assert_eq!(next_message(connection).await.seq, seq);
        }
        // Redis dies after its answer and before any node receives the entry.
        proxies.iter().for_each(|proxy| proxy.set(Mode::DropPushes));
        let ack = say(&mut ann, &lobby, "received by no node").await;
        seq += 1;
        assert_eq!((&ack.epoch, ack.seq), (&epoch, seq), "round {round}");
        redis.kill().await;
        proxies.iter().for_each(|proxy| proxy.set(Mode::Cut));
        redis.restart().await;
        proxies.iter().for_each(|proxy| proxy.set(Mode::Open));
        for connection in [&mut ann, &mut bob] {
            let message = next_message(connection).await;
            assert_eq!((message.seq, message.id, message.epoch), (seq, ack.id, epoch.clone()));
        }
        until_ready(&nodes).await;
    }
}

/// Two nodes behind proxies, and a Redis that restarted empty while the proxies were cut.
struct NodesWithoutRedis {
    redis: Redis,
    proxies: Vec<Proxy>,
    nodes: Vec<Node>,
    clients: TestClients,
}

async fn nodes_cut_off_from_an_empty_redis() -> NodesWithoutRedis {
    let mut redis = Redis::start().await;
    let (mut proxies, mut nodes) = (vec![], vec![]);
    for _ in 0..2 {
        let proxy = Proxy::to(redis.address()).await.unwrap();
        let url = proxy.redis_url();
        let extra = [&UNLIMITED[..], &[("cluster.redis_url", url.as_str())]].concat();
        nodes.push(Node::start(&redis, None, &extra).await);
        proxies.push(proxy);
    }
    let clients = TestClients::with_profiles(default_profiles(&addresses(&nodes))).await.unwrap();
    clients.wait_for_acks(200).await.unwrap();
    redis.kill().await;
    proxies.iter().for_each(|proxy| proxy.set(Mode::Cut));
    redis.restart().await;
    NodesWithoutRedis { redis, proxies, nodes, clients }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_node_on_an_empty_redis_waits_for_nodes_with_entries() {
    let NodesWithoutRedis { redis, proxies, nodes, clients } =
        nodes_cut_off_from_an_empty_redis().await;
    let epoch = clients.checker.lock().cursor(0).unwrap().epoch.clone();
    let starting = tokio::spawn(async move {
        let new = Node::start(&redis, None, &UNLIMITED).await;
        (redis, new)
    });
    // Well within the 3 s after which a node accepts an unknown Redis as it is.
    clients.run_for(Duration::from_millis(1500)).await;
    proxies.iter().for_each(|proxy| proxy.set(Mode::Open));
    let (_redis, new) = within(starting).await.unwrap();
    let lobby = room("lobby");
    let mut ann = connect(new.address, "ann").await;
    let joined = ann.join(&lobby).await.unwrap();
    assert_eq!(joined.epoch, epoch, "the new node began a log of its own");
    let top = clients.checker.lock().cursor(0).unwrap().seq;
    assert!(joined.seq >= top.saturating_sub(10), "{} of {top}", joined.seq);
    assert_eq!(say(&mut ann, &lobby, "hello").await.epoch, epoch);
    until_ready(&nodes).await;
    clients.wait_for_acks(50).await.unwrap();
    clients
        .finish()
        .await
        .unwrap()
        .check_seamless("a new node on an empty Redis, the others parted for 1.5 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_with_entries_that_return_late_signal_a_discontinuity() {
    let NodesWithoutRedis { redis, proxies, nodes, clients } =
        nodes_cut_off_from_an_empty_redis().await;
    let new = Node::start(&redis, None, &UNLIMITED).await;
    let lobby = room("lobby");
    let mut ann = connect(new.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    say(&mut ann, &lobby, "first of another history").await;
    proxies.iter().for_each(|proxy| proxy.set(Mode::Open));
    until_ready(&nodes).await;
    clients.wait_for_acks(50).await.unwrap();
    let report = clients.finish().await.unwrap();
    report.check("a new node on an empty Redis went on alone, the others came later");
    assert!(report.resets >= report.clients, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_cluster_on_an_empty_redis_opens_after_3_to_8_s() {
    let redis = Redis::start().await;
    redis.command("FLUSHALL").await;
    let begun = Instant::now();
    let gateway = Gateway::start_on(&redis, &[]).await;
    until("ready", async || get(gateway.address, "/ready").await.status == 200).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let join = frames::OutgoingJoin { history: Some(0), ..frames::OutgoingJoin::new(&lobby) };
    let joined = within(ann.join_with(&join)).await.unwrap();
    assert_eq!((joined.seq, joined.recovered), (0, false));
    let waited = begun.elapsed();
    assert_eq!(say(&mut ann, &lobby, "hello").await.seq, 1);
    assert_eq!(next_message(&mut ann).await.seq, 1);
    println!("a new cluster on an empty Redis: open after {waited:.2?}");
    let expected = Duration::from_millis(2900)..Duration::from_secs(8);
    assert!(expected.contains(&waited), "{waited:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_set_back_does_not_block_the_barrier() {
    let redis = Redis::start().await;
    redis.command("FLUSHALL").await;
    // The start completes when the barrier opens, 3 s later.
    let starting = Gateway::start_on(&redis, &[]);
    let setting_back = async {
        let has = async |field: &str| {
            redis.command(&format!("HEXISTS gw:barrier {field}")).await.as_deref() == Some(":1")
        };
        until("checked in", async || has("t0").await).await;
        assert!(!has("open").await, "too late to be set back");
        // As if the clock of Redis' host had since been set back by years.
        redis.command("HSET gw:barrier t0 9999999999999").await;
    };
    let (gateway, ()) = within(Box::pin(async { tokio::join!(starting, setting_back) })).await;
    assert_eq!(get(gateway.address, "/ready").await.status, 200);
}
