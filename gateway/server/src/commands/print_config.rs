//! `gateway print-config`: the effective configuration and its sources.

use std::process::ExitCode;

use gateway::config::{Config, ConfigSources};

use super::report;

/// Prints every option in the syntax of a configuration file, with the source of its value. Of
/// secrets it prints names alone. Mistakes are reported as well.
pub(crate) fn run(sources: ConfigSources) -> ExitCode {
    let (options, result) = Config::explain(sources);
    for option in &options {
        let value = option.shown().replace('\\', "\\\\").replace('"', "\\\"");
        println!("{} = \"{value}\"  # {}", option.key(), option.source());
    }
    match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(errors) => report(&errors),
    }
}
