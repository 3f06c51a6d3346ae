//! `loadtest chat`: people who come, talk, pause, look at the history, change rooms and go, each a
//! [`Client`] as an application would use it.
//!
//! It shows what people would see of a cluster. It does not account for every message, since who
//! comes and goes has no account to keep: that is `ledger`.

use std::{sync::Arc, time::Duration};

use loadtest::{
    checker::timeline::{self, Timeline},
    clock::{self, Alarm},
};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use shared::{
    client::{
        Client,
        api::{ClientEvent, ClientOptions, HistoryRange, StartFrom},
        options::ConnectOptions,
    },
    ids::RoomId,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    args::ChatArgs,
    monitor::ServerMonitor,
    procfs::ProcfsError,
    progress::Progress,
    report::{
        GeneratorReport, Report, StepResult, connections::LatencySummary, messages::MessageReport,
    },
    timestamp::SendTimestamp,
    virtual_users::metrics::lag_histogram,
    virtual_users::workers::{GeneratorUsage, PhaseTotals, ScenarioPhase},
};

/// How long an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How many entries somebody looks back.
const HISTORY: u32 = 50;
/// How long a message is, in characters; most are short.
const LENGTHS: [usize; 8] = [30, 30, 40, 60, 80, 120, 250, 600];

/// What somebody does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Say,
    LookBack,
    ChangeRooms,
    ComeBack,
}

impl Deed {
    /// Of 100: how often each is done.
    const MIX: [(u32, Self); 4] =
        [(80, Self::Say), (10, Self::LookBack), (6, Self::ChangeRooms), (4, Self::ComeBack)];

    fn draw(die: &mut StdRng) -> Self {
        let mut at = die.random_range(0..100);
        for (share, deed) in Self::MIX {
            if at < share {
                return deed;
            }
            at -= share;
        }
        Self::Say
    }
}

/// What everybody saw.
#[derive(Default)]
struct Seen {
    timeline: Timeline,
    acknowledged: u64,
    delivered: u64,
    duplicated: u64,
    holes: u64,
    discontinuities: u64,
    failed: u64,
    examples: Vec<String>,
    ack_us: Vec<u64>,
    join_us: Vec<u64>,
    history_us: Vec<u64>,
    lag_us: Option<hdrhistogram::Histogram<u64>>,
}

impl Seen {
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

/// Runs it.
pub(crate) async fn run(args: ChatArgs) -> Result<Report, ProcfsError> {
    let mut monitor = ServerMonitor::begin(&args.monitor)?;
    let mut usage = GeneratorUsage::new();
    usage.start();
    let seen = Arc::new(Mutex::new(Seen { lag_us: Some(lag_histogram()), ..Seen::default() }));
    let began = Instant::now();
    let end = began + args.duration;
    let mut people = JoinSet::new();
    for number in 0..args.people {
        people.spawn(Person::new(number, &args, seen.clone(), began).live(end));
    }
    let over = sleep_until(end);
    let is_interrupted = Progress::new().until(over, |show| show(&mut seen.lock().timeline)).await;
    usage.stop();
    let talked = began.elapsed();
    let (open, done) = {
        let seen = seen.lock();
        (seen.timeline.open(), seen.delivered)
    };
    monitor
        .end_phase(ScenarioPhase::Traffic, &PhaseTotals { open, done, acknowledged: Vec::new() });
    people.shutdown().await;
    let mut seen = std::mem::take(&mut *seen.lock());
    let seconds = seen.timeline.seconds();
    let messages = MessageReport {
        members: args.people,
        acknowledged: seen.acknowledged,
        delivered: seen.delivered,
        duplicated: seen.duplicated,
        holes: seen.holes,
        signalled_discontinuities: seen.discontinuities,
        sends_refused: seen.failed,
        examples: seen.examples,
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
            lag_p99_us: seen.lag_us.map_or(0, |lags| lags.value_at_quantile(0.99)),
            memory_per_connection_bytes: None,
        },
        seed: Some(args.seed),
        steps: vec![
            step("messages to their ack", seen.ack_us),
            step("rooms joined", seen.join_us),
            step("looks at the history", seen.history_us),
        ],
        messages: Some(messages.with_latency(&latencies, talked, &args.bounds)),
        seconds,
        interrupted: is_interrupted,
        ..Report::of("chat")
    };
    (report.servers, report.gauges) = monitor.finish();
    report.judge(&args.bounds);
    Ok(report)
}

