//! Command line of the gateway: arguments, log, runtime, signals.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use gateway::{
    config::{Config, ConfigSources},
    server::{Server, StartError},
};
use skein_core::{drain::supervision::log_panics, telemetry};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    signal::unix::{Signal, SignalKind, signal},
};

// Reasons and costs: docs/adr/0011.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Skein gateway. Without arguments it runs a single node on 127.0.0.1:8080 that keeps its logs
/// in memory.
///
/// Options come from the defaults, then the file, then the environment (GATEWAY__SECTION__KEY),
/// then --set; later sources replace earlier ones. `--options` lists all options.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Configuration file. Without this argument `gateway.toml` is read if it exists.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets an option, such as `--set server.listen=0.0.0.0:8080`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_setting)]
    set: Vec<(String, String)>,
    /// Prints all options with their defaults, and exits.
    #[arg(long)]
    options: bool,
    /// Asks the gateway at `admin.listen` whether it is ready, and exits with 0 or 1.
    #[arg(long)]
    health_check: bool,
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("an option must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Exit code for an invalid configuration (sysexits.h: EX_USAGE).
const EXIT_USAGE: u8 = 64;
/// Exit code after a part of the gateway has failed (sysexits.h: EX_SOFTWARE).
const EXIT_FAILED: u8 = 70;
/// Time for blocked threads to end at the shutdown of the runtime.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// Task polls after which a busy thread polls its sockets again (tokio: 61): output gathers
/// meanwhile for one write per socket (docs/adr/0011).
const EVENT_INTERVAL: u32 = 1024;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.options {
        print!("{}", Config::describe());
        return ExitCode::SUCCESS;
    }
    let sources = ConfigSources { file: arguments.config, environment: None, flags: arguments.set };
    let config = match Config::load(sources) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("gateway: {errors}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("gateway: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.health_check {
        return runtime.block_on(health_check(dial_address(config.admin_listen)));
    }
    telemetry::start_log(config.log_format, &config.log_level);
    log_panics();
    let code = runtime.block_on(run(config));
    // Remaining tasks get a timeout: after a failure they may never end.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    code
}

async fn run(config: Config) -> ExitCode {
    #[cfg(debug_assertions)]
    if let Some(fault) = skein_core::fault_injection::of_process() {
        tracing::warn!(fault, "this process has an injected fault, for tests");
    }
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => {
            tracing::error!(%error, "cannot listen for signals");
            return ExitCode::FAILURE;
        }
    };
    let (node, cluster) = (config.node.clone(), config.redis.is_some());
    let starting = Server::start(config);
    let server = tokio::select! {
        server = starting => server,
        _ = signals.stop() => return ExitCode::SUCCESS,
    };
    let server = match server {
        Ok(server) => server,
        Err(StartError::Failed(failure)) => {
            tracing::error!(%failure, "cannot start");
            return ExitCode::from(EXIT_FAILED);
        }
        Err(error) => {
            tracing::error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    tracing::info!(
        %node,
        listen = %server.listen,
        admin = %server.admin_listen,
        bus = if cluster { "redis" } else { "memory" },
        "ready; the chat page is at http://{}/", dial_address(server.listen)
    );
    let mut failed = pin!(server.failed());
    let signal = tokio::select! {
        failure = &mut failed => {
            tracing::error!(%failure, code = EXIT_FAILED, "a part of the gateway has failed: exiting");
            server.abandon().await;
            return ExitCode::from(EXIT_FAILED);
        }
        signal = signals.stop() => signal,
    };
    tracing::info!(signal, "stopping; a second signal exits at once");
    let stopped = tokio::select! {
        stopped = server.stop() => stopped,
        failure = &mut failed => {
            tracing::error!(%failure, code = EXIT_FAILED, "a part of the gateway has failed while stopping: exiting");
            return ExitCode::from(EXIT_FAILED);
        }
        _ = signals.stop() => false,
    };
    if stopped {
        tracing::info!("stopped");
    } else {
        tracing::warn!("stopped before all tasks had ended");
    }
    ExitCode::SUCCESS
}

/// Returns the address that a client on this machine dials.
fn dial_address(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if !ip.is_unspecified() => listen,
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, listen.port()).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, listen.port()).into(),
    }
}

/// Signals whose default action would end the process without closing its connections.
struct Signals {
    /// Signals that stop the gateway in order.
    stop: Vec<(&'static str, Signal)>,
    /// Ignored signals: a log rotation that sends one must not end a gateway.
    _ignored: [Signal; 2],
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        let named = [
            ("SIGTERM", SignalKind::terminate()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGQUIT", SignalKind::quit()),
            ("SIGHUP", SignalKind::hangup()),
        ];
        let named = named.into_iter().filter(|(name, kind)| {
            // `nohup` ignores SIGHUP.
            *name != "SIGHUP" || !is_ignored(*kind)
        });
        let stop = named.map(|(name, kind)| Ok((name, signal(kind)?)));
        Ok(Self {
            stop: stop.collect::<std::io::Result<_>>()?,
            _ignored: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
        })
    }

    /// Waits for a signal that stops the gateway. Returns its name. Cancel-safe.
    async fn stop(&mut self) -> &'static str {
        std::future::poll_fn(|context| {
            let due = |(name, signal): &mut (&'static str, Signal)| {
                signal.poll_recv(context).is_ready().then_some(*name)
            };
            match self.stop.iter_mut().find_map(due) {
                Some(name) => std::task::Poll::Ready(name),
                None => std::task::Poll::Pending,
            }
        })
        .await
    }
}

/// Whether the signal was ignored when the process started (proc(5)).
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

/// Requests `/ready` on this machine, for images without curl.
async fn health_check(admin: SocketAddr) -> ExitCode {
    let ask = async {
        let mut socket = TcpStream::connect(admin).await?;
        let request = "GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        socket.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        socket.read_to_string(&mut response).await?;
        std::io::Result::Ok(response)
    };
    match tokio::time::timeout(Duration::from_secs(2), ask).await {
        Ok(Ok(response)) if response.starts_with("HTTP/1.1 200") => ExitCode::SUCCESS,
        Ok(Ok(response)) => {
            eprintln!("not ready: {}", response.lines().last().unwrap_or_default());
            ExitCode::FAILURE
        }
        Ok(Err(error)) => {
            eprintln!("not ready: {admin}: {error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("not ready: {admin}: no response within 2 s");
            ExitCode::FAILURE
        }
    }
}
