//! The table, in Markdown and JSON.
//!
//! Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::Serialize;

use super::{
    machine::Machine,
    measure::{BenchTarget, Measure, RoundSample, Spread},
    rows::BenchRow,
    servers::{Candidate, GATEWAY_OPTIONS},
};

/// The result of a bench.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    pub(crate) machine: Machine,
    pub(crate) rounds: u32,
    pub(crate) measured_ms: u128,
    pub(crate) gateway_options: [&'static str; GATEWAY_OPTIONS.len()],
    pub(crate) rows: Vec<TableRow>,
}

/// A row with its measures.
#[derive(Debug, Serialize)]
pub(crate) struct TableRow {
    pub(crate) title: &'static str,
    pub(crate) lines: Vec<TableLine>,
    pub(crate) flaws: Vec<TableFlaw>,
}

/// Why a candidate's values are invalid.
#[derive(Debug, Serialize)]
pub(crate) struct TableFlaw {
    pub(crate) candidate: Candidate,
    /// Number of rounds with a flaw.
    pub(crate) rounds: usize,
    /// The first flaw.
    pub(crate) flaw: String,
}

/// A measure of a row.
#[derive(Debug, Serialize)]
pub(crate) struct TableLine {
    pub(crate) measure: Measure,
    pub(crate) baseline: Option<TableCell>,
    pub(crate) coalescing_baseline: Option<TableCell>,
    pub(crate) naive: Option<TableCell>,
    pub(crate) previous: Option<TableCell>,
    pub(crate) skein: Option<TableCell>,
    pub(crate) target: Option<String>,
    pub(crate) met: Option<bool>,
}

/// A value with its ratios to the baseline and to the previous gateway.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct TableCell {
    pub(crate) value: Spread,
    /// `None` for the baseline itself.
    pub(crate) times_baseline: Option<Spread>,
    /// `None` for the previous gateway itself.
    pub(crate) times_previous: Option<Spread>,
}

/// Rounds of one row, by candidate.
pub(crate) type Rounds = Vec<(Candidate, Vec<RoundSample>)>;

impl Table {
    /// A table without rows.
    pub(crate) fn new(machine: Machine, rounds: u32, measured_ms: u128) -> Self {
        let gateway_options = GATEWAY_OPTIONS;
        Self { machine, rounds, measured_ms, gateway_options, rows: Vec::new() }
    }

    /// Whether every row is valid.
    pub(crate) fn is_valid(&self) -> bool {
        self.rows.iter().all(TableRow::is_valid)
    }
}

impl TableRow {
    /// Summarizes the rounds of a row.
    pub(crate) fn new(row: &BenchRow, rounds: &Rounds) -> Self {
        let all = rounds.iter().flat_map(|(_, samples)| samples);
        let measures: BTreeSet<Measure> =
            all.flat_map(|sample| sample.values.keys().copied()).collect();
        let targets: BTreeMap<Measure, BenchTarget> = row.targets.iter().copied().collect();
        let line = |measure| TableLine::new(measure, rounds, targets.get(&measure).copied());
        let flaws = rounds
            .iter()
            .filter_map(|(candidate, samples)| TableFlaw::of(*candidate, samples))
            .collect();
        Self { title: row.title, lines: measures.into_iter().map(line).collect(), flaws }
    }

    /// Whether the gateway is compared with another build.
    fn has_previous(&self) -> bool {
        self.lines.iter().any(|line| line.previous.is_some())
    }

    /// Whether both sides of the comparison are valid; the other candidates do not matter.
    fn is_valid(&self) -> bool {
        let compared = [Candidate::Baseline, Candidate::Previous, Candidate::Skein];
        self.flaws.iter().all(|flaw| !compared.contains(&flaw.candidate))
    }
}

impl TableFlaw {
    fn of(candidate: Candidate, samples: &[RoundSample]) -> Option<Self> {
        let mut flaws = samples.iter().filter_map(|sample| sample.flaws.first());
        let flaw = flaws.next()?.clone();
        Some(Self { candidate, rounds: 1 + flaws.count(), flaw })
    }
}

impl TableLine {
    fn new(measure: Measure, rounds: &Rounds, target: Option<BenchTarget>) -> Self {
        let of = |candidate| {
            rounds.iter().find(|(one, _)| *one == candidate).map(|(_, samples)| samples)
        };
        let cell = |candidate| {
            let samples = of(candidate)?;
            let value = Spread::of_measure(samples, measure)?;
            let times = |other| {
                let others = of(other).filter(|_| candidate != other)?;
                Spread::times(samples, others, measure)
            };
            let (times_baseline, times_previous) =
                (times(Candidate::Baseline), times(Candidate::Previous));
            Some(TableCell { value, times_baseline, times_previous })
        };
        let skein = cell(Candidate::Skein);
        let met = target.and_then(|target| {
            target.is_met(skein.map(|cell| cell.value), skein.and_then(|cell| cell.times_baseline))
        });
        Self {
            measure,
            baseline: cell(Candidate::Baseline),
            coalescing_baseline: cell(Candidate::CoalescingBaseline),
            naive: cell(Candidate::Naive),
            previous: cell(Candidate::Previous),
            skein,
            target: target.map(|target| target.to_string()),
            met,
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, kernel, gateway, redis, commit, load_before, pinned } =
            &self.machine;
        writeln!(f, "{cpu}, {cores} cores, Linux {kernel}; {gateway} ({commit}); {redis}")?;
        let places = if *pinned { "servers on CPU 0, load on CPU 1" } else { "not pinned" };
        writeln!(f, "{places}; load average before: {load_before}")?;
        let has_previous = self.rows.iter().any(TableRow::has_previous);
        let other = if has_previous { "previous gateway" } else { "baseline" };
        writeln!(
            f,
            "median of {} rounds of {} ms (min–max); × is the ratio to the {other} of the same round",
            self.rounds, self.measured_ms,
        )?;
        writeln!(f, "gateway with defaults, except {}\n", self.gateway_options.join(", "))?;
        if has_previous {
            writeln!(f, "| row | previous | Skein |")?;
            writeln!(f, "| --- | --- | --- |")?;
        } else {
            writeln!(f, "| row | baseline | coalescing baseline | naive axum | Skein | target |")?;
            writeln!(f, "| --- | --- | --- | --- | --- | --- |")?;
        }
        self.rows.iter().try_for_each(|row| write!(f, "{row}"))
    }
}

