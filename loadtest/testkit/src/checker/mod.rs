//! The delivery checker: judges every frame of every client as it arrives, and counts.
//!
//! Pure. It reads raw frames, because a client library drops duplicates. Violations are:
//! - within an epoch a client's numbers do not ascend by one: a duplicate, a wrong order, or a gap;
//! - the epoch changes without `reset` or `recovered:false`: an unsignalled discontinuity;
//! - a client receives an id twice, except after a discontinuity and in another epoch;
//! - clients or acks disagree on the id at a position, or an id has two numbers in an epoch;
//! - an acknowledged id does not reach a client, unless a discontinuity that was signalled to that
//!   client skipped its position. Positions decide that, not clocks.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use skein_protocol::{
    ids::MessageId,
    position::{Epoch, Position, Seq},
    protocol::server_frame::{
        AckFrame, HistoryEntry, JoinedFrame, MessageFrame, RecoveryFailure, ResetFrame,
    },
};
use tokio::time::Instant;

use self::report::{DeliveryReport, Violation};
use crate::timeline::Timeline;

pub mod client;
pub mod clients;
pub mod report;

/// A signalled loss of continuity.
#[derive(Debug)]
struct Discontinuity {
    from: Position,
    to: Position,
}

/// Observations of one client.
#[derive(Debug, Default)]
struct CheckedClient {
    cursor: Option<Position>,
    seen: HashMap<MessageId, (Position, usize)>,
    positions: HashSet<(Epoch, Seq)>,
    epochs: HashSet<Epoch>,
    discontinuities: Vec<Discontinuity>,
    resets: usize,
    not_recovered: usize,
    connections: usize,
    /// When its last connection ended.
    away_since: Option<Instant>,
    /// When it reconnected, and for how long it had been away.
    reconnects: Vec<(Instant, Duration)>,
    last_arrival: Option<Instant>,
    longest_silence: Duration,
    /// Its own message that was acknowledged last.
    own: Option<(MessageId, Position)>,
}

/// Judges the frames of all clients of a room.
#[derive(Debug, Default)]
pub struct DeliveryChecker {
    clients: Vec<CheckedClient>,
    ids: HashMap<Position, MessageId>,
    numbers: HashMap<(MessageId, Epoch), Seq>,
    acked: HashMap<MessageId, Position>,
    due: HashMap<MessageId, Instant>,
    timeline: Arc<Mutex<Timeline>>,
    violations: BTreeMap<Violation, usize>,
    examples: Vec<String>,
    reasons: BTreeMap<&'static str, usize>,
    delivered: usize,
    redelivered: usize,
    rejected_sends: usize,
    slowest_ack: Duration,
    slowest_rejection: Duration,
}

impl DeliveryChecker {
    /// A checker of so many clients.
    pub fn new(clients: usize) -> Self {
        Self::with_timeline(Arc::default(), clients)
    }

    /// As [`DeliveryChecker::new`], with a timeline that other checkers share.
    pub fn with_timeline(timeline: Arc<Mutex<Timeline>>, clients: usize) -> Self {
        let clients = (0..clients).map(|_| CheckedClient::default()).collect();
        Self { clients, timeline, ..Self::default() }
    }

    /// Position of a client.
    pub fn cursor(&self, client: usize) -> Option<&Position> {
        self.clients[client].cursor.as_ref()
    }

    /// Position at which a client received an id.
    pub fn position_of(&self, client: usize, id: MessageId) -> Option<&Position> {
        self.clients[client].seen.get(&id).map(|(position, _)| position)
    }

    /// The message of a client that was acknowledged last.
    pub fn last_acked(&self, client: usize) -> Option<MessageId> {
        self.clients[client].own.as_ref().map(|(id, _)| *id)
    }

    /// Number of acknowledged messages.
    pub fn acked(&self) -> usize {
        self.acked.len()
    }

