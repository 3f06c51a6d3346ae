//! How a join is answered: from where the connection goes on, and what it is shown first.

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
    JoinOutcome,
    member::{ConnectionHandle, MemberState, RoomMember, ShardBatch},
    presence::count_for,
    room::Room,
};
use crate::{
    bus::{ReadRange, registry::JoinSnapshot},
    delivery::{
        Entry,
        cursor::{self, Resume},
        page::LogPage,
        reconcile::READ_LEN,
    },
    presence::RoomAlive,
    telemetry::metrics::ResumeSource,
};

/// How many bytes of what a client missed `joined` holds; the rest follows as entries. An answer to the
/// client cannot overtake a frame that is being written, and at 96 kbit/s this much takes 2.7 s.
const RESUMED_BYTES_MAX: usize = 32 * 1024;

/// A connection that wants to take part in a room.
#[derive(Debug)]
pub(super) struct PendingJoin {
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) reference: Option<FrameRef>,
    pub(super) start: JoinStart,
    /// As what its user has snapshot.
    pub(super) grant: JoinGrant,
    /// Hears when `joined` has been sent; dropped where the room cannot be followed.
    pub(super) done: oneshot::Sender<JoinOutcome>,
    /// What was read of the room's log for it.
    pub(super) bytes_read: usize,
    /// Whether the log was read anew for this join: another node may have delivered what this one
    /// has not heard yet, so that a position is judged only then.
    pub(super) refreshed: bool,
    /// Why it cannot go on from its position, once that is known.
    pub(super) lost: Option<RecoveryFailure>,
}

/// What a user was told on entering, and whether that room_alive holds.
#[derive(Clone, Debug, Default)]
pub struct JoinGrant {
    /// What the user was told.
    pub snapshot: JoinSnapshot,
    /// Tells whether the room was closed since.
    pub room_alive: Option<RoomAlive>,
}

/// From where a connection wants to go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JoinStart {
    /// From now, and shown so many of the newest entries.
    Newest(u32),
    /// From behind a position.
    Since(Position),
    /// As `Since`, of an inbox: all that follows comes as entries, and there is no `joined`. Where the
    /// position cannot be gone on from, `reset` is told and it goes on behind a number.
    InboxSince(Position, Seq),
}

/// What is to be done for a join.
#[derive(Debug)]
pub(super) enum JoinStep {
    /// It was answered, or nobody waits for it any more.
    Done,
    /// The log is to be read for it.
    Read(PendingJoin, ReadRange),
    /// It is to be looked at again when the room has read its log from the top on.
    Wait(PendingJoin),
}

impl PendingJoin {
    /// The position to go on from, unless that is not to be had.
    fn since(&self) -> Option<&Position> {
        match &self.start {
            JoinStart::Since(since) if self.lost.is_none() => Some(since),
            _ => None,
        }
    }

    /// How many of the newest entries to show otherwise.
    fn newest(&self) -> u32 {
        match self.start {
            JoinStart::Newest(count) => count,
            JoinStart::Since(_) | JoinStart::InboxSince(..) => history_default(),
        }
    }
}

