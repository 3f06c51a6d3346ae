//! Execution of the requests that wait for the hub or the bus. Each ends with its reply.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;
use skein_protocol::{
    error::ErrorCode,
    ids::RoomId,
    protocol::{
        FrameRef, client_frame,
        server_frame::{
            HistoryPageFrame, LeftFrame, LeftReason, PresencePageFrame, PresenceUser,
            RefreshedFrame, ServerFrame, UserInfo,
        },
    },
};
use tokio::time::Instant;

use super::{RequestOutcome, Services, error_frame, reject, with_outage_delay, with_retry_after};
use crate::{
    archive::TimeRange,
    bus::{
        BoxFuture, BusError, ReadRange,
        presence_store::{
            AdmitError, JoinConditions, JoinSnapshot, OnlinePage, PresenceDetails, PresenceScope,
            UserPresence,
        },
    },
    connection::handle::ConnectionHandle,
    delivery::join::JoinStart,
    history::{HistoryPage, HistoryQuery, HistoryRange},
    hub::{
        JoinOutcome,
        join::JoinGrant,
        presence::{PresenceQuery, wire_time},
    },
    limits::{address_key, quotas::Writer},
    presence::{PresenceGuard, RoomAlive},
    rooms::passwords::{PasswordAttempt, PasswordOutcome},
    telemetry::metrics::{Metrics, StorageLimit},
};

/// The connection and the services with which a request is executed.
pub(super) struct RequestContext {
    pub(super) services: Arc<Services>,
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) reference: Option<FrameRef>,
    /// The client whose quotas are charged.
    pub(super) writer: Writer,
}

