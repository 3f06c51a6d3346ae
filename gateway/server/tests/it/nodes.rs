//! The knowledge of nodes about each other: their announcements, and which are missing.

use serde_json::Value;
use skein_client::connection::{ClientConnection, ReceivedMessage};
use skein_protocol::protocol::server_frame::{ReconnectFrame, ReconnectReason, ServerFrame};

use crate::{
    api::call_as,
    harness::{Node, Redis, SHORT_LEASE_OPTION, connect, gateway_binary, get, until, within},
};

/// A key of the server API, as `api.keys` has it.
const KEY: &str = "0123456789abcdef";
const KEYS_OPTION: (&str, &str) = ("api.keys", "ops:0123456789abcdef");

/// The answer of `GET /api/v1/nodes`.
async fn list(node: &Node) -> Value {
    let answer = call_as(Some(KEY), node.address, "GET /api/v1/nodes", None).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

/// The announcement of a node, as another one lists it.
fn announced(list: &Value, id: &str) -> Value {
    let nodes = list["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["node"] == id).cloned().unwrap_or_default()
}

/// Waits until the list of nodes has a property.
async fn until_listed(what: &str, node: &Node, holds: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    until(what, async || {
        last = list(node).await;
        holds(&last)
    })
    .await;
    last
}

#[tokio::test]
async fn nodes_announce_themselves_and_killed_ones_are_missing() {
    let redis = Redis::start().await;
    let options = |id| [("node.id", id), KEYS_OPTION, SHORT_LEASE_OPTION];
    let a = Node::start(&redis, None, &options("a")).await;
    let mut b = Node::start(&redis, None, &options("b")).await;
    let _client = connect(b.address, "ann").await;
    let listed = until_listed("both are announced", &a, |list| {
        let is_accepting = |id| announced(list, id)["condition"] == "accepting";
        is_accepting("a") && is_accepting("b")
    })
    .await;
    let of_b = announced(&listed, "b");
    assert_eq!((&of_b["connections"], &of_b["schema"]), (&1.into(), &1.into()), "{of_b}");
    assert_eq!(of_b["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(of_b["route"].as_str().unwrap().len(), 32, "{of_b}");
    assert!(of_b["started_at"].as_str().unwrap().starts_with("20"), "{of_b}");
    assert_eq!(listed["missing"], Value::Array(vec![]), "{listed}");

    b.process.kill().await;
    let is_missing = |list: &Value| list["missing"][0]["node"] == "b";
    let listed = until_listed("a killed node is missing", &a, is_missing).await;
    assert_eq!(listed["missing"][0]["version"], env!("CARGO_PKG_VERSION"), "{listed}");
    // It is there again as soon as it has started again.
    let b = Node::start(&redis, Some(b.address), &options("b")).await;
    let is_back = |list: &Value| announced(list, "b")["condition"] == "accepting";
    let listed = until_listed("it is back", &a, is_back).await;
    assert_eq!(listed["missing"], Value::Array(vec![]), "{listed}");

    // A node that stops in order is not missing.
    b.process.signal("TERM");
    let (code, said) = b.end().await;
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(list(&a).await["missing"], Value::Array(vec![]));
}

/// The `reconnect` frame to a client.
async fn reconnect_of(client: &mut ClientConnection) -> ReconnectFrame {
    loop {
        let message = within(client.next()).await.expect("a reconnect frame");
        if let ReceivedMessage::Frame(ServerFrame::Reconnect(frame), _) = message {
            return frame;
        }
    }
}

#[tokio::test]
async fn a_draining_node_names_the_node_of_each_client() {
    let redis = Redis::start().await;
    // Longer than a restart takes on a busy machine.
    let options = |id| [("node.id", id), KEYS_OPTION, ("drain.restart_time", "20s")];
    let a = Node::start(&redis, None, &options("a")).await;
    let b = Node::start(&redis, None, &options("b")).await;
    let c = Node::start(&redis, None, &options("c")).await;
    let mut of_a = vec![];
    for user in ["ann", "bob", "cid"] {
        of_a.push(connect(a.address, user).await);
    }
    let mut dan = connect(b.address, "dan").await;
    let listed = until_listed("all are announced", &a, |list| {
        ["a", "b", "c"].iter().all(|id| announced(list, id)["condition"] == "accepting")
    })
    .await;
    let route = |id| announced(&listed, id)["route"].as_str().unwrap().to_owned();

    // By a command: the node with the fewest connections, those that were sent there included.
    let drain = "POST /api/v1/nodes/a/drain";
    assert_eq!(call_as(Some(KEY), b.address, drain, None).await.status, 200);
    let mut named = vec![];
    for client in &mut of_a {
        let frame = reconnect_of(client).await;
        assert!(frame.reason == ReconnectReason::Draining && frame.after_ms < 100, "{frame:?}");
        named.push(frame.node.unwrap());
    }
    named.sort();
    // `b` had one already, and `c` is the younger of equals.
    let mut expected = vec![route("b"), route("c"), route("c")];
    expected.sort();
    assert_eq!(named, expected, "{listed}");
    let listed =
        until_listed("it drains", &b, |list| announced(list, "a")["condition"] == "draining").await;
    assert_eq!(announced(&listed, "a")["draining"], true);

    // By a signal, without a new node that has few connections: the client waits for this one.
    let _evan = connect(c.address, "evan").await;
    let rows = r#"EVAL "return table.concat(redis.call('HVALS', 'gw:nodes'))" 0"#;
    let announced = r#""node":"c","condition":"accepting","connections":1"#;
    until("the connection is announced", async || redis.answer(rows).await.contains(announced))
        .await;
    let address_of_b = b.address;
    b.process.signal("TERM");
    let frame = reconnect_of(&mut dan).await;
    assert_eq!(frame.node, Some(route("b")));
    assert!((20_000..=20_100).contains(&frame.after_ms), "{frame:?}");
    assert_eq!(b.end().await.0, Some(0));
    // The node is not missing meanwhile, and once it is back the others know that its client comes.
    assert_eq!(list(&c).await["missing"], Value::Array(vec![]));
    let returning = r#""node":"b","condition":"draining","connections":1"#;
    assert!(redis.answer(rows).await.contains(returning), "{}", redis.answer(rows).await);
    let _b = Node::start(&redis, Some(address_of_b), &options("b")).await;
    let expected = r#""node":"b","condition":"accepting","connections":1"#;
    until("its client is expected", async || redis.answer(rows).await.contains(expected)).await;
}

#[tokio::test]
async fn a_node_does_not_start_on_data_of_a_newer_schema() {
    let redis = Redis::start().await;
    let a = Node::start(&redis, None, &[("node.id", "a")]).await;
    assert_eq!(redis.answer("GET gw:schema").await, "1");
    redis.command("SET gw:schema 2").await;
    let options = ["server.listen=127.0.0.1:0", "admin.listen=127.0.0.1:0"];
    let url = format!("cluster.redis_url={}", redis.url());
    let mut command = tokio::process::Command::new(gateway_binary());
    for option in options.into_iter().chain([url.as_str(), "auth.allow_anonymous=true"]) {
        command.args(["--set", option]);
    }
    let output = within(command.kill_on_drop(true).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("has schema 2") && said.contains("reads schemas up to 1"), "{said}");
    // Nodes that run are not stopped by it.
    assert_eq!(get(a.address, "/ready").await.status, 200);
}

#[tokio::test]
async fn announcements_of_other_versions_are_tolerated() {
    let redis = Redis::start().await;
    let now = "9999999999999";
    for (process, row) in [
        ("old/1", "'1 {\"node\":\"old\"}'".to_owned()),
        ("bad/1", "nonsense".to_owned()),
        ("far/1", format!("'{now} {{\"node\":\"far\"}}'")),
    ] {
        redis.command(&format!("HSET gw:nodes {process} {row}")).await;
    }
    let a = Node::start(&redis, None, &[("node.id", "a"), KEYS_OPTION]).await;
    until_listed("it is announced", &a, |list| announced(list, "a")["condition"] == "accepting")
        .await;
    // Rows that are too old, of the future, or not written by a gateway are removed.
    assert_eq!(redis.command("HLEN gw:nodes").await.as_deref(), Some(":1"));
}
