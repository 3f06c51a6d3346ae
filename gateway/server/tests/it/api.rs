//! The server API: its responses and its effects on clients; on a single node, on three nodes of a
//! cluster, and on two with a Redis Cluster.

use std::net::SocketAddr;

use serde_json::{Value, json};
use skein_client::connection::{ClientConnection, ReceivedMessage};
use skein_protocol::{
    ids::MessageId,
    position::Position,
    protocol::server_frame::{LeftReason, NotificationFrame, ServerFrame},
};

use crate::{
    directs::Device,
    harness::{Http, closed, http_raw, next_message, room, say, until, within},
    presence::{TestDeployment, ask, next_matching, presence_of_room, rejection_code},
};

pub const KEY: &str = "a key of sixteen and more";
pub const OPTIONS: [(&str, &str); 2] = [
    ("api.keys", "test:a key of sixteen and more,other:another key of sixteen"),
    ("presence.grace", "0s"),
];

/// Sends an API request with a key.
pub async fn call_as(
    key: Option<&str>,
    address: SocketAddr,
    call: &str,
    body: Option<Value>,
) -> Http {
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let head = format!(
        "{call} HTTP/1.1\r\nHost: {address}\r\n{key}Content-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    http_raw(address, &format!("{head}{body}")).await
}

impl TestDeployment {
    /// Calls the API of the `node`th node, asserts the status and returns the response.
    async fn call(&self, node: usize, call: &str, body: Option<Value>, status: u16) -> Value {
        let address = self.nodes[node % self.nodes.len()].address;
        let http = call_as(Some(KEY), address, call, body).await;
        assert_eq!(http.status, status, "{call}: {}", http.body);
        serde_json::from_str(&http.body)
            .unwrap_or_else(|error| panic!("{call}: {error}: {}", http.body))
    }

    /// Calls the API and asserts that all nodes applied the command.
    async fn command_all_nodes(&self, node: usize, call: &str, body: Option<Value>) {
        let outcome = self.call(node, call, body, 200).await;
        let nodes = self.nodes.len();
        assert_eq!(outcome, json!({"applied": nodes, "nodes": nodes}), "{call}");
    }
}

async fn notification(connection: &mut ClientConnection) -> NotificationFrame {
    next_matching(connection, |frame| match frame {
        ServerFrame::Notification(notification) => Some(*notification),
        _ => None,
    })
    .await
}

#[tokio::test]
async fn requests_without_a_valid_key_are_rejected() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let address = deployment.nodes[0].address;
        for key in [None, Some("wrong"), Some("")] {
            let http = call_as(key, address, "GET /api/v1/online", None).await;
            assert_eq!((http.status, http.header("www-authenticate")), (401, Some("Bearer")));
            assert!(http.body.contains(r#""code":"unauthorized""#), "{}", http.body);
        }
        let other =
            call_as(Some("another key of sixteen"), address, "GET /api/v1/online", None).await;
        assert_eq!(other.status, 200);
        for path in ["/api/openapi.json", "/api/docs"] {
            assert_eq!(call_as(None, address, &format!("GET {path}"), None).await.status, 200);
        }
        assert_eq!(call_as(Some(KEY), address, "GET /api/v1/nothing", None).await.status, 404);
        assert_eq!(call_as(Some(KEY), address, "PATCH /api/v1/online", None).await.status, 405);
    })
    .await;
    let closed = crate::harness::Gateway::start(&[("api.docs", "false")]).await;
    let answer = call_as(Some(KEY), closed.address, "GET /api/v1/online", None).await;
    assert_eq!(answer.status, 403);
    assert_eq!(call_as(None, closed.address, "GET /api/docs", None).await.status, 404);
}

