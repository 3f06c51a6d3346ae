use std::sync::Arc;

use serde_json::{Value, json};
use tokio::sync::{
    Semaphore,
    oneshot::{self, error::TryRecvError},
};

use super::{calls::ClientCall, *};
use crate::{
    api::{HistoryRange, MessageDraft},
    room::PendingSend,
};

const EPOCH: &str = "e";

/// A state with a connection, fed with JSON as a gateway writes it.
struct StateFixture {
    state: ProtocolState,
    now: Instant,
}

type ReplyReceiver<T, E> = oneshot::Receiver<Result<T, E>>;

impl StateFixture {
    fn new() -> Self {
        let mut fixture = Self { state: ProtocolState::new(1), now: Instant::now() };
        fixture.connect();
        fixture
    }

    /// A fixture that has joined `r` at position `e:5`.
    fn joined() -> Self {
        let mut fixture = Self::new();
        let mut reply = fixture.join("r", StartFrom::Now);
        let reference = fixture.take_written()[0]["ref"].clone();
        fixture.feed(joined(&reference, 5, false, &[]));
        assert!(reply.try_recv().unwrap().is_ok());
        fixture.events();
        fixture
    }

    fn connect(&mut self) {
        self.feed(json!({
            "type": "connected",
            "connection_id": "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10",
            "user": {"id": "me", "name": "Me"},
            "node": "n1",
            "route": "n1",
            "protocol": "chat.v1",
            "timestamp": "2026-01-01T00:00:00.000Z",
            "heartbeat_interval": 25,
            "dedup_window": 600,
            "max_message_size": 1_000,
            "session": "c2VjcmV0", "session_id": "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c11", "resumed": false,
            "inbox": {"epoch": "i", "seq": 0, "acked": 0, "oldest": 1, "unread": 0},
        }));
        assert!(matches!(self.events().as_slice(), [ClientEvent::Connected { .. }]));
    }

    fn feed(&mut self, frame: Value) {
        let text = frame.to_string();
        self.state.on_frame(serde_json::from_str(&text).unwrap(), text, self.now);
    }

    fn advance(&mut self, time: Duration) {
        self.now += time;
        self.state.on_timer(self.now);
    }

    fn join(&mut self, room: &str, start: StartFrom) -> ReplyReceiver<JoinInfo, JoinError> {
        let (reply, receiver) = oneshot::channel();
        let room = room.parse().unwrap();
        self.state.on_call(ClientCall::Join { room, start, password: None, reply }, self.now);
        receiver
    }

    fn leave(&mut self, room: &str) -> ReplyReceiver<(), LeaveError> {
        let (reply, receiver) = oneshot::channel();
        self.state.on_call(ClientCall::Leave { room: room.parse().unwrap(), reply }, self.now);
        receiver
    }

    fn send(&mut self, message: MessageDraft) -> ReplyReceiver<SendReceipt, SendError> {
        let (reply, receiver) = oneshot::channel();
        let permit = || Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let bytes = match &message.content {
            crate::api::MessageContent::Json(content) => content.to_string().len() as u32,
            crate::api::MessageContent::Binary(payload) => payload.len() as u32,
        };
        let pending = PendingSend { message, bytes, reply, _permits: [permit(), permit()] };
        let room = "r".parse().unwrap();
        self.state.on_call(ClientCall::Send { room, pending }, self.now);
        receiver
    }

    fn history(&mut self, page: HistoryRange) -> ReplyReceiver<RoomHistoryPage, HistoryError> {
        let (reply, receiver) = oneshot::channel();
        let room = "r".parse().unwrap();
        self.state.on_call(ClientCall::History { room, page, limit: 10, reply }, self.now);
        receiver
    }

    /// The frames written since the last call.
    fn take_written(&mut self) -> Vec<Value> {
        let json = |outgoing| match outgoing {
            EncodedFrame::Text(text) => serde_json::from_str(&text).unwrap(),
            EncodedFrame::Binary(bytes) => json!({"bytes": bytes}),
        };
        self.state.out.drain(..).map(json).collect()
    }

    /// The frames written since the last call: the content of a message, else the type.
    fn summary(&mut self) -> Vec<String> {
        let summary = |frame: Value| match frame["type"].as_str().unwrap() {
            "message" => frame["content"].as_str().unwrap().to_owned(),
            other => other.to_owned(),
        };
        self.take_written().into_iter().map(summary).collect()
    }

