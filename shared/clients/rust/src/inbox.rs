//! Where a client is in its user's inbox, and how far that is acknowledged.
//!
//! Everything is acknowledged on receipt but what waits for a person, and what follows it.
//!
//! Pure. `client::state` is the user.

use super::resume::{EntryCheck, LogTracker};
use skein_protocol::{
    ids::{MessageId, UserId},
    position::{Position, Seq},
    protocol::server_frame,
};

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct InboxTracker {
    log: LogTracker,
    /// The first entry that waits for a person.
    awaiting_seen: Option<Seq>,
    /// What was acknowledged last on this connection.
    acknowledged: Option<Position>,
}

impl InboxTracker {
    /// The last entry had: what a connection says as `inbox`.
    pub(super) fn cursor(&self) -> Option<&Position> {
        self.log.cursor()
    }

    /// Takes what `connected` says. What follows comes by itself.
    pub(super) fn connected(&mut self, inbox: &server_frame::InboxState) {
        self.acknowledged = Some(Position::new(inbox.epoch.clone(), inbox.acked));
        if self.log.cursor().is_none() {
            let seq = inbox.acked.max(inbox.oldest.saturating_sub(1)).min(inbox.seq);
            self.log = LogTracker::starting_at(Position::new(inbox.epoch.clone(), seq));
        }
    }

    /// Goes on where a `reset` says.
    pub(super) fn reset(&mut self, to: Position) {
        self.awaiting_seen = None;
        self.log.reset(to);
    }

    /// Whether an entry is new.
    pub(super) fn accept(&mut self, position: &Position, from: &UserId, id: MessageId) -> bool {
        match self.log.classify(position, from, id) {
            EntryCheck::InOrder => true,
            EntryCheck::Gap { deliver, .. } => deliver,
            EntryCheck::Duplicate { .. } => false,
        }
    }

    /// An entry waits for a person.
    pub(super) fn hold_at(&mut self, position: &Position) {
        self.awaiting_seen.get_or_insert(position.seq);
    }

    /// A person has seen everything up to `seq`.
    pub(super) fn mark_seen(&mut self, seq: Seq) {
        if self.awaiting_seen.is_some_and(|waits| waits <= seq) {
            self.awaiting_seen = None;
        }
    }

    /// Up to where is to be acknowledged now.
    pub(super) fn next_ack(&mut self) -> Option<Position> {
        let cursor = self.log.cursor()?;
        let seq = self.awaiting_seen.map_or(cursor.seq, |waits| cursor.seq.min(waits - 1));
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

    fn take(inbox: &mut InboxTracker, seq: Seq) -> bool {
        inbox.accept(&at(seq), &"ann".parse().unwrap(), MessageId::random())
    }

    #[test]
    fn what_comes_is_acknowledged_once() {
        let mut inbox = InboxTracker::default();
        inbox.connected(&connected(2, 4));
        assert_eq!(inbox.cursor(), Some(&at(2)));
        assert_eq!(inbox.next_ack(), None);
        assert!(take(&mut inbox, 3) && !take(&mut inbox, 3) && take(&mut inbox, 4));
        assert_eq!((inbox.next_ack(), inbox.next_ack()), (Some(at(4)), None));
    }

    #[test]
    fn never_past_what_waits_for_a_person() {
        let mut inbox = InboxTracker::default();
        inbox.connected(&connected(0, 0));
        assert!(take(&mut inbox, 1) && take(&mut inbox, 2));
        inbox.hold_at(&at(2));
        assert!(take(&mut inbox, 3));
        assert_eq!(inbox.next_ack(), Some(at(1)));
        inbox.mark_seen(1);
        assert_eq!(inbox.next_ack(), None);
        inbox.mark_seen(2);
        assert_eq!(inbox.next_ack(), Some(at(3)));
    }
}
