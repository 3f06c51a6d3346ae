//! The strict witness: judges every frame of every client as it arrives, and counts.
//!
//! Pure. It looks at raw frames, since a client library drops what comes twice. What it holds against
//! the servers:
//! - within an epoch a reader's numbers ascend by one: else a repeat, a disorder, or a hole;
//! - the epoch changes only by `reset` or `recovered:false`: else a silent break;
//! - a reader gets an id once; again only behind a break and in another epoch;
//! - all readers and all acks agree on the id that stands at a position, and an id has one number in
//!   an epoch;
//! - an acknowledged id reaches every reader, unless a break that was announced to that reader jumped
//!   over its position. That is decided by positions, not by clocks.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use shared::{
    ids::MessageId,
    position::{Epoch, Position, Seq},
    protocol::server_frame::{
        AckFrame, HistoryEntry, JoinedFrame, MessageFrame, RecoveryFailure, ResetFrame,
    },
};
use tokio::time::Instant;

use self::{
    timeline::Timeline,
    verdict::{Verdict, Wrong},
};

pub mod client;
pub mod clients;
pub mod timeline;
pub mod verdict;

/// A place where the server said that continuity was lost.
#[derive(Debug)]
struct Break {
    from: Position,
    to: Position,
}

/// What one client has seen.
#[derive(Debug, Default)]
struct Reader {
    cursor: Option<Position>,
    seen: HashMap<MessageId, (Position, usize)>,
    positions: HashSet<(Epoch, Seq)>,
    epochs: HashSet<Epoch>,
    breaks: Vec<Break>,
    resets: usize,
    not_recovered: usize,
    connections: usize,
    last_arrival: Option<Instant>,
    quiet_longest: Duration,
    /// Its last own message that was acknowledged.
    own: Option<(MessageId, Position)>,
}

/// What all clients have seen.
#[derive(Debug, Default)]
pub struct Ledger {
    readers: Vec<Reader>,
    ids: HashMap<Position, MessageId>,
    numbers: HashMap<(MessageId, Epoch), Seq>,
    acked: HashMap<MessageId, Position>,
    due: HashMap<MessageId, Instant>,
    timeline: Arc<Mutex<Timeline>>,
    wrong: BTreeMap<Wrong, usize>,
    examples: Vec<String>,
    reasons: BTreeMap<&'static str, usize>,
    delivered: usize,
    again: usize,
    unavailable: usize,
    answer_slowest: Duration,
    refusal_slowest: Duration,
}

impl Ledger {
    /// A ledger of so many readers.
    pub fn new(readers: usize) -> Self {
        Self::on(Arc::default(), readers)
    }

    /// The same, which shares its timeline with others.
    pub fn on(timeline: Arc<Mutex<Timeline>>, readers: usize) -> Self {
        let readers = (0..readers).map(|_| Reader::default()).collect();
        Self { readers, timeline, ..Self::default() }
    }

    /// Where a reader is.
    pub fn cursor(&self, reader: usize) -> Option<&Position> {
        self.readers[reader].cursor.as_ref()
    }

    /// Where a reader got an id.
    pub fn seen(&self, reader: usize, id: MessageId) -> Option<&Position> {
        self.readers[reader].seen.get(&id).map(|(position, _)| position)
    }

    /// The last own message of a reader that was acknowledged.
    pub fn newest(&self, reader: usize) -> Option<MessageId> {
        self.readers[reader].own.as_ref().map(|(id, _)| *id)
    }

    /// How many messages were acknowledged.
    pub fn acked(&self) -> usize {
        self.acked.len()
    }

    /// What a reader has had so far.
    pub fn had(&self, reader: usize) -> usize {
        self.readers[reader].seen.len()
    }

    /// How often continuity was lost for a reader.
    pub fn breaks(&self, reader: usize) -> usize {
        self.readers[reader].breaks.len()
    }

    /// The first of what was wrong so far.
    pub fn examples(&self) -> &[String] {
        &self.examples
    }

    /// Notes something wrong.
    pub fn wrong(&mut self, reader: usize, wrong: Wrong, what: impl fmt::Display) {
        *self.wrong.entry(wrong).or_default() += 1;
        if self.examples.len() < 20 {
            self.examples.push(format!("{wrong:?}: reader {reader}: {what}"));
        }
    }

    /// A reader has a new connection.
    pub fn connected(&mut self, reader: usize) {
        self.readers[reader].connections += 1;
        self.timeline.lock().connected(Instant::now());
    }

    /// A reader's connection has ended.
    pub fn disconnected(&mut self) {
        self.timeline.lock().ended(Instant::now());
    }

    /// A reader stays away on purpose: that nothing comes meanwhile is nobody's fault.
    pub fn away(&mut self, reader: usize) {
        self.readers[reader].last_arrival = None;
    }

