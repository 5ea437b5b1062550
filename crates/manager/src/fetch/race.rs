//! One question for several machines, of which any may answer: asked one shortly after the other, without waiting for those
//! that are silent (RFC 8305 does the same with addresses).

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};

/// How long a machine may be silent before the next one is asked too.
pub(super) const STAGGER: Duration = Duration::from_millis(250);
/// The same once one has begun to answer: what takes long is not fetched from all of them at once, unless it stands still.
pub(super) const HEARD: Duration = Duration::from_secs(5);

/// When the next machine is asked.
#[derive(Clone)]
pub(super) struct Due(Arc<Mutex<Instant>>);

impl Due {
    /// A machine has begun to answer.
    pub(super) fn heard(&self) {
        self.set(Instant::now() + HEARD);
    }

    fn set(&self, due: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = due;
    }

    fn get(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The questions under way. Dropped, they are broken off.
///
/// How many there can be at once is bounded by how many machines there are to ask.
pub(super) struct Race<I, A, F> {
    waiting: I,
    ask: A,
    asked: FuturesUnordered<F>,
    due: Due,
}

impl<I, A, F> Race<I, A, F>
where
    I: ExactSizeIterator,
    A: FnMut(I::Item, Due) -> F,
    F: Future,
{
    pub(super) fn new(machines: impl IntoIterator<IntoIter = I>, ask: A) -> Self {
        Self {
            waiting: machines.into_iter(),
            ask,
            asked: FuturesUnordered::new(),
            due: Due(Arc::new(Mutex::new(Instant::now()))),
        }
    }

    /// What the next machine answers; `None` once all have. The first is asked at once, each further one when one before it
    /// has answered, or all have been silent for [`STAGGER`], or for [`HEARD`] after one had begun to answer.
    pub(super) async fn next(&mut self) -> Option<F::Output> {
        loop {
            let due = self.due.get();
            tokio::select! {
                biased;
                Some(answer) = self.asked.next() => {
                    // Whoever asks on does so because this was no help.
                    self.due.set(Instant::now());
                    return Some(answer);
                }
                () = sleep_until(due), if self.waiting.len() > 0 => {
                    if self.due.get() > due {
                        continue;
                    }
                    self.due.set(Instant::now() + STAGGER);
                    self.asked.extend(self.waiting.next().map(|next| (self.ask)(next, self.due.clone())));
                }
                else => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::{Arc, Mutex},
    };

    use tokio::time::sleep;

    use super::*;

    /// Counts the questions that were neither answered nor broken off.
    struct Open(Arc<Mutex<usize>>);

    impl Open {
        fn new(count: &Arc<Mutex<usize>>) -> Self {
            *count.lock().unwrap() += 1;
            Self(count.clone())
        }
    }

    impl Drop for Open {
        fn drop(&mut self) {
            *self.0.lock().unwrap() -= 1;
        }
    }

    // The clock in these is one that runs only while nothing else happens.

    #[tokio::test(start_paused = true)]
    async fn machines_that_say_nothing_cost_a_moment_each_and_are_broken_off() {
        let (began, open) = (Instant::now(), Arc::<Mutex<usize>>::default());
        let mut race = Race::new([false, false, false, true], |answers, _| {
            let asked = Open::new(&open);
            async move {
                let _asked = asked;
                if answers { began.elapsed() } else { pending().await }
            }
        });
        assert_eq!(race.next().await, Some(STAGGER * 3));
        assert_eq!(*open.lock().unwrap(), 3, "they may still answer, if this was no help");
        drop(race);
        assert_eq!(*open.lock().unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_answers_in_time_is_the_only_one_that_is_asked() {
        let mut asked = Vec::new();
        let mut race = Race::new([1, 2], |n, _| {
            asked.push(n);
            async move {
                sleep(STAGGER - Duration::from_millis(1)).await;
                n
            }
        });
        assert_eq!(race.next().await, Some(1));
        drop(race);
        assert_eq!(asked, [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_begun_to_answer_is_given_time_and_not_for_ever() {
        let began = Instant::now();
        let mut race = Race::new([true, false], |stands_still, due| async move {
            if stands_still {
                due.heard();
                pending().await
            }
            began.elapsed()
        });
        assert_eq!(race.next().await, Some(HEARD));
    }

    #[tokio::test(start_paused = true)]
    async fn after_an_answer_that_was_no_help_the_next_is_asked_at_once_and_at_last_all_have_been() {
        let began = Instant::now();
        let mut race = Race::new([1, 2, 3], |n, _| async move { (n, began.elapsed()) });
        for n in [1, 2, 3] {
            assert_eq!(race.next().await, Some((n, Duration::ZERO)));
        }
        assert_eq!(race.next().await, None);
        let nobody: [u8; 0] = [];
        assert_eq!(Race::new(nobody, |n, _| async move { n }).next().await, None);
    }
}
