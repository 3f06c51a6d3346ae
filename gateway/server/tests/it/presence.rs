//! Presence: joins and leaves, listings, typing and read marks; on a single node, and on three
//! nodes of a cluster.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage, RequestError},
    frames,
};
use skein_protocol::{
    error::ErrorCode,
    protocol::server_frame::{
        ErrorFrame, JoinedFrame, MemberChangeFrame, PresencePageFrame, PresenceUser, ServerFrame,
    },
};
use tokio::time::{Duration, Instant};

use crate::{
    harness::{Gateway, Redis, next_message, room, say, until, with_redis, within},
    servers::{RedisInstance, single_node_redis_cluster},
};

/// A single node, three of a cluster, or two on a Redis Cluster.
pub struct TestDeployment {
    pub nodes: Vec<Gateway>,
    /// Whether there is more than one node.
    pub is_cluster: bool,
    _redis: Option<Redis>,
    _sharded: Option<RedisInstance>,
}

/// The number of partitions on a Redis Cluster in these tests.
const PARTITIONS: u16 = 16;

impl TestDeployment {
    async fn embedded(options: &[(&str, &str)]) -> Self {
        let nodes = vec![Gateway::start(options).await];
        Self { nodes, is_cluster: false, _redis: None, _sharded: None }
    }

    async fn cluster(options: &[(&str, &str)]) -> Self {
        let redis = Redis::start().await;
        let mut nodes = Vec::new();
        for _ in 0..3 {
            nodes.push(Gateway::start_on(&redis, options).await);
        }
        Self { nodes, is_cluster: true, _redis: Some(redis), _sharded: None }
    }

    async fn sharded(options: &[(&str, &str)]) -> Self {
        let server = single_node_redis_cluster(PARTITIONS).await;
        let (url, partitions) = (server.cluster_url(), PARTITIONS.to_string());
        let cluster = [
            ("cluster.redis_url", url.as_str()),
            ("cluster.partitions", partitions.as_str()),
            ("auth.allow_anonymous", "true"),
        ];
        let mut nodes = Vec::new();
        for _ in 0..2 {
            nodes.push(Gateway::start(&[&cluster, options].concat()).await);
        }
        Self { nodes, is_cluster: true, _redis: None, _sharded: Some(server) }
    }

    /// Runs a check on a single node, on a cluster, and on one with a Redis Cluster, at the same
    /// time. Runs only on the single node if tests run without Redis.
    pub async fn each(options: &[(&str, &str)], check: impl AsyncFn(&TestDeployment)) {
        let embedded = Box::pin(async { check(&Self::embedded(options).await).await });
        if !with_redis() {
            return embedded.await;
        }
        let cluster = Box::pin(async { check(&Self::cluster(options).await).await });
        let sharded = Box::pin(async { check(&Self::sharded(options).await).await });
        tokio::join!(embedded, cluster, sharded);
    }

    /// A connection to the `node`th node, or to the only one.
    pub async fn connect(&self, node: usize, user: &str) -> ClientConnection {
        self.nodes[node % self.nodes.len()].connect(user).await
    }
}

/// The next frame that `pick` accepts; earlier ones are dropped.
#[track_caller]
pub fn next_matching<T>(
    connection: &mut ClientConnection,
    mut pick: impl FnMut(ServerFrame) -> Option<T>,
) -> impl Future<Output = T> {
    within(async move {
        loop {
            if let ReceivedMessage::Frame(frame, _) = connection.next().await.unwrap()
                && let Some(picked) = pick(frame)
            {
                return picked;
            }
        }
    })
}

/// The next user who joins (`+`) or leaves (`-`), and the count after it.
async fn next_member_change(connection: &mut ClientConnection) -> (String, u64) {
    let told =
        |sign: char, moved: &MemberChangeFrame| (format!("{sign}{}", moved.user), moved.count);
    next_matching(connection, |frame| match frame {
        ServerFrame::MemberJoined(moved) => Some(told('+', &moved)),
        ServerFrame::MemberLeft(moved) => Some(told('-', &moved)),
        _ => None,
    })
    .await
}

/// The response to a frame, or its rejection.
pub async fn ask(
    connection: &mut ClientConnection,
    frame: Value,
) -> Result<ServerFrame, Box<ErrorFrame>> {
    match connection.request(&frame).await {
        Ok(answer) => Ok(answer),
        Err(RequestError::Rejected(refusal)) => Err(refusal),
        Err(other) => panic!("{other}"),
    }
}

