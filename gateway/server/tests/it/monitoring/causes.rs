//! Servers whose faults alerts report: a site with a certificate, a node with a wrong clock, a
//! Redis without a command.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};

use skein_core::fault_injection::{PANIC, VARIABLE};
use skein_testkit::servers::{self, ServerProcess};
use tempfile::TempDir;
use tokio::process::Command;

use super::prometheus::Site;
use crate::{
    harness::{Node, Process, free_port, until},
    tidy::root,
};

/// A free address on loopback.
fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

/// A blackbox exporter with the shipped configuration.
pub struct Blackbox {
    _process: Process,
    pub address: SocketAddr,
}

impl Blackbox {
    pub async fn start() -> Self {
        let address = free_address();
        let config = root().join("deploy/prometheus/blackbox.yml");
        let child = Command::new("prometheus-blackbox-exporter")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus-blackbox-exporter is installed by `make setup`");
        until("the blackbox exporter listens", async || {
            tokio::net::TcpStream::connect(address).await.is_ok()
        })
        .await;
        Self { _process: Process::of(child, TempDir::new().unwrap()), address }
    }
}

/// An nginx with a certificate, from the project's template.
pub struct TlsSite {
    nginx: Option<ServerProcess>,
    folder: TempDir,
    plain: SocketAddr,
    tls: SocketAddr,
    node: SocketAddr,
}

impl TlsSite {
    /// In front of `node`, with a certificate that expires in `days`.
    pub async fn start(node: SocketAddr, days: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let mut site =
            Self { nginx: None, folder, plain: free_address(), tls: free_address(), node };
        site.start_with(days).await;
        site
    }

    pub fn url(&self) -> String {
        format!("https://{}/ready", self.tls)
    }

    /// The targets of a Prometheus that watches it.
    pub fn watched_by(&self, blackbox: &Blackbox) -> Site {
        Site { blackbox: blackbox.address, url: self.url() }
    }

    pub async fn stop(&mut self) {
        self.nginx.take().unwrap().stop().await;
    }

    /// Starts it with a new certificate.
    pub async fn start_with(&mut self, days: u32) {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let (key, certificate, days) = (file("tls.key"), file("tls.crt"), days.to_string());
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
            .args(["-nodes", "-subj", "/CN=localhost", "-days", &days])
            .args(["-keyout", &key, "-out", &certificate])
            .output()
            .await
            .expect("openssl is installed by `make setup`");
        assert!(made.status.success());
        let (plain, tls) = (self.plain.to_string(), self.tls.to_string());
        let rendered = Command::new(root().join("nginx/render.sh"))
            .args(["map", "--workers", "0", "--listen", &plain, "--tls-listen", &tls])
            .args(["--cert", &certificate, "--key", &key, "--node", &self.node.to_string()])
            .output()
            .await
            .unwrap();
        assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
        std::fs::write(file("nginx.conf"), rendered.stdout).unwrap();
        let mut command = Command::new("nginx");
        command.arg("-p").arg(self.folder.path()).args(["-c", &file("nginx.conf")]);
        command.args(["-e", "error.log"]);
        let nginx = ServerProcess::start("nginx".to_owned(), command, self.folder.path()).unwrap();
        nginx.wait_for(self.plain, "GET /health HTTP/1.0\r\n\r\n", "HTTP/1.").await.unwrap();
        self.nginx = Some(nginx);
    }
}

/// A node whose clock a test sets, by Debian's faketime.
pub struct ClockNode {
    pub node: Node,
    offset: PathBuf,
}

impl ClockNode {
    pub async fn start(folder: &Path, extra: &[(&str, &str)]) -> Self {
        let libraries = std::fs::read_dir("/usr/lib").unwrap();
        let library = libraries
            .map(|entry| entry.unwrap().path().join("faketime/libfaketime.so.1"))
            .find(|library| library.exists())
            .expect("faketime is installed by `make setup`");
        let offset = folder.join("offset");
        std::fs::write(&offset, "+0\n").unwrap();
        let environment = [
            ("LD_PRELOAD", library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", offset.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        Self { node: Node::start_in(&environment, extra).await, offset }
    }

    /// Moves its clock, as `+90` or `-90` seconds from the true time.
    pub fn set(&self, seconds: &str) {
        std::fs::write(&self.offset, format!("{seconds}\n")).unwrap();
    }
}

/// A node that panics where a message says so, on a Redis that lacks a command, as a hosted one
/// may.
pub struct FaultyNode {
    pub node: Node,
    _redis: ServerProcess,
    _folder: TempDir,
}

impl FaultyNode {
    pub async fn start(extra: &[(&str, &str)]) -> Self {
        let (folder, address) = (TempDir::new().unwrap(), free_address());
        let options = ["--appendonly", "yes", "--rename-command", "HVALS", ""];
        let redis = servers::start_redis(address, folder.path(), &options).await.unwrap();
        let url = format!("redis://{address}");
        let own = [("cluster.redis_url", url.as_str()), ("auth.allow_anonymous", "true")];
        let environment = [(VARIABLE, PANIC.to_owned())];
        let node = Node::start_in(&environment, &[&own, extra].concat()).await;
        Self { node, _redis: redis, _folder: folder }
    }
}

/// A replica of a Redis.
pub async fn start_replica(of: u16, folder: &Path) -> ServerProcess {
    let of = of.to_string();
    let options = ["--replicaof", "127.0.0.1", &of];
    servers::start_redis(free_address(), folder, &options).await.unwrap()
}
