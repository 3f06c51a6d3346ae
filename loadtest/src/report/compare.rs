//! Comparison of two reports.
//!
//! Pure. It compares all numbers that two reports have under the same names, so that it depends on
//! no scenario and works for `bench` too.

use std::{collections::BTreeMap, fmt, fs, io, path::PathBuf};

use serde_json::Value;

/// Lists that are not compared: time series, which the HTML page shows.
const SERIES: [&str; 6] = ["seconds", "samples", "gauges", "faults", "curve", "examples"];
/// Ratios that differ from 1 by more than this are marked.
const NOTABLE: f64 = 0.1;

/// Why two reports cannot be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompareError {
    /// A file cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is no report.
    #[error("{} is not a report of --json: {source}", file.display())]
    Parse {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The reports have different scenarios.
    #[error("the first report is of {0}, the second of {1}")]
    Scenario(String, String),
}

/// Numbers of two reports by name.
#[derive(Debug)]
pub(crate) struct Comparison {
    rows: Vec<ComparisonRow>,
    /// Why one of them is invalid.
    invalid: Vec<String>,
}

#[derive(Debug, PartialEq)]
struct ComparisonRow {
    name: String,
    a: Option<f64>,
    b: Option<f64>,
}

/// Reads and compares two reports.
pub(crate) fn run(a: &PathBuf, b: &PathBuf) -> Result<Comparison, CompareError> {
    let read = |file: &PathBuf| {
        let text = fs::read_to_string(file)
            .map_err(|source| CompareError::Read { file: file.clone(), source })?;
        serde_json::from_str(&text)
            .map_err(|source| CompareError::Parse { file: file.clone(), source })
    };
    Comparison::of(&read(a)?, &read(b)?)
}

impl Comparison {
    fn of(a: &Value, b: &Value) -> Result<Self, CompareError> {
        let scenario = |report: &Value| report["scenario"].as_str().unwrap_or("bench").to_owned();
        if scenario(a) != scenario(b) {
            return Err(CompareError::Scenario(scenario(a), scenario(b)));
        }
        let (mut left, mut right) = (Vec::new(), Vec::new());
        numbers(a, String::new(), &mut left);
        numbers(b, String::new(), &mut right);
        let mut of_b: BTreeMap<&str, f64> = right.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let row = |(name, value): &(String, f64)| ComparisonRow {
            name: name.clone(),
            a: Some(*value),
            b: of_b.remove(name.as_str()),
        };
        let mut rows: Vec<ComparisonRow> = left.iter().map(row).collect();
        let only_b = right.iter().filter(|(name, _)| of_b.contains_key(name.as_str()));
        rows.extend(only_b.map(|(name, value)| ComparisonRow {
            name: name.clone(),
            a: None,
            b: Some(*value),
        }));
        let reason = |(name, report): (&str, &Value)| {
            let why = report["invalid"].as_str()?;
            Some(format!("{name} report is invalid: {why}"))
        };
        let invalid =
            [("the first", a), ("the second", b)].into_iter().filter_map(reason).collect();
        Ok(Self { rows, invalid })
    }

    /// Whether both reports are valid.
    pub(crate) fn is_valid(&self) -> bool {
        self.invalid.is_empty()
    }
}

/// Collects all numbers of a report by their path.
fn numbers(value: &Value, name: String, found: &mut Vec<(String, f64)>) {
    let below =
        |part: &str| if name.is_empty() { part.to_owned() } else { format!("{name}.{part}") };
    match value {
        Value::Number(number) => found.extend(number.as_f64().map(|number| (name, number))),
        Value::Object(members) => {
            let compared = members.iter().filter(|(part, _)| !SERIES.contains(&part.as_str()));
            compared.for_each(|(part, value)| numbers(value, below(part), found));
        }
        Value::Array(items) => {
            // Indexed by position: process ids differ from run to run.
            for (index, item) in items.iter().enumerate() {
                numbers(item, below(&index.to_string()), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let incidental = |name: &str| name.ends_with("pid") || name == "began_unix_s";
        let rows = self.rows.iter().filter(|row| !incidental(&row.name));
        let write = |value: Option<f64>| {
            value.map_or("–".to_owned(), |value| {
                if value.fract() == 0.0 { format!("{value}") } else { format!("{value:.3}") }
            })
        };
        writeln!(f, "{:<44} {:>14} {:>14} {:>8}", "", "first", "second", "ratio")?;
        for ComparisonRow { name, a, b } in rows {
            let ratio = a.zip(*b).filter(|(a, _)| *a != 0.0).map(|(a, b)| b / a);
            let mark = match ratio {
                Some(ratio) if (ratio - 1.0).abs() > NOTABLE => " *",
                Some(_) => "",
                None if a == b => "",
                None => " *",
            };
            let ratio = ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
            writeln!(f, "{name:<44} {:>14} {:>14} {ratio:>8}{mark}", write(*a), write(*b))?;
        }
        for reason in &self.invalid {
            writeln!(f, "INVALID: {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_of_the_same_name_are_compared() {
        let a = json!({"scenario": "rooms", "lost": 0, "latency": {"p50_us": 100}, "seconds": [1]});
        let b = json!({"scenario": "rooms", "lost": 2, "latency": {"p50_us": 150}, "new": 1,
                       "invalid": "slow"});
        let comparison = Comparison::of(&a, &b).unwrap();
        let names: Vec<&str> = comparison.rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        let text = comparison.to_string();
        let line =
            |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("latency.p50_us").ends_with("1.50 *"));
        assert!(line("lost").ends_with('*') && line("new").contains('–'));
        assert!(line("INVALID").contains("the second report is invalid: slow"));
        assert!(!comparison.is_valid());
    }

    #[test]
    fn different_scenarios_are_not_compared() {
        let error = Comparison::of(&json!({"scenario": "rooms"}), &json!({"scenario": "chat"}));
        assert!(matches!(error, Err(CompareError::Scenario(..))));
    }
}
