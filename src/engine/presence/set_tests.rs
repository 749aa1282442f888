use std::collections::HashMap;

use super::*;
use crate::domain::status::Status;
use crate::domain::status::Status::Away;
use crate::domain::status::Status::Busy;
use crate::domain::status::Status::Offline;
use crate::domain::status::Status::Online;

const DAMPING: Damping = Damping { offline_delay: Duration::from_secs(2), min_interval: Duration::from_millis(500) };

/// A stream, and what the node knows of the users.
struct World {
    set: Set,
    shown: HashMap<UserId, Arc<Shown>>,
    began: Instant,
    /// Milliseconds since then.
    now: u64,
}

fn user(id: i64) -> UserId {
    UserId::parse(id).unwrap()
}

impl World {
    fn new() -> Self {
        let began = Instant::now();
        Self { set: Set::new(began), shown: HashMap::new(), began, now: 0 }
    }

    fn at(&self, ms: u64) -> Instant {
        self.began + Duration::from_millis(ms)
    }

    /// A request, for users with the versions that the caller knows.
    fn ask(&mut self, seq: u64, users: &[(i64, u64)]) {
        self.set.begin(seq);
        users.iter().for_each(|(id, known)| self.set.add(user(*id), *known));
    }

    /// The node has read a user.
    fn read(&mut self, id: i64, token: u64, status: Status) {
        let since = match self.shown.get(&user(id)) {
            Some(before) if before.status == status => before.seen_at.into(),
            _ => self.at(self.now),
        };
        self.shown.insert(user(id), Arc::new(Shown::example(token, status, "", since)));
        self.set.mark(user(id), None);
    }

    /// What the stream is told from `ms` on until there is nothing more: `user version status`, and `done seq`.
    fn told(&mut self, ms: u64) -> Vec<String> {
        self.now = ms;
        let (now, mut told) = (self.at(ms), Vec::new());
        loop {
            match self.set.next(now, &DAMPING, |user| self.shown.get(&user).cloned()) {
                Next::Tell(Telling { user, shown, .. }) => told.push(format!("{user} {} {:?}", shown.token, shown.status)),
                Next::Done(Done { seq, refused: None, is_incomplete: false }) => told.push(format!("done {seq}")),
                Next::Done(done) => told.push(format!("{done:?}")),
                Next::Wait(_) => return told,
            }
        }
    }

    fn due(&mut self) -> Option<u64> {
        let now = self.at(self.now);
        match self.set.next(now, &DAMPING, |_| None) {
            Next::Wait(due) => due.map(|due| due.duration_since(self.began).as_millis() as u64),
            _ => panic!("there is something to tell"),
        }
    }
}

#[test]
fn a_request_is_done_when_all_of_its_users_were_told_and_nothing_is_told_before_it_was_read() {
    let mut world = World::new();
    world.ask(7, &[(1, 0), (2, 0)]);
    assert_eq!(world.told(0), [""; 0]);
    world.read(2, 20, Offline);
    assert_eq!(world.told(1), ["2 20 Offline"], "the first telling is not delayed");
    world.read(1, 10, Online);
    assert_eq!(world.told(2), ["1 10 Online", "done 7"]);
    world.ask(8, &[]);
    assert_eq!(world.told(3), ["done 8"]);
}

#[test]
fn who_knows_the_newest_is_told_nothing_and_who_knows_nothing_is_told_again() {
    let mut world = World::new();
    world.ask(1, &[(1, 10), (2, 19)]);
    world.read(1, 10, Online);
    world.read(2, 20, Busy);
    assert_eq!(world.told(0), ["2 20 Busy", "done 1"]);
    world.ask(2, &[(1, 0), (2, 20)]);
    world.set.mark(user(1), None);
    world.set.mark(user(2), None);
    assert_eq!(world.told(1), ["1 10 Online", "done 2"]);
}

#[test]
fn nobody_is_told_less_than_they_know_unless_there_is_no_more() {
    let mut world = World::new();
    world.ask(1, &[(1, 30)]);
    world.read(1, 20, Online);
    assert_eq!(world.told(0), [""; 0], "it has to be read past the caches");
    world.read(1, 30, Away);
    assert_eq!(world.told(1), ["done 1"]);
    world.ask(2, &[(1, 1 << 60)]);
    world.set.mark(user(1), Some(30));
    assert_eq!(world.told(2), ["1 30 Away", "done 2"], "the caller made it up, or SQL went back");
}

