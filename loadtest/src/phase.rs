//! Phases of a scenario, and the totals of a worker at the end of each.
//!
//! Pure.

use serde::{Deserialize, Serialize};

/// The end of a phase, at which all workers exchange totals.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ScenarioPhase {
    /// All connections are open or have failed.
    Opening,
    /// The connections were held.
    Held,
    /// The connections were dropped, and all have reconnected.
    Reconnected,
    /// Messages were sent and answered.
    Traffic,
}

/// Totals of one worker at the end of a phase.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct PhaseTotals {
    /// Open connections.
    pub(crate) open: u64,
    /// Connections opened, or deliveries made, in the phase.
    pub(crate) done: u64,
    /// Acknowledged messages of each room.
    pub(crate) acknowledged: Vec<u64>,
}

impl PhaseTotals {
    /// Adds the totals of another worker.
    pub(crate) fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.done += other.done;
        self.acknowledged.resize(self.acknowledged.len().max(other.acknowledged.len()), 0);
        let rooms = self.acknowledged.iter_mut().zip(&other.acknowledged);
        rooms.for_each(|(sum, more)| *sum += more);
    }
}
