//! Command-line arguments of clap, and the values that have a syntax of their own (rate, address
//! range, URL).
//!
//! Pure. Invalid values are rejected here, with an error that names a valid form.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::virtual_users::share::WorkerShare;

/// Load generator for Skein and anything that speaks `chat.v1`.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// The subcommand to run.
    #[command(subcommand)]
    pub(crate) command: LoadCommand,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum LoadCommand {
    /// Opens many connections at a given rate, holds them, and reports the outcome.
    Connect(ConnectArgs),
    /// Drops all connections at once and reconnects all of them at once, repeatedly.
    Storm(StormArgs),
    /// One publisher and one room of many members.
    Fanout(FanoutArgs),
    /// Many rooms in which every member sends.
    Rooms(RoomsArgs),
    /// Many rooms in which some members do not read.
    Slow(SlowArgs),
    /// Finds the highest rate at which p99 stays under a bound.
    Sweep(SweepArgs),
    /// Users who connect, send, pause, read the history and disconnect.
    Chat(ChatArgs),
    /// Members of rooms send at a rate; every message is accounted for.
    Ledger(LedgerArgs),
    /// As `ledger`, against a cluster into which faults are injected.
    Chaos(ChaosArgs),
    /// As `ledger`, against a local cluster all of whose gateways are restarted, one after the other,
    /// again and again; counts the moves of clients.
    Deploy(DeployArgs),
    /// As `ledger`, against a local cluster to which gateways are added; counts connections until
    /// they are even.
    Scale(ScaleArgs),
    /// Attacks a gateway while legitimate clients use it and a second one, and judges the effect on
    /// them.
    Abuse(AbuseArgs),
    /// Compares two reports of --json.
    Compare(CompareArgs),
    /// Measures the gateway beside a baseline and a naive chat, and prints a table: `make bench`.
    Bench(BenchArgs),
}

/// Upper bound of the requested connections.
pub(crate) const CONNECTIONS_MAX: u32 = 1_000_000;
/// Upper bound of the worker processes.
const PROCESSES_MAX: i64 = 64;
/// Upper bound of a hold.
const HOLD_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Upper bound of a timeout.
const TIMEOUT_MAX: Duration = Duration::from_secs(10 * 60);

/// How connections are opened.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct OpenArgs {
    /// URL to connect to.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    pub(crate) url: ServerUrl,
    /// Connections to open per second; each opens on time whether or not earlier ones succeeded.
    #[arg(long, default_value = "500/s")]
    pub(crate) ramp: ArrivalRate,
    /// Time limit of one connection, from TCP connect to `connected` (and `joined`).
    #[arg(long, default_value = "10s", value_parser = timeout)]
    pub(crate) timeout: Duration,
    /// Prefix of user names: connection 7 is user `<prefix>7` (anonymous mode).
    #[arg(long, default_value = "load-")]
    pub(crate) user_prefix: String,
    /// Token for all connections, which then belong to one user.
    #[arg(long)]
    pub(crate) token: Option<String>,
    /// Source addresses, such as 127.0.0.1-127.0.0.4; each has its own ports.
    #[arg(long)]
    pub(crate) sources: Option<SourceAddresses>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// How `wss://` connections verify the server. By default the certificate must be signed by an
/// authority that Mozilla trusts.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsArgs {
    /// PEM file with certificates to trust instead, such as a self-signed one.
    #[arg(long)]
    pub(crate) ca: Option<PathBuf>,
    /// Accept any certificate, for a test.
    #[arg(long, conflicts_with = "ca")]
    pub(crate) insecure: bool,
}

/// Server processes and metrics pages to observe during the run.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Servers")]
pub(crate) struct MonitorArgs {
    /// Process ids of servers on this machine whose memory and CPU to report.
    #[arg(long, num_args = 1..)]
    pub(crate) pid: Vec<u32>,
    /// Metrics pages whose gauges to report, such as http://127.0.0.1:9090/metrics.
    #[arg(long, num_args = 1..)]
    pub(crate) metrics: Vec<String>,
}

/// Bounds that the result must keep.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Thresholds")]
pub(crate) struct Thresholds {
    /// Latency above which a delivery counts as late.
    #[arg(long, default_value = "100ms", value_parser = timeout)]
    pub(crate) late_after: Duration,
    /// Highest share of late deliveries, in percent.
    #[arg(long, value_parser = percent)]
    pub(crate) late_max_percent: Option<f64>,
    /// Highest p99 of the latency.
    #[arg(long, value_parser = timeout)]
    pub(crate) p99_max: Option<Duration>,
}

