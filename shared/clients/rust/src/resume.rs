//! Where a client is in a room's log, and which of its own messages have no answer yet.
//!
//! [`LogTracker`] judges every entry: the next one is delivered, one that was there before is dropped, and
//! a number that was skipped is a hole, which the protocol promises never to happen. [`PendingSends`] keeps
//! what was not acknowledged in sending order, across refusals and reconnects, and tells when it may
//! be sent again.
//!
//! Pure: no I/O, `now` is an argument. `client::state` keeps one of each per room and obeys.
//!
//! Invariant: within an epoch the cursor never goes down, except where the server said that it
//! could not continue (`joined` with `recovered:false`, `reset`).

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

/// How many ids of a room are remembered, to know an entry that comes again under a new number.
pub const RECENT_IDS_MAX: usize = 1024;

/// Where a client is in one room's log.
#[derive(Debug, Default)]
pub struct LogTracker {
    /// The last entry had. `None` before the first `joined`, and in rooms that keep no log.
    cursor: Option<Position>,
    /// The end of the recovery under way.
    recovery_end: Option<Seq>,
    /// Ids are the user's own: two users may have the same.
    recent_ids: RecentMap<(UserId, MessageId), Position>,
    /// Own messages without an echo, whose acks stand in the stream.
    unechoed: RecentMap<MessageId, ()>,
}

/// What to do with an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryCheck {
    /// It is the next one.
    InOrder,
    /// It was delivered before: under this number, or `earlier` under another one with the same id.
    Duplicate {
        /// Where the same id was delivered; `None` where it is the number that was had already.
        earlier: Option<Position>,
    },
    /// Entries before it never came: a fault of the server's.
    Gap {
        /// What should have come; `None` where nothing should have, the room not being joined.
        expected: Option<Position>,
        /// Whether the entry itself is new.
        deliver: bool,
    },
}

/// How a number lies to the cursor, which it then has become unless it was passed.
enum CursorStep {
    AlreadyPassed,
    Next,
    SkippedTo { expected: Option<Position> },
}

impl LogTracker {
    /// A log to be continued from a position that the application kept.
    pub fn starting_at(cursor: Position) -> Self {
        Self { cursor: Some(cursor), ..Self::default() }
    }

    /// The last entry had: what a `join` says as `since`.
    pub fn cursor(&self) -> Option<&Position> {
        self.cursor.as_ref()
    }

    /// Whether everything up to the `seq` of the last `joined` was had, so that an own id not seen
    /// is not in the log.
    pub fn is_recovered(&self) -> bool {
        self.recovery_end.is_none()
    }

