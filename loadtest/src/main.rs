//! `loadtest`: puts load on a gateway and tells what it saw.
//!
//! Exit code 0 where everything asked for happened, 1 where not, or where the result does not count,
//! 2 where the command cannot work as it was given.

use std::{fmt::Display, fs, process::ExitCode};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{Cli, Command, OutputArgs},
    report::{Report, compare, html},
};

mod args;
mod websocket;
mod timestamp;
mod procfs;
mod report;
mod progress;
mod monitor;
mod virtual_users;
mod scenario;
mod bench;
mod ledger_run;
mod chat;
mod chaos;
mod abuse;

/// The command cannot work as it was given.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // One thread: it takes one core at most and leaves the others to the server.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loadtest: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run(command))
}

async fn run(command: Command) -> ExitCode {
    match command {
        Command::Connect(args) => {
            let output = args.common.output.clone();
            told(scenario::connect::run(args).await, &output)
        }
        Command::Storm(args) => {
            let output = args.common.output.clone();
            told(scenario::storm::run(args).await, &output)
        }
        Command::Fanout(args) => {
            let output = args.common.output.clone();
            told(scenario::traffic::fanout(args).await, &output)
        }
        Command::Rooms(args) => {
            let output = args.common.output.clone();
            told(scenario::traffic::rooms(args).await, &output)
        }
        Command::Slow(args) => {
            let output = args.common.output.clone();
            told(scenario::traffic::slow(args).await, &output)
        }
        Command::Sweep(args) => {
            let output = args.common.output.clone();
            told(scenario::sweep::run(args).await, &output)
        }
        Command::Chat(args) => {
            let output = args.output.clone();
            told(chat::run(args).await.map(Some), &output)
        }
        Command::Ledger(args) => {
            let output = args.load.output.clone();
            told(ledger_run::run(args).await.map(Some), &output)
        }
        Command::Chaos(args) => {
            let output = args.load.output.clone();
            told(chaos::run(args).await.map(Some), &output)
        }
        Command::Abuse(args) if args.list => {
            print!("{}", abuse::list());
            ExitCode::SUCCESS
        }
        Command::Abuse(args) => {
            let output = args.output.clone();
            told(abuse::run(args).await.map(Some), &output)
        }
        Command::Compare(args) => end(compare::run(&args.first, &args.second), |comparison| {
            print!("{comparison}");
            comparison.is_good()
        }),
        Command::Bench(args) => end(bench::run(args).await, |table| {
            print!("{table}");
            table.is_good()
        }),
    }
}

/// Prints a report, and writes it as a page where that is wanted. Where this is one of several
/// processes there is none.
fn told<E: Display>(result: Result<Option<Report>, E>, output: &OutputArgs) -> ExitCode {
    end(result, |report| {
        let Some(report) = report else { return true };
        if output.json {
            println!("{}", serde_json::to_string(report).expect("its keys are text"));
        } else {
            print!("{report}");
        }
        let Some(file) = &output.html else { return report.passed };
        let page = html::page(report).map_err(|error| error.to_string());
        match page.and_then(|page| fs::write(file, page).map_err(|error| error.to_string())) {
            Ok(()) => report.passed,
            Err(error) => {
                eprintln!("loadtest: {}: {error}", file.display());
                false
            }
        }
    })
}

/// Has a result told, and makes an exit code of it.
fn end<T, E: Display>(result: Result<T, E>, tell: impl FnOnce(&T) -> bool) -> ExitCode {
    match result {
        Ok(result) if tell(&result) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::from(USAGE)
        }
    }
}

/// Ends when somebody presses Ctrl-C or asks this process to end.
async fn interrupted() {
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        // Without a place to hear of signals they do what they do to any process.
        return std::future::pending().await;
    };
    // Both arms are cancel-safe.
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
