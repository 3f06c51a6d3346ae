//! The world of a simulation: a heap of what happens when, and everything that is not a gateway.
//!
//! Gateways are tasks of the runtime; what they send is taken from the outlet and arrives later.
//! The clock is the runtime's, which stands still while anything is to be done.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::oneshot, time::Instant};

use super::{
    check::Book,
    client::{Client, Timer, Wish},
    commands::Data,
    links::Link,
    node::{Line, Node},
    redis::Redis,
    shape::Shape,
    trace::Trace,
    wire::Outlet,
};

/// When messages begin to be sent, and when the last fault may begin, ms.
const FIRST_MS: f64 = 1_500.0;
pub const TRAFFIC_MS: f64 = 18_000.0;
/// How long all is left alone after that, and after the last messages.
const REST_MS: f64 = 45_000.0;
const LAST_MS: f64 = 15_000.0;

type Act = Box<dyn FnOnce(&mut World)>;

/// A connection between a client and a gateway.
pub struct Talk {
    pub client: usize,
    pub node: usize,
    process: u64,
    pub line: Line,
    up: f64,
    down: f64,
}

/// Where a gateway runs.
#[derive(Default)]
pub struct Host {
    pub node: Option<Node>,
    pub process: u64,
    /// Redis is not reached from here.
    pub parted: bool,
    /// The server that is taken for the primary here, where it is another one.
    pub sees: Option<usize>,
}

pub struct World {
    pub shape: Shape,
    pub random: StdRng,
    pub now: f64,
    pub hosts: Vec<Host>,
    pub servers: Vec<Redis>,
    pub primary: Option<usize>,
    /// How far the wall clock of Redis was put forward.
    pub skew: f64,
    pub links: BTreeMap<u64, Link>,
    pub talks: BTreeMap<u64, Talk>,
    pub clients: Vec<Client>,
    pub book: Book,
    pub trace: Trace,
    begun: Instant,
    outlet: Outlet,
    heap: BTreeMap<(u64, u64), Act>,
    acts: u64,
    /// Connections that nobody answers.
    pub hung: Vec<oneshot::Sender<()>>,
    over: bool,
    /// All gateways are stopped, until they are started together.
    pub stops_everything: bool,
}

