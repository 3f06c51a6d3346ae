//! Requirements on Redis: version, eviction policy, permissions, unique node ids. A violation is
//! named at the start and while running, and retried rarely.

use std::time::Duration;

use gateway::{
    config::{Config, ConfigSources},
    server::{Server, StartError},
};
use serde_json::json;
use skein_client::connection::{ClientConnection, RequestError};
use skein_protocol::{error::ErrorCode, ids::RoomId};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep_until},
};

use crate::harness::{Gateway, Redis, connect, get, poll_pause, room, say, until, within};

/// The permissions that docs/operations.md requires, without `config|get`.
const PERMISSIONS: &str = "~gw:* &gw:* +@all -@dangerous +info";

/// Starts a Redis with an ACL user for gateways. Returns its URL.
async fn redis_with_gateway_user() -> (Redis, String) {
    let redis = Redis::start().await;
    redis.command(&format!("ACL SETUSER gw on >secret {PERMISSIONS}")).await;
    let url = format!("redis://gw:secret@{}", redis.address());
    (redis, url)
}

fn cluster(url: &str) -> [(&str, &str); 2] {
    [("cluster.redis_url", url), ("auth.allow_anonymous", "true")]
}

async fn is_failing(gateway: &Gateway, name: &str) -> bool {
    let ready = get(gateway.admin, "/ready").await;
    ready.status == 503 && ready.body.contains(&format!("[\"{name}\"]"))
}

async fn is_ready(gateway: &Gateway) -> bool {
    get(gateway.admin, "/ready").await.status == 200
}

async fn connections_received(redis: &Redis) -> u64 {
    let mut socket = TcpStream::connect(redis.address()).await.unwrap();
    socket.write_all(b"INFO stats\r\nQUIT\r\n").await.unwrap();
    let mut info = String::new();
    socket.read_to_string(&mut info).await.unwrap();
    let line = info.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
    line.unwrap().parse().unwrap()
}

