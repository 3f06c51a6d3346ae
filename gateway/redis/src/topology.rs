//! Where the primary is, and how connections to it are made.
//!
//! `url` reads how the servers are to be reached. A [`Dial`] makes connections to one server at a
//! time, and tells when they lead to the wrong one: `SingleServer`, one address for good, and `sentinel`,
//! where the address is asked for. In a Redis Cluster there are several, and [`RedisCluster`] tells which
//! of them serves what.

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

use super::{CONNECT_MAX, RESPONSE_MAX, config};
use skein_core::bus::BoxFuture;

pub mod url;
mod cluster;
mod sentinel;

pub use cluster::RedisCluster;
use sentinel::Sentinel;
use url::{Address, Login, RedisUrl, ServerAddresses, UrlError};

/// How long the others that are asked have to answer after the first has.
const FURTHER_ANSWERS_MAX: Duration = Duration::from_millis(200);
/// When a connection in silence is asked whether it lives, how often it is asked again, and how long
/// something sent may remain unacknowledged by the other host's kernel.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(5);
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);
/// How many reads go on at a time; others wait.
const READ_CONNECTIONS_MAX: usize = 8;

/// Makes connections to the primary. No connection made here reconnects by itself.
pub trait Dial: Send + Sync {
    /// A connection of its own to the server that is the primary at this moment, as far as known.
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>>;

    /// A connection to read by, given back when dropped. It may lead to a server that is no longer
    /// the primary: scripts find that out by the token.
    fn read_connection(&self) -> BoxFuture<RedisResult<ReadConnection>>;

    /// Resolves when the primary is elsewhere than where the last connection leads that was made
    /// before the call: all connections are to be made again. Never, where there is one address
    /// for good. Asks by itself while it is waited for, so one caller is enough.
    fn moved(&self) -> BoxFuture<()>;
}

/// Files that TLS needs beside what is built in, all in PEM.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Whom to trust instead of the public authorities.
    pub ca: Option<PathBuf>,
    /// The certificate that this node shows, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why no connections can be made as configured.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The URL does not read.
    #[error("cluster.redis_url: {0}")]
    Url(#[from] UrlError),
    /// A file of [`TlsFiles`] cannot be read.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The files do not fit together, or are no PEM.
    #[error("the files for TLS to Redis, or the path of its socket: {0}")]
    Client(#[from] RedisError),
}

/// How many servers share the rooms.
pub enum Topology {
    /// One at a time.
    Single(Arc<dyn Dial>),
    /// The primaries of a Redis Cluster.
    Cluster(RedisCluster),
}

/// The way to what a URL describes.
///
/// # Errors
///
/// [`TopologyError`]. That nobody answers there is none.
pub fn open(url: &str, tls: &TlsFiles) -> Result<Topology, TopologyError> {
    match url.parse()? {
        RedisUrl::Socket(url) => {
            let info = url.into_connection_info()?;
            let redis = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
            Ok(Topology::Single(Arc::new(SingleServer::new(info.set_redis_settings(redis))?)))
        }
        RedisUrl::Single(servers) => {
            let manner = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Single(Arc::new(SingleServer::new(manner.info(&servers.addresses[0])?)?)))
        }
        RedisUrl::Sentinel { servers, primary, login } => {
            let manner = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Single(Arc::new(Sentinel::new(
                primary,
                manner,
                servers.addresses,
                &login,
            ))))
        }
        RedisUrl::Cluster(servers) => {
            let manner = ConnectParams::of(&servers, tls)?;
            Ok(Topology::Cluster(RedisCluster::new(manner, servers.addresses)))
        }
    }
}

/// What all connections of a topology have in common.
#[derive(Clone)]
struct ConnectParams {
    redis: RedisConnectionInfo,
    /// An address with the parameters of TLS, where that is spoken.
    tls: Option<ConnectionAddr>,
}

