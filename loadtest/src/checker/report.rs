//! The counts of a run, and what they must be.

use std::{collections::BTreeMap, fmt, time::Duration};

/// What the servers did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Violation {
    /// An acknowledged message did not come, and nothing was announced.
    Lost,
    /// A position, or an id, came twice.
    Duplicated,
    /// A lower number came behind a higher one.
    OutOfOrder,
    /// A number was skipped.
    Gap,
    /// Another epoch, or no recovery, without a word.
    UnsignalledDiscontinuity,
    /// Two ids at one position, or two numbers for one id.
    Disagreement,
    /// Anything else that the protocol does not allow.
    Protocol,
}

/// The counts of a run.
#[derive(Debug, Default)]
pub struct DeliveryReport {
    /// Clients.
    pub clients: usize,
    /// Messages that were acknowledged.
    pub acknowledged: usize,
    /// Entries that arrived, all clients together.
    pub delivered: usize,
    /// What was wrong, and how often.
    pub violations: BTreeMap<Violation, usize>,
    /// The first of it, in words.
    pub examples: Vec<String>,
    /// Acknowledged messages that a break jumped over, once for each client.
    pub skipped: usize,
    /// Entries that came again behind a break, under another number.
    pub redelivered: usize,
    /// How often `reset` was told.
    pub resets: usize,
    /// How often `recovered:false` was told.
    pub not_recovered: usize,
    /// How often each reason was given for a break.
    pub reasons: BTreeMap<&'static str, usize>,
    /// Sends answered by `unavailable` or the like.
    pub refused_sends: usize,
    /// The longest time until an `ack`.
    pub slowest_ack: Duration,
    /// The longest time until a refusal.
    pub slowest_refusal: Duration,
    /// The longest time without a delivery, for each client.
    pub silences: Vec<Duration>,
    /// How many connections each client had.
    pub connections: Vec<usize>,
    /// How many epochs each client has been in.
    pub epochs: Vec<usize>,
}

impl DeliveryReport {
    /// Adds what was seen in another room.
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
        self.refused_sends += other.refused_sends;
        self.slowest_ack = self.slowest_ack.max(other.slowest_ack);
        self.slowest_refusal = self.slowest_refusal.max(other.slowest_refusal);
        self.silences.extend(other.silences);
        self.connections.extend(other.connections);
        self.epochs.extend(other.epochs);
    }

    /// How often this was wrong.
    pub fn count(&self, wrong: Violation) -> usize {
        self.violations.get(&wrong).copied().unwrap_or(0)
    }

    /// The longest time that any client was without a delivery.
    pub fn longest_silence(&self) -> Duration {
        self.silences.iter().copied().max().unwrap_or_default()
    }

    /// Prints the counts of a run, for tests.
    ///
    /// # Panics
    ///
    /// Where anything was wrong, or nothing was sent.
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

    /// The same, and nobody was told of a break.
    ///
    /// # Panics
    ///
    /// Where [`Verdict::check`] does, and where somebody was told.
    #[track_caller]
    pub fn check_seamless(&self, fault: &str) {
        self.check(fault);
        let signalled = self.resets + self.not_recovered;
        assert_eq!(signalled, 0, "{fault}: clients were told of breaks: {:?}", self.reasons);
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
            self.refused_sends,
            self.slowest_refusal,
        )
    }
}
