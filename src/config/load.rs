//! From text to a `Config`: one list of settings, each with the place it was said, laid over the defaults.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::Path;

use ::config::FileFormat;
use serde_json::Value;
use serde_json::json;

use super::Config;
use super::rules::Fault;
use super::schema;
use super::sources;
use super::sources::Sources;

const ENV_PREFIX: &str = "IM_PRESENCE__";
/// What a `url` says by itself.
const SAID_BY_URL: [&str; 8] = ["host", "port", "database", "user", "username", "password", "password_file", "url_file"];
/// What a Redis's `nodes` say by themselves.
const SAID_BY_NODES: [&str; 4] = ["host", "port", "url", "url_file"];

/// Everything that is wrong with a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

/// One thing that is wrong: the file or variable that said it, the key (`section.key`, or empty) and why it cannot be.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    pub place: String,
    pub key: String,
    pub reason: String,
}

/// A value that a file or a variable gave.
struct Setting {
    place: String,
    /// As it is told who said it.
    source: String,
    section: String,
    /// Empty: the section is there, and says nothing.
    key: String,
    value: Value,
}

impl Config {
    /// Reads the defaults, `file`, and this process's environment.
    ///
    /// # Errors
    /// All that is wrong with them.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let (mut settings, mut problems) = (Vec::new(), Vec::new());
        match file.map_or(Ok(Vec::new()), read) {
            Ok(found) => settings.extend(found),
            Err(problem) => problems.push(problem),
        }
        for (name, value) in env::vars_os() {
            match from_variable(name, value) {
                Ok(found) => settings.extend(found),
                Err(problem) => problems.push(problem),
            }
        }
        Self::from_settings(settings, problems)
    }

    /// Reads the defaults and the text of a file, whose name ends in .toml or .ini.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn from_text(file: &str, text: &str) -> Result<Self, ConfigError> {
        let format = if file.ends_with(".ini") { FileFormat::Ini } else { FileFormat::Toml };
        match settings_of(file, text, format) {
            Ok(settings) => Self::from_settings(settings, Vec::new()),
            Err(reason) => Err(ConfigError { problems: vec![Problem { place: file.to_owned(), key: String::new(), reason }] }),
        }
    }

    fn from_settings(settings: Vec<Setting>, mut problems: Vec<Problem>) -> Result<Self, ConfigError> {
        let (schema, mut tree) = (schema::all(), schema::defaults());
        let mut given = Vec::new();
        for setting in settings {
            match schema::check(&schema, &setting.section, &setting.key, &setting.value) {
                Ok(value) => {
                    lay(&mut tree, &schema, &setting, value);
                    given.push(setting);
                }
                Err(reason) => problems.push(setting.problem(reason)),
            }
        }
        problems.extend(said_twice(&given));
        if ["host", "url_file"].iter().any(|key| is_given(&given, "store", key)) && !is_given(&given, "store", "url") {
            tree["store"]["url"] = json!(""); // the default is meant for those who say nothing
        }
        let mut config = serde_json::from_value::<Self>(tree).map_err(|error| ConfigError {
            problems: vec![Problem { place: "configuration".into(), key: String::new(), reason: error.to_string() }],
        })?;
        given.iter().for_each(|setting| note(&mut config.sources, setting));
        let faults = config.validate().into_iter().filter(|fault| !problems.iter().any(|other| fault.keys.contains(&other.key)));
        problems.extend(faults.map(|fault| locate(fault, &given)).collect::<Vec<_>>());
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n"))
    }
}

impl Error for ConfigError {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, key, reason } = self;
        if key.is_empty() { write!(f, "{place}: {reason}") } else { write!(f, "{place}: {key}: {reason}") }
    }
}

impl Setting {
    /// `section.key`, as the defaults have it.
    fn name(&self) -> String {
        [&*self.section, &*self.key].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".")
    }

    fn problem(&self, reason: String) -> Problem {
        Problem { place: self.place.clone(), key: self.name(), reason }
    }
}

fn read(file: &Path) -> Result<Vec<Setting>, Problem> {
    let place = file.display().to_string();
    let problem = |reason: String| Problem { place: place.clone(), key: String::new(), reason };
    let format = match file.extension().and_then(|extension| extension.to_str()) {
        Some("toml") => FileFormat::Toml,
        Some("ini") => FileFormat::Ini,
        _ => return Err(problem("must end in .toml or .ini".into())),
    };
    let text = fs::read_to_string(file).map_err(|error| problem(format!("cannot be read: {error}")))?;
    settings_of(&place, &text, format).map_err(problem)
}