impl Room {
    /// Answers a join from what the room holds, or says what it takes.
    pub(super) fn join(&mut self, mut join: PendingJoin, batch: &mut ShardBatch) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        if join.done.is_closed() || !self.grant_holds(&join.grant) {
            // Dropping it tells the session.
            return JoinStep::Done;
        }
        if !self.durable && matches!(join.start, JoinStart::Since(_)) {
            join.lost = Some(RecoveryFailure::LogLost);
        }
        if let Some(cursor) = self.cursor_of(join.handle.connection).cloned() {
            self.send_joined(&join, cursor, vec![], false);
            batch.flush_later(&join.handle);
            // Who has given up waiting is a member all the same.
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

    /// Lets a connection in that is given all behind `since` as entries, or behind `or`.
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

    /// Makes a connection a member that was given everything up to its cursor.
    fn add_joined(
        &mut self,
        mut member: RoomMember,
        done: oneshot::Sender<JoinOutcome>,
        bytes_read: usize,
        batch: &mut ShardBatch,
    ) {
        let live = self.replica.top() == Some(&member.cursor);
        batch.flush_later(&member.handle);
        // Who has given up meanwhile sends a call behind this one that takes it back.
        let _ = done.send(JoinOutcome::Member { bytes_read });
        if !live {
            member.handle.outbox.mark_lagging(self.name.clone());
        }
        member.state = if live { MemberState::Live } else { MemberState::Behind };
        self.add(member);
    }

    /// Answers a join with what was read of the log for it.
    pub(super) fn join_with_page(
        &mut self,
        mut join: PendingJoin,
        mut page: LogPage,
        batch: &mut ShardBatch,
    ) -> JoinStep {
        let Some(top) = self.replica.top().cloned() else { return JoinStep::Wait(join) };
        if !self.replica.has_epoch_of(&page) {
            // The room follows a log that is no more, which it finds out by reading.
            return JoinStep::Wait(join);
        }
        if join.done.is_closed() || !self.grant_holds(&join.grant) {
            return JoinStep::Done;
        }
        join.bytes_read += page.bytes();
        page.keep_whole();
        if join.since().is_none()
            && page.entries.last().is_some_and(|last| last.position.seq < page.top)
        {
            // The newest entry is none that can be read: what stands before it is not whole up to it.
            page.entries.clear();
        }
        // What was not passed on yet comes live.
        page.entries.retain(|entry| entry.position.seq <= top.seq);
        let Some(since) = join.since().cloned() else {
            // What was passed on since the page was read is neither in it nor to come.
            let last = page.top.min(top.seq);
            if page.top < top.seq {
                let since: Option<Vec<Entry>> =
                    self.replica.ring().after(page.top).map(|since| since.cloned().collect());
                match since {
                    Some(since) => page.entries.extend(since),
                    None if !join.refreshed => {
                        return self.join_newest(PendingJoin { refreshed: true, ..join }, batch);
                    }
                    // Twice in a row: the log ends below what was passed on, and comparing it is not
                    // this join's.
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

    /// Whether the room is room_alive the one that the user has snapshot.
    fn grant_holds(&self, grant: &JoinGrant) -> bool {
        let closed = grant.room_alive.as_ref().is_some_and(RoomAlive::is_closed);
        !closed && grant.snapshot.deleted >= self.deleted || grant.room_alive.is_none()
    }

    fn join_newest(&mut self, join: PendingJoin, batch: &mut ShardBatch) -> JoinStep {
        let (count, ring) = (join.newest(), self.replica.ring());
        if count as usize >= ring.len() && !self.replica.ring_is_whole() {
            // One at least, to know whether there are older ones.
            return JoinStep::Read(join, ReadRange::Newest { limit: count.max(1) });
        }
        let entries: Vec<Entry> = ring.newest(count as usize).cloned().collect();
        let oldest = ring.first().unwrap_or(0);
        self.admit_newest(join, &entries, oldest, batch)
    }

    /// Lets a connection in that goes on behind `since`, up to `until` within the epoch it presence_version;
    /// `entries` are the first of what it misses of that.
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

    /// Lets a connection in that goes on from now; the newest of `entries` are shown.
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

    /// Lets a connection in, which is told that it has joined at `at` and was given everything up
    /// to `cursor`.
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
        let again = self.is_member(join.handle.connection);
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

/// As many entries, from the first on, as a `joined` or a `history` holds: 256 KiB, or one.
pub fn history<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Box<RawValue>> {
    history_within(HISTORY_BYTES_MAX, entries)
}

/// As [`history`], with so many bytes.
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
        .map(|json| RawValue::from_string(json).expect("an envelope holds JSON members"))
        .collect()
}
