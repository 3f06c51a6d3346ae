//! The faults of a run: planned from the seed before it starts, injected here.

use rand::RngExt as _;

use super::{links::RedisLink, shape::SimFault, world::Simulation};

/// When the first fault is injected, ms: the nodes know each other by then.
const FIRST_MS: f64 = 8_000.0;
/// How long bytes in flight on a closed link may still arrive, ms.
const GRACE_MS: f64 = 8.0;
/// The most steps that a truncated Redis loses, and that a new primary lacks.
const TAIL_MAX: usize = 30;
const LAG_MAX: usize = 6;

/// The duration of each step of an ordered stop, ms.
const STOP_MS: f64 = 600.0;

/// The data of a Redis that comes back.
#[derive(Clone, Copy, Debug)]
enum RestartData {
    Complete,
    Empty,
    Without(usize),
}

impl Simulation {
    pub fn plan_faults(&mut self) {
        let mut time = FIRST_MS;
        for _ in 0..self.random.random_range(self.shape.fault_count.clone()) {
            let fault = self.shape.faults[self.random.random_range(0..self.shape.faults.len())];
            self.truth.faults.push(fault);
            self.at(time, move |sim| sim.inject(fault));
            let pause = [3.0, 30.0, 300.0, 1500.0, 3000.0][self.random.random_range(0..5)];
            time += pause * self.random.random_range(0.3..1.5);
        }
    }

    fn log(&mut self, text: &str) {
        self.trace.record(self.now, &format!("### {text}"));
    }

    fn inject(&mut self, fault: SimFault) {
        let host = self.random.random_range(0..self.hosts.len());
        let client = self.random.random_range(0..self.clients.len());
        match fault {
            SimFault::Restart => self.restart(RestartData::Complete),
            SimFault::Empty => self.restart(RestartData::Empty),
            SimFault::Truncated => {
                let steps = self.random.random_range(1..=TAIL_MAX);
                self.restart(RestartData::Without(steps));
            }
            SimFault::Failover => self.fail_over(false),
            SimFault::Zombie => self.fail_over(true),
            SimFault::GatewayKill => self.kill_gateway(host),
            SimFault::Freeze => self.freeze(host),
            SimFault::Cut => self.cut_some(host),
            SimFault::Partition => self.partition(host),
            SimFault::BlackHole => self.black_hole(host),
            SimFault::Mangle => {
                let until = self.now + self.random.random_range(100.0..6000.0);
                self.log(&format!("G{host}: pushes are mangled until {until:.0}"));
                for link in self.links_of(|link| link.node == host) {
                    self.links.entry(link).and_modify(|link| link.mangled_until = until);
                }
            }
            SimFault::Clock => {
                let step = self.random.random_range(-1500.0..1500.0);
                self.skew += step;
                self.log(&format!("Redis' clock is put by {step:.0}"));
            }
            SimFault::ClientCut => {
                self.log(&format!("c{client} is cut"));
                if let Some(connection) = self.clients[client].connection {
                    self.close_connection(connection);
                }
            }
            SimFault::ClientAway => self.send_away(client),
            SimFault::Stall => self.stall(client),
            SimFault::Leave => self.leave(client),
            SimFault::Planned => self.stop_everything(RestartData::Complete),
            SimFault::PlannedTruncated => {
                let steps = self.random.random_range(1..=TAIL_MAX);
                self.stop_everything(RestartData::Without(steps));
            }
        }
    }

    fn restart(&mut self, back: RestartData) {
        let Some(server) = self.primary.filter(|server| self.servers[*server].alive) else {
            return;
        };
        let down = self.random.random_range(10.0..3000.0);
        let name = self.server_name(server);
        self.log(&format!("{name} is killed, and back in {down:.0} with {back:?}"));
        let mut data = std::mem::take(&mut self.servers[server].data);
        match back {
            RestartData::Complete => {}
            RestartData::Empty => data.store = Default::default(),
            RestartData::Without(steps) => data.store.undo(steps),
        }
        self.end_server(server);
        self.primary = None;
        self.after(down, move |sim| {
            let server = sim.start_server(data);
            sim.primary = Some(server);
            let name = sim.server_name(server);
            sim.log(&format!("{name} is up"));
        });
    }

    /// Stops the gateways in order, then Redis, and starts all of them again.
    fn stop_everything(&mut self, back: RestartData) {
        if self.stops_everything || self.primary.is_none_or(|server| !self.servers[server].alive) {
            return;
        }
        self.stops_everything = true;
        self.log(&format!("everything stops in order; Redis is back with {back:?}"));
        for host in 0..self.hosts.len() {
            let Some(node) = &self.hosts[host].node else { continue };
            node.drain();
            // Frames that clients have sent are answered first.
            self.after(STOP_MS, move |sim| {
                for connection in sim.connections_of(host) {
                    sim.close_connection(connection);
                }
            });
            self.after(2.0 * STOP_MS, move |sim| {
                if let Some(node) = &sim.hosts[host].node {
                    node.stop();
                }
            });
            self.after(4.0 * STOP_MS, move |sim| {
                if let Some(node) = sim.hosts[host].node.take() {
                    node.gate.kill();
                }
            });
        }
        self.after(5.0 * STOP_MS, move |sim| sim.restart(back));
        let down = self.random.random_range(0.0..5000.0);
        self.after(5.0 * STOP_MS + down, |sim| {
            sim.stops_everything = false;
            for host in 0..sim.hosts.len() {
                sim.start_node(host);
            }
        });
    }

    /// Ends a server and its connections.
    fn end_server(&mut self, server: usize) {
        self.servers[server].alive = false;
        for link in self.links_of(|link| link.server == server) {
            self.cut(link, GRACE_MS, 0.0);
        }
    }

