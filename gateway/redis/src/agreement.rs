//! How the nodes of a cluster agree on the server behind the name.
//!
//! A Redis that was restarted, emptied or replaced by a replica may lack what it had acknowledged.
//! Before anything is written to such a server, everybody who may hold some of it gives it back:
//!
//! 1. Each connection knows which server it leads to, by a *token*: the server's run and what it
//!    replicates. A node goes on only when all of its connections lead to one server.
//! 2. It *heals*: what its rings hold of followed rooms and the server lacks is appended, with the
//!    same numbers; what it published and nobody may have heard of is given back, too, so
//!    that what was acknowledged keeps its number.
//! 3. It *checks in* at the barrier, with the processes it knows of. The server opens when all of
//!    those have checked in, or when they were waited for longer than a lease lasts; then rooms go
//!    on in a new epoch, since somebody may have had more of them.
//! 4. It repeats its [tail](skein_core::bus::tail) and has the hub compare all rooms.
//!
//! Scripts refuse to touch a room under a token that the nodes have not agreed on, so that nobody
//! can be overtaken by a connection that was made anew, or by a node that has just started.
//!
//! The *lease* is the other half: a process that does not renew it in time is not counted on by the
//! others, so it passes nothing on and publishes nothing until it has renewed and everybody who lives
//! has seen it (a frozen process finds that out before anything else, by its clock).

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
    RetryPause, config, is_slot_error,
    lease::LeaseTimes,
    links::LinkStates,
    requirements::Detector,
    restore::LogRestorer,
    server::RedisServer,
    topology,
    untrusted::{self, Lossy, texts},
};
use skein_core::{
    bus::{Mailboxes, random_epoch},
    delivery::ServerId,
    drain::Tasks,
    telemetry::log_limiter::LogLimiter,
};

/// How often a closed barrier is asked.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How far the clocks of a node and of Redis may differ before it is logged.
const SKEW_MAX: Duration = Duration::from_secs(1);
/// The log line of that.
static CLOCKS_DIFFER: LogLimiter = LogLimiter::new();
/// How often a process is asked for that not everybody has seen.
const SEEN_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// This run of this node, as the others know it; the same for all servers of a Redis Cluster.
pub(super) struct ProcessIdentity {
    pub(super) name: String,
    pub(super) lease: LeaseTimes,
    /// What the names of all runs of this node begin with.
    node: String,
    state: Mutex<ProcessState>,
    /// Another process that lives by the id of this node, if one was found.
    duplicate: watch::Sender<Option<String>>,
}

#[derive(Default)]
struct ProcessState {
    /// The groups for which it has ever agreed on a server: it may hold what was acknowledged there.
    may_hold: BTreeSet<u16>,
    /// The processes that live, as far as known.
    peers: BTreeSet<String>,
    /// Whether everybody who lives has seen this process since it registered.
    seen_by_all: bool,
    renewed: Option<Instant>,
    /// For each group the last term, and the last in which not everybody was heard.
    generations: BTreeMap<u16, (u64, u64)>,
    /// Whether it has ever had a lease. With the first one it says that earlier runs of this node
    /// have ended; later ones do not, since by then another with the same id may have started.
    registered: bool,
    /// Under which name its seats are in the registry.
    incarnation: Option<String>,
}

/// How long a step under way may take when this process ends.
const LAST_STEP_MAX: Duration = Duration::from_millis(500);
/// How long another process with the id of this node may take to show that it lives.
const DUPLICATE_ANSWER_MAX: Duration = Duration::from_millis(500);

impl ProcessIdentity {
    pub(super) fn new(node: &str, lease: LeaseTimes) -> Self {
        let node = format!("{node}/");
        let (state, twin) = (Mutex::default(), watch::Sender::default());
        Self {
            name: format!("{node}{}", unique(SystemTime::now())),
            lease,
            node,
            state,
            duplicate: twin,
        }
    }

    /// Waits until another process was found to live by the id of this node. Cancel-safe.
    pub(super) async fn duplicate(&self) -> String {
        let mut twin = self.duplicate.subscribe();
        // The sender lives as long as `self`.
        match twin.wait_for(Option::is_some).await.ok().and_then(|twin| twin.clone()) {
            Some(twin) => twin,
            None => std::future::pending().await,
        }
    }

    fn has_duplicate(&self) -> bool {
        self.duplicate.borrow().is_some()
    }

