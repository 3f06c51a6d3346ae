//! Managed rooms, rooms created by a join, and ephemeral rooms; on a single node and on three of a
//! cluster.

use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    frames,
    options::ConnectOptions,
};
use skein_protocol::{
    error::ErrorCode,
    position::Position,
    protocol::{
        MessageKind,
        server_frame::{RecoveryFailure, RoomInfoFrame, ServerFrame},
    },
};

use crate::{
    harness::{Gateway, closed, get, next_message, room, say, until, within},
    presence::{TestDeployment, ask, next_matching, rejection_code},
};

async fn info(connection: &mut ClientConnection, frame: Value) -> RoomInfoFrame {
    match ask(connection, frame).await.unwrap() {
        ServerFrame::RoomInfo(info) => *info,
        other => panic!("{other:?}"),
    }
}

async fn info_of(connection: &mut ClientConnection, name: &str) -> RoomInfoFrame {
    info(connection, json!({"type": "room_info", "room": name})).await
}

/// The ids of the public rooms, in pages of `limit`.
async fn listed(connection: &mut ClientConnection, prefix: &str, limit: u32) -> Vec<String> {
    let (mut names, mut cursor) = (Vec::new(), None::<String>);
    loop {
        let frame = json!({"type": "rooms", "prefix": prefix, "limit": limit, "cursor": cursor});
        let ServerFrame::Rooms(page) = ask(connection, frame).await.unwrap() else {
            panic!("no rooms")
        };
        names.extend(page.rooms.iter().map(|room| room.room.to_string()));
        cursor = page.cursor;
        if cursor.is_none() {
            return names;
        }
    }
}

async fn join_with(
    connection: &mut ClientConnection,
    name: &str,
    password: &str,
) -> Option<ErrorCode> {
    let password = Some(password).filter(|password| !password.is_empty());
    let frame = json!({"type": "join", "room": name, "password": password});
    ask(connection, frame).await.err().map(|refusal| refusal.code)
}

#[tokio::test]
async fn a_created_room_is_described_and_listed_on_every_node() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        let create = json!({
            "type": "create_room", "room": "team:one", "name": "Team One", "max_members": 5,
            "password": "sesame", "meta": {"topic": "all"},
        });
        let made = info(&mut ann, create.clone()).await;
        assert_eq!((made.name.as_str(), made.members), ("Team One", 0));
        assert_eq!(made.owner.as_ref().map(|owner| owner.as_str()), Some("ann"));
        assert!(made.public && made.protected && made.durable);
        assert_eq!((made.max_members, &made.meta["topic"]), (Some(5), &json!("all")));
        assert_eq!(
            RoomInfoFrame { reference: None, ..info_of(&mut bob, "team:one").await },
            RoomInfoFrame { reference: None, ..made }
        );
        assert_eq!(rejection_code(&mut bob, create).await, ErrorCode::RoomExists);
        // A private room is visible only to its owner and its members.
        let private = json!({"type": "create_room", "room": "team:two", "public": false});
        info(&mut ann, private).await;
        let asks = json!({"type": "room_info", "room": "team:two"});
        assert_eq!(rejection_code(&mut bob, asks.clone()).await, ErrorCode::NotFound);
        assert_eq!(listed(&mut bob, "team:", 1).await, ["team:one"]);
        bob.join(&room("team:two")).await.unwrap();
        assert_eq!(info(&mut bob, asks).await.members, 1);
        assert!(!info_of(&mut ann, "team:two").await.public);
        let nothing = json!({"type": "room_info", "room": "nothing"});
        assert_eq!(rejection_code(&mut bob, nothing).await, ErrorCode::NotFound);
    })
    .await;
}

