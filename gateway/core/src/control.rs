//! Takes what the application orders, and does it on this node; and gives orders, telling on how many
//! nodes they were applied.

use std::{sync::Arc, time::Duration};

use serde_json::json;
use skein_protocol::{
    close::CloseCode,
    ids::{ConnectionId, NodeId, RoomId, UserId},
    position::Position,
    protocol::server_frame::{BroadcastFrame, ServerFrame},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    bus::{
        BusError,
        commands::{
            CommandBatch, CommandId, CommandProgress, ControlCommand, ControlQueue, NodeQuery,
            QueuedCommand,
        },
        sessions::{SessionHolder, SessionSelector, SessionStore},
    },
    drain::Tasks,
    hub::{
        Hub,
        member::{ConnectionHandle, text_frame},
        presence::wire_time,
    },
    outbox::Close,
    presence::PresenceTracker,
    telemetry::{metrics::Metrics, trail::MessageTrails},
};

/// How long who gives an order waits until all nodes have applied it.
const APPLY_MAX: Duration = Duration::from_secs(2);
/// How often at least sessions are looked after: what a node did not hear of one is found by then.
const SESSION_CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// How often it looks meanwhile.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Gives orders and applies them. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    node: NodeId,
    queue: Arc<dyn ControlQueue>,
    sessions: Arc<dyn SessionStore>,
    hub: Hub,
    presence: Arc<PresenceTracker>,
    metrics: Arc<Metrics>,
    trails: Arc<MessageTrails>,
    /// How long a call may wait for the bus.
    timeout: Duration,
    /// Cancelled where this node is to take no client any more.
    draining: CancellationToken,
}