#[tokio::test]
async fn the_application_publishes_as_itself_or_as_a_user() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        ann.join(&room("r")).await.unwrap();
        let id = MessageId::random();
        let body = json!({"content": {"a": 1}, "kind": "system", "id": id, "meta": {"x": []}});
        let sent =
            deployment.call(1, "POST /api/v1/rooms/r/messages", Some(body.clone()), 201).await;
        let message = next_message(&mut ann).await;
        assert_eq!((message.seq, message.id, message.from.id.as_str()), (1, id, "_api"));
        assert_eq!((sent["seq"].as_u64(), sent["duplicate"].as_bool()), (Some(1), Some(false)));
        let again = deployment.call(2, "POST /api/v1/rooms/r/messages", Some(body), 200).await;
        assert_eq!((again["seq"].as_u64(), again["duplicate"].as_bool()), (Some(1), Some(true)));
        let as_bob = json!({"content": "hi", "from": "bob"});
        deployment.call(0, "POST /api/v1/rooms/r/messages", Some(as_bob), 201).await;
        assert_eq!(next_message(&mut ann).await.from.id.as_str(), "bob");
        for bad in [
            json!({}),
            json!({"content": 1, "from": "a b"}),
            json!({"content": 1, "id": "x"}),
            json!({"content": 1, "meta": []}),
            json!([]),
        ] {
            deployment.call(0, "POST /api/v1/rooms/r/messages", Some(bad), 400).await;
        }
        deployment
            .call(0, "POST /api/v1/rooms/a%20b/messages", Some(json!({"content": 1})), 400)
            .await;
        let large = json!({"content": "x".repeat(300_000)});
        deployment.call(0, "POST /api/v1/rooms/r/messages", Some(large), 413).await;
    })
    .await;
}

#[tokio::test]
async fn a_batch_returns_one_result_per_message_in_order() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(2, "ann").await;
        ann.join(&room("r")).await.unwrap();
        let mut messages: Vec<Value> =
            (0..50).map(|n| json!({"room": "r", "content": n})).collect();
        messages.insert(10, json!({"room": "not a room", "content": 0}));
        let body = json!({"messages": messages});
        let results = deployment.call(0, "POST /api/v1/publish", Some(body), 201).await;
        let results = results["results"].as_array().unwrap();
        assert_eq!(results[10]["error"]["code"], "bad_request");
        let seqs: Vec<_> = results.iter().filter_map(|result| result["seq"].as_u64()).collect();
        assert_eq!(seqs, (1..=50).collect::<Vec<_>>());
        for n in 0..50 {
            assert_eq!(next_message(&mut ann).await.content, json!(n));
        }
        let many = json!({"messages": vec![json!({"room": "r", "content": 0}); 1001]});
        deployment.call(0, "POST /api/v1/publish", Some(many), 400).await;
    })
    .await;
}

