//! Several nodes and one Redis: a message published on one node reaches members on all nodes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use serde_json::json;
use skein_client::{
    Client,
    api::{ClientEvent, ClientOptions, StartFrom},
    frames,
    options::ConnectOptions,
};
use skein_protocol::{
    ids::{MessageId, RoomId},
    position::Seq,
    protocol::server_frame::ServerFrame,
};
use tokio::{sync::mpsc, task::JoinHandle};

use crate::harness::{Gateway, Nginx, Redis, next_message, room, say, within};

/// Messages that a client received, per room in order of arrival.
#[derive(Debug, Default)]
pub struct ObservedMessages {
    pub rooms: HashMap<RoomId, Vec<(Seq, MessageId)>>,
    pub nodes: Vec<String>,
    /// Events that the delivery promise forbids.
    pub faults: Vec<String>,
}

impl ObservedMessages {
    fn note(&mut self, event: ClientEvent) {
        match event {
            ClientEvent::Connected { node, .. } => self.nodes.push(node.to_string()),
            ClientEvent::Message { message, .. } => {
                let seen = self.rooms.entry(message.room.clone()).or_default();
                seen.push((message.seq, message.id));
            }
            ClientEvent::Gap { .. }
            | ClientEvent::Duplicate { .. }
            | ClientEvent::InvalidMessage(_)
            | ClientEvent::NotRecovered { .. }
            | ClientEvent::Reset(_)
            | ClientEvent::Left { .. }
            | ClientEvent::Error(_) => self.faults.push(format!("{event:?}")),
            ClientEvent::Direct { .. }
            | ClientEvent::Notification(_)
            | ClientEvent::Joined(_)
            | ClientEvent::Status(_)
            | ClientEvent::OtherFrame(_)
            | ClientEvent::Disconnected { .. }
            | ClientEvent::ConnectFailed { .. }
            | ClientEvent::Ended(_) => {}
        }
    }

    /// Panics unless every acknowledged message of every room arrived once and in order.
    #[track_caller]
    pub fn check(&self, user: &str, acked: &BTreeMap<(RoomId, Seq), MessageId>) {
        assert!(self.faults.is_empty(), "{user}: {:?}", self.faults);
        for (room, seen) in &self.rooms {
            let seqs: Vec<_> = seen.iter().map(|(seq, _)| *seq).collect();
            assert!(seqs.is_sorted_by(|a, b| a < b), "{user} in {room}: {seqs:?}");
            let ids: HashSet<_> = seen.iter().map(|(_, id)| id).collect();
            assert_eq!(ids.len(), seen.len(), "{user} in {room}: an id arrived twice");
        }
        for ((room, seq), id) in acked {
            let seen = self.rooms.get(room).is_some_and(|seen| seen.contains(&(*seq, *id)));
            assert!(seen, "{user} in {room}: {seq} was acknowledged and did not arrive");
        }
    }
}

/// A client that records its messages, and stops after `total` of them.
pub struct ObservingClient {
    pub client: Client,
    task: JoinHandle<ObservedMessages>,
    enough: mpsc::Sender<usize>,
}

