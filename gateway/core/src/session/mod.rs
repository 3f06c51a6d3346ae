//! One client's session and the handling of its frames.
//!
//! [`Session::handle_frame`] handles `message` and `direct` first, since they are metered by
//! other rates, and all other frames in one match. [`Session::execute`] starts deferred requests,
//! in a second match.
//!
//! Frames are handled in the order received. A frame that needs no waiting is handled at once, and
//! a publish is passed on without waiting for its `ack`. A frame that must wait (`join`, `history`
//! and others) becomes a [`DeferredRequest`], which the connection's task executes before it takes
//! the next frame.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use serde_json::value::RawValue;
use skein_protocol::{
    error::ErrorCode,
    ids::{RoomId, SessionId, UserId},
    protocol::{
        FrameRef,
        client_frame::{
            ClientFrame, CreateRoomFrame, FrameBody, HistoryFrame, JoinFrame, MarkReadFrame,
            PresenceFrame, Recipient, RefreshFrame, RoomsFrame, SendFrame, SessionSetFrame,
            SetTypingFrame, WatchFrame,
        },
        server_frame::{AckFrame, BusState, ErrorFrame, PongFrame, ServerFrame, StatusFrame},
    },
    token::RoomAccess,
};
use tokio::{sync::watch, time::Instant};

use crate::{
    bus::{
        Appended, BoxFuture, Bus, BusError,
        node_state::BusStatus,
        presence_store::{EphemeralEvent, unix_millis_now},
        room_store::{RoomConfig, RoomStore},
        sessions::SessionStore,
        ticket::PublishTicket,
    },
    connection::{
        handle::{ConnectionHandle, InlineAck},
        signals::Signal,
    },
    envelope::AuthorHash,
    history::HistoryReader,
    hub::{Hub, presence::TYPING_EVERY},
    limits::{
        meter::{Meter, MeterRates},
        quotas::{ENTRY_BYTES, Quotas, Writer},
        reads::ReadLimiter,
    },
    presence::{PresenceGuard, PresenceTracker},
    publisher::{MessageSender, PublishError, Publisher, Receipt},
    rooms::{RoomRules, passwords::Passwords},
    telemetry::{
        log_limiter::LogLimiter,
        metrics::{Metrics, StorageLimit},
        traces::{TraceCaller, TraceContext},
    },
};

pub mod auth;
mod directs;
pub mod peer_index;
mod requests;
mod rooms;

use auth::{Auth, Identity};
use peer_index::PeerIndex;
pub use rooms::{info_of, name_of as room_name};

/// The services that all sessions share.
pub struct Services {
    /// Publishes messages.
    pub publisher: Publisher,
    /// The rooms of this node's connections.
    pub hub: Hub,
    /// For reads of a log.
    pub bus: Arc<dyn Bus>,
    /// Pages of rooms, from their logs and the archive.
    pub history: HistoryReader,
    /// The presence of this node's connections.
    pub presence: Arc<PresenceTracker>,
    /// The store of rooms.
    pub rooms: Arc<dyn RoomStore>,
    /// The store of sessions.
    pub sessions: Arc<dyn SessionStore>,
    /// Authentication of clients, which a reload may replace.
    pub auth: ArcSwap<Auth>,
    /// Rules that apply to rooms by name.
    pub rules: Arc<RoomRules>,
    /// Room passwords.
    pub passwords: Arc<Passwords>,
    /// Limits of reads for clients.
    pub reads: ReadLimiter,
    /// The peers of the directs in inboxes.
    pub peer_index: PeerIndex,
    /// The status of the bus that clients are told.
    pub bus_status: watch::Receiver<BusStatus>,
    /// The node's metrics.
    pub metrics: Arc<Metrics>,
    /// The quotas of stored state.
    pub quotas: Arc<Quotas>,
    /// The limits of a session.
    pub limits: SessionLimits,
    /// The limits of a client, which a reload may replace.
    pub client_limits: ArcSwap<ClientLimits>,
}

/// The limits of a session.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    /// The most managed rooms of an owner; 0: no limit.
    pub managed_max: usize,
    /// The most time that a frame may wait for the bus.
    pub wait_max: Duration,
}

/// The limits of a client. The options of `limits` consist of these and of limits elsewhere.
#[derive(Clone, Debug)]
pub struct ClientLimits {
    /// The rates of a connection's input. A connection keeps those that it was told at its start.
    pub rates: Arc<MeterRates>,
    /// The most rooms joined at a time.
    pub rooms_max: usize,
    /// The most users watched at a time.
    pub watches_max: usize,
    /// The bytes per second that may be read for a connection; 0: no limit.
    pub read_bytes_per_second: usize,
}

