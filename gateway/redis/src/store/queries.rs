//! Queries of presence and rooms, and the creation of a room.

use std::{collections::BTreeMap, fmt::Display, sync::Arc, time::Duration};

use redis::{FromRedisValue, RedisResult, ScriptInvocation, Value, aio::MultiplexedConnection};
use skein_protocol::{
    ids::{RoomId, UserId},
    position::Seq,
    protocol::server_frame::UserInfo,
};

use super::{
    super::{
        error::to_bus_error,
        untrusted::{self, Lossy, or_default, read, texts},
    },
    BATCH_MAX, StoreWorker,
};
use skein_core::{
    bus::{
        BusError,
        presence_store::{
            OnlinePage, OnlineStatus, PresenceDetails, PresenceSnapshot, PresenceVersion,
            UserPresence,
        },
        room_store::{CreateOutcome, RoomConfig, RoomPage, RoomSummary},
    },
    telemetry::metrics::InvalidValue,
};

/// How long the rooms of an owner are remembered after the last one was created. Rooms that exist
/// for longer do not count for the quota any more.
const OWNED_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The result of claiming a room for an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnershipClaim {
    New,
    Existing,
    TooMany,
}

/// The most attempts to fill a page of rooms, many of which may be private.
const FILL_MAX: usize = 16;

impl StoreWorker {
    /// Queries the server of a group, once the nodes have agreed on it.
    pub(crate) async fn query<T>(
        &self,
        group: u16,
        query: impl AsyncFnOnce(&mut MultiplexedConnection) -> RedisResult<T>,
    ) -> Result<T, BusError> {
        let server = self.router.connections_for(group).await.server.clone();
        server.agreed(group).await;
        server.query(async |reader| query(&mut *reader).await).await
    }

    /// Runs a script on the server of a group. `subject` names a room or user in logs.
    pub(crate) async fn run_script<T: FromRedisValue>(
        &self,
        group: u16,
        subject: impl Display,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, BusError> {
        let reply =
            self.query(group, async |connection| script.invoke_async(connection).await).await?;
        read(self.router.metrics(), subject, reply).map_err(|error| to_bus_error(&error))
    }

    /// The reply of a command, in which a key of another type counts as absent.
    pub(crate) fn or_default<T: FromRedisValue + Default>(
        &self,
        subject: impl Display,
        reply: RedisResult<Value>,
    ) -> Result<T, BusError> {
        let reply = or_default(self.router.metrics(), subject, reply);
        reply.map_err(|error| to_bus_error(&error))
    }

    fn detail_of(&self, user: UserId, row: &str) -> Option<UserPresence> {
        let detail = parse_presence(user, row);
        if detail.is_none() {
            untrusted::report(self.router.metrics(), InvalidValue::Presence, "presence");
        }
        detail
    }

    fn snapshot(
        &self,
        room: &RoomId,
        rows: Vec<(Lossy, Lossy)>,
        complete: bool,
    ) -> PresenceSnapshot {
        let (snapshot, bad) = parse_snapshot(rows, complete);
        for _ in 0..bad {
            untrusted::report(self.router.metrics(), InvalidValue::Presence, room);
        }
        snapshot
    }

    pub(crate) async fn snapshots(
        self: Arc<Self>,
        rooms: Vec<RoomId>,
    ) -> Result<Vec<PresenceSnapshot>, BusError> {
        let keyspace = self.router.keyspace();
        let mut snapshots = vec![PresenceSnapshot::default(); rooms.len()];
        for (group, indices) in by_group(0..rooms.len(), |at| keyspace.group_of(&rooms[*at])) {
            for indices in indices.chunks(BATCH_MAX / 8) {
                let read = self.query(group, async |connection| {
                    let mut pipeline = redis::Pipeline::with_capacity(indices.len());
                    pipeline.ignore_errors();
                    for at in indices {
                        let channel = keyspace.channel(&rooms[*at]);
                        pipeline.cmd("HGETALL").arg(format!("{channel}:who"));
                    }
                    pipeline.query_async(connection).await
                });
                let (replies, complete): (Vec<RedisResult<Value>>, _) =
                    self.read_presence(read).await?;
                for (at, reply) in indices.iter().zip(replies) {
                    let rows = self.or_default(&rooms[*at], reply)?;
                    snapshots[*at] = self.snapshot(&rooms[*at], rows, complete);
                }
            }
        }
        Ok(snapshots)
    }

    pub(crate) async fn details(
        self: Arc<Self>,
        room: RoomId,
        users: Vec<UserId>,
    ) -> Result<PresenceDetails, BusError> {
        let keyspace = self.router.keyspace();
        let channel = keyspace.channel(&room);
        let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
        let replies: Vec<RedisResult<Value>> = self
            .query(keyspace.group_of(&room), async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.atomic().ignore_errors();
                pipeline.cmd("HMGET").arg(format!("{channel}:who")).arg("#");
                pipeline.arg(&names);
                pipeline.cmd("HMGET").arg(format!("{channel}:marks")).arg("#").arg(&names);
                pipeline.cmd("HGET").arg(format!("{channel}:meta")).arg("s");
                pipeline.query_async(connection).await
            })
            .await?;
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
        let rows: Vec<Option<Lossy>> = self.or_default(&room, next())?;
        let marks: Vec<Option<Lossy>> = self.or_default(&room, next())?;
        let top: Option<Lossy> = self.or_default(&room, next())?;
        let rows: Vec<Option<String>> =
            rows.into_iter().map(|row| row.map(|Lossy(row)| row)).collect();
        let seq = |text: Option<Lossy>| text.and_then(|Lossy(text)| text.parse::<Seq>().ok());
        let (marks, top) = (marks.into_iter().map(seq), seq(top));
        let version = rows
            .first()
            .and_then(Option::as_deref)
            .map_or(PresenceVersion::default(), parse_version);
        // If the marks have another type, none was read.
        let marks = marks.skip(1).chain(std::iter::repeat(None));
        let users = users.into_iter().zip(rows.into_iter().skip(1)).zip(marks);
        let detail = |((user, row), mark): ((UserId, Option<String>), Option<Seq>)| {
            let read = mark.unwrap_or(0).min(top.unwrap_or(0));
            Some(UserPresence { read, ..self.detail_of(user, &row?)? })
        };
        Ok(PresenceDetails { version, users: users.filter_map(detail).collect() })
    }

