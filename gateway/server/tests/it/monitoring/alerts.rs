//! Every alert on a live cluster: a real Prometheus with the shipped rules sees three gateways on a
//! real Redis, whose faults are real ones.
//!
//! `make test` causes the worst of them, `make test-full` all.

#![allow(clippy::large_futures, reason = "each is awaited once, in a test")]

use std::{net::SocketAddr, time::Duration};

use serde_json::json;
use skein_client::connection::RequestError;
use skein_core::bus::placement::partition_of;
use skein_protocol::error::ErrorCode;
use skein_testkit::proxy::{Mode, Proxy};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{
    alert_names,
    causes::{Blackbox, ClockNode, FaultyNode, TlsSite, start_replica},
    clients::{Traffic, idle, non_readers, repeat},
    dashboard,
    prometheus::{Prometheus, alert},
    queries,
};
use crate::{
    harness::{
        Node, Postgres, Redis, closed, connect, free_port, get, next_message, poll_pause, room,
        say, until,
    },
    untrusted::{call, envelope, words},
};

/// Options of every node: no limits, clients may be silent, and uneven nodes stay so.
const OPTIONS: [(&str, &str); 4] = [
    ("limits.messages_per_second", "0"),
    ("limits.frames_per_second", "0"),
    ("heartbeat.idle_timeout", "20m"),
    ("rebalance.per_second", "0"),
];

struct Cluster {
    redis: Redis,
    /// The third reaches Redis through a proxy.
    nodes: Vec<Node>,
    link: Proxy,
}

impl Cluster {
    async fn start() -> Self {
        let redis = Redis::start_durable().await;
        let link = Proxy::to(redis.address()).await.unwrap();
        let mut nodes = vec![];
        for id in ["gw-0", "gw-1"] {
            nodes.push(Self::start_node(&redis, id).await);
        }
        let (url, listen) = (link.redis_url(), format!("127.0.0.1:{}", free_port()));
        let own = [
            ("node.id", "gw-2"),
            ("cluster.redis_url", url.as_str()),
            ("auth.allow_anonymous", "true"),
            ("server.listen", listen.as_str()),
        ];
        nodes.push(Node::start_in(&[], &[&OPTIONS[..], &own].concat()).await);
        Self { redis, nodes, link }
    }

    async fn start_node(redis: &Redis, id: &str) -> Node {
        // Clients that read nothing are closed sooner than by default.
        let own = [("node.id", id), ("heartbeat.write_timeout", "10s")];
        Node::start(redis, None, &[&OPTIONS[..], &own].concat()).await
    }

    fn admins(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.admin).collect()
    }

    fn traffic(&self) -> Traffic {
        Traffic::start(self.nodes.iter().map(|node| node.address))
    }

    async fn until_ready(&self) {
        for node in &self.nodes {
            until("ready", async || get(node.admin, "/ready").await.status == 200).await;
        }
    }

    async fn config(&self, setting: &str) {
        let said = self.redis.command(&format!("CONFIG SET {setting}")).await;
        assert_eq!(said.as_deref(), Some("+OK"), "{setting}");
    }

    async fn used_bytes(&self) -> u64 {
        let info = self.redis.answer("INFO memory").await;
        let used = info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap();
        used.trim().parse().unwrap()
    }
}

/// `make test`: a node dies and its target vanishes with it, and Redis is full.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_and_a_full_redis_fire_alerts() {
    let mut cluster = Cluster::start().await;
    let traffic = cluster.traffic();
    let prometheus = Prometheus::start(None).await;
    prometheus.set_targets(cluster.admins());
    prometheus.until_scraped(3).await;
    assert_eq!(prometheus.firing(), [].into());
    check_panels(&prometheus, false).await;
    let killed = Instant::now();
    cluster.nodes[1].process.kill().await;
    prometheus.set_targets([cluster.nodes[0].admin, cluster.nodes[2].admin]);
    cluster.config("maxmemory 1").await;
    traffic.set_bytes(200_000);
    let instance = cluster.nodes[0].admin;
    prometheus
        .fires(
            killed,
            &[
                alert("GatewayNodeMissing", "gw-1"),
                alert("GatewayRedisMemory", ""),
                alert("GatewayPublishesFailing", instance),
            ],
        )
        .await;
    prometheus.check();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "make test-full"]
