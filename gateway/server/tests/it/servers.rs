//! Redis servers in several topologies: behind TLS, watched by Sentinels, in a Redis Cluster.
//!
//! As in `harness`, each server has a free port and a folder of its own, and ends with its handle.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use redis::{AsyncConnectionConfig, FromRedisValue, RedisResult, aio::MultiplexedConnection};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{PATIENCE, Process, free_port, until};

/// Timeout for a response of a server, which may be frozen.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// The password of servers that have one, and that of Sentinels.
pub const PASSWORD: &str = "p@ss/word";
pub const SENTINEL_PASSWORD: &str = "sentinels";
/// The password as it is escaped in a URL.
const PASSWORD_ESCAPED: &str = "p%40ss%2Fword";
/// The permissions that the documentation gives the gateway's user.
const PERMISSIONS: &str = "+@all -@dangerous +info +config|get";
/// The name of the primary in Sentinel.
const PRIMARY: &str = "main";

/// A redis-server, or one as a Sentinel.
pub struct RedisInstance {
    pub process: Process,
    pub port: u16,
    password: &'static str,
}

impl RedisInstance {
    /// Starts redis-server with a configuration of these lines.
    async fn start(password: &'static str, sentinel: bool, lines: &[String]) -> Self {
        let (port, folder) = (free_port(), TempDir::new().unwrap());
        let mut text = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\nrequirepass {password}\n",
            folder.path().display()
        );
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        let process = spawn(folder, sentinel, &text);
        let instance = Self { process, port, password };
        until("redis answers", async || instance.ask::<String>(&["PING"]).await.is_ok()).await;
        instance
    }

    /// A server that keeps nothing on disk, as a replica of the one at `primary` if given.
    pub async fn server(primary: Option<u16>) -> Self {
        let mut lines = vec!["save \"\"".to_owned(), format!("masterauth {PASSWORD}")];
        lines.extend(primary.map(|port| format!("replicaof 127.0.0.1 {port}")));
        Self::start(PASSWORD, false, &lines).await
    }

    /// The URL of this server as a node of a Redis Cluster.
    pub fn cluster_url(&self) -> String {
        format!("redis+cluster://:{PASSWORD_ESCAPED}@127.0.0.1:{}", self.port)
    }

    /// The reply to a command.
    pub async fn ask<T: FromRedisValue>(&self, command: &[&str]) -> RedisResult<T> {
        let mut question = redis::cmd(command[0]);
        question.arg(&command[1..]).query_async(&mut self.connect(ANSWER_MAX).await?).await
    }

    async fn connect(&self, answer_max: Duration) -> RedisResult<MultiplexedConnection> {
        let password = match self.password {
            PASSWORD => PASSWORD_ESCAPED,
            other => other,
        };
        let client = redis::Client::open(format!("redis://:{password}@127.0.0.1:{}", self.port))?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(answer_max))
            .set_response_timeout(Some(answer_max));
        client.get_multiplexed_async_connection_with_config(&config).await
    }
}

/// A redis-server in `folder` with this configuration.
fn spawn(folder: TempDir, sentinel: bool, configuration: &str) -> Process {
    let file = folder.path().join("redis.conf");
    std::fs::write(&file, configuration).unwrap();
    let child = Command::new("redis-server")
        .arg(&file)
        .args(sentinel.then_some("--sentinel"))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("redis-server is installed by `make setup`");
    Process::of(child, folder)
}

/// A primary with one replica, and three Sentinels that watch them.
pub struct SentinelSetup {
    pub servers: [RedisInstance; 2],
    pub sentinels: [RedisInstance; 3],
}

impl SentinelSetup {
    pub async fn start() -> Self {
        let primary = RedisInstance::server(None).await;
        let replica = RedisInstance::server(Some(primary.port)).await;
        let lines = [
            format!("sentinel monitor {PRIMARY} 127.0.0.1 {} 2", primary.port),
            format!("sentinel auth-pass {PRIMARY} {PASSWORD}"),
            format!("sentinel down-after-milliseconds {PRIMARY} 500"),
            format!("sentinel failover-timeout {PRIMARY} 4000"),
            format!("sentinel sentinel-pass {SENTINEL_PASSWORD}"),
        ];
        let sentinel = || RedisInstance::start(SENTINEL_PASSWORD, true, &lines);
        let sentinels = [sentinel().await, sentinel().await, sentinel().await];
        let watched = Self { servers: [primary, replica], sentinels };
        for sentinel in &watched.sentinels {
            until("the Sentinels know each other", async || watched.knows_all(sentinel).await)
                .await;
        }
        watched
    }

    async fn knows_all(&self, sentinel: &RedisInstance) -> bool {
        let ask =
            async |what| sentinel.ask::<Vec<redis::Value>>(&["SENTINEL", what, PRIMARY]).await;
        ask("SENTINELS").await.is_ok_and(|others| others.len() == 2)
            && ask("REPLICAS").await.is_ok_and(|replicas| replicas.len() == 1)
            && sentinel.ask::<String>(&["SENTINEL", "CKQUORUM", PRIMARY]).await.is_ok()
            && self.servers[1]
                .ask::<String>(&["INFO", "replication"])
                .await
                .is_ok_and(|info| info.contains("master_link_status:up"))
    }

