//! Connections that open and close in every way, and leak nothing.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{task::JoinSet, time::Instant};

use super::{
    ResourceUsage, full_or_share, is_full,
    raw_client::{SoakClient, close_frame, handshake, join_frame, message_frame},
};
use crate::harness::{Node, Redis};

/// The number of concurrent connections.
const AT_ONCE: usize = 200;
/// Shared rooms; some connections also join a room of their own.
const ROOMS: usize = 50;
/// The number of tenths of the run after which memory reaches its maximum: rooms stay for 30 s
/// after their last member, and their logs on the memory bus for up to 30 s more.
const WARM_AFTER: usize = 4;
/// Allowed growth of memory from then to the end: the variation between two measurements.
const GROWTH_MAX_KIB: u64 = 6 * 1024;

/// Additional descriptors and tasks that the pool of Redis read connections may have at the end.
const READERS_MAX: usize = 8;

/// Few entries, so that the logs of a node without Redis are as large as they get after a tenth;
/// and no presence grace, or all users would leave together near the end of a short run.
const SMALL_LOGS: [(&str, &str); 8] = [
    ("sessions.ttl", "1s"),
    ("inbox.ttl", "1s"),
    ("presence.grace", "0s"),
    ("limits.accepts_per_second", "0"),
    ("history.max_entries", "10"),
    ("history.window", "1s"),
    ("history.ttl", "1s"),
    ("dedup.window", "1s"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "make test-full"]
async fn connection_churn_leaks_nothing() {
    let node = Node::start_alone(&SMALL_LOGS).await;
    churn(node, full_or_share(1_000_000, 10_000), 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "make test-full"]
async fn connection_churn_leaks_nothing_with_redis() {
    let redis = Redis::start().await;
    // Redis stores sessions, which do not count here; a connection may take longer than a second.
    let options = [&SMALL_LOGS[..], &[("sessions.ttl", "1m")]].concat();
    let node = Node::start(&redis, None, &options).await;
    churn(node, full_or_share(1_000_000, 3_000), READERS_MAX).await;
}

/// Opens and closes `count` connections; the node may then have `more` descriptors and tasks than
/// before.
async fn churn(node: Node, count: usize, more: usize) {
    let mut fresh = ResourceUsage::by(&node).await;
    println!("fresh: {fresh:?}");
    fresh.descriptors += more;
    fresh.tasks += more as i64;
    let (mut warm, mut last) = (fresh, fresh);
    for tenth in 0..10 {
        let begun = Instant::now();
        come_and_go(&node, tenth * count / 10..(tenth + 1) * count / 10).await;
        let took = begun.elapsed();
        let none_is_left = |held: &ResourceUsage| {
            (held.connections, held.members) == (0, 0)
                && held.descriptors <= fresh.descriptors
                && held.tasks <= fresh.tasks
        };
        last = ResourceUsage::once(&node, "all have left", none_is_left).await;
        // Inboxes stay subscribed for some seconds more: as many as connected in that time.
        if [WARM_AFTER, 10].contains(&(tenth + 1)) {
            last =
                ResourceUsage::once(&node, "no inbox is followed", |held| held.inboxes == 0).await;
        }
        println!("{:>8} in {took:.1?}: {last:?}", (tenth + 1) * count / 10);
        if tenth + 1 == WARM_AFTER {
            warm = last;
        }
    }
    // Rooms stay subscribed for 30 s after their last member: too long for a short run.
    if is_full() {
        last = ResourceUsage::once(&node, "no room is followed", |held| held.rooms == 0).await;
        println!("at rest: {last:?}");
    }
    // The allocator returns memory with a delay.
    let max = warm.memory_kib + GROWTH_MAX_KIB;
    let what = format!("{} KiB, after {WARM_AFTER} tenths {}", last.memory_kib, warm.memory_kib);
    ResourceUsage::once(&node, &what, |held| held.memory_kib <= max).await;
    node.process.signal("TERM");
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0));
    assert!(!said.contains("did not end in time") && !said.contains("panicked"), "{said}");
}

async fn come_and_go(node: &Node, range: std::ops::Range<usize>) {
    let next = Arc::new(AtomicUsize::new(range.start));
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (next, address) = (next.clone(), node.address);
        workers.spawn(async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= range.end {
                    return;
                }
                let visited = visit(address, index).await;
                visited.unwrap_or_else(|error| panic!("visit {index}: {error}"));
            }
        });
    }
    workers.join_all().await;
}

/// One connection; its number determines how it ends.
async fn visit(address: std::net::SocketAddr, index: usize) -> io::Result<()> {
    let room = format!("r{}", index % ROOMS);
    match index % 12 {
        0 => {
            let mut wire = SoakClient::dial(address, index).await?;
            wire.send(&handshake("half").as_bytes()[..60]).await?;
            if index.is_multiple_of(24) {
                wire.reset();
            } else {
                wire.finish();
            }
            return Ok(());
        }
        1 => {
            // Sends everything without waiting for responses.
            let mut wire = SoakClient::dial(address, index).await?;
            let mut bytes = handshake("hasty").into_bytes();
            bytes.extend(join_frame(&room));
            bytes.extend(message_frame(&room, "closed already"));
            wire.send(&bytes).await?;
            if index % 24 == 1 {
                wire.reset();
            } else {
                wire.finish();
            }
            return Ok(());
        }
        2 => {
            drop(SoakClient::dial(address, index).await?);
            return Ok(());
        }
        _ => {}
    }
    let mut wire = SoakClient::join(address, index, &room).await?;
    if index % 400 == 7 {
        wire.send(&join_frame(&format!("own-{index}"))).await?;
        wire.expect(r#""type":"joined""#).await?;
    }
    match index % 12 {
        3..=5 => {
            wire.send(&message_frame(&room, "hello")).await?;
            wire.expect(r#""type":"ack""#).await?;
            wire.send(&close_frame()).await?;
            wire.read_to_end().await?;
        }
        6 => wire.reset(),
        7 => wire.finish(),
        8 => {
            // Half a frame.
            wire.send(&message_frame(&room, "never complete")[..20]).await?;
            wire.finish();
        }
        9 => {
            // A frame without a mask: closed with 1002.
            wire.send(&[0x81, 0x02, b'{', b'}']).await?;
            wire.expect("protocol_error").await?;
            wire.read_to_end().await?;
        }
        10 => {
            wire.send(&message_frame(&room, "not waited for")).await?;
            wire.reset();
        }
        _ => {
            wire.send(&close_frame()).await?;
            wire.finish();
        }
    }
    Ok(())
}
