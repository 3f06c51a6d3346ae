//! The nodes agree on the server behind the name, and clients hear of it.

use std::time::Duration;

use shared::{
    client::connection::{Connection, Received},
    protocol::answer::{BusState, Frame, Status},
};
use tokio::time::Instant;

use crate::harness::{Gateway, Redis, next_message, room, say, until, within};

/// The next `status` that arrives.
async fn next_status(connection: &mut Connection) -> Status {
    let status = async {
        loop {
            if let Received::Frame(Frame::Status(status), _) = connection.next().await.unwrap() {
                return status;
            }
        }
    };
    within(status).await
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_hear_when_the_bus_is_away_and_when_nothing_is_missing_any_more() {
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
async fn a_new_redis_waits_for_those_who_may_remember_something() {
    let redis = Redis::start_new(false).await;
    let begun = Instant::now();
    let gateway = Gateway::start_on(&redis, &[]).await;
    let waited = begun.elapsed();
    assert!(waited >= Duration::from_secs(3), "it did not wait: {waited:?}");
    // Who comes later finds it agreed on.
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
async fn a_redis_that_is_flushed_while_nobody_speaks_is_agreed_on_again() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let (lobby, other) = (room("lobby"), room("other"));
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "before").await.seq, 1);
    assert_eq!(next_message(&mut bob).await.seq, 1);
    redis.command("FLUSHALL").await;
    // It needs the bus, and is answered without anybody publishing.
    until("a join is answered", async || bob.join(&other).await.is_ok()).await;
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 2);
    assert_eq!(next_message(&mut bob).await.seq, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_on_a_full_redis_and_its_clients_are_served() {
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
    // What is said makes room for itself.
    assert_eq!(say(&mut ann, &lobby, "meanwhile").await.seq, 2);
    assert_eq!(next_message(&mut bob).await.seq, 2);
    redis.command("CONFIG SET maxmemory 0").await;
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 3);
    assert_eq!(next_message(&mut bob).await.seq, 3);
}
