//! The tail: publishes of this node that were acknowledged and that it has not heard of since.
//!
//! An answer can reach this node although nobody was passed the entry: Redis dies between the two,
//! or the link of a subscriber does. If Redis then comes back without the entry, nobody has it any
//! more but its publisher. So each publish is kept from when it is sent until its *id* was passed
//! on here, or for `KEEP_MAX` after its answer, as long as logs answer; when the nodes have agreed on another server, what
//! is kept is appended once more, with the same id and a hint of where it stood. A number would not
//! do: another message may have got it. Before they agree, what is kept is given back, so that what
//! was acknowledged keeps its number where that can be.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use crate::envelope::{DedupKey, Envelope};
use parking_lot::Mutex;
use skein_protocol::{ids::RoomId, position::Position};
use tokio::time::Instant;

use crate::delivery::{Entry, ServerId, ordinal};

/// How long an acknowledged publish is kept that does not come by: above that it is in the logs of
/// replicas and files, as far as it ever will be.
const KEEP_MAX: Duration = Duration::from_secs(30);
/// The most that all of them take; the oldest go first.
const BYTES_MAX: usize = 64 << 20;
/// What each takes beside its envelope, roughly.
const OVERHEAD_BYTES: usize = 256;

/// The tail of one node.
#[derive(Debug, Default)]
pub struct UnconfirmedPublishes {
    unconfirmed: Mutex<Unconfirmed>,
}

#[derive(Debug, Default)]
struct Unconfirmed {
    publishes: HashMap<DedupKey, UnconfirmedPublish>,
    /// Those that were acknowledged, in the order of their answers; some have come by since.
    acknowledged: VecDeque<(Instant, DedupKey)>,
    bytes: usize,
    /// Counts publishes, so that they can be repeated in their order.
    tracked: u64,
}

#[derive(Debug)]
struct UnconfirmedPublish {
    room: RoomId,
    envelope: Envelope,
    number: u64,
    acknowledged: Option<Acknowledged>,
}

#[derive(Debug)]
struct Acknowledged {
    /// Where the log answered it stands.
    at: Position,
    /// The server that answered so first.
    origin: ServerId,
    /// When it answered, or when it was repeated last.
    since: Instant,
}

/// A publish that is to be repeated.
#[derive(Debug)]
pub struct Republish {
    /// The room.
    pub room: RoomId,
    /// What was published.
    pub envelope: Envelope,
    /// Where it stood.
    pub at: Position,
    /// Its place in the order in which publishes were sent first.
    pub number: u64,
}

/// What this node has published in a room and not heard since.
#[derive(Debug)]
pub struct UnconfirmedInRoom {
    /// The room.
    pub room: RoomId,
    /// What was acknowledged, as the log had it, in the order of the numbers.
    pub acknowledged: Vec<Entry>,
    /// What has no answer, in the order in which it was sent first, each with its place in that.
    pub unanswered: Vec<(u64, Envelope)>,
}

impl UnconfirmedPublishes {
    /// A publish leaves for the log: again, where it has a number. Returns its place in the order in
    /// which publishes were sent first.
    pub fn track(&self, room: &RoomId, envelope: &Envelope, number: Option<u64>) -> u64 {
        let kept = &mut *self.unconfirmed.lock();
        let known = kept.publishes.get(&envelope.dedup_key());
        if let Some(publish) = known.filter(|publish| publish.acknowledged.is_some()) {
            // Its sender repeats what was acknowledged: that must not be lost if the repeat fails.
            return publish.number;
        }
        let number = number.unwrap_or_else(|| {
            kept.tracked += 1;
            kept.tracked
        });
        #[cfg(debug_assertions)]
        if crate::fault_injection::is_injected(
            crate::fault_injection::ProtocolFault::UnconfirmedNotKept,
        ) {
            return number;
        }
        let (room, envelope) = (room.clone(), envelope.clone());
        let publish = UnconfirmedPublish { room, envelope, number, acknowledged: None };
        let bytes = publish.bytes();
        let before = kept.publishes.insert(publish.envelope.dedup_key(), publish);
        kept.bytes += bytes;
        kept.bytes -= before.map_or(0, |publish| publish.bytes());
        number
    }

    /// The log of the server `origin` has answered. Returns how many others were forgotten to keep
    /// this one.
    pub fn acknowledged(&self, id: &DedupKey, at: &Position, stamp: ServerId, now: Instant) -> u64 {
        let kept = &mut *self.unconfirmed.lock();
        if let Some(publish) = kept.publishes.get_mut(id) {
            let before = publish.acknowledged.take().filter(|before| before.at == *at);
            let stamp = before.map_or(stamp, |before| before.origin);
            publish.acknowledged = Some(Acknowledged { at: at.clone(), origin: stamp, since: now });
            kept.acknowledged.push_back((now, *id));
        }
        kept.drop_expired(now)
    }

