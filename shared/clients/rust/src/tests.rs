//! The client against a minimal server over real sockets: connecting, closing, reconnecting.

use std::{net::SocketAddr, sync::LazyLock, time::Duration};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        Message as Raw,
        handshake::server::{Request, Response},
        protocol::CloseFrame,
    },
};

use super::{
    api::{ClientEndReason, ClientEvent, ClientOptions, SendError, StartFrom},
    connection::{ClientConnection, ConnectionClosed, ReceivedMessage, RequestError},
    options::{ConnectError, ConnectOptions, TokenLocation, text_of},
    *,
};
use skein_protocol::{error::ErrorCode, protocol::server_frame::ServerFrame};
use skein_websocket::Opcode;

/// Time limit of each wait, so that a test fails instead of hanging.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A listener whose connections the test accepts one by one.
struct TestServer(TcpListener);

/// The server side of one connection.
struct Peer {
    socket: WebSocketStream<TcpStream>,
    /// Path and query of the request.
    uri: String,
    authorization: Option<String>,
}

impl TestServer {
    async fn start() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    fn url(&self) -> String {
        format!("ws://{}/ws", self.address())
    }

    async fn stream(&self) -> TcpStream {
        timeout(TEST_TIMEOUT, self.0.accept()).await.expect("a connection").unwrap().0
    }

    async fn accept(&self) -> Peer {
        let (mut uri, mut authorization) = (String::new(), None);
        #[expect(clippy::result_large_err, reason = "tungstenite wants it so")]
        let callback = |request: &Request, mut response: Response| {
            uri = request.uri().to_string();
            let header = request.headers().get("authorization");
            authorization = header.map(|value| text_of(value).unwrap().to_owned());
            let offered = request.headers().get("sec-websocket-protocol");
            if offered.is_some_and(|offered| text_of(offered).unwrap().contains("chat.v1")) {
                let headers = response.headers_mut();
                headers.insert("sec-websocket-protocol", "chat.v1".parse().unwrap());
            }
            Ok(response)
        };
        let socket = accept_hdr_async(self.stream().await, callback).await.unwrap();
        Peer { socket, uri, authorization }
    }

    /// Accepts a connection and sends `connected`.
    async fn welcome(&self) -> Peer {
        let mut peer = self.accept().await;
        peer.send(connected()).await;
        peer
    }

    /// Accepts a connection and answers the handshake with `response`.
    async fn reject(&self, response: &str) {
        let mut stream = self.stream().await;
        let mut request = [0; 2048];
        let length = stream.read(&mut request).await.unwrap();
        assert!(length > 0);
        stream.write_all(response.as_bytes()).await.unwrap();
    }
}

impl Peer {
    async fn send(&mut self, frame: Value) {
        self.socket.send(Raw::text(frame.to_string())).await.unwrap();
    }

    /// The next frame, which must be of type `kind`.
    async fn expect_frame(&mut self, kind: &str) -> Value {
        loop {
            let message = timeout(TEST_TIMEOUT, self.socket.next()).await.expect("a frame");
            match message.expect("a frame").unwrap() {
                Raw::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    assert_eq!(frame["type"], kind, "{frame}");
                    return frame;
                }
                Raw::Ping(_) | Raw::Pong(_) => {}
                other => panic!("{other:?} instead of `{kind}`"),
            }
        }
    }

    /// The close frame, which must come next.
    async fn expect_close(&mut self) -> u16 {
        match timeout(TEST_TIMEOUT, self.socket.next()).await.expect("a close").unwrap().unwrap() {
            Raw::Close(Some(frame)) => frame.code.into(),
            other => panic!("{other:?} instead of a close"),
        }
    }

    async fn close(mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame { code: code.into(), reason: reason.into() };
        self.socket.close(Some(frame)).await.unwrap();
        while let Some(Ok(_)) = self.socket.next().await {}
    }

    /// Answers the `join`, which must come next.
    async fn answer_join(&mut self, seq: u64, recovered: bool) -> Value {
        let join = self.expect_frame("join").await;
        self.send(json!({
            "type": "joined", "ref": join["ref"], "room": join["room"], "epoch": "e",
            "seq": seq, "recovered": recovered, "history": [], "durable": true,
        }))
        .await;
        join
    }

    async fn acknowledge(&mut self, message: &Value, seq: u64) {
        self.send(json!({
            "type": "ack", "ref": message["ref"], "id": message["id"], "room": message["room"],
            "epoch": "e", "seq": seq, "timestamp": "t", "duplicate": false,
        }))
        .await;
    }
}

