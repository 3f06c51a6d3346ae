//! The tail: publishes of this node that were acknowledged and that it has not heard of since.
//!
//! An answer can reach this node although nobody was passed the entry: Redis dies between the two,
//! or the link of a subscriber does. If Redis then comes back without the entry, nobody has it any
//! more but its publisher. So each publish is kept from when it is sent until its *id* was passed
//! on here, or for `KEPT_FOR` after its answer, as long as logs answer; when the nodes have agreed on another server, what
//! is kept is appended once more, with the same id and a hint of where it stood. A number would not
//! do: another message may have got it.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;
use shared::{
    envelope::{Envelope, IdKey},
    ids::RoomId,
    position::Position,
};
use tokio::time::Instant;

use crate::delivery::{Entry, Token};

/// How long an acknowledged publish is kept that does not come by: above that it is in the logs of
/// replicas and files, as far as it ever will be.
const KEPT_FOR: Duration = Duration::from_secs(30);
/// The most that all of them take; the oldest go first.
const BYTES_MAX: usize = 64 << 20;
/// What each takes beside its envelope, roughly.
const OVERHEAD_BYTES: usize = 256;

/// The tail of one node.
#[derive(Debug, Default)]
pub struct Tail {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    publishes: HashMap<IdKey, Publish>,
    /// Those that were acknowledged, in the order of their answers; some have come by since.
    acknowledged: VecDeque<(Instant, IdKey)>,
    bytes: usize,
    /// Counts publishes, so that they can be repeated in their order.
    sent: u64,
}

#[derive(Debug)]
struct Publish {
    room: RoomId,
    envelope: Envelope,
    number: u64,
    /// Where the log answered it stands.
    at: Option<(Position, Instant)>,
    /// The server that appended it, if that answer was the first.
    stamp: Option<Token>,
}

/// A publish that is to be repeated.
#[derive(Debug)]
pub struct Repeat {
    /// The room.
    pub room: RoomId,
    /// What was published.
    pub envelope: Envelope,
    /// Where it stood.
    pub at: Position,
    /// Its place in the order in which publishes were sent first.
    pub number: u64,
}

impl Tail {
    /// A publish leaves for the log: again, where it has a number. Returns its place in the order in
    /// which publishes were sent first.
    pub fn sent(&self, room: &RoomId, envelope: &Envelope, number: Option<u64>) -> u64 {
        let kept = &mut *self.kept.lock();
        let known = kept.publishes.get(&envelope.id_key());
        if let Some(publish) = known.filter(|publish| publish.at.is_some()) {
            // Its sender repeats what was acknowledged: that must not be lost if the repeat fails.
            return publish.number;
        }
        let number = number.unwrap_or_else(|| {
            kept.sent += 1;
            kept.sent
        });
        #[cfg(feature = "defects")]
        if crate::defect::planted(crate::defect::Defect::NoTail) {
            return number;
        }
        let (room, envelope) = (room.clone(), envelope.clone());
        let publish = Publish { room, envelope, number, at: None, stamp: None };
        let bytes = publish.bytes();
        let before = kept.publishes.insert(publish.envelope.id_key(), publish);
        kept.bytes += bytes;
        kept.bytes -= before.map_or(0, |publish| publish.bytes());
        number
    }

    /// The log has answered; `stamp` is the server that appended it, if it was not there before.
    /// Returns how many others were forgotten to keep this one.
    pub fn acknowledged(
        &self,
        id: &IdKey,
        at: &Position,
        stamp: Option<Token>,
        now: Instant,
    ) -> u64 {
        let kept = &mut *self.kept.lock();
        if let Some(publish) = kept.publishes.get_mut(id) {
            publish.at = Some((at.clone(), now));
            publish.stamp = stamp;
            kept.acknowledged.push_back((now, *id));
        }
        kept.forget_old(now)
    }

    /// The log has refused it, or it was given up: nobody was told that it is there.
    pub fn failed(&self, id: &IdKey) {
        let kept = &mut *self.kept.lock();
        if kept.publishes.get(id).is_some_and(|publish| publish.at.is_none()) {
            kept.remove(id);
        }
    }

    /// An entry with this id was passed on here, and is in the room's ring from now on.
    pub fn seen(&self, id: &IdKey) {
        let kept = &mut *self.kept.lock();
        if !kept.publishes.is_empty() {
            kept.remove(id);
        }
    }

    /// As [`Tail::seen`], but by the number.
    #[cfg(feature = "defects")]
    pub fn seen_at(&self, seq: shared::position::Seq) {
        let kept = &mut *self.kept.lock();
        let at = |publish: &Publish| publish.at.as_ref().is_some_and(|(at, _)| at.seq == seq);
        let ids: Vec<IdKey> =
            kept.publishes.iter().filter(|(_, publish)| at(publish)).map(|(id, _)| *id).collect();
        for id in ids {
            kept.remove(&id);
        }
    }

    /// What was appended and has not come by, as the log had it, in the order of the numbers.
    pub fn unheard(&self) -> Vec<(RoomId, Entry)> {
        let kept = self.kept.lock();
        let entry = |publish: &Publish| {
            let (position, _) = publish.at.clone()?;
            let entry =
                Entry { position, stamp: publish.stamp?, envelope: publish.envelope.clone() };
            Some((publish.room.clone(), entry))
        };
        let mut unheard: Vec<_> = kept.publishes.values().filter_map(entry).collect();
        unheard.sort_by_key(|(_, entry)| entry.position.seq);
        unheard
    }

