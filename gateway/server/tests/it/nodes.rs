//! What the nodes of a cluster know of each other: their announcements, and which are missing.

use serde_json::Value;

use crate::{
    api::call_as,
    harness::{Node, Redis, SHORT_LEASE_OPTION, connect, until},
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

/// What a node announces, as another one lists it.
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
    let rows = redis.command("HLEN gw:nodes").await;
    assert_eq!(rows.as_deref(), Some(":1"), "only the other node is announced");
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
