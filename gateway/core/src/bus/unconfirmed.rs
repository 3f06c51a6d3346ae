//! Unconfirmed publishes: publishes of this node that it has not received from the bus yet.
//!
//! Redis can acknowledge a publish without any node having received the entry: the server dies
//! between the two, or a subscriber's connection does. If Redis then returns without the entry,
//! only its publisher still has it. A node therefore keeps each publish from when it is sent until
//! an entry with its *id* was delivered here, or for `KEEP_MAX` after the acknowledgement, as long
//! as logs answer. A number would not do: another message may have got it.
//!
//! Before the nodes agree on another server, they restore what they keep, so that
//! an acknowledged message keeps its number where that is possible. After the agreement they
//! republish what is still unconfirmed, with the same id and the position that was acknowledged as
//! a hint.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;
use skein_protocol::{ids::RoomId, position::Position};
use tokio::time::Instant;

use crate::{
    delivery::{Entry, ServerId, ordinal},
    envelope::{DedupKey, Envelope},
};

/// How long an acknowledged publish is kept that stays unconfirmed. After that it is in the logs of
/// replicas and in files, as far as it ever will be.
const KEEP_MAX: Duration = Duration::from_secs(30);
/// The most bytes of all unconfirmed publishes; the oldest are dropped first.
const BYTES_MAX: usize = 64 << 20;
/// Memory of each publish beside its envelope, bytes, roughly.
const OVERHEAD_BYTES: usize = 256;

/// The unconfirmed publishes of one node.
#[derive(Debug, Default)]
pub struct UnconfirmedPublishes {
    unconfirmed: Mutex<Unconfirmed>,
}

#[derive(Debug, Default)]
struct Unconfirmed {
    publishes: HashMap<DedupKey, UnconfirmedPublish>,
    /// Acknowledged publishes, in the order of their acknowledgements; some were confirmed since.
    acknowledged: VecDeque<(Instant, DedupKey)>,
    bytes: usize,
    /// Numbers publishes, so that they can be republished in their order.
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
    /// The acknowledged position.
    at: Position,
    /// The server that acknowledged this position first.
    origin: ServerId,
    /// When it was acknowledged, or republished last.
    since: Instant,
}

/// A publish to be sent to another server.
#[derive(Debug)]
pub struct Republish {
    /// The room.
    pub room: RoomId,
    /// The published message.
    pub envelope: Envelope,
    /// The acknowledged position.
    pub at: Position,
    /// Its number in the order in which publishes were first sent.
    pub number: u64,
}

/// Unconfirmed publishes of this node in one room.
#[derive(Debug)]
pub struct UnconfirmedInRoom {
    /// The room.
    pub room: RoomId,
    /// Acknowledged publishes, as entries in the order of their numbers.
    pub acknowledged: Vec<Entry>,
    /// Publishes without an answer, in the order in which they were first sent, each with its
    /// number in that order.
    pub unanswered: Vec<(u64, Envelope)>,
}

