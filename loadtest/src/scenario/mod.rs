//! The scenarios that virtual users run, and what they have in common: where to connect, whether there
//! are descriptors and ports enough, and the report.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use loadtest::checker::timeline;

use crate::{
    args::{CommonArgs, OpenArgs, ProcessArgs},
    monitor::ServerMonitor,
    procfs::{self, ProcfsError},
    report::{
        GeneratorReport, Report, StepResult, connections::ConnectionReport, messages::MessageReport,
    },
    virtual_users::{
        ConnectPlan, RoomAssignment, VirtualUsers,
        workers::{
            self, GeneratorUsage, PhaseSync, PhaseTotals, ScenarioPhase, WorkerReport, WorkerShare,
        },
    },
};

pub(crate) mod connect;
pub(crate) mod storm;
pub(crate) mod sweep;
pub(crate) mod traffic;

/// Descriptors for everything that is no connection.
const SPARE_DESCRIPTORS: u64 = 64;
/// How long servers have to see that connections say goodbye.
const CLOSE_GRACE: Duration = Duration::from_millis(200);

/// Why a scenario has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScenarioError {
    /// There are fewer descriptors than connections.
    #[error(
        "{connections} connections in one process need {needed} open files, and it may have \
         {have}: share them out (--processes), raise the limit (`ulimit -Hn`, LimitNOFILE) or ask \
         for fewer"
    )]
    Descriptors {
        /// In one process.
        connections: u32,
        /// That many files.
        needed: u64,
        /// Of so many.
        have: u64,
    },
    /// The limit could not be read or raised.
    #[error("the limit of open files: {0}")]
    Limit(#[source] io::Error),
    /// There are fewer ports than connections.
    #[error(
        "{connections} connections from {addresses} address(es) of {ports} ports each are too \
         many: give more addresses, such as --sources 127.0.0.1-127.0.0.{enough}"
    )]
    Ports {
        /// In all.
        connections: u32,
        /// From so many addresses.
        addresses: u32,
        /// Of so many ports.
        ports: u32,
        /// How many addresses would be enough.
        enough: u32,
    },
    /// The URL's host has no address.
    #[error("{authority}: {source}")]
    Lookup {
        /// Host and port.
        authority: String,
        /// Why.
        source: io::Error,
    },
    /// The cost of a server process cannot be read.
    #[error("{0} (is the process there, and is it yours?)")]
    Process(#[from] ProcfsError),
    /// Sockets, or other processes of the load.
    #[error("the load: {0}")]
    Io(#[from] io::Error),
    /// The thread of the load.
    #[error("the load ended in panic")]
    Panic,
}

/// What a scenario leaves in one process.
pub(crate) struct ScenarioOutput {
    /// What was seen. Nothing where another process tells all.
    all: Option<(WorkerReport, ServerMonitor)>,
    /// What it tells besides.
    steps: Vec<StepResult>,
}

/// A scenario in one process.
pub(crate) struct ScenarioRun {
    pub(crate) users: VirtualUsers,
    pub(crate) sync: PhaseSync,
    pub(crate) usage: GeneratorUsage,
    opening: Duration,
    traffic_duration: Duration,
}

impl ScenarioRun {
    /// Opens all connections, and measures what they cost. Where messages are to be read they are
    /// counted from here on.
    pub(crate) fn open(
        args: &CommonArgs,
        worker: Option<WorkerShare>,
        rooms: RoomAssignment,
        connections: u32,
        counts_messages: bool,
        stop: &Arc<AtomicBool>,
    ) -> Result<Self, ScenarioError> {
        let usage = GeneratorUsage::new();
        let plan =
            connect_plan(&args.open, worker.unwrap_or(WorkerShare::ALL), rooms, connections)?;
        let monitor = ServerMonitor::begin(&args.monitor)?;
        let users = VirtualUsers::new(plan, counts_messages, stop.clone())?;
        let sync = PhaseSync::new(worker, monitor);
        let (opening, traffic_duration) = (Duration::ZERO, Duration::ZERO);
        let mut run = Self { users, sync, usage, opening, traffic_duration };
        run.usage.start();
        run.opening = run.users.open_all(Some(args.open.ramp))?;
        run.usage.stop();
        run.usage.record_memory();
        if counts_messages {
            // Before others may send: what they send is to be counted.
            run.users.start_measuring();
        }
        run.end_phase(ScenarioPhase::Opening)?;
        Ok(run)
    }

    /// Ends a phase together with the others.
    fn end_phase(&mut self, phase: ScenarioPhase) -> Result<PhaseTotals, ScenarioError> {
        let (counters, open) = (&self.users.metrics.counters, self.users.open_count());
        let done = match phase {
            ScenarioPhase::Opening => self.users.connections.opened(),
            ScenarioPhase::Held | ScenarioPhase::Reconnected => open,
            ScenarioPhase::Traffic => counters.delivered,
        };
        let own = PhaseTotals { open, done, acknowledged: counters.acknowledged.clone() };
        Ok(self.sync.end_phase(&mut self.users, phase, own)?)
    }

    /// Says goodbye, and tells what was seen.
    fn end(mut self, steps: Vec<StepResult>) -> Result<ScenarioOutput, ScenarioError> {
        let report = WorkerReport {
            opening_s: self.opening.as_secs_f64(),
            traffic_s: self.traffic_duration.as_secs_f64(),
            ..WorkerReport::of(&mut self.users, &self.usage)
        };
        self.users.close_all();
        let end = tokio::time::Instant::now() + CLOSE_GRACE;
        while tokio::time::Instant::now() < end && self.users.open_count() > 0 {
            self.users.step(end)?;
        }
        Ok(ScenarioOutput { all: self.sync.submit(report)?, steps })
    }
}

/// Plays a scenario, in this process or in several, and makes a report of what they saw. `None`:
/// this is one of several.
pub(crate) async fn run_scenario<F>(
    scenario: &'static str,
    args: CommonArgs,
    process: ProcessArgs,
    requested: u32,
    sends: bool,
    body: F,
) -> Result<Option<Report>, ScenarioError>
where
    F: FnOnce(Arc<AtomicBool>) -> Result<ScenarioOutput, ScenarioError> + Send + 'static,
{
    let stop = Arc::new(AtomicBool::new(false));
    let output = async {
        if process.processes > 1 && process.worker.is_none() {
            let mut monitor = ServerMonitor::begin(&args.monitor)?;
            let report = workers::run_workers(process.processes, &mut monitor).await?;
            return Ok(ScenarioOutput { all: Some((report, monitor)), steps: Vec::new() });
        }
        let stop = stop.clone();
        let output = tokio::task::spawn_blocking(move || body(stop)).await;
        output.map_err(|_| ScenarioError::Panic)?
    };
    let ScenarioOutput { all, steps } = ending_early(&stop, output).await?;
    let Some((report, monitor)) = all else { return Ok(None) };
    Ok(Some(build_report(scenario, report, monitor, steps, requested, sends, &args)))
}

/// Waits for something that ends soon where `stop` is set, and sets it when somebody interrupts.
pub(crate) async fn ending_early<T>(stop: &AtomicBool, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    // Both arms are cancel-safe: the future goes on where it was.
    tokio::select! {
        done = &mut future => return done,
        () = crate::interrupt_signal() => stop.store(true, Ordering::Relaxed),
    }
    future.await
}

fn build_report(
    scenario: &str,
    worker: WorkerReport,
    monitor: ServerMonitor,
    steps: Vec<StepResult>,
    requested: u32,
    sends: bool,
    args: &CommonArgs,
) -> Report {
    let (servers, gauges) = monitor.finish();
    let lag_p99_us = worker.lag_p99_us();
    let held = worker.connections.held();
    let messages = sends.then(|| {
        let counters = &worker.counters;
        let messages = MessageReport {
            members: requested as usize,
            acknowledged: counters.acknowledged.iter().sum(),
            delivered: counters.delivered,
            lost: counters.lost,
            duplicated: counters.duplicated,
            out_of_order: counters.out_of_order,
            gaps: counters.gaps,
            signalled_discontinuities: counters.signalled_discontinuities,
            sends_rejected: counters.rejected,
            unanswered: counters.unanswered,
            longest_silence_ms: counters.longest_silence_ms,
            examples: counters.examples.clone(),
            ..MessageReport::default()
        };
        let talked = Duration::from_secs_f64(worker.traffic_s);
        messages.with_latency(&timeline::histogram(&worker.seconds), talked, &args.thresholds)
    });
    let opening = Duration::from_secs_f64(worker.opening_s);
    let mut report = Report {
        generator: GeneratorReport {
            processes: worker.processes,
            cpu_percent: worker.cpu_percent,
            lag_p99_us,
            memory_per_connection_bytes: worker.grown_bytes.checked_div(held as i64),
        },
        connections: Some(ConnectionReport::of(worker.connections, requested.into(), opening)),
        interrupted: worker.interrupted,
        messages,
        seconds: worker.seconds,
        servers,
        gauges,
        steps,
        ..Report::of(scenario)
    };
    report.evaluate(&args.thresholds);
    report
}

pub(crate) fn connect_plan(
    args: &OpenArgs,
    share: WorkerShare,
    rooms: RoomAssignment,
    connections: u32,
) -> Result<ConnectPlan, ScenarioError> {
    check_limits(args, connections, share)?;
    let address = lookup(args)?;
    Ok(ConnectPlan { open: args.clone(), address, rooms, connections, share })
}

fn check_limits(
    args: &OpenArgs,
    connections: u32,
    share: WorkerShare,
) -> Result<(), ScenarioError> {
    let own = share.portion_of(connections);
    let needed = u64::from(own) + SPARE_DESCRIPTORS;
    let have = rlimit::increase_nofile_limit(needed).map_err(ScenarioError::Limit)?;
    if have < needed {
        return Err(ScenarioError::Descriptors { connections: own, needed, have });
    }
    let addresses = args.sources.as_ref().map_or(1, |sources| sources.count());
    let ports = procfs::local_ports();
    if u64::from(connections) > u64::from(ports) * u64::from(addresses) {
        let enough = connections.div_ceil(ports.max(1));
        return Err(ScenarioError::Ports { connections, addresses, ports, enough });
    }
    Ok(())
}

fn lookup(args: &OpenArgs) -> Result<SocketAddr, ScenarioError> {
    let authority = &args.url.authority;
    let failed = |source| ScenarioError::Lookup { authority: authority.clone(), source };
    let mut addresses = authority.to_socket_addrs().map_err(failed)?;
    addresses.next().ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}
