//! The newest entries of a subscribed room, from which returning and slow clients are served
//! without a read of the log.

use std::collections::VecDeque;

use skein_protocol::position::Seq;

use super::{Entry, is_fault_injected};

/// The bounds of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingLimits {
    /// Entries.
    pub entries: usize,
    /// Bytes; a single entry may exceed them.
    pub bytes: usize,
}

impl RingLimits {
    /// The usual limits.
    pub const DEFAULT: Self = Self { entries: 256, bytes: 256 * 1024 };
    /// The limits while the node's rings together exceed their bound.
    pub const UNDER_PRESSURE: Self = Self { entries: 16, bytes: 16 * 1024 };
}

/// The newest entries of a log, without gaps. They may belong to several epochs, each continuing
/// the former one.
#[derive(Debug, Default)]
pub struct Ring {
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Ring {
    /// Adds the next entry and drops the oldest entries above the limits.
    ///
    /// # Panics
    ///
    /// The entry is not the next one.
    pub fn push(&mut self, entry: Entry, max: RingLimits) {
        if let Some(last) = self.last() {
            assert!(
                last.position.seq + 1 == entry.position.seq || is_fault_injected(),
                "a ring has no gaps, but {} follows {}",
                entry.position,
                last.position
            );
        }
        self.bytes += entry.bytes();
        self.entries.push_back(entry);
        while self.entries.len() > 1 && (self.entries.len() > max.entries || self.bytes > max.bytes)
        {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.bytes();
            }
        }
    }

    /// Drops all entries.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The size of the entries, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the ring is empty.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of the oldest entry.
    pub fn first(&self) -> Option<Seq> {
        self.entries.front().map(|entry| entry.position.seq)
    }

    /// The newest entry.
    pub fn last(&self) -> Option<&Entry> {
        self.entries.back()
    }

    /// The entry `seq`, if the ring holds it.
    pub fn at(&self, seq: Seq) -> Option<&Entry> {
        self.entries.get(self.index_of(seq)?)
    }

    /// The entries after `seq`, if the ring holds the next one.
    pub fn after(&self, seq: Seq) -> Option<impl Iterator<Item = &Entry>> {
        let skip = self.index_of(seq + 1).filter(|skip| *skip < self.entries.len())?;
        Some(self.entries.iter().skip(skip))
    }

    /// The index of an entry; entries are numbered without gaps.
    fn index_of(&self, seq: Seq) -> Option<usize> {
        usize::try_from(seq.checked_sub(self.first()?)?).ok()
    }

    /// The newest `count` entries, or all.
    pub fn newest(&self, count: usize) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries.iter().skip(self.entries.len().saturating_sub(count))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::samples::entry, *};

    fn ring(seqs: std::ops::RangeInclusive<Seq>) -> Ring {
        let mut ring = Ring::default();
        for seq in seqs {
            ring.push(entry("e", seq), RingLimits::DEFAULT);
        }
        ring
    }

    fn seqs<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Seq> {
        entries.map(|entry| entry.position.seq).collect()
    }

    #[test]
    fn ring_serves_from_its_oldest_entry_on() {
        let ring = ring(5..=8);
        assert_eq!(seqs(ring.after(4).unwrap()), [5, 6, 7, 8]);
        assert_eq!(seqs(ring.after(7).unwrap()), [8]);
        assert!(ring.after(3).is_none());
        assert!(ring.after(8).is_none());
        assert_eq!(seqs(ring.at(5).into_iter().chain(ring.last())), [5, 8]);
        assert!(ring.at(4).is_none() && ring.at(9).is_none());
        assert_eq!(seqs(ring.newest(2)), [7, 8]);
        assert_eq!(seqs(ring.newest(9)), [5, 6, 7, 8]);
    }

    #[test]
    fn ring_stays_within_its_limits() {
        let mut ring = ring(1..=1000);
        assert_eq!((ring.len(), ring.first()), (256, Some(1000 - 255)));
        ring.push(entry("e", 1001), RingLimits::UNDER_PRESSURE);
        assert_eq!(ring.len(), 16);
        assert_eq!(ring.bytes(), ring.newest(99).map(Entry::bytes).sum::<usize>());
        ring.clear();
        assert!(ring.is_empty() && ring.bytes() == 0);
    }
}
