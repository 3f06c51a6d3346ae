//! Command line of the gateway: arguments, log, runtime, signals.

use std::{path::PathBuf, pin::pin, process::ExitCode, time::Duration};

use clap::{CommandFactory as _, Parser, Subcommand};
use gateway::{
    config::{Config, ConfigSources},
    server::{Server, StartError},
    version,
};
use skein_core::{drain::supervision::log_panics, telemetry};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::commands::{
    EXIT_USAGE, check_config, dial_address, healthcheck, init, load, print_config, token,
};

mod commands;

// Reasons and costs: docs/adr/0011.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Skein gateway. Without a command it serves: with no configuration as a single node on
/// 127.0.0.1:8080 that keeps its logs in memory.
///
/// Options come from the defaults, then the file, then the environment (GATEWAY__SECTION__KEY),
/// then --set; later sources replace earlier ones.
#[derive(Parser)]
#[command(name = "gateway", version = version::TEXT)]
struct Arguments {
    /// Configuration file. Without this argument `gateway.toml` is read if it exists.
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Sets an option, such as `--set server.listen=0.0.0.0:8080`. May be repeated. Other users of
    /// this machine can see arguments: set secrets in the file, or in a file of their own.
    #[arg(long, value_name = "KEY=VALUE", global = true)]
    set: Vec<String>,
    /// As the command `options`.
    #[arg(long, hide = true)]
    options: bool,
    /// As the command `healthcheck`.
    #[arg(long, hide = true)]
    health_check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serves clients until a signal ends it. The default.
    Serve,
    /// Checks the configuration: exits with 0, or with 64 after listing every mistake.
    CheckConfig,
    /// Prints the effective configuration and where each value comes from, without secrets.
    PrintConfig,
    /// Writes a commented configuration file with fresh secrets.
    Init(init::InitArguments),
    /// Prints a token for a user, signed with the configured secret.
    Token(token::TokenArguments),
    /// Asks the gateway at `admin.listen` whether it is ready, and exits with 0 or 1.
    Healthcheck,
    /// Prints all options with their defaults.
    Options,
    /// Prints a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Splits the arguments of `--set`. An error does not repeat the text, which may be a secret.
fn settings(set: Vec<String>) -> Result<Vec<(String, String)>, ExitCode> {
    let pair = |text: String| {
        let (key, value) = text.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    };
    set.into_iter().map(pair).collect::<Option<_>>().ok_or_else(|| {
        eprintln!("gateway: the argument of --set must be KEY=VALUE");
        ExitCode::from(EXIT_USAGE)
    })
}

/// Exit code after a part of the gateway has failed (sysexits.h: EX_SOFTWARE).
const EXIT_FAILED: u8 = 70;
/// Time for blocked threads to end at the shutdown of the runtime.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);
/// Task polls after which a busy thread polls its sockets again (tokio: 61): output gathers
/// meanwhile for one write per socket (docs/adr/0011).
const EVENT_INTERVAL: u32 = 1024;

fn main() -> ExitCode {
    let Arguments { config, set, options, health_check, command } = Arguments::parse();
    let sources = match settings(set) {
        Ok(flags) => ConfigSources { file: config, environment: None, flags },
        Err(code) => return code,
    };
    let command = match command {
        None if options => Command::Options,
        None if health_check => Command::Healthcheck,
        command => command.unwrap_or(Command::Serve),
    };
    match command {
        Command::CheckConfig => check_config::run(sources),
        Command::PrintConfig => print_config::run(sources),
        Command::Init(arguments) => init::run(&arguments),
        Command::Token(arguments) => token::run(sources, arguments),
        Command::Options => {
            print!("{}", Config::describe());
            ExitCode::SUCCESS
        }
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "gateway", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
        Command::Healthcheck => with_runtime(sources, |runtime, config| {
            runtime.block_on(healthcheck::run(dial_address(config.admin_listen)))
        }),
        Command::Serve => with_runtime(sources, serve),
    }
}

/// Reads the configuration and starts the runtime.
fn with_runtime(
    sources: ConfigSources,
    run: impl FnOnce(tokio::runtime::Runtime, Config) -> ExitCode,
) -> ExitCode {
    let config = match load(sources) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .event_interval(EVENT_INTERVAL)
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => run(runtime, config),
        Err(error) => {
            eprintln!("gateway: cannot start the runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(runtime: tokio::runtime::Runtime, config: Config) -> ExitCode {
    telemetry::start_log(config.log_format, &config.log_level, &config.node);
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
    let cluster = config.redis.is_some();
    let started = Server::start_unless(config, async {
        signals.stop().await;
    })
    .await;
    let server = match started {
        Ok(Some(server)) => server,
        Ok(None) => return ExitCode::SUCCESS,
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
        listen = %server.listen,
        admin = %server.admin_listen,
        bus = if cluster { "redis" } else { "memory" },
        "ready; the chat page is at http://{}/", dial_address(server.listen)
    );
    let mut failed = pin!(server.failed());
    let signal = loop {
        tokio::select! {
            failure = &mut failed => {
                tracing::error!(%failure, code = EXIT_FAILED, "a part of the gateway has failed: exiting");
                server.abandon().await;
                return ExitCode::from(EXIT_FAILED);
            }
            signal = signals.next() => match signal {
                RELOAD_SIGNAL => drop(server.reload(RELOAD_SIGNAL)),
                signal => break signal,
            }
        }
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

/// Signals whose default action would end the process without closing its connections.
struct Signals {
    /// Signals that stop the gateway in order, and the one that reloads the configuration.
    handled: Vec<(&'static str, Signal)>,
    /// Ignored signals: a log rotation that sends one must not end a gateway.
    _ignored: [Signal; 2],
}

/// Reloads the configuration, under `nohup` as well.
const RELOAD_SIGNAL: &str = "SIGHUP";

impl Signals {
    fn listen() -> std::io::Result<Self> {
        // The reload first: of signals that arrive together it is handled before the stop.
        let named = [
            (RELOAD_SIGNAL, SignalKind::hangup()),
            ("SIGTERM", SignalKind::terminate()),
            ("SIGINT", SignalKind::interrupt()),
            ("SIGQUIT", SignalKind::quit()),
        ];
        let handled = named.into_iter().map(|(name, kind)| Ok((name, signal(kind)?)));
        Ok(Self {
            handled: handled.collect::<std::io::Result<_>>()?,
            _ignored: [signal(SignalKind::user_defined1())?, signal(SignalKind::user_defined2())?],
        })
    }

    /// Waits for a signal, and returns its name. Cancel-safe.
    async fn next(&mut self) -> &'static str {
        std::future::poll_fn(|context| {
            let due = |(name, signal): &mut (&'static str, Signal)| {
                signal.poll_recv(context).is_ready().then_some(*name)
            };
            match self.handled.iter_mut().find_map(due) {
                Some(name) => std::task::Poll::Ready(name),
                None => std::task::Poll::Pending,
            }
        })
        .await
    }

    /// Waits for a signal that stops the gateway, and returns its name. A gateway that starts or
    /// stops does not reload. Cancel-safe.
    async fn stop(&mut self) -> &'static str {
        loop {
            match self.next().await {
                RELOAD_SIGNAL => tracing::warn!("SIGHUP ignored: only a running gateway reloads"),
                signal => return signal,
            }
        }
    }
}
