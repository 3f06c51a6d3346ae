//! The times at which the clients of a draining node are told to reconnect, and where.
//!
//! Clients leave in batches over a time that grows with their number, so that the nodes they go to,
//! each of which accepts `limits.accepts_per_second`, reject none of them. A few clients leave
//! within milliseconds. Clients that come back to this node leave at once, so that it can restart,
//! and spread their return.

use std::{ops::Range, time::Duration};

use parking_lot::Mutex;
use skein_protocol::ids::ConnectionId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::targets::{DrainTargets, duration_for};

/// The number of batches, for any number of clients.
const BATCHES: usize = 256;
/// The least range of `after_ms`: it spreads the clients of one batch.
const JITTER: Duration = Duration::from_millis(100);
/// The same if no other node is known: clients come back to this node, or find another one
/// themselves.
const JITTER_WITHOUT_TARGETS: Duration = Duration::from_secs(1);
/// The longest time that a client is asked to wait.
const AFTER_MAX: Duration = Duration::from_secs(300);

/// The rate at which clients are disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainRate {
    /// The longest time over which `reconnect` frames are sent (`drain.window`).
    pub window: Duration,
    /// The number of clients per second that this node takes, and others of which nothing else is
    /// known.
    pub per_second: u32,
}

/// The times of one drain.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DrainPlan {
    /// `reconnect` frames are sent over this time.
    send_over: Duration,
    /// `after_ms` is drawn from this range.
    after: Range<Duration>,
}

impl DrainRate {
    /// Clients are served until their batch is due, so the frames are spread over the whole window;
    /// beyond it, clients wait by themselves.
    fn plan(self, clients: usize, targets: &DrainTargets) -> DrainPlan {
        let (needed, jitter) = match targets {
            DrainTargets::Return { after, spread, .. } => {
                let last = (*after + (*spread).max(JITTER)).min(AFTER_MAX);
                return DrainPlan { send_over: Duration::ZERO, after: *after.min(&last)..last };
            }
            DrainTargets::Others(_) => (targets.time_for(clients as u64), JITTER),
            DrainTargets::Unknown => {
                (duration_for(clients as u64, self.per_second), JITTER_WITHOUT_TARGETS)
            }
        };
        let after = if needed > self.window { needed } else { Duration::ZERO };
        let after = after.clamp(jitter, AFTER_MAX);
        DrainPlan { send_over: needed.min(self.window), after: Duration::ZERO..after }
    }
}

/// The drain of a node's clients.
#[derive(Debug)]
pub struct DrainSchedule {
    leaving: CancellationToken,
    /// Cancelled when the clients of the batch must leave.
    batches: Box<[Mutex<CancellationToken>]>,
    advice: Mutex<(Range<Duration>, DrainTargets)>,
}

/// Tells one client's task when the client must leave, and where to.
#[derive(Debug)]
pub struct DrainNotice<'a> {
    schedule: &'a DrainSchedule,
    due: CancellationToken,
}

/// Advice to a client that must leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoveAdvice {
    /// The time after which it reconnects, ms.
    pub after_ms: u64,
    /// The value to send as `?node=`.
    pub node: Option<String>,
}

impl DrainSchedule {
    /// A schedule that has not started. Cancelling `leaving` ends all batches at once.
    pub fn new(leaving: &CancellationToken) -> Self {
        Self {
            leaving: leaving.clone(),
            batches: (0..BATCHES).map(|_| Mutex::new(leaving.child_token())).collect(),
            advice: Mutex::new((Duration::ZERO..JITTER_WITHOUT_TARGETS, DrainTargets::Unknown)),
        }
    }