    /// Takes the `joined` of a new connection. Its history is to be judged next, then
    /// [`LogTracker::end_history`] to be called.
    pub fn begin_history(&mut self, joined: &JoinedFrame<HistoryEntry>) {
        self.recovery_end = None;
        if joined.recovered {
            // The cursor stays, whatever it is: what does not join it shows as a hole.
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

    /// Ends what [`LogTracker::begin_history`] began. A history that stops short of `joined.seq` without
    /// being a recovery, whose rest would follow, has a hole at its end: what is missing first is
    /// returned.
    pub fn end_history(&mut self, joined: &JoinedFrame<HistoryEntry>) -> Option<Position> {
        let cursor = self.cursor.as_mut().filter(|cursor| cursor.epoch == joined.epoch)?;
        if joined.recovered || cursor.seq >= joined.seq {
            return None;
        }
        let missing = Position::new(cursor.epoch.clone(), cursor.seq + 1);
        cursor.seq = joined.seq;
        Some(missing)
    }

    /// Goes on where a `reset` says, which ends a recovery. Known ids stay known: entries may come
    /// again under new numbers.
    pub fn reset(&mut self, position: Position) {
        self.cursor = Some(position);
        self.recovery_end = None;
    }

    /// Judges an entry and moves past it.
    pub fn classify(&mut self, position: &Position, from: &UserId, id: MessageId) -> EntryCheck {
        let place = self.advance(position);
        if matches!(place, CursorStep::AlreadyPassed) {
            return EntryCheck::Duplicate { earlier: None };
        }
        let earlier = self.recent_ids.insert((from.clone(), id), position.clone());
        match place {
            CursorStep::SkippedTo { expected } => {
                EntryCheck::Gap { expected, deliver: earlier.is_none() }
            }
            CursorStep::Next | CursorStep::AlreadyPassed if earlier.is_some() => {
                EntryCheck::Duplicate { earlier }
            }
            CursorStep::Next | CursorStep::AlreadyPassed => EntryCheck::InOrder,
        }
    }

    /// Remembers that `id` is sent without an echo, so that its ack takes the copy's place.
    pub fn expect_no_echo(&mut self, id: MessageId) {
        self.unechoed.insert(id, ());
    }

    /// Takes an ack. Only one that stands in the stream, in place of a copy, moves the cursor;
    /// what it skipped, if anything, is returned.
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
        let place = self.advance(position);
        if let (Some(from), CursorStep::Next | CursorStep::SkippedTo { .. }) = (from, &place) {
            self.recent_ids.insert((from.clone(), id), position.clone());
        }
        match place {
            CursorStep::SkippedTo { expected } => Some(expected),
            // A reader that lagged may have had the entry from the log before.
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
        if self.recovery_end.is_some_and(|goal| goal <= position.seq) {
            self.recovery_end = None;
        }
        if is_next { CursorStep::Next } else { CursorStep::SkippedTo { expected: Some(expected) } }
    }
}

/// A map of the last [`RECENT_IDS_MAX`] keys.
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
    /// Adds `key` unless it is there, and returns what is there.
    fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self.values.entry(key) {
            hash_map::Entry::Occupied(there) => return Some(there.get().clone()),
            hash_map::Entry::Vacant(place) => {
                self.order.push_back(place.key().clone());
                place.insert(value);
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

/// Messages to one room that were not acknowledged, in sending order. `T` is what belongs to one.
#[derive(Debug)]
pub struct PendingSends<T> {
    queue: VecDeque<QueuedSend<T>>,
    in_flight_max: usize,
}

#[derive(Debug)]
struct QueuedSend<T> {
    id: MessageId,
    value: T,
    /// When it was first on the wire: the server's deduplication counts from about there.
    first_sent: Option<Instant>,
    state: SendState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    Queued,
    InFlight,
    /// Refused for the time being.
    RetryAt(Instant),
}

/// What comes next in a room.
#[derive(Debug, PartialEq, Eq)]
pub enum NextSend<'a, T> {
    /// To be sent, for the first time or again.
    Send(MessageId, &'a mut T),
    /// To be given up: it was sent before, has no answer, and is past the time in which the server
    /// knows a repeat for what it is. Whether it is in the log cannot be known.
    Uncertain(MessageId, T),
}

impl<T> PendingSends<T> {
    /// Sends of which at most `in_flight_max` are on their way at a time.
    ///
    /// With 1 the order of sends is the order of the log whatever happens. With more, one that is
    /// refused for the time being is overtaken by those that were on their way behind it.
    pub fn new(in_flight_max: usize) -> Self {
        Self { queue: VecDeque::new(), in_flight_max: in_flight_max.max(1) }
    }

    /// Whether everything has its answer.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many have no answer.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether `id` has no answer yet.
    pub fn contains(&self, id: MessageId) -> bool {
        self.queue.iter().any(|send| send.id == id)
    }

    /// Adds one behind all others.
    pub fn push(&mut self, id: MessageId, what: T) {
        self.queue.push_back(QueuedSend {
            id,
            value: what,
            first_sent: None,
            state: SendState::Queued,
        });
    }

    /// Takes out one that has its answer.
    pub fn remove(&mut self, id: MessageId) -> Option<T> {
        let at = self.queue.iter().position(|send| send.id == id)?;
        self.queue.remove(at).map(|send| send.value)
    }

    /// Sends `id` again at `at`; what stands behind it and is not on its way waits for it.
    pub fn retry_at(&mut self, id: MessageId, at: Instant) {
        if let Some(send) = self.queue.iter_mut().find(|send| send.id == id) {
            send.state = SendState::RetryAt(at);
        }
    }

    /// Takes the connection for gone: nothing is on its way any more.
    pub fn on_disconnected(&mut self) {
        for send in &mut self.queue {
            send.state = SendState::Queued;
        }
    }

    /// The next one to send now. It counts as on its way from here on.
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

    /// When to ask for the next one again, if only time has to pass.
    pub fn next_retry(&self) -> Option<Instant> {
        self.queue.iter().find_map(|send| match send.state {
            SendState::RetryAt(at) => Some(at),
            SendState::Queued | SendState::InFlight => None,
        })
    }

    /// Those on their way.
    pub fn in_flight(&self) -> impl Iterator<Item = (MessageId, &T)> {
        let in_flight = |send: &&QueuedSend<T>| send.state == SendState::InFlight;
        self.queue.iter().filter(in_flight).map(|send| (send.id, &send.value))
    }

    /// Takes out all, in order, and says of each whether it ever was on the wire.
    pub fn drain(&mut self) -> impl Iterator<Item = (T, bool)> {
        self.queue.drain(..).map(|send| (send.value, send.first_sent.is_some()))
    }

    /// Takes out those that never were on the wire, in order.
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
