//! Catch-up: members that are behind receive older entries from the ring or from the log, when
//! their sockets have drained.
//!
//! If the ring does not reach back far enough, one read of the log serves all members of a room
//! that wait for the same range, and a room has one such read at a time. A thousand slow consumers
//! thus cost as many reads as there are distinct ranges, and the memory of one read.

use skein_protocol::{ids::ConnectionId, position::Seq};

use super::{
    member::{EntryFrames, MemberState, ShardBatch},
    room::Room,
};
use crate::delivery::{
    cursor::NextDelivery,
    page::{LogPage, READ_LEN, ReadRange},
};

/// The state of a room's catch-up read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CatchUpRead {
    /// No read.
    Idle,
    /// Waiting for the reads of other rooms.
    Queued,
    /// Under way.
    InProgress,
}

/// The outcome of a catch-up page.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CatchUpOutcome {
    /// These members may be caught up further at once.
    More(Vec<ConnectionId>),
    /// The page belongs to another log; the replica must be reconciled first.
    OtherLog,
}

impl Room {
    /// Delivers to a member that is behind what the ring holds for it, or lets it wait for a read
    /// of the log.
    pub(super) fn catch_up(&mut self, connection: ConnectionId, batch: &mut ShardBatch) {
        let Some(member) = self.members.get_mut(connection) else { return };
        if member.state != MemberState::Behind {
            return;
        }
        let is_at_end = self.replica.top().is_none_or(|top| member.cursor.seq >= top.seq);
        if !is_at_end && !member.handle.outbox.has_space() {
            // A read would be in vain. The connection asks again when its socket has drained.
            member.handle.outbox.mark_lagging(self.name.clone());
            return;
        }
        loop {
            match self.replica.next(&member.cursor) {
                NextDelivery::Entry(entry) => {
                    if !member
                        .deliver(&mut EntryFrames::replay_uncompressed(&self.name, entry), batch)
                    {
                        return;
                    }
                }
                NextDelivery::EpochChange(to) => member.change_epoch(&self.name, &to, batch),
                NextDelivery::NotBuffered => {
                    member.state = MemberState::AwaitingRead;
                    self.waiting_for_read.push_back(connection);
                    return;
                }
                NextDelivery::UpToDate => {
                    member.state = MemberState::Live;
                    return;
                }
            }
        }
    }

    /// The next range to read: for the member that has waited longest, and for as many others as
    /// the same read can serve.
    pub(super) fn next_catch_up_read(&mut self) -> Option<ReadRange> {
        let cursor_of_waiting = |room: &Self, connection| {
            let member = room.members.get(connection)?;
            (member.state == MemberState::AwaitingRead).then_some(member.cursor.seq)
        };
        let waiting_for_read = std::mem::take(&mut self.waiting_for_read);
        let cursors: Vec<(ConnectionId, Seq)> = waiting_for_read
            .into_iter()
            .filter_map(|connection| Some((connection, cursor_of_waiting(self, connection)?)))
            .collect();
        self.waiting_for_read = cursors.iter().map(|(connection, _)| *connection).collect();
        let (_, longest) = cursors.first()?;
        let reaches = |seq: &Seq| *seq <= *longest && *seq + u64::from(READ_LEN) > *longest;
        let seq = cursors.iter().map(|(_, seq)| *seq).filter(reaches).min()?;
        Some(ReadRange::After { seq, limit: READ_LEN })
    }

    /// Delivers a page, read from after `from`, to the members that wait for it.
    pub(super) fn catch_up_from_page(
        &mut self,
        from: Seq,
        mut page: LogPage,
        batch: &mut ShardBatch,
    ) -> CatchUpOutcome {
        if !self.replica.has_epoch_of(&page) {
            self.abandon_catch_up_read();
            return CatchUpOutcome::OtherLog;
        }
        page.keep_contiguous();
        let last = page.entries.last().map_or(0, |last| last.position.seq);
        // Encoded and compressed once for all members.
        let mut frames: Vec<EntryFrames<'_>> =
            page.entries.iter().map(|entry| EntryFrames::replay(&self.name, entry)).collect();
        let mut more = Vec::new();
        for connection in std::mem::take(&mut self.waiting_for_read) {
            let Some(member) = self.members.get_mut(connection) else { continue };
            if member.state != MemberState::AwaitingRead {
                continue;
            }
            let seq = member.cursor.seq;
            if if page.entries.is_empty() { seq != from } else { seq < from || seq >= last } {
                // The next read serves this member.
                self.waiting_for_read.push_back(connection);
                continue;
            }
            member.state = MemberState::Behind;
            if let Some((to, reason)) = self.replica.gap_after(&page, &member.cursor) {
                member.reset(&self.name, &to, reason, batch);
            }
            let is_full = loop {
                match self.replica.next_in_page(&page, &member.cursor) {
                    NextDelivery::Entry(entry) => {
                        let index = page.index_of(entry.position.seq);
                        let frames = index.and_then(|index| frames.get_mut(index));
                        if !frames.is_some_and(|frames| member.deliver(frames, batch)) {
                            break true;
                        }
                    }
                    NextDelivery::EpochChange(to) => member.change_epoch(&self.name, &to, batch),
                    NextDelivery::NotBuffered | NextDelivery::UpToDate => break false,
                }
            };
            if !is_full {
                more.push(connection);
            }
        }
        CatchUpOutcome::More(more)
    }

    /// Returns the members that wait for a read to the state `Behind`.
    pub(super) fn abandon_catch_up_read(&mut self) {
        for connection in std::mem::take(&mut self.waiting_for_read) {
            let Some(member) = self.members.get_mut(connection) else { continue };
            if member.state == MemberState::AwaitingRead {
                member.state = MemberState::Behind;
            }
        }
    }

    /// The members that are behind.
    pub(super) fn behind(&self) -> Vec<ConnectionId> {
        let behind = self.members.iter().filter(|member| member.state == MemberState::Behind);
        behind.map(|member| member.handle.connection).collect()
    }
}
