//! What is said to which other machine, and whom to dial.

use clan_ledger::{Body, Entry, Ledger};
use clan_types::{MachineId, PeerAddr};
use clan_wire::{
    beacon::SignedBeacon,
    peer::{EncodedEntry, PeerMessage, Vector},
};

use super::{BATCH, Replica};
use crate::{Action, Close, LinkId, Now, beacons::Taken};

/// Entries sent in answer to one vector. A peer that lacks more asks again when it has taken these: what is sent is
/// never more than it has room for, and a machine that lacks everything is not sent everything by everybody.
const ANSWER: usize = 4 * BATCH;
/// To so many machines, chosen at random, another machine's beacon is passed on. Its own machine sends it to everybody
/// that it is linked with.
const PASS_ON_TO: usize = 6;

impl Replica {
    pub(super) fn take_beacon(&mut self, from: &MachineId, signed: SignedBeacon, now: Now) {
        let (clan, state) = (self.clan(), self.state.clone());
        let belongs = |machine: &MachineId| state.machine_in_good_standing(machine).is_some();
        match self.beacons.take(from, &self.machine, &signed, &clan, now.wall, belongs) {
            Taken::New => {
                self.actions.push_back(Action::Changed);
                // INVARIANT: who is only listened to learns of no machine but this one, see `link`.
                for link in self.some_links(PASS_ON_TO, |machine| machine != from && belongs(machine)) {
                    self.actions.push_back(Action::Send { link, message: PeerMessage::Beacon(signed.clone()) });
                }
            }
            Taken::OurOwn => self.announce(now),
            Taken::Nothing => {}
        }
    }

    pub(super) fn link(&mut self, machine: MachineId, link: LinkId, vector: &Vector) {
        if !self.welcomes(&machine) || machine == self.machine {
            let known = self.state.machines.contains_key(&machine) && machine != self.machine;
            if known {
                self.bid_farewell(link, &machine, Some(vector));
            }
            let why = if known { Close::NotInGoodStanding } else { Close::Unknown };
            self.actions.push_back(Action::Close { link, why });
            return;
        }
        if let Some(old) = self.links.insert(machine, link) {
            self.actions.push_back(Action::Close { link: old, why: Close::Replaced });
        }
        self.look_around = true;
        self.compare(&machine, vector);
        self.send_missing(&machine, vector);
        let good = self.is_good(&machine);
        let told = self.beacons.signed().filter(|(about, _)| good || **about == self.machine);
        for (_, signed) in told {
            self.actions.push_back(Action::Send { link, message: PeerMessage::Beacon(signed.clone()) });
        }
        self.actions.push_back(Action::Changed);
    }

    /// A machine that is out learns by what, and nothing that came later. If it knows, it learns that it is known here too.
    pub(super) fn bid_farewell(&mut self, link: LinkId, machine: &MachineId, vector: Option<&Vector>) {
        let entries = self.ledger.farewell(machine, vector.map(Vec::as_slice), BATCH);
        if !entries.is_empty() {
            let message = PeerMessage::Entries(entries.into_iter().map(Entry::encode).collect());
            self.actions.push_back(Action::Send { link, message });
        }
    }

    /// What put this machine out comes back from whoever has taken it, as their farewell.
    pub(super) fn notice_farewell(&mut self, entries: &[EncodedEntry]) {
        if self.put_out.is_none() || self.let_go {
            return;
        }
        let out = self.ledger.put_out_by(&self.machine);
        self.let_go = out.iter().any(|entry| entries.contains(&entry.encode()));
        if self.let_go {
            self.actions.push_back(Action::Changed);
        }
    }

    pub(super) fn send_missing(&mut self, machine: &MachineId, vector: &Vector) {
        // INVARIANT: who is listened to, because this machine is learning, is not told anything for that.
        let Some(link) = self.links.get(machine).copied().filter(|_| self.is_good(machine)) else { return };
        let missing: Vec<EncodedEntry> = self.ledger.missing(vector, ANSWER).into_iter().map(Entry::encode).collect();
        let full = missing.len() >= ANSWER;
        let mut batches = missing.chunks(BATCH).peekable();
        while let Some(batch) = batches.next() {
            let last = batches.peek().is_none();
            let batch = batch.to_vec();
            let message = if full && last { PeerMessage::EntriesAndMore(batch) } else { PeerMessage::Entries(batch) };
            self.actions.push_back(Action::Send { link, message });
        }
    }

