//! The archive: history beyond the logs, in SQLite for one node and in PostgreSQL for a cluster.

use std::{net::SocketAddr, path::Path};

use serde_json::{Value, json};
use skein_client::frames::OutgoingJoin;
use skein_protocol::{ids::RoomId, position::Seq, protocol::server_frame::HistoryEntry};
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    api::{self, KEY, call_as},
    harness::{Gateway, Node, Postgres, Redis, connect, gateway_binary, room, say, until, within},
    metrics::Scrape,
};

const API_KEYS: (&str, &str) = api::OPTIONS[0];

/// The messages of a page: their numbers and contents; and whether there are more.
async fn page(address: SocketAddr, room: &RoomId, query: &str) -> (Vec<(Seq, String)>, bool) {
    let path = format!("GET /api/v1/rooms/{room}/history?{query}");
    let answer = within(call_as(Some(KEY), address, &path, None)).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let page: Value = serde_json::from_str(&answer.body).unwrap();
    let message = |message: &Value| {
        (message["seq"].as_u64().unwrap(), message["content"].as_str().unwrap().to_owned())
    };
    (page["messages"].as_array().unwrap().iter().map(message).collect(), page["more"] == true)
}

/// The whole history, read backwards in pages of `limit`.
async fn backwards(address: SocketAddr, room: &RoomId, limit: u32) -> Vec<(Seq, String)> {
    let (mut all, mut before) = (Vec::new(), String::new());
    loop {
        let (mut messages, more) = page(address, room, &format!("limit={limit}{before}")).await;
        let Some((first, _)) = messages.first() else { return all };
        before = format!("&before={first}");
        messages.append(&mut all);
        all = messages;
        if !more {
            return all;
        }
    }
}

/// The whole history, read forwards.
async fn forwards(address: SocketAddr, room: &RoomId, limit: u32) -> Vec<(Seq, String)> {
    let (mut all, mut after) = (Vec::new(), 0);
    loop {
        let (messages, more) = page(address, room, &format!("limit={limit}&after={after}")).await;
        let Some((last, _)) = messages.last() else { return all };
        after = *last;
        all.extend(messages);
        if !more {
            return all;
        }
    }
}

/// Waits until nothing waits for the archive.
async fn archived(admin: SocketAddr) {
    until("everything is archived", async || {
        let metrics = Scrape::of(admin).await;
        metrics.value("gateway_archive_lag_entries") == 0.0
    })
    .await;
}

