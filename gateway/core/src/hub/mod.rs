//! The hub: which local connections are in which room, and the handing out of what arrives.
//!
//! Rooms are spread over shards; each shard is one task that owns its rooms, so that a room's
//! entries stay in order and nothing is locked. A batch takes what has gathered in the mailbox,
//! places each entry in the outboxes of the room's members as shared bytes, and at its end writes
//! to every touched socket once. Nothing here waits for a client or for the bus: reads of a log
//! are tasks that put their reply into the shard's own queue.
//!
//! A room is followed while it has members here, and for [`LINGER`] after.
//!
//! What to do with what arrives and what is read is decided in [`delivery`](crate::delivery); the hub
//! obeys. While the node may not pass anything on ([`Standing`](crate::bus::node_state::Standing)) it
//! drops what arrives, has joins wait, and compares all logs afterwards.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::{Position, Seq},
    protocol::FrameRef,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    bus::{
        Bus, BusError, Mailboxes, ShardReceiver,
        registry::{OnlineStatus, PresenceDetails, PresenceSnapshot},
        sessions::{SessionSelector, UnixMicros},
    },
    delivery::page::LogPage,
    drain::Tasks,
    outbox::Close,
    presence::PresenceTracker,
    rooms::RoomRules,
    telemetry::{metrics::Metrics, trail::MessageTrails},
};

pub mod member;
pub mod join;
mod room;
mod catch_up;
mod budget;
mod lingering;
mod shard;
mod log_reads;
mod status;
mod control;
pub mod presence;

use join::{JoinGrant, JoinStart, PendingJoin};
use member::ConnectionHandle;
use presence::PresenceQuery;
use shard::Shard;

/// How long a room without members is still followed, so that who reloads a page finds it.
pub const LINGER: Duration = Duration::from_secs(30);
/// The same of an inbox: long enough to come back after a cut, and not longer, since each user has one.
pub const INBOX_LINGER: Duration = Duration::from_secs(5);
/// How many commands may wait for a shard; more wait with their caller.
const QUEUE_LEN_MAX: usize = 4096;
/// How many entries a shard's mailbox holds; above it they are read from the log instead.
pub const MAILBOX_LEN: usize = 16_384;
/// How often the logs of rooms in which nothing arrives are compared with what was passed on. It
/// bounds every deafness that shows in no other way: twice this at most.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(5);

/// What the hub keeps.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The most that all rings hold together, in bytes.
    pub ring_bytes_max: usize,
    /// The most that the ids of the dedup window take, in bytes.
    pub ids_bytes_max: usize,
    /// How long the id of a message is known.
    pub dedup_window: Duration,
    /// How long the log of a room is kept in which nothing is said.
    pub log_ttl: Duration,
    /// The most rooms that a node follows, inboxes not counted. Joins of further ones are rejected.
    pub rooms_max: usize,
    /// The most rooms and inboxes without members that are still followed.
    pub lingering_rooms_max: usize,
    /// The most users who are watched.
    pub watched_users_max: usize,
}

/// A handle to the hub. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    shards: Arc<[mpsc::Sender<ShardCommand>]>,
    mailboxes: Mailboxes,
}

/// The room cannot be followed: the bus is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot subscribe to the room: the bus is unavailable")]
pub struct SubscribeFailed;

/// What became of a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JoinOutcome {
    /// The connection is a member.
    Member {
        /// What was read of the room's log for it.
        bytes_read: usize,
    },
    /// The room is not followed here, and the node follows as many as it may.
    TooManyRooms,
}

/// What a shard is request to do.
enum ShardCommand {
    Join(RoomId, PendingJoin),
    Leave {
        room: RoomId,
        connection: ConnectionId,
        /// Sent behind the last entry.
        reply: Option<(Arc<ConnectionHandle>, Bytes)>,
    },
    CancelJoin {
        room: RoomId,
        handle: Arc<ConnectionHandle>,
    },
    CatchUp {
        room: RoomId,
        connection: ConnectionId,
    },
    PresentAfter {
        room: RoomId,
        after: String,
        limit: usize,
        reply: oneshot::Sender<Vec<UserId>>,
    },
    CloseConnections {
        room: RoomId,
        which: SessionSelector,
        before: UnixMicros,
        close: Close,
        done: oneshot::Sender<()>,
    },
    RemoveUser {
        room: RoomId,
        user: UserId,
        before: UnixMicros,
        done: oneshot::Sender<()>,
    },
    Broadcast(Bytes),
    Connections {
        room: Option<RoomId>,
        reply: oneshot::Sender<Vec<Arc<ConnectionHandle>>>,
    },
    Cursors {
        room: RoomId,
        user: UserId,
        reply: oneshot::Sender<Vec<(ConnectionId, Position)>>,
    },
    Watch {
        users: Vec<UserId>,
        handle: Arc<ConnectionHandle>,
        /// Whether it is told at once, as the reply to what.
        asks: Option<Option<FrameRef>>,
        /// Hears for whom there was no place.
        rejected: oneshot::Sender<Vec<UserId>>,
    },
    Unwatch {
        users: Vec<UserId>,
        connection: ConnectionId,
    },
    RemoveConnection(ConnectionId),
    StatusesRead {
        users: Vec<UserId>,
        statuses: Vec<OnlineStatus>,
    },
    QueryPresence {
        room: RoomId,
        query: PresenceQuery,
    },
    RostersRead {
        rooms: Vec<(RoomId, u64)>,
        snapshots: Vec<PresenceSnapshot>,
    },
    HeadsRead {
        rooms: Vec<(RoomId, u64)>,
        read_generation: u64,
        heads: Vec<Option<Position>>,
    },
    LogRead {
        request: LogReadRequest,
        result: Result<LogPage, BusError>,
    },
}

