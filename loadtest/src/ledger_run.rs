//! Members of rooms who talk at a rate, each watched by the ledger of its room; and what came of it.

use std::{sync::Arc, time::Duration};

use hdrhistogram::Histogram;
use loadtest::checker::{
    client::{ClientProfile, SendSchedule},
    clients::TestClients,
    report::DeliveryReport,
    timeline::{self, Timeline},
};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    args::{LedgerArgs, LoadArgs, Thresholds},
    monitor::ServerMonitor,
    procfs::{CpuTime, ProcfsError},
    progress::Progress,
    report::{GeneratorReport, Report, messages::MessageReport},
    virtual_users::workers::{PhaseTotals, ScenarioPhase},
};

/// How long the members may take to be in their rooms.
const JOIN_MAX: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How often it is looked how late this program is.
const LAG_PROBE_INTERVAL: Duration = Duration::from_millis(1);

/// Why a ledger run has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerRunError {
    /// Not everybody came.
    #[error("{missing} of {members} members are not in their rooms after {} s", JOIN_MAX.as_secs())]
    NotJoined {
        /// Who did not.
        missing: usize,
        /// Of so many.
        members: usize,
    },
    /// What this program costs cannot be read.
    #[error(transparent)]
    Cost(#[from] ProcfsError),
    /// There is no thread to look how late the program is.
    #[error("no thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Members who talk.
pub(crate) struct LedgerRun {
    rooms: Vec<TestClients>,
    timeline: Arc<Mutex<Timeline>>,
    began: Instant,
    cpu: CpuTime,
    lag_us: Arc<Mutex<Histogram<u64>>>,
    _lag: JoinSet<()>,
}

/// Has members talk for a while, and tells what they saw.
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
    /// Has members come to their rooms, spread over the URLs, and talk.
    pub(crate) async fn start(urls: Vec<String>, load: &LoadArgs) -> Result<Self, LedgerRunError> {
        let timeline: Arc<Mutex<Timeline>> = Arc::default();
        let members = load.rooms * load.members;
        // Each in its turn, so that together they keep the rate.
        let due = |index: usize| load.rate.due(index as u64);
        let profile = |room: usize, member: usize| {
            let index = member * load.rooms + room;
            ClientProfile {
                urls: (0..urls.len()).map(|j| urls[(index + j) % urls.len()].clone()).collect(),
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

    /// When the members were first allowed to talk.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    /// How many connections are open.
    fn open(&self) -> u64 {
        self.timeline.lock().open()
    }

    /// How many messages have arrived.
    fn delivered(&self) -> u64 {
        self.timeline.lock().deliveries()
    }

    /// Shows how far it is until something is over, or somebody interrupts it. Returns whether
    /// somebody did.
    pub(crate) async fn show_progress_until(&self, over: impl Future<Output = ()>) -> bool {
        Progress::new().until(over, |show| show(&mut self.timeline.lock())).await
    }

    /// Has everybody end what was begun, and counts.
    pub(crate) async fn finish(
        self,
        scenario: &str,
        thresholds: &Thresholds,
    ) -> Result<Report, LedgerRunError> {
        let talked = self.began.elapsed();
        let spent_ms = CpuTime::read(None)?.total_ms() - self.cpu.total_ms();
        let generator = GeneratorReport {
            processes: 1,
            cpu_percent: spent_ms as f64 / talked.as_millis() as f64 * 100.0,
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
        let messages =
            MessageReport::of(sum, unfinished).with_latency(&times_us, talked, thresholds);
        Ok(Report { messages: Some(messages), seconds, generator, ..Report::of(scenario) })
    }
}

/// Looks how late this program's only thread does what is due: another thread asks every
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
