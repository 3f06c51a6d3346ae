//! Bounds of durable state: how much a client may store, and the error beyond the bound; on a
//! single node, on three nodes of a cluster, and on two with a Redis Cluster. Also checks that a
//! Redis with 64 MB accepts the publishes of other users while it is flooded.

use serde_json::{Value, json};
use skein_client::connection::ClientConnection;
use skein_protocol::{
    error::ErrorCode,
    protocol::server_frame::{AckFrame, ErrorFrame, HistoryEntry, ServerFrame},
};
use tokio::time::Duration;

use crate::{
    directs::history_of,
    harness::{Gateway, PATIENCE, Redis, connect, get, poll_pause, room, say, until, within},
    presence::{TestDeployment, ask, rejection_code},
};

/// Sends a direct and returns its ack.
async fn direct(
    connection: &mut ClientConnection,
    to: &str,
    content: &str,
) -> Result<AckFrame, Box<ErrorFrame>> {
    let frame = json!({"type": "direct", "to": to, "content": content});
    ask(connection, frame).await.map(|answer| match answer {
        ServerFrame::Ack(ack) => *ack,
        other => panic!("{other:?}"),
    })
}

async fn code_of(connection: &mut ClientConnection, to: &str, content: &str) -> ErrorCode {
    direct(connection, to, content).await.expect_err("it is refused").code
}

/// The oldest and newest entry of a user's inbox and the unread count, as a new connection receives
/// them.
async fn inbox_of(deployment: &TestDeployment, user: &str) -> (u64, u64, u64) {
    let url = format!("ws://{}/ws", deployment.nodes[0].address);
    let options = skein_client::options::ConnectOptions::new(url).user(user);
    let mut connection = ClientConnection::open(&options).await.unwrap();
    let inbox = connection.expect_connected().await.unwrap().inbox;
    (inbox.oldest, inbox.seq, inbox.unread)
}

#[tokio::test]
async fn a_user_who_never_connected_has_a_small_inbox() {
    let options = [
        ("inbox.unseen_max_entries", "3"),
        ("inbox.unseen_max_bytes", "2000"),
        ("limits.new_inboxes_per_hour", "3"),
    ];
    TestDeployment::each(&options, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        for number in 0..4 {
            direct(&mut ann, "nobody", &number.to_string()).await.unwrap();
        }
        let frame = json!({"type": "direct", "to": "nobody", "content": 4, "id": id});
        for duplicate in [false, true] {
            let ServerFrame::Ack(ack) = ask(&mut ann, frame.clone()).await.unwrap() else {
                panic!()
            };
            assert_eq!(ack.duplicate, duplicate);
        }
        // Three entries are kept, of at most 2,000 bytes together.
        assert_eq!(code_of(&mut ann, "nobody-2", &"x".repeat(2000)).await, ErrorCode::LimitReached);
        for other in ["nobody-2", "nobody-3"] {
            direct(&mut ann, other, &"x".repeat(1000)).await.unwrap();
            direct(&mut ann, other, &"y".repeat(1000)).await.unwrap();
        }
        let refusal = direct(&mut ann, "nobody-4", "").await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::RateLimited);
        assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 1000));
        direct(&mut ann, "nobody-2", "the inbox exists already").await.unwrap();
        assert_eq!(inbox_of(deployment, "nobody-3").await, (2, 2, 1), "the older one was trimmed");

        // From the first connection on the inbox has the normal bounds, and ids stay known.
        assert_eq!(inbox_of(deployment, "nobody").await, (3, 5, 3));
        let ServerFrame::Ack(ack) = ask(&mut ann, frame).await.unwrap() else { panic!() };
        assert!(ack.duplicate);
        for number in 5..10 {
            direct(&mut ann, "nobody", &number.to_string()).await.unwrap();
        }
        direct(&mut ann, "nobody", &"x".repeat(2000)).await.unwrap();
        assert_eq!(inbox_of(deployment, "nobody").await, (3, 11, 9));
        // The sender's own inbox has the normal bounds.
        assert!(inbox_of(deployment, "ann").await.1 > 10);
    })
    .await;
}

