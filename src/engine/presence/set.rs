//! What one stream watches: a set of users, with what it was told last of each. Pure: time and what is shown come from outside.
//!
//! Nothing is queued but users, each at most once, so a slow reader costs nothing but its own delay: when it has room it is told
//! the newest. Two delays damp what flaps: OFFLINE is told after a while, if it still holds; and a user is told to one stream
//! only so often.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::engine::presence::shown::Shown;

/// Users for whom there is room to wait while nobody does.
const FEW: usize = 8;

/// The delays that damp what flaps.
#[derive(Clone, Copy, Debug)]
pub struct Damping {
    pub offline_delay: Duration,
    pub min_interval: Duration,
}

/// What came of one request to watch.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    pub seq: u64,
    /// Why nobody was added.
    pub refused: Option<String>,
    /// Some users could not be read.
    pub is_incomplete: bool,
}

/// What a stream is to do next.
pub enum Next {
    Tell(Telling),
    Done(Done),
    /// Nothing, until somebody changes, or until then.
    Wait(Option<Instant>),
}

/// One user, as they are shown now.
#[derive(Clone, Debug)]
pub struct Telling {
    pub user: UserId,
    pub shown: Arc<Shown>,
    /// It was told as soon as it could be: how long that took says something.
    pub is_direct: bool,
}

/// What was told of a user, in sixteen bytes.
#[derive(Clone, Copy)]
enum Pair {
    /// Nothing yet. `known` is the newest version that the caller has, `asked` the number of the request that waits for it.
    New { known: u64, asked: u32, is_queued: bool, must_tell: bool },
    /// What it looked like, and when, in milliseconds since the set began.
    Told { content: u64, at: u32, is_queued: bool, was_online: bool, waits: Waits },
}

/// Whether a user is to be looked at later.
#[derive(Clone, Copy, PartialEq)]
enum Waits {
    No,
    /// Until they may be told again.
    Interval,
    /// Until they have been offline for a while.
    Offline,
}

/// Stands for no request. Their numbers begin anew below it.
const NONE: u32 = u32::MAX;
const NUMBERS: u32 = 1 << 31;

/// A request that was not answered.
struct Asked {
    done: Done,
    /// Users of whom nothing was told yet.
    missing: usize,
}

/// What one stream watches.
pub struct Set {
    pairs: NumberMap<UserId, Pair>,
    /// Users to look at now.
    out: VecDeque<UserId>,
    /// Users to look at then.
    later: BinaryHeap<Reverse<(Instant, i64)>>,
    asked: VecDeque<Asked>,
    /// The number of the first of them.
    first: u32,
    began: Instant,
    damped: u64,
}

impl Set {
    pub fn new(began: Instant) -> Self {
        let (pairs, out, later, asked) = (NumberMap::default(), VecDeque::new(), BinaryHeap::new(), VecDeque::new());
        Self { pairs, out, later, asked, first: 0, began, damped: 0 }
    }

    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    pub fn contains(&self, user: UserId) -> bool {
        self.pairs.contains_key(&user)
    }

    /// Requests that were not answered, or whose answers wait.
    pub fn unanswered(&self) -> usize {
        self.asked.len()
    }

    /// A request that adds nobody.
    pub fn refuse(&mut self, seq: u64, why: String) {
        let done = Done { seq, refused: Some(why), is_incomplete: false };
        self.asked.push_back(Asked { done, missing: 0 });
    }

    /// Begins a request; the users that it adds follow.
    pub fn begin(&mut self, seq: u64) {
        let done = Done { seq, refused: None, is_incomplete: false };
        self.asked.push_back(Asked { done, missing: 0 });
    }