/// Formats of the result.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Report")]
pub(crate) struct OutputArgs {
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write the report as an HTML page with plots to this file.
    #[arg(long)]
    pub(crate) html: Option<PathBuf>,
}

/// Options that all scenarios of virtual users share.
#[derive(Clone, Debug, Args)]
pub(crate) struct CommonArgs {
    #[command(flatten)]
    pub(crate) open: OpenArgs,
    #[command(flatten)]
    pub(crate) monitor: MonitorArgs,
    #[command(flatten)]
    pub(crate) thresholds: Thresholds,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Number of worker processes.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Number of processes among which the connections are divided.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=PROCESSES_MAX))]
    pub(crate) processes: u32,
    /// Share of the connections that this worker opens, as `INDEX/COUNT`.
    #[arg(long, hide = true)]
    pub(crate) worker: Option<WorkerShare>,
}

impl ProcessArgs {
    /// A single process.
    pub(crate) const SINGLE: Self = Self { processes: 1, worker: None };
}

/// Number and size of rooms.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct SizeArgs {
    /// Number of rooms.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rooms: u32,
    /// Members of each room.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) members: u32,
}

impl SizeArgs {
    /// Number of connections: rooms times members.
    pub(crate) fn connections(self) -> u32 {
        self.rooms * self.members
    }
}

/// Messages to send.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TrafficArgs {
    /// Messages per second of all senders together; each is sent when it is due, whatever became of
    /// earlier ones.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// How long messages are sent.
    #[arg(long, default_value = "10s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// Size of a message's content, bytes.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
}

/// Options of `loadtest connect`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConnectArgs {
    /// Number of connections to open.
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) connections: u32,
    /// How long to hold the connections after all are open or have failed.
    #[arg(long, default_value = "10s", value_parser = hold)]
    pub(crate) hold: Duration,
    /// Room that every connection joins.
    #[arg(long, conflicts_with = "rooms")]
    pub(crate) room: Option<skein_protocol::ids::RoomId>,
    /// Number of rooms, `load-0` and up, over which the connections are spread; each joins one.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) rooms: Option<u32>,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest storm`.
#[derive(Clone, Debug, Args)]
pub(crate) struct StormArgs {
    /// Number of connections.
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) connections: u32,
    /// Number of rooms, `load-0` and up, over which the connections are spread; each joins one.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) rooms: u32,
    /// Number of rounds, each of which drops all connections.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    /// Connections that return per second; by default as many as this tool can open.
    #[arg(long)]
    pub(crate) back: Option<ArrivalRate>,
    /// Pause between two rounds.
    #[arg(long, default_value = "2s", value_parser = hold)]
    pub(crate) pause: Duration,
    /// Time limit for all connections to return.
    #[arg(long, default_value = "30s", value_parser = timeout)]
    pub(crate) back_max: Duration,
    /// Bytes that a server may retain per closed connection.
    #[arg(long, default_value_t = 50)]
    pub(crate) leak_max: u32,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest fanout`.
#[derive(Clone, Debug, Args)]
pub(crate) struct FanoutArgs {
    /// Number of members; the first is the publisher.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) members: u32,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest rooms`.