    /// A reader was told `joined`.
    pub fn joined(&mut self, reader: usize, joined: &JoinedFrame<HistoryEntry>, now: Instant) {
        let top = Position::new(joined.epoch.clone(), joined.seq);
        let first = joined.history.iter().find_map(|entry| match entry {
            HistoryEntry::Message(message) => {
                Some(Position::new(message.epoch.clone(), message.seq.saturating_sub(1)))
            }
            HistoryEntry::Direct(_) | HistoryEntry::Unknown => None,
        });
        match (self.readers[reader].cursor.clone(), joined.recovered) {
            (None, _) => self.jump(reader, first.unwrap_or(top.clone())),
            (Some(since), false) => {
                self.readers[reader].not_recovered += 1;
                match joined.reason {
                    Some(reason) => self.reason(reason),
                    None => self.wrong(reader, Wrong::Protocol, "recovered:false without reason"),
                }
                let to = first.unwrap_or(top.clone());
                self.broken(reader, since, to);
            }
            (Some(since), true) => {
                // The rest of a former epoch may come first; the reset that ends it is checked then.
                if since.epoch == top.epoch && top.seq < since.seq {
                    self.wrong(reader, Wrong::UnannouncedBreak, format!("{since} above {top}"));
                }
            }
        }
        for entry in &joined.history {
            match entry {
                HistoryEntry::Message(message) => {
                    if !joined.recovered {
                        self.go_on_in(reader, &message.epoch, message.seq.saturating_sub(1));
                    }
                    self.message(reader, message, now);
                }
                HistoryEntry::Direct(_) | HistoryEntry::Unknown => {
                    self.wrong(reader, Wrong::Protocol, "an unknown entry");
                }
            }
        }
        if !joined.recovered {
            self.go_on_in(reader, &top.epoch, top.seq);
        }
        if !joined.recovered && self.readers[reader].cursor.as_ref() != Some(&top) {
            let cursor = self.readers[reader].cursor.clone();
            self.wrong(reader, Wrong::Hole, format!("history ends at {cursor:?}, not {top}"));
            self.jump(reader, top);
        }
    }

    /// What is shown first, with the word that it is no continuation, may begin in an epoch that a
    /// later one continues: the numbers go on.
    fn go_on_in(&mut self, reader: usize, epoch: &Epoch, behind: Seq) {
        let cursor = &self.readers[reader].cursor;
        if cursor.as_ref().is_some_and(|at| at.epoch != *epoch && at.seq == behind) {
            self.jump(reader, Position::new(epoch.clone(), behind));
        }
    }

    /// A reader got an entry.
    pub fn message(&mut self, reader: usize, message: &MessageFrame, now: Instant) {
        let position = Position::new(message.epoch.clone(), message.seq);
        self.delivered += 1;
        let due = self.due.get(&message.id);
        self.timeline.lock().delivered(now, due.map(|due| now.saturating_duration_since(*due)));
        let seen = &mut self.readers[reader];
        if let Some(last) = seen.last_arrival.replace(now) {
            seen.quiet_longest = seen.quiet_longest.max(now.duration_since(last));
        }
        let new = seen.positions.insert((position.epoch.clone(), position.seq));
        match seen.cursor.clone() {
            None => self.wrong(reader, Wrong::Protocol, format!("{position} before joined")),
            Some(cursor) if cursor.epoch != position.epoch => {
                let what = format!("{position} behind {cursor}");
                self.wrong(reader, Wrong::UnannouncedBreak, what);
            }
            Some(cursor) if position.seq <= cursor.seq => {
                let wrong = if new { Wrong::OutOfOrder } else { Wrong::Duplicated };
                self.wrong(reader, wrong, format!("{position} behind {cursor}"));
            }
            Some(cursor) if position.seq > cursor.seq + 1 => {
                self.wrong(reader, Wrong::Hole, format!("{position} behind {cursor}"));
            }
            Some(_) => {}
        }
        self.jump(reader, position.clone());
        let breaks = self.readers[reader].breaks.len();
        let earlier = self.readers[reader].seen.insert(message.id, (position.clone(), breaks));
        if let Some((place, breaks_then)) = earlier
            && place != position
        {
            if breaks_then < breaks && place.epoch != position.epoch {
                self.again += 1;
            } else {
                let what = format!("{:?} at {place} and {position}", message.id);
                self.wrong(reader, Wrong::Duplicated, what);
            }
        }
        self.agree(reader, position, message.id);
    }

    /// A reader was told that continuity was lost.
    pub fn reset(&mut self, reader: usize, reset: &ResetFrame) {
        self.readers[reader].resets += 1;
        self.reason(reset.reason);
        let to = Position::new(reset.epoch.clone(), reset.seq);
        match self.readers[reader].cursor.clone() {
            Some(from) => self.broken(reader, from, to),
            None => self.wrong(reader, Wrong::Protocol, "reset before joined"),
        }
    }

