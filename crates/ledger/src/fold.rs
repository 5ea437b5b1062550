//! One pass over the entries, in the order in which they take effect.

mod mesh;
mod people;
mod roles;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::Ipv4Addr,
    sync::Arc,
};

use clan_types::{
    ClanId, DeviceId, EntryId, Hlc, InviteId, MachineId, MachineName, PersonId, PersonName, Role, WgPublicKey,
};

use crate::{
    AccessRule, AuthorId, Body, DeviceKind, Entry, Group, Invite, Ledger, Node, Published, Relay, Standing, State,
    VmSetup, Void, VoidReason,
    access::first_rules,
    fold::people::may_give,
    names::Names,
    weigh::{At, Claim, Demotion, Effective, Subject},
};

/// A newcomer who is not in yet.
struct Newcomer {
    admission: Entry,
    /// What they wrote since.
    later: Vec<Entry>,
    /// Why the last countersignature did not count.
    failed: Option<VoidReason>,
}

/// What became of a person's role, and when.
enum Change {
    Given(Role),
    Lowered(Arc<Demotion>),
}

/// One pass over the entries.
///
/// It can go on with entries that come later in the order; what claims amount to is not weighed again by that.
pub(crate) struct Run {
    clan: ClanId,
    pub(crate) effective: Effective,
    pub(crate) state: State,
    void: Vec<(At, Void)>,
    pub(crate) claims: Vec<Claim>,
    /// How far the pass is.
    now: At,
    newcomers: BTreeMap<PersonId, Newcomer>,
    /// Newcomers, waiting, in or denied, by their admission.
    admissions: HashMap<EntryId, PersonId>,
    denied: HashSet<PersonId>,
    /// When each person came in.
    pub(crate) joined: HashMap<PersonId, At>,
    /// When each device was added.
    pub(crate) device_since: HashMap<AuthorId, At>,
    roles: HashMap<PersonId, Vec<(At, Change)>>,
    /// By whom each person is in the clan and in their role.
    pub(crate) supports: HashMap<PersonId, Vec<PersonId>>,
    people_out: HashSet<PersonId>,
    /// Of those, whom somebody else put out.
    put_out: HashSet<PersonId>,
    devices_out: HashSet<DeviceId>,
    machines_out: HashSet<MachineId>,
    invites_out: HashSet<InviteId>,
    person_names: Names<PersonName, PersonId>,
    node_names: Names<MachineName, Node>,
    wgs: HashSet<WgPublicKey>,
    ipv4s: HashSet<Ipv4Addr>,
    devices_of: HashMap<PersonId, Vec<DeviceId>>,
    machines_of: BTreeMap<PersonId, BTreeSet<MachineId>>,
}

/// Who wrote an entry.
#[derive(Clone, Copy)]
struct Author {
    person: PersonId,
    /// The role that they had for it.
    role: Role,
    /// What it would have been without demotions.
    before: Role,
    key: AuthorId,
}

impl Run {
    pub(crate) fn new(clan: ClanId, effective: Effective) -> Self {
        Self {
            clan,
            effective,
            state: State::default(),
            void: Vec::new(),
            claims: Vec::new(),
            now: (Hlc::default(), EntryId::from_bytes([0; 32])),
            newcomers: BTreeMap::new(),
            admissions: HashMap::new(),
            denied: HashSet::new(),
            joined: HashMap::new(),
            device_since: HashMap::new(),
            roles: HashMap::new(),
            supports: HashMap::new(),
            people_out: HashSet::new(),
            put_out: HashSet::new(),
            devices_out: HashSet::new(),
            machines_out: HashSet::new(),
            invites_out: HashSet::new(),
            person_names: Names::default(),
            node_names: Names::default(),
            wgs: HashSet::new(),
            ipv4s: HashSet::new(),
            devices_of: HashMap::new(),
            machines_of: BTreeMap::new(),
        }
    }

    pub(crate) fn fold(&mut self, ledger: &Ledger) {
        for (at, (author, seq)) in &ledger.order {
            if let Some(entry) = ledger.logs.get(author).and_then(|log| log.get(*seq)) {
                self.advance(*at, entry);
            }
        }
    }

