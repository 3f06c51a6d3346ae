//! The ids of a room's messages within the dedup window, to be given back to a server that lost
//! them: a message that is sent once more is then known, however many came after it.
//!
//! An id takes 32 bytes. They stand in buckets by the time they were noted, so that forgetting the
//! old ones costs nothing.

use std::{collections::VecDeque, time::Duration};

use crate::envelope::DedupKey;
use skein_protocol::position::{Epoch, Position, Seq};
use tokio::time::Instant;

/// The most ids of a bucket.
const BUCKET_LEN: usize = 512;
/// Into how many buckets the window is cut; an id is kept for so much of it longer.
const BUCKETS: u32 = 16;
/// What a bucket takes beside its ids, roughly.
const BUCKET_BYTES: usize = 128;

/// The ids of a room.
#[derive(Debug, Default)]
pub struct RecentIds {
    buckets: VecDeque<IdBucket>,
    bytes: usize,
    /// How many buckets were ever buckets_started.
    buckets_started: u64,
}

#[derive(Debug)]
struct IdBucket {
    since: Instant,
    epoch: Epoch,
    ids: Vec<(DedupKey, Seq)>,
}

impl RecentIds {
    /// Notes that a message was passed on at `now`.
    pub fn record(&mut self, key: DedupKey, position: &Position, window: Duration, now: Instant) {
        let fits = |bucket: &IdBucket| {
            bucket.ids.len() < BUCKET_LEN
                && bucket.epoch == position.epoch
                && now.saturating_duration_since(bucket.since) <= window / BUCKETS
        };
        if !self.buckets.back().is_some_and(fits) {
            let epoch = position.epoch.clone();
            self.buckets.push_back(IdBucket { since: now, epoch, ids: Vec::new() });
            self.bytes += BUCKET_BYTES;
            self.buckets_started += 1;
        }
        if let Some(bucket) = self.buckets.back_mut() {
            bucket.ids.push((key, position.seq));
            self.bytes += size_of::<(DedupKey, Seq)>();
        }
    }

    /// The ids of messages below `seq`, oldest first.
    pub fn below(&self, seq: Seq) -> impl Iterator<Item = (DedupKey, Position)> {
        let ids = self.buckets.iter().flat_map(|bucket| {
            bucket.ids.iter().map(|(key, seq)| (*key, Position::new(bucket.epoch.clone(), *seq)))
        });
        ids.filter(move |(_, position)| position.seq < seq)
    }

    /// Forgets the oldest bucket.
    pub fn forget_oldest(&mut self) {
        if let Some(bucket) = self.buckets.pop_front() {
            self.bytes -= BUCKET_BYTES + bucket.ids.len() * size_of::<(DedupKey, Seq)>();
        }
    }

    /// When the oldest bucket was buckets_started.
    pub fn oldest(&self) -> Option<Instant> {
        self.buckets.front().map(|bucket| bucket.since)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// How many buckets were buckets_started since the room is followed.
    pub fn buckets_started(&self) -> u64 {
        self.buckets_started
    }

    /// What the ids take in memory, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self { buckets_started: self.buckets_started, ..Self::default() };
    }
}

/// Whether a bucket that was buckets_started at `since` holds nothing within the window any more.
pub fn is_expired(since: Instant, window: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) > window + window / BUCKETS
}

#[cfg(test)]
mod tests {
    use super::{super::samples::entry, *};

    const WINDOW: Duration = Duration::from_secs(600);

    fn record(ids: &mut RecentIds, epoch: &str, seq: Seq, now: Instant) {
        let entry = entry(epoch, seq);
        ids.record(entry.envelope.dedup_key(), &entry.position, WINDOW, now);
    }

    #[test]
    fn an_id_keeps_its_position_for_the_window_and_little_longer() {
        let (mut ids, start) = (RecentIds::default(), Instant::now());
        record(&mut ids, "1-e", 1, start);
        record(&mut ids, "2-f", 2, start);
        record(&mut ids, "2-f", 3, start + WINDOW / 2);
        let known: Vec<_> = ids.below(3).map(|(_, position)| position.to_string()).collect();
        assert_eq!(known, ["1-e:1", "2-f:2"]);
        assert!(!is_expired(ids.oldest().unwrap(), WINDOW, start + WINDOW));
        let later = start + WINDOW / BUCKETS * (BUCKETS + 2);
        assert!(is_expired(ids.oldest().unwrap(), WINDOW, later));
        ids.forget_oldest();
        assert_eq!(ids.below(9).count(), 2);
    }

    #[test]
    fn bytes_are_those_of_what_is_held() {
        let (mut ids, now) = (RecentIds::default(), Instant::now());
        for seq in 1..=2000 {
            record(&mut ids, "1-e", seq, now);
        }
        assert!(ids.bytes() >= 2000 * 32 && ids.bytes() < 2000 * 33, "{}", ids.bytes());
        while !ids.is_empty() {
            ids.forget_oldest();
        }
        assert_eq!((ids.bytes(), ids.buckets_started()), (0, 4));
    }
}