#[derive(Clone, Debug, Args)]
pub(crate) struct RoomsArgs {
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest slow`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SlowArgs {
    /// Percentage of each room that does not read until the end.
    #[arg(long, default_value = "10", value_parser = percent)]
    pub(crate) stalled_percent: f64,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest sweep`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SweepArgs {
    /// First rate, doubled until a bound is exceeded.
    #[arg(long, default_value = "100/s")]
    pub(crate) from: ArrivalRate,
    /// Highest p99 of the latency.
    #[arg(long = "bound", default_value = "50ms", value_parser = timeout)]
    pub(crate) bound: Duration,
    /// How long each rate is tested.
    #[arg(long, default_value = "5s", value_parser = hold)]
    pub(crate) step: Duration,
    /// Size of a message's content, bytes.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Options of `loadtest chat`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChatArgs {
    /// URLs to connect to; users are spread over all of them.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws", value_parser = client_url)]
    pub(crate) url: Vec<String>,
    /// Number of users.
    #[arg(long, alias = "people", default_value_t = 100, value_parser = count)]
    pub(crate) users: usize,
    /// Number of rooms; each user is in one to three of them.
    #[arg(long, default_value_t = 20, value_parser = count)]
    pub(crate) rooms: usize,
    /// Mean think time between two actions of a user.
    #[arg(long, default_value = "5s", value_parser = hold)]
    pub(crate) think: Duration,
    /// How long the users are active.
    #[arg(long, default_value = "60s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// Seed of the pauses and actions of all users.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    #[command(flatten)]
    pub(crate) monitor: MonitorArgs,
    #[command(flatten)]
    pub(crate) thresholds: Thresholds,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Load of a ledger run.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// Number of rooms.
    #[arg(long, default_value_t = 10, value_parser = count)]
    pub(crate) rooms: usize,
    /// Members of each room.
    #[arg(long, default_value_t = 10, value_parser = count)]
    pub(crate) members: usize,
    /// Messages per second of all members together; each is sent when it is due, whatever became of
    /// earlier ones.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// How long messages are sent.
    #[arg(long, default_value = "60s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// Size of a message's content, bytes.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
    /// Silence after which a member gives up its connection.
    #[arg(long, alias = "patience", default_value = "4s", value_parser = timeout)]
    pub(crate) idle_timeout: Duration,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    #[command(flatten)]
    pub(crate) thresholds: Thresholds,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Options of `loadtest ledger`.
#[derive(Clone, Debug, Args)]
pub(crate) struct LedgerArgs {
    /// URLs to connect to; members are spread over all of them and reconnect to the next one.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws", value_parser = client_url)]
    pub(crate) url: Vec<String>,
    #[command(flatten)]
    pub(crate) monitor: MonitorArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// Options of `loadtest chaos`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChaosArgs {
    /// Seed of the fault plan; the same seed gives the same plan.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Number of gateways.
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub(crate) nodes: usize,
    /// The gateway program.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// The script that renders nginx' configuration.
    #[arg(long, default_value = "nginx/render.sh")]
    pub(crate) nginx_render: PathBuf,
    #[command(flatten)]
    pub(crate) external: ExternalArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// How gateways are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeployScheme {
    /// A new gateway starts at a spare address before an old one stops.
    Surge,
    /// Each gateway stops, and starts again at its address.
    InPlace,
}

/// Options of `loadtest deploy`. The run ends with the last deploy, whatever `--duration` says.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeployArgs {
    /// Number of gateways.
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub(crate) nodes: usize,
    /// Number of deploys, each of which restarts all gateways.
    #[arg(long, default_value_t = 1, value_parser = count)]
    pub(crate) deploys: usize,
    /// How gateways are replaced.
    #[arg(long, value_enum, default_value = "surge")]
    pub(crate) scheme: DeployScheme,
    /// The gateway program.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// `drain.restart_time` of the gateways: how long clients wait for one that restarts in place.
    #[arg(long, default_value = "2s", value_parser = timeout)]
    pub(crate) restart_time: Duration,
    /// The gateway program of another version: the cluster starts with it, and each second deploy
    /// returns to it.
    #[arg(long)]
    pub(crate) previous: Option<PathBuf>,
    /// The script that renders nginx' configuration.
    #[arg(long, default_value = "nginx/render.sh")]
    pub(crate) nginx_render: PathBuf,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// Options of `loadtest scale`. The run ends when the connections are even, at the latest after
/// `--duration`.
#[derive(Clone, Debug, Args)]
pub(crate) struct ScaleArgs {
    /// Number of gateways at the start.
    #[arg(long, default_value_t = 2, value_parser = count)]
    pub(crate) from: usize,
    /// Number of gateways in the end.
    #[arg(long, default_value_t = 4, value_parser = count)]
    pub(crate) to: usize,
    /// The gateway program.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// The script that renders nginx' configuration.
    #[arg(long, default_value = "nginx/render.sh")]
    pub(crate) nginx_render: PathBuf,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// A running cluster that loadtest did not start. Only faults that need no restart are injected
/// into it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "A cluster that is there")]
pub(crate) struct ExternalArgs {
    /// URL that members connect to through a fault-injecting proxy, instead of a cluster of its
    /// own; may be repeated. The certificate of a wss:// URL must be valid for 127.0.0.1, or
    /// --insecure is needed.
    #[arg(long)]
    pub(crate) url: Vec<ServerUrl>,
    /// Process ids of its gateways on this machine, which are stopped and continued.
    #[arg(long, num_args = 1.., requires = "url")]
    pub(crate) gateway_pid: Vec<u32>,
    /// Address of its Redis, whose client connections are closed.
    #[arg(long, requires = "url")]
    pub(crate) redis: Option<std::net::SocketAddr>,
}

/// Options of `loadtest abuse`.
#[derive(Clone, Debug, Args)]
pub(crate) struct AbuseArgs {
    /// Attacks by name (`echo-pings`) or group (`a`, `A1`); by default the whole catalogue.
    pub(crate) attacks: Vec<String>,
    /// List the catalogue and attack nothing.
    #[arg(long)]
    pub(crate) list: bool,
    /// Duration of each attack, seconds.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(crate) seconds: u32,
    /// Time limit after an attack for memory, keys and descriptors to recover.
    #[arg(long, default_value = "60s", value_parser = timeout)]
    pub(crate) recovery: Duration,
    /// Number of legitimate clients of each of the two gateways, in rooms of ten.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(10..=5_000))]
    pub(crate) clients: u32,
    /// Messages per second that the legitimate clients of each gateway send.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// Excess of the legitimate p99 over the control's that is allowed, if it is more than the
    /// control's p99 itself.
    #[arg(long, default_value = "0s", value_parser = timeout)]
    pub(crate) slack: Duration,
    /// Highest lateness of this tool (p99) for a valid result.
    #[arg(long, default_value = "1ms", value_parser = timeout)]
    pub(crate) lag_max: Duration,
    /// The gateway program, which is started twice.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// Further option of the gateways, as KEY=VALUE; may be repeated.
    #[arg(long)]
    pub(crate) set: Vec<String>,
    /// `maxmemory` of each Redis, such as 64mb.
    #[arg(long)]
    pub(crate) redis_maxmemory: Option<String>,
    /// Rate of the slow link, as for `tc`.
    #[arg(long, default_value = "96kbit")]
    pub(crate) link_rate: String,
    /// Bytes that the client behind the slow link catches up; a room keeps a thousand messages of 8
    /// KB.
    #[arg(long, default_value_t = 4_000_000, value_parser = clap::value_parser!(u64).range(100_000..=8_000_000))]
    pub(crate) link_bytes: u64,
    /// Time limit for the client behind the slow link to catch up.
    #[arg(long, default_value = "10m", value_parser = timeout)]
    pub(crate) link_patience: Duration,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Options of `loadtest compare`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompareArgs {
    /// The first report.
    pub(crate) first: PathBuf,
    /// The second report.
    pub(crate) second: PathBuf,
}

/// Options of `loadtest bench`.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// Rows to measure; by default all.
    #[arg(value_enum)]
    pub(crate) rows: Vec<RowName>,
    /// Number of rounds; the table shows medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// Duration of one measurement; a warm-up of a quarter of it precedes.
    #[arg(long, default_value = "2s", value_parser = timeout)]
    pub(crate) measured: Duration,
    /// Divisor for connections and messages, for a trial of the bench without valid figures.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) divide_by: u32,
    /// Directory of `gateway`, with the baseline and the naive chat in `examples`.
    #[arg(long, default_value = "target/release")]
    pub(crate) programs: PathBuf,
    /// Another gateway build to compare with, instead of the baseline and the naive chat. Both
    /// builds are measured in turn.
    #[arg(long)]
    pub(crate) previous: Option<PathBuf>,
    /// Also write the table as JSON to this file.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
}

/// Name of a row of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RowName {
    /// One room of 1,000, saturated.
    Fanout,
    /// Rooms of 10 in which every member sends, saturated.
    Rooms,
    /// Rooms of 10, saturated with one message at a time in each room.
    RoomsOne,
    /// Rooms of 10 at 10,000 deliveries a second.
    Paced,
    /// Three nodes and Redis, rooms of 9, 1,000 messages a second.
    Cluster,
    /// Three nodes and Redis, rooms of 9, saturated.
    ClusterSaturated,
    /// Three nodes and Redis, a room of 30, 100 messages a second.
    ClusterLatency,
    /// Memory of a joined and silent connection.
    Idle,
    /// Connecting with a token and joining.
    Connect,
    /// The echo endpoint, one message at a time.
    Echo,
    /// Publishes through one Redis, beside the script alone.
    Redis,
    /// One of three nodes is killed.
    Kill,
}

/// A number of events per second: `500/s`, `500`, `300/m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ArrivalRate {
    per_second: f64,
}

/// The text is not a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rate is a number above 0 and at most 1000000, with /s or /m: 500/s")]
pub(crate) struct InvalidArrivalRate;

impl ArrivalRate {
    /// A rate of `per_second` events per second.
    pub(crate) const fn per_second(per_second: f64) -> Self {
        Self { per_second }
    }

