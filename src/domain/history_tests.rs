use super::*;

const GAP: Duration = Duration::from_secs(30);
const MINUTE: i64 = 60_000;
/// A day begins.
const MIDNIGHT: i64 = 20_000 * DAY_MS;

fn standing(wanted: Status, devices: u32, idle: bool) -> Standing {
    let activity = match (devices, idle) {
        (0, _) => Activity::NoDevice,
        (_, false) => Activity::Active,
        (_, true) => Activity::AllIdle,
    };
    Standing { wanted, activity, devices, epoch: (devices > 0).then_some(Epoch(7)) }
}

/// A user's history, and how long the days are.
struct Story {
    now: Standing,
    session: OnlineSession,
    seen: LastSeen,
    rules: Rules,
    kept: Chronicle,
}

impl Story {
    fn of(wanted: Status) -> Self {
        let rules = Rules { session_gap: GAP, clock_set_at: Timestamp(0) };
        Self {
            now: standing(wanted, 0, false),
            session: OnlineSession::default(),
            seen: LastSeen::default(),
            rules,
            kept: Chronicle::default(),
        }
    }

    fn then(&mut self, at: i64, after: Standing, cause: Cause) {
        let step = Step { before: self.now, after, at: Timestamp(at), version: Version(at as u64), cause };
        self.kept.step(&step, &mut self.session, self.seen, &self.rules);
        self.seen.really = Timestamp(at);
        if self.now.shown() != after.shown() {
            self.seen.by_others = Timestamp(at);
        }
        self.now = after;
    }

    fn online(&mut self, from: i64, to: i64) {
        let wanted = self.now.wanted;
        self.then(from, standing(wanted, 1, false), Cause::Login);
        self.then(to, standing(wanted, 0, false), Cause::Logout);
    }

    /// Day from the first, milliseconds seen and hidden, sessions seen and hidden.
    fn days(&self) -> Vec<(i32, i64, i64, u32, u32)> {
        let mut days = std::collections::BTreeMap::new();
        for share in &self.kept.days {
            let day = days.entry(share.day).or_insert((share.day - 20_000, 0, 0, 0, 0));
            *day =
                (day.0, day.1 + share.online_ms, day.2 + share.hidden_ms, day.3 + share.sessions, day.4 + share.hidden_sessions);
        }
        days.into_values().collect()
    }

    fn log(&self) -> Vec<(i64, Status, bool, Cause)> {
        self.kept.log.iter().map(|line| (line.at.0, line.shown, line.hidden, line.cause)).collect()
    }
}

#[test]
fn a_session_counts_on_its_day_and_its_time_on_each_day_that_it_touches() {
    let mut story = Story::of(Status::Online);
    story.online(MIDNIGHT + MINUTE, MIDNIGHT + 3 * MINUTE);
    story.online(MIDNIGHT + DAY_MS - MINUTE, MIDNIGHT + 2 * DAY_MS + 5 * MINUTE);
    assert_eq!(story.days(), [(0, 3 * MINUTE, 0, 2, 0), (1, DAY_MS, 0, 0, 0), (2, 5 * MINUTE, 0, 0, 0)]);
    let mut exact = Story::of(Status::Online);
    exact.online(MIDNIGHT, MIDNIGHT + DAY_MS);
    assert_eq!(exact.days(), [(0, DAY_MS, 0, 1, 0)], "midnight belongs to nobody");
}

#[test]
fn a_page_that_is_loaded_anew_a_hundred_times_is_one_session_and_the_gaps_are_no_time() {
    let mut story = Story::of(Status::Online);
    (0..100).for_each(|n| story.online(MIDNIGHT + n * MINUTE, MIDNIGHT + n * MINUTE + MINUTE / 2));
    assert_eq!(story.days(), [(0, 50 * MINUTE, 0, 1, 0)]);
    story.online(MIDNIGHT + 100 * MINUTE, MIDNIGHT + 101 * MINUTE); // 30 s after the last: still the same
    story.online(MIDNIGHT + 101 * MINUTE + 30_001, MIDNIGHT + 102 * MINUTE);
    assert_eq!(story.days()[0].3, 2);
}

#[test]
fn what_nobody_could_see_is_kept_apart() {
    let mut story = Story::of(Status::Invisible);
    story.online(MIDNIGHT, MIDNIGHT + MINUTE);
    assert_eq!(story.days(), [(0, 0, MINUTE, 0, 1)]);
    assert_eq!(
        story.log(),
        [(MIDNIGHT, Status::Online, true, Cause::Login), (MIDNIGHT + MINUTE, Status::Offline, true, Cause::Logout)]
    );
}

