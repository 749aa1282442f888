//! The configuration in force, where each value was said, and where nodes differ.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Deserialize;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::api::report::Reporter;
use crate::api::report::others;
use crate::config::Config;
use crate::engine::messages::peers::Peers;
use crate::engine::read::lives::Lives;
use crate::error::Error;

/// By section and key.
pub type Configuration = BTreeMap<String, BTreeMap<String, Setting>>;

/// What is in force, and where it was said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Setting {
    /// Secrets show as `***`.
    pub value: Value,
    /// Nobody said anything else.
    pub default: bool,
    /// built-in, FILE:LINE, env:NAME, or secret file FILE.
    pub source: String,
}

/// How old may be what the nodes have said that is told again.
const MAX_AGE: Duration = Duration::from_secs(2);

/// Where nodes differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Differences {
    pub items: Vec<Difference>,
    /// Nodes that did not say what is in force there.
    pub silent: Vec<String>,
    /// Null: they are all here.
    pub next_cursor: Option<String>,
    pub as_of_ms: i64,
}

/// A key that differs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Difference {
    /// As in `gateway.lease`.
    pub key: String,
    pub nodes: Vec<Said>,
}

/// What a node has there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Said {
    pub node_id: String,
    /// Null: the node has no such key, or not its section.
    pub value: Value,
    pub source: String,
}

/// They differ by nature.
const OF_ONE_NODE: [&str; 7] = [
    "presence_service.node_id",
    "presence_service.advertise",
    "presence_service.host",
    "presence_service.port",
    "admin.host",
    "admin.port",
    "node.zone",
];
/// Sections of which nodes have to be of one mind: else they judge gateways differently, or speak past each other.
const ALIKE: [&str; 12] = [
    "route",
    "gateway",
    "delivery",
    "drain",
    "status",
    "watch",
    "history",
    "allocation",
    "digest",
    "auth",
    "redis_cache",
    "redis_queue",
];
/// Of these, what says how a server is reached: one may have several addresses.
const WAYS: [&str; 6] = ["host", "port", "url", "username", "password", "mtls"];

impl Difference {
    /// Whether the system needs it to be alike.
    pub fn matters(&self) -> bool {
        let (section, key) = self.key.split_once('.').unwrap_or((&self.key, ""));
        ALIKE.contains(&section) && !WAYS.contains(&key) && !key.ends_with("_file")
    }
}

/// The configuration as it may be shown.
pub fn shown(config: &Config) -> Configuration {
    let tree = serde_json::to_value(config).unwrap_or_default();
    let sections = tree.as_object().into_iter().flatten().filter_map(|(section, keys)| Some((section, keys.as_object()?)));
    let setting = |section: &str, key: &str, value: &Value| {
        let source = config.sources.of(section, key);
        Setting { value: value.clone(), default: source.is_none(), source: source.unwrap_or("built-in").to_owned() }
    };
    sections
        .map(|(section, keys)| {
            let keys = keys.iter().map(|(key, value)| (key.clone(), setting(section, key, value)));
            (section.clone(), keys.collect())
        })
        .collect()
}

/// Keys whose values are not the same on all of `nodes`.
fn differing(nodes: &[(String, Configuration)]) -> Vec<Difference> {
    let keys =
        nodes.iter().flat_map(|(_, sections)| sections).flat_map(|(section, keys)| keys.keys().map(move |key| (section, key)));
    let keys: BTreeSet<_> = keys.collect();
    let mut differences = Vec::new();
    for (section, key) in keys {
        let name = format!("{section}.{key}");
        let of = |node: &(String, Configuration)| {
            let setting = node.1.get(section).and_then(|keys| keys.get(key)).cloned().unwrap_or_default();
            Said { node_id: node.0.clone(), value: setting.value, source: setting.source }
        };
        let said: Vec<Said> = nodes.iter().map(of).collect();
        if !OF_ONE_NODE.contains(&&*name) && said.iter().any(|one| one.value != said[0].value) {
            differences.push(Difference { key: name, nodes: said });
        }
    }
    differences
}

impl Differences {
    /// Asks all nodes that are there, at the same time.
    pub(super) async fn ask(peers: &Peers, own: &Configuration, lives: &Lives) -> Self {
        let listed = peers.listed();
        let named = listed.iter().map(|node| &node.name).filter(|name| name.node_id != peers.own.node_id);
        let asked = named.map(async |name| (name.node_id.clone(), others::ask(peers, &name.addr, "configuration").await));
        let (mut nodes, mut silent) = (vec![(peers.own.node_id.clone(), own.clone())], Vec::new());
        for (id, said) in join_all(asked).await {
            match said {
                Ok(configuration) => nodes.push((id, configuration)),
                Err(_) => silent.push(id),
            }
        }
        Self { items: differing(&nodes), silent, next_cursor: None, as_of_ms: lives.clock.now().0 }
    }
}

impl Reporter {
    /// What is in force on a node. None: there is no such node.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn configuration_of(&self, node_id: &str) -> Option<Result<Configuration, String>> {
        match node_id == self.peers.own.node_id {
            true => Some(Ok(self.facts.configuration.clone())),
            false => self.ask(node_id, "configuration").await,
        }
    }

    /// Where the nodes that are there differ, as it was known a moment ago.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: this node stops.
    pub async fn differences(&self) -> Result<Arc<Differences>, Error> {
        self.differences.newest(MAX_AGE).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, text: &str) -> (String, Configuration) {
        (id.to_owned(), shown(&Config::from_text("im.toml", text).expect("a configuration")))
    }

    #[test]
    fn where_each_value_was_said_is_shown_and_no_secret_is() {
        let text = "# first\n[route]\n\nl1_ttl = 7\n[redis_cache]\npassword = \"s3cret\"\n";
        let (_, shown) = node("one", text);
        let of = |section: &str, key: &str| shown[section][key].clone();
        assert_eq!(of("route", "l1_ttl"), Setting { value: 7.into(), default: false, source: "im.toml:4".into() });
        assert_eq!(of("route", "max_retries"), Setting { value: 3.into(), default: true, source: "built-in".into() });
        assert_eq!(of("redis_cache", "password").value, "***");
        assert!(!serde_json::to_string(&shown).expect("JSON").contains("s3cret"));
    }

    #[test]
    fn nodes_differ_in_values_and_not_in_names_and_ports() {
        let one = node("one", "[gateway]\nlease = 20000\n[presence_service]\nport = 7000\nnode_id = \"one\"");
        let two = node("two", "[presence_service]\nport = 7001\nnode_id = \"two\"\n[log]\nlevel = \"debug\"");
        let differences = differing(&[one.clone(), two]);
        let keys: Vec<(&str, bool)> = differences.iter().map(|one| (&*one.key, one.matters())).collect();
        assert_eq!(keys, [("gateway.lease", true), ("log.level", false)]);
        assert_eq!(differences[0].nodes[0].value, 20_000);
        assert_eq!(differing(&[one.clone(), one]), []);
    }
}
