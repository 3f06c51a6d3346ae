//! Rooms on a single node: join, send, order, history, resume, and bad input.

use serde_json::{Value, json};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    frames,
    options::ConnectOptions,
};
use skein_protocol::{
    error::ErrorCode,
    ids::MessageId,
    position::Position,
    protocol::server_frame::{ErrorFrame, HistoryEntry, RecoveryFailure, ServerFrame},
};

use crate::harness::{Gateway, closed, next_message, room, say, within};

/// Sends a text frame and returns the `error` frame.
async fn error_for(connection: &mut ClientConnection, text: &str) -> ErrorFrame {
    connection.send_text(text).await.unwrap();
    match connection.next_frame().await.unwrap() {
        ServerFrame::Error(refusal) => *refusal,
        other => panic!("expected an error, got {other:?}"),
    }
}

#[tokio::test]
async fn a_message_reaches_every_member_and_its_sender() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let mut bob = gateway.connect("bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let ack = say(&mut ann, &lobby, "hello").await;
    for member in [&mut ann, &mut bob] {
        let message = next_message(member).await;
        assert_eq!((message.seq, message.id), (ack.seq, ack.id));
        assert_eq!(message.epoch, ack.epoch);
        assert_eq!(message.content, json!("hello"));
        assert_eq!(message.from.id.as_str(), "ann");
        assert!(!message.replay);
    }
    gateway.stop().await;
}

