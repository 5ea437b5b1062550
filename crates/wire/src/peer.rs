//! What machines of a clan, and newcomers, say over QUIC. One ALPN per conversation.

use clan_types::{ClanId, DeviceId, FileHash, ImageId, InviteId, MachineId, PeerAddr};
use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use serde::{Deserialize, Serialize};

/// Machine to machine: one bi-directional stream of [`PeerMessage`] (ledger and beacons), datagrams (WireGuard packets).
pub const ALPN_PEER: &[u8] = b"clan/peer/1";
/// Newcomer to machine: one [`JoinRequest`] and one [`JoinResponse`] a stream; where the answer says so, [`EntryPage`]s.
pub const ALPN_JOIN: &[u8] = b"clan/join/2";
/// Anyone entitled to machine: one [`ImageRequest`], one [`ImageResponse`], then raw bytes, a stream.
pub const ALPN_IMAGE: &[u8] = b"clan/image/2";

/// Largest message on any of these streams but those of images.
pub const MAX_MESSAGE: usize = 4 << 20;
/// Largest [`ImageRequest`] and [`ImageResponse`]: anybody may ask, and is listened to before it is known who they are.
pub const MAX_IMAGE_MESSAGE: usize = 1 << 10;
/// Largest [`JoinRequest`]: a stranger's, too, is read before it is known who asks.
pub const MAX_JOIN_REQUEST: usize = 512 << 10;
/// Most authors that a [`JoinRequest`] may say something of: more would not go into it.
const MAX_HAVE: usize = 10_000;
/// Most entries in one message.
pub const MAX_ENTRIES: usize = 10_000;
/// So many bytes of entries make a page full.
pub const PAGE_BYTES: usize = 512 << 10;
/// Largest page: one entry over, and what encoding adds.
pub const MAX_PAGE: usize = PAGE_BYTES + (64 << 10);

/// A signed ledger entry in its own encoding; opaque here, checked by the ledger.
pub type EncodedEntry = Vec<u8>;

/// Part of a ledger of any size: pages follow each other on a stream until one says that it is the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryPage {
    /// Entries, each author's in order.
    pub entries: Vec<EncodedEntry>,
    /// Whether another page follows.
    pub more: bool,
}

/// The next sequence number that the sender lacks, by author key.
pub type Vector = Vec<([u8; 32], u64)>;

/// On the `clan/peer/1` stream, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// First message of each side.
    Hello {
        /// The clan that both must share.
        clan: ClanId,
        /// What the sender has.
        vector: Vector,
    },
    /// Entries that the receiver lacks, in an order in which each author's chain is contiguous.
    Entries(Vec<EncodedEntry>),
    /// What the sender has now; answered with what it lacks.
    Vector(Vector),
    /// A [`crate::beacon::SignedBeacon`], the sender's own or another machine's.
    Beacon(crate::beacon::SignedBeacon),
    /// Like [`PeerMessage::Entries`], and there are more: who has taken them asks for those by a
    /// [`PeerMessage::Vector`].
    EntriesAndMore(Vec<EncodedEntry>),
    /// The hash of what the sender has now ([`digest`]), which mostly is what the receiver has; if not, it is answered by
    /// [`PeerMessage::Differs`].
    Digest([u8; 32]),
    /// The receiver may send its [`PeerMessage::Vector`].
    Differs,
}

/// What a newcomer says in a [`JoinRequest`] that it has: nothing if that would be too long, and all is sent again.
pub fn have(vector: Vector) -> Vector {
    if vector.len() > MAX_HAVE { Vec::new() } else { vector }
}

