//! State of one user: directs, inbox, watches, sessions; on a single node, on three nodes of a
//! cluster, and on two with a Redis Cluster.

use std::time::Duration;

use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    options::ConnectOptions,
};
use skein_protocol::{
    error::ErrorCode,
    ids::MessageId,
    position::Position,
    protocol::server_frame::{
        AckFrame, ConnectedFrame, DirectFrame, HistoryEntry, OnlineState, ResetFrame, ServerFrame,
    },
};

use tokio::time::Instant;

use crate::{
    harness::{Gateway, closed, get, next_message, room, say, within},
    presence::{TestDeployment, ask, next_matching, rejection_code},
};

/// A connection and its `connected` frame.
pub struct Device {
    pub connection: ClientConnection,
    pub connected: ConnectedFrame,
}

impl Device {
    /// Connects to the `node`th node as `user`, with the options that `and` sets.
    pub async fn open(
        deployment: &TestDeployment,
        node: usize,
        user: &str,
        and: impl FnOnce(&mut ConnectOptions),
    ) -> Self {
        let url = deployment.nodes[node % deployment.nodes.len()].url("/ws");
        let mut options = ConnectOptions::new(url).user(user);
        and(&mut options);
        let mut connection = ClientConnection::open(&options).await.unwrap();
        let connected = connection.expect_connected().await.unwrap();
        Self { connection, connected }
    }

    async fn new(deployment: &TestDeployment, node: usize, user: &str) -> Self {
        Self::open(deployment, node, user, |_| {}).await
    }

    /// The next direct.
    pub async fn direct(&mut self) -> DirectFrame {
        next_matching(&mut self.connection, |frame| match frame {
            ServerFrame::Direct(direct) => Some(*direct),
            _ => None,
        })
        .await
    }

    /// The contents of the next directs.
    async fn said(&mut self, count: usize) -> Vec<String> {
        let mut said = Vec::new();
        for _ in 0..count {
            said.push(text_of(&self.direct().await));
        }
        said
    }

    async fn send(&mut self, to: &str, content: &str) -> AckFrame {
        self.send_frame(json!({"type": "direct", "to": to, "content": content})).await
    }

    async fn send_frame(&mut self, frame: Value) -> AckFrame {
        match ask(&mut self.connection, frame).await.unwrap() {
            ServerFrame::Ack(ack) => *ack,
            other => panic!("{other:?}"),
        }
    }

    pub async fn tell(&mut self, frame: Value) {
        self.connection.send_json(&frame).await.unwrap();
        // Frames are handled in order, so an answer to this one means the earlier one was handled.
        ask(&mut self.connection, json!({"type": "ping"})).await.unwrap();
    }

    /// Acknowledges, and waits until a new connection sees the position.
    async fn acknowledge(&mut self, deployment: &TestDeployment, seq: u64) {
        let user = self.connected.user.id.to_string();
        self.tell(json!({"type": "ack", "seq": seq})).await;
        crate::harness::until("the acknowledgement counts", async || {
            Device::new(deployment, 1, &user).await.connected.inbox.acked >= seq
        })
        .await;
    }

    /// Asserts that no unread inbox entry is left: a direct to itself arrives next.
    async fn nothing_else(&mut self) {
        let me = self.connected.user.id.to_string();
        self.connection
            .send_json(&json!({"type": "direct", "to": me, "content": "to myself"}))
            .await
            .unwrap();
        assert_eq!(self.said(1).await, ["to myself"]);
    }

    async fn watch(&mut self, users: &[&str]) {
        let watch = json!({"type": "watch", "users": users});
        self.connection.send_json(&watch).await.unwrap();
    }

    /// The status that a `watch` of one user returns.
    async fn asks_for(&mut self, user: &str) -> OnlineState {
        let watch = json!({"type": "watch", "users": [user]});
        match ask(&mut self.connection, watch).await.unwrap() {
            ServerFrame::UserStatus(status) => status.status,
            other => panic!("{other:?}"),
        }
    }

