//! Nodes agree on a Redis server, and clients receive `status` frames about it.

use std::{process::Stdio, time::Duration};

use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    frames,
};
use skein_protocol::{
    ids::RoomId,
    position::Position,
    protocol::server_frame::{BusState, HistoryEntry, JoinedFrame, ServerFrame, StatusFrame},
};
use tempfile::TempDir;
use tokio::{process::Command, time::Instant};

use crate::harness::{
    Gateway, Node, Process, Redis, SHORT_LEASE_OPTION, connect, gateway_binary, next_message, room,
    say, until, within,
};

/// The next `status` that arrives.
async fn next_status(connection: &mut ClientConnection) -> StatusFrame {
    let status = async {
        loop {
            if let ReceivedMessage::Frame(ServerFrame::Status(status), _) =
                connection.next().await.unwrap()
            {
                return status;
            }
        }
    };
    within(status).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_receive_status_when_the_bus_goes_down_and_up() {
    let mut redis = Redis::start_durable().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    redis.kill().await;
    for connection in [&mut ann, &mut bob] {
        assert_eq!(next_status(connection).await.bus, BusState::Down);
    }
    redis.restart().await;
    for connection in [&mut ann, &mut bob] {
        assert_eq!(next_status(connection).await.bus, BusState::Up);
    }
    assert_eq!(say(&mut ann, &lobby, "back").await.seq, 1);
    assert_eq!(next_message(&mut bob).await.seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_node_on_an_empty_redis_waits_for_other_nodes() {
    let redis = Redis::start_new(false).await;
    let begun = Instant::now();
    let gateway = Gateway::start_on(&redis, &[]).await;
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(3), "it did not wait: {waited:?}");
    // A node that starts later finds the agreement already made.
    let begun = Instant::now();
    let second = Gateway::start_on(&redis, &[]).await;
    println!("the first node waited {waited:?}, the second {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(2));
    let lobby = room("lobby");
    let (mut ann, mut bob) = (gateway.connect("ann").await, second.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "first").await.seq, 1);
    assert_eq!(next_message(&mut bob).await.seq, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_nodes_agree_again_after_redis_is_flushed() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let (lobby, other) = (room("lobby"), room("other"));
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "before").await.seq, 1);
    assert_eq!(next_message(&mut bob).await.seq, 1);
    redis.command("FLUSHALL").await;
    // A join needs the bus; it succeeds although no client publishes.
    until("a join is answered", async || bob.join(&other).await.is_ok()).await;
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 2);
    assert_eq!(next_message(&mut bob).await.seq, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_log_expires() {
    let redis = Redis::start().await;
    let gateway = Gateway::start_on(&redis, &[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "before").await.seq, 1);
    redis.command("FLUSHALL").await;
    // -1 is a key without expiry.
    let script = "local log = redis.call('KEYS', 'gw:*:r:lobby:log')[1] \
         return log and tostring(redis.call('PTTL', log)) or ''";
    let pttl = async || redis.answer(&format!("EVAL \"{script}\" 0")).await;
    until("the log is restored", async || !pttl().await.is_empty()).await;
    let pttl: i64 = pttl().await.parse().unwrap();
    assert!(pttl > 0, "{pttl}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_and_serves_clients_on_a_full_redis() {
    let redis = Redis::start().await;
    let one = Gateway::start_on(&redis, &[]).await;
    let lobby = room("lobby");
    let mut ann = one.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "before").await.seq, 1);
    redis.command("CONFIG SET maxmemory 1").await;
    let two = Gateway::start_on(&redis, &[]).await;
    let mut bob = two.connect("bob").await;
    let joined = bob.join(&lobby).await.unwrap();
    assert_eq!(joined.seq, 1);
    // A publish frees the memory that it needs.
    assert_eq!(say(&mut ann, &lobby, "meanwhile").await.seq, 2);
    assert_eq!(next_message(&mut bob).await.seq, 2);
    redis.command("CONFIG SET maxmemory 0").await;
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 3);
    assert_eq!(next_message(&mut bob).await.seq, 3);
}

/// Joins a room from a position. Returns the `joined` frame.
async fn join_since(
    gateway: &Gateway,
    room: &RoomId,
    since: &Position,
) -> JoinedFrame<HistoryEntry> {
    let mut ann = gateway.connect("ann").await;
    let join = frames::OutgoingJoin { since: Some(since), ..frames::OutgoingJoin::new(room) };
    match ann.request(&join).await.unwrap() {
        ServerFrame::Joined(joined) => *joined,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_restart_of_the_whole_cluster_keeps_the_epoch() {
    let mut redis = Redis::start_durable().await;
    let options = [SHORT_LEASE_OPTION];
    let (one, two) =
        (Gateway::start_on(&redis, &options).await, Gateway::start_on(&redis, &options).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    let epoch = bob.join(&lobby).await.unwrap().epoch;
    for connection in [&mut ann, &mut bob] {
        say(connection, &lobby, "before").await;
    }
    let seen = Position::new(epoch.clone(), 1);
    let left = async |redis: &Redis| redis.command("HEXISTS gw:barrier left").await.unwrap();
    one.stop().await;
    assert_eq!(left(&redis).await, ":0", "the other one is still there");
    two.stop().await;
    assert_eq!(left(&redis).await, ":1");
    redis.stop().await;
    redis.restart().await;

    // Gateways that are stopped before they have agreed on the new server change nothing.
    let url = redis.url();
    let mut early = Command::new(gateway_binary());
    for (key, value) in [options[0], ("cluster.redis_url", &url), ("auth.allow_anonymous", "true")]
    {
        early.args(["--set", &format!("{key}={value}")]);
    }
    let listen = ["--set", "server.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0"];
    let folder = TempDir::new().unwrap();
    early.args(listen).current_dir(folder.path()).stderr(Stdio::null()).kill_on_drop(true);
    let mut early = Process::of(early.spawn().unwrap(), folder);
    until("it has checked in", async || left(&redis).await == ":0").await;
    early.signal("TERM");
    assert_eq!(early.end().await, Some(0));
    assert_eq!(redis.command("HEXISTS gw:barrier open").await.unwrap(), ":0");
    assert_eq!(left(&redis).await, ":1");
    redis.stop().await;
    redis.restart().await;

    let (one, two) =
        tokio::join!(Gateway::start_on(&redis, &options), Gateway::start_on(&redis, &options));
    for gateway in [&one, &two] {
        let joined = join_since(gateway, &lobby, &seen).await;
        assert!(joined.recovered, "{joined:?}");
        assert_eq!((&joined.epoch, joined.seq), (&epoch, 2));
    }
    // The orderly stop no longer counts from here on.
    assert_eq!(left(&redis).await, ":0");
    let mut ann = one.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 3);
    one.stop().await;
    two.stop().await;

    // Only the gateways are started again and then killed: entries that they acknowledged may be
    // missing.
    let node = Node::start(&redis, None, &options).await;
    assert_eq!(left(&redis).await, ":0");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "later").await.seq, 4);
    node.process.signal("KILL");
    node.end().await;
    redis.stop().await;
    redis.restart().await;
    let gateway = Gateway::start_on(&redis, &options).await;
    let mut ann = gateway.connect("ann").await;
    assert_ne!(ann.join(&lobby).await.unwrap().epoch, epoch);
}
