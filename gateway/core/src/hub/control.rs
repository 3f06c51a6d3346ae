//! Control commands of the application that concern connections. A user's connections are members
//! of the user's inbox and are found there.

use std::sync::Arc;

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, RoomKind, UserId},
    position::Position,
    protocol::server_frame::{LeftFrame, LeftReason, ServerFrame},
};

use super::{member::ShardBatch, members::Members, room::Room, rooms::Rooms};
use crate::{
    bus::sessions::{SessionSelector, UnixMicros},
    connection::{encoding::SharedFrame, handle::ConnectionHandle, outbox::Close, signals::Signal},
};

/// Closes those connections of a user that belong to `which` sessions and were opened before a
/// time.
pub(super) fn close_connections(
    inbox: &Members,
    which: SessionSelector,
    before: UnixMicros,
    close: &Close,
) {
    for member in inbox.iter() {
        let handle = &member.handle;
        let is_meant = handle.owner().is_some_and(|owner| which.selects(owner.session));
        if is_meant && handle.was_opened_before(before) {
            handle.outbox.close(close.clone());
        }
    }
}

/// Removes those connections of a user from a room that were opened before a time.
pub(super) fn remove_user(
    room: &mut Room,
    user: &UserId,
    before: UnixMicros,
    batch: &mut ShardBatch,
) {
    let removed = room.members.iter().map(|member| &member.handle);
    let removed: Vec<Arc<ConnectionHandle>> = removed
        .filter(|handle| handle.belongs_to(user) && handle.was_opened_before(before))
        .cloned()
        .collect();
    let (reference, reason) = (None, Some(LeftReason::Kicked));
    let left = ServerFrame::Left(LeftFrame { reference, room: room.name.clone(), reason });
    let mut left = SharedFrame::of(&left);
    for handle in removed {
        room.members.remove(handle.connection);
        handle.release_reservations(&room.name);
        // Before `left` is sent, so that a frame sent in response to it is rejected.
        handle.outbox.signal(Signal::Evicted(room.name.clone()));
        handle.send_shared(&mut left);
        batch.flush_later(&handle);
    }
}

/// Sends a frame, as JSON text, to every connection.
pub(super) fn broadcast(rooms: &Rooms, json: Bytes, batch: &mut ShardBatch) {
    let mut frame = SharedFrame::of_json(json);
    let inboxes = rooms.iter().filter(|room| room.name.kind() == RoomKind::Inbox);
    for member in inboxes.flat_map(|room| room.members.iter()) {
        member.send_ephemeral(&mut frame, batch);
    }
}

/// The cursors of a user's connections in a room.
pub(super) fn cursors(room: &Members, user: &UserId) -> Vec<(ConnectionId, Position)> {
    room.iter()
        .filter(|member| member.handle.belongs_to(user))
        .map(|member| (member.handle.connection, member.cursor.clone()))
        .collect()
}

/// The connections of an inbox, or of all inboxes.
pub(super) fn connections(rooms: &Rooms, inbox: Option<&RoomId>) -> Vec<Arc<ConnectionHandle>> {
    let inboxes = rooms.iter().filter(|room| match inbox {
        Some(inbox) => room.name == *inbox,
        None => room.name.kind() == RoomKind::Inbox,
    });
    inboxes.flat_map(|room| room.members.iter()).map(|member| member.handle.clone()).collect()
}
