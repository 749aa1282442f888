//! What a proxy was told to do last, and how often that has come to act. Both are one value: what a connection does on an older
//! order never counts for a newer one.

use std::fmt::Debug;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

const STRIKE_DEADLINE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
pub struct Order<M> {
    pub mode: M,
    /// Its number.
    turn: usize,
    strikes: usize,
}

pub struct Orders<M>(watch::Sender<Order<M>>);

impl<M: Copy + Debug> Orders<M> {
    pub fn new(mode: M) -> Self {
        Self(watch::Sender::new(Order { mode, turn: 0, strikes: 0 }))
    }

    pub fn now(&self) -> Order<M> {
        *self.0.borrow()
    }

    pub fn set(&self, mode: M) {
        self.0.send_modify(|order| *order = order.followed_by(mode));
    }

    /// Ends `order`, unless another has taken its place; then None.
    pub fn end(&self, order: &Order<M>, mode: M) -> Option<Order<M>> {
        let next = order.followed_by(mode);
        self.0.send_if_modified(|now| (now.turn == order.turn).then(|| *now = next).is_some()).then_some(next)
    }

    /// `order` has come to act. That counts while it is the last.
    pub fn strike(&self, order: &Order<M>) {
        self.0.send_if_modified(|now| (now.turn == order.turn).then(|| now.strikes += 1).is_some());
    }

    /// Strikes, and waits for the next order.
    pub async fn hold(&self, order: &Order<M>) {
        self.strike(order);
        let _ = self.0.subscribe().wait_for(|now| now.turn != order.turn).await; // the sender lives in self
    }

    /// Waits until the last order has come to act.
    pub async fn struck(&self) {
        let mut orders = self.0.subscribe();
        let struck = timeout(STRIKE_DEADLINE, orders.wait_for(|now| now.strikes > 0)).await.is_ok_and(|struck| struck.is_ok());
        assert!(struck, "nothing met {:?} within {STRIKE_DEADLINE:?}", self.now().mode);
    }
}

impl<M> Order<M> {
    fn followed_by(&self, mode: M) -> Self {
        Self { mode, turn: self.turn + 1, strikes: 0 }
    }
}

#[tokio::test]
async fn what_is_done_on_an_older_order_does_not_count_for_a_newer_one() {
    let orders = Orders::new("one");
    let one = orders.now();
    orders.set("two");
    orders.strike(&one);
    assert_eq!(orders.now().strikes, 0);
    orders.hold(&one).await; // not held at all
    assert!(orders.end(&one, "three").is_none());
    let two = orders.now();
    orders.strike(&two);
    orders.struck().await;
    assert_eq!(orders.end(&two, "three").expect("the last").mode, "three");
    assert_eq!(orders.now().strikes, 0);
}
