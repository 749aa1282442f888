//! Room for so many connections: when one more comes, the one that has been there longest has had its chance, and makes room.
//! So those who do nothing keep nobody out who does. Where many come at the same instant, each has its [`CHANCE`] nevertheless.
//! It is counted in looks and not by the clock: on a busy machine the clock goes on while this thread stands still, and whoever
//! has spoken long since would have to go because nobody has listened yet.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Between looks whether there is room. All that has come for this thread is worked off in the meantime.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// For so many looks nobody has to make room for one who waits at the door: longer than a handshake takes.
const CHANCE: u64 = 20;

pub struct Room {
    limit: usize,
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    last: u64,
    looks: u64,
    /// With the looks there had been.
    by_arrival: BTreeMap<u64, (u64, CancellationToken)>,
}

/// One of them, until it is dropped or has left.
pub struct Guest {
    room: Arc<Room>,
    number: u64,
    closed: CancellationToken,
}

impl Room {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, guests: Mutex::default() })
    }

    pub fn enter(self: &Arc<Self>) -> Guest {
        let (mut guests, closed) = (self.lock(), CancellationToken::new());
        guests.last += 1;
        let (number, looks) = (guests.last, guests.looks);
        guests.by_arrival.insert(number, (looks, closed.clone()));
        if guests.by_arrival.len() > self.limit
            && let Some((_, (_, oldest))) = guests.by_arrival.pop_first()
        {
            oldest.cancel();
        }
        Guest { room: self.clone(), number, closed }
    }

    /// The same, once whoever has been there longest has had its chance.
    pub async fn enter_in_turn(self: &Arc<Self>) -> Guest {
        while self.is_full_of_the_young() {
            sleep(LOOK_INTERVAL).await;
            self.lock().looks += 1;
        }
        self.enter()
    }

    fn is_full_of_the_young(&self) -> bool {
        let guests = self.lock();
        let oldest = guests.by_arrival.first_key_value().map(|(_, (before, _))| guests.looks - before);
        guests.by_arrival.len() >= self.limit && oldest.is_some_and(|looks| looks < CHANCE)
    }

    fn lock(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest {
    /// Its place is free from here on, and it makes room for nobody any more.
    pub fn leave(&self) {
        self.room.lock().by_arrival.remove(&self.number);
    }

    /// Waits until it has to make room.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use super::*;

    #[test]
    fn the_one_that_has_been_there_longest_makes_room() {
        let room = Room::new(2);
        let (first, second) = (room.enter(), room.enter());
        first.leave();
        let third = room.enter();
        assert!(![&first, &second, &third].iter().any(|one| one.closed.is_cancelled()));
        let _fourth = room.enter();
        assert!(second.closed.is_cancelled() && !first.closed.is_cancelled() && !third.closed.is_cancelled());
        drop(third);
        let _fifth = room.enter();
        assert_eq!(room.lock().by_arrival.len(), 2);
    }

    #[tokio::test]
    async fn of_many_that_come_at_once_each_has_its_chance() {
        let chance = LOOK_INTERVAL * u32::try_from(CHANCE).unwrap();
        let room = Room::new(1);
        let first = room.enter();
        thread::sleep(2 * chance); // which is no chance
        let began = Instant::now();
        let second = room.enter_in_turn().await;
        assert!(first.closed.is_cancelled() && began.elapsed() >= chance);
        drop(second);
        let third = room.enter_in_turn().await;
        assert!(!third.closed.is_cancelled(), "there was room");
    }
}
