//! Presence while servers, links and nodes fail: the events that members receive lead from one true
//! state to the next, and end at the actual state.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;
use skein_client::connection::{ClientConnection, ReceivedMessage};
use skein_client::options::ConnectOptions;
use skein_protocol::{
    ids::{RoomId, UserId},
    protocol::server_frame::ServerFrame,
};
use tokio::time::Instant;

use super::{
    lease, lease_option,
    proxy::{Mode, Proxy},
    ready,
};
use crate::{
    harness::{Gateway, Node, PATIENCE, Redis, connect, poll_pause, room, say, until, within},
    presence::{names, next_matching, presence_of_room, presence_page},
};

/// A member of the lobby that tracks presence, and checks every event against it.
struct PresenceObserver {
    connection: ClientConnection,
    here: BTreeSet<String>,
}

impl PresenceObserver {
    async fn join(mut connection: ClientConnection) -> Self {
        connection.join(&room("lobby")).await.unwrap();
        let here = listing(&mut connection).await;
        Self { connection, here }
    }

    fn note(&mut self, user: &UserId, joined: bool) {
        let user = user.to_string();
        let is_news = if joined { self.here.insert(user.clone()) } else { self.here.remove(&user) };
        assert!(is_news, "{user}, joined: {joined}, is no news: {:?}", self.here);
    }

    /// Reads events until exactly the expected users are present.
    #[track_caller]
    fn reads_until<'a>(&'a mut self, expected: &'a [&str]) -> impl Future<Output = ()> + 'a {
        let expected: BTreeSet<String> = expected.iter().map(|user| (*user).to_owned()).collect();
        within(async move {
            while self.here != expected {
                self.read().await;
            }
        })
    }

    async fn read(&mut self) {
        let ReceivedMessage::Frame(frame, _) = self.connection.next().await.unwrap() else {
            return;
        };
        match frame {
            ServerFrame::MemberJoined(moved) => {
                self.note(&moved.user, true);
                assert_eq!(moved.count, self.here.len() as u64);
            }
            ServerFrame::MemberLeft(moved) => {
                self.note(&moved.user, false);
                assert_eq!(moved.count, self.here.len() as u64);
            }
            ServerFrame::PresenceDiff(diff) => {
                diff.joined.iter().for_each(|user| self.note(user, true));
                diff.left.iter().for_each(|user| self.note(user, false));
                assert_eq!(diff.count, self.here.len() as u64);
            }
            _ => {}
        }
    }

    /// Reads all events up to now, and compares a presence listing with them.
    async fn check_listing(&mut self) {
        say(&mut self.connection, &room("lobby"), "now").await;
        // The response is read first; earlier frames were kept and are read now.
        let listed = listing(&mut self.connection).await;
        say(&mut self.connection, &room("lobby"), "then").await;
        let mut left = 0;
        within(async {
            while left < 2 {
                let before = self.here.clone();
                match self.connection.next().await.unwrap() {
                    ReceivedMessage::Frame(ServerFrame::Message(message), _) => {
                        left += usize::from(message.from.id.as_str() == self.name());
                    }
                    ReceivedMessage::Frame(ServerFrame::MemberJoined(moved), _) => {
                        self.note(&moved.user, true);
                    }
                    ReceivedMessage::Frame(ServerFrame::MemberLeft(moved), _) => {
                        self.note(&moved.user, false);
                    }
                    _ => assert_eq!(before, self.here),
                }
            }
        })
        .await;
        assert_eq!(listed, self.here);
    }

    fn name(&self) -> String {
        self.here.iter().find(|user| user.starts_with('w')).cloned().unwrap_or_default()
    }
}

async fn listing(connection: &mut ClientConnection) -> BTreeSet<String> {
    let frame = json!({"type": "presence", "room": "lobby"});
    let ServerFrame::Presence(presence) = connection.request(&frame).await.unwrap() else {
        panic!("no presence")
    };
    assert_eq!(presence.count, presence.users.len() as u64);
    presence.users.iter().map(|user| user.id.to_string()).collect()
}

async fn member(node: &Gateway, user: &str) -> ClientConnection {
    let mut connection = node.connect(user).await;
    connection.join(&room("lobby")).await.unwrap();
    connection
}

const NO_GRACE: [(&str, &str); 1] = [("presence.grace", "0s")];

