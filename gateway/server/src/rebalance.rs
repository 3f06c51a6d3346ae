//! Rebalancing: a node with more than its share of connections moves some of them to the others.
//!
//! Clients stay on their node until they reconnect, so that a node that was added would stay empty.
//! A node with more than 1.2 times the mean moves its excess over the mean to the nodes with the
//! fewest, some per second. It asks only clients that have been connected for a minute, so that no
//! client is moved twice in a minute, and stops for a while if moved clients come back: the proxy
//! then does not follow `?node=`.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use rand::seq::SliceRandom as _;
use skein_core::{
    bus::presence_store::unix_millis_now,
    connection::handle::ConnectionHandle,
    drain::targets::{DrainTarget, next_of},
};
use skein_protocol::ids::SessionId;
use tokio::time::Instant;

use crate::http::Node;

/// How often the counts are compared.
const INTERVAL: Duration = Duration::from_secs(1);
/// A node above this multiple of the mean begins to move connections, and stops at the mean.
const BEGIN_ABOVE: f64 = 1.2;
/// The least excess that is worth moving.
const EXCESS_MIN: f64 = 5.0;
/// The least age of a connection that is moved.
const AGE_MIN: Duration = Duration::from_secs(60);
/// How long it takes until a moved client is in the announcement of its new node.
const ANNOUNCED_AFTER: Duration = Duration::from_secs(2);
/// The number of moved clients from which their returns are judged.
const JUDGED_FROM: usize = 20;
/// The pause after at least half of the moved clients have come back.
const SUSPENSION: Duration = Duration::from_secs(15 * 60);

/// Moves connections of this node to others. Its bounds are those of the constants of this module,
/// and `rebalance.per_second`.
#[derive(Debug)]
pub struct Rebalancer {
    per_second: u32,
    moved: Mutex<MovedClients>,
}

/// The clients that this node has moved lately.
#[derive(Debug, Default)]
struct MovedClients {
    /// Their sessions; at most as many as are moved in [`AGE_MIN`].
    sessions: HashMap<SessionId, Instant>,
    /// Their number since rebalancing has begun, and how many of them came back here.
    moved: usize,
    returned: usize,
}

impl MovedClients {
    fn come_back(&self) -> bool {
        self.moved >= JUDGED_FROM && self.returned * 2 >= self.moved
    }
}

/// Decides how many connections to move.
#[derive(Debug, Default)]
struct BalanceControl {
    is_active: bool,
}

/// The action of a node on its number of connections now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BalanceStep {
    /// Nothing: the node has its share.
    None,
    /// Move so many connections.
    Move(u64),
    /// Nothing any more: the node has its share again.
    End,
}

impl BalanceControl {
    /// The next step of a node with `own` connections beside `others`. The targets keep only nodes
    /// below the mean.
    fn step(&mut self, own: u64, others: &mut Vec<DrainTarget>, per_second: u32) -> BalanceStep {
        let sum = others.iter().map(|other| other.connections).sum::<u64>() + own;
        let mean = sum as f64 / (others.len() + 1) as f64;
        let excess = own as f64 - mean;
        if !self.is_active {
            let is_uneven = own as f64 > mean * BEGIN_ABOVE && excess >= EXCESS_MIN;
            self.is_active = is_uneven && !others.is_empty();
            if !self.is_active {
                return BalanceStep::None;
            }
        }
        others.retain(|other| (other.connections as f64) < mean);
        let missing = others.iter().map(|other| mean - other.connections as f64).sum::<f64>();
        let count = excess.min(missing).floor().max(0.0) as u64;
        if count == 0 {
            self.is_active = false;
            return BalanceStep::End;
        }
        BalanceStep::Move(count.min(per_second.into()))
    }
}

impl Rebalancer {
    /// Moves at most `per_second` connections per second; 0: none.
    pub fn new(per_second: u32) -> Self {
        Self { per_second, moved: Mutex::default() }
    }

    /// Records that a client has resumed a session on this node.
    pub fn record_resumed(&self, session: SessionId) {
        let moved = &mut *self.moved.lock();
        if moved.sessions.remove(&session).is_some_and(|at| at.elapsed() < AGE_MIN) {
            moved.returned += 1;
        }
    }

    /// Compares this node with the others every second, for ever.
    pub async fn run(&self, node: &Node) {
        if self.per_second == 0 {
            return std::future::pending().await;
        }
        let mut control = BalanceControl::default();
        let mut candidates = Vec::<Weak<ConnectionHandle>>::new();
        let mut on_their_way = VecDeque::<(Instant, String)>::new();
        loop {
            tokio::time::sleep(INTERVAL).await;
            if node.is_draining() {
                control = BalanceControl::default();
                continue;
            }
            while on_their_way.front().is_some_and(|(at, _)| at.elapsed() > ANNOUNCED_AFTER) {
                on_their_way.pop_front();
            }
            let mut others = node.drain_targets();
            others.retain(|other| other.route.is_some());
            for other in &mut others {
                let comes = |(_, route): &&(Instant, String)| other.route.as_ref() == Some(route);
                other.connections += on_their_way.iter().filter(comes).count() as u64;
            }
            let (own, was_active) = (node.connections() as u64, control.is_active);
            let count = match control.step(own, &mut others, self.per_second) {
                BalanceStep::None => continue,
                BalanceStep::End => {
                    let moved = std::mem::take(&mut *self.moved.lock()).moved;
                    tracing::info!(moved, connections = own, "rebalanced: this node has its share");
                    continue;
                }
                BalanceStep::Move(count) => count as usize,
            };
            if !was_active {
                let (fewest, per_second) =
                    (others.iter().map(|other| other.connections).min(), self.per_second);
                tracing::info!(
                    connections = own,
                    fewest,
                    per_second,
                    "rebalancing: this node has more than 1.2 times the mean of connections, and \
                     moves its excess to the nodes with the fewest"
                );
            }
            if candidates.len() < count {
                candidates = movable(node).await;
            }
            for _ in 0..count {
                let Some(handle) = next_movable(&mut candidates) else { break };
                let Some(route) = next_of(&mut others) else { break };
                handle.move_to(&route);
                node.metrics.rebalanced_connections.inc();
                on_their_way.push_back((Instant::now(), route));
                self.record_moved(&handle);
            }
            if self.moved.lock().come_back() {
                let MovedClients { moved, returned, .. } = std::mem::take(&mut *self.moved.lock());
                tracing::warn!(
                    moved,
                    returned,
                    "rebalancing paused for 15 minutes: moved clients came back, so the proxy does \
                     not follow `?node=`; let it (docs/operations.md), or set rebalance.per_second \
                     to 0"
                );
                control = BalanceControl::default();
                tokio::time::sleep(SUSPENSION).await;
            }
        }
    }

