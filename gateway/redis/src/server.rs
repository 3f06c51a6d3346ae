//! One server: the groups that it serves, and the agreement of the nodes on it.

use std::{collections::BTreeSet, sync::Arc};

use redis::{
    AsyncConnectionConfig, ErrorKind, FromRedisValue, RedisError, ToRedisArgs, ToSingleRedisArg,
    aio::MultiplexedConnection,
};
use skein_protocol::{ids::RoomId, position::Position};
use tokio::sync::{Notify, watch};

use super::{
    SCHEMA,
    error::{is_slot_error, is_unagreed, to_bus_error},
    floors::Floors,
    keyspace::Keyspace,
    memory::ServerMemory,
    requirements::{Detector, Requirements},
    topology::{Dial, ReadConnection, connection_config, url::Address},
    untrusted::Lossy,
};
use skein_core::{
    bus::{BusError, Retention, random_epoch},
    delivery::ServerId,
};

/// A server, as all its tasks share it.
pub(super) struct RedisServer {
    /// Its address in a Redis Cluster.
    pub(super) address: Option<Address>,
    pub(super) dial: Arc<dyn Dial>,
    pub(super) keyspace: Keyspace,
    pub(super) retention: Retention,
    /// Where the logs of rooms begin that the server does not have.
    pub(super) floors: Floors,
    /// The memory pressure of the server.
    pub(super) memory: ServerMemory,
    /// The groups that it serves.
    pub(super) owned: watch::Sender<BTreeSet<u16>>,
    /// The agreement of the nodes.
    pub(super) agreed: watch::Sender<AgreedServer>,
    /// Notified when an answer shows that a group may be on another server.
    pub(super) topology_stale: Arc<Notify>,
    /// The version, settings and permissions that gateways require.
    pub(super) requirements: Requirements,
}

/// The server that the nodes have agreed on, and for which groups.
#[derive(Clone, Debug, Default)]
pub(super) struct AgreedServer {
    pub(super) id: Option<ServerId>,
    pub(super) groups: Arc<BTreeSet<u16>>,
    /// The number of agreements so far, on any server: the nodes agree anew on a server that was
    /// flushed.
    pub(super) count: u64,
}

impl AgreedServer {
    /// Whether the agreement is on `server_id`, for `group`.
    pub(super) fn is_on(&self, server_id: ServerId, group: u16) -> bool {
        self.id == Some(server_id) && self.groups.contains(&group)
    }
}

impl RedisServer {
    /// Waits until the nodes have agreed on a server for `group`, and returns it.
    pub(super) async fn agreed(&self, group: u16) -> ServerId {
        let mut agreed = self.agreed.subscribe();
        let agreed = agreed.wait_for(|agreed| agreed.groups.contains(&group)).await;
        agreed.ok().and_then(|agreed| agreed.id).unwrap_or_default()
    }

    /// How long the head of a room's log is kept, ms.
    pub(super) fn meta_ttl_ms(&self, room: &RoomId) -> u64 {
        self.retention.of(room).head_ttl().as_millis() as u64
    }

    /// The arguments that every script of a room begins with.
    pub(super) fn common_args(
        &self,
        room: &RoomId,
        server_id: ServerId,
    ) -> impl ToRedisArgs + use<> {
        let ms = |time: std::time::Duration| time.as_millis() as u64;
        let (ttl, dedup_window) = (self.retention.of(room).ttl, self.retention.dedup_window);
        let channel = self.keyspace.channel(room);
        let meta_ttl = self.meta_ttl_ms(room);
        let epoch = random_epoch() + &self.floors.argument(room);
        (server_id.to_string(), channel, epoch, ms(ttl), meta_ttl, ms(dedup_window))
    }

    /// A call of a room's script by its hash, with the common keys and arguments.
    pub(super) fn call(
        &self,
        script: &redis::Script,
        room: &RoomId,
        server_id: ServerId,
    ) -> redis::Cmd {
        self.call_with(script, room, server_id, &[])
    }

