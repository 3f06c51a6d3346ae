//! One server, what it serves, and what the nodes have agreed on about it.

use std::{collections::BTreeSet, sync::Arc};

use redis::{
    AsyncConnectionConfig, ErrorKind, RedisError, ToRedisArgs, aio::MultiplexedConnection,
};
use skein_protocol::ids::RoomId;
use tokio::sync::{Notify, watch};

use super::{
    config, is_slot_error, is_unagreed,
    keyspace::Keyspace,
    memory::ServerMemory,
    requirements::{Detector, Requirements},
    to_bus_error,
    topology::{Dial, ReadConnection, url::Address},
};
use skein_core::{
    bus::{BusError, Retention, random_epoch},
    delivery::ServerId,
};

/// What all parts need to know.
pub(super) struct RedisServer {
    /// Where it is, in a Redis Cluster.
    pub(super) address: Option<Address>,
    pub(super) dial: Arc<dyn Dial>,
    pub(super) keyspace: Keyspace,
    pub(super) retention: Retention,
    /// How much memory it has left.
    pub(super) memory: ServerMemory,
    /// The groups that it serves.
    pub(super) owned: watch::Sender<BTreeSet<u16>>,
    /// What the nodes have agreed on.
    pub(super) agreed: watch::Sender<AgreedServer>,
    /// Told when something shows that a group may be with another server.
    pub(super) topology_stale: Arc<Notify>,
    /// What it has to be, and a gateway has to be allowed there.
    pub(super) requirements: Requirements,
}

/// The server that the nodes have agreed on, and for which groups.
#[derive(Clone, Debug, Default)]
pub(super) struct AgreedServer {
    pub(super) id: Option<ServerId>,
    pub(super) groups: Arc<BTreeSet<u16>>,
    /// How often they have, on whichever: a server that was flushed is agreed on again.
    pub(super) count: u64,
}

impl AgreedServer {
    /// Whether it is on `id`, for `group`.
    pub(super) fn is_on(&self, server_id: ServerId, group: u16) -> bool {
        self.id == Some(server_id) && self.groups.contains(&group)
    }
}

impl RedisServer {
    /// The server agreed on for `group`, once it is.
    pub(super) async fn agreed(&self, group: u16) -> ServerId {
        let mut agreed = self.agreed.subscribe();
        let agreed = agreed.wait_for(|agreed| agreed.groups.contains(&group)).await;
        agreed.ok().and_then(|agreed| agreed.id).unwrap_or_default()
    }

    /// How long epoch and number of a room are kept.
    pub(super) fn meta_ttl_ms(&self, room: &RoomId) -> u64 {
        self.retention.of(room).head_ttl().as_millis() as u64
    }

    /// The first arguments of each script of a room.
    pub(super) fn common_args(
        &self,
        room: &RoomId,
        server_id: ServerId,
    ) -> impl ToRedisArgs + use<> {
        let ms = |time: std::time::Duration| time.as_millis() as u64;
        let (ttl, dedup_window) = (self.retention.of(room).ttl, self.retention.dedup_window);
        let channel = self.keyspace.channel(room);
        let meta_ttl = self.meta_ttl_ms(room);
        (server_id.to_string(), channel, random_epoch(), ms(ttl), meta_ttl, ms(dedup_window))
    }

    /// A call of a room's script, which the server has to know, as far as it is the same for all.
    pub(super) fn call(
        &self,
        script: &redis::Script,
        room: &RoomId,
        server_id: ServerId,
    ) -> redis::Cmd {
        self.call_with(script, room, server_id, &[])
    }

    /// The same with further keys.
    pub(super) fn call_with(
        &self,
        script: &redis::Script,
        room: &RoomId,
        server_id: ServerId,
        further: &[String],
    ) -> redis::Cmd {
        let keys = self.keyspace.keys(room);
        let mut command = redis::cmd("EVALSHA");
        command.arg(script.get_hash()).arg(keys.len() + further.len()).arg(&keys).arg(further);
        command.arg(self.common_args(room, server_id));
        command
    }

