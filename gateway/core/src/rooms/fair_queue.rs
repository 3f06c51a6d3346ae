//! A fair queue for CPU-bound work: a fixed number run at a time, and each key (an address) is
//! served in rotation, independent of the number of waiters of other keys.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The most waiters per key, and in all. Further ones are rejected.
const WAITING_PER_KEY_MAX: usize = 64;
const WAITING_MAX: usize = 4096;

/// A fair queue. Cheap to clone.
#[derive(Debug)]
pub(super) struct FairQueue<K: Hash + Eq>(Arc<Mutex<QueueState<K>>>);

#[derive(Debug)]
struct QueueState<K: Hash + Eq> {
    free: usize,
    waiting: HashMap<K, KeyWaiters<K>>,
    /// The keys with waiters, in the order of service.
    order: VecDeque<K>,
    count: usize,
}

/// The waiters of a key: those with priority, and the others.
#[derive(Debug)]
struct KeyWaiters<K: Hash + Eq>([VecDeque<oneshot::Sender<QueueSlot<K>>>; 2]);

/// The right to run. It passes to the next waiter on drop.
#[derive(Debug)]
pub(super) struct QueueSlot<K: Hash + Eq>(Option<Arc<Mutex<QueueState<K>>>>);

impl<K: Hash + Eq + Clone> FairQueue<K> {
    /// A queue with `count` slots.
    pub(super) fn new(count: usize) -> Self {
        let (waiting, order) = (HashMap::new(), VecDeque::new());
        Self(Arc::new(Mutex::new(QueueState { free: count, waiting, order, count: 0 })))
    }

    /// Waits for a slot, with priority among the waiters of the same key if `first` is set. `None`:
    /// too many wait. Cancel-safe: the slot of a waiter that has gone passes to the next one.
    pub(super) async fn wait(&self, key: K, first: bool) -> Option<QueueSlot<K>> {
        let (sender, slot) = oneshot::channel();
        {
            let state = &mut *self.0.lock();
            if state.free > 0 {
                state.free -= 1;
                return Some(QueueSlot(Some(self.0.clone())));
            }
            if state.count >= WAITING_MAX {
                state.remove_cancelled();
            }
            let is_full = state.count >= WAITING_MAX;
            let waiting = state.waiting.entry(key.clone()).or_insert_with(|| {
                state.order.push_back(key);
                KeyWaiters(Default::default())
            });
            if is_full || waiting.0.iter().map(VecDeque::len).sum::<usize>() >= WAITING_PER_KEY_MAX
            {
                return None;
            }
            waiting.0[usize::from(!first)].push_back(sender);
            state.count += 1;
        }
        slot.await.ok()
    }
}

impl<K: Hash + Eq> QueueState<K> {
    fn remove_cancelled(&mut self) {
        for waiting in self.waiting.values_mut() {
            for queue in &mut waiting.0 {
                queue.retain(|slot| !slot.is_closed());
            }
        }
        let of = |waiting: &KeyWaiters<K>| waiting.0.iter().map(VecDeque::len).sum::<usize>();
        self.count = self.waiting.values().map(of).sum();
    }

    /// The next waiter that is still there; its key moves to the end of the order.
    fn next(&mut self) -> Option<oneshot::Sender<QueueSlot<K>>> {
        while let Some(key) = self.order.pop_front() {
            let Some(waiting) = self.waiting.get_mut(&key) else { continue };
            let mut found = None;
            for queue in &mut waiting.0 {
                while found.is_none()
                    && let Some(next) = queue.pop_front()
                {
                    self.count -= 1;
                    found = Some(next).filter(|next| !next.is_closed());
                }
            }
            if waiting.0.iter().all(VecDeque::is_empty) {
                self.waiting.remove(&key);
            } else {
                self.order.push_back(key);
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

impl<K: Hash + Eq> Drop for QueueSlot<K> {
    fn drop(&mut self) {
        let Some(state) = self.0.take() else { return };
        loop {
            let next = {
                let mut locked = state.lock();
                let next = locked.next();
                locked.free += usize::from(next.is_none());
                next
            };
            let Some(next) = next else { return };
            // A waiter that leaves at this very moment returns the slot, and the next one is asked.
            match next.send(QueueSlot(Some(state.clone()))) {
                Ok(()) => return,
                Err(mut unwanted) => drop(unwanted.0.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::Pin};

    use futures_util::FutureExt as _;

    use super::*;

    type Waits<'a> = Pin<Box<dyn Future<Output = Option<QueueSlot<&'static str>>> + 'a>>;

    /// Waits, polled once.
    fn begin<'a>(queue: &'a FairQueue<&'static str>, key: &'static str, first: bool) -> Waits<'a> {
        let mut waits: Waits<'a> = Box::pin(queue.wait(key, first));
        assert!(waits.as_mut().now_or_never().is_none());
        waits
    }

    fn has_slot(waits: &mut Waits<'_>) -> Option<QueueSlot<&'static str>> {
        waits.as_mut().now_or_never().flatten()
    }

    #[tokio::test]
    async fn keys_are_served_in_rotation() {
        let queue = FairQueue::new(1);
        let slot = queue.wait("flood", true).await.unwrap();
        let mut flood: Vec<_> = (0..10).map(|_| begin(&queue, "flood", true)).collect();
        let mut honest = begin(&queue, "honest", true);
        drop(slot);
        let slot = has_slot(&mut flood[0]).unwrap();
        assert!(has_slot(&mut honest).is_none());
        drop(slot);
        assert!(has_slot(&mut honest).is_some());
        assert!(has_slot(&mut flood[1]).is_some());
    }

    #[tokio::test]
    async fn waiters_with_priority_go_first_within_a_key() {
        let queue = FairQueue::new(1);
        let slot = queue.wait("a", true).await.unwrap();
        let (mut second, mut first) = (begin(&queue, "a", false), begin(&queue, "a", true));
        drop(slot);
        assert!(has_slot(&mut second).is_none());
        drop(has_slot(&mut first).unwrap());
        assert!(has_slot(&mut second).is_some());
    }

    #[tokio::test]
    async fn slot_of_a_cancelled_waiter_is_not_lost() {
        let queue = FairQueue::new(1);
        let slot = queue.wait("a", true).await.unwrap();
        let (gone, mut stays) = (begin(&queue, "a", true), begin(&queue, "b", true));
        drop(gone);
        drop(slot);
        let slot = has_slot(&mut stays).unwrap();
        let leaves = begin(&queue, "a", true);
        drop(slot);
        drop(leaves);
        assert!(queue.wait("c", true).now_or_never().flatten().is_some());
        let state = queue.0.lock();
        assert!(state.waiting.is_empty() && state.order.is_empty() && state.count == 0);
        assert_eq!(state.free, 1);
    }

    #[tokio::test]
    async fn too_many_waiters_of_a_key_are_rejected() {
        let queue = FairQueue::new(1);
        let _turn = queue.wait("flood", true).await.unwrap();
        let flood: Vec<_> =
            (0..WAITING_PER_KEY_MAX).map(|_| begin(&queue, "flood", true)).collect();
        assert!(queue.wait("flood", true).await.is_none());
        drop(begin(&queue, "honest", true));
        drop(flood);
    }
}
