//! The members of a room on this node.

use std::collections::HashMap;

use serde_json::value::RawValue;
use skein_protocol::{ids::ConnectionId, protocol::server_frame::ServerFrame};

use super::member::{MemberState, RoomMember, ShardBatch};
use crate::connection::{encoding::SharedFrame, handle::ConnectionHandle};

/// Up to this number of members a linear search finds a member; a map would cost more memory.
const LINEAR_SEARCH_MAX: usize = 8;

/// The members of a room, in no order.
#[derive(Debug, Default)]
pub(super) struct Members {
    list: Vec<RoomMember>,
    /// The index of each member in `list`; empty for a small room, which is searched linearly.
    index: HashMap<ConnectionId, usize>,
}

impl Members {
    /// Adds a member whose connection is not one yet.
    pub(super) fn add(&mut self, member: RoomMember) {
        // Most inboxes have one member.
        self.list.reserve_exact(usize::from(self.list.is_empty()));
        self.list.push(member);
        if self.list.len() > LINEAR_SEARCH_MAX || !self.index.is_empty() {
            let from = if self.index.is_empty() { 0 } else { self.list.len() - 1 };
            for (index, member) in self.list.iter().enumerate().skip(from) {
                self.index.insert(member.handle.connection, index);
            }
        }
    }

    /// Removes a connection. `false`: it is no member.
    pub(super) fn remove(&mut self, connection: ConnectionId) -> bool {
        let Some(index) = self.index_of(connection) else { return false };
        self.list.swap_remove(index);
        if self.index.remove(&connection).is_some()
            && let Some(moved) = self.list.get(index)
        {
            self.index.insert(moved.handle.connection, index);
        }
        true
    }

    /// Removes all members.
    pub(super) fn take(&mut self) -> Vec<RoomMember> {
        std::mem::take(self).list
    }

    pub(super) fn get(&self, connection: ConnectionId) -> Option<&RoomMember> {
        self.list.get(self.index_of(connection)?)
    }

    pub(super) fn get_mut(&mut self, connection: ConnectionId) -> Option<&mut RoomMember> {
        let index = self.index_of(connection)?;
        self.list.get_mut(index)
    }

    fn index_of(&self, connection: ConnectionId) -> Option<usize> {
        if self.index.is_empty() {
            return self.list.iter().position(|member| member.handle.connection == connection);
        }
        self.index.get(&connection).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &RoomMember> {
        self.list.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut RoomMember> {
        self.list.iter_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The members that are behind.
    pub(super) fn behind(&self) -> Vec<ConnectionId> {
        let behind = self.list.iter().filter(|member| member.state == MemberState::Behind);
        behind.map(|member| member.handle.connection).collect()
    }

    /// Sends an ephemeral frame to all members except those of `but`.
    pub(super) fn send(
        &self,
        frame: &ServerFrame<Box<RawValue>>,
        but: impl Fn(&ConnectionHandle) -> bool,
        batch: &mut ShardBatch,
    ) {
        let mut frame = SharedFrame::of(frame);
        for member in self.list.iter().filter(|member| !but(&member.handle)) {
            member.send_ephemeral(&mut frame, batch);
        }
    }
}

#[cfg(test)]
pub(super) mod samples {
    //! Members for the tests of the hub's modules.

    use std::sync::Arc;

    use skein_protocol::position::Position;
    use uuid::Uuid;

    use super::*;
    use crate::{connection::outbox::Outbox, delivery::samples::retention};

    /// A connection whose outbox takes `bytes_max`.
    pub(in super::super) fn handle(number: u128, bytes_max: usize) -> Arc<ConnectionHandle> {
        let outbox = Outbox::to_owner(bytes_max, Arc::default());
        Arc::new(ConnectionHandle::new(ConnectionId(Uuid::from_u128(number)), outbox))
    }

    /// A member that is up to date at `cursor`.
    pub(in super::super) fn member(number: u128, cursor: Position) -> RoomMember {
        RoomMember::new(handle(number, 1 << 20), cursor, MemberState::Live)
    }

    /// A batch of a node that holds its lease.
    pub(in super::super) fn batch() -> ShardBatch {
        let tracer = crate::telemetry::traces::Tracer::default();
        ShardBatch::new(retention(), Arc::default(), Arc::default(), tracer, Arc::default())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{samples::member, *};
    use crate::delivery::samples::position;

    #[test]
    fn members_are_found_however_many_there_are() {
        let mut members = Members::default();
        let id = |number| ConnectionId(Uuid::from_u128(number));
        // Grows through the limit of the linear search and shrinks again, from the middle.
        for number in 0..40 {
            members.add(member(number, position("1-e", number as u64)));
            assert!((0..=number).all(|known| members.get(id(known)).is_some()));
        }
        for number in (0..40).map(|number| (number * 7 + 20) % 40) {
            assert!(members.remove(id(number)) && !members.remove(id(number)));
            assert!(members.get(id(number)).is_none());
            for member in members.iter() {
                let found = members.get(member.handle.connection).unwrap();
                assert!(std::ptr::eq(found, member));
            }
        }
        assert!(members.is_empty());
    }
}
