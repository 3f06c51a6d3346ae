//! Servers for tests: a gateway in this process, gateways as processes, Redis, nginx.
//!
//! Each server gets a free port and is stopped by its pid when its handle is dropped.

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use gateway::{
    config::{Config, ConfigSources},
    server::Server,
};
use skein_client::{
    connection::{ClientConnection, ReceivedMessage},
    frames,
    options::{ConnectError, ConnectOptions},
};
use skein_core::{
    bus::{
        Bus, Mailboxes, Retention, ShardReceiver, memory::MemoryBus, room_store::RoomStoreOptions,
    },
    drain::Tasks,
    hub::{Hub, HubOptions, HubServices},
    presence::{PresenceOptions, PresenceTracker},
    telemetry::metrics::Metrics,
};
use skein_protocol::{
    ids::{MessageId, RoomId},
    protocol::server_frame::{AckFrame, MessageFrame, ServerFrame},
};
use skein_redis::{LEASE, RedisOptions, topology::TlsFiles};
use skein_testkit::servers::{self, ServerProcess};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
    time::{Instant, timeout},
};

/// How long anything may take before a test gives up. Far above what it takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Options that every gateway of a test has: free ports, no limits for the one address that all
/// come from.
const DEFAULTS: [(&str, &str); 13] = [
    ("server.listen", "127.0.0.1:0"),
    ("admin.listen", "127.0.0.1:0"),
    ("drain.delay", "1ms"),
    ("limits.connections_per_ip", "0"),
    ("limits.connections_per_user", "0"),
    ("limits.handshakes_per_minute_per_ip", "0"),
    ("limits.durable_bytes_per_minute", "0"),
    ("limits.new_inboxes_per_hour", "0"),
    ("limits.new_rooms_per_minute", "0"),
    ("limits.http_requests_per_second_per_ip", "0"),
    ("limits.api_key_failures_per_second_per_ip", "0"),
    // Tests put their clients where they like, and a busy machine gives nodes time to move them.
    ("rebalance.per_second", "0"),
    ("archive.url", ""),
];

/// The option for a lease that a test waits for: longer than what a busy machine takes to renew it.
pub const SHORT_LEASE_OPTION: (&str, &str) = ("cluster.lease", "4s");
/// How long that is.
pub const SHORT_LEASE: Duration = Duration::from_secs(4);

/// Whether conformance tests run on every backend; with `SKEIN_BACKENDS=memory` only on that which
/// is in memory (`make check`).
pub fn with_redis() -> bool {
    match std::env::var("SKEIN_BACKENDS").as_deref() {
        Err(_) => true,
        Ok("memory") => false,
        Ok(other) => panic!("SKEIN_BACKENDS: there are no backends `{other}`"),
    }
}

