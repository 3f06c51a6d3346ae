//! Attacks as rows of a table.
//!
//! Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::abuse::verdict::{AttackMeasurement, AttackVerdict};

/// One attack.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct AttackRow {
    /// Group of the attack.
    pub(crate) group: &'static str,
    /// Name of the attack.
    pub(crate) name: &'static str,
    /// Measurements.
    #[serde(flatten)]
    pub(crate) measured: AttackMeasurement,
    /// Verdict on them.
    pub(crate) verdict: AttackVerdict,
}

/// Column headings.
pub(crate) const HEADINGS: [&str; 14] = [
    "attack",
    "sent",
    "held: gateway",
    "held: Redis",
    "per byte",
    "fds",
    "CPU: gateway",
    "Redis",
    "control",
    "legitimate p50/p99",
    "control p50/p99",
    "close reason",
    "recovered after",
    "verdict",
];

impl AttackRow {
    /// The cells, in the order of [`HEADINGS`].
    pub(crate) fn cells(&self) -> [String; HEADINGS.len()] {
        let Self { group, name, measured, verdict } = self;
        let times = |p50: f64, p99: f64| format!("{p50:.1}/{p99:.1} ms");
        let percent = |share: f64| format!("{share:.0} %");
        let recovered_after = measured
            .recovered_after
            .map(|recovered_after| format!("{:.0} s", recovered_after.as_secs_f64()));
        [
            format!("{group} {name}"),
            bytes(measured.sent_bytes),
            bytes(measured.peak_growth.gateway_bytes),
            bytes(measured.peak_growth.redis_bytes),
            if measured.sent_bytes > 0 {
                format!("{:.2}", measured.growth_per_byte())
            } else {
                "–".to_owned()
            },
            format!("+{}", measured.peak_growth.descriptors),
            percent(measured.gateway_cpu_percent),
            percent(measured.redis_cpu_percent),
            percent(measured.control_cpu_percent),
            times(measured.legitimate.p50_ms, measured.legitimate.p99_ms),
            times(measured.control.p50_ms, measured.control.p99_ms),
            most_frequent(&measured.close_reasons),
            recovered_after.unwrap_or_else(|| "no".to_owned()),
            verdict.to_string(),
        ]
    }
}

impl std::fmt::Display for AttackVerdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.invalid, self.failures.as_slice()) {
            (None, []) => f.write_str("holds"),
            (Some(why), []) => write!(f, "INVALID: {why}"),
            (None, failures) => write!(f, "FAILED: {}", failures.join("; ")),
            (Some(why), failures) => write!(f, "FAILED: {} ({why})", failures.join("; ")),
        }
    }
}

/// The table in Markdown.
pub(crate) fn table(rows: &[AttackRow]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut table = line(&HEADINGS.map(str::to_owned));
    table.push_str(&line(&HEADINGS.map(|_| "---".to_owned())));
    rows.iter().for_each(|row| table.push_str(&line(&row.cells())));
    table
}

/// The most frequent close reason, with its count.
fn most_frequent(close_reasons: &BTreeMap<String, u64>) -> String {
    let most = close_reasons.iter().max_by_key(|(_, count)| **count);
    most.map(|(reason, count)| format!("{count} × {reason}")).unwrap_or_else(|| "–".to_owned())
}

fn bytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        0.0..1e4 => format!("{bytes:.0} B"),
        1e4..1e6 => format!("{:.1} KB", bytes / 1e3),
        _ => format!("{:.1} MB", bytes / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_has_a_cell_for_each_heading() {
        let verdict = AttackVerdict { failures: vec!["1 lost".to_owned()], invalid: None };
        let close_reasons =
            [("1008 rate_limited".to_owned(), 9), ("HTTP 429".to_owned(), 2)].into();
        let measured = AttackMeasurement {
            sent_bytes: 12_345_678,
            close_reasons,
            ..AttackMeasurement::default()
        };
        let row = AttackRow { group: "A1", name: "pongs", measured, verdict };
        let table = table(&[row]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[2].starts_with("| A1 pongs | 12.3 MB | 0 B | 0 B | 0.00 | +0 |"), "{table}");
        assert!(lines[2].ends_with("| 9 × 1008 rate_limited | no | FAILED: 1 lost |"), "{table}");
        let bars = |line: &str| line.matches('|').count();
        assert!(lines.iter().all(|line| bars(line) == bars(lines[0])));
    }

    #[test]
    fn verdict_begins_with_its_result() {
        let text = |failures: &[&str], invalid: Option<&str>| {
            let failures = failures.iter().map(|one| (*one).to_owned()).collect();
            AttackVerdict { failures, invalid: invalid.map(str::to_owned) }.to_string()
        };
        assert_eq!(text(&[], None), "holds");
        assert_eq!(text(&[], Some("late")), "INVALID: late");
        assert_eq!(text(&["a", "b"], None), "FAILED: a; b");
        assert_eq!(text(&["a"], Some("late")), "FAILED: a (late)");
    }
}
