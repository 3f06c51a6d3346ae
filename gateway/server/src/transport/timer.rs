//! One clock for all connections: a timer wheel (Varghese and Lauck, 1987) that wakes a connection
//! at its next deadline, in place of a timer in each connection.
//!
//! The wheel is coarse on purpose: heartbeats take seconds, and an entry takes two words.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use slab::Slab;
use tokio::time::{Instant, MissedTickBehavior};

use skein_core::connection::handle::ConnectionHandle;

/// Resolution: the longest delay of a wake-up after its deadline.
const TICK: Duration = Duration::from_millis(100);
/// Number of ticks in the wheel.
const SLOTS: usize = 1024;
/// Range of the wheel, about 100 s. A connection with a later deadline wakes at its end and sets
/// the timer again.
const REACH: Duration = TICK.saturating_mul(SLOTS as u32 - 2);

/// Timers of all connections of a node.
#[derive(Debug)]
pub struct TimerWheel {
    start: Instant,
    /// Tick of the slot that is being emptied, or was emptied last.
    done: AtomicU64,
    slots: Box<[Mutex<Slab<Arc<ConnectionHandle>>>]>,
}

/// Timer of one connection; leaves the wheel on drop.
#[derive(Debug)]
pub(super) struct TimerEntry {
    wheel: Arc<TimerWheel>,
    handle: Arc<ConnectionHandle>,
    set: Option<TimerSlot>,
}

#[derive(Clone, Copy, Debug)]
struct TimerSlot {
    at: Instant,
    slot: usize,
    key: usize,
}

impl Default for TimerWheel {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| Mutex::default()).collect();
        Self { start: Instant::now(), done: AtomicU64::new(0), slots }
    }
}

impl TimerWheel {
    /// Runs the wheel for ever.
    pub async fn run(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let (done, now) = (self.done.load(Ordering::Acquire), self.ticks_until(Instant::now()));
            // After a suspend of the machine one revolution is enough.
            for tick in done.max(now.saturating_sub(SLOTS as u64)) + 1..=now {
                // Before the slot is emptied, so that no entry is added to it afterwards.
                self.done.store(tick, Ordering::Release);
                let due = std::mem::take(&mut *self.slots[slot_of(tick)].lock());
                for (_, handle) in due {
                    handle.outbox.wake();
                }
            }
        }
    }

    /// Returns the whole ticks from the start of the wheel to `at`.
    fn ticks_until(&self, at: Instant) -> u64 {
        (at.saturating_duration_since(self.start).as_millis() / TICK.as_millis()) as u64
    }

    /// Adds a connection to the slot of the first tick at or after `at`, within the range of the
    /// wheel. Returns slot and key.
    fn insert(&self, at: Instant, handle: &Arc<ConnectionHandle>) -> (usize, usize) {
        let wanted = self.ticks_until(at) + 1;
        loop {
            let done = self.done.load(Ordering::Acquire);
            let tick = wanted.clamp(done + 1, done + SLOTS as u64 - 1);
            let mut entries = self.slots[slot_of(tick)].lock();
            if self.done.load(Ordering::Acquire) < tick {
                return (slot_of(tick), entries.insert(handle.clone()));
            }
        }
    }
}

fn slot_of(tick: u64) -> usize {
    (tick % SLOTS as u64) as usize
}

impl TimerEntry {
    pub(super) fn new(wheel: Arc<TimerWheel>, handle: Arc<ConnectionHandle>) -> Self {
        Self { wheel, handle, set: None }
    }

    /// Wakes the connection at `at` or earlier.
    pub(super) fn set(&mut self, at: Instant, now: Instant) {
        let at = at.min(now + REACH);
        if self.set.is_some_and(|set| set.at > now && set.at <= at) {
            return;
        }
        self.clear();
        let (slot, key) = self.wheel.insert(at, &self.handle);
        self.set = Some(TimerSlot { at, slot, key });
    }

    fn clear(&mut self) {
        let Some(TimerSlot { slot, key, .. }) = self.set.take() else { return };
        let mut slot = self.wheel.slots[slot].lock();
        // The slot may have been emptied, and the key reused.
        if slot.get(key).is_some_and(|there| Arc::ptr_eq(there, &self.handle)) {
            slot.remove(key);
        }
    }
}

impl Drop for TimerEntry {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use skein_protocol::ids::ConnectionId;
    use tokio::time::{advance, timeout};

    use super::*;
    use skein_core::{connection::outbox::Outbox, drain::Tasks, telemetry::metrics::Metrics};

    fn timer(wheel: &Arc<TimerWheel>) -> TimerEntry {
        let outbox = Outbox::to_owner(1000, Arc::new(Metrics::default()));
        TimerEntry::new(
            wheel.clone(),
            Arc::new(ConnectionHandle::new(ConnectionId::random(), outbox)),
        )
    }

    fn len(wheel: &TimerWheel) -> usize {
        wheel.slots.iter().map(|slot| slot.lock().len()).sum()
    }

    /// Returns the time until the timer wakes its connection.
    async fn woken(timer: &TimerEntry) -> Duration {
        let start = Instant::now();
        let woken = timer.handle.outbox.woken();
        timeout(Duration::from_secs(1000), woken).await.expect("the timer fires");
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_wakes_at_its_deadline_or_little_later() {
        let wheel = Arc::new(TimerWheel::default());
        let turning = wheel.clone();
        let tasks = Tasks::default();
        tasks.spawn_service("wheel", async move { turning.run().await });
        let mut timer = timer(&wheel);
        for millis in [0, 1, 99, 100, 101, 12_345, 25_000, 60_000, 102_000] {
            advance(Duration::from_millis(37)).await;
            let (now, wait) = (Instant::now(), Duration::from_millis(millis));
            timer.set(now + wait, now);
            let took = woken(&timer).await;
            assert!(took >= wait && took <= wait + 2 * TICK, "{took:?} for {wait:?}");
        }
        // A deadline in the past, whose slot has been emptied.
        let now = Instant::now();
        advance(3 * TICK).await;
        tokio::task::yield_now().await;
        timer.set(now, now);
        assert!(woken(&timer).await <= TICK);
        // A deadline beyond the range wakes the connection once per revolution.
        let hour = Instant::now() + Duration::from_secs(3600);
        for _ in 0..3 {
            timer.set(hour, Instant::now());
            assert!(woken(&timer).await <= TICK * SLOTS as u32);
        }
        assert_eq!(len(&wheel), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_has_one_entry_and_leaves_none() {
        let wheel = Arc::new(TimerWheel::default());
        let (mut one, mut other) = (timer(&wheel), timer(&wheel));
        let now = Instant::now();
        let at = |secs| now + Duration::from_secs(secs);
        for secs in [25, 60, 30, 25] {
            one.set(at(secs), now);
        }
        assert_eq!(one.set.unwrap().at, at(25), "the earliest deadline counts");
        one.set(at(5), now);
        other.set(at(5), now);
        assert_eq!(len(&wheel), 2);
        // The slot has been emptied, and the key of the first entry is reused.
        let slot = one.set.unwrap().slot;
        *wheel.slots[slot].lock() = Slab::new();
        let mut third = timer(&wheel);
        third.set(at(5), now);
        drop((one, other));
        assert_eq!(len(&wheel), 1);
        drop(third);
        assert_eq!(len(&wheel), 0);
    }
}
