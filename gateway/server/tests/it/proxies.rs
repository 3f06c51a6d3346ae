//! Gateways behind HAProxy, Caddy and Envoy with TLS, as `deploy/proxies/render.sh` configures
//! them: new clients reach every node, returning ones are sticky, an unavailable node is passed
//! over, and the gateway sees the address of the client.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use skein_client::{
    connection::ClientConnection,
    options::{ConnectError, ConnectOptions},
};
use skein_protocol::protocol::server_frame::ServerFrame;
use skein_testkit::servers::ServerProcess;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    process::Command,
};

use crate::{
    api_clients::tool,
    harness::{Node, Redis, closed, free_port, get, next_message, poll_pause, room, say},
    harness::{self_signed, until, within},
};

/// A proxy program and how it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProxyKind {
    Haproxy,
    Caddy,
    Envoy,
}

impl ProxyKind {
    /// The name for `render.sh`.
    fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
            Self::Envoy => "envoy",
        }
    }

    fn command(self, file: &Path, folder: &Path) -> Command {
        let mut command = match self {
            Self::Haproxy => {
                // Debian installs it in a directory that only root's PATH has.
                let mut command = Command::new("/usr/sbin/haproxy");
                command.arg("-f").arg(file);
                command
            }
            Self::Caddy => {
                let mut command = Command::new("caddy");
                command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
                command
                    .env("HOME", folder)
                    .env_remove("XDG_CONFIG_HOME")
                    .env_remove("XDG_DATA_HOME");
                command
            }
            Self::Envoy => {
                let python = tool("stack-tools-1/lib");
                let version = std::fs::read_dir(python).unwrap().next().unwrap().unwrap().path();
                let mut command = Command::new(version.join("site-packages/envoy/_bin/envoy"));
                command.args(["--concurrency", "1", "--use-dynamic-base-id", "-l", "warn", "-c"]);
                command.arg(file);
                command
            }
        };
        command.current_dir(folder);
        command
    }
}

/// A running proxy.
struct RunningProxy {
    _process: ServerProcess,
    _folder: TempDir,
    address: SocketAddr,
    cert: PathBuf,
}

impl RunningProxy {
    async fn start(kind: ProxyKind, nodes: &[SocketAddr], with_tls: bool) -> Self {
        let folder = TempDir::new().unwrap();
        let (cert, key) = self_signed(folder.path());
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let render = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/proxies/render.sh");
        let mut rendering = Command::new(render);
        rendering.args([kind.name(), "--listen", &address.to_string()]);
        if with_tls {
            rendering.args(["--cert", &cert, "--key", &key]);
        }
        for node in nodes {
            rendering.args(["--node", &node.to_string()]);
        }
        let rendered = within(rendering.output()).await.unwrap();
        assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
        let file = folder.path().join("proxy.yaml");
        std::fs::write(&file, rendered.stdout).unwrap();
        let command = kind.command(&file, folder.path());
        let mut process = ServerProcess::start(kind.name().to_owned(), command, folder.path())
            .unwrap_or_else(|error| panic!("`make setup` installs it: {error}"));
        let log = process.log().to_owned();
        until("the proxy listens", async || {
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(!process.has_ended(), "{kind:?}: {}", said());
            tokio::net::TcpStream::connect(address).await.is_ok()
        })
        .await;
        Self { _process: process, _folder: folder, address, cert: cert.into() }
    }
}

struct ProxiedCluster {
    nodes: Vec<Node>,
    proxy: RunningProxy,
    tls: Arc<rustls::ClientConfig>,
    _redis: Redis,
}

/// A client behind the proxy, and its node.
struct ProxiedClient {
    connection: ClientConnection,
    node: String,
    route: String,
}