    pub(crate) async fn statuses(
        self: Arc<Self>,
        users: Vec<UserId>,
    ) -> Result<Vec<OnlineStatus>, BusError> {
        let keyspace = self.router.keyspace();
        let mut statuses = vec![OnlineStatus::default(); users.len()];
        let group_of = |at: &usize| keyspace.group_of_text(users[*at].as_str());
        for (group, indices) in by_group(0..users.len(), group_of) {
            let names: Vec<&str> = indices.iter().map(|at| users[*at].as_str()).collect();
            let online = keyspace.online(group);
            let read = self.query(group, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.atomic().ignore_errors();
                pipeline.cmd("HMGET").arg(format!("{online}:who")).arg(&names);
                pipeline.cmd("ZMSCORE").arg(format!("{online}:seen")).arg(&names);
                pipeline.query_async(connection).await
            });
            let (replies, complete): (Vec<RedisResult<Value>>, _) =
                self.read_presence(read).await?;
            let mut replies = replies.into_iter();
            let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
            let rows: Vec<Option<Lossy>> = self.or_default(&online, next())?;
            let seen: Vec<Option<f64>> = self.or_default(&online, next())?;
            let rows = rows.into_iter().chain(std::iter::repeat(None));
            let seen = seen.into_iter().chain(std::iter::repeat(None));
            for ((at, row), seen) in indices.into_iter().zip(rows).zip(seen) {
                let detail = row.and_then(|Lossy(row)| self.detail_of(users[at].clone(), &row));
                let active = detail.as_ref().map(|detail| detail.active);
                statuses[at] = OnlineStatus {
                    online: detail.is_some(),
                    active: active.or(seen.map(|seen| seen as u64)),
                    complete,
                };
            }
        }
        Ok(statuses)
    }

    /// At most `limit` members from `from` to `to` of an index that every group has, whether more
    /// follow, and the total number.
    async fn page(
        &self,
        index: impl Fn(u16) -> String,
        from: &str,
        to: &str,
        limit: usize,
    ) -> Result<(Vec<String>, bool, u64), BusError> {
        let (mut members, mut count) = (Vec::new(), 0);
        for group in 0..self.router.keyspace().groups() {
            let replies: Vec<RedisResult<Value>> = self
                .query(group, async |connection| {
                    redis::pipe()
                        .ignore_errors()
                        .cmd("ZRANGEBYLEX")
                        .arg(index(group))
                        .arg(from)
                        .arg(to)
                        .arg("LIMIT")
                        .arg(0)
                        .arg(limit + 1)
                        .cmd("ZCARD")
                        .arg(index(group))
                        .query_async(connection)
                        .await
                })
                .await?;
            let mut replies = replies.into_iter();
            let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
            let some: Vec<Lossy> = self.or_default(index(group), next())?;
            members.extend(texts(some));
            count += self.or_default::<u64>(index(group), next())?;
        }
        members.sort_unstable();
        let more = members.len() > limit;
        members.truncate(limit);
        Ok((members, more, count))
    }

    pub(crate) async fn online(
        self: Arc<Self>,
        after: String,
        limit: usize,
    ) -> Result<OnlinePage, BusError> {
        let keyspace = self.router.keyspace();
        let from = if after.is_empty() { "-".to_owned() } else { format!("({after}") };
        let (members, more, count) =
            self.page(|group| keyspace.users(group), &from, "+", limit).await?;
        let members = members.iter().filter_map(|member| member.parse::<UserId>().ok());
        let mut users: Vec<UserPresence> = Vec::new();
        for (group, some) in by_group(members, |user| keyspace.group_of_text(user.as_str())) {
            let names: Vec<&str> = some.iter().map(UserId::as_str).collect();
            let replies: Vec<RedisResult<Value>> = self
                .query(group, async |connection| {
                    let mut pipeline = redis::pipe();
                    pipeline.ignore_errors().cmd("HMGET");
                    pipeline.arg(format!("{}:who", keyspace.online(group))).arg(&names);
                    pipeline.query_async(connection).await
                })
                .await?;
            let reply = replies.into_iter().next().unwrap_or(Ok(Value::Nil));
            let rows: Vec<Option<Lossy>> = self.or_default("online users", reply)?;
            let details = some.into_iter().zip(rows);
            users.extend(details.filter_map(|(user, row)| self.detail_of(user, &row?.0)));
        }
        users.sort_unstable_by(|a, b| a.user.id.cmp(&b.user.id));
        Ok(OnlinePage { users, count, more })
    }

    pub(crate) async fn create(
        self: Arc<Self>,
        room: RoomId,
        config: RoomConfig,
        owned_max: Option<usize>,
    ) -> Result<CreateOutcome, BusError> {
        let keyspace = self.router.keyspace();
        let (group, channel) = (keyspace.group_of(&room), keyspace.channel(&room));
        if self.router.connections_for(group).await.server.memory.pressure().is_high() {
            return Err(BusError::MemoryFull);
        }
        let owner = config.owner.clone();
        let claim = match owned_max {
            Some(max) => self.claim_ownership(&owner, &room, max).await?,
            None => OwnershipClaim::Existing,
        };
        if claim == OwnershipClaim::TooMany {
            return Ok(CreateOutcome::QuotaExceeded);
        }
        let mut create = self.scripts.create.prepare_invoke();
        for part in ["who", "record"] {
            create.key(format!("{channel}:{part}"));
        }
        create.key(keyspace.rooms(group)).key(format!("{channel}:log"));
        create.arg(room.as_str()).arg(self.options.empty_ttl.as_millis() as u64);
        create.arg("owner").arg(config.owner.as_str()).arg("name").arg(config.name.as_str());
        create.arg("public").arg(u8::from(config.public)).arg("created").arg(config.created);
        create.arg("meta").arg(config.meta);
        if let Some(password) = config.password {
            create.arg("password").arg(password);
        }
        if let Some(max) = config.max_members {
            create.arg("max").arg(max);
        }
        let made: u8 = self.run_script(group, &room, &create).await?;
        if made == 1 {
            return Ok(CreateOutcome::Created);
        }
        if claim == OwnershipClaim::New {
            self.forget_owned(&owner, &[room]).await?;
        }
        Ok(CreateOutcome::Exists)
    }

    /// Claims a room for an owner. If the owner has the most rooms already, claims of rooms that do
    /// not exist any more are removed first: an expired room does not remove its claim.
    async fn claim_ownership(
        &self,
        owner: &UserId,
        room: &RoomId,
        max: usize,
    ) -> Result<OwnershipClaim, BusError> {
        let keyspace = self.router.keyspace();
        let group = keyspace.group_of_text(owner.as_str());
        let mut owned = self.scripts.owned.key(keyspace.owned(owner));
        owned.arg(room.as_str()).arg(max).arg(OWNED_TTL.as_millis() as u64);
        for is_first in [true, false] {
            let claim: u8 = self.run_script(group, owner, &owned).await?;
            match claim {
                1 => return Ok(OwnershipClaim::New),
                2 => return Ok(OwnershipClaim::Existing),
                _ if is_first => self.forget_deleted(owner).await?,
                _ => {}
            }
        }
        Ok(OwnershipClaim::TooMany)
    }

    /// Removes an owner's claims of rooms that do not exist any more.
    async fn forget_deleted(&self, owner: &UserId) -> Result<(), BusError> {
        let keyspace = self.router.keyspace();
        let group = keyspace.group_of_text(owner.as_str());
        let owned = keyspace.owned(owner);
        let rooms: Vec<Lossy> = self
            .query(group, async |connection| {
                redis::cmd("ZRANGE").arg(&owned).arg(0).arg(-1).query_async(connection).await
            })
            .await?;
        let rooms = texts(rooms);
        let rooms = rooms.iter().filter_map(|room| room.parse::<RoomId>().ok());
        let mut deleted = Vec::new();
        for (group, rooms) in by_group(rooms, |room| keyspace.group_of(room)) {
            let summaries = self.find_some(group, rooms.clone()).await?;
            let is_gone = |summary: &Option<RoomSummary>| {
                let config = summary.as_ref().and_then(|summary| summary.config.as_ref());
                config.is_none_or(|config| config.owner != *owner)
            };
            deleted
                .extend(rooms.into_iter().zip(summaries).filter(|(_, summary)| is_gone(summary)));
        }
        let deleted: Vec<RoomId> = deleted.into_iter().map(|(room, _)| room).collect();
        self.forget_owned(owner, &deleted).await
    }

    async fn forget_owned(&self, owner: &UserId, rooms: &[RoomId]) -> Result<(), BusError> {
        if rooms.is_empty() {
            return Ok(());
        }
        let keyspace = self.router.keyspace();
        let group = keyspace.group_of_text(owner.as_str());
        let rooms: Vec<&str> = rooms.iter().map(RoomId::as_str).collect();
        self.query(group, async |connection| {
            let mut forget = redis::cmd("ZREM");
            forget.arg(keyspace.owned(owner)).arg(&rooms).query_async::<()>(connection).await
        })
        .await
    }

    pub(crate) async fn find(
        self: Arc<Self>,
        room: RoomId,
    ) -> Result<Option<RoomSummary>, BusError> {
        let group = self.router.keyspace().group_of(&room);
        let summaries = self.find_some(group, vec![room]).await?;
        Ok(summaries.into_iter().next().flatten())
    }

    /// Summaries of rooms of one group.
    async fn find_some(
        &self,
        group: u16,
        rooms: Vec<RoomId>,
    ) -> Result<Vec<Option<RoomSummary>>, BusError> {
        let keyspace = self.router.keyspace();
        let rows: Vec<RedisResult<Value>> = self
            .query(group, async |connection| {
                let mut pipeline = redis::Pipeline::with_capacity(rooms.len() * 3);
                pipeline.ignore_errors();
                for room in &rooms {
                    let channel = keyspace.channel(room);
                    pipeline.cmd("HGETALL").arg(format!("{channel}:record"));
                    pipeline.cmd("HLEN").arg(format!("{channel}:who"));
                    pipeline.cmd("HGET").arg(format!("{channel}:who")).arg("#");
                }
                pipeline.query_async(connection).await
            })
            .await?;
        let mut rows = rows.into_iter();
        let mut summaries = Vec::with_capacity(rooms.len());
        for room in rooms {
            let (Some(config), Some(members), Some(version)) =
                (rows.next(), rows.next(), rows.next())
            else {
                return Err(BusError::Rejected);
            };
            let config: Vec<(Lossy, Lossy)> = self.or_default(&room, config)?;
            let config: BTreeMap<String, String> =
                config.into_iter().map(|(Lossy(field), Lossy(value))| (field, value)).collect();
            let members: u64 = self.or_default(&room, members)?;
            let version: Option<Lossy> = self.or_default(&room, version)?;
            let since =
                version.and_then(|Lossy(row)| row.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0);
            let config = match parse_config(&config) {
                None if !config.is_empty() => {
                    untrusted::report(self.router.metrics(), InvalidValue::RoomConfig, &room);
                    None
                }
                config => config,
            };
            let exists = config.is_some() || members > 0;
            let members = members.saturating_sub(1);
            summaries.push(exists.then_some(RoomSummary { room, config, members, since }));
        }
        Ok(summaries)
    }

    /// Removes an expired managed room from the index.
    async fn unlist(&self, group: u16, room: &RoomId) -> Result<(), BusError> {
        let keyspace = self.router.keyspace();
        let channel = keyspace.channel(room);
        let mut unlist = self.scripts.unlist.key(keyspace.rooms(group));
        unlist.key(format!("{channel}:who")).key(format!("{channel}:record")).arg(room.as_str());
        let _: u8 = self.run_script(group, room, &unlist).await?;
        Ok(())
    }

    pub(crate) async fn list(
        self: Arc<Self>,
        prefix: String,
        mut after: String,
        limit: usize,
        all: bool,
    ) -> Result<RoomPage, BusError> {
        let keyspace = self.router.keyspace();
        let mut rooms: Vec<RoomSummary> = Vec::new();
        let mut next = None;
        for _ in 0..FILL_MAX {
            let from = match (after >= prefix && !after.is_empty(), prefix.is_empty()) {
                (true, _) => format!("({after}"),
                (false, false) => format!("[{prefix}"),
                (false, true) => "-".to_owned(),
            };
            // Names are ASCII, so that this byte sorts behind every name with the prefix.
            let to = if prefix.is_empty() { "+".to_owned() } else { format!("({prefix}~") };
            let wanted = limit - rooms.len();
            let (members, more, _) =
                self.page(|group| keyspace.rooms(group), &from, &to, wanted).await?;
            let Some(last) = members.last().cloned() else { break };
            let names = members.iter().filter_map(|member| member.parse::<RoomId>().ok());
            let mut page = Vec::new();
            for (group, names) in by_group(names, |room| keyspace.group_of(room)) {
                for (room, summary) in names.iter().zip(self.find_some(group, names.clone()).await?)
                {
                    match summary {
                        Some(summary) => page.push(summary),
                        None => self.unlist(group, room).await?,
                    }
                }
            }
            page.retain(|summary| {
                all || summary.config.as_ref().is_none_or(|config| config.public)
            });
            page.sort_unstable_by(|a, b| a.room.cmp(&b.room));
            rooms.extend(page);
            next = more.then(|| last.clone());
            after = last;
            if !more || rooms.len() >= limit {
                break;
            }
        }
        Ok(RoomPage { rooms, next })
    }
}

