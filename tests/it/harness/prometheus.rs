//! A Prometheus that scrapes nodes and has the rules of `deploy/prometheus/rules.yml`.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::eventually;
use crate::harness::mariadb::free_port;
use crate::harness::mariadb::scratch;
use crate::harness::node::Node;
use crate::harness::process;

const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/prometheus/rules.yml");
const START_DEADLINE: Duration = Duration::from_secs(30);
const WATCHDOG: &str = "ImPresenceWatchdog";

/// Ends with the test.
pub struct Prometheus {
    child: Child,
    directory: PathBuf,
    port: u16,
}

/// An alert that waits or fires.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alert {
    pub name: String,
    /// The labels, but for the name.
    pub labels: String,
    pub is_firing: bool,
    pub annotations: String,
}

impl Prometheus {
    /// Scrapes these nodes. Times in the rules are divided by `shorter`.
    pub async fn start(nodes: &[&Node], shorter: u64, every: Duration) -> Self {
        let (directory, port) = (scratch("prometheus"), free_port());
        fs::create_dir_all(&directory).expect("make a directory");
        let rules = fs::read_to_string(RULES).expect("the rules");
        fs::write(directory.join("rules.yml"), shortened(&rules, shorter)).expect("write the rules");
        let targets: Vec<String> = nodes.iter().map(|node| format!("'{}'", node.admin)).collect();
        let config = format!(
            "global: {{ scrape_interval: {0}ms, scrape_timeout: {0}ms, evaluation_interval: {0}ms }}\nrule_files: [rules.yml]\n\
             scrape_configs:\n  - job_name: im-presence\n    static_configs: [{{ targets: [{1}] }}]\n",
            every.as_millis(),
            targets.join(", ")
        );
        fs::write(directory.join("prometheus.yml"), config).expect("write the configuration");
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", directory.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", directory.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let log = fs::File::create(directory.join("log")).expect("a log file");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = process::spawn(command).expect("start prometheus (tests/run installs it)");
        let this = Self { child, directory, port };
        eventually("every node was scraped and rules are evaluated", START_DEADLINE, async || this.is_ready(nodes.len()).await)
            .await;
        this
    }

    async fn is_ready(&self, nodes: usize) -> bool {
        let up = self.query("count(up == 1)").await;
        let up = up.and_then(|answer| answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned));
        up == Some(nodes.to_string()) && self.alerts().await.iter().any(|alert| alert.name == WATCHDOG && alert.is_firing)
    }

    /// The alerts that wait or fire now.
    pub async fn alerts(&self) -> BTreeSet<Alert> {
        let answer = self.get("/api/v1/alerts").await;
        let alerts = answer.as_ref().and_then(|answer| answer["data"]["alerts"].as_array());
        let alert = |alert: &Value| {
            let labels = alert["labels"].as_object().expect("labels");
            let others = labels.iter().filter(|(key, _)| *key != "alertname");
            Alert {
                name: labels["alertname"].as_str().unwrap_or_default().to_owned(),
                labels: others.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", "),
                is_firing: alert["state"] == "firing",
                annotations: alert["annotations"].to_string(),
            }
        };
        alerts.into_iter().flatten().map(alert).collect()
    }

    /// Names of those that fire, without the one that always does.
    pub async fn firing(&self) -> BTreeSet<String> {
        let firing = self.alerts().await.into_iter().filter(|alert| alert.is_firing && alert.name != WATCHDOG);
        firing.map(|alert| alert.name).collect()
    }

    /// What an expression is now. None: no answer.
    pub async fn query(&self, expression: &str) -> Option<Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        self.get(&format!("/api/v1/query?query={encoded}")).await
    }

    /// HTTP 1.0, so that the answer comes in one piece.
    async fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            eprintln!("--- log of prometheus\n{log}");
        }
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}

/// The rules with shorter windows and waits: `[5m]` and `for: 5m` divided by 30 are 10 s.
fn shortened(rules: &str, by: u64) -> String {
    let shorter = |text: &str| {
        let (number, unit) = text.split_at(text.len() - 1);
        let unit = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            _ => return None,
        };
        Some(format!("{}s", (number.parse::<u64>().ok()? * unit / by).max(1)))
    };
    let mut out = String::new();
    for line in rules.lines() {
        let line = match line.trim().strip_prefix("for: ").and_then(shorter) {
            Some(time) => format!("        for: {time}"),
            None => {
                let mut pieces = line.split('[');
                let first = pieces.next().unwrap_or_default().to_owned();
                pieces.fold(first, |line, piece| {
                    let window = piece.split_once(']').and_then(|(window, rest)| Some(format!("{}]{rest}", shorter(window)?)));
                    format!("{line}[{}", window.unwrap_or_else(|| piece.to_owned()))
                })
            }
        };
        out.push_str(&line);
        out.push('\n');
    }
    out
}

#[test]
fn windows_and_waits_are_shortened_and_nothing_else() {
    let rules = "expr: delta(x[5m]) > 0 and y[15m] < 60 * 5\n        for: 1m\nsummary: \"for 5m\"\n";
    assert_eq!(shortened(rules, 30), "expr: delta(x[10s]) > 0 and y[30s] < 60 * 5\n        for: 2s\nsummary: \"for 5m\"\n");
}
