//! The peer of each direct in an inbox, so that `history` with a user reads only that user's
//! entries.
//!
//! An inbox is indexed when it is first searched, from its newest entry backwards and only as far
//! as needed; the index is kept while there is space. The peer of an entry never changes, since a
//! number within an epoch is never reused. An index caches what Redis holds, at 24 bytes per entry,
//! and can be dropped at any time.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use skein_protocol::{
    ids::UserId,
    position::{Epoch, Seq},
};

use tokio::sync::Semaphore;

use crate::{
    bus::ReadRange,
    delivery::{Entry, page::LogPage},
};

/// The most indexed entries, over all inboxes.
const ENTRIES_MAX: usize = 500_000;
/// The cost of a further read of a log, in bytes: a smaller gap is read together with its
/// neighbours.
const GAP_BYTES: usize = 4096;

/// The indexes of a node.
#[derive(Debug, Default)]
pub struct PeerIndex(Mutex<InboxIndexes>);

/// Two maps that are used alternately, so that the least recently used indexes are dropped.
#[derive(Debug, Default)]
struct InboxIndexes {
    newer: HashMap<UserId, Arc<SharedInboxIndex>>,
    older: HashMap<UserId, Arc<SharedInboxIndex>>,
    /// The number of entries added since the last swap.
    added: usize,
}

/// An index that one `history` at a time searches.
#[derive(Debug)]
pub(super) struct SharedInboxIndex {
    pub(super) exclusive: Semaphore,
    pub(super) inbox: Mutex<InboxIndex>,
    /// The number of entries added to it.
    len: AtomicUsize,
}

impl Default for SharedInboxIndex {
    fn default() -> Self {
        Self { exclusive: Semaphore::new(1), inbox: Mutex::default(), len: 0.into() }
    }
}

/// The index of an inbox.
#[derive(Debug, Default)]
pub(super) struct InboxIndex {
    epoch: Option<Epoch>,
    /// All entries from this number up to `high` are indexed.
    low: Seq,
    high: Seq,
    /// The oldest retained entry.
    oldest: Seq,
    /// The directs by number: the peer's number in `peers`, and the size.
    entries: BTreeMap<Seq, (u32, u32)>,
    peers: HashMap<UserId, u32>,
}

impl PeerIndex {
    /// The index of a user's inbox.
    pub(super) fn of(&self, user: &UserId) -> Arc<SharedInboxIndex> {
        let indexes = &mut *self.0.lock();
        if let Some(known) = indexes.newer.get(user) {
            return known.clone();
        }
        let inbox = indexes.older.remove(user).unwrap_or_default();
        indexes.newer.insert(user.clone(), inbox.clone());
        // An empty index takes space as well.
        indexes.add(inbox.len.load(Relaxed) + 1);
        inbox
    }

    /// Counts entries added to an index.
    pub(super) fn note_added(&self, inbox: &SharedInboxIndex, count: usize) {
        inbox.len.fetch_add(count, Relaxed);
        self.0.lock().add(count);
    }
}

impl InboxIndexes {
    fn add(&mut self, count: usize) {
        self.added += count;
        if self.added > ENTRIES_MAX / 2 {
            self.older = std::mem::take(&mut self.newer);
            self.added = 0;
        }
    }
}

impl InboxIndex {
    /// The range to read so that the index reaches the newest entry.
    pub(super) fn newer_range(&self, limit: u32) -> ReadRange {
        match self.epoch {
            Some(_) => ReadRange::After { seq: self.high, limit },
            None => ReadRange::Newest { limit },
        }
    }

    /// The range to read so that the index covers more of the older entries; `None` if it covers
    /// all.
    pub(super) fn older_range(&self, limit: u32) -> Option<ReadRange> {
        (self.low > self.oldest.max(1)).then_some(ReadRange::Before { seq: self.low, limit })
    }

    /// Whether the index covers all retained entries after `seq`.
    pub(super) fn covers_after(&self, seq: Seq) -> bool {
        self.low <= seq.saturating_add(1) || self.older_range(1).is_none()
    }

    /// Indexes a page of `range`. Returns the number of its entries, and whether the newest entry
    /// is indexed now.
    pub(super) fn apply(
        &mut self,
        user: &UserId,
        range: ReadRange,
        page: &LogPage,
    ) -> (usize, bool) {
        if self.epoch.as_ref() != Some(&page.epoch) {
            let is_first = self.epoch.is_none() && matches!(range, ReadRange::Newest { .. });
            *self = Self::default();
            if !is_first {
                // The numbers belong to another log.
                return (0, false);
            }
            self.epoch = Some(page.epoch.clone());
            (self.low, self.high) = (page.top + 1, page.top);
        }
        self.oldest = page.oldest;
        let (first, last) = (page.entries.first(), page.entries.last());
        let (first, last) = (first.map(|of| of.position.seq), last.map(|of| of.position.seq));
        match range {
            ReadRange::After { .. } => self.high = last.unwrap_or(page.top).max(self.high),
            // Entries below the oldest one, or missing in a page, no longer exist.
            ReadRange::Newest { .. } | ReadRange::Before { .. } => {
                self.low = first.unwrap_or(page.oldest).min(self.low);
            }
        }
        for entry in &page.entries {
            if let Some(peer) = peer_of(entry, user) {
                let next = self.peers.len() as u32;
                let peer = *self.peers.entry(peer).or_insert(next);
                let bytes = entry.envelope.as_bytes().len() as u32;
                self.entries.insert(entry.position.seq, (peer, bytes));
            }
        }
        self.entries = self.entries.split_off(&self.oldest);
        (page.entries.len(), self.high >= page.top)
    }

