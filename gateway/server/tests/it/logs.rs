//! Log lines of a gateway process: the node on each, clients and orders at INFO, no secrets.

use std::{net::SocketAddr, process::Stdio};

use serde_json::{Value, json};
use skein_client::{connection::ClientConnection, options::ConnectOptions};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    api::{self, KEY, call_as},
    harness::{Process, Redis, closed, free_port, gateway_binary, get, room, say, until},
};

/// A gateway process whose whole log is kept, from the first line.
struct LoggedNode {
    process: Process,
    address: SocketAddr,
    log: std::path::PathBuf,
}

impl LoggedNode {
    async fn start(url: Option<&str>, extra: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        let log = folder.path().join("log");
        let (listen, admin) = (free_port(), free_port());
        let (address, admin) = (format!("127.0.0.1:{listen}"), format!("127.0.0.1:{admin}"));
        let mut command = Command::new(gateway_binary());
        let own = [
            ("server.listen", address.as_str()),
            ("admin.listen", admin.as_str()),
            ("node.id", "n0"),
            ("drain.delay", "1ms"),
            ("limits.handshakes_per_minute_per_ip", "0"),
        ];
        let cluster = url.map(|url| [("cluster.redis_url", url), ("cluster.memory_max", "1GiB")]);
        let cluster = cluster.iter().flatten();
        for (key, value) in own.iter().chain(&api::OPTIONS).chain(cluster).chain(extra) {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let child = command
            .current_dir(folder.path())
            .stderr(Stdio::from(std::fs::File::create(&log).unwrap()))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let process = Process::of(child, folder);
        until("the gateway is ready", async || {
            let connects = async |to| tokio::net::TcpStream::connect(to).await.is_ok();
            connects(&address).await
                && connects(&admin).await
                && get(admin.parse().unwrap(), "/ready").await.status == 200
        })
        .await;
        Self { process, address: address.parse().unwrap(), log }
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn lines(&self) -> Vec<Value> {
        let text = self.text();
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
        };
        text.lines().map(parse).collect()
    }

    /// The lines with this message.
    fn with_message(&self, message: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["message"] == message).collect()
    }

    /// The only line with this message, once it is there.
    async fn one(&self, message: &str) -> Value {
        until(message, async || !self.with_message(message).is_empty()).await;
        let [line] = &self.with_message(message)[..] else { panic!("{}", self.text()) };
        line.clone()
    }

    async fn connect(&self, user: &str, request_id: Option<&str>) -> ClientConnection {
        let mut options = ConnectOptions::new(format!("ws://{}/ws", self.address)).user(user);
        options.headers.extend(request_id.map(|id| ("X-Request-ID".into(), id.to_owned())));
        let mut connection = ClientConnection::open(&options).await.unwrap();
        connection.expect_connected().await.unwrap();
        connection
    }
}

const JSON: (&str, &str) = ("log.format", "json");
const JWT: [(&str, &str); 2] =
    [("auth.mode", "jwt"), ("auth.jwt_secret", "a secret that nobody knows at all")];