impl UnconfirmedPublishes {
    /// Tracks a publish that is sent to the log; a `number` marks one that is sent again. Returns
    /// its number in the order in which publishes were first sent.
    pub fn track(&self, room: &RoomId, envelope: &Envelope, number: Option<u64>) -> u64 {
        let unconfirmed = &mut *self.unconfirmed.lock();
        let known = unconfirmed.publishes.get(&envelope.dedup_key());
        if let Some(publish) = known.filter(|publish| publish.acknowledged.is_some()) {
            // The sender repeats an acknowledged publish. It must not be lost if the repetition
            // fails.
            return publish.number;
        }
        let number = number.unwrap_or_else(|| {
            unconfirmed.tracked += 1;
            unconfirmed.tracked
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
        let before = unconfirmed.publishes.insert(publish.envelope.dedup_key(), publish);
        unconfirmed.bytes += bytes;
        unconfirmed.bytes -= before.map_or(0, |publish| publish.bytes());
        number
    }

    /// Records that the log of the server `origin` has acknowledged a publish. Returns how many
    /// others were dropped to keep this one.
    pub fn acknowledged(
        &self,
        id: &DedupKey,
        at: &Position,
        origin: ServerId,
        now: Instant,
    ) -> u64 {
        let unconfirmed = &mut *self.unconfirmed.lock();
        if let Some(publish) = unconfirmed.publishes.get_mut(id) {
            let before = publish.acknowledged.take().filter(|before| before.at == *at);
            let origin = before.map_or(origin, |before| before.origin);
            publish.acknowledged = Some(Acknowledged { at: at.clone(), origin, since: now });
            unconfirmed.acknowledged.push_back((now, *id));
        }
        unconfirmed.drop_expired(now)
    }

    /// Forgets a publish that the log rejected or that was given up, unless it was acknowledged
    /// before.
    pub fn discard(&self, id: &DedupKey) {
        let unconfirmed = &mut *self.unconfirmed.lock();
        if unconfirmed.publishes.get(id).is_some_and(|publish| publish.acknowledged.is_none()) {
            unconfirmed.remove(id);
        }
    }

    /// Forgets a publish whose entry was delivered here: the room's ring holds it from now on.
    pub fn confirm(&self, id: &DedupKey) {
        let unconfirmed = &mut *self.unconfirmed.lock();
        if !unconfirmed.publishes.is_empty() {
            unconfirmed.remove(id);
        }
    }

    /// Confirms as [`UnconfirmedPublishes::confirm`] does, but by the number.
    #[cfg(debug_assertions)]
    pub fn confirm_seq(&self, seq: skein_protocol::position::Seq) {
        let unconfirmed = &mut *self.unconfirmed.lock();
        let at = |publish: &UnconfirmedPublish| {
            publish.acknowledged.as_ref().is_some_and(|acknowledged| acknowledged.at.seq == seq)
        };
        let ids: Vec<DedupKey> = unconfirmed
            .publishes
            .iter()
            .filter(|(_, publish)| at(publish))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            unconfirmed.remove(&id);
        }
    }

    /// The unconfirmed publishes of the rooms that `of` selects, by room.
    pub fn by_room(&self, of: impl Fn(&RoomId) -> bool) -> Vec<UnconfirmedInRoom> {
        let unconfirmed = self.unconfirmed.lock();
        let mut publishes: Vec<&UnconfirmedPublish> =
            unconfirmed.publishes.values().filter(|publish| of(&publish.room)).collect();
        publishes.sort_unstable_by_key(|publish| publish.number);
        let mut rooms: BTreeMap<&RoomId, UnconfirmedInRoom> = BTreeMap::new();
        for publish in publishes {
            let of_room = rooms.entry(&publish.room).or_insert_with(|| UnconfirmedInRoom {
                room: publish.room.clone(),
                acknowledged: Vec::new(),
                unanswered: Vec::new(),
            });
            let envelope = publish.envelope.clone();
            match &publish.acknowledged {
                Some(Acknowledged { at, origin, .. }) => {
                    let (position, origin) = (at.clone(), *origin);
                    of_room.acknowledged.push(Entry { position, origin, envelope });
                }
                None => of_room.unanswered.push((publish.number, envelope)),
            }
        }
        let mut rooms: Vec<UnconfirmedInRoom> = rooms.into_values().collect();
        for of_room in &mut rooms {
            of_room
                .acknowledged
                .sort_by_key(|entry| (ordinal(&entry.position.epoch), entry.position.seq));
        }
        rooms
    }

    /// Whether every acknowledged and unconfirmed publish was acknowledged by `server`.
    pub fn is_all_from(&self, server: ServerId) -> bool {
        let unconfirmed = self.unconfirmed.lock();
        let mut acknowledged =
            unconfirmed.publishes.values().filter_map(|of| of.acknowledged.as_ref());
        acknowledged.all(|acknowledged| acknowledged.origin == server)
    }

    /// The acknowledged and unconfirmed publishes of the rooms that `of` selects, in the order in
    /// which they were sent. None is too old: the time in which no log answers does not count.
    pub fn to_republish(&self, of: impl Fn(&RoomId) -> bool, now: Instant) -> Vec<Republish> {
        let unconfirmed = &mut *self.unconfirmed.lock();
        let mut republishes = Vec::new();
        for (id, publish) in &mut unconfirmed.publishes {
            let Some(acknowledged) = &mut publish.acknowledged else { continue };
            if of(&publish.room) {
                acknowledged.since = now;
                unconfirmed.acknowledged.push_back((now, *id));
                republishes.push(Republish {
                    room: publish.room.clone(),
                    envelope: publish.envelope.clone(),
                    at: acknowledged.at.clone(),
                    number: publish.number,
                });
            }
        }
        republishes.sort_unstable_by_key(|publish| publish.number);
        republishes
    }
}

impl Unconfirmed {
    fn remove(&mut self, id: &DedupKey) -> Option<UnconfirmedPublish> {
        let publish = self.publishes.remove(id)?;
        self.bytes -= publish.bytes();
        Some(publish)
    }

