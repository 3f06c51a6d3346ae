//! The measured servers, as processes on a CPU of their own.
//!
//! Each is started anew for every round, on ports of its own, and killed by its pid.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde::Serialize;
use skein_testkit::servers::free_address;
use tempfile::TempDir;
use tokio::time::Instant;

use super::error::BenchError;
use crate::procfs::CpuTime;

/// CPU of the servers. The load runs on the other.
const SERVER_CPU: &str = "0";
const LOAD_CPU: &str = "1";
/// Time limit for a server to become ready. Nodes on a new Redis wait for other nodes that may know
/// it.
const READY_TIMEOUT: Duration = Duration::from_secs(40);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Secret of the tokens in the row that verifies them, and a token for it:
/// `{"sub":"bench","exp":4102444800}`.
const SECRET: &str = "a secret for nothing but the bench";
pub(crate) const TOKEN: &str = concat!(
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJiZW5jaCIsImV4cCI6NDEwMjQ0NDgwMH0",
    ".mMWUI-w3ESTRd_e3lrO2fOmp4qOZgqlZ7x1K-nVqilc"
);

/// Options of the gateway beside its addresses: the defaults, except for limits that a load from
/// one address would exceed.
pub(crate) const GATEWAY_OPTIONS: [&str; 8] = [
    "limits.connections_per_ip=0",
    "limits.handshakes_per_minute_per_ip=0",
    "limits.connections_per_user=0",
    "limits.messages_per_second=0",
    "limits.accepts_per_second=0",
    "limits.durable_bytes_per_minute=0",
    "limits.new_inboxes_per_hour=0",
    "limits.new_rooms_per_minute=0",
];

/// A server that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Candidate {
    /// One `write(2)` per frame and socket.
    Baseline,
    /// As `Baseline`, with coalesced writes.
    CoalescingBaseline,
    /// A simple chat with axum and tokio.
    Naive,
    /// Another build of the gateway.
    Previous,
    /// The gateway.
    Skein,
}

/// Where the programs are, and where they run.
#[derive(Debug)]
pub(crate) struct BenchEnvironment {
    /// Directory of `gateway` and `examples/`.
    pub(crate) programs: PathBuf,
    /// Another gateway to compare with, and the options that it knows.
    previous: Option<(PathBuf, String)>,
    /// Whether servers and load have a CPU each.
    pub(crate) pinned: bool,
}

/// A server process.
#[derive(Debug)]
struct BenchServer {
    child: Child,
    address: SocketAddr,
}

/// All servers of one candidate.
#[derive(Debug)]
pub(crate) struct BenchServers {
    nodes: Vec<BenchServer>,
    redis: Option<BenchServer>,
    // Last, so that it outlives the processes that write into it.
    _scratch: TempDir,
}

/// CPU time of all servers, and the part of Redis.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ServerCpu {
    pub(crate) user_ms: u64,
    pub(crate) system_ms: u64,
    pub(crate) redis_ms: u64,
}

impl Candidate {
    /// All candidates, in the order of the table.
    pub(crate) const ALL: [Self; 5] =
        [Self::Baseline, Self::CoalescingBaseline, Self::Naive, Self::Previous, Self::Skein];

    /// Whether it is one process that only writes.
    fn is_baseline(self) -> bool {
        matches!(self, Self::Baseline | Self::CoalescingBaseline)
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Baseline => "baseline",
            Self::CoalescingBaseline => "coalescing baseline",
            Self::Naive => "naive axum",
            Self::Previous => "previous",
            Self::Skein => "Skein",
        })
    }
}

impl Drop for BenchServer {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BenchEnvironment {
    /// Moves this process to the CPU of the load if there is more than one. With a `previous`
    /// gateway only that and the gateway are measured.
    pub(crate) fn new(programs: PathBuf, previous: Option<PathBuf>) -> Result<Self, BenchError> {
        let previous = match previous {
            Some(path) => {
                let program = format!("{} --options", path.display());
                let output = Command::new(&path).arg("--options").output();
                let output = output.map_err(|source| BenchError::Start { program, source })?;
                Some((path, String::from_utf8_lossy(&output.stdout).into_owned()))
            }
            None => None,
        };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let own = std::process::id().to_string();
        let mut taskset = Command::new("taskset");
        taskset.args(["-cp", LOAD_CPU, &own]).stdout(Stdio::null()).stderr(Stdio::null());
        let pinned = cpus > 1 && taskset.status().is_ok_and(|status| status.success());
        Ok(Self { programs, previous, pinned })
    }

