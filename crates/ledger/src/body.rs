//! What an entry says.

use std::{collections::BTreeSet, fmt, str::FromStr};

use clan_types::{
    AppName, ByteSize, CertificateHash, ClanId, ClanName, ControlMode, DeviceId, DeviceName, EntryId, GroupName, Host,
    ImageId, InviteId, MachineId, MachineName, NetworkLayer, PersonId, PersonName, Role, RuleName, Timestamp,
    WgPublicKey,
};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{AuthorId, Party, PortRange, Target};

const ADMISSION_CONTEXT: &[u8] = b"clan 2026-11 admission v1";
const DEVICE_CONTEXT: &[u8] = b"clan 2026-11 device v1";
const MACHINE_CONTEXT: &[u8] = b"clan 2026-11 machine v1";
const MAX_TITLE: usize = 200;

/// What an entry says. Who may say it is decided by the fold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// Founds a clan: the first entry of the founder's log, whose id is the clan's id.
    Found {
        /// The clan's name.
        clan: ClanName,
        /// The founder's name.
        founder: PersonName,
        /// Makes clans of the same name and founder distinct.
        nonce: [u8; 32],
    },
    /// Adds one of the author's own machines. Members and up. If its name is taken it gets the next free one (`nas-2`).
    Enrol {
        /// The machine's key. The first enrolment of a key counts.
        machine: MachineId,
        /// Its name.
        name: MachineName,
        /// Its WireGuard key, unique in the clan.
        wg: WgPublicKey,
        /// Shows that the author had the machine's consent. See [`Body::enrol`].
        proof: KeyProof,
    },
    /// Takes a machine out. Its owner; admins, if the owner's role is not above theirs.
    Remove {
        /// The machine.
        machine: MachineId,
    },
    /// Invites. Admins give guest and member, owners give any role.
    Invite {
        /// Public half of the invite's key.
        invite: InviteId,
        /// The role that it gives.
        role: Role,
        /// How many may redeem it.
        uses: u32,
        /// Last moment at which it can be redeemed.
        expires: Timestamp,
        /// Whether each newcomer also needs an [`Body::Approve`].
        approval: bool,
    },
    /// A newcomer's first entry: asks to be in. Counts once it is countersigned.
    Admission {
        /// The invite that is redeemed.
        invite: InviteId,
        /// The newcomer's name; if it is taken they get the next free one (`anna-2`).
        name: PersonName,
        /// Shows that the newcomer held the invite's secret. See [`Body::admission`].
        proof: KeyProof,
    },
    /// A machine in good standing has seen an admission; the time of this entry is when.
    Countersign {
        /// The admission.
        admission: EntryId,
    },
    /// Puts a VM description in force. Admins and up. The VM's network layer is the mesh, and what applications are in its
    /// image is not said.
    Publish {
        /// What members' computers are to run.
        description: VmDescription,
    },
    /// Puts a person, and with them their machines, out. Admins, up to their own role; anyone themselves.
    /// Revoke their machines with it: see [`crate::Ledger::revocation_of_person`].
    RevokePerson {
        /// The person.
        person: PersonId,
        /// The last of their entries that still counts; `None`: only that they came in.
        last: Option<LastEntry>,
    },
    /// Puts a machine out. Its owner; admins, if the owner's role is not above theirs.
    RevokeMachine {
        /// The machine.
        machine: MachineId,
        /// The last of its entries that still counts; `None`: none.
        last: Option<LastEntry>,
    },
    /// Withdraws an invite from here on. Who made it, and admins.
    RevokeInvite {
        /// The invite.
        invite: InviteId,
    },
    /// The author leaves, with their machines.
    Leave,
    /// Gives a person another role. Owners any role to anybody; admins move people between guest and member.
    /// What raises a role counts from here on. What lowers it is weighed like a revocation: `last` says what still
    /// counts under the old role, and it never takes a clan its last owner. See [`crate::Ledger::role_change`].
    SetRole {
        /// The person.
        person: PersonId,
        /// Their role from now on.
        role: Role,
        /// For each of the person's devices the last entry that still counts under the old role; of a device that is
        /// not named none does.
        last: Vec<(DeviceId, LastEntry)>,
    },
    /// Gives a person another name. Themselves; admins up to their own role.
    RenamePerson {
        /// The person.
        person: PersonId,
        /// Their new name, unique in the clan.
        name: PersonName,
    },
    /// Gives a machine another name. Its owner; admins, if the owner's role is not above theirs.
    RenameMachine {
        /// The machine.
        machine: MachineId,
        /// Its new name, unique in the clan.
        name: MachineName,
    },
    /// Lets a newcomer in whose invite asked for approval. Whoever might have made that invite.
    Approve {
        /// Their admission.
        admission: EntryId,
    },
    /// Refuses a newcomer whose invite asked for approval. Whoever might have made that invite. The use stays used.
    Deny {
        /// Their admission.
        admission: EntryId,
    },
    /// Adds a device to the author's own: a further key whose entries count as theirs. Any of their devices.
    AddDevice {
        /// The device's key. It belongs to nobody yet.
        device: DeviceId,
        /// Its name, unique among the person's devices.
        name: DeviceName,
        /// What it may do.
        kind: DeviceKind,
        /// Shows that the author had the device's consent. See [`Body::add_device`].
        proof: KeyProof,
    },
    /// Puts a device out; the person stays. Any of the same person's devices; admins, if the person's role is not above
    /// theirs.
    RevokeDevice {
        /// The device. The first one bears the person's own key.
        device: DeviceId,
        /// The last of its entries that still counts; `None`: none (of the first device only that its person came in).
        last: Option<LastEntry>,
    },
    /// A machine passes packets on between machines that do not reach each other. The last statement about a machine
    /// counts. Its owner, from member up; admins, if the owner's role is not above theirs.
    Relay {
        /// The machine.
        machine: MachineId,
        /// Where it is reached from everywhere.
        host: Host,
        /// TCP port.
        port: u16,
        /// The certificate that it shows.
        certificate: CertificateHash,
    },
    /// A machine does so no more. Who might have said that it does.
    RelayOff {
        /// The machine.
        machine: MachineId,
    },
    /// Adds a standard WireGuard machine of the author's, such as a phone, behind a machine of the clan: `via` speaks
    /// the mesh for it. Who might offer `via` as a relay.
    AddPeer {
        /// Its WireGuard key, unique in the clan. Its address follows from it: [`clan_types::peer_address`].
        wg: WgPublicKey,
        /// Its name, unique among the clan's machines.
        name: MachineName,
        /// The machine that it connects to.
        via: MachineId,
    },
    /// Takes a standard WireGuard machine out. Its owner, the owner of the machine in front of it; admins, if its
    /// owner's role is not above theirs.
    RemovePeer {
        /// The machine.
        wg: WgPublicKey,
    },
    /// Names a group of people and machines, or replaces its members. Admins and up.
    Group {
        /// Its name.
        name: GroupName,
        /// Who is in it.
        members: Vec<Party>,
    },
    /// Makes an access rule, or replaces the one of that name. Admins and up. Rules only allow: what none allows is
    /// not allowed.
    Rule {
        /// Its name.
        name: RuleName,
        /// Who may reach
        from: Party,
        /// what,
        to: Target,
        /// and there which ports; none given: all.
        ports: Vec<PortRange>,
    },
    /// Takes an access rule away, those included that a clan begins with. Admins and up.
    DropRule {
        /// Its name.
        name: RuleName,
    },
    /// Takes a group away. Admins and up.
    DropGroup {
        /// Its name.
        name: GroupName,
    },
    /// Suggests to newcomers who is to steer their machine; each decides for themselves. Admins and up.
    SuggestControl {
        /// Who.
        control: ControlMode,
    },
    /// Puts a VM description in force, with all that belongs to one. Admins and up.
    PublishVm {
        /// What members' computers are to run.
        description: VmDescription,
        /// What it is in the clan.
        setup: VmSetup,
    },
}

