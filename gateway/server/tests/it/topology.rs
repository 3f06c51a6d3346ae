//! Redis in the topologies that `cluster.redis_url` supports.

use std::{sync::Arc, time::Duration};

use redis::{AsyncConnectionConfig, RedisResult};
use skein_client::frames;
use skein_core::bus::placement::crc16;
use skein_protocol::{ids::RoomId, position::Position};
use skein_redis::topology::{self, Dial, TlsFiles, Topology};

use crate::{
    harness::{Gateway, get, next_message, room, say, until, within},
    servers::{RedisClusterSetup, SentinelSetup, TlsRedis},
    steady_traffic::{SteadyTraffic, run_traffic_for},
};

fn open(url: &str, tls: &TlsFiles) -> Arc<dyn Dial> {
    match topology::open(url, tls) {
        Ok(Topology::Single(dial)) => dial,
        Ok(Topology::Cluster(_)) => panic!("it is no Redis Cluster"),
        Err(error) => panic!("{error}"),
    }
}

/// The port of the server of a new connection.
async fn port(dial: &Arc<dyn Dial>) -> RedisResult<u16> {
    let mut connection = dial.connect(AsyncConnectionConfig::new()).await?;
    port_of(redis::cmd("INFO").arg("server").query_async(&mut connection).await?)
}

/// The port of the server of a read connection.
async fn reader_port(dial: &Arc<dyn Dial>) -> RedisResult<u16> {
    let mut reader = dial.read_connection().await?;
    port_of(redis::cmd("INFO").arg("server").query_async(&mut *reader).await?)
}

fn port_of(info: String) -> RedisResult<u16> {
    let port = info.lines().find_map(|line| line.strip_prefix("tcp_port:"));
    Ok(port.and_then(|port| port.trim().parse().ok()).expect("a server has a port"))
}

#[tokio::test]
async fn tls_verifies_both_sides_and_users_log_in() {
    let server = TlsRedis::start().await;
    let files = |ca: bool, own: bool| TlsFiles {
        ca: ca.then(|| server.ca.clone()),
        identity: own.then(|| server.own.clone()),
    };
    let open = |url: &str, files: TlsFiles| open(url, &files);

    let dial = open(&server.url(), files(true, true));
    assert_eq!(within(port(&dial)).await.unwrap(), server.port);
    assert_eq!(within(reader_port(&dial)).await.unwrap(), server.port);

    // A server that the public authorities do not know, a node without a certificate, a server of
    // another name, and a wrong password.
    let dial = open(&server.url(), files(false, true));
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
    let dial = open(&server.url(), files(true, false));
    assert!(within(port(&dial)).await.is_err());
    let dial = open(&server.url().replace("127.0.0.1", "localhost"), files(true, true));
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let dial = open(&format!("rediss://gateway:no@127.0.0.1:{}", server.port), files(true, true));
    let error = within(port(&dial)).await.unwrap_err();
    assert!(
        error.to_string().contains("WRONGPASS") || error.code() == Some("WRONGPASS"),
        "{error}"
    );
}

