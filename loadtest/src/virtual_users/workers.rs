//! One scenario in several processes, since each may hold only so many descriptors, and has one
//! thread.
//!
//! The first process starts the workers with the same command line and `--worker I/N`, and opens no
//! connection itself. They meet at the end of each phase: each writes a line of numbers, and reads
//! the sum of all. At the end each writes what it saw.

use std::{
    fmt,
    io::{self, BufRead as _, Write as _},
    process::Stdio,
    str::FromStr,
    sync::mpsc,
};

use loadtest::checker::timeline::{self, Second};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Duration, Instant},
};

use super::{
    VirtualUsers,
    metrics::{self, MessageCounters, TrafficMetrics},
};
use crate::{
    monitor::ServerMonitor,
    procfs::{CpuTime, ProcessUsage},
    report::connections::ConnectionCounters,
};

/// Which part of all this process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WorkerShare {
    index: u32,
    count: u32,
}

impl WorkerShare {
    /// All of it.
    pub(crate) const ALL: Self = Self { index: 0, count: 1 };

    /// How many of so many are this process'.
    pub(crate) fn portion_of(self, all: u32) -> u32 {
        all / self.count + u32::from(self.index < all % self.count)
    }

    /// The own number of one, where it is this process'.
    pub(crate) fn local_index(self, number: u32) -> Option<usize> {
        (number % self.count == self.index).then(|| (number / self.count) as usize)
    }

    /// The number that an own one has among all.
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
        parts.filter(|share| share.index < share.count).ok_or("a worker has the form 0/2")
    }
}

impl fmt::Display for WorkerShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// The end of a phase, where all processes meet.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ScenarioPhase {
    /// All connections are open or have failed.
    Opening,
    /// They were held.
    Held,
    /// They were cut, and all are back.
    Reconnected,
    /// What was sent is answered.
    Traffic,
}

/// What one process has to say at the end of a phase.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) struct PhaseTotals {
    /// How many connections are open.
    pub(crate) open: u64,
    /// How many were opened, or deliveries made, in the phase.
    pub(crate) done: u64,
    /// Messages that were acknowledged, of each room.
    pub(crate) acknowledged: Vec<u64>,
}

impl PhaseTotals {
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
pub(crate) struct WorkerReport {
    pub(crate) connections: ConnectionCounters,
    pub(crate) counters: MessageCounters,
    pub(crate) seconds: Vec<Second>,
    /// How late what was due was done: values in µs and how often.
    pub(crate) lag_us: Vec<(u64, u64)>,
    pub(crate) cpu_percent: f64,
    pub(crate) grown_bytes: i64,
    pub(crate) opening_s: f64,
    pub(crate) traffic_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) processes: u32,
}

impl WorkerReport {
    /// What virtual users saw.
    pub(crate) fn of(users: &mut VirtualUsers, usage: &GeneratorUsage) -> Self {
        let TrafficMetrics { counters, lag_us, .. } = &users.metrics;
        Self {
            connections: users.connections.clone(),
            counters: counters.clone(),
            lag_us: timeline::pairs(lag_us),
            seconds: users.metrics.seconds(),
            cpu_percent: usage.cpu_percent(),
            grown_bytes: usage.grown_bytes,
            interrupted: users.is_stopped(),
            processes: 1,
            ..Self::default()
        }
    }

    /// Adds another.
    pub(crate) fn add(&mut self, other: Self) {
        self.connections.merge(other.connections);
        self.counters.add(other.counters);
        self.lag_us.extend(other.lag_us);
        self.seconds.resize_with(self.seconds.len().max(other.seconds.len()), Second::default);
        let seconds = self.seconds.iter_mut().zip(&other.seconds);
        seconds.for_each(|(sum, more)| sum.add(more));
        // The busiest of them is the one that may have been too slow.
        self.cpu_percent = self.cpu_percent.max(other.cpu_percent);
        self.grown_bytes += other.grown_bytes;
        self.opening_s = self.opening_s.max(other.opening_s);
        self.traffic_s = self.traffic_s.max(other.traffic_s);
        self.interrupted |= other.interrupted;
        self.processes += other.processes;
    }

    /// How late what was due was done, p99.
    pub(crate) fn lag_p99_us(&self) -> u64 {
        let mut lags = metrics::lag_histogram();
        for (value, count) in &self.lag_us {
            lags.saturating_record_n(*value, *count);
        }
        lags.value_at_quantile(0.99)
    }
}

/// What this process costs.
#[derive(Debug, Default)]
pub(crate) struct GeneratorUsage {
    before: ProcessUsage,
    since: Option<(Instant, u64)>,
    spent: (Duration, u64),
    grown_bytes: i64,
}

impl GeneratorUsage {
    /// Before anything.
    pub(crate) fn new() -> Self {
        Self { before: ProcessUsage::read(None).unwrap_or_default(), ..Self::default() }
    }

    /// All connections are open.
    pub(crate) fn record_memory(&mut self) {
        let now = ProcessUsage::read(None).unwrap_or(self.before);
        self.grown_bytes = now.pss_bytes as i64 - self.before.pss_bytes as i64;
    }

