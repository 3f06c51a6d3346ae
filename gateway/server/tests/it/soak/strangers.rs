//! What peers cost that have not shown who they are.

use futures_util::{StreamExt as _, stream};

use super::{
    Held, of,
    wire::{Wire, handshake},
};
use crate::harness::Node;

/// What a peer may cost that has sent no whole request.
const STRANGER_MAX_KIB: f64 = 4.0;
/// What a peer may cost that asks and does not take its answers: hyper's buffers, and the answer
/// that is on its way.
const GREEDY_MAX_KIB: f64 = 128.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unauthenticated_peers_cost_little_memory() {
    let node = Node::start_alone(&[]).await;
    // So many that what the process takes once, some MiB of the allocator, is little of each.
    let count = of(5_000, 3_000);
    for (what, bytes) in [("nothing", 0), ("half a header", 100)] {
        let before = Held::by(&node).await;
        let stranger = |index| async move {
            let mut wire = Wire::dial(node.address, index).await.unwrap();
            wire.send(&handshake("stranger").as_bytes()[..bytes]).await.unwrap();
            wire
        };
        let strangers: Vec<Wire> =
            stream::iter(0..count).map(stranger).buffer_unordered(100).collect().await;
        // A question of an earlier look may have been among those before.
        let there = |held: &Held| held.descriptors + 5 >= before.descriptors + count;
        let during = Held::once(&node, "all were accepted", there).await;
        let each = (during.memory_kib.saturating_sub(before.memory_kib)) as f64 / count as f64;
        println!("{count} that sent {what}: {each:.1} KiB each");
        drop(strangers);
        let gone = |held: &Held| held.descriptors <= before.descriptors;
        Held::once(&node, "all have gone", gone).await;
        assert!(each <= STRANGER_MAX_KIB, "{each} KiB for one that sent {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_read_no_responses_cost_little_memory() {
    let node = Node::start_alone(&[]).await;
    let before = Held::by(&node).await;
    let requests = "GET / HTTP/1.1\r\nHost: soak\r\n\r\n".repeat(5_000);
    let mut greedy = Vec::new();
    for index in 0..200 {
        let wire = Wire::dial(node.address, index).await.unwrap();
        wire.send_now(requests.as_bytes());
        greedy.push(wire);
    }
    // The page does not fit the sockets' buffers so often: each of them is stuck, and others are
    // not.
    let mut during = Held::by(&node).await;
    for _ in 0..50 {
        Wire::join(node.address, 1, "lobby").await.unwrap().reset();
        during = Held::by(&node).await;
    }
    let each = during.memory_kib.saturating_sub(before.memory_kib) as f64 / greedy.len() as f64;
    println!("{} that ask and do not read: {each:.1} KiB each", greedy.len());
    drop(greedy);
    Held::once(&node, "all have gone", |held| held.descriptors <= before.descriptors).await;
    assert!(each <= GREEDY_MAX_KIB, "{each} KiB for one that does not read");
}