impl RequestContext {
    pub(super) fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.handle.send(frame);
    }

    /// Sends an `error` for the frame `kind`, with `retry_after_ms` if its code is retryable.
    pub(super) fn reject(
        &self,
        kind: &str,
        room: Option<&RoomId>,
        code: ErrorCode,
        text: &str,
    ) -> ErrorCode {
        let error = error_frame(self.reference.clone(), kind, room, code, text);
        let error = if code.is_retryable() { with_outage_delay(error) } else { error };
        reject(&self.services, &self.handle, error)
    }

    /// As [`RequestContext::reject`], with `rate_limited` and a given wait.
    pub(super) fn reject_with_delay(
        &self,
        kind: &str,
        room: Option<&RoomId>,
        wait: Duration,
        text: &str,
    ) -> ErrorCode {
        let code = ErrorCode::RateLimited;
        let error =
            with_retry_after(error_frame(self.reference.clone(), kind, room, code, text), wait);
        reject(&self.services, &self.handle, error)
    }

    /// The client's address, as limits count it.
    pub(super) fn address(&self) -> Option<IpAddr> {
        self.handle.owner().map(|owner| address_key(owner.about.address))
    }

    /// Waits until the read limits allow a read for the client, and charges its start. Fails after
    /// the time that a frame may wait.
    pub(super) async fn await_read_allowance(&self) -> Result<(), (ErrorCode, &'static str)> {
        let Some(owner) = self.handle.owner() else { return Ok(()) };
        let Services { reads, metrics, limits, .. } = &*self.services;
        let connection = self.handle.connection;
        let until = Instant::now() + limits.wait_max;
        let mut is_delayed = false;
        loop {
            let now = Instant::now();
            let wait = reads.wait(connection, &owner.user, now);
            if wait.is_zero() {
                reads.charge_start(connection, &owner.user, now);
                return Ok(());
            }
            if !std::mem::replace(&mut is_delayed, true) {
                metrics.client_reads_delayed.inc();
            }
            if now + wait > until {
                return Err(TOO_MUCH_READ);
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Charges the bytes of a read.
    pub(super) fn charge_read(&self, bytes: usize) {
        let Services { reads, metrics, .. } = &*self.services;
        metrics.client_read_bytes.inc_by(bytes as u64);
        if let Some(owner) = self.handle.owner() {
            reads.charge(self.handle.connection, &owner.user, bytes, Instant::now());
        }
    }

    /// As [`RequestContext::wait`], within the read limits of the client; `bytes` of the result are
    /// charged.
    pub(super) async fn read<T>(
        &self,
        question: impl Future<Output = Result<T, BusError>>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Result<T, (ErrorCode, &'static str)> {
        self.await_read_allowance().await?;
        let answer = self.wait(question).await?;
        self.charge_read(bytes(&answer));
        Ok(answer)
    }

    /// The result of the bus, within the time that a frame may wait.
    pub(super) async fn wait<T>(
        &self,
        question: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, (ErrorCode, &'static str)> {
        match tokio::time::timeout(self.services.limits.wait_max, question).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(BusError::Rejected)) => {
                Err((ErrorCode::Internal, "the bus rejected the request"))
            }
            Ok(Err(error)) if error.is_limit() => {
                Err(reject_storage(&self.services.metrics, error))
            }
            Ok(Err(_)) | Err(_) => Err(BUS_UNAVAILABLE),
        }
    }
}

/// Counts a reached storage limit, and returns its error.
pub(super) fn reject_storage(metrics: &Metrics, error: BusError) -> (ErrorCode, &'static str) {
    if let Some(limit) = error.storage_limit() {
        metrics.storage_rejections.of(limit).inc();
    }
    storage_bound_text(error)
}

/// The error of a reached storage limit.
pub(super) fn storage_bound_text(error: BusError) -> (ErrorCode, &'static str) {
    match error {
        BusError::UnseenQuota => (
            ErrorCode::RateLimited,
            "quota exceeded: too many messages to users who have never connected",
        ),
        BusError::UnseenBytes => (
            ErrorCode::LimitReached,
            "the message is larger than the inbox of a user who has never connected",
        ),
        _ => (ErrorCode::Overloaded, "the cluster's memory is nearly full: nothing was stored"),
    }
}

/// The error of an exceeded read limit.
pub(super) const TOO_MUCH_READ: (ErrorCode, &str) =
    (ErrorCode::RateLimited, "read limit exceeded for this connection or user");
/// The error while the bus is unavailable.
const BUS_UNAVAILABLE: (ErrorCode, &str) =
    (ErrorCode::Unavailable, "the bus is unavailable: try again later");
/// The text for a password that was not checked.
pub(super) const TOO_MANY_PASSWORDS: &str = "too many password attempts: this one was not checked";

/// The charge for each user of a page, in bytes: about the size of a user in Redis.
const PERSON_BYTES: usize = 64;

/// The reason why a join was rejected.
enum JoinRejection {
    NotAdmitted(AdmitError),
    /// The password was not checked; retry after this time.
    PasswordLater(Duration),
    /// The node's limit of rooms is reached.
    TooManyRooms,
}

impl From<AdmitError> for JoinRejection {
    fn from(error: AdmitError) -> Self {
        Self::NotAdmitted(error)
    }
}

impl From<BusError> for JoinRejection {
    fn from(error: BusError) -> Self {
        Self::NotAdmitted(error.into())
    }
}

/// Executes a `join`. `present_member`: for a connection that is a member already, the state that
/// it would join with now.
pub(super) async fn join(
    context: RequestContext,
    join: client_frame::JoinFrame,
    user: UserInfo,
    present_member: Option<(RoomAlive, BoxFuture<Result<JoinSnapshot, AdmitError>>)>,
) -> RequestOutcome {
    let (is_member, room) = (present_member.is_some(), join.room.clone());
    let wait_max = context.services.limits.wait_max;
    if let Err((code, text)) = context.await_read_allowance().await {
        return RequestOutcome::NotJoined(context.reject("join", Some(&room), code, text));
    }
    let joining = async {
        let (guard, grant) = match present_member {
            Some((room_alive, present_member)) => {
                (None, JoinGrant { snapshot: present_member.await?, room_alive: Some(room_alive) })
            }
            None => {
                let (guard, snapshot) = admit(&context, &join, &user).await?;
                let room_alive = Some(guard.room_alive());
                (Some(guard), JoinGrant { snapshot, room_alive })
            }
        };
        let start = match join.since {
            Some(since) => JoinStart::Since(since),
            None => JoinStart::Newest(join.history),
        };
        let (handle, reference) = (context.handle.clone(), context.reference.clone());
        let joined = context.services.hub.join(join.room, handle, reference, start, grant);
        match joined.await.map_err(|_| BusError::Unavailable)? {
            JoinOutcome::Member { bytes_read } => {
                context.charge_read(bytes_read);
                Ok(guard)
            }
            JoinOutcome::TooManyRooms => Err(JoinRejection::TooManyRooms),
        }
    };
    let error = match tokio::time::timeout(wait_max, joining).await {
        Ok(Ok(guard)) => return RequestOutcome::Joined(guard),
        Ok(Err(JoinRejection::NotAdmitted(error))) => error,
        Ok(Err(JoinRejection::PasswordLater(wait))) => {
            let code = context.reject_with_delay("join", Some(&room), wait, TOO_MANY_PASSWORDS);
            return RequestOutcome::NotJoined(code);
        }
        Ok(Err(JoinRejection::TooManyRooms)) => {
            let text = "the node's limit of rooms is reached (hub.rooms_max)";
            let code = ErrorCode::LimitReached;
            return RequestOutcome::NotJoined(context.reject("join", Some(&room), code, text));
        }
        Err(_) => {
            // The hub may have admitted the connection at the very moment of the timeout.
            if !is_member {
                context.services.hub.cancel_join(room.clone(), context.handle.clone()).await;
            }
            AdmitError::Bus(BusError::Unavailable)
        }
    };
    let (code, text) = match error {
        AdmitError::WrongPassword => (ErrorCode::WrongPassword, "wrong or missing room password"),
        AdmitError::Full => (ErrorCode::RoomFull, "the room is full"),
        AdmitError::NotFound => (ErrorCode::NotFound, "no such room: create it first"),
        AdmitError::Quota => {
            context.services.metrics.storage_rejections.of(StorageLimit::NewRooms).inc();
            (ErrorCode::RateLimited, "quota exceeded: too many new rooms")
        }
        AdmitError::Bus(BusError::Rejected) => {
            (ErrorCode::Internal, "the bus rejected the request")
        }
        AdmitError::Bus(error) if error.is_limit() => {
            reject_storage(&context.services.metrics, error)
        }
        AdmitError::Bus(_) => BUS_UNAVAILABLE,
    };
    RequestOutcome::NotJoined(context.reject("join", Some(&room), code, text))
}

/// Admits the user, after checking the password if the room requires one.
async fn admit(
    context: &RequestContext,
    join: &client_frame::JoinFrame,
    user: &UserInfo,
) -> Result<(PresenceGuard, JoinSnapshot), JoinRejection> {
    let Services { presence, rooms, rules, passwords, quotas, .. } = &*context.services;
    let within_quota = quotas.check_new_room(&context.writer, Instant::now());
    let mut keep_to = JoinConditions {
        password_hash: None,
        create: rules.create_on_join,
        within_quota: within_quota.is_ok(),
    };
    if let Some(password) = &join.password {
        let found = rooms.find(join.room.clone()).await?;
        if let Some(hash) = found.and_then(|found| found.config?.password) {
            let (user, room) = (user.id.clone(), join.room.clone());
            let attempt = PasswordAttempt { address: context.address(), user, room };
            match passwords.check(attempt, hash.clone(), password.clone()).await {
                PasswordOutcome::Matches => keep_to.password_hash = Some(hash),
                PasswordOutcome::Wrong => return Err(AdmitError::WrongPassword.into()),
                PasswordOutcome::RetryAfter(wait) => {
                    return Err(JoinRejection::PasswordLater(wait));
                }
            }
        }
    }
    let (guard, snapshot) =
        presence.admit(PresenceScope::Room(join.room.clone()), user, Some(keep_to)).await?;
    if snapshot.created {
        quotas.count_new_room(&context.writer, Instant::now());
    }
    Ok((guard, snapshot))
}

pub(super) async fn leave(context: RequestContext, room: RoomId) -> RequestOutcome {
    let RequestContext { services, handle, reference, .. } = context;
    let left = LeftFrame { reference, room: room.clone(), reason: None };
    let left = handle.outbox.encode(&ServerFrame::Left(left));
    let connection = handle.connection;
    services.hub.leave(room, connection, Some((handle, left))).await;
    RequestOutcome::Done
}

/// Executes `presence` of a room: the page lists the users whom the members here know, with details
/// from the store.
pub(super) async fn presence_in(
    context: RequestContext,
    room: RoomId,
    cursor: Option<String>,
    limit: u32,
) -> RequestOutcome {
    let Services { hub, presence, .. } = &*context.services;
    let (after, limit) = (cursor.unwrap_or_default(), limit as usize);
    let users = hub.present_after(room.clone(), after.clone(), limit).await;
    let details = presence.store().details(room.clone(), users);
    let bytes = |details: &PresenceDetails| details.users.len() * PERSON_BYTES;
    let mut details = match context.read(details, bytes).await {
        Ok(details) => details,
        Err((code, text)) => {
            context.reject("presence", Some(&room), code, text);
            return RequestOutcome::Done;
        }
    };
    let scope = PresenceScope::Room(room.clone());
    for detail in &mut details.users {
        let active = presence.active(&scope, &detail.user.id).unwrap_or_default();
        detail.active = detail.active.max(active);
    }
    let (handle, reference) = (context.handle.clone(), context.reference.clone());
    let query = PresenceQuery { handle, reference, after, limit, details, since: Instant::now() };
    hub.send_presence(room, query).await;
    RequestOutcome::Done
}

/// Executes `presence` of the cluster.
pub(super) async fn online(
    context: RequestContext,
    cursor: Option<String>,
    limit: u32,
) -> RequestOutcome {
    let presence = &context.services.presence;
    let limit = if presence.options().public { limit as usize } else { 0 };
    let page = presence.online(cursor.unwrap_or_default(), limit);
    let bytes = |page: &OnlinePage| page.users.len() * PERSON_BYTES;
    let page = match context.read(page, bytes).await {
        Ok(page) => page,
        Err((code, text)) => {
            context.reject("presence", None, code, text);
            return RequestOutcome::Done;
        }
    };
    let present = |detail: UserPresence| {
        let active = presence.active(&PresenceScope::Cluster, &detail.user.id).unwrap_or_default();
        PresenceUser {
            id: detail.user.id,
            name: detail.user.name,
            connections: detail.connections,
            since: wire_time(detail.since),
            last_active: wire_time(detail.active.max(active)),
            read: None,
        }
    };
    let users: Vec<PresenceUser> = page.users.into_iter().map(present).collect();
    let last = users.last().map(|user| user.id.to_string());
    let cursor = last.filter(|_| page.more);
    let (reference, count) = (context.reference.clone(), page.count);
    let answer = PresencePageFrame { reference, room: None, users, count, cursor };
    context.send(&ServerFrame::Presence(Box::new(answer)));
    RequestOutcome::Done
}

/// Executes `refresh`: leaves the rooms that the new token does not grant.
pub(super) async fn refreshed(
    context: RequestContext,
    expires_at: SystemTime,
    left: Vec<RoomId>,
) -> RequestOutcome {
    for room in left {
        let reason = Some(LeftReason::Forbidden);
        let handle = context.handle.clone();
        let left = LeftFrame { reference: None, room: room.clone(), reason };
        let answer = handle.outbox.encode(&ServerFrame::Left(left));
        context.services.hub.leave(room, handle.connection, Some((handle.clone(), answer))).await;
    }
    let (reference, expires_at) =
        (context.reference.clone(), skein_protocol::timestamp(expires_at));
    context.send(&ServerFrame::Refreshed(RefreshedFrame { reference, expires_at }));
    RequestOutcome::Done
}

/// The range of a log that a `history` frame requests.
pub(super) fn range_of(wanted: &client_frame::HistoryFrame) -> ReadRange {
    let limit = wanted.limit;
    match (wanted.before, wanted.after) {
        (_, Some(seq)) => ReadRange::After { seq, limit },
        (Some(seq), None) => ReadRange::Before { seq, limit },
        (None, None) => ReadRange::Newest { limit },
    }
}

/// The page that a `history` frame of a room requests.
fn query_of(wanted: &client_frame::HistoryFrame) -> HistoryQuery {
    let range = match wanted.around {
        Some(seq) => HistoryRange::Around { seq, limit: wanted.limit },
        None => HistoryRange::Read(range_of(wanted)),
    };
    HistoryQuery { range, time: TimeRange { since: wanted.since, until: wanted.until } }
}

pub(super) async fn history(
    context: RequestContext,
    room: RoomId,
    wanted: client_frame::HistoryFrame,
) -> RequestOutcome {
    let services = context.services.clone();
    let page = async {
        match services.rules.is_durable(&room) {
            true => services.history.page(&room, query_of(&wanted)).await,
            false => Ok(HistoryPage::without_log()),
        }
    };
    match context.read(page, HistoryPage::bytes).await {
        Ok(page) => {
            let (messages, more) = page.frames();
            let (reference, epoch) = (context.reference.clone(), page.epoch);
            let room = Some(room);
            let page = HistoryPageFrame { reference, room, with: None, epoch, messages, more };
            context.send(&ServerFrame::History(Box::new(page)));
        }
        Err((code, text)) => drop(context.reject("history", Some(&room), code, text)),
    }
    RequestOutcome::Done
}
