//! Pages of a log. A page is contiguous with a cursor only if its first entry has the next number
//! and no number is skipped: a trimmed log replies as if the entries had never existed.

use skein_protocol::{
    position::{Epoch, Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::Entry;

/// The number of entries in one read of a log: as many as a ring holds, so that one read shows
/// which entries of a ring the log has lost.
pub const READ_LEN: u32 = 256;

/// A range of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadRange {
    /// The newest `limit` entries.
    Newest {
        /// The most entries.
        limit: u32,
    },
    /// The oldest `limit` entries above `seq`.
    After {
        /// The number before the first entry.
        seq: Seq,
        /// The most entries.
        limit: u32,
    },
    /// The newest `limit` entries below `seq`.
    Before {
        /// The number behind the last entry.
        seq: Seq,
        /// The most entries.
        limit: u32,
    },
}

impl ReadRange {
    /// The most entries.
    pub fn limit(self) -> u32 {
        match self {
            Self::Newest { limit } | Self::After { limit, .. } | Self::Before { limit, .. } => {
                limit
            }
        }
    }

    /// Whether a result that is cut for its size keeps the newest entries instead of the oldest.
    pub fn keeps_newest(self) -> bool {
        !matches!(self, Self::After { .. })
    }
}

/// A part of a log, as it was at one moment.
#[derive(Clone, Debug)]
pub struct LogPage {
    /// The log's epoch.
    pub epoch: Epoch,
    /// The former epoch and its last number, if the present epoch continues it. A new epoch that
    /// continues the former one begins after a failover in which some nodes could not be asked for
    /// their unconfirmed publishes.
    pub former: Option<Position>,
    /// The [`ordinal`](super::ordinal) of the epoch that the last deletion of the log began, 0 for
    /// none. Entries of earlier epochs are not restored.
    pub deleted: u64,
    /// The agreement generation in which the room was last declared complete.
    pub generation: u64,
    /// The number of the newest entry, 0 for none.
    pub top: Seq,
    /// The number of the oldest retained entry, 0 for none.
    pub oldest: Seq,
    /// The requested entries, oldest first; cut at the size limit of a read.
    pub entries: Vec<Entry>,
}

impl LogPage {
    /// The page of a room without a log: empty, at no position.
    pub fn without_log() -> Self {
        Self {
            epoch: Epoch::none(),
            former: None,
            deleted: 0,
            generation: 0,
            top: 0,
            oldest: 0,
            entries: Vec::new(),
        }
    }

    /// The size of the envelopes, in bytes.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.envelope.as_bytes().len()).sum()
    }

    /// Whether the page holds the entry after `seq`, or nothing follows `seq`.
    ///
    /// # Errors
    ///
    /// The reason why a client that has everything up to `seq` cannot continue.
    pub fn continues(&self, seq: Seq) -> Result<(), RecoveryFailure> {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::NoContiguityCheck,
        ) {
            return Ok(());
        }
        if seq > self.top {
            return Err(RecoveryFailure::Ahead);
        }
        if seq == self.top || self.at(seq + 1).is_some() {
            return Ok(());
        }
        Err(RecoveryFailure::LogTrimmed)
    }

    /// The entry `seq`, if the page holds it.
    pub fn at(&self, seq: Seq) -> Option<&Entry> {
        self.entries.get(self.index_of(seq)?)
    }

    /// The index of the entry `seq`.
    pub fn index_of(&self, seq: Seq) -> Option<usize> {
        self.entries.binary_search_by_key(&seq, |entry| entry.position.seq).ok()
    }

    /// The newest position of the log.
    pub fn head(&self) -> Position {
        Position::new(self.epoch.clone(), self.top)
    }

    /// Drops everything up to the last gap, so that the rest is contiguous.
    ///
    /// A log is written without gaps; a gap means that part of it was lost.
    pub fn keep_contiguous(&mut self) {
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::NoContiguityCheck,
        ) {
            return;
        }
        let step = self
            .entries
            .windows(2)
            .rposition(|pair| pair[0].position.seq + 1 != pair[1].position.seq);
        if let Some(step) = step {
            self.entries.drain(..=step);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::samples::entry, *};

    fn page(top: Seq, seqs: &[Seq]) -> LogPage {
        let entries = seqs.iter().map(|seq| entry("e", *seq)).collect();
        LogPage {
            epoch: "e".parse().unwrap(),
            former: None,
            deleted: 0,
            generation: 0,
            top,
            oldest: 1,
            entries,
        }
    }

    #[test]
    fn page_continues_only_from_the_number_before_it() {
        assert_eq!(page(9, &[7, 8, 9]).continues(6), Ok(()));
        let trimmed = Err(RecoveryFailure::LogTrimmed);
        assert_eq!(page(9, &[7, 8, 9]).continues(5), trimmed);
        assert_eq!(page(9, &[]).continues(5), trimmed);
        assert_eq!(page(9, &[]).continues(9), Ok(()));
        assert_eq!(page(9, &[]).continues(10), Err(RecoveryFailure::Ahead));
    }

    #[test]
    fn keep_contiguous_drops_entries_before_a_gap() {
        let mut page = page(9, &[2, 3, 7, 8, 9]);
        page.keep_contiguous();
        let seqs: Vec<_> = page.entries.iter().map(|entry| entry.position.seq).collect();
        assert_eq!(seqs, [7, 8, 9]);
        assert_eq!(page.continues(1), Err(RecoveryFailure::LogTrimmed));
    }
}
