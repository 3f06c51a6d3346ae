//! The report at the end of a run of any scenario: a table in text, JSON, or an HTML page
//! ([`html`]).
//!
//! Pure.

use std::{collections::BTreeSet, fmt, time::Duration};

use serde::{Serialize, Serializer};
use skein_testkit::timeline::Second;

use self::{
    attacks::AttackRow,
    connections::ConnectionReport,
    messages::MessageReport,
    servers::{GaugeSeries, ServerReport},
};
use crate::args::Thresholds;

pub(crate) mod attacks;
pub(crate) mod compare;
pub(crate) mod connections;
pub(crate) mod html;
pub(crate) mod messages;
pub(crate) mod plot;
pub(crate) mod servers;

/// Above this share of a core the load generator may be the bottleneck.
const CPU_PERCENT_MAX: f64 = 80.0;
/// Above this lateness (p99) the load generator may be the bottleneck.
const LAG_MAX: Duration = Duration::from_millis(1);

/// The report of a run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Subcommand.
    pub(crate) scenario: String,
    /// The whole command line, to repeat the run.
    pub(crate) command: String,
    /// Version of this tool.
    pub(crate) version: &'static str,
    /// Start of the run, seconds since 1970.
    pub(crate) began_unix_s: u64,
    /// Seed of the fault plan or of the users, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// Faults that were injected.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) faults: Vec<FaultWindow>,
    /// Attacks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) attacks: Vec<AttackRow>,
    /// Connections, if the scenario reports on them.
    #[serde(flatten)]
    pub(crate) connections: Option<ConnectionReport>,
    /// Messages, if some were sent.
    #[serde(flatten)]
    pub(crate) messages: Option<MessageReport>,
    /// Further results of the scenario.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) steps: Vec<StepResult>,
    /// Counters of each second.
    #[serde(serialize_with = "with_percentiles")]
    pub(crate) seconds: Vec<Second>,
    /// Observed server processes.
    pub(crate) servers: Vec<ServerReport>,
    /// Gauges of the servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) gauges: Vec<GaugeSeries>,
    /// The load generator itself.
    pub(crate) generator: GeneratorReport,
    /// Whether a signal ended the run early.
    pub(crate) interrupted: bool,
    /// Failed expectations; empty if the run passed.
    pub(crate) failures: Vec<String>,
    /// Why the result may reflect the load generator more than the servers; `None` if it is valid.
    pub(crate) invalid: Option<String>,
    /// No failures, and valid.
    pub(crate) passed: bool,
}

/// A fault that was injected.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct FaultWindow {
    /// Kind of the fault, and the gateway.
    pub(crate) fault: String,
    /// Begin of the fault, from when members were first allowed to send.
    #[serde(rename = "from_ms", serialize_with = "millis")]
    pub(crate) from: Duration,
    /// End of the fault.
    #[serde(rename = "until_ms", serialize_with = "millis")]
    pub(crate) until: Duration,
}

/// One result of a scenario.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StepResult {
    /// Name of the result.
    pub(crate) name: String,
    /// The result.
    pub(crate) result: String,
    /// Whether it is as expected.
    pub(crate) passed: bool,
}

/// Resource usage and lateness of the load generator.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct GeneratorReport {
    /// Number of processes.
    pub(crate) processes: u32,
    /// CPU time of the busiest process during the scenario, in percent of a core.
    pub(crate) cpu_percent: f64,
    /// How late due operations began, p99.
    pub(crate) lag_p99_us: u64,
    /// Memory growth of all processes per open connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_per_connection_bytes: Option<i64>,
}

fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_millis() as u64)
}