fn settings_of(place: &str, text: &str, format: FileFormat) -> Result<Vec<Setting>, String> {
    let mut settings = Vec::new();
    let setting = |section: &str, key: &str, value| {
        let line = sources::line_of(text, section, key).map_or(String::new(), |line| format!(":{line}"));
        Setting { place: place.into(), source: format!("{place}{line}"), section: section.into(), key: key.into(), value }
    };
    for (section, value) in schema::parse(text, format)? {
        match value {
            Value::Object(keys) if keys.is_empty() => settings.push(setting(&section, "", Value::Null)),
            Value::Object(keys) => settings.extend(keys.into_iter().map(|(key, value)| setting(&section, &key, value))),
            value => settings.push(setting("", &section, value)),
        }
    }
    Ok(settings)
}

/// `None` if the variable is not ours.
fn from_variable(name: OsString, value: OsString) -> Result<Option<Setting>, Problem> {
    let name = name.to_string_lossy();
    let Some(path) = name.strip_prefix(ENV_PREFIX) else { return Ok(None) };
    let path = path.to_lowercase();
    let (section, key) = path.split_once("__").unwrap_or(("", &path));
    let (place, source) = (format!("environment variable {name}"), format!("env:{name}"));
    let setting = Setting { place, source, section: section.into(), key: key.into(), value: Value::Null };
    match value.into_string() {
        Ok(value) => Ok(Some(Setting { value: value.into(), ..setting })),
        Err(_) => Err(setting.problem("is not UTF-8".into())),
    }
}

/// Where a value was said; and of a file with a secret, that it says the secret.
fn note(sources: &mut Sources, setting: &Setting) {
    sources.note(setting.name(), setting.source.clone());
    if let (Some(secret), Some(file)) = (setting.key.strip_suffix("_file"), setting.value.as_str())
        && ["password", "url"].contains(&secret)
        && !file.is_empty()
    {
        sources.note_secret_file(&setting.section, secret, file);
    }
}

fn lay(tree: &mut Value, schema: &Value, setting: &Setting, value: Value) {
    let section = &mut tree[&setting.section];
    if section.is_null() {
        *section = schema[&setting.section].clone();
    }
    if !setting.key.is_empty() {
        section[&setting.key] = value;
    }
}

/// Of two keys that say the same, one has to be left out.
fn said_twice(given: &[Setting]) -> Vec<Problem> {
    let is_given = |section: &str, key: &str| is_given(given, section, key);
    let twice = given.iter().filter_map(|one| {
        if one.value == json!("") || (one.section == "store" && one.key == "port") {
            return None; // says nothing
        }
        let in_url = SAID_BY_URL.contains(&&*one.key) || (one.key == "tls" && one.section != "store");
        let other = ["url", "url_file", "password", "nodes"].into_iter().find(|other| {
            let says_it = match *other {
                "password" => one.key == "password_file",
                "nodes" => SAID_BY_NODES.contains(&&*one.key),
                other => in_url && one.key != other,
            };
            says_it && is_given(&one.section, other)
        })?;
        Some(one.problem(format!("{}.{other} says it too: give only one of them", one.section)))
    });
    twice.filter(|problem| !problem.key.is_empty()).collect()
}

fn is_given(given: &[Setting], section: &str, key: &str) -> bool {
    let is_empty = |value: &Value| [json!(""), json!([]), json!("[]")].contains(value);
    given.iter().any(|one| one.section == section && one.key == key && !is_empty(&one.value))
}

