//! The views of operators: alerts, runbook and dashboards. They name metrics that exist, alerts fire
//! on a live cluster, and every query of a panel returns data.

use std::{collections::BTreeSet, process::Command};

use serde_json::Value;

use crate::tidy::root;

mod prometheus;
mod clients;
mod alerts;
mod causes;

/// A file below `deploy/`.
fn deploy(file: &str) -> String {
    let path = root().join("deploy").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn runbook() -> String {
    std::fs::read_to_string(root().join("docs/runbook.md")).unwrap()
}

/// The names of all alerts.
fn alert_names() -> BTreeSet<String> {
    let rules = deploy("prometheus/alerts.yml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

fn dashboard() -> Value {
    serde_json::from_str(&deploy("grafana/dashboards/gateway.json")).unwrap()
}

/// Every panel; no row of the dashboard is collapsed, so that none has panels of its own.
fn panels(dashboard: &Value) -> &[Value] {
    dashboard["panels"].as_array().unwrap()
}

/// Every query of a panel, with the title of the panel.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let of = |panel: &Value| {
        let title = panel["title"].as_str().unwrap_or_default().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        let expr =
            move |target: Value| (title.clone(), target["expr"].as_str().unwrap().to_owned());
        targets.into_iter().map(expr).collect::<Vec<_>>()
    };
    panels(dashboard).iter().flat_map(of).collect()
}

/// The metrics of the gateway that a text names, without the suffixes of histograms.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c| !is_of_name(c)).filter(|word| word.starts_with("gateway_"));
    let base = |word: &str| {
        let suffixes = ["_bucket", "_count", "_sum"];
        suffixes.iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word).to_owned()
    };
    words.map(base).collect()
}

/// Name and kind of every metric; `docs` compares the page with the code.
fn known_metrics() -> Vec<(String, String)> {
    let page = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `gateway_")?.split('|').map(str::trim);
        Some((format!("gateway_{}", cells.next()?.trim_end_matches('`')), cells.next()?.to_owned()))
    };
    let rows: Vec<_> = page.lines().filter_map(row).collect();
    assert!(rows.len() > 40, "{rows:?}");
    rows
}

/// Runs promtool in the folder of the rules.
fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(root().join("deploy/prometheus"))
        .output()
        .expect("promtool is installed by `make setup`");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
}

#[test]
fn configuration_and_rules_pass_promtool() {
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["check", "rules", "alerts.yml"]);
    promtool(&["test", "rules", "alerts_test.yml"]);
}

#[test]
fn every_alert_is_tested_both_ways_by_promtool() {
    let tests = deploy("prometheus/alerts_test.yml");
    for alert in alert_names() {
        let named = tests.lines().filter(|line| line.contains("alertname:"));
        let of = |line: &&str| {
            line.split("alertname:").nth(1).unwrap().trim().trim_end_matches([' ', '}']) == alert
        };
        // Once it stays quiet and once it fires, at least.
        assert!(named.filter(of).count() >= 2, "{alert}");
    }
}

#[test]
fn every_alert_has_severity_summary_and_a_runbook_entry() {
    let rules = deploy("prometheus/alerts.yml");
    let runbook = runbook();
    for rule in rules.split("- alert: ").skip(1) {
        let name = rule.lines().next().unwrap();
        assert!(rule.contains("severity: page") || rule.contains("severity: warn"), "{name}");
        assert!(rule.contains("summary: "), "{name}");
        let link = format!(
            "runbook_url: \"{{{{ $externalURL }}}}/user/runbook.md#:~:text=%23%23%20{name}\""
        );
        assert!(rule.contains(&link), "{name} has no {link}");
        let entry = runbook.split(&format!("\n## {name}\n")).nth(1);
        let entry = entry.unwrap_or_else(|| panic!("the runbook has no entry {name}"));
        let entry = entry.split("\n## ").next().unwrap();
        for part in ["**Meaning**", "**Look at**", "**Do**"] {
            assert!(entry.contains(part), "the entry {name} has no {part}");
        }
    }
    // And the reverse.
    let alerts = alert_names();
    for heading in runbook.lines().filter_map(|line| line.strip_prefix("## ")) {
        assert!(alerts.contains(heading), "the runbook has {heading}, which is no alert");
    }
}