    /// Takes what was acknowledged and has not come by in some of the rooms, in the order it was
    /// sent. None is too old for that: time in which no log answers does not count.
    pub fn take(&self, of: impl Fn(&RoomId) -> bool) -> Vec<Repeat> {
        let kept = &mut *self.kept.lock();
        let wanted = |id: &IdKey| kept.publishes.get(id).is_none_or(|publish| of(&publish.room));
        let (ids, others) =
            kept.acknowledged.drain(..).partition::<Vec<_>, _>(|(_, id)| wanted(id));
        kept.acknowledged = others.into();
        let mut taken: Vec<Publish> = ids.iter().filter_map(|(_, id)| kept.remove(id)).collect();
        taken.sort_unstable_by_key(|publish| publish.number);
        let repeat = |publish: Publish| {
            let (at, _) = publish.at?;
            let Publish { room, envelope, number, .. } = publish;
            Some(Repeat { room, envelope, at, number })
        };
        taken.into_iter().filter_map(repeat).collect()
    }
}

impl Kept {
    fn remove(&mut self, id: &IdKey) -> Option<Publish> {
        let publish = self.publishes.remove(id)?;
        self.bytes -= publish.bytes();
        Some(publish)
    }

    /// Forgets those whose time is over, or that are too many. Returns how many went early.
    fn forget_old(&mut self, now: Instant) -> u64 {
        let mut early = 0;
        while let Some((since, id)) = self.acknowledged.front().copied() {
            // It may have come by, or been answered a second time since.
            let this = |publish: &Publish| publish.at.as_ref().is_some_and(|(_, at)| *at == since);
            let is_kept = self.publishes.get(&id).is_some_and(this);
            let old = now.saturating_duration_since(since) >= KEPT_FOR;
            if is_kept && !old && self.bytes <= BYTES_MAX {
                break;
            }
            self.acknowledged.pop_front();
            if is_kept {
                self.remove(&id);
                early += u64::from(!old);
            }
        }
        early
    }
}

impl Publish {
    fn bytes(&self) -> usize {
        self.envelope.as_bytes().len() + OVERHEAD_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::samples::{entry, position};

    fn send(tail: &Tail, seq: u64) -> IdKey {
        let envelope = entry("e", seq).envelope;
        tail.sent(&"r".parse().unwrap(), &envelope, None);
        envelope.id_key()
    }

    fn positions(repeats: Vec<Repeat>) -> Vec<u64> {
        repeats.into_iter().map(|repeat| repeat.at.seq).collect()
    }

    #[test]
    fn what_was_acknowledged_and_did_not_come_by_is_repeated_in_order() {
        let (tail, now) = (Tail::default(), Instant::now());
        let ids: Vec<_> = (1..=5).map(|seq| send(&tail, seq)).collect();
        // Answers may be known in another order than publishes were sent.
        for seq in [3, 1, 4, 5] {
            tail.acknowledged(&ids[seq - 1], &position("e", seq as u64), None, now);
        }
        // The copy of one came before its answer, that of another after it.
        tail.seen(&ids[1]);
        tail.acknowledged(&ids[1], &position("e", 2), None, now);
        tail.seen(&ids[3]);
        assert_eq!(positions(tail.take(|_| true)), [1, 3, 5]);
        assert!(tail.take(|_| true).is_empty());
        assert_eq!(tail.kept.lock().bytes, 0);
    }

    #[test]
    fn what_was_appended_and_not_heard_is_known_as_the_log_had_it() {
        let (tail, now) = (Tail::default(), Instant::now());
        let ids: Vec<_> = (1..=4).map(|seq| send(&tail, seq)).collect();
        let stamp = Some(Token::default());
        for seq in [3, 1] {
            tail.acknowledged(&ids[seq - 1], &position("e", seq as u64), stamp, now);
        }
        // One was there before: who appended it is not known. Another has no answer.
        tail.acknowledged(&ids[1], &position("e", 2), None, now);
        let unheard = tail.unheard();
        let seqs: Vec<_> = unheard.iter().map(|(_, entry)| entry.position.seq).collect();
        assert_eq!(seqs, [1, 3]);
        tail.seen(&ids[0]);
        assert_eq!(tail.unheard().len(), 1);
    }

    #[test]
    fn a_repeat_that_fails_takes_nothing_of_what_was_acknowledged() {
        let (tail, now) = (Tail::default(), Instant::now());
        let id = send(&tail, 1);
        tail.acknowledged(&id, &position("e", 1), None, now);
        send(&tail, 1);
        tail.failed(&id);
        assert_eq!(positions(tail.take(|_| true)), [1]);
    }

    #[test]
    fn nothing_is_kept_for_ever() {
        let (tail, now) = (Tail::default(), Instant::now());
        let (old, failed, young) = (send(&tail, 1), send(&tail, 2), send(&tail, 3));
        tail.acknowledged(&old, &position("e", 1), None, now);
        tail.failed(&failed);
        tail.acknowledged(&young, &position("e", 3), None, now + KEPT_FOR);
        assert_eq!(positions(tail.take(|_| true)), [3]);
        let bytes = || tail.kept.lock().bytes;
        assert_eq!(bytes(), 0);
        for seq in 0..BYTES_MAX as u64 / 256 {
            let id = send(&tail, seq);
            tail.acknowledged(&id, &position("e", seq), None, now);
        }
        assert!(bytes() <= BYTES_MAX);
    }
}