    /// The notice of a new connection. Ids are random, so batches have equal sizes.
    pub fn notice(&self, connection: ConnectionId) -> DrainNotice<'_> {
        let batch = usize::from(connection.0.as_bytes()[15]) % BATCHES;
        DrainNotice { schedule: self, due: self.batches[batch].lock().clone() }
    }

    /// Disconnects the batches one after the other, and ends early once `clients` returns 0.
    /// Cancel-safe: batches that are not due stay.
    pub async fn run(&self, rate: DrainRate, targets: DrainTargets, clients: impl Fn() -> usize) {
        let DrainPlan { send_over, after } = rate.plan(clients(), &targets);
        *self.advice.lock() = (after, targets);
        let begun = Instant::now();
        for (number, batch) in (0..).zip(&self.batches) {
            if clients() > 0 {
                tokio::time::sleep_until(begun + send_over * number / BATCHES as u32).await;
            }
            batch.lock().cancel();
        }
    }

    /// Serves new clients again, after a run that was cancelled or has ended. Clients that were told
    /// to leave do so.
    pub fn reset(&self) {
        for batch in &self.batches {
            let due = &mut *batch.lock();
            if due.is_cancelled() {
                *due = self.leaving.child_token();
            }
        }
    }
}

impl DrainNotice<'_> {
    /// Resolves when the client must leave. Cancel-safe.
    pub async fn due(&self) {
        self.due.cancelled().await;
    }

    /// When and where the client should reconnect: a random time, and the next node.
    pub fn advice(&self) -> MoveAdvice {
        let (after, targets) = &mut *self.schedule.advice.lock();
        let after = after.start.as_millis() as u64..after.end.as_millis() as u64;
        MoveAdvice { after_ms: rand::random_range(after), node: targets.next_route() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const RATE: DrainRate = DrainRate { window: Duration::from_secs(20), per_second: 2500 };

    #[test]
    fn drain_time_grows_with_clients_up_to_the_window() {
        let plan = |clients| {
            let DrainPlan { send_over, after } = RATE.plan(clients, &DrainTargets::Unknown);
            assert_eq!(after.start, Duration::ZERO);
            (send_over.as_millis(), after.end.as_millis())
        };
        assert_eq!(plan(0), (0, 1000));
        assert_eq!(plan(10), (4, 1000));
        assert_eq!(plan(28_000), (11_200, 1000));
        assert_eq!(plan(50_000), (20_000, 1000));
        // Clients whose frame comes too early wait by themselves.
        assert_eq!(plan(100_000), (20_000, 40_000));
        assert_eq!(plan(10_000_000), (20_000, 300_000));
    }

    #[test]
    fn returning_clients_leave_at_once_and_arrive_spread() {
        let (after, spread) = (2 * SECOND, SECOND / 2);
        let returning = DrainTargets::Return { route: "a".to_owned(), after, spread };
        let plan = RATE.plan(1250, &returning);
        assert_eq!((plan.send_over, plan.after), (Duration::ZERO, after..after + spread));
    }

    #[test]
    fn clients_that_come_after_an_undo_are_served() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        let connection = ConnectionId::random();
        let before = schedule.notice(connection);
        for batch in &schedule.batches {
            batch.lock().cancel();
        }
        assert!(schedule.notice(connection).due.is_cancelled());
        schedule.reset();
        let after = schedule.notice(connection);
        assert!(before.due.is_cancelled() && !after.due.is_cancelled());
        leaving.cancel();
        assert!(after.due.is_cancelled());
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
                let gone = schedule.batches.iter().filter(|batch| batch.lock().is_cancelled());
                let gone = gone.count();
                // 11.2 s for 256 batches.
                let due = begun.elapsed().as_millis() as usize * BATCHES / 11_200;
                assert!(gone.abs_diff(due.min(BATCHES)) <= 1, "{gone} at {:?}", begun.elapsed());
                most = most.max(gone);
            }
        };
        tokio::select! {
            () = schedule.run(RATE, DrainTargets::Unknown, || 28_000) => {}
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
        schedule.run(RATE, DrainTargets::Unknown, count).await;
        assert!(begun.elapsed() < 6 * SECOND, "{:?}", begun.elapsed());
        assert!(schedule.batches.iter().all(|batch| batch.lock().is_cancelled()));
    }

    #[tokio::test]
    async fn shutdown_ends_every_batch_at_once() {
        let leaving = CancellationToken::new();
        let schedule = DrainSchedule::new(&leaving);
        leaving.cancel();
        let notice = schedule.notice(ConnectionId::random());
        notice.due().await;
        let advice = notice.advice();
        assert!(advice.after_ms < 1000 && advice.node.is_none());
    }
}
