//! Records the commit for `gateway --version`.
//!
//! The variable `SKEIN_COMMIT` names it where there is no repository, as in an image. Otherwise git
//! does, and the script runs again when the checked-out commit changes. In a debug build it does
//! not, since each commit would then build the tests once more: `version` says so.

use std::{path::Path, process::Command};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=SKEIN_COMMIT");
    let named = std::env::var("SKEIN_COMMIT").ok().filter(|commit| !commit.trim().is_empty());
    let commit = named.clone().or_else(|| git(&["rev-parse", "--short=12", "HEAD"]));
    println!("cargo:rustc-env=SKEIN_COMMIT={}", commit.as_deref().unwrap_or("unknown").trim());
    let is_debug = std::env::var("PROFILE").is_ok_and(|profile| profile == "debug");
    if named.is_some() || is_debug {
        return;
    }
    // A commit on a branch changes the file of the branch, a checkout changes HEAD.
    let branch = git(&["symbolic-ref", "-q", "HEAD"]);
    for name in ["HEAD".to_owned()].into_iter().chain(branch) {
        // A missing file, as that of a packed branch, would run the script with each build.
        match git(&["rev-parse", "--path-format=absolute", "--git-path", &name]) {
            Some(path) if Path::new(&path).exists() => println!("cargo:rerun-if-changed={path}"),
            _ => {}
        }
    }
}

/// The first line that git prints in this repository, if there is one.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
