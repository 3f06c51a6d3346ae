//! Publishes while Redis is down: a bounded wait, a rejection, and one entry for any number of
//! retries.

use std::time::Duration;

use serde_json::json;
use skein_client::{
    connection::{ClientConnection, ReceivedMessage, RequestError},
    frames,
    options::{ConnectError, ConnectOptions},
};
use skein_protocol::{
    error::ErrorCode,
    ids::MessageId,
    protocol::server_frame::{AckFrame, ErrorFrame, ServerFrame},
};
use tokio::time::Instant;

use super::proxy::{Mode, Proxy};
use crate::harness::{Node, Redis, connect, next_message, room, say, until, within};

async fn send(
    connection: &mut ClientConnection,
    id: MessageId,
) -> Result<AckFrame, Box<ErrorFrame>> {
    let (lobby, content) = (room("lobby"), json!("once"));
    let message =
        frames::OutgoingMessage { id: Some(id), ..frames::OutgoingMessage::text(&lobby, &content) };
    match within(connection.request(&message)).await {
        Ok(ServerFrame::Ack(ack)) => Ok(*ack),
        Err(RequestError::Rejected(refusal)) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

/// Retries as the rejections say, until an ack arrives.
async fn send_until_acked(connection: &mut ClientConnection, id: MessageId) -> AckFrame {
    let deadline = Instant::now() + crate::harness::PATIENCE;
    loop {
        match send(connection, id).await {
            Ok(ack) => return ack,
            Err(refusal) => {
                assert_eq!(refusal.code, ErrorCode::Unavailable);
                assert!(Instant::now() < deadline, "{refusal:?}");
                let pause = Duration::from_millis(refusal.retry_after_ms.unwrap());
                tokio::time::sleep_until(Instant::now() + pause).await;
            }
        }
    }
}

#[track_caller]
fn check_rejection(refusal: &ErrorFrame, id: MessageId, waited: Duration, wait: Duration) {
    assert_eq!((refusal.code, refusal.id), (ErrorCode::Unavailable, Some(id)));
    assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 0), "{refusal:?}");
    let bound = wait.mul_f32(0.9)..wait + Duration::from_secs(2);
    assert!(bound.contains(&waited), "refused after {waited:?}, not {wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_rejected_without_redis_is_one_entry_on_retry() {
    let mut redis = Redis::start_durable().await;
    let node = Node::start(&redis, None, &[]).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    assert_eq!(say(&mut ann, &lobby, "before").await.seq, 1);
    next_message(&mut ann).await;
    redis.kill().await;
    let (id, begun) = (MessageId::random(), Instant::now());
    let refusal = send(&mut ann, id).await.unwrap_err();
    check_rejection(&refusal, id, begun.elapsed(), Duration::from_secs(5));
    println!("publish without Redis: `unavailable` after {:.2?}", begun.elapsed());

    // Handshakes are answered with 503 meanwhile.
    let options = ConnectOptions::new(format!("ws://{}/ws", node.address)).user("bob");
    let refused = ClientConnection::open(&options).await.map(drop);
    let refused = refused.expect_err("a handshake was taken without Redis");
    let told = matches!(refused, ConnectError::Http { status: 503, retry_after: Some(_), .. });
    assert!(told, "{refused:?}");

    redis.restart().await;
    let ack = send_until_acked(&mut ann, id).await;
    assert_eq!(ack.seq, 2);
    let again = send(&mut ann, id).await.unwrap();
    assert_eq!((again.seq, again.duplicate, again.epoch), (2, true, ack.epoch));
    assert_eq!(say(&mut ann, &lobby, "after").await.seq, 3);
    let message = next_message(&mut ann).await;
    assert_eq!((message.seq, message.id), (2, id));
    assert_eq!(next_message(&mut ann).await.seq, 3);
}

/// Ann is on a node behind a proxy, Bob on one without.
async fn ann_and_bob(
    redis: &Redis,
    wait: &str,
) -> (Proxy, [Node; 2], ClientConnection, ClientConnection) {
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let extra = [("cluster.redis_url", url.as_str()), ("publish.timeout", wait)];
    let nodes = [Node::start(redis, None, &extra).await, Node::start(redis, None, &[]).await];
    let mut ann = connect(nodes[0].address, "ann").await;
    let mut bob = connect(nodes[1].address, "bob").await;
    ann.join(&room("lobby")).await.unwrap();
    bob.join(&room("lobby")).await.unwrap();
    (proxy, nodes, ann, bob)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_retry_after_a_lost_response_is_one_entry() {
    let redis = Redis::start().await;
    let (proxy, nodes, mut ann, mut bob) = ann_and_bob(&redis, "2s").await;
    proxy.set(Mode::DropResponses);
    let (id, begun) = (MessageId::random(), Instant::now());
    let refusal = send(&mut ann, id).await.unwrap_err();
    check_rejection(&refusal, id, begun.elapsed(), Duration::from_secs(2));
    // The publish was rejected, but is in the log: the gateway could not know its result.
    let message = next_message(&mut bob).await;
    assert_eq!((message.seq, message.id), (1, id));

    // The client retries on another node, before its own node receives again.
    let mut elsewhere = connect(nodes[1].address, "ann").await;
    elsewhere.join(&room("lobby")).await.unwrap();
    let ack = send(&mut elsewhere, id).await.unwrap();
    assert_eq!((ack.seq, ack.duplicate), (1, true));
    proxy.set(Mode::Open);
    let ack = send_until_acked(&mut ann, id).await;
    assert_eq!((ack.seq, ack.duplicate), (1, true));
    assert_eq!(say(&mut bob, &room("lobby"), "next").await.seq, 2);
    for connection in [&mut ann, &mut bob] {
        until("the second comes behind the first", async || {
            next_message(connection).await.seq == 2
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_retries_an_append_whose_response_is_lost() {
    let redis = Redis::start().await;
    let (proxy, _nodes, mut ann, mut bob) = ann_and_bob(&redis, "20s").await;
    let lobby = room("lobby");
    for round in 0..5 {
        proxy.set(Mode::DropResponses);
        let id = MessageId::random();
        let content = json!(round);
        let message = frames::OutgoingMessage {
            id: Some(id),
            ..frames::OutgoingMessage::text(&lobby, &content)
        };
        ann.send_json(&message).await.unwrap();
        let heard = next_message(&mut bob).await;
        assert_eq!((heard.seq, heard.id), (round + 1, id));
        proxy.set(Mode::Open);
        let ack = within(async {
            loop {
                if let ReceivedMessage::Frame(ServerFrame::Ack(ack), _) = ann.next().await.unwrap()
                {
                    return ack;
                }
            }
        })
        .await;
        assert_eq!((ack.seq, ack.id), (round + 1, id));
    }
    assert_eq!(say(&mut bob, &lobby, "last").await.seq, 6);
}
