//! Configuration: read from layered sources, checked as a whole, with all errors reported at once.
//!
//! Later sources replace earlier ones: defaults, the file, the environment, flags. Each section is
//! declared in the file of its group, beside the conversion into the options of the modules that use
//! it. `docs/configuration.md` consists of these declarations; a test compares the two.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use skein_core::{
    bus::{Retention, StorageLimits, room_store::RoomStoreOptions, sessions::SessionOptions},
    hub::HubOptions,
    limits::quotas::QuotaOptions,
    presence::PresenceOptions,
    rooms::{RoomRules, passwords::PasswordLimits},
    session::{ClientLimits, SessionLimits, auth::Auth},
    telemetry::LogFormat,
};
use skein_protocol::ids::NodeId;
use skein_redis::RedisOptions;

use self::{
    archive::ArchiveSection,
    auth::{ApiSection, AuthSection},
    cluster::ClusterSection,
    connections::{DrainSection, HeartbeatSection, RebalanceSection, TransportSection},
    hub::HubSection,
    limits::LimitsSection,
    reader::OptionReader,
    rooms::{PresenceSection, RoomsSection},
    server::{AdminSection, LogSection, MetricsSection, NodeSection, ServerSection},
    storage::{DedupSection, HistorySection, InboxSection, PublishSection, SessionsSection},
    telemetry::TelemetrySection,
};
use crate::{
    http::{AccessOptions, HttpOptions},
    otlp::OtlpOptions,
};

mod reader;
mod aliases;
mod values;
mod secrets;
mod template;
mod server;
mod archive;
mod auth;
mod cluster;
mod rooms;
mod storage;
mod hub;
mod connections;
mod limits;
mod telemetry;
#[cfg(test)]
mod tests;

pub use archive::ArchiveOptions;
pub use reader::{ConfigErrors, ConfigSources, DEFAULT_FILE, OptionDoc, ValueSource};
pub use template::FreshSecrets;

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
    /// Collector of traces; `None` if nothing is traced.
    pub otlp: Option<OtlpOptions>,
    /// Redis of the cluster; `None` for a single node in memory.
    pub redis: Option<RedisOptions>,
    /// Database of the archive; `None` without one.
    pub archive: Option<ArchiveOptions>,
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
    /// The clients and applications that may connect and call.
    pub access: AccessOptions,
    /// Limits of sessions.
    pub session: SessionLimits,
    /// Limits of clients.
    pub client_limits: ClientLimits,
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
    /// All options, for a reload to compare.
    pub options: Vec<OptionDoc>,
    /// Where the options came from, for a reload to read again.
    pub sources: ConfigSources,
}

impl Config {
    /// Reads and checks all sources.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] with every error of the sources.
    pub fn load(sources: ConfigSources) -> Result<Self, ConfigErrors> {
        Self::explain(sources).1
    }

    /// Reads and checks all sources. Returns every option with its effective value and its source
    /// as well, unless the file cannot be read.
    pub fn explain(sources: ConfigSources) -> (Vec<OptionDoc>, Result<Self, ConfigErrors>) {
        let mut reader = match OptionReader::new(sources.clone()) {
            Ok(reader) => reader,
            Err(errors) => return (Vec::new(), Err(errors)),
        };
        let config = Self::read(&mut reader);
        let (options, result) = reader.finish();
        (options.clone(), result.map(|()| Self { options, sources, ..config }))
    }

    /// Combines two sets of options: those that `is_new` names have the values of `new`, the others
    /// those of `old`.
    ///
    /// # Errors
    ///
    /// [`ConfigErrors`] if the values contradict each other.
    pub fn combine(
        old: &[OptionDoc],
        new: &[OptionDoc],
        is_new: impl Fn(&str) -> bool,
    ) -> Result<Self, ConfigErrors> {
        let options = old.iter().zip(new);
        let options = options.map(|(old, new)| if is_new(old.key()) { new } else { old });
        let mut reader = OptionReader::of(options.filter_map(OptionDoc::given).collect());
        let config = Self::read(&mut reader);
        let (options, result) = reader.finish();
        result.map(|()| Self { options, ..config })
    }

    /// Returns all options as a Markdown table, as in `docs/configuration.md`.
    pub fn describe() -> String {
        let mut table = String::from("| key | default | what |\n| --- | --- | --- |\n");
        for OptionDoc { key, default, text, secret, .. } in Self::defaults() {
            let default = if default.is_empty() { String::new() } else { format!("`{default}`") };
            let file = match secret {
                Some(_) => format!(" A secret: `{key}_file` may name a file that has it."),
                None => String::new(),
            };
            let _ = writeln!(table, "| `{key}` | {default} | {text}{file} |");
        }
        table
    }

    /// All options with their defaults.
    fn defaults() -> Vec<OptionDoc> {
        let mut reader = OptionReader::of(Default::default());
        Self::read(&mut reader);
        reader.finish().0
    }