#[test]
fn a_slow_reader_is_told_the_newest_once() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    for token in 2..1_000 {
        world.read(1, token, if token % 2 == 0 { Busy } else { Away });
    }
    assert_eq!(world.set.out.len(), 1);
    assert_eq!(world.told(60_000), ["1 999 Away"]);
}

#[test]
fn what_looks_the_same_is_not_told_but_its_version_counts() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    world.read(1, 2, Online);
    assert_eq!(world.told(1_000), [""; 0]);
}

#[test]
fn offline_is_told_late_and_only_if_it_still_holds() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    for n in 0..100 {
        world.now = 1_000 + 1_000 * n;
        world.read(1, 2 + 2 * n, Offline);
        assert_eq!(world.told(1_000 + 1_000 * n), [""; 0]);
        world.now += 900;
        world.read(1, 3 + 2 * n, Online);
        assert_eq!(world.told(1_900 + 1_000 * n), [""; 0], "a page that is loaded anew, each second");
    }
    world.now = 200_000;
    world.read(1, 500, Offline);
    assert_eq!(world.told(200_000), [""; 0]);
    assert_eq!(world.due(), Some(202_000));
    assert_eq!(world.told(201_999), [""; 0]);
    assert_eq!(world.told(202_000), ["1 500 Offline"]);
}

#[test]
fn an_offline_user_who_comes_is_told_at_once() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Offline);
    world.told(0);
    world.read(1, 2, Busy);
    assert_eq!(world.told(500), ["1 2 Busy"]);
}

#[test]
fn a_user_is_told_only_so_often_and_then_the_newest() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    world.read(1, 2, Busy);
    assert_eq!(world.told(100), [""; 0]);
    world.read(1, 3, Away);
    assert_eq!((world.told(499), world.due()), (vec![], Some(500)));
    assert_eq!(world.told(500), ["1 3 Away"]);
    world.read(1, 4, Online);
    assert_eq!(world.told(2_000), ["1 4 Online"]);
    let (damped, later) = (world.set.take_damped(), world.set.later.len());
    assert_eq!((damped, later), (1, 0));
}

#[test]
fn who_comes_back_while_offline_is_held_back_is_told_when_the_interval_is_over() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    world.now = 100;
    world.read(1, 2, Offline);
    assert_eq!((world.told(100), world.due()), (vec![], Some(2_100)));
    world.read(1, 3, Busy);
    assert_eq!((world.told(200), world.due()), (vec![], Some(500)));
    assert_eq!(world.told(500), ["1 3 Busy"]);
    assert_eq!(world.told(2_100), [""; 0]);
}

#[test]
fn a_request_does_not_wait_for_users_who_were_removed_or_cannot_be_read() {
    let mut world = World::new();
    world.ask(1, &[(1, 0), (2, 0)]);
    assert!(world.set.remove(user(1)));
    assert!(!world.set.remove(user(1)));
    world.set.give_up(user(2));
    assert_eq!(world.told(0), [format!("{:?}", Done { seq: 1, refused: None, is_incomplete: true })]);
    world.read(2, 5, Online);
    assert_eq!(world.told(1), ["2 5 Online"], "by itself, later");
}

#[test]
fn requests_are_done_in_their_order_also_about_the_same_user() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.ask(2, &[(1, 0), (1, 0)]);
    world.set.refuse(3, "no".to_owned());
    assert_eq!(world.told(0), [""; 0]);
    world.read(1, 5, Online);
    let refused = format!("{:?}", Done { seq: 3, refused: Some("no".to_owned()), is_incomplete: false });
    assert_eq!(world.told(1), ["1 5 Online", "done 1", "done 2", &refused]);
    assert!(world.set.asked.is_empty());
}

#[test]
fn a_removed_user_leaves_nothing_behind() {
    let mut world = World::new();
    world.ask(1, &[(1, 0)]);
    world.read(1, 1, Online);
    world.told(0);
    world.read(1, 2, Offline);
    world.told(1);
    world.set.remove(user(1));
    assert_eq!(world.told(10_000), [""; 0]);
    assert_eq!((world.set.len(), world.set.out.len(), world.set.later.len()), (0, 0, 0));
}
