//! Gateways behind nginx: new clients are spread, returning ones are sticky, and an unavailable
//! node is passed over.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use skein_client::{
    connection::ClientConnection,
    options::{ConnectError, ConnectOptions},
};
use tokio::time::Instant;

use crate::{
    harness::{Gateway, Http, Nginx, Node, Redis, free_port, get, http_raw, until, within},
    sse::SseReader,
};

struct NginxCluster {
    nodes: Vec<Node>,
    nginx: Nginx,
    redis: Redis,
}

/// A client behind nginx, and its node.
struct StickyClient {
    _connection: ClientConnection,
    node: String,
    route: String,
}

impl NginxCluster {
    async fn start() -> Self {
        let redis = Redis::start().await;
        let mut nodes = vec![];
        for id in ["n0", "n1", "n2"] {
            nodes.push(Node::start(&redis, None, &[("node.id", id)]).await);
        }
        let addresses: Vec<SocketAddr> = nodes.iter().map(|node| node.address).collect();
        Self { nodes, nginx: Nginx::start(&addresses).await, redis }
    }

    async fn try_connect(
        &self,
        change: impl Fn(&mut ConnectOptions),
    ) -> Result<StickyClient, ConnectError> {
        let mut options = ConnectOptions::new(format!("ws://{}/ws", self.nginx.address));
        change(&mut options);
        let mut connection = ClientConnection::open(&options).await?;
        let connected = connection.expect_connected().await.unwrap();
        let node = connected.node.to_string();
        Ok(StickyClient { _connection: connection, node, route: connected.route })
    }

    async fn connect(&self, change: impl Fn(&mut ConnectOptions)) -> StickyClient {
        within(self.try_connect(change)).await.unwrap()
    }

    async fn connect_new(&self, count: usize) -> Vec<StickyClient> {
        let mut clients = vec![];
        for _ in 0..count {
            clients.push(self.connect(|_| {}).await);
        }
        clients
    }
}

fn spread(clients: &[StickyClient]) -> HashMap<&str, usize> {
    let mut spread = HashMap::new();
    for client in clients {
        *spread.entry(client.node.as_str()).or_default() += 1;
    }
    spread
}

fn with_cookie(route: &str) -> impl Fn(&mut ConnectOptions) {
    move |options| options.headers.push(("Cookie".into(), format!("gw_node={route}")))
}

fn with_query(route: &str) -> impl Fn(&mut ConnectOptions) {
    move |options| options.node = Some(route.to_owned())
}

#[tokio::test]
async fn new_clients_are_spread_and_returning_ones_are_sticky() {
    let cluster = NginxCluster::start().await;
    let clients = cluster.connect_new(30).await;
    let even: HashMap<_, _> = [("n0", 10), ("n1", 10), ("n2", 10)].into();
    assert_eq!(spread(&clients), even);
    for client in &clients {
        let by_cookie = cluster.connect(with_cookie(&client.route)).await;
        let by_query = cluster.connect(with_query(&client.route)).await;
        assert_eq!((&by_cookie.node, &by_query.node), (&client.node, &client.node));
    }
    // The query outranks the cookie, and a route without a node means a new client.
    let [a, b] = [0, 1].map(|i| clients[i].route.clone());
    let both = |options: &mut ConnectOptions| {
        with_cookie(&a)(options);
        with_query(&b)(options);
    };
    assert_eq!(cluster.connect(both).await.node, clients[1].node);
    for hostile in ["any", "127.0.0.1:1", "../", "%0d%0aX: y", "$host", &"x".repeat(500)] {
        cluster.connect(with_query(hostile)).await;
    }
}