    /// The next `user_status`.
    async fn status(&mut self) -> (String, OnlineState) {
        next_matching(&mut self.connection, |frame| match frame {
            ServerFrame::UserStatus(status) => Some((status.user.to_string(), status.status)),
            _ => None,
        })
        .await
    }
}

fn text_of(direct: &DirectFrame) -> String {
    direct.content.as_str().unwrap_or("not text").to_owned()
}

pub fn history_of(frame: ServerFrame) -> (Vec<String>, bool) {
    let ServerFrame::History(history) = frame else { panic!("{frame:?}") };
    assert!(history.room.is_none() && history.with.is_some());
    let text = |entry: &HistoryEntry| match entry {
        HistoryEntry::Direct(direct) => {
            assert!(direct.replay);
            text_of(direct)
        }
        other => panic!("{other:?}"),
    };
    (history.messages.iter().map(text).collect(), history.more)
}

#[tokio::test]
async fn a_direct_reaches_all_devices_of_both_users_only() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut anns_phone = Device::new(deployment, 1, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        let mut bobs_phone = Device::new(deployment, 2, "bob").await;
        let mut cat = Device::new(deployment, 2, "cat").await;
        // A room of that name is separate.
        for name in ["u:bob", "bob"] {
            cat.connection.join(&room(name)).await.unwrap();
        }
        let ack = ann.send("bob", "hello").await;
        assert_eq!((ack.to.unwrap().as_str(), ack.room, ack.duplicate), ("bob", None, false));
        let copy = ann.direct().await;
        assert_eq!((copy.seq, copy.id, &copy.epoch), (ack.seq, ack.id, &ack.epoch));
        for device in [&mut anns_phone, &mut bob, &mut bobs_phone] {
            let direct = device.direct().await;
            assert_eq!(
                (text_of(&direct), direct.id, direct.replay),
                ("hello".into(), ack.id, false)
            );
            assert_eq!((direct.from.id.as_str(), direct.to.as_str()), ("ann", "bob"));
        }
        cat.nothing_else().await;
        say(&mut cat.connection, &room("u:bob"), "of the room").await;
        bob.nothing_else().await;
    })
    .await;
}

#[tokio::test]
async fn a_repeated_direct_is_one_entry_and_no_echo_leaves_no_gap() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        let id = MessageId::random();
        let frame = json!({"type": "direct", "to": "bob", "content": "once", "id": id});
        let first = ann.send_frame(frame.clone()).await;
        let again = ann.send_frame(frame).await;
        assert_eq!((again.seq, again.duplicate, first.duplicate), (first.seq, true, false));
        let silent = json!({"type": "direct", "to": "bob", "content": "silent", "echo": false});
        let silent = ann.send_frame(silent).await;
        assert_eq!((silent.seq, silent.duplicate), (first.seq + 1, false));
        let last = ann.send("bob", "last").await;
        assert_eq!(last.seq, silent.seq + 1);
        assert_eq!(ann.said(2).await, ["once", "last"], "no copy of what was sent without echo");
        assert_eq!(bob.said(3).await, ["once", "silent", "last"]);
        // A direct to oneself has one inbox.
        let own = ann.send("ann", "note").await;
        assert_eq!(own.seq, last.seq + 1);
    })
    .await;
}

#[tokio::test]
async fn a_binary_direct_stays_binary_and_is_base64_in_history() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        let header = json!({"type": "direct", "to": "bob", "kind": "file"}).to_string();
        let length = (header.len() as u16).to_be_bytes();
        let frame = [&length[..], header.as_bytes(), &[0, 255, 7]].concat();
        ann.connection.send_bytes(frame).await.unwrap();
        let (direct, payload) = within(async {
            loop {
                if let ReceivedMessage::BinaryDirect(direct, payload) =
                    bob.connection.next().await.unwrap()
                {
                    return (direct, payload);
                }
            }
        })
        .await;
        assert_eq!((&payload[..], direct.to.as_str()), (&[0, 255, 7][..], "bob"));
        let asked = json!({"type": "history", "with": "ann"});
        let ServerFrame::History(history) = ask(&mut bob.connection, asked).await.unwrap() else {
            panic!()
        };
        let HistoryEntry::Direct(direct) = &history.messages[0] else { panic!() };
        assert_eq!((direct.encoding.as_deref(), &direct.content), (Some("base64"), &json!("AP8H")));
    })
    .await;
}

