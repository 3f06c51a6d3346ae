//! The reaper: removes presence entries of processes whose lease has expired, and of former
//! incarnations of this node.

use std::collections::BTreeMap;

use redis::{RedisError, RedisResult, Value};
use tokio::time::Instant;

use super::{
    super::{
        error::to_bus_error,
        keyspace::ScopeKeys,
        topology::ReadConnection,
        untrusted::{Lossy, is_wrong_type, or_default, read, report},
    },
    CHECK_INTERVAL, StoreWorker,
};
use skein_core::{bus::BusError, telemetry::metrics::InvalidValue};

/// The most users that are removed in one step.
const REAP_BATCH_MAX: usize = 500;
/// How long the users of a node that has deregistered stay present: its clients reconnect to other
/// nodes.
const DEREGISTERED_GRACE_MS: u64 = 3_000;

impl StoreWorker {
    /// Reaps incarnations, for ever.
    pub(super) async fn reap_all(&self) {
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            let former = {
                let state = self.state.lock();
                if state.is_rewritten { state.old_incarnations.clone() } else { Vec::new() }
            };
            for name in former {
                if let Err(error) = self.reap(&name).await {
                    if to_bus_error(&error) == BusError::Rejected {
                        // It would fail with every attempt; other incarnations do not wait for it.
                        continue;
                    }
                    break;
                }
                self.state.lock().old_incarnations.retain(|former| *former != name);
            }
            if !self.waited_for_all() || !self.router.node_state().holds_lease(Instant::now()) {
                continue;
            }
            let ended = self.ended().await;
            self.registered().await;
            match ended {
                Ok(ended) => {
                    for incarnation in ended {
                        tracing::info!(%incarnation, "a process has ended; its users leave");
                        if let Err(error) = self.reap(&incarnation).await
                            && to_bus_error(&error) != BusError::Rejected
                        {
                            break;
                        }
                    }
                }
                Err(error) => tracing::debug!(%error, "cannot find out which processes have ended"),
            }
        }
    }

    /// The incarnations whose process has ended.
    async fn ended(&self) -> RedisResult<Vec<String>> {
        let Some(server) = self.router.agreed_server(0) else { return Ok(Vec::new()) };
        let keyspace = self.router.keyspace();
        let mut connection = server.dial.read_connection().await?;
        type Rows = Vec<(Lossy, Lossy)>;
        let mut replies: Vec<RedisResult<Value>> = redis::pipe()
            .ignore_errors()
            .cmd("TIME")
            .cmd("HGETALL")
            .arg(keyspace.incarnations())
            .cmd("HGETALL")
            .arg(keyspace.leases())
            .query_async(&mut *connection)
            .await?;
        let metrics = self.router.metrics();
        let leases = replies.pop().unwrap_or(Ok(Value::Nil));
        if leases.as_ref().is_err_and(is_wrong_type) {
            // That does not mean that any process has ended.
            return Ok(Vec::new());
        }
        let leases: Rows = or_default(metrics, "leases", leases)?;
        let incarnations = replies.pop().unwrap_or(Ok(Value::Nil));
        let incarnations: Rows = match incarnations {
            Err(error) if is_wrong_type(&error) => {
                report(metrics, InvalidValue::KeyType, "incarnations");
                redis::cmd("DEL")
                    .arg(keyspace.incarnations())
                    .query_async::<()>(&mut *connection)
                    .await?;
                Rows::new()
            }
            incarnations => redis::from_redis_value(incarnations?)?,
        };
        let time: (u64, u64) = redis::from_redis_value(replies.pop().unwrap_or(Ok(Value::Nil))?)?;
        let leases: BTreeMap<String, String> =
            leases.into_iter().map(|(Lossy(process), Lossy(row))| (process, row)).collect();
        let now = time.0 * 1000 + time.1 / 1000;
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        let incarnations = incarnations.into_iter().map(|(Lossy(name), Lossy(row))| (name, row));
        let incarnations: BTreeMap<String, String> = incarnations.collect();
        self.reregister_if_forgotten(&incarnations);
        let ended = incarnations.into_iter().filter(|(_, row)| {
            let (process, deregistered_at) = row.rsplit_once(' ').unwrap_or((row, "0"));
            let lease = leases.get(process).and_then(|row| row.split(' ').next());
            let is_alive = process == self.router.process().name
                || lease.is_some_and(|ends| number(ends) > now);
            let is_in_grace = match number(deregistered_at) {
                0 => false,
                at => now < at + DEREGISTERED_GRACE_MS,
            };
            !is_alive && !is_in_grace
        });
        Ok(ended.map(|(incarnation, _)| incarnation).collect())
    }

    /// Registers this node's incarnation again if Redis has lost it: otherwise its users would stay
    /// present when the node has ended.
    fn reregister_if_forgotten(&self, known: &BTreeMap<String, String>) {
        let state = &mut *self.state.lock();
        if state.incarnation.as_ref().is_some_and(|own| !known.contains_key(own)) {
            state.is_registered = false;
        }
    }

    /// Removes all presence entries of an incarnation. Several nodes may do so at the same time.
    async fn reap(&self, incarnation: &str) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        for group in 0..keyspace.groups() {
            let Some(server) = self.router.agreed_server(group) else { return Err(unagreed()) };
            let mut connection = server.dial.read_connection().await?;
            let reaped = self.reap_group(&mut connection, group, incarnation).await;
            if let Err(error) = reaped {
                connection.discard();
                return Err(error);
            }
        }
        let Some(server) = self.router.agreed_server(0) else { return Err(unagreed()) };
        let mut connection = server.dial.read_connection().await?;
        let process = incarnation.rsplit_once('.').map_or(incarnation, |(process, _)| process);
        let mut forget = self.scripts.forget.key(keyspace.incarnations());
        forget.key(keyspace.announced()).key(keyspace.leases()).arg(incarnation).arg(process);
        forget.invoke_async(&mut *connection).await
    }

    async fn reap_group(
        &self,
        connection: &mut ReadConnection,
        group: u16,
        incarnation: &str,
    ) -> RedisResult<()> {
        let keyspace = self.router.keyspace();
        let mut command = redis::cmd("HKEYS");
        command.arg(keyspace.scopes(group, incarnation));
        let scopes = match command.query_async::<Vec<Lossy>>(&mut **connection).await {
            Err(error) if is_wrong_type(&error) => {
                report(self.router.metrics(), InvalidValue::KeyType, "scopes of a process");
                let mut delete = redis::cmd("DEL");
                delete.arg(keyspace.scopes(group, incarnation));
                return delete.query_async(&mut **connection).await;
            }
            scopes => scopes?,
        };
        for Lossy(scope) in scopes {
            let Some(keys) = keyspace.keys_of(group, &scope, incarnation) else {
                report(self.router.metrics(), InvalidValue::Presence, &scope);
                redis::cmd("HDEL")
                    .arg(keyspace.scopes(group, incarnation))
                    .arg(&scope)
                    .query_async::<()>(&mut **connection)
                    .await?;
                continue;
            };
            loop {
                let mut reap = self.scripts.reap.prepare_invoke();
                for key in &keys.all()[..ScopeKeys::SHARED_COUNT] {
                    reap.key(key);
                }
                reap.arg(self.common_args(&keys)).arg(REAP_BATCH_MAX);
                let remaining: Value = reap.invoke_async(&mut **connection).await?;
                let remaining: u64 = read(self.router.metrics(), &scope, remaining)?;
                if remaining == 0 {
                    break;
                }
            }
        }
        Ok(())
    }
}

fn unagreed() -> RedisError {
    (redis::ErrorKind::Io, "the nodes have not agreed on a server").into()
}