async fn every_alert_fires_and_clears_on_a_live_cluster() {
    let mut cluster = Cluster::start().await;
    let traffic = cluster.traffic();
    let folder = TempDir::new().unwrap();
    let url = cluster.redis.url();
    let on_redis = [("cluster.redis_url", url.as_str()), ("auth.allow_anonymous", "true")];
    let clock = ClockNode::start(folder.path(), &[&OPTIONS[..], &on_redis].concat()).await;
    let faulty = FaultyNode::start(&OPTIONS).await;
    let small_options = [&OPTIONS[..], &[("limits.connections_max", "80")]].concat();
    let small = Node::start_within(100, &small_options).await;
    let mut site = TlsSite::start(cluster.nodes[0].address, 90).await;
    let replica = start_replica(cluster.redis.port, folder.path()).await;
    let (archived_redis, mut postgres) = (Redis::start_durable().await, Postgres::start().await);
    let archive = postgres.url();
    let own = [("archive.url", archive.as_str()), ("archive.backlog_max", "1000")];
    let archiving = Node::start(&archived_redis, None, &[&OPTIONS[..], &own].concat()).await;
    let blackbox = Blackbox::start().await;

    let prometheus = Prometheus::start(Some(&site.watched_by(&blackbox))).await;
    let sides = [clock.node.admin, faulty.node.admin, small.admin, archiving.admin];
    let targets = |cluster: &Cluster| [&cluster.admins()[..], &sides].concat();
    prometheus.set_targets(targets(&cluster));
    prometheus.until_scraped(6).await;
    assert_eq!(prometheus.firing(), [].into(), "before any cause");

    // Uneven nodes: this takes longest, and disturbs nothing else.
    let uneven = Instant::now();
    let crowd = idle(cluster.nodes[0].address, 150).await;

    // Conditions that disturb nothing else, at once.
    tokio::join!(
        bugs_fire_alerts(&prometheus, &faulty.node),
        limits_fire_alerts(&prometheus, &small),
        a_wrong_clock_fires_an_alert(&prometheus, &clock),
        a_lagging_replica_fires_an_alert(&prometheus, &replica),
        foreign_values_fire_alerts(&prometheus, &cluster),
        slow_clients_fire_alerts(&prometheus, &cluster.nodes[1]),
        an_unreachable_site_fires_alerts(&prometheus, &mut site),
        an_archive_that_is_away_fires_alerts(&prometheus, &archiving, &mut postgres),
    );
    drop(replica);

    settings_of_redis_fire_alerts(&prometheus, &cluster).await;
    a_full_redis_fires_alerts(&prometheus, &cluster, &traffic).await;
    a_slow_link_fires_alerts(&prometheus, &cluster).await;
    prometheus.fires(uneven, &[alert("GatewayUneven", "")]).await;
    drop(crowd);
    prometheus.cured(&[alert("GatewayUneven", "")]);
    lost_data_fires_alerts(&prometheus, &mut cluster).await;
    dead_and_frozen_nodes_fire_alerts(&prometheus, &mut cluster, &sides).await;
    prometheus.set_targets(targets(&cluster));
    silence_fires_an_alert(&prometheus, &traffic).await;

    prometheus.clears().await;
    prometheus.until_quiet().await;
    prometheus.check();
    assert_eq!(prometheus.fired(), alert_names());
    check_panels(&prometheus, true).await;
}

/// Panics, and errors that Redis answers a script with.
async fn bugs_fire_alerts(prometheus: &Prometheus, node: &Node) {
    let begun = Instant::now();
    let expected = [alert("GatewayPanics", node.admin), alert("GatewayInternalErrors", node.admin)];
    let mut ann = connect(node.address, "ann").await;
    let panic = json!({"type": "ping", "timestamp": "panic in a connection"});
    ann.send_json(&panic).await.unwrap();
    assert_eq!(closed(&mut ann).await.0, Some(1011));
    let mut bob = connect(node.address, "bob").await;
    let set = json!({"type": "session_set", "data": {"a": 1}, "ref": 1});
    match bob.request(&set).await {
        Err(RequestError::Rejected(error)) => assert_eq!(error.code, ErrorCode::Internal),
        other => panic!("{other:?}"),
    }
    prometheus.fires(begun, &expected).await;
    prometheus.cured(&expected);

    // Clients that send nonsense, and clients that vanish.
    let begun = Instant::now();
    let expected = [alert("GatewayClientErrors", node.admin), alert("GatewayDisconnects", "1006")];
    drop(idle(node.address, 30).await);
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..5 {
        let client = connect(node.address, &format!("nonsense{number}")).await;
        let frame = json!({"type": "message", "room": "nowhere", "content": 1});
        clients.spawn(repeat(client, frame, 6));
    }
    prometheus.fires(begun, &expected).await;
    clients.shutdown().await;
    prometheus.cured(&expected);
}