pub async fn rejection_code(connection: &mut ClientConnection, frame: Value) -> ErrorCode {
    ask(connection, frame).await.expect_err("it is refused").code
}

pub async fn presence_page(connection: &mut ClientConnection, frame: Value) -> PresencePageFrame {
    match ask(connection, frame).await.unwrap() {
        ServerFrame::Presence(presence) => *presence,
        other => panic!("{other:?}"),
    }
}

pub async fn presence_of_room(connection: &mut ClientConnection, name: &str) -> PresencePageFrame {
    presence_page(connection, json!({"type": "presence", "room": name})).await
}

pub fn names(users: &[PresenceUser]) -> Vec<&str> {
    users.iter().map(|user| user.id.as_str()).collect()
}

async fn join(
    connection: &mut ClientConnection,
    name: &str,
) -> JoinedFrame<skein_protocol::protocol::server_frame::HistoryEntry> {
    connection.join(&room(name)).await.unwrap()
}

#[tokio::test]
async fn joins_and_leaves_are_reported_once_per_user() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        assert_eq!(join(&mut ann, "lobby").await.members, 1);
        let mut phone = deployment.connect(1, "bob").await;
        assert_eq!(join(&mut phone, "lobby").await.members, 2);
        assert_eq!(next_member_change(&mut ann).await, ("+bob".into(), 2));
        let mut laptop = deployment.connect(2, "bob").await;
        assert_eq!(join(&mut laptop, "lobby").await.members, 2);
        phone.close(1000, "").await;
        let mut cat = deployment.connect(1, "cat").await;
        assert_eq!(join(&mut cat, "lobby").await.members, 3);
        // Neither bob's second device nor the end of his first causes an event.
        assert_eq!(next_member_change(&mut ann).await, ("+cat".into(), 3));
        laptop.request(&frames::OutgoingLeave::new(&room("lobby"))).await.unwrap();
        assert_eq!(next_member_change(&mut ann).await, ("-bob".into(), 2));
        assert_eq!(next_member_change(&mut cat).await, ("-bob".into(), 2));
        assert_eq!(names(&presence_of_room(&mut cat, "lobby").await.users), ["ann", "cat"]);
    })
    .await;
}

#[tokio::test]
async fn presence_outlives_the_first_device_of_a_user() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut phone = deployment.connect(0, "bob").await;
        join(&mut phone, "lobby").await;
        let mut laptop = deployment.connect(1, "bob").await;
        join(&mut laptop, "lobby").await;
        phone.close(1000, "").await;
        until("one device is left", async || {
            presence_of_room(&mut laptop, "lobby").await.users[0].connections <= 1
        })
        .await;
        // This node reads the presence of the room for the first time.
        let mut cat = deployment.connect(2, "cat").await;
        join(&mut cat, "lobby").await;
        let presence = presence_of_room(&mut cat, "lobby").await;
        assert_eq!(names(&presence.users), ["bob", "cat"]);
        assert_eq!(presence.users[0].name.as_str(), "bob");
        let all = presence_page(&mut cat, json!({"type": "presence"})).await;
        assert_eq!(names(&all.users), ["bob", "cat"]);
    })
    .await;
}

#[tokio::test]
async fn a_page_reload_is_no_leave() {
    TestDeployment::each(&[("presence.grace", "400ms")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        join(&mut ann, "lobby").await;
        let mut bob = deployment.connect(1, "bob").await;
        join(&mut bob, "lobby").await;
        assert_eq!(next_member_change(&mut ann).await.0, "+bob");
        bob.close(1001, "").await;
        let mut bob = deployment.connect(2, "bob").await;
        assert_eq!(join(&mut bob, "lobby").await.members, 2);
        // Cat's grace ends after bob's would have.
        let mut cat = deployment.connect(1, "cat").await;
        join(&mut cat, "lobby").await;
        cat.close(1000, "").await;
        assert_eq!(next_member_change(&mut ann).await.0, "+cat");
        assert_eq!(next_member_change(&mut ann).await, ("-cat".into(), 2));
        drop(bob);
        assert_eq!(next_member_change(&mut ann).await, ("-bob".into(), 1));
    })
    .await;
}

