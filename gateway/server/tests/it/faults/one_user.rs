//! State of one user while nodes, links and Redis fail: control commands reach nodes that were cut
//! off, directs and notifications arrive once on every device.

use std::collections::BTreeMap;

use serde_json::json;
use skein_client::{
    Client,
    api::{ClientEvent, ClientOptions},
    connection::{ClientConnection, ReceivedMessage, RequestError},
    options::ConnectOptions,
};
use skein_protocol::{ids::MessageId, protocol::server_frame::ServerFrame};
use tokio::sync::mpsc;

use super::{
    proxy::{Mode, Proxy},
    ready, until_ready,
};
use crate::{
    api::{KEY, call_as},
    harness::{Gateway, Node, Redis, closed, connect, until, within},
};

const API: (&str, &str) = ("api.keys", "test:a key of sixteen and more");

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_off_node_applies_a_late_command_to_old_devices_only() {
    let redis = Redis::start().await;
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let nodes = [
        Gateway::start_on(&redis, &[API]).await,
        Gateway::start_on(&redis, &[API]).await,
        Gateway::start_on(&redis, &[API, ("cluster.redis_url", &url)]).await,
    ];
    let mut devices = Vec::new();
    for node in &nodes {
        devices.push(node.connect("ann").await);
    }
    let disconnect = "POST /api/v1/users/ann/disconnect";
    // Every node must be known before one is cut off.
    until("all nodes take orders", async || {
        let nobody = "POST /api/v1/users/nobody/disconnect";
        call_as(Some(KEY), nodes[0].address, nobody, None).await.body
            == r#"{"applied":3,"nodes":3}"#
    })
    .await;
    proxy.set(Mode::Cut);
    let outcome = call_as(Some(KEY), nodes[0].address, disconnect, None).await;
    assert_eq!((outcome.status, &*outcome.body), (200, r#"{"applied":2,"nodes":3}"#));
    for device in &mut devices[..2] {
        assert_eq!(closed(device).await, (Some(1008), "kicked".into()));
    }
    proxy.set(Mode::Open);
    // The user may have reconnected before the command arrives.
    let options = ConnectOptions::new(nodes[2].url("/ws")).user("ann");
    let mut back = loop {
        if let Ok(mut connection) = ClientConnection::open(&options).await
            && connection.expect_connected().await.is_ok()
        {
            break connection;
        }
        crate::harness::poll_pause().await;
    };
    assert_eq!(closed(&mut devices[2]).await, (Some(1008), "kicked".into()));
    until("the order was applied everywhere", async || {
        let nobody = "POST /api/v1/users/nobody/disconnect";
        call_as(Some(KEY), nodes[0].address, nobody, None).await.body
            == r#"{"applied":3,"nodes":3}"#
    })
    .await;
    back.request(&json!({"type": "ping"})).await.unwrap();
}

/// A device that reconnects by itself, and counts its entries.
struct CountingDevice {
    events: mpsc::Receiver<ClientEvent>,
    _client: Client,
    got: BTreeMap<MessageId, usize>,
}

impl CountingDevice {
    fn start(nodes: &[Node], first: usize) -> Self {
        let mut urls: Vec<String> =
            nodes.iter().map(|node| format!("ws://{}/ws", node.address)).collect();
        urls.rotate_left(first);
        let settings = ClientOptions { urls: urls.clone(), ..ClientOptions::default() };
        let (client, events) =
            Client::start(ConnectOptions::new(urls[0].clone()).user("bob"), settings);
        Self { events, _client: client, got: BTreeMap::new() }
    }

    /// Reads until an entry of each of `ids` has arrived.
    async fn gets(&mut self, ids: &[MessageId]) {
        within(async {
            while !ids.iter().all(|id| self.got.contains_key(id)) {
                let id = match self.events.recv().await.unwrap() {
                    ClientEvent::Direct { direct, .. } => direct.id,
                    ClientEvent::Notification(notification) => notification.id,
                    _ => continue,
                };
                *self.got.entry(id).or_default() += 1;
            }
        })
        .await;
    }
}

/// Sends a direct until it is acknowledged, through any node that accepts it.
async fn direct(nodes: &[Node], connection: &mut Option<ClientConnection>, id: MessageId) {
    let frame = json!({"type": "direct", "to": "bob", "content": "x", "id": id});
    within(async {
        loop {
            let Some(open) = connection else {
                for node in nodes {
                    let options =
                        ConnectOptions::new(format!("ws://{}/ws", node.address)).user("ann");
                    if let Ok(mut opened) = ClientConnection::open(&options).await
                        && opened.expect_connected().await.is_ok()
                    {
                        *connection = Some(opened);
                        break;
                    }
                }
                crate::harness::poll_pause().await;
                continue;
            };
            match open.request(&frame).await {
                Ok(ServerFrame::Ack(_)) => return,
                Err(RequestError::Rejected(_)) => crate::harness::poll_pause().await,
                _ => *connection = None,
            }
        }
    })
    .await;
}

/// Sends a notification until the API accepts it.
async fn notify(node: &Node, id: MessageId) {
    let body = json!({"payload": "x", "id": id});
    until("a notification is taken", async || {
        let call = "POST /api/v1/users/bob/notifications";
        matches!(call_as(Some(KEY), node.address, call, Some(body.clone())).await.status, 200 | 201)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inbox_entries_arrive_once_per_device_across_restarts() {
    let mut redis = Redis::start_durable().await;
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(Node::start(&redis, None, &[API]).await);
    }
    until_ready(&nodes).await;
    let mut devices = [CountingDevice::start(&nodes, 0), CountingDevice::start(&nodes, 1)];
    let (mut ann, mut sent) = (None, Vec::new());
    for n in 0..60 {
        if n == 20 {
            // The node of the first device.
            nodes[0].process.kill().await;
        }
        if n == 40 {
            redis.kill().await;
            redis.restart().await;
        }
        let id = MessageId::random();
        if n % 2 == 0 {
            direct(&nodes[1..], &mut ann, id).await;
        } else {
            notify(&nodes[2], id).await;
        }
        sent.push(id);
    }
    for device in &mut devices {
        device.gets(&sent).await;
        let again: Vec<_> = device.got.iter().filter(|(_, count)| **count != 1).collect();
        assert!(again.is_empty(), "came more than once: {again:?}");
    }
    until("all is acknowledged", async || {
        let mut third = connect(nodes[1].address, "cat").await;
        third.request(&json!({"type": "ping"})).await.unwrap();
        let mut fresh = ClientConnection::open(
            &ConnectOptions::new(format!("ws://{}/ws", nodes[2].address)).user("bob"),
        )
        .await
        .unwrap();
        let inbox = fresh.expect_connected().await.unwrap().inbox;
        assert_eq!(inbox.seq, sent.len() as u64, "no entry twice, none lost");
        inbox.unread == 0
    })
    .await;
    assert!(ready(nodes[1].address).await);
    // A direct is unread for an offline receiver, and never for its sender.
    let mut bob = connect(nodes[1].address, "bob").await;
    bob.request(&json!({"type": "direct", "to": "dan", "content": "x"})).await.unwrap();
    let dan = ConnectOptions::new(format!("ws://{}/ws", nodes[2].address)).user("dan");
    let mut dan = ClientConnection::open(&dan).await.unwrap();
    assert_eq!(dan.expect_connected().await.unwrap().inbox.unread, 1);
    let first = within(dan.next()).await.unwrap();
    assert!(matches!(first, ReceivedMessage::Frame(ServerFrame::Direct(_), _)), "{first:?}");
}