    /// The next entry in the order.
    pub(crate) fn advance(&mut self, at: At, entry: &Entry) {
        self.now = at;
        self.take(entry);
    }

    /// How far the pass is.
    pub(crate) fn now(&self) -> At {
        self.now
    }

    /// What it amounts to so far.
    pub(crate) fn state(&self, ledger: &Ledger) -> State {
        let mut state = self.state.clone();
        let mut all = self.void.clone();
        let of = |entry: &Entry, reason| ((entry.time(), entry.id()), void(entry.id(), entry.author(), reason));
        for claim in &self.claims {
            let reason = self.judge(claim).err().unwrap_or(VoidReason::NotAllowed);
            all.push((claim.at, void(claim.at.1, claim.device, reason)));
        }
        for (person, newcomer) in &self.newcomers {
            let pending = state.pending.contains_key(person);
            let later = if pending { VoidReason::NotApproved } else { VoidReason::NotCountersigned };
            all.push(of(&newcomer.admission, if pending { later } else { newcomer.failed.unwrap_or(later) }));
            all.extend(newcomer.later.iter().map(|entry| of(entry, later)));
        }
        for (author, log) in &ledger.logs {
            if let Some(rival) = &log.rival {
                all.push(of(rival, VoidReason::Equivocated));
                state.equivocations.insert(*author, rival.seq());
            }
        }
        all.sort_by_key(|(at, _)| *at);
        state.void = all.into_iter().map(|(_, void)| void).collect();
        state
    }

    pub(crate) fn has_owner(&self) -> bool {
        self.state.people.values().any(|person| person.role == Role::Owner && person.standing == Standing::Good)
    }

    fn take(&mut self, entry: &Entry) {
        let result = match entry.body() {
            Body::Found { clan, founder, .. } => {
                self.state.clan_name = Some(clan.clone());
                self.state.rules = first_rules();
                let person = entry.author().person();
                let name = self.person_names.give_free(founder, person);
                self.admit(person, name, Role::Owner, None, None, entry);
                Ok(())
            }
            Body::Admission { .. } => self.ask(entry),
            Body::Countersign { admission } => self.countersign(entry, admission),
            _ => self.take_person(entry),
        };
        if let Err(reason) = result {
            self.void(entry, reason);
        }
    }

    /// An entry that only people write.
    fn take_person(&mut self, entry: &Entry) -> Result<(), VoidReason> {
        let key = entry.author();
        if self.effective.entries.contains(&entry.id()) {
            self.take_effect(entry);
            return Ok(());
        }
        // INVARIANT: the cut is by place in the log, not by time: a back-dated entry does not slip through.
        let cut = self.effective.devices.get(&key);
        if cut.is_some_and(|count| entry.seq() >= *count) {
            return Err(VoidReason::AuthorRevoked);
        }
        let Some(device) = self.state.devices.get(&key.device()) else {
            return match self.newcomers.get_mut(&key.person()) {
                Some(newcomer) => {
                    newcomer.later.push(entry.clone());
                    Ok(())
                }
                None if self.denied.contains(&key.person()) => Err(VoidReason::Denied),
                None => Err(VoidReason::Outsider),
            };
        };
        let owner = device.owner;
        match self.state.people.get(&owner).ok_or(VoidReason::Outsider)?.standing {
            Standing::Left => return Err(VoidReason::AuthorLeft),
            // What a device's own revocation left standing counts, whenever it was written. Where only its person was
            // revoked, time decides.
            Standing::Revoked if cut.is_none() => return Err(VoidReason::AuthorRevoked),
            Standing::Revoked | Standing::Good => {}
        }
        if device.is_spent_link(entry.time().wall) {
            return Err(VoidReason::LinkExpired);
        }
        if device.kind == DeviceKind::Recovery
            && !matches!(entry.body(), Body::AddDevice { .. } | Body::RevokeDevice { .. })
        {
            return Err(VoidReason::RecoveryKey);
        }
        let (role, before) = self.role_for(&owner, entry);
        match self.apply(entry, Author { person: owner, role, before, key }) {
            Err(VoidReason::NotAllowed) if role < before => Err(VoidReason::AuthorDemoted),
            result => result,
        }
    }