/// A hash of what somebody has.
pub fn digest(vector: &[([u8; 32], u64)]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("clan 2026-11 vector digest v1");
    for (key, value) in vector {
        hasher.update(key).update(&value.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Shows that the connecting endpoint holds an invite's secret, without sending it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteProof {
    /// The invite.
    pub invite: InviteId,
    /// Ed25519 signature by the invite key over the clan and the connecting endpoint; 64 bytes.
    pub signature: Vec<u8>,
}

impl InviteProof {
    /// Proves the invite whose secret is `invite_key`, for the connection that `endpoint` makes.
    pub fn new(invite_key: &SigningKey, clan: &ClanId, endpoint: &MachineId) -> Self {
        let signature = invite_key.sign(&Self::statement(clan, endpoint)).to_bytes().to_vec();
        Self { invite: InviteId::from_bytes(invite_key.verifying_key().to_bytes()), signature }
    }

    /// Whether the proof was made for this clan by the endpoint that presents it.
    pub fn is_valid(&self, clan: &ClanId, endpoint: &MachineId) -> bool {
        let (Ok(key), Ok(signature)) =
            (VerifyingKey::from_bytes(self.invite.as_bytes()), Signature::from_slice(&self.signature))
        else {
            return false;
        };
        key.verify(&Self::statement(clan, endpoint), &signature).is_ok()
    }

    fn statement(clan: &ClanId, endpoint: &MachineId) -> Vec<u8> {
        [b"clan invite proof v1".as_slice(), clan.as_bytes(), endpoint.as_bytes()].concat()
    }
}

/// Shows to one machine that the connecting endpoint holds a device's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProof {
    /// The device.
    pub device: DeviceId,
    /// Ed25519 signature by it over the machine that is asked and the connecting endpoint; 64 bytes.
    pub signature: Vec<u8>,
}

impl DeviceProof {
    /// Proves the device to `machine`, for the connection that `endpoint` makes.
    pub fn new(key: &SigningKey, machine: &MachineId, endpoint: &MachineId) -> Self {
        let signature = key.sign(&Self::statement(machine, endpoint)).to_bytes().to_vec();
        Self { device: DeviceId::from_bytes(key.verifying_key().to_bytes()), signature }
    }

    /// Whether the proof was made for this machine by the endpoint that presents it.
    pub fn is_valid(&self, machine: &MachineId, endpoint: &MachineId) -> bool {
        let (Ok(key), Ok(signature)) =
            (VerifyingKey::from_bytes(self.device.as_bytes()), Signature::from_slice(&self.signature))
        else {
            return false;
        };
        key.verify_strict(&Self::statement(machine, endpoint), &signature).is_ok()
    }

    fn statement(machine: &MachineId, endpoint: &MachineId) -> Vec<u8> {
        [b"clan device proof v1".as_slice(), machine.as_bytes(), endpoint.as_bytes()].concat()
    }
}

/// On a `clan/join/1` stream, from the newcomer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinRequest {
    /// Asks what the invite leads to.
    Preview {
        /// Right to know.
        proof: InviteProof,
        /// What the newcomer has of the ledger already, as after a connection that broke.
        have: Vector,
    },
    /// Asks to be admitted.
    Redeem {
        /// The newcomer's log: their admission, then the enrolment of their machine. Or entries of a device of
        /// somebody who is in: further devices, and machines.
        entries: Vec<EncodedEntry>,
        /// What the newcomer has of the ledger already.
        have: Vector,
    },
    /// Asks a machine of an unknown clan whether somebody there has this device, as whoever has but a recovery phrase does.
    /// Answered by [`JoinResponse::Preview`].
    Locate {
        /// Right to know.
        proof: DeviceProof,
        /// What the asker has of the ledger already.
        have: Vector,
    },
    /// The machine was admitted, and goes on as one of the clan on this connection: what follows on the stream is what is
    /// said on a `clan/peer/1` stream. Not answered otherwise.
    Stay,
}

/// Answer to a [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinResponse {
    /// The clan's ledger, which the newcomer checks for themselves: what they lack of it follows in [`EntryPage`]s.
    Preview,
    /// The newcomer is in. What they lack of the ledger follows in [`EntryPage`]s, the countersignature included.
    Admitted {
        /// Other machines, and where they are: whoever admits somebody may be put out a moment later.
        peers: Vec<PeerAddr>,
    },
    /// No, and why.
    Refused(JoinRefusal),
}

