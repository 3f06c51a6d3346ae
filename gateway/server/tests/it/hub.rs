//! The hub over a link that drops, repeats and reorders: members receive every entry once, in
//! order.
//!
//! The log is the memory bus; its entries pass a link with seeded faults before they reach the hub,
//! which detects gaps by the numbers and reads the log.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_core::{
    bus::{
        Append, Appended, BoxFuture, Bus, BusError, Mailboxes, ReadRange, Retention, ShardMessage,
        memory::MemoryBus, ticket::PublishTicket,
    },
    connection::{handle::ConnectionHandle, outbox::Outbox, signals::Signal},
    delivery::{Entry, ReplicaSnapshot, ServerId, join::JoinStart, page::LogPage},
    drain::Tasks,
    hub::{COMPARE_INTERVAL, Hub, LINGER},
    telemetry::metrics::{EntryResult, Metrics},
};
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId},
    position::{Position, Seq},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use crate::harness::{self, hub_options, room, start_hub};

struct HubFixture {
    bus: Arc<dyn Bus>,
    hub: Hub,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    /// Towards the hub.
    mailboxes: Mailboxes,
    /// The number of log reads.
    reads: Arc<AtomicUsize>,
}

impl HubFixture {
    /// Starts a hub behind a link that applies `fault` to each entry.
    fn start(
        retention: Retention,
        mailbox_len: usize,
        fault: impl FnMut() -> Fault + Send + 'static,
    ) -> Self {
        let tasks = Tasks::default();
        let bus = |mailboxes| -> Arc<dyn Bus> {
            Arc::new(MemoryBus::start(
                retention,
                &Default::default(),
                &Default::default(),
                mailboxes,
                &tasks,
            ))
        };
        Self::over(bus, tasks.clone(), mailbox_len, fault)
    }

    fn over(
        bus: impl FnOnce(Mailboxes) -> Arc<dyn Bus>,
        tasks: Tasks,
        mailbox_len: usize,
        mut fault: impl FnMut() -> Fault + Send + 'static,
    ) -> Self {
        let metrics = Arc::new(Metrics::new());
        let (before, mut ends) = Mailboxes::new(1, 100_000, metrics.clone());
        let (mailboxes, letters) = Mailboxes::new(1, mailbox_len, metrics.clone());
        let reads = Arc::default();
        let bus: Arc<dyn Bus> = Arc::new(ReadCountingBus(bus(before), Arc::clone(&reads)));
        let after = mailboxes.clone();
        let mut link = ends.remove(0).messages;
        tokio::spawn(async move {
            let mut late = None;
            while let Some(letter) = link.recv().await {
                let ShardMessage::Entry(room, entry) = letter else { continue };
                match fault() {
                    Fault::None => after.send_entry(room, entry),
                    Fault::Drop => {}
                    Fault::Repeat => {
                        after.send_entry(room.clone(), entry.clone());
                        after.send_entry(room, entry);
                    }
                    Fault::Late => late = Some((room, entry)),
                }
                if let Some((room, entry)) = late.take_if(|_| fault() != Fault::Late) {
                    after.send_entry(room, entry);
                }
            }
        });
        let hub = start_hub(&bus, mailboxes.clone(), letters, &metrics, &tasks);
        Self { bus, hub, tasks, metrics, mailboxes, reads }
    }