#[tokio::test]
async fn directs_sent_while_away_arrive_from_the_acked_position() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        for text in ["one", "two", "three"] {
            ann.send("bob", text).await;
        }
        let mut bob = Device::new(deployment, 1, "bob").await;
        let inbox = &bob.connected.inbox;
        assert_eq!((inbox.seq, inbox.acked, inbox.oldest, inbox.unread), (3, 0, 1, 3));
        let first = bob.direct().await;
        assert!(first.replay && first.seq == 1);
        assert_eq!(bob.said(2).await, ["two", "three"]);
        bob.acknowledge(deployment, 2).await;
        // An ack of one device counts for all devices.
        let mut other = Device::new(deployment, 2, "bob").await;
        let inbox = &other.connected.inbox;
        assert_eq!((inbox.seq, inbox.acked, inbox.unread), (3, 2, 1));
        assert_eq!(other.said(1).await, ["three"]);
        // The position never goes back, and above the top it is the top.
        bob.acknowledge(deployment, 1).await;
        bob.tell(json!({"type": "ack", "seq": 1000, "epoch": "another"})).await;
        assert_eq!(Device::new(deployment, 0, "bob").await.connected.inbox.acked, 2);
        bob.tell(json!({"type": "ack", "seq": 1000})).await;
        bob.acknowledge(deployment, 3).await;
        let mut third = Device::new(deployment, 0, "bob").await;
        assert_eq!((third.connected.inbox.acked, third.connected.inbox.unread), (3, 0));
        third.nothing_else().await;
        // Directs to oneself are never unread.
        assert_eq!(Device::new(deployment, 1, "ann").await.connected.inbox.unread, 0);
    })
    .await;
}

#[tokio::test]
async fn a_given_inbox_position_overrides_acks_of_other_devices() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        ann.send("bob", "one").await;
        let had = bob.direct().await;
        for text in ["two", "three"] {
            ann.send("bob", text).await;
        }
        let mut other = Device::new(deployment, 2, "bob").await;
        assert_eq!(other.said(3).await, ["one", "two", "three"]);
        other.acknowledge(deployment, 3).await;
        let since = Position::new(had.epoch.clone(), had.seq);
        let mut back = Device::open(deployment, 0, "bob", |to| to.inbox = Some(since)).await;
        assert_eq!(back.said(2).await, ["two", "three"]);
        back.nothing_else().await;
        // A position of another log cannot be resumed, and the client receives a reset.
        let lost = Position::new("0-lost".parse().unwrap(), 1);
        let mut lost = Device::open(deployment, 1, "bob", |to| to.inbox = Some(lost)).await;
        let ResetFrame { room, seq, epoch, .. } =
            next_matching(&mut lost.connection, |frame| match frame {
                ServerFrame::Reset(reset) => Some(reset),
                _ => None,
            })
            .await;
        assert_eq!((room, seq, epoch), (None, 3, had.epoch));
        assert_eq!(lost.said(1).await, ["to myself"]);
    })
    .await;
}

