//! Checks that the simulation finds each injected fault, so that a run without findings means
//! something.

use skein_core::fault_injection::{ProtocolFault, inject};

use super::{campaign::run, check::Findings, shape::SimShape};

/// The number of seeds within which a fault must be found.
const SEEDS_MAX: u64 = 1000;

/// The cluster shape in which a fault causes a violation.
fn shape(fault: ProtocolFault) -> SimShape {
    match fault {
        ProtocolFault::NoFence => SimShape::lone(),
        ProtocolFault::UnconfirmedNotKept | ProtocolFault::SequencesReused => SimShape::abrupt(),
        ProtocolFault::ConfirmedBySequence => SimShape::abrupt_in_rooms(),
        ProtocolFault::FreshNodeTrusted => SimShape::reborn(),
        ProtocolFault::NoBarrier
        | ProtocolFault::NoEpochChange
        | ProtocolFault::LostEntriesNotReappended => SimShape::hard(),
        ProtocolFault::NoContiguityCheck => SimShape::small(),
        ProtocolFault::GapIgnored | ProtocolFault::ReadEntriesRepeated => SimShape::calm(),
    }
}

/// The first seed that fails with the fault and passes without it.
fn first_seed(fault: ProtocolFault) -> Option<(u64, Findings)> {
    let findings = |seed, injected| {
        inject(injected);
        let findings = run(seed, shape(fault), false).findings;
        inject(None);
        findings
    };
    (0..SEEDS_MAX).find_map(|seed| {
        let with = findings(seed, Some(fault));
        let found = !with.violations.is_empty() && findings(seed, None).violations.is_empty();
        found.then_some((seed, with))
    })
}

#[test]
#[ignore = "make test-full"]
fn injected_faults_are_found() {
    let mut missed = Vec::new();
    for fault in ProtocolFault::ALL {
        match first_seed(fault) {
            Some((seed, findings)) => {
                let kinds: Vec<_> = findings.violations.keys().collect();
                let first = &findings.violations.values().next().unwrap()[0];
                println!("{fault:?}: seed {seed} of `{}`: {kinds:?}: {first}", shape(fault).name);
            }
            None => missed.push(fault),
        }
    }
    assert!(missed.is_empty(), "not found within {SEEDS_MAX} seeds: {missed:?}");
}
