//! Clients that exchange messages, through `skein_client`, during a fault.

use std::{collections::BTreeMap, time::Duration};

use skein_client::api::StartFrom;
use skein_protocol::ids::RoomId;
use tokio::time::Instant;

use crate::{
    cluster::ObservingClient,
    harness::{room, within},
};

/// Clients spread over nodes that exchange messages during a fault.
pub struct SteadyTraffic {
    observers: Vec<ObservingClient>,
    rooms: Vec<RoomId>,
}

impl SteadyTraffic {
    /// Starts two clients per address; each may reconnect to the other addresses.
    pub async fn start(addresses: &[std::net::SocketAddr]) -> Self {
        Self::start_in(addresses, vec![room("lobby")]).await
    }

    /// As [`Self::start`] in several rooms, to which each client sends in turn.
    pub async fn start_in(addresses: &[std::net::SocketAddr], rooms: Vec<RoomId>) -> Self {
        let mut observers = vec![];
        for i in 0..addresses.len() * 2 {
            let first = i % addresses.len();
            let urls = (0..addresses.len())
                .map(|j| format!("ws://{}/ws", addresses[(first + j) % addresses.len()]))
                .collect();
            let observer = ObservingClient::start(urls, &format!("u{i}"));
            for room in &rooms {
                within(observer.client.join(room, StartFrom::Now)).await.unwrap();
            }
            observers.push(observer);
        }
        Self { observers, rooms }
    }

    /// All clients send until `disturb` ends; then asserts that all received everything. Returns
    /// the number of acks.
    pub async fn check_while(self, disturb: impl Future<Output = ()>) -> usize {
        let (over, is_over) = tokio::sync::watch::channel(false);
        let mut sends = vec![];
        for observer in &self.observers {
            let (client, rooms, is_over) =
                (observer.client.clone(), self.rooms.clone(), is_over.clone());
            sends.push(tokio::spawn(async move {
                let mut acked = vec![];
                for i in 0.. {
                    let room = &rooms[i % rooms.len()];
                    let sent = client.send(room, i).await.unwrap();
                    acked.push(((room.clone(), sent.position.seq), sent.id));
                    if *is_over.borrow() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                acked
            }));
        }
        disturb.await;
        over.send_replace(true);
        let mut acked = BTreeMap::new();
        for sent in sends {
            acked.extend(within(sent).await.unwrap());
        }
        for (i, observer) in self.observers.into_iter().enumerate() {
            observer.seen(acked.len()).await.check(&format!("u{i}"), &acked);
        }
        acked.len()
    }
}

/// Lets the traffic continue for a while: the time is the load, not a wait for a condition.
pub async fn run_traffic_for(time: Duration) {
    let until = Instant::now() + time;
    tokio::time::sleep_until(until).await;
}
