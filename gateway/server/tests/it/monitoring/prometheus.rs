//! A Prometheus with the shipped configuration and rules: only its targets are those of a test.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{process::Command, task::JoinSet, time::Instant};

use super::deploy;
use crate::{
    harness::{Http, Process, free_port, http_raw, poll_pause, until},
    tidy::root,
};

/// How soon an alert that pages must fire.
const PAGES_WITHIN: Duration = Duration::from_secs(30);
/// How long a test waits for an alert once its cause has lasted for a while.
const FIRES_MAX: Duration = Duration::from_secs(60);
/// How long a test waits until an alert has cleared. The longest window of a rule is 2 minutes.
const CLEARS_MAX: Duration = Duration::from_secs(240);
/// How often the state of alerts is read.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The targets of a test that do not change.
pub struct Site {
    pub blackbox: SocketAddr,
    pub url: String,
}

/// One alert, from when it fired until it cleared.
#[derive(Clone, Debug)]
pub struct Firing {
    name: String,
    labels: BTreeMap<String, String>,
    summary: String,
    runbook: String,
    since: Instant,
    until: Option<Instant>,
}

impl Firing {
    fn is_of(&self, expected: &Expected) -> bool {
        let Expected { alert, label } = expected;
        self.name == *alert && (label.is_empty() || self.labels.values().any(|l| l == label))
    }
}

/// An alert that a test causes, and the value of one of its labels; empty: any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    alert: &'static str,
    label: String,
}

pub fn alert(alert: &'static str, label: impl ToString) -> Expected {
    Expected { alert, label: label.to_string() }
}

pub struct Prometheus {
    /// Reads the state of alerts; ends before the process.
    watch: JoinSet<()>,
    _process: Process,
    address: SocketAddr,
    targets: PathBuf,
    firings: Arc<Mutex<Vec<Firing>>>,
    cured: Mutex<Vec<(Expected, Instant)>>,
    /// Events that did not happen, or too late; a trial goes on, so that one run shows all of it.
    misses: Mutex<Vec<String>>,
}

/// The shipped configuration with the targets of a test.
fn configuration(targets: &std::path::Path, own: SocketAddr, site: Option<&Site>) -> String {
    let mut text = String::new();
    let mut is_within_dns = false;
    for line in deploy("prometheus/prometheus.yml").lines() {
        if line.trim_end() == "    dns_sd_configs:" {
            is_within_dns = true;
            let targets = targets.display();
            text.push_str(&format!(
                "    file_sd_configs: [{{ files: [{targets}], refresh_interval: 1s }}]\n"
            ));
        } else if !is_within_dns || !line.starts_with("      ") {
            is_within_dns = false;
            text.push_str(line);
            text.push('\n');
        }
    }
    let mut replace = |from: &str, to: &str| {
        assert!(text.contains(from), "prometheus.yml has no {from}");
        text = text.replace(from, to);
    };
    replace("127.0.0.1:9090", &own.to_string());
    replace("\"nginx-exporter:9113\"", "");
    match site {
        Some(site) => {
            replace("https://nginx/ready", &site.url);
            replace("blackbox:9115", &site.blackbox.to_string());
        }
        None => replace("\"https://nginx/ready\"", ""),
    }
    text
}

