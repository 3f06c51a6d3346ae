//! The share of one worker process in the connections of a scenario.
//!
//! Pure.

use std::{fmt, str::FromStr};

/// The share of one worker in the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkerShare {
    pub(super) index: u32,
    pub(super) count: u32,
}

impl WorkerShare {
    /// The whole.
    pub(crate) const ALL: Self = Self { index: 0, count: 1 };

    /// Number of elements out of `all` that belong to this worker.
    pub(crate) fn portion_of(self, all: u32) -> u32 {
        all / self.count + u32::from(self.index < all % self.count)
    }

    /// The index within this worker of element `number`, if it belongs to this worker.
    pub(crate) fn local_index(self, number: u32) -> Option<usize> {
        (number % self.count == self.index).then(|| (number / self.count) as usize)
    }

    /// The index among all elements of this worker's element `own`.
    pub(crate) fn global_index(self, own: usize) -> u32 {
        own as u32 * self.count + self.index
    }
}

impl FromStr for WorkerShare {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('/').and_then(|(index, count)| {
            Some(Self { index: index.parse().ok()?, count: count.parse().ok()? })
        });
        parts
            .filter(|share| share.index < share.count)
            .ok_or("a worker has the form INDEX/COUNT, such as 0/2")
    }
}

impl fmt::Display for WorkerShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_belongs_to_one_worker() {
        for (all, count) in [(10, 3), (2, 3), (7, 1), (0, 2)] {
            let mut numbers = Vec::new();
            for index in 0..count {
                let share = WorkerShare { index, count };
                let own = (0..share.portion_of(all)).map(|own| share.global_index(own as usize));
                assert!(
                    own.clone().enumerate().all(|(own, nr)| share.local_index(nr) == Some(own))
                );
                numbers.extend(own);
            }
            numbers.sort_unstable();
            assert_eq!(numbers, (0..all).collect::<Vec<_>>(), "{all} over {count}");
        }
        assert_eq!("1/3".parse::<WorkerShare>().unwrap().to_string(), "1/3");
        for bad in ["", "3/3", "a/b", "1"] {
            assert!(bad.parse::<WorkerShare>().is_err(), "{bad}");
        }
    }
}