/// Why a newcomer is not admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum JoinRefusal {
    /// No such invite in the ledger, or the proof does not fit.
    #[error("the clan does not know this invite")]
    UnknownInvite,
    /// All its uses are used.
    #[error("this invite has been used already")]
    Used,
    /// Its time is over.
    #[error("this invite has expired")]
    Expired,
    /// It, or the person who made it, was revoked.
    #[error("this invite was withdrawn")]
    Revoked,
    /// Somebody in the clan has the name already.
    #[error("the name `{name}` is taken in this clan")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The newcomer's clock is too far ahead.
    #[error("this computer's clock is ahead of the clan's by more than ten minutes")]
    ClockAhead,
    /// The entries do not form a valid admission.
    #[error("the request to join was malformed")]
    Malformed,
    /// The machine could not answer just now.
    #[error("the machine that was asked is not ready")]
    NotReady,
    /// An admin has yet to let the newcomer in. To be asked again.
    #[error("an admin of the clan has yet to approve the request to join")]
    Pending,
    /// An admin has refused the newcomer.
    #[error("an admin of the clan has denied the request to join")]
    Denied,
}

/// On a `clan/image/2` stream, from the one who fetches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// Right to fetch, for endpoints that are not machines of the clan.
    pub proof: Option<InviteProof>,
    /// What to fetch.
    pub what: ImagePart,
}

/// What can be fetched of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImagePart {
    /// The manifest, whose hash is the image's id.
    Manifest(ImageId),
    /// The list of a file's pieces ([`crate::pieces::Pieces`]).
    Pieces(FileHash),
    /// One piece of a file.
    Piece {
        /// Of which file.
        file: FileHash,
        /// Which, from 0.
        index: u32,
    },
}

/// Answer to an [`ImageRequest`]; after [`ImageResponse::Bytes`] follow so many raw bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageResponse {
    /// So many bytes follow.
    Bytes(u64),
    /// Not here.
    NotFound,
    /// Not for this endpoint.
    Denied,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_proved_to_one_machine_by_one_endpoint() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let (machine, endpoint) = (MachineId::from_bytes([1; 32]), MachineId::from_bytes([2; 32]));
        let proof = DeviceProof::new(&key, &machine, &endpoint);
        assert!(proof.is_valid(&machine, &endpoint));
        assert!(!proof.is_valid(&endpoint, &machine), "whom it was shown cannot show it on");
        assert!(!proof.is_valid(&machine, &MachineId::from_bytes([9; 32])));
        assert!(!DeviceProof { device: DeviceId::from_bytes([7; 32]), ..proof }.is_valid(&machine, &endpoint));
    }

    #[test]
    fn whatever_may_be_asked_of_an_image_has_room() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let proof = InviteProof::new(&key, &ClanId::from_bytes([1; 32]), &MachineId::from_bytes([2; 32]));
        let what = ImagePart::Piece { file: FileHash::from_bytes([9; 32]), index: u32::MAX };
        let request = ImageRequest { proof: Some(proof), what };
        assert!(crate::codec::encode(&request, MAX_IMAGE_MESSAGE).is_ok());
        assert!(crate::codec::encode(&ImageResponse::Bytes(u64::MAX), MAX_IMAGE_MESSAGE).is_ok());
    }

    #[test]
    fn what_a_newcomer_says_that_it_has_fits_into_its_question() {
        let clan_of = |authors: usize| have(vec![([0xff; 32], u64::MAX); authors]);
        let proof = InviteProof { invite: InviteId::from_bytes([1; 32]), signature: vec![0xff; 64] };
        let largest = JoinRequest::Preview { proof, have: clan_of(MAX_HAVE) };
        assert!(crate::codec::encode(&largest, MAX_JOIN_REQUEST).is_ok());
        assert_eq!(clan_of(MAX_HAVE).len(), MAX_HAVE);
        assert!(clan_of(MAX_HAVE + 1).is_empty(), "all is sent again, instead of a question that nobody reads");
    }

    #[test]
    fn a_proof_holds_for_its_clan_and_its_endpoint_only() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let (clan, endpoint) = (ClanId::from_bytes([1; 32]), MachineId::from_bytes([2; 32]));
        let proof = InviteProof::new(&key, &clan, &endpoint);
        assert!(proof.is_valid(&clan, &endpoint));
        assert!(!proof.is_valid(&ClanId::from_bytes([9; 32]), &endpoint));
        assert!(
            !proof.is_valid(&clan, &MachineId::from_bytes([9; 32])),
            "a proof cannot be replayed by another endpoint"
        );
        assert!(!InviteProof { signature: vec![0; 63], ..proof }.is_valid(&clan, &endpoint));
    }
}
