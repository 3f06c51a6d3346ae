//! The simulated world: a heap of scheduled events, and everything that is not a gateway.
//!
//! Gateways are tasks of the runtime; the events that they emit are taken from the event queue and
//! take effect later. The clock is the runtime's, which stands still while any task can run.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::oneshot, time::Instant};

use super::{
    check::GroundTruth,
    client::{ClientAction, Reminder, SimClient},
    commands::ServerData,
    links::RedisLink,
    network::EventQueue,
    node::{ClientInput, SimNode},
    redis::SimRedis,
    shape::SimShape,
    trace::Trace,
};

/// When clients begin to send messages, and the latest start of a fault, ms.
const FIRST_MS: f64 = 1_500.0;
pub const TRAFFIC_MS: f64 = 18_000.0;
/// The rest without faults after that, and the time after the last messages, ms.
const REST_MS: f64 = 45_000.0;
const LAST_MS: f64 = 15_000.0;

type ScheduledEvent = Box<dyn FnOnce(&mut Simulation)>;

/// A connection between a client and a gateway.
pub struct ClientLink {
    pub client: usize,
    pub node: usize,
    process: u64,
    pub input: ClientInput,
    up: f64,
    down: f64,
}

/// The host of a gateway.
#[derive(Default)]
pub struct Host {
    pub node: Option<SimNode>,
    pub process: u64,
    /// The host does not reach Redis.
    pub partitioned: bool,
    /// The server that this host takes for the primary, if it is not the real one.
    pub believed_primary: Option<usize>,
}

pub struct Simulation {
    pub shape: SimShape,
    pub random: StdRng,
    pub now: f64,
    pub hosts: Vec<Host>,
    pub servers: Vec<SimRedis>,
    pub primary: Option<usize>,
    /// How far the wall clock of Redis was moved forward, ms.
    pub skew: f64,
    pub links: BTreeMap<u64, RedisLink>,
    pub connections: BTreeMap<u64, ClientLink>,
    pub clients: Vec<SimClient>,
    pub truth: GroundTruth,
    pub trace: Trace,
    begun: Instant,
    events: EventQueue,
    heap: BTreeMap<(u64, u64), ScheduledEvent>,
    scheduled: u64,
    /// Connections that are never accepted.
    pub unanswered: Vec<oneshot::Sender<()>>,
    over: bool,
    /// Whether all gateways are stopped, until they start together.
    pub stops_everything: bool,
}

