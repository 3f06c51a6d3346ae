//! What peers cost that have not shown who they are.

use futures_util::{StreamExt as _, stream};

use super::{
    Held, of,
    wire::{Wire, handshake},
};
use crate::harness::Node;

/// What a peer may cost that has sent no whole request: targets of the design.
const STRANGER_MAX_KIB: f64 = 4.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sent_no_whole_request_costs_little() {
    let node = Node::start_alone(&[]).await;
    let count = of(5_000, 1_000);
    for (what, bytes) in [("nothing", 0), ("half a header", 100)] {
        let before = Held::by(&node).await;
        let stranger = |index| async move {
            let mut wire = Wire::dial(node.address, index).await.unwrap();
            wire.send(&handshake("stranger").as_bytes()[..bytes]).await.unwrap();
            wire
        };
        let strangers: Vec<Wire> =
            stream::iter(0..count).map(stranger).buffer_unordered(100).collect().await;
        let there = |held: &Held| held.descriptors >= before.descriptors + count;
        let during = Held::once(&node, "all were accepted", there).await;
        let each = (during.pss_kib.saturating_sub(before.pss_kib)) as f64 / count as f64;
        println!("{count} that sent {what}: {each:.1} KiB each");
        drop(strangers);
        let gone = |held: &Held| held.descriptors <= before.descriptors;
        Held::once(&node, "all have gone", gone).await;
        assert!(each <= STRANGER_MAX_KIB, "{each} KiB for one that sent {what}");
    }
}
