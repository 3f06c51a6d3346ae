//! One room that a node follows: how far it has come in the log, and what it remembers of it.
//!
//! A link delivers a room's entries in order while it stands. A reconnect may repeat the last few
//! or skip some, and another server may come back with another log. [`RoomReplica`] turns that into the
//! promise made to members: each number once, in order, and a word where that cannot be kept. It
//! is told what arrives ([`RoomReplica::receive`]) and what was read ([`RoomReplica::read`], in [`handle`]), has
//! done what follows from it by an [`DeliverySink`], and says what it needs.
//!
//! Invariants: within an epoch the top never goes down, and epochs only go up. The ring ends at the
//! top or is empty. Numbers go on where a new epoch continues the one before, so that the ring may
//! hold both; each entry keeps the epoch that it was written under.
//!
//! [`handle`]: super::judge

use std::time::Duration;

use skein_protocol::{
    ids::RoomId,
    position::{Epoch, Position},
    protocol::server_frame::RecoveryFailure,
};
use tokio::time::Instant;

use super::{
    Entry, ReplicaSnapshot, ordinal,
    recent_ids::RecentIds,
    ring::{Ring, RingLimits},
};

/// The most arrivals held while the log is read; what is above is read again.
const BUFFERED_MAX: usize = 1024;

/// Does what was decided.
pub trait DeliverySink {
    /// An arrival was judged.
    fn classified(&mut self, class: ReplicaEntryClass);
    /// The next entry: for each member that has had all before it.
    fn entry(&mut self, entry: &Entry);
    /// The log goes on in another epoch, behind what was given last, and nothing was lost: for each
    /// member that has had all before it.
    fn epoch_changed(&mut self, to: &Position);
    /// What was given so far cannot be continued: every member goes on behind `to`.
    fn reset(&mut self, to: &Position, reason: RecoveryFailure);
    /// The log has lost an entry, which is to be appended anew.
    fn lost(&mut self, entry: &Entry);
}

/// What to do with an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaEntryClass {
    /// It is the next one.
    Next,
    /// It was there before.
    Duplicate,
    /// Others come before it that have not received.
    Gap,
    /// It is of another epoch than the one followed, or was the first to be appended on another
    /// server: the log tells.
    Restarted,
    /// Its number is known for another entry: two histories share numbers.
    Diverged,
}

/// What it takes to go on. Of two needs the greater one is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use]
pub enum NextAction {
    /// Nothing.
    Nothing,
    /// That the log is read.
    Read,
    /// That the log is compared with what this node holds, and then read.
    Restore,
}

/// Whether the log is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadState {
    /// It is not.
    Idle,
    /// It is.
    InProgress,
    /// It is, and once more after that: doubt arose since it began.
    Again,
}

/// Which part of a log to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadPlan {
    /// From the newest entry held on, so that it can be compared.
    Overlap,
    /// From right behind the newest entry held: it has just been compared, and is so large that
    /// nothing behind it was shown.
    AfterTop,
    /// The numbers that the ring holds, to find out which of its entries the log has lost.
    Ring,
    /// The newest entries.
    Newest,
}

/// What a node keeps of a room, and what time it is.
#[derive(Clone, Copy, Debug)]
pub struct RetentionContext {
    /// The most of a ring.
    pub ring: RingLimits,
    /// How long ids are known.
    pub ids_for: Duration,
    /// How long the log of a room is kept in which nothing is said.
    pub entries_for: Duration,
    /// The time.
    pub now: Instant,
}

/// A room that is followed.
#[derive(Debug)]
pub struct RoomReplica {
    /// The last entry that was passed on; `None` until the log was read once.
    pub(super) top: Option<Position>,
    /// The epoch before, and its last number, where the present one continues it.
    pub(super) former: Option<Position>,
    /// The term in which the room was declared whole last.
    pub(super) generation: u64,
    pub(super) ring: Ring,
    /// Whether the ring holds all that the log holds.
    pub(super) ring_is_whole: bool,
    pub(super) ids: RecentIds,
    /// When the newest entry came.
    pub(super) newest_at: Option<Instant>,
    /// Arrivals that wait for a read of the log, in the order of their coming.
    pub(super) buffered: Vec<Entry>,
    pub(super) reading: ReadState,
    pub(super) plan: ReadPlan,
}

