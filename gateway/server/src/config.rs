//! Configuration: read from layered sources, checked as a whole, with all errors reported at once.
//!
//! Later sources replace earlier ones: defaults, the file, the environment, flags. The line in
//! `Config::read` that reads an option declares it: key, default and help text.
//! `docs/configuration.md` consists of these lines; a test compares the two.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Write as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use config::{Environment, File, FileFormat, Map, Value, ValueKind};
use ipnet::IpNet;
use rand::{RngExt as _, distr::Alphanumeric};
use skein_protocol::{ids::NodeId, protocol::MESSAGE_BYTES_MAX, token::is_room_pattern};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::{
    http::{HttpLimits, HttpOptions, ROUTE_COOKIE, api::ApiKeys, origin::AllowedOrigins},
    transport::{Heartbeat, echo::EchoMode},
};
use skein_core::{
    bus::{
        LogRetention, Retention, StorageLimits, UnseenInboxLimits, room_store::RoomStoreOptions,
        sessions::SessionOptions,
    },
    drain::schedule,
    hub::HubOptions,
    limits::{Rate, meter::MeterRates, quotas::QuotaOptions},
    presence::PresenceOptions,
    rooms::{RoomRules, passwords::PasswordLimits},
    session::{
        SessionLimits,
        auth::{Auth, JwtOptions},
    },
    telemetry::LogFormat,
};
use skein_redis::{
    RedisOptions,
    topology::{TlsFiles, url::RedisUrl},
};

mod aliases;

/// File that is read if it exists and no other file is named.
pub const DEFAULT_FILE: &str = "gateway.toml";
/// Shortest key that HS256 allows (RFC 7518, section 3.2).
const JWT_SECRET_BYTES_MIN: usize = 32;
/// Bounds of `cluster.lease`: a shorter lease expires in ordinary pauses, and scripts treat the end
/// of a much longer one as an invalid value.
const LEASE_MIN: Duration = Duration::from_secs(1);
const LEASE_MAX: Duration = Duration::from_secs(60);
/// File descriptors reserved for everything but client connections.
const DESCRIPTORS_RESERVED: u64 = 1000;

/// Checked configuration of a gateway.
#[derive(Clone)]
pub struct Config {
    /// Address that clients connect to.
    pub listen: SocketAddr,
    /// Address of the admin listener: metrics and health checks.
    pub admin_listen: SocketAddr,
    /// Whether `/metrics` also exports renamed metrics under their former names.
    pub legacy_metric_names: bool,
    /// Name of this node.
    pub node: NodeId,
    /// Format of log lines.
    pub log_format: LogFormat,
    /// Level or filter directives of log lines.
    pub log_level: String,
    /// Redis of the cluster; `None` for a single node in memory.
    pub redis: Option<RedisOptions>,
    /// Retention of logs and inboxes.
    pub retention: Retention,
    /// Retention of managed rooms.
    pub room_store: RoomStoreOptions,
    /// Retention of sessions.
    pub sessions: SessionOptions,
    /// Rules that depend on the name of a room.
    pub rooms: RoomRules,
    /// Rates of wrong room passwords.
    pub passwords: PasswordLimits,
    /// Presence of users.
    pub presence: PresenceOptions,
    /// Identification of users.
    pub auth: Auth,
    /// HTTP listener, handshakes and connections.
    pub http: HttpOptions,
    /// Limits of sessions.
    pub session: SessionLimits,
    /// Quotas of stored state.
    pub quotas: QuotaOptions,
    /// Number of tasks that rooms are distributed over.
    pub shards: usize,
    /// Memory bounds of the hub.
    pub hub: HubOptions,
    /// Time for which `/ready` returns 503 before clients are disconnected.
    pub drain_delay: Duration,
    /// Settings that work but deserve attention; logged at the start.
    pub warnings: Vec<String>,
}

/// Sources of values besides the defaults.
#[derive(Clone, Debug, Default)]
pub struct ConfigSources {
    /// File that must exist. `None`: [`DEFAULT_FILE`] is read if it exists.
    pub file: Option<PathBuf>,
    /// Environment variables `GATEWAY__SECTION__KEY`. `None`: those of this process.
    pub environment: Option<Map<String, String>>,
    /// Keys and values of `--set`.
    pub flags: Vec<(String, String)>,
}

/// All errors of a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

#[derive(Debug, PartialEq, Eq)]
struct ConfigError {
    key: String,
    message: String,
}