    fn apply(&mut self, entry: &Entry, by: Author) -> Result<(), VoidReason> {
        match entry.body() {
            Body::Enrol { machine, name, wg, .. } => {
                allowed(by.role >= Role::Member)?;
                self.enrol(by.person, machine, name, wg)
            }
            Body::Remove { machine } => {
                let owner = self.state.machines.get(machine).ok_or(VoidReason::NoSubject)?.owner;
                allowed(self.may_act_on(&by, &owner))?;
                self.machine_out(machine, Standing::Left);
                Ok(())
            }
            Body::Invite { invite, role, uses, expires, approval } => {
                allowed(may_give(by.role, *role))?;
                if self.state.invites.contains_key(invite) {
                    return Err(VoidReason::KeyTaken);
                }
                let (role, uses, expires, approval) = (*role, *uses, *expires, *approval);
                let revoked = self.invites_out.contains(invite);
                let made = Invite { by: by.person, role, uses, used: 0, expires, approval, revoked };
                self.state.invites.insert(*invite, made);
                Ok(())
            }
            Body::RevokeInvite { invite } => match self.state.invites.get_mut(invite) {
                Some(known) => {
                    allowed(known.by == by.person || by.role >= Role::Admin)?;
                    known.revoked = true;
                    Ok(())
                }
                // The invite's time may lie ahead of everybody's: its withdrawal counts all the same.
                None if by.role >= Role::Admin => {
                    self.invites_out.insert(*invite);
                    Ok(())
                }
                None => Err(VoidReason::NoSubject),
            },
            Body::Publish { description } => {
                allowed(by.role >= Role::Admin)?;
                let (network, applications) = Default::default();
                let description = description.clone();
                self.state.published = Some(Published { description, network, applications, by: by.person });
                Ok(())
            }
            Body::PublishVm { description, setup: VmSetup { network, control, applications } } => {
                allowed(by.role >= Role::Admin)?;
                let (network, applications) = (network.clone(), applications.clone());
                let description = description.clone();
                self.state.published = Some(Published { description, network, applications, by: by.person });
                self.state.suggested_control = *control;
                Ok(())
            }
            Body::SuggestControl { control } => {
                allowed(by.role >= Role::Admin)?;
                self.state.suggested_control = *control;
                Ok(())
            }
            Body::RevokePerson { person, .. } => self.claim(entry, by, Subject::Person(*person)),
            Body::RevokeMachine { machine, .. } => self.claim(entry, by, Subject::Machine(*machine)),
            Body::RevokeDevice { device, .. } => self.claim(entry, by, Subject::Device(*device)),
            Body::Leave => {
                self.person_out(&by.person, Standing::Left);
                Ok(())
            }
            Body::SetRole { person, role, .. } => self.set_role(entry, by, person, *role),
            Body::RenamePerson { person, name } => self.rename_person(by, person, name),
            Body::RenameMachine { machine, name } => self.rename_machine(by, machine, name),
            Body::Approve { admission } => self.approve(entry, by, admission),
            Body::Deny { admission } => self.deny(by, admission),
            Body::AddDevice { device, name, kind, .. } => self.add_device(entry, by, device, name, *kind),
            Body::Relay { machine, host, port, certificate } => {
                self.may_offer(&by, machine)?;
                let relay = Relay { host: host.clone(), port: *port, certificate: *certificate, by: by.person };
                self.state.relays.insert(*machine, relay);
                Ok(())
            }
            Body::RelayOff { machine } => {
                self.may_offer(&by, machine)?;
                self.state.relays.remove(machine).map(|_| ()).ok_or(VoidReason::NoSubject)
            }
            Body::AddPeer { wg, name, via } => self.add_peer(by, wg, name, via),
            Body::RemovePeer { wg } => self.remove_peer(by, wg),
            Body::Group { name, members } => {
                allowed(by.role >= Role::Admin)?;
                let group = Group { members: members.iter().cloned().collect(), by: by.person };
                self.state.groups.insert(name.clone(), group);
                Ok(())
            }
            Body::DropGroup { name } => {
                allowed(by.role >= Role::Admin)?;
                self.state.groups.remove(name).map(|_| ()).ok_or(VoidReason::NoSubject)
            }
            Body::Rule { name, from, to, ports } => {
                allowed(by.role >= Role::Admin)?;
                let (from, to, ports) = (from.clone(), to.clone(), ports.clone());
                self.state.rules.insert(name.clone(), AccessRule { from, to, ports, by: Some(by.person) });
                Ok(())
            }
            Body::DropRule { name } => {
                allowed(by.role >= Role::Admin)?;
                self.state.rules.remove(name).map(|_| ()).ok_or(VoidReason::NoSubject)
            }
            // Handled before; listed so that a new body cannot be forgotten here.
            Body::Found { .. } | Body::Admission { .. } | Body::Countersign { .. } => Err(VoidReason::NotAllowed),
        }
    }

