//! What operators see of the whole, on the node's admin port: what is wrong, what happens, who did what.

use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;
use clap::Subcommand;
use percent_encoding::NON_ALPHANUMERIC;
use percent_encoding::utf8_percent_encode;
use serde_json::Value;
use tokio::time::sleep;

use super::DONE;
use super::FAILED;
use super::Outcome;
use super::configuration::Configuration;
use super::moment;
use super::operators::Admin;
use super::print::harmless;
use super::print::or_dash;
use super::print::table;
use super::rest::Lines;
use super::rest::Rest;

/// Before a node that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Whoever mistypes a name should not take it for a quiet night.
const NOTHING_FITS: &str = "nothing of that is written down; --who and --action want the whole name, as in DrainGateway";
/// Rows of one answer.
const MAX_PAGE: u32 = 1_000;

#[derive(Subcommand)]
pub enum Views {
    /// Look at everything that a node relies on, and say what to do about what is wrong; exits with 1 if something is
    #[command(after_help = "Example:\n  im-presence ctl doctor --admin node-1:6001")]
    Doctor(Doctor),
    /// Print what has happened lately: deaths, holds, drains, nodes, what is degraded, the audit
    #[command(after_help = "Examples:\n  im-presence ctl events\n  im-presence ctl events --follow --kinds death,hold")]
    Events(Events),
    /// Print who did what as an operator, and who was denied what, the newest first
    #[command(after_help = "Example:\n  im-presence ctl audit --action DrainGateway --from 2026-11-01")]
    Audit(Audit),
    Config(Configuration),
}

#[derive(Args)]
pub struct Doctor {
    #[command(flatten)]
    admin: Admin,
}

#[derive(Args)]
pub struct Events {
    /// Go on with what happens, until Ctrl-C
    #[arg(long)]
    follow: bool,
    /// Only these, separated by commas: death, hold, drain, degraded, node, audit
    #[arg(long, value_name = "KINDS")]
    kinds: Option<String>,
    /// How many past ones, at most 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=1_000))]
    last: u32,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Args)]
pub struct Audit {
    /// Only of this caller
    #[arg(long, value_name = "NAME")]
    who: Option<String>,
    /// Only this, as in DrainGateway
    #[arg(long, value_name = "NAME")]
    action: Option<String>,
    /// Only from this time on
    #[arg(long, value_name = "TIME", value_parser = moment::parse)]
    from: Option<i64>,
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PAGE)))]
    limit: u32,
    #[command(flatten)]
    admin: Admin,
}

impl Views {
    pub(super) fn addr(&self) -> &str {
        match self {
            Self::Doctor(of) => &of.admin.addr,
            Self::Events(of) => &of.admin.addr,
            Self::Audit(of) => &of.admin.addr,
            Self::Config(of) => &of.admin.addr,
        }
    }

    pub(super) async fn call(&self, rest: &Rest<'_>, json: bool) -> Result<Outcome, Outcome> {
        match self {
            Self::Doctor(_) => Ok(diagnosis(&rest.get("/api/v1/doctor").await?, json)),
            Self::Events(events) => {
                let stop = async { drop(tokio::signal::ctrl_c().await) };
                events.print(rest, json, &mut io::stdout().lock(), stop).await
            }
            Self::Audit(audit) => audit.print(rest, json).await,
            Self::Config(configuration) => configuration.print(rest, json).await,
        }
    }
}

/// Text of a field; empty if it is not there.
pub(super) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

pub(super) fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value["items"].as_array().into_iter().flatten()
}

fn diagnosis(answer: &Value, json: bool) -> Outcome {
    let failed = items(answer).filter(|check| check["ok"] != true).count();
    let exit = if failed == 0 { DONE } else { FAILED };
    if json {
        return Outcome { text: answer.to_string(), exit };
    }
    let mut lines = Vec::new();
    for check in items(answer) {
        let word = if check["ok"] == true { "ok  " } else { "FAIL" };
        lines.push(format!("{word}  {:<16} {}", harmless(text(check, "check")), harmless(text(check, "says"))));
        if check["ok"] != true {
            lines.push(format!("      {:<16} -> {}", "", harmless(text(check, "hint"))));
        }
    }
    let (node, all) = (harmless(text(answer, "node_id")), items(answer).count());
    lines.push(match failed {
        0 => format!("node {node}: all {all} checks are well"),
        failed => format!("node {node}: {failed} of {all} checks failed"),
    });
    Outcome { text: lines.join("\n"), exit }
}

