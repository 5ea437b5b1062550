//! The probe's bytes.
//!
//! ```text
//! 0      magic 0xC1 (WireGuard packets start with 1, 2, 3 or 4)
//! 1      version 1
//! 2      kind: 1 request, 2 answer, 3 confirmation
//! 3      which network the sender is in: another number than before means that it has moved
//! 4..12  tag of the pair of machines: says which key to check with, and nothing to others
//! 12..28 nonce of the sender; 0 in a confirmation
//! 28..44 nonce that is answered; 0 in a request
//! 44..60 address from which the answered probe came (IPv4 as mapped IPv6); 0 in a request
//! 60..62 its port, big endian
//! 62..64 0
//! 64..80 MAC: BLAKE3 keyed with the pair's key over the bytes before, sender and receiver
//! ```
//!
//! Every probe has the same length, and each brings about at most one other, so nobody can use a machine to amplify
//! traffic.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use clan_types::MachineId;
use zeroize::Zeroizing;

/// The length of every probe, in bytes.
pub const PROBE_LEN: usize = 80;

const MAGIC: u8 = 0xc1;
const VERSION: u8 = 1;
const MACED: usize = 64;

/// Whether a datagram is meant as a probe, so that it must not be handed to WireGuard. Says nothing about authenticity.
pub fn is_probe(bytes: &[u8]) -> bool {
    bytes.first() == Some(&MAGIC)
}

/// The key that two machines share for their probes.
#[derive(Clone, PartialEq, Eq)]
pub struct ProbeKey(Zeroizing<[u8; 32]>);

impl ProbeKey {
    /// Derives the key from the X25519 shared secret of both machines' WireGuard keys.
    pub fn derive(shared_secret: &[u8; 32]) -> Self {
        Self(Zeroizing::new(blake3::derive_key("clan 2026-11 path probe v1", shared_secret)))
    }

    /// What identifies the pair on the wire.
    pub(crate) fn tag(&self) -> [u8; 8] {
        let mut tag = [0; 8];
        tag.copy_from_slice(&blake3::derive_key("clan 2026-11 path probe tag v1", &*self.0)[..8]);
        tag
    }

    fn mac(&self, maced: &[u8], from: &MachineId, to: &MachineId) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // INVARIANT: sender and receiver are part of the MAC, so a probe that is reflected to its sender is not valid.
        hasher.update(maced).update(from.as_bytes()).update(to.as_bytes());
        hasher.finalize()
    }
}

impl fmt::Debug for ProbeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProbeKey(…)")
    }
}

pub(crate) type Nonce = [u8; 16];

/// What a probe says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    /// Are you there?
    Request { nonce: Nonce },
    /// Yes; and are you?
    Answer { nonce: Nonce, echo: Nonce, observed: SocketAddr },
    /// Yes.
    Confirm { echo: Nonce, observed: SocketAddr },
}

/// The pair's tag, if the bytes have the form of a probe.
pub(crate) fn tag_of(bytes: &[u8]) -> Option<[u8; 8]> {
    let well_formed = bytes.len() == PROBE_LEN && bytes[0] == MAGIC && bytes[1] == VERSION;
    well_formed.then(|| bytes[4..12].try_into().ok()).flatten()
}

/// The network that the sender of a probe is in; to be believed once the probe was decoded.
pub(crate) fn network_of(bytes: &[u8]) -> u8 {
    bytes.get(3).copied().unwrap_or_default()
}

