//! Joins: the position from which a connection continues, and the history it receives first.

use std::sync::Arc;

use serde_json::value::RawValue;
use skein_protocol::{
    position::{Position, Seq},
    protocol::{
        FrameRef, HISTORY_BYTES_MAX,
        client_frame::history_default,
        server_frame::{JoinedFrame, RecoveryFailure, ServerFrame},
    },
};
use tokio::sync::oneshot;

use super::{
    member::{MemberState, RoomMember, ShardBatch},
    presence::count_for,
    room::Room,
};
use crate::{
    bus::presence_store::JoinSnapshot,
    connection::handle::ConnectionHandle,
    delivery::{
        Entry,
        cursor::{self, Resume},
        page::{LogPage, READ_LEN, ReadRange},
    },
    presence::RoomAlive,
    telemetry::metrics::ResumeSource,
};

/// The most bytes of missed entries in `joined`; the rest follows as entries. A reply cannot
/// overtake a frame that is being written, and at 96 kbit/s this many bytes take 2.7 s.
const RESUMED_BYTES_MAX: usize = 32 * 1024;

/// A join that the hub has not answered.
#[derive(Debug)]
pub(super) struct PendingJoin {
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) reference: Option<FrameRef>,
    pub(super) start: JoinStart,
    /// The admission of its user.
    pub(super) grant: JoinGrant,
    /// Receives the outcome once `joined` is queued; dropped if the node cannot subscribe to the
    /// room.
    pub(super) done: oneshot::Sender<JoinOutcome>,
    /// Bytes read from the room's log for this join.
    pub(super) bytes_read: usize,
    /// Whether the log was read anew for this join. Another node may have delivered entries that
    /// this node has not received yet, so an unknown position is rejected only after such a read.
    pub(super) refreshed: bool,
    /// The reason why the connection cannot resume from its position, once known.
    pub(super) lost: Option<RecoveryFailure>,
}

/// The outcome of a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinOutcome {
    /// The connection is a member.
    Member {
        /// Bytes read from the room's log for this join.
        bytes_read: usize,
    },
    /// The node is not subscribed to the room and has reached its limit of rooms.
    TooManyRooms,
}

/// The admission of a user to a room.
#[derive(Clone, Debug, Default)]
pub struct JoinGrant {
    /// The state of the room at the admission.
    pub snapshot: JoinSnapshot,
    /// Tells whether the room was closed since.
    pub room_alive: Option<RoomAlive>,
}

/// The position from which a connection continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinStart {
    /// From now, with the given number of newest entries as history.
    Newest(u32),
    /// From after a position.
    Since(Position),
    /// As `Since`, for an inbox: everything that follows is delivered as entries, without a
    /// `joined`. If the position cannot be resumed, the connection receives `reset` and continues
    /// after the given number.
    InboxSince(Position, Seq),
}

/// The next step of a join.
#[derive(Debug)]
pub(super) enum JoinStep {
    /// It is answered, or its caller has gone.
    Done,
    /// The log must be read for it.
    Read(PendingJoin, ReadRange),
    /// It must be tried again after the next read of the log from the replica's top.
    Wait(PendingJoin),
}

impl PendingJoin {
    /// The position to resume from, unless recovery from it has failed.
    fn since(&self) -> Option<&Position> {
        match &self.start {
            JoinStart::Since(since) if self.lost.is_none() => Some(since),
            _ => None,
        }
    }

    /// The number of newest entries to show if the join does not resume.
    fn newest(&self) -> u32 {
        match self.start {
            JoinStart::Newest(count) => count,
            JoinStart::Since(_) | JoinStart::InboxSince(..) => history_default(),
        }
    }
}