    fn events(&mut self) -> Vec<ClientEvent> {
        self.state.events.drain(..).collect()
    }

    /// The numbers of the messages among the events; fails on other events.
    fn delivered(&mut self) -> Vec<Seq> {
        let seq = |event| match event {
            ClientEvent::Message { message, .. } => message.seq,
            other => panic!("{other:?}"),
        };
        self.events().into_iter().map(seq).collect()
    }
}

use skein_protocol::position::Seq;

fn at(seq: Seq) -> Position {
    Position::new(EPOCH.parse().unwrap(), seq)
}

fn joined(reference: &Value, seq: Seq, recovered: bool, history: &[Value]) -> Value {
    json!({
        "type": "joined", "ref": reference, "room": "r", "epoch": EPOCH, "seq": seq,
        "members": 1, "recovered": recovered, "history": history, "durable": true, "read": 0,
    })
}

fn entry(seq: Seq, from: &str, id: MessageId) -> Value {
    json!({
        "type": "message", "room": "r", "epoch": EPOCH, "seq": seq, "id": id,
        "from": {"id": from, "name": from}, "kind": "text", "content": "x",
        "timestamp": "2026-01-01T00:00:00.000Z",
    })
}

fn other(seq: Seq) -> Value {
    entry(seq, "you", MessageId::random())
}

fn ack(frame: &Value, seq: Seq, duplicate: bool) -> Value {
    json!({
        "type": "ack", "ref": frame["ref"], "id": frame["id"], "room": "r", "epoch": EPOCH,
        "seq": seq, "timestamp": "2026-01-01T00:00:00.000Z", "duplicate": duplicate,
    })
}

fn error(frame: &Value, code: &str, retry_after_ms: Option<u64>) -> Value {
    json!({
        "type": "error", "ref": frame["ref"], "for": frame["type"], "code": code,
        "message": "no", "retry_after_ms": retry_after_ms,
    })
}

#[tokio::test(start_paused = true)]
async fn a_join_completes_and_its_history_follows_as_events() {
    let mut fixture = StateFixture::new();
    let mut reply = fixture.join("r", StartFrom::History(2));
    let written = fixture.take_written();
    assert_eq!((&written[0]["type"], &written[0]["history"]), (&json!("join"), &json!(2)));
    fixture.feed(joined(&written[0]["ref"], 9, false, &[other(8), other(9)]));
    assert_eq!(reply.try_recv().unwrap().unwrap().top, at(9));
    let events = fixture.events();
    assert!(matches!(events[0], ClientEvent::Joined(_)));
    assert_eq!(events.len(), 3);
    fixture.feed(other(10));
    assert_eq!(fixture.delivered(), [10]);
}

