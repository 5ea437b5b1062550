//! The pure fold from entries to [`State`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
};

use clan_types::{EntryId, Hlc, InviteId, MachineId, MachineName, PersonId, PersonName, Role, Timestamp, WgPublicKey};

use crate::{
    AuthorId, Body, Entry, Invite, InviteProblem, LastEntry, Ledger, Machine, Person, Published, Standing, State, Void,
    VoidReason,
};

/// Folds the entries once for every author of revocations, from the most senior one down, until no further revocation
/// counts. INVARIANT: a pure function of the set of entries; it ends because every round adds a revocation.
pub(crate) fn fold(ledger: &Ledger) -> State {
    let mut effective = Effective::default();
    loop {
        let mut run = Run::new(ledger, &effective);
        run.fold();
        let claims = run.sound_claims();
        // The most senior author whose revocations are not weighed yet.
        let Some(author) = claims.iter().map(|claim| claim.author).min_by_key(|author| run.seniority(author)) else {
            return run.finish();
        };
        for claim in claims.into_iter().filter(|claim| claim.author == author) {
            effective.add(ledger, claim);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Person(PersonId),
    Machine(MachineId),
}

/// A revocation whose author may be entitled to it.
#[derive(Debug, Clone, Copy)]
struct Claim {
    at: (Hlc, EntryId),
    author: PersonId,
    subject: Subject,
    last: Option<LastEntry>,
}

/// The revocations that count.
#[derive(Default)]
struct Effective {
    entries: HashSet<EntryId>,
    /// How many entries of a revoked person's log count.
    people: HashMap<PersonId, u64>,
    /// How many entries of a revoked machine's log count.
    machines: HashMap<MachineId, u64>,
    /// Who revoked whom.
    pairs: HashSet<(PersonId, PersonId)>,
}

impl Effective {
    fn add(&mut self, ledger: &Ledger, claim: Claim) {
        self.entries.insert(claim.at.1);
        let count = |author: AuthorId, least: u64| {
            let counted = claim.last.map_or(0, |last| ledger.logs.get(&author).map_or(0, |log| log.count_up_to(last)));
            counted.max(least)
        };
        match claim.subject {
            Subject::Person(person) => {
                // That they came in is kept: the use of the invite stays used.
                let count = count(person.into(), 1);
                self.people.entry(person).and_modify(|least| *least = count.min(*least)).or_insert(count);
                self.pairs.insert((claim.author, person));
            }
            Subject::Machine(machine) => {
                let count = count(machine.into(), 0);
                self.machines.entry(machine).and_modify(|least| *least = count.min(*least)).or_insert(count);
            }
        }
    }
}

/// A newcomer who is not in yet.
struct Newcomer<'a> {
    admission: &'a Entry,
    /// What they wrote since.
    later: Vec<&'a Entry>,
    /// Why the last countersignature did not count.
    failed: Option<VoidReason>,
}

/// One pass over the entries.
struct Run<'a> {
    ledger: &'a Ledger,
    effective: &'a Effective,
    state: State,
    void: Vec<((Hlc, EntryId), Void)>,
    claims: Vec<Claim>,
    newcomers: BTreeMap<PersonId, Newcomer<'a>>,
    /// Newcomers, waiting or in, by their admission.
    admissions: HashMap<EntryId, PersonId>,
    /// When each person came in.
    joined: HashMap<PersonId, (Hlc, EntryId)>,
    people_out: HashSet<PersonId>,
    machines_out: HashSet<MachineId>,
    invites_out: HashSet<InviteId>,
    person_names: HashMap<PersonName, PersonId>,
    machine_names: HashMap<MachineName, MachineId>,
    wgs: HashSet<WgPublicKey>,
    machines_of: BTreeMap<PersonId, BTreeSet<MachineId>>,
}

impl<'a> Run<'a> {
    fn new(ledger: &'a Ledger, effective: &'a Effective) -> Self {
        Self {
            ledger,
            effective,
            state: State::default(),
            void: Vec::new(),
            claims: Vec::new(),
            newcomers: BTreeMap::new(),
            admissions: HashMap::new(),
            joined: HashMap::new(),
            people_out: HashSet::new(),
            machines_out: HashSet::new(),
            invites_out: HashSet::new(),
            person_names: HashMap::new(),
            machine_names: HashMap::new(),
            wgs: HashSet::new(),
            machines_of: BTreeMap::new(),
        }
    }