    /// What counts begins.
    pub(crate) fn start(&mut self) {
        let cpu = CpuTime::read(None).unwrap_or_default().total_ms();
        self.since = Some((Instant::now(), cpu));
    }

    /// What counts is over.
    pub(crate) fn stop(&mut self) {
        if let Some((began, before)) = self.since.take() {
            let cpu = CpuTime::read(None).unwrap_or_default().total_ms();
            self.spent = (began.elapsed(), cpu - before);
        }
    }

    /// What was spent of a core while it counted.
    pub(crate) fn cpu_percent(&self) -> f64 {
        let (time, ms) = self.spent;
        if time.is_zero() { 0.0 } else { ms as f64 / 10.0 / time.as_secs_f64() }
    }
}

/// The worker processes.
pub(crate) enum PhaseSync {
    /// There are none.
    Alone(ServerMonitor),
    /// Some, which are met by way of the first.
    Worker {
        /// What the first writes.
        totals: mpsc::Receiver<PhaseTotals>,
    },
}

/// What a process writes for the first.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum WorkerMessage {
    PhaseEnd(ScenarioPhase, PhaseTotals),
    Report(Box<WorkerReport>),
}

impl PhaseSync {
    /// Those with whom this process shares the scenario.
    pub(crate) fn new(share: Option<WorkerShare>, monitor: ServerMonitor) -> Self {
        if share.is_none() {
            return Self::Alone(monitor);
        }
        let (totals_in, totals) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            for line in io::stdin().lock().lines() {
                let Some(sum) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else {
                    return;
                };
                if totals_in.send(sum).is_err() {
                    return;
                }
            }
        });
        Self::Worker { totals }
    }

    /// Ends a phase together with the workers. Connections live on meanwhile.
    pub(crate) fn end_phase(
        &mut self,
        users: &mut VirtualUsers,
        phase: ScenarioPhase,
        own: PhaseTotals,
    ) -> io::Result<PhaseTotals> {
        match self {
            Self::Alone(monitor) => {
                monitor.end_phase(phase, &own);
                Ok(own)
            }
            Self::Worker { totals } => {
                write(&WorkerMessage::PhaseEnd(phase, own))?;
                loop {
                    match totals.try_recv() {
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
    pub(crate) fn submit(
        self,
        report: WorkerReport,
    ) -> io::Result<Option<(WorkerReport, ServerMonitor)>> {
        match self {
            Self::Alone(monitor) => Ok(Some((report, monitor))),
            Self::Worker { .. } => write(&WorkerMessage::Report(Box::new(report))).map(|()| None),
        }
    }
}

fn write(line: &WorkerMessage) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()
}

/// Another process, as the first sees it.
struct WorkerProcess {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// Runs the scenario of this command line in so many worker processes, and adds up what they saw.
pub(crate) async fn run_workers(
    count: u32,
    monitor: &mut ServerMonitor,
) -> io::Result<WorkerReport> {
    let program = std::env::current_exe()?;
    let mut workers = Vec::new();
    for index in 0..count {
        let mut child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .args(["--worker", &WorkerShare { index, count }.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let input = input.ok_or(io::ErrorKind::BrokenPipe)?;
        let output = BufReader::new(output.ok_or(io::ErrorKind::BrokenPipe)?).lines();
        workers.push(WorkerProcess { child, input, output });
    }
    let mut all = WorkerReport::default();
    loop {
        let (mut sum, mut met, mut left) = (PhaseTotals::default(), None, 0);
        for worker in &mut workers {
            let line = worker.output.next_line().await?.ok_or_else(|| {
                io::Error::other("another process of the load ended early; it says why above")
            })?;
            match serde_json::from_str(&line)? {
                WorkerMessage::PhaseEnd(phase, own) => {
                    met = Some(phase);
                    sum.add(&own);
                }
                WorkerMessage::Report(report) => {
                    left += 1;
                    all.add(*report);
                }
            }
        }
        if left == workers.len() {
            for worker in &mut workers {
                worker.child.wait().await?;
            }
            return Ok(all);
        }
        let Some(phase) = met.filter(|_| left == 0) else {
            return Err(io::Error::other("the processes of the load are not at the same phase"));
        };
        monitor.end_phase(phase, &sum);
        let mut line = serde_json::to_vec(&sum)?;
        line.push(b'\n');
        for worker in &mut workers {
            worker.input.write_all(&line).await?;
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

    #[test]
    fn worker_reports_add_up_after_serialization() {
        let report = |open| {
            let second = Second { open, latency_us: vec![(5, 2)], ..Second::default() };
            let counters =
                MessageCounters { acknowledged: vec![1, 2], ..MessageCounters::default() };
            WorkerReport {
                seconds: vec![second],
                counters,
                processes: 1,
                ..WorkerReport::default()
            }
        };
        let line = serde_json::to_string(&WorkerMessage::Report(Box::new(report(2)))).unwrap();
        let WorkerMessage::Report(mut sum) = serde_json::from_str(&line).unwrap() else {
            panic!("{line}")
        };
        sum.add(report(3));
        assert_eq!((sum.processes, sum.seconds[0].open), (2, 5));
        assert_eq!(sum.seconds[0].latencies().len(), 4);
        assert_eq!(sum.counters.acknowledged, [2, 4]);
    }
}
