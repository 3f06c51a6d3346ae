//! The documents say what the code does: options, metrics, codes.

use gateway::{config::Config, telemetry::metrics::Metrics};
use shared::{close::CloseCode, error::ErrorCode};

fn document(name: &str) -> String {
    let path = format!("{}/../docs/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_options_are_those_of_the_code() {
    assert!(
        document("configuration.md").contains(&Config::describe()),
        "docs/configuration.md has another table than `gateway --options` prints"
    );
}

#[test]
fn the_metrics_are_those_of_the_code() {
    let mut table = String::from("| metric | kind | what |\n| --- | --- | --- |\n");
    for (name, kind, help) in Metrics::new().describe() {
        table.push_str(&format!("| `{name}` | {kind} | {help} |\n"));
    }
    assert!(document("metrics.md").contains(&table), "docs/metrics.md should have\n{table}");
}

#[test]
fn every_code_is_documented() {
    let protocol = document("protocol.md");
    for code in ErrorCode::ALL {
        assert!(protocol.contains(&format!("`{}`", code.as_str())), "{}", code.as_str());
    }
    for code in CloseCode::ALL {
        assert!(protocol.contains(&code.number().to_string()), "{}", code.number());
    }
}
