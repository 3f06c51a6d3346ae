//! What members of a room see, whatever its log and the link to it do: against a plain model of a
//! log, a node that does what [`RoomReplica`] says, and clients that check each frame.

use std::{collections::HashSet, time::Duration};

use proptest::prelude::*;
use skein_protocol::{
    position::{Epoch, Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{
    Entry, ReplicaSnapshot, ServerId,
    cursor::{self, NextDelivery, Resume},
    ordinal,
    page::LogPage,
    reconcile::{READ_LEN, ReadFrom},
    replica::{
        DeliverySink, NextAction, ReadState, ReplicaEntryClass, RetentionContext, RoomReplica,
    },
    ring::RingLimits,
    samples,
};

/// What happens.
#[derive(Clone, Debug)]
enum ModelEvent {
    /// So many messages are appended, and their entries enter the link.
    Append(u8),
    /// So many entries leave the link.
    Deliver(u8),
    /// The link loses its next entry.
    Lose,
    /// The link repeats an entry of those it had.
    Repeat(u8),
    /// The link changes the order of its next two.
    Swap,
    /// The node is told that it may have missed something.
    Resync,
    /// The log is read as it is now.
    ReadLog,
    /// What was read arrives at the node.
    ReturnPage,
    /// A client leaves, or comes back with what it has.
    LeaveOrReturn(u8),
    /// A client takes frames no more, or so many.
    Stall(u8),
    Drain(u8, u8),
    /// A new epoch continues the log. So many entries were lost first.
    ChangeEpoch(u8),
    /// The log is lost as a whole.
    Restart,
    /// So many entries are lost, and more are written under their numbers.
    Fork(u8),
    /// The room is deleted.
    Delete,
    /// So many of the oldest entries go.
    Trim(u8),
}

/// The log, as a server has it.
struct ModelLog {
    epoch: Epoch,
    former: Option<Position>,
    /// Epochs, and what was former to them, that come back with an older state.
    states: Vec<(Epoch, Option<Position>)>,
    deleted: u64,
    top: Seq,
    /// The highest number that a loss has taken back.
    highest: Seq,
    entries: Vec<Entry>,
    written: u64,
    /// How many epochs there were.
    begun: u64,
    /// Another number for each history, as each run of a server has its own.
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
        self.append(entry).expect("each message has an id of its own")
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
        self.begun += 1;
        let epoch = format!("{}-{}", above + 1, self.begun).parse().unwrap();
        let former = std::mem::replace(&mut self.former, former);
        self.states.push((std::mem::replace(&mut self.epoch, epoch), former));
    }

    fn lose_all(&mut self) {
        (self.top, self.entries) = (0, Vec::new());
        self.run += 1;
        self.begin_epoch(None);
    }

    fn page(&self, part: ReadFrom) -> LogPage {
        let entries = match part {
            ReadFrom::Newest => {
                let from = self.entries.len().saturating_sub(READ_LEN as usize);
                self.entries[from..].to_vec()
            }
            // Small, so that what is read comes in several pages.
            ReadFrom::After(seq) => {
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

    /// As a server does it that is given what a node holds.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ModelClientState {
    Live,
    Behind,
    Away,
    /// It is back, and waits for its join to be answered.
    Joining,
}

/// A client, which checks what it is given.
struct ModelClient {
    state: ModelClientState,
    /// What the node takes for its cursor.
    cursor: Position,
    /// How many more frames it takes.
    room: usize,
    /// What it has, by the rules of the protocol.
    has: Option<Position>,
    seen: HashSet<Position>,
    given: Vec<Entry>,
    resets: Vec<(Position, RecoveryFailure)>,
    /// Those that skip nothing.
    epoch_changes: Vec<Position>,
    not_recovered: usize,
}

impl ModelClient {
    fn new(room: usize) -> Self {
        let cursor = samples::position("0-x", 0);
        Self {
            state: ModelClientState::Joining,
            cursor,
            room,
            has: None,
            seen: HashSet::new(),
            given: vec![],
            resets: vec![],
            epoch_changes: vec![],
            not_recovered: 0,
        }
    }

    fn offer(&mut self, entry: &Entry) -> bool {
        if self.room == 0 {
            self.state = ModelClientState::Behind;
            return false;
        }
        self.room -= 1;
        self.cursor.seq = entry.position.seq;
        assert_eq!(self.cursor, entry.position, "served in the epoch it is in");
        self.see(entry);
        true
    }

    /// Promises 1 and 3: ascending without a hole within an epoch, and nothing twice.
    fn see(&mut self, entry: &Entry) {
        let Position { epoch, seq } = self.has.take().expect("joined before");
        assert_eq!(entry.position, Position::new(epoch, seq + 1), "a hole, or unannounced");
        assert!(self.seen.insert(entry.position.clone()), "{} twice", entry.position);
        self.has = Some(entry.position.clone());
        self.given.push(entry.clone());
    }

    fn reset(&mut self, to: &Position, reason: RecoveryFailure) {
        self.cursor = to.clone();
        let had = self.has.replace(to.clone()).expect("joined before");
        assert_ne!(had, *to, "a reset that changes nothing");
        assert!(had.epoch != to.epoch || had.seq < to.seq, "{had} back to {to}");
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
    /// Entries that left the link.
    delivered_by_link: Vec<Entry>,
    node: ModelNode,
    /// What the node waits for, and what it will be told.
    next: NextAction,
    page: Option<LogPage>,
}

struct ModelNode {
    replica: RoomReplica,
    clients: Vec<ModelClient>,
    lost: Vec<Entry>,
    delivered: Vec<Entry>,
    /// How often nothing could be continued.
    restarts: usize,
    refreshed: bool,
}

/// What `RoomReplica` says is done to the clients.
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

    /// Gives a client what there is for it.
    fn catch_up(&mut self, client: usize, log: &ModelLog) {
        let client = &mut self.clients[client];
        // Only the first read counts as such; what the log does not go on for is a reset.
        while client.state == ModelClientState::Behind {
            let page = match self.replica.next(&client.cursor) {
                NextDelivery::NotBuffered => log.page(ReadFrom::After(client.cursor.seq)),
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

    /// Answers a join; `false`: the log is to be read first.
    fn join(&mut self, client: usize, log: &ModelLog) -> bool {
        let Some(top) = self.replica.top().cloned() else { return false };
        let client = &mut self.clients[client];
        let Some(since) = client.has.clone() else {
            (client.has, client.cursor, client.state) =
                (Some(top.clone()), top, ModelClientState::Live);
            return true;
        };
        let lost = |client: &mut ModelClient| {
            client.not_recovered += 1;
            (client.has, client.cursor, client.state) =
                (Some(top.clone()), top.clone(), ModelClientState::Live);
            true
        };
        let until = match self.replica.resume(&since) {
            Resume::Until(until) => until,
            Resume::Unknown(_) if !self.refreshed => return false,
            Resume::Unknown(_) => return lost(client),
        };
        let entries = match self.replica.ring().after(since.seq) {
            Some(entries) => cursor::within_epoch(entries, &since, until.seq),
            None if since.seq == top.seq => Some(vec![]),
            None => {
                let mut page = log.page(ReadFrom::After(since.seq));
                if !self.replica.has_epoch_of(&page) {
                    return false;
                }
                page.keep_whole();
                page.entries.retain(|entry| entry.position.seq <= top.seq);
                if page.continues(since.seq).is_err() {
                    return lost(client);
                }
                cursor::within_epoch(page.entries.iter(), &since, until.seq)
            }
        };
        let Some(entries) = entries else { return lost(client) };
        client.cursor = since;
        for entry in entries.iter().take(3) {
            client.see(entry);
            client.cursor = entry.position.clone();
        }
        client.state =
            if client.cursor == top { ModelClientState::Live } else { ModelClientState::Behind };
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
            begun: 0,
            run: 0,
        };
        let mut replica = RoomReplica::default();
        replica.begin_read();
        let clients = (0..4).map(|_| ModelClient::new(usize::MAX)).collect();
        let (lost, delivered) = (vec![], vec![]);
        let node = ModelNode { replica, clients, lost, delivered, restarts: 0, refreshed: false };
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
            let given = self.log.restore(&held);
            self.link.extend(given);
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
        self.node.refreshed = true;
        for client in 0..self.node.clients.len() {
            self.node.catch_up(client, &self.log);
        }
        self.joins();
        self.node.refreshed = false;
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

    /// All that is on its way arrives, and all clients come back and take everything.
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
                self.node.clients[client].room = usize::MAX;
                if self.node.clients[client].state == ModelClientState::Away {
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
                client.state = match client.state {
                    ModelClientState::Away => ModelClientState::Joining,
                    _ => ModelClientState::Away,
                };
                self.joins();
            }
            ModelEvent::Stall(client) => self.node.clients[usize::from(client) % 4].room = 0,
            ModelEvent::Drain(client, frames) => {
                let client = usize::from(client) % 4;
                self.node.clients[client].room = usize::from(frames);
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
                // Beyond all that was ever heard, so that it shows: losses before this one may have
                // gone unnoticed. That a log ends below what is held is found when servers change.
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

/// What a link and clients do, and a log that loses nothing.
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

/// The same, and a log that goes on in new epochs.
fn soft() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![20 => mild(), 1 => Just(ModelEvent::ChangeEpoch(0))]
}

/// A log that loses something.
fn hard() -> impl Strategy<Value = ModelEvent> {
    prop_oneof![
        (1_u8..8).prop_map(ModelEvent::ChangeEpoch),
        Just(ModelEvent::Restart),
        (1_u8..8).prop_map(ModelEvent::Fork),
    ]
}

/// Everything.
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
fn what_was_lost_behind_the_end_of_an_epoch_is_brought_back_as_far_as_the_ring_goes() {
    let mut model = DeliveryModel::new(4);
    model.take(&ModelEvent::Append(10), 4);
    model.deliver(4, 10);
    let delivered = model.node.delivered.clone();
    // The ring has nothing in common with what is left.
    model.take(&ModelEvent::ChangeEpoch(5), 4);
    model.take(&ModelEvent::Append(2), 4);
    model.settle(4);
    let ids = model.ids();
    let back: Vec<_> = delivered.iter().map(|entry| ids.contains(&entry.envelope.id())).collect();
    assert_eq!(delivered.len(), 10);
    assert_eq!(back[6..], [true; 4], "{back:?}");
}

#[test]
fn a_read_that_is_older_than_what_arrived_changes_nothing() {
    let mut model = DeliveryModel::new(256);
    model.take(&ModelEvent::Append(3), 256);
    let old = model.log.page(ReadFrom::After(0));
    model.take(&ModelEvent::Append(3), 256);
    model.deliver(256, 6);
    model.next(NextAction::Read);
    model.page = Some(old);
    model.return_page(256);
    assert_eq!(model.next, NextAction::Nothing);
    assert_eq!((model.node.restarts, model.node.delivered.len()), (0, 6));
}

proptest! {
    #![proptest_config(config())]

    /// The clients check order, holes, repeats and announcements themselves.
    #[test]
    fn whatever_happens_each_member_sees_order_without_holes(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(any_event()),
    ) {
        DeliveryModel::run(ring, &events);
    }

    #[test]
    fn a_bad_link_alone_is_never_noticed(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(mild()),
    ) {
        let model = DeliveryModel::run(ring, &events);
        for client in &model.node.clients {
            prop_assert_eq!(&client.given, &model.log.entries);
            prop_assert!(client.resets.is_empty() && client.not_recovered == 0);
        }
    }

    /// Each epoch is told of at its place, and nothing is skipped, unless the node missed a whole
    /// epoch.
    #[test]
    fn nothing_is_skipped_where_an_epoch_continues_the_one_before(
        ring in prop_oneof![Just(1_usize), Just(4), Just(256)],
        events in many(soft()),
    ) {
        let model = DeliveryModel::run(ring, &events);
        let bumps = events.iter().filter(|event| matches!(event, ModelEvent::ChangeEpoch(_))).count();
        prop_assert!(model.node.restarts == 0 || bumps > 1);
        let clients = model.node.clients.iter().filter(|client| client.not_recovered == 0);
        for client in clients.filter(|_| model.node.restarts == 0) {
            prop_assert_eq!(&client.given, &model.log.entries);
            // One who was behind is not told of an epoch in which nothing was said.
            prop_assert!((bumps.min(1)..=bumps).contains(&client.resets.len()));
        }
        let clients = model.node.clients.iter();
        prop_assert!(bumps > 1 || clients.map(|client| client.not_recovered).sum::<usize>() == 0);
    }

    /// What was passed on and then lost by the log is appended again, in its order.
    #[test]
    fn what_a_log_has_lost_is_brought_back(
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
    fn what_was_deleted_is_not_brought_back(
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
