//! What stands in Redis that no gateway wrote: each kind of it in each key of a living cluster. The
//! nodes stay ready, other rooms go on, the room itself recovers, it is counted, and nobody asks
//! Redis again and again.

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

/// Within what a room has to be itself again.
const RECOVERS_MAX: Duration = Duration::from_secs(5);

type Command = Vec<Vec<u8>>;

/// A command in words that are text.
fn words(text: &str) -> Command {
    text.split(' ').map(|word| word.as_bytes().to_vec()).collect()
}

/// Sends commands, and returns the first line of each answer that has one.
async fn call(redis: &Redis, commands: &[Command]) -> String {
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

/// The value of a metric, all labels that begin so together.
async fn metric(admin: SocketAddr, name: &str) -> u64 {
    let body = get(admin, "/metrics").await.body;
    let values = body.lines().filter_map(|line| line.strip_prefix(name)?.rsplit(' ').next());
    values.map(|value| value.parse::<u64>().unwrap()).sum()
}

/// What an envelope of `room` looks like that is none.
fn envelope(room: &RoomId, fields: impl FnOnce(MessageId) -> String) -> Vec<u8> {
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

struct World {
    redis: Redis,
    a: Gateway,
    b: Gateway,
}

impl World {
    async fn start() -> Self {
        let redis = Redis::start().await;
        let (a, b) = tokio::join!(
            Gateway::start_on(&redis, &[("node.id", "a")]),
            Gateway::start_on(&redis, &[("node.id", "b")])
        );
        Self { redis, a, b }
    }

    async fn bad_values(&self, kind: &str) -> u64 {
        let name = format!("gateway_redis_invalid_values_total{{kind=\"{kind}\"}}");
        metric(self.a.admin, &name).await + metric(self.b.admin, &name).await
    }

    async fn are_ready(&self) -> bool {
        get(self.a.admin, "/ready").await.status == 200
            && get(self.b.admin, "/ready").await.status == 200
    }

    /// A room with a member on the first node and three messages, into which `case` puts something.
    async fn show(&self, number: usize, case: &Case) {
        let name = format!("c{number}");
        let lobby = room(&name);
        let mut ann = self.a.connect(&format!("ann{number}")).await;
        ann.join(&lobby).await.unwrap();
        for text in ["1", "2", "3"] {
            say(&mut ann, &lobby, text).await;
            next_message(&mut ann).await;
        }
        let base = format!("gw:{{{}}}:r:{name}", partition_of(&lobby, 256));
        let top = ann_epoch(&mut ann, &lobby).await;
        let planted = (case.plant)(&Planted { base: &base, epoch: &top, room: &lobby });
        call(&self.redis, &planted).await;

        let begun = Instant::now();
        // A client on the node that does not hold the room.
        let mut bob = self.b.connect(&format!("bob{number}")).await;
        let joined = timeout(RECOVERS_MAX, recovers(&mut bob, &lobby)).await;
        assert!(joined.is_ok(), "{}: nobody can join", case.name);
        // Who is a member already goes on.
        let said = timeout(RECOVERS_MAX, until_said(&mut ann, &lobby)).await;
        let said = said.unwrap_or_else(|_| panic!("{}: nothing can be said", case.name));
        let heard = async { while next_message(&mut bob).await.id != said {} };
        assert!(timeout(RECOVERS_MAX, heard).await.is_ok(), "{}: nothing is heard", case.name);
        let counted = async || self.bad_values(case.kind).await > 0;
        until(case.name, counted).await;
        println!("{}: {:?}", case.name, begun.elapsed());
    }
}

/// The epoch of a room.
async fn ann_epoch(ann: &mut ClientConnection, lobby: &RoomId) -> String {
    ann.join(lobby).await.unwrap().epoch.to_string()
}

/// Joins, however often that is refused.
async fn recovers(connection: &mut ClientConnection, lobby: &RoomId) {
    while connection.join(lobby).await.is_err() {
        poll_pause().await;
    }
}

/// Sends until it is acknowledged.
async fn until_said(connection: &mut ClientConnection, lobby: &RoomId) -> MessageId {
    loop {
        let message = json!({"type": "message", "room": lobby, "content": "on", "ref": 1});
        match connection.request(&message).await.unwrap() {
            ServerFrame::Ack(ack) => return ack.id,
            ServerFrame::Error(_) => poll_pause().await,
            other => panic!("{other:?}"),
        }
    }
}

struct Planted<'a> {
    base: &'a str,
    epoch: &'a str,
    room: &'a RoomId,
}

impl Planted<'_> {
    fn words(&self, text: &str) -> Command {
        words(&text.replace("$r", self.base).replace("$e", self.epoch))
    }

    /// An entry behind the third, which its meta knows of, passed on to whoever listens.
    fn entry(&self, epoch: &str, stamp: &str, envelope: Vec<u8>) -> Vec<Command> {
        let mut add = self.words(&format!("XADD $r:log 4-0 e {epoch} t {stamp} p"));
        let mut publish = self.words("PUBLISH $r");
        publish.push([format!("{epoch}:4:{stamp}\n").as_bytes(), &envelope].concat());
        add.push(envelope);
        vec![add, self.words("HSET $r:meta s 4"), publish]
    }

    fn entry_of(&self, fields: impl FnOnce(MessageId) -> String) -> Vec<Command> {
        self.entry(self.epoch, STAMP, envelope(self.room, fields))
    }
}