#[tokio::test]
async fn an_inbox_is_bounded_and_reports_expired_entries() {
    let few = [
        ("inbox.max_entries", "100"),
        ("history.window", "1ms"),
        ("limits.messages_per_second", "0"),
    ];
    TestDeployment::each(&few, async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        // A user who never connected has a smaller inbox.
        drop(Device::new(deployment, 1, "bob").await);
        for n in 1..=300 {
            ann.send("bob", &n.to_string()).await;
        }
        let mut bob = Device::new(deployment, 1, "bob").await;
        let inbox = bob.connected.inbox.clone();
        // Redis trims slightly more than the limit allows.
        assert!(inbox.acked < inbox.oldest - 1 && (101..=201).contains(&inbox.oldest), "{inbox:?}");
        assert_eq!((inbox.seq, inbox.unread), (300, 301 - inbox.oldest));
        assert_eq!(text_of(&bob.direct().await), inbox.oldest.to_string());
        // A device with an older position is reset.
        let since = Position::new(inbox.epoch.clone(), 5);
        let mut old = Device::open(deployment, 2, "bob", |to| to.inbox = Some(since)).await;
        let reset = next_matching(&mut old.connection, |frame| match frame {
            ServerFrame::Reset(reset) => Some(reset),
            _ => None,
        })
        .await;
        assert!(reset.room.is_none());
        assert_eq!(old.direct().await.seq, reset.seq + 1);
    })
    .await;
}

#[tokio::test]
async fn history_with_a_user_has_only_directs_of_the_two() {
    TestDeployment::each(&[("limits.messages_per_second", "0")], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        let mut cat = Device::new(deployment, 2, "cat").await;
        for n in 0..5 {
            ann.send("bob", &format!("a{n}")).await;
            cat.send("bob", &format!("c{n}")).await;
            bob.send("ann", &format!("b{n}")).await;
        }
        let page = async |who: &mut Device, and: Value| {
            let mut asked = json!({"type": "history", "with": "bob"});
            asked.as_object_mut().unwrap().extend(and.as_object().unwrap().clone());
            history_of(ask(&mut who.connection, asked).await.unwrap())
        };
        let (all, more) = page(&mut ann, json!({})).await;
        let expected: Vec<String> =
            (0..5).flat_map(|n| [format!("a{n}"), format!("b{n}")]).collect();
        assert_eq!((&all, more), (&expected, false));
        let (newest, more) = page(&mut ann, json!({"limit": 3})).await;
        assert_eq!((&newest[..], more), (&expected[7..], true));
        let (first, more) = page(&mut ann, json!({"after": 0, "limit": 4})).await;
        assert_eq!((&first[..], more), (&expected[..4], true));
        let (before, more) = page(&mut ann, json!({"before": 5, "limit": 4})).await;
        assert_eq!((&before[..], more), (&expected[..4], false));
        assert_eq!(page(&mut cat, json!({"limit": 200})).await.0, ["c0", "c1", "c2", "c3", "c4"]);
        let nobody = json!({"type": "history", "with": "nobody"});
        assert!(history_of(ask(&mut ann.connection, nobody).await.unwrap()).0.is_empty());
    })
    .await;
}

#[tokio::test]
async fn log_reads_of_a_connection_are_rate_limited() {
    let limits = [("limits.read_bytes_per_second", "4KiB"), ("publish.timeout", "900ms")];
    let gateway = Gateway::start(&limits).await;
    let mut ann = gateway.connect("ann").await;
    // Each read costs at least 4 KiB: eight are the burst, the ninth waits briefly, and then one
    // per second is allowed, which exceeds the wait of a frame.
    let mut taken = 0;
    let refusal = loop {
        match ask(&mut ann, json!({"type": "history", "with": "bob"})).await {
            Ok(_) => taken += 1,
            Err(refusal) => break refusal,
        }
    };
    assert_eq!(refusal.code, ErrorCode::RateLimited);
    assert!(refusal.retry_after_ms.is_some_and(|ms| ms > 0));
    // On a slow machine the budget refills by a few more meanwhile.
    assert!((9..20).contains(&taken), "{taken}");
    let metrics = get(gateway.admin, "/metrics").await.body;
    assert!(!metrics.contains("gateway_client_reads_delayed_total 0\n"), "{metrics}");
    gateway.connect("bob").await.join(&room("lobby")).await.unwrap();
}

