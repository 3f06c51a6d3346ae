//! The ids of a room's messages within the dedup window, to be given back to a server that lost
//! them: a message that is sent once more is then known, however many came after it.
//!
//! An id takes 32 bytes. They stand in buckets by the time they were noted, so that forgetting the
//! old ones costs nothing.

use std::{collections::VecDeque, time::Duration};

use shared::{
    envelope::DedupKey,
    position::{Epoch, Position, Seq},
};
use tokio::time::Instant;

/// The most ids of a bucket.
const BUCKET_LEN: usize = 512;
/// Into how many buckets the window is cut; an id is kept for so much of it longer.
const BUCKETS: u32 = 16;
/// What a bucket takes beside its ids, roughly.
const BUCKET_BYTES: usize = 128;

/// The ids of a room.
#[derive(Debug, Default)]
pub struct Ids {
    buckets: VecDeque<Bucket>,
    bytes: usize,
    /// How many buckets were ever begun.
    begun: u64,
}

#[derive(Debug)]
struct Bucket {
    since: Instant,
    epoch: Epoch,
    ids: Vec<(DedupKey, Seq)>,
}

impl Ids {
    /// Notes that a message was passed on at `now`.
    pub fn note(&mut self, key: DedupKey, position: &Position, window: Duration, now: Instant) {
        let fits = |bucket: &Bucket| {
            bucket.ids.len() < BUCKET_LEN
                && bucket.epoch == position.epoch
                && now.saturating_duration_since(bucket.since) <= window / BUCKETS
        };
        if !self.buckets.back().is_some_and(fits) {
            let epoch = position.epoch.clone();
            self.buckets.push_back(Bucket { since: now, epoch, ids: Vec::new() });
            self.bytes += BUCKET_BYTES;
            self.begun += 1;
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

    /// When the oldest bucket was begun.
    pub fn oldest(&self) -> Option<Instant> {
        self.buckets.front().map(|bucket| bucket.since)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// How many buckets were begun since the room is followed.
    pub fn begun(&self) -> u64 {
        self.begun
    }

    /// What the ids take in memory, roughly.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self { begun: self.begun, ..Self::default() };
    }
}

/// Whether a bucket that was begun at `since` holds nothing within the window any more.
pub fn is_past(since: Instant, window: Duration, now: Instant) -> bool {
    now.saturating_duration_since(since) > window + window / BUCKETS
}

#[cfg(test)]
mod tests {
    use super::{super::samples::entry, *};

    const WINDOW: Duration = Duration::from_secs(600);

    fn note(ids: &mut Ids, epoch: &str, seq: Seq, now: Instant) {
        let entry = entry(epoch, seq);
        ids.note(entry.envelope.dedup_key(), &entry.position, WINDOW, now);
    }

    #[test]
    fn an_id_keeps_its_position_for_the_window_and_little_longer() {
        let (mut ids, start) = (Ids::default(), Instant::now());
        note(&mut ids, "1-e", 1, start);
        note(&mut ids, "2-f", 2, start);
        note(&mut ids, "2-f", 3, start + WINDOW / 2);
        let known: Vec<_> = ids.below(3).map(|(_, position)| position.to_string()).collect();
        assert_eq!(known, ["1-e:1", "2-f:2"]);
        assert!(!is_past(ids.oldest().unwrap(), WINDOW, start + WINDOW));
        let later = start + WINDOW / BUCKETS * (BUCKETS + 2);
        assert!(is_past(ids.oldest().unwrap(), WINDOW, later));
        ids.forget_oldest();
        assert_eq!(ids.below(9).count(), 2);
    }

    #[test]
    fn bytes_are_those_of_what_is_held() {
        let (mut ids, now) = (Ids::default(), Instant::now());
        for seq in 1..=2000 {
            note(&mut ids, "1-e", seq, now);
        }
        assert!(ids.bytes() >= 2000 * 32 && ids.bytes() < 2000 * 33, "{}", ids.bytes());
        while !ids.is_empty() {
            ids.forget_oldest();
        }
        assert_eq!((ids.bytes(), ids.begun()), (0, 4));
    }
}
