//! A replica: a node's copy of the newest entries of a room's log, and the position that it has
//! reached.
//!
//! A bus connection delivers a room's entries in order while it is up. A reconnect may repeat the
//! last few entries or skip some, and another server may come back with another log.
//! [`RoomReplica`] turns that into the guarantee for members: each number once, in order, and a
//! signal if that cannot be kept. It receives entries ([`RoomReplica::receive`]) and pages of the
//! log ([`RoomReplica::apply_page`], in [`reconcile`]), delivers through a [`DeliverySink`], and
//! returns the next action.
//!
//! Invariants: within an epoch the top never decreases, and the ordinal of the epoch only
//! increases. The ring ends at the top or is empty. Numbers continue if a new epoch continues the
//! former one, so the ring may hold both; each entry keeps the epoch under which it was written.
//!
//! [`reconcile`]: super::reconcile

use std::time::Duration;

use skein_protocol::{
    ids::RoomId,
    position::{Epoch, Position},
    protocol::server_frame::RecoveryFailure,
};
use tokio::time::Instant;

use super::{
    Entry, ReplicaSnapshot, is_fault_injected, ordinal,
    recent_ids::RecentIds,
    ring::{Ring, RingLimits},
};

/// The most entries buffered while the log is read; entries above it are read from the log again.
const BUFFERED_MAX: usize = 1024;

/// Receives the decisions of a replica.
pub trait DeliverySink {
    /// A received entry was classified.
    fn classified(&mut self, class: ReplicaEntryClass);
    /// Delivers the next entry to each member that has received everything before it.
    fn entry(&mut self, entry: &Entry);
    /// The log continues in another epoch after the last entry, and nothing was lost: notifies each
    /// member that has received everything before.
    fn epoch_changed(&mut self, to: &Position);
    /// The log cannot be continued: every member continues after `to`.
    fn reset(&mut self, to: &Position, reason: RecoveryFailure);
    /// The log has lost an entry, which must be appended again.
    fn lost(&mut self, entry: &Entry);
}

/// The relation of a received entry to the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaEntryClass {
    /// The next entry.
    Next,
    /// Already delivered.
    Duplicate,
    /// Entries before it are missing.
    Gap,
    /// Of another epoch, or the first one appended on another server: the log must be read.
    Restarted,
    /// Its number belongs to another entry of the replica: two histories share numbers.
    Diverged,
}

/// The step that a replica needs next; the greater of two prevails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use]
pub enum NextAction {
    /// None.
    Nothing,
    /// Read the log.
    Read,
    /// Restore the log from the replica's snapshot, then read it.
    Restore,
}

/// The state of the read of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadState {
    /// No read.
    Idle,
    /// A read is under way.
    InProgress,
    /// A read is under way, and another one must follow, since entries may have been lost
    /// meanwhile.
    Again,
}

/// The part of the log that the next read covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadPlan {
    /// From the replica's newest entry on, so that it can be compared.
    Overlap,
    /// From after the newest entry: it has just been compared, and is so large that the page held
    /// nothing else.
    AfterTop,
    /// The numbers of the ring, to find out which of its entries the log has lost.
    Ring,
    /// The newest entries.
    Newest,
}

/// The bounds of a replica's memory, and the current time.
#[derive(Clone, Copy, Debug)]
pub struct RetentionContext {
    /// The limits of the ring.
    pub ring: RingLimits,
    /// The time for which ids are remembered.
    pub ids_for: Duration,
    /// Retention of an idle room's log.
    pub entries_for: Duration,
    /// The current time.
    pub now: Instant,
}

