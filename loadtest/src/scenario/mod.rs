//! Scenarios that virtual users run, and their common parts: the address, the limits of descriptors
//! and ports, and the report.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use skein_testkit::timeline;

use crate::{
    args::{CommonArgs, OpenArgs, ProcessArgs},
    monitor::ServerMonitor,
    phase::{PhaseTotals, ScenarioPhase},
    procfs::{self, ProcfsError},
    report::{
        GeneratorReport, Report, StepResult, connections::ConnectionReport, messages::MessageReport,
    },
    signals,
    tls::{TlsConnector, TlsError},
    virtual_users::{
        ConnectPlan, RoomAssignment, VirtualUsers,
        share::WorkerShare,
        workers::{self, GeneratorUsage, PhaseSync, WorkerReport},
    },
};

pub(crate) mod connect;
pub(crate) mod storm;
pub(crate) mod sweep;
pub(crate) mod traffic;

/// Descriptors that are not connections.
const SPARE_DESCRIPTORS: u64 = 64;
/// Time for servers to handle close frames.
const CLOSE_GRACE: Duration = Duration::from_millis(200);

/// Why a scenario has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScenarioError {
    /// The limit of open files is lower than the connections need.
    #[error(
        "{connections} connections in one process need {needed} open files, and it may have \
         {have}: divide them (--processes), raise the limit (`ulimit -Hn`, LimitNOFILE) or ask \
         for fewer"
    )]
    Descriptors {
        /// Connections of this process.
        connections: u32,
        /// Descriptors that they need.
        needed: u64,
        /// Limit of descriptors.
        have: u64,
    },
    /// The limit cannot be read or raised.
    #[error("cannot raise the limit of open files: {0}")]
    Limit(#[source] io::Error),
    /// There are fewer local ports than connections.
    #[error(
        "{connections} connections from {addresses} address(es) of {ports} ports each are too \
         many: give more addresses, such as --sources 127.0.0.1-127.0.0.{enough}"
    )]
    Ports {
        /// Connections of all workers.
        connections: u32,
        /// Source addresses.
        addresses: u32,
        /// Ports of each address.
        ports: u32,
        /// Number of addresses that suffices.
        enough: u32,
    },
    /// The URL's host cannot be resolved.
    #[error("{authority}: {source}")]
    Lookup {
        /// Host and port.
        authority: String,
        /// The cause.
        source: io::Error,
    },
    /// The `wss://` URL or the certificates to trust cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The usage of a server process cannot be read.
    #[error("{0} (does the process exist, and does it belong to this user?)")]
    Process(#[from] ProcfsError),
    /// Sockets or worker processes failed.
    #[error("load generator: {0}")]
    Io(#[from] io::Error),
    /// The thread of the virtual users panicked.
    #[error("the load generator panicked")]
    Panic,
}

/// Result of a scenario in one process.
pub(crate) struct ScenarioOutput {
    /// The report and the monitor; `None` in a worker, which has sent its report.
    all: Option<(WorkerReport, ServerMonitor)>,
    /// Further results of the scenario.
    steps: Vec<StepResult>,
}

/// One run of a scenario in one process.
pub(crate) struct ScenarioRun {
    pub(crate) users: VirtualUsers,
    pub(crate) sync: PhaseSync,
    pub(crate) usage: GeneratorUsage,
    opening: Duration,
    traffic_duration: Duration,
}

impl ScenarioRun {
    /// Opens all connections and measures their cost. With `counts_messages` messages are counted
    /// from then on.
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
            // Before the other workers may send, so that their messages are counted.
            run.users.start_measuring();
        }
        run.end_phase(ScenarioPhase::Opening)?;
        Ok(run)
    }

    /// Ends a phase together with the other workers.
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

    /// Closes all connections, and returns the result.
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

/// Runs a scenario in this process or in several, and builds the report. Returns `None` in a
/// worker.
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

/// Waits for a future that ends soon after `stop` is set, and sets `stop` on a signal.
pub(crate) async fn ending_early<T>(stop: &AtomicBool, future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    // Both arms are cancel-safe: the future continues.
    tokio::select! {
        done = &mut future => return done,
        () = signals::interrupted() => stop.store(true, Ordering::Relaxed),
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
        let traffic_duration = Duration::from_secs_f64(worker.traffic_s);
        messages.with_latency(
            &timeline::histogram(&worker.seconds),
            traffic_duration,
            &args.thresholds,
        )
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
    let tls = TlsConnector::for_url(&args.url, &args.tls)?;
    Ok(ConnectPlan { open: args.clone(), address, tls, rooms, connections, share })
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