impl ConnectParams {
    fn of(servers: &ServerAddresses, files: &TlsFiles) -> Result<Self, TopologyError> {
        let tls = servers.tls.then(|| tls_address(files)).transpose()?;
        // RESP3, so that pushes and answers share a connection.
        let redis = RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3);
        let redis = redis.set_db(servers.db);
        Ok(Self { redis: with_login(redis, &servers.login), tls })
    }

    /// The same servers' network, another login, and the protocol that all versions have.
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
        // Small packets matter. A host that is gone without a word is noticed also by connections
        // that nothing is sent on.
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

/// Some address with the parameters of TLS: the crate makes them only together.
fn tls_address(files: &TlsFiles) -> Result<ConnectionAddr, TopologyError> {
    // The crate chooses none. It may have been installed before, for another bus of this process.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let failed = |path: &PathBuf, error| TopologyError::File { path: path.clone(), error };
    let read = |path: &PathBuf| fs::read(path).map_err(|error| failed(path, error));
    let certificates = |path: &PathBuf| {
        let text = read(path)?;
        // Of a file of another kind the crate would make an authority that vouches for nobody.
        match CertificateDer::pem_slice_iter(&text).next() {
            Some(_) => Ok(text),
            None => Err(failed(path, io::Error::other("there is no certificate in PEM in it"))),
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

/// A connection to read by.
pub enum ReadConnection {
    /// One of a pool's.
    Pooled(deadpool_redis::Connection),
    /// One of its own.
    Dedicated(MultiplexedConnection),
}

impl ReadConnection {
    /// Closes the connection instead of giving it back.
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
    client: Client,
    pool: Pool,
}

impl SingleServer {
    pub(super) fn new(info: ConnectionInfo) -> Result<Self, RedisError> {
        Ok(Self { client: Client::open(info.clone())?, pool: pool(info)? })
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

    fn moved(&self) -> BoxFuture<()> {
        Box::pin(std::future::pending())
    }
}

async fn pooled_connection(pool: Pool) -> RedisResult<ReadConnection> {
    pool.get().await.map(ReadConnection::Pooled).map_err(|error| {
        RedisError::from((ErrorKind::Io, "no connection to read by", error.to_string()))
    })
}

/// The connections to read by from one server.
fn pool(info: ConnectionInfo) -> Result<Pool, RedisError> {
    Pool::builder(Manager::new_with_config(info, config())?)
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

/// Says so where a primary goes on acknowledging when its replicas do not follow any more: what it
/// takes then is lost if one of them takes its place. A hosted Redis may forbid the question.
pub(super) async fn warn_if_replicas_optional(connection: &mut MultiplexedConnection) {
    let asked: RedisResult<(String, (String, u32))> = redis::pipe()
        .cmd("INFO")
        .arg("replication")
        .cmd("CONFIG")
        .arg("GET")
        .arg("min-replicas-to-write")
        .query_async(connection)
        .await;
    let Ok((replication, (_, 0))) = asked else { return };
    let replicas = replication.lines().find_map(|line| line.strip_prefix("connected_slaves:"));
    if replicas.is_some_and(|replicas| replicas.trim() != "0") {
        tracing::warn!(
            "Redis has replicas and goes on without them (min-replicas-to-write is 0): what it \
             acknowledges while it is cut off is lost when a replica takes its place; set \
             min-replicas-to-write 1 and min-replicas-max-lag 2"
        );
    }
}

/// What those answer that are asked at once: the first that does, and who answers soon after.
///
/// # Errors
///
/// The last failure where nobody answers, `none` where nobody was asked.
async fn first_answers<T>(
    asked: impl IntoIterator<Item = impl Future<Output = RedisResult<T>>>,
    none: RedisError,
) -> RedisResult<Vec<T>> {
    let mut asked: FuturesUnordered<_> = asked.into_iter().collect();
    let (mut answers, mut failed) = (Vec::new(), none);
    while answers.is_empty() {
        match asked.next().await {
            Some(Ok(answer)) => answers.push(answer),
            Some(Err(error)) => failed = error,
            None => return Err(failed),
        }
    }
    let deadline = tokio::time::Instant::now() + FURTHER_ANSWERS_MAX;
    while let Ok(Some(answer)) = timeout_at(deadline, asked.next()).await {
        answers.extend(answer);
    }
    Ok(answers)
}
