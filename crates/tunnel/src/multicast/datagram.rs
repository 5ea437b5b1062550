//! The IP packets that multicast DNS travels in (RFC 6762, sections 3 and 11): UDP between port 5353 and a group, without
//! anything around it that need not be there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::BytesMut;

use crate::{
    ip,
    offload::checksum::{fold, pseudo_header, seal_ipv4, sum},
};

/// The port of multicast DNS.
pub const PORT: u16 = 5353;
/// The groups.
pub const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
/// The groups.
pub const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
/// What section 11 asks for.
const HOPS: u8 = 255;

/// Whether a packet to this address may be multicast DNS.
#[inline]
pub fn is_group(destination: IpAddr) -> bool {
    match destination {
        IpAddr::V4(destination) => destination == GROUP_V4,
        IpAddr::V6(destination) => destination == GROUP_V6,
    }
}

/// A whole UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Datagram<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    pub(super) payload: &'a [u8],
}

/// Reads a packet; `None` if it is no whole UDP datagram right behind a plain IP header. Checksums are not looked at.
pub(super) fn read(packet: &[u8]) -> Option<Datagram<'_>> {
    let addresses = ip::addresses(packet)?;
    let packet = packet.get(..addresses.length)?;
    let at = match packet[0] {
        0x45 if packet[9] == UDP && u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff == 0 => 20,
        first if first >> 4 == 6 && packet[6] == UDP => 40,
        _ => return None,
    };
    let (header, payload) = packet[at..].split_at_checked(UDP_HEADER)?;
    let pair = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    (usize::from(pair(4)) == UDP_HEADER + payload.len()).then_some(Datagram {
        source: addresses.source,
        destination: addresses.destination,
        source_port: pair(0),
        destination_port: pair(2),
        payload,
    })
}

/// Writes a packet. `None` if the addresses are of two versions, or it would be too long.
pub(super) fn write(datagram: &Datagram<'_>) -> Option<BytesMut> {
    let length = u16::try_from(UDP_HEADER + datagram.payload.len()).ok()?;
    let mut packet = BytesMut::with_capacity(40 + usize::from(length));
    match (datagram.source, datagram.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&length.checked_add(20)?.to_be_bytes());
            // Not in pieces.
            packet.extend_from_slice(&[0, 0, 0x40, 0, HOPS, UDP, 0, 0]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
            seal_ipv4(&mut packet[..20]);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&length.to_be_bytes());
            packet.extend_from_slice(&[UDP, HOPS]);
            packet.extend_from_slice(&source.octets());
            packet.extend_from_slice(&destination.octets());
        }
        _ => return None,
    }
    let at = packet.len();
    packet.extend_from_slice(&datagram.source_port.to_be_bytes());
    packet.extend_from_slice(&datagram.destination_port.to_be_bytes());
    packet.extend_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(datagram.payload);
    let checksum = !fold(pseudo_header(&packet, UDP, usize::from(length)) + sum(&packet[at..]));
    // None at all is written as 0 (RFC 768).
    let checksum = if checksum == 0 { 0xffff } else { checksum };
    packet[at + 6..at + 8].copy_from_slice(&checksum.to_ne_bytes());
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_and_sums_up(v4: bool, port: u16, payload in prop::collection::vec(any::<u8>(), 0..600)) {
            let (source, destination): (IpAddr, IpAddr) = if v4 {
                (Ipv4Addr::new(100, 64, 0, 1).into(), GROUP_V4.into())
            } else {
                ("fd00::1".parse().unwrap(), GROUP_V6.into())
            };
            let datagram = Datagram { source, destination, source_port: port, destination_port: PORT, payload: &payload };
            let packet = write(&datagram).unwrap();
            prop_assert_eq!(read(&packet), Some(datagram));
            let at = if v4 { 20 } else { 40 };
            let whole = pseudo_header(&packet, UDP, packet.len() - at) + sum(&packet[at..]);
            prop_assert_eq!(fold(whole), 0xffff);
            if v4 {
                prop_assert_eq!(fold(sum(&packet[..20])), 0xffff);
            }
        }

        #[test]
        fn anything_is_read_within_bounds(mut bytes in prop::collection::vec(any::<u8>(), 0..100), first in prop::sample::select(vec![0x45u8, 0x60, 0x46])) {
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            let _ = read(&bytes);
        }
    }

    #[test]
    fn pieces_options_and_other_protocols_are_not_read() {
        let (source, destination) = (Ipv4Addr::new(100, 64, 0, 1).into(), GROUP_V4.into());
        let datagram = Datagram { source, destination, source_port: PORT, destination_port: PORT, payload: b"x" };
        let packet = write(&datagram).unwrap();
        for (at, value) in [(0, 0x46), (6, 0x20), (7, 1), (9, 6), (25, 200)] {
            let mut other = packet.clone();
            other[at] = value;
            assert_eq!(read(&other), None, "{at}");
        }
        assert_eq!(read(&packet[..packet.len() - 1]), None);
    }
}
