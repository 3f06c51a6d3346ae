use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use skein_protocol::protocol::server_frame::{MessageFrame, RecoveryFailure, UserInfo};

fn user(name: &str) -> UserId {
    name.parse().unwrap()
}

fn id(number: u64) -> MessageId {
    MessageId(Uuid::from_u128(u128::from(number)))
}

fn at(epoch: &str, seq: Seq) -> Position {
    Position::new(epoch.parse().unwrap(), seq)
}

fn joined(
    epoch: &str,
    seq: Seq,
    recovered: bool,
    history: &[(Seq, u64)],
) -> JoinedFrame<HistoryEntry> {
    let entry = |(seq, number): &(Seq, u64)| {
        HistoryEntry::Message(Box::new(MessageFrame {
            room: "r".parse().unwrap(),
            epoch: epoch.parse().unwrap(),
            seq: *seq,
            id: id(*number),
            from: UserInfo { id: user("u"), name: "u".parse().unwrap() },
            kind: skein_protocol::protocol::MessageKind::Text,
            content: serde_json::Value::Null,
            encoding: None,
            reply_to: None,
            meta: None,
            timestamp: String::new(),
            replay: true,
        }))
    };
    JoinedFrame {
        reference: None,
        room: "r".parse().unwrap(),
        epoch: epoch.parse().unwrap(),
        seq,
        recovered,
        reason: (!recovered).then_some(RecoveryFailure::LogLost),
        history: history.iter().map(entry).collect(),
        more: false,
        members: 1,
        read: 0,
        durable: true,
    }
}

/// Feeds a whole `joined` and returns the classification of its history.
fn join(
    log: &mut LogTracker,
    joined: &JoinedFrame<HistoryEntry>,
) -> (Vec<EntryCheck>, Option<Position>) {
    log.begin_history(joined);
    let classify = |entry: &HistoryEntry| match entry {
        HistoryEntry::Message(message) => {
            let position = Position::new(message.epoch.clone(), message.seq);
            log.classify(&position, &message.from.id, message.id)
        }
        HistoryEntry::Direct(_) | HistoryEntry::Unknown => panic!("no directs in these tests"),
    };
    let checks = joined.history.iter().map(classify).collect();
    (checks, log.end_history(joined))
}

fn gap(expected: Position) -> EntryCheck {
    EntryCheck::Gap { expected: Some(expected), deliver: true }
}

/// Feeds live entries `epoch:seq:id` to a tracker at `e:1`.
#[track_caller]
fn check(arrivals: &str, expected: &[EntryCheck]) {
    let mut log = LogTracker::starting_at(at("e", 1));
    let checks: Vec<EntryCheck> = arrivals
        .split_whitespace()
        .map(|arrival| {
            let (position, number) = arrival.rsplit_once(':').unwrap();
            log.classify(&position.parse().unwrap(), &user("u"), id(number.parse().unwrap()))
        })
        .collect();
    assert_eq!(checks, expected, "arrivals: {arrivals}");
}

#[test]
fn the_next_entry_is_delivered_and_a_repeated_one_dropped() {
    let repeated = EntryCheck::Duplicate { earlier: None };
    check("e:2:20 e:2:20 e:3:30", &[EntryCheck::InOrder, repeated.clone(), EntryCheck::InOrder]);
    check("e:1:10", &[repeated]);
}

#[test]
fn a_known_id_under_a_new_number_is_dropped() {
    let known = EntryCheck::Duplicate { earlier: Some(at("e", 2)) };
    check("e:2:20 e:3:20 e:4:40", &[EntryCheck::InOrder, known, EntryCheck::InOrder]);
}

#[test]
fn a_skipped_number_is_one_gap_and_the_entry_is_delivered() {
    check("e:4:40 e:5:50", &[gap(at("e", 2)), EntryCheck::InOrder]);
    let dropped = EntryCheck::Gap { expected: Some(at("e", 3)), deliver: false };
    check("e:2:20 e:9:20", &[EntryCheck::InOrder, dropped]);
}

#[test]
fn another_epoch_without_a_reset_is_a_gap() {
    check("e:2:20 f:3:30 f:4:40", &[EntryCheck::InOrder, gap(at("e", 3)), EntryCheck::InOrder]);
}

#[test]
fn the_same_id_of_another_user_is_another_message() {
    let mut log = LogTracker::starting_at(at("e", 0));
    assert_eq!(log.classify(&at("e", 1), &user("a"), id(1)), EntryCheck::InOrder);
    assert_eq!(log.classify(&at("e", 2), &user("b"), id(1)), EntryCheck::InOrder);
}

