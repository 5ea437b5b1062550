//! What an IP packet says about itself, read with bounds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Who an IP packet is from and for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Claimed by the sender.
    pub source: IpAddr,
    /// Claimed by the sender.
    pub destination: IpAddr,
    /// Of the whole packet, as its header says; the bytes may be more (padding) or less (a broken packet).
    pub length: usize,
}

/// Reads the addresses of an IPv4 or IPv6 packet; `None` if its header is not complete.
#[inline]
pub fn addresses(packet: &[u8]) -> Option<Addresses> {
    match packet.first()? >> 4 {
        4 => {
            let header = packet.get(..20)?;
            let ip = |at: usize| IpAddr::V4(Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]));
            let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
            (length >= 20).then(|| Addresses { source: ip(12), destination: ip(16), length })
        }
        6 => {
            let header = packet.get(..40)?;
            let ip =
                |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).map(|octets| IpAddr::V6(Ipv6Addr::from(octets)));
            let length = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
            Some(Addresses { source: ip(8).ok()?, destination: ip(24).ok()?, length })
        }
        _ => None,
    }
}

/// The UDP port that a packet is sent from; `None` if it is not UDP, or not the beginning of a datagram.
#[inline]
pub fn udp_source(packet: &[u8]) -> Option<u16> {
    const UDP: u8 = 17;
    let at = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&UDP) && packet.get(6)? & 0x1f == 0 && packet.get(7) == Some(&0) => {
            usize::from(packet[0] & 0x0f) * 4
        }
        6 if packet.get(6) == Some(&UDP) => 40,
        _ => return None,
    };
    Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?))
}

/// Takes one from the number of hops that a packet may still make. False if it may make none, or is none of IP.
pub fn hop(packet: &mut [u8]) -> bool {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) if packet.len() >= 20 => {
            if packet[8] <= 1 {
                return false;
            }
            packet[8] -= 1;
            // RFC 1624: HC' = ~(~HC + ~m + m'), where the word of time and protocol falls by 0x0100.
            let checksum = u32::from(u16::from_be_bytes([packet[10], packet[11]]));
            let sum = checksum + 0x0100;
            let folded = ((sum & 0xffff) + (sum >> 16)) as u16;
            packet[10..12].copy_from_slice(&folded.to_be_bytes());
            true
        }
        Some(6) if packet.len() >= 40 => {
            if packet[7] <= 1 {
                return false;
            }
            packet[7] -= 1;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header of 20 bytes with a right checksum.
    fn v4(ttl: u8, salt: [u8; 4]) -> [u8; 20] {
        let mut header =
            [0x45, 0, 0, 20, salt[0], salt[1], 0, 0, ttl, 6, 0, 0, 100, 64, salt[2], salt[3], 100, 64, 0, 2];
        let checksum = !ones(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn ones(bytes: &[u8]) -> u16 {
        let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_within_bounds(mut bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Some(found) = addresses(&bytes) {
                prop_assert!(found.length >= 20);
            }
            hop(&mut bytes);
        }

        #[test]
        fn a_hop_leaves_the_checksum_right(ttl in 2u8.., salt: [u8; 4]) {
            let mut header = v4(ttl, salt);
            prop_assert_eq!(ones(&header), 0xffff);
            prop_assert!(hop(&mut header));
            prop_assert_eq!((header[8], ones(&header)), (ttl - 1, 0xffff));
        }
    }

    #[test]
    fn the_last_hop_is_the_last() {
        assert!(!hop(&mut v4(1, [0; 4])));
        let mut v6 = [0x60; 40];
        v6[7] = 1;
        assert!(!hop(&mut v6));
        v6[7] = 2;
        assert!(hop(&mut v6) && v6[7] == 1);
    }

    #[test]
    fn addresses_are_read_from_both_versions() {
        let found = addresses(&v4(64, [0, 0, 0, 1])).unwrap();
        assert_eq!(found.source, "100.64.0.1".parse::<IpAddr>().unwrap());
        assert_eq!((found.destination, found.length), ("100.64.0.2".parse().unwrap(), 20));
        let mut v6 = [0; 48];
        (v6[0], v6[5], v6[8], v6[39]) = (0x60, 8, 0xfd, 1);
        let found = addresses(&v6).unwrap();
        assert_eq!(found.source, "fd00::".parse::<IpAddr>().unwrap());
        assert_eq!((found.destination, found.length), ("::1".parse().unwrap(), 48));
        assert_eq!(addresses(&v6[..39]), None);
        assert_eq!(addresses(&[]), None);
    }

    #[test]
    fn the_port_of_a_datagram_is_read_with_bounds() {
        let mut v6 = [0; 48];
        (v6[0], v6[6]) = (0x60, 17);
        v6[40..42].copy_from_slice(&41640u16.to_be_bytes());
        assert_eq!(udp_source(&v6), Some(41640));
        assert_eq!(udp_source(&v6[..41]), None);
        v6[6] = 6;
        assert_eq!(udp_source(&v6), None, "TCP");
        let mut v4 = [0; 32];
        (v4[0], v4[9]) = (0x46, 17);
        v4[24..26].copy_from_slice(&7u16.to_be_bytes());
        assert_eq!(udp_source(&v4), Some(7), "options are skipped");
        v4[7] = 1;
        assert_eq!(udp_source(&v4), None, "a later fragment has no ports");
    }

    proptest! {
        #[test]
        fn reading_ports_of_anything_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = udp_source(&bytes);
        }
    }
}
