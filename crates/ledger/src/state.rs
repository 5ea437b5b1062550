//! What the entries of a clan amount to.

use std::{collections::BTreeMap, net::Ipv4Addr};

use clan_types::{
    CertificateHash, ClanName, ControlMode, DeviceId, DeviceName, EntryId, GroupName, Host, InviteId, MachineId,
    MachineName, NetworkLayer, PersonId, PersonName, Role, RuleName, Timestamp, WgPublicKey,
};

use crate::{AccessRule, Applications, AuthorId, DeviceKind, Group, MAX_AHEAD, Party, VmDescription};

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
    /// Who let them in, if their invite asked for approval.
    pub approved_by: Option<PersonId>,
    /// When they came in: the time of the countersignature, or of the approval.
    pub since: Timestamp,
    /// Whether they are in.
    pub standing: Standing,
}

/// A newcomer whom an admin has yet to let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// The admission that [`crate::Body::Approve`] and [`crate::Body::Deny`] name.
    pub admission: EntryId,
    /// The name that they will have, kept for them.
    pub name: PersonName,
    /// The role that they will have.
    pub role: Role,
    /// The invite that they redeemed.
    pub invite: InviteId,
    /// Who made it.
    pub invited_by: PersonId,
    /// Since when they wait: the time of the countersignature.
    pub since: Timestamp,
}

/// A person's device, past ones included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Whose it is.
    pub owner: PersonId,
    /// Name, unique among the person's devices in good standing; `None`: the first one, with which they came in.
    pub name: Option<DeviceName>,
    /// What it may do.
    pub kind: DeviceKind,
    /// Since when it is theirs.
    pub since: Timestamp,
    /// Whether it was revoked itself. Whether it may speak also depends on its owner: ask
    /// [`State::device_in_good_standing`].
    pub standing: Standing,
}

impl Device {
    /// Whether it is no device, but the key in a link that makes one: see [`clan_types::DEVICE_LINK`].
    pub fn is_link(&self) -> bool {
        let named = self.name.as_ref().is_some_and(|name| name.as_str().starts_with(clan_types::DEVICE_LINK));
        named && self.kind == DeviceKind::Recovery
    }

    /// Whether it is such a key, and what it signs at `at` comes too late to count. Whoever lets somebody in looks at their own
    /// clock, and is stricter by as much as the newcomer's clock may be ahead.
    pub fn is_spent_link(&self, at: Timestamp) -> bool {
        self.is_link() && at.since(self.since) > clan_types::DEVICE_LINK_LIFETIME + MAX_AHEAD
    }
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
    /// Second address, for programs that need an IPv4 one: from the key, and nobody else's in the clan. Where two keys
    /// lead to one, the earlier enrolled has it.
    pub ipv4: Ipv4Addr,
    /// Whether it was removed or revoked itself. Whether it may take part also depends on its owner: ask
    /// [`State::machine_in_good_standing`].
    pub standing: Standing,
}

/// A standard WireGuard machine behind a machine of the clan, past ones included. Its IPv6 address is
/// [`clan_types::peer_address`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Name; unique among the machines in good standing.
    pub name: MachineName,
    /// Whose it is.
    pub owner: PersonId,
    /// The machine that speaks the mesh for it.
    pub via: MachineId,
    /// Second address, as a machine's.
    pub ipv4: Ipv4Addr,
    /// Whether it was removed itself. Whether it may take part also depends on its owner and on `via`: ask
    /// [`State::good_peers`].
    pub standing: Standing,
}

/// A machine that passes packets on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// Where it is reached.
    pub host: Host,
    /// TCP port.
    pub port: u16,
    /// The certificate that it shows.
    pub certificate: CertificateHash,
    /// Who said so.
    pub by: PersonId,
}

