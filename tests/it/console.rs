//! The console in a browser: two nodes with MariaDB and Redis, three gateways that are processes of their own, and Chromium, driven
//! by the scripts in `tests/console`. The scripts look at pages, press keys and send signals; what they need to know of the servers
//! stands in their environment. IM_PRESENCE_SCREENSHOTS=1 makes them renew the pictures in `docs/console`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::LazyLock;
use std::time::Duration;
use std::time::Instant;

use im_presence::domain::caller::Role;
use im_presence::pb;
use im_presence::pb::Platform;
use im_presence::pb::RegisterGatewayReq;
use im_presence::pb::SetStatusReq;
use tokio::sync::SemaphorePermit;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::node::PROGRAM;
use crate::harness::node::Settings;
use crate::harness::node::settings;
use crate::harness::pki::Pki;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::process;
use crate::tidy::package;

/// Gateways of each stage, and the user each has.
const GATEWAYS: [&str; 3] = ["gw-1:7000", "gw-2:7000", "gw-3:7000"];
const BOUND_WITHIN: Duration = Duration::from_secs(20);
/// A script that waits for what never comes says so itself, long before.
const SCRIPT_LIMIT: Duration = Duration::from_secs(400);
/// A registry that does not answer is asked once more.
const NPM_LIMIT: &str = "180s";
/// Gateways are late soon; one that is only slow on a busy machine is not.
const PACE: &[(&str, &str)] = &[
    ("GATEWAY__HEARTBEAT_INTERVAL", "1000"),
    ("GATEWAY__LEASE", "6000"),
    ("GATEWAY__DOUBT_FOR", "300000"),
    ("DRAIN__CLOSE_AFTER", "1"),
    ("DRAIN__SETTLE", "1"),
    ("STATUS__RATE", "0"),
    ("CONSOLE__GRAFANA_URL", "https://grafana.example/d/im-presence"),
];

/// Where the scripts find what npm has installed: beside what cargo has built.
static MODULES: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("console");
    fs::create_dir_all(&directory).expect("make a directory");
    let (lock, installed) = (package().join("tests/console/package-lock.json"), directory.join("installed"));
    let read = |file: &Path| fs::read(file).unwrap_or_default();
    if read(&lock) != read(&installed) {
        for file in ["package.json", "package-lock.json"] {
            fs::copy(package().join("tests/console").join(file), directory.join(file)).expect("copy a file");
        }
        let install = || {
            let words = [NPM_LIMIT, "npm", "ci", "--no-audit", "--no-fund"];
            let npm = Command::new("timeout").args(words).current_dir(&directory).status();
            npm.expect("timeout, of coreutils").success()
        };
        assert!(install() || install(), "npm (tests/run installs it) ci in {directory:?}, twice, each within {NPM_LIMIT}");
        fs::copy(&lock, &installed).expect("copy a file"); // when all of it is there
    }
    directory
});

/// Everything that a page can show, running.
struct Stage {
    cluster: Cluster,
    gateways: Vec<Running>,
    pki: Pki,
    is_guarded: bool,
    /// A browser takes the machine; and gateways are late when others take it.
    _alone: SemaphorePermit<'static>,
}

/// `im-presence ctl gateway`, or a script.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        self.0.wait().expect("wait for it");
    }
}

impl Stage {
    /// Nobody has to sign in.
    async fn open() -> Self {
        Self::set(false, &[], 1).await
    }

    /// Everybody needs a token.
    async fn guarded() -> Self {
        Self::set(true, &[], 1).await
    }

    /// The first gateway has so many users, the others one each.
    async fn set(is_guarded: bool, more: &[(&str, &str)], users: i64) -> Self {
        let _alone = heavy().await;
        let pki = Pki::new();
        let mut entries = String::new();
        for role in Role::ALL {
            let gateways = if role == Role::Gateway { "gateways = [\"*\"]" } else { "" };
            let (token, entry) = token(role.name(), role.name(), gateways);
            pki.write(role.name(), &format!("{token}\n"));
            entries.push_str(&entry);
        }
        let tokens = pki.write("tokens.toml", &entries);
        let node_token = pki.path("node");
        let guard = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", text(&tokens)), ("PEER__TOKEN_FILE", text(&node_token))];
        let guard = if is_guarded { &guard[..] } else { &[] };
        let mut cluster = Cluster::with_redis(0, &[]).await;
        for name in ["node-1", "node-2"] {
            cluster.add_node(&[PACE, guard, &[("PRESENCE_SERVICE__NODE_ID", name)], more].concat()).await;
        }
        let mut stage = Self { cluster, gateways: Vec::new(), pki, is_guarded, _alone };
        for (n, addr) in (0..).zip(GATEWAYS) {
            let bound = if n == 0 { (1..=users).collect() } else { vec![users + n] };
            stage.start_gateway(addr, &bound);
        }
        stage.everybody_is_bound(users + 2).await;
        stage
    }