    /// Events per second.
    pub(crate) fn events_per_second(self) -> f64 {
        self.per_second
    }

    /// Time from the start at which event number `index` is due.
    pub(crate) fn due(self, index: u64) -> Duration {
        Duration::from_secs_f64(index as f64 / self.per_second)
    }
}

impl FromStr for ArrivalRate {
    type Err = InvalidArrivalRate;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, seconds) = match text.split_once('/') {
            None | Some((_, "s")) => (text.trim_end_matches("/s"), 1.0),
            Some((number, "m")) => (number, 60.0),
            Some(_) => return Err(InvalidArrivalRate),
        };
        let per_second = number.trim().parse::<f64>().map_err(|_| InvalidArrivalRate)? / seconds;
        // At 1 event per 1,000 s the largest run takes years; below that its times would overflow.
        if (0.001..=1e6).contains(&per_second) {
            Ok(Self { per_second })
        } else {
            Err(InvalidArrivalRate)
        }
    }
}

/// Source addresses, used in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceAddresses {
    first: IpAddr,
    count: u32,
}

/// The text is not an address or a range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sources are an address, or a range of at most 65536 IPv4 addresses: 127.0.0.1-127.0.0.4")]
pub(crate) struct InvalidSourceAddresses;

impl SourceAddresses {
    /// Number of addresses.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// The source address of connection number `index`.
    pub(crate) fn address(&self, index: u32) -> IpAddr {
        match self.first {
            IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + index % self.count).into(),
            one @ IpAddr::V6(_) => one,
        }
    }
}

