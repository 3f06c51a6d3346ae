//! The limits of section 7 of the protocol, and the errors beyond them.

use serde_json::json;
use skein_client::{
    connection::{ClientConnection, RequestError},
    frames,
    options::{ConnectError, ConnectOptions},
};
use skein_protocol::{error::ErrorCode, protocol::server_frame::ServerFrame};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    api::call_as,
    harness::{Gateway, Redis, closed, get, room, say, until, within},
};

async fn http_refusal(url: &str) -> (u16, bool) {
    match ClientConnection::open(&ConnectOptions::new(url)).await {
        Err(ConnectError::Http { status, retry_after, .. }) => (status, retry_after.is_some()),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn messages_above_the_rate_are_rejected_with_retry_after() {
    let gateway = Gateway::start(&[("limits.messages_per_second", "1")]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let content = json!(1);
    for i in 0..15 {
        let frame = frames::OutgoingMessage {
            echo: i % 2 == 0,
            ..frames::OutgoingMessage::text(&lobby, &content)
        };
        ann.send_json(&frame).await.unwrap();
    }
    let (mut acks, mut refused) = (0, 0);
    while acks + refused < 15 {
        match ann.next_frame().await.unwrap() {
            ServerFrame::Ack(_) => acks += 1,
            ServerFrame::Error(refusal) => {
                assert_eq!(refusal.code, ErrorCode::RateLimited);
                assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 0 && ms <= 1001));
                refused += 1;
            }
            _ => {}
        }
    }
    // The burst is twice the rate; on a slow machine a few more are allowed meanwhile.
    assert!((2..10).contains(&acks), "{acks} taken");
}

#[tokio::test]
async fn other_frames_are_rate_limited() {
    let gateway = Gateway::start(&[("limits.frames_per_second", "2")]).await;
    let mut ann = gateway.connect("ann").await;
    for _ in 0..10 {
        ann.send_json(&json!({"type": "ping"})).await.unwrap();
    }
    for _ in 0..10 {
        ann.send_text("bad").await.unwrap();
    }
    let mut codes = vec![];
    while codes.len() < 10 {
        if let ServerFrame::Error(refusal) = ann.next_frame().await.unwrap() {
            codes.push(refusal.code);
        }
    }
    assert!(codes.contains(&ErrorCode::RateLimited), "{codes:?}");
}

#[tokio::test]
async fn a_message_above_the_limit_closes_with_1009() {
    let gateway = Gateway::start(&[("limits.message_bytes_max", "1000")]).await;
    let mut ann = gateway.connect("ann").await;
    ann.send_text(&"x".repeat(1001)).await.unwrap();
    assert_eq!(closed(&mut ann).await.0, Some(1009));
}

#[tokio::test]
async fn fields_above_their_limit_are_too_large() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let (content, meta) = (json!(1), json!({"x": "y".repeat(8 * 1024)}));
    let large = frames::OutgoingMessage {
        meta: Some(&meta),
        ..frames::OutgoingMessage::text(&lobby, &content)
    };
    let refused = ann.request(&large).await;
    assert!(
        matches!(&refused, Err(RequestError::Rejected(refusal)) if refusal.code == ErrorCode::TooLarge),
        "{refused:?}"
    );
    let mut header = vec![0x7F, 0xFF];
    header.extend(vec![b' '; 0x7FFF]);
    ann.send_bytes(header).await.unwrap();
    let ServerFrame::Error(refusal) = ann.next_frame().await.unwrap() else { panic!("no error") };
    assert_eq!(refusal.code, ErrorCode::TooLarge);
    // A message of the maximum size still passes.
    let text = "z".repeat(262_144 - 200);
    assert_eq!(say(&mut ann, &lobby, &text).await.seq, 1);
}