    /// Like [`RedisServer::call`], with further keys.
    pub(super) fn call_with(
        &self,
        script: &redis::Script,
        room: &RoomId,
        server_id: ServerId,
        more_keys: &[String],
    ) -> redis::Cmd {
        let keys = self.keyspace.keys(room);
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.get_hash()).arg(keys.len() + more_keys.len()).arg(&keys).arg(more_keys);
        command.arg(self.common_args(room, server_id));
        command
    }

    /// The number of partitions that the first node recorded.
    pub(super) async fn recorded_partition_count(&self) -> Result<u16, RedisError> {
        self.recorded(self.keyspace.partition_count(), self.keyspace.partitions).await
    }

    /// The schema of the stored data that the first node recorded. A value that no gateway wrote
    /// is replaced.
    pub(super) async fn recorded_schema(&self) -> Result<u32, RedisError> {
        let key = self.keyspace.schema();
        let Lossy(recorded) = self.recorded(key.clone(), SCHEMA).await?;
        if let Ok(recorded) = recorded.parse() {
            return Ok(recorded);
        }
        let (mut connection, _) = self.connect(connection_config()).await?;
        redis::cmd("SET").arg(&key).arg(SCHEMA).query_async::<()>(&mut connection).await?;
        Ok(SCHEMA)
    }

    /// The value of `key`, which is `own` if there was none: of nodes that start at once, one
    /// records it.
    async fn recorded<T: FromRedisValue>(
        &self,
        key: String,
        own: impl ToSingleRedisArg,
    ) -> Result<T, RedisError> {
        let (mut connection, _) = self.connect(connection_config()).await?;
        // Read first: a full Redis takes no SET, not even one without effect.
        let get = redis::cmd("GET").arg(&key).to_owned();
        if let Some(recorded) = get.query_async(&mut connection).await? {
            return Ok(recorded);
        }
        let mut set = redis::cmd("SET");
        set.arg(&key).arg(own).arg("NX").query_async::<()>(&mut connection).await?;
        get.query_async(&mut connection).await
    }

    /// Makes a connection, which does not reconnect by itself. Returns it with the server it leads
    /// to.
    pub(super) async fn connect(
        &self,
        config: AsyncConnectionConfig,
    ) -> Result<(MultiplexedConnection, ServerId), RedisError> {
        let connected = self.connect_and_ask(config).await;
        if let Err(error) = &connected {
            self.topology_stale.notify_one();
            self.requirements.record(Detector::Call, error);
            if error.kind() == ErrorKind::RESP3NotSupported {
                let _ = self.requirements.record_version(Some("older than 6.0".to_owned()));
            }
        }
        connected
    }

    async fn connect_and_ask(
        &self,
        config: AsyncConnectionConfig,
    ) -> Result<(MultiplexedConnection, ServerId), RedisError> {
        let mut connection = self.dial.connect(config).await?;
        let (run, replication): (String, String) = redis::pipe()
            .cmd("INFO")
            .arg("server")
            .cmd("INFO")
            .arg("replication")
            .query_async(&mut connection)
            .await?;
        self.requirements.check_version(&run)?;
        if !replication.contains("role:master") {
            return Err((ErrorKind::Io, "the server is a replica").into());
        }
        let part = |info: &str, name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|id| id.get(..8)).map(str::to_owned)
        };
        let server_id = part(&run, "run_id").zip(part(&replication, "master_replid"));
        let server_id = server_id.and_then(|(run, history)| format!("{run}{history}").parse().ok());
        match server_id {
            Some(server_id) => Ok((connection, server_id)),
            None => Err((ErrorKind::Parse, "INFO has no run_id and master_replid").into()),
        }
    }

    /// Runs a query on a pooled connection. Discards the connection if it leads to another server
    /// than the agreed one.
    pub(super) async fn query<T>(
        &self,
        query: impl AsyncFnOnce(&mut ReadConnection) -> Result<T, RedisError>,
    ) -> Result<T, BusError> {
        if self.requirements.is_denied() {
            // It would be denied; the appender finds out when the permission is granted.
            return Err(BusError::Unavailable);
        }
        let mut connection = self.dial.read_connection().await.map_err(|error| {
            tracing::debug!(%error, "no connection for a query");
            BusError::Unavailable
        })?;
        query(&mut connection).await.map_err(|error| {
            if is_slot_error(&error) {
                self.topology_stale.notify_one();
                return BusError::Unavailable;
            }
            if is_unagreed(&error) || error.kind() == ErrorKind::Io {
                connection.discard();
                return BusError::Unavailable;
            }
            self.requirements.record(Detector::Call, &error);
            let bus_error = to_bus_error(&error);
            if bus_error == BusError::Rejected {
                tracing::error!(%error, "Redis rejected a query");
            } else {
                tracing::debug!(%error, "cannot query Redis");
            }
            bus_error
        })
    }

    /// Whether the server serves `group`, as far as known.
    pub(super) fn owns(&self, group: u16) -> bool {
        self.owned.borrow().contains(&group)
    }

    /// Whether the nodes have agreed on this server for `group`.
    pub(super) fn has_agreed_on(&self, server_id: ServerId, group: u16) -> bool {
        self.agreed.borrow().is_on(server_id, group)
    }

    /// Records an agreement on the server for further groups.
    pub(super) fn record_agreement(&self, server_id: ServerId, groups: &[u16]) {
        self.agreed.send_modify(|agreed| {
            let before =
                if agreed.id == Some(server_id) { &agreed.groups } else { &Arc::default() };
            let all = before.iter().chain(groups).copied().collect();
            let times = agreed.count + 1;
            if agreed.id != Some(server_id) {
                self.floors.clear();
            }
            *agreed = AgreedServer { id: Some(server_id), groups: Arc::new(all), count: times };
        });
    }

    /// Revokes the agreement if `gone` selects its server. Returns whether it did.
    pub(super) fn revoke_agreement(&self, gone: impl Fn(ServerId) -> bool) -> bool {
        self.agreed.send_if_modified(|agreed| {
            let revoked = agreed.id.is_some_and(&gone);
            if revoked {
                *agreed = AgreedServer { count: agreed.count, ..AgreedServer::default() };
            }
            revoked
        })
    }

    /// Adds and removes groups that the server serves. An agreement for removed groups ends.
    pub(super) fn update_owned(&self, added: &[u16], removed: &[u16]) {
        self.owned.send_modify(|owned| {
            owned.extend(added);
            owned.retain(|group| !removed.contains(group));
        });
        self.agreed.send_modify(|agreed| {
            let left = agreed.groups.iter().copied().filter(|group| !removed.contains(group));
            agreed.groups = Arc::new(left.collect());
        });
    }

    /// The groups that the server serves without an agreement.
    pub(super) fn unagreed_groups(&self, server_id: ServerId) -> Vec<u16> {
        let agreed = self.agreed.borrow().clone();
        let owned = self.owned.borrow();
        owned.iter().copied().filter(|group| !agreed.is_on(server_id, *group)).collect()
    }
}

/// A position as two arguments of a script, both empty for `None`.
pub(super) fn position_args(position: Option<&Position>) -> (&str, String) {
    position.map_or(("", String::new()), |at| (at.epoch.as_str(), at.seq.to_string()))
}