impl Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid configuration, {} error(s):", self.0.len())?;
        for ConfigError { key, message } in &self.0 {
            let variable = key.to_uppercase().replace('.', "__");
            write!(f, "\n  {key} (GATEWAY__{variable}): {message}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Documentation of an option.
#[derive(Clone, Debug)]
struct OptionDoc {
    key: &'static str,
    default: String,
    text: &'static str,
    /// Effective value, for errors that name it.
    value: String,
    is_given: bool,
}

/// Reads values by key and collects errors.
struct OptionReader {
    values: BTreeMap<String, String>,
    /// Former names that the sources use, by their present names.
    former: BTreeMap<&'static str, &'static str>,
    warnings: Vec<String>,
    errors: Vec<ConfigError>,
    described: Vec<OptionDoc>,
}

impl Config {
    /// Reads and checks all sources.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] with every error of the sources.
    pub fn load(sources: ConfigSources) -> Result<Self, ConfigErrors> {
        let mut reader = OptionReader::new(sources)?;
        let config = Self::read(&mut reader);
        reader.finish()?;
        Ok(config)
    }

    /// Returns all options as a Markdown table, as in `docs/configuration.md`.
    pub fn describe() -> String {
        let mut reader = OptionReader::of(BTreeMap::new());
        Self::read(&mut reader);
        let mut table = String::from("| key | default | what |\n| --- | --- | --- |\n");
        for OptionDoc { key, default, text, .. } in reader.described {
            let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
            let _ = writeln!(table, "| `{key}` | {default} | {text} |");
        }
        table
    }

    #[rustfmt::skip]
    fn read(r: &mut OptionReader) -> Self {
        let listen = r.take::<SocketAddr>("server.listen", "127.0.0.1:8080", "Address and port that clients connect to.");
        let origins = r.take::<CommaList<String>>("server.allowed_origins", "", "Origins of web pages that may connect, besides the gateway's own: `https://app.example`; `https://*.app.example` for all hosts below a name; `null` for pages without an origin; `*` for any. Cookies of pages that only `null` or `*` allows are ignored.");
        let proxies = r.take::<CommaList<ProxyNet>>("server.trusted_proxies", "", "Networks of proxies whose `X-Forwarded-For` is trusted, such as `10.0.0.0/8`.");
        let echo = r.take_enum("server.echo", "prefix", &[("prefix", EchoMode::Prefix), ("verbatim", EchoMode::Verbatim), ("off", EchoMode::Off)], "Reply of `/ws/echo`: `prefix`, `verbatim` (for conformance suites) or `off`.");
        let admin_listen = r.take::<SocketAddr>("admin.listen", "127.0.0.1:9100", "Address and port for metrics and health checks. Must not be reachable from the internet.");
        let legacy_metric_names = r.take::<bool>("metrics.legacy_names", "false", "Whether `/metrics` also exports renamed metrics under their former names, labels and label values, for one release.");
        let node = r.take::<Optional<NodeId>>("node.id", "", "Name of this node, unique in the cluster. Empty: the host name and 4 random characters.");
        let log_format = r.take_enum("log.format", "text", &[("text", LogFormat::Text), ("json", LogFormat::Json)], "Format of log lines: `text` or `json`.");
        let log_level = r.take::<LogFilter>("log.level", "info", "Level of log lines: `error`, `warn`, `info`, `debug`, `trace` or `off`, or directives such as `info,skein_redis=debug`.");

        let jwt = r.take_enum("auth.mode", "anonymous", &[("anonymous", false), ("jwt", true)], "How users are identified: `anonymous` (clients choose their own name) or `jwt` (by a token).");
        let allow_anonymous = r.take::<bool>("auth.allow_anonymous", "false", "Whether a cluster may run in `anonymous` mode. No effect in `jwt` mode.");
        let secret = r.take_secret::<String>("auth.jwt_secret", "", "Key that signs tokens (HS256), at least 32 bytes. Required in `jwt` mode.");
        let leeway = r.take::<DurationOption>("auth.leeway", "5s", "Tolerated difference of clocks: a token is valid for this long after its `exp` and before its `nbf`. At most 1h.");
        let audience = r.take::<CommaList<String>>("auth.audience", "", "Accepted audiences: the `aud` of a token must name one of them. Empty: a token with an `aud` is rejected.");
        let issuer = r.take::<CommaList<String>>("auth.issuer", "", "Accepted issuers: the `iss` of a token must be one of them. Empty: any.");
        let auth_cookie = r.take::<CookieName>("auth.cookie", "token", "Name of the cookie that may carry a token.");
        let api_keys = r.take_secret::<CommaList<NamedKey>>("api.keys", "", "Keys of the server API with the names that the log shows for them, as `web:<key>,ops:<key>`; at least 16 characters each. Empty: the server API is disabled.");
        let api_docs = r.take::<bool>("api.docs", "true", "Whether `/api/docs` and `/api/openapi.json` are served, without a key.");

        let redis_url = r.take::<Optional<String>>("cluster.redis_url", "", "URL of the cluster's Redis: `redis://user:password@host:6379/0`, `redis+sentinel://user:password@s1,s2,s3/primary` or `redis+cluster://user:password@h1,h2,h3`; `rediss` for TLS. Empty: a single node that keeps logs in memory.");
        let ca_file = r.take::<Optional<PathBuf>>("cluster.redis_ca_file", "", "For TLS: file with the authorities that sign the certificate of Redis (PEM). Empty: the public authorities.");
        let cert_file = r.take::<Optional<PathBuf>>("cluster.redis_cert_file", "", "For TLS: file with the certificate that this node presents to Redis (PEM). Redis requires one unless it has `tls-auth-clients no`.");
        let key_file = r.take::<Optional<PathBuf>>("cluster.redis_key_file", "", "For TLS: file with the private key of `cluster.redis_cert_file` (PEM).");
        let partitions = r.take_within("cluster.partitions", "256", 1..=16_384_u16, "Number of partitions that rooms are distributed over in Redis. Must be the same on all nodes, and cannot be changed later.");

        let lease = r.take::<DurationOption>("cluster.lease", "10s", "How long the lease of a node lasts; the node renews it after three tenths of that time. After a crash its users stay present for this long, and a Redis that lost data waits this long for the entries that the node may hold. 1s to 1m, the same on all nodes. With a short lease, a pause of a node or of Redis suspends delivery sooner.");
        let memory_max = r.take::<ByteSize>("cluster.memory_max", "0", "Memory that each Redis server may use if it has no `maxmemory`. 0: unknown, so that there is no watermark.");
        let watermark = r.take_within("cluster.memory_watermark", "80", 10..=99_u8, "Percent of its memory above which a Redis server stores nothing new: new rooms, inboxes and room settings are rejected with `overloaded`, and logs stop growing.");

        let create_on_join = r.take::<bool>("rooms.create_on_join", "true", "Whether a `join` creates a room that does not exist. `false`: such a `join` fails with `not_found`.");
        let empty_ttl = r.take::<DurationOption>("rooms.empty_ttl", "24h", "How long a managed room without members is kept.");
        let managed_max = r.take_within("rooms.managed_per_owner", "100", 0..=1_000_000_usize, "Managed rooms per owner. Above it: `limit_reached`. 0: no limit.");
        let read_marks_max = r.take_within("rooms.read_marks_max", "10000", 1..=10_000_000_u32, "Users per room whose read marks are kept. Above it: read marks of further users are dropped.");
        let ephemeral = r.take::<CommaList<RoomPattern>>("rooms.ephemeral", "", "Rooms without a log, by name or prefix, such as `cursors,live:*`: messages are delivered once and not stored. Must be the same on all nodes.");
        let grace = r.take::<DurationOption>("presence.grace", "3s", "How long a user stays present after their last connection has closed, so that reloading a page causes no event. At most 1h.");
        let event_members_max = r.take_within("presence.event_members_max", "100", 0..=10_000_usize, "Members up to which a room gets one event per user who joins or leaves. Above it: `presence_diff`, at most every 250 ms.");
        let diff_members_max = r.take_within("presence.diff_members_max", "1000", 0..=100_000_usize, "Members up to which `presence_diff` names users. Above it: only `count`, since otherwise every member would receive every name.");
        let presence_public = r.take::<bool>("presence.public", "true", "Whether clients may list the users who are connected to the cluster. `false`: only their number.");
        let publish_timeout = r.take::<DurationOption>("publish.timeout", "5s", "How long a publish, `join` or `history` waits for Redis. Above it: `unavailable`.");
        let dedup_window = r.take::<DurationOption>("dedup.window", "10m", "How long the `id` of a message is remembered: a message repeated within this time is stored once.");
        let entries_min = r.take_within("history.max_entries", "1000", 1..=1_000_000_u32, "Entries kept per room. Entries younger than `history.window` are kept beyond this number.");
        let window = r.take::<DurationOption>("history.window", "2m", "Age up to which entries beyond `history.max_entries` are kept.");
        let bytes_max = r.take::<ByteSize>("history.max_bytes", "16MiB", "Bytes kept per room. Above it: the oldest entries are dropped.");
        let memory_bytes = r.take::<ByteSize>("history.memory_bytes_max", "512MiB", "Bytes of all logs of a node without Redis. Above it: the least recently used logs are dropped.");
        let ttl = r.take::<DurationOption>("history.ttl", "24h", "Retention of an idle room's log.");

        let inbox_entries = r.take_within("inbox.max_entries", "1000", 1..=1_000_000_u32, "Entries kept per inbox. Above it: the oldest entries are dropped.");
        let inbox_ttl = r.take::<DurationOption>("inbox.ttl", "30d", "Retention of an idle inbox.");
        let inbox_bytes = r.take::<ByteSize>("inbox.max_bytes", "4MiB", "Bytes kept per inbox. Above it: the oldest entries are dropped.");
        let unseen_entries = r.take_within("inbox.unseen_max_entries", "20", 1..=1_000_000_u32, "Entries kept for a user who, as far as the cluster remembers, never connected. Above it: the oldest entries are dropped.");
        let unseen_bytes = r.take::<ByteSize>("inbox.unseen_max_bytes", "64KiB", "Bytes kept for a user who never connected. Above it: the oldest entries are dropped; a message larger than this gets `limit_reached`.");
        let unseen_ttl = r.take::<DurationOption>("inbox.unseen_ttl", "24h", "Retention of the idle inbox of a user who never connected.");
        let session_data = r.take::<ByteSize>("sessions.data_max_bytes", "128KiB", "Bytes of the data of all sessions of a user. Above it: `limit_reached`.");
        let session_ttl = r.take::<DurationOption>("sessions.ttl", "24h", "Retention of a session after its last use.");

        let shards = r.take_within("hub.shards", "0", 0..=256_usize, "Number of tasks that the rooms of a node are distributed over. 0: one per core.");
        let ring_bytes = r.take::<ByteSize>("hub.ring_bytes_max", "256MiB", "Memory of a node for the newest entries of all rooms. Above it: fewer entries per room are held in memory.");
        let dedup_ids_bytes = r.take::<ByteSize>("hub.dedup_ids_bytes_max", "64MiB", "Memory of a node for message ids within `dedup.window`, which it restores to a Redis that lost them. Above it: the oldest ids are dropped.");

        let hub_rooms = r.take_within("hub.rooms_max", "500000", 1..=100_000_000_usize, "Rooms that a node is subscribed to, with members or recently left by the last one. A `join` of a further room: `limit_reached`.");
        let empty_rooms = r.take_within("hub.empty_rooms_max", "50000", 0..=100_000_000_usize, "Rooms and inboxes without members that a node stays subscribed to for a while. Above it: the node unsubscribes from those that have been empty longest.");
        let watched_users = r.take_within("hub.watched_users_max", "200000", 1..=100_000_000_usize, "Users whose status a node observes for its connections. A `watch` of a further user: `limit_reached`.");

        let interval = r.take::<DurationOption>("heartbeat.interval", "25s", "Time between pings to a connection. Must be less than `heartbeat.idle_timeout`.");
        let idle_timeout = r.take::<DurationOption>("heartbeat.idle_timeout", "60s", "A connection from which nothing is received for this long is closed with 4002.");
        let write_timeout = r.take::<DurationOption>("heartbeat.write_timeout", "30s", "A connection to which nothing can be written for this long is closed with 4003.");
        let deflate = r.take::<bool>("transport.deflate", "true", "Whether messages are compressed for clients that offer permessage-deflate.");
        let deflate_bytes = r.take::<ByteSize>("transport.deflate_bytes_min", "256", "Messages with fewer bytes are sent uncompressed.");
        let drain_delay = r.take::<DurationOption>("drain.delay", "1s", "Time between SIGTERM, from which `/ready` returns 503, and the first disconnect of a client. At most 1h.");
        let drain_window = r.take::<DurationOption>("drain.window", "20s", "Longest time over which a stopping node disconnects its clients, in batches. It disconnects half as many a second as `limits.accepts_per_second` lets another node accept, so that a few clients take milliseconds. At most 1h.");

        let message_bytes = r.take::<ByteSize>("limits.message_bytes_max", &MESSAGE_BYTES_MAX.to_string(), "Bytes of a WebSocket message. Above it: close 1009.");
        let messages = r.take_within("limits.messages_per_second", "50", 0..=1_000_000_u32, "`message` frames per connection, with bursts of twice as many. Above it: `rate_limited`. 0: no limit.");
        let frames = r.take_within("limits.frames_per_second", "200", 0..=1_000_000_u32, "Other frames per connection, with bursts of five times as many; four names in a `watch` or `unwatch` count as one more frame. Above it: `rate_limited`. Control frames, small fragments and rejected frames have a budget of their own, of the same size: above it the connection is read more slowly, and after 10 s closed with 1008 `rate_limited`. 0: no limit.");
        let bytes_rate = r.take::<ByteSize>("limits.bytes_per_second", "2MiB", "Bytes received per connection, after decompression, with bursts of twice as many. Above it: the connection is read more slowly, and nothing is rejected. 0: no limit.");
        let rooms_max = r.take_within("limits.rooms_per_connection", "500", 1..=100_000_usize, "Rooms per connection. Above it: `limit_reached`.");
        let watches_max = r.take_within("limits.watches_per_connection", "1000", 0..=100_000_usize, "Watched users per connection, including the peers of its direct messages. Above it: `limit_reached`.");
        let per_user = r.take_within("limits.connections_per_user", "50", 0..=usize::MAX, "Connections per user. Above it: close 1008 `too_many_connections`. 0: no limit.");
        let per_ip = r.take_within("limits.connections_per_ip", "1000", 0..=usize::MAX, "Connections per address (IPv6: per /64). Above it: HTTP 429. 0: no limit.");
        let handshakes = r.take_within("limits.handshakes_per_minute_per_ip", "600", 0..=1_000_000_u32, "Handshakes per address. Above it: HTTP 429. 0: no limit.");
        let connections_max = r.take_within("limits.connections_max", "0", 0..=100_000_000_usize, "Connections per node. Above it: HTTP 503. 0: the limit of file descriptors less 1,000.");
        let accepts = r.take_within("limits.accepts_per_second", "5000", 0..=1_000_000_u32, "Handshakes per node. Above it: HTTP 503. 0: no limit.");
        let kept_bytes = r.take::<ByteSize>("limits.durable_bytes_per_minute", "32MiB", "Bytes that a user may store, with bursts of twice as many; an address may store eight times as many. Above it: `rate_limited`. 0: no limit.");
        let new_inboxes = r.take_within("limits.new_inboxes_per_hour", "100", 0..=10_000_000_u32, "Users who never connected that a user may send direct messages to; an address eight times as many. Above it: `rate_limited`. 0: no limit.");
        let new_rooms = r.take_within("limits.new_rooms_per_minute", "600", 0..=10_000_000_u32, "Rooms that a user may create by joining them, with bursts of five times as many; an address eight times as many. Above it: `rate_limited`. 0: no limit.");
        let requests = r.take_within("limits.http_requests_per_second_per_ip", "200", 0..=1_000_000_u32, "Plain HTTP requests per address (pages, probes, rejected handshakes), with bursts of five times as many; server API calls with a valid key do not count. Above it: HTTP 429, and the connection is closed. 0: no limit.");
        let api_key_failures = r.take_within("limits.api_key_failures_per_second_per_ip", "10", 0..=1_000_000_u32, "Server API calls without a valid key per address, with bursts of five times as many. Above it: HTTP 429, and the connection is closed. 0: no limit.");
        let password_ip = r.take_within("limits.password_failures_per_minute_per_ip", "30", 0..=1_000_000_u32, "Wrong room passwords per address, from users with recent failures; the other users of the address have a budget of their own, of the same size. Above it: `rate_limited`. 0: no limit.");
        let password_room = r.take_within("limits.password_failures_per_minute_per_room", "60", 0..=1_000_000_u32, "Wrong passwords per room from all addresses, in two budgets like those per address. Above it: `rate_limited`. 0: no limit.");
        let read_bytes = r.take::<ByteSize>("limits.read_bytes_per_second", "4MiB", "Bytes that a connection may read from logs and lists (`history`, `presence`, `rooms`, joins), with bursts of eight times as many; a user twice as many. Above it: reads wait, then get `rate_limited`. 0: no limit.");
        let outbox_bytes = r.take::<ByteSize>("limits.outbox_bytes_max", "1MiB", "Bytes in the outbox of a connection. Above it: the client is a slow consumer and continues from the log.");

        let allowed_origins = AllowedOrigins::parse(origins.0.iter().map(String::as_str)).unwrap_or_else(|error| {
            r.error("server.allowed_origins", error.to_string());
            AllowedOrigins::default()
        });
        let topology = redis_url.0.as_ref().and_then(|url| {
            url.parse::<RedisUrl>().map_err(|error| r.error("cluster.redis_url", error.to_string())).ok()
        });
        if topology.as_ref().is_some_and(|topology| !topology.has_tls()) {
            for (key, file) in [("cluster.redis_ca_file", &ca_file.0), ("cluster.redis_cert_file", &cert_file.0)] {
                if file.is_some() {
                    r.error(key, "is for TLS only: set a cluster.redis_url that begins with rediss, or remove this option".into());
                }
            }
        }
        if cert_file.0.is_some() != key_file.0.is_some() {
            r.error("cluster.redis_key_file", "requires cluster.redis_cert_file, and vice versa: set both or neither".into());
        }
        if redis_url.0.is_none() && (ca_file.0.is_some() || cert_file.0.is_some() || key_file.0.is_some()) {
            r.error("cluster.redis_url", "is required by the options for TLS files: set it, or remove them".into());
        }
        let tls = TlsFiles { ca: ca_file.0, identity: cert_file.0.zip(key_file.0) };
        if jwt && secret.len() < JWT_SECRET_BYTES_MIN {
            r.error("auth.jwt_secret", format!("is {} bytes long; auth.mode = jwt requires at least {JWT_SECRET_BYTES_MIN} (RFC 7518, section 3.2): create one with `openssl rand -base64 48`", secret.len()));
        }
        if !jwt && !secret.is_empty() {
            r.error("auth.jwt_secret", "has no effect with auth.mode = anonymous, which admits everyone: set auth.mode = jwt, or remove the secret".into());
        }
        if !jwt && redis_url.0.is_some() && !allow_anonymous {
            r.error("auth.mode", "is `anonymous`, so that any client of the cluster can impersonate any user: set `jwt`, or, for a cluster that is open on purpose, set auth.allow_anonymous = true".into());
        }
        for (key, span) in [("publish.timeout", &publish_timeout), ("dedup.window", &dedup_window), ("history.ttl", &ttl), ("heartbeat.interval", &interval), ("heartbeat.idle_timeout", &idle_timeout), ("heartbeat.write_timeout", &write_timeout), ("rooms.empty_ttl", &empty_ttl), ("inbox.ttl", &inbox_ttl), ("sessions.ttl", &session_ttl), ("inbox.unseen_ttl", &unseen_ttl)] {
            if span.0 < Duration::from_millis(1) || span.0 > Duration::from_secs(10 * 365 * 86_400) {
                r.error(key, "must be 1ms to 10 years".into());
            }
        }
        if !(LEASE_MIN..=LEASE_MAX).contains(&lease.0) {
            r.error("cluster.lease", "must be 1s to 1m".into());
        }
        for (key, span) in [("auth.leeway", &leeway), ("presence.grace", &grace), ("drain.delay", &drain_delay), ("drain.window", &drain_window)] {
            if span.0 > Duration::from_secs(3600) {
                r.error(key, "must be at most 1h".into());
            }
        }
        for (key, bytes) in [("limits.message_bytes_max", &message_bytes), ("limits.outbox_bytes_max", &outbox_bytes), ("history.max_bytes", &bytes_max), ("history.memory_bytes_max", &memory_bytes), ("hub.ring_bytes_max", &ring_bytes), ("hub.dedup_ids_bytes_max", &dedup_ids_bytes), ("inbox.max_bytes", &inbox_bytes), ("inbox.unseen_max_bytes", &unseen_bytes), ("sessions.data_max_bytes", &session_data)] {
            if bytes.0 < 128 || bytes.0 > 1 << 40 {
                r.error(key, "must be 128 bytes to 1 TiB".into());
            }
        }
        if message_bytes.0 > 16 << 20 {
            r.error("limits.message_bytes_max", "must be at most 16MiB: Redis and every node hold a message as a whole".into());
        }
        if listen.port() != 0 && listen.port() == admin_listen.port() && (listen.ip() == admin_listen.ip() || listen.ip().is_unspecified() || admin_listen.ip().is_unspecified()) {
            r.error("admin.listen", format!("`{admin_listen}` conflicts with server.listen (`{listen}`): use another port"));
        }
        // Contradictions between two options, each an error only where the first one is set: a
        // default does not count. The option that must be smaller, the other one, and the reason.
        for (is_contradiction, key, other, why) in [
            (interval.0 >= idle_timeout.0, "heartbeat.interval", "heartbeat.idle_timeout", "must be less, or every idle client is closed before its first ping"),
            (bytes_max.0 < message_bytes.0, "history.max_bytes", "limits.message_bytes_max", "must be at least as large, or a log cannot hold one message"),
            (redis_url.0.is_none() && memory_bytes.0 < bytes_max.0, "history.memory_bytes_max", "history.max_bytes", "must be at least as large: it bounds all logs together"),
            (deflate && deflate_bytes.0 > message_bytes.0, "transport.deflate_bytes_min", "limits.message_bytes_max", "must not be larger, or nothing is compressed: use transport.deflate = false for that"),
            (window.0 > ttl.0, "history.window", "history.ttl", "must not be longer: nothing is kept for longer than that"),
            (event_members_max > diff_members_max, "presence.event_members_max", "presence.diff_members_max", "must not be larger: single events name their users"),
        ] {
            if is_contradiction && (key == "heartbeat.interval" || r.is_given(key)) {
                let of = |key: &str| r.described.iter().find(|option| option.key == key).map_or("", |option| option.value.as_str()).to_owned();
                let message = format!("`{}` contradicts {other} = `{}`: {key} {why}", of(key), of(other));
                r.error(key, message);
            }
        }

        let keys: Vec<&str> = api_keys.0.iter().map(|NamedKey(_, key)| key.as_str()).collect();
        if keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key)) {
            r.error("api.keys", "contains a key twice, so that the log cannot tell which application used it: use different keys".into());
        }

        if kept_bytes.0 > 1 << 31 {
            r.error("limits.durable_bytes_per_minute", "must be at most 2GiB".into());
        }

        let mut warnings = std::mem::take(&mut r.warnings);
        if outbox_bytes.0 < message_bytes.0 {
            warnings.push("limits.outbox_bytes_max is less than limits.message_bytes_max: an outbox may exceed the former, since it always takes one message".into());
        }
        if ttl.0 > empty_ttl.0 {
            warnings.push("history.ttl is longer than rooms.empty_ttl: the log of a managed room outlives its password, and anyone who joins the room afterwards can read it".into());
        }
        let open_cluster = !jwt && redis_url.0.is_some();
        if open_cluster {
            warnings.push("ANONYMOUS MODE in a cluster: any client can read every room and impersonate any user; set auth.mode = jwt".into());
        }
        let unseen = UnseenInboxLimits { entries_max: unseen_entries, bytes_max: unseen_bytes.0 as u64, ttl: unseen_ttl.0 };
        let bounds = StorageLimits { unseen, read_marks_max, session_data_max: session_data.0 as u64, memory_max: memory_max.0 as u64, watermark_percent: watermark };
        let retention = Retention { entries_min, window: window.0, bytes_max: bytes_max.0 as u64, memory_bytes_max: memory_bytes.0 as u64, ttl: ttl.0, dedup_window: dedup_window.0, inboxes: LogRetention { entries_min: inbox_entries, ttl: inbox_ttl.0, bytes_max: inbox_bytes.0 as u64 }, limits: bounds };
        let sessions = SessionOptions { ttl: session_ttl.0 };
        let node = node.0.unwrap_or_else(default_node_id);
        let second = Duration::from_secs(1);
        let descriptors = descriptors_for_clients();
        if connections_max > descriptors {
            warnings.push(format!("limits.connections_max is {connections_max}, but this process has file descriptors for only {descriptors} clients: raise the limit (`ulimit -n`)"));
        }
        Self {
            listen,
            admin_listen,
            legacy_metric_names,
            node: node.clone(),
            log_format,
            log_level: log_level.0,
            redis: redis_url.0.map(|url| RedisOptions { url, tls, partitions, lease: lease.0, retention: retention.clone(), rooms: RoomStoreOptions { empty_ttl: empty_ttl.0 }, sessions: sessions.clone(), node: node.to_string() }),
            retention,
            room_store: RoomStoreOptions { empty_ttl: empty_ttl.0 },
            sessions,
            rooms: RoomRules { ephemeral: ephemeral.0.into_iter().map(|RoomPattern(text)| text).collect(), create_on_join },
            passwords: PasswordLimits { failures_per_ip: Rate::new(password_ip, 60 * second, password_ip), failures_per_room: Rate::new(password_room, 60 * second, password_room), wait_max: publish_timeout.0 / 2 },
            presence: PresenceOptions { grace: grace.0, event_members_max, diff_members_max, public: presence_public },
            auth: if jwt { Auth::jwt(JwtOptions { secret, leeway: leeway.0, audience: audience.0, issuer: issuer.0 }) } else { Auth::Anonymous },
            http: HttpOptions {
                auth_cookie: auth_cookie.0,
                api: ApiKeys::new(api_keys.0.into_iter().map(|NamedKey(name, key)| (name, key)), api_docs),
                allowed_origins,
                trusted_proxies: proxies.0.into_iter().map(|ProxyNet(net)| net).collect(),
                echo,
                drain_rate: schedule::DrainRate { window: drain_window.0, per_second: drain_rate_per_second(accepts) },
                warn_anonymous: open_cluster,
                dedup_window: dedup_window.0,
                deflate_bytes_min: deflate.then_some(deflate_bytes.0),
                heartbeat: Arc::new(Heartbeat { interval: interval.0, idle_timeout: idle_timeout.0, write_timeout: write_timeout.0 }),
                limits: HttpLimits {
                    connections_max: if connections_max == 0 { descriptors } else { connections_max },
                    connections_per_ip: per_ip,
                    connections_per_user: per_user,
                    handshakes_per_ip: Rate::new(handshakes, 60 * second, handshakes),
                    accepts: Rate::new(accepts, second, accepts),
                    requests_per_ip: Rate::new(requests, second, requests.saturating_mul(5)),
                    api_key_failures_per_ip: Rate::new(api_key_failures, second, api_key_failures.saturating_mul(5)),
                    message_bytes_max: message_bytes.0,
                    outbox_bytes_max: outbox_bytes.0,
                },
            },
            session: SessionLimits {
                rates: Arc::new(MeterRates::new(messages, frames, bytes_rate.0 as u64)),
                rooms_max,
                watches_max,
                managed_max,
                wait_max: publish_timeout.0,
                read_bytes_per_second: read_bytes.0,
            },
            quotas: QuotaOptions { bytes_per_minute: kept_bytes.0 as u32, new_inboxes_per_hour: new_inboxes, new_rooms_per_minute: new_rooms },
            shards: if shards == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { shards },
            hub: HubOptions { ring_bytes_max: ring_bytes.0, dedup_ids_bytes_max: dedup_ids_bytes.0, dedup_window: dedup_window.0, log_ttl: ttl.0, rooms_max: hub_rooms, empty_rooms_max: empty_rooms, watched_users_max: watched_users },
            drain_delay: drain_delay.0,
            warnings,
        }
    }
}