impl ObservingClient {
    pub fn start(urls: Vec<String>, user: &str) -> Self {
        let options = ConnectOptions::new(urls[0].clone()).user(user);
        let settings = ClientOptions {
            urls,
            backoff_base: Duration::from_millis(50),
            backoff_cap: Duration::from_millis(500),
            ..ClientOptions::default()
        };
        let (client, mut events) = Client::start(options, settings);
        let (enough, mut total) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let (mut seen, mut until) = (ObservedMessages::default(), usize::MAX);
            loop {
                let count: usize = seen.rooms.values().map(Vec::len).sum();
                if count >= until {
                    return seen;
                }
                tokio::select! {
                    Some(total) = total.recv() => until = total,
                    event = events.recv() => match event {
                        Some(event) => seen.note(event),
                        None => return seen,
                    },
                }
            }
        });
        Self { client, task, enough }
    }

    /// Waits for `total` messages and returns them.
    pub async fn seen(self, total: usize) -> ObservedMessages {
        self.enough.send(total).await.unwrap();
        within(self.task).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_on_all_nodes_get_each_message_once_in_order() {
    let redis = Redis::start().await;
    let mut gateways = vec![];
    for id in ["n1", "n2", "n3"] {
        let limits = [("node.id", id), ("limits.messages_per_second", "0")];
        gateways.push(Gateway::start_on(&redis, &limits).await);
    }
    let nodes: Vec<SocketAddr> = gateways.iter().map(|gateway| gateway.address).collect();
    let nginx = Nginx::start(&nodes).await;
    let url = format!("ws://{}/ws", nginx.address);
    let rooms: Vec<RoomId> = ["a", "b", "c", "d"].map(room).to_vec();

    let mut observers = vec![];
    for i in 0..12 {
        let observer = ObservingClient::start(vec![url.clone()], &format!("u{i}"));
        for room in &rooms {
            within(observer.client.join(room, StartFrom::Now)).await.unwrap();
        }
        observers.push(observer);
    }
    let mut sends = vec![];
    for observer in &observers {
        let (client, rooms) = (observer.client.clone(), rooms.clone());
        sends.push(tokio::spawn(async move {
            let mut acked = vec![];
            for i in 0..50 {
                let room = rooms[i % rooms.len()].clone();
                let sent = client.send(&room, i).await.unwrap();
                acked.push(((room, sent.position.seq), sent.id));
            }
            acked
        }));
    }
    let mut acked = BTreeMap::new();
    for sent in sends {
        acked.extend(within(sent).await.unwrap());
    }
    assert_eq!(acked.len(), 600);
    let mut spread: HashMap<String, usize> = HashMap::new();
    for (i, observer) in observers.into_iter().enumerate() {
        let seen = observer.seen(600).await;
        seen.check(&format!("u{i}"), &acked);
        for node in &seen.nodes {
            *spread.entry(node.clone()).or_default() += 1;
        }
    }
    assert_eq!(spread.values().collect::<Vec<_>>(), [&4, &4, &4], "{spread:?}");
    for gateway in gateways {
        gateway.stop().await;
    }
}

#[tokio::test]
async fn an_id_sent_through_two_nodes_at_once_is_one_entry() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let (mut first, mut second) = (one.connect("ann").await, two.connect("ann").await);
    first.join(&lobby).await.unwrap();
    second.join(&lobby).await.unwrap();
    for round in 1..=20 {
        let content = json!(round);
        let message = frames::OutgoingMessage {
            id: Some(MessageId::random()),
            ..frames::OutgoingMessage::text(&lobby, &content)
        };
        let (a, b) = tokio::join!(first.request(&message), second.request(&message));
        let (ServerFrame::Ack(a), ServerFrame::Ack(b)) = (a.unwrap(), b.unwrap()) else {
            panic!("no ack")
        };
        assert_eq!((a.seq, b.seq), (round, round));
        assert_eq!(usize::from(a.duplicate) + usize::from(b.duplicate), 1);
        for connection in [&mut first, &mut second] {
            assert_eq!(next_message(connection).await.seq, round);
        }
    }
}

#[tokio::test]
async fn a_client_resumes_on_another_node() {
    let redis = Redis::start().await;
    let (one, two) = (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let mut ann = one.connect("ann").await;
    let joined = ann.join(&lobby).await.unwrap();
    for i in 1..=10 {
        assert_eq!(say(&mut ann, &lobby, &i.to_string()).await.seq, i);
        // The other node subscribes to the room only now, so it reads earlier entries from the log.
        let since = skein_protocol::position::Position::new(joined.epoch.clone(), i / 2);
        let mut bob = two.connect("bob").await;
        let join =
            frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&lobby) };
        let joined = bob.join_with(&join).await.unwrap();
        assert!(joined.recovered && joined.epoch == since.epoch, "{joined:?}");
        // Entries that this node has not received yet arrive live.
        let mut got = joined.history.len() as u64;
        while got < i - i / 2 {
            assert_eq!(next_message(&mut bob).await.seq, i / 2 + got + 1);
            got += 1;
        }
    }
}

#[tokio::test]
async fn the_chat_page_of_a_cluster_warns_of_anonymous_mode() {
    let redis = Redis::start().await;
    let cluster = Gateway::start_on(&redis, &[]).await;
    let alone = Gateway::start(&[]).await;
    let warned = |body: &str| body.contains("GATEWAY__AUTH__MODE=jwt");
    assert!(warned(&crate::harness::get(cluster.address, "/").await.body));
    assert!(!warned(&crate::harness::get(alone.address, "/").await.body));
}
