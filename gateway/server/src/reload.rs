//! Reload of the configuration while the gateway runs.
//!
//! The sources are read and checked as at the start. A configuration with a mistake changes nothing.
//! Otherwise options that can change at run time are applied, and the others are reported. Values
//! that connections have read already stay: no connection is closed by a reload.

use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use skein_core::telemetry;
use skein_protocol::ids::NodeId;
use utoipa::ToSchema;

use crate::{
    config::{Config, ConfigErrors, ConfigSources, DEFAULT_FILE, OptionDoc},
    http::Node,
};

/// Reads the configuration again on request.
pub struct Reloader {
    node: NodeId,
    sources: ConfigSources,
    /// The options in effect, which a reload replaces.
    running: Mutex<Vec<OptionDoc>>,
    /// The parts that use the options; absent until they are built.
    target: OnceLock<Weak<Node>>,
}

/// The changes of a reload on a node.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Id of the node.
    pub node: String,
    /// Options that have a new value now.
    pub applied: Vec<OptionChange>,
    /// Options that differ from those in effect, and that only a restart applies.
    pub needs_restart: Vec<OptionChange>,
    /// Mistakes in the configuration. If there are any, nothing has changed.
    pub errors: Vec<String>,
}

/// An option with two values. Of secrets only names are shown.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct OptionChange {
    /// Key of the option.
    pub option: String,
    /// Value in effect before.
    pub from: String,
    /// Value in the configuration.
    pub to: String,
}

/// Whether a running gateway can apply another value of an option.
///
/// The mode of authentication is not among them: a mistake there would admit everyone. Neither is
/// `limits.message_bytes_max`, which all nodes and open connections have in common.
fn is_reloadable(key: &str) -> bool {
    const KEYS: [&str; 8] = [
        "api.keys",
        "auth.audience",
        "auth.issuer",
        "auth.jwt_secret",
        "auth.jwt_secrets",
        "auth.leeway",
        "log.level",
        "server.allowed_origins",
    ];
    KEYS.contains(&key) || key.starts_with("limits.") && key != "limits.message_bytes_max"
}

impl ReloadReport {
    /// The report, for other nodes.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl Reloader {
    /// Remembers where the configuration of a node came from, and its options.
    pub fn new(node: &NodeId, sources: ConfigSources, options: Vec<OptionDoc>) -> Self {
        let (node, running) = (node.clone(), Mutex::new(options));
        Self { node, sources, running, target: OnceLock::new() }
    }

    /// Sets the node whose options a reload changes.
    pub fn bind(&self, node: &Arc<Node>) {
        let _ = self.target.set(Arc::downgrade(node));
    }

    /// Reads the configuration again, applies what can be applied, and logs a line per change. `by`
    /// names who requested it, for the log. Reads files, which blocks the thread for a moment.
    pub fn reload(&self, by: &str) -> ReloadReport {
        let report = self.try_reload().unwrap_or_else(|errors| {
            let errors = errors.iter().map(ToString::to_string).collect();
            ReloadReport { errors, ..ReloadReport::default() }
        });
        for error in &report.errors {
            tracing::error!(mistake = %error, "invalid configuration");
        }
        if !report.errors.is_empty() {
            let mistakes = report.errors.len();
            tracing::error!(by, mistakes, "reload rejected: nothing has changed");
        } else {
            for OptionChange { option, from, to } in &report.applied {
                tracing::info!(option, from, to, "option changed");
            }
            for OptionChange { option, from, to } in &report.needs_restart {
                tracing::warn!(
                    option,
                    from,
                    to,
                    "the configuration has another value: restart the node to apply it"
                );
            }
            let (applied, needs_restart) = (report.applied.len(), report.needs_restart.len());
            tracing::info!(by, applied, needs_restart, "configuration reloaded");
        }
        ReloadReport { node: self.node.to_string(), ..report }
    }

    /// Rejects an empty file in place of one with options: a program that writes it anew in place has
    /// emptied it and not written it yet.
    fn check_file(&self, running: &[OptionDoc]) -> Result<(), ConfigErrors> {
        let path = self.sources.file.clone().unwrap_or_else(|| DEFAULT_FILE.into());
        let has_options = || running.iter().any(OptionDoc::is_from_file);
        let is_empty = std::fs::metadata(&path).is_ok_and(|found| found.len() == 0);
        if is_empty && has_options() {
            let text = "it is empty: write another file and rename it to this one, so that a reload \
                        never sees a part of it";
            return Err(ConfigErrors::one(&path.display().to_string(), text.to_owned()));
        }
        Ok(())
    }

    fn try_reload(&self) -> Result<ReloadReport, ConfigErrors> {
        let running = &mut *self.running.lock();
        self.check_file(running)?;
        let new = Config::load(self.sources.clone())?;
        let mut report = ReloadReport::default();
        for (old, new) in running.iter().zip(&new.options).filter(|(old, new)| old.differs(new)) {
            let (option, from, to) = (old.key().to_owned(), old.shown(), new.shown());
            let change = OptionChange { option, from, to };
            match is_reloadable(old.key()) {
                true => report.applied.push(change),
                false => report.needs_restart.push(change),
            }
        }
        // Options that need a restart keep their values, and the others must fit to them.
        let effective = Config::combine(running, &new.options, is_reloadable)?;
        if !report.applied.is_empty() {
            *running = effective.options.clone();
            // A node in a test has no log of its own, and the configuration has checked the level.
            if let Err(error) = telemetry::set_log_level(&effective.log_level) {
                tracing::debug!(%error, "the level of the log stays");
            }
            if let Some(node) = self.target.get().and_then(Weak::upgrade) {
                node.apply(effective);
            }
        }
        Ok(report)
    }
}
