//! Whether `loadtest` finds each defect that is planted in a gateway, and none where there is none.
//!
//! `SKEIN_DEFECTS=full` looks at a gateway without a defect twenty times, with each scenario.

use std::{path::Path, time::Duration};

use gateway::defect::Misdelivery;
use serde_json::Value;
use tokio::{process::Command, time::timeout};

use crate::harness::Node;

/// How often a clean gateway is looked at.
fn clean_runs() -> usize {
    if std::env::var("SKEIN_DEFECTS").is_ok_and(|how| how == "full") { 20 } else { 1 }
}

/// Runs `loadtest` against a gateway and returns what it says does not hold.
async fn failures(node: &Node, scenario: &[&str]) -> Vec<String> {
    let own = std::env::current_exe().unwrap();
    let loadtest = own.parent().and_then(Path::parent).unwrap().join("loadtest");
    let url = format!("ws://{}/ws", node.address);
    let output = Command::new(loadtest)
        .args(scenario)
        .args(["--url", &url, "--pid", &node.process.pid().to_string(), "--json"])
        .output();
    let output = timeout(Duration::from_secs(300), output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(said.trim())
        .unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    let failures: Vec<String> = serde_json::from_value(report["failures"].clone()).unwrap();
    if !failures.is_empty() {
        assert_eq!(output.status.code(), Some(1), "{failures:?}");
    }
    failures
}

const LEDGER: [&str; 12] = [
    "ledger",
    "--rooms",
    "10",
    "--members",
    "10",
    "--rate",
    "300/s",
    "--duration",
    "5s",
    "--late-max-percent",
    "1",
    "--late-after=100ms",
];
const ROOMS: [&str; 14] = [
    "rooms",
    "--rooms",
    "10",
    "--members",
    "10",
    "--rate",
    "300/s",
    "--duration",
    "5s",
    "--ramp",
    "1000/s",
    "--late-max-percent",
    "1",
    "--late-after=100ms",
];
/// 120,000 connections, a few at a time, so that what a server needs for many at once is no matter.
/// Half of them count, and one huge page more or less is 35 bytes of each.
const STORM: [&str; 13] = [
    "storm",
    "-n",
    "500",
    "--rounds",
    "240",
    "--pause",
    "10ms",
    "--ramp",
    "2000/s",
    "--rooms",
    "10",
    "--leak-max",
    "75",
];

#[tokio::test]
async fn each_defect_is_found_and_none_where_there_is_none() {
    for (name, defect) in Misdelivery::ALL {
        let (scenarios, words): (&[&[&str]], &[&str]) = match defect {
            Misdelivery::Drop => (&[&LEDGER, &ROOMS], &["hole", "lost"]),
            Misdelivery::Duplicate => (&[&LEDGER, &ROOMS], &["duplicated"]),
            Misdelivery::Swap => (&[&LEDGER, &ROOMS], &["out of order"]),
            Misdelivery::Stall => (&[&LEDGER, &ROOMS], &["took longer than 100 ms"]),
            Misdelivery::Leak => (&[&STORM], &["keeps"]),
        };
        for scenario in scenarios {
            let node = Node::start_defective(name, &[]).await;
            let failures = failures(&node, scenario).await;
            println!("{name}, {}: {failures:?}", scenario[0]);
            let found = |word: &&str| failures.iter().any(|failure| failure.contains(*word));
            assert!(words.iter().any(found), "{name} is not found by {scenario:?}: {failures:?}");
        }
    }
    for run in 1..=clean_runs() {
        for scenario in [&LEDGER[..], &ROOMS, &STORM] {
            let node = Node::start_alone(&[]).await;
            let failures = failures(&node, scenario).await;
            println!("clean run {run}, {}: {failures:?}", scenario[0]);
            assert!(failures.is_empty(), "{scenario:?}: {failures:?}");
        }
    }
}
