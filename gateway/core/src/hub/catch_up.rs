//! Catch-up: members that are behind receive older entries from the ring or from the log, when
//! their sockets have drained.
//!
//! If the ring does not reach back far enough, one read of the log serves all members of a room
//! that wait for the same range, and a room has one such read at a time. A thousand slow consumers
//! thus cost as many reads as there are distinct ranges, and the memory of one read.

use std::collections::VecDeque;

use skein_protocol::{
    ids::{ConnectionId, RoomId},
    position::Seq,
};

use super::{
    member::{MemberState, ShardBatch},
    members::Members,
};
use crate::{
    connection::{encoding::SharedFrame, signals::Signal},
    delivery::{
        cursor::NextDelivery,
        page::{LogPage, READ_LEN},
        replica::RoomReplica,
    },
};

/// The members of a room that wait for a read of its log, and that read.
#[derive(Debug, Default)]
pub(super) struct CatchUp {
    /// Longest wait first. A member may have left, or been reset, since.
    waiting: VecDeque<ConnectionId>,
    read: CatchUpRead,
}

/// The state of a room's catch-up read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CatchUpRead {
    /// No read.
    #[default]
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

impl CatchUp {
    /// Delivers to a member that is behind what the ring holds for it, or lets it wait for a read
    /// of the log.
    pub(super) fn serve(
        &mut self,
        connection: ConnectionId,
        name: &RoomId,
        replica: &RoomReplica,
        members: &mut Members,
        batch: &mut ShardBatch,
    ) {
        let Some(member) = members.get_mut(connection) else { return };
        if member.state != MemberState::Behind {
            return;
        }
        let is_at_end = replica.top().is_none_or(|top| member.cursor.seq >= top.seq);
        if !is_at_end && !member.handle.outbox.has_space() {
            // A read would be in vain. The connection asks again when its socket has drained.
            member.handle.outbox.signal(Signal::CatchUp(name.clone()));
            return;
        }
        loop {
            match replica.next(&member.cursor) {
                NextDelivery::Entry(entry) => {
                    // Not compressed, since every slow reader would otherwise cost as much as all
                    // others of the room together.
                    let mut frame = SharedFrame::replay(name, entry).uncompressed();
                    if !member.deliver(name, entry, &mut frame, batch) {
                        return;
                    }
                }
                NextDelivery::EpochChange(to) => member.change_epoch(name, &to, batch),
                NextDelivery::NotBuffered => {
                    member.state = MemberState::AwaitingRead;
                    self.waiting.push_back(connection);
                    return;
                }
                NextDelivery::UpToDate => {
                    member.state = MemberState::Live;
                    return;
                }
            }
        }
    }

    /// Whether members wait for a read that is neither under way nor queued.
    pub(super) fn needs_read(&self) -> bool {
        self.read == CatchUpRead::Idle && !self.waiting.is_empty()
    }

    /// Lets the read wait for the reads of other rooms.
    pub(super) fn queue_read(&mut self) {
        self.read = CatchUpRead::Queued;
    }

    /// Begins a read, and returns the number after which it begins: for the member that has waited
    /// longest, and for as many others as the same read can serve. `None`: no member waits.
    pub(super) fn begin_read(&mut self, members: &Members) -> Option<Seq> {
        let cursor_of = |connection: &ConnectionId| {
            let member = members.get(*connection)?;
            (member.state == MemberState::AwaitingRead).then_some(member.cursor.seq)
        };
        self.read = CatchUpRead::Idle;
        self.waiting.retain(|connection| cursor_of(connection).is_some());
        let longest = self.waiting.front().and_then(cursor_of)?;
        let reaches = |seq: &Seq| *seq <= longest && *seq + u64::from(READ_LEN) > longest;
        let seq = self.waiting.iter().filter_map(cursor_of).filter(reaches).min()?;
        self.read = CatchUpRead::InProgress;
        Some(seq)
    }

    /// Ends a read with its page, which begins after `from`, and delivers it to the members that
    /// wait for it.
    pub(super) fn apply_page(
        &mut self,
        from: Seq,
        mut page: LogPage,
        name: &RoomId,
        replica: &RoomReplica,
        members: &mut Members,
        batch: &mut ShardBatch,
    ) -> CatchUpOutcome {
        if !replica.has_epoch_of(&page) {
            self.abandon_read(members);
            return CatchUpOutcome::OtherLog;
        }
        self.read = CatchUpRead::Idle;
        page.keep_contiguous();
        let last = page.entries.last().map_or(0, |last| last.position.seq);
        // Encoded and compressed once for all members.
        let mut frames: Vec<SharedFrame<'_>> =
            page.entries.iter().map(|entry| SharedFrame::replay(name, entry)).collect();
        let mut more = Vec::new();
        for connection in std::mem::take(&mut self.waiting) {
            let Some(member) = members.get_mut(connection) else { continue };
            if member.state != MemberState::AwaitingRead {
                continue;
            }
            let seq = member.cursor.seq;
            if if page.entries.is_empty() { seq != from } else { seq < from || seq >= last } {
                // The next read serves this member.
                self.waiting.push_back(connection);
                continue;
            }
            member.state = MemberState::Behind;
            if let Some((to, reason)) = replica.gap_after(&page, &member.cursor) {
                member.reset(name, &to, reason, batch);
            }
            let is_full = loop {
                match replica.next_in_page(&page, &member.cursor) {
                    NextDelivery::Entry(entry) => {
                        let index = page.index_of(entry.position.seq);
                        let frame = index.and_then(|index| frames.get_mut(index));
                        if !frame.is_some_and(|frame| member.deliver(name, entry, frame, batch)) {
                            break true;
                        }
                    }
                    NextDelivery::EpochChange(to) => member.change_epoch(name, &to, batch),
                    NextDelivery::NotBuffered | NextDelivery::UpToDate => break false,
                }
            };
            if !is_full {
                more.push(connection);
            }
        }
        CatchUpOutcome::More(more)
    }