/// A second with percentiles, for JSON.
#[derive(Serialize)]
struct SecondSummary {
    deliveries: u64,
    acks: u64,
    rejections: u64,
    connects: u64,
    open: u64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

fn with_percentiles<S: Serializer>(seconds: &[Second], serializer: S) -> Result<S::Ok, S::Error> {
    let summary = |second: &Second| {
        let latencies = second.latencies();
        SecondSummary {
            deliveries: second.deliveries,
            acks: second.acks,
            rejections: second.rejections,
            connects: second.connects,
            open: second.open,
            p50_us: latencies.value_at_percentile(50.0),
            p99_us: latencies.value_at_percentile(99.0),
            max_us: latencies.max(),
        }
    };
    serializer.collect_seq(seconds.iter().map(summary))
}

impl GeneratorReport {
    /// Why the result may reflect the load generator more than the servers; `None` if it is valid.
    pub(crate) fn invalid_reason(&self) -> Option<String> {
        let Self { cpu_percent, lag_p99_us, .. } = *self;
        if cpu_percent > CPU_PERCENT_MAX {
            Some(format!(
                "the load generator used {cpu_percent:.0} % of a core, more than {CPU_PERCENT_MAX} %"
            ))
        } else if u128::from(lag_p99_us) > LAG_MAX.as_micros() {
            let max = LAG_MAX.as_micros();
            Some(format!("the load generator was {lag_p99_us} µs late (p99), more than {max} µs"))
        } else {
            None
        }
    }
}

impl Report {
    /// An empty report.
    pub(crate) fn of(scenario: &str) -> Self {
        let began = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            scenario: scenario.to_owned(),
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
            version: env!("CARGO_PKG_VERSION"),
            began_unix_s: began.unwrap_or_default().as_secs(),
            ..Self::default()
        }
    }

    /// Compares the results with the expectations, and sets the failures.
    pub(crate) fn evaluate(&mut self, thresholds: &Thresholds) {
        let mut failures = Vec::new();
        if self.interrupted {
            failures.push("interrupted".to_owned());
        }
        if let Some(connections) = &self.connections {
            failures.extend(connections.failures());
        }
        if let Some(messages) = &self.messages {
            failures.extend(messages.failures(thresholds));
        }
        let failed = self.steps.iter().filter(|step| !step.passed);
        failures.extend(failed.map(|step| format!("{}: {}", step.name, step.result)));
        self.invalid = self.generator.invalid_reason();
        self.passed = failures.is_empty() && self.invalid.is_none();
        self.failures = failures;
    }

    /// Number of different kinds of faults.
    pub(crate) fn fault_kinds(&self) -> usize {
        let kind = |window: &FaultWindow| window.fault.split(' ').next().map(str::to_owned);
        self.faults.iter().filter_map(kind).collect::<BTreeSet<_>>().len()
    }

    /// The report as names and values, in reading order.
    pub(crate) fn lines(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String| lines.push((name.to_owned(), value));
        if let Some(seed) = self.seed {
            line("seed", seed.to_string());
        }
        if !self.faults.is_empty() {
            let (faults, kinds) = (self.faults.len(), self.fault_kinds());
            line("faults", format!("{faults} of {kinds} kinds"));
        }
        if let Some(connections) = &self.connections {
            lines.extend(connections.lines());
        }
        if let Some(messages) = &self.messages {
            lines.extend(messages.lines());
        }
        lines.extend(self.steps.iter().map(|step| (step.name.clone(), step.result.clone())));
        for server in &self.servers {
            lines.extend(server.lines());
        }
        lines.extend(self.generator.lines());
        lines
    }
}

impl GeneratorReport {
    fn lines(&self) -> Vec<(String, String)> {
        let Self { processes, cpu_percent, lag_p99_us, memory_per_connection_bytes } = *self;
        let many = if processes > 1 { format!("{processes} processes, ") } else { String::new() };
        let own = format!("{many}{cpu_percent:.0} % of a core, p99 {lag_p99_us} µs late");
        let mut lines = vec![("load generator".to_owned(), own)];
        if let Some(each) = memory_per_connection_bytes {
            let each = format!("{:.2} KiB per connection", each as f64 / 1024.0);
            lines.push(("load generator memory".to_owned(), each));
        }
        lines
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.attacks.is_empty() {
            writeln!(f, "{}", attacks::table(&self.attacks))?;
        }
        for (name, value) in self.lines() {
            writeln!(f, "{name:<28} {value}")?;
        }
        if let Some(why) = &self.invalid {
            writeln!(f, "INVALID: {why}")?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED: {failure}")?;
        }
        let examples = self.messages.iter().flat_map(|messages| &messages.examples);
        for example in examples {
            writeln!(f, "  {example}")?;
        }
        Ok(())
    }
}