impl Simulation {
    pub fn new(seed: u64, shape: SimShape, trace: Trace) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let hosts = random.random_range(shape.gateways.clone());
        let clients = random.random_range(shape.clients.clone());
        let clients = (0..clients).map(|number| {
            let some = shape.outbox_bytes;
            let outbox_bytes = some[random.random_range(0..some.len())];
            let mut rooms: Vec<usize> = (0..shape.rooms).collect();
            if random.random_range(0..3) == 0 {
                rooms.swap_remove(random.random_range(0..rooms.len()));
            }
            SimClient::new(number, outbox_bytes, rooms)
        });
        let clients = clients.collect();
        let mut sim = Self {
            hosts: (0..hosts).map(|_| Host::default()).collect(),
            clients,
            shape,
            random,
            now: 0.0,
            servers: Vec::new(),
            primary: None,
            skew: 0.0,
            links: BTreeMap::new(),
            connections: BTreeMap::new(),
            truth: GroundTruth::default(),
            trace,
            begun: Instant::now(),
            events: EventQueue::default(),
            heap: BTreeMap::new(),
            scheduled: 0,
            unanswered: Vec::new(),
            over: false,
            stops_everything: false,
        };
        sim.primary = Some(sim.start_server(ServerData::default()));
        sim
    }

    /// Runs the simulation to its end.
    pub async fn run(mut self) -> Self {
        self.plan();
        while !self.over {
            while let Some(sent) = self.events.pop() {
                self.catch_up_with_clock();
                self.handle(sent);
            }
            let Some((next, _)) = self.heap.keys().next().copied() else { break };
            let due = self.begun + Duration::from_nanos(next);
            if due <= Instant::now() {
                let (_, act) = self.heap.pop_first().expect("it was there");
                self.now = next as f64 / 1e6;
                act(&mut self);
                // The consequences of this event come before the next event.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                biased;
                () = self.events.filled() => {}
                () = tokio::time::sleep_until(due) => {}
            }
        }
        self.hosts.iter().filter_map(|host| host.node.as_ref()).for_each(|node| node.gate.kill());
        self
    }

    /// Advances `now` after a gateway has acted by its own clock. Timers are accurate to a
    /// millisecond; events within the present millisecond keep their finer time.
    fn catch_up_with_clock(&mut self) {
        let clock = self.begun.elapsed().as_secs_f64() * 1e3;
        if clock - self.now >= 1.0 {
            self.now = clock;
        }
    }

    fn plan(&mut self) {
        for node in 0..self.hosts.len() {
            let at = self.random.random_range(0.0..50.0);
            self.at(at, move |sim| sim.start_node(node));
        }
        for client in 0..self.clients.len() {
            // Some clients connect late.
            let late = self.random.random_range(0..4) == 0;
            let at = if late { self.random.random_range(2e3..12e3) } else { 300.0 };
            self.at(at + client as f64, move |sim| sim.connect_client(client));
        }
        let mut time = FIRST_MS;
        while time < TRAFFIC_MS {
            time -= self.shape.pause_ms * (1.0 - self.random.random::<f64>()).ln();
            self.at(time, |sim| {
                let client = sim.random.random_range(0..sim.clients.len());
                let room = sim.random.random_range(0..sim.clients[client].rooms.len());
                sim.publish(client, room);
            });
        }
        self.plan_faults();
        self.at(TRAFFIC_MS + REST_MS, |sim| {
            super::check::record_silent_losses(sim);
            for client in 0..sim.clients.len() {
                for room in 0..sim.clients[client].rooms.len() {
                    sim.after(client as f64, move |sim| sim.publish(client, room));
                }
            }
        });
        self.at(TRAFFIC_MS + REST_MS + LAST_MS, |sim| sim.over = true);
    }

    pub fn at(&mut self, time: f64, act: impl FnOnce(&mut Self) + 'static) {
        self.scheduled += 1;
        let nanos = (time.max(self.now) * 1e6) as u64;
        self.heap.insert((nanos, self.scheduled), Box::new(act));
    }

    pub fn after(&mut self, wait: f64, act: impl FnOnce(&mut Self) + 'static) {
        self.at(self.now + wait, act);
    }

    /// The latency of one transmission, ms.
    pub fn latency(&mut self) -> f64 {
        let slow = self.random.random_range(0..100) >= 92;
        self.random.random_range(if slow { 3.0..60.0 } else { 0.2..3.0 })
    }

    pub fn start_node(&mut self, number: usize) {
        let host = &mut self.hosts[number];
        if host.node.is_some() {
            return;
        }
        host.process += 1;
        let node = SimNode::start(number, host.process, &self.shape, &self.events);
        host.node = Some(node);
        let line = format!("G{number}.{} starts", host.process);
        self.trace.record(self.now, &line);
    }

    pub fn connect_client(&mut self, number: usize) {
        if self.clients[number].connection.is_some() || self.clients[number].away {
            return;
        }
        let live: Vec<usize> =
            (0..self.hosts.len()).filter(|host| self.hosts[*host].node.is_some()).collect();
        let chosen = self.random.random_range(0..self.hosts.len());
        let Some(host) = live.get(chosen % live.len().max(1)).copied() else {
            return self.after(100.0, move |sim| sim.connect_client(number));
        };
        let node = self.hosts[host].node.as_ref().expect("it lives");
        if node.gate.is_frozen() || !node.is_ready() {
            let wait = if node.gate.is_frozen() { 500.0..2000.0 } else { 50.0..500.0 };
            let wait = self.random.random_range(wait);
            return self.after(wait, move |sim| sim.connect_client(number));
        }
        let (link, input) = (self.events.next_id(), ClientInput::default());
        let outbox_bytes = self.clients[number].outbox_bytes;
        node.accept(link, number, outbox_bytes, input.clone());
        let (process, now) = (node.process, self.now);
        let of = ClientLink { client: number, node: host, process, input, up: now, down: now };
        self.connections.insert(link, of);
        self.clients[number].connection = Some(link);
        self.trace.record(self.now, &format!("c{number} connects to G{host}"));
        let actions = self.clients[number].connected();
        self.perform(number, actions);
    }

    pub fn close_connection(&mut self, number: u64) {
        let Some(link) = self.connections.remove(&number) else { return };
        link.input.close();
        let client = link.client;
        self.trace.record(self.now, &format!("c{client} is disconnected"));
        self.clients[client].disconnected();
        let wait = self.random.random_range(5.0..500.0);
        self.after(wait, move |sim| sim.connect_client(client));
    }

    pub fn send_frames(&mut self, number: u64, frames: Vec<Bytes>) {
        for frame in frames {
            let latency = self.latency();
            let now = self.now;
            let Some(link) = self.connections.get_mut(&number) else { return };
            if self.hosts[link.node].process != link.process {
                return;
            }
            let time = (now + latency).max(link.down + 1e-3);
            link.down = time;
            self.at(time, move |sim| sim.deliver_frame(number, &frame));
        }
    }

    fn deliver_frame(&mut self, number: u64, frame: &[u8]) {
        let Some(link) = self.connections.get(&number) else { return };
        let (client, process) = (link.client, (link.node, link.process));
        let start = match frame[1] {
            127 => 10,
            126 => 4,
            _ => 2,
        };
        let frame = serde_json::from_slice(&frame[start..]).expect("gateways send JSON");
        self.trace.frame(self.now, client, &frame);
        self.truth.note_ack(&frame);
        self.truth.note_holder(process, &frame);
        let actions = self.clients[client].handle_frame(self.now, &frame);
        self.perform(client, actions);
    }

    fn publish(&mut self, client: usize, room: usize) {
        let echo = self.random.random_range(0..10) >= 3;
        let (id, actions) = self.clients[client].publish(room, echo);
        self.truth.room_of(id, self.clients[client].rooms[room].room);
        self.perform(client, actions);
    }

    pub fn perform(&mut self, client: usize, actions: Vec<ClientAction>) {
        for action in actions {
            match action {
                ClientAction::Later(wait, timer) => {
                    self.after(wait, move |sim| sim.on_reminder(client, timer));
                }
                ClientAction::Send(frame) => {
                    let latency = self.latency();
                    let now = self.now;
                    let Some(number) = self.clients[client].connection else { continue };
                    let Some(link) = self.connections.get_mut(&number) else { continue };
                    let time = (now + latency).max(link.up + 1e-3);
                    link.up = time;
                    self.at(time, move |sim| {
                        if let Some(link) = sim.connections.get(&number) {
                            link.input.push(frame);
                        }
                    });
                }
            }
        }
    }

    pub fn on_reminder(&mut self, client: usize, timer: Reminder) {
        let actions = self.clients[client].on_reminder(timer);
        self.perform(client, actions);
    }
}
