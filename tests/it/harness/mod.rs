//! What the tests run on. Everything started here ends with the test process, however that ends.

pub mod cluster;
#[cfg(feature = "otlp")]
pub mod collector;
pub mod galera;
pub mod gateway;
pub mod mariadb;
pub mod mysql_front;
pub mod node;
pub mod orders;
pub mod pki;
pub mod ports;
pub mod process;
pub mod prometheus;
pub mod proxy;
pub mod redis;
pub mod redis_cluster;
pub mod redis_proxy;
pub mod replicas;
pub mod sentinel;
pub mod stream;
pub mod switch;
pub mod traffic;
pub mod watcher;

use std::time::Duration;
use std::time::Instant;

use tokio::sync::Semaphore;
use tokio::sync::SemaphorePermit;

/// Between looks at something that announces nothing.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// One at a time: tests that load the machine, or measure it.
static HEAVY: Semaphore = Semaphore::const_new(1);

/// Waits for the turn of a test that needs the machine for itself; it lasts until dropped.
pub async fn heavy() -> SemaphorePermit<'static> {
    HEAVY.acquire().await.expect("the semaphore is never closed")
}

/// Whether to run the long forms of the fault tests.
pub fn long() -> bool {
    std::env::var_os("IM_PRESENCE_LONG").is_some_and(|value| value == "1")
}

/// How long the product may take for what it promises within `promised`. The short form of the tests shares the machine with
/// other tests and with strangers; the long form takes each promise at its word.
pub fn allowed(promised: Duration) -> Duration {
    if long() { promised } else { 4 * promised }
}

/// Asks again until the answer is yes, which must be so in the time [`allowed`] for it.
pub async fn eventually(what: &str, deadline: Duration, mut ask: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !ask().await {
        assert!(began.elapsed() < allowed(deadline), "not within {deadline:?}: {what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// The value that this share of `values` does not exceed.
pub fn percentile(values: &mut [Duration], share: f64) -> Duration {
    values.sort_unstable();
    values.get(((values.len() as f64 - 1.0) * share).round().max(0.0) as usize).copied().unwrap_or_default()
}
