//! Reload of the configuration: what applies at once, what does not, and the rotation of secrets.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::{Value, json};
use skein_client::{
    connection::ClientConnection,
    options::{ConnectOptions, TokenLocation},
};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    harness::{Http, Node, Redis, closed, gateway_binary, http_raw, room, say, until, within},
    tidy::root,
};

const OLD_KEY: &str = "old-key-0123456789abcdef";
const NEW_KEY: &str = "new-key-0123456789abcdef";
const OLD_SECRET: &str = "old-secret-0123456789abcdef0123456789";
const NEW_SECRET: &str = "new-secret-0123456789abcdef0123456789";

/// A configuration file, and the node that has it.
struct Configured {
    node: Node,
    file: PathBuf,
    _folder: TempDir,
}

impl Configured {
    async fn start(config: &str, extra: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("gateway.toml");
        write(&file, config);
        let mut command = Command::new(gateway_binary());
        command.arg("--config").arg(&file);
        Self { node: Node::run(command, extra).await, file, _folder: folder }
    }

    async fn call(&self, method: &str, path: &str, key: &str) -> Http {
        let request = format!(
            "{method} /api/v1/{path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\
             Content-Length: 0\r\nConnection: close\r\n\r\n"
        );
        http_raw(self.node.address, &request).await
    }

    async fn accepts_key(&self, key: &str) -> bool {
        self.call("GET", "nodes", key).await.status == 200
    }

    /// Connects with a token, or returns the reason of the rejection.
    async fn connect(&self, token: &str) -> Result<ClientConnection, String> {
        let url = format!("ws://{}/ws", self.node.address);
        let options = ConnectOptions::new(&url).token(token, TokenLocation::Header);
        let mut client =
            ClientConnection::open(&options).await.map_err(|error| format!("{error:?}"))?;
        match client.expect_connected().await {
            Ok(_) => Ok(client),
            Err(error) => Err(format!("{error:?}")),
        }
    }
}

/// Replaces a file as a deployment does, so that no reader finds half of it.
fn write(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, file).unwrap();
}

fn token(secret: &str, kid: Option<&str>) -> String {
    let header =
        jsonwebtoken::Header { kid: kid.map(str::to_owned), ..jsonwebtoken::Header::default() };
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    let claims = json!({"sub": "ann", "exp": 4_000_000_000_u64});
    jsonwebtoken::encode(&header, &claims, &key).unwrap()
}

#[tokio::test]
async fn alone_sighup_applies_what_it_can_and_names_the_rest() {
    let before = format!("[api]\nkeys = [\"web:{OLD_KEY}\"]\n");
    let configured = Configured::start(&before, &[]).await;
    let node = &configured.node;
    let mut ann = crate::harness::connect(node.address, "ann").await;
    let (lobby, other) = (room("lobby"), room("other"));
    ann.join(&lobby).await.unwrap();
    let from_page = async || {
        let request = format!(
            "GET /ws HTTP/1.1\r\nHost: {}\r\nOrigin: https://app.example\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            node.address
        );
        http_raw(node.address, &request).await.status
    };
    assert_eq!(from_page().await, 403);
    assert!(configured.accepts_key(OLD_KEY).await && !configured.accepts_key(NEW_KEY).await);

    let after = format!(
        "[api]\nkeys = [\"web:{NEW_KEY}\"]\n[limits]\nrooms_per_connection = 1\n\
         [server]\nallowed_origins = [\"https://app.example\"]\n[log]\nlevel = \"debug\"\n\
         [hub]\nshards = 3\n"
    );
    write(&configured.file, &after);
    node.process.signal("HUP");
    until("the new key counts", async || configured.accepts_key(NEW_KEY).await).await;
    assert!(!configured.accepts_key(OLD_KEY).await);
    assert_eq!(from_page().await, 101);
    // The connection lives on, and the limit applies to it.
    say(&mut ann, &lobby, "still here").await;
    assert!(ann.join(&other).await.is_err(), "the limit of rooms did not change");

    // Options that need a restart are reported again.
    let again = configured.call("POST", "nodes/*/reload", NEW_KEY).await;
    assert_eq!(again.status, 200, "{}", again.body);
    let report: Value = serde_json::from_str(&again.body).unwrap();
    let report = &report["nodes"][0];
    assert_eq!(report["applied"], json!([]));
    assert_eq!(report["errors"], json!([]));
    assert_eq!(report["needs_restart"], json!([{"option": "hub.shards", "from": "0", "to": "3"}]));
    node.process.signal("TERM");
    let (code, said) = configured.node.end().await;
    assert_eq!(code, Some(0), "{said}");
    let changed = |option: &str| {
        let mut lines = said.lines().filter(|line| line.contains("option changed"));
        lines.any(|line| line.contains(&format!("\"{option}\"")))
    };
    for option in ["api.keys", "limits.rooms_per_connection", "server.allowed_origins", "log.level"]
    {
        assert!(changed(option), "{option} is missing in {said}");
    }
    assert!(said.contains("restart the node to apply it") && said.contains("hub.shards"), "{said}");
    assert!(said.contains("\"DEBUG\""), "the level did not change: {said}");
    assert!(!said.contains(OLD_KEY) && !said.contains(NEW_KEY), "{said}");
}