impl Room {
    /// Answers a join from the replica, or returns what it needs first.
    pub(super) fn join(&mut self, mut join: PendingJoin, batch: &mut ShardBatch) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        if join.done.is_closed() || !self.grant_holds(&join.grant) {
            // Dropping the join notifies the session.
            return JoinStep::Done;
        }
        if !self.durable && matches!(join.start, JoinStart::Since(_)) {
            join.lost = Some(RecoveryFailure::LogLost);
        }
        if let Some(member) = self.members.get(join.handle.connection) {
            let cursor = member.cursor.clone();
            self.send_joined(&join, cursor, vec![], false);
            batch.flush_later(&join.handle);
            // A caller that has gone is a member nevertheless; it cancels the join itself.
            let _ = join.done.send(JoinOutcome::Member { bytes_read: join.bytes_read });
            return JoinStep::Done;
        }
        if let JoinStart::InboxSince(since, or) = &join.start {
            let (since, or) = (since.clone(), *or);
            return self.join_inbox(join, since, or, batch);
        }
        let Some(since) = join.since().cloned() else { return self.join_newest(join, batch) };
        let until = match self.replica.resume(&since) {
            Resume::Until(until) => until,
            Resume::Unknown(_) if !join.refreshed => {
                return JoinStep::Wait(PendingJoin { refreshed: true, ..join });
            }
            Resume::Unknown(reason) => {
                join.lost = Some(reason);
                return self.join_newest(join, batch);
            }
        };
        let entries = match self.replica.ring().after(since.seq) {
            Some(entries) => cursor::within_epoch(entries, &since, until.seq),
            None if since.seq == top.seq => Some(vec![]),
            None => {
                return JoinStep::Read(join, ReadRange::After { seq: since.seq, limit: READ_LEN });
            }
        };
        self.admit_since(join, since, until, entries, ResumeSource::Ring, batch)
    }

    /// Admits a connection that receives everything after `since` as entries, or after `or` if
    /// `since` cannot be resumed.
    fn join_inbox(
        &mut self,
        join: PendingJoin,
        since: Position,
        or: Seq,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        let lost = match self.replica.resume(&since) {
            Resume::Until(_) => None,
            Resume::Unknown(_) if !join.refreshed => {
                return JoinStep::Wait(PendingJoin { refreshed: true, ..join });
            }
            Resume::Unknown(RecoveryFailure::LogTrimmed) => Some(RecoveryFailure::LogTrimmed),
            Resume::Unknown(_) => Some(RecoveryFailure::LogLost),
        };
        let mut member = RoomMember::new(join.handle.clone(), since, MemberState::Live);
        if let Some(reason) = lost {
            let at = Position::new(top.epoch.clone(), or.min(top.seq));
            member.reset(&self.name, &at, reason, batch);
        } else {
            batch.metrics.resumes.of(ResumeSource::Ring).inc();
        }
        self.add_joined(member, join.done, join.bytes_read, batch);
        JoinStep::Done
    }

    /// Makes a connection a member that has received everything up to its cursor.
    fn add_joined(
        &mut self,
        mut member: RoomMember,
        done: oneshot::Sender<JoinOutcome>,
        bytes_read: usize,
        batch: &mut ShardBatch,
    ) {
        let live = self.replica.top() == Some(&member.cursor);
        batch.flush_later(&member.handle);
        // A caller that has gone meanwhile sends a later command that cancels the join.
        let _ = done.send(JoinOutcome::Member { bytes_read });
        if !live {
            member.handle.outbox.mark_lagging(self.name.clone());
        }
        member.state = if live { MemberState::Live } else { MemberState::Behind };
        self.add(member);
    }

    /// Answers a join with a page read from the log for it.
    pub(super) fn join_with_page(
        &mut self,
        mut join: PendingJoin,
        mut page: LogPage,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        if !self.replica.has_epoch_of(&page) {
            // The replica follows a log that no longer exists; the next read will show that.
            return JoinStep::Wait(join);
        }
        if join.done.is_closed() || !self.grant_holds(&join.grant) {
            return JoinStep::Done;
        }
        join.bytes_read += page.bytes();
        page.keep_contiguous();
        if join.since().is_none()
            && page.entries.last().is_some_and(|last| last.position.seq < page.top)
        {
            // The newest entry is unreadable, so the entries before it do not reach the top.
            page.entries.clear();
        }
        // Entries that were not delivered yet arrive live.
        page.entries.retain(|entry| entry.position.seq <= top.seq);
        let Some(since) = join.since().cloned() else {
            // Entries delivered since the page was read are in neither the page nor the live
            // stream.
            let last = page.top.min(top.seq);
            if page.top < top.seq {
                let since: Option<Vec<Entry>> =
                    self.replica.ring().after(page.top).map(|since| since.cloned().collect());
                match since {
                    Some(since) => page.entries.extend(since),
                    None if !join.refreshed => {
                        return self.join_newest(PendingJoin { refreshed: true, ..join }, batch);
                    }
                    // Twice in a row: the log ends below the replica's top. Comparing the two is
                    // not the task of a join.
                    None => page.entries.clear(),
                }
            }
            let oldest = if page.oldest == 0 { last + 1 } else { page.oldest };
            return self.admit_newest(join, &page.entries, oldest, batch);
        };
        let Resume::Until(until) = self.replica.resume(&since) else { return JoinStep::Wait(join) };
        if let Err(reason) = page.continues(since.seq)
            && since.seq < top.seq
        {
            join.lost = Some(reason);
            return self.join_newest(join, batch);
        }
        let entries = cursor::within_epoch(page.entries.iter(), &since, until.seq);
        self.admit_since(join, since, until, entries, ResumeSource::Log, batch)
    }

    /// Whether the room is still the one to which the user was admitted.
    fn grant_holds(&self, grant: &JoinGrant) -> bool {
        let closed = grant.room_alive.as_ref().is_some_and(RoomAlive::is_closed);
        !closed && grant.snapshot.deleted >= self.deleted || grant.room_alive.is_none()
    }

    fn join_newest(&mut self, join: PendingJoin, batch: &mut ShardBatch) -> JoinStep {
        let (count, ring) = (join.newest(), self.replica.ring());
        if count as usize >= ring.len() && !self.replica.ring_is_complete() {
            // At least one, to find out whether older entries exist.
            return JoinStep::Read(join, ReadRange::Newest { limit: count.max(1) });
        }
        let entries: Vec<Entry> = ring.newest(count as usize).cloned().collect();
        let oldest = ring.first().unwrap_or(0);
        self.admit_newest(join, &entries, oldest, batch)
    }

    /// Admits a connection that resumes after `since`, up to `until` within the epoch it knows.
    /// `entries` are the first of the entries that it missed; `None` if they belong to another
    /// epoch.
    fn admit_since(
        &mut self,
        mut join: PendingJoin,
        since: Position,
        until: Position,
        entries: Option<Vec<Entry>>,
        source: ResumeSource,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        let Some(entries) = entries else {
            join.lost = Some(RecoveryFailure::LogLost);
            return self.join_newest(join, batch);
        };
        batch.metrics.resumes.of(source).inc();
        let history = history_within(RESUMED_BYTES_MAX, entries.iter());
        let last = history.len().checked_sub(1).and_then(|last| entries.get(last));
        let cursor = last.map_or(since, |last| last.position.clone());
        self.admit(join, until, cursor, history, false, batch)
    }

    /// Admits a connection that continues from now, with the newest of `entries` as history.
    fn admit_newest(
        &mut self,
        join: PendingJoin,
        entries: &[Entry],
        oldest: Seq,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        let count = join.newest() as usize;
        let entries = &entries[entries.len().saturating_sub(count)..];
        let mut history = history(entries.iter().rev());
        history.reverse();
        let shown = entries.get(entries.len() - history.len());
        let first = shown.map_or(top.seq + 1, |entry| entry.position.seq);
        let more = oldest != 0 && oldest < first;
        self.admit(join, top.clone(), top, history, more, batch)
    }

    /// Admits a connection: it is told that it joined at `at`, and has received everything up to
    /// `cursor`.
    fn admit(
        &mut self,
        join: PendingJoin,
        at: Position,
        cursor: Position,
        history: Vec<Box<RawValue>>,
        more: bool,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        self.send_joined(&join, at, history, more);
        let PendingJoin { handle, grant, done, bytes_read, .. } = join;
        let member = RoomMember::new(handle, cursor, MemberState::Live);
        self.add_joined(
            RoomMember { presence_version: grant.snapshot.version, ..member },
            done,
            bytes_read,
            batch,
        );
        JoinStep::Done
    }

    fn send_joined(
        &self,
        join: &PendingJoin,
        at: Position,
        history: Vec<Box<RawValue>>,
        more: bool,
    ) {
        let again = self.members.get(join.handle.connection).is_some();
        let snapshot = join.grant.snapshot;
        join.handle.send(&ServerFrame::Joined(Box::new(JoinedFrame {
            reference: join.reference.clone(),
            room: self.name.clone(),
            epoch: at.epoch,
            seq: at.seq,
            members: count_for(snapshot, &self.presence.roster),
            recovered: again || join.since().is_some(),
            reason: join.lost.filter(|_| !again),
            history,
            more,
            read: snapshot.read,
            durable: self.durable,
        })));
    }
}

/// The first entries that fit into a `joined` or `history` frame: 256 KiB, or one entry.
pub fn history<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Box<RawValue>> {
    history_within(HISTORY_BYTES_MAX, entries)
}

/// As [`history`], with a given number of bytes.
fn history_within<'a>(
    bytes_max: usize,
    entries: impl Iterator<Item = &'a Entry>,
) -> Vec<Box<RawValue>> {
    let mut bytes = 0;
    entries
        .map(|entry| entry.envelope.to_json(&entry.position))
        .take_while(|json| {
            let first = bytes == 0;
            bytes += json.len();
            first || bytes <= bytes_max
        })
        .map(|json| RawValue::from_string(json).expect("an envelope holds JSON"))
        .collect()
}