impl OptionReader {
    fn new(sources: ConfigSources) -> Result<Self, ConfigErrors> {
        let mut builder = config::Config::builder();
        builder = match sources.file {
            Some(path) => builder.add_source(File::from(path).format(FileFormat::Toml)),
            None => builder.add_source(File::new(DEFAULT_FILE, FileFormat::Toml).required(false)),
        };
        // Values stay text until an option reads them: guessing types would turn the id `1e5`
        // into 100000.
        let environment = Environment::with_prefix("GATEWAY")
            .prefix_separator("__")
            .separator("__")
            .ignore_empty(true)
            .source(sources.environment);
        builder = builder.add_source(environment);
        let mut errors = Vec::new();
        for (key, value) in sources.flags {
            builder = match builder.clone().set_override(&key, value) {
                Ok(builder) => builder,
                Err(error) => {
                    errors.push(ConfigError { key, message: error.to_string() });
                    builder
                }
            };
        }
        let mut values = BTreeMap::new();
        match builder.build().and_then(config::Config::try_deserialize::<Map<String, Value>>) {
            Ok(tables) => flatten("", tables, &mut values),
            Err(error) => {
                let key = "the configuration file".to_owned();
                errors.push(ConfigError { key, message: error.to_string() });
            }
        }
        if errors.is_empty() { Ok(Self::of(values)) } else { Err(ConfigErrors(errors)) }
    }

