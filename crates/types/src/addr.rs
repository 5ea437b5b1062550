//! Addresses in the mesh. They certify themselves: whoever knows a clan and a machine key knows the address, and
//! nobody can claim the address of another key.

use std::net::Ipv6Addr;

use crate::{ClanId, ClanName, MachineId, ServiceName};

/// The /48 that all machines of a clan share: `fd`, then the first 40 bits of the clan id (RFC 4193 unique local).
pub fn clan_prefix(clan: &ClanId) -> (Ipv6Addr, u8) {
    let mut octets = [0u8; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&clan.as_bytes()[..5]);
    (Ipv6Addr::from(octets), 48)
}

/// A machine's address: the clan's /48, then 80 bits of the BLAKE3 hash of the machine key.
pub fn mesh_address(clan: &ClanId, machine: &MachineId) -> Ipv6Addr {
    let (prefix, _) = clan_prefix(clan);
    let mut octets = prefix.octets();
    let hash = blake3::derive_key("clan 2026-11 mesh address v1", machine.as_bytes());
    octets[6..].copy_from_slice(&hash[..10]);
    Ipv6Addr::from(octets)
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
}
