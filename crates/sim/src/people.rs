//! What people do, at random, as their managers let them.

use std::{collections::BTreeSet, time::Duration};

use clan_ledger::{AuthorId, Body, Entry, Ledger};
use clan_types::{ClanId, EntryId, InviteId, MachineId, PeerAddr, PersonId, Role, Timestamp, WgPublicKey};
use clan_wire::{
    beacon::{ServiceKind, ServiceOffer},
    peer::{EncodedEntry, JoinRefusal},
};
use ed25519_dalek::SigningKey;

use crate::{
    dice::Dice,
    plan::Plan,
    world::{Asked, EPOCH, Event, World},
};

/// How long a newcomer waits for an answer.
const PATIENCE: u64 = 20_000;
const ATTEMPTS: usize = 8;
/// No more than so many people have a machine each from the start; further machines are theirs too.
const HOUSEHOLDS: usize = 12;

pub(crate) struct Person {
    pub(crate) key: SigningKey,
    /// The machine through which they decide.
    pub(crate) home: usize,
    pub(crate) hostile: bool,
    /// Everything they signed: their manager keeps it and never signs two entries for one place.
    pub(crate) log: Vec<Entry>,
}

impl Person {
    pub(crate) fn id(&self) -> PersonId {
        AuthorId::of(&self.key).person()
    }
}

pub(crate) struct Invitation {
    pub(crate) secret: SigningKey,
    pub(crate) role: Role,
    /// Whether whoever made it was entitled to.
    pub(crate) rightful: bool,
}

/// Somebody who asks to be let in.
pub(crate) struct Newcomer {
    pub(crate) person: usize,
    pub(crate) node: usize,
    entries: Vec<EncodedEntry>,
    attempts: usize,
    done: bool,
}

#[derive(Default)]
pub(crate) struct People {
    pub(crate) all: Vec<Person>,
    pub(crate) invitations: Vec<Invitation>,
    pub(crate) newcomers: Vec<Newcomer>,
    /// Whom somebody entitled to it has put out, or who went: by the bytes of their keys.
    pub(crate) put_out: BTreeSet<[u8; 32]>,
    names: u32,
}

pub(crate) fn invite_id(secret: &SigningKey) -> InviteId {
    InviteId::from_bytes(secret.verifying_key().to_bytes())
}

/// A machine, added by whoever has the key `by`.
pub(crate) fn enrolment(clan: &ClanId, by: &SigningKey, machine: &SigningKey, name: u32) -> Body {
    let wg = WgPublicKey::from_bytes(machine.verifying_key().to_bytes());
    Body::enrol(machine, clan, &AuthorId::of(by), format!("m{name}").parse().expect("a name"), wg)
}

impl People {
    /// A clan as its founder made it: people, machines' keys (and whether they are hostile), the ledger.
    pub(crate) fn found(plan: &Plan, dice: &mut Dice) -> (Self, Vec<(SigningKey, bool)>, Ledger) {
        let mut people = Self::default();
        let start = EPOCH - 3_600_000;
        let founder = SigningKey::from_bytes(&dice.bytes());
        let names = ("family".parse().expect("a name"), "p0".parse().expect("a name"));
        let at = Timestamp::from_millis(start);
        let (mut ledger, _) = Ledger::found(&founder, names.0, names.1, dice.bytes(), at).expect("a clan");
        let clan = ledger.clan();
        let mut keys: Vec<(SigningKey, bool)> = Vec::new();
        people.all.push(Person { key: founder.clone(), home: 0, hostile: false, log: Vec::new() });
        let mut clock = start;
        let mut say = |ledger: &mut Ledger, key: &SigningKey, body: Body| {
            clock += 10;
            let entry = ledger.author(key, body, Timestamp::from_millis(clock)).expect("an entry");
            ledger.insert(entry.clone()).expect("it fits");
            entry.id()
        };
        for number in 0..plan.machines {
            let machine = SigningKey::from_bytes(&dice.bytes());
            let owner = number % HOUSEHOLDS.min(plan.machines);
            let newcomer = number > 0 && number < HOUSEHOLDS;
            let hostile = newcomer && number >= plan.machines.min(HOUSEHOLDS) - plan.hostile;
            if newcomer {
                let (key, secret) = (SigningKey::from_bytes(&dice.bytes()), SigningKey::from_bytes(&dice.bytes()));
                let role = if number < plan.admins { Role::Admin } else { Role::Member };
                let expires = Timestamp::from_millis(EPOCH + 86_400_000);
                say(
                    &mut ledger,
                    &founder,
                    Body::Invite { invite: invite_id(&secret), role, uses: 1, expires, approval: false },
                );
                let person = AuthorId::of(&key).person();
                let name = format!("p{number}").parse().expect("a name");
                let admission = say(&mut ledger, &key, Body::admission(&secret, &clan, &person, name));
                say(&mut ledger, &key, enrolment(&clan, &key, &machine, people.names));
                say(&mut ledger, &keys[0].0, Body::Countersign { admission });
                people.all.push(Person { key, home: number, hostile, log: Vec::new() });
                people.invitations.push(Invitation { secret, role, rightful: true });
            } else {
                let key = people.all[owner].key.clone();
                say(&mut ledger, &key, enrolment(&clan, &key, &machine, people.names));
            }
            people.names += 1;
            keys.push((machine, people.all[owner].hostile));
        }
        for person in &mut people.all {
            let author = AuthorId::of(&person.key);
            person.log = ledger.entries().filter(|entry| entry.author() == author).cloned().collect();
        }
        (people, keys, ledger)
    }

