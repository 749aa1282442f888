//! Moving the users of a gateway elsewhere: whom, how fast, and what comes next.
//!
//! All are asked once, and have time to go. After a pause those who are still there are asked again, to go at once. No more
//! users are asked than come back elsewhere: if too many of those who were asked have not gone, nobody else is.

use std::time::Duration;

use ring::digest::Context;
use ring::digest::SHA256;

use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;

/// After the last user of a walk.
pub const END_OF_WALK: i64 = i64::MAX;
/// A share of the users stays where it is if for so many pauses there was no gateway to go to.
const HOMELESS_PAUSES: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainState {
    /// Nobody is asked yet.
    Waiting,
    Running,
    /// All have gone, or were asked as often as it says.
    Done,
    Cancelled,
    /// The life of the gateway is over, and so are its routes.
    Ended,
}

impl DrainState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Ended => "ended",
        }
    }

    pub fn is_active(self) -> bool {
        matches!(self, Self::Waiting | Self::Running)
    }
}

/// Where users may go, and how many of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub gateway: GatewayAddr,
    /// 0: as many as it can hold.
    pub quota: u64,
    /// Who were sent there, if there is a quota.
    pub sent: u64,
}

/// What an operator has asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct DrainTerms {
    /// Users per second.
    pub rate: u32,
    /// Nobody is asked before.
    pub starts_at: Timestamp,
    /// Then the rest is removed. None: never.
    pub deadline: Option<Timestamp>,
    /// Between asking and asking again.
    pub settle: Duration,
    /// Of the users, above 0 and up to 1.
    pub share: f64,
    /// Empty: wherever there is room.
    pub to: Vec<Target>,
    /// Whoever was asked twice and stays is removed.
    pub force: bool,
    pub reason: String,
}

impl DrainTerms {
    /// Whether all have to go. Then the gateway takes nobody new.
    pub fn is_whole(&self) -> bool {
        self.share >= 1.0
    }

    /// Whether it is said how many users each gateway takes.
    pub fn has_quotas(&self) -> bool {
        self.to.iter().any(|target| target.quota > 0)
    }

    /// Whether what runs can go on with these terms instead. Another share would be other users, and quotas were made for the
    /// users of one share.
    pub fn may_become(&self, next: &Self) -> bool {
        let both_whole = self.is_whole() && next.is_whole();
        both_whole || self.share == next.share && !self.has_quotas() && !next.has_quotas()
    }
}

/// A drain as it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Drain {
    pub id: String,
    pub gateway: GatewayAddr,
    /// The life that users leave.
    pub epoch: Epoch,
    pub state: DrainState,
    /// How often all are asked by now.
    pub pass: u32,
    /// The last user who was asked in this pass, or [`END_OF_WALK`].
    pub cursor: i64,
    /// Who were to go when it began, and who of them are still there.
    pub users: u64,
    pub left: u64,
    pub asked: u64,
    pub unheard: u64,
    pub began: Timestamp,
    /// Of one that is not active any more.
    pub ended: Timestamp,
    /// The node that carries it out.
    pub node_id: String,
    pub terms: DrainTerms,
}

/// The place of a user in the order in which the drain `id` takes a share of all: from 0 up to 1, the same on every node.
pub fn place(id: &str, user: UserId) -> f64 {
    let mut hash = Context::new(&SHA256);
    hash.update(format!("{id}/{user}").as_bytes());
    let number = hash.finish().as_ref().iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    (number >> 11) as f64 / (1_u64 << 53) as f64 // exact: as many bits as a float has
}

impl Drain {
    /// Whether a user is among those who have to go.
    pub fn takes(&self, user: UserId) -> bool {
        self.terms.is_whole() || place(&self.id, user) < self.terms.share
    }

    /// Whether there is something to stop, or a gateway that takes nobody new because of it.
    pub fn can_be_cancelled(&self) -> bool {
        self.state.is_active() || self.state == DrainState::Done && self.terms.is_whole()
    }

    pub fn moved(&self) -> u64 {
        self.users.saturating_sub(self.left)
    }

