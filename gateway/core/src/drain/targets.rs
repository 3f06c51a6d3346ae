//! The nodes to which the clients of a draining node go.
//!
//! A client that is led to the node with the fewest connections leaves the cluster even. It must not
//! be led to a node that restarts next, or it moves again. Three cases are told apart (ADR 22):
//!
//! - A younger node has at most half of this node's clients: it was started to replace this one, and
//!   the clients go to it and to others that have as few.
//! - No such node exists and this node stops: it is probably restarted in place. Its clients wait
//!   and come back to it, since every other node is about to be restarted as well or was already.
//! - Otherwise the clients go to the other nodes.

use std::time::Duration;

/// The longest time over which returning clients may arrive: beyond it, they go to other nodes.
const RETURN_SPREAD_MAX: Duration = Duration::from_secs(5);

/// Another node that takes clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainTarget {
    /// The value of `?node=` that leads to it; `None` if unknown.
    pub route: Option<String>,
    /// The number of its connections, those that were led to it included.
    pub connections: u64,
    /// The most connections that it takes.
    pub connections_max: u64,
    /// The number of clients that it takes per second, above 0.
    pub intake_per_second: u32,
    /// The time since its start.
    pub uptime: Duration,
}

/// The node that drains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainingNode {
    /// The number of its clients.
    pub clients: u64,
    /// The time since its start.
    pub uptime: Duration,
    /// The number of clients that it takes per second, above 0.
    pub intake_per_second: u32,
    /// If it is expected to be back at its route: the route, and the time that takes.
    pub returns: Option<(String, Duration)>,
}

/// The nodes to which clients go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainTargets {
    /// To any: no other node is known to take clients.
    Unknown,
    /// To this node once it is back.
    Return {
        /// The value of `?node=`.
        route: String,
        /// The time until the node is back.
        after: Duration,
        /// The time over which clients arrive then.
        spread: Duration,
    },
    /// To other nodes, each next client to the one with the fewest connections.
    Others(Vec<DrainTarget>),
}

impl DrainTargets {
    /// Chooses the nodes for the clients of a draining node.
    pub fn choose(own: &DrainingNode, others: Vec<DrainTarget>) -> Self {
        if others.is_empty() {
            return Self::Unknown;
        }
        let is_replacement = |other: &DrainTarget| {
            other.uptime < own.uptime && other.connections.saturating_mul(2) <= own.clients
        };
        let spread = duration_for(own.clients, own.intake_per_second);
        match &own.returns {
            Some((route, after))
                if !others.iter().any(is_replacement) && spread <= RETURN_SPREAD_MAX =>
            {
                Self::Return { route: route.clone(), after: *after, spread }
            }
            _ => Self::Others(others),
        }
    }

    /// The time in which the other nodes take so many clients.
    pub fn time_for(&self, clients: u64) -> Duration {
        let Self::Others(targets) = self else { return Duration::ZERO };
        let before: Vec<u64> = targets.iter().map(|target| target.connections).collect();
        let mut after = targets.clone();
        for _ in 0..clients {
            next_of(&mut after);
        }
        let times = before.iter().zip(&after).map(|(before, after)| {
            duration_for(after.connections - before, after.intake_per_second)
        });
        times.max().unwrap_or_default()
    }

    /// The value of `?node=` for the next client.
    pub fn next_route(&mut self) -> Option<String> {
        match self {
            Self::Unknown => None,
            Self::Return { route, .. } => Some(route.clone()),
            // A proxy sends a client without a route to the least busy node.
            Self::Others(targets) => Some(next_of(targets).unwrap_or_else(|| "any".to_owned())),
        }
    }
}

