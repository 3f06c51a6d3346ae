//! A node that no longer receives entries detects that itself, and repairs the gaps.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_core::{
    bus::{Append, Bus, Mailboxes, ticket::PublishTicket},
    connection::{handle::ConnectionHandle, outbox::Outbox},
    delivery::join::JoinStart,
    drain::Tasks,
    hub::MAILBOX_LEN,
    telemetry::metrics::Metrics,
};
use skein_protocol::ids::{ConnectionId, MessageId, RoomId};
use skein_redis::RedisBus;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    time::Instant,
};

use crate::harness::{
    Gateway, Redis, get, message_fields, next_message, redis_options, room, say, start_hub, until,
    within,
};

/// A relay to Redis that can drop everything Redis sends to subscribers, while connections stay
/// open.
struct SilencingRelay {
    port: u16,
    silent: Arc<AtomicBool>,
}

impl SilencingRelay {
    async fn to(redis: &Redis) -> Self {
        let (listener, target) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), redis.port);
        let port = listener.local_addr().unwrap().port();
        let silent = Arc::new(AtomicBool::new(false));
        let is_silent = silent.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(("127.0.0.1", target)).await.unwrap();
                // Only a connection that had subscribed before is silenced, not the one made after
                // it.
                tokio::spawn(relay(near, far, is_silent.clone()));
            }
        });
        Self { port, silent }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

async fn relay(near: TcpStream, far: TcpStream, silent: Arc<AtomicBool>) {
    let ((mut near_in, mut near_out), (mut far_in, mut far_out)) =
        (near.into_split(), far.into_split());
    let (old, subscribes) = (!silent.load(Ordering::Relaxed), Arc::new(AtomicBool::new(false)));
    let has_subscribed = subscribes.clone();
    tokio::spawn(async move {
        let mut buffer = vec![0; 65536];
        while let Ok(count @ 1..) = near_in.read(&mut buffer).await {
            if buffer[..count].windows(9).any(|word| word == b"SUBSCRIBE") {
                has_subscribed.store(true, Ordering::Relaxed);
            }
            if far_out.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 65536];
    while let Ok(count @ 1..) = far_in.read(&mut buffer).await {
        if old && subscribes.load(Ordering::Relaxed) && silent.load(Ordering::Relaxed) {
            continue;
        }
        if near_out.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_silent_pubsub_link_is_detected_and_replaced() {
    let redis = Redis::start().await;
    let relay_to_redis = SilencingRelay::to(&redis).await;
    let url = relay_to_redis.url();
    let cluster = [("cluster.redis_url", url.as_str()), ("auth.allow_anonymous", "true")];
    let (silent, other) = (Gateway::start(&cluster).await, Gateway::start_on(&redis, &[]).await);
    let lobby = room("lobby");
    let (mut ann, mut bob) = (silent.connect("ann").await, other.connect("bob").await);
    ann.join(&lobby).await.unwrap();
    bob.join(&lobby).await.unwrap();
    say(&mut bob, &lobby, "received").await;
    assert_eq!(next_message(&mut ann).await.seq, 1);

    relay_to_redis.silent.store(true, Ordering::Relaxed);
    let since = Instant::now();
    assert_eq!(say(&mut bob, &lobby, "dropped").await.seq, 2);
    assert_eq!(next_message(&mut ann).await.seq, 2);
    println!("a silent pub/sub link: detected and repaired after {:?}", since.elapsed());
    let metrics = get(silent.admin, "/metrics").await.body;
    assert!(metrics.contains("gateway_bus_probe_timeouts_total 1"), "{metrics}");
    // The new link delivers.
    assert_eq!(say(&mut bob, &lobby, "received again").await.seq, 3);
    assert_eq!(next_message(&mut ann).await.seq, 3);
}

const ROOMS: usize = 1000;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_rooms_are_repaired_after_a_link_outage() {
    let redis = Redis::start().await;
    let (metrics, tasks) = (Arc::new(Metrics::new()), Tasks::default());
    let (mailboxes, letters) = Mailboxes::new(2, MAILBOX_LEN, metrics.clone());
    let options = redis_options(redis.url(), 16, "n");
    let bus = RedisBus::start(options, None, mailboxes.clone(), metrics.clone(), &tasks).unwrap();
    within(bus.reached()).await.unwrap();
    let bus: Arc<dyn Bus> = Arc::new(bus);
    let hub = start_hub(&bus, mailboxes, letters, &metrics, &tasks);
    let rooms: Vec<RoomId> = (0..ROOMS).map(|i| room(&format!("r{i}"))).collect();
    let outbox = Outbox::to_owner(64 << 20, metrics.clone());
    let member = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
    for room in &rooms {
        let joined =
            hub.join(room.clone(), member.clone(), None, JoinStart::Newest(0), Default::default());
        within(joined).await.unwrap();
    }
    assert_eq!(metrics.rooms.get(), ROOMS as i64);
    redis.command("ACL SETUSER default -subscribe").await;
    redis.command("CLIENT KILL TYPE pubsub").await;
    until("not subscribed", async || bus.failed_check().is_some()).await;
    for room in &rooms {
        let (done, appended) = oneshot::channel();
        let id = MessageId::random();
        bus.append(Append {
            room: room.clone(),
            envelope: Envelope::pack(EnvelopeParts {
                frame: Default::default(),
                author: AuthorHash::of(&"ann".parse().unwrap()),
                id,
                sender: ConnectionId::random(),
                echo: true,
                fields: &message_fields(room, id, Some("x")),
                binary_payload: None,
            }),
            urgent: false,
            unseen: Default::default(),
            deadline: Instant::now() + Duration::from_secs(5),
            ticket: PublishTicket::new(move |result| drop(done.send(result))),
        });
        within(appended).await.unwrap().unwrap();
    }
    assert_eq!(metrics.deliveries.get(), 0);
    redis.command("ACL SETUSER default +subscribe").await;
    until("subscribed again", async || bus.failed_check().is_none()).await;
    let back = Instant::now();
    until("repaired", async || metrics.deliveries.get() == ROOMS as u64).await;
    println!(
        "{ROOMS} rooms with a gap each: repaired {:?} after the link was back",
        back.elapsed()
    );
    assert!(tasks.finish(Duration::from_secs(5)).await);
}