#[test]
fn an_entry_of_a_room_that_is_not_joined_is_a_gap() {
    let check = LogTracker::default().classify(&at("e", 7), &user("u"), id(1));
    assert_eq!(check, EntryCheck::Gap { expected: None, deliver: true });
}

#[test]
fn a_first_join_starts_just_before_its_history() {
    let mut log = LogTracker::default();
    let (checks, missing) = join(&mut log, &joined("e", 9, false, &[(8, 80), (9, 90)]));
    assert_eq!(
        (checks.as_slice(), missing),
        (&[EntryCheck::InOrder, EntryCheck::InOrder][..], None)
    );
    assert_eq!(log.cursor(), Some(&at("e", 9)));

    let mut log = LogTracker::default();
    assert_eq!(join(&mut log, &joined("e", 9, false, &[])), (vec![], None));
    assert_eq!(log.classify(&at("e", 10), &user("u"), id(1)), EntryCheck::InOrder);
}

#[test]
fn a_history_that_ends_below_the_top_has_a_gap() {
    let mut log = LogTracker::default();
    let (_, missing) = join(&mut log, &joined("e", 9, false, &[(6, 60), (7, 70)]));
    assert_eq!((missing, log.cursor()), (Some(at("e", 8)), Some(&at("e", 9))));
}

#[test]
fn a_recovery_ends_with_the_entry_at_the_top() {
    let mut log = LogTracker::starting_at(at("e", 5));
    let (checks, _) = join(&mut log, &joined("e", 8, true, &[(6, 60), (7, 70)]));
    assert_eq!(checks, [EntryCheck::InOrder, EntryCheck::InOrder]);
    assert!(!log.is_recovered());
    assert_eq!(log.classify(&at("e", 8), &user("u"), id(80)), EntryCheck::InOrder);
    assert!(log.is_recovered());
}

#[test]
fn a_recovery_that_skips_entries_is_a_gap() {
    let mut log = LogTracker::starting_at(at("e", 5));
    let (checks, _) = join(&mut log, &joined("e", 8, true, &[(7, 70), (8, 80)]));
    assert_eq!(checks, [gap(at("e", 6)), EntryCheck::InOrder]);
}

#[test]
fn a_recovery_in_another_epoch_is_a_gap() {
    let mut log = LogTracker::starting_at(at("e", 5));
    let (checks, _) = join(&mut log, &joined("f", 6, true, &[(6, 60)]));
    assert_eq!(checks, [gap(at("e", 6))]);
}

#[test]
fn entries_with_new_numbers_after_a_loss_are_dropped() {
    let mut log = LogTracker::starting_at(at("e", 0));
    log.classify(&at("e", 1), &user("u"), id(10));
    let (checks, _) = join(&mut log, &joined("f", 2, false, &[(1, 10), (2, 20)]));
    let known = EntryCheck::Duplicate { earlier: Some(at("e", 1)) };
    assert_eq!(checks, [known, EntryCheck::InOrder]);
    assert_eq!(log.cursor(), Some(&at("f", 2)));
}

#[test]
fn a_reset_moves_the_cursor_and_ends_the_recovery() {
    let mut log = LogTracker::starting_at(at("e", 5));
    join(&mut log, &joined("e", 8, true, &[]));
    log.reset(at("e", 20));
    assert!(log.is_recovered());
    assert_eq!(log.classify(&at("e", 21), &user("u"), id(1)), EntryCheck::InOrder);
}

#[test]
fn a_room_without_a_log_has_no_position() {
    let mut log = LogTracker::default();
    join(&mut log, &JoinedFrame { durable: false, ..joined("e", 0, false, &[]) });
    assert!(log.cursor().is_none() && log.is_recovered());
}

#[test]
fn only_an_ack_in_place_of_a_copy_moves_the_cursor() {
    let own = user("me");
    let mut log = LogTracker::starting_at(at("e", 5));
    log.expect_no_echo(id(1));
    // The ack of a message with an echo; of a repeat; then the one in the log, twice.
    assert_eq!(log.acknowledged(&at("e", 6), Some(&own), id(2), false), None);
    assert_eq!(log.acknowledged(&at("e", 6), Some(&own), id(1), true), None);
    assert_eq!(log.cursor(), Some(&at("e", 5)));
    for _ in 0..2 {
        assert_eq!(log.acknowledged(&at("e", 6), Some(&own), id(1), false), None);
        assert_eq!(log.cursor(), Some(&at("e", 6)));
    }
    // Skipped entries are a gap; and the message is known under any number.
    log.expect_no_echo(id(3));
    let skipped = log.acknowledged(&at("e", 8), Some(&own), id(3), false);
    assert_eq!(skipped, Some(Some(at("e", 7))));
    log.reset(at("f", 0));
    let known = EntryCheck::Duplicate { earlier: Some(at("e", 8)) };
    assert_eq!(log.classify(&at("f", 1), &own, id(3)), known);
}

