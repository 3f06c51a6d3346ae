//! What is of one user: `history` with another, who is watched, what the session holds.

use std::collections::BTreeSet;

use serde::Deserialize;
use shared::{
    error::ErrorCode,
    ids::{RoomId, SessionId, UserId},
    protocol::{
        answer::{Answer, History, Session},
        request::{self, HISTORY_LIMIT_MAX, SessionSet},
    },
};

use super::{
    Performed,
    perform::{Asked, range_of},
};
use crate::{
    bus::{BusError, Range, sessions::DataError},
    delivery::Entry,
    hub::join::history as whole_frames,
    telemetry::metrics::DurableBound,
};

/// The most reads of an inbox for one `history`: it has some 1,000 entries.
const PAGES_MAX: usize = 64;

/// Whom a direct is from and for.
#[derive(Deserialize)]
struct Ends {
    from: From,
    to: UserId,
}

#[derive(Deserialize)]
struct From {
    id: UserId,
}

/// Whether an entry of `user`'s inbox is a direct to or from `with`.
fn is_between(entry: &Entry, user: &UserId, with: &UserId) -> bool {
    let members = [b"{", entry.envelope.members(), b"}"].concat();
    // Notifications are from and for nobody.
    serde_json::from_slice::<Ends>(&members).is_ok_and(|Ends { from, to }| {
        (&from.id, &to) == (user, with) || (&from.id, &to) == (with, user)
    })
}

/// What a user has exchanged with another: a part of the inbox.
pub(super) async fn history(
    asked: Asked,
    user: UserId,
    with: UserId,
    wanted: request::History,
) -> Performed {
    let (inbox, limit) = (RoomId::inbox_of(&user), wanted.limit as usize);
    let mut range = range_of(&request::History { limit: HISTORY_LIMIT_MAX, ..wanted });
    let backwards = range.keeps_newest();
    // In the direction asked for, and one more than that.
    let reading = async {
        let mut found: Vec<Entry> = Vec::new();
        for pages in 1.. {
            let mut page = asked.services.bus.read(inbox.clone(), range).await?;
            if backwards {
                page.entries.reverse();
            }
            let last = page.entries.last().map(|last| last.position.seq);
            let between = page.entries.into_iter().filter(|entry| is_between(entry, &user, &with));
            found.extend(between.take(limit + 1 - found.len()));
            let next = last.filter(|_| found.len() <= limit);
            let Some(seq) = next.filter(|_| pages < PAGES_MAX) else {
                return Ok((found, page.epoch, next.is_some()));
            };
            let limit = range.limit();
            range = match backwards {
                true => Range::Before { seq, limit },
                false => Range::After { seq, limit },
            };
        }
        Err(BusError::Refused)
    };
    let (found, epoch, unread) = match asked.wait(reading).await {
        Ok(read) => read,
        Err((code, text)) => {
            asked.refuse("history", None, code, text);
            return Performed::Answered;
        }
    };
    let mut messages = whole_frames(found.iter().take(limit));
    let more = messages.len() < found.len() || unread;
    if backwards {
        messages.reverse();
    }
    let (reference, with) = (asked.reference.clone(), Some(with));
    let history = History { reference, room: None, with, epoch, messages, more };
    asked.answer(&Answer::History(Box::new(history)));
    Performed::Answered
}

pub(super) async fn watch(asked: Asked, users: BTreeSet<UserId>) -> Performed {
    let asks = Some(asked.reference.clone());
    let refused = asked.services.hub.watch(users, &asked.subscriber, asks).await;
    if !refused.is_empty() {
        let count = refused.len();
        let text = format!(
            "this node watches as many users as it may (hub.watched_users_max): {count} of these are \
             not watched"
        );
        asked.refuse("watch", None, ErrorCode::LimitReached, &text);
    }
    Performed::NotWatched(refused)
}

pub(super) async fn unwatch(asked: Asked, users: Vec<UserId>) -> Performed {
    asked.services.hub.unwatch(users, asked.subscriber.connection).await;
    Performed::Answered
}

/// Has a user watched whom this connection talks to: told of changes only.
pub(super) async fn meet(asked: Asked, user: UserId) -> Performed {
    Performed::NotWatched(asked.services.hub.watch([user], &asked.subscriber, None).await)
}

pub(super) async fn session(
    asked: Asked,
    user: UserId,
    session: SessionId,
    set: Option<SessionSet>,
) -> Performed {
    let kind = if set.is_some() { "session_set" } else { "session_get" };
    let change = set.map(|set| set.data);
    let data = asked.services.sessions.data(user, session, change);
    // Its own refusals are no failures of the store.
    let data = async {
        match data.await {
            Err(DataError::Bus(error)) => Err(error),
            other => Ok(other),
        }
    };
    match asked.wait(data).await {
        Ok(Ok(data)) => {
            let reference = asked.reference.clone();
            asked.answer(&Answer::Session(Session { reference, data }));
        }
        Ok(Err(error)) => {
            let code = match error {
                DataError::NoSession => ErrorCode::NotFound,
                DataError::TooMuch(_) => {
                    asked.services.metrics.durable_refusals.of(DurableBound::SessionData).inc();
                    ErrorCode::LimitReached
                }
                _ => ErrorCode::TooLarge,
            };
            asked.refuse(kind, None, code, &error.to_string());
        }
        Err((code, text)) => drop(asked.refuse(kind, None, code, text)),
    }
    Performed::Answered
}
