//! Members that are behind: fed from the ring, else from the log, when their sockets have drained.
//!
//! Where the ring does not reach back far enough, one read of the log serves all members of a room
//! that wait for the same catch_up_read of it, and a room has one such read at a time: a thousand slow
//! readers cost as many reads as there are catch_up_reads, and the memory of one.

use skein_protocol::{ids::ConnectionId, position::Seq};

use super::{
    member::{EntryFrames, MemberState, ShardBatch},
    room::Room,
};
use crate::{
    bus::ReadRange,
    delivery::{cursor::NextDelivery, page::LogPage, reconcile::READ_LEN},
};

/// The read of the log for members that are behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CatchUpRead {
    /// There is none.
    Idle,
    /// It waits for those of other rooms.
    Queued,
    /// It is under way.
    InProgress,
}

/// What became of a page that was read for members that are behind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CatchUpOutcome {
    /// These may be given more at once.
    More(Vec<ConnectionId>),
    /// The log is another one, and the room has to find out first.
    OtherLog,
}

impl Room {
    /// Gives a member that is behind what the ring holds for it, or has it wait for a read of the
    /// log.
    pub(super) fn catch_up(&mut self, connection: ConnectionId, batch: &mut ShardBatch) {
        let Some(place) = self.index_of(connection) else { return };
        let Some(member) = self.members.get_mut(place) else { return };
        if member.state != MemberState::Behind {
            return;
        }
        let is_at_end = self.replica.top().is_none_or(|top| member.cursor.seq >= top.seq);
        if !is_at_end && !member.handle.outbox.has_room() {
            // A read for it would be in vain. It asks again when its socket has drained.
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

    /// Which part of the log to read for those who wait for it: for who has waited longest, and as
    /// many others as one read can serve with it.
    pub(super) fn next_catch_up_read(&mut self) -> Option<ReadRange> {
        let waits = |room: &Self, connection| {
            let place = room.index_of(connection)?;
            let member = room
                .members
                .get(place)
                .filter(|member| member.state == MemberState::AwaitingRead)?;
            Some(member.cursor.seq)
        };
        let waiting_for_read = std::mem::take(&mut self.waiting_for_read);
        let cursors: Vec<(ConnectionId, Seq)> = waiting_for_read
            .into_iter()
            .filter_map(|connection| Some((connection, waits(self, connection)?)))
            .collect();
        self.waiting_for_read = cursors.iter().map(|(connection, _)| *connection).collect();
        let (_, longest) = cursors.first()?;
        let reaches = |seq: &Seq| *seq <= *longest && *seq + u64::from(READ_LEN) > *longest;
        let seq = cursors.iter().map(|(_, seq)| *seq).filter(reaches).min()?;
        Some(ReadRange::After { seq, limit: READ_LEN })
    }

    /// Gives those who wait for it what was read of the log behind `from`.
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
        page.keep_whole();
        let last = page.entries.last().map_or(0, |last| last.position.seq);
        // Encoded and compressed once for all.
        let mut frames: Vec<EntryFrames<'_>> =
            page.entries.iter().map(|entry| EntryFrames::replay(&self.name, entry)).collect();
        let mut more = Vec::new();
        for connection in std::mem::take(&mut self.waiting_for_read) {
            let Some(place) = self.index_of(connection) else { continue };
            let member = &mut self.members[place];
            if member.state != MemberState::AwaitingRead {
                continue;
            }
            let seq = member.cursor.seq;
            if if page.entries.is_empty() { seq != from } else { seq < from || seq >= last } {
                // The next one is for it.
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
                        let place = page.index_of(entry.position.seq);
                        let frames = place.and_then(|place| frames.get_mut(place));
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

    /// Has those who wait for a read of the log ask anew.
    pub(super) fn abandon_catch_up_read(&mut self) {
        for connection in std::mem::take(&mut self.waiting_for_read) {
            let Some(place) = self.index_of(connection) else { continue };
            let member = &mut self.members[place];
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