#[tokio::test]
async fn rooms_are_created_listed_read_and_deleted() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let made = json!({"name": "The Room", "owner": "ann", "password": "open", "max_members": 3,
            "public": false, "meta": {"a": 1}});
        let info = deployment.call(0, "PUT /api/v1/rooms/made", Some(made.clone()), 201).await;
        assert_eq!(
            (info["protected"].as_bool(), info["owner"].as_str()),
            (Some(true), Some("ann"))
        );
        assert!(!info.to_string().contains("argon2"));
        let twice = deployment.call(1, "PUT /api/v1/rooms/made", Some(made), 409).await;
        assert_eq!(twice["error"]["code"], "room_exists");
        assert_eq!(
            deployment.call(2, "GET /api/v1/rooms/made", None, 200).await["name"],
            "The Room"
        );
        deployment.call(0, "GET /api/v1/rooms/none", None, 404).await;
        let mut bob = deployment.connect(1, "bob").await;
        let join = json!({"type": "join", "room": "made", "password": "open"});
        ask(&mut bob, join).await.unwrap();
        bob.join(&room("other")).await.unwrap();
        for n in 0..5 {
            say(&mut bob, &room("other"), &n.to_string()).await;
        }
        let private = deployment.call(1, "GET /api/v1/rooms?prefix=made", None, 200).await;
        assert_eq!(private["rooms"][0]["public"], false);
        let rooms = deployment.call(0, "GET /api/v1/rooms?prefix=o", None, 200).await;
        assert_eq!(
            (rooms["rooms"][0]["room"].as_str(), rooms["rooms"][0]["members"].as_u64()),
            (Some("other"), Some(1))
        );
        let page =
            deployment.call(2, "GET /api/v1/rooms/other/history?before=5&limit=2", None, 200).await;
        let contents: Vec<_> =
            page["messages"].as_array().unwrap().iter().map(|m| &m["content"]).collect();
        assert_eq!(
            (contents, page["more"].as_bool()),
            (vec![&json!("2"), &json!("3")], Some(true))
        );
        for bad in ["limit=0", "limit=x", "before=1&after=1", "before=-1", "after=9007199254740992"]
        {
            deployment.call(0, &format!("GET /api/v1/rooms/other/history?{bad}"), None, 400).await;
        }
        until("the other node shows the user", async || {
            let present = deployment.call(2, "GET /api/v1/rooms/made/presence", None, 200).await;
            present["users"][0]["id"] == "bob" && present["count"] == 1
        })
        .await;
        deployment.call(2, "DELETE /api/v1/rooms/made", None, 200).await;
        let closed = next_matching(&mut bob, |frame| match frame {
            ServerFrame::RoomClosed(closed) => Some(closed.room),
            _ => None,
        });
        assert_eq!(closed.await.as_str(), "made");
        deployment.call(1, "DELETE /api/v1/rooms/made", None, 404).await;
    })
    .await;
}

#[tokio::test]
async fn notifications_reach_every_device_exactly_once() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = Device::open(deployment, 0, "ann", |_| {}).await;
        let mut phone = Device::open(deployment, 1, "ann", |_| {}).await;
        let id = MessageId::random();
        let body = json!({"payload": {"n": 1}, "require_ack": true, "id": id});
        let call = "POST /api/v1/users/ann/notifications";
        let sent = deployment.call(2, call, Some(body.clone()), 201).await;
        assert_eq!(deployment.call(0, call, Some(body), 200).await["duplicate"], true);
        for device in [&mut ann, &mut phone] {
            let told = notification(&mut device.connection).await;
            assert_eq!((told.id, told.require_ack, told.payload), (id, true, json!({"n": 1})));
            assert_eq!(Some(told.seq), sent["seq"].as_u64());
        }
        let many = json!({"users": ["ann", "bob", "_no"], "payload": "all"});
        let results = deployment.call(1, "POST /api/v1/notifications", Some(many), 201).await;
        let results = results["results"].as_array().unwrap();
        assert_eq!(
            (results[0]["user"].as_str(), results[0]["seq"].as_u64()),
            (Some("ann"), Some(2))
        );
        assert_eq!(
            (results[1]["seq"].as_u64(), results[2]["error"]["code"].as_str()),
            (Some(1), Some("bad_request"))
        );
        for device in [&mut ann, &mut phone] {
            assert_eq!(notification(&mut device.connection).await.payload, json!("all"));
        }
        // A user who was offline finds it later.
        let mut bob = Device::open(deployment, 2, "bob", |_| {}).await;
        assert_eq!(bob.connected.inbox.unread, 1);
        let told = notification(&mut bob.connection).await;
        assert!(told.replay && told.payload == json!("all"));
        deployment
            .call(0, "POST /api/v1/users/_api/notifications", Some(json!({"payload": 1})), 400)
            .await;
        deployment.call(0, call, Some(json!({})), 400).await;
    })
    .await;
}

