//! Which of the gateways in question is the best. A further algorithm is a variant of [`Algorithm`] and an arm of
//! [`Algorithm::best`].

use smallvec::SmallVec;

use crate::domain::allocation::dice::Dice;
use crate::domain::allocation::dice::fraction;
use crate::domain::allocation::dice::mixed;
use crate::domain::allocation::field::Tier;
use crate::domain::allocation::view::Ranking;
use crate::domain::allocation::view::View;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Of two that are drawn by their shares the less loaded one: even, also where nodes know of each other's allocations only
    /// with the next beat.
    #[default]
    TwoChoices,
    /// The least loaded of all: even at once, but whoever is new gets everybody.
    LeastLoad,
    /// A user keeps the gateway, as long as it is there and not much fuller than others.
    Rendezvous,
}

impl Algorithm {
    pub const ALL: [Self; 3] = [Self::TwoChoices, Self::LeastLoad, Self::Rendezvous];

    pub fn name(self) -> &'static str {
        match self {
            Self::TwoChoices => "two_choices",
            Self::LeastLoad => "least_load",
            Self::Rendezvous => "rendezvous",
        }
    }

    /// Up to `count` different ones of the tier that may be chosen, the best first.
    pub fn best(self, count: usize, tier: &Tier<'_>, view: &View<'_>, dice: &mut Dice) -> Ranking {
        match self {
            Self::TwoChoices => two_choices(count, tier, view, dice),
            Self::LeastLoad => least_load(count, tier, view),
            Self::Rendezvous => rendezvous(count, tier, view),
        }
    }
}

fn two_choices(count: usize, tier: &Tier<'_>, view: &View<'_>, dice: &mut Dice) -> Ranking {
    let mut chosen = Ranking::new();
    while chosen.len() < count {
        let is_new = |at: usize| !chosen.contains(&at) && view.takes(at);
        let Some(one) = tier.draw(view.field, dice, is_new) else { break };
        let other = tier.draw(view.field, dice, |at| at != one && is_new(at));
        chosen.push(other.filter(|other| view.load(*other) < view.load(one)).unwrap_or(one));
    }
    chosen
}

fn least_load(count: usize, tier: &Tier<'_>, view: &View<'_>) -> Ranking {
    let mut best = Best::new();
    for at in tier.members() {
        if let Some(users) = view.users_if_taken(at) {
            enter(&mut best, count, (view.load_with(users, at), at));
        }
    }
    ranking(best)
}

/// Weighted rendezvous: each gateway throws for the user with dice that show the same on every node, and the best throw wins.
/// Who is fuller than `bounded_load` times its part of all users is passed over, as long as there are others.
fn rendezvous(count: usize, tier: &Tier<'_>, view: &View<'_>) -> Ranking {
    let gateways = &view.field.gateways;
    let taking: Vec<(usize, f64)> = tier.members().filter_map(|at| Some((at, view.users_if_taken(at)?))).collect();
    let (users, shares) =
        taking.iter().fold((1.0, 0.0), |(users, shares), (at, own)| (users + own, shares + gateways[*at].share));
    let most = view.rules.bounded_load * users / shares;
    let hash = view.ask.user.hash();
    let first = |count: usize, wants_room: bool| {
        let mut best = Best::new();
        for (at, users) in taking.iter().copied() {
            let share = gateways[at].share;
            if (users + 1.0 <= (most * share).ceil()) != wants_room {
                continue;
            }
            // A throw is how long one waits for an event that comes so often: -ln(u) / share. It is at least (1 - u) / share.
            let u = fraction(mixed(hash ^ gateways[at].hash)).max(f64::MIN_POSITIVE);
            let longest = if best.len() < count { f64::INFINITY } else { best.last().map_or(0.0, |last| last.0) };
            if (1.0 - u) / share < longest {
                enter(&mut best, count, (-u.ln() / share, at));
            }
        }
        ranking(best)
    };
    let mut chosen = first(count, true);
    if chosen.len() < count {
        let more = first(count - chosen.len(), false);
        chosen.extend(more);
    }
    chosen
}

/// Those with the smallest numbers so far.
type Best = SmallVec<[(f64, usize); 4]>;

fn ranking(best: Best) -> Ranking {
    best.into_iter().map(|(_, at)| at).collect()
}

fn enter(best: &mut Best, count: usize, one: (f64, usize)) {
    let place = best.partition_point(|known| *known <= one);
    if place < count {
        best.truncate(count - 1);
        best.insert(place, one);
    }
}