/// A read of a log.
struct LogReadRequest {
    room: RoomId,
    /// Of the room's following.
    generation: u64,
    /// How often this node had lost its node_state: what was read before may be of a server that the
    /// others have left.
    read_generation: u64,
    purpose: ReadPurpose,
}

/// What a log was read for.
enum ReadPurpose {
    /// To open the room: it is subscribed to as well.
    Open,
    /// To go on from the top.
    Continue,
    /// To reply a join.
    Join(PendingJoin),
    /// To catch_up members that are behind, from here on.
    CatchUp(Seq),
}

impl Hub {
    /// Starts a task per mailbox.
    pub fn start(
        (bus, presence, rules): (&Arc<dyn Bus>, &Arc<PresenceTracker>, &Arc<RoomRules>),
        mailboxes: Mailboxes,
        messages: Vec<ShardReceiver>,
        options: HubOptions,
        telemetry: (&Arc<Metrics>, &Arc<MessageTrails>),
        tasks: &Tasks,
    ) -> Self {
        let shards = messages.len().max(1);
        let options = HubOptions {
            ring_bytes_max: options.ring_bytes_max / shards,
            ids_bytes_max: options.ids_bytes_max / shards,
            rooms_max: options.rooms_max.div_ceil(shards),
            lingering_rooms_max: options.lingering_rooms_max.div_ceil(shards),
            watched_users_max: options.watched_users_max.div_ceil(shards),
            ..options
        };
        let start = |messages: ShardReceiver| {
            let (commands, queue) = mpsc::channel(QUEUE_LEN_MAX);
            let services = (bus.clone(), presence.clone(), rules.clone());
            let telemetry = (telemetry.0.clone(), telemetry.1.clone());
            let options = options.clone();
            let shard =
                Shard::new(services, commands.clone(), &messages, options, telemetry, tasks);
            tasks.spawn_service("hub_shard", shard.run(queue, messages.messages));
            commands
        };
        Self { shards: messages.into_iter().map(start).collect(), mailboxes }
    }

    /// Makes a connection a member of a room that its user has `entered`. Resolves when `joined` has
    /// been sent, or the room is one too many.
    ///
    /// Who drops the future before it resolves has to [give up](Hub::cancel_join) or leave.
    ///
    /// # Errors
    ///
    /// [`SubscribeFailed`], and the connection is no member: the bus is away, or the room was deleted since
    /// its user has entered it.
    pub async fn join(
        &self,
        room: RoomId,
        handle: Arc<ConnectionHandle>,
        reference: Option<FrameRef>,
        start: JoinStart,
        grant: JoinGrant,
    ) -> Result<JoinOutcome, SubscribeFailed> {
        let (done, joined) = oneshot::channel();
        let (refreshed, lost, bytes_read) = (false, None, 0);
        let join =
            PendingJoin { handle, reference, start, grant, done, refreshed, lost, bytes_read };
        self.send(room.clone(), ShardCommand::Join(room, join)).await;
        joined.await.map_err(|_| SubscribeFailed)
    }

    /// Ends a membership, if there is one. `reply` is sent in any case, behind the last entry.
    pub async fn leave(
        &self,
        room: RoomId,
        connection: ConnectionId,
        reply: Option<(Arc<ConnectionHandle>, Bytes)>,
    ) {
        self.send(room.clone(), ShardCommand::Leave { room, connection, reply }).await;
    }

    /// Ends a membership that a join which was given up may have brought about all the same; its
    /// `joined` is then followed by `left`.
    pub async fn cancel_join(&self, room: RoomId, handle: Arc<ConnectionHandle>) {
        self.send(room.clone(), ShardCommand::CancelJoin { room, handle }).await;
    }