/// What takes part in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A machine of the clan.
    Machine(MachineId),
    /// A standard WireGuard machine.
    Peer(WgPublicKey),
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
    /// Whether each newcomer also needs an approval.
    pub approval: bool,
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
    /// What carries its packets. Ask [`NetworkLayer::is_known`] before it is run.
    pub network: NetworkLayer,
    /// The applications in its image, as far as its publisher has said.
    pub applications: Applications,
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
    /// A demotion had taken from its author the role that it needs.
    #[error("its author's role had been taken away")]
    AuthorDemoted,
    /// It would have left the clan without an owner.
    #[error("it would have left the clan without an owner")]
    LastOwner,
    /// It came from a recovery key, and is not about its person's devices.
    #[error("a recovery phrase may only add and revoke devices")]
    RecoveryKey,
    /// It came from the key in a device link whose time was over.
    #[error("the device link had expired")]
    LinkExpired,
    /// An admission (or what came with it) that needs an approval and has none yet.
    #[error("nobody has approved the admission yet")]
    NotApproved,
    /// An admission (or what came with it) that was refused.
    #[error("the admission was denied")]
    Denied,
    /// Somebody had approved or denied the admission before.
    #[error("somebody else had decided about it before")]
    Decided,
    /// The person has had as many devices as anybody may.
    #[error("its author has too many devices")]
    TooManyDevices,
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
    /// Newcomers whom an admin has yet to let in.
    pub pending: BTreeMap<PersonId, Pending>,
    /// Every device that people ever had; the first of each person bears the person's own key.
    pub devices: BTreeMap<DeviceId, Device>,
    /// Every machine that was ever enrolled.
    pub machines: BTreeMap<MachineId, Machine>,
    /// Every standard WireGuard machine that was ever added.
    pub peers: BTreeMap<WgPublicKey, Peer>,
    /// Machines that pass packets on, those out included: ask [`State::good_relays`].
    pub relays: BTreeMap<MachineId, Relay>,
    /// Groups.
    pub groups: BTreeMap<GroupName, Group>,
    /// Access rules in force, those included that a clan begins with.
    pub rules: BTreeMap<RuleName, AccessRule>,
    /// Every invite that counted.
    pub invites: BTreeMap<InviteId, Invite>,
    /// The configuration in force.
    pub published: Option<Published>,
    /// Who is to steer a newcomer's machine, as the clan suggests: its user alone unless an admin has said otherwise. It belongs
    /// to the VM that is published.
    pub suggested_control: ControlMode,
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

    /// All standard WireGuard machines in good standing whose owner and whose machine in front of them are.
    pub fn good_peers(&self) -> impl Iterator<Item = (&WgPublicKey, &Peer)> {
        self.peers.iter().filter(|(_, peer)| {
            peer.standing == Standing::Good
                && self.person(&peer.owner).is_some()
                && self.machine_in_good_standing(&peer.via).is_some()
        })
    }

    /// All relays whose machine is in good standing.
    pub fn good_relays(&self) -> impl Iterator<Item = (&MachineId, &Relay)> {
        self.relays.iter().filter(|(machine, _)| self.machine_in_good_standing(machine).is_some())
    }

    /// The person whose device signs with this key, past devices and past people included.
    pub fn person_of(&self, author: &AuthorId) -> Option<PersonId> {
        self.devices.get(&author.device()).map(|device| device.owner)
    }

    /// The device, if it and its owner are in good standing.
    pub fn device_in_good_standing(&self, id: &DeviceId) -> Option<&Device> {
        self.devices.get(id).filter(|device| device.standing == Standing::Good && self.person(&device.owner).is_some())
    }

    /// A person's devices, past ones included.
    pub fn devices_of(&self, person: &PersonId) -> impl Iterator<Item = (&DeviceId, &Device)> {
        self.devices.iter().filter(move |(_, device)| device.owner == *person)
    }

    /// Whether a machine, or the person whose it is, is meant by a rule's word. Nobody is who is not in good standing.
    pub fn is_meant(&self, node: &Node, party: &Party) -> bool {
        let owner = match node {
            Node::Machine(id) => self.machine_in_good_standing(id).map(|machine| machine.owner),
            Node::Peer(wg) => self.good_peers().find(|(id, _)| *id == wg).map(|(_, peer)| peer.owner),
        };
        owner.is_some_and(|owner| self.is_meant_within(node, &owner, party, 0))
    }

    fn is_meant_within(&self, node: &Node, owner: &PersonId, party: &Party, depth: u8) -> bool {
        /// INVARIANT: groups that contain one another end somewhere.
        const DEEPEST: u8 = 2;
        match party {
            Party::Everybody => true,
            Party::Role(least) => self.role_of(owner) >= Some(*least),
            Party::Person(person) => person == owner,
            Party::Machine(machine) => *node == Node::Machine(*machine),
            Party::Peer(wg) => *node == Node::Peer(*wg),
            Party::Group(name) => {
                let members = self.groups.get(name).map(|group| &group.members);
                depth < DEEPEST
                    && members.into_iter().flatten().any(|party| self.is_meant_within(node, owner, party, depth + 1))
            }
        }
    }

    /// The person, if in good standing.
    pub fn person(&self, id: &PersonId) -> Option<&Person> {
        self.people.get(id).filter(|person| person.standing == Standing::Good)
    }

    /// The person in good standing who has the name.
    pub fn person_named(&self, name: &PersonName) -> Option<(&PersonId, &Person)> {
        self.people.iter().find(|(_, person)| person.standing == Standing::Good && person.name == *name)
    }

    /// Whether somebody in good standing bears the name, or it is kept for a newcomer.
    pub fn is_person_name(&self, name: &PersonName) -> bool {
        self.person_named(name).is_some() || self.pending.values().any(|pending| pending.name == *name)
    }

    /// Whether a machine in good standing, standard WireGuard machines included, bears the name.
    pub fn is_node_name(&self, name: &MachineName) -> bool {
        let held = |peer: &Peer| peer.standing == Standing::Good && self.person(&peer.owner).is_some();
        self.machine_named(name).is_some() || self.peers.values().any(|peer| held(peer) && peer.name == *name)
    }

    /// The role of a person in good standing.
    pub fn role_of(&self, id: &PersonId) -> Option<Role> {
        self.person(id).map(|person| person.role)
    }

    /// The invite, if somebody could redeem it at that time.
    pub fn check_invite(&self, id: &InviteId, at: Timestamp) -> Result<&Invite, InviteProblem> {
        self.check_invite_if(id, at, |by| self.person(by).is_some())
    }

    pub(crate) fn check_invite_if(
        &self,
        id: &InviteId,
        at: Timestamp,
        may_let_in: impl FnOnce(&PersonId) -> bool,
    ) -> Result<&Invite, InviteProblem> {
        let invite = self.invites.get(id).ok_or(InviteProblem::Unknown)?;
        if invite.revoked || !may_let_in(&invite.by) {
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
