//! Which revocations and demotions count: weighed from the most senior author down.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
};

use clan_types::{DeviceId, EntryId, Hlc, MachineId, PersonId, Role};

use crate::{AuthorId, Body, DeviceKind, Entry, LastEntry, Ledger, State, VoidReason, fold::Run};

/// Where an entry stands in the order of effects.
pub(crate) type At = (Hlc, EntryId);

/// The claims that count, and the entries folded under them.
pub(crate) struct Folded {
    run: Run,
    /// The keys that revocations and demotions are about, those without effect included.
    subjects: HashSet<AuthorId>,
    /// Whether it was weighed if somebody is to stop being owner.
    unmade: bool,
    state: OnceLock<State>,
}

impl Folded {
    /// Folds the entries once for every group of claims, until no further claim counts. INVARIANT: a pure function of
    /// the set of entries; it ends because every round decides about a claim.
    pub(crate) fn new(ledger: &Ledger) -> Self {
        let (mut effective, mut unmade) = (Effective::default(), false);
        loop {
            let mut run = Run::new(ledger.clan(), effective);
            run.fold(ledger);
            match run.next_claims(ledger) {
                Next::None => {
                    let subjects = ledger
                        .order
                        .values()
                        .filter_map(|(author, seq)| subject(ledger.logs.get(author)?.get(*seq)?.body()));
                    return Self { subjects: subjects.collect(), run, unmade, state: OnceLock::new() };
                }
                Next::Claims(claims) => {
                    effective = run.effective;
                    for claim in &claims {
                        effective.add(ledger, claim);
                    }
                }
                Next::Unmakes(claim) => {
                    unmade = true;
                    let mut tried = run.effective.clone();
                    tried.add(ledger, &claim);
                    let mut next = Run::new(ledger.clan(), tried);
                    next.fold(ledger);
                    // INVARIANT: a clan does not lose its last owner by a demotion.
                    if run.has_owner() && !next.has_owner() {
                        effective = run.effective;
                        effective.refused.insert(claim.at.1);
                    } else {
                        effective = next.effective;
                    }
                }
            }
        }
    }

    /// Takes one more entry, if that cannot change how claims are weighed. INVARIANT: `true` is said only where
    /// [`Folded::new`] would come to the same.
    pub(crate) fn take(&mut self, entry: &Entry) -> bool {
        let (at, author) = ((entry.time(), entry.id()), entry.author());
        let effective = &self.run.effective;
        let simple = at > self.run.now()
            && !self.unmade
            && subject(entry.body()).is_none()
            && !effective.devices.contains_key(&author)
            && !effective.machines.contains_key(&author)
            && self.run.state.person_of(&author).is_none_or(|person| !effective.demotions.contains_key(&person))
            && self.brings_in(entry).is_none_or(|keys| keys.iter().all(|key| !self.subjects.contains(key)))
            && !self.brings_claims(entry);
        if !simple {
            return false;
        }
        self.state = OnceLock::new();
        let claims = self.run.claims.len();
        self.run.advance(at, entry);
        // With a newcomer came what they wrote before, claims among it: those are to be weighed.
        self.run.claims.len() == claims
    }

    /// The keys that an entry may bring into the clan; `None`: it brings in none.
    fn brings_in(&self, entry: &Entry) -> Option<Vec<AuthorId>> {
        match entry.body() {
            Body::Enrol { machine, .. } => Some(vec![(*machine).into()]),
            Body::AddDevice { device, .. } => Some(vec![(*device).into()]),
            // With the newcomer comes what they wrote before.
            Body::Countersign { admission } | Body::Approve { admission } => Some(self.run.newcomers_keys(admission)),
            _ => None,
        }
    }

    /// Whether somebody who claimed something before comes in, or would but for the claims that count by now: they may have
    /// been weighed after it.
    fn brings_claims(&self, entry: &Entry) -> bool {
        match entry.body() {
            Body::Countersign { admission } | Body::Approve { admission } => {
                self.run.newcomers_entries(admission).iter().any(|entry| subject(entry.body()).is_some())
            }
            _ => false,
        }
    }

    pub(crate) fn state(&self, ledger: &Ledger) -> &State {
        self.state.get_or_init(|| self.run.state(ledger))
    }
}

/// Whom a claim is about.
fn subject(body: &Body) -> Option<AuthorId> {
    match body {
        Body::RevokePerson { person, .. } | Body::SetRole { person, .. } => Some((*person).into()),
        Body::RevokeMachine { machine, .. } => Some((*machine).into()),
        Body::RevokeDevice { device, .. } => Some((*device).into()),
        _ => None,
    }
}

/// What is weighed next.
enum Next {
    None,
    Claims(Vec<Claim>),
    /// One that takes an owner's role.
    Unmakes(Claim),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Person(PersonId),
    Machine(MachineId),
    Device(DeviceId),
    /// A role less than the person had.
    Role(PersonId, Role),
}