#[tokio::test]
async fn a_room_with_members_or_a_log_cannot_be_created() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        ann.join(&room("lobby")).await.unwrap();
        let create = json!({"type": "create_room", "room": "lobby"});
        assert_eq!(rejection_code(&mut bob, create.clone()).await, ErrorCode::RoomExists);
        say(&mut ann, &room("lobby"), "kept").await;
        ann.request(&frames::OutgoingLeave::new(&room("lobby"))).await.unwrap();
        assert_eq!(rejection_code(&mut bob, create).await, ErrorCode::RoomExists);
    })
    .await;
}

#[tokio::test]
async fn password_guesses_are_limited_and_known_ones_pass() {
    let gateway = Gateway::start(&[("limits.password_failures_per_minute_per_ip", "3")]).await;
    let mut ann = gateway.connect("ann").await;
    let create = json!({"type": "create_room", "room": "vault", "password": "sesame"});
    ask(&mut ann, create).await.unwrap();
    assert_eq!(join_with(&mut ann, "vault", "sesame").await, None);
    // The fourth guess of a user must wait, and so must the third of another: three users failed
    // before.
    let mut told = Vec::new();
    for user in ["eve", "mallory"] {
        for guess in ["a", "b", "c", "d"] {
            // One connection each, because a connection may try only five passwords.
            let mut connection = gateway.connect(user).await;
            let guess = format!("{user}{guess}");
            let frame = json!({"type": "join", "room": "vault", "password": guess});
            match ask(&mut connection, frame).await {
                Err(refusal) => {
                    let waits = refusal.retry_after_ms.is_some_and(|ms| ms > 100);
                    assert_eq!(waits, refusal.code == ErrorCode::RateLimited);
                    told.push(refusal.code);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    use ErrorCode::{RateLimited as Later, WrongPassword as Wrong};
    assert_eq!(told, [Wrong, Wrong, Wrong, Later, Wrong, Wrong, Later, Later]);
    // A legitimate user of the same address who has not joined before.
    let mut bob = gateway.connect("bob").await;
    assert_eq!(join_with(&mut bob, "vault", "sesame").await, None);
    let metrics = get(gateway.admin, "/metrics").await.body;
    for line in
        ["{result=\"wrong\"} 5\n", "{result=\"rate_limited\"} 3\n", "{result=\"correct\"} 2\n"]
    {
        assert!(
            metrics.contains(&format!("gateway_room_password_checks_total{line}")),
            "{metrics}"
        );
    }
}

#[tokio::test]
async fn a_protected_room_is_joined_only_with_its_password() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let create = json!({"type": "create_room", "room": "vault", "password": "sesame"});
        info(&mut ann, create).await;
        for node in 0..3 {
            let mut bob = deployment.connect(node, &format!("bob{node}")).await;
            assert_eq!(join_with(&mut bob, "vault", "").await, Some(ErrorCode::WrongPassword));
            assert_eq!(
                join_with(&mut bob, "vault", "barley").await,
                Some(ErrorCode::WrongPassword)
            );
            // The connection stays open, without the room.
            let message = json!({"type": "message", "room": "vault", "content": 1});
            assert_eq!(rejection_code(&mut bob, message).await, ErrorCode::NotJoined);
            assert_eq!(join_with(&mut bob, "vault", "sesame").await, None);
            say(&mut bob, &room("vault"), "in").await;
        }
        // The owner needs the password too.
        assert_eq!(join_with(&mut ann, "vault", "").await, Some(ErrorCode::WrongPassword));
        for (query, code) in [("password=sesame", None), ("password=x", Some("wrong_password"))] {
            let node = deployment.nodes.last().unwrap();
            let url = node.url(&format!("/ws/rooms/vault?{query}"));
            let mut cat =
                ClientConnection::open(&ConnectOptions::new(url).user("cat")).await.unwrap();
            cat.expect_connected().await.unwrap();
            let frame = cat.next_frame().await.unwrap();
            match code {
                None => assert!(matches!(frame, ServerFrame::Joined(_)), "{frame:?}"),
                Some(code) => assert_eq!(closed(&mut cat).await, (Some(1008), code.to_owned())),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_member_limit_of_a_room_holds_across_nodes() {
    TestDeployment::each(&[("presence.grace", "0s")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        info(&mut ann, json!({"type": "create_room", "room": "small", "max_members": 5})).await;
        let mut joins = Vec::new();
        for number in 0..30 {
            let mut connection = deployment.connect(number, &format!("u{number}")).await;
            joins.push(async move {
                let refused = join_with(&mut connection, "small", "").await;
                (connection, refused)
            });
        }
        let joined = futures_util::future::join_all(joins).await;
        let (inside, outside): (Vec<_>, Vec<_>) =
            joined.into_iter().partition(|(_, refused)| refused.is_none());
        assert_eq!(inside.len(), 5);
        assert!(outside.iter().all(|(_, refused)| *refused == Some(ErrorCode::RoomFull)));
        assert_eq!(info_of(&mut ann, "small").await.members, 5);
        // A user who is counted already may join with another device.
        let inside_user = {
            let mut of_it = inside;
            let (mut connection, _) = of_it.pop().unwrap();
            let presence = ask(&mut connection, json!({"type": "presence", "room": "small"})).await;
            let ServerFrame::Presence(presence) = presence.unwrap() else { panic!("no presence") };
            let user = presence.users[0].id.to_string();
            let mut again = deployment.connect(2, &user).await;
            assert_eq!(join_with(&mut again, "small", "").await, None);
            // A member who leaves frees a place at once.
            connection.request(&frames::OutgoingLeave::new(&room("small"))).await.unwrap();
            of_it
        };
        let mut late = deployment.connect(1, "late").await;
        until("let in", async || join_with(&mut late, "small", "").await.is_none()).await;
        drop(inside_user);
    })
    .await;
}

#[tokio::test]
async fn a_rejected_join_leaves_no_presence() {
    TestDeployment::each(&[], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        info(&mut ann, json!({"type": "create_room", "room": "one", "max_members": 1})).await;
        ann.join(&room("one")).await.unwrap();
        let mut devices = [deployment.connect(1, "bob").await, deployment.connect(1, "bob").await];
        // All at once, so that each join runs while another is being rejected.
        for round in 0..20 {
            for device in &mut devices {
                device
                    .send_json(&json!({"type": "join", "room": "one", "ref": round}))
                    .await
                    .unwrap();
            }
        }
        for device in &mut devices {
            for _ in 0..20 {
                let code = next_matching(device, |frame| match frame {
                    ServerFrame::Error(refusal) => Some(refusal.code),
                    ServerFrame::Joined(_) => panic!("let in"),
                    _ => None,
                });
                assert_eq!(code.await, ErrorCode::RoomFull);
            }
        }
        say(&mut ann, &room("one"), "alone").await;
        let told = next_matching(&mut ann, |frame| match frame {
            ServerFrame::MemberJoined(moved) => Some(Some(moved)),
            ServerFrame::Message(_) => Some(None),
            _ => None,
        });
        assert_eq!(told.await, None);
        assert_eq!(info_of(&mut ann, "one").await.members, 1);
    })
    .await;
}

#[tokio::test]
async fn a_join_after_a_deletion_enters_the_new_room_or_none() {
    TestDeployment::each(&[], async |deployment| {
        for round in 0..20 {
            let name = format!("again{round}");
            let mut ann = deployment.connect(round, "ann").await;
            info(&mut ann, json!({"type": "create_room", "room": name})).await;
            ann.join(&room(&name)).await.unwrap();
            ann.send_json(&json!({"type": "delete_room", "room": name})).await.unwrap();
            // A client that gets `retry_after_ms` retries.
            until("joined", async || {
                let refused = join_with(&mut ann, &name, "").await;
                assert!(matches!(refused, None | Some(ErrorCode::Unavailable)), "{refused:?}");
                refused.is_none()
            })
            .await;
            say(&mut ann, &room(&name), "anew").await;
            assert_eq!(next_message(&mut ann).await.seq, 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_deleted_room_closes_for_all_and_restarts_empty() {
    TestDeployment::each(&[], async |deployment| {
        let vault = room("vault");
        let mut ann = deployment.connect(0, "ann").await;
        let create = json!({"type": "create_room", "room": "vault"});
        info(&mut ann, create.clone()).await;
        let mut members = Vec::new();
        for node in 0..3 {
            let mut member = deployment.connect(node, &format!("m{node}")).await;
            member.join(&vault).await.unwrap();
            members.push(member);
        }
        let epoch = ann.join(&vault).await.unwrap().epoch;
        let said = say(&mut members[1], &vault, "deleted soon").await;
        let delete = json!({"type": "delete_room", "room": "vault"});
        assert_eq!(rejection_code(&mut members[0], delete.clone()).await, ErrorCode::Forbidden);
        let answer = ask(&mut ann, delete.clone()).await.unwrap();
        let ServerFrame::RoomClosed(closed) = answer else { panic!("{answer:?}") };
        assert!(closed.reference.is_some() && closed.room == vault);
        for member in &mut members {
            let closed = next_matching(member, |frame| match frame {
                ServerFrame::RoomClosed(closed) => Some(closed),
                _ => None,
            })
            .await;
            assert_eq!((closed.room, closed.reference), (vault.clone(), None));
            let message = json!({"type": "message", "room": "vault", "content": 1});
            assert_eq!(rejection_code(member, message).await, ErrorCode::NotJoined);
        }
        assert_eq!(rejection_code(&mut ann, delete).await, ErrorCode::NotFound);
        let again = info(&mut members[2], create).await;
        assert_eq!(again.owner.unwrap().as_str(), "m2");
        let joined = members[0].join(&vault).await.unwrap();
        assert_eq!((joined.seq, joined.members, joined.read), (0, 1, 0));
        assert_ne!(joined.epoch, epoch);
        // A former member learns that its position is of another log.
        let since = Position::new(epoch, said.seq);
        let join =
            frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&vault) };
        let joined = members[1].join_with(&join).await.unwrap();
        assert_eq!((joined.recovered, joined.reason), (false, Some(RecoveryFailure::LogLost)));
    })
    .await;
}

#[tokio::test]
async fn empty_rooms_leave_the_listing_and_managed_ones_later() {
    let options = [("presence.grace", "0s"), ("rooms.empty_ttl", "1s")];
    TestDeployment::each(&options, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        ann.join(&room("adhoc")).await.unwrap();
        info(&mut ann, json!({"type": "create_room", "room": "kept"})).await;
        ann.join(&room("kept")).await.unwrap();
        assert_eq!(listed(&mut bob, "", 1).await, ["adhoc", "kept"]);
        say(&mut ann, &room("adhoc"), "it keeps its log").await;
        for name in ["adhoc", "kept"] {
            ann.request(&frames::OutgoingLeave::new(&room(name))).await.unwrap();
        }
        until("one is left", async || listed(&mut bob, "", 10).await == ["kept"]).await;
        assert_eq!(bob.join(&room("adhoc")).await.unwrap().seq, 1);
        bob.request(&frames::OutgoingLeave::new(&room("adhoc"))).await.unwrap();
        if deployment.is_cluster {
            until("none is left", async || listed(&mut bob, "", 10).await.is_empty()).await;
        }
    })
    .await;
}

#[tokio::test]
async fn joining_an_unknown_room_fails_without_create_on_join() {
    TestDeployment::each(&[("rooms.create_on_join", "false")], async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        assert_eq!(join_with(&mut ann, "lobby", "").await, Some(ErrorCode::NotFound));
        info(&mut ann, json!({"type": "create_room", "room": "lobby"})).await;
        let mut bob = deployment.connect(1, "bob").await;
        assert_eq!(join_with(&mut bob, "lobby", "").await, None);
    })
    .await;
}

#[tokio::test]
async fn an_ephemeral_room_delivers_and_keeps_nothing() {
    TestDeployment::each(&[("rooms.ephemeral", "live:*,cursors")], async |deployment| {
        let live = room("live:1");
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        let joined = ann.join(&live).await.unwrap();
        assert_eq!((joined.durable, joined.seq, joined.members), (false, 0, 1));
        bob.join(&live).await.unwrap();
        assert!(!info_of(&mut bob, "live:1").await.durable);
        let send = json!({
            "type": "message", "room": "live:1", "content": "now",
            "id": "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10",
        });
        for _ in 0..2 {
            // Without a log ids are not deduplicated.
            ann.send_json(&send).await.unwrap();
            let (text, frame) = within(async {
                loop {
                    if let ReceivedMessage::Frame(ServerFrame::Ack(ack), text) =
                        ann.next().await.unwrap()
                    {
                        return (text, ack);
                    }
                }
            })
            .await;
            assert!(!frame.duplicate && !text.contains("epoch") && !text.contains("seq"), "{text}");
            assert_eq!(next_message(&mut bob).await.content, "now");
        }
        let content = json!("quiet");
        let quiet = frames::OutgoingMessage {
            echo: false,
            ..frames::OutgoingMessage::text(&live, &content)
        };
        let ServerFrame::Ack(ack) = ann.request(&quiet).await.unwrap() else { panic!("no ack") };
        assert!(!ack.duplicate);
        assert_eq!(next_message(&mut bob).await.content, "quiet");
        let answer = ask(&mut bob, json!({"type": "history", "room": "live:1"})).await.unwrap();
        let ServerFrame::History(page) = answer else { panic!("{answer:?}") };
        assert!(page.messages.is_empty() && !page.more);
        let since = Position::new("1-abc".parse().unwrap(), 7);
        let mut cat = deployment.connect(2, "cat").await;
        let join = frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&live) };
        let joined = cat.join_with(&join).await.unwrap();
        assert!(!joined.recovered && joined.history.is_empty() && joined.seq == 0);
        // Order is kept here too.
        for number in 0..50 {
            ann.send_json(&json!({"type": "message", "room": "live:1", "content": number}))
                .await
                .unwrap();
        }
        for number in 0..50 {
            assert_eq!(next_message(&mut cat).await.content, number);
        }
    })
    .await;
}

#[tokio::test]
async fn kind_reply_to_and_meta_arrive_unchanged() {
    TestDeployment::each(&[], async |deployment| {
        let lobby = room("lobby");
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        ann.join(&lobby).await.unwrap();
        bob.join(&lobby).await.unwrap();
        let mut last = None;
        for (kind, name) in [
            (MessageKind::Text, "text"),
            (MessageKind::Image, "image"),
            (MessageKind::File, "file"),
            (MessageKind::Custom, "custom"),
        ] {
            let mut frame = json!({
                "type": "message", "room": "lobby", "kind": name, "content": {"url": "x"},
                "meta": {"name": "poke", "size": 1.5},
            });
            if let Some(id) = last {
                frame["reply_to"] = json!(id);
            }
            let answer = ask(&mut ann, frame).await.unwrap();
            let ServerFrame::Ack(ack) = answer else { panic!("{answer:?}") };
            let message = next_message(&mut bob).await;
            assert_eq!((message.id, message.kind, message.reply_to), (ack.id, kind, last));
            assert_eq!(message.meta, Some(json!({"name": "poke", "size": 1.5})));
            last = Some(message.id);
        }
        let system = json!({"type": "message", "room": "lobby", "kind": "system", "content": 1});
        assert_eq!(rejection_code(&mut ann, system).await, ErrorCode::BadRequest);
    })
    .await;
}
