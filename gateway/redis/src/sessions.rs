//! The sessions of a cluster, in Redis: beside the inbox of their user, so that one script covers
//! both.
//!
//! Connections that open, close or acknowledge use the queue of the store worker, pipelined with
//! presence; other operations are queries.

use std::sync::Arc;

use redis::{Cmd, FromRedisValue, RedisResult, Value};
use serde_json::{Map, Value as Json};
use skein_core::envelope::AuthorHash;
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{Epoch, Seq},
    protocol::server_frame::InboxState,
};
use tokio::sync::oneshot;

use super::{
    keyspace::Keyspace,
    memory::NEW_SESSIONS_TTL,
    server::RedisServer,
    store::{Op, StoreWorker, evalsha, flag},
    untrusted::{Lossy, report},
};
use skein_core::{
    bus::{
        BusError,
        sessions::{
            ConnectionInfo, OpenedSession, SESSIONS_MAX, SecretDigest, SessionDataError,
            SessionHolder, SessionRequest, SessionSelector, StoredSession, merge_data,
        },
    },
    telemetry::metrics::InvalidValue,
};

/// How often a change of session data is tried while others change it at the same time.
const ATTEMPTS_MAX: usize = 8;

/// An operation on a user's sessions or inbox.
pub(super) enum SessionOp {
    Open {
        request: Box<SessionRequest>,
        reply: oneshot::Sender<Result<OpenedSession, BusError>>,
    },
    Use {
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
        /// Receives the holder of the session; `None` when the connection has ended.
        reply: Option<oneshot::Sender<Result<SessionHolder, BusError>>>,
    },
    /// `up_to` is filled in when the operation is taken from the queue.
    Acknowledge {
        user: UserId,
        up_to: Option<(Option<Epoch>, Seq)>,
    },
}

impl SessionOp {
    pub(super) fn user(&self) -> &UserId {
        match self {
            Self::Open { request, .. } => &request.user,
            Self::Use { user, .. } | Self::Acknowledge { user, .. } => user,
        }
    }

    /// Whether no caller waits for the operation any more.
    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::Open { reply, .. } => reply.is_closed(),
            Self::Use { reply: Some(reply), .. } => reply.is_closed(),
            Self::Use { .. } | Self::Acknowledge { .. } => false,
        }
    }

    /// The operation that releases a session which was opened for a client that has disconnected
    /// meanwhile.
    pub(super) fn close_of_abandoned(&self, reply_value: &Value) -> Option<Self> {
        let Self::Open { request, reply } = self else { return None };
        let session = parse_opened(reply_value).filter(|_| reply.is_closed())?.session;
        let (user, connection) = (request.user.clone(), request.connection);
        Some(Self::Use { user, session, connection, reply: None })
    }

    pub(super) fn succeed(self, reply_value: &Value) {
        match self {
            // A caller that does not wait any more has given up.
            Self::Open { reply, .. } => {
                drop(reply.send(parse_opened(reply_value).ok_or(BusError::Rejected)));
            }
            Self::Use { reply: Some(reply), .. } => drop(reply.send(Ok(match reply_value {
                Value::Int(1) => SessionHolder::This,
                Value::Int(2) => SessionHolder::Another,
                _ => SessionHolder::Gone,
            }))),
            Self::Use { .. } | Self::Acknowledge { .. } => {}
        }
    }

    pub(super) fn fail(self, error: BusError) {
        match self {
            Self::Open { reply, .. } => drop(reply.send(Err(error))),
            Self::Use { reply: Some(reply), .. } => drop(reply.send(Err(error))),
            Self::Use { .. } | Self::Acknowledge { .. } => {}
        }
    }
}

/// The keys of a user's sessions and of their data.
fn keys_of(keyspace: Keyspace, user: &UserId) -> [String; 2] {
    let channel = keyspace.channel(&RoomId::inbox_of(user));
    [format!("{channel}:sessions"), format!("{channel}:data")]
}

