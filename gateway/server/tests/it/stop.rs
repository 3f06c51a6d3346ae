//! An orderly stop: queued frames are sent, clients are sent elsewhere, and the process exits with
//! 0.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    options::ConnectOptions,
};
use skein_protocol::protocol::server_frame::{ReconnectFrame, ReconnectReason, ServerFrame};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use crate::harness::{
    Gateway, Http, Node, Redis, closed, connect, gateway_binary, get, http_raw, poll_pause, room,
    until, within,
};

#[tokio::test]
async fn sigterm_sends_clients_elsewhere_and_exits_with_0() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[("drain.delay", "2s")]).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    node.process.signal("TERM");
    until("not ready", async || get(node.address, "/ready").await.status == 503).await;
    let ready = get(node.address, "/ready").await;
    assert_eq!(ready.body, r#"{"failing":["drain"],"status":"unavailable"}"#);
    let late = ConnectOptions::new(format!("ws://{}/ws", node.address));
    let refused = ClientConnection::open(&late).await;
    assert!(refused.is_err(), "a new client was taken");
    // Connected clients are served until the end, and get a `reconnect`.
    crate::harness::say(&mut ann, &lobby, "still here").await;
    let mut reconnect = None;
    let end = loop {
        match within(ann.next()).await {
            Ok(ReceivedMessage::Frame(ServerFrame::Reconnect(frame), _)) => reconnect = Some(frame),
            Ok(_) => {}
            Err(end) => break end,
        }
    };
    assert_eq!(reconnect.unwrap().reason, ReconnectReason::Draining);
    assert_eq!(end.code, Some(1012));
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test]
async fn messages_sent_before_sigterm_are_acknowledged() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[]).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    for i in 0..50 {
        let content = i.into();
        let frame = skein_client::frames::OutgoingMessage::text(&lobby, &content);
        ann.send_json(&frame).await.unwrap();
    }
    // The first ack shows that the burst was read.
    while !matches!(ann.next_frame().await.unwrap(), ServerFrame::Ack(_)) {}
    node.process.signal("TERM");
    let mut acks = 1;
    while let Ok(received) = within(ann.next()).await {
        acks += usize::from(matches!(received, ReceivedMessage::Frame(ServerFrame::Ack(_), _)));
    }
    assert_eq!(acks, 50);
    assert_eq!(node.end().await.0, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_the_process_at_once() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[("drain.delay", "10m")]).await;
    let mut ann = connect(node.address, "ann").await;
    node.process.signal("TERM");
    until("not ready", async || get(node.address, "/ready").await.status == 503).await;
    node.process.signal("TERM");
    assert_eq!(node.end().await.0, Some(0));
    assert_eq!(closed(&mut ann).await.0, None);
}

#[tokio::test]
async fn a_hung_redis_does_not_block_shutdown() {
    let redis = Redis::start().await;
    let node = Node::start(&redis, None, &[]).await;
    let mut ann = connect(node.address, "ann").await;
    redis.signal("STOP");
    for i in 0..20 {
        let room = room(&format!("r{i}"));
        ann.send_json(&skein_client::frames::OutgoingJoin::new(&room)).await.unwrap();
    }
    node.process.signal("TERM");
    let begun = Instant::now();
    assert_eq!(closed(&mut ann).await.0, Some(1012));
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}: {said}", begun.elapsed());
}

const HANDSHAKE: &str = "GET /ws?user=ann HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\
     Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// A connection on which one request was answered.
async fn keep_alive(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let head = ask(&mut socket, "GET /health").await;
    assert!(!head.to_lowercase().contains("connection: close"), "{head}");
    socket
}

