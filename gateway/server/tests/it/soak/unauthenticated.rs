//! Memory cost of unauthenticated peers.

use futures_util::{StreamExt as _, stream};

use super::{
    ResourceUsage, full_or_share,
    raw_client::{SoakClient, handshake},
};
use crate::harness::Node;

/// The maximum for a peer that has sent no complete request.
const SILENT_MAX_KIB: f64 = 4.0;
/// The maximum for a peer that sends requests and reads no responses: hyper's buffers, and the
/// response in flight.
const GREEDY_MAX_KIB: f64 = 128.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unauthenticated_peers_cost_little_memory() {
    let node = Node::start_alone(&[]).await;
    // So many that the fixed cost of the process, some MiB of the allocator, is small per peer.
    let count = full_or_share(5_000, 3_000);
    for (what, bytes) in [("nothing", 0), ("half a header", 100)] {
        let before = ResourceUsage::by(&node).await;
        let connect_silent = |index| async move {
            let mut wire = SoakClient::dial(node.address, index).await.unwrap();
            wire.send(&handshake("silent").as_bytes()[..bytes]).await.unwrap();
            wire
        };
        let peers: Vec<SoakClient> =
            stream::iter(0..count).map(connect_silent).buffer_unordered(100).collect().await;
        // A connection of an earlier measurement may be among the earlier descriptors.
        let there = |held: &ResourceUsage| held.descriptors + 5 >= before.descriptors + count;
        let during = ResourceUsage::once(&node, "all were accepted", there).await;
        let each = (during.memory_kib.saturating_sub(before.memory_kib)) as f64 / count as f64;
        println!("{count} that sent {what}: {each:.1} KiB each");
        drop(peers);
        let gone = |held: &ResourceUsage| held.descriptors <= before.descriptors;
        ResourceUsage::once(&node, "all are closed", gone).await;
        assert!(each <= SILENT_MAX_KIB, "{each} KiB for one that sent {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_that_read_no_responses_cost_little_memory() {
    let node = Node::start_alone(&[]).await;
    let before = ResourceUsage::by(&node).await;
    let requests = "GET / HTTP/1.1\r\nHost: soak\r\n\r\n".repeat(5_000);
    let mut greedy = Vec::new();
    for index in 0..200 {
        let wire = SoakClient::dial(node.address, index).await.unwrap();
        wire.send_now(requests.as_bytes());
        greedy.push(wire);
    }
    // So many pages do not fit the socket buffers: each of these peers is stuck, and others are
    // served.
    let mut during = ResourceUsage::by(&node).await;
    for _ in 0..50 {
        SoakClient::join(node.address, 1, "lobby").await.unwrap().reset();
        during = ResourceUsage::by(&node).await;
    }
    let each = during.memory_kib.saturating_sub(before.memory_kib) as f64 / greedy.len() as f64;
    println!("{} that send requests and do not read: {each:.1} KiB each", greedy.len());
    drop(greedy);
    ResourceUsage::once(&node, "all are closed", |held| held.descriptors <= before.descriptors)
        .await;
    assert!(each <= GREEDY_MAX_KIB, "{each} KiB for one that does not read");
}