impl Control {
    /// Starts the task that applies orders on this node.
    pub fn start(
        node: NodeId,
        (orders, sessions): (Arc<dyn ControlQueue>, Arc<dyn SessionStore>),
        hub: Hub,
        presence: Arc<PresenceTracker>,
        (metrics, trails): (Arc<Metrics>, Arc<MessageTrails>),
        wait_max: Duration,
        tasks: &Tasks,
    ) -> Self {
        let draining = CancellationToken::new();
        let control = Self {
            node,
            queue: orders,
            sessions,
            hub,
            presence,
            metrics,
            trails,
            timeout: wait_max,
            draining,
        };
        let (working, stopped) = (control.clone(), tasks.stopped().clone());
        tasks.spawn_service("control", async move {
            // All arms are cancel-safe: what was not applied no node that ends is asked for.
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = working.apply_all() => {}
                () = working.keep_sessions_alive() => {}
            }
        });
        control
    }

    /// Cancelled where this node was ordered to take no client any more.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Gives an order, and waits some time until all nodes have applied it.
    ///
    /// # Errors
    ///
    /// [`BusError`]: it is not known whether it was given.
    pub async fn execute(&self, order: ControlCommand) -> Result<CommandProgress, BusError> {
        Ok(self.enqueue_and_wait(order).await?.1)
    }

    async fn enqueue_and_wait(
        &self,
        order: ControlCommand,
    ) -> Result<(CommandId, CommandProgress), BusError> {
        let given = async {
            let id = self.queue.enqueue(order).await?;
            let until = Instant::now() + APPLY_MAX;
            loop {
                let outcome = self.queue.progress(id).await?;
                if outcome.applied >= outcome.nodes || Instant::now() >= until {
                    return Ok((id, outcome));
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        self.with_timeout(given).await
    }

    /// What the bus answers, if it does within the time that a call may wait.
    async fn with_timeout<T>(
        &self,
        call: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        let call = tokio::time::timeout(self.timeout, call).await;
        call.unwrap_or(Err(BusError::Unavailable))
    }

    /// Closes connections of a user, and where their sessions are not kept forgets those.
    ///
    /// # Errors
    ///
    /// [`BusError`]: it is not known whether that was done.
    pub async fn close(
        &self,
        user: UserId,
        which: SessionSelector,
        keep_sessions: bool,
        close: Close,
    ) -> Result<CommandProgress, BusError> {
        if !keep_sessions {
            // First, so that who comes back at once finds it gone.
            self.with_timeout(self.sessions.revoke(user.clone(), which)).await?;
        }
        let Close { code, reason } = close;
        self.execute(ControlCommand::Close { user, which, code, reason }).await
    }

    /// Asks all nodes. Who does not answer in time is not waited for.
    ///
    /// # Errors
    ///
    /// [`BusError`].
    pub async fn query_nodes(
        &self,
        question: NodeQuery,
    ) -> Result<(Vec<String>, CommandProgress), BusError> {
        let (id, outcome) = self.enqueue_and_wait(ControlCommand::Ask(question)).await?;
        Ok((self.with_timeout(self.queue.replies(id)).await?, outcome))
    }

    /// Applies what is ordered, for ever.
    async fn apply_all(&self) {
        loop {
            let CommandBatch { commands: orders, missed } = self.queue.poll().await;
            if missed {
                self.close_revoked().await;
            }
            for given in orders {
                let id = given.id;
                self.apply(given).await;
                while self.queue.mark_applied(id).await.is_err() {
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    /// Lets it be known now and then that sessions are in use, for ever.
    async fn keep_sessions_alive(&self) {
        let every = (self.sessions.ttl() / 4).min(SESSION_CHECK_INTERVAL);
        loop {
            tokio::time::sleep(every).await;
            for handle in self.hub.connections(None).await {
                self.verify_session(&handle).await;
            }
        }
    }

    /// Ends a connection whose session another has taken over without this node having heard of it. One
    /// that is not there may have been lost with the rest of what Redis had.
    async fn verify_session(&self, handle: &ConnectionHandle) {
        let Some(owner) = handle.owner() else { return };
        let holder = self.sessions.holder(owner.user.clone(), owner.session, handle.connection);
        if let Ok(SessionHolder::Another) = holder.await {
            let (code, reason) = (CloseCode::SessionReplaced.number(), String::new());
            handle.outbox.close(Close { code, reason });
        }
    }

    async fn apply(&self, QueuedCommand { id, at, is_fresh, command: order }: QueuedCommand) {
        match order {
            ControlCommand::Close { user, which, code, reason } => {
                self.hub.close(&user, which, at, Close { code, reason }).await;
            }
            ControlCommand::Remove { room, user } => self.hub.remove(room, user, at).await,
            ControlCommand::Drain { node } if node == self.node => self.draining.cancel(),
            ControlCommand::Broadcast { id, payload, timestamp } if is_fresh => {
                let Ok(payload) = serde_json::from_str(&payload) else { return };
                let broadcast = Box::new(BroadcastFrame { id, payload, timestamp });
                self.hub.broadcast(text_frame(&ServerFrame::Broadcast(broadcast))).await;
            }
            ControlCommand::Ask(question) if is_fresh => {
                let answer = self.answer_query(question).await.to_string();
                if let Err(error) = self.queue.reply(id, answer).await {
                    tracing::debug!(%error, "a question was not answered");
                }
            }
            ControlCommand::Drain { .. }
            | ControlCommand::Broadcast { .. }
            | ControlCommand::Ask(_) => {}
        }
    }

    /// Orders were forgotten before this node has seen them: connections whose session is no more are
    /// closed.
    async fn close_revoked(&self) {
        tracing::warn!(
            "this node was away for so long that orders were forgotten; its clients' sessions are looked at"
        );
        for handle in self.hub.connections(None).await {
            let Some(owner) = handle.owner() else { continue };
            let Ok(kept) = self.sessions.list(owner.user.clone()).await else { continue };
            if !kept.iter().any(|kept| kept.session == owner.session) {
                handle.outbox.close(kicked());
            }
        }
    }

    async fn answer_query(&self, question: NodeQuery) -> serde_json::Value {
        match question {
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
                    "draining": self.draining.is_cancelled(),
                    "rooms": self.metrics.rooms.get(),
                    "publishes": self.metrics.publishes.sum(),
                    "deliveries": self.metrics.deliveries.get(),
                })
            }
            NodeQuery::Trail { id, user } => {
                let mut logs = Vec::new();
                for trail in self.trails.of(id) {
                    let mut told = trail.to_json();
                    if let Some(user) = &user {
                        told["user"] =
                            self.delivery_state(trail.log, user.clone(), &trail.position).await;
                    }
                    logs.push(told);
                }
                json!({ "node": self.node, "logs": logs })
            }
        }
    }

    /// Why a user has got an entry here, or has not.
    async fn delivery_state(&self, log: RoomId, user: UserId, at: &Position) -> serde_json::Value {
        let connections = self.hub.cursors(log, user).await;
        let connection = |(id, cursor): &(ConnectionId, Position)| {
            let fate = match cursor.epoch == at.epoch {
                true if cursor.seq >= at.seq => "queued, or there before the connection was",
                true => "behind: it comes from the log",
                false => "the log goes on in another epoch",
            };
            json!({ "connection_id": id, "fate": fate, "epoch": cursor.epoch, "seq": cursor.seq })
        };
        let why =
            connections.is_empty().then_some("no connection of the user is there on this node");
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

/// How a connection ends that the application has closed and gave no reason.
pub fn kicked() -> Close {
    Close { code: CloseCode::PolicyViolation.number(), reason: "kicked".to_owned() }
}