#[tokio::test]
async fn a_joined_user_is_in_the_presence_of_every_node() {
    TestDeployment::each(&[], async |deployment| {
        let mut watchers = Vec::new();
        for node in 0..3 {
            let mut watcher = deployment.connect(node, &format!("w{node}")).await;
            join(&mut watcher, "lobby").await;
            watchers.push(watcher);
        }
        for number in 0..20 {
            let user = format!("u{number:02}");
            let mut connection = deployment.connect(number, &user).await;
            let members = join(&mut connection, "lobby").await.members;
            assert_eq!(members, 3 + 1);
            for watcher in &mut watchers {
                let presence = presence_of_room(watcher, "lobby").await;
                assert_eq!(presence.count, 4, "{presence:?}");
                assert!(names(&presence.users).contains(&&*user), "{presence:?}");
            }
            connection.request(&frames::OutgoingLeave::new(&room("lobby"))).await.unwrap();
            for watcher in &mut watchers {
                until("the user has left", async || {
                    presence_of_room(watcher, "lobby").await.count <= 3
                })
                .await;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn presence_lists_connections_times_and_read_marks() {
    TestDeployment::each(&[], async |deployment| {
        let lobby = room("lobby");
        let mut ann = deployment.connect(0, "ann").await;
        let mut again = deployment.connect(1, "ann").await;
        join(&mut ann, "lobby").await;
        join(&mut again, "lobby").await;
        let seq = say(&mut ann, &lobby, "hello").await.seq;
        ann.send_json(&json!({"type": "read", "room": "lobby", "seq": seq})).await.unwrap();
        // The response comes after the mark.
        until("marked", async || {
            presence_of_room(&mut ann, "lobby").await.users[0].read == Some(seq)
        })
        .await;
        let presence = presence_of_room(&mut again, "lobby").await;
        let [user] = &presence.users[..] else { panic!("{presence:?}") };
        assert_eq!((user.connections, presence.count, user.name.as_str()), (2, 1, "ann"));
        assert!(user.since <= user.last_active && user.since.ends_with('Z'), "{user:?}");
        assert_eq!(presence.cursor, None);
    })
    .await;
}

#[tokio::test]
async fn presence_is_complete_at_once_on_a_node_that_has_just_opened_the_room() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut again = deployment.connect(1, "ann").await;
        for number in 0..20 {
            let name = format!("room-{number}");
            join(&mut ann, &name).await;
            let seq = say(&mut ann, &room(&name), "hello").await.seq;
            ann.send_json(&json!({"type": "read", "room": name, "seq": seq})).await.unwrap();
            until("marked", async || {
                presence_of_room(&mut ann, &name).await.users[0].read == Some(seq)
            })
            .await;
            join(&mut again, &name).await;
            let presence = presence_of_room(&mut again, &name).await;
            let [user] = &presence.users[..] else { panic!("{presence:?}") };
            assert_eq!((user.connections, user.read), (2, Some(seq)), "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn presence_is_paged() {
    TestDeployment::each(&[], async |deployment| {
        let mut connections = Vec::new();
        for number in 0..25 {
            let mut connection = deployment.connect(number, &format!("u{number:02}")).await;
            join(&mut connection, "lobby").await;
            connections.push(connection);
        }
        for place in [Some("lobby"), None] {
            let (mut seen, mut cursor) = (Vec::new(), None::<String>);
            loop {
                let frame =
                    json!({"type": "presence", "room": place, "limit": 10, "cursor": cursor});
                let page = presence_page(&mut connections[0], frame).await;
                assert!(page.users.len() <= 10 && page.count == 25, "{page:?}");
                seen.extend(page.users.iter().map(|user| user.id.to_string()));
                cursor = page.cursor;
                if cursor.is_none() {
                    break;
                }
            }
            assert_eq!(seen, (0..25).map(|n| format!("u{n:02}")).collect::<Vec<_>>());
        }
    })
    .await;
}

#[tokio::test]
async fn a_large_room_gets_presence_diffs() {
    let options = [("presence.event_members_max", "3"), ("presence.grace", "0s")];
    TestDeployment::each(&options, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        join(&mut ann, "lobby").await;
        let mut others = Vec::new();
        for number in 0..30 {
            let mut other = deployment.connect(number, &format!("u{number:02}")).await;
            join(&mut other, "lobby").await;
            others.push(other);
        }
        let (mut here, mut diffs, begun) = (BTreeSet::from(["ann".to_owned()]), 0, Instant::now());
        // Each diff leads from the known state to the current one, and its count is that of the new
        // state.
        while here.len() < 31 {
            next_matching(&mut ann, |frame| match frame {
                ServerFrame::MemberJoined(moved) => {
                    assert!(here.len() < 3, "{moved:?}");
                    here.insert(moved.user.to_string());
                    Some(())
                }
                ServerFrame::PresenceDiff(diff) => {
                    diffs += 1;
                    for user in &diff.joined {
                        assert!(here.insert(user.to_string()), "twice: {user}");
                    }
                    assert_eq!((diff.count, diff.left.len()), (here.len() as u64, 0));
                    Some(())
                }
                _ => None,
            })
            .await;
        }
        // A listing is complete, and later events are relative to it.
        assert_eq!(presence_of_room(&mut ann, "lobby").await.count, 31);
        let most = 2 + begun.elapsed().as_millis() / 250;
        assert!(diffs <= most + 12, "{diffs} diffs");
        for other in others.drain(..20) {
            drop(other);
        }
        while here.len() > 11 {
            next_matching(&mut ann, |frame| {
                let ServerFrame::PresenceDiff(diff) = frame else { return None };
                for user in &diff.left {
                    assert!(here.remove(user.as_str()), "twice: {user}");
                }
                Some(())
            })
            .await;
        }
        assert_eq!(presence_of_room(&mut ann, "lobby").await.count, 11);
    })
    .await;
}

#[tokio::test]
async fn a_very_large_room_gets_only_the_count() {
    let options = [
        ("presence.event_members_max", "2"),
        ("presence.diff_members_max", "5"),
        ("presence.grace", "0s"),
    ];
    TestDeployment::each(&options, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        join(&mut ann, "lobby").await;
        let mut others = Vec::new();
        for number in 0..20 {
            let mut other = deployment.connect(number, &format!("u{number:02}")).await;
            join(&mut other, "lobby").await;
            others.push(other);
        }
        let mut until = async |count: u64| {
            next_matching(&mut ann, |frame| {
                let ServerFrame::PresenceDiff(diff) = frame else { return None };
                assert!(diff.count <= 5 || diff.joined.is_empty() && diff.left.is_empty());
                (diff.count == count).then_some(())
            })
            .await;
        };
        until(21).await;
        others.truncate(8);
        until(9).await;
        let presence = presence_of_room(&mut ann, "lobby").await;
        assert_eq!((presence.count, presence.users.len()), (9, 9));
    })
    .await;
}

#[tokio::test]
async fn online_users_of_the_cluster_are_listed_or_only_counted() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let bob = deployment.connect(1, "bob").await;
        let all = presence_page(&mut ann, json!({"type": "presence"})).await;
        assert_eq!((names(&all.users), all.count, all.room), (vec!["ann", "bob"], 2, None));
        drop(bob);
        until("the user has left", async || {
            presence_page(&mut ann, json!({"type": "presence"})).await.count <= 1
        })
        .await;
    })
    .await;
    TestDeployment::each(&[("presence.public", "false")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let _bob = deployment.connect(1, "bob").await;
        let all = presence_page(&mut ann, json!({"type": "presence"})).await;
        assert_eq!((all.users.len(), all.count, all.cursor), (0, 2, None));
    })
    .await;
}

#[tokio::test]
async fn room_frames_are_rejected_before_the_join() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        for frame in [
            json!({"type": "typing", "room": "lobby", "is_typing": true}),
            json!({"type": "read", "room": "lobby", "seq": 1}),
            json!({"type": "history", "room": "lobby"}),
            json!({"type": "presence", "room": "lobby"}),
            json!({"type": "message", "room": "lobby", "content": 1}),
        ] {
            let refusal = ask(&mut ann, frame.clone()).await.expect_err("not joined");
            assert_eq!(refusal.code, ErrorCode::NotJoined, "{frame}");
            assert_eq!(refusal.frame_type.as_deref(), frame["type"].as_str());
        }
        let left = ask(&mut ann, json!({"type": "leave", "room": "lobby"})).await.unwrap();
        assert!(matches!(left, ServerFrame::Left(_)));
    })
    .await;
}

