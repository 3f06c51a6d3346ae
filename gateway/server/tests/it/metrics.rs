//! The metrics of live nodes: each test makes the cause happen and reads the value.

use std::net::SocketAddr;

use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::harness::{Gateway, Node, Redis, SHORT_LEASE_OPTION, get, until, within};

/// The metrics of a node, as Prometheus reads them.
struct Scrape(String);

impl Scrape {
    async fn of(admin: SocketAddr) -> Self {
        let answer = get(admin, "/metrics").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        Self(answer.body)
    }

    /// The value of a series, written as it is exported; `None` if there is none.
    fn get(&self, series: &str) -> Option<f64> {
        let value = self.0.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map(|value| value.parse().unwrap())
    }

    /// The value of a series that exists.
    #[track_caller]
    fn value(&self, series: &str) -> f64 {
        self.get(series).unwrap_or_else(|| panic!("there is no {series} in\n{}", self.0))
    }

    /// The sum over the series of a metric.
    fn sum(&self, metric: &str) -> f64 {
        let of = |line: &&str| {
            line.strip_prefix(metric).is_some_and(|rest| rest.starts_with(['{', ' ']))
        };
        let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        self.0.lines().filter(of).map(value).sum()
    }
}

/// Waits until a series has a value.
async fn until_value(admin: SocketAddr, series: &str, value: f64) {
    let mut last = None;
    let is_there = async || {
        last = Scrape::of(admin).await.get(series);
        last == Some(value)
    };
    until(&format!("{series} is {value}"), is_there).await;
}

#[tokio::test]
async fn promtool_accepts_the_metrics_of_a_live_node() {
    let redis = Redis::start().await;
    let node = Gateway::start_on(&redis, &[("metrics.legacy_names", "true")]).await;
    let _client = node.connect("ann").await;
    until_value(node.admin, "gateway_nodes", 1.0).await;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool is installed by `make setup`");
    let Scrape(text) = Scrape::of(node.admin).await;
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).await.unwrap();
    drop(stdin);
    let found = within(promtool.wait_with_output()).await.unwrap();
    let found = (found.status.code(), String::from_utf8_lossy(&found.stderr).into_owned());
    assert_eq!(found, (Some(0), String::new()));
}

#[tokio::test]
async fn readiness_and_capacity_are_exported() {
    let options = [("limits.connections_max", "7"), ("node.id", "a")];
    let node = Node::start_alone(&options).await;
    let metrics = Scrape::of(node.admin).await;
    let info = metrics.0.lines().find(|line| line.starts_with("gateway_info{")).unwrap();
    let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
    assert!(info.contains("node=\"a\"") && info.contains(&version), "{info}");
    assert!(info.contains("commit=\""), "{info}");
    assert_eq!(metrics.value("gateway_connections_max"), 7.0);
    assert_eq!(metrics.value("gateway_ready"), 1.0);
    assert_eq!(metrics.sum("gateway_not_ready"), 0.0);
    // Ticks of 10 ms: within a second of work a value that is no whole second is seen.
    until("the CPU time has a fraction of a second", async || {
        Scrape::of(node.admin).await.value("process_cpu_seconds_total").fract() > 0.0
    })
    .await;
}

#[tokio::test]
async fn a_killed_node_is_missing_and_a_stopped_one_is_not() {
    let redis = Redis::start().await;
    let options = |id| [("node.id", id), SHORT_LEASE_OPTION];
    let a = Node::start(&redis, None, &options("a")).await;
    let mut b = Node::start(&redis, None, &options("b")).await;
    let c = Node::start(&redis, None, &options("c")).await;
    until_value(a.admin, "gateway_nodes", 3.0).await;
    c.process.signal("TERM");
    c.end().await;
    until_value(a.admin, "gateway_nodes", 2.0).await;
    b.process.kill().await;
    until_value(a.admin, "gateway_node_missing{node=\"b\"}", 1.0).await;
    let metrics = Scrape::of(a.admin).await;
    assert_eq!(metrics.value("gateway_nodes"), 1.0);
    assert_eq!(metrics.sum("gateway_node_missing"), 1.0, "{}", metrics.0);
    let _b = Node::start(&redis, None, &options("b")).await;
    until_value(a.admin, "gateway_nodes", 2.0).await;
    assert_eq!(Scrape::of(a.admin).await.sum("gateway_node_missing"), 0.0);
}