#[tokio::test]
async fn alone_a_configuration_with_a_mistake_changes_nothing() {
    let before = format!("[api]\nkeys = [\"web:{OLD_KEY}\"]\n");
    let configured = Configured::start(&before, &[]).await;
    for (mistakes, keys) in [
        (format!("{before}[limits]\nrooms_per_connection = 0\nmessages = 1\n"), 2),
        (format!("[api]\nkeys = [\"web:{NEW_KEY}\"\n"), 1),
        (format!("[api]\nkeys = [\"web:{NEW_KEY}\"]\n[auth]\nmode = \"jwt\"\n"), 1),
        // Each is valid, but not with the value that only a restart changes.
        (
            format!(
                "[api]\nkeys = [\"web:{NEW_KEY}\"]\n[auth]\nmode = \"jwt\"\n\
                 jwt_secret = \"{NEW_SECRET}\"\n"
            ),
            1,
        ),
    ] {
        write(&configured.file, &mistakes);
        let answer = configured.call("POST", "nodes/*/reload", OLD_KEY).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let report: Value = serde_json::from_str(&answer.body).unwrap();
        let report = &report["nodes"][0];
        assert_eq!(report["errors"].as_array().unwrap().len(), keys, "{report}");
        assert_eq!((&report["applied"], &report["needs_restart"]), (&json!([]), &json!([])));
        assert!(!answer.body.contains(NEW_KEY) && !answer.body.contains(NEW_SECRET));
        assert!(configured.accepts_key(OLD_KEY).await && !configured.accepts_key(NEW_KEY).await);
    }
    configured.node.process.signal("HUP");
    // A signal is handled before a later one.
    configured.node.process.signal("TERM");
    let (code, said) = configured.node.end().await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("reload rejected: nothing has changed"), "{said}");
    assert!(!said.contains(NEW_KEY) && !said.contains(NEW_SECRET), "{said}");
}

#[tokio::test]
async fn a_reload_through_any_node_reaches_one_node_or_all() {
    let redis = Redis::start().await;
    let url = redis.url();
    let before = format!("[api]\nkeys = [\"web:{OLD_KEY}\"]\n");
    let start = async |id: &'static str| {
        let cluster = [
            ("cluster.redis_url", url.as_str()),
            ("auth.allow_anonymous", "true"),
            ("node.id", id),
        ];
        Configured::start(&before, &cluster).await
    };
    let (a, b) = tokio::join!(start("a"), start("b"));
    let limits = format!("{before}[limits]\nrooms_per_connection = 9\n");
    for node in [&a, &b] {
        write(&node.file, &limits);
    }
    let reload = async |id: &str| {
        let answer = a.call("POST", &format!("nodes/{id}/reload"), OLD_KEY).await;
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let change = json!([{"option": "limits.rooms_per_connection", "from": "500", "to": "9"}]);
    let (status, report) = reload("b").await;
    assert_eq!((status, report["nodes"].as_array().unwrap().len()), (200, 1), "{report}");
    assert_eq!(
        (&report["nodes"][0]["node"], &report["nodes"][0]["applied"]),
        (&json!("b"), &change)
    );
    let (status, report) = reload("*").await;
    assert_eq!(status, 200);
    let applied =
        |at: usize| (report["nodes"][at]["node"].clone(), &report["nodes"][at]["applied"]);
    assert_eq!(applied(0), (json!("a"), &change), "{report}");
    assert_eq!(applied(1), (json!("b"), &json!([])), "{report}");
    assert_eq!(reload("none").await.0, 404);
}

/// The configurations of the recipe in `docs/operations.md`, in its order.
fn recipe() -> Vec<String> {
    let page = std::fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let section = page.split("\n## Rotating secrets\n").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```toml\n").skip(1);
    blocks
        .map(|block| {
            let text = block.split("```").next().unwrap();
            text.replace("OLD_SECRET", OLD_SECRET)
                .replace("NEW_SECRET", NEW_SECRET)
                .replace("OLD_KEY", OLD_KEY)
                .replace("NEW_KEY", NEW_KEY)
        })
        .collect()
}

