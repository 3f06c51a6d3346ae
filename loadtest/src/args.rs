//! What is given on the command line: clap's arguments, and the values that have a form of their
//! own (a rate, a range of addresses, a URL).
//!
//! Pure. Whatever cannot work is refused here, in words that say what would.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};

use crate::{bench::RowName, virtual_users::workers::WorkerShare};

/// Load generator for Skein and anything that speaks `chat.v1`.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: LoadCommand,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum LoadCommand {
    /// Opens many connections at a given rate, holds them, and reports what happened.
    Connect(ConnectArgs),
    /// Cuts all connections at once, and has them come back at once, again and again.
    Storm(StormArgs),
    /// One publisher, and a room of many members.
    Fanout(FanoutArgs),
    /// Many rooms in which everybody talks.
    Rooms(RoomsArgs),
    /// The same, while some members do not read.
    Slow(SlowArgs),
    /// Finds the highest rate at which p99 stays under a bound.
    Sweep(SweepArgs),
    /// People who come, talk, pause, look at the history and go.
    Chat(ChatArgs),
    /// Members of rooms talk at a rate; every message is accounted for.
    Ledger(LedgerArgs),
    /// The same against a cluster of its own in which things go wrong.
    Chaos(ChaosArgs),
    /// Attacks a gateway while legitimate clients use it and a second one, and judges what they notice.
    Abuse(AbuseArgs),
    /// Lays two reports of --json beside each other.
    Compare(CompareArgs),
    /// Measures the gateway beside a baseline and a naive chat, and prints a table: `make bench`.
    Bench(BenchArgs),
}

/// The most connections that may be asked for.
pub(crate) const CONNECTIONS_MAX: u32 = 1_000_000;
/// The most processes.
const PROCESSES_MAX: i64 = 64;
/// The longest hold.
const HOLD_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest time to give a connection.
const TIMEOUT_MAX: Duration = Duration::from_secs(10 * 60);

/// How connections are opened.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct OpenArgs {
    /// Where to connect.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    pub(crate) url: ServerUrl,
    /// How many to open per second; they are opened on time whether or not earlier ones succeeded.
    #[arg(long, default_value = "500/s")]
    pub(crate) ramp: ArrivalRate,
    /// How long one connection may take, from TCP to `connected` (and `joined`).
    #[arg(long, default_value = "10s", value_parser = timeout)]
    pub(crate) timeout: Duration,
    /// Connection 7 is user `<prefix>7` (anonymous mode).
    #[arg(long, default_value = "load-")]
    pub(crate) user_prefix: String,
    /// A token for all connections; they are then one user's.
    #[arg(long)]
    pub(crate) token: Option<String>,
    /// Addresses to connect from, such as 127.0.0.1-127.0.0.4: each has its own ports.
    #[arg(long)]
    pub(crate) sources: Option<SourceAddresses>,
}

/// What to look at while it runs.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Servers")]
pub(crate) struct MonitorArgs {
    /// Server processes on this machine whose memory and CPU to report.
    #[arg(long, num_args = 1..)]
    pub(crate) pid: Vec<u32>,
    /// Pages of metrics whose gauges to report, such as http://127.0.0.1:9090/metrics.
    #[arg(long, num_args = 1..)]
    pub(crate) metrics: Vec<String>,
}

/// What is asked of the servers.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Thresholds")]
pub(crate) struct Thresholds {
    /// A delivery that takes longer than this is late.
    #[arg(long, default_value = "100ms", value_parser = timeout)]
    pub(crate) late_after: Duration,
    /// How many percent of deliveries may be late.
    #[arg(long, value_parser = percent)]
    pub(crate) late_max_percent: Option<f64>,
    /// What the p99 of the latency may be.
    #[arg(long, value_parser = timeout)]
    pub(crate) p99_max: Option<Duration>,
}

/// How the result is told.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Report")]
pub(crate) struct OutputArgs {
    /// Report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Writes the report as a page with plots into this file as well.
    #[arg(long)]
    pub(crate) html: Option<PathBuf>,
}

/// What all scenarios of raw connections have in common.
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

/// How many processes do it.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Shares the connections out to so many processes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=PROCESSES_MAX))]
    pub(crate) processes: u32,
    /// Which of them this is.
    #[arg(long, hide = true)]
    pub(crate) worker: Option<WorkerShare>,
}

impl ProcessArgs {
    /// This process alone.
    pub(crate) const SINGLE: Self = Self { processes: 1, worker: None };
}

/// How many rooms, and how large.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct SizeArgs {
    /// How many rooms.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) rooms: u32,
    /// How many members each has.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) members: u32,
}

