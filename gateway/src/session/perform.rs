//! What has to wait for the hub or the bus: `join`, `leave`, `history`. Each ends by its answer.

use std::sync::Arc;

use shared::{
    error::ErrorCode,
    ids::RoomId,
    protocol::{
        Ref,
        answer::{Answer, History, Left},
        request,
    },
};

use super::{Performed, RETRY_AFTER, Services, after, refusal, refuse};
use crate::{
    bus::{BusError, Range},
    delivery::page::Page,
    hub::{
        join::{Start, history as whole_frames},
        member::{Subscriber, text_frame},
    },
};

pub(super) async fn join(
    services: Arc<Services>,
    subscriber: Arc<Subscriber>,
    reference: Option<Ref>,
    join: request::Join,
    is_member: bool,
) -> Performed {
    let room = join.room;
    let start = match join.since {
        Some(since) => Start::Since(since),
        None => Start::Newest(join.history),
    };
    let joining = services.hub.join(room.clone(), subscriber.clone(), reference.clone(), start);
    match tokio::time::timeout(services.limits.wait_max, joining).await {
        Ok(Ok(())) => return Performed::Joined,
        // The hub may have let it in at the very moment it was given up.
        Err(_) if !is_member => services.hub.give_up(room.clone(), subscriber.clone()).await,
        Ok(Err(_)) | Err(_) => {}
    }
    let (code, text) = (ErrorCode::Unavailable, "the bus is away; join again later");
    let refusal = after(refusal(reference, "join", Some(&room), code, text), RETRY_AFTER);
    Performed::NotJoined(refuse(&services, &subscriber, refusal))
}

pub(super) async fn leave(
    services: Arc<Services>,
    subscriber: Arc<Subscriber>,
    reference: Option<Ref>,
    room: RoomId,
) -> Performed {
    let left = text_frame(&Answer::Left(Left { reference, room: room.clone() }));
    let connection = subscriber.connection;
    services.hub.leave(room, connection, Some((subscriber, left))).await;
    Performed::Answered
}

pub(super) async fn history(
    services: Arc<Services>,
    subscriber: Arc<Subscriber>,
    reference: Option<Ref>,
    wanted: request::History,
) -> Performed {
    let (room, limit) = (wanted.room, wanted.limit);
    let range = match (wanted.before, wanted.after) {
        (_, Some(seq)) => Range::After { seq, limit },
        (Some(seq), None) => Range::Before { seq, limit },
        (None, None) => Range::Newest { limit },
    };
    let read = services.bus.read(room.clone(), range);
    let page = tokio::time::timeout(services.limits.wait_max, read).await;
    let (code, text) = match page {
        Ok(Ok(page)) => {
            subscriber.answer(&answer(reference, room, range, &page));
            return Performed::Answered;
        }
        Ok(Err(BusError::Refused)) => (ErrorCode::Internal, "the log could not be read"),
        Ok(Err(BusError::Unavailable | BusError::Overloaded)) | Err(_) => {
            (ErrorCode::Unavailable, "the bus is away; ask again later")
        }
    };
    let refusal = refusal(reference, "history", Some(&room), code, text);
    let refusal = if code.is_retryable() { after(refusal, RETRY_AFTER) } else { refusal };
    refuse(&services, &subscriber, refusal);
    Performed::Answered
}

/// The `history` frame of a page, and whether more is there in the direction asked for.
fn answer(
    reference: Option<Ref>,
    room: RoomId,
    range: Range,
    page: &Page,
) -> Answer<Box<serde_json::value::RawValue>> {
    let entries = &page.entries;
    let (messages, more) = if range.keeps_newest() {
        let mut messages = whole_frames(entries.iter().rev());
        messages.reverse();
        let first = entries.get(entries.len() - messages.len());
        let more = first.is_some_and(|first| page.oldest < first.position.seq);
        (messages, more)
    } else {
        let messages = whole_frames(entries.iter());
        let last = messages.len().checked_sub(1).map(|last| &entries[last]);
        let more = last.is_some_and(|last| last.position.seq < page.top);
        (messages, more)
    };
    let epoch = page.epoch.clone();
    Answer::History(Box::new(History { reference, room, epoch, messages, more }))
}