#[test]
fn who_hides_looks_as_if_they_had_gone_and_who_comes_out_as_if_they_had_come() {
    let mut story = Story::of(Status::Online);
    story.then(MIDNIGHT, standing(Status::Online, 1, false), Cause::Login);
    story.then(MIDNIGHT + MINUTE, standing(Status::Invisible, 1, false), Cause::Set);
    story.then(MIDNIGHT + 3 * MINUTE, standing(Status::Invisible, 2, false), Cause::Login);
    story.then(MIDNIGHT + 4 * MINUTE, standing(Status::Online, 2, false), Cause::Set);
    story.then(MIDNIGHT + 6 * MINUTE, standing(Status::Online, 0, false), Cause::Logout);
    assert_eq!(story.days(), [(0, 3 * MINUTE, 3 * MINUTE, 2, 0)], "two visits, as others saw it");
    let line = |n, shown, hidden, cause| (MIDNIGHT + n * MINUTE, shown, hidden, cause);
    assert_eq!(
        story.log(),
        [
            line(0, Status::Online, false, Cause::Login),
            line(1, Status::Offline, false, Cause::Logout),
            line(1, Status::Online, true, Cause::Set),
            line(4, Status::Online, false, Cause::Login),
            line(6, Status::Offline, false, Cause::Logout),
        ]
    );
    assert_eq!(story.kept.log[1].epoch, None, "nothing is said of where somebody hides");
    assert!(story.kept.log[1].version < story.kept.log[2].version);
}

#[test]
fn a_second_device_is_no_news_and_idleness_is() {
    let mut story = Story::of(Status::Online);
    story.then(1, standing(Status::Online, 1, false), Cause::Login);
    story.then(2, standing(Status::Online, 2, false), Cause::Login);
    story.then(3, standing(Status::Online, 2, true), Cause::Idle);
    story.then(4, standing(Status::Online, 2, false), Cause::Active);
    story.then(5, standing(Status::Busy, 2, false), Cause::Set);
    let shown: Vec<_> = story.kept.log.iter().map(|line| (line.at.0, line.shown, line.devices)).collect();
    assert_eq!(shown, [(1, Status::Online, 1), (3, Status::Away, 2), (4, Status::Online, 2), (5, Status::Busy, 2)]);
}

#[test]
fn time_of_unknown_length_is_not_counted_but_the_session_is() {
    let mut set_back = Story::of(Status::Online);
    set_back.online(MIDNIGHT + 10 * MINUTE, MIDNIGHT + 9 * MINUTE);
    assert_eq!((set_back.days(), set_back.kept.skipped), (vec![(0, 0, 0, 1, 0)], 1));
    let mut set = Story::of(Status::Online);
    set.rules.clock_set_at = Timestamp(MIDNIGHT + 5 * MINUTE);
    set.online(MIDNIGHT, MIDNIGHT + 20 * MINUTE);
    set.online(MIDNIGHT + 30 * MINUTE, MIDNIGHT + 31 * MINUTE);
    assert_eq!((set.days(), set.kept.skipped), (vec![(0, MINUTE, 0, 2, 0)], 1));
}

#[test]
fn the_score_weighs_days_and_hours() {
    let hours = |hours: f64| (hours * 3_600_000.0) as i64;
    for (days, want) in
        [(vec![], 0), (vec![0; 28], 0), (vec![hours(4.0); 28], 100), (vec![hours(8.0); 14], 70), (vec![hours(2.0)], 22)]
    {
        assert_eq!(activity_score(days.iter().copied()), want, "{days:?}");
    }
}

#[test]
fn who_hid_a_moment_ago_comes_as_anybody_else() {
    let mut story = Story::of(Status::Invisible);
    story.online(MIDNIGHT, MIDNIGHT + MINUTE);
    story.now = standing(Status::Online, 0, false);
    story.online(MIDNIGHT + MINUTE + 1_000, MIDNIGHT + 2 * MINUTE);
    assert_eq!(story.days(), [(0, MINUTE - 1_000, MINUTE, 1, 1)], "others saw no session that could go on");
    let mut brief = Story::of(Status::Online);
    brief.then(MIDNIGHT, standing(Status::Online, 1, false), Cause::Login);
    brief.then(MIDNIGHT + MINUTE, standing(Status::Invisible, 1, false), Cause::Set);
    brief.then(MIDNIGHT + MINUTE + 5_000, standing(Status::Online, 1, false), Cause::Set);
    brief.then(MIDNIGHT + 2 * MINUTE, standing(Status::Online, 0, false), Cause::Logout);
    assert_eq!(brief.days()[0].3, 1, "as a page that was loaded anew");
}
