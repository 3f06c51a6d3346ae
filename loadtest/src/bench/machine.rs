//! The machine of a measurement, without which its figures mean little.

use std::{fs, process::Command};

use serde::Serialize;

use super::servers::BenchEnvironment;

/// The machine and the versions of the programs.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) gateway: String,
    pub(crate) redis: String,
    /// Commit of the code; empty if it is no checkout.
    pub(crate) commit: String,
    /// Load average of the last minute before the bench.
    pub(crate) load_before: String,
    /// Whether servers and load had a CPU each.
    pub(crate) pinned: bool,
}

impl Machine {
    /// Detects all values; unknown ones are empty.
    pub(crate) fn detect(environment: &BenchEnvironment) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu =
            cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let load = read("/proc/loadavg");
        let gateway = environment.programs.join("gateway");
        Self {
            cpu: cpu.map(|(_, name)| name.to_owned()).unwrap_or_default(),
            cores: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            kernel: read("/proc/sys/kernel/osrelease"),
            gateway: first_line(Command::new(gateway).arg("--version")),
            redis: first_line(Command::new("redis-server").arg("--version")),
            commit: first_line(Command::new("git").args(["describe", "--always", "--dirty"])),
            load_before: load.split(' ').next().unwrap_or_default().to_owned(),
            pinned: environment.pinned,
        }
    }
}

/// The first line of a command's output.
fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
}