#[test]
fn rules_dashboards_and_runbook_name_existing_metrics() {
    let known: BTreeSet<String> = known_metrics().into_iter().map(|(name, _)| name).collect();
    let texts = [
        ("alerts.yml", deploy("prometheus/alerts.yml")),
        ("alerts_test.yml", deploy("prometheus/alerts_test.yml")),
        ("gateway.json", deploy("grafana/dashboards/gateway.json")),
        ("runbook.md", runbook()),
        ("operations.md", std::fs::read_to_string(root().join("docs/operations.md")).unwrap()),
    ];
    for (file, text) in texts {
        for name in metrics_in(&text) {
            assert!(known.contains(&name), "{file} names {name}, which is no metric");
        }
    }
}

#[test]
fn the_dashboard_is_what_its_script_prints() {
    let script = root().join("deploy/grafana/dashboard.py");
    let output = Command::new("python3").arg(script).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let is_same = printed == deploy("grafana/dashboards/gateway.json");
    assert!(is_same, "deploy/grafana/dashboard.py > deploy/grafana/dashboards/gateway.json");
}

/// The names in italics that a page calls panels: *Redis memory* in "Panel *Redis memory*".
fn panels_named_in(page: &str) -> Vec<String> {
    let text = page.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut names = vec![];
    for (at, word) in text.match_indices("anel") {
        let rest = &text[at + word.len()..];
        let end = [". ", ";", ":", "(", "|"].iter().filter_map(|end| rest.find(end)).min();
        let rest = &rest[..end.unwrap_or(rest.len())];
        names.extend(rest.split('*').skip(1).step_by(2).map(str::to_owned));
    }
    names
}

#[test]
fn every_panel_that_a_page_names_exists() {
    let dashboard = dashboard();
    let titles: BTreeSet<&str> =
        panels(&dashboard).iter().map(|panel| panel["title"].as_str().unwrap()).collect();
    let mut count = 0;
    for page in ["runbook.md", "operations.md"] {
        let text = std::fs::read_to_string(root().join("docs").join(page)).unwrap();
        for name in panels_named_in(&text) {
            assert!(titles.contains(name.as_str()), "{page} names the panel {name}");
            count += 1;
        }
    }
    assert!(count > 20, "{count}");
}

#[test]
fn every_metric_is_on_a_panel() {
    let dashboard = dashboard();
    let shown: String = queries(&dashboard).into_iter().map(|(_, expr)| expr + "\n").collect();
    let shown = metrics_in(&shown);
    for (name, _) in known_metrics() {
        assert!(shown.contains(&name), "{name} is on no panel");
    }
}

#[test]
fn panels_are_well_formed_and_link_to_the_runbook() {
    let dashboard = dashboard();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<&str> = variables.iter().map(|v| v["name"].as_str().unwrap()).collect();
    for name in ["datasource", "job", "cluster", "instance", "runbook"] {
        assert!(names.contains(&name), "no variable {name}");
    }
    let alerts = alert_names();
    let (mut ids, mut linked) = (BTreeSet::new(), BTreeSet::new());
    let (mut bottom, mut row) = (0, vec![0; 24]);
    for panel in panels(&dashboard) {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is used twice");
        // The grid has 24 columns, and no panel covers another.
        let at = |key: &str| usize::try_from(panel["gridPos"][key].as_u64().unwrap()).unwrap();
        let (x, y, w, h) = (at("x"), at("y"), at("w"), at("h"));
        assert!(x + w <= 24 && w > 0 && h > 0, "{title}");
        for end in &mut row[x..x + w] {
            assert!(*end <= y, "{title} covers another panel");
            *end = y + h;
        }
        bottom = bottom.max(y + h);
        if panel["type"] == "row" {
            continue;
        }
        assert!(!panel["description"].as_str().unwrap_or_default().is_empty(), "{title}");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title}");
        let mut references = BTreeSet::new();
        for target in panel["targets"].as_array().unwrap() {
            assert!(references.insert(target["refId"].as_str().unwrap()), "{title}");
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            let expr = target["expr"].as_str().unwrap();
            let is_of_cluster = expr.contains("cluster=~\"$cluster\"");
            assert!(is_of_cluster || expr.starts_with("ALERTS"), "{title}: {expr}");
        }
        for link in panel["links"].as_array().into_iter().flatten() {
            let url = link["url"].as_str().unwrap();
            let alert = url.strip_prefix("${runbook}#:~:text=%23%23%20").unwrap();
            assert!(alerts.contains(alert), "{title} links to {alert}");
            linked.insert(alert.to_owned());
        }
    }
    assert!(bottom > 0);
    assert_eq!(linked, alerts, "alerts that no panel links to");
}