#[test]
fn recent_ids_are_bounded() {
    let mut log = LogTracker::starting_at(at("e", 0));
    let many = RECENT_IDS_MAX as u64 + 10;
    for seq in 1..=many {
        assert_eq!(log.classify(&at("e", seq), &user("u"), id(seq)), EntryCheck::InOrder);
    }
    assert_eq!(log.recent_ids.values.len(), RECENT_IDS_MAX);
    assert_eq!(log.recent_ids.order.len(), RECENT_IDS_MAX);
    assert_eq!(log.classify(&at("e", many + 1), &user("u"), id(1)), EntryCheck::InOrder);
}

/// A change of a server's log, or of its client.
#[derive(Clone, Debug)]
enum ServerStep {
    /// Appends a message of another user.
    Append,
    /// Appends the client's own message without an echo.
    AppendWithoutEcho,
    /// Sends up to this many entries.
    Send(usize),
    /// Cuts the connection and reconnects; so many entries are in `joined`, the others follow.
    Reconnect { in_history: usize },
    /// The server loses its newest entries; some of them are appended again.
    Lose { entries: usize, again: usize },
    /// Retention: only the newest entries stay.
    Trim { keep: usize },
}

fn steps() -> impl Strategy<Value = Vec<ServerStep>> {
    let step = prop_oneof![
        6 => Just(ServerStep::Append),
        3 => Just(ServerStep::AppendWithoutEcho),
        6 => (1_usize..5).prop_map(ServerStep::Send),
        2 => (0_usize..4).prop_map(|in_history| ServerStep::Reconnect { in_history }),
        1 => (1_usize..6, 0_usize..6).prop_map(|(entries, again)| ServerStep::Lose { entries, again }),
        1 => (0_usize..4).prop_map(|keep| ServerStep::Trim { keep }),
    ];
    proptest::collection::vec(step, 1..120)
}

/// A correct server and its client.
struct ServerModel {
    log: LogTracker,
    epoch: u32,
    /// Entries: (number of the message, whether it is the client's, the connection that sent it).
    entries: Vec<(u64, bool, u32)>,
    trimmed: usize,
    /// The number of entries sent to the connection.
    served: usize,
    connection: u32,
    next_id: u64,
    /// The messages delivered to the application.
    delivered: Vec<u64>,
    silent: std::collections::HashSet<u64>,
}

impl ServerModel {
    fn new() -> Self {
        let mut log = LogTracker::default();
        join(&mut log, &joined("e0", 0, false, &[]));
        Self {
            log,
            epoch: 0,
            entries: Vec::new(),
            trimmed: 0,
            served: 0,
            connection: 0,
            next_id: 1,
            delivered: Vec::new(),
            silent: std::collections::HashSet::new(),
        }
    }

    fn position(&self, index: usize) -> Position {
        at(&format!("e{}", self.epoch), index as Seq + 1)
    }

    fn append(&mut self, own: bool) {
        let number = self.next_id;
        self.next_id += 1;
        if own {
            self.log.expect_no_echo(id(number));
            self.silent.insert(number);
        }
        self.entries.push((number, own, self.connection));
    }

    fn send_entries(&mut self, many: usize) {
        let end = (self.served + many).min(self.entries.len());
        for index in self.served..end {
            let (number, own, connection) = self.entries[index];
            let position = self.position(index);
            if own && connection == self.connection {
                let skipped =
                    self.log.acknowledged(&position, Some(&user("me")), id(number), false);
                assert_eq!(skipped, None, "a gap at an ack");
            } else {
                self.entry(&position, number, own);
            }
        }
        self.served = end;
    }

    fn entry(&mut self, position: &Position, number: u64, own: bool) {
        let from = user(if own { "me" } else { "u" });
        match self.log.classify(position, &from, id(number)) {
            EntryCheck::InOrder => self.delivered.push(number),
            EntryCheck::Duplicate { earlier: Some(earlier) } => {
                let first_time = !self.delivered.contains(&number);
                assert!(!first_time || self.silent.contains(&number), "dropped {number} unseen");
                assert_ne!(earlier.epoch, position.epoch, "one id, two numbers in an epoch");
            }
            check => panic!("{position}: {check:?}"),
        }
    }

