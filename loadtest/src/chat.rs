//! `loadtest chat`: users who connect, send, pause, read the history, change rooms and disconnect,
//! each with a [`Client`] as in an application.
//!
//! It shows what users notice of a cluster. It does not account for every message, because users
//! who come and go have no complete account; `ledger` does.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustls::ClientConfig;
use skein_client::{
    Client,
    api::{ClientEvent, ClientOptions, HistoryRange, StartFrom},
    options::ConnectOptions,
};
use skein_protocol::ids::RoomId;
use skein_testkit::{
    clock::{self, PreciseTimer},
    timeline::{self, Timeline},
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    args::ChatArgs,
    monitor::ServerMonitor,
    phase::{PhaseTotals, ScenarioPhase},
    procfs::ProcfsError,
    progress::Progress,
    report::{
        GeneratorReport, Report, StepResult, connections::LatencySummary, messages::MessageReport,
    },
    timestamp::SendTimestamp,
    tls::TlsError,
    virtual_users::metrics::lag_histogram,
    virtual_users::workers::GeneratorUsage,
};

/// Time limit of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of entries of a history request.
const HISTORY_LIMIT: u32 = 50;
/// Content lengths, in characters, drawn evenly; most are short.
const CONTENT_LENGTHS: [usize; 8] = [30, 30, 40, 60, 80, 120, 250, 600];

/// The next action of a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UserAction {
    Send,
    ReadHistory,
    ChangeRooms,
    Reconnect,
}

impl UserAction {
    /// Share of each action, in percent.
    const MIX: [(u32, Self); 4] =
        [(80, Self::Send), (10, Self::ReadHistory), (6, Self::ChangeRooms), (4, Self::Reconnect)];

    fn draw(rng: &mut StdRng) -> Self {
        let mut at = rng.random_range(0..100);
        for (share, action) in Self::MIX {
            if at < share {
                return action;
            }
            at -= share;
        }
        Self::Send
    }
}

/// Metrics of all users.
#[derive(Default)]
struct ChatMetrics {
    timeline: Timeline,
    acknowledged: u64,
    delivered: u64,
    duplicated: u64,
    gaps: u64,
    discontinuities: u64,
    failed: u64,
    examples: Vec<String>,
    ack_us: Vec<u64>,
    join_us: Vec<u64>,
    history_us: Vec<u64>,
    lag_us: Option<hdrhistogram::Histogram<u64>>,
}

impl ChatMetrics {
    fn example(&mut self, what: impl FnOnce() -> String) {
        if self.examples.len() < 20 {
            self.examples.push(what());
        }
    }

    fn failed(&mut self, what: &str, why: &dyn std::fmt::Display) {
        self.failed += 1;
        self.example(|| format!("{what}: {why}"));
    }
}

/// Why a run has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChatError {
    /// The certificates to trust cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The resource usage of a server process is unknown.
    #[error(transparent)]
    Process(#[from] ProcfsError),
}

/// Runs `loadtest chat`.
pub(crate) async fn run(args: ChatArgs) -> Result<Report, ChatError> {
    let tls = args.tls.client_config()?;
    let mut monitor = ServerMonitor::begin(&args.monitor)?;
    let mut usage = GeneratorUsage::new();
    usage.start();
    let metrics = Arc::new(Mutex::new(ChatMetrics {
        lag_us: Some(lag_histogram()),
        ..ChatMetrics::default()
    }));
    let began = Instant::now();
    let end = began + args.duration;
    let mut users = JoinSet::new();
    for number in 0..args.users {
        users.spawn(ChatUser::new(number, &args, tls.clone(), metrics.clone(), began).run(end));
    }
    let over = sleep_until(end);
    let is_interrupted =
        Progress::new().until(over, |show| show(&mut metrics.lock().timeline)).await;
    usage.stop();
    let traffic_duration = began.elapsed();
    let (open, done) = {
        let metrics = metrics.lock();
        (metrics.timeline.open(), metrics.delivered)
    };
    monitor
        .end_phase(ScenarioPhase::Traffic, &PhaseTotals { open, done, acknowledged: Vec::new() });
    users.shutdown().await;
    let mut metrics = std::mem::take(&mut *metrics.lock());
    let seconds = metrics.timeline.seconds();
    let messages = MessageReport {
        members: args.users,
        acknowledged: metrics.acknowledged,
        delivered: metrics.delivered,
        duplicated: metrics.duplicated,
        gaps: metrics.gaps,
        signalled_discontinuities: metrics.discontinuities,
        sends_rejected: metrics.failed,
        examples: metrics.examples,
        ..MessageReport::default()
    };
    let latencies = timeline::histogram(&seconds);
    let step = |name: &str, times_us: Vec<u64>| {
        let (count, times) = (times_us.len(), LatencySummary::of(times_us));
        let times = times.map_or_else(String::new, |times| format!(": {times}"));
        StepResult { name: name.to_owned(), result: format!("{count}{times}"), passed: true }
    };
    let mut report = Report {
        generator: GeneratorReport {
            processes: 1,
            cpu_percent: usage.cpu_percent(),
            lag_p99_us: metrics.lag_us.map_or(0, |lags| lags.value_at_quantile(0.99)),
            memory_per_connection_bytes: None,
        },
        seed: Some(args.seed),
        steps: vec![
            step("messages acknowledged", metrics.ack_us),
            step("rooms joined", metrics.join_us),
            step("history requests", metrics.history_us),
        ],
        messages: Some(messages.with_latency(&latencies, traffic_duration, &args.thresholds)),
        seconds,
        interrupted: is_interrupted,
        ..Report::of("chat")
    };
    (report.servers, report.gauges) = monitor.finish();
    report.evaluate(&args.thresholds);
    Ok(report)
}

