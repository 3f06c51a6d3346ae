//! The times at which the clients of a draining node are told to reconnect elsewhere.
//!
//! Clients leave in batches over a time that grows with their number, so that the other nodes, each
//! of which accepts `limits.accepts_per_second`, reject none of them. A few clients leave within
//! milliseconds.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use skein_protocol::ids::ConnectionId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The number of batches, for any number of clients.
const BATCHES: usize = 256;
/// The least range of `after_ms`: it spreads the clients of one batch.
const AFTER_MIN: Duration = Duration::from_secs(1);
/// The longest time that a client is asked to wait.
const AFTER_MAX: Duration = Duration::from_secs(300);

/// The rate at which clients are disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainRate {
    /// The longest time over which `reconnect` frames are sent (`drain.window`).
    pub window: Duration,
    /// The number of clients per second that the other nodes accept.
    pub per_second: u32,
}

/// The times of one drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DrainPlan {
    /// `reconnect` frames are sent over this time.
    send_over: Duration,
    /// `after_ms` is drawn from zero to this.
    after: Duration,
}

impl DrainRate {
    /// Clients are served until their batch is due, so the frames are spread over the whole window;
    /// beyond it, clients wait by themselves.
    fn plan(self, clients: usize) -> DrainPlan {
        let needed =
            Duration::from_secs(1).mul_f64(clients as f64 / f64::from(self.per_second.max(1)));
        let after = if needed > self.window { needed } else { Duration::ZERO };
        DrainPlan { send_over: needed.min(self.window), after: after.clamp(AFTER_MIN, AFTER_MAX) }
    }
}

/// The drain of a node's clients.
#[derive(Debug)]
pub struct DrainSchedule {
    batches: Box<[DrainBatch]>,
}

/// The clients that leave at one moment.
#[derive(Debug)]
pub struct DrainBatch {
    due: CancellationToken,
    after_max_ms: AtomicU64,
}

impl DrainSchedule {
    /// A schedule that has not started. Cancelling `leaving` ends all batches at once.
    pub fn new(leaving: &CancellationToken) -> Self {
        let after_max_ms = AFTER_MIN.as_millis() as u64;
        let batch = |_| DrainBatch {
            due: leaving.child_token(),
            after_max_ms: AtomicU64::new(after_max_ms),
        };
        Self { batches: (0..BATCHES).map(batch).collect() }
    }

    /// The batch of a connection. Ids are random, so batches have equal sizes.
    pub fn batch(&self, connection: ConnectionId) -> &DrainBatch {
        &self.batches[usize::from(connection.0.as_bytes()[15]) % BATCHES]
    }

    /// Disconnects the batches one after the other, and ends early once `clients` returns 0.
    /// Cancel-safe: batches that are not due stay.
    pub async fn run(&self, rate: DrainRate, clients: impl Fn() -> usize) {
        let DrainPlan { send_over, after } = rate.plan(clients());
        let after_max_ms = after.as_millis() as u64;
        let begun = Instant::now();
        for (number, batch) in (0..).zip(&self.batches) {
            batch.after_max_ms.store(after_max_ms, Ordering::Relaxed);
            if clients() > 0 {
                tokio::time::sleep_until(begun + send_over * number / BATCHES as u32).await;
            }
            batch.due.cancel();
        }
    }
}

impl DrainBatch {
    /// Resolves when the clients of the batch must leave. Cancel-safe.
    pub async fn left(&self) {
        self.due.cancelled().await;
    }

    /// A random time in milliseconds after which a client of the batch should reconnect.
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
    fn drain_time_grows_with_clients_up_to_the_window() {
        let plan = |clients| {
            let DrainPlan { send_over, after } = RATE.plan(clients);
            (send_over.as_millis(), after.as_millis())
        };
        assert_eq!(plan(0), (0, 1000));
        assert_eq!(plan(10), (4, 1000));
        assert_eq!(plan(28_000), (11_200, 1000));
        assert_eq!(plan(50_000), (20_000, 1000));
        // Clients whose frame comes too early wait by themselves.
        assert_eq!(plan(100_000), (20_000, 40_000));
        assert_eq!(plan(10_000_000), (20_000, 300_000));
    }

    #[tokio::test(start_paused = true)]
    async fn batches_leave_evenly_over_the_drain_time() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        let begun = Instant::now();
        let watch = async {
            let mut most = 0;
            loop {
                tokio::time::sleep(SECOND).await;
                let gone = schedule.batches.iter().filter(|batch| batch.due.is_cancelled());
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
    async fn drain_ends_early_once_all_clients_have_left() {
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
        assert!(schedule.batches.iter().all(|batch| batch.due.is_cancelled()));
    }

    #[tokio::test]
    async fn shutdown_ends_every_batch_at_once() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        leaving.cancel();
        let batch = schedule.batch(ConnectionId::random());
        batch.left().await;
        assert!(batch.after_ms() < 1000);
    }
}