/// What a device of a person may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A key made from a recovery phrase: adds and revokes the person's devices, nothing else. Its revocations go before
    /// those of all other devices of the person.
    Recovery,
    /// Whatever the person may.
    Device,
}

impl Body {
    /// A newcomer's admission, signed with the invite's secret for this clan and this person only.
    pub fn admission(invite_key: &SigningKey, clan: &ClanId, person: &PersonId, name: PersonName) -> Self {
        let signature = invite_key.sign(&admission_statement(clan, person));
        Self::Admission {
            invite: InviteId::from_bytes(invite_key.verifying_key().to_bytes()),
            name,
            proof: KeyProof::of(&signature),
        }
    }

    /// A new machine, by its own key for this clan, for the device `by` that adds it and with this WireGuard key only.
    pub fn enrol(machine_key: &SigningKey, clan: &ClanId, by: &AuthorId, name: MachineName, wg: WgPublicKey) -> Self {
        let machine = AuthorId::of(machine_key).machine();
        Self::Enrol { machine, name, wg, proof: KeyProof::of_machine(machine_key, clan, by, &wg) }
    }

    /// A new device, by its own key for this clan and for the device `by` that adds it only: nobody claims a key that
    /// they do not hold.
    pub fn add_device(
        device_key: &SigningKey,
        clan: &ClanId,
        by: &AuthorId,
        name: DeviceName,
        kind: DeviceKind,
    ) -> Self {
        let device = AuthorId::of(device_key).device();
        Self::AddDevice { device, name, kind, proof: KeyProof::of_device(device_key, clan, by) }
    }

    /// Whether the proof that it carries, if any, fits an entry of this author in this clan.
    pub(crate) fn is_proven(&self, clan: &ClanId, author: &AuthorId) -> bool {
        match self {
            Self::Admission { invite, proof, .. } => {
                proof.is_valid(invite.as_bytes(), &admission_statement(clan, &author.person()))
            }
            Self::AddDevice { device, proof, .. } => proof.is_valid(device.as_bytes(), &device_statement(clan, author)),
            Self::Enrol { machine, wg, proof, .. } => {
                proof.is_valid(machine.as_bytes(), &machine_statement(clan, author, wg))
            }
            _ => true,
        }
    }
}

