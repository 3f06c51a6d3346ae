//! A cluster, its own or one that is there, members who talk, and a plan of what goes wrong meanwhile.

use std::time::Duration;

use loadtest::proxy::Mode;
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    cluster::{Cluster, ClusterError, Programs},
    given::Given,
    plan::{Fault, Kind},
};
use crate::{
    args::{ChaosArgs, LoadArgs},
    ledger_run::{LedgerRun, LedgerRunError},
    report::{FaultWindow, Report},
};

pub(crate) mod cluster;
mod given;
mod plan;

/// How late what clients send, and get, is while it is delayed.
const CLIENT_DELAY: Duration = Duration::from_millis(200);

/// Why a run has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChaosError {
    /// The cluster does not run.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The members do not.
    #[error(transparent)]
    LedgerRun(#[from] LedgerRunError),
    /// Somebody stopped it.
    #[error("interrupted")]
    Interrupted,
}

/// What members talk through, and faults are done to.
enum Ground {
    /// It was started for this.
    Own(Box<Cluster>),
    /// It was there.
    Given(Given),
}

impl Ground {
    async fn inject(&mut self, fault: Fault) -> Result<(), ClusterError> {
        match self {
            Self::Own(cluster) => inject(cluster, fault).await,
            Self::Given(given) => {
                given.inject(fault).await;
                Ok(())
            }
        }
    }
}

/// Has members talk, does what the plan has, and tells what they saw.
pub(crate) async fn run(args: ChaosArgs) -> Result<Report, ChaosError> {
    let ChaosArgs { seed, given, load, .. } = args;
    if given.url.is_empty() {
        let faults = plan::plan(seed, load.duration, args.nodes, &Kind::ALL);
        let programs = Programs { gateway: args.gateway, render: args.nginx_render };
        // Cancelled, it ends what it has started.
        let cluster = tokio::select! {
            cluster = Cluster::start(programs, args.nodes) => Box::new(cluster?),
            () = crate::interrupted() => return Err(ChaosError::Interrupted),
        };
        let (urls, mut ground) = (cluster.urls(), Ground::Own(cluster));
        let report = suffer(&mut ground, urls, &faults, seed, &load).await;
        if let Ground::Own(cluster) = ground {
            // Whatever came of it.
            cluster.stop().await;
        }
        return report;
    }
    let given = Given::new(&given).await?;
    let faults = plan::plan(seed, load.duration, given.nodes(), &given.kinds());
    let (urls, mut ground) = (given.urls(), Ground::Given(given));
    let report = suffer(&mut ground, urls, &faults, seed, &load).await;
    if let Ground::Given(given) = ground {
        given.mend().await;
    }
    report
}

async fn suffer(
    ground: &mut Ground,
    urls: Vec<String>,
    faults: &[Fault],
    seed: u64,
    load: &LoadArgs,
) -> Result<Report, ChaosError> {
    let run = LedgerRun::start(urls, load).await?;
    let began = run.began();
    let (mut marks, mut failed) = (Vec::new(), None);
    let over = async {
        failed = break_and_mend(ground, faults, began, &mut marks).await.err();
        if failed.is_none() {
            sleep_until(began + load.duration).await;
        }
    };
    let is_interrupted = run.show_progress_until(over).await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if is_interrupted {
        // What was under way is not mended, and nothing could be counted.
        return Err(ChaosError::Interrupted);
    }
    let mut report = run.finish("chaos", &load.bounds).await?;
    (report.faults, report.seed) = (marks, Some(seed));
    report.judge(&load.bounds);
    Ok(report)
}

async fn break_and_mend(
    ground: &mut Ground,
    faults: &[Fault],
    began: Instant,
    marks: &mut Vec<FaultWindow>,
) -> Result<(), ClusterError> {
    for fault in faults {
        sleep_until(began + Duration::from_millis(fault.at_ms)).await;
        let from = began.elapsed();
        ground.inject(*fault).await?;
        marks.push(FaultWindow { fault: name(*fault), from, until: began.elapsed() });
    }
    match ground {
        Ground::Own(cluster) => cluster.wait_until_ready().await,
        Ground::Given(_) => Ok(()),
    }
}

fn name(fault: Fault) -> String {
    match fault.kind {
        Kind::RollingDeploy
        | Kind::RedisKill
        | Kind::RedisRestart
        | Kind::RedisEmpty
        | Kind::RedisStop
        | Kind::RedisClientKillPubsub
        | Kind::RedisClientKillNormal
        | Kind::NginxReload => fault.kind.to_string(),
        kind => format!("{kind} {}", fault.node),
    }
}

/// Does one fault, and mends it.
async fn inject(cluster: &mut Cluster, fault: Fault) -> Result<(), ClusterError> {
    let (node, lasts) = (fault.node, Duration::from_millis(fault.lasts_ms));
    let bus = async |cluster: &Cluster, mode| {
        cluster.nodes[node].bus.set(mode);
        sleep(lasts).await;
        cluster.nodes[node].bus.set(Mode::Open);
    };
    let clients = async |cluster: &Cluster, mode| {
        cluster.nodes[node].clients.set(mode);
        sleep(lasts).await;
        cluster.nodes[node].clients.set(Mode::Open);
    };
    match fault.kind {
        Kind::GatewayKill => cluster.restart_gateway(node, true).await?,
        Kind::GatewayTerm => cluster.restart_gateway(node, false).await?,
        Kind::GatewayStop => {
            cluster.signal_gateway(node, "STOP").await;
            sleep(lasts).await;
            cluster.signal_gateway(node, "CONT").await;
        }
        Kind::RollingDeploy => {
            for number in 0..cluster.nodes.len() {
                cluster.restart_gateway(number, false).await?;
                cluster.wait_until_ready().await?;
            }
        }
        Kind::RedisKill => cluster.restart_redis(true, false).await?,
        Kind::RedisRestart => cluster.restart_redis(false, false).await?,
        Kind::RedisEmpty => cluster.restart_redis(true, true).await?,
        Kind::RedisStop => {
            cluster.signal_redis("STOP").await;
            sleep(lasts).await;
            cluster.signal_redis("CONT").await;
        }
        Kind::RedisClientKillPubsub => cluster.tell_redis("CLIENT KILL TYPE pubsub").await,
        Kind::RedisClientKillNormal => cluster.tell_redis("CLIENT KILL TYPE normal").await,
        Kind::NginxReload => cluster.reload_nginx().await,
        Kind::BusCut => bus(cluster, Mode::Cut).await,
        Kind::BusBlackHole => bus(cluster, Mode::BlackHole).await,
        Kind::BusDelay => bus(cluster, Mode::Delay(Duration::from_millis(100))).await,
        Kind::BusOneWay => bus(cluster, Mode::HoldRequests).await,
        Kind::ClientCut => clients(cluster, Mode::Cut).await,
        Kind::ClientBlackHole => clients(cluster, Mode::BlackHole).await,
        Kind::ClientDelay => clients(cluster, Mode::Delay(CLIENT_DELAY)).await,
    }
    Ok(())
}
