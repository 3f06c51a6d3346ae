//! Event streams: the frames of a connection, resumed over several rooms and the inbox.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::{
    harness::{Gateway, Http, get, http_raw, room, say, within},
    presence::TestDeployment,
};

/// An open stream.
pub struct SseReader {
    reader: BufReader<TcpStream>,
    pub head: String,
    /// The last event id.
    id: String,
}

impl SseReader {
    pub async fn open(address: SocketAddr, query: &str, last: Option<&str>) -> Self {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let last = last.map(|id| format!("Last-Event-ID: {id}\r\n")).unwrap_or_default();
        let request = format!("GET /sse?{query} HTTP/1.1\r\nHost: {address}\r\n{last}\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut stream =
            Self { reader: BufReader::new(socket), head: String::new(), id: String::new() };
        loop {
            let line = stream.line().await;
            if line.is_empty() {
                return stream;
            }
            stream.head.push_str(&line);
            stream.head.push('\n');
        }
    }

    pub async fn line(&mut self) -> String {
        let mut line = String::new();
        within(self.reader.read_line(&mut line)).await.unwrap();
        line.trim_end().to_owned()
    }

    /// The next frame. Lines with chunk sizes are skipped; no event line looks like one.
    pub async fn frame(&mut self) -> Value {
        let mut data = String::new();
        loop {
            let line = self.line().await;
            if let Some(id) = line.strip_prefix("id: ") {
                self.id = id.to_owned();
            } else if let Some(more) = line.strip_prefix("data:") {
                data += more;
            } else if line.is_empty() && !data.is_empty() {
                return serde_json::from_str(&data).unwrap();
            }
        }
    }

    async fn frame_of(&mut self, kind: &str) -> Value {
        loop {
            let frame = self.frame().await;
            if frame["type"] == kind {
                return frame;
            }
        }
    }
}

#[tokio::test]
async fn a_stream_resumes_its_rooms_and_inbox() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        for name in ["a", "b"] {
            ann.join(&room(name)).await.unwrap();
            say(&mut ann, &room(name), "before").await;
        }
        let address = |node: usize| deployment.nodes[node % deployment.nodes.len()].address;
        let mut stream = SseReader::open(address(1), "rooms=a,b&user=bob", None).await;
        assert!(stream.head.starts_with("HTTP/1.1 200"), "{}", stream.head);
        assert!(stream.head.to_lowercase().contains("content-type: text/event-stream"));
        assert_eq!(stream.frame().await["type"], "connected");
        for _ in 0..2 {
            let joined = stream.frame_of("joined").await;
            assert_eq!(joined["history"][0]["content"], "before");
        }
        say(&mut ann, &room("a"), "one").await;
        assert_eq!(stream.frame_of("message").await["content"], "one");
        ann.request(&json!({"type": "direct", "to": "bob", "content": "for you"})).await.unwrap();
        assert_eq!(stream.frame_of("direct").await["content"], "for you");
        let id = stream.id.clone();
        drop(stream);
        say(&mut ann, &room("b"), "two").await;
        let header = json!({"type": "message", "room": "a"});
        ann.send_binary(&header, &[0, 255]).await.unwrap();
        ann.request(&json!({"type": "direct", "to": "bob", "content": "and more"})).await.unwrap();
        let mut stream = SseReader::open(address(2), "rooms=a,b&user=bob", Some(&id)).await;
        let (mut missed, mut recovered) = (Vec::new(), 0);
        while missed.len() < 3 || recovered < 2 {
            let frame = stream.frame().await;
            match frame["type"].as_str() {
                Some("joined") => {
                    recovered += i32::from(frame["recovered"] == true);
                    missed.extend(frame["history"].as_array().unwrap().iter().cloned());
                }
                Some("message" | "direct") => missed.push(frame),
                Some("connected" | "member_joined" | "member_left") => {}
                other => panic!("{other:?}"),
            }
        }
        let mut said: Vec<String> =
            missed.iter().map(|frame| frame["content"].to_string()).collect();
        said.sort_unstable();
        assert_eq!(said, [r#""AP8=""#, r#""and more""#, r#""two""#]);
        let binary = missed.iter().find(|frame| frame["encoding"] == "base64");
        assert!(binary.is_some());
        // The event id in the query works too, and a binary entry arrives live.
        let again = format!("rooms=a&user=bob&last_event_id={}", stream.id);
        let mut stream = SseReader::open(address(0), &again, None).await;
        stream.frame_of("joined").await;
        ann.send_binary(&header, &[7]).await.unwrap();
        let live = stream.frame_of("message").await;
        assert_eq!((&live["encoding"], &live["content"]), (&json!("base64"), &json!("Bw==")));
    })
    .await;
}

