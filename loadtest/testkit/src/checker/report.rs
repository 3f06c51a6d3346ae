//! Counts of a run, and assertions on them.

use std::{collections::BTreeMap, fmt, time::Duration};

/// Kinds of violations by the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Violation {
    /// An acknowledged message was not delivered, without a signalled discontinuity.
    Lost,
    /// A position or an id was delivered twice.
    Duplicated,
    /// A lower number was delivered after a higher one.
    OutOfOrder,
    /// A number is missing.
    Gap,
    /// A change of epoch, or a failed recovery, without a signal.
    UnsignalledDiscontinuity,
    /// Two ids at one position, or two numbers for one id.
    Disagreement,
    /// Any other violation of the protocol.
    Protocol,
}

/// Counts of a run.
#[derive(Debug, Default)]
pub struct DeliveryReport {
    /// Number of clients.
    pub clients: usize,
    /// Acknowledged messages.
    pub acknowledged: usize,
    /// Delivered entries of all clients.
    pub delivered: usize,
    /// Violations and their counts.
    pub violations: BTreeMap<Violation, usize>,
    /// The first violations, in words.
    pub examples: Vec<String>,
    /// Acknowledged messages that a discontinuity skipped, once for each client.
    pub skipped: usize,
    /// Entries that were repeated after a discontinuity, under another number.
    pub redelivered: usize,
    /// Number of `reset` frames.
    pub resets: usize,
    /// Number of `recovered:false`.
    pub not_recovered: usize,
    /// Reasons of discontinuities and their counts.
    pub reasons: BTreeMap<&'static str, usize>,
    /// Sends rejected with `unavailable` or `overloaded`.
    pub rejected_sends: usize,
    /// Longest time until an ack.
    pub slowest_ack: Duration,
    /// Longest time until a rejection.
    pub slowest_rejection: Duration,
    /// Longest time without a delivery, for each client.
    pub silences: Vec<Duration>,
    /// Number of connections of each client.
    pub connections: Vec<usize>,
    /// Number of epochs that each client has been in.
    pub epochs: Vec<usize>,
}

impl DeliveryReport {
    /// Adds the counts of another room.
    pub fn add(&mut self, other: Self) {
        self.clients += other.clients;
        self.acknowledged += other.acknowledged;
        self.delivered += other.delivered;
        for (wrong, count) in other.violations {
            *self.violations.entry(wrong).or_default() += count;
        }
        self.examples.extend(other.examples);
        self.skipped += other.skipped;
        self.redelivered += other.redelivered;
        self.resets += other.resets;
        self.not_recovered += other.not_recovered;
        for (reason, count) in other.reasons {
            *self.reasons.entry(reason).or_default() += count;
        }
        self.rejected_sends += other.rejected_sends;
        self.slowest_ack = self.slowest_ack.max(other.slowest_ack);
        self.slowest_rejection = self.slowest_rejection.max(other.slowest_rejection);
        self.silences.extend(other.silences);
        self.connections.extend(other.connections);
        self.epochs.extend(other.epochs);
    }

    /// Count of one kind of violation.
    pub fn count(&self, wrong: Violation) -> usize {
        self.violations.get(&wrong).copied().unwrap_or(0)
    }

    /// Longest time that any client was without a delivery.
    pub fn longest_silence(&self) -> Duration {
        self.silences.iter().copied().max().unwrap_or_default()
    }

    /// Prints the counts and asserts that there are no violations, for tests.
    ///
    /// # Panics
    ///
    /// If there was a violation, or no message was acknowledged.
    #[track_caller]
    pub fn check(&self, fault: &str) {
        println!("{fault}: {self}");
        assert!(
            self.violations.is_empty(),
            "{fault}: {:?}\n{}",
            self.violations,
            self.examples.join("\n")
        );
        assert!(self.acknowledged > 0, "{fault}: nothing was sent");
    }

    /// As [`DeliveryReport::check`], and asserts that no discontinuity was signalled.
    ///
    /// # Panics
    ///
    /// If `check` does, or a discontinuity was signalled.
    #[track_caller]
    pub fn check_seamless(&self, fault: &str) {
        self.check(fault);
        let signalled = self.resets + self.not_recovered;
        assert_eq!(signalled, 0, "{fault}: discontinuities were signalled: {:?}", self.reasons);
    }
}

impl fmt::Display for DeliveryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} clients, {} acknowledged, {} delivered, {} lost, {} duplicated, {} out of order, \
             {} gaps, {} unsignalled discontinuities, {} disagreements; signalled: {} reset, {} \
             recovered:false ({} skipped, {} again); longest without delivery {:.2?}; slowest ack \
             {:.2?}; {} unavailable (after {:.2?} at most)",
            self.clients,
            self.acknowledged,
            self.delivered,
            self.count(Violation::Lost),
            self.count(Violation::Duplicated),
            self.count(Violation::OutOfOrder),
            self.count(Violation::Gap),
            self.count(Violation::UnsignalledDiscontinuity),
            self.count(Violation::Disagreement),
            self.resets,
            self.not_recovered,
            self.skipped,
            self.redelivered,
            self.longest_silence(),
            self.slowest_ack,
            self.rejected_sends,
            self.slowest_rejection,
        )
    }
}