/// A client, from `connected` to its end.
pub struct Session {
    services: Arc<Services>,
    identity: Identity,
    author: AuthorHash,
    session: SessionId,
    /// The user's inbox, of which this connection is a member until its end.
    inbox: RoomId,
    handle: Arc<ConnectionHandle>,
    /// The client whose quotas are charged.
    writer: Writer,
    /// The users whose status is reported to this connection.
    watching: BTreeSet<UserId>,
    /// Keeps the user online.
    online: PresenceGuard,
    /// Ordered by room.
    rooms: Vec<PresenceGuard>,
    /// The room whose join is being executed.
    joining: Option<RoomId>,
}

/// A frame whose handling waits for the hub or the bus.
#[derive(Debug)]
pub enum DeferredRequest {
    /// `join`
    Join(Option<FrameRef>, JoinFrame),
    /// `leave`
    Leave(Option<FrameRef>, RoomId),
    /// `history`
    History(Option<FrameRef>, HistoryFrame),
    /// `presence`
    Presence(Option<FrameRef>, PresenceFrame),
    /// `watch`
    Watch(Option<FrameRef>, WatchFrame),
    /// `unwatch`
    Unwatch(WatchFrame),
    /// `session_get`, and with data `session_set`
    Session(Option<FrameRef>, Option<SessionSetFrame>),
    /// `refresh`
    Refresh(Option<FrameRef>, RefreshFrame),
    /// `create_room`; the password, if any, is not hashed yet.
    CreateRoom(Option<FrameRef>, RoomId, Box<RoomConfig>, Option<String>),
    /// `delete_room`
    DeleteRoom(Option<FrameRef>, RoomId),
    /// `room_info`
    RoomInfo(Option<FrameRef>, RoomId),
    /// `rooms`
    Rooms(Option<FrameRef>, RoomsFrame),
}

impl DeferredRequest {
    /// Whether the request changes nothing, so that it is pointless once the client cannot receive
    /// the reply.
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::History(..)
                | Self::Presence(..)
                | Self::Watch(..)
                | Self::Session(_, None)
                | Self::RoomInfo(..)
                | Self::Rooms(..)
        )
    }
}

/// The outcome of a [`DeferredRequest`], whose reply was sent.
pub enum RequestOutcome {
    /// The connection is a member. `Some` if it was not one before.
    Joined(Option<PresenceGuard>),
    /// The join was rejected with this code.
    NotJoined(ErrorCode),
    /// These users are not watched, since the node's limit is reached.
    NotWatched(Vec<UserId>),
    /// Nothing changed in the session.
    Done,
}

/// The range of `retry_after_ms` of `unavailable`. All clients learn of an outage in the same
/// moment and must not return in one.
const RETRY_AFTER: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(2);
/// As [`RETRY_AFTER`], for a storage limit: it stays reached for longer.
const BOUND_RETRY_AFTER: std::ops::Range<Duration> =
    Duration::from_secs(10)..Duration::from_secs(20);

impl Session {
    /// Creates the session of `identity` for the connection `handle`.
    pub fn new(
        services: Arc<Services>,
        identity: Identity,
        session: SessionId,
        handle: Arc<ConnectionHandle>,
        online: PresenceGuard,
    ) -> Self {
        let address = handle.owner().map(|owner| owner.about.address);
        Self {
            services,
            writer: Writer::new(identity.user.id.clone(), address),
            author: AuthorHash::of(&identity.user.id),
            inbox: RoomId::inbox_of(&identity.user.id),
            identity,
            session,
            handle,
            watching: BTreeSet::new(),
            online,
            rooms: Vec::new(),
            joining: None,
        }
    }

    /// The status of the bus; the caller [sends](Session::send_bus_status) each change.
    pub fn bus_status(&self) -> watch::Receiver<BusStatus> {
        let mut status = self.services.bus_status.clone();
        if status.borrow_and_update().bus == BusState::Down {
            status.mark_changed();
        }
        status
    }

    /// Sends a `status` frame.
    pub fn send_bus_status(&self, status: BusStatus) {
        let since = skein_protocol::timestamp(status.since.unwrap_or_else(SystemTime::now));
        self.send(&ServerFrame::Status(StatusFrame { bus: status.bus, since }));
    }

