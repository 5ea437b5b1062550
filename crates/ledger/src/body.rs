//! What an entry says.

use std::{fmt, str::FromStr};

use clan_types::{
    ByteSize, ClanId, ClanName, EntryId, ImageId, InviteId, MachineId, MachineName, PersonId, PersonName, Role,
    Timestamp, WgPublicKey,
};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

const ADMISSION_CONTEXT: &[u8] = b"clan 2026-11 admission v1";
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
    /// Adds one of the author's own machines. Members and up.
    Enrol {
        /// The machine's key. The first enrolment of a key counts.
        machine: MachineId,
        /// Its name, unique in the clan.
        name: MachineName,
        /// Its WireGuard key, unique in the clan.
        wg: WgPublicKey,
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
    },
    /// A newcomer's first entry: asks to be in. Counts once it is countersigned.
    Admission {
        /// The invite that is redeemed.
        invite: InviteId,
        /// The newcomer's name, unique in the clan.
        name: PersonName,
        /// Shows that the newcomer held the invite's secret. See [`Body::admission`].
        proof: AdmissionProof,
    },
    /// A machine in good standing has seen an admission; the time of this entry is when.
    Countersign {
        /// The admission.
        admission: EntryId,
    },
    /// Puts a VM description in force. Admins and up.
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
}

impl Body {
    /// A newcomer's admission, signed with the invite's secret for this clan and this person only.
    pub fn admission(invite_key: &SigningKey, clan: &ClanId, person: &PersonId, name: PersonName) -> Self {
        let signature = invite_key.sign(&admission_statement(clan, person));
        Self::Admission {
            invite: InviteId::from_bytes(invite_key.verifying_key().to_bytes()),
            name,
            proof: AdmissionProof { r: *signature.r_bytes(), s: *signature.s_bytes() },
        }
    }
}

fn admission_statement(clan: &ClanId, person: &PersonId) -> Vec<u8> {
    [ADMISSION_CONTEXT, clan.as_bytes().as_slice(), person.as_bytes().as_slice()].concat()
}

/// An Ed25519 signature by an invite's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmissionProof {
    r: [u8; 32],
    s: [u8; 32],
}

impl AdmissionProof {
    pub(crate) fn is_valid(&self, invite: &InviteId, clan: &ClanId, person: &PersonId) -> bool {
        let signature = Signature::from_components(self.r, self.s);
        VerifyingKey::from_bytes(invite.as_bytes())
            .is_ok_and(|key| key.verify_strict(&admission_statement(clan, person), &signature).is_ok())
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
