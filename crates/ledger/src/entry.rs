//! One signed entry of an author's log.

use std::{fmt, sync::Arc};

use clan_types::{ClanId, DeviceId, EntryId, Hlc, MachineId, PersonId, Timestamp};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::Body;

/// INVARIANT: no encoded entry is longer than this; longer input is refused before it is parsed. Bytes.
pub const MAX_ENTRY: usize = 4096;
const SIGNATURE: usize = 64;
const VERSION: u8 = 1;
const CONTEXT: &[u8] = b"clan 2026-11 ledger entry v1";
/// Wall times from here on (the year 10889) are refused, so that arithmetic on times never saturates.
const END_OF_TIME: Timestamp = Timestamp::from_millis(1 << 48);

/// The key that signs a log: a person's device's or a machine's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AuthorId([u8; 32]);

impl AuthorId {
    /// Comes before all others.
    pub(crate) const LEAST: Self = Self([0; 32]);

    /// Wraps a public key.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The author that signs with this key.
    pub fn of(key: &SigningKey) -> Self {
        Self(key.verifying_key().to_bytes())
    }

    /// The author as a person: right for a person's first device only, see [`crate::State::person_of`].
    pub const fn person(&self) -> PersonId {
        PersonId::from_bytes(self.0)
    }

    /// The author as a device.
    pub const fn device(&self) -> DeviceId {
        DeviceId::from_bytes(self.0)
    }

    /// The author as a machine.
    pub const fn machine(&self) -> MachineId {
        MachineId::from_bytes(self.0)
    }
}

impl From<PersonId> for AuthorId {
    fn from(id: PersonId) -> Self {
        Self(*id.as_bytes())
    }
}

impl From<DeviceId> for AuthorId {
    fn from(id: DeviceId) -> Self {
        Self(*id.as_bytes())
    }
}

impl From<MachineId> for AuthorId {
    fn from(id: MachineId) -> Self {
        Self(*id.as_bytes())
    }
}

impl fmt::Display for AuthorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.person().fmt(f)
    }
}

impl fmt::Debug for AuthorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorId({})", self.person().short())
    }
}

/// Why bytes are not an entry, or an entry cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// Longer than [`MAX_ENTRY`].
    #[error("the entry is longer than {MAX_ENTRY} bytes")]
    TooLong,
    /// Not the encoding of an entry, or not its only encoding.
    #[error("the bytes are not a ledger entry")]
    Malformed,
    /// Made by a newer program.
    #[error("the entry was made by a newer version of Clan (entry version {0})")]
    NewerVersion(u8),
    /// The signature does not fit the author and the content.
    #[error("the entry's signature does not fit")]
    BadSignature,
    /// The invite's key did not sign this admission, or the new device's or machine's key not its addition.
    #[error("the proof of having the invite's, the device's or the machine's key does not fit")]
    BadProof,
    /// `Found` and `Admission` stand at the start of a log and nothing else does without them; every later entry names
    /// its predecessor.
    #[error("the entry does not fit its place in the log")]
    Misplaced,
    /// The time is not one that a clock can show.
    #[error("the entry's time is out of range")]
    TimeOutOfRange,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    /// The clan that the entry belongs to; `None` in its founding entry only.
    clan: Option<ClanId>,
    author: AuthorId,
    seq: u64,
    prev: Option<EntryId>,
    time: Hlc,
    body: Body,
}

/// One signed entry.
///
/// INVARIANT: a value of this type has a valid signature, and its encoding is the only one it has.
#[derive(Clone)]
pub struct Entry(Arc<Inner>);

struct Inner {
    content: Content,
    id: EntryId,
    encoded: Box<[u8]>,
}

impl Entry {
    /// Signs an entry. `clan` is `None` for [`Body::Found`] and only for it.
    pub fn sign(
        key: &SigningKey,
        clan: Option<&ClanId>,
        seq: u64,
        prev: Option<EntryId>,
        time: Hlc,
        body: Body,
    ) -> Result<Self, EntryError> {
        let content = Content { clan: clan.copied(), author: AuthorId::of(key), seq, prev, time, body };
        content.check()?;
        let mut encoded = content.encode()?;
        let signature = key.sign(&statement(&encoded));
        encoded.extend_from_slice(&signature.to_bytes());
        if encoded.len() > MAX_ENTRY {
            return Err(EntryError::TooLong);
        }
        Ok(Self::new(content, &encoded))
    }