    fn of(mut values: BTreeMap<String, String>) -> Self {
        let aliases::Resolved { warnings, contradictions, former } = aliases::resolve(&mut values);
        let error = |(key, message)| ConfigError { key, message };
        let errors = contradictions.into_iter().map(error).collect();
        Self { values, former, warnings, errors, described: Vec::new() }
    }

    fn take<T: FromStr<Err: Display>>(
        &mut self,
        key: &'static str,
        default: &str,
        text: &'static str,
    ) -> T {
        self.take_formatted(key, default, text, |value, error| format!("`{value}`: {error}"))
    }

    /// As [`OptionReader::take`], but errors do not contain the value.
    fn take_secret<T: FromStr<Err: Display>>(
        &mut self,
        key: &'static str,
        default: &str,
        text: &'static str,
    ) -> T {
        self.take_formatted(key, default, text, |_, error: &T::Err| error.to_string())
    }

    fn take_formatted<T: FromStr<Err: Display>>(
        &mut self,
        key: &'static str,
        default: &str,
        text: &'static str,
        message: impl Fn(&str, &T::Err) -> String,
    ) -> T {
        let given = self.values.remove(key);
        let (is_given, default) = (given.is_some(), default.to_owned());
        let value = given.clone().unwrap_or_else(|| default.clone());
        let described = OptionDoc { key, default: default.clone(), text, value, is_given };
        self.described.push(described);
        if let Some(value) = given {
            match value.parse() {
                Ok(value) => return value,
                Err(error) => self.error(key, message(&value, &error)),
            }
        }
        match default.parse() {
            Ok(value) => value,
            Err(error) => unreachable!("the default of {key} is {default}: {error}"),
        }
    }

