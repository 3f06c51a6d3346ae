//! The conformance suite of [`Bus`]: every implementation passes every check.

use std::{sync::Arc, time::Duration};

use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_core::{
    bus::{
        Append, Appended, Bus, BusError, Mailboxes, READ_BYTES_MAX, ReadRange, Retention,
        ShardMessage, memory::MemoryBus, ticket::PublishTicket,
    },
    delivery::Entry,
    drain::Tasks,
    telemetry::metrics::Metrics,
};
use skein_protocol::{
    ids::{ConnectionId, MessageId, RoomId},
    position::Seq,
};
use skein_redis::{RedisBus, RedisOptions};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    harness::{Redis, message_fields, redis_options, retention, room, with_redis, within},
    servers::single_node_redis_cluster,
};

/// A bus and the mailbox of one node on it.
pub struct BusFixture {
    pub bus: Arc<dyn Bus>,
    received: mpsc::Receiver<(RoomId, Entry)>,
    pub tasks: Tasks,
}

/// The mailbox of a node without entries, and a receiver of the entries that arrive.
pub fn mailbox() -> (Mailboxes, mpsc::Receiver<(RoomId, Entry)>) {
    let (mailboxes, mut receivers) = Mailboxes::new(1, 10_000, Arc::new(Metrics::new()));
    let mut receivers = receivers.remove(0).messages;
    let (sender, received) = mpsc::channel(10_000);
    tokio::spawn(async move {
        while let Some(message) = receivers.recv().await {
            match message {
                ShardMessage::Entry(room, entry) => drop(sender.send((room, entry)).await),
                ShardMessage::Ephemeral(..) => {}
                ShardMessage::Snapshots(answer) => drop(answer.send(Vec::new())),
            }
        }
    });
    (mailboxes, received)
}

fn memory(retention: Retention) -> BusFixture {
    let (mailboxes, received) = mailbox();
    let tasks = Tasks::default();
    let bus = Arc::new(MemoryBus::start(
        retention,
        &Default::default(),
        &Default::default(),
        mailboxes,
        &tasks,
    ));
    BusFixture { bus, received, tasks }
}

/// The number of partitions in these tests.
pub const PARTITIONS: u16 = 16;

pub async fn redis(server: &Redis, retention: Retention) -> BusFixture {
    redis_at(server.url(), retention).await
}

async fn redis_at(url: String, retention: Retention) -> BusFixture {
    let (mailboxes, received) = mailbox();
    let tasks = Tasks::default();
    let options = RedisOptions { retention, ..redis_options(url, PARTITIONS, "n") };
    let bus = RedisBus::start(options, None, mailboxes, Arc::new(Metrics::new()), &tasks).unwrap();
    within(bus.reached()).await.unwrap();
    BusFixture { bus: Arc::new(bus), received, tasks }
}

/// Runs a check against each implementation, at the same time.
async fn each(retention: Retention, check: impl AsyncFn(&mut BusFixture)) {
    let check = async |mut fixture: BusFixture| {
        check(&mut fixture).await;
        assert!(fixture.tasks.finish(Duration::from_secs(5)).await, "tasks did not end");
    };
    let in_memory = Box::pin(check(memory(retention.clone())));
    if !with_redis() {
        return in_memory.await;
    }
    let on_redis = Box::pin(async {
        let server = Redis::start().await;
        check(redis(&server, retention.clone()).await).await;
    });
    let on_valkey = Box::pin(async {
        if let Some(server) = Redis::start_valkey().await {
            check(redis(&server, retention.clone()).await).await;
        }
    });
    let on_redis_cluster = Box::pin(async {
        let node = single_node_redis_cluster(PARTITIONS).await;
        check(redis_at(node.cluster_url(), retention.clone()).await).await;
    });
    tokio::join!(in_memory, on_redis, on_valkey, on_redis_cluster);
}

fn envelope(room: &RoomId, user: &str, id: MessageId, bytes: usize) -> Envelope {
    let payload = vec![b'x'; bytes];
    Envelope::pack(EnvelopeParts {
        frame: Default::default(),
        author: AuthorHash::of(&user.parse().unwrap()),
        id,
        sender: ConnectionId::random(),
        echo: true,
        fields: &message_fields(room, id, None),
        binary_payload: Some(&payload),
    })
}

impl BusFixture {
    /// Starts an append; the receiver gets the result.
    pub fn begin(
        &self,
        room: &RoomId,
        user: &str,
        id: MessageId,
        bytes: usize,
    ) -> oneshot::Receiver<Result<Appended, BusError>> {
        let (answer, answered) = oneshot::channel();
        self.bus.append(Append {
            room: room.clone(),
            envelope: envelope(room, user, id, bytes),
            urgent: false,
            unseen: Default::default(),
            deadline: Instant::now() + Duration::from_secs(5),
            ticket: PublishTicket::new(move |result| drop(answer.send(result))),
        });
        answered
    }

    pub async fn append(&self, room: &RoomId, id: MessageId) -> Appended {
        within(self.begin(room, "ann", id, 10)).await.unwrap().unwrap()
    }