    pub(super) fn reply(&mut self, machine: &MachineId, message: PeerMessage) {
        let link = self.links.get(machine).copied();
        self.actions.extend(link.map(|link| Action::Send { link, message }));
    }

    pub(super) fn announce(&mut self, now: Now) {
        // A beacon of a sane size always encodes.
        let made = self.beacons.announce(&self.own, self.ledger.clan(), &self.key, &self.version, now.wall);
        if let Ok(signed) = made {
            self.broadcast(None, &PeerMessage::Beacon(signed));
            self.actions.push_back(Action::Changed);
        }
    }

    pub(super) fn broadcast(&mut self, except: Option<MachineId>, message: &PeerMessage) {
        let links = self.links.iter().filter(|(machine, _)| Some(**machine) != except);
        self.actions.extend(links.map(|(_, link)| Action::Send { link: *link, message: message.clone() }));
    }

    /// Tells everybody of entries that are new here.
    pub(super) fn pass_on(&mut self, except: Option<MachineId>, batch: &[EncodedEntry]) {
        let told = self.links.iter().filter(|(machine, _)| Some(**machine) != except && self.is_good(machine));
        let links: Vec<LinkId> = told.map(|(_, link)| *link).collect();
        let message = PeerMessage::Entries(batch.to_vec());
        self.actions.extend(links.into_iter().map(|link| Action::Send { link, message: message.clone() }));
    }

    fn is_good(&self, machine: &MachineId) -> bool {
        self.state.machine_in_good_standing(machine).is_some()
    }

    pub(super) fn some_links(&mut self, count: usize, among: impl Fn(&MachineId) -> bool) -> Vec<LinkId> {
        let links = self.links.iter().filter(|(machine, _)| among(machine)).map(|(_, link)| *link);
        self.rng.choose(links.collect(), count)
    }

    /// Every machine in good standing.
    pub(super) fn choose_neighbours(&mut self) {
        self.wanted = self.state.good_machines().map(|(machine, _)| *machine).collect();
        if self.is_learning() {
            self.wanted.extend(self.bootstrap.iter().map(|known| known.machine));
        }
        self.look_around = true;
    }

    pub(super) fn dial(&mut self, now: Now) {
        let links = &self.links;
        for machine in self.dialer.poll(now.at, &self.machine, &self.wanted, |machine| links.contains_key(machine)) {
            let address = self.address_of(machine);
            self.actions.push_back(Action::Dial(address));
        }
    }

    /// Where a machine may be reached, as far as is known.
    pub(super) fn address_of(&self, machine: MachineId) -> PeerAddr {
        let mut addrs = self.beacons.get(&machine).map(|beacon| beacon.quic.clone()).unwrap_or_default();
        for known in self.bootstrap.iter().filter(|known| known.machine == machine) {
            addrs.extend(known.addrs.iter().copied());
        }
        addrs.sort();
        addrs.dedup();
        PeerAddr { machine, addrs }
    }
}

/// By whom a machine was put out, as its own ledger has it.
pub(super) fn out_of_the_clan(ledger: &Ledger, machine: &MachineId) -> Option<String> {
    let state = ledger.state();
    let known = state.machines.get(machine)?;
    let entry = ledger.put_out_by(machine).pop()?;
    let who = state.person_of(&entry.author());
    let name = who.and_then(|who| state.people.get(&who)).map_or("somebody", |person| person.name.as_str());
    let own = who == Some(known.owner);
    let what = match entry.body() {
        Body::Leave => format!("{name} left the clan, and this machine with them"),
        Body::RevokePerson { .. } if own => format!("{name} left the clan, and this machine with them"),
        Body::RevokePerson { .. } => format!("{name} put its owner, and with them this machine, out of the clan"),
        _ => format!("{name} put this machine out of the clan"),
    };
    Some(format!(
        "{what}: the other machines do not talk with it any more; `clan leave` removes the clan from this computer"
    ))
}