#[tokio::test]
async fn a_broadcast_reaches_every_connection_once() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut all = Vec::new();
        for (n, user) in ["ann", "ann", "bob", "cat"].into_iter().enumerate() {
            all.push(deployment.connect(n, user).await);
        }
        let body = Some(json!({"payload": ["hear"]}));
        let sent = deployment.call(1, "POST /api/v1/broadcast", body, 201).await;
        assert_eq!(sent["applied"], sent["nodes"]);
        for connection in &mut all {
            let told = next_matching(connection, |frame| match frame {
                ServerFrame::Broadcast(broadcast) => Some(broadcast),
                _ => None,
            });
            assert_eq!(told.await.payload, json!(["hear"]));
            connection.send_text(r#"{"type":"ping"}"#).await.unwrap();
            let next = within(connection.next()).await.unwrap();
            assert!(matches!(next, ReceivedMessage::Frame(ServerFrame::Pong(_), _)), "{next:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_removed_member_leaves_on_every_device_and_may_rejoin() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut devices = [deployment.connect(0, "ann").await, deployment.connect(1, "ann").await];
        let mut bob = deployment.connect(2, "bob").await;
        for connection in devices.iter_mut().chain([&mut bob]) {
            connection.join(&room("r")).await.unwrap();
        }
        deployment.command_all_nodes(2, "DELETE /api/v1/rooms/r/members/ann", None).await;
        for connection in &mut devices {
            let left = next_matching(connection, |frame| match frame {
                ServerFrame::Left(left) => Some(left),
                _ => None,
            });
            let left = left.await;
            assert_eq!((left.room, left.reason), (room("r"), Some(LeftReason::Kicked)));
            let say = json!({"type": "message", "room": "r", "content": "still here?"});
            assert_eq!(rejection_code(connection, say).await.as_str(), "not_joined");
        }
        let gone = next_matching(&mut bob, |frame| match frame {
            ServerFrame::MemberLeft(left) => Some((left.user.to_string(), left.count)),
            _ => None,
        });
        assert_eq!(gone.await, ("ann".into(), 1));
        devices[0].join(&room("r")).await.unwrap();
        say(&mut devices[0], &room("r"), "back").await;
    })
    .await;
}

#[tokio::test]
async fn a_removal_during_a_join_leaves_no_part_of_a_member() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        bob.join(&room("r")).await.unwrap();
        for number in 0..40 {
            ann.join(&room("r")).await.unwrap();
            let joins = async {
                for _ in 0..=number % 4 {
                    ann.send_text(r#"{"type":"join","room":"r"}"#).await.unwrap();
                }
            };
            let remove =
                deployment.command_all_nodes(1, "DELETE /api/v1/rooms/r/members/ann", None);
            tokio::join!(joins, remove);
            let ask = json!({"type": "message", "room": "r", "content": number, "echo": false});
            let is_member = ann.request(&ask).await.is_ok();
            // All joins are answered: the frames of a connection are handled in order.
            let content = format!("after {number}");
            say(&mut bob, &room("r"), &content).await;
            let marker = json!({"type": "direct", "to": "ann", "content": "marker"});
            bob.request(&marker).await.unwrap();
            next_matching(&mut ann, |frame| match frame {
                ServerFrame::Message(message) if message.content == content.as_str() => {
                    assert!(is_member, "{number}: a removed member receives");
                    Some(())
                }
                ServerFrame::Direct(_) if !is_member => Some(()),
                _ => None,
            })
            .await;
            until("presence is the same", async || {
                let listed = presence_of_room(&mut bob, "r").await.users;
                listed.iter().any(|user| user.id.as_str() == "ann") == is_member
            })
            .await;
        }
    })
    .await;
}

