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

/// Source files of the gateway and its tests.
fn sources(folder: &std::path::Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text.push_str(&sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&std::fs::read_to_string(path).unwrap());
        }
    }
    text
}

#[test]
fn the_ledger_of_durable_state_names_what_is_there() {
    let (limits, options) = (document("limits.md"), Config::describe());
    let metrics = Metrics::new().describe();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources(&root.join("src")) + &sources(&root.join("tests/it"));
    let mut rows = 0;
    for row in limits.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| what")) {
        if row.starts_with("| ---") {
            continue;
        }
        rows += 1;
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), 8, "{row}");
        assert!(cells.iter().all(|cell| !cell.is_empty()), "{row}");
        let code = row.split('`').skip(1).step_by(2);
        for name in code.filter(|name| name.contains('.') && !name.contains(['/', ' '])) {
            assert!(options.contains(&format!("| `{name}` |")), "no option {name}: {row}");
        }
        let metric = cells[6].trim_matches('`');
        assert!(metrics.iter().any(|(name, ..)| name == metric), "no metric {metric}: {row}");
        let test = cells[7].trim_matches('`');
        assert!(sources.contains(&format!("fn {test}(")), "no test {test}: {row}");
    }
    assert!(rows > 20, "{rows} rows");
    // And the other way round: what the code says is a bound of durable state is in the ledger.
    for line in options.lines().filter(|line| line.contains("durable") || line.contains("unseen")) {
        let option = line.split('`').nth(1).unwrap();
        assert!(limits.contains(&format!("`{option}`")), "{option} is not in docs/limits.md");
    }
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