#[tokio::test]
async fn watch_reports_status_at_once_and_on_change() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let begun = Instant::now();
        let bob = Device::new(deployment, 1, "bob").await;
        let mut ann = Device::new(deployment, 0, "ann").await;
        ann.watch(&["bob", "cat"]).await;
        let mut now = [ann.status().await, ann.status().await];
        now.sort_by(|a, b| a.0.cmp(&b.0));
        assert_eq!(
            now,
            [("bob".into(), OnlineState::Online), ("cat".into(), OnlineState::Offline)]
        );
        let cat = Device::new(deployment, 2, "cat").await;
        assert_eq!(ann.status().await, ("cat".into(), OnlineState::Online));
        // A second device changes nothing.
        let second = Device::new(deployment, 0, "cat").await;
        drop(cat);
        drop(bob);
        assert_eq!(ann.status().await, ("bob".into(), OnlineState::Offline));
        drop(second);
        assert_eq!(ann.status().await, ("cat".into(), OnlineState::Offline));
        // Unwatched users cause no more frames.
        let unwatch = json!({"type": "unwatch", "users": ["cat"]});
        ann.connection.send_json(&unwatch).await.unwrap();
        ann.tell(json!({"type": "pong"})).await;
        let _cat = Device::new(deployment, 2, "cat").await;
        let _bob = Device::new(deployment, 1, "bob").await;
        assert_eq!(ann.status().await, ("bob".into(), OnlineState::Online));
        // The nodes have just started: no status waits for the end of a lease.
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    })
    .await;
}

#[tokio::test]
async fn a_connected_user_is_online_on_every_node() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        for round in 0..10 {
            let node = round % 3;
            let bob = Device::new(deployment, node, "bob").await;
            assert_eq!(ann.asks_for("bob").await, OnlineState::Online, "round {round}");
            drop(bob);
            crate::harness::until("bob has left", async || {
                ann.asks_for("bob").await == OnlineState::Offline
            })
            .await;
        }
    })
    .await;
}

#[tokio::test]
async fn peers_of_directs_are_watched_automatically() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let mut bob = Device::new(deployment, 1, "bob").await;
        let mut cat = Device::new(deployment, 2, "cat").await;
        ann.send("bob", "hello").await;
        assert_eq!(bob.said(1).await, ["hello"]);
        cat.send("ann", "hello").await;
        assert_eq!(ann.said(2).await, ["hello", "hello"]);
        // The receiver of a direct watches its sender once the sender's status is subscribed to.
        for user in ["bob", "cat"] {
            ann.watch(&[user]).await;
            assert_eq!(ann.status().await.1, OnlineState::Online);
        }
        bob.watch(&["ann"]).await;
        assert_eq!(bob.status().await, ("ann".into(), OnlineState::Online));
        drop(cat);
        assert_eq!(ann.status().await, ("cat".into(), OnlineState::Offline));
        drop(ann);
        assert_eq!(bob.status().await, ("ann".into(), OnlineState::Offline));
    })
    .await;
}

#[tokio::test]
async fn watches_above_the_limit_are_rejected_as_a_whole() {
    TestDeployment::each(&[("limits.watches_per_connection", "3")], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        ann.watch(&["a", "b", "b"]).await;
        assert_ne!(ann.status().await.0, ann.status().await.0, "one for each user");
        let more = json!({"type": "watch", "users": ["c", "d"]});
        assert_eq!(rejection_code(&mut ann.connection, more).await, ErrorCode::LimitReached);
        ann.watch(&["c"]).await;
        assert_eq!(ann.status().await.0, "c");
    })
    .await;
}

