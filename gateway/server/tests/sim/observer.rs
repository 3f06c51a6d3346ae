//! The messages that one client received in one room. Every frame is checked against the earlier
//! ones.

use std::collections::{BTreeMap, BTreeSet};

use skein_protocol::position::Position;

/// A message, identified by its client and that client's counter.
pub type Id = u128;

pub fn id(client: usize, count: u64) -> Id {
    (client as u128) << 64 | u128::from(count)
}

pub fn client_of(id: Id) -> usize {
    (id >> 64) as usize
}

pub fn name(id: Id) -> String {
    format!("c{}.{}", id >> 64, id as u64)
}

/// A received message.
#[derive(Clone)]
pub struct SeenMessage {
    pub time: f64,
    pub position: Position,
    pub id: Id,
}

/// One client in one room.
#[derive(Default)]
pub struct RoomObserver {
    /// The last position it received.
    pub cursor: Option<Position>,
    pub seen: Vec<SeenMessage>,
    /// When it was notified of a discontinuity.
    pub breaks: Vec<f64>,
    pub joined_at: Option<f64>,
    /// The acknowledged positions of its own messages, and when it received them.
    pub acks: BTreeMap<Id, Vec<(f64, Position)>>,
    /// Messages that it sent more than once, whose order is not checked.
    pub resent: BTreeSet<Id>,
    pub violations: Vec<(&'static str, String)>,
}

impl RoomObserver {
    /// Records a message, or the acknowledgement that stands in for it, which must follow the one
    /// before.
    pub fn next(&mut self, time: f64, position: Position, id: Id) {
        let shown = format!("{} at {position}", name(id));
        match &self.cursor {
            None => self.violations.push(("EARLY", format!("{shown} before the room was joined"))),
            Some(cursor) if cursor.epoch != position.epoch => {
                self.violations
                    .push(("EPOCH", format!("{shown} behind {cursor}, without a reset")));
            }
            Some(cursor) if position.seq <= cursor.seq => {
                self.violations.push(("REORDER", format!("{shown} behind {cursor}")));
            }
            Some(cursor) if position.seq > cursor.seq + 1 => {
                self.violations.push(("HOLE", format!("{shown} behind {cursor}")));
            }
            Some(_) => {}
        }
        self.cursor = Some(position.clone());
        self.seen.push(SeenMessage { time, position, id });
    }

    /// Records a join.
    pub fn join(
        &mut self,
        time: f64,
        since: Option<&Position>,
        recovered: bool,
        at: &Position,
        history: Vec<(Position, Id)>,
    ) {
        self.joined_at.get_or_insert(time);
        if recovered {
            if since.is_none() {
                self.violations.push(("JOINED", "recovered without a position".to_owned()));
                self.cursor = Some(at.clone());
            }
            for (position, id) in history {
                self.next(time, position, id);
            }
            let ahead = self.cursor.as_ref().is_some_and(|c| c.epoch == at.epoch && c.seq > at.seq);
            if ahead {
                self.violations.push(("JOINED", format!("{at} is below what was given")));
            }
            return;
        }
        if since.is_some() {
            self.breaks.push(time);
        }
        // The history ends at the position, without a gap.
        let first = at.seq + 1 - (history.len() as u64).min(at.seq + 1);
        for (seq, (position, id)) in (first..).zip(history) {
            if position.seq != seq {
                self.violations.push(("HOLE", format!("{position} in the history before {at}")));
            }
            self.seen.push(SeenMessage { time, position, id });
        }
        self.cursor = Some(at.clone());
    }

    pub fn reset(&mut self, time: f64, at: Position) {
        self.breaks.push(time);
        self.cursor = Some(at);
    }

    /// Whether there was a discontinuity between two times, or at the later one.
    pub fn broke_between(&self, from: f64, to: f64) -> bool {
        self.breaks.iter().any(|time| from < *time && *time <= to)
    }
}
