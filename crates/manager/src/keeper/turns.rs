//! VMs that are to start at once take turns: each takes a processor for a while, and all together would take so long that each
//! looks as if it hangs.

use std::{num::NonZero, pin::Pin, sync::Arc, thread};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// So many VMs start at the same time.
#[derive(Debug, Clone)]
pub(crate) struct Turns(Arc<Semaphore>);

/// A VM's turn; the next one has it when this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
}

/// A place in the queue.
pub(super) type Place = Pin<Box<dyn Future<Output = Turn> + Send>>;

impl Turns {
    /// One for each of this computer's processors.
    pub(crate) fn for_this_computer() -> Self {
        Self::new(thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
    }

    fn new(at_once: NonZero<usize>) -> Self {
        Self(Arc::new(Semaphore::new(at_once.get())))
    }

    /// A turn, if nobody waits for one.
    pub(super) fn now(&self) -> Option<Turn> {
        self.0.clone().try_acquire_owned().ok().map(|permit| Turn { _permit: permit })
    }

    /// A turn, in the order of asking.
    pub(super) fn queue(&self) -> Place {
        let permits = self.0.clone();
        Box::pin(async move {
            match permits.acquire_owned().await {
                Ok(permit) => Turn { _permit: permit },
                // Nobody closes it.
                Err(_) => std::future::pending().await,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn twenty_take_turns_in_order_and_none_is_lost() {
        let turns = Turns::new(NonZero::new(2).unwrap());
        let mut running: Vec<Turn> = (0..2).map(|_| turns.now().unwrap()).collect();
        assert!(turns.now().is_none());
        let mut queue: std::collections::VecDeque<_> = (0..18).map(|_| turns.queue()).collect();
        assert!(queue.iter_mut().all(|place| place.now_or_never().is_none()));
        while let Some(mut next) = queue.pop_front() {
            running.remove(0);
            // Whoever waits longest has it, whoever is asked first.
            assert!(queue.iter_mut().all(|place| place.now_or_never().is_none()));
            running.push(next.as_mut().now_or_never().expect("it is its turn"));
        }
        drop(running);
        assert!(turns.now().is_some());
    }

    #[tokio::test]
    async fn whoever_leaves_the_queue_holds_nobody_up() {
        let turns = Turns::new(NonZero::<usize>::MIN);
        let first = turns.now().unwrap();
        let mut places = [turns.queue(), turns.queue()].map(Some);
        for place in places.iter_mut().flatten() {
            assert!(place.now_or_never().is_none());
        }
        places[0] = None;
        drop(first);
        assert!(places[1].take().unwrap().now_or_never().is_some());
    }
}
