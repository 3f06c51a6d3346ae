//! Checks that `loadtest` finds each fault that is injected into a gateway, and none without a
//! fault.
//!
//! `SKEIN_INJECTED=full` runs each scenario twenty times against a gateway without a fault.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use skein_client::connection::ClientConnection;
use skein_core::fault_injection::{DeliveryFault, PANIC};
use skein_protocol::{ids::RoomId, protocol::server_frame::ServerFrame};
use tokio::{process::Command, time::timeout};

use crate::harness::{Node, closed, connect, get, next_message, room, say, until};

/// The number of runs against a gateway without a fault.
fn clean_runs() -> usize {
    if std::env::var("SKEIN_INJECTED").is_ok_and(|how| how == "full") { 20 } else { 1 }
}

/// Runs `loadtest` against a gateway and returns the failures that it reports.
async fn failures(node: &Node, scenario: &[&str]) -> Vec<String> {
    let own = std::env::current_exe().unwrap();
    let loadtest = own.parent().and_then(Path::parent).unwrap().join("loadtest");
    let url = format!("ws://{}/ws", node.address);
    let output = Command::new(loadtest)
        .args(scenario)
        .args(["--url", &url, "--pid", &node.process.pid().to_string(), "--json"])
        .output();
    let output = timeout(Duration::from_secs(300), output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(said.trim())
        .unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    let failures: Vec<String> = serde_json::from_value(report["failures"].clone()).unwrap();
    if !failures.is_empty() {
        assert_eq!(output.status.code(), Some(1), "{failures:?}");
    }
    failures
}

const LEDGER: [&str; 12] = [
    "ledger",
    "--rooms",
    "10",
    "--members",
    "10",
    "--rate",
    "300/s",
    "--duration",
    "5s",
    "--late-max-percent",
    "1",
    "--late-after=100ms",
];
const ROOMS: [&str; 14] = [
    "rooms",
    "--rooms",
    "10",
    "--members",
    "10",
    "--rate",
    "300/s",
    "--duration",
    "5s",
    "--ramp",
    "1000/s",
    "--late-max-percent",
    "1",
    "--late-after=100ms",
];
/// 120,000 connections, a few at a time, so that the memory of many concurrent ones does not
/// matter. Half of them count, and one huge page more or less is 35 bytes of each.
const STORM: [&str; 13] = [
    "storm",
    "-n",
    "500",
    "--rounds",
    "240",
    "--pause",
    "10ms",
    "--ramp",
    "2000/s",
    "--rooms",
    "10",
    "--leak-max",
    "75",
];

#[tokio::test]
#[ignore = "make test-full"]
async fn loadtest_finds_each_injected_fault_and_no_other() {
    for (name, fault) in DeliveryFault::ALL {
        let (scenarios, words): (&[&[&str]], &[&str]) = match fault {
            DeliveryFault::Drop => (&[&LEDGER, &ROOMS], &["gap", "lost"]),
            DeliveryFault::Duplicate => (&[&LEDGER, &ROOMS], &["duplicated"]),
            DeliveryFault::Swap => (&[&LEDGER, &ROOMS], &["out of order"]),
            DeliveryFault::Stall => (&[&LEDGER, &ROOMS], &["took longer than 100 ms"]),
            DeliveryFault::Leak => (&[&STORM], &["keeps"]),
        };
        for scenario in scenarios {
            let node = Node::start_with_fault(name, &[]).await;
            let failures = failures(&node, scenario).await;
            println!("{name}, {}: {failures:?}", scenario[0]);
            let found = |word: &&str| failures.iter().any(|failure| failure.contains(*word));
            assert!(words.iter().any(found), "{name} is not found by {scenario:?}: {failures:?}");
        }
    }
    for run in 1..=clean_runs() {
        for scenario in [&LEDGER[..], &ROOMS, &STORM] {
            let node = Node::start_alone(&[]).await;
            let failures = failures(&node, scenario).await;
            println!("clean run {run}, {}: {failures:?}", scenario[0]);
            assert!(failures.is_empty(), "{scenario:?}: {failures:?}");
        }
    }
}

/// Connects to a node with injected panics and joins a room.
async fn member(node: &Node, user: &str, lobby: &RoomId) -> ClientConnection {
    let mut member = connect(node.address, user).await;
    member.join(lobby).await.unwrap();
    member
}

async fn panics(node: &Node) -> String {
    let metrics = get(node.admin, "/metrics").await.body;
    let is_it = |line: &&str| line.starts_with("gateway_connection_panics_total");
    metrics.lines().find(is_it).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn a_panic_in_a_connection_closes_only_that_connection() {
    let node = Node::start_with_fault(PANIC, &[("limits.connections_per_user", "1")]).await;
    let lobby = room("lobby");
    let (mut ann, mut bob) =
        (member(&node, "ann", &lobby).await, member(&node, "bob", &lobby).await);
    for n in 1..=3 {
        bob.send_json(&json!({"type": "ping", "timestamp": "panic in a connection"}))
            .await
            .unwrap();
        assert_eq!(closed(&mut bob).await, (Some(1011), "internal".to_owned()));
        assert_eq!(panics(&node).await, format!("gateway_connection_panics_total {n}"));
        // Its resources are released: the user's only connection permit, and its presence in the
        // room.
        until("bob has left", async || {
            let asks = json!({"type": "presence", "room": lobby, "ref": 1});
            let ServerFrame::Presence(presence) = ann.request(&asks).await.unwrap() else {
                panic!()
            };
            presence.count == 1
        })
        .await;
        bob = member(&node, "bob", &lobby).await;
        say(&mut ann, &lobby, "on").await;
        next_message(&mut bob).await;
        next_message(&mut ann).await;
    }
    assert_eq!(get(node.admin, "/ready").await.status, 200);
    node.process.signal("TERM");
    let (code, log) = node.end().await;
    assert_eq!(code, Some(0));
    let lines = log.lines().filter(|line| line.contains("a panic closed a connection"));
    assert_eq!(lines.count(), 1, "{log}");
}

#[tokio::test]
async fn a_panic_in_a_shard_ends_the_process() {
    let node = Node::start_with_fault(PANIC, &[]).await;
    let lobby = room("lobby");
    let mut ann = member(&node, "ann", &lobby).await;
    let message = json!({"type": "message", "room": lobby, "content": "panic in a shard"});
    ann.send_json(&message).await.unwrap();
    let begun = tokio::time::Instant::now();
    let (code, log) = node.end().await;
    assert_eq!(code, Some(70), "{log}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(
        log.contains("task hub_shard panicked: injected in a shard (gateway/core/src/"),
        "{log}"
    );
}