impl StoreWorker {
    pub(super) fn open_session(
        self: Arc<Self>,
        request: SessionRequest,
    ) -> impl Future<Output = Result<OpenedSession, BusError>> {
        let (reply, replied) = oneshot::channel();
        self.enqueue(Op::Session(SessionOp::Open { request: Box::new(request), reply }));
        async move { replied.await.unwrap_or(Err(BusError::Unavailable)) }
    }

    pub(super) fn use_session(
        &self,
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
    ) -> impl Future<Output = Result<SessionHolder, BusError>> + use<> {
        let (reply, replied) = oneshot::channel();
        let reply = Some(reply);
        self.enqueue(Op::Session(SessionOp::Use { user, session, connection, reply }));
        async move { replied.await.unwrap_or(Err(BusError::Unavailable)) }
    }

    pub(super) fn close_session(&self, user: UserId, session: SessionId, connection: ConnectionId) {
        self.enqueue(Op::Session(SessionOp::Use { user, session, connection, reply: None }));
    }

    pub(super) async fn find_session(
        self: Arc<Self>,
        user: UserId,
        session: SessionId,
        digest: SecretDigest,
    ) -> Result<Option<Arc<ConnectionInfo>>, BusError> {
        let keyspace = self.router.keyspace();
        let (group, [sessions, _]) =
            (keyspace.group_of_text(user.as_str()), keys_of(keyspace, &user));
        let replies: Vec<RedisResult<Value>> = self
            .query(group, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.ignore_errors();
                pipeline.cmd("TIME").cmd("HGET").arg(sessions).arg(session.to_string());
                pipeline.query_async(connection).await
            })
            .await?;
        let (now, row): (_, Option<Lossy>) = self.timed(&user, replies)?;
        let row = row
            .map(|Lossy(row)| row)
            .filter(|row| row.split(' ').next() == Some(&*digest.to_text()));
        let stored = row.and_then(|row| parse_session(&session.to_string(), &row));
        let stored = stored.filter(|stored| stored.used + self.session_ttl_ms() > now);
        Ok(stored.map(|stored| stored.about))
    }

    /// The time in milliseconds, and the reply of a command that follows `TIME`.
    fn timed<T: FromRedisValue + Default>(
        &self,
        user: &UserId,
        replies: Vec<RedisResult<Value>>,
    ) -> Result<(u64, T), BusError> {
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
        let time: (u64, u64) = self.or_default(user, next())?;
        Ok((time.0 * 1000 + time.1 / 1000, self.or_default(user, next())?))
    }

    fn session_ttl_ms(&self) -> u64 {
        self.session_ttl().as_millis() as u64
    }

    pub(super) fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq) {
        // One operation waits per user, regardless of the number of acknowledgements.
        if self.record_ack(&user, epoch, seq) {
            self.enqueue(Op::Session(SessionOp::Acknowledge { user, up_to: None }));
        }
    }

    /// The script call of an operation.
    pub(super) fn session_command(&self, op: &SessionOp, server: &RedisServer) -> Cmd {
        let keyspace = self.router.keyspace();
        let ttl = self.session_ttl_ms();
        match op {
            SessionOp::Open { request, .. } => {
                let inbox = RoomId::inbox_of(&request.user);
                let keys = [&keyspace.keys(&inbox)[..], &keys_of(keyspace, &request.user)].concat();
                let server_id = server.agreed.borrow().id.unwrap_or_default();
                let mut command = evalsha(&self.scripts.open, &keys);
                command.arg(server.common_args(&inbox, server_id));
                command.arg(&AuthorHash::of(&request.user).as_bytes()[..]);
                let text = |(session, digest): (SessionId, SecretDigest)| {
                    (session.to_string(), digest.to_text())
                };
                command.arg(request.resume.map(text).unwrap_or_default());
                command.arg(text(request.new_session)).arg(request.connection.to_string());
                let about =
                    serde_json::to_string(&*request.about).expect("a connection info serialises");
                command.arg(about).arg(ttl).arg(SESSIONS_MAX).arg(new_ttl(server, ttl));
                command
            }
            SessionOp::Use { user, session, connection, reply } => {
                let mut command = evalsha(&self.scripts.use_session, &keys_of(keyspace, user));
                command
                    .arg(session.to_string())
                    .arg(connection.to_string())
                    .arg(ttl)
                    .arg(flag(reply.is_none()))
                    .arg(new_ttl(server, ttl));
                command
            }
            SessionOp::Acknowledge { user, up_to } => {
                let (epoch, seq) = up_to.clone().unwrap_or_default();
                let inbox = RoomId::inbox_of(user);
                let meta = format!("{}:meta", keyspace.channel(&inbox));
                let mut command = evalsha(&self.scripts.acknowledge, &[meta]);
                command.arg(epoch.as_ref().map_or("", Epoch::as_str)).arg(seq);
                command.arg(server.meta_ttl_ms(&inbox));
                command
            }
        }
    }

    pub(super) async fn data(
        self: Arc<Self>,
        user: UserId,
        session: SessionId,
        change: Option<Map<String, Json>>,
    ) -> Result<Map<String, Json>, SessionDataError> {
        let keyspace = self.router.keyspace();
        let (group, keys) = (keyspace.group_of_text(user.as_str()), keys_of(keyspace, &user));
        for _ in 0..ATTEMPTS_MAX {
            let replies: Vec<RedisResult<Value>> = self
                .query(group, async |connection| {
                    redis::pipe()
                        .ignore_errors()
                        .cmd("HEXISTS")
                        .arg(&keys[0])
                        .arg(session.to_string())
                        .cmd("HGET")
                        .arg(&keys[1])
                        .arg(session.to_string())
                        .query_async(connection)
                        .await
                })
                .await?;
            let mut replies = replies.into_iter();
            let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
            if !self.or_default::<bool>(&user, next())? {
                return Err(SessionDataError::NoSession);
            }
            let before: Option<Vec<u8>> = self.or_default(&user, next())?;
            let before = before.unwrap_or_default();
            let data: Map<String, Json> = match serde_json::from_slice(&before) {
                Ok(data) => data,
                Err(_) if before.is_empty() => Map::new(),
                Err(_) => {
                    report(self.router.metrics(), InvalidValue::Session, &user);
                    Map::new()
                }
            };
            let Some(change) = &change else { return Ok(data) };
            let (data, text) =
                merge_data(data, change.clone()).ok_or(SessionDataError::TooLarge)?;
            let server = self.router.connections_for(group).await.server.clone();
            if text.len() > before.len() && server.memory.pressure().is_high() {
                return Err(BusError::MemoryFull.into());
            }
            let mut set = self.scripts.data.key(&keys[..]);
            set.arg(session.to_string()).arg(before).arg(text).arg(self.session_ttl_ms());
            set.arg(server.retention.limits.session_data_max);
            let set: i64 = self.run_script(group, &user, &set).await?;
            match set {
                1 => return Ok(data),
                0 => {}
                -2 => {
                    return Err(SessionDataError::TooMuch(
                        server.retention.limits.session_data_max,
                    ));
                }
                _ => return Err(SessionDataError::NoSession),
            }
        }
        Err(BusError::Overloaded.into())
    }

    pub(super) async fn sessions(
        self: Arc<Self>,
        user: UserId,
    ) -> Result<Vec<StoredSession>, BusError> {
        let keyspace = self.router.keyspace();
        let (group, [sessions, _]) =
            (keyspace.group_of_text(user.as_str()), keys_of(keyspace, &user));
        let replies: Vec<RedisResult<Value>> = self
            .query(group, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.ignore_errors();
                pipeline.cmd("TIME").cmd("HGETALL").arg(sessions).query_async(connection).await
            })
            .await?;
        let (now, rows): (_, Vec<(Lossy, Lossy)>) = self.timed(&user, replies)?;
        let stored = rows.iter().filter_map(|(Lossy(session), Lossy(row))| {
            let stored = parse_session(session, row);
            if stored.is_none() {
                report(self.router.metrics(), InvalidValue::Session, &user);
            }
            stored
        });
        let mut stored: Vec<StoredSession> =
            stored.filter(|stored| stored.used + self.session_ttl_ms() > now).collect();
        stored.sort_by_key(|stored| std::cmp::Reverse(stored.used));
        Ok(stored)
    }

    pub(super) async fn revoke(
        self: Arc<Self>,
        user: UserId,
        selector: SessionSelector,
    ) -> Result<usize, BusError> {
        let stored = self.clone().sessions(user.clone()).await?;
        let revoked =
            stored.into_iter().map(|stored| stored.session).filter(|one| selector.selects(*one));
        let revoked: Vec<String> = revoked.map(|session| session.to_string()).collect();
        if revoked.is_empty() {
            return Ok(0);
        }
        let keyspace = self.router.keyspace();
        let (group, keys) = (keyspace.group_of_text(user.as_str()), keys_of(keyspace, &user));
        let (removed, _): (usize, usize) = self
            .query(group, async |connection| {
                let mut pipeline = redis::pipe();
                pipeline.cmd("HDEL").arg(&keys[0]).arg(&revoked);
                pipeline.cmd("HDEL").arg(&keys[1]).arg(&revoked);
                pipeline.query_async(connection).await
            })
            .await?;
        Ok(removed)
    }
}

