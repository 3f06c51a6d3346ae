//! Hostile peers before authentication: slow headers, many silent sockets, endless requests, and a
//! gateway that has run out of descriptors.

use std::time::Duration;

use skein_client::{connection::ClientConnection, options::ConnectOptions};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpSocket, TcpStream},
    time::Instant,
};

use crate::harness::{Gateway, Node, connect, get, http_raw, poll_pause, room, say, until, within};

/// The time limit of a header, and slack for a busy machine.
const HEADER_MAX: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(8);

async fn dial_from(gateway: &Gateway, host: u8) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, host], 0).into()).unwrap();
    socket.connect(gateway.address).await.unwrap()
}

/// The time until the gateway closes the connection.
async fn time_until_closed(mut socket: TcpStream) -> Duration {
    use tokio::io::AsyncReadExt as _;
    let begun = Instant::now();
    let mut answer = Vec::new();
    let _ = within(socket.read_to_end(&mut answer)).await;
    begun.elapsed()
}

#[tokio::test]
async fn a_header_must_arrive_within_10_s() {
    let gateway = Gateway::start(&[]).await;
    let silent = time_until_closed(TcpStream::connect(gateway.address).await.unwrap());
    let mut half = TcpStream::connect(gateway.address).await.unwrap();
    half.write_all(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgr").await.unwrap();
    // Byte by byte, each in time for a timeout that restarted with every byte.
    let (mut slow, begun) = (TcpStream::connect(gateway.address).await.unwrap(), Instant::now());
    let drip = async {
        slow.write_all(b"GET /ws HTTP/1.1\r\nHost: x\r\nX-Slow: ").await.unwrap();
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        while slow.write_all(b"x").await.is_ok() {
            ticks.tick().await;
        }
        begun.elapsed()
    };
    // An answered request does not extend the time limit.
    let mut second = TcpStream::connect(gateway.address).await.unwrap();
    second.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea").await.unwrap();
    let all = within(async {
        tokio::join!(silent, time_until_closed(half), drip, time_until_closed(second))
    })
    .await;
    for (what, took) in [("silent", all.0), ("half", all.1), ("slow", all.2), ("second", all.3)] {
        assert!(took > HEADER_MAX / 2 && took < HEADER_MAX + SLACK, "{what}: {took:?}");
    }
}

#[tokio::test]
async fn a_header_sent_byte_by_byte_is_accepted() {
    let gateway = Gateway::start(&[]).await;
    for end in ["\r\n\r\n", "\n\n"] {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let head = "\r\nGET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
        for byte in head.bytes().chain(end.bytes()) {
            socket.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut answer = [0; 12];
        within(tokio::io::AsyncReadExt::read_exact(&mut socket, &mut answer)).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 101", "{end:?}");
    }
}

#[tokio::test]
async fn frames_sent_with_a_large_header_are_read() {
    use crate::soak::raw_client::{join_frame, message_frame};
    let gateway = Gateway::start(&[]).await;
    let mut request = format!(
        "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         X-Long: {}\r\n\r\n",
        "x".repeat(9_000)
    )
    .into_bytes();
    request.extend(join_frame("lobby"));
    for i in 0..50 {
        request.extend(message_frame("lobby", &format!("{i:0>200}")));
    }
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    socket.write_all(&request).await.unwrap();
    let (mut said, mut buffer) = (String::new(), [0; 4096]);
    while said.matches(r#""type":"ack""#).count() < 50 {
        let read = tokio::io::AsyncReadExt::read(&mut socket, &mut buffer);
        let count = within(read).await.unwrap();
        assert!(count > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

#[tokio::test]
async fn invalid_and_oversized_requests_are_rejected_at_once() {
    let gateway = Gateway::start(&[]).await;
    let headers = |count| "X-A: b\r\n".repeat(count);
    let get = |headers: &str| format!("GET /ws HTTP/1.1\r\nHost: x\r\n{headers}\r\n");
    let long = get(&format!("X-Long: {}\r\n", "x".repeat(17 * 1024)));
    let endless = format!("GET /ws HTTP/1.1\r\nX-Long: {}", "x".repeat(17 * 1024));
    let path = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "p".repeat(20_000));
    for (request, status) in [
        (long.as_str(), 431),
        (&endless, 431),
        (&path, 431),
        (&get(&headers(101)), 431),
        (&get("Bad Name: x\r\n"), 400),
        (&get("X-A: b\0\r\n"), 400),
        ("GET /ws HTTP/9.9\r\nHost: x\r\n\r\n", 400),
        ("\u{16}\u{3}\u{1}\0", 400),
    ] {
        let begun = Instant::now();
        let answer = http_raw(gateway.address, request).await;
        let shown = &request[..request.len().min(60)];
        assert_eq!(answer.status, status, "{shown:?}: {answer:?}");
        assert!(begun.elapsed() < HEADER_MAX / 2, "{shown:?}: after {:?}", begun.elapsed());
    }
    assert_eq!(crate::harness::get(gateway.address, "/health").await.status, 200);
}

#[tokio::test]
async fn a_missing_request_body_is_not_waited_for() {
    let gateway = Gateway::start(&[]).await;
    for length in ["Content-Length: 1000000", "Transfer-Encoding: chunked"] {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        let request = format!("POST /ws HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        assert!(time_until_closed(socket).await < HEADER_MAX / 2, "{length}");
    }
}

#[tokio::test]
async fn a_peer_that_reads_no_responses_is_dropped() {
    let gateway = Gateway::start(&[]).await;
    let socket = TcpStream::connect(gateway.address).await.unwrap();
    socket.writable().await.unwrap();
    socket.try_write("GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(5_000).as_bytes()).unwrap();
    until("it is dropped", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        metrics.contains(r#"gateway_http_connections_dropped_total{reason="write_timeout"} 1"#)
    })
    .await;
}

#[tokio::test]
async fn silent_connections_of_many_addresses_do_not_block_others() {
    // 520 pending connections in all, 110 per address.
    let gateway =
        Gateway::start(&[("limits.connections_max", "20"), ("limits.connections_per_ip", "10")])
            .await;
    let mut ann = gateway.connect("ann").await;
    let mut silent = vec![];
    for host in 2..22 {
        for i in 0..110 {
            let mut socket = dial_from(&gateway, host).await;
            if i % 2 == 0 {
                let _ = socket.write_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n").await;
            }
            silent.push(socket);
        }
        // A peer that sends a handshake is always accepted.
        let begun = Instant::now();
        let mut bob = gateway.connect("bob").await;
        assert_eq!(bob.close(1000, "").await.code, Some(1000));
        assert!(begun.elapsed() < HEADER_MAX / 2, "bob waited for {:?}", begun.elapsed());
    }
    // An established WebSocket is not evicted.
    let lobby = room("lobby");
    ann.join(&lobby).await.unwrap();
    say(&mut ann, &lobby, "still here").await;
    let metrics = get(gateway.admin, "/metrics").await.body;
    let dropped = r#"gateway_http_connections_dropped_total{reason="evicted"} "#;
    let count = metrics.lines().find_map(|line| line.strip_prefix(dropped)).unwrap();
    assert!(count.parse::<f64>().unwrap() >= 1000.0, "{count} were dropped");
}

#[tokio::test]
async fn a_node_out_of_descriptors_serves_and_later_accepts_again() {
    let limits = [("limits.connections_max", "1000")];
    let node = Node::start_within(100, &limits).await;
    let lobby = room("lobby");
    let mut ann = connect(node.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    let mut others = vec![];
    let options = ConnectOptions::new(format!("ws://{}/ws", node.address));
    let limit = Duration::from_secs(1);
    while let Ok(other) = tokio::time::timeout(limit, ClientConnection::open(&options)).await {
        others.push(other.unwrap());
        assert!(others.len() < 100, "there is no limit");
    }
    assert!(others.len() > 50, "only {} were taken", others.len());
    // No connection is accepted now; existing clients are served, and the accept loop does not
    // spin.
    let used = cpu_ticks(&node);
    let begun = Instant::now();
    let mut waiting = TcpStream::connect(node.address).await.unwrap();
    waiting.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    while begun.elapsed() < Duration::from_secs(2) {
        say(&mut ann, &lobby, "still here").await;
        poll_pause().await;
    }
    let used = cpu_ticks(&node) - used;
    assert!(used < 100, "{used} ticks of 10 ms in 2 s");
    drop(others);
    let mut answer = [0; 12];
    within(tokio::io::AsyncReadExt::read_exact(&mut waiting, &mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    drop(waiting);
    until("others are taken", async || ClientConnection::open(&options).await.is_ok()).await;
    node.process.signal("TERM");
    let (code, said) = node.end().await;
    assert_eq!((code, said.matches("cannot accept").count()), (Some(0), 1), "{said}");
}

/// CPU time of a node, in ticks of 10 ms.
fn cpu_ticks(node: &Node) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.process.pid())).unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