/// Searches among 300 messages `message <number> 😀 "quoted" 你好`.
async fn search_finds_words(address: SocketAddr) {
    let found = async |query: &str| {
        let path = format!("GET /api/v1/search?room=lobby&{query}");
        let answer = within(call_as(Some(KEY), address, &path, None)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let page: Value = serde_json::from_str(&answer.body).unwrap();
        let seqs = page["messages"].as_array().unwrap().iter().map(|found| found["seq"].as_u64());
        (seqs.map(Option::unwrap).collect::<Vec<Seq>>(), page["cursor"].as_str().map(str::to_owned))
    };
    assert_eq!(found("q=MESSAGE+123").await.0, [123]);
    // Newest first.
    let (first, cursor) = found("q=%E4%BD%A0%E5%A5%BD+quoted&limit=200").await;
    assert_eq!(first, (101..=300).rev().collect::<Vec<_>>());
    let next = format!("q=%E4%BD%A0%E5%A5%BD+quoted&limit=200&cursor={}", cursor.unwrap());
    assert_eq!(found(&next).await, ((1..=100).rev().collect(), None));
    assert!(found("q=nothing-like-it").await.0.is_empty());
    let path = "GET /api/v1/search?room=lobby&q=";
    assert_eq!(call_as(Some(KEY), address, path, None).await.status, 400);
}

/// Rooms of two single nodes have nothing to do with each other.
async fn another_gateway_does_not_share_the_file(url: &str, folder: &Path) {
    let mut other = Command::new(gateway_binary());
    other.arg("--set").arg(format!("archive.url={url}"));
    for option in ["server.listen=127.0.0.1:0", "admin.listen=127.0.0.1:0"] {
        other.arg("--set").arg(option);
    }
    let output = within(other.current_dir(folder).output()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("another gateway uses"), "{said}");
}

fn sqlite(folder: &Path) -> String {
    format!("sqlite://{}/data/skein.db", folder.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn history_of_a_single_node_survives_a_kill() {
    let (folder, lobby) = (TempDir::new().unwrap(), room("lobby"));
    let url = sqlite(folder.path());
    let options = [("archive.url", url.as_str()), ("limits.messages_per_second", "0"), API_KEYS];
    let node = Node::start_alone(&options).await;
    let mut ann = connect(node.address, "ann").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    let mut expected = Vec::new();
    for number in 1..=300 {
        let text = format!("message {number} 😀 \"quoted\" 你好");
        let ack = say(&mut ann, &lobby, &text).await;
        expected.push((ack.seq, text));
    }
    archived(node.admin).await;
    node.process.signal("KILL");
    node.end().await;

    let node = Node::start_alone(&options).await;
    let mut bob = connect(node.address, "bob").await;
    let joined = bob.join_with(&OutgoingJoin::new(&lobby)).await.unwrap();
    assert_ne!(joined.epoch, epoch, "numbers of entries that were lost could be given again");
    assert_eq!(joined.seq, 300);
    // A member sees the newest ones at once.
    let last = joined.history.last();
    assert!(matches!(last, Some(HistoryEntry::Message(message)) if message.seq == 300), "{last:?}");
    assert!(joined.more);
    assert_eq!(backwards(node.address, &lobby, 77).await, expected);
    another_gateway_does_not_share_the_file(&url, folder.path()).await;
    assert_eq!(say(&mut bob, &lobby, "next").await.seq, 301);
    expected.push((301, "next".to_owned()));
    assert_eq!(forwards(node.address, &lobby, 77).await, expected);
    search_finds_words(node.address).await;
    // A room that the archive does not know begins at 1.
    let other = room("other");
    bob.join(&other).await.unwrap();
    assert_eq!(say(&mut bob, &other, "first").await.seq, 1);
    archived(node.admin).await;
    node.process.signal("TERM");
    assert_eq!(node.end().await.0, Some(0));

    let node = Node::start_alone(&options).await;
    assert_eq!(forwards(node.address, &lobby, 200).await, expected);
    let deleted = call_as(Some(KEY), node.address, "DELETE /api/v1/rooms/lobby", None).await;
    assert_eq!(deleted.status, 200, "{deleted:?}");
    // At once: the deletion may be on its way to the archive when the node stops.
    assert!(backwards(node.address, &lobby, 50).await.is_empty());
    node.process.signal("TERM");
    node.end().await;
    let node = Node::start_alone(&options).await;
    assert!(backwards(node.address, &lobby, 50).await.is_empty(), "a deleted room comes back");
}

/// Options of a node whose logs keep little.
fn short_logs(url: &str) -> Vec<(&str, &str)> {
    vec![
        ("archive.url", url),
        ("history.max_entries", "20"),
        ("history.window", "1s"),
        API_KEYS,
        ("cluster.lease", "4s"),
        ("limits.messages_per_second", "0"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn history_of_a_cluster_goes_on_in_postgresql() {
    let (redis, postgres, lobby) = (Redis::start().await, Postgres::start().await, room("lobby"));
    let url = postgres.url();
    let options = short_logs(&url);
    let (one, two) =
        (Gateway::start_on(&redis, &options).await, Gateway::start_on(&redis, &options).await);
    let mut ann = one.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let mut expected = Vec::new();
    for number in 1..=500 {
        let text = format!("message {number}");
        expected.push((say(&mut ann, &lobby, &text).await.seq, text));
    }
    archived(one.admin).await;
    assert_eq!(backwards(two.address, &lobby, 70).await, expected);
    assert_eq!(forwards(two.address, &lobby, 70).await, expected);
    let (around, more) = page(two.address, &lobby, "around=250&limit=10").await;
    assert_eq!((around.first().unwrap().0, around.last().unwrap().0, more), (245, 254, true));
    let (newest, more) = page(two.address, &lobby, "limit=200").await;
    assert_eq!((newest.len(), newest[0].0, more), (200, 301, true));
    assert_eq!(page(two.address, &lobby, "since=2999-01-01T00:00:00Z").await, (vec![], false));
    let (all, _) = page(two.address, &lobby, "until=2999-01-01T00:00:00Z&limit=200").await;
    assert_eq!(all, expected[300..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_large_messages_have_no_hole() {
    let (redis, postgres, lobby) = (Redis::start().await, Postgres::start().await, room("lobby"));
    let url = postgres.url();
    let node = Gateway::start_on(&redis, &short_logs(&url)).await;
    let mut ann = node.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let mut expected = Vec::new();
    for number in 1..=60 {
        let text = format!("{number} {}", "x".repeat(20_000));
        expected.push((say(&mut ann, &lobby, &text).await.seq, text));
    }
    archived(node.admin).await;
    // A reply has 256 KiB at most, so that each page ends for its size.
    assert_eq!(forwards(node.address, &lobby, 200).await, expected);
    assert_eq!(backwards(node.address, &lobby, 200).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_wait_in_redis_while_postgresql_is_away() {
    let (redis, mut postgres, lobby) =
        (Redis::start().await, Postgres::start().await, room("lobby"));
    let url = postgres.url();
    let options = short_logs(&url);
    let (one, two) =
        (Gateway::start_on(&redis, &options).await, Gateway::start_on(&redis, &options).await);
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let mut expected = vec![(say(&mut ann, &lobby, "before").await.seq, "before".to_owned())];
    archived(one.admin).await;
    postgres.kill().await;
    for number in 1..=200 {
        let text = format!("while away {number}");
        let sender = if number % 2 == 0 { &mut ann } else { &mut bob };
        expected.push((say(sender, &lobby, &text).await.seq, text));
    }
    // Also a new room begins, without waiting for the database for long.
    let other = room("other");
    ann.join(&other).await.unwrap();
    let began = say(&mut ann, &other, "first").await.seq;
    until("an operator sees it", async || {
        let metrics = Scrape::of(one.admin).await;
        metrics.value("gateway_archive_up") == 0.0
            && metrics.value("gateway_archive_lag_entries") >= 200.0
            && metrics.value("gateway_archive_oldest_seconds") > 0.0
    })
    .await;
    postgres.restart().await;
    archived(one.admin).await;
    expected.sort();
    assert_eq!(backwards(two.address, &lobby, 60).await, expected);
    assert_eq!(backwards(two.address, &other, 60).await, [(began, "first".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_redis_has_lost_continues_above_the_archive() {
    let (redis, postgres, lobby) = (Redis::start().await, Postgres::start().await, room("lobby"));
    let url = postgres.url();
    let options = short_logs(&url);
    let node = Gateway::start_on(&redis, &options).await;
    let mut ann = node.connect("ann").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    let mut expected = Vec::new();
    for number in 1..=40 {
        let text = format!("message {number}");
        expected.push((say(&mut ann, &lobby, &text).await.seq, text));
    }
    archived(node.admin).await;
    node.stop().await;
    redis.command("FLUSHALL").await;

    let node = Gateway::start_on(&redis, &options).await;
    let mut bob = node.connect("bob").await;
    let joined = bob.join(&lobby).await.unwrap();
    assert!(joined.epoch != epoch && joined.seq == 40 && joined.more, "{joined:?}");
    // The application publishes to a room that no node has opened.
    let body = json!({"content": "by the application"});
    let path = "POST /api/v1/rooms/lobby/messages";
    let sent = call_as(Some(KEY), node.address, path, Some(body.clone())).await;
    assert_eq!(sent.status, 201, "{sent:?}");
    expected.push((41, "by the application".to_owned()));
    archived(node.admin).await;
    assert_eq!(backwards(node.address, &lobby, 15).await, expected);
    let path = "POST /api/v1/rooms/fresh/messages";
    let sent = call_as(Some(KEY), node.address, path, Some(body)).await;
    let sent: Value = serde_json::from_str(&sent.body).unwrap();
    assert_eq!(sent["seq"], 1, "a room that the archive does not know: {sent}");
}
