//! Enqueues control commands, applies them on this node, and reports on how many nodes they were
//! applied.

use std::{sync::Arc, time::Duration};

use serde_json::{json, value::RawValue};
use skein_protocol::{
    close::CloseCode,
    ids::{ConnectionId, NodeId, RoomId, UserId},
    position::Position,
    protocol::server_frame::{BroadcastFrame, ServerFrame},
};
use tokio::{sync::watch, time::Instant};

use crate::{
    bus::{
        BusError,
        commands::{
            CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue, NodeQuery,
            QueuedCommand,
        },
        sessions::{SessionHolder, SessionSelector, SessionStore},
    },
    connection::{handle::ConnectionHandle, outbox::Close},
    drain::Tasks,
    hub::{Hub, presence::wire_time},
    presence::PresenceTracker,
    telemetry::{metrics::Metrics, top::InputCounts, trail::MessageTrails},
};

/// How long the sender of a command waits for all nodes to apply it.
const APPLY_MAX: Duration = Duration::from_secs(2);
/// How often sessions are verified at least: a takeover that this node did not hear of is found by
/// then.
const SESSION_CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// How often the progress of a command is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Enqueues and applies control commands. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    /// This node.
    pub node: NodeId,
    /// The queue of commands to all nodes.
    pub queue: Arc<dyn ControlQueue>,
    /// The store of sessions.
    pub sessions: Arc<dyn SessionStore>,
    /// The rooms of this node's connections.
    pub hub: Hub,
    /// The presence of this node's connections.
    pub presence: Arc<PresenceTracker>,
    /// The node's metrics.
    pub metrics: Arc<Metrics>,
    /// The message trails of this node.
    pub trails: Arc<MessageTrails>,
    /// How long a call may wait for the bus.
    pub timeout: Duration,
    /// Reloads the configuration of this node for the caller named by its argument. Returns what
    /// that did, as JSON.
    pub reload: Arc<dyn Fn(&str) -> serde_json::Value + Send + Sync>,
    /// Whether a command drains this node.
    pub draining: Arc<watch::Sender<bool>>,
}