#[tokio::test]
async fn a_session_resumes_on_any_node_with_its_user_and_data() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann =
            Device::open(deployment, 0, "ann", |to| to.name = Some("Ann Lee".into())).await;
        assert!(!ann.connected.resumed && ann.connected.session.len() <= 512);
        let set = json!({"type": "session_set", "data": {"theme": "dark", "old": 1}});
        ask(&mut ann.connection, set).await.unwrap();
        let set = json!({"type": "session_set", "data": {"old": null, "n": [1]}});
        let ServerFrame::Session(session) = ask(&mut ann.connection, set).await.unwrap() else {
            panic!()
        };
        assert_eq!(json!(session.data), json!({"theme": "dark", "n": [1]}));
        let large = json!({"type": "session_set", "data": {"x": "y".repeat(16_360)}});
        assert_eq!(rejection_code(&mut ann.connection, large).await, ErrorCode::TooLarge);
        let (token, id) = (ann.connected.session.clone(), ann.connected.session_id);
        drop(ann);
        // A client without a user id gets the user of its session.
        let url = deployment.nodes[deployment.nodes.len() - 1].url("/ws");
        let mut options = ConnectOptions::new(url);
        options.session = Some(token.clone());
        let mut connection = ClientConnection::open(&options).await.unwrap();
        let connected = connection.expect_connected().await.unwrap();
        assert!(connected.resumed && connected.session_id == id && connected.session == token);
        assert_eq!((connected.user.id.as_str(), connected.user.name.as_str()), ("ann", "Ann Lee"));
        let got = ask(&mut connection, json!({"type": "session_get"})).await.unwrap();
        let ServerFrame::Session(session) = got else { panic!() };
        assert_eq!(json!(session.data), json!({"theme": "dark", "n": [1]}));
    })
    .await;
}

#[tokio::test]
async fn a_session_keeps_its_display_name_across_resumes() {
    TestDeployment::each(&[], async |deployment| {
        let ann = Device::open(deployment, 0, "ann", |to| to.name = Some("Ann Lee".into())).await;
        let token = ann.connected.session.clone();
        drop(ann);
        for node in 0..3 {
            let options = ConnectOptions {
                session: Some(token.clone()),
                ..ConnectOptions::new(deployment.nodes[node % deployment.nodes.len()].url("/ws"))
            };
            let mut connection = ClientConnection::open(&options).await.unwrap();
            let connected = connection.expect_connected().await.unwrap();
            assert_eq!((connected.resumed, connected.user.name.as_str()), (true, "Ann Lee"));
        }
    })
    .await;
}

#[tokio::test]
async fn one_of_two_concurrent_resumes_of_a_session_stays() {
    TestDeployment::each(&[], async |deployment| {
        for _ in 0..10 {
            let ann = Device::new(deployment, 0, "ann").await;
            let token = ann.connected.session.clone();
            drop(ann);
            let open = |node: usize| {
                let token = token.clone();
                Device::open(deployment, node, "ann", move |to| to.session = Some(token))
            };
            let (first, second) = tokio::join!(open(0), open(1));
            let mut ends = Vec::new();
            for mut device in [first, second] {
                let ping = device.connection.request(&json!({"type": "ping"})).await;
                ends.push(device);
                drop(ping);
            }
            // One connection is eventually closed with 4000; the other one is not.
            let [mut one, mut other]: [Device; 2] = ends.try_into().ok().unwrap();
            let (code, stays) = within(async {
                tokio::select! {
                    (code, _) = closed(&mut one.connection) => (code, &mut other),
                    (code, _) = closed(&mut other.connection) => (code, &mut one),
                }
            })
            .await;
            assert_eq!(code, Some(4000));
            stays.nothing_else().await;
        }
    })
    .await;
}

#[tokio::test]
async fn sessions_per_user_are_limited_and_unused_ones_go_first() {
    TestDeployment::each(&[("limits.handshakes_per_minute_per_ip", "0")], async |deployment| {
        let in_use = Device::new(deployment, 0, "ann").await;
        let token = in_use.connected.session.clone();
        for _ in 0..110 {
            drop(Device::new(deployment, 0, "ann").await);
        }
        drop(in_use);
        let back = Device::open(deployment, 1, "ann", |to| to.session = Some(token)).await;
        assert!(back.connected.resumed);
    })
    .await;
}