/// One simulated user.
struct ChatUser {
    number: usize,
    args: ChatArgs,
    tls: Arc<ClientConfig>,
    metrics: Arc<Mutex<ChatMetrics>>,
    rng: StdRng,
    rooms: Vec<RoomId>,
    due: Instant,
    timer: PreciseTimer,
}

impl ChatUser {
    fn new(
        number: usize,
        args: &ChatArgs,
        tls: Arc<ClientConfig>,
        metrics: Arc<Mutex<ChatMetrics>>,
        began: Instant,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(args.seed ^ (number as u64) << 20);
        // Users connect at times spread over one think time, not all at once.
        let due = began + args.think.mul_f64(rng.random_range(0.0..1.0));
        Self {
            number,
            args: args.clone(),
            tls,
            metrics,
            rng,
            rooms: Vec::new(),
            due,
            timer: PreciseTimer::new(),
        }
    }

    /// Connects, and performs one action after the other until `end`.
    async fn run(mut self, end: Instant) {
        sleep_until(self.due).await;
        while Instant::now() < end {
            let urls = &self.args.url;
            let url = urls[self.number % urls.len()].clone();
            let mut options = ConnectOptions::new(url).user(format!("chat-{}", self.number));
            options.tls = Some(self.tls.clone());
            let settings = ClientOptions { urls: urls.clone(), ..ClientOptions::default() };
            let (client, events) = Client::start(options, settings);
            let listener = handle_events(events, self.metrics.clone());
            // When one arm completes the other is no longer needed.
            tokio::select! {
                () = self.run_connection(&client, end) => {}
                () = listener => {}
            }
            client.close().await;
        }
    }

    /// Performs actions on one connection, until `end` or a reconnect.
    async fn run_connection(&mut self, client: &Client, end: Instant) {
        if self.rooms.is_empty() {
            let count = self.rng.random_range(1..=3);
            self.rooms = (0..count).map(|_| self.random_room()).collect();
            self.rooms.sort();
            self.rooms.dedup();
        }
        for room in self.rooms.clone() {
            self.join(client, &room).await;
        }
        loop {
            // Exponentially distributed think times: users act independently.
            let pause = self.args.think.mul_f64(-self.rng.random_range(f64::EPSILON..1.0).ln());
            self.due = self.due.max(Instant::now()) + pause;
            self.timer.sleep_until(self.due.min(end)).await;
            if Instant::now() >= end {
                return;
            }
            let late = self.due.elapsed().as_micros() as u64;
            if let Some(lags) = &mut self.metrics.lock().lag_us {
                lags.saturating_record(late);
            }
            let at = self.rng.random_range(0..self.rooms.len());
            let room = self.rooms[at].clone();
            match UserAction::draw(&mut self.rng) {
                UserAction::Send => self.send(client, &room).await,
                UserAction::ReadHistory => {
                    let page = client.history(&room, HistoryRange::Newest, HISTORY_LIMIT);
                    let page = timeout(RESPONSE_TIMEOUT, page).await;
                    self.record_response(page, "history", |metrics| &mut metrics.history_us);
                }
                UserAction::ChangeRooms => {
                    let left = timeout(RESPONSE_TIMEOUT, client.leave(&room)).await;
                    self.record_response(left, "leave", |metrics| &mut metrics.join_us);
                    let other = self.random_room();
                    if !self.rooms.contains(&other) {
                        self.rooms[at] = other;
                    }
                    self.join(client, &self.rooms[at].clone()).await;
                }
                UserAction::Reconnect => return,
            }
        }
    }

