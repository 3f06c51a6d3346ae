//! Requirements on a handshake, and the responses to invalid ones.

use std::net::SocketAddr;

use skein_client::{connection::ClientConnection, options::ConnectOptions};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::{Gateway, Http, Redis, get, http_raw, until};

const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";

/// Sends a handshake with some header lines replaced or added; a value of `-` removes the line.
async fn handshake(address: SocketAddr, start: &str, headers: &[&str]) -> Http {
    let defaults = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", KEY];
    let name = |line: &str| line.split(':').next().unwrap().to_lowercase();
    let mut lines: Vec<&str> = defaults
        .into_iter()
        .filter(|line| !headers.iter().any(|header| name(header) == name(line)))
        .collect();
    lines.extend(headers.iter().filter(|line| !line.ends_with(": -")));
    let request = format!("{start}\r\nHost: {address}\r\n{}\r\n\r\n", lines.join("\r\n"));
    http_raw(address, &request).await
}

#[tokio::test]
async fn a_client_that_leaves_during_setup_frees_its_task_at_once() {
    let redis = Redis::start().await;
    let gateway = Gateway::start_on(&redis, &[("publish.timeout", "60s")]).await;
    let _ann = gateway.connect("ann").await;
    let tasks = async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let line = metrics.lines().find_map(|line| line.strip_prefix("gateway_tasks "));
        line.unwrap().parse::<usize>().unwrap()
    };
    let before = tasks().await;
    // No client is admitted meanwhile.
    redis.signal("STOP");
    let mut sockets = Vec::new();
    for _ in 0..20 {
        let mut socket = TcpStream::connect(gateway.address).await.unwrap();
        let request = format!(
            "GET /ws?user=bob HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\n{KEY}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut status = [0; 12];
        socket.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 101");
        sockets.push(socket);
    }
    assert!(tasks().await >= before + 20);
    drop(sockets);
    until("their tasks have ended", async || tasks().await <= before + 2).await;
    let metrics = get(gateway.admin, "/metrics").await.body;
    assert!(metrics.contains("gateway_handshakes_abandoned_total 20\n"), "{metrics}");
    redis.signal("CONT");
}

#[tokio::test]
async fn a_handshake_is_answered_as_rfc_6455_requires() {
    let gateway = Gateway::start(&[]).await;
    let ok = handshake(gateway.address, "GET /ws HTTP/1.1", &[]).await;
    assert_eq!(ok.status, 101, "{ok:?}");
    // Key and accept value are those of RFC 6455, section 1.3.
    assert_eq!(ok.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    let route = ok.header("set-cookie").unwrap();
    assert!(route.starts_with("gw_node=") && route.contains("HttpOnly"), "{route}");

    for (start, headers, status) in [
        ("GET /ws HTTP/1.1", &["Upgrade: -"][..], 426),
        ("GET /ws HTTP/1.1", &["Upgrade: h2c"], 426),
        ("GET /ws HTTP/1.1", &["Upgrade: h2c, WebSocket"], 101),
        ("GET /ws HTTP/1.1", &["Connection: keep-alive"], 400),
        ("GET /ws HTTP/1.1", &["Connection: keep-alive, upgrade"], 101),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Version: 8"], 426),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Version: -"], 426),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: -"], 400),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: c2hvcnQ="], 400),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: !!!"], 400),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: -", KEY, KEY], 400),
        ("GET /ws HTTP/1.1", &["Host: a"], 400),
        ("GET /ws HTTP/1.1", &["Upgrade: websockets"], 426),
        ("GET /ws HTTP/1.1", &["Connection: upgrades"], 400),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Version: 13, 8"], 101),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Version: 1"], 426),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ"], 400),
        ("GET /ws HTTP/1.1", &["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZSE="], 400),
        ("GET /ws HTTP/1.1", &["Content-Length: 5"], 400),
        ("GET /ws HTTP/1.1", &["Content-Length: 0"], 101),
        ("GET /ws HTTP/1.1", &["Transfer-Encoding: chunked"], 400),
        ("HEAD /ws HTTP/1.1", &[], 405),
        ("GET /ws HTTP/1.0", &[], 400),
    ] {
        let answer = handshake(gateway.address, start, headers).await;
        assert_eq!(answer.status, status, "{start} {headers:?}: {answer:?}");
    }
    let post = http_raw(
        gateway.address,
        &format!("POST /ws HTTP/1.1\r\nHost: x\r\n{KEY}\r\nConnection: close\r\n\r\n"),
    )
    .await;
    assert_eq!(post.status, 405);
    let version = handshake(gateway.address, "GET /ws HTTP/1.1", &["Sec-WebSocket-Version: 8"]);
    assert_eq!(version.await.header("sec-websocket-version"), Some("13"));
    gateway.stop().await;
}

#[tokio::test]
async fn only_pages_of_an_allowed_origin_may_connect() {
    let own = Gateway::start(&[]).await;
    let origin = |origin: String| async move {
        handshake(own.address, "GET /ws HTTP/1.1", &[&origin]).await.status
    };
    assert_eq!(origin(format!("Origin: http://{}", own.address)).await, 101);
    assert_eq!(origin("Origin: http://evil.example".into()).await, 403);
    assert_eq!(origin("Origin: null".into()).await, 403);

    let origins = "https://app.example,https://*.bücher.example";
    let listed = Gateway::start(&[("server.allowed_origins", origins)]).await;
    let own = format!("Origin: https://{}", listed.address);
    let below = "Origin: https://a.xn--bcher-kva.example";
    for origin in [&*own, below] {
        let answer = handshake(listed.address, "GET /ws HTTP/1.1", &[origin]).await;
        assert_eq!(answer.status, 101, "{origin}");
    }
    for path in ["/ws", "/ws/rooms/r", "/ws/echo"] {
        let start = format!("GET {path} HTTP/1.1");
        let yes = handshake(listed.address, &start, &["Origin: https://app.example"]).await;
        let no = handshake(listed.address, &start, &["Origin: https://app.example:8443"]).await;
        assert_eq!((yes.status, no.status), (101, 403), "{path}");
    }
}

