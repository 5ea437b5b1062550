//! The machines, and what happens to them one after the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use clan_ledger::{AuthorId, Entry, Ledger};
use clan_replica::{Action, Answer, Config, LinkId, Now, Own, Replica, Ticket};
use clan_store::{LedgerStore, StoreError};
use clan_types::{ClanId, EntryId, MachineId, PeerAddr, Timestamp};
use clan_wire::peer::{EncodedEntry, JoinRefusal, PeerMessage};
use ed25519_dalek::SigningKey;

use crate::{
    check,
    dice::Dice,
    disk::Disk,
    network::{self, Network, end_of, link_of},
    people::{Newcomer, People},
    plan::Plan,
};

/// Virtual time begins here.
pub(crate) const EPOCH: u64 = 1_800_000_000_000;
/// After the faults have ended, everybody has so long to agree, virtual milliseconds.
const HEAL: u64 = 300_000;
/// How often it is looked whether they do.
const LOOK: u64 = 5_000;
const CONNECT_LIMIT: u64 = 10_000;

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
    /// The time for which it asked to be woken.
    wake: u64,
}

/// A controller that runs.
pub(crate) struct Running {
    pub(crate) replica: Replica,
    store: LedgerStore,
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

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    Crash,
    Part,
    Join,
    Fill,
    Empty { node: usize },
    Rot,
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
    events: BTreeMap<(u64, u64), Event>,
    count: u64,
    pub(crate) clan: ClanId,
    pub(crate) nodes: Vec<Node>,
    pub(crate) people: People,
    pub(crate) network: Network,
    asked: BTreeMap<Ticket, Asked>,
    /// Entries of which somebody was told that they are recorded, with whose they are and where that was.
    pub(crate) acknowledged: BTreeMap<EntryId, (AuthorId, usize)>,
    pub(crate) faulty: bool,
    messages: u64,
    crashes: u64,
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

