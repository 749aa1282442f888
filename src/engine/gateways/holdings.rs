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

    /// As it said with its last heartbeat.
    pub fn said(&self) -> Sum {
        self.lock().said.unwrap_or_default()
    }

    /// The look is over.
    pub fn looked_at(&self, verdict: Option<String>) {
        let mut state = self.lock();
        state.is_looked_at = false;
        state.verdict = verdict.map(|verdict| (Instant::now(), verdict)).or(state.verdict.take());
    }

    /// What came of the last look, for a person to read. Empty: the gateway gives no digest.
    pub fn report(&self) -> String {
        let state = self.lock();
        match (&state.verdict, state.said) {
            (Some((at, verdict)), _) => format!("{verdict}, {} s ago", at.elapsed().as_secs()),
            (None, Some(_)) => "not compared yet".to_owned(),
            (None, None) => String::new(),
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

    /// Asks, and waits for the whole answer. None: it did not come in time.
    pub async fn ask(&self, query: Query) -> Option<Asked> {
        let (answer, answered) = oneshot::channel();
        let seq = {
            let mut state = self.lock();
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