impl Default for RoomReplica {
    fn default() -> Self {
        Self {
            top: None,
            former: None,
            generation: 0,
            ring: Ring::default(),
            ring_is_whole: false,
            ids: RecentIds::default(),
            newest_at: None,
            buffered: Vec::new(),
            reading: ReadState::Idle,
            plan: ReadPlan::Newest,
        }
    }
}

impl RoomReplica {
    /// The last entry passed on, once the log was read.
    pub fn top(&self) -> Option<&Position> {
        self.top.as_ref()
    }

    /// The newest entries.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether the ring holds all that the log holds.
    pub fn ring_is_whole(&self) -> bool {
        self.ring_is_whole
    }

    /// The ids of the dedup window.
    pub fn ids(&self) -> &RecentIds {
        &self.ids
    }

    /// Forgets the oldest ids, which another room needs the memory of, or which are too old.
    pub fn forget_oldest_ids(&mut self) {
        self.ids.forget_oldest();
    }

    /// Whether the log is being read.
    pub fn read_state(&self) -> ReadState {
        self.reading
    }

    /// What this node holds of the room's log, once that was read.
    pub fn snapshot(&self, room: &RoomId, retention: &RetentionContext) -> Option<ReplicaSnapshot> {
        // What is past retention is gone on purpose.
        let entries = if self.is_past_retention(retention) { 0 } else { self.ring.len() };
        let older_than = match self.ring.first() {
            Some(first) if entries > 0 => first,
            _ => self.top()?.seq + 1,
        };
        Some(ReplicaSnapshot {
            room: room.clone(),
            top: self.top()?.clone(),
            former: self.former.clone(),
            generation: self.generation,
            entries: self.ring.newest(entries).cloned().collect(),
            ids: self.ids.below(older_than).collect(),
        })
    }

    /// Forgets entries past the room's retention.
    pub fn forget_past_retention(&mut self, retention: &RetentionContext) {
        if !self.ring.is_empty() && self.is_past_retention(retention) {
            self.ring.clear();
            self.ring_is_whole = false;
        }
    }

    fn is_past_retention(&self, retention: &RetentionContext) -> bool {
        self.newest_at.is_some_and(|came| {
            retention.now.saturating_duration_since(came) > retention.entries_for
        })
    }

    /// Whether everything up to `head`, the newest position of the log, was passed on. A head below
    /// the top may be older than an arrival that came while it was asked for.
    pub fn has_reached(&self, head: Option<&Position>) -> bool {
        let (Some(top), Some(head)) = (self.top(), head) else { return false };
        top.epoch == head.epoch && top.seq >= head.seq
    }

    /// Has what is read or compared from here on count.
    pub fn begin_read(&mut self) {
        self.reading = ReadState::InProgress;
    }

    /// Entries may have been lost: a read under way is not enough. `false`: none is.
    pub fn read_again(&mut self) -> bool {
        if self.reading != ReadState::Idle {
            self.reading = ReadState::Again;
        }
        self.reading != ReadState::Idle
    }