    fn take_within<T: FromStr<Err: Display> + PartialOrd + Display + Copy>(
        &mut self,
        key: &'static str,
        default: &str,
        range: std::ops::RangeInclusive<T>,
        text: &'static str,
    ) -> T {
        let value: T = self.take(key, default, text);
        if !range.contains(&value) {
            self.error(key, format!("must be {} to {}", range.start(), range.end()));
        }
        value
    }

    fn take_enum<T: Copy>(
        &mut self,
        key: &'static str,
        default: &str,
        values: &[(&str, T)],
        text: &'static str,
    ) -> T {
        let word: String = self.take(key, default, text);
        if let Some((_, value)) = values.iter().find(|(name, _)| *name == word) {
            return *value;
        }
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        self.error(key, format!("`{word}` is not one of {}", names.join(", ")));
        values[0].1
    }

    fn is_given(&self, key: &str) -> bool {
        self.described.iter().any(|option| option.key == key && option.is_given)
    }

    fn error(&mut self, key: &str, message: String) {
        let message = match self.former.get(key) {
            Some(old) => format!("{message} (set by its former name {old})"),
            None => message,
        };
        self.errors.push(ConfigError { key: key.to_owned(), message });
    }

    fn finish(mut self) -> Result<(), ConfigErrors> {
        let known: Vec<&str> = self.described.iter().map(|option| option.key).collect();
        for key in self.values.into_keys() {
            let message = match nearest(&key, &known) {
                Some(known) => format!("unknown option; did you mean `{known}`?"),
                None => "unknown option".to_owned(),
            };
            self.errors.push(ConfigError { key, message });
        }
        if self.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(self.errors)) }
    }
}

