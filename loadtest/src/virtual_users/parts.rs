//! One scenario in several processes, since each may hold only so many descriptors, and has one
//! thread.
//!
//! The first process starts the others with the same command line and `--part I/N`, and opens no
//! connection itself. They meet at the end of each phase: each writes a line of numbers, and reads
//! the sum of all. At the end each writes what it saw.

use std::{
    fmt,
    io::{self, BufRead as _, Write as _},
    process::Stdio,
    str::FromStr,
    sync::mpsc,
};

use loadtest::ledger::timeline::{self, Second};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Duration, Instant},
};

use super::{
    VirtualUsers,
    seen::{self, Counts, Seen},
};
use crate::{
    process::{Cost, Cpu},
    report::connections::Tally,
    watch::Watch,
};

/// Which part of all this process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    index: u32,
    count: u32,
}

impl Share {
    /// All of it.
    pub(crate) const ALL: Self = Self { index: 0, count: 1 };

    /// How many of so many are this process'.
    pub(crate) fn of(self, all: u32) -> u32 {
        all / self.count + u32::from(self.index < all % self.count)
    }

    /// The own number of one, where it is this process'.
    pub(crate) fn own(self, number: u32) -> Option<usize> {
        (number % self.count == self.index).then(|| (number / self.count) as usize)
    }

    /// The number that an own one has among all.
    pub(crate) fn number(self, own: usize) -> u32 {
        own as u32 * self.count + self.index
    }
}

impl FromStr for Share {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('/').and_then(|(index, count)| {
            Some(Self { index: index.parse().ok()?, count: count.parse().ok()? })
        });
        parts.filter(|share| share.index < share.count).ok_or("a part has the form 0/2")
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// The end of a phase, where all processes meet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// All connections are open or have failed.
    Opening,
    /// They were held.
    Held,
    /// They were cut, and all are back.
    Back,
    /// What was sent is answered.
    Talking,
}

/// What one process has to say at the end of a phase.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct Sum {
    /// How many connections are open.
    pub(crate) open: u64,
    /// How many were opened, or deliveries made, in the phase.
    pub(crate) done: u64,
    /// Messages that were acknowledged, of each room.
    pub(crate) acknowledged: Vec<u64>,
}

impl Sum {
    fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.done += other.done;
        self.acknowledged.resize(self.acknowledged.len().max(other.acknowledged.len()), 0);
        let rooms = self.acknowledged.iter_mut().zip(&other.acknowledged);
        rooms.for_each(|(sum, more)| *sum += more);
    }
}

/// What one process saw of all, and what it cost.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Part {
    pub(crate) tally: Tally,
    pub(crate) counts: Counts,
    pub(crate) seconds: Vec<Second>,
    /// How late what was due was done: values in µs and how often.
    pub(crate) lag_us: Vec<(u64, u64)>,
    pub(crate) cpu_percent: f64,
    pub(crate) grown_bytes: i64,
    pub(crate) opening_s: f64,
    pub(crate) talked_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) processes: u32,
}

impl Part {
    /// What a users saw.
    pub(crate) fn of(users: &mut VirtualUsers, own: &Own) -> Self {
        let Seen { counts, lag_us, .. } = &users.seen;
        Self {
            tally: users.tally.clone(),
            counts: counts.clone(),
            lag_us: timeline::pairs(lag_us),
            seconds: users.seen.seconds(),
            cpu_percent: own.cpu_percent(),
            grown_bytes: own.grown_bytes,
            interrupted: users.is_stopped(),
            processes: 1,
            ..Self::default()
        }
    }

    /// Adds another.
    pub(crate) fn add(&mut self, other: Self) {
        self.tally.merge(other.tally);
        self.counts.add(other.counts);
        self.lag_us.extend(other.lag_us);
        self.seconds.resize_with(self.seconds.len().max(other.seconds.len()), Second::default);
        let seconds = self.seconds.iter_mut().zip(&other.seconds);
        seconds.for_each(|(sum, more)| sum.add(more));
        // The busiest of them is the one that may have been too slow.
        self.cpu_percent = self.cpu_percent.max(other.cpu_percent);
        self.grown_bytes += other.grown_bytes;
        self.opening_s = self.opening_s.max(other.opening_s);
        self.talked_s = self.talked_s.max(other.talked_s);
        self.interrupted |= other.interrupted;
        self.processes += other.processes;
    }

    /// How late what was due was done, p99.
    pub(crate) fn lag_p99_us(&self) -> u64 {
        let mut lags = seen::lags();
        for (value, count) in &self.lag_us {
            lags.saturating_record_n(*value, *count);
        }
        lags.value_at_quantile(0.99)
    }
}

/// What this process costs.
#[derive(Debug, Default)]
pub(crate) struct Own {
    before: Cost,
    since: Option<(Instant, u64)>,
    spent: (Duration, u64),
    grown_bytes: i64,
}

impl Own {
    /// Before anything.
    pub(crate) fn new() -> Self {
        Self { before: Cost::of(None).unwrap_or_default(), ..Self::default() }
    }

    /// All connections are open.
    pub(crate) fn held(&mut self) {
        let now = Cost::of(None).unwrap_or(self.before);
        self.grown_bytes = now.pss_bytes as i64 - self.before.pss_bytes as i64;
    }

    /// What counts begins.
    pub(crate) fn begin(&mut self) {
        let cpu = Cpu::of(None).unwrap_or_default().total_ms();
        self.since = Some((Instant::now(), cpu));
    }

