//! The recipes of docs/operations.md: a backup of Redis and its restore, and nodes in
//! another region.

use std::time::Duration;

use skein_client::frames;
use skein_protocol::{
    ids::RoomId,
    position::Position,
    protocol::server_frame::{HistoryEntry, JoinedFrame, ServerFrame},
};
use skein_testkit::proxy::{Mode, Proxy};
use tokio::time::Instant;

use crate::harness::{Gateway, Redis, get, next_message, poll_pause, room, say, until};

async fn join_since(
    gateway: &Gateway,
    room: &RoomId,
    since: &Position,
) -> JoinedFrame<HistoryEntry> {
    let mut ann = gateway.connect_when_ready("ann").await;
    let join = frames::OutgoingJoin { since: Some(since), ..frames::OutgoingJoin::new(room) };
    match ann.request(&join).await.unwrap() {
        ServerFrame::Joined(joined) => *joined,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_keeps_logs_and_signals_what_it_lacks() {
    let mut redis = Redis::start_durable().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let mut ann = one.connect("ann").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    for text in ["1", "2", "3"] {
        say(&mut ann, &lobby, text).await;
    }
    let backup = redis.back_up().await;
    for text in ["4", "5"] {
        say(&mut ann, &lobby, text).await;
    }
    drop(ann);
    one.stop().await;
    two.stop().await;
    redis.stop().await;
    redis.restore(&backup);
    redis.restart().await;
    redis.command("HDEL gw:barrier left").await;
    let (one, _two) = tokio::join!(Gateway::start_on(&redis, &[]), Gateway::start_on(&redis, &[]));
    // A client that has seen what the backup lacks learns that.
    let beyond = join_since(&one, &lobby, &Position::new(epoch.clone(), 5)).await;
    assert!(!beyond.recovered, "{beyond:?}");
    // One that has not continues without a gap.
    let within = join_since(&one, &lobby, &Position::new(epoch, 2)).await;
    let texts: Vec<String> = within.history.iter().map(|entry| format!("{entry:?}")).collect();
    assert!(within.recovered && texts.len() == 1 && texts[0].contains("\"3\""), "{within:?}");
    let mut bob = one.connect("bob").await;
    bob.join(&lobby).await.unwrap();
    say(&mut bob, &lobby, "after").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_far_from_redis_serves_at_the_cost_of_the_distance() {
    // Between 40 and 80 ms per direction: see `Mode::Delay`.
    const DELAY: Duration = Duration::from_millis(40);
    let redis = Redis::start().await;
    let link = Proxy::to(redis.address()).await.unwrap();
    let url = link.redis_url();
    let far = [("cluster.redis_url", url.as_str()), ("auth.allow_anonymous", "true")];
    let (near, far) = (Gateway::start_on(&redis, &[]).await, Gateway::start(&far).await);
    link.set(Mode::Delay(DELAY));
    let lobby = room("lobby");
    let (mut ann, mut bob) =
        (near.connect_when_ready("ann").await, far.connect_when_ready("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let (mut near_acks, mut to_far, mut far_acks, mut to_near) = (vec![], vec![], vec![], vec![]);
    for _ in 0..20 {
        let begun = Instant::now();
        say(&mut ann, &lobby, "from near").await;
        near_acks.push(begun.elapsed());
        next_message(&mut bob).await;
        to_far.push(begun.elapsed());
        next_message(&mut ann).await;
        let begun = Instant::now();
        let message = serde_json::json!({"type": "message", "room": lobby, "content": "from far"});
        bob.send_json(&message).await.unwrap();
        next_message(&mut ann).await;
        to_near.push(begun.elapsed());
        next_message(&mut bob).await;
        far_acks.push(begun.elapsed());
        poll_pause().await;
    }
    for (what, mut times) in [
        ("ack, near", near_acks),
        ("delivery, near to far", to_far),
        ("delivery, far to near", to_near),
        ("own copy, far", far_acks),
    ] {
        times.sort_unstable();
        println!("{what}: p50 {:?}, most {:?}", times[times.len() / 2], times[times.len() - 1]);
    }
    until("the far node is ready", async || get(far.admin, "/ready").await.status == 200).await;
}
