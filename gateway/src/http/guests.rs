//! The connections that are no WebSockets yet, in the order they came. Where there is no place for
//! another one, the oldest of them has to go: a client sends its handshake at once, and who holds a
//! place without one holds it from somebody who would.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// All of a listener's.
#[derive(Clone, Debug, Default)]
pub(super) struct Guests(Arc<Mutex<Present>>);

#[derive(Debug, Default)]
struct Present {
    next: u64,
    /// By number, so in order. A guest is told to go by dropping what stands for it here.
    guests: BTreeMap<u64, oneshot::Sender<Infallible>>,
}

/// One of them. It is none any more when this is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    guests: Guests,
    number: u64,
    stays: oneshot::Receiver<Infallible>,
}

impl Guests {
    pub(super) fn enter(&self) -> Guest {
        let (stay, stays) = oneshot::channel();
        let mut present = self.0.lock();
        let number = present.next;
        present.next += 1;
        present.guests.insert(number, stay);
        Guest { guests: self.clone(), number, stays }
    }

    /// Tells the oldest one to go.
    pub(super) fn dismiss_oldest(&self) {
        // Who is told so ends in its own time, after the lock.
        let _dismissed = self.0.lock().guests.pop_first();
    }
}

impl Guest {
    /// Resolves when it has to go. Cancel-safe.
    pub(super) async fn dismissed(&mut self) {
        let Err(_) = (&mut self.stays).await;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.guests.0.lock().guests.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_oldest_that_is_still_there_goes_first() {
        let guests = Guests::default();
        let (first, mut second, mut third) = (guests.enter(), guests.enter(), guests.enter());
        drop(first);
        guests.dismiss_oldest();
        second.dismissed().await;
        drop(second);
        guests.dismiss_oldest();
        third.dismissed().await;
        drop(third);
        guests.dismiss_oldest();
        assert!(guests.0.lock().guests.is_empty());
    }
}
