//! Ephemeral events of a room's members: presence, typing, read marks. An event may be dropped if
//! the receiver's outbox is full; entries of the log never are.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;
use skein_protocol::{
    close::CloseCode,
    error::ErrorCode,
    ids::{ConnectionId, RoomId, RoomKind, SessionId, UserId},
    position::{Epoch, Position, Seq},
    protocol::{
        FrameRef,
        server_frame::{
            ErrorFrame, MemberChangeFrame, PresenceDiffFrame, PresencePageFrame, PresenceUser,
            ReadFrame, RoomClosedFrame, RoomClosedReason, ServerFrame, TypingFrame,
        },
    },
};
use tokio::time::Instant;

use super::{
    commands::{READ_RETRY_DELAY, ShardCommand},
    member::{EntryFrames, RoomMember, ShardBatch, SharedFrame},
    room::Room,
    shard::Shard,
};
use crate::{
    bus::presence_store::{
        EphemeralEvent, JoinSnapshot, PresenceDetails, PresenceSnapshot, UnixMillis, UserPresence,
        unix_millis_now,
    },
    connection::{
        handle::{ConnectionHandle, text_frame},
        outbox::Close,
    },
    delivery::{Entry, ServerId},
    presence::roster::{Roster, RosterChange},
};

/// The least interval between two `presence_diff` frames of a room.
const DIFF_EVERY: Duration = Duration::from_millis(250);
/// The most users in one `presence_diff`: 132 bytes each, within the largest frame.
const DIFF_LEN_MAX: usize = 2000;
/// The least interval between two `typing` frames about one user, and between two published events
/// while the state stays the same.
pub const TYPING_EVERY: Duration = Duration::from_secs(1);
/// The time after which typing ends without a further event.
const TYPING_MAX: Duration = Duration::from_secs(6);
/// The most time that a presence query waits for changes that are on their way.
const CATCH_UP_MAX: Duration = Duration::from_secs(2);
/// The most presence queries of a room that wait.
const QUERIES_MAX: usize = 1024;
/// The first and the last pause before incomplete rosters are read again; the pause doubles each
/// time. After the last one every live node has reported its users, and other nodes have lost their
/// leases.
const ROSTER_RETRY_MIN: Duration = Duration::from_secs(1);
const ROSTER_RETRY_MAX: Duration = Duration::from_secs(10);

/// The presence state of a room, as the members on this node were told.
#[derive(Debug, Default)]
pub(super) struct RoomPresence {
    pub(super) roster: Roster,
    /// Users who joined (`true`) or left since the last `presence_diff`.
    pending: BTreeMap<UserId, bool>,
    diffed_at: Option<Instant>,
    typing: BTreeMap<UserId, TypingState>,
    queries: Vec<PresenceQuery>,
    /// The time of the next due work.
    due: Option<Instant>,
}

/// The typing state of one user.
#[derive(Debug)]
struct TypingState {
    /// The state last sent to the members, and the time of sending.
    shown: bool,
    shown_at: Option<Instant>,
    /// The state last received.
    wanted: bool,
    /// The time at which typing ends by itself.
    ends: Instant,
}

/// A `presence` request of a member.
#[derive(Debug)]
pub(super) struct PresenceQuery {
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) reference: Option<FrameRef>,
    pub(super) after: String,
    pub(super) limit: usize,
    pub(super) details: PresenceDetails,
    pub(super) since: Instant,
}

impl TypingState {
    /// The time of the next due work; `None`: the state can be removed.
    fn due(&self, now: Instant) -> Option<Instant> {
        let again = self.shown_at.map(|at| at + TYPING_EVERY);
        match (self.shown, self.wanted) {
            (true, true) => Some(self.ends),
            // Kept until the next frame is allowed, so that the interval is known.
            (false, false) => again.filter(|again| *again > now),
            _ => again.or(Some(self.ends)),
        }
    }

    /// The state to send to the members now, if any.
    fn poll(&mut self, now: Instant) -> Option<bool> {
        if self.ends <= now {
            self.wanted = false;
        }
        let rests = self.shown_at.is_none_or(|at| at + TYPING_EVERY <= now);
        if self.shown == self.wanted || !rests {
            return None;
        }
        (self.shown, self.shown_at) = (self.wanted, Some(now));
        Some(self.shown)
    }
}

