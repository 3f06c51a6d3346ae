//! Many clients leave at once while others connect.

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use super::{
    ResourceUsage, full_or_share, quantiles,
    raw_client::{SoakClient, close_frame, message_frame},
};
use crate::harness::Node;

/// The interval between new clients.
const ARRIVE_EVERY: Duration = Duration::from_millis(5);
/// The longest allowed time from connecting to an ack. Far above measured values, because a test
/// machine is busy.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// How clients leave.
#[derive(Clone, Copy, Debug)]
enum LeaveMode {
    Reset,
    Finish,
    CloseFrame,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "make test-full"]
async fn mass_leave_of_one_room_delays_no_new_client() {
    mass_leave(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "make test-full"]
async fn mass_leave_of_many_rooms_delays_no_new_client() {
    mass_leave(full_or_share(1500, 150)).await;
}

async fn mass_leave(rooms: usize) {
    let node = Node::start_alone(&[("limits.accepts_per_second", "0")]).await;
    let (count, arrivals) = (full_or_share(15_000, 1_500), full_or_share(600, 100));
    let mut slowest = Duration::ZERO;
    for way in [LeaveMode::Reset, LeaveMode::Finish, LeaveMode::CloseFrame] {
        let clients = join_many(&node, count, rooms).await;
        let mut before = measure_new_clients(node.address, arrivals).await;
        let arriving = tokio::spawn(measure_new_clients(node.address, arrivals));
        let begun = Instant::now();
        let clients = tokio::task::spawn_blocking(move || leave(clients, way)).await.unwrap();
        let said = begun.elapsed();
        let is_settled = |held: &ResourceUsage| held.connections <= arrivals as i64 / 2;
        ResourceUsage::once(&node, "they have left", is_settled).await;
        let gone = begun.elapsed();
        let mut during = arriving.await.unwrap();
        println!(
            "{count} in {rooms} rooms leave by {way:?} within {said:.1?}; left after {gone:.1?}"
        );
        println!("  new clients before: {}", quantiles(&mut before));
        println!("  new clients during: {}", quantiles(&mut during));
        slowest = slowest.max(during[during.len() - 1]);
        drop(clients);
        ResourceUsage::once(&node, "all have left", |held| {
            (held.connections, held.members) == (0, 0)
        })
        .await;
    }
    assert!(slowest < WAIT_MAX, "a new client waited for {slowest:?}");
}

async fn join_many(node: &Node, count: usize, rooms: usize) -> Vec<SoakClient> {
    let join = |index| async move {
        SoakClient::join(node.address, index, &format!("r{}", index % rooms)).await.unwrap()
    };
    let clients: Vec<SoakClient> =
        stream::iter(0..count).map(join).buffer_unordered(100).collect().await;
    ResourceUsage::once(node, "all are members", |held| held.members == count as i64).await;
    clients
}

/// Makes all clients leave. Returns those whose sockets are still open.
fn leave(clients: Vec<SoakClient>, way: LeaveMode) -> Vec<SoakClient> {
    match way {
        LeaveMode::Reset => clients.into_iter().for_each(SoakClient::reset),
        LeaveMode::Finish => clients.into_iter().for_each(SoakClient::finish),
        LeaveMode::CloseFrame => {
            let frame = close_frame();
            clients.iter().for_each(|client| client.send_now(&frame));
            return clients;
        }
    }
    Vec::new()
}

/// Connects clients at a fixed interval. Returns for each the time from its due time to the ack of
/// a message.
async fn measure_new_clients(address: SocketAddr, count: usize) -> Vec<Duration> {
    let mut ticks = tokio::time::interval(ARRIVE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut arriving = JoinSet::new();
    for index in 0..count {
        let due = ticks.tick().await;
        arriving.spawn(async move {
            // Several rooms, so that some are on the same shard as the abandoned ones.
            let room = format!("arrivals-{}", index % 8);
            let mut wire = SoakClient::join(address, index, &room).await.unwrap();
            wire.send(&message_frame(&room, "here")).await.unwrap();
            wire.expect(r#""type":"ack""#).await.unwrap();
            let waited = due.elapsed();
            wire.reset();
            waited
        });
    }
    arriving.join_all().await
}