impl Events {
    /// Prints them until there are no more, or `stop`. A node that went away is asked again from where it was.
    async fn print(
        &self,
        rest: &Rest<'_>,
        json: bool,
        out: &mut impl Write,
        stop: impl Future<Output = ()>,
    ) -> Result<Outcome, Outcome> {
        let kinds = self.kinds.as_ref().map_or(String::new(), |kinds| format!("&kinds={}", encoded(kinds)));
        let path = format!("/api/v1/events?last={}&follow={}{kinds}", self.last, self.follow);
        let (mut lines, mut seen) = (rest.lines(&path, None).await?, None);
        tokio::pin!(stop);
        let done = || Ok(Outcome { text: String::new(), exit: DONE });
        loop {
            let event = tokio::select! {
                () = &mut stop => return done(),
                event = next(&mut lines) => event,
            };
            let Some((id, kind, data)) = event else {
                if !self.follow {
                    return done();
                }
                tokio::select! {
                    () = &mut stop => return done(),
                    () = sleep(AGAIN) => {}
                }
                if let Ok(again) = rest.lines(&path, seen.as_deref()).await {
                    lines = again;
                }
                continue;
            };
            let line = if json {
                serde_json::json!({ "id": id, "event": kind, "data": data }).to_string()
            } else {
                let at = data["at_ms"].as_i64().map_or("-".to_owned(), moment::shown);
                format!("{at} {kind:<8} {}", harmless(text(&data, "says")))
            };
            seen = Some(id);
            match writeln!(out, "{line}").and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return done(),
                Err(error) => return Err(Outcome { text: format!("cannot print: {error}"), exit: FAILED }),
                Ok(()) => {}
            }
        }
    }
}

/// Id, name and data of the next event. None: the answer has ended.
async fn next(lines: &mut Lines) -> Option<(String, String, Value)> {
    let (mut id, mut kind, mut data) = (String::new(), String::new(), Value::Null);
    loop {
        let line = lines.next().await?;
        match line.split_once(':').map(|(field, value)| (field, value.trim_start())) {
            Some(("id", value)) => value.clone_into(&mut id),
            Some(("event", value)) => value.clone_into(&mut kind),
            Some(("data", value)) => data = serde_json::from_str(value).unwrap_or_default(),
            None if line.is_empty() && !kind.is_empty() => return Some((id, kind, data)),
            _ => {} // a comment
        }
    }
}

impl Audit {
    async fn print(&self, rest: &Rest<'_>, json: bool) -> Result<Outcome, Outcome> {
        let mut path = format!("/api/v1/audit?limit={}", self.limit);
        for (key, value) in [("who", &self.who), ("action", &self.action)] {
            if let Some(value) = value {
                path.push_str(&format!("&{key}={}", encoded(value)));
            }
        }
        if let Some(from) = self.from {
            path.push_str(&format!("&from={from}"));
        }
        let answer = rest.get(&path).await?;
        let row = |entry: &Value| {
            let at = entry["at_ms"].as_i64().map_or("-".to_owned(), moment::shown);
            // What nobody has asked for, a node did by itself.
            let who = if text(entry, "from_addr").is_empty() { text(entry, "node_id") } else { text(entry, "who") };
            let fields = ["role", "action", "target", "args", "outcome", "reason"];
            let fields = fields.map(|key| or_dash(&harmless(text(entry, key))));
            [vec![at, or_dash(&harmless(who))], fields.to_vec()].concat()
        };
        let rows: Vec<Vec<String>> = items(&answer).map(row).collect();
        let shown = match rows.is_empty() {
            true if self.who.is_some() || self.action.is_some() => NOTHING_FITS.to_owned(),
            true => "nothing was done that is written down".to_owned(),
            false => table(&["AT", "WHO", "ROLE", "ACTION", "ON", "HOW", "OUTCOME", "REASON"], &rows),
        };
        Ok(Outcome { text: if json { answer.to_string() } else { shown }, exit: DONE })
    }
}

pub(super) fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_check_that_failed_shows_with_what_to_do_and_decides_the_exit_code() {
        let well = json!({ "check": "clock", "ok": true, "says": "3 ms", "hint": "" });
        let ill = json!({ "check": "peers", "ok": false, "says": "no other node", "hint": "start another" });
        let all_well = diagnosis(&json!({ "node_id": "one", "items": [well] }), false);
        assert_eq!((all_well.exit, all_well.text.lines().count()), (DONE, 2));
        let one_ill = diagnosis(&json!({ "node_id": "one", "items": [ill, well] }), false);
        assert_eq!(one_ill.exit, FAILED);
        let want = "FAIL  peers            no other node\n                       -> start another\nok    clock            3 ms\n\
            node one: 1 of 2 checks failed";
        assert_eq!(one_ill.text, want);
        assert_eq!(diagnosis(&json!({ "node_id": "one", "items": [ill] }), true).exit, FAILED);
    }
}