impl World {
    pub fn new(seed: u64, shape: Shape, trace: Trace) -> Self {
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
            Client::new(number, outbox_bytes, rooms)
        });
        let clients = clients.collect();
        let mut world = Self {
            hosts: (0..hosts).map(|_| Host::default()).collect(),
            clients,
            shape,
            random,
            now: 0.0,
            servers: Vec::new(),
            primary: None,
            skew: 0.0,
            links: BTreeMap::new(),
            talks: BTreeMap::new(),
            book: Book::default(),
            trace,
            begun: Instant::now(),
            outlet: Outlet::default(),
            heap: BTreeMap::new(),
            acts: 0,
            hung: Vec::new(),
            over: false,
            stops_everything: false,
        };
        world.primary = Some(world.start_server(Data::default()));
        world
    }

    /// Lives the whole life of the world.
    pub async fn run(mut self) -> Self {
        self.plan();
        while !self.over {
            while let Some(sent) = self.outlet.take() {
                self.catch_up_with_clock();
                self.take(sent);
            }
            let Some((next, _)) = self.heap.keys().next().copied() else { break };
            let due = self.begun + Duration::from_nanos(next);
            if due <= Instant::now() {
                let (_, act) = self.heap.pop_first().expect("it was there");
                self.now = next as f64 / 1e6;
                act(&mut self);
                // What this leads to comes before what happens next.
                tokio::task::yield_now().await;
                continue;
            }
            tokio::select! {
                biased;
                () = self.outlet.filled() => {}
                () = tokio::time::sleep_until(due) => {}
            }
        }
        self.hosts.iter().filter_map(|host| host.node.as_ref()).for_each(|node| node.gate.kill());
        self
    }

    /// A gateway that acted by its own clock did so now. Timers are accurate to a millisecond, and
    /// what happened within this one keeps its finer time.
    fn catch_up_with_clock(&mut self) {
        let clock = self.begun.elapsed().as_secs_f64() * 1e3;
        if clock - self.now >= 1.0 {
            self.now = clock;
        }
    }

    fn plan(&mut self) {
        for node in 0..self.hosts.len() {
            let at = self.random.random_range(0.0..50.0);
            self.at(at, move |world| world.start_node(node));
        }
        for client in 0..self.clients.len() {
            // Some come late.
            let late = self.random.random_range(0..4) == 0;
            let at = if late { self.random.random_range(2e3..12e3) } else { 300.0 };
            self.at(at + client as f64, move |world| world.connect_client(client));
        }
        let mut time = FIRST_MS;
        while time < TRAFFIC_MS {
            time -= self.shape.pause_ms * (1.0 - self.random.random::<f64>()).ln();
            self.at(time, |world| {
                let client = world.random.random_range(0..world.clients.len());
                let place = world.random.random_range(0..world.clients[client].places.len());
                world.say(client, place);
            });
        }
        self.plan_faults();
        self.at(TRAFFIC_MS + REST_MS, |world| {
            super::check::look_before_the_last(world);
            for client in 0..world.clients.len() {
                for place in 0..world.clients[client].places.len() {
                    world.after(client as f64, move |world| world.say(client, place));
                }
            }
        });
        self.at(TRAFFIC_MS + REST_MS + LAST_MS, |world| world.over = true);
    }

    pub fn at(&mut self, time: f64, act: impl FnOnce(&mut Self) + 'static) {
        self.acts += 1;
        let nanos = (time.max(self.now) * 1e6) as u64;
        self.heap.insert((nanos, self.acts), Box::new(act));
    }

    pub fn after(&mut self, wait: f64, act: impl FnOnce(&mut Self) + 'static) {
        self.at(self.now + wait, act);
    }

    /// How long something is on its way.
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
        let node = Node::start(number, host.process, &self.shape, &self.outlet);
        host.node = Some(node);
        let line = format!("G{number}.{} starts", host.process);
        self.trace.note(self.now, &line);
    }

    pub fn connect_client(&mut self, number: usize) {
        if self.clients[number].talk.is_some() || self.clients[number].away {
            return;
        }
        let live: Vec<usize> =
            (0..self.hosts.len()).filter(|host| self.hosts[*host].node.is_some()).collect();
        let chosen = self.random.random_range(0..self.hosts.len());
        let Some(host) = live.get(chosen % live.len().max(1)).copied() else {
            return self.after(100.0, move |world| world.connect_client(number));
        };
        let node = self.hosts[host].node.as_ref().expect("it lives");
        if node.gate.is_frozen() || !node.is_ready() {
            let wait = if node.gate.is_frozen() { 500.0..2000.0 } else { 50.0..500.0 };
            let wait = self.random.random_range(wait);
            return self.after(wait, move |world| world.connect_client(number));
        }
        let (talk, line) = (self.outlet.number(), Line::default());
        let outbox_bytes = self.clients[number].outbox_bytes;
        node.accept(talk, number, outbox_bytes, line.clone());
        let (process, now) = (node.process, self.now);
        let of = Talk { client: number, node: host, process, line, up: now, down: now };
        self.talks.insert(talk, of);
        self.clients[number].talk = Some(talk);
        self.trace.note(self.now, &format!("c{number} connects to G{host}"));
        let wishes = self.clients[number].connected();
        self.grant(number, wishes);
    }

    pub fn close_talk(&mut self, number: u64) {
        let Some(talk) = self.talks.remove(&number) else { return };
        talk.line.close();
        let client = talk.client;
        self.trace.note(self.now, &format!("c{client} is disconnected"));
        self.clients[client].disconnected();
        let wait = self.random.random_range(5.0..500.0);
        self.after(wait, move |world| world.connect_client(client));
    }

    pub fn send_frames(&mut self, number: u64, frames: Vec<Bytes>) {
        for frame in frames {
            let latency = self.latency();
            let now = self.now;
            let Some(talk) = self.talks.get_mut(&number) else { return };
            if self.hosts[talk.node].process != talk.process {
                return;
            }
            let time = (now + latency).max(talk.down + 1e-3);
            talk.down = time;
            self.at(time, move |world| world.hear(number, &frame));
        }
    }

    fn hear(&mut self, number: u64, frame: &[u8]) {
        let Some(talk) = self.talks.get(&number) else { return };
        let (client, process) = (talk.client, (talk.node, talk.process));
        let start = match frame[1] {
            127 => 10,
            126 => 4,
            _ => 2,
        };
        let frame = serde_json::from_slice(&frame[start..]).expect("gateways send JSON");
        self.trace.frame(self.now, client, &frame);
        self.book.note_ack(&frame);
        self.book.note_holder(process, &frame);
        let wishes = self.clients[client].take(self.now, &frame);
        self.grant(client, wishes);
    }

    fn say(&mut self, client: usize, place: usize) {
        let echo = self.random.random_range(0..10) >= 3;
        let (id, wishes) = self.clients[client].say(place, echo);
        self.book.room_of(id, self.clients[client].places[place].room);
        self.grant(client, wishes);
    }

    pub fn grant(&mut self, client: usize, wishes: Vec<Wish>) {
        for wish in wishes {
            match wish {
                Wish::Later(wait, timer) => {
                    self.after(wait, move |world| world.remind(client, timer));
                }
                Wish::Send(frame) => {
                    let latency = self.latency();
                    let now = self.now;
                    let Some(number) = self.clients[client].talk else { continue };
                    let Some(talk) = self.talks.get_mut(&number) else { continue };
                    let time = (now + latency).max(talk.up + 1e-3);
                    talk.up = time;
                    self.at(time, move |world| {
                        if let Some(talk) = world.talks.get(&number) {
                            talk.line.put(frame);
                        }
                    });
                }
            }
        }
    }

    pub fn remind(&mut self, client: usize, timer: Timer) {
        let wishes = self.clients[client].remind(timer);
        self.grant(client, wishes);
    }
}