    /// Whether a candidate is measured.
    pub(crate) fn has(&self, candidate: Candidate) -> bool {
        match candidate {
            Candidate::Skein => true,
            Candidate::Previous => self.previous.is_some(),
            Candidate::Baseline | Candidate::CoalescingBaseline | Candidate::Naive => {
                self.previous.is_none()
            }
        }
    }

    /// Starts a candidate with `nodes` nodes.
    pub(crate) fn start(
        &self,
        candidate: Candidate,
        nodes: usize,
        token: bool,
    ) -> Result<BenchServers, BenchError> {
        let scratch = TempDir::new().map_err(BenchError::Scratch)?;
        // The baseline is one process: it measures the writes alone.
        let redis = match candidate {
            Candidate::Naive | Candidate::Previous | Candidate::Skein if nodes > 1 => {
                Some(self.redis(scratch.path())?)
            }
            _ => None,
        };
        let url = redis.as_ref().map(|redis| format!("redis://{}", redis.address));
        let count = if candidate.is_baseline() { 1 } else { nodes };
        let start = |number: usize| {
            let command = self.command(candidate, url.as_deref(), token);
            self.launch(command, &scratch.path().join(format!("node-{number}.log")))
        };
        let nodes = (0..count).map(start).collect::<Result<Vec<_>, _>>()?;
        if !candidate.is_baseline() {
            nodes.iter().try_for_each(BenchServer::wait_until_ready)?;
        }
        Ok(BenchServers { nodes, redis, _scratch: scratch })
    }

    /// Starts a Redis as `make cluster` does.
    pub(crate) fn start_redis(&self) -> Result<BenchServers, BenchError> {
        let scratch = TempDir::new().map_err(BenchError::Scratch)?;
        let redis = self.redis(scratch.path())?;
        Ok(BenchServers { nodes: Vec::new(), redis: Some(redis), _scratch: scratch })
    }

    fn command(&self, candidate: Candidate, redis: Option<&str>, token: bool) -> Command {
        let program = match (candidate, &self.previous) {
            (Candidate::Previous, Some((program, _))) => program.clone(),
            (Candidate::Baseline | Candidate::CoalescingBaseline, _) => {
                self.programs.join("examples/baseline")
            }
            (Candidate::Naive, _) => self.programs.join("examples/naive_chat"),
            (Candidate::Skein | Candidate::Previous, _) => self.programs.join("gateway"),
        };
        let mut command = self.on_its_cpu(&program);
        match (candidate, redis) {
            (Candidate::Naive, Some(redis)) => {
                command.env("REDIS", redis);
            }
            (Candidate::Skein | Candidate::Previous, redis) => {
                let own = [
                    "server.listen=127.0.0.1:0",
                    "admin.listen=127.0.0.1:0",
                    "log.format=json",
                    "archive.url=",
                ];
                let mut options: Vec<String> =
                    own.into_iter().chain(GATEWAY_OPTIONS).map(str::to_owned).collect();
                if let Some(redis) = redis {
                    options.push(format!("cluster.redis_url={redis}"));
                    options.push("auth.allow_anonymous=true".to_owned());
                }
                if token {
                    options.push("auth.mode=jwt".to_owned());
                    options.push(format!("auth.jwt_secret={SECRET}"));
                }
                if let (Candidate::Previous, Some((_, known))) = (candidate, &self.previous) {
                    let key = |option: &str| option.split('=').next().map(|key| format!("`{key}`"));
                    options.retain(|option| key(option).is_some_and(|key| known.contains(&key)));
                }
                for option in options {
                    command.arg("--set").arg(option);
                }
            }
            (Candidate::CoalescingBaseline, _) => {
                command.arg("--coalesce");
            }
            (Candidate::Baseline | Candidate::Naive, _) => {}
        }
        command
    }