fn connected() -> Value {
    json!({
        "type": "connected", "connection_id": "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10",
        "user": {"id": "guest-1", "name": "guest-1"}, "node": "n1", "route": "r1",
        "protocol": "chat.v1", "timestamp": "t", "heartbeat_interval": 25,
        "dedup_window": 600, "max_message_size": 262_144,
        "session": "c2VjcmV0", "session_id": "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c11", "resumed": false,
        "inbox": {"epoch": "i", "seq": 0, "acked": 0, "oldest": 1, "unread": 0},
    })
}

fn entry(seq: u64) -> Value {
    json!({
        "type": "message", "room": "r", "epoch": "e", "seq": seq,
        "id": skein_protocol::ids::MessageId::random(), "from": {"id": "you", "name": "you"},
        "kind": "text", "content": seq, "timestamp": "t",
    })
}

/// Options that reconnect at once.
fn fast_reconnect() -> ClientOptions {
    let moment = Duration::from_millis(1);
    ClientOptions { backoff_base: moment, backoff_cap: moment, ..ClientOptions::default() }
}

static ROOM: LazyLock<RoomId> = LazyLock::new(|| "r".parse().unwrap());

async fn event(events: &mut mpsc::Receiver<ClientEvent>) -> ClientEvent {
    timeout(TEST_TIMEOUT, events.recv()).await.expect("an event").expect("an event")
}

/// Skips events until `pick` returns a value.
async fn until<T>(
    events: &mut mpsc::Receiver<ClientEvent>,
    pick: impl Fn(ClientEvent) -> Option<T>,
) -> T {
    loop {
        if let Some(picked) = pick(event(events).await) {
            return picked;
        }
    }
}

async fn ended(events: &mut mpsc::Receiver<ClientEvent>) -> ClientEndReason {
    let ended = |event| match event {
        ClientEvent::Ended(reason) => Some(reason),
        _ => None,
    };
    let reason = until(events, ended).await;
    assert!(events.recv().await.is_none(), "nothing follows the end");
    reason
}

#[tokio::test]
async fn a_client_joins_sends_and_receives() {
    let server = TestServer::start().await;
    let (client, mut events) =
        Client::start(ConnectOptions::new(server.url()).user("me"), ClientOptions::default());
    let gateway = async {
        let mut peer = server.welcome().await;
        assert_eq!(peer.uri, "/ws?user=me");
        let join = peer.answer_join(4, false).await;
        assert_eq!(join["history"], 0);
        let message = peer.expect_frame("message").await;
        assert_eq!(message["content"], "hello");
        peer.send(entry(5)).await;
        peer.acknowledge(&message, 6).await;
        assert_eq!(peer.expect_close().await, 1000);
    };
    let application = async {
        let joined = client.join(&ROOM, StartFrom::Now).await.unwrap();
        assert_eq!(joined.top.seq, 4);
        let sent = client.send(&ROOM, "hello").await.unwrap();
        assert_eq!(sent.position.seq, 6);
        assert!(matches!(event(&mut events).await, ClientEvent::Connected { .. }));
        assert!(matches!(event(&mut events).await, ClientEvent::Joined(_)));
        let ClientEvent::Message { message, .. } = event(&mut events).await else { panic!() };
        assert_eq!(message.seq, 5);
        client.close().await;
        assert!(client.is_ended());
        assert_eq!(client.send(&ROOM, "late").await, Err(SendError::ClientClosed));
        assert_eq!(ended(&mut events).await, ClientEndReason::Closed);
    };
    tokio::join!(gateway, application);
}

