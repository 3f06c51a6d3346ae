//! Legitimate clients of one node: members of rooms who send, newcomers who join, and probes of
//! `/health` and `/ready`. Each of the three has a thread of its own, with real-time priority over
//! the attacker if this process may set it.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use skein_testkit::timeline;
use tokio::{sync::oneshot, time::Instant};

use super::verdict::LegitimateMetrics;
use crate::{
    args::{
        ArrivalRate, CommonArgs, MonitorArgs, OpenArgs, OutputArgs, ServerUrl, SourceAddresses,
        Thresholds, TlsArgs,
    },
    report::connections::{ConnectionCounters, ConnectionReport, LatencySummary},
    scenario::{ScenarioError, ScenarioRun, connect_plan, traffic::Traffic},
    virtual_users::{RoomAssignment, VirtualUsers, share::WorkerShare},
};

/// Time limit of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Newcomers, and probes, per second.
const NEWCOMERS: ArrivalRate = ArrivalRate::per_second(10.0);
const PROBES: ArrivalRate = ArrivalRate::per_second(10.0);
/// Rate at which members connect.
const RAMP: ArrivalRate = ArrivalRate::per_second(400.0);
const CONTENT_BYTES: usize = 128;
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Number of members and rooms, and their rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClientsSize {
    /// Number of members.
    pub(crate) members: u32,
    /// Number of rooms.
    pub(crate) rooms: u32,
    /// Messages per second of all members together.
    pub(crate) rate: ArrivalRate,
}

/// A command to the thread of the members.
enum ClientCommand {
    /// Open disconnected members, and reply with the number of open ones.
    Open(oneshot::Sender<u64>),
    /// Send for this long, and reply with the metrics.
    Measure(Duration, oneshot::Sender<Result<LegitimateMetrics, ScenarioError>>),
}

/// The legitimate clients of one node.
pub(crate) struct LegitimateClients {
    commands: Option<mpsc::SyncSender<ClientCommand>>,
    thread: Option<JoinHandle<()>>,
    size: ClientsSize,
}

impl LegitimateClients {
    /// Starts the thread and opens the members.
    pub(crate) fn start(
        address: SocketAddr,
        size: ClientsSize,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, ScenarioError> {
        let (commands, command_rx) = mpsc::sync_channel(1);
        let (opened, is_open) = mpsc::sync_channel(1);
        let thread =
            std::thread::Builder::new().name("legitimate".to_owned()).spawn(move || {
                run_real_time();
                let run = ScenarioRun::open(
                    &common_args(address, "127.2.0.1-127.2.0.16", "legitimate-"),
                    None,
                    RoomAssignment::RoundRobin(size.rooms),
                    size.members,
                    true,
                    &stop,
                );
                match run {
                    Ok(mut run) => {
                        // The receiver is waiting for it.
                        let _ = opened.send(Ok(()));
                        run_commands(&mut run, address, size, &command_rx, &stop);
                    }
                    Err(error) => drop(opened.send(Err(error))),
                }
            })?;
        is_open.recv().map_err(|_| ScenarioError::Panic)??;
        Ok(Self { commands: Some(commands), thread: Some(thread), size })
    }

    /// Opens disconnected members; `false` if not all of them could join.
    pub(crate) async fn open(&self) -> bool {
        let (reply, opened) = oneshot::channel();
        self.command(ClientCommand::Open(reply));
        opened.await.is_ok_and(|open| open == u64::from(self.size.members))
    }

    /// Lets members send, newcomers join and probes run for `duration`.
    pub(crate) async fn measure(
        &self,
        duration: Duration,
    ) -> Result<LegitimateMetrics, ScenarioError> {
        let (reply, measured) = oneshot::channel();
        self.command(ClientCommand::Measure(duration, reply));
        measured.await.map_err(|_| ScenarioError::Panic)?
    }

    fn command(&self, command: ClientCommand) {
        // The channel has capacity: one command is pending at a time. If the thread has ended, no
        // reply arrives.
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }
}

impl Drop for LegitimateClients {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // The thread has no result.
            let _ = thread.join();
        }
    }
}

/// Gives this thread real-time priority (`SCHED_FIFO`), above all over the attacker. `nice` orders
/// threads within a session only. Without the permission times are later, and the report includes
/// the lateness.
fn run_real_time() {
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    let mut chrt = Command::new("chrt");
    chrt.args(["--fifo", "--pid", "1", &own]).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = chrt.status();
}

fn common_args(address: SocketAddr, sources: &str, user_prefix: &str) -> CommonArgs {
    let target = |authority: String| ServerUrl { is_tls: false, authority, path: "/ws".to_owned() };
    CommonArgs {
        open: OpenArgs {
            url: target(address.to_string()),
            ramp: RAMP,
            timeout: RESPONSE_TIMEOUT,
            user_prefix: user_prefix.to_owned(),
            token: None,
            sources: sources.parse::<SourceAddresses>().ok(),
            tls: TlsArgs::default(),
        },
        monitor: MonitorArgs::default(),
        thresholds: Thresholds::default(),
        output: OutputArgs::default(),
    }
}

