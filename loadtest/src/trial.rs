//! Members of rooms who talk at a rate, each watched by the ledger of its room; and what came of it.

use std::{fmt, sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use loadtest::ledger::{
    member::{Manner, Pace},
    party::Party,
    timeline::{Second, Timeline},
    verdict::{Verdict, Wrong},
};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    args::{LedgerArgs, LoadArgs},
    process::{CostError, Cpu},
};

/// How long the members may take to be in their rooms.
const JOIN_MAX: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How often it is looked how late this program is.
const LAG_EVERY: Duration = Duration::from_millis(1);
/// Above this share of a core the program is what is measured.
const CPU_MAX: f64 = 80.0;
/// The same for how late it is, p99.
const LAG_MAX: Duration = Duration::from_millis(1);

/// Why a trial has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrialError {
    /// Not everybody came.
    #[error("{away} of {members} members are not in their rooms after {} s", JOIN_MAX.as_secs())]
    Away {
        /// Who did not.
        away: usize,
        /// Of so many.
        members: usize,
    },
    /// What this program costs cannot be read.
    #[error(transparent)]
    Cost(#[from] CostError),
    /// There is no thread to look how late the program is.
    #[error("no thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Members who talk.
pub(crate) struct Trial {
    parties: Vec<Party>,
    timeline: Arc<Mutex<Timeline>>,
    began: Instant,
    cpu: Cpu,
    lag_us: Arc<Mutex<Histogram<u64>>>,
    _lag: JoinSet<()>,
}

/// Something that was done to the servers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Mark {
    /// What.
    pub(crate) what: String,
    /// When it began, from when members were first allowed to talk.
    #[serde(serialize_with = "millis")]
    pub(crate) from: Duration,
    /// When it was mended.
    #[serde(serialize_with = "millis")]
    pub(crate) until: Duration,
}

/// What came of a trial.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The seed of the plan, where there was one.
    pub(crate) seed: Option<u64>,
    /// What was done to the servers.
    pub(crate) faults: Vec<Mark>,
    pub(crate) members: usize,
    pub(crate) acknowledged: usize,
    pub(crate) delivered: usize,
    pub(crate) lost: usize,
    pub(crate) duplicated: usize,
    pub(crate) out_of_order: usize,
    pub(crate) holes: usize,
    pub(crate) unannounced_breaks: usize,
    pub(crate) disagreements: usize,
    /// Anything else that the protocol does not allow.
    pub(crate) other_violations: usize,
    /// Rooms in which not all had what was sent when the trial was over, and why.
    pub(crate) unfinished: Vec<String>,
    /// The first of what was wrong, in words.
    pub(crate) examples: Vec<String>,
    /// How often continuity was lost and that was told.
    pub(crate) announced_breaks: usize,
    /// Acknowledged messages that such a break jumped over, once for each member.
    pub(crate) skipped: usize,
    /// Sends that were refused for the time being, and sent again.
    pub(crate) refused: usize,
    /// The longest time that a member was without a delivery.
    pub(crate) longest_silence_ms: u64,
    pub(crate) seconds: Vec<Counts>,
    pub(crate) total: Counts,
    /// CPU time of this program in percent of a core, and how late it was, p99.
    pub(crate) generator_cpu_percent: f64,
    pub(crate) generator_lag_p99_us: u64,
}

/// What happened in a time.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Counts {
    pub(crate) deliveries: u64,
    pub(crate) acks: u64,
    pub(crate) refusals: u64,
    pub(crate) connects: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

fn millis<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_millis() as u64)
}

impl From<&Second> for Counts {
    fn from(second: &Second) -> Self {
        Self {
            deliveries: second.deliveries,
            acks: second.acks,
            refusals: second.refusals,
            connects: second.connects,
            p50_us: second.latency_us.value_at_quantile(0.5),
            p99_us: second.latency_us.value_at_quantile(0.99),
            max_us: second.latency_us.max(),
        }
    }
}

