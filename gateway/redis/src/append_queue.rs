//! Publishes that wait to be sent to a server, in order.
//!
//! What was in a log once and is brought back goes ahead of everything. Publishes wait until the
//! nodes have agreed on the server for their group, and a moment longer where a slot is on its way to
//! another server; those of other groups pass them, those of the same room never do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use skein_protocol::position::Position;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::keyspace::Keyspace;
use skein_core::bus::{Append, Appended, BusError, UnseenPolicy, unconfirmed::Republish};

/// How long publishes wait whose slot is on its way to another server, before they are tried again.
const BACK_OFF: Duration = Duration::from_millis(25);
/// How long a publish of the tail is tried.
const REPUBLISH_WAIT_MAX: Duration = Duration::from_secs(30);

/// A publish that waits; its share of the queue's bytes is given back when it is dropped.
pub(super) struct QueuedAppend {
    pub(super) append: Append,
    /// Where it stood before, for one of the tail.
    pub(super) hint: Option<Position>,
    /// Its place in the order in which publishes were sent first, for one that was sent.
    pub(super) number: Option<u64>,
    _capacity: Option<OwnedSemaphorePermit>,
}

impl QueuedAppend {
    /// A publish that a session waits for.
    pub(super) fn new(append: Append, room: OwnedSemaphorePermit) -> Self {
        Self { append, hint: None, number: None, _capacity: Some(room) }
    }

    /// A publish of the tail.
    fn republish(repeat: Republish, now: Instant) -> Self {
        let room = repeat.room.clone();
        let done = move |result: Result<Appended, BusError>| {
            if let Err(error) = result {
                tracing::warn!(%room, %error, "an acknowledged publish could not be repeated");
            }
        };
        let append = Append {
            room: repeat.room,
            envelope: repeat.envelope,
            urgent: true,
            unseen: UnseenPolicy::Unlimited,
            deadline: now + REPUBLISH_WAIT_MAX,
            done: Box::new(done),
        };
        Self { append, hint: Some(repeat.at), number: Some(repeat.number), _capacity: None }
    }
}

/// All that waits for one server.
pub(super) struct AppendQueue {
    keyspace: Keyspace,
    /// What was sent before, and what members wait for.
    urgent: VecDeque<QueuedAppend>,
    /// When the first of those is past its deadline, or before.
    urgent_deadline: Option<Instant>,
    others: VecDeque<QueuedAppend>,
    /// Homes on their way to another server, and until when they are left alone.
    backing_off: BTreeMap<u16, Instant>,
}

impl AppendQueue {
    pub(super) fn new(keyspace: Keyspace) -> Self {
        let (urgent, others) = (VecDeque::new(), VecDeque::new());
        Self { keyspace, urgent, urgent_deadline: None, others, backing_off: BTreeMap::new() }
    }

    pub(super) fn push(&mut self, queued: QueuedAppend) {
        if queued.append.urgent {
            self.note_urgent_deadline(queued.append.deadline);
            self.urgent.push_back(queued);
        } else {
            self.others.push_back(queued);
        }
    }

    fn note_urgent_deadline(&mut self, deadline: Instant) {
        self.urgent_deadline = self.urgent_deadline.into_iter().chain([deadline]).min();
    }

    /// Puts publishes of the tail in front of all. What was sent with them and has no answer goes
    /// along: all of it in the order in which it was sent first.
    pub(super) fn push_republished(&mut self, repeats: Vec<Republish>, now: Instant) {
        let mut sent: Vec<QueuedAppend> =
            repeats.into_iter().map(|repeat| QueuedAppend::republish(repeat, now)).collect();
        sent.extend(take(&mut self.urgent, usize::MAX, |queued| queued.number.is_some()));
        sent.sort_by_key(|queued| queued.number);
        // Some were to be repeated to the server before this one, and had no answer yet.
        sent.dedup_by(|b, a| a.number == b.number && a.hint.is_some() && b.hint.is_some());
        self.requeue(sent.into());
    }

    /// Puts what was sent and has no answer in front of all.
    pub(super) fn requeue(&mut self, sent: VecDeque<QueuedAppend>) {
        for queued in sent.into_iter().rev() {
            self.note_urgent_deadline(queued.append.deadline);
            self.urgent.push_front(queued);
        }
    }