    /// Ends a read whose page must not be used: the members that wait for it are behind again.
    pub(super) fn abandon_read(&mut self, members: &mut Members) {
        self.read = CatchUpRead::Idle;
        for connection in std::mem::take(&mut self.waiting) {
            if let Some(member) = members.get_mut(connection)
                && member.state == MemberState::AwaitingRead
            {
                member.state = MemberState::Behind;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use skein_protocol::position::Position;
    use uuid::Uuid;

    use super::{
        super::members::samples::{batch, member},
        *,
    };
    use crate::delivery::samples::{page, position, replica};

    /// A room whose replica holds the entries 5 to 9 of a log that begins with entry 1, and whose
    /// members are behind.
    struct Fixture {
        name: RoomId,
        replica: RoomReplica,
        members: Members,
        catch_up: CatchUp,
        batch: ShardBatch,
    }

    fn id(number: u128) -> ConnectionId {
        ConnectionId(Uuid::from_u128(number))
    }

    impl Fixture {
        fn new(cursors: &[Seq]) -> Self {
            let mut members = Members::default();
            for (number, seq) in cursors.iter().enumerate() {
                let mut member = member(number as u128, position("1-e", *seq));
                member.state = MemberState::Behind;
                members.add(member);
            }
            let (name, replica) = ("r".parse().unwrap(), replica("1-e", 5..=9));
            Self { name, replica, members, catch_up: CatchUp::default(), batch: batch() }
        }

        fn serve(&mut self, number: u128) {
            let Self { name, replica, members, catch_up, batch } = self;
            catch_up.serve(id(number), name, replica, members, batch);
        }

        fn apply(&mut self, from: Seq, page: LogPage) -> CatchUpOutcome {
            let Self { name, replica, members, catch_up, batch } = self;
            catch_up.apply_page(from, page, name, replica, members, batch)
        }

        /// Cursor, state and number of queued frames of a member.
        fn state(&self, number: u128) -> (&Position, MemberState, usize) {
            let member = self.members.get(id(number)).unwrap();
            (&member.cursor, member.state, member.handle.outbox.take().len())
        }
    }

    #[test]
    fn member_is_caught_up_from_the_ring() {
        let mut fixture = Fixture::new(&[6]);
        fixture.serve(0);
        assert_eq!(fixture.state(0), (&position("1-e", 9), MemberState::Live, 3));
        assert!(!fixture.catch_up.needs_read());
    }

    #[test]
    fn one_read_serves_all_members_that_it_reaches() {
        let mut fixture = Fixture::new(&[2, 1, 3]);
        (0..3).for_each(|number| fixture.serve(number));
        assert!(fixture.catch_up.needs_read());
        assert_eq!(fixture.catch_up.begin_read(&fixture.members), Some(1));
        assert!(!fixture.catch_up.needs_read(), "one read at a time");
        let outcome = fixture.apply(1, page("1-e", 2..=3, 9));
        assert_eq!(outcome, CatchUpOutcome::More(vec![id(0), id(1)]));
        assert_eq!(fixture.state(0), (&position("1-e", 3), MemberState::Behind, 1));
        assert_eq!(fixture.state(1), (&position("1-e", 3), MemberState::Behind, 2));
        assert_eq!(fixture.state(2), (&position("1-e", 3), MemberState::AwaitingRead, 0));
        assert_eq!(fixture.catch_up.begin_read(&fixture.members), Some(3), "the next one");
    }

    #[test]
    fn trimmed_log_resets_the_member_that_waits() {
        let mut fixture = Fixture::new(&[1]);
        fixture.serve(0);
        assert_eq!(fixture.catch_up.begin_read(&fixture.members), Some(1));
        let outcome = fixture.apply(1, page("1-e", 4..=6, 9));
        assert_eq!(outcome, CatchUpOutcome::More(vec![id(0)]));
        assert_eq!(fixture.state(0), (&position("1-e", 6), MemberState::Behind, 4));
    }

    #[test]
    fn page_of_another_log_serves_no_member() {
        let mut fixture = Fixture::new(&[1]);
        fixture.serve(0);
        assert_eq!(fixture.catch_up.begin_read(&fixture.members), Some(1));
        assert_eq!(fixture.apply(1, page("2-f", 2..=6, 9)), CatchUpOutcome::OtherLog);
        assert_eq!(fixture.state(0), (&position("1-e", 1), MemberState::Behind, 0));
        assert!(!fixture.catch_up.needs_read());
    }

    #[test]
    fn members_that_left_are_not_read_for() {
        let mut fixture = Fixture::new(&[1]);
        fixture.serve(0);
        fixture.catch_up.queue_read();
        fixture.members.remove(id(0));
        assert_eq!(fixture.catch_up.begin_read(&fixture.members), None);
        assert!(!fixture.catch_up.needs_read());
    }
}