impl ProxiedCluster {
    async fn start(kind: ProxyKind) -> Self {
        let redis = Redis::start().await;
        let mut nodes = vec![];
        for id in ["n0", "n1", "n2"] {
            let trusted = ("server.trusted_proxies", "127.0.0.1/32");
            nodes.push(Node::start(&redis, None, &[("node.id", id), trusted]).await);
        }
        let addresses: Vec<SocketAddr> = nodes.iter().map(|node| node.address).collect();
        for address in &addresses {
            until("every node is ready", async || get(*address, "/ready").await.status == 200)
                .await;
        }
        let proxy = RunningProxy::start(kind, &addresses, true).await;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&proxy.cert).unwrap()).unwrap();
        let tls = rustls::ClientConfig::builder().with_root_certificates(roots);
        let cluster =
            Self { nodes, proxy, tls: Arc::new(tls.with_no_client_auth()), _redis: redis };
        // The proxy's own health checks must have found the nodes.
        until("clients reach every node", async || {
            let mut reached = std::collections::HashSet::new();
            for _ in 0..6 {
                if let Ok(client) = cluster.try_connect(|_| {}).await {
                    reached.insert(client.node);
                }
            }
            reached.len() == 3
        })
        .await;
        cluster
    }

    async fn try_connect(
        &self,
        change: impl Fn(&mut ConnectOptions),
    ) -> Result<ProxiedClient, ConnectError> {
        let mut options = ConnectOptions::new(format!("wss://{}/ws", self.proxy.address));
        options.tls = Some(self.tls.clone());
        change(&mut options);
        let mut connection = ClientConnection::open(&options).await?;
        let connected = connection.expect_connected().await.unwrap();
        let node = connected.node.to_string();
        Ok(ProxiedClient { connection, node, route: connected.route })
    }

    async fn connect(&self, change: impl Fn(&mut ConnectOptions)) -> ProxiedClient {
        within(self.try_connect(change)).await.unwrap()
    }

    /// A new client on the node with this id.
    async fn client_on(&self, node: &str) -> ProxiedClient {
        loop {
            let client = self.connect(|_| {}).await;
            if client.node == node {
                return client;
            }
            poll_pause().await;
        }
    }
}

fn with_cookie(route: &str) -> impl Fn(&mut ConnectOptions) {
    move |options| options.headers.push(("Cookie".into(), format!("a=b; gw_node={route}; c=d")))
}

fn with_query(route: &str) -> impl Fn(&mut ConnectOptions) {
    move |options| options.node = Some(route.to_owned())
}

async fn check(kind: ProxyKind) {
    let mut cluster = ProxiedCluster::start(kind).await;
    let mut a = within(cluster.client_on("n0")).await;
    let mut b = within(cluster.client_on("n1")).await;
    let mut c = within(cluster.client_on("n2")).await;

    // A message from one node's client to another's.
    let lobby = room("lobby");
    a.connection.join(&lobby).await.unwrap();
    b.connection.join(&lobby).await.unwrap();
    say(&mut a.connection, &lobby, "through the proxy").await;
    assert_eq!(next_message(&mut b.connection).await.content, "through the proxy");

    // Returning clients.
    for client in [&a, &b, &c] {
        for _ in 0..2 {
            let by_cookie = cluster.connect(with_cookie(&client.route)).await;
            let by_query = cluster.connect(with_query(&client.route)).await;
            assert_eq!((&by_cookie.node, &by_query.node), (&client.node, &client.node));
        }
        let both = |options: &mut ConnectOptions| {
            with_cookie(&a.route)(options);
            with_query(&client.route)(options);
        };
        assert_eq!(cluster.connect(both).await.node, client.node);
    }
    for hostile in ["any", "127.0.0.1:1", "../", "%0d%0aX: y", "$host", &"x".repeat(500)] {
        cluster.connect(with_query(hostile)).await;
    }

    // A killed node's clients move, and nobody else's.
    cluster.nodes[1].process.kill().await;
    within(async { while b.connection.next().await.is_ok() {} }).await;
    for change in [&with_cookie(&b.route) as &dyn Fn(&mut ConnectOptions), &with_query(&b.route)] {
        let elsewhere = within(async {
            loop {
                // A proxy that repeats no handshake answers 502 until its health check has failed.
                match cluster.try_connect(change).await {
                    Ok(client) => return client,
                    Err(ConnectError::Http { status: 502..=504, .. }) => poll_pause().await,
                    Err(error) => panic!("{error:?}"),
                }
            }
        })
        .await;
        assert_ne!(elsewhere.node, "n1");
    }
    let other = room("other");
    c.connection.join(&other).await.unwrap();
    say(&mut c.connection, &other, "still here").await;

    // A draining node gets nobody, and sends its clients away itself.
    cluster.nodes[2].process.signal("TERM");
    let (code, _) = closed(&mut c.connection).await;
    assert_eq!(code, Some(1012));
    until("its clients reach the last node", async || {
        cluster.try_connect(with_query(&c.route)).await.is_ok_and(|client| client.node == "n0")
    })
    .await;
    // The first client never noticed.
    assert!(matches!(
        a.connection.request(&skein_client::frames::OutgoingPing::default()).await.unwrap(),
        ServerFrame::Pong(_)
    ));
}