    /// The log has refused it, or it was given up: nobody was told that it is there.
    pub fn discard(&self, id: &DedupKey) {
        let kept = &mut *self.unconfirmed.lock();
        if kept.publishes.get(id).is_some_and(|publish| publish.acknowledged.is_none()) {
            kept.remove(id);
        }
    }

    /// An entry with this id was passed on here, and is in the room's ring from now on.
    pub fn confirm(&self, id: &DedupKey) {
        let kept = &mut *self.unconfirmed.lock();
        if !kept.publishes.is_empty() {
            kept.remove(id);
        }
    }

    /// As [`UnconfirmedPublishes::confirm`], but by the number.
    #[cfg(debug_assertions)]
    pub fn confirm_seq(&self, seq: skein_protocol::position::Seq) {
        let kept = &mut *self.unconfirmed.lock();
        let at = |publish: &UnconfirmedPublish| {
            publish.acknowledged.as_ref().is_some_and(|acknowledged| acknowledged.at.seq == seq)
        };
        let ids: Vec<DedupKey> =
            kept.publishes.iter().filter(|(_, publish)| at(publish)).map(|(id, _)| *id).collect();
        for id in ids {
            kept.remove(&id);
        }
    }

    /// What was published in some of the rooms and has not come by.
    pub fn by_room(&self, of: impl Fn(&RoomId) -> bool) -> Vec<UnconfirmedInRoom> {
        let kept = self.unconfirmed.lock();
        let mut publishes: Vec<&UnconfirmedPublish> =
            kept.publishes.values().filter(|publish| of(&publish.room)).collect();
        publishes.sort_unstable_by_key(|publish| publish.number);
        let mut rooms: BTreeMap<&RoomId, UnconfirmedInRoom> = BTreeMap::new();
        for publish in publishes {
            let unheard = rooms.entry(&publish.room).or_insert_with(|| UnconfirmedInRoom {
                room: publish.room.clone(),
                acknowledged: Vec::new(),
                unanswered: Vec::new(),
            });
            let envelope = publish.envelope.clone();
            match &publish.acknowledged {
                Some(Acknowledged { at, origin: stamp, .. }) => {
                    let (position, stamp) = (at.clone(), *stamp);
                    unheard.acknowledged.push(Entry { position, origin: stamp, envelope });
                }
                None => unheard.unanswered.push((publish.number, envelope)),
            }
        }
        let mut rooms: Vec<UnconfirmedInRoom> = rooms.into_values().collect();
        for unheard in &mut rooms {
            unheard
                .acknowledged
                .sort_by_key(|entry| (ordinal(&entry.position.epoch), entry.position.seq));
        }
        rooms
    }

    /// Whether all that was acknowledged and has not come by was acknowledged by one server.
    pub fn is_all_from(&self, server: ServerId) -> bool {
        let kept = self.unconfirmed.lock();
        let mut acknowledged = kept.publishes.values().filter_map(|of| of.acknowledged.as_ref());
        acknowledged.all(|acknowledged| acknowledged.origin == server)
    }

    /// What was acknowledged and has not come by in some of the rooms, to be repeated, in the order
    /// it was sent. None is too old for that: time in which no log answers does not count.
    pub fn to_republish(&self, of: impl Fn(&RoomId) -> bool, now: Instant) -> Vec<Republish> {
        let kept = &mut *self.unconfirmed.lock();
        let mut repeats = Vec::new();
        for (id, publish) in &mut kept.publishes {
            let Some(acknowledged) = &mut publish.acknowledged else { continue };
            if of(&publish.room) {
                acknowledged.since = now;
                kept.acknowledged.push_back((now, *id));
                repeats.push(Republish {
                    room: publish.room.clone(),
                    envelope: publish.envelope.clone(),
                    at: acknowledged.at.clone(),
                    number: publish.number,
                });
            }
        }
        repeats.sort_unstable_by_key(|repeat| repeat.number);
        repeats
    }
}

impl Unconfirmed {
    fn remove(&mut self, id: &DedupKey) -> Option<UnconfirmedPublish> {
        let publish = self.publishes.remove(id)?;
        self.bytes -= publish.bytes();
        Some(publish)
    }

