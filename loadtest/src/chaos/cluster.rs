//! A local cluster: Redis, gateways, nginx and the links between them, as processes of this
//! machine.
//!
//! Each process has ports of its own, is signalled by its pid, and ends with the cluster.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use skein_testkit::proxy::Proxy;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::procfs::free_address;

/// Time limit for a server to become ready. Nodes on a new Redis wait for other nodes that may know
/// it.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for a graceful shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Why a cluster or one of its processes does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// A program does not exist or cannot be executed.
    #[error("cannot start {program}: {source}")]
    Start {
        /// Name of the program.
        program: String,
        /// The cause.
        source: io::Error,
    },
    /// A server does not become ready.
    #[error("{program} is not ready after {} s; its log ends: {log}", READY_TIMEOUT.as_secs())]
    NotReady {
        /// Name of the program.
        program: String,
        /// The end of its log.
        log: String,
    },
    /// nginx' configuration cannot be rendered.
    #[error("{program}: {output}")]
    Render {
        /// The script.
        program: String,
        /// Its standard error.
        output: String,
    },
    /// A directory or a port of this machine is not available.
    #[error("cannot prepare the cluster: {0}")]
    Prepare(#[from] io::Error),
}

/// Paths of the programs.
#[derive(Clone, Debug)]
pub(crate) struct ClusterPrograms {
    /// The gateway.
    pub(crate) gateway: PathBuf,
    /// The script that renders nginx' configuration.
    pub(crate) render: PathBuf,
}

/// A server process.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A gateway with proxies on its links.
#[derive(Debug)]
pub(crate) struct ClusterNode {
    process: ServerProcess,
    listen: SocketAddr,
    /// Between the gateway and Redis.
    pub(crate) bus: Proxy,
    /// Between the gateway and clients that bypass nginx.
    pub(crate) clients: Proxy,
}

/// Redis, gateways and nginx.
#[derive(Debug)]
pub(crate) struct LocalCluster {
    programs: ClusterPrograms,
    redis: ServerProcess,
    redis_address: SocketAddr,
    pub(crate) nodes: Vec<ClusterNode>,
    nginx: ServerProcess,
    nginx_address: SocketAddr,
    // Last, so that it outlives the processes that write into it.
    scratch: TempDir,
}

impl ServerProcess {
    /// Starts a program whose output is appended to its log.
    pub(crate) fn start(
        name: String,
        mut command: Command,
        scratch: &Path,
    ) -> Result<Self, ClusterError> {
        let log = scratch.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let command = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.kill_on_drop(true).spawn();
        let child =
            child.map_err(|source| ClusterError::Start { program: name.clone(), source })?;
        Ok(Self { name, child, log })
    }

    /// Process id, until the process has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Path of its log.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a signal, named as for `kill`.
    async fn signal(&self, signal: &str) {
        let Some(pid) = self.child.id() else { return };
        self::signal(pid, signal).await;
    }

    async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }

    /// Sends SIGTERM, and SIGKILL after the time limit.
    pub(crate) async fn stop(&mut self) {
        self.signal("TERM").await;
        if timeout(SHUTDOWN_TIMEOUT, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }

    /// Sends `request` repeatedly until the reply begins with `response`.
    pub(crate) async fn wait_for(
        &self,
        address: SocketAddr,
        request: &str,
        response: &str,
    ) -> Result<(), ClusterError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let output =
                timeout(Duration::from_secs(1), exchange(address, request, response.len())).await;
            if output.is_ok_and(|output| output.is_ok_and(|output| output.starts_with(response))) {
                return Ok(());
            }
            if deadline < Instant::now() {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                let log = log.lines().rev().take(5).collect::<Vec<_>>().join(" | ");
                return Err(ClusterError::NotReady { program: self.name.clone(), log });
            }
            sleep(POLL_INTERVAL).await;
        }
    }
}