/// A node's copy of a subscribed room's log.
#[derive(Debug)]
pub struct RoomReplica {
    /// The last delivered position; `None` before the first read.
    pub(super) top: Option<Position>,
    /// The former epoch and its last number, if the present epoch continues it.
    pub(super) former: Option<Position>,
    /// The agreement generation in which the room was last declared complete.
    pub(super) generation: u64,
    pub(super) ring: Ring,
    /// Whether the ring holds the whole log.
    pub(super) ring_is_complete: bool,
    pub(super) ids: RecentIds,
    /// The time of the newest entry.
    pub(super) newest_at: Option<Instant>,
    /// Entries received while the log is read, in order of arrival.
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
            ring_is_complete: false,
            ids: RecentIds::default(),
            newest_at: None,
            buffered: Vec::new(),
            reading: ReadState::Idle,
            plan: ReadPlan::Newest,
        }
    }
}

impl RoomReplica {
    /// The last delivered position, once the log was read.
    pub fn top(&self) -> Option<&Position> {
        self.top.as_ref()
    }

    /// The newest entries.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether the ring holds the whole log.
    pub fn ring_is_complete(&self) -> bool {
        self.ring_is_complete
    }

    /// The ids within the dedup window.
    pub fn ids(&self) -> &RecentIds {
        &self.ids
    }

    /// Drops the oldest ids, which have expired or exceed the memory budget.
    pub fn forget_oldest_ids(&mut self) {
        self.ids.forget_oldest();
    }

    /// The state of the read of the log.
    pub fn read_state(&self) -> ReadState {
        self.reading
    }

    /// The replica's snapshot, once the log was read.
    pub fn snapshot(&self, room: &RoomId, retention: &RetentionContext) -> Option<ReplicaSnapshot> {
        // Entries past retention were deleted on purpose.
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

    /// Drops entries past the room's retention.
    pub fn forget_past_retention(&mut self, retention: &RetentionContext) {
        if !self.ring.is_empty() && self.is_past_retention(retention) {
            self.ring.clear();
            self.ring_is_complete = false;
        }
    }

    fn is_past_retention(&self, retention: &RetentionContext) -> bool {
        self.newest_at.is_some_and(|came| {
            retention.now.saturating_duration_since(came) > retention.entries_for
        })
    }

    /// Whether everything up to `head`, the newest position of the log, was delivered. A head below
    /// the top may be older than an entry received during the request.
    pub fn has_reached(&self, head: Option<&Position>) -> bool {
        let (Some(top), Some(head)) = (self.top(), head) else { return false };
        top.epoch == head.epoch && top.seq >= head.seq
    }

    /// Marks a read as under way: entries received from here on are buffered.
    pub fn begin_read(&mut self) {
        self.reading = ReadState::InProgress;
    }

    /// Requests another read if one is under way, since entries may have been lost. `false` if none
    /// is.
    pub fn read_again(&mut self) -> bool {
        if self.reading != ReadState::Idle {
            self.reading = ReadState::Again;
        }
        self.reading != ReadState::Idle
    }

    /// Handles an entry from the bus.
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

    /// Classifies an entry and delivers it if it is the next one. Other entries are dropped: a read
    /// that begins now will show them if they are in the log.
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
                // Another server may have come back without the entries of this replica.
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

    /// Handles the buffered entries, up to the first that cannot be delivered.
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
                // Of an epoch that no longer exists, as the page has shown.
                sink.classified(ReplicaEntryClass::Duplicate);
            } else {
                next = self.handle(entry, retention, sink);
            }
        }
        next
    }

    /// Continues in another epoch, after the top.
    pub(super) fn change_epoch(&mut self, epoch: Epoch, sink: &mut impl DeliverySink) {
        if let Some(former) = self.top.take() {
            let to = Position::new(epoch, former.seq);
            sink.epoch_changed(&to);
            self.former = Some(former);
            self.top = Some(to);
        }
    }

    /// Delivers the next entry and adds it to the ring.
    pub(super) fn deliver(
        &mut self,
        entry: Entry,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) {
        if let Some(top) = &self.top {
            assert!(
                top.seq + 1 == entry.position.seq || is_fault_injected(),
                "a replica delivers in order, but {} follows {top}",
                entry.position
            );
            if top.epoch != entry.position.epoch {
                self.change_epoch(entry.position.epoch.clone(), sink);
            }
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
        self.ring_is_complete &= first.is_none() || self.ring.first() == first;
    }
}
