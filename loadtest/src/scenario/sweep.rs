//! `loadtest sweep`: the highest rate at which p99 stays under a bound.
//!
//! The rate doubles until the bound is exceeded, then the interval is halved a few times. If this
//! tool is the bottleneck, the sweep says so and stops there.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use skein_testkit::timeline;

use super::{ScenarioError, ScenarioOutput, ScenarioRun, run_scenario, traffic::Traffic};
use crate::{
    args::{ArrivalRate, ProcessArgs, SweepArgs},
    report::{
        GeneratorReport, Report, StepResult,
        messages::{Latency, milliseconds},
    },
    virtual_users::{RoomAssignment, workers::WorkerReport},
};

/// Number of bisections.
const HALVINGS: u32 = 4;
/// Pause between two rates, so that one does not affect the next.
const REST: Duration = Duration::from_millis(500);

/// Outcome of one rate.
#[derive(Debug, PartialEq)]
enum RateOutcome {
    Sustained,
    /// The servers were too slow.
    Overloaded,
    /// This tool was too slow.
    GeneratorOverloaded,
}

/// Runs `loadtest sweep`.
pub(crate) async fn run(args: SweepArgs) -> Result<Option<Report>, ScenarioError> {
    let (common, connections) = (args.common.clone(), args.size.connections());
    let run = move |stop| sweep(&args, connections, &stop);
    run_scenario("sweep", common, ProcessArgs::SINGLE, connections, true, run).await
}

fn sweep(
    args: &SweepArgs,
    connections: u32,
    stop: &Arc<AtomicBool>,
) -> Result<ScenarioOutput, ScenarioError> {
    let rooms = RoomAssignment::RoundRobin(args.size.rooms);
    let mut run = ScenarioRun::open(&args.common, None, rooms, connections, true, stop)?;
    let (mut steps, mut best) = (Vec::new(), None);
    let mut try_rate = |run: &mut ScenarioRun, rate: f64| -> Result<RateOutcome, ScenarioError> {
        let traffic = Traffic {
            senders: connections.into(),
            rate: ArrivalRate::per_second(rate),
            duration: args.step,
            bytes: args.bytes,
        };
        run.users.run_until(tokio::time::Instant::now() + REST)?;
        run.users.start_measuring();
        run.send_traffic(traffic)?;
        let report = WorkerReport::of(&mut run.users, &run.usage);
        let latency = Latency::of(&timeline::histogram(&report.seconds));
        let outcome = classify(&report, &latency, args.bound);
        let deliveries = report.counters.delivered as f64 / args.step.as_secs_f64();
        let (p50, p99) = (milliseconds(latency.p50_us), milliseconds(latency.p99_us));
        let word = match outcome {
            RateOutcome::Sustained => "",
            RateOutcome::Overloaded => ": overloaded",
            RateOutcome::GeneratorOverloaded => ": too much for the load generator",
        };
        steps.push(StepResult {
            name: format!("{rate:.0} messages/s"),
            result: format!("{deliveries:.0} deliveries/s, p50 {p50}, p99 {p99}{word}"),
            passed: true,
        });
        if outcome == RateOutcome::Sustained {
            best = Some((rate, deliveries, report));
        }
        Ok(outcome)
    };
    let mut sustained = 0.0;
    let mut rate = args.from.events_per_second();
    let mut end = loop {
        let outcome = try_rate(&mut run, rate)?;
        if outcome != RateOutcome::Sustained || run.users.is_stopped() {
            break outcome;
        }
        sustained = rate;
        rate *= 2.0;
    };
    for _ in 0..if sustained > 0.0 { HALVINGS } else { 0 } {
        if run.users.is_stopped() {
            break;
        }
        let middle = f64::midpoint(sustained, rate);
        match try_rate(&mut run, middle)? {
            RateOutcome::Sustained => sustained = middle,
            other => (rate, end) = (middle, other),
        }
    }
    let bound = humantime::format_duration(args.bound);
    let (result, passed) = match &best {
        Some((rate, deliveries, _)) if end == RateOutcome::Overloaded => {
            (format!("{rate:.0} messages/s, {deliveries:.0} deliveries/s"), true)
        }
        Some((rate, deliveries, _)) => {
            let text = format!(
                "at least {rate:.0} messages/s, {deliveries:.0} deliveries/s: more is too much for \
                 the load generator"
            );
            (text, true)
        }
        None => ("exceeded at the lowest rate".to_owned(), false),
    };
    steps.push(StepResult { name: format!("p99 ≤ {bound}"), result, passed });
    let mut output = run.end(steps)?;
    // The report covers the best rate, whatever was tried after it.
    if let (Some((report, _)), Some((.., of_best))) = (&mut output.all, best) {
        let (connections, opening_s) = (std::mem::take(&mut report.connections), report.opening_s);
        let traffic_s = args.step.as_secs_f64();
        *report = WorkerReport { connections, opening_s, traffic_s, ..of_best };
    }
    Ok(output)
}

fn classify(report: &WorkerReport, latency: &Latency, p99_max: Duration) -> RateOutcome {
    let own = GeneratorReport {
        processes: 1,
        cpu_percent: report.cpu_percent,
        lag_p99_us: report.lag_p99_us(),
        memory_per_connection_bytes: None,
    };
    let counters = &report.counters;
    let wrong = counters.lost
        + counters.duplicated
        + counters.out_of_order
        + counters.gaps
        + counters.unanswered;
    if own.invalid_reason().is_some() {
        RateOutcome::GeneratorOverloaded
    } else if wrong + counters.rejected > 0 || u128::from(latency.p99_us) > p99_max.as_micros() {
        RateOutcome::Overloaded
    } else {
        RateOutcome::Sustained
    }
}
