//! The topology of the Redis servers, and how connections to them are made.
//!
//! `url` parses the URL of the servers. A [`Dial`] makes connections to one server at a time, and
//! notices when they lead to the wrong one: `SingleServer` has one address for good, `sentinel`
//! asks Sentinels for the address. A Redis Cluster has several primaries, and [`RedisCluster`]
//! knows which of them serves a slot.

use std::{
    fs, io,
    ops::{Deref, DerefMut},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use deadpool_redis::{Manager, Pool, Runtime, Timeouts};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, ErrorKind,
    IntoConnectionInfo as _, ProtocolVersion, RedisConnectionInfo, RedisError, RedisResult,
    TlsCertificates,
    aio::MultiplexedConnection,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tokio::time::timeout_at;

use skein_core::bus::BoxFuture;

pub mod url;
mod cluster;
mod sentinel;

pub use cluster::RedisCluster;
use sentinel::Sentinel;
use url::{Address, Login, RedisUrl, ServerAddresses, SocketUrl, UrlError};

/// How long Redis may take to answer before the connection counts as dead. A publish whose answer
/// is late is repeated with its id, so that a false alarm costs no more than a reconnect.
const RESPONSE_MAX: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// How long further servers have to reply after the first one has.
const FURTHER_ANSWERS_MAX: Duration = Duration::from_millis(200);
/// When an idle connection is probed, how often the probe is repeated, and how long data may remain
/// unacknowledged by the kernel of the other host.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);
/// The most concurrent reads; others wait.
const READ_CONNECTIONS_MAX: usize = 8;

/// Makes connections to the primary. No such connection reconnects by itself.
pub trait Dial: Send + Sync {
    /// Makes a dedicated connection to the current primary, as far as known.
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>>;

    /// Takes a connection for reads from a pool, to which it returns when dropped. It may lead to a
    /// server that is no longer the primary: scripts detect that by the server id.
    fn read_connection(&self) -> BoxFuture<RedisResult<ReadConnection>>;

    /// The server as log lines name it: user, host and port, as far as known.
    fn server_name(&self) -> String;

    /// Resolves when the primary is another server than the one that the last connection made
    /// before this call leads to: all connections must be made anew. Never resolves for a fixed
    /// address. Polls while it is awaited, so that one caller is enough.
    fn moved(&self) -> BoxFuture<()>;
}

/// Files for TLS, in PEM.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// The certificate authorities to trust instead of the public ones.
    pub ca: Option<PathBuf>,
    /// The certificate that this node presents, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why no connections can be made as configured.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The URL is invalid.
    #[error("cluster.redis_url: {0}")]
    Url(#[from] UrlError),
    /// A file of [`TlsFiles`] cannot be read.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// The files do not match, or are not PEM.
    #[error("the TLS files for Redis, or the path of its Unix socket: {0}")]
    Client(#[from] RedisError),
}

/// The servers that rooms are stored on.
pub enum Topology {
    /// A single server at a time.
    Single(Arc<dyn Dial>),
    /// The primaries of a Redis Cluster.
    Cluster(RedisCluster),
}

/// Opens the topology that a URL describes.
///
/// # Errors
///
/// [`TopologyError`]. A server that does not answer is not an error here.
pub fn open(url: &str, tls: &TlsFiles) -> Result<Topology, TopologyError> {
    match url.parse()? {
        RedisUrl::Socket(SocketUrl(url)) => {
            let info = url.into_connection_info()?;
            let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
            Ok(Topology::Single(Arc::new(SingleServer::new(info.set_redis_settings(redis))?)))
        }
        RedisUrl::Single(servers) => {
            let params = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Single(Arc::new(SingleServer::new(params.info(&servers.addresses[0])?)?)))
        }
        RedisUrl::Sentinel { servers, primary, login } => {
            let params = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Single(Arc::new(Sentinel::new(
                primary,
                params,
                servers.addresses,
                &login,
            ))))
        }
        RedisUrl::Cluster(servers) => {
            let params = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Cluster(RedisCluster::new(params, servers.addresses)))
        }
    }
}

