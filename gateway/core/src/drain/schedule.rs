//! When each client of a node that drains is sent to the other nodes.
//!
//! Clients leave in batches over a time that grows with their number, so that the other nodes, each
//! of which takes `limits.accepts_per_second`, refuse none of them. A few leave within milliseconds.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use skein_protocol::ids::ConnectionId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How many batches there are, whatever the number of clients.
const BATCHES: usize = 256;
/// The least time over which `after_ms` is drawn: it spreads the clients of one batch.
const AFTER_MIN: Duration = Duration::from_secs(1);
/// The longest time that a client is asked to wait.
const AFTER_MAX: Duration = Duration::from_secs(300);

/// How fast clients are sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainRate {
    /// The longest time over which over are said (`drain.window`).
    pub window: Duration,
    /// How many clients the other nodes take in a second.
    pub per_second: u32,
}

/// The times of one schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DrainPlan {
    /// Goodbyes are said over this time.
    over: Duration,
    /// `after_ms` is drawn from zero to this.
    after: Duration,
}

impl DrainRate {
    /// Clients are served until their turn, so that the over take all of the time that there is;
    /// beyond the window clients wait by themselves.
    fn plan(self, clients: usize) -> DrainPlan {
        let needed =
            Duration::from_secs(1).mul_f64(clients as f64 / f64::from(self.per_second.max(1)));
        let after = if needed > self.window { needed } else { Duration::ZERO };
        DrainPlan { over: needed.min(self.window), after: after.clamp(AFTER_MIN, AFTER_MAX) }
    }
}

/// The schedule of a node's clients.
#[derive(Debug)]
pub struct DrainSchedule {
    batches: Box<[DrainBatch]>,
}

/// The clients that leave at one moment.
#[derive(Debug)]
pub struct DrainBatch {
    turn: CancellationToken,
    after_max_ms: AtomicU64,
}

impl DrainSchedule {
    /// Nobody leaves yet. All do at once when `leaving` is cancelled.
    pub fn new(leaving: &CancellationToken) -> Self {
        let after_max_ms = AFTER_MIN.as_millis() as u64;
        let batch = |_| DrainBatch {
            turn: leaving.child_token(),
            after_max_ms: AtomicU64::new(after_max_ms),
        };
        Self { batches: (0..BATCHES).map(batch).collect() }
    }

    /// The batch of a connection. Ids are random, so that batches are of one size.
    pub fn batch(&self, connection: ConnectionId) -> &DrainBatch {
        &self.batches[usize::from(connection.0.as_bytes()[15]) % BATCHES]
    }

    /// Sends clients away, one batch after the other, and ends early where `clients` counts none.
    /// Cancel-safe: those whose turn has not come stay.
    pub async fn run(&self, rate: DrainRate, clients: impl Fn() -> usize) {
        let DrainPlan { over, after } = rate.plan(clients());
        let after_max_ms = after.as_millis() as u64;
        let begun = Instant::now();
        for (number, batch) in (0..).zip(&self.batches) {
            batch.after_max_ms.store(after_max_ms, Ordering::Relaxed);
            if clients() > 0 {
                tokio::time::sleep_until(begun + over * number / BATCHES as u32).await;
            }
            batch.turn.cancel();
        }
    }
}

impl DrainBatch {
    /// Resolves when its clients leave. Cancel-safe.
    pub async fn left(&self) {
        self.turn.cancelled().await;
    }

    /// After how many milliseconds one of its clients is asked to come back.
    pub fn after_ms(&self) -> u64 {
        rand::random_range(0..self.after_max_ms.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const RATE: DrainRate = DrainRate { window: Duration::from_secs(20), per_second: 2500 };

    #[test]
    fn the_time_grows_with_the_number_of_clients_and_ends_at_the_window() {
        let plan = |clients| {
            let DrainPlan { over, after } = RATE.plan(clients);
            (over.as_millis(), after.as_millis())
        };
        assert_eq!(plan(0), (0, 1000));
        assert_eq!(plan(10), (4, 1000));
        assert_eq!(plan(28_000), (11_200, 1000));
        assert_eq!(plan(50_000), (20_000, 1000));
        // Clients whose goodbye comes too early wait by themselves.
        assert_eq!(plan(100_000), (20_000, 40_000));
        assert_eq!(plan(10_000_000), (20_000, 300_000));
    }

    #[tokio::test(start_paused = true)]
    async fn batches_leave_evenly_over_the_time() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        let begun = Instant::now();
        let watch = async {
            let mut most = 0;
            loop {
                tokio::time::sleep(SECOND).await;
                let gone = schedule.batches.iter().filter(|batch| batch.turn.is_cancelled());
                let gone = gone.count();
                // 11.2 s for 256 batches.
                let due = begun.elapsed().as_millis() as usize * BATCHES / 11_200;
                assert!(gone.abs_diff(due.min(BATCHES)) <= 1, "{gone} at {:?}", begun.elapsed());
                most = most.max(gone);
            }
        };
        tokio::select! {
            () = schedule.run(RATE, || 28_000) => {}
            () = watch => {}
        }
        let took = begun.elapsed();
        assert!(took > 11 * SECOND && took < 12 * SECOND, "{took:?}");
        assert!(!leaving.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_whose_clients_have_all_left_waits_no_longer() {
        let schedule = DrainSchedule::new(&CancellationToken::new());
        let begun = Instant::now();
        let (clients, asked) = (AtomicUsize::new(50_000), AtomicUsize::new(0));
        let count = || {
            if asked.fetch_add(1, Ordering::Relaxed) > BATCHES / 4 {
                clients.store(0, Ordering::Relaxed);
            }
            clients.load(Ordering::Relaxed)
        };
        schedule.run(RATE, count).await;
        assert!(begun.elapsed() < 6 * SECOND, "{:?}", begun.elapsed());
        assert!(schedule.batches.iter().all(|batch| batch.turn.is_cancelled()));
    }

    #[tokio::test]
    async fn the_end_of_the_node_is_the_turn_of_every_batch() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        leaving.cancel();
        let batch = schedule.batch(ConnectionId::random());
        batch.left().await;
        assert!(batch.after_ms() < 1000);
    }
}
