//! Reconciles a replica with a page of its log: the page continues the replica, continues it in
//! another epoch, or belongs to another history.
//!
//! A read begins one entry before the wanted ones, so that the log's entry at the top can be
//! compared with the replica's: if a server came back without its newest entries, the same number
//! under the same epoch may belong to another message.

use skein_protocol::{
    position::{Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{
    Entry, ordinal,
    page::{LogPage, READ_LEN, ReadRange},
    replica::{DeliverySink, NextAction, ReadPlan, ReadState, RetentionContext, RoomReplica},
};

/// The progress that a page made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageProgress {
    /// All its entries were applied.
    Applied,
    /// None: another part of the log must be read first.
    Blocked(NextAction),
}

impl RoomReplica {
    /// The range of the log to read next.
    pub fn next_read(&self) -> ReadRange {
        let seq = match (self.plan, &self.top) {
            (ReadPlan::Newest, _) | (_, None) => return ReadRange::Newest { limit: READ_LEN },
            (ReadPlan::Overlap, Some(top)) => top.seq.saturating_sub(1),
            (ReadPlan::AfterTop, Some(top)) => top.seq,
            (ReadPlan::Ring, Some(top)) => self.ring.first().unwrap_or(top.seq) - 1,
        };
        ReadRange::After { seq, limit: READ_LEN }
    }

    /// Applies a page of the log, then the entries buffered meanwhile.
    pub fn apply_page(
        &mut self,
        mut page: LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> NextAction {
        let again = self.reading == ReadState::Again;
        self.reading = ReadState::Idle;
        self.forget_past_retention(retention);
        let (head, generation) = (page.head(), page.generation);
        if let PageProgress::Blocked(next) = self.apply(&mut page, retention, sink) {
            return next;
        }
        self.generation = self.generation.max(generation);
        let next = self.handle_buffered(retention, sink);
        let more =
            self.top.as_ref().is_none_or(|top| top.epoch != head.epoch || top.seq < head.seq);
        // A later epoch may have arrived with the buffered entries; the next read will show it.
        if more || again { next.max(NextAction::Read) } else { next }
    }

    fn apply(
        &mut self,
        page: &mut LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> PageProgress {
        let plan = std::mem::replace(&mut self.plan, ReadPlan::Overlap);
        let Some(top) = self.top.clone() else {
            return self.apply_first_page(page, retention, sink);
        };
        let same = match (self.ring.last(), page.at(top.seq)) {
            (Some(held), Some(there)) => Some(held.is_same_as(there)),
            _ => None,
        };
        if ordinal(&page.epoch) < ordinal(&top.epoch) {
            return PageProgress::Blocked(NextAction::Restore);
        }
        if page.epoch != top.epoch {
            return self.apply_new_epoch(page, plan, same, retention, sink);
        }
        if page.top < top.seq {
            // The page is older than an entry received during the read.
            return PageProgress::Applied;
        }
        if same == Some(false) {
            return PageProgress::Blocked(NextAction::Restore);
        }
        self.former = page.former.clone();
        let shown = page.at(top.seq).is_some();
        keep_after(page, top.seq);
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::NoContiguityCheck,
        ) {
            self.deliver_all(page, retention, sink);
            return PageProgress::Applied;
        }
        match page.entries.first() {
            Some(first) if first.position.seq > top.seq + 1 => {
                if plan == ReadPlan::Newest {
                    // The read was not made for the next entry.
                    return PageProgress::Blocked(NextAction::Read);
                }
                let base = before(first);
                self.restart_at(base, RecoveryFailure::LogTrimmed, sink);
            }
            None if page.top == top.seq || self.needs_further_read(plan, shown) => {}
            None => self.restart_at(page.head(), RecoveryFailure::LogTrimmed, sink),
            Some(_) => {}
        }
        self.deliver_all(page, retention, sink);
        PageProgress::Applied
    }

    /// Whether another read will show what this one did not: the page ended at the top because that
    /// entry is large, or the read was made for the entries before.
    fn needs_further_read(&mut self, plan: ReadPlan, shown: bool) -> bool {
        if plan == ReadPlan::Overlap && shown {
            self.plan = ReadPlan::AfterTop;
        }
        shown || matches!(plan, ReadPlan::Ring | ReadPlan::Newest)
    }

    /// Applies the first page of a room.
    fn apply_first_page(
        &mut self,
        page: &mut LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> PageProgress {
        page.keep_contiguous();
        self.former = page.former.clone();
        let first = page.entries.first().map_or(0, |first| first.position.seq);
        self.deliver_all(page, retention, sink);
        self.ring_is_complete = first == page.oldest && self.ring.first().unwrap_or(0) == first;
        let seq = self.top.as_ref().map_or(page.top, |top| top.seq);
        self.top = Some(Position::new(page.epoch.clone(), seq));
        PageProgress::Applied
    }

    fn deliver_all(
        &mut self,
        page: &mut LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) {
        for entry in page.entries.drain(..) {
            self.deliver(entry, retention, sink);
        }
    }

    fn apply_new_epoch(
        &mut self,
        page: &mut LogPage,
        plan: ReadPlan,
        same: Option<bool>,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> PageProgress {
        let Some(top) = self.top.clone() else { return PageProgress::Blocked(NextAction::Read) };
        let continued = page
            .former
            .clone()
            .filter(|former| former.epoch == top.epoch && top.seq <= former.seq)
            // Entries that the replica does not hold cannot be compared, and compared ones need not
            // be again.
            .filter(|_| same == Some(true) || self.ring.is_empty() || plan == ReadPlan::AfterTop);
        let Some(former) = continued else {
            return self.apply_new_history(page, plan, same, retention, sink);
        };
        let shown = page.at(top.seq).is_some();
        let mut rest = page.clone();
        keep_after(&mut rest, top.seq);
        let reaches = match rest.entries.first() {
            Some(first) => first.position.seq == top.seq + 1,
            None => {
                page.top == top.seq || page.top > top.seq && self.needs_further_read(plan, shown)
            }
        };
        if !reaches {
            return self.apply_new_history(page, plan, same, retention, sink);
        }
        self.cross_epoch(&former, rest, retention, sink);
        PageProgress::Applied
    }

    /// Delivers the rest of the epoch that ends at `former`, and continues in the page's epoch.
    fn cross_epoch(
        &mut self,
        former: &Position,
        page: LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) {
        for entry in page.entries {
            self.deliver(entry, retention, sink);
        }
        if self.top.as_ref() == Some(former) {
            self.change_epoch(page.epoch, sink);
        }
    }

    /// Restarts with a log of another history; the entries that it lost are appended again.
    fn apply_new_history(
        &mut self,
        page: &mut LogPage,
        plan: ReadPlan,
        same: Option<bool>,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> PageProgress {
        let Some(top) = self.top.clone() else { return PageProgress::Blocked(NextAction::Read) };
        let deleted = ordinal(&top.epoch) < page.deleted;
        if !deleted && same != Some(true) && !self.ring.is_empty() {
            if page.oldest > 0 && plan != ReadPlan::Ring {
                self.plan = ReadPlan::Ring;
                return PageProgress::Blocked(NextAction::Read);
            }
            let lost = self.lost_by(page);
            for entry in self.ring.newest(lost) {
                sink.lost(entry);
            }
        }
        // Not a second time, whatever the next read shows.
        self.ring.clear();
        page.keep_contiguous();
        let of_epoch = |entry: &Entry| entry.position.epoch == page.epoch;
        let old = page.entries.iter().rposition(|entry| !of_epoch(entry)).map_or(0, |at| at + 1);
        page.entries.drain(..old);
        let base = match (page.entries.first(), &page.former) {
            (Some(first), _) => before(first),
            (None, Some(former)) => Position::new(page.epoch.clone(), former.seq),
            (None, None) if page.top > 0 && plan != ReadPlan::Newest => {
                self.plan = ReadPlan::Newest;
                return PageProgress::Blocked(NextAction::Read);
            }
            (None, None) => page.head(),
        };
        self.former = page.former.clone();
        self.restart_at(base, RecoveryFailure::LogLost, sink);
        self.ids.clear();
        self.deliver_all(page, retention, sink);
        PageProgress::Applied
    }

    /// The number of ring entries after the last one that the log shares. If the log shares none,
    /// entries count as lost if they are above the position at which the log's present epoch
    /// continued the former one. Nothing tells whether the log ever held the others, unless the
    /// ring holds all entries that ever existed, or the log is empty.
    fn lost_by(&self, page: &LogPage) -> usize {
        let common =
            |entry: &Entry| page.at(entry.position.seq).is_some_and(|e| entry.is_same_as(e));
        let forked = |entry: &&Entry| {
            let Position { epoch, seq } = &entry.position;
            *epoch != page.epoch && page.former.as_ref().is_some_and(|former| former.seq < *seq)
        };
        let ring = || self.ring.newest(usize::MAX);
        match ring().rev().position(common) {
            Some(lost) => lost,
            None if page.oldest == 0 || self.ring.first() == Some(1) => self.ring.len(),
            None => ring().rev().take_while(forked).count(),
        }
    }

    /// Restarts at `base`, which does not continue what the members received.
    fn restart_at(
        &mut self,
        base: Position,
        reason: RecoveryFailure,
        sink: &mut impl DeliverySink,
    ) {
        sink.reset(&base, reason);
        self.ring.clear();
        self.ring_is_complete = false;
        self.top = Some(base);
    }
}

/// Keeps the contiguous entries after `seq`.
fn keep_after(page: &mut LogPage, seq: Seq) {
    page.keep_contiguous();
    let old = page.entries.partition_point(|entry| entry.position.seq <= seq);
    page.entries.drain(..old);
}

/// The position before an entry, in the entry's epoch.
fn before(entry: &Entry) -> Position {
    Position::new(entry.position.epoch.clone(), entry.position.seq - 1)
}