impl FromStr for SourceAddresses {
    type Err = InvalidSourceAddresses;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((first, last)) = text.split_once('-') else {
            return Ok(Self { first: text.parse().map_err(|_| InvalidSourceAddresses)?, count: 1 });
        };
        let address =
            |text: &str| text.trim().parse::<Ipv4Addr>().map_err(|_| InvalidSourceAddresses);
        let (first, last) = (address(first)?, address(last)?);
        match last.to_bits().checked_sub(first.to_bits()) {
            Some(more @ 0..=0xFFFF) => Ok(Self { first: first.into(), count: more + 1 }),
            Some(_) | None => Err(InvalidSourceAddresses),
        }
    }
}

/// The parts of a server's URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerUrl {
    /// Whether the scheme is `wss`.
    pub(crate) is_tls: bool,
    /// Host and port, for the `Host` header and for the lookup.
    pub(crate) authority: String,
    /// Path and query.
    pub(crate) path: String,
}

/// The text is not a URL that this tool can connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a URL has the form ws://host[:port]/path or wss://host[:port]/path")]
pub(crate) struct InvalidServerUrl;

impl ServerUrl {
    /// The scheme.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.is_tls { "wss" } else { "ws" }
    }

    /// The host, without brackets around an IPv6 address.
    pub(crate) fn host(&self) -> &str {
        let host = self.authority.rsplit_once(':').map_or(&*self.authority, |(host, _)| host);
        host.trim_matches(['[', ']'])
    }

    /// The path with one more query parameter, percent-encoded.
    pub(crate) fn path_with(&self, name: &str, value: &str) -> String {
        /// All but the unreserved characters of RFC 3986.
        const RESERVED: &AsciiSet =
            &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
        let sign = if self.path.contains('?') { '&' } else { '?' };
        let value = utf8_percent_encode(value, RESERVED);
        format!("{}{sign}{name}={value}", self.path)
    }
}

impl FromStr for ServerUrl {
    type Err = InvalidServerUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once("://").ok_or(InvalidServerUrl)?;
        let (is_tls, default_port) = match scheme {
            "ws" => (false, ":80"),
            "wss" => (true, ":443"),
            _ => return Err(InvalidServerUrl),
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let plain = |b: u8| b.is_ascii_graphic() && b != b'#';
        if authority.is_empty() || authority.contains('@') || !rest.bytes().all(plain) {
            return Err(InvalidServerUrl);
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
        let port = if has_port { "" } else { default_port };
        let slash = if path.starts_with('/') { "" } else { "/" };
        let (authority, path) = (format!("{authority}{port}"), format!("{slash}{path}"));
        Ok(Self { is_tls, authority, path })
    }
}

/// Checks a URL that `skein_client` connects to.
fn client_url(text: &str) -> Result<String, InvalidServerUrl> {
    text.parse::<ServerUrl>().map(|_| text.to_owned())
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=10_000) => Ok(count),
        _ => Err("a number from 1 to 10000".to_owned()),
    }
}

