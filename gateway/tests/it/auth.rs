//! Tokens: where they may stand, what they allow, and that they end.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use shared::{
    client::{
        connection::{Connection, Unexpected},
        frames,
        options::{Options, Placement},
    },
    error::ErrorCode,
    protocol::answer::{Answer, LeftReason},
};

use crate::{
    harness::{Gateway, closed, room, say},
    people::{ask, heard, refused},
};

const SECRET: &str = "a secret of at least thirty-two bytes";
pub const JWT: [(&str, &str); 2] = [("auth.mode", "jwt"), ("auth.jwt_secret", SECRET)];

pub fn token(mut claims: Value, lives_s: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    claims["exp"] = json!(now.saturating_add_signed(lives_s));
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
}

#[tokio::test]
async fn a_token_may_stand_in_four_places() {
    let gateway = Gateway::start(&JWT).await;
    for placement in [
        Placement::Query,
        Placement::Header,
        Placement::Cookie("token".into()),
        Placement::Subprotocol,
    ] {
        let token = token(json!({"sub": "ann", "name": "Ann"}), 60);
        let options = Options::to(gateway.url("/ws")).token(token, placement.clone());
        let mut ann = Connection::open(&options).await.unwrap();
        let connected = ann.expect_connected().await.unwrap();
        assert_eq!(connected.user.id.as_str(), "ann", "{placement:?}");
        assert_eq!(connected.user.name.as_str(), "Ann");
        assert!(connected.expires_at.is_some());
    }
}

#[tokio::test]
async fn a_bad_token_is_told_by_a_close_and_is_not_mended_by_another() {
    let gateway = Gateway::start(&JWT).await;
    let refusal = async |options: Options| {
        let mut connection = Connection::open(&options).await.unwrap();
        closed(&mut connection).await
    };
    let url = gateway.url("/ws");
    let policy = |reason: &str| (Some(1008), reason.to_owned());
    assert_eq!(refusal(Options::to(&url)).await, policy("token_missing"));
    let old = token(json!({"sub": "ann"}), -5);
    let old = Options::to(&url).token(old, Placement::Query);
    assert_eq!(refusal(old).await, policy("token_expired"));
    let good = token(json!({"sub": "ann"}), 60);
    let mut both = Options::to(&url).token(good, Placement::Header);
    both.query.push(("token".into(), "bad".into()));
    assert_eq!(refusal(both).await, policy("token_invalid"));
    // In jwt mode nobody is who they say, also where a cluster may be anonymous.
    let open = Gateway::start(&[&JWT[..], &[("auth.allow_anonymous", "true")]].concat()).await;
    let anonymous = Options::to(open.url("/ws")).user("ann");
    assert_eq!(refusal(anonymous).await, policy("token_missing"));
}

#[tokio::test]
async fn an_anonymous_user_with_a_bad_id_is_refused() {
    let gateway = Gateway::start(&[]).await;
    for bad in ["a b", "_api", ""] {
        let options = Options::to(gateway.url("/ws")).user(bad);
        let mut connection = Connection::open(&options).await.unwrap();
        assert_eq!(closed(&mut connection).await, (Some(1008), "user_invalid".into()), "{bad:?}");
    }
}

#[tokio::test]
async fn a_connection_ends_with_its_token() {
    let gateway = Gateway::start(&JWT).await;
    let token = token(json!({"sub": "ann"}), 4);
    let options = Options::to(gateway.url("/ws")).token(token, Placement::Query);
    let mut ann = Connection::open(&options).await.unwrap();
    ann.expect_connected().await.unwrap();
    assert_eq!(closed(&mut ann).await.0, Some(4001));
}

#[tokio::test]
async fn a_token_opens_the_rooms_it_names() {
    let gateway = Gateway::start(&JWT).await;
    let claims = json!({"sub": "ann", "rooms": {"team:*": "rw", "news": "r"}});
    let options = Options::to(gateway.url("/ws")).token(token(claims, 60), Placement::Header);
    let mut ann = Connection::open(&options).await.unwrap();
    ann.expect_connected().await.unwrap();
    ann.join(&room("team:dev")).await.unwrap();
    say(&mut ann, &room("team:dev"), "hi").await;
    ann.join(&room("news")).await.unwrap();
    let content = json!("not allowed");
    for refused in [
        ann.request(&frames::Message::to(&room("news"), &content)).await,
        ann.request(&frames::Join::to(&room("other"))).await,
    ] {
        let Err(Unexpected::Refused(refusal)) = refused else { panic!("{refused:?}") };
        assert_eq!(refusal.code, ErrorCode::Forbidden);
    }
}

#[tokio::test]
async fn another_token_holds_at_once_and_a_bad_one_changes_nothing() {
    let gateway = Gateway::start(&JWT).await;
    let first = token(json!({"sub": "ann", "rooms": {"a": "rw", "b": "rw"}}), 3);
    let options = Options::to(gateway.url("/ws")).token(first, Placement::Query);
    let mut ann = Connection::open(&options).await.unwrap();
    ann.expect_connected().await.unwrap();
    for name in ["a", "b"] {
        ann.join(&room(name)).await.unwrap();
    }
    let refresh = |claims, lives_s| json!({"type": "refresh", "token": token(claims, lives_s)});
    let others = refresh(json!({"sub": "bob"}), 60);
    assert_eq!(refused(&mut ann, others).await, ErrorCode::Forbidden);
    for bad in [refresh(json!({"sub": "ann"}), -5), json!({"type": "refresh", "token": "x"})] {
        assert_eq!(refused(&mut ann, bad).await, ErrorCode::Unauthorized);
    }
    say(&mut ann, &room("a"), "still the old one").await;
    let narrower = refresh(json!({"sub": "ann", "rooms": {"a": "r", "c": "rw"}}), 60);
    let Answer::Refreshed(refreshed) = ask(&mut ann, narrower).await.unwrap() else { panic!() };
    assert!(refreshed.expires_at.ends_with('Z'));
    let left = heard(&mut ann, |frame| match frame {
        Answer::Left(left) => Some((left.room, left.reason)),
        _ => None,
    });
    assert_eq!(left.await, (room("b"), Some(LeftReason::Forbidden)));
    let content = json!("read only now");
    let message = serde_json::to_value(frames::Message::to(&room("a"), &content)).unwrap();
    assert_eq!(refused(&mut ann, message).await, ErrorCode::Forbidden);
    ann.join(&room("c")).await.unwrap();
    // The first token ends, and with it nothing: what is asked later is answered.
    let until = tokio::time::Instant::now() + tokio::time::Duration::from_secs(4);
    while tokio::time::Instant::now() < until {
        ask(&mut ann, json!({"type": "ping"})).await.unwrap();
        crate::harness::poll_pause().await;
    }
}