/// Has members talk for a while, and tells what they saw.
pub(crate) async fn run(args: LedgerArgs) -> Result<Report, TrialError> {
    let trial = Trial::start(args.url, &args.load).await?;
    sleep_until(trial.began() + args.load.duration).await;
    trial.finish(Vec::new(), None).await
}

impl Trial {
    /// Has members come to their rooms, spread over the URLs, and talk.
    pub(crate) async fn start(urls: Vec<String>, load: &LoadArgs) -> Result<Self, TrialError> {
        let timeline: Arc<Mutex<Timeline>> = Arc::default();
        let members = load.rooms * load.members;
        // Each in its turn, so that together they keep the rate.
        let due = |index: usize| load.rate.due(u32::try_from(index).unwrap_or(u32::MAX));
        let manner = |room: usize, member: usize| {
            let index = member * load.rooms + room;
            Manner {
                urls: (0..urls.len()).map(|j| urls[(index + j) % urls.len()].clone()).collect(),
                user: format!("ledger-{index}"),
                room: format!("ledger-{room}").parse().expect("a name"),
                pace: Pace::Every { first: due(index), interval: due(members) },
                bytes: load.bytes,
                patience: load.patience,
                ping_every: load.patience / 4,
            }
        };
        let party = |room: usize| {
            let manners = (0..load.members).map(|member| manner(room, member)).collect();
            Party::start(manners, timeline.clone())
        };
        let parties: Vec<Party> = (0..load.rooms).map(party).collect();
        let deadline = Instant::now() + JOIN_MAX;
        loop {
            let away = parties.iter().map(Party::away).sum();
            if away == 0 {
                break;
            }
            if deadline < Instant::now() {
                return Err(TrialError::Away { away, members });
            }
            sleep(LOOK_AGAIN).await;
        }
        *timeline.lock() = Timeline::new();
        let lag_us = Histogram::new(3).expect("3 digits are possible");
        let lag_us = Arc::new(Mutex::new(lag_us));
        let lag = watch_lag(lag_us.clone())?;
        let cpu = Cpu::of(None)?;
        parties.iter().for_each(Party::speak);
        Ok(Self { parties, timeline, began: Instant::now(), cpu, lag_us, _lag: lag })
    }

    /// When the members were first allowed to talk.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    /// Tells whoever looks how far it is.
    pub(crate) fn say(&self, what: &str) {
        let total = Counts::from(&self.timeline.lock().total());
        eprintln!(
            "{:6.1} s  {} acknowledged, {} delivered  {what}",
            self.began.elapsed().as_secs_f64(),
            total.acks,
            total.deliveries
        );
    }

    /// Has everybody end what was begun, and counts.
    pub(crate) async fn finish(
        self,
        faults: Vec<Mark>,
        seed: Option<u64>,
    ) -> Result<Report, TrialError> {
        let spent_ms = Cpu::of(None)?.total_ms() - self.cpu.total_ms();
        let generator_cpu_percent =
            spent_ms as f64 / self.began.elapsed().as_millis() as f64 * 100.0;
        let generator_lag_p99_us = self.lag_us.lock().value_at_quantile(0.99);
        self.parties.iter().for_each(Party::hush);
        let (mut sum, mut unfinished) = (Verdict::default(), Vec::new());
        for party in self.parties {
            match party.finish().await {
                Ok(verdict) => sum.add(verdict),
                Err(stuck) => {
                    unfinished.push(stuck.to_string());
                    sum.add(*stuck.verdict);
                }
            }
        }
        let timeline = self.timeline.lock();
        Ok(Report {
            seed,
            faults,
            members: sum.clients,
            acknowledged: sum.acknowledged,
            delivered: sum.delivered,
            lost: sum.count(Wrong::Lost),
            duplicated: sum.count(Wrong::Duplicated),
            out_of_order: sum.count(Wrong::OutOfOrder),
            holes: sum.count(Wrong::Hole),
            unannounced_breaks: sum.count(Wrong::UnannouncedBreak),
            disagreements: sum.count(Wrong::Disagreement),
            other_violations: sum.count(Wrong::Protocol),
            unfinished,
            announced_breaks: sum.resets + sum.not_recovered,
            skipped: sum.skipped,
            refused: sum.unavailable,
            longest_silence_ms: sum.quiet_longest().as_millis() as u64,
            examples: sum.examples,
            seconds: timeline.seconds().iter().map(Counts::from).collect(),
            total: Counts::from(&timeline.total()),
            generator_cpu_percent,
            generator_lag_p99_us,
        })
    }
}