#[tokio::test]
async fn clients_and_orders_are_logged_and_secrets_are_not() {
    let redis = Redis::start().await;
    redis.command("ACL SETUSER gate on >redis-secret ~* &* +@all").await;
    let url = format!("redis://gate:redis-secret@{}", redis.address());
    let options = [JSON, ("auth.allow_anonymous", "true"), ("log.level", "debug")];
    let node = LoggedNode::start(Some(&url), &options).await;

    let mut ann = node.connect("ann", Some("edge-1")).await;
    ann.join(&room("r")).await.unwrap();
    say(&mut ann, &room("r"), "message-secret").await;
    let body = json!({"content": "message-secret"});
    let sent = call_as(Some(KEY), node.address, "POST /api/v1/rooms/r/messages", Some(body)).await;
    assert_eq!(sent.status, 201);
    let kick = "DELETE /api/v1/rooms/r/members/ann";
    assert_eq!(call_as(Some(KEY), node.address, kick, None).await.status, 200);
    let end = "POST /api/v1/users/ann/disconnect";
    assert_eq!(call_as(Some(KEY), node.address, end, Some(json!({}))).await.status, 200);
    closed(&mut ann).await;
    ann.close(1000, "").await;

    let connected = node.one("client connected").await;
    assert_eq!((&connected["level"], &connected["user"]), (&json!("INFO"), &json!("ann")));
    assert_eq!(connected["address"], "127.0.0.1");
    assert_eq!(connected["request_id"], "edge-1");
    let disconnected = node.one("client disconnected").await;
    assert_eq!(disconnected["connection"], connected["connection"]);
    assert_eq!((&disconnected["code"], &disconnected["side"]), (&json!(1008), &json!("gateway")));
    assert_eq!(disconnected["frames_in"], 2);
    assert!(disconnected["seconds"].is_u64(), "{disconnected}");
    assert!(disconnected["frames_out"].as_u64().unwrap() >= 4, "{disconnected}");

    let orders = node.with_message("API order");
    let of = |order: &Value| json!([order["key"], order["method"], order["path"], order["status"]]);
    let orders: Vec<_> = orders.iter().map(of).collect();
    assert_eq!(
        orders,
        [
            json!(["test", "POST", "/api/v1/rooms/r/messages", 201]),
            json!(["test", "DELETE", "/api/v1/rooms/r/members/ann", 200]),
            json!(["test", "POST", "/api/v1/users/ann/disconnect", 200]),
        ]
    );
    // Redis is named, with its user.
    let server = format!("gate@{}", redis.address());
    let link = node.with_message("Redis link is up");
    assert!(!link.is_empty() && link.iter().all(|line| line["server"] == server), "{link:?}");
    // Messages are at debug: their ids, and never their content.
    assert!(node.with_message("message published").len() == 2, "{}", node.text());
    for line in node.lines() {
        assert_eq!(line["node"], "n0", "{line}");
        let is_expected =
            line["message"].as_str().is_some_and(|text| text.starts_with("ANONYMOUS"));
        let is_bad = line["level"] == "WARN" || line["level"] == "ERROR";
        assert!(!is_bad || is_expected, "{line}");
        for secret in ["message-secret", "redis-secret", KEY] {
            assert!(!line.to_string().contains(secret), "{line}");
        }
    }
}

#[tokio::test]
async fn a_healthy_start_and_stop_have_no_warning() {
    let redis = Redis::start().await;
    for format in ["json", "text"] {
        let options = [&JWT[..], &[("log.format", format)]].concat();
        let mut node = LoggedNode::start(Some(&redis.url()), &options).await;
        node.process.signal("TERM");
        assert_eq!(node.process.end().await, Some(0));
        let text = node.text();
        assert!(text.contains("ready; the chat page") && text.contains("stopped"), "{text}");
        assert!(!text.contains("WARN") && !text.contains("ERROR"), "{text}");
        let node = if format == "json" { r#""node":"n0"}"# } else { " node=n0" };
        assert!(text.lines().all(|line| line.ends_with(node)), "{text}");
    }
}

#[tokio::test]
async fn lines_about_clients_are_sampled_and_counted() {
    const CLIENTS: u64 = 200;
    let node = LoggedNode::start(None, &[JSON]).await;
    for _ in 0..CLIENTS {
        drop(node.connect("ann", None).await);
    }
    // A later line tells what was left out.
    let total = |lines: &[Value]| -> u64 {
        lines.iter().map(|line| 1 + line["suppressed"].as_u64().unwrap()).sum()
    };
    let mut clients = CLIENTS;
    for message in ["client connected", "client disconnected"] {
        until(message, async || {
            drop(node.connect("bob", None).await);
            clients += 1;
            total(&node.with_message(message)) >= CLIENTS
        })
        .await;
        let lines = node.with_message(message);
        let suppressed = lines.iter().filter(|line| line["suppressed"] != 0).count();
        assert!(suppressed > 0 && total(&lines) <= clients, "{}", node.text());
    }
}

#[tokio::test]
async fn refusals_are_logged_once_a_minute_with_their_reason() {
    let options = [&JWT[..], &[JSON]].concat();
    let node = LoggedNode::start(None, &options).await;
    let url = format!("ws://{}/ws?token=no-such-token", node.address);
    for _ in 0..3 {
        let mut refused = ClientConnection::open(&ConnectOptions::new(url.clone())).await.unwrap();
        assert_eq!(closed(&mut refused).await, (Some(1008), "token_invalid".to_owned()));
        let mut page = ConnectOptions::new(url.clone());
        page.headers.push(("Origin".into(), "https://elsewhere.example".into()));
        assert!(ClientConnection::open(&page).await.is_err());
    }
    let admitted = node.one("client not admitted").await;
    assert_eq!((&admitted["code"], &admitted["reason"]), (&json!(1008), &json!("token_invalid")));
    let handshake = node.one("handshake refused").await;
    assert_eq!((&handshake["cause"], &handshake["status"]), (&json!("origin"), &json!(403)));
    assert!(!node.text().contains("no-such-token"));
}
