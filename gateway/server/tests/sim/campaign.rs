//! Campaigns of many seeds, several at a time; and single runs.

use std::{
    collections::BTreeMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    check::{Findings, check},
    shape::SimShape,
    trace::Trace,
    world::Simulation,
};

/// The result of one run.
pub struct SimRun {
    pub findings: Findings,
    pub hash: u64,
    pub last: String,
}

thread_local! {
    static PANICS: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Records panics, which a runtime would catch, instead of printing them.
fn note_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            if std::thread::current().name() != Some("simulation") {
                before(info);
            }
        }));
    });
}

/// Runs one seed.
pub fn run(seed: u64, shape: SimShape, loud: bool) -> SimRun {
    note_panics();
    PANICS.take();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    let mut world = runtime.block_on(async move {
        let trace = Trace::new(loud);
        Simulation::new(seed, shape, trace).run().await
    });
    drop(runtime);
    let mut findings = check(&world);
    for node in world.hosts.iter_mut().filter_map(|host| host.node.take()) {
        node.gate.end();
    }
    let panics = PANICS.take();
    if !panics.is_empty() {
        findings.violations.insert("PANIC", panics);
    }
    SimRun { findings, hash: world.trace.hash(), last: world.trace.last(120) }
}

/// The summary of many runs.
#[derive(Default)]
pub struct CampaignSummary {
    pub runs: u64,
    counts: BTreeMap<&'static str, (u64, usize)>,
    /// The seeds of each kind of violation, and the findings of the first one.
    pub violations: BTreeMap<&'static str, (Vec<u64>, String)>,
}

impl CampaignSummary {
    fn add(&mut self, seed: u64, run: SimRun) {
        self.runs += 1;
        for (kind, count) in run.findings.counts {
            if count > 0 {
                let sum = self.counts.entry(kind).or_default();
                *sum = (sum.0 + 1, sum.1 + count);
            }
        }
        for (kind, found) in run.findings.violations {
            let (seeds, first) = self.violations.entry(kind).or_default();
            if seeds.first().is_none_or(|least| seed < *least) {
                *first = found.into_iter().take(3).collect::<Vec<_>>().join("\n    ");
            }
            seeds.push(seed);
            seeds.sort_unstable();
        }
    }
}

impl std::fmt::Display for CampaignSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} simulations", self.runs)?;
        for (kind, (runs, count)) in &self.counts {
            writeln!(f, "  {kind}: {count} in {runs} runs")?;
        }
        for (kind, (seeds, first)) in &self.violations {
            let some: Vec<_> = seeds.iter().take(12).collect();
            writeln!(f, "  {kind}: {} runs, seeds {some:?}\n    {first}", seeds.len())?;
        }
        Ok(())
    }
}

/// Runs `seeds` in parallel, one per processor.
pub fn campaign(
    seeds: std::ops::Range<u64>,
    shape_of: impl Fn(u64) -> SimShape + Send + Sync + 'static,
) -> CampaignSummary {
    let next = Arc::new(AtomicU64::new(seeds.start));
    let sum = Arc::new(Mutex::new(CampaignSummary::default()));
    let shape_of = Arc::new(shape_of);
    let work = || {
        let (next, sum, shape_of) = (next.clone(), sum.clone(), shape_of.clone());
        let end = seeds.end;
        move || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= end {
                    return;
                }
                let run =
                    std::panic::catch_unwind(AssertUnwindSafe(|| run(seed, shape_of(seed), false)));
                let run = run.unwrap_or_else(|_| {
                    let mut findings = Findings::default();
                    findings.violations.insert("PANIC", PANICS.take());
                    SimRun { findings, hash: 0, last: String::new() }
                });
                sum.lock().add(seed, run);
            }
        }
    };
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let spawn = |_| {
        let builder = std::thread::Builder::new().name("simulation".to_owned());
        builder.spawn(work()).expect("a thread can be had")
    };
    let threads: Vec<_> = (0..count).map(spawn).collect();
    threads.into_iter().for_each(|thread| thread.join().expect("its panics are caught"));
    std::mem::take(&mut *sum.lock())
}
