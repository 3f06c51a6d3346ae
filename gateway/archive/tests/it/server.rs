//! A PostgreSQL of its own for the tests, from Debian's package, on a free port.

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tempfile::TempDir;
use tokio::{sync::Semaphore, time::Instant};

/// The password of the database's user.
pub(crate) const PASSWORD: &str = "hunter2";

/// A running server. It ends with this value, and its data with it.
pub(crate) struct Server {
    programs: PathBuf,
    folder: TempDir,
    port: u16,
    process: Mutex<Child>,
}

impl Server {
    /// The server that tests share while one of them runs.
    pub(crate) async fn shared() -> Arc<Self> {
        static STARTING: Semaphore = Semaphore::const_new(1);
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let _permit = STARTING.acquire().await.unwrap();
        if let Some(server) = SHARED.lock().upgrade() {
            return server;
        }
        let server = Arc::new(Self::start().await);
        *SHARED.lock() = Arc::downgrade(&server);
        server
    }

    /// Starts a server.
    pub(crate) async fn start() -> Self {
        let programs = programs();
        let folder = TempDir::new().unwrap();
        if is_root() {
            run(Command::new("chown").arg("postgres:postgres").arg(folder.path()));
        }
        let password = folder.path().join("password");
        fs::File::create(&password).unwrap().write_all(PASSWORD.as_bytes()).unwrap();
        run(command(&programs.join("initdb"))
            .args(["--username=skein", "--auth=scram-sha-256", "--no-sync", "--locale=C.UTF-8"])
            .arg(format!("--pwfile={}", password.display()))
            .arg("-D")
            .arg(folder.path().join("data")));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Mutex::new(spawn(&programs, folder.path(), port));
        let server = Self { programs, folder, port, process };
        server.wait().await;
        server
    }

    /// The URL of a new database.
    pub(crate) async fn new_database(&self) -> String {
        static COUNT: Mutex<u32> = Mutex::new(0);
        let name = {
            let mut count = COUNT.lock();
            *count += 1;
            format!("archive_{count}")
        };
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        let create = format!("CREATE DATABASE {name}");
        sqlx::query(AssertSqlSafe(create)).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        self.url(&name)
    }

    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://skein:{PASSWORD}@127.0.0.1:{}/{database}", self.port)
    }

    /// Kills the server as a crash does.
    pub(crate) fn kill(&self) {
        let mut process = self.process.lock();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Starts the server again with its data.
    pub(crate) async fn start_again(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        // The processes of the killed server take a moment to end, and a new one waits for that.
        loop {
            *self.process.lock() = spawn(&self.programs, self.folder.path(), self.port);
            tokio::time::sleep(Duration::from_millis(300)).await;
            if self.process.lock().try_wait().unwrap().is_none() {
                break;
            }
            assert!(Instant::now() < deadline, "PostgreSQL does not start again");
        }
        self.wait().await;
    }

    async fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = PgConnection::connect(&self.url("postgres")).await {
            assert!(Instant::now() < deadline, "PostgreSQL does not start: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let process = self.process.get_mut();
        if let Some(pid) = rustix::process::Pid::from_raw(process.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        }
        let _ = process.wait();
    }
}

fn spawn(programs: &Path, folder: &Path, port: u16) -> Child {
    let log = fs::File::create(folder.join("log")).unwrap();
    command(&programs.join("postgres"))
        .arg("-D")
        .arg(folder.join("data"))
        .arg("-k")
        .arg(folder)
        .args(["-p", &port.to_string(), "-h", "127.0.0.1"])
        .args(["-c", "fsync=off", "-c", "shared_buffers=32MB", "-c", "max_connections=200"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// The folder of the newest version of Debian's packages.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let programs = versions.map(|version| version.path().join("bin"));
    let found = programs.filter(|programs| programs.join("initdb").exists()).max();
    found.expect("PostgreSQL is not installed: run deploy/setup.sh postgresql")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A command that runs as another user than root, as PostgreSQL requires.
fn command(program: &Path) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program);
    command.current_dir("/");
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
