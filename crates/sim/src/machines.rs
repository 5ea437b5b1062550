//! Machines: their disks, and the replicas that run on them.

use std::time::Duration;

use clan_ledger::{Entry, Ledger};
use clan_replica::{Action, Answer, Config, Now, Own, Replica, Ticket};
use clan_store::{LedgerStore, StoreError};
use clan_types::{MachineId, PeerAddr};
use clan_wire::peer::EncodedEntry;
use ed25519_dalek::SigningKey;

use crate::{
    disk::Disk,
    world::{Asked, Event, Node, Running, World},
};

/// As long as the controller's.
const DOUBT: Duration = Duration::from_secs(60);

impl World {
    pub(crate) fn add_node(&mut self, key: SigningKey, bootstrap: Vec<PeerAddr>, hostile: bool) -> usize {
        let number = self.nodes.len();
        let disk = Disk::new(&format!("disk {number}"), self.dice.word());
        let id = MachineId::from_bytes(key.verifying_key().to_bytes());
        let address = self.address(number);
        let (running, restored) = (None, None);
        let node = Node { key, id, address, disk, bootstrap, running, life: 0, skew: 0, hostile, restored, wake: 0 };
        self.nodes.push(node);
        number
    }

    /// Gives power and starts the controller, as it starts after a crash. A damaged file is put aside at the first
    /// attempt, and the next one begins an empty one.
    pub(crate) fn start(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.disk.power_on();
        node.life += 1;
        let opened = node.disk.open(&self.clan).and_then(|store| store.load().map(|ledger| (store, ledger)));
        let (store, ledger) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                if matches!(error, StoreError::Corrupt { .. }) && self.plan.rot == 0 {
                    self.wrong.push(format!("machine {number}: a power failure left a damaged file: {error:?}"));
                }
                if matches!(error, StoreError::Corrupt { .. }) {
                    self.forgive(number);
                }
                self.after(1000, Event::Start { node: number });
                return;
            }
        };
        self.run_node(number, store, ledger);
    }

    pub(crate) fn run_node(&mut self, number: usize, store: LedgerStore, ledger: Ledger) {
        let seed = self.dice.bytes();
        let now = self.clock(number);
        let node = &mut self.nodes[number];
        let own = Own { quic: vec![node.address], ..Own::default() };
        let config = Config {
            key: node.key.clone(),
            version: "sim".into(),
            own,
            bootstrap: node.bootstrap.clone(),
            seed,
            doubt: (!self.plan.forgetful_managers).then_some(DOUBT),
        };
        let replica = Replica::new(config, ledger, now);
        node.running = Some(Running { replica, store });
        node.wake = u64::MAX;
        let life = node.life;
        self.with(number, |replica, now| replica.handle_timeout(now));
        if !self.plan.forgetful_managers {
            let delay = self.dice.range(50..5_000);
            self.after(delay, Event::Remind { node: number, life });
        }
    }

    /// The manager tells what it remembers, until the machine is sure.
    pub(crate) fn remind(&mut self, number: usize, life: u64) {
        if self.nodes[number].life != life || self.nodes[number].running.is_none() {
            return;
        }
        let restored = self.nodes[number].restored.clone();
        self.with(number, |replica, now| {
            let put_back = restored.is_some();
            for page in restored.unwrap_or_default().chunks(500) {
                replica.handle_entries(None, None, page.to_vec(), now);
            }
            replica.handle_remembered(put_back, now);
        });
        let node = &mut self.nodes[number];
        if node.running.as_ref().is_some_and(|running| running.replica.is_in_doubt()) {
            self.after(1000, Event::Remind { node: number, life });
        } else if node.running.is_some() {
            node.restored = None;
        }
    }

    /// A newcomer's machine begins with what the clan answered.
    pub(crate) fn start_newcomer(&mut self, number: usize, entries: &[EncodedEntry]) -> bool {
        let decoded: Vec<Entry> = entries.iter().filter_map(|bytes| Entry::decode(bytes).ok()).collect();
        self.nodes[number].disk.power_on();
        let Ok(store) = self.nodes[number].disk.open(&self.clan) else { return false };
        if store.append_all(&decoded).is_err() {
            return false;
        }
        let Ok(ledger) = store.load() else { return false };
        self.nodes[number].life += 1;
        self.run_node(number, store, ledger);
        true
    }

    /// Lets a replica do something, and does what it wants done.
    pub(crate) fn with(&mut self, number: usize, run: impl FnOnce(&mut Replica, Now)) {
        let now = self.clock(number);
        let Some(running) = self.nodes[number].running.as_mut() else { return };
        run(&mut running.replica, now);
        self.carry_out(number);
    }

    pub(crate) fn carry_out(&mut self, number: usize) {
        let now = self.clock(number);
        loop {
            let node = &mut self.nodes[number];
            let Some(running) = node.running.as_mut() else { return };
            let Some(action) = running.replica.poll_action() else { break };
            match action {
                Action::Persist { write, entries } => {
                    let outcome = running.store.append_all(&entries);
                    if node.disk.is_dead() {
                        self.crashes += 1;
                        self.die(number);
                        return;
                    }
                    match outcome {
                        Ok(()) => running.replica.handle_persisted(write, now),
                        Err(_) => running.replica.handle_not_persisted(write, now),
                    }
                }
                Action::Send { link, message } => self.send(link, message),
                Action::Close { link, .. } => self.close(link),
                Action::Dial(peer) => self.dial(number, &peer),
                Action::Answer { ticket, answer } => self.answer(number, ticket, answer),
                Action::Changed | Action::Refused { .. } => {}
            }
        }
        let Some(running) = self.nodes[number].running.as_ref() else { return };
        let due = u64::try_from(running.replica.poll_timeout().as_millis()).unwrap_or(u64::MAX).max(self.now + 1);
        if due < self.nodes[number].wake || self.nodes[number].wake <= self.now {
            self.nodes[number].wake = due;
            let life = self.nodes[number].life;
            self.at(due, Event::Wake { node: number, life });
        }
    }

    pub(crate) fn ticket(&mut self, asked: Asked) -> Ticket {
        self.count += 1;
        let ticket = Ticket(self.count);
        self.asked.insert(ticket, asked);
        ticket
    }

    pub(crate) fn answer(&mut self, number: usize, ticket: Ticket, answer: Answer) {
        match (self.asked.remove(&ticket), answer) {
            (Some(Asked::Person { entry, author }), Answer::Inserted(Ok(()))) => {
                self.acknowledged.insert(entry, (author, number));
            }
            (Some(Asked::Newcomer { number: newcomer }), Answer::Redeemed(answer)) => {
                let ledger = || self.nodes[number].running.as_ref().map(|running| running.replica.entries());
                let answer = answer.map(|()| ledger().unwrap_or_default());
                if let Ok(entries) = &answer {
                    for entry in entries.iter().filter_map(|bytes| Entry::decode(bytes).ok()) {
                        self.acknowledged.insert(entry.id(), (entry.author(), number));
                    }
                }
                let delay = self.latency();
                if !(self.faulty && self.dice.permille(self.plan.loss)) {
                    self.after(delay, Event::Answered { newcomer, host: number, answer });
                }
            }
            _ => {}
        }
    }
}
