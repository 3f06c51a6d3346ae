//! Control commands of the application that concern connections. A user's connections are members
//! of the user's inbox and are found there.

use std::sync::Arc;

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, RoomKind, UserId},
    position::Position,
    protocol::server_frame::{LeftFrame, LeftReason, ServerFrame},
};

use super::{member::SharedFrame, shard::Shard};
use crate::{
    bus::sessions::{SessionSelector, UnixMicros},
    connection::{
        handle::{ConnectionHandle, text_frame},
        outbox::Close,
        signals::Signal,
    },
};

impl Shard {
    pub(super) fn close_connections(
        &self,
        inbox: &RoomId,
        which: SessionSelector,
        before: UnixMicros,
        close: &Close,
    ) {
        let members = self.rooms.get(inbox).into_iter().flat_map(|room| room.members.iter());
        for member in members {
            let handle = &member.handle;
            let is_meant = handle.owner().is_some_and(|owner| which.selects(owner.session));
            if is_meant && handle.was_opened_before(before) {
                handle.outbox.close(close.clone());
            }
        }
    }

    pub(super) fn remove(&mut self, name: &RoomId, user: &UserId, before: UnixMicros) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let removed = room.members.iter().map(|member| &member.handle);
        let removed: Vec<Arc<ConnectionHandle>> = removed
            .filter(|handle| handle.belongs_to(user) && handle.was_opened_before(before))
            .cloned()
            .collect();
        let (reference, reason) = (None, Some(LeftReason::Kicked));
        let left =
            text_frame(&ServerFrame::Left(LeftFrame { reference, room: name.clone(), reason }));
        for handle in removed {
            room.members.remove(handle.connection);
            handle.release_reservations(name);
            // Before `left` is sent, so that a frame sent in response to it is rejected.
            handle.outbox.signal(Signal::Evicted(name.clone()));
            handle.outbox.push(left.clone());
            self.batch.flush_later(&handle);
        }
        self.note_if_idle(name);
    }

    pub(super) fn broadcast(&mut self, frame: Bytes) {
        let mut frame = SharedFrame::new(frame);
        let inboxes = self.rooms.values().filter(|room| room.name.kind() == RoomKind::Inbox);
        for member in inboxes.flat_map(|room| room.members.iter()) {
            member.send_ephemeral(&mut frame, &mut self.batch);
        }
    }

    pub(super) fn cursors(&self, name: &RoomId, user: &UserId) -> Vec<(ConnectionId, Position)> {
        let members = self.rooms.get(name).into_iter().flat_map(|room| room.members.iter());
        members
            .filter(|member| member.handle.belongs_to(user))
            .map(|member| (member.handle.connection, member.cursor.clone()))
            .collect()
    }

    pub(super) fn connections(&self, inbox: Option<&RoomId>) -> Vec<Arc<ConnectionHandle>> {
        let inboxes = self.rooms.values().filter(|room| match inbox {
            Some(inbox) => room.name == *inbox,
            None => room.name.kind() == RoomKind::Inbox,
        });
        inboxes.flat_map(|room| room.members.iter()).map(|member| member.handle.clone()).collect()
    }
}
