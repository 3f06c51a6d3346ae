//! A primary that Sentinels name, another one after each failover.
//!
//! All known Sentinels are queried at once, every time anew, and the newest view is used: a
//! Sentinel that was cut off keeps naming the former primary. If only such Sentinels reply, their
//! view is not used, unless they are the majority. Sentinels know each other, and the ones they
//! name are added to those configured.
//!
//! A primary that was cut off and replaced keeps its connections open, and acknowledges writes
//! until it hears of its replacement. So the Sentinels are polled while connections are up as well.

use std::{future, sync::Arc, time::Duration};

use deadpool_redis::Pool;
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, RedisError, RedisResult, Value,
    aio::MultiplexedConnection, from_redis_value,
};
use tokio::time::MissedTickBehavior;

use super::{
    Address, ConnectParams, Dial, Login, ReadConnection, connection_config, first_answers, pool,
    pooled_connection, server_name,
};
use skein_core::bus::BoxFuture;

/// How often the Sentinels are polled while connections are up.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// The most known Sentinels; further ones are ignored.
const SENTINELS_MAX: usize = 16;

/// Finds the primary by querying Sentinels.
pub(super) struct Sentinel {
    inner: Arc<SentinelClient>,
}

struct SentinelClient {
    /// The Sentinels' name of the primary.
    primary: String,
    servers: ConnectParams,
    sentinels: ConnectParams,
    /// The number of configured Sentinels.
    configured: usize,
    state: Mutex<SentinelState>,
}

struct SentinelState {
    /// The configured Sentinels, followed by discovered ones.
    sentinels: Vec<Address>,
    /// The epoch of the newest view that was used.
    epoch: u64,
    /// The server of the last connection, and a pool for reads from it.
    connected_to: Option<(Address, Pool)>,
}

/// The reply of one Sentinel.
struct SentinelView {
    primary: Address,
    /// Increases with each failover.
    epoch: u64,
    sentinels: Vec<Address>,
}

impl Sentinel {
    pub(super) fn new(
        primary: String,
        servers: ConnectParams,
        sentinels: Vec<Address>,
        login: &Login,
    ) -> Self {
        let configured = sentinels.len();
        let state = Mutex::new(SentinelState { sentinels, epoch: 0, connected_to: None });
        let sentinels = servers.for_sentinels(login);
        let inner = SentinelClient { primary, servers, sentinels, configured, state };
        Self { inner: Arc::new(inner) }
    }
}

impl Dial for Sentinel {
    fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> BoxFuture<RedisResult<MultiplexedConnection>> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.connect(config).await })
    }

    fn read_connection(&self) -> BoxFuture<RedisResult<ReadConnection>> {
        let pool = self.inner.state.lock().connected_to.as_ref().map(|(_, pool)| pool.clone());
        match pool {
            Some(pool) => Box::pin(pooled_connection(pool)),
            None => Box::pin(future::ready(Err(no_primary("no primary was found yet")))),
        }
    }

    fn server_name(&self) -> String {
        let user = self.inner.servers.redis.username();
        match &self.inner.state.lock().connected_to {
            Some((address, _)) => server_name(user, address),
            None => server_name(user, &self.inner.primary),
        }
    }

    fn moved(&self) -> BoxFuture<()> {
        let inner = self.inner.clone();
        let former = inner.state.lock().connected_to.as_ref().map(|(address, _)| address.clone());
        Box::pin(async move { inner.moved(former).await })
    }
}

impl SentinelClient {
    async fn connect(&self, config: AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let address = self.find_primary().await?;
        let info = self.servers.info(&address)?;
        let client = Client::open(info.clone())?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        // The Sentinels may not have heard of a change yet, or the server not of its role in it.
        let replication: String =
            redis::cmd("INFO").arg("replication").query_async(&mut connection).await?;
        if !replication.contains("role:master") {
            return Err(no_primary("the server that the Sentinels name is a replica"));
        }
        let mut state = self.state.lock();
        if state.connected_to.as_ref().is_none_or(|(former, _)| *former != address) {
            tracing::info!(%address, primary = self.primary, "the Sentinels name a primary");
            state.connected_to = Some((address, pool(info)?));
        }
        Ok(connection)
    }