/// A node near its limit of connections and of descriptors.
async fn limits_fire_alerts(prometheus: &Prometheus, node: &Node) {
    let begun = Instant::now();
    let expected = [
        alert("GatewayConnectionsNearLimit", node.admin),
        alert("GatewayDescriptorsLow", node.admin),
    ];
    let connections = idle(node.address, 78).await;
    prometheus.fires(begun, &expected).await;
    drop(connections);
    prometheus.cured(&expected);
}

/// The database of the archive ends, and more messages come than Redis has space for.
async fn an_archive_that_is_away_fires_alerts(
    prometheus: &Prometheus,
    node: &Node,
    postgres: &mut Postgres,
) {
    let begun = Instant::now();
    let expected = [alert("GatewayArchiveDown", node.admin), alert("GatewayArchiveBehind", "")];
    postgres.kill().await;
    let (mut ann, lobby) = (connect(node.address, "ann").await, room("lobby"));
    ann.join(&lobby).await.unwrap();
    for number in 0..1_600 {
        say(&mut ann, &lobby, &number.to_string()).await;
    }
    prometheus.fires(begun, &expected).await;
    postgres.restart().await;
    prometheus.cured(&expected);
}

async fn a_wrong_clock_fires_an_alert(prometheus: &Prometheus, clock: &ClockNode) {
    let begun = Instant::now();
    let expected = [alert("GatewayClockSkew", clock.node.admin)];
    clock.set("+90");
    prometheus.fires(begun, &expected).await;
    clock.set("+0");
    prometheus.cured(&expected);
}

async fn a_lagging_replica_fires_an_alert(
    prometheus: &Prometheus,
    replica: &skein_testkit::servers::ServerProcess,
) {
    let begun = Instant::now();
    let expected = [alert("GatewayRedisReplicaLag", "")];
    replica.signal("STOP").await;
    prometheus.fires(begun, &expected).await;
    replica.signal("CONT").await;
    prometheus.cured(&expected);
}

/// Another program writes into the log of a room: members miss an entry, and get a `reset`.
async fn foreign_values_fire_alerts(prometheus: &Prometheus, cluster: &Cluster) {
    let begun = Instant::now();
    let node = &cluster.nodes[1];
    let expected = [alert("GatewayRedisInvalidValues", ""), alert("GatewayContinuityLost", "")];
    let lobby = room("victim");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    for text in ["1", "2", "3"] {
        say(&mut ann, &lobby, text).await;
    }
    let base = format!("gw:{{{}}}:r:{lobby}", partition_of(&lobby, 256));
    let planted =
        [words(&format!("XADD {base}:log 4-0 x y")), words(&format!("HSET {base}:meta s 4"))];
    call(&cluster.redis, &planted).await;
    until("a message is acknowledged", async || {
        let message = json!({"type": "message", "room": lobby, "content": "on", "ref": 1});
        ann.request(&message).await.is_ok()
    })
    .await;
    prometheus.fires(begun, &expected).await;
    prometheus.cured(&expected);
}

/// Members that read nothing: they fall behind, and are closed with 4003.
async fn slow_clients_fire_alerts(prometheus: &Prometheus, node: &Node) {
    let begun = Instant::now();
    let expected = [alert("GatewaySlowConsumers", node.admin), alert("GatewayDisconnects", "4003")];
    let asleep = non_readers(node.address, "busy", 20).await;
    let lobby = room("busy");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    let flood = async {
        loop {
            let message = json!({"type": "message", "room": lobby, "content": "x".repeat(60_000),
                "ref": 1, "echo": false});
            ann.request(&message).await.unwrap();
            poll_pause().await;
        }
    };
    tokio::select! {
        () = flood => {}
        () = prometheus.fires(begun, &expected) => {}
    }
    drop(asleep);
    prometheus.cured(&expected);
}