/// A revocation or a demotion whose author may be entitled to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim {
    pub(crate) at: At,
    pub(crate) author: PersonId,
    /// Which of their keys signed it.
    pub(crate) device: AuthorId,
    /// The author's role at that place.
    pub(crate) role: Role,
    /// What it would have been without the demotions that touch that place.
    pub(crate) before: Role,
    pub(crate) subject: Subject,
    pub(crate) last: Option<LastEntry>,
}

/// Lesser is more senior. First the greater role, then who came in earlier; of one person, first what their devices
/// say about each other, the recovery key before all, then the earlier added.
type Rank = (Reverse<Role>, Option<At>, PersonId, Within);

/// Of one person's claims, the lesser is weighed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Within {
    OwnDevices(DeviceKind, At),
    Others,
}

/// A demotion that counts.
#[derive(Debug, Clone)]
pub(crate) struct Demotion {
    pub(crate) at: At,
    pub(crate) role: Role,
    /// How many entries of each device's log are not touched by it.
    counts: HashMap<AuthorId, u64>,
}

impl Demotion {
    /// Whether it lowers what this entry may do.
    pub(crate) fn touches(&self, author: &AuthorId, seq: u64) -> bool {
        seq >= self.counts.get(author).copied().unwrap_or(0)
    }
}

/// The claims that count.
#[derive(Debug, Clone, Default)]
pub(crate) struct Effective {
    pub(crate) entries: HashSet<EntryId>,
    /// Of those, with which people put themselves out.
    pub(crate) own: HashSet<EntryId>,
    /// Those that would have left the clan without an owner.
    pub(crate) refused: HashSet<EntryId>,
    /// How many entries of a revoked device's log count.
    pub(crate) devices: HashMap<AuthorId, u64>,
    /// How many entries of a revoked machine's log count.
    pub(crate) machines: HashMap<AuthorId, u64>,
    /// In order of time.
    pub(crate) demotions: HashMap<PersonId, Vec<Arc<Demotion>>>,
    /// Who acted against whom.
    people_pairs: HashSet<(PersonId, PersonId)>,
    /// Which device acted against which other one of the same person.
    device_pairs: HashSet<(AuthorId, AuthorId)>,
}

impl Effective {
    fn add(&mut self, ledger: &Ledger, claim: &Claim) {
        self.entries.insert(claim.at.1);
        let counted =
            |author: &AuthorId, last: LastEntry| ledger.logs.get(author).map_or(0, |log| log.count_up_to(last));
        let count = |author: &AuthorId| claim.last.map_or(0, |last| counted(author, last));
        let cut = |cuts: &mut HashMap<AuthorId, u64>, author: AuthorId, count: u64| {
            cuts.entry(author).and_modify(|least| *least = count.min(*least)).or_insert(count);
        };
        match claim.subject {
            Subject::Person(person) => {
                let first = AuthorId::from(person);
                if claim.author == person {
                    self.own.insert(claim.at.1);
                }
                // That they came in is kept: the use of the invite stays used.
                cut(&mut self.devices, first, count(&first).max(1));
                self.people_pairs.insert((claim.author, person));
            }
            Subject::Device(device) => {
                let device = AuthorId::from(device);
                let came_in = ledger
                    .logs
                    .get(&device)
                    .and_then(|log| log.get(0))
                    .is_some_and(|entry| matches!(entry.body(), Body::Found { .. } | Body::Admission { .. }));
                cut(&mut self.devices, device, count(&device).max(u64::from(came_in)));
                self.device_pairs.insert((claim.device, device));
            }
            Subject::Machine(machine) => {
                let machine = AuthorId::from(machine);
                cut(&mut self.machines, machine, count(&machine));
            }
            Subject::Role(person, role) => {
                let body = ledger.order.get(&claim.at).and_then(|(author, seq)| ledger.logs.get(author)?.get(*seq));
                let Some(Body::SetRole { last, .. }) = body.map(|entry| entry.body()) else { return };
                let mut counts = HashMap::new();
                for (device, last) in last {
                    let device = AuthorId::from(*device);
                    cut(&mut counts, device, counted(&device, *last));
                }
                let demotions = self.demotions.entry(person).or_default();
                demotions.push(Arc::new(Demotion { at: claim.at, role, counts }));
                demotions.sort_by_key(|demotion| demotion.at);
                self.people_pairs.insert((claim.author, person));
            }
        }
    }
}

