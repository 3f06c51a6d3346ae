//! The counts of a trial, and what they must be.

use std::{collections::BTreeMap, fmt, time::Duration};

/// What the servers did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// An acknowledged message did not come, and nothing was announced.
    Lost,
    /// A position, or an id, came twice.
    Duplicated,
    /// A lower number came behind a higher one.
    OutOfOrder,
    /// A number was skipped.
    Hole,
    /// Another epoch, or no recovery, without a word.
    UnannouncedBreak,
    /// Two ids at one position, or two numbers for one id.
    Disagreement,
    /// Anything else that the protocol does not allow.
    Protocol,
}

/// The counts of a trial.
#[derive(Debug)]
pub struct Report {
    pub clients: usize,
    pub acknowledged: usize,
    pub delivered: usize,
    pub wrong: BTreeMap<Wrong, usize>,
    pub examples: Vec<String>,
    /// Acknowledged messages that a break jumped over, once for each client.
    pub skipped: usize,
    /// Entries that came again behind a break, under another number.
    pub again: usize,
    pub resets: usize,
    pub not_recovered: usize,
    /// How often each reason was given for a break.
    pub reasons: BTreeMap<&'static str, usize>,
    /// Sends answered by `unavailable` or the like.
    pub unavailable: usize,
    pub answer_slowest: Duration,
    pub refusal_slowest: Duration,
    /// The longest time without a delivery, for each client.
    pub quiet: Vec<Duration>,
    /// How many connections each client had.
    pub connections: Vec<usize>,
    /// How many epochs each client has been in.
    pub epochs: Vec<usize>,
}

impl Report {
    pub fn count(&self, wrong: Wrong) -> usize {
        self.wrong.get(&wrong).copied().unwrap_or(0)
    }

    pub fn quiet_longest(&self) -> Duration {
        self.quiet.iter().copied().max().unwrap_or_default()
    }

    /// Prints the counts. Panics where anything was wrong.
    #[track_caller]
    pub fn check(&self, fault: &str) {
        println!("{fault}: {self}");
        assert!(self.wrong.is_empty(), "{fault}: {:?}\n{}", self.wrong, self.examples.join("\n"));
        assert!(self.acknowledged > 0, "{fault}: nothing was sent");
    }

    /// The same, and nobody was told of a break.
    #[track_caller]
    pub fn check_seamless(&self, fault: &str) {
        self.check(fault);
        let breaks = self.resets + self.not_recovered;
        assert_eq!(breaks, 0, "{fault}: clients were told of breaks: {:?}", self.reasons);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} clients, {} acknowledged, {} delivered, {} lost, {} duplicated, {} out of order, \
             {} holes, {} unannounced breaks, {} disagreements; announced: {} reset, {} \
             recovered:false ({} skipped, {} again); longest without delivery {:.2?}; slowest ack \
             {:.2?}; {} unavailable (after {:.2?} at most)",
            self.clients,
            self.acknowledged,
            self.delivered,
            self.count(Wrong::Lost),
            self.count(Wrong::Duplicated),
            self.count(Wrong::OutOfOrder),
            self.count(Wrong::Hole),
            self.count(Wrong::UnannouncedBreak),
            self.count(Wrong::Disagreement),
            self.resets,
            self.not_recovered,
            self.skipped,
            self.again,
            self.quiet_longest(),
            self.answer_slowest,
            self.unavailable,
            self.refusal_slowest,
        )
    }
}