    /// The end of the session's token, including leeway.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.identity.ends_at()
    }

    /// Whether the bus has answered every publish.
    pub fn is_settled(&self) -> bool {
        self.handle.has_no_pending_publish()
    }

    /// Handles a frame if the connection's meter allows it. The caller must
    /// [execute](Session::execute) the returned request before the next frame.
    pub fn handle_frame(
        &mut self,
        frame: Result<ClientFrame<'_>, Box<ErrorFrame>>,
        meter: &mut Meter,
        now: Instant,
    ) -> Option<DeferredRequest> {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => {
                self.reject_unreadable(*error, meter, now);
                return None;
            }
        };
        let reference = frame.reference;
        if let FrameBody::Message(message) = &frame.body {
            let taken = self.message(reference, message, meter, now);
            if let Recipient::User(user) = &message.to
                && taken
                && !self.watching.contains(user)
            {
                self.handle.outbox.signal(Signal::Watch(user.clone()));
            }
            return None;
        }
        if let Err(wait) = meter.take_frame(frame.body.listed_users(), now) {
            self.reject(rate_limited(reference, frame.body.frame_type(), wait));
            return None;
        }
        self.online.touch();
        if frame.body.has_password()
            && let Err(wait) = meter.take_password(now)
        {
            self.reject(rate_limited(reference, frame.body.frame_type(), wait));
            return None;
        }
        match frame.body {
            FrameBody::Join(join) => return Some(DeferredRequest::Join(reference, join)),
            FrameBody::Leave(leave) => return Some(DeferredRequest::Leave(reference, leave.room)),
            FrameBody::History(history) => {
                return Some(DeferredRequest::History(reference, history));
            }
            FrameBody::Presence(who) => return Some(DeferredRequest::Presence(reference, who)),
            FrameBody::Watch(users) => return Some(DeferredRequest::Watch(reference, users)),
            FrameBody::Unwatch(users) => return Some(DeferredRequest::Unwatch(users)),
            FrameBody::SessionGet => return Some(DeferredRequest::Session(reference, None)),
            FrameBody::SessionSet(set) => {
                let bytes = serde_json::to_string(&set.data).map_or(0, |data| data.len());
                if !self.charge_quota(reference.as_ref(), "session_set", bytes, now) {
                    return None;
                }
                return Some(DeferredRequest::Session(reference, Some(set)));
            }
            FrameBody::Refresh(refresh) => {
                return Some(DeferredRequest::Refresh(reference, refresh));
            }
            FrameBody::Ack(ack) => {
                let user = self.identity.user.id.clone();
                self.services.sessions.acknowledge(user, ack.epoch, ack.seq);
            }
            FrameBody::CreateRoom(create) => {
                let bytes = create.meta.map_or(0, |meta| meta.get().len());
                if !self.charge_quota(reference.as_ref(), "create_room", bytes, now) {
                    return None;
                }
                return self.create_room(reference, create);
            }
            FrameBody::DeleteRoom(delete) => return self.delete_room(reference, delete.room),
            FrameBody::RoomInfo(info) => {
                return Some(DeferredRequest::RoomInfo(reference, info.room));
            }
            FrameBody::Rooms(rooms) => return Some(DeferredRequest::Rooms(reference, rooms)),
            FrameBody::Typing(typing) => self.typing(reference, &typing),
            FrameBody::Read(read) => self.read(reference, read),
            FrameBody::Ping(ping) => self.pong(reference, ping.timestamp),
            FrameBody::Message(_) | FrameBody::Pong => {}
        }
        None
    }

    /// Charges the quota of stored bytes, or rejects the frame.
    fn charge_quota(
        &self,
        reference: Option<&FrameRef>,
        kind: &str,
        bytes: usize,
        now: Instant,
    ) -> bool {
        let taken = self.services.quotas.take_bytes(&self.writer, bytes + ENTRY_BYTES, now);
        let Err(wait) = taken else { return true };
        self.services.metrics.storage_rejections.of(StorageLimit::Bytes).inc();
        self.reject(rate_limited(reference.cloned(), kind, wait));
        false
    }

    /// Gives up the presence guard of a room, if this connection has one.
    fn drop_guard(&mut self, room: &RoomId) {
        if let Ok(place) = self.index_of(room) {
            self.rooms.remove(place).leave();
        }
    }

    /// The presence guard of a room, if this connection is a member.
    fn guard_in(&mut self, room: &RoomId) -> Option<&PresenceGuard> {
        let place = self.index_of(room).ok()?;
        if self.rooms[place].is_closed() {
            self.rooms.remove(place);
            return None;
        }
        Some(&self.rooms[place])
    }

    fn index_of(&self, room: &RoomId) -> Result<usize, usize> {
        self.rooms.binary_search_by(|guard| guard.room().cmp(&Some(room)))
    }

    /// Records an activity in a room, or rejects a frame that needs membership.
    fn in_room(&mut self, reference: Option<&FrameRef>, kind: &str, room: &RoomId) -> bool {
        if let Some(guard) = self.guard_in(room) {
            guard.touch();
            return true;
        }
        let (code, text) = (ErrorCode::NotJoined, "join the room first");
        self.reject(error_frame(reference.cloned(), kind, Some(room), code, text));
        false
    }

    fn typing(&mut self, reference: Option<FrameRef>, typing: &SetTypingFrame) {
        let SetTypingFrame { room, is_typing } = typing;
        if !self.in_room(reference.as_ref(), "typing", room) {
            return;
        }
        if !self.may_write(reference.as_ref(), "typing", room) {
            return;
        }
        let publishes = self
            .guard_in(room)
            .is_some_and(|guard| guard.should_publish_typing(*is_typing, TYPING_EVERY));
        if publishes {
            let (user, is_typing) = (self.identity.user.id.clone(), *is_typing);
            let event = EphemeralEvent::Typing { user, is_typing };
            // Sent at most once, without waiting for the result.
            let ticket = PublishTicket::new(drop);
            self.services.presence.store().publish_ephemeral(room.clone(), event, ticket);
        }
    }

    fn read(&mut self, reference: Option<FrameRef>, read: MarkReadFrame) {
        if self.in_room(reference.as_ref(), "read", &read.room) {
            let (user, by) = (self.identity.user.id.clone(), self.handle.connection);
            self.services.presence.store().set_read_mark(read.room, user, read.seq, by);
        }
    }

    /// Whether the token grants write access to a room; rejects the frame if not.
    fn may_write(&self, reference: Option<&FrameRef>, kind: &str, room: &RoomId) -> bool {
        let text = match self.identity.access(room) {
            Some(RoomAccess::ReadWrite) => return true,
            Some(RoomAccess::Read) => "the token grants read access only",
            None => "the token does not grant access to this room",
        };
        let code = ErrorCode::Forbidden;
        self.reject(error_frame(reference.cloned(), kind, Some(room), code, text));
        false
    }

    fn delete_room(&self, reference: Option<FrameRef>, room: RoomId) -> Option<DeferredRequest> {
        let may = self.may_write(reference.as_ref(), "delete_room", &room);
        may.then_some(DeferredRequest::DeleteRoom(reference, room))
    }

    fn create_room(
        &mut self,
        reference: Option<FrameRef>,
        create: CreateRoomFrame<'_>,
    ) -> Option<DeferredRequest> {
        let room = create.room;
        if !self.may_write(reference.as_ref(), "create_room", &room) {
            return None;
        }
        let record = RoomConfig {
            name: create.name.unwrap_or_else(|| rooms::name_of(&room)),
            owner: self.identity.user.id.clone(),
            public: create.public,
            password: None,
            max_members: create.max_members,
            created: unix_millis_now(),
            meta: create.meta.map_or("{}", RawValue::get).to_owned(),
        };
        Some(DeferredRequest::CreateRoom(reference, room, Box::new(record), create.password))
    }

    /// Starts a deferred request. The future does not borrow the session, so that the connection
    /// can be served meanwhile; its output goes to [`Session::complete`].
    pub fn execute(&mut self, request: DeferredRequest) -> BoxFuture<RequestOutcome> {
        let (services, handle) = (self.services.clone(), self.handle.clone());
        let user = self.identity.user.clone();
        let writer = self.writer.clone();
        let context = |reference| requests::RequestContext { services, handle, reference, writer };
        let answered: BoxFuture<_> = Box::pin(std::future::ready(RequestOutcome::Done));
        match request {
            DeferredRequest::Join(reference, join) => {
                match self.may_join(reference.as_ref(), &join.room) {
                    Ok(()) => {
                        self.joining = Some(join.room.clone());
                        let present_member = self
                            .guard_in(&join.room)
                            .map(|guard| (guard.room_alive(), guard.rejoin_snapshot()));
                        Box::pin(requests::join(context(reference), join, user, present_member))
                    }
                    Err(error) => {
                        let code = self.reject(error);
                        Box::pin(std::future::ready(RequestOutcome::NotJoined(code)))
                    }
                }
            }
            DeferredRequest::Leave(reference, room) => {
                self.drop_guard(&room);
                Box::pin(requests::leave(context(reference), room))
            }
            DeferredRequest::History(reference, history) => {
                match (history.room.clone(), &history.with) {
                    (Some(room), _) if !self.in_room(reference.as_ref(), "history", &room) => {
                        answered
                    }
                    (Some(room), _) => {
                        Box::pin(requests::history(context(reference), room, history))
                    }
                    (None, Some(with)) => {
                        let (user, with) = (user.id, with.clone());
                        Box::pin(directs::history(context(reference), user, with, history))
                    }
                    // The parser ensures that one of them is present.
                    (None, None) => answered,
                }
            }
            DeferredRequest::Watch(reference, WatchFrame { users }) => {
                let users: BTreeSet<UserId> = users.into_iter().collect();
                let more = users.iter().filter(|user| !self.watching.contains(*user)).count();
                let watches_max = self.services.client_limits.load().watches_max;
                if self.watching.len() + more > watches_max {
                    let text = format!("limit reached: at most {watches_max} watched users");
                    let code = ErrorCode::LimitReached;
                    self.reject(error_frame(reference, "watch", None, code, &text));
                    return answered;
                }
                self.watching.extend(users.iter().cloned());
                Box::pin(directs::watch(context(reference), users))
            }
            DeferredRequest::Unwatch(WatchFrame { mut users }) => {
                users.retain(|user| {
                    // Sent for a direct before this frame.
                    self.handle.outbox.cancel_signal(&Signal::Watch(user.clone()));
                    self.watching.remove(user)
                });
                Box::pin(directs::unwatch(context(None), users))
            }
            DeferredRequest::Session(reference, set) => {
                let (user, session) = (user.id, self.session);
                Box::pin(directs::session(context(reference), user, session, set))
            }
            DeferredRequest::Refresh(reference, refresh) => match self.refresh(&refresh) {
                Ok((expires_at, left)) => {
                    Box::pin(requests::refreshed(context(reference), expires_at, left))
                }
                Err((code, text)) => {
                    self.reject(error_frame(reference, "refresh", None, code, text));
                    answered
                }
            },
            DeferredRequest::Presence(reference, who) => match &who.room {
                Some(room) if !self.in_room(reference.as_ref(), "presence", room) => answered,
                Some(room) => {
                    let room = room.clone();
                    Box::pin(requests::presence_in(context(reference), room, who.cursor, who.limit))
                }
                None => Box::pin(requests::online(context(reference), who.cursor, who.limit)),
            },
            DeferredRequest::CreateRoom(reference, room, record, password) => {
                Box::pin(rooms::create(context(reference), room, *record, password))
            }
            DeferredRequest::DeleteRoom(reference, room) => {
                Box::pin(rooms::delete(context(reference), room, user.id))
            }
            DeferredRequest::RoomInfo(reference, room) => {
                let (user, is_member) = (user.id, self.guard_in(&room).is_some());
                let is_open = self.identity.access(&room).is_some();
                Box::pin(rooms::info(context(reference), room, user, is_member, is_open))
            }
            DeferredRequest::Rooms(reference, wanted) => {
                let identity = self.identity.clone();
                Box::pin(rooms::list(context(reference), wanted, identity))
            }
        }
    }

    /// Applies the outcome of a deferred request.
    ///
    /// # Errors
    ///
    /// The code of the `error` that rejected a join.
    pub fn complete(&mut self, outcome: RequestOutcome) -> Result<(), ErrorCode> {
        let joining = self.joining.take();
        match outcome {
            RequestOutcome::Joined(guard) => {
                if let (Some(room), Some(guard)) = (joining, guard) {
                    match self.index_of(&room) {
                        Ok(place) => self.rooms[place] = guard,
                        Err(place) => {
                            // Most connections are in one room.
                            self.rooms.reserve_exact(usize::from(self.rooms.is_empty()));
                            self.rooms.insert(place, guard);
                        }
                    }
                }
                Ok(())
            }
            RequestOutcome::NotJoined(code) => Err(code),
            RequestOutcome::NotWatched(users) => {
                for user in &users {
                    self.watching.remove(user);
                }
                Ok(())
            }
            RequestOutcome::Done => Ok(()),
        }
    }

    fn may_join(&mut self, reference: Option<&FrameRef>, room: &RoomId) -> Result<(), ErrorFrame> {
        let rooms_max = self.services.client_limits.load().rooms_max;
        let error_frame =
            |code, text: &str| error_frame(reference.cloned(), "join", Some(room), code, text);
        if self.identity.access(room).is_none() {
            return Err(error_frame(
                ErrorCode::Forbidden,
                "the token does not grant access to this room",
            ));
        }
        if self.rooms.len() >= rooms_max {
            self.rooms.retain(|guard| !guard.is_closed());
        }
        if self.guard_in(room).is_none() && self.rooms.len() >= rooms_max {
            let text = format!("limit reached: at most {rooms_max} joined rooms");
            return Err(error_frame(ErrorCode::LimitReached, &text));
        }
        Ok(())
    }

    /// Checks whether the token and the limits allow a join, before it is requested.
    ///
    /// # Errors
    ///
    /// The code with which the join would be rejected.
    pub fn check_join(&mut self, room: &RoomId) -> Result<(), ErrorCode> {
        self.may_join(None, room).map_err(|error| error.code)
    }

    /// Ends the session and all its memberships.
    pub async fn end(&mut self) {
        let connection = self.handle.connection;
        let rooms = std::mem::take(&mut self.rooms);
        // A join that was not awaited to its end may have succeeded.
        let hub = &self.services.hub;
        for room in
            rooms.iter().filter_map(PresenceGuard::room).chain(&self.joining).chain([&self.inbox])
        {
            hub.leave(room.clone(), connection, None).await;
        }
        hub.unwatch(std::mem::take(&mut self.watching), connection).await;
        let user = self.identity.user.id.clone();
        self.services.sessions.close(user, self.session, connection);
    }

    /// Replaces the token. Returns the end of the new one, and the rooms that it no longer grants.
    fn refresh(
        &mut self,
        refresh: &RefreshFrame,
    ) -> Result<(SystemTime, Vec<RoomId>), (ErrorCode, &'static str)> {
        let identity = self.services.auth.load().identify_again(&refresh.token)?;
        if identity.user.id != self.identity.user.id {
            return Err((ErrorCode::Forbidden, "the token belongs to another user"));
        }
        let expires_at = identity.expires_at.unwrap_or(SystemTime::UNIX_EPOCH);
        self.identity = identity;
        let (guards, gone) = std::mem::take(&mut self.rooms).into_iter().partition(|guard| {
            guard.room().is_none_or(|room| self.identity.access(room).is_some())
        });
        self.rooms = guards;
        let leave = |guard: PresenceGuard| {
            let room = guard.room().cloned();
            guard.leave();
            room
        };
        let gone: Vec<PresenceGuard> = gone;
        Ok((expires_at, gone.into_iter().filter_map(leave).collect()))
    }

    /// Gives up the rooms from which the connection was evicted. The caller must call it before it
    /// handles input, while no request is in progress: a join that was in progress during the
    /// eviction has its guard then, and its membership is cancelled.
    pub async fn handle_evictions(&mut self) {
        for signal in self.handle.outbox.take_evictions() {
            if let Signal::Evicted(room) = signal {
                self.drop_guard(&room);
                let hub = &self.services.hub;
                Box::pin(hub.cancel_join(room, self.handle.clone())).await;
            }
        }
    }

    /// Does what the hub and the session request by other signals. The caller must call it before it
    /// writes the outbox.
    pub async fn handle_signals(&mut self) {
        let signals = self.handle.outbox.take_signals();
        if signals.contains(&Signal::PublishAnswered) {
            // The shard that has the copy yields once itself, to batch. After two yields the ack and
            // the copy are queued here, and leave in one write (docs/adr/0011).
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
        }
        if signals.iter().any(|signal| *signal != Signal::PublishAnswered) {
            // Queued frames do not wait for the hub.
            self.handle.outbox.flush();
        }
        for signal in signals {
            match signal {
                Signal::CatchUp(room) => {
                    Box::pin(self.services.hub.catch_up(room, self.handle.connection)).await;
                }
                Signal::Watch(user) => Box::pin(self.auto_watch(user)).await,
                Signal::PublishAnswered | Signal::Evicted(_) => {}
            }
        }
    }

    /// Watches a user with whom this connection exchanges directs, and reports only changes.
    async fn auto_watch(&mut self, user: UserId) {
        if self.watching.len() >= self.services.client_limits.load().watches_max
            || !self.watching.insert(user.clone())
        {
            return;
        }
        let rejected = self.services.hub.watch([user], &self.handle, None).await;
        self.watching.retain(|user| !rejected.contains(user));
    }

    fn pong(&self, reference: Option<FrameRef>, timestamp: Option<&RawValue>) {
        let original_timestamp = timestamp.and_then(|raw| serde_json::from_str(raw.get()).ok());
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        let pong = PongFrame { reference, timestamp, original_timestamp };
        self.handle.send_ahead(&ServerFrame::Pong(pong));
    }

    /// Handles a `message` or `direct`. Returns whether it was passed to the bus.
    fn message(
        &mut self,
        reference: Option<FrameRef>,
        message: &SendFrame<'_>,
        meter: &mut Meter,
        now: Instant,
    ) -> bool {
        let (kind, room) = (message.to.frame_type(), message.to.room());
        let error_frame = |code, text: &str| ErrorFrame {
            id: message.id,
            ..error_frame(reference.clone(), kind, room, code, text)
        };
        if let Err(wait) = meter.take_message(now) {
            let refused = ErrorFrame {
                room: room.cloned(),
                id: message.id,
                ..rate_limited(reference, kind, wait)
            };
            self.reject(refused);
            return false;
        }
        self.online.touch();
        if let Some(room) = room {
            let Some(guard) = self.guard_in(room) else {
                self.reject(error_frame(ErrorCode::NotJoined, "join the room first"));
                return false;
            };
            guard.touch();
            if self.identity.access(room) != Some(RoomAccess::ReadWrite) {
                self.reject(error_frame(ErrorCode::Forbidden, "the token grants read access only"));
                return false;
            }
        }
        let receipt = Receipt::of(message);
        let sender = MessageSender {
            connection: self.handle.connection,
            author: self.author,
            user: &self.identity.user,
            writer: Some(&self.writer),
            parent: self.parent_span(message),
        };
        let mut reply = PublishReply {
            handle: self.handle.clone(),
            metrics: self.services.metrics.clone(),
            reference: reference.clone(),
            to: message.to.clone(),
            log: room.unwrap_or(&self.inbox).clone(),
            receipt: receipt.clone(),
            echo: message.echo,
            durable: room.is_none_or(|room| self.services.rules.is_durable(room)),
            reserved: false,
        };
        reply.begin();
        let published = self.services.publisher.publish(sender, message, &receipt, {
            let reply = reply.clone();
            move |result| reply.finish(result)
        });
        if let Err(error) = published {
            reply.cancel();
            let text = error.to_string();
            match error {
                PublishError::BinaryTooLarge(_) => {
                    self.reject(error_frame(ErrorCode::TooLarge, &text));
                }
                PublishError::Quota(wait) => {
                    self.reject(with_retry_after(error_frame(ErrorCode::RateLimited, &text), wait));
                }
            }
            return false;
        }
        true
    }

    /// The span of the sender, if the frame names one and traces are exported.
    fn parent_span(&self, message: &SendFrame<'_>) -> Option<TraceContext> {
        let tracer = &self.services.publisher.tracer;
        if !tracer.is_on() {
            return None;
        }
        tracer.accept(&message.traceparent()?, TraceCaller::Client)
    }

    fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.handle.send(frame);
    }

    /// Rejects an unreadable frame, which is metered like others.
    fn reject_unreadable(&mut self, error: ErrorFrame, meter: &mut Meter, now: Instant) {
        match meter.take_frame(0, now) {
            Ok(()) => self.reject(error),
            Err(wait) => self.reject(rate_limited(
                error.reference,
                error.frame_type.as_deref().unwrap_or_default(),
                wait,
            )),
        };
    }

    fn reject(&self, error: ErrorFrame) -> ErrorCode {
        reject(&self.services, &self.handle, error)
    }
}

