//! Who does something most often, without counting everybody: a space-saving sketch (Metwally, Agrawal, El Abbadi 2005).
//!
//! It counts [`CAPACITY`] keys. Whoever is new when it is full takes the place of one that was counted least, and its count with
//! it, as an error. So a count is never too low, at most its error too high, and no error is greater than the sum of all counts
//! divided by [`CAPACITY`]: whoever has a greater share than that is in it.

use std::collections::HashMap;
use std::hash::Hash;

/// Keys that one sketch counts.
pub const CAPACITY: usize = 1_024;

/// A key, and how often it was counted: at most `error` too high.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted<K> {
    pub key: K,
    pub count: u64,
    pub error: u64,
}

/// A sketch.
#[derive(Debug)]
pub struct Top<K> {
    counted: Vec<Counted<K>>,
    places: HashMap<K, usize>,
    /// The least count when it was looked for, and places that had it and were not used since. It only grows.
    least: (u64, Vec<usize>),
}

/// What a sketch said at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally<K> {
    pub counted: Vec<Counted<K>>,
    /// The highest count that a key can have which is not in it.
    pub others: u64,
}

impl<K> Default for Tally<K> {
    fn default() -> Self {
        Self { counted: Vec::new(), others: 0 }
    }
}

impl<K> Default for Top<K> {
    fn default() -> Self {
        Self { counted: Vec::new(), places: HashMap::new(), least: (0, Vec::new()) }
    }
}

impl<K: Clone + Eq + Hash> Top<K> {
    pub fn count(&mut self, key: &K) {
        if let Some(place) = self.places.get(key) {
            self.counted[*place].count += 1;
        } else if self.counted.len() < CAPACITY {
            self.places.insert(key.clone(), self.counted.len());
            self.counted.push(Counted { key: key.clone(), count: 1, error: 0 });
        } else {
            let place = self.least_place();
            let Counted { key: former, count, .. } = self.counted[place].clone();
            self.places.remove(&former);
            self.places.insert(key.clone(), place);
            self.counted[place] = Counted { key: key.clone(), count: count + 1, error: count };
        }
    }

    /// One that was counted least. All of them are found at a time, and each is used once: so a stream of new keys costs one look
    /// at everything for many of them.
    fn least_place(&mut self) -> usize {
        while let Some(place) = self.least.1.pop() {
            if self.counted[place].count == self.least.0 {
                return place;
            }
        }
        let least = self.least();
        let mut places: Vec<usize> = (0..self.counted.len()).filter(|place| self.counted[*place].count == least).collect();
        let place = places.pop().unwrap_or(0);
        self.least = (least, places);
        place
    }

    fn least(&self) -> u64 {
        self.counted.iter().map(|counted| counted.count).min().unwrap_or(0)
    }

    /// What was counted until now counts half from now on; what is then nothing is forgotten.
    pub fn halve(&mut self) {
        self.counted.retain_mut(|counted| {
            (counted.count, counted.error) = (counted.count / 2, counted.error.div_ceil(2));
            counted.error = counted.error.min(counted.count);
            counted.count > 0
        });
        self.places = self.counted.iter().enumerate().map(|(place, counted)| (counted.key.clone(), place)).collect();
        self.least.1.clear();
    }

    pub fn tally(&self) -> Tally<K> {
        let others = if self.counted.len() < CAPACITY { 0 } else { self.least() };
        Tally { counted: self.counted.clone(), others }
    }
}

/// What several sketches counted together, the greatest first. The bounds hold for the sums.
pub fn merged<K: Clone + Eq + Hash>(tallies: &[Tally<K>]) -> Vec<Counted<K>> {
    let unseen: u64 = tallies.iter().map(|tally| tally.others).sum();
    let mut sums: HashMap<K, Counted<K>> = HashMap::new();
    for tally in tallies {
        for Counted { key, count, error } in &tally.counted {
            let fresh = || Counted { key: key.clone(), count: unseen, error: unseen };
            let sum = sums.entry(key.clone()).or_insert_with(fresh);
            // It is known how often this sketch counted it: that is no part of what is unseen.
            sum.count = sum.count + count - tally.others;
            sum.error = sum.error + error - tally.others;
        }
    }
    let mut sums: Vec<Counted<K>> = sums.into_values().collect();
    sums.sort_by_key(|sum| std::cmp::Reverse(sum.count));
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Counts, and checks every bound against what is true.
    fn check(keys: &[u32]) -> Vec<Counted<u32>> {
        let (mut top, mut truth) = (Top::default(), HashMap::<u32, u64>::new());
        for key in keys {
            top.count(key);
            *truth.entry(*key).or_default() += 1;
        }
        let tally = top.tally();
        for Counted { key, count, error } in &tally.counted {
            let real = truth[key];
            assert!(*count >= real && count - error <= real, "{key}: {count} - {error}, really {real}");
            assert!(*error <= keys.len() as u64 / CAPACITY as u64, "{key}: {error} of {}", keys.len());
        }
        let is_in = |key: &u32| tally.counted.iter().any(|counted| counted.key == *key);
        assert!(truth.iter().all(|(key, real)| is_in(key) || *real <= tally.others));
        assert_eq!(tally.counted.iter().map(|counted| counted.count).sum::<u64>(), keys.len() as u64);
        merged(&[tally])
    }

    #[test]
    fn few_keys_are_counted_exactly() {
        let all = check(&[3, 1, 3, 2, 3, 2]);
        assert_eq!(
            all.iter().map(|counted| (counted.key, counted.count, counted.error)).collect::<Vec<_>>(),
            [(3, 3, 0), (2, 2, 0), (1, 1, 0)]
        );
    }

    #[test]
    fn who_comes_often_is_found_among_any_number_of_others() {
        // One in a hundred is key 7, all others come once.
        let keys: Vec<u32> = (0..400_000).map(|i| if i % 100 == 0 { 7 } else { 1_000 + i }).collect();
        let first = &check(&keys)[0];
        assert_eq!((first.key, first.count), (7, 4_000));
    }

    #[test]
    fn what_is_old_counts_half_and_then_nothing() {
        let mut top = Top::default();
        (0..5).for_each(|_| top.count(&1));
        top.count(&2);
        top.halve();
        assert_eq!(top.tally().counted, [Counted { key: 1, count: 2, error: 0 }]);
        top.count(&2);
        assert_eq!(top.tally().counted.len(), 2, "who was forgotten comes again");
    }

    proptest! {
        #[test]
        fn bounds_hold_whatever_comes(seed in prop::collection::vec((0_u32..3_000, 1_usize..8), 1_500..2_500)) {
            let keys: Vec<u32> = seed.iter().flat_map(|(key, times)| std::iter::repeat_n(*key, *times)).collect();
            check(&keys);
        }

        #[test]
        fn bounds_hold_for_sums_of_sketches(seed in prop::collection::vec((0_u32..2_500, 0_usize..3), 4_000..8_000)) {
            let (mut tops, mut truth): ([Top<u32>; 3], HashMap<u32, u64>) = Default::default();
            for (key, which) in &seed {
                tops[*which].count(key);
                *truth.entry(*key).or_default() += 1;
            }
            for Counted { key, count, error } in merged(&tops.each_ref().map(Top::tally)) {
                prop_assert!(count >= truth[&key] && count - error <= truth[&key], "{key}: {count} - {error}");
            }
        }
    }
}
