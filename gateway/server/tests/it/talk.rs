//! Clients that talk to each other, through `skein_client`, while something goes wrong.

use std::{collections::BTreeMap, time::Duration};

use skein_client::api::StartFrom;
use skein_protocol::ids::RoomId;
use tokio::time::Instant;

use crate::{
    cluster::Witness,
    harness::{room, within},
};

/// Clients spread over nodes that talk while something goes wrong.
pub struct Talk {
    witnesses: Vec<Witness>,
    rooms: Vec<RoomId>,
}

impl Talk {
    /// Two clients per address; each may go to the other addresses.
    pub async fn start(addresses: &[std::net::SocketAddr]) -> Self {
        Self::start_in(addresses, vec![room("lobby")]).await
    }

    /// The same in several rooms, through which each goes round.
    pub async fn start_in(addresses: &[std::net::SocketAddr], rooms: Vec<RoomId>) -> Self {
        let mut witnesses = vec![];
        for i in 0..addresses.len() * 2 {
            let first = i % addresses.len();
            let urls = (0..addresses.len())
                .map(|j| format!("ws://{}/ws", addresses[(first + j) % addresses.len()]))
                .collect();
            let witness = Witness::start(urls, &format!("u{i}"));
            for room in &rooms {
                within(witness.client.join(room, StartFrom::Now)).await.unwrap();
            }
            witnesses.push(witness);
        }
        Self { witnesses, rooms }
    }

    /// Everybody sends until `disturb` is over, and then everybody has everything.
    pub async fn check_while(self, disturb: impl Future<Output = ()>) -> usize {
        let (over, is_over) = tokio::sync::watch::channel(false);
        let mut sends = vec![];
        for witness in &self.witnesses {
            let (client, rooms, is_over) =
                (witness.client.clone(), self.rooms.clone(), is_over.clone());
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
        for (i, witness) in self.witnesses.into_iter().enumerate() {
            witness.seen(acked.len()).await.check(&format!("u{i}"), &acked);
        }
        acked.len()
    }
}

/// Lets the talk go on for a while: the time is the load, not a wait for something.
pub async fn talk_for(time: Duration) {
    let until = Instant::now() + time;
    tokio::time::sleep_until(until).await;
}