/// Sends an `error` and counts it; a fault of the client is also counted by the meter.
fn reject(services: &Services, handle: &ConnectionHandle, error: ErrorFrame) -> ErrorCode {
    let code = error.code;
    services.metrics.errors.of(code).inc();
    log_refused(handle, &error);
    if !matches!(code, ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::Internal) {
        handle.count_rejected();
    }
    handle.send_ahead(&ServerFrame::Error(Box::new(error)));
    code
}

/// Logs a refused frame, at most one per code and minute.
fn log_refused(handle: &ConnectionHandle, error: &ErrorFrame) {
    static LIMITERS: [LogLimiter; ErrorCode::ALL.len()] =
        [const { LogLimiter::new() }; ErrorCode::ALL.len()];
    let index = ErrorCode::ALL.iter().position(|code| *code == error.code);
    let limiter = index.map_or(&LIMITERS[0], |index| &LIMITERS[index]);
    let Some(suppressed) = limiter.should_log() else { return };
    tracing::info!(
        code = error.code.as_str(),
        // The client may have sent anything as the type.
        frame = ?error.frame_type.as_deref().unwrap_or_default(),
        room = error.room.as_ref().map(tracing::field::display),
        user = handle.owner().map(|owner| tracing::field::display(&owner.user)),
        connection = %handle.connection,
        suppressed,
        "frame refused"
    );
}

