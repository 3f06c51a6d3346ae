//! Where the primary is, and how connections to it are made.

use std::ops::{Deref, DerefMut};

use deadpool_redis::{Manager, Pool, Runtime, Timeouts};
use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, ErrorKind, RedisError, RedisResult,
    aio::MultiplexedConnection,
};

use super::{CONNECT_MAX, RESPONSE_MAX, config};
use crate::bus::BoxFuture;

/// How many reads go on at a time; others wait.
const READERS_MAX: usize = 8;

/// Makes connections to the primary. No connection made here reconnects by itself.
pub trait Dial: Send + Sync {
    /// A connection of its own to the server that is the primary at this moment, as far as known.
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>>;

    /// A connection to read by, given back when dropped. It may lead to a server that is no longer
    /// the primary: scripts find that out by the token.
    fn reader(&self) -> BoxFuture<RedisResult<Reader>>;
}

/// A connection to read by.
pub enum Reader {
    /// One of a pool's.
    Pooled(deadpool_redis::Connection),
    /// One of its own.
    Own(MultiplexedConnection),
}

impl Reader {
    /// Closes the connection instead of giving it back.
    pub fn discard(self) {
        if let Self::Pooled(connection) = self {
            drop(deadpool_redis::Connection::take(connection));
        }
    }
}

impl Deref for Reader {
    type Target = MultiplexedConnection;

    fn deref(&self) -> &MultiplexedConnection {
        match self {
            Self::Pooled(connection) => connection,
            Self::Own(connection) => connection,
        }
    }
}

impl DerefMut for Reader {
    fn deref_mut(&mut self) -> &mut MultiplexedConnection {
        match self {
            Self::Pooled(connection) => connection,
            Self::Own(connection) => connection,
        }
    }
}

/// A single server at a fixed address.
pub(super) struct Single {
    client: Client,
    pool: Pool,
}

impl Single {
    pub(super) fn new(info: ConnectionInfo) -> Result<Self, RedisError> {
        Ok(Self { client: Client::open(info.clone())?, pool: pool(info)? })
    }
}

impl Dial for Single {
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>> {
        let client = self.client.clone();
        Box::pin(async move { client.get_multiplexed_async_connection_with_config(&config).await })
    }

    fn reader(&self) -> BoxFuture<RedisResult<Reader>> {
        let pool = self.pool.clone();
        Box::pin(async move {
            pool.get().await.map(Reader::Pooled).map_err(|error| {
                RedisError::from((ErrorKind::Io, "no connection to read by", error.to_string()))
            })
        })
    }
}

/// The connections to read by from one server.
fn pool(info: ConnectionInfo) -> Result<Pool, RedisError> {
    Pool::builder(Manager::new_with_config(info, config())?)
        .max_size(READERS_MAX)
        .runtime(Runtime::Tokio1)
        .timeouts(Timeouts {
            wait: Some(RESPONSE_MAX),
            create: Some(CONNECT_MAX),
            recycle: Some(CONNECT_MAX),
        })
        .build()
        .map_err(|_| RedisError::from((ErrorKind::Client, "no runtime for the pool")))
}
