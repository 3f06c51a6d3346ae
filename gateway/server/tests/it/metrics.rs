//! The metrics of live nodes: each test makes the cause happen and reads the value.

use std::net::SocketAddr;

use serde_json::json;
use skein_client::{
    connection::{ClientConnection, RequestError},
    options::ConnectOptions,
};
use skein_protocol::protocol::server_frame::ServerFrame;
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::{
    api::{KEY, OPTIONS, call_as},
    harness::{
        Gateway, Node, Redis, SHORT_LEASE_OPTION, closed, connect, get, http_raw, next_message,
        room, say, until, within,
    },
};

/// The option with which a node has a server API.
const API_KEYS: (&str, &str) = OPTIONS[0];

/// The metrics of a node, as Prometheus reads them.
pub struct Scrape(String);

impl Scrape {
    pub async fn of(admin: SocketAddr) -> Self {
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
    pub fn value(&self, series: &str) -> f64 {
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
    assert!(metrics.value("gateway_bus_probe_age_seconds") > 1.5, "{}", metrics.0);
    assert!(metrics.value("gateway_lease_age_seconds") > 3.0, "{}", metrics.0);
    assert_eq!(metrics.value("gateway_ready"), 0.0);
    assert_eq!(metrics.value("gateway_not_ready{reason=\"bus\"}"), 1.0);
    redis.restart().await;
    until_value(node.admin, "gateway_ready", 1.0).await;
    // It is measured every 0.1 s, and the node is ready at once.
    until("the lease is renewed", async || {
        Scrape::of(node.admin).await.value("gateway_lease_age_seconds") < 3.5
    })
    .await;
    assert_eq!(Scrape::of(node.admin).await.value("gateway_leases_lost_total"), 1.0);
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

#[tokio::test]
async fn frames_messages_and_errors_are_counted_by_kind() {
    let node = Gateway::start(&[("metrics.legacy_names", "true"), API_KEYS]).await;
    let (mut ann, mut bob) = (node.connect("ann").await, node.connect("bob").await);
    let lobby = room("lobby");
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    for text in ["one", "two"] {
        say(&mut ann, &lobby, text).await;
        next_message(&mut bob).await;
    }
    let direct = json!({"type": "direct", "to": "bob", "content": "hi"});
    ann.request(&direct).await.unwrap();
    let elsewhere = json!({"type": "message", "room": "elsewhere", "content": "x"});
    assert!(matches!(ann.request(&elsewhere).await, Err(RequestError::Rejected(_))));
    let notify = "POST /api/v1/users/bob/notifications";
    let body = json!({"payload": {"text": "hi"}});
    let notified = call_as(Some(KEY), node.address, notify, Some(body)).await;
    until_value(node.admin, "gateway_messages_sent_total{kind=\"notification\"}", 1.0).await;
    assert!(notified.status < 300, "{notified:?}");
    let metrics = Scrape::of(node.admin).await;
    for (series, value) in [
        ("gateway_transport_connections{transport=\"websocket\"}", 2.0),
        ("gateway_users", 2.0),
        ("gateway_rooms", 1.0),
        ("gateway_messages_received_total{kind=\"message\"}", 2.0),
        ("gateway_messages_received_total{kind=\"direct\"}", 1.0),
        ("gateway_messages_received_total{kind=\"notification\"}", 1.0),
        // Each member has each message, each inbox of the two the direct.
        ("gateway_messages_sent_total{kind=\"message\"}", 4.0),
        ("gateway_messages_sent_total{kind=\"direct\"}", 2.0),
        ("gateway_frame_seconds_count{type=\"join\"}", 2.0),
        ("gateway_frame_seconds_count{type=\"message\"}", 3.0),
        ("gateway_frame_seconds_count{type=\"direct\"}", 1.0),
        ("gateway_errors_total{code=\"not_joined\",fault=\"client\"}", 1.0),
        ("gateway_errors_total{code=\"internal\",fault=\"server\"}", 0.0),
        ("gateway_publish_seconds_count{result=\"acknowledged\"}", 4.0),
        ("gateway_publish_seconds_count{result=\"failed\"}", 0.0),
        ("gateway_mailbox_messages", 0.0),
        ("gateway_outbox_bytes", 0.0),
    ] {
        assert_eq!(metrics.value(series), value, "{series}");
    }
    assert!(metrics.value("gateway_frame_seconds_sum{type=\"join\"}") > 0.0);
    let timed = metrics.value("gateway_delivery_seconds_count");
    let mean = metrics.value("gateway_delivery_seconds_sum") / timed;
    // The time of acceptance is in whole milliseconds.
    assert!((2.0..=5.0).contains(&timed) && mean < 30.0, "{timed} in the mean of {mean} s");
    let requests = metrics.sum("gateway_api_requests_total");
    let route = "{method=\"POST\",route=\"/api/v1/users/{user}/notifications\"";
    assert_eq!(requests, 1.0, "{}", metrics.0);
    assert_eq!(metrics.value(&format!("gateway_api_request_seconds_count{route}}}")), 1.0);
    let status = notified.status;
    let counted = format!("gateway_api_requests_total{route},status=\"{status}\"}}");
    assert_eq!(metrics.value(&counted), 1.0);
}

#[tokio::test]
async fn joins_and_reconnects_are_counted_as_what_they_are() {
    let node = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let options = ConnectOptions::new(node.url("/ws")).user("ann");
    let mut ann = ClientConnection::open(&options).await.unwrap();
    let connected = ann.expect_connected().await.unwrap();
    ann.join(&lobby).await.unwrap();
    let ack = say(&mut ann, &lobby, "one").await;
    let joins = async |result: &str| {
        let series = format!("gateway_joins_total{{result=\"{result}\"}}");
        Scrape::of(node.admin).await.value(&series)
    };
    assert_eq!((joins("new").await, joins("resumed").await), (1.0, 0.0));
    assert_eq!(Scrape::of(node.admin).await.sum("gateway_resumes_total"), 0.0);
    drop(ann);
    until_value(node.admin, "gateway_connections", 0.0).await;

    let url = node.url(&format!("/ws?session={}", connected.session));
    let mut ann = ClientConnection::open(&ConnectOptions::new(url)).await.unwrap();
    assert!(ann.expect_connected().await.unwrap().resumed);
    let since = json!({"epoch": ack.epoch, "seq": ack.seq - 1});
    for (room, since) in [("lobby", since), ("other", json!({"epoch": "9-gone", "seq": 7}))] {
        let join = json!({"type": "join", "room": room, "since": since});
        assert!(matches!(ann.request(&join).await, Ok(ServerFrame::Joined(_))), "{room}");
    }
    let metrics = Scrape::of(node.admin).await;
    for (series, value) in [
        ("gateway_reconnects_total", 1.0),
        ("gateway_joins_total{result=\"resumed\"}", 1.0),
        ("gateway_joins_total{result=\"not_resumed\"}", 1.0),
        ("gateway_resumes_total{source=\"ring\"}", 1.0),
    ] {
        assert_eq!(metrics.value(series), value, "{series}");
    }
}

#[tokio::test]
async fn disconnects_tell_code_reason_and_side() {
    let options = [("heartbeat.interval", "200ms"), ("heartbeat.idle_timeout", "1s"), API_KEYS];
    let node = Gateway::start(&options).await;
    let mut ann = node.connect("ann").await;
    ann.close(1000, "bye").await;
    let bob = node.connect("bob").await;
    drop(bob);
    let mut cat = node.connect("cat").await;
    let kick = call_as(Some(KEY), node.address, "POST /api/v1/users/cat/disconnect", None).await;
    assert_eq!(kick.status, 200, "{kick:?}");
    closed(&mut cat).await;
    // A client that does not read answers no ping.
    let _dan = node.connect("dan").await;
    for (labels, value) in [
        ("code=\"1000\",reason=\"none\",side=\"client\"", 1.0),
        ("code=\"1006\",reason=\"none\",side=\"network\"", 1.0),
        ("code=\"1008\",reason=\"kicked\",side=\"gateway\"", 1.0),
        ("code=\"4002\",reason=\"none\",side=\"gateway\"", 1.0),
    ] {
        let series = format!("gateway_disconnects_total{{{labels}}}");
        until_value(node.admin, &series, value).await;
    }
    let metrics = Scrape::of(node.admin).await;
    assert_eq!(metrics.sum("gateway_disconnects_total"), 4.0, "{}", metrics.0);
}

#[tokio::test]
async fn pings_are_timed() {
    let options = [("heartbeat.interval", "100ms"), ("heartbeat.idle_timeout", "20s")];
    let node = Gateway::start(&options).await;
    let mut ann = node.connect("ann").await;
    let reading = async { while ann.next().await.is_ok() {} };
    let measured = until("two pings are answered", async || {
        Scrape::of(node.admin).await.value("gateway_ping_seconds_count") >= 2.0
    });
    tokio::select! {
        () = reading => panic!("the connection has ended"),
        () = measured => {}
    }
    let metrics = Scrape::of(node.admin).await;
    let mean =
        metrics.value("gateway_ping_seconds_sum") / metrics.value("gateway_ping_seconds_count");
    assert!(mean > 0.0 && mean < 20.0, "{mean}");
}

#[tokio::test]
async fn refused_handshakes_are_counted_by_cause() {
    let redis = Redis::start().await;
    let options = [
        ("limits.connections_max", "3"),
        ("limits.connections_per_user", "1"),
        ("drain.delay", "30s"),
        API_KEYS,
        ("node.id", "a"),
    ];
    let node = Node::start(&redis, None, &options).await;
    let refused = async |cause: &str, value: f64| {
        let series = format!("gateway_handshakes_refused_total{{cause=\"{cause}\"}}");
        until_value(node.admin, &series, value).await;
    };
    let status = async |header: &str| {
        let request = format!(
            "GET /ws?user=zoe HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{header}\r\n"
        );
        http_raw(node.address, &request).await.status
    };
    let _ann = connect(node.address, "ann").await;
    let options = ConnectOptions::new(format!("ws://{}/ws", node.address)).user("ann");
    let mut again = ClientConnection::open(&options).await.unwrap();
    closed(&mut again).await;
    drop(again);
    refused("connections_per_user", 1.0).await;
    let nameless = format!("ws://{}/ws?user=%20", node.address);
    let mut nameless = ClientConnection::open(&ConnectOptions::new(nameless)).await.unwrap();
    closed(&mut nameless).await;
    drop(nameless);
    refused("unauthenticated", 1.0).await;
    assert_eq!(status("Origin: https://elsewhere.example\r\n").await, 403);
    refused("origin", 1.0).await;
    // The places of closed connections are free a moment later.
    let mut others = Vec::new();
    for user in ["bob", "cat"] {
        let options = ConnectOptions::new(format!("ws://{}/ws", node.address)).user(user);
        until("there is a place", async || {
            let opened = ClientConnection::open(&options).await;
            others.extend(opened.ok());
            others.len() == if user == "bob" { 1 } else { 2 }
        })
        .await;
    }
    let full = "gateway_handshakes_refused_total{cause=\"full\"}";
    let before = Scrape::of(node.admin).await.value(full);
    assert_eq!(status("").await, 503);
    refused("full", before + 1.0).await;
    assert_eq!(get(node.address, "/ws").await.status, 426);
    refused("invalid", 1.0).await;
    redis.signal("STOP");
    until_value(node.admin, "gateway_bus_up", 0.0).await;
    // The node is full as well, which counts where the bus is up again for a moment.
    until("a handshake is refused because of the bus", async || {
        assert_eq!(status("").await, 503);
        let bus = "gateway_handshakes_refused_total{cause=\"bus\"}";
        Scrape::of(node.admin).await.value(bus) > 0.0
    })
    .await;
    redis.signal("CONT");
    until_value(node.admin, "gateway_ready", 1.0).await;
    let drain = call_as(Some(KEY), node.address, "POST /api/v1/nodes/a/drain", None).await;
    assert_eq!(drain.status, 200, "{drain:?}");
    until_value(node.admin, "gateway_not_ready{reason=\"drain\"}", 1.0).await;
    assert_eq!(status("").await, 503);
    refused("draining", 1.0).await;
    let metrics = Scrape::of(node.admin).await;
    let unavailable = metrics.value("gateway_handshakes_total{result=\"unavailable\"}");
    let of = |cause| format!("gateway_handshakes_refused_total{{cause=\"{cause}\"}}");
    let causes = ["full", "bus", "draining", "not_ready", "accept_rate"].map(of);
    assert_eq!(unavailable, causes.iter().map(|cause| metrics.value(cause)).sum::<f64>());
}

#[tokio::test]
async fn a_client_that_does_not_read_shows_in_the_outboxes() {
    let node = Gateway::start(&[("limits.outbox_bytes_max", "1MiB")]).await;
    let (mut ann, lobby) = (node.connect("ann").await, room("lobby"));
    let mut bob = node.connect("bob").await;
    bob.join(&lobby).await.unwrap();
    ann.join(&lobby).await.unwrap();
    let content = "x".repeat(200_000);
    until("the outbox of bob fills up", async || {
        let frame = json!({"type": "message", "room": "lobby", "content": content, "echo": false});
        ann.request(&frame).await.unwrap();
        Scrape::of(node.admin).await.value("gateway_slow_consumers_total") > 0.0
    })
    .await;
    until("the length of the outbox is measured", async || {
        let metrics = Scrape::of(node.admin).await;
        let most = metrics.value("gateway_outbox_largest_bytes");
        most > 500_000.0
            && metrics.value("gateway_outbox_bytes") >= most
            && metrics.value("gateway_outbox_frames") >= 3.0
    })
    .await;
}

#[tokio::test]
async fn canaries_measure_the_path_between_nodes() {
    let redis = Redis::start().await;
    let a = Node::start(&redis, None, &[("node.id", "a")]).await;
    let b = Node::start(&redis, None, &[("node.id", "b")]).await;
    for (admin, from) in [(a.admin, "b"), (b.admin, "a"), (a.admin, "a")] {
        let series = format!("gateway_canary_seconds{{from=\"{from}\"}}");
        until(&format!("{series} at {admin}"), async || {
            let metrics = Scrape::of(admin).await;
            metrics.get(&series).is_some_and(|seconds| (0.0..5.0).contains(&seconds))
        })
        .await;
    }
    redis.command("PUBLISH gw:canary nonsense").await.unwrap();
    let series = "gateway_redis_invalid_values_total{kind=\"pubsub_message\"}";
    until_value(a.admin, series, 1.0).await;
}

/// The answer of `GET /api/v1/top`.
async fn top(address: SocketAddr, by: &str) -> serde_json::Value {
    let call = format!("GET /api/v1/top?by={by}");
    let answer = call_as(Some(KEY), address, &call, None).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

#[tokio::test]
async fn the_largest_senders_are_named_with_their_nodes() {
    let redis = Redis::start().await;
    let options = |id| [API_KEYS, ("limits.messages_per_second", "20"), ("node.id", id)];
    let a = Node::start(&redis, None, &options("a")).await;
    let b = Node::start(&redis, None, &options("b")).await;
    let (mut ann, mut bob) = (connect(a.address, "ann").await, connect(b.address, "bob").await);
    ann.join(&room("lobby")).await.unwrap();
    // Above the rate, so that most of it is refused.
    for number in 0..400 {
        let text = json!({"type": "message", "room": "lobby", "content": number});
        ann.send_json(&text).await.unwrap();
    }
    bob.send_text(&format!("{{\"type\":\"ping\",\"pad\":\"{}\"}}", "x".repeat(60_000)))
        .await
        .unwrap();
    let first = |list: &serde_json::Value, of: &str, name: &str| {
        (list[of][0][name].clone(), list[of][0]["node"].clone())
    };
    until("ann floods node a", async || {
        let list = top(b.address, "frames").await;
        first(&list, "users", "user") == (json!("ann"), json!("a"))
            && list["users"][0]["frames"].as_u64().unwrap() >= 300
            && first(&list, "addresses", "address").0 == "127.0.0.1"
    })
    .await;
    until("ann gets most refusals", async || {
        let list = top(a.address, "refusals").await;
        first(&list, "users", "user").0 == "ann"
            && list["users"][0]["refusals"].as_u64().unwrap() > 100
    })
    .await;
    until("bob sends most bytes", async || {
        let list = top(a.address, "bytes").await;
        first(&list, "users", "user") == (json!("bob"), json!("b"))
    })
    .await;
    let call = "GET /api/v1/top?by=name";
    assert_eq!(call_as(Some(KEY), a.address, call, None).await.status, 400);
}

#[tokio::test]
async fn a_trail_names_the_connections_that_lag() {
    let node = Gateway::start(&[("limits.outbox_bytes_max", "1MiB"), API_KEYS]).await;
    let (mut ann, lobby) = (node.connect("ann").await, room("lobby"));
    let mut bob = node.connect("bob").await;
    bob.join(&lobby).await.unwrap();
    ann.join(&lobby).await.unwrap();
    let content = "x".repeat(200_000);
    let mut missed = serde_json::Value::Null;
    until("bob is named", async || {
        let frame = json!({"type": "message", "room": "lobby", "content": content, "echo": false});
        let ServerFrame::Ack(ack) = ann.request(&frame).await.unwrap() else { panic!("no ack") };
        let call = format!("GET /api/v1/messages/{}/trail", ack.id);
        let trail = call_as(Some(KEY), node.address, &call, None).await;
        let trail: serde_json::Value = serde_json::from_str(&trail.body).unwrap();
        missed = trail["nodes"][0]["logs"][0]["handed_out"]["missed"][0].clone();
        !missed.is_null()
    })
    .await;
    assert_eq!(missed["user"], "bob");
    assert!(missed["why"].as_str().unwrap().contains("log"), "{missed}");
}