/// Names the place that gave one of the fault's keys last.
fn locate(fault: Fault, given: &[Setting]) -> Problem {
    match given.iter().rev().find(|setting| fault.keys.contains(&setting.name())) {
        Some(setting) => setting.problem(fault.reason),
        None => Problem { place: "built-in defaults".into(), key: fault.keys[0].clone(), reason: fault.reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LogFormat;
    use crate::config::OnOverflow;
    use crate::config::RedisMode;
    use std::time::Duration;

    const SOURCE_INI: &str = "[presence_service]\nport=6000\nthread_count=4\nmax_connections=1000\n\
        [route]\nroute_ttl=3600\nstatus_ttl=3600\nmax_retries=3\nretry_interval=1000\n\
        [redis_cache]\nhost=10.0.0.1\nport=6379\ndatabase=1\ntimeout=5000\n\
        [redis_queue]\nhost=10.0.0.2\nport=6380\ndatabase=2\ntimeout=4000\n";

    fn load(file: &str, text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let format = if file.ends_with(".ini") { FileFormat::Ini } else { FileFormat::Toml };
        let mut settings = settings_of(file, text, format).expect("the file can be parsed");
        let given = |(name, value): &(&str, &str)| from_variable(name.into(), value.into()).expect("the variable is text");
        settings.extend(variables.iter().flat_map(given));
        Config::from_settings(settings, Vec::new())
    }

    #[track_caller]
    fn check_refused(text: &str, variables: &[(&str, &str)], want: &[&str]) {
        let error = load("im.toml", text, variables).expect_err("is refused");
        assert_eq!(error.to_string().lines().collect::<Vec<_>>(), want, "{text} {variables:?}");
    }

    #[test]
    fn traces_go_to_a_collector_nearby_and_from_a_program_that_can_send_them() {
        let sent_to = |url: &str| load("a.toml", &format!("[trace]\nendpoint = \"{url}\"\n"), &[]);
        for url in ["collector:4317", "https://collector:4317", "http://collector", "http://", "http://0.0.0.0:4317"] {
            let error = sent_to(url).unwrap_err().to_string();
            assert!(error.contains("trace.endpoint: must be http://HOST:PORT"), "{error}");
        }
        let error = sent_to("http://collector:4317").map_err(|error| error.to_string()).err();
        let refused = error.is_some_and(|error| error.contains("trace.endpoint: this program cannot send traces"));
        assert_eq!(refused, !cfg!(feature = "otlp"));
    }

    #[test]
    fn nothing_given_is_a_complete_configuration() {
        let config = load("im.toml", "", &[]).unwrap();
        assert_eq!(config.presence_service.port, 6000);
        assert_eq!(config.presence_service.node_id, None);
        assert_eq!(config.route.l1_ttl, Duration::from_secs(30));
        assert_eq!(config.gateway.lease, Duration::from_millis(15_000));
        assert_eq!(config.store.url.expose(), "sqlite://im-presence.db");
        assert_eq!((config.redis_cache, config.redis_queue), (None, None));
    }

    #[test]
    fn a_store_may_have_several_hosts() {
        let text =
            "[store]\nurl = ''\nhost = 'db-1, db-2:3307'\nuser = 'u'\npassword = 'p,@'\ndatabase = 'im'\ntls = 'disabled'\n";
        let store = load("im.toml", text, &[]).expect("a configuration").store;
        let urls = store.connect_urls().expect("no file is needed");
        assert_eq!(
            urls,
            ["mysql://u:p%2C%40@db-1:3306/im?ssl-mode=disabled", "mysql://u:p%2C%40@db-2:3307/im?ssl-mode=disabled"]
        );
        assert_eq!(store.to_string(), "mysql://u@db-1:3306,db-2:3307/im");
        let text = text.replace("db-1,", ",");
        check_refused(&text, &[], &["im.toml: store.host: must be a host name or an IP address"]);
    }

    #[test]
    fn toml_gives_values_and_sections() {
        let text = "[route]\non_overflow = \"refuse_new\"\n[log]\nformat = \"json\"\n[redis_cache]\n[gateway]\ndoubt_share = 1";
        let config = load("im.toml", text, &[]).unwrap();
        assert_eq!(config.route.on_overflow, OnOverflow::RefuseNew);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.gateway.doubt_share, 1.0);
        let redis = config.redis_cache.expect("an empty section is a section").server;
        assert_eq!((&*redis.host, redis.port, redis.timeout), ("127.0.0.1", 6379, Duration::from_secs(5)));
    }

    #[test]
    fn a_table_and_a_list_of_tables_are_values() {
        let text = "[allocation.regions]\nEU-west = [\"us\"]\n[[allocation.experiments]]\nname = \"canary\"\nshare = 0.05\n\
            labels = { version = \"2\" }";
        let config = load("im.toml", text, &[]).unwrap();
        assert_eq!(config.allocation.regions["EU-west"], ["us"]);
        assert_eq!(config.allocation.experiments[0].labels["version"], "2");
        assert_eq!(load("im.toml", &config.to_string(), &[]).as_ref(), Ok(&config));
        let variables = [("IM_PRESENCE__ALLOCATION__REGIONS", "{ EU-west = [\"us\"] }")];
        assert_eq!(load("im.toml", "", &variables).unwrap().allocation.regions, config.allocation.regions);
        let bad = "[[allocation.experiments]]\nname = \"canary\"\nshare = 2";
        check_refused(bad, &[], &["im.toml: allocation.experiments: canary: share must be from 0 to 1"]);
        check_refused("[allocation]\nregions = 1", &[], &["im.toml: allocation.regions: must be a table"]);
    }

    #[test]
    fn an_ini_file_with_sections_and_strings_is_read() {
        let config = load("im.ini", SOURCE_INI, &[]).unwrap();
        assert_eq!(config.presence_service.thread_count, 4);
        assert_eq!(config.route.retry_interval, Duration::from_secs(1));
        assert_eq!(config.redis_cache.map(|cache| cache.server.database), Some(1));
        let queue = config.redis_queue.expect("the section is there");
        assert_eq!((&*queue.server.host, queue.server.port, &*queue.channel_prefix), ("10.0.0.2", 6380, ""));
        assert_eq!(load("im.ini", "[route]\nmpim_keys = off", &[]).map(|config| config.route.mpim_keys), Ok(false));
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let variables = [("IM_PRESENCE__ROUTE__ROUTE_TTL", "60"), ("IM_PRESENCE_ADDR", "not ours"), ("PATH", "/bin")];
        let config = load("im.toml", "[route]\nroute_ttl = 5\nl1_ttl = 7", &variables).unwrap();
        assert_eq!((config.route.route_ttl.as_secs(), config.route.l1_ttl.as_secs()), (60, 7));
    }

    #[test]
    fn a_password_of_digits_stays_a_string() {
        let config = load("im.toml", "", &[("IM_PRESENCE__REDIS_CACHE__PASSWORD", "007")]).unwrap();
        let password = config.redis_cache.and_then(|cache| cache.server.password).expect("is given");
        assert_eq!(password.expose(), "007");
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place_and_a_suggestion() {
        let no_such = "there is no such key; did you mean";
        check_refused("[route]\nroute_tll = 5", &[], &[&format!("im.toml: route.route_tll: {no_such} route.route_ttl?")]);
        check_refused("[rout]\nroute_ttl = 5", &[], &[&format!("im.toml: rout.route_ttl: {no_such} route.route_ttl?")]);
        check_refused("route_ttl = 5", &[], &[&format!("im.toml: route_ttl: {no_such} route.route_ttl?")]);
        let variable = "environment variable IM_PRESENCE__STORE__LANE: store.lane:";
        check_refused("", &[("IM_PRESENCE__STORE__LANE", "1")], &[&format!("{variable} {no_such} store.lanes?")]);
        let far = "there is no such key; config/default.toml has all of them";
        check_refused("[weather]", &[], &[&format!("im.toml: weather: {far}")]);
        let variable = "environment variable IM_PRESENCE__ROUTE__: route:";
        check_refused("", &[("IM_PRESENCE__ROUTE__", "1")], &[&format!("{variable} {far}")]);
        check_refused("", &[("IM_PRESENCE__X", "1")], &[&format!("environment variable IM_PRESENCE__X: x: {far}")]);
    }

    #[test]
    fn nonsense_is_refused_and_all_of_it_at_once() {
        let text = "[store]\nlanes = 65\nurl = \"postgres://a:s3cret@b\"\n[route]\nl1_ttl = 1.5\non_overflow = \"explode\"\n\
            [presence_service]\nport = 70000\nnode_id = \"a b\"\n[redis_cache]\npassword = 7\n[log]\nlevel = \"inof\"";
        let variables = [("IM_PRESENCE__GATEWAY__LEASE", "15s"), ("IM_PRESENCE__ROUTE__MPIM_KEYS", "perhaps")];
        check_refused(
            text,
            &variables,
            &[
                "im.toml: presence_service.port: must be from 0 to 65535",
                "im.toml: redis_cache.password: must be a string",
                "im.toml: route.l1_ttl: must be a whole number",
                "im.toml: route.on_overflow: must be `kick_oldest` or `refuse_new`",
                "im.toml: store.lanes: must be from 1 to 64",
                "environment variable IM_PRESENCE__GATEWAY__LEASE: gateway.lease: must be a whole number",
                "environment variable IM_PRESENCE__ROUTE__MPIM_KEYS: route.mpim_keys: must be true or false",
                "im.toml: presence_service.node_id: must be printable ASCII without spaces, up to 64 characters",
                "im.toml: log.level: must be a level such as info, or directives",
                "im.toml: store.url: must begin with sqlite:, mysql: or mariadb:",
            ],
        );
    }

    #[test]
    fn keys_that_contradict_each_other_are_refused() {
        let lease = "im.toml: gateway.heartbeat_interval: lease must be at least 3 x heartbeat_interval";
        check_refused("[gateway]\nheartbeat_interval = 6000", &[], &[lease]);
        let same = "im.toml: admin.port: admin and presence_service cannot listen on the same address";
        check_refused("[admin]\nport = 6000", &[], &[same]);
        let no_page = "im.toml: console.grafana_url: must begin with http:// or https://";
        check_refused("[console]\ngrafana_url = \"javascript:alert(1)\"", &[], &[no_page]);
        let twice = "im.toml: redis_queue.port: redis_queue.url says it too: give only one of them";
        check_refused("[redis_queue]\nport = 1\nurl = \"redis://a\"", &[], &[twice]);
    }

    #[test]
    fn several_redis_servers_are_named_by_their_mode_and_nodes_and_nothing_else() {
        let text = "[redis_cache]\nmode = \"cluster\"\nnodes = [\"a:1\", \"[::1]:2\"]\nkey_prefix = \"eu:\"";
        let variables = [
            ("IM_PRESENCE__REDIS_QUEUE__MODE", "sentinel"),
            ("IM_PRESENCE__REDIS_QUEUE__NODES", "[\"s:26379\"]"),
            ("IM_PRESENCE__REDIS_QUEUE__SENTINEL_PASSWORD", "s3cret"),
        ];
        let config = load("im.toml", text, &variables).unwrap();
        assert!(!format!("{config}{config:?}").contains("s3cret"));
        let (cache, queue) = (config.redis_cache.unwrap(), config.redis_queue.unwrap().server);
        assert_eq!((cache.server.mode, cache.server.nodes.len(), &*cache.key_prefix), (RedisMode::Cluster, 2, "eu:"));
        assert_eq!((queue.mode, &*queue.nodes[0], &*queue.sentinel_master), (RedisMode::Sentinel, "s:26379", "mymaster"));
        let refused = |text: &str, want: &str| {
            check_refused(&format!("[redis_queue]\n{text}"), &[], &[&format!("im.toml: redis_queue.{want}")]);
        };
        refused("mode = \"cluster\"", "mode: needs redis_queue.nodes: HOST:PORT of sentinels, or of some servers of the cluster");
        refused("nodes = [\"a:1\"]", "nodes: goes with redis_queue.mode = sentinel or cluster");
        refused("mode = \"ring\"", "mode: must be one of `single`, `sentinel`, `cluster`");
        let cluster = "mode = \"cluster\"\nnodes = [\"a:1\"]\n";
        for (key, value) in [("host", "\"b\""), ("port", "1"), ("url", "\"redis://b\"")] {
            let twice = format!("{key}: redis_queue.nodes says it too: give only one of them");
            refused(&format!("{cluster}{key} = {value}"), &twice);
        }
        refused(&format!("{cluster}database = 1"), "database: must be 0: a Redis Cluster has no other");
        refused(&format!("{cluster}sentinel_username = \"a\""), "sentinel_username: goes with redis_queue.mode = sentinel");
        refused("mode = \"cluster\"\nnodes = [\"a\"]", "nodes: must be a list of HOST:PORT, 64 at most");
        refused("sharded = true", "sharded: goes with redis_queue.mode = cluster");
        let prefix = "im.toml: redis_cache.key_prefix: must be printable ASCII without spaces, up to 64 characters, without \
            * ? [ ] \\ { }";
        check_refused("[redis_cache]\nkey_prefix = \"{eu}\"", &[], &[prefix]);
    }

    #[test]
    fn a_broken_file_is_refused_without_showing_its_lines() {
        let reason = settings_of("im.toml", "[redis_cache]\npassword = s3cret", FileFormat::Toml).map(|_| ()).unwrap_err();
        assert!(reason.contains("line 2") && !reason.contains("s3cret"), "{reason}");
        let twice = settings_of("im.ini", "[log]\nlevel=info\n[log]\nformat=json", FileFormat::Ini).map(|_| ()).unwrap_err();
        assert_eq!(twice, "[log] appears twice");
        let missing = Config::load(Some(Path::new("/nowhere/im.yaml"))).unwrap_err().to_string();
        assert_eq!(missing, "/nowhere/im.yaml: must end in .toml or .ini");
    }

    #[test]
    fn the_effective_configuration_can_be_loaded_again() {
        let text = "[redis_cache]\nusername = \"app\"\npassword = \"s3cret\"\n[redis_queue]\nurl = \"redis://:s3cret@a\"";
        let config = load("im.toml", text, &[]).unwrap();
        let shown = format!("{config}{config:?}");
        assert!(!shown.contains("s3cret") && shown.contains("redis://:***@a"), "{shown}");
        let plain = load("im.toml", "[route]\nl1_ttl = 7", &[]).unwrap();
        assert_eq!(load("im.toml", &plain.to_string(), &[]), Ok(plain));
    }
}