/// The credentials of clients and applications: 0 the old, 1 both, 2 the new.
struct Load {
    phase: AtomicUsize,
    /// Handshakes and calls that were answered, and refusals of them.
    connected: AtomicUsize,
    called: AtomicUsize,
    refused: parking_lot::Mutex<Vec<String>>,
    stopped: tokio_util::sync::CancellationToken,
}

impl Load {
    /// Whether the attempt of this number presents the new secret.
    fn presents_new(&self, attempt: usize) -> bool {
        match self.phase.load(Ordering::SeqCst) {
            0 => false,
            1 => attempt.is_multiple_of(2),
            _ => true,
        }
    }

    /// Waits until every attempt that began before has ended, and some more have.
    async fn go_on(&self) {
        let (connected, called) =
            (self.connected.load(Ordering::SeqCst), self.called.load(Ordering::SeqCst));
        until("the load goes on", async || {
            self.connected.load(Ordering::SeqCst) >= connected + 60
                && self.called.load(Ordering::SeqCst) >= called + 60
        })
        .await;
    }
}

#[tokio::test]
async fn secrets_are_rotated_under_load_and_none_is_refused() {
    let steps = recipe();
    let [before, both, after] = &steps[..] else { panic!("the recipe has {} steps", steps.len()) };
    let redis = Redis::start().await;
    let url = redis.url();
    let start = async |id: &'static str| {
        Configured::start(before, &[("cluster.redis_url", url.as_str()), ("node.id", id)]).await
    };
    let (a, b, c) = tokio::join!(start("a"), start("b"), start("c"));
    let nodes = Arc::new([a, b, c]);
    let tokens = Arc::new([token(OLD_SECRET, Some("2027-01")), token(NEW_SECRET, Some("2027-02"))]);
    // A client that stays connected over the whole rotation.
    let mut stays = nodes[0].connect(&tokens[0]).await.unwrap();
    let lobby = room("lobby");
    stays.join(&lobby).await.unwrap();

    let load = Arc::new(Load {
        phase: AtomicUsize::new(0),
        connected: AtomicUsize::new(0),
        called: AtomicUsize::new(0),
        refused: Default::default(),
        stopped: Default::default(),
    });
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..6 {
        let (load, nodes, tokens) = (load.clone(), nodes.clone(), tokens.clone());
        tasks.spawn(async move {
            let mut attempt = number;
            while !load.stopped.is_cancelled() {
                attempt += 1;
                let (node, new) = (&nodes[attempt % 3], load.presents_new(attempt / 3));
                if number < 3 {
                    match within(node.connect(&tokens[usize::from(new)])).await {
                        Ok(_) => drop(load.connected.fetch_add(1, Ordering::SeqCst)),
                        Err(error) => load.refused.lock().push(format!("token: {error}")),
                    }
                } else {
                    let key = if new { NEW_KEY } else { OLD_KEY };
                    match node.call("GET", "rooms", key).await.status {
                        200 => drop(load.called.fetch_add(1, Ordering::SeqCst)),
                        status => load.refused.lock().push(format!("key: {status}")),
                    }
                }
            }
        });
    }
    load.go_on().await;
    // Step 1, node by node: the nodes know both.
    for node in &*nodes {
        write(&node.file, both);
        node.node.process.signal("HUP");
        until("the new secrets are known", async || {
            node.accepts_key(NEW_KEY).await && node.connect(&tokens[1]).await.is_ok()
        })
        .await;
        load.go_on().await;
    }
    // Step 2: issuers and applications change over.
    load.phase.store(1, Ordering::SeqCst);
    load.go_on().await;
    load.phase.store(2, Ordering::SeqCst);
    load.go_on().await;
    // Step 3, node by node: the nodes forget the old ones.
    for node in &*nodes {
        write(&node.file, after);
        node.node.process.signal("HUP");
        until("the old secrets are forgotten", async || {
            !node.accepts_key(OLD_KEY).await && node.connect(&tokens[0]).await.is_err()
        })
        .await;
        load.go_on().await;
    }
    load.stopped.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let (connected, called) =
        (load.connected.load(Ordering::SeqCst), load.called.load(Ordering::SeqCst));
    let refused = load.refused.lock().clone();
    println!("{connected} handshakes, {called} calls, {} refused", refused.len());
    assert!(refused.is_empty(), "{refused:?}");
    say(&mut stays, &lobby, "still here").await;
    let url = format!("ws://{}/ws", nodes[0].node.address);
    let old = ConnectOptions::new(&url).token(&tokens[0], TokenLocation::Header);
    let mut old = ClientConnection::open(&old).await.unwrap();
    assert_eq!(closed(&mut old).await, (Some(1008), "token_invalid".to_owned()));
}