#[tokio::test]
async fn a_rejected_direct_leaves_nothing_in_redis() {
    let redis = Redis::start().await;
    let options = [("limits.new_inboxes_per_hour", "1"), ("inbox.unseen_max_bytes", "2000")];
    let node = Gateway::start_on(&redis, &options).await;
    let mut ann = node.connect("ann").await;
    direct(&mut ann, "nobody", "").await.unwrap();
    let large = "x".repeat(2000);
    for (to, content, code) in
        [("nobody-2", "", ErrorCode::RateLimited), ("nobody-3", &large, ErrorCode::LimitReached)]
    {
        assert_eq!(code_of(&mut ann, to, content).await, code);
    }
    let script = "return table.concat(redis.call('KEYS', '*nobody*'), ' ')";
    let keys = redis.answer(&format!("EVAL \"{script}\" 0")).await;
    assert!(keys.contains("nobody") && !keys.contains("nobody-"), "{keys}");
}

#[tokio::test]
async fn exceeded_user_quotas_return_their_error_code() {
    let options = [
        ("limits.new_rooms_per_minute", "1"),
        ("limits.durable_bytes_per_minute", "20000"),
        ("rooms.managed_per_owner", "2"),
        ("sessions.data_max_bytes", "1000"),
        ("rooms.read_marks_max", "1"),
    ];
    TestDeployment::each(&options, async |deployment| {
        // Five rooms may be created at once, then one per minute.
        let mut ann = deployment.connect(0, "ann").await;
        let join = |name: &str| json!({"type": "join", "room": name});
        for name in ["r1", "r2", "r3", "r4", "r5"] {
            ask(&mut ann, join(name)).await.unwrap();
        }
        let refusal = ask(&mut ann, join("r6")).await.unwrap_err();
        assert_eq!(refusal.code, ErrorCode::RateLimited);
        assert!(refusal.retry_after_ms.is_some());
        let mut bob = deployment.connect(1, "bob").await;
        ask(&mut bob, join("r6")).await.unwrap();
        for name in ["r6", "r1"] {
            ask(&mut ann, join(name)).await.unwrap();
        }

        // The read mark of only one user is kept.
        let lobby = room("r6");
        let seq = say(&mut bob, &lobby, "hi").await.seq;
        let read = json!({"type": "read", "room": "r6", "seq": seq});
        bob.send_json(&read).await.unwrap();
        until("one mark is kept", async || read_marks_at(&mut bob, "r6", seq).await == 1).await;
        ann.send_json(&read).await.unwrap();
        until("the other is counted", async || rejected_read_marks(deployment).await == 1).await;
        assert_eq!(read_marks_at(&mut bob, "r6", seq).await, 1);

        // Managed rooms of an owner; deleting one allows another.
        let mut cat = deployment.connect(2, "cat").await;
        let create = |name: &str| json!({"type": "create_room", "room": name});
        for name in ["m1", "m2"] {
            ask(&mut cat, create(name)).await.unwrap();
        }
        assert_eq!(rejection_code(&mut cat, create("m3")).await, ErrorCode::LimitReached);
        assert_eq!(rejection_code(&mut cat, create("m1")).await, ErrorCode::RoomExists);
        ask(&mut cat, json!({"type": "delete_room", "room": "m1"})).await.unwrap();
        ask(&mut cat, create("m3")).await.unwrap();
        assert_eq!(rejection_code(&mut cat, create("m4")).await, ErrorCode::LimitReached);

        // Data of all sessions of a user.
        let set = |letter: &str, count| json!({"type": "session_set", "data": {letter: "x".repeat(count)}});
        ask(&mut cat, set("a", 600)).await.unwrap();
        let mut other = deployment.connect(0, "cat").await;
        assert_eq!(rejection_code(&mut other, set("a", 600)).await, ErrorCode::LimitReached);
        ask(&mut other, set("a", 300)).await.unwrap();
        ask(&mut cat, json!({"type": "session_set", "data": {"a": null}})).await.unwrap();
        ask(&mut other, set("a", 600)).await.unwrap();

        // Stored bytes: a burst of twice the rate per minute, over all connections on a node.
        let mut dan = deployment.connect(0, "dan").await;
        for _ in 0..2 {
            direct(&mut dan, "ann", &"x".repeat(10_000)).await.unwrap();
        }
        let mut too = deployment.connect(0, "dan").await;
        for connection in [&mut dan, &mut too] {
            let refusal = direct(connection, "ann", "more").await.unwrap_err();
            assert_eq!(refusal.code, ErrorCode::RateLimited);
            assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 100));
        }
        assert_eq!(rejection_code(&mut dan, create("m5")).await, ErrorCode::RateLimited);
        direct(&mut ann, "dan", "others may").await.unwrap();
    })
    .await;
}

