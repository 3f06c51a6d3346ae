//! `loadtest abuse`: attacks one of two gateways while legitimate clients use both, and judges
//! whether the attacked gateway served its legitimate clients as well as the other, and released
//! the resources that it held.

use std::{
    fmt::Write as _,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};

use self::{
    attacker::{Attacker, AttackerStats},
    catalogue::{Attack, CATALOGUE, Scale},
    error::AbuseError,
    legitimate::{ClientsSize, LegitimateClients},
    testbed::{AbuseNode, NodeOptions},
    verdict::{AttackMeasurement, AttackThresholds, AttackVerdict, NodeUsage},
};
use crate::{
    args::AbuseArgs,
    report::{GeneratorReport, Report, StepResult, attacks::AttackRow},
    scenario::{ScenarioError, ending_early},
    virtual_users::workers::GeneratorUsage,
};

mod attacker;
mod catalogue;
mod error;
mod legitimate;
mod profile;
mod slow_link;
mod testbed;
pub(crate) mod verdict;

/// Members of each room of legitimate clients.
const ROOM_MEMBERS: u32 = 10;
/// Interval between samples of the usage during an attack.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
/// Interval between checks whether the node has recovered.
const RECOVERY_POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Number of attempts to read the usage before an attack if Redis does not answer.
const USAGE_TRIES: u32 = 20;
/// Duration of the traffic on a node that was just started, so that its memory is in use.
const WARM_UP: Duration = Duration::from_secs(3);
/// Time between the start of the attack and the measurement of legitimate clients.
const LEAD_TIME: Duration = Duration::from_millis(300);
/// Most connections of the attacker, whatever the limit of descriptors.
const CONNECTIONS_MAX: u64 = 15_000;
/// Descriptors of this process, and of the gateway, that are not the attacker's.
const SPARE_DESCRIPTORS: u64 = 2_500;

/// Lists the catalogue.
pub(crate) fn list() -> String {
    let mut list = String::new();
    let mut line = |name: &str, group: &str, what: &str| {
        writeln!(list, "{group:<3} {name:<18} {what}").expect("writing to a String succeeds");
    };
    for Attack { name, group, what, .. } in CATALOGUE {
        line(name, group, what);
    }
    line(slow_link::NAME, slow_link::GROUP, slow_link::WHAT);
    list
}

/// Whether the slow link was requested.
fn is_link_requested(requested: &[String]) -> bool {
    let names = [slow_link::NAME, "e1", "e"];
    requested.is_empty()
        || requested.iter().any(|name| names.contains(&name.to_ascii_lowercase().as_str()))
}

