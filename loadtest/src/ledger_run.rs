//! A ledger run: members of rooms send at a rate, observed by a delivery checker for each room.

use std::{sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use skein_testkit::{
    checker::{
        client::{ClientProfile, SendSchedule},
        clients::TestClients,
        report::DeliveryReport,
    },
    servers::ServerError,
    timeline::{self, Timeline},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    args::{LedgerArgs, LoadArgs, Thresholds},
    monitor::ServerMonitor,
    phase::{PhaseTotals, ScenarioPhase},
    procfs::{CpuTime, ProcfsError},
    progress::Progress,
    report::{GeneratorReport, Report, messages::MessageReport},
    tls::TlsError,
};

/// Time limit for all members to join.
const JOIN_MAX: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Interval at which the lateness of this program is measured.
const LAG_PROBE_INTERVAL: Duration = Duration::from_millis(1);

/// Why a run against a cluster has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterRunError {
    /// The cluster failed.
    #[error(transparent)]
    Cluster(#[from] ServerError),
    /// The test clients failed.
    #[error(transparent)]
    LedgerRun(#[from] LedgerRunError),
    /// A signal ended the run.
    #[error("interrupted")]
    Interrupted,
}

/// Why a ledger run has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerRunError {
    /// Members did not join in time.
    #[error("{missing} of {members} members have not joined after {} s", JOIN_MAX.as_secs())]
    NotJoined {
        /// Members that have not joined.
        missing: usize,
        /// All members.
        members: usize,
    },
    /// The certificates to trust cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The resource usage of this program is unknown.
    #[error(transparent)]
    Cost(#[from] ProcfsError),
    /// The thread that measures lateness cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Test clients that send.
pub(crate) struct LedgerRun {
    rooms: Vec<TestClients>,
    timeline: Arc<Mutex<Timeline>>,
    began: Instant,
    cpu: CpuTime,
    lag_us: Arc<Mutex<Histogram<u64>>>,
    _lag: JoinSet<()>,
}

/// Runs `loadtest ledger`.
pub(crate) async fn run(args: LedgerArgs) -> Result<Report, LedgerRunError> {
    let mut monitor = ServerMonitor::begin(&args.monitor)?;
    let run = LedgerRun::start(args.url, &args.load).await?;
    let over = sleep_until(run.began() + args.load.duration);
    let is_interrupted = run.show_progress_until(over).await;
    let (acknowledged, done, open) = (Vec::new(), run.delivered(), run.open());
    monitor.end_phase(ScenarioPhase::Traffic, &PhaseTotals { open, done, acknowledged });
    let mut report = run.finish("ledger", &args.load.thresholds).await?;
    (report.servers, report.gauges) = monitor.finish();
    report.interrupted = is_interrupted;
    report.evaluate(&args.load.thresholds);
    Ok(report)
}

impl LedgerRun {
    /// Starts the clients, spread over the URLs, and lets them send when all have joined.
    pub(crate) async fn start(urls: Vec<String>, load: &LoadArgs) -> Result<Self, LedgerRunError> {
        let timeline: Arc<Mutex<Timeline>> = Arc::default();
        let tls = load.tls.client_config()?;
        let members = load.rooms * load.members;
        // Members send in turn, so that together they keep the rate.
        let due = |index: usize| load.rate.due(index as u64);
        let profile = |room: usize, member: usize| {
            let index = member * load.rooms + room;
            ClientProfile {
                urls: (0..urls.len()).map(|j| urls[(index + j) % urls.len()].clone()).collect(),
                tls: Some(tls.clone()),
                user: format!("ledger-{index}"),
                room: format!("ledger-{room}").parse().expect("a name"),
                schedule: SendSchedule::Interval { first: due(index), interval: due(members) },
                bytes: load.bytes,
                idle_timeout: load.idle_timeout,
                ping_every: load.idle_timeout / 4,
            }
        };
        let clients = |room: usize| {
            let profiles = (0..load.members).map(|member| profile(room, member)).collect();
            TestClients::spawn(profiles, timeline.clone())
        };
        let rooms: Vec<TestClients> = (0..load.rooms).map(clients).collect();
        let deadline = Instant::now() + JOIN_MAX;
        loop {
            let missing = rooms.iter().map(TestClients::not_joined).sum();
            if missing == 0 {
                break;
            }
            if deadline < Instant::now() {
                return Err(LedgerRunError::NotJoined { missing, members });
            }
            sleep(POLL_INTERVAL).await;
        }
        let open = timeline.lock().open();
        *timeline.lock() = Timeline::new(open);
        let lag_us = Histogram::new(3).expect("3 digits are possible");
        let lag_us = Arc::new(Mutex::new(lag_us));
        let lag = watch_lag(lag_us.clone())?;
        let cpu = CpuTime::read(None)?;
        rooms.iter().for_each(TestClients::start_sending);
        Ok(Self { rooms, timeline, began: Instant::now(), cpu, lag_us, _lag: lag })
    }

    /// When the members were first allowed to send.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    /// When members reconnected, and for how long each had been away.
    pub(crate) fn reconnects(&self) -> Vec<(Instant, Duration)> {
        let of_room = |room: &TestClients| room.checker.lock().reconnects().collect::<Vec<_>>();
        self.rooms.iter().flat_map(of_room).collect()
    }

    /// Number of open connections.
    pub(crate) fn open(&self) -> u64 {
        self.timeline.lock().open()
    }

    /// Number of deliveries.
    fn delivered(&self) -> u64 {
        self.timeline.lock().deliveries()
    }

    /// Shows the progress until `over` completes or a signal arrives. Returns whether a signal
    /// interrupted it.
    pub(crate) async fn show_progress_until(&self, over: impl Future<Output = ()>) -> bool {
        Progress::new().until(over, |show| show(&mut self.timeline.lock())).await
    }

    /// Completes all messages, and builds the report.
    pub(crate) async fn finish(
        self,
        scenario: &str,
        thresholds: &Thresholds,
    ) -> Result<Report, LedgerRunError> {
        let traffic_duration = self.began.elapsed();
        let spent_ms = CpuTime::read(None)?.total_ms() - self.cpu.total_ms();
        let generator = GeneratorReport {
            processes: 1,
            cpu_percent: spent_ms as f64 / traffic_duration.as_millis() as f64 * 100.0,
            lag_p99_us: self.lag_us.lock().value_at_quantile(0.99),
            memory_per_connection_bytes: None,
        };
        self.rooms.iter().for_each(TestClients::stop_sending);
        let (mut sum, mut unfinished) = (DeliveryReport::default(), Vec::new());
        for clients in self.rooms {
            match clients.finish().await {
                Ok(report) => sum.add(report),
                Err(timeout) => {
                    unfinished.push(timeout.to_string());
                    sum.add(*timeout.report);
                }
            }
        }
        let seconds = self.timeline.lock().seconds();
        let times_us = timeline::histogram(&seconds);
        let messages = MessageReport::of(sum, unfinished).with_latency(
            &times_us,
            traffic_duration,
            thresholds,
        );
        Ok(Report { messages: Some(messages), seconds, generator, ..Report::of(scenario) })
    }
}

/// Measures the lateness of this program's only thread: another thread sends it the time every
/// millisecond.
fn watch_lag(lag_us: Arc<Mutex<Histogram<u64>>>) -> Result<JoinSet<()>, std::io::Error> {
    let (asks, mut asked) = mpsc::channel::<Instant>(1024);
    #[expect(clippy::disallowed_methods, reason = "a thread of its own")]
    let ask = move || {
        loop {
            std::thread::sleep(LAG_PROBE_INTERVAL);
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
