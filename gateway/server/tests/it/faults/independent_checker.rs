//! The same faults, checked independently: `tests/outside/checker.py` shares no code with this
//! project, so a bug in code that gateway and test clients share is not hidden.

use std::{path::Path, process::Stdio, time::Duration};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{UNLIMITED, addresses, length, ready, start_nodes, until_ready};
use crate::harness::{Node, Redis, until};

/// Maximum time until messages are acknowledged again after the longest outage. Members reconnect
/// after at most 30 s, possibly to a node that waits for a lease.
const END_MAX: Duration = Duration::from_secs(120);
/// Seconds that the checker itself waits at its end, at most twice.
const SETTLE_SECONDS: &str = "60";

fn python() -> Command {
    let mut command = Command::new("python3");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/outside");
    // Without `-B` Python writes compiled modules next to the sources.
    command.arg("-B").current_dir(folder).kill_on_drop(true);
    command
}

const INSTALLED: &str = "python3, 3.11 or later, is installed by `make setup`";

/// A running checker, whose members send until its standard input is closed.
struct IndependentChecker {
    child: Child,
    counts: watch::Receiver<Value>,
    violations: JoinHandle<String>,
    /// The folder of the trace of every frame.
    folder: TempDir,
}

impl IndependentChecker {
    /// Starts six members in three rooms. Returns when all have joined.
    async fn at(nodes: &[Node], extra: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let mut command = python();
        command.args(["checker.py", "--until-eof", "--progress", "--settle", SETTLE_SECONDS]);
        command.args(["--rate", "200"]).args(extra).arg("--trace").arg(folder.path().join("trace"));
        command.args(addresses(nodes).iter().map(|address| format!("ws://{address}/ws")));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect(INSTALLED);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut stderr = child.stderr.take().unwrap();
        let (sender, counts) = watch::channel(Value::Null);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                sender.send_replace(serde_json::from_str(&line).unwrap());
            }
        });
        let violations = tokio::spawn(async move {
            let mut said = String::new();
            stderr.read_to_string(&mut said).await.unwrap();
            said
        });
        let mut checker = Self { child, counts, violations, folder };
        checker.wait("everybody is in the rooms", |counts| counts["joined"] == true).await;
        checker
    }

    fn acknowledged(&self) -> u64 {
        self.counts.borrow()["acknowledged"].as_u64().unwrap()
    }

    fn keep_trace(&mut self) -> String {
        self.folder.disable_cleanup(true);
        self.folder.path().join("trace").display().to_string()
    }

    async fn wait(&mut self, what: &str, holds: impl Fn(&Value) -> bool) {
        let came = matches!(timeout(END_MAX, self.counts.wait_for(holds)).await, Ok(Ok(_)));
        if !came {
            let _ = self.child.start_kill();
            let violations = (&mut self.violations).await.unwrap();
            let counts = self.counts.borrow().clone();
            let trace = self.keep_trace();
            panic!(
                "{what}: not within {END_MAX:?}, {counts}, every frame in {trace}\n{violations}"
            );
        }
    }

    /// Waits until `messages` more messages have been acknowledged.
    async fn wait_for_acks(&mut self, messages: u64) {
        let enough = self.acknowledged() + messages;
        let holds = |counts: &Value| counts["acknowledged"].as_u64() >= Some(enough);
        self.wait("messages are acknowledged", holds).await;
    }

    /// Lets the members finish, prints the counts, and panics on a violation.
    async fn check(mut self, fault: &str) -> Value {
        drop(self.child.stdin.take());
        let status = timeout(END_MAX * 2, self.child.wait()).await.expect("it ends").unwrap();
        let violations = (&mut self.violations).await.unwrap();
        // The last line has arrived when the pipe is closed.
        while self.counts.changed().await.is_ok() {}
        let counts = self.counts.borrow().clone();
        println!("independent checker, {fault}: {}", summary(&counts));
        if !status.success() {
            let trace = self.keep_trace();
            panic!("{fault}: {status}, {counts}, every frame in {trace}\n{violations}");
        }
        assert_eq!(counts["violations"], 0, "{violations}");
        assert!(counts["acknowledged"].as_u64() > Some(0), "{fault}: nothing was sent");
        counts
    }

    /// As [`Self::check`], and asserts that no discontinuity was signalled.
    async fn check_seamless(self, fault: &str) -> Value {
        let counts = self.check(fault).await;
        let breaks = (&counts["resets"], &counts["recovered_false"]);
        assert_eq!(breaks, (&0.into(), &0.into()), "{fault}: {counts}");
        counts
    }
}

