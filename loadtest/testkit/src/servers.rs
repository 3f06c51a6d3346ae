//! Server processes for tests and the load generator: Redis, gateways and nginx, each with a log in
//! a directory of the caller, signalled by its pid.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

/// Time limit for a server to become ready. Nodes on a new Redis wait for other nodes that may know
/// it.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for a graceful shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
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
    #[error("cannot prepare the start: {0}")]
    Prepare(#[from] io::Error),
}

/// A server process.
#[derive(Debug)]
pub struct ServerProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

impl ServerProcess {
    /// Starts a program whose output is appended to its log.
    ///
    /// # Errors
    ///
    /// The program does not start, or its log cannot be opened.
    pub fn start(name: String, mut command: Command, scratch: &Path) -> Result<Self, ServerError> {
        let log = scratch.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let command = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.kill_on_drop(true).spawn();
        let child = child.map_err(|source| ServerError::Start { program: name.clone(), source })?;
        Ok(Self { name, child, log })
    }

    /// Process id, until the process has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Path of its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Sends a signal, named as for `kill`.
    pub async fn signal(&self, signal: &str) {
        let Some(pid) = self.child.id() else { return };
        send_signal(pid, signal).await;
    }

    /// Sends SIGKILL.
    pub async fn kill(&mut self) {
        let _ = self.child.kill().await;
    }

    /// Sends SIGTERM, and SIGKILL after the time limit.
    pub async fn stop(&mut self) {
        self.signal("TERM").await;
        if timeout(SHUTDOWN_TIMEOUT, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }

    /// Waits until a gateway at `listen` is ready.
    ///
    /// # Errors
    ///
    /// [`ServerError::NotReady`]
    pub async fn wait_until_ready(&self, listen: SocketAddr) -> Result<(), ServerError> {
        let request = "GET /ready HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
        self.wait_for(listen, request, "HTTP/1.1 200").await
    }

    /// Sends SIGTERM and waits for the end up to a second, blocking. For `Drop`.
    pub fn stop_blocking(&mut self) {
        let Some(pid) = self.child.id() else { return };
        let mut kill = std::process::Command::new("sh");
        let _ = kill.args(["-c", &format!("kill -s TERM {pid}")]).status();
        for _ in 0..100 {
            if self.has_ended() {
                return;
            }
            #[expect(clippy::disallowed_methods, reason = "drop cannot await")]
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Sends `request` repeatedly until the reply begins with `response`.
    ///
    /// # Errors
    ///
    /// [`ServerError::NotReady`]
    pub async fn wait_for(
        &self,
        address: SocketAddr,
        request: &str,
        response: &str,
    ) -> Result<(), ServerError> {
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
                return Err(ServerError::NotReady { program: self.name.clone(), log });
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

/// Sends a signal, named as for `kill`, to a process, which may have ended already.
pub async fn send_signal(pid: u32, signal: &str) {
    // The shell's own `kill`: a bare system has no other.
    let _ = Command::new("sh").args(["-c", &format!("kill -s {signal} {pid}")]).status().await;
}

/// Sends an inline command to a Redis, which may not answer.
pub async fn send_redis_command(redis: SocketAddr, command: &str) {
    let _ = timeout(Duration::from_secs(1), exchange(redis, &format!("{command}\r\n"), 1)).await;
}

/// A loopback address that was free a moment ago, for servers that do not accept port 0.
///
/// # Errors
///
/// Those of `bind(2)`.
pub fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// Starts a Redis that evicts nothing, with further options, and waits until it is ready.
///
/// # Errors
///
/// Redis does not start.
pub async fn start_redis(
    address: SocketAddr,
    scratch: &Path,
    options: &[&str],
) -> Result<ServerProcess, ServerError> {
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

/// Starts a gateway on a Redis, with anonymous users, an admin listener on a free port, and further
/// options as `KEY=VALUE`.
///
/// # Errors
///
/// The program does not start. It may not be ready yet: see [`ServerProcess::wait_until_ready`].
pub fn start_gateway(
    name: &str,
    program: &Path,
    listen: SocketAddr,
    redis_url: &str,
    options: &[String],
    scratch: &Path,
) -> Result<ServerProcess, ServerError> {
    let own = [
        format!("server.listen={listen}"),
        format!("cluster.redis_url={redis_url}"),
        "admin.listen=127.0.0.1:0".to_owned(),
        "auth.allow_anonymous=true".to_owned(),
        "log.format=json".to_owned(),
    ];
    let mut command = Command::new(program);
    for option in own.iter().chain(options) {
        command.args(["--set", option]);
    }
    ServerProcess::start(name.to_owned(), command, scratch)
}

/// Starts nginx in front of gateways, with a configuration from the script `render`. Without a worker
/// it is one process, which ends with its handle and cannot be reloaded.
///
/// # Errors
///
/// The script fails, or nginx does not start.
pub async fn start_nginx(
    render: &Path,
    address: SocketAddr,
    gateways: impl Iterator<Item = SocketAddr>,
    workers: u8,
    scratch: &Path,
) -> Result<ServerProcess, ServerError> {
    start_nginx_with(render, address, gateways, workers, &[], scratch).await
}

/// As [`start_nginx`], with further options for `render`.
///
/// # Errors
///
/// As [`start_nginx`].
pub async fn start_nginx_with(
    render: &Path,
    address: SocketAddr,
    gateways: impl Iterator<Item = SocketAddr>,
    workers: u8,
    options: &[&str],
    scratch: &Path,
) -> Result<ServerProcess, ServerError> {
    let mut rendering = Command::new(render);
    rendering.args(["map", "--workers", &workers.to_string(), "--listen", &address.to_string()]);
    for gateway in gateways {
        rendering.args(["--node", &gateway.to_string()]);
    }
    rendering.args(options);
    let program = render.display().to_string();
    let rendered = rendering.output().await;
    let rendered =
        rendered.map_err(|source| ServerError::Start { program: program.clone(), source })?;
    if !rendered.status.success() {
        let output = String::from_utf8_lossy(&rendered.stderr).into_owned();
        return Err(ServerError::Render { program, output });
    }
    let file = scratch.join("nginx.conf");
    std::fs::write(&file, rendered.stdout)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(scratch).arg("-c").arg(&file).args(["-e", "error.log"]);
    let nginx = ServerProcess::start("nginx".to_owned(), command, scratch)?;
    nginx.wait_for(address, "GET /health HTTP/1.0\r\n\r\n", "HTTP/1.").await?;
    Ok(nginx)
}
