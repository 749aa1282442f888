//! What a change leaves in the history of a user: a line of the log if what is shown has changed, and time online when a session
//! ends, at midnight, and when the user hides or comes out.
//!
//! A session is time with a live route. A gap that is no longer than [`Rules::session_gap`] does not begin a new one, and is not
//! counted as time. Days are those of UTC.

use std::time::Duration;

use smallvec::SmallVec;

use crate::domain::id::Epoch;
use crate::domain::id::Version;
use crate::domain::status::Activity;
use crate::domain::status::Status;
use crate::domain::time::DAY_MS;
use crate::domain::time::Timestamp;

/// Why what is shown has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Login,
    Logout,
    /// Its gateway died, or the route's time to live ended.
    Expired,
    Kicked,
    Operator,
    Set,
    Idle,
    Active,
    StatusEnded,
}

/// What a record says of a user, all of whose routes are live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    pub wanted: Status,
    pub activity: Activity,
    pub devices: u32,
    /// Of the route that was bound last.
    pub epoch: Option<Epoch>,
}

impl Standing {
    pub fn is_hidden(&self) -> bool {
        self.wanted == Status::Invisible
    }

    pub fn shown(&self) -> Status {
        self.wanted.shown(self.activity)
    }

    fn is_online(&self) -> bool {
        self.activity != Activity::NoDevice
    }

    /// What would be shown if the user did not hide.
    fn unhidden(&self) -> Status {
        if self.is_hidden() { Status::Online.shown(self.activity) } else { self.shown() }
    }

    /// The same user without a device.
    pub fn gone(&self) -> Self {
        Self { activity: Activity::NoDevice, devices: 0, epoch: None, ..*self }
    }
}

/// One line of a user's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub version: Version,
    pub at: Timestamp,
    pub shown: Status,
    /// Nobody saw it: the user was hidden, and `shown` is what would have been.
    pub hidden: bool,
    pub cause: Cause,
    pub devices: u32,
    pub epoch: Option<Epoch>,
}

/// Time online, to be added to that of one day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DayShare {
    /// Since 1970.
    pub day: i32,
    pub online_ms: i64,
    pub hidden_ms: i64,
    /// Sessions that began on that day and were seen.
    pub sessions: u32,
    pub hidden_sessions: u32,
}

/// A user's session, as far as it is not in the days yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnlineSession {
    /// When it began, or when its last part did; 0: the user is offline.
    pub since: Timestamp,
    /// It has been counted as one already: among those that were seen, or of a hidden part at all.
    pub is_counted: bool,
}

/// What the history is kept by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub session_gap: Duration,
    /// When the database's clock was set last. What began before has no known length.
    pub clock_set_at: Timestamp,
}

/// What has to be written down.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chronicle {
    pub log: SmallVec<[LogLine; 1]>,
    pub days: SmallVec<[DayShare; 1]>,
    /// Intervals whose length is not known.
    pub skipped: u32,
}

/// When a user was last online.
#[derive(Clone, Copy, Debug, Default)]
pub struct LastSeen {
    pub really: Timestamp,
    /// Who was hidden then was not seen.
    pub by_others: Timestamp,
}

/// One change of a user's standing.
pub struct Step {
    pub before: Standing,
    pub after: Standing,
    pub at: Timestamp,
    pub version: Version,
    pub cause: Cause,
}

impl Chronicle {
    /// Takes a step down. `seen`: when the user was last online, if offline before.
    pub fn step(&mut self, step: &Step, session: &mut OnlineSession, seen: LastSeen, rules: &Rules) {
        self.log(step);
        let Step { before, after, at, .. } = *step;
        let (was_hidden, is_hidden) = (before.is_hidden(), after.is_hidden());
        let is_recent = |last: Timestamp| last.0 > 0 && at.since(last) <= rules.session_gap;
        match (before.is_online(), after.is_online()) {
            (false, true) => {
                let is_counted = is_recent(if is_hidden { seen.really } else { seen.by_others });
                *session = OnlineSession { since: at, is_counted };
            }
            (true, false) => {
                self.close(session, was_hidden, true, at, rules);
                *session = OnlineSession::default();
            }
            // To others this is a coming or a going. Who hides goes on with a session that was counted when it was seen.
            (true, true) if was_hidden != is_hidden => {
                self.close(session, was_hidden, false, at, rules);
                *session = OnlineSession { since: at, is_counted: is_hidden || is_recent(seen.by_others) };
            }
            _ => {}
        }
    }

