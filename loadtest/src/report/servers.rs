//! Resource usage of server processes during a scenario.
//!
//! Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::procfs::ProcessUsage;

/// Resource usage of one process.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct ServerReport {
    pub(crate) pid: u32,
    pub(crate) memory_before_bytes: u64,
    pub(crate) memory_after_bytes: u64,
    /// Memory growth per open connection; `None` without connections.
    pub(crate) memory_per_connection_bytes: Option<i64>,
    /// Usage in each phase of the scenario.
    pub(crate) phases: Vec<PhaseUsage>,
    /// One sample per second.
    pub(crate) samples: Vec<ServerSample>,
}

/// CPU time of a process in one phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct PhaseUsage {
    /// Name of the phase.
    pub(crate) phase: &'static str,
    pub(crate) cpu_ms: u64,
    /// The unit that CPU time is divided by.
    pub(crate) unit: &'static str,
    /// CPU time per unit; `None` if there were none.
    pub(crate) cpu_per_unit_us: Option<f64>,
}

/// Usage of a process in one second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct ServerSample {
    /// Time from the start of the scenario.
    pub(crate) at_s: f64,
    /// CPU time, in percent of a core.
    pub(crate) cpu_percent: f64,
    /// Resident memory, shared pages included: reading the proportional size each second would
    /// disturb the process.
    pub(crate) resident_bytes: u64,
}

/// Gauges of a `/metrics` page; the values of all labels of a gauge are added up.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct GaugeSeries {
    pub(crate) url: String,
    /// Seconds from the start of the scenario, and values.
    pub(crate) series: BTreeMap<String, Vec<(f64, f64)>>,
}

impl ServerReport {
    /// A process with its usage before the scenario.
    pub(crate) fn new(pid: u32, before: ProcessUsage) -> Self {
        Self { pid, memory_before_bytes: before.pss_bytes, ..Self::default() }
    }

    /// Records the memory while `open` connections are open.
    pub(crate) fn record_memory(&mut self, now: ProcessUsage, open: u64) {
        self.memory_after_bytes = now.pss_bytes;
        let grown = now.pss_bytes as i64 - self.memory_before_bytes as i64;
        self.memory_per_connection_bytes = grown.checked_div(open as i64);
    }

    /// Adds a phase in which `count` units happened.
    pub(crate) fn add_phase(
        &mut self,
        phase: &'static str,
        cpu_ms: u64,
        unit: &'static str,
        count: u64,
    ) {
        let cpu_per_unit_us = (count > 0).then(|| cpu_ms as f64 * 1000.0 / count as f64);
        self.phases.push(PhaseUsage { phase, cpu_ms, unit, cpu_per_unit_us });
    }

    pub(super) fn lines(&self) -> Vec<(String, String)> {
        let name = format!("server {}", self.pid);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (before, after) = (mib(self.memory_before_bytes), mib(self.memory_after_bytes));
        let mib = format!("{before:.1} to {after:.1} MiB");
        let memory = match self.memory_per_connection_bytes {
            Some(each) => format!("{:.1} KiB per connection ({mib})", each as f64 / 1024.0),
            None => mib,
        };
        let mut lines = vec![(format!("{name} memory"), memory)];
        for PhaseUsage { phase, cpu_ms, unit, cpu_per_unit_us } in &self.phases {
            let each =
                cpu_per_unit_us.map(|us| format!(", {us:.1} µs per {unit}")).unwrap_or_default();
            lines.push((format!("{name} CPU"), format!("{cpu_ms} ms {phase}{each}")));
        }
        lines
    }
}

/// Parses the gauges of a page in Prometheus' text format, and adds up all labels of each.
pub(crate) fn gauges(page: &str) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    let mut gauge = "";
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            gauge = rest.strip_suffix(" gauge").unwrap_or("");
        } else if !line.starts_with('#')
            && let Some((name, value)) = line.rsplit_once(' ')
            && !gauge.is_empty()
            && name.split('{').next() == Some(gauge)
            && let Ok(value) = value.parse::<f64>()
        {
            *values.entry(gauge.to_owned()).or_default() += value;
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_reported_per_unit() {
        let mut server = ServerReport::new(7, ProcessUsage { pss_bytes: 1 << 20, cpu_ms: 0 });
        server.add_phase("opening", 200, "connection", 3);
        server.add_phase("held", 50, "connection", 0);
        server.record_memory(ProcessUsage { pss_bytes: 2 << 20, cpu_ms: 0 }, 1);
        let lines: Vec<String> = server.lines().into_iter().map(|(_, value)| value).collect();
        let opening = "200 ms opening, 66666.7 µs per connection";
        let memory = "1024.0 KiB per connection (1.0 to 2.0 MiB)";
        assert_eq!(lines, [memory, opening, "50 ms held"]);
        server.record_memory(ProcessUsage::default(), 0);
        assert_eq!(server.memory_per_connection_bytes, None);
    }

    #[test]
    fn only_gauges_are_parsed() {
        let page = "# HELP a b\n# TYPE a gauge\na{x=\"1\"} 2\na{x=\"2\"} 3.5\n# TYPE c counter\nc 9\n\
                    # TYPE d gauge\nd 1e3\n";
        let expected = [("a".to_owned(), 5.5), ("d".to_owned(), 1000.0)];
        assert_eq!(gauges(page), expected.into());
    }
}