/// The number of members of a room with a read mark at `seq`.
async fn read_marks_at(connection: &mut ClientConnection, room: &str, seq: u64) -> usize {
    let who = json!({"type": "presence", "room": room});
    let ServerFrame::Presence(who) = ask(connection, who).await.unwrap() else { panic!() };
    who.users.iter().filter(|user| user.read == Some(seq)).count()
}

/// The number of rejected read marks.
async fn rejected_read_marks(deployment: &TestDeployment) -> u64 {
    let mut count = 0;
    for node in &deployment.nodes {
        count += metric(node, "gateway_storage_rejections_total{reason=\"read_marks\"}").await;
    }
    count
}

async fn metric(node: &Gateway, name: &str) -> u64 {
    let metrics = get(node.admin, "/metrics").await.body;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.unwrap_or_else(|| panic!("{name} is not in {metrics}"))
}

/// Kinds of state with which clients fill Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flood {
    /// Directs of the maximum size, each to a new user.
    LargeDirects,
    /// Directs of one byte, each to a new user.
    SmallDirects,
    /// Rooms that are joined and left.
    Rooms,
    /// Managed rooms with `meta` of the maximum size.
    ManagedRooms,
    /// Users who connect and do nothing.
    Users,
    /// Sessions with data of the maximum size.
    Sessions,
    /// Large messages to a room of one's own.
    Messages,
    /// Small messages to one's own inbox.
    OwnInbox,
}

const FLOODS: [Flood; 8] = [
    Flood::LargeDirects,
    Flood::SmallDirects,
    Flood::Rooms,
    Flood::ManagedRooms,
    Flood::Users,
    Flood::Sessions,
    Flood::Messages,
    Flood::OwnInbox,
];

/// Options of a node without rate limits, so that only the memory watermark limits clients.
const UNLIMITED: [(&str, &str); 3] = [
    ("limits.messages_per_second", "0"),
    ("limits.frames_per_second", "0"),
    ("presence.grace", "0s"),
];

/// The number of requests that an attacker has in flight.
const WINDOW: usize = 8;

impl Flood {
    /// The `number`th frame of the attacker.
    fn frame(self, attacker: &str, number: usize) -> Value {
        let name = format!("{attacker}-{number}");
        match self {
            Self::LargeDirects => {
                json!({"type": "direct", "to": name, "content": "x".repeat(60_000)})
            }
            Self::SmallDirects => json!({"type": "direct", "to": name, "content": 1}),
            Self::Rooms if number.is_multiple_of(2) => json!({"type": "join", "room": name}),
            Self::Rooms => json!({"type": "leave", "room": format!("{attacker}-{}", number - 1)}),
            Self::ManagedRooms => {
                json!({"type": "create_room", "room": name, "meta": {"m": "x".repeat(8000)}})
            }
            Self::Sessions => json!({"type": "session_set", "data": {"d": "x".repeat(16_000)}}),
            Self::Messages if number == 0 => json!({"type": "join", "room": attacker}),
            Self::Messages => {
                json!({"type": "message", "room": attacker, "content": "x".repeat(250_000)})
            }
            Self::OwnInbox => {
                json!({"type": "direct", "to": attacker, "content": "x".repeat(1000)})
            }
            Self::Users => json!({"type": "ping"}),
        }
    }