#[tokio::test]
async fn line_breaks_between_json_tokens_do_not_end_an_event() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    ann.join(&room("a")).await.unwrap();
    let mut stream = SseReader::open(gateway.address, "rooms=a", None).await;
    stream.frame_of("joined").await;
    let message = "{\"type\":\"message\",\"room\":\"a\",\"content\":{\"x\":\n\n\r1}}";
    ann.send_text(message).await.unwrap();
    assert_eq!(stream.frame_of("message").await["content"], json!({"x": 1}));
}

#[tokio::test]
async fn a_resumed_stream_ignores_acks_of_other_devices() {
    TestDeployment::each(&[], async |deployment| {
        let address = |node: usize| deployment.nodes[node % deployment.nodes.len()].address;
        let mut ann = deployment.connect(0, "ann").await;
        ann.join(&room("a")).await.unwrap();
        let mut stream = SseReader::open(address(1), "rooms=a&user=bob", None).await;
        stream.frame_of("joined").await;
        // No inbox entry has arrived, but the event id contains the inbox position.
        say(&mut ann, &room("a"), "of the room").await;
        stream.frame_of("message").await;
        let id = stream.id.clone();
        drop(stream);
        ann.request(&json!({"type": "direct", "to": "bob", "content": "missed?"})).await.unwrap();
        let mut phone = deployment.connect(2, "bob").await;
        phone.send_text(r#"{"type":"ack","seq":1}"#).await.unwrap();
        phone.request(&json!({"type": "ping"})).await.unwrap();
        let mut stream = SseReader::open(address(2), "rooms=a&user=bob", Some(&id)).await;
        assert_eq!(stream.frame_of("direct").await["content"], "missed?");
    })
    .await;
}

#[tokio::test]
async fn clients_that_leave_while_a_stream_opens_leak_nothing() {
    let gateway = Gateway::start(&[("presence.grace", "0s")]).await;
    let rooms = (0..20).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",");
    for _ in 0..50 {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        let request =
            format!("GET /sse?rooms={rooms} HTTP/1.1\r\nHost: {}\r\n\r\n", gateway.address);
        socket.write_all(request.as_bytes()).await.unwrap();
    }
    crate::harness::until("no member is left", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let is = |line: &str| metrics.lines().any(|found| found == line);
        is("gateway_members 0") && is("gateway_connections 0")
    })
    .await;
}

#[tokio::test]
async fn permanent_rejections_are_http_statuses() {
    let limits = [("limits.connections_per_user", "1"), ("rooms.create_on_join", "false")];
    let gateway = Gateway::start(&[&crate::auth::JWT[..], &limits].concat()).await;
    let token = crate::auth::token(json!({"sub": "ann", "rooms": {"a*": "r"}}), 60);
    let status = async |query: &str| get(gateway.address, &format!("/sse?{query}")).await.status;
    assert_eq!(status("rooms=a").await, 401);
    assert_eq!(status("rooms=a&token=x").await, 401);
    assert_eq!(status(&format!("rooms=b&token={token}")).await, 403);
    assert_eq!(status(&format!("rooms=a&token={token}")).await, 404);
    assert_eq!(status(&format!("rooms=a%20b&token={token}")).await, 400);
    let many = (0..21).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",");
    assert_eq!(status(&format!("rooms={many}&token={token}")).await, 400);
    let open = SseReader::open(gateway.address, &format!("token={token}"), None).await;
    assert!(open.head.starts_with("HTTP/1.1 200"));
    // A temporary rejection is a stream with a retry time: a browser gives up after any other
    // response.
    let full = get(gateway.address, &format!("/sse?token={token}")).await;
    assert_retry_stream(&full, "limit_reached");
}

#[track_caller]
fn assert_retry_stream(answer: &Http, code: &str) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let wait: u64 =
        answer.body.lines().find_map(|line| line.strip_prefix("retry: ")).unwrap().parse().unwrap();
    assert!((3000..70_000).contains(&wait), "{wait}");
    let frame = answer.body.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
    let frame: Value = serde_json::from_str(frame).unwrap();
    assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!(code)), "{frame}");
    assert_eq!(frame["retry_after_ms"], wait);
}

