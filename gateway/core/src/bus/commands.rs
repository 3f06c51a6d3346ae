//! Control commands: instructions of the application to every node, applied at least once; and
//! queries to all nodes.
//!
//! A command is appended to one queue that every node polls from its own position, and each node
//! records up to where it has applied commands. The sender can therefore report how many of how
//! many nodes have applied it, and a node that was disconnected applies it when it is back. A
//! command concerns connections that are older than itself: a client that has reconnected meanwhile
//! stays.
//!
//! A query takes the same way, but only nodes that poll it at once reply.
//!
//! There are two implementations, as of the [bus](super): in memory, and in Redis (`skein-redis`).

use serde::{Deserialize, Serialize};
use skein_protocol::ids::{MessageId, NodeId, RoomId, UserId};

use super::{BoxFuture, BusError, sessions::SessionSelector, sessions::UnixMicros};
use crate::telemetry::top::InputOrder;

/// The position of a command in the queue: later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommandId(pub u64, pub u64);

/// An instruction to every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum ControlCommand {
    /// Closes connections of a user.
    Close {
        /// The user.
        user: UserId,
        /// The sessions whose connections are closed.
        which: SessionSelector,
        /// The close code.
        code: u16,
        /// The reason.
        reason: String,
    },
    /// Removes a user from a room.
    Remove {
        /// The room.
        room: RoomId,
        /// The user.
        user: UserId,
    },
    /// Lets a node accept no more clients and send its clients to other nodes.
    Drain {
        /// The node.
        node: NodeId,
    },
    /// Lets a node that was drained accept clients again.
    CancelDrain {
        /// The node.
        node: NodeId,
    },
    /// Sends a message to every connection. At most once: a node that polls it late skips it.
    Broadcast {
        /// The id of the message.
        id: MessageId,
        /// The payload, JSON.
        payload: String,
        /// When the gateway accepted it.
        timestamp: String,
    },
    /// Asks for a reply. A node that polls it late skips it.
    Ask(NodeQuery),
}

/// A query to all nodes. Each reply is JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum NodeQuery {
    /// Connections and rooms of a user on the node.
    User {
        /// The user.
        user: UserId,
    },
    /// State of the node.
    Node,
    /// The users and addresses that send most to the node.
    Top {
        /// The order.
        by: InputOrder,
        /// The most rows of each list.
        limit: u32,
    },
    /// Reload of the configuration, and what it did.
    Reload {
        /// The node that reloads; all nodes if absent.
        node: Option<NodeId>,
        /// Name of the API key of the caller, for the log.
        by: String,
    },
    /// Where the node has delivered a message.
    Trail {
        /// The id of the message.
        id: MessageId,
        /// The user whose deliveries are reported in detail.
        user: Option<UserId>,
    },
}

/// A command of the queue.
#[derive(Clone, Debug)]
pub struct QueuedCommand {
    /// Its position in the queue.
    pub id: CommandId,
    /// When it was enqueued, by the clock of the store.
    pub at: UnixMicros,
    /// Whether it was enqueued within the last seconds.
    pub is_fresh: bool,
    /// The command.
    pub command: ControlCommand,
}

/// How many nodes have applied a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CommandProgress {
    /// Nodes that have applied it.
    pub applied: usize,
    /// Nodes that are alive, or were within the last minute.
    pub nodes: usize,
}

/// The commands that one poll returns.
#[derive(Clone, Debug, Default)]
pub struct CommandBatch {
    /// The commands, oldest first.
    pub commands: Vec<QueuedCommand>,
    /// Whether the queue has dropped commands that this node has not polled: it was disconnected
    /// for too long.
    pub missed: bool,
}

/// The queue of control commands. The module documents its guarantees.
pub trait ControlQueue: Send + Sync {
    /// Appends a command to the queue.
    fn enqueue(&self, command: ControlCommand) -> BoxFuture<Result<CommandId, BusError>>;

    /// Waits for commands that this node has not polled yet. Called by a single task.
    fn poll(&self) -> BoxFuture<CommandBatch>;

    /// Records that this node has applied every command up to `id`.
    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>>;

    /// Replies to a query.
    fn reply(&self, id: CommandId, reply: String) -> BoxFuture<Result<(), BusError>>;

    /// How many nodes have applied a command so far.
    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>>;

    /// The replies to a query so far.
    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>>;
}
