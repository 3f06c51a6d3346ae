//! The agreement of a cluster's nodes on the Redis server behind the configured name.
//!
//! A Redis that was restarted, emptied or replaced by a replica may lack entries that it had
//! acknowledged. Before anything is written to such a server, every node that may hold some of them
//! restores them:
//!
//! 1. Each connection knows which server it leads to, by its [`ServerId`]: the server's run and the
//!    data set it replicates. A node continues only when all of its connections lead to one server.
//! 2. The node *restores* logs: it appends, with the same numbers, the entries that its replicas of
//!    subscribed rooms hold and the server lacks. It also hands in its [unconfirmed
//!    publishes](skein_core::bus::unconfirmed), so that an acknowledged message keeps its number.
//! 3. It *checks in* at the barrier, with the processes it knows of. The server opens when all of
//!    those have checked in, or when it has waited for them for longer than a lease lasts. In that
//!    case rooms continue in a new epoch, since a missing process may have held more of them.
//! 4. It republishes what is still unconfirmed, and the hub compares all rooms with their logs.
//!
//! Scripts reject every access to a room under a server id that the nodes have not agreed on, so
//! that a connection that was made anew, or a node that has just started, cannot get ahead of the
//! others.
//!
//! The *lease* is the other half: the other nodes do not count on a process that fails to renew its
//! lease in time. Such a process delivers and publishes nothing until it has renewed the lease and
//! every live process has seen it. A frozen process finds that out before it does anything else, by
//! its clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use redis::{ErrorKind, RedisError, RedisResult, Value, aio::MultiplexedConnection};
use skein_protocol::ids::RoomId;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    error::is_slot_error,
    lease::LeaseTimes,
    links::LinkStates,
    requirements::Detector,
    restore::LogRestorer,
    retry::RetryPause,
    server::RedisServer,
    topology::{connection_config, warn_if_replicas_optional},
    untrusted::{self, Lossy, texts},
};
use skein_core::{
    bus::{Mailboxes, random_epoch},
    delivery::ServerId,
    drain::Tasks,
    telemetry::log_limiter::LogLimiter,
};

/// How often a closed barrier is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How far the clocks of a node and of Redis may differ before a warning is logged.
const SKEW_MAX: Duration = Duration::from_secs(1);
/// Rate limit of that warning.
static CLOCKS_DIFFER: LogLimiter = LogLimiter::new();
/// How often a process checks whether every live process has seen it.
const SEEN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The identity of this run of the node, for all servers of a Redis Cluster.
pub(super) struct ProcessIdentity {
    pub(super) name: String,
    pub(super) lease: LeaseTimes,
    /// The common start of the names of all runs of this node.
    node: String,
    state: Mutex<ProcessState>,
    /// A live process with the same node id, if one was found.
    duplicate: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct ProcessState {
    /// The groups for which this process has ever agreed on a server: it may hold entries that were
    /// acknowledged there.
    may_hold: BTreeSet<u16>,
    /// The processes that are alive, as far as known.
    peers: BTreeSet<String>,
    /// Whether every live process has seen this one since it registered.
    seen_by_all: bool,
    renewed: Option<Instant>,
    /// For each group the last agreement generation, and the last incomplete one.
    generations: BTreeMap<u16, (u64, u64)>,
    /// Whether this process has ever held a lease. Its first lease states that earlier runs of this
    /// node have ended. Later ones do not, since another process with the same id may have started
    /// by then.
    registered: bool,
    /// The name under which it writes its presence entries.
    incarnation: Option<String>,
}

/// How long a step in progress may take when this process ends.
const LAST_STEP_MAX: Duration = Duration::from_millis(500);
/// How long a live process with the same node id may take to renew its lease.
const DUPLICATE_ANSWER_MAX: Duration = Duration::from_millis(500);

impl ProcessIdentity {
    pub(super) fn new(node: &str, lease: LeaseTimes) -> Self {
        let node = format!("{node}/");
        let (state, duplicate) = (Mutex::default(), watch::Sender::default());
        Self { name: format!("{node}{}", unique(SystemTime::now())), lease, node, state, duplicate }
    }