    /// Adds a user to the request that was begun last. `known`: the newest version that the caller has; 0: none.
    pub fn add(&mut self, user: UserId, known: u64) {
        let number = (self.first + u32::try_from(self.asked.len()).unwrap_or(1) - 1) % NUMBERS;
        let (earlier, is_queued) = match self.pairs.get_mut(&user) {
            Some(pair) => (pair.asked(), *pair.is_queued()),
            None => (NONE, false),
        };
        // Requests are answered in their order: who waits for an earlier one has been told by then.
        let asked = if earlier == NONE { number } else { earlier };
        self.pairs.insert(user, Pair::New { known, asked, is_queued, must_tell: known == 0 });
        if earlier == NONE
            && let Some(request) = self.asked.back_mut()
        {
            request.missing += 1;
        }
    }

    /// True: the user was in the set.
    pub fn remove(&mut self, user: UserId) -> bool {
        let Some(pair) = self.pairs.remove(&user) else { return false };
        self.answered(pair.asked(), false);
        true
    }

    /// All users, who are then watched no more.
    pub fn take_all(&mut self) -> Vec<UserId> {
        std::mem::take(&mut self.pairs).into_keys().collect()
    }

    /// Of this user something new may be shown. `certain`: this is the newest version that there is, whatever the caller knows.
    /// False: the set was waiting for a look at the user already.
    pub fn mark(&mut self, user: UserId, certain: Option<u64>) -> bool {
        let Some(pair) = self.pairs.get_mut(&user) else { return true };
        if let (Pair::New { known, must_tell, .. }, Some(newest)) = (&mut *pair, certain) {
            *must_tell |= *known > newest;
        }
        let is_first = !std::mem::replace(pair.is_queued(), true);
        if is_first {
            self.out.push_back(user);
        }
        is_first
    }

    /// The user cannot be read now: whoever waits for the answer is told so.
    pub fn give_up(&mut self, user: UserId) {
        if let Some(Pair::New { asked, .. }) = self.pairs.get_mut(&user) {
            let number = std::mem::replace(asked, NONE);
            self.answered(number, true);
        }
    }

    fn answered(&mut self, asked: u32, is_incomplete: bool) {
        let place = (asked != NONE).then(|| ((asked + NUMBERS - self.first) % NUMBERS) as usize);
        if let Some(request) = place.and_then(|place| self.asked.get_mut(place)) {
            request.missing -= 1;
            request.done.is_incomplete |= is_incomplete;
        }
    }

    /// What to do now. `shown`: what is shown of a user, if that was read.
    pub fn next(&mut self, now: Instant, damping: &Damping, shown: impl Fn(UserId) -> Option<Arc<Shown>>) -> Next {
        loop {
            if self.asked.front().is_some_and(|request| request.missing == 0)
                && let Some(request) = self.asked.pop_front()
            {
                self.first = (self.first + 1) % NUMBERS;
                return Next::Done(request.done);
            }
            let Some((user, is_direct)) = self.next_user(now) else {
                return Next::Wait(self.later.peek().map(|Reverse((due, _))| *due));
            };
            if let Some(shown) = shown(user)
                && self.is_to_tell(user, &shown, now, damping)
            {
                return Next::Tell(Telling { user, shown, is_direct });
            }
        }
    }

    /// Who is to be looked at now, and whether nothing has held that up.
    fn next_user(&mut self, now: Instant) -> Option<(UserId, bool)> {
        if self.later.peek().is_some_and(|Reverse((due, _))| *due <= now)
            && let Some(Reverse((_, user))) = self.later.pop()
            && let Ok(user) = UserId::parse(user)
        {
            if let Some(Pair::Told { waits, .. }) = self.pairs.get_mut(&user) {
                *waits = Waits::No;
            }
            return Some((user, false));
        }
        let Some(user) = self.out.pop_front() else {
            self.out.shrink_to(FEW); // most of the time there is nothing to do
            return None;
        };
        let mut is_told = false;
        if let Some(pair) = self.pairs.get_mut(&user) {
            is_told = matches!(pair, Pair::Told { .. });
            *pair.is_queued() = false;
        }
        Some((user, is_told))
    }