    /// How long it still takes, as it goes now. None: nobody knows.
    pub fn eta(&self, now: Timestamp) -> Option<Duration> {
        let took = now.since(self.terms.starts_at.max(self.began));
        (self.state == DrainState::Running && self.moved() > 0).then(|| took.mul_f64(self.left as f64 / self.moved() as f64))
    }

    /// What comes next.
    pub fn next(&self, look: &Look) -> Next {
        let has_walked = self.cursor == END_OF_WALK;
        if look.left == 0 {
            return Next::Finish;
        }
        if self.terms.deadline.is_some_and(|deadline| look.now >= deadline) {
            return Next::Remove { up_to: END_OF_WALK };
        }
        if !self.terms.is_whole() && look.homeless_for >= self.terms.settle * HOMELESS_PAUSES {
            return Next::Finish;
        }
        match (has_walked, self.pass) {
            (false, ..=1) => match look.bound.saturating_sub(look.outstanding) {
                0 if look.still_for < self.terms.settle => Next::Wait,
                0 if look.were_asked_again && self.terms.force => Next::Remove { up_to: self.cursor },
                0 => Next::AskThoseAgain,
                room => Next::Ask { at_most: room },
            },
            (false, _) => Next::Ask { at_most: u64::MAX },
            (true, _) if look.still_for < self.terms.settle => Next::Wait,
            (true, ..=1) => Next::AskAllAgain,
            (true, _) if self.terms.force => Next::Remove { up_to: END_OF_WALK },
            (true, _) if self.terms.deadline.is_some() => Next::AskAllAgain,
            (true, _) => Next::Finish,
        }
    }
}

/// What was seen at a look.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub now: Timestamp,
    /// Who have to go and have not.
    pub left: u64,
    /// Who of them were asked, and how many may be.
    pub outstanding: u64,
    pub bound: u64,
    /// For how long all who were asked may have gone.
    pub still_for: Duration,
    /// Since the walk went on last.
    pub were_asked_again: bool,
    /// For how long there has been no gateway to go to.
    pub homeless_for: Duration,
}

