//! Short runs of the load generator against a real gateway.

use std::{path::PathBuf, time::Duration};

use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};

use crate::{
    faults::is_full,
    harness::{Gateway, Nginx, Node, PATIENCE, Redis, gateway_binary, within},
};

/// The binary beside this test's own; `make test` builds it.
fn loadtest() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.parent().and_then(|deps| deps.parent()).unwrap().join("loadtest")
}

/// Runs `loadtest` and returns its report. The exit code is 1 on a machine too busy for valid
/// times.
async fn reported(arguments: &[&str]) -> Value {
    let output = Command::new(loadtest()).args(arguments).arg("--json").output();
    let output = timeout(Duration::from_secs(120), output).await.expect("it ends").unwrap();
    let (said, noted) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(matches!(output.status.code(), Some(0 | 1)), "{said}\n{noted}");
    let report: Value = serde_json::from_str(said.trim()).unwrap();
    let counts = report["invalid"].is_null();
    let good = counts && report["failures"] == json!([]);
    assert_eq!(output.status.success(), good, "{report}");
    report
}

/// As [`reported`], and asserts that nothing failed.
async fn passing_report(arguments: &[&str]) -> Value {
    let report = reported(arguments).await;
    assert_eq!(report["failures"], json!([]), "{report}");
    report
}

/// Runs `loadtest` with processes of its own, without a judgement on the time they take.
pub async fn counted_report(arguments: &[&str]) -> Value {
    let render = concat!(env!("CARGO_MANIFEST_DIR"), "/../../nginx/render.sh");
    let mut command = Command::new(loadtest());
    command.args(arguments).args(["--nginx-render", render, "--json"]);
    let output = timeout(Duration::from_secs(300), command.kill_on_drop(true).output());
    let output = output.await.expect("it ends").unwrap();
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    let noted = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_str(report.trim()).unwrap_or_else(|_| panic!("{noted}"));
    assert_eq!(report["failures"], json!([]), "{report}");
    report
}

/// The result of a step of a report.
fn step<'a>(report: &'a Value, name: &str) -> &'a str {
    let steps = report["steps"].as_array().unwrap();
    let found = steps.iter().find(|step| step["name"] == name);
    found.and_then(|step| step["result"].as_str()).unwrap_or_else(|| panic!("{report}"))
}

#[tokio::test]
async fn a_deploy_moves_each_client_once_and_ends_even() {
    let gateway = gateway_binary();
    let load = ["--rooms", "6", "--members", "10", "--rate", "30/s", "--idle-timeout", "10s"];
    for scheme in ["surge", "in-place"] {
        // A busy machine takes longer to restart a gateway than the default.
        let deploy = ["deploy", "--scheme", scheme, "--restart-time", "8s", "--gateway"];
        let deploy = [&deploy[..], &[gateway.to_str().unwrap()], &load].concat();
        let report = counted_report(&deploy).await;
        assert_eq!(step(&report, "moves per client and deploy"), "1.000", "{report}");
        assert_eq!(step(&report, "connections at the end"), "20 / 20 / 20", "{report}");
    }
}

#[tokio::test]
async fn connections_are_opened_held_and_reported() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let size = ["-n", "200", "--rooms", "5", "--ramp", "1000/s", "--hold", "200ms"];
    let report = passing_report(&[&["connect", "--url", &url], &size[..]].concat()).await;
    assert_eq!(report["opened"], 200, "{report}");
}

#[tokio::test]
async fn rejected_connections_are_reported() {
    let gateway = Gateway::start(&[("limits.connections_max", "5")]).await;
    let url = gateway.url("/ws");
    let report = reported(&["connect", "--url", &url, "-n", "10", "--hold", "0s"]).await;
    assert_eq!(report["rejected"]["503"], 5, "{report}");
    assert_eq!(report["failures"], json!(["5 of 10 connections were held"]));
}

/// Scenarios that count sent and received messages, in one process or in several.
#[tokio::test]
async fn each_scenario_counts_sent_and_received_messages() {
    let gateway = Gateway::start(&[]).await;
    let (url, page) = (gateway.url("/ws"), format!("http://{}/metrics", gateway.admin));
    let talk = ["--url", &url, "--ramp", "1000/s", "--rate", "100/s", "--duration", "1s"];
    let check = async |scenario: &[&str], copies: u64| {
        let report = passing_report(&[scenario, &talk[..]].concat()).await;
        let acknowledged = report["acknowledged"].as_u64().unwrap();
        assert!((90..=110).contains(&acknowledged), "{report}");
        assert_eq!(report["delivered"], acknowledged * copies, "{report}");
        report
    };
    check(&["fanout", "--members", "20"], 20).await;
    let report = check(&["rooms", "--rooms", "5", "--members", "4", "--metrics", &page], 4).await;
    assert!(report["gauges"][0]["url"].is_string(), "{report}");
    let report = check(&["rooms", "--rooms", "5", "--members", "4", "--processes", "3"], 4).await;
    assert_eq!(report["generator"]["processes"], 3);
    // All messages arrive in the end, because clients that did not read do so then.
    let report = check(&["slow", "--rooms", "2", "--members", "10"], 10).await;
    assert_eq!(report["steps"][0]["result"], "2", "{report}");
}