    fn address(&self, node: usize) -> SocketAddr {
        let number = u32::try_from(node).unwrap_or(u32::MAX);
        SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0001 + number), 41640))
    }

    pub(crate) fn add_node(&mut self, key: SigningKey, bootstrap: Vec<PeerAddr>, hostile: bool) -> usize {
        let number = self.nodes.len();
        let disk = Disk::new(&format!("disk {number}"), self.dice.word());
        let id = MachineId::from_bytes(key.verifying_key().to_bytes());
        let address = self.address(number);
        self.nodes.push(Node { key, id, address, disk, bootstrap, running: None, life: 0, skew: 0, hostile, wake: 0 });
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

    fn run_node(&mut self, number: usize, store: LedgerStore, ledger: Ledger) {
        let seed = self.dice.bytes();
        let now = self.clock(number);
        let node = &mut self.nodes[number];
        let own = Own { quic: vec![node.address], ..Own::default() };
        let config =
            Config { key: node.key.clone(), version: "sim".into(), own, bootstrap: node.bootstrap.clone(), seed };
        let replica = Replica::new(config, ledger, now);
        node.running = Some(Running { replica, store });
        node.wake = u64::MAX;
        self.with(number, |replica, now| replica.handle_timeout(now));
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

    fn carry_out(&mut self, number: usize) {
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
                        return self.die(number);
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

    fn happen(&mut self, event: Event) {
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
            Event::Deed => self.deed(),
            Event::Lie => self.lie(),
            Event::Fault(fault) => self.fault(fault),
            Event::Ask { newcomer, host } => self.ask(newcomer, host),
            Event::Answered { newcomer, host, answer } => self.answered(newcomer, host, answer),
            Event::AskAgain { newcomer } => self.ask_again(newcomer),
        }
    }

    fn fault(&mut self, fault: Fault) {
        let count = self.nodes.len() as u64;
        let node = usize::try_from(self.dice.range(0..count)).unwrap_or(0);
        let pause = self.dice.range(1_000..60_000);
        match fault {
            Fault::Crash => {
                // Now, or in the middle of one of the next writes.
                if self.dice.permille(300) {
                    self.nodes[node].disk.cut_power();
                    self.die(node);
                } else {
                    let writes = self.dice.range(1..30);
                    self.nodes[node].disk.fail_power_in(writes);
                }
            }
            Fault::Part => {
                self.network.sides = (0..self.nodes.len()).map(|_| u8::from(self.dice.permille(500))).collect();
                self.cut_across();
            }
            Fault::Join => self.network.sides.clear(),
            Fault::Fill => {
                self.nodes[node].disk.set_full(true);
                self.after(pause, Event::Fault(Fault::Empty { node }));
            }
            Fault::Empty { node } => self.nodes[node].disk.set_full(false),
            Fault::Rot => {
                let node = node.max(1);
                self.nodes[node].disk.cut_power();
                self.die(node);
                self.nodes[node].disk.rot();
                self.forgive(node);
            }
            Fault::Skew => {
                let days = i64::try_from(self.dice.range(0..6 * 86_400_000)).unwrap_or(0) - 3 * 86_400_000;
                self.nodes[node].skew = if self.dice.permille(500) { days } else { days / 1000 };
                self.after(pause, Event::Fault(Fault::SetRight { node }));
            }
            Fault::SetRight { node } => self.nodes[node].skew = 0,
        }
    }

    /// A damaged disk may lose what nobody else has: nothing can be done about that. What the founder's machine has,
    /// which is never damaged and never put out, stays.
    fn forgive(&mut self, damaged: usize) {
        let keeper = self.nodes[0].running.as_ref().map(|running| &running.replica);
        self.acknowledged.retain(|entry, (_, at)| {
            *at != damaged || keeper.is_some_and(|replica| replica.ledger().get(entry).is_some())
        });
    }

    /// The power has failed: the controller is gone, and comes back after a while.
    pub(crate) fn die(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        if node.running.take().is_none() && node.life == 0 {
            return;
        }
        let pause = self.dice.range(500..40_000);
        self.after(pause, Event::Start { node: number });
        let cut: Vec<_> = self.connections_of(number);
        for (connection, end) in cut {
            if let Some(known) = self.network.connections.get_mut(&connection) {
                known.ends[end].open = false;
                known.ends[end].linked = false;
            }
            let timeout = self.dice.range(100..30_000);
            self.after(timeout, Event::Over { connection, end: 1 - end });
        }
    }

    fn connections_of(&self, number: usize) -> Vec<(u64, usize)> {
        let ends =
            self.network.connections.iter().flat_map(|(connection, known)| {
                known.ends.iter().enumerate().map(move |(end, at)| (*connection, end, at))
            });
        ends.filter(|(_, _, at)| at.node == number && at.open).map(|(connection, end, _)| (connection, end)).collect()
    }

    /// Connections across a partition time out, sooner or later.
    fn cut_across(&mut self) {
        let across: Vec<_> = self
            .network
            .connections
            .iter()
            .filter(|(_, known)| !self.network.reaches(known.ends[0].node, known.ends[1].node))
            .map(|(connection, _)| *connection)
            .collect();
        for connection in across {
            for end in 0..2 {
                let timeout = self.dice.range(1000..30_000);
                self.after(timeout, Event::Over { connection, end });
            }
        }
    }

    fn dial(&mut self, number: usize, peer: &PeerAddr) {
        let life = self.nodes[number].life;
        let reached = self.nodes.iter().position(|node| node.id == peer.machine && peer.addrs.contains(&node.address));
        match reached.filter(|to| self.network.reaches(number, *to)) {
            Some(to) => {
                let delay = self.latency();
                self.after(delay, Event::Dialled { from: number, life, to });
            }
            None => self.after(CONNECT_LIMIT, Event::DialFailed { node: number, life, machine: peer.machine }),
        }
    }

    fn dialled(&mut self, from: usize, life: u64, to: usize) {
        if self.nodes[from].life != life || self.nodes[from].running.is_none() {
            return;
        }
        let (machine, dialler) = (self.nodes[to].id, self.nodes[from].id);
        let lost = !self.network.reaches(from, to) || (self.faulty && self.dice.permille(self.plan.loss));
        let Some(running) = self.nodes[to].running.as_ref().filter(|_| !lost) else {
            return self.after(CONNECT_LIMIT, Event::DialFailed { node: from, life, machine });
        };
        if !running.replica.welcomes(&dialler) {
            let delay = self.latency();
            return self.after(delay, Event::DialFailed { node: from, life, machine });
        }
        let connection = self.network.connect((from, life), (to, self.nodes[to].life));
        for end in 0..2 {
            let node = self.network.connections[&connection].ends[end].node;
            if let Some(hello) = self.nodes[node].running.as_ref().map(|running| running.replica.hello()) {
                self.send(link_of(connection, end), hello);
            }
        }
    }

    pub(crate) fn send(&mut self, link: LinkId, message: PeerMessage) {
        let (connection, end) = end_of(link);
        if !self.network.takes(connection, end) {
            return;
        }
        let mut delay = self.latency();
        let greets = network::greets(&message);
        let message = Rc::new(message);
        let arrive = || Event::Arrive { connection, to: 1 - end, message: message.clone() };
        let disturbed = self.faulty && !greets;
        if disturbed && self.dice.permille(self.plan.duplication) {
            let later = delay + self.dice.range(0..5000);
            if self.network.takes(connection, end) {
                self.after(later, arrive());
            }
        }
        let lost = disturbed && self.dice.permille(self.plan.loss);
        let overtaken = disturbed && self.dice.permille(self.plan.reordering);
        if overtaken {
            delay += self.dice.range(0..3000);
        }
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let from = &mut known.ends[end];
        if lost {
            from.in_flight -= 1;
            return;
        }
        let mut at = self.now + delay;
        if !overtaken {
            at = at.max(from.last_arrival);
            from.last_arrival = at;
        }
        self.at(at, arrive());
    }

    fn arrive(&mut self, connection: u64, to: usize, message: &PeerMessage) {
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let from = known.ends[1 - to].node;
        known.ends[1 - to].in_flight -= 1;
        let (node, life, open, linked) =
            (known.ends[to].node, known.ends[to].life, known.ends[to].open, known.ends[to].linked);
        let (machine, link) = (self.nodes[from].id, link_of(connection, to));
        if !open || self.nodes[node].life != life || !self.network.reaches(from, node) {
            return;
        }
        if let Some(known) = self.network.connections.get_mut(&connection) {
            known.ends[to].linked |= network::greets(message);
        }
        self.messages += 1;
        match message {
            PeerMessage::Hello { vector, .. } if !linked => {
                let vector = vector.clone();
                self.with(node, |replica, now| replica.handle_linked(machine, link, vector, now));
            }
            message if linked => {
                self.with(node, |replica, now| replica.handle_message(link, machine, message.clone(), now));
            }
            _ => {}
        }
    }

    fn close(&mut self, link: LinkId) {
        let (connection, end) = end_of(link);
        self.after(0, Event::Over { connection, end });
    }

    fn over(&mut self, connection: u64, end: usize) {
        let Some(known) = self.network.connections.get_mut(&connection) else { return };
        let at = &mut known.ends[end];
        let was_open = std::mem::replace(&mut at.open, false);
        let was_linked = std::mem::replace(&mut at.linked, false);
        let (node, life) = (at.node, at.life);
        if !was_open && !known.ends[1 - end].open {
            self.network.connections.remove(&connection);
            return;
        }
        let other = known.ends[1 - end].node;
        if was_open {
            let delay = self.latency();
            if self.network.reaches(node, other) {
                self.after(delay, Event::Over { connection, end: 1 - end });
            }
            if self.nodes[node].life == life {
                if was_linked {
                    self.with(node, |replica, now| replica.handle_unlinked(link_of(connection, end), now));
                }
                if end == 0 {
                    let machine = self.nodes[other].id;
                    self.with(node, |replica, now| replica.handle_dial_ended(machine, now));
                }
            }
        }
    }

    pub(crate) fn ticket(&mut self, asked: Asked) -> Ticket {
        self.count += 1;
        let ticket = Ticket(self.count);
        self.asked.insert(ticket, asked);
        ticket
    }

    fn answer(&mut self, number: usize, ticket: Ticket, answer: Answer) {
        match (self.asked.remove(&ticket), answer) {
            (Some(Asked::Person { entry, author }), Answer::Inserted(Ok(()))) => {
                self.acknowledged.insert(entry, (author, number));
            }
            (Some(Asked::Newcomer { number: newcomer }), Answer::Redeemed(answer)) => {
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
