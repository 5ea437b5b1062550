//! Beacons: a machine's own signed, short-lived statement. Not in the ledger; the latest one counts.

use std::{net::SocketAddr, time::Duration};

use clan_types::{CertificateHash, ClanId, ControlMode, ImageId, MachineId, ServiceName, Timestamp};
use ed25519_dalek::{Signature, Signer, SigningKey, Verifier, VerifyingKey};
use serde::{Deserialize, Serialize};

/// A beacon is believed for this long after it was made.
pub const LIFETIME: Duration = Duration::from_secs(90);
/// A machine makes a new beacon at least this often.
pub const INTERVAL: Duration = Duration::from_secs(20);

const MAX_BODY: usize = 16 << 10;
const MAX_ADDRS: usize = 32;
const MAX_SERVICES: usize = 128;

/// What a machine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beacon {
    /// In which clan.
    pub clan: ClanId,
    /// Which machine; it signs.
    pub machine: MachineId,
    /// When it was made, by the machine's own clock; a later one replaces an earlier one.
    pub made: Timestamp,
    /// Program version.
    pub version: String,
    /// Where its QUIC endpoint may be reached.
    pub quic: Vec<SocketAddr>,
    /// Where its WireGuard socket may be reached.
    pub wireguard: Vec<SocketAddr>,
    /// What it offers.
    pub services: Vec<ServiceOffer>,
    /// The image it runs, and serves to others.
    pub image: Option<ImageId>,
    /// The certificate that it would show as a relay.
    pub certificate: Option<CertificateHash>,
    /// Who may steer it.
    pub control: ControlMode,
}

/// A service that a machine offers to its clan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceOffer {
    /// Name, unique per machine.
    pub name: ServiceName,
    /// One line for people.
    pub title: String,
    /// How it is spoken to.
    pub kind: ServiceKind,
    /// TCP port on the machine's mesh address.
    pub port: u16,
    /// Whether its last health check succeeded.
    pub healthy: bool,
}

/// How a service is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ServiceKind {
    /// HTTP/1.1: it can be opened in a browser.
    Http,
    /// Any other TCP protocol.
    Tcp,
}

/// A beacon and its machine's signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedBeacon {
    body: Vec<u8>,
    signature: Vec<u8>,
}

/// Why a beacon does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BeaconError {
    /// Too large, or not a beacon.
    #[error("malformed beacon")]
    Malformed,
    /// Not signed by the machine it speaks for.
    #[error("beacon with a wrong signature")]
    BadSignature,
}

const CONTEXT: &[u8] = b"clan beacon v1";

impl SignedBeacon {
    /// Signs a beacon with its machine's key.
    pub fn sign(beacon: &Beacon, key: &SigningKey) -> Result<Self, BeaconError> {
        let body = postcard::to_allocvec(beacon).map_err(|_| BeaconError::Malformed)?;
        let signature = key.sign(&[CONTEXT, &body].concat()).to_bytes().to_vec();
        Ok(Self { body, signature })
    }

    /// The beacon, if it is well-formed and its machine signed it.
    pub fn open(&self) -> Result<Beacon, BeaconError> {
        if self.body.len() > MAX_BODY {
            return Err(BeaconError::Malformed);
        }
        let beacon: Beacon = crate::codec::decode(&self.body).map_err(|_| BeaconError::Malformed)?;
        let fits = beacon.quic.len() <= MAX_ADDRS
            && beacon.wireguard.len() <= MAX_ADDRS
            && beacon.services.len() <= MAX_SERVICES
            && beacon.version.len() <= 64
            && beacon.services.iter().all(|s| s.title.len() <= 200);
        if !fits {
            return Err(BeaconError::Malformed);
        }
        let key = VerifyingKey::from_bytes(beacon.machine.as_bytes()).map_err(|_| BeaconError::BadSignature)?;
        let signature = Signature::from_slice(&self.signature).map_err(|_| BeaconError::BadSignature)?;
        key.verify(&[CONTEXT, &self.body].concat(), &signature).map_err(|_| BeaconError::BadSignature)?;
        Ok(beacon)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beacon_counts_only_with_its_machines_signature() {
        let key = SigningKey::from_bytes(&[5; 32]);
        let beacon = Beacon {
            clan: ClanId::from_bytes([1; 32]),
            machine: MachineId::from_bytes(key.verifying_key().to_bytes()),
            made: Timestamp::from_millis(1),
            version: "0.1.0".into(),
            quic: vec![],
            wireguard: vec![],
            services: vec![],
            image: None,
            certificate: None,
            control: ControlMode::Shared,
        };
        let signed = SignedBeacon::sign(&beacon, &key).unwrap();
        assert_eq!(signed.open(), Ok(beacon.clone()));
        let forged = SignedBeacon::sign(&beacon, &SigningKey::from_bytes(&[6; 32])).unwrap();
        assert_eq!(forged.open(), Err(BeaconError::BadSignature));
        for at in 0..signed.body.len() {
            let mut changed = signed.clone();
            changed.body[at] ^= 1;
            assert!(changed.open().is_err(), "bit flipped at {at}");
        }
    }
}