    /// A new name for its seats in the registry.
    pub(super) fn begin_incarnation(&self) -> String {
        let incarnation = format!("{}.{}", self.name, unique(SystemTime::now()));
        self.state.lock().incarnation = Some(incarnation.clone());
        incarnation
    }
}

/// A name of letters and digits that no other process or incarnation has: its time in microseconds, and 60
/// random bits. Sorted as text, those of one node are in the order in which they began, so that what is
/// done for each of them is done in that order.
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
    /// Whether it was looked at how closely replicas follow.
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
                    // A renewal under way is waited for: it could arrive behind the goodbye, and the lease
                    // would be there again.
                    let _ = timeout(LAST_STEP_MAX, work).await;
                }
                () = &mut work => {}
            }
        }
        agreement.deregister().await;
    });
}

impl Agreement {
    /// Works until it is to stop.
    async fn work(&mut self, stopped: &CancellationToken) {
        let mut pause = RetryPause::default();
        while !stopped.is_cancelled() {
            if self.process.has_duplicate() {
                // It does not register, so that nobody counts on it.
                return std::future::pending().await;
            }
            pause.wait().await;
            let remake = self.links.reconnect_all.subscribe();
            match self.server.connect(config()).await {
                Ok((connection, token)) => {
                    let kept = self.maintain(connection, token, remake, &mut pause, stopped).await;
                    let Err(error) = kept else { return };
                    pause.failed(&error);
                    self.server.requirements.record(Detector::Call, &error);
                    tracing::debug!(%error, "connection for agreement ended");
                }
                Err(error) => {
                    pause.failed(&error);
                    if pause.should_log() {
                        tracing::warn!(%error, "cannot agree on a Redis server with the others");
                    }
                }
            }
        }
    }