    /// Leaves what waits for a group alone for a moment.
    pub(super) fn back_off(&mut self, group: u16, now: Instant) {
        self.backing_off.insert(group, now + BACK_OFF);
    }

    /// Takes what is past its deadline. Those of what is not urgent rise along the queue, nearly: one
    /// that is behind an older one waits for it at most as long as waits differ.
    pub(super) fn take_expired(&mut self, now: Instant) -> Vec<QueuedAppend> {
        let mut expired = Vec::new();
        if self.urgent_deadline.is_some_and(|until| until <= now) {
            expired = take(&mut self.urgent, usize::MAX, |queued| queued.append.deadline <= now);
            self.urgent_deadline = self.urgent.iter().map(|queued| queued.append.deadline).min();
        }
        while let Some(queued) = self.others.pop_front_if(|queued| queued.append.deadline <= now) {
            expired.push(queued);
        }
        expired
    }

    /// When to look again: something is past its deadline, or was left alone for long enough.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let urgent = self.urgent_deadline.filter(|_| !self.urgent.is_empty());
        let others = self.others.front().map(|queued| queued.append.deadline);
        urgent.into_iter().chain(others).chain(self.backing_off.values().copied()).min()
    }

    /// Takes what leaves next to a server that was agreed on for `open`.
    pub(super) fn next_batch(
        &mut self,
        count: usize,
        open: &BTreeSet<u16>,
        now: Instant,
    ) -> Vec<QueuedAppend> {
        self.backing_off.retain(|_, until| *until > now);
        let (keyspace, stuck) = (self.keyspace, &self.backing_off);
        let ready = |queued: &QueuedAppend| {
            let group = keyspace.group_of(&queued.append.room);
            open.contains(&group) && !stuck.contains_key(&group)
        };
        let mut batch = take(&mut self.urgent, count, ready);
        batch.extend(take(&mut self.others, count - batch.len(), ready));
        batch
    }

    /// Takes all that waits for groups that are elsewhere now.
    pub(super) fn drain_groups(&mut self, groups: &[u16]) -> Vec<QueuedAppend> {
        let keyspace = self.keyspace;
        let released =
            |queued: &QueuedAppend| groups.contains(&keyspace.group_of(&queued.append.room));
        let mut all = take(&mut self.urgent, usize::MAX, released);
        all.extend(take(&mut self.others, usize::MAX, released));
        all
    }

    /// Takes everything.
    pub(super) fn drain_all(&mut self) -> impl Iterator<Item = QueuedAppend> {
        self.urgent.drain(..).chain(self.others.drain(..))
    }
}

/// Takes up to `count` from the front that are wanted, and leaves the others in their order.
fn take(
    queue: &mut VecDeque<QueuedAppend>,
    count: usize,
    wanted: impl Fn(&QueuedAppend) -> bool,
) -> Vec<QueuedAppend> {
    let count = count.min(queue.len());
    if queue.iter().take(count).all(&wanted) {
        return queue.drain(..count).collect();
    }
    let (mut taken, mut left) = (Vec::new(), VecDeque::new());
    for queued in queue.drain(..) {
        if taken.len() < count && wanted(&queued) {
            taken.push(queued);
        } else {
            left.push_back(queued);
        }
    }
    *queue = left;
    taken
}

#[cfg(test)]
mod tests {
    use skein_core::envelope::{AuthorHash, Envelope, EnvelopeParts, FrameType};
    use skein_protocol::{
        ids::{ConnectionId, MessageId, RoomId},
        position::Position,
    };
    use uuid::Uuid;

    use super::*;

    const SHARDED: Keyspace = Keyspace { partitions: 256, sharded: true };

    /// The envelope of a message whose id is made of `number`.
    fn envelope(number: u64) -> Envelope {
        Envelope::pack(EnvelopeParts {
            frame: FrameType::default(),
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: MessageId(Uuid::from_u128(u128::from(number))),
            sender: ConnectionId(Uuid::nil()),
            echo: true,
            fields: r#""room":"r""#,
            binary_payload: None,
        })
    }

