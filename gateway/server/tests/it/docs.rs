//! Checks the documentation against the code: options, metrics, codes.

use gateway::config::Config;
use skein_core::telemetry::metrics::Metrics;
use skein_protocol::{close::CloseCode, error::ErrorCode};

use crate::tidy::{root, sources};

fn document(name: &str) -> String {
    let path = root().join("docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn documented_options_match_the_code() {
    assert!(
        document("configuration.md").contains(&Config::describe()),
        "docs/configuration.md has another table than `gateway options` prints"
    );
}

#[test]
fn documented_metrics_match_the_code() {
    let (text, table) = (document("metrics.md"), Metrics::table());
    if text.contains(&table) {
        return;
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let (before, rest) = text.split_once("| metric |").expect("the page has a table");
        let after = rest.split_once("\n\n").map_or("", |(_, after)| after);
        let after = if after.is_empty() { String::new() } else { format!("\n{after}") };
        std::fs::write(root().join("docs/metrics.md"), format!("{before}{table}{after}")).unwrap();
        return;
    }
    panic!("docs/metrics.md is out of date: run this test with UPDATE_DOCS=1, which rewrites it");
}

/// The text of every Rust file below `folders`.
fn texts(folders: &[&str]) -> String {
    folders.iter().flat_map(|folder| sources(folder)).map(|(_, text)| text).collect()
}

#[test]
fn the_durable_state_ledger_names_existing_code() {
    let (limits, options) = (document("limits.md"), Config::describe());
    let metrics = Metrics::describe();
    let sources = texts(&["gateway"]);
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
        assert!(metrics.iter().any(|(name, ..)| *name == metric), "no metric {metric}: {row}");
        let test = cells[7].trim_matches('`');
        assert!(sources.contains(&format!("fn {test}(")), "no test {test}: {row}");
    }
    assert!(rows > 20, "{rows} rows");
    // And the reverse: every option that bounds durable state is in the ledger.
    for line in options.lines().filter(|line| line.contains("durable") || line.contains("unseen")) {
        let option = line.split('`').nth(1).unwrap();
        assert!(limits.contains(&format!("`{option}`")), "{option} is not in docs/limits.md");
    }
}

#[test]
fn every_error_and_close_code_is_documented() {
    let protocol = document("protocol.md");
    for code in ErrorCode::ALL {
        assert!(protocol.contains(&format!("`{}`", code.as_str())), "{}", code.as_str());
    }
    for code in CloseCode::ALL {
        assert!(protocol.contains(&code.number().to_string()), "{}", code.number());
    }
}

/// Every Markdown page of the documentation, with its text.
fn pages() -> Vec<(std::path::PathBuf, String)> {
    let root = root();
    let folders = [root.to_owned(), root.join("docs"), root.join("docs/adr")];
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let files = files.map(|entry| entry.unwrap().path());
    let pages = files.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_resolves_to_a_file_and_a_heading() {
    for (path, text) in pages() {
        for (at, _) in text.match_indices("](") {
            let link = text[at + 2..].split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            assert!(target.exists(), "{}: no file for {link}", path.display());
            if !heading.is_empty() {
                let text = std::fs::read_to_string(&target).unwrap();
                let mut headings = text.lines().filter(|line| line.starts_with('#'));
                let found = headings.any(|line| anchor(line.trim_start_matches('#')) == heading);
                assert!(found, "{}: no heading for {link}", path.display());
            }
        }
    }
}

#[test]
fn every_test_named_in_faults_and_adrs_exists() {
    let sources = texts(&["gateway", "shared", "loadtest"]);
    let names_tests = |path: &std::path::Path| {
        path.ends_with("docs/faults.md") || path.parent().unwrap().ends_with("docs/adr")
    };
    for (path, text) in pages().into_iter().filter(|(path, _)| names_tests(path)) {
        // Between backticks: every second piece. A name may end with an ellipsis.
        for name in text.split('`').skip(1).step_by(2) {
            let name = name.rsplit("::").next().unwrap();
            let (start, end) = match name.strip_suffix('…') {
                Some(start) => (start, ""),
                None => (name, "("),
            };
            let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            if start.chars().all(is_name) && start.matches('_').count() >= 4 {
                let found = sources.contains(&format!("fn {start}{end}"));
                assert!(found, "{}: no test {name}", path.display());
            }
        }
    }
}