    fn read(r: &mut OptionReader) -> Self {
        // In the order of the documentation.
        let server = ServerSection::read(r);
        let admin = AdminSection::read(r);
        let metrics = MetricsSection::read(r);
        let node = NodeSection::read(r);
        let log = LogSection::read(r);
        let telemetry = TelemetrySection::read(r);
        let auth = AuthSection::read(r);
        let api = ApiSection::read(r);
        let cluster = ClusterSection::read(r);
        let archive = ArchiveSection::read(r);
        let rooms = RoomsSection::read(r);
        let presence = PresenceSection::read(r);
        let publish = PublishSection::read(r);
        let dedup = DedupSection::read(r);
        let history = HistorySection::read(r);
        let inbox = InboxSection::read(r);
        let sessions = SessionsSection::read(r);
        let hub = HubSection::read(r);
        let heartbeat = HeartbeatSection::read(r);
        let transport = TransportSection::read(r);
        let drain = DrainSection::read(r);
        let rebalance = RebalanceSection::read(r);
        let limits = LimitsSection::read(r);

        let is_cluster = cluster.is_cluster();
        let allowed_origins = server.origins(r);
        admin.check(&server, r);
        auth.check(is_cluster, r);
        api.check(r);
        cluster.check(r);
        limits.check(r);
        let archive_backlog_max = archive.backlog_max;
        let archive = archive.archive(is_cluster, r);
        let http_limits = limits.http(r);
        if history.ttl > rooms.empty_ttl {
            r.warn(
                "history.ttl is longer than rooms.empty_ttl: the log of a managed room outlives \
                 its password, and anyone who joins the room afterwards can read it",
            );
        }
        let message_bytes = limits.message_bytes_max;
        for (is_contradiction, key, other, reason) in [
            (
                heartbeat.interval >= heartbeat.idle_timeout,
                "heartbeat.interval",
                "heartbeat.idle_timeout",
                "must be less, or every idle client is closed before its first ping",
            ),
            (
                history.max_bytes < message_bytes,
                "history.max_bytes",
                "limits.message_bytes_max",
                "must be at least as large, or a log cannot hold one message",
            ),
            (
                !is_cluster && history.memory_bytes_max < history.max_bytes,
                "history.memory_bytes_max",
                "history.max_bytes",
                "must be at least as large: it bounds all logs together",
            ),
            (
                transport.deflate && transport.deflate_bytes_min > message_bytes,
                "transport.deflate_bytes_min",
                "limits.message_bytes_max",
                "must not be larger, or nothing is compressed: use transport.deflate = false for \
                 that",
            ),
            (
                history.window > history.ttl,
                "history.window",
                "history.ttl",
                "must not be longer: nothing is kept for longer than that",
            ),
            (
                presence.event_members_max > presence.diff_members_max,
                "presence.event_members_max",
                "presence.diff_members_max",
                "must not be larger: single events name their users",
            ),
        ] {
            if is_contradiction {
                r.contradiction(key, other, reason);
            }
        }

        let retention = Retention {
            entries_min: history.max_entries,
            window: *history.window,
            bytes_max: history.max_bytes.0 as u64,
            memory_bytes_max: history.memory_bytes_max.0 as u64,
            ttl: *history.ttl,
            dedup_window: *dedup.window,
            inboxes: inbox.retention(),
            limits: StorageLimits {
                unseen: inbox.unseen(),
                read_marks_max: rooms.read_marks_max,
                session_data_max: sessions.data_max_bytes.0 as u64,
                memory_max: cluster.memory_max.0 as u64,
                watermark_percent: cluster.memory_watermark,
            },
        };
        let (node, room_store, sessions) = (node.name(), rooms.store(), sessions.sessions());
        Self {
            listen: server.listen,
            admin_listen: admin.listen,
            legacy_metric_names: metrics.legacy_names,
            log_format: log.format,
            log_level: log.level.0,
            otlp: telemetry.otlp(),
            redis: cluster.redis(
                &node,
                &retention,
                room_store.clone(),
                &sessions,
                archive_backlog_max,
            ),
            node,
            room_store,
            sessions,
            passwords: limits.passwords(*publish.timeout / 2),
            presence: presence.presence(),
            http: HttpOptions {
                warn_anonymous: auth.is_open(is_cluster),
                auth_cookie: auth.cookie.0.clone(),
                echo: server.echo,
                trusted_proxies: server.proxies(),
                drain_rate: limits.drain_rate(*drain.window),
                restart_time: *drain.restart_time,
                moves_per_second: rebalance.per_second,
                dedup_window: *dedup.window,
                deflate_bytes_min: transport.deflate_bytes_min(),
                heartbeat: heartbeat.heartbeat(),
            },
            access: AccessOptions { api: api.keys(), allowed_origins, limits: http_limits },
            auth: auth.auth(),
            session: SessionLimits {
                managed_max: rooms.managed_per_owner,
                wait_max: *publish.timeout,
            },
            client_limits: limits.clients(),
            rooms: rooms.rules(),
            archive,
            quotas: limits.quotas(),
            shards: hub.shards(),
            hub: hub.hub(*dedup.window, *history.ttl),
            retention,
            drain_delay: *drain.delay,
            warnings: std::mem::take(&mut r.warnings),
            options: Vec::new(),
            sources: ConfigSources::default(),
        }
    }
}
