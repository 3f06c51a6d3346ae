//! Event streams: the frames of a connection, resumed over several rooms and the inbox.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::{
    harness::{Gateway, get, room, say, within},
    people::World,
};

/// An open stream.
struct Stream {
    reader: BufReader<TcpStream>,
    head: String,
    /// The id of the last event that had one.
    id: String,
}

impl Stream {
    async fn open(address: SocketAddr, query: &str, last: Option<&str>) -> Self {
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

    async fn line(&mut self) -> String {
        let mut line = String::new();
        within(self.reader.read_line(&mut line)).await.unwrap();
        line.trim_end().to_owned()
    }

    /// The next frame. Sizes of chunks stand between, which no event begins like.
    async fn frame(&mut self) -> Value {
        loop {
            let line = self.line().await;
            if let Some(id) = line.strip_prefix("id: ") {
                self.id = id.to_owned();
            } else if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).unwrap();
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
async fn a_stream_has_the_frames_of_its_rooms_and_the_inbox_and_goes_on_where_it_was() {
    World::each(&[], async |world| {
        let mut ann = world.connect(0, "ann").await;
        for name in ["a", "b"] {
            ann.join(&room(name)).await.unwrap();
            say(&mut ann, &room(name), "before").await;
        }
        let address = |node: usize| world.nodes[node % world.nodes.len()].address;
        let mut stream = Stream::open(address(1), "rooms=a,b&user=bob", None).await;
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
        let mut stream = Stream::open(address(2), "rooms=a,b&user=bob", Some(&id)).await;
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
        // As a query as well, and a binary entry live.
        let again = format!("rooms=a&user=bob&last_event_id={}", stream.id);
        let mut stream = Stream::open(address(0), &again, None).await;
        stream.frame_of("joined").await;
        ann.send_binary(&header, &[7]).await.unwrap();
        let live = stream.frame_of("message").await;
        assert_eq!((&live["encoding"], &live["content"]), (&json!("base64"), &json!("Bw==")));
    })
    .await;
}

#[tokio::test]
async fn what_another_device_acknowledged_is_not_missed_by_a_stream_that_comes_back() {
    World::each(&[], async |world| {
        let address = |node: usize| world.nodes[node % world.nodes.len()].address;
        let mut ann = world.connect(0, "ann").await;
        ann.join(&room("a")).await.unwrap();
        let mut stream = Stream::open(address(1), "rooms=a&user=bob", None).await;
        stream.frame_of("joined").await;
        // Nothing of the inbox has come, and its position is part of the id all the same.
        say(&mut ann, &room("a"), "of the room").await;
        stream.frame_of("message").await;
        let id = stream.id.clone();
        drop(stream);
        ann.request(&json!({"type": "direct", "to": "bob", "content": "missed?"})).await.unwrap();
        let mut phone = world.connect(2, "bob").await;
        phone.send_text(r#"{"type":"ack","seq":1}"#).await.unwrap();
        phone.request(&json!({"type": "ping"})).await.unwrap();
        let mut stream = Stream::open(address(2), "rooms=a&user=bob", Some(&id)).await;
        assert_eq!(stream.frame_of("direct").await["content"], "missed?");
    })
    .await;
}

#[tokio::test]
async fn clients_that_leave_while_a_stream_opens_leave_nothing() {
    let gateway = Gateway::start(&[("presence.grace", "0s")]).await;
    let rooms = (0..20).map(|n| format!("r{n}")).collect::<Vec<_>>().join(",");
    for _ in 0..50 {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        let request =
            format!("GET /sse?rooms={rooms} HTTP/1.1\r\nHost: {}\r\n\r\n", gateway.address);
        socket.write_all(request.as_bytes()).await.unwrap();
    }
    crate::harness::until("nobody is left", async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let is = |line: &str| metrics.lines().any(|found| found == line);
        is("gateway_members 0") && is("gateway_connections 0")
    })
    .await;
}

#[tokio::test]
async fn what_is_not_allowed_is_refused_in_http() {
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
    let open = Stream::open(gateway.address, &format!("token={token}"), None).await;
    assert!(open.head.starts_with("HTTP/1.1 200"));
    let full = get(gateway.address, &format!("/sse?token={token}")).await;
    assert!(full.status == 429 && full.header("retry-after").is_some(), "{full:?}");
}
