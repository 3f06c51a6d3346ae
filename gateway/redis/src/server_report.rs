//! Metrics of the Redis servers besides their memory: version, eviction policy, persistence,
//! replicas. Of several servers the metrics show the one that needs attention first.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;

use skein_core::telemetry::metrics::{Metrics, Persistence};

/// The most bytes of a version that are exported: the server chooses it.
const VERSION_BYTES_MAX: usize = 32;

/// The report of a server about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerReport {
    version: String,
    evicts_keys: bool,
    append_only: bool,
    /// Whether it saves snapshots by itself; `None` if it does not say.
    snapshots: Option<bool>,
    replicas: i64,
    /// Of the replica that is furthest behind, bytes and seconds.
    lag_bytes: i64,
    lag_seconds: i64,
}

impl ServerReport {
    /// Parses the reply of `INFO server memory persistence replication`; `snapshots` is not in it.
    pub(super) fn of(info: &str, snapshots: Option<bool>) -> Self {
        let field = |name: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(str::trim)
        };
        let number = |text: &str| text.parse::<i64>().ok();
        // Valkey reports the version of Redis that it is compatible with as well.
        let version = field("valkey_version").or(field("redis_version")).unwrap_or("unknown");
        let version = version.chars().take(VERSION_BYTES_MAX);
        let sent = field("master_repl_offset").and_then(number).unwrap_or(0);
        let mut report = Self {
            version: version.filter(char::is_ascii_graphic).collect(),
            evicts_keys: field("maxmemory_policy").is_some_and(|policy| policy != "noeviction"),
            append_only: field("aof_enabled") == Some("1"),
            snapshots,
            ..Self::default()
        };
        // slave0:ip=10.0.0.2,port=6379,state=online,offset=1234,lag=0
        let replica = |line: &str| {
            let (name, values) = line.split_once(':')?;
            name.strip_prefix("slave")?.parse::<u32>().ok()?;
            let value = |key: &str| {
                let mut pairs = values.trim().split(',').filter_map(|pair| pair.split_once('='));
                pairs.find(|(name, _)| *name == key).and_then(|(_, value)| number(value))
            };
            Some((value("offset")?, value("lag")?))
        };
        for (offset, lag) in info.lines().filter_map(replica) {
            report.replicas += 1;
            report.lag_bytes = report.lag_bytes.max(sent - offset);
            report.lag_seconds = report.lag_seconds.max(lag);
        }
        report
    }
}

/// The reports of all servers.
#[derive(Debug, Default)]
pub(super) struct ServerReports(Mutex<BTreeMap<usize, ServerReport>>);

impl ServerReports {
    /// Records the report of a server, or that the server is no longer used, and sets the metrics.
    pub(super) fn note(&self, server: usize, report: Option<ServerReport>, metrics: &Metrics) {
        let reports = &mut *self.0.lock();
        match report {
            Some(report) => drop(reports.insert(server, report)),
            None => drop(reports.remove(&server)),
        }
        let versions: BTreeSet<&str> =
            reports.values().map(|report| report.version.as_str()).collect();
        metrics.redis_info.replace(versions.into_iter().map(|version| (vec![version], 1.0)));
        let most = |value: fn(&ServerReport) -> i64| reports.values().map(value).max().unwrap_or(0);
        let least =
            |value: fn(&ServerReport) -> i64| reports.values().map(value).min().unwrap_or(0);
        metrics.redis_evicts_keys.set(most(|report| report.evicts_keys.into()));
        metrics.redis_replicas.set(least(|report| report.replicas));
        metrics.redis_replica_lag_bytes.set(most(|report| report.lag_bytes));
        metrics.redis_replica_lag_seconds.set(most(|report| report.lag_seconds));
        let aof = metrics.redis_persistence.of(Persistence::Aof);
        aof.set(least(|report| report.append_only.into()));
        let rdb = metrics.redis_persistence.of(Persistence::Rdb);
        rdb.set(least(|report| report.snapshots.map_or(-1, i64::from)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "# Server\r\nredis_version:7.2.4\r\nvalkey_version:8.0.1\r\n# Memory\r\n\
        maxmemory_policy:allkeys-lru\r\n# Persistence\r\naof_enabled:1\r\n# Replication\r\n\
        role:master\r\nconnected_slaves:2\r\nslave0:ip=10.0.0.2,port=6379,state=online,offset=900,lag=0\r\n\
        slave1:ip=10.0.0.3,port=6379,state=online,offset=400,lag=7\r\nmaster_repl_offset:1000\r\n";

    #[test]
    fn a_report_is_parsed_from_info() {
        let report = ServerReport::of(INFO, None);
        let expected = ServerReport {
            version: "8.0.1".to_owned(),
            evicts_keys: true,
            append_only: true,
            snapshots: None,
            replicas: 2,
            lag_bytes: 600,
            lag_seconds: 7,
        };
        assert_eq!(report, expected);
        let unknown = ServerReport { version: "unknown".to_owned(), ..ServerReport::default() };
        assert_eq!(ServerReport::of("", None), unknown);
    }

    #[test]
    fn metrics_show_the_server_that_needs_attention() {
        let (reports, metrics) = (ServerReports::default(), Metrics::new());
        let whole = "redis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\naof_enabled:0\r\n";
        reports.note(1, Some(ServerReport::of(INFO, Some(true))), &metrics);
        reports.note(2, Some(ServerReport::of(whole, Some(true))), &metrics);
        let text = metrics.render();
        for shown in [
            "gateway_redis_info{version=\"7.0.15\"} 1",
            "gateway_redis_info{version=\"8.0.1\"} 1",
            "gateway_redis_evicts_keys 1",
            "gateway_redis_persistence{kind=\"aof\"} 0",
            "gateway_redis_persistence{kind=\"rdb\"} 1",
            "gateway_redis_replicas 0",
            "gateway_redis_replica_lag_bytes 600",
            "gateway_redis_replica_lag_seconds 7",
        ] {
            assert!(text.contains(&format!("{shown}\n")), "{shown}: {text}");
        }
        reports.note(1, None, &metrics);
        let text = metrics.render();
        assert!(
            !text.contains("8.0.1") && text.contains("gateway_redis_evicts_keys 0\n"),
            "{text}"
        );
    }
}