#[tokio::test]
async fn disconnect_closes_all_connections_and_drops_sessions() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        for keep in [true, false] {
            let mut ann = Device::open(deployment, 0, "ann", |_| {}).await;
            let mut phone = Device::open(deployment, 1, "ann", |_| {}).await;
            let mut bob = deployment.connect(1, "bob").await;
            let body = json!({"code": 4321, "reason": "bye for now", "keep_session": keep});
            deployment.command_all_nodes(2, "POST /api/v1/users/ann/disconnect", Some(body)).await;
            for device in [&mut ann, &mut phone] {
                assert_eq!(
                    closed(&mut device.connection).await,
                    (Some(4321), "bye for now".into())
                );
            }
            let token = ann.connected.session.clone();
            let back = Device::open(deployment, 2, "ann", |to| to.session = Some(token)).await;
            assert_eq!(back.connected.resumed, keep);
            ask(&mut bob, json!({"type": "ping"})).await.unwrap();
        }
        let mut ann = deployment.connect(0, "ann").await;
        deployment.command_all_nodes(1, "POST /api/v1/users/ann/disconnect", None).await;
        assert_eq!(closed(&mut ann).await, (Some(1008), "kicked".into()));
        for bad in [json!({"code": 1006}), json!({"code": "x"}), json!({"reason": "x".repeat(124)})]
        {
            deployment.call(0, "POST /api/v1/users/ann/disconnect", Some(bad), 400).await;
        }
    })
    .await;
}

#[tokio::test]
async fn sessions_are_listed_and_revoked_one_or_all_but_one() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut devices = Vec::new();
        for node in 0..3 {
            devices.push(Device::open(deployment, node, "ann", |_| {}).await);
        }
        let ids: Vec<String> = devices.iter().map(|d| d.connected.session_id.to_string()).collect();
        let listed = deployment.call(1, "GET /api/v1/users/ann/sessions", None, 200).await;
        let listed = listed["sessions"].as_array().unwrap();
        assert!(
            listed.len() == 3 && ids.iter().all(|id| listed.iter().any(|s| s["session_id"] == *id))
        );
        assert!(listed[0]["connection_id"].is_string() && listed[0]["address"] == "127.0.0.1");
        deployment
            .command_all_nodes(2, &format!("DELETE /api/v1/users/ann/sessions/{}", ids[0]), None)
            .await;
        assert_eq!(closed(&mut devices[0].connection).await, (Some(1008), "kicked".into()));
        deployment
            .call(2, &format!("DELETE /api/v1/users/ann/sessions/{}", ids[0]), None, 404)
            .await;
        deployment
            .command_all_nodes(
                0,
                &format!("DELETE /api/v1/users/ann/sessions?except={}", ids[2]),
                None,
            )
            .await;
        assert_eq!(closed(&mut devices[1].connection).await.0, Some(1008));
        ask(&mut devices[2].connection, json!({"type": "ping"})).await.unwrap();
        let token = devices[1].connected.session.clone();
        let again = Device::open(deployment, 0, "ann", |to| to.session = Some(token)).await;
        assert!(!again.connected.resumed);
    })
    .await;
}

#[tokio::test]
async fn user_info_lists_rooms_and_connections() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let phone = deployment.connect(1, "ann").await;
        ann.join(&room("r")).await.unwrap();
        ann.join(&room("s")).await.unwrap();
        let user = deployment.call(2, "GET /api/v1/users/ann", None, 200).await;
        assert_eq!((&user["online"], &user["rooms"]), (&json!(true), &json!(["r", "s"])));
        let connections = user["connections"].as_array().unwrap();
        assert_eq!(connections.len(), 2);
        for connection in connections {
            assert_eq!(
                (&connection["lagging"], &connection["address"]),
                (&json!(false), &json!("127.0.0.1"))
            );
            assert!(connection["last_seen"].is_string() && connection["queued_bytes"].is_u64());
        }
        for (path, users) in [("prefix=an", 1), ("prefix=b", 0), ("limit=1", 1)] {
            let page = deployment.call(1, &format!("GET /api/v1/users?{path}"), None, 200).await;
            assert_eq!(page["users"].as_array().unwrap().len(), users, "{path}: {page}");
        }
        let online = deployment.call(1, "GET /api/v1/online", None, 200).await;
        assert_eq!(online, json!({"users": 1, "connections": 2}));
        drop((ann, phone));
        until("ann is seen to have left", async || {
            let user = deployment.call(1, "GET /api/v1/users/ann", None, 200).await;
            user["online"] == false
                && user["last_active"].is_string()
                && user["connections"] == json!([])
        })
        .await;
        assert_eq!(
            deployment.call(0, "GET /api/v1/users/nobody", None, 200).await["online"],
            false
        );
    })
    .await;
}

