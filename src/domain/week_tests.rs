//! Weeks of a user's life: whatever happens, the days add up to what a simple look at the intervals says.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::domain::event::SetStatus;
use crate::domain::gateway::End;
use crate::domain::gateway::EndReason;
use crate::domain::history::DayShare;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::policy::OnOverflow;
use crate::domain::route::Platform;
use crate::domain::status::Status;
use crate::domain::status::StatusText;

const DAY: i64 = 86_400_000;
const GAP: i64 = 30_000;
/// A Thursday, some time before midnight.
const BEGIN: i64 = 20_000 * DAY - 5_000_000;

#[derive(Clone, Debug)]
enum Deed {
    Bind(usize),
    Unbind(usize),
    /// The gateway of everybody's devices dies, and was heard last so many milliseconds ago.
    Die(i64),
    Sweep,
    Hide(bool),
    Text,
}

/// After a pause in milliseconds.
fn deed() -> impl Strategy<Value = (i64, Deed)> {
    let pause = prop_oneof![3 => 1..20_000_i64, 2 => 20_000..40_000_i64, 3 => 40_000..30_000_000_i64];
    let deed = prop_oneof![
        6 => (0..3_usize).prop_map(Deed::Bind),
        6 => (0..3_usize).prop_map(Deed::Unbind),
        1 => (0..15_000_i64).prop_map(Deed::Die),
        2 => Just(Deed::Sweep),
        2 => any::<bool>().prop_map(Deed::Hide),
        1 => Just(Deed::Text),
    ];
    (pause, deed)
}

struct Week {
    record: UserRecord,
    lives: LifeTable,
    epoch: u64,
    now: i64,
    days: BTreeMap<i32, DayShare>,
    /// What is known beside the code: since when each device is there, who was there from when to when, and hidden from when on.
    devices: [Option<i64>; 3],
    online: Vec<(i64, i64)>,
    hidden: Vec<(i64, bool)>,
}

fn device(n: usize) -> DeviceId {
    DeviceId::parse(["phone", "laptop", "tv"][n]).unwrap()
}

fn gateway() -> GatewayAddr {
    GatewayAddr::parse("gw-1:7000").unwrap()
}

impl Week {
    fn new() -> Self {
        let mut week = Self {
            record: UserRecord::default(),
            lives: LifeTable::default(),
            epoch: 0,
            now: BEGIN,
            days: BTreeMap::new(),
            devices: [None; 3],
            online: Vec::new(),
            hidden: vec![(BEGIN, false)],
        };
        week.begin_life();
        week
    }

    fn begin_life(&mut self) {
        self.epoch += 1;
        let forever = Timestamp(BEGIN + 1_000 * DAY);
        self.lives.learn(Arc::new(Life::begun(Epoch(self.epoch), gateway(), LifeKind::Managed, forever)));
    }

    fn apply(&mut self, event: &Event<'_>) {
        let now = Timestamp(self.now);
        let context = Context {
            policy: &DevicePolicy { max_devices: 10, per_platform: 0, on_overflow: OnOverflow::KickOldest },
            lives: &self.lives,
            now,
            clock: Version::at(now),
            route_ttl: Duration::from_secs(3_600),
            heartbeat_interval: Duration::from_secs(5),
            slack: Duration::ZERO,
            clock_is_steady: true,
            history: Rules { session_gap: Duration::from_millis(GAP as u64), clock_set_at: Timestamp(0) },
        };
        let applied = self.record.apply(event, &context);
        assert_eq!(applied.chronicle.skipped, 0);
        self.record = applied.next.unwrap_or_else(|| self.record.clone());
        applied.chronicle.days.into_iter().for_each(|share| self.add(share));
    }

    fn add(&mut self, share: DayShare) {
        let day = self.days.entry(share.day).or_insert(DayShare { day: share.day, ..DayShare::default() });
        day.online_ms += share.online_ms;
        day.hidden_ms += share.hidden_ms;
        day.sessions += share.sessions;
        day.hidden_sessions += share.hidden_sessions;
    }