fn summary(counts: &Value) -> String {
    let count = |name: &str| counts[name].as_u64().unwrap_or(0);
    format!(
        "{} members in {} rooms, {} acknowledged, {} delivered, {} lost, {} duplicated, {} out of \
         order, {} gaps, {} unsignalled discontinuities, {} disagreements, {} acks with two positions, {} \
         against the order of sending; announced: {} reset, {} recovered:false ({} skipped, {} \
         again); {} connections; longest without delivery {} ms; slowest ack {} ms; {} unavailable",
        count("members"),
        count("rooms"),
        count("acknowledged"),
        count("delivered"),
        count("lost"),
        count("duplicated"),
        count("out_of_order"),
        count("gaps"),
        count("unsignalled_discontinuities"),
        count("disagreements"),
        count("acks_with_two_positions"),
        count("sender_order"),
        count("resets"),
        count("recovered_false"),
        count("skipped"),
        count("reappended"),
        count("connections"),
        count("delivery_pause_max_ms"),
        count("ack_latency_max_ms"),
        count("rejected_unavailable"),
    )
}

async fn pause(ms: u64) {
    sleep_until(Instant::now() + Duration::from_millis(ms)).await;
}

#[tokio::test]
async fn the_independent_checker_detects_each_violation() {
    let output = python().args(["-m", "unittest", "-q"]).output().await.expect(INSTALLED);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("OK"), "{said}");
}

