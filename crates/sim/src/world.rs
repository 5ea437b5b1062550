//! The machines, and what happens to them one after the other.

use std::{collections::BTreeMap, net::SocketAddr, rc::Rc, time::Duration};

use clan_ledger::{AuthorId, Entry};
use clan_replica::{Now, Replica, Ticket};
use clan_store::LedgerStore;
use clan_types::{ClanId, EntryId, MachineId, PeerAddr, Timestamp};
use clan_wire::peer::{EncodedEntry, JoinRefusal, PeerMessage};
use ed25519_dalek::SigningKey;

use crate::{
    dice::Dice,
    disk::{Disk, Image},
    network::Network,
    people::{Newcomer, People},
    plan::Plan,
};

/// Virtual time begins here.
pub(crate) const EPOCH: u64 = 1_800_000_000_000;
/// One machine.
pub(crate) struct Node {
    pub(crate) key: SigningKey,
    pub(crate) id: MachineId,
    pub(crate) address: SocketAddr,
    pub(crate) disk: Disk,
    /// Machines that could be reached when it joined.
    pub(crate) bootstrap: Vec<PeerAddr>,
    pub(crate) running: Option<Running>,
    /// Counts runs of its controller.
    pub(crate) life: u64,
    /// Its clock is so far ahead, milliseconds.
    pub(crate) skew: i64,
    pub(crate) hostile: bool,
    /// What its manager remembers of the ledger, while the disk was put back to an earlier state.
    pub(crate) restored: Option<Vec<EncodedEntry>>,
    /// The time for which it asked to be woken.
    pub(crate) wake: u64,
}

/// A controller that runs.
pub(crate) struct Running {
    pub(crate) replica: Replica,
    pub(crate) store: LedgerStore,
}

/// Who waits for an answer.
pub(crate) enum Asked {
    /// A person, for an entry of theirs.
    Person { entry: EntryId, author: AuthorId },
    /// A newcomer; the number is into [`People::newcomers`].
    Newcomer { number: usize },
}

pub(crate) enum Event {
    Wake {
        node: usize,
        life: u64,
    },
    Arrive {
        connection: u64,
        to: usize,
        message: Rc<PeerMessage>,
    },
    /// One end learns that the connection is over.
    Over {
        connection: u64,
        end: usize,
    },
    Dialled {
        from: usize,
        life: u64,
        to: usize,
    },
    DialFailed {
        node: usize,
        life: u64,
        machine: MachineId,
    },
    Start {
        node: usize,
    },
    /// Its manager tells a controller what it remembers.
    Remind {
        node: usize,
        life: u64,
    },
    Deed,
    Lie,
    Fault(Fault),
    Ask {
        newcomer: usize,
        host: usize,
    },
    Answered {
        newcomer: usize,
        host: usize,
        answer: Result<Vec<EncodedEntry>, JoinRefusal>,
    },
    AskAgain {
        newcomer: usize,
    },
}

#[derive(Debug, Clone)]
pub(crate) enum Fault {
    Crash,
    Part,
    Join,
    Fill,
    Empty { node: usize },
    Rot,
    Snapshot,
    Restore { node: usize, image: Image },
    Skew,
    SetRight { node: usize },
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its seed.
    pub seed: u64,
    /// What came of it.
    pub outcome: Outcome,
    /// Machines at the end, those that were put out included.
    pub machines: usize,
    /// Entries of the ledger at the end.
    pub entries: usize,
    /// Messages that arrived.
    pub messages: u64,
    /// Power failures in the middle of writes.
    pub crashes: u64,
    /// Files that were found damaged and put aside.
    pub put_aside: usize,
    /// Virtual milliseconds from the end of the faults until everybody agreed.
    pub healed_ms: u64,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Everything as it should be.
    Good,
    /// What is wrong, one line each.
    Bad(Vec<String>),
}

/// Runs a plan from beginning to end.
pub fn run(plan: Plan) -> Report {
    let mut world = World::new(plan);
    world.play();
    world.heal()
}

/// Everything there is.
pub struct World {
    pub(crate) plan: Plan,
    pub(crate) dice: Dice,
    /// Virtual milliseconds.
    pub(crate) now: u64,
    pub(crate) events: BTreeMap<(u64, u64), Event>,
    pub(crate) count: u64,
    pub(crate) clan: ClanId,
    pub(crate) nodes: Vec<Node>,
    pub(crate) people: People,
    pub(crate) network: Network,
    pub(crate) asked: BTreeMap<Ticket, Asked>,
    /// Entries of which somebody was told that they are recorded, with whose they are and where that was.
    pub(crate) acknowledged: BTreeMap<EntryId, (AuthorId, usize)>,
    pub(crate) faulty: bool,
    pub(crate) messages: u64,
    pub(crate) crashes: u64,
    /// What should not have happened on the way.
    pub(crate) wrong: Vec<String>,
}