#[tokio::test]
async fn messages_pass_over_tls_with_minimal_permissions() {
    let server = TlsRedis::start().await;
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (url, ca) = (server.url(), path(&server.ca));
    let (cert, key) = (path(&server.own.0), path(&server.own.1));
    let options = [
        ("cluster.redis_url", url.as_str()),
        ("cluster.redis_ca_file", &ca),
        ("cluster.redis_cert_file", &cert),
        ("cluster.redis_key_file", &key),
        ("auth.allow_anonymous", "true"),
    ];
    let (one, two) = (Gateway::start(&options).await, Gateway::start(&options).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    let joined = ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    for text in ["1", "2"] {
        let seq = say(&mut ann, &lobby, text).await.seq;
        assert_eq!(next_message(&mut bob).await.seq, seq);
    }
    let start = Position::new(joined.epoch, 0);
    let join = frames::OutgoingJoin { since: Some(&start), ..frames::OutgoingJoin::new(&lobby) };
    let missed = two.connect("cyd").await.join_with(&join).await.unwrap();
    assert_eq!(missed.history.len(), 2);
    assert_eq!(get(one.address, "/ready").await.status, 200);
}

#[tokio::test]
async fn missing_and_invalid_tls_files_fail_at_the_start() {
    let path = tempfile::NamedTempFile::new().unwrap().path().to_owned();
    let files = TlsFiles { ca: Some(path.clone()), identity: None };
    let Err(error) = topology::open("rediss://127.0.0.1", &files) else { panic!("accepted") };
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "no certificate").unwrap();
    let path = text.path().to_owned();
    for files in [
        TlsFiles { ca: Some(path.clone()), identity: None },
        TlsFiles { ca: None, identity: Some((path.clone(), path.clone())) },
    ] {
        let Err(error) = topology::open("rediss://127.0.0.1", &files) else { panic!("accepted") };
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[tokio::test]
async fn the_primary_is_the_one_that_sentinels_report() {
    let mut watched = SentinelSetup::start().await;
    let (first, second) = (watched.servers[0].port, watched.servers[1].port);
    let dial = open(&watched.url(0), &TlsFiles::default());
    assert!(dial.read_connection().await.is_err(), "where to read is known when a primary is");
    assert_eq!(within(port(&dial)).await.unwrap(), first);
    assert_eq!(within(reader_port(&dial)).await.unwrap(), first);

    // A failover in which the old primary stays up: its connections would stay open.
    let moved = dial.moved();
    watched.fail_over(0).await;
    within(moved).await;
    until("the new primary is reached", async || port(&dial).await.is_ok_and(|p| p == second))
        .await;
    assert_eq!(within(reader_port(&dial)).await.unwrap(), second);

    // A failover after the primary has died.
    until("the old primary is a replica", async || watched.has_synced_replica(1).await).await;
    let moved = dial.moved();
    watched.servers[1].process.kill().await;
    within(moved).await;
    until("the first is reached again", async || port(&dial).await.is_ok_and(|p| p == first)).await;
    assert_eq!(within(reader_port(&dial)).await.unwrap(), first);
}

#[tokio::test]
async fn sentinels_are_discovered_and_a_frozen_one_delays_nothing() {
    let mut watched = SentinelSetup::start().await;
    let (first, second) = (watched.servers[0].port, watched.servers[1].port);
    // Only one Sentinel is configured; it reports the others before it is killed.
    let dial = open(&watched.url(2), &TlsFiles::default());
    assert_eq!(within(port(&dial)).await.unwrap(), first);
    watched.sentinels[2].process.kill().await;
    assert_eq!(within(port(&dial)).await.unwrap(), first);

    // A frozen Sentinel delays nothing, even during a failover.
    watched.sentinels[1].process.signal("STOP");
    watched.fail_over(0).await;
    until("the new primary is reached", async || port(&dial).await.is_ok_and(|p| p == second))
        .await;
}

#[tokio::test]
async fn a_primary_name_unknown_to_sentinels_is_reported() {
    let watched = SentinelSetup::start().await;
    let url = watched.url(0).replace("/main?", "/mian?");
    let dial = open(&url, &TlsFiles::default());
    let error = within(port(&dial)).await.unwrap_err().to_string();
    assert!(error.contains("mian"), "{error}");
}

/// Starts two nodes on the Redis at `url`, with a publish timeout longer than a failover.
async fn two_nodes(url: &str) -> [Gateway; 2] {
    let options = [
        ("cluster.redis_url", url),
        ("auth.allow_anonymous", "true"),
        ("limits.messages_per_second", "0"),
        ("publish.timeout", "20s"),
    ];
    [Gateway::start(&options).await, Gateway::start(&options).await]
}

/// Waits until the node is ready and has taken part in `agreed` recovery rounds.
async fn until_ready_after_rounds(gateway: &Gateway, agreed: usize) {
    until("the nodes agree", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let count =
            |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<usize>().ok());
        let agreements =
            metrics.lines().filter(|line| line.starts_with("gateway_recovery_rounds_total"));
        agreements.filter_map(count).sum::<usize>() >= agreed
            && get(gateway.address, "/ready").await.status == 200
    })
    .await;
}

