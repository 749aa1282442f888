//! Files that are read again while the node runs. Their content is compared, not their times, and nobody watches directories:
//! Kubernetes swaps links, others write in place, and both set whatever time they like.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tracing::info;
use tracing::warn;

use crate::metrics::Metrics;
use crate::security::audit::Audit;
use crate::security::audit::Entry;

/// Between two looks at the files; after a look that failed, sooner.
pub const READ_INTERVAL: Duration = Duration::from_secs(5);
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Two files are seldom written at the same instant: until then a pair that does not fit is no mistake.
const SETTLE_TIME: Duration = Duration::from_secs(3);
/// Largest file that is taken.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// Why files cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// From the content of files to what is made of it.
type Make<T> = dyn Fn(&[Vec<u8>]) -> Result<T, Unusable> + Send + Sync;
/// One look at some files.
type Again = dyn Fn(&Metrics, &Audit) -> Look + Send + Sync;

/// What is made of some files: always the newest that was good.
pub struct Reloaded<T> {
    /// What it is, for the log and the metrics.
    what: &'static str,
    files: Vec<PathBuf>,
    make: Box<Make<T>>,
    current: ArcSwap<T>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    contents: Vec<Vec<u8>>,
    bad: Option<Bad>,
}

/// Content that cannot be used, or an error of reading.
struct Bad {
    contents: Result<Vec<Vec<u8>>, Unusable>,
    since: Instant,
    was_said: bool,
}

impl<T: Send + Sync + fmt::Display + 'static> Reloaded<T> {
    /// # Errors
    /// A file cannot be read, or is not what it should be.
    pub fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        make: impl Fn(&[Vec<u8>]) -> Result<T, Unusable> + Send + Sync + 'static,
    ) -> Result<Arc<Self>, Unusable> {
        let contents = read(&files)?;
        let current = ArcSwap::from_pointee(make(&contents)?);
        info!("{what}: {}", current.load());
        let seen = Mutex::new(Seen { contents, bad: None });
        Ok(Arc::new(Self { what, files, make: Box::new(make), current, seen }))
    }

    pub fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Reads the files, and takes over what they say if it is new and good.
    fn look(&self, metrics: &Metrics, audit: &Audit) -> Look {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = read(&self.files);
        if contents.as_ref().is_ok_and(|contents| *contents == seen.contents) {
            seen.bad = None;
            return Look::Same;
        }
        let made = contents.clone().and_then(|contents| (self.make)(&contents));
        match (made, contents) {
            (Ok(made), Ok(contents)) => {
                info!("{}: read again: {made}", self.what);
                metrics.security.reloaded(self.what, "ok");
                audit.note(self.noted("ok", made.to_string()));
                self.current.store(Arc::new(made));
                *seen = Seen { contents, bad: None };
                Look::New
            }
            (Err(why), contents) => {
                let before = seen.bad.take().filter(|bad| bad.contents == contents);
                let mut bad = before.unwrap_or_else(|| Bad { contents, since: Instant::now(), was_said: false });
                if !bad.was_said && bad.since.elapsed() >= SETTLE_TIME {
                    bad.was_said = true;
                    warn!("{}: cannot be used, what was read before stays in force: {why}", self.what);
                    metrics.security.reloaded(self.what, "failed");
                    audit.note(self.noted("failed", why.to_string()));
                }
                seen.bad = Some(bad);
                Look::Bad
            }
            (Ok(_), Err(_)) => Look::Bad, // nothing is made of what was not read
        }
    }
}

impl<T> Reloaded<T> {
    fn noted(&self, outcome: &'static str, reason: String) -> Entry {
        Entry { action: "reload".to_owned(), target: self.what.to_owned(), outcome, reason, ..Entry::default() }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Same,
    New,
    Bad,
}

/// Everything that is read again, and who wants to know of it.
pub struct Reloader {
    all: Vec<Box<Again>>,
    generation: Generation,
    metrics: Arc<Metrics>,
    audit: Audit,
}

/// Counts how often something new was read.
#[derive(Clone, Default)]
pub struct Generation {
    /// The same number: each call reads it, and must not write for that.
    now: Arc<AtomicU64>,
    changed: watch::Sender<u64>,
}

impl Generation {
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }

    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn next(&self) {
        self.now.fetch_add(1, Ordering::Release);
        self.changed.send_modify(|count| *count += 1);
    }
}

impl Reloader {
    pub fn new(metrics: Arc<Metrics>, audit: Audit) -> Self {
        Self { all: Vec::new(), generation: Generation::default(), metrics, audit }
    }

    pub fn add<T: Send + Sync + fmt::Display + 'static>(&mut self, reloaded: &Arc<Reloaded<T>>) {
        self.metrics.security.reloads_begin(reloaded.what);
        let reloaded = reloaded.clone();
        self.all.push(Box::new(move |metrics, audit| reloaded.look(metrics, audit)));
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn generation(&self) -> Generation {
        self.generation.clone()
    }

    /// One look at all files. Returns when the next one is due.
    pub fn step(&self) -> Duration {
        let looks: Vec<Look> = self.all.iter().map(|look| look(&self.metrics, &self.audit)).collect();
        if looks.contains(&Look::New) {
            self.generation.next();
        }
        if looks.contains(&Look::Bad) { READ_AGAIN } else { READ_INTERVAL }
    }
}

fn read(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, Unusable> {
    files.iter().map(read_one).collect()
}

fn read_one(path: &PathBuf) -> Result<Vec<u8>, Unusable> {
    let unusable = |why: &dyn fmt::Display| Unusable(format!("{}: {why}", path.display()));
    let length = fs::metadata(path).map_err(|error| unusable(&error))?.len();
    if length > MAX_FILE_BYTES {
        return Err(unusable(&format_args!("must be at most {MAX_FILE_BYTES} bytes, is {length}")));
    }
    fs::read(path).map_err(|error| unusable(&error))
}
