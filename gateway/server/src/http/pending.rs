//! The connections that are no WebSockets yet, in the order they came. Where there is no place for
//! another one, the oldest of them has to go: a client sends its handshake at once, and who holds a
//! place without one holds it from somebody who would.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// All of a listener's.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingConnections(Arc<Mutex<PendingState>>);

#[derive(Debug, Default)]
struct PendingState {
    next: u64,
    /// By number, so in order. A guest is told to go by dropping what stands for it here.
    connections: BTreeMap<u64, oneshot::Sender<Infallible>>,
}

/// One of them. It is none any more when this is dropped.
#[derive(Debug)]
pub(super) struct PendingConnection {
    pending: PendingConnections,
    number: u64,
    eviction: oneshot::Receiver<Infallible>,
}

impl PendingConnections {
    pub(super) fn register(&self) -> PendingConnection {
        let (stay, stays) = oneshot::channel();
        let mut present = self.0.lock();
        let number = present.next;
        present.next += 1;
        present.connections.insert(number, stay);
        PendingConnection { pending: self.clone(), number, eviction: stays }
    }

    /// Tells the oldest one to go.
    pub(super) fn evict_oldest(&self) {
        // Who is told so ends in its own time, after the lock.
        let _dismissed = self.0.lock().connections.pop_first();
    }
}

impl PendingConnection {
    /// Resolves when it has to go. Cancel-safe.
    pub(super) async fn evicted(&mut self) {
        let Err(_) = (&mut self.eviction).await;
    }
}

impl Drop for PendingConnection {
    fn drop(&mut self) {
        self.pending.0.lock().connections.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_that_is_still_there_goes_first() {
        let pending = PendingConnections::default();
        let (first, mut second, mut third) =
            (pending.register(), pending.register(), pending.register());
        drop(first);
        pending.evict_oldest();
        second.evicted().await;
        drop(second);
        pending.evict_oldest();
        third.evicted().await;
        drop(third);
        pending.evict_oldest();
        assert!(pending.0.lock().connections.is_empty());
    }
}