#[tokio::test]
async fn a_message_trail_shows_the_fan_out_of_each_node() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = deployment.connect(1, "bob").await;
        for connection in [&mut ann, &mut bob] {
            connection.join(&room("r")).await.unwrap();
        }
        let ack = say(&mut ann, &room("r"), "where did it go").await;
        next_message(&mut bob).await;
        let path = format!("GET /api/v1/messages/{}/trail?user=bob", ack.id);
        let trail = deployment.call(2, &path, None, 200).await;
        assert_eq!(trail["asked"], trail["answered"]);
        let logs = || {
            trail["nodes"].as_array().unwrap().iter().flat_map(|n| n["logs"].as_array().unwrap())
        };
        assert_eq!(logs().filter(|log| log["appended_at"].is_string()).count(), 1);
        assert!(logs().all(|log| log["seq"] == ack.seq && log["room"] == "r"));
        let queued: u64 = logs().filter_map(|log| log["handed_out"]["queued"].as_u64()).sum();
        assert_eq!(queued, 2);
        let reached = logs().flat_map(|log| log["user"]["connections"].as_array().unwrap()).count();
        assert_eq!(reached, 1, "{trail}");
        let unknown = format!("GET /api/v1/messages/{}/trail", MessageId::random());
        deployment.call(0, &unknown, None, 404).await;
    })
    .await;
}

#[tokio::test]
async fn clearing_an_inbox_resets_its_connections() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = Device::open(deployment, 1, "bob", |_| {}).await;
        let send = |text: &str| json!({"type": "direct", "to": "bob", "content": text});
        for text in ["one", "two"] {
            ask(&mut ann, send(text)).await.unwrap();
        }
        bob.tell(json!({"type": "ack", "seq": 1})).await;
        let emptied = deployment.call(2, "DELETE /api/v1/users/bob/inbox", None, 200).await;
        assert_eq!(emptied, json!({"user": "bob"}));
        let reset = next_matching(&mut bob.connection, |frame| match frame {
            ServerFrame::Reset(reset) => Some(reset),
            _ => None,
        })
        .await;
        assert_eq!((reset.room, reset.seq), (None, 0));
        ask(&mut ann, send("three")).await.unwrap();
        let direct = bob.direct().await;
        assert_eq!((direct.content.as_str(), direct.seq), (Some("three"), 1));
        assert_eq!(direct.epoch, reset.epoch);
        // Another device with an old position is reset, and gets the existing entries.
        let had = Position::new(bob.connected.inbox.epoch.clone(), 1);
        let mut other = Device::open(deployment, 0, "bob", |to| to.inbox = Some(had)).await;
        let inbox = &other.connected.inbox;
        assert_eq!((inbox.seq, inbox.acked, inbox.unread), (1, 0, 1));
        let reset = next_matching(&mut other.connection, |frame| match frame {
            ServerFrame::Reset(reset) => Some(reset),
            ServerFrame::Direct(direct) => panic!("{direct:?} without a reset"),
            _ => None,
        })
        .await;
        assert_eq!(reset.epoch, direct.epoch);
        // An inbox that does not exist is empty as well.
        deployment.call(0, "DELETE /api/v1/users/nobody/inbox", None, 200).await;
    })
    .await;
}

