//! When many gateways fall silent at once, it is more likely that something between them and us is broken than that they all
//! died. Then nobody is declared dead for a while: their routes are suspect, still tried, and an operator has time to look.

use std::time::Duration;

use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::Liveness;
use crate::domain::time::Timestamp;

/// One gateway alone is a death like any other.
const MIN_SILENT: usize = 2;

/// How many registered gateways are silent, and of how many.
///
/// Beats are spread over the interval, so gateways that fall silent at one instant run out of their leases one after the
/// other: those that are late count as well as those that have just died, and the dead still count among all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// Two beats missed, lease not ended.
    pub late: usize,
    /// Ended by expiry within the last lease.
    pub recent: usize,
    pub alive: usize,
}

impl Silence {
    pub fn of<'a>(lives: impl Iterator<Item = &'a Life>, now: Timestamp, lease: Duration, heartbeat_interval: Duration) -> Self {
        let mut silence = Self::default();
        for life in lives.filter(|life| life.is_managed()) {
            match life.end {
                None => {
                    silence.alive += 1;
                    silence.late += usize::from(life.liveness(now, heartbeat_interval) == Liveness::Late);
                }
                Some(end) => {
                    // Of whom only others have heard so far may have died, too.
                    let may_have_died = matches!(end.reason, EndReason::Expired | EndReason::Untold);
                    silence.recent += usize::from(may_have_died && end.at > now.minus(lease));
                }
            }
        }
        silence
    }

    pub fn silent(&self) -> usize {
        self.late + self.recent
    }

    pub fn all(&self) -> usize {
        self.alive + self.recent
    }

    /// Whether more than `share` of all gateways are silent: too many to be believed dead.
    pub fn is_doubtful(&self, share: f64) -> bool {
        self.silent() >= MIN_SILENT && self.silent() as f64 > share * self.all() as f64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::gateway::End;
    use crate::domain::gateway::LifeKind;
    use crate::domain::id::Epoch;
    use crate::domain::id::GatewayAddr;

    const BEAT: Duration = Duration::from_secs(5);
    const LEASE: Duration = Duration::from_secs(15);
    const SHARE: f64 = 0.5;
    const NOW: Timestamp = Timestamp(1_000_000);

    fn life(kind: LifeKind, lease_left_ms: i64, end: Option<(EndReason, i64)>) -> Arc<Life> {
        let gateway = GatewayAddr::parse("gw:1").unwrap();
        let end = end.map(|(reason, ago_ms)| End { at: Timestamp(NOW.0 - ago_ms), reason });
        Arc::new(Life { end, ..Life::begun(Epoch(1), gateway, kind, Timestamp(NOW.0 + lease_left_ms)) })
    }

    fn silence(lives: &[(usize, Arc<Life>)]) -> Silence {
        let lives = lives.iter().flat_map(|(count, life)| std::iter::repeat_n(&**life, *count));
        Silence::of(lives, NOW, LEASE, BEAT)
    }

    #[test]
    fn silence_of_more_than_the_share_is_doubtful_whether_late_or_just_died() {
        let healthy = || life(LifeKind::Managed, 10_001, None);
        let late = || life(LifeKind::Managed, 6_000, None);
        let just_died = || life(LifeKind::Managed, -1, Some((EndReason::Expired, 14_999)));
        for (lives, want) in [
            (vec![(20, healthy())], false),
            (vec![(10, healthy()), (10, late())], false),
            (vec![(9, healthy()), (11, late())], true),
            (vec![(8, healthy()), (8, late()), (4, just_died())], true),
            (vec![(2, healthy()), (3, just_died())], true),
            (vec![(1, healthy()), (1, late())], false),
            (vec![(1, late())], false), // one alone dies
            (vec![(2, late())], true),
            (vec![], false),
        ] {
            let silence = silence(&lives);
            assert_eq!(silence.is_doubtful(SHARE), want, "{silence:?}");
        }
    }

    #[test]
    fn only_expiries_within_the_last_lease_count() {
        let end = |reason, ago_ms| life(LifeKind::Managed, -1, Some((reason, ago_ms)));
        let lives = [
            (1, end(EndReason::Expired, 15_000)), // too long ago
            (1, end(EndReason::Superseded, 1)),
            (1, end(EndReason::Deregistered, 1)),
            (1, end(EndReason::Operator, 1)),
            (1, end(EndReason::Held, 1)),
            (1, life(LifeKind::Unmanaged, 0, None)),
        ];
        assert_eq!(silence(&lives), Silence::default());
    }

    /// Gateways with beats spread over the interval; `silent` of them stop at once. How many die before the hold?
    fn die_before_the_hold(gateways: i64, silent: i64, phase: i64) -> (usize, bool) {
        let last_beat = |gateway: i64| gateway * 5_000 / gateways + phase;
        let mut dead: Vec<(i64, Timestamp)> = Vec::new();
        for second in 0..60 {
            let now = Timestamp(5_000 + second * 1_000);
            let lease_until = |gateway| {
                let beat = last_beat(gateway);
                if gateway < silent { beat + 15_000 } else { beat + (now.0 - beat) / 5_000 * 5_000 + 15_000 }
            };
            let died = |gateway| dead.iter().find(|(dead, _)| *dead == gateway).map(|(_, at)| *at);
            let lives: Vec<Life> = (0..gateways)
                .map(|gateway| Life {
                    end: died(gateway).map(|at| End { at, reason: EndReason::Expired }),
                    ..Life::clone(&life(LifeKind::Managed, lease_until(gateway) - NOW.0, None))
                })
                .collect();
            if Silence::of(lives.iter(), now, LEASE, BEAT).is_doubtful(SHARE) {
                return (dead.len(), true);
            }
            let expired = (0..gateways).filter(|gateway| lives[*gateway as usize].is_alive() && lease_until(*gateway) < now.0);
            dead.extend(expired.map(|gateway| (gateway, now)).collect::<Vec<_>>());
        }
        (dead.len(), false)
    }

    #[test]
    fn of_gateways_that_fall_silent_together_none_dies_before_the_hold_and_a_minority_dies() {
        for phase in (0..1_000).step_by(50) {
            assert_eq!(die_before_the_hold(20, 12, phase), (0, true), "12 of 20, phase {phase}");
            assert_eq!(die_before_the_hold(20, 20, phase), (0, true), "20 of 20, phase {phase}");
            assert_eq!(die_before_the_hold(20, 10, phase), (10, false), "10 of 20, phase {phase}");
            assert_eq!(die_before_the_hold(2, 1, phase), (1, false), "1 of 2, phase {phase}");
            assert_eq!(die_before_the_hold(3, 2, phase), (0, true), "2 of 3, phase {phase}");
            assert_eq!(die_before_the_hold(100, 0, phase), (0, false), "all healthy, phase {phase}");
        }
    }
}