    fn name(&mut self) -> u32 {
        self.names += 1;
        // Now and then a name that is taken, perhaps.
        if self.names.is_multiple_of(11) { self.names / 2 } else { self.names + 100 }
    }
}

impl World {
    /// Somebody does something.
    pub(crate) fn deed(&mut self) {
        let ready: Vec<usize> = (0..self.people.all.len()).filter(|person| self.can_decide(*person)).collect();
        let Some(person) = self.dice.pick(&ready).copied() else { return };
        let role = self.role_of(person);
        match self.dice.range(0..22) {
            0..=3 if role >= Some(Role::Admin) => self.invite(person, role),
            0..=10 => self.join(),
            11 | 12 => self.add_machine(person),
            13 | 14 => self.revoke_machine(person, role),
            15 if role >= Some(Role::Admin) => self.revoke_person(person, role),
            16 if role >= Some(Role::Admin) => {
                if let Some(invitation) = self.dice.pick(&self.people.invitations) {
                    let invite = invite_id(&invitation.secret);
                    self.say(person, Body::RevokeInvite { invite });
                }
            }
            17 if self.dice.permille(300) && person > 0 => {
                let id = *self.people.all[person].id().as_bytes();
                self.people.put_out.insert(id);
                self.say(person, Body::Leave);
            }
            18 => {
                let (id, name) = (self.people.all[person].id(), self.people.name());
                let name = format!("p{name}").parse().expect("a name");
                self.say(person, Body::RenamePerson { person: id, name });
            }
            19 => {
                let (machine, name) = (self.nodes[self.people.all[person].home].id, self.people.name());
                let name = format!("m{name}").parse().expect("a name");
                self.say(person, Body::RenameMachine { machine, name });
            }
            _ => self.offer(person),
        }
    }

    /// Whether the person is in, as far as their machine knows, and can sign what follows on their log.
    fn can_decide(&self, person: usize) -> bool {
        let known = &self.people.all[person];
        let Some(running) = self.nodes.get(known.home).and_then(|node| node.running.as_ref()) else { return false };
        !known.hostile && !running.replica.is_learning() && running.replica.state().person(&known.id()).is_some()
    }

    fn role_of(&self, person: usize) -> Option<Role> {
        let known = &self.people.all[person];
        self.nodes[known.home].running.as_ref()?.replica.state().role_of(&known.id())
    }

    /// Signs and hands over to the person's machine.
    pub(crate) fn say(&mut self, person: usize, body: Body) -> Option<EntryId> {
        let (home, log) = (self.people.all[person].home, self.people.all[person].log.clone());
        let author = AuthorId::of(&self.people.all[person].key);
        let known = |world: &Self| {
            let head = world.nodes[home].running.as_ref()?.replica.ledger().head(author);
            Some(head.map_or(0, |head| head.seq + 1))
        };
        if known(self)? < log.len() as u64 {
            // A disk that was full, or a damaged one, lacks what was signed before.
            let entries = log.iter().map(Entry::encode).collect();
            self.with(home, |replica, now| replica.handle_entries(None, None, entries, now));
        }
        if known(self)? != log.len() as u64 {
            return None;
        }
        let wall = self.clock(home).wall;
        let key = self.people.all[person].key.clone();
        let entry = self.nodes[home].running.as_ref()?.replica.ledger().author(&key, body, wall).ok()?;
        self.people.all[person].log.push(entry.clone());
        let ticket = self.ticket(Asked::Person { entry: entry.id(), author });
        self.with(home, |replica, now| replica.handle_entries(Some(ticket), None, vec![entry.encode()], now));
        Some(entry.id())
    }

