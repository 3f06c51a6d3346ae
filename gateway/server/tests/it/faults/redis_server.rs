//! Redis is killed, restarts with its file or empty, freezes, or closes its connections.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    addresses,
    client::SendSchedule,
    clients::{TestClients, default_profiles},
    length, ready, start_nodes, until_ready,
};
use crate::harness::{Redis, get, until};

/// Kills Redis repeatedly under load, at a different point of the load each time.
async fn kill_redis(mut redis: Redis, kills: u64, what: &str) {
    let nodes = start_nodes(&redis, 2).await;
    // Many messages are in flight at any time, so some are acknowledged but not delivered.
    let addresses = [addresses(&nodes), addresses(&nodes), addresses(&nodes)].concat();
    let mut profiles = default_profiles(&addresses);
    for profile in &mut profiles {
        profile.schedule = SendSchedule::AfterAck(Duration::from_millis(3));
    }
    let clients = TestClients::with_profiles(profiles).await.unwrap();
    let mut whole_slowest = Duration::ZERO;
    for kill in 0..kills {
        clients.wait_for_acks(300).await.unwrap();
        clients.run_for(Duration::from_millis(kill * 37 % 200)).await;
        redis.kill().await;
        if kill == 0 {
            let health = async || get(nodes[0].address, "/ready").await;
            until("not ready", async || health().await.status == 503).await;
            assert!(health().await.body.contains(r#""failing":["bus"]"#));
        }
        redis.restart().await;
        let back = Instant::now();
        until_ready(&nodes).await;
        clients.wait_for_acks(1).await.unwrap();
        whole_slowest = whole_slowest.max(back.elapsed());
    }
    clients.wait_for_acks(100).await.unwrap();
    let report = clients.finish().await.unwrap();
    println!("{what}: acknowledged again after {whole_slowest:.2?} at most");
    report.check_seamless(&format!("{kills} x {what}"));
    assert!(report.connections.iter().all(|count| *count == 1), "{:?}", report.connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_redis_with_its_file_loses_nothing() {
    let redis = Redis::start_durable().await;
    kill_redis(redis, length(5, 25), "Redis SIGKILL, restarted with its file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_redis_is_restored_from_the_nodes() {
    let redis = Redis::start().await;
    kill_redis(redis, length(5, 25), "Redis SIGKILL, restarted empty").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_away_longer_than_the_rings_is_not_recovered() {
    let mut redis = Redis::start().await;
    let nodes = start_nodes(&redis, 2).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    clients.wait_for_acks(50).await.unwrap();
    let away = 3;
    clients.disconnect(away);
    clients.wait_for_acks(600).await.unwrap();
    redis.kill().await;
    redis.restart().await;
    until_ready(&nodes).await;
    clients.wait_for_acks(50).await.unwrap();
    assert_eq!(clients.checker.lock().discontinuities(away), 0);
    clients.reconnect(away);
    clients
        .wait_until("the client gets a discontinuity", |clients| {
            clients.checker.lock().discontinuities(away) > 0
        })
        .await
        .unwrap();
    let report = clients.finish().await.unwrap();
    report.check("Redis restarted empty, a client away for 600 messages");
    // Only this client gets a signalled discontinuity.
    assert_eq!((report.not_recovered, report.resets), (1, 0), "{report}");
    assert!(report.skipped > 0, "{report}");
}

/// Freezes Redis for each of these times, and lets it continue.
async fn freeze_redis(times: &[Duration]) {
    let redis = Redis::start().await;
    let nodes = start_nodes(&redis, 2).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    for time in times {
        clients.wait_for_acks(100).await.unwrap();
        redis.signal("STOP");
        clients.run_for(*time).await;
        redis.signal("CONT");
        until_ready(&nodes).await;
        clients.wait_for_acks(100).await.unwrap();
    }
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("Redis SIGSTOP {times:?}"));
    assert!(report.connections.iter().all(|count| *count == 1), "{:?}", report.connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_redis_is_waited_for() {
    let short = [500, 3_000, 12_000].map(Duration::from_millis);
    freeze_redis(&short).await;
}

/// Closes connections of Redis repeatedly, at this interval.
async fn kill_connections(commands: &[&str], pace: Duration, what: &str) {
    let redis = Redis::start().await;
    let nodes = start_nodes(&redis, 2).await;
    let clients = TestClients::connect(&addresses(&nodes)).await.unwrap();
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < length(Duration::from_secs(4), Duration::from_secs(10)) {
        clients.run_for(pace).await;
        for command in commands {
            redis.command(command).await;
        }
        count += 1;
    }
    clients.wait_for_acks(100).await.unwrap();
    for node in &nodes {
        until("ready", async || ready(node.address).await).await;
        let lost = super::metric(node, "gateway_bus_reconnects_total").await;
        assert!(lost > 0.0, "no link was cut");
    }
    let report = clients.finish().await.unwrap();
    report.check_seamless(&format!("{count} x {what}"));
    assert!(report.connections.iter().all(|count| *count == 1), "{:?}", report.connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeatedly_cut_pubsub_link_is_repaired() {
    let pace = Duration::from_millis(250);
    kill_connections(&["CLIENT KILL TYPE pubsub"], pace, "CLIENT KILL of pub/sub every 250 ms")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repeatedly_cut_redis_links_are_repaired() {
    let pace = Duration::from_millis(400);
    let commands = ["CLIENT KILL TYPE normal", "CLIENT KILL TYPE pubsub"];
    kill_connections(&commands, pace, "CLIENT KILL of everything every 400 ms").await;
}
