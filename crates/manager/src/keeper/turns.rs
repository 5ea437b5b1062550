//! VMs that are to start at once take turns: each takes a processor for a while, and all together would take so long that each
//! looks as if it hangs. And each takes memory, little by little: what those that start have not taken yet is spoken for.

use std::{
    num::NonZero,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use clan_types::ByteSize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Beside its guest's memory, what QEMU takes for itself.
const OVERHEAD: ByteSize = ByteSize::from_mib(64);

/// So many VMs start at the same time.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    places: Arc<Semaphore>,
    spoken_for: SpokenFor,
}

/// Bytes that VMs which start will take.
type SpokenFor = Arc<Mutex<u64>>;

/// A VM's turn; the next one has it when this is dropped, by when it has the memory it takes.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
    spoken_for: SpokenFor,
    claimed: u64,
}

/// What a VM takes of this computer's memory.
pub(super) fn needed(memory: ByteSize) -> ByteSize {
    ByteSize::from_bytes(memory.as_bytes().saturating_add(OVERHEAD.as_bytes()))
}

fn lock(spoken_for: &Mutex<u64>) -> MutexGuard<'_, u64> {
    spoken_for.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Turn {
    /// Takes memory for the VM, if there is enough of what is `available` on this computer; else tells how much is left.
    pub(super) fn claim(&mut self, memory: ByteSize, available: ByteSize) -> Result<(), ByteSize> {
        let mut spoken_for = lock(&self.spoken_for);
        let others = spoken_for.saturating_sub(self.claimed);
        let left = available.as_bytes().saturating_sub(others);
        let needed = needed(memory).as_bytes();
        if needed > left {
            return Err(ByteSize::from_bytes(left));
        }
        (*spoken_for, self.claimed) = (others.saturating_add(needed), needed);
        Ok(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut spoken_for = lock(&self.spoken_for);
        *spoken_for = spoken_for.saturating_sub(self.claimed);
    }
}

/// A place in the queue.
pub(super) type Place = Pin<Box<dyn Future<Output = Turn> + Send>>;

impl Turns {
    /// One for each of this computer's processors.
    pub(crate) fn for_this_computer() -> Self {
        Self::new(thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN))
    }

    fn new(at_once: NonZero<usize>) -> Self {
        Self { places: Arc::new(Semaphore::new(at_once.get())), spoken_for: SpokenFor::default() }
    }

    /// A turn, if nobody waits for one.
    pub(super) fn now(&self) -> Option<Turn> {
        let permit = self.places.clone().try_acquire_owned().ok()?;
        Some(Turn { _permit: permit, spoken_for: self.spoken_for.clone(), claimed: 0 })
    }

    /// A turn, in the order of asking.
    pub(super) fn queue(&self) -> Place {
        let (places, spoken_for) = (self.places.clone(), self.spoken_for.clone());
        Box::pin(async move {
            match places.acquire_owned().await {
                Ok(permit) => Turn { _permit: permit, spoken_for, claimed: 0 },
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

    #[test]
    fn memory_is_promised_once() {
        let turns = Turns::new(NonZero::new(3).unwrap());
        let mut all: Vec<Turn> = (0..3).map(|_| turns.now().unwrap()).collect();
        let (each, free) = (ByteSize::from_mib(512), ByteSize::from_mib(1200));
        assert_eq!(all[0].claim(each, free), Ok(()));
        // A VM whose start is tried again does not take it twice.
        assert_eq!(all[0].claim(each, free), Ok(()));
        assert_eq!(all[1].claim(each, free), Ok(()));
        assert_eq!(all[2].claim(each, free), Err(ByteSize::from_mib(1200 - 2 * (512 + 64))));
        // The first one has taken what it needs, so less is available, and nothing is spoken for twice.
        all.remove(0);
        let rest = ByteSize::from_mib(1200 - 576);
        assert_eq!(all[1].claim(each, rest), Err(ByteSize::from_mib(1200 - 2 * 576)));
        all.remove(0);
        assert_eq!(all[0].claim(each, rest), Ok(()));
        all.clear();
        assert_eq!(*lock(&turns.spoken_for), 0);
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