    fn invite(&mut self, person: usize, role: Option<Role>) {
        let secret = SigningKey::from_bytes(&self.dice.bytes());
        let given = match self.dice.range(0..6) {
            0 => Role::Guest,
            1 if role == Some(Role::Owner) => Role::Admin,
            _ => Role::Member,
        };
        let uses = u32::try_from(self.dice.range(1..4)).unwrap_or(1);
        let lasts = Duration::from_millis([40_000, 86_400_000][usize::from(self.dice.permille(800))]);
        let expires = Timestamp::from_millis(EPOCH + self.now).plus(lasts);
        let body = Body::Invite { invite: invite_id(&secret), role: given, uses, expires, approval: false };
        if self.say(person, body).is_some() {
            self.people.invitations.push(Invitation { secret, role: given, rightful: true });
            // Somebody who got the link does not wait long.
            for _ in 0..self.dice.range(0..3) {
                let at = self.now + self.dice.range(1000..40_000);
                self.at(at, Event::Deed);
            }
        }
    }

    /// A person who got a link, rightful or not, used up or not, asks a machine to be let in.
    fn join(&mut self) {
        let Some(host) = self.some_host() else { return };
        let delay = self.latency();
        let newcomer = self.join_at(host, delay);
        // Impatient people ask two machines at once.
        if let Some(newcomer) = newcomer
            && self.dice.permille(200)
            && let Some(other) = self.some_host()
        {
            self.after(delay, Event::Ask { newcomer, host: other });
        }
    }

    /// Somebody new asks this machine after so long; which newcomer they are.
    pub(crate) fn join_at(&mut self, host: usize, delay: u64) -> Option<usize> {
        let invitations = &self.people.invitations;
        let recent = invitations.len().saturating_sub(4);
        let invitation = self.dice.pick(&invitations[recent..])?;
        let (secret, role) = (invitation.secret.clone(), invitation.role);
        let key = SigningKey::from_bytes(&self.dice.bytes());
        let machine = SigningKey::from_bytes(&self.dice.bytes());
        let (name, machine_name) = (self.people.name(), self.people.name());
        let bootstrap = vec![PeerAddr { machine: self.nodes[host].id, addrs: vec![self.nodes[host].address] }];
        let node = self.add_node(machine.clone(), bootstrap, false);
        let mut log = Ledger::open(self.clan);
        let wall = self.clock(node).wall;
        let mut bodies = vec![admission(&secret, &self.clan, &key, name)];
        if role >= Role::Member {
            bodies.push(enrolment(&self.clan, &key, &machine, machine_name));
        }
        for body in bodies {
            let entry = log.author(&key, body, wall).expect("an entry");
            log.insert(entry).expect("it fits");
        }
        let entries: Vec<Entry> = log.entries().cloned().collect();
        let encoded = entries.iter().map(Entry::encode).collect();
        let person = self.people.all.len();
        self.people.all.push(Person { key, home: node, hostile: false, log: entries });
        let newcomer = self.people.newcomers.len();
        self.people.newcomers.push(Newcomer { person, node, entries: encoded, attempts: 0, done: false });
        self.after(delay, Event::Ask { newcomer, host });
        self.after(delay + PATIENCE, Event::AskAgain { newcomer });
        Some(newcomer)
    }

    fn some_host(&mut self) -> Option<usize> {
        let up = self.nodes.iter().enumerate().filter(|(_, node)| node.running.is_some());
        let up: Vec<usize> = up.map(|(number, _)| number).collect();
        self.dice.pick(&up).copied()
    }

    pub(crate) fn ask(&mut self, newcomer: usize, host: usize) {
        let asks = &self.people.newcomers[newcomer];
        let (node, entries) = (asks.node, asks.entries.clone());
        let lost = self.faulty && self.dice.permille(self.plan.loss);
        if asks.done || lost || !self.network.reaches(node, host) || self.nodes[host].running.is_none() {
            return;
        }
        let ticket = self.ticket(Asked::Newcomer { number: newcomer });
        self.with(host, |replica, now| replica.handle_redemption(ticket, entries, now));
    }

    pub(crate) fn ask_again(&mut self, newcomer: usize) {
        let asks = self.newcomer(newcomer);
        asks.attempts += 1;
        if asks.done || asks.attempts > ATTEMPTS {
            return;
        }
        if let Some(host) = self.some_host() {
            let delay = self.latency();
            self.after(delay, Event::Ask { newcomer, host });
        }
        self.after(PATIENCE, Event::AskAgain { newcomer });
    }

