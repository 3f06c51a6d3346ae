//! The gateway's command line: arguments, log, runtime, signals.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use gateway::{
    config::{Config, Sources},
    server::Server,
    telemetry,
};
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
    /// Asks the gateway on this machine whether it is ready, and ends with 0 or 1.
    #[arg(long)]
    health_check: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("an option is set by KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The exit code for bad usage (sysexits.h: EX_USAGE).
const BAD_USAGE: u8 = 64;
/// After how many steps of tasks a busy thread looks at its sockets again, where tokio does after 61:
/// what is ready by then gathers for one write per socket (docs/adr/0011).
const STEPS_PER_LOOK: u32 = 1024;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.options {
        print!("{}", Config::describe());
        return ExitCode::SUCCESS;
    }
    let sources = Sources { file: arguments.config, environment: None, flags: arguments.set };
    let config = match Config::load(sources) {
        Ok(config) => config,
        Err(mistakes) => {
            eprintln!("gateway: {mistakes}");
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
        return runtime.block_on(health_check(config.admin_listen.port()));
    }
    telemetry::start_log(config.log_format, &config.log_level);
    runtime.block_on(run(config))
}

async fn run(config: Config) -> ExitCode {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for signals");
        return ExitCode::FAILURE;
    };
    let (node, cluster) = (config.node.clone(), config.redis.is_some());
    let starting = Server::start(config);
    let server = tokio::select! {
        server = starting => server,
        () = asked_to_stop(&mut terminate, &mut interrupt) => return ExitCode::SUCCESS,
    };
    let server = match server {
        Ok(server) => server,
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
    asked_to_stop(&mut terminate, &mut interrupt).await;
    tracing::info!("stopping; a second signal ends at once");
    let stopped = tokio::select! {
        stopped = server.stop() => stopped,
        () = asked_to_stop(&mut terminate, &mut interrupt) => false,
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

async fn asked_to_stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Asks `/ready` on this machine. An image without curl has nothing else to ask with.
async fn health_check(port: u16) -> ExitCode {
    let ask = async {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
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
            eprintln!("not ready: {error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("not ready: no answer within 2 s");
            ExitCode::FAILURE
        }
    }
}