    /// The directs with `peer` in `range`, in its direction: at most `count` numbers, with their
    /// sizes.
    pub(super) fn directs_with(
        &self,
        peer: &UserId,
        range: ReadRange,
        count: usize,
    ) -> Vec<(Seq, usize)> {
        let Some(peer) = self.peers.get(peer) else { return Vec::new() };
        let with = |(seq, (of, bytes)): (&Seq, &(u32, u32))| {
            (of == peer).then_some((*seq, *bytes as usize))
        };
        match range {
            ReadRange::Newest { .. } => {
                self.entries.iter().rev().filter_map(with).take(count).collect()
            }
            ReadRange::Before { seq, .. } => {
                self.entries.range(..seq).rev().filter_map(with).take(count).collect()
            }
            ReadRange::After { seq, .. } => {
                let behind = self.entries.range(seq.saturating_add(1)..);
                behind.filter_map(with).take(count).collect()
            }
        }
    }

    /// The ranges of the log to read for the given numbers, in their order. Small gaps are read
    /// with their neighbours.
    pub(super) fn ranges_for(&self, seqs: &[(Seq, usize)]) -> Vec<ReadRange> {
        let mut parts: Vec<(Seq, Seq)> = Vec::new();
        for (seq, _) in seqs {
            let seq = *seq;
            let gap = |low: Seq, high: Seq| {
                let between = self.entries.range(low + 1..high);
                // Entries that are not directs are small.
                (high - low) as usize * 64
                    + between.map(|(_, (_, bytes))| *bytes as usize).sum::<usize>()
            };
            match parts.last_mut() {
                Some((low, _)) if seq < *low && gap(seq, *low) <= GAP_BYTES => *low = seq,
                Some((_, high)) if seq > *high && gap(*high, seq) <= GAP_BYTES => *high = seq,
                _ => parts.push((seq, seq)),
            }
        }
        let range = |(low, high): (Seq, Seq)| ReadRange::After {
            seq: low - 1,
            limit: u32::try_from(high - low + 1).unwrap_or(u32::MAX),
        };
        parts.into_iter().map(range).collect()
    }

    pub(super) fn epoch(&self) -> Option<&Epoch> {
        self.epoch.as_ref()
    }
}

