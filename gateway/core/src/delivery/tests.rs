//! A model test of delivery: a plain model of a log and of the connection to it, a node that
//! executes the decisions of [`RoomReplica`], and clients that check each frame that they receive.

use std::{collections::HashSet, time::Duration};

use proptest::prelude::*;
use skein_protocol::{
    position::{Epoch, Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{
    Entry, ReplicaSnapshot, ServerId,
    cursor::NextDelivery,
    join::{JoinPlan, JoinStart, JoinStep},
    ordinal,
    page::{LogPage, READ_LEN, ReadRange},
    replica::{
        DeliverySink, NextAction, ReadState, ReplicaEntryClass, RetentionContext, RoomReplica,
    },
    ring::RingLimits,
    samples,
};
use crate::telemetry::metrics::ResumeSource;

/// A step of the model.
#[derive(Clone, Debug)]
enum ModelEvent {
    /// Appends this number of messages, whose entries enter the link.
    Append(u8),
    /// Takes this number of entries from the link.
    Deliver(u8),
    /// The link loses its next entry.
    Lose,
    /// The link repeats an earlier entry.
    Repeat(u8),
    /// The link swaps its next two entries.
    Swap,
    /// The node is told that it may have missed entries.
    Resync,
    /// Reads the log in its present state.
    ReadLog,
    /// The page reaches the node.
    ReturnPage,
    /// A client disconnects, or reconnects with its position.
    LeaveOrReturn(u8),
    /// A client takes no more frames, or as many as given.
    Stall(u8),
    Drain(u8, u8),
    /// A new epoch continues the log, after the loss of this number of entries.
    ChangeEpoch(u8),
    /// The whole log is lost.
    Restart,
    /// This number of entries is lost, and others are written under their numbers.
    Fork(u8),
    /// The room is deleted.
    Delete,
    /// This number of the oldest entries is trimmed.
    Trim(u8),
}

/// The log on the server.
struct ModelLog {
    epoch: Epoch,
    former: Option<Position>,
    /// Former epochs, which come back with an older state.
    states: Vec<(Epoch, Option<Position>)>,
    deleted: u64,
    top: Seq,
    /// The highest number that a loss has taken back.
    highest: Seq,
    entries: Vec<Entry>,
    written: u64,
    /// The number of epochs.
    epochs_begun: u64,
    /// Distinguishes histories, as each run of a server has its own id.
    run: u64,
}

impl ModelLog {
    fn append(&mut self, entry: Entry) -> Option<Entry> {
        let id = entry.envelope.id();
        if self.entries.iter().any(|known| known.envelope.id() == id) {
            return None;
        }
        self.top += 1;
        let stamp: ServerId = format!("{:016x}", self.run).parse().unwrap();
        let position = Position::new(self.epoch.clone(), self.top);
        let entry = Entry { position, origin: stamp, envelope: entry.envelope };
        self.entries.push(entry.clone());
        Some(entry)
    }

    fn append_new(&mut self) -> Entry {
        self.written += 1;
        let entry = samples::entry("0-x", self.written);
        self.append(entry).expect("each message has its own id")
    }

    fn lose_tail(&mut self, count: u8) {
        self.highest = self.highest.max(self.top);
        let kept = self.entries.len().saturating_sub(usize::from(count));
        self.top -= (self.entries.len() - kept) as u64;
        self.entries.truncate(kept);
        self.run += 1;
        while self.former.as_ref().is_some_and(|former| former.seq > self.top) {
            let Some((epoch, former)) = self.states.pop() else { break };
            (self.epoch, self.former) = (epoch, former);
        }
    }

    fn begin_epoch(&mut self, former: Option<Position>) {
        self.begin_epoch_above(ordinal(&self.epoch), former);
    }

    fn begin_epoch_above(&mut self, above: u64, former: Option<Position>) {
        self.epochs_begun += 1;
        let epoch = format!("{}-{}", above + 1, self.epochs_begun).parse().unwrap();
        let former = std::mem::replace(&mut self.former, former);
        self.states.push((std::mem::replace(&mut self.epoch, epoch), former));
    }

    fn lose_all(&mut self) {
        (self.top, self.entries) = (0, Vec::new());
        self.run += 1;
        self.begin_epoch(None);
    }

    fn page(&self, range: ReadRange) -> LogPage {
        let entries = match range {
            ReadRange::Newest { limit } => {
                let from = self.entries.len().saturating_sub(limit as usize);
                self.entries[from..].to_vec()
            }
            // Small, so that a read takes several pages.
            ReadRange::After { seq, .. } | ReadRange::Before { seq, .. } => {
                let behind = self.entries.iter().filter(|entry| entry.position.seq > seq);
                behind.take(5).cloned().collect()
            }
        };
        let oldest = self.entries.first().map_or(0, |first| first.position.seq);
        let (former, deleted) = (self.former.clone(), self.deleted);
        LogPage {
            epoch: self.epoch.clone(),
            former,
            deleted,
            generation: 0,
            top: self.top,
            oldest,
            entries,
        }
    }

    /// The restore of a log from a node's snapshot.
    fn restore(&mut self, held: &ReplicaSnapshot) -> Vec<Entry> {
        if ordinal(&held.top.epoch) > ordinal(&self.epoch) {
            self.begin_epoch_above(ordinal(&held.top.epoch), None);
        }
        if held.top.epoch != self.epoch {
            return vec![];
        }
        let at = |seq| self.entries.iter().find(|entry| entry.position.seq == seq);
        let shared =
            |entry: &Entry| at(entry.position.seq).is_some_and(|own| !own.is_same_as(entry));
        if held.entries.iter().any(shared) {
            self.begin_epoch(None);
            return vec![];
        }
        let top = self.top;
        let lost: Vec<_> = held.entries.iter().filter(|e| e.position.seq > top).cloned().collect();
        self.top = self.top.max(held.top.seq);
        self.entries.extend(lost.iter().cloned());
        lost
    }
}

fn after(seq: Seq) -> ReadRange {
    ReadRange::After { seq, limit: READ_LEN }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ModelClientState {
    Live,
    Behind,
    Disconnected,
    /// Reconnected, and its join is not answered yet.
    Joining,
}

/// A client, which checks its frames.
struct ModelClient {
    state: ModelClientState,
    /// The cursor as the node knows it.
    cursor: Position,
    /// The number of frames that it still takes.
    capacity: usize,
    /// The position that it has by the rules of the protocol.
    has: Option<Position>,
    seen: HashSet<Position>,
    received: Vec<Entry>,
    resets: Vec<(Position, RecoveryFailure)>,
    /// Epoch changes that skip nothing.
    epoch_changes: Vec<Position>,
    not_recovered: usize,
    /// The join under way.
    plan: Option<JoinPlan>,
}

impl ModelClient {
    fn new(capacity: usize) -> Self {
        let cursor = samples::position("0-x", 0);
        Self {
            state: ModelClientState::Joining,
            cursor,
            capacity,
            has: None,
            seen: HashSet::new(),
            received: vec![],
            resets: vec![],
            epoch_changes: vec![],
            not_recovered: 0,
            plan: None,
        }
    }

    fn offer(&mut self, entry: &Entry) -> bool {
        if self.capacity == 0 {
            self.state = ModelClientState::Behind;
            return false;
        }
        self.capacity -= 1;
        self.cursor.seq = entry.position.seq;
        assert_eq!(self.cursor, entry.position, "delivered in the epoch of the cursor");
        self.see(entry);
        true
    }

    /// Guarantees 1 and 3: ascending without a gap within an epoch, and nothing twice.
    fn see(&mut self, entry: &Entry) {
        let Position { epoch, seq } = self.has.take().expect("joined before");
        assert_eq!(entry.position, Position::new(epoch, seq + 1), "a gap, or an unsignalled epoch");
        assert!(self.seen.insert(entry.position.clone()), "{} twice", entry.position);
        self.has = Some(entry.position.clone());
        self.received.push(entry.clone());
    }

    fn reset(&mut self, to: &Position, reason: RecoveryFailure) {
        self.cursor = to.clone();
        let had = self.has.replace(to.clone()).expect("joined before");
        assert_ne!(had, *to, "a reset that changes nothing");
        assert!(had.epoch != to.epoch || had.seq < to.seq, "reset from {had} back to {to}");
        self.resets.push((to.clone(), reason));
    }

    fn change_epoch(&mut self, to: &Position) {
        self.reset(to, RecoveryFailure::LogLost);
        self.epoch_changes.push(to.clone());
    }
}

/// A log, a link, a node and clients.
struct DeliveryModel {
    log: ModelLog,
    link: Vec<Entry>,
    /// Entries that have left the link.
    delivered_by_link: Vec<Entry>,
    node: ModelNode,
    /// The action that the node waits for, and the page that it will receive.
    next: NextAction,
    page: Option<LogPage>,
}

struct ModelNode {
    replica: RoomReplica,
    clients: Vec<ModelClient>,
    lost: Vec<Entry>,
    delivered: Vec<Entry>,
    /// The number of times that the log could not be continued.
    restarts: usize,
}

/// Applies the decisions of `RoomReplica` to the clients.
struct RecordingSink<'a> {
    clients: &'a mut Vec<ModelClient>,
    lost: &'a mut Vec<Entry>,
    delivered: &'a mut Vec<Entry>,
    restarts: &'a mut usize,
}

impl DeliverySink for RecordingSink<'_> {
    fn classified(&mut self, _: ReplicaEntryClass) {}

    fn entry(&mut self, entry: &Entry) {
        self.delivered.push(entry.clone());
        for client in
            self.clients.iter_mut().filter(|client| client.state == ModelClientState::Live)
        {
            client.offer(entry);
        }
    }

    fn epoch_changed(&mut self, to: &Position) {
        for client in
            self.clients.iter_mut().filter(|client| client.state == ModelClientState::Live)
        {
            client.change_epoch(to);
        }
    }

    fn reset(&mut self, to: &Position, reason: RecoveryFailure) {
        *self.restarts += 1;
        for client in self.clients.iter_mut() {
            if matches!(client.state, ModelClientState::Live | ModelClientState::Behind) {
                client.reset(to, reason);
                client.state = ModelClientState::Live;
            }
        }
    }

    fn lost(&mut self, entry: &Entry) {
        self.lost.push(entry.clone());
    }
}

fn retention(ring: usize) -> RetentionContext {
    RetentionContext {
        ring: RingLimits { entries: ring, bytes: 1 << 20 },
        ids_for: Duration::from_secs(600),
        entries_for: Duration::from_secs(3600),
        now: samples::now(),
    }
}

impl ModelNode {
    fn parts(&mut self) -> (&mut RoomReplica, RecordingSink<'_>) {
        let Self { replica, clients, lost, delivered, restarts, .. } = self;
        (replica, RecordingSink { clients, lost, delivered, restarts })
    }

    /// Catches up a client.
    fn catch_up(&mut self, client: usize, log: &ModelLog) {
        let client = &mut self.clients[client];
        // Only the first read counts; a log that cannot continue the client leads to a reset.
        while client.state == ModelClientState::Behind {
            let page = match self.replica.next(&client.cursor) {
                NextDelivery::NotBuffered => log.page(after(client.cursor.seq)),
                NextDelivery::Entry(entry) => {
                    if !client.offer(entry) {
                        return;
                    }
                    continue;
                }
                NextDelivery::EpochChange(to) => {
                    client.change_epoch(&to);
                    continue;
                }
                NextDelivery::UpToDate => {
                    client.state = ModelClientState::Live;
                    return;
                }
            };
            if !self.replica.has_epoch_of(&page) {
                return;
            }
            if let Some((to, reason)) = self.replica.gap_after(&page, &client.cursor) {
                client.reset(&to, reason);
            }
            loop {
                match self.replica.next_in_page(&page, &client.cursor) {
                    NextDelivery::Entry(entry) => {
                        if !client.offer(entry) {
                            return;
                        }
                    }
                    NextDelivery::EpochChange(to) => client.change_epoch(&to),
                    NextDelivery::NotBuffered | NextDelivery::UpToDate => break,
                }
            }
        }
    }

    /// Answers a join; `false`: the log must be read first.
    fn join(&mut self, client: usize, log: &ModelLog) -> bool {
        let client = &mut self.clients[client];
        let start = client.has.clone().map_or(JoinStart::Newest(0), JoinStart::Since);
        let plan = client.plan.get_or_insert_with(|| JoinPlan::new(start));
        let mut step = plan.next(&self.replica, true);
        let mut read = None;
        while let JoinStep::Read(range) = step {
            let page = read.insert(log.page(range));
            step = plan.next_with_page(&self.replica, page.clone());
        }
        let JoinStep::Admit(reply) = step else { return false };
        client.plan = None;
        client.not_recovered += usize::from(reply.lost.is_some());
        if reply.resumed.is_none() {
            client.has = Some(reply.at);
        }
        for json in reply.history.iter().filter(|_| reply.resumed.is_some()) {
            let json: serde_json::Value = serde_json::from_str(json.get()).unwrap();
            let seq = json["seq"].as_u64().unwrap();
            let entry = match (&reply.resumed, &read) {
                (Some(ResumeSource::Log), Some(page)) => page.at(seq),
                _ => self.replica.ring().at(seq),
            };
            client.see(entry.unwrap());
        }
        assert_eq!(client.has.as_ref(), Some(&reply.cursor));
        client.cursor = reply.cursor;
        client.state = if self.replica.top() == Some(&client.cursor) {
            ModelClientState::Live
        } else {
            ModelClientState::Behind
        };
        true
    }
}

impl DeliveryModel {
    fn new(ring: usize) -> Self {
        let log = ModelLog {
            epoch: "1-e".parse().unwrap(),
            former: None,
            states: vec![],
            deleted: 0,
            top: 0,
            highest: 0,
            entries: vec![],
            written: 0,
            epochs_begun: 0,
            run: 0,
        };
        let mut replica = RoomReplica::default();
        replica.begin_read();
        let clients = (0..4).map(|_| ModelClient::new(usize::MAX)).collect();
        let (lost, delivered) = (vec![], vec![]);
        let node = ModelNode { replica, clients, lost, delivered, restarts: 0 };
        let (link, delivered_by_link) = (vec![], vec![]);
        let mut model =
            Self { log, link, delivered_by_link, node, next: NextAction::Read, page: None };
        model.settle(ring);
        model
    }

    fn next(&mut self, next: NextAction) {
        if next == NextAction::Nothing {
            return;
        }
        if self.node.replica.read_state() == ReadState::Idle {
            self.node.replica.begin_read();
            self.next = next;
            self.page = None;
        } else {
            self.node.replica.read_again();
        }
    }

    fn deliver(&mut self, ring: usize, count: usize) {
        for entry in self.link.drain(..count.min(self.link.len())).collect::<Vec<_>>() {
            self.delivered_by_link.push(entry.clone());
            let (replica, mut sink) = self.node.parts();
            let next = replica.receive(entry, &retention(ring), &mut sink);
            self.next(next);
        }
    }

    fn read_log(&mut self) {
        if self.next == NextAction::Nothing || self.page.is_some() {
            return;
        }
        if self.next == NextAction::Restore {
            let held = self.node.replica.snapshot(&"r".parse().unwrap(), &retention(9)).unwrap();
            let received = self.log.restore(&held);
            self.link.extend(received);
        }
        self.page = Some(self.log.page(self.node.replica.next_read()));
    }

    fn return_page(&mut self, ring: usize) {
        let Some(page) = self.page.take() else { return };
        self.next = NextAction::Nothing;
        let (replica, mut sink) = self.node.parts();
        let next = replica.apply_page(page, &retention(ring), &mut sink);
        self.next(next);
        for lost in std::mem::take(&mut self.node.lost) {
            self.link.extend(self.log.append(lost));
        }
        for client in 0..self.node.clients.len() {
            self.node.catch_up(client, &self.log);
        }
        self.joins();
    }

    fn joins(&mut self) {
        for client in 0..self.node.clients.len() {
            if self.node.clients[client].state == ModelClientState::Joining
                && self.node.replica.read_state() == ReadState::Idle
            {
                if self.node.join(client, &self.log) {
                    self.node.catch_up(client, &self.log);
                } else {
                    self.next(NextAction::Read);
                }
            }
        }
    }

    /// Everything under way arrives, and all clients reconnect and take everything.
    fn settle(&mut self, ring: usize) {
        for _ in 0..1000 {
            self.deliver(ring, usize::MAX);
            let head = Position::new(self.log.epoch.clone(), self.log.top);
            if self.next == NextAction::Nothing && !self.node.replica.has_reached(Some(&head)) {
                self.next(NextAction::Read);
            }
            self.read_log();
            self.return_page(ring);
            for client in 0..self.node.clients.len() {
                self.node.clients[client].capacity = usize::MAX;
                if self.node.clients[client].state == ModelClientState::Disconnected {
                    self.node.clients[client].state = ModelClientState::Joining;
                }
                self.node.catch_up(client, &self.log);
            }
            self.joins();
            if self.next == NextAction::Nothing
                && self.link.is_empty()
                && self.node.replica.has_reached(Some(&head))
            {
                return;
            }
        }
        panic!("never at rest");
    }

    fn take(&mut self, event: &ModelEvent, ring: usize) {
        match *event {
            ModelEvent::Append(count) => {
                for _ in 0..count {
                    let entry = self.log.append_new();
                    self.link.push(entry);
                }
            }
            ModelEvent::Deliver(count) => self.deliver(ring, usize::from(count)),
            ModelEvent::Lose => drop(self.link.drain(..self.link.len().min(1))),
            ModelEvent::Repeat(back) => {
                let at = self.delivered_by_link.len().checked_sub(usize::from(back) + 1);
                if let Some(entry) = at.map(|at| self.delivered_by_link[at].clone()) {
                    self.link.insert(0, entry);
                }
            }
            ModelEvent::Swap if self.link.len() > 1 => self.link.swap(0, 1),
            ModelEvent::Swap => {}
            ModelEvent::Resync => self.next(NextAction::Read),
            ModelEvent::ReadLog => self.read_log(),
            ModelEvent::ReturnPage => self.return_page(ring),
            ModelEvent::LeaveOrReturn(client) => {
                let client = &mut self.node.clients[usize::from(client) % 4];
                client.plan = None;
                client.state = match client.state {
                    ModelClientState::Disconnected => ModelClientState::Joining,
                    _ => ModelClientState::Disconnected,
                };
                self.joins();
            }
            ModelEvent::Stall(client) => self.node.clients[usize::from(client) % 4].capacity = 0,
            ModelEvent::Drain(client, frames) => {
                let client = usize::from(client) % 4;
                self.node.clients[client].capacity = usize::from(frames);
                self.node.catch_up(client, &self.log);
            }
            ModelEvent::ChangeEpoch(lost) => {
                if lost > 0 {
                    self.log.lose_tail(lost);
                }
                let former = Position::new(self.log.epoch.clone(), self.log.top);
                self.log.begin_epoch(Some(former));
            }
            ModelEvent::Restart => self.log.lose_all(),
            ModelEvent::Fork(lost) => {
                self.log.lose_tail(lost);
                // Beyond all numbers ever received, so that the fork shows: earlier losses may be
                // undetected. A log that ends below the replica is detected when servers change.
                loop {
                    self.take(&ModelEvent::Append(1), ring);
                    if self.log.top > self.log.highest {
                        break;
                    }
                }
            }
            ModelEvent::Delete => {
                self.log.lose_all();
                self.log.deleted = ordinal(&self.log.epoch);
            }
            ModelEvent::Trim(count) => {
                let count = usize::from(count).min(self.log.entries.len());
                self.log.entries.drain(..count);
            }
        }
    }

    fn run(ring: usize, events: &[ModelEvent]) -> Self {
        let mut model = Self::new(ring);
        for event in events {
            model.take(event, ring);
        }
        model.settle(ring);
        let head = Position::new(model.log.epoch.clone(), model.log.top);
        for client in &model.node.clients {
            assert_eq!(client.has.as_ref(), Some(&head), "not at the end of the log");
            for to in &client.epoch_changes {
                let skipped = |at: &Position| at.epoch == to.epoch && at.seq <= to.seq;
                let skips = model.log.entries.iter().any(|entry| skipped(&entry.position));
                assert!(!skips, "entries of {to} and before were skipped");
            }
        }
        model
    }

    fn ids(&self) -> HashSet<skein_protocol::ids::MessageId> {
        self.log.entries.iter().map(|entry| entry.envelope.id()).collect()
    }
}

/// Steps of a link and of clients, with a log that loses nothing.
fn mild() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        4 => (1_u8..6).prop_map(ModelEvent::Append),
        6 => (1_u8..8).prop_map(ModelEvent::Deliver),
        1 => Just(ModelEvent::Lose),
        1 => (0_u8..6).prop_map(ModelEvent::Repeat),
        1 => Just(ModelEvent::Swap),
        1 => Just(ModelEvent::Resync),
        4 => Just(ModelEvent::ReadLog),
        4 => Just(ModelEvent::ReturnPage),
        2 => (0_u8..4).prop_map(ModelEvent::LeaveOrReturn),
        1 => (0_u8..4).prop_map(ModelEvent::Stall),
        2 => (0_u8..4, 0_u8..6).prop_map(|(client, frames)| ModelEvent::Drain(client, frames)),
    ]
}

