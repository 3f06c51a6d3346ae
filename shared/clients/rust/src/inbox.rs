//! The position of a client in its user's inbox, and the acknowledged position.
//!
//! The client acknowledges each entry on receipt, except a notification that a person has to
//! acknowledge, and the entries after it.
//!
//! Pure. `client::state` uses it.

use super::resume::{EntryCheck, LogTracker};
use skein_protocol::{
    ids::{MessageId, UserId},
    position::{Position, Seq},
    protocol::server_frame,
};

/// Position and acknowledgements of the inbox.
#[derive(Debug, Default)]
pub(super) struct InboxTracker {
    log: LogTracker,
    /// The first entry that a person has to acknowledge.
    first_unseen: Option<Seq>,
    /// The last position acknowledged on this connection.
    acknowledged: Option<Position>,
}

impl InboxTracker {
    /// The last received entry, which the next connection sends as `inbox`.
    pub(super) fn cursor(&self) -> Option<&Position> {
        self.log.cursor()
    }

    /// Takes the state of the inbox from `connected`. The server sends the missing entries unasked.
    pub(super) fn connected(&mut self, inbox: &server_frame::InboxState) {
        self.acknowledged = Some(Position::new(inbox.epoch.clone(), inbox.acked));
        if self.log.cursor().is_none() {
            let seq = inbox.acked.max(inbox.oldest.saturating_sub(1)).min(inbox.seq);
            self.log = LogTracker::starting_at(Position::new(inbox.epoch.clone(), seq));
        }
    }

    /// Continues at the position of a `reset`.
    pub(super) fn reset(&mut self, to: Position) {
        self.first_unseen = None;
        self.log.reset(to);
    }

    /// Whether an entry is new; moves the position past it.
    pub(super) fn accept(&mut self, position: &Position, from: &UserId, id: MessageId) -> bool {
        match self.log.classify(position, from, id) {
            EntryCheck::InOrder => true,
            EntryCheck::Gap { deliver, .. } => deliver,
            EntryCheck::Duplicate { .. } => false,
        }
    }

    /// Acknowledges no further than before this entry until [`Self::mark_seen`].
    pub(super) fn await_seen(&mut self, position: &Position) {
        self.first_unseen.get_or_insert(position.seq);
    }

    /// A person has seen all entries up to `seq`.
    pub(super) fn mark_seen(&mut self, seq: Seq) {
        if self.first_unseen.is_some_and(|unseen| unseen <= seq) {
            self.first_unseen = None;
        }
    }

    /// The position to acknowledge now, if it has moved.
    pub(super) fn next_ack(&mut self) -> Option<Position> {
        let cursor = self.log.cursor()?;
        let seq = self.first_unseen.map_or(cursor.seq, |unseen| cursor.seq.min(unseen - 1));
        let has_moved =
            self.acknowledged.as_ref().is_none_or(|at| at.epoch != cursor.epoch || at.seq < seq);
        let at = Position::new(cursor.epoch.clone(), seq);
        (has_moved && seq > 0).then(|| self.acknowledged.insert(at).clone())
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
    fn entries_are_acknowledged_once() {
        let mut inbox = InboxTracker::default();
        inbox.connected(&connected(2, 4));
        assert_eq!(inbox.cursor(), Some(&at(2)));
        assert_eq!(inbox.next_ack(), None);
        assert!(take(&mut inbox, 3) && !take(&mut inbox, 3) && take(&mut inbox, 4));
        assert_eq!((inbox.next_ack(), inbox.next_ack()), (Some(at(4)), None));
    }

    #[test]
    fn nothing_is_acknowledged_past_an_unseen_notification() {
        let mut inbox = InboxTracker::default();
        inbox.connected(&connected(0, 0));
        assert!(take(&mut inbox, 1) && take(&mut inbox, 2));
        inbox.await_seen(&at(2));
        assert!(take(&mut inbox, 3));
        assert_eq!(inbox.next_ack(), Some(at(1)));
        inbox.mark_seen(1);
        assert_eq!(inbox.next_ack(), None);
        inbox.mark_seen(2);
        assert_eq!(inbox.next_ack(), Some(at(3)));
    }
}