impl Run {
    /// What is to be weighed next: the sound claims of the most senior rank, and with them those of the following ranks
    /// as long as nothing that is taken before could touch their authors.
    fn next_claims(&self, ledger: &Ledger) -> Next {
        let sound = self.claims.iter().filter(|claim| self.judge(claim).is_ok());
        let mut ranked: Vec<_> = sound.map(|claim| (self.rank(claim), *claim)).collect();
        ranked.sort_by_key(|(rank, claim)| (*rank, claim.at));
        let Some((first, _)) = ranked.first() else { return Next::None };
        let (mut rank, mut taken) = (*first, Vec::new());
        let (mut touched, mut cuts) = (HashSet::new(), false);
        for (next, claim) in ranked {
            // Each that takes an owner's role is weighed for itself.
            if self.unmakes_an_owner(&claim) {
                return if taken.is_empty() { Next::Unmakes(claim) } else { Next::Claims(taken) };
            }
            if next != rank && (cuts || self.rests_on(&claim.author, &touched)) {
                break;
            }
            rank = next;
            cuts |= self.cuts(ledger, &claim);
            touched.extend(self.owner_of(&claim.subject));
            taken.push(claim);
        }
        Next::Claims(taken)
    }

    fn owner_of(&self, subject: &Subject) -> Option<PersonId> {
        match subject {
            Subject::Person(person) | Subject::Role(person, _) => Some(*person),
            Subject::Machine(machine) => self.state.machines.get(machine).map(|machine| machine.owner),
            Subject::Device(device) => self.state.devices.get(device).map(|device| device.owner),
        }
    }

    /// Whether a claim voids entries that are there, or may: a role is lowered for several logs at once.
    fn cuts(&self, ledger: &Ledger, claim: &Claim) -> bool {
        let author = match claim.subject {
            Subject::Person(person) => person.into(),
            Subject::Machine(machine) => machine.into(),
            Subject::Device(device) => device.into(),
            Subject::Role(..) => return true,
        };
        let log = ledger.logs.get(&author);
        log.is_some_and(|log| claim.last.map_or(0, |last| log.count_up_to(last)) < log.len())
    }

    /// Whether a person is one of these, or is in the clan or in their role by one of them.
    fn rests_on(&self, person: &PersonId, touched: &HashSet<PersonId>) -> bool {
        let (mut seen, mut next) = (HashSet::new(), vec![*person]);
        while let Some(person) = next.pop() {
            if touched.contains(&person) {
                return true;
            }
            if seen.insert(person) {
                next.extend(self.supports.get(&person).into_iter().flatten());
            }
        }
        false
    }

    fn unmakes_an_owner(&self, claim: &Claim) -> bool {
        matches!(claim.subject, Subject::Role(person, _) if self.was_ever(&person, Role::Owner))
    }

    /// Whether the author is entitled to the claim, as far as is known in this pass. Roles are those at the claim.
    pub(crate) fn judge(&self, claim: &Claim) -> Result<(), VoidReason> {
        let owner = match claim.subject {
            Subject::Person(person) | Subject::Role(person, _) => person,
            Subject::Machine(machine) => self.state.machines.get(&machine).ok_or(VoidReason::NoSubject)?.owner,
            Subject::Device(device) => self.state.devices.get(&device).ok_or(VoidReason::NoSubject)?.owner,
        };
        let theirs = self.role_at(&owner, claim.at).ok_or(VoidReason::NoSubject)?;
        let may = |by: Role| match claim.subject {
            Subject::Role(_, role) => may_set_role(by, theirs, role),
            _ => claim.author == owner || by >= theirs.max(Role::Admin),
        };
        if matches!(claim.subject, Subject::Role(_, role) if role >= theirs) {
            return Err(VoidReason::NoSubject);
        }
        if !may(claim.role) {
            return Err(if may(claim.before) { VoidReason::AuthorDemoted } else { VoidReason::NotAllowed });
        }
        let device = self.state.devices.get(&claim.device.device());
        if device.is_some_and(|device| device.is_spent_link(claim.at.0.wall)) {
            return Err(VoidReason::LinkExpired);
        }
        if device.is_some_and(|device| device.kind == DeviceKind::Recovery) && owner != claim.author {
            return Err(VoidReason::RecoveryKey);
        }
        // INVARIANT: of two who act against each other, the one whose claim was weighed first stays.
        let outranked = if owner == claim.author {
            matches!(claim.subject, Subject::Device(device)
                if self.effective.device_pairs.contains(&(device.into(), claim.device)))
        } else {
            self.effective.people_pairs.contains(&(owner, claim.author))
        };
        if outranked { Err(VoidReason::Outranked) } else { Ok(()) }
    }

    fn rank(&self, claim: &Claim) -> Rank {
        let owner = match claim.subject {
            Subject::Device(device) => self.state.devices.get(&device).map(|device| device.owner),
            _ => None,
        };
        let within = if owner == Some(claim.author) {
            let kind = self.state.devices.get(&claim.device.device()).map_or(DeviceKind::Device, |device| device.kind);
            Within::OwnDevices(kind, self.device_since.get(&claim.device).copied().unwrap_or(claim.at))
        } else {
            Within::Others
        };
        (Reverse(claim.role), self.joined.get(&claim.author).copied(), claim.author, within)
    }
}

/// Owners give anybody any role; admins move people between guest and member.
pub(crate) fn may_set_role(author: Role, from: Role, to: Role) -> bool {
    author == Role::Owner || (author == Role::Admin && from < Role::Admin && to < Role::Admin)
}
