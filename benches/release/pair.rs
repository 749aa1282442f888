//! Two nodes of one build on stores of their own: what they bind, deliver and tell.

use std::sync::Arc;
use std::time::Duration;

use crate::harness::cluster::TestDb;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::load::binds;
use crate::load::book::Book;
use crate::load::delivering;
use crate::load::delivering::Receipts;
use crate::load::delivering::USERS;
use crate::load::watching::Shape;
use crate::load::watching::Watchers;

/// Nobody beats here, everybody may change as often as they like, and no delivery is tried again.
const SETTINGS: [(&str, &str); 4] = [
    ("GATEWAY__LEASE", "3600000"),
    ("GATEWAY__HEARTBEAT_INTERVAL", "1000000"),
    ("ROUTE__MAX_RETRIES", "0"),
    ("STATUS__RATE", "0"),
];
/// Each round attaches another one: a stream that is not read is not left open, since nobody answers its pings.
const BINDERS: &str = "gw-binds";
/// Who binds by calls.
const BINDER: &str = "gw-calls:7000";
const BIND_CALLS: (u64, u64) = (8, 64);
const BIND_FRAMES: u64 = 64;
/// Who is bound while it is measured; each round others, and none who gets messages.
const FIRST_BOUND: u64 = 100_000_000;
/// All streams watch those who get messages.
const FANS: Shape = Shape { connections: 10, streams: 10, users: 2 * USERS as u64 };
/// Less than a node can tell: what is asked is what it costs.
const CHANGES_A_SECOND: f64 = 500.0;
const PAUSE: Duration = Duration::from_millis(300);
const TOLD_WITHIN: Duration = Duration::from_secs(60);

pub struct Pair {
    here: Node,
    elsewhere: Node,
    receipts: Arc<Receipts>,
    watchers: Watchers,
    book: Arc<Book>,
    next_bound: u64,
    _db: TestDb,
    _redis: RedisServer,
}

/// One round's: by the second, and microseconds of CPU.
pub struct Speeds {
    pub binds: f64,
    pub frames: f64,
    pub delivered_here: f64,
    pub delivered_elsewhere: f64,
    pub delivered_to_subscriber: f64,
    pub micros_per_telling: f64,
}

impl Pair {
    /// With gateways that read, one that subscribes, and who watches. There is room for changes of so much time.
    pub async fn start(program: &str, time: Duration) -> Self {
        let (db, redis) = (TestDb::mariadb(MariaDb::shared()).await, RedisServer::start());
        let port = redis.port.to_string();
        let settings = db.settings(&[&[("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)], &SETTINGS[..]].concat());
        let here = Node::start_as(vec![program.to_owned()], settings.clone()).await;
        let elsewhere = Node::start_as(vec![program.to_owned()], settings).await;
        let receipts = Receipts::new();
        for (node, addr, first) in [(&here, "gw-0:7000", 1), (&elsewhere, "gw-1:7000", USERS + 1)] {
            delivering::attach(node, addr, first, &receipts).await;
        }
        delivering::subscribe(&here, &redis, 2 * USERS + 1, &receipts).await;
        let watchers = Watchers::open(elsewhere.data, FANS, |_, _, _| ()).await;
        watchers.watch(|_| FANS.users_of(0)).await;
        let book = Book::new((CHANGES_A_SECOND * time.as_secs_f64()) as u64 + 1, 1..FANS.users + 1);
        let next_bound = FIRST_BOUND;
        Self { here, elsewhere, receipts, watchers, book, next_bound, _db: db, _redis: redis }
    }

    pub async fn speeds(&mut self, time: Duration) -> Speeds {
        let first = self.next_bound;
        self.next_bound += 20_000_000;
        let calls = binds::by_calls(&self.here, BINDER, BIND_CALLS, first, time).await;
        let stream = binds::attach(&self.here, &format!("{BINDERS}-{first}:7000")).await;
        let (frames, _) = binds::by_frames(stream, BIND_FRAMES, first + 10_000_000, time).await;
        Speeds {
            binds: calls.per_second(),
            frames: frames.per_second(),
            delivered_here: delivering::deliver(&self.here, 1, time, &self.receipts).await.0,
            delivered_elsewhere: delivering::deliver(&self.here, USERS + 1, time, &self.receipts).await.0,
            delivered_to_subscriber: delivering::deliver(&self.here, 2 * USERS + 1, time, &self.receipts).await.0,
            micros_per_telling: self.micros_per_telling(time).await,
        }
    }

    /// Users change here; the other node tells, and what it had to do for one telling is what counts.
    async fn micros_per_telling(&self, time: Duration) -> f64 {
        self.watchers.quiet(PAUSE, TOLD_WITHIN).await;
        let (told, cpu) = (self.watchers.told(), self.elsewhere.cpu_time());
        self.book.change(&self.here, CHANGES_A_SECOND, time).await;
        self.watchers.quiet(PAUSE, TOLD_WITHIN).await;
        let told = self.watchers.told() - told;
        (self.elsewhere.cpu_time() - cpu).as_secs_f64() * 1e6 / told.max(1) as f64
    }
}