/// The reply to a publish, sent once the bus has answered.
#[derive(Clone)]
struct PublishReply {
    handle: Arc<ConnectionHandle>,
    metrics: Arc<Metrics>,
    reference: Option<FrameRef>,
    to: Recipient,
    /// The log in which the copy and the position are: the room, or the sender's inbox.
    log: RoomId,
    receipt: Receipt,
    /// Whether the sender receives a copy.
    echo: bool,
    /// Whether the room keeps a log. Without a log there is no inline ack.
    durable: bool,
    /// Whether the place of the copy is reserved for the `ack`.
    reserved: bool,
}

impl PublishReply {
    /// Prepares for the answer of the bus, which may come before `publish` returns.
    fn begin(&mut self) {
        self.handle.begin_publish();
        if !self.echo && self.durable {
            let (reference, timestamp) = (self.reference.clone(), self.receipt.timestamp.clone());
            let ack = InlineAck::new(reference, self.to_user(), timestamp);
            self.reserved = self.handle.reserve_ack(&self.log, self.receipt.id, ack);
        }
    }

    fn to_user(&self) -> Option<UserId> {
        match &self.to {
            Recipient::Room(_) => None,
            Recipient::User(user) => Some(user.clone()),
        }
    }

    /// Undoes [`PublishReply::begin`].
    fn cancel(&self) {
        self.handle.end_publish();
        self.cancel_reservation();
    }