    /// Forgets those whose time is over, or that are too many. Returns how many went early.
    fn drop_expired(&mut self, now: Instant) -> u64 {
        let mut early = 0;
        while let Some((since, id)) = self.acknowledged.front().copied() {
            // It may have come by, or been answered a second time since.
            let publish = self.publishes.get(&id);
            let acknowledged = publish.and_then(|publish| publish.acknowledged.as_ref());
            let is_kept = acknowledged.is_some_and(|acknowledged| acknowledged.since == since);
            let old = now.saturating_duration_since(since) >= KEEP_MAX;
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

impl UnconfirmedPublish {
    fn bytes(&self) -> usize {
        self.envelope.as_bytes().len() + OVERHEAD_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::samples::{entry, position};

    fn send(tail: &UnconfirmedPublishes, seq: u64) -> DedupKey {
        let envelope = entry("e", seq).envelope;
        tail.track(&"r".parse().unwrap(), &envelope, None);
        envelope.dedup_key()
    }

    fn repeated(tail: &UnconfirmedPublishes, now: Instant) -> Vec<u64> {
        tail.to_republish(|_| true, now).into_iter().map(|repeat| repeat.at.seq).collect()
    }

    fn stamp() -> ServerId {
        ServerId::default()
    }

    #[test]
    fn what_was_acknowledged_and_did_not_come_by_is_repeated_in_order() {
        let (tail, now) = (UnconfirmedPublishes::default(), Instant::now());
        let ids: Vec<_> = (1..=5).map(|seq| send(&tail, seq)).collect();
        // Answers may be known in another order than publishes were sent.
        for seq in [3, 1, 4, 5] {
            tail.acknowledged(&ids[seq - 1], &position("e", seq as u64), stamp(), now);
        }
        // The copy of one came before its answer, that of another after it.
        tail.confirm(&ids[1]);
        tail.acknowledged(&ids[1], &position("e", 2), stamp(), now);
        tail.confirm(&ids[3]);
        assert_eq!(repeated(&tail, now), [1, 3, 5]);
        // Another server comes before there was an answer.
        assert_eq!(repeated(&tail, now), [1, 3, 5]);
        for id in &ids {
            tail.confirm(id);
        }
        assert!(repeated(&tail, now).is_empty());
        assert_eq!(tail.unconfirmed.lock().bytes, 0);
    }

    #[test]
    fn what_was_published_and_not_heard_is_known_as_the_log_had_it() {
        let (tail, now) = (UnconfirmedPublishes::default(), Instant::now());
        let ids: Vec<_> = (1..=5).map(|seq| send(&tail, seq)).collect();
        for seq in [3, 1] {
            tail.acknowledged(&ids[seq - 1], &position("e", seq as u64), stamp(), now);
        }
        // Repeated to another server, which has it where it was: that one did not append it.
        let other: ServerId = "0123456789abcdef".parse().unwrap();
        tail.acknowledged(&ids[2], &position("e", 3), other, now);
        let [unheard] = &tail.by_room(|_| true)[..] else { panic!("one room") };
        let seqs: Vec<_> = unheard.acknowledged.iter().map(|entry| entry.position.seq).collect();
        assert_eq!(seqs, [1, 3]);
        assert!(unheard.acknowledged.iter().all(|entry| entry.origin == stamp()));
        let numbers: Vec<_> = unheard.unanswered.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [2, 4, 5]);
        ids.iter().for_each(|id| tail.confirm(id));
        assert!(tail.by_room(|_| true).is_empty());
    }

    #[test]
    fn a_repeat_that_fails_takes_nothing_of_what_was_acknowledged() {
        let (tail, now) = (UnconfirmedPublishes::default(), Instant::now());
        let id = send(&tail, 1);
        tail.acknowledged(&id, &position("e", 1), stamp(), now);
        send(&tail, 1);
        tail.discard(&id);
        assert_eq!(repeated(&tail, now), [1]);
    }

    #[test]
    fn nothing_is_kept_for_ever() {
        let (tail, now) = (UnconfirmedPublishes::default(), Instant::now());
        let (old, failed, young) = (send(&tail, 1), send(&tail, 2), send(&tail, 3));
        tail.acknowledged(&old, &position("e", 1), stamp(), now);
        tail.discard(&failed);
        tail.acknowledged(&young, &position("e", 3), stamp(), now + KEEP_MAX);
        assert_eq!(repeated(&tail, now + KEEP_MAX), [3]);
        // Time in which no log answers does not count.
        let (later, newest) = (now + 3 * KEEP_MAX, send(&tail, 4));
        assert_eq!(repeated(&tail, later), [3]);
        tail.acknowledged(&newest, &position("e", 4), stamp(), later);
        assert_eq!(repeated(&tail, later), [3, 4]);
        for seq in 0..BYTES_MAX as u64 / 256 {
            let id = send(&tail, seq);
            tail.acknowledged(&id, &position("e", seq), stamp(), now);
        }
        assert!(tail.unconfirmed.lock().bytes <= BYTES_MAX);
    }
}