/// As `mild`, with a log that continues in new epochs.
fn soft() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![20 => mild(), 1 => Just(ModelEvent::ChangeEpoch(0))]
}

/// Steps in which a log loses entries.
fn hard() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        (1_u8..8).prop_map(ModelEvent::ChangeEpoch),
        Just(ModelEvent::Restart),
        (1_u8..8).prop_map(ModelEvent::Fork),
    ]
}

/// All steps.
fn any_event() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        20 => soft(),
        1 => hard(),
        1 => Just(ModelEvent::Delete),
        1 => (1_u8..20).prop_map(ModelEvent::Trim),
    ]
}

fn many(event: impl Strategy<Value = ModelEvent>) -> impl Strategy<Value = Vec<ModelEvent>> {
    proptest::collection::vec(event, 0..120)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn ring_restores_entries_lost_before_an_epoch_change() {
    let mut model = DeliveryModel::new(4);
    model.take(&ModelEvent::Append(10), 4);
    model.deliver(4, 10);
    let delivered = model.node.delivered.clone();
    // The ring shares no entry with the log that is left.
    model.take(&ModelEvent::ChangeEpoch(5), 4);
    model.take(&ModelEvent::Append(2), 4);
    model.settle(4);
    let ids = model.ids();
    let back: Vec<_> = delivered.iter().map(|entry| ids.contains(&entry.envelope.id())).collect();
    assert_eq!(delivered.len(), 10);
    assert_eq!(back[6..], [true; 4], "{back:?}");
}

#[test]
fn read_older_than_received_entries_changes_nothing() {
    let mut model = DeliveryModel::new(256);
    model.take(&ModelEvent::Append(3), 256);
    let old = model.log.page(after(0));
    model.take(&ModelEvent::Append(3), 256);
    model.deliver(256, 6);
    model.next(NextAction::Read);
    model.page = Some(old);
    model.return_page(256);
    assert_eq!(model.next, NextAction::Nothing);
    assert_eq!((model.node.restarts, model.node.delivered.len()), (0, 6));
}

/// A member that checks the order of entries, once the replica was read.
#[derive(Default)]
struct OrderSink(Option<Position>);

impl DeliverySink for OrderSink {
    fn classified(&mut self, _: ReplicaEntryClass) {}

    fn entry(&mut self, entry: &Entry) {
        if let Some(Position { epoch, seq }) = &self.0 {
            assert_eq!(entry.position, Position::new(epoch.clone(), seq + 1));
            self.0 = Some(entry.position.clone());
        }
    }

    fn epoch_changed(&mut self, to: &Position) {
        self.0 = self.0.take().map(|_| to.clone());
    }

    fn reset(&mut self, to: &Position, _: RecoveryFailure) {
        self.0 = self.0.take().map(|_| to.clone());
    }

    fn lost(&mut self, _: &Entry) {}
}

/// Any position, of few epochs and numbers.
fn any_position() -> impl Strategy<Value = Position> {
    let epoch = prop_oneof![Just("0-x"), Just("1-e"), Just("1-f"), Just("2-g")];
    (epoch, 1_u64..12).prop_map(|(epoch, seq)| samples::position(epoch, seq))
}

/// Any entry, of few servers.
fn any_entry() -> impl Strategy<Value = Entry> {
    (any_position(), 0_u64..2).prop_map(|(position, run)| {
        let origin = format!("{run:016x}").parse().unwrap();
        Entry { origin, ..samples::entry(position.epoch.as_str(), position.seq) }
    })
}

/// Any page, in order or not.
fn any_page() -> impl Strategy<Value = LogPage> {
    let entries = prop_oneof![
        proptest::collection::vec(any_entry(), 0..8),
        (any_entry(), 0_u64..8).prop_map(|(first, more)| {
            let Position { epoch, seq } = &first.position;
            (*seq..=seq + more).map(|seq| samples::entry(epoch.as_str(), seq)).collect()
        }),
    ];
    let numbers = (0_u64..3, 0_u64..14, 0_u64..14);
    (any_position(), proptest::option::of(any_position()), numbers, entries).prop_map(
        |(at, former, (deleted, top, oldest), entries)| LogPage {
            epoch: at.epoch,
            former,
            deleted,
            generation: 0,
            top,
            oldest,
            entries,
        },
    )
}

proptest! {
    #![proptest_config(config())]

    /// The invariants that are asserted in production hold for any log.
    #[test]
    fn no_log_breaks_the_order(
        inputs in proptest::collection::vec(
            (proptest::option::of(any_page()), any_entry(), any_position()),
            0..40,
        ),
    ) {
        let (mut replica, mut sink) = (RoomReplica::default(), OrderSink::default());
        for (page, entry, cursor) in inputs {
            let Some(mut page) = page else {
                let _ = replica.receive(entry, &retention(4), &mut sink);
                continue;
            };
            replica.begin_read();
            let _ = replica.apply_page(page.clone(), &retention(4), &mut sink);
            prop_assert!(sink.0.is_none() || sink.0.as_ref() == replica.top());
            sink.0 = replica.top().cloned();
            let _ = JoinPlan::new(JoinStart::Since(cursor.clone())).next(&replica, true);
            let _ = JoinPlan::new(JoinStart::Since(cursor.clone()))
                .next_with_page(&replica, page.clone());
            page.keep_contiguous();
            let mut cursor = Some(cursor)
                .filter(|cursor| replica.top().is_some_and(|top| cursor.seq < top.seq));
            while let Some(at) = &mut cursor {
                match replica.next_in_page(&page, at) {
                    NextDelivery::Entry(entry) => {
                        let next = Position::new(at.epoch.clone(), at.seq + 1);
                        assert_eq!(entry.position, next);
                        *at = next;
                    }
                    NextDelivery::EpochChange(to) => {
                        assert_ne!(*at, to);
                        *at = to;
                    }
                    NextDelivery::NotBuffered | NextDelivery::UpToDate => cursor = None,
                }
            }
        }
    }

    /// The clients themselves check order, gaps, repeats and signals.
    #[test]
    fn members_see_entries_in_order_without_gaps(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(any_event()),
    ) {
        DeliveryModel::run(ring, &events);
    }

    #[test]
    fn clients_notice_nothing_of_a_faulty_link(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(mild()),
    ) {
        let model = DeliveryModel::run(ring, &events);
        for client in &model.node.clients {
            prop_assert_eq!(&client.received, &model.log.entries);
            prop_assert!(client.resets.is_empty() && client.not_recovered == 0);
        }
    }

    /// Each epoch change is delivered at its place, and nothing is skipped, unless the node missed
    /// a whole epoch.
    #[test]
    fn continued_epoch_skips_nothing(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(soft()),
    ) {
        let model = DeliveryModel::run(ring, &events);
        let is_change = |event: &&ModelEvent| matches!(event, ModelEvent::ChangeEpoch(_));
        let epoch_changes = events.iter().filter(is_change).count();
        prop_assert!(model.node.restarts == 0 || epoch_changes > 1);
        let clients = model.node.clients.iter().filter(|client| client.not_recovered == 0);
        for client in clients.filter(|_| model.node.restarts == 0) {
            prop_assert_eq!(&client.received, &model.log.entries);
            // A client that was behind receives no change to an epoch without entries.
            prop_assert!((epoch_changes.min(1)..=epoch_changes).contains(&client.resets.len()));
        }
        let clients = model.node.clients.iter();
        let not_recovered = clients.map(|client| client.not_recovered).sum::<usize>();
        prop_assert!(epoch_changes > 1 || not_recovered == 0);
    }

    /// Delivered entries that the log then lost are appended again, in order.
    #[test]
    fn entries_lost_by_the_log_are_appended_again(
        before in many(mild()),
        loss in hard(),
        after in many(mild()),
    ) {
        let mut model = DeliveryModel::new(256);
        for event in &before {
            model.take(event, 256);
        }
        let delivered = model.node.delivered.clone();
        model.take(&loss, 256);
        for event in &after {
            model.take(event, 256);
        }
        model.settle(256);
        let ids = model.ids();
        for entry in &delivered {
            prop_assert!(ids.contains(&entry.envelope.id()), "{} is lost", entry.position);
        }
    }

    #[test]
    fn deleted_entries_are_not_restored(
        before in many(mild()),
        after in many(soft()),
    ) {
        let mut model = DeliveryModel::new(256);
        for event in &before {
            model.take(event, 256);
        }
        let deleted = model.log.written;
        model.take(&ModelEvent::Delete, 256);
        for event in &after {
            model.take(event, 256);
        }
        model.settle(256);
        let is_deleted = |entry: &Entry| entry.envelope.id().0.as_u128() <= u128::from(deleted);
        prop_assert!(!model.log.entries.iter().any(is_deleted));
    }
}