/// The parameters that all connections of a topology share.
#[derive(Clone)]
struct ConnectParams {
    redis: RedisConnectionInfo,
    /// An address with the TLS parameters, if TLS is used.
    tls: Option<ConnectionAddr>,
}

impl ConnectParams {
    fn of(servers: &ServerAddresses, files: &TlsFiles) -> Result<Self, TopologyError> {
        let tls = servers.tls.then(|| tls_address(files)).transpose()?;
        // RESP3, so that pushes and replies share a connection.
        let redis = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3);
        let redis = redis.set_db(servers.db);
        Ok(Self { redis: with_login(redis, &servers.login), tls })
    }

    /// The same network, another login, and the protocol that all versions have.
    fn for_sentinels(&self, login: &Login) -> Self {
        let redis = with_login(RedisConnectionInfo::default(), login);
        Self { redis, tls: self.tls.clone() }
    }

    fn info(&self, address: &Address) -> RedisResult<ConnectionInfo> {
        let (host, port) = (address.host.clone(), address.port);
        let address = match &self.tls {
            Some(ConnectionAddr::TcpTls { insecure, tls_params, .. }) => ConnectionAddr::TcpTls {
                host,
                port,
                insecure: *insecure,
                tls_params: tls_params.clone(),
            },
            _ => ConnectionAddr::Tcp(host, port),
        };
        // Small packets must not wait for more data. Keepalive notices a host that has disappeared
        // on idle connections as well.
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(KEEPALIVE_EVERY)
            .with_retries(3);
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_keepalive(keepalive)
            .set_user_timeout(UNACKNOWLEDGED_MAX);
        let info = address.into_connection_info()?;
        Ok(info.set_redis_settings(self.redis.clone()).set_tcp_settings(tcp))
    }
}

fn with_login(mut redis: RedisConnectionInfo, login: &Login) -> RedisConnectionInfo {
    if let Some(user) = &login.user {
        redis = redis.set_username(user);
    }
    if let Some(password) = &login.password {
        redis = redis.set_password(password);
    }
    redis
}

/// An address with the TLS parameters: the library makes them only together.
fn tls_address(files: &TlsFiles) -> Result<ConnectionAddr, TopologyError> {
    // The library selects no provider. Another bus of this process may have installed it before.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let failed = |path: &PathBuf, error| TopologyError::File { path: path.clone(), error };
    let read = |path: &PathBuf| fs::read(path).map_err(|error| failed(path, error));
    let certificates = |path: &PathBuf| {
        let text = read(path)?;
        // From another kind of file, the library would make an authority that trusts no
        // certificate.
        match CertificateDer::pem_slice_iter(&text).next() {
            Some(_) => Ok(text),
            None => Err(failed(path, io::Error::other("it contains no PEM certificate"))),
        }
    };
    let client_tls = match &files.identity {
        Some((cert, key)) => {
            Some(ClientTlsConfig { client_cert: certificates(cert)?, client_key: read(key)? })
        }
        None => None,
    };
    let root_cert = files.ca.as_ref().map(certificates).transpose()?;
    let files = TlsCertificates { client_tls, root_cert };
    let client = Client::build_with_tls("rediss://unused", files)?;
    Ok(client.get_connection_info().addr().clone())
}

/// A connection for reads.
pub enum ReadConnection {
    /// A connection of a pool.
    Pooled(deadpool_redis::Connection),
    /// A connection of its own.
    Dedicated(MultiplexedConnection),
}

impl ReadConnection {
    /// Closes the connection instead of returning it to the pool.
    pub fn discard(self) {
        if let Self::Pooled(connection) = self {
            drop(deadpool_redis::Connection::take(connection));
        }
    }
}

impl Deref for ReadConnection {
    type Target = MultiplexedConnection;

    fn deref(&self) -> &MultiplexedConnection {
        match self {
            Self::Pooled(connection) => connection,
            Self::Dedicated(connection) => connection,
        }
    }
}

impl DerefMut for ReadConnection {
    fn deref_mut(&mut self) -> &mut MultiplexedConnection {
        match self {
            Self::Pooled(connection) => connection,
            Self::Dedicated(connection) => connection,
        }
    }
}

