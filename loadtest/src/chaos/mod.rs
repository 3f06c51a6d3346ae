//! A cluster of its own, members who talk, and a plan of what goes wrong meanwhile.

use std::time::Duration;

use loadtest::proxy::Mode;
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    cluster::{Cluster, ClusterError, Programs},
    plan::{Fault, Kind},
};
use crate::{
    args::{ChaosArgs, LoadArgs},
    report::{Mark, Report},
    trial::{Trial, TrialError},
};

mod cluster;
mod plan;

/// Why a run has no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChaosError {
    /// The cluster does not run.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The members do not.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// Somebody stopped it.
    #[error("interrupted")]
    Interrupted,
}

/// Starts a cluster, has members talk, does what the plan has, and tells what they saw.
pub(crate) async fn run(args: ChaosArgs) -> Result<Report, ChaosError> {
    let faults = plan::plan(args.seed, args.load.duration, args.nodes);
    let programs = Programs { gateway: args.gateway, render: args.nginx_render };
    let mut cluster = Cluster::start(programs, args.nodes).await?;
    let report = suffer(&mut cluster, &faults, args.seed, &args.load).await;
    // Whatever came of it.
    cluster.stop().await;
    report
}

async fn suffer(
    cluster: &mut Cluster,
    faults: &[Fault],
    seed: u64,
    load: &LoadArgs,
) -> Result<Report, ChaosError> {
    let trial = Trial::start(cluster.urls(), load).await?;
    let began = trial.began();
    let (mut marks, mut failed) = (Vec::new(), None);
    let over = async {
        failed = break_and_mend(cluster, faults, began, &mut marks).await.err();
        if failed.is_none() {
            sleep_until(began + load.duration).await;
        }
    };
    let is_interrupted = trial.shown_until(over).await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if is_interrupted {
        // What was under way is not mended, and nothing could be counted.
        return Err(ChaosError::Interrupted);
    }
    let mut report = trial.finish("chaos", &load.bounds).await?;
    (report.faults, report.seed) = (marks, Some(seed));
    report.judge(&load.bounds);
    Ok(report)
}

async fn break_and_mend(
    cluster: &mut Cluster,
    faults: &[Fault],
    began: Instant,
    marks: &mut Vec<Mark>,
) -> Result<(), ClusterError> {
    for fault in faults {
        sleep_until(began + Duration::from_millis(fault.at_ms)).await;
        let from = began.elapsed();
        inject(cluster, *fault).await?;
        marks.push(Mark { what: name(*fault), from, until: began.elapsed() });
    }
    cluster.wait_until_ready().await
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
        Kind::BusBlackHole => bus(cluster, Mode::Hole).await,
        Kind::BusDelay => bus(cluster, Mode::Delay(Duration::from_millis(100))).await,
        Kind::BusOneWay => bus(cluster, Mode::NoRequests).await,
        Kind::ClientCut => clients(cluster, Mode::Cut).await,
        Kind::ClientBlackHole => clients(cluster, Mode::Hole).await,
        Kind::ClientDelay => clients(cluster, Mode::Delay(Duration::from_millis(200))).await,
    }
    Ok(())
}