    pub(crate) fn answered(&mut self, newcomer: usize, host: usize, answer: Result<Vec<EncodedEntry>, JoinRefusal>) {
        let (node, done, person) = {
            let asks = self.newcomer(newcomer);
            (asks.node, asks.done, asks.person)
        };
        if done || !self.network.reaches(node, host) {
            return;
        }
        match answer {
            Ok(entries) => {
                let mut ledger = Ledger::open(self.clan);
                ledger.insert_all(entries.iter().filter_map(|bytes| Entry::decode(bytes).ok()));
                let machine = self.nodes[node].id;
                // A guest has no machine of their own in the ledger.
                if ledger.state().machine_in_good_standing(&machine).is_some() {
                    // Who let them in, and another machine that the link names: one of the two may be put out before
                    // anybody else has heard of the newcomer.
                    let known = [host, 0].map(|at| &self.nodes[at]);
                    self.nodes[node].bootstrap =
                        known.map(|at| PeerAddr { machine: at.id, addrs: vec![at.address] }).to_vec();
                    if !self.start_newcomer(node, &entries) {
                        return;
                    }
                }
                self.newcomer(newcomer).done = true;
                self.people.all[person].home = node;
            }
            Err(JoinRefusal::NotReady) => {}
            // It may be a matter of what this one machine knows: ask again as long as there is patience.
            Err(JoinRefusal::UnknownInvite) => {}
            Err(_) => self.newcomer(newcomer).done = true,
        }
    }

    fn add_machine(&mut self, person: usize) {
        let home = self.people.all[person].home;
        let machine = SigningKey::from_bytes(&self.dice.bytes());
        let name = self.people.name();
        let body = enrolment(&self.clan, &self.people.all[person].key, &machine, name);
        let Some(entry) = self.say(person, body) else { return };
        let Some(running) = self.nodes[home].running.as_ref() else { return };
        let replica = &running.replica;
        let id = AuthorId::of(&machine).machine();
        if !self.acknowledged.contains_key(&entry) || replica.state().machine_in_good_standing(&id).is_none() {
            return;
        }
        let entries = replica.entries();
        // It is told of other machines, too.
        let known = [home, 0].map(|at| PeerAddr { machine: self.nodes[at].id, addrs: vec![self.nodes[at].address] });
        let node = self.add_node(machine, known.to_vec(), false);
        self.start_newcomer(node, &entries);
    }

    fn revoke_machine(&mut self, person: usize, role: Option<Role>) {
        let (me, home) = (self.people.all[person].id(), self.people.all[person].home);
        let Some(running) = self.nodes[home].running.as_ref() else { return };
        let (this, state) = (self.nodes[home].id, running.replica.state().clone());
        let may = |owner: &PersonId| *owner == me || (role >= Some(Role::Admin) && state.role_of(owner) <= role);
        let candidates: Vec<MachineId> =
            state.good_machines().filter(|(id, known)| **id != this && may(&known.owner)).map(|(id, _)| *id).collect();
        // The founder's machine stays, so that something is left to look at.
        let candidates: Vec<_> = candidates.into_iter().filter(|id| *id != self.nodes[0].id).collect();
        let Some(machine) = self.dice.pick(&candidates).copied() else { return };
        let Some(running) = self.nodes[home].running.as_ref() else { return };
        let body = running.replica.ledger().revocation_of_machine(&machine);
        self.people.put_out.insert(*machine.as_bytes());
        self.say(person, body);
    }

    fn revoke_person(&mut self, person: usize, role: Option<Role>) {
        let (me, home) = (self.people.all[person].id(), self.people.all[person].home);
        let Some(running) = self.nodes[home].running.as_ref() else { return };
        let state = running.replica.state();
        let candidates: Vec<PersonId> = state
            .people
            .keys()
            .filter(|id| **id != me && state.role_of(id).is_some() && state.role_of(id) <= role)
            .copied()
            .collect();
        let founder = self.people.all[0].id();
        let candidates: Vec<_> = candidates.into_iter().filter(|id| *id != founder).collect();
        let Some(subject) = self.dice.pick(&candidates).copied() else { return };
        let bodies = running.replica.ledger().revocation_of_person(&subject);
        for body in bodies {
            match &body {
                Body::RevokePerson { person, .. } => self.people.put_out.insert(*person.as_bytes()),
                Body::RevokeMachine { machine, .. } => self.people.put_out.insert(*machine.as_bytes()),
                _ => false,
            };
            self.say(person, body);
        }
    }

    fn offer(&mut self, person: usize) {
        let home = self.people.all[person].home;
        let port = u16::try_from(self.dice.range(1..1000)).unwrap_or(1);
        self.with(home, |replica, now| {
            let mut own = replica.own().clone();
            own.services = vec![ServiceOffer {
                name: "web".parse().expect("a name"),
                title: "Page".into(),
                kind: ServiceKind::Http,
                port,
                healthy: true,
            }];
            replica.handle_own(own, now);
        });
    }
}

fn admission(secret: &SigningKey, clan: &ClanId, key: &SigningKey, name: u32) -> Body {
    let name = format!("p{name}").parse().expect("a name");
    Body::admission(secret, clan, &AuthorId::of(key).person(), name)
}
