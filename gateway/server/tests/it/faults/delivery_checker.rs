//! The delivery checker counts each violation that it observes.

use std::time::Duration;

use serde_json::{Value, json};
use skein_protocol::{
    ids::MessageId,
    protocol::server_frame::{AckFrame, HistoryEntry, JoinedFrame, MessageFrame, ResetFrame},
};
use tokio::time::Instant;

use super::{
    checker::DeliveryChecker,
    clients::TestClients,
    report::{DeliveryReport, Violation},
};
use crate::harness::Gateway;

fn id(number: u8) -> MessageId {
    format!("00000000-0000-4000-8000-0000000000{number:02x}").parse().unwrap()
}

fn message(epoch: &str, seq: u64, number: u8) -> MessageFrame {
    let from = json!({"id": "ann", "name": "ann"});
    serde_json::from_value(json!({
        "room": "lobby", "epoch": epoch, "seq": seq, "id": id(number), "from": from,
        "kind": "text", "content": "", "timestamp": "",
    }))
    .unwrap()
}

fn joined(epoch: &str, seq: u64, recovered: bool, reason: Value) -> JoinedFrame<HistoryEntry> {
    serde_json::from_value(json!({
        "room": "lobby", "epoch": epoch, "seq": seq, "recovered": recovered, "reason": reason,
        "history": [], "durable": true,
    }))
    .unwrap()
}

/// A `joined` frame for a log that cannot be continued, with these entries.
fn joined_with_history(
    epoch: &str,
    seq: u64,
    history: &[(&str, u64, u8)],
) -> JoinedFrame<HistoryEntry> {
    let entry = |(epoch, seq, number): &(&str, u64, u8)| {
        HistoryEntry::Message(Box::new(message(epoch, *seq, *number)))
    };
    let history = history.iter().map(entry).collect();
    JoinedFrame { history, ..joined(epoch, seq, false, json!("log_lost")) }
}

fn reset(epoch: &str, seq: u64) -> ResetFrame {
    serde_json::from_value(
        json!({"room": "lobby", "epoch": epoch, "seq": seq, "reason": "log_lost"}),
    )
    .unwrap()
}

fn ack(epoch: &str, seq: u64, number: u8) -> AckFrame {
    serde_json::from_value(json!({
        "room": "lobby", "epoch": epoch, "seq": seq, "id": id(number), "timestamp": "",
        "duplicate": false,
    }))
    .unwrap()
}

/// One frame, or an ack of the reader's own message.
enum ObservedFrame {
    Joined(JoinedFrame<HistoryEntry>),
    Message(MessageFrame),
    Reset(ResetFrame),
    Ack(AckFrame),
}

/// A reader that joined at (e, 0) and got 1 and 2, receives more frames; `expected` are the
/// violations.
#[track_caller]
fn check(frames: Vec<ObservedFrame>, expected: &[Violation]) -> DeliveryReport {
    let (mut checker, now) = (DeliveryChecker::new(1), Instant::now());
    checker.on_joined(0, &joined("e", 0, false, Value::Null), now);
    checker.on_message(0, &message("e", 1, 1), now);
    checker.on_message(0, &message("e", 2, 2), now);
    for frame in frames {
        match frame {
            ObservedFrame::Joined(joined) => checker.on_joined(0, &joined, now),
            ObservedFrame::Message(message) => checker.on_message(0, &message, now),
            ObservedFrame::Reset(reset) => checker.on_reset(0, &reset),
            ObservedFrame::Ack(ack) => checker.on_ack(0, &ack, Duration::ZERO),
        }
    }
    let report = checker.report();
    let seen: Vec<Violation> = report.violations.keys().copied().collect();
    assert_eq!(seen, expected, "{:?}", report.examples);
    report
}

#[test]
fn correct_traces_have_no_violation() {
    check(vec![], &[]);
    check(
        vec![ObservedFrame::Message(message("e", 3, 3)), ObservedFrame::Ack(ack("e", 3, 3))],
        &[],
    );
    check(vec![ObservedFrame::Joined(joined("e", 2, true, Value::Null))], &[]);
    // A signalled new epoch in which a lost message is delivered again.
    let frames = vec![
        ObservedFrame::Reset(reset("f", 1)),
        ObservedFrame::Message(message("f", 2, 2)),
        ObservedFrame::Ack(ack("f", 2, 2)),
    ];
    assert_eq!(check(frames, &[]).redelivered, 1);
}

