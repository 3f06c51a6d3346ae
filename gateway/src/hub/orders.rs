//! What the application has ordered, as far as it is for connections: each is in its user's inbox, and
//! so found there.

use std::sync::Arc;

use bytes::Bytes;
use shared::{
    ids::{ConnectionId, RoomId, RoomKind, UserId},
    position::Position,
    protocol::server_frame::{LeftFrame, LeftReason, ServerFrame},
};

use super::{
    member::{Shared, Subscriber, text_frame},
    shard::Shard,
};
use crate::{
    bus::sessions::{SessionSelector, UnixMicros},
    outbox::Close,
};

impl Subscriber {
    /// Whether it was opened before an order was given, so that the order concerns it.
    fn is_older_than(&self, order: UnixMicros) -> bool {
        self.owner().is_some_and(|owner| owner.since <= order)
    }
}

impl Shard {
    pub(super) fn close_connections(
        &self,
        inbox: &RoomId,
        which: SessionSelector,
        before: UnixMicros,
        close: &Close,
    ) {
        let members = self.rooms.get(inbox).map(|room| &room.members);
        for member in members.into_iter().flatten() {
            let subscriber = &member.subscriber;
            let is_meant = subscriber.owner().is_some_and(|owner| which.selects(owner.session));
            if is_meant && subscriber.is_older_than(before) {
                subscriber.outbox.close(close.clone());
            }
        }
    }

    pub(super) fn remove(&mut self, name: &RoomId, user: &UserId, before: UnixMicros) {
        let Some(room) = self.rooms.get_mut(name) else { return };
        let removed = room.members.iter().map(|member| &member.subscriber);
        let removed: Vec<Arc<Subscriber>> = removed
            .filter(|subscriber| subscriber.is_of(user) && subscriber.is_older_than(before))
            .cloned()
            .collect();
        let (reference, reason) = (None, Some(LeftReason::Kicked));
        let left =
            text_frame(&ServerFrame::Left(LeftFrame { reference, room: name.clone(), reason }));
        for subscriber in removed {
            room.remove(subscriber.connection);
            subscriber.release_acks(name);
            // First, so that what who was told says next is refused.
            subscriber.taken_out_of(name);
            subscriber.outbox.push(left.clone());
            self.turn.touch(&subscriber);
        }
        self.note_if_idle(name);
    }

    pub(super) fn broadcast(&mut self, frame: Bytes) {
        let mut frame = Shared::new(frame);
        let inboxes = self.rooms.values().filter(|room| room.name.kind() == RoomKind::Inbox);
        for member in inboxes.flat_map(|room| &room.members) {
            member.notify(&mut frame, &mut self.turn);
        }
    }

    pub(super) fn cursors(&self, name: &RoomId, user: &UserId) -> Vec<(ConnectionId, Position)> {
        let members = self.rooms.get(name).into_iter().flat_map(|room| &room.members);
        members
            .filter(|member| member.subscriber.is_of(user))
            .map(|member| (member.subscriber.connection, member.cursor.clone()))
            .collect()
    }

    pub(super) fn connections(&self, inbox: Option<&RoomId>) -> Vec<Arc<Subscriber>> {
        let inboxes = self.rooms.values().filter(|room| match inbox {
            Some(inbox) => room.name == *inbox,
            None => room.name.kind() == RoomKind::Inbox,
        });
        inboxes.flat_map(|room| &room.members).map(|member| member.subscriber.clone()).collect()
    }
}
