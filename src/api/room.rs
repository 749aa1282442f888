//! Room for so many connections: when one more comes, the one that has been there longest has had its chance, and makes room.
//! So those who do nothing keep nobody out who does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio_util::sync::CancellationToken;

pub struct Room {
    limit: usize,
    guests: Mutex<Guests>,
}

#[derive(Default)]
struct Guests {
    last: u64,
    by_arrival: BTreeMap<u64, CancellationToken>,
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
        let number = guests.last;
        guests.by_arrival.insert(number, closed.clone());
        if guests.by_arrival.len() > self.limit
            && let Some((_, oldest)) = guests.by_arrival.pop_first()
        {
            oldest.cancel();
        }
        Guest { room: self.clone(), number, closed }
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
}
