//! Many leave at once; others arrive meanwhile.

use std::{net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use super::{
    Held, of, quantiles,
    wire::{Wire, close_frame, message_frame},
};
use crate::harness::Node;

/// How often somebody arrives.
const ARRIVE_EVERY: Duration = Duration::from_millis(5);
/// The longest that anybody may wait for an ack, from the moment of arriving. Far above what is
/// seen, since the machine of a test has other things to do.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// How they leave.
#[derive(Clone, Copy, Debug)]
enum Way {
    Reset,
    Finish,
    CloseFrame,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mass_leave_of_one_room_delays_no_new_client() {
    mass_leave(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mass_leave_of_many_rooms_delays_no_new_client() {
    mass_leave(of(1500, 150)).await;
}

async fn mass_leave(rooms: usize) {
    let node = Node::start_alone(&[("limits.accepts_per_second", "0")]).await;
    let (count, arrivals) = (of(15_000, 1_500), of(600, 100));
    let mut slowest = Duration::ZERO;
    for way in [Way::Reset, Way::Finish, Way::CloseFrame] {
        let clients = join_many(&node, count, rooms).await;
        let mut before = arrive(node.address, arrivals).await;
        let arriving = tokio::spawn(arrive(node.address, arrivals));
        let begun = Instant::now();
        let clients = tokio::task::spawn_blocking(move || leave(clients, way)).await.unwrap();
        let said = begun.elapsed();
        let is_settled = |held: &Held| held.connections <= arrivals as i64 / 2;
        Held::once(&node, "they have left", is_settled).await;
        let gone = begun.elapsed();
        let mut during = arriving.await.unwrap();
        println!(
            "{count} in {rooms} rooms leave by {way:?} within {said:.1?}; gone after {gone:.1?}"
        );
        println!("  arrivals without: {}", quantiles(&mut before));
        println!("  arrivals with:    {}", quantiles(&mut during));
        slowest = slowest.max(during[during.len() - 1]);
        drop(clients);
        Held::once(&node, "all are gone", |held| (held.connections, held.members) == (0, 0)).await;
    }
    assert!(slowest < WAIT_MAX, "somebody waited for {slowest:?}");
}

async fn join_many(node: &Node, count: usize, rooms: usize) -> Vec<Wire> {
    let join = |index| async move {
        Wire::join(node.address, index, &format!("r{}", index % rooms)).await.unwrap()
    };
    let clients: Vec<Wire> = stream::iter(0..count).map(join).buffer_unordered(100).collect().await;
    Held::once(node, "all are members", |held| held.members == count as i64).await;
    clients
}

/// All leave. Returns those that have yet to be closed.
fn leave(clients: Vec<Wire>, way: Way) -> Vec<Wire> {
    match way {
        Way::Reset => clients.into_iter().for_each(Wire::reset),
        Way::Finish => clients.into_iter().for_each(Wire::finish),
        Way::CloseFrame => {
            let frame = close_frame();
            clients.iter().for_each(|client| client.send_now(&frame));
            return clients;
        }
    }
    Vec::new()
}

/// How long each of those who arrive one after the other waited until a message was acknowledged,
/// counted from when they were due.
async fn arrive(address: SocketAddr, count: usize) -> Vec<Duration> {
    let mut ticks = tokio::time::interval(ARRIVE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut arriving = JoinSet::new();
    for index in 0..count {
        let due = ticks.tick().await;
        arriving.spawn(async move {
            // Several rooms, so that some are of the same shard as those that are left.
            let room = format!("arrivals-{}", index % 8);
            let mut wire = Wire::join(address, index, &room).await.unwrap();
            wire.send(&message_frame(&room, "here")).await.unwrap();
            wire.expect(r#""type":"ack""#).await.unwrap();
            let waited = due.elapsed();
            wire.reset();
            waited
        });
    }
    arriving.join_all().await
}