    fn record_moved(&self, handle: &ConnectionHandle) {
        let Some(owner) = handle.owner() else { return };
        let (moved, now) = (&mut *self.moved.lock(), Instant::now());
        moved.sessions.retain(|_, at| now.duration_since(*at) < AGE_MIN);
        moved.sessions.insert(owner.session, now);
        moved.moved += 1;
    }
}

/// Connections that may be moved, in random order, for some seconds.
async fn movable(node: &Node) -> Vec<Weak<ConnectionHandle>> {
    let mut handles = node.services.hub.connections(None).await;
    handles.retain(|handle| is_movable(handle));
    handles.shuffle(&mut rand::rng());
    // The rest is looked up when these are used up, since it would grow old.
    handles.truncate(10 * node.rebalancer.per_second as usize);
    handles.iter().map(Arc::downgrade).collect()
}

fn next_movable(candidates: &mut Vec<Weak<ConnectionHandle>>) -> Option<Arc<ConnectionHandle>> {
    while let Some(candidate) = candidates.pop() {
        if let Some(handle) = candidate.upgrade().filter(|handle| is_movable(handle)) {
            return Some(handle);
        }
    }
    None
}

/// Whether a connection may be moved. Event streams are not: a browser cannot change its URL.
fn is_movable(handle: &ConnectionHandle) -> bool {
    let is_old = handle.owner().is_some_and(|owner| {
        unix_millis_now().saturating_sub(owner.since / 1000) >= AGE_MIN.as_millis() as u64
    });
    let is_web_socket = handle.outbox.socket().is_some();
    is_old && is_web_socket && !handle.outbox.is_closing() && handle.moves_to().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn others(connections: &[u64]) -> Vec<DrainTarget> {
        let target = |(number, connections): (usize, &u64)| DrainTarget {
            route: Some(number.to_string()),
            connections: *connections,
            connections_max: 1_000_000,
            intake_per_second: 2500,
            uptime: Duration::from_secs(60),
        };
        connections.iter().enumerate().map(target).collect()
    }

    #[test]
    fn node_moves_its_excess_above_a_fifth_and_no_more() {
        let step = |own, connections: &[u64]| {
            let mut targets = others(connections);
            (BalanceControl::default().step(own, &mut targets, 10), targets.len())
        };
        assert_eq!(step(500, &[500, 0, 0]), (BalanceStep::Move(10), 2));
        assert_eq!(step(119, &[91, 90]).0, BalanceStep::None);
        assert_eq!(step(130, &[85, 85]), (BalanceStep::Move(10), 2));
        // A handful is not worth it, and without other nodes nothing is.
        assert_eq!(step(6, &[0]).0, BalanceStep::None);
        assert_eq!(step(1000, &[]).0, BalanceStep::None);
        assert_eq!(step(12, &[0]), (BalanceStep::Move(6), 1));
    }

    #[test]
    fn two_nodes_with_all_connections_become_even_with_two_new_ones() {
        let mut counts = [500_u64, 500, 0, 0];
        let mut controls: [BalanceControl; 4] = Default::default();
        let mut seconds = 0;
        loop {
            let (mut is_over, before) = (true, counts);
            for (own, control) in controls.iter_mut().enumerate() {
                let mut rest: Vec<u64> = before.to_vec();
                rest.remove(own);
                let mut targets = others(&rest);
                if let BalanceStep::Move(count) = control.step(before[own], &mut targets, 10) {
                    is_over = false;
                    for _ in 0..count {
                        let to: usize = next_of(&mut targets).unwrap().parse().unwrap();
                        counts[own] -= 1;
                        counts[to + usize::from(to >= own)] += 1;
                    }
                }
            }
            if is_over {
                break;
            }
            seconds += 1;
        }
        assert!(counts.iter().all(|count| count.abs_diff(250) <= 2), "{counts:?}");
        assert!((25..=30).contains(&seconds), "{seconds}");
    }

    #[test]
    fn returning_clients_are_noticed() {
        let rebalancer = Rebalancer::new(10);
        let sessions: Vec<SessionId> = (0..20).map(|_| SessionId::random()).collect();
        for session in &sessions {
            let moved = &mut *rebalancer.moved.lock();
            moved.sessions.insert(*session, Instant::now());
            moved.moved += 1;
        }
        rebalancer.record_resumed(SessionId::random());
        for session in &sessions[..9] {
            rebalancer.record_resumed(*session);
            rebalancer.record_resumed(*session);
        }
        assert!(!rebalancer.moved.lock().come_back());
        rebalancer.record_resumed(sessions[9]);
        assert!(rebalancer.moved.lock().come_back());
    }
}
