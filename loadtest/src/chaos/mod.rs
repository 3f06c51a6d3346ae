//! `loadtest chaos`: a ledger run against a cluster, local or external, into which a plan of faults
//! is injected.

use std::time::Duration;

use skein_testkit::{proxy::Mode, servers::ServerError};
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    cluster::{ClusterPrograms, LocalCluster},
    external::ExternalCluster,
    plan::{CLIENT_DELAY, FaultKind, PlannedFault},
};
use crate::{
    args::{ChaosArgs, LoadArgs},
    ledger_run::{ClusterRunError, LedgerRun},
    report::{FaultWindow, Report},
    signals,
};

pub(crate) mod cluster;
mod external;
mod plan;

/// The cluster that clients use and faults are injected into.
enum ChaosTarget {
    /// Started for this run.
    Local(Box<LocalCluster>),
    /// Started by others.
    External(ExternalCluster),
}

impl ChaosTarget {
    async fn inject(&mut self, fault: PlannedFault) -> Result<(), ServerError> {
        match self {
            Self::Local(cluster) => inject(cluster, fault).await,
            Self::External(external) => {
                external.inject(fault).await;
                Ok(())
            }
        }
    }
}

/// Runs `loadtest chaos`.
pub(crate) async fn run(args: ChaosArgs) -> Result<Report, ClusterRunError> {
    let ChaosArgs { seed, external, load, .. } = args;
    if external.url.is_empty() {
        let faults = plan::plan(seed, load.duration, args.nodes, &FaultKind::ALL);
        let programs = ClusterPrograms { gateway: args.gateway, render: args.nginx_render };
        // If it is cancelled, dropping it ends the started processes.
        let cluster = tokio::select! {
            cluster = LocalCluster::start(programs, args.nodes) => Box::new(cluster?),
            () = signals::interrupted() => return Err(ClusterRunError::Interrupted),
        };
        let (urls, mut target) = (cluster.urls(), ChaosTarget::Local(cluster));
        let report = run_faults(&mut target, urls, &faults, seed, &load).await;
        if let ChaosTarget::Local(cluster) = target {
            // Whether the run succeeded or not.
            cluster.stop().await;
        }
        return report;
    }
    let external = ExternalCluster::new(&external).await?;
    let faults = plan::plan(seed, load.duration, external.nodes(), &external.kinds());
    let (urls, mut target) = (external.urls(), ChaosTarget::External(external));
    let report = run_faults(&mut target, urls, &faults, seed, &load).await;
    if let ChaosTarget::External(external) = target {
        external.recover().await;
    }
    report
}

async fn run_faults(
    target: &mut ChaosTarget,
    urls: Vec<String>,
    faults: &[PlannedFault],
    seed: u64,
    load: &LoadArgs,
) -> Result<Report, ClusterRunError> {
    let run = LedgerRun::start(urls, load).await?;
    let began = run.began();
    let (mut windows, mut failed) = (Vec::new(), None);
    let over = async {
        failed = inject_faults(target, faults, began, &mut windows).await.err();
        if failed.is_none() {
            sleep_until(began + load.duration).await;
        }
    };
    let is_interrupted = run.show_progress_until(over).await;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if is_interrupted {
        // Interrupted faults were not ended, and messages cannot be counted.
        return Err(ClusterRunError::Interrupted);
    }
    let mut report = run.finish("chaos", &load.thresholds).await?;
    (report.faults, report.seed) = (windows, Some(seed));
    report.evaluate(&load.thresholds);
    Ok(report)
}

async fn inject_faults(
    target: &mut ChaosTarget,
    faults: &[PlannedFault],
    began: Instant,
    windows: &mut Vec<FaultWindow>,
) -> Result<(), ServerError> {
    for fault in faults {
        sleep_until(began + Duration::from_millis(fault.at_ms)).await;
        let from = began.elapsed();
        target.inject(*fault).await?;
        windows.push(FaultWindow { fault: name(*fault), from, until: began.elapsed() });
    }
    match target {
        ChaosTarget::Local(cluster) => cluster.wait_until_ready().await,
        ChaosTarget::External(_) => Ok(()),
    }
}

fn name(fault: PlannedFault) -> String {
    match fault.kind {
        FaultKind::RollingDeploy
        | FaultKind::RedisKill
        | FaultKind::RedisRestart
        | FaultKind::RedisEmpty
        | FaultKind::RedisStop
        | FaultKind::RedisClientKillPubsub
        | FaultKind::RedisClientKillNormal
        | FaultKind::NginxReload => fault.kind.to_string(),
        kind => format!("{kind} {}", fault.node),
    }
}

/// Injects one fault and ends it.
async fn inject(cluster: &mut LocalCluster, fault: PlannedFault) -> Result<(), ServerError> {
    let (node, duration) = (fault.node, Duration::from_millis(fault.duration_ms));
    let bus = async |cluster: &LocalCluster, mode| {
        cluster.nodes[node].bus.set(mode);
        sleep(duration).await;
        cluster.nodes[node].bus.set(Mode::Open);
    };
    let clients = async |cluster: &LocalCluster, mode| {
        cluster.nodes[node].clients.set(mode);
        sleep(duration).await;
        cluster.nodes[node].clients.set(Mode::Open);
    };
    match fault.kind {
        FaultKind::GatewayKill => cluster.restart_gateway(node, true).await?,
        FaultKind::GatewayTerm => cluster.restart_gateway(node, false).await?,
        FaultKind::GatewayStop => {
            cluster.signal_gateway(node, "STOP").await;
            sleep(duration).await;
            cluster.signal_gateway(node, "CONT").await;
        }
        FaultKind::RollingDeploy => {
            for number in 0..cluster.nodes.len() {
                cluster.restart_gateway(number, false).await?;
                cluster.wait_until_ready().await?;
            }
        }
        FaultKind::RedisKill => cluster.restart_redis(true, false).await?,
        FaultKind::RedisRestart => cluster.restart_redis(false, false).await?,
        FaultKind::RedisEmpty => cluster.restart_redis(true, true).await?,
        FaultKind::RedisStop => {
            cluster.signal_redis("STOP").await;
            sleep(duration).await;
            cluster.signal_redis("CONT").await;
        }
        FaultKind::RedisClientKillPubsub => {
            cluster.send_redis_command("CLIENT KILL TYPE pubsub").await;
        }
        FaultKind::RedisClientKillNormal => {
            cluster.send_redis_command("CLIENT KILL TYPE normal").await;
        }
        FaultKind::NginxReload => cluster.reload_nginx().await,
        FaultKind::BusCut => bus(cluster, Mode::Cut).await,
        FaultKind::BusBlackHole => bus(cluster, Mode::BlackHole).await,
        FaultKind::BusDelay => bus(cluster, Mode::Delay(Duration::from_millis(100))).await,
        FaultKind::BusOneWay => bus(cluster, Mode::HoldRequests).await,
        FaultKind::ClientCut => clients(cluster, Mode::Cut).await,
        FaultKind::ClientBlackHole => clients(cluster, Mode::BlackHole).await,
        FaultKind::ClientDelay => clients(cluster, Mode::Delay(CLIENT_DELAY)).await,
    }
    Ok(())
}
