//! Invalid values in Redis that no gateway wrote: each kind in each key of a running cluster. The
//! nodes stay ready, other rooms keep working, the room itself recovers, the value is counted, and
//! no node retries in a busy loop.

use std::{net::SocketAddr, time::Duration};

use futures_util::future::join_all;
use serde_json::{Value, json};
use skein_client::connection::ClientConnection;
use skein_core::bus::placement::partition_of;
use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId},
    protocol::server_frame::ServerFrame,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};

use crate::harness::{
    Gateway, Redis, get, message_fields, next_message, poll_pause, room, say, until, within,
};

/// Maximum time until a room has recovered.
const RECOVERS_MAX: Duration = Duration::from_secs(5);

pub type Command = Vec<Vec<u8>>;

/// A command of text words.
pub fn words(text: &str) -> Command {
    text.split(' ').map(|word| word.as_bytes().to_vec()).collect()
}

/// Sends commands, and returns the first line of each reply.
pub async fn call(redis: &Redis, commands: &[Command]) -> String {
    let mut socket = TcpStream::connect(redis.address()).await.unwrap();
    for command in commands {
        let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
        for word in command {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        socket.write_all(&bytes).await.unwrap();
    }
    socket.write_all(b"*1\r\n$4\r\nQUIT\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(!answer.contains("-ERR") && !answer.contains("-WRONG"), "{answer}");
    answer
}

/// The value of a metric, summed over all labels with this prefix.
async fn metric(admin: SocketAddr, name: &str) -> u64 {
    let body = get(admin, "/metrics").await.body;
    let values = body.lines().filter_map(|line| line.strip_prefix(name)?.rsplit(' ').next());
    values.map(|value| value.parse::<u64>().unwrap()).sum()
}

/// An envelope of `room` with these fields.
pub fn envelope(room: &RoomId, fields: impl FnOnce(MessageId) -> String) -> Vec<u8> {
    let id = MessageId::random();
    let parts = EnvelopeParts {
        frame: Default::default(),
        author: AuthorHash::of(&"eve".parse().unwrap()),
        id,
        sender: ConnectionId::random(),
        echo: true,
        fields: &fields(id),
        binary_payload: None,
    };
    let _ = room;
    Envelope::pack(parts).as_bytes().to_vec()
}

struct TwoNodes {
    redis: Redis,
    a: Gateway,
    b: Gateway,
}

impl TwoNodes {
    async fn start() -> Self {
        let redis = Redis::start().await;
        let (a, b) = tokio::join!(
            Gateway::start_on(&redis, &[("node.id", "a")]),
            Gateway::start_on(&redis, &[("node.id", "b")])
        );
        Self { redis, a, b }
    }

    async fn invalid_values(&self, kind: &str) -> u64 {
        let name = format!("gateway_redis_invalid_values_total{{kind=\"{kind}\"}}");
        metric(self.a.admin, &name).await + metric(self.b.admin, &name).await
    }

    async fn are_ready(&self) -> bool {
        get(self.a.admin, "/ready").await.status == 200
            && get(self.b.admin, "/ready").await.status == 200
    }

    /// Creates a room with a member on the first node and three messages, and applies `case` to it.
    async fn check_case(&self, number: usize, case: &InvalidValueCase) {
        let name = format!("c{number}");
        let lobby = room(&name);
        let mut ann = self.a.connect(&format!("ann{number}")).await;
        ann.join(&lobby).await.unwrap();
        for text in ["1", "2", "3"] {
            say(&mut ann, &lobby, text).await;
            next_message(&mut ann).await;
        }
        let base = format!("gw:{{{}}}:r:{name}", partition_of(&lobby, 256));
        let top = epoch_of(&mut ann, &lobby).await;
        let planted = (case.plant)(&RoomUnderTest { base: &base, epoch: &top, room: &lobby });
        call(&self.redis, &planted).await;

        let begun = Instant::now();
        // A client on the node without a replica of the room.
        let mut bob = self.b.connect(&format!("bob{number}")).await;
        let joined = timeout(RECOVERS_MAX, join_until_accepted(&mut bob, &lobby)).await;
        assert!(joined.is_ok(), "{}: no join is accepted", case.name);
        // An existing member keeps working.
        let said = timeout(RECOVERS_MAX, publish_until_acked(&mut ann, &lobby)).await;
        let said = said.unwrap_or_else(|_| panic!("{}: no publish is acknowledged", case.name));
        let heard = async { while next_message(&mut bob).await.id != said {} };
        assert!(timeout(RECOVERS_MAX, heard).await.is_ok(), "{}: no message arrives", case.name);
        let counted = async || self.invalid_values(case.kind).await > 0;
        until(case.name, counted).await;
        println!("{}: {:?}", case.name, begun.elapsed());
    }
}

/// The epoch of a room.
async fn epoch_of(ann: &mut ClientConnection, lobby: &RoomId) -> String {
    ann.join(lobby).await.unwrap().epoch.to_string()
}

/// Retries a join until it is accepted.
async fn join_until_accepted(connection: &mut ClientConnection, lobby: &RoomId) {
    while connection.join(lobby).await.is_err() {
        poll_pause().await;
    }
}

/// Retries a publish until it is acknowledged.
async fn publish_until_acked(connection: &mut ClientConnection, lobby: &RoomId) -> MessageId {
    loop {
        let message = json!({"type": "message", "room": lobby, "content": "on", "ref": 1});
        match connection.request(&message).await.unwrap() {
            ServerFrame::Ack(ack) => return ack.id,
            ServerFrame::Error(_) => poll_pause().await,
            other => panic!("{other:?}"),
        }
    }
}

struct RoomUnderTest<'a> {
    base: &'a str,
    epoch: &'a str,
    room: &'a RoomId,
}

impl RoomUnderTest<'_> {
    fn words(&self, text: &str) -> Command {
        words(&text.replace("$r", self.base).replace("$e", self.epoch))
    }

    /// An entry after the third, with matching meta, published to subscribers.
    fn entry(&self, epoch: &str, stamp: &str, envelope: Vec<u8>) -> Vec<Command> {
        let mut add = self.words(&format!("XADD $r:log 4-0 e {epoch} t {stamp} p"));
        let mut publish = self.words("PUBLISH $r");
        publish.push([format!("{epoch}:4:{stamp}\n").as_bytes(), &envelope].concat());
        add.push(envelope);
        vec![add, self.words("HSET $r:meta s 4"), publish]
    }

    fn entry_of(&self, fields: impl FnOnce(MessageId) -> String) -> Vec<Command> {
        self.entry(self.epoch, ORIGIN, envelope(self.room, fields))
    }
}

