//! The publishes that wait to be sent to one server, in order.
//!
//! Entries that were in a log before and are restored go ahead of all others. Publishes wait until
//! the nodes have agreed on the server for their placement group, and a moment longer while a slot
//! migrates. Publishes of other groups pass them; those of the same room never do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use skein_protocol::position::Position;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

use super::keyspace::Keyspace;
use skein_core::bus::{
    Append, Appended, BusError, UnseenPolicy, ticket::PublishTicket, unconfirmed::Republish,
};

/// How long publishes of a migrating slot wait before they are sent again.
const BACK_OFF: Duration = Duration::from_millis(25);
/// How long an unconfirmed publish is republished.
const REPUBLISH_WAIT_MAX: Duration = Duration::from_secs(30);

/// A queued publish. Its share of the queue's capacity is released when it is dropped.
pub(super) struct QueuedAppend {
    pub(super) append: Append,
    /// The position that was acknowledged before, for an unconfirmed publish.
    pub(super) hint: Option<Position>,
    /// Its number in the order in which publishes were first sent, for one that was sent before.
    pub(super) number: Option<u64>,
    _capacity: Option<OwnedSemaphorePermit>,
}

impl QueuedAppend {
    /// A publish that a session waits for.
    pub(super) fn new(append: Append, room: OwnedSemaphorePermit) -> Self {
        Self { append, hint: None, number: None, _capacity: Some(room) }
    }

    /// An unconfirmed publish.
    fn republish(republish: Republish, now: Instant) -> Self {
        let append = Append {
            room: republish.room,
            envelope: republish.envelope,
            urgent: true,
            unseen: UnseenPolicy::Unlimited,
            deadline: now + REPUBLISH_WAIT_MAX,
            // No caller waits.
            ticket: PublishTicket::new(drop),
        };
        Self { append, hint: Some(republish.at), number: Some(republish.number), _capacity: None }
    }

    /// Completes the publish.
    pub(super) fn complete(self, result: Result<Appended, BusError>) {
        let Append { room, ticket, .. } = self.append;
        if let (Some(_), Err(error)) = (&self.hint, &result) {
            tracing::warn!(%room, %error, "cannot republish an acknowledged message; Redis may have lost it");
        }
        ticket.complete(result);
    }
}

/// The publishes that wait for one server.
pub(super) struct AppendQueue {
    keyspace: Keyspace,
    /// Publishes that were sent before, and those that members wait for.
    urgent: VecDeque<QueuedAppend>,
    /// The first deadline of the urgent publishes, or an earlier time.
    urgent_deadline: Option<Instant>,
    others: VecDeque<QueuedAppend>,
    /// Groups whose slot migrates, and when to try them again.
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

    /// Puts unconfirmed publishes in front of all others, together with those that were sent and
    /// have no answer: all in the order in which they were first sent.
    pub(super) fn push_republished(&mut self, republished: Vec<Republish>, now: Instant) {
        let mut sent: Vec<QueuedAppend> = republished
            .into_iter()
            .map(|republish| QueuedAppend::republish(republish, now))
            .collect();
        sent.extend(take(&mut self.urgent, usize::MAX, |queued| queued.number.is_some()));
        sent.sort_by_key(|queued| queued.number);
        // Some were to be republished to the former server as well, and had no answer yet.
        sent.dedup_by(|b, a| a.number == b.number && a.hint.is_some() && b.hint.is_some());
        self.requeue(sent.into());
    }

    /// Puts publishes that were sent and have no answer in front of all others.
    pub(super) fn requeue(&mut self, sent: VecDeque<QueuedAppend>) {
        for queued in sent.into_iter().rev() {
            self.note_urgent_deadline(queued.append.deadline);
            self.urgent.push_front(queued);
        }
    }

    /// Holds the publishes of a group back for a moment.
    pub(super) fn back_off(&mut self, group: u16, now: Instant) {
        self.backing_off.insert(group, now + BACK_OFF);
    }

    /// Takes the publishes past their deadline. Those that are not urgent expire nearly in queue
    /// order: one behind an older one waits longer by at most the difference of their timeouts.
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

    /// When a publish expires or a group's back-off ends.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let urgent = self.urgent_deadline.filter(|_| !self.urgent.is_empty());
        let others = self.others.front().map(|queued| queued.append.deadline);
        urgent.into_iter().chain(others).chain(self.backing_off.values().copied()).min()
    }

    /// Takes up to `count` publishes to send to a server that was agreed on for `open`.
    pub(super) fn next_batch(
        &mut self,
        count: usize,
        open: &BTreeSet<u16>,
        now: Instant,
    ) -> Vec<QueuedAppend> {
        self.backing_off.retain(|_, until| *until > now);
        let (keyspace, backing_off) = (self.keyspace, &self.backing_off);
        let ready = |queued: &QueuedAppend| {
            let group = keyspace.group_of(&queued.append.room);
            open.contains(&group) && !backing_off.contains_key(&group)
        };
        let mut batch = take(&mut self.urgent, count, ready);
        batch.extend(take(&mut self.others, count - batch.len(), ready));
        batch
    }

    /// Takes all publishes of groups that have moved to another server.
    pub(super) fn drain_groups(&mut self, groups: &[u16]) -> Vec<QueuedAppend> {
        let keyspace = self.keyspace;
        let is_drained =
            |queued: &QueuedAppend| groups.contains(&keyspace.group_of(&queued.append.room));
        let mut all = take(&mut self.urgent, usize::MAX, is_drained);
        all.extend(take(&mut self.others, usize::MAX, is_drained));
        all
    }

    /// Takes all publishes.
    pub(super) fn drain_all(&mut self) -> impl Iterator<Item = QueuedAppend> {
        self.urgent.drain(..).chain(self.others.drain(..))
    }
}