#[tokio::test]
async fn all_clients_return_after_a_storm() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let size = ["-n", "100", "--rounds", "2", "--pause", "50ms", "--ramp", "1000/s"];
    let report = passing_report(&[&["storm", "--url", &url], &size[..]].concat()).await;
    assert!(report["steps"][1]["result"].as_str().unwrap().starts_with("100 of 100 back"));
}

#[tokio::test]
async fn a_sweep_ends_at_the_threshold_or_the_generators_limit() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let size = ["--rooms", "5", "--members", "4", "--step", "200ms", "--ramp", "1000/s"];
    let bound = ["--bound", "1us"];
    let report = reported(&[&["sweep", "--url", &url], &size[..], &bound].concat()).await;
    let steps = report["steps"].as_array().unwrap();
    assert!(steps.last().unwrap()["name"].as_str().unwrap().contains("p99"), "{report}");
    assert_eq!(report["failures"].as_array().unwrap().len(), 1, "nothing is that fast: {report}");
}

#[tokio::test]
async fn chat_users_send_and_receive_acks() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let users = ["--users", "20", "--think", "100ms", "--duration", "2s"];
    let report = passing_report(&[&["chat", "--url", &url], &users[..]].concat()).await;
    assert!(report["acknowledged"].as_u64().unwrap() > 100, "{report}");
}

#[tokio::test]
async fn reports_are_compared_and_rendered_as_html() {
    let gateway = Gateway::start(&[]).await;
    let (url, scratch) = (gateway.url("/ws"), tempfile::tempdir().unwrap());
    let page = scratch.path().join("page.html");
    let load = ["--rooms", "2", "--members", "3", "--duration", "2s", "--html"];
    let html = page.to_str().unwrap();
    let report = passing_report(&[&["ledger", "--url", &url], &load[..], &[html]].concat()).await;
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("<svg") && page.contains("loadtest ledger"));
    let file = scratch.path().join("report.json");
    std::fs::write(&file, report.to_string()).unwrap();
    let output = Command::new(loadtest()).arg("compare").args([&file, &file]).output();
    let output = within(output).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("acknowledged") && said.contains("1.00"), "{said}");
}

/// One row of each kind.
#[tokio::test]
async fn bench_measures_every_kind_of_row() {
    let json = tempfile::NamedTempFile::new().unwrap();
    let programs = loadtest().parent().unwrap().to_owned();
    let output = Command::new(loadtest())
        .args(["bench", "rooms", "cluster", "connect", "echo", "redis", "kill"])
        .args(["--rounds", "1", "--measured", "100ms", "--divide-by", "50", "--programs"])
        .arg(programs)
        .arg("--json")
        .arg(json.path())
        .output();
    // It starts 17 servers one after the other, which takes about 28 s.
    let output = timeout(4 * PATIENCE, output).await.expect("it ends");
    let output = output.expect("`make build` builds it and what it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let noted = String::from_utf8_lossy(&output.stderr);
    // 1: on a busy machine a row may be invalid.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{said}\n{noted}");
    assert!(!said.contains("missing or duplicated"), "{said}");
    let table: Value = serde_json::from_reader(json).unwrap();
    let rows = table["rows"].as_array().unwrap();
    let all: &[&str] = &["baseline", "naive", "skein"];
    // Only scripts have this name, and only this row resumes.
    let candidates = [all, all, all, all, &["baseline", "skein"], &["skein"]];
    assert_eq!(rows.len(), candidates.len(), "{table}");
    for (row, candidates) in rows.iter().zip(candidates) {
        for candidate in candidates {
            let median = |line: &Value| line[candidate]["value"]["median"].as_f64();
            let measured = |line: &Value| median(line).is_some_and(|median| median > 0.0);
            let lines = row["lines"].as_array().unwrap();
            assert!(lines.iter().any(measured), "nothing of {candidate} was measured: {row}");
        }
    }
}

#[tokio::test]
async fn ledger_accounts_for_every_message() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let load = ["--rooms", "3", "--members", "4", "--rate", "100/s", "--duration", "2s"];
    let report = passing_report(&[&["ledger", "--url", &url], &load[..]].concat()).await;
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!(acknowledged > 150, "{report}");
    assert_eq!(report["delivered"], acknowledged * 4, "{report}");
}