    /// Gives a member that is behind what its outbox has room for.
    pub async fn catch_up(&self, room: RoomId, connection: ConnectionId) {
        self.send(room.clone(), ShardCommand::CatchUp { room, connection }).await;
    }

    /// At most `limit` of those present in a room, as its members here know them, that follow `after`.
    pub async fn present_after(&self, room: RoomId, after: String, limit: usize) -> Vec<UserId> {
        let (reply, replied) = oneshot::channel();
        self.send(room.clone(), ShardCommand::PresentAfter { room, after, limit, reply }).await;
        replied.await.unwrap_or_default()
    }

    /// Closes connections of a user that were opened before a time, those of some sessions. Resolves
    /// when that is under way.
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
        // A shard that is gone has no connections.
        let _ = closed.await;
    }

    /// Takes those connections of a user out of a room that were opened before a time.
    pub async fn remove(&self, room: RoomId, user: UserId, before: UnixMicros) {
        let (done, removed) = oneshot::channel();
        self.send(room.clone(), ShardCommand::RemoveUser { room, user, before, done }).await;
        let _ = removed.await;
    }

    /// Sends a frame to every connection, once.
    pub async fn broadcast(&self, frame: Bytes) {
        for shard in &*self.shards {
            let _ = shard.send(ShardCommand::Broadcast(frame.clone())).await;
        }
    }

    /// The connections of a user, or all.
    pub async fn connections(&self, user: Option<&UserId>) -> Vec<Arc<ConnectionHandle>> {
        let room = user.map(RoomId::inbox_of);
        let mut connections = Vec::new();
        for (place, shard) in self.shards.iter().enumerate() {
            if room.as_ref().is_some_and(|room| self.mailboxes.shard_of(room) != place) {
                continue;
            }
            let (reply, replied) = oneshot::channel();
            let _ = shard.send(ShardCommand::Connections { room: room.clone(), reply }).await;
            connections.extend(replied.await.unwrap_or_default());
        }
        connections
    }

    /// How far the connections of a user are in a room or inbox.
    pub async fn cursors(&self, room: RoomId, user: UserId) -> Vec<(ConnectionId, Position)> {
        let (reply, replied) = oneshot::channel();
        self.send(room.clone(), ShardCommand::Cursors { room, user, reply }).await;
        replied.await.unwrap_or_default()
    }

    /// Has a connection told whether users are connected: now, where it `asks`, and on every change.
    /// Returns those for whom there was no place, since the node watches as many as it may.
    pub async fn watch(
        &self,
        users: impl IntoIterator<Item = UserId>,
        handle: &Arc<ConnectionHandle>,
        asks: Option<Option<FrameRef>>,
    ) -> Vec<UserId> {
        let mut replies = Vec::new();
        for (shard, users) in self.by_shard(users) {
            let (rejected, reply) = oneshot::channel();
            let (handle, asks) = (handle.clone(), asks.clone());
            let _ = shard.send(ShardCommand::Watch { users, handle, asks, rejected }).await;
            replies.push(reply);
        }
        let mut rejected = Vec::new();
        for reply in replies {
            // A shard is gone only when the process stops.
            rejected.extend(reply.await.unwrap_or_default());
        }
        rejected
    }

    /// Ends that.
    pub async fn unwatch(&self, users: impl IntoIterator<Item = UserId>, connection: ConnectionId) {
        for (shard, users) in self.by_shard(users) {
            let _ = shard.send(ShardCommand::Unwatch { users, connection }).await;
        }
    }

    /// Users with the shards that their statuses belong to.
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

    /// Ends all that a connection takes part in, whatever its session knew of that: its task panicked.
    /// It costs a look at every room.
    pub async fn remove_connection(&self, connection: ConnectionId) {
        for shard in &*self.shards {
            let _ = shard.send(ShardCommand::RemoveConnection(connection)).await;
        }
    }

    /// Sends a member `presence`: exactly who is present as far as members here were told, when that
    /// is at least the state of `details`.
    pub async fn send_presence(
        &self,
        room: RoomId,
        handle: Arc<ConnectionHandle>,
        reference: Option<FrameRef>,
        (after, limit): (String, usize),
        details: PresenceDetails,
    ) {
        let since = Instant::now();
        let query = PresenceQuery { handle, reference, after, limit, details, since };
        self.send(room.clone(), ShardCommand::QueryPresence { room, query }).await;
    }

    async fn send(&self, room: RoomId, command: ShardCommand) {
        // A shard is gone only when the process stops, and with it everything it would do.
        let _ = self.shards[self.mailboxes.shard_of(&room)].send(command).await;
    }
}