/// Flattens tables to dotted keys, and lists to text separated by commas.
fn flatten(prefix: &str, table: Map<String, Value>, values: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value.kind {
            ValueKind::Table(table) => flatten(&key, table, values),
            ValueKind::Array(items) => {
                let items: Vec<String> = items.iter().map(ToString::to_string).collect();
                values.insert(key, items.join(","));
            }
            ValueKind::Nil => {}
            kind => {
                values.insert(key, kind.to_string());
            }
        }
    }
}

/// Returns a known key that is similar to `key`.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let same = |known: &str| {
        let ends = |text: &str| text.rsplit('.').next().map(str::to_owned);
        let common = key.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
        let longest = key.len().max(known.len());
        ends(key) == ends(known) || common * 4 >= longest * 3
    };
    known.iter().copied().find(|known| same(known))
}

/// Clients that a stopping node disconnects per second: half of `accepts`, the rate at which
/// another node accepts them, since that node gets other clients as well, and they arrive unevenly.
fn drain_rate_per_second(accepts: u32) -> u32 {
    const WITHOUT_LIMIT: u32 = 5000;
    let accepts = if accepts == 0 { WITHOUT_LIMIT } else { accepts };
    (accepts / 2).max(1)
}

/// Returns the host name and four random characters.
fn default_node_id() -> NodeId {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' })
        .take(59)
        .collect();
    let host = if host.is_empty() { "node".to_owned() } else { host };
    let random: String = rand::rng()
        .sample_iter(Alphanumeric)
        .take(4)
        .map(|letter| char::from(letter).to_ascii_lowercase())
        .collect();
    format!("{host}-{random}").parse().expect("it consists of allowed characters")
}