    async fn seqs(&self, room: &RoomId, range: ReadRange) -> Vec<Seq> {
        let page = self.bus.read(room.clone(), range).await.unwrap();
        page.entries.iter().map(|entry| entry.position.seq).collect()
    }

    async fn receive(&mut self) -> (RoomId, Entry) {
        within(self.received.recv()).await.unwrap()
    }
}

#[tokio::test]
async fn entries_are_numbered_and_received_in_call_order() {
    each(retention(), async |fixture| {
        let lobby = room("lobby");
        within(fixture.bus.subscribe(lobby.clone())).await.unwrap();
        let ids: Vec<_> = (0..1000).map(|_| MessageId::random()).collect();
        let answers: Vec<_> = ids.iter().map(|id| fixture.begin(&lobby, "ann", *id, 10)).collect();
        for (i, answer) in answers.into_iter().enumerate() {
            let appended = within(answer).await.unwrap().unwrap();
            assert_eq!((appended.position.seq, appended.duplicate), (i as Seq + 1, false));
        }
        for (i, id) in ids.iter().enumerate() {
            let (heard_in, entry) = fixture.receive().await;
            assert_eq!((heard_in, entry.position.seq), (lobby.clone(), i as Seq + 1));
            assert_eq!(entry.envelope.id(), *id);
        }
    })
    .await;
}

#[tokio::test]
async fn an_id_has_one_position_per_user_and_room() {
    each(retention(), async |fixture| {
        let (lobby, other) = (room("lobby"), room("other"));
        let id = MessageId::random();
        let first = fixture.append(&lobby, id).await;
        let again = fixture.append(&lobby, id).await;
        assert_eq!((again.position.clone(), again.duplicate), (first.position.clone(), true));
        let elsewhere = fixture.append(&other, id).await;
        assert!(!elsewhere.duplicate);
        let bobs = within(fixture.begin(&lobby, "bob", id, 10)).await.unwrap().unwrap();
        assert_eq!((bobs.position.seq, bobs.duplicate), (2, false));
        // Many concurrent appends with one id: exactly one is first.
        let id = MessageId::random();
        let answers: Vec<_> = (0..50).map(|_| fixture.begin(&lobby, "ann", id, 10)).collect();
        let mut firsts = 0;
        for answer in answers {
            let appended = within(answer).await.unwrap().unwrap();
            assert_eq!(appended.position.seq, 3);
            firsts += usize::from(!appended.duplicate);
        }
        assert_eq!(firsts, 1);
    })
    .await;
}