    /// Cancels the reservation. Returns whether the `ack` must be sent here: it had no reservation,
    /// or was not sent in its place.
    fn cancel_reservation(&self) -> bool {
        !self.reserved || self.handle.cancel_ack(&self.log, self.receipt.id)
    }

    fn finish(self, result: Result<Appended, BusError>) {
        match result {
            // The hub sends the `ack` in the place of the copy.
            Ok(Appended { duplicate: false, position, .. }) if self.reserved => {
                self.handle.appended(&self.log, self.receipt.id, position);
            }
            // A repeat by the gateway itself is reported as a duplicate; its `ack` may have been
            // sent. An inline ack that lost its place is reported as a duplicate too, since a
            // client would move its cursor for any other.
            Ok(Appended { position, duplicate, opened_inbox: opened }) => {
                if self.cancel_reservation() {
                    let duplicate = duplicate || self.durable && !self.echo;
                    self.ack(Appended { position, duplicate, opened_inbox: opened });
                }
            }
            Err(error) => {
                if self.cancel_reservation() {
                    self.reject(error);
                }
            }
        }
        self.handle.end_publish();
        self.handle.outbox.signal(Signal::PublishAnswered);
    }

    fn ack(&self, Appended { position, duplicate, .. }: Appended) {
        self.handle.send_ahead(&ServerFrame::Ack(Box::new(AckFrame {
            reference: self.reference.clone(),
            id: self.receipt.id,
            room: self.to.room().cloned(),
            to: self.to_user(),
            epoch: position.epoch,
            seq: position.seq,
            timestamp: self.receipt.timestamp.clone(),
            duplicate,
        })));
    }

