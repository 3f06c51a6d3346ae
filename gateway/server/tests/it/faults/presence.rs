//! Who is present while servers, links and nodes fail: what members are told leads from one true
//! state to the next, and ends where everybody is.

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
    harness::{Gateway, Node, Redis, connect, room, say, until, within},
    presence::{heard, names, present, present_in},
};

/// A member of the lobby that keeps up with who is there, and holds every notice against that.
struct Watcher {
    connection: ClientConnection,
    here: BTreeSet<String>,
}

impl Watcher {
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

    /// Reads on until everybody is there that should be, and nobody else.
    #[track_caller]
    fn sees<'a>(&'a mut self, expected: &'a [&str]) -> impl Future<Output = ()> + 'a {
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

    /// Reads what was said up to now, and holds the listing against it.
    async fn is_right(&mut self) {
        say(&mut self.connection, &room("lobby"), "now").await;
        // The answer is read first; what came before it is kept and read now.
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

/// Redis goes away, with or without what it had; meanwhile one leaves and one is cut off from it.
async fn through_a_restart(mut redis: Redis) {
    let nodes =
        [Gateway::start_on(&redis, &NO_GRACE).await, Gateway::start_on(&redis, &NO_GRACE).await];
    let mut stays = member(&nodes[0], "stays").await;
    let leaves = member(&nodes[1], "leaves").await;
    let mut watchers = Vec::new();
    for (number, node) in nodes.iter().enumerate() {
        watchers.push(Watcher::join(node.connect(&format!("w{number}")).await).await);
    }
    for watcher in &mut watchers {
        watcher.sees(&["leaves", "stays", "w0", "w1"]).await;
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
        watcher.sees(&["comes", "stays", "w0", "w1"]).await;
    }
    say(&mut stays, &room("lobby"), "still here").await;
    say(&mut comes, &room("lobby"), "so am I").await;
    for watcher in &mut watchers {
        let listed = listing(&mut watcher.connection).await;
        assert_eq!(listed, watcher.here);
    }
    // The registry itself has nobody too many.
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
    let mut watcher = Watcher::join(nodes[0].connect("w0").await).await;
    watcher.sees(&["stays", "w0"]).await;
    redis.command("FLUSHALL").await;
    // A listing of the registry itself has everybody again.
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
    watcher.sees(&["comes", "stays", "w0"]).await;
    watcher.is_right().await;
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
    let mut watcher = Watcher::join(deaf.connect("w0").await).await;
    watcher.sees(&["leaves", "w0"]).await;
    proxy.set(Mode::DropPushes);
    let mut moved = Vec::new();
    for number in 0..5 {
        moved.push(member(&other, &format!("u{number}")).await);
    }
    drop(leaves);
    moved.truncate(3);
    proxy.set(Mode::Open);
    watcher.sees(&["u0", "u1", "u2", "w0"]).await;
    proxy.set(Mode::Cut);
    moved.truncate(1);
    until("cut off", async || !ready(deaf.address).await).await;
    proxy.set(Mode::Open);
    watcher.sees(&["u0", "w0"]).await;
    watcher.is_right().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_of_a_frozen_node_leave_and_return_with_it() {
    let redis = Redis::start().await;
    let options = [NO_GRACE[0], lease_option()];
    let other = Gateway::start_on(&redis, &options).await;
    let frozen = Node::start(&redis, None, &options).await;
    let mut watcher = Watcher::join(other.connect("w0").await).await;
    let mut there = Vec::new();
    for number in 0..3 {
        let mut connection = connect(frozen.address, &format!("u{number}")).await;
        connection.join(&room("lobby")).await.unwrap();
        there.push(connection);
    }
    watcher.sees(&["u0", "u1", "u2", "w0"]).await;
    frozen.process.signal("STOP");
    let begun = Instant::now();
    watcher.sees(&["w0"]).await;
    assert!(begun.elapsed() < lease() + Duration::from_secs(5), "{:?}", begun.elapsed());
    // Somebody comes whom the frozen one does not hear of.
    let comes = member(&other, "comes").await;
    frozen.process.signal("CONT");
    watcher.sees(&["comes", "u0", "u1", "u2", "w0"]).await;
    let everybody = listing(&mut watcher.connection).await;
    until("the frozen one knows", async || listing(&mut there[0]).await == everybody).await;
    drop(comes);
    watcher.sees(&["u0", "u1", "u2", "w0"]).await;
    watcher.is_right().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_who_reconnect_after_a_drain_do_not_leave() {
    let redis = Redis::start().await;
    let (stops, other) =
        (Gateway::start_on(&redis, &[]).await, Gateway::start_on(&redis, &[]).await);
    let mut watcher = Watcher::join(other.connect("w0").await).await;
    let moves = member(&stops, "moves").await;
    let goes = member(&stops, "goes").await;
    watcher.sees(&["goes", "moves", "w0"]).await;
    stops.stop().await;
    drop((moves, goes));
    // A client waits before it comes back; the others look for who is gone every second.
    let (stopped, back_off) = (Instant::now(), Duration::from_millis(1500));
    until("its turn", async || stopped.elapsed() >= back_off).await;
    let moves = member(&other, "moves").await;
    // That "moves" had never left shows, since it would be no news that it comes.
    watcher.sees(&["moves", "w0"]).await;
    watcher.is_right().await;
    drop(moves);
}

/// A node with 1,000 users in 50 rooms gets SIGKILL.
#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_killed_node_leave_once_everywhere() {
    let redis = Redis::start().await;
    let options = [
        ("presence.event_members_max", "1000"),
        // The watchers read nothing while the others come.
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
    // Bob has a device elsewhere, and stays.
    let mut bob = survivors[1].connect("u7").await;
    bob.join(&rooms[7]).await.unwrap();
    for watcher in &mut watchers {
        for room in &rooms {
            let name = room.as_str();
            assert!(present_in(watcher, name).await.count >= 22, "{name}");
        }
    }
    killed.process.kill().await;
    let begun = Instant::now();
    for watcher in &mut watchers {
        let mut left = BTreeSet::new();
        while left.len() < 999 {
            let moved = heard(watcher, |frame| match frame {
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
            let presence = present_in(watcher, room.as_str()).await;
            let expected: &[&str] = if number == 7 { &["u7", "w0", "w1"] } else { &["w0", "w1"] };
            assert_eq!(names(&presence.users), expected, "{room}");
            assert_eq!(presence.count, expected.len() as u64);
        }
        assert_eq!(present(watcher, json!({"type": "presence"})).await.count, 3);
        // Nothing more was told than that.
        say(watcher, &rooms[0], "all gone").await;
        let more = heard(watcher, |frame| match frame {
            ServerFrame::MemberLeft(moved) => Some(Some(moved)),
            ServerFrame::Message(_) => Some(None),
            _ => None,
        });
        assert_eq!(more.await, None);
    }
    drop(gone);
}