#[tokio::test]
async fn the_subprotocol_is_chat_v1_or_none() {
    let gateway = Gateway::start(&[]).await;
    for (offered, chosen) in [
        ("Sec-WebSocket-Protocol: chat.v1", Some("chat.v1")),
        ("Sec-WebSocket-Protocol: other, chat.v1", Some("chat.v1")),
        ("Sec-WebSocket-Protocol: zürich, chat.v1", Some("chat.v1")),
        ("X-None: 1", None),
    ] {
        let answer = handshake(gateway.address, "GET /ws HTTP/1.1", &[offered]).await;
        assert_eq!(answer.status, 101);
        assert_eq!(answer.header("sec-websocket-protocol"), chosen, "{offered}");
    }
    // A browser fails a handshake in which no subprotocol is chosen, without a reason for its page.
    for path in ["/ws", "/ws/rooms/r", "/ws/echo"] {
        for offered in ["bearer.x", "session.x, bearer.x", "other", "Chat.V1", "zürich"] {
            let header = format!("Sec-WebSocket-Protocol: {offered}");
            let start = format!("GET {path} HTTP/1.1");
            let answer = handshake(gateway.address, &start, &[&header]).await;
            assert_eq!(answer.status, 400, "{path} {offered}: {answer:?}");
            assert!(answer.body.contains("chat.v1"), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn compression_is_off_when_the_client_opts_out() {
    let gateway = Gateway::start(&[]).await;
    for path in ["/ws", "/ws/rooms/r", "/ws/echo"] {
        for (query, agreed) in [("", true), ("?deflate=off", false), ("?deflate=on", true)] {
            let start = format!("GET {path}{query} HTTP/1.1");
            let offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits";
            let answer = handshake(gateway.address, &start, &[offer]).await;
            let extension = answer.header("sec-websocket-extensions");
            assert_eq!((answer.status, extension.is_some()), (101, agreed), "{start}");
        }
    }
}

#[tokio::test]
async fn health_ready_and_metrics_are_on_their_listeners() {
    let gateway = Gateway::start(&[("node.id", "n1")]).await;
    let health = get(gateway.address, "/health").await;
    assert_eq!((health.status, health.body.as_str()), (200, r#"{"node":"n1","status":"ok"}"#));
    assert_eq!(get(gateway.address, "/ready").await.body, r#"{"status":"ok"}"#);
    assert_eq!(get(gateway.address, "/metrics").await.status, 404);
    assert_eq!(get(gateway.address, "/nowhere").await.status, 404);
    let metrics = get(gateway.admin, "/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"));
    assert!(metrics.body.contains("gateway_bus_up 1"), "{}", metrics.body);
    assert_eq!(get(gateway.admin, "/ready").await.status, 200);
    let page = get(gateway.address, "/chat").await;
    assert!(page.status == 200 && page.body.contains("<!doctype html>"), "{page:?}");
    assert!(page.header("content-security-policy").is_some());
}

#[tokio::test]
async fn an_oversized_header_is_rejected_with_431() {
    let gateway = Gateway::start(&[]).await;
    let long = format!("X-Long: {}", "x".repeat(100_000));
    let answer = handshake(gateway.address, "GET /ws HTTP/1.1", &[&long]).await;
    assert_eq!(answer.status, 431, "{answer:?}");
    assert_eq!(get(gateway.address, "/health").await.status, 200);
}

#[tokio::test]
async fn echo_returns_each_message() {
    use skein_client::connection::ReceivedMessage;
    let gateway = Gateway::start(&[]).await;
    let mut echo =
        ClientConnection::open(&ConnectOptions::new(gateway.url("/ws/echo"))).await.unwrap();
    echo.send_text("hello").await.unwrap();
    let ReceivedMessage::Text(text) = echo.next().await.unwrap() else { panic!("not a text") };
    assert_eq!(text, "Echo: hello");
    echo.send_bytes(vec![0, 255]).await.unwrap();
    assert!(
        matches!(echo.next().await.unwrap(), ReceivedMessage::Bytes(bytes) if bytes[..] == [0, 255])
    );
    echo.send_text("ByE").await.unwrap();
    assert_eq!(crate::harness::closed(&mut echo).await.0, Some(1000));

    let verbatim = Gateway::start(&[("server.echo", "verbatim")]).await;
    let mut echo =
        ClientConnection::open(&ConnectOptions::new(verbatim.url("/ws/echo"))).await.unwrap();
    echo.send_text("bye").await.unwrap();
    assert!(matches!(echo.next().await.unwrap(), ReceivedMessage::Text(text) if text == "bye"));

    let off = Gateway::start(&[("server.echo", "off")]).await;
    assert_eq!(get(off.address, "/ws/echo").await.status, 404);
}

#[tokio::test]
async fn silent_connections_of_one_address_do_not_block_others() {
    let gateway =
        Gateway::start(&[("limits.connections_max", "20"), ("limits.connections_per_ip", "10")])
            .await;
    let mut silent = vec![];
    for _ in 0..1000 {
        silent.push(TcpStream::connect(gateway.address).await.unwrap());
    }
    let mut options = ConnectOptions::new(gateway.url("/ws"));
    options.local_address = Some([127, 0, 0, 2].into());
    ClientConnection::open(&options).await.unwrap();
}