    /// Advances the clock until every shard is synced.
    async fn until_synced(&self) {
        for _ in 0..YIELDS_MAX {
            if self.mailboxes.all_synced() {
                return;
            }
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        panic!("not synced");
    }

    fn publish(&self, room: &RoomId) {
        self.bus.append(Append {
            room: room.clone(),
            envelope: envelope(),
            urgent: false,
            unseen: Default::default(),
            deadline: Instant::now() + Duration::from_secs(5),
            ticket: PublishTicket::new(|result| assert!(result.is_ok())),
        });
    }
}

/// A message with an id of its own.
fn envelope() -> Envelope {
    Envelope::pack(EnvelopeParts {
        frame: Default::default(),
        author: AuthorHash::of(&"ann".parse().unwrap()),
        id: MessageId::random(),
        sender: ConnectionId::random(),
        echo: true,
        fields: r#""room":"r","content":"xxxxxxxxxxxxxxxx""#,
        binary_payload: None,
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Drop,
    Repeat,
    Late,
}

/// How often a test yields before it stops waiting: the clock is paused.
const YIELDS_MAX: usize = 100_000;

/// A bus that counts reads.
struct ReadCountingBus(Arc<dyn Bus>, Arc<AtomicUsize>);

impl Bus for ReadCountingBus {
    fn append(&self, append: Append) {
        self.0.append(append);
    }

    fn subscribe(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.0.subscribe(room)
    }

    fn unsubscribe(&self, room: RoomId) {
        self.0.unsubscribe(room);
    }

    fn read(&self, room: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.read(room, range)
    }

    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        self.0.heads(rooms)
    }

    fn delete(&self, room: RoomId) -> BoxFuture<Result<(), BusError>> {
        self.0.delete(room)
    }

    fn restore(&self, held: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>> {
        self.0.restore(held)
    }

    fn failed_check(&self) -> Option<&'static str> {
        self.0.failed_check()
    }
}

/// A member whose outbox the test reads.
struct Member {
    handle: Arc<ConnectionHandle>,
    cursor: Position,
    resets: usize,
    recovered: bool,
    closed: bool,
}

impl Member {
    async fn join(fixture: &HubFixture, room: &RoomId, start: JoinStart, bytes_max: usize) -> Self {
        let outbox = Outbox::to_owner(bytes_max, fixture.metrics.clone());
        let handle = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
        let entered = Default::default();
        fixture.hub.join(room.clone(), handle.clone(), None, start, entered).await.unwrap();
        let mut frames = handle.outbox.take();
        let joined = json(&frames.remove(0));
        assert_eq!(joined["type"], "joined");
        let epoch = joined["epoch"].as_str().unwrap().parse().unwrap();
        let recovered = joined["recovered"].as_bool().unwrap();
        let cursor = Position::new(epoch, 0);
        let mut member = Self { handle, cursor, resets: 0, recovered, closed: false };
        member.cursor.seq = match joined["history"].as_array().unwrap().last() {
            Some(last) => last["seq"].as_u64().unwrap(),
            None => joined["seq"].as_u64().unwrap(),
        };
        member.note(frames);
        member
    }

    fn note(&mut self, frames: Vec<bytes::Bytes>) {
        for frame in frames {
            let frame = json(&frame);
            if frame["type"] == "room_closed" {
                self.closed = true;
                continue;
            }
            let seq = frame["seq"].as_u64().unwrap();
            match frame["type"].as_str().unwrap() {
                "message" => {
                    assert_eq!(seq, self.cursor.seq + 1, "a gap or a duplicate: {frame}");
                    assert_eq!(frame["epoch"], self.cursor.epoch.as_str());
                    self.cursor.seq = seq;
                }
                "reset" => {
                    self.resets += 1;
                    let epoch = frame["epoch"].as_str().unwrap().parse().unwrap();
                    self.cursor = Position::new(epoch, seq);
                }
                other => panic!("{other}"),
            }
        }
    }

    /// Takes the queued frames, checks their order, and requests catch-up if the member is behind.
    async fn drain(&mut self, fixture: &HubFixture) {
        self.note(self.handle.outbox.take());
        for signal in self.handle.outbox.take_signals() {
            let Signal::CatchUp(room) = signal else { panic!("{signal:?}") };
            fixture.hub.catch_up(room, self.handle.connection).await;
        }
    }

    async fn reach(&mut self, fixture: &HubFixture, seq: Seq) {
        for _ in 0..YIELDS_MAX {
            if self.cursor.seq >= seq {
                break;
            }
            self.drain(fixture).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(self.cursor.seq, seq);
    }

    async fn reach_reset(&mut self, fixture: &HubFixture) {
        let before = self.resets;
        for _ in 0..YIELDS_MAX {
            if self.resets > before {
                return;
            }
            self.drain(fixture).await;
            tokio::task::yield_now().await;
        }
        panic!("no reset");
    }
}

/// A bus over one log that can lose entries, as a Redis server that restarts without some of its
/// data.
#[derive(Clone)]
struct LossyBus {
    log: Arc<Mutex<LossyLog>>,
    mailboxes: Mailboxes,
    /// Results of log reads wait here.
    gate: Arc<Semaphore>,
}

/// The number of concurrent log reads of a [`LossyBus`].
const READS_MAX: u32 = 1000;

struct LossyLog {
    ordinal: u64,
    former: Option<Position>,
    entries: Vec<Entry>,
}

impl LossyLog {
    fn head(&self) -> Position {
        let epoch = format!("{}-fragile", self.ordinal).parse().unwrap();
        Position::new(epoch, self.entries.len() as u64)
    }
}

impl LossyBus {
    fn new(mailboxes: Mailboxes) -> Self {
        let log = LossyLog { ordinal: 1, former: None, entries: vec![] };
        let gate = Arc::new(Semaphore::new(READS_MAX as usize));
        Self { log: Arc::new(Mutex::new(log)), mailboxes, gate }
    }

    /// Delays the results of log reads until the permit is dropped.
    async fn hold_up_reads(&self) -> OwnedSemaphorePermit {
        self.gate.clone().acquire_many_owned(READS_MAX).await.unwrap()
    }

    /// Replaces the newest entries with others that the hub does not receive.
    fn replace(&self, lost: usize, others: usize) {
        let mut log = self.log.lock();
        let kept = log.entries.len() - lost;
        log.entries.truncate(kept);
        for _ in 0..others {
            let head = log.head();
            let position = Position::new(head.epoch, head.seq + 1);
            let entry = Entry { position, origin: ServerId::default(), envelope: envelope() };
            log.entries.push(entry);
        }
    }

    /// Loses the newest entries and continues in a new epoch.
    fn continue_without(&self, lost: usize) {
        let mut log = self.log.lock();
        let kept = log.entries.len() - lost;
        log.entries.truncate(kept);
        log.former = Some(log.head());
        log.ordinal += 1;
    }

    fn ids(&self) -> Vec<MessageId> {
        self.log.lock().entries.iter().map(|entry| entry.envelope.id()).collect()
    }
}

impl Bus for LossyBus {
    fn append(&self, append: Append) {
        let mut log = self.log.lock();
        let id = append.envelope.dedup_key();
        let known = log.entries.iter().find(|entry| entry.envelope.dedup_key() == id);
        let (position, duplicate) = match known {
            Some(known) => (known.position.clone(), true),
            None => {
                let head = log.head();
                (Position::new(head.epoch, head.seq + 1), false)
            }
        };
        if !duplicate {
            let (position, envelope) = (position.clone(), append.envelope);
            let entry = Entry { position, origin: ServerId::default(), envelope };
            log.entries.push(entry.clone());
            self.mailboxes.send_entry(append.room, entry);
        }
        append.ticket.complete(Ok(Appended { position, duplicate, opened_inbox: false }));
    }

    fn subscribe(&self, _: RoomId) -> BoxFuture<Result<(), BusError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn unsubscribe(&self, _: RoomId) {}

    fn read(&self, _: RoomId, range: ReadRange) -> BoxFuture<Result<LogPage, BusError>> {
        let log = self.log.lock();
        let entries: Vec<Entry> = match range {
            ReadRange::After { seq, limit } => {
                log.entries.iter().skip(seq as usize).take(limit as usize).cloned().collect()
            }
            ReadRange::Newest { limit } | ReadRange::Before { limit, .. } => {
                let from = log.entries.len().saturating_sub(limit as usize);
                log.entries[from..].to_vec()
            }
        };
        let (head, former) = (log.head(), log.former.clone());
        let oldest = u64::from(head.seq > 0);
        let page = LogPage {
            epoch: head.epoch,
            former,
            deleted: 0,
            generation: 0,
            top: head.seq,
            oldest,
            entries,
        };
        let gate = self.gate.clone();
        Box::pin(async move {
            let _permit = gate.acquire().await;
            Ok(page)
        })
    }

    fn heads(&self, rooms: Vec<RoomId>) -> BoxFuture<Result<Vec<Option<Position>>, BusError>> {
        let heads = vec![Some(self.log.lock().head()); rooms.len()];
        Box::pin(std::future::ready(Ok(heads)))
    }

    fn delete(&self, _: RoomId) -> BoxFuture<Result<(), BusError>> {
        unreachable!("no test deletes here")
    }

    fn restore(&self, _: ReplicaSnapshot) -> BoxFuture<Result<(), BusError>> {
        unreachable!("no two histories share numbers here")
    }

    fn failed_check(&self) -> Option<&'static str> {
        None
    }
}

/// A hub over a log that can lose entries.
fn hub_over_lossy_log() -> (HubFixture, LossyBus) {
    let mut fragile = None;
    let bus =
        |mailboxes| -> Arc<dyn Bus> { Arc::new(fragile.insert(LossyBus::new(mailboxes)).clone()) };
    let fixture = HubFixture::over(bus, Tasks::default(), 10_000, || Fault::None);
    (fixture, fragile.unwrap())
}

/// The JSON of a WebSocket frame.
fn json(frame: &[u8]) -> serde_json::Value {
    let start = match frame[1] {
        127 => 10,
        126 => 4,
        _ => 2,
    };
    serde_json::from_slice(&frame[start..]).unwrap()
}

fn retention() -> Retention {
    Retention { entries_min: 100_000, bytes_max: 1 << 30, ..harness::retention() }
}

fn random_link_faults(seed: u64) -> impl FnMut() -> Fault + Send + 'static {
    let mut random = StdRng::seed_from_u64(seed);
    move || match random.random_range(0..10) {
        0 | 1 => Fault::Drop,
        2 => Fault::Repeat,
        3 => Fault::Late,
        _ => Fault::None,
    }
}

#[tokio::test(start_paused = true)]
async fn a_faulty_link_loses_no_entry() {
    for seed in 0..40 {
        let fixture = HubFixture::start(retention(), 10_000, random_link_faults(seed));
        let mut random = StdRng::seed_from_u64(seed);
        let lobby = room("r");
        let mut members = vec![Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await];
        for i in 1..=500 {
            fixture.publish(&lobby);
            if i % 50 == 0 {
                // A member that joins midway, at the top or from an earlier position; every other
                // one has an outbox of a few frames.
                let since =
                    Position::new(members[0].cursor.epoch.clone(), random.random_range(0..i));
                let start =
                    if i % 100 == 0 { JoinStart::Newest(10) } else { JoinStart::Since(since) };
                let bytes_max = if i % 100 == 0 { 600 } else { 1 << 20 };
                members.push(Member::join(&fixture, &lobby, start, bytes_max).await);
            }
            if random.random_range(0..4) == 0 {
                tokio::task::yield_now().await;
                for member in &mut members {
                    member.drain(&fixture).await;
                }
            }
        }
        // Entries dropped at the very end are found once the link is known to have failed.
        tokio::task::yield_now().await;
        fixture.mailboxes.mark_all_stale();
        for member in &mut members {
            member.reach(&fixture, 500).await;
            assert_eq!(member.resets, 0, "seed {seed}");
        }
        assert!(fixture.tasks.finish(Duration::from_secs(5)).await, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_mailbox_overflow_is_repaired_from_the_log() {
    let fixture = HubFixture::start(retention(), 8, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    for _ in 0..1000 {
        fixture.publish(&lobby);
    }
    member.reach(&fixture, 1000).await;
    assert!(fixture.metrics.mailbox_overflows.get() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_member_behind_retention_is_reset_and_continues() {
    let short = Retention { bytes_max: 5_000, ..retention() };
    let fixture = HubFixture::start(short, 10_000, || Fault::None);
    let lobby = room("r");
    let mut slow = Member::join(&fixture, &lobby, JoinStart::Newest(0), 600).await;
    for _ in 0..2000 {
        fixture.publish(&lobby);
    }
    slow.reach(&fixture, 2000).await;
    assert!(slow.resets >= 1);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_reads_nothing_causes_no_log_reads() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut slow = Member::join(&fixture, &lobby, JoinStart::Newest(0), 600).await;
    for _ in 0..2000 {
        fixture.publish(&lobby);
    }
    // It reads a few frames, catches up from the log until its outbox is full again, and then
    // waits.
    while slow.cursor.seq < 20 {
        slow.drain(&fixture).await;
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let before = fixture.reads.load(Ordering::Relaxed);
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fixture.reads.load(Ordering::Relaxed), before);
    slow.reach(&fixture, 2000).await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_filled_when_the_next_entry_arrives() {
    let mut count = 0;
    let fixture = HubFixture::start(retention(), 10_000, move || {
        count += 1;
        if count % 7 == 0 { Fault::Drop } else { Fault::None }
    });
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    // The loss is not signalled.
    for i in 1..=100 {
        fixture.publish(&lobby);
        if i % 7 != 0 {
            member.reach(&fixture, i).await;
        }
    }
    assert!(fixture.metrics.bus_entries_received.of(EntryResult::Gap).get() >= 14);
}

#[tokio::test(start_paused = true)]
async fn entries_lost_at_the_end_are_found_by_comparing_heads() {
    // No entry arrives, and the loss is not signalled.
    let fixture = HubFixture::start(retention(), 10_000, || Fault::Drop);
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    for _ in 0..100 {
        fixture.publish(&lobby);
    }
    let said = Instant::now();
    while member.cursor.seq < 100 {
        tokio::time::advance(Duration::from_millis(100)).await;
        member.drain(&fixture).await;
        assert!(
            said.elapsed() < COMPARE_INTERVAL * 2 + Duration::from_secs(1),
            "not repaired in time"
        );
    }
    assert_eq!(member.resets, 0);
}

#[tokio::test(start_paused = true)]
async fn a_continuing_epoch_skips_nothing_live_or_on_resume() {
    let (fixture, log) = hub_over_lossy_log();
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    let mut slow = Member::join(&fixture, &lobby, JoinStart::Newest(0), 600).await;
    (0..400).for_each(|_| fixture.publish(&lobby));
    member.reach(&fixture, 400).await;
    let before = member.cursor.epoch.clone();
    log.continue_without(0);
    (0..400).for_each(|_| fixture.publish(&lobby));
    member.reach(&fixture, 800).await;
    assert_eq!(member.resets, 1);
    assert_ne!(member.cursor.epoch, before);
    // The member was behind before the epoch ended, further than the ring and one log read reach.
    slow.reach(&fixture, 800).await;
    assert_eq!(slow.resets, 1);
    for seq in [0, 300, 399, 400] {
        let since = Position::new(before.clone(), seq);
        let mut back = Member::join(&fixture, &lobby, JoinStart::Since(since), 1 << 20).await;
        assert!(back.recovered, "from {seq}");
        back.reach(&fixture, 800).await;
        assert_eq!((back.resets, &back.cursor), (1, &member.cursor), "from {seq}");
    }
    let beyond = JoinStart::Since(Position::new(before, 401));
    assert!(!Member::join(&fixture, &lobby, beyond, 1 << 20).await.recovered);
}

#[tokio::test(start_paused = true)]
async fn messages_that_the_log_lost_are_appended_again() {
    let (fixture, log) = hub_over_lossy_log();
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..10).for_each(|_| fixture.publish(&lobby));
    member.reach(&fixture, 10).await;
    let ids = log.ids();
    log.continue_without(3);
    fixture.mailboxes.mark_all_stale();
    member.reach_reset(&fixture).await;
    member.reach(&fixture, 10).await;
    assert_eq!(log.ids(), ids);
    assert_eq!(fixture.metrics.reappended_messages.get(), 3);
    assert_eq!(member.cursor, log.log.lock().head());
}

#[tokio::test(start_paused = true)]
async fn a_deleted_log_stays_deleted() {
    let drop_all = Arc::new(AtomicBool::new(false));
    let drops_all = drop_all.clone();
    let fault = move || if drops_all.load(Ordering::Relaxed) { Fault::Drop } else { Fault::None };
    let fixture = HubFixture::start(retention(), 10_000, fault);
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..10).for_each(|_| fixture.publish(&lobby));
    member.reach(&fixture, 10).await;
    drop_all.store(true, Ordering::Relaxed);
    fixture.bus.delete(lobby.clone()).await.unwrap();
    (0..2).for_each(|_| fixture.publish(&lobby));
    fixture.mailboxes.mark_all_stale();
    for _ in 0..YIELDS_MAX {
        tokio::time::advance(Duration::from_millis(1)).await;
        member.drain(&fixture).await;
        if member.closed {
            break;
        }
    }
    assert!(member.closed && member.resets == 0);
    drop_all.store(false, Ordering::Relaxed);
    let mut anew = Member::join(&fixture, &lobby, JoinStart::Newest(10), 1 << 20).await;
    anew.reach(&fixture, 2).await;
    fixture.until_synced().await;
    let page = fixture.bus.read(lobby, ReadRange::Newest { limit: 100 }).await.unwrap();
    assert_eq!(
        (page.top, page.entries.len(), fixture.metrics.reappended_messages.get()),
        (2, 2, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_suspended_node_delivers_everything_once_it_has_a_lease() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    fixture.publish(&lobby);
    member.reach(&fixture, 1).await;
    let node_state = fixture.mailboxes.node_state();
    node_state.drop_lease();
    (0..5).for_each(|_| fixture.publish(&lobby));
    let joining = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20);
    tokio::pin!(joining);
    let waited = tokio::time::timeout(Duration::from_secs(8), &mut joining).await;
    assert!(waited.is_err(), "answered without a lease");
    member.drain(&fixture).await;
    assert_eq!(member.cursor.seq, 1);
    assert_eq!(fixture.metrics.bus_entries_received.of(EntryResult::NoLease).get(), 5);
    node_state.extend_lease(Instant::now(), Instant::now() + Duration::from_secs(3600));
    let joined = joining.await;
    assert_eq!(joined.cursor.seq, 6);
    let regained = Instant::now();
    while member.cursor.seq < 6 {
        tokio::time::advance(Duration::from_millis(100)).await;
        member.drain(&fixture).await;
        assert!(regained.elapsed() < Duration::from_secs(3), "still behind");
    }
    assert_eq!(member.resets, 0);
}

#[tokio::test(start_paused = true)]
async fn shards_are_synced_once_every_log_is_compared() {
    let drop_all = Arc::new(AtomicBool::new(false));
    let drops_all = drop_all.clone();
    let fault = move || if drops_all.load(Ordering::Relaxed) { Fault::Drop } else { Fault::None };
    let fixture = HubFixture::start(retention(), 10_000, fault);
    let rooms: Vec<RoomId> = (0..20).map(|i| room(&format!("r{i}"))).collect();
    let mut members = vec![];
    for room in &rooms {
        members.push(Member::join(&fixture, room, JoinStart::Newest(0), 1 << 20).await);
    }
    assert!(fixture.mailboxes.all_synced());
    drop_all.store(true, Ordering::Relaxed);
    rooms.iter().for_each(|room| (0..300).for_each(|_| fixture.publish(room)));
    fixture.mailboxes.mark_all_stale();
    assert!(!fixture.mailboxes.all_synced());
    fixture.until_synced().await;
    for member in &mut members {
        member.drain(&fixture).await;
        assert_eq!(member.cursor.seq, 300);
    }
}

#[tokio::test(start_paused = true)]
async fn members_that_are_behind_share_log_reads() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut members = vec![];
    for _ in 0..100 {
        members.push(Member::join(&fixture, &lobby, JoinStart::Newest(0), 20_000).await);
    }
    (0..2000).for_each(|_| fixture.publish(&lobby));
    let before = fixture.reads.load(Ordering::Relaxed);
    for _ in 0..YIELDS_MAX {
        for member in &mut members {
            member.drain(&fixture).await;
        }
        tokio::task::yield_now().await;
        if members.iter().all(|member| member.cursor.seq == 2000) {
            break;
        }
    }
    assert!(members.iter().all(|member| member.cursor.seq == 2000 && member.resets == 0));
    let reads = fixture.reads.load(Ordering::Relaxed) - before;
    assert!((8..200).contains(&reads), "{reads} reads for 100 members");
}

#[tokio::test(start_paused = true)]
async fn a_replica_snapshot_has_entries_and_recent_ids() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..300).for_each(|_| fixture.publish(&lobby));
    member.reach(&fixture, 300).await;
    let held = fixture.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!((held.entries.len(), held.ids.len()), (256, 44));
    assert_eq!(held.top, member.cursor);
    assert_eq!(held.ids.last().unwrap().1.seq, held.entries[0].position.seq - 1);
    // Ids are forgotten after the dedup window, and entries after retention.
    tokio::time::advance(hub_options().log_ttl + Duration::from_secs(5)).await;
    tokio::task::yield_now().await;
    let held = fixture.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!((held.entries.len(), held.ids.len(), held.top), (0, 0, member.cursor));
    assert_eq!(fixture.metrics.dedup_ids_bytes.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_log_read_from_before_a_snapshot_delivers_nothing() {
    let (fixture, log) = hub_over_lossy_log();
    let lobby = room("r");
    let mut member = Member::join(&fixture, &lobby, JoinStart::Newest(0), 1 << 20).await;
    fixture.publish(&lobby);
    member.reach(&fixture, 1).await;
    // A log read has found three entries, and its result is delayed.
    let held_up = log.hold_up_reads().await;
    log.replace(0, 3);
    let before = fixture.reads.load(Ordering::Relaxed);
    fixture.mailboxes.mark_all_stale();
    while fixture.reads.load(Ordering::Relaxed) == before {
        tokio::time::advance(Duration::from_millis(1)).await;
    }
    // A Redis server is restored from the nodes, which do not hold the three entries.
    let snapshot = fixture.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!(snapshot.top.seq, 1);
    log.replace(3, 2);
    drop(held_up);
    member.reach(&fixture, 3).await;
    fixture.until_synced().await;
    let snapshot = fixture.mailboxes.replica_snapshots().await.remove(0);
    let held: Vec<_> = snapshot.entries.iter().map(|entry| entry.envelope.id()).collect();
    assert_eq!((held, member.resets), (log.ids(), 0));
}

#[tokio::test(start_paused = true)]
async fn a_join_of_a_closed_connection_reads_no_log() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let outbox = Outbox::to_owner(1 << 20, fixture.metrics.clone());
    let gone = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
    // The call is made, and cancelled before the shard handles it.
    let (start, entered) = (JoinStart::Newest(10), Default::default());
    let joining = fixture.hub.join(room("r"), gone, None, start, entered);
    assert!(joining.now_or_never().is_none());
    Member::join(&fixture, &room("other"), JoinStart::Newest(0), 1 << 20).await;
    assert_eq!(fixture.metrics.rooms.get(), 1, "the room is not subscribed");
    assert_eq!(fixture.reads.load(Ordering::Relaxed), 1, "the other room's");
}

#[tokio::test(start_paused = true)]
async fn a_repeatedly_emptied_room_does_not_keep_others_subscribed() {
    let fixture = HubFixture::start(retention(), 10_000, || Fault::None);
    let (busy, quiet) = (room("busy"), room("quiet"));
    let ann = Member::join(&fixture, &busy, JoinStart::Newest(0), 1 << 20).await.handle;
    for _ in 0..5_000 {
        fixture.hub.leave(busy.clone(), ann.connection, None).await;
        let (start, entered) = (JoinStart::Newest(0), Default::default());
        fixture.hub.join(busy.clone(), ann.clone(), None, start, entered).await.unwrap();
        ann.outbox.take();
    }
    let bob = Member::join(&fixture, &quiet, JoinStart::Newest(0), 1 << 20).await.handle;
    fixture.hub.leave(quiet, bob.connection, None).await;
    for _ in 0..LINGER.as_secs() + 2 {
        assert!(fixture.metrics.rooms.get() <= 2);
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(fixture.metrics.rooms.get(), 1, "only the busy room is still subscribed");
}