const ORIGIN: &str = "0123456789abcdef";

struct InvalidValueCase {
    name: &'static str,
    kind: &'static str,
    plant: fn(&RoomUnderTest<'_>) -> Vec<Command>,
}

macro_rules! cases {
    ($($name:literal $kind:literal: $plant:expr;)+) => {
        [$(InvalidValueCase { name: $name, kind: $kind, plant: $plant }),+]
    };
}

fn room_cases() -> Vec<InvalidValueCase> {
    let cases = cases! {
        "fields that are not JSON" "entry": |p| p.entry_of(|_| r#""room":"r",,bad"#.to_owned());
        "fields of another room" "entry": |p| p.entry_of(|id| message_fields(&room("x"), id, Some("x")));
        "fields without content" "entry": |p| p.entry_of(|id| message_fields(p.room, id, None));
        "fields with a seq" "entry": |p| p.entry_of(|id| {
            message_fields(p.room, id, Some("x")) + r#","seq":9"#
        });
        "another id" "entry": |p| p.entry_of(|_| message_fields(p.room, MessageId::random(), Some("x")));
        "no envelope" "entry": |p| p.entry(p.epoch, ORIGIN, b"\x02\x00".to_vec());
        "a message in a room's channel" "pubsub_message": |p| vec![p.words("PUBLISH $r $e:5:no")];
        "an ephemeral event in a room's channel" "pubsub_message": |p| vec![p.words("PUBLISH $r !p")];
        "an entry with other fields" "entry": |p| {
            vec![p.words("XADD $r:log 4-0 x y"), p.words("HSET $r:meta s 4")]
        };
        "an entry with a future epoch" "entry": |p| {
            p.entry("999-z", ORIGIN, envelope(p.room, |id| message_fields(p.room, id, Some("x"))))
        };
        "an entry with an invalid origin" "entry": |p| {
            p.entry(p.epoch, "no", envelope(p.room, |id| message_fields(p.room, id, Some("x"))))
        };
        "entries above the top" "log_meta": |p| {
            vec![p.words("XADD $r:log 9-0 x y"), p.words("HSET $r:meta s 3")]
        };
        "the highest possible entry" "log_meta": |p| {
            vec![p.words("XADD $r:log 18446744073709551615-18446744073709551615 x y")]
        };
        "an invalid seq" "log_meta": |p| vec![p.words("HSET $r:meta s no")];
        "a seq at the maximum" "log_meta": |p| vec![p.words("HSET $r:meta s 9007199254740991")];
        "an invalid epoch" "log_meta": |p| vec![p.words("HSET $r:meta e é!")];
        "invalid retention fields" "log_meta": |p| {
            vec![p.words("HSET $r:meta at x from y prev z d no pe ? ps ?")]
        };
        "an invalid agreement generation" "log_meta": |p| vec![p.words("HSET $r:meta n no r no")];
        "meta of another type" "key_type": |p| vec![p.words("DEL $r:meta"), p.words("SET $r:meta x")];
        "a log of another type" "key_type": |p| vec![p.words("DEL $r:log"), p.words("SET $r:log x")];
        "ids of another type" "key_type": |p| {
            let ids = ["DEL $r:ids0 $r:ids1", "SET $r:ids0 x", "RPUSH $r:ids1 x"];
            ids.map(|text| p.words(text)).to_vec()
        };
        "presence of another type" "key_type": |p| {
            vec![p.words("DEL $r:who"), p.words("SET $r:who x")]
        };
        "a record of another type" "key_type": |p| vec![p.words("SET $r:record x")];
        "read marks of another type" "key_type": |p| vec![p.words("SET $r:marks x")];
        "an invalid presence version" "presence": |p| vec![p.words("HSET $r:who # no")];
        "an invalid presence entry" "presence": |p| vec![p.words("HSET $r:who a*b no ann no")];
        "an invalid member limit" "room_config": |p| vec![p.words("HSET $r:record max no")];
        "an invalid read mark" "read_mark": |p| {
            let name = p.room.as_str().trim_start_matches('c');
            vec![p.words(&format!("HSET $r:marks bob{name} no"))]
        };
        "invalid unconfirmed publishes" "unconfirmed": |p| {
            vec![
                p.words("HSET $r:unheard ?a:x no $e:99999999999 no"),
                p.words("HSET $r:meta r no"),
            ]
        };
    };
    cases.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_values_in_a_room_affect_only_it_and_are_repaired() {
    let nodes = TwoNodes::start().await;
    let other = room("other");
    let (mut eve, mut fay) = (nodes.a.connect("eve").await, nodes.b.connect("fay").await);
    eve.join(&other).await.unwrap();
    fay.join(&other).await.unwrap();
    let cases = room_cases();
    let shown = cases.iter().enumerate().map(|(n, case)| Box::pin(nodes.check_case(n, case)));
    let show = join_all(shown);
    let talk = async {
        loop {
            say(&mut eve, &other, "on").await;
            assert!(timeout(RECOVERS_MAX, next_message(&mut fay)).await.is_ok());
            assert!(nodes.are_ready().await);
            poll_pause().await;
        }
    };
    tokio::select! {
        _ = show => {}
        () = talk => {}
    }
    assert_no_busy_retries(&nodes, cases.len()).await;
}

/// Asserts that no node reads the same keys in a busy loop, once all repairs are done.
async fn assert_no_busy_retries(nodes: &TwoNodes, rooms: usize) {
    let processed = async || {
        let info = call(&nodes.redis, &[words("INFO stats")]).await;
        let line = info.lines().find_map(|line| line.strip_prefix("total_commands_processed:"));
        line.unwrap().parse::<u64>().unwrap()
    };
    let begun = Instant::now();
    loop {
        let before = processed().await;
        sleep_until(Instant::now() + Duration::from_secs(1)).await;
        let asked = processed().await - before;
        println!("{asked} commands in a second, {rooms} rooms with invalid values");
        if asked < 1000 {
            return;
        }
        assert!(begun.elapsed() < RECOVERS_MAX, "{asked} commands in a second");
    }
}

/// Invalid values in the single keys of the cluster.
const SHARED_KEY_CASES: [(&str, &str, &[&str]); 22] = [
    ("an invalid lease", "lease", &["HSET gw:leases junk junk"]),
    ("a lease of a process", "lease", &["HSET gw:leases x/y junk"]),
    ("a lease at the maximum", "lease", &["HSET gw:leases x/y 99999999999999 1 1"]),
    ("a count of leases", "lease", &["HSET gw:leases # no"]),
    ("leases of another type", "key_type", &["DEL gw:leases", "SET gw:leases x"]),
    (
        "invalid generations of the barrier",
        "barrier",
        &["HSET gw:barrier n no owed no busy no t0 no"],
    ),
    ("an invalid server id", "-", &["HSET gw:barrier t no"]),
    ("a barrier of another type", "key_type", &["DEL gw:barrier", "SET gw:barrier x"]),
    ("rooms of another type", "key_type", &["DEL gw:rooms", "SET gw:rooms x"]),
    ("users of another type", "key_type", &["DEL gw:users", "SET gw:users x"]),
    ("online users of another type", "key_type", &["DEL gw:online:who", "SET gw:online:who x"]),
    ("an invalid online user", "presence", &["HSET gw:online:who eve no"]),
    (
        "last online times of another type",
        "key_type",
        &["DEL gw:online:seen", "SET gw:online:seen x"],
    ),
    ("an incarnation of an unknown node", "-", &["HSET gw:incarnations x junk"]),
    ("incarnations of another type", "-", &["DEL gw:incarnations", "SET gw:incarnations x"]),
    ("an invalid control command", "command", &["XADD gw:orders * o junk"]),
    ("a control command without fields", "command", &["XADD gw:orders * x y"]),
    ("control commands of another type", "key_type", &["DEL gw:orders", "SET gw:orders x"]),
    (
        "the command list of another type",
        "key_type",
        &["DEL gw:orders:list", "LPUSH gw:orders:list x"],
    ),
    (
        "applied commands of another type",
        "key_type",
        &["DEL gw:orders:nodes", "SET gw:orders:nodes x"],
    ),
    ("an invalid wake-up", "-", &["PUBLISH gw:pokes junk"]),
    ("sessions of another type", "key_type", &["DEL $s:sessions", "SET $s:sessions x"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn invalid_values_in_shared_keys_are_repaired() {
    let nodes = TwoNodes::start().await;
    let other = room("other");
    let (mut eve, mut fay) = (nodes.a.connect("eve").await, nodes.b.connect("fay").await);
    eve.join(&other).await.unwrap();
    fay.join(&other).await.unwrap();
    let inbox = RoomId::inbox_of(&"gil".parse().unwrap());
    let base = format!("gw:{{{}}}:u:gil", partition_of(&inbox, 256));
    for (name, kind, planted) in SHARED_KEY_CASES {
        let before = nodes.invalid_values(kind).await;
        let planted: Vec<Command> =
            planted.iter().map(|text| words(&text.replace("$s", &base))).collect();
        call(&nodes.redis, &planted).await;
        let begun = Instant::now();
        let on = async {
            // A new client, requests for presence and rooms, and a message.
            let mut gil = nodes.b.connect_when_ready("gil").await;
            join_until_accepted(&mut gil, &other).await;
            let asks = json!({"type": "presence", "ref": 1});
            while !matches!(gil.request(&asks).await.unwrap(), ServerFrame::Presence(_)) {}
            let lists = json!({"type": "rooms", "ref": 2});
            while !matches!(gil.request(&lists).await.unwrap(), ServerFrame::Rooms(_)) {}
            let id = publish_until_acked(&mut eve, &other).await;
            while next_message(&mut fay).await.id != id {}
            gil.send_json(&json!({"type": "leave", "room": other})).await.unwrap();
        };
        assert!(timeout(RECOVERS_MAX, on).await.is_ok(), "{name}: the cluster does not recover");
        let is_good = async || {
            nodes.are_ready().await && (kind == "-" || nodes.invalid_values(kind).await > before)
        };
        let good = timeout(RECOVERS_MAX, until(name, is_good)).await;
        assert!(
            good.is_ok(),
            "{name}: ready {}, counted {}",
            nodes.are_ready().await,
            nodes.invalid_values(kind).await - before
        );
        println!("{name}: {:?}", begun.elapsed());
    }
    assert_no_busy_retries(&nodes, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_sessions_and_session_data_are_ignored() {
    let nodes = TwoNodes::start().await;
    let inbox = RoomId::inbox_of(&"ann".parse().unwrap());
    let base = format!("gw:{{{}}}:u:ann", partition_of(&inbox, 256));
    let mut ann = nodes.a.connect("ann").await;
    let set = json!({"type": "session_set", "data": {"a": 1}, "ref": 1});
    assert!(matches!(ann.request(&set).await.unwrap(), ServerFrame::Session(_)));
    let rows = format!("HVALS {base}:data");
    assert!(call(&nodes.redis, &[words(&rows)]).await.contains(r#"{"a":1}"#));
    // Invalid values for all data of this user, and an invalid session.
    let junk = format!(
        "EVAL for,i,k,in,ipairs(redis.call('HKEYS','{base}:data'))do,redis.call('HSET','{base}:data',k,'no')end 0"
    );
    let mut junk = words(&junk);
    junk[1] = String::from_utf8(junk[1].clone())
        .unwrap()
        .replacen("for,i,k,in,", "for i,k in ", 1)
        .replace(")do,", ") do ")
        .replace(")end", ") end")
        .into_bytes();
    call(&nodes.redis, &[junk, words(&format!("HSET {base}:sessions junk junk"))]).await;
    let get = json!({"type": "session_get", "ref": 2});
    let ServerFrame::Session(session) = ann.request(&get).await.unwrap() else { panic!() };
    assert_eq!(Value::Object(session.data), json!({}));
    within(nodes.b.connect("ann")).await;
    assert!(nodes.invalid_values("session").await >= 2);
}
