//! A plain stop: what is queued gets out, clients are sent elsewhere, and the process ends with 0.

use shared::{
    client::connection::Received,
    protocol::answer::{Answer, Frame, ReconnectReason},
};

use crate::harness::{Node, Redis, closed, connect, get, room, until, within};

#[tokio::test]
async fn sigterm_sends_clients_elsewhere_and_ends_with_0() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[("drain.delay", "2s")]).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    node.process.signal("TERM");
    until("not ready", async || get(node.address, "/ready").await.status == 503).await;
    let ready = get(node.address, "/ready").await;
    assert_eq!(ready.body, r#"{"failing":["drain"],"status":"unavailable"}"#);
    let late = shared::client::options::Options::to(format!("ws://{}/ws", node.address));
    let refused = shared::client::connection::Connection::open(&late).await;
    assert!(refused.is_err(), "a new client was taken");
    // Who is here is served until the end, and told where to go.
    crate::harness::say(&mut ann, &lobby, "still here").await;
    let mut reconnect = None;
    let end = loop {
        match within(ann.next()).await {
            Ok(Received::Frame(Frame::Reconnect(frame), _)) => reconnect = Some(frame),
            Ok(_) => {}
            Err(end) => break end,
        }
    };
    assert_eq!(reconnect.unwrap().reason, ReconnectReason::Draining);
    assert_eq!(end.code, Some(1012));
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn a_message_that_was_sent_before_the_stop_is_answered() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[]).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    for i in 0..50 {
        let content = i.into();
        let frame = shared::client::frames::Message::to(&lobby, &content);
        ann.send_json(&frame).await.unwrap();
    }
    // The first answer shows that the burst was read.
    while !matches!(ann.next_frame().await.unwrap(), Answer::Ack(_)) {}
    node.process.signal("TERM");
    let mut acks = 1;
    while let Ok(received) = within(ann.next()).await {
        acks += usize::from(matches!(received, Received::Frame(Frame::Ack(_), _)));
    }
    assert_eq!(acks, 50);
    assert_eq!(node.end().await.0, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[("drain.delay", "10m")]).await;
    let mut ann = connect(node.address, "ann").await;
    node.process.signal("TERM");
    until("not ready", async || get(node.address, "/ready").await.status == 503).await;
    node.process.signal("TERM");
    assert_eq!(node.end().await.0, Some(0));
    assert_eq!(closed(&mut ann).await.0, None);
}

#[tokio::test]
async fn a_redis_that_hangs_does_not_keep_a_node_from_stopping() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[]).await;
    let mut ann = connect(node.address, "ann").await;
    redis.signal("STOP");
    for i in 0..20 {
        let room = room(&format!("r{i}"));
        ann.send_json(&shared::client::frames::Join::to(&room)).await.unwrap();
    }
    node.process.signal("TERM");
    let begun = tokio::time::Instant::now();
    assert_eq!(closed(&mut ann).await.0, Some(1012));
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0));
    assert!(begun.elapsed() < std::time::Duration::from_secs(8), "{:?}: {said}", begun.elapsed());
}
