//! The hub: the rooms of this node's connections, and the fan-out of received entries to them.
//!
//! Rooms are spread over shards. Each shard is one task that owns its rooms, so that a room's
//! entries stay in order and no lock guards a room. (The node's unconfirmed publishes, its lease
//! and its message trails are shared by all shards behind short locks.) A shard handles the
//! messages in its mailbox in batches: it queues each entry in the outboxes of the room's members
//! as shared bytes, and at the end of the batch writes to every affected socket once. The shard
//! waits neither for a client nor for the bus: a read of a log is a task of its own that puts its
//! result into the shard's queue.
//!
//! A node is subscribed to a room while the room has members on the node, and for [`LINGER`] after.
//!
//! The rules for received entries and for log reads are in [`delivery`](crate::delivery); the hub
//! executes them. While the node has no lease ([`NodeState`](crate::bus::node_state::NodeState)),
//! the hub drops received entries and lets joins wait. It compares all logs once the node has a
//! lease again.

use std::sync::Arc;

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::Position,
    protocol::FrameRef,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    bus::{
        Mailboxes, ShardReceiver,
        sessions::{SessionSelector, UnixMicros},
    },
    connection::{handle::ConnectionHandle, outbox::Close},
    delivery::join::{JoinPlan, JoinStart},
    drain::Tasks,
};

mod member;
mod members;
pub mod join;
mod catch_up;
pub mod presence;
mod room;
mod budget;
mod lingering;
mod rooms;
mod commands;
mod log_reads;
mod resync;
mod rosters;
mod status;
mod control;
mod shard;

pub use commands::{HubOptions, HubServices};
use commands::{ShardCommand, ShardTasks};
pub use join::JoinOutcome;
use join::{JoinGrant, PendingJoin};
pub use lingering::LINGER;
use presence::{PageRequest, PresenceQuery};
pub use resync::COMPARE_INTERVAL;
use shard::Shard;

/// The most commands that wait in a shard's queue; further callers wait.
const QUEUE_LEN_MAX: usize = 4096;
/// The most messages in a shard's mailbox; entries above it are dropped and read from the log.
pub const MAILBOX_LEN: usize = 16_384;

/// A handle to the hub. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    shards: Arc<[mpsc::Sender<ShardCommand>]>,
    mailboxes: Mailboxes,
}

/// The node cannot subscribe to the room, since the bus is unavailable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot subscribe to the room: the bus is unavailable")]
pub struct SubscribeFailed;

impl Hub {
    /// Starts one task per mailbox.
    pub fn start(
        services: &HubServices,
        mailboxes: Mailboxes,
        messages: Vec<ShardReceiver>,
        options: HubOptions,
        tasks: &Tasks,
    ) -> Self {
        let shards = messages.len().max(1);
        let options = HubOptions {
            ring_bytes_max: options.ring_bytes_max / shards,
            dedup_ids_bytes_max: options.dedup_ids_bytes_max / shards,
            rooms_max: options.rooms_max.div_ceil(shards),
            empty_rooms_max: options.empty_rooms_max.div_ceil(shards),
            watched_users_max: options.watched_users_max.div_ceil(shards),
            ..options
        };
        let start = |messages: ShardReceiver| {
            let (commands, queue) = mpsc::channel(QUEUE_LEN_MAX);
            let own = ShardTasks::new(tasks.clone(), commands.clone());
            let shard = Shard::new(services.clone(), &messages, &options, own);
            tasks.spawn_service("hub_shard", shard.run(queue, messages.messages));
            commands
        };
        Self { shards: messages.into_iter().map(start).collect(), mailboxes }
    }

    /// Makes a connection a member of a room. `grant` is the admission of its user. Resolves when
    /// `joined` has been queued, or when the room exceeds the limit of rooms.
    ///
    /// A caller that drops the future before it resolves must call [`Hub::cancel_join`] or leave.
    ///
    /// # Errors
    ///
    /// [`SubscribeFailed`] if the bus is unavailable or the room was deleted after the admission.
    /// The connection is then not a member.
    pub async fn join(
        &self,
        room: RoomId,
        handle: Arc<ConnectionHandle>,
        reference: Option<FrameRef>,
        start: JoinStart,
        grant: JoinGrant,
    ) -> Result<JoinOutcome, SubscribeFailed> {
        let (done, joined) = oneshot::channel();
        let plan = JoinPlan::new(start);
        let join = PendingJoin { handle, reference, plan, grant, done, bytes_read: 0 };
        self.send(room.clone(), ShardCommand::Join(room, join)).await;
        joined.await.map_err(|_| SubscribeFailed)
    }

    /// Ends a membership, if there is one. `reply` is sent in any case, after the last entry.
    pub async fn leave(
        &self,
        room: RoomId,
        connection: ConnectionId,
        reply: Option<(Arc<ConnectionHandle>, Bytes)>,
    ) {
        self.send(room.clone(), ShardCommand::Leave { room, connection, reply }).await;
    }

    /// Ends the membership that a cancelled join may have established; its `joined` is then
    /// followed by `left`.
    pub async fn cancel_join(&self, room: RoomId, handle: Arc<ConnectionHandle>) {
        self.send(room.clone(), ShardCommand::CancelJoin { room, handle }).await;
    }

    /// Delivers to a member that is behind as much as its outbox can take.
    pub async fn catch_up(&self, room: RoomId, connection: ConnectionId) {
        self.send(room.clone(), ShardCommand::CatchUp { room, connection }).await;
    }

