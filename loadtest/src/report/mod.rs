//! What is told at the end of a run, whatever the scenario: for people as a table, for programs as
//! JSON, for both as a page ([`html`]).
//!
//! Pure.

use std::{collections::BTreeSet, fmt, time::Duration};

use loadtest::checker::timeline::Second;
use serde::{Serialize, Serializer};

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

/// Above this share of a core the tool is what is measured.
const CPU_PERCENT_MAX: f64 = 80.0;
/// The same for how late it is, p99.
const LAG_MAX: Duration = Duration::from_millis(1);

/// What a run came to.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// The subcommand.
    pub(crate) scenario: String,
    /// All of the command line, to run it again.
    pub(crate) command: String,
    /// Of this tool.
    pub(crate) version: &'static str,
    /// When it began, seconds since 1970.
    pub(crate) began_unix_s: u64,
    /// The seed of the plan, where there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// What was done to the servers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) faults: Vec<FaultWindow>,
    /// What attacks did, where there were some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) attacks: Vec<AttackRow>,
    /// What became of connections, where they were what it was about.
    #[serde(flatten)]
    pub(crate) connections: Option<ConnectionReport>,
    /// What became of messages, where some were sent.
    #[serde(flatten)]
    pub(crate) messages: Option<MessageReport>,
    /// What else the scenario tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) steps: Vec<StepResult>,
    /// What happened in each second.
    #[serde(serialize_with = "with_percentiles")]
    pub(crate) seconds: Vec<Second>,
    /// The processes that were asked for.
    pub(crate) servers: Vec<ServerReport>,
    /// What servers tell of themselves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) gauges: Vec<GaugeSeries>,
    /// This tool.
    pub(crate) generator: GeneratorReport,
    /// Whether somebody ended it early.
    pub(crate) interrupted: bool,
    /// What does not hold of what was asked for. Empty where all is well.
    pub(crate) failures: Vec<String>,
    /// Why the result says more about this tool than about the servers; nothing where it does not.
    pub(crate) invalid: Option<String>,
    /// Neither of these.
    pub(crate) passed: bool,
}

/// Something that was done to the servers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct FaultWindow {
    /// What, and to which gateway.
    pub(crate) fault: String,
    /// When it began, from when members were first allowed to talk.
    #[serde(rename = "from_ms", serialize_with = "millis")]
    pub(crate) from: Duration,
    /// When it was mended.
    #[serde(rename = "until_ms", serialize_with = "millis")]
    pub(crate) until: Duration,
}

/// One step of a scenario that has some.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct StepResult {
    /// What was done.
    pub(crate) name: String,
    /// What came of it.
    pub(crate) result: String,
    /// Whether that is as it should be.
    pub(crate) passed: bool,
}

/// What this tool cost, all its processes together, and how late it did what was due.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct GeneratorReport {
    /// How many processes it was.
    pub(crate) processes: u32,
    /// CPU time of the busiest of them while the scenario ran, in percent of a core.
    pub(crate) cpu_percent: f64,
    /// How late what was due was done, p99.
    pub(crate) lag_p99_us: u64,
    /// What all of them grew by, for each connection that was open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_per_connection_bytes: Option<i64>,
}

fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_millis() as u64)
}

/// A second as a reader wants it.
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
    let told = |second: &Second| {
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
    serializer.collect_seq(seconds.iter().map(told))
}

impl GeneratorReport {
    /// Why the result says more about this tool than about the servers; nothing where it does not.
    pub(crate) fn invalid_reason(&self) -> Option<String> {
        let Self { cpu_percent, lag_p99_us, .. } = *self;
        if cpu_percent > CPU_PERCENT_MAX {
            Some(format!(
                "this tool took {cpu_percent:.0} % of a core, {CPU_PERCENT_MAX} is the most"
            ))
        } else if u128::from(lag_p99_us) > LAG_MAX.as_micros() {
            let max = LAG_MAX.as_micros();
            Some(format!("this tool was {lag_p99_us} µs late (p99), {max} is the most"))
        } else {
            None
        }
    }
}

impl Report {
    /// A report that tells nothing yet.
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

    /// Holds what came of it against what was asked for.
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

    /// How many kinds of faults there were.
    pub(crate) fn fault_kinds(&self) -> usize {
        let kind = |window: &FaultWindow| window.fault.split(' ').next().map(str::to_owned);
        self.faults.iter().filter_map(kind).collect::<BTreeSet<_>>().len()
    }

    /// All of it as names and values, in the order of reading.
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
        let mut lines = vec![("this tool".to_owned(), own)];
        if let Some(each) = memory_per_connection_bytes {
            let each = format!("{:.2} KiB per connection", each as f64 / 1024.0);
            lines.push(("this tool memory".to_owned(), each));
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