impl Room {
    /// Applies an ephemeral event. Returns whether the roster must be read.
    fn apply_event(
        &mut self,
        event: EphemeralEvent,
        event_members_max: usize,
        batch: &mut ShardBatch,
    ) -> bool {
        match event {
            EphemeralEvent::Presence(change) => {
                let (changes, read) = self.presence.roster.apply(change);
                self.send_roster_changes(changes, event_members_max, batch);
                self.answer_queries(batch);
                return read;
            }
            EphemeralEvent::Typing { user, is_typing } => self.apply_typing(user, is_typing, batch),
            EphemeralEvent::Read { user, seq, by } => self.send_read_mark(user, seq, by, batch),
            // In a room with a log, messages arrive as entries only.
            EphemeralEvent::Message(_) if self.durable => {}
            EphemeralEvent::Message(envelope) => {
                let position = Position::new(Epoch::none(), 0);
                let entry = Entry { position, origin: ServerId::default(), envelope };
                let mut frames = EntryFrames::live(&self.name, &entry);
                for member in self.members.iter() {
                    member.send_ephemeral_message(&mut frames, batch);
                }
            }
            EphemeralEvent::Replaced { session, by } => self.close_replaced(session, by),
            // The shard handles these.
            EphemeralEvent::Closed { .. } | EphemeralEvent::Status | EphemeralEvent::LogDeleted => {
            }
        }
        false
    }

    /// Closes the connection whose session another connection has taken over.
    fn close_replaced(&self, session: SessionId, by: ConnectionId) {
        for RoomMember { handle, .. } in self.members.iter() {
            let has_it = handle.owner().is_some_and(|owner| owner.session == session);
            if has_it && handle.connection != by {
                let (code, reason) = (CloseCode::SessionReplaced.number(), String::new());
                handle.outbox.close(Close { code, reason });
            }
        }
    }

    /// Sends presence changes: one by one in a small room, with the next `presence_diff` in a large
    /// one.
    fn send_roster_changes(
        &mut self,
        changes: Vec<RosterChange>,
        event_members_max: usize,
        batch: &mut ShardBatch,
    ) {
        if changes.is_empty() {
            return;
        }
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        for RosterChange { user, joined, count, version } in changes {
            let largest = if joined { count } else { count + 1 };
            if largest > event_members_max as u64 || !self.presence.pending.is_empty() {
                let opposite = self.presence.pending.remove(&user.id).is_some();
                if !opposite {
                    self.presence.pending.insert(user.id, joined);
                }
                continue;
            }
            let moved = Box::new(MemberChangeFrame {
                room: self.name.clone(),
                user: user.id.clone(),
                name: user.name,
                count,
                timestamp: timestamp.clone(),
            });
            let answer = if joined {
                ServerFrame::MemberJoined(moved)
            } else {
                ServerFrame::MemberLeft(moved)
            };
            let mut frame = SharedFrame::new(text_frame(&answer));
            for member in self.members.iter() {
                if member.has_not_seen(version) && !member.handle.belongs_to(&user.id) {
                    member.send_ephemeral(&mut frame, batch);
                }
            }
        }
        if !self.presence.pending.is_empty() {
            let now = batch.retention.now;
            let at = self.presence.diffed_at.map_or(now, |at| (at + DIFF_EVERY).max(now));
            self.presence.note_due(at);
        }
    }

    fn send_presence_diff(&mut self, diff_members_max: usize, batch: &mut ShardBatch) {
        let pending = std::mem::take(&mut self.presence.pending);
        let count = self.presence.roster.len() as u64;
        self.presence.diffed_at = Some(batch.retention.now);
        if count > diff_members_max as u64 {
            let (joined, left) = (Vec::new(), Vec::new());
            let diff = PresenceDiffFrame { room: self.name.clone(), joined, left, count };
            return self.members.send(&ServerFrame::PresenceDiff(Box::new(diff)), |_| false, batch);
        }
        let mut pending = pending.into_iter().peekable();
        while pending.peek().is_some() {
            let (mut joined, mut left) = (Vec::new(), Vec::new());
            for (user, came) in pending.by_ref().take(DIFF_LEN_MAX) {
                if came { joined.push(user) } else { left.push(user) }
            }
            let diff = PresenceDiffFrame { room: self.name.clone(), joined, left, count };
            self.members.send(&ServerFrame::PresenceDiff(Box::new(diff)), |_| false, batch);
        }
    }