    fn append(room: &RoomId, seq: u64, deadline: Instant) -> QueuedAppend {
        let append = Append {
            room: room.clone(),
            envelope: envelope(seq),
            urgent: false,
            unseen: UnseenPolicy::Unlimited,
            deadline,
            done: Box::new(|_| {}),
        };
        QueuedAppend { append, hint: None, number: None, _capacity: None }
    }

    fn rooms(batch: &[QueuedAppend]) -> Vec<&str> {
        batch.iter().map(|queued| queued.append.room.as_str()).collect()
    }

    #[test]
    fn what_cannot_be_sent_is_passed_by_other_homes_and_keeps_its_order() {
        let (a, b): (RoomId, RoomId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (group_a, group_b) = (SHARDED.group_of(&a), SHARDED.group_of(&b));
        assert_ne!(group_a, group_b);
        let now = Instant::now();
        let late = now + Duration::from_secs(1);
        let mut waiting = AppendQueue::new(SHARDED);
        for (room, seq) in [(&a, 1), (&b, 2), (&a, 3), (&b, 4)] {
            waiting.push(append(room, seq, late));
        }
        let ids = |batch: &[QueuedAppend]| -> Vec<_> {
            batch.iter().map(|queued| queued.append.envelope.id()).collect()
        };
        let expected: Vec<_> = (1..=4).map(|seq| envelope(seq).id()).collect();

        let only_b = BTreeSet::from([group_b]);
        let sent = waiting.next_batch(1, &only_b, now);
        assert_eq!(ids(&sent), expected[1..2]);
        assert!(waiting.next_batch(9, &BTreeSet::new(), now).is_empty());
        // It came back: its slot is on its way.
        waiting.requeue(sent.into());
        waiting.back_off(group_b, now);
        let both = BTreeSet::from([group_a, group_b]);
        assert_eq!(waiting.next_deadline(), Some(now + BACK_OFF));
        assert_eq!(rooms(&waiting.next_batch(9, &both, now)), ["a", "a"]);
        assert_eq!(ids(&waiting.drain_groups(&[group_b])), [expected[1], expected[3]]);
        assert!(waiting.next_batch(9, &both, now + BACK_OFF).is_empty());
    }

    #[test]
    fn what_is_past_its_deadline_is_taken_out() {
        let (room, now) = ("a".parse().unwrap(), Instant::now());
        let mut waiting = AppendQueue::new(SHARDED);
        for seq in 1..=3 {
            waiting.push(append(&room, seq, now + Duration::from_secs(seq)));
        }
        assert_eq!(waiting.next_deadline(), Some(now + Duration::from_secs(1)));
        assert_eq!(waiting.take_expired(now + Duration::from_secs(2)).len(), 2);
        assert_eq!(waiting.drain_all().count(), 1);
    }

    #[test]
    fn what_has_no_answer_is_repeated_where_it_was_between_what_has_one() {
        let (room, now): (RoomId, _) = ("a".parse().unwrap(), Instant::now());
        let sent = |seq, number| QueuedAppend { number, ..append(&room, seq, now + BACK_OFF) };
        let mut waiting = AppendQueue::new(SHARDED);
        waiting.push(sent(5, None));
        waiting.requeue([sent(1, Some(1)), sent(3, Some(3))].into());
        let repeat = |number| Republish {
            room: room.clone(),
            envelope: envelope(number),
            at: Position::new("1-e".parse().unwrap(), number),
            number,
        };
        waiting.push_republished(vec![repeat(2), repeat(4)], now);
        assert_eq!(waiting.next_deadline(), Some(now + BACK_OFF));
        let group = BTreeSet::from([SHARDED.group_of(&room)]);
        let order = waiting.next_batch(9, &group, now);
        let order: Vec<_> = order.iter().map(|queued| queued.append.envelope.id()).collect();
        let expected: Vec<_> = (1..=5).map(|seq| envelope(seq).id()).collect();
        assert_eq!(order, expected);
        // One that is waited for longer holds none up whose time is over.
        waiting.requeue([sent(7, Some(7))].into());
        waiting.push_republished(vec![repeat(6)], now);
        assert_eq!(waiting.take_expired(now + BACK_OFF).len(), 1);
        assert_eq!(waiting.next_deadline(), Some(now + REPUBLISH_WAIT_MAX));
    }
}
