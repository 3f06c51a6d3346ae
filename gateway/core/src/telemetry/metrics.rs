//! Metrics of the gateway. The help texts are the documentation; a test compares them with
//! `docs/metrics.md`.
//!
//! The registry belongs to the node, not to the process, so that tests can run several nodes.
//! Labels are closed enums: the code bounds the cardinality, not the traffic. Children of labelled
//! metrics are looked up once, since each look-up costs a hash and a lock.

use std::{collections::HashMap, fmt};

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::Collector,
};
use skein_protocol::error::ErrorCode;

use super::{legacy, log_limiter::LogLimiter};

/// Result of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeResult {
    /// The connection is open: 101, or 200 for an event stream.
    Accepted,
    /// The request is no valid handshake: 4xx.
    Invalid,
    /// The origin of the page is not allowed: 403.
    OriginDenied,
    /// The address is above a limit: 429.
    RateLimited,
    /// The node is full, draining, or without its bus: 503.
    Unavailable,
}

/// Reason for dropping a TCP connection before it became a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The address has too many connections.
    PerIpLimit,
    /// The client did not read a response for too long.
    WriteTimeout,
    /// The header of a request did not arrive in time.
    HeaderTimeout,
    /// The listener was full, and this connection was the oldest pending one.
    Evicted,
}

/// Budget that a connection has used up, so that it is read more slowly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThrottleReason {
    /// Control frames, small fragments and rejected frames of the connection.
    Overhead,
    /// Control frames, small fragments and rejected frames of all connections of the address.
    PerIpOverhead,
    /// Bytes of the connection.
    Bytes,
}

/// Result of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PublishResult {
    /// Appended to the log.
    Appended,
    /// The log already has a message with this id.
    Duplicate,
    /// The bus was unavailable for longer than the publish may wait.
    Unavailable,
    /// The queue to the bus was full.
    Overloaded,
    /// The bus rejected the message.
    Failed,
    /// A storage limit was reached: see `gateway_storage_rejections_total`.
    LimitReached,
}

/// Decision of the hub on a log entry that it received from the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryResult {
    /// Delivered to the members of this node.
    Delivered,
    /// Received before.
    Duplicate,
    /// Entries before this one are missing.
    Gap,
    /// The log has begun a new epoch.
    EpochChanged,
    /// This node is not subscribed to the log.
    NotSubscribed,
    /// The node has lost its lease: delivery is suspended until the cluster agrees again.
    NoLease,
}

/// Result of reading a log because entries had not been received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogRepairResult {
    /// The log had all missing entries.
    Complete,
    /// The log no longer had all of them: members got a `reset`.
    Reset,
    /// The log could not be read; the read is repeated.
    Failed,
    /// Two histories shared sequence numbers; the log was compared with the entries of this node.
    Reconciled,
}

/// Source of the missed entries that a resuming client received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResumeSource {
    /// The newest entries in the memory of this node.
    Ring,
    /// The log on the bus.
    Log,
}

/// Result of comparing a log with a Redis server that may have lost entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestoreResult {
    /// The server had all entries.
    Unchanged,
    /// The server got the entries that it lacked.
    Restored,
    /// The log on the server has moved to another epoch.
    EpochChanged,
    /// Two histories share sequence numbers: the log continues in a new epoch.
    Conflict,
    /// The server answered with a permanent error.
    Failed,
}

/// Storage limit that a request would have exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageLimit {
    /// Bytes that a user or an address may store per minute.
    Bytes,
    /// Rooms that a user or an address may create per minute.
    NewRooms,
    /// Managed rooms of one owner.
    ManagedRooms,
    /// Inboxes of users who never connected that a user may open per hour.
    UnseenInboxes,
    /// Bytes of the inbox of a user who never connected.
    UnseenBytes,
    /// Data of all sessions of a user.
    SessionData,
    /// Users whose read marks a room keeps.
    ReadMarks,
    /// The memory of a Redis server is above the watermark.
    Memory,
}