fn options(extra: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = DEFAULTS.iter().chain(extra);
    pairs.map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A gateway in this process.
pub struct Gateway {
    server: Option<Server>,
    pub address: SocketAddr,
    pub admin: SocketAddr,
}

impl Gateway {
    /// A single node with `extra` options.
    pub async fn start(extra: &[(&str, &str)]) -> Self {
        let sources = ConfigSources {
            file: None,
            environment: Some(Default::default()),
            flags: options(extra),
        };
        let config = Config::load(sources).unwrap_or_else(|errors| panic!("{errors}"));
        skein_core::telemetry::start_log(config.log_format, "off", &config.node);
        let server = Box::pin(Server::start(config)).await.unwrap();
        Self { address: server.listen, admin: server.admin_listen, server: Some(server) }
    }

    /// One of the nodes on `redis`.
    pub async fn start_on(redis: &Redis, extra: &[(&str, &str)]) -> Self {
        let url = redis.url();
        let cluster = [("cluster.redis_url", url.as_str()), ("auth.allow_anonymous", "true")];
        Self::start(&[&cluster, extra].concat()).await
    }

    /// Stops it in order.
    pub async fn stop(mut self) {
        let server = self.server.take().unwrap();
        assert!(server.stop().await, "the gateway did not stop in time");
    }

    pub fn url(&self, path: &str) -> String {
        format!("ws://{}{path}", self.address)
    }

    /// A connection to `/ws` as `user`, behind `connected`.
    pub async fn connect(&self, user: &str) -> ClientConnection {
        connect(self.address, user).await
    }

    /// As [`Gateway::connect`], again and again while the gateway is not ready.
    pub async fn connect_when_ready(&self, user: &str) -> ClientConnection {
        let options = ConnectOptions::new(self.url("/ws")).user(user);
        loop {
            match ClientConnection::open(&options).await {
                Ok(mut connection) => {
                    connection.expect_connected().await.unwrap();
                    return connection;
                }
                Err(ConnectError::Http { status: 503, .. }) => poll_pause().await,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
}

/// A connection to `/ws` at `address` as `user`, behind `connected`.
pub async fn connect(address: SocketAddr, user: &str) -> ClientConnection {
    let options = ConnectOptions::new(format!("ws://{address}/ws")).user(user);
    let mut connection = ClientConnection::open(&options).await.unwrap();
    connection.expect_connected().await.unwrap();
    connection
}

/// The JSON fields of a message that `ann` sends to a room, as a gateway writes them.
pub fn message_fields(room: &RoomId, id: MessageId, content: Option<&str>) -> String {
    let content = content.map(|content| format!(r#","content":"{content}""#)).unwrap_or_default();
    format!(
        r#""room":"{room}","id":"{id}","from":{{"id":"ann","name":"ann"}},"kind":"text","timestamp":"t"{content}"#
    )
}

pub fn room(name: &str) -> RoomId {
    name.parse().unwrap()
}

/// The retention of a hub that is tested alone.
pub fn hub_options() -> HubOptions {
    HubOptions {
        ring_bytes_max: 1 << 28,
        dedup_ids_bytes_max: 1 << 26,
        dedup_window: Duration::from_secs(600),
        log_ttl: Duration::from_secs(3600),
        rooms_max: 100_000,
        empty_rooms_max: 1000,
        watched_users_max: 1000,
    }
}

/// Options of a Redis bus without a gateway.
pub fn redis_options(url: String, partitions: u16, node: &str) -> RedisOptions {
    RedisOptions {
        url: url.into(),
        tls: TlsFiles::default(),
        partitions,
        lease: LEASE,
        retention: retention(),
        rooms: RoomStoreOptions::default(),
        sessions: Default::default(),
        node: node.to_owned(),
        archive_backlog_max: 0,
    }
}

/// Starts a hub without a gateway, whose rooms have no presence.
pub fn start_hub(
    bus: &Arc<dyn Bus>,
    mailboxes: Mailboxes,
    messages: Vec<ShardReceiver>,
    metrics: &Arc<Metrics>,
    tasks: &Tasks,
) -> Hub {
    let services = HubServices {
        tracer: Default::default(),
        bus: bus.clone(),
        presence: nobody(tasks),
        rules: Arc::default(),
        metrics: metrics.clone(),
        trails: Arc::default(),
    };
    Hub::start(&services, mailboxes, messages, hub_options(), tasks)
}

/// PresenceTracker of nobody, for a hub whose members only hear a log.
fn nobody(tasks: &Tasks) -> Arc<PresenceTracker> {
    let (mailboxes, _) = Mailboxes::new(1, 1, Arc::new(Metrics::new()));
    let store = MemoryBus::start(
        retention(),
        &RoomStoreOptions::default(),
        &Default::default(),
        mailboxes,
        tasks,
    );
    PresenceTracker::start(Arc::new(store), PresenceOptions::default(), tasks)
}

/// How long the logs of a bus without a gateway are kept: longer than any test.
pub fn retention() -> Retention {
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

/// Sends a text and waits for its `ack`.
pub async fn say(connection: &mut ClientConnection, room: &RoomId, text: &str) -> AckFrame {
    let content = text.into();
    match connection.request(&frames::OutgoingMessage::text(room, &content)).await.unwrap() {
        ServerFrame::Ack(ack) => *ack,
        other => panic!("expected an ack, got {other:?}"),
    }
}

/// The next `message` that arrives, whatever else comes before it.
pub async fn next_message(connection: &mut ClientConnection) -> MessageFrame {
    let message = async {
        loop {
            match connection.next().await.unwrap() {
                ReceivedMessage::Frame(ServerFrame::Message(message), _) => return *message,
                ReceivedMessage::Binary(message, _) => return *message,
                _ => {}
            }
        }
    };
    within(message).await
}

/// How the connection ends, whatever else comes before.
pub async fn closed(connection: &mut ClientConnection) -> (Option<u16>, String) {
    let closed = async {
        loop {
            if let Err(closed) = connection.next().await {
                return (closed.code, closed.reason);
            }
        }
    };
    within(closed).await
}

/// The output of `future`, which has to come.
#[track_caller]
pub fn within<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        match timeout(PATIENCE, future).await {
            Ok(output) => output,
            Err(_) => panic!("nothing came within {PATIENCE:?} at {caller}"),
        }
    }
}

/// Asks again and again until the answer is yes.
pub async fn until(what: &str, mut ask: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !ask().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        poll_pause().await;
    }
}

/// The pause between two questions of a poll.
pub async fn poll_pause() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

/// The ports for servers of tests: below those that Linux assigns to connections
/// (`ip_local_port_range`), so that a server that restarts finds its port free.
const PORTS: std::ops::Range<u32> = 15_000..32_000;

/// A free port, a different one each time.
pub fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    // Test binaries that run at the same time begin at different places.
    let first = std::process::id().wrapping_mul(251);
    loop {
        let number = first.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
        let port = PORTS.start + number % (PORTS.end - PORTS.start);
        let port = u16::try_from(port).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The response to an HTTP request.
#[derive(Debug)]
pub struct Http {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Http {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// Whether an answer has its head and, where the head tells its length, its body.
fn is_whole(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    let http = Http { status: 0, head: head.to_owned(), body: String::new() };
    let length = http.header("content-length").and_then(|length| length.parse().ok());
    head.starts_with("HTTP/1.1 101") || length.is_some_and(|length: usize| body.len() >= length)
}

/// Sends the bytes of a request and reads its answer.
pub async fn http_raw(address: SocketAddr, request: &str) -> Http {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = within(socket.read(&mut buffer)).await.unwrap_or(0);
        answer.extend_from_slice(&buffer[..count]);
        if count == 0 || is_whole(&String::from_utf8_lossy(&answer)) {
            break;
        }
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Http { status, head: head.to_owned(), body: body.to_owned() }
}

/// A GET.
pub async fn get(address: SocketAddr, path: &str) -> Http {
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    http_raw(address, &head).await
}

/// A child process with its own folder. Killed by its pid when dropped.
pub struct Process {
    child: Child,
    _folder: TempDir,
}

impl Process {
    pub fn of(child: Child, folder: TempDir) -> Self {
        Self { child, _folder: folder }
    }

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it was not waited for")
    }

    /// Sends a signal, named as for `kill`.
    pub fn signal(&self, signal: &str) {
        // The shell's own `kill`: a bare system has no other.
        let status = std::process::Command::new("sh")
            .args(["-c", &format!("kill -{signal} {}", self.pid())])
            .status()
            .unwrap();
        assert!(status.success());
        if signal == "STOP" {
            self.until_frozen();
        }
    }

    /// `kill(2)` gives SIGSTOP to one thread; the others run until that one has had its turn, which
    /// on a busy machine is long enough to pass a message on.
    fn until_frozen(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
            // A thread that has ended meanwhile has none any more.
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
            // The state is behind the name, which may hold anything (proc(5)).
            stat.map_or(true, |stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
        };
        let tasks = format!("/proc/{}/task", self.pid());
        while !std::fs::read_dir(&tasks).unwrap().all(is_stopped) {
            assert!(Instant::now() < deadline, "it does not freeze");
            std::thread::yield_now();
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// Waits for its end. Returns the exit code.
    pub async fn end(&mut self) -> Option<i32> {
        within(self.child.wait()).await.unwrap().code()
    }
}

/// A redis-server of a test's own.
pub struct Redis {
    process: Process,
    pub port: u16,
    folder: PathBuf,
    keep: bool,
    program: &'static str,
}

impl Redis {
    /// A server that keeps nothing over a restart.
    pub async fn start() -> Self {
        let redis = Self::start_new(false).await;
        redis.open().await;
        redis
    }

    /// A server with an append-only file.
    pub async fn start_durable() -> Self {
        let redis = Self::start_new(true).await;
        redis.open().await;
        redis
    }

    /// A server on which nobody has agreed: the first nodes wait for others that may remember
    /// something.
    pub async fn start_new(keep: bool) -> Self {
        Self::start_at(free_port(), TempDir::new().unwrap(), keep, "redis-server").await
    }

    /// As [`Redis::start`], of Valkey, if that is installed: not every system has a package of it.
    pub async fn start_valkey() -> Option<Self> {
        let program = "valkey-server";
        if Command::new(program).arg("--version").output().await.is_err() {
            println!("{program} is not installed: nothing is shown of it");
            return None;
        }
        let valkey = Self::start_at(free_port(), TempDir::new().unwrap(), false, program).await;
        valkey.open().await;
        Some(valkey)
    }

    /// Tells the nodes that nobody remembers anything, so that no test has to wait for that.
    async fn open(&self) {
        let part = async |section: &str, name: &str| {
            let info = self.answer(&format!("INFO {section}")).await;
            let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
            line[..8].to_owned()
        };
        let run = part("server", "run_id:").await;
        let history = part("replication", "master_replid:").await;
        self.command(&format!("HSET gw:barrier t {run}{history} open 1")).await;
    }

    /// The bulk string that a command is answered by.
    pub async fn answer(&self, command: &str) -> String {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        socket.write_all(format!("{command}\r\n").as_bytes()).await.unwrap();
        let mut socket = BufReader::new(socket);
        let mut length = String::new();
        socket.read_line(&mut length).await.unwrap();
        let mut answer = vec![0; length[1..].trim().parse().unwrap()];
        socket.read_exact(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    }

    async fn start_at(port: u16, folder: TempDir, keep: bool, program: &'static str) -> Self {
        let path = folder.path().to_owned();
        let child = Command::new(program)
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .args(["--appendonly", if keep { "yes" } else { "no" }, "--dir"])
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("redis-server is installed by `make setup`");
        let process = Process { child, _folder: folder };
        let redis = Self { process, port, folder: path, keep, program };
        until("redis answers", async || redis.command("PING").await.is_some_and(|a| a == "+PONG"))
            .await;
        redis
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.process.kill().await;
    }

    /// Stops it in order.
    pub async fn stop(&mut self) {
        self.process.signal("TERM");
        self.process.end().await;
    }

    /// Sends a signal, named as for `kill`.
    pub fn signal(&self, signal: &str) {
        self.process.signal(signal);
    }

    /// Starts it again on the same port, with what it kept or empty.
    pub async fn restart(&mut self) {
        let folder = TempDir::new().unwrap();
        if self.keep {
            copy_folder(&self.folder, folder.path());
        }
        *self = Self::start_at(self.port, folder, self.keep, self.program).await;
    }

    /// Copies its append-only file while it runs, as docs/operations.md says.
    pub async fn back_up(&self) -> TempDir {
        let rewrite = "CONFIG SET auto-aof-rewrite-percentage";
        assert_eq!(self.command(&format!("{rewrite} 0")).await.as_deref(), Some("+OK"));
        until("no rewrite runs", async || {
            self.answer("INFO persistence").await.contains("aof_rewrite_in_progress:0")
        })
        .await;
        let backup = TempDir::new().unwrap();
        copy_folder(&self.folder, backup.path());
        self.command(&format!("{rewrite} 100")).await;
        backup
    }

    /// Replaces its files, while it does not run, by those of a backup.
    pub fn restore(&self, backup: &TempDir) {
        std::fs::remove_dir_all(&self.folder).unwrap();
        std::fs::create_dir(&self.folder).unwrap();
        copy_folder(backup.path(), &self.folder);
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// The first line of the answer to a command in Redis' inline form.
    pub async fn command(&self, command: &str) -> Option<String> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        socket.write_all(format!("{command}\r\n").as_bytes()).await.ok()?;
        BufReader::new(socket).lines().next_line().await.ok()?
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&to).unwrap();
            copy_folder(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

/// A chromedriver, through which a test drives a browser.
pub struct Chromedriver {
    _process: Process,
    pub url: String,
    /// A folder for a browser's profile.
    pub profile: PathBuf,
}

impl Chromedriver {
    pub async fn start() -> Self {
        let (folder, port) = (TempDir::new().unwrap(), free_port());
        let child = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("chromedriver is installed by `make setup`");
        let profile = folder.path().to_owned();
        let url = format!("http://127.0.0.1:{port}");
        let driver = Self { _process: Process { child, _folder: folder }, url, profile };
        until("chromedriver answers", async || {
            TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        driver
    }
}

/// A gateway as a process of its own.
pub struct Node {
    pub process: Process,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    /// Reads its log to the end, so that the pipe does not fill up and stop the gateway.
    log: JoinHandle<String>,
}

/// The gateway's binary: this build's, or the one that `SKEIN_GATEWAY` names, so that a test that
/// is not optimised can drive one that is.
pub fn gateway_binary() -> PathBuf {
    std::env::var_os("SKEIN_GATEWAY").map_or(env!("CARGO_BIN_EXE_gateway").into(), PathBuf::from)
}

impl Node {
    /// A node on `redis`. With `listen` at that address, which it had before.
    pub async fn start(redis: &Redis, listen: Option<SocketAddr>, extra: &[(&str, &str)]) -> Self {
        let listen = listen.unwrap_or_else(|| ([127, 0, 0, 1], free_port()).into());
        let (url, listen) = (redis.url(), listen.to_string());
        let cluster = [
            ("cluster.redis_url", url.as_str()),
            ("auth.allow_anonymous", "true"),
            ("server.listen", listen.as_str()),
        ];
        Self::run(Command::new(gateway_binary()), &[&cluster, extra].concat()).await
    }

    /// A node that needs nothing else.
    pub async fn start_alone(extra: &[(&str, &str)]) -> Self {
        Self::run(Command::new(gateway_binary()), extra).await
    }

    /// As [`Node::start_alone`], with an injected fault: a name of
    /// `skein_core::fault_injection::DeliveryFault`.
    #[cfg(debug_assertions)]
    pub async fn start_with_fault(fault: &str, extra: &[(&str, &str)]) -> Self {
        Self::start_in(&[(skein_core::fault_injection::VARIABLE, fault.to_owned())], extra).await
    }

    /// As [`Node::start_alone`], with these environment variables.
    pub async fn start_in(environment: &[(&str, String)], extra: &[(&str, &str)]) -> Self {
        let mut command = Command::new(gateway_binary());
        command.envs(environment.iter().map(|(name, value)| (*name, value)));
        Self::run(command, extra).await
    }

    /// The same with no more than `descriptors` of them.
    pub async fn start_within(descriptors: u32, extra: &[(&str, &str)]) -> Self {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"");
        command.args(["-c", &script]).arg(gateway_binary());
        Self::run(command, extra).await
    }

    /// The same with `signal` ignored from the start, as `nohup` has it.
    pub async fn start_ignoring(signal: &str, extra: &[(&str, &str)]) -> Self {
        let mut command = Command::new("sh");
        let script = format!("trap '' {signal} && exec \"$0\" \"$@\"");
        command.args(["-c", &script]).arg(gateway_binary());
        Self::run(command, extra).await
    }

    /// A node that `command` starts, with its environment and arguments.
    pub async fn run(mut command: Command, extra: &[(&str, &str)]) -> Self {
        let folder = TempDir::new().unwrap();
        for (key, value) in options(&[&[("log.format", "json")], extra].concat()) {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let mut child = command
            .current_dir(folder.path())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let (address, admin) = loop {
            let line =
                within(log.next_line()).await.unwrap().expect("it ended before it was ready");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if let (Some(listen), Some(admin)) = (line["listen"].as_str(), line["admin"].as_str()) {
                break (listen.parse().unwrap(), admin.parse().unwrap());
            }
        };
        let log = tokio::spawn(async move {
            let mut said = String::new();
            while let Ok(Some(line)) = log.next_line().await {
                said.push_str(&line);
                said.push('\n');
            }
            said
        });
        Self { process: Process { child, _folder: folder }, address, admin, log }
    }

    /// Waits for its end and returns the exit code and what it had still to say.
    pub async fn end(mut self) -> (Option<i32>, String) {
        let said = within(self.log).await.unwrap();
        (self.process.end().await, said)
    }
}

/// A PostgreSQL server that keeps its data over a restart.
pub struct Postgres {
    process: ServerProcess,
    folder: TempDir,
    port: u16,
}

impl Postgres {
    /// A new server with an empty database `skein`.
    pub async fn start() -> Self {
        let (folder, port) = (TempDir::new().unwrap(), free_port());
        let data = folder.path().join("data");
        // It refuses to run as root.
        if is_root() {
            let owner = folder.path().to_str().unwrap();
            let owned = Command::new("chown").args(["postgres", owner]).status().await.unwrap();
            assert!(owned.success());
        }
        let mut init = postgres("initdb");
        init.arg("-D").arg(&data).args(["-A", "trust", "-U", "skein", "--no-sync", "-E", "UTF8"]);
        let init = init.current_dir(folder.path()).output().await.unwrap();
        assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
        let process = Self::launch(&folder, port);
        let server = Self { process, folder, port };
        server.wait().await;
        server
    }

    fn launch(folder: &TempDir, port: u16) -> ServerProcess {
        let mut server = postgres("postgres");
        server.arg("-D").arg(folder.path().join("data")).args(["-p", &port.to_string()]);
        server.args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k"]);
        server.arg(folder.path()).current_dir(folder.path());
        ServerProcess::start("postgres".to_owned(), server, folder.path()).unwrap()
    }

    async fn wait(&self) {
        until("postgres answers", async || self.is_ready().await).await;
    }

    async fn is_ready(&self) -> bool {
        let mut ready = postgres("pg_isready");
        ready.args(["-q", "-h", "127.0.0.1", "-p", &self.port.to_string()]);
        ready.current_dir(self.folder.path()).status().await.unwrap().success()
    }

    /// The URL of its database.
    pub fn url(&self) -> String {
        format!("postgres://skein@127.0.0.1:{}/postgres", self.port)
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.process.kill().await;
    }

    /// Starts it again on the same port, with its data.
    pub async fn restart(&mut self) {
        // The processes of its connections end a moment later, and it does not start before.
        until("postgres starts again", async || {
            let _ = std::fs::remove_file(self.folder.path().join("data/postmaster.pid"));
            self.process = Self::launch(&self.folder, self.port);
            while !self.process.has_ended() {
                if self.is_ready().await {
                    return true;
                }
                poll_pause().await;
            }
            false
        })
        .await;
    }
}

/// Whether this process runs as root.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// A program of the newest PostgreSQL that is installed, as a user that may run it.
fn postgres(program: &str) -> Command {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("installed by `make setup`");
    let newest = versions.map(|version| version.unwrap().path()).max().unwrap();
    let program = newest.join("bin").join(program);
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
    command
}

/// An nginx in front of nodes, rendered from the project's template.
pub struct Nginx {
    process: ServerProcess,
    _folder: TempDir,
    pub address: SocketAddr,
}

impl Nginx {
    /// A single process, so that none is left over however the test ends.
    pub async fn start(nodes: &[SocketAddr]) -> Self {
        Self::start_with(nodes, 0).await
    }

    /// A master with one worker, which can be reloaded. Ends with [`Nginx::stop`].
    pub async fn start_with_worker(nodes: &[SocketAddr]) -> Self {
        Self::start_with(nodes, 1).await
    }

    /// Sends a signal, named as for `kill`.
    pub async fn signal(&self, signal: &str) {
        self.process.signal(signal).await;
    }

    /// Ends the master, which ends its workers.
    pub async fn stop(mut self) {
        self.process.stop().await;
    }

    /// A single process that also listens with TLS, at the returned address, with the self-signed
    /// certificate in the returned file.
    pub async fn start_tls(nodes: &[SocketAddr]) -> (Self, SocketAddr, PathBuf) {
        let folder = TempDir::new().unwrap();
        let (cert, key) = self_signed(folder.path());
        let tls = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let options = ["--tls-listen", &tls.to_string(), "--cert", &cert, "--key", &key];
        (Self::start_in(folder, nodes, 0, &options).await, tls, cert.into())
    }

    /// A single process that also has a listener for its own counts, at the returned address.
    pub async fn start_with_status(nodes: &[SocketAddr]) -> (Self, SocketAddr) {
        let status = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let options = ["--status-listen", &status.to_string()];
        (Self::start_in(TempDir::new().unwrap(), nodes, 0, &options).await, status)
    }

    async fn start_with(nodes: &[SocketAddr], workers: u8) -> Self {
        Self::start_in(TempDir::new().unwrap(), nodes, workers, &[]).await
    }

    async fn start_in(
        folder: TempDir,
        nodes: &[SocketAddr],
        workers: u8,
        options: &[&str],
    ) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let render = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../nginx/render.sh"));
        let nodes = nodes.iter().copied();
        let process =
            servers::start_nginx_with(render, address, nodes, workers, options, folder.path())
                .await;
        let process =
            process.unwrap_or_else(|error| panic!("`make setup` installs nginx: {error}"));
        Self { process, _folder: folder, address }
    }
}

/// Makes a self-signed certificate for 127.0.0.1 in `folder`. Returns the certificate's file and
/// the key's.
pub fn self_signed(folder: &Path) -> (String, String) {
    let file = |name: &str| folder.join(name).display().to_string();
    let (cert, key) = (file("tls.crt"), file("tls.key"));
    let output = std::process::Command::new("openssl")
        .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2".split(' '))
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout", &key, "-out", &cert])
        .output()
        .expect("`make setup` installs openssl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (cert, key)
}
