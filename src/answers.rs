//! Answers to callers who wait on another thread.
//!
//! A serving thread has a runtime of its own, and whoever wakes one of its tasks from outside makes a system call for each. So
//! answers that are known together are handed over together: one wake-up for each thread, which then wakes its own tasks, and
//! writes what they have to say with as few system calls.

use std::cell::RefCell;
use std::mem;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use tokio::sync::Notify;
use tokio::sync::oneshot;

/// What came of a call, on its way to whoever waits. Dropped, it says that there is no answer.
pub struct Answer<T> {
    caller: oneshot::Sender<T>,
    /// Of the thread that waits. None: it has none.
    desk: Option<Arc<Desk>>,
}

/// Where a thread fetches answers. There are no more than calls of its own that wait.
#[derive(Default)]
struct Desk {
    answers: Mutex<Vec<GiveOut>>,
    handed: Notify,
}

type GiveOut = Box<dyn FnOnce() + Send>;

/// A caller, and what it is told.
type Due<T> = (oneshot::Sender<T>, T);

thread_local! {
    static OWN: RefCell<Option<Arc<Desk>>> = const { RefCell::new(None) };
}

/// An answer to the calling thread.
pub fn channel<T>() -> (Answer<T>, oneshot::Receiver<T>) {
    let (caller, answer) = oneshot::channel();
    (Answer { caller, desk: OWN.with_borrow(Option::clone) }, answer)
}

/// Runs `work` on a thread that has no other runtime, and gives out the answers to what it asks.
pub async fn with_desk<T>(work: impl Future<Output = T>) -> T {
    let desk = Arc::<Desk>::default();
    OWN.set(Some(desk.clone()));
    let done = tokio::select! {
        biased;
        never = desk.give_out() => never,
        done = work => done,
    };
    OWN.set(None);
    done
}

/// Gives many answers.
pub fn send_all<T: Send + 'static>(answers: impl Iterator<Item = (Answer<T>, T)>) {
    let mut by_desk: Vec<(Arc<Desk>, Vec<Due<T>>)> = Vec::new();
    for (Answer { caller, desk }, answer) in answers {
        match desk {
            None => drop(caller.send(answer)), // whoever gave up needs none
            Some(desk) => match by_desk.iter_mut().find(|(known, _)| Arc::ptr_eq(known, &desk)) {
                Some((_, waiting)) => waiting.push((caller, answer)),
                None => by_desk.push((desk, vec![(caller, answer)])),
            },
        }
    }
    for (desk, answers) in by_desk {
        desk.hand(Box::new(move || answers.into_iter().for_each(|(caller, answer)| drop(caller.send(answer)))));
    }
}

impl<T> Answer<T> {
    /// Whether nobody waits any more.
    pub fn is_closed(&self) -> bool {
        self.caller.is_closed()
    }

    pub fn send(self, answer: T) {
        drop(self.caller.send(answer)); // whoever gave up needs none
    }
}

impl Desk {
    fn hand(&self, give_out: GiveOut) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).push(give_out);
        self.handed.notify_one();
    }

    async fn give_out<T>(&self) -> T {
        loop {
            self.handed.notified().await;
            let answers = mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner));
            answers.into_iter().for_each(|give_out| give_out());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tokio::runtime::Builder;

    use super::*;

    #[test]
    fn each_caller_hears_its_own_answer_on_the_thread_where_it_waits() {
        let (ask, asked) = std::sync::mpsc::channel::<(Answer<u32>, u32)>();
        let threads: Vec<_> = (0..3)
            .map(|thread| {
                let ask = ask.clone();
                thread::spawn(move || {
                    let runtime = Builder::new_current_thread().build().unwrap();
                    let call = |n| {
                        let (answer, answered) = channel();
                        ask.send((answer, n)).unwrap();
                        async move { assert_eq!(answered.await, Ok(2 * n)) }
                    };
                    runtime.block_on(with_desk(async {
                        futures_util::future::join_all((0..100).map(|n| call(1_000 * thread + n))).await;
                    }));
                })
            })
            .collect();
        let (answer, no_desk) = channel();
        send_all((0..300).map(|_| asked.recv().unwrap()).chain([(answer, 21)]).map(|(answer, n)| (answer, 2 * n)));
        assert_eq!(no_desk.blocking_recv(), Ok(42));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn whoever_gave_up_is_in_nobody_s_way_and_a_dropped_answer_says_so() {
        let runtime = Builder::new_current_thread().build().unwrap();
        runtime.block_on(with_desk(async {
            let ((one, gave_up), (other, waits), (dropped, unanswered)) = (channel(), channel(), channel::<u32>());
            drop(gave_up);
            assert!(one.is_closed() && !other.is_closed());
            send_all([(one, 1), (other, 2)].into_iter());
            drop(dropped);
            assert_eq!((waits.await, unanswered.await.is_err()), (Ok(2), true));
        }));
    }
}
