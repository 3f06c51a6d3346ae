//! The online status of watched users.
//!
//! An event says only that a status has changed, and the status is then read: a late or repeated
//! event thus reports nothing wrong. All users to read in one batch are read together.

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
    commands::{READ_RETRY_DELAY, ShardCommand, ShardTasks},
    member::ShardBatch,
    presence::wire_time,
    rosters::IncompleteReads,
};
use crate::{
    bus::{Bus, presence_store::OnlineStatus},
    connection::{encoding::SharedFrame, handle::ConnectionHandle},
    presence::PresenceTracker,
    telemetry::metrics::Metrics,
};

/// The users whose status a connection on this shard watches.
pub(super) struct Statuses {
    watched: HashMap<UserId, WatchedUser>,
    watched_max: usize,
    /// The number of watched users at the last count.
    counted: usize,
    /// The users whose status is to be read.
    to_read: Vec<UserId>,
    bus: Arc<dyn Bus>,
    presence: Arc<PresenceTracker>,
    tasks: ShardTasks,
}

/// A watched user.
#[derive(Debug, Default)]
struct WatchedUser {
    watchers: HashMap<ConnectionId, StatusWatcher>,
    /// The status last reported to the watchers.
    reported: Option<bool>,
    /// Whether the node is subscribed to the status.
    subscribed: bool,
    /// The number of reads started.
    reads_started: u64,
    /// Whether a read is under way, and whether another one must follow it.
    reading: bool,
    again: bool,
}

#[derive(Debug)]
struct StatusWatcher {
    handle: Arc<ConnectionHandle>,
    /// The reads whose outcome is reported in any case, each with the `ref` to echo.
    pending: Vec<(u64, Option<FrameRef>)>,
}

impl WatchedUser {
    /// Requests a read. Returns whether it must be started, and its number.
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

impl Statuses {
    pub(super) fn new(
        watched_max: usize,
        bus: Arc<dyn Bus>,
        presence: Arc<PresenceTracker>,
        tasks: ShardTasks,
    ) -> Self {
        let (watched, to_read) = (HashMap::new(), Vec::new());
        Self { watched, watched_max, counted: 0, to_read, bus, presence, tasks }
    }

    /// Reports the status of a user to a connection on every change, and immediately if `asks` is
    /// set. `false`: the limit of watched users is reached.
    pub(super) fn watch(
        &mut self,
        user: UserId,
        handle: Arc<ConnectionHandle>,
        report_now: Option<Option<FrameRef>>,
    ) -> bool {
        if self.watched.len() >= self.watched_max && !self.watched.contains_key(&user) {
            return false;
        }
        let watch = self.watched.entry(user.clone()).or_default();
        let connection = handle.connection;
        watch.watchers.entry(connection).or_insert(StatusWatcher { handle, pending: Vec::new() });
        if report_now.is_none() && watch.reported.is_some() {
            return true;
        }
        // A user who has just connected must be visible, so an earlier status is not enough.
        let (begins, read) = watch.request_read();
        if let Some(reference) = report_now
            && let Some(watcher) = watch.watchers.get_mut(&connection)
        {
            watcher.pending.push((read, reference));
        }
        if begins {
            self.to_read.push(user);
        }
        true
    }

    /// Removes a watcher.
    pub(super) fn unwatch(&mut self, user: &UserId, connection: ConnectionId) {
        // A user without watchers is removed at the next tick, since a read may be starting now.
        if let Some(watch) = self.watched.get_mut(user) {
            watch.watchers.remove(&connection);
        }
    }

    /// Removes a connection from all watched users.
    pub(super) fn remove_connection(&mut self, connection: ConnectionId) {
        for watch in self.watched.values_mut() {
            watch.watchers.remove(&connection);
        }
    }

    /// Requests a read of a watched user's status after a change.
    pub(super) fn note_change(&mut self, room: &RoomId) {
        let Some(user) = room.user() else { return };
        if let Some(watch) = self.watched.get_mut(&user)
            && watch.request_read().0
        {
            self.to_read.push(user);
        }
    }

    /// Requests a read of all statuses, since changes may have been missed.
    pub(super) fn request_all(&mut self) {
        for (user, watch) in &mut self.watched {
            if watch.request_read().0 {
                self.to_read.push(user.clone());
            }
        }
    }

    /// Reads the requested statuses in a task, until it succeeds.
    pub(super) fn read_requested(&mut self) {
        let mut users = std::mem::take(&mut self.to_read);
        // Users without watchers are skipped.
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
        let (bus, presence) = (self.bus.clone(), self.presence.clone());
        self.tasks.spawn("read_statuses", async move {
            // Subscribe first, so that no change is missed between the two.
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
            ShardCommand::StatusesRead { users, statuses }
        });
    }

    /// Reports statuses that were read to the waiting watchers, and changes to all watchers.
    pub(super) fn apply(
        &mut self,
        users: Vec<UserId>,
        statuses: Vec<OnlineStatus>,
        reads: &mut IncompleteReads,
        batch: &mut ShardBatch,
    ) {
        let mut incomplete = false;
        for (user, status) in users.into_iter().zip(statuses) {
            let Some(watch) = self.watched.get_mut(&user) else { continue };
            watch.reading = false;
            // A user who seems offline may not have been reported by every node yet.
            if status.complete {
                reads.note_complete();
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
                let (answers, pending): (Vec<_>, _) = std::mem::take(&mut watcher.pending)
                    .into_iter()
                    .partition(|(at, _)| *at <= read);
                watcher.pending = pending;
                let is_answered = !answers.is_empty();
                for (_, reference) in answers {
                    watcher.handle.send(&status_frame(&user, &status, reference));
                }
                if changed && !is_answered {
                    let frame = frame.get_or_insert_with(|| {
                        SharedFrame::of(&status_frame(&user, &status, None))
                    });
                    watcher.handle.send_shared(frame);
                }
                if changed || is_answered {
                    batch.flush_later(&watcher.handle);
                }
            }
            if std::mem::take(&mut watch.again) && watch.request_read().0 {
                self.to_read.push(user);
            }
        }
        if incomplete {
            reads.note_incomplete(batch.retention.now);
        }
    }

    /// Removes users without watchers.
    pub(super) fn remove_unwatched(&mut self, metrics: &Metrics) {
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
        metrics.watched_users.add(self.watched.len() as i64 - self.counted as i64);
        self.counted = self.watched.len();
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