    fn fail_over(&mut self, zombie: bool) {
        let Some(old) = self.primary.filter(|server| self.servers[*server].alive) else { return };
        let mut data = self.servers[old].data.clone();
        if self.random.random_range(0..10) < 8 {
            data.store.undo(self.random.random_range(1..=LAG_MAX));
        }
        let new = self.start_server(data);
        self.primary = Some(new);
        let (old_name, new_name) = (self.server_name(old), self.server_name(new));
        if !zombie {
            self.log(&format!("{old_name} dies, {new_name} is the primary"));
            return self.end_server(old);
        }
        let mut stay: Vec<usize> = (0..self.hosts.len()).collect();
        stay.retain(|_| self.random.random_range(0..2) == 0);
        let time = self.random.random_range(300.0..14_000.0);
        self.log(&format!("{new_name} is the primary, {old_name} keeps {stay:?} for {time:.0}"));
        for host in &stay {
            self.hosts[*host].believed_primary = Some(old);
        }
        let leaving = stay.clone();
        for link in self.links_of(move |link| link.server == old && !leaving.contains(&link.node)) {
            self.cut(link, GRACE_MS, 0.0);
        }
        self.after(time, move |sim| {
            for host in stay {
                sim.hosts[host].believed_primary = None;
            }
            sim.end_server(old);
            sim.log(&format!("{old_name} has ended"));
        });
    }

    fn kill_gateway(&mut self, number: usize) {
        let Some(node) = self.hosts[number].node.take() else { return };
        let down = self.random.random_range(100.0..5000.0);
        self.log(&format!("G{number}.{} is killed, and back in {down:.0}", node.process));
        node.gate.kill();
        for connection in self.connections_of(number) {
            let wait = self.random.random_range(0.1..5.0);
            self.after(wait, move |sim| sim.close_connection(connection));
        }
        self.after(down, move |sim| {
            // If everything was stopped meanwhile, it starts together.
            if !sim.stops_everything {
                sim.start_node(number);
            }
        });
    }

    fn connections_of(&self, node: usize) -> Vec<u64> {
        let of = self.connections.iter().filter(|(_, connection)| connection.node == node);
        of.map(|(number, _)| *number).collect()
    }

    fn freeze(&mut self, number: usize) {
        let Some(node) = self.hosts[number].node.as_ref().filter(|n| !n.gate.is_frozen()) else {
            return;
        };
        let gate = node.gate.clone();
        let time = self.random.random_range(300.0..15_000.0);
        gate.freeze();
        self.log(&format!("G{number} is frozen for {time:.0}"));
        for connection in self.connections_of(number) {
            if self.random.random_range(0..10) < 7 {
                let wait = self.random.random_range(100.0..3000.0);
                self.after(wait, move |sim| sim.close_connection(connection));
            }
        }
        self.after(time, move |sim| {
            gate.thaw();
            sim.log(&format!("G{number} continues"));
        });
    }

    fn cut_some(&mut self, host: usize) {
        for link in self.links_of(|link| link.node == host) {
            if self.random.random_range(0..10) < 7 {
                self.log(&format!("G{host}: link {link} is cut"));
                self.cut(link, GRACE_MS, 0.0);
            }
        }
    }

    fn partition(&mut self, host: usize) {
        if self.hosts[host].partitioned {
            return;
        }
        let time = self.random.random_range(300.0..13_000.0);
        self.log(&format!("G{host} does not reach Redis for {time:.0}"));
        self.hosts[host].partitioned = true;
        for link in self.links_of(|link| link.node == host) {
            // Some gateways notice by a reset, others by their own timeouts.
            let notice = if self.random.random_range(0..2) == 0 { 500.0 } else { 60_000.0 };
            self.cut(link, 0.0, notice);
        }
        self.after(time, move |sim| {
            sim.hosts[host].partitioned = false;
            sim.log(&format!("G{host} reaches Redis again"));
        });
    }

    fn black_hole(&mut self, host: usize) {
        let until = self.now + self.random.random_range(300.0..9000.0);
        let deafen = |link: &mut RedisLink| link.blocked_until = until;
        for link in self.links_of(|link| link.node == host) {
            if self.random.random_range(0..10) < 7 {
                self.log(&format!("G{host}: link {link} passes nothing until {until:.0}"));
                self.links.entry(link).and_modify(deafen);
            }
        }
    }

    fn send_away(&mut self, client: usize) {
        if self.clients[client].away {
            return;
        }
        let time = self.random.random_range(1000.0..12_000.0);
        self.log(&format!("c{client} is away for {time:.0}"));
        self.clients[client].away = true;
        if let Some(connection) = self.clients[client].connection {
            self.close_connection(connection);
        }
        self.after(time, move |sim| {
            sim.clients[client].away = false;
            sim.connect_client(client);
        });
    }

    fn stall(&mut self, client: usize) {
        let Some(number) = self.clients[client].connection else { return };
        let time = self.random.random_range(300.0..9000.0);
        self.log(&format!("c{client} reads nothing for {time:.0}"));
        let Some(connection) = self.connections.get(&number) else { return };
        let line = connection.input.clone();
        line.stall(true);
        self.after(time, move |_| line.stall(false));
    }

    fn leave(&mut self, client: usize) {
        let place = self.random.random_range(0..self.clients[client].rooms.len());
        let time = self.random.random_range(100.0..6000.0);
        self.log(&format!("c{client} leaves a room for {time:.0}"));
        let action = self.clients[client].leave(place);
        self.perform(client, action.into_iter().collect());
        self.after(time, move |sim| {
            sim.clients[client].rooms[place].wanted = true;
            sim.on_reminder(client, super::client::Reminder::Join(place));
        });
    }
}