#[test]
fn a_first_page_may_begin_in_a_former_epoch() {
    let check =
        |joined, expected: &[Violation]| check(vec![ObservedFrame::Joined(joined)], expected);
    check(joined_with_history("g", 9, &[("f", 7, 7), ("f", 8, 8), ("g", 9, 9)]), &[]);
    check(joined_with_history("g", 8, &[("f", 7, 7), ("f", 8, 8)]), &[]);
    check(
        joined_with_history("g", 9, &[("f", 7, 7), ("g", 9, 9)]),
        &[Violation::UnsignalledDiscontinuity],
    );
    check(joined_with_history("g", 9, &[("f", 7, 7), ("f", 8, 8)]), &[Violation::Gap]);
}

#[test]
fn each_violation_is_detected() {
    let then = |seq, number| ObservedFrame::Message(message("e", seq, number));
    check(vec![then(2, 2)], &[Violation::Duplicated]);
    check(vec![then(3, 2)], &[Violation::Duplicated, Violation::Disagreement]);
    check(vec![then(4, 4)], &[Violation::Gap]);
    check(vec![then(4, 4), then(3, 3)], &[Violation::OutOfOrder, Violation::Gap]);
    check(vec![then(2, 3)], &[Violation::Duplicated, Violation::Disagreement]);
    check(vec![ObservedFrame::Message(message("f", 3, 3))], &[Violation::UnsignalledDiscontinuity]);
    // Recovered, and nothing follows or the log is shorter.
    check(vec![ObservedFrame::Ack(ack("e", 3, 3))], &[Violation::Lost]);
    check(
        vec![ObservedFrame::Joined(joined("e", 1, true, Value::Null))],
        &[Violation::UnsignalledDiscontinuity],
    );
    check(
        vec![
            ObservedFrame::Joined(joined("f", 5, true, Value::Null)),
            ObservedFrame::Message(message("f", 6, 6)),
        ],
        &[Violation::UnsignalledDiscontinuity],
    );
    check(vec![ObservedFrame::Ack(ack("e", 2, 3))], &[Violation::Lost, Violation::Disagreement]);
    check(vec![ObservedFrame::Ack(ack("e", 1, 2))], &[Violation::Disagreement]);
    check(vec![ObservedFrame::Joined(joined("f", 5, false, Value::Null))], &[Violation::Protocol]);
    // Sent one after the other, and numbered the other way round.
    check(
        vec![ObservedFrame::Ack(ack("e", 2, 2)), ObservedFrame::Ack(ack("e", 1, 1))],
        &[Violation::OutOfOrder],
    );
}

#[test]
fn entries_outside_a_discontinuity_count_as_lost() {
    let break_then_ack = |position: AckFrame| {
        vec![ObservedFrame::Reset(reset("f", 7)), ObservedFrame::Ack(position)]
    };
    assert_eq!(check(break_then_ack(ack("e", 3, 9)), &[]).skipped, 1);
    assert_eq!(check(break_then_ack(ack("f", 7, 9)), &[]).skipped, 1);
    check(break_then_ack(ack("f", 8, 9)), &[Violation::Lost]);
    let told = ObservedFrame::Joined(joined("e", 9, false, json!("log_trimmed")));
    assert_eq!(check(vec![told, ObservedFrame::Ack(ack("e", 5, 9))], &[]).skipped, 1);
    let told = ObservedFrame::Joined(joined("e", 9, false, json!("log_trimmed")));
    check(vec![told, ObservedFrame::Ack(ack("e", 10, 9))], &[Violation::Lost]);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_fault_see_no_discontinuity() {
    let gateway = Gateway::start(&super::UNLIMITED).await;
    let clients = TestClients::connect(&[gateway.address; 2]).await.unwrap();
    clients.wait_for_acks(100).await.unwrap();
    clients.disconnect(1);
    clients.wait_for_acks(100).await.unwrap();
    clients.reconnect(1);
    clients.wait_for_acks(50).await.unwrap();
    let report = clients.finish().await.unwrap();
    report.check_seamless("no fault");
    assert_eq!(report.connections, [1, 2, 1, 1]);
    assert_eq!(report.delivered, report.acknowledged * 4);
    assert!(report.acknowledged > 250);
}
