//! Where a client is in its user's inbox, and how far that is acknowledged.
//!
//! Everything is acknowledged on receipt but what waits for a person, and what follows it.
//!
//! Pure. `client::state` is the user.

use super::resume::{Log, Verdict};
use crate::{
    ids::{MessageId, UserId},
    position::{Position, Seq},
    protocol::server_frame,
};

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    log: Log,
    /// The first entry that waits for a person.
    waits: Option<Seq>,
    /// What was acknowledged last on this connection.
    acknowledged: Option<Position>,
}

impl Inbox {
    /// The last entry had: what a connection says as `inbox`.
    pub(super) fn cursor(&self) -> Option<&Position> {
        self.log.cursor()
    }

    /// Takes what `connected` says. What follows comes by itself.
    pub(super) fn connected(&mut self, inbox: &server_frame::InboxState) {
        self.acknowledged = Some(Position::new(inbox.epoch.clone(), inbox.acked));
        if self.log.cursor().is_none() {
            let seq = inbox.acked.max(inbox.oldest.saturating_sub(1)).min(inbox.seq);
            self.log = Log::starting_at(Position::new(inbox.epoch.clone(), seq));
        }
    }

    /// Goes on where a `reset` says.
    pub(super) fn reset(&mut self, to: Position) {
        self.waits = None;
        self.log.reset(to);
    }

    /// Whether an entry is new.
    pub(super) fn judge(&mut self, position: &Position, from: &UserId, id: MessageId) -> bool {
        match self.log.judge(position, from, id) {
            Verdict::Deliver => true,
            Verdict::Hole { deliver, .. } => deliver,
            Verdict::Duplicate { .. } => false,
        }
    }

    /// An entry waits for a person.
    pub(super) fn wait_for(&mut self, position: &Position) {
        self.waits.get_or_insert(position.seq);
    }

    /// A person has seen everything up to `seq`.
    pub(super) fn seen(&mut self, seq: Seq) {
        if self.waits.is_some_and(|waits| waits <= seq) {
            self.waits = None;
        }
    }

    /// Up to where is to be acknowledged now.
    pub(super) fn next_ack(&mut self) -> Option<Position> {
        let cursor = self.log.cursor()?;
        let seq = self.waits.map_or(cursor.seq, |waits| cursor.seq.min(waits - 1));
        let is_news =
            self.acknowledged.as_ref().is_none_or(|at| at.epoch != cursor.epoch || at.seq < seq);
        let at = Position::new(cursor.epoch.clone(), seq);
        (is_news && seq > 0).then(|| self.acknowledged.insert(at).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seq: Seq) -> Position {
        Position::new("e".parse().unwrap(), seq)
    }

    fn connected(acked: Seq, seq: Seq) -> server_frame::InboxState {
        server_frame::InboxState { epoch: "e".parse().unwrap(), seq, acked, oldest: 1, unread: 0 }
    }

    fn take(inbox: &mut Inbox, seq: Seq) -> bool {
        inbox.judge(&at(seq), &"ann".parse().unwrap(), MessageId::random())
    }

    #[test]
    fn what_comes_is_acknowledged_once() {
        let mut inbox = Inbox::default();
        inbox.connected(&connected(2, 4));
        assert_eq!(inbox.cursor(), Some(&at(2)));
        assert_eq!(inbox.next_ack(), None);
        assert!(take(&mut inbox, 3) && !take(&mut inbox, 3) && take(&mut inbox, 4));
        assert_eq!((inbox.next_ack(), inbox.next_ack()), (Some(at(4)), None));
    }

    #[test]
    fn never_past_what_waits_for_a_person() {
        let mut inbox = Inbox::default();
        inbox.connected(&connected(0, 0));
        assert!(take(&mut inbox, 1) && take(&mut inbox, 2));
        inbox.wait_for(&at(2));
        assert!(take(&mut inbox, 3));
        assert_eq!(inbox.next_ack(), Some(at(1)));
        inbox.seen(1);
        assert_eq!(inbox.next_ack(), None);
        inbox.seen(2);
        assert_eq!(inbox.next_ack(), Some(at(3)));
    }
}