/// Chooses the node with the fewest connections, the younger of equals, and counts a client on it.
/// Nodes that are full are chosen only if all are.
pub fn next_of(targets: &mut [DrainTarget]) -> Option<String> {
    let order = |target: &DrainTarget| {
        let is_full = target.connections >= target.connections_max;
        (is_full, target.connections, target.uptime)
    };
    let target = targets.iter_mut().min_by_key(|target| order(target))?;
    target.connections += 1;
    target.route.clone()
}

/// The time in which a node takes so many clients.
pub(super) fn duration_for(clients: u64, per_second: u32) -> Duration {
    Duration::from_secs(1).mul_f64(clients as f64 / f64::from(per_second.max(1)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn target(route: &str, connections: u64, minutes: u32) -> DrainTarget {
        DrainTarget {
            route: Some(route.to_owned()),
            connections,
            connections_max: 1_000_000,
            intake_per_second: 2500,
            uptime: MINUTE * minutes,
        }
    }

    fn own(clients: u64, returns: bool) -> DrainingNode {
        DrainingNode {
            clients,
            uptime: 10 * MINUTE,
            intake_per_second: 2500,
            returns: returns.then(|| ("own".to_owned(), Duration::from_secs(1))),
        }
    }

    /// How many of `clients` go where.
    fn spread(targets: &mut DrainTargets, clients: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..clients {
            *counts.entry(targets.next_route().unwrap()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn clients_of_a_replaced_node_all_go_to_the_new_one() {
        let others = vec![target("b", 667, 10), target("c", 666, 10), target("new", 0, 0)];
        let mut targets = DrainTargets::choose(&own(667, true), others);
        let time = targets.time_for(667);
        assert!(time.abs_diff(Duration::from_millis(267)) < Duration::from_millis(2), "{time:?}");
        let counts = spread(&mut targets, 667);
        assert!(counts["new"] >= 666, "{counts:?}");
    }

    #[test]
    fn clients_of_a_node_restarted_in_place_come_back_to_it() {
        // The others were restarted already, or will be: both have their own clients.
        let others = vec![target("b", 667, 1), target("c", 666, 20)];
        let mut targets = DrainTargets::choose(&own(667, true), others);
        let DrainTargets::Return { spread: time, .. } = &targets else { panic!("{targets:?}") };
        assert_eq!(time.as_millis(), 266);
        assert_eq!(spread(&mut targets, 3), BTreeMap::from([("own".to_owned(), 3)]));
    }

    #[test]
    fn clients_of_a_node_that_stays_away_fill_the_others_evenly() {
        let others = || vec![target("b", 100, 10), target("c", 400, 10), target("d", 400, 3)];
        let mut targets = DrainTargets::choose(&own(600, false), others());
        let counts = spread(&mut targets, 600);
        let even = [("b", 400), ("c", 100), ("d", 100)].map(|(to, n)| (to.to_owned(), n));
        assert_eq!(counts, BTreeMap::from(even));
        // The younger of equals comes first.
        let mut equals = DrainTargets::Others(vec![target("old", 5, 9), target("new", 5, 1)]);
        assert_eq!(equals.next_route().as_deref(), Some("new"));
        // So many that waiting for this node takes longer than going elsewhere.
        assert!(matches!(
            DrainTargets::choose(&own(100_000, true), others()),
            DrainTargets::Others(_)
        ));
    }

    #[test]
    fn full_nodes_and_nodes_without_a_route_are_handled() {
        let full = DrainTarget { connections_max: 10, ..target("full", 10, 1) };
        let mut targets = DrainTargets::Others(vec![full, target("b", 50, 1)]);
        assert_eq!(targets.next_route().as_deref(), Some("b"));
        let nameless = DrainTarget { route: None, ..target("", 0, 1) };
        let mut targets = DrainTargets::choose(&own(1, false), vec![nameless]);
        assert_eq!(targets.next_route().as_deref(), Some("any"));
        assert_eq!(DrainTargets::choose(&own(1, true), vec![]), DrainTargets::Unknown);
        assert_eq!(DrainTargets::Unknown.next_route(), None);
    }
}
