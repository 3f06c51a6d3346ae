//! Monitor of server processes: their resource usage and gauges while a scenario runs.

use std::{
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    args::MonitorArgs,
    phase::{PhaseTotals, ScenarioPhase},
    procfs::{self, CpuTime, ProcessUsage, ProcfsError},
    report::servers::{GaugeSeries, ServerReport, ServerSample, gauges},
};

/// Interval between samples.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of a metrics request.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// Size limit of a metrics page.
const PAGE_BYTES_MAX: u64 = 4 << 20;

/// Samples servers until [`ServerMonitor::finish`].
pub(crate) struct ServerMonitor {
    servers: Vec<ServerReport>,
    cpu_ms: Vec<u64>,
    samples: Arc<Mutex<MonitorSamples>>,
    thread: Option<(mpsc::SyncSender<()>, JoinHandle<()>)>,
}

#[derive(Default)]
struct MonitorSamples {
    servers: Vec<Vec<ServerSample>>,
    gauges: Vec<GaugeSeries>,
}

impl ServerMonitor {
    /// Reads the initial usage and starts the sampling thread.
    pub(crate) fn begin(args: &MonitorArgs) -> Result<Self, ProcfsError> {
        let costs: Vec<ProcessUsage> =
            args.pid.iter().map(|pid| ProcessUsage::read(Some(*pid))).collect::<Result<_, _>>()?;
        let servers = args.pid.iter().zip(&costs).map(|(pid, cost)| ServerReport::new(*pid, *cost));
        let url = |url: &String| GaugeSeries { url: url.clone(), ..GaugeSeries::default() };
        let samples = MonitorSamples {
            servers: vec![Vec::new(); args.pid.len()],
            gauges: args.metrics.iter().map(url).collect(),
        };
        let samples = Arc::new(Mutex::new(samples));
        let thread = (!args.pid.is_empty() || !args.metrics.is_empty()).then(|| {
            let (stop, stopped) = mpsc::sync_channel(1);
            let (pids, samples) = (args.pid.clone(), samples.clone());
            (stop, std::thread::spawn(move || sample(&pids, &samples, &stopped)))
        });
        Ok(Self {
            servers: servers.collect(),
            cpu_ms: costs.iter().map(|cost| cost.cpu_ms).collect(),
            samples,
            thread,
        })
    }

    /// Records the usage of each server in the phase that ended.
    pub(crate) fn end_phase(&mut self, phase: ScenarioPhase, sum: &PhaseTotals) {
        let (phase_name, unit) = match phase {
            ScenarioPhase::Opening => ("opening", "connection"),
            ScenarioPhase::Held => ("while held", "connection"),
            ScenarioPhase::Reconnected => ("reconnecting", "connection"),
            ScenarioPhase::Traffic => ("traffic", "delivery"),
        };
        for (server, before) in self.servers.iter_mut().zip(&mut self.cpu_ms) {
            // A server that has died keeps its last values.
            if let Ok(now) = ProcessUsage::read(Some(server.pid)) {
                server.add_phase(phase_name, now.cpu_ms.saturating_sub(*before), unit, sum.done);
                server.record_memory(now, sum.open);
                *before = now.cpu_ms;
            }
        }
    }

    /// Stops sampling and returns the reports.
    pub(crate) fn finish(mut self) -> (Vec<ServerReport>, Vec<GaugeSeries>) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            // Its only result is in `samples`.
            let _ = thread.join();
        }
        let mut samples = std::mem::take(&mut *self.samples.lock());
        for (server, samples) in self.servers.iter_mut().zip(&mut samples.servers) {
            server.samples = std::mem::take(samples);
        }
        (self.servers, samples.gauges)
    }
}

fn sample(pids: &[u32], samples: &Mutex<MonitorSamples>, stopped: &mpsc::Receiver<()>) {
    let began = Instant::now();
    let urls: Vec<String> = samples.lock().gauges.iter().map(|gauges| gauges.url.clone()).collect();
    let mut before: Vec<(f64, u64)> = vec![(0.0, 0); pids.len()];
    for (pid, before) in pids.iter().zip(&mut before) {
        before.1 = CpuTime::read(Some(*pid)).unwrap_or_default().total_ms();
    }
    while stopped.recv_timeout(INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
        for (number, (pid, before)) in pids.iter().zip(&mut before).enumerate() {
            let at_s = began.elapsed().as_secs_f64();
            let (Ok(cpu), Ok(resident_bytes)) =
                (CpuTime::read(Some(*pid)), procfs::resident_bytes(*pid))
            else {
                continue;
            };
            let spent = cpu.total_ms().saturating_sub(before.1) as f64;
            let cpu_percent = spent / 10.0 / (at_s - before.0);
            *before = (at_s, cpu.total_ms());
            let sample = ServerSample { at_s, cpu_percent, resident_bytes };
            samples.lock().servers[number].push(sample);
        }
        for (number, url) in urls.iter().enumerate() {
            // A server that does not answer has no value in this second.
            let Ok(page) = fetch(url) else { continue };
            let at_s = began.elapsed().as_secs_f64();
            let series = &mut samples.lock().gauges[number].series;
            for (name, value) in gauges(&page) {
                series.entry(name).or_default().push((at_s, value));
            }
        }
    }
}

/// Fetches a metrics page. Blocks, at most for some seconds.
pub(crate) fn fetch(url: &str) -> io::Result<String> {
    let rest = url.strip_prefix("http://").ok_or(io::ErrorKind::InvalidInput)?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, "metrics"));
    let address = host.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_MAX)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    write!(stream, "GET /{path} HTTP/1.0\r\nHost: {host}\r\n\r\n")?;
    let mut page = String::new();
    stream.take(PAGE_BYTES_MAX).read_to_string(&mut page)?;
    Ok(page)
}
