//! What a member at a cursor is given next, and from where a client that comes back goes on.
//!
//! A cursor is an epoch and a number. Members are served up to the top and never beyond, from the
//! ring or from what was read of the log; where a cursor stands at the end of an epoch that the next
//! one continues, the member is told first, and nothing is skipped.

use skein_protocol::{
    position::{Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{Entry, page::LogPage, replica::RoomReplica};

/// What a member is to be given next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextDelivery<'a> {
    /// An entry.
    Entry(&'a Entry),
    /// `reset`: the log goes on in another epoch.
    EpochChange(Position),
    /// What is not at hand.
    NotBuffered,
    /// Nothing: it has everything.
    UpToDate,
}

/// What becomes of a client that wants to go on behind a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// It cannot, as far as this node knows; the log may know more.
    Unknown(RecoveryFailure),
    /// It can, if the log or the ring has what follows: up to this position in the epoch it knows.
    Until(Position),
}

impl RoomReplica {
    /// What a member at `cursor` is given next, from the ring.
    pub fn next(&self, cursor: &Position) -> NextDelivery<'_> {
        self.step(cursor, self.ring.at(cursor.seq + 1))
    }

    /// What a member at `cursor` is given next, from what was read of the log.
    pub fn next_in_page<'a>(&self, page: &'a LogPage, cursor: &Position) -> NextDelivery<'a> {
        self.step(cursor, page.at(cursor.seq + 1))
    }

    fn step<'a>(&self, cursor: &Position, next: Option<&'a Entry>) -> NextDelivery<'a> {
        let Some(top) = &self.top else { return NextDelivery::UpToDate };
        if cursor.seq >= top.seq {
            return if cursor.epoch == top.epoch {
                NextDelivery::UpToDate
            } else {
                NextDelivery::EpochChange(top.clone())
            };
        }
        match next {
            Some(entry) if entry.position.epoch == cursor.epoch => NextDelivery::Entry(entry),
            Some(entry) => {
                NextDelivery::EpochChange(Position::new(entry.position.epoch.clone(), cursor.seq))
            }
            None => NextDelivery::NotBuffered,
        }
    }

    /// Whether a page that was read for members is of the history followed.
    pub fn has_epoch_of(&self, page: &LogPage) -> bool {
        self.top.as_ref().is_some_and(|top| top.epoch == page.epoch)
    }

    /// Where a member goes on that the log cannot be continued for from `cursor`, given a page that
    /// was read from there or from before and ends behind it: `None` where it can.
    pub fn gap_after(
        &self,
        page: &LogPage,
        cursor: &Position,
    ) -> Option<(Position, RecoveryFailure)> {
        let top = self.top.as_ref().filter(|top| cursor.seq < top.seq)?;
        let before =
            |entry: &Entry| Position::new(entry.position.epoch.clone(), entry.position.seq - 1);
        match page.entries.first() {
            Some(_) if page.at(cursor.seq + 1).is_some() => None,
            Some(first) if first.position.seq > cursor.seq + 1 => {
                let base = if first.position.seq <= top.seq { before(first) } else { top.clone() };
                Some((base, RecoveryFailure::LogTrimmed))
            }
            // The log has lost what is missed, and the ring may not reach back to it.
            _ => {
                let first = self.ring.at(self.ring.first().unwrap_or(0).max(cursor.seq + 1));
                Some((first.map_or(top.clone(), before), RecoveryFailure::LogLost))
            }
        }
    }

    /// Whether and up to where a client goes on behind `since` within the epoch it knows.
    pub fn resume(&self, since: &Position) -> Resume {
        let Some(top) = &self.top else { return Resume::Unknown(RecoveryFailure::LogLost) };
        let former = self.former.as_ref();
        if since.epoch == top.epoch {
            if since.seq > top.seq {
                return Resume::Unknown(RecoveryFailure::Ahead);
            }
            if former.is_none_or(|former| since.seq >= former.seq) {
                return Resume::Until(top.clone());
            }
        }
        match former {
            // What stands above was seen by this client and is gone.
            Some(former) if former.epoch == since.epoch && since.seq <= former.seq => {
                Resume::Until(former.clone())
            }
            _ => Resume::Unknown(RecoveryFailure::LogLost),
        }
    }
}

/// The entries among `behind`, which follow `since`, that are of its epoch and not above `until`.
/// `None`: the first is of another epoch although `until` is of the same: nobody was ever there.
pub fn within_epoch<'a>(
    behind: impl Iterator<Item = &'a Entry>,
    since: &Position,
    until: Seq,
) -> Option<Vec<Entry>> {
    let wanted = behind.take_while(|entry| entry.position.seq <= until);
    let of_epoch = |entry: &&Entry| entry.position.epoch == since.epoch;
    let entries: Vec<Entry> = wanted.take_while(of_epoch).cloned().collect();
    (!entries.is_empty() || since.seq >= until).then_some(entries)
}