impl Control {
    /// Starts the task that applies commands on this node.
    pub fn start(&self, tasks: &Tasks) {
        let (worker, stopped) = (self.clone(), tasks.stopped().clone());
        tasks.spawn_service("control", async move {
            // All arms are cancel-safe: a node that ends does not have to apply the remaining
            // commands.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = worker.apply_all() => {}
                () = worker.keep_sessions_alive() => {}
            }
        });
    }

    /// Enqueues a command, and waits at most `APPLY_MAX` for all nodes to apply it.
    ///
    /// # Errors
    ///
    /// [`BusError`]: whether the command was enqueued is unknown.
    pub async fn execute(&self, command: ControlCommand) -> Result<CommandProgress, BusError> {
        Ok(self.enqueue_and_wait(command).await?.1)
    }

    async fn enqueue_and_wait(
        &self,
        command: ControlCommand,
    ) -> Result<(CommandId, CommandProgress), BusError> {
        let queued = async {
            let id = self.queue.enqueue(command).await?;
            let until = Instant::now() + APPLY_MAX;
            loop {
                let progress = self.queue.progress(id).await?;
                if progress.applied >= progress.nodes || Instant::now() >= until {
                    return Ok((id, progress));
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        self.with_timeout(queued).await
    }

    /// The result of `call`, unless it takes longer than `timeout`.
    async fn with_timeout<T>(
        &self,
        call: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        let call = tokio::time::timeout(self.timeout, call).await;
        call.unwrap_or(Err(BusError::Unavailable))
    }

    /// Closes connections of a user, and revokes their sessions unless `keep_sessions`.
    ///
    /// # Errors
    ///
    /// [`BusError`]: whether that was done is unknown.
    pub async fn close(
        &self,
        user: UserId,
        selector: SessionSelector,
        keep_sessions: bool,
        close: Close,
    ) -> Result<CommandProgress, BusError> {
        if !keep_sessions {
            // First, so that a client that reconnects at once finds its session revoked.
            self.with_timeout(self.sessions.revoke(user.clone(), selector)).await?;
        }
        let Close { code, reason } = close;
        self.execute(ControlCommand::Close { user, which: selector, code, reason }).await
    }

    /// Queries all nodes. A node that does not reply in time is not waited for.
    ///
    /// # Errors
    ///
    /// [`BusError`].
    pub async fn query_nodes(
        &self,
        query: NodeQuery,
    ) -> Result<(Vec<String>, CommandProgress), BusError> {
        let (id, progress) = self.enqueue_and_wait(ControlCommand::Ask(query)).await?;
        Ok((self.with_timeout(self.queue.replies(id)).await?, progress))
    }

    /// Applies commands, for ever.
    async fn apply_all(&self) {
        loop {
            let CommandBatch { commands, missed } = self.queue.poll().await;
            if missed {
                self.close_revoked().await;
            }
            for queued in commands {
                let id = queued.id;
                self.apply(queued).await;
                while self.queue.mark_applied(id).await.is_err() {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    /// Verifies all sessions of this node now and then, which extends their retention, for ever.
    async fn keep_sessions_alive(&self) {
        let every = (self.sessions.ttl() / 4).min(SESSION_CHECK_INTERVAL);
        loop {
            tokio::time::sleep(every).await;
            for handle in self.hub.connections(None).await {
                self.verify_session(&handle).await;
            }
        }
    }

    /// Closes a connection whose session another connection has taken over without this node having
    /// heard of it. A session that does not exist may be among those that Redis lost, and stays.
    async fn verify_session(&self, handle: &ConnectionHandle) {
        let Some(owner) = handle.owner() else { return };
        let holder = self.sessions.holder(owner.user.clone(), owner.session, handle.connection);
        if let Ok(SessionHolder::Another) = holder.await {
            let (code, reason) = (CloseCode::SessionReplaced.number(), String::new());
            handle.outbox.close(Close { code, reason });
        }
    }

    async fn apply(&self, QueuedCommand { id, at, is_fresh, command }: QueuedCommand) {
        match command {
            ControlCommand::Close { user, which, code, reason } => {
                self.hub.close(&user, which, at, Close { code, reason }).await;
            }
            ControlCommand::Remove { room, user } => self.hub.remove(room, user, at).await,
            ControlCommand::Drain { node } if node == self.node => {
                self.draining.send_replace(true);
            }
            ControlCommand::CancelDrain { node } if node == self.node => {
                self.draining.send_replace(false);
            }
            ControlCommand::Broadcast { id, payload, timestamp } if is_fresh => {
                let Ok(payload) = serde_json::from_str(&payload) else { return };
                let broadcast = Box::new(BroadcastFrame { id, payload, timestamp });
                let frame = ServerFrame::<Box<RawValue>>::Broadcast(broadcast);
                let Ok(json) = serde_json::to_vec(&frame) else { return };
                self.hub.broadcast(json.into()).await;
            }
            ControlCommand::Ask(NodeQuery::Reload { node: Some(node), .. })
                if node != self.node => {}
            ControlCommand::Ask(query) if is_fresh => {
                let reply = self.answer_query(query).await.to_string();
                if let Err(error) = self.queue.reply(id, reply).await {
                    tracing::debug!(%error, "cannot reply to a node query");
                }
            }
            ControlCommand::Drain { .. }
            | ControlCommand::CancelDrain { .. }
            | ControlCommand::Broadcast { .. }
            | ControlCommand::Ask(_) => {}
        }
    }

    /// Closes connections whose session was revoked, after the queue has dropped commands that this
    /// node had not polled.
    async fn close_revoked(&self) {
        tracing::warn!(
            "control commands expired while this node was disconnected; closing connections with revoked sessions"
        );
        for handle in self.hub.connections(None).await {
            let Some(owner) = handle.owner() else { continue };
            let Ok(session) = self.sessions.list(owner.user.clone()).await else { continue };
            if !session.iter().any(|session| session.session == owner.session) {
                handle.outbox.close(kicked());
            }
        }
    }

    async fn answer_query(&self, query: NodeQuery) -> serde_json::Value {
        match query {
            NodeQuery::User { user } => {
                let connections = self.hub.connections(Some(&user)).await;
                let connections: Vec<_> =
                    connections.iter().filter_map(|connection| self.info_of(connection)).collect();
                json!({ "connections": connections, "rooms": self.presence.rooms_of(&user) })
            }
            NodeQuery::Node => {
                let connections = self.hub.connections(None).await.len();
                json!({
                    "node": self.node,
                    "connections": connections,
                    "draining": *self.draining.borrow(),
                    "rooms": self.metrics.rooms.get(),
                    "publishes": self.metrics.publishes.sum(),
                    "deliveries": self.metrics.deliveries.get(),
                })
            }
            NodeQuery::Top { by, limit } => {
                let (users, addresses) =
                    self.metrics.senders.top(by, limit as usize, Instant::now());
                let row = |key: &str, name: String, counts: InputCounts| {
                    let InputCounts { frames, bytes, refusals } = counts;
                    json!({ key: name, "frames": frames, "bytes": bytes, "refusals": refusals })
                };
                let users = users.into_iter();
                let users: Vec<_> =
                    users.map(|(user, counts)| row("user", user.to_string(), counts)).collect();
                let addresses = addresses.into_iter();
                let addresses: Vec<_> = addresses
                    .map(|(address, counts)| row("address", address.to_string(), counts))
                    .collect();
                json!({ "node": self.node, "users": users, "addresses": addresses })
            }
            NodeQuery::Reload { by, .. } => (self.reload)(&by),
            NodeQuery::Trail { id, user } => {
                let mut logs = Vec::new();
                for trail in self.trails.of(id) {
                    let mut report = trail.to_json();
                    if let Some(user) = &user {
                        report["user"] =
                            self.delivery_state(trail.log, user.clone(), &trail.position).await;
                    }
                    logs.push(report);
                }
                json!({ "node": self.node, "logs": logs })
            }
        }
    }

    /// Why a user has received an entry here, or has not.
    async fn delivery_state(&self, log: RoomId, user: UserId, at: &Position) -> serde_json::Value {
        let connections = self.hub.cursors(log, user).await;
        let connection = |(id, cursor): &(ConnectionId, Position)| {
            let fate = match cursor.epoch == at.epoch {
                true if cursor.seq >= at.seq => "queued, or published before the connection joined",
                true => "lagging: read from the log",
                false => "the log continues in another epoch",
            };
            json!({ "connection_id": id, "fate": fate, "epoch": cursor.epoch, "seq": cursor.seq })
        };
        let why = connections.is_empty().then_some("the user has no connection to this node");
        let connections: Vec<_> = connections.iter().map(connection).collect();
        json!({ "connections": connections, "why": why })
    }

    fn info_of(&self, handle: &ConnectionHandle) -> Option<serde_json::Value> {
        let owner = handle.owner()?;
        let about = &owner.about;
        Some(json!({
            "connection_id": handle.connection,
            "session_id": owner.session,
            "node": self.node,
            "address": about.address,
            "user_agent": about.user_agent,
            "connected_at": wire_time(owner.since / 1000),
            "last_seen": wire_time(handle.health.last_activity()),
            "rtt_ms": handle.health.rtt_ms(),
            "queued_bytes": handle.outbox.bytes(),
            "lagging": handle.outbox.is_lagging(),
        }))
    }
}

/// The close of a connection that the application closes without a reason.
pub fn kicked() -> Close {
    Close { code: CloseCode::PolicyViolation.number(), reason: "kicked".to_owned() }
}
