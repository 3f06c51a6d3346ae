//! A client that reads slowly or not at all costs bounded memory, and does not affect others.

use std::time::Duration;

use super::{
    UNLIMITED, addresses,
    client::{ClientProfile, SendSchedule},
    clients::{TestClients, default_profiles},
    is_full, metric,
    proxy::{Mode, Proxy},
    resident_bytes,
};
use crate::harness::{Node, Redis, until};

/// The index of the slow client, after the four default ones.
const SLOW: usize = 4;
/// Message size: far more is sent than all buffers on the way to the slow client hold.
const MESSAGE_BYTES: usize = 20 * 1024;

struct SlowConsumerTrial {
    redis: Redis,
    nodes: Vec<Node>,
    /// The proxy between the slow client and the first node.
    proxy: Proxy,
    clients: TestClients,
}

async fn start(extra: &[(&str, &str)]) -> SlowConsumerTrial {
    let redis = Redis::start().await;
    let options = [&UNLIMITED[..], extra].concat();
    let nodes =
        vec![Node::start(&redis, None, &options).await, Node::start(&redis, None, &options).await];
    let proxy = Proxy::with_buffer(nodes[0].address, Some(64 * 1024)).await.unwrap();
    let mut profiles = default_profiles(&addresses(&nodes));
    for profile in &mut profiles {
        profile.bytes = MESSAGE_BYTES;
    }
    profiles.push(ClientProfile {
        urls: vec![format!("ws://{}/ws", proxy.address)],
        user: "slow".to_owned(),
        // It sends nothing.
        schedule: SendSchedule::AfterAck(Duration::from_secs(3600)),
        bytes: 16,
        idle_timeout: Duration::from_secs(3600),
        ..profiles[0].clone()
    });
    let clients = TestClients::with_profiles(profiles).await.unwrap();
    clients.wait_for_acks(100).await.unwrap();
    SlowConsumerTrial { redis, nodes, proxy, clients }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_consumer_catches_up_within_bounded_memory() {
    let SlowConsumerTrial { redis: _redis, nodes, proxy, clients } = start(&[]).await;
    let before = resident_bytes(&nodes[0]);
    let mut highest = before;
    for _ in 0..3 {
        proxy.set(Mode::HoldResponses);
        // 5 MB at a time, so that the log, of 16 MiB, still has all of it.
        for _ in 0..5 {
            clients.wait_for_acks(50).await.unwrap();
            highest = highest.max(resident_bytes(&nodes[0]));
        }
        until("it falls behind", async || {
            metric(&nodes[0], "gateway_slow_consumers_total").await > 0.0
        })
        .await;
        let had = clients.checker.lock().received_count(0);
        proxy.set(Mode::Open);
        clients
            .wait_until("it has caught up", |clients| {
                clients.checker.lock().received_count(SLOW) >= had
            })
            .await
            .unwrap();
    }
    let report = clients.finish().await.unwrap();
    let grown = highest.saturating_sub(before);
    println!("slow reader, 20 KB messages: memory grew by {} KiB", grown / 1024);
    report.check_seamless("3 x a client that does not read for 5 MB");
    assert_eq!(report.connections[SLOW], 1, "the slow client was closed");
    // An outbox of 1 MiB, and the overhead of the allocator.
    assert!(grown < 16 << 20, "{grown} bytes");
    for reader in 0..SLOW {
        assert_eq!(report.connections[reader], 1);
        assert!(report.silences[reader] < super::SHORT, "{:?}", report.silences);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_behind_the_trimmed_log_is_reset() {
    let short = [("history.max_entries", "50"), ("history.window", "1s")];
    let SlowConsumerTrial { redis: _redis, nodes: _nodes, proxy, clients } = start(&short).await;
    proxy.set(Mode::HoldResponses);
    clients.wait_for_acks(700).await.unwrap();
    proxy.set(Mode::Open);
    clients
        .wait_until("the client is reset", |clients| {
            clients.checker.lock().discontinuities(SLOW) > 0
        })
        .await
        .unwrap();
    let report = clients.finish().await.unwrap();
    report.check("a client that does not read until its position is trimmed");
    assert_eq!(report.reasons.keys().collect::<Vec<_>>(), [&"log_trimmed"], "{report}");
    assert!(report.resets > 0 && report.not_recovered == 0 && report.skipped > 0, "{report}");
    assert_eq!(report.connections[SLOW], 1, "the slow client was closed");
    assert!(
        report.silences[..SLOW].iter().all(|quiet| *quiet < super::SHORT),
        "{:?}",
        report.silences
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_client_is_closed_with_4003_and_misses_nothing() {
    // 30 s in the full trial, the default value.
    let stall = if is_full() { "30s" } else { "3s" };
    let SlowConsumerTrial { redis: _redis, nodes, proxy, clients } =
        start(&[("heartbeat.write_timeout", stall), ("history.max_bytes", "512MiB")]).await;
    proxy.set(Mode::HoldResponses);
    let closed = r#"gateway_disconnects_total{code="4003",reason="none",side="gateway"}"#;
    clients
        .wait_until("enough is sent to fill all buffers", |clients| {
            let checker = clients.checker.lock();
            checker.received_count(0) > checker.received_count(SLOW) + 200
        })
        .await
        .unwrap();
    let begun = tokio::time::Instant::now();
    let deadline = begun + Duration::from_secs(60);
    while metric(&nodes[0], closed).await < 1.0 {
        assert!(tokio::time::Instant::now() < deadline, "it was not closed");
        crate::harness::poll_pause().await;
    }
    println!("a client that reads nothing: closed with 4003 after {:.2?}", begun.elapsed());
    proxy.set(Mode::Open);
    let had = clients.checker.lock().received_count(0);
    clients
        .wait_until("it has reconnected and caught up", |clients| {
            clients.checker.lock().received_count(SLOW) >= had
        })
        .await
        .unwrap();
    let report = clients.finish().await.unwrap();
    report.check_seamless("a client that reads nothing for the whole write timeout");
    assert_eq!(report.connections[SLOW], 2);
    assert!(
        report.silences[..SLOW].iter().all(|quiet| *quiet < super::SHORT),
        "{:?}",
        report.silences
    );
}