    /// Closes the connections of a user that belong to `which` sessions and were opened before a
    /// time. Resolves when the closes are under way.
    pub async fn close(
        &self,
        user: &UserId,
        which: SessionSelector,
        before: UnixMicros,
        close: Close,
    ) {
        let (done, closed) = oneshot::channel();
        let room = RoomId::inbox_of(user);
        self.send(
            room.clone(),
            ShardCommand::CloseConnections { room, which, before, close, done },
        )
        .await;
        // A stopped shard has no connections.
        let _ = closed.await;
    }

    /// Removes those connections of a user from a room that were opened before a time.
    pub async fn remove(&self, room: RoomId, user: UserId, before: UnixMicros) {
        let (done, removed) = oneshot::channel();
        self.send(room.clone(), ShardCommand::RemoveUser { room, user, before, done }).await;
        let _ = removed.await;
    }

    /// Sends a frame, as JSON text, to every connection once.
    pub async fn broadcast(&self, json: Bytes) {
        for shard in &*self.shards {
            let _ = shard.send(ShardCommand::Broadcast(json.clone())).await;
        }
    }

    /// The connections of a user, or all connections.
    pub async fn connections(&self, user: Option<&UserId>) -> Vec<Arc<ConnectionHandle>> {
        let room = user.map(RoomId::inbox_of);
        let mut connections = Vec::new();
        for (index, shard) in self.shards.iter().enumerate() {
            if room.as_ref().is_some_and(|room| self.mailboxes.shard_of(room) != index) {
                continue;
            }
            let (reply, replied) = oneshot::channel();
            let _ = shard.send(ShardCommand::Connections { room: room.clone(), reply }).await;
            connections.extend(replied.await.unwrap_or_default());
        }
        connections
    }

    /// The messages that wait for all shards, and for the one that has most.
    pub fn waiting(&self) -> (usize, usize) {
        self.mailboxes.waiting()
    }

    /// The cursors of a user's connections in a room or an inbox.
    pub async fn cursors(&self, room: RoomId, user: UserId) -> Vec<(ConnectionId, Position)> {
        let (reply, replied) = oneshot::channel();
        self.send(room.clone(), ShardCommand::Cursors { room, user, reply }).await;
        replied.await.unwrap_or_default()
    }

    /// Reports the status of users to a connection on every change, and immediately if
    /// `report_now` is set. Returns the users that exceed the node's limit of watched users.
    pub async fn watch(
        &self,
        users: impl IntoIterator<Item = UserId>,
        handle: &Arc<ConnectionHandle>,
        report_now: Option<Option<FrameRef>>,
    ) -> Vec<UserId> {
        let mut replies = Vec::new();
        for (shard, users) in self.by_shard(users) {
            let (rejected, reply) = oneshot::channel();
            let (handle, report_now) = (handle.clone(), report_now.clone());
            let _ = shard.send(ShardCommand::Watch { users, handle, report_now, rejected }).await;
            replies.push(reply);
        }
        let mut rejected = Vec::new();
        for reply in replies {
            // A shard stops only with the process.
            rejected.extend(reply.await.unwrap_or_default());
        }
        rejected
    }

    /// Ends [`Hub::watch`] for a connection.
    pub async fn unwatch(&self, users: impl IntoIterator<Item = UserId>, connection: ConnectionId) {
        for (shard, users) in self.by_shard(users) {
            let _ = shard.send(ShardCommand::Unwatch { users, connection }).await;
        }
    }

    /// Groups users by the shard that owns their status.
    fn by_shard(
        &self,
        users: impl IntoIterator<Item = UserId>,
    ) -> impl Iterator<Item = (&mpsc::Sender<ShardCommand>, Vec<UserId>)> {
        let mut by_shard = vec![Vec::new(); self.shards.len()];
        for user in users {
            by_shard[self.mailboxes.shard_of(&RoomId::status_of(&user))].push(user);
        }
        self.shards.iter().zip(by_shard).filter(|(_, users)| !users.is_empty())
    }

    /// Removes a connection whose task has panicked from all rooms and watches, independent of its
    /// session's state. It scans every room.
    pub async fn remove_connection(&self, connection: ConnectionId) {
        for shard in &*self.shards {
            let _ = shard.send(ShardCommand::RemoveConnection(connection)).await;
        }
    }

    /// The users of a page of a room's roster: at most `limit` whose ids follow `after`, as this
    /// node's members know them. Waits until the roster was read, at most 2 s.
    pub async fn present_after(&self, room: RoomId, after: String, limit: usize) -> Vec<UserId> {
        let (reply, replied) = oneshot::channel();
        let request = PageRequest { after, limit, since: Instant::now(), reply };
        self.send(room.clone(), ShardCommand::PresentAfter { room, request }).await;
        // Dropped if the room is closed meanwhile.
        replied.await.unwrap_or_default()
    }

    /// Sends a member `presence`: exactly the users whom the members here were told about, once the
    /// roster has reached the version of the query's details.
    pub async fn send_presence(&self, room: RoomId, query: PresenceQuery) {
        self.send(room.clone(), ShardCommand::QueryPresence { room, query }).await;
    }

    async fn send(&self, room: RoomId, command: ShardCommand) {
        // A shard stops only with the process, and all its work with it.
        let _ = self.shards[self.mailboxes.shard_of(&room)].send(command).await;
    }
}
