//! Joins that the hub has not answered. [`JoinPlan`] decides how each one is answered.

use std::sync::Arc;

use skein_protocol::protocol::FrameRef;
use tokio::sync::oneshot;

use crate::{
    bus::presence_store::JoinSnapshot,
    connection::handle::ConnectionHandle,
    delivery::{join::JoinPlan, page::ReadRange},
    presence::RoomAlive,
};

/// A join that the hub has not answered.
#[derive(Debug)]
pub(super) struct PendingJoin {
    pub(super) handle: Arc<ConnectionHandle>,
    pub(super) reference: Option<FrameRef>,
    pub(super) plan: JoinPlan,
    /// The admission of its user.
    pub(super) grant: JoinGrant,
    /// Receives the outcome once `joined` is queued; dropped if the node cannot subscribe to the
    /// room.
    pub(super) done: oneshot::Sender<JoinOutcome>,
    /// Bytes read from the room's log for this join.
    pub(super) bytes_read: usize,
}

/// The outcome of a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinOutcome {
    /// The connection is a member.
    Member {
        /// Bytes read from the room's log for this join.
        bytes_read: usize,
    },
    /// The node is not subscribed to the room and has reached its limit of rooms.
    TooManyRooms,
}

/// The admission of a user to a room.
#[derive(Clone, Debug, Default)]
pub struct JoinGrant {
    /// The state of the room at the admission.
    pub snapshot: JoinSnapshot,
    /// Tells whether the room was closed since.
    pub room_alive: Option<RoomAlive>,
}

impl JoinGrant {
    /// Whether the room is still the one to which the user was admitted. `deleted` is the ordinal
    /// of the epoch that the room's last known deletion began.
    pub(super) fn holds(&self, deleted: u64) -> bool {
        let Some(alive) = &self.room_alive else { return true };
        !alive.is_closed() && self.snapshot.deleted >= deleted
    }
}

/// The step that the shard must take for a join.
#[derive(Debug)]
pub(super) enum JoinProgress {
    /// Nothing: it is answered, or its caller has gone.
    Done,
    /// Read a part of the log for it.
    Read(PendingJoin, ReadRange),
    /// Read the log from the replica's top, for which the join waits.
    Refresh,
}

/// The joins of a room that wait for a read of its log.
#[derive(Debug, Default)]
pub(super) struct Joins {
    waiting: Vec<PendingJoin>,
}

impl Joins {
    /// Adds a join.
    pub(super) fn wait(&mut self, join: PendingJoin) {
        self.remove_cancelled();
        self.waiting.push(join);
    }

    /// Removes joins whose callers have gone, and with them the references to their connections.
    pub(super) fn remove_cancelled(&mut self) {
        self.waiting.retain(|join| !join.done.is_closed());
    }

    /// Takes all joins after a read that took `bytes`, which count for the join that caused it.
    pub(super) fn take(&mut self, bytes: usize) -> Vec<PendingJoin> {
        if let Some(first) = self.waiting.first_mut() {
            first.bytes_read += bytes;
        }
        std::mem::take(&mut self.waiting)
    }

    /// Whether no join waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::members::samples::handle, *};
    use crate::delivery::join::JoinStart;

    fn join(number: u128) -> (PendingJoin, oneshot::Receiver<JoinOutcome>) {
        let (done, joined) = oneshot::channel();
        let join = PendingJoin {
            handle: handle(number, 1 << 20),
            reference: None,
            plan: JoinPlan::new(JoinStart::Newest(0)),
            grant: JoinGrant::default(),
            done,
            bytes_read: 0,
        };
        (join, joined)
    }

    #[test]
    fn first_waiting_join_counts_the_bytes_of_the_read() {
        let (mut joins, (first, gone), (second, _second)) = (Joins::default(), join(1), join(2));
        joins.wait(first);
        joins.wait(second);
        drop(gone);
        let (third, _third) = join(3);
        joins.wait(third);
        let taken = joins.take(700);
        let bytes: Vec<usize> = taken.iter().map(|join| join.bytes_read).collect();
        assert_eq!(bytes, [700, 0], "a cancelled join waits for nothing");
        assert!(joins.is_empty());
    }
}
