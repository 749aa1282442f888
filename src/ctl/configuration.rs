//! `ctl config`: what is configured, who said so, and where nodes differ.

use clap::Args;
use serde_json::Value;

use super::DONE;
use super::Outcome;
use super::operators::Admin;
use super::print::harmless;
use super::print::or_dash;
use super::print::table;
use super::rest::Rest;
use super::views::encoded;
use super::views::items;
use super::views::text;

const HELP: &str = "\
Examples:
  im-presence ctl config                                 what was set on the node that is asked, and where
  im-presence ctl config --node node-2 --all             every key of another node
  im-presence ctl config --diff                          keys in which nodes differ";

/// Print what is configured, and where each value was said; or where nodes differ
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Configuration {
    /// Only the keys in which nodes differ, with the values of each
    #[arg(long, conflicts_with_all = ["node", "all"])]
    diff: bool,
    /// Of this node; else of the one that is asked
    #[arg(long, value_name = "NODE_ID")]
    node: Option<String>,
    /// Also what has its default
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    pub(super) admin: Admin,
}

impl Configuration {
    pub(super) async fn print(&self, rest: &Rest<'_>, json: bool) -> Result<Outcome, Outcome> {
        let node = self.node.as_ref().map_or(String::new(), |node| format!("?node={}", encoded(node)));
        let path = if self.diff { "/api/v1/config/diff".to_owned() } else { format!("/api/v1/config{node}") };
        let answer = rest.get(&path).await?;
        let shown = match (json, self.diff) {
            (true, _) => answer.to_string(),
            (false, true) => differences(&answer),
            (false, false) => self.in_force(&answer),
        };
        Ok(Outcome { text: shown, exit: DONE })
    }

    fn in_force(&self, answer: &Value) -> String {
        let sections = answer["sections"].as_object().into_iter().flatten();
        let keys = sections.flat_map(|(section, keys)| {
            keys.as_object().into_iter().flatten().map(move |(key, said)| (format!("{section}.{key}"), said))
        });
        let row = |(key, said): (String, &Value)| vec![harmless(&key), value(&said["value"]), harmless(text(said, "source"))];
        let rows: Vec<Vec<String>> = keys.filter(|(_, said)| self.all || said["default"] != true).map(row).collect();
        match rows.is_empty() {
            true => "everything has its default; see --all".to_owned(),
            false => table(&["KEY", "VALUE", "FROM"], &rows),
        }
    }
}

fn differences(answer: &Value) -> String {
    let said = |key: &str, node: &Value| {
        vec![harmless(key), harmless(text(node, "node_id")), value(&node["value"]), or_dash(&harmless(text(node, "source")))]
    };
    let of_key = |item: &Value| {
        let nodes = item["nodes"].as_array().into_iter().flatten();
        nodes.map(|node| said(text(item, "key"), node)).collect::<Vec<_>>()
    };
    let rows: Vec<Vec<String>> = items(answer).flat_map(of_key).collect();
    let silent: Vec<String> = answer["silent"].as_array().into_iter().flatten().filter_map(Value::as_str).map(harmless).collect();
    let silent = if silent.is_empty() { String::new() } else { format!("\nthese did not say: {}", silent.join(" ")) };
    let shown = match rows.is_empty() {
        true => "the nodes are configured alike".to_owned(),
        false => table(&["KEY", "NODE", "VALUE", "FROM"], &rows),
    };
    format!("{shown}{silent}")
}

/// A text as it is, everything else as JSON.
fn value(value: &Value) -> String {
    or_dash(&harmless(&value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn keys_that_differ_are_shown_with_who_said_what() {
        let nodes = json!([{ "node_id": "one", "value": 60_000, "source": "built-in" }, { "node_id": "two", "value": "9\n", "source": "a.toml:3" }]);
        let answer = json!({ "items": [{ "key": "gateway.doubt_for", "nodes": nodes }], "silent": ["three"] });
        let want = "KEY                NODE  VALUE  FROM\n\
            gateway.doubt_for  one   60000  built-in\n\
            gateway.doubt_for  two   9\\n    a.toml:3\n\
            these did not say: three";
        assert_eq!(differences(&answer), want);
        assert_eq!(differences(&json!({ "items": [], "silent": [] })), "the nodes are configured alike");
    }
}