    /// Reads an entry from a peer, a guest or a file, and checks its signature.
    pub fn decode(bytes: &[u8]) -> Result<Self, EntryError> {
        if bytes.len() > MAX_ENTRY {
            return Err(EntryError::TooLong);
        }
        let (signed, signature) =
            bytes.split_at_checked(bytes.len().wrapping_sub(SIGNATURE)).ok_or(EntryError::Malformed)?;
        let content = match signed {
            [VERSION, content @ ..] => postcard::from_bytes::<Content>(content).map_err(|_| EntryError::Malformed)?,
            [newer, ..] if *newer > VERSION => return Err(EntryError::NewerVersion(*newer)),
            _ => return Err(EntryError::Malformed),
        };
        // INVARIANT: one entry has one encoding, so that one entry has one id.
        if content.encode()? != signed {
            return Err(EntryError::Malformed);
        }
        let key = VerifyingKey::from_bytes(content.author.as_bytes()).map_err(|_| EntryError::BadSignature)?;
        let signature = Signature::from_slice(signature).map_err(|_| EntryError::BadSignature)?;
        key.verify_strict(&statement(signed), &signature).map_err(|_| EntryError::BadSignature)?;
        content.check()?;
        Ok(Self::new(content, bytes))
    }

    /// Reads an entry that was checked before, by [`Entry::decode`] or in [`Entry::sign`], and whose id it then had. The
    /// caller vouches for that, as by a seal that only it can make: neither signature nor id is checked again.
    pub fn decode_vouched(bytes: &[u8], id: EntryId) -> Result<Self, EntryError> {
        let (signed, _) = bytes.split_at_checked(bytes.len().wrapping_sub(SIGNATURE)).ok_or(EntryError::Malformed)?;
        match signed {
            [VERSION, content @ ..] if bytes.len() <= MAX_ENTRY => {
                let content = postcard::from_bytes(content).map_err(|_| EntryError::Malformed)?;
                Ok(Self(Arc::new(Inner { content, id, encoded: bytes.into() })))
            }
            [newer, ..] if *newer > VERSION => Err(EntryError::NewerVersion(*newer)),
            _ => Err(EntryError::Malformed),
        }
    }

    fn new(content: Content, encoded: &[u8]) -> Self {
        let id = EntryId::from_bytes(*blake3::hash(encoded).as_bytes());
        Self(Arc::new(Inner { content, id, encoded: encoded.into() }))
    }

    /// The encoding, signature included.
    pub fn encode(&self) -> Vec<u8> {
        self.0.encoded.to_vec()
    }

    /// The encoding, signature included, without a copy.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.encoded
    }

    /// The hash of the encoding.
    pub fn id(&self) -> EntryId {
        self.0.id
    }

    /// The clan that the entry belongs to.
    pub fn clan(&self) -> ClanId {
        self.0.content.clan.unwrap_or(ClanId::from_bytes(*self.0.id.as_bytes()))
    }

    /// Who signed it.
    pub fn author(&self) -> AuthorId {
        self.0.content.author
    }

    /// Its place in the author's log, from 0.
    pub fn seq(&self) -> u64 {
        self.0.content.seq
    }

    /// The entry before it in the author's log.
    pub fn prev(&self) -> Option<EntryId> {
        self.0.content.prev
    }

    /// When its author says it was made.
    pub fn time(&self) -> Hlc {
        self.0.content.time
    }

    /// What it says.
    pub fn body(&self) -> &Body {
        &self.0.content.body
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.encoded == other.0.encoded
    }
}

impl Eq for Entry {}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Content { author, seq, time, body, .. } = &self.0.content;
        write!(f, "{:?} {author:?}#{seq} @{time:?} {body:?}", self.0.id)
    }
}

impl Content {
    fn encode(&self) -> Result<Vec<u8>, EntryError> {
        // Plain data of bounded size: this fails only without memory.
        postcard::to_extend(self, vec![VERSION]).map_err(|_| EntryError::Malformed)
    }

    fn check(&self) -> Result<(), EntryError> {
        if self.time.wall >= END_OF_TIME {
            return Err(EntryError::TimeOutOfRange);
        }
        let founds = matches!(self.body, Body::Found { .. });
        let begins = founds || matches!(self.body, Body::Admission { .. });
        let placed = self.prev.is_some() == (self.seq > 0)
            && founds == self.clan.is_none()
            && (!begins || self.seq == 0)
            && self.seq < 1 << 48;
        if !placed {
            return Err(EntryError::Misplaced);
        }
        if self.clan.is_some_and(|clan| !self.body.is_proven(&clan, &self.author)) {
            return Err(EntryError::BadProof);
        }
        Ok(())
    }
}

fn statement(encoded_content: &[u8]) -> Vec<u8> {
    [CONTEXT, encoded_content].concat()
}
