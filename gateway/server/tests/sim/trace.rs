//! The trace of a run: a hash of all its lines, and the last of them in words.
//!
//! Random parts of a gateway (epochs, times of day) have other names here, so that one seed always
//! leaves the same trace.

use std::{
    collections::{HashMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
};

use serde_json::Value;

use super::{client::id_of, observer::name};

/// The most lines kept.
const LINES_MAX: usize = 400;

#[derive(Default)]
pub struct Trace {
    /// Whether every line is printed.
    verbose: bool,
    lines: VecDeque<String>,
    hasher: DefaultHasher,
    epochs: HashMap<String, usize>,
}

impl Trace {
    pub fn new(loud: bool) -> Self {
        Self { verbose: loud, ..Self::default() }
    }

    pub fn record(&mut self, time: f64, text: &str) {
        let line = format!("{time:10.3} {text}");
        line.hash(&mut self.hasher);
        if self.verbose {
            println!("{line}");
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Records a frame that arrives at a client.
    pub fn frame(&mut self, time: f64, client: usize, frame: &Value) {
        let kind = frame["type"].as_str().unwrap_or_default();
        let mut line = format!("  c{client} {:3} {kind}", frame["room"].as_str().unwrap_or("-"));
        if let Some(epoch) = frame["epoch"].as_str() {
            line += &format!(" {}:{}", self.epoch(epoch), frame["seq"]);
        }
        if frame["id"].is_string() {
            line += &format!(" {}", name(id_of(frame)));
        }
        for field in ["recovered", "duplicate", "replay", "reason", "code", "bus"] {
            if !frame[field].is_null() {
                line += &format!(" {field}={}", frame[field]);
            }
        }
        if let Some(history) = frame["history"].as_array() {
            let ends = [history.first(), history.last()].map(|entry| {
                let entry = entry?;
                Some(format!("{}:{}", self.epoch(entry["epoch"].as_str()?), entry["seq"]))
            });
            line += &format!(" history={} {ends:?}", history.len());
        }
        self.record(time, &line);
    }

    fn epoch(&mut self, epoch: &str) -> String {
        let count = self.epochs.len();
        let place = *self.epochs.entry(epoch.to_owned()).or_insert(count);
        let ordinal = epoch.split('-').next().unwrap_or_default();
        format!("{ordinal}-{place}")
    }

    pub fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    pub fn last(&self, count: usize) -> String {
        let skip = self.lines.len().saturating_sub(count);
        self.lines.iter().skip(skip).cloned().collect::<Vec<_>>().join("\n")
    }
}
