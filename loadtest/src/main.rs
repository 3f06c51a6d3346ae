//! `loadtest`: puts load on a gateway and reports the result.
//!
//! Exit code 0: the run passed. 1: it failed or its result is invalid. 2: the command cannot run as
//! given.

use std::{fmt::Display, fs, process::ExitCode};

use clap::Parser;

use crate::{
    args::{Cli, LoadCommand, OutputArgs},
    report::{Report, compare, html},
};

mod args;
mod websocket;
mod timestamp;
mod phase;
mod procfs;
mod signals;
mod tls;
mod report;
mod progress;
mod monitor;
mod virtual_users;
mod scenario;
mod bench;
mod ledger_run;
mod chat;
mod chaos;
mod deploy;
mod abuse;

/// The command cannot run as given.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // One thread, which takes one core at most and leaves the others to the server.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loadtest: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(run(command))
}

async fn run(command: LoadCommand) -> ExitCode {
    match command {
        LoadCommand::Connect(args) => {
            let output = args.common.output.clone();
            print_report(scenario::connect::run(args).await, &output)
        }
        LoadCommand::Storm(args) => {
            let output = args.common.output.clone();
            print_report(scenario::storm::run(args).await, &output)
        }
        LoadCommand::Fanout(args) => {
            let output = args.common.output.clone();
            print_report(scenario::traffic::fanout(args).await, &output)
        }
        LoadCommand::Rooms(args) => {
            let output = args.common.output.clone();
            print_report(scenario::traffic::rooms(args).await, &output)
        }
        LoadCommand::Slow(args) => {
            let output = args.common.output.clone();
            print_report(scenario::traffic::slow(args).await, &output)
        }
        LoadCommand::Sweep(args) => {
            let output = args.common.output.clone();
            print_report(scenario::sweep::run(args).await, &output)
        }
        LoadCommand::Chat(args) => {
            let output = args.output.clone();
            print_report(chat::run(args).await.map(Some), &output)
        }
        LoadCommand::Ledger(args) => {
            let output = args.load.output.clone();
            print_report(ledger_run::run(args).await.map(Some), &output)
        }
        LoadCommand::Chaos(args) => {
            let output = args.load.output.clone();
            print_report(chaos::run(args).await.map(Some), &output)
        }
        LoadCommand::Deploy(args) => {
            let output = args.load.output.clone();
            print_report(deploy::run(args).await.map(Some), &output)
        }
        LoadCommand::Scale(args) => {
            let output = args.load.output.clone();
            print_report(deploy::scale(args).await.map(Some), &output)
        }
        LoadCommand::Abuse(args) if args.list => {
            print!("{}", abuse::list());
            ExitCode::SUCCESS
        }
        LoadCommand::Abuse(args) => {
            let output = args.output.clone();
            print_report(abuse::run(args).await.map(Some), &output)
        }
        LoadCommand::Compare(args) => {
            exit_code(compare::run(&args.first, &args.second), |comparison| {
                print!("{comparison}");
                comparison.is_valid()
            })
        }
        LoadCommand::Bench(args) => exit_code(bench::run(args).await, |table| {
            print!("{table}");
            table.is_valid()
        }),
    }
}

/// Prints a report, and writes it as an HTML page if requested. Worker processes have no report.
fn print_report<E: Display>(result: Result<Option<Report>, E>, output: &OutputArgs) -> ExitCode {
    exit_code(result, |report| {
        let Some(report) = report else { return true };
        if output.json {
            println!("{}", serde_json::to_string(report).expect("all keys are strings"));
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

/// Prints a result and turns it into an exit code.
fn exit_code<T, E: Display>(result: Result<T, E>, print: impl FnOnce(&T) -> bool) -> ExitCode {
    match result {
        Ok(result) if print(&result) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::from(USAGE)
        }
    }
}