/// Items by their group, in order.
fn by_group<T>(all: impl Iterator<Item = T>, group: impl Fn(&T) -> u16) -> BTreeMap<u16, Vec<T>> {
    let mut by_group: BTreeMap<u16, Vec<T>> = BTreeMap::new();
    for item in all {
        by_group.entry(group(&item)).or_default().push(item);
    }
    by_group
}

fn parse_version(row: &str) -> PresenceVersion {
    let mut parts = row.split(' ').map(|part| part.parse().unwrap_or(0));
    PresenceVersion { epoch: parts.next().unwrap_or(0), number: parts.next().unwrap_or(0) }
}

/// Parses `<connections> <since> <active> <name>`.
fn parse_presence(user: UserId, row: &str) -> Option<UserPresence> {
    let mut parts = row.splitn(4, ' ');
    let mut number = || parts.next()?.parse().ok();
    let (connections, since, active) = (number()?, number()?, number()?);
    let user = UserInfo { id: user, name: parts.next()?.parse().ok()? };
    Some(UserPresence { user, connections, since, active, read: 0 })
}

/// Parses the presence of a room. Returns it with the number of invalid rows.
fn parse_snapshot(rows: Vec<(Lossy, Lossy)>, complete: bool) -> (PresenceSnapshot, usize) {
    let mut snapshot = PresenceSnapshot { complete, ..PresenceSnapshot::default() };
    let mut bad = 0;
    for (Lossy(user), Lossy(row)) in rows {
        if user == "#" {
            snapshot.version = parse_version(&row);
        } else {
            match user.parse().ok().and_then(|user| parse_presence(user, &row)) {
                Some(detail) => snapshot.users.push(detail.user),
                None => bad += 1,
            }
        }
    }
    (snapshot, bad)
}

fn parse_config(fields: &BTreeMap<String, String>) -> Option<RoomConfig> {
    let field = |name: &str| fields.get(name).map(String::as_str);
    Some(RoomConfig {
        name: field("name")?.parse().ok()?,
        owner: field("owner")?.parse().ok()?,
        public: field("public") == Some("1"),
        password: field("password").map(str::to_owned),
        max_members: field("max").and_then(|max| max.parse().ok()),
        created: field("created")?.parse().ok()?,
        meta: field("meta")?.to_owned(),
    })
}