    fn start_gateway(&mut self, addr: &str, users: &[i64]) {
        let node = &self.cluster.nodes[self.gateways.len() % 2];
        let mut command = Command::new(PROGRAM);
        command.args(["ctl", "gateway", "--device", "phone", addr]).args(users.iter().map(i64::to_string));
        command.env("IM_PRESENCE_ADDR", node.data.to_string());
        if self.is_guarded {
            command.env("IM_PRESENCE_TOKEN_FILE", self.pki.path("gateway"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.gateways.push(Running(process::spawn(command).expect("start a gateway")));
    }

    async fn everybody_is_bound(&self, users: i64) {
        let bound = async || self.cluster.db.number("SELECT COUNT(*) FROM routes").await == users;
        eventually("all users are bound", BOUND_WITHIN, bound).await;
    }

    /// Runs `tests/console/<case>.mjs`, which has to succeed.
    async fn play(&self, case: &str) {
        let said = self.pki.path("said");
        let [out, err] = [(); 2].map(|()| fs::File::options().create(true).append(true).open(&said).expect("make a file"));
        let mut command = Command::new("node");
        command.arg(package().join(format!("tests/console/{case}.mjs"))).envs(self.environment());
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let mut script = Running(process::spawn(command).expect("node: tests/run installs it"));
        let began = Instant::now();
        let ended = loop {
            let ended = script.0.try_wait().expect("look after the script");
            if ended.is_some() || began.elapsed() > SCRIPT_LIMIT {
                break ended;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        let said = fs::read_to_string(said).expect("what it said");
        println!("{said}");
        assert!(ended.is_some_and(|status| status.success()), "{case}: {ended:?}\n{said}");
    }

    fn environment(&self) -> HashMap<&'static str, String> {
        let join = |parts: &mut dyn Iterator<Item = String>| parts.collect::<Vec<_>>().join(" ");
        let nodes = &self.cluster.nodes;
        let token = |role: &str| fs::read_to_string(self.pki.path(role)).expect("a token").trim_end().to_owned();
        let mut all = HashMap::from([
            ("CONSOLE_MODULES", MODULES.display().to_string()),
            ("CONSOLE_URLS", join(&mut nodes.iter().map(|node| format!("http://{}", node.admin)))),
            ("CONSOLE_NODE_PIDS", join(&mut nodes.iter().map(|node| node.pid().to_string()))),
            ("CONSOLE_GATEWAY_PIDS", join(&mut self.gateways.iter().map(|gateway| gateway.0.id().to_string()))),
            ("CONSOLE_GATEWAYS", GATEWAYS.join(" ")),
        ]);
        if std::env::var_os("IM_PRESENCE_SCREENSHOTS").is_some() {
            all.insert("CONSOLE_PICTURES", package().join("docs/console").display().to_string());
        }
        if self.is_guarded {
            all.insert("CONSOLE_TOKENS_FILE", self.pki.path("tokens.toml").display().to_string());
            all.extend([("CONSOLE_VIEWER", token("viewer")), ("CONSOLE_OPERATOR", token("operator"))]);
        }
        all
    }
}

#[tokio::test]
async fn every_page_of_the_console_shows_two_real_nodes() {
    Stage::open().await.play("pages").await;
}

#[tokio::test]
async fn every_page_is_accessible_in_light_and_in_dark() {
    Stage::open().await.play("accessible").await;
}

#[tokio::test]
async fn no_page_scrolls_sideways_from_a_phone_to_a_wall() {
    Stage::open().await.play("sizes").await;
}

#[tokio::test]
async fn the_console_can_be_used_by_keyboard_alone() {
    Stage::open().await.play("keyboard").await;
}

#[tokio::test]
async fn a_node_that_is_killed_is_shown_silent_by_itself_and_by_the_other() {
    Stage::open().await.play("killed_node").await;
}

#[tokio::test]
async fn a_hold_that_begins_is_seen_and_is_confirmed_on_the_console() {
    Stage::open().await.play("hold").await;
}

#[tokio::test]
async fn a_drain_is_ordered_on_the_console_and_its_number_reaches_0() {
    let users = if long() { 1_000 } else { 200 };
    Stage::set(false, &[], users).await.play("drain").await;
}

#[tokio::test]
async fn a_viewer_sees_no_buttons_and_is_refused_by_the_api() {
    Stage::guarded().await.play("viewer").await;
}

#[tokio::test]
async fn a_token_that_is_revoked_while_the_page_is_open_leads_to_the_login_form() {
    Stage::guarded().await.play("revoked").await;
}

/// Text that would be a script if it were parsed.
const EVIL: &str = "<img/src=x/onerror=alert(1)>";

#[tokio::test]
async fn hostile_text_in_every_field_stays_text() {
    let name: &[(&str, &str)] = &[("NODE__ZONE", EVIL), ("GATEWAY__LEASE", "3600000")];
    let mut stage = Stage::set(false, name, 1).await;
    let evil = |what: &str| format!("{EVIL}{what}");
    let mut named: Settings = settings(&[&[("PRESENCE_SERVICE__NODE_ID", &*evil("node"))], PACE].concat());
    named.retain(|(key, _)| key != "GATEWAY__LEASE");
    let named: Vec<(&str, &str)> = named.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    stage.cluster.add_node(&[&named[..], name].concat()).await;
    let node = stage.cluster.nodes.last().expect("a node");
    let gateway = format!("{EVIL}:7000");
    let registration = RegisterGatewayReq {
        gateway_addr: gateway.clone(),
        region: evil("region").chars().filter(|c| !"/".contains(*c)).take(64).collect(),
        capacity: 10,
        labels: HashMap::from([("label".to_owned(), evil("label"))]),
        public_addr: String::new(),
        ..Default::default()
    };
    let epoch = node.gateways().register_gateway(registration).await.expect("a registration").into_inner().gateway_epoch;
    let device = "<svg\u{22}onload=alert(1)>";
    let bind = pb::BindRouteReq { platform: Platform::Web.into(), client_ip: "::1".to_owned(), ..a_bind(ALICE, device, EVIL) };
    node.bind(on(&gateway, epoch, bind)).await;
    let wish = SetStatusReq { user_id: ALICE, text: Some(evil("<script>alert(1)</script>")), ..Default::default() };
    node.presence().set_status(wish).await.expect("a status");
    stage.play("hostile").await;
}