    /// Waits until a live process with the same node id was found, and returns its name.
    /// Cancel-safe.
    pub(super) async fn duplicate(&self) -> String {
        let mut duplicate = self.duplicate.subscribe();
        // The sender lives as long as `self`.
        match duplicate.wait_for(Option::is_some).await.ok().and_then(|duplicate| duplicate.clone())
        {
            Some(duplicate) => duplicate,
            None => std::future::pending().await,
        }
    }

    /// The common start of the names of all runs of this node.
    pub(super) fn node_prefix(&self) -> &str {
        &self.node
    }

    fn has_duplicate(&self) -> bool {
        self.duplicate.borrow().is_some()
    }

    /// Begins a new incarnation, and returns its name.
    pub(super) fn begin_incarnation(&self) -> String {
        let incarnation = format!("{}.{}", self.name, unique(SystemTime::now()));
        self.state.lock().incarnation = Some(incarnation.clone());
        incarnation
    }
}

/// A unique name of letters and digits: the time in microseconds and 60 random bits. Sorted as
/// text, the names of one node are in the order of their start, so that work for each of them is
/// done in that order.
fn unique(now: SystemTime) -> String {
    let since_1970 = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:013x}{}", since_1970.as_micros(), random_epoch())
}

/// The task that keeps this node in agreement with the others.
pub(super) struct Agreement {
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    mailboxes: Mailboxes,
    restorer: LogRestorer,
    checkin: redis::Script,
    lease: redis::Script,
    leave: redis::Script,
    process: Arc<ProcessIdentity>,
    /// Whether the settings of the server's replicas were checked.
    checked_replicas: bool,
}

pub(super) fn start(
    server: Arc<RedisServer>,
    links: Arc<LinkStates>,
    mailboxes: Mailboxes,
    process: Arc<ProcessIdentity>,
    tasks: &Tasks,
) {
    let agreement = Agreement {
        restorer: LogRestorer::new(server.clone(), links.metrics.clone()),
        checkin: server.keyspace.script(include_str!("scripts/check_in.lua")),
        lease: server.keyspace.script(include_str!("scripts/lease.lua")),
        leave: server.keyspace.script(include_str!("scripts/leave.lua")),
        server,
        links,
        mailboxes,
        process,
        checked_replicas: false,
    };
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_agreement", async move {
        let mut agreement = agreement;
        {
            let mut work = pin!(agreement.work(&stopped));
            tokio::select! {
                () = stopped.cancelled() => {
                    // A renewal in progress is waited for: it could arrive after the deregistration
                    // and bring the lease back.
                    let _ = timeout(LAST_STEP_MAX, work).await;
                }
                () = &mut work => {}
            }
        }
        agreement.deregister().await;
    });
}

impl Agreement {
    /// Works until `stopped` is cancelled.
    async fn work(&mut self, stopped: &CancellationToken) {
        let mut pause = RetryPause::default();
        while !stopped.is_cancelled() {
            if self.process.has_duplicate() {
                // Without registering, so that no node counts on this process.
                return std::future::pending().await;
            }
            pause.wait().await;
            let reconnect_all = self.links.reconnect_all.subscribe();
            match self.server.connect(connection_config()).await {
                Ok((connection, server_id)) => {
                    let maintained = self
                        .maintain(connection, server_id, reconnect_all, &mut pause, stopped)
                        .await;
                    let Err(error) = maintained else { return };
                    pause.failed(&error);
                    self.server.requirements.record(Detector::Call, &error);
                    tracing::debug!(%error, "agreement connection ended");
                }
                Err(error) => {
                    pause.failed(&error);
                    if pause.should_log() {
                        let server = self.server.dial.server_name();
                        tracing::warn!(%error, server, "cannot reach Redis to agree on a server with the other nodes");
                    }
                }
            }
        }
    }

