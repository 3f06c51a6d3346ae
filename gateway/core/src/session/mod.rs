//! One client's state, and what each of its frames does: [`Session::handle_frame`] is one match.
//!
//! Frames are handled in the order sent. What needs no waiting is done at once, and a publish is
//! handed on without waiting for its `ack`. What has to wait (`join`, `history` and the like) is a
//! [`ClientFrame`] that the connection's task performs before it takes the next frame.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::envelope::AuthorHash;
use serde_json::value::RawValue;
use skein_protocol::{
    error::ErrorCode,
    ids::{RoomId, RoomKind, SessionId, UserId},
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
use smallvec::SmallVec;
use tokio::{sync::watch, time::Instant};

use crate::{
    bus::{
        Appended, BoxFuture, Bus, BusError,
        node_state::BusStatus,
        registry::{EphemeralEvent, RoomConfig, unix_millis_now},
        sessions::SessionStore,
    },
    hub::{
        Hub,
        member::{ConnectionHandle, InlineAck},
        presence::TYPING_EVERY,
    },
    limits::{
        meter::{Meter, MeterRates},
        quotas::{ENTRY_BYTES, Quotas, Writer},
        reads::ReadLimiter,
    },
    presence::{PresenceGuard, PresenceTracker},
    publisher::{MessageSender, PublishError, Publisher, Receipt},
    rooms::{RoomRules, passwords::Passwords},
    telemetry::metrics::{Metrics, StorageLimit},
};

pub mod auth;
mod directs;
pub mod peer_index;
mod requests;
mod rooms;

use auth::{Auth, Identity};
use peer_index::PeerIndex;
pub use requests::history_of;
pub use rooms::{info_of, name_of as room_name};

/// What sessions share.
pub struct Services {
    /// The way in for messages.
    pub publisher: Publisher,
    /// Who is in which room.
    pub hub: Hub,
    /// For reads of a log.
    pub bus: Arc<dyn Bus>,
    /// Who is where.
    pub presence: Arc<PresenceTracker>,
    /// Where sessions are kept.
    pub sessions: Arc<dyn SessionStore>,
    /// How clients are status apart.
    pub auth: Auth,
    /// What holds for rooms.
    pub rules: Arc<RoomRules>,
    /// Passwords of rooms.
    pub passwords: Arc<Passwords>,
    /// How much may be read for clients.
    pub reads: ReadLimiter,
    /// With whom the entries of inboxes are.
    pub peer_index: PeerIndex,
    /// What clients are status of the bus.
    pub bus_status: watch::Receiver<BusStatus>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What clients may have kept.
    pub quotas: Arc<Quotas>,
    /// How much a session may.
    pub limits: SessionLimits,
}

/// How much a session may.
#[derive(Clone, Debug)]
pub struct SessionLimits {
    /// What a connection may send.
    pub rates: Arc<MeterRates>,
    /// Rooms at a time.
    pub rooms_max: usize,
    /// Users watched at a time.
    pub watches_max: usize,
    /// Managed rooms of an owner; 0: no limit.
    pub managed_max: usize,
    /// How long a frame may wait for the bus.
    pub wait_max: Duration,
    /// What may be read for a connection; 0 for no limit.
    pub read_bytes_per_second: usize,
}

/// A client, from `connected` to its end.
pub struct Session {
    services: Arc<Services>,
    identity: Identity,
    author: AuthorHash,
    session: SessionId,
    /// The user's, which this connection is in as long as it lives.
    inbox: RoomId,
    handle: Arc<ConnectionHandle>,
    /// Whose quotas are used up.
    writer: Writer,
    /// Whose status it is status.
    watching: BTreeSet<UserId>,
    /// The user is connected as long as this is there.
    online: PresenceGuard,
    /// In the order of their names.
    rooms: Vec<PresenceGuard>,
    /// The room whose join is being outcome.
    joining: Option<RoomId>,
}

/// A frame that has to wait for something.
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
    /// Nothing that was context for: a direct was sent to this user.
    AutoWatch(UserId),
    /// `session_get`, and with data `session_set`
    Session(Option<FrameRef>, Option<SessionSetFrame>),
    /// `refresh`
    Refresh(Option<FrameRef>, RefreshFrame),
    /// `create_room`; the record has no hash yet where there is a password.
    CreateRoom(Option<FrameRef>, RoomId, Box<RoomConfig>, Option<String>),
    /// `delete_room`
    DeleteRoom(Option<FrameRef>, RoomId),
    /// `room_info`
    RoomInfo(Option<FrameRef>, RoomId),
    /// `rooms`
    Rooms(Option<FrameRef>, RoomsFrame),
}

