//! What a container is built from and started with. Containers are not run here: this checks what would break them.

use std::fs;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Output;

use crate::harness::cluster::Cluster;
use crate::tidy::package;
use crate::tidy::sources;

const PROGRAM: &str = env!("CARGO_BIN_EXE_im-presence");
const PREFIX: &str = "IM_PRESENCE__";

fn read(name: &str) -> String {
    fs::read_to_string(package().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// What the Dockerfile copies from the package.
fn copied() -> Vec<PathBuf> {
    let dockerfile = read("Dockerfile");
    let copies = dockerfile.lines().filter_map(|line| line.strip_prefix("COPY ")).filter(|line| !line.starts_with("--from="));
    let paths = copies.flat_map(|line| line.rsplit_once(' ').expect("COPY FROM... TO").0.split(' '));
    paths.map(PathBuf::from).collect()
}

/// The daemon's variables in a Dockerfile (`ENV NAME=value`) or a compose file (`NAME: "value"`).
fn variables(file: &str) -> Vec<(String, String)> {
    let text = read(file);
    let assignments = text.lines().map(|line| line.trim().trim_start_matches("ENV ")).filter(|line| line.starts_with(PREFIX));
    let pairs = assignments.map(|line| line.split_once(['=', ':']).unwrap_or_else(|| panic!("{file}: {line}")));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().trim_matches('"').to_owned())).collect()
}

fn run(arguments: &[&str], environment: &[(String, String)]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).envs(environment.iter().cloned()).output().expect("run im-presence")
}

/// `a/b/../c` as `a/c`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => assert!(plain.pop(), "{path:?} leaves the package"),
            part => plain.push(part),
        }
    }
    plain
}

#[test]
fn the_container_is_built_from_what_is_there() {
    let (copied, ignored) = (copied(), read(".dockerignore"));
    assert!(copied.len() > 4, "what it copies was found: {copied:?}");
    for path in &copied {
        assert!(package().join(path).exists(), "the Dockerfile copies {path:?}");
        assert!(!ignored.lines().any(|line| Path::new(line) == path), ".dockerignore keeps {path:?} away");
    }
}

#[test]
fn the_container_is_built_from_all_that_the_sources_include() {
    let copied = copied();
    for source in sources() {
        for include in ["include_str!(\"", "include_bytes!(\""] {
            for rest in source.text.split(include).skip(1) {
                let path = rest.split('"').next().expect("the rest of a file");
                let path = plain(&Path::new(&source.name).parent().expect("a directory").join(path));
                assert!(package().join(&path).exists(), "{} includes {path:?}", source.name);
                assert!(copied.iter().any(|copied| path.starts_with(copied)), "the Dockerfile does not copy {path:?}");
            }
        }
    }
}

#[test]
fn the_container_and_the_composition_say_nothing_that_the_daemon_does_not_know() {
    let image = variables("Dockerfile");
    let both = [image.clone(), variables("compose.yaml")].concat();
    assert!(image.len() >= 2 && both.len() >= 7, "the variables were found: {both:?}");
    let checked = run(&["check-config"], &both);
    let (text, why) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert!(checked.status.success(), "{why}");
    for (name, _) in &both {
        let (section, key) = name.trim_start_matches(PREFIX).split_once("__").expect("IM_PRESENCE__SECTION__KEY");
        let section = format!("[{}]\n", section.to_lowercase());
        let in_force = text.split_once(&section).unwrap_or_else(|| panic!("{section}: {text}")).1.split("\n\n").next();
        let line = format!("{} = ", key.to_lowercase());
        assert!(in_force.is_some_and(|keys| keys.lines().any(|key| key.starts_with(&line))), "{name}: {text}");
    }
    let open = run(&["check-config"], &image);
    assert!(String::from_utf8_lossy(&open.stderr).contains("is reachable without authentication"), "{open:?}");
}

#[test]
fn the_nodes_of_a_cluster_are_configured_by_what_the_daemon_knows() {
    const SECRETS: &str = "/run/secrets";
    let secrets = tempfile::tempdir().expect("a directory");
    let place = secrets.path().to_str().expect("a path");
    for overlay in ["demo", "production"] {
        let text = read(&format!("deploy/kubernetes/overlays/{overlay}/im-presence.toml"));
        for rest in text.split(&format!("\"{SECRETS}/")).skip(1) {
            let file = secrets.path().join(rest.split('"').next().expect("a path"));
            fs::create_dir_all(file.parent().expect("a directory")).expect("a directory");
            fs::write(&file, "a secret").expect("a file");
        }
        let file = secrets.path().join("im-presence.toml");
        fs::write(&file, text.replace(SECRETS, place)).expect("a file");
        let named = [("NODE_ID", "im-presence-0"), ("ADVERTISE", "im-presence-0.im-presence-nodes.im-presence.svc:6000")];
        let environment = named.map(|(key, value)| (format!("{PREFIX}PRESENCE_SERVICE__{key}"), value.to_owned()));
        let checked = run(&["check-config", "--config", file.to_str().expect("a path")], &environment);
        assert!(checked.status.success(), "{overlay}: {}", String::from_utf8_lossy(&checked.stderr));
    }
}

#[test]
fn the_tokens_of_the_composition_are_known_to_its_nodes() {
    let compose = read("compose.yaml");
    let configs = compose.split_once("\nconfigs:\n").expect("configs").1;
    for name in ["operator", "node"] {
        let token = configs.split_once(&format!("  {name}:\n    content: \"")).expect("a token").1.split('"').next().expect("it");
        assert!(configs.contains(&im_presence::security::tokens::to_hex(token)), "{name}: {token}");
    }
}

#[tokio::test]
async fn health_tells_a_node_that_serves_from_one_that_does_not() {
    let mut cluster = Cluster::sqlite(&[]).await;
    let addr = cluster.node().admin.to_string();
    let healthy = run(&["health", "--addr", &addr], &[]);
    assert!(healthy.status.success() && healthy.stdout.starts_with(b"{"), "{healthy:?}");
    cluster.nodes[0].kill();
    let gone = run(&["health", "--addr", &addr], &[]);
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
}
