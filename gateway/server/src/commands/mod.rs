//! Subcommands besides `serve`: each does one thing and exits.
//!
//! A command prints what it was asked for on standard output, and everything else on standard
//! error.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::ExitCode,
};

use gateway::config::{Config, ConfigErrors, ConfigSources};

pub(crate) mod check_config;
pub(crate) mod healthcheck;
pub(crate) mod init;
pub(crate) mod print_config;
pub(crate) mod token;

/// Exit code for an invalid configuration (sysexits.h: EX_USAGE).
pub(crate) const EXIT_USAGE: u8 = 64;

/// Reads the configuration, or reports every mistake.
///
/// # Errors
///
/// The exit code.
pub(crate) fn load(sources: ConfigSources) -> Result<Config, ExitCode> {
    Config::load(sources).map_err(|errors| report(&errors))
}

/// Reports every mistake of a configuration. Returns the exit code.
pub(crate) fn report(errors: &ConfigErrors) -> ExitCode {
    eprintln!("gateway: {errors}");
    ExitCode::from(EXIT_USAGE)
}

/// Returns the address that a client on this machine dials.
pub(crate) fn dial_address(listen: SocketAddr) -> SocketAddr {
    match listen.ip() {
        ip if !ip.is_unspecified() => listen,
        IpAddr::V4(_) => (Ipv4Addr::LOCALHOST, listen.port()).into(),
        IpAddr::V6(_) => (Ipv6Addr::LOCALHOST, listen.port()).into(),
    }
}
