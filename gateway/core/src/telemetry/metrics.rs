//! Metrics of the gateway. The help texts are the documentation; a test compares them with
//! `docs/metrics.md`.
//!
//! The registry belongs to the node, not to the process, so that tests can run several nodes.
//! Labels are closed enums: the code bounds the cardinality, not the traffic. Children of labelled
//! metrics are looked up once, since each look-up costs a hash and a lock.

use std::{collections::BTreeSet, fmt, time::Duration};

use parking_lot::Mutex;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};
use skein_protocol::{close::CloseCode, error::ErrorCode};

use super::{legacy, log_limiter::LogLimiter, top::TopSenders};

mod labels;
mod process;

pub use labels::{
    ApiRejection, ArchiveResult, CloseSide, DropReason, EntryKind, EntryResult, ErrorFault,
    FrameKind, HandshakeRefusal, HandshakeResult, InvalidValue, JoinResult, Label, LogRepairResult,
    PasswordResult, Persistence, PublishOutcome, PublishResult, RestoreResult, ResumeSource,
    SpanResult, StorageLimit, ThrottleReason, Transport, UnreadyReason,
};

/// The children of a metric, one per label value. A comparison of small numbers finds one: no hash,
/// no lock.
#[derive(Debug)]
pub struct Children<L, C>(Box<[(L, C)]>);

impl<L: Label, C> Children<L, C> {
    fn new(child: impl Fn(&str) -> C) -> Self {
        Self(L::ALL.iter().map(|value| (*value, child(value.text()))).collect())
    }

    /// Returns the child of `label`.
    pub fn of(&self, label: L) -> &C {
        let found = self.0.iter().find(|(value, _)| *value == label);
        &found.expect("`Label::ALL` has every value").1
    }
}

/// One counter per label value.
pub type Counters<L> = Children<L, IntCounter>;
/// One gauge per label value.
pub type Gauges<L> = Children<L, IntGauge>;
/// One histogram per label value.
pub type Histograms<L> = Children<L, Histogram>;

impl<L: Label> Counters<L> {
    /// Returns the sum over all label values.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(|(_, counter)| counter.get()).sum()
    }
}

/// Gauges whose labels are values of the cluster: names of nodes, versions. The caller bounds their
/// number, and replaces all of them at once.
#[derive(Debug)]
pub struct NamedGauges {
    vec: GaugeVec,
    names: Mutex<BTreeSet<Vec<String>>>,
}

