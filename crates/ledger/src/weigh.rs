//! Which revocations and demotions count: weighed from the most senior author down.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
};

use clan_types::{DeviceId, EntryId, Hlc, MachineId, PersonId, Role};

use crate::{AuthorId, Body, DeviceKind, LastEntry, Ledger, State, VoidReason, fold::Run};

/// Where an entry stands in the order of effects.
pub(crate) type At = (Hlc, EntryId);

/// Folds the entries once for every group of claims, until no further claim counts. INVARIANT: a pure function of the
/// set of entries; it ends because every round decides about a claim.
pub(crate) fn fold(ledger: &Ledger) -> State {
    let mut effective = Effective::default();
    loop {
        let mut run = Run::new(ledger, &effective);
        run.fold();
        let claims = run.next_claims();
        let owned = run.has_owner();
        match claims {
            Next::None => return run.finish(),
            Next::Claims(claims) => {
                for claim in &claims {
                    effective.add(ledger, claim);
                }
            }
            Next::Unmakes(claim) => {
                let mut tried = effective.clone();
                tried.add(ledger, &claim);
                let mut next = Run::new(ledger, &tried);
                next.fold();
                // INVARIANT: a clan does not lose its last owner by a demotion.
                if owned && !next.has_owner() {
                    effective.refused.insert(claim.at.1);
                } else {
                    effective = tried;
                }
            }
        }
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
    /// Those that would have left the clan without an owner.
    pub(crate) refused: HashSet<EntryId>,
    /// How many entries of a revoked device's log count.
    pub(crate) devices: HashMap<AuthorId, u64>,
    /// How many entries of a revoked machine's log count.
    pub(crate) machines: HashMap<AuthorId, u64>,
    /// In order of time.
    pub(crate) demotions: HashMap<PersonId, Vec<Demotion>>,
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
                demotions.push(Demotion { at: claim.at, role, counts });
                demotions.sort_by_key(|demotion| demotion.at);
                self.people_pairs.insert((claim.author, person));
            }
        }
    }
}

impl Run<'_> {
    /// The sound claims of the most senior rank.
    fn next_claims(&self) -> Next {
        let sound = self.claims.iter().filter(|claim| self.judge(claim).is_ok());
        let ranked: Vec<_> = sound.map(|claim| (self.rank(claim), claim)).collect();
        let Some(first) = ranked.iter().map(|(rank, _)| *rank).min() else { return Next::None };
        let mut claims: Vec<_> =
            ranked.into_iter().filter(|(rank, _)| *rank == first).map(|(_, claim)| *claim).collect();
        claims.sort_by_key(|claim| claim.at);
        // Each that takes an owner's role is weighed for itself.
        match claims.iter().position(|claim| self.unmakes_an_owner(claim)) {
            Some(0) => Next::Unmakes(claims[0]),
            Some(place) => {
                claims.truncate(place);
                Next::Claims(claims)
            }
            None => Next::Claims(claims),
        }
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
        let kind = self.state.devices.get(&claim.device.device()).map(|device| device.kind);
        if kind == Some(DeviceKind::Recovery) && owner != claim.author {
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