impl SizeArgs {
    /// How many connections that is.
    pub(crate) fn connections(self) -> u32 {
        self.rooms * self.members
    }
}

/// Who says how much.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TrafficArgs {
    /// How many messages all of them send; each is due at a set time, whatever became of earlier
    /// ones.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// How long they talk.
    #[arg(long, default_value = "10s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// The size of a message's content.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
}

/// Opens many connections at a given rate, holds them, and reports what happened.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConnectArgs {
    /// How many connections to open.
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) connections: u32,
    /// How long to hold them once all are open or have failed.
    #[arg(long, default_value = "10s", value_parser = hold)]
    pub(crate) hold: Duration,
    /// Every connection joins this room.
    #[arg(long, conflicts_with = "rooms")]
    pub(crate) room: Option<skein_protocol::ids::RoomId>,
    /// The connections are dealt out to so many rooms, `load-0` and on; each joins one.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) rooms: Option<u32>,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Cuts all connections at once, and has them come back at once, again and again.
#[derive(Clone, Debug, Args)]
pub(crate) struct StormArgs {
    /// How many connections.
    #[arg(long, short = 'n', value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) connections: u32,
    /// They are dealt out to so many rooms, `load-0` and on; each joins one.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) rooms: u32,
    /// How often they are cut.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) rounds: u32,
    /// How many come back per second; as many as this tool can open where it is not given.
    #[arg(long)]
    pub(crate) back: Option<ArrivalRate>,
    /// How long they are left alone between two rounds.
    #[arg(long, default_value = "2s", value_parser = hold)]
    pub(crate) pause: Duration,
    /// How long it may take until all are back.
    #[arg(long, default_value = "30s", value_parser = timeout)]
    pub(crate) back_max: Duration,
    /// How many bytes a server may keep of each connection that is gone.
    #[arg(long, default_value_t = 50)]
    pub(crate) leak_max: u32,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// One publisher, and a room of many members.
#[derive(Clone, Debug, Args)]
pub(crate) struct FanoutArgs {
    /// How many members; the first is the publisher.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    pub(crate) members: u32,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Many rooms in which everybody talks.
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

/// The same, while some members do not read.
#[derive(Clone, Debug, Args)]
pub(crate) struct SlowArgs {
    /// How many percent of each room do not read until the end.
    #[arg(long, default_value = "10", value_parser = percent)]
    pub(crate) stalled_percent: f64,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) traffic: TrafficArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// Finds the highest rate at which p99 stays under a bound.
#[derive(Clone, Debug, Args)]
pub(crate) struct SweepArgs {
    /// The first rate, which is doubled until something does not hold.
    #[arg(long, default_value = "100/s")]
    pub(crate) from: ArrivalRate,
    /// What the p99 of the latency may be.
    #[arg(long = "bound", default_value = "50ms", value_parser = timeout)]
    pub(crate) bound: Duration,
    /// How long each rate is tried.
    #[arg(long, default_value = "5s", value_parser = hold)]
    pub(crate) step: Duration,
    /// The size of a message's content.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
    #[command(flatten)]
    pub(crate) size: SizeArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

/// People who come, talk, pause, look at the history and go.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChatArgs {
    /// Where to connect; people are spread over all that are given.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    pub(crate) url: Vec<String>,
    /// How many people.
    #[arg(long, alias = "people", default_value_t = 100, value_parser = count)]
    pub(crate) users: usize,
    /// How many rooms there are; everybody is in one to three of them.
    #[arg(long, default_value_t = 20, value_parser = count)]
    pub(crate) rooms: usize,
    /// How long somebody pauses between two deeds, on average.
    #[arg(long, default_value = "5s", value_parser = hold)]
    pub(crate) think: Duration,
    /// How long they are there.
    #[arg(long, default_value = "60s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// What everybody's pauses and deeds are drawn from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) monitor: MonitorArgs,
    #[command(flatten)]
    pub(crate) thresholds: Thresholds,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Who talks how in a run.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// How many rooms.
    #[arg(long, default_value_t = 10, value_parser = count)]
    pub(crate) rooms: usize,
    /// How many members each has.
    #[arg(long, default_value_t = 10, value_parser = count)]
    pub(crate) members: usize,
    /// How many messages all of them send; each is due at a set time, whatever became of earlier
    /// ones.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// How long they talk.
    #[arg(long, default_value = "60s", value_parser = hold)]
    pub(crate) duration: Duration,
    /// The size of a message's content.
    #[arg(long, default_value_t = 128, value_parser = bytes)]
    pub(crate) bytes: usize,
    /// After how long without a sign of life a member gives its connection up.
    #[arg(long, alias = "patience", default_value = "4s", value_parser = timeout)]
    pub(crate) idle_timeout: Duration,
    #[command(flatten)]
    pub(crate) thresholds: Thresholds,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Members of rooms talk at a rate; every message is accounted for.
#[derive(Clone, Debug, Args)]
pub(crate) struct LedgerArgs {
    /// Where to connect; members are spread over all that are given, and go on to the next.
    #[arg(long, default_value = "ws://127.0.0.1:8080/ws")]
    pub(crate) url: Vec<String>,
    #[command(flatten)]
    pub(crate) monitor: MonitorArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// The same against a cluster of its own in which things go wrong.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChaosArgs {
    /// What the plan is drawn from: the same seed is the same plan.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How many gateways.
    #[arg(long, default_value_t = 3, value_parser = count)]
    pub(crate) nodes: usize,
    /// The gateway.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// The script that makes nginx' configuration.
    #[arg(long, default_value = "nginx/render.sh")]
    pub(crate) nginx_render: PathBuf,
    #[command(flatten)]
    pub(crate) external: ExternalArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// A cluster that somebody else runs. Nothing is done to it that would have to be started again.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "A cluster that is there")]
pub(crate) struct ExternalArgs {
    /// Where members connect, through a proxy that fails, instead of a cluster of its own; may be
    /// repeated.
    #[arg(long)]
    pub(crate) url: Vec<ServerUrl>,
    /// Gateways of it on this machine, which are stopped and go on.
    #[arg(long, num_args = 1.., requires = "url")]
    pub(crate) gateway_pid: Vec<u32>,
    /// Its Redis, which closes connections.
    #[arg(long, requires = "url")]
    pub(crate) redis: Option<std::net::SocketAddr>,
}

/// Attacks a gateway while legitimate clients use it and a second one, and judges what they notice.
#[derive(Clone, Debug, Args)]
pub(crate) struct AbuseArgs {
    /// Attacks by name (`echo-pings`) or group (`a`, `A1`); the whole catalogue where none is given.
    pub(crate) attacks: Vec<String>,
    /// Lists the catalogue and attacks nothing.
    #[arg(long)]
    pub(crate) list: bool,
    /// How many seconds each attack lasts.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(crate) seconds: u32,
    /// How long after an attack everything may take to be back.
    #[arg(long, default_value = "60s", value_parser = timeout)]
    pub(crate) recovery: Duration,
    /// How many legitimate clients each of the two gateways has, in rooms of ten.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(10..=5_000))]
    pub(crate) clients: u32,
    /// How many messages the legitimate clients of each gateway send.
    #[arg(long, default_value = "100/s")]
    pub(crate) rate: ArrivalRate,
    /// How much longer than the control's p99 the legitimate p99 may be, where twice of it is less.
    #[arg(long, default_value = "0s", value_parser = timeout)]
    pub(crate) slack: Duration,
    /// How late this tool may be (p99) for a result to count.
    #[arg(long, default_value = "1ms", value_parser = timeout)]
    pub(crate) lag_max: Duration,
    /// The gateway that is started twice.
    #[arg(long, default_value = "target/release/gateway")]
    pub(crate) gateway: PathBuf,
    /// A further option of the gateways, as KEY=VALUE; may be repeated.
    #[arg(long)]
    pub(crate) set: Vec<String>,
    /// `maxmemory` of each Redis, such as 64mb.
    #[arg(long)]
    pub(crate) redis_maxmemory: Option<String>,
    /// The rate of the slow link, as for `tc`.
    #[arg(long, default_value = "96kbit")]
    pub(crate) link_rate: String,
    /// How many bytes the client behind it catches up; a room keeps a thousand messages of 8 KB.
    #[arg(long, default_value_t = 4_000_000, value_parser = clap::value_parser!(u64).range(100_000..=8_000_000))]
    pub(crate) link_bytes: u64,
    /// How long that may take.
    #[arg(long, default_value = "10m", value_parser = timeout)]
    pub(crate) link_patience: Duration,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Lays two reports of --json beside each other.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompareArgs {
    /// The first.
    pub(crate) first: PathBuf,
    /// The second.
    pub(crate) second: PathBuf,
}

/// Measures the gateway beside a baseline and a naive chat, and prints a table: `make bench`.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// Which rows; all where none is given.
    #[arg(value_enum)]
    pub(crate) rows: Vec<RowName>,
    /// How often everything is measured; the table has the medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rounds: u32,
    /// How long one measurement is, behind a quarter of it that does not count.
    #[arg(long, default_value = "2s", value_parser = timeout)]
    pub(crate) measured: Duration,
    /// So many times fewer connections and messages: to try the bench, not to measure.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) divide_by: u32,
    /// Where `gateway` is, and the baseline and the naive chat in `examples`.
    #[arg(long, default_value = "target/release")]
    pub(crate) programs: PathBuf,
    /// Compares with this other gateway, built before a change, instead of the baseline and the naive
    /// chat. Both are measured in turns.
    #[arg(long)]
    pub(crate) previous: Option<PathBuf>,
    /// Writes the table into this file as well, as JSON.
    #[arg(long)]
    pub(crate) json: Option<PathBuf>,
}

/// A rate: `500/s`, `500`, `300/m`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ArrivalRate {
    per_second: f64,
}

/// The text is no rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rate is a number above 0 and at most 1000000, with /s or /m: 500/s")]
pub(crate) struct InvalidArrivalRate;

impl ArrivalRate {
    /// So many in each second.
    pub(crate) const fn per_second(per_second: f64) -> Self {
        Self { per_second }
    }