/// Result of checking the password of a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PasswordResult {
    /// The password is correct.
    Correct,
    /// The password is wrong.
    Wrong,
    /// Not checked: there were too many wrong ones, or too many checks are waiting.
    RateLimited,
}

/// Reason for rejecting a server API request because of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApiRejection {
    /// The request has no key: 401.
    MissingKey,
    /// The key is unknown: 401.
    WrongKey,
    /// The gateway has no API keys: 403.
    Disabled,
    /// The address made too many such requests: 429.
    RateLimited,
}

/// Kind of a value read from Redis that no gateway wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InvalidValue {
    /// A field of the barrier at which the nodes agree on a server.
    Barrier,
    /// An entry of a log.
    Entry,
    /// The position of a message id within the dedup window.
    DedupId,
    /// A lease, or the name of an incarnation.
    Lease,
    /// The read mark of a user.
    ReadMark,
    /// A message in a pub/sub channel of the gateways.
    PubsubMessage,
    /// A field of the metadata of a log.
    LogMeta,
    /// A control command, or the commands that a node has applied.
    Command,
    /// A presence entry, or a user or room name in an index.
    Presence,
    /// The settings of a managed room.
    RoomConfig,
    /// A session, or its data.
    Session,
    /// A key whose type is not the one that the gateway gives it.
    KeyType,
    /// An unconfirmed publish that a node restored.
    Unconfirmed,
}

macro_rules! labels {
    ($enum:ident: $($variant:ident $label:literal),+) => {
        impl Label for $enum {
            const ALL: &'static [Self] = &[$(Self::$variant),+];
            fn text(self) -> &'static str {
                match self { $(Self::$variant => $label),+ }
            }
        }
    };
}

/// A closed set of values of one label.
pub trait Label: Copy + Eq + std::hash::Hash + 'static {
    /// Every value.
    const ALL: &'static [Self];
    /// Returns the value as it is exported.
    fn text(self) -> &'static str;
}

labels!(HandshakeResult: Accepted "accepted", Invalid "invalid", OriginDenied "origin_denied",
    RateLimited "rate_limited", Unavailable "unavailable");
labels!(DropReason: PerIpLimit "per_ip_limit", WriteTimeout "write_timeout",
    HeaderTimeout "header_timeout", Evicted "evicted");
labels!(ThrottleReason: Overhead "overhead", PerIpOverhead "per_ip_overhead", Bytes "bytes");
labels!(PublishResult: Appended "appended", Duplicate "duplicate", Unavailable "unavailable",
    Overloaded "overloaded", Failed "failed", LimitReached "limit_reached");
labels!(EntryResult: Delivered "delivered", Duplicate "duplicate", Gap "gap",
    EpochChanged "epoch_changed", NotSubscribed "not_subscribed", NoLease "no_lease");
labels!(StorageLimit: Bytes "bytes", NewRooms "new_rooms", ManagedRooms "managed_rooms",
    UnseenInboxes "unseen_inboxes", UnseenBytes "unseen_bytes", SessionData "session_data",
    ReadMarks "read_marks", Memory "memory");
labels!(LogRepairResult: Complete "complete", Reset "reset", Failed "failed",
    Reconciled "reconciled");
labels!(PasswordResult: Correct "correct", Wrong "wrong", RateLimited "rate_limited");
labels!(ApiRejection: MissingKey "missing_key", WrongKey "wrong_key", Disabled "disabled",
    RateLimited "rate_limited");
labels!(ResumeSource: Ring "ring", Log "log");
labels!(RestoreResult: Unchanged "unchanged", Restored "restored", EpochChanged "epoch_changed",
    Conflict "conflict", Failed "failed");