    fn apply_typing(&mut self, user: UserId, is_typing: bool, batch: &mut ShardBatch) {
        let now = batch.retention.now;
        let state = self.presence.typing.entry(user.clone()).or_insert(TypingState {
            shown: false,
            shown_at: None,
            wanted: false,
            ends: now,
        });
        state.wanted = is_typing;
        if is_typing {
            state.ends = now + TYPING_MAX;
        }
        // A repeated event is sent again after a while, for members that joined since.
        let again = state.shown && is_typing;
        if again && state.shown_at.is_some_and(|at| at + TYPING_EVERY <= now) {
            state.shown = false;
        }
        self.update_typing(&user, batch);
    }

    fn update_typing(&mut self, user: &UserId, batch: &mut ShardBatch) {
        let Some(state) = self.presence.typing.get_mut(user) else { return };
        let to_send = state.poll(batch.retention.now);
        match state.due(batch.retention.now) {
            Some(due) => self.presence.note_due(due),
            None => drop(self.presence.typing.remove(user)),
        }
        if let Some(is_typing) = to_send {
            let typing = TypingFrame { room: self.name.clone(), user: user.clone(), is_typing };
            self.members.send(
                &ServerFrame::Typing(typing),
                |handle| handle.belongs_to(user),
                batch,
            );
        }
    }

    fn send_read_mark(&self, user: UserId, seq: Seq, by: ConnectionId, batch: &mut ShardBatch) {
        let read = ServerFrame::Read(ReadFrame { room: self.name.clone(), user, seq });
        self.members.send(&read, |handle| handle.connection == by, batch);
    }

    /// Does the work that is due.
    fn send_due_presence(&mut self, diff_members_max: usize, batch: &mut ShardBatch) {
        let now = batch.retention.now;
        let diff_at = self.presence.diffed_at.map_or(now, |at| at + DIFF_EVERY);
        if !self.presence.pending.is_empty() {
            if diff_at <= now {
                self.send_presence_diff(diff_members_max, batch);
                self.answer_queries(batch);
            } else {
                self.presence.note_due(diff_at);
            }
        }
        for user in self.presence.typing.keys().cloned().collect::<Vec<_>>() {
            self.update_typing(&user, batch);
        }
    }

    fn apply_roster(
        &mut self,
        snapshot: PresenceSnapshot,
        event_members_max: usize,
        batch: &mut ShardBatch,
    ) -> bool {
        let (changes, again) = self.presence.roster.apply_snapshot(snapshot);
        self.send_roster_changes(changes, event_members_max, batch);
        self.answer_queries(batch);
        again
    }

    /// Answers the presence queries whose version the roster has reached, or that have waited long
    /// enough.
    fn answer_queries(&mut self, batch: &mut ShardBatch) {
        let RoomPresence { roster, pending, queries, .. } = &mut self.presence;
        let (now, mut left) = (batch.retention.now, Vec::new());
        for query in queries.drain(..) {
            // The listing must precede the next change that the member receives.
            let must_wait = (!pending.is_empty() || !roster.has_reached(query.details.version))
                && now.saturating_duration_since(query.since) < CATCH_UP_MAX;
            if must_wait {
                left.push(query);
                continue;
            }
            let (handle, answer) = listing(&self.name, roster, query);
            handle.send(&answer);
            batch.flush_later(&handle);
        }
        *queries = left;
    }

    /// Whether presence queries wait for the roster.
    fn has_queries(&self) -> bool {
        !self.presence.queries.is_empty()
    }
}

