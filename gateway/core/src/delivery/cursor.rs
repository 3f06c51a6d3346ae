//! The next delivery for a member's cursor, and the position from which a returning client resumes.
//!
//! A cursor is an epoch and a number. Members receive entries up to the replica's top and never
//! beyond, from the ring or from a page of the log. A cursor at the end of an epoch that the next
//! epoch continues first receives the epoch change, and nothing is skipped.

use skein_protocol::{
    position::{Position, Seq},
    protocol::server_frame::RecoveryFailure,
};

use super::{Entry, page::LogPage, replica::RoomReplica};

/// The next delivery for a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextDelivery<'a> {
    /// An entry.
    Entry(&'a Entry),
    /// `reset`: the log continues in another epoch.
    EpochChange(Position),
    /// An entry that neither the ring nor the page holds.
    NotBuffered,
    /// Nothing: the member has received everything.
    UpToDate,
}

/// Whether a client can resume from a position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// It cannot, as far as this node knows; the log may know more.
    Unknown(RecoveryFailure),
    /// It can, up to this position in the epoch that it knows, if the log or the ring holds the
    /// entries.
    Until(Position),
}

impl RoomReplica {
    /// The next delivery at `cursor`, from the ring.
    pub fn next(&self, cursor: &Position) -> NextDelivery<'_> {
        self.step(cursor, self.ring.at(cursor.seq + 1))
    }

    /// The next delivery at `cursor`, from a page of the log.
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

    /// Whether a page belongs to the replica's epoch.
    pub fn has_epoch_of(&self, page: &LogPage) -> bool {
        self.top.as_ref().is_some_and(|top| top.epoch == page.epoch)
    }

    /// The position from which a member continues if the log cannot continue it from `cursor`, and
    /// why; `None` if it can. The page must begin at or before the cursor and end behind it.
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
            // The log has lost the missing entries, and the ring may not reach back to them.
            _ => {
                let first = self.ring.at(self.ring.first().unwrap_or(0).max(cursor.seq + 1));
                Some((first.map_or(top.clone(), before), RecoveryFailure::LogLost))
            }
        }
    }

    /// Whether a client can resume after `since`, and up to which position of the epoch that it
    /// knows.
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
            // The entries above are lost, although this client has received them.
            Some(former) if former.epoch == since.epoch && since.seq <= former.seq => {
                Resume::Until(former.clone())
            }
            _ => Resume::Unknown(RecoveryFailure::LogLost),
        }
    }
}

/// The entries of `behind`, which follow `since`, that belong to its epoch and are not above
/// `until`. `None` if the first entry belongs to another epoch although `until` does not: no client
/// can have been at that position.
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