labels!(InvalidValue: Barrier "barrier", Entry "entry", DedupId "dedup_id", Lease "lease",
    ReadMark "read_mark", PubsubMessage "pubsub_message", LogMeta "log_meta", Command "command",
    Presence "presence", RoomConfig "room_config", Session "session", KeyType "key_type",
    Unconfirmed "unconfirmed");

impl Label for bool {
    const ALL: &'static [Self] = &[false, true];
    fn text(self) -> &'static str {
        if self { "true" } else { "false" }
    }
}

impl Label for ErrorCode {
    const ALL: &'static [Self] = &Self::ALL;
    fn text(self) -> &'static str {
        self.as_str()
    }
}

/// One counter per label value.
#[derive(Debug)]
pub struct Counters<L>(HashMap<L, IntCounter>);

impl<L: Label> Counters<L> {
    /// Returns the counter of `label`.
    pub fn of(&self, label: L) -> &IntCounter {
        &self.0[&label]
    }

    /// Returns the sum over all label values.
    pub fn sum(&self) -> u64 {
        self.0.values().map(IntCounter::get).sum()
    }
}

/// Adds one to a gauge until it is dropped.
#[derive(Debug)]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    /// Adds one to `gauge`.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// All metrics of one node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    legacy_names: bool,
    /// `gateway_connections`
    pub connections: IntGauge,
    /// `gateway_connection_panics_total`
    pub connection_panics: IntCounter,
    /// `gateway_tasks`
    tasks: IntGauge,
    /// `gateway_http_connections_dropped_total`
    pub http_connections_dropped: Counters<DropReason>,
    /// `gateway_http_rate_limited_total`
    pub http_rate_limited: IntCounter,
    /// `gateway_api_rejections_total`
    pub api_rejections: Counters<ApiRejection>,
    /// `gateway_room_password_checks_total`
    pub room_password_checks: Counters<PasswordResult>,
    /// `gateway_handshakes_total`
    pub handshakes: Counters<HandshakeResult>,
    /// `gateway_handshakes_abandoned_total`
    pub handshakes_abandoned: IntCounter,
    /// `gateway_disconnects_total`; close codes that the gateway does not know count as `other`.
    disconnects: IntCounterVec,
    /// `gateway_frames_received_total`
    pub frames_received: IntCounter,
    /// `gateway_frames_sent_total`
    pub frames_sent: IntCounter,
    /// `gateway_bytes_received_total`
    pub bytes_received: IntCounter,
    /// `gateway_bytes_sent_total`
    pub bytes_sent: IntCounter,
    /// `gateway_input_throttles_total`
    pub input_throttles: Counters<ThrottleReason>,
    /// `gateway_input_rate_limit_closes_total`
    pub input_rate_limit_closes: IntCounter,
    /// `gateway_deflate_handshakes_total`
    pub deflate_handshakes: IntCounter,
    /// `gateway_deflated_messages_total`
    pub deflated_messages: IntCounter,
    /// `gateway_deflate_input_bytes_total`
    pub deflate_input_bytes: IntCounter,
    /// `gateway_deflate_output_bytes_total`
    pub deflate_output_bytes: IntCounter,
    /// `gateway_errors_total`
    pub errors: Counters<ErrorCode>,
    /// `gateway_publishes_total`
    pub publishes: Counters<PublishResult>,
    /// `gateway_publish_seconds`
    pub publish_seconds: Histogram,
    /// `gateway_bus_entries_received_total`
    pub bus_entries_received: Counters<EntryResult>,
    /// `gateway_deliveries_total`
    pub deliveries: IntCounter,
    /// `gateway_ephemeral_events_total`
    pub ephemeral_events: IntCounter,
    /// `gateway_ephemeral_events_dropped_total`
    pub ephemeral_events_dropped: IntCounter,
    /// `gateway_log_repairs_total`
    pub log_repairs: Counters<LogRepairResult>,
    /// `gateway_resumes_total`
    pub resumes: Counters<ResumeSource>,
    /// `gateway_slow_consumers_total`
    pub slow_consumers: IntCounter,
    /// `gateway_mailbox_overflows_total`
    pub mailbox_overflows: IntCounter,
    /// `gateway_rooms`
    pub rooms: IntGauge,
    /// `gateway_inboxes`
    pub inboxes: IntGauge,
    /// `gateway_members`
    pub members: IntGauge,
    /// `gateway_client_read_bytes_total`
    pub client_read_bytes: IntCounter,
    /// `gateway_client_reads_delayed_total`
    pub client_reads_delayed: IntCounter,
    /// `gateway_watched_users`
    pub watched_users: IntGauge,
    /// `gateway_ring_bytes`
    pub ring_bytes: IntGauge,
    /// `gateway_dedup_ids_bytes`
    pub dedup_ids_bytes: IntGauge,
    /// `gateway_dedup_id_buckets_dropped_total`
    pub dedup_id_buckets_dropped: IntCounter,
    /// `gateway_reappended_messages_total`
    pub reappended_messages: IntCounter,
    /// `gateway_fan_out_seconds`
    pub fan_out_seconds: Histogram,
    /// `gateway_bus_up`
    pub bus_up: IntGauge,
    /// `gateway_clock_skew_seconds`
    pub clock_skew_seconds: Gauge,
    /// `gateway_redis_invalid_values_total`
    pub redis_invalid_values: Counters<InvalidValue>,
    /// `gateway_bus_reconnects_total`
    pub bus_reconnects: IntCounter,
    /// `gateway_bus_probe_timeouts_total`
    pub bus_probe_timeouts: IntCounter,
    /// `gateway_recovery_rounds_total`
    pub recovery_rounds: Counters<bool>,
    /// `gateway_log_restores_total`
    pub log_restores: Counters<RestoreResult>,
    /// `gateway_republished_total`
    pub republished: IntCounter,
    /// `gateway_unconfirmed_publishes_dropped_total`
    pub unconfirmed_publishes_dropped: IntCounter,
    /// `gateway_storage_rejections_total`
    pub storage_rejections: Counters<StorageLimit>,
    /// `gateway_redis_memory_used_bytes`
    pub redis_memory_used: IntGauge,
    /// `gateway_redis_memory_max_bytes`
    pub redis_memory_max: IntGauge,
    /// `gateway_redis_memory_pressure`
    pub redis_memory_pressure: IntGauge,
}

