//! The network between gateways and Redis: bytes arrive later, in order, or not at all.

use bytes::Bytes;
use rand::RngExt as _;
use tokio::sync::oneshot;

use super::{
    commands::ServerData,
    network::{NetworkEvent, ReceiveBuffer},
    redis::SimRedis,
    world::Simulation,
};

/// The wall clock at the start, ms.
const WALL_MS: f64 = 1_700_000_000_000.0;

/// A connection between a gateway and a Redis.
pub struct RedisLink {
    pub node: usize,
    pub server: usize,
    pub buffer: ReceiveBuffer,
    up: f64,
    down: f64,
    /// Bytes that arrive after this time are lost.
    pub cut: Option<f64>,
    /// Bytes arrive no earlier than this time.
    pub blocked_until: f64,
    /// Pub/sub messages are dropped, repeated and delayed before this time.
    pub mangled_until: f64,
}

impl Simulation {
    /// Starts a server with `data` and a new run id. Returns its number.
    pub fn start_server(&mut self, data: ServerData) -> usize {
        let mut name =
            || (0..40).map(|_| format!("{:x}", self.random.random_range(0..16))).collect();
        let data = ServerData { run_id: name(), replid: name(), ..data };
        self.servers.push(SimRedis::start(data));
        self.servers.len() - 1
    }

    pub fn server_name(&self, server: usize) -> String {
        format!("R{server}")
    }

    pub fn handle(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Connect { node, process, connection, buffer, done } => {
                let wait = self.latency();
                self.after(wait, move |sim| sim.accept(node, process, connection, buffer, done));
            }
            NetworkEvent::Bytes(connection, bytes) => {
                let latency = self.latency();
                let now = self.now;
                let Some(link) = self.links.get_mut(&connection).filter(|l| l.cut.is_none()) else {
                    return;
                };
                let time = (now + latency).max(link.up + 1e-3).max(link.blocked_until);
                link.up = time;
                self.at(time, move |sim| sim.arrive(connection, &bytes));
            }
            NetworkEvent::Closed(connection) => {
                let latency = self.latency();
                let Some(link) = self.links.get(&connection) else { return };
                let time = (self.now + latency).max(link.up + 1e-3);
                self.at(time, move |sim| sim.forget(connection));
            }
            NetworkEvent::Frames(connection, frames) => self.send_frames(connection, frames),
            NetworkEvent::ClientClosed(connection) => {
                let latency = self.latency();
                self.after(latency, move |sim| sim.close_connection(connection));
            }
        }
    }

    fn accept(
        &mut self,
        node: usize,
        process: u64,
        connection: u64,
        buffer: ReceiveBuffer,
        done: oneshot::Sender<()>,
    ) {
        let host = &self.hosts[node];
        if host.process != process {
            return;
        }
        if host.partitioned {
            self.unanswered.push(done);
            return;
        }
        let server =
            host.believed_primary.or(self.primary).filter(|server| self.servers[*server].alive);
        let Some(server) = server else { return };
        let time = self.now;
        let (cut, deaf_until, mangled_until) = (None, 0.0, 0.0);
        let link = RedisLink {
            node,
            server,
            buffer,
            up: time,
            down: time,
            cut,
            blocked_until: deaf_until,
            mangled_until,
        };
        self.links.insert(connection, link);
        self.servers[server].connect(connection);
        let latency = self.latency();
        self.after(latency, move |_| {
            let _ = done.send(());
        });
    }

    /// Delivers bytes to a server.
    fn arrive(&mut self, connection: u64, bytes: &[u8]) {
        let Some(link) = self.links.get(&connection).filter(|link| link.cut.is_none()) else {
            return;
        };
        let server = link.server;
        if !self.servers[server].alive {
            return;
        }
        self.servers[server].data.now = (WALL_MS + self.now + self.skew) as u64;
        let out = self.servers[server].receive(connection, bytes);
        let added = std::mem::take(&mut self.servers[server].data.store.added);
        for (key, _, payload) in added {
            self.truth.appended(self.now, &key, payload);
        }
        for out in out {
            self.send_down(out.connection, out.bytes, out.is_message);
        }
    }

    fn send_down(&mut self, connection: u64, bytes: Bytes, is_message: bool) {
        let latency = self.latency();
        let dice = self.random.random_range(0..10);
        let now = self.now;
        let Some(link) = self.links.get_mut(&connection).filter(|link| link.cut.is_none()) else {
            return;
        };
        let mut time = (now + latency).max(link.down + 1e-3).max(link.blocked_until);
        if is_message && now < link.mangled_until {
            match dice {
                0..3 => return,
                3..5 => {
                    let bytes = bytes.clone();
                    self.at(time, move |sim| sim.deliver(connection, &bytes));
                    time += 0.5;
                }
                // Late, and behind later messages.
                5..7 => {
                    let time = time + latency * 20.0;
                    return self.at(time, move |sim| sim.deliver(connection, &bytes));
                }
                _ => {}
            }
        }
        if let Some(link) = self.links.get_mut(&connection) {
            link.down = time;
        }
        self.at(time, move |sim| sim.deliver(connection, &bytes));
    }

    fn deliver(&mut self, connection: u64, bytes: &[u8]) {
        let Some(link) = self.links.get(&connection) else { return };
        if link.cut.is_none_or(|cut| self.now <= cut) {
            link.buffer.put(bytes);
        }
    }

    /// A server notices that a connection was closed.
    fn forget(&mut self, connection: u64) {
        if let Some(link) = self.links.remove(&connection) {
            self.servers[link.server].disconnect(connection);
        }
    }

    /// Cuts a link: bytes that arrive within `grace` ms are still delivered, and the gateway
    /// notices the cut `notice` ms later.
    pub fn cut(&mut self, connection: u64, grace: f64, notice: f64) {
        let grace = self.random.random_range(0.0..=grace);
        let cut = self.now + grace;
        let Some(link) = self.links.get_mut(&connection).filter(|link| link.cut.is_none()) else {
            return;
        };
        link.cut = Some(cut);
        let (server, buffer) = (link.server, link.buffer.clone());
        self.servers[server].disconnect(connection);
        self.at(cut + 0.01 + notice, move |_| buffer.close());
    }

    pub fn links_of(&self, of: impl Fn(&RedisLink) -> bool) -> Vec<u64> {
        let open = self.links.iter().filter(|(_, link)| link.cut.is_none() && of(link));
        open.map(|(connection, _)| *connection).collect()
    }
}