#[tokio::test]
async fn temporary_rejections_are_streams_with_a_retry_time() {
    let full = Gateway::start(&[("limits.connections_max", "1")]).await;
    let mut ann = full.connect("ann").await;
    ann.request(&json!({"type": "ping"})).await.unwrap();
    assert_retry_stream(&get(full.address, "/sse").await, "unavailable");
    // A proxy that tries the next node gets the status.
    let proxied =
        "GET /sse HTTP/1.1\r\nHost: x\r\nX-Skein-Failover: 503\r\nConnection: close\r\n\r\n";
    let proxied = http_raw(full.address, proxied).await;
    assert!(proxied.status == 503 && proxied.header("retry-after").is_some(), "{proxied:?}");
    let busy = Gateway::start(&[("limits.handshakes_per_minute_per_ip", "1")]).await;
    assert_eq!(get(busy.address, "/sse?rooms=a%20b").await.status, 400);
    assert_retry_stream(&get(busy.address, "/sse").await, "rate_limited");
}

#[tokio::test]
async fn a_stream_of_a_draining_node_gets_a_retry_time() {
    let gateway = Gateway::start(&[("drain.delay", "0s")]).await;
    let mut stream = SseReader::open(gateway.address, "rooms=a", None).await;
    stream.frame_of("joined").await;
    let stopping = gateway.stop();
    let told = async {
        let mut retry = None;
        loop {
            let line = stream.line().await;
            retry = line.strip_prefix("retry: ").map(str::to_owned).or(retry);
            if line.contains(r#""reconnect""#) {
                let frame: Value = serde_json::from_str(&line["data: ".len()..]).unwrap();
                return (retry, frame["after_ms"].as_u64().unwrap());
            }
        }
    };
    let (_, (retry, after_ms)) = tokio::join!(stopping, told);
    assert_eq!(retry.and_then(|retry| retry.parse().ok()), Some(3000 + after_ms));
}

#[tokio::test]
async fn pages_of_allowed_origins_may_read_every_response() {
    let origins = [("server.allowed_origins", "https://app.example")];
    let listed = Gateway::start(&[&crate::auth::JWT[..], &origins].concat()).await;
    let any = [("server.allowed_origins", "*")];
    let any = Gateway::start(&[&crate::auth::JWT[..], &any].concat()).await;
    let ask = async |address: SocketAddr, start: &str, origin: &str| {
        let request = format!(
            "{start} HTTP/1.1\r\nHost: {address}\r\nOrigin: {origin}\r\nContent-Length: 0\r\n\
             Access-Control-Request-Method: GET\r\n\
             Access-Control-Request-Headers: last-event-id,x-y\r\nConnection: close\r\n\r\n"
        );
        let answer = http_raw(address, &request).await;
        assert_eq!(answer.header("vary"), Some("Origin"), "{start}");
        assert_eq!(answer.header("cache-control"), Some("no-store, no-transform"), "{start}");
        answer
    };
    let token = crate::auth::token(json!({"sub": "ann", "rooms": {"a": "r"}}), 60);
    let app = "https://app.example";
    for (start, status) in [
        ("OPTIONS /sse?rooms=a".to_owned(), 204),
        ("GET /sse".to_owned(), 401),
        ("GET /sse?rooms=a%20b".to_owned(), 400),
        (format!("GET /sse?rooms=b&token={token}"), 403),
        ("POST /sse".to_owned(), 405),
        ("HEAD /sse".to_owned(), 405),
    ] {
        let answer = ask(listed.address, &start, app).await;
        assert_eq!(answer.status, status, "{start}: {answer:?}");
        assert_eq!(answer.header("access-control-allow-origin"), Some(app), "{start}");
        assert_eq!(answer.header("access-control-allow-credentials"), Some("true"));
        let evil = ask(listed.address, &start, "https://evil.example").await;
        assert_eq!(evil.header("access-control-allow-origin"), None, "{start}: {evil:?}");
        let anybody = ask(any.address, &start, "https://evil.example").await;
        assert_eq!(anybody.header("access-control-allow-origin"), Some("*"), "{start}");
        assert_eq!(anybody.header("access-control-allow-credentials"), None, "{start}");
    }
    let preflight = ask(listed.address, "OPTIONS /sse", app).await;
    assert_eq!(preflight.header("access-control-allow-headers"), Some("last-event-id,x-y"));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("GET, OPTIONS"));
    let evil = ask(listed.address, "GET /sse", "https://evil.example").await;
    assert_eq!(evil.status, 403);
    let mut open = TcpStream::connect(any.address).await.unwrap();
    let request =
        format!("GET /sse?token={token} HTTP/1.1\r\nHost: x\r\nOrigin: https://a\r\n\r\n");
    open.write_all(request.as_bytes()).await.unwrap();
    let mut head = BufReader::new(open).lines();
    let mut lines = Vec::new();
    while let Some(line) = within(head.next_line()).await.unwrap().filter(|line| !line.is_empty()) {
        lines.push(line.to_lowercase());
    }
    for expected in [
        "http/1.1 200 ok",
        "content-type: text/event-stream",
        "cache-control: no-store, no-transform",
        "x-accel-buffering: no",
        "access-control-allow-origin: *",
    ] {
        assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:?}");
    }
}

