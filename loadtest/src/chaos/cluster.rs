//! Redis, gateways, nginx and the links between them, as processes of this machine.
//!
//! Each has ports of its own, is stopped by its pid, and ends with the cluster.

use std::{
    fs::File,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use loadtest::proxy::Proxy;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::procfs::free_address;

/// How long a server may take until it serves. Nodes on a new Redis wait for others that may know
/// it.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server may take to end in order.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Why a cluster does not start, or a part of it not again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// A program is not there or not to be run.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It does not serve.
    #[error("{program} is not ready after {} s; its log ends: {log}", READY_TIMEOUT.as_secs())]
    NotReady {
        /// The program.
        program: String,
        /// The end of what it said.
        log: String,
    },
    /// nginx' configuration cannot be made.
    #[error("{program}: {output}")]
    Render {
        /// The script.
        program: String,
        /// What it says.
        output: String,
    },
    /// A folder or a port of this machine.
    #[error("cannot prepare the cluster: {0}")]
    Prepare(#[from] io::Error),
}

/// Where the programs are.
#[derive(Clone, Debug)]
pub(crate) struct ClusterPrograms {
    /// The gateway.
    pub(crate) gateway: PathBuf,
    /// The script that makes nginx' configuration.
    pub(crate) render: PathBuf,
}

/// A process.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A gateway, and the links to it and from it.
#[derive(Debug)]
pub(crate) struct ClusterNode {
    process: ServerProcess,
    listen: SocketAddr,
    /// Between it and Redis.
    pub(crate) bus: Proxy,
    /// Between it and the clients that do not come through nginx.
    pub(crate) clients: Proxy,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct LocalCluster {
    programs: ClusterPrograms,
    redis: ServerProcess,
    redis_address: SocketAddr,
    pub(crate) nodes: Vec<ClusterNode>,
    nginx: ServerProcess,
    nginx_address: SocketAddr,
    // Last, so that it is there as long as those who write into it.
    scratch: TempDir,
}

impl ServerProcess {
    /// Starts a program whose output goes behind what is in its log.
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

    /// Its process id, until it has ended.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The file of its output.
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

    /// Ends it in order, or at once where it does not.
    pub(crate) async fn stop(&mut self) {
        self.signal("TERM").await;
        if timeout(SHUTDOWN_TIMEOUT, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }

    /// Asks until the answer begins as it should.
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

/// The first bytes of an answer.
async fn exchange(address: SocketAddr, request: &str, count: usize) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut response = vec![0; count];
    stream.read_exact(&mut response).await?;
    Ok(String::from_utf8_lossy(&response).into_owned())
}

impl LocalCluster {
    /// Starts Redis, which keeps a file, so many gateways, and nginx.
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

    /// Where clients connect, in turn: nginx, then each gateway past it.
    pub(crate) fn urls(&self) -> Vec<String> {
        let direct = self.nodes.iter().map(|node| node.clients.address);
        let all = std::iter::once(self.nginx_address).chain(direct);
        all.map(|address| format!("ws://{address}/ws")).collect()
    }

    /// Waits until every gateway says that it is ready.
    pub(crate) async fn wait_until_ready(&self) -> Result<(), ClusterError> {
        let request = "GET /ready HTTP/1.1\r\nHost: chaos\r\nConnection: close\r\n\r\n";
        for node in &self.nodes {
            node.process.wait_for(node.listen, request, "HTTP/1.1 200").await?;
        }
        Ok(())
    }

    /// Sends a gateway a signal.
    pub(crate) async fn signal_gateway(&self, node: usize, signal: &str) {
        self.nodes[node].process.signal(signal).await;
    }

    /// Ends a gateway, by SIGKILL or in order, and starts it again.
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

    /// Sends Redis a signal.
    pub(crate) async fn signal_redis(&self, signal: &str) {
        self.redis.signal(signal).await;
    }

    /// Ends Redis, by SIGKILL or in order, and starts it again, with or without its file.
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

    /// Gives Redis a command in its inline form. It may not answer.
    pub(crate) async fn send_redis_command(&self, command: &str) {
        send_command(self.redis_address, command).await;
    }

    /// Has nginx read its configuration again.
    pub(crate) async fn reload_nginx(&self) {
        self.nginx.signal("HUP").await;
    }

    /// Ends all of it: gateways first, so that they can say goodbye while Redis is there.
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
        // SIGKILL, which the others get, would leave the worker behind.
        let Some(pid) = self.nginx.child.id() else { return };
        let _ = std::process::Command::new("kill").args(["-s", "TERM", &pid.to_string()]).status();
        for _ in 0..100 {
            if !matches!(self.nginx.child.try_wait(), Ok(None)) {
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "nothing else is left to do")]
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Sends a process a signal, named as for `kill`. It may have ended by itself.
pub(super) async fn signal(pid: u32, signal: &str) {
    let _ = Command::new("kill").args(["-s", signal, &pid.to_string()]).status().await;
}

/// Gives a Redis a command in its inline form. It may not answer.
pub(super) async fn send_command(redis: SocketAddr, command: &str) {
    let _ = timeout(Duration::from_secs(1), exchange(redis, &format!("{command}\r\n"), 1)).await;
}

async fn start_redis(address: SocketAddr, scratch: &Path) -> Result<ServerProcess, ClusterError> {
    // Every write is in the file before it is answered: what was acknowledged is there again.
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
        // All clients have one address.
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
    // A single process, without a worker, cannot be reloaded.
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
