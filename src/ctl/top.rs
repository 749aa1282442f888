//! `ctl top`: the system at a glance, again and again.

use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::time::Duration;

use serde_json::Value;
use serde_json::json;
use tokio::time::interval;

use super::DONE;
use super::FAILED;
use super::Outcome;
use super::print::harmless;
use super::print::or_dash;
use super::print::table;
use super::rest::Rest;
use super::views::items;
use super::views::text;

const REFRESH: Duration = Duration::from_secs(1);
/// Moves the cursor to the corner, and empties the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";
/// The worst states first.
const TROUBLES: [&str; 3] = ["held", "late", "draining"];

/// Prints the system each second until Ctrl-C, or once.
pub(super) async fn watch(rest: &Rest<'_>, count: u32, once: bool, as_json: bool) -> Result<Outcome, Outcome> {
    if once {
        let seen = look(rest, count).await?;
        return Ok(Outcome { text: if as_json { seen.to_string() } else { screen(&seen) }, exit: DONE });
    }
    let (mut out, mut ticks) = (io::stdout().lock(), interval(REFRESH));
    let clear = if out.is_terminal() && !as_json { CLEAR } else { "" };
    let (mut last, done) = (None, || Ok(Outcome { text: String::new(), exit: DONE }));
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return done(),
            _ = ticks.tick() => {}
        }
        let shown = match (look(rest, count).await, &last) {
            (Ok(seen), _) => {
                let shown = if as_json { seen.to_string() } else { screen(&seen) };
                last.insert(shown).clone()
            }
            (Err(outcome), None) => return Err(outcome),
            (Err(outcome), Some(before)) => format!("{}; before:\n{before}", outcome.text),
        };
        match writeln!(out, "{clear}{shown}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return done(),
            Err(error) => return Err(Outcome { text: format!("cannot print: {error}"), exit: FAILED }),
            Ok(()) => {}
        }
    }
}

async fn look(rest: &Rest<'_>, count: u32) -> Result<Value, Outcome> {
    let (summary, metrics) = (rest.get("/api/v1/summary").await?, rest.get("/api/v1/metrics").await?);
    let node_id = text(&metrics, "node_id").to_owned();
    let streams = rest.get(&format!("/api/v1/nodes/{node_id}/streams?sort=queue&limit={count}")).await?;
    let mut gateways = Vec::new();
    for state in TROUBLES {
        let left = (count as usize).saturating_sub(gateways.len());
        if left > 0 {
            let page = rest.get(&format!("/api/v1/gateways?state={state}&limit={left}")).await?;
            gateways.extend(items(&page).cloned());
        }
    }
    Ok(json!({ "node_id": node_id, "summary": summary, "streams": streams["items"], "gateways": gateways }))
}

fn screen(seen: &Value) -> String {
    let mut lines = figures(&seen["summary"]);
    lines.extend(tables(seen));
    lines.join("\n")
}

fn number(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), |number| format!("{number:.1}"))
}

fn whole(value: &Value) -> String {
    value.as_u64().map_or("-".to_owned(), |number| number.to_string())
}

