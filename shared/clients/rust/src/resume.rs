//! Positions in a room's log, and the unacknowledged sends of a client.
//!
//! [`LogTracker`] classifies every entry: the next one is delivered, one that was seen before is
//! dropped, and a skipped number is a gap, which a correct server never produces. [`PendingSends`]
//! keeps unacknowledged messages in sending order, across errors and reconnects, and decides when
//! each is sent again.
//!
//! Pure: no I/O, `now` is an argument. `client::state` keeps one of each per room.
//!
//! Invariant: within an epoch the cursor never goes down, unless the server signalled a
//! discontinuity (`joined` with `recovered:false`, `reset`).

use std::{
    collections::{HashMap, VecDeque, hash_map},
    hash::Hash,
    time::Duration,
};

use tokio::time::Instant;

use skein_protocol::{
    ids::{MessageId, UserId},
    position::{Position, Seq},
    protocol::server_frame::{HistoryEntry, JoinedFrame},
};

/// Number of message ids remembered per room, to recognise an entry that arrives again under a new
/// number.
pub const RECENT_IDS_MAX: usize = 1024;

/// The position of a client in one room's log.
#[derive(Debug, Default)]
pub struct LogTracker {
    /// The last received entry. `None` before the first `joined`, and in rooms without a log.
    cursor: Option<Position>,
    /// The last entry of the current recovery.
    recovery_end: Option<Seq>,
    /// Message ids are unique per user only.
    recent_ids: RecentMap<(UserId, MessageId), Position>,
    /// Own messages without an echo, whose acks stand in the log in place of a copy.
    unechoed: RecentMap<MessageId, ()>,
}

/// The classification of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryCheck {
    /// It is the next entry.
    InOrder,
    /// It was delivered before: under this number, or under another one with the same id.
    Duplicate {
        /// The position at which the same id was delivered; `None` if the entry's own number was
        /// passed.
        earlier: Option<Position>,
    },
    /// Entries before it are missing, which is a bug in the server.
    Gap {
        /// The next expected position; `None` if the room was not joined, so that no entry was
        /// expected.
        expected: Option<Position>,
        /// Whether the entry itself is new.
        deliver: bool,
    },
}

/// The relation of a position to the cursor, which has moved to the position unless it was passed.
enum CursorStep {
    AlreadyPassed,
    Next,
    SkippedTo { expected: Option<Position> },
}

impl LogTracker {
    /// A log to continue after a position that the application stored.
    pub fn starting_at(cursor: Position) -> Self {
        Self { cursor: Some(cursor), ..Self::default() }
    }

    /// The last received entry, which a `join` sends as `since`.
    pub fn cursor(&self) -> Option<&Position> {
        self.cursor.as_ref()
    }

    /// Whether all entries up to `seq` of the last `joined` were received. Then an own id that was
    /// not among them is not in the log.
    pub fn is_recovered(&self) -> bool {
        self.recovery_end.is_none()
    }

    /// Takes the `joined` of a new connection. Classify its history next, then call
    /// [`LogTracker::end_history`].
    pub fn begin_history(&mut self, joined: &JoinedFrame<HistoryEntry>) {
        self.recovery_end = None;
        if joined.recovered {
            // The cursor stays: an entry that does not follow it shows as a gap.
            if let Some(cursor) = &self.cursor
                && cursor.epoch == joined.epoch
                && cursor.seq < joined.seq
            {
                self.recovery_end = Some(joined.seq);
            }
            return;
        }
        let first = joined.history.iter().find_map(|entry| match entry {
            HistoryEntry::Message(message) => Some(message.seq),
            HistoryEntry::Direct(_) | HistoryEntry::Unknown => None,
        });
        let before = first.map_or(joined.seq, |first| first.saturating_sub(1));
        self.cursor = joined.durable.then(|| Position::new(joined.epoch.clone(), before));
    }

    /// Completes [`LogTracker::begin_history`]. A history that ends before `joined.seq` has a gap
    /// at its end, except in a recovery, whose further entries follow. Returns the first missing
    /// position.
    pub fn end_history(&mut self, joined: &JoinedFrame<HistoryEntry>) -> Option<Position> {
        let cursor = self.cursor.as_mut().filter(|cursor| cursor.epoch == joined.epoch)?;
        if joined.recovered || cursor.seq >= joined.seq {
            return None;
        }
        let missing = Position::new(cursor.epoch.clone(), cursor.seq + 1);
        cursor.seq = joined.seq;
        Some(missing)
    }