/// What to do until the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Wait,
    /// Go on with the walk.
    Ask {
        at_most: u64,
    },
    /// Those who were asked and have not gone, or have come back; then the walk goes on.
    AskThoseAgain,
    /// Begin another walk.
    AskAllAgain,
    /// Whoever is left of the users up to this one loses the route.
    Remove {
        up_to: i64,
    },
    Finish,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTLE: Duration = Duration::from_secs(15);

    fn drain(pass: u32, cursor: i64) -> Drain {
        let terms = DrainTerms {
            rate: 100,
            starts_at: Timestamp(1_000),
            deadline: None,
            settle: SETTLE,
            share: 1.0,
            to: Vec::new(),
            force: false,
            reason: String::new(),
        };
        Drain {
            id: "d".to_owned(),
            gateway: GatewayAddr::parse("gw-1:7000").unwrap(),
            epoch: Epoch(1),
            state: DrainState::Running,
            pass,
            cursor,
            users: 1_000,
            left: 0,
            asked: 0,
            unheard: 0,
            began: Timestamp(0),
            ended: Timestamp(0),
            node_id: String::new(),
            terms,
        }
    }

    #[test]
    fn all_are_asked_twice_and_whoever_stays_goes_only_by_force_or_at_the_deadline() {
        const ALL: Next = Next::Remove { up_to: END_OF_WALK };
        let (were_asked_again, homeless_for) = (false, Duration::ZERO);
        let look = Look {
            now: Timestamp(5_000),
            left: 10,
            outstanding: 0,
            bound: 100,
            still_for: SETTLE,
            were_asked_again,
            homeless_for,
        };
        let (early, late) = (Duration::ZERO, SETTLE);
        let by_force = |mut drain: Drain| {
            drain.terms.force = true;
            drain
        };
        let until = |mut drain: Drain, deadline| {
            drain.terms.deadline = Some(Timestamp(deadline));
            drain
        };
        for (drain, outstanding, still_for, want) in [
            (drain(1, 0), 0, late, Next::Ask { at_most: 100 }),
            (drain(1, 7), 90, late, Next::Ask { at_most: 10 }),
            (drain(1, 7), 100, early, Next::Wait),
            (drain(1, 7), 100, late, Next::AskThoseAgain),
            (drain(1, END_OF_WALK), 10, early, Next::Wait),
            (drain(1, END_OF_WALK), 10, late, Next::AskAllAgain),
            (by_force(drain(1, END_OF_WALK)), 10, late, Next::AskAllAgain),
            (drain(2, 7), 500, early, Next::Ask { at_most: u64::MAX }),
            (drain(2, END_OF_WALK), 10, early, Next::Wait),
            (drain(2, END_OF_WALK), 10, late, Next::Finish),
            (by_force(drain(2, END_OF_WALK)), 10, late, ALL),
            (until(drain(2, END_OF_WALK), 9_000), 10, late, Next::AskAllAgain),
            (until(drain(1, 7), 5_000), 10, early, ALL),
        ] {
            assert_eq!(drain.next(&Look { outstanding, still_for, ..look }), want, "{drain:?}, {outstanding}, {still_for:?}");
        }
        assert_eq!(until(drain(1, 0), 1).next(&Look { left: 0, ..look }), Next::Finish);
        let stuck = Look { outstanding: 100, were_asked_again: true, ..look };
        assert_eq!(drain(1, 7).next(&stuck), Next::AskThoseAgain);
        assert_eq!(by_force(drain(1, 7)).next(&stuck), Next::Remove { up_to: 7 }, "those who come next have a chance, too");
        let homeless = Look { homeless_for: SETTLE * 4, ..look };
        assert_eq!(drain(1, 0).next(&homeless), Next::Ask { at_most: 100 }, "all have to go: somebody may come");
        let mut share = drain(1, 0);
        share.terms.share = 0.5;
        assert_eq!((share.next(&look), share.next(&homeless)), (Next::Ask { at_most: 100 }, Next::Finish));
    }

    #[test]
    fn only_the_same_users_can_be_moved_in_another_way() {
        let of = |share: f64, quota: u64| {
            let target = Target { gateway: GatewayAddr::parse("gw-2:7000").unwrap(), quota, sent: 0 };
            DrainTerms { share, to: vec![target], ..drain(1, 0).terms }
        };
        for (runs, next, may) in [
            ((1.0, 0), (1.0, 0), true),
            ((0.1, 0), (0.1, 0), true),
            ((0.1, 0), (0.2, 0), false),
            ((0.1, 7), (0.1, 0), false),
            ((0.1, 0), (0.1, 7), false),
            ((0.1, 0), (1.0, 0), false),
        ] {
            assert_eq!(of(runs.0, runs.1).may_become(&of(next.0, next.1)), may, "{runs:?}, {next:?}");
        }
    }

    #[test]
    fn a_share_of_the_users_is_the_same_everywhere_and_another_for_each_drain() {
        let of = |id: &str, share: f64| {
            let mut drain = drain(1, 0);
            (drain.id, drain.terms.share) = (id.to_owned(), share);
            (1..=10_000).filter(|user| drain.takes(UserId::parse(*user).unwrap())).collect::<Vec<_>>()
        };
        let (one, other) = (of("one", 0.3), of("other", 0.3));
        assert!((2_800..=3_200).contains(&one.len()) && (2_800..=3_200).contains(&other.len()));
        let both = one.iter().filter(|user| other.contains(user)).count();
        assert!((750..=1_050).contains(&both), "{both}");
        assert_eq!(of("one", 1.0).len(), 10_000);
        // python3 -c 'import hashlib; print((int(hashlib.sha256(b"one/7").hexdigest()[:16], 16) >> 11) / 2**53)'
        assert_eq!(place("one", UserId::parse(7).unwrap()), 0.7218862011859009);
    }

    #[test]
    fn how_long_it_takes_follows_from_how_it_went() {
        let mut drain = drain(1, 7);
        assert_eq!(Drain { left: 1_000, ..drain.clone() }.eta(Timestamp(3_000)), None);
        drain.left = 600;
        assert_eq!(drain.eta(Timestamp(3_000)), Some(Duration::from_secs(3)));
    }
}