    /// Drops publishes that have expired or exceed the most bytes. Returns how many were dropped
    /// early.
    fn drop_expired(&mut self, now: Instant) -> u64 {
        let mut early = 0;
        while let Some((since, id)) = self.acknowledged.front().copied() {
            // It may have been confirmed, or acknowledged a second time since.
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

    fn send(publishes: &UnconfirmedPublishes, seq: u64) -> DedupKey {
        let envelope = entry("e", seq).envelope;
        publishes.track(&"r".parse().unwrap(), &envelope, None);
        envelope.dedup_key()
    }

    fn republished(publishes: &UnconfirmedPublishes, now: Instant) -> Vec<u64> {
        publishes.to_republish(|_| true, now).into_iter().map(|publish| publish.at.seq).collect()
    }

    fn origin() -> ServerId {
        ServerId::default()
    }

    #[test]
    fn acknowledged_unconfirmed_publishes_are_republished_in_order() {
        let (publishes, now) = (UnconfirmedPublishes::default(), Instant::now());
        let ids: Vec<_> = (1..=5).map(|seq| send(&publishes, seq)).collect();
        // Acknowledgements may arrive in another order than publishes were sent.
        for seq in [3, 1, 4, 5] {
            publishes.acknowledged(&ids[seq - 1], &position("e", seq as u64), origin(), now);
        }
        // One was confirmed before its acknowledgement, another after it.
        publishes.confirm(&ids[1]);
        publishes.acknowledged(&ids[1], &position("e", 2), origin(), now);
        publishes.confirm(&ids[3]);
        assert_eq!(republished(&publishes, now), [1, 3, 5]);
        // Another server comes before there was an acknowledgement.
        assert_eq!(republished(&publishes, now), [1, 3, 5]);
        for id in &ids {
            publishes.confirm(id);
        }
        assert!(republished(&publishes, now).is_empty());
        assert_eq!(publishes.unconfirmed.lock().bytes, 0);
    }

    #[test]
    fn unconfirmed_publishes_are_returned_as_the_log_had_them() {
        let (publishes, now) = (UnconfirmedPublishes::default(), Instant::now());
        let ids: Vec<_> = (1..=5).map(|seq| send(&publishes, seq)).collect();
        for seq in [3, 1] {
            publishes.acknowledged(&ids[seq - 1], &position("e", seq as u64), origin(), now);
        }
        // Republished to another server, which has it at the same position: it did not append it.
        let other: ServerId = "0123456789abcdef".parse().unwrap();
        publishes.acknowledged(&ids[2], &position("e", 3), other, now);
        let [of_room] = &publishes.by_room(|_| true)[..] else { panic!("one room") };
        let seqs: Vec<_> = of_room.acknowledged.iter().map(|entry| entry.position.seq).collect();
        assert_eq!(seqs, [1, 3]);
        assert!(of_room.acknowledged.iter().all(|entry| entry.origin == origin()));
        let numbers: Vec<_> = of_room.unanswered.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [2, 4, 5]);
        ids.iter().for_each(|id| publishes.confirm(id));
        assert!(publishes.by_room(|_| true).is_empty());
    }

    #[test]
    fn a_failed_repetition_keeps_the_acknowledged_publish() {
        let (publishes, now) = (UnconfirmedPublishes::default(), Instant::now());
        let id = send(&publishes, 1);
        publishes.acknowledged(&id, &position("e", 1), origin(), now);
        send(&publishes, 1);
        publishes.discard(&id);
        assert_eq!(republished(&publishes, now), [1]);
    }

    #[test]
    fn unconfirmed_publishes_expire() {
        let (publishes, now) = (UnconfirmedPublishes::default(), Instant::now());
        let (old, failed, young) = (send(&publishes, 1), send(&publishes, 2), send(&publishes, 3));
        publishes.acknowledged(&old, &position("e", 1), origin(), now);
        publishes.discard(&failed);
        publishes.acknowledged(&young, &position("e", 3), origin(), now + KEEP_MAX);
        assert_eq!(republished(&publishes, now + KEEP_MAX), [3]);
        // The time in which no log answers does not count.
        let (later, newest) = (now + 3 * KEEP_MAX, send(&publishes, 4));
        assert_eq!(republished(&publishes, later), [3]);
        publishes.acknowledged(&newest, &position("e", 4), origin(), later);
        assert_eq!(republished(&publishes, later), [3, 4]);
        for seq in 0..BYTES_MAX as u64 / 256 {
            let id = send(&publishes, seq);
            publishes.acknowledged(&id, &position("e", seq), origin(), now);
        }
        assert!(publishes.unconfirmed.lock().bytes <= BYTES_MAX);
    }
}