    fn fold(&mut self) {
        let ledger = self.ledger;
        for (author, seq) in ledger.order.values() {
            if let Some(entry) = ledger.logs.get(author).and_then(|log| log.get(*seq)) {
                self.take(entry);
            }
        }
    }

    fn finish(mut self) -> State {
        for claim in std::mem::take(&mut self.claims) {
            let reason = self.judge(&claim).err().unwrap_or(VoidReason::NotAllowed);
            self.void.push((claim.at, void(claim.at.1, claim.author.into(), reason)));
        }
        for newcomer in std::mem::take(&mut self.newcomers).into_values() {
            let reason = newcomer.failed.unwrap_or(VoidReason::NotCountersigned);
            self.void(newcomer.admission, reason);
            for entry in newcomer.later {
                self.void(entry, VoidReason::NotCountersigned);
            }
        }
        for (author, log) in &self.ledger.logs {
            if let Some(rival) = &log.rival {
                self.void(rival, VoidReason::Equivocated);
                self.state.equivocations.insert(*author, rival.seq());
            }
        }
        self.void.sort_by_key(|(at, _)| *at);
        self.state.void = self.void.into_iter().map(|(_, void)| void).collect();
        self.state
    }

    /// Claims whose author is entitled to them, as far as is known in this pass.
    fn sound_claims(&self) -> Vec<Claim> {
        self.claims.iter().filter(|claim| self.judge(claim).is_ok()).copied().collect()
    }

    fn judge(&self, claim: &Claim) -> Result<(), VoidReason> {
        let owner = match claim.subject {
            Subject::Person(person) => person,
            Subject::Machine(machine) => self.state.machines.get(&machine).ok_or(VoidReason::NoSubject)?.owner,
        };
        if !self.state.people.contains_key(&owner) {
            return Err(VoidReason::NoSubject);
        }
        if !self.may_act_on(&claim.author, &owner) {
            return Err(VoidReason::NotAllowed);
        }
        // INVARIANT: of two people who revoke each other, the one whose revocation was weighed first stays.
        if owner != claim.author && self.effective.pairs.contains(&(owner, claim.author)) {
            return Err(VoidReason::Outranked);
        }
        Ok(())
    }

    /// Lesser is more senior.
    fn seniority(&self, person: &PersonId) -> (Reverse<Option<Role>>, Option<(Hlc, EntryId)>, PersonId) {
        let role = self.state.people.get(person).map(|person| person.role);
        (Reverse(role), self.joined.get(person).copied(), *person)
    }

    fn take(&mut self, entry: &'a Entry) {
        let result = match entry.body() {
            Body::Found { clan, founder, .. } => {
                self.state.clan_name = Some(clan.clone());
                self.admit(entry.author().person(), founder, Role::Owner, None, entry);
                Ok(())
            }
            Body::Admission { .. } => {
                let person = entry.author().person();
                self.admissions.insert(entry.id(), person);
                self.newcomers.insert(person, Newcomer { admission: entry, later: Vec::new(), failed: None });
                Ok(())
            }
            Body::Countersign { admission } => self.countersign(entry, admission),
            _ => self.take_person(entry),
        };
        if let Err(reason) = result {
            self.void(entry, reason);
        }
    }

    /// An entry that only people write.
    fn take_person(&mut self, entry: &'a Entry) -> Result<(), VoidReason> {
        let author = entry.author().person();
        if self.effective.entries.contains(&entry.id()) {
            self.put_out(entry.body());
            return Ok(());
        }
        // INVARIANT: the cut is by place in the log, not by time: a back-dated entry does not slip through.
        if self.effective.people.get(&author).is_some_and(|count| entry.seq() >= *count) {
            return Err(VoidReason::AuthorRevoked);
        }
        if let Some(newcomer) = self.newcomers.get_mut(&author) {
            newcomer.later.push(entry);
            return Ok(());
        }
        let person = self.state.people.get(&author).ok_or(VoidReason::Outsider)?;
        if person.standing == Standing::Left {
            return Err(VoidReason::AuthorLeft);
        }
        self.apply(entry, author, person.role)
    }