async fn next_typing(connection: &mut ClientConnection) -> (String, bool) {
    next_matching(connection, |frame| match frame {
        ServerFrame::Typing(typing) => Some((typing.user.to_string(), typing.is_typing)),
        _ => None,
    })
    .await
}

#[tokio::test]
async fn typing_reaches_other_members_and_expires() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut phone = deployment.connect(1, "bob").await;
        let mut laptop = deployment.connect(2, "bob").await;
        for connection in [&mut ann, &mut phone, &mut laptop] {
            join(connection, "lobby").await;
        }
        let types = |is_typing| json!({"type": "typing", "room": "lobby", "is_typing": is_typing});
        let begun = Instant::now();
        for _ in 0..20 {
            phone.send_json(&types(true)).await.unwrap();
        }
        assert_eq!(next_typing(&mut ann).await, ("bob".into(), true));
        // Twenty frames at once cause one event, and then the event of the end.
        assert_eq!(next_typing(&mut ann).await, ("bob".into(), false));
        let took = begun.elapsed();
        assert!((Duration::from_secs(5)..Duration::from_secs(9)).contains(&took), "{took:?}");
        phone.send_json(&types(true)).await.unwrap();
        assert_eq!(next_typing(&mut ann).await, ("bob".into(), true));
        let begun = Instant::now();
        phone.send_json(&types(false)).await.unwrap();
        assert_eq!(next_typing(&mut ann).await, ("bob".into(), false));
        assert!(begun.elapsed() < Duration::from_secs(4), "it does not wait for its end");
        // Bob's own devices got no typing event.
        say(&mut ann, &room("lobby"), "well?").await;
        let told = next_matching(&mut laptop, |frame| match frame {
            ServerFrame::Typing(_) => Some(true),
            ServerFrame::Message(_) => Some(false),
            _ => None,
        });
        assert!(!told.await);
    })
    .await;
}

