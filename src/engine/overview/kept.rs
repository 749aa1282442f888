//! A reading that takes a moment, shared by those who ask for it. It goes on without them: whoever asks again finds it done.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::error::Error;

type Read<T> = dyn Fn() -> BoxFuture<'static, Result<T, Error>> + Send + Sync;
type Done<T> = Option<Result<Arc<T>, Error>>;

/// The last reading, and the one that is under way.
pub struct Kept<T> {
    read: Box<Read<T>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// When it was begun, and what it found.
    last: Option<(Instant, Arc<T>)>,
    under_way: Option<UnderWay<T>>,
}

struct UnderWay<T> {
    began: Instant,
    done: watch::Receiver<Done<T>>,
    _task: AbortOnDropHandle<()>,
}

impl<T: Send + Sync + 'static> Kept<T> {
    /// Does not read yet.
    pub fn new(read: impl Fn() -> BoxFuture<'static, Result<T, Error>> + Send + Sync + 'static) -> Self {
        Self { read: Box::new(read), state: Mutex::new(State { last: None, under_way: None }) }
    }

    /// What was read at most `max_age` ago.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn newest(&self, max_age: Duration) -> Result<Arc<T>, Error> {
        match self.look(max_age, max_age) {
            Ok(known) => Ok(known),
            Err(done) => wait(done).await,
        }
    }

    /// What was read at most `usable` ago, without waiting for it. If that is older than `fresh`, it is read again for those
    /// who ask next. Whoever comes first has to wait.
    ///
    /// # Errors
    /// Those of reading.
    pub async fn recent(&self, fresh: Duration, usable: Duration) -> Result<Arc<T>, Error> {
        match self.look(fresh, usable) {
            Ok(known) => Ok(known),
            Err(done) => wait(done).await,
        }
    }

    /// What was read last, however long ago.
    pub fn last(&self) -> Option<Arc<T>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last.as_ref().map(|(_, known)| known.clone())
    }

    fn look(&self, fresh: Duration, usable: Duration) -> Result<Arc<T>, watch::Receiver<Done<T>>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(under_way) = &state.under_way {
            let (began, done) = (under_way.began, under_way.done.borrow().clone());
            let broke_off = under_way.done.has_changed().is_err();
            match done {
                Some(Ok(found)) => (state.last, state.under_way) = (Some((began, found)), None),
                Some(Err(_)) => state.under_way = None,
                None if broke_off => state.under_way = None,
                None => {}
            }
        }
        let age = state.last.as_ref().map(|(began, _)| began.elapsed());
        if age.is_none_or(|age| age >= fresh) && state.under_way.is_none() {
            state.under_way = Some(self.begin());
        }
        if let Some((began, known)) = &state.last
            && began.elapsed() < usable
        {
            return Ok(known.clone());
        }
        Err(state.under_way.get_or_insert_with(|| self.begin()).done.clone())
    }

    fn begin(&self) -> UnderWay<T> {
        let (doing, done) = watch::channel(None);
        let reading = (self.read)();
        let task = tokio::spawn(async move {
            let found = reading.await.map(Arc::new);
            doing.send_replace(Some(found));
            doing.closed().await; // so that who comes later does not take it for broken off
        });
        UnderWay { began: Instant::now(), done, _task: AbortOnDropHandle::new(task) }
    }
}

async fn wait<T>(mut done: watch::Receiver<Done<T>>) -> Result<Arc<T>, Error> {
    let found = done.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
    found.unwrap_or_else(|| Err(Error::unavailable("this node stops")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering;

    const LONG: Duration = Duration::from_secs(600);

    fn counting() -> (Arc<AtomicU32>, Kept<u32>) {
        let reads = Arc::new(AtomicU32::new(0));
        let counted = reads.clone();
        let kept = Kept::new(move || {
            let counted = counted.clone();
            async move {
                tokio::task::yield_now().await;
                Ok(counted.fetch_add(1, Ordering::Relaxed) + 1)
            }
            .boxed()
        });
        (reads, kept)
    }

    #[tokio::test]
    async fn those_who_ask_at_the_same_time_share_a_reading() {
        let (reads, kept) = counting();
        let (one, other) = tokio::join!(kept.newest(LONG), kept.newest(LONG));
        assert_eq!((*one.unwrap(), *other.unwrap()), (1, 1));
        assert_eq!(*kept.newest(LONG).await.unwrap(), 1, "it is good for a while");
        assert_eq!(*kept.newest(Duration::ZERO).await.unwrap(), 2);
        assert_eq!(reads.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn what_is_not_fresh_is_told_at_once_and_read_again_for_the_next() {
        let (_, kept) = counting();
        assert_eq!(*kept.recent(Duration::ZERO, LONG).await.unwrap(), 1, "the first has to wait");
        assert_eq!(*kept.recent(Duration::ZERO, LONG).await.unwrap(), 1);
        while *kept.recent(LONG, LONG).await.unwrap() == 1 {
            tokio::task::yield_now().await;
        }
        assert_eq!(*kept.recent(LONG, LONG).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn an_error_is_told_and_not_kept() {
        let reads = Arc::new(AtomicU32::new(0));
        let counted = reads.clone();
        let kept: Kept<u32> = Kept::new(move || {
            let n = counted.fetch_add(1, Ordering::Relaxed);
            async move { if n == 0 { Err(Error::unavailable("not yet")) } else { Ok(n) } }.boxed()
        });
        assert!(kept.newest(LONG).await.is_err());
        assert_eq!(*kept.newest(LONG).await.unwrap(), 1);
    }
}
