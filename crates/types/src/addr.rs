//! Addresses in the mesh. They certify themselves: whoever knows a clan and a machine key knows the address, and
//! nobody can claim the address of another key.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{ClanId, ClanName, MachineId, ServiceName, WgPublicKey};

/// The /48 that all machines of a clan share: `fd`, then the first 40 bits of the clan id (RFC 4193 unique local).
pub fn clan_prefix(clan: &ClanId) -> (Ipv6Addr, u8) {
    let mut octets = [0u8; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&clan.as_bytes()[..5]);
    (Ipv6Addr::from(octets), 48)
}

/// A machine's address: the clan's /48, then 80 bits of the BLAKE3 hash of the machine key.
pub fn mesh_address(clan: &ClanId, machine: &MachineId) -> Ipv6Addr {
    certified("clan 2026-11 mesh address v1", clan, machine.as_bytes())
}

/// The address of a standard WireGuard machine: the clan's /48, then 80 bits of the BLAKE3 hash of its WireGuard key.
/// No machine key leads to it.
pub fn peer_address(clan: &ClanId, peer: &WgPublicKey) -> Ipv6Addr {
    certified("clan 2026-11 peer address v1", clan, peer.as_bytes())
}

fn certified(context: &str, clan: &ClanId, key: &[u8; 32]) -> Ipv6Addr {
    let (prefix, _) = clan_prefix(clan);
    let mut octets = prefix.octets();
    let hash = blake3::derive_key(context, key);
    octets[6..].copy_from_slice(&hash[..10]);
    Ipv6Addr::from(octets)
}

/// The 100.64.0.0/10 (RFC 6598) that IPv4 addresses of machines come from.
pub const IPV4_PREFIX: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 64, 0, 0), 10);

/// The IPv4 addresses of a key, in order of preference, without end: the ledger gives it the first that nobody has.
/// None ends in 0 or 255, which some programs take for a network's own.
pub fn ipv4_candidates(clan: &ClanId, key: &[u8; 32]) -> impl Iterator<Item = Ipv4Addr> + use<> {
    let mut hasher = blake3::Hasher::new_derive_key("clan 2026-11 ipv4 address v1");
    hasher.update(clan.as_bytes()).update(key);
    let mut random = hasher.finalize_xof();
    let any = move || {
        let mut bytes = [0; 4];
        random.fill(&mut bytes);
        Ipv4Addr::from_bits(IPV4_PREFIX.0.to_bits() | (u32::from_le_bytes(bytes) & 0x003f_ffff))
    };
    std::iter::repeat_with(any).filter(|address| !matches!(address.octets()[3], 0 | 255))
}

/// A host on the base network: an IP address, or a DNS name of at most 253 characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Host(String);

/// The text names no host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a host: give an IP address, or a name such as relay.example.org")]
pub struct HostError(String);

impl Host {
    /// The text: lower case; an IPv6 address without brackets.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The address, if it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.0.parse().ok()
    }
}

impl FromStr for Host {
    type Err = HostError;
    fn from_str(text: &str) -> Result<Self, HostError> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(Self(ip.to_string()));
        }
        let lower = text.to_ascii_lowercase();
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // A last label of digits would be read as an IPv4 address by some (RFC 1123, 2.1).
        let numeric = lower.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
        if lower.len() > 253 || numeric || !lower.split('.').all(label) {
            return Err(HostError(text.chars().take(60).collect()));
        }
        Ok(Self(lower))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl Serialize for Host {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// The host name under which the base OS opens a service; browsers resolve `*.localhost` to loopback (RFC 6761).
pub fn service_url_host(service: &ServiceName, clan: &ClanName) -> String {
    format!("{service}.{clan}.localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_of_a_clan_share_a_prefix_and_nothing_else() {
        let clan = ClanId::from_bytes([1; 32]);
        let (a, b) = (
            mesh_address(&clan, &MachineId::from_bytes([2; 32])),
            mesh_address(&clan, &MachineId::from_bytes([3; 32])),
        );
        assert_eq!(a.octets()[..6], [0xfd, 1, 1, 1, 1, 1]);
        assert_eq!(a.octets()[..6], b.octets()[..6]);
        assert_ne!(a, b);
        let other = mesh_address(&ClanId::from_bytes([9; 32]), &MachineId::from_bytes([2; 32]));
        assert_ne!(a.octets()[..6], other.octets()[..6]);
    }

    #[test]
    fn ipv4_addresses_are_in_the_shared_space_and_end_like_hosts() {
        let clan = ClanId::from_bytes([1; 32]);
        for n in 0..50 {
            for address in ipv4_candidates(&clan, &[n; 32]).take(200) {
                let [a, b, _, d] = address.octets();
                assert!(a == 100 && (64..128).contains(&b) && d != 0 && d != 255, "{address}");
            }
        }
        let first = |n| ipv4_candidates(&clan, &[n; 32]).next();
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn a_peer_has_no_machines_address() {
        let clan = ClanId::from_bytes([1; 32]);
        let (peer, machine) = (WgPublicKey::from_bytes([2; 32]), MachineId::from_bytes([2; 32]));
        assert_ne!(peer_address(&clan, &peer), mesh_address(&clan, &machine));
        assert_eq!(peer_address(&clan, &peer).octets()[..6], mesh_address(&clan, &machine).octets()[..6]);
    }

    #[test]
    fn hosts_are_addresses_or_names() {
        for (text, host) in [
            ("Relay.Example.org", "relay.example.org"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("2001:DB8::1", "2001:db8::1"),
            ("203.0.113.7", "203.0.113.7"),
            ("nas", "nas"),
        ] {
            let parsed: Host = text.parse().unwrap();
            assert_eq!(parsed.as_str(), host);
            assert_eq!(parsed.as_str().parse::<Host>().unwrap(), parsed);
        }
        let long = "a.".repeat(130) + "b";
        for text in ["", ".", "a..b", "-a.b", "a b", "1.2.3.4.5", "1.2.3", "a:80", "https://a", "ä.de", long.as_str()]
        {
            assert!(text.parse::<Host>().is_err(), "{text}");
        }
    }
}