#[tokio::test]
async fn a_read_mark_only_rises_and_persists() {
    TestDeployment::each(&[], async |deployment| {
        let lobby = room("lobby");
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        assert_eq!(join(&mut ann, "lobby").await.read, 0);
        join(&mut bob, "lobby").await;
        for text in ["one", "two", "three"] {
            say(&mut ann, &lobby, text).await;
        }
        let mut read = async |seq: u64| {
            bob.send_json(&json!({"type": "read", "room": "lobby", "seq": seq})).await.unwrap();
        };
        // A lower mark causes no event, and a mark above the top counts as the top.
        read(2).await;
        read(1).await;
        read(99).await;
        for expected in [2, 3] {
            let (user, seq) = next_matching(&mut ann, |frame| match frame {
                ServerFrame::Read(read) => Some((read.user.to_string(), read.seq)),
                _ => None,
            })
            .await;
            assert_eq!((user.as_str(), seq), ("bob", expected));
        }
        let mut again = deployment.connect(2, "bob").await;
        assert_eq!(join(&mut again, "lobby").await.read, 3);
        let shown = presence_of_room(&mut ann, "lobby").await;
        let marks: Vec<_> = shown.users.iter().map(|user| user.read).collect();
        assert_eq!(marks, [Some(0), Some(3)]);
    })
    .await;
}

#[tokio::test]
async fn joining_a_joined_room_again_returns_its_state() {
    TestDeployment::each(&[], async |deployment| {
        let lobby = room("lobby");
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        join(&mut ann, "lobby").await;
        join(&mut bob, "lobby").await;
        say(&mut ann, &lobby, "one").await;
        next_message(&mut ann).await;
        let again = join(&mut ann, "lobby").await;
        assert!(again.recovered && again.history.is_empty());
        assert_eq!((again.members, again.seq), (2, 1));
        assert_eq!(presence_of_room(&mut bob, "lobby").await.users[0].connections, 1);
    })
    .await;
}

/// Rooms named like an inbox or an internal key are ordinary rooms.
#[tokio::test]
async fn room_names_cannot_reach_internal_keys() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        for name in ["u:bob", "rooms", "online", "users", "incarnations"] {
            assert_eq!(join(&mut ann, name).await.members, 1, "{name}");
            assert_eq!(names(&presence_of_room(&mut ann, name).await.users), ["ann"]);
        }
    })
    .await;
}