#[tokio::test]
async fn a_client_reconnects_and_resumes_after_a_lost_connection() {
    let server = TestServer::start().await;
    let (client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    let gateway = async {
        let mut peer = server.welcome().await;
        peer.answer_join(0, false).await;
        peer.send(entry(1)).await;
        let lost = peer.expect_frame("message").await;
        // No close frame: the process died.
        drop(peer);
        let mut peer = server.welcome().await;
        // The client returns to its node as the same guest.
        assert_eq!(peer.uri, "/ws?inbox=i%3A0&user=guest-1&node=r1&session=c2VjcmV0");
        let join = peer.answer_join(1, true).await;
        assert_eq!(join["since"], json!({"epoch": "e", "seq": 1}));
        let again = peer.expect_frame("message").await;
        assert_eq!(again["id"], lost["id"]);
        peer.acknowledge(&again, 2).await;
        peer
    };
    let application = async {
        client.join(&ROOM, StartFrom::Now).await.unwrap();
        client.send(&ROOM, 1).await.unwrap()
    };
    let (_peer, sent) = tokio::join!(gateway, application);
    assert_eq!(sent.position.seq, 2);
    let disconnected = |event| match event {
        ClientEvent::Disconnected { code, retry_in, .. } => Some((code, retry_in.is_some())),
        ClientEvent::Gap { .. } | ClientEvent::Duplicate { .. } => panic!("{event:?}"),
        _ => None,
    };
    assert_eq!(until(&mut events, disconnected).await, (None, true));
    let rejoined = |event| match event {
        ClientEvent::Joined(info) => Some(info.recovered),
        _ => None,
    };
    assert!(until(&mut events, rejoined).await);
}

#[tokio::test]
async fn a_client_follows_the_reconnect_frame() {
    let server = TestServer::start().await;
    let (_client, mut events) =
        Client::start(ConnectOptions::new(server.url()), ClientOptions::default());
    let mut peer = server.welcome().await;
    let reconnect =
        json!({"type": "reconnect", "after_ms": 3, "reason": "draining", "node": "any"});
    peer.send(reconnect).await;
    peer.close(1012, "draining").await;
    let disconnected = |event| match event {
        ClientEvent::Disconnected { code, retry_in, .. } => Some((code, retry_in)),
        _ => None,
    };
    let expected = (Some(1012), Some(Duration::from_millis(3)));
    assert_eq!(until(&mut events, disconnected).await, expected);
    assert!(server.accept().await.uri.contains("node=any"));
}

#[tokio::test]
async fn a_kicked_client_does_not_reconnect() {
    let server = TestServer::start().await;
    let (client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    let peer = server.welcome().await;
    peer.close(1008, "kicked").await;
    let reason = ClientEndReason::ClosedByServer { code: 1008, reason: "kicked".to_owned() };
    assert_eq!(ended(&mut events).await, reason);
    assert!(client.is_ended());
}

#[tokio::test]
async fn a_client_with_an_expired_token_waits_for_a_new_one() {
    let server = TestServer::start().await;
    let options = ConnectOptions::new(server.url()).token("old", TokenLocation::Header);
    let (client, mut events) = Client::start(options, fast_reconnect());
    let peer = server.welcome().await;
    assert_eq!(peer.authorization.as_deref(), Some("Bearer old"));
    peer.close(4001, "token_expired").await;
    let disconnected = |event| match event {
        ClientEvent::Disconnected { code, retry_in, .. } => Some((code, retry_in)),
        _ => None,
    };
    assert_eq!(until(&mut events, disconnected).await, (Some(4001), None));
    client.set_token("new").await;
    assert_eq!(server.accept().await.authorization.as_deref(), Some("Bearer new"));
}

#[tokio::test]
async fn a_client_without_reconnect_ends_with_its_connection() {
    let server = TestServer::start().await;
    let once = ClientOptions { reconnect: false, ..fast_reconnect() };
    let (_client, mut events) = Client::start(ConnectOptions::new(server.url()), once);
    server.welcome().await.close(1012, "").await;
    assert_eq!(ended(&mut events).await, ClientEndReason::ReconnectDisabled);
}

#[tokio::test]
async fn a_client_obeys_an_http_rejection() {
    let server = TestServer::start().await;
    let (client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    server.reject("HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n").await;
    let ClientEvent::ConnectFailed { error, retry_in, .. } = event(&mut events).await else {
        panic!()
    };
    let ConnectError::Http { status, retry_after, .. } = error else { panic!("{error:?}") };
    assert_eq!((status, retry_after), (503, Some(Duration::from_secs(7))));
    assert!(retry_in.unwrap() >= Duration::from_secs(7));
    client.close().await;

    let (_client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    server.reject("HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(ended(&mut events).await, ClientEndReason::HandshakeRejected { status: 403 });
}

#[tokio::test]
async fn urls_are_tried_in_order_from_the_first() {
    let (dead, first, second) =
        (TestServer::start().await, TestServer::start().await, TestServer::start().await);
    let urls = vec![dead.url(), first.url(), second.url()];
    drop(dead);
    let several = ClientOptions { urls, ..fast_reconnect() };
    let (_client, _events) = Client::start(ConnectOptions::new("ws://unused/ws"), several);
    let peer = first.welcome().await;
    peer.close(1011, "").await;
    first.reject("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n").await;
    let peer = second.welcome().await;
    peer.close(1011, "").await;
    first.welcome().await;
}

#[tokio::test]
async fn an_invalid_url_ends_the_client() {
    let (_client, mut events) = Client::start(ConnectOptions::new("http://h/"), fast_reconnect());
    assert_eq!(ended(&mut events).await, ClientEndReason::InvalidOptions);
}

#[tokio::test]
async fn the_room_of_the_url_is_resumed_through_the_url() {
    let server = TestServer::start().await;
    let url = format!("ws://{}/ws/rooms/r?history=2", server.address());
    let (client, _events) = Client::start(ConnectOptions::new(url), fast_reconnect());
    let joined_by_url = |seq: u64, recovered: bool| {
        json!({
            "type": "joined", "room": "r", "epoch": "e", "seq": seq, "recovered": recovered,
            "history": [], "durable": true,
        })
    };
    let mut peer = server.welcome().await;
    peer.send(joined_by_url(3, false)).await;
    let (message, sent) = tokio::join!(
        async {
            let message = peer.expect_frame("message").await;
            peer.acknowledge(&message, 4).await;
            message
        },
        async {
            client.join(&ROOM, StartFrom::Now).await.unwrap();
            client.send(&ROOM, "x").await
        }
    );
    assert_eq!((message["content"].as_str(), sent.unwrap().position.seq), (Some("x"), 4));
    peer.close(1012, "").await;
    let again = server.accept().await;
    assert_eq!(
        again.uri,
        "/ws/rooms/r?history=2&inbox=i%3A0&user=guest-1&node=r1&session=c2VjcmV0&since=e%3A3"
    );
}

#[tokio::test]
async fn a_slow_application_loses_no_event() {
    let server = TestServer::start().await;
    let narrow = ClientOptions { event_queue_max: 1, ..fast_reconnect() };
    let (client, mut events) = Client::start(ConnectOptions::new(server.url()), narrow);
    let mut peer = server.welcome().await;
    let (_, joined) = tokio::join!(peer.answer_join(0, false), client.join(&ROOM, StartFrom::Now));
    joined.unwrap();
    for seq in 1..=500 {
        peer.send(entry(seq)).await;
    }
    for expected in 1..=500 {
        let seq = |event| match event {
            ClientEvent::Message { message, .. } => Some(message.seq),
            ClientEvent::Gap { .. } | ClientEvent::Duplicate { .. } => panic!("{event:?}"),
            _ => None,
        };
        assert_eq!(until(&mut events, seq).await, expected);
    }
}

#[tokio::test]
async fn a_client_with_a_full_event_queue_can_be_closed() {
    let server = TestServer::start().await;
    let narrow = ClientOptions { event_queue_max: 1, ..fast_reconnect() };
    let (client, _events) = Client::start(ConnectOptions::new(server.url()), narrow);
    let mut peer = server.welcome().await;
    let (_, joined) = tokio::join!(peer.answer_join(0, false), client.join(&ROOM, StartFrom::Now));
    joined.unwrap();
    for seq in 1..=10 {
        peer.send(entry(seq)).await;
    }
    let (code, ()) = tokio::join!(peer.expect_close(), client.close());
    assert_eq!(code, 1000);
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_connection() {
    let server = TestServer::start().await;
    let (client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    let mut peer = server.welcome().await;
    assert!(matches!(event(&mut events).await, ClientEvent::Connected { .. }));
    drop(client);
    assert_eq!(peer.expect_close().await, 1000);
    assert_eq!(ended(&mut events).await, ClientEndReason::Closed);
}

#[tokio::test]
async fn a_client_leaves_a_silent_gateway() {
    let server = TestServer::start().await;
    let (_client, mut events) = Client::start(ConnectOptions::new(server.url()), fast_reconnect());
    let _peer = server.welcome().await;
    assert!(matches!(event(&mut events).await, ClientEvent::Connected { .. }));
    let since = tokio::time::Instant::now();
    // The sockets are idle from here on, so the paused clock advances by itself.
    tokio::time::pause();
    let Some(ClientEvent::Disconnected { code: None, retry_in, .. }) = events.recv().await else {
        panic!("no end")
    };
    assert!(retry_in.is_some());
    assert!(since.elapsed() >= Duration::from_secs(2 * 25), "two pings may be missed");
}

#[tokio::test]
async fn unacknowledged_messages_are_bounded() {
    let server = TestServer::start().await;
    let few = ClientOptions { pending_sends_max: 2, pending_bytes_max: 100, ..fast_reconnect() };
    let (client, _events) = Client::start(ConnectOptions::new(server.url()), few);
    let large = client.send(&ROOM, "x".repeat(100)).await;
    assert_eq!(large, Err(SendError::QueueFull));
    let mut peer = server.welcome().await;
    let (_, joined) = tokio::join!(peer.answer_join(0, false), client.join(&ROOM, StartFrom::Now));
    joined.unwrap();
    let (one, two, three, ()) =
        tokio::join!(client.send(&ROOM, 1), client.send(&ROOM, 2), client.send(&ROOM, 3), async {
            for seq in 1..=2 {
                let message = peer.expect_frame("message").await;
                assert_eq!(message["content"], seq);
                peer.acknowledge(&message, seq).await;
            }
        });
    assert!(one.is_ok() && two.is_ok());
    assert_eq!(three, Err(SendError::QueueFull));
}

#[tokio::test]
async fn a_request_returns_its_reply_and_buffers_earlier_frames() {
    let server = TestServer::start().await;
    let options = ConnectOptions::new(server.url());
    let (connection, mut peer) = tokio::join!(ClientConnection::open(&options), server.welcome());
    let mut connection = connection.unwrap();
    assert_eq!(connection.subprotocol(), Some("chat.v1"));
    assert_eq!(connection.expect_connected().await.unwrap().node.as_str(), "n1");
    let (joined, ()) = tokio::join!(connection.join(&ROOM), async {
        let join = peer.expect_frame("join").await;
        peer.send(entry(1)).await;
        peer.send(json!({
            "type": "joined", "ref": join["ref"], "room": "r", "epoch": "e", "seq": 0,
            "recovered": false, "history": [], "durable": true,
        }))
        .await;
    });
    assert_eq!(joined.unwrap().seq, 0);
    let ReceivedMessage::Frame(ServerFrame::Message(message), text) =
        connection.next().await.unwrap()
    else {
        panic!()
    };
    assert_eq!((message.seq, text.contains("\"seq\":1")), (1, true));

    let nonsense = json!({"type": "nonsense"});
    let (rejected, ()) = tokio::join!(connection.request(&nonsense), async {
        let frame = peer.expect_frame("nonsense").await;
        peer.send(json!({
            "type": "error", "ref": frame["ref"], "code": "unknown_type", "message": "no",
        }))
        .await;
    });
    let Err(RequestError::Rejected(error_frame)) = rejected else { panic!("{rejected:?}") };
    assert_eq!(error_frame.code, ErrorCode::UnknownType);
    let closed = ConnectionClosed { code: Some(4000), reason: "bye".to_owned() };
    let (end, ()) = tokio::join!(connection.next(), peer.close(4000, "bye"));
    assert_eq!(end.unwrap_err(), closed);
    assert_eq!(connection.next().await.unwrap_err(), closed, "every call returns the error");
}

#[tokio::test]
async fn messages_that_are_no_frames_are_returned_unchanged() {
    let server = TestServer::start().await;
    let options = ConnectOptions::new(server.url());
    let (connection, mut peer) = tokio::join!(ClientConnection::open(&options), server.accept());
    let mut connection = connection.unwrap();
    connection.send_text("x").await.unwrap();
    assert_eq!(peer.socket.next().await.unwrap().unwrap(), Raw::text("x"));
    connection.send_raw(Opcode::Text, false, b"a").await.unwrap();
    connection.send_raw(Opcode::Ping, true, b"p").await.unwrap();
    connection.send_raw(Opcode::Continuation, true, b"b").await.unwrap();
    assert_eq!(peer.socket.next().await.unwrap().unwrap(), Raw::Ping("p".into()));
    assert_eq!(peer.socket.next().await.unwrap().unwrap(), Raw::text("ab"));
    peer.socket.send(Raw::text("Echo: x")).await.unwrap();
    peer.socket.send(Raw::binary(vec![0, 1, 2])).await.unwrap();
    peer.socket.send(Raw::Ping("q".into())).await.unwrap();
    let mut received = Vec::new();
    for _ in 0..4 {
        received.push(connection.next().await.unwrap());
    }
    let [
        ReceivedMessage::Pong(pong),
        ReceivedMessage::Text(text),
        ReceivedMessage::Bytes(bytes),
        ReceivedMessage::Ping(ping),
    ] = received.as_slice()
    else {
        panic!("{received:?}")
    };
    assert_eq!((text.as_str(), bytes.as_ref()), ("Echo: x", &[0, 1, 2][..]));
    assert_eq!((pong.as_ref(), ping.as_ref()), (&b"p"[..], &b"q"[..]));
}

#[tokio::test]
async fn a_binary_message_is_header_and_payload() {
    let server = TestServer::start().await;
    let options = ConnectOptions::new(server.url());
    let (connection, mut peer) = tokio::join!(ClientConnection::open(&options), server.accept());
    let mut connection = connection.unwrap();
    let header = entry(3);
    peer.socket.send(Raw::binary(frames::encode_binary(&header, &[7]).unwrap())).await.unwrap();
    let ReceivedMessage::Binary(message, payload) = connection.next().await.unwrap() else {
        panic!()
    };
    assert_eq!((message.seq, payload.as_ref()), (3, &[7][..]));
    connection.send_binary(&frames::OutgoingMessage::header(&ROOM), &[9]).await.unwrap();
    let Raw::Binary(bytes) = peer.socket.next().await.unwrap().unwrap() else { panic!() };
    assert_eq!(bytes.last(), Some(&9));
}

#[tokio::test]
async fn close_waits_for_the_answer_of_the_server() {
    let server = TestServer::start().await;
    let options = ConnectOptions::new(server.url());
    let (connection, mut peer) = tokio::join!(ClientConnection::open(&options), server.accept());
    let mut connection = connection.unwrap();
    let (closed, code) = tokio::join!(connection.close(1000, "done"), async {
        let code = peer.expect_close().await;
        let _ = peer.socket.next().await;
        code
    });
    assert_eq!((closed.code, code), (Some(1000), 1000));
}

#[tokio::test]
async fn a_subprotocol_that_is_not_chosen_is_an_error() {
    let server = TestServer::start().await;
    let mut others = ConnectOptions::new(server.url());
    others.subprotocols = vec!["chat.v0".to_owned()];
    // The library treats that as an error. RFC 6455 leaves it to the client.
    let (opened, _peer) = tokio::join!(ClientConnection::open(&others), server.accept());
    assert!(matches!(opened.unwrap_err(), ConnectError::NoSubprotocol));

    let mut bare = ConnectOptions::new(server.url());
    bare.subprotocols.clear();
    let (opened, _peer) = tokio::join!(ClientConnection::open(&bare), server.accept());
    assert_eq!(opened.unwrap().subprotocol(), None);
}

#[tokio::test]
async fn the_local_address_can_be_chosen() {
    let server = TestServer::start().await;
    let mut options = ConnectOptions::new(server.url());
    options.local_address = Some("127.0.0.9".parse().unwrap());
    let (opened, _peer) = tokio::join!(ClientConnection::open(&options), server.accept());
    assert_eq!(opened.unwrap().local_addr().ip().to_string(), "127.0.0.9");
}