/// Somebody.
struct Person {
    number: usize,
    args: ChatArgs,
    seen: Arc<Mutex<Seen>>,
    die: StdRng,
    rooms: Vec<RoomId>,
    due: Instant,
    alarm: Alarm,
}

impl Person {
    fn new(number: usize, args: &ChatArgs, seen: Arc<Mutex<Seen>>, began: Instant) -> Self {
        let mut die = StdRng::seed_from_u64(args.seed ^ (number as u64) << 20);
        // They come within the time that they pause, not all at once.
        let due = began + args.think.mul_f64(die.random_range(0.0..1.0));
        Self { number, args: args.clone(), seen, die, rooms: Vec::new(), due, alarm: Alarm::new() }
    }

    /// Comes, and does one thing after the other until the end.
    async fn live(mut self, end: Instant) {
        sleep_until(self.due).await;
        while Instant::now() < end {
            let urls = &self.args.url;
            let url = urls[self.number % urls.len()].clone();
            let options = ConnectOptions::new(url).user(format!("chat-{}", self.number));
            let settings = ClientOptions { urls: urls.clone(), ..ClientOptions::default() };
            let (client, events) = Client::start(options, settings);
            let listener = listen(events, self.seen.clone());
            // Both arms are cancel-safe enough: when one is over the other is of no use.
            tokio::select! {
                () = self.visit(&client, end) => {}
                () = listener => {}
            }
            client.close().await;
        }
    }

    /// What is done on one connection.
    async fn visit(&mut self, client: &Client, end: Instant) {
        if self.rooms.is_empty() {
            let count = self.die.random_range(1..=3);
            self.rooms = (0..count).map(|_| self.any_room()).collect();
            self.rooms.sort();
            self.rooms.dedup();
        }
        for room in self.rooms.clone() {
            self.join(client, &room).await;
        }
        loop {
            // Pauses as of people who do not know of each other.
            let pause = self.args.think.mul_f64(-self.die.random_range(f64::EPSILON..1.0).ln());
            self.due = self.due.max(Instant::now()) + pause;
            self.alarm.until(self.due.min(end)).await;
            if Instant::now() >= end {
                return;
            }
            let late = self.due.elapsed().as_micros() as u64;
            if let Some(lags) = &mut self.seen.lock().lag_us {
                lags.saturating_record(late);
            }
            let at = self.die.random_range(0..self.rooms.len());
            let room = self.rooms[at].clone();
            match Deed::draw(&mut self.die) {
                Deed::Say => self.say(client, &room).await,
                Deed::LookBack => {
                    let page = client.history(&room, HistoryRange::Newest, HISTORY);
                    let page = timeout(ANSWER_MAX, page).await;
                    self.answered(page, "history", |seen| &mut seen.history_us);
                }
                Deed::ChangeRooms => {
                    let left = timeout(ANSWER_MAX, client.leave(&room)).await;
                    self.answered(left, "leave", |seen| &mut seen.join_us);
                    let other = self.any_room();
                    if !self.rooms.contains(&other) {
                        self.rooms[at] = other;
                    }
                    self.join(client, &self.rooms[at].clone()).await;
                }
                Deed::ComeBack => return,
            }
        }
    }

