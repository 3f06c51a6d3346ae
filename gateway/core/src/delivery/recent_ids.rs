//! The ids of a room's messages within the dedup window, from which a server that lost them is
//! restored: a repeated message is then recognised, however many messages came after it.
//!
//! An id takes 32 bytes. Ids are kept in buckets by time, so that dropping old ids costs nothing.

use std::{collections::VecDeque, time::Duration};

use crate::envelope::DedupKey;
use skein_protocol::position::{Epoch, Position, Seq};
use tokio::time::Instant;

/// The most ids in a bucket.
const BUCKET_LEN: usize = 512;
/// The number of buckets per window; an id is kept for up to one bucket's time longer.
const BUCKETS: u32 = 16;
/// The approximate memory of a bucket without its ids, in bytes.
const BUCKET_BYTES: usize = 128;

/// The ids of a room.
#[derive(Debug, Default)]
pub struct RecentIds {
    buckets: VecDeque<IdBucket>,
    bytes: usize,
    /// The number of buckets ever started.
    buckets_started: u64,
}

#[derive(Debug)]
struct IdBucket {
    since: Instant,
    epoch: Epoch,
    ids: Vec<(DedupKey, Seq)>,
}

impl RecentIds {
    /// Records a message that was delivered at `now`.
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

    /// Drops the oldest bucket.
    pub fn forget_oldest(&mut self) {
        if let Some(bucket) = self.buckets.pop_front() {
            self.bytes -= BUCKET_BYTES + bucket.ids.len() * size_of::<(DedupKey, Seq)>();
        }
    }

    /// The time at which the oldest bucket was started.
    pub fn oldest(&self) -> Option<Instant> {
        self.buckets.front().map(|bucket| bucket.since)
    }

    /// Whether there are no ids.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// The number of buckets started since the subscription.
    pub fn buckets_started(&self) -> u64 {
        self.buckets_started
    }

    /// The approximate memory of the ids, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Drops all ids.
    pub fn clear(&mut self) {
        *self = Self { buckets_started: self.buckets_started, ..Self::default() };
    }
}

/// Whether all ids of a bucket started at `since` are outside of the window.
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
    fn id_keeps_its_position_for_the_dedup_window() {
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
    fn bytes_count_the_ids_held() {
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