    /// Judged after the pass, because its subject's entries may carry any time.
    fn claim(&mut self, entry: &Entry, by: Author, subject: Subject) -> Result<(), VoidReason> {
        let last = match entry.body() {
            Body::RevokePerson { last, .. } | Body::RevokeMachine { last, .. } | Body::RevokeDevice { last, .. } => {
                *last
            }
            _ => None,
        };
        let (at, Author { person, role, before, key }) = ((entry.time(), entry.id()), by);
        self.claims.push(Claim { at, author: person, device: key, role, before, subject, last });
        Ok(())
    }

    /// A claim that counts takes effect for what comes after it.
    fn take_effect(&mut self, entry: &Entry) {
        match entry.body() {
            Body::RevokePerson { person, .. } => {
                self.people_out.insert(*person);
                if !self.effective.own.contains(&entry.id()) {
                    self.put_out.insert(*person);
                }
                self.person_out(person, Standing::Revoked);
            }
            Body::RevokeMachine { machine, .. } => {
                self.machines_out.insert(*machine);
                self.machine_out(machine, Standing::Revoked);
            }
            Body::RevokeDevice { device, .. } => {
                self.devices_out.insert(*device);
                if let Some(device) = self.state.devices.get_mut(device) {
                    device.standing = Standing::Revoked;
                }
            }
            Body::SetRole { person, .. } => {
                let demotions = self.effective.demotions.get(person);
                let demotion = demotions.and_then(|all| all.iter().find(|demotion| demotion.at.1 == entry.id()));
                // Of somebody who comes in later in this order it counts from there on: see `admit`.
                if let (Some(demotion), Some(changes)) = (demotion, self.roles.get_mut(person)) {
                    changes.push((self.now, Change::Lowered(demotion.clone())));
                    self.refresh_role(person);
                }
            }
            _ => {}
        }
    }

    fn person_out(&mut self, id: &PersonId, standing: Standing) {
        let Some(person) = self.state.people.get_mut(id) else { return };
        if person.standing != Standing::Revoked {
            person.standing = standing;
        }
        self.person_names.free(&person.name, id);
        for machine in self.machines_of.get(id).into_iter().flatten() {
            if let Some(known) = self.state.machines.get(machine) {
                self.node_names.free(&known.name, &Node::Machine(*machine));
            }
        }
        for (wg, peer) in self.state.peers.iter().filter(|(_, peer)| peer.owner == *id) {
            self.node_names.free(&peer.name, &Node::Peer(*wg));
        }
    }

    fn rename_person(&mut self, by: Author, id: &PersonId, name: &PersonName) -> Result<(), VoidReason> {
        self.state.person(id).ok_or(VoidReason::NoSubject)?;
        allowed(self.may_act_on(&by, id))?;
        if self.person_names.is_taken_from(id, name) {
            return Err(VoidReason::NameTaken);
        }
        if let Some(person) = self.state.people.get_mut(id) {
            let old = std::mem::replace(&mut person.name, name.clone());
            self.person_names.free(&old, id);
            self.person_names.give(name.clone(), *id);
        }
        Ok(())
    }

    fn void(&mut self, entry: &Entry, reason: VoidReason) {
        self.void.push(((entry.time(), entry.id()), void(entry.id(), entry.author(), reason)));
    }
}

fn allowed(allowed: bool) -> Result<(), VoidReason> {
    if allowed { Ok(()) } else { Err(VoidReason::NotAllowed) }
}

fn void(entry: EntryId, author: AuthorId, reason: VoidReason) -> Void {
    Void { entry, author, reason }
}