    /// Floods until `ends`. A flood of users has one connection per user.
    async fn run_until(
        self,
        address: std::net::SocketAddr,
        attacker: String,
        ends: tokio::time::Instant,
    ) {
        let mut number = 0;
        while tokio::time::Instant::now() < ends {
            let user = match self {
                Self::Users => format!("{attacker}-{number}"),
                _ => attacker.clone(),
            };
            let url = format!("ws://{address}/ws");
            let options = skein_client::options::ConnectOptions::new(url).user(&user);
            // The connection may be rejected, as any new one may.
            let Ok(mut connection) = ClientConnection::open(&options).await else { continue };
            if connection.expect_connected().await.is_err() {
                continue;
            }
            loop {
                for _ in 0..WINDOW {
                    let mut frame = self.frame(&attacker, number);
                    frame["ref"] = json!(number);
                    connection.send_json(&frame).await.unwrap();
                    number += 1;
                }
                let mut left = WINDOW;
                while left > 0 {
                    match within(connection.next_frame()).await.unwrap() {
                        ServerFrame::Ack(_)
                        | ServerFrame::Error(_)
                        | ServerFrame::Joined(_)
                        | ServerFrame::Left(_) => {
                            left -= 1;
                        }
                        ServerFrame::RoomInfo(_)
                        | ServerFrame::Session(_)
                        | ServerFrame::Pong(_) => left -= 1,
                        _ => {}
                    }
                }
                let is_new = matches!(self, Self::Users | Self::Sessions);
                if is_new || tokio::time::Instant::now() >= ends {
                    break;
                }
            }
        }
    }
}

/// Publishes to an existing room and asserts an ack in time for each. Returns the number of
/// publishes and the longest wait.
async fn publish_until(
    connection: &mut ClientConnection,
    ends: tokio::time::Instant,
) -> (usize, Duration) {
    let (lobby, mut count, mut longest) = (room("legitimate"), 0, Duration::ZERO);
    while tokio::time::Instant::now() < ends {
        let begun = tokio::time::Instant::now();
        say(connection, &lobby, "hello to all who are here").await;
        longest = longest.max(begun.elapsed());
        count += 1;
        poll_pause().await;
    }
    (count, longest)
}

async fn used(redis: &Redis) -> u64 {
    let info = redis.answer("INFO memory").await;
    let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
    used.unwrap().trim().parse().unwrap()
}

const MEMORY: u64 = 64 << 20;

/// Keys without expiry: of the nodes, which remove the fields of ended processes, and of the
/// cluster.
const KEPT: &str = "gw:barrier gw:leases gw:partitions gw:incarnations gw:told gw:online:seen gw:rooms gw:nodes \
     gw:schema";

/// Floods a Redis of 64 MB with each kind of state in turn, while other users publish. `filled`
/// bytes are in use already.
async fn flood_all(filled: u64, each: Duration) {
    let redis = Redis::start().await;
    redis.command(&format!("CONFIG SET maxmemory {MEMORY}")).await;
    let node = Gateway::start_on(&redis, &UNLIMITED).await;
    let mut ann = node.connect("ann").await;
    let mut bob = node.connect("bob").await;
    for member in [&mut ann, &mut bob] {
        member.join(&room("legitimate")).await.unwrap();
    }
    for _ in 0..20 {
        say(&mut ann, &room("legitimate"), "before").await;
    }
    if filled > 0 {
        redis.command(&format!("SETRANGE filler {filled} x")).await;
    }
    for flood in FLOODS {
        let ends = tokio::time::Instant::now() + each;
        let attackers: Vec<_> = (0..4)
            .map(|number| {
                let attacker = format!("{flood:?}-{number}");
                tokio::spawn(flood.run_until(node.address, attacker, ends))
            })
            .collect();
        let (count, longest) = publish_until(&mut ann, ends).await;
        for attacker in attackers {
            within(attacker).await.unwrap();
        }
        let used = used(&redis).await;
        println!(
            "{flood:?}: {count} acknowledged, the slowest after {longest:?}; {used} bytes used"
        );
        assert!(count > 0, "{flood:?}");
        // Without a watermark Redis would reject writes at 100 %; a gateway that frees memory
        // exceeds it only slightly.
        assert!(used < MEMORY + MEMORY / 20, "{flood:?}: {used}");
    }
    assert!(metric(&node, "gateway_storage_rejections_total{reason=\"memory\"}").await > 0);
    assert!(metric(&node, "gateway_redis_memory_pressure").await > 0);
    assert_eq!(metric(&node, "gateway_redis_memory_max_bytes").await, MEMORY);
    let said = get(node.address, "/ready").await;
    assert_eq!(said.status, 200, "{}", said.body);
    // Returning and new users are admitted.
    connect(node.address, "ann").await;
    connect(node.address, "a-newcomer").await;
    drop((ann, bob));
    // No key of the flood lacks an expiry, except connected users (none, soon), the times at which
    // users were last online, the list of rooms, and the state of nodes.
    let mut kept = keys_without_expiry(&redis).await;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !kept.is_empty() {
        assert!(tokio::time::Instant::now() < deadline, "without a lifetime: {kept}");
        poll_pause().await;
        kept = keys_without_expiry(&redis).await;
    }
}