fn share(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn figures(summary: &Value) -> Vec<String> {
    let (gateways, rates, latency, hits) =
        (&summary["gateways"], &summary["rates"], &summary["latency_ms"], &summary["hit_share"]);
    let mut lines = vec![format!(
        "{} {}: {}, {} users online, {} devices, {} suspect",
        harmless(text(summary, "system")),
        harmless(text(summary, "version")),
        harmless(text(summary, "verdict")).to_uppercase(),
        whole(&summary["users_online"]),
        whole(&summary["devices"]),
        whole(&summary["suspect_users"])
    )];
    lines.extend(list(&summary["because"]).map(|why| format!("  ! {}", harmless(why.as_str().unwrap_or_default()))));
    let of = |key: &str| format!("{} {key}", whole(&gateways[key]));
    let states = ["alive", "late", "held", "draining", "unmanaged"].map(of).join(", ");
    let (deaths, drains) = (whole(&summary["deaths_last_hour"]), whole(&summary["drains"]));
    lines.push(format!("gateways  {states}; died in the last hour: {deaths}; drains: {drains}"));
    lines.push(format!(
        "per s     {} queries, {} binds, {} deliveries ({} delivered), {} errors",
        number(&rates["queries"]),
        number(&rates["binds"]),
        number(&rates["deliveries"]),
        share(&rates["delivered_share"]),
        number(&rates["errors"])
    ));
    lines.push(format!(
        "p99 ms    query {}, bind {}, delivery {}",
        number(&latency["query_p99"]),
        number(&latency["bind_p99"]),
        number(&latency["delivery_p99"])
    ));
    lines.push(format!(
        "found in  memory {}, Redis {}, SQL {}",
        share(&hits["memory"]),
        share(&hits["redis"]),
        share(&hits["sql"])
    ));
    lines
}

/// Nodes, streams by queue, gateways by trouble.
fn tables(seen: &Value) -> Vec<String> {
    let node = |node: &Value| {
        let degraded = list(&node["degraded"]).filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
        let ready = if node["ready"] == true { "yes" } else { "NO" };
        vec![harmless(text(node, "node_id")), ready.to_owned(), or_dash(&harmless(&degraded))]
    };
    let stream = |stream: &Value| {
        let numbers = ["queue", "queue_max", "delivered", "shed", "last_frame_ms_ago"].map(|key| whole(&stream[key]));
        let caller = or_dash(&harmless(text(stream, "caller")));
        [vec![harmless(text(stream, "gateway_addr"))], numbers.to_vec(), vec![caller]].concat()
    };
    let gateway = |gateway: &Value| {
        let lease = gateway["lease_left_ms"].as_i64().map_or("-".to_owned(), |left| left.to_string());
        vec![harmless(text(gateway, "gateway_addr")), harmless(text(gateway, "state")), lease, whole(&gateway["connections"])]
    };
    let nodes: Vec<Vec<String>> = list(&seen["summary"]["nodes"]).map(node).collect();
    let streams: Vec<Vec<String>> = list(&seen["streams"]).map(stream).collect();
    let gateways: Vec<Vec<String>> = list(&seen["gateways"]).map(gateway).collect();
    let headers = ["STREAM", "QUEUE", "MAX", "WRITTEN", "SHED", "SILENT MS", "CALLER"];
    let streams = if streams.is_empty() { "no streams on this node".to_owned() } else { table(&headers, &streams) };
    let gateways = table(&["GATEWAY", "IS", "LEASE LEFT MS", "CONNECTIONS"], &gateways);
    let tables = [table(&["NODE", "READY", "DEGRADED"], &nodes), streams, gateways];
    tables.into_iter().filter(|table| !table.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_screen_says_how_it_is_and_shows_no_control_characters() {
        let summary = json!({
            "system": "presence", "version": "0.2.0", "verdict": "degraded", "because": ["hold: 2 of 3 gateways are silent"],
            "users_online": 12, "devices": 13, "suspect_users": 4, "gateways": { "alive": 1, "late": 0, "held": 2 },
            "rates": { "queries": 5.04, "delivered_share": 0.5 }, "hit_share": null,
            "nodes": [{ "node_id": "one", "ready": true, "degraded": ["hold"] }],
        });
        let stream = json!({ "gateway_addr": "gw\u{1b}[2J:7000", "queue": 7, "queue_max": 1024 });
        let gateway = json!({ "gateway_addr": "gw-2:7000", "state": "held", "lease_left_ms": -5, "connections": 3 });
        let shown = screen(&json!({ "summary": summary, "streams": [stream], "gateways": [gateway] }));
        for part in
            ["presence 0.2.0: DEGRADED, 12 users online", "  ! hold: 2 of 3", "5.0 queries", "50.0 % delivered", "gw-2:7000"]
        {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'), "{shown}");
    }
}
