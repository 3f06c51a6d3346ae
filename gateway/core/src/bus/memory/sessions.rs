//! Sessions of a single node, in this process's memory. The reference for [`SessionStore`].

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};
use skein_protocol::{
    ids::{ConnectionId, RoomId, SessionId, UserId},
    position::{Epoch, Seq},
    protocol::server_frame::InboxState,
};

use super::{MemoryBus, ready};
use crate::{
    bus::{
        BoxFuture, BusError,
        presence_store::{EphemeralEvent, UnixMillis, unix_millis_now},
        sessions::{
            ConnectionInfo, OpenedSession, SESSIONS_MAX, SecretDigest, SessionDataError,
            SessionHolder, SessionRequest, SessionSelector, SessionStore, StoredSession,
            UnixMicros, merge_data,
        },
    },
    envelope::AuthorHash,
};

/// The most sessions of all users, some 300 bytes each and their data; beyond that the least
/// recently used ones are removed.
const SESSIONS_TOTAL_MAX: usize = 100_000;

/// The sessions of all users.
#[derive(Default)]
pub(super) struct SessionTable {
    /// Most users have a single session.
    users: HashMap<UserId, Vec<SessionRow>>,
}

struct SessionRow {
    session: SessionId,
    digest: SecretDigest,
    created: UnixMillis,
    used: UnixMillis,
    connection: Option<ConnectionId>,
    about: Arc<ConnectionInfo>,
    data: Option<Box<str>>,
}

impl SessionRow {
    fn is_over(&self, ttl: Duration, now: UnixMillis) -> bool {
        self.connection.is_none() && self.used + (ttl.as_millis() as UnixMillis) <= now
    }
}

impl SessionTable {
    /// Removes sessions that were not used for longer than `ttl`, and more if there are too many.
    pub(super) fn sweep(&mut self, ttl: Duration) {
        let now = unix_millis_now();
        let mut count = 0;
        self.users.retain(|_, rows| {
            rows.retain(|row| !row.is_over(ttl, now));
            count += rows.len();
            !rows.is_empty()
        });
        if count > SESSIONS_TOTAL_MAX {
            let idle = self.users.values().flatten().filter(|row| row.connection.is_none());
            let mut used: Vec<UnixMillis> = idle.map(|row| row.used).collect();
            used.sort_unstable();
            let until = used.get(count - SESSIONS_TOTAL_MAX).copied().unwrap_or(now);
            self.users.retain(|_, rows| {
                rows.retain(|row| row.connection.is_some() || row.used > until);
                !rows.is_empty()
            });
        }
    }

    /// Whether a user has sessions.
    pub(super) fn has(&self, user: &UserId) -> bool {
        self.users.contains_key(user)
    }

    /// Bytes of the data of all sessions of a user.
    fn data_bytes(&self, user: &UserId) -> u64 {
        let rows = self.users.get(user).into_iter().flatten();
        rows.filter_map(|row| row.data.as_ref()).map(|data| data.len() as u64).sum()
    }

    fn row(&mut self, user: &UserId, session: SessionId) -> Option<&mut SessionRow> {
        self.users.get_mut(user)?.iter_mut().find(|row| row.session == session)
    }

    /// Gives the presented session to `request`'s connection. Returns the session, its former
    /// connection and the description of that one.
    fn resume(
        &mut self,
        request: &SessionRequest,
        ttl: Duration,
    ) -> Option<(SessionId, Option<ConnectionId>, Arc<ConnectionInfo>)> {
        let (session, digest) = request.resume?;
        let now = unix_millis_now();
        let row = self.row(&request.user, session)?;
        if row.digest != digest || row.is_over(ttl, now) {
            return None;
        }
        let before = row.connection.replace(request.connection);
        row.used = now;
        let about = std::mem::replace(&mut row.about, request.about.clone());
        Some((session, before, about))
    }

    fn begin(&mut self, request: &SessionRequest) -> SessionId {
        let ((session, digest), now) = (request.new_session, unix_millis_now());
        let rows = self.users.entry(request.user.clone()).or_default();
        if rows.len() >= SESSIONS_MAX
            && let Some(oldest) =
                (0..rows.len()).min_by_key(|at| (rows[*at].connection.is_some(), rows[*at].used))
        {
            rows.swap_remove(oldest);
        }
        rows.reserve_exact(1);
        rows.push(SessionRow {
            session,
            digest,
            created: now,
            used: now,
            connection: Some(request.connection),
            about: request.about.clone(),
            data: None,
        });
        session
    }
}

impl MemoryBus {
    /// The state of a connected user's inbox.
    fn inbox(&self, user: &UserId) -> InboxState {
        let name = RoomId::inbox_of(user);
        let logs = &mut *self.logs.lock();
        let Some(log) = logs.logs.get_mut(&name) else {
            let epoch = logs.epoch_of_empty(&name);
            return InboxState { epoch, seq: 0, acked: 0, oldest: 1, unread: 0 };
        };
        log.unseen = false;
        let first = log.entries.front().map(|(_, entry)| entry.position.seq);
        let author = AuthorHash::of(user);
        let acked = log.acked.min(log.top);
        let above = log.entries.iter().rev().map(|(_, entry)| entry);
        let above = above.take_while(|entry| entry.position.seq > acked);
        InboxState {
            epoch: log.epoch.clone(),
            seq: log.top,
            acked,
            oldest: first.unwrap_or(log.top + 1),
            unread: above.filter(|entry| !entry.envelope.is_from(author)).count() as u64,
        }
    }
}