    /// Number of ids that a client has received.
    pub fn received_count(&self, client: usize) -> usize {
        self.clients[client].seen.len()
    }

    /// Number of discontinuities that a client has seen.
    pub fn discontinuities(&self, client: usize) -> usize {
        self.clients[client].discontinuities.len()
    }

    /// The first violations, in words.
    pub fn examples(&self) -> &[String] {
        &self.examples
    }

    /// Counts a violation.
    pub fn report_violation(
        &mut self,
        client: usize,
        violation: Violation,
        what: impl fmt::Display,
    ) {
        *self.violations.entry(violation).or_default() += 1;
        if self.examples.len() < 20 {
            self.examples.push(format!("{violation:?}: client {client}: {what}"));
        }
    }

    /// Records a new connection of a client.
    pub fn on_connected(&mut self, client: usize) {
        let (client, now) = (&mut self.clients[client], Instant::now());
        client.connections += 1;
        if let Some(since) = client.away_since.take() {
            client.reconnects.push((now, now - since));
        }
        self.timeline.lock().connected(now);
    }

    /// Records the end of a connection.
    pub fn on_disconnected(&mut self, client: usize) {
        let now = Instant::now();
        self.clients[client].away_since = Some(now);
        self.timeline.lock().ended(now);
    }

    /// When clients reconnected, and for how long each had been away.
    pub fn reconnects(&self) -> impl Iterator<Item = (Instant, Duration)> {
        self.clients.iter().flat_map(|client| client.reconnects.iter().copied())
    }

    /// Records that a client disconnects on purpose, so that the time without deliveries is no
    /// silence.
    pub fn on_left(&mut self, client: usize) {
        self.clients[client].last_arrival = None;
    }

    /// Records a `joined`.
    pub fn on_joined(&mut self, client: usize, joined: &JoinedFrame<HistoryEntry>, now: Instant) {
        let top = Position::new(joined.epoch.clone(), joined.seq);
        let first = joined.history.iter().find_map(|entry| match entry {
            HistoryEntry::Message(message) => {
                Some(Position::new(message.epoch.clone(), message.seq.saturating_sub(1)))
            }
            HistoryEntry::Direct(_) | HistoryEntry::Unknown => None,
        });
        match (self.clients[client].cursor.clone(), joined.recovered) {
            (None, _) => self.move_cursor(client, first.unwrap_or(top.clone())),
            (Some(since), false) => {
                self.clients[client].not_recovered += 1;
                match joined.reason {
                    Some(reason) => self.count_reason(reason),
                    None => self.report_violation(
                        client,
                        Violation::Protocol,
                        "`recovered:false` without a reason",
                    ),
                }
                let to = first.unwrap_or(top.clone());
                self.record_discontinuity(client, since, to);
            }
            (Some(since), true) => {
                // The rest of an earlier epoch may come first; the reset that ends it is checked
                // then.
                if since.epoch == top.epoch && top.seq < since.seq {
                    self.report_violation(
                        client,
                        Violation::UnsignalledDiscontinuity,
                        format!("cursor {since} is above the top {top}"),
                    );
                }
            }
        }
        for entry in &joined.history {
            match entry {
                HistoryEntry::Message(message) => {
                    if !joined.recovered {
                        self.continue_in_epoch(
                            client,
                            &message.epoch,
                            message.seq.saturating_sub(1),
                        );
                    }
                    self.on_message(client, message, now);
                }
                HistoryEntry::Direct(_) | HistoryEntry::Unknown => {
                    self.report_violation(
                        client,
                        Violation::Protocol,
                        "unknown entry in the history",
                    );
                }
            }
        }
        if !joined.recovered {
            self.continue_in_epoch(client, &top.epoch, top.seq);
        }
        if !joined.recovered && self.clients[client].cursor.as_ref() != Some(&top) {
            let cursor = self.clients[client].cursor.clone();
            self.report_violation(
                client,
                Violation::Gap,
                format!("history ends at {cursor:?}, not at {top}"),
            );
            self.move_cursor(client, top);
        }
    }

