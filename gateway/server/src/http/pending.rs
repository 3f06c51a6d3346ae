//! Connections that are not yet a WebSocket or an event stream, in the order they were accepted.
//!
//! When the listener is full, the oldest pending connection is evicted: a real client sends its
//! handshake at once, so that a connection without one blocks clients that would send theirs.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Pending connections of a listener.
#[derive(Clone, Debug, Default)]
pub(super) struct PendingConnections(Arc<Mutex<PendingState>>);

#[derive(Debug, Default)]
struct PendingState {
    next: u64,
    /// By number, and so by age. Dropping the sender evicts the connection.
    connections: BTreeMap<u64, oneshot::Sender<Infallible>>,
}

/// A pending connection; deregisters on drop.
#[derive(Debug)]
pub(super) struct PendingConnection {
    pending: PendingConnections,
    number: u64,
    eviction: oneshot::Receiver<Infallible>,
}

impl PendingConnections {
    /// Adds a connection.
    pub(super) fn register(&self) -> PendingConnection {
        let (keep, eviction) = oneshot::channel();
        let mut state = self.0.lock();
        let number = state.next;
        state.next += 1;
        state.connections.insert(number, keep);
        PendingConnection { pending: self.clone(), number, eviction }
    }

    /// Evicts the oldest pending connection.
    pub(super) fn evict_oldest(&self) {
        // The receiver wakes after the lock is released.
        let _evicted = self.0.lock().connections.pop_first();
    }
}

impl PendingConnection {
    /// Resolves when this connection is evicted. Cancel-safe.
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
    async fn the_oldest_pending_connection_is_evicted_first() {
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
