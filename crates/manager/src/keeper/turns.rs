//! VMs that are to start at once take turns: each takes a processor for a while, and all together would take so long that each
//! looks as if it hangs. And each takes memory, little by little: what those that start have not taken yet is spoken for. If
//! the person has said how much all VMs may have together, each has its share of that for as long as it runs.

use std::{
    collections::BTreeMap,
    fmt,
    num::NonZero,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use clan_types::ByteSize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Beside its guest's memory, what QEMU takes for itself.
const OVERHEAD: ByteSize = ByteSize::from_mib(64);

/// So many VMs start at the same time, and take so much memory.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    places: Arc<Semaphore>,
    waiting: Queue,
    hungry: Queue,
    spoken_for: Bytes,
    given: Bytes,
    /// What all VMs together may have.
    budget: Option<ByteSize>,
    /// Held while memory is looked at and taken.
    claiming: Arc<Mutex<()>>,
}

type Bytes = Arc<Mutex<u64>>;

/// A VM's turn; the next one has it when this is dropped, by when it has the memory it takes.
#[derive(Debug)]
pub(super) struct Turn {
    _permit: OwnedSemaphorePermit,
    turns: Turns,
    claimed: Option<Held>,
}

/// Bytes that count as taken until this is dropped.
#[derive(Debug)]
struct Held {
    of: Bytes,
    bytes: u64,
}

/// A VM's share of what all VMs may have.
#[derive(Debug)]
pub(super) struct Share(Held);

impl Share {
    fn is_for(&self, memory: ByteSize) -> bool {
        self.0.bytes == needed(memory).as_bytes()
    }
}

/// Why a VM does not get the memory it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Short {
    /// What is left for it.
    pub(super) left: ByteSize,
    /// Of what all VMs may have together, if that is what is short.
    pub(super) budget: Option<ByteSize>,
}

/// A place in a queue: the first one is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rank {
    place: usize,
    of: usize,
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "number {} of {}", self.place, self.of)
    }
}

/// Who waits, in the order of asking, and how much each needs.
type Line = BTreeMap<u64, u64>;

#[derive(Debug, Clone)]
struct Queue(watch::Sender<Line>);

/// Somebody's place in a queue, until this is dropped.
#[derive(Debug)]
pub(super) struct Ticket {
    number: u64,
    queue: Queue,
}

impl Queue {
    fn new() -> Self {
        Self(watch::Sender::new(Line::new()))
    }

    fn stand(&self, needs: u64) -> Ticket {
        let mut number = 0;
        self.0.send_modify(|line| {
            number = line.last_key_value().map_or(0, |(last, _)| last + 1);
            line.insert(number, needs);
        });
        Ticket { number, queue: self.clone() }
    }
}

impl Ticket {
    /// Where it is now.
    pub(super) fn rank(&self) -> Rank {
        let line = self.queue.0.borrow();
        Rank { place: line.range(..=self.number).count(), of: line.len() }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.0.send_modify(|line| {
            line.remove(&self.number);
        });
    }
}

/// What a VM takes of this computer's memory.
pub(crate) fn needed(memory: ByteSize) -> ByteSize {
    ByteSize::from_bytes(memory.as_bytes().saturating_add(OVERHEAD.as_bytes()))
}

fn lock(bytes: &Mutex<u64>) -> MutexGuard<'_, u64> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hold(of: &Bytes, bytes: u64) -> Held {
    let mut sum = lock(of);
    *sum = sum.saturating_add(bytes);
    Held { of: of.clone(), bytes }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut sum = lock(&self.of);
        *sum = sum.saturating_sub(self.bytes);
    }
}