impl DeferredRequest {
    /// Whether it changes nothing, so that it is pointless for a client that does not hear the answer.
    pub fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::History(..)
                | Self::Presence(..)
                | Self::Watch(..)
                | Self::AutoWatch(_)
                | Self::Session(_, None)
                | Self::RoomInfo(..)
                | Self::Rooms(..)
        )
    }
}

/// What became of a [`ClientFrame`]. Its answer has been sent.
pub enum RequestOutcome {
    /// The connection is a member. The guard is a new one, unless it was one before.
    Joined(Option<PresenceGuard>),
    /// It is not, and was status so with this code.
    NotJoined(ErrorCode),
    /// These users are not watched, since the node watches as many as it may.
    NotWatched(Vec<UserId>),
    /// Nothing changed for the session.
    Done,
}

/// The least and the most that an `unavailable` tells to wait: all clients of a bus that is away are status
/// so in the same moment, and are not to come back in one.
const RETRY_AFTER: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(2);
/// The same where a bound of durable state was reached: it is reached for longer.
const BOUND_RETRY_AFTER: std::ops::Range<Duration> =
    Duration::from_secs(10)..Duration::from_secs(20);

impl Session {
    /// A session of `identity`, whose frames go to `handle`.
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

    /// What clients are status of the bus, to be [status](Session::send_bus_status) when it changes.
    pub fn bus_status(&self) -> watch::Receiver<BusStatus> {
        let mut status = self.services.bus_status.clone();
        if status.borrow_and_update().bus == BusState::Down {
            status.mark_changed();
        }
        status
    }

    /// Sends `status`.
    pub fn send_bus_status(&self, status: BusStatus) {
        let since = skein_protocol::timestamp(status.since.unwrap_or_else(SystemTime::now));
        self.send(&ServerFrame::Status(StatusFrame { bus: status.bus, since }));
    }