    /// Continues at the position of a `reset`, which ends a recovery. Recent ids are kept, because
    /// entries can arrive again under new numbers.
    pub fn reset(&mut self, position: Position) {
        self.cursor = Some(position);
        self.recovery_end = None;
    }

    /// Classifies an entry and moves the cursor to it.
    pub fn classify(&mut self, position: &Position, from: &UserId, id: MessageId) -> EntryCheck {
        let step = self.advance(position);
        if matches!(step, CursorStep::AlreadyPassed) {
            return EntryCheck::Duplicate { earlier: None };
        }
        let earlier = self.recent_ids.insert((from.clone(), id), position.clone());
        match step {
            CursorStep::SkippedTo { expected } => {
                EntryCheck::Gap { expected, deliver: earlier.is_none() }
            }
            CursorStep::Next | CursorStep::AlreadyPassed if earlier.is_some() => {
                EntryCheck::Duplicate { earlier }
            }
            CursorStep::Next | CursorStep::AlreadyPassed => EntryCheck::InOrder,
        }
    }

    /// Notes that `id` is sent without an echo, so that its ack takes the place of the copy.
    pub fn expect_no_echo(&mut self, id: MessageId) {
        self.unechoed.insert(id, ());
    }

    /// Takes an ack. Only an ack in place of a copy moves the cursor. Returns the expected position
    /// if it skipped entries.
    pub fn acknowledged(
        &mut self,
        position: &Position,
        from: Option<&UserId>,
        id: MessageId,
        duplicate: bool,
    ) -> Option<Option<Position>> {
        if duplicate || !self.unechoed.contains(&id) {
            return None;
        }
        let step = self.advance(position);
        if let (Some(from), CursorStep::Next | CursorStep::SkippedTo { .. }) = (from, &step) {
            self.recent_ids.insert((from.clone(), id), position.clone());
        }
        match step {
            CursorStep::SkippedTo { expected } => Some(expected),
            // A slow consumer can have received the entry from the log before.
            CursorStep::Next | CursorStep::AlreadyPassed => None,
        }
    }

    fn advance(&mut self, position: &Position) -> CursorStep {
        let Some(cursor) = &mut self.cursor else {
            self.cursor = Some(position.clone());
            return CursorStep::SkippedTo { expected: None };
        };
        if cursor.epoch == position.epoch && position.seq <= cursor.seq {
            return CursorStep::AlreadyPassed;
        }
        let expected = Position::new(cursor.epoch.clone(), cursor.seq + 1);
        let is_next = expected == *position;
        *cursor = position.clone();
        if self.recovery_end.is_some_and(|end| end <= position.seq) {
            self.recovery_end = None;
        }
        if is_next { CursorStep::Next } else { CursorStep::SkippedTo { expected: Some(expected) } }
    }
}

/// A map that keeps the last [`RECENT_IDS_MAX`] keys.
#[derive(Debug)]
struct RecentMap<K, V> {
    values: HashMap<K, V>,
    order: VecDeque<K>,
}

impl<K, V> Default for RecentMap<K, V> {
    fn default() -> Self {
        Self { values: HashMap::new(), order: VecDeque::new() }
    }
}

impl<K: Clone + Eq + Hash, V: Clone> RecentMap<K, V> {
    /// Inserts `key` if it is absent, else returns its value.
    fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self.values.entry(key) {
            hash_map::Entry::Occupied(entry) => return Some(entry.get().clone()),
            hash_map::Entry::Vacant(entry) => {
                self.order.push_back(entry.key().clone());
                entry.insert(value);
            }
        }
        if self.order.len() > RECENT_IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.values.remove(&oldest);
        }
        None
    }

    fn contains(&self, key: &K) -> bool {
        self.values.contains_key(key)
    }
}

/// The unacknowledged messages to one room, in sending order, each with a value of type `T`.
#[derive(Debug)]
pub struct PendingSends<T> {
    queue: VecDeque<QueuedSend<T>>,
    in_flight_max: usize,
}

#[derive(Debug)]
struct QueuedSend<T> {
    id: MessageId,
    value: T,
    /// When it was first written to a connection; the server's deduplication window begins at about
    /// this time.
    first_sent: Option<Instant>,
    state: SendState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    Queued,
    InFlight,
    /// Rejected with a temporary error.
    RetryAt(Instant),
}