/// A certificate that expires soon, then an nginx that is gone.
async fn an_unreachable_site_fires_alerts(prometheus: &Prometheus, site: &mut TlsSite) {
    let url = site.url();
    let expiring = [alert("GatewayCertificateExpiring", &url)];
    site.stop().await;
    let begun = Instant::now();
    site.start_with(5).await;
    prometheus.fires(begun, &expiring).await;
    let (begun, unreachable) = (Instant::now(), [alert("GatewayUnreachable", &url)]);
    site.stop().await;
    prometheus.fires(begun, &unreachable).await;
    site.start_with(90).await;
    prometheus.cured(&[&expiring[..], &unreachable].concat());
}

/// An eviction policy, and no append-only file.
async fn settings_of_redis_fire_alerts(prometheus: &Prometheus, cluster: &Cluster) {
    let begun = Instant::now();
    let expected = [
        alert("GatewayRedisEvicts", ""),
        alert("GatewayRedisNotPersistent", ""),
        alert("GatewayNotReady", "maxmemory_policy"),
    ];
    cluster.config("maxmemory-policy allkeys-lru").await;
    cluster.config("appendonly no").await;
    prometheus.fires(begun, &expected).await;
    cluster.config("maxmemory-policy noeviction").await;
    cluster.config("appendonly yes").await;
    prometheus.cured(&expected);
    cluster.until_ready().await;
}

async fn a_full_redis_fires_alerts(prometheus: &Prometheus, cluster: &Cluster, traffic: &Traffic) {
    let (begun, rising) = (Instant::now(), [alert("GatewayRedisMemoryRising", "")]);
    cluster.config(&format!("maxmemory {}", cluster.used_bytes().await * 4 / 3)).await;
    prometheus.fires(begun, &rising).await;
    let begun = Instant::now();
    let expected = [
        alert("GatewayRedisMemory", ""),
        alert("GatewayPublishesFailing", cluster.nodes[0].admin),
        alert("GatewayPublishesFailing", cluster.nodes[1].admin),
    ];
    cluster.config("maxmemory 1").await;
    traffic.set_bytes(200_000);
    prometheus.fires(begun, &expected).await;
    traffic.set_bytes(10);
    cluster.config("maxmemory 0").await;
    prometheus.cured(&[&rising[..], &expected].concat());
}

/// The link of one node to Redis: slow, then without pushes, then cut off.
async fn a_slow_link_fires_alerts(prometheus: &Prometheus, cluster: &Cluster) {
    let instance = cluster.nodes[2].admin;
    let slow = [alert("GatewayPublishSlow", instance), alert("GatewaySloBurn", "")];
    let begun = Instant::now();
    cluster.link.set(Mode::Delay(Duration::from_millis(300)));
    prometheus.fires(begun, &slow).await;
    cluster.link.set(Mode::Open);
    prometheus.cured(&slow);

    let (begun, silent) = (Instant::now(), [alert("GatewayLogRepairs", instance)]);
    let repairs = async {
        loop {
            cluster.link.set(Mode::DropPushes);
            until("the node notices", async || {
                get(cluster.nodes[2].admin, "/ready").await.status != 200
            })
            .await;
            cluster.link.set(Mode::Open);
            until("the node is ready", async || {
                get(cluster.nodes[2].admin, "/ready").await.status == 200
            })
            .await;
        }
    };
    tokio::select! {
        () = repairs => {}
        () = prometheus.fires(begun, &silent) => {}
    }
    cluster.link.set(Mode::Open);
    prometheus.cured(&silent);
    cluster.until_ready().await;

    let cut = [
        alert("GatewayBusDown", instance),
        alert("GatewayProbeLate", instance),
        alert("GatewayNotReady", "bus"),
        alert("GatewayLeaseLost", instance),
    ];
    until("the node's probes are in time", async || {
        !prometheus.firing().contains("GatewayProbeLate")
    })
    .await;
    let begun = Instant::now();
    cluster.link.set(Mode::BlackHole);
    prometheus.fires(begun, &cut).await;
    cluster.link.set(Mode::Open);
    prometheus.cured(&cut);
    cluster.until_ready().await;
}