    fn on_its_cpu(&self, program: &Path) -> Command {
        if !self.pinned {
            return Command::new(program);
        }
        // taskset executes the program in its own process, so the pid is the program's.
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CPU]).arg(program);
        command
    }

    /// Starts a program that logs its listen address.
    fn launch(&self, mut command: Command, log: &Path) -> Result<BenchServer, BenchError> {
        let program = format!("{command:?}");
        let failed = |source| BenchError::Start { program: program.clone(), source };
        let file = File::create(log).map_err(BenchError::Scratch)?;
        let mut child = command.stdin(Stdio::null()).stderr(file).spawn().map_err(failed)?;
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let text = std::fs::read_to_string(log).map_err(BenchError::Scratch)?;
            if let Some(address) = listen_address(&text) {
                return Ok(BenchServer { child, address });
            }
            if deadline < Instant::now() || child.try_wait().map_err(failed)?.is_some() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(BenchError::NotReady { program, log: text });
            }
            pause();
        }
    }

    fn redis(&self, scratch: &Path) -> Result<BenchServer, BenchError> {
        let address = free_address().map_err(BenchError::Scratch)?;
        let mut command = self.on_its_cpu(Path::new("redis-server"));
        command
            .args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""])
            .args(["--appendonly", "yes", "--maxmemory-policy", "noeviction", "--dir"])
            .arg(scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let program = format!("{command:?}");
        let child = command.spawn();
        let child =
            child.map_err(|source| BenchError::Start { program: program.clone(), source })?;
        let server = BenchServer { child, address };
        server.wait_for(b"PING\r\n", "+PONG")?;
        Ok(server)
    }
}

impl BenchServer {
    fn wait_until_ready(&self) -> Result<(), BenchError> {
        self.wait_for(
            b"GET /ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n",
            "HTTP/1.1 200",
        )
    }

    /// Sends a request repeatedly until the first line of the reply begins with `answer`.
    fn wait_for(&self, request: &[u8], response: &str) -> Result<(), BenchError> {
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect(self.address)?;
            stream.set_read_timeout(Some(READY_TIMEOUT))?;
            stream.write_all(request)?;
            let mut line = String::new();
            BufReader::new(stream.take(1024)).read_line(&mut line)?;
            Ok(line)
        };
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let reply = ask();
            if reply.as_ref().is_ok_and(|line| line.starts_with(response)) {
                return Ok(());
            }
            if deadline < Instant::now() {
                let program = format!("the server at {}", self.address);
                return Err(BenchError::NotReady { program, log: format!("{reply:?}") });
            }
            pause();
        }
    }
}

impl BenchServers {
    /// Addresses for clients.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.address).collect()
    }

    /// Address of Redis.
    pub(crate) fn redis_address(&self) -> Option<SocketAddr> {
        Some(self.redis.as_ref()?.address)
    }

    /// Kills a node, which may have ended by itself.
    pub(crate) fn kill(&mut self, node: usize) {
        let _ = self.nodes[node].child.kill();
    }

    /// Process ids of the nodes.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.nodes.iter().map(|node| node.child.id()).collect()
    }

    /// CPU time of all processes since their start.
    pub(crate) fn cpu_time(&self) -> Result<ServerCpu, BenchError> {
        let mut sum = ServerCpu::default();
        let cpu_of = |server: &BenchServer| CpuTime::read(Some(server.child.id()));
        for server in self.nodes.iter().chain(&self.redis) {
            let cpu = cpu_of(server)?;
            sum.user_ms += cpu.user_ms;
            sum.system_ms += cpu.system_ms;
        }
        if let Some(redis) = &self.redis {
            sum.redis_ms = cpu_of(redis)?.total_ms();
        }
        Ok(sum)
    }
}

impl ServerCpu {
    /// CPU time since an earlier reading.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            user_ms: self.user_ms - before.user_ms,
            system_ms: self.system_ms - before.system_ms,
            redis_ms: self.redis_ms - before.redis_ms,
        }
    }

    /// User and system time.
    pub(crate) fn total_ms(self) -> u64 {
        self.user_ms + self.system_ms
    }
}

/// Finds the listen address in a log.
fn listen_address(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.split_once(r#""listen":""#)?;
    rest.split_once('"')?.0.parse().ok()
}

#[expect(clippy::disallowed_methods, reason = "the bench has a thread of its own")]
fn pause() {
    std::thread::sleep(POLL_INTERVAL);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_address_is_found_in_a_log() {
        let log = "{\"level\":\"WARN\"}\n{\"message\":\"ready\",\"listen\":\"127.0.0.1:81\"}\n";
        assert_eq!(listen_address(log), Some(SocketAddr::from(([127, 0, 0, 1], 81))));
        assert_eq!(listen_address("{\"listen\":\"127.0."), None);
    }
}