/// The keys without expiry, apart from the single keys of the cluster, which nodes bound.
async fn keys_without_expiry(redis: &Redis) -> String {
    let script = "local kept = {} for _, key in ipairs(ARGV) do kept[key] = true end \
         local found = {} for _, key in ipairs(redis.call('KEYS', 'gw:*')) do \
         if redis.call('PTTL', key) == -1 and not kept[key] and not string.match(key, 'orders') \
         then found[#found + 1] = key end end return table.concat(found, ' ', 1, math.min(#found, 20))";
    redis.answer(&format!("EVAL \"{script}\" 0 {KEPT}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishes_are_acknowledged_while_a_full_redis_is_flooded() {
    if crate::faults::is_full() {
        flood_all(0, Duration::from_secs(20)).await;
    }
    flood_all(MEMORY * 3 / 4, Duration::from_millis(700)).await;
}

/// Other nodes detect by the incarnations that a process has ended, and remove its presence
/// entries: a process killed soon after its start leaves nothing either.
#[tokio::test]
async fn a_node_registers_before_it_writes_presence_entries() {
    let redis = Redis::start().await;
    let _node = Gateway::start_on(&redis, &[]).await;
    let count = async |key| redis.command(&format!("HLEN {key}")).await.unwrap();
    until("the node has written its presence entries", async || count("gw:told").await == ":1")
        .await;
    assert_eq!(count("gw:incarnations").await, ":1");
}

#[tokio::test]
async fn a_full_redis_accepts_writes_that_free_memory() {
    let redis = Redis::start().await;
    let node = Gateway::start_on(&redis, &[]).await;
    let lobby = room("lobby");
    let mut ann = node.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    for _ in 0..10 {
        say(&mut ann, &lobby, &"x".repeat(2000)).await;
    }
    let mut bob = node.connect("bob").await;
    direct(&mut bob, "ann", "hi").await.unwrap();
    ask(&mut bob, json!({"type": "join", "room": "new"})).await.unwrap();
    redis.command("CONFIG SET maxmemory 1").await;
    // At once: the first rejected append is sent again with the script that frees memory.
    let ack = say(&mut ann, &lobby, &"y".repeat(3000)).await;
    assert_eq!((ack.seq, ack.duplicate), (11, false));
    let history = json!({"type": "history", "room": "lobby"});
    let ServerFrame::History(page) = ask(&mut ann, history).await.unwrap() else { panic!() };
    let seq = |entry: &HistoryEntry| match entry {
        HistoryEntry::Message(message) => Some(message.seq),
        _ => None,
    };
    let sent: Vec<u64> = page.messages.iter().filter_map(seq).collect();
    assert_eq!(sent, (3..=11).collect::<Vec<_>>(), "the two oldest were trimmed");
    direct(&mut bob, "ann", "still").await.unwrap();

    // New state is rejected with `overloaded`. An existing room can be joined.
    ask(&mut bob, json!({"type": "join", "room": "lobby"})).await.unwrap();
    let overloaded = |refusal: Box<ErrorFrame>| {
        assert_eq!(refusal.code, ErrorCode::Overloaded, "{}", refusal.message);
        assert!(refusal.retry_after_ms.is_some());
    };
    for frame in [
        json!({"type": "direct", "to": "nobody", "content": 1}),
        json!({"type": "message", "room": "new", "content": 1}),
        json!({"type": "message", "room": "lobby", "content": "x".repeat(100_000)}),
        json!({"type": "join", "room": "newer"}),
        json!({"type": "create_room", "room": "managed"}),
        json!({"type": "session_set", "data": {"a": 1}}),
    ] {
        overloaded(ask(&mut bob, frame.clone()).await.expect_err(&frame.to_string()));
    }

    redis.command("CONFIG SET maxmemory 0").await;
    until("it takes new ones", async || {
        ask(&mut bob, json!({"type": "message", "room": "new", "content": 1})).await.is_ok()
    })
    .await;
}

/// State that an action of a client leaves in Redis after the client has left: bytes per action and
/// the longest expiry in ms, over 200 actions.
async fn state_left_by(act: impl AsyncFn(&mut ClientConnection, usize)) -> (u64, u64) {
    const COUNT: usize = 200;
    let redis = Redis::start().await;
    let node = Gateway::start_on(&redis, &UNLIMITED).await;
    let mut ann = node.connect("ann").await;
    // Single keys of the cluster and the sender's own state are not counted.
    for number in 0..20 {
        act(&mut ann, COUNT + number).await;
    }
    let before = used(&redis).await;
    for number in 0..COUNT {
        act(&mut ann, number).await;
    }
    let bytes = used(&redis).await.saturating_sub(before) / COUNT as u64;
    let longest = "EVAL \"local most = 0 for _, key in ipairs(redis.call('KEYS', 'gw:*n-*')) do \
                   most = math.max(most, redis.call('PTTL', key)) end return most\" 0";
    let longest = redis.command(longest).await.unwrap();
    (bytes, longest[1..].parse().unwrap())
}

#[tokio::test]
async fn unread_state_of_a_client_is_small_and_expires() {
    let (bytes, lifetime) = state_left_by(async |ann, number| {
        direct(ann, &format!("n-{number}"), "").await.unwrap();
    })
    .await;
    println!("a direct to an absent user: {bytes} bytes for {lifetime} ms");
    assert!((1..=5_500).contains(&bytes), "{bytes}");
    assert!((1..=24 * 60 * 60 * 1000).contains(&lifetime), "{lifetime}");

    let (bytes, lifetime) = state_left_by(async |ann, number| {
        for kind in ["join", "leave"] {
            let frame = json!({"type": kind, "room": format!("n-{number}")});
            ask(ann, frame).await.unwrap();
        }
    })
    .await;
    println!("a room that was joined and left: {bytes} bytes for {lifetime} ms");
    assert!((1..=5 * 60 * 1000).contains(&lifetime), "{lifetime}");
}

#[tokio::test]
async fn history_with_a_user_reads_an_inbox_once() {
    let redis = Redis::start().await;
    let gateway = Gateway::start_on(&redis, &[]).await;
    let mut bob = gateway.connect("bob").await;
    let content = "x".repeat(20_000);
    for number in 0..40 {
        let to = if number == 7 { "cat" } else { "ann" };
        ask(&mut bob, json!({"type": "direct", "to": to, "content": content})).await.unwrap();
    }
    let read = async || {
        let metrics = get(gateway.admin, "/metrics").await.body;
        let line =
            metrics.lines().find_map(|line| line.strip_prefix("gateway_client_read_bytes_total "));
        line.unwrap().parse::<u64>().unwrap()
    };
    let with = json!({"type": "history", "with": "cat"});
    for (least, most) in [(800_000, 1_000_000), (20_000, 25_000), (20_000, 25_000)] {
        let before = read().await;
        let (messages, more) = history_of(ask(&mut bob, with.clone()).await.unwrap());
        assert_eq!((messages.len(), more), (1, false));
        let bytes = read().await - before;
        assert!((least..most).contains(&bytes), "{bytes} bytes read");
    }
    // The node reads no more than fits into one response.
    let before = read().await;
    let with = json!({"type": "history", "with": "ann", "limit": 200});
    let (messages, more) = history_of(ask(&mut bob, with).await.unwrap());
    assert!(messages.len() >= 12 && more, "{}", messages.len());
    let bytes = read().await - before;
    assert!(bytes < 300_000, "{bytes} bytes read");
}