/// Redis returns with another history than the nodes have seen; then it loses its data.
async fn lost_data_fires_alerts(prometheus: &Prometheus, cluster: &mut Cluster) {
    let split = room("split");
    let mut ann = connect(cluster.nodes[0].address, "ann").await;
    let epoch = ann.join(&split).await.unwrap().epoch;
    for text in ["1", "2", "3"] {
        say(&mut ann, &split, text).await;
        next_message(&mut ann).await;
    }
    let log = format!("gw:{{{}}}:r:{split}:log", partition_of(&split, 256));
    let mut planted = vec![words(&format!("DEL {log}"))];
    for seq in 1..=3 {
        let mut add = words(&format!("XADD {log} {seq}-0 e {epoch} t 0123456789abcdef p"));
        add.push(envelope(&split, |id| crate::harness::message_fields(&split, id, Some("other"))));
        planted.push(add);
    }
    call(&cluster.redis, &planted).await;
    let (begun, conflict) = (Instant::now(), [alert("GatewayLogConflict", "")]);
    cluster.redis.kill().await;
    cluster.redis.restart().await;
    prometheus.fires(begun, &conflict).await;
    prometheus.cured(&conflict);
    cluster.until_ready().await;

    // After the conflict: nodes that publish meanwhile may make further ones.
    let (begun, restored) = (Instant::now(), [alert("GatewayLogRestored", "restored")]);
    cluster.redis.command("FLUSHALL").await;
    prometheus.fires(begun, &restored).await;
    prometheus.cured(&restored);
    cluster.until_ready().await;
}

/// A node is killed and its target vanishes; another is frozen.
async fn dead_and_frozen_nodes_fire_alerts(
    prometheus: &Prometheus,
    cluster: &mut Cluster,
    sides: &[SocketAddr],
) {
    let begun = Instant::now();
    let missing = [alert("GatewayNodeMissing", "gw-1")];
    let down = [alert("GatewayDown", cluster.nodes[0].admin)];
    cluster.nodes[1].process.kill().await;
    cluster.nodes[0].process.signal("STOP");
    prometheus.set_targets([&[cluster.nodes[0].admin, cluster.nodes[2].admin], sides].concat());
    prometheus.fires(begun, &[&missing[..], &down].concat()).await;
    cluster.nodes[0].process.signal("CONT");
    prometheus.cured(&down);
    cluster.nodes[1] = Cluster::start_node(&cluster.redis, "gw-1").await;
    prometheus.cured(&missing);
    cluster.until_ready().await;
}

async fn silence_fires_an_alert(prometheus: &Prometheus, traffic: &Traffic) {
    let (begun, expected) = (Instant::now(), [alert("GatewayNoTraffic", "")]);
    traffic.pause(true);
    prometheus.fires(begun, &expected).await;
    traffic.pause(false);
    prometheus.cured(&expected);
}

/// Runs every query of the dashboard, for the last minutes. `is_full`: every cause was made, so that
/// each must have data.
async fn check_panels(prometheus: &Prometheus, is_full: bool) {
    let mut empty = vec![];
    let mut count = 0;
    for (title, query) in queries(&dashboard()) {
        let query = query
            .replace("$__rate_interval", "30s")
            .replace("$__range", "10m")
            .replace("\"$job\"", "\"gateway\"")
            .replace("\"$cluster\"", "\"skein\"")
            .replace("\"$instance\"", "\".*\"");
        assert!(!query.contains('$'), "{title}: {query}");
        count += 1;
        let result = prometheus.query_range(&query, Duration::from_secs(600)).await;
        // No exporter of nginx runs here.
        if result.is_empty() && !query.contains("job=\"nginx\"") {
            empty.push(format!("{title}: {query}"));
        }
    }
    println!("{count} queries of panels, {} without data: {empty:#?}", empty.len());
    assert!(count > 50, "{count}");
    assert!(!is_full || empty.is_empty(), "{empty:#?}");
}