#[tokio::test]
async fn a_join_and_its_messages_may_come_in_one_burst() {
    let gateway = Gateway::start(&[]).await;
    let mut ann =
        ClientConnection::open(&ConnectOptions::new(gateway.url("/ws")).user("ann")).await.unwrap();
    for frame in [
        r#"{"type":"join","room":"r","ref":1}"#,
        r#"{"type":"message","room":"r","content":"a","ref":2}"#,
        r#"{"type":"message","room":"r","content":"b","ref":3}"#,
    ] {
        ann.send_text(frame).await.unwrap();
    }
    assert!(matches!(ann.next_frame().await.unwrap(), ServerFrame::Connected(_)));
    assert!(matches!(ann.next_frame().await.unwrap(), ServerFrame::Joined(_)));
    let (mut messages, mut acks) = (vec![], vec![]);
    while messages.len() + acks.len() < 4 {
        match ann.next_frame().await.unwrap() {
            ServerFrame::Message(message) => messages.push(message.seq),
            ServerFrame::Ack(ack) => acks.push(ack.seq),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((messages, acks), (vec![1, 2], vec![1, 2]));
}

#[tokio::test]
async fn the_same_id_twice_is_one_entry() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let mut bob = gateway.connect("bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let content = json!("once");
    let message = frames::OutgoingMessage {
        id: Some(MessageId::random()),
        ..frames::OutgoingMessage::text(&lobby, &content)
    };
    let mut acks = vec![];
    for _ in 0..2 {
        let ServerFrame::Ack(ack) = ann.request(&message).await.unwrap() else { panic!("no ack") };
        acks.push((ack.seq, ack.duplicate));
    }
    assert_eq!(acks, [(1, false), (1, true)]);
    // The same id of another user is another message.
    let ServerFrame::Ack(ack) = bob.request(&message).await.unwrap() else { panic!("no ack") };
    assert_eq!((ack.seq, ack.duplicate), (2, false));
    assert_eq!(next_message(&mut bob).await.seq, 1);
    assert_eq!(next_message(&mut bob).await.seq, 2);
}

#[tokio::test]
async fn without_echo_the_ack_takes_the_place_of_the_copy() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let mut bob = gateway.connect("bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let content = json!("quiet");
    for i in 0..50 {
        let frame = frames::OutgoingMessage {
            echo: false,
            ..frames::OutgoingMessage::text(&lobby, &content)
        };
        ann.send_json(&frame).await.unwrap();
        let loud = json!(i);
        bob.send_json(&frames::OutgoingMessage::text(&lobby, &loud)).await.unwrap();
    }
    // Frames that move the cursor, in order of arrival: copies, and acks in the place of copies.
    let mut seqs = vec![];
    while seqs.len() < 100 {
        match ann.next_frame().await.unwrap() {
            ServerFrame::Message(message) => {
                assert_ne!(message.content, content, "a copy came in spite of echo:false");
                seqs.push(message.seq);
            }
            ServerFrame::Ack(ack) => seqs.push(ack.seq),
            ServerFrame::MemberJoined(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seqs, (1..=100).collect::<Vec<_>>());
    for seq in 1..=100 {
        assert_eq!(next_message(&mut bob).await.seq, seq);
    }
}

#[tokio::test]
async fn an_inline_ack_is_sent_even_after_its_room_was_left() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    ann.join(&room("r")).await.unwrap();
    for round in 0..20 {
        let message = json!({"type":"message","room":"r","content":round,"echo":false,"ref":"m"});
        ann.send_json(&message).await.unwrap();
        ann.send_json(&json!({"type":"leave","room":"r","ref":"l"})).await.unwrap();
        ann.send_json(&json!({"type":"join","room":"r","history":0,"ref":"j"})).await.unwrap();
        let (mut acks, mut others) = (0, 0);
        while acks + others < 3 {
            match ann.next_frame().await.unwrap() {
                ServerFrame::Ack(_) => acks += 1,
                ServerFrame::Left(_) | ServerFrame::Joined(_) => others += 1,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((acks, others), (1, 2));
    }
}

#[tokio::test]
async fn a_client_resumes_from_its_position() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let joined = ann.join(&lobby).await.unwrap();
    for i in 0..10 {
        say(&mut ann, &lobby, &i.to_string()).await;
    }
    let since = Position::new(joined.epoch.clone(), 4);
    let mut bob = gateway.connect("bob").await;
    let join = frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&lobby) };
    let joined = bob.join_with(&join).await.unwrap();
    assert!(joined.recovered && joined.reason.is_none() && joined.seq == 10);
    let seqs: Vec<_> = joined.history.iter().map(seq_of).collect();
    assert_eq!(seqs, [5, 6, 7, 8, 9, 10]);
    // A second join changes nothing and returns the position of this connection.
    let again = bob.join_with(&join).await.unwrap();
    assert!(again.recovered && again.history.is_empty() && again.seq == 10);
}

fn seq_of(entry: &HistoryEntry) -> u64 {
    match entry {
        HistoryEntry::Message(message) => {
            assert!(message.replay);
            message.seq
        }
        HistoryEntry::Direct(_) | HistoryEntry::Unknown => panic!("not a message"),
    }
}

#[tokio::test]
async fn a_failed_resume_states_its_reason() {
    let gateway = Gateway::start(&[
        ("history.max_entries", "300"),
        ("history.window", "0s"),
        ("limits.messages_per_second", "0"),
    ])
    .await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    for i in 0..600 {
        say(&mut ann, &lobby, &i.to_string()).await;
    }
    for (epoch, seq, reason) in [
        (epoch.clone(), 100, RecoveryFailure::LogTrimmed),
        (epoch.clone(), 601, RecoveryFailure::Ahead),
        ("other".parse().unwrap(), 600, RecoveryFailure::LogLost),
    ] {
        let since = Position::new(epoch, seq);
        let mut bob = gateway.connect("bob").await;
        let join =
            frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&lobby) };
        let joined = bob.join_with(&join).await.unwrap();
        assert_eq!((joined.recovered, joined.reason), (false, Some(reason)));
        let seqs: Vec<_> = joined.history.iter().map(seq_of).collect();
        assert_eq!(seqs, (551..=600).collect::<Vec<_>>());
        assert!(joined.more && joined.seq == 600);
    }
    // Just within retention, further back than a page of history holds.
    let since = Position::new(epoch, 300);
    let mut bob = gateway.connect("bob").await;
    let join = frames::OutgoingJoin { since: Some(&since), ..frames::OutgoingJoin::new(&lobby) };
    let joined = bob.join_with(&join).await.unwrap();
    assert!(joined.recovered);
    let mut seqs: Vec<_> = joined.history.iter().map(seq_of).collect();
    while seqs.len() < 300 {
        let message = next_message(&mut bob).await;
        assert!(message.replay);
        seqs.push(message.seq);
    }
    assert_eq!(seqs, (301..=600).collect::<Vec<_>>());
}