    /// Reconnects: answers a `join` with `since` as the protocol requires.
    fn reconnect(&mut self, in_history: usize) {
        self.connection += 1;
        let since = self.log.cursor().unwrap().clone();
        let top = self.entries.len();
        let epoch = format!("e{}", self.epoch);
        let cursor = since.seq as usize;
        let recovered = since.epoch.as_str() == epoch && cursor <= top && cursor >= self.trimmed;
        let (from, to) = if recovered {
            (cursor, (cursor + in_history).min(top))
        } else {
            (self.trimmed.max(top.saturating_sub(50)), top)
        };
        let range: Vec<(Seq, u64)> =
            (from..to).map(|index| (index as Seq + 1, self.entries[index].0)).collect();
        let joined = joined(&epoch, top as Seq, recovered, &range);
        self.log.begin_history(&joined);
        for index in from..to {
            let (number, own, _) = self.entries[index];
            let position = self.position(index);
            self.entry(&position, number, own);
        }
        assert_eq!(self.log.end_history(&joined), None);
        self.served = if recovered { to } else { top };
        assert_eq!(self.log.is_recovered(), self.served == top);
    }

    fn lose(&mut self, entries: usize, again: usize) {
        let kept = self.entries.len().saturating_sub(entries).max(self.trimmed);
        let lost = self.entries.split_off(kept);
        self.epoch += 1;
        self.log.reset(at(&format!("e{}", self.epoch), kept as Seq));
        self.served = kept;
        self.entries.extend(lost.into_iter().take(again).map(|(number, own, _)| {
            // Gateways append it again, not the connection that sent it.
            (number, own, u32::MAX)
        }));
    }

    fn step(&mut self, step: ServerStep) {
        match step {
            ServerStep::Append => self.append(false),
            ServerStep::AppendWithoutEcho => self.append(true),
            ServerStep::Send(many) => self.send_entries(many),
            ServerStep::Reconnect { in_history } => self.reconnect(in_history),
            ServerStep::Lose { entries, again } => self.lose(entries, again),
            // Only entries that were sent are trimmed; else the server would send `reset`.
            ServerStep::Trim { keep } => {
                let trimmed = self.entries.len().saturating_sub(keep).min(self.served);
                self.trimmed = self.trimmed.max(trimmed);
            }
        }
    }
}

proptest! {
    #[test]
    fn a_correct_server_causes_no_gap_and_no_duplicate(
        steps in steps(),
    ) {
        let mut model = ServerModel::new();
        for step in steps {
            model.step(step);
        }
        let mut once = model.delivered.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), model.delivered.len());
    }

    #[test]
    fn any_entries_are_delivered_in_order_and_at_most_once(
        arrivals in proptest::collection::vec((0_u8..3, 0_u64..12, 0_u64..8), 0..60),
    ) {
        let mut log = LogTracker::starting_at(at("e0", 0));
        let mut last = at("e0", 0);
        for (epoch, seq, number) in arrivals {
            let position = at(&format!("e{epoch}"), seq);
            let check = log.classify(&position, &user("u"), id(number));
            let is_next = position.epoch == last.epoch && position.seq == last.seq + 1;
            let passed = position.epoch == last.epoch && position.seq <= last.seq;
            match check {
                EntryCheck::InOrder => prop_assert!(is_next),
                EntryCheck::Duplicate { earlier: None } => prop_assert!(passed),
                EntryCheck::Duplicate { earlier: Some(_) } => prop_assert!(is_next),
                EntryCheck::Gap { expected, .. } => {
                    prop_assert!(!is_next && !passed);
                    prop_assert_eq!(expected, Some(at(last.epoch.as_str(), last.seq + 1)));
                }
            }
            if !passed {
                last = position;
            }
            prop_assert_eq!(log.cursor(), Some(&last));
        }
    }
}

const WINDOW: Duration = Duration::from_secs(600);

fn sent<T: Copy>(sends: &mut PendingSends<T>, now: Instant) -> Vec<T> {
    let mut sent = Vec::new();
    while let Some(NextSend::Send(_, what)) = sends.next(now, WINDOW) {
        sent.push(*what);
    }
    sent
}

#[tokio::test(start_paused = true)]
async fn one_message_is_in_flight_at_a_time() {
    let now = Instant::now();
    let mut sends = PendingSends::new(1);
    (1..=3).for_each(|number| sends.push(id(number), number));
    assert_eq!(sent(&mut sends, now), [1]);
    assert_eq!(sends.remove(id(1)), Some(1));
    assert_eq!(sent(&mut sends, now), [2]);
    assert_eq!(sends.remove(id(7)), None);
}