    /// How many in each second.
    pub(crate) fn events_per_second(self) -> f64 {
        self.per_second
    }

    /// When the one of this number is due, counted from the start.
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
        // At 1 in 1,000 s the largest run already takes years; below, its times would overflow.
        if (0.001..=1e6).contains(&per_second) {
            Ok(Self { per_second })
        } else {
            Err(InvalidArrivalRate)
        }
    }
}

/// Addresses to connect from, taken in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceAddresses {
    first: IpAddr,
    count: u32,
}

/// The text is no range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sources are an address or a range of at most 65536 IPv4 ones: 127.0.0.1-127.0.0.4")]
pub(crate) struct InvalidSourceAddresses;

impl SourceAddresses {
    /// How many there are.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// The address for the connection of this number.
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

/// A URL taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerUrl {
    /// Host and port, as `Host` has them and as they are looked up.
    pub(crate) authority: String,
    /// Path and query.
    pub(crate) path: String,
}

/// The text is no URL this tool can connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a URL has the form ws://host[:port]/path (TLS is not spoken: test behind the proxy)")]
pub(crate) struct InvalidServerUrl;

impl ServerUrl {
    /// The path with one more member of the query.
    pub(crate) fn path_with(&self, name: &str, value: &str) -> String {
        let sign = if self.path.contains('?') { '&' } else { '?' };
        let mut path = format!("{}{sign}{name}=", self.path);
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
                path.push(char::from(byte));
            } else {
                path.push_str(&format!("%{byte:02X}"));
            }
        }
        path
    }
}

