//! `loadtest bench`: the table of speed and size. Every row is measured for the gateway, for the
//! baseline (one `write(2)` per frame and socket, `examples/baseline.rs`) and for a naive chat
//! (`examples/naive_chat.rs`), in turn, with new processes for each round. With `--previous` the
//! gateway is measured beside another build only, so that many short rounds show the cost of a
//! change.

use std::{fs, time::Duration};

use clap::Parser as _;
use hdrhistogram::Histogram;

use crate::{
    args::{BenchArgs, Cli, LoadCommand},
    scenario::connect,
};

mod error;
mod rows;
mod measure;
mod client;
mod clients;
mod echo;
mod append_script;
mod servers;
mod machine;
mod table;

use clients::{BenchClients, BenchTimes};
use error::BenchError;
use machine::Machine;
use measure::{Measure, RoundSample};
use rows::{BenchLoad, BenchRow, LoadModel, ROWS, Workload};
use servers::{BenchEnvironment, BenchServers, Candidate, ServerCpu};
use table::{Rounds, Table, TableRow};

/// Descriptors that servers and load need; servers inherit the limit.
const DESCRIPTORS: u64 = 20_000;
/// If messages are sent later than this, the latency is that of the load generator.
const LATENESS_MAX: Duration = Duration::from_millis(1);

/// Measures the requested rows.
pub(crate) async fn run(args: BenchArgs) -> Result<Table, BenchError> {
    // If the limit stays too low, connections fail, which is reported.
    let _ = rlimit::increase_nofile_limit(DESCRIPTORS);
    let environment = BenchEnvironment::new(args.programs.clone(), args.previous.clone())?;
    let machine = Machine::detect(&environment);
    let mut table = Table::new(machine, args.rounds, args.measured.as_millis());
    for row in ROWS.iter().filter(|row| args.rows.is_empty() || args.rows.contains(&row.name)) {
        let rounds = measure_row(&environment, row, &args).await?;
        table.rows.push(TableRow::new(row, &rounds));
        eprintln!("{}", table.rows.last().map(ToString::to_string).unwrap_or_default());
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&table).expect("all keys are strings");
        let failed = |source| BenchError::Json { path: path.display().to_string(), source };
        fs::write(path, json).map_err(failed)?;
    }
    Ok(table)
}

async fn measure_row(
    environment: &BenchEnvironment,
    row: &BenchRow,
    args: &BenchArgs,
) -> Result<Rounds, BenchError> {
    let workload = row.workload.divided(args.divide_by);
    let mut times = BenchTimes { warm_up: args.measured / 4, measured: args.measured };
    if workload.is_open_loop() {
        // CPU usage is low, and is counted in steps of 10 ms.
        times.measured *= 2;
    }
    let mut rounds: Rounds = Candidate::ALL.map(|candidate| (candidate, Vec::new())).into();
    rounds.retain(|(candidate, _)| workload.has(*candidate) && environment.has(*candidate));
    for _ in 0..args.rounds {
        for (candidate, samples) in &mut rounds {
            samples.push(sample(environment, workload, *candidate, times).await?);
        }
    }
    Ok(rounds)
}

async fn sample(
    environment: &BenchEnvironment,
    workload: Workload,
    candidate: Candidate,
    times: BenchTimes,
) -> Result<RoundSample, BenchError> {
    match workload {
        Workload::Load(load) => {
            let servers = environment.start(candidate, load.nodes, false)?;
            load_sample(&servers, load, times)
        }
        Workload::Publish(load) if candidate == Candidate::Baseline => {
            script_sample(&environment.start_redis()?, load, times)
        }
        Workload::Failover(load) => {
            failover_sample(environment.start(candidate, load.nodes, false)?, load, times)
        }
        Workload::Publish(load) => {
            publish_sample(&environment.start(candidate, load.nodes, false)?, load, times)
        }
        Workload::Connect { connections, per_second, token } => {
            let servers = environment.start(candidate, 1, token)?;
            connect_sample(&servers, connections, per_second, token).await
        }
        Workload::Echo => echo_sample(&environment.start(candidate, 1, false)?, times),
    }
}

fn load_sample(
    servers: &BenchServers,
    load: BenchLoad,
    times: BenchTimes,
) -> Result<RoundSample, BenchError> {
    let mut clients = BenchClients::open(load, &servers.addresses())?;
    let result = clients.run_load(times, || servers.cpu_time())?;
    let (before, after) = result.snapshots;
    let cpu = after.since(before);
    let mut sample = RoundSample::default();
    sample.put_cpu(cpu, result.deliveries, load.nodes > 1);
    sample.put(Measure::Deliveries, result.deliveries as f64 / result.measured.as_secs_f64());
    if let LoadModel::OpenLoop(_) = load.model {
        // In a closed loop a message has no due time.
        sample.put_latency(&result.latency_ns);
        sample.put_lateness(&result.lateness_ns);
    }
    if result.wrong > 0 {
        sample.flaws.push(format!(
            "of {} deliveries {} are missing or duplicated",
            result.expected, result.wrong
        ));
    }
    Ok(sample)
}

fn publish_sample(
    servers: &BenchServers,
    load: BenchLoad,
    times: BenchTimes,
) -> Result<RoundSample, BenchError> {
    let mut sample = load_sample(servers, load, times)?;
    let redis_us = sample.values.get(&Measure::RedisCpu).copied().unwrap_or_default();
    sample.values.clear();
    // Each message has one reader: its sender.
    sample.put(Measure::Publishes, 1e6 / redis_us);
    Ok(sample)
}