    /// The number of partitions that the first node recorded.
    pub(super) async fn recorded_partition_count(&self) -> Result<u16, RedisError> {
        let (mut connection, _) = self.connect(config()).await?;
        let recorded = self.keyspace.partition_count();
        // Asked first, since a Redis that is full takes no SET, not even one that would do nothing.
        let get = redis::cmd("GET").arg(&recorded).to_owned();
        if let Some(recorded) = get.query_async(&mut connection).await? {
            return Ok(recorded);
        }
        redis::cmd("SET")
            .arg(&recorded)
            .arg(self.keyspace.partitions)
            .arg("NX")
            .query_async::<()>(&mut connection)
            .await?;
        get.query_async(&mut connection).await
    }

    /// One connection, which does not reconnect by itself, and the server it leads to.
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
            None => Err((ErrorKind::Parse, "INFO tells no run_id and master_replid").into()),
        }
    }

    /// Asks something over a reader, which is thrown away where it leads to another server than the
    /// one agreed on.
    pub(super) async fn query<T>(
        &self,
        question: impl AsyncFnOnce(&mut ReadConnection) -> Result<T, RedisError>,
    ) -> Result<T, BusError> {
        if self.requirements.is_forbidden() {
            // It would be refused; the appender finds out when it is not any more.
            return Err(BusError::Unavailable);
        }
        let mut reader = self.dial.read_connection().await.map_err(|error| {
            tracing::debug!(%error, "no connection to ask by");
            BusError::Unavailable
        })?;
        question(&mut reader).await.map_err(|error| {
            if is_slot_error(&error) {
                self.topology_stale.notify_one();
                return BusError::Unavailable;
            }
            if is_unagreed(&error) || error.kind() == ErrorKind::Io {
                reader.discard();
                return BusError::Unavailable;
            }
            self.requirements.record(Detector::Call, &error);
            let failed = to_bus_error(&error);
            if failed == BusError::Rejected {
                tracing::error!(%error, "Redis refused what it was asked");
            } else {
                tracing::debug!(%error, "Redis could not be asked");
            }
            failed
        })
    }

    /// Whether it serves `group`, as far as known.
    pub(super) fn owns(&self, group: u16) -> bool {
        self.owned.borrow().contains(&group)
    }

    /// Whether the nodes have agreed on this server for `group`.
    pub(super) fn has_agreed_on(&self, server_id: ServerId, group: u16) -> bool {
        self.agreed.borrow().is_on(server_id, group)
    }

    /// Notes that the nodes have agreed on it for some more groups.
    pub(super) fn record_agreement(&self, server_id: ServerId, groups: &[u16]) {
        self.agreed.send_modify(|agreed| {
            let before =
                if agreed.id == Some(server_id) { &agreed.groups } else { &Arc::default() };
            let all = before.iter().chain(groups).copied().collect();
            let times = agreed.count + 1;
            *agreed = AgreedServer { id: Some(server_id), groups: Arc::new(all), count: times };
        });
    }

    /// Takes the agreement back, if it is one on which `gone` says so. Returns whether it was.
    pub(super) fn revoke_agreement(&self, gone: impl Fn(ServerId) -> bool) -> bool {
        self.agreed.send_if_modified(|agreed| {
            let taken = agreed.id.is_some_and(&gone);
            if taken {
                *agreed = AgreedServer { count: agreed.count, ..AgreedServer::default() };
            }
            taken
        })
    }

    /// Gives groups to it, or takes them away; what was agreed on for the latter does not count any
    /// more.
    pub(super) fn update_owned(&self, more: &[u16], fewer: &[u16]) {
        self.owned.send_modify(|owned| {
            owned.extend(more);
            owned.retain(|group| !fewer.contains(group));
        });
        self.agreed.send_modify(|agreed| {
            let left = agreed.groups.iter().copied().filter(|group| !fewer.contains(group));
            agreed.groups = Arc::new(left.collect());
        });
    }

    /// The groups that it serves and that the nodes have not agreed on it for.
    pub(super) fn unagreed_groups(&self, server_id: ServerId) -> Vec<u16> {
        let agreed = self.agreed.borrow().clone();
        let owned = self.owned.borrow();
        owned.iter().copied().filter(|group| !agreed.is_on(server_id, *group)).collect()
    }
}