    fn reject(&self, error: BusError) {
        let (code, text) = match error {
            BusError::Unavailable => (
                ErrorCode::Unavailable,
                "the bus is unavailable, and the message may have been stored: repeat it with \
                 the same id",
            ),
            BusError::Overloaded => (
                ErrorCode::Overloaded,
                "the queue to the bus is full: repeat the message with the same id",
            ),
            BusError::Rejected => (ErrorCode::Internal, "the message could not be stored"),
            BusError::MemoryFull | BusError::UnseenQuota | BusError::UnseenBytes => {
                requests::storage_bound_text(error)
            }
        };
        let frame = ErrorFrame {
            id: Some(self.receipt.id),
            ..error_frame(self.reference.clone(), self.to.frame_type(), self.to.room(), code, text)
        };
        let waits = if error.is_limit() { BOUND_RETRY_AFTER } else { RETRY_AFTER };
        let frame = match code.is_retryable() {
            true => with_retry_after(frame, rand::random_range(waits)),
            false => frame,
        };
        self.metrics.errors.of(code).inc();
        log_refused(&self.handle, &frame);
        self.handle.send_ahead(&ServerFrame::Error(Box::new(frame)));
    }
}

fn error_frame(
    reference: Option<FrameRef>,
    answers: &str,
    room: Option<&RoomId>,
    code: ErrorCode,
    message: &str,
) -> ErrorFrame {
    ErrorFrame {
        reference,
        frame_type: Some(answers.to_owned()).filter(|answers| !answers.is_empty()),
        room: room.cloned(),
        ..*ErrorFrame::new(code, message)
    }
}

/// Adds `retry_after_ms` to an error.
fn with_retry_after(error: ErrorFrame, wait: Duration) -> ErrorFrame {
    // Rounded up, since a client that waits for exactly this time must not be early.
    let retry_after_ms = Some(wait.as_millis() as u64 + 1);
    ErrorFrame { retry_after_ms, ..error }
}

/// Adds a random `retry_after_ms` to an error.
fn with_outage_delay(error: ErrorFrame) -> ErrorFrame {
    with_retry_after(error, rand::random_range(RETRY_AFTER))
}

fn rate_limited(reference: Option<FrameRef>, answers: &str, wait: Duration) -> ErrorFrame {
    let text = "rate limit exceeded: frame rejected";
    with_retry_after(error_frame(reference, answers, None, ErrorCode::RateLimited, text), wait)
}