    /// A line if what is shown has changed. Nothing in the lines that others see tells hiding from going.
    fn log(&mut self, step: &Step) {
        let Step { before, after, at, version, cause } = *step;
        let flips = before.is_hidden() != after.is_hidden();
        let mut line = |version, of: Standing, shown, hidden, cause| {
            let of = if shown == Status::Offline { of.gone() } else { of };
            self.log.push(LogLine { version, at, shown, hidden, cause, devices: of.devices, epoch: of.epoch });
        };
        match (before.shown() != after.shown(), flips) {
            (true, true) if after.is_hidden() => {
                line(Version(version.0 - 1), after, Status::Offline, false, Cause::Logout); // free: versions leave a gap
                line(version, after, after.unhidden(), true, cause);
            }
            (true, true) => line(version, after, after.shown(), false, Cause::Login),
            (true, false) => line(version, after, after.shown(), false, cause),
            (false, false) if after.is_hidden() && before.unhidden() != after.unhidden() => {
                line(version, after, after.unhidden(), true, cause);
            }
            (false, _) => {}
        }
    }

    /// Ends a part of a session. A hidden one that comes out is not counted among those that nobody saw.
    fn close(&mut self, session: &OnlineSession, hidden: bool, is_end: bool, at: Timestamp, rules: &Rules) {
        if session.since.0 == 0 {
            return; // it began before there was a history
        }
        let is_known = session.since >= rules.clock_set_at && at >= session.since;
        self.skipped += u32::from(!is_known);
        self.days.extend(session.shares(hidden, is_end, if is_known { at } else { session.since }));
    }
}

impl OnlineSession {
    /// What it adds to each day if it ends at `at`, or (not `is_end`) the user hides or comes out then.
    pub fn shares(&self, hidden: bool, is_end: bool, at: Timestamp) -> impl Iterator<Item = DayShare> {
        let Self { since, is_counted } = *self;
        let counts = !is_counted && (is_end || !hidden);
        let (first, last) = (since.day(), at.max(since).day());
        let share = move |day: i32| {
            let begin = i64::from(day) * DAY_MS;
            let ms = (at.0.min(begin + DAY_MS) - since.0.max(begin)).max(0);
            let sessions = u32::from(counts && day == first);
            match hidden {
                false => DayShare { day, online_ms: ms, sessions, ..DayShare::default() },
                true => DayShare { day, hidden_ms: ms, hidden_sessions: sessions, ..DayShare::default() },
            }
        };
        (first..=last).map(share).filter(|share| *share != DayShare { day: share.day, ..DayShare::default() })
    }
}

/// Days of which the activity score tells.
pub const SCORE_DAYS: i32 = 28;

/// How active a user is who was online for so long on each day that they were, of the last [`SCORE_DAYS`]: 0 to 100.
pub fn activity_score(online_ms: impl Iterator<Item = i64>) -> u32 {
    const FULL_DAY_HOURS: f64 = 4.0;
    let (days, ms) = online_ms.filter(|ms| *ms > 0).fold((0_u32, 0_i64), |(days, sum), ms| (days + 1, sum + ms));
    if days == 0 {
        return 0;
    }
    let mean_hours = ms as f64 / 3_600_000.0 / f64::from(days);
    let score = 0.6 * f64::from(days) / f64::from(SCORE_DAYS) + 0.4 * (mean_hours / FULL_DAY_HOURS).min(1.0);
    (100.0 * score).round() as u32
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
