//! Levelling the loads of gateways by moving as few users as that takes.
//!
//! A gateway's target is its part of all users, by its weight. Whoever has more than the tolerance allows gives, whoever has less
//! takes; if one side has more to do than the other, those that are already within the tolerance help, down or up to their
//! targets. So nobody who gives falls below the target, nobody who takes rises above it, and no user moves for nothing.

/// A gateway as it stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub users: u64,
    /// Next to others; above 0.
    pub weight: f64,
}

/// Users who move, by the places of the gateways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    pub from: usize,
    pub to: usize,
    pub users: u64,
}

/// How many users a gateway should have, and may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub least: u64,
    pub target: u64,
    pub most: u64,
}

/// What each should have. `tolerance`: how far from that it may be, 0 to 1.
pub fn ranges(loads: &[Load], tolerance: f64) -> Vec<Range> {
    let (users, weights) = loads.iter().fold((0, 0.0), |(users, weights), load| (users + load.users, weights + load.weight));
    let fair = |load: &Load| users as f64 * load.weight / weights;
    let mut targets: Vec<u64> = loads.iter().map(|load| fair(load) as u64).collect();
    // What rounding down has left goes to those who lost most by it.
    let mut by_loss: Vec<usize> = (0..loads.len()).collect();
    by_loss.sort_by(|one, other| fair(&loads[*other]).fract().total_cmp(&fair(&loads[*one]).fract()));
    let left = users.saturating_sub(targets.iter().sum());
    by_loss.iter().cycle().take(usize::try_from(left).unwrap_or(0)).for_each(|at| targets[*at] += 1);
    let range = |(load, target): (&Load, u64)| Range {
        least: target.min((fair(load) * (1.0 - tolerance)).ceil() as u64),
        target,
        most: target.max((fair(load) * (1.0 + tolerance)) as u64),
    };
    loads.iter().zip(targets).map(range).collect()
}

/// The moves after which each gateway is within its range.
pub fn plan(loads: &[Load], tolerance: f64) -> Vec<Move> {
    let ranges = ranges(loads, tolerance);
    let both = || loads.iter().zip(&ranges).map(|(load, range)| (load.users, range));
    let mut gives: Vec<u64> = both().map(|(users, range)| users.saturating_sub(range.most)).collect();
    let mut takes: Vec<u64> = both().map(|(users, range)| range.least.saturating_sub(users)).collect();
    let (given, taken) = (gives.iter().sum::<u64>(), takes.iter().sum::<u64>());
    let could_give: Vec<u64> = both().map(|(users, range)| users.min(range.most).saturating_sub(range.target)).collect();
    let could_take: Vec<u64> = both().map(|(users, range)| range.target.saturating_sub(users.max(range.least))).collect();
    help(&mut gives, &could_give, taken.saturating_sub(given));
    help(&mut takes, &could_take, given.saturating_sub(taken));
    moves(gives, takes)
}

/// Spreads what is missing over those who can help, each by what it can.
fn help(doing: &mut [u64], could: &[u64], mut missing: u64) {
    let mut can: u64 = could.iter().sum();
    for (doing, could) in doing.iter_mut().zip(could) {
        if can == 0 {
            return;
        }
        // Rounded up, so that nothing is missing in the end.
        let part = (u128::from(missing) * u128::from(*could)).div_ceil(u128::from(can)) as u64;
        let part = part.min(missing);
        *doing += part;
        (missing, can) = (missing - part, can - could);
    }
}

/// Pairs givers with takers.
fn moves(mut gives: Vec<u64>, mut takes: Vec<u64>) -> Vec<Move> {
    let (mut from, mut to, mut moves) = (0, 0, Vec::new());
    while from < gives.len() && to < takes.len() {
        let users = gives[from].min(takes[to]);
        if users > 0 {
            moves.push(Move { from, to, users });
        }
        (gives[from], takes[to]) = (gives[from] - users, takes[to] - users);
        from += usize::from(gives[from] == 0);
        to += usize::from(to < takes.len() && takes[to] == 0);
    }
    moves
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(loads: &[Load], moves: &[Move]) -> Vec<u64> {
        let mut users: Vec<u64> = loads.iter().map(|load| load.users).collect();
        for step in moves {
            users[step.from] -= step.users;
            users[step.to] += step.users;
        }
        users
    }

    /// What must move at least: everything above the ranges has to go, everything below has to come.
    fn fewest(loads: &[Load], ranges: &[Range]) -> u64 {
        let above: u64 = loads.iter().zip(ranges).map(|(load, range)| load.users.saturating_sub(range.most)).sum();
        let below: u64 = loads.iter().zip(ranges).map(|(load, range)| range.least.saturating_sub(load.users)).sum();
        above.max(below)
    }

    #[test]
    fn ten_gateways_of_which_half_have_three_times_as_many_users_are_levelled() {
        let loads: Vec<Load> = (0..10).map(|n| Load { users: if n < 5 { 3_000 } else { 1_000 }, weight: 1.0 }).collect();
        let moves = plan(&loads, 0.1);
        assert_eq!(moves.iter().map(|step| step.users).sum::<u64>(), 4_000);
        assert!(after(&loads, &moves).iter().all(|users| (1_800..=2_200).contains(users)), "{moves:?}");
        assert_eq!(plan(&loads, 0.5), [], "within the tolerance nobody moves");
        assert_eq!(plan(&[], 0.1), []);
    }

    proptest! {
        #[test]
        fn loads_are_levelled_with_the_fewest_moves_and_nobody_falls_below_the_target(
            given in prop::collection::vec((0_u64..100_000, 1_u32..1_000), 1..40),
            tolerance in 0.0..0.5_f64,
        ) {
            let loads: Vec<Load> = given.iter().map(|(users, weight)| Load { users: *users, weight: f64::from(*weight) }).collect();
            let (ranges, moves) = (ranges(&loads, tolerance), plan(&loads, tolerance));
            let moved: u64 = moves.iter().map(|step| step.users).sum();
            prop_assert_eq!(moved, fewest(&loads, &ranges));
            for (at, users) in after(&loads, &moves).into_iter().enumerate() {
                prop_assert!((ranges[at].least..=ranges[at].most).contains(&users), "{} of {:?}", users, ranges[at]);
                let gives = moves.iter().any(|step| step.from == at);
                prop_assert!(!gives || users >= ranges[at].target);
                prop_assert!(!moves.iter().any(|step| step.to == at) || users <= ranges[at].target && !gives);
            }
        }
    }
}