#[tokio::test(start_paused = true)]
async fn a_join_with_a_temporary_error_is_retried() {
    let mut fixture = StateFixture::new();
    let mut reply = fixture.join("r", StartFrom::Now);
    let first = fixture.take_written().remove(0);
    fixture.feed(error(&first, "unavailable", Some(700)));
    assert!(fixture.take_written().is_empty());
    assert_eq!(fixture.state.next_deadline(), Some(fixture.now + Duration::from_millis(700)));
    fixture.advance(Duration::from_millis(700));
    let second = fixture.take_written().remove(0);
    assert_eq!(reply.try_recv().unwrap_err(), TryRecvError::Empty);
    fixture.feed(error(&second, "room_full", None));
    let error = reply.try_recv().unwrap().unwrap_err();
    assert!(matches!(error, JoinError::Rejected(_)), "{error:?}");
    assert!(fixture.state.rooms.is_empty() && fixture.events().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_second_join_of_a_room_fails_while_one_is_pending() {
    let mut fixture = StateFixture::new();
    let _first = fixture.join("r", StartFrom::Now);
    let mut second = fixture.join("r", StartFrom::Now);
    assert_eq!(second.try_recv().unwrap(), Err(JoinError::InProgress));
}

#[tokio::test(start_paused = true)]
async fn joining_a_joined_room_changes_nothing() {
    let mut fixture = StateFixture::joined();
    let mut reply = fixture.join("r", StartFrom::History(50));
    let frame = fixture.take_written().remove(0);
    fixture.feed(joined(&frame["ref"], 5, true, &[]));
    assert_eq!(reply.try_recv().unwrap().unwrap().top, at(5));
    assert!(fixture.events().is_empty());
    fixture.feed(other(6));
    assert_eq!(fixture.delivered(), [6]);
}

#[tokio::test(start_paused = true)]
async fn messages_wait_for_the_join_and_are_sent_one_by_one() {
    let mut fixture = StateFixture::new();
    let _join = fixture.join("r", StartFrom::Now);
    let mut one = fixture.send(MessageDraft::json("1"));
    let _two = fixture.send(MessageDraft::json("2"));
    let join = fixture.take_written();
    assert_eq!(join.len(), 1);
    fixture.feed(joined(&join[0]["ref"], 0, false, &[]));
    let first = fixture.take_written();
    assert_eq!((first.len(), &first[0]["content"]), (1, &json!("1")));
    fixture.feed(ack(&first[0], 1, false));
    let sent = one.try_recv().unwrap().unwrap();
    assert_eq!((sent.position, sent.duplicate), (at(1), false));
    assert_eq!(fixture.summary(), ["2"]);
}

#[tokio::test(start_paused = true)]
async fn a_message_with_a_temporary_error_is_retried_in_order() {
    let mut fixture = StateFixture::joined();
    let mut one = fixture.send(MessageDraft::json("1"));
    let _two = fixture.send(MessageDraft::json("2"));
    let mut last = fixture.take_written().remove(0);
    for code in ["unavailable", "overloaded", "rate_limited"] {
        fixture.feed(error(&last, code, Some(200)));
        assert!(fixture.take_written().is_empty());
        fixture.advance(Duration::from_millis(200));
        let again = fixture.take_written();
        assert_eq!((again.len(), &again[0]["id"]), (1, &last["id"]));
        assert_ne!(again[0]["ref"], last["ref"]);
        last = again[0].clone();
    }
    fixture.feed(ack(&last, 6, true));
    assert!(one.try_recv().unwrap().unwrap().duplicate);
    assert_eq!(fixture.summary(), ["2"]);
}

#[tokio::test(start_paused = true)]
async fn a_permanent_error_fails_its_message_only() {
    let mut fixture = StateFixture::joined();
    let mut one = fixture.send(MessageDraft::json("1"));
    let mut two = fixture.send(MessageDraft::json("2"));
    let first = fixture.take_written().remove(0);
    fixture.feed(error(&first, "forbidden", None));
    assert!(matches!(one.try_recv().unwrap(), Err(SendError::Rejected(_))));
    let second = fixture.take_written().remove(0);
    fixture.feed(ack(&second, 6, false));
    assert!(two.try_recv().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn only_an_ack_without_an_echo_moves_the_cursor() {
    let mut fixture = StateFixture::joined();
    let _echo = fixture.send(MessageDraft::json("1"));
    let first = fixture.take_written().remove(0);
    fixture.feed(ack(&first, 6, false));
    assert_eq!(fixture.state.cursor(&"r".parse().unwrap()), Some(&at(5)));
    let id = serde_json::from_value(first["id"].clone()).unwrap();
    fixture.feed(entry(6, "me", id));
    assert_eq!(fixture.delivered(), [6]);

    let without_echo = MessageDraft { echo: false, ..MessageDraft::json("2") };
    let _no_echo = fixture.send(without_echo);
    let second = fixture.take_written().remove(0);
    assert_eq!(second["echo"], json!(false));
    fixture.feed(ack(&second, 7, false));
    fixture.feed(other(8));
    assert_eq!(fixture.delivered(), [8]);
}

#[tokio::test(start_paused = true)]
async fn an_ack_in_the_log_can_follow_the_ack_of_the_repeat() {
    let mut fixture = StateFixture::joined();
    let mut reply = fixture.send(MessageDraft { echo: false, ..MessageDraft::json("1") });
    let first = fixture.take_written().remove(0);
    fixture.feed(error(&first, "unavailable", Some(1)));
    fixture.advance(Duration::from_millis(1));
    let second = fixture.take_written().remove(0);
    fixture.feed(ack(&second, 6, true));
    assert!(reply.try_recv().unwrap().is_ok());
    // The first attempt was appended all the same; its ack arrives in the log's order.
    fixture.feed(ack(&first, 6, false));
    fixture.feed(other(7));
    assert_eq!(fixture.delivered(), [7]);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_acknowledges_own_messages_it_contains() {
    let mut fixture = StateFixture::joined();
    fixture.state.in_flight_max = 3;
    let mut replies: Vec<_> =
        ["1", "2", "3"].into_iter().map(|text| fixture.send(MessageDraft::json(text))).collect();
    let first = fixture.take_written().remove(0);
    let id = serde_json::from_value(first["id"].clone()).unwrap();
    fixture.state.on_disconnected();
    fixture.connect();
    let join = fixture.take_written().remove(0);
    assert_eq!(join["since"], json!({"epoch": EPOCH, "seq": 5}));
    fixture.feed(joined(&join["ref"], 7, true, &[other(6)]));
    // Not before all entries up to `joined.seq` were received.
    assert!(fixture.take_written().is_empty());
    fixture.feed(entry(7, "me", id));
    assert_eq!(replies[0].try_recv().unwrap().unwrap().position, at(7));
    let again = fixture.take_written();
    assert_eq!((again.len(), &again[0]["content"]), (1, &json!("2")));
    let delivered: Vec<ClientEvent> = fixture.events();
    assert_eq!(delivered.len(), 3, "{delivered:?}");
}

#[tokio::test(start_paused = true)]
async fn the_same_id_of_another_user_is_no_acknowledgement() {
    let mut fixture = StateFixture::joined();
    let mut reply = fixture.send(MessageDraft::json("1"));
    let frame = fixture.take_written().remove(0);
    fixture.feed(entry(6, "you", serde_json::from_value(frame["id"].clone()).unwrap()));
    assert_eq!(reply.try_recv().unwrap_err(), TryRecvError::Empty);
}

#[tokio::test(start_paused = true)]
async fn a_send_older_than_the_window_is_uncertain() {
    let mut fixture = StateFixture::joined();
    let mut one = fixture.send(MessageDraft::json("1"));
    let mut two = fixture.send(MessageDraft::json("2"));
    fixture.take_written();
    fixture.state.on_disconnected();
    fixture.advance(Duration::from_secs(600));
    fixture.connect();
    let join = fixture.take_written().remove(0);
    fixture.feed(joined(&join["ref"], 5, true, &[]));
    assert_eq!(one.try_recv().unwrap(), Err(SendError::Uncertain));
    assert_eq!(fixture.summary(), ["2"]);
    assert_eq!(two.try_recv().unwrap_err(), TryRecvError::Empty);
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_an_event_and_its_entry_is_delivered() {
    let mut fixture = StateFixture::joined();
    fixture.feed(other(8));
    let events = fixture.events();
    let [ClientEvent::Gap { expected, got, .. }, ClientEvent::Message { .. }] = events.as_slice()
    else {
        panic!("{events:?}");
    };
    assert_eq!((expected.as_ref(), got), (Some(&at(6)), &at(8)));
    fixture.feed(other(8));
    assert!(matches!(fixture.events()[0], ClientEvent::Duplicate { earlier: None, .. }));
}

#[tokio::test(start_paused = true)]
async fn a_message_before_joined_is_a_gap_and_comes_in_history() {
    let mut fixture = StateFixture::joined();
    fixture.state.on_disconnected();
    fixture.connect();
    let join = fixture.take_written().remove(0);
    let early = other(6);
    fixture.feed(early.clone());
    assert!(matches!(fixture.events().as_slice(), [ClientEvent::Gap { expected: None, .. }]));
    fixture.feed(joined(&join["ref"], 6, true, &[early]));
    assert!(matches!(
        fixture.events().as_slice(),
        [ClientEvent::Joined(_), ClientEvent::Message { .. }]
    ));
}

#[tokio::test(start_paused = true)]
async fn not_recovered_precedes_the_current_entries() {
    let mut fixture = StateFixture::joined();
    fixture.state.on_disconnected();
    fixture.connect();
    let join = fixture.take_written().remove(0);
    let mut frame = joined(&join["ref"], 90, false, &[other(90)]);
    frame["reason"] = json!("log_trimmed");
    fixture.feed(frame);
    let events = fixture.events();
    assert!(
        matches!(
            events.as_slice(),
            [ClientEvent::Joined(_), ClientEvent::NotRecovered { .. }, ClientEvent::Message { .. }]
        ),
        "{events:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_reset_ends_the_recovery_and_releases_sends() {
    let mut fixture = StateFixture::joined();
    fixture.state.on_disconnected();
    fixture.connect();
    let _reply = fixture.send(MessageDraft::json("1"));
    let join = fixture.take_written().remove(0);
    fixture.feed(joined(&join["ref"], 9, true, &[]));
    assert!(fixture.take_written().is_empty());
    fixture.feed(json!({
        "type": "reset", "room": "r", "epoch": EPOCH, "seq": 20, "reason": "log_trimmed",
    }));
    assert_eq!(fixture.summary(), ["1"]);
    fixture.events();
    fixture.feed(other(21));
    assert_eq!(fixture.delivered(), [21]);
}

#[tokio::test(start_paused = true)]
async fn a_removed_client_gets_pending_acks_and_cannot_send() {
    let mut fixture = StateFixture::joined();
    let mut one = fixture.send(MessageDraft::json("1"));
    let mut two = fixture.send(MessageDraft::json("2"));
    let frame = fixture.take_written().remove(0);
    fixture.feed(json!({"type": "left", "room": "r", "reason": "kicked"}));
    let events = fixture.events();
    assert!(
        matches!(&events[0], ClientEvent::Left { reason, .. } if reason.as_deref() == Some("kicked"))
    );
    assert_eq!(two.try_recv().unwrap(), Err(SendError::NotJoined));
    fixture.feed(ack(&frame, 6, false));
    assert!(one.try_recv().unwrap().is_ok());
    assert!(fixture.state.rooms.is_empty());
    let mut three = fixture.send(MessageDraft::json("3"));
    assert_eq!(three.try_recv().unwrap(), Err(SendError::NotJoined));
}

#[tokio::test(start_paused = true)]
async fn a_room_that_is_closed_is_left() {
    let mut fixture = StateFixture::joined();
    fixture.feed(json!({"type": "room_closed", "room": "r", "reason": "deleted"}));
    assert!(matches!(fixture.events().as_slice(), [ClientEvent::Left { .. }]));
}

#[tokio::test(start_paused = true)]
async fn leaving_forgets_the_position() {
    let mut fixture = StateFixture::joined();
    let id = MessageId::random();
    fixture.feed(entry(6, "you", id));
    assert_eq!(fixture.delivered(), [6]);
    let mut left = fixture.leave("r");
    let frame = fixture.take_written().remove(0);
    fixture.feed(json!({"type": "left", "ref": frame["ref"], "room": "r"}));
    assert_eq!(left.try_recv().unwrap(), Ok(()));
    assert!(fixture.events().is_empty());
    let _joined = fixture.join("r", StartFrom::History(5));
    let frame = fixture.take_written().remove(0);
    assert_eq!((&frame["history"], &frame["since"]), (&json!(5), &Value::Null));
    fixture.feed(joined(&frame["ref"], 6, false, &[entry(6, "you", id)]));
    assert!(matches!(
        fixture.events().as_slice(),
        [ClientEvent::Joined(_), ClientEvent::Message { .. }]
    ));
}

#[tokio::test(start_paused = true)]
async fn a_leave_with_a_temporary_error_is_retried() {
    let mut fixture = StateFixture::joined();
    let mut left = fixture.leave("r");
    let first = fixture.take_written().remove(0);
    fixture.feed(error(&first, "rate_limited", Some(100)));
    fixture.advance(Duration::from_millis(100));
    let second = fixture.take_written().remove(0);
    assert_eq!(second["type"], "leave");
    fixture.feed(json!({"type": "left", "ref": second["ref"], "room": "r"}));
    assert_eq!(left.try_recv().unwrap(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_connection_lost_while_leaving_completes_the_leave() {
    let mut fixture = StateFixture::joined();
    let mut unanswered = fixture.send(MessageDraft::json("1"));
    let mut left = fixture.leave("r");
    fixture.state.on_disconnected();
    assert_eq!(left.try_recv().unwrap(), Ok(()));
    assert_eq!(unanswered.try_recv().unwrap(), Err(SendError::Uncertain));
    fixture.connect();
    assert!(fixture.take_written().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_room_that_cannot_be_rejoined_is_left() {
    let mut fixture = StateFixture::joined();
    let mut sent = fixture.send(MessageDraft::json("1"));
    fixture.take_written();
    fixture.state.on_disconnected();
    fixture.connect();
    let join = fixture.take_written().remove(0);
    fixture.feed(error(&join, "forbidden", None));
    assert!(matches!(fixture.events().as_slice(), [ClientEvent::Left { .. }]));
    assert_eq!(sent.try_recv().unwrap(), Err(SendError::Uncertain));
}

#[tokio::test(start_paused = true)]
async fn a_message_larger_than_the_limit_is_never_sent() {
    let mut fixture = StateFixture::joined();
    let mut large = fixture.send(MessageDraft::json("x".repeat(1_001)));
    let mut small = fixture.send(MessageDraft::json("1"));
    assert_eq!(large.try_recv().unwrap(), Err(SendError::TooLarge));
    assert_eq!(fixture.summary(), ["1"]);
    // If the server rejects the size, it closes with 1009 and does not name the message.
    fixture.state.fail_largest_send();
    assert_eq!(small.try_recv().unwrap(), Err(SendError::TooLarge));
}

#[tokio::test(start_paused = true)]
async fn an_id_in_flight_cannot_be_sent_again() {
    let mut fixture = StateFixture::joined();
    let send = MessageDraft::json("1");
    let _first = fixture.send(send.clone());
    assert_eq!(fixture.send(send).try_recv().unwrap(), Err(SendError::IdInUse));
}

#[tokio::test(start_paused = true)]
async fn history_requires_a_joined_room() {
    let mut fixture = StateFixture::joined();
    let mut page = fixture.history(HistoryRange::Before(5));
    let frame = fixture.take_written().remove(0);
    assert_eq!((&frame["before"], &frame["limit"]), (&json!(5), &json!(10)));
    fixture.feed(json!({
        "type": "history", "ref": frame["ref"], "room": "r", "epoch": EPOCH,
        "messages": [other(4)], "more": true,
    }));
    let page = page.try_recv().unwrap().unwrap();
    assert_eq!((page.messages.len(), page.more), (1, true));
    assert!(fixture.events().is_empty());

    let mut lost = fixture.history(HistoryRange::Newest);
    fixture.state.on_disconnected();
    assert!(matches!(lost.try_recv().unwrap(), Err(HistoryError::NotJoined)));
    let mut unjoined = fixture.history(HistoryRange::After(1));
    assert!(matches!(unjoined.try_recv().unwrap(), Err(HistoryError::NotJoined)));
}

#[tokio::test(start_paused = true)]
async fn binary_messages_are_equal_live_and_from_the_log() {
    let mut fixture = StateFixture::joined();
    let _sent = fixture.send(MessageDraft::binary(vec![1, 2]));
    assert!(fixture.take_written()[0]["bytes"].is_array());
    let mut in_json = other(6);
    in_json["encoding"] = json!("base64");
    in_json["content"] = json!("AQI=");
    fixture.feed(in_json);
    let events = fixture.events();
    let ClientEvent::Message { payload: Some(payload), .. } = &events[0] else {
        panic!("{events:?}")
    };
    assert_eq!(payload.as_ref(), [1, 2]);
}

#[tokio::test(start_paused = true)]
async fn other_frames_are_events_and_pings_are_answered() {
    let mut fixture = StateFixture::new();
    fixture.feed(json!({"type": "system", "code": "welcome", "content": "hi"}));
    assert!(matches!(fixture.events().as_slice(), [ClientEvent::OtherFrame(_)]));
    fixture.feed(json!({"type": "ping", "timestamp": "2026-01-01T00:00:00.000Z"}));
    assert_eq!(fixture.take_written(), [json!({"type": "pong"})]);
    fixture.feed(json!({"type": "error", "code": "internal", "message": "oh"}));
    assert!(matches!(fixture.events().as_slice(), [ClientEvent::Error(_)]));
}

#[tokio::test(start_paused = true)]
async fn ending_the_client_completes_all_calls() {
    let mut fixture = StateFixture::joined();
    let mut sent = fixture.send(MessageDraft::json("1"));
    let mut unsent = fixture.send(MessageDraft::json("2"));
    let mut joining = fixture.join("s", StartFrom::Now);
    let mut asking = fixture.history(HistoryRange::Newest);
    fixture.state.fail_all();
    assert_eq!(sent.try_recv().unwrap(), Err(SendError::Uncertain));
    assert_eq!(unsent.try_recv().unwrap(), Err(SendError::ClientClosed));
    assert_eq!(joining.try_recv().unwrap(), Err(JoinError::ClientClosed));
    assert!(matches!(asking.try_recv().unwrap(), Err(HistoryError::ClientClosed)));
}
