//! What the gateway counts. The help texts are the documentation; a test compares them with
//! `docs/metrics.md`.
//!
//! The registry is the node's own, not the process's, so that tests can run several. Labels are
//! closed enums: cardinality is decided here and not by traffic. Children of labelled metrics are
//! looked up once, since each look-up costs a hash and a lock.

use std::{collections::HashMap, fmt};

use prometheus::{
    Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    core::Collector,
};
use shared::error::ErrorCode;

use super::{legacy, seldom::Seldom};

/// What became of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HandshakeResult {
    /// 101.
    Accepted,
    /// Not a WebSocket handshake, or a bad one: 4xx.
    Invalid,
    /// The page's origin is not allowed: 403.
    OriginDenied,
    /// An address has too many: 429.
    RateLimited,
    /// The node is full, drains, or its bus is down: 503.
    Unavailable,
}

/// Why a TCP connection was dropped before it was a WebSocket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// Its address has too many.
    PerIpLimit,
    /// It took nothing of an answer for too long.
    WriteTimeout,
    /// Its request's header did not come in time.
    HeaderTimeout,
    /// It was the oldest when there was no place for another one.
    Evicted,
}

/// Which account of its meter a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThrottleReason {
    /// Control frames, small fragments and refused frames.
    Overhead,
    /// The same of its address.
    PerIpOverhead,
    /// Bytes.
    Bytes,
}

/// What became of a publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PublishResult {
    /// Appended.
    Appended,
    /// The id was known.
    Duplicate,
    /// The bus was away for too long.
    Unavailable,
    /// The queue towards the bus was full.
    Overloaded,
    /// The bus refused it.
    Failed,
    /// A bound of durable state was reached: see `gateway_storage_rejections_total`.
    LimitReached,
}

/// What the hub did with an entry that arrived from the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryResult {
    /// Passed on.
    Delivered,
    /// Known already.
    Duplicate,
    /// Something before it is missing.
    Gap,
    /// The log has another epoch.
    EpochChanged,
    /// Nobody here follows the room.
    NotSubscribed,
    /// The node may not pass anything on before it has agreed with the others again.
    NoLease,
}

/// How the hub got what had not arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogRepairResult {
    /// Read from the log, whole.
    Complete,
    /// Not to be had whole: members got a `reset`.
    Reset,
    /// The log could not be read; tried again.
    Failed,
    /// It was compared with what this node holds: two histories shared numbers.
    Reconciled,
}

/// Where the entries came from that a returning client was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResumeSource {
    /// The node's ring.
    Ring,
    /// The log.
    Log,
}

/// What became of a room that this node offered to give back to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RestoreResult {
    /// The server had all of it.
    Unchanged,
    /// It was given back what it lacked.
    Restored,
    /// It has gone on in another epoch.
    EpochChanged,
    /// Two histories share numbers: it goes on in a new epoch.
    Conflict,
    /// The server answered with an error that will not pass.
    Failed,
}

/// Which bound of durable state was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StorageLimit {
    /// Bytes that a user or an address may have kept in a time.
    Bytes,
    /// Rooms that may come to be in a time.
    NewRooms,
    /// Managed rooms of an owner.
    ManagedRooms,
    /// Inboxes of users who were never connected that may be opened in a time.
    UnseenInboxes,
    /// Bytes of one of those.
    UnseenBytes,
    /// Data of all sessions of a user.
    SessionData,
    /// Users whose read marks a room has.
    ReadMarks,
    /// Memory is above the watermark.
    Memory,
}

/// What became of a password of a room that was presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PasswordResult {
    /// It fits.
    Correct,
    /// It does not.
    Wrong,
    /// Too many were wrong, or wait: it was not checked.
    RateLimited,
}

/// Why a request of the server API was refused for its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ApiRejection {
    /// It has none: 401.
    MissingKey,
    /// It has another: 401.
    WrongKey,
    /// The gateway has no API key: 403.
    Disabled,
    /// Its address has made too many such requests: 429.
    RateLimited,
}