/// The next step for a message.
#[derive(Debug, PartialEq, Eq)]
pub enum NextSend<'a, T> {
    /// Send it, for the first time or again.
    Send(MessageId, &'a mut T),
    /// Give it up: it was sent, has no acknowledgement, and the deduplication window has passed. It
    /// may be in the log.
    Uncertain(MessageId, T),
}

impl<T> PendingSends<T> {
    /// Sends at most `in_flight_max` messages at a time.
    ///
    /// With 1 the log has the messages in sending order. With more, messages in flight overtake one
    /// that is rejected with a temporary error.
    pub fn new(in_flight_max: usize) -> Self {
        Self { queue: VecDeque::new(), in_flight_max: in_flight_max.max(1) }
    }

    /// Whether all messages are acknowledged.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The number of unacknowledged messages.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether `id` is unacknowledged.
    pub fn contains(&self, id: MessageId) -> bool {
        self.queue.iter().any(|send| send.id == id)
    }

    /// Appends a message to the queue.
    pub fn push(&mut self, id: MessageId, what: T) {
        self.queue.push_back(QueuedSend {
            id,
            value: what,
            first_sent: None,
            state: SendState::Queued,
        });
    }

    /// Removes a message whose result is known.
    pub fn remove(&mut self, id: MessageId) -> Option<T> {
        let at = self.queue.iter().position(|send| send.id == id)?;
        self.queue.remove(at).map(|send| send.value)
    }

    /// Schedules `id` to be sent again at `at`. Later messages that are not in flight wait for it.
    pub fn retry_at(&mut self, id: MessageId, at: Instant) {
        if let Some(send) = self.queue.iter_mut().find(|send| send.id == id) {
            send.state = SendState::RetryAt(at);
        }
    }

    /// Marks the connection as lost: no message is in flight.
    pub fn on_disconnected(&mut self) {
        for send in &mut self.queue {
            send.state = SendState::Queued;
        }
    }

    /// The next message to send or to give up. A message to send counts as in flight from now on.
    pub fn next(&mut self, now: Instant, dedup_window: Duration) -> Option<NextSend<'_, T>> {
        let at = self.next_sendable(now)?;
        let too_old = |sent: Instant| now.duration_since(sent) >= dedup_window;
        if self.queue[at].first_sent.is_some_and(too_old) {
            return self.queue.remove(at).map(|send| NextSend::Uncertain(send.id, send.value));
        }
        let send = &mut self.queue[at];
        send.state = SendState::InFlight;
        send.first_sent.get_or_insert(now);
        Some(NextSend::Send(send.id, &mut send.value))
    }

    /// When a message becomes sendable without any other event.
    pub fn next_retry(&self) -> Option<Instant> {
        self.queue.iter().find_map(|send| match send.state {
            SendState::RetryAt(at) => Some(at),
            SendState::Queued | SendState::InFlight => None,
        })
    }

    /// The messages in flight.
    pub fn in_flight(&self) -> impl Iterator<Item = (MessageId, &T)> {
        let in_flight = |send: &&QueuedSend<T>| send.state == SendState::InFlight;
        self.queue.iter().filter(in_flight).map(|send| (send.id, &send.value))
    }

    /// Removes all messages in order, each with whether it was ever sent.
    pub fn drain(&mut self) -> impl Iterator<Item = (T, bool)> {
        self.queue.drain(..).map(|send| (send.value, send.first_sent.is_some()))
    }

    /// Removes the messages that were never sent, in order.
    pub fn drain_unsent(&mut self) -> Vec<T> {
        let (sent, unsent): (VecDeque<_>, VecDeque<_>) =
            self.queue.drain(..).partition(|send| send.first_sent.is_some());
        self.queue = sent;
        unsent.into_iter().map(|send| send.value).collect()
    }

    fn next_sendable(&self, now: Instant) -> Option<usize> {
        let mut in_flight = 0;
        for (at, send) in self.queue.iter().enumerate() {
            if in_flight == self.in_flight_max {
                return None;
            }
            match send.state {
                SendState::InFlight => in_flight += 1,
                SendState::RetryAt(until) if until > now => return None,
                SendState::Queued | SendState::RetryAt(_) => return Some(at),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