const STAMP: &str = "0123456789abcdef";

struct Case {
    name: &'static str,
    kind: &'static str,
    plant: fn(&Planted<'_>) -> Vec<Command>,
}

macro_rules! cases {
    ($($name:literal $kind:literal: $plant:expr;)+) => {
        [$(Case { name: $name, kind: $kind, plant: $plant }),+]
    };
}

fn room_cases() -> Vec<Case> {
    let cases = cases! {
        "fields that are no JSON" "entry": |p| p.entry_of(|_| r#""room":"r",,bad"#.to_owned());
        "fields of another room" "entry": |p| p.entry_of(|id| {
            message_fields(&room("x"), id, Some("x"))
        });
        "fields without content" "entry": |p| p.entry_of(|id| message_fields(p.room, id, None));
        "fields with a seq" "entry": |p| p.entry_of(|id| {
            message_fields(p.room, id, Some("x")) + r#","seq":9"#
        });
        "another id" "entry": |p| p.entry_of(|_| {
            message_fields(p.room, MessageId::random(), Some("x"))
        });
        "no envelope" "entry": |p| p.entry(p.epoch, STAMP, b"\x02\x00".to_vec());
        "a message in a room's channel" "pubsub_message": |p| vec![p.words("PUBLISH $r $e:5:no")];
        "a notice in a room's channel" "pubsub_message": |p| vec![p.words("PUBLISH $r !p")];
        "an entry with other fields" "entry": |p| {
            vec![p.words("XADD $r:log 4-0 x y"), p.words("HSET $r:meta s 4")]
        };
        "an entry with an epoch to come" "entry": |p| {
            p.entry("999-z", STAMP, envelope(p.room, |id| message_fields(p.room, id, Some("x"))))
        };
        "an entry with a stamp that is none" "entry": |p| {
            p.entry(p.epoch, "no", envelope(p.room, |id| message_fields(p.room, id, Some("x"))))
        };
        "entries above the number" "log_meta": |p| {
            vec![p.words("XADD $r:log 9-0 x y"), p.words("HSET $r:meta s 3")]
        };
        "the last entry there can be" "log_meta": |p| {
            vec![p.words("XADD $r:log 18446744073709551615-18446744073709551615 x y")]
        };
        "a number that is none" "log_meta": |p| vec![p.words("HSET $r:meta s no")];
        "a number without end" "log_meta": |p| vec![p.words("HSET $r:meta s 9007199254740991")];
        "an epoch that is none" "log_meta": |p| vec![p.words("HSET $r:meta e é!")];
        "marks of retention that are none" "log_meta": |p| {
            vec![p.words("HSET $r:meta at x from y prev z d no pe ? ps ?")]
        };
        "a term that is none" "log_meta": |p| vec![p.words("HSET $r:meta n no r no")];
        "meta of another type" "key_type": |p| vec![p.words("DEL $r:meta"), p.words("SET $r:meta x")];
        "a log of another type" "key_type": |p| vec![p.words("DEL $r:log"), p.words("SET $r:log x")];
        "ids of another type" "key_type": |p| {
            let ids = ["DEL $r:ids0 $r:ids1", "SET $r:ids0 x", "RPUSH $r:ids1 x"];
            ids.map(|text| p.words(text)).to_vec()
        };
        "who is present of another type" "key_type": |p| {
            vec![p.words("DEL $r:who"), p.words("SET $r:who x")]
        };
        "a record of another type" "key_type": |p| vec![p.words("SET $r:record x")];
        "marks of another type" "key_type": |p| vec![p.words("SET $r:marks x")];
        "a version that is none" "presence": |p| vec![p.words("HSET $r:who # no")];
        "somebody who is nobody" "presence": |p| vec![p.words("HSET $r:who a*b no ann no")];
        "a limit that is none" "room_config": |p| vec![p.words("HSET $r:record max no")];
        "a mark that is none" "read_mark": |p| {
            let name = p.room.as_str().trim_start_matches('c');
            vec![p.words(&format!("HSET $r:marks bob{name} no"))]
        };
        "what was not heard" "unconfirmed": |p| {
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
    let world = World::start().await;
    let other = room("other");
    let (mut eve, mut fay) = (world.a.connect("eve").await, world.b.connect("fay").await);
    eve.join(&other).await.unwrap();
    fay.join(&other).await.unwrap();
    let cases = room_cases();
    let shown = cases.iter().enumerate().map(|(n, case)| Box::pin(world.show(n, case)));
    let show = join_all(shown);
    let talk = async {
        loop {
            say(&mut eve, &other, "on").await;
            assert!(timeout(RECOVERS_MAX, next_message(&mut fay)).await.is_ok());
            assert!(world.are_ready().await);
            poll_pause().await;
        }
    };
    tokio::select! {
        _ = show => {}
        () = talk => {}
    }
    is_quiet(&world, cases.len()).await;
}

/// Nothing reads the same again and again, once what was left to be done is done.
async fn is_quiet(world: &World, rooms: usize) {
    let processed = async || {
        let info = call(&world.redis, &[words("INFO stats")]).await;
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

/// Junk in what there is once in all.
const OF_THE_CLUSTER: [(&str, &str, &[&str]); 22] = [
    ("a lease that is none", "lease", &["HSET gw:leases junk junk"]),
    ("a lease of a process", "lease", &["HSET gw:leases x/y junk"]),
    ("a lease without end", "lease", &["HSET gw:leases x/y 99999999999999 1 1"]),
    ("a count of leases", "lease", &["HSET gw:leases # no"]),
    ("leases of another type", "key_type", &["DEL gw:leases", "SET gw:leases x"]),
    ("terms of the barrier", "barrier", &["HSET gw:barrier n no owed no busy no t0 no"]),
    ("a token that is none", "-", &["HSET gw:barrier t no"]),
    ("a barrier of another type", "key_type", &["DEL gw:barrier", "SET gw:barrier x"]),
    ("rooms of another type", "key_type", &["DEL gw:rooms", "SET gw:rooms x"]),
    ("users of another type", "key_type", &["DEL gw:users", "SET gw:users x"]),
    ("who is online of another type", "key_type", &["DEL gw:online:who", "SET gw:online:who x"]),
    ("somebody online who is nobody", "presence", &["HSET gw:online:who eve no"]),
    ("who was seen of another type", "key_type", &["DEL gw:online:seen", "SET gw:online:seen x"]),
    ("an incarnation of nobody", "-", &["HSET gw:incarnations x junk"]),
    ("incarnations of another type", "-", &["DEL gw:incarnations", "SET gw:incarnations x"]),
    ("an order that is none", "command", &["XADD gw:orders * o junk"]),
    ("an order without fields", "command", &["XADD gw:orders * x y"]),
    ("orders of another type", "key_type", &["DEL gw:orders", "SET gw:orders x"]),
    ("which orders of another type", "key_type", &["DEL gw:orders:list", "LPUSH gw:orders:list x"]),
    ("who has applied what", "key_type", &["DEL gw:orders:nodes", "SET gw:orders:nodes x"]),
    ("a poke", "-", &["PUBLISH gw:pokes junk"]),
    ("sessions of another type", "key_type", &["DEL $s:sessions", "SET $s:sessions x"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn invalid_values_in_shared_keys_are_repaired() {
    let world = World::start().await;
    let other = room("other");
    let (mut eve, mut fay) = (world.a.connect("eve").await, world.b.connect("fay").await);
    eve.join(&other).await.unwrap();
    fay.join(&other).await.unwrap();
    let inbox = RoomId::inbox_of(&"gil".parse().unwrap());
    let base = format!("gw:{{{}}}:u:gil", partition_of(&inbox, 256));
    for (name, kind, planted) in OF_THE_CLUSTER {
        let before = world.bad_values(kind).await;
        let planted: Vec<Command> =
            planted.iter().map(|text| words(&text.replace("$s", &base))).collect();
        call(&world.redis, &planted).await;
        let begun = Instant::now();
        let on = async {
            // A newcomer, an order, somebody who asks who is there, and a message.
            let mut gil = world.b.connect_when_ready("gil").await;
            recovers(&mut gil, &other).await;
            let asks = json!({"type": "presence", "ref": 1});
            while !matches!(gil.request(&asks).await.unwrap(), ServerFrame::Presence(_)) {}
            let lists = json!({"type": "rooms", "ref": 2});
            while !matches!(gil.request(&lists).await.unwrap(), ServerFrame::Rooms(_)) {}
            let id = until_said(&mut eve, &other).await;
            while next_message(&mut fay).await.id != id {}
            gil.send_json(&json!({"type": "leave", "room": other})).await.unwrap();
        };
        assert!(timeout(RECOVERS_MAX, on).await.is_ok(), "{name}: the cluster does not go on");
        let is_good = async || {
            world.are_ready().await && (kind == "-" || world.bad_values(kind).await > before)
        };
        let good = timeout(RECOVERS_MAX, until(name, is_good)).await;
        assert!(
            good.is_ok(),
            "{name}: ready {}, counted {}",
            world.are_ready().await,
            world.bad_values(kind).await - before
        );
        println!("{name}: {:?}", begun.elapsed());
    }
    is_quiet(&world, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_sessions_and_session_data_are_ignored() {
    let world = World::start().await;
    let inbox = RoomId::inbox_of(&"ann".parse().unwrap());
    let base = format!("gw:{{{}}}:u:ann", partition_of(&inbox, 256));
    let mut ann = world.a.connect("ann").await;
    let set = json!({"type": "session_set", "data": {"a": 1}, "ref": 1});
    assert!(matches!(ann.request(&set).await.unwrap(), ServerFrame::Session(_)));
    let rows = format!("HVALS {base}:data");
    assert!(call(&world.redis, &[words(&rows)]).await.contains(r#"{"a":1}"#));
    // All data of this user, and a session that is none.
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
    call(&world.redis, &[junk, words(&format!("HSET {base}:sessions junk junk"))]).await;
    let get = json!({"type": "session_get", "ref": 2});
    let ServerFrame::Session(session) = ann.request(&get).await.unwrap() else { panic!() };
    assert_eq!(Value::Object(session.data), json!({}));
    within(world.b.connect("ann")).await;
    assert!(world.bad_values("session").await >= 2);
}
