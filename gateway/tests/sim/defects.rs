//! Each defect that is planted is found: a simulation that finds nothing has to be one that could.

use gateway::defect::{Defect, plant};

use super::{campaign::run, check::Findings, shape::Shape};

/// Within how many seeds a defect has to be found.
const SEEDS_MAX: u64 = 1000;

/// The mix of faults in which a defect does harm.
fn shape(defect: Defect) -> Shape {
    match defect {
        Defect::NoFence => Shape::lone(),
        Defect::NoTail | Defect::NumbersTaken => Shape::abrupt(),
        Defect::TailBySeq => Shape::abrupt_in_rooms(),
        Defect::FreshTrusted => Shape::reborn(),
        Defect::NoBarrier | Defect::NoBump | Defect::OrphanDropped => Shape::hard(),
        Defect::NoContiguity => Shape::small(),
        Defect::SkipRepair | Defect::DoubleInjection => Shape::calm(),
    }
}

/// The first seed with which something is wrong that is right without the defect.
fn first_seed(defect: Defect) -> Option<(u64, Findings)> {
    let findings = |seed, planted| {
        plant(planted);
        let findings = run(seed, shape(defect), false).findings;
        plant(None);
        findings
    };
    (0..SEEDS_MAX).find_map(|seed| {
        let with = findings(seed, Some(defect));
        let found = !with.violations.is_empty() && findings(seed, None).violations.is_empty();
        found.then_some((seed, with))
    })
}

#[test]
fn planted_defects_are_found() {
    let mut missed = Vec::new();
    for defect in Defect::ALL {
        match first_seed(defect) {
            Some((seed, findings)) => {
                let kinds: Vec<_> = findings.violations.keys().collect();
                let first = &findings.violations.values().next().unwrap()[0];
                println!("{defect:?}: seed {seed} of `{}`: {kinds:?}: {first}", shape(defect).name);
            }
            None => missed.push(defect),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_MAX} seeds: {missed:?}");
}