#[tokio::test]
async fn nodes_are_listed_counted_and_drained() {
    TestDeployment::each(&OPTIONS, async |deployment| {
        let mut ann = deployment.connect(0, "ann").await;
        let mut bob = Device::open(deployment, 1, "bob", |_| {}).await;
        let nodes = deployment.call(0, "GET /api/v1/nodes", None, 200).await;
        assert_eq!(nodes["nodes"].as_array().unwrap().len(), deployment.nodes.len());
        let stats = deployment.call(1, "GET /api/v1/stats", None, 200).await;
        assert_eq!((stats["users"].as_u64(), stats["connections"].as_u64()), (Some(2), Some(2)));
        deployment.call(0, "POST /api/v1/nodes/none/drain", None, 404).await;
        if !deployment.is_cluster {
            return;
        }
        let drain = format!("POST /api/v1/nodes/{}/drain", bob.connected.node);
        deployment.command_all_nodes(0, &drain, None).await;
        assert_eq!(closed(&mut bob.connection).await.0, Some(1012));
        let ready = crate::harness::get(deployment.nodes[1].address, "/ready").await;
        assert!(ready.status == 503 && ready.body.contains("drain"), "{}", ready.body);
        ask(&mut ann, json!({"type": "ping"})).await.unwrap();

        // A cancelled drain: the node takes clients again, and keeps them.
        let cancel = drain.replace("POST", "DELETE");
        deployment.command_all_nodes(0, &cancel, None).await;
        let address = deployment.nodes[1].address;
        until("ready", async || crate::harness::get(address, "/ready").await.status == 200).await;
        let mut cid = deployment.connect(1, "cid").await;
        ask(&mut cid, json!({"type": "ping"})).await.unwrap();
        deployment.call(0, "DELETE /api/v1/nodes/none/drain", None, 404).await;
        // It can be drained again.
        deployment.command_all_nodes(0, &drain, None).await;
        assert_eq!(closed(&mut cid).await.0, Some(1012));
    })
    .await;
}

/// The document as generators need it: unique operation ids, one error schema, a server.
#[tokio::test]
async fn the_openapi_document_names_operations_error_and_server() {
    let gateway = crate::harness::Gateway::start(&OPTIONS).await;
    let document = crate::harness::get(gateway.address, "/api/openapi.json").await.body;
    let document: Value = serde_json::from_str(&document).unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, call) in methods.as_object().unwrap() {
            for (status, answer) in call["responses"].as_object().unwrap() {
                let schema = &answer["content"]["application/json"]["schema"];
                let error = json!({"$ref": "#/components/schemas/Problem"});
                let is_error = status.as_str() >= "400";
                assert_eq!(*schema == error, is_error, "{method} {path} {status}: {schema}");
            }
        }
    }
    let (all, mut unique) = (operations(&document), operations(&document));
    unique.dedup();
    assert_eq!(all, unique);
    // The second URL is relative to the document, so the API may be served below any path.
    let servers = [&document["servers"][0]["url"], &document["servers"][1]["url"]];
    assert_eq!(servers, ["/", ".."]);
    let page = crate::harness::get(gateway.address, "/api/docs").await;
    assert!(page.status == 200 && !page.body.contains("\"/api"), "{}", page.body);
    // Even if the path is invalid.
    let bad = call_as(Some(KEY), gateway.address, "GET /api/v1/rooms/%FF", None).await;
    let problem: Value = serde_json::from_str(&bad.body).unwrap();
    assert_eq!((bad.status, &problem["error"]["code"]), (400, &json!("bad_request")));
}

/// The ids of all operations, sorted.
pub fn operations(document: &Value) -> Vec<String> {
    let methods = document["paths"].as_object().unwrap().values();
    let calls = methods.flat_map(|methods| methods.as_object().unwrap().values());
    let mut ids: Vec<_> =
        calls.map(|call| call["operationId"].as_str().unwrap().to_owned()).collect();
    ids.sort_unstable();
    ids
}