#[tokio::test]
async fn a_session_lives_while_in_use_and_for_its_ttl_after() {
    TestDeployment::each(&[("sessions.ttl", "2s")], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let token = ann.connected.session.clone();
        // The session is used for longer than its TTL, and is kept.
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            ask(&mut ann.connection, json!({"type": "ping"})).await.unwrap();
            crate::harness::poll_pause().await;
        }
        drop(ann);
        let resume = async || {
            let token = token.clone();
            Device::open(deployment, 1, "ann", move |to| to.session = Some(token)).await.connected
        };
        assert!(resume().await.resumed);
        // A resume counts as use, so it is tried only once, after the TTL.
        let until = Instant::now() + Duration::from_secs(4);
        while Instant::now() < until {
            crate::harness::poll_pause().await;
        }
        assert!(!resume().await.resumed);
    })
    .await;
}

#[tokio::test]
async fn an_invalid_session_token_creates_a_new_session() {
    TestDeployment::each(&[], async |deployment| {
        let ann = Device::new(deployment, 0, "ann").await;
        let token = ann.connected.session.clone();
        let bob = Device::open(deployment, 1, "bob", |to| to.session = Some(token.clone())).await;
        assert!(!bob.connected.resumed && bob.connected.user.id.as_str() == "bob");
        let mut forged = token.clone().into_bytes();
        forged[3] = if forged[3] == b'A' { b'B' } else { b'A' };
        for bad in ["nonsense".to_owned(), String::from_utf8(forged).unwrap()] {
            let options = ConnectOptions {
                session: Some(bad),
                ..ConnectOptions::new(deployment.nodes[0].url("/ws"))
            };
            let mut connection = ClientConnection::open(&options).await.unwrap();
            let connected = connection.expect_connected().await.unwrap();
            assert!(!connected.resumed && connected.user.id.as_str().starts_with("guest-"));
        }
        let again = Device::open(deployment, 2, "ann", |to| to.session = Some(token)).await;
        assert!(again.connected.resumed);
    })
    .await;
}

#[tokio::test]
async fn a_session_keeps_only_its_newest_connection() {
    TestDeployment::each(&[], async |deployment| {
        let mut first = Device::new(deployment, 0, "ann").await;
        let mut other = Device::new(deployment, 0, "ann").await;
        let token = first.connected.session.clone();
        let mut second = Device::open(deployment, 1, "ann", |to| to.session = Some(token)).await;
        assert!(second.connected.resumed);
        assert_eq!(closed(&mut first.connection).await, (Some(4000), String::new()));
        // Other sessions of the user stay.
        other.nothing_else().await;
        assert_eq!(second.said(1).await, ["to myself"]);
    })
    .await;
}

#[tokio::test]
async fn invalid_inbox_frames_are_rejected_and_keep_the_connection() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = Device::new(deployment, 0, "ann").await;
        let bad = json!({"type": "direct", "to": "_api", "content": 1});
        assert_eq!(rejection_code(&mut ann.connection, bad).await, ErrorCode::BadRequest);
        let refresh = json!({"type": "refresh", "token": "x"});
        assert_eq!(rejection_code(&mut ann.connection, refresh).await, ErrorCode::BadRequest);
        ann.connection.join(&room("r")).await.unwrap();
        say(&mut ann.connection, &room("r"), "here").await;
        assert_eq!(next_message(&mut ann.connection).await.content, json!("here"));
        let url = deployment.nodes[0].url("/ws?inbox=nonsense");
        let mut connection = ClientConnection::open(&ConnectOptions::new(url)).await.unwrap();
        connection.expect_connected().await.unwrap();
        let code = next_matching(&mut connection, |frame| match frame {
            ServerFrame::Error(refusal) => Some(refusal.code),
            _ => None,
        });
        assert_eq!(code.await, ErrorCode::BadRequest);
    })
    .await;
}
