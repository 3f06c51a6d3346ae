//! Two versions in one cluster: the version before this one is built from its commit, and the
//! cluster rolls forward and back under traffic.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{harness::gateway_binary, loadtest::counted_report};

/// The version before this one while there is no tag: the last commit in which nodes do not
/// announce themselves.
const PREVIOUS: &str = "e1adaa2ba9eb1650fd9e4d7f4abb0b14f81e2906";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The output of a command, or what it said when it failed.
fn output_of(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| error.to_string())?;
    let text = if output.status.success() { &output.stdout } else { &output.stderr };
    let text = String::from_utf8_lossy(text).trim().to_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}

fn git(arguments: &[&str]) -> Result<String, String> {
    output_of(Command::new("git").arg("-C").arg(root()).args(arguments))
}

/// Builds the gateway of a commit in a folder below `target`, which later runs use again.
fn build(commit: &str) -> PathBuf {
    let folder = root().join("target/previous").join(commit);
    let source = folder.join("source");
    if !source.join("Cargo.toml").exists() {
        std::fs::create_dir_all(&source).unwrap();
        let archive = folder.join("source.tar");
        git(&["archive", "--output", archive.to_str().unwrap(), commit]).unwrap();
        let mut unpack = Command::new("tar");
        output_of(unpack.arg("-xf").arg(&archive).arg("-C").arg(&source)).unwrap();
    }
    let target = folder.join("target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--locked", "--package", "gateway", "--bin", "gateway", "--target-dir"]);
    output_of(cargo.arg(&target).current_dir(&source)).unwrap();
    target.join("debug/gateway")
}

/// Forward, back and forward again, each gateway replaced while the others serve: nothing is lost,
/// doubled or reordered, and each client moves once per deploy.
#[tokio::test]
#[ignore = "make test-full"]
async fn versions_roll_forward_and_back_without_loss() {
    let tag = git(&["describe", "--tags", "--abbrev=0"]).unwrap_or_else(|_| PREVIOUS.to_owned());
    let commit = match git(&["rev-parse", "--verify", &format!("{tag}^{{commit}}")]) {
        Ok(commit) => commit,
        Err(error) => {
            println!("skipped: the version before ({tag}) is not in this git clone: {error}");
            return;
        }
    };
    let (previous, this) = (build(&commit), gateway_binary());
    let load = ["--rooms", "10", "--members", "10", "--rate", "100/s", "--idle-timeout", "10s"];
    let deploy = ["deploy", "--deploys", "3", "--gateway", this.to_str().unwrap(), "--previous"];
    let deploy = [&deploy[..], &[previous.to_str().unwrap()], &load].concat();
    let report = counted_report(&deploy).await;
    println!("from {tag} forward, back and forward: {:#}", report["steps"]);
}
