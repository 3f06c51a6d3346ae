//! A simulated gateway: the real hub, publisher, bus and sessions, on connections of the simulated
//! network.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use skein_core::{
    bus::{BoxFuture, Bus, Mailboxes, output_of},
    connection::{handle::ConnectionHandle, outbox::Outbox},
    drain::Tasks,
    history::HistoryReader,
    hub::{Hub, HubOptions, HubServices, MAILBOX_LEN},
    limits::{
        meter::{Meter, MeterRates},
        reads::ReadLimiter,
    },
    presence::{PresenceOptions, PresenceTracker},
    publisher::Publisher,
    rooms::{RoomRules, passwords::Passwords},
    session::{
        ClientLimits, RequestOutcome, Services, Session, SessionLimits,
        auth::{Auth, Credentials},
    },
    telemetry::metrics::Metrics,
};
use skein_protocol::{
    ids::{ConnectionId, SessionId},
    protocol::client_frame::ClientFrame,
};
use skein_redis::{LEASE, RedisBus, RedisOptions, topology::TlsFiles};
use tokio::{sync::Notify, time::Instant};
use uuid::Uuid;

use super::{
    gate::Gate,
    network::{EventQueue, NetworkEvent, SimDial},
    shape::SimShape,
};

/// How long a frame may wait for the bus: the value of `publish.timeout`.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// One process of a gateway.
pub struct SimNode {
    pub process: u64,
    pub gate: Gate,
    tasks: Tasks,
    services: Arc<Services>,
    events: EventQueue,
    reached: Arc<AtomicBool>,
    draining: AtomicBool,
}

/// Frames that a client sent on one connection and the gateway has not read yet. Cheap to clone.
#[derive(Clone, Default)]
pub struct ClientInput(Arc<(Mutex<UnreadFrames>, Notify)>);

#[derive(Default)]
struct UnreadFrames {
    frames: VecDeque<String>,
    closed: bool,
    /// The client reads nothing.
    stalled: bool,
}

impl ClientInput {
    pub fn push(&self, frame: String) {
        self.change(|unread| unread.frames.push_back(frame));
    }

    pub fn close(&self) {
        self.change(|unread| unread.closed = true);
    }

    pub fn stall(&self, stalled: bool) {
        self.change(|unread| unread.stalled = stalled);
    }

    fn change(&self, change: impl FnOnce(&mut UnreadFrames)) {
        change(&mut self.0.0.lock());
        self.0.1.notify_one();
    }
}

impl SimNode {
    pub fn start(node: usize, process: u64, shape: &SimShape, events: &EventQueue) -> Self {
        let gate = Gate::open();
        let tasks = {
            let gate = gate.clone();
            Tasks::wrapped(move |task| gate.hold(task))
        };
        let metrics = Arc::new(Metrics::new());
        let dial = SimDial { node, process, gate: gate.clone(), events: events.clone() };
        let (mailboxes, receivers) = Mailboxes::new(1, MAILBOX_LEN, metrics.clone());
        let options = RedisOptions {
            url: String::new().into(),
            tls: TlsFiles::default(),
            node: format!("n{node}"),
            partitions: shape.partitions,
            lease: LEASE,
            retention: shape.retention.clone(),
            rooms: Default::default(),
            sessions: Default::default(),
            archive_backlog_max: 0,
        };
        let bus_status = mailboxes.node_state().status();
        let redis = Arc::new(RedisBus::start_with(
            Arc::new(dial),
            options,
            mailboxes.clone(),
            metrics.clone(),
            &tasks,
        ));
        let bus: Arc<dyn Bus> = redis.clone();
        let hub_options = HubOptions {
            ring_bytes_max: shape.ring_bytes_max,
            dedup_ids_bytes_max: 16 << 20,
            dedup_window: shape.retention.dedup_window,
            log_ttl: shape.retention.ttl,
            rooms_max: 1000,
            empty_rooms_max: 1000,
            watched_users_max: 1000,
        };
        let presence = PresenceTracker::start(redis.clone(), PresenceOptions::default(), &tasks);
        let rules = Arc::new(RoomRules::default());
        let services = HubServices {
            tracer: Default::default(),
            bus: bus.clone(),
            presence: presence.clone(),
            rules: rules.clone(),
            metrics: metrics.clone(),
            trails: Arc::default(),
        };
        let hub = Hub::start(&services, mailboxes, receivers, hub_options, &tasks);
        let publisher = Publisher {
            tracer: Default::default(),
            bus: bus.clone(),
            store: redis.clone(),
            rules: rules.clone(),
            quotas: Arc::default(),
            metrics: metrics.clone(),
            trails: Arc::default(),
            timeout: WAIT_MAX,
            message_bytes_max: 1 << 18,
        };
        let client_limits = ClientLimits {
            rates: Arc::new(MeterRates::unlimited()),
            rooms_max: 10,
            watches_max: 10,
            read_bytes_per_second: 0,
        };
        let services = Arc::new(Services {
            quotas: Arc::default(),
            publisher,
            hub,
            history: HistoryReader::new(bus.clone(), None),
            bus,
            presence,
            rooms: redis.clone(),
            sessions: redis.clone(),
            auth: ArcSwap::from_pointee(Auth::Anonymous),
            rules,
            passwords: Passwords::new(Default::default(), metrics.clone()),
            reads: ReadLimiter::new(0),
            peer_index: Default::default(),
            bus_status,
            metrics,
            limits: SessionLimits { managed_max: 0, wait_max: WAIT_MAX },
            client_limits: ArcSwap::from_pointee(client_limits),
        });
        let reached = Arc::new(AtomicBool::new(false));
        let reaches = reached.clone();
        tasks.spawn_job("reach", async move {
            redis.reached().await.unwrap();
            reaches.store(true, Ordering::Relaxed);
        });
        Self {
            process,
            gate,
            tasks,
            services,
            events: events.clone(),
            reached,
            draining: false.into(),
        }
    }