impl World {
    /// The clan before anything happens: everybody has the same ledger on disk and runs.
    pub fn new(plan: Plan) -> Self {
        let mut dice = Dice::new(plan.seed);
        let (people, keys, ledger) = People::found(&plan, &mut dice);
        let entries: Vec<Entry> = ledger.entries().cloned().collect();
        let mut world = Self {
            clan: ledger.clan(),
            plan,
            dice,
            now: 0,
            events: BTreeMap::new(),
            count: 0,
            nodes: Vec::new(),
            people,
            network: Network::default(),
            asked: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            faulty: true,
            messages: 0,
            crashes: 0,
            wrong: Vec::new(),
        };
        let first = world.address(0);
        for (number, (key, hostile)) in keys.into_iter().enumerate() {
            let bootstrap = vec![PeerAddr { machine: machine_of(&world, &key, number), addrs: vec![first] }];
            let node = world.add_node(key, bootstrap, hostile);
            let store = world.nodes[node].disk.open(&world.clan).expect("an empty disk");
            store.append_all(&entries).expect("room");
            drop(store);
            if world.plan.lying_disks {
                world.nodes[node].disk.lie();
            }
            world.start(node);
        }
        world.schedule_plan();
        world
    }

    fn schedule_plan(&mut self) {
        let plan = self.plan.clone();
        let throw = |world: &mut Self, count: usize, event: &dyn Fn() -> Event| {
            for _ in 0..count {
                let at = world.dice.range(1000..plan.faulty_ms);
                world.at(at, event());
            }
        };
        throw(self, plan.deeds, &|| Event::Deed);
        throw(self, plan.hostile * 6, &|| Event::Lie);
        throw(self, plan.crashes, &|| Event::Fault(Fault::Crash));
        throw(self, plan.partitions, &|| Event::Fault(Fault::Part));
        throw(self, plan.partitions, &|| Event::Fault(Fault::Join));
        throw(self, plan.full_disks, &|| Event::Fault(Fault::Fill));
        throw(self, plan.rot, &|| Event::Fault(Fault::Rot));
        throw(self, plan.restores, &|| Event::Fault(Fault::Snapshot));
        throw(self, plan.skews, &|| Event::Fault(Fault::Skew));
    }

    /// The first part: everything goes wrong.
    pub fn play(&mut self) {
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > self.plan.faulty_ms {
                break;
            }
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.happen(event);
        }
    }

    /// Somebody honest.
    pub(crate) fn witness(&self) -> Option<&Replica> {
        self.nodes
            .iter()
            .find(|node| !node.hostile && self.is_in(node))
            .and_then(|node| Some(&node.running.as_ref()?.replica))
    }

    fn is_in(&self, node: &Node) -> bool {
        node.running.as_ref().is_some_and(|r| r.replica.state().machine_in_good_standing(&node.id).is_some())
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.insert((at.max(self.now), self.count), event);
    }

    pub(crate) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(crate) fn latency(&mut self) -> u64 {
        self.dice.range(1..80)
    }

    pub(crate) fn clock(&self, node: usize) -> Now {
        let wall = (EPOCH + self.now).saturating_add_signed(self.nodes[node].skew);
        Now { at: Duration::from_millis(self.now), wall: Timestamp::from_millis(wall) }
    }

    pub(crate) fn address(&self, node: usize) -> SocketAddr {
        let number = u32::try_from(node).unwrap_or(u32::MAX);
        SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0001 + number), 41640))
    }

    pub(crate) fn happen(&mut self, event: Event) {
        match event {
            Event::Wake { node, life } => {
                if self.nodes[node].life == life && self.nodes[node].running.is_some() {
                    self.nodes[node].wake = 0;
                    self.with(node, |replica, now| replica.handle_timeout(now));
                }
            }
            Event::Arrive { connection, to, message } => self.arrive(connection, to, &message),
            Event::Over { connection, end } => self.over(connection, end),
            Event::Dialled { from, life, to } => self.dialled(from, life, to),
            Event::DialFailed { node, life, machine } => {
                if self.nodes[node].life == life {
                    self.with(node, |replica, now| replica.handle_dial_ended(machine, now));
                }
            }
            Event::Start { node } => {
                if self.nodes[node].running.is_none() {
                    self.start(node);
                }
            }
            Event::Remind { node, life } => self.remind(node, life),
            Event::Deed => self.deed(),
            Event::Lie => self.lie(),
            Event::Fault(fault) => self.fault(fault),
            Event::Ask { newcomer, host } => self.ask(newcomer, host),
            Event::Answered { newcomer, host, answer } => self.answered(newcomer, host, answer),
            Event::AskAgain { newcomer } => self.ask_again(newcomer),
        }
    }

    /// The newcomer with the number.
    pub(crate) fn newcomer(&mut self, number: usize) -> &mut Newcomer {
        &mut self.people.newcomers[number]
    }
}

/// Whom a founding machine knows at first: the first one.
fn machine_of(world: &World, key: &SigningKey, number: usize) -> MachineId {
    let own = || MachineId::from_bytes(key.verifying_key().to_bytes());
    if number == 0 { own() } else { world.nodes[0].id }
}
