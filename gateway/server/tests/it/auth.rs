//! Tokens: their locations, permissions and expiry.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, RequestError},
    frames,
    options::{ConnectOptions, TokenLocation},
};
use skein_protocol::{
    error::ErrorCode,
    protocol::server_frame::{LeftReason, ServerFrame},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::{
    harness::{Gateway, closed, room, say, within},
    presence::{ask, next_matching, rejection_code},
};

const SECRET: &str = "a secret of at least thirty-two bytes";
pub const JWT: [(&str, &str); 2] = [("auth.mode", "jwt"), ("auth.jwt_secret", SECRET)];

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

pub fn token(mut claims: Value, lives_s: i64) -> String {
    claims["exp"] = json!(now().saturating_add_signed(lives_s));
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

#[tokio::test]
async fn a_token_is_accepted_in_four_locations() {
    let gateway = Gateway::start(&JWT).await;
    for placement in [
        TokenLocation::Query,
        TokenLocation::Header,
        TokenLocation::Cookie("token".into()),
        TokenLocation::Subprotocol,
    ] {
        let token = token(json!({"sub": "ann", "name": "Ann"}), 60);
        let options = ConnectOptions::new(gateway.url("/ws")).token(token, placement.clone());
        let mut ann = ClientConnection::open(&options).await.unwrap();
        let connected = ann.expect_connected().await.unwrap();
        assert_eq!(connected.user.id.as_str(), "ann", "{placement:?}");
        assert_eq!(connected.user.name.as_str(), "Ann");
        assert!(connected.expires_at.is_some());
    }
}

#[tokio::test]
async fn a_bad_token_closes_with_1008_despite_a_second_valid_one() {
    let gateway = Gateway::start(&JWT).await;
    let refusal = async |options: ConnectOptions| {
        let mut connection = ClientConnection::open(&options).await.unwrap();
        closed(&mut connection).await
    };
    let url = gateway.url("/ws");
    let policy = |reason: &str| (Some(1008), reason.to_owned());
    assert_eq!(refusal(ConnectOptions::new(&url)).await, policy("token_missing"));
    let old = token(json!({"sub": "ann"}), -5);
    let old = ConnectOptions::new(&url).token(old, TokenLocation::Query);
    assert_eq!(refusal(old).await, policy("token_expired"));
    for not_for_now in [json!({"sub": "ann", "nbf": now() + 60}), json!({"sub": "ann", "aud": "x"})]
    {
        let bad = ConnectOptions::new(&url).token(token(not_for_now, 60), TokenLocation::Header);
        assert_eq!(refusal(bad).await, policy("token_invalid"));
    }
    let good = token(json!({"sub": "ann"}), 60);
    let mut both = ConnectOptions::new(&url).token(good, TokenLocation::Header);
    both.query.push(("token".into(), "bad".into()));
    assert_eq!(refusal(both).await, policy("token_invalid"));
    // In jwt mode a user id without a token is rejected, even with `auth.allow_anonymous`.
    let open = Gateway::start(&[&JWT[..], &[("auth.allow_anonymous", "true")]].concat()).await;
    let anonymous = ConnectOptions::new(open.url("/ws")).user("ann");
    assert_eq!(refusal(anonymous).await, policy("token_missing"));
}

#[tokio::test]
async fn an_anonymous_user_with_an_invalid_id_is_rejected() {
    let gateway = Gateway::start(&[]).await;
    for bad in ["a b", "_api", ""] {
        let options = ConnectOptions::new(gateway.url("/ws")).user(bad);
        let mut connection = ClientConnection::open(&options).await.unwrap();
        assert_eq!(closed(&mut connection).await, (Some(1008), "user_invalid".into()), "{bad:?}");
    }
}

#[tokio::test]
async fn a_connection_closes_when_its_token_expires() {
    let gateway = Gateway::start(&[&JWT[..], &[("auth.leeway", "1s")]].concat()).await;
    let ends = now() + 2;
    let token = token(json!({"sub": "ann"}), 2);
    let options = ConnectOptions::new(gateway.url("/ws")).token(token, TokenLocation::Query);
    let mut ann = ClientConnection::open(&options).await.unwrap();
    // The client receives the expiry time of the token; the gateway's clock may differ from the
    // issuer's.
    let told = ann.expect_connected().await.unwrap().expires_at.unwrap();
    let told = humantime::parse_rfc3339(&told).unwrap().duration_since(UNIX_EPOCH).unwrap();
    assert!(told.as_secs().abs_diff(ends) <= 1, "{told:?} {ends}");
    assert_eq!(closed(&mut ann).await.0, Some(4001));
    assert!(now() > told.as_secs());
}

#[tokio::test]
async fn a_token_is_found_beside_non_ascii_headers() {
    let gateway = Gateway::start(&[&JWT[..], &[("api.keys", "t:0123456789abcdef")]].concat()).await;
    let token = token(json!({"sub": "ann", "name": "\u{202E}nnA".repeat(40)}), 60);
    let status = async |path: &str, header: &str| {
        let host = gateway.address;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{header}\r\n\r\n");
        let mut socket = TcpStream::connect(host).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        // Streams have no end.
        let mut line = String::new();
        within(BufReader::new(socket).read_line(&mut line)).await.unwrap();
        line["HTTP/1.1 ".len()..][..3].parse::<u16>().unwrap()
    };
    for header in [
        format!("Cookie: city=Zürich; token={token}"),
        format!("Cookie: a=ü\r\nCookie: b=ö; token=\"{token}\"; c=ä"),
        format!("Authorization: Basic ü\r\nAuthorization: Bearer {token}"),
        format!("User-Agent: Zürich\r\nX-Forwarded-For: ü\r\nAuthorization: bearer {token}"),
    ] {
        assert_eq!(status("/sse?rooms=", &header).await, 200, "{header}");
    }
    let subprotocol = format!("Sec-WebSocket-Protocol: zürich, chat.v1, bearer.{token}");
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==";
    assert_eq!(status("/ws", &format!("{upgrade}\r\n{subprotocol}")).await, 101);
    // A malformed token in a header is used, and rejected, despite a valid one elsewhere.
    let both = format!("Authorization: Bearer ü\r\nCookie: token={token}");
    assert_eq!(status("/sse", &both).await, 401);
    let key = "X-City: Zürich\r\nAuthorization: Basic ü\r\nAuthorization: Bearer 0123456789abcdef";
    assert_eq!(status("/api/v1/online", key).await, 200);
    assert_eq!(status("/api/v1/online?prefix=%FF%", key).await, 200);
}

#[tokio::test]
async fn cookies_are_ignored_from_unlisted_origins() {
    let any = [&JWT[..], &[("server.allowed_origins", "*,https://app.example")]].concat();
    let gateway = Gateway::start(&any).await;
    for (origin, expected) in [
        (None, Ok("ann")),
        (Some("https://app.example"), Ok("ann")),
        (Some("https://evil.example"), Err("token_missing")),
        (Some("null"), Err("token_missing")),
    ] {
        let token = token(json!({"sub": "ann"}), 60);
        let mut options = ConnectOptions::new(gateway.url("/ws"));
        options = options.token(token, TokenLocation::Cookie("token".into()));
        options.origin = origin.map(str::to_owned);
        let mut connection = ClientConnection::open(&options).await.unwrap();
        match expected {
            Ok(user) => {
                let connected = connection.expect_connected().await.unwrap();
                assert_eq!(connected.user.id.as_str(), user, "{origin:?}");
            }
            Err(reason) => assert_eq!(closed(&mut connection).await.1, reason, "{origin:?}"),
        }
    }
}

#[tokio::test]
async fn a_read_only_token_cannot_delete_rooms() {
    let gateway = Gateway::start(&JWT).await;
    let connect = async |rooms: Value| {
        let token = token(json!({"sub": "ann", "rooms": rooms}), 60);
        let options = ConnectOptions::new(gateway.url("/ws")).token(token, TokenLocation::Header);
        let mut ann = ClientConnection::open(&options).await.unwrap();
        ann.expect_connected().await.unwrap();
        ann
    };
    let mut ann = connect(json!({"*": "rw"})).await;
    for name in ["a", "b"] {
        ask(&mut ann, json!({"type": "create_room", "room": name})).await.unwrap();
    }
    let delete = |name: &str| json!({"type": "delete_room", "room": name});
    let mut reader = connect(json!({"a": "r"})).await;
    for name in ["a", "b", "nowhere"] {
        assert_eq!(rejection_code(&mut reader, delete(name)).await, ErrorCode::Forbidden, "{name}");
    }
    let answer = ask(&mut ann, delete("a")).await.unwrap();
    assert!(matches!(answer, ServerFrame::RoomClosed(_)), "{answer:?}");
}

#[tokio::test]
async fn a_token_grants_only_the_rooms_it_names() {
    let gateway = Gateway::start(&JWT).await;
    let claims = json!({"sub": "ann", "rooms": {"team:*": "rw", "news": "r"}});
    let options =
        ConnectOptions::new(gateway.url("/ws")).token(token(claims, 60), TokenLocation::Header);
    let mut ann = ClientConnection::open(&options).await.unwrap();
    ann.expect_connected().await.unwrap();
    ann.join(&room("team:dev")).await.unwrap();
    say(&mut ann, &room("team:dev"), "hi").await;
    ann.join(&room("news")).await.unwrap();
    let content = json!("not allowed");
    for refused in [
        ann.request(&frames::OutgoingMessage::text(&room("news"), &content)).await,
        ann.request(&frames::OutgoingJoin::new(&room("other"))).await,
    ] {
        let Err(RequestError::Rejected(refusal)) = refused else { panic!("{refused:?}") };
        assert_eq!(refusal.code, ErrorCode::Forbidden);
    }
}

#[tokio::test]
async fn refresh_applies_at_once_and_a_bad_token_changes_nothing() {
    let gateway = Gateway::start(&JWT).await;
    let first = token(json!({"sub": "ann", "rooms": {"a": "rw", "b": "rw"}}), 3);
    let options = ConnectOptions::new(gateway.url("/ws")).token(first, TokenLocation::Query);
    let mut ann = ClientConnection::open(&options).await.unwrap();
    ann.expect_connected().await.unwrap();
    for name in ["a", "b"] {
        ann.join(&room(name)).await.unwrap();
    }
    let refresh = |claims, lives_s| json!({"type": "refresh", "token": token(claims, lives_s)});
    let others = refresh(json!({"sub": "bob"}), 60);
    assert_eq!(rejection_code(&mut ann, others).await, ErrorCode::Forbidden);
    for bad in [
        refresh(json!({"sub": "ann"}), -5),
        refresh(json!({"sub": "ann", "nbf": now() + 60}), 90),
        refresh(json!({"sub": "ann", "aud": "another"}), 60),
        json!({"type": "refresh", "token": "x"}),
    ] {
        assert_eq!(rejection_code(&mut ann, bad).await, ErrorCode::Unauthorized);
    }
    say(&mut ann, &room("a"), "still the old one").await;
    let narrower = refresh(json!({"sub": "ann", "rooms": {"a": "r", "c": "rw"}}), 60);
    let ServerFrame::Refreshed(refreshed) = ask(&mut ann, narrower).await.unwrap() else {
        panic!()
    };
    assert!(refreshed.expires_at.ends_with('Z'));
    let left = next_matching(&mut ann, |frame| match frame {
        ServerFrame::Left(left) => Some((left.room, left.reason)),
        _ => None,
    });
    assert_eq!(left.await, (room("b"), Some(LeftReason::Forbidden)));
    let content = json!("read only now");
    let message =
        serde_json::to_value(frames::OutgoingMessage::text(&room("a"), &content)).unwrap();
    assert_eq!(rejection_code(&mut ann, message).await, ErrorCode::Forbidden);
    ann.join(&room("c")).await.unwrap();
    // The first token expires without effect: later requests are answered.
    let until = tokio::time::Instant::now() + tokio::time::Duration::from_secs(4);
    while tokio::time::Instant::now() < until {
        ask(&mut ann, json!({"type": "ping"})).await.unwrap();
        crate::harness::poll_pause().await;
    }
}