impl Prometheus {
    pub async fn start(site: Option<&Site>) -> Self {
        let folder = TempDir::new().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let targets = folder.path().join("gateways.json");
        std::fs::write(&targets, "[]").unwrap();
        let config = folder.path().join("prometheus.yml");
        std::fs::write(&config, configuration(&targets, address, site)).unwrap();
        std::fs::write(folder.path().join("alerts.yml"), deploy("prometheus/alerts.yml")).unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .arg(format!("--web.external-url=http://{address}"))
            .arg(format!("--web.user-assets={}", root().join("docs").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("prometheus is installed by `make setup`");
        until("Prometheus listens", async || tokio::net::TcpStream::connect(address).await.is_ok())
            .await;
        let firings: Arc<Mutex<Vec<Firing>>> = Arc::default();
        let mut prometheus = Self {
            watch: JoinSet::new(),
            _process: Process::of(child, folder),
            address,
            targets,
            firings: firings.clone(),
            cured: Mutex::default(),
            misses: Mutex::default(),
        };
        until("Prometheus is ready", async || prometheus.get("/-/ready").await.status == 200).await;
        prometheus.watch.spawn(async move {
            let mut every = tokio::time::interval(POLL_INTERVAL);
            loop {
                every.tick().await;
                let alerts = get(address, "/api/v1/alerts").await.body;
                let alerts: Value = serde_json::from_str(&alerts).unwrap_or_default();
                record(&mut firings.lock(), &alerts["data"]["alerts"], Instant::now());
            }
        });
        prometheus
    }

    async fn get(&self, path: &str) -> Http {
        get(self.address, path).await
    }

    /// Sets the gateways that Prometheus scrapes, as service discovery would.
    pub fn set_targets(&self, gateways: impl IntoIterator<Item = SocketAddr>) {
        let gateways: Vec<String> = gateways.into_iter().map(|node| node.to_string()).collect();
        let new = self.targets.with_extension("new");
        std::fs::write(&new, json!([{ "targets": gateways }]).to_string()).unwrap();
        std::fs::rename(new, &self.targets).unwrap();
    }

    /// The result of an instant query.
    pub async fn query(&self, query: &str) -> Vec<Value> {
        self.result(&format!("/api/v1/query?query={}", encode(query))).await
    }

    /// The result of a query over the last `range`, with a step of 5 s.
    pub async fn query_range(&self, query: &str, range: Duration) -> Vec<Value> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let (start, end) = (now.as_secs() - range.as_secs(), now.as_secs());
        let query = encode(query);
        self.result(&format!("/api/v1/query_range?query={query}&start={start}&end={end}&step=5"))
            .await
    }

    async fn result(&self, path: &str) -> Vec<Value> {
        let body = self.get(path).await.body;
        let answer: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}"));
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// Waits until `count` gateways have been scraped often enough for rates.
    pub async fn until_scraped(&self, count: usize) {
        until("Prometheus has scraped every gateway", async || {
            let scraped = r#"count(sum_over_time(up{job="gateway"}[1m]) >= 2)"#;
            let result = self.query(scraped).await;
            result
                .first()
                .is_some_and(|value| value["value"][1].as_str() == Some(&count.to_string()))
        })
        .await;
    }

    /// The names of the alerts that fire.
    pub fn firing(&self) -> BTreeSet<String> {
        let firings = self.firings.lock();
        firings.iter().filter(|f| f.until.is_none()).map(|f| f.name.clone()).collect()
    }

    /// Waits until no alert fires.
    pub async fn until_quiet(&self) {
        let deadline = Instant::now() + CLEARS_MAX;
        while !self.firing().is_empty() {
            assert!(Instant::now() < deadline, "still firing: {:?}", self.firing());
            poll_pause().await;
        }
    }

    /// The names of the alerts that have fired so far.
    pub fn fired(&self) -> BTreeSet<String> {
        self.firings.lock().iter().map(|firing| firing.name.clone()).collect()
    }

    /// Waits until every expected alert has fired since `cause`: in time, and with a runbook that
    /// can be read.
    pub async fn fires(&self, cause: Instant, expected: &[Expected]) {
        let deadline = Instant::now() + FIRES_MAX;
        for expected in expected {
            let found = |firing: &&Firing| firing.is_of(expected) && firing.since >= cause;
            let find = || self.firings.lock().iter().find(found).cloned();
            while find().is_none() && Instant::now() < deadline {
                poll_pause().await;
            }
            let Some(firing) = find() else {
                self.miss(format!("{expected:?} did not fire"));
                continue;
            };
            let (name, after) = (expected.alert, firing.since - cause);
            println!("{name:<28} fired after {:>5.1} s: {}", after.as_secs_f64(), firing.summary);
            if firing.labels["severity"] == "page" && after > PAGES_WITHIN {
                self.miss(format!("{expected:?} fired after {after:?}"));
            }
            let page = firing.runbook.strip_prefix(&format!("http://{}", self.address)).unwrap();
            let runbook = self.get(page.split('#').next().unwrap()).await;
            let heading = format!("\n## {name}\n");
            assert!(runbook.status == 200 && runbook.body.contains(&heading), "{page}");
        }
    }

    fn miss(&self, what: String) {
        println!("MISSED: {what}");
        self.misses.lock().push(what);
    }

    /// Asserts that every alert has fired and cleared in time.
    pub fn check(&self) {
        let misses = self.misses.lock();
        assert!(misses.is_empty(), "{}", misses.join("\n"));
    }

    /// Records that the causes of these alerts have ended just now.
    pub fn cured(&self, expected: &[Expected]) {
        let now = Instant::now();
        self.cured.lock().extend(expected.iter().map(|expected| (expected.clone(), now)));
    }

    /// Waits until every alert has cleared whose cause has ended.
    pub async fn clears(&self) {
        let all = std::mem::take(&mut *self.cured.lock());
        let deadline = Instant::now() + CLEARS_MAX;
        for (expected, cured) in all {
            let last = || {
                let firings = self.firings.lock();
                // A later cause may make it fire once more.
                let is_it = |firing: &&Firing| firing.is_of(&expected) && firing.since <= cured;
                let of = firings.iter().filter(is_it);
                of.map(|firing| firing.until).collect::<Option<Vec<_>>>()
            };
            while last().is_none() && Instant::now() < deadline {
                poll_pause().await;
            }
            // One that did not fire is a miss already.
            match last().map(|all| all.into_iter().max()) {
                Some(Some(until)) => {
                    let after = until.saturating_duration_since(cured).as_secs_f64();
                    println!("{:<28} cleared after {after:>5.1} s", expected.alert);
                }
                Some(None) => {}
                None => self.miss(format!("{expected:?} did not clear")),
            }
        }
    }
}

/// GET in HTTP/1.0, so that the body is not chunked.
async fn get(address: SocketAddr, path: &str) -> Http {
    http_raw(address, &format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n")).await
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

/// Adds the alerts that have begun to fire, and ends those that do not fire any more.
fn record(firings: &mut Vec<Firing>, alerts: &Value, now: Instant) {
    let Some(alerts) = alerts.as_array() else { return };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let is_firing = |alert: &&Value| alert["state"] == "firing";
    let mut open: Vec<(String, BTreeMap<String, String>)> = vec![];
    for alert in alerts.iter().filter(is_firing) {
        let labels = alert["labels"].as_object().unwrap();
        let labels: BTreeMap<_, _> = labels.iter().map(|(k, v)| (k.clone(), text(v))).collect();
        let name = labels["alertname"].clone();
        let is_known = |firing: &Firing| {
            firing.until.is_none() && firing.name == name && firing.labels == labels
        };
        if !firings.iter().any(is_known) {
            let notes = &alert["annotations"];
            firings.push(Firing {
                name: name.clone(),
                labels: labels.clone(),
                summary: text(&notes["summary"]),
                runbook: text(&notes["runbook_url"]),
                since: now,
                until: None,
            });
        }
        open.push((name, labels));
    }
    for firing in firings.iter_mut().filter(|firing| firing.until.is_none()) {
        if !open.iter().any(|(name, labels)| *name == firing.name && *labels == firing.labels) {
            firing.until = Some(now);
        }
    }
}