/// Sends a request and reads the first `count` bytes of the reply.
async fn exchange(address: SocketAddr, request: &str, count: usize) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut response = vec![0; count];
    stream.read_exact(&mut response).await?;
    Ok(String::from_utf8_lossy(&response).into_owned())
}

impl LocalCluster {
    /// Starts Redis with an append-only file, `nodes` gateways, and nginx.
    pub(crate) async fn start(
        programs: ClusterPrograms,
        nodes: usize,
    ) -> Result<Self, ClusterError> {
        let scratch = TempDir::new()?;
        let redis_address = free_address()?;
        let redis = start_redis(redis_address, scratch.path()).await?;
        let mut started = Vec::new();
        for number in 0..nodes {
            let listen = free_address()?;
            let bus = Proxy::to(redis_address).await?;
            let clients = Proxy::to(listen).await?;
            let process = start_gateway(&programs, number, listen, &bus, scratch.path())?;
            started.push(ClusterNode { process, listen, bus, clients });
        }
        let nginx_address = free_address()?;
        let listens = started.iter().map(|node| node.listen);
        let nginx = start_nginx(&programs, nginx_address, listens, scratch.path()).await?;
        let cluster =
            Self { programs, redis, redis_address, nodes: started, nginx, nginx_address, scratch };
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// URLs for clients, in turn: nginx, then each gateway directly.
    pub(crate) fn urls(&self) -> Vec<String> {
        let direct = self.nodes.iter().map(|node| node.clients.address);
        let all = std::iter::once(self.nginx_address).chain(direct);
        all.map(|address| format!("ws://{address}/ws")).collect()
    }

    /// Waits until every gateway is ready.
    pub(crate) async fn wait_until_ready(&self) -> Result<(), ClusterError> {
        let request = "GET /ready HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n";
        for node in &self.nodes {
            node.process.wait_for(node.listen, request, "HTTP/1.1 200").await?;
        }
        Ok(())
    }

    /// Sends a signal to a gateway.
    pub(crate) async fn signal_gateway(&self, node: usize, signal: &str) {
        self.nodes[node].process.signal(signal).await;
    }

    /// Stops a gateway, by SIGKILL or gracefully, and starts it again.
    pub(crate) async fn restart_gateway(
        &mut self,
        number: usize,
        kill: bool,
    ) -> Result<(), ClusterError> {
        let node = &mut self.nodes[number];
        if kill {
            node.process.kill().await;
        } else {
            node.process.stop().await;
        }
        let scratch = self.scratch.path();
        node.process = start_gateway(&self.programs, number, node.listen, &node.bus, scratch)?;
        Ok(())
    }

    /// Sends a signal to Redis.
    pub(crate) async fn signal_redis(&self, signal: &str) {
        self.redis.signal(signal).await;
    }

    /// Stops Redis, by SIGKILL or gracefully, and starts it again, with its file or `empty`.
    pub(crate) async fn restart_redis(
        &mut self,
        kill: bool,
        empty: bool,
    ) -> Result<(), ClusterError> {
        if kill {
            self.redis.kill().await;
        } else {
            self.redis.stop().await;
        }
        if empty {
            let files = self.scratch.path().join("appendonlydir");
            match std::fs::remove_dir_all(files) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        self.redis = start_redis(self.redis_address, self.scratch.path()).await?;
        Ok(())
    }

    /// Sends an inline command to Redis, which may not answer.
    pub(crate) async fn send_redis_command(&self, command: &str) {
        send_command(self.redis_address, command).await;
    }

    /// Makes nginx reload its configuration.
    pub(crate) async fn reload_nginx(&self) {
        self.nginx.signal("HUP").await;
    }

    /// Stops all processes: gateways first, while Redis is there for their departure.
    pub(crate) async fn stop(mut self) {
        for node in &self.nodes {
            node.process.signal("TERM").await;
        }
        for node in &mut self.nodes {
            node.process.stop().await;
        }
        self.nginx.stop().await;
        self.redis.stop().await;
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        // SIGKILL, which the other processes get, would leave nginx' worker behind.
        let Some(pid) = self.nginx.child.id() else { return };
        let _ = std::process::Command::new("kill").args(["-s", "TERM", &pid.to_string()]).status();
        for _ in 0..100 {
            if !matches!(self.nginx.child.try_wait(), Ok(None)) {
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "drop cannot await")]
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Sends a signal, named as for `kill`, to a process, which may have ended already.
pub(super) async fn signal(pid: u32, signal: &str) {
    let _ = Command::new("kill").args(["-s", signal, &pid.to_string()]).status().await;
}

/// Sends an inline command to a Redis, which may not answer.
pub(super) async fn send_command(redis: SocketAddr, command: &str) {
    let _ = timeout(Duration::from_secs(1), exchange(redis, &format!("{command}\r\n"), 1)).await;
}

async fn start_redis(address: SocketAddr, scratch: &Path) -> Result<ServerProcess, ClusterError> {
    // Every write is in the file before it is answered, so that acknowledged data survives a
    // SIGKILL.
    start_redis_with(address, scratch, &["--appendonly", "yes", "--appendfsync", "always"]).await
}

/// Starts a Redis that evicts nothing, with further options.
pub(crate) async fn start_redis_with(
    address: SocketAddr,
    scratch: &Path,
    options: &[&str],
) -> Result<ServerProcess, ClusterError> {
    let mut command = Command::new("redis-server");
    command
        .args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""])
        .args(options)
        .args(["--maxmemory-policy", "noeviction", "--dir"])
        .arg(scratch);
    let redis = ServerProcess::start("redis".to_owned(), command, scratch)?;
    redis.wait_for(address, "PING\r\n", "+PONG").await?;
    Ok(redis)
}

fn start_gateway(
    programs: &ClusterPrograms,
    number: usize,
    listen: SocketAddr,
    bus: &Proxy,
    scratch: &Path,
) -> Result<ServerProcess, ClusterError> {
    let mut command = Command::new(&programs.gateway);
    let (listen, redis) = (format!("server.listen={listen}"), bus.redis_url());
    let redis = format!("cluster.redis_url={redis}");
    let options = [
        listen.as_str(),
        redis.as_str(),
        "admin.listen=127.0.0.1:0",
        "auth.allow_anonymous=true",
        "drain.delay=200ms",
        "log.format=json",
        // All clients have the same address.
        "limits.connections_per_ip=0",
        "limits.handshakes_per_minute_per_ip=0",
        "limits.connections_per_user=0",
        "limits.durable_bytes_per_minute=0",
        "limits.new_inboxes_per_hour=0",
        "limits.new_rooms_per_minute=0",
    ];
    for option in options {
        command.args(["--set", option]);
    }
    ServerProcess::start(format!("gateway-{number}"), command, scratch)
}

async fn start_nginx(
    programs: &ClusterPrograms,
    address: SocketAddr,
    gateways: impl Iterator<Item = SocketAddr>,
    scratch: &Path,
) -> Result<ServerProcess, ClusterError> {
    let mut render = Command::new(&programs.render);
    // nginx without a worker cannot be reloaded.
    render.args(["map", "--workers", "1", "--listen", &address.to_string()]);
    for gateway in gateways {
        render.args(["--node", &gateway.to_string()]);
    }
    let program = programs.render.display().to_string();
    let rendered = render.output().await;
    let rendered =
        rendered.map_err(|source| ClusterError::Start { program: program.clone(), source })?;
    if !rendered.status.success() {
        let output = String::from_utf8_lossy(&rendered.stderr).into_owned();
        return Err(ClusterError::Render { program, output });
    }
    let file = scratch.join("nginx.conf");
    std::fs::write(&file, rendered.stdout)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(scratch).arg("-c").arg(&file).args(["-e", "error.log"]);
    let nginx = ServerProcess::start("nginx".to_owned(), command, scratch)?;
    nginx.wait_for(address, "GET /health HTTP/1.0\r\n\r\n", "HTTP/1.").await?;
    Ok(nginx)
}
