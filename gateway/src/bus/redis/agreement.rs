//! How the nodes of a cluster agree on the server behind the name.
//!
//! A Redis that was restarted, emptied or replaced by a replica may lack what it had acknowledged.
//! Before anything is written to such a server, everybody who may hold some of it gives it back:
//!
//! 1. Each connection knows which server it leads to, by a *token*: the server's run and what it
//!    replicates. A node goes on only when all of its connections lead to one server.
//! 2. It *heals*: what its rings hold of followed rooms and the server lacks is appended, with the
//!    same numbers.
//! 3. It *checks in* at the barrier, with the processes it knows of. The server opens when all of
//!    those have checked in, or when they were waited for longer than a lease lasts; then rooms go
//!    on in a new epoch, since somebody may have had more of them.
//! 4. It repeats its [tail](crate::bus::tail) and has the hub compare all rooms.
//!
//! Scripts refuse to touch a room under a token that the nodes have not agreed on, so that nobody
//! can be overtaken by a connection that was made anew, or by a node that has just started.
//!
//! The *lease* is the other half: a process that does not renew it in time is not counted on by the
//! others, so it passes nothing on and publishes nothing until it has renewed and everybody who lives
//! has seen it (a frozen process finds that out before anything else, by its clock).

use std::{collections::HashSet, sync::Arc, time::Duration};

use redis::{ErrorKind, RedisError, RedisResult, aio::MultiplexedConnection};
use tokio::time::Instant;

use super::{Links, RetryPause, Server, config, heal::Healer, script};
use crate::{
    bus::{Mailboxes, random_epoch},
    delivery::Token,
    drain::Tasks,
};

/// How long a process is counted on after it renewed its lease.
pub(super) const LEASE: Duration = Duration::from_secs(10);
/// How often it does.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// By how much a process stops before its lease ends: clocks and answers are not that exact.
const LEASE_MARGIN: Duration = Duration::from_secs(1);
/// How long a server without anybody who remembers anything is kept waiting for such.
const FRESH_WAIT: Duration = Duration::from_secs(3);
/// How often a closed barrier is asked.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How often a process is asked for that not everybody has seen.
const SEEN_EVERY: Duration = Duration::from_millis(100);

/// The task that keeps this node in agreement with the others.
pub(super) struct Agreement {
    server: Arc<Server>,
    links: Arc<Links>,
    mailboxes: Mailboxes,
    healer: Healer,
    checkin: redis::Script,
    lease: redis::Script,
    /// This run of this node.
    process: String,
    /// Whether it has ever agreed on a server, and so may hold what was acknowledged.
    remembers: bool,
    /// The processes that live, as far as known.
    peers: HashSet<String>,
    /// Whether everybody who lives has seen this process since it registered.
    known: bool,
    renewed: Option<Instant>,
}

pub(super) fn start(
    server: Arc<Server>,
    links: Arc<Links>,
    mailboxes: Mailboxes,
    node: &str,
    tasks: &Tasks,
) {
    let agreement = Agreement {
        healer: Healer::new(server.clone(), links.metrics.clone()),
        server,
        links,
        mailboxes,
        checkin: script(include_str!("scripts/checkin.lua")),
        lease: script(include_str!("scripts/lease.lua")),
        process: format!("{node}/{}", random_epoch()),
        remembers: false,
        peers: HashSet::new(),
        known: false,
        renewed: None,
    };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_agreement", async move {
        let mut agreement = agreement;
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = agreement.work() => {}
        }
        agreement.say_goodbye().await;
    });
}

impl Agreement {
    async fn work(&mut self) {
        let mut pause = RetryPause::default();
        loop {
            pause.wait().await;
            let remake = self.links.remake.subscribe();
            match self.server.connect(config()).await {
                Ok((connection, token)) => {
                    let error = self.keep(connection, token, remake, &mut pause).await;
                    tracing::debug!(%error, "connection for agreement ended");
                }
                Err(error) if pause.is_worth_a_line() => {
                    tracing::warn!(%error, "cannot agree on a Redis server with the other nodes");
                }
                Err(_) => {}
            }
        }
    }