fn bytes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(bytes @ 1..=1_000_000) => Ok(bytes),
        _ => Err("a number of bytes from 1 to 1000000".to_owned()),
    }
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').trim().parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("a number from 0 to 100".to_owned()),
    }
}

fn hold(text: &str) -> Result<Duration, String> {
    duration(text, HOLD_MAX)
}

fn timeout(text: &str) -> Result<Duration, String> {
    duration(text, TIMEOUT_MAX)
}

fn duration(text: &str, max: Duration) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= max => Ok(duration),
        Ok(_) => Err(format!("at most {}", humantime::format_duration(max))),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_or_minute() {
        let due = |text: &str| text.parse::<ArrivalRate>().unwrap().due(10).as_millis();
        assert_eq!((due("500/s"), due("500"), due("30/m"), due("0.5/s")), (20, 20, 20_000, 20_000));
        for bad in ["", "0", "-1/s", "5/h", "x/s", "1e9", "NaN", "inf", "/s", "1/s/s"] {
            assert_eq!(bad.parse::<ArrivalRate>(), Err(InvalidArrivalRate), "{bad:?}");
        }
    }

    #[test]
    fn source_addresses_are_used_in_turn() {
        let sources: SourceAddresses = "127.0.0.1-127.0.0.4".parse().unwrap();
        let taken: Vec<String> = (3..6).map(|index| sources.address(index).to_string()).collect();
        assert_eq!(taken, ["127.0.0.4", "127.0.0.1", "127.0.0.2"]);
        assert_eq!("10.0.0.1".parse::<SourceAddresses>().unwrap().count(), 1);
        assert_eq!("::1".parse::<SourceAddresses>().unwrap().address(7).to_string(), "::1");
        assert_eq!("127.0.0.1-127.0.0.1".parse::<SourceAddresses>().unwrap().count(), 1);
        for bad in ["", "x", "127.0.0.4-127.0.0.1", "127.0.0.1-", "0.0.0.0-1.0.0.0", "::1-::2"] {
            assert_eq!(bad.parse::<SourceAddresses>(), Err(InvalidSourceAddresses), "{bad:?}");
        }
    }

    #[test]
    fn server_url_is_split_into_parts() {
        let check = |text: &str, authority: &str, path: &str| {
            let target: ServerUrl = text.parse().unwrap();
            assert_eq!((target.authority.as_str(), target.path.as_str()), (authority, path));
        };
        check("ws://h:1/ws", "h:1", "/ws");
        check("ws://h", "h:80", "/");
        check("ws://h?a=b", "h:80", "/?a=b");
        check("ws://[::1]/ws", "[::1]:80", "/ws");
        check("ws://[::1]:8080/ws", "[::1]:8080", "/ws");
        check("wss://h/ws", "h:443", "/ws");
        check("wss://[::1]:8443/ws", "[::1]:8443", "/ws");
        let host = |text: &str| text.parse::<ServerUrl>().unwrap().host().to_owned();
        assert_eq!((host("wss://h/"), host("wss://[::1]:1/")), ("h".into(), "::1".into()));
        for bad in ["", "h:1", "wss:///", "http://h/", "ws:///", "ws://u@h/", "ws://h/a b"] {
            assert_eq!(bad.parse::<ServerUrl>(), Err(InvalidServerUrl), "{bad:?}");
        }
    }

    #[test]
    fn query_parameter_is_appended_and_encoded() {
        let target: ServerUrl = "ws://h/ws".parse().unwrap();
        let path = target.path_with("user", "a|b");
        assert_eq!(path, "/ws?user=a%7Cb");
        assert_eq!(ServerUrl { path, ..target }.path_with("x", "1"), "/ws?user=a%7Cb&x=1");
    }

    #[test]
    fn invalid_arguments_are_rejected() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let parse = |text: &str| Cli::try_parse_from(text.split(' '));
        let LoadCommand::Connect(args) =
            parse("loadtest connect -n 5 --rooms 2 --pid 1 2 --json").unwrap().command
        else {
            panic!("another command")
        };
        assert_eq!(
            (args.connections, args.rooms, args.common.monitor.pid),
            (5, Some(2), vec![1, 2])
        );
        for bad in [
            "loadtest",
            "loadtest connect",
            "loadtest connect -n 0",
            "loadtest connect -n 1 --room a --rooms 2",
            "loadtest connect -n 1 --room a/b",
            "loadtest connect -n 1 --hold 2days",
            "loadtest connect -n 1 --ca a.pem --insecure",
            "loadtest ledger --url http://h/",
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