    /// What counts is over.
    pub(crate) fn end(&mut self) {
        if let Some((began, before)) = self.since.take() {
            let cpu = Cpu::of(None).unwrap_or_default().total_ms();
            self.spent = (began.elapsed(), cpu - before);
        }
    }

    /// What was spent of a core while it counted.
    pub(crate) fn cpu_percent(&self) -> f64 {
        let (time, ms) = self.spent;
        if time.is_zero() { 0.0 } else { ms as f64 / 10.0 / time.as_secs_f64() }
    }
}

/// The other processes.
pub(crate) enum Others {
    /// There are none.
    None(Watch),
    /// Some, which are met by way of the first.
    Some {
        /// What the first writes.
        sums: mpsc::Receiver<Sum>,
    },
}

/// What a process writes for the first.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Meet(Phase, Sum),
    Part(Box<Part>),
}

impl Others {
    /// Those with whom this process shares the scenario.
    pub(crate) fn of(share: Option<Share>, watch: Watch) -> Self {
        if share.is_none() {
            return Self::None(watch);
        }
        let (sums_in, sums) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            for line in io::stdin().lock().lines() {
                let Some(sum) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else {
                    return;
                };
                if sums_in.send(sum).is_err() {
                    return;
                }
            }
        });
        Self::Some { sums }
    }

    /// Ends a phase together with the others. Connections live on meanwhile.
    pub(crate) fn meet(
        &mut self,
        users: &mut VirtualUsers,
        phase: Phase,
        mine: Sum,
    ) -> io::Result<Sum> {
        match self {
            Self::None(watch) => {
                watch.mark(phase, &mine);
                Ok(mine)
            }
            Self::Some { sums } => {
                write(&Line::Meet(phase, mine))?;
                loop {
                    match sums.try_recv() {
                        Ok(sum) => return Ok(sum),
                        Err(mpsc::TryRecvError::Empty) => {
                            users.step(Instant::now() + Duration::from_millis(1))?;
                        }
                        Err(mpsc::TryRecvError::Disconnected) => {
                            return Err(io::ErrorKind::BrokenPipe.into());
                        }
                    }
                }
            }
        }
    }

    /// Tells the first process what was seen, where there is one.
    pub(crate) fn tell(self, part: Part) -> io::Result<Option<(Part, Watch)>> {
        match self {
            Self::None(watch) => Ok(Some((part, watch))),
            Self::Some { .. } => write(&Line::Part(Box::new(part))).map(|()| None),
        }
    }
}

fn write(line: &Line) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Another process, as the first sees it.
struct Other {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// Runs the scenario of this command line in so many other processes, and adds up what they saw.
pub(crate) async fn in_others(count: u32, watch: &mut Watch) -> io::Result<Part> {
    let program = std::env::current_exe()?;
    let mut others = Vec::new();
    for index in 0..count {
        let mut child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .args(["--part", &Share { index, count }.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let input = input.ok_or(io::ErrorKind::BrokenPipe)?;
        let output = BufReader::new(output.ok_or(io::ErrorKind::BrokenPipe)?).lines();
        others.push(Other { child, input, output });
    }
    let mut all = Part::default();
    loop {
        let (mut sum, mut met, mut left) = (Sum::default(), None, 0);
        for other in &mut others {
            let line = other.output.next_line().await?.ok_or_else(|| {
                io::Error::other("another process of the load ended early; it says why above")
            })?;
            match serde_json::from_str(&line)? {
                Line::Meet(phase, mine) => {
                    met = Some(phase);
                    sum.add(&mine);
                }
                Line::Part(part) => {
                    left += 1;
                    all.add(*part);
                }
            }
        }
        if left == others.len() {
            for other in &mut others {
                other.child.wait().await?;
            }
            return Ok(all);
        }
        let Some(phase) = met.filter(|_| left == 0) else {
            return Err(io::Error::other("the processes of the load are not at the same phase"));
        };
        watch.mark(phase, &sum);
        let mut line = serde_json::to_vec(&sum)?;
        line.push(b'\n');
        for other in &mut others {
            other.input.write_all(&line).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_belongs_to_one_process() {
        for (all, count) in [(10, 3), (2, 3), (7, 1), (0, 2)] {
            let mut numbers = Vec::new();
            for index in 0..count {
                let share = Share { index, count };
                let own = (0..share.of(all)).map(|own| share.number(own as usize));
                assert!(own.clone().enumerate().all(|(own, nr)| share.own(nr) == Some(own)));
                numbers.extend(own);
            }
            numbers.sort_unstable();
            assert_eq!(numbers, (0..all).collect::<Vec<_>>(), "{all} over {count}");
        }
        assert_eq!("1/3".parse::<Share>().unwrap().to_string(), "1/3");
        for bad in ["", "3/3", "a/b", "1"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }

    #[test]
    fn parts_add_up_and_survive_the_way() {
        let part = |open| {
            let second = Second { open, latency_us: vec![(5, 2)], ..Second::default() };
            let counts = Counts { acknowledged: vec![1, 2], ..Counts::default() };
            Part { seconds: vec![second], counts, processes: 1, ..Part::default() }
        };
        let line = serde_json::to_string(&Line::Part(Box::new(part(2)))).unwrap();
        let Line::Part(mut sum) = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
        sum.add(part(3));
        assert_eq!((sum.processes, sum.seconds[0].open), (2, 5));
        assert_eq!(sum.seconds[0].latencies().len(), 4);
        assert_eq!(sum.counts.acknowledged, [2, 4]);
    }
}
