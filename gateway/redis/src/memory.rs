//! The memory pressure of each server: above a watermark the bus stores nothing new, so that
//! publishes to existing logs continue.
//!
//! Each server is polled every [`POLL_INTERVAL`]. A server that rejects a publish because it is
//! full counts as full until the next reply. Above the watermark, `append.lua` lets a log take no
//! more memory than before and creates none; new rooms, managed rooms and session data are
//! rejected; sessions of users that had none are kept for minutes.
//!
//! The same poll brings the other metrics of a server ([`ServerReports`]).

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use redis::RedisResult;
use tokio::time::Instant;

use super::{
    server::RedisServer,
    server_report::{ServerReport, ServerReports},
};
use skein_core::{bus::StorageLimits, drain::Tasks, telemetry::metrics::Metrics};

/// How often a server is polled.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How far below the watermark memory has to be, in percent of all, before the pressure ends.
/// Without this it would change with every message.
const HYSTERESIS_PERCENT: u64 = 3;
/// One in this many polls reads settings.
const SETTINGS_EVERY: u32 = 5;
/// How often a warning is logged above the watermark.
const LOG_EVERY: Duration = Duration::from_secs(60);
/// Retention of the sessions of a user that had none, above the watermark.
pub(super) const NEW_SESSIONS_TTL: Duration = Duration::from_secs(10 * 60);

/// The memory pressure of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Pressure {
    /// Below the watermark, or not known.
    #[default]
    None,
    /// Above the watermark.
    High,
    /// No memory is left.
    Full,
}

impl Pressure {
    /// The argument of scripts.
    pub(super) fn argument(self) -> &'static str {
        match self {
            Self::None => "",
            Self::High => "high",
            Self::Full => "full",
        }
    }

    pub(super) fn is_high(self) -> bool {
        self != Self::None
    }
}

/// The memory pressure of one server, as far as known.
#[derive(Debug, Default)]
pub(super) struct ServerMemory(AtomicU8);

impl ServerMemory {
    pub(super) fn pressure(&self) -> Pressure {
        match self.0.load(Ordering::Relaxed) {
            0 => Pressure::None,
            1 => Pressure::High,
            _ => Pressure::Full,
        }
    }

    /// Records that the server has rejected a write because it is full.
    pub(super) fn found_full(&self) {
        self.set(Pressure::Full);
    }

    fn set(&self, pressure: Pressure) {
        self.0.store(pressure as u8, Ordering::Relaxed);
    }
}

/// The memory usage of a server: bytes used, and the most it may use, 0 for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct MemoryUsage {
    used: u64,
    max: u64,
}

impl MemoryUsage {
    /// Parses the reply of `INFO memory`.
    fn of(info: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value?.trim().parse().ok()
        };
        Some(Self { used: field("used_memory")?, max: field("maxmemory").unwrap_or(0) })
    }

    fn pressure(self, before: Pressure, watermark_percent: u8) -> Pressure {
        let hysteresis = if before.is_high() { HYSTERESIS_PERCENT } else { 0 };
        let watermark = u64::from(watermark_percent).saturating_sub(hysteresis);
        if self.max == 0 {
            Pressure::None
        } else if self.used >= self.max {
            Pressure::Full
        } else if u128::from(self.used) * 100 >= u128::from(self.max) * u128::from(watermark) {
            Pressure::High
        } else {
            Pressure::None
        }
    }
}

/// The memory of all servers. Metrics show the server with the least left.
#[derive(Debug, Default)]
pub(super) struct MemoryOfAllServers {
    servers: Mutex<BTreeMap<usize, (Pressure, MemoryUsage)>>,
    /// Whether a warning of a server without a limit was logged.
    unlimited: AtomicBool,
    reports: ServerReports,
}

impl MemoryOfAllServers {
    fn note(&self, server: usize, now: Option<(Pressure, MemoryUsage)>, metrics: &Metrics) {
        let servers = &mut *self.servers.lock();
        match now {
            Some(now) => drop(servers.insert(server, now)),
            None => drop(servers.remove(&server)),
        }
        let share = |usage: &MemoryUsage| usage.used as f64 / usage.max.max(1) as f64;
        let fullest = servers.values().max_by(|(_, a), (_, b)| share(a).total_cmp(&share(b)));
        let (_, usage) = fullest.copied().unwrap_or_default();
        let pressure = servers.values().map(|(pressure, _)| *pressure).max().unwrap_or_default();
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        metrics.redis_memory_used.set(gauge(usage.used));
        metrics.redis_memory_max.set(gauge(usage.max));
        metrics.redis_memory_pressure.set(pressure as i64);
    }
}

/// Starts the task that polls a server.
pub(super) fn start(
    server: Arc<RedisServer>,
    all_servers: Arc<MemoryOfAllServers>,
    metrics: Arc<Metrics>,
    tasks: &Tasks,
) {
    let stopped = tasks.stopped().clone();
    tasks.spawn_service("redis_memory", async move {
        // Both arms are cancel-safe.
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            () = poll(&server, &all_servers, &metrics) => {}
        }
        let key = Arc::as_ptr(&server) as usize;
        all_servers.note(key, None, &metrics);
        all_servers.reports.note(key, None, &metrics);
    });
}