    fn takes(&mut self, (pause, deed): &(i64, Deed)) {
        self.now += pause;
        match deed {
            Deed::Bind(n) => {
                let life = self.lives.get(Epoch(self.epoch)).unwrap().clone();
                let bind = Bind {
                    gateway: gateway(),
                    epoch: Some(life.epoch),
                    device: device(*n),
                    platform: Platform::Ios,
                    conn: ConnId::parse(&self.now.to_string()).unwrap(),
                    client_ip: None,
                    client_port: 0,
                    connected_ago: None,
                    idle: false,
                };
                self.apply(&Event::Bind { bind: &bind, life: &life, waited: Duration::ZERO });
                self.devices[*n].get_or_insert(self.now);
            }
            Deed::Unbind(n) => {
                let unbind =
                    Unbind::Device { device: device(*n), gateway: gateway(), conn: None, epoch: Some(Epoch(self.epoch)) };
                self.apply(&Event::Unbind(&unbind));
                if let Some(since) = self.devices[*n].take() {
                    self.online.push((since, self.now));
                }
            }
            Deed::Die(ago) => {
                let heard = (self.now - ago).max(self.now - pause + 1);
                let life = Life::clone(self.lives.get(Epoch(self.epoch)).unwrap());
                let end = End { at: Timestamp(self.now), reason: EndReason::Expired };
                self.lives.learn(Arc::new(Life { last_beat: Timestamp(heard), ..life.ended(end) }));
                self.online.extend(self.devices.iter_mut().filter_map(Option::take).map(|since| (since, heard)));
                self.begin_life();
            }
            Deed::Sweep => self.apply(&Event::Sweep),
            Deed::Hide(hide) => {
                let status = Some(if *hide { Status::Invisible } else { Status::Online });
                self.apply(&Event::SetStatus(&SetStatus { status, ..SetStatus::default() }));
                self.hidden.push((self.now, *hide));
            }
            Deed::Text => {
                let text = StatusText::parse(&self.now.to_string(), 256).ok();
                self.apply(&Event::SetStatus(&SetStatus { text, ..SetStatus::default() }));
            }
        }
    }

    /// The user goes, everywhere.
    fn ends(&mut self) {
        for n in 0..3 {
            self.takes(&(1, Deed::Unbind(n)));
        }
        self.takes(&(1, Deed::Sweep));
    }

    /// When the user was there: intervals that touch are one.
    fn merged(&self) -> Vec<(i64, i64)> {
        let mut all = self.online.clone();
        all.sort_unstable();
        let mut merged: Vec<(i64, i64)> = Vec::new();
        for (from, to) in all {
            match merged.last_mut().filter(|last| from <= last.1) {
                Some(last) => last.1 = last.1.max(to),
                None => merged.push((from, to)),
            }
        }
        merged
    }

    /// From when to when the user was there, and whether they hid.
    fn parts(&self) -> Vec<(i64, i64, bool)> {
        let mut parts = Vec::new();
        for (i, (part_from, hidden)) in self.hidden.iter().enumerate() {
            let part_to = self.hidden.get(i + 1).map_or(i64::MAX, |(to, _)| *to);
            let there = self.merged().into_iter().map(|(from, to)| (from.max(*part_from), to.min(part_to), *hidden));
            parts.extend(there.filter(|(from, to, _)| from < to));
        }
        parts
    }

    /// How often the user came, as others saw it.
    fn visits(&self) -> usize {
        let (mut visits, mut last) = (0, i64::MIN / 2);
        for (from, to, _) in self.parts().into_iter().filter(|(.., hidden)| !hidden) {
            visits += usize::from(from - last > GAP);
            last = to;
        }
        visits
    }

    /// Milliseconds seen and hidden, by day.
    fn expected(&self) -> BTreeMap<i32, (i64, i64)> {
        let mut days = BTreeMap::new();
        for (mut from, to, hidden) in self.parts() {
            while from < to {
                let until = to.min((from.div_euclid(DAY) + 1) * DAY);
                let day = days.entry(from.div_euclid(DAY) as i32).or_insert((0, 0));
                if hidden {
                    day.1 += until - from
                } else {
                    day.0 += until - from
                }
                from = until;
            }
        }
        days
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn the_days_of_a_week_add_up(deeds in proptest::collection::vec(deed(), 1..80)) {
        let mut week = Week::new();
        deeds.iter().for_each(|deed| week.takes(deed));
        week.ends();
        let counted = week.days.iter().map(|(day, share)| (*day, (share.online_ms, share.hidden_ms)));
        let counted: BTreeMap<i32, (i64, i64)> = counted.filter(|(_, times)| *times != (0, 0)).collect();
        prop_assert_eq!(counted, week.expected(), "{:?}", deeds);
        let sessions: u32 = week.days.values().map(|share| share.sessions).sum();
        prop_assert_eq!(sessions as usize, week.visits(), "{:?}", deeds);
    }
}
