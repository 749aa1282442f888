//! In which order nodes are tried: those of the own zone in turn, and others while none of them will do.

use std::collections::VecDeque;

/// Places in a list of nodes that begins with those of the own zone.
pub struct Tour {
    near: usize,
    /// The first is the one in use.
    places: VecDeque<usize>,
}

impl Tour {
    /// Of `all` nodes the first `near` are those of the own zone. `turn`: any number; where each part begins.
    pub fn new(near: usize, all: usize, turn: usize) -> Self {
        let begun_at = |places: std::ops::Range<usize>| {
            let (first, count) = (places.start, places.len());
            places.map(move |place| first + (place - first + turn % count) % count)
        };
        Self { near, places: begun_at(0..near).chain(begun_at(near..all)).collect() }
    }

    /// All of them.
    pub fn places(self) -> Vec<usize> {
        self.places.into()
    }

    pub fn now(&self) -> usize {
        self.places[0]
    }

    /// This one will do: when it does no more, those of the own zone come first again.
    pub fn settle(&mut self) {
        let near = self.near;
        self.places.make_contiguous()[1..].sort_by_key(|place| *place >= near);
    }

    /// This one will not do.
    pub fn go_on(&mut self) {
        self.places.rotate_left(1);
    }

    /// After this one comes that one.
    pub fn next_is(&mut self, place: usize) {
        if let Some(at) = self.places.iter().position(|known| *known == place).filter(|at| *at > 0) {
            self.places.make_contiguous()[1..=at].rotate_right(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where it goes from `tour`, `count` times.
    fn tried(tour: &mut Tour, count: usize) -> Vec<usize> {
        let next = |_| {
            let place = tour.now();
            tour.go_on();
            place
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn all_of_the_own_zone_are_tried_before_any_other() {
        assert_eq!(Tour::new(3, 5, 7).places(), [1, 2, 0, 4, 3]);
        assert_eq!(Tour::new(3, 3, usize::MAX).places(), [0, 1, 2]);
        assert_eq!(tried(&mut Tour::new(2, 4, 0), 6), [0, 1, 2, 3, 0, 1]);
    }

    #[test]
    fn whoever_was_elsewhere_comes_back_to_the_own_zone() {
        let mut tour = Tour::new(2, 4, 0);
        tried(&mut tour, 3);
        assert_eq!(tour.now(), 3, "nobody else would do");
        tour.settle();
        assert_eq!(tried(&mut tour, 4), [3, 0, 1, 2]);
    }

    #[test]
    fn one_that_is_known_to_do_is_tried_next() {
        let mut tour = Tour::new(2, 4, 0);
        tour.next_is(3);
        assert_eq!(tried(&mut tour, 4), [0, 3, 1, 2]);
        tour.next_is(0);
        assert_eq!(tour.now(), 0, "it is in use");
    }
}
