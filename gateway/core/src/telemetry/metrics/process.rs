//! The CPU time of this process in ticks of 10 ms: the process collector rounds it to whole seconds.

use prometheus::proto::MetricFamily;

/// The ticks per second that Linux reports to programs, on every architecture (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// Replaces the CPU time among gathered families; without `/proc` the rounded value stays.
pub(super) fn refine_cpu_time(families: &mut [MetricFamily]) {
    let Some(ticks) = std::fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(ticks_of)
    else {
        return;
    };
    let cpu = families.iter_mut().find(|family| family.name() == "process_cpu_seconds_total");
    if let Some(metric) = cpu.and_then(|family| family.mut_metric().first_mut()) {
        let mut counter = prometheus::proto::Counter::default();
        counter.set_value(ticks as f64 / TICKS_PER_SECOND);
        metric.set_counter(counter);
    }
}

/// The ticks of user and system time in `/proc/<pid>/stat` (proc(5)).
fn ticks_of(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything; the state behind it is field 3, the times are
    // fields 14 and 15.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11).map(|ticks| ticks.parse::<u64>().ok());
    Some(times.next()?? + times.next()??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_read_behind_a_name_with_parentheses() {
        let stat = "7 (a) b) R 1 2 3 4 5 6 7 8 9 10 1234 567 0 0 20 0\n";
        assert_eq!(ticks_of(stat), Some(1801));
        assert_eq!(ticks_of("7 (a) R 1 2"), None);
    }
}