/// Sends a request and reads the first part of its response.
async fn ask(socket: &mut TcpStream, start: &str) -> String {
    socket.write_all(format!("{start} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = [0; 4096];
    let count = within(socket.read(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer[..count]).into_owned()
}

#[track_caller]
fn assert_sent_elsewhere(answer: &Http) {
    assert_eq!((answer.status, answer.header("connection")), (503, Some("close")), "{answer:?}");
    let seconds: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=3).contains(&seconds), "{answer:?}");
}

#[tokio::test]
async fn a_draining_node_answers_503_until_the_process_ends() {
    let node = Node::start_alone(&[]).await;
    let (address, admin) = (node.address, node.admin);
    let mut busy = keep_alive(address).await;
    let mut idle = keep_alive(address).await;
    // This client never answers the close frame, so that the drain waits for it.
    let mut silent = TcpStream::connect(address).await.unwrap();
    silent.write_all(HANDSHAKE.as_bytes()).await.unwrap();
    assert!(within(silent.read(&mut [0; 4096])).await.unwrap() > 0);

    node.process.signal("TERM");
    until("clients are rejected", async || get(address, "/chat").await.status == 503).await;
    let body = "x".repeat(100_000);
    let post = format!(
        "POST /api/v1/publish HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    for answer in [
        get(address, "/chat").await,
        get(address, "/api/v1/rooms").await,
        http_raw(address, &post).await,
        http_raw(address, HANDSHAKE).await,
        http_raw(address, &HANDSHAKE.replace("/ws", "/ws/rooms/lobby")).await,
        http_raw(address, &HANDSHAKE.replace("/ws", "/ws/echo")).await,
    ] {
        assert_sent_elsewhere(&answer);
    }
    for (address, path, status) in
        [(address, "/health", 200), (address, "/ready", 503), (admin, "/metrics", 200)]
    {
        let answer = get(address, path).await;
        assert_eq!((answer.status, answer.header("connection")), (status, Some("close")), "{path}");
    }
    // Earlier connections are served once more, with `Connection: close`.
    let head = ask(&mut busy, "GET /chat").await.to_lowercase();
    assert!(head.starts_with("http/1.1 200") && head.contains("connection: close"), "{head}");

    let ended = tokio::spawn(node.end());
    let mut silent = Some(silent);
    while let Ok(mut socket) = TcpStream::connect(address).await {
        let _ = socket.write_all(b"GET /chat HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let is_answered = socket.read(&mut [0; 64]).await.is_ok_and(|count| count > 0);
        // From the end of the last client on the process may end at any time.
        assert!(is_answered || silent.is_none(), "the port was closed before the drain had ended");
        silent = None;
        poll_pause().await;
    }
    assert!(silent.is_none(), "the port was closed before the drain had ended");
    let (code, said) = ended.await.unwrap();
    assert_eq!(code, Some(0), "{said}");
    // An idle connection ends with a FIN, not with an RST.
    assert_eq!(within(idle.read(&mut [0; 64])).await.unwrap(), 0);
}

/// The `reconnect` frame to one client, and its time.
async fn reconnect_frame(
    mut client: ClientConnection,
    since: Instant,
) -> (Duration, ReconnectFrame) {
    let mut told = None;
    while let Ok(received) = within(client.next()).await {
        if let ReceivedMessage::Frame(ServerFrame::Reconnect(frame), _) = received {
            told = Some((since.elapsed(), frame));
        }
    }
    told.expect("no reconnect frame")
}

#[tokio::test]
async fn clients_drain_no_faster_than_other_nodes_accept() {
    // 10 a second: half of what a node accepts.
    let gateway = Gateway::start(&[("limits.accepts_per_second", "20")]).await;
    let client = async |i| gateway.connect(&format!("u{i}")).await;
    let clients = join_all((0..10).map(client)).await;
    let begun = Instant::now();
    let left = join_all(clients.into_iter().map(|client| reconnect_frame(client, begun)));
    let (left, ()) = tokio::join!(left, gateway.stop());
    let tenths: BTreeSet<_> = left.iter().map(|(at, _)| at.as_millis() / 100).collect();
    let last = left.iter().map(|(at, _)| *at).max().unwrap();
    assert!(tenths.len() >= 4 && last > Duration::from_millis(300), "{left:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let waits: BTreeSet<_> = left.iter().map(|(_, frame)| frame.after_ms).collect();
    assert!(waits.len() > 1 && waits.iter().all(|wait| *wait < 1000), "{left:?}");
}

#[tokio::test]
async fn every_terminating_signal_drains_the_node() {
    let stop = async |signal: &str| {
        let node = Node::start_alone(&[]).await;
        let mut clients = Vec::new();
        for i in 0..10 {
            clients.push(connect(node.address, &format!("u{i}")).await);
        }
        // These signals have no effect.
        node.process.signal("USR1");
        node.process.signal("USR2");
        assert_eq!(get(node.address, "/ready").await.status, 200);
        let begun = Instant::now();
        node.process.signal(signal);
        for mut client in clients {
            assert_eq!(closed(&mut client).await.0, Some(1012), "{signal}");
        }
        let (code, said) = node.end().await;
        assert_eq!(code, Some(0), "{signal}: {said}");
        assert!(said.contains(&format!("SIG{signal}")), "{said}");
        // Ten clients are not spread over the whole window.
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    };
    tokio::join!(stop("TERM"), stop("INT"), stop("QUIT"));
}

#[tokio::test]
async fn a_node_under_nohup_outlives_its_terminal() {
    let node = Node::start_ignoring("HUP", &[]).await;
    node.process.signal("HUP");
    // A signal is handled before a later one.
    node.process.signal("TERM");
    let (code, said) = node.end().await;
    assert_eq!(code, Some(0));
    assert!(said.contains("SIGTERM") && said.contains("configuration reloaded"), "{said}");
}

#[tokio::test]
async fn the_health_check_uses_the_configured_admin_listener() {
    let node = Node::start_alone(&[("admin.listen", "127.0.0.2:0")]).await;
    let check = async |admin: SocketAddr| {
        let mut command = tokio::process::Command::new(gateway_binary());
        command.arg("--health-check").arg("--set").arg(format!("admin.listen={admin}"));
        let output = within(command.output()).await.unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    assert_eq!(check(node.admin).await, (Some(0), String::new()));
    // The port of a socket that does not listen refuses connections, and no other test gets it.
    let unused = TcpSocket::new_v4().unwrap();
    unused.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let (code, told) = check(unused.local_addr().unwrap()).await;
    assert!(code == Some(1) && told.contains("not ready: 127.0.0.1:"), "{code:?} {told}");
}