/// Takes up to `count` wanted publishes from the front, and leaves the others in their order.
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

    const SHARDED: Keyspace = Keyspace { partitions: 256, sharded: true, archive_backlog_max: 0 };

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
            ticket: PublishTicket::new(drop),
        };
        QueuedAppend { append, hint: None, number: None, _capacity: None }
    }

    fn rooms(batch: &[QueuedAppend]) -> Vec<&str> {
        batch.iter().map(|queued| queued.append.room.as_str()).collect()
    }

    #[test]
    fn other_groups_pass_publishes_that_cannot_be_sent() {
        let (a, b): (RoomId, RoomId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (group_a, group_b) = (SHARDED.group_of(&a), SHARDED.group_of(&b));
        assert_ne!(group_a, group_b);
        let now = Instant::now();
        let late = now + Duration::from_secs(1);
        let mut queue = AppendQueue::new(SHARDED);
        for (room, seq) in [(&a, 1), (&b, 2), (&a, 3), (&b, 4)] {
            queue.push(append(room, seq, late));
        }
        let ids = |batch: &[QueuedAppend]| -> Vec<_> {
            batch.iter().map(|queued| queued.append.envelope.id()).collect()
        };
        let expected: Vec<_> = (1..=4).map(|seq| envelope(seq).id()).collect();

        let only_b = BTreeSet::from([group_b]);
        let sent = queue.next_batch(1, &only_b, now);
        assert_eq!(ids(&sent), expected[1..2]);
        assert!(queue.next_batch(9, &BTreeSet::new(), now).is_empty());
        // It came back: its slot migrates.
        queue.requeue(sent.into());
        queue.back_off(group_b, now);
        let both = BTreeSet::from([group_a, group_b]);
        assert_eq!(queue.next_deadline(), Some(now + BACK_OFF));
        assert_eq!(rooms(&queue.next_batch(9, &both, now)), ["a", "a"]);
        assert_eq!(ids(&queue.drain_groups(&[group_b])), [expected[1], expected[3]]);
        assert!(queue.next_batch(9, &both, now + BACK_OFF).is_empty());
    }

    #[test]
    fn expired_publishes_are_taken() {
        let (room, now) = ("a".parse().unwrap(), Instant::now());
        let mut queue = AppendQueue::new(SHARDED);
        for seq in 1..=3 {
            queue.push(append(&room, seq, now + Duration::from_secs(seq)));
        }
        assert_eq!(queue.next_deadline(), Some(now + Duration::from_secs(1)));
        assert_eq!(queue.take_expired(now + Duration::from_secs(2)).len(), 2);
        assert_eq!(queue.drain_all().count(), 1);
    }

    #[test]
    fn unanswered_publishes_keep_their_place_among_republished_ones() {
        let (room, now): (RoomId, _) = ("a".parse().unwrap(), Instant::now());
        let sent = |seq, number| QueuedAppend { number, ..append(&room, seq, now + BACK_OFF) };
        let mut queue = AppendQueue::new(SHARDED);
        queue.push(sent(5, None));
        queue.requeue([sent(1, Some(1)), sent(3, Some(3))].into());
        let republish = |number| Republish {
            room: room.clone(),
            envelope: envelope(number),
            at: Position::new("1-e".parse().unwrap(), number),
            number,
        };
        queue.push_republished(vec![republish(2), republish(4)], now);
        assert_eq!(queue.next_deadline(), Some(now + BACK_OFF));
        let group = BTreeSet::from([SHARDED.group_of(&room)]);
        let order = queue.next_batch(9, &group, now);
        let order: Vec<_> = order.iter().map(|queued| queued.append.envelope.id()).collect();
        let expected: Vec<_> = (1..=5).map(|seq| envelope(seq).id()).collect();
        assert_eq!(order, expected);
        // A publish with a later deadline does not hold up one that has expired.
        queue.requeue([sent(7, Some(7))].into());
        queue.push_republished(vec![republish(6)], now);
        assert_eq!(queue.take_expired(now + BACK_OFF).len(), 1);
        assert_eq!(queue.next_deadline(), Some(now + REPUBLISH_WAIT_MAX));
    }
}
