//! How a run ends: the faults are over, everybody gets time to agree, and then it is asked what is true.

use std::collections::BTreeSet;

use clan_ledger::{Entry, Ledger};
use clan_replica::Replica;

use crate::{
    check,
    world::{Outcome, Report, World},
};

/// After the faults have ended, everybody has so long to agree, virtual milliseconds.
const HEAL: u64 = 300_000;
/// How often it is looked whether they do.
const LOOK: u64 = 5_000;

impl World {
    /// The second part: the faults end, and everybody gets time to agree.
    pub fn heal(mut self) -> Report {
        self.now = self.plan.faulty_ms;
        self.faulty = false;
        self.network.sides.clear();
        for node in 0..self.nodes.len() {
            self.nodes[node].disk.set_full(false);
            self.nodes[node].skew = 0;
            if self.nodes[node].running.is_none() && self.nodes[node].life > 0 {
                self.start(node);
            }
        }
        let end = self.now + HEAL;
        let mut look = self.now + LOOK;
        let healed = loop {
            let next = self.events.first_key_value().map_or(end, |((at, _), _)| *at);
            if next >= look {
                self.now = look;
                look += LOOK;
                let wrong = check::agreement(&self);
                if wrong.is_empty() || self.now >= end {
                    break wrong;
                }
                continue;
            }
            if let Some(((at, _), event)) = self.events.pop_first() {
                self.now = at;
                self.happen(event);
            }
        };
        let mut wrong = std::mem::take(&mut self.wrong);
        wrong.extend(healed);
        wrong.extend(check::safety(&self));
        let (machines, entries) = (self.nodes.len(), self.witness().map_or(0, Replica::len));
        let healed_ms = self.now - self.plan.faulty_ms;
        wrong.extend(self.cut_everybody_off());
        let outcome = if wrong.is_empty() { Outcome::Good } else { Outcome::Bad(wrong) };
        Report {
            seed: self.plan.seed,
            outcome,
            machines,
            entries,
            messages: self.messages,
            crashes: self.crashes,
            put_aside: self.nodes.iter().map(|node| node.disk.put_aside()).sum(),
            healed_ms,
        }
    }

    /// At the very end the power fails everywhere: what each machine knew must be on its disk.
    fn cut_everybody_off(&mut self) -> Vec<String> {
        let mut wrong = Vec::new();
        for (number, node) in self.nodes.iter_mut().enumerate() {
            let Some(running) = node.running.take() else { continue };
            let ids = |ledger: &Ledger| ledger.entries().map(Entry::id).collect::<BTreeSet<_>>();
            let known = ids(running.replica.ledger());
            node.disk.cut_power();
            drop(running);
            node.disk.power_on();
            match node.disk.open(&self.clan).and_then(|store| store.load()) {
                Ok(ledger) if ids(&ledger).is_superset(&known) => {}
                Ok(ledger) => {
                    let lost = known.difference(&ids(&ledger)).count();
                    wrong.push(format!("machine {number} knew {lost} entries that are not on its disk"));
                }
                Err(error) => wrong.push(format!("machine {number}: its ledger does not open: {error:?}")),
            }
        }
        wrong
    }
}