/// The peer of a direct in `user`'s inbox; `None` for other entries.
fn peer_of(entry: &Entry, user: &UserId) -> Option<UserId> {
    let (sender, recipient) = entry.envelope.direct_users()?;
    match (sender == *user, recipient == *user) {
        (true, _) => Some(recipient),
        (false, true) => Some(sender),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use crate::envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType};
    use skein_protocol::{
        ids::{ConnectionId, MessageId},
        position::Position,
    };

    use super::*;
    use crate::delivery::ServerId;

    fn user(name: &str) -> UserId {
        name.parse().unwrap()
    }

    /// A direct between ann and another user, or an entry that is not a direct.
    fn entry(seq: Seq, from: &str, to: &str, bytes: usize) -> Entry {
        let content = "x".repeat(bytes);
        let frame = if to.is_empty() { FrameType::default() } else { FrameType::Direct };
        let members = format!(r#""from":{{"id":"{from}"}},"to":"{to}","content":"{content}""#);
        let envelope = Envelope::pack(EnvelopeParts {
            frame,
            author: AuthorHash::of(&user(from)),
            id: MessageId::random(),
            sender: ConnectionId::random(),
            echo: true,
            fields: &members,
            binary_payload: None,
        });
        let position = Position::new("1-a".parse().unwrap(), seq);
        Entry { position, origin: ServerId::default(), envelope }
    }

    /// The inbox: bob, cat, bob, cat … and a large direct of dan at 10.
    fn log(top: Seq) -> Vec<Entry> {
        let of = |seq: Seq| match seq {
            10 => entry(seq, "dan", "ann", 100_000),
            11 => entry(seq, "_api", "", 10),
            _ if seq.is_multiple_of(2) => entry(seq, "ann", "bob", 10),
            _ => entry(seq, "cat", "ann", 10),
        };
        (1..=top).map(of).collect()
    }

    fn page(log: &[Entry], range: ReadRange) -> LogPage {
        let limit = range.limit() as usize;
        let seq_of = |entry: &&Entry| entry.position.seq;
        let entries: Vec<Entry> = match range {
            ReadRange::After { seq, .. } => {
                log.iter().filter(|of| seq_of(of) > seq).take(limit).cloned().collect()
            }
            ReadRange::Before { .. } | ReadRange::Newest { .. } => {
                let below = if let ReadRange::Before { seq, .. } = range { seq } else { Seq::MAX };
                let all: Vec<&Entry> = log.iter().filter(|of| seq_of(of) < below).collect();
                all[all.len().saturating_sub(limit)..].iter().copied().cloned().collect()
            }
        };
        let (top, oldest) = (log.last().map_or(0, |of| of.position.seq), log[0].position.seq);
        LogPage { epoch: "1-a".parse().unwrap(), top, oldest, entries, ..LogPage::without_log() }
    }

    fn seqs(found: &[(Seq, usize)]) -> Vec<Seq> {
        found.iter().map(|(seq, _)| *seq).collect()
    }

    #[test]
    fn inbox_is_indexed_once_and_as_far_as_needed() {
        let (mut inbox, ann, log) = (InboxIndex::default(), user("ann"), log(20));
        let newest = ReadRange::Newest { limit: 4 };
        let part = inbox.newer_range(4);
        assert_eq!(inbox.apply(&ann, part, &page(&log, part)), (4, true));
        assert_eq!(seqs(&inbox.directs_with(&user("cat"), newest, 9)), [19, 17]);
        let Some(part @ ReadRange::Before { seq: 17, limit: 8 }) = inbox.older_range(8) else {
            panic!()
        };
        inbox.apply(&ann, part, &page(&log, part));
        assert_eq!(seqs(&inbox.directs_with(&user("dan"), newest, 9)), [10]);
        assert!(!inbox.covers_after(3) && inbox.covers_after(8));
        while let Some(part) = inbox.older_range(8) {
            inbox.apply(&ann, part, &page(&log, part));
        }
        let bob = inbox.directs_with(&user("bob"), ReadRange::After { seq: 4, limit: 1 }, 3);
        assert_eq!(seqs(&bob), [6, 8, 12]);
        let before = ReadRange::Before { seq: 12, limit: 1 };
        assert_eq!(seqs(&inbox.directs_with(&user("bob"), before, 9)), [8, 6, 4, 2]);
        assert!(inbox.directs_with(&user("eve"), newest, 9).is_empty());

        // New entries are added, and trimmed ones are dropped.
        let log = [&log[12..], &[entry(21, "eve", "ann", 1)]].concat();
        let part = inbox.newer_range(4);
        assert_eq!(inbox.apply(&ann, part, &page(&log, part)), (1, true));
        assert_eq!(seqs(&inbox.directs_with(&user("eve"), newest, 9)), [21]);
        assert!(inbox.directs_with(&user("dan"), newest, 9).is_empty());
    }

    #[test]
    fn small_gaps_are_read_and_large_ones_are_skipped() {
        let (mut inbox, log) = (InboxIndex::default(), log(20));
        let part = inbox.newer_range(100);
        inbox.apply(&user("ann"), part, &page(&log, part));
        let found = inbox.directs_with(&user("bob"), ReadRange::Newest { limit: 50 }, 50);
        let parts = inbox.ranges_for(&found);
        assert_eq!(
            parts,
            [ReadRange::After { seq: 11, limit: 9 }, ReadRange::After { seq: 1, limit: 7 }],
            "the entry of 100 KB at 10 is skipped"
        );
        let forwards: Vec<_> = found.into_iter().rev().collect();
        assert_eq!(inbox.ranges_for(&forwards).len(), 2);
    }

    #[test]
    fn another_log_is_indexed_anew() {
        let (mut inbox, ann, log) = (InboxIndex::default(), user("ann"), log(5));
        let part = inbox.newer_range(100);
        inbox.apply(&ann, part, &page(&log, part));
        let part = inbox.newer_range(100);
        let other = LogPage { epoch: "2-b".parse().unwrap(), ..page(&log, part) };
        assert_eq!(inbox.apply(&ann, part, &other), (0, false));
        assert!(
            inbox.epoch().is_none() && matches!(inbox.newer_range(9), ReadRange::Newest { .. })
        );
    }

    #[test]
    fn least_recently_used_indexes_are_dropped() {
        let peers = PeerIndex::default();
        let kept = |name: &str| peers.of(&user(name)).inbox.lock().epoch().is_some();
        let fill = |name: &str| {
            let inbox = peers.of(&user(name));
            inbox.inbox.lock().epoch = Some("1-a".parse().unwrap());
            peers.note_added(&inbox, ENTRIES_MAX / 5);
        };
        for name in ["ann", "bob", "cat"] {
            fill(name);
            assert!(kept("ann") && kept(name), "it is used each time");
        }
        for name in ["dan", "eve", "fay", "gil", "hal"] {
            fill(name);
        }
        assert!(!kept("ann") && !kept("bob"));
    }
}