    async fn say(&mut self, client: &Client, room: &RoomId) {
        let length = LENGTHS[self.die.random_range(0..LENGTHS.len())];
        let due_ns = clock::now_ns() - self.due.elapsed().as_nanos() as u64;
        let timestamp = SendTimestamp { sender: self.number as u32, due_ns };
        let sent = timeout(ANSWER_MAX, client.send(room, timestamp.content(length))).await;
        if matches!(sent, Ok(Ok(_))) {
            let mut seen = self.seen.lock();
            seen.acknowledged += 1;
            seen.timeline.acknowledged(Instant::now());
        }
        self.answered(sent, "send", |seen| &mut seen.ack_us);
    }

    async fn join(&mut self, client: &Client, room: &RoomId) {
        let joined = timeout(ANSWER_MAX, client.join(room, StartFrom::History(HISTORY))).await;
        self.answered(joined, "join", |seen| &mut seen.join_us);
    }

    /// Notes how long an answer took, from when it was to be asked for.
    fn answered<T, E: std::fmt::Display>(
        &self,
        answer: Result<Result<T, E>, tokio::time::error::Elapsed>,
        what: &str,
        times: impl FnOnce(&mut Seen) -> &mut Vec<u64>,
    ) {
        let mut seen = self.seen.lock();
        match answer {
            Ok(Ok(_)) => times(&mut seen).push(self.due.elapsed().as_micros() as u64),
            Ok(Err(error)) => seen.failed(what, &error),
            Err(late) => seen.failed(what, &late),
        }
    }

    fn any_room(&mut self) -> RoomId {
        // Some rooms are larger than others: the less of two.
        let rooms = self.args.rooms;
        let room = self.die.random_range(0..rooms).min(self.die.random_range(0..rooms));
        format!("chat-{room}").parse().expect("a name")
    }
}

/// Takes what happens to a client.
async fn listen(mut events: mpsc::Receiver<ClientEvent>, seen: Arc<Mutex<Seen>>) {
    let mut is_connected = false;
    while let Some(event) = events.recv().await {
        let now = Instant::now();
        let mut seen = seen.lock();
        match event {
            ClientEvent::Connected { .. } => {
                is_connected = true;
                seen.timeline.connected(now);
            }
            ClientEvent::Disconnected { .. } if std::mem::take(&mut is_connected) => {
                seen.timeline.ended(now);
            }
            ClientEvent::Message { message, .. } if !message.replay => {
                seen.delivered += 1;
                let content = message.content.as_str().unwrap_or_default();
                let timestamp = SendTimestamp::find(content.as_bytes());
                let late =
                    timestamp.map(|timestamp| clock::now_ns().saturating_sub(timestamp.due_ns));
                seen.timeline.delivered(now, late.map(Duration::from_nanos));
            }
            // What comes again behind a break was announced with it.
            ClientEvent::Duplicate { earlier: None, room, position, .. } => {
                seen.duplicated += 1;
                seen.example(|| format!("{room}: {position} again"));
            }
            ClientEvent::Gap { room, expected, got } => {
                seen.holes += 1;
                seen.example(|| format!("{room}: {got} instead of {expected:?}"));
            }
            ClientEvent::NotRecovered { .. } => seen.discontinuities += 1,
            ClientEvent::Reset(reset) if reset.room.is_some() => seen.discontinuities += 1,
            ClientEvent::Error(refusal) => seen.failed("refused", &refusal.code.as_str()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mix_is_of_a_hundred_and_each_is_drawn() {
        assert_eq!(Deed::MIX.iter().map(|(share, _)| share).sum::<u32>(), 100);
        let mut die = StdRng::seed_from_u64(1);
        let drawn: Vec<Deed> = (0..1_000).map(|_| Deed::draw(&mut die)).collect();
        for (share, deed) in Deed::MIX {
            let count = drawn.iter().filter(|drawn| **drawn == deed).count() as u32;
            assert!(count.abs_diff(share * 10) < 40, "{deed:?}: {count}");
        }
    }
}
