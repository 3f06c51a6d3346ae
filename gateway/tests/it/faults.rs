//! A node is killed, Redis goes away, links are cut: nobody misses anything that was acknowledged.

use std::{collections::BTreeMap, time::Duration};

use shared::{client::api::Start, ids::RoomId};
use tokio::time::Instant;

use crate::{
    cluster::Witness,
    harness::{Gateway, Node, Redis, get, next_message, room, say, until, within},
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
                within(witness.client.join(room, Start::Now)).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_killed_takes_nothing_with_it() {
    let redis = Redis::start().await;
    let mut nodes = vec![];
    for _ in 0..3 {
        let limits = [("limits.messages_per_second", "0")];
        nodes.push(Node::start(&redis, None, &limits).await);
    }
    let addresses: Vec<_> = nodes.iter().map(|node| node.address).collect();
    let talk = Talk::start(&addresses).await;
    let acked = talk
        .check_while(async {
            talk_for(Duration::from_millis(500)).await;
            nodes[0].process.kill().await;
            talk_for(Duration::from_millis(1500)).await;
        })
        .await;
    println!("gateway SIGKILL: {acked} acknowledged, 0 lost, 0 duplicated, 0 out of order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_restarts_with_its_file_loses_nothing() {
    let mut redis = Redis::start_durable().await;
    let one = Gateway::start_on(&redis, &[("limits.messages_per_second", "0")]).await;
    let two = Gateway::start_on(&redis, &[("limits.messages_per_second", "0")]).await;
    let talk = Talk::start(&[one.address, two.address]).await;
    let acked = talk
        .check_while(async {
            for _ in 0..2 {
                talk_for(Duration::from_millis(500)).await;
                redis.kill().await;
                let ready = async || get(one.address, "/ready").await;
                until("not ready", async || ready().await.status == 503).await;
                assert!(ready().await.body.contains(r#""failing":["bus"]"#));
                redis.restart().await;
                until("ready", async || ready().await.status == 200).await;
            }
            talk_for(Duration::from_millis(500)).await;
        })
        .await;
    println!("2 x Redis SIGKILL and restart: {acked} acknowledged, 0 lost, 0 duplicated");
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_links_are_repaired_and_clients_see_no_hole() {
    let redis = Redis::start().await;
    let one = Gateway::start_on(&redis, &[("limits.messages_per_second", "0")]).await;
    let two = Gateway::start_on(&redis, &[("limits.messages_per_second", "0")]).await;
    let talk = Talk::start(&[one.address, two.address]).await;
    let acked = talk
        .check_while(async {
            for i in 0..20 {
                talk_for(Duration::from_millis(100)).await;
                // Every other time publishes and reads as well.
                let kind = if i % 2 == 0 { "pubsub" } else { "normal" };
                redis.command(&format!("CLIENT KILL TYPE {kind}")).await;
            }
            talk_for(Duration::from_millis(500)).await;
        })
        .await;
    let metrics = get(one.admin, "/metrics").await.body;
    assert!(!metrics.contains("gateway_bus_reconnects_total 0"), "no link was cut: {metrics}");
    println!("20 x CLIENT KILL: {acked} acknowledged, 0 lost, 0 duplicated, 0 out of order");
}

#[tokio::test]
async fn what_was_said_while_a_node_was_deaf_comes_when_it_hears_again() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (one.connect("ann").await, two.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    redis.command("ACL SETUSER default -subscribe").await;
    redis.command("CLIENT KILL TYPE pubsub").await;
    for gateway in [&one, &two] {
        until("deaf", async || get(gateway.address, "/ready").await.status == 503).await;
    }
    // Publishing goes on, and nothing is said after it: only the reconnect can bring it.
    assert_eq!(say(&mut ann, &lobby, "unheard").await.seq, 1);
    redis.command("ACL SETUSER default +subscribe").await;
    for connection in [&mut ann, &mut bob] {
        assert_eq!(next_message(connection).await.seq, 1);
    }
}
