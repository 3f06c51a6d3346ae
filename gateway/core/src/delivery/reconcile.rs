//! What a read of the log means for a room that is followed: whether it goes on from where the room
//! is, goes on in another epoch, or is another history.
//!
//! A read begins one entry before what is wanted, so that the log's entry at the top can be compared
//! with the one held: the same number under the same epoch may stand for another message where a
//! server came back without its newest entries.

use skein_protocol::{
    position::{Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{
    Entry, ordinal,
    page::LogPage,
    replica::{DeliverySink, NextAction, ReadPlan, ReadState, RetentionContext, RoomReplica},
};

/// How many entries one read of a log brings: all that a ring holds, so that one read tells which
/// entries of a ring the log has lost.
pub const READ_LEN: u32 = 256;

/// Which part of a log is to be read: `limit` of [`READ_LEN`] entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// The newest.
    Newest,
    /// The oldest behind a number.
    After(Seq),
}

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageProgress {
    /// All it showed.
    Applied,
    /// Nothing: another part of the log has to be seen first.
    Blocked(NextAction),
}

impl RoomReplica {
    /// Which part of the log to read to go on.
    pub fn next_read(&self) -> ReadFrom {
        match (self.plan, &self.top) {
            (ReadPlan::Newest, _) | (_, None) => ReadFrom::Newest,
            (ReadPlan::Overlap, Some(top)) => ReadFrom::After(top.seq.saturating_sub(1)),
            (ReadPlan::AfterTop, Some(top)) => ReadFrom::After(top.seq),
            (ReadPlan::Ring, Some(top)) => {
                ReadFrom::After(self.ring.first().unwrap_or(top.seq) - 1)
            }
        }
    }

    /// Takes what was read of the log, and then what was held meanwhile.
    pub fn apply_page(
        &mut self,
        mut page: LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> NextAction {
        let again = self.reading == ReadState::Again;
        self.reading = ReadState::Idle;
        self.forget_past_retention(retention);
        let (head, term) = (page.head(), page.generation);
        if let PageProgress::Blocked(next) = self.apply(&mut page, retention, sink) {
            return next;
        }
        self.generation = self.generation.max(term);
        let held = self.handle_buffered(retention, sink);
        let more =
            self.top.as_ref().is_none_or(|top| top.epoch != head.epoch || top.seq < head.seq);
        // A later epoch may have come with what was held, which the next read tells.
        if more || again { held.max(NextAction::Read) } else { held }
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
            // Older than an arrival that came while it was under way.
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
                    // It was not plan for what is next.
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

    /// Whether another read shows what this one did not: it ended at the top since the entry there
    /// is large, or it was made to see the entries before.
    fn needs_further_read(&mut self, plan: ReadPlan, shown: bool) -> bool {
        if plan == ReadPlan::Overlap && shown {
            self.plan = ReadPlan::AfterTop;
        }
        shown || matches!(plan, ReadPlan::Ring | ReadPlan::Newest)
    }

    /// Takes the first page of a room.
    fn apply_first_page(
        &mut self,
        page: &mut LogPage,
        retention: &RetentionContext,
        sink: &mut impl DeliverySink,
    ) -> PageProgress {
        page.keep_whole();
        self.former = page.former.clone();
        let first = page.entries.first().map_or(0, |first| first.position.seq);
        self.deliver_all(page, retention, sink);
        self.ring_is_whole = first == page.oldest && self.ring.first().unwrap_or(0) == first;
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
            // What is not held cannot be compared, and what was compared next not be again.
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

    /// Passes on what is left of the epoch that ends at `former`, and goes on in the page's.
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

    /// Begins anew with a log that is not the one followed: what it has lost is appended again.
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
        page.keep_whole();
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

    /// How many entries of the ring stand behind the last one that the log has too. Where it has
    /// none of them, those were lost that stand where its present epoch does under another one; of
    /// the others nothing tells whether it once had them, unless the ring holds all there ever was,
    /// or the log is empty.
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

    /// Goes on behind `base`, which does not continue what members were given.
    fn restart_at(
        &mut self,
        base: Position,
        reason: RecoveryFailure,
        sink: &mut impl DeliverySink,
    ) {
        sink.reset(&base, reason);
        self.ring.clear();
        self.ring_is_whole = false;
        self.top = Some(base);
    }
}

/// Leaves in the page what is whole behind `seq`.
fn keep_after(page: &mut LogPage, seq: Seq) {
    page.keep_whole();
    let old = page.entries.partition_point(|entry| entry.position.seq <= seq);
    page.entries.drain(..old);
}

/// The position right before an entry, in its own epoch.
fn before(entry: &Entry) -> Position {
    Position::new(entry.position.epoch.clone(), entry.position.seq - 1)
}