/// Raises the limit of file descriptors as far as possible. Returns the number left for clients.
fn descriptors_for_clients() -> usize {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024);
    // With a very low limit, half of it is reserved.
    let reserved = DESCRIPTORS_RESERVED.min(descriptors / 2);
    // A larger number would exceed the maximum of a semaphore, and is as good as no limit.
    usize::try_from(descriptors - reserved).unwrap_or(usize::MAX).min(100_000_000)
}

/// Duration such as `25s`, `10m`, `24h`.
struct DurationOption(Duration);

impl FromStr for DurationOption {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

/// Number of bytes such as `262144`, `256KiB`, `16MiB`.
struct ByteSize(usize);

impl FromStr for ByteSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            _ => {
                return Err(
                    "a size is a number of bytes, or a number with KiB, MiB, GiB, kB or MB",
                );
            }
        };
        let number: usize = number.parse().map_err(|_| "a size starts with a number")?;
        number.checked_mul(unit).map(Self).ok_or("the size is too large")
    }
}

/// Values separated by commas.
struct CommaList<T>(Vec<T>);

impl<T: FromStr> FromStr for CommaList<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// API key with its name: `<name>:<key>`.
struct NamedKey(String, String);

impl FromStr for NamedKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, key) = text.split_once(':').ok_or("a key is <name>:<key>")?;
        if name.is_empty() || key.len() < 16 {
            return Err("a key is <name>:<key>, with a key of 16 characters or more");
        }
        if !key.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(
                "a key must consist of printable ASCII characters, since clients send it in a header",
            );
        }
        Ok(Self(name.to_owned(), key.to_owned()))
    }
}

/// Value, or `None` if the text is empty.
struct Optional<T>(Option<T>);

impl<T: FromStr> FromStr for Optional<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() { Ok(Self(None)) } else { text.parse().map(Some).map(Self) }
    }
}

/// Level or directives of the log. Exactly one directive must be a level for all other modules: a
/// mistyped level would parse as the name of a module, and silence everything else.
struct LogFilter(String);

impl FromStr for LogFilter {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const USAGE: &str = "a level is error, warn, info, debug, trace or off; directives are one \
             level for everything and further levels for modules, as `info,skein_redis=debug`";
        let is_level = |text: &str| text.parse::<LevelFilter>().is_ok();
        let (mut levels, mut is_usable) = (0, true);
        for directive in text.split(',').map(str::trim) {
            match directive.split_once('=') {
                Some((module, level)) => is_usable &= !module.is_empty() && is_level(level),
                None if is_level(directive) => levels += 1,
                None => is_usable = false,
            }
        }
        let is_usable = is_usable && levels == 1 && text.parse::<Targets>().is_ok();
        if is_usable { Ok(Self(text.to_owned())) } else { Err(USAGE) }
    }
}

/// Network of trusted proxies.
struct ProxyNet(IpNet);

impl FromStr for ProxyNet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A single address is a network of one host.
        let net = match text.parse::<IpAddr>() {
            Ok(address) => Ok(IpNet::from(address)),
            Err(_) => text.parse::<IpNet>(),
        };
        let net = net.map_err(|error| format!("{error}; write a network as 10.0.0.0/8"))?;
        if net.prefix_len() == 0 {
            return Err("trusts every address, so that any client can forge its own: list only \
                        the networks of the proxies"
                .to_owned());
        }
        Ok(Self(net))
    }
}

/// Name of a cookie (RFC 6265, section 4.1.1: a token of RFC 9110, section 5.6.2).
struct CookieName(String);

impl FromStr for CookieName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_token =
            |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if text.is_empty() || !text.bytes().all(is_token) {
            return Err("a cookie name consists of letters, digits and !#$%&'*+-.^_`|~");
        }
        if text == ROUTE_COOKIE {
            return Err("this name is reserved: nginx finds the node of a client by this cookie");
        }
        Ok(Self(text.to_owned()))
    }
}

/// Name of a room, or a prefix that ends in `*`.
struct RoomPattern(String);