impl RoomPresence {
    fn note_due(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

/// The page of the roster that answers a query. A user without details, who joined a moment ago,
/// gets the current time.
fn listing(
    room: &RoomId,
    roster: &Roster,
    query: PresenceQuery,
) -> (Arc<ConnectionHandle>, ServerFrame<Box<RawValue>>) {
    let PresenceQuery { handle, reference, after, limit, details, .. } = query;
    let mut known: BTreeMap<UserId, UserPresence> =
        details.users.into_iter().map(|detail| (detail.user.id.clone(), detail)).collect();
    let mut behind = roster.after(&after);
    let users: Vec<PresenceUser> = behind
        .by_ref()
        .take(limit)
        .map(|(id, name)| {
            let detail = known.remove(id);
            let now = unix_millis_now();
            let (since, active) =
                detail.as_ref().map_or((now, now), |detail| (detail.since, detail.active));
            PresenceUser {
                id: id.clone(),
                name: name.clone(),
                connections: detail.as_ref().map_or(1, |detail| detail.connections),
                since: wire_time(since),
                last_active: wire_time(active),
                read: Some(detail.map_or(0, |detail| detail.read)),
            }
        })
        .collect();
    let last = users.last().map(|user| user.id.to_string());
    let cursor = behind.next().and(last);
    let count = roster.len() as u64;
    let room = Some(room.clone());
    let presence = PresencePageFrame { reference, room, users, count, cursor };
    (handle, ServerFrame::Presence(Box::new(presence)))
}

/// A time of the presence store as the wire carries it.
pub fn wire_time(millis: UnixMillis) -> String {
    skein_protocol::timestamp(SystemTime::UNIX_EPOCH + Duration::from_millis(millis))
}

impl Shard {
    pub(super) fn handle_event(&mut self, name: &RoomId, event: EphemeralEvent) {
        // Also without a lease: the receivers read nothing afterwards.
        if let EphemeralEvent::Closed { reason, by } = event {
            return self.close_room(name, reason, by);
        }
        if self.suspended {
            return;
        }
        if let EphemeralEvent::Status = event {
            return self.status_changed(name);
        }
        if let EphemeralEvent::LogDeleted = event {
            return self.read_forward(name);
        }
        let event_members_max = self.presence.options().event_members_max;
        let Some(room) = self.rooms.get_mut(name) else { return };
        let read = room.apply_event(event, event_members_max, &mut self.batch);
        self.note_presence_due(name);
        if read {
            self.read_rosters(vec![name.clone()]);
        }
    }

    /// Schedules the next due work of a room.
    fn note_presence_due(&mut self, name: &RoomId) {
        if let Some(due) = self.rooms.get(name).and_then(|room| room.presence.due) {
            self.presence_due.insert((due, name.clone()));
        }
    }

    /// The time of the next due work of any room.
    pub(super) fn next_presence_due(&self) -> Option<Instant> {
        self.presence_due.first().map(|(due, _)| *due)
    }

    /// Does the due work of all rooms.
    pub(super) fn send_due_presence(&mut self, now: Instant) {
        let diff_members_max = self.presence.options().diff_members_max;
        while let Some((due, _)) = self.presence_due.first()
            && *due <= now
        {
            let Some((due, name)) = self.presence_due.pop_first() else { return };
            let Some(room) = self.rooms.get_mut(&name) else { continue };
            // A room scheduled more than once is handled at its earliest time.
            if room.presence.due != Some(due) {
                continue;
            }
            room.presence.due = None;
            room.send_due_presence(diff_members_max, &mut self.batch);
            self.note_presence_due(&name);
        }
    }

    /// Reads the rosters of rooms in a task, until it succeeds.
    pub(super) fn read_rosters(&mut self, mut names: Vec<RoomId>) {
        names.sort_unstable();
        names.retain(|name| {
            // An inbox has one known user.
            name.kind() == RoomKind::Room
                && self.rooms.get_mut(name).is_some_and(|room| room.presence.roster.begin_read())
        });
        if names.is_empty() {
            return;
        }
        let rooms: Vec<(RoomId, u64)> = names
            .iter()
            .filter_map(|name| Some((name.clone(), self.rooms.get(name)?.generation)))
            .collect();
        let (store, commands) = (self.presence.store().clone(), self.commands.clone());
        self.spawn("read_rosters", async move {
            let snapshots = loop {
                match store.snapshots(names.clone()).await {
                    Ok(snapshots) => break snapshots,
                    Err(_) => tokio::time::sleep(READ_RETRY_DELAY).await,
                }
            };
            let _ = commands.send(ShardCommand::RostersRead { rooms, snapshots }).await;
        });
    }

    /// Applies rosters that were read.
    pub(super) fn apply_rosters(
        &mut self,
        rooms: Vec<(RoomId, u64)>,
        snapshots: Vec<PresenceSnapshot>,
    ) {
        let event_members_max = self.presence.options().event_members_max;
        let mut again = Vec::new();
        for ((name, generation), snapshot) in rooms.into_iter().zip(snapshots) {
            let room = self.rooms.get_mut(&name);
            let Some(room) = room.filter(|room| room.generation == generation) else { continue };
            let is_complete = snapshot.complete;
            if room.apply_roster(snapshot, event_members_max, &mut self.batch) {
                again.push(name.clone());
            }
            self.note_completeness(is_complete);
            self.note_presence_due(&name);
        }
        self.read_rosters(again);
    }

    /// Records whether a read was complete; incomplete rosters are read again later.
    pub(super) fn note_completeness(&mut self, is_complete: bool) {
        if is_complete {
            self.incomplete_reads = 0;
        } else if self.roster_retry_at.is_none() {
            let wait = ROSTER_RETRY_MIN.saturating_mul(1 << self.incomplete_reads.min(10));
            self.incomplete_reads += 1;
            self.roster_retry_at = Some(self.batch.retention.now + wait.min(ROSTER_RETRY_MAX));
        }
    }

    /// Reads incomplete rosters again, and those that queries wait for.
    pub(super) fn retry_rosters(&mut self, now: Instant) {
        let all = self.roster_retry_at.take_if(|at| *at <= now).is_some();
        if all {
            self.reread_statuses();
        }
        let mut names = Vec::new();
        for (name, room) in &mut self.rooms {
            let late = room.has_queries();
            if late {
                room.answer_queries(&mut self.batch);
            }
            if late || all && !room.presence.roster.is_complete() {
                names.push(name.clone());
            }
        }
        self.read_rosters(names);
    }

    /// The users of one page of a room's roster.
    pub(super) fn present_after(&self, name: &RoomId, after: &str, limit: usize) -> Vec<UserId> {
        let Some(room) = self.rooms.get(name) else { return Vec::new() };
        room.presence.roster.after(after).take(limit).map(|(user, _)| user.clone()).collect()
    }

    /// Answers a presence query once the roster has reached the query's version.
    pub(super) fn query_presence(&mut self, name: &RoomId, query: PresenceQuery) {
        let Some(room) = self.rooms.get_mut(name) else {
            let refusal = ErrorFrame {
                reference: query.reference,
                frame_type: Some("presence".to_owned()),
                room: Some(name.clone()),
                ..*ErrorFrame::new(ErrorCode::NotJoined, "join the room first")
            };
            query.handle.send(&ServerFrame::Error(Box::new(refusal)));
            return self.batch.flush_later(&query.handle);
        };
        // Queries above the limit are answered with the present roster.
        let wait = room.presence.queries.len() < QUERIES_MAX;
        room.presence.queries.push(if wait {
            query
        } else {
            PresenceQuery { details: PresenceDetails::default(), ..query }
        });
        room.answer_queries(&mut self.batch);
    }

    /// Removes all members of a room that was closed or deleted.
    pub(super) fn close_room(
        &mut self,
        name: &RoomId,
        reason: RoomClosedReason,
        by: Option<ConnectionId>,
    ) {
        // Before `room_closed` is sent, so that a frame sent in response to it is rejected.
        self.presence.close(name);
        let Some(room) = self.rooms.get_mut(name) else { return };
        let queries = std::mem::take(&mut room.presence.queries);
        let closed = RoomClosedFrame { reference: None, room: name.clone(), reason };
        let answer = ServerFrame::RoomClosed(closed);
        for member in room.members.take() {
            let handle = member.handle;
            handle.release_reservations(name);
            if Some(handle.connection) != by {
                handle.send(&answer);
            }
            self.batch.flush_later(&handle);
        }
        self.drop_room(name);
        for query in queries {
            // The room does not exist any longer.
            self.query_presence(name, query);
        }
    }
}

/// The member count in a `joined` frame.
pub(super) fn count_for(snapshot: JoinSnapshot, roster: &Roster) -> u64 {
    // A presence store that lost its state counts too few users for a while.
    let known = if roster.is_complete() { 0 } else { roster.len() as u64 };
    snapshot.count.max(known)
}