    /// The URL that lists the Sentinels from index `first` on.
    pub fn url(&self, first: usize) -> String {
        let sentinels: Vec<String> = self.sentinels[first..]
            .iter()
            .map(|sentinel| format!("127.0.0.1:{}", sentinel.port))
            .collect();
        format!(
            "redis+sentinel://:{PASSWORD_ESCAPED}@{}/{PRIMARY}?sentinel_password={SENTINEL_PASSWORD}",
            sentinels.join(",")
        )
    }

    /// Whether a server has a replica that has caught up with it.
    pub async fn has_synced_replica(&self, server: usize) -> bool {
        let info = self.servers[server].ask::<String>(&["INFO", "replication"]).await;
        info.is_ok_and(|info| info.contains("connected_slaves:1") && info.contains("state=online"))
    }

    /// Promotes the replica while the primary lives.
    pub async fn fail_over(&self, sentinel: usize) {
        let question = ["SENTINEL", "FAILOVER", PRIMARY];
        let asked = &self.sentinels[sentinel];
        until("the failover begins", async || asked.ask::<String>(&question).await.is_ok()).await;
    }
}

/// A Redis Cluster of one node whose barriers are open, so that gateways with this many partitions
/// start at once.
pub async fn single_node_redis_cluster(partitions: u16) -> RedisInstance {
    let lines = [
        "save \"\"".to_owned(),
        "cluster-enabled yes".to_owned(),
        format!("cluster-port {}", free_port()),
    ];
    let node = RedisInstance::start(PASSWORD, false, &lines).await;
    let mut connection = node.connect(PATIENCE).await.unwrap();
    let add = redis::cmd("CLUSTER").arg(&["ADDSLOTSRANGE", "0", "16383"]).to_owned();
    add.exec_async(&mut connection).await.unwrap();
    until("the cluster is ok", async || {
        let info = node.ask::<String>(&["CLUSTER", "INFO"]).await;
        info.is_ok_and(|info| info.contains("cluster_state:ok"))
    })
    .await;
    let info: String = redis::cmd("INFO").query_async(&mut connection).await.unwrap();
    let part = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line[..8].to_owned()
    };
    let token = format!("{}{}", part("run_id:"), part("master_replid:"));
    let mut barriers = redis::pipe();
    for partition in 0..partitions {
        let barrier = format!("gw:{{{partition}}}:barrier");
        barriers.cmd("HSET").arg(barrier).arg(&["t", &token, "open", "1"]).ignore();
    }
    barriers.exec_async(&mut connection).await.unwrap();
    node
}

/// A Redis Cluster of three primaries with a replica each.
pub struct RedisClusterSetup {
    pub nodes: Vec<RedisInstance>,
}