    /// Keeps this node in agreement while the connection lasts, or until `stopped` is cancelled.
    ///
    /// # Errors
    ///
    /// Why the connection is of no more use.
    async fn maintain(
        &mut self,
        mut connection: MultiplexedConnection,
        server_id: ServerId,
        mut reconnect_all: watch::Receiver<u64>,
        pause: &mut RetryPause,
        stopped: &CancellationToken,
    ) -> RedisResult<()> {
        self.links.observed_server(&self.server, server_id);
        if !std::mem::replace(&mut self.checked_replicas, true) {
            warn_if_replicas_optional(&mut connection).await;
        }
        let mut moved = self.server.dial.moved();
        let mut state = self.links.targets.subscribe();
        let mut agreed = self.server.agreed.subscribe();
        let mut owned = self.server.owned.subscribe();
        loop {
            let targets = *state.borrow_and_update();
            agreed.mark_unchanged();
            owned.mark_unchanged();
            let open = self.server.unagreed_groups(server_id);
            let is_agreed = open.is_empty();
            let done = if targets.any_leads_elsewhere(server_id) {
                // It is not known which of them leads to the right server, so all reconnect.
                self.links.reconnect_all.send_modify(|count| *count += 1);
                Err((ErrorKind::Io, "the links lead to different servers").into())
            } else if targets.both_lead_to(server_id) && !is_agreed {
                self.agree(&mut connection, server_id, open).await
            } else {
                Ok(())
            };
            let done = match done {
                Ok(()) if self.stores_leases() => {
                    self.renew_if_due(&mut connection, server_id).await
                }
                Ok(()) => self.verify_barrier(&mut connection, server_id).await,
                failed => failed,
            };
            done?;
            *pause = RetryPause::default();
            let wait = if is_agreed { self.pause_before_renewal() } else { POLL_INTERVAL };
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => return Ok(()),
                _ = reconnect_all.changed() => return Err((ErrorKind::Io, "all links reconnect").into()),
                _ = state.changed() => {}
                _ = agreed.changed() => {}
                _ = owned.changed() => {}
                () = &mut moved => {
                    self.links.reconnect_all.send_modify(|count| *count += 1);
                    return Err((ErrorKind::Io, "another server is the primary").into());
                }
                () = self.links.wake_up.notified() => self.process.state.lock().renewed = None,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether this server stores the leases.
    fn stores_leases(&self) -> bool {
        self.server.owns(0)
    }

    fn pause_before_renewal(&self) -> Duration {
        let state = self.process.state.lock();
        match state.renewed {
            // Another server stores them.
            _ if !self.stores_leases() => self.process.lease.duration,
            _ if !state.seen_by_all => SEEN_CHECK_INTERVAL,
            Some(renewed) => {
                let due = renewed + self.process.lease.renew_every;
                due.saturating_duration_since(Instant::now())
            }
            None => Duration::ZERO,
        }
    }

    /// Restores logs, checks in, and waits until the server is open for `groups`. Returns without
    /// an agreement if the links have changed meanwhile.
    async fn agree(
        &mut self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        mut groups: Vec<u16>,
    ) -> RedisResult<()> {
        let begun = Instant::now();
        self.renew_at_once(connection, server_id).await?;
        self.restore(connection, server_id, &groups).await?;
        self.checkin.load_async(connection).await?;
        loop {
            groups.retain(|group| self.server.owns(*group));
            let all_asked = self.server.unagreed_groups(server_id).len() == groups.len();
            if groups.is_empty()
                || !all_asked
                || !self.links.targets.borrow().both_lead_to(server_id)
            {
                return Ok(());
            }
            let opened = self.check_in(connection, server_id, &groups).await?;
            if !opened.groups.is_empty() {
                self.record_agreement(server_id, &opened, begun.elapsed());
                groups.retain(|group| !opened.groups.contains(group));
                self.mailboxes.mark_all_stale();
            }
            if groups.is_empty() {
                break;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
            self.renew_if_due(connection, server_id).await?;
        }
        self.renew_at_once(connection, server_id).await
    }

    /// Restores the logs of those `groups` of which this process may hold entries.
    async fn restore(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        groups: &[u16],
    ) -> RedisResult<()> {
        let mut remembered = self.process.state.lock().may_hold.clone();
        remembered.retain(|group| groups.contains(group));
        if remembered.is_empty() {
            return Ok(());
        }
        // Entries of the former connections are in the mailboxes by now, ahead of this request.
        let mut replicas = self.mailboxes.replica_snapshots().await;
        let here = |room: &RoomId| remembered.contains(&self.server.keyspace.group_of(room));
        replicas.retain(|replica| here(&replica.room));
        self.restorer.restore(connection, server_id, replicas).await?;
        #[cfg(debug_assertions)]
        if skein_core::fault_injection::is_injected(
            skein_core::fault_injection::ProtocolFault::SequencesReused,
        ) {
            return Ok(());
        }
        let unconfirmed = self.links.node_state.unconfirmed().by_room(here);
        self.restorer
            .restore_unconfirmed(connection, server_id, &self.process.name, unconfirmed)
            .await
    }

    fn record_agreement(&self, server_id: ServerId, opened: &OpenedGroups, took: Duration) {
        let OpenedGroups { groups, complete, missing } = opened;
        let remembered = {
            let state = &mut *self.process.state.lock();
            // A process that has not checked in is not waited for again.
            state.peers.retain(|peer| !missing.contains(peer));
            let remembered = groups.iter().any(|group| state.may_hold.contains(group));
            state.may_hold.extend(groups);
            remembered
        };
        let server = self.server.dial.server_name();
        if *complete || !remembered {
            tracing::info!(server, %server_id, ?took, complete, groups = groups.len(),
                "the nodes have agreed on a Redis server");
        } else {
            tracing::warn!(server, %server_id, ?took, ?missing, groups = groups.len(),
                "the nodes have agreed on a Redis server without processes that may hold entries it \
                 lacks: rooms continue in a new epoch, and members are notified");
        }
        self.links.metrics.recovery_rounds.of(*complete).inc();
        self.server.record_agreement(server_id, groups);
        self.mailboxes.node_state().set_agreed(groups.iter().copied(), true);
    }

    /// Checks in for each of `groups`. Returns those that the server is open for.
    async fn check_in(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
        groups: &[u16],
    ) -> RedisResult<OpenedGroups> {
        let mut pipeline = redis::Pipeline::with_capacity(groups.len());
        pipeline.ignore_errors();
        for group in groups {
            pipeline.add_command(self.check_in_command(server_id, *group));
        }
        let answers: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let mut opened =
            OpenedGroups { groups: Vec::new(), complete: true, missing: BTreeSet::new() };
        for (group, answer) in groups.iter().zip(answers) {
            let (open, missing, generation, last_incomplete): (String, Vec<Lossy>, u64, u64) =
                match answer {
                    Ok(answer) => untrusted::read(&self.links.metrics, "barrier", answer)?,
                    Err(error) if is_slot_error(&error) => {
                        self.server.topology_stale.notify_one();
                        continue;
                    }
                    Err(error) => return Err(error),
                };
            if !open.is_empty() {
                opened.groups.push(*group);
                let generations = &mut self.process.state.lock().generations;
                let seen_by_all = generations.entry(*group).or_default();
                *seen_by_all = (seen_by_all.0.max(generation), seen_by_all.1.max(last_incomplete));
                if open == "0" {
                    opened.complete = false;
                    opened.missing.extend(texts(missing));
                }
            }
        }
        Ok(opened)
    }

    fn check_in_command(&self, server_id: ServerId, group: u16) -> redis::Cmd {
        let state = &mut *self.process.state.lock();
        let (generation, last_incomplete) =
            state.generations.get(&group).copied().unwrap_or_default();
        let mut command = redis::cmd("EVALSHA");
        command
            .arg(self.checkin.get_hash())
            .arg(1)
            .arg(self.server.keyspace.barrier(group))
            .arg(server_id.to_string())
            .arg(&self.process.name)
            .arg(self.process.lease.duration.as_millis() as u64)
            .arg(self.process.lease.fresh_wait.as_millis() as u64)
            .arg(generation)
            .arg(last_incomplete);
        if state.may_hold.contains(&group) {
            state.peers.insert(self.process.name.clone());
            #[cfg(debug_assertions)]
            if skein_core::fault_injection::is_injected(
                skein_core::fault_injection::ProtocolFault::NoBarrier,
            ) {
                command.arg(&self.process.name);
                return command;
            }
            command.arg(&state.peers);
        }
        #[cfg(debug_assertions)]
        if !state.may_hold.contains(&group)
            && skein_core::fault_injection::is_injected(
                skein_core::fault_injection::ProtocolFault::FreshNodeTrusted,
            )
        {
            command.arg(&self.process.name);
        }
        command
    }

    async fn renew_at_once(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
    ) -> RedisResult<()> {
        if self.stores_leases() {
            self.process.state.lock().renewed = None;
        }
        self.renew_if_due(connection, server_id).await
    }

    /// Renews the lease if it is due, and extends this node's lease accordingly.
    async fn renew_if_due(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
    ) -> RedisResult<()> {
        let (is_due, is_first) = {
            let state = self.process.state.lock();
            let renew_every = self.process.lease.renew_every;
            let is_late = state.renewed.is_none_or(|renewed| renewed.elapsed() >= renew_every);
            (!state.seen_by_all || is_late, !state.registered)
        };
        if !is_due || !self.stores_leases() {
            return Ok(());
        }
        let predecessors = match is_first {
            true => self.predecessors(connection).await?,
            false => BTreeSet::new(),
        };
        let asked = Instant::now();
        let keyspace = self.server.keyspace;
        let answer: Value = self
            .lease
            .key(keyspace.leases())
            .key(keyspace.barrier(0))
            .arg(&self.process.name)
            .arg(self.process.lease.duration.as_millis() as u64)
            .arg(keyspace.wake_up_channel())
            .arg(server_id.to_string())
            .arg(if is_first { &self.process.node } else { "" })
            .invoke_async(connection)
            .await?;
        let (seen, new, alive): (bool, bool, Vec<Lossy>) =
            untrusted::read(&self.links.metrics, "leases", answer)?;
        let alive = texts(alive);
        if is_first {
            self.check_for_duplicate(connection, &predecessors).await?;
        }
        let seen_by_all = {
            let state = &mut *self.process.state.lock();
            state.renewed = Some(asked);
            state.registered = true;
            // An expired lease is a new one: the others may have continued without this process.
            state.seen_by_all = seen || state.seen_by_all && !new;
            // Live processes may not have registered on this server yet, or not since it was
            // flushed.
            state.peers.extend(alive.iter().cloned());
            if !self.server.has_agreed_on(server_id, 0) {
                return Ok(());
            }
            state.seen_by_all
        };
        if !seen_by_all {
            self.mailboxes.node_state().drop_lease();
        }
        self.verify_barrier(connection, server_id).await?;
        if self.server.has_agreed_on(server_id, 0) {
            // A process whose lease has expired is not waited for any longer.
            self.process.state.lock().peers = alive.into_iter().collect();
        }
        if seen_by_all {
            self.measure_clock_skew(connection).await?;
            let node_state = self.mailboxes.node_state();
            let held_lease = node_state.holds_lease(Instant::now());
            let lease = self.process.lease;
            node_state.extend_lease(asked, asked + lease.duration - lease.margin);
            if !held_lease {
                // Entries that arrived meanwhile were not delivered, and publishes wait.
                self.mailboxes.mark_all_stale();
                node_state.notify_lease_reacquired();
            }
        }
        Ok(())
    }

    /// Measures how far this node's clock is ahead of that of Redis. Timestamps of messages come
    /// from the former, retention follows the latter.
    async fn measure_clock_skew(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let asked = (Instant::now(), SystemTime::now());
        let (seconds, micros): (u64, u64) = redis::cmd("TIME").query_async(connection).await?;
        let there = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros);
        let skew = skew_of(asked.1, asked.0.elapsed(), there);
        self.links.metrics.clock_skew_seconds.set(skew);
        if skew.abs() > SKEW_MAX.as_secs_f64()
            && let Some(suppressed) = CLOCKS_DIFFER.should_log()
        {
            tracing::warn!(
                skew_seconds = skew,
                suppressed,
                "the clocks of this node and of Redis differ by more than a second: synchronise both \
                 with NTP; the node's clock is ahead if the value is positive"
            );
        }
        Ok(())
    }

    /// The other processes of this node that hold a lease, and when it expires, ms.
    async fn leases_of_this_node(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> RedisResult<BTreeMap<String, u64>> {
        let mut pipeline = redis::pipe();
        pipeline.cmd("TIME").cmd("HGETALL").arg(self.server.keyspace.leases()).ignore_errors();
        let mut answers: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let rows = answers.pop().unwrap_or(Ok(Value::Nil));
        let rows: Vec<(Lossy, Lossy)> = untrusted::or_default(&self.links.metrics, "leases", rows)?;
        let (seconds, micros): (u64, u64) =
            redis::from_redis_value(answers.pop().unwrap_or(Ok(Value::Nil))?)?;
        let now = seconds * 1000 + micros / 1000;
        let lease = |(Lossy(name), Lossy(row)): (Lossy, Lossy)| {
            let ends = row.split(' ').next()?.parse::<u64>().ok()?;
            let is_it = name.starts_with(&self.process.node) && name != self.process.name;
            (is_it && ends > now).then_some((name, ends))
        };
        Ok(rows.into_iter().filter_map(lease).collect())
    }

    async fn wake_peers(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        let keyspace = self.server.keyspace;
        let mut wake = redis::cmd(keyspace.publish());
        wake.arg(keyspace.wake_up_channel()).arg(&self.process.name).query_async(connection).await
    }

    /// The earlier runs of this node that still hold a lease. A run counts as ended unless it
    /// renews its lease when it is woken up. One renewal does not show that it is alive: it may
    /// have been in progress when the process was killed.
    ///
    /// # Errors
    ///
    /// One of them is alive: it is a duplicate of this process.
    async fn predecessors(
        &self,
        connection: &mut MultiplexedConnection,
    ) -> RedisResult<BTreeSet<String>> {
        let mut before = self.leases_of_this_node(connection).await?;
        let predecessors = before.keys().cloned().collect();
        if before.is_empty() {
            return Ok(predecessors);
        }
        let mut renewed = BTreeSet::new();
        let mut until = Instant::now() + DUPLICATE_ANSWER_MAX;
        self.wake_peers(connection).await?;
        while Instant::now() < until {
            tokio::time::sleep(POLL_INTERVAL).await;
            let now = self.leases_of_this_node(connection).await?;
            let renews = |(name, ends): &(&String, &u64)| {
                before.get(*name).is_some_and(|before| before < ends)
            };
            if let Some((name, _)) = now.iter().find(renews) {
                if !renewed.insert(name.clone()) {
                    return Err(self.found_duplicate(name.clone()));
                }
                self.wake_peers(connection).await?;
                until = Instant::now() + DUPLICATE_ANSWER_MAX;
            }
            before = now;
        }
        Ok(predecessors)
    }

    /// Checks, once this process has registered, whether another process with the same node id has.
    /// Of two that start at once, at least one finds the other.
    async fn check_for_duplicate(
        &self,
        connection: &mut MultiplexedConnection,
        predecessors: &BTreeSet<String>,
    ) -> RedisResult<()> {
        let others = self.leases_of_this_node(connection).await?;
        let Some(duplicate) = others.into_keys().find(|name| !predecessors.contains(name)) else {
            return Ok(());
        };
        let mut delete = redis::cmd("HDEL");
        delete.arg(self.server.keyspace.leases()).arg(&self.process.name);
        delete.query_async::<()>(connection).await?;
        Err(self.found_duplicate(duplicate))
    }

    fn found_duplicate(&self, duplicate: String) -> RedisError {
        self.process.duplicate.send_replace(Some(duplicate));
        (ErrorKind::Client, "another live process has the id of this node").into()
    }

    /// Revokes the agreement if the server does not know of it: it was flushed. Scripts tell that
    /// to a node that appends; a node that only reads would be rejected for ever.
    async fn verify_barrier(
        &self,
        connection: &mut MultiplexedConnection,
        server_id: ServerId,
    ) -> RedisResult<()> {
        let agreed_on = |group: &u16| self.server.has_agreed_on(server_id, *group);
        let Some(group) = self.server.owned.borrow().iter().copied().find(agreed_on) else {
            return Ok(());
        };
        let asked: RedisResult<(Option<Lossy>, Option<Lossy>)> = redis::cmd("HMGET")
            .arg(self.server.keyspace.barrier(group))
            .arg("t")
            .arg("open")
            .query_async(connection)
            .await;
        let (agreed, open) = match asked {
            Err(error) if is_slot_error(&error) => {
                self.server.topology_stale.notify_one();
                return Ok(());
            }
            // Checking in creates it anew.
            Err(error) if untrusted::is_wrong_type(&error) => (None, None),
            asked => asked?,
        };
        if agreed != Some(Lossy(server_id.to_string())) || open.is_none() {
            self.links.found_unagreed(&self.server, server_id);
        }
        Ok(())
    }

    /// Deregisters this process and releases its lease, so that no node waits for it. Records the
    /// time first, so that its users stay present while they reconnect to other nodes.
    async fn deregister(&self) {
        if !self.stores_leases() {
            return;
        }
        let deregistration = async {
            let (mut connection, server_id) = self.server.connect(connection_config()).await?;
            let keyspace = self.server.keyspace;
            let (seconds, micros): (u64, u64) =
                redis::cmd("TIME").query_async(&mut connection).await?;
            let now = seconds * 1000 + micros / 1000;
            let mut deregistration = redis::pipe();
            if let Some(incarnation) = self.process.state.lock().incarnation.clone() {
                let row = format!("{} {now}", self.process.name);
                deregistration.cmd("HSET").arg(keyspace.incarnations()).arg(incarnation).arg(row);
            }
            deregistration.cmd("HDEL").arg(keyspace.announced()).arg(&self.process.name);
            deregistration.cmd("HDEL").arg(keyspace.commands(":nodes")).arg(&self.process.name);
            deregistration.query_async::<()>(&mut connection).await?;
            let mut leave = self.leave.key(keyspace.leases());
            leave.key(keyspace.barrier(0)).arg(&self.process.name).arg(server_id.to_string());
            leave.arg(self.holdings(server_id));
            leave.invoke_async::<bool>(&mut connection).await
        };
        match deregistration.await {
            Ok(true) => {
                tracing::info!("the last node has left: Redis has every acknowledged message");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(%error, "cannot deregister: the other nodes wait for this one until its lease expires");
            }
        }
    }

    /// The argument of `leave.lua`: `all` if the server has everything that this process holds,
    /// `none` if it holds nothing, else empty.
    fn holdings(&self, server_id: ServerId) -> &'static str {
        let has_never_agreed = self.process.state.lock().may_hold.is_empty();
        match has_never_agreed {
            true => "none",
            false if self.has_all_acknowledged(server_id) => "all",
            false => "",
        }
    }

    /// Whether the server has everything that this process knows to be acknowledged: the server
    /// acknowledged it, or got it before the nodes agreed. Always `false` in a Redis Cluster, where
    /// it would concern several servers whose records are not of one moment.
    fn has_all_acknowledged(&self, server_id: ServerId) -> bool {
        let node_state = self.mailboxes.node_state();
        self.server.keyspace.groups() == 1
            && self.server.has_agreed_on(server_id, 0)
            && node_state.holds_lease(Instant::now())
            && node_state.unconfirmed().is_all_from(server_id)
    }
}

/// How far this clock is ahead of another one, in seconds. The other one showed `there` at some
/// time within `took` after `asked`.
fn skew_of(asked: SystemTime, took: Duration, there: SystemTime) -> f64 {
    let here = asked + took / 2;
    match here.duration_since(there) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(behind) => -behind.duration().as_secs_f64(),
    }
}

/// The groups that a server has opened for.
struct OpenedGroups {
    groups: Vec<u16>,
    /// Whether every known process has checked in.
    complete: bool,
    /// The processes that have not.
    missing: BTreeSet<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_skew_is_measured_at_half_of_the_round_trip() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let took = Duration::from_millis(500);
        assert_eq!(skew_of(at(100), took, at(90)), 10.25);
        assert_eq!(skew_of(at(100), took, at(110)), -9.75);
        assert_eq!(skew_of(at(100), Duration::ZERO, at(100)), 0.0);
    }

    #[test]
    fn names_are_unique_and_sort_by_their_start() {
        let name = |micros| unique(UNIX_EPOCH + Duration::from_micros(micros));
        let (before, after) = (0x6_0a24_181d_ffff, 0x6_0a24_181e_0000);
        assert!(name(before) < name(after) && name(0) < name(before));
        assert_ne!(name(before), name(before));
        // Of a constant length, and as `lease.lua` expects the name of a process.
        assert!(name(0).len() == 23 && name(before).len() == 23);
        assert!(name(before).chars().all(|letter| letter.is_ascii_alphanumeric()));
    }
}