fn admission_statement(clan: &ClanId, person: &PersonId) -> Vec<u8> {
    [ADMISSION_CONTEXT, clan.as_bytes().as_slice(), person.as_bytes().as_slice()].concat()
}

fn device_statement(clan: &ClanId, by: &AuthorId) -> Vec<u8> {
    [DEVICE_CONTEXT, clan.as_bytes().as_slice(), by.as_bytes().as_slice()].concat()
}

fn machine_statement(clan: &ClanId, by: &AuthorId, wg: &WgPublicKey) -> Vec<u8> {
    [MACHINE_CONTEXT, clan.as_bytes().as_slice(), by.as_bytes().as_slice(), wg.as_bytes().as_slice()].concat()
}

/// An Ed25519 signature that shows that a key was at hand: an invite's, a new device's, or a new machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyProof {
    r: [u8; 32],
    s: [u8; 32],
}

impl KeyProof {
    /// A new device's consent to be added by the device `by`: what it sends there.
    pub fn of_device(device_key: &SigningKey, clan: &ClanId, by: &AuthorId) -> Self {
        Self::of(&device_key.sign(&device_statement(clan, by)))
    }

    /// A new machine's consent to be added by the device `by`: what it sends to whoever signs that.
    pub fn of_machine(machine_key: &SigningKey, clan: &ClanId, by: &AuthorId, wg: &WgPublicKey) -> Self {
        Self::of(&machine_key.sign(&machine_statement(clan, by, wg)))
    }

    /// From its two halves, each 32 bytes.
    pub const fn from_halves([r, s]: [[u8; 32]; 2]) -> Self {
        Self { r, s }
    }

    /// Its two halves.
    pub const fn halves(&self) -> [[u8; 32]; 2] {
        [self.r, self.s]
    }

    fn of(signature: &Signature) -> Self {
        Self { r: *signature.r_bytes(), s: *signature.s_bytes() }
    }

    fn is_valid(&self, key: &[u8; 32], statement: &[u8]) -> bool {
        let signature = Signature::from_components(self.r, self.s);
        VerifyingKey::from_bytes(key).is_ok_and(|key| key.verify_strict(statement, &signature).is_ok())
    }
}

/// Names one entry of an author's log as the last that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastEntry {
    /// Its place in the log, from 0.
    pub seq: u64,
    /// Its id.
    pub id: EntryId,
}

/// The VM that members' computers are to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// What boots.
    pub image: ImageId,
    /// One line for people.
    pub title: Title,
    /// Memory of the VM.
    pub memory: ByteSize,
    /// Processors of the VM.
    pub cpus: u8,
    /// Largest size of its data disk.
    pub disk: ByteSize,
}

/// What a VM of a description is in the clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSetup {
    /// What carries its packets. One that this version of Clan does not know can stand here: whoever would run the VM refuses.
    pub network: NetworkLayer,
    /// Who is to steer it, as [`Body::SuggestControl`] says it; each newcomer decides for themselves.
    pub control: ControlMode,
    /// The applications in its image.
    pub applications: Applications,
}

/// Applications in an image: at most [`MAX_APPLICATIONS`], each once, in the order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Applications(BTreeSet<AppName>);

/// Most applications that a description names. With names of full length they leave room for the rest of an entry.
pub const MAX_APPLICATIONS: usize = 32;

/// More applications than a description can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a description names at most {MAX_APPLICATIONS} applications")]
pub struct TooManyApplications;

impl Applications {
    /// These.
    pub fn new(names: impl IntoIterator<Item = AppName>) -> Result<Self, TooManyApplications> {
        let mut set = BTreeSet::new();
        for name in names {
            set.insert(name);
            if set.len() > MAX_APPLICATIONS {
                return Err(TooManyApplications);
            }
        }
        Ok(Self(set))
    }

    /// In the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &AppName> {
        self.0.iter()
    }
}

impl<'de> Deserialize<'de> for Applications {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Vec::<AppName>::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// One line of text for people: at most 200 characters, none of them a control character.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Title(String);

/// Why a text is not a title.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TitleError {
    /// More than 200 characters.
    #[error("a title has at most {MAX_TITLE} characters")]
    TooLong,
    /// A line break or another control character.
    #[error("a title is one line without control characters")]
    ControlCharacter,
}

impl Title {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Title {
    type Err = TitleError;
    fn from_str(text: &str) -> Result<Self, TitleError> {
        if text.chars().take(MAX_TITLE + 1).count() > MAX_TITLE {
            return Err(TitleError::TooLong);
        }
        if text.chars().any(char::is_control) {
            return Err(TitleError::ControlCharacter);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Serialize for Title {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Title {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