    /// A first history, which is no continuation, may begin in an epoch that a later epoch
    /// continues with the same numbers.
    fn continue_in_epoch(&mut self, client: usize, epoch: &Epoch, before: Seq) {
        let cursor = &self.clients[client].cursor;
        if cursor.as_ref().is_some_and(|at| at.epoch != *epoch && at.seq == before) {
            self.move_cursor(client, Position::new(epoch.clone(), before));
        }
    }

    /// Records an entry.
    pub fn on_message(&mut self, client: usize, message: &MessageFrame, now: Instant) {
        let position = Position::new(message.epoch.clone(), message.seq);
        self.delivered += 1;
        let due = self.due.get(&message.id);
        self.timeline.lock().delivered(now, due.map(|due| now.saturating_duration_since(*due)));
        let seen = &mut self.clients[client];
        if let Some(last) = seen.last_arrival.replace(now) {
            seen.longest_silence = seen.longest_silence.max(now.duration_since(last));
        }
        let new = seen.positions.insert((position.epoch.clone(), position.seq));
        match seen.cursor.clone() {
            None => self.report_violation(
                client,
                Violation::Protocol,
                format!("{position} before `joined`"),
            ),
            Some(cursor) if cursor.epoch != position.epoch => {
                let what = format!("{position} after {cursor}");
                self.report_violation(client, Violation::UnsignalledDiscontinuity, what);
            }
            Some(cursor) if position.seq <= cursor.seq => {
                let violation = if new { Violation::OutOfOrder } else { Violation::Duplicated };
                self.report_violation(client, violation, format!("{position} after {cursor}"));
            }
            Some(cursor) if position.seq > cursor.seq + 1 => {
                self.report_violation(client, Violation::Gap, format!("{position} after {cursor}"));
            }
            Some(_) => {}
        }
        self.move_cursor(client, position.clone());
        let count = self.clients[client].discontinuities.len();
        let earlier = self.clients[client].seen.insert(message.id, (position.clone(), count));
        if let Some((place, count_then)) = earlier
            && place != position
        {
            if count_then < count && place.epoch != position.epoch {
                self.redelivered += 1;
            } else {
                let what = format!("{:?} at {place} and {position}", message.id);
                self.report_violation(client, Violation::Duplicated, what);
            }
        }
        self.check_agreement(client, position, message.id);
    }

    /// Records a `reset`.
    pub fn on_reset(&mut self, client: usize, reset: &ResetFrame) {
        self.clients[client].resets += 1;
        self.count_reason(reset.reason);
        let to = Position::new(reset.epoch.clone(), reset.seq);
        match self.clients[client].cursor.clone() {
            Some(from) => self.record_discontinuity(client, from, to),
            None => self.report_violation(client, Violation::Protocol, "`reset` before `joined`"),
        }
    }

    /// Records the first send of a message that was due at `due`.
    pub fn on_send(&mut self, id: MessageId, due: Instant) {
        self.due.insert(id, due);
    }

    /// Records the ack of an own message, `after` its send.
    pub fn on_ack(&mut self, client: usize, ack: &AckFrame, after: Duration) {
        self.slowest_ack = self.slowest_ack.max(after);
        self.on_acked(client, ack.id, Position::new(ack.epoch.clone(), ack.seq));
    }

    /// Records that an own message is in the log: it was acknowledged, or received during recovery.
    pub fn on_acked(&mut self, client: usize, id: MessageId, position: Position) {
        if let Some((_, own)) = self.clients[client].own.replace((id, position.clone()))
            && own.epoch == position.epoch
            && own.seq >= position.seq
        {
            self.report_violation(
                client,
                Violation::OutOfOrder,
                format!("{position} sent after {own}"),
            );
        }
        self.check_agreement(client, position.clone(), id);
        if self.acked.insert(id, position).is_none() {
            self.timeline.lock().acknowledged(Instant::now());
        }
    }