#[tokio::test]
async fn wss_through_nginx_is_checked_like_ws() {
    let gateway = Gateway::start(&[]).await;
    let (_nginx, tls, cert) = Nginx::start_tls(&[gateway.address]).await;
    let (url, cert) = (format!("wss://{tls}/ws"), cert.to_str().unwrap());
    let load = ["--rooms", "3", "--members", "4", "--rate", "100/s", "--duration", "2s"];
    let report =
        passing_report(&[&["ledger", "--url", &url, "--ca", cert], &load[..]].concat()).await;
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!(acknowledged > 0, "{report}");
    assert_eq!(report["delivered"], acknowledged * 4, "{report}");

    // The connections of the other commands are of another kind.
    let small = ["--rooms", "5", "--members", "4", "--ramp", "500/s"];
    let talk = ["--rate", "100/s", "--duration", "1s", "--bytes", "20000", "--insecure"];
    let report = passing_report(&[&["rooms", "--url", &url], &small[..], &talk].concat()).await;
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!(acknowledged > 0, "{report}");
    assert_eq!(report["delivered"], acknowledged * 4, "{report}");
    let short = ["--users", "5", "--think", "100ms", "--duration", "1s", "--insecure"];
    let report = passing_report(&[&["chat", "--url", &url], &short[..]].concat()).await;
    assert!(report["acknowledged"].as_u64() > Some(0), "{report}");

    // A certificate that no known authority has signed.
    let report = reported(&["connect", "--url", &url, "-n", "1", "--hold", "0s"]).await;
    assert_eq!(report["opened"], 0, "{report}");
    let failed = report["failed"].as_object().unwrap().keys().next().unwrap();
    assert!(failed.contains("UnknownIssuer"), "{report}");
}

#[tokio::test]
async fn chaos_on_a_local_cluster_accounts_for_every_message() {
    let render = concat!(env!("CARGO_MANIFEST_DIR"), "/../../nginx/render.sh");
    let report = passing_report(&[
        "chaos",
        "--seed",
        "1",
        "--duration",
        if is_full() { "60s" } else { "16s" },
        "--rate",
        "50/s",
        "--gateway",
        gateway_binary().to_str().unwrap(),
        "--nginx-render",
        render,
    ])
    .await;
    assert!(report["faults"].as_array().unwrap().len() >= 3, "{report}");
}

#[tokio::test]
async fn chaos_injects_faults_into_an_external_cluster() {
    let redis = Redis::start().await;
    let nodes = [Node::start(&redis, None, &[]).await, Node::start(&redis, None, &[]).await];
    let urls = [0, 1].map(|node: usize| format!("ws://{}/ws", nodes[node].address));
    let pids = [0, 1].map(|node: usize| nodes[node].process.pid().to_string());
    let redis = redis.address().to_string();
    let report = passing_report(&[
        "chaos",
        "--url",
        &urls[0],
        "--url",
        &urls[1],
        "--gateway-pid",
        &pids[0],
        &pids[1],
        "--redis",
        &redis,
        "--duration",
        "16s",
        "--rate",
        "50/s",
    ])
    .await;
    assert!(report["faults"].as_array().unwrap().len() >= 3, "{report}");
    assert!(report["acknowledged"].as_u64().unwrap() > 500, "{report}");
}

/// A share of the catalogue, so short and lenient that it shows only that attacks run, legitimate
/// clients are measured and answered, and resources are released: `make abuse` judges times.
#[tokio::test]
async fn legitimate_clients_are_served_during_attacks() {
    let gateway = env!("CARGO_BIN_EXE_gateway");
    let attacks = ["abuse", "echo-pings", "partial-frames"];
    let short = ["--seconds", "1", "--clients", "20", "--rate", "40/s", "--gateway", gateway];
    // Recovery times are judged on a quiet machine, by `make abuse`.
    let short = [&short[..], &["--recovery", "3s"]].concat();
    let lenient = ["--slack", "4s", "--lag-max", "1s"];
    let report = reported(&[&attacks[..], &short[..], &lenient[..]].concat()).await;
    let attacked = report["attacks"].as_array().unwrap();
    assert_eq!(attacked.len(), 2, "{report}");
    for attack in attacked {
        let (legitimate, control) = (&attack["legitimate"], &attack["control"]);
        for clients in [legitimate, control] {
            assert!(clients["sent"].as_u64() >= Some(30), "{attack}");
            assert_eq!(
                (&clients["unanswered"], &clients["lost"]),
                (&json!(0), &json!(0)),
                "{attack}"
            );
        }
        assert!(attack["sent_bytes"].as_u64() > Some(100_000), "{attack}");
    }
}

#[tokio::test]
async fn attacks_are_listed_and_unknown_ones_rejected() {
    let output = Command::new(loadtest()).args(["abuse", "--list"]).output();
    let said = String::from_utf8(within(output).await.unwrap().stdout).unwrap();
    for attack in ["echo-pings", "history-gone", "watch-churn", "large-directs", "slow-link"] {
        assert!(said.contains(attack), "{said}");
    }
    let output = Command::new(loadtest()).args(["abuse", "no-such-attack"]).output();
    let output = within(output).await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--list"), "{output:?}");
}