/// The error code of a rejected publish.
async fn publish_rejection(connection: &mut ClientConnection, lobby: &RoomId) -> Option<ErrorCode> {
    let message = json!({"type": "message", "room": lobby, "content": "x", "ref": 1});
    match connection.request(&message).await {
        Err(RequestError::Rejected(refusal)) => Some(refusal.code),
        Ok(_) => None,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicting_policy_is_detected_without_config_permission() {
    let (redis, url) = redis_with_gateway_user().await;
    redis.command("CONFIG SET maxmemory-policy volatile-lru").await;
    let gateway = Gateway::start(&cluster(&url)).await;
    assert!(is_failing(&gateway, "maxmemory_policy").await);
    redis.command("CONFIG SET maxmemory-policy noeviction").await;
    until("ready", async || is_ready(&gateway).await).await;
    redis.command("CONFIG SET maxmemory-policy allkeys-lru").await;
    until("not ready", async || is_failing(&gateway, "maxmemory_policy").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_permission_is_named_and_recovers_when_granted() {
    let (redis, url) = redis_with_gateway_user().await;
    let gateway = Gateway::start(&cluster(&url)).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    say(&mut ann, &lobby, "before").await;
    for (taken, given) in [("-evalsha", "+evalsha"), ("-xadd", "+xadd"), ("-publish", "+publish")] {
        redis.command(&format!("ACL SETUSER gw {taken}")).await;
        // A missing permission is found at its next use, or by a periodic check.
        until(taken, async || {
            let code = publish_rejection(&mut ann, &lobby).await;
            assert!(matches!(code, None | Some(ErrorCode::Unavailable)), "{taken}: {code:?}");
            is_failing(&gateway, "redis_permission").await
        })
        .await;
        assert_eq!(
            publish_rejection(&mut ann, &lobby).await,
            Some(ErrorCode::Unavailable),
            "{taken}"
        );
        redis.command(&format!("ACL SETUSER gw {given}")).await;
        until(given, async || is_ready(&gateway).await).await;
        until(given, async || publish_rejection(&mut ann, &lobby).await.is_none()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_channel_permission_is_named_and_retried_rarely() {
    let (redis, url) = redis_with_gateway_user().await;
    redis.command("ACL SETUSER gw resetchannels").await;
    let config = ConfigSources {
        file: None,
        environment: Some(Default::default()),
        flags: [("server.listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0")]
            .iter()
            .chain(&cluster(&url))
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    };
    // The start waits for the permission.
    let starting = tokio::spawn(Server::start(Config::load(config).unwrap()));
    sleep_until(Instant::now() + Duration::from_secs(1)).await;
    let before = connections_received(&redis).await;
    sleep_until(Instant::now() + Duration::from_secs(1)).await;
    let attempts = connections_received(&redis).await - before;
    assert!(attempts < 10, "{attempts} connections in a second");
    redis.command("ACL SETUSER gw &gw:*").await;
    let server = within(starting).await.unwrap().unwrap();
    let ready = async || get(server.admin_listen, "/ready").await;
    // The permission is revoked while the node runs.
    redis.command("ACL SETUSER gw resetchannels").await;
    until("not ready", async || ready().await.body.contains("redis_permission")).await;
    let before = connections_received(&redis).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(ready().await.status, 503);
        poll_pause().await;
    }
    let attempts = connections_received(&redis).await - before;
    assert!(attempts < 20, "{attempts} connections in a second");
    redis.command("ACL SETUSER gw &gw:*").await;
    until("ready", async || ready().await.status == 200).await;
    assert!(server.stop().await);
}

/// A fake Redis that only reports its version.
async fn pretend(version: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer_as(version, socket));
        }
    });
    url
}

async fn answer_as(version: &'static str, socket: TcpStream) {
    let (reader, mut writer) = socket.into_split();
    let mut lines = BufReader::new(reader).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Some(count) = line.strip_prefix('*') else { return };
        let mut words = Vec::new();
        for _ in 0..count.parse::<usize>().unwrap() {
            lines.next_line().await.unwrap();
            words.push(lines.next_line().await.unwrap().unwrap());
        }
        let answer = match words[0].as_str() {
            "HELLO" => "%1\r\n$5\r\nproto\r\n:3\r\n".to_owned(),
            "INFO" => {
                let info = format!(
                    "redis_version:{version}\r\nrun_id:0123456789\r\nrole:master\r\nmaster_replid:0123456789\r\n"
                );
                format!("${}\r\n{info}\r\n", info.len())
            }
            _ => "+OK\r\n".to_owned(),
        };
        if writer.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

async fn start_error(extra: &[(&str, &str)]) -> StartError {
    let flags = [("server.listen", "127.0.0.1:0"), ("admin.listen", "127.0.0.1:0")];
    let flags = flags.iter().chain(extra);
    let config = ConfigSources {
        file: None,
        environment: Some(Default::default()),
        flags: flags.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    };
    match within(Server::start(Config::load(config).unwrap())).await {
        Ok(_) => panic!("it starts"),
        Err(error) => error,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_does_not_start_on_redis_before_7() {
    let url = pretend("6.2.14").await;
    let error = start_error(&cluster(&url)).await.to_string();
    assert!(error.contains("6.2.14") && error.contains("7.0"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_gateway_with_the_same_id_does_not_start() {
    let redis = Redis::start().await;
    let url = redis.url();
    let with_id = [&cluster(&url)[..], &[("node.id", "gw-1")]].concat();
    let first = Gateway::start(&with_id).await;
    let begun = Instant::now();
    let error = start_error(&with_id).await.to_string();
    assert!(error.contains("also named gw-1"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    // The first gateway is unaffected.
    let lobby = room("lobby");
    let mut ann = connect(first.address, "ann").await;
    ann.join(&lobby).await.unwrap();
    say(&mut ann, &lobby, "on").await;
    assert!(is_ready(&first).await);
    first.stop().await;
    // It has released its lease.
    Gateway::start(&with_id).await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_most_one_of_two_gateways_with_the_same_id_stays() {
    let redis = Redis::start().await;
    let url = redis.url();
    let flags = [
        ("server.listen", "127.0.0.1:0"),
        ("admin.listen", "127.0.0.1:0"),
        ("node.id", "gw-1"),
        ("cluster.redis_url", &url),
        ("auth.allow_anonymous", "true"),
    ];
    let start = || {
        let flags = flags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let flags = flags.collect();
        let config = ConfigSources { file: None, environment: Some(Default::default()), flags };
        Box::pin(within(Server::start(Config::load(config).unwrap())))
    };
    let (one, two) = tokio::join!(start(), start());
    assert!(one.is_err() || two.is_err());
}