/// Polls a server, for ever.
async fn poll(server: &Arc<RedisServer>, all_servers: &MemoryOfAllServers, metrics: &Metrics) {
    let key = Arc::as_ptr(server) as usize;
    let mut logged: Option<Instant> = None;
    let (mut polls, mut snapshots) = (0_u32, None);
    let mut every = tokio::time::interval(POLL_INTERVAL);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let with_settings = polls % SETTINGS_EVERY == 0;
        let Some(reply) = query(server, with_settings, metrics).await else { continue };
        polls = polls.wrapping_add(1);
        if with_settings {
            snapshots = reply.snapshots;
        }
        let report = ServerReport::of(&reply.info, snapshots);
        all_servers.reports.note(key, Some(report), metrics);
        let Some(mut usage) = MemoryUsage::of(&reply.info) else { continue };
        let StorageLimits { memory_max, watermark_percent, .. } = server.retention.limits;
        if usage.max == 0 {
            usage.max = memory_max;
        }
        if usage.max == 0 && !all_servers.unlimited.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                server = server.dial.server_name(),
                "Redis has no `maxmemory` and cluster.memory_max is not set: clients may fill the memory of \
                 the machine; set one of them"
            );
        }
        let before = server.memory.pressure();
        let pressure = usage.pressure(before, watermark_percent);
        server.memory.set(pressure);
        all_servers.note(key, Some((pressure, usage)), metrics);
        let now = Instant::now();
        let MemoryUsage { used, max } = usage;
        let is_due = logged.is_none_or(|at| now - at >= LOG_EVERY);
        if pressure.is_high() && is_due {
            logged = Some(now);
            tracing::error!(
                server = server.dial.server_name(),
                used,
                max,
                watermark_percent,
                "the memory of Redis is above the watermark: new rooms, inboxes and room settings are rejected, \
                 and logs take no more than before; add memory, or shorten history.ttl and inbox.ttl"
            );
        } else if !pressure.is_high() && before.is_high() && logged.is_some() {
            tracing::info!(used, max, "the memory of Redis is below the watermark again");
        }
    }
}

/// The reply to a poll.
struct PollReply {
    info: String,
    /// Whether the server saves snapshots by itself; `None` if that was not asked, or if the server
    /// denies `CONFIG GET`.
    snapshots: Option<bool>,
}

/// Asks a server for its state, and measures the round trip. `None` if it does not reply.
async fn query(server: &RedisServer, with_settings: bool, metrics: &Metrics) -> Option<PollReply> {
    let mut reader = server.dial.read_connection().await.ok()?;
    let queried: RedisResult<PollReply> = async {
        let asked = Instant::now();
        redis::cmd("PING").query_async::<()>(&mut *reader).await?;
        metrics.redis_round_trip_seconds.observe(asked.elapsed().as_secs_f64());
        let mut info = redis::cmd("INFO");
        info.arg("server").arg("memory").arg("persistence").arg("replication");
        let info = info.query_async(&mut *reader).await?;
        let mut snapshots = None;
        if with_settings {
            let save: RedisResult<(String, String)> =
                redis::cmd("CONFIG").arg("GET").arg("save").query_async(&mut *reader).await;
            snapshots = save.ok().map(|(_, save)| !save.is_empty());
        }
        Ok(PollReply { info, snapshots })
    }
    .await;
    queried
        .inspect_err(|error| {
            if error.kind() == redis::ErrorKind::Io {
                reader.discard();
            }
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_parsed_from_info_memory() {
        let info = "# Memory\r\nused_memory:860352\r\nused_memory_human:840.19K\r\nmaxmemory:67108864\r\n\
                    maxmemory_policy:noeviction\r\n";
        assert_eq!(MemoryUsage::of(info), Some(MemoryUsage { used: 860_352, max: 64 << 20 }));
        assert_eq!(MemoryUsage::of("used_memory:5\r\n"), Some(MemoryUsage { used: 5, max: 0 }));
        assert_eq!(MemoryUsage::of("# Memory\r\n"), None);
    }

    #[test]
    fn pressure_is_high_from_the_watermark_until_well_below_it() {
        let at = |used, before| MemoryUsage { used, max: 1000 }.pressure(before, 80);
        assert_eq!(at(799, Pressure::None), Pressure::None);
        assert_eq!(at(800, Pressure::None), Pressure::High);
        assert_eq!(at(770, Pressure::High), Pressure::High);
        assert_eq!(at(769, Pressure::High), Pressure::None);
        assert_eq!(at(1000, Pressure::None), Pressure::Full);
        assert_eq!(MemoryUsage { used: 1000, max: 0 }.pressure(Pressure::Full, 80), Pressure::None);
    }

    #[test]
    fn metrics_show_the_server_with_the_least_memory_left() {
        let (all_servers, metrics) = (MemoryOfAllServers::default(), Metrics::new());
        all_servers.note(1, Some((Pressure::None, MemoryUsage { used: 10, max: 100 })), &metrics);
        all_servers.note(2, Some((Pressure::High, MemoryUsage { used: 9, max: 10 })), &metrics);
        let shown = || {
            let Metrics { redis_memory_used, redis_memory_max, redis_memory_pressure, .. } =
                &metrics;
            (redis_memory_used.get(), redis_memory_max.get(), redis_memory_pressure.get())
        };
        assert_eq!(shown(), (9, 10, 1));
        all_servers.note(2, None, &metrics);
        assert_eq!(shown(), (10, 100, 0));
    }
}