    /// Keeps this node in agreement while the connection lasts. Returns why it does not any more.
    async fn keep(
        &mut self,
        mut connection: MultiplexedConnection,
        token: Token,
        mut remake: tokio::sync::watch::Receiver<u64>,
        pause: &mut RetryPause,
    ) -> RedisError {
        self.links.met(&self.server, token);
        let mut moved = self.server.dial.moved();
        let mut state = self.links.tokens.subscribe();
        let mut agreed = self.server.agreed.subscribe();
        loop {
            let tokens = *state.borrow_and_update();
            agreed.mark_unchanged();
            let mut wait = ASK_EVERY;
            let done = if tokens.lead_elsewhere(token) {
                // Which of them is right is not known here: all are made again.
                self.links.remake.send_modify(|count| *count += 1);
                Err((ErrorKind::Io, "the links lead to different servers").into())
            } else if tokens.lead_to(token) && *self.server.agreed.borrow() != Some(token) {
                self.agree(&mut connection, token).await
            } else if *self.server.agreed.borrow() == Some(token) {
                wait = self.pause_before_renewal();
                Ok(())
            } else {
                Ok(())
            };
            let done = match done {
                Ok(()) => self.renew_if_due(&mut connection, token).await,
                failed => failed,
            };
            if let Err(error) = done {
                return error;
            }
            *pause = RetryPause::default();
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                _ = remake.changed() => return (ErrorKind::Io, "all links are made again").into(),
                _ = state.changed() => {}
                _ = agreed.changed() => {}
                () = &mut moved => {
                    self.links.remake.send_modify(|count| *count += 1);
                    return (ErrorKind::Io, "the primary is elsewhere").into();
                }
                () = self.links.poked.notified() => self.renewed = None,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    fn pause_before_renewal(&self) -> Duration {
        match self.renewed {
            _ if !self.known => SEEN_EVERY,
            Some(renewed) => (renewed + RENEW_EVERY).saturating_duration_since(Instant::now()),
            None => Duration::ZERO,
        }
    }

    /// Heals, checks in and waits until the server is open. Returns without agreement where the
    /// links have changed meanwhile.
    async fn agree(
        &mut self,
        connection: &mut MultiplexedConnection,
        token: Token,
    ) -> RedisResult<()> {
        let begun = Instant::now();
        self.renewed = None;
        self.renew_if_due(connection, token).await?;
        if self.remembers {
            // What the links before brought is in the mailboxes by now, in front of this question.
            let holdings = self.mailboxes.holdings().await;
            self.healer.heal(connection, token, holdings).await?;
        }
        loop {
            if !self.links.tokens.borrow().lead_to(token) {
                return Ok(());
            }
            let (open, missing) = self.check_in(connection, token).await?;
            if !open.is_empty() {
                self.agreed(token, open == "1", &missing, begun.elapsed());
                break;
            }
            tokio::time::sleep(ASK_EVERY).await;
            self.renew_if_due(connection, token).await?;
        }
        self.renewed = None;
        self.renew_if_due(connection, token).await?;
        self.mailboxes.doubt();
        Ok(())
    }

    fn agreed(&mut self, token: Token, complete: bool, missing: &[String], took: Duration) {
        if complete || !self.remembers {
            tracing::info!(%token, ?took, complete, "the nodes have agreed on a Redis server");
        } else {
            tracing::warn!(%token, ?took, ?missing,
                "the nodes have agreed on a Redis server without some that may hold more than it \
                 has: rooms go on in a new epoch, and members are told");
        }
        self.links.metrics.agreements.of(complete.into()).inc();
        if !complete {
            // Who was waited for in vain is not waited for again.
            self.peers.retain(|peer| !missing.contains(peer));
        }
        self.remembers = true;
        self.server.agreed.send_replace(Some(token));
        self.mailboxes.standing().settle(true);
        self.links.show(&self.server);
    }

    async fn check_in(
        &mut self,
        connection: &mut MultiplexedConnection,
        token: Token,
    ) -> RedisResult<(String, Vec<String>)> {
        let mut invocation = self.checkin.prepare_invoke();
        invocation
            .key(self.server.keyspace.barrier())
            .arg(token.to_string())
            .arg(&self.process)
            .arg(LEASE.as_millis() as u64)
            .arg(FRESH_WAIT.as_millis() as u64);
        if self.remembers {
            self.peers.insert(self.process.clone());
            let mut peers: Vec<_> = self.peers.iter().collect();
            peers.sort_unstable();
            invocation.arg(peers);
        }
        invocation.invoke_async(connection).await
    }

    /// Renews the lease where it is time, and lets this node stand while it lasts.
    async fn renew_if_due(
        &mut self,
        connection: &mut MultiplexedConnection,
        token: Token,
    ) -> RedisResult<()> {
        if self.known && self.renewed.is_some_and(|renewed| renewed.elapsed() < RENEW_EVERY) {
            return Ok(());
        }
        let asked = Instant::now();
        let (seen, new, alive): (bool, bool, Vec<String>) = self
            .lease
            .key(LEASES)
            .arg(&self.process)
            .arg(LEASE.as_millis() as u64)
            .arg(POKES)
            .arg(token.to_string())
            .invoke_async(connection)
            .await?;
        self.renewed = Some(asked);
        if *self.server.agreed.borrow() != Some(token) {
            // Who lives may not have come to this server yet.
            self.peers.extend(alive);
            return Ok(());
        }
        self.peers = alive.into_iter().collect();
        self.known = seen || self.known && !new;
        if self.known {
            let standing = self.mailboxes.standing();
            let stood = standing.holds(Instant::now());
            standing.extend(asked + LEASE - LEASE_MARGIN);
            if !stood {
                // What arrived meanwhile was not passed on, and publishes wait.
                self.mailboxes.doubt();
                self.server.agreed.send_modify(|_| {});
                self.links.show(&self.server);
            }
        }
        Ok(())
    }

    /// Gives the lease back, so that nobody waits for a process that has ended in order.
    async fn say_goodbye(&self) {
        let goodbye = async {
            let (mut connection, _) = self.server.connect(config()).await?;
            redis::cmd("HDEL")
                .arg(LEASES)
                .arg(&self.process)
                .query_async::<()>(&mut connection)
                .await
        };
        let _: RedisResult<()> = goodbye.await;
    }
}

/// Who lives.
const LEASES: &str = "gw:leases";
/// Where a new process asks the others to renew, so that all have seen it.
pub(super) const POKES: &str = "gw:pokes";