/// A single server at a fixed address.
pub(super) struct SingleServer {
    name: String,
    client: Client,
    pool: Pool,
}

impl SingleServer {
    pub(super) fn new(info: ConnectionInfo) -> Result<Self, RedisError> {
        let name = server_name(info.redis_settings().username(), info.addr());
        Ok(Self { name, client: Client::open(info.clone())?, pool: pool(info)? })
    }
}

impl Dial for SingleServer {
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_multiplexed_async_connection_with_config(&config).await })
    }

    fn read_connection(&self) -> BoxFuture<RedisResult<ReadConnection>> {
        Box::pin(pooled_connection(self.pool.clone()))
    }

    fn server_name(&self) -> String {
        self.name.clone()
    }

    fn moved(&self) -> BoxFuture<()> {
        Box::pin(std::future::pending())
    }
}

/// User, host and port of a server.
fn server_name(user: Option<&str>, address: impl std::fmt::Display) -> String {
    match user {
        Some(user) => format!("{user}@{address}"),
        None => address.to_string(),
    }
}

async fn pooled_connection(pool: Pool) -> RedisResult<ReadConnection> {
    pool.get().await.map(ReadConnection::Pooled).map_err(|error| {
        RedisError::from((ErrorKind::Io, "no connection for a read", error.to_string()))
    })
}

/// The timeouts of a connection.
pub(super) fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_MAX))
        .set_response_timeout(Some(RESPONSE_MAX))
}

/// A pool of connections for reads from one server.
fn pool(info: ConnectionInfo) -> Result<Pool, RedisError> {
    Pool::builder(Manager::new_with_config(info, connection_config())?)
        .max_size(READ_CONNECTIONS_MAX)
        .runtime(Runtime::Tokio1)
        .timeouts(Timeouts {
            wait: Some(RESPONSE_MAX),
            create: Some(CONNECT_MAX),
            recycle: Some(CONNECT_MAX),
        })
        .build()
        .map_err(|_| RedisError::from((ErrorKind::Client, "no runtime for the pool")))
}

/// Warns if the primary keeps acknowledging writes when its replicas do not follow: those writes
/// are lost if a replica takes over. A hosted Redis may deny the query.
pub(super) async fn warn_if_replicas_optional(connection: &mut MultiplexedConnection) {
    let queries: RedisResult<(String, (String, u32))> = redis::pipe()
        .cmd("INFO")
        .arg("replication")
        .cmd("CONFIG")
        .arg("GET")
        .arg("min-replicas-to-write")
        .query_async(connection)
        .await;
    let Ok((replication, (_, 0))) = queries else { return };
    let replicas = replication.lines().find_map(|line| line.strip_prefix("connected_slaves:"));
    if replicas.is_some_and(|replicas| replicas.trim() != "0") {
        tracing::warn!(
            "Redis acknowledges writes without its replicas (min-replicas-to-write is 0): writes that it \
             acknowledges while it is cut off are lost when a replica takes over; set \
             min-replicas-to-write 1 and min-replicas-max-lag 2"
        );
    }
}

/// The answers to concurrent queries: the first one, and those that follow soon.
///
/// # Errors
///
/// The last failure if every query fails, `none` if there are no queries.
async fn first_answers<T>(
    queries: impl IntoIterator<Item = impl Future<Output = RedisResult<T>>>,
    none: RedisError,
) -> RedisResult<Vec<T>> {
    let mut queries: FuturesUnordered<_> = queries.into_iter().collect();
    let (mut answers, mut failed) = (Vec::new(), none);
    while answers.is_empty() {
        match queries.next().await {
            Some(Ok(answer)) => answers.push(answer),
            Some(Err(error)) => failed = error,
            None => return Err(failed),
        }
    }
    let deadline = tokio::time::Instant::now() + FURTHER_ANSWERS_MAX;
    while let Ok(Some(answer)) = timeout_at(deadline, queries.next()).await {
        answers.extend(answer);
    }
    Ok(answers)
}
