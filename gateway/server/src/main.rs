//! The gateway's command line: arguments, log, runtime, signals.

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

// What it gives and costs: docs/adr/0011.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Skein gateway. Without any argument: a single node on 127.0.0.1:8080 that needs nothing
/// else.
///
/// Options come from defaults, then the file, then the environment (GATEWAY__SECTION__KEY), then
/// --set. `--options` lists them.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file. `gateway.toml` is read if it is there.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets an option, as `--set server.listen=0.0.0.0:8080`. May be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Prints every option with its default, and ends.
    #[arg(long)]
    options: bool,
    /// Asks the gateway at `admin.listen` whether it is ready, and ends with 0 or 1.
    #[arg(long)]
    health_check: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("an option is set by KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The exit code for bad usage (sysexits.h: EX_USAGE).
const BAD_USAGE: u8 = 64;
/// The exit code after a part of the gateway has failed (sysexits.h: EX_SOFTWARE).
const FAILED: u8 = 70;
/// How long the runtime waits at the end for what blocks a thread.
const LAST_TASKS_MAX: Duration = Duration::from_secs(1);
/// After how many steps of tasks a busy thread looks at its sockets again, where tokio does after 61:
/// what is ready by then gathers for one write per socket (docs/adr/0011).
const STEPS_PER_LOOK: u32 = 1024;

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
            return ExitCode::from(BAD_USAGE);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .event_interval(STEPS_PER_LOOK)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("gateway: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    if arguments.health_check {
        return runtime.block_on(health_check(reachable(config.admin_listen)));
    }
    telemetry::start_log(config.log_format, &config.log_level);
    log_panics();
    let code = runtime.block_on(run(config));
    // What is left is not waited for: after a failure it may never end.
    runtime.shutdown_timeout(LAST_TASKS_MAX);
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
            return ExitCode::from(FAILED);
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
        "ready; the chat page is at http://{}/", reachable(server.listen)
    );
    let mut failed = pin!(server.failed());
    let signal = tokio::select! {
        failure = &mut failed => {
            tracing::error!(%failure, code = FAILED, "this process ends");
            server.abandon().await;
            return ExitCode::from(FAILED);
        }
        signal = signals.stop() => signal,
    };
    tracing::info!(signal, "stopping; a second signal ends at once");
    let stopped = tokio::select! {
        stopped = server.stop() => stopped,
        failure = &mut failed => {
            tracing::error!(%failure, code = FAILED, "this process ends before it has stopped in order");
            return ExitCode::from(FAILED);
        }
        _ = signals.stop() => false,
    };
    if stopped {
        tracing::info!("stopped");
    } else {
        tracing::warn!("stopped before everything had ended");
    }
    ExitCode::SUCCESS
}

/// The address as somebody on this machine would dial it.
fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if !ip.is_unspecified() => listen,
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, listen.port()).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, listen.port()).into(),
    }
}

/// The signals whose default would end the process without a word to its clients.
struct Signals {
    /// They stop it in order.
    stop: Vec<(&'static str, Signal)>,
    /// They mean nothing here: a log rotation that sends one must not end a gateway.
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
            // `nohup` asks for that.
            *name != "SIGHUP" || !is_ignored(*kind)
        });
        let stop = named.map(|(name, kind)| Ok((name, signal(kind)?)));
        Ok(Self {
            stop: stop.collect::<std::io::Result<_>>()?,
            _ignored: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
        })
    }

    /// Waits for one that asks to stop. Returns its name. Cancel-safe.
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

/// Whether the process was started with the signal ignored (proc(5)).
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    mask >> (kind.as_raw_value() - 1) & 1 == 1
}

/// Asks `/ready` on this machine. An image without curl has nothing else to ask with.
async fn health_check(admin: SocketAddr) -> ExitCode {
    let ask = async {
        let mut socket = TcpStream::connect(admin).await?;
        let request = "GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        socket.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    match tokio::time::timeout(Duration::from_secs(2), ask).await {
        Ok(Ok(answer)) if answer.starts_with("HTTP/1.1 200") => ExitCode::SUCCESS,
        Ok(Ok(answer)) => {
            eprintln!("not ready: {}", answer.lines().last().unwrap_or_default());
            ExitCode::FAILURE
        }
        Ok(Err(error)) => {
            eprintln!("not ready: {admin}: {error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("not ready: {admin}: no answer within 2 s");
            ExitCode::FAILURE
        }
    }
}
