//! TLS to MariaDB and to Redis, passwords in files, and secrets that show nowhere.

use std::process::Command;
use std::time::Duration;

use im_presence::pb::Code;
use sqlx::AssertSqlSafe;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::connect;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::mysql_front::MySqlFront;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::settings;
use crate::harness::pki::Pki;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::redis::RedisServer;

/// Has what URLs and shells stumble over.
const PASSWORD: &str = "p@ss:/w?rd#%20s3cret";

/// A server that takes no plaintext, with a user whose password is [`PASSWORD`].
async fn secure_mariadb(pki: &Pki, names: &[&str]) -> (MariaDb, TestDb) {
    let pair = pki.ca("sql").issue("mariadb", names);
    let server = MariaDb::start_with(vec![
        format!("--ssl-cert={}", text(&pair.cert)),
        format!("--ssl-key={}", text(&pair.key)),
        "--require-secure-transport=ON".to_owned(),
    ]);
    let db = TestDb::mariadb(&server).await;
    let mut connection = connect(&db.url).await;
    for sql in [format!("CREATE USER app IDENTIFIED BY '{PASSWORD}'"), format!("GRANT ALL ON {}.* TO app", db.name())] {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.expect("a user");
    }
    (server, db)
}

/// Why a node with these settings does not start.
fn refusal(more: &[(&str, &str)]) -> String {
    let mut command = Command::new(PROGRAM);
    command.env("IM_PRESENCE__PRESENCE_SERVICE__PORT", "0").env("IM_PRESENCE__ADMIN__PORT", "0");
    command.envs(more.iter().map(|(key, value)| (format!("IM_PRESENCE__{key}"), value)));
    let output = command.output().expect("run im-presence");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn the_database_is_reached_over_tls_and_has_to_prove_who_it_is() {
    let pki = Pki::new();
    let (server, db) = secure_mariadb(&pki, &["localhost"]).await;
    let (port, ca) = (server.port.to_string(), pki.path("sql.pem"));
    let password = pki.write("password", &format!("{PASSWORD}\n"));
    let at = |host: &'static str| {
        let (port, database) = (port.clone(), db.name().to_owned());
        let password = text(&password).to_owned();
        move |more: &[(&str, &str)]| {
            let keys = [
                ("STORE__HOST", host),
                ("STORE__PORT", &port),
                ("STORE__USER", "app"),
                ("STORE__DATABASE", &database),
                ("STORE__PASSWORD_FILE", &password),
            ];
            settings(&[&keys, more].concat())
        }
    };
    let node = Node::start(at("localhost")(&[("STORE__CA_FILE", text(&ca)), ("STORE__TLS", "verify_full")])).await;
    assert_eq!(code(&node.bind(a_bind(ALICE, PHONE, "c")).await.result), Code::Ok);
    let log = node.log().join("\n");
    assert!(log.contains("to the database: TLS (TLS_") && log.contains("has proved who it is"), "{log}");
    let unverified = Node::start(at("localhost")(&[])).await;
    eventually("it warns", Duration::from_secs(5), async || unverified.log().join("\n").contains("nobody has verified")).await;

    let refused = |host: &'static str, more: &[(&str, &str)]| {
        let all = at(host)(more);
        refusal(&all.iter().map(|(key, value)| (&**key, &**value)).collect::<Vec<_>>())
    };
    pki.ca("other");
    let other = pki.path("other.pem");
    let why = refused("localhost", &[("STORE__CA_FILE", text(&other)), ("STORE__TLS", "verify_ca")]);
    assert!(why.contains("UnknownIssuer") || why.to_lowercase().contains("certificate"), "{why}");
    let why = refused("127.0.0.1", &[("STORE__CA_FILE", text(&ca))]);
    assert!(why.to_lowercase().contains("certificate"), "a name that is not in it: {why}");
    let why = refused("localhost", &[("STORE__TLS", "disabled")]);
    assert!(why.contains("secure") || why.contains("3159") || why.contains("1045"), "{why}");
    for secret in [PASSWORD, "s3cret"] {
        assert!(!why.contains(secret) && !log.contains(secret));
    }
}

