//! `loadtest`: puts load on a gateway and tells what it saw.
//!
//! Exit code 0 where everything asked for happened, 1 where not, 2 where the command cannot work
//! as it was given.

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};

mod args;
mod wire;
mod process;
mod connection;
mod report;
mod connect;

/// The command cannot work as it was given.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let Cli { command: Command::Connect(args) } = Cli::parse();
    // One thread: it takes one core at most and leaves the others to the server.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loadtest: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let json = args.json;
    let report = match runtime.block_on(connect::run(args)) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("loadtest: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if json {
        match serde_json::to_string(&report) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("loadtest: {error}"),
        }
    } else {
        print!("{report}");
    }
    if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
