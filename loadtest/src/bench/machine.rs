//! What the numbers were read on: they mean little without it.

use std::{fs, process::Command};

use serde::Serialize;

use super::servers::BenchEnvironment;

/// The machine and the programs.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) gateway: String,
    pub(crate) redis: String,
    /// Of the code; empty where it is no checkout.
    pub(crate) commit: String,
    /// Runnable tasks before the bench began, over the last minute.
    pub(crate) load_before: String,
    /// Whether servers and load had a CPU each.
    pub(crate) pinned: bool,
}

impl Machine {
    /// Asks for all of it; what is not known is empty.
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
            gateway: said(Command::new(gateway).arg("--version")),
            redis: said(Command::new("redis-server").arg("--version")),
            commit: said(Command::new("git").args(["describe", "--always", "--dirty"])),
            load_before: load.split(' ').next().unwrap_or_default().to_owned(),
            pinned: environment.pinned,
        }
    }
}

/// The first line that a command says.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
}