#[tokio::test]
async fn a_password_that_was_changed_is_read_again() {
    let pki = Pki::new();
    let (server, db) = secure_mariadb(&pki, &["localhost"]).await;
    let file = pki.write("password", PASSWORD);
    let port = server.port.to_string();
    let node = Node::start(settings(&[
        ("STORE__HOST", "127.0.0.1"),
        ("STORE__PORT", &port),
        ("STORE__USER", "app"),
        ("STORE__DATABASE", db.name()),
        ("STORE__PASSWORD_FILE", text(&file)),
    ]))
    .await;
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut root = connect(&db.url).await;
    sqlx::raw_sql("ALTER USER app IDENTIFIED BY 'another'").execute(&mut root).await.expect("a new password");
    pki.write("password", "another");
    let kill = "SELECT GROUP_CONCAT(CONCAT('KILL ', id) SEPARATOR ';') FROM information_schema.processlist WHERE user = 'app'";
    let kills: String = sqlx::query_scalar(kill).fetch_one(&mut root).await.expect("its connections");
    for one in kills.split(';') {
        let _ = sqlx::raw_sql(AssertSqlSafe(one.to_owned())).execute(&mut root).await; // some end by themselves
    }
    eventually("it connects with the new password", Duration::from_secs(10), async || {
        node.try_bind(a_bind(ALICE, PHONE, "d")).await.is_ok_and(|bound| code(&bound.result) == Code::Ok)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")] // the front runs while a process is waited for
async fn mysql_logs_in_with_its_own_plugin_over_tls() {
    let (pki, server) = (Pki::new(), MariaDb::shared());
    let (ca, password) = (pki.ca("mysql"), pki.write("password", PASSWORD));
    let pair = ca.issue("mysql", &["127.0.0.1"]);
    for switches in [false, true] {
        let db = TestDb::mariadb(server).await;
        let front = MySqlFront::start(server.port, PASSWORD, switches, &pair).await;
        let port = front.port.to_string();
        let keys = |password_file| {
            [
                ("STORE__HOST", "127.0.0.1"),
                ("STORE__PORT", &*port),
                ("STORE__USER", "app"),
                ("STORE__DATABASE", db.name()),
                ("STORE__PASSWORD_FILE", password_file),
                ("STORE__CA_FILE", text(&ca.file)),
            ]
        };
        let node = Node::start(settings(&keys(text(&password)))).await;
        assert_eq!(code(&node.bind(a_bind(ALICE, PHONE, "c")).await.result), Code::Ok);
        let (fast, full) = front.logins();
        assert!(full >= 1 && fast >= 2, "the password went once or twice, then its scramble: {fast} {full}, {switches}");
        let wrong = pki.write("wrong", "wrong");
        let why = refusal(&keys(text(&wrong)));
        assert!(why.contains("Access denied") || why.contains("1045"), "{why}");
    }
    let front = MySqlFront::start(server.port, PASSWORD, false, &pair).await;
    let (url, port) = (format!("mysql://app@127.0.0.1:{}/im", front.port), front.port.to_string());
    let why = refusal(&[
        ("STORE__HOST", "127.0.0.1"),
        ("STORE__PORT", &port),
        ("STORE__USER", "app"),
        ("STORE__DATABASE", "im"),
        ("STORE__PASSWORD_FILE", text(&password)),
        ("STORE__TLS", "disabled"),
    ]);
    assert!(why.contains("TLS") || why.contains("RSA"), "{url}: {why}");
}

#[tokio::test]
async fn redis_is_reached_over_tls_with_a_certificate_of_our_own() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("redis");
    let (server_pair, own) = (ca.issue("server", &["127.0.0.1"]), ca.issue("own", &["node"]));
    let port = free_port().to_string();
    let options = ["--tls-port", &port, "--tls-cert-file", text(&server_pair.cert), "--tls-key-file", text(&server_pair.key)];
    let options = [&options[..], &["--tls-ca-cert-file", text(&ca.file), "--tls-auth-clients", "yes"]].concat();
    let server = RedisServer::start_with(options.into_iter().map(str::to_owned).collect());
    let password = pki.write("password", PASSWORD);
    let of = |section: &str, more: &[(&str, &str)]| {
        let keys = [("HOST", "127.0.0.1"), ("PORT", &*port), ("TLS", "true"), ("CA_FILE", text(&ca.file))];
        let all = keys.iter().chain(more).map(|(key, value)| (format!("{section}__{key}"), (*value).to_owned()));
        all.collect::<Vec<_>>()
    };
    server.client().await.run::<()>(&["CONFIG", "SET", "requirepass", PASSWORD]).await;
    let shown = [("CERT_FILE", text(&own.cert)), ("KEY_FILE", text(&own.key)), ("PASSWORD_FILE", text(&password))];
    let mut all = db.settings(&[]);
    all.extend(of("REDIS_CACHE", &shown));
    all.extend(of("REDIS_QUEUE", &shown));
    let node = Node::start(all).await;
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    eventually("both work", Duration::from_secs(10), async || {
        node.degraded().await.is_empty() && node.metric("im_presence_redis_up").await == 2.0
    })
    .await;
    let another = TestDb::sqlite();
    let mut without = another.settings(&[]);
    without.extend(of("REDIS_CACHE", &[]));
    let without = Node::start(without).await;
    eventually("without a certificate it is down", Duration::from_secs(10), async || {
        without.degraded().await.contains(&"redis_cache".to_owned())
    })
    .await;
}

#[tokio::test]
async fn no_secret_shows_in_logs_metrics_rows_or_the_command_line() {
    let pki = Pki::new();
    let (server, db) = secure_mariadb(&pki, &["localhost"]).await;
    let (bearer, entry) = token("ops", "operator", "");
    let (nodes, node_entry) = token("nodes", "node", "");
    let tokens = pki.write("tokens.toml", &[entry, node_entry].concat());
    let (ops, peers) = (pki.write("ops", &bearer), pki.write("nodes", &nodes));
    let (password, pair, port) =
        (pki.write("password", PASSWORD), pki.ca("ca").issue("node", &["127.0.0.1"]), server.port.to_string());
    let keys = [
        ("STORE__HOST", "127.0.0.1"),
        ("STORE__PORT", &port),
        ("STORE__USER", "app"),
        ("STORE__DATABASE", db.name()),
        ("STORE__PASSWORD_FILE", text(&password)),
        ("TLS__CERT_FILE", text(&pair.cert)),
        ("TLS__KEY_FILE", text(&pair.key)),
        ("AUTH__MODE", "token"),
        ("AUTH__TOKENS_FILE", text(&tokens)),
        ("PEER__TOKEN_FILE", text(&peers)),
        ("LOG__LEVEL", "debug"),
    ];
    let node = Node::start(settings(&keys)).await;
    let (exit, said) = node.ctl(&["--token-file", text(&ops), "gateways", "hold", "10"]);
    assert_eq!(exit, 0, "{said}");
    let (_, wrong) = node.ctl(&["--token-file", text(&password), "gateways"]);
    let key = std::fs::read_to_string(&pair.key).expect("a key");
    let key = key.lines().nth(1).expect("a line of the key");
    let rows = "SELECT COUNT(*) FROM audit WHERE CONCAT_WS(' ', who, action, target, args, reason) LIKE ";
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", node.pid())).expect("a process");
    let places = [node.log().join("\n"), node.http("/metrics").await.1, line, said, wrong];
    for secret in [&*bearer, &nodes, "s3cret", key] {
        assert!(places.iter().all(|place| !place.contains(secret)), "{secret}");
        assert_eq!(db.number(&format!("{rows}'%{secret}%'")).await, 0, "{secret}");
    }
}
