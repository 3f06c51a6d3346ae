//! The time it takes to put one message into 1,000 outboxes. `make bench-micro` runs it.
//!
//! Without sockets: the kernel determines the cost of a write, which `make bench` measures.

#![allow(clippy::unwrap_used, reason = "a bench that panics has failed")]

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use divan::{Bencher, counter::ItemsCount};
use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts};
use skein_core::{
    bus::{Append, Bus, Mailboxes, Retention, memory::MemoryBus, ticket::PublishTicket},
    connection::{handle::ConnectionHandle, outbox::Outbox},
    delivery::join::JoinStart,
    drain::Tasks,
    hub::{Hub, HubOptions, HubServices},
    presence::{PresenceOptions, PresenceTracker},
    telemetry::metrics::Metrics,
};
use skein_protocol::ids::{ConnectionId, MessageId, RoomId};
use skein_websocket::{Opcode, encode};
use tokio::time::Instant;

const MEMBERS: usize = 1_000;

fn main() {
    divan::main();
}

/// The queues alone: a shared frame is put into each, and taken out again.
#[divan::bench]
fn outboxes(bencher: Bencher<'_, '_>) {
    let outboxes: Vec<Outbox> =
        (0..MEMBERS).map(|_| Outbox::to_owner(1 << 20, Arc::default())).collect();
    let frame: Bytes = encode(Opcode::Text, &[&[b'x'; 430]]);
    bencher.counter(ItemsCount::new(MEMBERS)).bench_local(|| {
        for outbox in &outboxes {
            let _ = outbox.offer(&frame);
        }
        outboxes.iter().map(|outbox| outbox.take().len()).sum::<usize>()
    });
}

/// A publish through log, mailbox, replica and ring to all members of a room.
#[divan::bench]
fn publish_to_members(bencher: Bencher<'_, '_>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let room: RoomId = "bench".parse().unwrap();
    let world = runtime.block_on(FanOutBench::start(&room));
    bencher.counter(ItemsCount::new(MEMBERS)).bench_local(|| {
        runtime.block_on(world.publish(&room));
    });
}

struct FanOutBench {
    bus: Arc<dyn Bus>,
    _hub: Hub,
    members: Vec<Arc<ConnectionHandle>>,
}

impl FanOutBench {
    async fn start(room: &RoomId) -> Self {
        let (tasks, metrics) = (Tasks::default(), Arc::new(Metrics::new()));
        let (mailboxes, receivers) = Mailboxes::new(1, 16_384, metrics.clone());
        let memory = MemoryBus::start(
            retention(),
            &Default::default(),
            &Default::default(),
            mailboxes.clone(),
            &tasks,
        );
        let presence =
            PresenceTracker::start(Arc::new(memory.clone()), PresenceOptions::default(), &tasks);
        let bus: Arc<dyn Bus> = Arc::new(memory);
        let options = HubOptions {
            ring_bytes_max: 1 << 28,
            dedup_ids_bytes_max: 1 << 26,
            dedup_window: Duration::from_secs(600),
            log_ttl: Duration::from_secs(3600),
            rooms_max: 1 << 20,
            empty_rooms_max: 1 << 20,
            watched_users_max: 1 << 20,
        };
        let services = HubServices {
            tracer: Default::default(),
            bus: bus.clone(),
            presence,
            rules: Arc::default(),
            metrics: metrics.clone(),
            trails: Arc::default(),
        };
        let hub = Hub::start(&services, mailboxes, receivers, options, &tasks);
        let mut members = Vec::new();
        for _ in 0..MEMBERS {
            let outbox = Outbox::to_owner(1 << 20, metrics.clone());
            let member = Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox));
            let (start, entered) = (JoinStart::Newest(0), Default::default());
            hub.join(room.clone(), member.clone(), None, start, entered).await.unwrap();
            member.outbox.take();
            members.push(member);
        }
        Self { bus, _hub: hub, members }
    }

    async fn publish(&self, room: &RoomId) {
        let content = "x".repeat(128);
        self.bus.append(Append {
            room: room.clone(),
            envelope: Envelope::pack(EnvelopeParts {
                frame: Default::default(),
                author: AuthorHash::of(&"ann".parse().unwrap()),
                id: MessageId::random(),
                sender: ConnectionId::random(),
                echo: true,
                fields: &format!(r#""room":"bench","content":"{content}""#),
                binary_payload: None,
            }),
            urgent: false,
            unseen: Default::default(),
            deadline: Instant::now() + Duration::from_secs(5),
            ticket: PublishTicket::new(|appended| assert!(appended.is_ok())),
        });
        for member in &self.members {
            while member.outbox.take().is_empty() {
                tokio::task::yield_now().await;
            }
        }
    }
}

fn retention() -> Retention {
    Retention {
        entries_min: 1000,
        window: Duration::from_secs(120),
        bytes_max: 16 << 20,
        memory_bytes_max: 1 << 30,
        ttl: Duration::from_secs(3600),
        dedup_window: Duration::from_secs(600),
        inboxes: Default::default(),
        limits: Default::default(),
    }
}