#[tokio::test]
async fn haproxy_spreads_sticks_and_fails_over() {
    Box::pin(check(ProxyKind::Haproxy)).await;
}

#[tokio::test]
async fn caddy_spreads_sticks_and_fails_over() {
    Box::pin(check(ProxyKind::Caddy)).await;
}

#[tokio::test]
async fn envoy_spreads_sticks_and_fails_over() {
    Box::pin(check(ProxyKind::Envoy)).await;
}

/// A node that accepts any request and returns its head as the body.
async fn start_mirror() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match socket.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => return,
                    }
                }
                let head = String::from_utf8_lossy(&head);
                let response = format!(
                    "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{head}",
                    head.len()
                );
                let _ = socket.write_all(response.as_bytes()).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn proxies_replace_the_address_and_hide_the_metrics() {
    let mirror = start_mirror().await;
    for kind in [ProxyKind::Haproxy, ProxyKind::Caddy, ProxyKind::Envoy] {
        let proxy = RunningProxy::start(kind, &[mirror], false).await;
        let request = format!(
            "GET /api/v1/x?node=y HTTP/1.1\r\nHost: {}\r\nX-Forwarded-For: 198.51.100.9\r\n\
             Forwarded: for=198.51.100.9\r\nConnection: close\r\n\r\n",
            proxy.address
        );
        let mut seen = String::new();
        until("the node is found", async || {
            let response = crate::harness::http_raw(proxy.address, &request).await;
            seen = response.body.to_lowercase();
            response.status == 200
        })
        .await;
        let lines = |name: &str| -> Vec<String> {
            let value = |line: &str| Some(line.strip_prefix(name)?.trim().to_owned());
            seen.lines().filter_map(value).collect()
        };
        let addresses = lines("x-forwarded-for:");
        assert_eq!(addresses.len(), 1, "{kind:?}: {seen}");
        // In place of loopback Envoy names an address of the machine.
        let is_forged = addresses[0].contains("198.51.100.9");
        let is_own = kind == ProxyKind::Envoy && !is_forged && !addresses[0].contains(',');
        assert!(is_own || addresses[0] == "127.0.0.1", "{kind:?}: {seen}");
        assert_eq!(lines("forwarded:"), [""; 0], "{kind:?}: {seen}");
        // With its port, so that a page from the proxy's address has the gateway's own origin.
        assert_eq!(lines("host:"), [proxy.address.to_string()], "{kind:?}: {seen}");
        assert_eq!(lines("x-request-id:").len(), 1, "{kind:?}: {seen}");
        assert!(seen.starts_with("get /api/v1/x?node=y "), "{kind:?}: {seen}");
        assert_eq!(get(proxy.address, "/metrics").await.status, 404, "{kind:?}");
    }
}

#[tokio::test]
async fn traefik_files_are_rendered_for_every_node() {
    let render = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/proxies/render.sh");
    let render = async |arguments: &[&str]| {
        let output = within(Command::new(render).args(arguments).output()).await.unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let nodes = ["--listen", "127.0.0.1:80", "--node", "10.0.0.1:8080", "--node", "10.0.0.2:8080"];
    let (code, text) = render(&[&["traefik"], &nodes[..]].concat()).await;
    assert_eq!((code, text.matches("url: http://10.0.0.1:8080").count()), (Some(0), 2), "{text}");
    let (code, text) = render(&[&["traefik-static"], &nodes[..]].concat()).await;
    assert_eq!(code, Some(0));
    assert!(text.contains("address: 127.0.0.1:80"), "{text}");
    for bad in [
        &["haproxy"][..],
        &["varnish", "--listen", "127.0.0.1:80", "--node", "10.0.0.1:1"],
        &["envoy", "--listen", "127.0.0.1:80", "--node", "host:80"],
        &["caddy", "--listen", "127.0.0.1:80", "--node", "10.0.0.1:1", "--cert", "a b"],
    ] {
        assert_eq!(render(bad).await.0, Some(2), "{bad:?}");
    }
}