    /// Records a temporary rejection of a send.
    pub fn on_rejected(&mut self, client: usize, retry_after_ms: Option<u64>, after: Duration) {
        self.rejected_sends += 1;
        self.timeline.lock().rejected(Instant::now());
        self.slowest_rejection = self.slowest_rejection.max(after);
        if retry_after_ms.is_none() {
            self.report_violation(
                client,
                Violation::Protocol,
                "rejection without `retry_after_ms`",
            );
        }
    }

    fn check_agreement(&mut self, client: usize, position: Position, id: MessageId) {
        let other = *self.ids.entry(position.clone()).or_insert(id);
        if other != id {
            let what = format!("{other:?} and {id:?} at {position}");
            self.report_violation(client, Violation::Disagreement, what);
        }
        let number = *self.numbers.entry((id, position.epoch.clone())).or_insert(position.seq);
        if number != position.seq {
            let what = format!("{id:?} is {number} and {position}");
            self.report_violation(client, Violation::Disagreement, what);
        }
    }

    fn move_cursor(&mut self, client: usize, to: Position) {
        let client = &mut self.clients[client];
        client.epochs.insert(to.epoch.clone());
        client.cursor = Some(to);
    }

    fn record_discontinuity(&mut self, client: usize, from: Position, to: Position) {
        self.clients[client].discontinuities.push(Discontinuity { from, to: to.clone() });
        self.move_cursor(client, to);
    }

    fn count_reason(&mut self, reason: RecoveryFailure) {
        let name = match reason {
            RecoveryFailure::LogTrimmed => "log_trimmed",
            RecoveryFailure::LogLost => "log_lost",
            RecoveryFailure::Ahead => "ahead",
        };
        *self.reasons.entry(name).or_default() += 1;
    }

    /// The counts, after every client has received everything.
    pub fn report(&mut self) -> DeliveryReport {
        let mut skipped = 0;
        for client in 0..self.clients.len() {
            let missed: Vec<(MessageId, Position)> = self
                .acked
                .iter()
                .filter(|(id, _)| !self.clients[client].seen.contains_key(id))
                .map(|(id, position)| (*id, position.clone()))
                .collect();
            for (id, position) in missed {
                if self.clients[client].was_skipped(&position) {
                    skipped += 1;
                } else {
                    self.report_violation(
                        client,
                        Violation::Lost,
                        format!("{id:?}, acknowledged at {position}"),
                    );
                }
            }
        }
        let clients = &self.clients;
        DeliveryReport {
            clients: clients.len(),
            acknowledged: self.acked.len(),
            delivered: self.delivered,
            violations: self.violations.clone(),
            examples: self.examples.clone(),
            skipped,
            redelivered: self.redelivered,
            resets: clients.iter().map(|client| client.resets).sum(),
            not_recovered: clients.iter().map(|client| client.not_recovered).sum(),
            reasons: self.reasons.clone(),
            rejected_sends: self.rejected_sends,
            slowest_ack: self.slowest_ack,
            slowest_rejection: self.slowest_rejection,
            silences: clients.iter().map(|client| client.longest_silence).collect(),
            connections: clients.iter().map(|client| client.connections).collect(),
            epochs: clients.iter().map(|client| client.epochs.len()).collect(),
        }
    }
}

impl CheckedClient {
    /// Whether a discontinuity skipped a position.
    fn was_skipped(&self, position: &Position) -> bool {
        !self.epochs.contains(&position.epoch) && !self.discontinuities.is_empty()
            || self.discontinuities.iter().any(|skipped| {
                let above_from =
                    position.epoch == skipped.from.epoch && position.seq > skipped.from.seq;
                let below_to = position.epoch == skipped.to.epoch && position.seq <= skipped.to.seq;
                if skipped.from.epoch == skipped.to.epoch {
                    above_from && below_to
                } else {
                    above_from || below_to
                }
            })
    }
}