/// What stood in Redis that no gateway wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InvalidValue {
    /// A field of a barrier, where the nodes agree on a server.
    Barrier,
    /// An entry of a log.
    Entry,
    /// The position of an id within the dedup window.
    DedupId,
    /// A lease, or the name of an incarnation.
    Lease,
    /// How far a user has read.
    ReadMark,
    /// What was published in a channel of the gateways.
    PubsubMessage,
    /// A field of a log's meta.
    LogMeta,
    /// An order, or what a node has applied.
    Command,
    /// Who is present, or the name of somebody or of a room in an index.
    Presence,
    /// How a room is managed.
    RoomConfig,
    /// A session, or its data.
    Session,
    /// A key of another type than a gateway gives it.
    KeyType,
    /// What a node gave back of what it had published.
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

/// A closed set of label values.
pub trait Label: Copy + Eq + std::hash::Hash + 'static {
    /// Every value.
    const ALL: &'static [Self];
    /// The value as it stands in the exposition.
    fn text(self) -> &'static str;
}

labels!(HandshakeResult: Accepted "accepted", Invalid "invalid", OriginDenied "origin_denied", RateLimited "rate_limited",
    Unavailable "unavailable");
labels!(DropReason: PerIpLimit "per_ip_limit", WriteTimeout "write_timeout", HeaderTimeout "header_timeout", Evicted "evicted");
labels!(ThrottleReason: Overhead "overhead", PerIpOverhead "per_ip_overhead", Bytes "bytes");
labels!(PublishResult: Appended "appended", Duplicate "duplicate", Unavailable "unavailable",
    Overloaded "overloaded", Failed "failed", LimitReached "limit_reached");
labels!(EntryResult: Delivered "delivered", Duplicate "duplicate", Gap "gap", EpochChanged "epoch_changed",
    NotSubscribed "not_subscribed", NoLease "no_lease");
labels!(StorageLimit: Bytes "bytes", NewRooms "new_rooms", ManagedRooms "managed_rooms",
    UnseenInboxes "unseen_inboxes", UnseenBytes "unseen_bytes", SessionData "session_data",
    ReadMarks "read_marks", Memory "memory");
labels!(LogRepairResult: Complete "complete", Reset "reset", Failed "failed", Reconciled "reconciled");
labels!(PasswordResult: Correct "correct", Wrong "wrong", RateLimited "rate_limited");
labels!(ApiRejection: MissingKey "missing_key", WrongKey "wrong_key", Disabled "disabled",
    RateLimited "rate_limited");
labels!(ResumeSource: Ring "ring", Log "log");
labels!(RestoreResult: Unchanged "unchanged", Restored "restored", EpochChanged "epoch_changed", Conflict "conflict",
    Failed "failed");

labels!(InvalidValue: Barrier "barrier", Entry "entry", DedupId "dedup_id", Lease "lease", ReadMark "read_mark",
    PubsubMessage "pubsub_message", LogMeta "log_meta", Command "command", Presence "presence", RoomConfig "room_config",
    Session "session", KeyType "key_type", Unconfirmed "unconfirmed");

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

/// A counter per label value.
#[derive(Debug)]
pub struct Counters<L>(HashMap<L, IntCounter>);

impl<L: Label> Counters<L> {
    /// The counter of `label`.
    pub fn of(&self, label: L) -> &IntCounter {
        &self.0[&label]
    }

    /// All of them together.
    pub fn sum(&self) -> u64 {
        self.0.values().map(IntCounter::get).sum()
    }
}

/// Counts one more in a gauge until it is dropped.
#[derive(Debug)]
pub struct Counted(IntGauge);

