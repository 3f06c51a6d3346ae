//! Whether users are connected, for those who watch them.
//!
//! What is passed on says only that something has changed: the status is read then, so that what comes
//! late or twice tells nobody anything wrong. Users are read who were asked about in the same batch
//! together.

use std::{collections::HashMap, sync::Arc};

use futures_util::future::join_all;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    protocol::{
        FrameRef,
        server_frame::{OnlineState, ServerFrame, UserStatusFrame},
    },
};

use super::{
    ShardCommand,
    log_reads::READ_RETRY_DELAY,
    member::{ConnectionHandle, text_frame},
    presence::wire_time,
    shard::Shard,
};
use crate::bus::registry::OnlineStatus;

/// Users who are watched here.
pub(super) type WatchedUsers = HashMap<UserId, WatchedUser>;

/// A user who is watched.
#[derive(Debug, Default)]
pub(super) struct WatchedUser {
    watchers: HashMap<ConnectionId, StatusWatcher>,
    /// What they were told last.
    reported: Option<bool>,
    /// Whether the status is subscribed.
    subscribed: bool,
    /// How many reads were reads_started.
    reads_started: u64,
    /// Whether one is under way, and whether another has to subscribe.
    reading: bool,
    again: bool,
}

#[derive(Debug)]
struct StatusWatcher {
    handle: Arc<ConnectionHandle>,
    /// The reads whose outcome it is told in any case, and as the answers to what.
    waits: Vec<(u64, Option<FrameRef>)>,
}

impl WatchedUser {
    /// A connection is not told any more.
    pub(super) fn remove(&mut self, connection: ConnectionId) {
        self.watchers.remove(&connection);
    }

    /// The status is to be read. Returns whether that is to be reads_started, and the number of the read.
    fn request_read(&mut self) -> (bool, u64) {
        if self.reading {
            self.again = true;
            return (false, self.reads_started + 1);
        }
        self.reading = true;
        self.reads_started += 1;
        (true, self.reads_started)
    }
}

impl Shard {
    /// Has a connection told whether a user is connected: now, where it `asks`, and on every change.
    /// `false`: as many users are watched as may be.
    pub(super) fn watch(
        &mut self,
        user: UserId,
        handle: Arc<ConnectionHandle>,
        asks: Option<Option<FrameRef>>,
    ) -> bool {
        if self.watched.len() >= self.watched_users_max && !self.watched.contains_key(&user) {
            return false;
        }
        let watch = self.watched.entry(user.clone()).or_default();
        let connection = handle.connection;
        watch.watchers.entry(connection).or_insert(StatusWatcher { handle, waits: Vec::new() });
        if asks.is_none() && watch.reported.is_some() {
            return true;
        }
        // Who has just connected is to be seen: what was known before is not enough.
        let (begins, read) = watch.request_read();
        if let Some(reference) = asks
            && let Some(watcher) = watch.watchers.get_mut(&connection)
        {
            watcher.waits.push((read, reference));
        }
        if begins {
            self.statuses_to_read.push(user);
        }
        true
    }

    /// Ends that.
    pub(super) fn unwatch(&mut self, user: &UserId, connection: ConnectionId) {
        // What nobody watches is forgotten at the next look around: it may be asked for at this moment.
        if let Some(watch) = self.watched.get_mut(user) {
            watch.remove(connection);
        }
    }

    /// Something has changed for a user who may be watched.
    pub(super) fn status_changed(&mut self, room: &RoomId) {
        let Some(user) = room.user() else { return };
        if let Some(watch) = self.watched.get_mut(&user)
            && watch.request_read().0
        {
            self.statuses_to_read.push(user);
        }
    }

    /// Changes may have been missed.
    pub(super) fn reread_statuses(&mut self) {
        for (user, watch) in &mut self.watched {
            if watch.request_read().0 {
                self.statuses_to_read.push(user.clone());
            }
        }
    }

