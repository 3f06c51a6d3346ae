//! `loadtest`: puts load on a gateway and tells what it saw.
//!
//! Exit code 0 where everything asked for happened, 1 where not, 2 where the command cannot work
//! as it was given.

use std::{fmt::Display, process::ExitCode};

use clap::Parser;

use crate::args::{Cli, Command};

mod args;
mod wire;
mod process;
mod connection;
mod report;
mod connect;
mod bench;
mod trial;
mod chaos;

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
    match command {
        Command::Connect(args) => {
            let json = args.json;
            end(runtime.block_on(connect::run(args)), |report| {
                if json {
                    println!("{}", serde_json::to_string(report).expect("its keys are text"));
                } else {
                    print!("{report}");
                }
                report.is_good()
            })
        }
        Command::Ledger(args) => {
            let json = args.load.json;
            end(runtime.block_on(trial::run(args)), |report| tell(report, json))
        }
        Command::Chaos(args) => {
            let json = args.load.json;
            end(runtime.block_on(chaos::run(args)), |report| tell(report, json))
        }
        Command::Bench(args) => end(runtime.block_on(bench::run(args)), |table| {
            print!("{table}");
            table.is_good()
        }),
    }
}

/// Prints what came of a trial. Returns whether it is good.
fn tell(report: &trial::Report, json: bool) -> bool {
    if json {
        println!("{}", serde_json::to_string(report).expect("its keys are text"));
    } else {
        print!("{report}");
    }
    report.is_good()
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