fn run_commands(
    run: &mut ScenarioRun,
    address: SocketAddr,
    size: ClientsSize,
    command_rx: &mpsc::Receiver<ClientCommand>,
    stop: &Arc<AtomicBool>,
) {
    loop {
        match command_rx.try_recv() {
            Ok(ClientCommand::Open(reply)) => {
                // The number of open members shows failures.
                let _ = run.users.open_all(Some(RAMP));
                let _ = reply.send(run.users.open_count());
            }
            Ok(ClientCommand::Measure(duration, reply)) => {
                let _ = reply.send(measure(run, address, size, duration, stop));
            }
            Err(mpsc::TryRecvError::Empty) => {
                // Pings are answered meanwhile.
                if run.users.step(Instant::now() + POLL_INTERVAL).is_err() {
                    return;
                }
            }
            Err(mpsc::TryRecvError::Disconnected) => return run.users.close_all(),
        }
    }
}

fn measure(
    run: &mut ScenarioRun,
    address: SocketAddr,
    size: ClientsSize,
    duration: Duration,
    stop: &Arc<AtomicBool>,
) -> Result<LegitimateMetrics, ScenarioError> {
    run.users.start_measuring();
    run.users.connections = ConnectionCounters::default();
    let newcomers = std::thread::Builder::new().name("newcomers".to_owned()).spawn({
        let stop = stop.clone();
        move || newcomers(address, size.rooms, duration, stop)
    })?;
    let probes = std::thread::Builder::new().name("probes".to_owned()).spawn({
        let stop = stop.clone();
        move || probes(address, duration, &stop)
    })?;
    let traffic =
        Traffic { senders: size.members.into(), rate: size.rate, duration, bytes: CONTENT_BYTES };
    run.send_traffic(traffic)?;
    let (joined, requested) = newcomers.join().map_err(|_| ScenarioError::Panic)??;
    let probed = probes.join().map_err(|_| ScenarioError::Panic)?;
    let seconds = run.users.metrics.seconds();
    let (latency_us, seen) = (timeline::histogram(&seconds), &run.users.metrics);
    let ms = |share: f64| latency_us.value_at_quantile(share) as f64 / 1e3;
    let ended = ConnectionReport::of(run.users.connections.clone(), 0, duration).closed_while_held;
    let counters = &seen.counters;
    let ends = ended.iter().map(|(reason, count)| format!("{count} closed: {reason}"));
    let joined = ConnectionReport::of(joined, requested, duration);
    let rejected =
        joined.rejected.iter().map(|(status, count)| format!("{count} newcomers: HTTP {status}"));
    let failed = joined.failed.iter().map(|(reason, count)| format!("{count} newcomers: {reason}"));
    Ok(LegitimateMetrics {
        sent: counters.sent,
        p50_ms: ms(0.5),
        p99_ms: ms(0.99),
        unanswered: counters.unanswered,
        rejected: counters.rejected,
        lost: counters.lost,
        ended: ended.values().sum(),
        newcomers_failed: requested.saturating_sub(joined.opened),
        newcomers_p99_ms: joined.joined_ms.map_or(0.0, |times| times.p99),
        probes_failed: probed.failed,
        probes_p99_ms: LatencySummary::of(probed.times_us).map_or(0.0, |times| times.p99),
        lag_p99_us: seen.lag_us.value_at_quantile(0.99),
        examples: ends
            .chain(rejected)
            .chain(failed)
            .chain(probed.example)
            .chain(counters.examples.iter().take(3).cloned())
            .collect(),
    })
}

/// Connects newcomers, which join a room, each when it is due.
fn newcomers(
    address: SocketAddr,
    rooms: u32,
    duration: Duration,
    stop: Arc<AtomicBool>,
) -> Result<(ConnectionCounters, u64), ScenarioError> {
    run_real_time();
    let requested = (duration.as_secs_f64() * NEWCOMERS.events_per_second()).ceil() as u32;
    let args = common_args(address, "127.2.1.1-127.2.1.16", "newcomer-");
    let plan =
        connect_plan(&args.open, WorkerShare::ALL, RoomAssignment::RoundRobin(rooms), requested)?;
    let mut users = VirtualUsers::new(plan, false, stop)?;
    users.open_all(Some(NEWCOMERS))?;
    users.close_all();
    Ok((users.connections.clone(), requested.into()))
}

/// Results of the probes.
#[derive(Default)]
struct ProbeResults {
    failed: u64,
    times_us: Vec<u64>,
    example: Option<String>,
}

/// Requests `/health` and `/ready` in turn, on a new connection each time.
fn probes(address: SocketAddr, duration: Duration, stop: &AtomicBool) -> ProbeResults {
    run_real_time();
    let (began, mut probed) = (Instant::now(), ProbeResults::default());
    for number in 0.. {
        let due = began + PROBES.due(number);
        if due >= began + duration || stop.load(Ordering::Relaxed) {
            break;
        }
        let wait = due.saturating_duration_since(Instant::now());
        #[expect(clippy::disallowed_methods, reason = "the probes have a thread of their own")]
        std::thread::sleep(wait);
        let path = if number % 2 == 0 { "/health" } else { "/ready" };
        match http_status(address, path) {
            Ok(200) => probed.times_us.push(due.elapsed().as_micros() as u64),
            Ok(status) => {
                probed.failed += 1;
                probed.example.get_or_insert(format!("{path}: HTTP {status}"));
            }
            Err(error) => {
                probed.failed += 1;
                probed.example.get_or_insert(format!("{path}: {}", error.kind()));
            }
        }
    }
    probed
}

/// Requests a path and returns the status.
fn http_status(address: SocketAddr, path: &str) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, RESPONSE_TIMEOUT)?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    let status = head
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|status| std::str::from_utf8(status).ok()?.parse().ok());
    status.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