/// Redis restarts with or without its data; meanwhile one user leaves and one is disconnected.
async fn through_a_restart(mut redis: Redis) {
    let nodes =
        [Gateway::start_on(&redis, &NO_GRACE).await, Gateway::start_on(&redis, &NO_GRACE).await];
    let mut stays = member(&nodes[0], "stays").await;
    let leaves = member(&nodes[1], "leaves").await;
    let mut watchers = Vec::new();
    for (number, node) in nodes.iter().enumerate() {
        watchers.push(PresenceObserver::join(node.connect(&format!("w{number}")).await).await);
    }
    for watcher in &mut watchers {
        watcher.reads_until(&["leaves", "stays", "w0", "w1"]).await;
    }
    redis.kill().await;
    until("away", async || !ready(nodes[0].address).await).await;
    drop(leaves);
    redis.restart().await;
    for node in &nodes {
        until("back", async || ready(node.address).await).await;
    }
    let mut comes = member(&nodes[1], "comes").await;
    for watcher in &mut watchers {
        watcher.reads_until(&["comes", "stays", "w0", "w1"]).await;
    }
    say(&mut stays, &room("lobby"), "still here").await;
    say(&mut comes, &room("lobby"), "so am I").await;
    for watcher in &mut watchers {
        let listed = listing(&mut watcher.connection).await;
        assert_eq!(listed, watcher.here);
    }
    // The presence store has no extra users.
    let mut fresh = Gateway::start_on(&redis, &NO_GRACE).await.connect("w9").await;
    let joined = fresh.join(&room("lobby")).await.unwrap();
    assert_eq!(joined.members, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_restart_with_its_file_changes_no_presence() {
    through_a_restart(Redis::start_durable().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_redis_restart_keeps_present_users() {
    through_a_restart(Redis::start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flushed_redis_changes_no_presence() {
    let redis = Redis::start().await;
    let nodes =
        [Gateway::start_on(&redis, &NO_GRACE).await, Gateway::start_on(&redis, &NO_GRACE).await];
    let _stays = member(&nodes[1], "stays").await;
    let mut watcher = PresenceObserver::join(nodes[0].connect("w0").await).await;
    watcher.reads_until(&["stays", "w0"]).await;
    redis.command("FLUSHALL").await;
    // A listing of the presence store has all users again.
    let online = async |connection: &mut ClientConnection| {
        let ServerFrame::Presence(presence) =
            connection.request(&json!({"type": "presence"})).await.unwrap()
        else {
            panic!("no presence")
        };
        presence.count
    };
    let mut asks = nodes[1].connect("asks").await;
    until("all are there again", async || online(&mut asks).await == 3).await;
    let _comes = member(&nodes[0], "comes").await;
    watcher.reads_until(&["comes", "stays", "w0"]).await;
    watcher.check_listing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_changes_during_a_cut_link_arrive_afterwards() {
    let redis = Redis::start().await;
    let proxy = Proxy::to(redis.address()).await.unwrap();
    let url = proxy.redis_url();
    let cut_off = [NO_GRACE[0], ("cluster.redis_url", url.as_str())];
    let (deaf, other) =
        (Gateway::start_on(&redis, &cut_off).await, Gateway::start_on(&redis, &NO_GRACE).await);
    let leaves = member(&other, "leaves").await;
    let mut watcher = PresenceObserver::join(deaf.connect("w0").await).await;
    watcher.reads_until(&["leaves", "w0"]).await;
    proxy.set(Mode::DropPushes);
    let mut moved = Vec::new();
    for number in 0..5 {
        moved.push(member(&other, &format!("u{number}")).await);
    }
    drop(leaves);
    moved.truncate(3);
    proxy.set(Mode::Open);
    watcher.reads_until(&["u0", "u1", "u2", "w0"]).await;
    proxy.set(Mode::Cut);
    moved.truncate(1);
    until("cut off", async || !ready(deaf.address).await).await;
    proxy.set(Mode::Open);
    watcher.reads_until(&["u0", "w0"]).await;
    watcher.check_listing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_a_frozen_node_leave_and_return_with_it() {
    let redis = Redis::start().await;
    let options = [NO_GRACE[0], lease_option()];
    let other = Gateway::start_on(&redis, &options).await;
    let frozen = Node::start(&redis, None, &options).await;
    let mut watcher = PresenceObserver::join(other.connect("w0").await).await;
    let mut there = Vec::new();
    for number in 0..3 {
        let mut connection = connect(frozen.address, &format!("u{number}")).await;
        connection.join(&room("lobby")).await.unwrap();
        there.push(connection);
    }
    watcher.reads_until(&["u0", "u1", "u2", "w0"]).await;
    frozen.process.signal("STOP");
    let begun = Instant::now();
    watcher.reads_until(&["w0"]).await;
    assert!(begun.elapsed() < lease() + Duration::from_secs(5), "{:?}", begun.elapsed());
    // A user joins while the node is frozen.
    let comes = member(&other, "comes").await;
    frozen.process.signal("CONT");
    watcher.reads_until(&["comes", "u0", "u1", "u2", "w0"]).await;
    let everybody = listing(&mut watcher.connection).await;
    until("the frozen one knows", async || listing(&mut there[0]).await == everybody).await;
    drop(comes);
    watcher.reads_until(&["u0", "u1", "u2", "w0"]).await;
    watcher.check_listing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_who_reconnect_after_a_drain_do_not_leave() {
    let redis = Redis::start().await;
    let (stops, other) =
        (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let mut watcher = PresenceObserver::join(other.connect("w0").await).await;
    let moves = member(&stops, "moves").await;
    let goes = member(&stops, "goes").await;
    watcher.reads_until(&["goes", "moves", "w0"]).await;
    stops.stop().await;
    drop((moves, goes));
    // A client backs off before it reconnects; the other nodes look for departed users every
    // second.
    let (stopped, back_off) = (Instant::now(), Duration::from_millis(1500));
    until("its turn", async || stopped.elapsed() >= back_off).await;
    let moves = member(&other, "moves").await;
    // If "moves" had left, its join would now be an event.
    watcher.reads_until(&["moves", "w0"]).await;
    watcher.check_listing().await;
    drop(moves);
}

/// A node with 1,000 users in 50 rooms gets SIGKILL.
#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_killed_node_leave_once_everywhere() {
    let redis = Redis::start().await;
    let options = [
        ("presence.event_members_max", "1000"),
        // The observers read nothing while the others join.
        ("heartbeat.write_timeout", "10m"),
        ("heartbeat.idle_timeout", "10m"),
        lease_option(),
    ];
    let survivors =
        [Gateway::start_on(&redis, &options).await, Gateway::start_on(&redis, &options).await];
    let mut killed = Node::start(&redis, None, &options).await;
    let rooms: Vec<RoomId> = (0..50).map(|number| room(&format!("r{number}"))).collect();
    let mut watchers = Vec::new();
    for (number, survivor) in survivors.iter().enumerate() {
        let mut watcher = survivor.connect(&format!("w{number}")).await;
        for room in &rooms {
            watcher.join(room).await.unwrap();
        }
        watchers.push(watcher);
    }
    let mut gone = Vec::new();
    for number in 0..1000 {
        let url = format!("ws://{}/ws", killed.address);
        let options = ConnectOptions::new(url).user(format!("u{number}"));
        let mut connection = ClientConnection::open(&options).await.unwrap();
        connection.expect_connected().await.unwrap();
        connection.join(&rooms[number % rooms.len()]).await.unwrap();
        gone.push(connection);
    }
    // User u7 has a device on another node, and stays.
    let mut bob = survivors[1].connect("u7").await;
    bob.join(&rooms[7]).await.unwrap();
    for watcher in &mut watchers {
        for room in &rooms {
            let name = room.as_str();
            // The joins of the other node arrive in a moment, later on a busy machine.
            let deadline = Instant::now() + PATIENCE;
            while presence_of_room(watcher, name).await.count < 22 {
                assert!(Instant::now() < deadline, "{name}");
                poll_pause().await;
            }
        }
    }
    killed.process.kill().await;
    let begun = Instant::now();
    for watcher in &mut watchers {
        let mut left = BTreeSet::new();
        while left.len() < 999 {
            let moved = next_matching(watcher, |frame| match frame {
                ServerFrame::MemberLeft(moved) => Some(moved),
                _ => None,
            })
            .await;
            assert!(left.insert((moved.room.clone(), moved.user.clone())), "twice: {moved:?}");
            assert_ne!(moved.user.as_str(), "u7");
        }
        let took = begun.elapsed();
        println!("999 users of 50 rooms have left after {took:?}");
        assert!(took < lease() + Duration::from_secs(5), "{took:?}");
    }
    for watcher in &mut watchers {
        for (number, room) in rooms.iter().enumerate() {
            let presence = presence_of_room(watcher, room.as_str()).await;
            let expected: &[&str] = if number == 7 { &["u7", "w0", "w1"] } else { &["w0", "w1"] };
            assert_eq!(names(&presence.users), expected, "{room}");
            assert_eq!(presence.count, expected.len() as u64);
        }
        assert_eq!(presence_page(watcher, json!({"type": "presence"})).await.count, 3);
        // No other event was sent.
        say(watcher, &rooms[0], "all left").await;
        let more = next_matching(watcher, |frame| match frame {
            ServerFrame::MemberLeft(moved) => Some(Some(moved)),
            ServerFrame::Message(_) => Some(None),
            _ => None,
        });
        assert_eq!(more.await, None);
    }
    drop(gone);
}