    /// A message was sent that was due then.
    pub fn begun(&mut self, id: MessageId, due: Instant) {
        self.due.insert(id, due);
    }

    /// An own message was acknowledged, so long after it was sent.
    pub fn ack(&mut self, reader: usize, ack: &AckFrame, after: Duration) {
        self.answer_slowest = self.answer_slowest.max(after);
        self.taken(reader, ack.id, Position::new(ack.epoch.clone(), ack.seq));
    }

    /// An own message is in the log, by its ack or since it was seen in the recovery.
    pub fn taken(&mut self, reader: usize, id: MessageId, position: Position) {
        if let Some((_, own)) = self.readers[reader].own.replace((id, position.clone()))
            && own.epoch == position.epoch
            && own.seq >= position.seq
        {
            self.wrong(reader, Wrong::OutOfOrder, format!("{position} sent after {own}"));
        }
        self.agree(reader, position.clone(), id);
        if self.acked.insert(id, position).is_none() {
            self.timeline.lock().acknowledged(Instant::now());
        }
    }

    /// A send was refused for the time being.
    pub fn refused(&mut self, reader: usize, retry_after_ms: Option<u64>, after: Duration) {
        self.unavailable += 1;
        self.timeline.lock().refused(Instant::now());
        self.refusal_slowest = self.refusal_slowest.max(after);
        if retry_after_ms.is_none() {
            self.wrong(reader, Wrong::Protocol, "a refusal without retry_after_ms");
        }
    }

    fn agree(&mut self, reader: usize, position: Position, id: MessageId) {
        let other = *self.ids.entry(position.clone()).or_insert(id);
        if other != id {
            let what = format!("{other:?} and {id:?} at {position}");
            self.wrong(reader, Wrong::Disagreement, what);
        }
        let number = *self.numbers.entry((id, position.epoch.clone())).or_insert(position.seq);
        if number != position.seq {
            let what = format!("{id:?} is {number} and {position}");
            self.wrong(reader, Wrong::Disagreement, what);
        }
    }

    fn jump(&mut self, reader: usize, to: Position) {
        let reader = &mut self.readers[reader];
        reader.epochs.insert(to.epoch.clone());
        reader.cursor = Some(to);
    }

    fn broken(&mut self, reader: usize, from: Position, to: Position) {
        self.readers[reader].breaks.push(Break { from, to: to.clone() });
        self.jump(reader, to);
    }

    fn reason(&mut self, reason: RecoveryFailure) {
        let name = match reason {
            RecoveryFailure::LogTrimmed => "log_trimmed",
            RecoveryFailure::LogLost => "log_lost",
            RecoveryFailure::Ahead => "ahead",
        };
        *self.reasons.entry(name).or_default() += 1;
    }

    /// The counts, when everybody has everything that will come.
    pub fn verdict(&mut self) -> Verdict {
        let mut skipped = 0;
        for reader in 0..self.readers.len() {
            let missed: Vec<(MessageId, Position)> = self
                .acked
                .iter()
                .filter(|(id, _)| !self.readers[reader].seen.contains_key(id))
                .map(|(id, position)| (*id, position.clone()))
                .collect();
            for (id, position) in missed {
                if self.readers[reader].was_told_of(&position) {
                    skipped += 1;
                } else {
                    self.wrong(reader, Wrong::Lost, format!("{id:?}, acknowledged at {position}"));
                }
            }
        }
        let readers = &self.readers;
        Verdict {
            clients: readers.len(),
            acknowledged: self.acked.len(),
            delivered: self.delivered,
            wrong: self.wrong.clone(),
            examples: self.examples.clone(),
            skipped,
            again: self.again,
            resets: readers.iter().map(|reader| reader.resets).sum(),
            not_recovered: readers.iter().map(|reader| reader.not_recovered).sum(),
            reasons: self.reasons.clone(),
            unavailable: self.unavailable,
            answer_slowest: self.answer_slowest,
            refusal_slowest: self.refusal_slowest,
            quiet: readers.iter().map(|reader| reader.quiet_longest).collect(),
            connections: readers.iter().map(|reader| reader.connections).collect(),
            epochs: readers.iter().map(|reader| reader.epochs.len()).collect(),
        }
    }
}

impl Reader {
    /// Whether a break jumped over a position.
    fn was_told_of(&self, position: &Position) -> bool {
        !self.epochs.contains(&position.epoch) && !self.breaks.is_empty()
            || self.breaks.iter().any(|gone| {
                let above_from = position.epoch == gone.from.epoch && position.seq > gone.from.seq;
                let below_to = position.epoch == gone.to.epoch && position.seq <= gone.to.seq;
                if gone.from.epoch == gone.to.epoch {
                    above_from && below_to
                } else {
                    above_from || below_to
                }
            })
    }
}
