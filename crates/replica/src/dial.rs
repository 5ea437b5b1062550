//! Who dials whom, and when.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use clan_types::MachineId;

/// The machine with the greater key leaves dialling to the other one for this long, so that two connections do not cross.
const COURTESY: Duration = Duration::from_secs(6);
/// The same right after the start: whoever thinks that an earlier connection still lives will not dial.
const COURTESY_AT_FIRST: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The attempts to reach the machines that are not linked.
#[derive(Default)]
pub(crate) struct Dialer {
    waiting: BTreeMap<MachineId, Backoff>,
    /// An attempt, or the connection that it led to, is under way.
    running: BTreeSet<MachineId>,
    /// Newcomers, and until when it is theirs to go on with the connection that they have.
    expected: BTreeMap<MachineId, Duration>,
    /// Whether there was anybody to dial yet.
    begun: bool,
}

struct Backoff {
    due: Duration,
    delay: Duration,
}

impl Backoff {
    fn new(due: Duration) -> Self {
        Self { due, delay: RETRY }
    }

    fn failed(&mut self, at: Duration) {
        self.due = at + self.delay;
        self.delay = (self.delay * 2).min(RETRY_MAX);
    }
}

impl Dialer {
    /// Whom to dial now. `wanted` are those that we should be linked with; `linked` says whether we are.
    pub(crate) fn poll(
        &mut self,
        at: Duration,
        this: &MachineId,
        wanted: &BTreeSet<MachineId>,
        linked: impl Fn(&MachineId) -> bool,
    ) -> Vec<MachineId> {
        self.waiting.retain(|machine, _| wanted.contains(machine) && !linked(machine));
        let courtesy = if self.begun { COURTESY } else { COURTESY_AT_FIRST };
        self.begun |= wanted.iter().any(|machine| machine != this);
        self.expected.retain(|_, until| *until > at);
        let mut due = Vec::new();
        for machine in wanted {
            if machine == this || linked(machine) || self.running.contains(machine) {
                continue;
            }
            let first = self.expected.get(machine).copied();
            let first = first.unwrap_or(if this < machine { at } else { at + courtesy });
            let backoff = self.waiting.entry(*machine).or_insert_with(|| Backoff::new(first));
            if backoff.due <= at {
                backoff.failed(at);
                self.running.insert(*machine);
                due.push(*machine);
            }
        }
        due
    }

    /// A machine is being admitted here: it is connected already.
    pub(crate) fn expect(&mut self, machine: MachineId, at: Duration) {
        self.expected.insert(machine, at + COURTESY);
    }

    /// An attempt is due now, even if it is the other one's turn.
    pub(crate) fn hurry(&mut self, machine: MachineId, at: Duration) {
        self.waiting.insert(machine, Backoff::new(at));
    }

    pub(crate) fn ended(&mut self, machine: &MachineId) {
        self.running.remove(machine);
    }

    /// When the next attempt is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        let idle = self.waiting.iter().filter(|(machine, _)| !self.running.contains(*machine));
        idle.map(|(_, backoff)| backoff.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: MachineId = MachineId::from_bytes([1; 32]);
    const HIGH: MachineId = MachineId::from_bytes([2; 32]);

    fn poll(dialer: &mut Dialer, seconds: u64, this: MachineId, linked: bool) -> Vec<MachineId> {
        dialer.poll(Duration::from_secs(seconds), &this, &[LOW, HIGH].into(), |_| linked)
    }

    #[test]
    fn the_lesser_key_dials_first_and_the_greater_one_when_it_did_not() {
        let (mut low, mut high) = (Dialer::default(), Dialer::default());
        assert_eq!(poll(&mut low, 0, LOW, false), [HIGH]);
        assert_eq!(poll(&mut high, 0, HIGH, false), []);
        assert_eq!(high.next(), Some(COURTESY_AT_FIRST), "the other one may think that they are linked");
        assert_eq!(poll(&mut high, 1, HIGH, false), [LOW]);
        high.ended(&LOW);
        assert_eq!(poll(&mut high, 2, HIGH, true), []);
        assert_eq!(poll(&mut high, 10, HIGH, false), []);
        assert_eq!(high.next(), Some(Duration::from_secs(10) + COURTESY));
    }

    #[test]
    fn whoever_is_in_a_hurry_does_not_wait_for_the_other() {
        let mut high = Dialer::default();
        assert_eq!(poll(&mut high, 0, HIGH, false), []);
        high.hurry(LOW, Duration::from_secs(1));
        assert_eq!(poll(&mut high, 1, HIGH, false), [LOW]);
    }

    #[test]
    fn a_newcomer_is_not_dialled_at_once_by_whoever_admits_it() {
        let mut low = Dialer::default();
        low.expect(HIGH, Duration::from_secs(10));
        assert_eq!(poll(&mut low, 11, LOW, false), []);
        assert_eq!(low.next(), Some(Duration::from_secs(10) + COURTESY));
        assert_eq!(poll(&mut low, 16, LOW, false), [HIGH], "it did not stay");
        low.ended(&HIGH);
        assert_eq!(poll(&mut low, 17, LOW, true), []);
        assert_eq!(poll(&mut low, 18, LOW, false), [HIGH], "a lost link is restored at once");
    }

    #[test]
    fn attempts_become_rarer_and_begin_anew_after_a_link() {
        let mut dialer = Dialer::default();
        let mut gaps = Vec::new();
        let mut last = 0;
        for second in 0..200 {
            if !poll(&mut dialer, second, LOW, false).is_empty() {
                assert_eq!(poll(&mut dialer, second, LOW, false), [], "one attempt at a time");
                dialer.ended(&HIGH);
                gaps.push(second - last);
                last = second;
            }
        }
        assert_eq!(&gaps[..8], [0, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(poll(&mut dialer, 200, LOW, true), []);
        assert_eq!(dialer.next(), None);
        assert_eq!(poll(&mut dialer, 201, LOW, false), [HIGH], "a lost link is restored at once");
    }
}