#[tokio::test]
async fn ids_are_deduplicated_for_the_window_and_then_forgotten() {
    let window = Duration::from_secs(1);
    each(Retention { dedup_window: window, ..retention() }, async |fixture| {
        let lobby = room("lobby");
        let id = MessageId::random();
        assert!(!fixture.append(&lobby, id).await.duplicate);
        assert!(fixture.append(&lobby, id).await.duplicate);
        let begun = Instant::now();
        while fixture.append(&lobby, id).await.duplicate {
            assert!(begun.elapsed() < window * 10, "never forgotten");
            crate::harness::poll_pause().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_log_is_read_in_pages() {
    each(retention(), async |fixture| {
        let lobby = room("lobby");
        for _ in 0..100 {
            fixture.append(&lobby, MessageId::random()).await;
        }
        let newest = |limit| ReadRange::Newest { limit };
        assert_eq!(fixture.seqs(&lobby, newest(3)).await, [98, 99, 100]);
        assert_eq!(fixture.seqs(&lobby, newest(500)).await, (1..=100).collect::<Vec<_>>());
        assert_eq!(
            fixture.seqs(&lobby, ReadRange::After { seq: 97, limit: 10 }).await,
            [98, 99, 100]
        );
        assert_eq!(fixture.seqs(&lobby, ReadRange::After { seq: 0, limit: 2 }).await, [1, 2]);
        assert!(fixture.seqs(&lobby, ReadRange::After { seq: 100, limit: 2 }).await.is_empty());
        assert!(fixture.seqs(&lobby, ReadRange::After { seq: 1000, limit: 2 }).await.is_empty());
        assert_eq!(fixture.seqs(&lobby, ReadRange::Before { seq: 4, limit: 2 }).await, [2, 3]);
        assert_eq!(fixture.seqs(&lobby, ReadRange::Before { seq: 1000, limit: 1 }).await, [100]);
        assert!(fixture.seqs(&lobby, ReadRange::Before { seq: 1, limit: 2 }).await.is_empty());
        assert!(fixture.seqs(&lobby, ReadRange::Before { seq: 0, limit: 2 }).await.is_empty());
        let page = fixture.bus.read(lobby, newest(1)).await.unwrap();
        assert_eq!((page.top, page.oldest), (100, 1));
    })
    .await;
}

#[tokio::test]
async fn a_read_stops_at_its_byte_limit_but_returns_one_entry() {
    each(retention(), async |fixture| {
        let lobby = room("lobby");
        for bytes in [READ_BYTES_MAX / 2, READ_BYTES_MAX / 3, READ_BYTES_MAX, 10] {
            let answer = fixture.begin(&lobby, "ann", MessageId::random(), bytes);
            within(answer).await.unwrap().unwrap();
        }
        assert_eq!(fixture.seqs(&lobby, ReadRange::After { seq: 0, limit: 9 }).await, [1, 2]);
        assert_eq!(fixture.seqs(&lobby, ReadRange::After { seq: 2, limit: 9 }).await, [3]);
        assert_eq!(fixture.seqs(&lobby, ReadRange::Newest { limit: 9 }).await, [4]);
        assert_eq!(fixture.seqs(&lobby, ReadRange::Before { seq: 4, limit: 9 }).await, [3]);
    })
    .await;
}

#[tokio::test]
async fn a_room_has_its_epoch_before_its_first_entry() {
    each(retention(), async |fixture| {
        let lobby = room("lobby");
        let range = ReadRange::Newest { limit: 1 };
        let page = fixture.bus.read(lobby.clone(), range).await.unwrap();
        assert_eq!((page.top, page.oldest, page.entries.len()), (0, 0, 0));
        let appended = fixture.append(&lobby, MessageId::random()).await;
        assert_eq!((appended.position.epoch, appended.position.seq), (page.epoch, 1));
    })
    .await;
}

#[tokio::test]
async fn entries_arrive_only_from_subscribed_rooms() {
    each(retention(), async |fixture| {
        let (lobby, other) = (room("lobby"), room("other"));
        within(fixture.bus.subscribe(lobby.clone())).await.unwrap();
        fixture.append(&other, MessageId::random()).await;
        fixture.append(&lobby, MessageId::random()).await;
        assert_eq!(fixture.receive().await.0, lobby);
        fixture.bus.unsubscribe(lobby.clone());
        // Calls take effect in order, so `lobby` is unsubscribed when this resolves.
        within(fixture.bus.subscribe(other.clone())).await.unwrap();
        fixture.append(&lobby, MessageId::random()).await;
        fixture.append(&other, MessageId::random()).await;
        assert_eq!(fixture.receive().await.0, other);
    })
    .await;
}

#[tokio::test]
async fn retention_keeps_its_minimum_and_no_more() {
    let short = Retention { entries_min: 50, window: Duration::ZERO, ..retention() };
    each(short, async |fixture| {
        let lobby = room("lobby");
        for _ in 0..600 {
            fixture.append(&lobby, MessageId::random()).await;
        }
        let kept = fixture.seqs(&lobby, ReadRange::After { seq: 0, limit: 1000 }).await;
        // Redis trims whole nodes of up to 100 entries.
        assert!((50..=200).contains(&kept.len()), "{} kept", kept.len());
        assert!(kept.is_sorted() && kept.last() == Some(&600));
    })
    .await;
    let small = Retention { bytes_max: 256 * 1024, ..retention() };
    each(small, async |fixture| {
        let lobby = room("lobby");
        for _ in 0..200 {
            let answer = fixture.begin(&lobby, "ann", MessageId::random(), 10_000);
            within(answer).await.unwrap().unwrap();
        }
        let page = fixture.bus.read(lobby, ReadRange::Newest { limit: 1 }).await.unwrap();
        let kept = page.top - page.oldest + 1;
        assert!((10..=100).contains(&kept), "{kept} kept of 200");
    })
    .await;
    let long = Retention { entries_min: 10, ..retention() };
    each(long, async |fixture| {
        let lobby = room("lobby");
        for _ in 0..500 {
            fixture.append(&lobby, MessageId::random()).await;
        }
        let page = fixture.bus.read(lobby, ReadRange::Newest { limit: 1 }).await.unwrap();
        assert_eq!(page.oldest, 1, "what is younger than the window is kept");
    })
    .await;
}

#[tokio::test]
async fn the_memory_bus_evicts_the_oldest_logs_at_its_byte_limit() {
    let fixture = memory(Retention { memory_bytes_max: 1 << 20, ..retention() });
    let rooms: Vec<RoomId> = (0..200).map(|i| room(&format!("r{i}"))).collect();
    within(fixture.bus.subscribe(rooms[0].clone())).await.unwrap();
    for room in &rooms {
        let answer = fixture.begin(room, "ann", MessageId::random(), 10_000);
        within(answer).await.unwrap().unwrap();
    }
    let read = async |room: &RoomId| {
        let range = ReadRange::Newest { limit: 1 };
        let page = fixture.bus.read(room.clone(), range).await.unwrap();
        (page.top, page.entries.len())
    };
    // A subscribed room keeps its position; an unsubscribed one is removed completely.
    assert_eq!(read(&rooms[0]).await, (1, 0));
    assert_eq!(read(&rooms[1]).await, (0, 0));
    assert_eq!(read(&rooms[199]).await, (1, 1));
    assert!(fixture.tasks.finish(Duration::from_secs(5)).await);
}