/// The history of 20 rooms is 5 MiB, of which an unread stream holds at most one outbox.
#[tokio::test]
async fn an_unread_stream_holds_at_most_one_outbox() {
    const KEY: &str = "a key of the application";
    const OUTBOX: u64 = 64 * 1024;
    let options =
        [("api.keys", "t:a key of the application"), ("limits.outbox_bytes_max", "64KiB")];
    let gateway = Gateway::start(&options).await;
    let content = "x".repeat(5_000);
    let rooms: Vec<String> = (0..20).map(|n| format!("r{n:02}")).collect();
    for room in &rooms {
        let message = json!({"room": room, "content": content});
        let body = json!({"messages": vec![message; 52]}).to_string();
        let length = body.len();
        let host = gateway.address;
        let request = format!(
            "POST /api/v1/publish HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n\
             Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        assert_eq!(http_raw(host, &request).await.status, 201);
    }
    let query = format!("user=ann&rooms={}", rooms.join(","));
    let mut stream = SseReader::open(gateway.address, &query, None).await;
    let queued = async || {
        let host = gateway.address;
        let request = format!(
            "GET /api/v1/users/ann HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n\
             Connection: close\r\n\r\n"
        );
        let user: Value = serde_json::from_str(&http_raw(host, &request).await.body).unwrap();
        user["connections"][0]["queued_bytes"].as_u64().unwrap()
    };
    // One `joined` frame, with at most 256 KiB of history, may exceed the bound.
    let (mut last, mut most) = (0, 0);
    crate::harness::until("the kernel takes no more", async || {
        let now = queued().await;
        most = now.max(most);
        std::mem::replace(&mut last, now) == now && now > OUTBOX / 2
    })
    .await;
    assert!(most <= OUTBOX + 300 * 1024, "{most} bytes wait");
    // Live entries wait in the log.
    let mut joined = Vec::new();
    while joined.len() < rooms.len() {
        let frame = stream.frame_of("joined").await;
        assert_eq!(frame["history"].as_array().unwrap().len(), 50);
        joined.push(frame["room"].as_str().unwrap().to_owned());
    }
    assert_eq!(joined, rooms);
    crate::harness::until("all has been taken", async || queued().await == 0).await;
}

#[tokio::test]
async fn a_stalled_stream_is_closed() {
    let gateway = Gateway::start(&[("heartbeat.write_timeout", "200ms")]).await;
    let mut ann = gateway.connect("ann").await;
    ann.join(&room("a")).await.unwrap();
    let _stream = SseReader::open(gateway.address, "rooms=a", None).await;
    let content = "x".repeat(200_000);
    let mut said = 0;
    crate::harness::until("the stream is closed", async || {
        // Until the buffers of both kernels are full.
        if said < 60 {
            // Without a copy, which the sender would have to read in time as well.
            let frame = json!({"type": "message", "room": "a", "content": content, "echo": false});
            ann.request(&frame).await.unwrap();
            said += 1;
        }
        let metrics = get(gateway.admin, "/metrics").await.body;
        metrics.lines().any(|line| {
            line == r#"gateway_disconnects_total{code="4003",reason="none",side="gateway"} 1"#
        })
    })
    .await;
}

#[tokio::test]
async fn errors_of_rooms_not_yet_joined_are_http_statuses() {
    let options = [("limits.outbox_bytes_max", "1KiB"), ("rooms.create_on_join", "false")];
    let gateway = Gateway::start(&options).await;
    let mut ann = gateway.connect("ann").await;
    for name in ["a", "b"] {
        ann.request(&json!({"type": "create_room", "room": name})).await.unwrap();
    }
    ann.join(&room("a")).await.unwrap();
    say(&mut ann, &room("a"), &"x".repeat(5_000)).await;
    let status = async |rooms: &str| get(gateway.address, &format!("/sse?rooms={rooms}")).await;
    assert_eq!(status("a,d").await.status, 404);
    let mut stream = SseReader::open(gateway.address, "rooms=a,b", None).await;
    assert_eq!(stream.frame_of("joined").await["room"], "a");
    assert_eq!(stream.frame_of("joined").await["room"], "b");
}