impl fmt::Display for TableRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.is_valid() { "" } else { " (invalid)" };
        let rest = if self.has_previous() { " | |" } else { " | | | | |" };
        writeln!(f, "| **{}**{mark} |{rest}", self.title)?;
        self.lines.iter().try_for_each(|line| write!(f, "{line}"))?;
        self.flaws.iter().try_for_each(|TableFlaw { candidate, rounds, flaw }| {
            writeln!(f, "| ⚠ {candidate}, {rounds} round(s): {flaw} |{rest}")
        })
    }
}

impl fmt::Display for TableLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell = |cell: Option<TableCell>| match cell {
            Some(TableCell { value, times_previous: Some(times), .. }) => {
                format!("{} = {:.3}×", spread(value), times.median)
            }
            Some(TableCell { value, times_baseline: Some(times), .. }) => {
                format!("{} = {}×", spread(value), Measure::write(times.median))
            }
            Some(TableCell { value, .. }) => spread(value),
            None => String::new(),
        };
        if self.previous.is_some() {
            let (previous, skein) = (cell(self.previous), cell(self.skein));
            return writeln!(f, "| {} | {previous} | {skein} |", self.measure.title());
        }
        let (baseline, coalescing_baseline) = (cell(self.baseline), cell(self.coalescing_baseline));
        let (naive, skein) = (cell(self.naive), cell(self.skein));
        let met = match self.met {
            Some(true) => " ✓",
            Some(false) => " ✗",
            None => "",
        };
        let target = self.target.as_deref().unwrap_or_default();
        let title = self.measure.title();
        writeln!(
            f,
            "| {title} | {baseline} | {coalescing_baseline} | {naive} | {skein} | {target}{met} |"
        )
    }
}

fn spread(spread: Spread) -> String {
    let Spread { median, min, max } = spread;
    let write = Measure::write;
    if min < max {
        format!("{} ({}–{})", write(median), write(min), write(max))
    } else {
        write(median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows::ROWS;

    fn rounds(baseline: f64, skein: f64, flaw: Option<&str>) -> Rounds {
        let sample = |value| RoundSample {
            values: BTreeMap::from([(Measure::Cpu, value)]),
            flaws: flaw.map(str::to_owned).into_iter().collect(),
        };
        vec![(Candidate::Baseline, vec![sample(baseline)]), (Candidate::Skein, vec![sample(skein)])]
    }

    #[test]
    fn line_has_values_ratios_and_the_verdict() {
        let check = |skein, expected: &str| {
            let row = TableRow::new(&ROWS[0], &rounds(8.0, skein, None)).to_string();
            assert!(row.ends_with(expected), "{row}");
        };
        check(1.6, "| server CPU per delivery, µs | 8.00 |  |  | 1.60 = 0.20× | ≤ 0.25× ✓ |\n");
        check(4.0, "| server CPU per delivery, µs | 8.00 |  |  | 4.00 = 0.50× | ≤ 0.25× ✗ |\n");
    }

    #[test]
    fn gateway_is_compared_with_its_previous_build() {
        let of = |values: [f64; 2]| {
            let sample = |value| RoundSample {
                values: BTreeMap::from([(Measure::Cpu, value)]),
                ..RoundSample::default()
            };
            values.map(sample).to_vec()
        };
        let rounds =
            vec![(Candidate::Previous, of([1.0, 2.0])), (Candidate::Skein, of([1.1, 2.0]))];
        let row = TableRow::new(&ROWS[0], &rounds).to_string();
        let expected =
            "| server CPU per delivery, µs | 1.50 (1.00–2.00) | 1.55 (1.10–2.00) = 1.050× |\n";
        assert!(row.ends_with(expected), "{row}");
        assert!(
            row.starts_with("| **fan-out") && row.contains("in flight each)** | | |\n"),
            "{row}"
        );
    }

    #[test]
    fn row_with_a_flaw_is_marked() {
        let row = TableRow::new(&ROWS[0], &rounds(8.0, 1.0, Some("7 deliveries are missing")));
        let text = row.to_string();
        assert!(
            text.contains("(invalid)") && text.contains("Skein, 1 round(s): 7 deliveries"),
            "{text}"
        );
    }
}