/// Looks how late this program's only thread does what is due: another thread asks every
/// millisecond.
fn watch_lag(lag_us: Arc<Mutex<Histogram<u64>>>) -> Result<JoinSet<()>, std::io::Error> {
    let (asks, mut asked) = mpsc::channel::<Instant>(1024);
    #[expect(clippy::disallowed_methods, reason = "a thread of its own")]
    let ask = move || {
        loop {
            std::thread::sleep(LAG_EVERY);
            if let Err(mpsc::error::TrySendError::Closed(_)) = asks.try_send(Instant::now()) {
                return;
            }
        }
    };
    std::thread::Builder::new().name("lag".to_owned()).spawn(ask)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(at) = asked.recv().await {
            lag_us.lock().saturating_record(at.elapsed().as_micros() as u64);
        }
    });
    Ok(tasks)
}

impl Report {
    /// Whether what this program cost leaves the result one of the servers.
    pub(crate) fn is_valid(&self) -> bool {
        self.generator_cpu_percent <= CPU_MAX
            && u128::from(self.generator_lag_p99_us) <= LAG_MAX.as_micros()
    }

    /// Whether nothing was wrong, and the result counts.
    pub(crate) fn is_good(&self) -> bool {
        let wrong = self.lost
            + self.duplicated
            + self.out_of_order
            + self.holes
            + self.unannounced_breaks
            + self.disagreements
            + self.other_violations
            + self.unfinished.len();
        wrong == 0 && self.acknowledged > 0 && self.is_valid()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, value: String| writeln!(f, "{name:<22} {value}");
        if let Some(seed) = self.seed {
            line("seed", seed.to_string())?;
        }
        line("members", self.members.to_string())?;
        let rate = self.seconds.len().max(1) as f64;
        line(
            "acknowledged",
            format!("{} ({:.0}/s)", self.acknowledged, self.acknowledged as f64 / rate),
        )?;
        line("delivered", format!("{} ({:.0}/s)", self.delivered, self.delivered as f64 / rate))?;
        line("lost", self.lost.to_string())?;
        line("duplicated", self.duplicated.to_string())?;
        line("out of order", self.out_of_order.to_string())?;
        line("holes", self.holes.to_string())?;
        line("unannounced breaks", self.unannounced_breaks.to_string())?;
        line("disagreements", self.disagreements.to_string())?;
        line("other violations", self.other_violations.to_string())?;
        line("unfinished rooms", self.unfinished.len().to_string())?;
        let breaks = format!("{} (jumped over {} deliveries)", self.announced_breaks, self.skipped);
        line("announced breaks", breaks)?;
        line("refused, sent again", self.refused.to_string())?;
        let (p50, p99) = (self.total.p50_us as f64 / 1e3, self.total.p99_us as f64 / 1e3);
        let max = self.total.max_us as f64 / 1e3;
        line("latency", format!("p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms"))?;
        line("longest silence", format!("{:.1} s", self.longest_silence_ms as f64 / 1e3))?;
        let kinds: std::collections::BTreeSet<&str> =
            self.faults.iter().filter_map(|fault| fault.what.split(' ').next()).collect();
        if !kinds.is_empty() {
            line("faults", format!("{} of {} kinds", self.faults.len(), kinds.len()))?;
        }
        let lag = self.generator_lag_p99_us;
        let own = format!("{:.0} % of a core, p99 {lag} µs late", self.generator_cpu_percent);
        line("this tool", own)?;
        if !self.is_valid() {
            writeln!(f, "INVALID: this tool was the bottleneck")?;
        }
        for example in self.examples.iter().chain(&self.unfinished) {
            writeln!(f, "  {example}")?;
        }
        Ok(())
    }
}
