//! The hub over a link that drops, repeats and reorders: members see every entry once, in order.
//!
//! The log is the memory bus; what it passes on goes through a link with seeded faults before it
//! reaches the hub, which finds out by the numbers and reads the log.

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
        memory::MemoryBus,
    },
    delivery::{Entry, ReplicaSnapshot, ServerId, page::LogPage},
    drain::Tasks,
    hub::{COMPARE_INTERVAL, Hub, LINGER, join::JoinStart, member::ConnectionHandle},
    outbox::Outbox,
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

use crate::harness::{self, hub_options, nobody, room};

struct World {
    bus: Arc<dyn Bus>,
    hub: Hub,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    /// Towards the hub.
    mailboxes: Mailboxes,
    /// How many reads of logs there were.
    reads: Arc<AtomicUsize>,
}

impl World {
    /// A hub behind a link that does with each entry what `fault` says.
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
        let bus: Arc<dyn Bus> = Arc::new(Counting(bus(before), Arc::clone(&reads)));
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
        let people = (&bus, &nobody(&tasks), &Default::default());
        let hub = Hub::start(
            people,
            mailboxes.clone(),
            letters,
            hub_options(),
            (&metrics, &Default::default()),
            &tasks,
        );
        Self { bus, hub, tasks, metrics, mailboxes, reads }
    }

    /// Lets time pass until every room was proven whole.
    async fn until_whole(&self) {
        for _ in 0..TURNS_MAX {
            if self.mailboxes.all_synced() {
                return;
            }
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        panic!("not whole");
    }

    fn say(&self, room: &RoomId) {
        self.bus.append(Append {
            room: room.clone(),
            envelope: envelope(),
            urgent: false,
            unseen: Default::default(),
            deadline: Instant::now() + Duration::from_secs(5),
            done: Box::new(|result| assert!(result.is_ok())),
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

/// How often a test lets the others go on before it gives up waiting: the clock stands still.
const TURNS_MAX: usize = 100_000;

/// A bus that counts reads.
struct Counting(Arc<dyn Bus>, Arc<AtomicUsize>);

impl Bus for Counting {
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

/// A member whose frames are taken by the test.
struct Member {
    handle: Arc<ConnectionHandle>,
    cursor: Position,
    resets: usize,
    recovered: bool,
    closed: bool,
}

impl Member {
    async fn join(world: &World, room: &RoomId, start: JoinStart, bytes_max: usize) -> Self {
        let outbox = Outbox::to_owner(bytes_max, world.metrics.clone());
        let handle = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
        let entered = Default::default();
        world.hub.join(room.clone(), handle.clone(), None, start, entered).await.unwrap();
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
                    assert_eq!(seq, self.cursor.seq + 1, "a hole or a repeat: {frame}");
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

    /// Takes what came, checks its order, and asks for more where the member is behind.
    async fn drain(&mut self, world: &World) {
        self.note(self.handle.outbox.take());
        for room in self.handle.outbox.take_lagging() {
            world.hub.catch_up(room, self.handle.connection).await;
        }
    }

    async fn reach(&mut self, world: &World, seq: Seq) {
        for _ in 0..TURNS_MAX {
            if self.cursor.seq >= seq {
                break;
            }
            self.drain(world).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(self.cursor.seq, seq);
    }

    async fn reach_reset(&mut self, world: &World) {
        let before = self.resets;
        for _ in 0..TURNS_MAX {
            if self.resets > before {
                return;
            }
            self.drain(world).await;
            tokio::task::yield_now().await;
        }
        panic!("no reset");
    }
}

/// A bus over one log that can do what a server does that came back without some of its data.
#[derive(Clone)]
struct Fragile {
    log: Arc<Mutex<FragileLog>>,
    mailboxes: Mailboxes,
    /// Reads wait here on their way back.
    gate: Arc<Semaphore>,
}

/// How many reads of a [`Fragile`] may be under way.
const READS_MAX: u32 = 1000;

struct FragileLog {
    ordinal: u64,
    former: Option<Position>,
    entries: Vec<Entry>,
}

impl FragileLog {
    fn head(&self) -> Position {
        let epoch = format!("{}-fragile", self.ordinal).parse().unwrap();
        Position::new(epoch, self.entries.len() as u64)
    }
}

impl Fragile {
    fn new(mailboxes: Mailboxes) -> Self {
        let log = FragileLog { ordinal: 1, former: None, entries: vec![] };
        let gate = Arc::new(Semaphore::new(READS_MAX as usize));
        Self { log: Arc::new(Mutex::new(log)), mailboxes, gate }
    }

    /// Holds up the answers to reads until the permit is dropped.
    async fn hold_up_reads(&self) -> OwnedSemaphorePermit {
        self.gate.clone().acquire_many_owned(READS_MAX).await.unwrap()
    }

    /// Loses the newest entries, and gets others in their place that the hub does not receive.
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

    /// Loses the newest entries and goes on in a new epoch.
    fn come_back_without(&self, lost: usize) {
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

impl Bus for Fragile {
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
        (append.done)(Ok(Appended { position, duplicate, opened_inbox: false }));
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

/// A world over a log that can lose entries.
fn fragile_world() -> (World, Fragile) {
    let mut fragile = None;
    let bus =
        |mailboxes| -> Arc<dyn Bus> { Arc::new(fragile.insert(Fragile::new(mailboxes)).clone()) };
    let world = World::over(bus, Tasks::default(), 10_000, || Fault::None);
    (world, fragile.unwrap())
}

/// The JSON of a frame as it stands on the socket.
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

fn faults(seed: u64) -> impl FnMut() -> Fault + Send + 'static {
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
        let world = World::start(retention(), 10_000, faults(seed));
        let mut random = StdRng::seed_from_u64(seed);
        let lobby = room("r");
        let mut members = vec![Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await];
        for i in 1..=500 {
            world.say(&lobby);
            if i % 50 == 0 {
                // Who comes in the middle, now or from somewhere before; every other one with an
                // outbox of a few frames.
                let since =
                    Position::new(members[0].cursor.epoch.clone(), random.random_range(0..i));
                let start =
                    if i % 100 == 0 { JoinStart::Newest(10) } else { JoinStart::Since(since) };
                let bytes_max = if i % 100 == 0 { 600 } else { 1 << 20 };
                members.push(Member::join(&world, &lobby, start, bytes_max).await);
            }
            if random.random_range(0..4) == 0 {
                tokio::task::yield_now().await;
                for member in &mut members {
                    member.drain(&world).await;
                }
            }
        }
        // What the link dropped at the very end is found by whoever finds out that it was cut.
        tokio::task::yield_now().await;
        world.mailboxes.mark_all_stale();
        for member in &mut members {
            member.reach(&world, 500).await;
            assert_eq!(member.resets, 0, "seed {seed}");
        }
        assert!(world.tasks.finish(Duration::from_secs(5)).await, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_mailbox_overflow_is_repaired_from_the_log() {
    let world = World::start(retention(), 8, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    for _ in 0..1000 {
        world.say(&lobby);
    }
    member.reach(&world, 1000).await;
    assert!(world.metrics.mailbox_overflows.get() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_member_behind_retention_is_reset_and_continues() {
    let short = Retention { bytes_max: 5_000, ..retention() };
    let world = World::start(short, 10_000, || Fault::None);
    let lobby = room("r");
    let mut slow = Member::join(&world, &lobby, JoinStart::Newest(0), 600).await;
    for _ in 0..2000 {
        world.say(&lobby);
    }
    slow.reach(&world, 2000).await;
    assert!(slow.resets >= 1);
}

#[tokio::test(start_paused = true)]
async fn a_member_that_reads_nothing_causes_no_log_reads() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut slow = Member::join(&world, &lobby, JoinStart::Newest(0), 600).await;
    for _ in 0..2000 {
        world.say(&lobby);
    }
    // It takes a little, is fed from the log until its outbox is full again, and then rests.
    while slow.cursor.seq < 20 {
        slow.drain(&world).await;
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let before = world.reads.load(Ordering::Relaxed);
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.reads.load(Ordering::Relaxed), before);
    slow.reach(&world, 2000).await;
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_filled_when_the_next_entry_arrives() {
    let mut count = 0;
    let world = World::start(retention(), 10_000, move || {
        count += 1;
        if count % 7 == 0 { Fault::Drop } else { Fault::None }
    });
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    // Nobody says that anything was lost.
    for i in 1..=100 {
        world.say(&lobby);
        if i % 7 != 0 {
            member.reach(&world, i).await;
        }
    }
    assert!(world.metrics.bus_entries_received.of(EntryResult::Gap).get() >= 14);
}

#[tokio::test(start_paused = true)]
async fn entries_lost_at_the_end_are_found_by_comparing_heads() {
    // Nothing arrives, and nobody says that anything was lost.
    let world = World::start(retention(), 10_000, || Fault::Drop);
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    for _ in 0..100 {
        world.say(&lobby);
    }
    let said = Instant::now();
    while member.cursor.seq < 100 {
        tokio::time::advance(Duration::from_millis(100)).await;
        member.drain(&world).await;
        assert!(said.elapsed() < COMPARE_INTERVAL * 2 + Duration::from_secs(1), "still deaf");
    }
    assert_eq!(member.resets, 0);
}

#[tokio::test(start_paused = true)]
async fn a_continuing_epoch_skips_nothing_live_or_on_resume() {
    let (world, log) = fragile_world();
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    let mut slow = Member::join(&world, &lobby, JoinStart::Newest(0), 600).await;
    (0..400).for_each(|_| world.say(&lobby));
    member.reach(&world, 400).await;
    let before = member.cursor.epoch.clone();
    log.come_back_without(0);
    (0..400).for_each(|_| world.say(&lobby));
    member.reach(&world, 800).await;
    assert_eq!(member.resets, 1);
    assert_ne!(member.cursor.epoch, before);
    // It was behind before the epoch ended, and neither ring nor one read reaches back to there.
    slow.reach(&world, 800).await;
    assert_eq!(slow.resets, 1);
    for seq in [0, 300, 399, 400] {
        let since = Position::new(before.clone(), seq);
        let mut back = Member::join(&world, &lobby, JoinStart::Since(since), 1 << 20).await;
        assert!(back.recovered, "from {seq}");
        back.reach(&world, 800).await;
        assert_eq!((back.resets, &back.cursor), (1, &member.cursor), "from {seq}");
    }
    let beyond = JoinStart::Since(Position::new(before, 401));
    assert!(!Member::join(&world, &lobby, beyond, 1 << 20).await.recovered);
}

#[tokio::test(start_paused = true)]
async fn messages_that_the_log_lost_are_appended_again() {
    let (world, log) = fragile_world();
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..10).for_each(|_| world.say(&lobby));
    member.reach(&world, 10).await;
    let ids = log.ids();
    log.come_back_without(3);
    world.mailboxes.mark_all_stale();
    member.reach_reset(&world).await;
    member.reach(&world, 10).await;
    assert_eq!(log.ids(), ids);
    assert_eq!(world.metrics.reappended_messages.get(), 3);
    assert_eq!(member.cursor, log.log.lock().head());
}

#[tokio::test(start_paused = true)]
async fn a_deleted_log_stays_deleted() {
    let deaf = Arc::new(AtomicBool::new(false));
    let is_deaf = deaf.clone();
    let fault = move || if is_deaf.load(Ordering::Relaxed) { Fault::Drop } else { Fault::None };
    let world = World::start(retention(), 10_000, fault);
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..10).for_each(|_| world.say(&lobby));
    member.reach(&world, 10).await;
    deaf.store(true, Ordering::Relaxed);
    world.bus.delete(lobby.clone()).await.unwrap();
    (0..2).for_each(|_| world.say(&lobby));
    world.mailboxes.mark_all_stale();
    for _ in 0..TURNS_MAX {
        tokio::time::advance(Duration::from_millis(1)).await;
        member.drain(&world).await;
        if member.closed {
            break;
        }
    }
    assert!(member.closed && member.resets == 0);
    deaf.store(false, Ordering::Relaxed);
    let mut anew = Member::join(&world, &lobby, JoinStart::Newest(10), 1 << 20).await;
    anew.reach(&world, 2).await;
    world.until_whole().await;
    let page = world.bus.read(lobby, ReadRange::Newest { limit: 100 }).await.unwrap();
    assert_eq!((page.top, page.entries.len(), world.metrics.reappended_messages.get()), (2, 2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_suspended_node_delivers_everything_once_it_has_a_lease() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    world.say(&lobby);
    member.reach(&world, 1).await;
    let standing = world.mailboxes.node_state();
    standing.drop_lease();
    (0..5).for_each(|_| world.say(&lobby));
    let joining = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20);
    tokio::pin!(joining);
    let waited = tokio::time::timeout(Duration::from_secs(8), &mut joining).await;
    assert!(waited.is_err(), "answered without standing");
    member.drain(&world).await;
    assert_eq!(member.cursor.seq, 1);
    assert_eq!(world.metrics.bus_entries_received.of(EntryResult::NoLease).get(), 5);
    standing.extend_lease(Instant::now() + Duration::from_secs(3600));
    let joined = joining.await;
    assert_eq!(joined.cursor.seq, 6);
    let regained = Instant::now();
    while member.cursor.seq < 6 {
        tokio::time::advance(Duration::from_millis(100)).await;
        member.drain(&world).await;
        assert!(regained.elapsed() < Duration::from_secs(3), "still behind");
    }
    assert_eq!(member.resets, 0);
}

#[tokio::test(start_paused = true)]
async fn shards_are_synced_once_every_log_is_compared() {
    let deaf = Arc::new(AtomicBool::new(false));
    let is_deaf = deaf.clone();
    let fault = move || if is_deaf.load(Ordering::Relaxed) { Fault::Drop } else { Fault::None };
    let world = World::start(retention(), 10_000, fault);
    let rooms: Vec<RoomId> = (0..20).map(|i| room(&format!("r{i}"))).collect();
    let mut members = vec![];
    for room in &rooms {
        members.push(Member::join(&world, room, JoinStart::Newest(0), 1 << 20).await);
    }
    assert!(world.mailboxes.all_synced());
    deaf.store(true, Ordering::Relaxed);
    rooms.iter().for_each(|room| (0..300).for_each(|_| world.say(room)));
    world.mailboxes.mark_all_stale();
    assert!(!world.mailboxes.all_synced());
    world.until_whole().await;
    for member in &mut members {
        member.drain(&world).await;
        assert_eq!(member.cursor.seq, 300);
    }
}

#[tokio::test(start_paused = true)]
async fn members_that_are_behind_share_log_reads() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut members = vec![];
    for _ in 0..100 {
        members.push(Member::join(&world, &lobby, JoinStart::Newest(0), 20_000).await);
    }
    (0..2000).for_each(|_| world.say(&lobby));
    let before = world.reads.load(Ordering::Relaxed);
    for _ in 0..TURNS_MAX {
        for member in &mut members {
            member.drain(&world).await;
        }
        tokio::task::yield_now().await;
        if members.iter().all(|member| member.cursor.seq == 2000) {
            break;
        }
    }
    assert!(members.iter().all(|member| member.cursor.seq == 2000 && member.resets == 0));
    let reads = world.reads.load(Ordering::Relaxed) - before;
    assert!((8..200).contains(&reads), "{reads} reads for 100 members");
}

#[tokio::test(start_paused = true)]
async fn a_replica_snapshot_has_entries_and_recent_ids() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    (0..300).for_each(|_| world.say(&lobby));
    member.reach(&world, 300).await;
    let held = world.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!((held.entries.len(), held.ids.len()), (256, 44));
    assert_eq!(held.top, member.cursor);
    assert_eq!(held.ids.last().unwrap().1.seq, held.entries[0].position.seq - 1);
    // Past the window ids are forgotten, and past retention what was said.
    tokio::time::advance(hub_options().log_ttl + Duration::from_secs(5)).await;
    tokio::task::yield_now().await;
    let held = world.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!((held.entries.len(), held.ids.len(), held.top), (0, 0, member.cursor));
    assert_eq!(world.metrics.dedup_ids_bytes.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_log_read_from_before_a_snapshot_delivers_nothing() {
    let (world, log) = fragile_world();
    let lobby = room("r");
    let mut member = Member::join(&world, &lobby, JoinStart::Newest(0), 1 << 20).await;
    world.say(&lobby);
    member.reach(&world, 1).await;
    // A read has found three entries, and its answer is on its way.
    let held_up = log.hold_up_reads().await;
    log.replace(0, 3);
    let before = world.reads.load(Ordering::Relaxed);
    world.mailboxes.mark_all_stale();
    while world.reads.load(Ordering::Relaxed) == before {
        tokio::time::advance(Duration::from_millis(1)).await;
    }
    // Redis is replaced by one that gets what the nodes hold, and that is without the three.
    let snapshot = world.mailboxes.replica_snapshots().await.remove(0);
    assert_eq!(snapshot.top.seq, 1);
    log.replace(3, 2);
    drop(held_up);
    member.reach(&world, 3).await;
    world.until_whole().await;
    let snapshot = world.mailboxes.replica_snapshots().await.remove(0);
    let held: Vec<_> = snapshot.entries.iter().map(|entry| entry.envelope.id()).collect();
    assert_eq!((held, member.resets), (log.ids(), 0));
}

#[tokio::test(start_paused = true)]
async fn a_join_of_a_closed_connection_reads_no_log() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let outbox = Outbox::to_owner(1 << 20, world.metrics.clone());
    let gone = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
    // The call is made, and given up before the shard takes it.
    let (start, entered) = (JoinStart::Newest(10), Default::default());
    let joining = world.hub.join(room("r"), gone, None, start, entered);
    assert!(joining.now_or_never().is_none());
    Member::join(&world, &room("other"), JoinStart::Newest(0), 1 << 20).await;
    assert_eq!(world.metrics.rooms.get(), 1, "the room is not followed");
    assert_eq!(world.reads.load(Ordering::Relaxed), 1, "the other room's");
}

#[tokio::test(start_paused = true)]
async fn a_repeatedly_emptied_room_does_not_keep_others_subscribed() {
    let world = World::start(retention(), 10_000, || Fault::None);
    let (busy, quiet) = (room("busy"), room("quiet"));
    let ann = Member::join(&world, &busy, JoinStart::Newest(0), 1 << 20).await.handle;
    for _ in 0..5_000 {
        world.hub.leave(busy.clone(), ann.connection, None).await;
        let (start, entered) = (JoinStart::Newest(0), Default::default());
        world.hub.join(busy.clone(), ann.clone(), None, start, entered).await.unwrap();
        ann.outbox.take();
    }
    let bob = Member::join(&world, &quiet, JoinStart::Newest(0), 1 << 20).await.handle;
    world.hub.leave(quiet, bob.connection, None).await;
    for _ in 0..LINGER.as_secs() + 2 {
        assert!(world.metrics.rooms.get() <= 2);
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(world.metrics.rooms.get(), 1, "only the busy room is still followed");
}