impl Counted {
    /// One more in `gauge`.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Everything the gateway counts.
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
    /// `gateway_disconnects_total`; codes a client made up count as `other`.
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
    /// Creates all metrics in a registry of their own.
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let process = prometheus::process_collector::ProcessCollector::for_self();
        r.register(Box::new(process)).expect("nothing else is in a fresh registry");
        Self {
            connections: gauge(r, "gateway_connections", "WebSocket connections that are open"),
            connection_panics: counter(
                r,
                "gateway_connection_panics_total",
                "Connections and requests that ended by a panic of the gateway, a defect: each alone",
            ),
            tasks: gauge(r, "gateway_tasks", "Tasks of the runtime that have not ended"),
            http_connections_dropped: counters(
                r,
                "gateway_http_connections_dropped_total",
                "TCP connections dropped before they were WebSockets, by why",
                "reason",
            ),
            http_rate_limited: counter(
                r,
                "gateway_http_rate_limited_total",
                "Plain HTTP requests answered 429 because their address made too many",
            ),
            api_rejections: counters(
                r,
                "gateway_api_rejections_total",
                "Requests of the server API refused for their key, by reason",
                "reason",
            ),
            room_password_checks: counters(
                r,
                "gateway_room_password_checks_total",
                "Room passwords presented by clients, by result",
                "result",
            ),
            handshakes: counters(
                r,
                "gateway_handshakes_total",
                "WebSocket handshakes, by what became of them",
                "result",
            ),
            handshakes_abandoned: counter(
                r,
                "gateway_handshakes_abandoned_total",
                "Accepted handshakes whose client left before the connection was open",
            ),
            disconnects: register(
                r,
                IntCounterVec::new(
                    Opts::new(
                        "gateway_disconnects_total",
                        "Connections that ended, by close code; 1006 is an end without one",
                    ),
                    &["code"],
                )
                .expect("name and label are constants of the right form"),
            ),
            frames_received: counter(
                r,
                "gateway_frames_received_total",
                "Text and binary messages from clients",
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
                "How often a connection was not read for a while because it was above a rate",
                "reason",
            ),
            input_rate_limit_closes: counter(
                r,
                "gateway_input_rate_limit_closes_total",
                "Connections closed with 1008 rate_limited",
            ),
            deflate_handshakes: counter(
                r,
                "gateway_deflate_handshakes_total",
                "Handshakes in which compression was agreed on",
            ),
            deflated_messages: counter(
                r,
                "gateway_deflated_messages_total",
                "Messages to clients that were compressed, each once for all who get it that way",
            ),
            deflate_input_bytes: counter(
                r,
                "gateway_deflate_input_bytes_total",
                "Bytes of messages that were compressed, before",
            ),
            deflate_output_bytes: counter(
                r,
                "gateway_deflate_output_bytes_total",
                "Bytes of messages that were compressed, after",
            ),
            errors: counters(
                r,
                "gateway_errors_total",
                "Frames answered by `error`, by code",
                "code",
            ),
            publishes: counters(
                r,
                "gateway_publishes_total",
                "Messages handed to the bus, by what became of them",
                "result",
            ),
            publish_seconds: histogram(
                r,
                "gateway_publish_seconds",
                "Time from handing a message to the bus to its answer",
            ),
            bus_entries_received: counters(
                r,
                "gateway_bus_entries_received_total",
                "Entries that arrived from the bus, by what the hub did with them",
                "result",
            ),
            deliveries: counter(
                r,
                "gateway_deliveries_total",
                "Entries placed in the outbox of a member",
            ),
            ephemeral_events: counter(
                r,
                "gateway_ephemeral_events_total",
                "Frames of presence, typing, reading and rooms without a log placed in the outbox of a member",
            ),
            ephemeral_events_dropped: counter(
                r,
                "gateway_ephemeral_events_dropped_total",
                "The same, dropped since the outbox was full",
            ),
            log_repairs: counters(
                r,
                "gateway_log_repairs_total",
                "Reads of a log because something had not arrived, by outcome",
                "result",
            ),
            resumes: counters(
                r,
                "gateway_resumes_total",
                "Joins with a position, by where the missed entries came from",
                "source",
            ),
            slow_consumers: counter(
                r,
                "gateway_slow_consumers_total",
                "Times a member's outbox was full, so that it goes on from the log",
            ),
            mailbox_overflows: counter(
                r,
                "gateway_mailbox_overflows_total",
                "Entries dropped on a full shard mailbox, to be read from the log instead",
            ),
            rooms: gauge(r, "gateway_rooms", "Rooms this node follows"),
            inboxes: gauge(
                r,
                "gateway_inboxes",
                "Inboxes this node follows, of users who are or were connected to it",
            ),
            members: gauge(r, "gateway_members", "Memberships of local connections in rooms"),
            client_read_bytes: counter(
                r,
                "gateway_client_read_bytes_total",
                "Bytes of logs and lists read because clients asked for them",
            ),
            client_reads_delayed: counter(
                r,
                "gateway_client_reads_delayed_total",
                "Reads for clients that waited for `limits.read_bytes_per_second`",
            ),
            watched_users: gauge(
                r,
                "gateway_watched_users",
                "Users whose status this node follows for its connections",
            ),
            ring_bytes: gauge(r, "gateway_ring_bytes", "Bytes of entries held in rings"),
            dedup_ids_bytes: gauge(
                r,
                "gateway_dedup_ids_bytes",
                "Bytes of ids within the dedup window, kept to be given back to a Redis that lost them",
            ),
            dedup_id_buckets_dropped: counter(
                r,
                "gateway_dedup_id_buckets_dropped_total",
                "Buckets of ids within the dedup window that were forgotten for `hub.ids_bytes_max`",
            ),
            reappended_messages: counter(
                r,
                "gateway_reappended_messages_total",
                "Messages that a room's log has lost and that this node appended again",
            ),
            fan_out_seconds: histogram(
                r,
                "gateway_fan_out_seconds",
                "Time of one hub turn: entries placed in outboxes and written",
            ),
            bus_up: gauge(r, "gateway_bus_up", "1 while the bus can be published to and heard"),
            clock_skew_seconds: register(r, Gauge::new("gateway_clock_skew_seconds", "How far this node's clock is ahead of that of Redis, negative where it is behind").expect("the name is a constant")),
            redis_invalid_values: counters(
                r,
                "gateway_redis_invalid_values_total",
                "Values read from Redis that no gateway wrote, which were skipped or repaired, by what they were to be",
                "kind",
            ),
            bus_reconnects: counter(
                r,
                "gateway_bus_reconnects_total",
                "Links to the bus that were lost and made again",
            ),
            bus_probe_timeouts: counter(
                r,
                "gateway_bus_probe_timeouts_total",
                "Times this node did not hear its own probe within 2 s, and made both links again",
            ),
            recovery_rounds: counters(
                r,
                "gateway_recovery_rounds_total",
                "Times the nodes agreed on a Redis server, by whether everybody was heard",
                "complete",
            ),
            log_restores: counters(
                r,
                "gateway_log_restores_total",
                "Rooms offered to a Redis server that may have lost some of them, by what became of them",
                "result",
            ),
            republished: counter(
                r,
                "gateway_republished_total",
                "Acknowledged publishes sent again to another Redis server, since they had not come by",
            ),
            unconfirmed_publishes_dropped: counter(
                r,
                "gateway_unconfirmed_publishes_dropped_total",
                "Acknowledged publishes forgotten early, since too many had not come by",
            ),
            storage_rejections: counters(
                r,
                "gateway_storage_rejections_total",
                "Requests refused because they would have kept more than a bound of docs/limits.md allows",
                "reason",
            ),
            redis_memory_used: gauge(
                r,
                "gateway_redis_memory_used_bytes",
                "Memory used by the Redis server with the least left",
            ),
            redis_memory_max: gauge(
                r,
                "gateway_redis_memory_max_bytes",
                "Memory that server may use: its `maxmemory`, else `cluster.memory_max`; 0: not known",
            ),
            redis_memory_pressure: gauge(
                r,
                "gateway_redis_memory_pressure",
                "0 below `cluster.memory_watermark`, 1 above it (new state is refused), 2 with no memory left",
            ),
            registry,
            legacy_names: false,
        }
    }

    /// Whether renamed metrics are exported under their former names as well.
    pub fn with_legacy_names(mut self, legacy_names: bool) -> Self {
        self.legacy_names = legacy_names;
        self
    }

    /// Counts a connection or request that ended by a panic, and logs it once a minute.
    pub fn panicked(&self, connection: impl fmt::Display, panic: &str) {
        static SELDOM: Seldom = Seldom::new();
        self.connection_panics.inc();
        if let Some(unsaid) = SELDOM.is_due() {
            tracing::error!(%connection, panic, unsaid, "a connection was closed by a panic");
        }
    }

    /// Counts a connection that ended with `code`.
    pub fn disconnected(&self, code: u16) {
        let known = shared::close::CloseCode::ALL.iter().any(|known| known.number() == code);
        let text = match code {
            1005 | 1006 => code.to_string(),
            _ if known => code.to_string(),
            _ => "other".to_owned(),
        };
        self.disconnects.with_label_values(&[&text]).inc();
    }

    /// All metrics in Prometheus' text format.
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

    /// Name, kind and help of every metric of the gateway's own, in the order of their names.
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

/// Buckets from 50 µs to 5 s: from a delivery on one machine to `publish.wait`.
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