/// Runs the requested attacks one after the other, and builds the report.
pub(crate) async fn run(args: AbuseArgs) -> Result<Report, AbuseError> {
    let (mut requested, runs_link) = (args.attacks.clone(), is_link_requested(&args.attacks));
    requested.retain(|name| ![slow_link::NAME, "e1", "E1"].contains(&name.as_str()));
    let attacks = match (args.attacks.is_empty(), requested.is_empty()) {
        (false, true) => Vec::new(),
        _ => catalogue::selected(&requested).map_err(AbuseError::Unknown)?,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let mut report = Report::of("abuse");
    let mut usage = GeneratorUsage::new();
    usage.start();
    let rows = ending_early(&stop, Box::pin(run_all(&args, &attacks, &stop))).await?;
    usage.stop();
    if runs_link && !stop.load(Ordering::Relaxed) {
        match ending_early(&stop, Box::pin(slow_link::run(&args, &stop))).await? {
            Ok(steps) => report.steps = steps,
            // If the slow link was requested by name, it is a failure that it cannot run.
            Err(error) if args.attacks.iter().any(|name| name == slow_link::NAME) => {
                return Err(error.into());
            }
            Err(error) => report.steps.push(StepResult {
                name: slow_link::NAME.to_owned(),
                result: format!("skipped: {error}"),
                passed: true,
            }),
        }
    }
    report.interrupted = stop.load(Ordering::Relaxed);
    let lag =
        |row: &AttackRow| row.measured.legitimate.lag_p99_us.max(row.measured.control.lag_p99_us);
    report.generator = GeneratorReport {
        processes: 1,
        // It includes the attacker's CPU time; the lateness of legitimate clients decides.
        cpu_percent: usage.cpu_percent(),
        lag_p99_us: rows.iter().map(lag).max().unwrap_or_default(),
        memory_per_connection_bytes: None,
    };
    if report.interrupted {
        report.failures.push("interrupted".to_owned());
    }
    for row in &rows {
        let failures = row.verdict.failures.iter();
        report.failures.extend(failures.map(|failure| format!("{}: {failure}", row.name)));
    }
    let failed = report.steps.iter().filter(|step| !step.passed);
    let failed = failed.map(|step| format!("{}: {}", step.name, step.result));
    report.failures.extend(failed.collect::<Vec<_>>());
    let invalid: Vec<&str> =
        rows.iter().filter(|row| row.verdict.invalid.is_some()).map(|row| row.name).collect();
    report.invalid = (!invalid.is_empty())
        .then(|| format!("the load generator was late during {}", invalid.join(", ")));
    report.passed = report.failures.is_empty() && report.invalid.is_none();
    report.attacks = rows;
    Ok(report)
}

async fn run_all(
    args: &AbuseArgs,
    attacks: &[&Attack],
    stop: &Arc<AtomicBool>,
) -> Result<Vec<AttackRow>, AbuseError> {
    let descriptors = rlimit::increase_nofile_limit(u64::MAX)?;
    let limit = descriptors.saturating_sub(SPARE_DESCRIPTORS).clamp(100, CONNECTIONS_MAX);
    let scale = Scale { connections_max: limit as u32 };
    let (mut rows, mut testbed): (_, Option<Testbed>) = (Vec::new(), None);
    for attack in attacks {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mut current = match testbed.take() {
            Some(testbed) => testbed,
            None => Testbed::start(args, stop).await?,
        };
        let measured = current.run_attack(attack, scale, args).await?;
        let bounds = AttackThresholds { slack: args.slack, lag_max: args.lag_max };
        let verdict = measured.evaluate(&(attack.allowed)(scale), &bounds);
        print_progress(attack, &measured, &verdict);
        // A node that has not recovered is not used for the next attack.
        if measured.recovered_after.is_some() && current.open().await {
            testbed = Some(current);
        } else {
            current.stop().await;
        }
        rows.push(AttackRow { group: attack.group, name: attack.name, measured, verdict });
    }
    if let Some(testbed) = testbed {
        testbed.stop().await;
    }
    Ok(rows)
}

/// Prints progress to standard error.
fn print_progress(attack: &Attack, measured: &AttackMeasurement, verdict: &AttackVerdict) {
    eprintln!("{:<18} {verdict}", attack.name);
    if !measured.close_reasons.is_empty() {
        eprintln!("{:<18}   attacker: {:?}", "", measured.close_reasons);
    }
    for example in measured.legitimate.examples.iter().take(5) {
        eprintln!("{:<18}   legitimate: {example}", "");
    }
}

/// Both nodes and their legitimate clients.
struct Testbed {
    // First, so that clients end before the nodes.
    attacked: LegitimateClients,
    control: LegitimateClients,
    nodes: [AbuseNode; 2],
    stop: Arc<AtomicBool>,
}

impl Testbed {
    async fn start(args: &AbuseArgs, stop: &Arc<AtomicBool>) -> Result<Self, AbuseError> {
        let options = NodeOptions {
            gateway: args.gateway.clone(),
            redis_maxmemory: args.redis_maxmemory.clone(),
            set: args.set.clone(),
        };
        let nodes = tokio::try_join!(
            AbuseNode::start("attacked", &options),
            AbuseNode::start("control", &options),
        )?;
        let nodes = [nodes.0, nodes.1];
        let rooms = (args.clients / ROOM_MEMBERS).max(1);
        let size = ClientsSize { members: args.clients, rooms, rate: args.rate };
        let start = async |node: &AbuseNode| {
            let (address, stop) = (node.listen, stop.clone());
            let started =
                tokio::task::spawn_blocking(move || LegitimateClients::start(address, size, stop));
            started.await?.map_err(AbuseError::from)
        };
        let (attacked, control) = (start(&nodes[0]).await?, start(&nodes[1]).await?);
        let testbed = Self { attacked, control, nodes, stop: stop.clone() };
        let warm_up = WARM_UP.min(Duration::from_secs(args.seconds.into()));
        testbed.measure_both(warm_up).await?;
        Ok(testbed)
    }

    /// Opens disconnected legitimate clients; `false` if that fails.
    async fn open(&self) -> bool {
        let (attacked, control) = tokio::join!(self.attacked.open(), self.control.open());
        attacked && control
    }

    async fn measure_both(
        &self,
        duration: Duration,
    ) -> Result<(verdict::LegitimateMetrics, verdict::LegitimateMetrics), ScenarioError> {
        tokio::try_join!(self.attacked.measure(duration), self.control.measure(duration))
    }

    /// Usage of each node.
    async fn usage(&self) -> [NodeUsage; 2] {
        let (attacked, control) = tokio::join!(self.nodes[0].usage(), self.nodes[1].usage());
        [attacked, control]
    }

    /// Attacks one node, measures both, and waits until the attacked node has recovered.
    async fn run_attack(
        &mut self,
        attack: &Attack,
        scale: Scale,
        args: &AbuseArgs,
    ) -> Result<AttackMeasurement, AbuseError> {
        let before = self.known_usage().await;
        let mut attacker = Attacker::new(self.nodes[0].listen, self.stop.clone())?;
        let prepare = (attack.prepare)(scale);
        let mut attacker = tokio::task::spawn_blocking(move || {
            attacker.prepare(&prepare)?;
            io::Result::Ok(attacker)
        })
        .await??;
        let usage_before = self.usage().await;
        let began = Instant::now();
        let duration = Duration::from_secs(args.seconds.into());
        let (until, profiles) = (began + LEAD_TIME + duration, (attack.attack)(scale));
        let drops = attack.drops_prepared;
        let attacking = tokio::task::spawn_blocking(move || {
            attacker.attack(&profiles, drops, until)?;
            io::Result::Ok((attacker.stats, Instant::now()))
        });
        let legitimate = async {
            sleep(LEAD_TIME).await;
            self.measure_both(duration).await
        };
        let sampled = self.sample_until(until, usage_before);
        let (stats, legitimate, (peak, at_end)) = tokio::join!(attacking, legitimate, sampled);
        let ((stats, ended), (legitimate, control)) = (stats??, legitimate?);
        let lasted = ended.duration_since(began).as_secs_f64();
        let (recovered_after, residual, later) =
            self.wait_until_recovered(attack, scale, before, ended, args.recovery).await;
        let died = self.nodes[0].has_ended();
        let percent = |now: u64, before: u64| (now.saturating_sub(before)) as f64 / 10.0 / lasted;
        let cpu = |node: usize, of: fn(&NodeUsage) -> u64| {
            percent(of(&at_end[node]), of(&usage_before[node]))
        };
        // Bytes that were sent before the end may use most memory after it.
        let peak_growth = net(peak, before).peak(later);
        let AttackerStats { sent_bytes, open_peak, close_reasons, .. } = stats;
        Ok(AttackMeasurement {
            legitimate,
            control,
            sent_bytes,
            connections: open_peak,
            close_reasons,
            peak_growth,
            residual,
            recovered_after,
            gateway_cpu_percent: cpu(0, |usage| usage.gateway_cpu_ms),
            redis_cpu_percent: cpu(0, |usage| usage.redis_cpu_ms),
            control_cpu_percent: cpu(1, |usage| usage.gateway_cpu_ms),
            died,
        })
    }

    /// The peak usage of each node until `until`, and the usage then.
    async fn sample_until(
        &self,
        until: Instant,
        first: [NodeUsage; 2],
    ) -> ([NodeUsage; 2], [NodeUsage; 2]) {
        let mut peak = first;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            sleep(SAMPLE_EVERY.min(left)).await;
            let last = self.usage().await;
            peak = [peak[0].peak(last[0]), peak[1].peak(last[1])];
            if Instant::now() >= until || self.stop.load(Ordering::Relaxed) {
                return (peak, last);
            }
        }
    }

    /// The usage, as soon as all of it can be read; after some attempts as it is.
    async fn known_usage(&self) -> [NodeUsage; 2] {
        for _ in 0..USAGE_TRIES {
            let usage = self.usage().await;
            if usage.iter().all(|usage| usage.is_known) || self.stop.load(Ordering::Relaxed) {
                return usage;
            }
            sleep(RECOVERY_POLL_INTERVAL).await;
        }
        self.usage().await
    }

    /// Waits until the attacked node has recovered. Returns how long after the attack that was, the
    /// residual growth, and the peak growth until then.
    async fn wait_until_recovered(
        &self,
        attack: &Attack,
        scale: Scale,
        before: [NodeUsage; 2],
        ended: Instant,
        limit: Duration,
    ) -> (Option<Duration>, NodeUsage, NodeUsage) {
        let (allowed, mut peak) = ((attack.allowed)(scale), NodeUsage::default());
        loop {
            let residual = net(self.usage().await, before);
            peak = peak.peak(residual);
            if allowed.is_recovered(&residual) {
                return (Some(ended.elapsed()), residual, peak);
            }
            if ended.elapsed() > limit || self.stop.load(Ordering::Relaxed) {
                return (None, residual, peak);
            }
            sleep(RECOVERY_POLL_INTERVAL).await;
        }
    }

    async fn stop(self) {
        let Self { attacked, control, nodes: [first, second], .. } = self;
        drop((attacked, control));
        tokio::join!(first.stop(), second.stop());
    }
}

/// Growth of the attacked node since `before`, less the growth of the control.
fn net(now: [NodeUsage; 2], before: [NodeUsage; 2]) -> NodeUsage {
    now[0].since(before[0]).since(now[1].since(before[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_of_the_control_is_subtracted() {
        let usage = |keys| NodeUsage { keys, is_known: true, ..NodeUsage::default() };
        assert_eq!(net([usage(150), usage(30)], [usage(10), usage(20)]), usage(130));
        assert_eq!(net([usage(10), usage(30)], [usage(10), usage(20)]), usage(0));
    }

    #[test]
    fn list_has_a_line_for_each_attack() {
        assert_eq!(list().lines().count(), CATALOGUE.len() + 1);
    }
}