#[tokio::test]
async fn rooms_per_connection_are_limited() {
    let gateway = Gateway::start(&[("limits.rooms_per_connection", "2")]).await;
    let mut ann = gateway.connect("ann").await;
    ann.join(&room("a")).await.unwrap();
    ann.join(&room("b")).await.unwrap();
    ann.join(&room("b")).await.unwrap();
    let refused = ann.join(&room("c")).await;
    assert!(
        matches!(&refused, Err(RequestError::Rejected(r)) if r.code == ErrorCode::LimitReached),
        "{refused:?}"
    );
    ann.request(&frames::OutgoingLeave::new(&room("a"))).await.unwrap();
    ann.join(&room("c")).await.unwrap();
}

#[tokio::test]
async fn rooms_of_a_node_are_limited_and_empty_ones_evicted() {
    let limits = [("hub.rooms_max", "2"), ("hub.empty_rooms_max", "1"), ("hub.shards", "1")];
    let gateway = Gateway::start(&limits).await;
    let mut ann = gateway.connect("ann").await;
    ann.join(&room("a")).await.unwrap();
    ann.join(&room("b")).await.unwrap();
    let refused = ann.join(&room("c")).await;
    assert!(
        matches!(&refused, Err(RequestError::Rejected(r)) if r.code == ErrorCode::LimitReached),
        "{refused:?}"
    );
    ann.request(&frames::OutgoingLeave::new(&room("a"))).await.unwrap();
    ann.join(&room("c")).await.unwrap();
    // Of two rooms left at once, one stays subscribed.
    ann.request(&frames::OutgoingLeave::new(&room("b"))).await.unwrap();
    ann.request(&frames::OutgoingLeave::new(&room("c"))).await.unwrap();
    let metrics = get(gateway.admin, "/metrics").await.body;
    assert!(metrics.contains("gateway_rooms 1\n"), "{metrics}");
}