    /// Whether the gateway accepts handshakes.
    pub fn is_ready(&self) -> bool {
        let drains = self.draining.load(Ordering::Relaxed);
        !drains
            && self.reached.load(Ordering::Relaxed)
            && self.services.bus.failed_check().is_none()
    }

    /// Accepts no more clients.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Stops all services in order, after the clients have disconnected.
    pub fn stop(&self) {
        self.tasks.leaving().cancel();
        self.tasks.stopped().cancel();
    }

    /// Accepts a client's connection.
    pub fn accept(&self, number: u64, user: usize, outbox_bytes: usize, input: ClientInput) {
        let outbox = Outbox::to_owner(outbox_bytes, self.services.metrics.clone());
        let connection = ConnectionId(Uuid::from_u128(u128::from(number)));
        let handle = Arc::new(ConnectionHandle::new(connection, outbox));
        let user = Some(format!("u{user}"));
        let identity = Auth::Anonymous.identify(&Credentials { user, ..Credentials::default() });
        let identity = identity.unwrap();
        let online = self.services.presence.track_online_soon(&identity.user);
        let session = SessionId(connection.0);
        let services = self.services.clone();
        let session = Session::new(services, identity, session, handle.clone(), online);
        let events = self.events.clone();
        let connection = SimConnection { number, session, handle, input, events };
        // The hook of the campaign records panics.
        self.tasks.spawn_connection(connection.run(), |_| {});
    }
}

/// A client's connection, driven as `transport` does.
struct SimConnection {
    number: u64,
    session: Session,
    handle: Arc<ConnectionHandle>,
    input: ClientInput,
    events: EventQueue,
}

impl SimConnection {
    async fn run(mut self) {
        let handle = self.handle.clone();
        let outbox = &handle.outbox;
        let input = self.input.clone();
        let mut performing: Option<BoxFuture<RequestOutcome>> = None;
        let mut meter = Meter::new(Arc::new(MeterRates::unlimited()), None);
        loop {
            let mut full = false;
            while performing.is_none() && !full {
                if input.0.0.lock().closed {
                    self.session.end().await;
                    outbox.discard();
                    return;
                }
                full = outbox.is_full();
                if !full {
                    let Some(frame) = input.0.0.lock().frames.pop_front() else { break };
                    self.session.handle_evictions().await;
                    let frame = ClientFrame::from_text(&frame);
                    let request = self.session.handle_frame(frame, &mut meter, Instant::now());
                    performing = request.map(|request| self.session.execute(request));
                }
            }
            if outbox.begin_close().is_some() {
                self.events.push(NetworkEvent::ClientClosed(self.number));
                input.close();
            }
            if !input.0.0.lock().stalled {
                let frames = outbox.take();
                if !frames.is_empty() {
                    self.events.push(NetworkEvent::Frames(self.number, frames));
                    if full {
                        continue;
                    }
                }
            }
            if performing.is_none() {
                self.session.handle_evictions().await;
            }
            self.session.handle_signals().await;
            // All arms are cancel-safe: the request in progress is kept.
            tokio::select! {
                biased;
                () = input.0.1.notified() => {}
                () = outbox.woken() => {}
                outcome = output_of(&mut performing), if performing.is_some() => {
                    performing = None;
                    let _ = self.session.complete(outcome);
                }
            }
        }
    }
}
