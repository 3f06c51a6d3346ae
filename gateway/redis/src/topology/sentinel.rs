//! A primary that Sentinels name, another one after each failover.
//!
//! All Sentinels that are known are asked at once, each time anew, and the one with the newest view
//! is believed: a Sentinel that was cut off goes on naming the primary of before. Where only such
//! answer, none is believed, unless most say so. Sentinels learn of each other, and what they know
//! is added to those configured.
//!
//! A primary that was cut off and replaced does not close its connections, and acknowledges on
//! until it hears of it. So the Sentinels are asked while connections stand, too.

use std::{future, sync::Arc, time::Duration};

use deadpool_redis::Pool;
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, RedisError, RedisResult, Value,
    aio::MultiplexedConnection, from_redis_value,
};
use tokio::time::MissedTickBehavior;

use super::{
    Address, ConnectParams, Dial, Login, ReadConnection, first_answers, pool, pooled_connection,
};
use crate::config;
use skein_core::bus::BoxFuture;

/// How often the Sentinels are asked while connections stand.
const POLL_INTERVAL: Duration = Duration::from_secs(2);
/// The most Sentinels known; further ones are not learned of.
const SENTINELS_MAX: usize = 16;

/// Asks Sentinels where the primary is.
pub(super) struct Sentinel {
    inner: Arc<SentinelClient>,
}

struct SentinelClient {
    /// What the Sentinels call the primary.
    primary: String,
    servers: ConnectParams,
    sentinels: ConnectParams,
    /// How many Sentinels are configured.
    configured: usize,
    state: Mutex<SentinelState>,
}

struct SentinelState {
    /// Those configured, and behind them those learned of.
    sentinels: Vec<Address>,
    /// The newest that was believed.
    epoch: u64,
    /// Where the last connection leads, and the readers of that server.
    connected_to: Option<(Address, Pool)>,
}

/// What a Sentinel says.
struct SentinelView {
    primary: Address,
    /// Rises with each failover.
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

    fn moved(&self) -> BoxFuture<()> {
        let inner = self.inner.clone();
        let dialled = inner.state.lock().connected_to.as_ref().map(|(address, _)| address.clone());
        Box::pin(async move { inner.moved(dialled).await })
    }
}

impl SentinelClient {
    async fn connect(&self, config: AsyncConnectionConfig) -> RedisResult<MultiplexedConnection> {
        let address = self.find_primary().await?;
        let info = self.servers.info(&address)?;
        let client = Client::open(info.clone())?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        // The Sentinels may not have heard of a change yet, or the server not of its part in it.
        let replication: String =
            redis::cmd("INFO").arg("replication").query_async(&mut connection).await?;
        if !replication.contains("role:master") {
            return Err(no_primary("the server that the Sentinels name is a replica"));
        }
        let mut state = self.state.lock();
        if state.connected_to.as_ref().is_none_or(|(dialled, _)| *dialled != address) {
            tracing::info!(%address, primary = self.primary, "the Sentinels name a primary");
            state.connected_to = Some((address, pool(info)?));
        }
        Ok(connection)
    }

    /// Asks until another primary is named than the one dialled.
    async fn moved(&self, dialled: Option<Address>) {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match self.find_primary().await {
                Ok(address) if Some(&address) != dialled.as_ref() => {
                    tracing::warn!(%address, primary = self.primary,
                        "the Sentinels name another primary");
                    return;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "no Sentinel answers"),
            }
        }
    }

    /// Where the primary is, as the Sentinels say.
    async fn find_primary(&self) -> RedisResult<Address> {
        let views = self.query_all().await?;
        let mut state = self.state.lock();
        for sentinel in views.iter().flat_map(|view| &view.sentinels) {
            if !state.sentinels.contains(sentinel) && state.sentinels.len() < SENTINELS_MAX {
                tracing::info!(%sentinel, "learned of another Sentinel");
                state.sentinels.push(sentinel.clone());
            }
        }
        let newest = newest(views, state.epoch, self.configured)?;
        state.epoch = newest.epoch;
        Ok(newest.primary)
    }

    /// What those say that answer soon: one at least.
    async fn query_all(&self) -> RedisResult<Vec<SentinelView>> {
        let sentinels = self.state.lock().sentinels.clone();
        let asked = sentinels.iter().map(|sentinel| self.query(sentinel));
        let views = first_answers(asked, no_primary("no Sentinel answers")).await?;
        Ok(views)
    }

    async fn query(&self, sentinel: &Address) -> RedisResult<SentinelView> {
        let client = Client::open(self.sentinels.info(sentinel)?)?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&config()).await?;
        let mut pipeline = redis::pipe();
        for question in ["GET-MASTER-ADDR-BY-NAME", "MASTER", "SENTINELS"] {
            pipeline.cmd("SENTINEL").arg(question).arg(&self.primary);
        }
        pipeline.ignore_errors();
        let answers: Vec<RedisResult<Value>> = pipeline.query_async(&mut connection).await?;
        let [address, primary, sentinels]: [RedisResult<Value>; 3] =
            answers.try_into().map_err(|_| no_primary("a Sentinel left a question open"))?;
        let unknown = || {
            let text = "the Sentinels know no primary of the name in cluster.redis_url";
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

/// The view to believe, where `epoch` was the newest before.
fn newest(views: Vec<SentinelView>, epoch: u64, configured: usize) -> RedisResult<SentinelView> {
    let answers = views.len();
    let newest = views.into_iter().max_by_key(|view| view.epoch);
    let newest = newest.ok_or_else(|| no_primary("no Sentinel answers"))?;
    // Sentinels that were all set up anew count from the start again.
    if newest.epoch < epoch && answers * 2 <= configured {
        return Err(no_primary("only Sentinels answer that have missed a failover"));
    }
    Ok(newest)
}

/// Names and values, as Sentinels answer.
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

    fn believed(views: Vec<SentinelView>, epoch: u64, configured: usize) -> Option<String> {
        newest(views, epoch, configured).ok().map(|view| view.primary.host)
    }

    #[test]
    fn the_newest_view_is_believed_and_old_ones_only_of_most() {
        let both = || vec![view("new", 2), view("old", 1)];
        assert_eq!(believed(both(), 1, 3).as_deref(), Some("new"));
        assert_eq!(believed(vec![view("new", 2)], 2, 3).as_deref(), Some("new"));
        assert_eq!(believed(vec![view("old", 1)], 2, 3), None);
        assert_eq!(believed(vec![view("old", 1), view("old", 1)], 2, 3).as_deref(), Some("old"));
        assert_eq!(believed(vec![view("old", 1)], 2, 1).as_deref(), Some("old"));
        assert_eq!(believed(Vec::new(), 0, 1), None);
    }
}