    /// Whether the stream is to be told of a user now. Then it counts as told.
    fn is_to_tell(&mut self, user: UserId, shown: &Shown, now: Instant, damping: &Damping) -> bool {
        let at = self.millis(now);
        let Some(pair) = self.pairs.get_mut(&user) else { return false };
        match pair.verdict(shown, now, at, damping) {
            Verdict::Later(due, waits) => {
                if pair.begin_waiting(waits) {
                    self.later.push(Reverse((due, user.get())));
                    self.damped += 1;
                }
                false
            }
            Verdict::Unread => false,
            verdict @ (Verdict::Tell | Verdict::Same) => {
                let (is_told, asked) = (verdict == Verdict::Tell, pair.asked());
                *pair = pair.told(shown, is_told.then_some(at));
                self.answered(asked, false);
                is_told
            }
        }
    }

    /// How often something was put off, since the last call.
    pub fn take_damped(&mut self) -> u64 {
        std::mem::take(&mut self.damped)
    }

    fn millis(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.began).as_millis() as u32 // it may begin anew after 49 days
    }
}

/// What is to be done about a user.
#[derive(Clone, Copy, PartialEq)]
enum Verdict {
    Tell,
    /// It looks as it was told, or as the caller knew it.
    Same,
    Later(Instant, Waits),
    /// The caller knows something newer: it has to be read first.
    Unread,
}

impl Pair {
    fn verdict(&self, shown: &Shown, now: Instant, at: u32, damping: &Damping) -> Verdict {
        match *self {
            Self::New { must_tell: true, .. } => Verdict::Tell,
            Self::New { known, .. } if shown.token < known => Verdict::Unread,
            Self::New { known, .. } if shown.token == known => Verdict::Same,
            Self::New { .. } => Verdict::Tell,
            Self::Told { content, .. } if shown.content == content => Verdict::Same,
            Self::Told { was_online, at: told, .. } => {
                let elapsed = Duration::from_millis(at.wrapping_sub(told).into());
                let again = now + damping.min_interval.saturating_sub(elapsed);
                let goes_offline = was_online && !shown.is_online();
                let holds = goes_offline.then(|| Instant::from(shown.seen_at) + damping.offline_delay);
                match holds.filter(|holds| *holds > again) {
                    Some(holds) if holds > now => Verdict::Later(holds, Waits::Offline),
                    None if again > now => Verdict::Later(again, Waits::Interval),
                    _ => Verdict::Tell,
                }
            }
        }
    }

    /// The request that waits for the user.
    fn asked(&self) -> u32 {
        if let Self::New { asked, .. } = self { *asked } else { NONE }
    }

    fn is_queued(&mut self) -> &mut bool {
        match self {
            Self::New { is_queued, .. } | Self::Told { is_queued, .. } => is_queued,
        }
    }

    /// False: the user is waiting already, and not for longer than that.
    fn begin_waiting(&mut self, until: Waits) -> bool {
        let Self::Told { waits, .. } = self else { return false };
        let is_sooner = *waits == Waits::No || *waits == Waits::Offline && until == Waits::Interval;
        if is_sooner {
            *waits = until;
        }
        is_sooner
    }

    /// The same after a look. `now`: it was told.
    fn told(self, shown: &Shown, now: Option<u32>) -> Self {
        let content = shown.content;
        match self {
            Self::New { is_queued, .. } => {
                Self::Told { content, at: now.unwrap_or(0), is_queued, was_online: shown.is_online(), waits: Waits::No }
            }
            Self::Told { is_queued, was_online, waits, at, .. } => {
                let was_online = if now.is_some() { shown.is_online() } else { was_online };
                Self::Told { content, at: now.unwrap_or(at), is_queued, was_online, waits }
            }
        }
    }
}

const _: () = assert!(size_of::<Pair>() == 16, "there are millions of them");

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