    fn apply(&mut self, entry: &'a Entry, author: PersonId, role: Role) -> Result<(), VoidReason> {
        let needs = |least: Role| if role >= least { Ok(()) } else { Err(VoidReason::NotAllowed) };
        match entry.body() {
            Body::Enrol { machine, name, wg } => {
                needs(Role::Member)?;
                self.enrol(author, machine, name, wg)
            }
            Body::Remove { machine } => {
                let owner = self.state.machines.get(machine).ok_or(VoidReason::NoSubject)?.owner;
                self.may_act_on(&author, &owner).then_some(()).ok_or(VoidReason::NotAllowed)?;
                self.machine_out(machine, Standing::Left);
                Ok(())
            }
            Body::Invite { invite, role: given, uses, expires } => {
                needs(if *given >= Role::Admin { Role::Owner } else { Role::Admin })?;
                if self.state.invites.contains_key(invite) {
                    return Err(VoidReason::KeyTaken);
                }
                let revoked = self.invites_out.contains(invite);
                let made = Invite { by: author, role: *given, uses: *uses, used: 0, expires: *expires, revoked };
                self.state.invites.insert(*invite, made);
                Ok(())
            }
            Body::RevokeInvite { invite } => {
                match self.state.invites.get_mut(invite) {
                    Some(known) if known.by == author || role >= Role::Admin => known.revoked = true,
                    Some(_) => return Err(VoidReason::NotAllowed),
                    // The invite's time may lie ahead of everybody's: its withdrawal counts all the same.
                    None if role >= Role::Admin => {
                        self.invites_out.insert(*invite);
                    }
                    None => return Err(VoidReason::NoSubject),
                }
                Ok(())
            }
            Body::Publish { description } => {
                needs(Role::Admin)?;
                self.state.published = Some(Published { description: description.clone(), by: author });
                Ok(())
            }
            Body::RevokePerson { person, last } => {
                self.claim(entry, author, Subject::Person(*person), *last);
                Ok(())
            }
            Body::RevokeMachine { machine, last } => {
                self.claim(entry, author, Subject::Machine(*machine), *last);
                Ok(())
            }
            Body::Leave => {
                self.person_out(&author, Standing::Left);
                Ok(())
            }
            // Handled before; listed so that a new body cannot be forgotten here.
            Body::Found { .. } | Body::Admission { .. } | Body::Countersign { .. } => Err(VoidReason::NotAllowed),
        }
    }

    fn claim(&mut self, entry: &Entry, author: PersonId, subject: Subject, last: Option<LastEntry>) {
        // Judged after the pass, because its subject's entries may carry any time.
        self.claims.push(Claim { at: (entry.time(), entry.id()), author, subject, last });
    }

    /// A revocation that counts takes effect for what comes after it.
    fn put_out(&mut self, body: &Body) {
        match body {
            Body::RevokePerson { person, .. } => {
                self.people_out.insert(*person);
                self.person_out(person, Standing::Revoked);
            }
            Body::RevokeMachine { machine, .. } => {
                self.machines_out.insert(*machine);
                self.machine_out(machine, Standing::Revoked);
            }
            _ => {}
        }
    }

    /// Whether somebody may remove or revoke a person, or a machine of theirs.
    fn may_act_on(&self, author: &PersonId, subject: &PersonId) -> bool {
        let role = |id: &PersonId| self.state.people.get(id).map(|person| person.role);
        author == subject || role(author) >= role(subject).max(Some(Role::Admin))
    }

    fn countersign(&mut self, entry: &'a Entry, admission: &EntryId) -> Result<(), VoidReason> {
        let witness = entry.author().machine();
        let cut = self.effective.machines.get(&witness).copied();
        if cut.is_some_and(|count| entry.seq() >= count) {
            return Err(VoidReason::AuthorRevoked);
        }
        let machine = self.state.machines.get(&witness).ok_or(VoidReason::Outsider)?;
        let owner = self.state.people.get(&machine.owner).ok_or(VoidReason::Outsider)?;
        if machine.standing == Standing::Left || owner.standing == Standing::Left {
            return Err(VoidReason::AuthorLeft);
        }
        // What a revoked machine's own revocation left standing counts, whenever it was written. Where only its owner
        // was revoked, time decides.
        if cut.is_none() && owner.standing == Standing::Revoked {
            return Err(VoidReason::AuthorRevoked);
        }
        let person = *self.admissions.get(admission).ok_or(VoidReason::NoSubject)?;
        let Some(newcomer) = self.newcomers.get(&person) else {
            return Ok(()); // Somebody else countersigned first.
        };
        let asks = newcomer.admission;
        match self.redeem(asks, entry) {
            Ok(()) => {
                let later = self.newcomers.remove(&person).map(|newcomer| newcomer.later).unwrap_or_default();
                for entry in later {
                    if let Err(reason) = self.take_person(entry) {
                        self.void(entry, reason);
                    }
                }
                Ok(())
            }
            Err(reason) => {
                if let Some(newcomer) = self.newcomers.get_mut(&person) {
                    newcomer.failed = Some(reason);
                }
                Err(reason)
            }
        }
    }