impl Turn {
    /// Takes memory for the VM, if there is enough of what is `available` on this computer, and of what VMs may have. Whoever
    /// waits with `ticket` lets those go first who wait longer, if they fit.
    ///
    /// What is available is held back for as long as the turn lasts: then the VM has taken it. A VM that has its share from
    /// before keeps it, unless it has another size now.
    pub(super) fn claim(
        &mut self,
        memory: ByteSize,
        available: ByteSize,
        ticket: Option<&Ticket>,
        share: Option<Share>,
    ) -> Result<Share, Short> {
        // One whose start is tried again does not take it twice.
        drop(self.claimed.take());
        let claiming = self.turns.claiming.clone();
        let _one = claiming.lock().unwrap_or_else(PoisonError::into_inner);
        self.turns.fits(memory, available, ticket, share.as_ref())?;
        self.claimed = Some(hold(&self.turns.spoken_for, needed(memory).as_bytes()));
        Ok(share.filter(|share| share.is_for(memory)).unwrap_or_else(|| self.turns.share(memory)))
    }
}

/// A place in the queue for a turn.
pub(super) struct Place {
    turn: Pin<Box<dyn Future<Output = Turn> + Send>>,
    ticket: Ticket,
    line: watch::Receiver<Line>,
}

impl Place {
    /// The turn when it has come; nothing when the queue has moved.
    pub(super) async fn next(&mut self) -> Option<Turn> {
        tokio::select! {
            biased;
            turn = &mut self.turn => Some(turn),
            Ok(()) = self.line.changed() => None,
        }
    }

    pub(super) fn rank(&self) -> Rank {
        self.ticket.rank()
    }
}