impl RedisClusterSetup {
    pub async fn start() -> Self {
        let mut nodes = vec![];
        for _ in 0..6 {
            let lines = [
                "save \"\"".to_owned(),
                format!("masterauth {PASSWORD}"),
                "cluster-enabled yes".to_owned(),
                format!("cluster-port {}", free_port()),
                "cluster-node-timeout 1500".to_owned(),
            ];
            nodes.push(RedisInstance::start(PASSWORD, false, &lines).await);
        }
        let addresses = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port));
        let output = Command::new("redis-cli")
            .args(["-a", PASSWORD, "--no-auth-warning", "--cluster", "create"])
            .args(addresses)
            .args(["--cluster-replicas", "1", "--cluster-yes"])
            .output()
            .await
            .expect("redis-cli comes with redis-server");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let cluster = Self { nodes };
        until("the cluster is ok", async || {
            for node in &cluster.nodes {
                let info = node.ask::<String>(&["CLUSTER", "INFO"]).await.unwrap();
                if !info.contains("cluster_state:ok") || cluster.nodes_of(node).await.len() != 6 {
                    return false;
                }
            }
            cluster.primaries().await.len() == 3
        })
        .await;
        for primary in cluster.primaries().await {
            until("a primary is followed", async || cluster.has_synced_replica(primary).await)
                .await;
        }
        cluster
    }

    pub fn url(&self) -> String {
        let port = self.nodes[0].port;
        format!("redis+cluster://:{PASSWORD_ESCAPED}@127.0.0.1:{port},127.0.0.1:1")
    }

    /// The lines of `CLUSTER NODES`.
    async fn nodes_of(&self, node: &RedisInstance) -> Vec<String> {
        let text = node.ask::<String>(&["CLUSTER", "NODES"]).await.unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// The reply of a node to `INFO replication`.
    async fn replication(&self, node: usize) -> String {
        self.nodes[node].ask(&["INFO", "replication"]).await.unwrap_or_default()
    }

    /// The indexes in `nodes` of reachable primaries.
    pub async fn primaries(&self) -> Vec<usize> {
        let mut primaries = vec![];
        for node in 0..self.nodes.len() {
            if self.is_primary(node).await {
                primaries.push(node);
            }
        }
        primaries
    }

    /// Whether a node is a primary.
    pub async fn is_primary(&self, node: usize) -> bool {
        self.replication(node).await.contains("role:master")
    }

    pub async fn has_synced_replica(&self, node: usize) -> bool {
        self.replication(node).await.contains("state=online")
    }

    /// The replica of a primary.
    pub async fn replica_of(&self, primary: usize) -> usize {
        let port = format!("master_port:{}\r", self.nodes[primary].port);
        for node in 0..self.nodes.len() {
            if self.replication(node).await.contains(&port) {
                return node;
            }
        }
        panic!("{primary} has no replica");
    }

    async fn id_of(&self, node: usize) -> String {
        self.nodes[node].ask(&["CLUSTER", "MYID"]).await.unwrap()
    }

    /// The primary that serves a slot.
    pub async fn owner_of(&self, slot: u16) -> usize {
        let ranges: Vec<Vec<redis::Value>> =
            self.nodes[self.primaries().await[0]].ask(&["CLUSTER", "SLOTS"]).await.unwrap();
        for range in ranges {
            let number = |at: usize| redis::from_redis_value::<u16>(range[at].clone()).unwrap();
            if (number(0)..=number(1)).contains(&slot) {
                let node: Vec<redis::Value> = redis::from_redis_value(range[2].clone()).unwrap();
                let port: u16 = redis::from_redis_value(node[1].clone()).unwrap();
                return self.nodes.iter().position(|node| node.port == port).unwrap();
            }
        }
        panic!("no node serves slot {slot}");
    }

    /// Moves a slot to another primary key by key, and calls `between` in the middle.
    pub async fn migrate(&self, slot: u16, to: usize, mut between: impl AsyncFnMut()) {
        let from = self.owner_of(slot).await;
        let (source, target) = (&self.nodes[from], &self.nodes[to]);
        let (source_id, target_id) = (self.id_of(from).await, self.id_of(to).await);
        let slot = slot.to_string();
        let setslot = async |node: &RedisInstance, state: &str, id: &str| {
            node.ask::<String>(&["CLUSTER", "SETSLOT", &slot, state, id]).await.unwrap();
        };
        setslot(target, "IMPORTING", &source_id).await;
        setslot(source, "MIGRATING", &target_id).await;
        let port = target.port.to_string();
        let mut moved = 0;
        loop {
            let question = ["CLUSTER", "GETKEYSINSLOT", &slot, "1"];
            let keys: Vec<String> = source.ask(&question).await.unwrap();
            let Some(key) = keys.first() else { break };
            let question = ["MIGRATE", "127.0.0.1", &port, key, "0", "5000", "AUTH", PASSWORD];
            source.ask::<String>(&question).await.unwrap();
            moved += 1;
            if moved == 2 {
                between().await;
            }
        }
        assert!(moved > 2, "there was nothing in the slot");
        setslot(target, "NODE", &target_id).await;
        setslot(source, "NODE", &target_id).await;
    }
}

/// A server behind TLS with one user, and the files to reach it.
pub struct TlsRedis {
    _process: Process,
    pub port: u16,
    pub ca: PathBuf,
    pub own: (PathBuf, PathBuf),
}

impl TlsRedis {
    pub async fn start() -> Self {
        let (port, folder) = (free_port(), TempDir::new().unwrap());
        let file = |name: &str| folder.path().join(name);
        make_authority(folder.path());
        make_certificate(folder.path(), "server");
        make_certificate(folder.path(), "gateway");
        let text = format!(
            "port 0\ntls-port {port}\nbind 127.0.0.1\ndir {}\nsave \"\"\n\
             tls-ca-cert-file ca.crt\ntls-cert-file server.crt\ntls-key-file server.key\n\
             user gateway on >{PASSWORD} ~gw:* &gw:* {PERMISSIONS}\nuser default off\n",
            folder.path().display()
        );
        let (ca, own) = (file("ca.crt"), (file("gateway.crt"), file("gateway.key")));
        let _process = spawn(folder, false, &text);
        until("redis listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { _process, port, ca, own }
    }

    pub fn url(&self) -> String {
        format!("rediss://gateway:{PASSWORD_ESCAPED}@127.0.0.1:{}", self.port)
    }
}

fn openssl(folder: &Path, arguments: &str) {
    let output = std::process::Command::new("openssl")
        .current_dir(folder)
        .args(arguments.split_whitespace())
        .output()
        .expect("openssl is installed by `make setup`");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

const NEW_KEY: &str = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";

fn make_authority(folder: &Path) {
    openssl(folder, &format!("{NEW_KEY} -x509 -subj /CN=authority -keyout ca.key -out ca.crt"));
}

/// A certificate for 127.0.0.1 that the authority has signed.
fn make_certificate(folder: &Path, name: &str) {
    std::fs::write(folder.join("extensions"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    openssl(folder, &format!("{NEW_KEY} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
    let sign = "x509 -req -days 2 -CA ca.crt -CAkey ca.key -CAcreateserial -extfile extensions";
    openssl(folder, &format!("{sign} -in {name}.csr -out {name}.crt"));
}