    fn redeem(&mut self, admission: &Entry, countersign: &Entry) -> Result<(), VoidReason> {
        let Body::Admission { invite: id, name, .. } = admission.body() else { return Err(VoidReason::NoSubject) };
        let at: Timestamp = countersign.time().wall;
        let (role, by) = match self.state.check_invite(id, at) {
            Ok(invite) => (invite.role, invite.by),
            Err(problem) => return Err(VoidReason::Invite(problem)),
        };
        if self.person_names.contains_key(name) {
            return Err(VoidReason::NameTaken);
        }
        let invite = self.state.invites.get_mut(id).ok_or(VoidReason::Invite(InviteProblem::Unknown))?;
        invite.used += 1;
        self.admit(admission.author().person(), name, role, Some(by), countersign);
        Ok(())
    }

    fn admit(&mut self, id: PersonId, name: &PersonName, role: Role, invited_by: Option<PersonId>, by: &Entry) {
        let (name, since) = (name.clone(), by.time().wall);
        self.joined.insert(id, (by.time(), by.id()));
        self.person_names.insert(name.clone(), id);
        self.state.people.insert(id, Person { name, role, invited_by, since, standing: Standing::Good });
        if self.people_out.contains(&id) {
            self.person_out(&id, Standing::Revoked);
        }
    }

    fn enrol(
        &mut self,
        owner: PersonId,
        id: &MachineId,
        name: &MachineName,
        wg: &WgPublicKey,
    ) -> Result<(), VoidReason> {
        if self.state.machines.contains_key(id) || self.wgs.contains(wg) {
            return Err(VoidReason::KeyTaken);
        }
        if self.machine_names.contains_key(name) {
            return Err(VoidReason::NameTaken);
        }
        let standing = if self.machines_out.contains(id) { Standing::Revoked } else { Standing::Good };
        if standing == Standing::Good && self.state.person(&owner).is_some() {
            self.machine_names.insert(name.clone(), *id);
        }
        self.wgs.insert(*wg);
        self.machines_of.entry(owner).or_default().insert(*id);
        self.state.machines.insert(*id, Machine { name: name.clone(), owner, wg: *wg, standing });
        Ok(())
    }

    fn person_out(&mut self, id: &PersonId, standing: Standing) {
        let Some(person) = self.state.people.get_mut(id) else { return };
        if person.standing != Standing::Revoked {
            person.standing = standing;
        }
        free(&mut self.person_names, &person.name, id);
        for machine in self.machines_of.get(id).into_iter().flatten() {
            if let Some(known) = self.state.machines.get(machine) {
                free(&mut self.machine_names, &known.name, machine);
            }
        }
    }

    fn machine_out(&mut self, id: &MachineId, standing: Standing) {
        let Some(machine) = self.state.machines.get_mut(id) else { return };
        if machine.standing != Standing::Revoked {
            machine.standing = standing;
        }
        free(&mut self.machine_names, &machine.name, id);
    }

    fn void(&mut self, entry: &Entry, reason: VoidReason) {
        self.void.push(((entry.time(), entry.id()), void(entry.id(), entry.author(), reason)));
    }
}

fn void(entry: EntryId, author: AuthorId, reason: VoidReason) -> Void {
    Void { entry, author, reason }
}

/// Frees a name if it is still the holder's: it may have passed on since.
fn free<N: Eq + std::hash::Hash, I: PartialEq>(names: &mut HashMap<N, I>, name: &N, holder: &I) {
    if names.get(name) == Some(holder) {
        names.remove(name);
    }
}