#[tokio::test]
async fn users_of_a_watch_count_as_frames_and_leak_nothing() {
    let redis = Redis::start().await;
    let limits = [("hub.watched_users_max", "150"), ("hub.shards", "1")];
    let gateway = Gateway::start_on(&redis, &limits).await;
    let mut ann = gateway.connect("ann").await;
    let names = |kind: &str, from: usize| {
        let users: Vec<_> = (from..from + 100).map(|number| format!("u{number}")).collect();
        json!({"type": kind, "users": users})
    };
    ann.send_json(&names("watch", 0)).await.unwrap();
    ann.send_json(&names("watch", 100)).await.unwrap();
    let (mut told, mut refused) = (0, 0);
    while told < 150 || refused == 0 {
        match ann.next_frame().await.unwrap() {
            ServerFrame::UserStatus(_) => told += 1,
            ServerFrame::Error(refusal) => {
                assert_eq!(refusal.code, ErrorCode::LimitReached);
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    let channels = async || redis.command("PUBSUB CHANNELS gw:s:*").await.unwrap();
    assert_eq!((told, refused, &*channels().await), (150, 1, "*150"));
    // A frame of 100 users counts as 26, so the burst is 38 of them.
    for number in 0..30 {
        ann.send_json(&names("unwatch", number * 100)).await.unwrap();
        ann.send_json(&names("watch", number * 100 + 100)).await.unwrap();
    }
    loop {
        if let ServerFrame::Error(refusal) = ann.next_frame().await.unwrap()
            && refusal.code == ErrorCode::RateLimited
        {
            break;
        }
    }
    drop(ann);
    until("no status is subscribed to", async || channels().await == "*0").await;
    let metrics = get(gateway.admin, "/metrics").await.body;
    assert!(metrics.contains("gateway_watched_users 0\n"), "{metrics}");
}

#[tokio::test]
async fn http_requests_and_key_failures_of_an_address_are_limited() {
    let gateway = Gateway::start(&[
        ("api.keys", "test:a key of sixteen and more"),
        ("limits.http_requests_per_second_per_ip", "1"),
        ("limits.api_key_failures_per_second_per_ip", "1"),
    ])
    .await;
    let call =
        async |key: Option<&str>| call_as(key, gateway.address, "GET /api/v1/nodes", None).await;
    // Both have a burst of five; on a slow machine a few more are allowed meanwhile.
    let mut refused = 0;
    for number in 0..12 {
        let http = call(Some("a wrong key of sixteen").filter(|_| number % 2 == 0)).await;
        if http.status == 429 {
            assert!(http.header("retry-after").is_some());
            refused += 1;
        } else {
            assert_eq!(http.status, 401);
        }
    }
    assert!((2..=7).contains(&refused), "{refused}");
    assert_eq!(call(Some("a key of sixteen and more")).await.status, 200, "a good key");
    let metrics = get(gateway.admin, "/metrics").await.body;
    let limited = format!("gateway_api_rejections_total{{reason=\"rate_limited\"}} {refused}\n");
    assert!(metrics.contains(&limited), "{metrics}");

    // Requests over one connection, which ends with the first rejected one.
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let request = "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n".repeat(50);
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answers = String::new();
    // The connection may be reset because of unread input.
    let _ = within(socket.read_to_string(&mut answers)).await;
    let count = |status: &str| answers.matches(&format!("HTTP/1.1 {status}")).count();
    assert!((5..=12).contains(&count("404")) && count("429") == 1, "{answers}");
    // A flood of page requests blocks neither probes nor clients.
    assert_eq!(get(gateway.address, "/health").await.status, 200);
    gateway.connect("ann").await;
}

#[tokio::test]
async fn connections_of_a_user_and_of_an_address_are_limited() {
    let gateway =
        Gateway::start(&[("limits.connections_per_user", "1"), ("limits.connections_per_ip", "3")])
            .await;
    let first = gateway.connect("ann").await;
    let mut second =
        ClientConnection::open(&ConnectOptions::new(gateway.url("/ws")).user("ann")).await.unwrap();
    assert_eq!(closed(&mut second).await, (Some(1008), "too_many_connections".into()));
    drop(second);
    let _bob = gateway.connect("bob").await;
    // Permits are returned when a connection ends.
    until("two places are left", async || {
        get(gateway.admin, "/metrics").await.body.contains("gateway_connections 2")
    })
    .await;
    let _cat = gateway.connect("cat").await;
    assert_eq!(http_refusal(&gateway.url("/ws")).await, (429, true));
    drop(first);
    until("ann's place is free", async || {
        ClientConnection::open(&ConnectOptions::new(gateway.url("/ws")).user("ann")).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn handshakes_of_an_address_and_in_all_are_limited() {
    let gateway = Gateway::start(&[("limits.handshakes_per_minute_per_ip", "2")]).await;
    let url = gateway.url("/ws");
    let _first = gateway.connect("a").await;
    let _second = gateway.connect("b").await;
    assert_eq!(http_refusal(&url).await, (429, true));

    let gateway = Gateway::start(&[("limits.accepts_per_second", "1")]).await;
    let url = gateway.url("/ws");
    let _first = gateway.connect("a").await;
    assert_eq!(http_refusal(&url).await, (503, true));

    let gateway = Gateway::start(&[("limits.connections_max", "1")]).await;
    let url = gateway.url("/ws");
    let _first = gateway.connect("a").await;
    assert_eq!(http_refusal(&url).await, (503, true));
}

#[tokio::test]
async fn only_a_trusted_proxy_names_the_address_of_a_client() {
    let limits = [("limits.connections_per_ip", "1"), ("server.trusted_proxies", "127.0.0.0/8")];
    let gateway = Gateway::start(&limits).await;
    let from = async |address: &str| {
        let mut options = ConnectOptions::new(gateway.url("/ws"));
        options.headers.push(("X-Forwarded-For".into(), address.into()));
        ClientConnection::open(&options).await
    };
    let _a = from("192.0.2.1").await.unwrap();
    let _b = from("192.0.2.2").await.unwrap();
    assert!(from("10.0.0.1, 192.0.2.1").await.is_err());

    let gateway = Gateway::start(&limits[..1]).await;
    let _a = gateway.connect("a").await;
    let mut forged = ConnectOptions::new(gateway.url("/ws"));
    forged.headers.push(("X-Forwarded-For".into(), "192.0.2.9".into()));
    assert!(ClientConnection::open(&forged).await.is_err());
}
