//! Many connections that open and close: whether mass leaves delay new clients, and whether all
//! resources are released.
//!
//! The gateway is a process of its own. `make test-full` runs a small share; `make soak` runs everything
//! (it sets `SKEIN_SOAK=full`) and prints the figures. Both use an optimised gateway.

use std::time::Duration;

use tokio::time::Instant;

use crate::harness::{Node, get};

pub mod raw_client;
mod leave;
mod churn;
mod unauthenticated;

/// `full` if `SKEIN_SOAK=full`, else `share`.
fn full_or_share(full: usize, share: usize) -> usize {
    if is_full() { full } else { share }
}

fn is_full() -> bool {
    std::env::var("SKEIN_SOAK").is_ok_and(|value| value == "full")
}

/// How long the gateway may take to settle after many clients have left: rooms stay subscribed for
/// 30 s.
const SETTLE_MAX: Duration = Duration::from_secs(120);

/// Resources that a gateway uses.
#[derive(Clone, Copy, Debug, Default)]
struct ResourceUsage {
    connections: i64,
    members: i64,
    rooms: i64,
    inboxes: i64,
    tasks: i64,
    descriptors: usize,
    /// Anonymous memory, without pages shared with other processes.
    memory_kib: u64,
}

impl ResourceUsage {
    async fn by(node: &Node) -> Self {
        let page = get(node.admin, "/metrics").await.body;
        let gauge = |name: &str| {
            let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name}")).parse::<f64>().unwrap() as i64
        };
        let process = format!("/proc/{}", node.process.pid());
        let memory = std::fs::read_to_string(format!("{process}/smaps_rollup")).unwrap();
        let memory = memory.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
        Self {
            connections: gauge("gateway_connections"),
            members: gauge("gateway_members"),
            rooms: gauge("gateway_rooms"),
            inboxes: gauge("gateway_inboxes"),
            tasks: gauge("gateway_tasks"),
            descriptors: std::fs::read_dir(format!("{process}/fd")).unwrap().count(),
            memory_kib: memory.trim().trim_end_matches(" kB").parse().unwrap(),
        }
    }

    /// The usage once `is_settled` holds.
    async fn once(node: &Node, what: &str, is_settled: impl Fn(&Self) -> bool) -> Self {
        let begun = Instant::now();
        loop {
            let held = Self::by(node).await;
            if is_settled(&held) {
                return held;
            }
            assert!(begun.elapsed() < SETTLE_MAX, "{what}: not within {SETTLE_MAX:?}: {held:?}");
            crate::harness::poll_pause().await;
        }
    }
}

/// Quantiles of times, as text.
fn quantiles(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", at(0.5), at(0.99), at(1.0))
}
