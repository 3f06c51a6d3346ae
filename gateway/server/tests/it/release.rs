//! The optimised build, which `make test-full` names by `SKEIN_GATEWAY`.

use std::{fs, path::Path};

use crate::harness::gateway_binary;

#[test]
#[ignore = "make test-full"]
fn a_release_build_has_no_injected_faults() {
    let variable = b"SKEIN_INJECT";
    let has_it = |program: &Path| {
        let program = fs::read(program).unwrap();
        program.windows(variable.len()).any(|bytes| bytes == variable)
    };
    let (debug, release) = (Path::new(env!("CARGO_BIN_EXE_gateway")), gateway_binary());
    assert!(debug != release, "SKEIN_GATEWAY names no release build");
    assert!(has_it(debug) && !has_it(&release), "{}", release.display());
}