    /// When the session's token ends, leeway included.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.identity.ends_at()
    }

    /// Whether everything that was handed on has been answered.
    pub fn is_settled(&self) -> bool {
        self.handle.has_no_pending_publish()
    }

    /// Handles a frame, as far as the connection's meter allows it. What it returns has to be
    /// [outcome](Session::execute) before the next.
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
            return match &message.to {
                Recipient::User(user) if taken && !self.watching.contains(user) => {
                    Some(DeferredRequest::AutoWatch(user.clone()))
                }
                _ => None,
            };
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

    /// Takes the bytes of what is to be kept from the user's quota, or refuses the frame.
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

    /// Ends the guards in rooms that this connection was taken out of.
    fn leave_evicted(&mut self) {
        for room in self.handle.take_evicted() {
            if let Ok(place) = self.index_of(&room) {
                self.rooms.remove(place).leave();
            }
        }
    }

    /// This connection's part in a room, if it has one.
    fn guard_in(&mut self, room: &RoomId) -> Option<&PresenceGuard> {
        self.leave_evicted();
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

    /// Notes that the user did something in a room, or refuses what wants it joined.
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
            let notice = EphemeralEvent::Typing { user, is_typing };
            // Nobody waits for it, and it may be lost.
            self.services.presence.store().publish_ephemeral(room.clone(), notice, Box::new(drop));
        }
    }

    fn read(&mut self, reference: Option<FrameRef>, read: MarkReadFrame) {
        if self.in_room(reference.as_ref(), "read", &read.room) {
            let (user, by) = (self.identity.user.id.clone(), self.handle.connection);
            self.services.presence.store().set_read_mark(read.room, user, read.seq, by);
        }
    }

    /// Whether the token allows to change a room; refuses the frame where it does not.
    fn may_write(&self, reference: Option<&FrameRef>, kind: &str, room: &RoomId) -> bool {
        let text = match self.identity.access(room) {
            Some(RoomAccess::ReadWrite) => return true,
            Some(RoomAccess::Read) => "the token allows to read here only",
            None => "the token does not allow this room",
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

    /// Begins what a frame asks for that has to wait. The future is on its own, so that the
    /// connection can be looked after meanwhile; its output goes to [`Session::complete`].
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
                        let again = self
                            .guard_in(&join.room)
                            .map(|guard| (guard.room_alive(), guard.rejoin_snapshot()));
                        Box::pin(requests::join(context(reference), join, user, again))
                    }
                    Err(error) => {
                        let code = self.reject(error);
                        Box::pin(std::future::ready(RequestOutcome::NotJoined(code)))
                    }
                }
            }
            DeferredRequest::Leave(reference, room) => {
                if let Ok(place) = self.index_of(&room) {
                    self.rooms.remove(place).leave();
                }
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
                    // It names one of them.
                    (None, None) => answered,
                }
            }
            DeferredRequest::Watch(reference, WatchFrame { users }) => {
                let users: BTreeSet<UserId> = users.into_iter().collect();
                let more = users.iter().filter(|user| !self.watching.contains(*user)).count();
                let watches_max = self.services.limits.watches_max;
                if self.watching.len() + more > watches_max {
                    let text = format!("at most {watches_max} users are watched at a time");
                    let code = ErrorCode::LimitReached;
                    self.reject(error_frame(reference, "watch", None, code, &text));
                    return answered;
                }
                self.watching.extend(users.iter().cloned());
                Box::pin(directs::watch(context(reference), users))
            }
            DeferredRequest::Unwatch(WatchFrame { mut users }) => {
                users.retain(|user| self.watching.remove(user));
                Box::pin(directs::unwatch(context(None), users))
            }
            DeferredRequest::AutoWatch(user) => match self.begin_auto_watch(&user) {
                true => Box::pin(directs::auto_watch(context(None), user)),
                false => answered,
            },
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

    /// Takes note of what was outcome.
    ///
    /// # Errors
    ///
    /// The code of the `error` that a join was refused with.
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
        let rooms_max = self.services.limits.rooms_max;
        let error_frame =
            |code, text: &str| error_frame(reference.cloned(), "join", Some(room), code, text);
        if self.identity.access(room).is_none() {
            return Err(error_frame(ErrorCode::Forbidden, "the token does not allow this room"));
        }
        if self.rooms.len() >= rooms_max {
            self.rooms.retain(|guard| !guard.is_closed());
        }
        if self.guard_in(room).is_none() && self.rooms.len() >= rooms_max {
            let text = format!("at most {rooms_max} rooms at a time");
            return Err(error_frame(ErrorCode::LimitReached, &text));
        }
        Ok(())
    }

    /// Whether the token and the limits allow to join a room, before that is context for.
    ///
    /// # Errors
    ///
    /// The code that the join would be refused with.
    pub fn check_join(&mut self, room: &RoomId) -> Result<(), ErrorCode> {
        self.may_join(None, room).map_err(|error| error.code)
    }

    /// Ends the session: it is a member nowhere any more.
    pub async fn end(&mut self) {
        let connection = self.handle.connection;
        let rooms = std::mem::take(&mut self.rooms);
        // A join that was not waited for to its end may have succeeded.
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

    /// Notes that a user is watched because of what was said; not above the limit, and not twice.
    fn begin_auto_watch(&mut self, user: &UserId) -> bool {
        self.watching.len() < self.services.limits.watches_max && self.watching.insert(user.clone())
    }

    /// Takes another token. Returns when it ends, and the rooms that it does not allow any more.
    fn refresh(
        &mut self,
        refresh: &RefreshFrame,
    ) -> Result<(SystemTime, Vec<RoomId>), (ErrorCode, &'static str)> {
        let identity = self.services.auth.identify_again(&refresh.token)?;
        if identity.user.id != self.identity.user.id {
            return Err((ErrorCode::Forbidden, "the token is another user's"));
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

    /// The rooms in which this session is behind, if its outbox has room: each is to be given to
    /// [`Session::catch_up`]. Those it was taken out of it is no member of any more.
    pub fn take_lagging(&mut self) -> SmallVec<[RoomId; 1]> {
        self.leave_evicted();
        self.handle.outbox.take_lagging()
    }

    /// Has rooms continued, and those watched with whom this connection has begun to talk.
    pub async fn catch_up(&mut self, rooms: SmallVec<[RoomId; 1]>) {
        for room in rooms {
            match room.user().filter(|_| room.kind() == RoomKind::Status) {
                None => self.services.hub.catch_up(room, self.handle.connection).await,
                Some(user) if self.begin_auto_watch(&user) => {
                    let refused = self.services.hub.watch([user], &self.handle, None).await;
                    self.watching.retain(|user| !refused.contains(user));
                }
                Some(_) => {}
            }
        }
    }

    fn pong(&self, reference: Option<FrameRef>, timestamp: Option<&RawValue>) {
        let original_timestamp = timestamp.and_then(|raw| serde_json::from_str(raw.get()).ok());
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        let pong = PongFrame { reference, timestamp, original_timestamp };
        self.handle.send_ahead(&ServerFrame::Pong(pong));
    }

    /// Takes a `message` or `direct`. Returns whether it was handed on.
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
                self.reject(error_frame(
                    ErrorCode::Forbidden,
                    "the token allows to read here only",
                ));
                return false;
            }
        }
        let receipt = Receipt::of(message);
        let sender = MessageSender {
            connection: self.handle.connection,
            author: self.author,
            user: &self.identity.user,
            writer: Some(&self.writer),
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

    fn send(&self, frame: &ServerFrame<Box<RawValue>>) {
        self.handle.send(frame);
    }

    /// Refuses a frame that could not be read. Bad frames have a pace like others.
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

/// Sends an `error` and counts it; the meter counts it as well where it is the client's fault.
fn reject(services: &Services, handle: &ConnectionHandle, error: ErrorFrame) -> ErrorCode {
    let code = error.code;
    services.metrics.errors.of(code).inc();
    if !matches!(code, ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::Internal) {
        handle.count_rejected();
    }
    handle.send_ahead(&ServerFrame::Error(Box::new(error)));
    code
}

/// What is status of a publish when its fate is known.
#[derive(Clone)]
struct PublishReply {
    handle: Arc<ConnectionHandle>,
    metrics: Arc<Metrics>,
    reference: Option<FrameRef>,
    to: Recipient,
    /// Where the copy comes by, and the position is: the room, or the sender's inbox.
    log: RoomId,
    receipt: Receipt,
    /// Whether the sender wants a copy.
    echo: bool,
    /// Whether the room keeps a log. Without one an `ack` has no place.
    durable: bool,
    /// Whether the `ack` stands in the place of the copy.
    reserved: bool,
}

impl PublishReply {
    /// Prepares for the answer: it may come before `publish` returns.
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

    /// Takes [`PublishReply::begin`] back.
    fn cancel(&self) {
        self.handle.end_publish();
        self.cancel_reservation();
    }

    /// Whether the `ack` is to be sent from here: it was never reserved, or has not been sent from
    /// its place.
    fn cancel_reservation(&self) -> bool {
        !self.reserved || self.handle.cancel_ack(&self.log, self.receipt.id)
    }

    fn finish(self, result: Result<Appended, BusError>) {
        match result {
            // The hub sends the `ack` in the place of the copy.
            Ok(Appended { duplicate: false, position, .. }) if self.reserved => {
                self.handle.appended(&self.log, self.receipt.id, position);
            }
            // A gateway's own repeat is status as a duplicate; its `ack` may have been sent. One that
            // should stand in the place of the copy and does not is one too: by any other a client
            // would move its cursor.
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
        self.handle.outbox.wake_for_ack();
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
                "the bus is away; whether the message was taken is not known: send it again with \
                 the same id",
            ),
            BusError::Overloaded => (
                ErrorCode::Overloaded,
                "too much waits for the bus; send it again with the same id",
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

/// A error that says when to try again.
fn with_retry_after(error: ErrorFrame, wait: Duration) -> ErrorFrame {
    // Rounded up, since a client that waits as status must not be too early.
    let retry_after_ms = Some(wait.as_millis() as u64 + 1);
    ErrorFrame { retry_after_ms, ..error }
}

/// A error that says to try again later, to one client sooner than to another.
fn with_outage_delay(error: ErrorFrame) -> ErrorFrame {
    with_retry_after(error, rand::random_range(RETRY_AFTER))
}

fn rate_limited(reference: Option<FrameRef>, answers: &str, wait: Duration) -> ErrorFrame {
    let text = "too many frames in too short a time; this one was not taken";
    with_retry_after(error_frame(reference, answers, None, ErrorCode::RateLimited, text), wait)
}
