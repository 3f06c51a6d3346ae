//! Ephemeral events of a room's members: presence, typing, read marks. An event may be dropped if
//! the receiver's outbox is full; entries of the log never are.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;
use skein_protocol::{
    error::ErrorCode,
    ids::{RoomId, UserId},
    protocol::{
        FrameRef,
        server_frame::{
            ErrorFrame, MemberChangeFrame, PresenceDiffFrame, PresencePageFrame, PresenceUser,
            ServerFrame, TypingFrame,
        },
    },
};
use tokio::{sync::oneshot, time::Instant};

use super::{member::ShardBatch, members::Members};
use crate::{
    bus::presence_store::{
        JoinSnapshot, PresenceChange, PresenceDetails, PresenceSnapshot, UnixMillis, UserPresence,
        unix_millis_now,
    },
    connection::{encoding::SharedFrame, handle::ConnectionHandle},
    presence::{
        PresenceOptions,
        roster::{Roster, RosterChange},
    },
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
const PRESENCE_WAIT_MAX: Duration = Duration::from_secs(2);
/// The most presence requests of a room that wait. Further queries are answered with what is known,
/// further requests for pages are dropped.
const WAITING_MAX: usize = 1024;

/// The presence state of a room, as the members on this node were told.
#[derive(Debug, Default)]
pub(super) struct RoomPresence {
    roster: Roster,
    /// Users who joined (`true`) or left since the last `presence_diff`.
    pending: BTreeMap<UserId, bool>,
    diffed_at: Option<Instant>,
    typing: BTreeMap<UserId, TypingState>,
    /// One list for both kinds: each room has it, and nearly always it is empty.
    waiting: Vec<WaitingRequest>,
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
#[derive(Clone, Debug)]
pub struct PresenceQuery {
    /// The member.
    pub handle: Arc<ConnectionHandle>,
    /// The `ref` of the request.
    pub reference: Option<FrameRef>,
    /// The page lists users whose ids follow this one.
    pub after: String,
    /// The most users of the page.
    pub limit: usize,
    /// Details of the users of the page.
    pub details: PresenceDetails,
    /// The time of the request. After 2 s it is answered with what is known.
    pub since: Instant,
}

/// A request for the users of a page of the roster.
#[derive(Debug)]
pub(super) struct PageRequest {
    pub(super) after: String,
    pub(super) limit: usize,
    pub(super) since: Instant,
    pub(super) reply: oneshot::Sender<Vec<UserId>>,
}

/// A request that waits for the roster.
#[derive(Debug)]
enum WaitingRequest {
    Query(PresenceQuery),
    Page(PageRequest),
}

impl WaitingRequest {
    /// Whether the request can be answered: the roster has what it waits for, or it has waited for
    /// as long as it may. `pending`: changes that the members have not received yet.
    fn is_due(&self, roster: &Roster, pending: &BTreeMap<UserId, bool>, now: Instant) -> bool {
        let (has_arrived, since) = match self {
            // The listing must precede the next change that the member receives.
            Self::Query(query) => {
                (pending.is_empty() && roster.has_reached(query.details.version), query.since)
            }
            // Only a roster that was never read is waited for.
            Self::Page(request) => (!roster.is_empty() || roster.is_known(), request.since),
        };
        has_arrived || now.saturating_duration_since(since) >= PRESENCE_WAIT_MAX
    }
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

impl RoomPresence {
    /// Applies a published change. Returns whether the roster must be read.
    pub(super) fn apply(
        &mut self,
        change: PresenceChange,
        options: &PresenceOptions,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) -> bool {
        let (changes, read) = self.roster.apply(change);
        self.send_changes(changes, options, room, members, batch);
        self.answer_waiting(room, batch);
        read
    }

    /// Begins a read of the roster. `false`: a read is under way, and will be repeated.
    #[must_use]
    pub(super) fn begin_read(&mut self) -> bool {
        self.roster.begin_read()
    }

    /// Applies a roster that was read. Returns whether it must be read again.
    pub(super) fn apply_snapshot(
        &mut self,
        snapshot: PresenceSnapshot,
        options: &PresenceOptions,
        room: &RoomId,
        members: &mut Members,
        batch: &mut ShardBatch,
    ) -> bool {
        if self.roster.has_lost_changes(&snapshot) {
            // The versions with which members joined are used again for other changes.
            members.iter_mut().for_each(|member| member.presence_version = Default::default());
        }
        let (changes, again) = self.roster.apply_snapshot(snapshot);
        self.send_changes(changes, options, room, members, batch);
        self.answer_waiting(room, batch);
        again
    }

    /// Whether the roster was read and every node had reported its users.
    pub(super) fn is_complete(&self) -> bool {
        self.roster.is_complete()
    }

    /// The member count in a `joined` frame.
    pub(super) fn count_for(&self, snapshot: JoinSnapshot) -> u64 {
        // A presence store that lost its state counts too few users for a while.
        let known = if self.roster.is_complete() { 0 } else { self.roster.len() as u64 };
        snapshot.count.max(known)
    }

    /// Sends presence changes: one by one in a small room, with the next `presence_diff` in a large
    /// one.
    fn send_changes(
        &mut self,
        changes: Vec<RosterChange>,
        options: &PresenceOptions,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) {
        if changes.is_empty() {
            return;
        }
        let timestamp = skein_protocol::timestamp(SystemTime::now());
        for RosterChange { user, joined, count, version } in changes {
            let largest = if joined { count } else { count + 1 };
            if largest > options.event_members_max as u64 || !self.pending.is_empty() {
                let opposite = self.pending.remove(&user.id).is_some();
                if !opposite {
                    self.pending.insert(user.id, joined);
                }
                continue;
            }
            let moved = Box::new(MemberChangeFrame {
                room: room.clone(),
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
            let mut frame = SharedFrame::of(&answer);
            for member in members.iter() {
                if member.has_not_seen(version) && !member.handle.belongs_to(&user.id) {
                    member.send_ephemeral(&mut frame, batch);
                }
            }
        }
        if !self.pending.is_empty() {
            let now = batch.retention.now;
            let at = self.diffed_at.map_or(now, |at| (at + DIFF_EVERY).max(now));
            self.note_due(at);
        }
    }

    fn send_diff(
        &mut self,
        options: &PresenceOptions,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) {
        let pending = std::mem::take(&mut self.pending);
        let count = self.roster.len() as u64;
        self.diffed_at = Some(batch.retention.now);
        if count > options.diff_members_max as u64 {
            let (joined, left) = (Vec::new(), Vec::new());
            let diff = PresenceDiffFrame { room: room.clone(), joined, left, count };
            return members.send(&ServerFrame::PresenceDiff(Box::new(diff)), |_| false, batch);
        }
        let mut pending = pending.into_iter().peekable();
        while pending.peek().is_some() {
            let (mut joined, mut left) = (Vec::new(), Vec::new());
            for (user, came) in pending.by_ref().take(DIFF_LEN_MAX) {
                if came { joined.push(user) } else { left.push(user) }
            }
            let diff = PresenceDiffFrame { room: room.clone(), joined, left, count };
            members.send(&ServerFrame::PresenceDiff(Box::new(diff)), |_| false, batch);
        }
    }

    /// Applies a typing event of a user.
    pub(super) fn apply_typing(
        &mut self,
        user: UserId,
        is_typing: bool,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) {
        let now = batch.retention.now;
        let state = self.typing.entry(user.clone()).or_insert(TypingState {
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
        self.update_typing(&user, room, members, batch);
    }

    fn update_typing(
        &mut self,
        user: &UserId,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) {
        let Some(state) = self.typing.get_mut(user) else { return };
        let to_send = state.poll(batch.retention.now);
        match state.due(batch.retention.now) {
            Some(due) => self.note_due(due),
            None => drop(self.typing.remove(user)),
        }
        if let Some(is_typing) = to_send {
            let typing = TypingFrame { room: room.clone(), user: user.clone(), is_typing };
            members.send(&ServerFrame::Typing(typing), |handle| handle.belongs_to(user), batch);
        }
    }

    /// The time of the next due work.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Does the work that is due.
    pub(super) fn send_due(
        &mut self,
        options: &PresenceOptions,
        room: &RoomId,
        members: &Members,
        batch: &mut ShardBatch,
    ) {
        self.due = None;
        let now = batch.retention.now;
        let diff_at = self.diffed_at.map_or(now, |at| at + DIFF_EVERY);
        if !self.pending.is_empty() {
            if diff_at <= now {
                self.send_diff(options, room, members, batch);
                self.answer_waiting(room, batch);
            } else {
                self.note_due(diff_at);
            }
        }
        for user in self.typing.keys().cloned().collect::<Vec<_>>() {
            self.update_typing(&user, room, members, batch);
        }
    }

    /// Answers a request for a page once the roster was read.
    pub(super) fn request_page(
        &mut self,
        request: PageRequest,
        room: &RoomId,
        batch: &mut ShardBatch,
    ) {
        if self.waiting.len() < WAITING_MAX {
            self.waiting.push(WaitingRequest::Page(request));
        }
        self.answer_waiting(room, batch);
    }

    /// Answers a query once the roster has reached its version.
    pub(super) fn query(&mut self, query: PresenceQuery, room: &RoomId, batch: &mut ShardBatch) {
        if self.waiting.len() >= WAITING_MAX {
            return send_listing(room, &self.roster, query, batch);
        }
        self.waiting.push(WaitingRequest::Query(query));
        self.answer_waiting(room, batch);
    }

    /// Answers the requests that are due.
    pub(super) fn answer_waiting(&mut self, room: &RoomId, batch: &mut ShardBatch) {
        let now = batch.retention.now;
        let Self { roster, pending, waiting, .. } = self;
        for request in waiting.extract_if(.., |request| request.is_due(roster, pending, now)) {
            match request {
                WaitingRequest::Query(query) => send_listing(room, roster, query, batch),
                WaitingRequest::Page(PageRequest { after, limit, reply, .. }) => {
                    let users = roster.after(&after).take(limit).map(|(user, _)| user.clone());
                    // The caller may have gone.
                    let _ = reply.send(users.collect());
                }
            }
        }
    }

    /// Whether requests wait for the roster.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Rejects the requests that wait: the room does not exist any longer.
    pub(super) fn reject_waiting(&mut self, room: &RoomId, batch: &mut ShardBatch) {
        for request in std::mem::take(&mut self.waiting) {
            match request {
                WaitingRequest::Query(query) => reject(room, query, batch),
                // The caller notices that the reply was dropped.
                WaitingRequest::Page(_) => {}
            }
        }
    }

    fn note_due(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }
}

/// Rejects a query of a connection that is in no such room.
pub(super) fn reject(room: &RoomId, query: PresenceQuery, batch: &mut ShardBatch) {
    let rejection = ErrorFrame {
        reference: query.reference,
        frame_type: Some("presence".to_owned()),
        room: Some(room.clone()),
        ..*ErrorFrame::new(ErrorCode::NotJoined, "join the room first")
    };
    query.handle.send(&ServerFrame::Error(Box::new(rejection)));
    batch.flush_later(&query.handle);
}

/// Sends the page of the roster that answers a query.
fn send_listing(room: &RoomId, roster: &Roster, query: PresenceQuery, batch: &mut ShardBatch) {
    let (handle, answer) = listing(room, roster, query);
    handle.send(&answer);
    batch.flush_later(&handle);
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use skein_protocol::protocol::server_frame::UserInfo;

    use super::{
        super::members::samples::{batch, member},
        *,
    };
    use crate::{bus::presence_store::PresenceVersion, delivery::samples::position};

    /// The presence of a room with one member, to whom the roster {ann} was reported.
    struct Fixture {
        presence: RoomPresence,
        options: PresenceOptions,
        room: RoomId,
        members: Members,
        batch: ShardBatch,
    }

    fn change(number: u64, joined: &[&str], left: &[&str]) -> PresenceChange {
        let info = |id: &&str| UserInfo { id: id.parse().unwrap(), name: id.parse().unwrap() };
        PresenceChange {
            version: PresenceVersion { epoch: 1, number },
            joined: joined.iter().map(info).collect(),
            left: left.iter().map(|id| id.parse().unwrap()).collect(),
        }
    }

    impl Fixture {
        fn new(event_members_max: usize) -> Self {
            let mut members = Members::default();
            members.add(member(1, position("1-e", 0)));
            let options = PresenceOptions { event_members_max, ..Default::default() };
            let (presence, room) = (RoomPresence::default(), "r".parse().unwrap());
            let mut fixture = Self { presence, options, room, members, batch: batch() };
            assert!(fixture.presence.begin_read());
            let (version, users) = (change(1, &[], &[]).version, change(1, &["ann"], &[]).joined);
            let snapshot = PresenceSnapshot { version, users, complete: true };
            let Fixture { presence, options, room, members, batch } = &mut fixture;
            assert!(!presence.apply_snapshot(snapshot, options, room, members, batch));
            if fixture.presence.due().is_some() {
                fixture.after(Duration::ZERO);
            }
            assert_eq!(fixture.frames().len(), 1);
            fixture
        }

        fn apply(&mut self, change: PresenceChange) {
            let Self { presence, options, room, members, batch } = self;
            assert!(!presence.apply(change, options, room, members, batch));
        }

        fn typing(&mut self, is_typing: bool) {
            let Self { presence, room, members, batch, .. } = self;
            presence.apply_typing("ann".parse().unwrap(), is_typing, room, members, batch);
        }

        /// Does the due work after `time`.
        fn after(&mut self, time: Duration) {
            self.batch.retention.now += time;
            let Self { presence, options, room, members, batch } = self;
            assert!(presence.due().is_some_and(|due| due <= batch.retention.now));
            presence.send_due(options, room, members, batch);
        }

        /// The frames that the member received since the last call.
        fn frames(&self) -> Vec<Value> {
            let frames = self.members.iter().flat_map(|member| member.handle.outbox.take());
            let json = |frame: bytes::Bytes| {
                let begin = frame.iter().position(|byte| *byte == b'{').unwrap();
                serde_json::from_slice(&frame[begin..]).unwrap()
            };
            frames.map(json).collect()
        }
    }

    #[test]
    fn small_room_gets_a_frame_per_change() {
        let mut fixture = Fixture::new(10);
        fixture.apply(change(2, &["bob"], &[]));
        fixture.apply(change(3, &[], &["ann"]));
        let frames = fixture.frames();
        let seen: Vec<_> = frames.iter().map(|frame| (&frame["type"], &frame["user"])).collect();
        let (joined, left) = (json!("member_joined"), json!("member_left"));
        assert_eq!(seen, [(&joined, &json!("bob")), (&left, &json!("ann"))]);
        assert_eq!(fixture.presence.due(), None);
    }

    #[test]
    fn large_room_gets_one_diff_per_interval() {
        let mut fixture = Fixture::new(0);
        fixture.apply(change(2, &["bob", "cid"], &[]));
        fixture.apply(change(3, &[], &["cid"]));
        assert!(fixture.frames().is_empty());
        fixture.after(DIFF_EVERY);
        let frames = fixture.frames();
        assert_eq!((frames.len(), &frames[0]["type"]), (1, &json!("presence_diff")));
        assert_eq!((&frames[0]["joined"], &frames[0]["left"]), (&json!(["bob"]), &json!([])));
        fixture.apply(change(4, &[], &["ann"]));
        assert_eq!(fixture.presence.due(), Some(fixture.batch.retention.now + DIFF_EVERY));
        fixture.after(DIFF_EVERY);
        assert_eq!(fixture.frames()[0]["left"], json!(["ann"]));
        assert_eq!(fixture.presence.due(), None);
    }

    #[test]
    fn typing_ends_without_a_further_event() {
        let mut fixture = Fixture::new(10);
        fixture.typing(true);
        fixture.typing(true);
        let frames = fixture.frames();
        assert_eq!((frames.len(), &frames[0]["is_typing"]), (1, &json!(true)));
        fixture.after(TYPING_MAX);
        assert_eq!(fixture.frames()[0]["is_typing"], json!(false));
        fixture.after(TYPING_EVERY);
        assert!(fixture.frames().is_empty() && fixture.presence.typing.is_empty());
    }
}