fn failover_sample(
    mut servers: BenchServers,
    load: BenchLoad,
    times: BenchTimes,
) -> Result<RoundSample, BenchError> {
    let addresses = servers.addresses();
    let mut clients = BenchClients::open(load, &addresses)?;
    let last = load.nodes - 1;
    let failover = clients.run_failover(times, &addresses, last, || servers.kill(last))?;
    let mut sample = RoundSample::default();
    let (before, after) = &failover.latency_ns;
    let p99 = |times_ns: &Histogram<u64>| times_ns.value_at_quantile(0.99) as f64;
    sample.put(Measure::Reconnected, p99(&failover.reconnect_ns) / 1e6);
    sample.put(Measure::OthersP99Ratio, p99(after) / p99(before));
    sample.put_latency(after);
    sample.put_lateness(&failover.lateness_ns);
    for (count, program) in [
        (failover.not_recovered, "members were not recovered"),
        (failover.missing as u64, "members have not reconnected"),
        (failover.wrong, "deliveries are missing or duplicated"),
    ] {
        if count > 0 {
            sample.flaws.push(format!("{count} {program}, of {} deliveries", failover.expected));
        }
    }
    Ok(sample)
}

fn script_sample(
    redis: &BenchServers,
    load: BenchLoad,
    times: BenchTimes,
) -> Result<RoundSample, BenchError> {
    let mut sample = RoundSample::default();
    if let Some(address) = redis.redis_address() {
        let result = append_script::publish(address, load, times, || redis.cpu_time())?;
        let (before, after) = result.snapshots;
        let seconds = after.since(before).redis_ms as f64 / 1e3;
        sample.put(Measure::Publishes, result.publishes as f64 / seconds);
    }
    Ok(sample)
}

fn echo_sample(servers: &BenchServers, times: BenchTimes) -> Result<RoundSample, BenchError> {
    let mut sample = RoundSample::default();
    for address in servers.addresses() {
        let result = echo::echo(address, times, || servers.cpu_time())?;
        let (before, after) = result.snapshots;
        sample.put_cpu(after.since(before), result.round_trips_ns.len(), false);
        sample.put_latency(&result.round_trips_ns);
    }
    Ok(sample)
}

/// Measures as `loadtest connect` does.
async fn connect_sample(
    servers: &BenchServers,
    connections: u32,
    per_second: u32,
    token: bool,
) -> Result<RoundSample, BenchError> {
    let mut command = vec!["loadtest".to_owned(), "connect".to_owned()];
    let mut option = |name: &str, value: String| command.extend([format!("--{name}"), value]);
    for (address, pid) in servers.addresses().iter().zip(servers.pids()) {
        option("url", format!("ws://{address}/ws"));
        option("pid", pid.to_string());
    }
    option("connections", connections.to_string());
    option("ramp", format!("{per_second}/s"));
    option("rooms", connections.div_ceil(10).to_string());
    option("hold", "1s".to_owned());
    if token {
        option("token", servers::TOKEN.to_owned());
    }
    let LoadCommand::Connect(args) = Cli::parse_from(command).command else {
        unreachable!("the command is `connect`")
    };
    let report = connect::run(args).await?;
    let mut sample = RoundSample::default();
    let Some((report, connections)) =
        report.as_ref().and_then(|report| Some((report, report.connections.as_ref()?)))
    else {
        return Ok(sample);
    };
    if let Some(server) = report.servers.first() {
        let opening = server.phases.first().and_then(|phase| phase.cpu_per_unit_us);
        if let Some(cpu_us) = opening {
            sample.put(Measure::CpuPerConnection, cpu_us);
        }
        if let Some(memory) = server.memory_per_connection_bytes {
            sample.put(Measure::Memory, memory as f64 / 1024.0);
        }
    }
    sample.put(Measure::Connections, connections.opened as f64 / connections.opening_s);
    sample.flaws.extend(report.failures.iter().cloned());
    Ok(sample)
}

impl RoundSample {
    fn put(&mut self, measure: Measure, value: f64) {
        self.values.insert(measure, value);
    }

    fn put_latency(&mut self, times_ns: &Histogram<u64>) {
        for (measure, quantile) in
            [(Measure::P50, 0.5), (Measure::P99, 0.99), (Measure::P999, 0.999)]
        {
            self.put(measure, times_ns.value_at_quantile(quantile) as f64 / 1e3);
        }
    }

    /// Marks the sample as invalid if the load was late.
    fn put_lateness(&mut self, times_ns: &Histogram<u64>) {
        let late = Duration::from_nanos(times_ns.value_at_quantile(0.99));
        if late > LATENESS_MAX {
            self.flaws.push(format!("the load generator was late: p99 {late:.1?}"));
        }
    }

    fn put_cpu(&mut self, cpu: ServerCpu, deliveries: u64, redis: bool) {
        let each = |ms: u64| ms as f64 * 1e3 / deliveries as f64;
        self.put(Measure::Cpu, each(cpu.total_ms()));
        self.put(Measure::UserCpu, each(cpu.user_ms));
        if redis {
            self.put(Measure::RedisCpu, each(cpu.redis_ms));
        }
    }
}