impl Probe {
    pub(crate) fn encode(&self, key: &ProbeKey, from: &MachineId, to: &MachineId, network: u8) -> Vec<u8> {
        let (kind, nonce, echo, observed) = match self {
            Self::Request { nonce } => (1, *nonce, [0; 16], None),
            Self::Answer { nonce, echo, observed } => (2, *nonce, *echo, Some(observed)),
            Self::Confirm { echo, observed } => (3, [0; 16], *echo, Some(observed)),
        };
        let mut bytes = vec![0; PROBE_LEN];
        bytes[..4].copy_from_slice(&[MAGIC, VERSION, kind, network]);
        bytes[4..12].copy_from_slice(&key.tag());
        bytes[12..28].copy_from_slice(&nonce);
        bytes[28..44].copy_from_slice(&echo);
        if let Some(observed) = observed {
            let ip = match observed.ip() {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            bytes[44..60].copy_from_slice(&ip.octets());
            bytes[60..62].copy_from_slice(&observed.port().to_be_bytes());
        }
        let mac = key.mac(&bytes[..MACED], from, to);
        bytes[MACED..].copy_from_slice(&mac.as_bytes()[..PROBE_LEN - MACED]);
        bytes
    }

    /// Reads a probe whose form [`tag_of`] has accepted; `None` unless it is authentic.
    pub(crate) fn decode(bytes: &[u8], key: &ProbeKey, from: &MachineId, to: &MachineId) -> Option<Self> {
        let (maced, mac) = bytes.split_at_checked(MACED)?;
        let expected = key.mac(maced, from, to);
        let differs = expected.as_bytes().iter().zip(mac).fold(0, |differs, (a, b)| differs | (a ^ b));
        if differs != 0 || mac.len() != PROBE_LEN - MACED {
            return None;
        }
        let nonce: Nonce = maced[12..28].try_into().ok()?;
        let echo: Nonce = maced[28..44].try_into().ok()?;
        let ip: [u8; 16] = maced[44..60].try_into().ok()?;
        let port = u16::from_be_bytes([maced[60], maced[61]]);
        let observed = SocketAddr::new(IpAddr::V6(Ipv6Addr::from(ip)).to_canonical(), port);
        match maced[2] {
            1 => Some(Self::Request { nonce }),
            2 => Some(Self::Answer { nonce, echo, observed }),
            3 => Some(Self::Confirm { echo, observed }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: MachineId = MachineId::from_bytes([1; 32]);
    const B: MachineId = MachineId::from_bytes([2; 32]);

    fn key() -> ProbeKey {
        ProbeKey::derive(&[7; 32])
    }

    #[test]
    fn probes_round_trip_and_have_one_length() {
        for observed in ["192.0.2.1:9", "[2001:db8::1]:65535"] {
            let observed = observed.parse().unwrap();
            for probe in [
                Probe::Request { nonce: [1; 16] },
                Probe::Answer { nonce: [1; 16], echo: [2; 16], observed },
                Probe::Confirm { echo: [2; 16], observed },
            ] {
                let bytes = probe.encode(&key(), &A, &B, 7);
                assert_eq!(bytes.len(), PROBE_LEN);
                assert!(is_probe(&bytes));
                assert_eq!(tag_of(&bytes), Some(key().tag()));
                assert_eq!(Probe::decode(&bytes, &key(), &A, &B), Some(probe));
            }
        }
    }

    #[test]
    fn a_reflected_probe_is_not_authentic() {
        let bytes = Probe::Request { nonce: [1; 16] }.encode(&key(), &A, &B, 7);
        assert_eq!(Probe::decode(&bytes, &key(), &B, &A), None);
    }

    #[test]
    fn wireguard_packets_are_not_probes() {
        for kind in 1..=4u8 {
            assert!(!is_probe(&[kind, 0, 0, 0]));
        }
    }

    proptest! {
        #[test]
        fn a_changed_byte_is_noticed(at in 0..PROBE_LEN, by in 1u8..) {
            let mut bytes = Probe::Request { nonce: [1; 16] }.encode(&key(), &A, &B, 7);
            bytes[at] ^= by;
            prop_assert!(tag_of(&bytes) != Some(key().tag()) || Probe::decode(&bytes, &key(), &A, &B).is_none());
        }

        #[test]
        fn decoding_anything_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = tag_of(&bytes);
            prop_assert_eq!(Probe::decode(&bytes, &key(), &A, &B), None);
        }
    }
}