impl FromStr for ServerUrl {
    type Err = InvalidServerUrl;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("ws://").ok_or(InvalidServerUrl)?;
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let plain = |b: u8| b.is_ascii_graphic() && b != b'#';
        if authority.is_empty() || authority.contains('@') || !rest.bytes().all(plain) {
            return Err(InvalidServerUrl);
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'));
        let port = if has_port { "" } else { ":80" };
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Self { authority: format!("{authority}{port}"), path: format!("{slash}{path}") })
    }
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
    fn sources_are_an_address_or_a_range_taken_in_turn() {
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
    fn a_url_is_taken_apart() {
        let check = |text: &str, authority: &str, path: &str| {
            let target: ServerUrl = text.parse().unwrap();
            assert_eq!((target.authority.as_str(), target.path.as_str()), (authority, path));
        };
        check("ws://h:1/ws", "h:1", "/ws");
        check("ws://h", "h:80", "/");
        check("ws://h?a=b", "h:80", "/?a=b");
        check("ws://[::1]/ws", "[::1]:80", "/ws");
        check("ws://[::1]:8080/ws", "[::1]:8080", "/ws");
        for bad in ["", "h:1", "wss://h/", "http://h/", "ws:///", "ws://u@h/", "ws://h/a b"] {
            assert_eq!(bad.parse::<ServerUrl>(), Err(InvalidServerUrl), "{bad:?}");
        }
    }

    #[test]
    fn the_query_is_added_and_encoded() {
        let target: ServerUrl = "ws://h/ws".parse().unwrap();
        let path = target.path_with("user", "a|b");
        assert_eq!(path, "/ws?user=a%7Cb");
        assert_eq!(ServerUrl { path, ..target }.path_with("x", "1"), "/ws?user=a%7Cb&x=1");
    }

    #[test]
    fn arguments_are_checked_by_clap() {
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
        ] {
            assert_eq!(parse(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