impl NamedGauges {
    /// Exports `values`, each with its label values, and removes all others.
    pub fn replace<'a>(&self, values: impl IntoIterator<Item = (Vec<&'a str>, f64)>) {
        let names = &mut *self.names.lock();
        let mut gone = std::mem::take(names);
        for (labels, value) in values {
            self.vec.with_label_values(&labels).set(value);
            let labels: Vec<String> = labels.into_iter().map(str::to_owned).collect();
            gone.remove(&labels);
            names.insert(labels);
        }
        for labels in gone {
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            // It was exported a moment ago.
            let _ = self.vec.remove_label_values(&labels);
        }
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

/// Declares the metrics of a node: the fields of [`Metrics`], and `register`, which creates them. The
/// comment of a field is its help text.
macro_rules! metrics {
    ($(
        $(#[doc = $help:literal])+
        $vis:vis $name:ident: $type:ty = $kind:ident($exported:literal $(, $argument:expr)*);
    )+) => {
        /// Exported name, constructor and help of every metric, as declared.
        const DECLARED: &[(&str, &str, &str)] =
            &[$(($exported, stringify!($kind), concat!($($help),+))),+];

        /// All metrics of one node.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            legacy_names: bool,
            /// The users and addresses that sent most, by name: too many for labels.
            pub senders: TopSenders,
            $($(#[doc = $help])+ $vis $name: $type,)+
        }

        impl Metrics {
            fn register(registry: Registry) -> Self {
                Self {
                    $($name: $kind(
                        &registry, concat!($($help),+).trim_start(), $exported, $($argument),*
                    ),)+
                    registry,
                    legacy_names: false,
                    senders: TopSenders::default(),
                }
            }
        }
    };
}

metrics! {
    /// 1, with the name of this node, its version, and the commit it was built from
    info: NamedGauges = named_gauges("gateway_info", &["node", "version", "commit"]);
    /// 1 while `/ready` answers 200, else 0
    ready: IntGauge = gauge("gateway_ready");
    /// 1 for each `reason` for which `/ready` answers 503, else 0
    not_ready: Gauges<UnreadyReason> = gauges("gateway_not_ready", "reason");
    /// Live nodes of the cluster, as this node knows them; 0 while it does not know
    pub nodes: IntGauge = gauge("gateway_nodes");
    /// 1 for each `node` that has ended or been cut off without an orderly stop within the last 15
    /// minutes, and has not come back
    pub node_missing: NamedGauges = named_gauges("gateway_node_missing", &["node"]);
    /// Open client connections: WebSockets and event streams
    pub connections: IntGauge = gauge("gateway_connections");
    /// Client connections that this node accepts: `limits.connections_max`
    pub connections_max: IntGauge = gauge("gateway_connections_max");
    /// Open client connections by `transport`: `websocket`, or `sse` for event streams
    pub transport_connections: Gauges<Transport> =
        gauges("gateway_transport_connections", "transport");
    /// Users with a connection to this node
    pub users: IntGauge = gauge("gateway_users");
    /// Connections and requests ended by a panic in the gateway, which closes only that connection;
    /// each one is a bug, the log names the place
    pub connection_panics: IntCounter = counter("gateway_connection_panics_total");
    /// Live tasks of the async runtime; a rise without more connections or rooms is a leak
    tasks: IntGauge = gauge("gateway_tasks");
    /// TCP connections dropped before they became a WebSocket or event stream, by `reason`; many
    /// `evicted` mean that unauthenticated peers fill the listener
    pub http_connections_dropped: Counters<DropReason> =
        counters("gateway_http_connections_dropped_total", "reason");
    /// Plain HTTP requests answered with 429 because of `limits.http_requests_per_second_per_ip`
    pub http_rate_limited: IntCounter = counter("gateway_http_rate_limited_total");
    /// Server API requests rejected because of their key, by `reason`; `wrong_key` may be a guess
    pub api_rejections: Counters<ApiRejection> = counters("gateway_api_rejections_total", "reason");
    /// Room passwords presented by clients, by `result`; many `wrong` or `rate_limited` may be
    /// guesses
    pub room_password_checks: Counters<PasswordResult> =
        counters("gateway_room_password_checks_total", "result");
    /// WebSocket and event stream handshakes, by `result`; `unavailable` means that the node is
    /// full, draining, or without its bus
    pub handshakes: Counters<HandshakeResult> = counters("gateway_handshakes_total", "result");
    /// Handshakes that opened no connection, by `cause`: `full`, `draining`, `bus`, `not_ready` and
    /// `accept_rate` are of this node; `unauthenticated` and `connections_per_user` WebSockets get
    /// 101 and a close frame
    pub handshakes_refused: Counters<HandshakeRefusal> =
        counters("gateway_handshakes_refused_total", "cause");
    /// Connections that continue the session of an earlier connection
    pub reconnects: IntCounter = counter("gateway_reconnects_total");
    /// Accepted handshakes whose client disconnected before the connection was open
    pub handshakes_abandoned: IntCounter = counter("gateway_handshakes_abandoned_total");
    /// Closed connections, by WebSocket close `code` (1006: no close frame, 4002: client timed out,
    /// 4003: client did not read), by `reason` if the gateway closed it, and by `side`: `client`,
    /// `gateway`, or `network` for a connection that ended without a close
    disconnects: IntCounterVec =
        counter_vec("gateway_disconnects_total", &["code", "reason", "side"]);
    /// Connections that this node sent to other nodes because it had more than its share
    pub rebalanced_connections: IntCounter = counter("gateway_rebalanced_connections_total");
    /// Text and binary messages received from clients
    pub frames_received: IntCounter = counter("gateway_frames_received_total");
    /// Seconds from reading a frame of a client to its complete handling, by `type`; of a frame that
    /// arrived alone, and for a frame that waits, until its reply is queued
    pub frame_seconds: Histograms<FrameKind> =
        histograms("gateway_frame_seconds", "type", &LATENCY_BUCKETS);
    /// Seconds from a ping of the gateway to the client's pong
    pub ping_seconds: Histogram = histogram("gateway_ping_seconds", &ROUND_TRIP_BUCKETS);
    /// WebSocket frames written to clients
    pub frames_sent: IntCounter = counter("gateway_frames_sent_total");
    /// Bytes read from WebSocket connections
    pub bytes_received: IntCounter = counter("gateway_bytes_received_total");
    /// Bytes written to WebSocket connections
    pub bytes_sent: IntCounter = counter("gateway_bytes_sent_total");
    /// Pauses in reading a connection that sends above a rate, by `reason`
    pub input_throttles: Counters<ThrottleReason> =
        counters("gateway_input_throttles_total", "reason");
    /// Connections closed with 1008 `rate_limited` because they kept sending above a rate
    pub input_rate_limit_closes: IntCounter = counter("gateway_input_rate_limit_closes_total");
    /// Handshakes that negotiated permessage-deflate
    pub deflate_handshakes: IntCounter = counter("gateway_deflate_handshakes_total");
    /// Messages compressed, counted once however many clients receive the compressed form
    pub deflated_messages: IntCounter = counter("gateway_deflated_messages_total");
    /// Bytes of compressed messages before compression
    pub deflate_input_bytes: IntCounter = counter("gateway_deflate_input_bytes_total");
    /// Bytes of compressed messages after compression
    pub deflate_output_bytes: IntCounter = counter("gateway_deflate_output_bytes_total");
    /// `error` frames sent to clients, by `code` and whose `fault` it is, `client` or `server`; each
    /// `internal` is a bug
    pub errors: Counters<ErrorCode> = error_counters("gateway_errors_total");
    /// Messages published through the bus, by `result`; `unavailable` and `overloaded` mean that
    /// Redis is away or too slow
    pub publishes: Counters<PublishResult> = counters("gateway_publishes_total", "result");
    /// Messages that clients and the application sent, by `kind`, accepted or not by the bus
    pub messages_received: Counters<EntryKind> =
        counters("gateway_messages_received_total", "kind");
    /// Messages placed in outboxes, by `kind`: log entries, without messages of rooms without a log
    pub messages_sent: Counters<EntryKind> = counters("gateway_messages_sent_total", "kind");
    /// Seconds from the acceptance of a message, on any node, until it was written to the sockets of
    /// this node; of one message per batch. Between nodes it includes the difference of their
    /// clocks: see `gateway_clock_skew_seconds`
    pub delivery_seconds: Histogram = histogram("gateway_delivery_seconds", &LATENCY_BUCKETS);
    /// Bytes of publishes that wait for Redis
    pub publish_queue_bytes: IntGauge = gauge("gateway_publish_queue_bytes");
    /// Seconds from publishing a message to the result of the bus, by `result`: `failed` are
    /// timeouts and errors of the bus, `rejected` are limits; a rising 99th percentile of
    /// `acknowledged` means that Redis is slow
    pub publish_seconds: Histograms<PublishOutcome> =
        histograms("gateway_publish_seconds", "result", &LATENCY_BUCKETS);
    /// Log entries received from the bus, by `result`; each `gap` causes a read of the log,
    /// `no_lease` means that delivery is suspended
    pub bus_entries_received: Counters<EntryResult> =
        counters("gateway_bus_entries_received_total", "result");
    /// Log entries placed in the outbox of a member
    pub deliveries: IntCounter = counter("gateway_deliveries_total");
    /// Ephemeral events (presence, typing, read marks, messages of rooms without a log) placed in a
    /// connection's outbox
    pub ephemeral_events: IntCounter = counter("gateway_ephemeral_events_total");
    /// Ephemeral events dropped because a queue was full: the outbox of the connection, or the
    /// mailbox of a shard
    pub ephemeral_events_dropped: IntCounter = counter("gateway_ephemeral_events_dropped_total");
    /// Reads of a log that brought entries which had not been received, by `result`; `reset` means
    /// that members lost continuity
    pub log_repairs: Counters<LogRepairResult> = counters("gateway_log_repairs_total", "result");
    /// Joins, of rooms and of inboxes with a position: `new` without a position, `resumed` from it,
    /// `not_resumed` if the log no longer continues it, by `result`
    pub joins: Counters<JoinResult> = counters("gateway_joins_total", "result");
    /// Joins that resumed from a position, by `source` of the missed entries: the node's memory
    /// (`ring`) or the bus (`log`)
    pub resumes: Counters<ResumeSource> = counters("gateway_resumes_total", "source");
    /// Times a member's outbox was full, so that the member continues from the log
    pub slow_consumers: IntCounter = counter("gateway_slow_consumers_total");
    /// Messages of the bus dropped because the mailbox of a shard was full; the shard reads the
    /// entries from their logs; a steady rate means that the node is overloaded
    pub mailbox_overflows: IntCounter = counter("gateway_mailbox_overflows_total");
    /// Bytes that wait in the outboxes of all connections of this node
    pub outbox_bytes: IntGauge = gauge("gateway_outbox_bytes");
    /// Bytes that wait in the outbox that has most; bounded by `limits.outbox_bytes`
    pub outbox_largest_bytes: IntGauge = gauge("gateway_outbox_largest_bytes");
    /// Frames that wait in the outboxes of all connections of this node
    pub outbox_frames: IntGauge = gauge("gateway_outbox_frames");
    /// Messages of the bus that wait in the mailboxes of all shards
    pub mailbox_messages: IntGauge = gauge("gateway_mailbox_messages");
    /// Messages of the bus that wait in the mailbox that has most; it drops them above 16,384
    pub mailbox_largest_messages: IntGauge = gauge("gateway_mailbox_largest_messages");
    /// 1 while the archive takes entries, 0 while it is unavailable, -1 without an archive
    pub archive_up: IntGauge = gauge("gateway_archive_up");
    /// Entries that wait for the archive, in Redis or in this node's memory
    pub archive_lag_entries: IntGauge = gauge("gateway_archive_lag_entries");
    /// Age of the oldest entry that waits for the archive
    pub archive_oldest_seconds: Gauge = float_gauge("gateway_archive_oldest_seconds");
    /// Rooms with entries for which the archive stream had no space: their logs are copied later
    pub archive_rooms_behind: IntGauge = gauge("gateway_archive_rooms_behind");
    /// Entries handled for the archive by this node, by `result`; `rejected` ones are not in it
    pub archive_entries: Counters<ArchiveResult> =
        counters("gateway_archive_entries_total", "result");
    /// Seconds until the archive has committed a batch of entries, while it is away included
    pub archive_write_seconds: Histogram =
        histogram("gateway_archive_write_seconds", &LATENCY_BUCKETS);
    /// Rooms that this node is subscribed to
    pub rooms: IntGauge = gauge("gateway_rooms");
    /// Inboxes that this node is subscribed to, of users who are connected to it or were until a
    /// moment ago
    pub inboxes: IntGauge = gauge("gateway_inboxes");
    /// Memberships of local connections in rooms
    pub members: IntGauge = gauge("gateway_members");
    /// Bytes read from logs and lists on behalf of clients
    pub client_read_bytes: IntCounter = counter("gateway_client_read_bytes_total");
    /// Reads on behalf of clients that waited because of `limits.read_bytes_per_second`
    pub client_reads_delayed: IntCounter = counter("gateway_client_reads_delayed_total");
    /// Users whose status this node watches for its connections
    pub watched_users: IntGauge = gauge("gateway_watched_users");
    /// Bytes of the newest log entries held in memory; bounded by `hub.ring_bytes_max`
    pub ring_bytes: IntGauge = gauge("gateway_ring_bytes");
    /// Bytes of message ids within `dedup.window` held in memory, to restore them to a Redis server
    /// that lost them; bounded by `hub.dedup_ids_bytes_max`
    pub dedup_ids_bytes: IntGauge = gauge("gateway_dedup_ids_bytes");
    /// Groups of message ids forgotten before the end of `dedup.window` because of
    /// `hub.dedup_ids_bytes_max`
    pub dedup_id_buckets_dropped: IntCounter = counter("gateway_dedup_id_buckets_dropped_total");
    /// Messages that a log had lost in a failover and that this node appended again
    pub reappended_messages: IntCounter = counter("gateway_reappended_messages_total");
    /// Server API requests with a valid key, by `method`, `route` and `status`
    api_requests: IntCounterVec =
        counter_vec("gateway_api_requests_total", &["method", "route", "status"]);
    /// Seconds of a server API request with a valid key, by `method` and `route`
    api_request_seconds: HistogramVec =
        histogram_vec("gateway_api_request_seconds", &["method", "route"], &LATENCY_BUCKETS);
    /// Seconds of one batch of a shard: entries placed in outboxes and written to sockets
    pub fan_out_seconds: Histogram = histogram("gateway_fan_out_seconds", &LATENCY_BUCKETS);
    /// 1 while this node can publish to the bus and receive from it, else 0; at 0 it rejects
    /// handshakes
    pub bus_up: IntGauge = gauge("gateway_bus_up");
    /// Seconds since this node last received its own probe through Redis, sent every 0.5 s; for the
    /// server of which that was longest ago
    pub bus_probe_age_seconds: Gauge = float_gauge("gateway_bus_probe_age_seconds");
    /// Seconds that the last canary of the node `from` took to this node through Redis, by the clock
    /// of Redis; a node sends one every 5 s, and is not exported 30 s after the last one
    pub canary_seconds: NamedGauges = named_gauges("gateway_canary_seconds", &["from"]);
    /// Seconds since this node last renewed its lease; the lease is lost after `cluster.lease`
    pub lease_age_seconds: Gauge = float_gauge("gateway_lease_age_seconds");
    /// Times this node lost its lease: it suspends delivery until the cluster agrees again
    pub leases_lost: IntCounter = counter("gateway_leases_lost_total");
    /// Seconds that this node's clock is ahead of the clock of Redis, negative where it is behind;
    /// worry above 1
    pub clock_skew_seconds: Gauge = float_gauge("gateway_clock_skew_seconds");
    /// Values read from Redis that no gateway wrote, which were skipped or repaired, by `kind`;
    /// another program may write there
    pub redis_invalid_values: Counters<InvalidValue> =
        counters("gateway_redis_invalid_values_total", "kind");
    /// Connections to Redis that were lost and reopened
    pub bus_reconnects: IntCounter = counter("gateway_bus_reconnects_total");
    /// Times this node did not receive its own probe within 2 s and reopened its Redis connections
    pub bus_probe_timeouts: IntCounter = counter("gateway_bus_probe_timeouts_total");
    /// Rounds in which the nodes agreed on a Redis server, by `complete`: `false` if a process that
    /// may hold entries took no part, so that rooms may begin a new epoch
    pub recovery_rounds: Counters<bool> = counters("gateway_recovery_rounds_total", "complete");
    /// Logs compared with a Redis server that may have lost entries, by `result`; `conflict` means
    /// that members get a `reset`, `epoch_changed` that they get one or that the room was deleted
    pub log_restores: Counters<RestoreResult> = counters("gateway_log_restores_total", "result");
    /// Acknowledged publishes sent again to another Redis server because their entries had not been
    /// received
    pub republished: IntCounter = counter("gateway_republished_total");
    /// Acknowledged publishes that are no longer kept for republishing because too many were
    /// unconfirmed
    pub unconfirmed_publishes_dropped: IntCounter =
        counter("gateway_unconfirmed_publishes_dropped_total");
    /// Requests rejected because they would store more than a limit of docs/limits.md, by `reason`;
    /// `memory` means that Redis is above its watermark
    pub storage_rejections: Counters<StorageLimit> =
        counters("gateway_storage_rejections_total", "reason");
    /// Bytes of memory used by the Redis server with the least memory left
    pub redis_memory_used: IntGauge = gauge("gateway_redis_memory_used_bytes");
    /// Bytes of memory that this Redis server may use: its `maxmemory`, else `cluster.memory_max`;
    /// 0: unknown
    pub redis_memory_max: IntGauge = gauge("gateway_redis_memory_max_bytes");
    /// 0 below `cluster.memory_watermark`, 1 above it (new state is rejected), 2 without memory
    /// left (logs are cut short)
    pub redis_memory_pressure: IntGauge = gauge("gateway_redis_memory_pressure");
    /// Seconds of a PING to a Redis server, measured every second
    pub redis_round_trip_seconds: Histogram =
        histogram("gateway_redis_round_trip_seconds", &LATENCY_BUCKETS);
    /// 1 for each `version` of the Redis servers
    pub redis_info: NamedGauges = named_gauges("gateway_redis_info", &["version"]);
    /// 1 if the `maxmemory-policy` of a Redis server evicts keys, and acknowledged messages with
    /// them, else 0
    pub redis_evicts_keys: IntGauge = gauge("gateway_redis_evicts_keys");
    /// 1 if every Redis server persists its data, by `kind`: `aof` for the append-only file, `rdb`
    /// for snapshots; 0 if not, -1 if Redis does not say
    pub redis_persistence: Gauges<Persistence> = gauges("gateway_redis_persistence", "kind");
    /// Replicas of the Redis server that has the fewest
    pub redis_replicas: IntGauge = gauge("gateway_redis_replicas");
    /// Seconds since the last acknowledgement of the replica that is furthest behind; 0 without
    /// replicas
    pub redis_replica_lag_seconds: IntGauge = gauge("gateway_redis_replica_lag_seconds");
    /// Bytes of the replication stream that the replica that is furthest behind has not
    /// acknowledged; 0 without replicas
    pub redis_replica_lag_bytes: IntGauge = gauge("gateway_redis_replica_lag_bytes");
    /// Spans of traces, by `result`: `exported` to the collector, `dropped` because the queue to it
    /// was full, `failed` because it refused or did not answer
    pub trace_spans: Counters<SpanResult> = counters("gateway_trace_spans_total", "result");
    /// Traces requested by a `traceparent` beyond the rate of such requests, so that the sampling
    /// ratio decided; a steady rate means that a caller marks all its calls as sampled
    pub trace_requests_ignored: IntCounter = counter("gateway_trace_requests_ignored_total");
}

impl Metrics {
    /// Creates all metrics in a new registry.
    pub fn new() -> Self {
        let registry = Registry::new();
        let process = prometheus::process_collector::ProcessCollector::for_self();
        registry.register(Box::new(process)).expect("nothing else is in a fresh registry");
        let metrics = Self::register(registry);
        // A series that begins with its first increment has no increase: alerts would miss the first
        // surge.
        let codes = CloseCode::ALL.map(CloseCode::number).into_iter().chain([1005]);
        let by_either = codes.flat_map(|code| {
            [CloseSide::Client, CloseSide::Gateway].map(|side| (code, "none", side))
        });
        let with_reason = labels::CLOSES.iter();
        let with_reason = with_reason.map(|(code, reason)| (*code, *reason, CloseSide::Gateway));
        let lost = (1006, "none", CloseSide::Network);
        for (code, reason, side) in by_either.chain(with_reason).chain([lost]) {
            let code = code.to_string();
            metrics.disconnects.with_label_values(&[code.as_str(), reason, side.text()]);
        }
        metrics
    }

    /// Exports the name of this node, its version and commit.
    pub fn set_info(&self, node: &str, version: &str, commit: &str) {
        self.info.replace([(vec![node, version, commit], 1.0)]);
    }

    /// Exports whether this node is ready; `failing` are the checks that fail, as `/ready` lists
    /// them.
    pub fn set_failing(&self, failing: &[&str]) {
        self.ready.set(i64::from(failing.is_empty()));
        for reason in UnreadyReason::ALL {
            self.not_ready.of(*reason).set(i64::from(failing.contains(&reason.text())));
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

    /// Counts a handshake that opened no connection.
    pub fn refused(&self, cause: HandshakeRefusal) {
        self.handshakes.of(cause.into()).inc();
        self.handshakes_refused.of(cause).inc();
    }

    /// Counts a request of the server API. `route` is a declared one.
    pub fn api_request(&self, method: &str, route: &str, status: u16, took: Duration) {
        let labels = [method, route, &status.to_string()];
        self.api_requests.with_label_values(&labels).inc();
        let seconds = took.as_secs_f64();
        self.api_request_seconds.with_label_values(&labels[..2]).observe(seconds);
    }

    /// Counts a connection that `side` closed with `code`, for a `reason` if it was the gateway.
    pub fn disconnected(&self, code: u16, reason: &str, side: CloseSide) {
        let known = CloseCode::ALL.iter().any(|known| known.number() == code);
        let text = match code {
            1005 | 1006 => code.to_string(),
            _ if known => code.to_string(),
            _ => "other".to_owned(),
        };
        let reason = match side {
            CloseSide::Gateway => labels::close_reason(reason),
            CloseSide::Client | CloseSide::Network => "none",
        };
        self.disconnects.with_label_values(&[&text, reason, side.text()]).inc();
    }

    /// Renders all metrics in the Prometheus text format.
    pub fn render(&self) -> String {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let tasks = runtime.metrics().num_alive_tasks();
            self.tasks.set(i64::try_from(tasks).unwrap_or(i64::MAX));
        }
        let mut families = self.registry.gather();
        process::refine_cpu_time(&mut families);
        if self.legacy_names {
            legacy::add(&mut families);
        }
        prometheus::TextEncoder::new()
            .encode_to_string(&families)
            .expect("gathered families are complete")
    }

    /// Returns name, kind and help of every `gateway_` metric, ordered by name.
    pub fn describe() -> Vec<(&'static str, &'static str, &'static str)> {
        let kind = |constructor: &str| match constructor {
            "counter" | "counters" | "counter_vec" | "error_counters" => "counter",
            "histogram" | "histograms" | "histogram_vec" => "histogram",
            _ => "gauge",
        };
        let described = |(name, constructor, help): &(&'static str, &str, &'static str)| {
            (*name, kind(constructor), help.trim_start())
        };
        let mut described: Vec<_> = DECLARED.iter().map(described).collect();
        described.sort_unstable();
        described
    }

    /// Returns the table of all metrics in `docs/metrics.md`.
    pub fn table() -> String {
        let mut table = String::from("| metric | kind | what |\n| --- | --- | --- |\n");
        for (name, kind, help) in Self::describe() {
            table += &format!("| `{name}` | {kind} | {help} |\n");
        }
        table
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

fn counter(registry: &Registry, help: &str, name: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help).expect("the name is a constant"))
}

fn gauge(registry: &Registry, help: &str, name: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help).expect("the name is a constant"))
}

fn float_gauge(registry: &Registry, help: &str, name: &str) -> Gauge {
    register(registry, Gauge::new(name, help).expect("the name is a constant"))
}

fn counter_vec(registry: &Registry, help: &str, name: &str, labels: &[&str]) -> IntCounterVec {
    let vec = IntCounterVec::new(Opts::new(name, help), labels);
    register(registry, vec.expect("name and labels are constants of the right form"))
}

fn error_counters(registry: &Registry, help: &str, name: &str) -> Counters<ErrorCode> {
    let vec = counter_vec(registry, help, name, &["code", "fault"]);
    let child = |code: &ErrorCode| {
        (*code, vec.with_label_values(&[code.as_str(), ErrorFault::of(*code).text()]))
    };
    Children(ErrorCode::ALL.iter().map(child).collect())
}

/// Buckets from 50 µs (a delivery on one machine) to 5 s (the default of `publish.timeout`), with one
/// at 0.25 s, the threshold of the alert.
const LATENCY_BUCKETS: [f64; 15] =
    [5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Buckets of round trips to clients, from a data centre to a satellite, and to the interval of pings.
const ROUND_TRIP_BUCKETS: [f64; 12] =
    [1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 25.0];

fn histogram(registry: &Registry, help: &str, name: &str, buckets: &[f64]) -> Histogram {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, Histogram::with_opts(options).expect("the buckets rise"))
}

fn histograms<L: Label>(
    registry: &Registry,
    help: &str,
    name: &str,
    label: &str,
    buckets: &[f64],
) -> Histograms<L> {
    let vec = histogram_vec(registry, help, name, &[label], buckets);
    Children::new(|value| vec.with_label_values(&[value]))
}

fn histogram_vec(
    registry: &Registry,
    help: &str,
    name: &str,
    labels: &[&str],
    buckets: &[f64],
) -> HistogramVec {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    register(registry, HistogramVec::new(options, labels).expect("the buckets rise"))
}

fn gauges<L: Label>(registry: &Registry, help: &str, name: &str, label: &str) -> Gauges<L> {
    let vec = IntGaugeVec::new(Opts::new(name, help), &[label]);
    let vec = register(registry, vec.expect("name and label are constants of the right form"));
    Children::new(|value| vec.with_label_values(&[value]))
}

fn named_gauges(registry: &Registry, help: &str, name: &str, labels: &[&str]) -> NamedGauges {
    let vec = GaugeVec::new(Opts::new(name, help), labels);
    let vec = register(registry, vec.expect("name and labels are constants of the right form"));
    NamedGauges { vec, names: Mutex::default() }
}

fn counters<L: Label>(registry: &Registry, help: &str, name: &str, label: &str) -> Counters<L> {
    let vec = counter_vec(registry, help, name, &[label]);
    Children::new(|value| vec.with_label_values(&[value]))
}
