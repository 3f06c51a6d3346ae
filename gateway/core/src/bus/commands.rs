//! Orders: what the application wants done on every node, at least once; and questions to all nodes.
//!
//! An order stands in one list that every node takes from, each from where it was, and tells up to
//! where it has applied it. So who gives one can say on how many of how many nodes it was, and a node
//! that was cut off applies it when it is back. An order concerns connections that are older than
//! itself: who has come back meanwhile stays.
//!
//! A question goes the same way, but is answered only by those who take it at once.
//!
//! Two implementations, as of the [bus](super): in memory and in Redis.

use serde::{Deserialize, Serialize};
use skein_protocol::ids::{MessageId, NodeId, RoomId, UserId};

use super::{BoxFuture, BusError, sessions::SessionSelector, sessions::UnixMicros};

/// Where an order stands: later ones are greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommandId(pub u64, pub u64);

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum ControlCommand {
    /// Close connections of a user.
    Close {
        /// Whose.
        user: UserId,
        /// Those of which sessions.
        which: SessionSelector,
        /// The close code.
        code: u16,
        /// The reason.
        reason: String,
    },
    /// Take a user out of a room.
    Remove {
        /// The room.
        room: RoomId,
        /// The user.
        user: UserId,
    },
    /// Have a node take no client any more, and send those it has to others.
    Drain {
        /// Which.
        node: NodeId,
    },
    /// Send something to every connection. At most once: who takes it late does not.
    Broadcast {
        /// Its id.
        id: MessageId,
        /// What it says, JSON.
        payload: String,
        /// When it was taken.
        timestamp: String,
    },
    /// Answer something. Who takes it late does not.
    Ask(NodeQuery),
}

/// What nodes are asked. The answer of each is JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum NodeQuery {
    /// Which connections a user has there, and in which rooms.
    User {
        /// The user.
        user: UserId,
    },
    /// How the node is.
    Node,
    /// What became of a message there.
    Trail {
        /// Its id.
        id: MessageId,
        /// Of whom it is asked in particular.
        user: Option<UserId>,
    },
}

/// An order that was given.
#[derive(Clone, Debug)]
pub struct QueuedCommand {
    /// Where it stands.
    pub id: CommandId,
    /// When it was given, by the clock of the store.
    pub at: UnixMicros,
    /// Whether it was given just now.
    pub is_fresh: bool,
    /// What is to be done.
    pub command: ControlCommand,
}

/// How many nodes have done what was ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CommandProgress {
    /// These.
    pub applied: usize,
    /// Of so many that live, or were heard of within the last minute.
    pub nodes: usize,
}

/// What a node finds to be done.
#[derive(Clone, Debug, Default)]
pub struct CommandBatch {
    /// Oldest first.
    pub commands: Vec<QueuedCommand>,
    /// Whether some were forgotten before this node has taken them: it was away for too long.
    pub missed: bool,
}

/// Where orders are kept. See the module.
pub trait ControlQueue: Send + Sync {
    /// Gives an order.
    fn enqueue(&self, order: ControlCommand) -> BoxFuture<Result<CommandId, BusError>>;

    /// Waits for orders that this node has not taken. One task calls this.
    fn poll(&self) -> BoxFuture<CommandBatch>;

    /// This node has applied everything up to `id`.
    fn mark_applied(&self, id: CommandId) -> BoxFuture<Result<(), BusError>>;

    /// This node's answer to a question.
    fn reply(&self, id: CommandId, answer: String) -> BoxFuture<Result<(), BusError>>;

    /// How many have applied an order by now.
    fn progress(&self, id: CommandId) -> BoxFuture<Result<CommandProgress, BusError>>;

    /// What was answered to a question by now.
    fn replies(&self, id: CommandId) -> BoxFuture<Result<Vec<String>, BusError>>;
}