#[tokio::test(start_paused = true)]
async fn a_rejected_message_keeps_its_place_in_the_queue() {
    let now = Instant::now();
    let later = now + Duration::from_secs(2);
    let mut sends = PendingSends::new(1);
    (1..=2).for_each(|number| sends.push(id(number), number));
    sent(&mut sends, now);
    sends.retry_at(id(1), later);
    assert_eq!((sent(&mut sends, now), sends.next_retry()), (vec![], Some(later)));
    assert_eq!((sent(&mut sends, later), sends.next_retry()), (vec![1], None));
}

#[tokio::test(start_paused = true)]
async fn messages_in_flight_are_sent_again_in_order() {
    let now = Instant::now();
    let mut sends = PendingSends::new(3);
    (1..=5).for_each(|number| sends.push(id(number), number));
    assert_eq!(sent(&mut sends, now), [1, 2, 3]);
    assert_eq!(sends.in_flight().count(), 3);
    sends.remove(id(2));
    sends.on_disconnected();
    assert_eq!(sends.in_flight().count(), 0);
    assert_eq!(sent(&mut sends, now), [1, 3, 4]);
}

#[tokio::test(start_paused = true)]
async fn a_sent_message_older_than_the_window_is_uncertain() {
    let now = Instant::now();
    let mut sends = PendingSends::new(1);
    (1..=2).for_each(|number| sends.push(id(number), number));
    sent(&mut sends, now);
    sends.on_disconnected();
    assert_eq!(sends.next(now + WINDOW, WINDOW), Some(NextSend::Uncertain(id(1), 1)));
    // The second was never sent, so it is not uncertain.
    assert_eq!(sent(&mut sends, now + WINDOW), [2]);
}

#[tokio::test(start_paused = true)]
async fn draining_separates_sent_from_unsent_messages() {
    let now = Instant::now();
    let mut sends = PendingSends::new(1);
    (1..=3).for_each(|number| sends.push(id(number), number));
    sent(&mut sends, now);
    assert_eq!(sends.drain_unsent(), [2, 3]);
    assert_eq!(sends.drain().collect::<Vec<_>>(), [(1, true)]);
    assert!(sends.is_empty());
}

/// An event of the pending sends.
#[derive(Clone, Debug)]
enum SendStep {
    Send,
    Acknowledge(usize),
    Reject(usize),
    RejectTemporarily(usize),
    Disconnect,
    AdvanceTime(u64),
}

fn send_steps() -> impl Strategy<Value = Vec<SendStep>> {
    let step = prop_oneof![
        4 => Just(SendStep::Send),
        3 => (0_usize..4).prop_map(SendStep::Acknowledge),
        1 => (0_usize..4).prop_map(SendStep::Reject),
        2 => (0_usize..4).prop_map(SendStep::RejectTemporarily),
        1 => Just(SendStep::Disconnect),
        2 => (0_u64..200).prop_map(SendStep::AdvanceTime),
    ];
    proptest::collection::vec(step, 0..150)
}

proptest! {
    #[test]
    fn sends_complete_once_and_single_ones_in_order(
        send_steps in send_steps(),
        in_flight_max in 1_usize..4,
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut sends = PendingSends::new(in_flight_max);
        (0..20_u64).for_each(|number| sends.push(id(number), number));
        let (mut accepted, mut completed) = (Vec::new(), 0_usize);
        for step in send_steps {
            let nth = |sends: &PendingSends<u64>, n: usize| sends.in_flight().nth(n).map(|(id, _)| id);
            match step {
                SendStep::Send => match sends.next(now, WINDOW) {
                    Some(NextSend::Uncertain(..)) => completed += 1,
                    Some(NextSend::Send(..)) | None => {}
                },
                SendStep::Acknowledge(n) => if let Some(id) = nth(&sends, n) {
                    accepted.push(sends.remove(id).unwrap());
                    completed += 1;
                },
                SendStep::Reject(n) => if let Some(id) = nth(&sends, n) {
                    sends.remove(id).unwrap();
                    completed += 1;
                },
                SendStep::RejectTemporarily(n) => if let Some(id) = nth(&sends, n) {
                    sends.retry_at(id, now + Duration::from_secs(30));
                },
                SendStep::Disconnect => sends.on_disconnected(),
                SendStep::AdvanceTime(seconds) => now += Duration::from_secs(seconds),
            }
            prop_assert!(sends.in_flight().count() <= in_flight_max);
            prop_assert_eq!(sends.len() + completed, 20);
        }
        if in_flight_max == 1 {
            prop_assert!(accepted.is_sorted());
        }
    }
}
