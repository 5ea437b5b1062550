//! What the entries of a clan amount to.

use std::collections::BTreeMap;

use clan_types::{
    ClanName, EntryId, InviteId, MachineId, MachineName, PersonId, PersonName, Role, Timestamp, WgPublicKey,
};

use crate::{AuthorId, VmDescription};

/// Whether a person or a machine is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// In.
    Good,
    /// Put out by somebody.
    Revoked,
    /// Gone by themselves; a machine: removed.
    Left,
}

/// A person of the clan, past ones included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Person {
    /// Name; unique among those in good standing.
    pub name: PersonName,
    /// What they may do, while in good standing.
    pub role: Role,
    /// Who made their invite; `None` for the founder.
    pub invited_by: Option<PersonId>,
    /// When they came in: the time of the countersignature.
    pub since: Timestamp,
    /// Whether they are in.
    pub standing: Standing,
}

/// A machine of the clan, past ones included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Name; unique among those in good standing.
    pub name: MachineName,
    /// Whose it is.
    pub owner: PersonId,
    /// WireGuard key.
    pub wg: WgPublicKey,
    /// Whether it was removed or revoked itself. Whether it may take part also depends on its owner: ask
    /// [`State::machine_in_good_standing`].
    pub standing: Standing,
}

/// An invite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    /// Who made it.
    pub by: PersonId,
    /// The role that it gives.
    pub role: Role,
    /// How many may redeem it.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// Last moment at which it can be redeemed.
    pub expires: Timestamp,
    /// Whether it was withdrawn.
    pub revoked: bool,
}

/// Why an invite cannot be redeemed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InviteProblem {
    /// No such invite.
    #[error("the clan does not know this invite")]
    Unknown,
    /// All its uses are used.
    #[error("this invite has been used already")]
    Used,
    /// Its time is over.
    #[error("this invite has expired")]
    Expired,
    /// It was withdrawn, or whoever made it is out.
    #[error("this invite was withdrawn")]
    Revoked,
}

/// The configuration in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The VM to run.
    pub description: VmDescription,
    /// Who published it.
    pub by: PersonId,
}

/// An entry without effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Void {
    /// The entry.
    pub entry: EntryId,
    /// Its author.
    pub author: AuthorId,
    /// Why it has no effect.
    pub reason: VoidReason,
}

/// Why an entry has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VoidReason {
    /// Its author is nobody of the clan.
    #[error("its author is not in the clan")]
    Outsider,
    /// An admission (or what came with it) that no machine in good standing has countersigned yet.
    #[error("no machine of the clan has countersigned the admission")]
    NotCountersigned,
    /// The author's role does not allow it.
    #[error("its author's role does not allow it")]
    NotAllowed,
    /// The author had left.
    #[error("its author had left")]
    AuthorLeft,
    /// It lies beyond the last entry that a revocation left standing.
    #[error("its author was revoked")]
    AuthorRevoked,
    /// Its author signed another entry for the same place in the log.
    #[error("its author signed two entries for the same place")]
    Equivocated,
    /// A revocation of somebody more senior who has revoked its author.
    #[error("its author was revoked by the more senior person it revokes")]
    Outranked,
    /// The name was somebody else's.
    #[error("the name was taken")]
    NameTaken,
    /// The key was enrolled, or the invite made, before.
    #[error("the key was in use")]
    KeyTaken,
    /// What it refers to is not (or not yet) there.
    #[error("what it refers to does not exist")]
    NoSubject,
    /// The invite did not allow it.
    #[error("the invite did not allow it")]
    Invite(#[source] InviteProblem),
}

/// What the entries of a clan amount to. Empty while the founding entry is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// The clan's name; `None` while the founding entry is missing.
    pub clan_name: Option<ClanName>,
    /// Everybody who ever came in.
    pub people: BTreeMap<PersonId, Person>,
    /// Every machine that was ever enrolled.
    pub machines: BTreeMap<MachineId, Machine>,
    /// Every invite that counted.
    pub invites: BTreeMap<InviteId, Invite>,
    /// The configuration in force.
    pub published: Option<Published>,
    /// Entries without effect, in the order in which they would have taken it.
    pub void: Vec<Void>,
    /// Authors who signed two entries for one place in their log, with the first such place.
    pub equivocations: BTreeMap<AuthorId, u64>,
}

impl State {
    /// The machine, if it and its owner are in good standing.
    pub fn machine_in_good_standing(&self, id: &MachineId) -> Option<&Machine> {
        self.machines
            .get(id)
            .filter(|machine| machine.standing == Standing::Good && self.person(&machine.owner).is_some())
    }

    /// All machines in good standing.
    pub fn good_machines(&self) -> impl Iterator<Item = (&MachineId, &Machine)> {
        self.machines
            .iter()
            .filter(|(_, machine)| machine.standing == Standing::Good && self.person(&machine.owner).is_some())
    }

    /// The machine in good standing that has the name.
    pub fn machine_named(&self, name: &MachineName) -> Option<(&MachineId, &Machine)> {
        self.good_machines().find(|(_, machine)| machine.name == *name)
    }

    /// The person, if in good standing.
    pub fn person(&self, id: &PersonId) -> Option<&Person> {
        self.people.get(id).filter(|person| person.standing == Standing::Good)
    }

    /// The person in good standing who has the name.
    pub fn person_named(&self, name: &PersonName) -> Option<(&PersonId, &Person)> {
        self.people.iter().find(|(_, person)| person.standing == Standing::Good && person.name == *name)
    }

    /// The role of a person in good standing.
    pub fn role_of(&self, id: &PersonId) -> Option<Role> {
        self.person(id).map(|person| person.role)
    }

    /// The invite, if somebody could redeem it at that time.
    pub fn check_invite(&self, id: &InviteId, at: Timestamp) -> Result<&Invite, InviteProblem> {
        let invite = self.invites.get(id).ok_or(InviteProblem::Unknown)?;
        if invite.revoked || self.person(&invite.by).is_none() {
            Err(InviteProblem::Revoked)
        } else if invite.used >= invite.uses {
            Err(InviteProblem::Used)
        } else if at > invite.expires {
            Err(InviteProblem::Expired)
        } else {
            Ok(invite)
        }
    }
}