#[tokio::test]
async fn a_killed_nodes_clients_move_in_3_s_and_new_ones_fill_it() {
    let mut cluster = NginxCluster::start().await;
    let clients = cluster.connect_new(30).await;
    let lost: Vec<&StickyClient> = clients.iter().filter(|client| client.node == "n1").collect();
    cluster.nodes[1].process.kill().await;
    let mut slowest = Duration::ZERO;
    for client in &lost {
        for change in [
            &with_cookie(&client.route) as &dyn Fn(&mut ConnectOptions),
            &with_query(&client.route),
        ] {
            let begun = Instant::now();
            assert_ne!(cluster.connect(change).await.node, "n1");
            slowest = slowest.max(begun.elapsed());
        }
    }
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");

    let address = cluster.nodes[1].address;
    let extra = [("node.id", "n1")];
    cluster.nodes[1] = Node::start(&cluster.redis, Some(address), &extra).await;
    let route = &lost[0].route;
    until("the node is found again", async || {
        cluster.connect(with_cookie(route)).await.node == "n1"
    })
    .await;
    let new = cluster.connect_new(10).await;
    assert_eq!(spread(&new), [("n1", 10)].into());
    println!(
        "sticky node killed: elsewhere after at most {slowest:?}; 10 of 10 new to the empty node"
    );
}

#[tokio::test]
async fn a_draining_node_is_passed_over() {
    let cluster = NginxCluster::start().await;
    let clients = cluster.connect_new(3).await;
    let client = clients.iter().find(|client| client.node == "n2").unwrap();
    cluster.nodes[2].process.signal("TERM");
    until("it drains or has exited", async || {
        let Ok(_) = tokio::net::TcpStream::connect(cluster.nodes[2].address).await else {
            return true;
        };
        get(cluster.nodes[2].address, "/ready").await.status != 200
    })
    .await;
    assert_ne!(cluster.connect(with_cookie(&client.route)).await.node, "n2");
    let query = format!("node={}", client.route);
    let mut stream = SseReader::open(cluster.nginx.address, &query, None).await;
    assert_ne!(stream.frame().await["node"], "n2");
}

#[tokio::test]
async fn event_streams_get_a_retry_time_when_no_node_is_up() {
    let nowhere = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let nginx = Nginx::start(&[nowhere]).await;
    let mut stream = SseReader::open(nginx.address, "rooms=a", None).await;
    assert!(stream.head.starts_with("HTTP/1.1 200"), "{}", stream.head);
    assert!(stream.head.contains("text/event-stream"), "{}", stream.head);
    assert_eq!(stream.line().await, "retry: 5000");
}

#[tokio::test]
async fn pages_are_proxied_and_admin_paths_are_not() {
    let cluster = NginxCluster::start().await;
    let nginx = cluster.nginx.address;
    for path in ["/", "/chat", "/health", "/ready"] {
        assert_eq!(get(nginx, path).await.status, 200, "{path}");
    }
    for path in ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/x/../metrics"] {
        assert_eq!(get(nginx, path).await.status, 404, "{path}");
    }
    // Host keeps its port, so a page from nginx's address has the gateway's own origin.
    let handshake = async |origin: String| -> Http {
        let head = format!(
            "GET /ws/rooms/x HTTP/1.1\r\nHost: {nginx}\r\nOrigin: {origin}\r\n\
             Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        http_raw(nginx, &head).await
    };
    assert_eq!(handshake(format!("http://{nginx}")).await.status, 101);
    assert_eq!(handshake("http://evil.example".into()).await.status, 403);
}

#[tokio::test]
async fn nginx_counts_are_on_a_listener_of_their_own() {
    let gateway = Gateway::start(&[]).await;
    let (nginx, status) = Nginx::start_with_status(&[gateway.address]).await;
    let counts = get(status, "/stub_status").await;
    assert!(counts.status == 200 && counts.body.contains("Active connections"), "{counts:?}");
    assert_eq!(get(status, "/ready").await.status, 404);
    assert_eq!(get(nginx.address, "/ready").await.status, 200);
    assert_eq!(get(nginx.address, "/stub_status").await.status, 404);
}