    /// Reads what is due, in a task, until it is known.
    pub(super) fn read_statuses(&mut self) {
        let mut users = std::mem::take(&mut self.statuses_to_read);
        // Whom nobody watches any more is not asked about.
        users.retain(|user| {
            let Some(watch) = self.watched.get_mut(user) else { return false };
            watch.reading = !watch.watchers.is_empty();
            watch.again &= watch.reading;
            watch.reading
        });
        if users.is_empty() {
            return;
        }
        let subscribe = users.iter().filter(|user| {
            let watch = self.watched.get_mut(*user);
            watch.is_some_and(|watch| !std::mem::replace(&mut watch.subscribed, true))
        });
        let subscribe: Vec<RoomId> = subscribe.map(RoomId::status_of).collect();
        let (bus, presence, commands) =
            (self.bus.clone(), self.presence.clone(), self.commands.clone());
        self.spawn("read_statuses", async move {
            // Followed first, so that no change falls between the two.
            join_all(subscribe.into_iter().map(async |room| {
                while bus.subscribe(room.clone()).await.is_err() {
                    tokio::time::sleep(READ_RETRY_DELAY).await;
                }
            }))
            .await;
            let statuses = loop {
                match presence.statuses(users.clone()).await {
                    Ok(statuses) => break statuses,
                    Err(_) => tokio::time::sleep(READ_RETRY_DELAY).await,
                }
            };
            let _ = commands.send(ShardCommand::StatusesRead { users, statuses }).await;
        });
    }

    /// Tells what was read to those who wait for it, and what has changed to all.
    pub(super) fn apply_statuses(&mut self, users: Vec<UserId>, statuses: Vec<OnlineStatus>) {
        let mut incomplete = false;
        for (user, status) in users.into_iter().zip(statuses) {
            let Some(watch) = self.watched.get_mut(&user) else { continue };
            watch.reading = false;
            // Who seems to have gone may not have been told of yet.
            if status.complete {
                self.incomplete_reads = 0;
            } else {
                incomplete = true;
            }
            let seems_gone = !status.online && watch.reported == Some(true);
            let changed = watch.reported.is_some_and(|reported| reported != status.online)
                && (status.complete || !seems_gone);
            if changed || watch.reported.is_none() {
                watch.reported = Some(status.online);
            }
            let (mut frame, read) = (None, watch.reads_started);
            for watcher in watch.watchers.values_mut() {
                let (answers, waits): (Vec<_>, _) =
                    std::mem::take(&mut watcher.waits).into_iter().partition(|(at, _)| *at <= read);
                watcher.waits = waits;
                let is_told = !answers.is_empty();
                for (_, reference) in answers {
                    watcher.handle.send(&status_frame(&user, &status, reference));
                }
                if changed && !is_told {
                    let frame = frame
                        .get_or_insert_with(|| text_frame(&status_frame(&user, &status, None)));
                    watcher.handle.outbox.push(frame.clone());
                }
                if changed || is_told {
                    self.batch.flush_later(&watcher.handle);
                }
            }
            if std::mem::take(&mut watch.again) && watch.request_read().0 {
                self.statuses_to_read.push(user);
            }
        }
        if incomplete {
            self.note_completeness(false);
        }
    }

    /// Forgets users whom nobody watches any more.
    pub(super) fn remove_unwatched(&mut self) {
        let before = self.watched.len();
        self.watched.retain(|user, watch| {
            let is_watched = !watch.watchers.is_empty() || watch.reading;
            if !is_watched && watch.subscribed {
                self.bus.unsubscribe(RoomId::status_of(user));
            }
            is_watched
        });
        if self.watched.len() < before / 2 {
            self.watched.shrink_to_fit();
        }
        let (now, told) = (self.watched.len(), &mut self.watched_counted);
        self.batch.metrics.watched_users.add(now as i64 - *told as i64);
        *told = now;
    }
}

fn status_frame(
    user: &UserId,
    status: &OnlineStatus,
    reference: Option<FrameRef>,
) -> ServerFrame<Box<serde_json::value::RawValue>> {
    ServerFrame::UserStatus(UserStatusFrame {
        reference,
        user: user.clone(),
        status: if status.online { OnlineState::Online } else { OnlineState::Offline },
        last_active: status.active.map(wire_time),
    })
}