impl Metrics {
    /// Creates all metrics in a new registry.
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let process = prometheus::process_collector::ProcessCollector::for_self();
        r.register(Box::new(process)).expect("nothing else is in a fresh registry");
        Self {
            connections: gauge(r, "gateway_connections", "Open client connections: WebSockets and event streams"),
            connection_panics: counter(
                r,
                "gateway_connection_panics_total",
                "Connections and requests ended by a panic in the gateway, which closes only that connection; each one is a bug, the log names the place",
            ),
            tasks: gauge(r, "gateway_tasks", "Live tasks of the async runtime; a rise without more connections or rooms is a leak"),
            http_connections_dropped: counters(
                r,
                "gateway_http_connections_dropped_total",
                "TCP connections dropped before they became a WebSocket or event stream, by `reason`; many `evicted` mean that unauthenticated peers fill the listener",
                "reason",
            ),
            http_rate_limited: counter(
                r,
                "gateway_http_rate_limited_total",
                "Plain HTTP requests answered with 429 because of `limits.http_requests_per_second_per_ip`",
            ),
            api_rejections: counters(
                r,
                "gateway_api_rejections_total",
                "Server API requests rejected because of their key, by `reason`; `wrong_key` may be a guess",
                "reason",
            ),
            room_password_checks: counters(
                r,
                "gateway_room_password_checks_total",
                "Room passwords presented by clients, by `result`; many `wrong` or `rate_limited` may be guesses",
                "result",
            ),
            handshakes: counters(
                r,
                "gateway_handshakes_total",
                "WebSocket and event stream handshakes, by `result`; `unavailable` means that the node is full, draining, or without its bus",
                "result",
            ),
            handshakes_abandoned: counter(
                r,
                "gateway_handshakes_abandoned_total",
                "Accepted handshakes whose client disconnected before the connection was open",
            ),
            disconnects: register(
                r,
                IntCounterVec::new(
                    Opts::new(
                        "gateway_disconnects_total",
                        "Closed connections, by WebSocket close `code`; 1006: no close frame, 4002: client timed out, 4003: client did not read",
                    ),
                    &["code"],
                )
                .expect("name and label are constants of the right form"),
            ),
            frames_received: counter(
                r,
                "gateway_frames_received_total",
                "Text and binary messages received from clients",
            ),
            frames_sent: counter(
                r,
                "gateway_frames_sent_total",
                "WebSocket frames written to clients",
            ),
            bytes_received: counter(
                r,
                "gateway_bytes_received_total",
                "Bytes read from WebSocket connections",
            ),
            bytes_sent: counter(
                r,
                "gateway_bytes_sent_total",
                "Bytes written to WebSocket connections",
            ),
            input_throttles: counters(
                r,
                "gateway_input_throttles_total",
                "Pauses in reading a connection that sends above a rate, by `reason`",
                "reason",
            ),
            input_rate_limit_closes: counter(
                r,
                "gateway_input_rate_limit_closes_total",
                "Connections closed with 1008 `rate_limited` because they kept sending above a rate",
            ),
            deflate_handshakes: counter(
                r,
                "gateway_deflate_handshakes_total",
                "Handshakes that negotiated permessage-deflate",
            ),
            deflated_messages: counter(
                r,
                "gateway_deflated_messages_total",
                "Messages compressed, counted once however many clients receive the compressed form",
            ),
            deflate_input_bytes: counter(
                r,
                "gateway_deflate_input_bytes_total",
                "Bytes of compressed messages before compression",
            ),
            deflate_output_bytes: counter(
                r,
                "gateway_deflate_output_bytes_total",
                "Bytes of compressed messages after compression",
            ),
            errors: counters(
                r,
                "gateway_errors_total",
                "`error` frames sent to clients, by `code`; each `internal` is a bug",
                "code",
            ),
            publishes: counters(
                r,
                "gateway_publishes_total",
                "Messages published through the bus, by `result`; `unavailable` and `overloaded` mean that Redis is away or too slow",
                "result",
            ),
            publish_seconds: histogram(
                r,
                "gateway_publish_seconds",
                "Seconds from publishing a message to the acknowledgement by the bus; a rising 99th percentile means that Redis is slow",
            ),
            bus_entries_received: counters(
                r,
                "gateway_bus_entries_received_total",
                "Log entries received from the bus, by `result`; each `gap` causes a read of the log, `no_lease` means that delivery is suspended",
                "result",
            ),
            deliveries: counter(
                r,
                "gateway_deliveries_total",
                "Log entries placed in the outbox of a member",
            ),
            ephemeral_events: counter(
                r,
                "gateway_ephemeral_events_total",
                "Ephemeral events (presence, typing, read marks, messages of rooms without a log) placed in a connection's outbox",
            ),
            ephemeral_events_dropped: counter(
                r,
                "gateway_ephemeral_events_dropped_total",
                "Ephemeral events dropped because a queue was full: the outbox of the connection, or the mailbox of a shard",
            ),
            log_repairs: counters(
                r,
                "gateway_log_repairs_total",
                "Reads of a log because entries had not been received, by `result`; `reset` means that members lost continuity",
                "result",
            ),
            resumes: counters(
                r,
                "gateway_resumes_total",
                "Joins that resume from a position, by `source` of the missed entries: the node's memory (`ring`) or the bus (`log`)",
                "source",
            ),
            slow_consumers: counter(
                r,
                "gateway_slow_consumers_total",
                "Times a member's outbox was full, so that the member continues from the log",
            ),
            mailbox_overflows: counter(
                r,
                "gateway_mailbox_overflows_total",
                "Bus entries dropped because the mailbox of a shard was full; the shard reads them from the log; a steady rate means that the node is overloaded",
            ),
            rooms: gauge(r, "gateway_rooms", "Rooms that this node is subscribed to"),
            inboxes: gauge(
                r,
                "gateway_inboxes",
                "Inboxes that this node is subscribed to, of users who are connected to it or were until a moment ago",
            ),
            members: gauge(r, "gateway_members", "Memberships of local connections in rooms"),
            client_read_bytes: counter(
                r,
                "gateway_client_read_bytes_total",
                "Bytes read from logs and lists on behalf of clients",
            ),
            client_reads_delayed: counter(
                r,
                "gateway_client_reads_delayed_total",
                "Reads on behalf of clients that waited because of `limits.read_bytes_per_second`",
            ),
            watched_users: gauge(
                r,
                "gateway_watched_users",
                "Users whose status this node watches for its connections",
            ),
            ring_bytes: gauge(r, "gateway_ring_bytes", "Bytes of the newest log entries held in memory; bounded by `hub.ring_bytes_max`"),
            dedup_ids_bytes: gauge(
                r,
                "gateway_dedup_ids_bytes",
                "Bytes of message ids within `dedup.window` held in memory, to restore them to a Redis server that lost them; bounded by `hub.dedup_ids_bytes_max`",
            ),
            dedup_id_buckets_dropped: counter(
                r,
                "gateway_dedup_id_buckets_dropped_total",
                "Groups of message ids forgotten before the end of `dedup.window` because of `hub.dedup_ids_bytes_max`",
            ),
            reappended_messages: counter(
                r,
                "gateway_reappended_messages_total",
                "Messages that a log had lost in a failover and that this node appended again",
            ),
            fan_out_seconds: histogram(
                r,
                "gateway_fan_out_seconds",
                "Seconds of one batch of a shard: entries placed in outboxes and written to sockets",
            ),
            bus_up: gauge(r, "gateway_bus_up", "1 while this node can publish to the bus and receive from it, else 0; at 0 it rejects handshakes"),
            clock_skew_seconds: register(r, Gauge::new("gateway_clock_skew_seconds", "Seconds that this node's clock is ahead of the clock of Redis, negative where it is behind; worry above 1").expect("the name is a constant")),
            redis_invalid_values: counters(
                r,
                "gateway_redis_invalid_values_total",
                "Values read from Redis that no gateway wrote, which were skipped or repaired, by `kind`; another program may write there",
                "kind",
            ),
            bus_reconnects: counter(
                r,
                "gateway_bus_reconnects_total",
                "Connections to Redis that were lost and reopened",
            ),
            bus_probe_timeouts: counter(
                r,
                "gateway_bus_probe_timeouts_total",
                "Times this node did not receive its own probe within 2 s and reopened its Redis connections",
            ),
            recovery_rounds: counters(
                r,
                "gateway_recovery_rounds_total",
                "Rounds in which the nodes agreed on a Redis server, by `complete`: `false` if a process that may hold entries took no part, so that rooms may begin a new epoch",
                "complete",
            ),
            log_restores: counters(
                r,
                "gateway_log_restores_total",
                "Logs compared with a Redis server that may have lost entries, by `result`; `conflict` means that members get a `reset`, `epoch_changed` that they get one or that the room was deleted",
                "result",
            ),
            republished: counter(
                r,
                "gateway_republished_total",
                "Acknowledged publishes sent again to another Redis server because their entries had not been received",
            ),
            unconfirmed_publishes_dropped: counter(
                r,
                "gateway_unconfirmed_publishes_dropped_total",
                "Acknowledged publishes that are no longer kept for republishing because too many were unconfirmed",
            ),
            storage_rejections: counters(
                r,
                "gateway_storage_rejections_total",
                "Requests rejected because they would store more than a limit of docs/limits.md, by `reason`; `memory` means that Redis is above its watermark",
                "reason",
            ),
            redis_memory_used: gauge(
                r,
                "gateway_redis_memory_used_bytes",
                "Bytes of memory used by the Redis server with the least memory left",
            ),
            redis_memory_max: gauge(
                r,
                "gateway_redis_memory_max_bytes",
                "Bytes of memory that this Redis server may use: its `maxmemory`, else `cluster.memory_max`; 0: unknown",
            ),
            redis_memory_pressure: gauge(
                r,
                "gateway_redis_memory_pressure",
                "0 below `cluster.memory_watermark`, 1 above it (new state is rejected), 2 without memory left (logs are cut short)",
            ),
            registry,
            legacy_names: false,
        }
    }

    /// Sets whether renamed metrics are exported under their former names as well.
    pub fn with_legacy_names(mut self, legacy_names: bool) -> Self {
        self.legacy_names = legacy_names;
        self
    }

    /// Counts a connection or request that ended by a panic, and logs at most one a minute.
    pub fn panicked(&self, connection: impl fmt::Display, panic: &str) {
        static LIMITER: LogLimiter = LogLimiter::new();
        self.connection_panics.inc();
        if let Some(suppressed) = LIMITER.should_log() {
            tracing::error!(%connection, panic, suppressed, "a panic closed a connection: a bug in the gateway");
        }
    }

    /// Counts a connection that was closed with `code`.
    pub fn disconnected(&self, code: u16) {
        let known =
            skein_protocol::close::CloseCode::ALL.iter().any(|known| known.number() == code);
        let text = match code {
            1005 | 1006 => code.to_string(),
            _ if known => code.to_string(),
            _ => "other".to_owned(),
        };
        self.disconnects.with_label_values(&[&text]).inc();
    }

    /// Renders all metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let tasks = runtime.metrics().num_alive_tasks();
            self.tasks.set(i64::try_from(tasks).unwrap_or(i64::MAX));
        }
        let mut families = self.registry.gather();
        if self.legacy_names {
            legacy::add(&mut families);
        }
        prometheus::TextEncoder::new()
            .encode_to_string(&families)
            .expect("gathered families are complete")
    }

    /// Returns name, kind and help of every `gateway_` metric, ordered by name.
    pub fn describe(&self) -> Vec<(String, String, String)> {
        self.disconnects.with_label_values(&["1000"]);
        let families = self.registry.gather();
        families
            .iter()
            .filter(|family| family.name().starts_with("gateway_"))
            .map(|family| {
                let kind = format!("{:?}", family.get_field_type()).to_lowercase();
                (family.name().to_owned(), kind, family.help().to_owned())
            })
            .collect()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    registry
        .register(Box::new(collector.clone()))
        .expect("each metric is registered once, in a fresh registry");
    collector
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help).expect("the name is a constant"))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help).expect("the name is a constant"))
}

/// Registers a histogram with buckets from 50 µs (a delivery on one machine) to 5 s (the default of
/// `publish.timeout`).
fn histogram(registry: &Registry, name: &str, help: &str) -> Histogram {
    let buckets = [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5, 1.0, 5.0];
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, Histogram::with_opts(options).expect("the buckets rise"))
}

fn counters<L: Label>(registry: &Registry, name: &str, help: &str, label: &str) -> Counters<L> {
    let vec = IntCounterVec::new(Opts::new(name, help), &[label])
        .expect("name and label are constants of the right form");
    let vec = register(registry, vec);
    let child = |value: &L| (*value, vec.with_label_values(&[value.text()]));
    Counters(L::ALL.iter().map(child).collect())
}
