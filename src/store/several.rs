//! Asks several servers at once.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;
use tokio::time::sleep_until;

/// How long the others may take once one has given an answer that is good: one that stands still must hold up nobody.
const AFTER_THE_FIRST: Duration = Duration::from_millis(100);

/// What was answered, in the order of arrival, by the time all have or [`AFTER_THE_FIRST`] good one.
pub async fn ask_all<T>(asks: impl Iterator<Item = impl Future<Output = T>>, is_good: impl Fn(&T) -> bool) -> Vec<T> {
    let (mut asks, mut answers, mut until) = (asks.collect::<FuturesUnordered<_>>(), Vec::new(), None);
    loop {
        let answer = match until {
            None => asks.next().await,
            Some(until) => tokio::select! {
                answer = asks.next() => answer,
                () = sleep_until(until) => None,
            },
        };
        let Some(answer) = answer else { return answers };
        if until.is_none() && is_good(&answer) {
            until = Some(Instant::now() + AFTER_THE_FIRST);
        }
        answers.push(answer);
    }
}