#[tokio::test]
async fn a_lost_redis_ages_probe_and_lease() {
    let mut redis = Redis::start_durable().await;
    let node = Node::start(&redis, None, &[SHORT_LEASE_OPTION]).await;
    until_value(node.admin, "gateway_ready", 1.0).await;
    let metrics = Scrape::of(node.admin).await;
    assert!(metrics.value("gateway_bus_probe_age_seconds") < 4.0);
    assert_eq!(metrics.value("gateway_leases_lost_total"), 0.0);
    redis.kill().await;
    until_value(node.admin, "gateway_leases_lost_total", 1.0).await;
    let metrics = Scrape::of(node.admin).await;
    assert!(metrics.value("gateway_bus_probe_age_seconds") > 3.0, "{}", metrics.0);
    assert!(metrics.value("gateway_lease_age_seconds") > 3.0, "{}", metrics.0);
    assert_eq!(metrics.value("gateway_ready"), 0.0);
    assert_eq!(metrics.value("gateway_not_ready{reason=\"bus\"}"), 1.0);
    redis.restart().await;
    until_value(node.admin, "gateway_ready", 1.0).await;
    let metrics = Scrape::of(node.admin).await;
    assert_eq!(metrics.value("gateway_leases_lost_total"), 1.0);
    assert!(metrics.value("gateway_lease_age_seconds") < 4.0, "{}", metrics.0);
}

#[tokio::test]
async fn settings_and_replicas_of_redis_are_exported() {
    let redis = Redis::start().await;
    let node = Gateway::start_on(&redis, &[]).await;
    let version = redis.answer("INFO server").await;
    let version = version.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap();
    until_value(node.admin, &format!("gateway_redis_info{{version=\"{}\"}}", version.trim()), 1.0)
        .await;
    let metrics = Scrape::of(node.admin).await;
    assert_eq!(metrics.sum("gateway_redis_persistence"), 0.0, "the test starts it without");
    assert_eq!(metrics.value("gateway_redis_evicts_keys"), 0.0);
    assert!(metrics.value("gateway_redis_round_trip_seconds_count") >= 1.0);
    assert!(metrics.value("gateway_redis_memory_used_bytes") > 500_000.0);

    let replica = Redis::start_new(false).await;
    let port = redis.port.to_string();
    for (redis, command) in [
        (&redis, "CONFIG SET maxmemory-policy allkeys-lru"),
        (&redis, "CONFIG SET appendonly yes"),
        (&redis, "CONFIG SET save \"60 1\""),
        (&replica, &format!("REPLICAOF 127.0.0.1 {port}")),
    ] {
        redis.command(command).await.filter(|answer| answer.starts_with('+')).expect(command);
    }
    for (series, value) in [
        ("gateway_redis_evicts_keys", 1.0),
        ("gateway_not_ready{reason=\"maxmemory_policy\"}", 1.0),
        ("gateway_redis_persistence{kind=\"aof\"}", 1.0),
        ("gateway_redis_persistence{kind=\"rdb\"}", 1.0),
        ("gateway_redis_replicas", 1.0),
    ] {
        until_value(node.admin, series, value).await;
    }
    // A frozen replica acknowledges nothing.
    replica.signal("STOP");
    until("the replica falls behind", async || {
        let metrics = Scrape::of(node.admin).await;
        metrics.value("gateway_redis_replica_lag_seconds") >= 2.0
            && metrics.value("gateway_redis_replica_lag_bytes") > 0.0
    })
    .await;
    replica.signal("CONT");
    until("the replica has caught up", async || {
        Scrape::of(node.admin).await.value("gateway_redis_replica_lag_seconds") <= 1.0
    })
    .await;
    node.stop().await;
}
