//! Decides what to do with each entry that arrives: pass it on, drop it, or fetch what is missing.
//!
//! A link delivers a room's entries in order while it stands. A reconnect may repeat the last few
//! or skip some, and another server may come back with another log. This module turns that into
//! the promise made to clients: each number once, in order.
//!
//! Invariant: within an epoch the top never goes down.

use shared::position::Position;

/// What to do with an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one.
    Deliver,
    /// It was there before.
    Duplicate,
    /// Others come before it that have not arrived.
    Gap,
    /// The log has another epoch than the one followed.
    Restarted,
}

/// How far a room's log has been followed.
#[derive(Clone, Debug)]
pub struct Order {
    top: Position,
}

impl Order {
    /// Follows a log from behind `top`.
    pub fn from(top: Position) -> Self {
        Self { top }
    }

    /// The last entry that was passed on.
    pub fn top(&self) -> &Position {
        &self.top
    }

    /// Judges an arrival. Only [`Order::advance`] moves.
    pub fn judge(&self, arrived: &Position) -> Verdict {
        if arrived.epoch != self.top.epoch {
            Verdict::Restarted
        } else if arrived.seq <= self.top.seq {
            Verdict::Duplicate
        } else if arrived.seq == self.top.seq + 1 {
            Verdict::Deliver
        } else {
            Verdict::Gap
        }
    }

    /// Moves past an entry that was judged [`Verdict::Deliver`].
    pub fn advance(&mut self, delivered: &Position) {
        debug_assert_eq!(self.judge(delivered), Verdict::Deliver);
        self.top.seq = delivered.seq;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::samples::position, Verdict::*, *};

    /// Feeds `epoch:seq` pairs to a room followed up to `e:0`; what is delivered moves it.
    #[track_caller]
    fn check(arrivals: &str, expected: &[Verdict]) {
        let mut order = Order::from(position("e", 0));
        let judge = |arrival: &str| {
            let arrived: Position = arrival.parse().unwrap();
            let verdict = order.judge(&arrived);
            if verdict == Deliver {
                order.advance(&arrived);
            }
            verdict
        };
        let verdicts: Vec<_> = arrivals.split_whitespace().map(judge).collect();
        assert_eq!(verdicts, expected, "{arrivals}");
    }

    #[test]
    fn a_repeated_tail_is_dropped() {
        check("e:1 e:2 e:1 e:2 e:3", &[Deliver, Deliver, Duplicate, Duplicate, Deliver]);
    }

    #[test]
    fn a_skipped_number_is_a_gap_until_it_is_filled() {
        check("e:1 e:3 e:4 e:2 e:3", &[Deliver, Gap, Gap, Deliver, Deliver]);
    }

    #[test]
    fn another_epoch_is_neither_new_nor_old() {
        check("e:1 f:1 f:2 e:2", &[Deliver, Restarted, Restarted, Deliver]);
    }
}