    /// Takes an entry that came from the bus.
    pub fn receive(
        &mut self,
        entry: Entry,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> NextAction {
        if self.top.is_none() || self.reading != ReadState::Idle {
            self.buffer(entry);
            return NextAction::Nothing;
        }
        self.handle(entry, retention, sink)
    }

    fn buffer(&mut self, entry: Entry) {
        if self.buffered.len() < BUFFERED_MAX {
            self.buffered.push(entry);
        } else if self.reading != ReadState::Idle {
            self.reading = ReadState::Again;
        }
    }

    /// Judges an arrival. What cannot be passed on is dropped: a read that begins after it has come
    /// shows it, if it is in the log.
    fn handle(
        &mut self,
        entry: Entry,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> NextAction {
        let class = self.classify(&entry);
        sink.classified(class);
        match class {
            ReplicaEntryClass::Next => {
                self.deliver(entry, retention, sink);
                NextAction::Nothing
            }
            ReplicaEntryClass::Duplicate => NextAction::Nothing,
            ReplicaEntryClass::Gap | ReplicaEntryClass::Restarted => NextAction::Read,
            ReplicaEntryClass::Diverged => NextAction::Restore,
        }
    }

    fn classify(&self, entry: &Entry) -> ReplicaEntryClass {
        let received = &entry.position;
        let Some(top) = &self.top else { return ReplicaEntryClass::Gap };
        if received.epoch == top.epoch {
            if received.seq == top.seq + 1 {
                // Another server may have come back without what is held here.
                let known = self.ring.last().is_none_or(|last| last.origin == entry.origin);
                return if known { ReplicaEntryClass::Next } else { ReplicaEntryClass::Restarted };
            }
            if received.seq > top.seq {
                #[cfg(debug_assertions)]
                if crate::fault_injection::is_injected(
                    crate::fault_injection::ProtocolFault::GapIgnored,
                ) {
                    return ReplicaEntryClass::Next;
                }
                return ReplicaEntryClass::Gap;
            }
            return match self.ring.at(received.seq) {
                Some(held) if !held.is_same_as(entry) => ReplicaEntryClass::Diverged,
                _ => ReplicaEntryClass::Duplicate,
            };
        }
        match self.ring.at(received.seq) {
            Some(held) if held.position.epoch == received.epoch && held.is_same_as(entry) => {
                ReplicaEntryClass::Duplicate
            }
            _ => ReplicaEntryClass::Restarted,
        }
    }

    /// Judges what was held while the log was read, up to what cannot be passed on.
    pub(super) fn handle_buffered(
        &mut self,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> NextAction {
        let mut next = NextAction::Nothing;
        for entry in std::mem::take(&mut self.buffered) {
            let Some(top) = &self.top else { return NextAction::Read };
            if next != NextAction::Nothing {
                continue;
            }
            #[cfg(debug_assertions)]
            if crate::fault_injection::is_injected(
                crate::fault_injection::ProtocolFault::ReadEntriesRepeated,
            ) && self.classify(&entry) == ReplicaEntryClass::Duplicate
            {
                self.deliver(entry, retention, sink);
                continue;
            }
            if ordinal(&entry.position.epoch) < ordinal(&top.epoch) {
                // Of an epoch that is gone, as this read has told.
                sink.classified(ReplicaEntryClass::Duplicate);
            } else {
                next = self.handle(entry, retention, sink);
            }
        }
        next
    }

    /// Goes on in another epoch, behind the top.
    pub(super) fn change_epoch(&mut self, epoch: Epoch, sink: &mut impl DeliverySink) {
        if let Some(former) = self.top.take() {
            let to = Position::new(epoch, former.seq);
            sink.epoch_changed(&to);
            self.former = Some(former);
            self.top = Some(to);
        }
    }

    /// Gives the next entry to those who are up to date, and keeps it.
    pub(super) fn deliver(
        &mut self,
        entry: Entry,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) {
        if let Some(top) = &self.top
            && top.epoch != entry.position.epoch
        {
            self.change_epoch(entry.position.epoch.clone(), sink);
        }
        self.top = Some(entry.position.clone());
        sink.entry(&entry);
        self.ids.record(
            entry.envelope.dedup_key(),
            &entry.position,
            retention.ids_for,
            retention.now,
        );
        self.newest_at = Some(retention.now);
        let first = self.ring.first();
        self.ring.push(entry, retention.ring);
        self.ring_is_whole &= first.is_none() || self.ring.first() == first;
    }
}