#[tokio::test]
async fn history_pages_both_ways_and_reports_more() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    for i in 0..20 {
        say(&mut ann, &lobby, &i.to_string()).await;
    }
    let mut ask = async |before, after, limit| {
        let frame = frames::OutgoingHistory {
            before,
            after,
            limit,
            ..frames::OutgoingHistory::new(&lobby)
        };
        match ann.request(&frame).await.unwrap() {
            ServerFrame::History(page) => {
                (page.messages.iter().map(seq_of).collect::<Vec<_>>(), page.more)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ask(None, None, Some(3)).await, (vec![18, 19, 20], true));
    assert_eq!(ask(Some(3), None, None).await, (vec![1, 2], false));
    assert_eq!(ask(Some(4), None, Some(2)).await, (vec![2, 3], true));
    assert_eq!(ask(None, Some(17), None).await, (vec![18, 19, 20], false));
    assert_eq!(ask(None, Some(0), Some(2)).await, (vec![1, 2], true));
    assert_eq!(ask(None, Some(20), None).await, (vec![], false));
    assert_eq!(ask(Some(1), None, None).await, (vec![], false));
    let mut bob = gateway.connect("bob").await;
    let refusal = error_for(&mut bob, r#"{"type":"history","room":"lobby"}"#).await;
    assert_eq!(refusal.code, ErrorCode::NotJoined);
}

#[tokio::test]
async fn a_binary_message_stays_binary_and_is_base64_in_history() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    let payload: Vec<u8> = (0..=255).collect();
    let meta = json!({"name": "x.bin"});
    let header =
        frames::OutgoingMessage { meta: Some(&meta), ..frames::OutgoingMessage::header(&lobby) };
    ann.send_binary(&header, &payload).await.unwrap();
    let (message, bytes) = loop {
        if let ReceivedMessage::Binary(message, bytes) = within(ann.next()).await.unwrap() {
            break (message, bytes);
        }
    };
    assert_eq!((message.seq, &message.meta, &bytes[..]), (1, &Some(meta), &payload[..]));
    let mut bob = gateway.connect("bob").await;
    let joined = bob.join_with(&frames::OutgoingJoin::new(&lobby)).await.unwrap();
    let [HistoryEntry::Message(entry)] = &joined.history[..] else { panic!("{joined:?}") };
    assert_eq!(entry.encoding.as_deref(), Some("base64"));
    assert!(entry.content.as_str().unwrap().starts_with("AAECAw"));
}

#[tokio::test]
async fn bad_input_gets_an_error_and_keeps_the_connection() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    for (text, code, answers) in [
        ("nonsense", ErrorCode::BadRequest, None),
        ("[]", ErrorCode::BadRequest, None),
        ("{}", ErrorCode::BadRequest, None),
        (r#"{"type":"dance"}"#, ErrorCode::UnknownType, Some("dance")),
        (r#"{"type":"join"}"#, ErrorCode::BadRequest, Some("join")),
        (r#"{"type":"join","room":"a b"}"#, ErrorCode::BadRequest, Some("join")),
        (r#"{"type":"message","room":"r","content":1}"#, ErrorCode::NotJoined, Some("message")),
        (r#"{"type":"message","room":"r"}"#, ErrorCode::BadRequest, Some("message")),
    ] {
        let refusal = error_for(&mut ann, text).await;
        assert_eq!((refusal.code, refusal.frame_type.as_deref()), (code, answers), "{text}");
    }
    let refusal = error_for(&mut ann, r#"{"type":"join","room":7,"ref":"r1"}"#).await;
    assert_eq!(refusal.reference.unwrap().as_json(), r#""r1""#);
    ann.send_bytes(vec![1]).await.unwrap();
    assert!(matches!(ann.next_frame().await.unwrap(), ServerFrame::Error(_)));
    ann.join(&room("r")).await.unwrap();
}

#[tokio::test]
async fn a_room_in_the_url_path_is_joined_on_connect() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    let lobby = room("lobby");
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    for i in 0..5 {
        say(&mut ann, &lobby, &i.to_string()).await;
    }
    let since = format!("/ws/rooms/lobby?since={epoch}:3");
    for (path, history) in [("/ws/rooms/lobby?history=2", 2), (since.as_str(), 2)] {
        let mut bob =
            ClientConnection::open(&ConnectOptions::new(gateway.url(path))).await.unwrap();
        bob.expect_connected().await.unwrap();
        let ServerFrame::Joined(joined) = bob.next_frame().await.unwrap() else {
            panic!("not joined")
        };
        assert_eq!(joined.history.len(), history, "{path}");
    }
    for path in ["/ws/rooms/a%20b", "/ws/rooms/lobby?history=x", "/ws/rooms/lobby?since=x"] {
        let mut bob =
            ClientConnection::open(&ConnectOptions::new(gateway.url(path))).await.unwrap();
        bob.expect_connected().await.unwrap();
        assert!(matches!(bob.next_frame().await.unwrap(), ServerFrame::Error(_)), "{path}");
        assert_eq!(closed(&mut bob).await, (Some(1008), "bad_request".to_owned()), "{path}");
    }
}

#[tokio::test]
async fn a_room_named_like_an_inbox_is_a_room() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    let odd = room("u:bob");
    ann.join(&odd).await.unwrap();
    assert_eq!(say(&mut ann, &odd, "hi").await.seq, 1);
}

#[tokio::test]
async fn pings_are_answered_and_silent_peers_closed_with_4002() {
    let gateway =
        Gateway::start(&[("heartbeat.interval", "200ms"), ("heartbeat.idle_timeout", "2s")]).await;
    let mut ann = gateway.connect("ann").await;
    ann.send_text(r#"{"type":"ping","timestamp":"t1","ref":9}"#).await.unwrap();
    let ServerFrame::Pong(pong) = ann.next_frame().await.unwrap() else { panic!("no pong") };
    assert_eq!(pong.original_timestamp, Some(Value::from("t1")));
    // A client that reads answers pings and stays connected through three intervals.
    for _ in 0..3 {
        loop {
            if let ReceivedMessage::Ping(_) = within(ann.next()).await.unwrap() {
                break;
            }
        }
    }
    // A peer that never answers.
    let silent = ConnectOptions {
        query: vec![("ping".into(), "json".into())],
        ..ConnectOptions::new(gateway.url("/ws"))
    };
    let mut silent = ClientConnection::open(&silent).await.unwrap();
    silent.expect_connected().await.unwrap();
    let ServerFrame::Ping(_) = silent.next_frame().await.unwrap() else { panic!("no ping") };
    assert_eq!(closed(&mut silent).await.0, Some(4002));
}

#[tokio::test]
async fn a_slow_consumer_misses_nothing_and_delays_no_other() {
    let gateway = Gateway::start(&[
        ("limits.outbox_bytes_max", "64KiB"),
        ("limits.messages_per_second", "0"),
        ("history.max_entries", "5000"),
        ("history.max_bytes", "32MiB"),
    ])
    .await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let mut slow = gateway.connect("slow").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    slow.join(&lobby).await.unwrap();
    // 20 MB: far more than what sockets and outbox hold. Meanwhile `slow` reads nothing.
    let text = "x".repeat(20_000);
    for i in 1..=1000 {
        assert_eq!(say(&mut ann, &lobby, &text).await.seq, i);
    }
    let mut replayed = 0;
    for expected in 1..=1000 {
        let message = next_message(&mut slow).await;
        assert_eq!((message.seq, &message.epoch), (expected, &epoch));
        replayed += usize::from(message.replay);
    }
    assert!(replayed > 0, "the outbox was never full, so this showed nothing");
    say(&mut ann, &lobby, "live").await;
    let message = next_message(&mut slow).await;
    assert_eq!((message.seq, message.replay), (1001, false));
}

#[tokio::test]
async fn leaving_a_room_stops_delivery() {
    let gateway = Gateway::start(&[]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let mut bob = gateway.connect("bob").await;
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    let left = bob.request(&frames::OutgoingLeave::new(&lobby)).await.unwrap();
    assert!(matches!(left, ServerFrame::Left(_)));
    // Leaving a room without being a member is answered as well.
    let left = bob.request(&frames::OutgoingLeave::new(&room("elsewhere"))).await.unwrap();
    assert!(matches!(left, ServerFrame::Left(_)));
    say(&mut ann, &lobby, "unheard").await;
    bob.send_text(r#"{"type":"ping"}"#).await.unwrap();
    assert!(matches!(bob.next_frame().await.unwrap(), ServerFrame::Pong(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn joining_a_busy_room_leaves_no_gap_before_live_messages() {
    let gateway = Gateway::start(&[("limits.messages_per_second", "0")]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    ann.join(&lobby).await.unwrap();
    for i in 0..400 {
        say(&mut ann, &lobby, &i.to_string()).await;
    }
    let (over, mut is_over) = tokio::sync::oneshot::channel::<()>();
    let (talk_in, mut talker) = (lobby.clone(), gateway.connect("talker").await);
    talker.join(&talk_in).await.unwrap();
    let talk = tokio::spawn(async move {
        while is_over.try_recv().is_err() {
            say(&mut talker, &talk_in, "more").await;
        }
    });
    for i in 0..60 {
        let mut bob = gateway.connect("bob").await;
        let history = if i % 2 == 0 { 1000 } else { 300 };
        let join =
            frames::OutgoingJoin { history: Some(history), ..frames::OutgoingJoin::new(&lobby) };
        let joined = bob.join_with(&join).await.unwrap();
        let mut seqs: Vec<_> = joined.history.iter().map(seq_of).collect();
        assert_eq!(seqs.last(), Some(&joined.seq));
        while seqs.last() < Some(&(joined.seq + 3)) {
            seqs.push(next_message(&mut bob).await.seq);
        }
        assert!(seqs.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seqs:?}");
    }
    drop(over);
    talk.abort();
}

#[tokio::test]
async fn an_id_may_repeat_across_rooms_and_before_its_ack() {
    let gateway = Gateway::start(&[]).await;
    let mut ann = gateway.connect("ann").await;
    for name in ["a", "b"] {
        ann.join(&room(name)).await.unwrap();
    }
    for round in 1..=20_u64 {
        let id = MessageId::random();
        for (room, reference) in [("a", "a1"), ("b", "b1"), ("a", "a2"), ("b", "b2")] {
            let frame = json!({"type": "message", "room": room, "ref": reference, "id": id,
                "content": round, "echo": false});
            ann.send_json(&frame).await.unwrap();
        }
        let mut acks = vec![];
        while acks.len() < 4 {
            match ann.next_frame().await.unwrap() {
                ServerFrame::Ack(ack) => {
                    let reference = ack.reference.unwrap().as_json().to_owned();
                    acks.push((reference, ack.room.unwrap().to_string(), ack.seq, ack.duplicate));
                }
                other => panic!("{other:?}"),
            }
        }
        acks.sort();
        let expected =
            [("a1", "a", false), ("a2", "a", true), ("b1", "b", false), ("b2", "b", true)];
        let expected = expected.map(|(reference, room, duplicate)| {
            (format!("\"{reference}\""), room.to_owned(), round, duplicate)
        });
        assert_eq!(acks, expected);
    }
}

#[tokio::test]
async fn an_ack_out_of_place_moves_no_cursor() {
    let gateway = Gateway::start(&[("limits.messages_per_second", "0")]).await;
    let lobby = room("lobby");
    let mut ann = gateway.connect("ann").await;
    let epoch = ann.join(&lobby).await.unwrap().epoch;
    let text = "x".repeat(2_000);
    for _ in 0..600 {
        say(&mut ann, &lobby, &text).await;
    }
    let mut bob = gateway.connect("bob").await;
    for frame in [
        json!({"type": "join", "room": "lobby", "since": {"epoch": epoch, "seq": 1}}),
        json!({"type": "message", "room": "lobby", "content": "z", "echo": false, "ref": "Z"}),
        json!({"type": "leave", "room": "lobby"}),
    ] {
        bob.send_json(&frame).await.unwrap();
    }
    // Every frame that moves bob's cursor moves it by one.
    let mut cursor = 1;
    loop {
        match bob.next_frame().await.unwrap() {
            ServerFrame::Joined(joined) => {
                for entry in &joined.history {
                    cursor += 1;
                    assert_eq!(seq_of(entry), cursor);
                }
            }
            ServerFrame::Message(message) => {
                cursor += 1;
                assert_eq!(message.seq, cursor);
            }
            ServerFrame::Ack(ack) if ack.duplicate => {}
            ServerFrame::Ack(ack) => {
                cursor += 1;
                assert_eq!(ack.seq, cursor, "the ack skipped an entry");
            }
            ServerFrame::Left(_) => break,
            other => panic!("{other:?}"),
        }
    }
}