impl Turns {
    /// One for each of this computer's processors. `budget` is what all VMs together may have, if there is a limit.
    pub(crate) fn for_this_computer(budget: Option<ByteSize>) -> Self {
        Self::new(thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN), budget)
    }

    fn new(at_once: NonZero<usize>, budget: Option<ByteSize>) -> Self {
        Self {
            places: Arc::new(Semaphore::new(at_once.get())),
            waiting: Queue::new(),
            hungry: Queue::new(),
            spoken_for: Bytes::default(),
            given: Bytes::default(),
            budget,
            claiming: Arc::default(),
        }
    }

    /// What all VMs together may have.
    pub(super) fn budget(&self) -> Option<ByteSize> {
        self.budget
    }

    /// A turn, if nobody waits for one.
    pub(super) fn now(&self) -> Option<Turn> {
        let permit = self.places.clone().try_acquire_owned().ok()?;
        Some(Turn { _permit: permit, turns: self.clone(), claimed: None })
    }

    /// A turn, in the order of asking.
    pub(super) fn queue(&self) -> Place {
        let turns = self.clone();
        let turn = async move {
            match turns.places.clone().acquire_owned().await {
                Ok(permit) => Turn { _permit: permit, turns, claimed: None },
                // Nobody closes it.
                Err(_) => std::future::pending().await,
            }
        };
        let ticket = self.waiting.stand(0);
        Place { turn: Box::pin(turn), ticket, line: self.waiting.0.subscribe() }
    }

    /// A place among those who wait for memory.
    pub(super) fn hunger(&self, memory: ByteSize) -> Ticket {
        self.hungry.stand(needed(memory).as_bytes())
    }

    /// The share of a VM that runs.
    pub(super) fn share(&self, memory: ByteSize) -> Share {
        Share(hold(&self.given, needed(memory).as_bytes()))
    }

    /// Whether there is memory for a VM; as [`Turn::claim`].
    pub(super) fn fits(
        &self,
        memory: ByteSize,
        available: ByteSize,
        ticket: Option<&Ticket>,
        share: Option<&Share>,
    ) -> Result<(), Short> {
        let needed = needed(memory).as_bytes();
        let mut free = available.as_bytes().saturating_sub(*lock(&self.spoken_for));
        let budget = self.budget.filter(|_| share.is_none_or(|share| !share.is_for(memory)));
        let others = lock(&self.given).saturating_sub(share.map_or(0, |share| share.0.bytes));
        let mut allowed = budget.map(|budget| budget.as_bytes().saturating_sub(others));
        for (number, first) in self.hungry.0.borrow().iter() {
            let longer = ticket.is_none_or(|ticket| *number < ticket.number);
            if longer && *first <= free && allowed.is_none_or(|allowed| *first <= allowed) {
                free -= first;
                allowed = allowed.map(|allowed| allowed - first);
            }
        }
        match allowed.filter(|allowed| needed > *allowed) {
            Some(left) => Err(Short { left: ByteSize::from_bytes(left), budget: self.budget }),
            None if needed > free => Err(Short { left: ByteSize::from_bytes(free), budget: None }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn turns(at_once: usize, budget: Option<u64>) -> Turns {
        Turns::new(NonZero::new(at_once).unwrap(), budget.map(ByteSize::from_mib))
    }

    fn mib(n: u64) -> ByteSize {
        ByteSize::from_mib(n)
    }

    #[tokio::test]
    async fn twenty_take_turns_in_order_and_none_is_lost() {
        let turns = turns(2, None);
        let mut running: Vec<Turn> = (0..2).map(|_| turns.now().unwrap()).collect();
        assert!(turns.now().is_none());
        let mut queue: std::collections::VecDeque<_> = (0..18).map(|_| turns.queue()).collect();
        let comes = |place: &mut Place| (&mut place.turn).now_or_never();
        assert!(queue.iter_mut().all(|place| comes(place).is_none()));
        assert_eq!(queue[17].rank().to_string(), "number 18 of 18");
        let mut left = 18;
        while let Some(mut next) = queue.pop_front() {
            assert_eq!(next.rank(), Rank { place: 1, of: left });
            running.remove(0);
            // Whoever waits longest has it, whoever is asked first.
            assert!(queue.iter_mut().all(|place| comes(place).is_none()));
            running.push(comes(&mut next).expect("it is its turn"));
            left -= 1;
        }
        drop(running);
        assert!(turns.now().is_some());
    }

    #[tokio::test]
    async fn whoever_waits_hears_that_the_queue_has_moved() {
        let turns = turns(1, None);
        let turn = turns.now().unwrap();
        let (first, mut second) = (turns.queue(), turns.queue());
        assert!(second.next().now_or_never().is_none());
        drop(first);
        assert!(second.next().now_or_never().unwrap().is_none());
        assert_eq!(second.rank(), Rank { place: 1, of: 1 });
        drop(turn);
        assert!(second.next().now_or_never().unwrap().is_some());
    }

    #[test]
    fn memory_is_promised_once() {
        let turns = turns(3, None);
        let mut all: Vec<Turn> = (0..3).map(|_| turns.now().unwrap()).collect();
        let (each, free) = (mib(512), mib(1200));
        assert!(all[0].claim(each, free, None, None).is_ok());
        // A VM whose start is tried again does not take it twice.
        assert!(all[0].claim(each, free, None, None).is_ok());
        assert!(all[1].claim(each, free, None, None).is_ok());
        let short = |left| Short { left: mib(left), budget: None };
        assert_eq!(all[2].claim(each, free, None, None).unwrap_err(), short(1200 - 2 * 576));
        // The first one has taken what it needs, so less is available, and nothing is spoken for twice.
        all.remove(0);
        let rest = mib(1200 - 576);
        assert_eq!(all[1].claim(each, rest, None, None).unwrap_err(), short(1200 - 2 * 576));
        all.remove(0);
        assert!(all[0].claim(each, rest, None, None).is_ok());
        all.clear();
        assert_eq!(*lock(&turns.spoken_for), 0);
    }

    #[test]
    fn what_vms_may_have_together_is_kept_for_as_long_as_they_run() {
        let turns = turns(1, Some(700));
        let plenty = mib(1 << 20);
        let start = |memory| turns.now().unwrap().claim(mib(memory), plenty, None, None);
        let first = start(256).unwrap();
        let second = start(256).unwrap();
        assert_eq!(start(256).unwrap_err(), Short { left: mib(60), budget: Some(mib(700)) });
        // One that was found running is there, whatever was said since.
        let found = turns.share(mib(512));
        drop(first);
        assert_eq!(start(256).unwrap_err(), Short { left: mib(0), budget: Some(mib(700)) });
        drop(found);
        assert!(start(256).is_ok());
        // One that is started anew has its share still, before all who wait; for more it waits like everybody.
        let ticket = turns.hunger(mib(256));
        let again = turns.now().unwrap().claim(mib(256), plenty, None, Some(second)).unwrap();
        let full = turns.share(mib(256));
        assert_eq!(
            turns.fits(mib(512), plenty, None, Some(&again)),
            Err(Short { left: mib(60), budget: Some(mib(700)) })
        );
        assert!(turns.fits(mib(256), plenty, None, Some(&again)).is_ok());
        drop((ticket, full));
        let second = again;
        drop(second);
        assert_eq!(*lock(&turns.given), 0);
    }

    #[test]
    fn who_waits_longer_for_memory_goes_first_and_a_large_one_holds_up_no_small_one() {
        let turns = turns(1, Some(700));
        let plenty = mib(1 << 20);
        let running = turns.share(mib(256));
        let (large, small, other) = (turns.hunger(mib(512)), turns.hunger(mib(256)), turns.hunger(mib(256)));
        assert_eq!(other.rank().to_string(), "number 3 of 3");
        let fits = |memory, ticket: &Ticket| turns.fits(mib(memory), plenty, Some(ticket), None).is_ok();
        assert!(!fits(512, &large));
        assert!(fits(256, &small));
        assert!(!fits(256, &other), "what is left is for the one before");
        assert!(turns.fits(mib(256), plenty, None, None).is_err(), "who comes new waits behind all");
        drop(running);
        assert!(fits(512, &large));
        assert!(!fits(256, &small));
        drop(large);
        assert!(fits(256, &small) && fits(256, &other));
    }

    #[tokio::test]
    async fn whoever_leaves_the_queue_holds_nobody_up() {
        let turns = turns(1, None);
        let first = turns.now().unwrap();
        let mut places = [turns.queue(), turns.queue()].map(Some);
        for place in places.iter_mut().flatten() {
            assert!((&mut place.turn).now_or_never().is_none());
        }
        places[0] = None;
        drop(first);
        assert!((&mut places[1].take().unwrap().turn).now_or_never().is_some());
    }

    proptest! {
        /// However VMs come, wait and go, they never have more than they may, and nobody who fits alone waits for ever.
        #[test]
        fn no_more_is_given_than_there_is_and_nobody_starves(sizes in prop::collection::vec(1u64..600, 1..30), picks in prop::collection::vec(any::<prop::sample::Index>(), 200)) {
            let turns = turns(1, Some(700));
            let plenty = mib(1 << 20);
            let mut waiting: Vec<(u64, Ticket)> = sizes.iter().map(|size| (*size, turns.hunger(mib(*size)))).collect();
            let mut running = Vec::new();
            for pick in picks {
                if waiting.is_empty() {
                    break;
                }
                let at = pick.index(waiting.len());
                let (size, ticket) = &waiting[at];
                if let Ok(share) = turns.now().unwrap().claim(mib(*size), plenty, Some(ticket), None) {
                    running.push(share);
                    waiting.remove(at);
                } else if at == 0 && !running.is_empty() {
                    running.remove(0);
                }
                prop_assert!(*lock(&turns.given) <= mib(700).as_bytes());
            }
            // Whoever asks in order, with everybody else gone, gets it.
            running.clear();
            while !waiting.is_empty() {
                let (size, ticket) = waiting.remove(0);
                prop_assert!(turns.now().unwrap().claim(mib(size), plenty, Some(&ticket), None).is_ok());
            }
        }
    }
}
