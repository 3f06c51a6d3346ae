//! The commands of a shard and the options of the hub.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::{Position, Seq},
    protocol::FrameRef,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    join::PendingJoin,
    presence::{PageRequest, PresenceQuery},
};
use crate::{
    bus::{
        Bus, BusError,
        presence_store::{OnlineStatus, PresenceSnapshot},
        sessions::{SessionSelector, UnixMicros},
    },
    connection::{handle::ConnectionHandle, outbox::Close},
    delivery::page::LogPage,
    drain::Tasks,
    presence::PresenceTracker,
    rooms::RoomRules,
    telemetry::{metrics::Metrics, traces::Tracer, trail::MessageTrails},
};

/// The pause before a failed read is repeated.
pub(super) const READ_RETRY_DELAY: Duration = Duration::from_millis(250);

/// The parts of the node that the hub uses.
#[derive(Clone)]
pub struct HubServices {
    /// The bus.
    pub bus: Arc<dyn Bus>,
    /// The presence of this node's connections.
    pub presence: Arc<PresenceTracker>,
    /// Rules that apply to rooms by name.
    pub rules: Arc<RoomRules>,
    /// The node's metrics.
    pub metrics: Arc<Metrics>,
    /// The message trails of this node.
    pub trails: Arc<MessageTrails>,
    /// Traces the fan-out of traced messages.
    pub tracer: Tracer,
}

/// The bounds of the hub, for a whole node.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The most bytes in the rings of all rooms.
    pub ring_bytes_max: usize,
    /// The most bytes of message ids in all dedup windows.
    pub dedup_ids_bytes_max: usize,
    /// The time for which the id of a message is remembered.
    pub dedup_window: Duration,
    /// Retention of an idle room's log.
    pub log_ttl: Duration,
    /// The most rooms that a node is subscribed to, not counting inboxes. Further joins are
    /// rejected.
    pub rooms_max: usize,
    /// The most rooms and inboxes without members that a node stays subscribed to.
    pub empty_rooms_max: usize,
    /// The most users whose status the node watches.
    pub watched_users_max: usize,
}

/// Starts the tasks of a shard, each of which puts its result into the shard's queue.
#[derive(Clone)]
pub(super) struct ShardTasks {
    tasks: Tasks,
    commands: mpsc::Sender<ShardCommand>,
}

impl ShardTasks {
    pub(super) fn new(tasks: Tasks, commands: mpsc::Sender<ShardCommand>) -> Self {
        Self { tasks, commands }
    }

    /// Cancelled when the shard must stop.
    pub(super) fn stopped(&self) -> &CancellationToken {
        self.tasks.stopped()
    }

    /// Starts a task, which ends without a result when the shard must stop.
    pub(super) fn spawn(
        &self,
        name: &'static str,
        result: impl Future<Output = ShardCommand> + Send + 'static,
    ) {
        let (stopped, commands) = (self.stopped().clone(), self.commands.clone());
        self.tasks.spawn_job(name, async move {
            // Both arms are cancel-safe: after the stop the result is not needed.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                command = result => drop(commands.send(command).await),
            }
        });
    }
}

/// A command to the task of a shard.
pub(super) enum ShardCommand {
    Join(RoomId, PendingJoin),
    Leave {
        room: RoomId,
        connection: ConnectionId,
        /// Sent to the connection after the last entry; encoded for its outbox.
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
    /// The frame as JSON text.
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
        /// `Some`: report the current status immediately, echoing this `ref`.
        report_now: Option<Option<FrameRef>>,
        /// Receives the users that exceed the limit of watched users.
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
    PresentAfter {
        room: RoomId,
        request: PageRequest,
    },
    RostersRead {
        rooms: Vec<(RoomId, u64)>,
        snapshots: Vec<PresenceSnapshot>,
    },
    HeadsRead {
        rooms: Vec<(RoomId, u64)>,
        read_era: u64,
        heads: Vec<Option<Position>>,
    },
    LogRead {
        request: LogReadRequest,
        result: Result<LogPage, BusError>,
    },
}

/// A read of a log.
pub(super) struct LogReadRequest {
    pub(super) room: RoomId,
    /// The number of the room's subscription.
    pub(super) subscription: u64,
    /// The shard's read era when the read began. A result of an earlier era may come from a
    /// Redis server that the cluster has abandoned.
    pub(super) read_era: u64,
    pub(super) purpose: ReadPurpose,
}

/// The purpose of a log read.
pub(super) enum ReadPurpose {
    /// Open the room: subscribe to it, then read its log.
    Open,
    /// Continue the replica from its top.
    Continue,
    /// Complete a join.
    Join(PendingJoin),
    /// Catch up members that are behind, from after this number.
    CatchUp(Seq),
}