    async fn send(&mut self, client: &Client, room: &RoomId) {
        let length = CONTENT_LENGTHS[self.rng.random_range(0..CONTENT_LENGTHS.len())];
        let due_ns = clock::monotonic_ns() - self.due.elapsed().as_nanos() as u64;
        let timestamp = SendTimestamp { sender: self.number as u32, due_ns };
        let sent = timeout(RESPONSE_TIMEOUT, client.send(room, timestamp.content(length))).await;
        if matches!(sent, Ok(Ok(_))) {
            let mut metrics = self.metrics.lock();
            metrics.acknowledged += 1;
            metrics.timeline.acknowledged(Instant::now());
        }
        self.record_response(sent, "send", |metrics| &mut metrics.ack_us);
    }

    async fn join(&mut self, client: &Client, room: &RoomId) {
        let joined =
            timeout(RESPONSE_TIMEOUT, client.join(room, StartFrom::History(HISTORY_LIMIT))).await;
        self.record_response(joined, "join", |metrics| &mut metrics.join_us);
    }

    /// Records the time of a response, counted from when the request was due.
    fn record_response<T, E: std::fmt::Display>(
        &self,
        answer: Result<Result<T, E>, tokio::time::error::Elapsed>,
        what: &str,
        times: impl FnOnce(&mut ChatMetrics) -> &mut Vec<u64>,
    ) {
        let mut metrics = self.metrics.lock();
        match answer {
            Ok(Ok(_)) => times(&mut metrics).push(self.due.elapsed().as_micros() as u64),
            Ok(Err(error)) => metrics.failed(what, &error),
            Err(late) => metrics.failed(what, &late),
        }
    }

    fn random_room(&mut self) -> RoomId {
        // The lower of two random numbers, so that some rooms are larger than others.
        let rooms = self.args.rooms;
        let room = self.rng.random_range(0..rooms).min(self.rng.random_range(0..rooms));
        format!("chat-{room}").parse().expect("a name")
    }
}

/// Counts the events of a client.
async fn handle_events(mut events: mpsc::Receiver<ClientEvent>, metrics: Arc<Mutex<ChatMetrics>>) {
    let mut is_connected = false;
    while let Some(event) = events.recv().await {
        let now = Instant::now();
        let mut metrics = metrics.lock();
        match event {
            ClientEvent::Connected { .. } => {
                is_connected = true;
                metrics.timeline.connected(now);
            }
            ClientEvent::Disconnected { .. } if std::mem::take(&mut is_connected) => {
                metrics.timeline.ended(now);
            }
            ClientEvent::Message { message, .. } if !message.replay => {
                metrics.delivered += 1;
                let content = message.content.as_str().unwrap_or_default();
                let timestamp = SendTimestamp::find(content.as_bytes());
                let late = timestamp
                    .map(|timestamp| clock::monotonic_ns().saturating_sub(timestamp.due_ns));
                metrics.timeline.delivered(now, late.map(Duration::from_nanos));
            }
            // Entries that are repeated after a discontinuity were signalled with it.
            ClientEvent::Duplicate { earlier: None, room, position, .. } => {
                metrics.duplicated += 1;
                metrics.example(|| format!("{room}: {position} twice"));
            }
            ClientEvent::Gap { room, expected, got } => {
                metrics.gaps += 1;
                metrics.example(|| format!("{room}: {got} instead of {expected:?}"));
            }
            ClientEvent::NotRecovered { .. } => metrics.discontinuities += 1,
            ClientEvent::Reset(reset) if reset.room.is_some() => metrics.discontinuities += 1,
            ClientEvent::Error(rejection) => metrics.failed("rejected", &rejection.code.as_str()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_drawn_by_their_share() {
        assert_eq!(UserAction::MIX.iter().map(|(share, _)| share).sum::<u32>(), 100);
        let mut rng = StdRng::seed_from_u64(1);
        let drawn: Vec<UserAction> = (0..1_000).map(|_| UserAction::draw(&mut rng)).collect();
        for (share, action) in UserAction::MIX {
            let count = drawn.iter().filter(|drawn| **drawn == action).count() as u32;
            assert!(count.abs_diff(share * 10) < 40, "{action:?}: {count}");
        }
    }
}
