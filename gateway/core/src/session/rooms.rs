//! Execution of `create_room`, `delete_room`, `room_info` and `rooms`.

use skein_protocol::{
    error::ErrorCode,
    ids::{DisplayName, RoomId, UserId},
    protocol::{
        HISTORY_BYTES_MAX, NAME_CHARS_MAX, client_frame,
        server_frame::{
            RoomClosedFrame, RoomClosedReason, RoomInfoFrame, RoomsPageFrame, ServerFrame,
        },
    },
};

use super::{
    RequestOutcome,
    auth::Identity,
    requests::{RequestContext, TOO_MANY_PASSWORDS},
};
use crate::{
    bus::room_store::{CreateOutcome, DeleteOutcome, RoomConfig, RoomPage, RoomSummary},
    hub::presence::wire_time,
    rooms::RoomRules,
    telemetry::metrics::StorageLimit,
};

/// The display name of a room without one: its id, cut to the length of a name.
pub fn name_of(room: &RoomId) -> DisplayName {
    let name = &room.as_str()[..room.as_str().len().min(NAME_CHARS_MAX)];
    name.parse().expect("a room id is a valid name")
}

/// The public description of a room.
pub fn info_of(found: RoomSummary, rules: &RoomRules) -> RoomInfoFrame {
    let RoomSummary { room, config: record, members, since } = found;
    let durable = rules.is_durable(&room);
    let info = RoomInfoFrame {
        reference: None,
        name: name_of(&room),
        owner: None,
        public: true,
        protected: false,
        max_members: None,
        members,
        durable,
        created_at: wire_time(since),
        meta: serde_json::Map::new(),
        room,
    };
    match record {
        None => info,
        Some(record) => RoomInfoFrame {
            name: record.name,
            owner: Some(record.owner),
            public: record.public,
            protected: record.password.is_some(),
            max_members: record.max_members,
            created_at: wire_time(record.created),
            // Validated when the room was created.
            meta: serde_json::from_str(&record.meta).unwrap_or_default(),
            ..info
        },
    }
}

pub(super) async fn create(
    context: RequestContext,
    room: RoomId,
    mut record: RoomConfig,
    password: Option<String>,
) -> RequestOutcome {
    if let Some(password) = password {
        let passwords = &context.services.passwords;
        record.password = match passwords.hash(context.address(), password).await {
            Ok(hash) => Some(hash),
            Err(wait) => {
                context.reject_with_delay("create_room", Some(&room), wait, TOO_MANY_PASSWORDS);
                return RequestOutcome::Done;
            }
        };
    }
    let store = &context.services.rooms;
    let owned_max = context.services.limits.managed_max;
    let owned_max = Some(owned_max).filter(|max| *max > 0);
    match context.wait(store.create(room.clone(), record.clone(), owned_max)).await {
        Ok(CreateOutcome::Created) => {
            let found =
                RoomSummary { room, since: record.created, config: Some(record), members: 0 };
            let info = info_of(found, &context.services.rules);
            let info = RoomInfoFrame { reference: context.reference.clone(), ..info };
            context.send(&ServerFrame::RoomInfo(Box::new(info)));
        }
        Ok(CreateOutcome::Exists) => {
            let text = "the room exists, with members or a log";
            context.reject("create_room", Some(&room), ErrorCode::RoomExists, text);
        }
        Ok(CreateOutcome::QuotaExceeded) => {
            context.services.metrics.storage_rejections.of(StorageLimit::ManagedRooms).inc();
            let text = "limit of managed rooms reached: delete one first";
            context.reject("create_room", Some(&room), ErrorCode::LimitReached, text);
        }
        Err((code, text)) => drop(context.reject("create_room", Some(&room), code, text)),
    }
    RequestOutcome::Done
}

pub(super) async fn delete(context: RequestContext, room: RoomId, user: UserId) -> RequestOutcome {
    let store = &context.services.rooms;
    let by = Some(context.handle.connection);
    let (code, text) = match context.wait(store.delete_room(room.clone(), Some(user), by)).await {
        Ok(DeleteOutcome::Deleted) => {
            let (reference, reason) = (context.reference.clone(), RoomClosedReason::Deleted);
            context.send(&ServerFrame::RoomClosed(RoomClosedFrame { reference, room, reason }));
            return RequestOutcome::Done;
        }
        Ok(DeleteOutcome::NotOwner) => (ErrorCode::Forbidden, "only the owner may delete a room"),
        Ok(DeleteOutcome::NotFound) => NOT_FOUND,
        Err(failed) => failed,
    };
    context.reject("delete_room", Some(&room), code, text);
    RequestOutcome::Done
}

const NOT_FOUND: (ErrorCode, &str) = (ErrorCode::NotFound, "no such room");

/// Executes `room_info`. A private room exists only for its members and its owner.
pub(super) async fn info(
    context: RequestContext,
    room: RoomId,
    user: UserId,
    is_member: bool,
    is_open: bool,
) -> RequestOutcome {
    let store = &context.services.rooms;
    let (code, text) = match context.read(store.find(room.clone()), |_| 0).await {
        Ok(Some(found)) => {
            let info = info_of(found, &context.services.rules);
            let is_owner = info.owner.as_ref() == Some(&user);
            if is_open && (info.public || is_member || is_owner) {
                let info = RoomInfoFrame { reference: context.reference.clone(), ..info };
                context.send(&ServerFrame::RoomInfo(Box::new(info)));
                return RequestOutcome::Done;
            }
            NOT_FOUND
        }
        Ok(None) => NOT_FOUND,
        Err(failed) => failed,
    };
    context.reject("room_info", Some(&room), code, text);
    RequestOutcome::Done
}

/// The approximate size of a page of rooms, in bytes.
fn bytes_of(listing: &RoomPage) -> usize {
    let of =
        |found: &RoomSummary| 256 + found.config.as_ref().map_or(0, |record| record.meta.len());
    listing.rooms.iter().map(of).sum()
}

/// Executes `rooms`: lists the public rooms that the token grants, as many as fit into a frame.
pub(super) async fn list(
    context: RequestContext,
    wanted: client_frame::RoomsFrame,
    identity: Identity,
) -> RequestOutcome {
    let store = &context.services.rooms;
    let (prefix, after) = (wanted.prefix.unwrap_or_default(), wanted.cursor.unwrap_or_default());
    let listing = store.list(prefix, after, wanted.limit as usize, false);
    let listing = match context.read(listing, bytes_of).await {
        Ok(listing) => listing,
        Err((code, text)) => {
            context.reject("rooms", None, code, text);
            return RequestOutcome::Done;
        }
    };
    let (mut cursor, mut last, mut bytes) = (listing.next, None, 0);
    let mut rooms = Vec::new();
    for found in listing.rooms {
        let meta = found.config.as_ref().map_or(0, |record| record.meta.len());
        if bytes > 0 && bytes + meta > HISTORY_BYTES_MAX {
            cursor = last;
            break;
        }
        bytes += meta + 1;
        last = Some(found.room.to_string());
        if identity.access(&found.room).is_some() {
            rooms.push(info_of(found, &context.services.rules));
        }
    }
    context.send(&ServerFrame::Rooms(RoomsPageFrame {
        reference: context.reference.clone(),
        rooms,
        cursor,
    }));
    RequestOutcome::Done
}