impl FromStr for RoomPattern {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !is_room_pattern(text) {
            return Err("is neither the name of a room nor a prefix that ends in `*`");
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
        let own = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>()
        };
        let environment = own(environment).into_iter().collect();
        let sources =
            ConfigSources { file: None, environment: Some(environment), flags: own(flags) };
        Config::load(sources).map_err(|errors| errors.to_string())
    }

    #[test]
    fn defaults_start_a_single_node_in_memory() {
        let config = load(&[], &[]).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
        assert!(config.redis.is_none() && config.warnings.is_empty());
    }

    #[test]
    fn flags_replace_the_environment_and_both_replace_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = "[server]\nlisten = \"127.0.0.1:1\"\necho = \"off\"\n[node]\nid = \"1e5\"\n\
                    [limits]\nmessages_per_second = 7\n";
        std::fs::write(file.path(), text).unwrap();
        let environment = [
            ("GATEWAY__SERVER__LISTEN", "127.0.0.1:2"),
            ("GATEWAY__ADMIN__LISTEN", "127.0.0.1:3"),
            ("GATEWAY__SERVER__ALLOWED_ORIGINS", ""),
            ("GATEWAY_PORT", "tcp://10.0.0.1:80"),
        ];
        let own = |(k, v): (&str, &str)| (k.to_owned(), v.to_owned());
        let config = Config::load(ConfigSources {
            file: Some(file.path().to_owned()),
            environment: Some(environment.into_iter().map(own).collect()),
            flags: vec![own(("admin.listen", "127.0.0.1:4"))],
        })
        .unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(config.listen.port(), 2);
        assert_eq!(config.admin_listen.port(), 4);
        assert_eq!(config.http.echo, EchoMode::Off);
        assert_eq!(config.node.as_str(), "1e5");
        let seven = Rate::new(7, Duration::from_secs(1), 14);
        assert_eq!(config.session.rates.messages, seven);
    }

    #[test]
    fn all_errors_are_reported_at_once_with_their_keys() {
        let environment = [
            ("GATEWAY__SERVER__LISTEN", "nowhere"),
            ("GATEWAY__SERVER__ECHO", "loud"),
            ("GATEWAY__SERVER__LISTN", "127.0.0.1:1"),
            ("GATEWAY__SERVER__ALLOWED_ORIGINS", "https://a, b"),
            ("GATEWAY__CLUSTER__PARTITIONS", "0"),
            ("GATEWAY__AUTH__MODE", "jwt"),
            ("GATEWAY__LIMITS__MESSAGE_BYTES_MAX", "1"),
            ("GATEWAY__PUBLISH__TIMEOUT", "soon"),
        ];
        let Err(errors) = load(&environment, &[]) else { panic!("accepted") };
        for (key, _) in environment {
            let key = key.replace("AUTH__MODE", "AUTH__JWT_SECRET");
            assert!(errors.contains(&key), "{key} is missing in {errors}");
        }
        assert!(errors.contains("8 error(s)"), "{errors}");
        assert!(errors.contains("did you mean `server.listen`?"), "{errors}");
    }

    #[test]
    fn a_useless_setting_is_rejected_with_advice() {
        const REDIS: (&str, &str) = ("cluster.redis_url", "redis://127.0.0.1");
        const JWT: (&str, &str) = ("auth.mode", "jwt");
        const SECRET: (&str, &str) = ("auth.jwt_secret", "a secret of at least thirty-two bytes");
        let rejected: &[(&[(&str, &str)], &str)] = &[
            (&[("log.level", "inof")], "a level is error, warn, info, debug, trace or off"),
            (&[("log.level", "skein_redis=debug")], "one level for everything"),
            (&[("log.level", "info,gateway=loud")], "a level is"),
            (&[("heartbeat.interval", "60s")], "every idle client is closed"),
            (&[("heartbeat.idle_timeout", "25s")], "heartbeat.idle_timeout = `25s`"),
            (&[("heartbeat.interval", "0s")], "must be 1ms to 10 years"),
            (&[JWT, ("auth.jwt_secret", "x")], "is 1 bytes long"),
            (&[JWT, ("auth.jwt_secret", &"x".repeat(31))], "at least 32"),
            (&[JWT], "openssl rand -base64 48"),
            (&[SECRET], "set auth.mode = jwt"),
            (&[JWT, SECRET, ("auth.leeway", "2h")], "must be at most 1h"),
            (&[("auth.cookie", "a b")], "a cookie name consists of"),
            (&[("auth.cookie", "")], "a cookie name consists of"),
            (&[("auth.cookie", "gw_node")], "nginx finds"),
            (&[("server.listen", "0.0.0.0:9100")], "use another port"),
            (&[("admin.listen", "127.0.0.1:8080")], "use another port"),
            (&[("server.trusted_proxies", "10.0.0.0/8,0.0.0.0/0")], "any client can forge its own"),
            (&[("server.trusted_proxies", "::/0")], "the networks of the proxies"),
            (&[("server.trusted_proxies", "nginx")], "write a network as 10.0.0.0/8"),
            (&[("api.keys", "web:short")], "16 characters or more"),
            (&[("api.keys", "a:0123456789abcdef,b:0123456789abcdef")], "contains a key twice"),
            (&[("api.keys", "a:0123456789abcdefä")], "in a header"),
            (&[("cluster.partitions", "0")], "must be 1 to 16384"),
            (&[("cluster.lease", "900ms")], "must be 1s to 1m"),
            (&[("cluster.lease", "61s")], "must be 1s to 1m"),
            (&[("cluster.redis_ca_file", "/ca.pem")], "is required by the options for TLS files"),
            (&[REDIS], "set auth.allow_anonymous = true"),
            (&[("rooms.ephemeral", "live:*:x")], "that ends in `*`"),
            (&[("rooms.ephemeral", "a b")], "is neither the name of a room"),
            (&[("limits.message_bytes_max", "1GiB")], "must be at most 16MiB"),
            (&[("history.max_bytes", "128")], "a log cannot hold one message"),
            (&[("history.memory_bytes_max", "1MiB")], "it bounds all logs together"),
            (&[("history.window", "2d")], "nothing is kept for longer"),
            (&[("presence.event_members_max", "2000")], "single events name their users"),
            (&[("presence.grace", "30d")], "must be at most 1h"),
            (&[("drain.window", "2h")], "must be at most 1h"),
            (&[("transport.deflate_bytes_min", "1GiB")], "transport.deflate = false"),
            (&[("node.id", "a b")], "node.id"),
        ];
        for (settings, expected) in rejected {
            let Err(text) = load(&[], settings) else { panic!("accepted: {settings:?}") };
            assert!(text.contains(expected) && text.contains("1 error(s)"), "{settings:?}: {text}");
        }
        let accepted: &[&[(&str, &str)]] = &[
            &[("log.level", "warn,skein_redis=trace,hyper=off")],
            &[("log.level", "off")],
            &[JWT, SECRET],
            &[("server.listen", "127.0.0.1:80"), ("admin.listen", "127.0.0.2:80")],
            &[("server.trusted_proxies", "10.0.0.1,fd00::/8")],
            &[("rooms.ephemeral", "live:*,cursors,*")],
            &[REDIS, ("auth.allow_anonymous", "true"), ("history.memory_bytes_max", "1MiB")],
            // A default does not contradict a setting.
            &[
                ("history.ttl", "2s"),
                ("history.max_bytes", "1GiB"),
                ("presence.diff_members_max", "5"),
            ],
            &[("limits.outbox_bytes_max", "64KiB")],
            &[("api.keys", "web:0123456789abcdef,web:fedcba9876543210")],
        ];
        for settings in accepted {
            if let Err(text) = load(&[], settings) {
                panic!("rejected: {settings:?}: {text}");
            }
        }
    }

    #[test]
    fn an_error_in_a_secret_does_not_show_it() {
        for (key, value) in [("api.keys", "web:hush"), ("api.keys", "hush")] {
            let Err(text) = load(&[], &[(key, value)]) else { panic!("accepted") };
            assert!(!text.contains("hush"), "{text}");
        }
    }

    #[test]
    fn an_anonymous_cluster_must_be_allowed() {
        let redis = ("GATEWAY__CLUSTER__REDIS_URL", "redis://127.0.0.1");
        assert!(load(&[redis], &[]).is_err());
        let allow = ("GATEWAY__AUTH__ALLOW_ANONYMOUS", "true");
        let Ok(config) = load(&[redis, allow], &[]) else { panic!("rejected") };
        assert!(config.http.warn_anonymous && !config.warnings.is_empty());
        let jwt = [("GATEWAY__AUTH__MODE", "jwt"), ("GATEWAY__AUTH__JWT_SECRET", &"x".repeat(32))];
        let Ok(config) = load(&[redis, allow, jwt[0], jwt[1]], &[]) else { panic!("rejected") };
        assert!(!config.http.warn_anonymous && config.warnings.is_empty());
    }

    #[test]
    fn sizes_have_units() {
        let bytes = |text: &str| text.parse::<ByteSize>().map(|bytes| bytes.0);
        assert_eq!(bytes("262144"), Ok(262_144));
        assert_eq!(bytes("256KiB"), Ok(262_144));
        assert_eq!(bytes("1 MB"), Ok(1_000_000));
        assert!(bytes("x").is_err() && bytes("1x").is_err() && bytes("").is_err());
    }
}
