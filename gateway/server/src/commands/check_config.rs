//! `gateway check-config`: every mistake of a configuration, or what holds.

use std::process::ExitCode;

use gateway::config::{Config, ConfigSources};
use skein_core::session::auth::Auth;

use super::{EXIT_USAGE, report};

/// Checks the configuration and the files that it names. Connects to nothing.
pub(crate) fn run(sources: ConfigSources) -> ExitCode {
    let (options, result) = Config::explain(sources);
    let config = match result {
        Ok(config) => config,
        Err(errors) => return report(&errors),
    };
    // The files for TLS are read when connections are prepared.
    if let Some(Err(error)) = config.redis.as_ref().map(skein_redis::RedisOptions::check) {
        eprintln!("gateway: invalid configuration, 1 error(s):\n  {error}");
        return ExitCode::from(EXIT_USAGE);
    }
    println!("the configuration is valid");
    let of = |key: &str| options.iter().find(|option| option.key() == key);
    let shown = |key: &str| of(key).map_or_else(String::new, |option| option.shown());
    println!("  node:       {}", config.node);
    println!("  clients:    {}", config.listen);
    println!("  operators:  {}", config.admin_listen);
    match config.redis {
        Some(_) => println!("  cluster:    {}", shown("cluster.redis_url")),
        None => println!("  cluster:    none: a single node that keeps logs in memory"),
    }
    match &config.auth {
        Auth::Anonymous => println!("  users:      anonymous: clients choose their own name"),
        Auth::Jwt(keys) => {
            let names = keys.options().secrets.iter().map(|secret| secret.name.as_str());
            let names: Vec<&str> = names.collect();
            println!("  users:      by token, checked with {}", names.join(", "));
        }
    }
    match config.access.api.names().collect::<Vec<_>>().join(", ") {
        names if names.is_empty() => println!("  server API: disabled"),
        names => println!("  server API: keys of {names}"),
    }
    let changed = options.iter().filter(|option| option.is_given()).count();
    println!("  options:    {changed} of {} are set; see gateway print-config", options.len());
    for warning in &config.warnings {
        println!("  warning:    {warning}");
    }
    ExitCode::SUCCESS
}
