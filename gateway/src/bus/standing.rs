//! What bus and hub know of this node's own state, one telling the other: whether it may pass
//! entries on, and which of its own publishes it has seen come back.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::delivery::Entry;

/// The state of one node. The bus writes it, the hub asks; a bus without others to agree with
/// leaves it as it is.
#[derive(Debug, Default)]
pub struct Standing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Until when this node may pass entries on. `None`: for ever.
    until: Option<Instant>,
}

impl Standing {
    /// Whether entries may be passed on, joins answered and messages published now. A node that
    /// was frozen finds here that the others may have gone on without it.
    pub fn holds(&self, now: Instant) -> bool {
        self.state.lock().until.is_none_or(|until| now < until)
    }

    /// Lets this node stand until `until`.
    pub fn extend(&self, until: Instant) {
        self.state.lock().until = Some(until);
    }

    /// Takes this node's standing away, until it is extended.
    pub fn suspend(&self, now: Instant) {
        self.state.lock().until = Some(now.checked_sub(Duration::from_nanos(1)).unwrap_or(now));
    }

    /// An entry was passed on here.
    pub fn seen(&self, _entry: &Entry) {}
}