#[tokio::test]
async fn the_independent_checker_rejects_an_invalid_url() {
    let output = python().args(["checker.py", "http://127.0.0.1/"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_a_node_is_killed() {
    let redis = Redis::start().await;
    let mut nodes = start_nodes(&redis, 3).await;
    let mut checker = IndependentChecker::at(&nodes, &[]).await;
    let kills = length(1, 10);
    for kill in 0..kills {
        checker.wait_for_acks(100).await;
        let at = kill % nodes.len();
        nodes[at].process.kill().await;
        checker.wait_for_acks(200).await;
        if kill + 1 < kills {
            let address = nodes[at].address;
            nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
        }
    }
    let counts = checker.check_seamless(&format!("{kills} x gateway SIGKILL")).await;
    assert!(counts["connections"].as_u64() > counts["members"].as_u64(), "{counts}");
}

/// Kills Redis repeatedly while the members send.
async fn kill_redis(mut redis: Redis, kills: u64, what: &str) {
    let nodes = start_nodes(&redis, 2).await;
    let mut checker = IndependentChecker::at(&nodes, &["--rate", "400"]).await;
    for kill in 0..kills {
        checker.wait_for_acks(100).await;
        // At a different point of the load each time.
        pause(kill * 37 % 200).await;
        redis.kill().await;
        redis.restart().await;
        until_ready(&nodes).await;
    }
    checker.wait_for_acks(100).await;
    checker.check_seamless(&format!("{kills} x {what}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_redis_restarts_with_its_file() {
    let redis = Redis::start_durable().await;
    kill_redis(redis, length(2, 25), "Redis SIGKILL, restarted with its file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_redis_restarts_empty() {
    let redis = Redis::start().await;
    kill_redis(redis, length(2, 25), "Redis SIGKILL, restarted empty").await;
}

/// Closes connections of Redis repeatedly, at this interval.
async fn kill_connections(commands: &[&str], pace_ms: u64, what: &str) {
    let redis = Redis::start().await;
    let nodes = start_nodes(&redis, 2).await;
    let mut checker = IndependentChecker::at(&nodes, &[]).await;
    let times = length(6, 40);
    for _ in 0..times {
        pause(pace_ms).await;
        for command in commands {
            redis.command(command).await;
        }
    }
    checker.wait_for_acks(50).await;
    for node in &nodes {
        until("ready", async || ready(node.address).await).await;
        let lost = super::metric(node, "gateway_bus_reconnects_total").await;
        assert!(lost > 0.0, "no link was cut");
    }
    let counts = checker.check_seamless(&format!("{times} x {what}")).await;
    assert_eq!(counts["connections"], counts["members"], "{counts}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_pubsub_links_are_cut() {
    kill_connections(&["CLIENT KILL TYPE pubsub"], 250, "CLIENT KILL of pub/sub every 250 ms")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_all_links_are_cut() {
    let commands = ["CLIENT KILL TYPE normal", "CLIENT KILL TYPE pubsub"];
    kill_connections(&commands, 400, "CLIENT KILL of everything every 400 ms").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_a_node_freezes() {
    let redis = Redis::start().await;
    let nodes = start_nodes(&redis, 3).await;
    // The first member stays with the frozen node; the fourth, also connected to it, reconnects
    // elsewhere.
    let mut checker =
        IndependentChecker::at(&nodes, &["--patient", "1", "--idle-timeout", "2"]).await;
    checker.wait_for_acks(100).await;
    let seconds = length(4, 30);
    nodes[0].process.signal("STOP");
    pause(seconds * 1000).await;
    nodes[0].process.signal("CONT");
    checker.wait_for_acks(200).await;
    let counts = checker.check_seamless(&format!("gateway SIGSTOP {seconds} s")).await;
    assert!(counts["idle_timeouts"].as_u64() > Some(0), "no member timed out: {counts}");
}

/// Injects random faults; `SKEIN_SEED` repeats a run.
async fn run_mixed_faults(mut redis: Redis, faults: usize, salt: u64, what: &str) {
    let seed = std::env::var("SKEIN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::rng().random());
    println!("independent checker, {what}: SKEIN_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed ^ salt);
    let mut nodes = start_nodes(&redis, 3).await;
    let mut checker =
        IndependentChecker::at(&nodes, &["--patient", "1", "--reconnect-interval", "3"]).await;
    for _ in 0..faults {
        checker.wait_for_acks(rng.random_range(1..150)).await;
        let (at, ms) = (rng.random_range(0..nodes.len()), rng.random_range(10..1_500));
        let address = nodes[at].address;
        match rng.random_range(0..length(6, 8)) {
            0 => {
                nodes[at].process.kill().await;
                nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
            }
            1 => {
                nodes[at].process.signal("TERM");
                assert_eq!(nodes[at].process.end().await, Some(0));
                nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
            }
            2 => {
                nodes[at].process.signal("STOP");
                pause(ms).await;
                nodes[at].process.signal("CONT");
            }
            3 => {
                redis.signal("STOP");
                pause(ms).await;
                redis.signal("CONT");
            }
            4 => {
                redis.command("CLIENT KILL TYPE normal").await;
                redis.command("CLIENT KILL TYPE pubsub").await;
            }
            5 => {
                redis.kill().await;
                redis.restart().await;
            }
            // These two take as long as a lease.
            6 => {
                nodes[at].process.kill().await;
                redis.kill().await;
                redis.restart().await;
                nodes[at] = Node::start(&redis, Some(address), &UNLIMITED).await;
            }
            _ => {
                nodes[at].process.signal("STOP");
                redis.kill().await;
                redis.restart().await;
                pause(ms * 8).await;
                nodes[at].process.signal("CONT");
            }
        }
        // Every other time the next fault begins before the nodes have recovered.
        if rng.random_range(0..2) == 0 {
            until_ready(&nodes).await;
        }
    }
    until_ready(&nodes).await;
    checker.wait_for_acks(50).await;
    checker.check(&format!("{faults} faults mixed, {what}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_mixed_faults_with_a_durable_redis() {
    run_mixed_faults(Redis::start_durable().await, length(4, 40), 3, "Redis with its file").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_violation_after_mixed_faults_with_a_volatile_redis() {
    run_mixed_faults(Redis::start().await, length(4, 40), 4, "Redis empty after a restart").await;
}
