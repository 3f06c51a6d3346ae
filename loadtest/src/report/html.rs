//! A report as a self-contained HTML page: tables and plots.
//!
//! Pure.

use std::fmt::Write as _;

use super::{
    Report, attacks,
    plot::{Plot, PlotError},
    servers::GaugeSeries,
};

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}\
h1{font-size:1.5rem;margin-bottom:.25rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}\
code{background:#f3f3f3;padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}\
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #e6e6e6;vertical-align:top}\
td{font-variant-numeric:tabular-nums}svg{width:100%;height:auto}\
.verdict{display:inline-block;padding:.2rem .7rem;border-radius:4px;color:#fff;font-weight:600}\
.good{background:#00754f}.bad{background:#b3261e}.invalid{background:#8a5a00}\
p.note{color:#555;margin:.2rem 0}li{margin:.2rem 0}";

/// Renders the page.
pub(crate) fn page(report: &Report) -> Result<String, PlotError> {
    let mut page = String::new();
    let scenario = escaped(&report.scenario);
    let (class, verdict) = match (report.passed, &report.invalid) {
        (true, _) => ("good", "passed"),
        (false, Some(_)) if report.failures.is_empty() => ("invalid", "invalid"),
        (false, _) => ("bad", "failed"),
    };
    let mut put = |text: std::fmt::Arguments<'_>| {
        page.write_fmt(text).expect("writing to a String succeeds");
        page.push('\n');
    };
    put(format_args!("<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">"));
    put(format_args!("<meta name=\"viewport\" content=\"width=device-width\">"));
    put(format_args!("<title>loadtest {scenario}</title>\n<style>{STYLE}</style>"));
    put(format_args!(
        "<h1>loadtest {scenario} <span class=\"verdict {class}\">{verdict}</span></h1>"
    ));
    let began = humantime::format_rfc3339_seconds(
        std::time::UNIX_EPOCH + std::time::Duration::from_secs(report.began_unix_s),
    );
    let (version, command) = (report.version, escaped(&report.command));
    put(format_args!("<p class=\"note\">{began}, version {version}</p>"));
    put(format_args!("<p><code>loadtest {command}</code></p>"));
    let wrong: Vec<&String> = report.invalid.iter().chain(&report.failures).collect();
    if !wrong.is_empty() {
        put(format_args!("<h2>Failures</h2>\n<ul>"));
        let examples = report.messages.iter().flat_map(|messages| &messages.examples);
        for line in wrong.into_iter().chain(examples) {
            put(format_args!("<li>{}</li>", escaped(line)));
        }
        put(format_args!("</ul>"));
    }
    if !report.attacks.is_empty() {
        put(format_args!("<h2>Attacks</h2>\n<table><tr>"));
        attacks::HEADINGS.iter().for_each(|heading| put(format_args!("<th>{heading}")));
        put(format_args!("</tr>"));
        for row in &report.attacks {
            put(format_args!("<tr>"));
            row.cells().iter().for_each(|cell| put(format_args!("<td>{}", escaped(cell))));
            put(format_args!("</tr>"));
        }
        put(format_args!("</table>"));
    }
    put(format_args!("<h2>Result</h2>\n<table>"));
    for (name, value) in report.lines() {
        put(format_args!("<tr><th>{}<td>{}</tr>", escaped(&name), escaped(&value)));
    }
    put(format_args!("</table>"));
    for (title, plot) in plots(report) {
        if plot.lines.iter().any(|(_, points)| points.len() > 1) {
            put(format_args!("<h2>{}</h2>\n{}", escaped(&title), plot.svg()?));
        }
    }
    if !report.faults.is_empty() {
        put(format_args!("<h2>Faults</h2>\n<table><tr><th>what<th>from<th>until</tr>"));
        for fault in &report.faults {
            let (from, until) = (fault.from.as_secs_f64(), fault.until.as_secs_f64());
            let name = escaped(&fault.fault);
            put(format_args!("<tr><td>{name}<td>{from:.2} s<td>{until:.2} s</tr>"));
        }
        put(format_args!("</table>\n<p class=\"note\">Shaded in the plots.</p>"));
    }
    Ok(page)
}

fn plots(report: &Report) -> Vec<(String, Plot<'_>)> {
    // Deliveries after the end of the traffic belong to no whole second.
    let traffic_s = report.messages.as_ref().map_or(0.0, |messages| messages.traffic_s);
    let whole = if traffic_s >= 2.0 { traffic_s as usize } else { usize::MAX };
    let seconds = || report.seconds.iter().enumerate().take(whole);
    let over_time = |y, lines, logarithmic| {
        let marks = report.faults.as_slice();
        Plot { x: "seconds", y, lines, marks, logarithmic }
    };
    let mut plots = Vec::new();
    if let Some(messages) = &report.messages {
        let times = |percent: f64| {
            let with = seconds().filter(|(_, second)| !second.latency_us.is_empty());
            let value = |second: &super::Second| second.latencies().value_at_percentile(percent);
            with.map(|(at, second)| (at as f64, value(second) as f64 / 1e3)).collect()
        };
        let lines = vec![("p50", times(50.0)), ("p99", times(99.0)), ("max", times(100.0))];
        plots.push(("Latency over time".to_owned(), over_time("ms", lines, true)));
        let curve = &messages.latency.curve;
        // Each unit on the x axis is ten times fewer deliveries.
        let nines = |percent: f64| -(1.0 - percent / 100.0).log10();
        let points = curve.iter().filter(|(percent, _)| *percent < 100.0);
        let points = points.map(|(percent, us)| (nines(*percent), *us as f64 / 1e3)).collect();
        let percentiles = Plot {
            x: "1: 90 %, 2: 99 %, 3: 99.9 %, 4: 99.99 %",
            y: "ms",
            lines: vec![("latency", points)],
            marks: &[],
            logarithmic: true,
        };
        plots.push(("Latency by percentile".to_owned(), percentiles));
        let deliveries = seconds().map(|(at, second)| (at as f64, second.deliveries as f64));
        let lines = vec![("deliveries", deliveries.collect())];
        plots.push(("Deliveries per second".to_owned(), over_time("per second", lines, false)));
        let acks = seconds().map(|(at, second)| (at as f64, second.acks as f64)).collect();
        let rejections =
            seconds().map(|(at, second)| (at as f64, second.rejections as f64)).collect();
        let lines = vec![("acknowledged", acks), ("rejected", rejections)];
        plots.push(("Messages per second".to_owned(), over_time("per second", lines, false)));
    }
    let open = seconds().map(|(at, second)| (at as f64, second.open as f64)).collect();
    let connects = seconds().map(|(at, second)| (at as f64, second.connects as f64)).collect();
    let lines = vec![("open", open), ("opened per second", connects)];
    plots.push(("Connections".to_owned(), over_time("connections", lines, false)));
    for server in &report.servers {
        let cpu = server.samples.iter().map(|sample| (sample.at_s, sample.cpu_percent));
        let lines = vec![("CPU", cpu.collect())];
        let title = format!("CPU of {}", server.pid);
        plots.push((title, over_time("% of a core", lines, false)));
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let memory = server.samples.iter().map(|sample| (sample.at_s, mib(sample.resident_bytes)));
        let lines = vec![("resident", memory.collect())];
        plots.push((format!("Memory of {}", server.pid), over_time("MiB", lines, false)));
    }
    for GaugeSeries { url, series } in &report.gauges {
        for (name, points) in series {
            let changes = points.windows(2).any(|two| two[0].1 != two[1].1);
            if changes {
                let lines = vec![(name.as_str(), points.clone())];
                plots.push((format!("{name} of {url}"), over_time("", lines, false)));
            }
        }
    }
    plots
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::{FaultWindow, MessageReport, Second},
        *,
    };

    fn report() -> Report {
        let second =
            |us| Second { deliveries: 5, open: 3, latency_us: vec![(us, 5)], ..Second::default() };
        let ms = Duration::from_millis;
        let mut report = Report {
            command: "ledger --url <b>".to_owned(),
            seconds: vec![second(1_000), second(90_000), Second::default()],
            messages: Some(MessageReport {
                lost: 1,
                examples: vec!["a & b".to_owned()],
                ..MessageReport::default()
            }),
            faults: vec![FaultWindow {
                fault: "bus_cut 1".to_owned(),
                from: ms(500),
                until: ms(900),
            }],
            ..Report::of("ledger")
        };
        report.failures = vec!["1 lost".to_owned()];
        report
    }

    #[test]
    fn page_is_self_contained() {
        let page = page(&report()).unwrap();
        for outside in ["http://", "https://", "src=", "href=", "<script", "url("] {
            let found = page
                .match_indices(outside)
                .filter(|(at, _)| !page[*at..].starts_with("http://www.w3.org/2000/svg"));
            assert_eq!(found.count(), 0, "{outside}");
        }
        assert!(page.contains("&lt;b&gt;") && page.contains("a &amp; b"));
        assert!(page.contains("class=\"verdict bad\">failed"));
        assert_eq!(page.matches("<svg").count(), 4, "plots with one point are omitted");
    }

    #[test]
    fn empty_report_is_a_page() {
        assert!(page(&Report::of("connect")).unwrap().contains("loadtest connect"));
    }
}