    /// Keeps this node in agreement while the connection lasts, or until it is to stop.
    ///
    /// # Errors
    ///
    /// Why it does not any more.
    async fn maintain(
        &mut self,
        mut connection: MultiplexedConnection,
        token: ServerId,
        mut remake: watch::Receiver<u64>,
        pause: &mut RetryPause,
        stopped: &CancellationToken,
    ) -> RedisResult<()> {
        self.links.observed_server(&self.server, token);
        if !std::mem::replace(&mut self.checked_replicas, true) {
            topology::warn_if_replicas_optional(&mut connection).await;
        }
        let mut moved = self.server.dial.moved();
        let mut state = self.links.targets.subscribe();
        let mut agreed = self.server.agreed.subscribe();
        let mut owned = self.server.owned.subscribe();
        loop {
            let tokens = *state.borrow_and_update();
            agreed.mark_unchanged();
            owned.mark_unchanged();
            let open = self.server.unagreed_groups(token);
            let is_settled = open.is_empty();
            let done = if tokens.any_leads_elsewhere(token) {
                // Which of them is right is not known here: all are made again.
                self.links.reconnect_all.send_modify(|count| *count += 1);
                Err((ErrorKind::Io, "the links lead to different servers").into())
            } else if tokens.both_lead_to(token) && !is_settled {
                self.agree(&mut connection, token, open).await
            } else {
                Ok(())
            };
            let done = match done {
                Ok(()) if self.stores_leases() => self.renew_if_due(&mut connection, token).await,
                Ok(()) => self.verify_barrier(&mut connection, token).await,
                failed => failed,
            };
            done?;
            *pause = RetryPause::default();
            let wait = if is_settled { self.pause_before_renewal() } else { POLL_INTERVAL };
            // All arms are cancel-safe.
            tokio::select! {
                biased;
                () = stopped.cancelled() => return Ok(()),
                _ = remake.changed() => return Err((ErrorKind::Io, "all links are made again").into()),
                _ = state.changed() => {}
                _ = agreed.changed() => {}
                _ = owned.changed() => {}
                () = &mut moved => {
                    self.links.reconnect_all.send_modify(|count| *count += 1);
                    return Err((ErrorKind::Io, "the primary is elsewhere").into());
                }
                () = self.links.wake_up.notified() => self.process.state.lock().renewed = None,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether leases are kept on this server.
    fn stores_leases(&self) -> bool {
        self.server.owns(0)
    }

    fn pause_before_renewal(&self) -> Duration {
        let state = self.process.state.lock();
        match state.renewed {
            // Somebody else does it.
            _ if !self.stores_leases() => self.process.lease.duration,
            _ if !state.seen_by_all => SEEN_CHECK_INTERVAL,
            Some(renewed) => {
                let due = renewed + self.process.lease.renew_every;
                due.saturating_duration_since(Instant::now())
            }
            None => Duration::ZERO,
        }
    }

    /// Heals, checks in and waits until the server is open for `groups`. Returns without agreement
    /// where the links have changed meanwhile.
    async fn agree(
        &mut self,
        connection: &mut MultiplexedConnection,
        token: ServerId,
        mut groups: Vec<u16>,
    ) -> RedisResult<()> {
        let begun = Instant::now();
        self.renew_at_once(connection, token).await?;
        self.restore(connection, token, &groups).await?;
        self.checkin.load_async(connection).await?;
        loop {
            groups.retain(|group| self.server.owns(*group));
            let all_asked = self.server.unagreed_groups(token).len() == groups.len();
            if groups.is_empty() || !all_asked || !self.links.targets.borrow().both_lead_to(token) {
                return Ok(());
            }
            let opened = self.check_in(connection, token, &groups).await?;
            if !opened.groups.is_empty() {
                self.record_agreement(token, &opened, begun.elapsed());
                groups.retain(|group| !opened.groups.contains(group));
                self.mailboxes.mark_all_stale();
            }
            if groups.is_empty() {
                break;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
            self.renew_if_due(connection, token).await?;
        }
        self.renew_at_once(connection, token).await
    }

    /// Gives back what this process holds of some groups, where it remembers them.
    async fn restore(
        &self,
        connection: &mut MultiplexedConnection,
        token: ServerId,
        groups: &[u16],
    ) -> RedisResult<()> {
        let mut remembered = self.process.state.lock().may_hold.clone();
        remembered.retain(|group| groups.contains(group));
        if remembered.is_empty() {
            return Ok(());
        }
        // What the links before brought is in the mailboxes by now, in front of this question.
        let mut holdings = self.mailboxes.replica_snapshots().await;
        let here = |room: &RoomId| remembered.contains(&self.server.keyspace.group_of(room));
        holdings.retain(|held| here(&held.room));
        self.restorer.restore(connection, token, holdings).await?;
        #[cfg(debug_assertions)]
        if skein_core::fault_injection::is_injected(
            skein_core::fault_injection::ProtocolFault::SequencesReused,
        ) {
            return Ok(());
        }
        let unheard = self.links.node_state.unconfirmed().by_room(here);
        self.restorer.restore_unconfirmed(connection, token, &self.process.name, unheard).await
    }

    fn record_agreement(&self, token: ServerId, opened: &OpenedGroups, took: Duration) {
        let OpenedGroups { groups, complete, missing } = opened;
        let remembered = {
            let state = &mut *self.process.state.lock();
            // Who was waited for in vain is not waited for again.
            state.peers.retain(|peer| !missing.contains(peer));
            let remembered = groups.iter().any(|group| state.may_hold.contains(group));
            state.may_hold.extend(groups);
            remembered
        };
        if *complete || !remembered {
            tracing::info!(%token, ?took, complete, groups = groups.len(),
                "the nodes have agreed on a Redis server");
        } else {
            tracing::warn!(%token, ?took, ?missing, groups = groups.len(),
                "the nodes have agreed on a Redis server without some that may hold more than it \
                 has: rooms go on in a new epoch, and members are told");
        }
        self.links.metrics.recovery_rounds.of(*complete).inc();
        self.server.record_agreement(token, groups);
        self.mailboxes.node_state().set_agreed(groups.iter().copied(), true);
    }

    /// Checks in for each of `groups`. Returns those that the server is open for.
    async fn check_in(
        &self,
        connection: &mut MultiplexedConnection,
        token: ServerId,
        groups: &[u16],
    ) -> RedisResult<OpenedGroups> {
        let mut pipeline = redis::Pipeline::with_capacity(groups.len());
        pipeline.ignore_errors();
        for group in groups {
            pipeline.add_command(self.check_in_command(token, *group));
        }
        let answers: Vec<RedisResult<Value>> = pipeline.query_async(connection).await?;
        let mut opened =
            OpenedGroups { groups: Vec::new(), complete: true, missing: BTreeSet::new() };
        for (group, answer) in groups.iter().zip(answers) {
            let (open, missing, term, owed): (String, Vec<Lossy>, u64, u64) = match answer {
                Ok(answer) => untrusted::read(&self.links.metrics, "barrier", answer)?,
                Err(error) if is_slot_error(&error) => {
                    self.server.topology_stale.notify_one();
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !open.is_empty() {
                opened.groups.push(*group);
                let terms = &mut self.process.state.lock().generations;
                let known = terms.entry(*group).or_default();
                *known = (known.0.max(term), known.1.max(owed));
                if open == "0" {
                    opened.complete = false;
                    opened.missing.extend(texts(missing));
                }
            }
        }
        Ok(opened)
    }

    fn check_in_command(&self, token: ServerId, group: u16) -> redis::Cmd {
        let state = &mut *self.process.state.lock();
        let (term, owed) = state.generations.get(&group).copied().unwrap_or_default();
        let mut command = redis::cmd("EVALSHA");
        command
            .arg(self.checkin.get_hash())
            .arg(1)
            .arg(self.server.keyspace.barrier(group))
            .arg(token.to_string())
            .arg(&self.process.name)
            .arg(self.process.lease.duration.as_millis() as u64)
            .arg(self.process.lease.fresh_wait.as_millis() as u64)
            .arg(term)
            .arg(owed);
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
        token: ServerId,
    ) -> RedisResult<()> {
        if self.stores_leases() {
            self.process.state.lock().renewed = None;
        }
        self.renew_if_due(connection, token).await
    }

    /// Renews the lease where it is time, and lets this node stand while it lasts.
    async fn renew_if_due(
        &self,
        connection: &mut MultiplexedConnection,
        token: ServerId,
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
            .arg(token.to_string())
            .arg(if is_first { &self.process.node } else { "" })
            .invoke_async(connection)
            .await?;
        let (seen, new, alive): (bool, bool, Vec<Lossy>) =
            untrusted::read(&self.links.metrics, "leases", answer)?;
        let alive = texts(alive);
        if is_first {
            self.check_for_duplicate(connection, &predecessors).await?;
        }
        let known = {
            let state = &mut *self.process.state.lock();
            state.renewed = Some(asked);
            state.registered = true;
            // A lease that has lapsed is a new one: the others may have gone on without this process.
            state.seen_by_all = seen || state.seen_by_all && !new;
            // Who lives may not have come to this server yet, or not since it was flushed.
            state.peers.extend(alive.iter().cloned());
            if !self.server.has_agreed_on(token, 0) {
                return Ok(());
            }
            state.seen_by_all
        };
        if !known {
            self.mailboxes.node_state().drop_lease();
        }
        self.verify_barrier(connection, token).await?;
        if self.server.has_agreed_on(token, 0) {
            // Whose lease is over is waited for no longer.
            self.process.state.lock().peers = alive.into_iter().collect();
        }
        if known {
            self.measure_clock_skew(connection).await?;
            let standing = self.mailboxes.node_state();
            let stood = standing.holds_lease(Instant::now());
            let lease = self.process.lease;
            standing.extend_lease(asked + lease.duration - lease.margin);
            if !stood {
                // What arrived meanwhile was not passed on, and publishes wait.
                self.mailboxes.mark_all_stale();
                standing.notify_lease_reacquired();
            }
        }
        Ok(())
    }

    /// Notes how far this node's clock is from that of Redis: times of messages are the former's, what
    /// is kept for how long is up to the latter.
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
                "this node's clock and that of Redis differ by more than a second: have both \
                 follow NTP; a positive value means that this node's is ahead"
            );
        }
        Ok(())
    }

    /// The processes of this node whose leases have not ended, and when they do.
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
        let mut poke = redis::cmd(keyspace.publish());
        poke.arg(keyspace.wake_up_channel()).arg(&self.process.name).query_async(connection).await
    }

    /// The earlier runs of this node whose leases have not ended: all of them have, unless they renew
    /// their leases when they are poked. A renewal that was under way when a process was killed may
    /// come by once, so that it takes two.
    ///
    /// # Errors
    ///
    /// One of them lives, and is this node's twin.
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

    /// Looks, once this process has registered, whether another one has by the id of this node at the
    /// same time. Of two that start at once one at least finds the other.
    async fn check_for_duplicate(
        &self,
        connection: &mut MultiplexedConnection,
        predecessors: &BTreeSet<String>,
    ) -> RedisResult<()> {
        let others = self.leases_of_this_node(connection).await?;
        let Some(twin) = others.into_keys().find(|name| !predecessors.contains(name)) else {
            return Ok(());
        };
        let mut delete = redis::cmd("HDEL");
        delete.arg(self.server.keyspace.leases()).arg(&self.process.name);
        delete.query_async::<()>(connection).await?;
        Err(self.found_duplicate(twin))
    }

    fn found_duplicate(&self, twin: String) -> RedisError {
        self.process.duplicate.send_replace(Some(twin));
        (ErrorKind::Client, "another process lives by the id of this node").into()
    }

    /// Takes the agreement back where the server does not know of it any more: it was flushed. Who
    /// appends finds that out by the scripts; who only reads would be refused for ever.
    async fn verify_barrier(
        &self,
        connection: &mut MultiplexedConnection,
        token: ServerId,
    ) -> RedisResult<()> {
        let agreed_on = |group: &u16| self.server.has_agreed_on(token, *group);
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
            // Checking in makes it anew.
            Err(error) if untrusted::is_wrong_type(&error) => (None, None),
            asked => asked?,
        };
        if agreed != Some(Lossy(token.to_string())) || open.is_none() {
            self.links.found_unagreed(&self.server, token);
        }
        Ok(())
    }

    /// Gives the lease back, so that nobody waits for a process that has ended in order. Before that
    /// it is noted when, so that its users are not taken for gone while they go elsewhere.
    async fn deregister(&self) {
        if !self.stores_leases() {
            return;
        }
        let goodbye = async {
            let (mut connection, token) = self.server.connect(config()).await?;
            let keyspace = self.server.keyspace;
            let (seconds, micros): (u64, u64) =
                redis::cmd("TIME").query_async(&mut connection).await?;
            let now = seconds * 1000 + micros / 1000;
            let mut goodbye = redis::pipe();
            if let Some(incarnation) = self.process.state.lock().incarnation.clone() {
                let row = format!("{} {now}", self.process.name);
                goodbye.cmd("HSET").arg(keyspace.incarnations()).arg(incarnation).arg(row);
            }
            goodbye.cmd("HDEL").arg(keyspace.announced()).arg(&self.process.name);
            goodbye.cmd("HDEL").arg(keyspace.commands(":nodes")).arg(&self.process.name);
            goodbye.query_async::<()>(&mut connection).await?;
            let mut leave = self.leave.key(keyspace.leases());
            leave.key(keyspace.barrier(0)).arg(&self.process.name).arg(token.to_string());
            leave.arg(if self.has_all_acknowledged(token) { "1" } else { "" });
            leave.invoke_async::<bool>(&mut connection).await
        };
        match goodbye.await {
            Ok(true) => {
                tracing::info!("the last node leaves: all that was acknowledged is in Redis");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(%error, "the others do not know that this node has ended");
            }
        }
    }

    /// Whether all that this process knows to be acknowledged is with the server: it was acknowledged by
    /// it, or given to it before the nodes agreed. In a Redis Cluster that is several servers' matter,
    /// whose notes would not be of one moment.
    fn has_all_acknowledged(&self, token: ServerId) -> bool {
        let standing = self.mailboxes.node_state();
        self.server.keyspace.groups() == 1
            && self.server.has_agreed_on(token, 0)
            && standing.holds_lease(Instant::now())
            && standing.unconfirmed().is_all_from(token)
    }
}

/// How far a clock is ahead of another, in seconds, which was read at some time within `took` from
/// `asked` on.
fn skew_of(asked: SystemTime, took: Duration, there: SystemTime) -> f64 {
    let here = asked + took / 2;
    match here.duration_since(there) {
        Ok(ahead) => ahead.as_secs_f64(),
        Err(behind) => -behind.duration().as_secs_f64(),
    }
}

/// What a server is open for.
struct OpenedGroups {
    groups: Vec<u16>,
    /// Whether all were heard.
    complete: bool,
    /// Who was not.
    missing: BTreeSet<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_ahead_or_behind_by_what_half_of_the_question_took_later() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let took = Duration::from_millis(500);
        assert_eq!(skew_of(at(100), took, at(90)), 10.25);
        assert_eq!(skew_of(at(100), took, at(110)), -9.75);
        assert_eq!(skew_of(at(100), Duration::ZERO, at(100)), 0.0);
    }

    #[test]
    fn names_are_unique_and_in_the_order_in_which_they_began() {
        let name = |micros| unique(UNIX_EPOCH + Duration::from_micros(micros));
        let (before, after) = (0x6_0a24_181d_ffff, 0x6_0a24_181e_0000);
        assert!(name(before) < name(after) && name(0) < name(before));
        assert_ne!(name(before), name(before));
        // Of one length, and such as `lease.lua` takes for a process' own.
        assert!(name(0).len() == 23 && name(before).len() == 23);
        assert!(name(before).chars().all(|letter| letter.is_ascii_alphanumeric()));
    }
}
