//! `loadtest deploy` and `loadtest scale`: a ledger run against a local cluster whose gateways are
//! restarted one after the other, or to which gateways are added.

use std::{collections::BTreeMap, fmt, path::Path, time::Duration};

use hdrhistogram::Histogram;
use skein_testkit::servers::ServerError;
use tokio::time::{Instant, sleep};

use self::cluster::SlotCluster;
use crate::{
    args::{DeployArgs, DeployScheme, LoadArgs, ScaleArgs},
    ledger_run::{ClusterRunError, LedgerRun},
    report::{Report, StepResult},
    signals,
};

mod cluster;

/// Time between two restarts at least; all clients are connected by then.
const SETTLE: Duration = Duration::from_secs(1);
/// Time limit for all clients to be connected.
const CONNECTED_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How far from the mean the number of connections of a gateway may be, percent.
const UNEVEN_MAX_PERCENT: f64 = 10.0;
/// The most moves per client and deploy.
const MOVES_MAX: f64 = 1.05;
/// The interval for which reconnects are counted.
const RECONNECT_BIN: Duration = Duration::from_millis(100);
/// The longest time away that is told apart.
const AWAY_MAX_US: u64 = 600_000_000;
/// How often the connections of each gateway are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(5);

/// Counts of connections, in the order of the gateways.
struct Counts<'a>(&'a [u64]);

impl Counts<'_> {
    fn is_even(&self) -> bool {
        let mean = self.0.iter().sum::<u64>() as f64 / self.0.len().max(1) as f64;
        let is_near =
            |count: &u64| (*count as f64 - mean).abs() <= mean * UNEVEN_MAX_PERCENT / 100.0;
        self.0.iter().all(is_near)
    }
}

impl fmt::Display for Counts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<String> = self.0.iter().map(u64::to_string).collect();
        f.write_str(&counts.join(" / "))
    }
}

/// Runs `loadtest deploy`.
pub(crate) async fn run(args: DeployArgs) -> Result<Report, ClusterRunError> {
    let slots = match args.scheme {
        DeployScheme::Surge => args.nodes + 1,
        DeployScheme::InPlace => args.nodes,
    };
    let first = args.previous.as_deref().unwrap_or(&args.gateway);
    let options = match args.previous {
        // Another version may not know the option.
        Some(_) => vec![],
        None => vec![format!("drain.restart_time={}ms", args.restart_time.as_millis())],
    };
    let start = SlotCluster::start(first, &args.nginx_render, slots, args.nodes, options);
    // If it is cancelled, dropping it ends the started processes.
    let mut cluster = tokio::select! {
        cluster = start => cluster?,
        () = signals::interrupted() => return Err(ClusterRunError::Interrupted),
    };
    let report = run_deploys(&mut cluster, &args).await;
    // Whether the run succeeded or not.
    cluster.stop().await;
    report
}

async fn run_deploys(
    cluster: &mut SlotCluster,
    args: &DeployArgs,
) -> Result<Report, ClusterRunError> {
    let run = LedgerRun::start(vec![cluster.url()], &args.load).await?;
    let mut failed = None;
    let deploys = async {
        // The nodes learn of each other's connections.
        sleep(SETTLE).await;
        for number in 0..args.deploys {
            let program = match &args.previous {
                // Forward, back, and forward again.
                Some(previous) if number % 2 == 1 => previous,
                _ => &args.gateway,
            };
            failed = deploy(cluster, &run, args, program).await.err();
            if failed.is_some() {
                return;
            }
        }
    };
    let is_interrupted = run.show_progress_until(deploys).await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if is_interrupted {
        return Err(ClusterRunError::Interrupted);
    }
    // A gateway counts a connection a moment after its client has `connected`.
    let clients = (args.load.rooms * args.load.members) as u64;
    let deadline = Instant::now() + CONNECTED_TIMEOUT;
    let mut counts = cluster.connections().await;
    while counts.iter().sum::<u64>() != clients && Instant::now() < deadline {
        sleep(POLL_INTERVAL).await;
        counts = cluster.connections().await;
    }
    let steps = move_steps(&run, args, &counts);
    let mut report = run.finish("deploy", &args.load.thresholds).await?;
    report.steps = steps;
    report.evaluate(&args.load.thresholds);
    Ok(report)
}

/// Replaces all gateways, one after the other, by those of a program.
async fn deploy(
    cluster: &mut SlotCluster,
    run: &LedgerRun,
    args: &DeployArgs,
    program: &Path,
) -> Result<(), ServerError> {
    for old in cluster.running() {
        match args.scheme {
            DeployScheme::Surge => {
                let spare = cluster.spare().expect("one slot more than gateways");
                cluster.start_gateway(program, spare).await?;
                cluster.stop_gateway(old).await;
            }
            DeployScheme::InPlace => {
                cluster.stop_gateway(old).await;
                cluster.start_gateway(program, old).await?;
            }
        }
        sleep(SETTLE).await;
        let clients = (args.load.rooms * args.load.members) as u64;
        let deadline = Instant::now() + CONNECTED_TIMEOUT;
        while run.open() < clients && Instant::now() < deadline {
            sleep(POLL_INTERVAL).await;
        }
    }
    Ok(())
}

