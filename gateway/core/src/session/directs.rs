//! Execution of requests that concern one user: `history` with a user, `watch`, and session data.

use std::collections::{BTreeMap, BTreeSet};

use skein_protocol::{
    error::ErrorCode,
    ids::{RoomId, SessionId, UserId},
    position::{Epoch, Seq},
    protocol::{
        HISTORY_BYTES_MAX,
        client_frame::{self, HISTORY_LIMIT_MAX, SessionSetFrame},
        server_frame::{HistoryPageFrame, ServerFrame, SessionFrame},
    },
};
use tokio::time::timeout;

use super::{
    RequestOutcome,
    peer_index::InboxIndex,
    requests::{RequestContext, TOO_MUCH_READ, range_of},
};
use crate::{
    bus::{ReadRange, sessions::SessionDataError},
    delivery::{Entry, join::history as whole_frames, page::LogPage},
    telemetry::metrics::StorageLimit,
};

/// The most reads of an inbox for one `history`; an inbox has about 1,000 entries.
const PAGES_MAX: usize = 64;
/// The most bytes of an inbox kept during a search: usually enough for the whole reply.
const KEPT_BYTES_MAX: usize = 2 * HISTORY_BYTES_MAX;

type Rejection = (ErrorCode, &'static str);

/// The directs with a user that were found, and whether more exist.
struct FoundDirects {
    /// In the requested direction.
    entries: Vec<Entry>,
    epoch: Epoch,
    more: bool,
}

/// Executes `history` with a user: a part of the inbox.
pub(super) async fn history(
    context: RequestContext,
    user: UserId,
    with: UserId,
    wanted: client_frame::HistoryFrame,
) -> RequestOutcome {
    let range = range_of(&wanted);
    let FoundDirects { entries, epoch, more } = match find(&context, &user, &with, range).await {
        Ok(found) => found,
        Err((code, text)) => {
            context.reject("history", None, code, text);
            return RequestOutcome::Done;
        }
    };
    let mut messages = whole_frames(entries.iter());
    let more = more || messages.len() < entries.len();
    if range.keeps_newest() {
        messages.reverse();
    }
    let (reference, with) = (context.reference.clone(), Some(with));
    let history = HistoryPageFrame { reference, room: None, with, epoch, messages, more };
    context.send(&ServerFrame::History(Box::new(history)));
    RequestOutcome::Done
}

/// The next part of an inbox to read in search of directs: first up to the newest entry, then older
/// entries as long as more are wanted.
fn next_part(
    inbox: &InboxIndex,
    with: &UserId,
    range: ReadRange,
    is_newest: bool,
) -> Option<ReadRange> {
    if !is_newest {
        return Some(inbox.newer_range(HISTORY_LIMIT_MAX));
    }
    let is_fully_indexed = match range {
        ReadRange::After { seq, .. } => inbox.covers_after(seq),
        ReadRange::Newest { limit } | ReadRange::Before { limit, .. } => {
            inbox.directs_with(with, range, limit as usize + 1).len() > limit as usize
        }
    };
    if is_fully_indexed { None } else { inbox.older_range(HISTORY_LIMIT_MAX) }
}

/// Keeps the first directs that fit into a reply, and returns whether any were cut.
fn truncate_to_fit(mut found: Vec<(Seq, usize)>) -> (Vec<(Seq, usize)>, bool) {
    let mut bytes = 0;
    let above = found.iter().position(|(_, size)| {
        let is_first = bytes == 0;
        bytes += size;
        !is_first && bytes > HISTORY_BYTES_MAX
    });
    if let Some(above) = above {
        found.truncate(above);
    }
    (found, above.is_some())
}

/// Whether the index covers all of `range`.
fn is_fully_indexed(inbox: &InboxIndex, range: ReadRange) -> bool {
    match range {
        ReadRange::After { seq, .. } => inbox.covers_after(seq),
        ReadRange::Newest { .. } | ReadRange::Before { .. } => inbox.older_range(1).is_none(),
    }
}

/// Finds the directs with a user. The index remembers the peers, so that an inbox is searched once,
/// and later only the wanted entries are read.
async fn find(
    context: &RequestContext,
    user: &UserId,
    with: &UserId,
    range: ReadRange,
) -> Result<FoundDirects, Rejection> {
    let (room, limit) = (RoomId::inbox_of(user), range.limit() as usize);
    let shared = context.services.peer_index.of(user);
    // One `history` per user at a time: the next one finds the entries that this one has indexed.
    let wait_max = context.services.limits.wait_max;
    let _turn = timeout(wait_max, shared.exclusive.acquire()).await.map_err(|_| TOO_MUCH_READ)?;
    let (mut kept, mut kept_bytes) = (BTreeMap::new(), 0);
    let mut is_newest = false;
    for _ in 0..PAGES_MAX {
        let Some(part) = next_part(&shared.inbox.lock(), with, range, is_newest) else { break };
        let page =
            context.read(context.services.bus.read(room.clone(), part), LogPage::bytes).await?;
        let (added, reaches_newest, is_known) = {
            let inbox = &mut *shared.inbox.lock();
            let (added, reaches_newest) = inbox.apply(user, part, &page);
            (added, reaches_newest, inbox.epoch().is_some())
        };
        is_newest = if is_newest { is_known } else { reaches_newest };
        context.services.peer_index.note_added(&shared, added);
        if !is_known {
            kept.clear();
        }
        for entry in page.entries {
            let bytes = entry.envelope.as_bytes().len();
            if kept_bytes + bytes <= KEPT_BYTES_MAX {
                kept_bytes += bytes;
                kept.insert(entry.position.seq, entry);
            }
        }
    }
    let (epoch, found, more, parts) = {
        let inbox = shared.inbox.lock();
        let Some(epoch) = inbox.epoch().cloned().filter(|_| is_newest) else {
            return Err((
                ErrorCode::Unavailable,
                "the inbox changed during the search: try again later",
            ));
        };
        let mut found = inbox.directs_with(with, range, limit + 1);
        let more = found.len() > limit || !is_fully_indexed(&inbox, range);
        found.truncate(limit);
        let (found, is_cut) = truncate_to_fit(found);
        let missing = found.iter().filter(|(seq, _)| !kept.contains_key(seq));
        let missing: Vec<(Seq, usize)> = missing.copied().collect();
        (epoch, found, more || is_cut, inbox.ranges_for(&missing))
    };
    for part in parts {
        let page =
            context.read(context.services.bus.read(room.clone(), part), LogPage::bytes).await?;
        kept.extend(page.entries.into_iter().map(|entry| (entry.position.seq, entry)));
    }
    let entries = found.iter().filter_map(|(seq, _)| kept.remove(seq)).collect();
    Ok(FoundDirects { entries, epoch, more })
}

pub(super) async fn watch(context: RequestContext, users: BTreeSet<UserId>) -> RequestOutcome {
    let asks = Some(context.reference.clone());
    let refused = context.services.hub.watch(users, &context.handle, asks).await;
    if !refused.is_empty() {
        let count = refused.len();
        let text = format!(
            "the node's limit of watched users is reached (hub.watched_users_max): {count} of \
             these users are not watched"
        );
        context.reject("watch", None, ErrorCode::LimitReached, &text);
    }
    RequestOutcome::NotWatched(refused)
}

pub(super) async fn unwatch(context: RequestContext, users: Vec<UserId>) -> RequestOutcome {
    context.services.hub.unwatch(users, context.handle.connection).await;
    RequestOutcome::Done
}

pub(super) async fn session(
    context: RequestContext,
    user: UserId,
    session: SessionId,
    set: Option<SessionSetFrame>,
) -> RequestOutcome {
    let kind = if set.is_some() { "session_set" } else { "session_get" };
    let change = set.map(|set| set.data);
    let data = context.services.sessions.data(user, session, change);
    // Errors about the data itself are not failures of the store.
    let data = async {
        match data.await {
            Err(SessionDataError::Bus(error)) => Err(error),
            other => Ok(other),
        }
    };
    match context.read(data, |_| 0).await {
        Ok(Ok(data)) => {
            let reference = context.reference.clone();
            context.send(&ServerFrame::Session(SessionFrame { reference, data }));
        }
        Ok(Err(error)) => {
            let code = match error {
                SessionDataError::NoSession => ErrorCode::NotFound,
                SessionDataError::TooMuch(_) => {
                    context.services.metrics.storage_rejections.of(StorageLimit::SessionData).inc();
                    ErrorCode::LimitReached
                }
                _ => ErrorCode::TooLarge,
            };
            context.reject(kind, None, code, &error.to_string());
        }
        Err((code, text)) => drop(context.reject(kind, None, code, text)),
    }
    RequestOutcome::Done
}