/// Retention of the sessions of a user that has none, ms, if memory pressure shortens it; else
/// empty.
fn new_ttl(server: &RedisServer, ttl: u64) -> String {
    match server.memory.pressure().is_high() {
        true => ttl.min(NEW_SESSIONS_TTL.as_millis() as u64).to_string(),
        false => String::new(),
    }
}

/// Parses `<digest> <created> <used> <connection or -> <about>`.
fn parse_session(session: &str, row: &str) -> Option<StoredSession> {
    let mut parts = row.splitn(5, ' ').skip(1);
    let mut part = || parts.next();
    Some(StoredSession {
        session: session.parse().ok()?,
        created: part()?.parse().ok()?,
        used: part()?.parse().ok()?,
        connection: part()?.parse().ok().map(ConnectionId),
        about: Arc::new(serde_json::from_str(part()?).ok()?),
    })
}

/// Parses the reply of `open_session.lua`.
fn parse_opened(reply_value: &Value) -> Option<OpenedSession> {
    type Answer = (String, Option<Lossy>, u64, String, Seq, Seq, Seq, u64);
    let reply_value: RedisResult<Answer> =
        redis::from_redis_value(reply_value.clone()).map_err(Into::into);
    let (session, former, at, epoch, seq, acked, oldest, unread) = reply_value.ok()?;
    let about = former.and_then(|Lossy(about)| serde_json::from_str::<ConnectionInfo>(&about).ok());
    let oldest = if oldest == 0 { seq + 1 } else { oldest };
    let inbox = InboxState { epoch: epoch.parse().ok()?, seq, acked, oldest, unread };
    Some(OpenedSession { session: session.parse().ok()?, resumed: about.map(Arc::new), at, inbox })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_parsed_with_and_without_a_connection() {
        let about = r#"{"name":"Ann Lee","node":"gw-1","address":"::1","user_agent":"a b"}"#;
        let session = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let stored = parse_session(session, &format!("ab12 5 7 - {about}")).unwrap();
        assert_eq!((stored.created, stored.used, stored.connection), (5, 7, None));
        assert_eq!(stored.about.name.as_str(), "Ann Lee");
        let stored = parse_session(session, &format!("ab12 5 7 {session} {about}")).unwrap();
        assert_eq!(stored.connection.unwrap().to_string(), session);
        assert!(parse_session(session, "ab12 5").is_none());
    }
}
