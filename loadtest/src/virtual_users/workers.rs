//! One scenario in several processes, because a process may hold only so many descriptors and has
//! one thread.
//!
//! The first process starts the workers with the same command line and `--worker I/N`, and opens no
//! connection itself. At the end of each phase every worker writes its totals as a line and reads
//! the sum of all. At the end of the run each writes its report.

use std::{
    io::{self, BufRead as _, Write as _},
    process::Stdio,
    sync::mpsc,
};

use serde::{Deserialize, Serialize};
use skein_testkit::timeline::{self, Second};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{Duration, Instant},
};

use super::{
    VirtualUsers,
    metrics::{self, MessageCounters, TrafficMetrics},
    share::WorkerShare,
};
use crate::{
    monitor::ServerMonitor,
    phase::{PhaseTotals, ScenarioPhase},
    procfs::{CpuTime, ProcessUsage},
    report::connections::ConnectionCounters,
};

/// Metrics and resource usage of one worker.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct WorkerReport {
    pub(crate) connections: ConnectionCounters,
    pub(crate) counters: MessageCounters,
    pub(crate) seconds: Vec<Second>,
    /// How late due operations began: values in µs and their counts.
    pub(crate) lag_us: Vec<(u64, u64)>,
    pub(crate) cpu_percent: f64,
    pub(crate) grown_bytes: i64,
    pub(crate) opening_s: f64,
    pub(crate) traffic_s: f64,
    pub(crate) interrupted: bool,
    pub(crate) processes: u32,
}

impl WorkerReport {
    /// The report of the virtual users of this process.
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

    /// Adds the report of another worker.
    pub(crate) fn add(&mut self, other: Self) {
        self.connections.merge(other.connections);
        self.counters.add(other.counters);
        self.lag_us.extend(other.lag_us);
        self.seconds.resize_with(self.seconds.len().max(other.seconds.len()), Second::default);
        let seconds = self.seconds.iter_mut().zip(&other.seconds);
        seconds.for_each(|(sum, more)| sum.add(more));
        // The busiest worker is the one that may have been too slow.
        self.cpu_percent = self.cpu_percent.max(other.cpu_percent);
        self.grown_bytes += other.grown_bytes;
        self.opening_s = self.opening_s.max(other.opening_s);
        self.traffic_s = self.traffic_s.max(other.traffic_s);
        self.interrupted |= other.interrupted;
        self.processes += other.processes;
    }

    /// p99 of the lateness of due operations, µs.
    pub(crate) fn lag_p99_us(&self) -> u64 {
        let mut lags = metrics::lag_histogram();
        for (value, count) in &self.lag_us {
            lags.saturating_record_n(*value, *count);
        }
        lags.value_at_quantile(0.99)
    }
}

/// Resource usage of this process.
#[derive(Debug, Default)]
pub(crate) struct GeneratorUsage {
    before: ProcessUsage,
    since: Option<(Instant, u64)>,
    spent: (Duration, u64),
    grown_bytes: i64,
}

impl GeneratorUsage {
    /// Takes the first measurement, before any connection.
    pub(crate) fn new() -> Self {
        Self { before: ProcessUsage::read(None).unwrap_or_default(), ..Self::default() }
    }

    /// Records the memory now that all connections are open.
    pub(crate) fn record_memory(&mut self) {
        let now = ProcessUsage::read(None).unwrap_or(self.before);
        self.grown_bytes = now.pss_bytes as i64 - self.before.pss_bytes as i64;
    }

    /// Starts to count CPU time.
    pub(crate) fn start(&mut self) {
        let cpu = CpuTime::read(None).unwrap_or_default().total_ms();
        self.since = Some((Instant::now(), cpu));
    }

    /// Stops counting CPU time.
    pub(crate) fn stop(&mut self) {
        if let Some((began, before)) = self.since.take() {
            let cpu = CpuTime::read(None).unwrap_or_default().total_ms();
            self.spent = (began.elapsed(), cpu - before);
        }
    }

    /// CPU time between `start` and `stop`, in percent of a core.
    pub(crate) fn cpu_percent(&self) -> f64 {
        let (time, ms) = self.spent;
        if time.is_zero() { 0.0 } else { ms as f64 / 10.0 / time.as_secs_f64() }
    }
}

/// How this process synchronizes phases with the workers.
pub(crate) enum PhaseSync {
    /// This is the only process.
    Alone(ServerMonitor),
    /// This is a worker; the first process forwards the totals.
    Worker {
        /// Totals that the first process sends.
        totals: mpsc::Receiver<PhaseTotals>,
    },
}

/// A line that a worker writes to the first process.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
enum WorkerMessage {
    PhaseEnd(ScenarioPhase, PhaseTotals),
    Report(Box<WorkerReport>),
}

impl PhaseSync {
    /// Synchronization for a worker with `share`, or for the only process.
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

    /// Ends a phase together with all workers. Connections are served meanwhile.
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

    /// Sends the report to the first process; returns it if this is the only one.
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

/// A worker, as the first process sees it.
struct WorkerProcess {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

/// Runs the scenario of this command line in `count` workers and adds up their reports.
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
                io::Error::other("a worker process ended early; its error is above")
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
            return Err(io::Error::other("the worker processes are in different phases"));
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
