//! The load generator against a real gateway, small.

use std::path::PathBuf;

use tokio::process::Command;

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
