//! The load generator against a real gateway, small.

use std::{path::PathBuf, time::Duration};

use tokio::{process::Command, time::timeout};

use crate::harness::{Gateway, within};

/// The binary beside this test's own; `make test` builds it.
fn loadtest() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.parent().and_then(|deps| deps.parent()).unwrap().join("loadtest")
}

#[tokio::test]
async fn it_opens_holds_and_reports_connections() {
    let gateway = Gateway::start(&[]).await;
    let output = Command::new(loadtest())
        .args(["connect", "--url", &gateway.url("/ws"), "--connections", "200"])
        .args(["--rooms", "5", "--rate", "1000/s", "--hold", "200ms", "--json"])
        .output();
    let output = within(output).await.expect("`make test` builds loadtest first");
    let said = String::from_utf8_lossy(&output.stdout);
    let noted = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{noted}");
    let report: serde_json::Value = serde_json::from_str(said.trim()).unwrap();
    assert_eq!(report["opened"], 200, "{report}");
}

#[tokio::test]
async fn it_says_so_when_connections_are_refused() {
    let gateway = Gateway::start(&[("limits.connections_max", "5")]).await;
    let output = Command::new(loadtest())
        .args(["connect", "--url", &gateway.url("/ws"), "--connections", "10"])
        .args(["--hold", "0s", "--json"])
        .output();
    let output = within(output).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("503"));
}

/// One row of each kind.
#[tokio::test]
async fn it_measures_every_kind_of_row() {
    let json = tempfile::NamedTempFile::new().unwrap();
    let programs = loadtest().parent().unwrap().to_owned();
    let output = Command::new(loadtest())
        .args(["bench", "rooms", "cluster", "connect", "echo", "redis", "kill"])
        .args(["--rounds", "1", "--measured", "100ms", "--divide-by", "50", "--programs"])
        .arg(programs)
        .arg("--json")
        .arg(json.path())
        .output();
    let output = within(output).await.expect("`make build` builds it and what it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let noted = String::from_utf8_lossy(&output.stderr);
    // 1: where the machine is busy a row may not count.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{said}\n{noted}");
    assert!(!said.contains("missing or too many"), "{said}");
    let table: serde_json::Value = serde_json::from_reader(json).unwrap();
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6, "{table}");
    for row in rows {
        let measured = |line: &serde_json::Value| line["skein"]["value"]["median"].is_number();
        assert!(row["lines"].as_array().unwrap().iter().any(measured), "{row}");
    }
}

/// What `ledger` or `chaos` reported. Its exit code is 1 on a machine too busy for its times to count.
async fn reported(arguments: &[&str]) -> serde_json::Value {
    let output = Command::new(loadtest()).args(arguments).arg("--json").output();
    let output = timeout(Duration::from_secs(120), output).await.expect("it ends").unwrap();
    let (said, noted) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(matches!(output.status.code(), Some(0 | 1)), "{said}\n{noted}");
    let report: serde_json::Value = serde_json::from_str(said.trim()).unwrap();
    for wrong in ["lost", "duplicated", "out_of_order", "holes", "unannounced_breaks"] {
        assert_eq!(report[wrong], 0, "{wrong}: {report}");
    }
    assert_eq!(report["unfinished"], serde_json::json!([]), "{report}");
    report
}

#[tokio::test]
async fn it_accounts_for_every_message() {
    let gateway = Gateway::start(&[]).await;
    let url = gateway.url("/ws");
    let load = ["--rooms", "3", "--members", "4", "--rate", "100/s", "--duration", "2s"];
    let report = reported(&[&["ledger", "--url", &url], &load[..]].concat()).await;
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!(acknowledged > 150, "{report}");
    assert_eq!(report["delivered"], acknowledged * 4, "{report}");
}

#[tokio::test]
async fn it_breaks_a_cluster_of_its_own_and_accounts_for_every_message() {
    let render = concat!(env!("CARGO_MANIFEST_DIR"), "/../nginx/render.sh");
    let report = reported(&[
        "chaos",
        "--seed",
        "1",
        "--duration",
        "16s",
        "--rate",
        "50/s",
        "--gateway",
        env!("CARGO_BIN_EXE_gateway"),
        "--nginx-render",
        render,
    ])
    .await;
    assert!(report["faults"].as_array().unwrap().len() >= 3, "{report}");
}