fn move_steps(run: &LedgerRun, args: &DeployArgs, counts: &[u64]) -> Vec<StepResult> {
    let reconnects = run.reconnects();
    let clients = args.load.rooms * args.load.members;
    let moves = reconnects.len() as f64 / clients as f64 / args.deploys as f64;
    let mut away_us =
        Histogram::<u64>::new_with_max(AWAY_MAX_US, 3).expect("3 digits are possible");
    let mut bins = BTreeMap::new();
    for (at, away) in &reconnects {
        away_us.saturating_record(away.as_micros() as u64);
        let bin = at.duration_since(run.began()).as_millis() / RECONNECT_BIN.as_millis();
        *bins.entry(bin).or_insert(0_u64) += 1;
    }
    let mut per_bin = Histogram::<u64>::new_with_max(1_000_000, 3).expect("3 digits are possible");
    bins.values().for_each(|count| per_bin.saturating_record(*count));
    let step = |name: &str, result: String, passed: bool| StepResult {
        name: name.to_owned(),
        result,
        passed,
    };
    let ms = |quantile: f64| away_us.value_at_quantile(quantile) / 1000;
    // Gateways of another version may not name the node that a client goes to.
    let is_judged = args.previous.is_none();
    let scheme = match args.scheme {
        DeployScheme::Surge => "each new gateway starts before an old one stops",
        DeployScheme::InPlace => "each gateway restarts at its address",
    };
    vec![
        step("deploys", format!("{} of {} gateways: {scheme}", args.deploys, args.nodes), true),
        step(
            "moves per client and deploy",
            format!("{moves:.3}"),
            !is_judged || moves <= MOVES_MAX,
        ),
        step(
            "reconnects per 100 ms",
            format!(
                "p50 {}, p99 {}, max {} (intervals with any)",
                per_bin.value_at_quantile(0.5),
                per_bin.value_at_quantile(0.99),
                per_bin.max()
            ),
            true,
        ),
        step(
            "time away",
            format!("p50 {} ms, p99 {} ms, max {} ms", ms(0.5), ms(0.99), ms(1.0)),
            true,
        ),
        step(
            "connections at the end",
            Counts(counts).to_string(),
            !is_judged || Counts(counts).is_even(),
        ),
    ]
}

/// Runs `loadtest scale`.
pub(crate) async fn scale(args: ScaleArgs) -> Result<Report, ClusterRunError> {
    let start = SlotCluster::start(&args.gateway, &args.nginx_render, args.to, args.from, vec![]);
    let mut cluster = tokio::select! {
        cluster = start => cluster?,
        () = signals::interrupted() => return Err(ClusterRunError::Interrupted),
    };
    let report = run_scale(&mut cluster, &args).await;
    cluster.stop().await;
    report
}

async fn run_scale(cluster: &mut SlotCluster, args: &ScaleArgs) -> Result<Report, ClusterRunError> {
    let load: &LoadArgs = &args.load;
    let run = LedgerRun::start(vec![cluster.url()], load).await?;
    let (mut failed, mut steps) = (None, Vec::new());
    let scaling = async {
        while cluster.running().len() < args.to
            && let Some(spare) = cluster.spare()
        {
            failed = cluster.start_gateway(&args.gateway, spare).await.err();
            if failed.is_some() {
                return;
            }
        }
        let begun = Instant::now();
        let mut is_even = false;
        while !is_even && begun.elapsed() < load.duration {
            let counts = cluster.connections().await;
            is_even = Counts(&counts).is_even();
            let name = format!("connections after {} s", begun.elapsed().as_secs());
            steps.push(StepResult { name, result: Counts(&counts).to_string(), passed: true });
            if !is_even {
                sleep(COUNT_INTERVAL).await;
            }
        }
        if let Some(last) = steps.last_mut() {
            last.passed = is_even;
        }
    };
    let is_interrupted = run.show_progress_until(scaling).await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if is_interrupted {
        return Err(ClusterRunError::Interrupted);
    }
    let moves = run.reconnects().len() as f64 / (load.rooms * load.members) as f64;
    let result = format!("{moves:.3}");
    steps.push(StepResult { name: "moves per client".to_owned(), result, passed: moves <= 1.0 });
    let mut report = run.finish("scale", &load.thresholds).await?;
    report.steps = steps;
    report.evaluate(&load.thresholds);
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_within_a_tenth_of_the_mean_are_even() {
        assert!(Counts(&[250, 250, 250, 250]).is_even() && Counts(&[225, 275]).is_even());
        assert!(!Counts(&[224, 276]).is_even() && !Counts(&[500, 500, 0, 0]).is_even());
        assert_eq!(Counts(&[500, 0]).to_string(), "500 / 0");
    }
}
