//! What an attached gateway says of its connections: the digest of its last heartbeat, and answers to what it is asked. All of
//! it ends with the stream.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::domain::digest::Sum;
use crate::domain::digest::asking::Asked;
use crate::domain::digest::asking::Illegal;
use crate::domain::digest::asking::Part;
use crate::domain::digest::asking::Query;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;

/// Queries that wait for the stream.
const QUERIES: usize = 4;
/// A gateway that has not answered by then is not waited for. Its answer is taken nevertheless, and dropped.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// What a gateway holds, as far as it says.
pub struct Holdings {
    pub gateway: GatewayAddr,
    pub epoch: Epoch,
    state: Mutex<State>,
    queries: mpsc::Sender<(u64, Query)>,
}

struct State {
    /// None: it has said nothing, or says nothing now.
    said: Option<Sum>,
    /// When the last look began, or the stream.
    since: Instant,
    is_looked_at: bool,
    /// Numbers the queries.
    seq: u64,
    asked: Option<(Asked, oneshot::Sender<Asked>)>,
    /// What came of the last look.
    verdict: Option<(Instant, String)>,
}

impl Holdings {
    /// With the stream's end of what it is asked.
    pub fn new(gateway: GatewayAddr, epoch: Epoch) -> (Self, mpsc::Receiver<(u64, Query)>) {
        let (queries, to_stream) = mpsc::channel(QUERIES);
        let state = State { said: None, since: Instant::now(), is_looked_at: false, seq: 0, asked: None, verdict: None };
        (Self { gateway, epoch, state: Mutex::new(state), queries }, to_stream)
    }

    /// What the gateway said with a heartbeat. True: `interval` has passed, and a look has to begin.
    pub fn say(&self, said: Option<Sum>, interval: Duration) -> bool {
        let mut state = self.lock();
        state.said = said;
        let is_due = state.since.elapsed() >= interval && !state.is_looked_at && state.asked.is_none();
        let begins = said.is_some() && is_due;
        if begins {
            (state.is_looked_at, state.since) = (true, Instant::now());
        }
        begins
    }

    /// As it said with its last heartbeat. None: nothing; then nothing may be asked or mended.
    pub fn said(&self) -> Option<Sum> {
        self.lock().said
    }

    /// The look is over.
    pub fn looked_at(&self, verdict: Option<String>) {
        let mut state = self.lock();
        state.is_looked_at = false;
        state.verdict = verdict.map(|verdict| (Instant::now(), verdict)).or(state.verdict.take());
    }

    /// What came of the last look, for a person to read. Empty: the gateway gives no digest now.
    pub fn report(&self) -> String {
        let state = self.lock();
        match (&state.verdict, state.said) {
            (Some((at, verdict)), Some(_)) => format!("{verdict}, {} s ago", at.elapsed().as_secs()),
            (None, Some(_)) => "not compared yet".to_owned(),
            (_, None) => String::new(),
        }
    }

    /// Takes a part of an answer.
    pub fn take(&self, seq: u64, part: Part) -> Result<(), Illegal> {
        let mut state = self.lock();
        let (asked, answer) = state.asked.as_mut().ok_or(Illegal::Unasked)?;
        let is_whole = asked.take(seq, part)?;
        if answer.is_closed() {
            asked.held = Vec::new(); // nobody waits for it any more
        }
        if is_whole && let Some((asked, answer)) = state.asked.take() {
            let _ = answer.send(asked); // as above
        }
        Ok(())
    }

    /// Asks, and waits for the whole answer. None: it did not come in time, or the gateway gives no digest any more.
    pub async fn ask(&self, query: Query) -> Option<Asked> {
        let (answer, answered) = oneshot::channel();
        let seq = {
            let mut state = self.lock();
            state.said?;
            state.seq += 1;
            state.asked = Some((Asked::new(state.seq, &query)?, answer));
            state.seq
        };
        self.queries.send((seq, query)).await.ok()?;
        timeout(ANSWER_LIMIT, answered).await.ok()?.ok()
    }

    /// Says something that has no answer.
    pub async fn tell(&self, query: Query) {
        let _ = self.queries.send((0, query)).await; // if the stream has ended, so has the look
    }

    /// Returns when the stream has ended.
    pub async fn ended(&self) {
        self.queries.closed().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Option<Sum> = Some(Sum { digest: 5, routes: 1 });

    fn holdings() -> (Holdings, mpsc::Receiver<(u64, Query)>) {
        Holdings::new(GatewayAddr::parse("gw-1:7000").unwrap(), Epoch(1))
    }

    #[tokio::test]
    async fn a_look_begins_when_it_is_time_and_the_gateway_says_what_it_holds_and_one_at_a_time() {
        let (holdings, _stream) = holdings();
        assert!(!holdings.say(ONE, Duration::from_secs(3600)), "too early");
        assert_eq!(holdings.report(), "not compared yet");
        assert!(!holdings.say(None, Duration::ZERO), "it says nothing");
        assert_eq!(holdings.report(), "");
        assert!(holdings.say(ONE, Duration::ZERO));
        assert!(!holdings.say(ONE, Duration::ZERO), "one is under way");
        holdings.looked_at(Some("equal".to_owned()));
        assert_eq!(holdings.report(), "equal, 0 s ago");
        assert!(holdings.say(ONE, Duration::ZERO));
        holdings.looked_at(None);
        assert_eq!(holdings.report(), "equal, 0 s ago", "of the one before");
    }

    #[tokio::test]
    async fn an_answer_that_nobody_waits_for_any_more_is_dropped_and_only_then_a_look_begins() {
        let (holdings, mut stream) = holdings();
        holdings.say(ONE, Duration::MAX);
        assert!(timeout(Duration::from_millis(1), holdings.ask(Query::Sums)).await.is_err());
        assert_eq!(stream.recv().await, Some((1, Query::Sums)));
        assert!(!holdings.say(ONE, Duration::ZERO), "its answer would be taken for another's");
        assert_eq!(holdings.take(2, Part::default()), Err(Illegal::Unasked));
        assert_eq!(holdings.take(1, Part { more: true, ..Part::default() }), Ok(()));
        assert_eq!(holdings.take(1, Part::default()), Ok(()));
        assert_eq!(holdings.take(1, Part::default()), Err(Illegal::Unasked), "it was whole");
        assert!(holdings.say(ONE, Duration::ZERO));
    }

    #[tokio::test]
    async fn whoever_asks_is_told_when_the_answer_is_whole_or_the_stream_has_ended() {
        let (holdings, mut stream) = holdings();
        assert!(holdings.ask(Query::Sums).await.is_none(), "it has given no digest");
        holdings.say(ONE, Duration::MAX);
        let answers = async {
            let (seq, _) = stream.recv().await.unwrap();
            for (bucket, more) in [(1, true), (2, false)] {
                holdings.take(seq, Part { sums: vec![(bucket, ONE.unwrap())], more, ..Part::default() }).unwrap();
            }
        };
        let (asked, ()) = tokio::join!(holdings.ask(Query::Sums), answers);
        assert_eq!(asked.unwrap().sums.total().routes, 2);
        drop(stream);
        holdings.ended().await;
        assert!(holdings.ask(Query::Sums).await.is_none());
    }
}