fn micros_now() -> UnixMicros {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as UnixMicros
}

impl SessionStore for MemoryBus {
    fn open(&self, request: SessionRequest) -> BoxFuture<Result<OpenedSession, BusError>> {
        let (session, resumed) = {
            let table = &mut *self.sessions.lock();
            match table.resume(&request, self.session_ttl) {
                Some((session, before, about)) => {
                    if before.is_some_and(|before| before != request.connection) {
                        let event = EphemeralEvent::Replaced { session, by: request.connection };
                        self.mailboxes.send_ephemeral(RoomId::inbox_of(&request.user), event);
                    }
                    (session, Some(about))
                }
                None => (table.begin(&request), None),
            }
        };
        let inbox = self.inbox(&request.user);
        ready(Ok(OpenedSession { session, resumed, at: micros_now(), inbox }))
    }

    fn ttl(&self) -> Duration {
        self.session_ttl
    }

    fn find(
        &self,
        user: UserId,
        session: SessionId,
        digest: SecretDigest,
    ) -> BoxFuture<Result<Option<Arc<ConnectionInfo>>, BusError>> {
        let (table, now) = (&mut *self.sessions.lock(), unix_millis_now());
        let fits =
            |row: &&mut SessionRow| row.digest == digest && !row.is_over(self.session_ttl, now);
        let row = table.row(&user, session).filter(fits);
        ready(Ok(row.map(|row| row.about.clone())))
    }

    fn holder(
        &self,
        user: UserId,
        session: SessionId,
        connection: ConnectionId,
    ) -> BoxFuture<Result<SessionHolder, BusError>> {
        ready(Ok(match self.sessions.lock().row(&user, session) {
            Some(row) if row.connection == Some(connection) => SessionHolder::This,
            Some(_) => SessionHolder::Another,
            None => SessionHolder::Gone,
        }))
    }

    fn close(&self, user: UserId, session: SessionId, connection: ConnectionId) {
        let table = &mut *self.sessions.lock();
        if let Some(row) = table.row(&user, session)
            && row.connection == Some(connection)
        {
            (row.connection, row.used) = (None, unix_millis_now());
        }
    }

    fn data(
        &self,
        user: UserId,
        session: SessionId,
        change: Option<Map<String, Value>>,
    ) -> BoxFuture<Result<Map<String, Value>, SessionDataError>> {
        let table = &mut *self.sessions.lock();
        let all = table.data_bytes(&user);
        let Some(row) = table.row(&user, session) else {
            return ready(Err(SessionDataError::NoSession));
        };
        let before = row.data.as_ref().map_or(0, |data| data.len() as u64);
        let bytes_max = self.retention.limits.session_data_max;
        let data = row.data.as_deref().and_then(|data| serde_json::from_str(data).ok());
        let data = data.unwrap_or_default();
        let Some(change) = change else { return ready(Ok(data)) };
        ready(match merge_data(data, change) {
            Some((_, text))
                if text.len() as u64 > before.max(bytes_max.saturating_sub(all - before)) =>
            {
                Err(SessionDataError::TooMuch(bytes_max))
            }
            Some((data, text)) => {
                row.data = Some(text.into());
                Ok(data)
            }
            None => Err(SessionDataError::TooLarge),
        })
    }

    fn list(&self, user: UserId) -> BoxFuture<Result<Vec<StoredSession>, BusError>> {
        let table = self.sessions.lock();
        let now = unix_millis_now();
        let rows = table.users.get(&user).into_iter().flatten();
        let sessions =
            rows.filter(|row| !row.is_over(self.session_ttl, now)).map(|row| StoredSession {
                session: row.session,
                created: row.created,
                used: row.used,
                connection: row.connection,
                about: row.about.clone(),
            });
        let mut sessions: Vec<StoredSession> = sessions.collect();
        sessions.sort_by_key(|session| std::cmp::Reverse(session.used));
        ready(Ok(sessions))
    }

    fn revoke(
        &self,
        user: UserId,
        selector: SessionSelector,
    ) -> BoxFuture<Result<usize, BusError>> {
        let table = &mut *self.sessions.lock();
        let Some(rows) = table.users.get_mut(&user) else { return ready(Ok(0)) };
        let before = rows.len();
        rows.retain(|row| !selector.selects(row.session));
        let revoked = before - rows.len();
        if rows.is_empty() {
            table.users.remove(&user);
        }
        ready(Ok(revoked))
    }

    fn acknowledge(&self, user: UserId, epoch: Option<Epoch>, seq: Seq) {
        let logs = &mut *self.logs.lock();
        let Some(log) = logs.logs.get_mut(&RoomId::inbox_of(&user)) else { return };
        if epoch.is_none_or(|epoch| epoch == log.epoch) {
            log.acked = log.acked.max(seq.min(log.top));
        }
    }
}