#[tokio::test]
async fn publishes_wait_while_a_primary_has_too_few_replicas() {
    let watched = SentinelSetup::start().await;
    let [node, _] = two_nodes(&watched.url(0)).await;
    let lobby = room("lobby");
    let mut ann = node.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let primary = &watched.servers[0];
    let replicas = async |wanted| {
        let question = ["CONFIG", "SET", "min-replicas-to-write", wanted];
        primary.ask::<String>(&question).await.unwrap();
    };
    replicas("2").await;
    let refused = async {
        until("it is refused", async || {
            let errors = primary.ask::<String>(&["INFO", "errorstats"]).await.unwrap();
            errors.contains("errorstat_NOREPLICAS")
        })
        .await;
        replicas("1").await;
    };
    let (ack, ()) = tokio::join!(say(&mut ann, &lobby, "1"), refused);
    assert_eq!(ack.seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_sentinels_fail_over() {
    let mut watched = SentinelSetup::start().await;
    let nodes = two_nodes(&watched.url(0)).await;
    let traffic = SteadyTraffic::start(&nodes.each_ref().map(|node| node.address)).await;
    let acked = traffic
        .check_while(async {
            run_traffic_for(Duration::from_millis(500)).await;
            // The old primary becomes a replica, and closes no connection before that.
            watched.fail_over(0).await;
            until_ready_after_rounds(&nodes[0], 2).await;
            until("the old primary is a replica", async || watched.has_synced_replica(1).await)
                .await;
            run_traffic_for(Duration::from_millis(500)).await;
            watched.servers[1].process.kill().await;
            until_ready_after_rounds(&nodes[0], 3).await;
            run_traffic_for(Duration::from_millis(500)).await;
        })
        .await;
    println!("2 failovers behind Sentinels: {acked} acknowledged, 0 lost, 0 duplicated");
}

/// Rooms in many partitions, and so on all primaries.
fn many_rooms() -> Vec<RoomId> {
    (0..12).map(|i| room(&format!("room-{i}"))).collect()
}

/// The counter of a node with this name and `result`.
async fn counter_of(node: &Gateway, name: &str, result: &str) -> usize {
    let metrics = get(node.admin, "/metrics").await.body;
    let line = format!("{name}{{result=\"{result}\"}} ");
    let count = metrics.lines().find_map(|text| text.strip_prefix(&line));
    count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{metrics}"))
}

/// The slot of a room, computed as docs/redis-keys.md describes.
fn slot_of(room: &RoomId) -> u16 {
    slot_of_partition(partition_of(room))
}

fn partition_of(room: &RoomId) -> u16 {
    crc16(room.as_str().as_bytes()) % 256
}

fn slot_of_partition(partition: u16) -> u16 {
    crc16(partition.to_string().as_bytes()) % 16_384
}

async fn all_ready(nodes: &[Gateway]) {
    for node in nodes {
        until("ready", async || get(node.address, "/ready").await.status == 200).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_a_redis_cluster_primary_fails_over() {
    let mut cluster = RedisClusterSetup::start().await;
    let nodes = two_nodes(&cluster.url()).await;
    let traffic =
        SteadyTraffic::start_in(&nodes.each_ref().map(|node| node.address), many_rooms()).await;
    let acked = traffic
        .check_while(async {
            run_traffic_for(Duration::from_millis(500)).await;
            // The primary that also has the leases. It stays up as a replica.
            let first = cluster.owner_of(slot_of_partition(0)).await;
            let second = cluster.replica_of(first).await;
            cluster.nodes[second].ask::<String>(&["CLUSTER", "FAILOVER"]).await.unwrap();
            until("a replica takes over", async || cluster.has_synced_replica(second).await).await;
            run_traffic_for(Duration::from_millis(1500)).await;
            all_ready(&nodes).await;
            // It freezes, and wakes up without knowing its successor.
            cluster.nodes[second].process.signal("STOP");
            until("a replica takes over", async || cluster.is_primary(first).await).await;
            run_traffic_for(Duration::from_millis(1500)).await;
            all_ready(&nodes).await;
            cluster.nodes[second].process.signal("CONT");
            until("the old primary is a replica", async || cluster.has_synced_replica(first).await)
                .await;
            run_traffic_for(Duration::from_millis(500)).await;
            // It dies.
            cluster.nodes[first].process.kill().await;
            until("a replica takes over", async || cluster.is_primary(second).await).await;
            run_traffic_for(Duration::from_millis(1500)).await;
            all_ready(&nodes).await;
            run_traffic_for(Duration::from_millis(500)).await;
        })
        .await;
    for node in &nodes {
        // Most entries arrive by pub/sub, and are not only found in the logs.
        let delivered = counter_of(node, "gateway_bus_entries_received_total", "delivered").await;
        assert!(delivered > acked / 2, "{delivered} of {acked}");
    }
    println!("3 failovers in a Redis Cluster: {acked} acknowledged, 0 lost, 0 duplicated");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_slots_of_a_redis_cluster_migrate() {
    let cluster = RedisClusterSetup::start().await;
    let nodes = two_nodes(&cluster.url()).await;
    let rooms = many_rooms();
    let traffic =
        SteadyTraffic::start_in(&nodes.each_ref().map(|node| node.address), rooms.clone()).await;
    let acked = traffic
        .check_while(async {
            run_traffic_for(Duration::from_millis(500)).await;
            for room in &rooms[..3] {
                let (slot, primaries) = (slot_of(room), cluster.primaries().await);
                let from = cluster.owner_of(slot).await;
                let to = primaries.into_iter().find(|node| *node != from).unwrap();
                // For a while each primary has half of the slot.
                cluster
                    .migrate(slot, to, async || run_traffic_for(Duration::from_millis(700)).await)
                    .await;
                // Both nodes are subscribed there, and do not only read the log.
                let channel = format!("gw:{{{}}}:r:{room}", partition_of(room));
                until("both nodes are subscribed at the new primary", async || {
                    let question = ["PUBSUB", "SHARDNUMSUB", &channel];
                    let heard: (String, u64) = cluster.nodes[to].ask(&question).await.unwrap();
                    heard.1 == 2
                })
                .await;
                run_traffic_for(Duration::from_millis(500)).await;
            }
            all_ready(&nodes).await;
        })
        .await;
    for node in &nodes {
        // A publish to a migrating slot waits, without an error for its sender.
        assert_eq!(counter_of(node, "gateway_publishes_total", "unavailable").await, 0);
    }
    println!("3 slot migrations in a Redis Cluster: {acked} acknowledged, 0 lost, 0 duplicated");
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_agree_again_on_a_flushed_redis_cluster_primary() {
    let cluster = RedisClusterSetup::start().await;
    let [node, _] = two_nodes(&cluster.url()).await;
    let leases = cluster.owner_of(slot_of_partition(0)).await;
    let mut elsewhere = vec![];
    for room in many_rooms() {
        let owner = cluster.owner_of(slot_of(&room)).await;
        if owner != leases && elsewhere.first().is_none_or(|(_, first)| *first == owner) {
            elsewhere.push((room, owner));
        }
    }
    let [(room, owner), (other, _), ..] = &elsewhere[..] else { panic!("{elsewhere:?}") };
    let mut ann = node.connect("ann").await;
    ann.join(room).await.unwrap();
    assert_eq!(say(&mut ann, room, "before").await.seq, 1);
    cluster.nodes[*owner].ask::<String>(&["FLUSHALL"]).await.unwrap();
    // A join needs that server; it succeeds although no client publishes there.
    until("a join is answered", async || ann.join(other).await.is_ok()).await;
    assert_eq!(say(&mut ann, room, "after").await.seq, 2);
}
