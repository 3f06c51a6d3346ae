//! Judges what was read from a log. A read is whole only if its first entry is the cursor's next
//! one and no number is skipped: a trimmed log answers as if nothing had been there.

use skein_protocol::{
    position::{Epoch, Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::Entry;

/// Part of a log, as it was at one moment.
#[derive(Clone, Debug)]
pub struct LogPage {
    /// The log's epoch.
    pub epoch: Epoch,
    /// The epoch before, and its last number, where this one goes on behind that: what a server
    /// lost that not everybody could be asked about begins a new epoch, and nothing else changes.
    pub former: Option<Position>,
    /// The [`ordinal`](super::ordinal) of the epoch that the last deletion of the log began, 0 for
    /// none: what a node holds of earlier epochs is not brought back.
    pub deleted: u64,
    /// The term in which the room was declared whole last: the agreements of the nodes on a server
    /// are counted.
    pub generation: u64,
    /// Its newest entry, 0 for none.
    pub top: Seq,
    /// Its oldest entry still kept, 0 for none.
    pub oldest: Seq,
    /// What was asked for, oldest first; cut where it was too much.
    pub entries: Vec<Entry>,
}

impl LogPage {
    /// What a room without a log shows: nothing, at no position.
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

    /// How many bytes of envelopes it has.
    pub fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.envelope.as_bytes().len()).sum()
    }

    /// Whether the page shows all that stands behind `seq`, or at least the next of it, and if not,
    /// why.
    ///
    /// # Errors
    ///
    /// Why a client that has everything up to `seq` cannot be continued.
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

    /// The entry `seq`, if the page shows it.
    pub fn at(&self, seq: Seq) -> Option<&Entry> {
        self.entries.get(self.index_of(seq)?)
    }

    /// Which of the entries is `seq`.
    pub fn index_of(&self, seq: Seq) -> Option<usize> {
        self.entries.binary_search_by_key(&seq, |entry| entry.position.seq).ok()
    }

    /// The newest position of the log.
    pub fn head(&self) -> Position {
        Position::new(self.epoch.clone(), self.top)
    }

    /// Drops what stands before the last skipped number, so that the rest is whole in itself.
    ///
    /// A log is written without steps; a step in it means that part of it was lost.
    pub fn keep_whole(&mut self) {
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
    fn a_page_goes_on_only_from_right_before_it() {
        assert_eq!(page(9, &[7, 8, 9]).continues(6), Ok(()));
        let trimmed = Err(RecoveryFailure::LogTrimmed);
        assert_eq!(page(9, &[7, 8, 9]).continues(5), trimmed);
        assert_eq!(page(9, &[]).continues(5), trimmed);
        assert_eq!(page(9, &[]).continues(9), Ok(()));
        assert_eq!(page(9, &[]).continues(10), Err(RecoveryFailure::Ahead));
    }

    #[test]
    fn what_stands_before_a_step_is_not_passed_off_as_whole() {
        let mut page = page(9, &[2, 3, 7, 8, 9]);
        page.keep_whole();
        let seqs: Vec<_> = page.entries.iter().map(|entry| entry.position.seq).collect();
        assert_eq!(seqs, [7, 8, 9]);
        assert_eq!(page.continues(1), Err(RecoveryFailure::LogTrimmed));
    }
}
