//! The ways to run a cluster: `deploy/cluster.sh` as processes, the Helm chart.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, time::Duration};

use skein_client::{connection::ClientConnection, options::ConnectOptions};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};

use crate::{
    api_clients::tool,
    harness::{free_port, gateway_binary, until, within},
};

fn project(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(file)
}

async fn signal(pid: &str, signal: &str) {
    let script = format!("kill -{signal} {pid}");
    Command::new("sh").args(["-c", &script]).status().await.unwrap();
}

#[tokio::test]
async fn a_local_cluster_survives_a_killed_gateway_with_keep() {
    let port = free_port();
    let mut child = Command::new("bash")
        .arg(project("deploy/cluster.sh"))
        .envs([("KEEP", "1"), ("NODES", "2")])
        .env("REDIS_PORT", free_port().to_string())
        .env("PORT", port.to_string())
        .env("NODE_PORT", free_pair().to_string())
        .env("ADMIN_PORT", free_pair().to_string())
        .env("GATEWAY_BIN", gateway_binary())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut complaints = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut pids = vec![];
    let started = async {
        while let Some(line) = said.next_line().await.unwrap() {
            if let Some((_, pid)) = line.split_once("   pid ") {
                pids.push((line.split(' ').next().unwrap().to_owned(), pid.to_owned()));
            }
            if line.starts_with("Ctrl-C") {
                return;
            }
        }
        panic!("it ended: {:?}", complaints.next_line().await);
    };
    within(started).await;
    let names: Vec<&str> = pids.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["node-1", "node-2", "redis"]);

    signal(&pids[0].1, "KILL").await;
    let survives = async {
        while let Some(line) = complaints.next_line().await.unwrap() {
            if line.contains("goes on without gateway-1") {
                return;
            }
        }
        panic!("it ended");
    };
    within(survives).await;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    until("clients reach the other gateway", async || {
        let options = ConnectOptions::new(format!("ws://{address}/ws")).user("ann");
        let Ok(mut connection) = ClientConnection::open(&options).await else { return false };
        connection
            .expect_connected()
            .await
            .is_ok_and(|connected| connected.node.as_str() == "node-2")
    })
    .await;

    signal(&child.id().unwrap().to_string(), "TERM").await;
    let status = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
    assert_eq!(status.expect("it ends").unwrap().code(), Some(143));
    for (name, pid) in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        assert!(!["gateway\n", "redis-server\n"].contains(&stat.as_str()), "{name} is left");
    }
}

/// The first of two free ports in a row.
fn free_pair() -> u16 {
    let mut first = free_port();
    loop {
        let second = free_port();
        if second == first + 1 {
            return first;
        }
        first = second;
    }
}

/// Rendered by Helm's own engine and compared with the schemas of Kubernetes.
#[tokio::test]
async fn the_helm_chart_renders_valid_objects() {
    let output = Command::new(tool("stack-tools-1/bin/python"))
        .arg(project("deploy/helm/check.py"))
        .output();
    let output = within(output).await.expect("`make setup` installs it");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("the chart is valid"), "{said}");
}
