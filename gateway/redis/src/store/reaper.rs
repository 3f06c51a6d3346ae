//! Has those leave whose node has ended, or of whom only the server knows.

use std::collections::BTreeMap;

use redis::{RedisError, RedisResult, Value};
use tokio::time::Instant;

use super::{
    super::{
        keyspace::ScopeKeys,
        to_bus_error,
        topology::ReadConnection,
        untrusted::{Lossy, is_wrong_type, or_default, read, report},
    },
    CHECK_INTERVAL, StoreWorker,
};
use skein_core::{bus::BusError, telemetry::metrics::InvalidValue};

/// How many users leave in one step.
const REAP_BATCH_MAX: usize = 500;
/// How long a node that has ended in order is waited for: its clients come back on another.
const DEREGISTERED_GRACE_MS: u64 = 3_000;

impl StoreWorker {
    /// Has those leave whose process has ended, for ever.
    pub(super) async fn reap_all(&self) {
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let old = {
                let state = self.state.lock();
                if state.is_rewritten { state.old_incarnations.clone() } else { Vec::new() }
            };
            for name in old {
                if let Err(error) = self.reap(&name).await {
                    if to_bus_error(&error) == BusError::Rejected {
                        // With every try; others are not to wait for it.
                        continue;
                    }
                    break;
                }
                self.state.lock().old_incarnations.retain(|old| *old != name);
            }
            if !self.is_settled() || !self.router.node_state().holds_lease(Instant::now()) {
                continue;
            }
            let ended = self.ended().await;
            self.registered().await;
            match ended {
                Ok(ended) => {
                    for incarnation in ended {
                        tracing::info!(%incarnation, "a node has ended; who was there leaves");
                        if let Err(error) = self.reap(&incarnation).await
                            && to_bus_error(&error) != BusError::Rejected
                        {
                            break;
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "it is not known which nodes have ended"),
            }
        }
    }

    /// The incarnations whose process lives no more.
    async fn ended(&self) -> RedisResult<Vec<String>> {
        let Some(server) = self.router.agreed_server(0) else { return Ok(Vec::new()) };
        let keyspace = self.router.keyspace();
        let mut reader = server.dial.read_connection().await?;
        type Rows = Vec<(Lossy, Lossy)>;
        let mut answers: Vec<RedisResult<Value>> = redis::pipe()
            .ignore_errors()
            .cmd("TIME")
            .cmd("HGETALL")
            .arg(keyspace.incarnations())
            .cmd("HGETALL")
            .arg(keyspace.leases())
            .query_async(&mut *reader)
            .await?;
        let metrics = self.router.metrics();
        let leases = answers.pop().unwrap_or(Ok(Value::Nil));
        if leases.as_ref().is_err_and(is_wrong_type) {
            // Nobody has ended because of that.
            return Ok(Vec::new());
        }
        let leases: Rows = or_default(metrics, "leases", leases)?;
        let incarnations = answers.pop().unwrap_or(Ok(Value::Nil));
        let incarnations: Rows = match incarnations {
            Err(error) if is_wrong_type(&error) => {
                report(metrics, InvalidValue::KeyType, "incarnations");
                redis::cmd("DEL")
                    .arg(keyspace.incarnations())
                    .query_async::<()>(&mut *reader)
                    .await?;
                Rows::new()
            }
            incarnations => redis::from_redis_value(incarnations?)?,
        };
        let time: (u64, u64) = redis::from_redis_value(answers.pop().unwrap_or(Ok(Value::Nil))?)?;
        let leases: BTreeMap<String, String> =
            leases.into_iter().map(|(Lossy(process), Lossy(row))| (process, row)).collect();
        let now = time.0 * 1000 + time.1 / 1000;
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        let incarnations = incarnations.into_iter().map(|(Lossy(name), Lossy(row))| (name, row));
        let incarnations: BTreeMap<String, String> = incarnations.collect();
        self.reregister_if_forgotten(&incarnations);
        let ended = incarnations.into_iter().filter(|(_, row)| {
            let (process, said_goodbye) = row.rsplit_once(' ').unwrap_or((row, "0"));
            let lease = leases.get(process).and_then(|row| row.split(' ').next());
            let lives = process == self.router.process().name
                || lease.is_some_and(|ends| number(ends) > now);
            let waits = match number(said_goodbye) {
                0 => false,
                at => now < at + DEREGISTERED_GRACE_MS,
            };
            !lives && !waits
        });
        Ok(ended.map(|(incarnation, _)| incarnation).collect())
    }

    /// Where nobody can know of this node's own incarnation any more it is made known again: else its
    /// users would stay when it has ended.
    fn reregister_if_forgotten(&self, known: &BTreeMap<String, String>) {
        let state = &mut *self.state.lock();
        if state.incarnation.as_ref().is_some_and(|own| !known.contains_key(own)) {
            state.is_registered = false;
        }
    }

    /// Has all leave that one incarnation had. Whoever does so at the same time finds less to do.
    async fn reap(&self, incarnation: &str) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        for group in 0..keyspace.groups() {
            let Some(server) = self.router.agreed_server(group) else { return Err(away()) };
            let mut reader = server.dial.read_connection().await?;
            let reaped = self.reap_group(&mut reader, group, incarnation).await;
            if let Err(error) = reaped {
                reader.discard();
                return Err(error);
            }
        }
        let Some(server) = self.router.agreed_server(0) else { return Err(away()) };
        let mut reader = server.dial.read_connection().await?;
        let process = incarnation.rsplit_once('.').map_or(incarnation, |(process, _)| process);
        let mut forget = self.scripts.forget.key(keyspace.incarnations());
        forget.key(keyspace.announced()).key(keyspace.leases()).arg(incarnation).arg(process);
        forget.invoke_async(&mut *reader).await
    }

    async fn reap_group(
        &self,
        reader: &mut ReadConnection,
        group: u16,
        incarnation: &str,
    ) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        let mut command = redis::cmd("HKEYS");
        command.arg(keyspace.scopes(group, incarnation));
        let places = match command.query_async::<Vec<Lossy>>(&mut **reader).await {
            Err(error) if is_wrong_type(&error) => {
                report(self.router.metrics(), InvalidValue::KeyType, "places of a node");
                let mut delete = redis::cmd("DEL");
                delete.arg(keyspace.scopes(group, incarnation));
                return delete.query_async(&mut **reader).await;
            }
            places => places?,
        };
        for Lossy(place) in places {
            let Some(keys) = keyspace.keys_of(group, &place, incarnation) else {
                report(self.router.metrics(), InvalidValue::Presence, &place);
                redis::cmd("HDEL")
                    .arg(keyspace.scopes(group, incarnation))
                    .arg(&place)
                    .query_async::<()>(&mut **reader)
                    .await?;
                continue;
            };
            loop {
                let mut reap = self.scripts.reap.prepare_invoke();
                for key in &keys.all()[..ScopeKeys::SHARED_COUNT] {
                    reap.key(key);
                }
                reap.arg(self.common_args(&keys)).arg(REAP_BATCH_MAX);
                let left: Value = reap.invoke_async(&mut **reader).await?;
                let left: u64 = read(self.router.metrics(), &place, left)?;
                if left == 0 {
                    break;
                }
            }
        }
        Ok(())
    }
}

fn away() -> RedisError {
    (redis::ErrorKind::Io, "the nodes have not agreed on a server").into()
}
