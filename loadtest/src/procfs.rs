//! Memory and CPU time of a process, read from `/proc`, and local ports.
//!
//! Linux only. The parsing is pure.

use std::{fs, io};

/// Clock ticks per second in `/proc/PID/stat`. `USER_HZ` is 100 on all supported platforms;
/// querying it takes `unsafe` or another crate.
const USER_HZ: u64 = 100;

/// CPU time of a process since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuTime {
    /// User time.
    pub(crate) user_ms: u64,
    /// System time.
    pub(crate) system_ms: u64,
}

/// Resource usage of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessUsage {
    /// Proportional set size: shared memory counts in part.
    pub(crate) pss_bytes: u64,
    /// User and system time since the start.
    pub(crate) cpu_ms: u64,
}

/// Why the usage of a process is unknown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcfsError {
    /// The process does not exist, or belongs to another user.
    #[error("/proc/{process}/{file}: {source}")]
    Read {
        /// Process id, or `self`.
        process: String,
        /// The file.
        file: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The file does not have the expected format.
    #[error("/proc/{process}/{file} has an unexpected format")]
    Parse {
        /// Process id, or `self`.
        process: String,
        /// The file.
        file: &'static str,
    },
}

impl CpuTime {
    /// Reads the CPU time of a process; `None` is this process.
    pub(crate) fn read(pid: Option<u32>) -> Result<Self, ProcfsError> {
        read_file(pid, "stat", cpu)
    }

    /// User and system time.
    pub(crate) fn total_ms(self) -> u64 {
        self.user_ms + self.system_ms
    }
}

impl ProcessUsage {
    /// Reads the usage of a process; `None` is this process.
    pub(crate) fn read(pid: Option<u32>) -> Result<Self, ProcfsError> {
        let pss_bytes = read_file(pid, "smaps_rollup", pss_bytes)?;
        Ok(Self { pss_bytes, cpu_ms: CpuTime::read(pid)?.total_ms() })
    }
}

/// Reads and parses a file of a process in `/proc`.
fn read_file<T>(
    pid: Option<u32>,
    file: &'static str,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, ProcfsError> {
    let process = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    match fs::read_to_string(format!("/proc/{process}/{file}")) {
        Ok(text) => parse(&text).ok_or(ProcfsError::Parse { process, file }),
        Err(source) => Err(ProcfsError::Read { process, file, source }),
    }
}

/// The `Pss:` line of `smaps_rollup`, in bytes.
fn pss_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Fields 14 and 15 of `stat`: user and system time in ticks.
fn cpu(text: &str) -> Option<CpuTime> {
    // Field 2 is the program's name in parentheses, which may itself contain parentheses.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ms = || Some(fields.next()?.parse::<u64>().ok()? * 1000 / USER_HZ);
    Some(CpuTime { user_ms: ms()?, system_ms: ms()? })
}

/// Resident memory of a process, shared pages included.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64, ProcfsError> {
    const PAGE_BYTES: u64 = 4096;
    let pages = |text: &str| text.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(read_file(Some(pid), "statm", pages)? * PAGE_BYTES)
}

/// Number of local ports for outgoing connections from one address.
pub(crate) fn local_ports() -> u32 {
    const DEFAULT: u32 = 60_999 - 32_768 + 1;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    range.ok().and_then(|text| ports(&text)).unwrap_or(DEFAULT)
}

fn ports(text: &str) -> Option<u32> {
    let mut ends = text.split_ascii_whitespace().map(str::parse::<u32>);
    let (first, last) = (ends.next()?.ok()?, ends.next()?.ok()?);
    Some(last.checked_sub(first)? + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pss_is_found_among_similar_lines() {
        let text = "55f-7ff ---p 00000000 00:00 0 [rollup]\nRss:    5120 kB\nPss:            1234 kB\nPss_Dirty:  9 kB\n";
        assert_eq!(pss_bytes(text), Some(1234 * 1024));
        assert_eq!(pss_bytes("Rss: 1 kB"), None);
    }

    #[test]
    fn cpu_time_is_found_after_any_program_name() {
        let text = "42 (a) b (c) S 1 42 42 0 -1 4194560 1 2 3 4 150 25 7 8 20 0 1 0 99 1 1";
        assert_eq!(cpu(text), Some(CpuTime { user_ms: 1500, system_ms: 250 }));
        assert_eq!(cpu("42 (x) S 1"), None);
        assert_eq!(cpu(""), None);
    }

    #[test]
    fn port_range_includes_both_ends() {
        assert_eq!(ports("32768\t60999\n"), Some(28_232));
        assert_eq!(ports("9 1"), None);
    }

    #[test]
    fn usage_of_this_process_is_known() {
        assert!(ProcessUsage::read(None).unwrap().pss_bytes > 0);
        assert!(matches!(ProcessUsage::read(Some(u32::MAX)), Err(ProcfsError::Read { .. })));
        assert!(local_ports() > 0);
    }
}