    /// Polls until the Sentinels name another primary than `former`.
    async fn moved(&self, former: Option<Address>) {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.find_primary().await {
                Ok(address) if Some(&address) != former.as_ref() => {
                    tracing::warn!(%address, primary = self.primary,
                        "the Sentinels name another primary");
                    return;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "no Sentinel replies"),
            }
        }
    }

    /// The address of the primary, according to the Sentinels.
    async fn find_primary(&self) -> RedisResult<Address> {
        let views = self.query_all().await?;
        let mut state = self.state.lock();
        for sentinel in views.iter().flat_map(|view| &view.sentinels) {
            if !state.sentinels.contains(sentinel) && state.sentinels.len() < SENTINELS_MAX {
                tracing::info!(%sentinel, "discovered another Sentinel");
                state.sentinels.push(sentinel.clone());
            }
        }
        let newest = newest(views, state.epoch, self.configured)?;
        state.epoch = newest.epoch;
        Ok(newest.primary)
    }

    /// The views of the Sentinels that reply soon, at least one.
    async fn query_all(&self) -> RedisResult<Vec<SentinelView>> {
        let sentinels = self.state.lock().sentinels.clone();
        let asked = sentinels.iter().map(|sentinel| self.query(sentinel));
        let views = first_answers(asked, no_primary("no Sentinel replies")).await?;
        Ok(views)
    }

    async fn query(&self, sentinel: &Address) -> RedisResult<SentinelView> {
        let client = Client::open(self.sentinels.info(sentinel)?)?;
        let mut connection =
            client.get_multiplexed_async_connection_with_config(&connection_config()).await?;
        let mut pipeline = redis::pipe();
        for query in ["GET-MASTER-ADDR-BY-NAME", "MASTER", "SENTINELS"] {
            pipeline.cmd("SENTINEL").arg(query).arg(&self.primary);
        }
        pipeline.ignore_errors();
        let answers: Vec<RedisResult<Value>> = pipeline.query_async(&mut connection).await?;
        let [address, primary, sentinels]: [RedisResult<Value>; 3] =
            answers.try_into().map_err(|_| no_primary("a Sentinel did not answer every query"))?;
        let unknown = || {
            let text = "cluster.redis_url: the Sentinels know no primary of this name";
            RedisError::from((ErrorKind::Client, text, self.primary.clone()))
        };
        let address: Option<(String, u16)> = from_redis_value(address?)?;
        let (host, port) = address.ok_or_else(unknown)?;
        let epoch = field(&pairs(primary?)?, "config-epoch").unwrap_or_default();
        let sentinels: Vec<Value> = from_redis_value(sentinels?)?;
        let sentinels = sentinels.into_iter().filter_map(|sentinel| {
            let fields = pairs(sentinel).ok()?;
            Some(Address { host: field(&fields, "ip")?, port: field(&fields, "port")? })
        });
        Ok(SentinelView { primary: Address { host, port }, epoch, sentinels: sentinels.collect() })
    }
}

/// The view to use, where `epoch` was the newest before.
fn newest(views: Vec<SentinelView>, epoch: u64, configured: usize) -> RedisResult<SentinelView> {
    let answers = views.len();
    let newest = views.into_iter().max_by_key(|view| view.epoch);
    let newest = newest.ok_or_else(|| no_primary("no Sentinel replies"))?;
    // Sentinels that were all set up anew count epochs from the start again.
    if newest.epoch < epoch && answers * 2 <= configured {
        return Err(no_primary("only Sentinels that have missed a failover reply"));
    }
    Ok(newest)
}

/// Names and values, as Sentinels reply.
fn pairs(value: Value) -> RedisResult<Vec<(String, String)>> {
    Ok(from_redis_value(value)?)
}

fn field<T: std::str::FromStr>(pairs: &[(String, String)], name: &str) -> Option<T> {
    pairs.iter().find(|(key, _)| key == name)?.1.parse().ok()
}

fn no_primary(text: &'static str) -> RedisError {
    (ErrorKind::Io, text).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(host: &str, epoch: u64) -> SentinelView {
        let primary = Address { host: host.to_owned(), port: 1 };
        SentinelView { primary, epoch, sentinels: Vec::new() }
    }

    fn used(views: Vec<SentinelView>, epoch: u64, configured: usize) -> Option<String> {
        newest(views, epoch, configured).ok().map(|view| view.primary.host)
    }

    #[test]
    fn old_views_are_used_only_of_a_majority() {
        let both = || vec![view("new", 2), view("old", 1)];
        assert_eq!(used(both(), 1, 3).as_deref(), Some("new"));
        assert_eq!(used(vec![view("new", 2)], 2, 3).as_deref(), Some("new"));
        assert_eq!(used(vec![view("old", 1)], 2, 3), None);
        assert_eq!(used(vec![view("old", 1), view("old", 1)], 2, 3).as_deref(), Some("old"));
        assert_eq!(used(vec![view("old", 1)], 2, 1).as_deref(), Some("old"));
        assert_eq!(used(Vec::new(), 0, 1), None);
    }
}
